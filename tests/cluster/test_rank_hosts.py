"""One model on several hosts: its worker here, the other ranks in network namespaces, as other machines would have them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.cluster.hosts import Host, can_make_hosts
from tests.cluster.live import Cluster
from tests.server.live import command

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
COUNTING = [{"role": "user", "content": "Count from one to two hundred, in words."}]


class TwoHosts:
    """A worker of two ranks: one beside it, one on ``far``."""

    def __init__(self, cluster: Cluster, far: Host, model: Path) -> None:
        self.cluster, self.far, self._model = cluster, far, model
        self.start_ranks()
        self.start_worker()
        cluster.start_front()
        cluster.until_replicas(1, "Qwen")

    def start_ranks(self, **environment: str) -> None:
        words = command("ranks", "--host", "0.0.0.0", "--port", "21903")
        self.cluster.start("ranks", [*self.far.enter, *words], **environment)

    def start_worker(self) -> None:
        words = ["--tensor-parallel-size", "2", "--rank-hosts", f"{self.far.address}:21903", "--ranks-port", "0"]
        usual = ["--dtype", "float32", "--served-model-name", "Qwen", "--port", "0", "--max-model-len", "2048"]
        self.cluster.start(
            "worker", command("worker", str(self._model), "--controller", self.cluster.address, *words, *usual)
        )

    def ranks(self) -> list[psutil.Process]:
        """Processes of ranks on the far host."""
        return psutil.Process(self.cluster.processes["ranks"].pid).children(recursive=True)

    def answer(self, messages: list[dict[str, str]] = QUESTION, max_tokens: int = 20) -> str:
        client = openai.OpenAI(base_url=f"{self.cluster.url}/v1", api_key="none", max_retries=0)
        found = client.chat.completions.create(model="Qwen", messages=messages, temperature=0, max_tokens=max_tokens)  # type: ignore[arg-type]
        return found.choices[0].message.content or ""

    def broken_by(self, break_it: object) -> str:
        """What a long stream's client hears when something breaks in its middle."""
        client = openai.OpenAI(base_url=f"{self.cluster.url}/v1", api_key="none", max_retries=0, timeout=60)
        stream = client.chat.completions.create(
            model="Qwen", messages=COUNTING, temperature=0, max_tokens=1500, stream=True  # type: ignore[arg-type]
        )  # fmt: skip
        with pytest.raises(openai.APIError) as caught:
            for number, _ in enumerate(stream):
                if number == 5:
                    break_it()  # type: ignore[operator]
        return str(caught.value)

    def until_it_answers(self) -> None:
        self.cluster.until_replicas(1, "Qwen")
        self.cluster.until(lambda: all(one["state"] == "ready" for one in self.cluster.replicas("Qwen").values()))
        assert self.answer() == "The capital of France is Paris."


@pytest.fixture(scope="module")
def hosts(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if not can_make_hosts():
        pytest.skip("network namespaces need root")
    with Host(11) as far, Cluster(tmp_path_factory.mktemp("hosts")) as cluster:
        yield TwoHosts(cluster, far, demo_gguf)


def test_a_model_on_two_hosts_answers(hosts: TwoHosts):
    assert hosts.answer() == "The capital of France is Paris."
    assert len(hosts.ranks()) == 1
    [worker] = hosts.cluster.members()
    assert worker["device"].startswith("2 x ")


def test_a_far_rank_that_is_killed_ends_streams_with_an_error_and_is_started_again(hosts: TwoHosts):
    [victim] = hosts.ranks()
    assert "lost" in hosts.broken_by(victim.kill) or "stopped" in hosts.cluster.log("api").read_text()
    hosts.until_it_answers()
    assert [one.pid for one in hosts.ranks()] != [victim.pid]


def test_a_far_host_that_dies_is_used_again_once_it_is_back(hosts: TwoHosts):
    hosts.broken_by(lambda: hosts.cluster.kill("ranks"))
    time.sleep(2)
    hosts.start_ranks()
    hosts.until_it_answers()


def test_a_cut_cable_is_no_silence_for_ever(hosts: TwoHosts):
    start_s = time.monotonic()
    hosts.broken_by(hosts.far.cut)
    assert time.monotonic() - start_s < 30
    hosts.cluster.until(lambda: not hosts.ranks(), within_s=30)
    hosts.far.join()
    hosts.until_it_answers()


def test_what_its_worker_leaves_behind_on_the_far_host_is_nothing(hosts: TwoHosts):
    hosts.cluster.kill("worker")
    hosts.cluster.until(lambda: not hosts.ranks(), within_s=20)
    hosts.start_worker()
    hosts.cluster.until(lambda: len(hosts.cluster.members()) == 1)
    hosts.until_it_answers()
    assert hosts.cluster.end("ranks") == 0
    hosts.cluster.kill("worker")


def test_a_host_with_another_token_is_not_asked_to_compute(hosts: TwoHosts):
    """The last story: it waits for a host that never answers."""
    hosts.start_ranks(FASTQWEN_CLUSTER_TOKEN="another-token-than-theirs")
    hosts.start_worker()
    process = hosts.cluster.processes.pop("worker")
    assert process.wait(150) == 1
    said = hosts.cluster.log("worker").read_text()
    assert f"no `fastqwen ranks` answers at {hosts.far.address}:21903" in said and "the same token" in said
    assert not hosts.ranks()
