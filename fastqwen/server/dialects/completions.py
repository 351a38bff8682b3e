"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from fastqwen.client.assemble import Piece
from fastqwen.client.prepare import truncated
from fastqwen.client.thinking import thinking_parser, token_budget
from fastqwen.errors import BadRequest
from fastqwen.outputs import CompletionOutput, Logprob
from fastqwen.records import ALL
from fastqwen.server.answer.generation import Generation, GenerationOptions
from fastqwen.server.answer.merge import gather, merge
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.grammars import answer_grammar
from fastqwen.server.dialects.openai import WITHOUT_MEANING, OpenAIWork, finite, prompt_logprobs_json
from fastqwen.server.dialects.schema import CompletionRequest, as_list
from fastqwen.server.dialects.thinking import NO_LIMIT
from fastqwen.server.http.sse import encode, event

MAX_PROMPTS = 1024
MAX_SEQUENCES = 4096  # prompts times answers of one request
USUAL_TOKENS = 16  # of an answer, where the request does not say: as in OpenAI's API
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


class Completion(OpenAIWork):
    """Prompts, each with n answers. ``events`` streams them, ``response`` waits for the whole."""

    _body: CompletionRequest

    def __init__(self, state: ServerState, body: CompletionRequest, *, explain_cache: bool) -> None:
        super().__init__(state, body, prefix="cmpl", explain_cache=explain_cache)
        self._n = body.n or 1
        self._ids_left: set[int] = set()  # answers that have not told their prompt's ids
        self._offsets: dict[int, int] = {}  # of each answer's next token in its text
        self._best_of = body.best_of or self._n  # 0, the end of its documented range, asks for nothing more

    async def prepare(self) -> None:
        """Tokenise and check everything before anything runs. Raises BadRequest."""
        body = self._body
        self._check()
        changes: dict[str, Any] = {"logprobs": body.logprobs}
        if body.max_tokens is None:
            changes["max_tokens"] = USUAL_TOKENS
        if self._best_of > self._n:
            changes.update(n=self._best_of, logprobs=body.logprobs or 0)
        sampling = body.sampling(self._state.text.default_sampling, **changes)
        if body.echo and body.logprobs is not None:
            counts = (body.logprobs, sampling.prompt_logprobs or 0)
            sampling.prompt_logprobs = ALL if ALL in counts else max(counts)
        await self.forbid_words(sampling)
        grammar = await answer_grammar(self._state, body.structured())
        options = GenerationOptions(
            priority=body.priority, cache_salt=body.cache_salt, grammar=grammar, no_answer=body.max_tokens == 0
        )
        facts = self._state.facts()
        prompts = [
            truncated(one, body.truncate_prompt_tokens, facts, side=body.truncation_side)
            for one in await self._prompts()
        ]
        if len(prompts) * sampling.n > MAX_SEQUENCES:
            raise BadRequest(
                f"{len(prompts)} prompts with {sampling.n} answers each: at most {MAX_SEQUENCES} in one request", "n"
            )
        for index, token_ids in enumerate(prompts):
            self.generations.append(self.generated(index, token_ids, sampling, self._with_budget(options, token_ids)))
        self._ids_left = set(range(len(prompts) * self._n))
        if self._explain_cache and len(prompts) > 1:
            raise BadRequest("explain_cache explains one prompt: send the prompts one by one", "explain_cache")
        if len(prompts) == 1:
            self._story = self._state.cache_stories.begin(prompts[0], self._state.salted(body.cache_salt))

    def _with_budget(self, options: GenerationOptions, token_ids: list[int]) -> GenerationOptions:
        """A grammar holds from the first token, so there is no thinking under one."""
        state, budget = self._state, self._body.thinking_token_budget
        thinking = token_budget(None if budget == NO_LIMIT else budget, state.formats)
        if thinking is None or options.grammar is not None:
            return options
        parser = partial(thinking_parser, token_ids, state.text.tokenizer, state.formats)
        return replace(options, thinking=thinking, make_parser=parser, whole_text=True)

    def _check(self) -> None:
        self.check_named_tokens(asked=self._body.logprobs is not None)
        if self._best_of < self._n:
            raise BadRequest(f"best_of is {self._best_of}, less than n, which is {self._n}", "best_of")
        if self._best_of > self._n and self._body.stream:
            raise BadRequest("best_of needs the whole answers and cannot be streamed", "best_of")

    async def response(self) -> dict[str, Any]:
        await gather([generation.finish() for generation in self.generations])
        choices = await self.written(self._choices)
        head = {**self.head("text_completion"), **WITHOUT_MEANING}
        return {**head, "choices": choices, "usage": self.usage(), **self.measured(), **self.notes()}

    def _choices(self) -> Iterator[dict[str, Any]]:
        best = [(one, output) for one in self.generations for output in self._best(one.outputs)]
        for index, (generation, output) in enumerate(best):
            yield self._choice(index, generation, output, echo=self._body.echo)

    async def events(self) -> AsyncGenerator[bytes, None]:
        body = self._body
        plain = not (self._always_usage or body.return_token_ids) and body.logprobs is body.prompt_logprobs is None
        head = self.head("text_completion")
        plain_head = b"data: " + encode(head)[:-1] + b',"choices":[{"index":'
        echo_left = set(range(len(self.generations) * self._n)) if self._body.echo else set()
        num_left = len(self.generations) * self._n
        sources = [one.pieces(number * self._n) for number, one in enumerate(self.generations)]
        async with aclosing(merge(sources)) as merged:
            async for index, piece in merged:
                if plain and piece.finish_reason is None and index not in echo_left:
                    if piece.text:
                        yield b'%b%d,"text":%b,"logprobs":null,"finish_reason":null}]}\n\n' % (
                            plain_head, index, encode(piece.text),
                        )  # fmt: skip
                    continue
                if not piece.token_ids and piece.finish_reason is None:
                    continue  # a chunk of the prompt's log-probabilities: they come with the first token
                generation = self.generations[index // self._n]
                chunk = {**head, "choices": [self._choice(index, generation, piece, echo=index in echo_left)]}
                echo_left.discard(index)
                num_left -= piece.finish_reason is not None
                if not num_left:
                    chunk.update(self.notes())
                if self._always_usage:
                    chunk["usage"] = self.usage()
                yield event(chunk)
        if self._final_usage:
            yield event({**head, "choices": [], "usage": self.usage(), **self.measured()})

    async def _prompts(self) -> list[list[int]]:
        prompts = as_list(self._body.prompt)
        if not prompts:
            raise BadRequest("the list of prompts is empty", "prompt")
        if len(prompts) > MAX_PROMPTS:
            raise BadRequest(f"{len(prompts)} prompts in one request, at most {MAX_PROMPTS} are allowed", "prompt")
        if self._body.suffix is not None:
            return [await self._infill(one, self._body.suffix) for one in prompts]
        special = self._body.add_special_tokens
        return [
            await self._state.tokenize(one, add_special_tokens=special) if isinstance(one, str) else one
            for one in prompts
        ]

    async def _infill(self, prompt: Any, suffix: str) -> list[int]:
        """The text between prompt and suffix, in the order that Qwen's coders were trained on."""
        ids = [self._state.text.tokenizer.token_id(token) for token in FIM_TOKENS]
        if None in ids:
            raise BadRequest(
                f"suffix needs a model that can fill gaps; this one's tokenizer has no {FIM_TOKENS[0]}", "suffix"
            )
        if not isinstance(prompt, str):
            raise BadRequest("with suffix the prompt must be text", "suffix")
        before = await self._state.tokenize(prompt, add_special_tokens=False)
        after = await self._state.tokenize(suffix, add_special_tokens=False)
        found: list[Any] = [ids[0], *before, ids[1], *after, ids[2]]
        return found

    def _best(self, outputs: list[CompletionOutput]) -> list[CompletionOutput]:
        """The n answers with the highest log-probability per token, where more than n were generated."""
        if len(outputs) == self._n:
            return outputs
        return sorted(outputs, key=lambda one: (one.cumulative_logprob or 0.0) / max(1, len(one.token_ids)))[
            : -self._n - 1 : -1
        ]

    def _choice(
        self, index: int, generation: Generation, said: CompletionOutput | Piece, *, echo: bool
    ) -> dict[str, Any]:
        """A whole answer, or what a piece adds to one. ``echo``: the prompt goes before it."""
        listed: list[dict[int, Logprob] | None] = list(said.logprobs or [])
        if echo:
            listed = [*(generation.prompt_logprobs or []), *listed]
        choice: dict[str, Any] = {
            "index": index,
            "text": (self._prompt_text(generation) if echo else "") + said.text,
            "logprobs": self._logprobs(index, listed, generation) if self._body.logprobs is not None else None,
            "finish_reason": said.finish_reason,
            "stop_reason": said.stop_reason,
        }
        choice |= {"token_ids": None, "prompt_token_ids": None, "prompt_logprobs": None}  # vLLM's clients read them
        if self._body.return_token_ids:
            choice["token_ids"] = said.token_ids
            choice["prompt_token_ids"] = generation.prompt_token_ids if index in self._ids_left else None
            self._ids_left.discard(index)
        if said.finish_reason is not None and self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(generation.prompt_logprobs)
        return choice

    def _prompt_text(self, generation: Generation) -> str:
        if isinstance(self._body.prompt, str):
            return self._body.prompt
        return self._state.text.tokenizer.decode(generation.prompt_token_ids)

    def _logprobs(self, index: int, listed: list[dict[int, Logprob] | None], generation: Generation) -> dict[str, Any]:
        """OpenAI's completions shape: parallel lists, which go on where the answer's last piece ended."""
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        offset = self._offsets.get(index, 0)
        for position, one in enumerate(listed):
            if one is None:
                token_id = generation.prompt_token_ids[position]
                token = self.token_name(token_id, self._state.text.tokenizer.token_text(token_id))
                chosen.append(None)
                top.append(None)
            else:
                token_id, first = next(iter(one.items()))
                token = self.token_name(token_id, first.decoded_token)
                chosen.append(finite(first.logprob))
                top.append(
                    {self.token_name(name, other.decoded_token): finite(other.logprob) for name, other in one.items()}
                )
            tokens.append(token)
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}
