"""XML calls: typed by every construct of their schema, read as models write them, the same however the text was cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import llguidance
import pytest

from fastqwen.errors import BadRequest
from fastqwen.text.answer import AnswerParser, Parts
from fastqwen.text.grammar import json_grammar_part
from fastqwen.text.json_schema import (
    embedded,
    properties_of,
    property_of,
    types_of,
    values_of,
    with_bounded_integers,
    without_annotations,
)
from fastqwen.text.text_schema import text_expression
from fastqwen.text.tool_calls import Xml

ROOT = {
    "type": "object",
    "properties": {
        "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"},
        "o": {"type": "object"}, "l": {"type": "array"}, "any": {}, "e": {"enum": ["1", 2, None]}, "c": {"const": 3},
        "ref": {"$ref": "#/$defs/P"}, "deep": {"$ref": "#/$defs/Q"}, "anchor": {"$ref": "#p"}, "self": {"$ref": "#"},
        "both": {"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]},
        "either": {"oneOf": [{"$ref": "#/$defs/N"}, {"type": "boolean"}]},
        "cyclic": {"$ref": "#/$defs/C"}, "words": {"enum": ["red", "blue"]}, "old": {"type": "dict"},
    },
    "additionalProperties": {"type": "integer"},
    "$defs": {
        "P": {"$anchor": "p", "type": "object", "properties": {"x": {"type": "number"}}}, "Q": {"$ref": "#/$defs/P"},
        "N": {"type": "integer"}, "C": {"anyOf": [{"$ref": "#/$defs/C"}, {"type": "integer"}]},
    },
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": ROOT}}]


def parse(pieces: list[str]) -> tuple[str, list[Any]]:
    parser = AnswerParser(reasoning=False, calls=Xml(TOOLS), tool_names=["f"])
    total = Parts()
    for piece in pieces:
        total.add(parser.push(piece))
    total.add(parser.finish())
    return total.content, [json.loads(call.arguments, parse_constant=pytest.fail) for call in total.calls]


def cuts(text: str) -> Iterator[list[str]]:
    yield list(text)
    for size in (2, 3, 7):
        yield [text[at : at + size] for at in range(0, len(text), size)]
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


def read(text: str) -> list[Any]:
    content, calls = parse([text])
    assert all(parse(pieces) == (content, calls) for pieces in cuts(text))
    return calls


def call(key: str, value: str) -> str:
    return f"<tool_call>\n<function=f>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("s", "12", "12"), ("s", "", ""), ("s", "a\n b \n", "a\n b \n"), ("i", "12", 12), ("i", "12.0", 12), ("n", "1e2", 100.0),
        ("n", "1e400", 10**400), ("i", str(10**40), 10**40), ("b", "True", True), ("b", "false", False),
        ("l", "['a', None, \"b\",]", ["a", None, "b"]),
        ("o", "{'a': \"it's\", 'b': 'say \"x\"', 'c': True}", {"a": "it's", "b": 'say "x"', "c": True}),
        ("o", '"{\\"a\\": 1}"', {"a": 1}), ("any", '{"x": 1}', {"x": 1}), ("any", "12", "12"),
        ("e", "1", "1"), ("e", "2", 2), ("e", "null", None),
        ("c", "3", 3), ("ref", '{"x": 1}', {"x": 1}), ("deep", '{"x": 1}', {"x": 1}), ("anchor", '{"x": 1}', {"x": 1}),
        ("self", '{"i": 1}', {"i": 1}), ("both", "5", 5), ("either", "true", True), ("either", "7", 7), ("cyclic", "4", 4),
        ("words", " red ", "red"), ("words", '"red"', "red"), ("old", '{"a": 1}', {"a": 1}), ("unlisted", "5", 5),
        ("i", "many", "many"), ("n", "NaN", "NaN"),
    ],
)  # fmt: skip
def test_a_value_is_what_its_schema_makes_of_it(key: str, text: str, value: Any):
    [found] = read(call(key, text))
    assert found == {key: value} and type(found[key]) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=i>\n1\n</parameter>\n</function>",
        "<tool_call>\n<function=f>\n<parameter=s>\na\n<parameter=i>\n1\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=i>\n1\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=i>\n1\n</function>",
        "<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=i>\n1\n</parameter>\n</tool_call>",
        '<tool_call>\n<function="f">\n<parameter = "s">a</parameter><parameter name="i">1</parameter></function></tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"s": "a", "i": 1}}\n</tool_call>',
        "<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=i>\n1\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=i>\n1\n</parameter>",
        "<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=i>1</function></tool_call>",
        "<tool_call>\r\n<function=f>\r\n<parameter=s>\r\na\r\n</parameter>\r\n<parameter=i>\r\n1\r\n</parameter>\r\n</function>\r\n",
        "<tool_call>\n  <function=f>\n    <parameter=s>\n    a\n    </parameter>\n    <parameter=i>1</parameter>\n  </function>\n",
        "<tool_call>\n<function = f>\n<parameter = s>\na\n</parameter=s>\n<parameter=i>1</parameter >\n</function=f>\n</tool_call>",
        '<function name="f"><parameter name="s">a</parameter><parameter name="i">+1</parameter></function>',
        "<tool_call>\n<tool_call>\n<function=f>\n<parameter=s>\na\n</parameter>\n<parameter=i>\n01\n</parameter>\n</function>\n</tool_call>",
        '<tool_call>\n<function=f>\n{"s": "a", "i": 1}\n</function>\n</tool_call>',
        "<tool_call><function=f>{'s': 'a', 'i': 1</function></tool_call>",
    ],
)
def test_calls_are_read_as_models_write_them(text: str):
    assert read(text) == [{"s": "a", "i": 1}]


def test_calls_without_arguments_and_values_of_several_lines():
    assert read("<tool_call><function=f/></tool_call>") == read("<tool_call><function=f></tool_call>") == [{}]
    code = "def f():\n    return 1\n    "
    assert read(call("s", code)) == [{"s": code}]
    assert read(f"<function=f><parameter=s>{code}</parameter></function>") == [{"s": code}]


def test_what_is_needed_yet_may_begin_in_a_line():
    tool = {"type": "object", "properties": {"s": {"type": "string"}, "i": {"type": "integer"}}}
    text = "<tool_call><function=f><parameter=s>x<parameter=i>3</parameter></function></tool_call>"
    for needed, found in ((["s", "i"], {"s": "x", "i": 3}), (["s"], {"s": "x<parameter=i>3"})):
        parser = AnswerParser(
            reasoning=False, calls=Xml([{"function": {"name": "f", "parameters": {**tool, "required": needed}}}])
        )
        [made] = parser.push(text).calls
        assert json.loads(made.arguments) == found


@pytest.mark.parametrize(
    "value", ["x </parameter> y", "</function> <parameter=z>", "<tool_call>", "a\n<parameter=zz>\nb"]
)
def test_a_value_may_contain_the_marks(value: str):
    assert read(call("s", value)) == [{"s": value}]


def test_annotations_never_refuse_and_names_are_not_keywords():
    schema = {
        "$id": "not a name", "$comment": 5, "title": 1, "x-guidance": {"lenient": 1},
        "type": "object", "minProperties": 1.0, "maxProperties": None,
        "properties": {"title": {"type": "string", "format": "uint7", "default": []}, "format": {"type": "string", "format": "date"}},
    }  # fmt: skip
    assert without_annotations(schema) == {
        "type": "object",
        "minProperties": 1,
        "properties": {"title": {"type": "string"}, "format": {"type": "string", "format": "date"}},
    }


def test_alternatives_that_exclude_each_other_are_any_of_them():
    kinds = [
        {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in ("cat", "dog")
    ]
    apart = (
        [{"$ref": "#/$defs/cat"}, {"type": "null"}], [{"type": "integer"}, {"type": ["string", "boolean"]}], kinds,
        [{"enum": ["a", "b"]}, {"const": "c"}],
    )  # fmt: skip
    for parts in apart:
        assert without_annotations({"oneOf": parts, "$defs": {"cat": kinds[0]}})["anyOf"] == parts
    both = {"anyOf": [{"type": "integer"}, {"type": "null"}], "oneOf": [{"type": "null"}, {"type": "integer"}]}
    assert without_annotations(both)["allOf"] == [{"anyOf": both["oneOf"]}]
    optional = [{**one, "required": []} for one in kinds]
    for parts in ([{"type": "integer"}, {"type": "number"}], [{}, {"type": "null"}], optional):
        assert without_annotations({"oneOf": parts}) == {"oneOf": parts}


def test_telling_alternatives_apart_has_an_end():
    """A schema of some hundred characters can mean millions of parts: what is not told apart by then is left as it was."""
    big = {"anyOf": [{"type": "object", "title": str(at)} for at in range(600)]}
    root = {"properties": {f"p{at}": {"oneOf": [{"$ref": "#/$defs/big"}, {"type": "null"}]} for at in range(100)}}
    found = without_annotations({**root, "$defs": {"big": big}})["properties"]
    assert "anyOf" in found["p0"] and "oneOf" in found["p99"]


def test_schemas_that_generators_write_compile():
    schema = {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}, "n": {"type": "integer", "nullable": True},
            "u": {"type": "integer", "minimum": 0, "exclusiveMaximum": 1.8e19},
        },
        "required": ["id", "n", "u"],
    }  # fmt: skip
    found = without_annotations(schema)["properties"]
    assert found["id"] == {"type": "integer", "minimum": -(10**18), "maximum": 10**18}
    assert found["n"] == {"type": ["integer", "null"]} and found["u"]["exclusiveMaximum"] == 10**18
    grammar = llguidance.LLMatcher.grammar_from_lark(f"start: {json_grammar_part(schema)}")
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
    text = list(b'{"id": -5, "n": null, "u": 7}')
    assert matcher.try_consume_tokens(text) == len(text) and matcher.is_accepting()


def test_references_mean_the_root_wherever_a_part_is_embedded():
    part = embedded({"items": {"$ref": "#/$defs/P"}, "const": {"$ref": "#"}}, ROOT)
    assert part["items"] == {"$ref": "#/$defs/root/$defs/P"} and part["const"] == {"$ref": "#"}
    assert part["$defs"]["root"]["properties"]["self"] == {"$ref": "#/$defs/root"}


def test_whole_numbers_end():
    assert with_bounded_integers({"type": ["integer", "null"], "minimum": 3})["minimum"] == 3
    assert with_bounded_integers({"type": ["integer", "null"], "minimum": 3})["maximum"] == 10**18
    assert with_bounded_integers({"type": "number"}) == {"type": "number"}


def test_endless_references_say_nothing():
    root = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    assert "string" in types_of({"$ref": "#/$defs/a"}, root)
    assert "string" in types_of({"$ref": "#/nowhere"}, root)


def test_parts_that_are_shared_are_looked_at_once():
    """Else each level would double the work."""
    parts = {f"d{level}": {"anyOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(40)}
    twice = {
        f"v{level}": {"anyOf": [{"$ref": f"#/$defs/v{level + 1}"}, {"$ref": f"#/$defs/v{level + 1}"}]}
        for level in range(40)
    }
    root = {"$defs": {**parts, "d40": {"type": "integer"}, **twice, "v40": {"enum": [1, 2]}}, "$ref": "#/$defs/d0"}
    assert types_of({"$ref": "#/$defs/d0"}, root) == {"integer"}
    assert values_of({"$ref": "#/$defs/v0"}, root) is None
    assert properties_of(root) == {}


def test_properties_that_are_only_described_by_a_pattern_have_their_types():
    root = {
        "type": "object",
        "patternProperties": {"^n_": {"type": "integer"}, "_b$": {"type": "boolean"}, "(?=x)": {"type": "integer"}},
        "additionalProperties": {"type": "array"},
        "allOf": [{"patternProperties": {"^deep": {"type": "object"}}}],
    }
    found = {key: property_of(key, root) for key in ("n_1", "is_b", "n_b", "deep_1", "x")}
    assert found == {
        "n_1": {"type": "integer"}, "is_b": {"type": "boolean"}, "deep_1": {"type": "object"}, "x": {"type": "array"},
        "n_b": {"allOf": [{"type": "integer"}, {"type": "boolean"}]},
    }  # fmt: skip
    slow = {"patternProperties": {"(a+)+$": {"type": "integer"}}}  # exponential where a search may go back
    assert property_of("a" * 200 + "b", slow) is None


TEXTS = [
    ({"minLength": 3}, "abc", "ab"),
    ({"maxLength": 2}, "öß", "abc"),
    ({"pattern": "^[a-z]+$"}, "abc", "ab1"),
    ({"pattern": "b"}, "abc", "axc"),
    ({"pattern": "^a|b$"}, "xb", "xa"),
    ({"pattern": "^(a|b)$"}, "a", "ab"),
    ({"pattern": r"^/v\d/\$$"}, "/v1/$", "/v1/"),
    ({"pattern": r"\$"}, "a$b", "ab"),
    ({"pattern": "[|(]"}, "a|", "a"),
    ({"format": "uuid"}, "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
    ({"format": "date-time"}, "2026-11-26T20:00:00Z", "2026-13-26T20:00:00Z"),
    ({"format": "ipv4"}, "192.168.0.1", "192.168.0.256"),
    ({"format": "email"}, "a@b.example", "a b@c"),
    ({"allOf": [{"minLength": 2}, {"pattern": "^a"}]}, "ab", "a"),
    ({"anyOf": [{"pattern": "^a$"}, {"pattern": "^b$"}, {"type": "integer"}]}, "b", "c"),
    ({"$ref": "#/$defs/word"}, "word", "w d"),
]


@pytest.mark.parametrize(("schema", "good", "bad"), TEXTS)
def test_texts_hold_what_their_schema_says(schema: Any, good: str, bad: str):
    expression = text_expression({"type": "string", **schema}, {"$defs": {"word": {"pattern": r"^\w+$"}}})
    grammar = llguidance.LLMatcher.grammar_from_lark(f"start: T\nT: {expression}")
    for text, fits in ((good, True), (bad, False)):
        matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = list(text.encode())
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == fits, text


def test_texts_of_which_nothing_is_said_are_free():
    cyclic: dict[str, Any] = {"$defs": {"c": {"anyOf": [{"$ref": "#/$defs/c"}, {"minLength": 2}]}}}
    for schema in (
        {},
        {"type": "string"},
        True,
        {"anyOf": [{"pattern": "^a"}, {"type": "string"}]},
        {"format": "color"},
    ):
        assert text_expression(schema, {}) is None
    assert text_expression({"$ref": "#/$defs/c"}, cyclic) is None


def test_patterns_that_double_themselves_are_refused():
    defs: dict[str, Any] = {"d0": {"pattern": "abcdefgh"}}
    for at in range(1, 30):
        defs[f"d{at}"] = {"allOf": [{"$ref": f"#/$defs/d{at - 1}"}, {"$ref": f"#/$defs/d{at - 1}"}]}
    with pytest.raises(BadRequest):
        text_expression({"$ref": "#/$defs/d29"}, {"$defs": defs})
