"""Tokenizers from GGUF metadata, against tiktoken's independent byte-pair merging with the published patterns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiktoken

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.text.gguf_tokenizer import KINDS, TextFacts, text_facts, tokenizer_from_gguf
from fastqwen.text.tokenizer import JsonTokenizer

SOURCE = "tiny.gguf"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"qwen2": QWEN2, "llama-bpe": LLAMA3, "llama3": LLAMA3, "gpt-2": GPT2, "default": GPT2}
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "hello hello",
    "Hello's HELLO'S it'll",
    "1234567 12 3.14",
    "a  b   c    \n\n\n d",
    "!!!\n\n?!\r\nx",
    "汉字，12３４ 😀 é\u0301",
    " \t hello\u00a0world ",
    "   ",
]


def letter(byte: int) -> str:
    """The published table: printable Latin-1 bytes are themselves, the others count up from U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return (
        chr(byte) if byte in visible else chr(256 + [other for other in range(256) if other not in visible].index(byte))
    )


def spelled(data: bytes) -> str:
    return "".join(letter(byte) for byte in data)


def tiny_vocabulary() -> tuple[list[bytes], list[str]]:
    """All bytes, then what the merges make; merge n makes token 256 + n."""
    tokens = [bytes([byte]) for byte in range(256)]
    pairs = [("l", "l"), ("e", "ll"), ("h", "ell"), ("hell", "o"), ("1", "2"), ("12", "3"), (" ", " "), ("\n", "\n")]
    pairs += [("'", "s"), ("!", "!"), (" ", "hello"), ("!!", "\n"), ("3", "4"), ("  ", "  ")]
    merges = []
    for left, right in pairs:
        merges.append(f"{spelled(left.encode())} {spelled(right.encode())}")
        tokens.append((left + right).encode())
    return tokens, merges


def metadata(pre: str | None = "qwen2", **changes: Any) -> dict[str, Any]:
    tokens, merges = tiny_vocabulary()
    texts = [spelled(token) for token in tokens] + [*CONTROL_TOKENS, "<tool_call>", "[PAD0]"]
    types = [1] * len(tokens) + [3, 3, 3, 4, 5]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": texts,
        "merges": merges,
        "token_type": np.array(types, dtype=np.int32),
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 2,
        "add_bos_token": False,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@pytest.mark.parametrize("pre", PATTERNS)
def test_ids_are_those_of_tiktoken(pre: str) -> None:
    tokens, _ = tiny_vocabulary()
    ranks = {token: number for number, token in enumerate(tokens)}
    oracle = tiktoken.Encoding("oracle", pat_str=PATTERNS[pre], mergeable_ranks=ranks, special_tokens={})
    tokenizer = tokenizer_from_gguf(metadata(pre), SOURCE)
    for text in TEXTS:
        composed = text.replace("e\u0301", "é") if pre == "qwen2" else text
        ids = tokenizer.encode(text).ids
        assert ids == oracle.encode(composed, disallowed_special=()), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == composed


def test_qwen2_composes_characters_as_its_own_tokenizer_does() -> None:
    assert tokenizer_from_gguf(metadata("qwen2"), SOURCE).encode("e\u0301").ids == [*"é".encode()]
    assert tokenizer_from_gguf(metadata("gpt-2"), SOURCE).encode("e\u0301").ids == [*"e\u0301".encode()]


def test_smollm_splits_digits_before_anything_else() -> None:
    tokenizer = tokenizer_from_gguf(metadata("smollm"), SOURCE)
    words = tokenizer.pre_tokenizer.pre_tokenize_str("ab 123  4")
    assert [word for word, _ in words] == ["ab", "Ġ", "1", "2", "3", "ĠĠ", "4"]


def test_a_file_without_a_word_pattern_gets_its_architectures() -> None:
    for architecture, pre in (("qwen2", "qwen2"), ("qwen3moe", "qwen2"), ("llama", "default")):
        values = {"general.architecture": architecture, **metadata(None)}
        expected = tokenizer_from_gguf(metadata(pre), SOURCE)
        assert str(tokenizer_from_gguf(values, SOURCE).pre_tokenizer) == str(expected.pre_tokenizer)


