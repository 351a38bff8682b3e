"""Checks for any OpenAI-compatible server, each a short story over plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from fastqwen.client.remote import RemotePartner

TIMEOUT_S = 120.0
PROMPT = [{"role": "user", "content": "Count from one to ten in words, separated by commas."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Broken(Exception):
    """The server does not keep this promise; the text says how."""


class Missing(Exception):
    """The server refuses clearly, which is no fault but less than others offer."""


@dataclass(frozen=True)
class Result:
    name: str
    status: str  # ok, broken or missing
    detail: str


class Server:
    def __init__(self, url: str, api_key: str | None) -> None:
        partner = RemotePartner(url, api_key or "none")
        self.model, self.http = partner.name, partner.http
        self.http.timeout = TIMEOUT_S

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json={"model": self.model, **body})

    def chat(self, **more: Any) -> dict[str, Any]:
        """The first choice. Raises Missing where the server refuses, Broken for anything else but 200."""
        response = self.post(**{"messages": PROMPT, "temperature": 0, "max_tokens": 40, **more})
        if response.status_code in (400, 404, 422, 501):
            raise Missing(_message(response))
        if response.status_code != 200:
            raise Broken(f"status {response.status_code}: {_message(response)}")
        choice: dict[str, Any] = response.json()["choices"][0]
        return {**choice, "usage": response.json().get("usage")}

    def said(self, **more: Any) -> str:
        return self.chat(**more)["message"].get("content") or ""

    def streamed(self, **more: Any) -> str:
        chunks = self.stream(**more)
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    def stream(self, **more: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end with [DONE]."""
        body = {"model": self.model, "messages": PROMPT, "temperature": 0, "max_tokens": 40, "stream": True, **more}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise Missing(_message(response))
            data = [line[5:].strip() for line in response.iter_lines() if line.startswith("data:")]
        if not data or data[-1] != "[DONE]":
            raise Broken("the stream does not end with [DONE]")
        return [json.loads(one) for one in data[:-1]]


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)


def streamed_equals_whole(server: Server) -> str:
    wanted, found = server.said(), server.streamed()
    _demand(found == wanted, f"streamed {found[:60]!r}, whole {wanted[:60]!r}")
    return f"{len(wanted)} characters"


def finish_reason_once(server: Server) -> str:
    reasons = [choice.get("finish_reason") for chunk in server.stream() for choice in chunk["choices"]]
    given = [reason for reason in reasons if reason is not None]
    _demand(len(given) == 1, f"finish_reason came {len(given)} times")
    _demand(given[0] in ("stop", "length"), f"finish_reason is {given[0]!r}")
    return str(given[0])


def max_tokens_holds(server: Server) -> str:
    choice = server.chat(max_tokens=3)
    _demand(choice["finish_reason"] == "length", f"finish_reason is {choice['finish_reason']!r} after 3 tokens")
    used = (choice["usage"] or {}).get("completion_tokens")
    _demand(used == 3, f"usage says {used} completion tokens")
    return "3 tokens, length"


def usage_adds_up(server: Server) -> str:
    usage = server.chat()["usage"]
    _demand(isinstance(usage, dict), "there is no usage")
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    _demand(usage["total_tokens"] == total, f"{usage['total_tokens']} is not {total}")
    last = server.stream(stream_options={"include_usage": True})[-1]
    _demand(
        last.get("choices") == [] and bool(last.get("usage")),
        "with include_usage the last chunk has no usage of its own",
    )
    return f"{total} tokens"


def stop_strings(server: Server) -> str:
    """A stop string that begins in one token and ends in another; the text that only begins like one stays."""
    plain = server.said()
    if len(plain) < 12:
        raise Missing("the model said too little to stop it")
    stop = plain[6:10]
    wanted = plain[: plain.find(stop)]
    for name, found in (("whole", server.said(stop=[stop])), ("streamed", server.streamed(stop=[stop]))):
        _demand(found == wanted, f"{name}: {found[:60]!r} instead of {wanted[:60]!r} before {stop!r}")
    return repr(stop)


