"""What docker/ says of our commands holds. No container engine is needed: images themselves are built elsewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fastqwen.cli.main import app
from fastqwen.cluster.cluster_file import read_cluster_file
from fastqwen.cluster.secret import VARIABLE
from tests.server.live import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
COMPOSE = [DOCKER / "compose.yaml", DOCKER / "compose.cluster.yaml"]


def parsed(words: list[str]) -> dict[str, Any]:
    """The flags of a command line, as the command would get them."""
    command: Any = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    found: dict[str, Any] = command.make_context(words[0], words[1:]).params
    return found


def services(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())["services"]
    return found


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_starts_commands_that_exist(file: Path):
    for name, service in services(file).items():
        params = parsed(shlex.split(service["command"]))
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        if service.get("ports"):
            assert params["host"] == "0.0.0.0" and "FASTQWEN_API_KEY" in service["environment"], name
            assert service["ports"] == [f"{params['port']}:{params['port']}"]
        if "controller" in params:
            assert params["controller"] == "controller:21001" and VARIABLE in service["environment"], name
        grace_s = int(service["stop_grace_period"].removesuffix("s"))
        assert grace_s > params.get("drain_timeout_s", 0), "docker would kill what still drains"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_copy_what_there_is_and_run_as_nobody_special(file: Path):
    text = file.read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists() and source not in ignored, source
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    assert len(stages) == 2 and re.search(r"^USER 10001", stages[1], re.M)
    assert "pip install" not in stages[1], "what only the build needs stays in its stage"
    assert "HEALTHCHECK" in text and 'ENTRYPOINT ["fastqwen"]' in text and "VOLUME /models" in text


def test_the_kuberay_example_holds_a_cluster_file(tmp_path: Path):
    config, cluster = yaml.safe_load_all((DOCKER / "kuberay.yaml").read_text())
    file = tmp_path / "cluster.yaml"
    file.write_text(config["data"]["cluster.yaml"])
    found = read_cluster_file(file)
    assert found.ray_address == "auto" and found.groups[0].needs.gpus == 1
    parsed(["worker", *found.groups[0].words])
    parsed(["api", *found.fronts["api"]])
    head = cluster["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    for group in (head, *cluster["spec"]["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_the_unit_starts_a_command_that_exists():
    [line] = re.findall(r"^ExecStart=\S+ (.*)$", (DOCKER / "fastqwen-worker.service").read_text(), re.M)
    params = parsed(shlex.split(line))
    assert params["model"] == "Qwen/Qwen3-0.6B" and params["controller"] == "controller:21001"
    assert params["drain_timeout_s"] < 75
