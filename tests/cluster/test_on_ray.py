"""Ray for real: a head beside the controller, a second node with an address of its own, and workers that Ray places.

Needs `pip install 'fastqwen[cluster]'`, and root for the second node's network namespace.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from fastqwen.cluster.secret import ray_token
from tests.cluster.hosts import Host, can_make_hosts
from tests.cluster.live import TOKEN, Cluster
from tests.reliability.server import free_port
from tests.server.live import command

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
USUAL = ["--dtype", "float32", "--served-model-name", "Qwen", "--max-model-len", "2048", "--num-threads", "1"]


class RayCluster(Cluster):
    """A controller with a Ray head of one CPU, and a node in a namespace."""

    def start_controller(self) -> None:
        self.ray_port = free_port()
        words = command(
            "controller", "--host", "0.0.0.0", "--port", str(self.port), "--ray", "--ray-port", str(self.ray_port)
        )
        self.start("controller", words)
        self.until(lambda: "listens on" in self.log("controller").read_text(), within_s=180)

    def answer(self) -> str:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        found = client.chat.completions.create(model="Qwen", messages=QUESTION, temperature=0, max_tokens=20)  # type: ignore[arg-type]
        return found.choices[0].message.content or ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    if not can_make_hosts():
        pytest.skip("network namespaces need root")
    with Host(21) as host, RayCluster(tmp_path_factory.mktemp("ray")) as made:
        made.start("node", [*host.enter, *command("node", "--controller", f"{host.gateway}:{made.port}")])
        made.until(lambda: "Ray runs here" in made.log("node").read_text(), within_s=180)
        made.start_front()
        made.far = host.address  # type: ignore[attr-defined]
        yield made


def worker_on_ray(cluster: RayCluster, model: Path, *words: str) -> None:
    cluster.start("worker", command("worker", str(model), "--controller", cluster.address, "--ray", *USUAL, *words))


def test_replicas_are_placed_on_the_nodes_and_placed_again_when_they_die(cluster: RayCluster, demo_gguf: Path):
    worker_on_ray(cluster, demo_gguf, "--replicas", "2")
    cluster.until(lambda: len(cluster.replicas("Qwen")) == 2, within_s=240)
    assert cluster.answer() == "The capital of France is Paris."
    members = cluster.members()
    assert len({one["address"].rpartition(":")[0] for one in members}) == 2, "one on each node"
    victim = members[0]["pid"]
    psutil.Process(victim).kill()
    cluster.until(lambda: victim not in [one["pid"] for one in cluster.members()], within_s=60)
    cluster.until(lambda: len(cluster.replicas("Qwen")) == 2, within_s=240)
    assert cluster.end("worker", 120) == 0
    cluster.until(lambda: not cluster.members(), within_s=30)


def test_one_replica_on_two_nodes(cluster: RayCluster, demo_gguf: Path):
    worker_on_ray(cluster, demo_gguf, "--tensor-parallel-size", "2", "--hosts", "2", "--ranks-port", "0")
    cluster.until(lambda: len(cluster.replicas("Qwen")) == 1, within_s=240)
    assert cluster.answer() == "The capital of France is Paris."
    [member] = cluster.members()
    assert member["device"].startswith("2 x ")
    assert cluster.end("worker", 120) == 0


def test_who_does_not_know_the_token_gets_nothing_from_ray(cluster: RayCluster):
    words = [
        *command("up", "--help")[:1],
        "-m",
        "ray.scripts.scripts",
        "status",
        "--address",
        f"127.0.0.1:{cluster.ray_port}",
    ]

    def asked(token: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)

    assert "Active" in asked(ray_token(TOKEN)).stdout
    assert "Active" not in asked("b" * 64).stdout


def test_nothing_of_ray_is_left_behind(cluster: RayCluster):
    """The last story."""
    every = [
        one
        for name in ("node", "controller")
        for one in psutil.Process(cluster.processes[name].pid).children(recursive=True)
    ]
    assert any("raylet" in one.name() for one in every)
    assert cluster.end("node", 60) == 0
    process = cluster.processes.pop("controller")
    process.kill()
    process.wait(10)
    start_s = time.monotonic()
    _, left = psutil.wait_procs(every, timeout=120)  # Ray's agents first try to tell a head that is gone
    print(f"kill -9 of a controller: all of its Ray has ended after {time.monotonic() - start_s:.0f} s")
    assert not left
