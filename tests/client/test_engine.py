"""The same stories over every implementation of EngineClient."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from fastqwen.client.engine import MAX_WAITING_STEPS, AsyncStream, Deltas, Stream, error_of
from fastqwen.client.engine_thread import EngineThread
from fastqwen.client.local_engine import LocalEngine
from fastqwen.config import EngineConfig
from fastqwen.errors import BadRequest, EngineGone, GenerationFailed
from fastqwen.ipc.process_engine import ProcessEngine
from fastqwen.records import Failure, RequestDelta
from tests.client.fake_engine import FakeEngine
from tests.engine.fakes import READY, FakeExecutor, expected, make_engine, request, tokens_of, vector_at
from tests.server.live import ROOT

FOREVER = 180  # tokens: some hundred steps, of which a test reads a few


@dataclass
class Case:
    """An implementation under test, and how to break it."""

    engine: Any
    die: Callable[[], None]

    async def lists(self, stream: Stream) -> AsyncIterator[Deltas]:
        if isinstance(stream, AsyncStream):
            async for deltas in stream:
                yield deltas
        else:
            for deltas in stream:  # type: ignore[attr-defined]
                yield deltas

    async def read(self, stream: Stream) -> dict[str, Deltas]:
        """All deltas by request; each had its last one, and nothing came behind it."""
        found: dict[str, Deltas] = {}
        async for deltas in self.lists(stream):
            assert deltas, "an empty list is no news"
            for delta in deltas:
                found.setdefault(delta.request_id, []).append(delta)
        for each in found.values():
            assert [delta.finish_reason is not None for delta in each] == [False] * (len(each) - 1) + [True]
        return found

    async def first(self, stream: Stream) -> Deltas:
        return await anext(self.lists(stream))

    async def is_empty(self) -> None:
        """Nothing runs, waits or holds a block: at once, or as soon as the engine's side has heard of it."""
        for _ in range(400):
            stats = self.engine.stats()
            if (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0) and stats.num_steps:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"the engine is not empty: {stats}")


def fake_core() -> tuple[Any, FakeExecutor]:
    core, executor = make_engine(blocks=256, run_ahead=2)
    executor.fail, executor.step_s = {"bad"}, 0.002
    return core, executor


@asynccontextmanager
async def in_this_thread() -> AsyncIterator[Case]:
    core, executor = fake_core()
    yield Case(LocalEngine(core, READY), lambda: setattr(executor, "broken", True))


@asynccontextmanager
async def in_its_own_thread() -> AsyncIterator[Case]:
    core, executor = fake_core()
    engine = EngineThread(core, READY)
    yield Case(engine, lambda: setattr(executor, "broken", True))
    engine.close()


@asynccontextmanager
async def in_another_process() -> AsyncIterator[Case]:
    def kill() -> None:
        [process] = [one for one in psutil.Process().children() if "tests.client.fake_process" in one.cmdline()]
        os.kill(process.pid, signal.SIGKILL)

    command = (sys.executable, "-m", "tests.client.fake_process")
    engine = ProcessEngine(EngineConfig(model="fake"), Path("nowhere"), command=command)
    engine.start()
    try:
        await asyncio.wait_for(engine.wait_ready(), 60)
        yield Case(engine, kill)
    finally:
        await engine.stop()


@asynccontextmanager
async def as_a_fake() -> AsyncIterator[Case]:
    engine = FakeEngine(fake_core()[0], READY)
    running = asyncio.create_task(engine.run())
    yield Case(engine, engine.die)
    running.cancel()


KINDS = [in_this_thread, in_its_own_thread, in_another_process, as_a_fake]
Story = Callable[[Case], Coroutine[Any, Any, None]]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def tell(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Story], None]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(story: Story) -> None:
        async def with_engine() -> None:
            async with request.param() as case:
                await asyncio.wait_for(story(case), 60)

        asyncio.run(with_engine())

    return run


