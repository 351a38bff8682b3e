"""LLM.embed: the vectors that transformers computes, whatever runs beside them and however the text was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch

from fastqwen import LLM, SamplingParams
from fastqwen.errors import BadCheckpoint, BadRequest, FastqwenError
from fastqwen.records import PoolingParams
from tests.models.embedding import END, make_embedder, reference, write_tokenizer
from tests.models.tiny import prompt
from tests.server.live import run

TEXTS = ["What is the capital of China?", "Gravity", "Explain gravity. " * 9, "鍵"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("embedder")
    return folder, make_embedder(folder)


def load(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), **{"dtype": "float32", "block_size": 8, **options})


def vectors(outputs: list[Any]) -> list[list[float]]:
    return [output.outputs.embedding for output in outputs]


def test_the_vectors_of_transformers(made: tuple[Path, Any]):
    folder, base = made
    outputs = load(folder).embed(TEXTS, use_tqdm=False)
    for text, output in zip(TEXTS, outputs, strict=True):
        ids = [*text.encode(), END]
        assert output.prompt_token_ids == ids, "the post-processor closes a text"
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), reference(base, ids), rtol=0, atol=1e-4)
        assert output.outputs.hidden_size == 64
    assert abs(np.dot(*vectors(outputs)[:2])) < 0.99, "vectors that are all alike prove nothing"


def test_fewer_dimensions_are_cut_and_brought_to_length_one(made: tuple[Path, Any]):
    folder, base = made
    llm = load(folder)
    [output] = llm.embed("Gravity", dimensions=24)
    wanted = reference(base, [*b"Gravity", END], 24)
    torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted, rtol=0, atol=1e-4)
    for wrong in (0, 65):
        with pytest.raises(BadRequest, match=f"dimensions is {wrong}.*at most 64"):
            llm.embed("Gravity", dimensions=wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 3, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 64, "num_threads": 1},
        {"kv_cache_memory_bytes": 16 * 8 * 2 * 2 * 32 * 3 * 4, "max_model_len": 128},
    ],
    ids=["one-by-one", "uncached", "chunks-of-7", "chunks-of-64", "little-memory"],
)
def test_the_same_bits_whatever_runs_beside_it(made: tuple[Path, Any], options: dict[str, Any]):
    folder, _ = made
    texts = [prompt(1 + 11 * (index % 11), seed=index) for index in range(24)]
    texts += [texts[7] + prompt(9, seed=index) for index in range(4)]  # a beginning in common
    alone = load(folder, enable_prefix_caching=False)
    wanted = [alone.embed([text])[0].outputs.embedding for text in texts]
    threads = torch.get_num_threads()
    try:
        llm = load(folder, **options)
        assert vectors(llm.embed(texts, use_tqdm=False)) == wanted
        again = llm.embed(texts, use_tqdm=False)
        assert vectors(again) == wanted
        if options.get("enable_prefix_caching", True):
            assert any(output.num_cached_tokens for output in again)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7}], ids=["whole", "chunks-of-7"])
def test_each_tokens_vector_is_transformers(made: tuple[Path, Any], options: dict[str, Any]):
    folder, base = made
    llm = load(folder, **options)
    llm.embed(TEXTS, use_tqdm=False)  # what is cached of them must not be left out
    found = llm.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
    plain = llm.encode(TEXTS, PoolingParams(task="token_embed", use_activation=False, dimensions=24), use_tqdm=False)
    for text, output, raw in zip(TEXTS, found, plain, strict=True):
        ids = [*text.encode(), END]
        with torch.no_grad():
            wanted = base(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(raw.outputs.data, wanted[:, :24], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            output.outputs.data, torch.nn.functional.normalize(wanted, dim=-1), rtol=0, atol=1e-4
        )
    with pytest.raises(BadRequest, match="token_classify"):
        llm.encode("a", pooling_task="plugin")
    with pytest.raises(BadRequest, match="no classification head"):
        llm.encode("a", pooling_task="token_classify")


def test_generation_goes_on_undisturbed_in_the_same_engine(made: tuple[Path, Any]):
    llm = load(made[0])
    greedy = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    [before] = llm.generate([prompt(20)], greedy)
    llm.embed(TEXTS, use_tqdm=False)
    [after] = llm.generate([prompt(20)], greedy)
    assert before.outputs[0].token_ids == after.outputs[0].token_ids


def test_a_text_is_closed_once(made: tuple[Path, Any], tmp_path: Path):
    llm = load(made[0])
    [plain, closed, ids] = llm.embed(["Gravity", "Gravity<|endoftext|>", [*b"Gravity"]], use_tqdm=False)
    assert plain.prompt_token_ids == closed.prompt_token_ids == [*b"Gravity", END]
    assert plain.outputs == closed.outputs
    assert ids.prompt_token_ids == [*b"Gravity"], "ids are used as they are"
    make_embedder(tmp_path, closes=False)
    [open_] = load(tmp_path).embed("Gravity")
    assert open_.prompt_token_ids == [*b"Gravity"], "nothing is appended that the tokenizer does not ask for"


def test_what_a_post_processor_writes_before_a_text_is_not_its_end(made: tuple[Path, Any], tmp_path: Path):
    from fastqwen.text.folder_tokenizer import from_tokenizer_json

    write_tokenizer(tmp_path, closes=True)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|> <|endoftext|>",
        special_tokens=[("<|im_start|>", 257), ("<|im_end|>", 258), ("<|endoftext|>", END)],
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    found = from_tokenizer_json(tmp_path, {})
    assert found is not None
    tokenizer = found[0]
    assert tokenizer.closing_ids == [258, END]
    assert tokenizer.closed_once([257, 97, 258, END, 258, END]) == [257, 97, 258, END]
    assert tokenizer.closed_once([257, 97, 258, END]) == [257, 97, 258, END]


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_saved_without_its_head(tmp_path: Path, tied: bool):
    """Qwen3-Embedding's files: no ``model.`` in front of names and, where nothing is tied, no lm_head."""
    base = make_embedder(tmp_path, headless=True, tie_word_embeddings=tied)
    names = list(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert "embed_tokens.weight" in names and "lm_head.weight" not in names
    llm = load(tmp_path)
    [output] = llm.embed("Gravity")
    wanted = reference(base, [*b"Gravity", END])
    torch.testing.assert_close(torch.tensor(output.outputs.embedding), wanted, rtol=0, atol=1e-4)
    if tied:
        assert llm.generate("Gravity", SamplingParams(max_tokens=2))[0].outputs[0].token_ids
    else:
        with pytest.raises(BadRequest, match="no output head"):
            llm.generate("Gravity")
        checked = run("check", str(tmp_path))
        assert (checked.returncode, "vectors of 64 numbers" in checked.stdout) == (0, True), checked.stderr


def test_a_missing_head_of_a_whole_checkpoint_is_damage(tmp_path: Path):
    make_embedder(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"lm_head\.weight is missing"):
        load(tmp_path)


def test_a_weight_that_overflows_is_an_error_and_not_a_vector(tmp_path: Path):
    make_embedder(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = 1e38  # its square is infinite, and the norm makes that NaN or zero
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e38
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    llm = load(tmp_path)
    with pytest.raises(FastqwenError, match="not finite"):
        llm.embed([[1, 2, 7], [3]], use_tqdm=False)
    assert llm.stats().num_running == 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["ok", []], r"prompts\[1\] is empty"),
        ([[259]], r"prompts\[0\].*less than 259"),
        ([prompt(513)], r"prompts\[0\] has 513 tokens.*512"),
    ],
)
def test_what_cannot_be_embedded_is_named(made: tuple[Path, Any], given: Any, words: str):
    with pytest.raises(BadRequest, match=words):
        load(made[0]).embed(given)


