"""One function per parser that reads what others wrote. Each takes any bytes and raises only for a fault of ours.

``python -m tests.fuzz NAME`` runs one under atheris; tests/fuzz/test_targets.py runs all on seeds and on hypothesis' bytes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from fastqwen.benchmark.http_load import Stream, take_event
from fastqwen.client.assemble import Assembler
from fastqwen.client.remote import deltas_of_line
from fastqwen.errors import BadRequest, FastqwenError
from fastqwen.ipc import wire
from fastqwen.models import read_config
from fastqwen.records import RequestDelta, SamplingParams
from fastqwen.server.answer.response_store import ResponseStore
from fastqwen.server.dialects.body import parse
from fastqwen.server.dialects.conversation import for_template
from fastqwen.server.dialects.messages import MessagesRequest
from fastqwen.server.dialects.responses_request import ResponsesRequest
from fastqwen.server.dialects.schema import ChatRequest, CompletionRequest, TokenizeRequest
from fastqwen.terminal.batch import read_requests
from fastqwen.text import strict_json
from fastqwen.text.answer import AnswerParser, Parts, TextParser
from fastqwen.text.detokenizer import Detokenizer
from fastqwen.text.formats import derive_formats
from fastqwen.text.gguf_tokenizer import tokenizer_from_gguf
from fastqwen.text.grammar import check_grammar, grammar_tokenizer, to_grammar
from fastqwen.text.qwen_tiktoken import QwenTiktoken
from fastqwen.text.react import ReActParser
from fastqwen.text.template import CHATML, ChatTemplate
from fastqwen.text.tool_calls import Hermes, Xml
from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
from fastqwen.weights.gguf_config import config_from_gguf
from fastqwen.weights.gguf_file import GgufFile
from fastqwen.weights.safetensors_file import INDEX, SafetensorsCheckpoint
from tests.server.harness import END, ByteTokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
            },
        },
    }
]
FORMATS = derive_formats(ChatTemplate(CHATML, origin="test"))
TOKENIZER = ByteTokenizer()
TOKENIZER.limit_length(4096)


class Reader:
    """Small choices from the front of the input; what is left is the text."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def number(self) -> int:
        first, self._data = self._data[:1], self._data[1:]
        return first[0] if first else 0

    def rest(self) -> bytes:
        return self._data

    def text(self) -> str:
        return self._data.decode("utf-8", "replace")


def parsed(make: Callable[[], TextParser], data: bytes) -> None:
    """Read in pieces or whole: the same parts."""
    reader = Reader(data)
    step = 1 + reader.number() % 16
    text = reader.text()
    parser, parts = make(), Parts()
    for start in range(0, len(text), step):
        parts.add(parser.push(text[start : start + step]))
    parts.add(parser.finish())
    parser = make()
    whole = parser.push(text)
    whole.add(parser.finish())
    assert parts == whole
    for call in parts.calls:
        json.loads(call.arguments)


def hermes(data: bytes) -> None:
    parsed(lambda: AnswerParser(opened=bool(data[:1] > b"\x7f"), calls=Hermes(), tool_names=["weather"]), data)


def xml(data: bytes) -> None:
    parsed(lambda: AnswerParser(opened=bool(data[:1] > b"\x7f"), calls=Xml(TOOLS), tool_names=["weather"]), data)


def react(data: bytes) -> None:
    parsed(lambda: ReActParser(TOOLS), data)


def strict(data: bytes) -> None:
    """Accepts nothing that Python's own parser refuses, and nothing that could not be written again."""
    text = data.decode("utf-8", "replace")
    try:
        value = strict_json.loads(text)
    except strict_json.StrictJsonError:
        return
    assert strict_json.depth(text) <= strict_json.MAX_DEPTH
    written = json.dumps(value, allow_nan=True, ensure_ascii=False)
    written.encode()
    assert _without_infinity(json.loads(written)) == _without_infinity(json.loads(text))


def _without_infinity(value: Any) -> Any:
    """1e999 is infinite for Python; callers refuse it where they know which field it is in."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_infinity(one) for key, one in value.items()}
    return [_without_infinity(one) for one in value] if isinstance(value, list) else value


def wire_messages(data: bytes) -> None:
    for decoder in (wire.to_engine, wire.from_engine):
        try:
            message = decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, FastqwenError):
            continue
        decoder.decode(wire.encode(message))


BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, ResponsesRequest, MessagesRequest)


def request_body(data: bytes) -> None:
    """What a route does with a body before it needs the model."""
    reader = Reader(data)
    kind = BODIES[reader.number() % len(BODIES)]
    try:
        body: Any = parse(kind, reader.rest())
        if isinstance(body, ResponsesRequest):
            body = body.as_chat(body.conversation_items(ResponseStore()))
        if isinstance(body, MessagesRequest):
            body = body.as_chat()
        if isinstance(body, (ChatRequest, TokenizeRequest)):
            messages = for_template(body.messages or [], FORMATS, body.warnings)
            json.dumps(messages, allow_nan=False).encode()
        if isinstance(body, (ChatRequest, CompletionRequest)):
            sampling = body.sampling({}, logprobs=None)
            msgspec.msgpack.encode(sampling)
            structured = body.structured()
            if structured is not None:
                to_grammar(structured)
    except BadRequest as error:
        assert str(error)
        str(error).encode()  # it is going to be sent


TEMPLATE = ChatTemplate(CHATML, origin="fuzz")


def template_input(data: bytes) -> None:
    """A user's text is never a control token, whatever it spells."""
    reader = Reader(data)
    cut = reader.number()
    text = reader.text()
    messages = [{"role": "user", "content": text[:cut]}, {"role": "assistant", "content": text[cut:]}]
    plain = TEMPLATE.encode(TOKENIZER, [{**one, "content": ""} for one in messages])
    ids = TEMPLATE.encode(TOKENIZER, messages)
    assert sum(one >= 256 for one in ids) == sum(one >= 256 for one in plain)
    assert TOKENIZER.decode(ids).count(text[:cut].strip()) >= 1 or "\ue0f0" in text


