"""One model in several processes gives the tokens of one, and a rank that dies or hangs ends all of them at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastqwen import LLM, SamplingParams
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.ranks.group import RankLost
from fastqwen.ranks.start import start_engine
from fastqwen.records import StructuredOutputs
from fastqwen.runner.start import Engine
from tests.models.tiny import MOE, greedy, make, make_qwen1, prompt
from tests.quant.packing import Layout
from tests.quant.test_gptq import pack

HYBRID = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 16, "linear_value_head_dim": 24,
}  # fmt: skip
PROMPTS = [prompt(length) for length in (5, 40, 90, 17)]
PUSHING = [prompt(length) for length in (30, 31, 33)]
TOKENS = 24


def packed(folder: Path, layout: Layout) -> Path:
    make(folder, "Qwen3Config", head_dim=32)
    return pack(folder, layout)[0]


def same(folder: Path, make_it: Callable[[Path], object]) -> Path:
    make_it(folder)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen1": lambda folder: same(folder, make_qwen1),
    "qwen2": lambda folder: same(folder, lambda at: make(at, "Qwen2Config", tie_word_embeddings=True)),
    "qwen3": lambda folder: same(folder, lambda at: make(at, "Qwen3Config", head_dim=32, num_attention_heads=6)),
    "qwen3-moe": lambda folder: same(folder, lambda at: make(at, "Qwen3MoeConfig", **MOE, head_dim=16)),
    "qwen2-moe": lambda folder: same(
        folder, lambda at: make(at, "Qwen2MoeConfig", **MOE, shared_expert_intermediate_size=96)
    ),
    "qwen3-5": lambda folder: same(folder, lambda at: make(at, "Qwen3_5TextConfig", **HYBRID)),
    "qwen3-next": lambda folder: same(
        folder, lambda at: make(at, "Qwen3NextConfig", **HYBRID, **MOE, shared_expert_intermediate_size=96)
    ),
    "int4": lambda folder: packed(folder, Layout(sym=False)),
    "int4-desc-act": lambda folder: packed(folder, Layout(desc_act=True, sym=False)),
    "int8": lambda folder: packed(folder, Layout(bits=8)),
}


@contextlib.contextmanager
def started(folder: Path, count: int, **wishes: Any) -> Iterator[Engine]:
    usual = {"dtype": "float32", "device": "cpu", "num_threads": 1, "max_model_len": 256}
    config = EngineConfig(model=str(folder), tensor_parallel_size=count, **{**usual, **wishes})
    engine = start_engine(config, folder)
    yield engine
    if count > 1:
        end(engine)


def end(engine: Engine) -> None:
    executor: Any = engine.core._executor
    executor._group.close()


def ranks(engine: Engine) -> list[psutil.Process]:
    executor: Any = engine.core._executor
    return [psutil.Process(one.pid) for one in executor._group._processes]


def stories(folder: Path, count: int) -> list[list[list[int]]]:
    """All together, each alone, with a warm prefix cache, in chunks; and pushed out by each other for want of blocks."""
    with started(folder, count) as engine:
        together = greedy(engine.core, PROMPTS, TOKENS)
        alone = [greedy(engine.core, [ids], TOKENS)[0] for ids in PROMPTS]
        assert engine.core.stats().prefix_hits_tokens > 0
    per_token = engine.plan.kv_bytes_per_token
    narrow = {"kv_cache_memory_bytes": per_token * 16 * 12, "max_num_batched_tokens": 24, "max_model_len": 128}
    with started(folder, count, **narrow) as engine:
        pushed = greedy(engine.core, PUSHING, 2 * TOKENS)
        assert engine.core.stats().num_preemptions > 0
    return [together, alone, pushed]


def test_two_ranks_give_the_tokens_of_one(tmp_path: Path):
    folder = MODELS["qwen3"](tmp_path)
    expected = stories(folder, 1)
    assert expected[0] == expected[1]
    assert stories(folder, 2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_ranks_gives_the_tokens_of_one(tmp_path: Path, name: str, count: int):
    folder = MODELS[name](tmp_path)
    assert stories(folder, count) == stories(folder, 1)


def everything(folder: Path, count: int) -> list[Any]:
    """Drawn tokens, penalties, log-probabilities of prompt and answer, a grammar, embeddings."""
    llm = LLM(str(folder), dtype="float32", device="cpu", num_threads=1, max_model_len=256, tensor_parallel_size=count)
    kinds = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=12),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, logit_bias={7: 2.0}, max_tokens=12),
        SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, max_tokens=6),
        SamplingParams(temperature=0.0, structured_outputs=StructuredOutputs(regex="[0-9]{4}x"), max_tokens=12),
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt(9)}] * 4, kinds, use_tqdm=False)
    found: list[Any] = [one.outputs[0].token_ids for one in outputs]
    told = outputs[2]
    found.append([{token: round(one.logprob, 3) for token, one in step.items()} for step in told.outputs[0].logprobs])
    found.append(
        [step and {token: round(one.logprob, 3) for token, one in step.items()} for step in told.prompt_logprobs]
    )
    found.append([round(number, 4) for number in llm.embed([prompt(12)], use_tqdm=False)[0].outputs.embedding])
    assert outputs[3].outputs[0].text.rstrip("x").isdigit()
    return found


@pytest.mark.slow
def test_ranks_do_all_that_one_process_does(demo_gguf: Path):
    assert everything(demo_gguf, 2) == everything(demo_gguf, 1)


def begin(engine: Engine) -> None:
    from fastqwen.records import EngineRequest

    engine.core.add(
        EngineRequest(
            request_id="x", prompt_token_ids=prompt(5), sampling=SamplingParams(temperature=0.0), stop_token_ids=[],
            max_tokens=200, seed=0,
        )
    )  # fmt: skip
    engine.core.step()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_all(tmp_path: Path, victim: int):
    folder = same(tmp_path, lambda at: make(at, "Qwen2Config", num_hidden_layers=1))
    with started(folder, 2) as engine:
        family = ranks(engine)
        begin(engine)
        family[victim].kill()
        killed_s = time.monotonic()
        with pytest.raises(RankLost, match=r"rank [01] of 2 ended"):
            while True:
                engine.core.step()
        assert time.monotonic() - killed_s < 2.0
        assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
        with pytest.raises(RankLost):
            engine.check()


def test_a_rank_that_stops_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastqwen.ranks.group.SILENT_S", 2.0)
    folder = same(tmp_path, lambda at: make(at, "Qwen2Config", num_hidden_layers=1))
    with started(folder, 2) as engine:
        family = ranks(engine)
        begin(engine)
        os.kill(family[1].pid, signal.SIGSTOP)
        with pytest.raises(RankLost, match="rank 1 of 2 has been silent for"):
            while True:
                engine.core.step()
        assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)


def test_what_one_rank_refuses_is_told_in_one_line(tmp_path: Path):
    folder = same(tmp_path, lambda at: make(at, "Qwen2Config", num_hidden_layers=1))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(FastqwenError, match="safetensors"):
        start_engine(EngineConfig(model=str(folder), device="cpu", tensor_parallel_size=2), folder)
    with pytest.raises(BadConfig, match="--tensor-parallel-size is 0"):
        EngineConfig(model="x", tensor_parallel_size=0)
