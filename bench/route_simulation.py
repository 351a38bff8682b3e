"""The routing policy of a cluster on paper: hit rate and waiting times against round robin, with as many workers as you like.

    python -m bench.route_simulation --workers 1000 --requests 100000
    python -m bench.route_simulation --workers 20 --trace conversation_trace.jsonl

It drives fastqwen.cluster.routing.Router, the very code that front ends use, with a clock of its own. What is made up here:

trace    conversations begin at random; each has one of a few system prompts, some turns of growing length, and a pause between
         two turns. Lengths are log-normal, pauses exponential, all from one seed. None of it was recorded anywhere: for requests
         that were, give --trace FILE in the format that Mooncake's traces have, one JSON object a line with timestamp (in ms),
         input_length, output_length (in tokens) and hash_ids, one for each --trace-block tokens of the prompt, equal where all
         up to there is equal. --speed 20 plays it twenty times as fast, for more workers than the recorded ones.
worker   --slots answers at once, the rest waits in order. A prompt's tokens that its prefix cache does not hold cost
         --prompt-ms each (not shared between slots), an answer's tokens --token-ms each. The cache holds --cache-tokens, the
         least recently used pages go first. It is the worker's own: the router only guesses what is in it.

Prints one JSON object a policy: what share of prompt tokens was found in a cache, and the time to the first token.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fastqwen.cluster.routing import PAGE_TOKENS, Router, Ticket

SYSTEM_PROMPTS = 20


@dataclass(order=True)
class Turn:
    """``page(index)``: what names the prompt's page of that number, and all in front of it."""

    arrival_s: float
    number: int
    prompt_tokens: int = field(compare=False)
    answer_tokens: int = field(compare=False)
    page: Callable[[int], bytes] = field(compare=False, repr=False)

    def pages(self) -> list[bytes]:
        return [self.page(index) for index in range(self.prompt_tokens // PAGE_TOKENS)]


def pages_of_conversation(conversation: int, system: int, system_tokens: int) -> Callable[[int], bytes]:
    shared = system_tokens // PAGE_TOKENS
    return lambda index: b"s%d:%d" % (system, index) if index < shared else b"c%d:%d" % (conversation, index)


def pages_of_record(hash_ids: list[int], block_tokens: int) -> Callable[[int], bytes]:
    """A page counts as equal where the block is in which it ends."""

    def page(index: int) -> bytes:
        block = min(((index + 1) * PAGE_TOKENS - 1) // block_tokens, len(hash_ids) - 1)
        return b"h%d:%d" % (hash_ids[block], index)

    return page


def recorded(options: argparse.Namespace) -> list[Turn]:
    """Turns of a trace file. Ends with one line that says which of its lines is none."""
    turns: list[Turn] = []
    with open(options.trace, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if len(turns) == options.requests:
                break
            try:
                one = json.loads(line)
                arrival_s = one["timestamp"] / 1000 / options.speed
                prompt, answer, ids = (
                    int(one["input_length"]),
                    int(one["output_length"]),
                    list(map(int, one["hash_ids"])),
                )
            except (ValueError, KeyError, TypeError) as error:
                sys.exit(f"{options.trace}, line {number + 1} is no request of a trace: {error!r}")
            page = pages_of_record(ids or [-1 - number], options.trace_block)
            turns.append(Turn(arrival_s, number, max(1, prompt), max(1, answer), page))
    return sorted(turns)


def conversations(options: argparse.Namespace) -> list[Turn]:
    """Turns by their arrival, as if answers took no time: that keeps the trace the same for all policies."""
    chance = random.Random(options.seed)
    systems = [int(chance.lognormvariate(6.2, 0.8)) for _ in range(SYSTEM_PROMPTS)]
    turns: list[Turn] = []
    number = 0
    mean_work_s = 300 * options.token_ms / 1000
    per_s = (
        options.load * options.workers * options.slots / mean_work_s / 4.0
    )  # conversations: four turns each on average
    start_s = 0.0
    while len(turns) < options.requests:
        start_s += chance.expovariate(per_s)
        system = chance.randrange(SYSTEM_PROMPTS)
        length, at_s = systems[system], start_s
        for _ in range(1 + int(chance.expovariate(1 / 3.5))):
            length += max(8, int(chance.lognormvariate(4.5, 1.0)))
            answer = max(1, int(chance.lognormvariate(5.3, 0.9)))
            page = pages_of_conversation(number, system, systems[system])
            turns.append(Turn(at_s, number, length, answer, page))
            length += answer
            at_s += answer * options.token_ms / 1000 + chance.expovariate(1 / options.pause_s)
        number += 1
    return sorted(turns)[: options.requests]


class Worker:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.free_slots = options.slots
        self.waiting: deque[tuple[Turn, list[bytes], Callable[[], None]]] = deque()
        self.cache: OrderedDict[bytes, None] = OrderedDict()
        self.busy_until_s = 0.0  # with prompts

    def begin(self, turn: Turn, pages: list[bytes], now_s: float) -> tuple[int, float, float]:
        """Tokens found in the cache, when the first token comes, and the last."""
        hit = 0
        for page in pages:
            if page not in self.cache:
                break
            hit += PAGE_TOKENS
        for page in reversed(pages):
            self.cache[page] = None
            self.cache.move_to_end(page)
        while len(self.cache) * PAGE_TOKENS > self.options.cache_tokens:
            self.cache.popitem(last=False)
        prompt_s = (turn.prompt_tokens - hit) * self.options.prompt_ms / 1000
        self.busy_until_s = max(self.busy_until_s, now_s) + prompt_s
        return hit, self.busy_until_s, self.busy_until_s + turn.answer_tokens * self.options.token_ms / 1000


Policy = Callable[[Turn, list[bytes]], tuple[int, Ticket | None]]


def simulate(
    policy: Policy, on_end: Callable[[Turn, Ticket | None], None], options: argparse.Namespace
) -> dict[str, float]:
    """All turns through one policy."""
    workers = [Worker(options) for _ in range(options.workers)]
    ends: list[tuple[float, int, int, Turn, Ticket | None]] = []  # of answers
    firsts: list[float] = []
    found = asked = number = 0

    def start(place: int, turn: Turn, pages: list[bytes], ticket: Ticket | None, now_s: float) -> None:
        nonlocal found, asked, number
        worker = workers[place]
        worker.free_slots -= 1
        hit, first_s, last_s = worker.begin(turn, pages, now_s)
        found, asked, number = found + hit, asked + turn.prompt_tokens, number + 1
        firsts.append(first_s - turn.arrival_s)
        heapq.heappush(ends, (last_s, number, place, turn, ticket))

    def finish() -> None:
        now_s, _, place, turn, ticket = heapq.heappop(ends)
        on_end(turn, ticket)
        worker = workers[place]
        worker.free_slots += 1
        if worker.waiting:
            start(place, *worker.waiting.popleft(), now_s)  # type: ignore[arg-type]

    for turn in recorded(options) if options.trace else conversations(options):
        while ends and ends[0][0] <= turn.arrival_s:
            finish()
        pages = turn.pages()
        place, ticket = policy(turn, pages)
        if workers[place].free_slots:
            start(place, turn, pages, ticket, turn.arrival_s)
        else:
            workers[place].waiting.append((turn, pages, ticket))  # type: ignore[arg-type]
    while ends:
        finish()
    firsts.sort()
    return {
        "hit_rate": round(found / asked, 3),
        "ttft_p50_s": round(firsts[len(firsts) // 2], 3),
        "ttft_p99_s": round(firsts[len(firsts) * 99 // 100], 3),
    }


def policies(options: argparse.Namespace) -> Iterator[tuple[str, Policy, Callable[[Turn, Ticket | None], None]]]:
    turn_of = iter(range(10**12))
    yield "round robin", lambda turn, pages: (next(turn_of) % options.workers, None), lambda turn, ticket: None
    for name, keeps_pages in (("least outstanding", False), ("fastqwen", True)):
        router = Router()
        for place in range(options.workers):
            router.join(str(place), cache_tokens=options.cache_tokens)

        def choose(
            turn: Turn, pages: list[bytes], router: Router = router, keeps: bool = keeps_pages
        ) -> tuple[int, Ticket]:
            ticket = router.choose(pages if keeps else [], turn.prompt_tokens, 4096)
            assert ticket is not None
            return int(ticket.replica), ticket

        def end(turn: Turn, ticket: Ticket | None, router: Router = router) -> None:
            assert ticket is not None
            router.progress(ticket, turn.answer_tokens)
            router.end(ticket, whole=True)

        yield name, choose, end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--load", type=float, default=0.7, help="share of all slots that answers alone would fill")
    parser.add_argument("--prompt-ms", type=float, default=0.5)
    parser.add_argument("--token-ms", type=float, default=20.0)
    parser.add_argument("--cache-tokens", type=int, default=100_000)
    parser.add_argument("--pause-s", type=float, default=15.0, help="mean time between an answer and the next question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", metavar="FILE", help="recorded requests in the place of made-up ones")
    parser.add_argument("--trace-block", type=int, default=512, help="prompt tokens to each of its hash_ids")
    parser.add_argument("--speed", type=float, default=1.0, help="play the trace so many times as fast")
    options = parser.parse_args()
    for name, policy, on_end in policies(options):
        start_s = time.monotonic()
        result = simulate(policy, on_end, options)
        print(json.dumps({"policy": name, **vars(options), **result, "took_s": round(time.monotonic() - start_s, 1)}))


if __name__ == "__main__":
    main()
