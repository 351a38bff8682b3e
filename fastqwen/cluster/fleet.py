"""The workers as a front end sees them: who is there, linked, and which model each of them computes."""

from __future__ import annotations

import asyncio
import logging
import random
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from fastqwen.cluster.beacon import Watcher
from fastqwen.cluster.config import WORKER_PORT
from fastqwen.cluster.failover import FailoverEngine
from fastqwen.cluster.link import LinkedEngine
from fastqwen.cluster.parcel import unpack
from fastqwen.cluster.relayed import LinkedServer, RelayedModel
from fastqwen.cluster.routing import Router
from fastqwen.cluster.sockets import endpoint, split_address
from fastqwen.cluster.wire import Card, Files, Member, Members
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.server.answer.cache_story import CacheStories
from fastqwen.server.answer.metrics import Metrics
from fastqwen.server.answer.state import ServerState
from fastqwen.server.app import create_routes
from fastqwen.server.config import ServerConfig
from fastqwen.server.dialects.checking import CHECKS
from fastqwen.text.formats import derive_formats
from fastqwen.text.load import load_text
from fastqwen.text.pool import TextPool

log = logging.getLogger("fastqwen.cluster")

OTHER = "it has another checkpoint or other settings than the model that goes by its name"


@dataclass
class ServedModel:
    """One model over its replicas: what ``serve`` has, with all of them in the engine's place."""

    identity: str
    engine: FailoverEngine
    state: ServerState
    app: FastAPI
    pool: TextPool
    folder: tempfile.TemporaryDirectory[str]
    remembering: asyncio.Task[None]

    @property
    def is_there(self) -> bool:
        return any(not replica.is_draining for replica in self.engine.replicas.values())

    @property
    def is_ready(self) -> bool:
        return self.engine.state == "ready"

    @property
    def max_model_len(self) -> int | None:
        return self.state.facts().max_model_len

    def admit(self) -> None:
        """Raises Overloaded or EngineGone where a new request cannot be taken."""
        self.state.admit()
        self.engine.admit()  # before an answer has begun, so that it can still be a status

    async def close(self) -> None:
        self.remembering.cancel()
        await self.pool.close()
        self.folder.cleanup()


