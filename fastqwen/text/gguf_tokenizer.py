"""The tokenizer that a GGUF's metadata describes: byte-level BPE, from its tokens and merges."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.text.tokenizer import QWEN_WORDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type

# What ends an answer wherever a vocabulary has it, as llama.cpp takes it (llama-vocab.cpp, end-of-generation tokens).
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>")  # fmt: skip
# A token of this shape that no merges lead to was added as a whole; those with bars are never text.
ADDED = re.compile(r"<[|\uff5c].+[|\uff5c]>|</?[a-z_]+>")

# How text is cut into words before merges apply, by tokenizer.ggml.pre. The patterns are GPT-2's, and what the tokenizer.json
# of Qwen2 and of Llama 3 contain.
_LLAMA3 = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_QWEN3_5 = QWEN_WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"\s\p{L}\p{N}", r"\s\p{L}\p{M}\p{N}"
)  # marks are letters


class _Kind(NamedTuple):
    pattern: str | None  # None: GPT-2's, which the library has
    digits_alone: bool = False
    nfc: bool = False  # compose characters first
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say


KINDS = {
    "qwen2": _Kind(QWEN_WORDS, nfc=True),
    "llama-bpe": _Kind(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": _Kind(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": _Kind(_LLAMA3, ignore_merges=True, add_bos=True),
    "falcon3": _Kind(_LLAMA3, ignore_merges=True, add_bos=True),
    "qwen35": _Kind(_QWEN3_5, nfc=True),
    "deepseek-r1-qwen": _Kind(QWEN_WORDS),
    "kormo": _Kind(QWEN_WORDS),
    "f2llmv2": _Kind(QWEN_WORDS),
    "megrez": _Kind(QWEN_WORDS),
    "stablelm2": _Kind(QWEN_WORDS),
    "dbrx": _Kind(_LLAMA3),
    "smaug-bpe": _Kind(_LLAMA3),
    "smollm": _Kind(None, digits_alone=True),
    "starcoder": _Kind(None, digits_alone=True),
    "refact": _Kind(None, digits_alone=True),
    "command-r": _Kind(None, digits_alone=True),
    "codeshell": _Kind(None, digits_alone=True),
    "a.x-4.0": _Kind(None),
    "mellum": _Kind(None),
    "gigachat": _Kind(None),
    "gpt-2": _Kind(None),
    "mpt": _Kind(None),
    "phi-2": _Kind(None),
    "default": _Kind(None),
}


TEMPLATE = "tokenizer.chat_template"


class TextFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a GGUF says about text, but for the tokenizer itself."""

    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    add_bos: bool
    add_eos: bool = False  # embedding models close a text with it
    tool_template: str | None = None  # for chats with tools, where there is one of its own
    ends: tuple[int, ...] = ()  # what ends an answer beside eos_token_id


def text_facts(metadata: dict[str, Any], source: str = "the GGUF file") -> TextFacts:
    """``source`` is the file that errors name. Raises BadCheckpoint for a value of a wrong type."""
    template, tool_template = (_text(metadata, key, source) for key in (TEMPLATE, f"{TEMPLATE}.tool_use"))
    pre = metadata.get("tokenizer.ggml.pre")
    default = isinstance(pre, str) and pre in KINDS and KINDS[pre].add_bos
    return TextFacts(
        chat_template=template if template is not None and template.strip() else None,
        bos_token_id=_token_id(metadata, "bos_token_id", source),
        eos_token_id=_token_id(metadata, "eos_token_id", source),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", default) is True,
        add_eos=metadata.get("tokenizer.ggml.add_eos_token") is True,
        tool_template=tool_template,
        ends=_ends(metadata, source),
    )


def _text(metadata: dict[str, Any], key: str, source: str) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise BadCheckpoint(f"{source}: {key} is not text")
    return value


