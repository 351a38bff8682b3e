"""How much longer a tokenizer's own rules may make a text, told from the rules: they are read before anything is done with them.

What a rule does to a short text is done in native code, which nothing can interrupt, and takes whatever memory it likes.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import msgspec

MAX_GROWTH = 64  # of a text, by its normalizer; no real one comes near
MAX_ADDED_IDS = 1024  # to a text, by its post-processor
MAX_ADDED_CHARS = 4096  # to a text, by its normalizer, however short it is
UNICODE_GROWTH = 18  # of U+FDFA, the longest decomposition there is
CASE_GROWTH = 3  # of U+0390 in lower or upper case, and of a Chinese character between spaces
BYTES_GROWTH = 4  # of a character, spelled as its bytes
_UNICODE_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Nmt"})


class BadRules(ValueError):
    """Says which rule is not read."""


class _Rules(msgspec.Struct):
    normalizer: Any = None
    post_processor: Any = None


def check_file(data: str) -> None:
    """Of a tokenizer.json. Raises BadRules; what is no JSON is left to who reads it."""
    try:
        rules = msgspec.json.decode(data, type=_Rules)
    except msgspec.DecodeError:
        return
    check_normalizer(rules.normalizer)
    check_post_processor(rules.post_processor)


def check_read(part: Any, check: Any) -> None:
    """The same of a part as the library read it: of a key that is there twice, it may have taken the other."""
    if part is not None:
        check(msgspec.json.decode(part.__getstate__()))


def check_normalizer(rules: Any) -> None:
    growth, added, has_forms = 1.0, 0, False
    for rule in _each(rules, "normalizers"):
        kind = rule.get("type")
        if kind in _UNICODE_FORMS:
            factor = 1.0 if has_forms else UNICODE_GROWTH  # a second one finds little to take apart
            has_forms = True
        elif kind == "Replace":
            factor = _growth_of_replacing(rule)
        elif kind == "Precompiled":
            factor = _growth_of_charsmap(rule.get("precompiled_charsmap"))
        else:
            factor = {"BertNormalizer": CASE_GROWTH, "Lowercase": CASE_GROWTH, "ByteLevel": BYTES_GROWTH}.get(
                str(kind), 1.0
            )
        growth *= factor
        if kind == "Prepend":
            added += len(str(rule.get("prepend", "")))
        if growth > MAX_GROWTH * (UNICODE_GROWTH if has_forms else 1) or added > MAX_ADDED_CHARS:
            raise BadRules(
                f"its normalizer may make a text more than {MAX_GROWTH} times as long, or {MAX_ADDED_CHARS} characters longer"
            )


def check_post_processor(rules: Any) -> None:
    """What stands around a text and around a pair of them."""
    num_ids = 0
    for rule in _each(rules, "processors"):
        known = rule.get("special_tokens")
        sizes = {name: len(one["ids"]) for name, one in known.items()} if isinstance(known, dict) else {}
        for piece in (*rule.get("single", ()), *rule.get("pair", ())) if sizes else ():
            num_ids += sizes.get(piece.get("SpecialToken", {}).get("id"), 0)
    if num_ids > MAX_ADDED_IDS:
        raise BadRules(f"its post_processor puts {num_ids} tokens around a text, at most {MAX_ADDED_IDS} are read")


def _each(rules: Any, key: str) -> list[dict[str, Any]]:
    """The rules one by one, whatever they are nested in."""
    found, left = [], [rules]
    while left:
        rule = left.pop()
        if isinstance(rule, dict):
            inner = rule.get(key)
            left += reversed(inner) if isinstance(inner, list) else []
            found.append(rule)
    return found


def _growth_of_replacing(rule: dict[str, Any]) -> float:
    pattern, content = rule.get("pattern"), len(str(rule.get("content", "")))
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str):
        return max(1.0, content / max(1, len(text)))
    return 1.0 + content  # a regular expression may find nothing, between any two characters


def _growth_of_charsmap(encoded: Any) -> float:
    """Of SentencePiece's table: the bytes of a trie, their number in front, then texts with a zero behind each."""
    try:
        data = base64.b64decode(encoded, validate=True)
        size = int.from_bytes(data[:4], "little")
        if len(data) < 8 or size % 4 or not 4 <= size <= len(data) - 4:
            raise ValueError
        texts = data[4 + size :].decode()
    except (TypeError, ValueError, binascii.Error):
        raise BadRules("its normalizer's precompiled_charsmap is no table of characters") from None
    if not texts.endswith("\0"):
        raise BadRules("its normalizer's precompiled_charsmap breaks off")
    return float(max(1, *map(len, texts.split("\0"))))