def test_control_tokens_keep_their_ids() -> None:
    tokenizer = tokenizer_from_gguf(metadata(), SOURCE)
    first = len(tiny_vocabulary()[0])
    assert tokenizer.encode("<|im_start|>hello<tool_call><|im_end|>").ids == [first + 1, 259, first + 3, first + 2]
    added = tokenizer.get_added_tokens_decoder()
    assert {number: token.special for number, token in added.items()} == {
        first: True,
        first + 1: True,
        first + 2: True,
        first + 3: False,
    }
    assert tokenizer.get_vocab_size() == first + 5
    assert tokenizer.decode([first + 1, 259, first + 3]) == "hello<tool_call>"


def test_a_user_cannot_write_control_tokens() -> None:
    tokenizer = tokenizer_from_gguf(metadata(), SOURCE)
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<|im_end|>").ids == [*b"<|im_end|>"]


def test_bos() -> None:
    bos = len(tiny_vocabulary()[0])
    tokenizer = tokenizer_from_gguf(metadata(add_bos_token=True), SOURCE)
    assert tokenizer.encode("hello").ids == [bos, 259]
    assert tokenizer.encode("hello", add_special_tokens=False).ids == [259]
    assert tokenizer_from_gguf(metadata("llama-bpe", add_bos_token=None), SOURCE).encode("hello").ids == [bos, 259]
    assert tokenizer_from_gguf(metadata("qwen2", add_bos_token=None), SOURCE).encode("hello").ids == [259]
    with pytest.raises(BadCheckpoint, match="bos_token_id is missing"):
        tokenizer_from_gguf(metadata(add_bos_token=True, bos_token_id=None), SOURCE)


def test_a_bos_of_odd_letters() -> None:
    values = metadata(add_bos_token=True)
    values["tokenizer.ggml.tokens"][values["tokenizer.ggml.bos_token_id"]] = "$A:7"
    assert tokenizer_from_gguf(values, SOURCE).encode("hello").ids == [values["tokenizer.ggml.bos_token_id"], 259]


def test_added_tokens_that_are_called_text_are_taken_as_what_they_are(caplog: pytest.LogCaptureFixture) -> None:
    right = tokenizer_from_gguf(metadata(), SOURCE)
    text = "<|im_start|>hello<tool_call>[PAD0]<|im_end|>"
    assert not caplog.text
    wrong = np.ones(len(metadata()["tokenizer.ggml.tokens"]), dtype=np.int32)
    for types in (None, wrong, np.where(metadata()["tokenizer.ggml.token_type"] == 3, 4, 1).astype(np.int32)):
        caplog.clear()
        found = tokenizer_from_gguf(metadata(token_type=types), SOURCE)
        assert found.encode(text).ids == right.encode(text).ids
        assert "<|im_end|>" in caplog.text and "PAD" not in caplog.text


@pytest.mark.parametrize("pre", ["deepseek-r1-qwen", "megrez", "stablelm2", "kormo", "f2llmv2"])
def test_relatives_of_qwen2_cut_words_as_it_does(pre: str) -> None:
    for text in TEXTS[:-3]:
        assert (
            tokenizer_from_gguf(metadata(pre), SOURCE).encode(text).ids
            == tokenizer_from_gguf(metadata(), SOURCE).encode(text).ids
        )


def test_qwen35_cuts_words_as_transformers_does() -> None:
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    assert KINDS["qwen35"].pattern == PRETOKENIZE_REGEX


def test_what_begins_a_turn_is_never_what_a_user_types() -> None:
    values = metadata()
    types = values["tokenizer.ggml.token_type"].copy()
    types[types == 3] = 4  # user-defined: llama.cpp would find them in any text
    found = JsonTokenizer(tokenizer_from_gguf({**values, "tokenizer.ggml.token_type": types}, SOURCE))
    assert set(CONTROL_TOKENS) <= found.control_tokens.keys()
    assert found.control_tokens["<|im_start|>"] not in found.encode_plain("<|im_start|>system")