def _ends(metadata: dict[str, Any], source: str) -> tuple[int, ...]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    named = [_token_id(metadata, f"{name}_token_id", source) for name in ("eot", "eom")]
    found = [number for number, token in enumerate(tokens) if token in ENDS] if isinstance(tokens, list) else []
    return tuple(dict.fromkeys([*(number for number in named if number is not None), *found]))


def tokenizer_from_gguf(metadata: dict[str, Any], source: str) -> Tokenizer:
    """``encode(text)`` adds the file's BOS where the file wants one; ``add_special_tokens=False`` never does.

    Raises Unsupported for another kind of tokenizer, BadCheckpoint for data that cannot be one; both name ``source``.
    """
    import tokenizers
    from tokenizers import decoders, models

    kind = kind_of_words(metadata, source)
    tokens = _strings(metadata, "tokens", source)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if not tokens or len(vocabulary) != len(tokens):
        problem = "is empty" if not tokens else "has a token twice"
        raise BadCheckpoint(f"{source}: tokenizer.ggml.tokens {problem}")
    merges = _merges(metadata, vocabulary, source)
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind.ignore_merges)
    except Exception as error:  # the library raises plain Exception
        raise BadCheckpoint(f"{source}: tokenizer.ggml.merges do not fit the tokens: {error}") from None
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    _cut_words(tokenizer, kind)
    _add_tokens(tokenizer, metadata, tokens, source)
    _tell_unread(metadata, source)
    _add_ends(tokenizer, text_facts(metadata, source), tokens, source)
    return tokenizer


