"""Command lines of vLLM's users: every flag of `vllm serve` is ours, has no effect and says so, or is refused with a reason."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from fastqwen.cli import vllm_flags
from fastqwen.cli.main import app
from fastqwen.cli.vllm_flags import translated
from fastqwen.errors import BadConfig
from fastqwen.vllm_names import ACCEPTED, REFUSED, RENAMED, SHORT, fate, is_switch
from tests.server.live import one_line, run

SERVE: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
OPTIONS = [param for param in SERVE.params if param.param_type_name == "option"]
OURS = {name for option in OPTIONS for name in (*option.opts, *option.secondary_opts)}
SEVERAL = {name for option in OPTIONS if option.multiple for name in option.opts}
# The flags of vLLM 0.33's own parser, one a line, with the short ones behind them.
THEIRS = [line.split() for line in (Path(__file__).parent / "vllm_flags.txt").read_text().splitlines()]


def ours(line: str) -> list[str]:
    return translated(shlex.split(line), OURS, SEVERAL).words


def params(line: str) -> dict[str, Any]:
    return dict(SERVE.make_context("serve", ours(line)).params)


@pytest.mark.parametrize("names", THEIRS, ids=lambda names: names[0])
def test_every_flag_has_one_fate(names: list[str]):
    for name in names:
        found, _ = vllm_flags._name_of(name)
        assert found, f"{name} is no flag for us"
        known = f"--{found}" in OURS or found in ("model", "config", "no-access-log", "hf-overrides")
        assert known or fate(found) is not None, f"{name} has no fate"


def test_no_flag_has_two_fates():
    listed = [name for names in ACCEPTED.values() for name in names] + [
        name for names in REFUSED.values() for name in names
    ]
    assert len(listed) == len(set(listed))
    assert set(RENAMED.values()) <= {name.removeprefix("--") for name in OURS} | {"model"}
    assert set(SHORT.values()) <= set(listed) | {name.removeprefix("--") for name in OURS}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refusal_says_why_and_its_neutral_values_are_taken(why: str):
    for name, neutral in REFUSED[why].items():
        if f"--{name}" in OURS:
            continue
        with pytest.raises(BadConfig) as caught:
            ours(f"demo --{name}" + ("" if is_switch(name) else " 8x8"))
        assert why in str(caught.value) and f"--{name}" in str(caught.value)
        for value in neutral:
            assert translated(["demo", f"--{name}={value}"], OURS, SEVERAL).words == ["demo"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Qwen/Qwen3-8B --max-model-len 8192", {"model": "Qwen/Qwen3-8B", "max_model_len": 8192}),
        ("--model Qwen/Qwen3-8B --max_model_len=32k", {"model": "Qwen/Qwen3-8B", "max_model_len": 32000}),
        ("--model-path demo --dtype half", {"model": "demo", "dtype": "float16"}),
        ("demo --dtype=float", {"dtype": "float32"}),
        ("demo --max-model-len -1", {"max_model_len": None}),
        ("demo --max-model-len auto --seed 0", {"max_model_len": None, "seed": 0}),
        ("demo --served-model-name a b --port 1", {"served_model_name": ["a", "b"], "port": 1}),
        ("--served-model-name a demo", {"served_model_name": ["a"], "model": "demo"}),
        ("""demo --allowed-origins '["*"]'""", {"allowed_origins": ["*"]}),
        ("demo -tp 1 -q awq --enable-auto-tool-choice --tool-call-parser hermes", {"tool_call_parser": "hermes"}),
        ("demo --tool-call-parser qwen3_xml --reasoning-parser deepseek_r1", {"reasoning_parser": "qwen3"}),
        ("""demo --pooler-config '{"pooling_type": "LAST", "normalize": true}'""", {"model": "demo"}),
        ("demo --num-scheduler-steps 8 --worker-use-ray --override-pooler-config '{}' --port 7", {"port": 7}),
        (
            "demo --pooler-config.task token_embed --compilation-config.mode=3 --port 7",
            {"pooling_task": "token_embed", "port": 7},
        ),
        (
            """demo --default-chat-template-kwargs.enable_thinking false --hf-overrides '{"a": 1}' --hf-overrides.b.c x""",
            {"default_chat_template_kwargs": {"enable_thinking": False}, "hf_overrides": {"a": 1, "b": {"c": "x"}}},
        ),
        ("demo --chat-template-content-format openai", {"chat_template_content_format": "openai"}),
        ("demo --generation-config vllm", {"generation_config": "none"}),
        ("demo --load-format safetensors --enforce-eager", {"load_format": "auto", "enforce_eager": True}),
        ("demo --shutdown-timeout 5 --disable-uvicorn-access-log", {"drain_timeout_s": 5.0, "access_log": False}),
        ("--uvicorn-log-level info demo --disable-log-requests", {"model": "demo"}),
        ("demo --no-enable-prefix-caching --no-enable-lora", {"enable_prefix_caching": False}),
        ("demo -O3 --compilation-config.mode 3 -cc.level=2", {"model": "demo"}),
        ("""demo --compilation-config '{"level": 3}' --port 2""", {"port": 2}),
        (
            "demo --gpu-memory-utilization 0.9 --trust-remote-code --kv-cache-dtype auto",
            {"gpu_memory_utilization": 0.9},
        ),
    ],
)
def test_what_vllms_users_type(line: str, expected: dict[str, Any]):
    found = params(line)
    assert {name: found[name] for name in expected} == expected


def test_what_has_no_effect_is_said():
    found = translated(shlex.split("demo --enable-chunked-prefill -pp 1 --attention-backend FLASH_ATTN"), OURS, SEVERAL)
    assert [notice.split(" of vLLM")[0] for notice in found.notices] == [
        "--enable-chunked-prefill", "--pipeline-parallel-size 1", "--attention-backend FLASH_ATTN",
    ]  # fmt: skip


def test_our_own_words_stay_as_they_are():
    for line in (
        "demo --port 8001 --max-model-len 8K",
        "./model.gguf --api-key secret-key",
        "--help",
        "demo --nonsense 3",
    ):
        assert ours(line) == shlex.split(line)


def test_flags_of_a_file_give_way_to_those_of_the_command_line(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: Qwen/Qwen3-8B\nport: 12\nmax_model_len: 8k\nserved-model-name: [a, b]\nenforce-eager: true\n"
        "enable-prefix-caching: false\ntensor-parallel-size: 1\nenable-lora: false\nseed:\n"
    )
    found = params(f"--config {file} --port 13")
    assert (found["model"], found["port"], found["max_model_len"]) == ("Qwen/Qwen3-8B", 13, 8000)
    assert found["served_model_name"] == ["a", "b"] and found["enforce_eager"] and not found["enable_prefix_caching"]
    assert params(f"demo --config={file}")["model"] == "demo"


@pytest.mark.parametrize("content", [None, "- 1\n", "a: [", "\x00"])
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, content: str | None):
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadConfig, match="--config") as caught:
        ours(f"demo --config {file}")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadConfig, match="needs the name"):
        ours("demo --config")


def test_from_the_command_line():
    assert "several servers stand behind one proxy" in one_line(run("serve", "demo", "-dp", "2"))
    assert "(LoRA)" in one_line(run("chat", "demo", "--enable-lora"))
