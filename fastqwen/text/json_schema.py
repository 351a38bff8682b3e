"""What a JSON Schema says of a value, as far as XML calls and their grammars need it: references, types, allowed values.

A schema is looked at with its root, which its references mean, however deep it is embedded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from pydantic_core import SchemaError, SchemaValidator, ValidationError
from pydantic_core.core_schema import str_schema

ALL_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
MAX_INTEGER = 10**18  # the compiler knows 64 bits
MAX_DEPTH = 32  # of references that lead to references
MAX_VALUES = 10_000
MAX_LOOKED_AT = 10_000
MAX_COMPARED = 64  # alternatives, each with all others; and their values
# Say nothing about which values are valid, but can be written so that a compiler stumbles.
ANNOTATIONS = frozenset(
    {
        "$comment", "$id", "$vocabulary", "title", "description", "default", "examples", "example", "deprecated",
        "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "x-guidance",
    }
)  # fmt: skip
COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
ENFORCED_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
# Where subschemas are: one, a list of them, or an object of them under names that are the user's.
ONE = frozenset(
    {
        "items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then", "else",
        "unevaluatedItems", "unevaluatedProperties",
    }
)  # fmt: skip
LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems", "items"})
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
TYPE_OF: dict[type, str] = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip

TYPE_WORDS = {
    "int": "integer", "float": "number", "double": "number", "bool": "boolean", "str": "string", "dict": "object", "list": "array",
}  # fmt: skip

Schema = Any  # an object or a boolean; anything else was written wrongly and says nothing


def without_annotations(root: Schema) -> Schema:
    """The same for every validator, in words that no compiler has a reason to refuse."""
    own_name = root.get("$id") if isinstance(root, dict) else None
    effort = _Effort()

    def assertions(schema: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in schema.items():
            if name == "$ref" and isinstance(own_name, str) and str(value).startswith(own_name + "#"):
                value = value.removeprefix(own_name)
            if name in COUNTS and isinstance(value, float) and value.is_integer():
                value = int(value)
            if _asserts(name, value):
                found[name] = value
        return _without_nullable(_within_compilers_integers(_with_any_for_one(found, root, effort)))

    return _mapped(root, assertions)


def _without_nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's word for one more type."""
    if schema.pop("nullable", False) is True and schema.get("type") is not None:
        listed = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        schema["type"] = [*listed, "null"] if "null" not in listed else listed
    return schema


def _within_compilers_integers(schema: dict[str, Any]) -> dict[str, Any]:
    """Bounds such as 2**64 - 1, which generators write for a machine's types: narrower ones allow nothing that is not valid."""
    if "integer" in (schema.get("type"), *_parts(schema, "type")):
        for name, least, most in (("inimum", -math.inf, -MAX_INTEGER), ("aximum", MAX_INTEGER, math.inf)):
            for key in ("m" + name, "exclusiveM" + name):
                bound = schema.get(key)
                if isinstance(bound, (int, float)) and least <= bound <= most:
                    schema[key] = min(max(bound, -MAX_INTEGER), MAX_INTEGER)
    return schema


class _Effort:
    """How many parts may be looked at to tell alternatives apart, in all of a schema: others can make that endless."""

    def __init__(self) -> None:
        self.left = MAX_LOOKED_AT

    def types(self, schema: Schema, root: Schema) -> frozenset[str]:
        known: Found = {}
        found = _types(schema, root, known) if self.left > 0 else ALL_TYPES
        self.left -= 1 + len(known)
        return found or ALL_TYPES  # none were told

    def values(self, schema: Schema, root: Schema) -> list[Any] | None:
        known: dict[int, tuple[Schema, list[Any] | None]] = {}
        found = _values(schema, root, known) if self.left > 0 else None
        self.left -= 1 + len(known)
        return found if found is not None and len(found) <= MAX_COMPARED else None


def _with_any_for_one(schema: dict[str, Any], root: Schema, effort: _Effort) -> dict[str, Any]:
    """Where no value can be of two alternatives, oneOf says what anyOf does, which compilers know."""
    parts = _parts(schema, "oneOf")
    if not parts or len(parts) > MAX_COMPARED:
        return schema
    told = [_Alternative(part, root, effort) for part in parts]
    if not all(one.excludes(other) for one, other in combinations(told, 2)):
        return schema
    others = {name: value for name, value in schema.items() if name != "oneOf"}
    if "anyOf" in others:
        return {**others, "allOf": [*_parts(schema, "allOf"), {"anyOf": parts}]}
    return {**others, "anyOf": parts}


