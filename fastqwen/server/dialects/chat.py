"""POST /v1/chat/completions"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastqwen.client.assemble import Piece
from fastqwen.client.prepare import truncated
from fastqwen.client.thinking import prompt_end
from fastqwen.errors import BadRequest
from fastqwen.outputs import Logprob
from fastqwen.records import ALL
from fastqwen.server.answer.generation import Choice, GenerationOptions, parts_of
from fastqwen.server.answer.request_limits import check_logprobs
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.conversation import for_template, rendered
from fastqwen.server.dialects.grammars import answer_grammar
from fastqwen.server.dialects.openai import WITHOUT_MEANING, OpenAIWork, finite, prompt_logprobs_json
from fastqwen.server.dialects.schema import ChatRequest
from fastqwen.server.dialects.thinking import thinking_options
from fastqwen.server.dialects.tools import tool_options
from fastqwen.server.http.sse import encode, event
from fastqwen.text import react
from fastqwen.text.answer import THINK, THINK_END, Parts, prompt_opens_thinking
from fastqwen.text.content import text_of
from fastqwen.text.tool_calls import Call


class Chat(OpenAIWork):
    """``events`` streams the answer, ``response`` waits for the whole."""

    _body: ChatRequest

    def __init__(
        self, state: ServerState, body: ChatRequest, *, explain_cache: bool = False, shortens: bool = False
    ) -> None:
        super().__init__(state, body, prefix="chatcmpl", explain_cache=explain_cache)
        self._shortens = shortens
        self._num_calls: dict[int, int] = {}
        self._echoed = ""

    async def prepare(self) -> None:
        """Render, tokenise and check before anything runs. Raises BadRequest."""
        body, state = self._body, self._state
        if body.top_logprobs and not body.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        self.check_named_tokens(asked=bool(body.logprobs))
        facts, formats = state.facts(), state.formats
        check_logprobs(state.config, "top_logprobs", body.top_logprobs, facts.model.vocab_size)
        tools = tool_options(body, formats, self.warnings)
        thinking = thinking_options(body, formats, state.config.default_chat_template_kwargs)
        messages = tools.messages(for_template(body.messages, formats, self.warnings), formats)
        template_options = {**thinking.template_options, **tools.template_options(formats)}
        token_ids = await rendered(
            state,
            messages,
            template_options,
            self.warnings,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template=body.chat_template,
        )
        token_ids = truncated(token_ids, body.truncate_prompt_tokens, facts, side=body.truncation_side)
        if body.echo and messages[-1]["role"] == "assistant":
            self._echoed = text_of(messages[-1]["content"])
        if len(token_ids) >= facts.max_model_len:
            raise BadRequest(
                f"the messages have {len(token_ids)} tokens, but this model's maximum context length is {facts.max_model_len} "
                "tokens, prompt and answer together. Please reduce the length of the input prompt: shorten the conversation",
                "messages",
                "context_length_exceeded",
            )
        token_ids, opened = self._open_thinking(
            token_ids, constrained=body.structured() is not None or bool(tools.required)
        )
        grammar = await answer_grammar(state, body.structured(), tools, opened=opened)
        sampling_changes = self._sampling_changes(tools.tools, facts.max_model_len - len(token_ids))
        sampling = body.sampling(state.text.default_sampling, **sampling_changes)
        await self.forbid_words(sampling)
        options = GenerationOptions(
            priority=body.priority,
            cache_salt=body.cache_salt,
            grammar=grammar,
            make_parser=lambda: formats.parser(opened=opened, tools=tools.tools),
            single_call=tools.single,
            thinking=thinking,
            shortens=self._shortens,
            no_answer=sampling_changes.get("max_tokens", body.max_tokens) == 0,
        )
        self.generations = [self.generated(0, token_ids, sampling, options)]
        self._story = state.cache_stories.begin(
            token_ids,
            state.salted(body.cache_salt),
            messages=[(message.role, message.content) for message in body.messages],
            tools=tools.tools,
        )

    def _open_thinking(self, token_ids: list[int], *, constrained: bool) -> tuple[list[int], bool]:
        """The prompt, and whether the answer begins inside a thinking block.

        A model that may open the block itself has it opened where a grammar must know when the answer begins.
        """
        tokenizer, formats = self._state.text.tokenizer, self._state.formats
        end = prompt_end(token_ids, tokenizer)
        opened = formats.reasoning and prompt_opens_thinking(end)
        may_think = formats.reasoning and formats.has_switch("enable_thinking") and not end.endswith(THINK_END)
        begins = self._body.add_generation_prompt is not False and not self._body.continue_final_message
        if constrained and may_think and not opened and begins:
            return token_ids + tokenizer.encode(f"{THINK}\n"), True
        return token_ids, opened

    def _sampling_changes(self, tools: list[dict[str, Any]], room_tokens: int) -> dict[str, Any]:
        """``room_tokens``: what the prompt leaves of the context; the model's own length of an answer is cut to it."""
        body = self._body
        changes: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        if body.max_completion_tokens is not None:
            changes["max_tokens"] = body.max_completion_tokens
        elif body.max_tokens is None:
            usual = self._state.text.default_sampling.get("max_tokens")
            changes["max_tokens"] = None if usual is None else min(usual, room_tokens)
        if tools and self._state.formats.tools == "react":
            given = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
            changes["stop"] = [*given, react.STOP]
        return changes

    async def response(self) -> dict[str, Any]:
        generation = self.generation
        await generation.finish()
        choices = await self.choices()
        return {
            **self.head("chat.completion"),
            **WITHOUT_MEANING,
            "choices": choices,
            "usage": self.usage(),
            **({"prompt_token_ids": generation.prompt_token_ids} if self._body.return_token_ids else {}),
            **self._prompt_text(),
            **self.measured(),
            **self._ending(),
        }

    async def choices(self, **more: Any) -> list[Any]:
        """The whole answers, once they are there, each with ``more`` in it."""
        return await self.written(lambda: ({**self._choice(choice), **more} for choice in self.generation.choices))

    async def events(self) -> AsyncGenerator[bytes, None]:
        generation = self.generation
        head = self.head("chat.completion.chunk")
        plain_head = b"data: " + encode(head)[:-1] + b',"choices":[{"index":'
        plain = not self._always_usage and not self._body.return_token_ids
        for choice in generation.choices:
            yield event(self._first_chunk(head, choice.index))
        num_left = len(generation.choices)
        async with aclosing(generation.pieces()) as pieces:
            async for index, piece in pieces:
                if plain and piece.parts is None and piece.logprobs is None and piece.finish_reason is None:
                    if piece.text:  # nearly all tokens of nearly all streams come through here
                        yield b'%b%d,"delta":{"content":%b},"finish_reason":null}]}\n\n' % (
                            plain_head, index, encode(piece.text),
                        )  # fmt: skip
                    continue
                num_left -= piece.finish_reason is not None
                for chunk in self._chunks(head, index, piece, last=num_left == 0):
                    if self._always_usage:
                        chunk["usage"] = self.usage()
                    yield event(chunk)
        if self._final_usage:
            yield event({**head, "choices": [], "usage": self.usage(), **self.measured()})

    def _first_chunk(self, head: dict[str, Any], index: int) -> dict[str, Any]:
        chunk = self._chunk(head, index, {"role": "assistant", "content": self._echoed})
        if self._body.return_token_ids and index == 0:
            chunk["prompt_token_ids"] = self.generation.prompt_token_ids
        if index == 0:
            chunk.update(self._prompt_text())
        if self._always_usage:
            chunk["usage"] = self.usage()
        return chunk

    def _prompt_text(self) -> dict[str, Any]:
        """What the template made of the messages, for who asks."""
        if not self._body.return_prompt_text:
            return {}
        return {"prompt_text": self._state.text.tokenizer.decode(self.generation.prompt_token_ids)}

    def _ending(self) -> dict[str, Any]:
        """What comes once, with the whole answer or its last chunk."""
        listed = (
            prompt_logprobs_json(self.generation.prompt_logprobs) if self._body.prompt_logprobs is not None else None
        )
        return {**({} if listed is None else {"prompt_logprobs": listed}), **self.notes()}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        output, parts = choice.assembler.output, choice.answer
        content = self._echoed + parts.content
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if parts.calls else "")}
        message["reasoning"] = None  # vLLM's clients read it
        message.update(self._reasoning(parts))
        if parts.calls or self._body.tools:  # who gave tools walks through the calls, also where there are none
            message["tool_calls"] = [call_json(call) for call in parts.calls]
        return {
            "index": output.index,
            "message": message,
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            **({"token_ids": output.token_ids} if self._body.return_token_ids else {}),
        }

    def _chunks(self, head: dict[str, Any], index: int, piece: Piece, *, last: bool) -> list[dict[str, Any]]:
        """None for a piece that holds nothing for the reader yet, such as half of a character."""
        deltas = self._deltas(index, parts_of(piece))
        tells_ids = self._body.return_token_ids and bool(piece.token_ids)
        if not deltas and (piece.logprobs is not None or tells_ids):
            deltas = [{"content": ""}]
        if not deltas and piece.finish_reason is None:
            return []
        chunks = [self._chunk(head, index, delta) for delta in deltas or [{}]]
        if piece.logprobs is not None:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(piece.logprobs)
        if tells_ids:
            chunks[0]["choices"][0]["token_ids"] = piece.token_ids
        if piece.finish_reason is not None:
            chunks[-1]["choices"][0].update(finish_reason=piece.finish_reason, stop_reason=piece.stop_reason)
            if last:
                chunks[-1].update(self._ending())
        return chunks

    def _deltas(self, index: int, parts: Parts) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if reasoning := self._reasoning(parts):
            deltas.append(reasoning)
        if parts.content:
            deltas.append({"content": parts.content})
        for call in parts.calls:
            number = self._num_calls.get(index, 0)
            self._num_calls[index] = number + 1
            deltas.append({"tool_calls": [{"index": number, **call_json(call)}]})
        return deltas

    def _reasoning(self, parts: Parts) -> dict[str, Any]:
        """Under both of the names that clients look for."""
        if not parts.reasoning or self._body.include_reasoning is False:
            return {}
        return {"reasoning_content": parts.reasoning, "reasoning": parts.reasoning}

    @staticmethod
    def _chunk(head: dict[str, Any], index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": delta, "finish_reason": None}]}

    def _logprobs(self, listed: list[dict[int, Logprob]] | None) -> dict[str, Any] | None:
        if listed is None:
            return None
        return {"content": [self.token_logprobs(one) for one in listed]}

    def token_logprobs(self, one: dict[int, Logprob]) -> dict[str, Any]:
        """One token's, in OpenAI's shape."""
        entries = [self._entry(token_id, logprob) for token_id, logprob in one.items()]
        count = None if self._body.top_logprobs == ALL else self._body.top_logprobs or 0
        if self._body.logprob_token_ids:
            return {**entries[0], "top_logprobs": entries}
        ranked = sorted(one.items(), key=lambda item: item[1].rank or 0)[:count]
        return {**entries[0], "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in ranked]}

    def _entry(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        data = self._state.text.tokenizer.token_bytes(token_id)
        name = self.token_name(token_id, logprob.decoded_token)
        return {"token": name, "logprob": finite(logprob.logprob), "bytes": list(data)}


def call_json(call: Call) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
