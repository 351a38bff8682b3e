"""A chat's messages as the template gets them: nothing of them is lost without a word, and none can only fail.

What comes back from a client was often said by a model: its calls may be cut or broken, and are taken as they are.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.schema import ChatMessage
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.text.content import joined_or_parts, text_of
from fastqwen.text.formats import Formats
from fastqwen.text.strict_json import StrictJsonError, loads

ROLES = frozenset({"system", "user", "assistant", "tool"})
ROLE_ALIASES = {"developer": "system", "function": "tool"}
TEXT_PARTS = frozenset({"text", "input_text", "output_text", "summary_text"})
MEDIA_PARTS = frozenset(
    {
        "image", "image_url", "input_image", "audio", "input_audio", "audio_url", "video", "video_url", "input_video",
        "file", "input_file", "document", "computer_screenshot",
    }
)  # fmt: skip
# Keys that say nothing beyond what the template is given anyhow.
MESSAGE_KEYS = frozenset(
    {"role", "content", "tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content", "refusal"}
)
PART_KEYS = frozenset(
    {"type", "text", "cache_control", "annotations", "logprobs", "citations", "prompt_cache_breakpoint"}
)
CALL_KEYS = frozenset({"id", "type", "function", "custom", "index", "cache_control", "name", "arguments", "args"})
MAX_ARGUMENT_MARKS = 400_000  # brackets, quotes and commas in all of a conversation's arguments: they are read here
RAW_ARGUMENTS = "arguments"  # the key for what was no object, because templates want one


async def rendered(
    state: ServerState,
    messages: list[dict[str, Any]],
    options: dict[str, Any],
    warnings: Warnings,
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool,
    template: str | None = None,
) -> list[int]:
    """The prompt's ids, by ``template`` or the model's own. Raises BadRequest for messages that cannot be rendered, or not in time."""
    if template is not None and not state.config.trust_request_chat_template:
        raise BadRequest(
            "chat_template: templates of requests are not accepted here: start the server with --chat-template FILE, or "
            "with --trust-request-chat-template",
            "chat_template",
        )
    if continue_final_message and add_generation_prompt:
        raise BadRequest(
            "continue_final_message and add_generation_prompt exclude each other: drop one", "continue_final_message"
        )
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise BadRequest("continue_final_message needs a last message of role assistant", "continue_final_message")
    await asyncio.sleep(0)  # making thousands of messages and sending them on are two pieces of work
    how: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt is not False and not continue_final_message,
        "continue_final_message": continue_final_message,
        **({} if template is None else {"template": template}),
    }
    try:
        return await state.apply_template(messages, options, **how)
    except BadRequest as error:
        plainer = _system_first(messages)
        if plainer == messages or error.code is not None:
            raise
        try:
            found = await state.apply_template(plainer, options, **how)
        except BadRequest:
            raise error from None
        warnings.tell(
            "system messages behind the first are told as the user's: the chat template has them only in front"
        )
        return found


def _system_first(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One system message in front; the leading ones are joined, and later ones are the user's."""
    num_leading = next((at for at, one in enumerate(messages) if one["role"] != "system"), len(messages))
    leading = [{**messages[0], "content": "\n\n".join(text_of(one["content"]) for one in messages[:num_leading])}]
    later = [{**one, "role": "user"} if one["role"] == "system" else one for one in messages[num_leading:]]
    return (leading if num_leading else []) + later


def for_template(messages: Sequence[ChatMessage], formats: Formats, warnings: Warnings) -> list[dict[str, Any]]:
    """Raises BadRequest for what the newest question cannot do without: media, where a model reads text only."""
    _check_arguments(messages)
    newest = max((at for at, one in enumerate(messages) if one.role == "user"), default=-1)
    found = []
    for index, message in enumerate(messages):
        place = f"messages.{index}"
        values = {name: value for name, value in (message.model_extra or {}).items() if value is not None}
        _note_keys(values, message.role, place, formats, warnings)
        values["role"] = _role(message.role, place, formats, warnings)
        thoughts: list[str] = []
        parts = [message.content] if isinstance(message.content, str) else message.content or []
        values["content"] = joined_or_parts(
            [
                _part(part, f"{place}.content.{at}", warnings, thoughts, refuse_media=index == newest)
                for at, part in enumerate(parts)
            ]
        )
        _set_answer_keys(values, thoughts, place, warnings)
        found.append(values)
    return found


def _check_arguments(messages: Sequence[ChatMessage]) -> None:
    """Raises BadRequest for calls whose arguments would take long to read."""
    marks = 0
    for message in messages:
        calls = (message.model_extra or {}).get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            told = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(told, str):
                marks += sum(map(told.count, '[{",'))
    if marks > MAX_ARGUMENT_MARKS:
        raise BadRequest(
            f"the arguments of the messages' tool_calls hold more than {MAX_ARGUMENT_MARKS} brackets, quotes and commas: "
            "leave out earlier calls",
            "messages",
            "too_many_values",
        )


