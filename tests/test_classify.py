"""LLM.classify, reward, encode and score: what transformers computes of a head, and of a reranker's yes and no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastqwen import LLM
from fastqwen.client.scores import PREFIX, SUFFIX
from fastqwen.errors import BadCheckpoint, BadRequest, FastqwenError, Unsupported
from fastqwen.records import PoolingParams
from tests.models.classifier import logits_of, make_classifier
from tests.models.test_hybrids import DELTA, ROPE
from tests.models.tiny import MOE, prompt
from tests.server.live import run

TEXTS = ["What is the capital of China?", "Gravity", "Explain gravity. " * 9, "鍵"]
LABELS = {0: "bad", 1: "so so", 2: "good"}
SHAPES = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-5": ("Qwen3_5TextConfig", {"rope_parameters": ROPE, **DELTA}),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 32, "decoder_sparse_step": 1, "mlp_only_layers": [], **MOE}),
}


def load(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"dtype": "float32", "block_size": 8, **options})


@pytest.mark.parametrize("shape", SHAPES)
def test_the_labels_of_transformers(tmp_path: Path, shape: str):
    config_class, changes = SHAPES[shape]
    model = make_classifier(tmp_path, config_class, id2label=LABELS, **changes)
    llm = load(tmp_path, max_num_batched_tokens=16)
    assert llm.model.classifier is not None and llm.model.classifier.labels == tuple(LABELS.values())
    found = llm.classify(TEXTS, use_tqdm=False)
    rewards = llm.reward(TEXTS, use_tqdm=False)
    for text, output, reward in zip(TEXTS, found, rewards, strict=True):
        wanted = logits_of(model, list(text.encode()))
        torch.testing.assert_close(reward.outputs.data, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(output.outputs.probs), wanted.softmax(-1), rtol=0, atol=1e-4)
        assert output.outputs.num_classes == 3 and output.prompt_token_ids == list(text.encode())
    assert len({output.outputs.probs.index(max(output.outputs.probs)) for output in found}) > 1, (
        "all alike prove nothing"
    )


def test_each_tokens_labels_are_transformers(tmp_path: Path):
    model = make_classifier(tmp_path, head_dim=32, id2label=LABELS)
    llm = load(tmp_path, max_num_batched_tokens=16)
    raw = llm.encode(TEXTS, PoolingParams(use_activation=False), pooling_task="token_classify", use_tqdm=False)
    found = llm.encode(TEXTS, pooling_task="token_classify", use_tqdm=False)
    for text, output, numbers in zip(TEXTS, found, raw, strict=True):
        ids = list(text.encode())
        wanted = torch.stack([logits_of(model, ids[: end + 1]) for end in range(len(ids))])  # nothing looks ahead
        torch.testing.assert_close(numbers.outputs.data, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.outputs.data, wanted.softmax(-1), rtol=0, atol=1e-4)
    with pytest.raises(BadRequest, match="no embeddings"):
        llm.encode("a", pooling_task="token_embed")


def test_the_same_bits_whatever_runs_beside_it(tmp_path: Path):
    make_classifier(tmp_path, head_dim=32)
    texts = [prompt(1 + 7 * index, seed=index) for index in range(12)]
    alone = load(tmp_path, enable_prefix_caching=False)
    wanted = [alone.classify([text])[0].outputs.probs for text in texts]
    together = load(tmp_path, max_num_batched_tokens=24)
    assert [output.outputs.probs for output in together.classify(texts, use_tqdm=False)] == wanted
    assert [output.outputs.probs for output in together.classify(texts, use_tqdm=False)] == wanted


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({"num_labels": 1}, torch.sigmoid), ({"num_labels": 2}, lambda x: x.softmax(-1)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda x: x),
        ({"num_labels": 2, "problem_type": "single_label_classification"}, lambda x: x.softmax(-1)),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, lambda x: x),
    ],
    ids=["one", "two", "several-labels", "regression", "single", "identity"],
)  # fmt: skip
def test_what_makes_probabilities_is_the_checkpoints(tmp_path: Path, changes: dict[str, Any], activation: Any):
    model = make_classifier(tmp_path, "Qwen2Config", **changes)
    llm = load(tmp_path)
    wanted = logits_of(model, [*b"Gravity"])
    [output] = llm.classify("Gravity")
    torch.testing.assert_close(torch.tensor(output.outputs.probs), activation(wanted), rtol=1e-4, atol=1e-4)
    [plain] = llm.encode("Gravity", PoolingParams(use_activation=False), pooling_task="classify")
    torch.testing.assert_close(plain.outputs.data, wanted, rtol=1e-4, atol=1e-4)


def test_a_head_with_one_label_scores_pairs(tmp_path: Path):
    model = make_classifier(tmp_path, "Qwen2Config", num_labels=1)
    outputs = load(tmp_path).score("capital?", ["Beijing", "Rome"], use_tqdm=False)
    for document, output in zip(["Beijing", "Rome"], outputs, strict=True):
        assert output.prompt_token_ids == list(f"capital?{document}".encode())
        wanted = logits_of(model, output.prompt_token_ids).sigmoid()
        assert output.outputs.score == pytest.approx(float(wanted), abs=1e-5)
    [raw] = load(tmp_path).score("capital?", "Rome", pooling_params=PoolingParams(use_activation=False))
    assert raw.outputs.score == pytest.approx(float(logits_of(model, [*b"capital?Rome"])), abs=1e-4)


def test_a_rerankers_head_is_asked_in_its_own_words(tmp_path: Path):
    folder = tmp_path / "Qwen3-Reranker-seq-cls"
    model = make_classifier(folder, num_labels=1, head_dim=32)
    llm = load(folder)
    [output] = llm.score("capital?", "Beijing", instruction="Judge.")
    tokenizer = llm.get_tokenizer()
    text = f"{PREFIX}<Instruct>: Judge.\n<Query>: capital?\n<Document>: Beijing{SUFFIX}"
    assert output.prompt_token_ids == tokenizer.encode(text)
    assert output.outputs.score == pytest.approx(float(logits_of(model, output.prompt_token_ids).sigmoid()), abs=1e-5)
    template = "{{ instruction }}|{{ messages[0].role }}={{ messages[0].content }}|{{ messages[1].content }}"
    [output] = llm.score("a", "b", chat_template=template, instruction="i")
    assert tokenizer.decode(output.prompt_token_ids) == "i|query=a|b"


def test_the_original_reranker_is_transformers_yes_and_no(tmp_path: Path):
    """As its model card computes it: log_softmax over the two words' logits, the exponent of yes."""
    from tests.models.embedding import END, VOCAB, write_tokenizer
    from tests.models.tiny import make

    folder = tmp_path / "Qwen3-Reranker"
    model = make(folder, "Qwen3Config", head_dim=32, vocab_size=VOCAB, eos_token_id=END, tie_word_embeddings=True)
    write_tokenizer(folder, closes=False)
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["n", "y"],
        "is_original_qwen3_reranker": True,
    }  # fmt: skip
    llm = load(folder, hf_overrides=overrides, runner="pooling", max_model_len=512)
    for output in llm.score("capital?", ["Beijing", "Rome"], use_tqdm=False):
        with torch.no_grad():
            logits = model(torch.tensor([output.prompt_token_ids])).logits[0, -1]
        two = torch.stack([logits[ord("n")], logits[ord("y")]])
        wanted = torch.nn.functional.log_softmax(two, dim=0)[1].exp()
        assert output.outputs.score == pytest.approx(float(wanted), abs=1e-5)


