"""A model in this process as a conversation's other side."""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator
from typing import Any

from fastqwen.client.assemble import Assembler
from fastqwen.client.engine import BlockingStream, EngineClient, error_of
from fastqwen.client.engine_thread import EngineThread
from fastqwen.client.history import Messages
from fastqwen.client.model import LoadedModel, batch_config
from fastqwen.client.prepare import prepare
from fastqwen.errors import BadCheckpoint, BadConfig
from fastqwen.hub import resolve
from fastqwen.records import SamplingParams
from fastqwen.text.answer import Parts, TextParser, prompt_opens_thinking
from fastqwen.text.load import own_generation_config

PROMPT_END_TOKENS = 16  # enough to see whether a prompt ends with an opened thinking block


class LocalPartner:
    """``options`` are EngineConfig's fields."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        config = batch_config(model, options)
        if config.skip_tokenizer_init:
            raise BadConfig("skip_tokenizer_init: a chat needs the tokenizer")
        path = resolve(model, revision=config.revision, weights=False, folder=config.download_dir)
        chat_format = own_generation_config(path).get("chat_format", "chatml")
        if chat_format != "chatml":
            raise BadCheckpoint(
                f"{path}: generation_config.json says chat_format {chat_format!r}, so this is no chat model; "
                "use its Chat version, or LLM(...).generate to continue texts"
            )
        self._model = LoadedModel(config)
        self._text = self._model.need_text()
        self._formats = self._model.formats
        self._thread = EngineThread(self._model.core, self._model.ready, num_threads=config.num_threads)
        self.engine: EngineClient[BlockingStream] = self._thread
        self._ids = itertools.count()
        self._seeds = random.Random(config.seed)  # noqa: S311 not a secret
        self.name = model
        self.names = [model]
        self.thinks: bool | None = self._formats.reasoning
        self.max_model_len: int | None = self._model.facts.max_model_len
        self.generation_config = self._text.generation_config

    def answer(
        self, messages: Messages, options: dict[str, Any], template_options: dict[str, Any] | None = None
    ) -> Generator[Parts, None, None]:
        facts = self._model.facts
        sampling = SamplingParams(**{"max_tokens": None, **self._text.default_sampling, **options})
        ids = self._model.chat_token_ids(messages, **(template_options or {}))
        assembler = Assembler(0, sampling, self._text.tokenizer, facts.stop_token_ids)
        parser = self._parser(ids)
        requests = prepare(
            str(next(self._ids)), ids, sampling, facts, seeds=self._seeds, tokenizer=self._text.tokenizer
        )
        with self.engine.stream(requests) as stream:
            for delta in itertools.chain.from_iterable(stream):
                piece = assembler.feed(delta)
                parts = Parts(content=piece.text) if parser is None else parser.push(piece.text)
                if parser is not None and piece.finish_reason is not None:
                    parts.add(parser.finish())
                if parts:
                    yield parts
                if piece.finish_reason in ("abort", "error"):
                    raise error_of(piece.error)
                if piece.finish_reason is not None:
                    return

    def _parser(self, prompt_ids: list[int]) -> TextParser | None:
        """None where the text is the answer, as it is."""
        end = self._text.tokenizer.decode(prompt_ids[-PROMPT_END_TOKENS:])
        return self._formats.parser(opened=self._formats.reasoning and prompt_opens_thinking(end))

    def count_tokens(
        self, messages: Messages, template_options: dict[str, Any] | None = None, *, add_generation_prompt: bool = True
    ) -> int:
        options = {**(template_options or {}), "add_generation_prompt": add_generation_prompt}
        return len(self._model.chat_token_ids(messages, **options))

    def text_of(self, token_ids: list[int]) -> str:
        return self._text.tokenizer.decode(token_ids)

    def close(self) -> None:
        self._thread.close()
