"""The roles as processes: controller, workers, API. What is killed is really killed."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.live import Cluster, Host, can_make_hosts, warnings
from tests.reliability.mock_model import make_model
from tests.reliability.server import free_port, serving
from tests.server.live import command

MODEL = "Qwen"
STREAMS = 32
pytestmark = pytest.mark.slow  # each worker is a process that imports torch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        for name in ("one", "two"):
            made.start_worker(name, model, engine={"served_model_name": [MODEL]})
        made.start_front()
        made.until_replicas(2, MODEL)
        yield made


async def texts(cluster: Cluster, after: int | None = None, then: Any = None, max_tokens: int = 150) -> list[str]:
    """The answers of 32 greedy streams. Once so many pieces came, ``then`` happens."""
    seen = 0
    happened: asyncio.Task[Any] | None = None

    async def one(number: int) -> str:
        nonlocal seen, happened
        text, reasons = "", []
        stream = await client.chat.completions.create(
            model=MODEL,
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
        assert reasons == ["length"], reasons
        return text

    async with cluster.client as client:
        found = await asyncio.gather(*(one(number) for number in range(STREAMS)))
    if happened is not None:
        await happened
    return found


def test_kill_9_of_a_worker_changes_no_text(cluster: Cluster, model: Path):
    undisturbed = asyncio.run(texts(cluster))
    assert len(set(undisturbed)) == STREAMS and all(len(text) == 150 for text in undisturbed)
    before = cluster.cluster()["models"][MODEL]["moved_requests"]
    disturbed = asyncio.run(texts(cluster, STREAMS * 20, lambda: cluster.kill_alone("one")))
    assert disturbed == undisturbed
    assert cluster.cluster()["models"][MODEL]["moved_requests"] > before
    cluster.until_replicas(1, MODEL)
    cluster.until(lambda: len(cluster.cluster()["workers"]) == 1, within_s=10)
    cluster.start_worker("one", model, engine={"served_model_name": [MODEL]})
    cluster.until_replicas(2, MODEL)


def test_without_its_controller_the_cluster_goes_on(cluster: Cluster):
    undisturbed = asyncio.run(texts(cluster, max_tokens=60))
    assert (
        asyncio.run(texts(cluster, STREAMS * 5, lambda: cluster.kill_alone("controller"), max_tokens=60)) == undisturbed
    )
    cluster.until(lambda: not cluster.cluster()["controller_answers"], within_s=10)
    assert asyncio.run(texts(cluster, max_tokens=60)) == undisturbed
    cluster.start_controller()
    back_s = cluster.until(lambda: len(cluster.listed()) == 2, within_s=30)
    print(f"a controller that is started again knows its workers after {back_s:.1f} s, its start included")
    assert back_s < 10
    cluster.until(lambda: cluster.cluster()["controller_answers"], within_s=10)
    assert len(cluster.replicas(MODEL)) == 2


def test_rolling_replacement_under_load_fails_no_request(cluster: Cluster, model: Path):
    undisturbed = asyncio.run(texts(cluster, max_tokens=100))

    def replace() -> None:
        for name in ("one", "two"):
            cluster.start_worker(f"new-{name}", model, engine={"served_model_name": [MODEL]})
        cluster.until_replicas(4, MODEL)
        for name in ("one", "two"):
            assert cluster.end(name) == 0, cluster.log(name).read_text()

    async def under_load() -> None:
        replacing = asyncio.create_task(asyncio.to_thread(replace))
        while not replacing.done():
            assert await texts(cluster, max_tokens=100) == undisturbed
        await replacing

    asyncio.run(under_load())
    cluster.until_replicas(2, MODEL)
    for old, new in (("new-one", "one"), ("new-two", "two")):
        cluster.processes[new] = cluster.processes.pop(old)


def test_a_cut_off_drain_hands_over_what_still_runs(cluster: Cluster, model: Path):
    undisturbed = asyncio.run(texts(cluster, max_tokens=300))
    cluster.start_worker("short", model, engine={"served_model_name": [MODEL]}, drain_timeout_s=0.1)
    cluster.until_replicas(3, MODEL)
    before = cluster.cluster()["models"][MODEL]["moved_requests"]
    status: list[int] = []
    found = asyncio.run(texts(cluster, STREAMS * 10, lambda: status.append(cluster.end("short")), max_tokens=300))
    assert found == undisturbed and status == [0]
    assert cluster.cluster()["models"][MODEL]["moved_requests"] > before


def test_wrong_tokens_and_strangers_are_not_heard(cluster: Cluster, model: Path):
    cluster.start("stranger", [*cluster.processes["one"].args], FASTQWEN_CLUSTER_TOKEN="another-token-than-theirs")  # type: ignore[misc]
    cluster.until(lambda: "worker of Qwen" in cluster.log("stranger").read_text())
    asyncio.run(asyncio.sleep(2))
    assert len(cluster.members()) == 2
    cluster.kill("stranger")


def test_another_model_under_the_same_name_is_refused(
    cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory
):
    other = make_model(tmp_path_factory.mktemp("other"))
    (other / "generation_config.json").write_text('{"temperature": 0.5}')
    cluster.start_worker("other", other, engine={"served_model_name": [MODEL]})
    cluster.until(lambda: any(one["refused"] for one in cluster.cluster()["workers"]))
    assert len(cluster.replicas(MODEL)) == 2
    cluster.kill("other")
    cluster.start_worker("other", other, engine={"served_model_name": ["Other"]})
    cluster.until_replicas(1, "Other")
    names = [one["id"] for one in httpx.get(f"{cluster.url}/v1/models").json()["data"]]
    assert names == ["Other", MODEL]
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    refused = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=30)
    assert refused.status_code == 404 and "Other, Qwen" in refused.json()["error"]["message"]
    for name in names:
        answer = httpx.post(f"{cluster.url}/v1/chat/completions", json={"model": name, **body}, timeout=30).json()
        assert answer["model"] == name and len(answer["choices"][0]["message"]["content"]) == 3
    metrics = httpx.get(f"{cluster.url}/metrics").text
    assert metrics.count("# TYPE vllm:num_requests_running gauge") == 1
    assert 'vllm:num_requests_running{model_name="Other"}' in metrics
    cluster.kill("other")
    cluster.until(lambda: "Other" not in cluster.cluster()["models"])


def test_a_partitioned_worker_is_unlisted_and_its_answers_go_on(cluster: Cluster, model: Path):
    if not can_make_hosts():
        pytest.skip("network namespaces need root")
    undisturbed = asyncio.run(texts(cluster, max_tokens=300))
    with Host(1) as host:
        cluster.start_worker("far", model, host=host, engine={"served_model_name": [MODEL]})
        cluster.until_replicas(3, MODEL)
        cut_s: list[float] = []

        def cut() -> None:
            host.cut()
            cut_s.append(time.monotonic())

        def unlisted_s() -> tuple[float, float]:
            """Seconds from the cut until the controller, and the front end, list it no more."""
            cluster.until(lambda: cut_s)
            cluster.until(lambda: len(cluster.listed()) == 2)
            controller_s = time.monotonic() - cut_s[0]
            cluster.until_replicas(2, MODEL)
            return controller_s, time.monotonic() - cut_s[0]

        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(unlisted_s)
            disturbed = asyncio.run(texts(cluster, STREAMS * 10, cut, max_tokens=300))
            by_controller_s, by_front_s = looking.result(60)
        print(
            f"a partitioned worker is unlisted after {by_controller_s:.1f} s, by the front end after {by_front_s:.1f} s"
        )
        assert by_controller_s < 5 and by_front_s < 5
        assert disturbed == undisturbed
        host.join()
        cluster.until_replicas(3, MODEL)
        cluster.kill("far")
    cluster.until_replicas(2, MODEL)


def test_what_the_front_end_costs(cluster: Cluster, tmp_path: Path):
    """Against ``serve`` with the same engine: one token, one after the other, in turns."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}

    def asked_ms(client: httpx.Client) -> float:
        start_s = time.perf_counter()
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        return 1000 * (time.perf_counter() - start_s)

    with (
        serving(make_model(tmp_path), step_s=0.005) as server,
        httpx.Client(base_url=server.url) as direct,
        httpx.Client(base_url=cluster.url) as over,
    ):
        both = [(asked_ms(direct), asked_ms(over)) for _ in range(300)]
    direct_ms, over_ms = (statistics.median(one) for one in zip(*both[20:], strict=True))
    print(f"one token, p50: serve {direct_ms:.2f} ms, api and worker {over_ms:.2f} ms")
    assert over_ms - direct_ms < 50


def test_a_front_end_that_is_killed_leaves_nothing(cluster: Cluster):
    url = cluster.url
    cluster.start_front(name="second")
    cluster.until_replicas(2, MODEL)
    cluster.kill_alone("second")
    cluster.url = url


def test_with_no_worker_left_streams_end_with_an_error(cluster: Cluster):
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
    body = {"messages": [{"role": "user", "content": "x"}]}
    gone = httpx.post(f"{cluster.url}/v1/chat/completions", json=body)
    assert gone.status_code == 503 and gone.headers["retry-after"] == "1"
    assert cluster.end("api") == 0
    assert cluster.end("controller") == 0
    assert not [line for line in warnings(cluster.log("api")) if "Traceback" in line], cluster.log("api").read_text()


def test_a_cluster_of_one_file_leaves_nothing_when_it_is_killed(model: Path, tmp_path: Path):
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
