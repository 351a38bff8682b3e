"""LLM: the engine in this process, for scripts and notebooks."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

from tqdm import tqdm

from fastqwen.client.assemble import Assembler
from fastqwen.client.prepare import ModelLimits, check_dimensions, prepare, prepare_embedding
from fastqwen.client.vectors import vector_of
from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineCore, EngineStats
from fastqwen.errors import BadConfig, BadRequest, FastqwenError
from fastqwen.hub import resolve
from fastqwen.model_config import ModelConfig
from fastqwen.outputs import EmbeddingOutput, EmbeddingRequestOutput, Logprob, RequestOutput
from fastqwen.plan import EnginePlan
from fastqwen.records import EngineRequest, Grammar, RequestDelta, SamplingParams
from fastqwen.runner.start import start_engine
from fastqwen.text.grammar import check_grammar, grammar_tokenizer, to_grammar
from fastqwen.text.load import TextTools, eos_without_tokenizer, load_text
from fastqwen.text.template import Message
from fastqwen.weights.checkpoint import open_checkpoint

log = logging.getLogger(__name__)

Prompt = str | list[int] | dict[str, Any]
BAR_FROM_PROMPTS = 2


class LLM:
    """
    llm = LLM("demo", max_model_len=2048)
    [output] = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=20))
    print(output.outputs[0].text)

    The keywords are EngineConfig's fields. Raises FastqwenError with one line that says what to change.
    """

    def __init__(self, model: str, **options: Any) -> None:
        unknown = set(options) - set(EngineConfig.__struct_fields__)
        if unknown:
            raise BadConfig(f"there is no engine option {', '.join(sorted(unknown))}")
        self.config = EngineConfig(model=model, **options).for_batches()
        path = resolve(model, revision=self.config.revision, weights=self.config.load_format != "dummy")
        if self.config.trust_remote_code:
            log.warning("trust_remote_code has no effect: nothing needs it, a checkpoint's code is never run")
        facts = open_checkpoint(path, with_tensors=False).model
        self.text: TextTools | None = None
        if not self.config.skip_tokenizer_init:
            self.text = load_text(path, facts, self.config)
        with tqdm(desc="Loading layers", unit="layer", leave=False, delay=1.0, disable=None) as bar:
            self._engine = start_engine(
                self.config,
                path,
                lambda done, total: _advance(bar, done, total),
                grammar_tokenizer=self._grammar_tokenizer,
            )
        if self.text is not None:
            self.text.tokenizer.limit_length(self._engine.plan.max_model_len)
        self.limits = ModelLimits(
            max_model_len=self._engine.plan.max_model_len,
            vocab_size=self._engine.model.vocab_size,
            stop_token_ids=self.text.stop_token_ids if self.text else eos_without_tokenizer(path, facts),
            hidden_size=self._engine.model.hidden_size,
            has_head=self._engine.model.has_head,
        )
        self._ids = itertools.count()
        self._seeds = random.Random(self.config.seed)  # noqa: S311 not a secret

    @property
    def model(self) -> ModelConfig:
        """What the checkpoint says about itself."""
        return self._engine.model

    @property
    def plan(self) -> EnginePlan:
        """What the device and the model allow."""
        return self._engine.plan

    @property
    def core(self) -> EngineCore:
        """The engine itself. Whoever steps it must be the only one, and not use ``generate`` or ``chat`` besides."""
        return self._engine.core

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self._engine.core.stats()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams(**(self.text.default_sampling if self.text else {}))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. A prompt is a text, a list of ids, or {"prompt_token_ids": [...]}."""
        listed = _as_list(prompts)
        params = self._params_for(sampling_params, len(listed))
        texts_and_ids = [self._ids_of(prompt) for prompt in listed]
        priorities = list(priority) if priority is not None else [0] * len(listed)
        if len(priorities) != len(listed):
            raise BadRequest(f"{len(listed)} prompts, but {len(priorities)} priorities", "priority")
        return self._run(texts_and_ids, params, priorities, use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One conversation, or a list of them."""
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
        prompts: list[Prompt] = [
            self.chat_token_ids(cast(list[Message], conversation), **options) for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        use_tqdm: bool = True,
        priority: int = 0,
    ) -> list[EmbeddingRequestOutput]:
        """One vector of length 1 per prompt: the last token's hidden state, cut to ``dimensions`` if given.

        Token ids are used as they are; a text is closed as the tokenizer's post-processor says. Raises BadRequest.
        """
        check_dimensions(dimensions, self.limits)
        requests: list[EngineRequest] = []
        for index, prompt in enumerate(_as_list(prompts)):
            text, ids = self._ids_of(prompt)
            if text is not None and self.text is not None:
                ids = self.text.tokenizer.closed_once(ids)
            name = str(next(self._ids))
            requests.append(prepare_embedding(name, ids, self.limits, field=f"prompts[{index}]", priority=priority))
        found = self._run_embeddings(requests, use_tqdm)
        return [
            EmbeddingRequestOutput(
                request_id=one.request_id,
                outputs=EmbeddingOutput(vector_of(found[one.request_id], dimensions).tolist()),
                prompt_token_ids=one.prompt_token_ids,
                num_cached_tokens=found[one.request_id].num_cached_tokens,
            )
            for one in requests
        ]

    def _run_embeddings(self, requests: list[EngineRequest], bar: bool) -> dict[str, RequestDelta]:
        core, found = self._engine.core, dict[str, RequestDelta]()
        off = not bar or len(requests) < BAR_FROM_PROMPTS
        try:
            for request in requests:
                core.add(request)
            with tqdm(total=len(requests), unit="prompt", disable=off, dynamic_ncols=True) as progress:
                while core.has_work:
                    for delta in core.step():
                        if delta.error is not None:
                            raise FastqwenError(f"prompt {delta.request_id}: {delta.error}")
                        found[delta.request_id] = delta
                        progress.update(1)
            core.step()  # idle: audits that no block was left behind
        except BaseException:
            for request in requests:
                core.abort(request.request_id)
            while core.has_work:
                core.step()
            raise
        return found

    def chat_token_ids(self, messages: list[Message], **options: Any) -> list[int]:
        """The prompt that the chat template makes. Raises BadRequest."""
        text = self._need_text()
        if text.template is None:
            raise BadRequest(f"{self.config.model} has no chat template: give one with chat_template=...", "messages")
        return text.template.encode(text.tokenizer, messages, **options)

    def stream_chat(self, messages: list[Message], sampling_params: SamplingParams, **options: Any) -> Iterator[str]:
        """One answer's text, piece by piece. Closing the iterator early aborts the rest. Raises BadRequest."""
        ids = self.chat_token_ids(messages, **options)
        job = _Job(self)
        job.add(None, ids, sampling_params, 0)
        try:
            yield from job.pieces()
        finally:
            job.abort()

    def _grammar_tokenizer(self, model: ModelConfig) -> Any:
        text = self._need_text()
        return grammar_tokenizer(text.tokenizer, text.stop_token_ids, model.vocab_size)

    def _grammar(self, sampling: SamplingParams) -> Grammar | None:
        """Compiled once here, so that a bad one is refused before anything runs. Raises BadRequest."""
        if sampling.structured_outputs is None:
            return None
        grammar, compiler = to_grammar(sampling.structured_outputs), self._engine.compiler
        assert compiler is not None
        self._need_text()
        check_grammar(grammar, compiler.tokenizer())
        return Grammar(grammar)

    def _need_text(self) -> TextTools:
        if self.text is None:
            raise BadRequest("there is no tokenizer (skip_tokenizer_init): give prompts as token ids", "prompt")
        return self.text

    def _params_for(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise BadRequest(f"{count} prompts, but {len(given)} sampling_params", "sampling_params")
        return list(given)

    def _ids_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, dict):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), [int(token_id) for token_id in prompt["prompt_token_ids"]]
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._need_text().tokenizer.encode(prompt, add_special_tokens=True)
        return None, [int(token_id) for token_id in prompt]

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        params: list[SamplingParams],
        priorities: list[int],
        bar: bool,
    ) -> list[RequestOutput]:
        job = _Job(self)
        for (text, token_ids), sampling, priority in zip(prompts, params, priorities, strict=True):
            job.add(text, token_ids, sampling, priority)
        try:
            with tqdm(
                total=len(prompts),
                unit="prompt",
                disable=not bar or len(prompts) < BAR_FROM_PROMPTS,
                dynamic_ncols=True,
            ) as progress:
                job.run(progress)
        except BaseException:
            job.abort()  # Ctrl-C: the next call starts with an empty engine
            raise
        return job.outputs


