"""What must hold for every model, length and card."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastqwen.model_config import ModelConfig, MoeConfig, RopeConfig
from fastqwen.models import parse_config
from fastqwen.plan.advice import answer
from fastqwen.plan.catalog import catalog
from fastqwen.plan.facts import EAGER_2023
from fastqwen.plan.generations import generation_of
from fastqwen.plan.gpus import known_gpus
from fastqwen.plan.memory import Need
from fastqwen.plan.question import Question, is_fitting, largest_context, most_sequences, need_of
from fastqwen.plan.weights import num_parameters, weights_bytes

ENTRIES = catalog().models
INT4 = {"quant_method": "gptq", "bits": 4, "group_size": 128}
INT8 = {"quant_method": "gptq", "bits": 8, "group_size": 128}


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Any decoder whose heads split over 1, 2 and 4 GPUs, not only the published ones."""
    kv_heads = draw(st.sampled_from([1, 2, 4, 8, 16]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4])) if kv_heads >= 4 else 8
    layers = draw(st.integers(1, 80))
    moe = None
    if draw(st.booleans()):
        moe = MoeConfig(
            num_experts=draw(st.sampled_from([4, 60, 128])),
            experts_per_token=draw(st.integers(1, 4)),
            expert_size=draw(st.sampled_from([768, 1408])),
            normalize_top_k=True,
            shared_size=draw(st.sampled_from([0, 2048])),
            sparse_layers=tuple(range(0, layers, draw(st.integers(1, 2)))),
        )
    return ModelConfig(
        model_type="qwen3",
        vocab_size=draw(st.sampled_from([32000, 151936])),
        hidden_size=128 * draw(st.integers(4, 64)),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([64, 128])),
        intermediate_size=128 * draw(st.integers(4, 200)),
        rms_norm_eps=1e-6,
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=262144,
        rope=RopeConfig(theta=1e6),
        moe=moe,
    )


@st.composite
def questions(draw: st.DrawFn) -> Question:
    return Question(
        model=draw(models()),
        name="any",
        facts=draw(st.sampled_from(known_gpus())).facts(),
        max_model_len=draw(st.integers(1, 131072)),
        concurrency=draw(st.integers(1, 600)),
        num_gpus=draw(st.sampled_from([1, 2, 4])),
        enforce_eager=draw(st.booleans()),
        profile=draw(st.sampled_from([None, EAGER_2023])),
    )


def changed(question: Question, **fields: object) -> Need:
    return need_of(msgspec.structs.replace(question, **fields))


@settings(max_examples=200, deadline=None)
@given(questions(), st.integers(0, 131072))
def test_more_context_never_needs_less(question: Question, more: int):
    assert question.max_model_len is not None
    assert changed(question, max_model_len=question.max_model_len + more).total >= need_of(question).total


@settings(max_examples=100, deadline=None)
@given(questions(), st.integers(0, 1000))
def test_more_sequences_never_need_less(question: Question, more: int):
    assert changed(question, concurrency=question.concurrency + more).total >= need_of(question).total


@settings(max_examples=200, deadline=None)
@given(questions())
def test_more_gpus_never_need_more_each(question: Question):
    """But for the buffers through which they talk, which a single GPU does not have."""
    needs = [changed(question, num_gpus=count) for count in (1, 2, 4)]
    for fewer, more in pairwise(needs):
        assert more.total - more.collectives <= fewer.total - fewer.collectives
        assert more.weights <= fewer.weights
        assert more.kv_cache <= fewer.kv_cache


@pytest.mark.parametrize("shape", catalog().shapes)
def test_two_gpus_need_less_each_for_every_model_worth_splitting(shape: str):
    model = parse_config(catalog().shapes[shape], shape)
    question = Question(model=model, name=shape, facts=known_gpus()[0].facts())
    if num_parameters(model) > 1e9:
        assert changed(question, num_gpus=2).total < need_of(question).total


@settings(max_examples=100, deadline=None)
@given(questions())
def test_smaller_numbers_never_need_more(question: Question):
    for bits in (INT4, INT8):
        packed = msgspec.structs.replace(question.model, quantization=bits)
        assert changed(question, model=packed).weights <= need_of(question).weights
    four = msgspec.structs.replace(question.model, quantization=INT4)
    eight = msgspec.structs.replace(question.model, quantization=INT8)
    assert weights_bytes(four, "float16") <= weights_bytes(eight, "float16")
    for word in ("fp8", "int8"):
        assert changed(question, kv_cache_dtype=word).total <= need_of(question).total
    assert changed(question, enforce_eager=True).total <= need_of(question).total


@settings(max_examples=60, deadline=None)
@given(questions())
def test_largest_context_and_most_sequences_are_exact(question: Question):
    longest = largest_context(question)
    if longest:
        assert is_fitting(msgspec.structs.replace(question, max_model_len=longest))
    if longest < question.model.default_max_len:
        assert not is_fitting(msgspec.structs.replace(question, max_model_len=longest + 1))
    most = most_sequences(question)
    if most:
        assert is_fitting(msgspec.structs.replace(question, concurrency=most))
    if most or is_fitting(msgspec.structs.replace(question, concurrency=1)):
        assert not is_fitting(msgspec.structs.replace(question, concurrency=most + 1))


@settings(max_examples=60, deadline=None)
@given(questions())
def test_what_is_advised_fits_and_speeds_are_ranges(question: Question):
    found = answer(question)
    if found.fits:
        assert found.need.total <= found.budget_bytes
        known = generation_of(question.facts.compute_capability).read is not None
        assert (found.speed_single is not None) == (known and found.hindrance is None)
        if found.speed_single is not None:
            assert 0 < found.speed_single.low <= found.speed_single.high
    if not found.fits and found.changes:
        assert found.command == next((one.command for one in found.changes if one.command), None)
    if not found.changes and not found.fits:
        assert found.command is None


def test_terms_add_up():
    question = Question(model=catalog().model(ENTRIES[0]), name="", facts=known_gpus()[0].facts())
    need = need_of(question)
    parts = msgspec.structs.asdict(need)
    assert need.total == sum(parts.values()) - need.kv_bytes_per_token - need.num_gpus