class _Alternative:
    """What tells one alternative from others: its types, its values, and those of what its objects need."""

    def __init__(self, schema: Schema, root: Schema, effort: _Effort) -> None:
        self._types, self._values = effort.types(schema, root), effort.values(schema, root)
        schema = resolved(schema, root) if self._types == {"object"} else None
        needed = schema.get("required") if isinstance(schema, dict) else None
        listed = schema.get("properties") if isinstance(schema, dict) else None
        self._keys: dict[str, list[Any]] = {}
        if isinstance(needed, list) and isinstance(listed, dict):
            found = {key: effort.values(listed[key], root) for key in needed if isinstance(key, str) and key in listed}
            self._keys = {key: values for key, values in found.items() if values is not None}

    def excludes(self, other: _Alternative) -> bool:
        if not self._types & other._types:
            return True
        if self._values is not None and other._values is not None and _differ(self._values, other._values):
            return True
        return any(_differ(self._keys[key], other._keys[key]) for key in self._keys.keys() & other._keys.keys())


def _differ(values: list[Any], others: list[Any]) -> bool:
    return not any(one == other for one in values for other in others)


def _asserts(name: str, value: Any) -> bool:
    if name == "format":
        return value in ENFORCED_FORMATS
    if name == "$schema":  # tells an older draft, whose words mean something else
        return isinstance(value, str) and "//json-schema.org/draft" in value
    return name not in ANNOTATIONS and (value is not None or name == "const")


def _mapped(schema: Schema, change: Callable[[dict[str, Any]], dict[str, Any]], depth: int = 0) -> Schema:
    """Changed at every place where a schema stands, and nowhere else: a property may be called "title"."""
    if not isinstance(schema, dict) or depth > 64:
        return schema
    found = {}
    for name, value in change(schema).items():
        if name in NAMED and isinstance(value, dict):
            value = {key: _mapped(one, change, depth + 1) for key, one in value.items()}
        elif name in LISTS and isinstance(value, list):
            value = [_mapped(one, change, depth + 1) for one in value]
        elif name in ONE:
            value = _mapped(value, change, depth + 1)
        found[name] = value
    return found


def with_bounded_integers(root: Schema) -> Schema:
    """Where no bound is given, one of MAX_INTEGER: a call must be made, and a model could write digits for ever."""

    def bounded(schema: dict[str, Any]) -> dict[str, Any]:
        types = schema.get("type")
        if types != "integer" and not (isinstance(types, list) and "integer" in types and "number" not in types):
            return schema
        low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        given = [one for one in (schema.get("minimum"), schema.get("maximum"), low, high) if one is not None]
        if not all(isinstance(one, (int, float)) and abs(one) < MAX_INTEGER for one in given):
            return schema
        bounds = {
            **({} if low is not None else {"minimum": -MAX_INTEGER}),
            **({} if high is not None else {"maximum": MAX_INTEGER}),
        }
        return {**bounds, **schema}

    return _mapped(root, bounded)


def embedded(schema: Schema, root: Schema, **more: Any) -> Schema:
    """A part of ``root`` as a schema of its own, in which references still mean the root."""
    place = "#/$defs/root"

    def rebased(one: dict[str, Any]) -> dict[str, Any]:
        target = one.get("$ref")
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            return one
        return {**one, "$ref": place + target[1:]}

    part = _mapped(schema, rebased)
    whole = {"$defs": {"root": _mapped(root, rebased)}}
    return {**part, **whole, **more} if isinstance(part, dict) else {**whole, **more}


def resolved(schema: Schema, root: Schema) -> Schema:
    """What a reference means; the schema itself where it is none, or leads nowhere."""
    for _ in range(MAX_DEPTH):
        target = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(target, str):
            return schema
        found = _pointed(root, target)
        if found is None:
            return schema
        others = {name: value for name, value in schema.items() if name != "$ref"}
        schema = {"allOf": [found, others]} if others and isinstance(found, dict) else found
    return {}


def _pointed(root: Schema, target: str) -> Schema:
    if not target.startswith("#"):
        return None
    if target[1:] and not target.startswith("#/"):
        return _anchored(root, target[1:])
    place = root
    for step in target[2:].split("/") if len(target) > 2 else []:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict):
            place = place.get(step)
        elif isinstance(place, list) and step.isdigit() and int(step) < len(place):
            place = place[int(step)]
        else:
            return None
    return place