def test_keys_and_templates_that_nobody_reads_are_named(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer_from_gguf(metadata(pad_token_id=3, scores=np.ones(3)), SOURCE)
    assert not caplog.text
    template = {"tokenizer.chat_template": "{{ 1 }}", "tokenizer.chat_template.tool_use": "a"}
    tokenizer_from_gguf({**metadata(new_trick=True), **template, "tokenizer.chat_template.rag": "b"}, SOURCE)
    assert "new_trick" in caplog.text and "chat_template.rag" in caplog.text and "tool_use" not in caplog.text
    caplog.clear()
    tokenizer_from_gguf({**metadata(), "tokenizer.chat_template": " "}, SOURCE)
    assert text_facts({"tokenizer.chat_template": " "}).chat_template is None
    assert "chat_template is empty" in caplog.text


def test_a_template_for_tools_of_its_own() -> None:
    facts = text_facts({"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"})
    assert (facts.chat_template, facts.tool_template) == ("a", "b")


def test_text_facts() -> None:
    values = metadata()
    values["tokenizer.chat_template"] = "{{ messages }}"
    first = len(tiny_vocabulary()[0])
    assert text_facts(values) == TextFacts(
        chat_template="{{ messages }}",
        bos_token_id=first,
        eos_token_id=first + 2,
        add_bos=False,
        ends=(first, first + 2),
    )
    empty = text_facts({})
    assert empty.chat_template is None
    assert empty.eos_token_id is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"model": None}, "tokenizer.ggml.model is missing"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is not a list of strings"),
    "no token at all": ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
    "numbers as tokens": ({"tokens": np.arange(3)}, "tokenizer.ggml.tokens is not a list of strings"),
    "a number among tokens": ({"tokens": ["a", 1]}, "tokenizer.ggml.tokens is not a list of strings"),
    "token twice": ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens has a token twice"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is not a list of strings"),
    "merge of one": ({"merges": ["ab"]}, "merge 0 is 'ab', expected two parts"),
    "merge of three": ({"merges": ["l l", "a b c"]}, "merge 1 is 'a b c', expected two parts"),
    "merge of a half": ({"merges": ["a "]}, "merge 0 is 'a ', expected two parts"),
    "merge of others": ({"merges": ["a b"]}, "merge 0 is 'a b', which tokenizer.ggml.tokens do not contain"),
    "short types": ({"token_type": np.zeros(3, dtype=np.int32)}, "token_type is not a list of"),
    "types as text": ({"token_type": ["3"]}, "token_type is not a list of"),
    "eos far away": ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is '1000000', expected one of"),
    "eos of text": ({"eos_token_id": "</s>"}, "tokenizer.ggml.eos_token_id is '</s>'"),
    "eos of truth": ({"eos_token_id": True}, "tokenizer.ggml.eos_token_id is 'True'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_data_is_refused_by_name(case: str) -> None:
    changes, problem = REFUSED[case]
    with pytest.raises(BadCheckpoint) as caught:
        tokenizer_from_gguf(metadata(**changes), SOURCE)
    message = str(caught.value)
    assert problem in message
    assert message.startswith(SOURCE)
    assert "\n" not in message


def test_a_control_token_without_text() -> None:
    values = metadata()
    values["tokenizer.ggml.tokens"][values["tokenizer.ggml.bos_token_id"]] = ""
    with pytest.raises(BadCheckpoint, match=r"control token \d+ has no text"):
        tokenizer_from_gguf(values, SOURCE)


def test_a_template_that_is_no_text() -> None:
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.chat_template is not text"):
        text_facts({"tokenizer.chat_template": 7}, SOURCE)


def test_other_tokenizers_are_named() -> None:
    with pytest.raises(Unsupported, match="SentencePiece"):
        tokenizer_from_gguf(metadata(model="llama"), SOURCE)
    with pytest.raises(Unsupported, match="of the kind 'rwkv'"):
        tokenizer_from_gguf(metadata(model="rwkv"), SOURCE)
    with pytest.raises(Unsupported) as caught:
        tokenizer_from_gguf(metadata("deepseek-llm"), SOURCE)
    assert "tokenizer.ggml.pre is 'deepseek-llm'" in str(caught.value)
    assert all(name in str(caught.value) for name in KINDS)
