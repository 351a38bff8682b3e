"""LLMEngine: an engine that its caller steps, for programs that add requests while others run."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable
from typing import Any

from fastqwen.client.batch_job import BatchJob, Prompt, salt_of, text_and_ids
from fastqwen.client.engine import Deltas, error_of
from fastqwen.client.local_engine import LocalEngine
from fastqwen.client.model import LoadedModel, batch_config
from fastqwen.client.numbers import metrics_of
from fastqwen.client.sleeping import SleepingEngine
from fastqwen.client.user_tokenizer import UserTokenizer
from fastqwen.errors import BadRequest
from fastqwen.outputs import Histogram, Metric, RequestOutput
from fastqwen.records import EngineRequest, SamplingParams


class LLMEngine:
    """
    engine = LLMEngine.from_engine_args(EngineArgs(model="demo"))
    engine.add_request("1", "Hello", SamplingParams(max_tokens=20))
    while engine.has_unfinished_requests():
        for output in engine.step(): ...

    Keywords as LLM's. Raises FastqwenError with one line that says what to change.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._loaded = LoadedModel(batch_config(model, options))
        self._sleeping = SleepingEngine(self._loaded, LocalEngine)
        self._ids = itertools.count()
        self._seeds = random.Random(self._loaded.config.seed)  # noqa: S311 not a secret
        self._jobs: dict[str, BatchJob] = {}
        self._name_of: dict[str, str] = {}  # of the engine's requests
        self._news: Deltas = []

    @classmethod
    def from_engine_args(cls, engine_args: Any, **_: Any) -> LLMEngine:
        """Loads the model, which takes a while; what else vLLM takes here is about its own logs and usage statistics."""
        return cls(**vars(engine_args))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: None = None,
        tokenization_kwargs: None = None,
        trace_headers: None = None,
        priority: int = 0,
    ) -> None:
        """It runs with the next ``step``. ``arrival_time`` is now. Raises BadRequest."""
        for name, value in (("lora_request", lora_request), ("tokenization_kwargs", tokenization_kwargs)):
            if value is not None:
                raise BadRequest(f"{name} cannot be had here: leave it out", name)
        if request_id in self._jobs:
            raise BadRequest(f"request_id {request_id!r} is running already", "request_id")
        job = BatchJob(self._loaded, self._ids, self._seeds, salt=self._sleeping.salt)
        job.add(*text_and_ids(prompt, self._loaded), params, priority, salt=salt_of(prompt))
        job.outputs[0].request_id = request_id
        self._jobs[request_id] = job
        self._name_of.update({one.request_id: request_id for one in job.requests})
        self._engine.submit(self, job.requests)

    @property
    def _engine(self) -> LocalEngine:
        return self._sleeping.engine

    def step(self) -> list[RequestOutput]:
        """The requests that gained something, each with all that it has so far. Raises what ended one of them."""
        if self._engine.has_work:
            self._engine.step()
        news, self._news = self._news, []
        grown = dict.fromkeys(self._name_of[delta.request_id] for delta in news if delta.request_id in self._name_of)
        for delta in news:
            if delta.finish_reason == "error":
                self._forget(self._name_of[delta.request_id])
                raise error_of(delta.error)
        outputs = []
        for name in grown:
            job = self._jobs[name]
            job.take([delta for delta in news if self._name_of.get(delta.request_id) == name], _Ways(self, name))
            outputs.append(copy.deepcopy(job.outputs[0]))
            if job.outputs[0].finished:
                self._forget(name)
        return outputs

    def put(self, deltas: Deltas, num_ended: int) -> None:
        """For the engine: news of some requests."""
        self._news += deltas

    def go_on(self, name: str, requests: list[EngineRequest]) -> None:
        """For a job: one of its answers goes on as another request."""
        self._name_of.update({one.request_id: name for one in requests})
        self._engine.submit(self, requests)

    def end(self, request_ids: Iterable[str]) -> None:
        """For a job: one of its answers ended at a stop string."""
        self._engine.abort(request_ids)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """What runs under these ids ends without another output. Unknown ids are ignored."""
        for name in [request_id] if isinstance(request_id, str) else request_id:
            if name in self._jobs:
                left = [one.request_id for one in self._jobs[name].requests]
                self._forget(name)
                self._engine.leave(left)

    def has_unfinished_requests(self) -> bool:
        return bool(self._jobs)

    def get_num_unfinished_requests(self) -> int:
        return len(self._jobs)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """No later prompt finds what was computed before. What runs goes on with what it has."""
        return self._sleeping.reset_prefix_cache()

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give memory back until ``wake_up``: how much, says ``level`` (client/sleeping.py). Nothing may be running."""
        self._sleeping.sleep(level, mode, busy=bool(self._jobs))

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """All of it wakes, whichever of ``tags`` is asked for first."""
        return self._sleeping.wake_up()

    def is_sleeping(self) -> bool:
        return self._sleeping.is_sleeping

    def get_metrics(self) -> list[Metric | Histogram]:
        return metrics_of(self._sleeping.stats(), {"model_name": self._loaded.config.served_names[0]})

    def get_tokenizer(self) -> UserTokenizer:
        return UserTokenizer(self._loaded.need_text())

    def _forget(self, name: str) -> None:
        for one in self._jobs.pop(name).requests:
            self._name_of.pop(one.request_id, None)


class _Ways:
    """One request's way back to the engine."""

    def __init__(self, engine: LLMEngine, name: str) -> None:
        self._engine, self._name = engine, name

    def abort(self, request_ids: list[str]) -> None:
        self._engine.end(request_ids)

    def add(self, requests: list[EngineRequest]) -> None:
        self._engine.go_on(self._name, requests)