def stop_overlap(server: Server) -> str:
    plain = server.said()
    if len(plain) < 4:
        raise Missing("the model said too little to stop it")
    never = plain[-2:] + "\u241fnever said"
    found = server.streamed(stop=[never])
    _demand(found == plain, f"text that begins like a stop string is lost: {found[-30:]!r}, not {plain[-30:]!r}")
    return "nothing lost"


def old_client(server: Server) -> str:
    """openai 0.28 asks hasattr(delta, "content"): a null would be printed as None."""
    chunks = server.stream(stop_token_ids=[0])
    nulls = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if None in choice["delta"].values()]
    _demand(not nulls, f"a delta holds null: {nulls[:1]}")
    return "no nulls in deltas"


def several_answers(server: Server) -> str:
    response = server.post(messages=PROMPT, n=2, max_tokens=5)
    if response.status_code == 400:
        raise Missing(_message(response))
    found = sorted(choice["index"] for choice in response.json()["choices"])
    _demand(found == [0, 1], f"n=2 gave the choices {found}")
    return "n=2"


def seed_repeats(server: Server) -> str:
    texts = {server.said(seed=7, temperature=1.0) for _ in range(2)}
    _demand(len(texts) == 1, "the same seed gave two different answers")
    return "same seed, same answer"


def json_schema(server: Server) -> str:
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for more in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
        choice = server.chat(
            response_format=response_format,
            max_tokens=600,
            messages=[{"role": "user", "content": "Invent a person."}],
            **more,
        )
        if choice["finish_reason"] == "length":
            raise Missing("the answer did not end within 600 tokens")
        try:
            value = json.loads(choice["message"]["content"] or "")
        except ValueError:
            raise Broken(f"not JSON: {(choice['message']['content'] or '')[:60]!r}") from None
        _demand(isinstance(value, dict) and set(value) == {"name", "age"}, f"not of the schema: {value!r}"[:100])
    return "holds, with and without thinking"


def bad_schema_refused(server: Server) -> str:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no-such-type"}}}
    response = server.post(messages=PROMPT, response_format=response_format, max_tokens=5)
    _demand(400 <= response.status_code < 500, f"a schema that means nothing was answered with {response.status_code}")
    return str(response.status_code)


def tools(server: Server) -> str:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [TOOL],
        "max_tokens": 200,
    }
    choice = server.chat(**body, tool_choice="required")
    calls = choice["message"].get("tool_calls") or []
    _demand(bool(calls), "tool_choice required, and no call")
    _demand(choice["finish_reason"] == "tool_calls", f"finish_reason is {choice['finish_reason']!r}")
    json.loads(calls[0]["function"]["arguments"])
    streamed: dict[int, dict[str, str]] = {}
    for chunk in server.stream(**body, tool_choice="required"):
        for part in chunk["choices"][0]["delta"].get("tool_calls", []) if chunk["choices"] else []:
            entry = streamed.setdefault(part["index"], {"name": "", "arguments": ""})
            for key in entry:
                entry[key] += part["function"].get(key) or ""
    whole = [{key: call["function"][key] for key in ("name", "arguments")} for call in calls]
    _demand(list(streamed.values()) == whole, f"streamed {list(streamed.values())}, whole {whole}"[:200])
    return f"{len(calls)} call(s), streamed the same"


def thinking_off(server: Server) -> str:
    said = server.said(chat_template_kwargs={"enable_thinking": False}, max_tokens=60)
    _demand(bool(said), "with thinking off the content is empty or null")
    return "content is the answer"


def effort_aliases(server: Server) -> str:
    for effort in ("none", "low", "medium", "high"):
        status = server.post(messages=PROMPT, reasoning_effort=effort, max_tokens=4).status_code
        _demand(status < 500, f"reasoning_effort {effort!r} gave {status}")
    return "none to high"


