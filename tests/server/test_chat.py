"""POST /v1/chat/completions, told as short stories."""

from __future__ import annotations

import json

import pytest

from tests.server.harness import ask, assembled, chat, chunks, make_state

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("add", "multiply")
]
PATH = "/v1/chat/completions"


def says(text: str):
    return lambda prompt, seed: text


def message(response) -> dict:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


@pytest.mark.parametrize(
    ("text", "tools"),
    [
        ("Hello", None),
        ("<think>\nHm\n</think>\n\nHello", None),
        (f"I add.\n{CALL}\n{CALL}", TOOLS),
        (f"<think>{CALL}</think>Done", TOOLS),
        ("<tool_call>{broken", TOOLS),
        ("Köln 😀", TOOLS),
    ],
)
def test_a_stream_says_what_the_whole_answer_says(text: str, tools: list | None):
    whole = ask(make_state(says(text)), PATH, chat(tools=tools)).json()["choices"][0]
    stream = assembled(ask(make_state(says(text)), PATH, chat(tools=tools, stream=True)))[0]
    assert stream["content"] == (whole["message"]["content"] or "")
    assert stream["reasoning_content"] == whole["message"].get("reasoning_content", "")
    assert stream["calls"] == [call["function"] for call in whole["message"].get("tool_calls", [])]
    assert stream["finish"] == [whole["finish_reason"]]


def test_thinking_switched_off_leaves_the_answer_in_content():
    for switch in (
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ):
        state = make_state(says("Hello"))
        assert message(ask(state, PATH, chat(**switch))) == {"role": "assistant", "content": "Hello", "reasoning": None}
        prompt = bytes(t for t in state.engine.requests[0].prompt_token_ids if t < 256)
        assert b"<think>\n\n</think>" in prompt


def test_a_tool_call_ends_with_its_own_finish_reason():
    choice = ask(make_state(says(CALL)), PATH, chat(tools=TOOLS)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": 2}


def test_without_tools_a_call_is_text():
    assert message(ask(make_state(says(CALL)), PATH, chat()))["content"] == CALL
    assert message(ask(make_state(says(CALL)), PATH, chat(tools=TOOLS, tool_choice="none")))["content"] == CALL


def test_parallel_tool_calls_false_ends_the_answer_after_the_first_call():
    state = make_state(says(CALL + CALL + "never said"))
    choice = ask(state, PATH, chat(tools=TOOLS, parallel_tool_calls=False)).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert state.engine.aborted


def test_a_required_call_is_made_whatever_the_model_would_have_said():
    for choice, names in (
        ("required", {"add", "multiply"}),
        ({"type": "function", "function": {"name": "multiply"}}, {"multiply"}),
    ):
        body = chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, enable_thinking=False, max_tokens=400)
        found = ask(make_state(says("No.")), PATH, body).json()["choices"][0]
        assert found["finish_reason"] == "tool_calls"
        function = found["message"]["tool_calls"][0]["function"]
        assert function["name"] in names
        assert set(json.loads(function["arguments"])) == {"a", "b"}


def test_tool_choice_without_tools_or_for_an_unknown_tool_is_refused():
    assert ask(make_state(), PATH, chat(tool_choice="required")).json()["error"]["param"] == "tool_choice"
    wrong = {"type": "function", "function": {"name": "nothing"}}
    assert ask(make_state(), PATH, chat(tools=TOOLS, tool_choice=wrong)).json()["error"]["param"] == "tool_choice"


def test_a_whole_round_with_a_tools_result_reaches_the_template():
    state = make_state(says("3"))
    messages = [
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
        ]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]  # fmt: skip
    assert message(ask(state, PATH, {"messages": messages, "tools": TOOLS}))["content"] == "3"
    prompt = bytes(t for t in state.engine.requests[0].prompt_token_ids if t < 256).decode()
    assert '"arguments": {"a": 1, "b": 2}' in prompt


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("thinking", [True, False])
def test_structured_output_holds_with_thinking_and_several_answers(n: int, thinking: bool):
    wish = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = chat(response_format=wish, n=n, enable_thinking=thinking, max_tokens=300)
    said = "Hm</think>Sure, here you are" if thinking else "Sure, here you are"
    choices = ask(make_state(says(said)), PATH, body).json()["choices"]
    assert len(choices) == n
    for choice in choices:
        assert set(json.loads(choice["message"]["content"])) == {"age"}
        assert choice["message"].get("reasoning_content", "") == ("Hm" if thinking else "")


@pytest.mark.parametrize("budget", [None, 2])
@pytest.mark.parametrize("stop", ["m", "think", "given", "</think>", ["Hm", "sol"]])
def test_a_stop_string_in_the_thinking_does_not_replace_the_form_that_was_asked_for(stop: object, budget: int | None):
    wish = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = chat(response_format=wish, stop=stop, enable_thinking=True, max_tokens=300, thinking_budget=budget)
    choice = ask(make_state(says("Hm</think>Sure")), PATH, body).json()["choices"][0]
    assert set(json.loads(choice["message"]["content"])) == {"age"}
    assert choice["message"]["reasoning_content"].startswith("Hm")


