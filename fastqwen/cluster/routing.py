"""Which replica of a model gets a request: a pure policy, which knows neither sockets nor clocks nor Ray.

A request costs a replica what it must still compute for those that it has, and what it would have to compute for this one:

    cost = outstanding tokens + PROMPT_COST * (prompt tokens - tokens of the prompt that its prefix cache should hold)

The cheapest one is taken. That is affinity and its guard in one: a conversation returns to where its prefix lives as long as
what it would wait for there is less than what it saves there.

Outstanding tokens are counted in generated ones. A prompt's token costs PROMPT_COST of one, since prompts are computed many
tokens at once. How long an answer will be nobody knows: as long as the last ones on average, at most its max_tokens.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from fastqwen.engine.blocks import BlockHash, chain_next, chain_root

PAGE_TOKENS = 64  # a prefix is remembered in pages of so many tokens, whatever the engines' block size
PROMPT_COST = 0.125
FIRST_ANSWER_TOKENS = 256.0  # what an answer is taken for before any has ended
ANSWER_MEMORY = 0.98  # share of the running mean that one more answer leaves
SCANNED = 32  # up to so many replicas all are compared,
SAMPLED = 16  # of more only this many at random, and
HOLDERS = 8  # at most this many of those that hold the longest prefix


def pages_of(token_ids: Sequence[int], cache_salt: str = "") -> list[BlockHash]:
    """The hash chain of a prompt's full pages: equal chains are equal prefixes, under the same salt."""
    chain = [chain_root("", cache_salt)]
    for start in range(0, len(token_ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
        chain.append(chain_next(chain[-1], token_ids[start : start + PAGE_TOKENS]))
    return chain[1:]


@dataclass
class _Replica:
    key: str
    max_pages: int
    own_tokens: float = 0.0  # outstanding, of requests that this router placed
    others_tokens: float = 0.0  # of those that other front ends placed, as the replica said last
    num_requests: int = 0
    pages: OrderedDict[BlockHash, None] = field(default_factory=OrderedDict)  # the least recently used first


@dataclass
class Ticket:
    """A request's place at a replica. ``end`` it once, however the request ends there."""

    replica: str
    pages: list[BlockHash]
    num_hit_tokens: int  # of the prompt, expected in the replica's prefix cache
    prompt_cost: float
    answer_tokens: float  # expected, and not there yet
    num_said: int = 0


class Router:
    """The replicas of one model. ``choose`` places a request, the ticket it gives follows it to its end."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 not a secret
        self._replicas: dict[str, _Replica] = {}
        self._keys: list[str] = []  # for sampling
        self._holders: dict[BlockHash, dict[str, None]] = {}  # of each page, the latest last
        self.answer_tokens = FIRST_ANSWER_TOKENS
        self.num_prompt_tokens = 0  # placed so far, and of them
        self.num_hit_tokens = 0  # those expected in a cache

    def join(self, key: str, *, cache_tokens: int) -> None:
        """``cache_tokens``: how many the replica's KV cache holds, which bounds what of it is remembered here."""
        assert key not in self._replicas, f"replica {key} is known already"
        self._replicas[key] = _Replica(key, max(1, cache_tokens // PAGE_TOKENS))
        self._keys.append(key)

    def leave(self, key: str) -> None:
        replica = self._replicas.pop(key)
        self._keys.remove(key)
        for page in replica.pages:
            self._drop_holder(page, key)

    def note_others(self, key: str, tokens: float) -> None:
        """What the replica says of work that did not come from here."""
        if key in self._replicas:
            self._replicas[key].others_tokens = tokens

    def forget_cache(self, key: str) -> None:
        """Its engine has started again, with nothing in its cache."""
        replica = self._replicas[key]
        for page in replica.pages:
            self._drop_holder(page, key)
        replica.pages.clear()

    def outstanding(self, key: str) -> float:
        replica = self._replicas[key]
        return replica.own_tokens + replica.others_tokens

    def num_requests(self, key: str) -> int:
        return self._replicas[key].num_requests

    def choose(
        self,
        pages: list[BlockHash],
        num_prompt_tokens: int,
        max_answer_tokens: int,
        *,
        is_open: Callable[[str], bool] = lambda key: True,
    ) -> Ticket | None:
        """The cheapest replica of those that are open, or None where there is none."""
        best: _Replica | None = None
        best_cost: tuple[float, int, float] = (0.0, 0, 0.0)
        best_hit = 0
        for key in self._candidates(pages, is_open):
            replica = self._replicas[key]
            hit = min(self._num_pages_hit(replica, pages) * PAGE_TOKENS, num_prompt_tokens - 1)
            work = replica.own_tokens + replica.others_tokens + PROMPT_COST * (num_prompt_tokens - hit)
            cost = (work, replica.num_requests, self._random.random())
            if best is None or cost < best_cost:
                best, best_cost, best_hit = replica, cost, hit
        if best is None:
            return None
        self.num_prompt_tokens += num_prompt_tokens
        self.num_hit_tokens += best_hit
        ticket = Ticket(
            replica=best.key,
            pages=pages,
            num_hit_tokens=best_hit,
            prompt_cost=PROMPT_COST * (num_prompt_tokens - best_hit),
            answer_tokens=min(max_answer_tokens, self.answer_tokens),
        )
        best.own_tokens += ticket.prompt_cost + ticket.answer_tokens
        best.num_requests += 1
        self._remember(best, pages)
        return ticket

    def progress(self, ticket: Ticket, num_tokens: int) -> None:
        """The first tokens say that the prompt is computed; each one is one less to wait for."""
        ticket.num_said += num_tokens
        replica = self._replicas.get(ticket.replica)
        done = min(num_tokens, ticket.answer_tokens)
        ticket.answer_tokens -= done
        if replica is not None:
            replica.own_tokens -= done + ticket.prompt_cost
        ticket.prompt_cost = 0.0

    def end(self, ticket: Ticket, *, whole: bool) -> None:
        """``whole``: the answer ended by itself, so that its length says something of the next ones."""
        replica = self._replicas.get(ticket.replica)
        if replica is not None:
            replica.num_requests -= 1
            replica.own_tokens -= ticket.prompt_cost + ticket.answer_tokens
            if not replica.num_requests:
                replica.own_tokens = 0.0  # sums of fractions leave crumbs
        if whole:
            self.answer_tokens += (1 - ANSWER_MEMORY) * (ticket.num_said - self.answer_tokens)

    def _candidates(self, pages: list[BlockHash], is_open: Callable[[str], bool]) -> list[str]:
        if len(self._keys) <= SCANNED:
            return [key for key in self._keys if is_open(key)]
        found: dict[str, None] = {}
        for page in reversed(pages):
            holders = (key for key in reversed(self._holders.get(page, {})) if key not in found and is_open(key))
            found.update(dict.fromkeys(islice(holders, HOLDERS)))  # thousands may hold a system prompt
            if len(found) >= HOLDERS:
                break
        sampled = [key for key in self._random.sample(self._keys, SAMPLED) if is_open(key)]
        chosen = [*list(found)[:HOLDERS], *(key for key in sampled if key not in found)]
        return chosen or [key for key in self._keys if is_open(key)]

    @staticmethod
    def _num_pages_hit(replica: _Replica, pages: list[BlockHash]) -> int:
        low, high = 0, len(pages)  # a page is remembered with all in front of it: a search by halves finds the last
        while low < high:
            middle = (low + high + 1) // 2
            if pages[middle - 1] in replica.pages:
                low = middle
            else:
                high = middle - 1
        return low

    def _remember(self, replica: _Replica, pages: list[BlockHash]) -> None:
        for page in reversed(pages):  # the front of a prompt is used last, and so forgotten last
            replica.pages[page] = None
            replica.pages.move_to_end(page)
            self._holders.setdefault(page, {})[replica.key] = None
        while len(replica.pages) > replica.max_pages:
            self._drop_holder(replica.pages.popitem(last=False)[0], replica.key)

    def _drop_holder(self, page: BlockHash, key: str) -> None:
        holders = self._holders[page]
        holders.pop(key, None)
        if not holders:
            del self._holders[page]
