"""One sequence on its way: what is known of it, and how far its cache reaches."""

from __future__ import annotations

from collections.abc import Callable

from fastqwen.engine.blocks import BlockHash, chain_next, chain_root
from fastqwen.records import EngineRequest

NO_SLOT = -1
FIRST_ASIDE_S, LONGEST_ASIDE_S = 0.002, 2.0
ASIDE_GROWS = 4  # each time is a row of a step, which costs the others as much as a token would


class Sequence:
    """
    token_ids   [ prompt ............ | generated so far ... ]  then num_pending tokens that were sampled in steps
    num_computed  ---------------------------->                 still in flight: the device has them, the host not yet
    """

    def __init__(self, request: EngineRequest, rope_key: str) -> None:
        self.request = request
        self.request_id = request.request_id
        self.num_prompt = len(request.prompt_token_ids)
        # Who goes first: priority, then arrival. Preemption takes from the end of the same order.
        self.order = (request.priority, request.arrival_s, request.request_id)
        self.rope_key = rope_key  # fixed by the prompt's whole length, and kept while decoding and after preemption
        self.token_ids = [*request.prompt_token_ids, *request.said_token_ids]
        self.num_computed = 0  # tokens whose keys and values are in the cache once all scheduled steps are done
        self.num_pending = 0
        self.num_cached = 0  # of the prompt, found in the prefix cache at the first admission
        self.num_preemptions = 0
        self.was_admitted = False
        self.waited_s = 0.0  # from arrival to the first admission
        self.admitted_in_step = 0  # rows of earlier steps belong to blocks that a preemption took away
        self.slot = NO_SLOT
        self.blocks: list[int] = []
        self.is_aside = False
        self.num_late = 0  # times that it stepped aside, two less with each token
        self.aside_until_s = 0.0
        self.num_registered = 0  # leading blocks that the prefix cache knows
        self.repeats = False  # the next token to compute was computed before
        self.keep_at: list[int] = []  # numbers of tokens, growing, behind which a copy of its states is to be kept
        self.newest_copy: BlockHash | None = None  # of those made while it generates, under which it was filed
        self.vectors: list[bytes] = []  # of the tokens that were computed, where each token's is asked for
        self._hashes: list[BlockHash] = []
        self._root = chain_root(rope_key, request.cache_salt)

    @property
    def num_known(self) -> int:
        """Tokens that a step may compute: read ones and pending ones."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_left(self) -> int:
        """Known tokens that are not yet computed."""
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def wants_more(self) -> bool:
        """Whether another step can serve it: its last scheduled token is not yet the last allowed one."""
        num_known = len(self.token_ids) + self.num_pending
        return num_known - self.num_prompt < self.request.max_tokens and self.num_computed < num_known

    def hashes(self, block_size: int) -> list[BlockHash]:
        """The hash chain of all blocks that are full of tokens the host knows."""
        while (len(self._hashes) + 1) * block_size <= len(self.token_ids):
            start = len(self._hashes) * block_size
            parent = self._hashes[-1] if self._hashes else self._root
            self._hashes.append(chain_next(parent, self.token_ids[start : start + block_size]))
        return self._hashes

    def before_copy(self, num_tokens: int) -> int:
        """Of so many tokens those up to the next place at which its states are copied."""
        while self.keep_at and self.keep_at[0] <= self.num_computed:
            del self.keep_at[0]
        return min(num_tokens, self.keep_at[0] - self.num_computed) if self.keep_at else num_tokens

    def roll_back(self, num_tokens: int) -> None:
        """The last computed tokens do not hold: what comes in their place is computed over them. Not while a later step
        of this sequence is in flight, which would stand behind them."""
        self.num_computed -= num_tokens

    def step_aside(self, now_s: float) -> None:
        """Its last scheduled token cannot be chosen yet: it is computed again once it can be, or after a pause that grows."""
        self.num_pending -= 1
        self.num_computed -= 1
        self.repeats = self.is_aside = True
        self.aside_until_s = now_s + min(LONGEST_ASIDE_S, FIRST_ASIDE_S * ASIDE_GROWS**self.num_late)
        self.num_late = min(self.num_late + 1, 5)

    def stays_aside(self, now_s: float, is_late: Callable[[int], bool | None]) -> bool:
        late = is_late(self.slot)
        return self.aside_until_s > now_s if late is None else late

    def forget_cache(self) -> None:
        """After preemption: all that is known must be computed again."""
        self.num_preemptions += 1
        self.num_computed = 0
        self.num_registered = 0
        self.repeats = self.is_aside = False
        self.blocks = []
        self.slot = NO_SLOT