def test_a_stop_string_ends_the_form_and_without_a_form_the_thinking():
    wish = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = chat(response_format=wish, stop=["age"], enable_thinking=True, max_tokens=300)
    choice = ask(make_state(says("age</think>Sure")), PATH, body).json()["choices"][0]
    assert "age" not in choice["message"]["content"] and choice["stop_reason"] == "age"
    free = ask(make_state(says("Hm, age</think>Sure")), PATH, chat(stop=["age"], enable_thinking=True)).json()
    assert free["choices"][0]["stop_reason"] == "age" and "Sure" not in str(free)


@pytest.mark.parametrize(
    ("wish", "answers"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}),
        ({"guided_choice": ["yes"]}, {"yes"}),
        ({"guided_regex": "[0-9]{3}"}, None),
        ({"guided_grammar": 'start: "a" "b"'}, {"ab"}),
        ({"structured_outputs": {"grammar": 'root ::= "x" | "y"'}}, {"x", "y"}),
        ({"response_format": {"type": "json_object"}}, {"{}"}),
    ],
)
def test_each_kind_of_constraint(wish: dict, answers: set | None):
    found = message(ask(make_state(says("???")), PATH, chat(**wish, enable_thinking=False, max_tokens=50)))["content"]
    assert found in answers if answers is not None else found.isdigit() and len(found) == 3


@pytest.mark.parametrize(
    "wish",
    [
        {"guided_regex": "(a"},
        {"guided_regex": "a" * 300_000},
        {"guided_grammar": "start: missing"},
        {"guided_grammar": "root ::= ("},
        {"guided_json": {"type": "nothing"}},
        {"guided_json": {"$ref": "http://example.org/schema"}},
        {"guided_json": "{not json"},
        {"guided_choice": []},
        {"response_format": {"type": "json_schema"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        {"guided_regex": "a", "ignore_eos": True},
        {"guided_regex": "a", "min_tokens": 3},
    ],
)
def test_a_bad_grammar_is_refused_and_never_ignored(wish: dict):
    response = ask(make_state(), PATH, chat(**wish))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_a_thinking_budget_ends_the_thinking_and_the_answer_follows():
    def script(prompt: str, seed: int) -> str:
        return "Answer" if "Considering the limited time" in prompt else "<think>" + "thinking on and on, " * 99

    body = chat(thinking_budget=40, max_tokens=400)
    response = ask(make_state(script), PATH, body).json()
    found = response["choices"][0]["message"]
    assert found["content"] == "Answer"
    assert "Considering the limited time" in found["reasoning_content"]
    assert "budget of 40 tokens" in response["warnings"][0]
    assert response["usage"]["completion_tokens_details"] == {"reasoning_tokens": 40}
    stream = assembled(ask(make_state(script), PATH, {**body, "stream": True}))[0]
    assert (stream["content"], stream["reasoning_content"]) == ("Answer", found["reasoning_content"])


def test_a_loop_in_the_thinking_is_ended_and_reported_unless_not_wanted():
    def script(prompt: str, seed: int) -> str:
        return "Answer" if "Considering the limited time" in prompt else "<think>" + "wait, no, " * 300

    response = ask(make_state(script), PATH, chat(max_tokens=1500)).json()
    assert response["choices"][0]["message"]["content"] == "Answer"
    assert "repeated itself every 10 tokens" in response["warnings"][0]
    response = ask(make_state(script), PATH, chat(max_tokens=1500, loop_recovery=False)).json()
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["choices"][0]["message"]["content"] == ""


def test_max_tokens_counts_the_sentence_that_ended_the_thinking():
    def script(prompt: str, seed: int) -> str:
        return "Answer " * 90 if "Considering" in prompt else "<think>" + "hm, what else; " * 99

    response = ask(make_state(script), PATH, chat(thinking_budget=20, max_tokens=200)).json()
    assert response["usage"]["completion_tokens"] == 200
    assert response["choices"][0]["finish_reason"] == "length"


def test_a_refused_switch_of_the_template_is_told():
    response = ask(make_state(), PATH, chat(chat_template_kwargs={"no_such_switch": 1})).json()
    assert "no_such_switch has no effect" in response["warnings"][0]
    assert ask(make_state(), PATH, chat(chat_template_kwargs={"messages": []})).status_code == 400
    many = ask(make_state(), PATH, chat(chat_template_kwargs={f"no_such_{one}": 1 for one in range(9000)})).json()
    assert len(many["warnings"]) < 20 and "8984 more" in many["warnings"][-1]


def test_usage_comes_last_in_a_stream_when_asked_for():
    found = chunks(ask(make_state(), PATH, chat(stream=True, stream_options={"include_usage": True})))
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 6
    assert all("usage" not in chunk for chunk in found[:-1])


def test_a_stream_omits_what_it_does_not_say():
    """The old client asks hasattr(delta, "content"), which a null would answer with yes."""
    for chunk in chunks(ask(make_state(), PATH, chat(stream=True))):
        for choice in chunk["choices"]:
            assert None not in choice["delta"].values()


def test_stop_strings_do_not_leak_and_what_only_began_like_one_is_not_lost():
    state = make_state(says("I Obser Observation: x"))
    found = assembled(ask(state, PATH, chat(stop=["Observation:"], stream=True)))[0]
    assert found["content"] == "I Obser "
    assert found["finish"] == ["stop"]
    found = assembled(ask(make_state(says("It is an O")), PATH, chat(stop=["Observation:"], stream=True)))[0]
    assert (found["content"], found["finish"]) == ("It is an O", ["stop"])
