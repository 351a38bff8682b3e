"""Text work in a process of its own: ``python -m fastqwen.text.worker LOG_FORMAT [CHECKS]``, fed by ``fastqwen.text.pool``.

``CHECKS`` names the module whose function ``check`` reads requests' bodies, which this room knows nothing of.

Templates, tokenizers and grammars are given input by anybody. Here they can neither stall the server nor end it: the pool
kills a worker that takes too long, and a limit on memory ends one that takes too much.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, BadRequest, FastqwenError
from fastqwen.lifeline import end_with_parent
from fastqwen.logs import configure_logging
from fastqwen.model_config import ModelConfig
from fastqwen.text.chatml import PiecewiseChatMl
from fastqwen.text.load import TextTools, load_text
from fastqwen.text.memory import limit_memory
from fastqwen.text.template import ChatTemplate
from fastqwen.text.tokenizer import Tokenizer

EXTRA_MEMORY_BYTES = 2 * 2**30
LENGTH_BYTES = 4


class Begin(msgspec.Struct, frozen=True, tag=True):
    config: EngineConfig
    path: str
    model: ModelConfig


class Encode(msgspec.Struct, frozen=True, tag=True):
    text: str
    add_special_tokens: bool
    max_chars: int


class Render(msgspec.Struct, frozen=True, tag=True):
    """``conversation`` is JSON, in which numbers have no limits: the messages, and what else the template may look at.
    ``template`` stands in for the model's own."""

    conversation: str
    max_chars: int
    template: str | None = None

    @classmethod
    def of(
        cls, messages: list[dict[str, Any]], options: dict[str, Any], max_chars: int, template: str | None = None
    ) -> Render:
        return cls(json.dumps([messages, options]), max_chars, template)

    def run(self, tokenizer: Tokenizer, template: ChatTemplate | PiecewiseChatMl | None) -> list[int]:
        messages, options = json.loads(self.conversation)
        if self.template is not None:
            template = self._own(template)
        assert template is not None, "the server refuses messages where there is none"
        return template.encode(tokenizer, messages, **options)

    def _own(self, model_s: ChatTemplate | PiecewiseChatMl | None) -> ChatTemplate:
        """Raises BadRequest for a template that does not parse."""
        try:
            if isinstance(model_s, ChatTemplate):
                return model_s.with_source(self.template or "", origin="chat_template")
            return ChatTemplate(self.template or "", origin="chat_template")
        except BadCheckpoint as error:
            raise BadRequest(str(error), "chat_template") from None


class Compile(msgspec.Struct, frozen=True, tag=True):
    grammar: str


class Check(msgspec.Struct, frozen=True, tag=True):
    """A request's body that may take long to read, and is sent behind this. ``kind`` is the checking module's name for what it
    should be."""

    kind: str
    strict_fields: bool
    max_chars: int


class Checked(msgspec.Struct, frozen=True, tag=True):
    """``body`` is the same request without what has no effect; None where that is the body as it was sent."""

    body: bytes | None
    warnings: list[str]


class Ids(msgspec.Struct, frozen=True, tag=True):
    token_ids: list[int]


class Refused(msgspec.Struct, frozen=True, tag=True):
    message: str
    param: str | None = None
    code: str | None = None


TextJob = Encode | Render | Compile
Job = TextJob | Check
Answer = Ids | Checked | Refused
_jobs = msgspec.msgpack.Decoder(Job)
_begin = msgspec.msgpack.Decoder(Begin)
answers = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.Encoder().encode


def main() -> int:
    end_with_parent()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing but answers may reach the pool
    configure_logging(sys.argv[1], "text")
    logging.getLogger().setLevel(logging.ERROR)  # what is to be said about these files the server has said
    first = _read(source)
    if first is None:
        return 0
    begin = _begin.decode(first)
    limit_memory(EXTRA_MEMORY_BYTES)
    checks = sys.argv[2] if len(sys.argv) > 2 else ""
    try:
        worker = _Worker(begin, load_text(Path(begin.path), begin.model, begin.config), checks)
    except FastqwenError as error:
        _write(sink, Refused(str(error)))
        return 1
    _write(sink, Ids([]))
    while (data := _read(source)) is not None:
        _write(sink, worker.answer(data, lambda: _read(source) or b""))
    return 0


class _Worker:
    def __init__(self, begin: Begin, text: TextTools, checks: str) -> None:
        self._begin = begin
        self._text = text
        self._checks = checks

    def answer(self, data: bytes, read_body: Callable[[], bytes]) -> Answer:
        try:
            job = _jobs.decode(data)
            return self._check(job, read_body()) if isinstance(job, Check) else Ids(self._ids(job))
        except BadRequest as error:
            return Refused(str(error), error.param, error.code)
        except FastqwenError as error:
            return Refused(str(error))
        except (MemoryError, RecursionError) as error:
            return Refused(f"this input needs too much to be processed ({type(error).__name__})")

    @functools.cached_property
    def _check(self) -> Callable[[Check, bytes], Checked]:
        found: Callable[[Check, bytes], Checked] = importlib.import_module(self._checks).check
        return found

    def _ids(self, job: TextJob) -> list[int]:
        tokenizer = self._text.tokenizer
        if isinstance(job, Compile):
            from fastqwen.text.grammar import check_grammar

            check_grammar(job.grammar, self._grammar_tokenizer)
            return []
        tokenizer.max_chars = job.max_chars
        if isinstance(job, Encode):
            return tokenizer.encode(job.text, add_special_tokens=job.add_special_tokens)
        return job.run(tokenizer, self._text.template)

    @functools.cached_property
    def _grammar_tokenizer(self) -> Any:
        return self._text.grammar_tokenizer(self._begin.model)


def _read(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    return source.read(int.from_bytes(head, "little"))


def _write(sink: BinaryIO, answer: Answer) -> None:
    data = encode(answer)
    sink.write(len(data).to_bytes(LENGTH_BYTES, "little"))
    sink.write(data)
    sink.flush()


if __name__ == "__main__":
    sys.exit(main())
