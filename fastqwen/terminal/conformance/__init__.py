"""Checks for any OpenAI-compatible server, each a short story over plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx

from fastqwen.terminal.conformance import answers, apis, clients, tools
from fastqwen.terminal.conformance.server import Broken, Missing, Result, Server

CHECKS: list[tuple[str, Callable[[Server], str]]] = [
    ("streamed = whole", answers.streamed_equals_whole),
    ("finish_reason once", answers.finish_reason_once),
    ("max_tokens", answers.max_tokens_holds),
    ("usage", answers.usage_adds_up),
    ("stop strings", answers.stop_strings),
    ("stop overlap", answers.stop_overlap),
    ("old client", answers.old_client),
    ("n", answers.several_answers),
    ("seed", answers.seed_repeats),
    ("logprobs", answers.logprobs),
    ("json schema", tools.json_schema),
    ("bad schema refused", tools.bad_schema_refused),
    ("tools", tools.tools),
    ("tools with a schema", tools.tools_with_schema),
    ("annotations", tools.annotations_refuse_nothing),
    ("thinking off", answers.thinking_off),
    ("effort aliases", answers.effort_aliases),
    ("errors", clients.errors_in_shape),
    ("no silent fields", clients.no_silent_fields),
    ("nulls and defaults", clients.nulls_and_defaults),
    ("open vocabulary", clients.open_vocabulary),
    ("references", tools.references),
    ("history comes back", tools.history_comes_back),
    ("picture in a result", tools.picture_in_a_result),
    ("going on", answers.goes_on),
    ("agents", clients.agents_first_request),
    ("messages", apis.messages_streamed),
    ("errors of messages", apis.messages_errors),
    ("responses", apis.responses_streamed),
    ("memory of responses", apis.responses_remembered),
    ("HTTP", clients.http_forms),
    ("compressed body", clients.compressed_body),
    ("preflight", clients.preflight),
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
