"""POST /v1/score and /v1/rerank, as vLLM, Jina and Cohere have them: how well documents answer a query."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field

from fastqwen.client.engine import error_of
from fastqwen.client.prepare import Side, prepare_pooling, truncated
from fastqwen.client.scores import OWN_TEMPLATE, Judge, judge_of, pair_messages, pairs
from fastqwen.client.vectors import vector_of
from fastqwen.errors import BadRequest
from fastqwen.records import EngineRequest, RequestDelta
from fastqwen.server.answer.metrics import RequestClock
from fastqwen.server.answer.state import ServerState, new_id
from fastqwen.server.dialects.body import Body, CacheSalt, Count, Priority, Truncation, Whole
from fastqwen.server.dialects.openai import noted

MAX_TEXTS = 2048


def _text(given: Any) -> Any:
    """A text may come as {"text": ...} or as content of text parts."""
    if isinstance(given, dict) and isinstance(given.get("text"), str) and given.get("type", "text") == "text":
        return given["text"]
    if isinstance(given, dict) and isinstance(given.get("content"), list):
        return "".join(_text(part) for part in given["content"])
    return given


def _texts(given: Any) -> Any:
    return [_text(one) for one in given] if isinstance(given, list) else [_text(given)]


Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[list[str], BeforeValidator(_texts), Field(max_length=MAX_TEXTS)]


class ScoreFields(Body):
    """What both requests have in common."""

    model: str | None = None
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # of a chat template made for pairs
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: Side = "left"
    max_tokens_per_query: Whole = 0  # 0: the whole query
    max_tokens_per_doc: Whole = 0  # Cohere's as well
    use_activation: bool = True
    priority: Priority = 0
    cache_salt: CacheSalt = ""
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/+=@-]{1,128}$")] | None = None
    user: str | None = None


class ScoreRequest(ScoreFields):
    """One text with each of many, or as many of each."""

    text_1: Annotated[Texts, Field(validation_alias=AliasChoices("text_1", "queries", "data_1"))]
    text_2: Annotated[Texts, Field(validation_alias=AliasChoices("text_2", "documents", "items", "data_2"))]


class RerankRequest(ScoreFields):
    query: Text
    documents: Texts
    top_n: Count = 0  # 0: all
    return_documents: bool = True


class Scores:
    """Scores of pairs: by a model that reads both, else by the cosine of two vectors."""

    def __init__(self, state: ServerState, body: ScoreFields) -> None:
        self._state, self._body = state, body
        self.id = new_id("score") if body.request_id is None else f"score-{body.request_id}"
        self._judge: Judge | None = judge_of(state.engine_config, state.facts().model, state.text.tokenizer)
        options = dict(body.chat_template_kwargs or {})
        instruction = options.pop("instruction", None)
        self._instruction: str | None = body.instruction if instruction is None else str(instruction)
        self._template_options = options
        if options and state.engine_config.chat_template is None:
            body.warnings.tell(
                f"chat_template_kwargs: {min(options)} has no effect without --chat-template FILE for pairs"
            )
        if self._judge is None and not body.use_activation:
            body.warnings.tell("use_activation has no effect: a cosine is made of no other number")
        if self._judge is None and self._instruction is not None:
            raise BadRequest("instruction is for models that read pairs; write it into the query", "instruction")
        self.num_prompt_tokens = 0

    async def of(self, listed: list[tuple[str, str]]) -> list[float]:
        """Raises BadRequest for a text that is too long, before anything runs."""
        query_room, document_room = self._body.max_tokens_per_query, self._body.max_tokens_per_doc
        listed = [(await self._part(one, query_room), await self._part(other, document_room)) for one, other in listed]
        return await (self._cosines(listed) if self._judge is None else self._judged(self._judge, listed))

    async def _part(self, text: str, num_tokens: int) -> str:
        """Its first tokens, if they are limited."""
        if num_tokens <= 0:
            return text
        ids = await self._state.tokenize(text, add_special_tokens=False)
        return text if len(ids) <= num_tokens else self._state.text.tokenizer.decode(ids[:num_tokens])

    async def _judged(self, judge: Judge, listed: list[tuple[str, str]]) -> list[float]:
        facts, salt = self._state.facts(), self._state.salted(self._body.cache_salt)
        requests: list[EngineRequest] = []
        names = [f"{self.id}-{index}" for index in range(len(listed))]
        for name, (query, document) in zip(names, listed, strict=True):
            ids = await self._pair(judge, query, document)
            self.num_prompt_tokens += len(ids)
            requests += judge.requests(name, ids, facts, priority=self._body.priority, cache_salt=salt)
        found = await self._run(requests)
        return [judge.score(name, found, activate=self._body.use_activation) for name in names]

    async def _pair(self, judge: Judge, query: str, document: str) -> list[int]:
        """A prompt with both, by the operator's template or the model's own words around them."""
        state, tokenizer = self._state, self._state.text.tokenizer
        if OWN_TEMPLATE in query:
            return self._cut(await state.tokenize(query + document, add_special_tokens=False))
        if state.engine_config.chat_template is not None:
            told = {} if self._instruction is None else {"instruction": self._instruction}
            options = {**self._template_options, **told}
            messages = pair_messages(query, document)
            return self._cut(await state.apply_template(messages, options, add_generation_prompt=False))
        pieces = judge.pieces(query, document, self._instruction, tokenizer)
        encoded = [await state.tokenize(piece, add_special_tokens=False) for piece in pieces]
        ids = [one for part in encoded for one in part]
        ids = self._cut(ids if judge.templated else [*ids, *tokenizer.closing_ids])
        if cut := judge.cut(ids, state.facts()):
            self._body.warnings.tell(cut)
        return judge.prompt(ids, state.facts())

    def _cut(self, ids: list[int]) -> list[int]:
        body, facts = self._body, self._state.facts()
        return truncated(ids, body.truncate_prompt_tokens, facts, answers=False, side=body.truncation_side)

    async def _cosines(self, listed: list[tuple[str, str]]) -> list[float]:
        facts, salt = self._state.facts(), self._state.salted(self._body.cache_salt)
        texts = list(dict.fromkeys(text for pair in listed for text in pair))
        requests = []
        for index, text in enumerate(texts):
            ids = await self._state.tokenize(text, add_special_tokens=True)
            ids = self._cut(self._state.text.tokenizer.closed_once(ids))
            self.num_prompt_tokens += len(ids)
            name = f"{self.id}-{index}"
            requests.append(
                prepare_pooling(name, ids, facts, field="text", priority=self._body.priority, cache_salt=salt)
            )
        found = await self._run(requests)
        vectors = {text: vector_of(found[one.request_id]) for text, one in zip(texts, requests, strict=True)}
        return [float(vectors[one] @ vectors[other]) for one, other in listed]

    async def _run(self, requests: list[EngineRequest]) -> dict[str, RequestDelta]:
        """Each one's last delta. Raises GenerationFailed if the engine cannot finish one of them."""
        metrics = self._state.metrics
        clocks = {one.request_id: RequestClock(metrics, len(one.prompt_token_ids), 1) for one in requests}
        found: dict[str, RequestDelta] = {}
        with self._state.engine.stream(requests) as stream:
            async for deltas in stream:
                for delta in deltas:
                    if delta.finish_reason is None:
                        continue
                    clocks[delta.request_id].finished(
                        0,
                        delta.finish_reason,
                        0,
                        num_cached_tokens=delta.num_cached_tokens,
                        num_preemptions=delta.num_preemptions,
                    )
                    if delta.finish_reason in ("error", "abort"):
                        raise error_of(delta.error)
                    found[delta.request_id] = delta
        return found

    def ending(self) -> dict[str, Any]:
        """What stands behind the scores."""
        used = {"prompt_tokens": self.num_prompt_tokens, "total_tokens": self.num_prompt_tokens}
        return {"usage": used, **noted(self._state, self._body.warnings)}


async def score(state: ServerState, body: ScoreRequest) -> dict[str, Any]:
    work = Scores(state, body)
    model = state.model_name(body.model)
    found = await work.of(pairs(body.text_1, body.text_2, ("text_1", "text_2")))
    data = [{"index": index, "object": "score", "score": one} for index, one in enumerate(found)]
    return {"id": work.id, "object": "list", "model": model, "data": data, **work.ending()}


async def rerank(state: ServerState, body: RerankRequest) -> dict[str, Any]:
    """The best first."""
    work = Scores(state, body)
    model = state.model_name(body.model)
    found = await work.of(pairs([body.query], body.documents, ("query", "documents")))
    order = sorted(range(len(found)), key=lambda index: -found[index])[: body.top_n or None]
    results = [
        {
            "index": index,
            **({"document": {"text": body.documents[index]}} if body.return_documents else {}),
            "relevance_score": found[index],
        }
        for index in order
    ]
    return {"id": work.id, "model": model, "results": results, **work.ending()}
