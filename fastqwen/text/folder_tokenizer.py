"""The tokenizer of a checkpoint's folder: tokenizer.json, or vocab.json with merges.txt; and the tokens that were added to
it, which stand in five places."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import read_json
from fastqwen.text import growth
from fastqwen.text.tokenizer import QWEN_WORDS, JsonTokenizer
from fastqwen.text_files import decoded, read_bytes, read_text, what_head_is

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 256 * 2**20
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
CONTROL_SHAPE = re.compile(r"<[|\uff5c].+[|\uff5c]>")


def tokenizer_words(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what special_tokens_map.json says instead: it counts, as in transformers."""
    words = _read_if_there(folder / "tokenizer_config.json")
    special = _read_if_there(folder / "special_tokens_map.json")
    for name in NAMED_TOKENS:
        if name in special and name in words and _text(special[name]) != _text(words[name]):
            log.warning(
                "%s: %s is %r in special_tokens_map.json and %r in tokenizer_config.json; the former counts",
                folder, name, _text(special[name]), _text(words[name]),
            )  # fmt: skip
    return {**words, **{key: value for key, value in special.items() if value is not None}}


def from_tokenizer_json(folder: Path, words: dict[str, Any]) -> tuple[JsonTokenizer, Path] | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    import tokenizers

    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise BadCheckpoint(f"{path} is larger than {MAX_TOKENIZER_BYTES} bytes, which no tokenizer is")
    data = read_bytes(path)
    try:
        text = decoded(data)
        growth.check_file(text)
        inner = tokenizers.Tokenizer.from_str(text)
        growth.check_read(inner.normalizer, growth.check_normalizer)
        growth.check_read(inner.post_processor, growth.check_post_processor)
    except growth.BadRules as error:
        raise BadCheckpoint(f"{path}: {error}") from None
    except BaseException as error:  # the library raises plain Exception, and a panic of Rust's is not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadCheckpoint(f"{path} {what_head_is(data[:512]) or f'is damaged: {str(error)[:300]}'}") from None
    # What a training script left in the file: here, all of a text counts, and nothing but it.
    inner.no_truncation()
    inner.no_padding()
    if words.get("add_prefix_space") is True and "add_prefix_space=True" not in str(inner.pre_tokenizer):
        log.warning("%s does not put a space before texts, add_prefix_space is true elsewhere; the former counts", path)
    specials = _add_tokens(inner, _added(folder, words), path)
    return _finished(inner, words, specials, byte_level="ByteLevel" in str(inner.decoder)), path


def from_vocabulary(folder: Path, words: dict[str, Any]) -> tuple[JsonTokenizer, Path] | None:
    """GPT-2's pair of files, which Qwen2's and Qwen3's tokenizers were saved in before there was one file."""
    path, merges_file = folder / "vocab.json", folder / "merges.txt"
    if not path.exists() or not merges_file.exists():
        return None
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    pattern = _words_of(folder, words)
    vocabulary, merges = read_json(path), _merges(merges_file)
    if not all(type(number) is int for number in vocabulary.values()):
        raise BadCheckpoint(f"{path} does not give a number for each token")
    try:
        inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises plain Exception
        raise BadCheckpoint(f"{merges_file} does not fit {path.name}: {str(error)[:300]}") from None
    steps: list[Any] = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    prefixed = words.get("add_prefix_space") is True
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefixed, use_regex=pattern is None))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    if pattern is not None:
        inner.normalizer = normalizers.NFC()
    specials = _add_tokens(inner, _added(folder, words), path)
    return _finished(inner, words, specials), path


def _finished(
    inner: tokenizers.Tokenizer, words: dict[str, Any], specials: dict[str, bool], *, byte_level: bool = True
) -> JsonTokenizer:
    if words.get("split_special_tokens") is True:
        log.warning(
            "tokenizer_config.json: split_special_tokens is true, so control tokens are read as text everywhere"
        )
        inner.encode_special_tokens = True
    named = dict.fromkeys((_text(words.get(name)) for name in NAMED_TOKENS), True)
    return JsonTokenizer(inner, byte_level=byte_level, specials={**specials, **named})


