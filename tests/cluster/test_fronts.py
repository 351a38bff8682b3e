"""A whole cluster in one event loop: controller, workers, another server, and the API over all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastqwen.cluster import upstream as upstream_module
from fastqwen.cluster.beacon import Beacon, ask_controller
from fastqwen.cluster.controller import Controller
from fastqwen.cluster.fleet import Fleet
from fastqwen.cluster.front import FrontState, create_front
from fastqwen.cluster.parcel import identity_of, pack
from fastqwen.cluster.port import EnginePort
from fastqwen.cluster.upstream import RelayPort
from fastqwen.cluster.wire import PROTOCOL, Ask, Card, Drain, Files, Member
from fastqwen.config import EngineConfig
from fastqwen.hub import find_checkpoint
from fastqwen.server.config import ServerConfig
from fastqwen.server.web.upstream import Upstream
from tests.cluster.test_links import TOKEN
from tests.reliability.mock_model import make_model
from tests.server.harness import chat, make_state

TEXT = "A story, 你好 and good bye."


class Scene:
    """What a test adds to it runs until the end."""

    def __init__(self) -> None:
        self.controller = Controller(TOKEN)
        self.address = f"tcp://127.0.0.1:{self.controller.bind('127.0.0.1', 0)}"
        self.controller.start()
        self.closing: list[Any] = [self.controller]
        self.tasks: list[asyncio.Task[Any]] = []
        self.workers: dict[str, list[Any]] = {}
        self.drained: list[str] = []

    async def client(self, **options: Any) -> httpx.AsyncClient:
        config = ServerConfig(text_workers=1, **options)
        fleet = Fleet(TOKEN, self.address, config)
        self.front = FrontState(fleet, config)
        fleet.start()
        self.closing.insert(0, fleet)
        transport = httpx.ASGITransport(create_front(self.front), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30)

    def register(self, port: Any, key: str, name: str, kind: str) -> None:
        number = port.bind("127.0.0.1", 0)
        port.start()

        def describe() -> Member:
            return Member(key=key, address=f"127.0.0.1:{number}", names=[name], kind=kind, state="ready")

        ends = [Beacon(TOKEN, self.address, describe, lambda: self.drained.append(key)), port]
        self.workers[key] = ends
        self.closing = [*ends, *self.closing]

    def add_worker(self, folder: Path, key: str, name: str = "Qwen") -> Any:
        config = EngineConfig(model=str(folder), served_model_name=[name])
        path, model = find_checkpoint(config)
        portable, files = pack(config, path)
        engine: Any = make_state(lambda prompt, seed: TEXT).engine
        self.tasks.append(asyncio.create_task(engine.run()))
        port = EnginePort(engine, TOKEN)
        port.card = Card(PROTOCOL, portable, engine.ready, identity_of(portable, engine.ready, files))
        port.files = Files(model, files)
        self.register(port, key, name, "engine")
        return engine

    async def add_server(self, key: str, name: str, url: str) -> RelayPort:
        port = RelayPort(Upstream(url, None), TOKEN)
        port.state = "ready"
        self.register(port, key, name, "upstream")
        return port

    async def lose(self, key: str) -> None:
        for end in self.workers.pop(key):
            self.closing.remove(end)
            await end.close()

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        for one in self.closing:
            await one.close()


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    try:
        yield made
    finally:
        await made.close()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


async def ask(client: httpx.AsyncClient, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    return await client.post(path, content=json.dumps({**chat("tell"), **more}).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def told(story: Any) -> None:
    asyncio.run(asyncio.wait_for(story, 60))


def test_one_api_over_all_workers(folder: Path):
    async def story() -> None:
        async with scene() as made, await made.client() as client:
            nobody = await ask(client)
            assert nobody.status_code == 503 and "no worker has registered" in nobody.json()["error"]["message"]
            made.add_worker(folder, "a")
            made.add_worker(folder, "b")
            await until(
                lambda: "Qwen" in made.front.fleet.there and len(made.front.fleet.models["Qwen"].engine.replicas) == 2
            )
            whole = (await ask(client, model="whatever")).json()
            assert whole["choices"][0]["message"]["content"] == TEXT and whole["model"] == "Qwen"
            streamed = await ask(client, stream=True)
            assert streamed.text.endswith("data: [DONE]\n\n")
            [model] = (await client.get("/v1/models")).json()["data"]
            assert (model["id"], model["replicas"], model["max_model_len"]) == ("Qwen", 2, 4096)
            assert (await client.get("/health/ready")).json()["status"] == "ready"
            data = (await client.get("/admin/data")).json()
            assert data["state"] == "ready" and sorted(one["key"] for one in data["workers"]) == ["a", "b"]
            assert data["prompt_tokens_total"] > 0 and "generated" in (await client.get("/admin/history")).json()
            assert len((await client.get("/admin/cluster")).json()["workers"]) == 2
            counted = await client.post("/tokenize", content=b'{"prompt": "abc"}')
            assert counted.json()["count"] == 3
            broken = await client.post("/v1/chat/completions", content=b'{"messages": ')
            assert broken.status_code == 400 and broken.json()["error"]["type"] == "invalid_request_error"
            page = await client.get("/")
            assert page.status_code == 200 and "text/html" in page.headers["content-type"]

    told(story())


def test_models_are_told_apart_by_name(folder: Path, tmp_path: Path):
    other = make_model(tmp_path)
    (other / "generation_config.json").write_text('{"temperature": 0.5}')

    async def story() -> None:
        async with scene() as made, await made.client() as client:
            first = made.add_worker(folder, "a")
            second = made.add_worker(other, "b", "Other")
            await until(lambda: len(made.front.fleet.there) == 2)
            unknown = await ask(client, model="third")
            assert unknown.status_code == 404 and "Other, Qwen" in unknown.json()["error"]["message"]
            for name, engine, one in (("Qwen", first, second), ("Other", second, first)):
                before = len(engine.requests), len(one.requests)
                assert (await ask(client, model=name)).json()["model"] == name
                assert (len(engine.requests), len(one.requests)) == (before[0] + 1, before[1])
            metrics = (await client.get("/metrics")).text
            assert metrics.count("# TYPE vllm:generation_tokens_total counter") == 1
            assert all(f'vllm:generation_tokens_total{{model_name="{name}"}}' in metrics for name in ("Qwen", "Other"))

    told(story())


def test_no_other_model_answers_for_one_whose_workers_are_gone(folder: Path, tmp_path: Path):
    async def story() -> None:
        async with scene() as made, await made.client() as client:
            made.add_worker(folder, "a")
            other = make_model(tmp_path)
            (other / "generation_config.json").write_text('{"temperature": 0.5}')
            made.add_worker(other, "b", "Other")
            await until(lambda: len(made.front.fleet.there) == 2)
            await made.lose("b")
            await until(lambda: list(made.front.fleet.there) == ["Qwen"])
            gone = await ask(client, model="Other")
            assert gone.status_code == 503 and gone.headers["retry-after"] == "1"
            assert "no worker of Other is ready" in gone.json()["error"]["message"]
            assert (await ask(client, model="whatever")).json()["model"] == "Qwen"

    told(story())


def test_priority_and_seed_reach_the_engine(folder: Path):
    async def story() -> None:
        async with scene() as made, await made.client() as client:
            engine = made.add_worker(folder, "a")
            await until(lambda: "Qwen" in made.front.fleet.there)
            assert (await ask(client, priority=-3, seed=7)).status_code == 200
            [request] = engine.requests
            assert (request.priority, request.seed) == (-3, 7)

    told(story())


def test_another_checkpoint_under_a_taken_name_waits_for_its_turn(folder: Path, tmp_path: Path):
    other = make_model(tmp_path)
    (other / "generation_config.json").write_text('{"temperature": 0.5}')

    async def story() -> None:
        async with scene() as made, await made.client() as client:
            made.add_worker(folder, "a")
            await until(lambda: "Qwen" in made.front.fleet.there)
            made.add_worker(other, "b")
            await until(lambda: "b" in made.front.fleet.refused)
            assert list(made.front.fleet.models["Qwen"].engine.replicas) == ["a"]
            await made.lose("a")
            await until(lambda: list(made.front.fleet.models["Qwen"].engine.replicas) == ["b"])
            assert (await ask(client)).json()["choices"][0]["message"]["content"] == TEXT

    told(story())


def test_a_drain_reaches_the_worker_through_the_controller(folder: Path):
    async def story() -> None:
        async with scene() as made:
            made.add_worker(folder, "a")
            await until(lambda: made.controller.registry.listed(0.0)[0])
            assert (await ask_controller(TOKEN, made.address, Drain("nobody"))).num_drained == 0
            assert (await ask_controller(TOKEN, made.address, Drain("Qwen"))).num_drained == 1
            await until(lambda: made.drained)
            found = await ask_controller(TOKEN, made.address, Ask())
            assert [one.key for one in found.members] == ["a"]

    told(story())


async def other_server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As small as a server with an OpenAI-compatible API can be."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(
        next((line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length")), "0")
    )
    body = json.loads(await reader.readexactly(length) or b"{}")
    if body.get("stream"):
        parts = [f'data: {{"choices": [{{"index": 0, "delta": {{"content": "{word}"}}}}]}}\n\n' for word in ("a", "b")]
        kind, data = "text/event-stream", "".join([*parts, "data: [DONE]\n\n"])
    else:
        hops = next((line.split()[1] for line in head.splitlines() if line.lower().startswith("x-fastqwen-hops")), "0")
        answered = {"model": body.get("model"), "asked": head.split()[1], "hops": int(hops)}
        kind, data = "application/json", json.dumps(answered)
    answer = (
        f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n{data}"
    )
    writer.write(answer.encode())
    await writer.drain()
    writer.close()


def test_another_server_joins_as_a_worker():
    async def story() -> None:
        server = await asyncio.start_server(other_server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with scene() as made, await made.client() as client, server:
            await made.add_server("dead", "llama", "http://127.0.0.1:9/v1")
            await until(lambda: "llama" in made.front.fleet.there)
            gone = await ask(client, model="llama")
            assert gone.status_code == 503, gone.text
            await made.add_server("alive", "llama", url)
            await until(lambda: len(made.front.fleet.relayed["llama"].replicas) == 2)
            for _ in range(4):  # whichever is asked first, one of them answers
                answered = {"model": "llama", "asked": "/v1/chat/completions", "hops": 1}
                assert (await ask(client, model="llama")).json() == answered
            streamed = await ask(client, model="llama", stream=True)
            assert streamed.headers["content-type"].startswith("text/event-stream")
            assert [line for line in streamed.text.splitlines() if line][-1] == "data: [DONE]"
            assert streamed.text.count('"content"') == 2
            [model] = (await client.get("/v1/models")).json()["data"]
            assert model["id"] == "llama" and model["replicas"] == 2
            assert all(made.front.fleet.relayed["llama"].router.num_requests(key) == 0 for key in ("dead", "alive"))

    told(story())


def test_another_server_is_asked_under_its_own_name_and_not_for_ever():
    async def story() -> None:
        server = await asyncio.start_server(other_server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with scene() as made, await made.client() as client, server:
            port = await made.add_server("alive", "alias", url)
            port.names_there = ["org/llama", "other"]
            await until(lambda: "alias" in made.front.fleet.there)
            assert (await ask(client, model="alias")).json()["model"] == "org/llama"
            assert (await ask(client, model="other")).json()["model"] == "other"
            client.headers["x-fastqwen-hops"] = "3"
            assert (await ask(client, model="alias")).json()["hops"] == 4
            client.headers["x-fastqwen-hops"] = "4"
            round_and_round = await ask(client, model="alias")
            assert (
                round_and_round.status_code >= 500 and "leads back here" in round_and_round.json()["error"]["message"]
            )

    told(story())


def test_an_upstream_worker_asks_nothing_but_the_api():
    async def story() -> None:
        server = await asyncio.start_server(other_server, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with scene() as made, await made.client(), server:
            await made.add_server("alive", "llama", url)
            await until(lambda: "llama" in made.front.fleet.there)
            link = made.front.fleet.relayed["llama"].replicas["alive"]
            with pytest.raises(Exception, match="no path of the API"):
                async for _ in link.fetch("/../admin", b"{}"):
                    pass

    told(story())


def test_a_worker_with_an_address_that_is_none_keeps_nobody_out(folder: Path):
    async def story() -> None:
        async with scene() as made, await made.client():
            broken = Member(key="broken", address="http://a/b", names=["Qwen"], kind="engine", state="ready")
            made.closing.insert(0, Beacon(TOKEN, made.address, lambda: broken, lambda: None))
            made.add_worker(folder, "a")
            await until(lambda: "Qwen" in made.front.fleet.there and "broken" in made.front.fleet.refused)
            assert "--worker-address" in made.front.fleet.refused["broken"]

    told(story())


def test_a_front_end_that_falls_silent_leaves_no_request_at_another_server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upstream_module, "PEER_LOST_AFTER_S", 0.3)
    monkeypatch.setattr(upstream_module, "LOOK_EVERY_S", 0.05)

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        while not writer.is_closing():
            writer.write(b'data: {"choices": []}\n\n')
            await asyncio.sleep(0.01)

    async def story() -> None:
        server = await asyncio.start_server(endless, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with scene() as made, await made.client(), server:
            port = await made.add_server("alive", "llama", url)
            await until(lambda: "llama" in made.front.fleet.there)
            link = made.front.fleet.relayed["llama"].replicas["alive"]
            parts = link.fetch("/v1/chat/completions", b"{}")
            assert (await anext(parts)).data and port.num_requests == 1
            link._task.cancel()  # no sign of life any more
            await until(lambda: port.num_requests == 0)
            await parts.aclose()

    told(story())


def test_what_is_too_much_for_each_replica_is_refused_before_it_begins(folder: Path):
    async def story() -> None:
        async with scene() as made, await made.client(max_concurrent_requests=1) as client:
            engine = made.add_worker(folder, "a")
            engine.step_delay_s = 0.02
            await until(lambda: "Qwen" in made.front.fleet.there)
            running = asyncio.create_task(ask(client, stream=True))
            await until(lambda: engine.requests)
            refused = await ask(client, stream=True)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            made.add_worker(folder, "b")
            await until(lambda: len(made.front.fleet.models["Qwen"].engine.replicas) == 2)
            assert (await ask(client, stream=True)).status_code == 200
            assert (await running).text.endswith("data: [DONE]\n\n")

    told(story())
