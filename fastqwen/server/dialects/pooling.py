"""POST /pooling, and what it shares with /v1/embeddings, /classify and /v2/embed: texts, ids or conversations that pool."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from fastqwen.client.engine import error_of
from fastqwen.client.prepare import Side, check_dimensions, check_task, prepare_pooling, truncated
from fastqwen.client.vectors import activated, numbers_of, of_each_token, vector_of
from fastqwen.errors import BadRequest
from fastqwen.records import EngineRequest, PoolingTask, RequestDelta
from fastqwen.server.answer.metrics import RequestClock
from fastqwen.server.answer.state import ServerState, new_id
from fastqwen.server.dialects.body import Body, CacheSalt, Priority, Truncation, Whole, whole_ids
from fastqwen.server.dialects.conversation import for_template, rendered
from fastqwen.server.dialects.openai import noted
from fastqwen.server.dialects.schema import ChatMessage, as_list

MAX_INPUTS = 2048  # as OpenAI's
MAX_TOKEN_NUMBERS = 2**24  # of an answer that has a line for each token: some 300 MB of JSON
NUMBERS = {"float32": "f4", "float16": "f2"}


class PoolingFields(Body):
    """What requests for vectors and labels have in common. ``input`` or ``messages``, a conversation, are pooled."""

    model: str | None = None
    input: Annotated[str | list[int] | list[str] | list[list[int]] | None, BeforeValidator(whole_ids)] = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None  # None: of texts; a template writes its own
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Side = "left"
    padding: Literal["do_not_pad"] | None = None
    use_activation: bool = True
    priority: Priority = 0
    cache_salt: CacheSalt = ""
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/+=@-]{1,128}$")] | None = None
    user: str | None = None


class VectorFields(PoolingFields):
    """How a vector is written."""

    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32", "float16"] = "float32"  # of base64
    endianness: Literal["native", "little", "big"] = "little"
    dimensions: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    normalize: bool = True  # an older name of use_activation

    def written(self, numbers: NDArray[Any]) -> list[float] | str:
        if self.encoding_format == "base64":
            order = ">" if self.endianness == "big" else "<"
            return base64.b64encode(numbers.astype(order + NUMBERS[self.embed_dtype]).tobytes()).decode()
        floats: list[float] = numbers.tolist()
        return floats


class PoolingRequest(VectorFields):
    """With a task that begins with token_ each token has a line of numbers of its own."""

    task: PoolingTask | None = None


class Pooled:
    """One request's texts on their way to the engine and back. ``name`` begins their ids."""

    def __init__(self, state: ServerState, body: PoolingFields, name: str, task: PoolingTask) -> None:
        self._state, self._body, self._task = state, body, task
        self.id = new_id(name) if body.request_id is None else f"{name}-{body.request_id}"
        self.model = state.model_name(body.model)
        self._requests: list[EngineRequest] = []

    async def prepare(self) -> None:
        """Tokenise and check everything before anything runs. Raises BadRequest."""
        body = self._body
        check_task(self._task, self._state.facts())
        check_dimensions(getattr(body, "dimensions", None), self._state.facts())
        if (body.input is None) == (body.messages is None):
            raise BadRequest("input: Field required: a text, several, or token ids; or messages in its place", "input")
        if body.messages is not None:
            self.add(await self._conversation(body.messages), "messages")
            return
        for name in ("chat_template", "chat_template_kwargs"):
            if getattr(body, name):
                raise BadRequest(f"{name} belongs to messages and has no effect on input", name)
        inputs = as_list(body.input or [])
        if not inputs:
            raise BadRequest("input is empty, at least one text is needed", "input")
        if len(inputs) > MAX_INPUTS:
            raise BadRequest(f"input has {len(inputs)} texts, at most {MAX_INPUTS} are allowed in one request", "input")
        for index, one in enumerate(inputs):
            field = "input" if len(inputs) == 1 else f"input.{index}"
            self.add(await self.ids(one, field) if isinstance(one, str) else self._cut(one), field)

    def add(self, ids: list[int], field: str) -> None:
        """``field`` is what an error names."""
        body = self._body
        self._check_size(len(ids), field)
        self._requests.append(
            prepare_pooling(
                f"{self.id}-{len(self._requests)}",
                ids,
                self._state.facts(),
                task=self._task,
                field=field,
                priority=body.priority,
                cache_salt=self._state.salted(body.cache_salt),
            )
        )

    def _check_size(self, num_tokens: int, field: str) -> None:
        """Raises BadRequest for lines of numbers that no client would read."""
        if not self._task.startswith("token_"):
            return
        classifier, body = self._state.facts().model.classifier, self._body
        own = self._state.facts().model.hidden_size if classifier is None else len(classifier.labels)
        width = getattr(body, "dimensions", None) or own
        num_tokens += sum(len(one.prompt_token_ids) for one in self._requests)
        if num_tokens * width > MAX_TOKEN_NUMBERS:
            raise BadRequest(
                f"{field}: {num_tokens} tokens with {width} numbers each are more than the {MAX_TOKEN_NUMBERS} of an answer: "
                "send fewer or shorter texts in a request",
                field,
            )

    async def ids(self, text: str, field: str) -> list[int]:
        """A text's, closed as the tokenizer's post-processor says, once."""
        special = self._body.add_special_tokens is not False
        try:
            ids = await self._state.tokenize(text, add_special_tokens=special)
        except BadRequest as error:
            raise BadRequest(
                f"{field}: {error}", field if error.param == "prompt" else error.param, error.code
            ) from None
        if not special:
            return self._cut(ids)
        tokenizer = self._state.text.tokenizer
        num_closing = len(tokenizer.closing_ids)
        if self._body.truncation_side == "right" and num_closing and self._body.truncate_prompt_tokens is not None:
            open_ids = tokenizer.closed_once(ids)[:-num_closing]
            return [*self._cut(open_ids, num_closing), *tokenizer.closing_ids]
        return self._cut(tokenizer.closed_once(self._cut(ids)))

    async def _conversation(self, messages: list[ChatMessage]) -> list[int]:
        state, body = self._state, self._body
        ids = await rendered(
            state,
            for_template(messages, state.formats, body.warnings),
            {**(state.config.default_chat_template_kwargs or {}), **(body.chat_template_kwargs or {})},
            body.warnings,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template=body.chat_template,
        )
        return self._cut(state.text.tokenizer.closed_once(ids) if body.add_special_tokens else ids)

    def _cut(self, ids: list[int], spare: int = 0) -> list[int]:
        body, facts = self._body, self._state.facts()
        return truncated(ids, body.truncate_prompt_tokens, facts, answers=False, side=body.truncation_side, spare=spare)

    async def run(self) -> list[NDArray[Any]]:
        """Each input's numbers: vectors of length 1, or probabilities; with use_activation false, as the model makes them.

        Raises GenerationFailed if the engine cannot finish one of them; the others are aborted then.
        """
        found = await self._deltas()
        self.num_cached_tokens = sum(delta.num_cached_tokens for delta in found.values())
        return [self._numbers(found[one.request_id], len(one.prompt_token_ids)) for one in self._requests]

    def _numbers(self, delta: RequestDelta, num_tokens: int) -> NDArray[Any]:
        body = self._body
        activate = body.use_activation and getattr(body, "normalize", True)
        classifier = self._state.facts().model.classifier
        if self._task.startswith("token_"):
            activation = None if classifier is None else classifier.activation
            return of_each_token(delta, num_tokens, getattr(body, "dimensions", None), activation, activate=activate)
        if classifier is None:
            return vector_of(delta, getattr(body, "dimensions", None), normalize=activate)
        numbers = numbers_of(delta)
        return activated(numbers, classifier.activation).astype(np.float32) if activate else numbers

    async def _deltas(self) -> dict[str, RequestDelta]:
        metrics = self._state.metrics
        clocks = {one.request_id: RequestClock(metrics, len(one.prompt_token_ids), 1) for one in self._requests}
        found: dict[str, RequestDelta] = {}
        with self._state.engine.stream(self._requests) as stream:
            async for deltas in stream:
                for delta in deltas:
                    assert delta.finish_reason is not None
                    clocks[delta.request_id].finished(
                        0,
                        delta.finish_reason,
                        0,
                        num_cached_tokens=delta.num_cached_tokens,
                        num_preemptions=delta.num_preemptions,
                    )
                    if delta.embedding is None:
                        raise error_of(delta.error)
                    found[delta.request_id] = delta
        return found

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(one.prompt_token_ids) for one in self._requests)

    def ending(self) -> dict[str, Any]:
        """What stands behind the results."""
        prompt = self.num_prompt_tokens
        details = {"cached_tokens": self.num_cached_tokens}
        used = {"prompt_tokens": prompt, "total_tokens": prompt, "prompt_tokens_details": details}
        return {"usage": used, **noted(self._state, self._body.warnings)}


def task_of(state: ServerState, asked: PoolingTask | None, dimensions: int | None) -> PoolingTask:
    """The model's own, if none was asked for. Raises BadRequest."""
    own = asked or state.engine_config.pooling_task
    task: PoolingTask = own or ("embed" if state.facts().model.classifier is None else "classify")
    if task.endswith("classify") and dimensions is not None:
        raise BadRequest("dimensions belongs to vectors, not to labels", "dimensions")
    return task


async def pool(state: ServerState, body: PoolingRequest) -> dict[str, Any]:
    """Vectors, or a number for each label."""
    work = Pooled(state, body, "pool", task_of(state, body.task, body.dimensions))
    await work.prepare()
    data = [
        {"index": index, "object": "pooling", "data": body.written(numbers)}
        for index, numbers in enumerate(await work.run())
    ]
    return listing(work, data)


def listing(work: Pooled, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """An answer in the shape that these APIs share."""
    head = {"id": work.id, "object": "list", "created": int(time.time()), "model": work.model}
    return {**head, "data": list(data), **work.ending()}
