"""Request bodies: reading, and what of them nobody knows.

Every field acts, or is answered with a warning: those in ``WITHOUT_EFFECT``, and those that nobody knows. Refused by name is
what would change the meaning of the answer (``CHANGES_THE_ANSWER``), and with --strict-fields whatever is not known.
"""

from __future__ import annotations

import math
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from fastqwen.errors import BadRequest
from fastqwen.records import (
    ALL,
)
from fastqwen.server.dialects.fail_fast import FailFastModel
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.text.strict_json import StrictJsonError, loads

# What has no meaning on a server of one's own.
WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"})
PLAIN = frozenset({int, float, bool, type(None)})
# Fields of other servers and older APIs that cannot be had here and without which the answer would be another one: the
# values that mean nothing, and what to do instead of the others.
CHANGES_THE_ANSWER: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "send tools"),
    "function_call": (("none", "auto"), "send tool_choice"),
    "audio": ((), "this model writes text only"),
    "modalities": (([], ["text"]), "this model writes text only"),
    "prompt_embeds": (([],), "send text or token ids"),
    "chat_template": ((), "it belongs to a chat's messages"),
    "grammar": (("",), "send structured_outputs"),
    "json_schema": (({},), "send response_format"),
    "truncate_prompt_tokens": ((), "shorten the prompt"),
    "documents": (([],), "they belong to a chat's messages"),
    "logits_processors": (([],), "send logit_bias, bad_words or allowed_token_ids"),
    "logprob_token_ids": (([],), "send it to /v1/chat/completions or /v1/completions"),
    "late_chunking_params": ((), "ask /pooling for task token_embed and take the means of your chunks"),
    "watermarking": ((False,), "no answer carries a mark"),
    "repetition_detection": ((), "send repetition_penalty or frequency_penalty"),
}
MAX_REPAIRED_BYTES = 8 * 2**20
MAX_REPAIRS = 10_000
# Escapes, so not behind an odd number of backslashes: halves of a pair without the other one.
HALF_HIGH = re.compile(rb"(?<!\\)((?:\\\\)*+)\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})")
HALF_LOW = re.compile(rb"(?<!\\)(?<!\\u[dD][89abAB][0-9a-fA-F]{2})((?:\\\\)*+)\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 64, 64.0 and 6.4e1 are the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_ids(value: Any) -> Any:
    """Of ids, or lists of them."""
    if not isinstance(value, list):
        return value
    kinds = set(map(type, value))
    if float in kinds:
        return [_whole(one) for one in value]
    return [whole_ids(one) for one in value] if list in kinds else value


Whole = Annotated[int, BeforeValidator(_whole)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Temperature = Annotated[float, Field(ge=0.0, le=100.0)]
TopK = Annotated[Whole, Field(ge=-1, lt=2**31)]
Priority = Annotated[Whole, Field(ge=-(2**31), lt=2**31)]
CacheSalt = Annotated[str, Field(max_length=256)]
Count = Annotated[Whole, Field(ge=0, lt=2**31)]
Logprobs = Annotated[Whole, Field(ge=ALL, lt=2**31)]  # how many is the operator's to limit
Truncation = Annotated[Whole, Field(ge=ALL, lt=2**31)]
Seed = Annotated[Whole, Field(ge=-9223372036854776000, le=9223372036854776000)]  # OpenAI's range is that of a float

B = TypeVar("B", bound="Body")


class Body(FailFastModel, extra="allow", strict=True, allow_inf_nan=False):
    """An object of a request. What it does not know is kept in ``model_extra``."""

    _warnings: Warnings = PrivateAttr(default_factory=Warnings)
    _is_as_sent: bool = PrivateAttr(default=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Clients send null for what they do not set."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @property
    def warnings(self) -> Warnings:
        return self._warnings

    @property
    def is_as_sent(self) -> bool:
        """Whether the body can be read again as it came, at no more cost."""
        return self._is_as_sent

    @property
    def is_skipped(self) -> bool:
        """Whether a warning names the whole of it already."""
        return False

    def note(self, warnings: Warnings) -> None:
        """Those of whoever looked it through."""
        self._warnings = warnings

    def look_through(self, *, strict: bool) -> None:
        """List what has no effect. Raises BadRequest for what cannot be left out."""
        self._warnings = warnings = Warnings(strict=strict)
        for place, value in _unknown_fields(self):
            neutral, advice = CHANGES_THE_ANSWER.get(place, (None, ""))
            if neutral is None:
                warnings.unknown(place)
            elif not any(type(value) is type(one) and value == one for one in neutral):
                raise BadRequest(f"{place} is not supported by this server: {advice}", place)
        known = WITHOUT_EFFECT & type(self).model_fields.keys()
        for name in sorted(name for name in known if getattr(self, name) is not None):
            self._warnings.tell(f"{name} has no effect on this server")


def _unknown_fields(body: Body, where: str = "") -> Iterator[tuple[str, Any]]:
    """Places and values, also of the objects inside."""
    if body.is_skipped:
        return
    for name, value in (body.model_extra or {}).items():
        yield where + name, value
    for name in type(body).model_fields:
        value = getattr(body, name)
        if isinstance(value, Body):
            yield from _unknown_fields(value, f"{where}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for index, one in enumerate(value):
                yield from _unknown_fields(one, f"{where}{name}.{index}.")


def parse(kind: type[B], body: bytes | bytearray, *, strict_fields: bool = False) -> B:
    """Raises BadRequest that names the first wrong field."""
    if body.startswith(BOM_UTF8):
        body = body[len(BOM_UTF8) :]
    try:
        return _parsed(kind, body, strict_fields)
    except ValidationError as error:
        repaired = _without_half_pairs(body) if error.errors(include_url=False)[0]["type"] == "json_invalid" else body
        if repaired == body:
            raise refusal(error) from None
    try:
        found = _parsed(kind, repaired, strict_fields)
    except ValidationError as error:
        raise refusal(error) from None
    found._is_as_sent = False
    found.warnings.tell("the body has half of a surrogate pair, which is no character: U+FFFD stands in its place")
    return found


def parse_checked(kind: type[B], body: bytes | bytearray, warnings: list[str], *, strict_fields: bool = False) -> B:
    """A body that was parsed and looked through before (``checking.py``), and what was said of it."""
    try:
        found = kind.model_validate_json(body[len(BOM_UTF8) :] if body.startswith(BOM_UTF8) else body)
    except ValidationError as error:
        raise refusal(error) from None
    known = Warnings(strict=strict_fields)
    for warning in warnings:
        known.tell(warning)
    found.note(known)
    return found


def _parsed(kind: type[B], body: bytes | bytearray, strict_fields: bool) -> B:
    found = kind.model_validate_json(body)
    if not _all_finite(found):
        found = kind.model_validate(_exact(body))
        found._is_as_sent = False
    found.look_through(strict=strict_fields)
    return found


def _without_half_pairs(body: bytes | bytearray) -> bytes | bytearray:
    """Programs in JavaScript cut a text between the two escapes of an emoji, and from then on send that in every turn."""
    if len(body) > MAX_REPAIRED_BYTES:
        return body
    body, _ = HALF_HIGH.subn(rb"\1\\ufffd", body, MAX_REPAIRS)
    return HALF_LOW.sub(rb"\1\\ufffd", body, MAX_REPAIRS)


def _exact(body: bytes | bytearray) -> Any:
    """With numbers that no float can hold as what they are. Raises BadRequest for NaN, which is no JSON."""
    try:
        return loads(body.decode())
    except (StrictJsonError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body cannot be read: {error}") from None


def refusal(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [part for part in first["loc"] if not _is_union_label(part)]
    where = ".".join(str(part) for part in place)[:200]
    if first["type"] == "extra_forbidden":
        return BadRequest(f"unknown field {where!r}: it is not supported by this server", where)
    return BadRequest(f"{where}: {first['msg']}" if where else first["msg"], where or None)


def _all_finite(value: Any) -> bool:
    """Fields without a type of their own, such as schemas, may hold numbers that a float cannot."""
    if isinstance(value, BaseModel):
        value = {**value.__dict__, **(value.model_extra or {})}
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list) and set(map(type, value)) <= PLAIN:  # a prompt's ids, say
        return all(math.isfinite(one) for one in value if type(one) is float)
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return all(_all_finite(item) for item in items if not isinstance(item, str))
    return True


def _is_union_label(part: int | str) -> bool:
    """pydantic puts the name of the union's branch into the place of an error; it is not a field."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool", "ChosenTool")
        or part.startswith(("list[", "dict[", "literal[", "function-before["))
    )
