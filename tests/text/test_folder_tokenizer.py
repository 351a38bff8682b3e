"""Tokenizers and chat templates of folders, wherever they stand: the ids and the template that transformers takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint
from fastqwen.models import read_config
from fastqwen.text.load import TextTools, load_text
from fastqwen.text.tokenizer import QWEN_WORDS, byte_alphabet

TEXT = "hello <|foo|> the <|im_end|>x 12345 \u00e9e\u0301"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("1", "2")]
CONFIG = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 288, "eos_token_id": 263,
}  # fmt: skip
FIRST = 256 + len(MERGES)
LISTED = [*SPECIALS, "<|foo|>"]


def added(text: str, special: bool = True) -> dict[str, Any]:
    return {
        "content": text, "special": special, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False,
    }  # fmt: skip


def folder(path: Path, *, files: dict[str, Any] | None = None, slow: bool = False, **words: Any) -> Path:
    vocabulary = {token: number for number, token in enumerate([*byte_alphabet(), *map("".join, MERGES)])}
    if slow:
        (path / "vocab.json").write_text(json.dumps(vocabulary))
        (path / "merges.txt").write_bytes(
            b"#version: 0.2\r\n" + b"".join(" ".join(pair).encode() + b"\r\n" for pair in MERGES)
        )
    else:
        made = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
        made.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
        made.save(str(path / "tokenizer.json"))
    words = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", **words}
    everything = {
        "config": CONFIG,
        "tokenizer_config": {key: value for key, value in words.items() if value is not None},
    }
    for name, content in {**everything, **(files or {})}.items():
        if "." in name:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(content)
        else:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


def ours(path: Path) -> TextTools:
    return load_text(path, read_config(path), EngineConfig(model=str(path)))


DECODER = {str(FIRST + number): added(text) for number, text in enumerate(LISTED)}
PLACES: dict[str, dict[str, Any]] = {
    "nowhere": {},
    "added_tokens_decoder": {"added_tokens_decoder": DECODER},
    "not-special": {"added_tokens_decoder": {**DECODER, str(FIRST + 3): added("<|foo|>", False)}},
    "additional_special_tokens": {"additional_special_tokens": ["<|foo|>"]},
    "extra_special_tokens": {"extra_special_tokens": {"image_token": "<|foo|>"}},
    "special_tokens_map.json": {"files": {"special_tokens_map": {"additional_special_tokens": ["<|foo|>"]}}},
    "added_tokens.json": {"files": {"added_tokens": {"<|foo|>": FIRST + 3}}},
    "vocab.json": {"slow": True, "added_tokens_decoder": DECODER},
    "vocab.json-and-added_tokens.json": {
        "slow": True, "files": {"added_tokens": {text: FIRST + number for number, text in enumerate(LISTED)}},
    },
    "vocab.json-and-all-others": {
        "slow": True,
        "files": {
            "added_tokens": {text: FIRST + number for number, text in enumerate(LISTED)},
            "special_tokens_map": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        },
    },
    "split": {"split_special_tokens": True},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_ids_of_transformers(place: str, tmp_path: Path):
    path = folder(tmp_path, **PLACES[place])
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert ours(path).tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)


def edited(path: Path, change: dict[str, Any]) -> Path:
    """tokenizer.json with other values."""
    written = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps({**written, **change}))
    return path


TRAINING = {
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": FIRST, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    },
}  # fmt: skip


@pytest.mark.parametrize("left", TRAINING)
def test_what_a_training_left_cuts_and_fills_no_prompts(left: str, tmp_path: Path):
    path = edited(folder(tmp_path), {left: TRAINING[left]})
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert ours(path).tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)


PLAIN = [{"id": FIRST + number, **added(text, False)} for number, text in enumerate(SPECIALS)]
SPECIAL_ELSEWHERE: dict[str, dict[str, Any]] = {
    "eos_token": {}, "added_tokens_decoder": {"added_tokens_decoder": DECODER},
    "special_tokens_map": {"files": {"special_tokens_map": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}}},
}  # fmt: skip


@pytest.mark.parametrize("where", SPECIAL_ELSEWHERE)
def test_a_token_is_hidden_if_any_file_calls_it_special(where: str, tmp_path: Path):
    path = edited(folder(tmp_path, **SPECIAL_ELSEWHERE[where]), {"added_tokens": PLAIN})
    theirs, found = transformers.AutoTokenizer.from_pretrained(path), ours(path).tokenizer
    ids = found.encode("hello<|im_end|>")
    assert ids[-1] == FIRST + 2
    assert found.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True) == "hello"
    # Whatever files say, a user cannot begin a turn.
    assert FIRST + 1 not in found.encode_plain("<|im_start|>system")


def test_a_token_that_a_file_calls_no_control_token_is_shown_unless_it_has_a_name(tmp_path: Path):
    plain = {number: {**one, "special": False} for number, one in DECODER.items()}
    path = edited(
        folder(tmp_path, added_tokens_decoder=plain), {"added_tokens": [*PLAIN, {"id": FIRST + 3, **added("<|foo|>")}]}
    )
    theirs, found = transformers.AutoTokenizer.from_pretrained(path), ours(path).tokenizer
    ids = [*found.encode("hello"), FIRST + 3, FIRST + 2]
    assert found.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True) == "hello<|foo|>"


def test_a_token_whose_number_differs_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = folder(tmp_path, files={"added_tokens": {"<|foo|>": 280}})
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert ours(path).tokenizer.encode("<|foo|>") == theirs.encode("<|foo|>", add_special_tokens=False)
    assert "<|foo|>" in caplog.text and "280" in caplog.text


def test_special_tokens_map_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = folder(tmp_path, files={"special_tokens_map": {"eos_token": "<|endoftext|>"}})
    assert transformers.AutoTokenizer.from_pretrained(path).eos_token == "<|endoftext|>"
    assert any(stop.text == "<|endoftext|>" and "tokenizer" in stop.origin for stop in ours(path).stops)
    assert "special_tokens_map.json" in caplog.text


def test_what_is_not_read_is_named(tmp_path: Path):
    path = folder(tmp_path, slow=True)
    (path / "vocab.json").unlink()
    (path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.model"):
        ours(path)


@pytest.mark.parametrize(
    "text", ["version https://git-lfs.github.com/spec/v1\noid", "<!DOCTYPE html><html></html>", "Entry not found"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"])
def test_what_a_download_left_instead(name: str, text: str, tmp_path: Path):
    path = folder(tmp_path, slow=name == "merges.txt")
    (path / name).write_text(text)
    with pytest.raises(BadCheckpoint, match=r"Git LFS pointer|web page|error of the hub"):
        ours(path)


def test_files_as_windows_editors_write_them(tmp_path: Path):
    path = folder(tmp_path, files={"chat_template.jinja": "{{ messages[0].content }}\n!"})
    wanted = ours(path).tokenizer.encode(TEXT)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes((path / name).read_text().replace("\n", "\r\n").encode("utf-8-sig"))
    found = ours(path)
    assert found.tokenizer.encode(TEXT) == wanted
    assert found.template is not None and found.template.render([{"role": "user", "content": "hi"}]) == "hi\n!"


DEF, TOOL = {"name": "default", "template": "DEF"}, {"name": "tool_use", "template": "TOOL"}
TEMPLATES: dict[str, dict[str, Any]] = {
    "configuration": {"chat_template": "CONF"},
    "file-and-configuration": {"chat_template": "CONF", "files": {"chat_template.jinja": "JINJA"}},
    "named": {"chat_template": [DEF, TOOL]},
    "folder": {"files": {"chat_template.jinja": "JINJA", "additional_chat_templates/tool_use.jinja": "TOOLS"}},
    "folder-and-named": {
        "chat_template": [DEF, TOOL],
        "files": {"chat_template.jinja": "JINJA", "additional_chat_templates/tool_use.jinja": "TOOLS"},
    },
    "two-defaults": {
        "files": {"chat_template.jinja": "JINJA", "additional_chat_templates/default.jinja": "D"},
    },
    "folder-has-all": {
        "files": {"additional_chat_templates/default.jinja": "D", "additional_chat_templates/tool_use.jinja": "TOOLS"},
    },
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_template_that_transformers_takes(case: str, tmp_path: Path):
    path = folder(tmp_path, **TEMPLATES[case])
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    template = ours(path).template
    assert template is not None
    for tools in (None, TOOLS):
        assert template.render(MESSAGES, tools=tools) == theirs.apply_chat_template(
            MESSAGES, tools=tools, tokenize=False
        )


def test_named_templates_without_a_default(tmp_path: Path):
    with pytest.raises(BadCheckpoint, match=r"tool_use.*--chat-template"):
        ours(folder(tmp_path, chat_template=[TOOL]))


@pytest.mark.parametrize("template", [5, [DEF, 5], [{"name": "default"}], {"default": 5}], ids=repr)
def test_a_template_that_is_none(template: Any, tmp_path: Path):
    with pytest.raises(BadCheckpoint, match=r"tokenizer_config\.json: chat_template is"):
        ours(folder(tmp_path, chat_template=template))


@pytest.mark.parametrize(
    "files", [{"chat_template.jinja": " \n"}, {"chat_template": {"chat_template": "OF A PROCESSOR"}}], ids=str
)
def test_a_template_that_is_not_used_is_named(files: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    template = ours(folder(tmp_path, files=files)).template
    assert template is not None and template.origin == "built-in ChatML"
    assert "chat_template.j" in caplog.text


def test_flags_that_differ_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ours(
        folder(tmp_path, added_tokens_decoder={**DECODER, str(FIRST): {**added("<|endoftext|>"), "single_word": True}})
    )
    assert "single_word of token <|endoftext|>" in caplog.text
    caplog.clear()
    ours(folder(tmp_path, added_tokens_decoder=DECODER, add_prefix_space=True))
    assert "add_prefix_space" in caplog.text
