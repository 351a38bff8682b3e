"""What the routes share: the engine, the model's text side, limits, counters. Made once, passed to every route."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastqwen.client.prepare import ModelLimits
from fastqwen.config import EngineConfig
from fastqwen.errors import BadRequest, EngineGone, FastqwenError, Overloaded
from fastqwen.ipc.engine_client import EngineClient
from fastqwen.server.metrics import Metrics
from fastqwen.text.load import TextTools


class UnknownModelName(FastqwenError):
    """The request names a model that is not served, and the server was told to mind."""


@dataclass(frozen=True)
class ServerConfig:
    """Wishes about the server, as opposed to the engine."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 32 * 2**20
    max_concurrent_requests: int = 1024
    ready_within_s: float = 30.0
    drain_timeout_s: float = 60.0
    strict_model_name: bool = False
    access_log: bool = True


@dataclass
class ServerState:
    engine: EngineClient
    engine_config: EngineConfig
    text: TextTools
    config: ServerConfig
    metrics: Metrics
    seeds: random.Random
    started_s: float = field(default_factory=time.time)
    draining: bool = False
    num_active: int = 0
    # Templates and tokenizers work outside the event loop.
    workers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="text"))

    @property
    def names(self) -> list[str]:
        return self.engine_config.served_names

    def model_name(self, asked: str | None) -> str:
        """Any name is this model's while one is served, unless strict. Raises UnknownModelName."""
        if asked and asked not in self.names and self.config.strict_model_name:
            raise UnknownModelName(f"there is no model {asked!r} here; served: {', '.join(self.names)}")
        return asked if asked in self.names else self.names[0]

    def limits(self) -> ModelLimits:
        """Raises EngineGone while the engine is not ready."""
        ready = self.engine.ready
        if ready is None:
            raise EngineGone(self.why_not_ready())
        return ModelLimits(
            max_model_len=ready.plan.max_model_len,
            vocab_size=ready.model.vocab_size,
            stop_token_ids=self.text.stop_token_ids,
        )

    def admit(self) -> None:
        """Raises Overloaded or EngineGone where a new request cannot be taken."""
        if self.draining:
            raise EngineGone("the server is shutting down and takes no new requests")
        if self.engine.state != "ready":
            raise EngineGone(self.why_not_ready())
        if self.num_active >= self.config.max_concurrent_requests:
            raise Overloaded(
                f"{self.num_active} requests are running or waiting, no more are accepted: try again in a moment"
            )

    def why_not_ready(self) -> str:
        done, total = self.engine.loading
        if self.engine.state == "loading":
            return f"the model is loading ({done} of {total or '?'} layers)"
        return {"restarting": "the engine is restarting", "failed": f"the engine failed: {self.engine.failure}"}.get(
            self.engine.state, f"the engine is {self.engine.state}"
        )

    async def tokenize(self, prompt: str, *, add_special_tokens: bool) -> list[int]:
        self.text.tokenizer.check(prompt)
        return await self._in_worker(lambda: self.text.tokenizer.encode(prompt, add_special_tokens=add_special_tokens))

    async def apply_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        options: dict[str, Any] | None = None,
    ) -> list[int]:
        template = self.text.template
        if template is None:
            raise BadRequest("this model has no chat template: start the server with --chat-template FILE", "messages")
        for message in messages:
            self.text.tokenizer.check(message["content"])
        return await self._in_worker(
            lambda: template.encode(
                self.text.tokenizer, messages, add_generation_prompt=add_generation_prompt, **(options or {})
            )
        )

    async def _in_worker(self, work: Any) -> list[int]:
        ids: list[int] = await asyncio.get_running_loop().run_in_executor(self.workers, work)
        return ids


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