def _anchored(root: Schema, name: str) -> Schema:
    found: list[Schema] = []

    def look(schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("$anchor") == name:
            found.append(schema)
        return schema

    _mapped(root, look)
    return found[0] if found else None


def types_of(schema: Schema, root: Schema) -> frozenset[str]:
    """The JSON types that a value may have. All of them where the schema says nothing of it."""
    return _types(schema, root, {}) or (frozenset() if schema is False else ALL_TYPES)


# What was found of each part that was looked at, by its identity; the part itself keeps that from being given to another.
Found = dict[int, tuple[Schema, frozenset[str]]]


def _types(schema: Schema, root: Schema, known: Found) -> frozenset[str]:
    if id(schema) in known:
        return known[id(schema)][1]
    known[id(schema)] = (schema, frozenset())  # a part that leads back to itself allows nothing more by that
    found = _types_of_resolved(resolved(schema, root), root, known)
    known[id(schema)] = (schema, found)
    return found


def _types_of_resolved(schema: Schema, root: Schema, known: Found) -> frozenset[str]:
    if not isinstance(schema, dict):
        return frozenset() if schema is False else ALL_TYPES
    found = _own_types(schema)
    for name in ("anyOf", "oneOf"):
        if parts := _parts(schema, name):
            found &= frozenset().union(*(_types(one, root, known) for one in parts))
    for one in _parts(schema, "allOf"):
        found &= _types(one, root, known)
    if "then" in schema and "else" in schema:
        found &= _types(schema["then"], root, known) | _types(schema["else"], root, known)
    return found


def _parts(schema: dict[str, Any], name: str) -> list[Schema]:
    found = schema.get(name)
    return found if isinstance(found, list) else []


def _own_types(schema: dict[str, Any]) -> frozenset[str]:
    found = ALL_TYPES
    listed = schema.get("type")
    if listed is not None:
        words = [one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, str)]
        names = frozenset(TYPE_WORDS.get(one, one) for one in words) & ALL_TYPES
        names |= {"integer"} if "number" in names else set()
        found &= names or ALL_TYPES
        found |= {"null"} if schema.get("nullable") is True else set()  # OpenAPI's word for it
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(values, list):
            found &= frozenset(TYPE_OF[type(one)] for one in values)
    return found


def values_of(schema: Schema, root: Schema) -> list[Any] | None:
    """The only values that are allowed, None where they are not listed."""
    found = _values(schema, root, {})
    return found if found is None or len(found) <= MAX_VALUES else None


def _values(schema: Schema, root: Schema, known: dict[int, tuple[Schema, list[Any] | None]]) -> list[Any] | None:
    if id(schema) in known:
        return known[id(schema)][1]
    known[id(schema)] = (schema, None)
    found = _values_of_resolved(resolved(schema, root), root, known)
    known[id(schema)] = (schema, found)
    return found


def _values_of_resolved(
    schema: Schema, root: Schema, known: dict[int, tuple[Schema, list[Any] | None]]
) -> list[Any] | None:
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    for one in _parts(schema, "allOf"):
        found = _values(one, root, known)
        if found is not None:
            return found
    for name in ("anyOf", "oneOf"):
        lists = [_values(one, root, known) for one in _parts(schema, name)]
        if lists and all(one is not None and len(one) <= MAX_VALUES for one in lists):
            return [value for one in lists for value in one or []][: MAX_VALUES + 1]
    return None


def required_of(root: Schema) -> frozenset[str]:
    """The properties that every value has."""
    found: set[str] = set()
    for schema in _combined(root, ("allOf",)):
        listed = schema.get("required")
        found.update(one for one in listed if isinstance(one, str)) if isinstance(listed, list) else None
    return frozenset(found)


def properties_of(root: Schema) -> dict[str, Schema]:
    """All that are listed, also in parts that are combined or referred to."""
    found: dict[str, Schema] = {}
    for schema in _combined(root, ("allOf", "anyOf", "oneOf")):
        listed = schema.get("properties")
        for name, value in (listed if isinstance(listed, dict) else {}).items():
            found.setdefault(name, value)
    return found


def property_of(key: str, root: Schema) -> Schema:
    """Of a property that may not be listed; None where nothing is said of it."""
    listed = properties_of(root)
    if key in listed:
        return listed[key]
    others = [schema for schema in _combined(root, ("allOf", "anyOf", "oneOf"))]
    fitting = [one for schema in others for one in _fitting(key, schema.get("patternProperties"))]
    if fitting:
        return fitting[0] if len(fitting) == 1 else {"allOf": fitting}
    for schema in others:
        for name in ("additionalProperties", "unevaluatedProperties"):
            if isinstance(schema.get(name), dict) and schema[name]:
                return schema[name]
    return None


def _fitting(key: str, patterns: Any) -> list[Schema]:
    named = patterns.items() if isinstance(patterns, dict) else ()
    return [schema for pattern, schema in named if _matches(pattern, key)]


def _matches(pattern: str, key: str) -> bool:
    """In a time that grows with the key alone, whatever the pattern; one that needs more than that fits nothing."""
    try:
        SchemaValidator(str_schema(pattern=pattern, regex_engine="rust-regex")).validate_python(key)
    except (SchemaError, ValidationError):
        return False
    return True


def _combined(root: Schema, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The schema itself and the parts that it is combined of, each once."""
    waiting, seen = [root], {}
    while waiting:
        schema = waiting.pop(0)
        if id(schema) in seen:
            continue
        seen[id(schema)] = schema
        schema = resolved(schema, root)
        if isinstance(schema, dict):
            yield schema
            waiting += [one for name in names for one in _parts(schema, name)]
