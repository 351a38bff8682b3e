"""AsyncLLM: the engine in a thread of this process, for programs with an event loop of their own."""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import Any

import msgspec

from fastqwen.client.batch_job import BatchJob, Prompt, salt_of, text_and_ids
from fastqwen.client.engine import AsyncStream, Deltas, Inlet, error_of
from fastqwen.client.engine_thread import EngineThread
from fastqwen.client.model import LoadedModel, batch_config
from fastqwen.client.pooled import PoolingJob, cut_of
from fastqwen.client.pooling_calls import as_tensor
from fastqwen.client.progress import refuse_lora
from fastqwen.client.sleeping import SleepingEngine
from fastqwen.client.user_tokenizer import UserTokenizer
from fastqwen.errors import BadRequest, GenerationFailed
from fastqwen.outputs import PoolingRequestOutput, RequestOutput
from fastqwen.records import EngineRequest, PoolingParams, RequestDelta, SamplingParams
from fastqwen.vllm.sampling_params import RequestOutputKind


class AsyncLLM:
    """
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model="demo"))
    async for output in engine.generate("Hello", SamplingParams(max_tokens=20), request_id="1"):
        print(output.outputs[0].text)

    Keywords as LLM's. Raises FastqwenError with one line that says what to change.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._loaded = LoadedModel(batch_config(model, options))
        make = partial(EngineThread, num_threads=self._loaded.config.num_threads)
        self._sleeping = SleepingEngine(self._loaded, make, EngineThread.close)
        self._ids = itertools.count()
        self._seeds = random.Random(self._loaded.config.seed)  # noqa: S311 not a secret
        self._running: dict[str, _LoopStream] = {}

    @classmethod
    def from_engine_args(cls, engine_args: Any, **_: Any) -> AsyncLLM:
        """Loads the model, which takes a while; what else vLLM takes here is about its own logs and usage statistics."""
        return cls(**vars(engine_args))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as the answer grows: each holds all so far, or what SamplingParams.output_kind says. Raises BadRequest.

        Leaving the loop early, or ``abort``, ends the work.
        """
        refuse_lora(lora_request)
        if request_id in self._running:
            raise BadRequest(f"request_id {request_id!r} is running already", "request_id")
        kind = getattr(sampling_params, "output_kind", RequestOutputKind.CUMULATIVE)
        job = BatchJob(self._loaded, self._ids, self._seeds, salt=self._sleeping.salt)
        job.add(*text_and_ids(prompt, self._loaded), sampling_params, priority, salt=salt_of(prompt))
        [output] = job.outputs
        output.request_id = request_id
        told = _Told(output)
        with _LoopStream(self._sleeping.engine, job.requests) as stream:
            self._running[request_id] = stream
            try:
                async for deltas in stream:
                    for delta in deltas:
                        if delta.finish_reason == "error":
                            raise error_of(delta.error)
                    job.take(deltas, stream)
                    if output.finished or kind is RequestOutputKind.CUMULATIVE:
                        yield copy.deepcopy(output) if kind is not RequestOutputKind.DELTA else told.news()
                    elif kind is RequestOutputKind.DELTA:
                        yield told.news()
            finally:
                self._running.pop(request_id, None)

    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams,
        request_id: str,
        lora_request: None = None,
        trace_headers: None = None,
        priority: int = 0,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """One output: what ``pooling_params.task`` asks of the text, or the model's own. Raises BadRequest."""
        refuse_lora(lora_request)
        if request_id in self._running:
            raise BadRequest(f"request_id {request_id!r} is running already", "request_id")
        cut = cut_of(tokenization_kwargs)
        if cut is not None:
            pooling_params = msgspec.structs.replace(pooling_params, truncate_prompt_tokens=cut)
        job = PoolingJob(self._loaded, self._ids, _no_run, salt=self._sleeping.salt, priority=priority)
        task = job.task(pooling_params.task)
        asked = job.asked([prompt], task, pooling_params)
        found: dict[str, RequestDelta] = {}
        with _LoopStream(self._sleeping.engine, [request for request, _ in asked]) as stream:
            self._running[request_id] = stream
            try:
                async for deltas in stream:
                    for delta in deltas:
                        if delta.finish_reason in ("error", "abort"):
                            raise error_of(delta.error)
                        found[delta.request_id] = delta
            finally:
                self._running.pop(request_id, None)
        [pooled] = job.told(asked, task, found)
        yield as_tensor(pooled._replace(request_id=request_id))

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """What runs under these ids ends, with finish_reason "abort". Unknown ids are ignored: one may have just ended."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            if one in self._running:
                self._running[one].abort_all()

    async def get_tokenizer(self) -> UserTokenizer:
        return UserTokenizer(self._loaded.need_text())

    async def check_health(self) -> None:
        """Raises GenerationFailed once the engine has failed."""
        if self.errored:
            raise GenerationFailed("the engine failed: its log says why")

    @property
    def errored(self) -> bool:
        return not self._sleeping.is_sleeping and self._sleeping.engine.state != "ready"

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """No later prompt finds what was computed before. What runs goes on with what it has."""
        return self._sleeping.reset_prefix_cache()

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give memory back until ``wake_up``: how much, says ``level`` (client/sleeping.py). Nothing may be running."""
        await asyncio.to_thread(self._sleeping.sleep, level, mode, busy=bool(self._running))

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        """All of it wakes, whichever of ``tags`` is asked for first."""
        return await asyncio.to_thread(self._sleeping.wake_up)

    async def is_sleeping(self) -> bool:
        return self._sleeping.is_sleeping

    def shutdown(self, timeout: float | None = None) -> None:
        """What is running is aborted."""
        if not self._sleeping.is_sleeping:
            self._sleeping.engine.close()


AsyncLLMEngine = AsyncLLM


def _no_run(requests: list[EngineRequest]) -> dict[str, RequestDelta]:
    raise AssertionError("nobody waits for this job in a thread")


class _Told:
    """What of an output its reader has."""

    def __init__(self, output: RequestOutput) -> None:
        self._output = output
        self._chars = [0] * len(output.outputs)
        self._tokens = [0] * len(output.outputs)

    def news(self) -> RequestOutput:
        found = copy.deepcopy(self._output)
        for index, answer in enumerate(found.outputs):
            chars, tokens = self._chars[index], self._tokens[index]
            self._chars[index], self._tokens[index] = len(answer.text), len(answer.token_ids)
            answer.text, answer.token_ids = answer.text[chars:], answer.token_ids[tokens:]
            answer.logprobs = None if answer.logprobs is None else answer.logprobs[tokens:]
        return found


class _LoopStream(AsyncStream):
    """Filled by the engine's thread, read in the event loop that made it."""

    def __init__(self, engine: Inlet, requests: list[EngineRequest]) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(engine, requests)

    def put(self, deltas: Deltas, num_ended: int) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(super().put, deltas, num_ended)

    def abort_all(self) -> None:
        self.abort(self._request_ids)
