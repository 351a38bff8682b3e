"""A tokenizer's rules that make a short text long, or are none: told in one line before they are at work."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fastqwen.errors import BadCheckpoint
from fastqwen.text.belonging import check_template
from fastqwen.text.folder_tokenizer import from_tokenizer_json
from fastqwen.text.growth import BadRules, check_normalizer, check_post_processor
from fastqwen.text.template import ChatTemplate

SPECIAL = "<|im_end|>"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def replace(pattern: Any, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def table(texts: bytes) -> bytes:
    return (4).to_bytes(4, "little") + bytes(4) + texts


def sequence(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(rules)}


GROWING = {
    "a letter to a text": replace({"String": "a"}, "b" * 2**20),
    "anything to a text": replace({"Regex": ".?"}, "b" * 100),
    "doubled and doubled": sequence(*[replace({"Regex": "."}, "aa")] * 20),
    "nested": sequence(sequence(sequence(*[replace({"String": "a"}, "a" * 9)] * 2), replace({"String": "a"}, "aa"))),
    "in front": {"type": "Prepend", "prepend": "b" * 2**20},
    "in front, often": sequence(*[{"type": "Prepend", "prepend": "b" * 1000}] * 5),
    "a table": charsmap(table(b"a" * 5000 + b"\0")),
}
BROKEN = {
    "empty": charsmap(b""),
    "no size": charsmap(b"\xff" * 100),
    "a size that asks for gigabytes": charsmap(b"\xfc\xff\xff\xff" + bytes(100)),
    "no text": charsmap(table(b"\xff\xfe\0")),
    "breaks off": charsmap(table(b"abc")),
    "no base64": {"type": "Precompiled", "precompiled_charsmap": "???"},
    "no table": {"type": "Precompiled", "precompiled_charsmap": None},
}


def written(folder: Path, text: str | None = None, **parts: Any) -> Path:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    inner.add_special_tokens([SPECIAL])
    (folder / "tokenizer.json").write_text(text or json.dumps({**json.loads(inner.to_str()), **parts}))
    return folder


@pytest.mark.parametrize("name", GROWING)
def test_rules_that_multiply_a_text_are_refused(tmp_path: Path, name: str):
    with pytest.raises(
        BadCheckpoint, match=r"tokenizer.json: its normalizer may make a text more than 64 times as long"
    ):
        from_tokenizer_json(written(tmp_path, normalizer=GROWING[name]), {})


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_of_junk_is_refused(tmp_path: Path, name: str):
    with pytest.raises(BadCheckpoint, match="precompiled_charsmap"):
        from_tokenizer_json(written(tmp_path, normalizer=BROKEN[name]), {})


def test_of_a_rule_that_is_there_twice_the_one_that_counts_is_looked_at(tmp_path: Path):
    text = written(tmp_path).joinpath("tokenizer.json").read_text()
    twice = text.replace('"normalizer": null', f'"normalizer": {json.dumps(GROWING["in front"])}, "normalizer": null')
    assert twice != text
    for one in (twice, twice.replace('"normalizer"', '"nor\\u006dalizer"')):
        try:
            found = from_tokenizer_json(written(tmp_path, one), {})
        except BadCheckpoint:
            continue
        assert found is not None and len(found[0].encode("a")) < 10


def test_a_post_processor_of_millions_of_tokens_is_refused(tmp_path: Path):
    sequence_a = {"Sequence": {"id": "A", "type_id": 0}}
    around = {
        "type": "TemplateProcessing",
        "single": [sequence_a, *[{"SpecialToken": {"id": SPECIAL, "type_id": 0}}] * 1000],
        "pair": [sequence_a, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {SPECIAL: {"id": SPECIAL, "ids": [256] * 1000, "tokens": [SPECIAL] * 1000}},
    }
    for rules in (around, {"type": "Sequence", "processors": [BYTES, around]}):
        with pytest.raises(BadCheckpoint, match="its post_processor puts 1000000 tokens around a text, at most 1024"):
            from_tokenizer_json(written(tmp_path, post_processor=rules), {})


REAL = [
    None,
    {"type": "NFC"},
    sequence({"type": "NFKD"}, {"type": "Lowercase"}, {"type": "StripAccents"}, {"type": "NFKC"}),
    {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    sequence({"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581")),
    sequence(charsmap(table(b"fi\0" + "a\u0308".encode() + b"\0")), replace({"Regex": " {2,}"}, "\u2581")),
    sequence(replace({"String": "``"}, '"'), replace({"String": "''"}, '"'), {"type": "NFKD"}, {"type": "Strip"}),
]


@pytest.mark.parametrize("rules", REAL)
def test_what_tokenizers_do_is_read(rules: Any):
    check_normalizer(rules)
    check_post_processor(BYTES)
    check_post_processor({"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}})


def test_a_panic_of_the_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastqwen.text.growth.check_file", lambda text: None)
    with pytest.raises(BadCheckpoint, match="is damaged"):
        from_tokenizer_json(written(tmp_path, normalizer=BROKEN["empty"]), {})


def test_a_template_that_writes_a_book_around_two_words_is_refused(tmp_path: Path):
    found = from_tokenizer_json(written(tmp_path), {})
    assert found is not None
    grows = "{% set t = namespace(x='a' * 1000) %}{% for i in range(9) %}{% set t.x = t.x ~ t.x %}{% endfor %}{{ t.x }}"
    with pytest.raises(BadCheckpoint, match="makes 512000 characters of two short messages, at most 200000"):
        check_template(found[0], "tokenizer.json", ChatTemplate(grows, origin="x"))
    with pytest.raises(BadRules):
        check_normalizer(GROWING["nested"])
