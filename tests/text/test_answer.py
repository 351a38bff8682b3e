"""Reasoning and tool calls: what a client reads must not depend on how the text was cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastqwen.text.answer import AnswerParser, Parts, TextParser
from fastqwen.text.react import ReActParser
from fastqwen.text.tool_calls import Hermes, Xml

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "share": {"type": "number"},
                    "detail": {"type": "boolean"},
                    "tags": {"type": "array"},
                    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                },
            },
        },
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
XML = "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>"


def hermes(opened: bool = False) -> AnswerParser:
    return AnswerParser(opened=opened, calls=Hermes(), tool_names=["weather"])


def xml(opened: bool = False) -> AnswerParser:
    return AnswerParser(opened=opened, calls=Xml(TOOLS), tool_names=["weather"])


def streamed(parser: TextParser, text: str, cuts: list[int]) -> Parts:
    parts, last = Parts(), 0
    for cut in sorted({cut % (len(text) + 1) for cut in cuts}):
        parts.add(parser.push(text[last:cut]))
        last = cut
    parts.add(parser.push(text[last:]))
    parts.add(parser.finish())
    return parts


def whole(parser: TextParser, text: str) -> Parts:
    return streamed(parser, text, [])


def test_thinking_is_kept_apart_from_the_answer():
    parts = whole(hermes(), "<think>\nHm.\n</think>\n\nHello")
    assert parts == Parts("Hm.", "Hello")


def test_thinking_that_the_prompt_opened():
    assert whole(hermes(opened=True), "Hm.\n</think>\n\nHello") == Parts("Hm.", "Hello")
    assert whole(hermes(opened=True), "<think>\nHm.\n</think>\n\nHello") == Parts("Hm.", "Hello")


def test_without_thinking_the_text_is_the_answer_and_not_the_reasoning():
    assert whole(hermes(), "Hello\n") == Parts("", "Hello\n")
    assert whole(AnswerParser(reasoning=False), "<think>x</think>") == Parts("", "<think>x</think>")


def test_an_answer_that_ends_while_thinking_has_only_reasoning():
    assert whole(hermes(opened=True), "Hm, </thi") == Parts("Hm, </thi", "")


def test_content_and_two_calls():
    parts = whole(hermes(), f"I look.\n{CALL}\n{CALL}")
    assert parts.content == "I look."
    assert [(call.name, json.loads(call.arguments)) for call in parts.calls] == [("weather", {"city": "Köln"})] * 2


def test_a_call_inside_thinking_is_not_lost():
    parts = whole(hermes(opened=True), f"I need it. {CALL}")
    assert parts.reasoning == "I need it."
    assert [call.name for call in parts.calls] == ["weather"]


def test_prose_about_calls_inside_thinking_is_prose():
    text = 'I could write <tool_call>{"name": "other", "arguments": {}}</tool_call> or <tool_call>{ </think>Done'
    parts = whole(hermes(opened=True), text)
    assert (parts.content, parts.calls) == ("Done", [])
    assert '{"name": "other"' in parts.reasoning


def test_a_closing_mark_inside_an_argument_does_not_end_the_call():
    arguments = {"city": '</tool_call> \\" } <tool_call>'}
    text = "<tool_call>" + json.dumps({"name": "weather", "arguments": arguments}) + "</tool_call>after"
    parts = whole(hermes(), text)
    assert json.loads(parts.calls[0].arguments) == arguments
    assert parts.content == "after"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": "say "x" twice"}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        "<tool_call>__import__('os').system('true')</tool_call>",
        '<tool_call>{"name": "weather", "arguments": {"city": "unfin',
        "<tool_call>" + '{"a":' * 100,
    ],
)
def test_what_is_no_call_stays_text(text: str):
    assert whole(hermes(), text) == Parts("", text)


KOELN, BERN = {"city": "Köln"}, {"city": "Bern"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{'name': 'weather', 'arguments': {'city': 'Köln',},}", [KOELN]),
        ('{"name": "weather", "arguments": {"city": "Köln"}', [KOELN]),  # a bracket is missing
        ('{"name": "weather", "arguments": {"city": "Köln"}}}', [KOELN]),  # or one too many
        ('{{"name": "weather", "arguments": {"city": "Köln"}}}', [KOELN]),
        ('{"name": "weather", "arguments": {"city": "Köln"}}\n{"name": "weather", "arguments": {"city": "Bern"}}', [KOELN, BERN]),
        ('[{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "weather", "arguments": {"city": "Bern"}}]', [KOELN, BERN]),
        ('{"type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Köln\\"}"}}', [KOELN]),
        ('{"function": "weather", "parameters": {"city": "Köln"}}', [KOELN]),
        ('{"name": "weather", "city": "Köln"}', [KOELN]),
        ('{"name": "weather", "arguments": null}', [{}]),
        ('{"name": "weather", "arguments": ""}', [{}]),
        ('{"name": "weather", "arguments": {"city": "C:\\dir \\d \\ud83d", "b": True}}', [{"city": "C:\\dir \\d \ufffd", "b": True}]),
        ('{"name": "weather", "arguments": {"a": NaN, "b": -Infinity, "c": 1e400}}', [{"a": "NaN", "b": "-Infinity", "c": 10**400}]),
        ("<tool_call>" + '{"name": "weather", "arguments": {"city": "Köln"}}', [KOELN]),
        ("<function=weather>\n<parameter=city>\nKöln\n</parameter>\n</function>", [KOELN]),
    ],
)  # fmt: skip
def test_json_calls_are_read_as_models_write_them(text: str, wanted: list[dict[str, object]]):
    text = f"A <tool_call>\n{text}\n</tool_call> B"
    for cuts in ([], list(range(len(text)))):
        parts = streamed(hermes(), text, cuts)
        assert [json.loads(call.arguments, parse_constant=pytest.fail) for call in parts.calls] == wanted
        assert parts.content == "A B"


def test_a_call_that_is_cut_in_a_text_is_no_call():
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Köln", "note": "unfin'
    assert whole(hermes(), text) == Parts("", text)


def test_xml_values_get_the_types_of_the_schema():
    values = {"city": "12", "days": "3", "share": "2", "detail": "True", "tags": '["a"]', "maybe": "null", "other": "7"}
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    parts = whole(xml(), f"<tool_call>\n<function=weather>\n{body}</function>\n</tool_call>")
    assert json.loads(parts.calls[0].arguments) == {
        "city": "12", "days": 3, "share": 2, "detail": True, "tags": ["a"], "maybe": None, "other": "7",
    }  # fmt: skip


def test_xml_values_are_never_evaluated():
    value = "__import__('os').system('touch /tmp/x')"
    text = f"<tool_call><function=weather><parameter=tags>{value}</parameter></function></tool_call>"
    assert json.loads(whole(xml(), text).calls[0].arguments) == {"tags": value}


def test_xml_without_its_outer_mark_is_a_call_too():
    assert [call.name for call in whole(xml(), "<function=weather>\n</function>").calls] == ["weather"]


def test_react_lines():
    text = 'Thought: I look.\nAction: weather\nAction Input: {"city": "Köln"}\nObservation: made up'
    parts = whole(ReActParser(TOOLS), text)
    assert (parts.reasoning, parts.content) == ("I look.", "")
    assert [(call.name, json.loads(call.arguments)) for call in parts.calls] == [("weather", {"city": "Köln"})]
    parts = whole(ReActParser(TOOLS), "Thought: I know.\nFinal Answer: It rains.\nAction: none")
    assert parts == Parts("I know.", "It rains.\nAction: none")
    assert whole(ReActParser(TOOLS), "Hello") == Parts("", "Hello")


FRAGMENTS = st.sampled_from(
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<", "</", "\n", " ", "text", "Köln😀", CALL, XML, "{", "}", '"', "\\",
        '{"name": "weather", "arguments": {}}', '{"name": "x"', "<function=", "weather>", "<parameter=city>", "</parameter>",
        "</function>", "Thought:", "Action:", "Action Input:", "Observation:", "Final Answer:", "Action", "\nThought: a\n",
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [hermes, lambda: hermes(opened=True), xml, lambda: xml(opened=True), lambda: ReActParser(TOOLS)],
    ids=["hermes", "hermes-opened", "xml", "xml-opened", "react"],
)
@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(FRAGMENTS, max_size=14), cuts=st.lists(st.integers(0, 10_000), max_size=30))
@example(pieces=["a", CALL, "\n", CALL, "b"], cuts=list(range(400)))
def test_streamed_equals_whole_under_every_cut(make, pieces: list[str], cuts: list[int]):
    text = "".join(pieces)
    assert streamed(make(), text, cuts) == whole(make(), text)


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(FRAGMENTS, max_size=14))
def test_no_letter_is_lost_where_there_is_no_call(pieces: list[str]):
    text = "".join(pieces)
    parts = whole(hermes(), text)
    if not parts.calls:
        squeezed = "".join((parts.reasoning + parts.content).split())
        marks = "".join(text.split())
        assert squeezed == marks or squeezed == marks.replace("<think>", "", 1).replace("</think>", "", 1)
