"""What the planner advises is what ``fastqwen serve`` takes, and what stands in its way is said."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer

from fastqwen.cli.main import app
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, DoesNotFit
from fastqwen.plan.advice import Answer, answer, list_models
from fastqwen.plan.catalog import catalog, find_published
from fastqwen.plan.gpus import find_target
from fastqwen.plan.question import PlanOptions, Question
from fastqwen.plan.served import not_served_yet
from fastqwen.runner import start

CARDS = ["6GB", "T4", "24GB", "H200"]
WISHES = {
    "as it is": PlanOptions(),
    "a length": PlanOptions(max_model_len=4096, concurrency=8),
    "two cards and 8 bits": PlanOptions(num_gpus=2, kv_cache_dtype="fp8", max_model_len=8192),
    "many and small": PlanOptions(max_model_len=2048, concurrency=300, max_num_batched_tokens=2048, dtype="float16"),
}


def parsed(line: str) -> EngineConfig:
    """The engine's wishes as the real command reads them. Raises for what it refuses."""
    program, name, *words = shlex.split(line)
    assert (program, name) == ("fastqwen", "serve")
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    found = command.make_context(name, words).params
    return EngineConfig(**{key: value for key, value in found.items() if key in EngineConfig.__struct_fields__})


def lines_of(found: Answer) -> list[str]:
    lines = [found.command, *(change.command for change in found.changes)]
    return [line for line in lines if line is not None]


@pytest.mark.parametrize("wishes", WISHES.values(), ids=WISHES)
@pytest.mark.parametrize("card", CARDS)
def test_every_line_that_is_advised_is_one_that_serve_takes(card: str, wishes: PlanOptions):
    """Every model's lines; those with the same flags are parsed once."""
    flags: dict[tuple[str, ...], str] = {}
    for found in list_models(find_target(card), wishes):
        for change in found.changes:
            assert (change.command is None) == bool(change.not_served_yet)
        for line in lines_of(found):
            name, *words = shlex.split(line)[2:]
            entry = catalog().find(name)
            assert entry is not None
            model = catalog().model(entry)
            assert not not_served_yet(model)
            options = dict(pairwise(words))
            assert int(options.get("--max-model-len", "1")) <= model.default_max_len
            if wishes.concurrency > 256 and line == found.command and found.fits:
                assert int(options["--max-num-seqs"]) >= wishes.concurrency
            flags.setdefault(tuple(word for word in words if word.startswith("--")), line)
    for line in flags.values():
        parsed(line)
    assert flags or (card, wishes.concurrency) == ("6GB", 300)


def test_the_parser_of_these_tests_refuses_what_serve_refuses():
    with pytest.raises(Exception, match="No such option"):
        parsed("fastqwen serve demo --pipeline-parallel-size 2")
    with pytest.raises(BadConfig):
        parsed("fastqwen serve demo --enforce-eager --max-num-seqs 0")


def test_a_cache_of_8_bits_is_served():
    found = find_published("Qwen3-8B")
    assert found is not None
    facts = find_target("RTX 3090").facts
    asked = answer(Question.of(PlanOptions(num_gpus=2, kv_cache_dtype="fp8"), found, facts))
    assert asked.command == "fastqwen serve Qwen/Qwen3-8B --tensor-parallel-size 2 --kv-cache-dtype fp8"
    assert parsed(asked.command).kv_cache_dtype == "fp8"


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine whose only GPU is an RTX 3070; a list of what touched its memory."""
    touched: list[str] = []
    facts = find_target("RTX 3070").facts
    monkeypatch.setattr(start, "choose_device", lambda config: torch.device("cuda", 0))
    monkeypatch.setattr(start, "device_facts", lambda device: facts)
    monkeypatch.setattr(start, "choose_ops", lambda device: touched.append("kernels"))
    monkeypatch.setattr(start, "_load", lambda *arguments: touched.append("weights"))
    return touched


def test_a_gpu_that_is_too_small_is_told_before_the_weights_are_read(small_gpu: list[str], tmp_path: Path):
    entry = catalog().find("Qwen/Qwen2.5-7B-Instruct")
    assert entry is not None
    (tmp_path / "config.json").write_text(json.dumps(catalog().config_json(entry)))
    config = EngineConfig(model=entry.name, load_format="dummy", max_model_len=4096)
    with pytest.raises(DoesNotFit, match=r"use fastqwen serve Qwen/Qwen2\.5-\S+ ") as error:
        start.start_engine(config, tmp_path)
    assert small_gpu == []
    parsed("fastqwen" + str(error.value).split("use fastqwen")[1])


def test_a_model_of_ones_own_gets_a_length_or_an_honest_answer(small_gpu: list[str], tmp_path: Path):
    """No published name to advise: still one line, still before the weights."""
    entry = catalog().find("Qwen/Qwen3-14B")
    assert entry is not None
    (tmp_path / "config.json").write_text(json.dumps(catalog().config_json(entry)))
    with pytest.raises(DoesNotFit, match="use a smaller model or a larger GPU"):
        start.start_engine(EngineConfig(model=str(tmp_path), load_format="dummy", max_model_len=4096), tmp_path)
    assert small_gpu == []
