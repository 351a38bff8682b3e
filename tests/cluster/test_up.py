"""A cluster from one file: what it says, how many workers there are to be, and that what dies is started again."""

from __future__ import annotations

import asyncio
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import typer

from fastqwen.cli.main import app
from fastqwen.cluster import on_ray
from fastqwen.cluster.cluster_file import ClusterFile, Group, Needs, read_cluster_file
from fastqwen.cluster.config import WorkerConfig
from fastqwen.cluster.replicas import ReplicasConfig, replicate, words_of
from fastqwen.cluster.scaling import DOWN_AFTER_S, UP_AFTER_S, Load, Scaler
from fastqwen.cluster.up import PAUSE_S, STEADY_S, Here, Supervisor, _check_first_start
from fastqwen.cluster.wire import Member
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, FastqwenError
from tests.server.live import ROOT

FILE = """
controller: {host: 0.0.0.0, port: 7000}
workers:
  - {model: demo, replicas: 2, gpus: 1, served-model-name: [Qwen, qwen], max_model_len: 32K, enforce-eager: true}
  - {model: other, min-replicas: 1, max-replicas: 3, enable-prefix-caching: false}
  - {upstream: "http://localhost:8001/v1"}
api: {port: 8000}
web:
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return file


def test_the_file_says_what_the_flags_say(tmp_path: Path):
    found = read_cluster_file(written(tmp_path, FILE))
    assert found.controller == ["--host", "0.0.0.0", "--port", "7000"]
    assert found.controller_address == "127.0.0.1:7000" and found.is_open
    first, second, third = found.groups
    assert first.words == [
        "demo", "--port", "0", "--served-model-name", "Qwen", "--served-model-name", "qwen", "--max-model-len", "32K",
        "--enforce-eager",
    ]  # fmt: skip
    assert (first.min_replicas, first.max_replicas, first.needs) == (2, 2, Needs(gpus=1))
    assert (second.min_replicas, second.max_replicas) == (1, 3) and second.words[-1] == "--no-enable-prefix-caching"
    assert third.words == ["--port", "0", "--upstream", "http://localhost:8001/v1"]
    assert found.fronts == {"api": ["--port", "8000"], "web": []} and found.ray_address is None


def test_the_files_of_the_documentation_say_flags_that_exist(tmp_path: Path):
    texts = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs/cluster.md").read_text(), re.M | re.S)
    assert len(texts) > 1
    for text in texts:
        found = read_cluster_file(written(tmp_path, text))
        command: Any = typer.main.get_command(app)
        every = [("worker", group.words) for group in found.groups] + [*found.fronts.items()]
        for role, words in [("controller", found.controller or []), *every]:
            command.commands[role].make_context(role, list(words))
    assert found.ray_head == 6379 and found.groups[1].needs == Needs(gpus=2, hosts=2)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- demo", "sections"),
        ("workers: []", "at least one"),
        ("worker: [{model: demo}]", "no section worker"),
        ("workers: [{replicas: 2}]", "either model or upstream"),
        ("workers: [{model: demo, upstream: x}]", "either model or upstream"),
        ("workers: [{model: demo, replicas: two}]", "replicas is 'two'"),
        ("workers: [{model: demo, min-replicas: 3, max-replicas: 2}]", "max-replicas"),
        ("workers: [{model: demo}]\napi: 8000", "api must hold"),
        ("workers: [{model: demo}]\nray: {port: 0}", "address"),
        ("workers: [{model: demo}]\nray: {port: 6379, address: auto}", "address"),
        ("workers: [{model: demo, hosts: 2}]", "hosts needs a ray section"),
        ("workers: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str, tmp_path: Path):
    with pytest.raises(BadConfig, match=named):
        read_cluster_file(written(tmp_path, text))


def test_waiting_requests_bring_replicas_one_by_one():
    scaler, busy = Scaler(1, 3), Load(num_ready=1, num_loading=0, num_waiting=9, num_running=9, kv_usage=0.9)
    assert scaler.look(busy, 0.0) == 1
    assert scaler.look(busy, UP_AFTER_S) == 2
    loading = Load(num_ready=1, num_loading=1, num_waiting=9, num_running=9, kv_usage=0.9)
    assert scaler.look(loading, 100.0) == 2, "the one that loads is waited for"
    two = Load(num_ready=2, num_loading=0, num_waiting=9, num_running=9, kv_usage=0.9)
    assert [scaler.look(two, 200.0), scaler.look(two, 200.0 + UP_AFTER_S)] == [2, 3]
    three = Load(num_ready=3, num_loading=0, num_waiting=9, num_running=9, kv_usage=0.9)
    assert [scaler.look(three, at_s) for at_s in (300.0, 400.0)] == [3, 3]


def test_a_moment_s_queue_brings_none():
    scaler = Scaler(1, 3)
    for at_s in range(100):
        waiting = at_s % 4
        assert scaler.look(Load(1, 0, waiting, 5, 0.5), float(at_s)) == 1


def test_idle_replicas_go_late_and_busy_ones_stay():
    scaler = Scaler(1, 3)
    scaler.wanted = 3
    busy, idle = Load(3, 0, 0, 20, 0.4), Load(3, 0, 0, 1, 0.1)
    assert [scaler.look(busy, at_s) for at_s in (0.0, 2 * DOWN_AFTER_S)] == [3, 3]
    assert [scaler.look(idle, 1000.0), scaler.look(idle, 1000.0 + DOWN_AFTER_S)] == [3, 2]
    assert [scaler.look(Load(1, 0, 0, 0, 0.0), at_s) for at_s in (2000.0, 9000.0, 18000.0)] == [2, 1, 1]


class Process:
    def __init__(self, words: list[str]) -> None:
        self.words, self.status = words, None

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.status = 0

    kill = terminate


class Machines:
    """A launcher that only remembers."""

    def __init__(self) -> None:
        self.all: list[Process] = []

    def launch(self, words: list[str], needs: Needs) -> Process:
        self.all.append(Process(words))
        return self.all[-1]

    def running(self, role: str) -> list[Process]:
        return [one for one in self.all if one.status is None and one.words[0] == role]


def member(number: int, **more) -> Member:
    return Member(key=str(number), address=f"h:{number}", names=["other"], kind="engine", state="ready", **more)


def test_what_dies_is_started_again_ever_later(tmp_path: Path):
    here, machines = Machines(), Machines()
    made = Supervisor(read_cluster_file(written(tmp_path, FILE)), here, machines)
    made.look(0.0, [])
    assert [len(here.running(role)) for role in ("controller", "api", "web")] == [1, 1, 1]
    assert len(machines.running("worker")) == 4
    assert machines.all[0].words[:4] == ["worker", "--controller", "127.0.0.1:7000", "demo"]
    victim = machines.running("worker")[0]
    victim.status = -9
    made.look(1.0, [])
    assert len(machines.running("worker")) == 3
    made.look(1.0 + 2 * PAUSE_S, [])
    assert machines.all[-1].words == victim.words and len(machines.running("worker")) == 4
    machines.all[-1].status = 1
    made.look(4.0, [])
    made.look(4.0 + 3 * PAUSE_S, [])
    assert len(machines.running("worker")) == 3, "the second time it waits longer"
    made.look(4.0 + 4 * PAUSE_S, [])
    assert len(machines.running("worker")) == 4
    machines.all[-1].status = 1
    made.look(20.0 + STEADY_S, [])
    made.look(20.0 + STEADY_S + PAUSE_S, [])
    assert len(machines.running("worker")) == 4, "after a long life it dies for the first time again"


def test_load_brings_workers_and_takes_them(tmp_path: Path):
    machines = Machines()
    made = Supervisor(read_cluster_file(written(tmp_path, FILE)), Machines(), machines)

    def others() -> int:
        return sum("other" in one.words for one in machines.running("worker"))

    made.look(0.0, [])
    made.look(1.0, [member(1, num_waiting=3)])
    made.look(1.0 + UP_AFTER_S, [member(1, num_waiting=3)])
    assert others() == 2
    made.look(50.0, [member(1), member(2)])
    made.look(50.0 + DOWN_AFTER_S, [member(1), member(2)])
    made.look(51.0 + DOWN_AFTER_S, [member(1)])
    assert others() == 1


def test_all_of_them_end_in_order(tmp_path: Path):
    order: list[str] = []

    class Ordered(Process):
        def terminate(self) -> None:
            order.append(self.words[0])
            self.status = 0

    class Launching(Machines):
        def launch(self, words: list[str], needs: Needs) -> Process:
            return Ordered(words)

    made = Supervisor(read_cluster_file(written(tmp_path, FILE)), Launching(), Launching())
    made.look(0.0, [])
    asyncio.run(made.end())
    assert order == ["api", "web", "worker", "worker", "worker", "worker", "controller"]


def test_each_replica_here_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch):
    seen: list[str | None] = []

    class Popen(Process):
        def __init__(self, words: list[str], env: dict[str, str], **more: object) -> None:
            super().__init__(words)
            seen.append(env.get("CUDA_VISIBLE_DEVICES"))

    monkeypatch.setattr("fastqwen.cluster.up.subprocess.Popen", Popen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = Here("token")
    first, _, _ = (here.launch([role], Needs(gpus=gpus)) for role, gpus in (("worker", 2), ("worker", 1), ("api", 0)))
    first.terminate()
    here.launch(["worker"], Needs(gpus=1))
    assert seen == ["0,1", "2", None, "0"]


def test_ray_is_not_used_without_its_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadConfig, match=r"fastqwen\[cluster\]"):
        on_ray.OnRay("auto", "token")
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(__version__="2.53.0"))
    with pytest.raises(BadConfig, match=r"2\.54"):
        on_ray.OnRay("auto", "token")
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(__version__="2.54.0"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(BadConfig, match="RAY_AUTH_MODE"):
        on_ray.OnRay("auto", "token")


def test_a_worker_that_cannot_start_at_all_ends_the_command_that_asked_for_replicas(monkeypatch: pytest.MonkeyPatch):
    group = Group(words=["nothing", "--port", "0"], min_replicas=2, max_replicas=2)
    file = ClusterFile(controller=None, controller_address="h:1", is_open=False, groups=[group], fronts={})
    machines = Machines()
    made = Supervisor(file, Here("token"), machines)
    made.look(time.monotonic(), [])
    _check_first_start(made)
    machines.all[0].status = 1
    with pytest.raises(FastqwenError, match="worker 1 could not start"):
        _check_first_start(made)


def test_flags_of_replicas_are_those_that_were_given():
    engine = EngineConfig(
        model="m", max_model_len=4096, enable_prefix_caching=False, served_model_name=["a", "b"], rope_theta=1e6,
        hf_overrides={"x": [1]},
    )  # fmt: skip
    words = words_of(engine)
    command: Any = typer.main.get_command(app).commands["worker"]  # type: ignore[attr-defined]
    params = command.make_context("worker", ["m", *words]).params
    given = {field: params[field] for field in ("max_model_len", "enable_prefix_caching", "rope_theta", "hf_overrides")}
    assert given == {
        "max_model_len": 4096,
        "enable_prefix_caching": False,
        "rope_theta": 1e6,
        "hf_overrides": {"x": [1]},
    }
    assert list(params["served_model_name"]) == ["a", "b"] and len(words) == 11
    assert words_of(WorkerConfig(drain_timeout_s=5.0, port=7), without=("port",)) == ["--drain-timeout", "5.0"]


@pytest.mark.parametrize(
    ("asked", "worker", "engine", "named"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, {}, {}, "--min-replicas is 3"),
        ({"hosts": 2}, {}, {"tensor_parallel_size": 2}, "--hosts needs --ray"),
        ({"hosts": 2, "ray": True}, {}, {"tensor_parallel_size": 3}, "--tensor-parallel-size is 3"),
        ({"replicas": 2}, {"worker_address": "h:1"}, {}, "--worker-address is of one worker"),
        ({"replicas": 2}, {"rank_hosts": ["h"]}, {}, "--rank-hosts is of one worker"),
        ({"replicas": 2}, {"port": 5}, {}, "--port 5 is of one worker"),
    ],
)
def test_what_replicas_cannot_be(asked: dict[str, Any], worker: dict[str, Any], engine: dict[str, Any], named: str):
    with pytest.raises(BadConfig, match=named):
        replicate(EngineConfig(model="m", **engine), WorkerConfig(**worker), ReplicasConfig(**asked), None)


@pytest.mark.parametrize(
    ("role", "status", "is_told"), [("api", 1, True), ("api", 2, True), ("worker", 2, True), ("worker", 1, False)]
)
def test_a_flag_that_does_not_exist_is_not_tried_again(role: str, status: int, is_told: bool, tmp_path: Path):
    machines = Machines()
    made = Supervisor(read_cluster_file(written(tmp_path, FILE)), machines, machines)
    made.look(time.monotonic(), [])
    machines.running(role)[0].status = status
    if is_told:
        with pytest.raises(FastqwenError, match=f"{role}.* could not start"):
            _check_first_start(made)
    else:
        _check_first_start(made)
