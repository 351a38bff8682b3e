"""What ``LLM`` asks of a text that pools: vectors, labels, and how well pairs belong together."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

from fastqwen.client.batch_job import Prompt, as_list, salt_of, text_and_ids
from fastqwen.client.model import LoadedModel
from fastqwen.client.prepare import check_dimensions, check_task, prepare_pooling, truncated
from fastqwen.client.scores import OWN_TEMPLATE, Judge, judge_of, pair_messages, pairs
from fastqwen.client.vectors import activated, numbers_of, of_each_token, vector_of
from fastqwen.errors import BadRequest
from fastqwen.outputs import ScoringOutput, ScoringRequestOutput
from fastqwen.records import POOLING_TASKS, EngineRequest, PoolingParams, PoolingTask, RequestDelta

log = logging.getLogger(__name__)

Asked = tuple[EngineRequest, PoolingParams]
Run = Callable[[list[EngineRequest]], dict[str, RequestDelta]]
T = TypeVar("T")
CUTS = ("truncate_prompt_tokens",)


class Pooled(NamedTuple):
    """One prompt's result: a vector's numbers, or a number for each label; or a list of those of each token."""

    request_id: str
    numbers: list[Any]
    prompt_token_ids: list[int]
    num_cached_tokens: int

    def as_output(self, kind: Callable[..., T], result: Any) -> T:
        return kind(self.request_id, result, self.prompt_token_ids, self.num_cached_tokens)


class PoolingJob:
    """One call of ``LLM.embed``, ``classify``, ``encode``, ``reward`` or ``score``. ``run`` gives each request's last delta."""

    def __init__(
        self, loaded: LoadedModel, ids: itertools.count[int], run: Run, *, salt: str, priority: int = 0
    ) -> None:
        self._loaded, self._ids, self._run, self._salt, self._priority = loaded, ids, run, salt, priority

    def task(self, asked: str | None) -> PoolingTask:
        """What the model's own is, if nothing else is asked. Raises BadRequest."""
        own: PoolingTask = "embed" if self._loaded.facts.model.classifier is None else "classify"
        asked = self._loaded.config.pooling_task if asked is None else asked
        task = own if asked is None else next((one for one in get_args(PoolingTask) if one == asked), None)
        if task is None:
            raise BadRequest(f"pooling_task {asked!r}: there are {', '.join(POOLING_TASKS)}", "pooling_task")
        check_task(task, self._loaded.facts)
        return task

    def of(
        self,
        prompts: Prompt | Sequence[Prompt],
        task: PoolingTask,
        params: PoolingParams | Sequence[PoolingParams] | None,
    ) -> list[Pooled]:
        """Ask, and wait. Raises BadRequest."""
        asked = self.asked(prompts, task, params)
        return self.told(asked, task, self._run([request for request, _ in asked]))

    def asked(
        self,
        prompts: Prompt | Sequence[Prompt],
        task: PoolingTask,
        params: PoolingParams | Sequence[PoolingParams] | None,
    ) -> list[Asked]:
        """Token ids are used as they are; a text is closed as the tokenizer's post-processor says. Raises BadRequest."""
        facts, listed = self._loaded.facts, as_list(prompts)
        found = []
        for index, (prompt, one) in enumerate(zip(listed, _for_each(params, len(listed)), strict=True)):
            if one.task not in (None, task):
                raise BadRequest(f"pooling_params has task {one.task!r}, but {task} was asked for", "task")
            if task.endswith("classify") and one.dimensions is not None:
                raise BadRequest("dimensions belongs to vectors, not to labels", "dimensions")
            check_dimensions(one.dimensions, facts)
            ids = self._closed(prompt, one.truncate_prompt_tokens)
            found.append((self._request(ids, task, f"prompts[{index}]", salt_of(prompt)), one))
        return found

    def told(self, asked: list[Asked], task: PoolingTask, found: dict[str, RequestDelta]) -> list[Pooled]:
        """``found`` holds each request's last delta."""
        return [
            Pooled(
                request.request_id,
                self._numbers(found[request.request_id], request, task, one),
                request.prompt_token_ids,
                found[request.request_id].num_cached_tokens,
            )
            for request, one in asked
        ]

    def _closed(self, prompt: Prompt, cut: int | None) -> list[int]:
        text, ids = text_and_ids(prompt, self._loaded)
        ids = truncated(ids, cut, self._loaded.facts, answers=False)
        if text is None or self._loaded.text is None:
            return ids
        return truncated(self._loaded.text.tokenizer.closed_once(ids), cut, self._loaded.facts, answers=False)

    def _request(self, ids: list[int], task: PoolingTask, field: str, salt: str = "") -> EngineRequest:
        name, salt = str(next(self._ids)), " ".join(filter(None, [self._salt, salt]))
        return prepare_pooling(
            name, ids, self._loaded.facts, task=task, field=field, priority=self._priority, cache_salt=salt
        )

    def _numbers(
        self, delta: RequestDelta, request: EngineRequest, task: PoolingTask, asked: PoolingParams
    ) -> list[Any]:
        classifier = self._loaded.facts.model.classifier
        if task.startswith("token_"):
            num_tokens, activation = (
                len(request.prompt_token_ids),
                None if classifier is None else classifier.activation,
            )
            found = of_each_token(delta, num_tokens, asked.dimensions, activation, activate=asked.activated)
            listed: list[Any] = found.tolist()
            return listed
        if task == "embed" or classifier is None:
            return [float(one) for one in vector_of(delta, asked.dimensions, normalize=asked.activated)]
        numbers = numbers_of(delta)
        return [float(one) for one in (activated(numbers, classifier.activation) if asked.activated else numbers)]

    def scores(
        self,
        first: Sequence[str],
        second: Sequence[str],
        params: PoolingParams,
        *,
        instruction: str | None,
        chat_template: str | None,
    ) -> list[ScoringRequestOutput]:
        """By a model that reads pairs; of any other it is the cosine of both texts' vectors. Raises BadRequest."""
        listed = pairs(first, second, ("data_1", "data_2"))
        judge = judge_of(self._loaded.config, self._loaded.facts.model, self._loaded.need_text().tokenizer)
        if judge is not None:
            return self._judged(judge, listed, params, instruction, chat_template or self._loaded.config.chat_template)
        for name, value in (("instruction", instruction), ("chat_template", chat_template)):
            if value is not None:
                raise BadRequest(f"{name} is for models that read pairs; write it into the text", name)
        texts = list(dict.fromkeys([*first, *second]))
        cut = PoolingParams(truncate_prompt_tokens=params.truncate_prompt_tokens)
        vectors = dict(zip(texts, self.of(texts, "embed", cut), strict=True))
        return [_cosine(vectors[one], vectors[other]) for one, other in listed]

    def _judged(
        self,
        judge: Judge,
        listed: list[tuple[str, str]],
        params: PoolingParams,
        instruction: str | None,
        template: str | None,
    ) -> list[ScoringRequestOutput]:
        cut = params.truncate_prompt_tokens
        if template is None:
            prompts = [self._pair(judge, query, document, instruction, cut) for query, document in listed]
        else:
            found, tokenizer = self._loaded.template(template), self._loaded.need_text().tokenizer
            options: dict[str, Any] = {"add_generation_prompt": False}
            options |= {} if instruction is None else {"instruction": instruction}
            prompts = [
                truncated(found.encode(tokenizer, pair_messages(*pair), **options), cut, self._loaded.facts)
                for pair in listed
            ]
        names = [str(next(self._ids)) for _ in prompts]
        requests = [
            request
            for name, ids in zip(names, prompts, strict=True)
            for request in judge.requests(name, ids, self._loaded.facts, priority=self._priority, cache_salt=self._salt)
        ]
        answers = self._run(requests)
        return [
            ScoringRequestOutput(name, ScoringOutput(judge.score(name, answers, activate=params.activated)), ids)
            for name, ids in zip(names, prompts, strict=True)
        ]

    def _pair(self, judge: Judge, query: str, document: str, instruction: str | None, cut: int | None) -> list[int]:
        tokenizer, facts = self._loaded.need_text().tokenizer, self._loaded.facts
        if OWN_TEMPLATE in query:
            return truncated(tokenizer.encode(query + document), cut, facts)
        pieces = judge.pieces(query, document, instruction, tokenizer)
        ids = [token_id for piece in pieces for token_id in tokenizer.encode(piece, add_special_tokens=False)]
        if not judge.templated:
            ids += tokenizer.closing_ids
        ids = truncated(ids, cut, facts)
        if told := judge.cut(ids, facts):
            log.warning("%s", told)
        return judge.prompt(ids, facts)


