from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastqwen.records import SamplingParams
from tests.engine.fakes import expected, make_engine, request, run, tokens_of


def test_a_request_runs_to_its_length():
    engine, _ = make_engine()
    engine.add(request("a", 10, 5))
    deltas = run(engine)["a"]
    assert tokens_of(deltas) == expected(request("a", 10, 5))
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]


def test_a_stop_token_ends_it_but_not_before_min_tokens():
    plain = expected(request("a", 10, 20))
    engine, _ = make_engine()
    engine.add(request("a", 10, 20, stop=[plain[3]]))
    engine.add(request("b", 10, 20, stop=[plain[3]], sampling=SamplingParams(min_tokens=6, max_tokens=20)))
    found = run(engine)
    assert tokens_of(found["a"]) == plain[:4]
    assert found["a"][-1].stop_reason == plain[3]
    assert tokens_of(found["b"]) == plain


def test_a_long_prompt_is_cut_into_chunks_and_does_not_stall_a_running_stream():
    engine, executor = make_engine(budget=8)
    engine.add(request("stream", 4, 30, arrival_s=0.0))
    engine.step()
    engine.add(request("long", list(range(100, 150)), 3, arrival_s=1.0))
    run(engine)
    assert all(batch.num_tokens <= 8 for batch in executor.batches)
    chunks = [row for batch in executor.batches for row in batch.rows if row.request_id == "long"]
    assert len(chunks) > 6
    for batch in executor.batches[1:29]:
        assert "stream" in [row.request_id for row in batch.rows], "a step went by without the stream"


def test_prompts_beside_running_streams_come_in_smaller_pieces():
    engine, executor = make_engine(budget=32, mixed_budget=8)
    engine.add(request("alone", 30, 12, arrival_s=0.0))
    engine.step()
    engine.add(request("late", list(range(100, 140)), 3, arrival_s=1.0))
    run(engine)
    sizes = [batch.num_tokens for batch in executor.batches]
    assert sizes[0] == 30, "nobody was running beside it"
    assert max(sizes[1:]) <= 8


def test_a_step_with_streams_is_cut_to_whole_tiles():
    engine, executor = make_engine(budget=64, tile=4)
    engine.add(request("stream", 4, 9, arrival_s=0.0))
    engine.step()
    engine.add(request("late", list(range(100, 118)), 3, arrival_s=1.0))
    found = run(engine)
    sizes = [[row.num_tokens for row in batch.rows] for batch in executor.batches]
    assert sizes[:3] == [[4], [1, 15], [1, 3]], "16 tokens, and the last three beside the stream's next one"
    assert tokens_of(found["late"]) == expected(request("late", list(range(100, 118)), 3))


def test_more_streams_than_a_small_step_has_tokens_all_go_on_and_the_prompt_as_well():
    engine, executor = make_engine(budget=32, mixed_budget=4)
    for index in range(6):
        engine.add(request(f"stream {index}", 2, 30, arrival_s=float(index)))
    while engine.scheduler.num_running < 6 or executor.batches[-1].num_tokens > 6:
        engine.step()
    begun = len(executor.batches)
    engine.add(request("late", list(range(100, 108)), 3, arrival_s=9.0))
    for _ in range(4):
        engine.step()
    for batch in executor.batches[begun:]:
        assert [row.num_tokens for row in batch.rows if row.request_id != "late"] == [1] * 6
    assert [row.num_tokens for batch in executor.batches[begun:] for row in batch.rows if row.request_id == "late"] == [
        2,
        3,
        3,
        1,
    ]


def test_a_prompt_alone_is_not_cut_to_whole_tiles():
    engine, executor = make_engine(budget=64, tile=4)
    engine.add(request("alone", 18, 2))
    run(engine)
    assert [batch.num_tokens for batch in executor.batches] == [18, 1]


def test_prompts_first_streams_get_what_prompts_leave():
    engine, executor = make_engine(budget=16, prompts_first=True)
    engine.add(request("stream", 4, 9, arrival_s=0.0))
    engine.step()
    for name, first in (("a", 100), ("b", 200), ("c", 300)):
        engine.add(request(name, list(range(first, first + 12)), 3, arrival_s=1.0))
    found = run(engine)
    sizes = [[row.num_tokens for row in batch.rows] for batch in executor.batches]
    assert sizes[:4] == [[4], [4, 12], [8, 8], [1, 1, 1, 4]], "whole steps of prompts, then the streams beside the rest"
    assert tokens_of(found["stream"]) == expected(request("stream", 4, 9))[1:]


