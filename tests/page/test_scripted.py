"""What needs a server that misbehaves on purpose: the fake one, always."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.page.conftest import Server
from tests.page.steps import ask, button, finished, last_answer, say, shows, until, visit

pytestmark = pytest.mark.slow

WEATHER = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


def test_formulas_are_drawn_and_money_is_not(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    ask(page, "math")
    page.wait_for_selector(".math.drawn .katex")
    assert page.locator(".math").count() == page.locator(".math.drawn .katex-html").count() == 5
    assert "$5 or $6" in last_answer(page)


@pytest.mark.parametrize("word", ["think", "tags"])
def test_thinking_is_folded_and_timed(page: Any, fake: Server, word: str) -> None:
    visit(page, fake.url)
    say(page, word)
    page.wait_for_selector(".thinking summary.active")
    finished(page)
    details = page.locator(".thinking")
    assert details.get_attribute("open") is None
    assert details.locator("summary").inner_text().startswith("Thought for ")
    details.locator("summary").click()
    assert "two sides" in details.inner_text()
    assert last_answer(page) == "Forty-two."
    ask(page, "Hello")
    assert "two sides" not in json.dumps(fake.told()["requests"][-1]), "thoughts are not sent back"


def test_tool_calls_are_shown_and_answered_by_hand(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    button(page, "Settings").click()
    page.get_by_text("Tools (JSON)").click()
    page.get_by_role("textbox", name="Tools (JSON)").fill(json.dumps(WEATHER))
    say(page, "use the tool")
    finished(page)
    assert "get_weather" in page.locator(".tool").inner_text()
    assert '"city": "Hangzhou"' in page.locator(".tool pre").inner_text()
    page.locator(".tool textarea").fill("31 degrees")
    button(page, "Send the result").click()
    page.wait_for_selector(".message.tool")
    finished(page)
    assert last_answer(page) == "The tool says: 31 degrees"
    sent = fake.told()["requests"][-1]["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool"]
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] == "call_1"


def test_the_model_picker_and_regenerating_with_another_model(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    page.select_option("select.model", "Qwen-7B-Chat")
    assert "Qwen-7B-Chat" in ask(page, "Hello")
    page.select_option("select.model", "Qwen3-4B")
    button(page, "Answer again").click()
    finished(page)
    assert "Qwen3-4B" in last_answer(page)


@pytest.mark.parametrize(
    ("word", "title", "more"),
    [
        ("overload", "The server has more requests than it accepts at once.", "64 requests are waiting"),
        ("fail", "The server failed while answering.", "a kernel returned NaN"),
        ("cut", "The answer ended before it was complete.", ""),
        ("midstream", "The engine is restarting.", "engine process ended"),
    ],
)
def test_an_error_says_its_cause(page: Any, fake: Server, word: str, title: str, more: str) -> None:
    visit(page, fake.url)
    say(page, word)
    page.wait_for_selector(".note.error")
    text = page.locator(".note.error").inner_text()
    assert title in text
    assert more in text
    assert page.get_by_role("button", name="Try again").is_visible()


def test_errors_are_explained_in_chinese_too(browser: Any, fake: Server) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    visit(page, fake.url)
    say(page, "overload")
    page.wait_for_selector(".note.error")
    assert "请求太多" in page.locator(".note.error").inner_text()
    context.close()


def test_a_full_context_offers_to_leave_out_the_oldest_turns(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    for text in ("one", "two", "three"):
        ask(page, text)
    say(page, "context, please")
    page.wait_for_selector(".note.error")
    note = page.locator(".note.error").inner_text()
    assert "no longer fits into the model's context (32,768)" in note
    assert "--max-model-len" in note
    for _ in range(2):
        button(page, "Leave out the oldest half and try again").click()
        finished(page)
    assert last_answer(page).startswith("You said: context, please")
    assert page.locator(".message.forgotten").count() == 6
    assert [m["content"] for m in fake.told()["requests"][-1]["messages"]] == ["context, please"]
    page.reload()
    page.wait_for_selector(".message.forgotten")


def test_loading_shows_progress_and_the_question_goes_out_by_itself(page: Any, fake: Server) -> None:
    fake.set(state="loading", progress=0.25)
    page.goto(fake.url)
    page.wait_for_selector(".banner progress")
    assert "The model is still loading." in page.locator(".banner").inner_text()
    assert "25 %" in page.locator(".banner").inner_text()
    say(page, "Hello")
    page.wait_for_selector(".note.waiting")
    fake.set(progress=0.75)
    until(page, "document.querySelector('.banner').textContent.includes('75 %')")
    fake.set(state="ready")
    page.wait_for_selector(".message.assistant .markdown")
    finished(page)
    assert last_answer(page).startswith("You said: Hello")


def test_an_engine_restart_is_named(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    fake.set(state="restarting")
    say(page, "Hello")
    page.wait_for_selector(".note.waiting")
    assert "The engine is restarting." in page.locator(".banner").inner_text()
    fake.set(state="ready")
    page.wait_for_selector(".message.assistant .markdown")


def test_metrics_stand_in_for_the_operators_data(page: Any, fake: Server) -> None:
    page.route("**/admin/data", lambda route: route.fulfill(status=404, json={}))
    text = 'vllm:num_requests_running{model_name="other"} 3.0\nvllm:generation_tokens_total{model_name="other"} 77\n'
    page.route("**/metrics", lambda route: route.fulfill(status=200, body=text))
    page.goto(fake.url + "/admin")
    page.wait_for_selector(".card")
    assert page.locator(".card strong").first.inner_text() == "3"
    assert "77" in page.locator(".cards").inner_text()


def test_a_crooked_import_cannot_break_the_page(page: Any, fake: Server, tmp_path: Any) -> None:
    node = {
        "id": "a",
        "parent": None,
        "role": "user",
        "content": "kept",
        "stats": {"rate": "x"},
        "files": [{"name": 3}],
    }
    reply = {"id": "b", "parent": "a", "role": "assistant", "content": {}, "stats": {"ttftMs": "1"}, "error": "x"}
    settings = {"temperature": "hot", "tools": 5, "system": None}
    side = {"model": 7, "settings": settings, "nodes": {"a": node, "b": reply}, "chosen": {"root": "gone"}}
    crooked = {"format": "fastqwen-conversations", "conversations": [{"title": 5, "votes": 3, "sides": [side]}]}
    path = tmp_path / "crooked.json"
    path.write_text(json.dumps(crooked))
    visit(page, fake.url)
    button(page, "Import and export").click()
    page.set_input_files(".import-file", str(path))
    page.wait_for_selector("dialog", state="detached")
    page.locator(".entry").click()
    shows(page, ["kept"])
    assert ask(page, "Hello").startswith("You said")


def test_numbers_can_be_typed_digit_by_digit(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    button(page, "Settings").click()
    page.locator("#set-temperature").press_sequentially("0.35")
    assert "temperature 0.35" in ask(page, "Hello")
