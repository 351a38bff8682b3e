"""Requests that end in a vector go through the same scheduler: chunks, prefixes, preemption, aborts."""

from __future__ import annotations

import msgspec
import pytest

from fastqwen.ipc import wire
from fastqwen.records import RequestDelta
from tests.engine.fakes import expected, make_engine, request, run, tokens_of, vector_at


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_one_delta_with_the_vector_and_no_token(run_ahead: int):
    engine, executor = make_engine(run_ahead=run_ahead)
    engine.add(request("a", 10, 1, pooling="last"))
    assert run(engine)["a"] == [
        RequestDelta(request_id="a", finish_reason="stop", embedding=vector_at(list(range(10))))
    ]
    assert not any(row.num_logits for batch in executor.batches for row in batch.rows)


@pytest.mark.parametrize("run_ahead", [1, 2])
def test_only_the_last_chunk_of_a_long_text_pools(run_ahead: int):
    engine, executor = make_engine(budget=8, run_ahead=run_ahead)
    engine.add(request("stream", 4, 20))
    first = engine.step()
    engine.add(request("long", list(range(100, 150)), 1, pooling="last", arrival_s=1.0))
    found = run(engine)
    assert found["long"][0].embedding == vector_at(list(range(100, 150)))
    assert tokens_of(first + found["stream"]) == expected(request("stream", 4, 20))
    rows = [row for batch in executor.batches for row in batch.rows if row.request_id == "long"]
    assert len(rows) > 6 and [row.pools for row in rows] == [False] * (len(rows) - 1) + [True]


def test_a_cached_beginning_is_not_computed_again_but_the_last_token_is():
    engine, executor = make_engine()
    for name in ("first", "second"):
        engine.add(request(name, 12, 1, pooling="last"))
        [delta] = run(engine)[name]
        assert delta.embedding == vector_at(list(range(12)))
    assert delta.num_cached_tokens == 8
    assert [row.num_tokens for batch in executor.batches for row in batch.rows] == [12, 4]


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_too_few_blocks_change_nothing(run_ahead: int):
    engine, _ = make_engine(blocks=10, run_ahead=run_ahead, max_num_seqs=4, budget=6)
    texts = [[i] * (9 + 5 * i) for i in range(4)]
    for i, text in enumerate(texts):
        engine.add(request(f"text{i}", text, 1, pooling="last", arrival_s=float(2 * i + 1)))
        engine.add(request(f"answer{i}", [i] * 9, 20, seed=i, arrival_s=float(2 * i)))
    found = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for i, text in enumerate(texts):
        assert [delta.embedding for delta in found[f"text{i}"]] == [vector_at(text)]
        assert tokens_of(found[f"answer{i}"]) == expected(request("x", [i] * 9, 20, seed=i))


def each_of(tokens: list[int]) -> bytes:
    return b"".join(vector_at(tokens[: end + 1]) for end in range(len(tokens)))


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_each_tokens_vector_comes_once_whatever_was_computed_twice(run_ahead: int):
    """Chunks, a prefix in the cache, and preemptions that make a text begin again."""
    engine, _ = make_engine(blocks=10, run_ahead=run_ahead, max_num_seqs=4, budget=6)
    texts = [[i] * (9 + 5 * i) for i in range(4)]
    for i, text in enumerate(texts):
        engine.add(request(f"text{i}", text, 1, pooling="all", arrival_s=float(2 * i + 1)))
        engine.add(request(f"answer{i}", [i] * 9, 20, seed=i, arrival_s=float(2 * i)))
    found = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for i, text in enumerate(texts):
        [delta] = found[f"text{i}"]
        assert delta.embedding == each_of(text) and delta.num_cached_tokens == 0
        assert tokens_of(found[f"answer{i}"]) == expected(request("x", [i] * 9, 20, seed=i))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_leaves_nothing_behind(steps: int):
    engine, _ = make_engine(budget=8, run_ahead=2)
    engine.add(request("a", 40, 1, pooling="last"))
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    [delta] = run(engine)["a"]  # audits
    assert (delta.finish_reason, delta.embedding) == ("abort", None)


def test_a_vector_that_is_not_finite_is_an_error():
    engine, executor = make_engine()
    executor.fail.add("bad")
    for name in ("bad", "good"):
        engine.add(request(name, 10, 1, pooling="last"))
    found = run(engine)
    assert (found["bad"][0].finish_reason, found["bad"][0].embedding) == ("error", None)
    assert found["good"][0].embedding == vector_at(list(range(10)))
    assert engine.num_corrupted == 1


def test_over_the_wire():
    asked = wire.Add([request("a", 3, 1, pooling="last")])
    assert wire.to_engine.decode(wire.encode(asked)) == asked
    delta = RequestDelta(request_id="a", finish_reason="stop", embedding=bytes(range(256)))
    told = wire.Deltas([delta], make_engine()[0].stats())
    assert wire.from_engine.decode(wire.encode(told)) == told
    values = {**msgspec.to_builtins(asked.requests[0]), "pooling": "mean"}
    with pytest.raises(msgspec.ValidationError, match="pooling"):
        wire.to_engine.decode(msgspec.msgpack.encode({"type": "Add", "requests": [values]}))