def errors_in_shape(server: Server) -> str:
    bodies: list[dict[str, Any]] = [{"messages": []}, {"messages": PROMPT, "temperature": -1}, {"max_tokens": "x"}]
    for body in bodies:
        response = server.post(**body)
        _demand(400 <= response.status_code < 500, f"{body} was answered with {response.status_code}")
        error = response.json().get("error")
        _demand(isinstance(error, dict) and bool(error.get("message")), "errors have no error.message")
    return "400 with a message"


def no_silent_fields(server: Server) -> str:
    """A field that means nothing must be refused or answered with a warning, or a typing error is never noticed."""
    response = server.post(messages=PROMPT, max_tokens=2, max_tokenz=5)
    if response.status_code == 200 and not response.json().get("warnings"):
        raise Missing("an unknown field is ignored without a word")
    _demand(response.status_code < 500, f"an unknown field was answered with {response.status_code}")
    return str(response.status_code)


def logprobs(server: Server) -> str:
    found = server.chat(logprobs=True, top_logprobs=2, max_tokens=4).get("logprobs") or {}
    _demand(bool(found and found.get("content")), "logprobs were asked for and are not there")
    _demand(all(len(entry["top_logprobs"]) == 2 for entry in found["content"]), "top_logprobs is not 2")
    return f"{len(found['content'])} tokens"


def nulls_and_defaults(server: Server) -> str:
    """What SDKs send for fields that nobody set."""
    cases: list[dict[str, Any]] = [
        {"stream": None, "tools": None, "stop": None, "seed": None},
        {"modalities": ["text"], "n": 1, "presence_penalty": 0, "logit_bias": {}, "stop": []},
        {"max_tokens": 4.0, "top_p": 1},
    ]
    for fields in cases:
        response = server.post(**{"messages": PROMPT, "max_tokens": 4, **fields})
        _demand(response.status_code == 200, f"{fields} was answered with {response.status_code}: {_message(response)}")
    return "null and default values"


def open_vocabulary(server: Server) -> str:
    """One field, tool or key that a server does not know should not refuse everything that an agent asks."""
    hosted = {"type": "web_search"}
    cases: list[dict[str, Any]] = [
        {"verbosity": "low"},
        {"tools": [TOOL, hosted]},
        {"messages": [{**PROMPT[0], "id": 5}]},
    ]
    for fields in cases:
        response = server.post(**{"messages": PROMPT, "max_tokens": 4, **fields})
        if response.status_code in (400, 422):
            raise Missing(f"{next(iter(fields))}: {_message(response)}")
        _demand(response.status_code == 200, f"{fields} was answered with {response.status_code}")
    return "unknown fields, tools and keys"


def references(server: Server) -> str:
    """A reference in a tool's schema means that schema, also where a call is required."""
    parameters = {
        "type": "object", "properties": {"when": {"$ref": "#/$defs/When"}}, "required": ["when"], "additionalProperties": False,
        "$defs": {"When": {"enum": ["today", "tomorrow"]}},
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "plan", "parameters": parameters}}
    choice = server.chat(tools=[tool], tool_choice="required", max_tokens=400)
    calls = choice["message"].get("tool_calls") or []
    if not calls and choice["finish_reason"] == "length":
        raise Missing("no call within 400 tokens")
    _demand(bool(calls), "tool_choice required, and no call")
    when = json.loads(calls[0]["function"]["arguments"]).get("when")
    _demand(when in ("today", "tomorrow"), f"the schema allows today and tomorrow, the call has {when!r}")
    return str(when)


def history_comes_back(server: Server) -> str:
    """Whatever a model called, cut off or with long numbers, must not end the conversation."""
    for arguments in ('{"city": "Par', "", '{"n": 100000000000000000000000}'):
        call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        turns = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "?"},
        ]
        response = server.post(messages=[*PROMPT, *turns, *PROMPT], max_tokens=4)
        _demand(
            response.status_code == 200,
            f"arguments {arguments!r} were answered with {response.status_code}: {_message(response)}",
        )
    return "cut, empty and long arguments"


