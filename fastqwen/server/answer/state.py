"""What the routes share: the engine, the model's text side, counters. Made once, passed to every route."""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastqwen.client.engine import ServedEngine
from fastqwen.client.prepare import ModelFacts
from fastqwen.config import EngineConfig
from fastqwen.errors import BadRequest, EngineGone, Overloaded, UnknownModelName
from fastqwen.server.answer.cache_story import CacheStories
from fastqwen.server.answer.history import EVERY_S, History
from fastqwen.server.answer.kept import KeptLogprobs
from fastqwen.server.answer.metrics import Metrics
from fastqwen.server.answer.request_limits import check_grammar_length
from fastqwen.server.answer.response_store import ResponseStore
from fastqwen.server.config import ServerConfig
from fastqwen.server.mcp import McpTools
from fastqwen.text.content import text_of
from fastqwen.text.formats import Formats
from fastqwen.text.load import TextTools
from fastqwen.text.worker import Check, Checked, Compile, Encode, Render, TextJob

log = logging.getLogger("fastqwen.server")

MAX_CHECKED_GRAMMARS = 1024
MAX_LOGGED_WARNINGS = 256
MAX_RECENT_ERRORS = 50
RESERVED_OPTIONS = frozenset(
    {"messages", "add_generation_prompt", "tokenizer", "chat_template", "continue_final_message"}
)


class TextWorkers(Protocol):
    async def run(self, job: TextJob) -> list[int]: ...

    async def check(self, job: Check, body: bytes | bytearray) -> Checked: ...


@dataclass
class ServerState:
    engine: ServedEngine
    engine_config: EngineConfig
    text: TextTools
    formats: Formats
    workers: TextWorkers
    config: ServerConfig
    metrics: Metrics
    seeds: random.Random
    cache_stories: CacheStories
    mcp: McpTools | None = None
    history: History = field(default_factory=History)
    kept: KeptLogprobs = field(default_factory=KeptLogprobs)
    responses: ResponseStore = field(default_factory=ResponseStore)
    started_s: float = field(default_factory=time.time)
    _born_s: float = field(default_factory=time.monotonic)  # the other may be set back or forward meanwhile
    draining: bool = False
    num_active: int = 0
    num_cache_resets: int = 0
    recent_errors: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_ERRORS))
    _logged_warnings: set[str] = field(default_factory=set)
    _checked_grammars: OrderedDict[str, None] = field(default_factory=OrderedDict)

    @property
    def names(self) -> list[str]:
        return self.engine_config.served_names

    def model_name(self, asked: str | None) -> str:
        """Any name is this model's while one is served, unless strict. Raises UnknownModelName."""
        if asked and asked not in self.names and self.config.strict_model_name:
            raise UnknownModelName(f"there is no model {asked[:200]!r} here; served: {', '.join(self.names)}")
        return asked if asked in self.names else self.names[0]

    def facts(self) -> ModelFacts:
        """Raises EngineGone while the engine is not ready."""
        ready = self.engine.ready
        if ready is None:
            raise EngineGone(self.why_not_ready())
        return ready.facts(self.text.stop_token_ids, takes_priorities=self.engine_config.takes_priorities)

    @property
    def block_size(self) -> int:
        return self.engine.ready.plan.block_size if self.engine.ready is not None else 1

    def salted(self, salt: str) -> str:
        """The request's own, and how often the prefix cache was reset: prompts of another salt share nothing."""
        return f"reset {self.num_cache_resets} {salt}" if self.num_cache_resets else salt

    @property
    def has_states(self) -> bool:
        """Whether layers keep a state of fixed size beside keys and values."""
        return self.engine.ready is not None and self.engine.ready.plan.states_bytes > 0

    def admit(self) -> None:
        """Raises Overloaded or EngineGone where a new request cannot be taken."""
        if self.draining:
            raise EngineGone("the server is shutting down and takes no new requests")
        if self.engine.state != "ready":
            raise EngineGone(self.why_not_ready())
        if self.num_active >= self.config.max_concurrent_requests:
            self.metrics.rejections += 1
            raise Overloaded(
                f"{self.num_active} requests are running or waiting, no more are accepted: try again in a moment"
            )

    def why_not_ready(self) -> str:
        done, total = self.engine.loading
        if self.engine.state == "loading":
            return f"the model is loading ({done} of {total or '?'} layers)"
        # Why it failed is in the log and ends the server: it may name files, which are nobody else's business.
        return {
            "restarting": "the engine is restarting",
            "asleep": "the model sleeps: POST /wake_up",
            "failed": "the engine failed; the server's log says why",
        }.get(self.engine.state, f"the engine is {self.engine.state}")

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._born_s

    def note_error(self, message: str) -> None:
        """For the operator's page: what went wrong lately on this side."""
        self.recent_errors.append({"time": int(time.time()), "message": message})

    def log_warnings(self, warnings: list[str]) -> None:
        """What answers warn of goes to the log as well, each once."""
        for warning in warnings:
            if warning not in self._logged_warnings and len(self._logged_warnings) < MAX_LOGGED_WARNINGS:
                self._logged_warnings.add(warning)
                log.warning("answered with a warning (logged once): %s", ascii(warning)[1:-1])

    async def remember(self) -> None:
        """Run it beside the server: it notes figures for the last hour's history."""
        while True:
            stats, metrics = self.engine.stats(), self.metrics
            self.history.note(
                time.monotonic(),
                generated=metrics.generation_tokens,
                read=metrics.prompt_tokens,
                running=stats.num_running,
                waiting=stats.num_waiting,
            )
            await asyncio.sleep(EVERY_S)

    async def tokenize(self, prompt: str, *, add_special_tokens: bool) -> list[int]:
        self.text.tokenizer.check(prompt)
        return await self.workers.run(Encode(prompt, add_special_tokens, self.text.tokenizer.max_chars))

    async def apply_template(
        self,
        messages: list[dict[str, Any]],
        options: dict[str, Any],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
    ) -> list[int]:
        """``template`` in place of the model's own. Raises BadRequest for what cannot be rendered, or not in time."""
        if self.text.template is None and template is None:
            raise BadRequest("this model has no chat template: start the server with --chat-template FILE", "messages")
        reserved = RESERVED_OPTIONS & options.keys()
        if reserved:
            raise BadRequest(f"chat_template_kwargs cannot set {min(reserved)}", "chat_template_kwargs")
        texts = [text_of(message["content"]) for message in messages]
        self.text.tokenizer.check_length(sum(map(len, texts)))
        for text in texts:
            self.text.tokenizer.check(text)
        options = {**options, "add_generation_prompt": add_generation_prompt}
        if continue_final_message:
            options["continue_final_message"] = True
        return await self.workers.run(Render.of(messages, options, self.text.tokenizer.max_chars, template))

    async def check_grammar(self, grammar: str) -> None:
        """Compile it once, outside. Raises BadRequest with the compiler's reason."""
        check_grammar_length(self.config, grammar)
        if grammar in self._checked_grammars:
            self._checked_grammars.move_to_end(grammar)
            return
        await self.workers.run(Compile(grammar))
        self._checked_grammars[grammar] = None
        while len(self._checked_grammars) > MAX_CHECKED_GRAMMARS:
            self._checked_grammars.popitem(last=False)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