def cut_of(tokenization_kwargs: dict[str, Any] | None) -> int | None:
    """vLLM's name for how texts are made tokens: what of it there is here. Raises BadRequest."""
    given = {name: value for name, value in (tokenization_kwargs or {}).items() if value is not None}
    other = sorted(given.keys() - {*CUTS})
    if other:
        raise BadRequest(
            f"tokenization_kwargs has no {other[0]!r} here: known are {', '.join(CUTS)}", "tokenization_kwargs"
        )
    cut: int | None = given.get("truncate_prompt_tokens")
    return cut


def _for_each(params: PoolingParams | Sequence[PoolingParams] | None, count: int) -> list[PoolingParams]:
    if params is None or isinstance(params, PoolingParams):
        return [params or PoolingParams()] * count
    if len(params) != count:
        raise BadRequest(f"{count} prompts, but {len(params)} pooling_params", "pooling_params")
    return list(params)


def _cosine(one: Pooled, other: Pooled) -> ScoringRequestOutput:
    score = sum(a * b for a, b in zip(one.numbers, other.numbers, strict=True))
    return ScoringRequestOutput(
        request_id=f"{one.request_id}_{other.request_id}",
        outputs=ScoringOutput(score),
        prompt_token_ids=[*one.prompt_token_ids, *other.prompt_token_ids],
        num_cached_tokens=one.num_cached_tokens + other.num_cached_tokens,
    )