class Fleet:
    """Runs in one event loop, from ``start`` to ``close``."""

    def __init__(self, token: str, controller: str, config: ServerConfig) -> None:
        self._token, self._controller, self._config = token, controller, config
        self.members: dict[str, Member] = {}
        self.models: dict[str, ServedModel] = {}  # by each of their names
        self.relayed: dict[str, RelayedModel] = {}  # those of other servers
        self.refused: dict[str, str] = {}  # members that are not used, and why
        self._links: dict[str, LinkedEngine | LinkedServer] = {}
        self._joining = asyncio.Lock()  # one model is made at a time
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = (
            set()
        )  # of lost links, each to its end: an open socket's context waits for ever
        self._restarts: dict[str, int] = {}

    def start(self) -> None:
        self._watcher = Watcher(self._token, self._controller, self._on_members)

    async def close(self) -> None:
        await self._watcher.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._closing, return_exceptions=True)
        links, self._links = self._links, {}
        for link in links.values():
            await link.close()
        for model in {id(one): one for one in self.models.values()}.values():
            await model.close()

    @property
    def is_alone(self) -> bool:
        """The controller does not answer."""
        return self._watcher.is_away

    @property
    def num_replicas(self) -> int:
        return len(self._links)

    @property
    def there(self) -> dict[str, ServedModel | RelayedModel]:
        """Models that have a replica, by their names."""
        every: dict[str, ServedModel | RelayedModel] = {**self.relayed, **self.models}
        return {name: model for name, model in sorted(every.items()) if model.is_there}

    @property
    def known_names(self) -> set[str]:
        """Of models that have or had a replica, and of those that are still loading."""
        return {*self.models, *self.relayed, *(name for member in self.members.values() for name in member.names)}

    # ---- workers come and go ----

    def _on_members(self, told: Members) -> None:
        """Those that are not listed are kept as long as they speak: the controller may have been started again just now."""
        listed = {member.key: member for member in told.members}
        self.members = listed
        for key, member in listed.items():
            is_hopeless = (
                self.refused.get(key, OTHER) != OTHER
            )  # a process stays what it is, as long as it has this key
            is_up = member.state in ("ready", "restarting") and not member.is_draining
            if key not in self._links and is_up and not is_hopeless:
                self._link(member)

    def _link(self, member: Member) -> None:
        try:
            address = endpoint(*split_address(member.address, WORKER_PORT, "--worker-address"))
        except BadConfig as error:  # one worker's mistake must not keep the others out
            self._refuse(member, str(error))
            return
        if member.kind == "engine":
            self._links[member.key] = LinkedEngine(self._token, address, self._on_news(member))
        elif any(name in self.models for name in member.names):
            self._refuse(member, OTHER)
        elif member.kind == "upstream":
            self._links[member.key] = LinkedServer(self._token, address, self._on_word(member))

    def _on_word(self, member: Member) -> Callable[[LinkedServer], None]:
        """Of a worker that passes requests on to another server."""

        def on_word(link: LinkedServer) -> None:
            if link.is_lost:
                self._drop(member.key)
                return
            for name in member.names:
                model = self.relayed.get(name)
                if model is None:
                    model = self.relayed[name] = RelayedModel(
                        max_requests=self._config.max_concurrent_requests, stall_timeout_s=self._config.stall_timeout_s
                    )
                if member.key not in model.replicas:
                    log.info("worker %s passes on to %s: %s", member.address, member.device, name)
                    model.add_replica(member.key, link)

        return on_word

    def _on_news(self, member: Member) -> Callable[[LinkedEngine], None]:
        key = member.key

        def on_news(link: LinkedEngine) -> None:
            if link.is_lost:
                if link.failure:
                    self._refuse(member, link.failure)
                self._drop(key)
                return
            model = self._model_of(key)
            if model is not None:
                model.engine.router.note_others(key, link.others_tokens)
                if self._restarts.get(key) != link.num_restarts:
                    model.engine.router.forget_cache(key)
                self._restarts[key] = link.num_restarts
            elif link.card is not None and link.state == "ready" and self._may_join(key, link.card):
                self._spawn(self._join(member, link, link.card))

        return on_news

    def _drop(self, key: str) -> None:
        link = self._links.pop(key, None)
        if link is None:
            return
        self._restarts.pop(key, None)
        model = self._model_of(key)
        if model is not None:
            model.engine.remove_replica(key)
        for relayed in self.relayed.values():
            if key in relayed.replicas:
                relayed.remove_replica(key)
        self._spawn(link.close(), self._closing)

    def _model_of(self, key: str) -> ServedModel | None:
        return next((model for model in self.models.values() if key in model.engine), None)

    def _may_join(self, key: str, card: Card) -> bool:
        """One that was refused for what another computes under its name gets its turn when that one is gone."""
        return key not in self.refused or (self.refused[key] == OTHER and not self._taken(card))

    def _taken(self, card: Card) -> bool:
        """Whether replicas with other answers go by one of its names."""
        known = [self.models[name] for name in card.config.served_names if name in self.models]
        others = [self.relayed[name] for name in card.config.served_names if name in self.relayed]
        return any(one.is_there for one in others) or any(
            model.identity != card.identity and model.engine.replicas for model in known
        )

    async def _join(self, member: Member, link: LinkedEngine, card: Card) -> None:
        async with self._joining:
            if link.is_lost or self._model_of(member.key) is not None or not self._may_join(member.key, card):
                return
            if self._taken(card):
                self._refuse(member, OTHER)
                return
            self.refused.pop(member.key, None)
            known = [self.models[name] for name in card.config.served_names if name in self.models]
            same = next((model for model in known if model.identity == card.identity), None)
            try:
                model = same or await self._made(card, await link.files())
            except FastqwenError as error:
                self._refuse(member, str(error))
                return
            if link.is_lost:
                return
            model.engine.add_replica(member.key, link)
            self._restarts[member.key] = link.num_restarts
            for name in card.config.served_names:
                self.models[name] = model
            log.info("worker %s computes %s", member.address, ", ".join(card.config.served_names))
            for old in known:
                if old is not model and old not in self.models.values():
                    await old.close()

    def _refuse(self, member: Member, why: str) -> None:
        if member.key not in self.refused:
            log.warning("worker %s (%s) is not used: %s", member.address, ", ".join(member.names), why)
        self.refused[member.key] = why

    async def _made(self, card: Card, files: Files) -> ServedModel:
        """The model's text side, from the files that its worker sent."""
        folder = tempfile.TemporaryDirectory(prefix="fastqwen-")
        pool = None
        try:
            config, path = unpack(card.config, files.files, Path(folder.name))
            pool = TextPool(
                config,
                path,
                files.model,
                num_workers=self._config.text_workers,
                timeout_s=self._config.text_timeout_s,
                checks=CHECKS,
                log_format=self._config.log_format,
            )
            await pool.start()  # before they are read here: a process can be ended where a template does not end
            text = await asyncio.to_thread(load_text, path, files.model, config)
            text.tokenizer.limit_length(card.ready.plan.max_model_len)
        except BaseException:
            if pool is not None:
                await pool.close()
            folder.cleanup()
            raise
        engine = FailoverEngine(Router(), max_requests=self._config.max_concurrent_requests)
        state = ServerState(
            engine=engine,
            engine_config=config,
            text=text,
            formats=derive_formats(
                text.template,
                tool_call_parser=config.tool_call_parser,
                reasoning_parser=config.reasoning_parser,
                reasoning_config=config.reasoning_config,
            ),
            workers=pool,
            config=self._config,
            metrics=Metrics(),
            seeds=random.Random(),  # noqa: S311 not a secret
            cache_stories=CacheStories(enabled=config.enable_prefix_caching),
        )
        return ServedModel(
            card.identity, engine, state, create_routes(state), pool, folder, asyncio.create_task(state.remember())
        )

    def _spawn(self, work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]] | None = None) -> None:
        tasks = self._tasks if among is None else among
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
