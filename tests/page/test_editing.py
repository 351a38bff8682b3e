"""Writing, reading and comparing: what a person expects without being told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.page.conftest import Server
from tests.page.steps import ask, button, eventually, finished, last_answer, say, shows, visit

pytestmark = pytest.mark.slow

TABLE = "| item | price | note |\n|:--|--:|:-:|\n| tea | 3.20 | hot |\n"
HEADINGS = "# First\n\ntext\n\n## Second\n\ntext\n\n### Third\n\ntext\n\n#### Fourth\n\ntext\n"
SIZE = "(e) => parseFloat(getComputedStyle(e).fontSize)"


def paste(page: Any, text: str) -> None:
    page.evaluate(
        """(text) => {
          const data = new DataTransfer();
          data.setData('text/plain', text);
          document.querySelector('#composer').dispatchEvent(
            new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true}));
        }""",
        text,
    )


def test_enter_in_an_edited_question_sends_as_in_the_box(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    ask(page, "first wording")
    button(page, "Edit and send again").click()
    editor = page.locator(".editor")
    assert "Enter sends, Shift + Enter is a new line" in editor.inner_text()
    editor.locator("textarea").fill("second wording")
    editor.locator("textarea").press("Shift+Enter")
    editor.locator("textarea").press_sequentially("two lines")
    editor.locator("textarea").press("Enter")
    finished(page)
    shows(page, ["second wording\ntwo lines"])


def test_send_is_readable_under_the_pointer(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    ask(page, "Hello")
    button(page, "Edit and send again").click()
    send = page.locator(".editor .primary")
    colours = "(e) => { const s = getComputedStyle(e); return [s.color, s.backgroundColor]; }"
    before = send.evaluate(colours)
    send.hover()
    assert send.evaluate(colours) == before and before[0] != before[1]


def test_side_by_side_starts_with_two_models_and_asks_which(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    button(page, "Side by side").click()
    intro = page.locator(".compare-intro")
    assert "Which two models?" in intro.inner_text()
    chosen = intro.locator("select").evaluate_all("(all) => all.map((e) => e.value)")
    assert chosen == ["Qwen3-4B", "Qwen-7B-Chat"]
    say(page, "Who are you?")
    finished(page)
    assert {body["model"] for body in fake.told()["requests"][-2:]} == set(chosen)


def test_side_by_side_with_one_model_leads_to_the_settings_of_b(page: Any, fake: Server) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "one", "object": "model"}]}))
    visit(page, fake.url)
    button(page, "Side by side").click()
    button(page, "Settings of side B").click()
    page.wait_for_selector(".settings")
    eventually(page, lambda: page.get_by_role("button", name="B", exact=True).get_attribute("aria-pressed"), "true")


def test_many_pasted_lines_fold_to_a_chip_that_unfolds(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    long = "\n".join(f"line {i}" for i in range(200))
    paste(page, long)
    page.wait_for_selector(".chip")
    assert "Pasted text, 200 lines" in page.locator(".chip").inner_text()
    assert page.locator("#composer").input_value() == ""
    ask(page, "What is this?")
    sent = fake.told()["requests"][-1]["messages"][0]["content"]
    assert long in sent and sent.endswith("What is this?")
    assert "Pasted text, 200 lines" in page.locator(".file summary").inner_text()
    paste(page, long)
    page.locator(".chip .text-button").click()
    eventually(page, lambda: page.locator("#composer").input_value(), long)
    assert page.locator(".chip").count() == 0
    page.fill("#composer", "")
    paste(page, "two\nlines")
    assert page.locator(".chip").count() == 0


def test_copy_stays_in_sight_of_long_code(page: Any, fake: Server) -> None:
    fake.set(answer="```python\n" + "print('a line of code')\n" * 120 + "```\n")
    visit(page, fake.url, short=False)
    ask(page, "write")
    page.locator(".code pre").evaluate("(e) => e.scrollIntoView({block: 'end'})")
    page.wait_for_timeout(100)
    copy, box = page.locator(".copy").bounding_box(), page.locator(".messages").bounding_box()
    assert box["y"] <= copy["y"] < box["y"] + box["height"]


def test_tables_keep_their_alignment(page: Any, fake: Server) -> None:
    fake.set(answer=TABLE)
    visit(page, fake.url, short=False)
    ask(page, "write")
    aligned = page.locator(".markdown td").evaluate_all("(all) => all.map((e) => getComputedStyle(e).textAlign)")
    assert aligned == ["left", "right", "center"]


def test_headings_differ_and_breathe(page: Any, fake: Server) -> None:
    fake.set(answer=HEADINGS)
    visit(page, fake.url, short=False)
    ask(page, "write")
    sizes = [page.locator(f".markdown h{i}").evaluate(SIZE) for i in (1, 2, 3, 4)]
    assert sizes == sorted(set(sizes), reverse=True)
    above = page.locator(".markdown h2").evaluate("(e) => parseFloat(getComputedStyle(e).marginTop)")
    below = page.locator(".markdown h2").evaluate("(e) => parseFloat(getComputedStyle(e).marginBottom)")
    assert above > 2 * below > 8


def test_a_speed_is_told_from_twenty_tokens_on(page: Any, fake: Server) -> None:
    visit(page, fake.url, short=False)
    fake.set(answer="Few words.")
    ask(page, "write")
    assert "tokens/s" not in page.locator(".figures").inner_text()
    fake.set(answer="Many words, " * 20)
    ask(page, "write")
    assert "tokens/s" in page.locator(".figures").last.inner_text()


def test_no_speed_is_told_of_a_stream_that_came_at_once(page: Any, fake: Server) -> None:
    """A proxy that buffers gives all pieces in one: no model is that fast."""
    piece = json.dumps({"choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]})
    body = f"data: {piece}\n\n" * 30 + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    visit(page, fake.url, short=False)
    ask(page, "write")
    assert "30" in (shown := page.locator(".figures").inner_text()) and "tokens/s" not in shown


def test_an_answer_can_be_read_as_it_was_written(page: Any, fake: Server) -> None:
    fake.set(answer=TABLE)
    visit(page, fake.url, short=False)
    ask(page, "write")
    button(page, "As the model wrote it").click()
    assert page.locator("pre.raw").text_content() == TABLE
    button(page, "As the model wrote it").click()
    assert "tea" in last_answer(page)
