"""One tokenizer interface over tokenizer.json, GGUF metadata and Qwen-1's tiktoken file.

Text is decoded from bytes: each token has its bytes, and a text is the UTF-8 of their concatenation. Streamed and whole
answers are then the same by construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from functools import cache, cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

from fastqwen.errors import BadRequest

if TYPE_CHECKING:
    import tokenizers

# How all Qwens cut text into words before merges apply.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What begins and ends turns is never text, whatever a file calls it.
TURNS = frozenset(
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
)
PROBE = "a"
CHARS_PER_TOKEN = 32  # no real text comes near this average; longer input cannot fit and is not worth tokenising


class Tokenizer(ABC):
    """``control_tokens``: what only a template may write, never a user: text to id.

    ``vocab_size``: one more than the largest id that has a meaning.
    """

    control_tokens: dict[str, int]
    vocab_size: int
    max_chars = 2**31

    @property
    def added_ids(self) -> Set[int]:
        """Tokens that stand beside the vocabulary of text: control tokens, and others that were added as wholes."""
        return frozenset(self.control_tokens.values())

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Empty for an id without meaning, such as the padding at the end of an embedding."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a control or added token, by its text."""

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""

    def limit_length(self, max_model_len: int) -> None:
        """Refuse texts that cannot fit before the tokenizer's regular expression sees them."""
        self.max_chars = max(100_000, CHARS_PER_TOKEN * max_model_len)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; control tokens written in it are recognised. Raises BadRequest."""
        self.check(text)
        return self._guard(lambda: self._encode(text, add_special_tokens))

    def check(self, text: str) -> None:
        self.check_length(len(text))
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the text contains a lone surrogate, which is no character", "prompt") from None

    def check_length(self, num_chars: int) -> None:
        if num_chars > self.max_chars:
            raise BadRequest(
                f"the prompt has {num_chars} characters; more than {self.max_chars} cannot fit into this model's maximum context "
                "length. Please reduce the length of the input prompt",
                "prompt",
                "context_length_exceeded",
            )

    @staticmethod
    def _guard(encode: Callable[[], list[int]]) -> list[int]:
        try:
            return encode()
        except BaseException as error:
            # Regular expressions fail on extreme texts: as ValueError, or as a Rust panic, which is a BaseException
            # that damages nothing of this process.
            if type(error).__name__ != "PanicException" and not isinstance(error, ValueError):
                raise
            raise BadRequest(
                "the tokenizer cannot process this text: is it one very long run of spaces?", "prompt"
            ) from None

    @cached_property
    def closing_ids(self) -> list[int]:
        """What the tokenizer's own post-processor puts behind a text, such as Qwen3-Embedding's <|endoftext|>."""
        plain, whole = self._encode(PROBE, False), self._encode(PROBE, True)
        starts = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
        return whole[starts[0] + len(plain) :] if plain and starts else []

    def closed_once(self, token_ids: list[int]) -> list[int]:
        """Ids of a text that spelled out its end itself, so that the post-processor closed it a second time."""
        end = self.closing_ids
        return token_ids[: -len(end)] if end and token_ids[-2 * len(end) :] == end + end else token_ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        hidden = set(self.control_tokens.values()) if skip_special_tokens else set()
        data = b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in hidden)
        return data.decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def vocabulary_entry(self, token_id: int) -> str:
        """A character for each byte, as vocabularies of files spell tokens ("Ġworld"); an added token as it is."""
        if token_id in self.added_ids:
            return self.token_text(token_id)
        return "".join(_CHARACTERS[byte] for byte in self.token_bytes(token_id))


class NoTokenizer(Tokenizer):
    """--skip-tokenizer-init: prompts are ids, and answers have ids but no text."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.control_tokens = {}

    def token_bytes(self, token_id: int) -> bytes:
        return b""

    def token_id(self, token: str) -> int | None:
        return None

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise BadRequest("there is no tokenizer (--skip-tokenizer-init): give prompts as token ids", "prompt")

    def encode_plain(self, text: str) -> list[int]:
        return self._encode(text, False)


class JsonTokenizer(Tokenizer):
    """Hugging Face's ``tokenizers``. ``byte_level``: the vocabulary spells bytes in GPT-2's alphabet. ``specials``: which of
    the added tokens are control tokens, where something else than the tokenizer itself decides that."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        byte_level: bool = True,
        specials: Mapping[str, bool] = MappingProxyType({}),
    ) -> None:
        self._inner = inner
        self._byte_level = byte_level
        self._added = {token_id: token for token_id, token in inner.get_added_tokens_decoder().items()}
        self.control_tokens = {
            token.content: token_id
            for token_id, token in self._added.items()
            if specials.get(token.content, token.special) or token.content in TURNS
        }
        self.vocab_size = max(inner.get_vocab_size(with_added_tokens=True), 1 + max(self._added, default=-1))
        self._bytes: dict[int, bytes] = {}  # as they are asked for; no larger than the vocabulary

    @property
    def added_ids(self) -> Set[int]:
        return self._added.keys()

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        piece = self._inner.id_to_token(token_id)
        if piece is None:
            return b""
        self._bytes[token_id] = found = self._spelled(token_id, piece)
        return found

    def _spelled(self, token_id: int, piece: str) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        if self._byte_level:
            alphabet = byte_alphabet()
            return b"".join(alphabet.get(char, char.encode()) for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def token_id(self, token: str) -> int | None:
        found: int | None = self._inner.token_to_id(token)
        return found

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        self.check(text)
        parts = break_control_tokens(text, self.control_tokens, BREAK).split(BREAK)
        return self._guard(lambda: [token_id for part in parts for token_id in self._encode(part, False)])


BREAK = "\ue0f0"


def break_control_tokens(text: str, control_tokens: dict[str, int], mark: str) -> str:
    """Put ``mark`` inside each control token that a text spells, right after its leading punctuation.

    Pre-tokenizers split there anyway, so encoding the parts one by one gives the ids of the plain text.
    """
    for token in control_tokens:
        if token in text:
            head = next((i for i, char in enumerate(token) if char.isalnum() or char == "_"), 1) or 1
            text = text.replace(token, token[:head] + mark + token[head:])
    return text


@cache
def byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 stands for itself, the rest moves to 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    alphabet.update({chr(256 + index): bytes([byte]) for index, byte in enumerate(others)})
    return alphabet


_CHARACTERS = {data[0]: char for char, data in byte_alphabet().items()}