def test_rows_of_a_step_stand_by_their_kind():
    """One token each, then what goes on behind a cached part, then fresh prompts, equal lengths side by side."""
    engine, executor = make_engine(budget=64)
    engine.add(request("first", 13, 9, arrival_s=0.0))
    engine.step()
    for name, ids in (("long", range(300, 320)), ("six", range(200, 206)), ("again", 13), ("other", range(400, 406))):
        engine.add(request(name, ids if isinstance(ids, int) else list(ids), 2, arrival_s=1.0))
    run(engine)
    batch = next(batch for batch in executor.batches if len(batch.rows) == 5)
    assert [row.request_id for row in batch.rows][:2] == ["first", "again"], (
        "one token each, the longest first; 12 of the second were cached"
    )
    fresh = [row for row in batch.rows if row.start == 0]
    assert batch.rows[-len(fresh) :] == fresh
    assert [row.num_tokens for row in fresh] == [6, 6, 20]


def test_an_older_long_prompt_does_not_stall_a_younger_stream():
    engine, executor = make_engine(budget=8)
    engine.add(request("stream", 4, 30, priority=1))
    engine.step()
    engine.add(request("long", list(range(100, 150)), 3, priority=0))
    run(engine)
    for batch in executor.batches[1:29]:
        assert "stream" in [row.request_id for row in batch.rows]


def test_equal_beginnings_share_blocks_and_salts_keep_them_apart():
    engine, executor = make_engine()
    for name, salt in (("first", ""), ("second", ""), ("salted", "x")):
        engine.add(request(name, 13, 2, cache_salt=salt))
        deltas = run(engine)[name]
        assert tokens_of(deltas) == expected(request(name, 13, 2))
        assert deltas[-1].num_cached_tokens == (12 if name == "second" else 0)
    computed = [row.num_tokens for batch in executor.batches for row in batch.rows if row.request_id == "second"]
    assert computed == [1, 1]


def test_a_fully_cached_prompt_still_computes_its_last_token():
    engine, _ = make_engine()
    engine.add(request("a", 12, 2))
    run(engine)
    engine.add(request("b", 12, 2))
    assert run(engine)["b"][0].num_cached_tokens == 8


def test_prompt_logprobs_need_every_position_so_nothing_is_reused():
    engine, executor = make_engine()
    for name in ("a", "b"):
        engine.add(request(name, 12, 2, sampling=SamplingParams(prompt_logprobs=1)))
        run(engine)
    assert sum(row.num_tokens for batch in executor.batches for row in batch.rows if row.request_id == "b") == 13


@pytest.mark.parametrize("run_ahead", [1, 2, 3])
def test_too_few_blocks_preempt_the_last_and_change_nothing(run_ahead: int):
    engine, _ = make_engine(blocks=10, run_ahead=run_ahead, max_num_seqs=4)
    requests = [request(f"r{i}", [i] * 9, 20, seed=i, arrival_s=float(i)) for i in range(4)]
    for one in requests:
        engine.add(one)
    found = run(engine)
    assert engine.scheduler.num_preemptions > 0
    for one in requests:
        assert tokens_of(found[one.request_id]) == expected(one)


def test_a_lower_priority_number_runs_first():
    engine, executor = make_engine(max_num_seqs=1)
    engine.add(request("later", [1] * 5, 2, priority=5))
    engine.add(request("sooner", [2] * 5, 2, priority=-1))
    run(engine)
    assert executor.batches[0].rows[0].request_id == "sooner"


def test_abort_returns_every_block():
    engine, _ = make_engine(run_ahead=2)
    engine.add(request("a", 20, 50))
    engine.add(request("waiting", 20, 50))
    engine.step()
    engine.abort("a")
    engine.abort("waiting")
    engine.abort("nobody")
    deltas = engine.step()
    assert {(delta.request_id, delta.finish_reason) for delta in deltas} >= {("a", "abort"), ("waiting", "abort")}
    run(engine)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_a_row_that_is_not_finite_ends_alone_and_is_not_cached():
    engine, executor = make_engine()
    executor.fail = {"bad"}
    engine.add(request("good", 8, 4))
    engine.add(request("bad", [5] * 9, 4))
    found = run(engine)
    assert tokens_of(found["good"]) == expected(request("good", 8, 4))
    assert [delta.finish_reason for delta in found["bad"]] == ["error"]
    executor.fail = set()
    engine.add(request("again", [5] * 9, 4))
    assert run(engine)["again"][-1].num_cached_tokens == 0
    assert engine.stats().num_corrupted == 1