def _note_keys(values: dict[str, Any], role: str, place: str, formats: Formats, warnings: Warnings) -> None:
    for name, value in values.items():
        known = name in MESSAGE_KEYS or (name == "name" and role in ("tool", "function"))
        if not known and value not in ([], {}, "") and not formats.reads_message_key(name):
            warnings.unknown(f"{place}.{name}", "the chat template does not look at it")


def _role(role: str, place: str, formats: Formats, warnings: Warnings) -> str:
    role = ROLE_ALIASES.get(role, role)
    if role in ROLES or formats.names(role):
        return role
    warnings.unknown(f"{place}.role", f"the chat template has no role {role!r}, so it is told as the user's")
    return "user"


def _part(part: Any, place: str, warnings: Warnings, thoughts: list[str], *, refuse_media: bool) -> str:
    """One part's text; what is thinking goes to ``thoughts``."""
    if isinstance(part, str):
        return part
    kind, text = part.get("type", "text"), part.get("text")
    if kind in MEDIA_PARTS:
        if refuse_media:
            raise BadRequest(f"content part of type {str(kind)[:100]!r}: this model reads text only", "messages")
        warnings.tell(f"{place} is left out: this model reads text only, and gets a note in place of the {kind}")
        return left_out(kind)
    if kind in TEXT_PARTS:
        if "text" not in part:
            raise BadRequest(f"{place}: a part of type {kind!r} needs a text", "messages")
        note_rest(part, PART_KEYS, place, warnings)
        return text if isinstance(text, str) else "" if text is None else json.dumps(text, ensure_ascii=False)
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if kind in ("thinking", "reasoning", "reasoning_text"):
        thoughts.append(_thought(part))
        return ""
    warnings.unknown(
        place, f"content of type {str(kind)[:100]!r} is not known here" + (", but its text" if text else "")
    )
    return text if isinstance(text, str) else ""


def note_rest(given: dict[str, Any], known: frozenset[str], place: str, warnings: Warnings) -> None:
    """What else a client wrote into a part of which ``known`` is used, or says nothing by itself."""
    for name in sorted(given.keys() - known):
        if given[name] not in (None, [], {}, ""):
            warnings.unknown(f"{place}.{name}")


def left_out(kind: Any) -> str:
    """For the model, which would else wonder about an empty result."""
    return f"[{kind}: left out, because this model reads text only]"


def _thought(part: dict[str, Any]) -> str:
    told = part.get("thinking", part.get("reasoning", part.get("text")))
    if isinstance(told, list):
        return "".join(str(one.get("text", "")) for one in told if isinstance(one, dict))
    return told if isinstance(told, str) else ""


def _set_answer_keys(values: dict[str, Any], thoughts: list[str], place: str, warnings: Warnings) -> None:
    """What a model said comes back under several names."""
    reasoning = values.pop("reasoning", None)
    told = values.get("reasoning_content") or reasoning or "".join(thoughts)
    if told:
        values["reasoning_content"] = told
    refusal = values.pop("refusal", None)
    if refusal and not values["content"]:
        values["content"] = str(refusal)
    old_call = values.pop("function_call", None)
    calls = _calls(values.pop("tool_calls", None) or ([{"function": old_call}] if old_call else []), place, warnings)
    if calls:
        values["tool_calls"] = calls


def _calls(calls: Any, place: str, warnings: Warnings) -> list[dict[str, Any]]:
    """Templates want the arguments as an object; OpenAI's clients send them as text."""
    found = []
    if not isinstance(calls, list):
        warnings.unknown(f"{place}.tool_calls", "it is no list")
        return []
    for index, call in enumerate(calls):
        where = f"{place}.tool_calls.{index}"
        given = call.get("function") if isinstance(call, dict) else None
        if isinstance(call, dict) and given is None and isinstance(call.get("custom"), dict):
            given = {"name": call["custom"].get("name"), "arguments": {"input": call["custom"].get("input")}}
        if isinstance(call, dict) and given is None and "name" in call:  # LangChain's own form
            given = {"name": call["name"], "arguments": call.get("arguments", call.get("args"))}
        if not isinstance(given, dict):
            given = {}
        name = given.get("name")
        if not isinstance(name, str) or not name:
            name = "unknown"
            warnings.tell(f"{where} has no name, so the prompt calls it {name!r}")
        call = call if isinstance(call, dict) else {}
        note_rest(call, CALL_KEYS, where, warnings)
        function = {**given, "name": name, "arguments": _arguments(given.get("arguments"), where, warnings)}
        found.append({"type": "function", **{key: call[key] for key in ("id",) if key in call}, "function": function})
    return found


def _arguments(given: Any, place: str, warnings: Warnings) -> dict[str, Any]:
    if isinstance(given, str) and given.strip():
        try:
            value = loads(given)
        except StrictJsonError as error:
            warnings.tell(f"{place}: the arguments are told to the model as text, because {error}"[:300])
            return {RAW_ARGUMENTS: given}
    else:
        value = given
    if value is None or value == "":
        return {}
    return value if isinstance(value, dict) else {RAW_ARGUMENTS: value}
