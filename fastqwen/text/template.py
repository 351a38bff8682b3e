"""From messages to a prompt: the checkpoint's chat template, rendered in a sandbox."""

from __future__ import annotations

import datetime
import json
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastqwen.config import ContentFormat
from fastqwen.errors import BadCheckpoint, BadRequest
from fastqwen.text.content import appended, format_of, shaped
from fastqwen.text.memory import memory_limit
from fastqwen.text.tokenizer import Tokenizer, break_control_tokens

Message = dict[str, Any]
# What comes beside Jinja's own errors from its parser, its constant folding, Python's compiler, and a template at work.
UNREADABLE = (
    SyntaxError, RecursionError, MemoryError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError,
)  # fmt: skip
READ_WITHIN_S = 3.0  # of the thread's processor time, to parse a template or to render a few words with it
MESSAGE_WITHIN_S = 0.001  # as much more for each message
LOOK_AGAIN_S = 0.2
READ_WITHIN_BYTES = 2**30
MAX_POWER, MAX_BASE, MAX_REPEATED = 64, 2**32, 2**20

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class ChatTemplate:
    """Raises BadCheckpoint for a template that does not parse, BadRequest when it refuses the messages.

    ``tool_source`` is the checkpoint's template for requests with tools, where it has one of its own; ``source`` is then
    both, for those who look for words in it. ``content_format`` is how each of them gets contents; auto: as its loops tell.
    """

    def __init__(
        self,
        source: str,
        *,
        origin: str,
        variables: dict[str, Any] | None = None,
        tool_source: str | None = None,
        content_format: ContentFormat = "auto",
    ) -> None:
        self._sources = (source, tool_source)
        self._asked_format = content_format
        self.source = source if tool_source is None else f"{source}\n{tool_source}"
        self.origin = origin
        self._variables = variables or {}
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationBlocks],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            with _bounded(origin, READ_WITHIN_S):
                self._template = environment.from_string(source)
                self._tool_template = self._template if tool_source is None else environment.from_string(tool_source)
                self._format, self._tool_format = (
                    content_format if content_format != "auto" else format_of(environment.parse(one))
                    for one in (source, tool_source or source)
                )
        except (jinja2.TemplateError, *UNREADABLE) as error:
            told = " ".join(str(error).split())[:300] or type(error).__name__
            raise BadCheckpoint(f"{origin}: the chat template does not parse: {told}") from None

    def with_source(self, source: str, *, origin: str) -> ChatTemplate:
        """Another template that knows the same variables."""
        return ChatTemplate(source, origin=origin, variables=self._variables, content_format=self._asked_format)

    def with_content_format(self, content_format: ContentFormat) -> ChatTemplate:
        source, tool_source = self._sources
        return ChatTemplate(
            source,
            origin=self.origin,
            variables=self._variables,
            tool_source=tool_source,
            content_format=content_format,
        )

    def render(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> str:
        """``options`` are the template's own switches, such as enable_thinking."""
        try:
            template, wanted = (
                (self._template, self._format) if tools is None else (self._tool_template, self._tool_format)
            )
            with _bounded(self.origin, READ_WITHIN_S + MESSAGE_WITHIN_S * len(messages)):
                return template.render(
                    **self._variables,
                    **options,
                    messages=shaped(messages, wanted),
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                )
        except (jinja2.TemplateError, *UNREADABLE) as error:
            told = " ".join(str(error).split())[:300] or type(error).__name__
            raise BadRequest(f"the chat template refuses these messages: {told}", "messages") from None

    def encode(
        self, tokenizer: Tokenizer, messages: list[Message], *, continue_final_message: bool = False, **options: Any
    ) -> list[int]:
        """Ids of the rendered conversation. Control tokens that a message spells out stay plain text.

        ``continue_final_message``: the prompt ends with the last message's text, which the answer goes on from.
        """
        mark, end = (f"\ue0f0{secrets.token_hex(8)}\ue0f1" for _ in range(2))
        tools = options.pop("tools", None)
        if continue_final_message:  # the mark also keeps white space before it from being cut off
            messages = [*messages[:-1], {**messages[-1], "content": appended(messages[-1]["content"], end)}]
        rendered = self.render(
            _without_control(messages, tokenizer, mark), tools=_without_control(tools, tokenizer, mark), **options
        )
        if continue_final_message:
            rendered, found, _ = rendered.partition(end)
            if not found:
                raise BadRequest("the chat template does not write the last message's text", "continue_final_message")
        if len(rendered) > tokenizer.max_chars:
            tokenizer.check(rendered)
        return [token_id for part in rendered.split(mark) for token_id in tokenizer.encode(part)]


@contextmanager
def _bounded(origin: str, within_s: float) -> Iterator[None]:
    """Raises BadCheckpoint inside once this thread has computed for so long, MemoryError once the process has grown so much. Only
    in a program's main thread, where templates are read while a model is loaded; a server renders messages in processes that
    it can end."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    ends_s = time.thread_time() + within_s

    def give_up(number: int, frame: object) -> None:
        if (
            time.thread_time() < ends_s
        ):  # the timer counts what all threads compute, such as those of a model's products
            return
        raise BadCheckpoint(f"{origin}: the chat template does not come to an end within {within_s:.1f} s")

    before = signal.signal(signal.SIGVTALRM, give_up)
    # Again and again: what is raised inside a callback of C code may be lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, within_s, LOOK_AGAIN_S)
    try:
        with memory_limit(READ_WITHIN_BYTES):
            yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _without_control(value: Any, tokenizer: Tokenizer, mark: str) -> Any:
    if isinstance(value, str):
        return break_control_tokens(value, tokenizer.control_tokens, mark)
    if isinstance(value, list):
        return [_without_control(item, tokenizer, mark) for item in value]
    if isinstance(value, dict):
        return {key: _without_control(item, tokenizer, mark) for key, item in value.items()}
    return value


class _Sandbox(ImmutableSandboxedEnvironment):
    """Intercepted operators are computed while a template is rendered, never while it is parsed, and only so far."""

    intercepted_binops = frozenset({"**", "*"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int) and (abs(right) > MAX_POWER or abs(left) > MAX_BASE):
            raise jinja2.TemplateError("the template computes a power that is too large")
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(count, int) and len(text) * count > MAX_REPEATED:
                    raise jinja2.TemplateError("the template repeats a text too often")
        return super().call_binop(context, operator, left, right)


class _GenerationBlocks(Extension):
    """``{% generation %}`` marks what a model was trained on; when rendering a prompt it means nothing."""

    tags = {"generation"}  # noqa: RUF012 the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
