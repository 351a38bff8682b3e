"""A worker's port and a front end's link, over real sockets in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fastqwen.cluster import link as link_module
from fastqwen.cluster import port as port_module
from fastqwen.cluster.link import LinkedEngine
from fastqwen.cluster.port import EnginePort
from fastqwen.cluster.secret import MIN_CHARS, VARIABLE, own_file, read_token
from fastqwen.cluster.sockets import address_of_worker, split_address
from fastqwen.cluster.wire import PROTOCOL, Card, Files, News
from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineStats
from fastqwen.errors import BadConfig
from tests.client.fake_engine import FakeEngine
from tests.cluster.test_failover import first, read, story
from tests.engine.fakes import READY, expected, make_engine, request, tokens_of

TOKEN = "a-token-of-these-tests-only"
CARD = Card(PROTOCOL, EngineConfig(model="x", served_model_name=["Qwen"]), READY, "identity")


class Host:
    """A worker: an engine that computes while the story runs, behind a port."""

    def __init__(self) -> None:
        core, _ = make_engine(blocks=400, max_num_seqs=32, budget=64)
        self.engine = FakeEngine(core, READY)
        self.engine.step_delay_s = 0.001
        self.port = EnginePort(self.engine, TOKEN)
        self.port.card, self.port.files = CARD, Files(READY.model, {"model/config.json": b"{}"})
        self.number = self.port.bind("127.0.0.1", 0)
        self.port.start()
        self._running = asyncio.create_task(self.engine.run())

    def link(self, token: str = TOKEN) -> LinkedEngine:
        return LinkedEngine(token, f"tcp://127.0.0.1:{self.number}")

    async def close(self) -> None:
        self._running.cancel()
        await self.port.close()


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Host, LinkedEngine]]:
    host = Host()
    link = host.link()
    await until(lambda: link.state == "ready")
    try:
        yield host, link
    finally:
        await link.close()
        await host.close()


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_tokens_card_and_files_come_over_the_wire():
    async def told() -> None:
        async with linked() as (_, link):
            assert link.card == CARD and link.ready == READY
            assert (await link.files()).files == {"model/config.json": b"{}"}
            asked = [request(f"r{index}", max_tokens=40, seed=index) for index in range(5)]
            for one, deltas in zip(asked, (await read(link.stream(asked))).values(), strict=True):
                assert tokens_of(deltas) == expected(one)

    story(told())


def test_a_reader_who_leaves_frees_the_worker():
    async def told() -> None:
        async with linked() as (host, link):
            stream = link.stream([request("x", max_tokens=200)])
            await first(stream, 3)
            assert host.port.num_requests == 1
            stream.close()
            await until(lambda: host.engine.aborted == ["x"])
            assert host.port.num_requests == 0

    story(told())


def test_each_front_end_hears_how_much_work_the_others_gave():
    async def told() -> None:
        async with linked() as (host, link):
            other = host.link()
            await until(lambda: other.state == "ready")
            host.engine.step_delay_s = 0.05  # it must still run when the next news is due
            with link.stream([request("x", max_tokens=200)]) as stream:
                await first(stream, 1)
                await until(lambda: other.others_tokens > 0)
                assert link.others_tokens == 0.0
            await until(lambda: other.others_tokens == 0.0)
            await other.close()

    story(told())


def test_a_draining_worker_says_so_and_finishes():
    async def told() -> None:
        async with linked() as (host, link):
            stream = link.stream([request("x", max_tokens=100)])
            await first(stream, 1)
            host.port.is_draining = True
            host.port.tell_all()
            await until(lambda: link.is_draining)
            [rest] = (await read(stream)).values()
            assert rest[-1].finish_reason == "length"

    story(told())


def test_a_connection_that_breaks_ends_its_streams():
    async def told() -> None:
        async with linked() as (host, link):
            stream = link.stream([request("x", max_tokens=200)])
            await first(stream, 1)
            await host.port.close()
            [deltas] = (await read(stream)).values()
            assert deltas[-1].error is not None and deltas[-1].error.kind == "gone"
            assert link.is_lost and link.state == "stopped"

    story(told())


def test_a_worker_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link_module, "LOST_AFTER_S", 0.8)

    async def told() -> None:
        async with linked() as (host, link):
            monkeypatch.setattr(host.port, "tell", lambda peer, deltas: None)
            [deltas] = (await read(link.stream([request("x", max_tokens=200)]))).values()
            assert deltas[-1].error is not None and deltas[-1].error.kind == "gone"

    story(told())


def test_a_front_end_that_falls_silent_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(port_module, "PEER_LOST_AFTER_S", 0.3)
    monkeypatch.setattr(link_module, "BEAT_EVERY_S", 1000.0)

    async def told() -> None:
        async with linked() as (host, link):
            host.engine.step_delay_s = 0.1
            stream = link.stream([request("x", max_tokens=240)])
            await first(stream, 1)
            await until(lambda: host.engine.aborted == ["x"])
            assert host.port.num_requests == 0

    story(told())


def test_a_gap_between_messages_loses_the_link():
    async def told() -> None:
        async with linked() as (_, link):
            link._take(News(link._number + 2, [], "ready", False, EngineStats(), 0.0, 0, 0.0))
            assert link.is_lost

    story(told())


def test_what_one_end_does_not_understand_is_no_silence_for_ever(monkeypatch: pytest.MonkeyPatch):
    """Versions that differ in what nobody thought of: the link is lost, with a reason or after the usual silence."""
    monkeypatch.setattr(link_module, "LOST_AFTER_S", 0.3)

    async def told() -> None:
        async with linked() as (host, link):
            [peer] = host.port._peers.values()
            host.port._listening.send(peer.who, {"type": "NewsOfTomorrow"})
            await until(lambda: link.is_lost)
            assert "install one version on both" in link.failure
        async with linked() as (host, link):
            stream = link.stream([request("r", max_tokens=5000)])
            link._calling.send({"type": "AddOfTomorrow"})
            assert (await read(stream))["r"][-1].error == link_module.LOST
            assert host.port.num_requests == 0

    asyncio.run(told())


def test_another_protocol_is_named():
    async def told() -> None:
        async with linked() as (_, link):
            link._take(Card(PROTOCOL + 1, CARD.config, READY, "identity"))
            assert link.is_lost and f"protocol {PROTOCOL + 1}" in link.failure

    story(told())


def test_who_has_another_token_hears_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link_module, "LOST_AFTER_S", 0.8)

    async def told() -> None:
        async with linked() as (host, _):
            stranger = host.link("another-token-than-theirs")
            await until(lambda: stranger.is_lost)
            assert stranger.card is None and len(host.port._peers) == 1
            await stranger.close()

    story(told())


def test_noise_on_the_port_disturbs_nobody():
    async def told() -> None:
        async with linked() as (host, link):
            _, writer = await asyncio.open_connection("127.0.0.1", host.number)
            writer.write(b"GET / HTTP/1.1\r\n\r\n" * 100)
            await writer.drain()
            asked = request("x", max_tokens=40)
            [deltas] = (await read(link.stream([asked]))).values()
            assert tokens_of(deltas) == expected(asked)
            writer.close()

    story(told())


def test_the_token_is_made_once_and_kept_from_others(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("FASTQWEN_STATE", str(tmp_path / "state"))
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(BadConfig, match=VARIABLE):
        read_token(None)
    made = read_token(None, make=True)
    assert read_token(None) == read_token(None, make=True) == made and len(made) > MIN_CHARS
    assert own_file().stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(BadConfig, match="at least 16"):
        read_token(None)
    own_file().chmod(0o666)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(BadConfig, match="written by others"):
        read_token(None)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("host", ("host", 21001)),
        ("192.0.2.1:5", ("192.0.2.1", 5)),
        ("http://localhost:21001", ("localhost", 21001)),
        ("[::1]:7", ("::1", 7)),
        ("[::1]", ("::1", 21001)),
        ("host:x", None),
        ("host/path", None),
        ("host:70000", None),
        ("", None),
    ],
)
def test_addresses(text: str, found: tuple[str, int] | None):
    if found is None:
        with pytest.raises(BadConfig, match="--controller"):
            split_address(text, 21001, "--controller")
    else:
        assert split_address(text, 21001, "--controller") == found


def test_a_worker_registers_an_address_that_others_can_read():
    assert address_of_worker("192.0.2.7", 21002, None) == "192.0.2.7:21002"
    assert address_of_worker("::1", 5, None) == "[::1]:5"
    assert address_of_worker("0.0.0.0", 5, "http://gpu7:21002") == "gpu7:21002"
    assert address_of_worker("0.0.0.0", 5, "gpu7") == "gpu7:5"
    with pytest.raises(BadConfig, match="--worker-address"):
        address_of_worker("0.0.0.0", 5, "gpu7/path")