def detokenizer(data: bytes) -> None:
    """Streamed text is the whole text, up to the first stop string."""
    reader = Reader(data)
    stop_chars, min_tokens = reader.number() % 4, reader.number() % 4
    tail = reader.rest()
    stop = tail[:stop_chars].decode("utf-8", "ignore")
    ids = [one + 3 * (one == 255 and len(tail) % 2) for one in tail[stop_chars:]]
    feed = Detokenizer(TOKENIZER, stop=[stop] if stop else [], min_tokens=min_tokens)
    shown = ""
    for token_id in ids:
        shown += feed.push(token_id)
        if feed.stopped_by is not None:
            break
    shown += feed.finish()
    whole = bytes(one for one in ids if one < 256).decode("utf-8", "replace")
    assert whole.startswith(shown)
    if feed.stopped_by is None:
        assert shown == whole


def assembler(data: bytes) -> None:
    """Deltas of any size give one finish_reason and one text."""
    reader = Reader(data)
    size, stop_chars = 1 + reader.number() % 8, reader.number() % 4
    tail = reader.rest()
    stop = tail[:stop_chars].decode("utf-8", "ignore")
    ids = list(tail[stop_chars:]) or [0]

    def run(step: int) -> tuple[str, list[int]]:
        made = Assembler(0, SamplingParams(stop=[stop] if stop else []), TOKENIZER, [END])
        for start in range(0, len(ids), step):
            last = start + step >= len(ids)
            made.feed(
                RequestDelta(
                    request_id="x", token_ids=ids[start : start + step], finish_reason="length" if last else None
                )
            )
            if made.output.finish_reason is not None:
                break
        assert made.output.finish_reason in ("stop", "length")
        return made.output.text, made.output.token_ids

    assert run(size) == run(1)


def server_events(data: bytes) -> None:
    """What our own clients make of a server that says anything."""
    for line in data.decode("utf-8", "replace").splitlines():
        try:
            for delta in deltas_of_line(line):
                assert isinstance(delta.content or "", str)
        except FastqwenError:
            pass
    for raw in data.split(b"\n"):
        if raw.startswith(b"data: "):
            take_event(raw, Stream(start_s=0.0), 0.0)


@cache
def folder() -> Path:
    """Of this process; files are written into memory where the system has a place for that."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    kept.append(made := tempfile.TemporaryDirectory(prefix="fuzz-", dir=parent))
    return Path(made.name)


kept: list[tempfile.TemporaryDirectory[str]] = []


def written(name: str, data: bytes) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


def refusal(work: Callable[[], Any]) -> None:
    try:
        work()
    except FastqwenError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)


def gguf(data: bytes) -> None:
    path = written("model.gguf", data)

    def read() -> None:
        file = GgufFile(path)
        config = config_from_gguf(file)
        tokenizer_from_gguf(file.metadata, str(path)).encode("abc <|1|>")
        checkpoint = GgufCheckpoint(file, config)
        for name in checkpoint.names()[:4]:
            checkpoint.shape(name)

    refusal(read)


def safetensors(data: bytes) -> None:
    (folder() / INDEX).unlink(missing_ok=True)
    written("model.safetensors", data)

    def read() -> None:
        checkpoint = SafetensorsCheckpoint(folder())
        for name in checkpoint.names()[:4]:
            checkpoint.shape(name)
            checkpoint.read(name)

    refusal(read)


def config_json(data: bytes) -> None:
    written("config.json", data)
    refusal(lambda: read_config(folder()))


def tiktoken(data: bytes) -> None:
    path = written("qwen.tiktoken", data)
    refusal(lambda: QwenTiktoken(path).encode("abc"))


def chat_template(data: bytes) -> None:
    """A template is read in the server, and rendered only in a worker that can be killed."""
    refusal(lambda: ChatTemplate(data.decode("utf-8", "replace"), origin="fuzz"))


@cache
def words() -> Any:
    return grammar_tokenizer(TOKENIZER, [END], TOKENIZER.vocab_size)


def grammar(data: bytes) -> None:
    """Regex, Lark, GBNF or schema: usable, or refused with a reason."""
    from fastqwen.records import StructuredOutputs

    reader = Reader(data)
    field = ("regex", "grammar", "json", "choice")[reader.number() % 4]
    value: Any = [reader.text()] if field == "choice" else reader.text()
    refusal(lambda: check_grammar(to_grammar(StructuredOutputs(**{field: value})), words()))


def batch_lines(data: bytes) -> None:
    path = written("batch.jsonl", data)
    refusal(lambda: read_requests(path))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "hermes": hermes, "xml": xml, "react": react, "strict-json": strict, "wire": wire_messages, "request-body": request_body,
    "template-input": template_input, "detokenizer": detokenizer, "assembler": assembler, "server-events": server_events,
    "gguf": gguf, "safetensors": safetensors, "config-json": config_json, "tiktoken": tiktoken,
    "chat-template": chat_template, "grammar": grammar, "batch-lines": batch_lines,
}  # fmt: skip