def no_tokenizer(folder: Path) -> BadCheckpoint:
    if (folder / "tokenizer.model").exists():
        return Unsupported(
            f"{folder} holds only tokenizer.model (SentencePiece), which is not read: save it as tokenizer.json with "
            "transformers, or name another folder with --tokenizer"
        )
    return BadCheckpoint(
        f"{folder} holds no tokenizer.json (nor vocab.json with merges.txt, nor qwen.tiktoken): add it, name another folder "
        "with --tokenizer, or use --skip-tokenizer-init to work with token ids only"
    )


def _words_of(folder: Path, words: dict[str, Any]) -> str | None:
    """How text is cut into words: Qwen's way, or GPT-2's (None). The model's kind decides, as in transformers."""
    kind = str(_read_if_there(folder / "config.json").get("model_type", ""))
    name = str(words.get("tokenizer_class") or "")
    if kind.startswith("qwen") or name.startswith("Qwen2"):
        return QWEN_WORDS
    if name.startswith("GPT2"):
        return None
    raise Unsupported(
        f"{folder}: vocab.json and merges.txt of {name or 'an unnamed class'} are not read; save the tokenizer as "
        "tokenizer.json with transformers"
    )


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.partition(" ")
        if not space or not left or not right or " " in right:
            raise BadCheckpoint(f"{path}: line {number} is {line[:80]!r}, expected two parts and a space between")
        merges.append((left, right))
    return merges


class _Added(NamedTuple):
    text: str
    token_id: int | None  # where the file says it
    special: bool
    flags: dict[str, bool]


def _added(folder: Path, words: dict[str, Any]) -> list[_Added]:
    """In the order in which transformers adds them: by number, then those that only have a text."""
    found: list[_Added] = []
    listed = words.get("added_tokens_decoder")
    for number, one in sorted((listed if isinstance(listed, dict) else {}).items(), key=lambda item: _number(item[0])):
        if isinstance(one, dict) and isinstance(one.get("content"), str):
            flags = {
                key: one[key]
                for key in ("lstrip", "rstrip", "single_word", "normalized")
                if isinstance(one.get(key), bool)
            }
            found.append(_Added(one["content"], _number(number), one.get("special") is True, flags))
    old = _read_if_there(folder / "added_tokens.json")
    for text, number in sorted(old.items(), key=lambda item: _number(item[1])):
        found.append(_Added(text, _number(number), CONTROL_SHAPE.fullmatch(text) is not None, {}))
    for key in ("additional_special_tokens", "extra_special_tokens"):
        texts: Any = words.get(key) or []
        listed = list(texts.values()) if isinstance(texts, dict) else texts
        found += [_Added(_text(one), None, True, {}) for one in listed if _text(one)]
    first: dict[str, _Added] = {}  # of several that say something of a token, the first counts
    for token in found:
        if token.text:
            first.setdefault(token.text, token)
    return list(first.values())


def _add_tokens(inner: tokenizers.Tokenizer, added: list[_Added], path: Path) -> dict[str, bool]:
    """Adds what the tokenizer's own file lacks; which of all are control tokens, where other files say it."""
    from tokenizers import AddedToken

    there = {token.content: (number, token) for number, token in inner.get_added_tokens_decoder().items()}
    known = {text: number for text, (number, _) in there.items()}
    for one in added:
        if one.text in there:
            _tell_of_flags(one, there[one.text][1], path)
        else:
            flags = {"normalized": not one.special, **one.flags}
            inner.add_tokens([AddedToken(one.text, special=one.special, **flags)])
            known[one.text] = inner.token_to_id(one.text) or 0
        if one.token_id is not None and one.token_id != known[one.text]:
            log.warning(
                "%s: token %s is said to be %d elsewhere, and is %d here, which counts",
                path, one.text[:80], one.token_id, known[one.text],
            )  # fmt: skip
    return {one.text: one.special for one in added}


def _tell_of_flags(one: _Added, there: tokenizers.AddedToken, path: Path) -> None:
    """``normalized`` is not among them: for control tokens, which hold no letters to be composed, it changes nothing."""
    differ = [
        key
        for key in ("lstrip", "rstrip", "single_word")
        if one.flags.get(key, getattr(there, key)) != getattr(there, key)
    ]
    if differ:
        log.warning("%s: %s of token %s differ elsewhere; the former counts", path, ", ".join(differ), one.text[:80])


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return -1


def _text(value: Any) -> str:
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