def kind_of_words(metadata: dict[str, Any], source: str) -> _Kind:
    """Raises Unsupported for a tokenizer of another kind, BadCheckpoint where there is none."""
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise BadCheckpoint(f"{source} holds no tokenizer: tokenizer.ggml.model is missing")
    if model != "gpt2":
        kinds = {"llama": "a SentencePiece tokenizer", "none": "no tokenizer", "no_vocab": "no tokenizer"}
        what = kinds.get(str(model), f"a tokenizer of the kind {str(model)[:40]!r}")
        raise Unsupported(
            f"{source} has {what} (tokenizer.ggml.model), only byte-level BPE ('gpt2') is supported; "
            "give a folder with the model's tokenizer.json as --tokenizer"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:  # files from before the key existed
        pre = "qwen2" if str(metadata.get("general.architecture")).startswith("qwen") else "default"
        log.warning("%s: tokenizer.ggml.pre is missing; words are cut as %s does", source, pre)
    if not isinstance(pre, str) or pre not in KINDS:
        raise Unsupported(
            f"{source}: tokenizer.ggml.pre is {str(pre)[:40]!r}, and how that cuts words is not known here: give a folder with "
            f"the model's tokenizer.json as --tokenizer; known: {', '.join(KINDS)}"
        )
    return KINDS[pre]


# What else a file says of its text; a key beside these is told.
KNOWN_KEYS = frozenset((
    "model", "pre", "tokens", "token_type", "merges", "scores", "token_type_count", "add_bos_token", "add_eos_token",
    "add_sep_token", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap",
    *(f"{name}_token_id" for name in (
        "bos", "eos", "eot", "eom", "unk", "unknown", "sep", "seperator", "separator", "pad", "padding", "cls", "mask", "prefix",
        "suffix", "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep",
    )),
))  # fmt: skip


def _tell_unread(metadata: dict[str, Any], source: str) -> None:
    keys = [
        key for key in metadata if key.startswith("tokenizer.ggml.") and key.partition(".ggml.")[2] not in KNOWN_KEYS
    ]
    named = [key for key in metadata if key.startswith(f"{TEMPLATE}.") and not key.endswith(".tool_use")]
    if keys or named:
        log.warning("%s: not read: %s", source, ", ".join([*keys, *named][:8]))
    if isinstance(metadata.get(TEMPLATE), str) and not metadata[TEMPLATE].strip():
        log.warning("%s: %s is empty, and taken as none", source, TEMPLATE)


def _strings(metadata: dict[str, Any], name: str, source: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadCheckpoint(f"{source}: tokenizer.ggml.{name} is not a list of strings")
    return values


def _merges(metadata: dict[str, Any], vocabulary: dict[str, int], source: str) -> list[tuple[str, str]]:
    merges = []
    for number, merge in enumerate(_strings(metadata, "merges", source)):
        left, space, right = merge.partition(" ")
        if not space or not left or not right or " " in right:
            raise BadCheckpoint(f"{source}: merge {number} is {merge[:80]!r}, expected two parts and a space between")
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise BadCheckpoint(
                f"{source}: merge {number} is {merge[:80]!r}, which tokenizer.ggml.tokens do not contain"
            )
        merges.append((left, right))
    return merges


def _cut_words(tokenizer: Tokenizer, kind: _Kind) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    steps: list[Any] = []
    if kind.digits_alone:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if kind.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(kind.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()


def _add_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], source: str) -> None:
    """Tokens that are matched in the text itself keep their ids: the library takes the vocabulary's."""
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = np.full(len(tokens), NORMAL)
    if not isinstance(types, np.ndarray) or types.shape != (len(tokens),) or types.dtype.kind not in "iu":
        raise BadCheckpoint(f"{source}: tokenizer.ggml.token_type is not a list of {len(tokens)} whole numbers")
    mistyped = _mistyped(metadata, tokens, types)
    if mistyped:
        names = ", ".join(tokens[number] for number in sorted(mistyped)[:8])
        log.warning(
            "%s: tokenizer.ggml.token_type calls %s text; taken as the added tokens that they are", source, names
        )
    types = types.copy()
    for number, kind in mistyped.items():
        types[number] = kind
    added = []
    for number in map(int, np.flatnonzero((types == CONTROL) | (types == USER_DEFINED))):
        if not tokens[number]:
            raise BadCheckpoint(f"{source}: control token {number} has no text")
        added.append(AddedToken(tokens[number], special=bool(types[number] == CONTROL), normalized=False))
    tokenizer.add_tokens(added)


def _mistyped(metadata: dict[str, Any], tokens: list[str], types: np.ndarray[Any, Any]) -> dict[int, int]:
    """Tokens that were added as wholes and are not typed so, with the type that they should have.

    llama.cpp corrects those that end answers; others would be spelled out in letters, which the model never saw.
    """
    merged = {
        merge.replace(" ", "", 1) for merge in metadata.get("tokenizer.ggml.merges") or () if isinstance(merge, str)
    }
    found = {}
    for number, token in enumerate(tokens):
        if types[number] == CONTROL or token in merged or ADDED.fullmatch(token) is None:
            continue
        kind = CONTROL if token[1:2] in "|\uff5c" or token in ENDS else USER_DEFINED
        if types[number] != USER_DEFINED or token in ENDS:
            found[number] = kind
    return found


def _add_ends(tokenizer: Tokenizer, facts: TextFacts, tokens: list[str], source: str) -> None:
    from tokenizers.processors import TemplateProcessing

    ends = []
    for name, wanted, number in (
        ("bos", facts.add_bos, facts.bos_token_id),
        ("eos", facts.add_eos, facts.eos_token_id),
    ):
        if wanted and number is None:
            where = "start" if name == "bos" else "end"
            raise BadCheckpoint(
                f"{source}: texts are to {where} with a {name.upper()} token, but tokenizer.ggml.{name}_token_id is missing"
            )
        if wanted:
            # Under a name of our own, for the template has a syntax that a token's text could collide with.
            ends.append({"id": name, "ids": [number], "tokens": [tokens[number or 0]]})
    if ends:
        template = f"{'bos ' if facts.add_bos else ''}$A{' eos' if facts.add_eos else ''}"
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ends)


def _token_id(metadata: dict[str, Any], name: str, source: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    limit = len(tokens) if isinstance(tokens, list) else 2**31
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit):
        return value
    raise BadCheckpoint(f"{source}: tokenizer.ggml.{name} is {str(value)[:40]!r}, expected one of {limit} tokens")
