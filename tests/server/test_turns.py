"""Many connections with requests to spare, and one that comes with a single one."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState as Connections

from fastqwen.server.config import FrontConfig
from fastqwen.server.http.header_limits import MAX_AHEAD_BYTES, bounded_http
from fastqwen.server.http.listen import ACCEPTED_AT_ONCE, DrainingServer, bind, run_loop
from fastqwen.server.http.turns import AT_ONCE, Turns
from fastqwen.server.operator.prometheus import MetricsPage
from tests.server.harness import ask, make_state

HOG = b"HEAD /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"
PROBE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("ok")(scope, receive, send)


class Transport(asyncio.Transport):
    """Of a connection that is always read."""

    def __init__(self) -> None:
        super().__init__()
        self.num_answers = 0
        self.is_read = True

    def write(self, data: Any) -> None:
        self.num_answers += bytes(data).count(b"HTTP/1.1 ")

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True

    def abort(self) -> None:
        raise AssertionError("a connection was ended")


class Front:
    def __init__(self) -> None:
        config = Config(app, lifespan="off", access_log=False, log_config=None)
        config.load()
        kind: Any = bounded_http(FrontConfig())
        self._made = lambda: kind(config=config, server_state=Connections(), app_state={})

    def connect(self) -> tuple[Any, Transport]:
        protocol, transport = self._made(), Transport()
        protocol.connection_made(transport)
        return protocol, transport


async def answers_in_front_of(probe: bytes, *, hogs: int, again: bool) -> int:
    """How many requests of others are answered between a single one's coming and its answer."""
    front = Front()
    opened = [front.connect() for _ in range(hogs)]
    if again:  # they are known to ask much
        for protocol, _ in opened:
            protocol.data_received(HOG)
        while sum(transport.num_answers for _, transport in opened) < hogs:
            await asyncio.sleep(0)
    for protocol, _ in opened:
        protocol.data_received(HOG * 50)
    before = sum(transport.num_answers for _, transport in opened)
    protocol, mine = front.connect()
    protocol.data_received(probe)
    while not mine.num_answers:
        await asyncio.sleep(0)
    found = sum(transport.num_answers for _, transport in opened) - before
    for protocol, _ in opened:
        protocol.connection_lost(ConnectionResetError())
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0)
    return found


@pytest.mark.parametrize("probe", [PROBE, PROBE.replace(b"/health", b"/metrics"), b"GET /v1/models" + PROBE[11:]])
def test_a_single_request_does_not_wait_for_those_that_others_have_ahead(probe: bytes):
    assert asyncio.run(answers_in_front_of(probe, hogs=300, again=True)) < 30


def test_a_probe_does_not_wait_for_the_first_requests_of_many_connections():
    assert asyncio.run(answers_in_front_of(PROBE, hogs=300, again=False)) < 60


def test_a_body_that_comes_before_its_requests_turn_waits_with_it():
    """However much of it is there already; no more is read until then."""
    body = b"x" * 2 * MAX_AHEAD_BYTES
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def main() -> tuple[bool, bool]:
        front = Front()
        for _ in range(AT_ONCE["rested"]):
            front.connect()[0].data_received(HOG)
        protocol, mine = front.connect()
        protocol.data_received(head + body)
        waited = not mine.is_read
        while not mine.num_answers or not mine.is_read:
            await asyncio.sleep(0)
        return waited, mine.is_read

    assert asyncio.run(asyncio.wait_for(main(), 60)) == (True, True)


def test_each_kind_has_its_share_in_the_order_of_coming():
    async def main() -> list[list[str]]:
        loop, turns, begun = asyncio.get_running_loop(), Turns(), list[str]()
        now_s = loop.time()
        for at in range(20):
            for kind, last_s in (("busy", now_s), ("rested", -1e9), ("probe", -1e9)):
                name = f"{kind} {at}"
                if turns.take(loop, last_s, probe=kind == "probe", begin=lambda name=name: begun.append(name)):
                    begun.append(name)
        rounds = [list(begun)]
        while len(begun) < 60:
            await asyncio.sleep(0)
            rounds.append(begun[sum(map(len, rounds)) :])
        await asyncio.sleep(0)
        assert turns.take(loop, now_s, probe=False, begin=lambda: None), "nobody waits any more"
        return rounds

    rounds = asyncio.run(main())
    for kind, at_once in AT_ONCE.items():
        assert max(sum(name.startswith(kind) for name in one) for one in rounds) == at_once
        in_order = [name for one in rounds for name in one if name.startswith(kind)]
        assert in_order == [f"{kind} {at}" for at in range(20)]


def test_many_connections_that_come_at_once_are_accepted_in_few_rounds():
    async def main(bound: socket.socket, state: Any) -> int:
        server = DrainingServer(app, state)
        serving = asyncio.ensure_future(server.serve([bound]))
        while not server.started:
            await asyncio.sleep(0.01)
        with ExitStack() as opened:
            for _ in range(64):  # while the loop does nothing
                opened.enter_context(closing(socket.create_connection(bound.getsockname())))
            rounds, begin_s = 0, time.monotonic()
            while len(server.server_state.connections) < 64 and time.monotonic() - begin_s < 30:
                await asyncio.sleep(0)
                rounds += 1
        server.should_exit = True
        await serving
        return rounds

    with bind("127.0.0.1", 0) as bound:
        assert run_loop(main(bound, make_state())) < 3 * 64 / ACCEPTED_AT_ONCE


def test_metrics_are_not_written_anew_for_everybody_who_asks(monkeypatch: pytest.MonkeyPatch):
    now_s = 100.0
    clock = SimpleNamespace(monotonic=lambda: now_s, thread_time=time.thread_time)
    monkeypatch.setattr("fastqwen.server.operator.prometheus.time", clock)
    state = make_state()
    page = MetricsPage(lambda: [state])
    first = page.text()
    ask(state, "/v1/completions", {"prompt": "hi", "max_tokens": 4})
    assert page.text() is first
    now_s += 60
    assert page.text() != first