def goes_on(server: Server) -> str:
    turns = [*PROMPT, {"role": "assistant", "content": "One, two,"}]
    more = {"continue_final_message": True, "add_generation_prompt": False}
    used = server.chat(messages=turns, max_tokens=4, **more)["usage"]["prompt_tokens"]
    closed = server.chat(messages=[*turns, *PROMPT], max_tokens=4)["usage"]["prompt_tokens"]
    _demand(used < closed, "continue_final_message is ignored")
    return "continue_final_message"


def agents_first_request(server: Server) -> str:
    """The forms in which Claude Code and Codex begin, on the routes that they use."""
    marked = {"cache_control": {"type": "ephemeral"}}
    claude = {
        "max_tokens": 4, "system": [{"type": "text", "text": "Be brief.", **marked}], "thinking": {"type": "adaptive"},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", **marked}]},
                     {"role": "system", "content": "It is May."}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}, "eager_input_streaming": True}],
        "context_management": {"edits": []}, "output_config": {"effort": "high"}, "metadata": {"user_id": "u"},
    }  # fmt: skip
    codex = {
        "input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
                  {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False},
                  {"type": "namespace", "name": "n", "tools": []}, {"type": "web_search"}],
        "store": False, "include": ["reasoning.encrypted_content"], "client_metadata": {"a": "b"}, "max_output_tokens": 16,
    }  # fmt: skip
    for path, body in (("/v1/messages?beta=true", claude), ("/v1/responses", codex)):
        response = server.post(path, **body)
        if response.status_code != 200:
            raise Missing(f"{path} was answered with {response.status_code}: {_message(response)}")
    return "/v1/messages and /v1/responses"


def http_forms(server: Server) -> str:
    head = server.http.head("/v1/models").status_code
    _demand(head == 200, f"HEAD /v1/models was answered with {head}")
    slash = server.http.get("/v1/models/", follow_redirects=True)
    _demand(slash.status_code == 404 or slash.json().get("object") == "list", "/v1/models/ is not the list of models")
    return "HEAD, trailing slash"


CHECKS: list[tuple[str, Callable[[Server], str]]] = [
    ("streamed = whole", streamed_equals_whole),
    ("finish_reason once", finish_reason_once),
    ("max_tokens", max_tokens_holds),
    ("usage", usage_adds_up),
    ("stop strings", stop_strings),
    ("stop overlap", stop_overlap),
    ("old client", old_client),
    ("n", several_answers),
    ("seed", seed_repeats),
    ("logprobs", logprobs),
    ("json schema", json_schema),
    ("bad schema refused", bad_schema_refused),
    ("tools", tools),
    ("thinking off", thinking_off),
    ("effort aliases", effort_aliases),
    ("errors", errors_in_shape),
    ("no silent fields", no_silent_fields),
    ("nulls and defaults", nulls_and_defaults),
    ("open vocabulary", open_vocabulary),
    ("references", references),
    ("history comes back", history_comes_back),
    ("going on", goes_on),
    ("agents", agents_first_request),
    ("HTTP", http_forms),
]


def check_all(server: Server) -> Iterator[Result]:
    for name, check in CHECKS:
        try:
            yield Result(name, "ok", check(server))
        except Missing as reason:
            yield Result(name, "missing", str(reason))
        except Broken as reason:
            yield Result(name, "broken", str(reason))
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            yield Result(name, "broken", f"the answer has another form: {type(error).__name__}: {error}"[:200])


def run(url: str, *, api_key: str | None, as_json: bool) -> int:
    server = Server(url, api_key)
    results = []
    for result in check_all(server):
        results.append(result)
        if not as_json:
            print(f"{result.status:8} {result.name:20} {result.detail}", flush=True)
    if as_json:
        print(json.dumps([vars(result) for result in results], ensure_ascii=False, indent=2))
    return 1 if any(result.status == "broken" for result in results) else 0