def test_every_request_of_a_stream_ends_once_with_its_own_tokens(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        assert case.engine.state == "ready" and case.engine.ready == READY
        asked = [request(str(index), 3 + index, 4 + 3 * index, seed=index) for index in range(11)]
        with case.engine.stream(asked) as stream:
            found = await case.read(stream)
        assert {name: tokens_of(deltas) for name, deltas in found.items()} == {
            one.request_id: expected(one) for one in asked
        }
        await case.is_empty()

    tell(story)


def test_what_one_step_gave_comes_in_one_list(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        stream = case.engine.stream([request(str(index), 3, 9) for index in range(5)])
        lists = [len(deltas) async for deltas in case.lists(stream)]
        assert max(lists) >= 5 and sum(lists) <= 45

    tell(story)


def test_two_streams_at_once_get_their_own(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        mine, yours = request("mine", 5, 40, seed=3), request("yours", 9, 20, seed=4)
        with case.engine.stream([mine]) as first, case.engine.stream([yours]) as second:
            early = await case.first(first)
            assert tokens_of((await case.read(second))["yours"]) == expected(yours)
            late = await case.read(first)
        assert tokens_of(early) + tokens_of(late.get("mine", [])) == expected(mine)
        await case.is_empty()

    tell(story)


def test_leaving_early_aborts_the_rest(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        stream = case.engine.stream([request(name, 8, FOREVER) for name in "abc"])
        assert tokens_of(await case.first(stream))
        stream.close()
        stream.close()
        await case.is_empty()
        assert case.engine.stats().num_steps < FOREVER, "nothing was left to run to its end"
        with suppress(ZeroDivisionError), case.engine.stream([request("d", 8, FOREVER)]):
            raise ZeroDivisionError
        await case.is_empty()
        with case.engine.stream([request("e", 8, 5)]) as again:
            assert tokens_of((await case.read(again))["e"]) == expected(request("e", 8, 5))

    tell(story)


def test_an_aborted_request_still_has_its_last_delta(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        kept = request("kept", 6, 30)
        with case.engine.stream([request("aborted", 6, FOREVER), kept]) as stream:
            early = await case.first(stream)
            stream.abort(["aborted", "unknown"])
            found = await case.read(stream)
        assert found["aborted"][-1].finish_reason == "abort"
        begun = [delta for delta in early if delta.request_id == "kept"]
        assert tokens_of(begun + found["kept"]) == expected(kept)

    tell(story)


def test_another_request_goes_on_in_its_place(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        whole = request("whole", 6, 60, seed=5)
        with case.engine.stream([whole]) as stream:
            said = tokens_of(await case.first(stream))
            stream.abort(["whole"])
            rest = msgspec.structs.replace(
                whole,
                request_id="rest",
                prompt_token_ids=whole.prompt_token_ids + said,
                max_tokens=whole.max_tokens - len(said),
            )
            stream.add([rest])
            found = await case.read(stream)
        assert said + tokens_of(found["rest"]) == expected(whole)
        assert found["whole"][-1].finish_reason == "abort"
        await case.is_empty()

    tell(story)


def test_embeddings(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        texts = {str(index): list(range(index, index + 20)) for index in range(6)}
        asked = [request(name, ids, 1, pooling="last") for name, ids in texts.items()]
        with case.engine.stream([*asked, request("text", 5, 6)]) as stream:
            found = await case.read(stream)
        for name, ids in texts.items():
            assert [delta.embedding for delta in found[name]] == [vector_at(ids)]
        assert tokens_of(found["text"]) == expected(request("text", 5, 6))

    tell(story)


def test_failures_have_a_kind(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        with case.engine.stream([request("bad", 5, 6), request("good", 5, 6)]) as stream:
            found = await case.read(stream)
        last = found["bad"][-1]
        assert (last.finish_reason, last.error) == ("error", Failure("not_finite", "not finite"))
        assert found["good"][-1].error is None
        await case.is_empty()

    tell(story)


def test_when_the_engine_dies_every_reader_hears_it(tell: Callable[[Story], None]):
    async def story(case: Case) -> None:
        with case.engine.stream([request(name, 8, FOREVER) for name in "ab"]) as stream:
            await case.first(stream)
            case.die()
            if isinstance(case.engine, LocalEngine):  # the reader computes, so it is told what happened
                with pytest.raises(ZeroDivisionError):
                    await case.read(stream)
                case.engine.end(Failure("gone", "it is broken"))
                return
            found = await case.read(stream)
        assert {name: deltas[-1].finish_reason for name, deltas in found.items()} == {"a": "error", "b": "error"}
        assert {deltas[-1].error.kind for deltas in found.values() if deltas[-1].error is not None} == {"gone"}
        if isinstance(case.engine, ProcessEngine):
            assert case.engine.state == "restarting"
            with pytest.raises(EngineGone, match="restarting"):
                case.engine.stream([request("c")])
            await asyncio.wait_for(case.engine.wait_ready(), 60)
            assert case.engine.num_restarts == 1
            with case.engine.stream([request("c", 5, 6)]) as stream:
                assert tokens_of((await case.read(stream))["c"]) == expected(request("c", 5, 6))
        elif isinstance(case.engine, EngineThread):
            assert case.engine.state == "failed"
            with case.engine.stream([request("c")]) as stream:
                assert (await case.read(stream))["c"][-1].error == found["a"][-1].error

    tell(story)


@pytest.mark.parametrize("kind", [in_its_own_thread, in_another_process])
def test_closing_the_engine_ends_what_runs(kind: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    async def story() -> None:
        async with kind() as case:
            stream = case.engine.stream([request("a", 8, FOREVER)])
            await case.first(stream)
            if isinstance(case.engine, ProcessEngine):
                await case.engine.stop()
            else:
                case.engine.close()
            found = await case.read(stream)
            last = found["a"][-1]
            assert last.finish_reason == "abort" and last.error is not None and last.error.kind == "closed"
            assert case.engine.state == "stopped"
            with pytest.raises(EngineGone):
                case.engine.stream([request("b")])
            stream.close()

    asyncio.run(story())


def test_a_reader_who_is_slow_costs_only_its_tokens():
    async def story() -> None:
        core, _ = fake_core()
        stream = FakeEngine(core, READY).stream([request("a"), request("b")])
        for step in range(10 * MAX_WAITING_STEPS):
            stream.put([RequestDelta(request_id="a", token_ids=[step]), RequestDelta(request_id="b")], 0)
        stream.put([RequestDelta(request_id="a", finish_reason="stop", num_cached_tokens=2)], 1)
        deltas = await anext(stream)
        assert len(deltas) <= 2 * MAX_WAITING_STEPS + 3
        mine = [delta for delta in deltas if delta.request_id == "a"]
        assert tokens_of(mine) == list(range(10 * MAX_WAITING_STEPS))
        assert mine[-1].finish_reason == "stop"

    asyncio.run(story())


def test_half_submitted_requests_do_not_stay():
    core, _ = make_engine()
    add, count = core.add, iter(range(2))

    def interrupted(one: Any) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt
        add(one)

    core.add = interrupted  # type: ignore[method-assign]
    engine = LocalEngine(core, READY)
    with pytest.raises(KeyboardInterrupt):
        engine.stream([request(str(index)) for index in range(5)])
    assert not core.has_work and core.stats().kv_usage == 0


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failure("grammar", "too large"), BadRequest),
        (Failure("not_finite", "nan"), GenerationFailed),
        (Failure("gone", "gone"), GenerationFailed),
        (None, GenerationFailed),
    ],
)
def test_only_what_the_request_is_to_blame_for_is_a_bad_request(failure: Failure | None, error: type[Exception]):
    assert type(error_of(failure)) is error