def test_the_whole_context_may_be_text(made: tuple[Path, Any]):
    """No room is kept for an answer that never comes."""
    folder, base = made
    ids = prompt(512)
    [output] = load(folder, max_num_batched_tokens=100).embed([ids])
    torch.testing.assert_close(torch.tensor(output.outputs.embedding), reference(base, ids), rtol=0, atol=1e-4)


def test_ids_only(made: tuple[Path, Any]):
    llm = load(made[0], skip_tokenizer_init=True)
    assert llm.embed([[1, 2, 3]])[0].outputs == load(made[0]).embed([[1, 2, 3]])[0].outputs
    with pytest.raises(BadRequest, match="no tokenizer"):
        llm.embed("text")


def test_a_reward_model_is_still_refused(made: tuple[Path, Any], tmp_path: Path):
    make_embedder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForRewardModel"]}))
    with pytest.raises(BadCheckpoint, match="Qwen2ForRewardModel"):
        load(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"max_num_batched_tokens": 33}])
def test_a_gpu_gives_the_same_vectors(made: tuple[Path, Any], options: dict[str, Any]):
    """Also for a row of one token, whose step would else be a recorded decode step without hidden states."""
    folder, base = made
    llm = load(folder, device="cuda", block_size=16, **options)
    texts = [[5], prompt(17), prompt(33), prompt(200)]
    for _ in range(2):  # the second time the 17 and the 33 find all but their last token in the cache
        for text, output in zip(texts, llm.embed(texts, use_tqdm=False), strict=True):
            found = torch.tensor(output.outputs.embedding)
            torch.testing.assert_close(found, reference(base, text), rtol=0, atol=2e-3)
    assert [output.num_cached_tokens for output in llm.embed(texts[1:3], use_tqdm=False)] == [16, 32]
