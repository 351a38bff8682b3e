"""NaN and infinity in one sequence end that one, say so, and leave the seven beside it untouched to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fastqwen import LLM, SamplingParams
from tests.models.tiny import make, prompt

POISON = 7  # a token that overflows, and all that attends to it
PARAMS = SamplingParams(
    temperature=0.9,
    seed=5,
    max_tokens=12,
    logprobs=2,
    ignore_eos=True,
    logit_bias={POISON: -100.0},  # sampled, it would end a healthy sequence as well
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("poisoned")
    make(place, "Qwen3Config", head_dim=32, tie_word_embeddings=False)
    tensors = safetensors.torch.load_file(place / "model.safetensors")
    # Only this token has the first feature, and the first layer's MLP squares it beyond float32.
    tensors["model.embed_tokens.weight"][:, 0] = 0.0
    tensors["model.embed_tokens.weight"][POISON, 0] = 1.0
    tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0.0
    for part in ("gate", "up"):
        matrix = tensors[f"model.layers.0.mlp.{part}_proj.weight"]
        matrix[0] = 0.0
        matrix[0, 0] = 1e30
    safetensors.torch.save_file(tensors, place / "model.safetensors")
    return place


def load(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), dtype="float32", skip_tokenizer_init=True, block_size=8, **options)


def prompts() -> list[list[int]]:
    return [[token for token in prompt(12 + 3 * index, seed=index) if token != POISON] for index in range(7)]


def facts(output: Any) -> tuple[Any, ...]:
    answer = output.outputs[0]
    chosen = [[(token, one.logprob) for token, one in each.items()] for each in answer.logprobs]
    return answer.token_ids, answer.finish_reason, chosen


@pytest.mark.parametrize("cache", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 9}], ids=["whole", "in-chunks"])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_one_of_eight(folder: Path, options: dict[str, Any], place: int, cache: str):
    options = {**options, "kv_cache_dtype": cache}
    wanted = [facts(one) for one in load(folder, kv_cache_dtype=cache).generate(prompts(), PARAMS, use_tqdm=False)]
    llm = load(folder, **options)
    poisoned = [*prompts()[place % 7][:11], POISON, *prompt(9, seed=99)]
    batch = prompts()
    batch.insert(place, poisoned)
    outputs = llm.generate(batch, PARAMS, use_tqdm=False)
    bad = outputs.pop(place).outputs[0]
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert [facts(one) for one in outputs] == wanted
    assert llm.stats().num_corrupted == 1
    again = llm.generate([poisoned], PARAMS)[0]
    assert again.outputs[0].finish_reason == "error", "what it wrote into the cache is not taken for good later"
    assert again.num_cached_tokens <= 8, "only blocks before the poison were kept"
