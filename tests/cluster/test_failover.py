"""Replicas die while they answer: nobody who reads a stream can tell."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest

from fastqwen.client.engine import AsyncStream, Deltas
from fastqwen.cluster.failover import MAX_LOSSES, FailoverEngine
from fastqwen.cluster.routing import Router
from fastqwen.errors import EngineGone, Overloaded
from fastqwen.records import EngineRequest, Failure, RequestDelta, Sampling, TokenLogprobs
from tests.client.fake_engine import FakeEngine
from tests.engine.fakes import READY, expected, make_engine, request, tokens_of, vector_at


class Cluster:
    """Fake replicas that compute while the story runs."""

    def __init__(self, *keys: str, max_requests: int = 1024) -> None:
        self.engine = FailoverEngine(Router(), max_requests=max_requests)
        self.replicas: dict[str, FakeEngine] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        for key in keys:
            self.add(key)

    def add(self, key: str) -> None:
        core, _ = make_engine(blocks=400, max_num_seqs=32, budget=64)
        self.replicas[key] = replica = FakeEngine(core, READY)
        self._running[key] = asyncio.create_task(replica.run())
        self.engine.add_replica(key, replica)

    def kill(self, key: str) -> None:
        """As kill -9 looks from here: not a word more, and what ran there is reported as lost."""
        self._running.pop(key).cancel()
        self.replicas[key].die()

    def where(self, request_id: str) -> str:
        [key] = [key for key, one in self.replicas.items() if request_id in [each.request_id for each in one.requests]]
        return key

    def close(self) -> None:
        for task in self._running.values():
            task.cancel()


async def read(stream: AsyncStream) -> dict[str, Deltas]:
    """All deltas by request; exactly one of each ends it, and it is the last."""
    found: dict[str, Deltas] = {}
    async for deltas in stream:
        for delta in deltas:
            found.setdefault(delta.request_id, []).append(delta)
    for each in found.values():
        assert [delta.finish_reason is not None for delta in each] == [False] * (len(each) - 1) + [True]
    return found


async def first(stream: AsyncStream, num_tokens: int) -> Deltas:
    """Deltas until so many tokens have come."""
    found: Deltas = []
    while sum(len(delta.token_ids) for delta in found) < num_tokens:
        found += await anext(stream)
    return found


def story(told: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(told, 30))


def many(count: int) -> list[EngineRequest]:
    lengths = random.Random(3)
    return [
        request(f"r{index}", prompt=lengths.randint(1, 60), max_tokens=lengths.randint(20, 60), seed=index)
        for index in range(count)
    ]


@pytest.mark.parametrize("at", [0, 1, 3, 10])
def test_32_streams_outlive_their_replica(at: int):
    """Killed after ``at`` tokens, replica after replica until one is left: every token once, in its place."""

    async def told() -> None:
        cluster = Cluster("a", "b", "c")
        requests = many(32)
        streams = [cluster.engine.stream([one]) for one in requests]
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        for key, tokens_each in (("a", at), ("b", at + 5)):
            while sum(len(one.said) for one in cluster.engine._running.values()) < tokens_each * len(requests):
                await asyncio.sleep(0)
                if not cluster.engine._running:
                    break
            cluster.kill(key)
        for one, reader in zip(requests, readers, strict=True):
            [deltas] = (await reader).values()
            assert tokens_of(deltas) == expected(one)
            assert deltas[-1].finish_reason == "length"
        assert cluster.engine.num_moved > 0
        cluster.close()

    story(told())


def test_a_replica_that_only_falls_out_of_the_list_is_left():
    async def told() -> None:
        cluster = Cluster("a", "b")
        stream = cluster.engine.stream([request("x", max_tokens=50)])
        begun = await first(stream, 5)
        key = cluster.where("x")
        cluster.engine.remove_replica(key)
        [rest] = (await read(stream)).values()
        assert tokens_of(begun + rest) == expected(request("x", max_tokens=50))
        assert cluster.replicas[key].aborted == ["x"]
        cluster.close()

    story(told())


def test_with_none_left_each_stream_ends_with_an_error():
    async def told() -> None:
        cluster = Cluster("a", "b")
        streams = [cluster.engine.stream([one]) for one in many(8)]
        for stream in streams:
            await first(stream, 1)
        cluster.kill("a")
        cluster.kill("b")
        for stream in streams:
            [deltas] = (await read(stream)).values()
            assert deltas[-1].finish_reason == "error"
            assert deltas[-1].error is not None and deltas[-1].error.kind == "gone"
        with pytest.raises(EngineGone):
            cluster.engine.stream([request("late")])
        assert cluster.engine.state == "restarting"
        cluster.close()

    story(told())


def test_a_request_that_kills_engines_does_not_kill_all_of_them():
    async def told() -> None:
        cluster = Cluster("a", "b", "c", "d", "e")
        stream = cluster.engine.stream([request("poison", max_tokens=200)])
        for _ in range(MAX_LOSSES):
            await first(stream, 1)
            cluster.kill(cluster.engine._running["poison"].ticket.replica)
        [deltas] = (await read(stream)).values()
        assert deltas[-1].error is not None and f"{MAX_LOSSES} replicas were lost" in deltas[-1].error.message
        assert cluster.engine.state == "ready"
        cluster.close()

    story(told())


def test_a_draining_replica_finishes_and_gets_nothing_new():
    async def told() -> None:
        cluster = Cluster("a", "b")
        stream = cluster.engine.stream([request("x", max_tokens=50)])
        await first(stream, 1)
        key = cluster.where("x")
        cluster.replicas[key].is_draining = True
        others = [cluster.engine.stream([request(f"y{index}")]) for index in range(6)]
        for other in others:
            await read(other)
        assert [one.request_id for one in cluster.replicas[key].requests] == ["x"]
        [rest] = (await read(stream)).values()
        assert rest[-1].finish_reason == "length" and cluster.engine.num_moved == 0
        cluster.close()

    story(told())


def test_what_a_drain_cuts_off_goes_on_elsewhere_however_often():
    """Rolling replacement: a long answer outlives more replicas than may die under it."""

    async def told() -> None:
        cluster = Cluster("r0")
        asked = request("x", max_tokens=200)
        stream = cluster.engine.stream([asked])
        said: Deltas = []
        for number in range(2 * MAX_LOSSES):
            said += await first(stream, 3)
            cluster.add(f"r{number + 1}")
            cluster.replicas[f"r{number}"].is_draining = True
            cluster.replicas[f"r{number}"].streams.end(Failure("closed", "the server is shutting down"))
            cluster.engine.remove_replica(f"r{number}")
        [rest] = (await read(stream)).values()
        assert tokens_of(said + rest) == expected(asked)
        cluster.close()

    story(told())


def test_an_abort_is_not_forgotten_when_the_replica_dies():
    async def told() -> None:
        cluster = Cluster("a", "b")
        stream = cluster.engine.stream([request("x", max_tokens=200)])
        await first(stream, 2)
        key = cluster.where("x")
        cluster._running[key].cancel()
        stream.abort(["x"])
        cluster.replicas[key].die()
        [deltas] = (await read(stream)).values()
        assert deltas[-1].finish_reason == "abort" and cluster.engine.num_moved == 0
        cluster.close()

    story(told())


def test_a_reader_who_leaves_frees_the_replica():
    async def told() -> None:
        cluster = Cluster("a")
        stream = cluster.engine.stream([request("x", max_tokens=200), request("y", max_tokens=200)])
        await first(stream, 2)
        stream.close()
        assert sorted(cluster.replicas["a"].aborted) == ["x", "y"]
        assert cluster.engine.router.outstanding("a") == 0.0
        cluster.close()

    story(told())


def test_a_vector_is_computed_again():
    async def told() -> None:
        cluster = Cluster("a", "b")
        asked = [request(f"v{index}", max_tokens=1, pooling="last") for index in range(4)]
        stream = cluster.engine.stream(asked)
        cluster.kill("a")
        for [delta] in (await read(stream)).values():
            assert delta.embedding == vector_at(asked[0].prompt_token_ids)
        cluster.close()

    story(told())


def test_a_request_s_own_fault_is_not_tried_elsewhere():
    async def told() -> None:
        cluster = Cluster("a", "b")
        stream = cluster.engine.stream([request("x", max_tokens=50)])
        await first(stream, 1)
        replica = cluster.replicas[cluster.where("x")]
        fault = Failure("not_finite", "not finite")
        replica.streams.deliver([RequestDelta(request_id="x", finish_reason="error", error=fault)])
        [deltas] = (await read(stream)).values()
        assert deltas[-1].error == fault and cluster.engine.num_moved == 0
        cluster.close()

    story(told())


def test_prompt_logprobs_come_once_and_the_cache_is_counted_once():
    """A replica is lost between two parts of a scored prompt; the next one scores it from the start."""

    async def told() -> None:
        cluster = Cluster("a")
        cluster._running["a"].cancel()
        asked = request("x", prompt=7, max_tokens=5, sampling=Sampling(prompt_logprobs=0))
        stream = cluster.engine.stream([asked])
        scores = [TokenLogprobs(token, -float(token), 1, [], []) for token in range(1, 7)]
        a = cluster.replicas["a"]
        a.streams.deliver([RequestDelta(request_id="x", prompt_logprobs=scores[:4])])
        cluster.add("b")
        cluster._running["b"].cancel()
        a.die()
        b = cluster.replicas["b"].streams
        b.deliver([RequestDelta(request_id="x~1", prompt_logprobs=scores[:3])])
        b.deliver([RequestDelta(request_id="x~1", prompt_logprobs=scores[3:], token_ids=[1], num_cached_tokens=2)])
        b.deliver([RequestDelta(request_id="x~1", token_ids=[2], finish_reason="stop", num_cached_tokens=2)])
        [deltas] = (await read(stream)).values()
        assert [one for delta in deltas for one in delta.prompt_logprobs or []] == scores
        assert tokens_of(deltas) == [1, 2]
        cluster.close()

    story(told())


def test_a_stop_token_still_ends_the_answer_behind_the_gap():
    async def told() -> None:
        asked = request("x", max_tokens=60)
        stop = expected(asked)[20]
        asked = msgspec.structs.replace(asked, stop_token_ids=[stop])
        cluster = Cluster("a", "b")
        stream = cluster.engine.stream([asked])
        begun = await first(stream, 12)
        cluster.kill(cluster.where("x"))
        [rest] = (await read(stream)).values()
        assert tokens_of(begun + rest) == expected(asked)
        assert rest[-1].finish_reason == "stop" and rest[-1].stop_reason == stop
        cluster.close()

    story(told())


def test_too_much_work_is_refused():
    async def told() -> None:
        cluster = Cluster("a", "b", max_requests=2)
        streams = [cluster.engine.stream([request(f"r{index}", max_tokens=50)]) for index in range(4)]
        with pytest.raises(Overloaded):
            cluster.engine.stream([request("late")])
        for stream in streams:
            await read(stream)
        await read(cluster.engine.stream([request("later")]))
        cluster.close()

    story(told())


def test_the_replicas_figures_add_up():
    async def told() -> None:
        cluster = Cluster("a", "b")
        streams = [cluster.engine.stream([request(f"r{index}", max_tokens=100)]) for index in range(6)]
        for stream in streams:
            await first(stream, 1)
        stats = cluster.engine.stats()
        assert stats.num_running == 6 and stats.num_blocks == 800 and 0 < stats.kv_usage < 1
        assert cluster.engine.state == "ready" and cluster.engine.ready == READY
        for stream in streams:
            stream.close()
        cluster.close()

    story(told())
