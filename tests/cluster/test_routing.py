"""Where requests go: short stories with replicas that are only names."""

from __future__ import annotations

from fastqwen.cluster.routing import FIRST_ANSWER_TOKENS, PAGE_TOKENS, PROMPT_COST, SCANNED, Router, Ticket, pages_of

CACHE = 100 * PAGE_TOKENS


def router(*keys: str, cache_tokens: int = CACHE) -> Router:
    made = Router()
    for key in keys:
        made.join(key, cache_tokens=cache_tokens)
    return made


def place(made: Router, prompt: list[int], max_tokens: int = 100, salt: str = "", closed: str = "") -> Ticket:
    found = made.choose(pages_of(prompt, salt), len(prompt), max_tokens, is_open=lambda key: key != closed)
    assert found is not None
    return found


def text(number: int, num_pages: int = 4) -> list[int]:
    """A prompt like no other."""
    return [number, *range(num_pages * PAGE_TOKENS)]


def test_requests_spread_over_idle_replicas():
    made = router("a", "b", "c")
    assert {place(made, text(number)).replica for number in range(3)} == {"a", "b", "c"}


def test_a_short_answer_leaves_more_room_than_a_long_one():
    made = router("a", "b")
    long = place(made, text(1), max_tokens=200)
    short = place(made, text(2), max_tokens=10)
    assert {place(made, text(number), max_tokens=10).replica for number in (3, 4)} == {short.replica}
    assert long.replica != short.replica


def test_a_conversation_returns_to_its_prefix():
    made = router("a", "b", "c", "d")
    first = place(made, text(1, 8))
    made.progress(first, 100)
    made.end(first, whole=True)
    for number in range(2, 6):
        made.end(place(made, text(number)), whole=False)
    again = place(made, text(1, 8) + [7] * 300)
    assert again.replica == first.replica
    assert again.num_hit_tokens == 8 * PAGE_TOKENS


def test_a_prefix_does_not_hold_a_request_where_it_would_wait_longer():
    made = router("a", "b")
    first = place(made, text(1, 8), max_tokens=1000)
    saved = PROMPT_COST * 8 * PAGE_TOKENS
    assert made.outstanding(first.replica) > saved
    assert place(made, text(1, 8)).replica != first.replica


def test_another_salt_meets_no_prefix():
    made = router("a")
    place(made, text(1), salt="one")
    assert place(made, text(1), salt="one").num_hit_tokens == 4 * PAGE_TOKENS
    assert place(made, text(1), salt="two").num_hit_tokens == 0


def test_the_last_prompt_token_is_never_counted_as_cached():
    made = router("a")
    prompt = list(range(4 * PAGE_TOKENS))
    place(made, prompt)
    assert place(made, prompt).num_hit_tokens == len(prompt) - 1


def test_what_a_replica_forgot_is_not_expected_of_it():
    made = router("a", cache_tokens=4 * PAGE_TOKENS)
    place(made, text(1))
    place(made, text(2))
    assert place(made, text(1)).num_hit_tokens == 0
    made.forget_cache("a")
    assert place(made, text(1)).num_hit_tokens == 0


def test_work_of_other_front_ends_counts():
    made = router("a", "b")
    made.note_others("a", 10_000.0)
    assert {place(made, text(number)).replica for number in range(5)} == {"b"}


def test_closed_replicas_get_nothing():
    made = router("a", "b")
    assert {place(made, text(number), closed="a").replica for number in range(4)} == {"b"}
    assert made.choose([], 1, 1, is_open=lambda key: False) is None
    assert Router().choose([], 1, 1) is None


def test_an_ended_request_leaves_nothing_outstanding():
    made = router("a")
    tickets = [place(made, text(number), max_tokens=1 + number) for number in range(20)]
    for ticket in tickets:
        made.progress(ticket, 1)
        made.end(ticket, whole=True)
    assert made.outstanding("a") == 0.0
    assert made.num_requests("a") == 0


def test_a_replica_that_left_takes_its_work_and_its_prefixes_along():
    made = router("a", "b")
    ticket = place(made, text(1), closed="b")
    made.leave("a")
    made.progress(ticket, 3)
    made.end(ticket, whole=False)
    assert place(made, text(1)).num_hit_tokens == 0
    made.join("a", cache_tokens=CACHE)
    assert made.outstanding("a") == 0.0


def test_answers_are_expected_as_long_as_the_last_ones():
    made = router("a")
    for number in range(500):
        ticket = place(made, text(number, 1), max_tokens=4000)
        made.progress(ticket, 1000)
        made.end(ticket, whole=True)
    assert 999 < made.answer_tokens < 1001 < FIRST_ANSWER_TOKENS * 4


def test_among_many_replicas_the_holder_of_a_prefix_is_still_found():
    made = router(*(f"r{number}" for number in range(SCANNED * 10)))
    first = place(made, text(1, 16))
    made.progress(first, 100)
    made.end(first, whole=True)
    for number in range(2, 100):
        place(made, text(number))
    found = [place(made, [*text(1, 16), number], max_tokens=1) for number in range(5)]
    assert {ticket.replica for ticket in found} == {first.replica}
    assert all(ticket.num_hit_tokens == 16 * PAGE_TOKENS for ticket in found)


def test_among_many_replicas_one_open_one_is_found():
    made = router(*(f"r{number}" for number in range(SCANNED * 10)))
    found = made.choose(pages_of(text(1)), 100, 1, is_open=lambda key: key == "r7")
    assert found is not None and found.replica == "r7"
