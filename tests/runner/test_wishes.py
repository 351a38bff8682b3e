"""Bias, forbidden stops and reported probabilities through the whole engine, on a tiny model."""

from __future__ import annotations

import pytest

from fastqwen import LLM, SamplingParams
from tests.models.tiny import make, prompt


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("tiny")
    make(folder, "LlamaConfig", num_hidden_layers=2)
    return LLM(str(folder), dtype="float32", skip_tokenizer_init=True)


def tokens(llm: LLM, **wishes: object) -> list[int]:
    [output] = llm.generate(prompt(10), SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **wishes}))  # type: ignore[arg-type]
    return output.outputs[0].token_ids


def test_bias_forces_and_forbids(llm: LLM):
    plain = tokens(llm)
    assert tokens(llm, logit_bias={77: 100.0}) == [77] * 12
    without = tokens(llm, logit_bias={plain[0]: -100.0})
    assert plain[0] not in without


def test_a_bias_shifts_the_odds_by_its_exponent(llm: LLM):
    """With +ln 3 on one of two tokens that are drawn otherwise as p : q, the odds are 3p : q."""
    [output] = llm.generate(prompt(10), SamplingParams(temperature=0.0, max_tokens=1, logprobs=2))
    (first, a), (second, b) = output.outputs[0].logprobs[0].items()
    bias = {first: 50.0, second: 50.0 + a.logprob - b.logprob + 1.0986}
    wishes = SamplingParams(temperature=1.0, max_tokens=1, logit_bias=bias, n=100)
    drawn = [
        answer.token_ids[0]
        for seed in range(20)
        for answer in llm.generate(
            prompt(10), SamplingParams(temperature=1.0, max_tokens=1, logit_bias=bias, n=100, seed=1000 * seed)
        )[0].outputs
    ]
    assert wishes.n * 20 == len(drawn) and set(drawn) == {first, second}
    assert drawn.count(second) / len(drawn) == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / len(drawn)) ** 0.5)


def test_min_tokens_holds_stops_back(llm: LLM):
    plain = tokens(llm)
    stop = plain[2]
    assert tokens(llm, stop_token_ids=[stop]) == plain[: plain.index(stop) + 1]
    held = tokens(llm, stop_token_ids=[stop], min_tokens=8)
    assert stop not in held[:7] and len(held) >= 8


def test_reported_probabilities_are_the_models_own(llm: LLM):
    """Temperature, penalties and bias change what is drawn, not what the model is said to think."""
    for wishes in ({"temperature": 2.0}, {"repetition_penalty": 1.5}, {"logit_bias": {5: 3.0}}):
        plain = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
        other = SamplingParams(**{"temperature": 0.0, "max_tokens": 1, "logprobs": 20, "seed": 1, **wishes})  # type: ignore[arg-type]
        first, second = (llm.generate(prompt(10), one)[0].outputs[0].logprobs[0] for one in (plain, other))
        shared = first.keys() & second.keys()
        assert len(shared) >= 20
        assert {one: first[one].logprob for one in shared} == {one: second[one].logprob for one in shared}


def test_a_penalty_ends_repetition(llm: LLM):
    forced = {7: 8.0}
    assert tokens(llm, logit_bias=forced).count(7) > tokens(llm, logit_bias=forced, frequency_penalty=2.0).count(7)
    assert len(set(tokens(llm, repetition_penalty=100.0))) == 12
