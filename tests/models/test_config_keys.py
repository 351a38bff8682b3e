"""Keys of config.json: each is read, says nothing about what is computed, is refused by name, or is named in a line."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastqwen.config import EngineConfig
from fastqwen.config_keys import LISTS_OF_ONES, NEUTRAL, SAME_AS, SILENT
from fastqwen.errors import BadCheckpoint, FastqwenError, Unsupported
from fastqwen.model_config import Fields, ModelConfig, read_json
from fastqwen.models import find, parse_config
from fastqwen.plan import DeviceFacts, make_plan
from tests.models.tiny import MOE, YARN, logits, make, prompt

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
QWEN2 = {**SIZES, "model_type": "qwen2"}
EXPERTS = {**MOE, "shared_expert_intermediate_size": 80}
ALL = {
    "llama": SIZES,
    "qwen": {**SIZES, "intermediate_size": 192},
    "qwen2": SIZES,
    "qwen2_moe": {**SIZES, **EXPERTS},
    "qwen3": SIZES,
    "qwen3_moe": {**SIZES, **MOE},
}


def parse(values: dict[str, Any], **changes: Any) -> ModelConfig:
    return parse_config({**values, **changes}, "config.json")


def keys_read() -> set[str]:
    """By any architecture, when all of its keys matter."""
    found: set[str] = set()
    every = {"use_sliding_window": True, "rope_scaling": YARN}
    for kind, values in ALL.items():
        fields = Fields({"model_type": kind, **values, **every}, "config.json")
        find(kind).parse(fields)
        found |= fields.seen
    return found


# Parts beside the decoder of text, and models made of several: a text decoder whose config.json has their keys names them.
PARTS = ("Vision", "Audio", "Talker", "Code2Wav", "DiT", "BigVGAN", "Token2Wav", "ASREncoder")


def text_configurations() -> dict[str, set[str]]:
    """The keys of every configuration class of a decoder in the Qwen and Llama families of transformers."""
    base, found = transformers.PretrainedConfig, {}
    for module in pkgutil.iter_modules(transformers.models.__path__):
        if "qwen" not in module.name and "llama" not in module.name:
            continue
        try:
            source = importlib.import_module(f"transformers.models.{module.name}.configuration_{module.name}")
        except ModuleNotFoundError:
            continue  # another tokenizer for an architecture of the list
        for name, one in vars(source).items():
            if not inspect.isclass(one) or not issubclass(one, base) or one.__module__ != source.__name__:
                continue
            if not one.sub_configs and not any(part in name for part in PARTS):
                found[name] = {field.name for field in dataclasses.fields(one)}
    return found


def test_every_key_of_the_families_in_transformers_is_sorted():
    known = keys_read() | SILENT | NEUTRAL.keys() | SAME_AS.keys() | {*LISTS_OF_ONES}
    classes = text_configurations()
    assert {"LlamaConfig", "Qwen2Config", "Qwen3MoeConfig", "Qwen3NextConfig"} <= classes.keys()
    unsorted = {name: keys - known for name, keys in classes.items() if keys - known}
    assert not unsorted, "add these to the tables in fastqwen/config_keys.py"


def test_no_key_stands_in_two_tables():
    tables = [set(SILENT), set(NEUTRAL), set(SAME_AS), set(LISTS_OF_ONES)]
    assert sum(map(len, tables)) == len(set().union(*tables))


CHANGING = {
    "partial_rotary_factor": 0.5, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "no_rope_layers": [1, 0],
    "clip_qkv": 8.0, "logit_scale": 0.0625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    "attn_output_gate": True, "rope_interleaved": True, "n_shared_experts": 1, "is_causal": False, "query_pre_attn_scalar": 99,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("key", CHANGING)
def test_what_would_change_the_model_is_refused_by_name(kind: str, key: str):
    with pytest.raises(Unsupported, match=key):
        parse({"model_type": kind, **ALL[kind]}, **{key: CHANGING[key]})


def test_query_norms_belong_to_qwen3():
    assert parse({"model_type": "qwen3", **SIZES}, use_qk_norm=True).notices == ()
    for kind, value in (("qwen2", True), ("qwen3", False)):
        with pytest.raises(Unsupported, match="use_qk_norm"):
            parse({"model_type": kind, **SIZES}, use_qk_norm=value)


@pytest.mark.parametrize("kind", ALL)
def test_neutral_values_say_nothing(kind: str):
    values = {"model_type": kind, **ALL[kind]}
    read = keys_read()
    neutral = {key: values[0] for key, values in NEUTRAL.items() if values and key not in read}
    silent = {key: "anything" for key in SILENT - {"model_type", "architectures", "dtype", "torch_dtype"}}
    quiet = parse(values).notices
    assert parse(values, **neutral, **silent, no_rope_layers=[1, 1], sliding_window=None).notices == quiet


JSON = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=9)
KEYS = st.sampled_from(sorted({*NEUTRAL, *SILENT, *SAME_AS})) | st.from_regex(r"[a-z]{1,9}_[a-z]{1,9}", fullmatch=True)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe"]), key=KEYS, value=JSON | st.lists(JSON, max_size=3)
)
def test_no_key_is_dropped_without_a_word(kind: str, key: str, value: Any):
    values = {"model_type": kind, **ALL[kind]}
    plain = parse(values)
    if key in values:
        return
    try:
        found = parse(values, **{key: value})
    except FastqwenError as error:
        assert key in str(error)
        return
    told = any(key in notice for notice in found.notices)
    read = plain != found
    neutral = value is None or key in SILENT or key in keys_read() or key in NEUTRAL or key in SAME_AS
    assert told or read or neutral


# ---- as transformers: what two keys that contradict each other mean ----

CONTRADICTIONS: dict[
    str, tuple[dict[str, Any], dict[str, Any], str]
] = {  # what is written, what it means, what is told
    "two-scalings": (
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        },
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rope_scaling",
    ),
    "two-thetas": (
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        {"rope_theta": 5.0},
        "rope_theta",
    ),
    "two-types": (
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
        {},
        "rope_type",
    ),
    "scaling-without-type": ({"rope_scaling": {"factor": 2.0}}, {}, "factor"),
    "mrope-sections": ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, {}, "mrope_section"),
    "two-trained-lengths": (
        {
            "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 128,
        },
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}},
        "original_max_position_embeddings",
    ),
    "two-dtypes": ({"dtype": "float16", "torch_dtype": "float32"}, {"dtype": "float16"}, "torch_dtype"),
    "experts-of-a-dense-model": ({"num_experts": 8, "norm_topk_prob": True}, {}, "num_experts"),
    "biases-that-are-always-there": ({"attention_bias": False}, {}, "attention_bias"),
    "another-architecture": ({"architectures": ["LlamaForCausalLM"]}, {}, "architectures"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradicting_keys(case: str):
    written, meant, told = CONTRADICTIONS[case]
    found = parse(QWEN2, **written)
    assert any(told in notice for notice in found.notices)
    theirs, ours = (transformers.Qwen2Config(**SIZES, **keys) for keys in (written, meant))
    theirs.standardize_rope_params()  # as each model does once more
    assert theirs.dtype == ours.dtype
    for key in ("rope_type", "rope_theta", "factor", "original_max_position_embeddings"):
        if theirs.rope_parameters["rope_type"] != "default" or key in ("rope_type", "rope_theta"):
            assert theirs.rope_parameters.get(key) == ours.rope_parameters.get(key), (
                "what this test believes of transformers"
            )
    plain = parse(QWEN2, **meant)
    assert (found.rope, found.dtype, found.moe) == (plain.rope, plain.dtype, plain.moe)


def test_the_number_of_experts_under_its_other_name_counts_more():
    values = {**ALL["qwen3_moe"], "model_type": "qwen3_moe", "num_experts": 99, "num_local_experts": 8}
    theirs = transformers.Qwen3MoeConfig(**{key: value for key, value in values.items() if key != "model_type"})
    found = parse(values)
    assert found.moe is not None and found.moe.num_experts == theirs.num_experts == 8
    assert any("num_local_experts" in notice for notice in found.notices)


def test_a_number_type_that_is_not_known_is_told():
    for dtype in ("float64", "auto", "float8_e4m3fn"):
        found = parse(QWEN2, dtype=dtype)
        assert found.dtype == "bfloat16" and any(dtype in notice for notice in found.notices)
    assert not any("dtype" in notice for notice in parse(QWEN2, torch_dtype="torch.float16").notices)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}},
        {"use_sliding_window": "false"}, {"tie_word_embeddings": 1}, {"rms_norm_eps": "1e-6"}, {"rope_theta": "10000.0"},
        {"rope_scaling": {"type": "yarn", "factor": 0.5}},
        {"rope_scaling": {"type": "yarn"}}, {"rope_scaling": {"type": "linear"}}, {"layer_types": ["full_attention"]},
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ],
    ids=lambda wrong: next(iter(wrong)),
)  # fmt: skip
def test_what_transformers_does_not_load_is_refused_by_name(wrong: dict[str, Any]):
    with pytest.raises(BadCheckpoint, match=next(iter(wrong))):
        parse(QWEN2, **wrong)


def test_a_whole_number_written_as_a_fraction_is_told():
    assert any("num_hidden_layers" in notice for notice in parse(QWEN2, num_hidden_layers=2.0).notices)


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        ("Qwen2MoeConfig", {**EXPERTS, "max_window_layers": 2}),
        ("Qwen3MoeConfig", {**MOE, "head_dim": 16}),
        ("Qwen3Config", {"head_dim": 16, "max_window_layers": 1}),
        ("Qwen2Config", {}),  # max_window_layers is 28 where nothing is said
    ],
)
def test_sliding_windows_of_each_generation(config_class: str, changes: dict[str, Any], tmp_path: Path):
    model = make(tmp_path, config_class, use_sliding_window=True, sliding_window=16, **changes)
    written = read_json(tmp_path / "config.json")
    written.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(written))
    ids = prompt(60)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(tmp_path, ids), expected, rtol=0, atol=1e-3)


def test_heads_have_the_size_of_transformers():
    without = {key: value for key, value in ALL["qwen3_moe"].items() if key != "head_dim"}
    assert parse({"model_type": "qwen3_moe", **without}).head_dim == 16
    assert parse({"model_type": "qwen3", **without}).head_dim == transformers.Qwen3Config(**without).head_dim == 128


def test_a_llama_has_no_windows_and_says_so(tmp_path: Path):
    found = parse({**SIZES, "model_type": "llama"}, sliding_window=8, use_sliding_window=True)
    assert found.windows == () and any("sliding" in notice for notice in found.notices)


# ---- lengths, and keys from the command line ----


def plan_of(model: ModelConfig, **wishes: Any) -> tuple[int, str]:
    plan = make_plan(
        model,
        EngineConfig(model="m", **wishes),
        DeviceFacts(kind="cpu", name="cpu", total_bytes=2**33, free_bytes=2**33),
    )
    return plan.max_model_len, " ".join(plan.notices)


def test_lengths_beyond_training_are_told():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    length, told = plan_of(parse(QWEN2, rope_scaling=yarn))
    assert length == 2048 and "trained with 512" in told
    assert "trained" not in plan_of(parse(QWEN2, rope_scaling=yarn), max_model_len=512)[1]
    with pytest.raises(FastqwenError, match="--rope-scaling"):
        plan_of(parse(QWEN2), max_model_len=2048)


@pytest.mark.parametrize(
    "written", [{"rope_theta": 5.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}]
)
def test_overrides_replace_keys_and_keep_the_theta(written: dict[str, Any]):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    wishes = [
        EngineConfig(model="m", rope_scaling=yarn),
        EngineConfig(model="m", hf_overrides={"rope_parameters": yarn}),
        EngineConfig(model="m", hf_overrides={"rope_scaling": yarn}),
    ]
    for wish in wishes:
        found = parse_config({**QWEN2, **written}, "config.json", wish.overrides)
        assert (found.rope.kind, found.rope.theta, found.rope.factor, found.default_max_len) == ("yarn", 5.0, 4.0, 2048)
    assert parse_config({**QWEN2, **written}, "", EngineConfig(model="m", rope_theta=9.0).overrides).rope.theta == 9.0
    with pytest.raises(Unsupported, match="clip_qkv"):
        parse_config(QWEN2, "config.json", EngineConfig(model="m", hf_overrides={"clip_qkv": 8}).overrides)