class _Job:
    """One call of ``generate``: its requests in the engine, and what has come back."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._core = llm._engine.core
        self._pending: dict[str, tuple[Assembler, RequestOutput]] = {}
        self._requests: list[Any] = []
        self.outputs: list[RequestOutput] = []

    def add(self, text: str | None, token_ids: list[int], sampling: SamplingParams, priority: int) -> None:
        """Checked and prepared; nothing reaches the engine before all prompts of the call were accepted."""
        llm = self._llm
        request_id = str(next(llm._ids))
        requests = prepare(
            request_id,
            token_ids,
            sampling,
            llm.limits,
            seeds=llm._seeds,
            priority=priority,
            grammar=llm._grammar(sampling),
        )
        output = RequestOutput(request_id, text, token_ids, [], finished=False)
        tokenizer = None if llm.text is None else llm.text.tokenizer
        for index, request in enumerate(requests):
            assembler = Assembler(index, sampling, tokenizer, llm.limits.stop_token_ids)
            output.outputs.append(assembler.output)
            self._pending[request.request_id] = (assembler, output)
        if sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        self._requests += requests
        self.outputs.append(output)

    def run(self, progress: Any) -> None:
        for request in self._requests:
            self._core.add(request)
        generated = 0
        while self._core.has_work:
            for delta in self._core.step():
                generated += len(delta.token_ids)
                if self._take(delta):
                    progress.update(1)
                    progress.set_postfix_str(f"{generated / max(progress.format_dict['elapsed'], 1e-9):.0f} tok/s")
        self._core.step()  # idle: audits that no block was left behind

    def pieces(self) -> Iterator[str]:
        for request in self._requests:
            self._core.add(request)
        while self._pending:
            for delta in self._core.step():
                before = len(self.outputs[0].outputs[0].text)
                self._take(delta)
                if len(self.outputs[0].outputs[0].text) > before:
                    yield self.outputs[0].outputs[0].text[before:]

    def abort(self) -> None:
        for request_id in self._pending:
            self._core.abort(request_id)
        while self._core.has_work:
            self._core.step()

    def _take(self, delta: RequestDelta) -> bool:
        """Whether this delta finished its prompt."""
        entry = self._pending.get(delta.request_id)
        if entry is None:
            return False  # the abort that a stop string asked for
        assembler, output = entry
        piece = assembler.feed(delta)
        if piece.prompt_logprobs is not None and assembler.output.index == 0:
            known: list[dict[int, Logprob] | None] = output.prompt_logprobs or [None]
            output.prompt_logprobs = known + list(piece.prompt_logprobs)
        if piece.finish_reason is None:
            return False
        if piece.abort:
            self._core.abort(delta.request_id)
        del self._pending[delta.request_id]
        output.num_cached_tokens = max(output.num_cached_tokens, assembler.num_cached_tokens)
        output.finished = all(one.finish_reason is not None for one in output.outputs)
        return output.finished


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(list[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _advance(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