def test_what_a_head_cannot_do_is_said(tmp_path: Path):
    make_classifier(tmp_path, "Qwen2Config", num_labels=3)
    llm = load(tmp_path)
    for call, told in (
        (lambda: llm.generate("Hi"), "classifies"), (lambda: llm.embed("Hi"), "makes no embeddings"),
        (lambda: llm.score("a", "b"), "3 labels"), (lambda: llm.encode("Hi", pooling_task="plugin"), "token_classify"),
        (lambda: llm.classify("Hi", pooling_params=PoolingParams(dimensions=2)), "dimensions"),
        (lambda: llm.classify(""), "empty"),
        (lambda: llm.classify("Hi", tokenization_kwargs={"padding": True}), "padding"),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match=told):
            call()
    checked = run("check", str(tmp_path))
    assert (checked.returncode, "3 labels" in checked.stdout) == (0, True), checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"id2label": []}, BadCheckpoint, "id2label"), ({"id2label": {"0": "a", "7": "b"}}, BadCheckpoint, "0 to 1"),
        ({"problem_type": "ranking"}, Unsupported, "problem_type"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.ReLU"}}, Unsupported, "ReLU"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, FastqwenError, "score.weight"),
    ],
    ids=["list", "gap", "problem", "activation", "size"],
)  # fmt: skip
def test_a_head_that_is_described_wrongly(tmp_path: Path, changes: dict[str, Any], kind: type[Exception], told: str):
    make_classifier(tmp_path, "Qwen2Config", num_labels=2)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(kind, match=told):
        load(tmp_path)
