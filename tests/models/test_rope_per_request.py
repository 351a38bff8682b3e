"""--rope-per-request: YaRN only for those prompts that need it, and only as much as each needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineCore
from fastqwen.errors import BadConfig
from fastqwen.layers.rotary_key import rope_key
from fastqwen.model_config import RopeConfig, read_json
from fastqwen.records import EngineRequest, RequestDelta, SamplingParams
from fastqwen.runner.start import start_engine
from tests.models.tiny import YARN, make, prompt

TRAINED = YARN["original_max_position_embeddings"]  # 64, scaled by 4


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaled")
    make(folder, "Qwen2Config", rope_parameters=YARN, max_position_embeddings=256)
    return folder


@pytest.fixture(scope="module")
def unscaled(scaled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _with_factor(scaled, None, tmp_path_factory.mktemp("unscaled"))


def _with_factor(scaled: Path, factor: float | None, folder: Path) -> Path:
    """The same weights; ``factor`` None takes YaRN away."""
    config = read_json(scaled / "config.json")
    rope = config.pop("rope_parameters")
    config["rope_parameters"] = {**rope, "factor": factor} if factor else {"rope_theta": rope["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(scaled / "model.safetensors")
    return folder


def start(folder: Path, *, per_request: bool = True, chunk: int = 512) -> EngineCore:
    config = EngineConfig(
        model=str(folder), dtype="float32", rope_per_request=per_request, max_num_batched_tokens=chunk
    )
    return start_engine(config, folder).core


def run(
    core: EngineCore, prompts: list[list[int]], max_tokens: int | None = 8, *, scores: int | None = 20
) -> list[tuple[list[int], list[float]]]:
    """Per prompt: greedy tokens, and the log-probabilities of prompt and answer with their 20 likeliest rivals."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=20, prompt_logprobs=scores)
    for index, ids in enumerate(prompts):
        core.add(
            EngineRequest(
                request_id=str(index),
                prompt_token_ids=ids,
                sampling=sampling,
                stop_token_ids=[],
                seed=0,
                max_tokens=max_tokens or 8,
            )
        )
    tokens: list[list[int]] = [[] for _ in prompts]
    numbers: list[list[float]] = [[] for _ in prompts]
    while core.has_work:
        for delta in core.step():
            tokens[int(delta.request_id)] += delta.token_ids
            numbers[int(delta.request_id)] += _numbers(delta)
    core.step()
    return list(zip(tokens, numbers, strict=True))


def _numbers(delta: RequestDelta) -> list[float]:
    listed = (delta.prompt_logprobs or []) + (delta.logprobs or [])
    return [number for one in listed for number in (one.logprob, *one.top_logprobs)]


def same(found: tuple[list[int], list[float]], expected: tuple[list[int], list[float]]) -> None:
    assert found[0] == expected[0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [7, 512])
def test_each_of_one_batch_is_computed_as_its_own_length_needs(
    scaled: Path, unscaled: Path, tmp_path: Path, chunk: int
):
    short, middle, long = prompt(20), prompt(120), prompt(248)
    found = run(start(scaled, chunk=chunk), [short, middle, long])
    same(found[0], run(start(unscaled, per_request=False), [short])[0])
    (tmp_path / "two").mkdir()
    same(found[1], run(start(_with_factor(scaled, 2.0, tmp_path / "two"), per_request=False), [middle])[0])
    same(found[2], run(start(scaled, per_request=False), [long])[0])
    static = run(start(scaled, per_request=False), [short])[0]
    assert (torch.tensor(static[1]) - torch.tensor(found[0][1])).abs().max() > 0.01, "scaling had no effect"


def test_blocks_are_shared_only_at_equal_factor(scaled: Path):
    core, long = start(scaled), prompt(248)

    def hits(length: int) -> int:
        before = core.scheduler.num_prefix_hits
        run(core, [long[:length]], scores=None)  # a prompt that is scored does not use the cache
        return core.scheduler.num_prefix_hits - before

    assert [hits(48), hits(120), hits(248)] == [0, 0, 0]
    assert [hits(48), hits(120), hits(248)] == [32, 112, 240]  # the last token is always computed


def test_a_prompt_without_max_tokens_is_unscaled_while_it_fits(scaled: Path, unscaled: Path):
    short = prompt(20)
    same(run(start(scaled), [short], None)[0], run(start(unscaled, per_request=False), [short], None)[0])


def test_keys():
    rope = RopeConfig(theta=1e4, kind="yarn", factor=4.0, trained_len=64)
    cases = {
        (10, 54): 1.0, (10, 55): 65 / 64, (64, 64): 2.0, (100, 1000): 4.0, (64, None): 1.0, (65, None): 4.0,
    }  # fmt: skip
    for (length, max_tokens), factor in cases.items():
        assert rope_key(rope, length, max_tokens, per_request=True) == f"yarn:{factor!r}"
        assert rope_key(rope, length, max_tokens) == ""


def test_a_model_without_yarn_refuses_the_flag(unscaled: Path):
    with pytest.raises(BadConfig, match="--rope-per-request"):
        start(unscaled)