def test_a_row_that_stepped_aside_costs_the_others_nothing_until_it_can_go_on():
    """One row of a step tells that it is late; it is in none before the executor says that it is not any more."""
    engine, executor = make_engine()
    executor.late = {("late", 6)}
    executor.waits = lambda slot: len(executor.batches) < 12
    engine.add(request("late", 6, 4))
    engine.add(request("other", 6, 20))
    found = run(engine)
    steps = [index for index, batch in enumerate(executor.batches) for row in batch.rows if row.request_id == "late"]
    assert steps == [0, 12, 13, 14, 15]
    assert tokens_of(found["late"]) == expected(request("late", 6, 4))
    assert tokens_of(found["other"]) == expected(request("other", 6, 20))


def test_where_nobody_knows_a_row_that_stepped_aside_is_tried_again_after_a_pause():
    engine, executor = make_engine()
    executor.late = {("late", 6)}
    engine.add(request("late", 6, 4))
    assert tokens_of(run(engine)["late"]) == expected(request("late", 6, 4))


def test_the_longest_possible_sequence_fits_exactly():
    engine, _ = make_engine(blocks=5)
    one = request("a", 10, 11)  # the last token's key is never needed: 10 + 11 - 1 = 20 = 5 blocks of 4
    engine.add(one)
    assert tokens_of(run(engine)["a"]) == expected(one)


REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.integers(1, 24),
            "same": st.booleans(),
            "max_tokens": st.integers(1, 12),
            "priority": st.integers(-1, 1),
            "stop": st.booleans(),
            "salt": st.sampled_from(["", "a"]),
        }
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=REQUESTS,
    blocks=st.integers(10, 30),
    budget=st.integers(1, 40),
    seqs=st.integers(1, 6),
    run_ahead=st.integers(1, 3),
    late=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=6),
    abort=st.integers(0, 12),
    policy=st.sampled_from([{}, {"tile": 3}, {"prompts_first": True}]),
)
def test_any_mix_gives_each_request_what_it_gets_alone(requests, blocks, budget, seqs, run_ahead, late, abort, policy):
    engine, executor = make_engine(blocks=blocks, budget=budget, max_num_seqs=seqs, run_ahead=run_ahead, **policy)
    chance = random.Random(budget)
    executor.waits = lambda slot: chance.choice([None, False, True])
    made = []
    for index, one in enumerate(requests):
        prompt = [7] * one["prompt"] if one["same"] else [index] * one["prompt"]
        ready = request(
            f"r{index}",
            prompt,
            one["max_tokens"],
            seed=3 if one["same"] else index,
            priority=one["priority"],
            cache_salt=one["salt"],
        )
        if one["stop"]:
            ready = request(
                f"r{index}",
                prompt,
                one["max_tokens"],
                seed=ready.seed,
                stop=[expected(ready)[len(expected(ready)) // 2]],
            )
        made.append(ready)
        engine.add(ready)
        executor.late |= {(f"r{index}", len(prompt) + after) for who, after in late if who == index}
    found: dict[str, list] = {}
    for step in range(5000):
        if step == 3 and abort < len(made):
            engine.abort(f"r{abort}")
        for delta in engine.step():
            found.setdefault(delta.request_id, []).append(delta)
        if not engine.has_work:
            break
    engine.step()  # idle: audits
    for index, one in enumerate(made):
        ends = [delta.finish_reason for delta in found[one.request_id] if delta.finish_reason]
        assert len(ends) == 1
        if index != abort or ends != ["abort"]:
            assert tokens_of(found[one.request_id]) == expected(one)


def test_a_row_that_asks_for_three_logits_and_takes_two_back_goes_on_exactly():
    """What was computed for the two is computed again over the old blocks, and the prefix cache never hears of it."""
    engine, executor = make_engine()
    scheduler = engine.scheduler
    one = request("a", 10, 9)
    engine.add(one)
    engine.step()
    batch = scheduler.schedule()
    [row] = batch.rows
    sequence = scheduler._sequences["a"]
    sequence.num_computed += 2
    sequence.num_pending += 2
    guessed = msgspec.structs.replace(row, num_tokens=row.num_tokens + 2, num_logits=3)
    output = executor.submit(batch).result()
    deltas = scheduler.commit(msgspec.structs.replace(batch, rows=[guessed]), output)
    assert [delta.token_ids for delta in deltas] == [expected(one)[1:2]]
    assert (sequence.num_computed, sequence.num_pending, sequence.num_registered) == (11, 0, 2)
    assert expected(one)[:2] + tokens_of(run(engine)["a"]) == expected(one)
