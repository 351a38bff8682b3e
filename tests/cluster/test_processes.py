"""The roles as processes on several hosts: a controller, workers of two models, a front end. What is killed is really killed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastqwen.text.template import CHATML
from tests.cluster.hosts import Host, Switch, can_make_hosts
from tests.cluster.live import Cluster, warnings
from tests.reliability.mock_model import make_model
from tests.reliability.server import free_port
from tests.server.live import command

MODEL, OTHER = "Qwen", "Other"
MODELS = {"one": MODEL, "two": MODEL, "three": OTHER}  # of the workers
STREAMS, OTHER_STREAMS = 32, 8
STEP_S = (
    0.04  # so slow that clients which share their cores with other work keep up, and a story happens amid the answers
)
pytestmark = pytest.mark.slow  # each worker is a process that imports torch


class Stage(Cluster):
    """A controller and three workers with two models, each on a host of its own where that may be, and a front end here."""

    def __init__(self, folder: Path, models: dict[str, Path], hosts: dict[str, Host]) -> None:
        super().__init__(folder, step_s=STEP_S, host=hosts.get("controller"))
        self.hosts, self._models = hosts, models

    def begin(self, name: str, old: str = "", **options: Any) -> None:
        """The worker of this name, or one in the place of an ``old`` one."""
        model, host = MODELS[old or name], self.hosts.get(old or name)
        self.start_worker(name, self._models[model], host=host, engine={"served_model_name": [model]}, **options)

    def mend(self) -> None:
        """As each story finds it, whatever the one before has left."""
        for host in self.hosts.values():
            host.join()
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                del self.processes[name]
            elif name not in ("controller", "api", *MODELS):
                self.kill(name)
        if "controller" not in self.processes:
            self.start_controller()
        for name in MODELS:
            if name not in self.processes:
                self.begin(name)
        if "api" not in self.processes:
            self.start_front()
        self.until(lambda: len(self.listed()) == 3)
        self.until_replicas(2, MODEL)
        self.until_replicas(1, OTHER)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    models = {name: make_model(tmp_path_factory.mktemp(name)) for name in (MODEL, OTHER)}
    changed = {"chat_template": f"Another one.{CHATML}", "eos_token": "<|im_end|>"}
    (models[OTHER] / "tokenizer_config.json").write_text(json.dumps(changed))
    with ExitStack() as stack:
        hosts: dict[str, Host] = {}
        if can_make_hosts():
            switch = stack.enter_context(Switch())
            for number, name in enumerate(("controller", *MODELS), start=1):
                hosts[name] = stack.enter_context(Host(number, switch))
        yield stack.enter_context(Stage(tmp_path_factory.mktemp("cluster"), models, hosts))


@pytest.fixture
def cluster(stage: Stage) -> Stage:
    stage.mend()
    return stage


async def texts(cluster: Cluster, after: int | None = None, then: Any = None, max_tokens: int = 150) -> list[str]:
    """The answers of 32 greedy streams, and of 8 to the other model. Once so many pieces came, ``then`` happens."""
    seen = 0
    happened: asyncio.Task[Any] | None = None

    async def one(model: str, number: int) -> str:
        nonlocal seen, happened
        text, reasons = "", []
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"story {number}"}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reasons += [choice.finish_reason] if choice.finish_reason else []
            seen += 1
            if after is not None and seen >= after and happened is None:
                happened = asyncio.create_task(asyncio.to_thread(then))
        assert reasons == ["length"] and len(text) == max_tokens, reasons
        return text

    every = [(MODEL, number) for number in range(STREAMS)] + [(OTHER, number) for number in range(OTHER_STREAMS)]
    async with cluster.client as client:
        found = await asyncio.gather(*(one(*each) for each in every))
    if after is not None:
        assert happened is not None
        await happened
    return found


def num_moved(cluster: Cluster) -> int:
    """Answers that went on at another replica so far."""
    return int(cluster.cluster()["models"][MODEL]["moved_requests"])


def test_kill_9_of_a_worker_changes_no_text(cluster: Stage):
    undisturbed = asyncio.run(texts(cluster))
    assert len(set(undisturbed)) == STREAMS + OTHER_STREAMS
    before = num_moved(cluster)
    disturbed = asyncio.run(texts(cluster, STREAMS * 20, lambda: cluster.kill_alone("one")))
    assert disturbed == undisturbed
    moved = num_moved(cluster) - before
    print(f"kill -9 of a worker: {moved} of {STREAMS} streams went on elsewhere, every text as before")
    assert moved > 0
    cluster.until(lambda: len(cluster.cluster()["workers"]) == 2)
    assert not (cluster.hosts and cluster.hosts["one"].processes())


def test_without_its_controller_the_cluster_goes_on(cluster: Stage):
    undisturbed = asyncio.run(texts(cluster, max_tokens=60))
    killed = asyncio.run(texts(cluster, STREAMS * 5, lambda: cluster.kill_alone("controller"), max_tokens=60))
    assert killed == undisturbed
    cluster.until(lambda: not cluster.cluster()["controller_answers"])
    assert asyncio.run(texts(cluster, max_tokens=60)) == undisturbed
    cluster.start_controller()
    back_s = cluster.until(lambda: len(cluster.listed()) == 3)
    print(f"a controller that is started again knows its workers after {back_s:.1f} s, its start included")
    assert back_s < 10
    cluster.until(lambda: cluster.cluster()["controller_answers"])
    assert len(cluster.replicas(MODEL)) == 2 and len(cluster.replicas(OTHER)) == 1


def test_rolling_replacement_under_load_fails_no_request(cluster: Stage):
    undisturbed = asyncio.run(texts(cluster, max_tokens=100))
    num_rounds = 0

    def replace() -> None:
        for name, model in MODELS.items():
            there = len(cluster.replicas(model))
            cluster.begin(f"new {name}", name)
            cluster.until_replicas(there + 1, model)
            assert cluster.end(name) == 0, cluster.log(name).read_text()
            cluster.until_replicas(there, model)

    async def under_load() -> None:
        nonlocal num_rounds
        replacing = asyncio.create_task(asyncio.to_thread(replace))
        while not replacing.done():
            assert await texts(cluster, max_tokens=100) == undisturbed
            num_rounds += 1
        await replacing

    asyncio.run(under_load())
    print(f"all workers replaced under load: {num_rounds * (STREAMS + OTHER_STREAMS)} requests, none failed")
    for name in MODELS:
        cluster.processes[name] = cluster.processes.pop(f"new {name}")


def test_a_cut_off_drain_hands_over_what_still_runs(cluster: Stage):
    undisturbed = asyncio.run(texts(cluster))
    cluster.begin("short", "one", drain_timeout_s=0.1)
    cluster.until_replicas(3, MODEL)
    before = num_moved(cluster)
    status: list[int] = []
    found = asyncio.run(texts(cluster, STREAMS * 10, lambda: status.append(cluster.end("short"))))
    assert found == undisturbed and status == [0]
    assert num_moved(cluster) > before


def test_wrong_tokens_and_strangers_are_not_heard(cluster: Stage):
    cluster.start("stranger", [*cluster.processes["one"].args], FASTQWEN_CLUSTER_TOKEN="another-token-than-theirs")  # type: ignore[misc]
    cluster.until(lambda: "worker of Qwen" in cluster.log("stranger").read_text())
    asyncio.run(asyncio.sleep(3))
    assert len(cluster.members()) == 3


def test_another_model_under_the_same_name_is_refused(cluster: Stage, tmp_path: Path):
    made = make_model(tmp_path)
    (made / "generation_config.json").write_text('{"temperature": 0.5}')
    cluster.start_worker("third", made, engine={"served_model_name": [MODEL]})
    cluster.until(lambda: any(one["refused"] for one in cluster.cluster()["workers"]))
    assert len(cluster.replicas(MODEL)) == 2
    cluster.kill("third")
    cluster.start_worker("third", made, engine={"served_model_name": ["Third"]})
    cluster.until_replicas(1, "Third")
    names = [one["id"] for one in httpx.get(f"{cluster.url}/v1/models", timeout=30).json()["data"]]
    assert names == [OTHER, MODEL, "Third"]
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    refused = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=30)
    assert refused.status_code == 404 and "Other, Qwen, Third" in refused.json()["error"]["message"]
    for name in names:
        answer = httpx.post(f"{cluster.url}/v1/chat/completions", json={"model": name, **body}, timeout=30).json()
        assert answer["model"] == name and len(answer["choices"][0]["message"]["content"]) == 3
    metrics = httpx.get(f"{cluster.url}/metrics", timeout=30).text
    assert metrics.count("# TYPE vllm:num_requests_running gauge") == 1
    assert 'vllm:num_requests_running{model_name="Third"}' in metrics
    cluster.kill("third")
    cluster.until(lambda: "Third" not in cluster.cluster()["models"])


def test_a_partitioned_worker_is_unlisted_and_its_answers_go_on(cluster: Stage):
    if not cluster.hosts:
        pytest.skip("network namespaces need root")
    undisturbed = asyncio.run(texts(cluster))
    cut_s: list[float] = []

    def cut() -> None:
        cluster.hosts["one"].cut()
        cut_s.append(time.monotonic())

    def unlisted_s() -> tuple[float, float]:
        """Seconds from the cut until the controller, and the front end, list it no more."""
        cluster.until(lambda: cut_s)
        cluster.until(lambda: len(cluster.listed()) == 2)
        controller_s = time.monotonic() - cut_s[0]
        cluster.until_replicas(1, MODEL)
        return controller_s, time.monotonic() - cut_s[0]

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(unlisted_s)
        disturbed = asyncio.run(texts(cluster, STREAMS * 10, cut))
        by_controller_s, by_front_s = looking.result(60)
    print(f"a partitioned worker is unlisted after {by_controller_s:.1f} s, by the front end after {by_front_s:.1f} s")
    assert by_controller_s < 5 and by_front_s < 5
    assert disturbed == undisturbed
    cluster.hosts["one"].join()
    cluster.until(lambda: len(cluster.listed()) == 3)
    cluster.until_replicas(2, MODEL)


def test_a_front_end_that_is_killed_leaves_nothing(cluster: Stage):
    url = cluster.url
    cluster.start_front(name="second")
    cluster.until_replicas(2, MODEL)
    cluster.kill_alone("second")
    cluster.url = url


def test_with_no_worker_left_streams_end_with_an_error(cluster: Stage):
    """The last story: it leaves nothing."""

    async def ends() -> list[str]:
        async with cluster.client as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=3000, stream=True
            )
            found = []
            try:
                async for chunk in stream:
                    if not found:
                        for name in ("one", "two"):
                            cluster.kill_alone(name)
                    found.append(chunk.choices[0].finish_reason)
            except Exception as error:
                found.append(str(error))
            return found

    *reasons, last = asyncio.run(ends())
    assert set(reasons) == {None} and "no other one of this model is there" in last
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    gone = httpx.post(f"{cluster.url}/v1/chat/completions", json=asked, timeout=30)
    assert gone.status_code == 503 and gone.headers["retry-after"] == "1", gone.text
    answers = httpx.post(f"{cluster.url}/v1/chat/completions", json={**asked, "model": OTHER}, timeout=30)
    assert answers.status_code == 200
    for name in ("api", "three", "controller"):
        assert cluster.end(name) == 0, cluster.log(name).read_text()
    cluster.until(lambda: not cluster.left(), within_s=30)
    assert not [one for host in cluster.hosts.values() for one in host.processes()]
    assert not [line for line in warnings(cluster.log("api")) if "Traceback" in line], cluster.log("api").read_text()


def test_a_cluster_of_one_file_leaves_nothing_when_it_is_killed(tmp_path: Path):
    model = make_model(tmp_path)
    with Cluster(tmp_path) as made:
        made.kill("controller")
        port = free_port()
        file = tmp_path / "cluster.yaml"
        workers = f"- {{model: {model}, skip-tokenizer-init: true, load-format: dummy}}"
        file.write_text(f"controller: {{port: {made.port}}}\napi: {{port: {port}}}\nworkers:\n  {workers}\n")
        made.start("up", command("up", str(file)))
        made.url = f"http://127.0.0.1:{port}"
        made.until(lambda: len(made.cluster()["workers"]) == 1)
        made.kill_alone("up")
        made.until(lambda: not made.left(), within_s=30)
