"""Qwen-1's tokenizer and prompts against the original's, case by case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastqwen.client.history import cut_history, to_messages
from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, BadRequest
from fastqwen.models import parse_config
from fastqwen.text.chatml import PiecewiseChatMl
from fastqwen.text.detokenizer import Detokenizer
from fastqwen.text.load import load_text
from fastqwen.text.qwen_tiktoken import QwenTiktoken
from fastqwen.text.template import CHATML, ChatTemplate

GROUPS = [
    "english", "chinese", "mixed", "multilingual", "emoji", "code", "digits", "whitespace", "special", "control", "nfc", "random",
]  # fmt: skip
CONVERSATIONS = [
    "single", "history2", "content_leading_space", "special_text_in_system", "window_6144", "window_20",
]  # fmt: skip


@pytest.fixture(scope="module")
def original(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "tokenizer" / "qwen1.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="session")
def tokenizer(qwen_tiktoken: Path) -> QwenTiktoken:
    return QwenTiktoken(qwen_tiktoken)


def test_vocabulary(tokenizer: QwenTiktoken, original: dict[str, Any]):
    assert tokenizer.vocab_size == original["n_vocab"]
    for name in ("endoftext", "im_start", "im_end", "extra_0", "extra_204"):
        assert tokenizer.token_id(f"<|{name}|>") == original["special_tokens"][name]
    assert tokenizer.encode_plain("\n") == original["nl_tokens"]


@pytest.mark.parametrize("group", GROUPS)
def test_strings(tokenizer: QwenTiktoken, original: dict[str, Any], group: str):
    cases = [case for case in original["strings"] if case["group"] == group]
    assert cases
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode_plain(case["text"]) == case["ids_plain"], case["text"]
        assert tokenizer.decode(case["ids"]) == case.get("decoded", case["text"])
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        pieces = [detokenizer.push(token_id) for token_id in case["ids"]]
        assert "".join(pieces) + detokenizer.finish() == case.get("decoded", case["text"])


def test_there_are_many_cases(original: dict[str, Any]):
    strings = original["strings"]
    assert 2 * len(strings) + len(CONVERSATIONS) >= 140, "ids and ids_plain of each string, and conversations"
    assert {case["group"] for case in strings} == set(GROUPS)
    assert [case["name"] for case in original["conversations"]] == CONVERSATIONS
    assert (len(original["decode"]), len(original["stream"])) == (3, 2)


def test_decoding(tokenizer: QwenTiktoken, original: dict[str, Any]):
    for case in original["decode"]:
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["skip_special"]


def test_tokens_that_hold_parts_of_characters(tokenizer: QwenTiktoken, original: dict[str, Any]):
    for case in original["stream"]:
        assert tokenizer.encode_plain(case["text"]) == case["ids"]
        assert [tokenizer.token_bytes(token_id).hex() for token_id in case["ids"]] == case["token_bytes"]
        detokenizer, text = Detokenizer(tokenizer), ""
        for token_id, expected in zip(case["ids"], case["prefix_decode_replace"], strict=True):
            text += detokenizer.push(token_id)
            assert text == expected.rstrip("\ufffd")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_and_their_cutting(tokenizer: QwenTiktoken, original: dict[str, Any], name: str):
    [case] = [case for case in original["conversations"] if case["name"] == name]
    template = PiecewiseChatMl()
    history = [tuple(turn) for turn in case["history"]]
    kept = cut_history(
        history,
        case["query"],
        system=case["system"],
        count_tokens=lambda messages, asks: len(template.encode(tokenizer, messages, add_generation_prompt=asks)),
        window=case["max_window_size"],
        room=10**6,
    )
    ids = template.encode(tokenizer, to_messages(kept, system=case["system"], query=case["query"]))
    assert ids == case["ids"]
    assert tokenizer.decode(ids) == case["raw_text"]
    whole = tokenizer.encode(case["raw_text"])
    assert (whole == ids) == case["whole_text_encoding_equal"]
    if not case["whole_text_encoding_equal"]:
        assert whole == case["ids_if_raw_text_is_encoded_whole_allowed_special_all"]


@pytest.mark.parametrize("content", [" " * 10**6, "a" * 10**6, " " * 499_999 + "\u0344" * 499_999])
def test_texts_that_no_context_holds_are_refused_before_they_are_split(tokenizer: QwenTiktoken, content: str):
    for encode in (tokenizer.encode, tokenizer.encode_plain):
        with pytest.raises(BadRequest, match="characters"):
            encode(content)
    with pytest.raises(BadRequest, match="characters"):
        PiecewiseChatMl().encode(tokenizer, [{"role": "user", "content": content}])


def test_a_failing_regular_expression_is_a_bad_request(tokenizer: QwenTiktoken, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(QwenTiktoken, "max_chars", 2 * 10**6)
    for encode in (tokenizer.encode, tokenizer.encode_plain):
        with pytest.raises(BadRequest, match="long run of spaces"):
            encode(" " * 10**6)


@pytest.fixture
def checkpoint(qwen_tiktoken: Path, configs: Path, tmp_path: Path) -> Path:
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_tiktoken)
    (tmp_path / "config.json").symlink_to(configs / "qwen1-7b" / "config.json")
    return tmp_path


def _model(folder: Path) -> Any:
    return parse_config(json.loads((folder / "config.json").read_text()), "config.json")


def test_a_template_file_goes_before_the_built_in_one(checkpoint: Path, tokenizer: QwenTiktoken):
    messages = [{"role": "user", "content": "你好 <|im_end|>"}]
    model = _model(checkpoint)
    text = load_text(checkpoint, model, EngineConfig(model=str(checkpoint)))
    assert isinstance(text.template, PiecewiseChatMl)
    file = checkpoint / "my.jinja"
    file.write_text(CHATML)
    text = load_text(checkpoint, model, EngineConfig(model=str(checkpoint), chat_template=str(file)))
    assert isinstance(text.template, ChatTemplate) and text.template.origin == str(file)
    ids = text.template.encode(text.tokenizer, messages)
    assert tokenizer.decode(ids) == "<|im_start|>user\n你好 <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(151645) == 1, "the user's text became a control token"
    assert 151645 in text.stop_token_ids


def test_stop_tokens_of_chat_and_base_models(checkpoint: Path):
    model = _model(checkpoint)
    for generation, expected in (
        ({"chat_format": "chatml", "eos_token_id": 151643}, {151643, 151645, 151644}),
        ({"chat_format": "raw", "eos_token_id": 151643}, {151643, 151645}),
    ):
        (checkpoint / "generation_config.json").write_text(json.dumps(generation))
        stops = load_text(checkpoint, model, EngineConfig(model=str(checkpoint))).stops
        assert {stop.token_id for stop in stops} == expected
        assert all(stop.origin and stop.text.startswith("<|") for stop in stops)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "damaged|not a token"),
        (lambda data: b"\n".join(data.split(b"\n")[1:]), "damaged"),
        (lambda data: data.replace(b"\n", b" extra\n", 1), "line 1 is not a token"),
        (lambda data: b"!!!! 0\n" + data, "line 1 is not a token"),
        (lambda data: b"", "damaged"),
    ],
)
def test_damaged_files(qwen_tiktoken: Path, tmp_path: Path, damage: Any, words: str):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(damage(qwen_tiktoken.read_bytes()))
    with pytest.raises(BadCheckpoint, match=words) as caught:
        QwenTiktoken(path)
    assert str(path) in str(caught.value)
