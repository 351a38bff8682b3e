"""Why the prefix cache did not help more: a new prompt is compared with what earlier ones left in the cache."""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_STORIES = 256
MAX_TOKENS = 2 * 2**20

CAUSES = {
    "hit": "everything that can be reused was reused",
    "disabled": "the prefix cache is off (--no-enable-prefix-caching)",
    "first_request": "no earlier prompt began like this one",
    "other_salt": "an earlier prompt began like this one, but under another cache_salt",
    "evicted": "an earlier prompt began like this one, but its blocks were needed for other requests (or are not yet filled)",
    "state_not_kept": "an earlier prompt began like this one, but this model's layers can go on only from where a copy of their "
    "state was kept (at the end of a prompt, of an answer, or where prompts part), and has not made way; where this prompt "
    "leaves the earlier one, a copy is kept from now on",
    "tools_changed": "the tools differ from the earlier conversation's, and the template writes them near the beginning",
    "system_changed": "the system message differs from the earlier conversation's",
    "thinking_stripped": "the earlier answer's thinking is in the cache, but the template leaves it out of the history",
    "message_changed": "an earlier message of the conversation differs",
    "sub_block": "what is equal is shorter than one block of the cache",
    "new_text": "the earlier conversation was reused up to where this one goes on",
}


@dataclass
class CacheStory:
    """One finished or running prompt: its tokens, answer included once it has one, and what it was made of."""

    token_ids: array[int]
    num_prompt: int
    messages: list[bytes]
    roles: list[str]
    tools: bytes
    salt: str
    has_thinking: bool = False


class CacheStories:
    """The latest prompts, as many as fit into a fixed memory."""

    def __init__(self, *, enabled: bool) -> None:
        self._block_size = 1  # known once the engine is ready
        self._has_states = False
        self._enabled = enabled
        self._kept: deque[CacheStory] = deque()
        self._num_tokens = 0

    def begin(
        self,
        token_ids: list[int],
        salt: str,
        *,
        messages: Sequence[tuple[str, Any]] = (),  # role, content
        tools: Sequence[dict[str, Any]] = (),
    ) -> CacheStory:
        return CacheStory(
            token_ids=array("i", token_ids),
            num_prompt=len(token_ids),
            messages=[json.dumps(content).encode() for _, content in messages],
            roles=[role for role, _ in messages],
            tools=json.dumps(tools).encode(),
            salt=salt,
        )

    def end(
        self,
        story: CacheStory,
        answer_ids: list[int],
        *,
        thought: bool,
        num_cached: int,
        block_size: int,
        explain: bool,
        has_states: bool = False,
    ) -> dict[str, Any] | None:
        """The explanation for this prompt, if asked for: it compares the prompt with all that are kept. From now on later
        ones are compared with it, too. ``has_states``: the model's layers keep states of fixed size."""
        self._block_size, self._has_states = block_size, has_states
        explanation = self._explain(story, num_cached) if explain else None
        story.token_ids.extend(answer_ids)
        story.has_thinking = thought
        self._kept.append(story)
        self._num_tokens += len(story.token_ids)
        while len(self._kept) > 1 and (len(self._kept) > MAX_STORIES or self._num_tokens > MAX_TOKENS):
            self._num_tokens -= len(self._kept.popleft().token_ids)
        return explanation

    def _explain(self, story: CacheStory, num_cached: int) -> dict[str, Any]:
        same = self._closest(story, [one for one in self._kept if one.salt == story.salt])
        other = self._closest(story, [one for one in self._kept if one.salt != story.salt])
        cause, message_index = self._cause(story, num_cached, same, other)
        return {
            "prompt_tokens": story.num_prompt,
            "cached_tokens": num_cached,
            "block_tokens": self._block_size,
            "equal_tokens": same[0],
            "cause": cause,
            "message_index": message_index,
            "explanation": CAUSES[cause],
        }

    def _cause(
        self,
        story: CacheStory,
        num_cached: int,
        same: tuple[int, CacheStory | None],
        other: tuple[int, CacheStory | None],
    ) -> tuple[str, int | None]:
        if not self._enabled:
            return "disabled", None
        if num_cached >= self._usable(story.num_prompt - 1):
            return "hit", None
        equal, past = same
        if self._usable(other[0]) > max(num_cached, self._usable(equal)):
            return "other_salt", None
        if past is None or equal == 0:
            return "first_request", None
        if num_cached < self._usable(min(equal, story.num_prompt - 1)):
            return "state_not_kept" if self._has_states else "evicted", None
        return self._difference(story, equal, past)

    def _difference(self, story: CacheStory, equal: int, past: CacheStory) -> tuple[str, int | None]:
        goes_on = equal >= len(past.token_ids) - 1  # an answer's last token is never in the cache
        if not goes_on and story.tools != past.tools:
            return "tools_changed", None
        changed = next(
            (i for i, (new, old) in enumerate(zip(story.messages, past.messages, strict=False)) if new != old), None
        )
        if (
            not goes_on and changed is not None and changed < len(story.messages) - 1
        ):  # else the newest one, a question of its own
            is_system = story.roles[changed] in ("system", "developer")
            return ("system_changed" if is_system else "message_changed"), changed
        if not goes_on and past.has_thinking and len(story.messages) > len(past.messages):
            return "thinking_stripped", len(past.messages)
        return ("sub_block" if self._usable(equal) == 0 else "new_text"), None

    def _usable(self, num_tokens: int) -> int:
        return num_tokens // self._block_size * self._block_size

    @staticmethod
    def _closest(story: CacheStory, others: Sequence[CacheStory]) -> tuple[int, CacheStory | None]:
        """How many tokens are equal with the one that has most in common, and that one."""
        mine = np.frombuffer(story.token_ids, dtype=np.int32)[: story.num_prompt]
        best: tuple[int, CacheStory | None] = (0, None)
        for one in others:
            theirs = np.frombuffer(one.token_ids, dtype=np.int32)
            length = min(len(mine), len(theirs))
            different = np.flatnonzero(mine[:length] != theirs[:length])
            equal = int(different[0]) if len(different) else length
            if equal >= best[0]:
                best = (equal, one)
        return best
