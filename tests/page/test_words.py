"""What only an engine of one's own can show: alternatives of a word, why an answer was fast or slow, what else would run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.page.conftest import Server
from tests.page.steps import ask, button, eventually, finished, last_answer, until, visit

pytestmark = pytest.mark.slow

POINT_OF = """(word) => {
  const walker = document.createTreeWalker(document.querySelector('.message.assistant .markdown'), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const at = node.data.indexOf(word);
    if (at < 0) continue;
    const range = new Range();
    range.setStart(node, at);
    range.setEnd(node, at + word.length);
    const box = range.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  }
}"""


def click_word(page: Any, word: str) -> None:
    page.mouse.click(*page.evaluate(POINT_OF, word))
    page.wait_for_selector(".words ol li")


def test_a_click_on_a_word_shows_alternatives_and_branches(page: Any, fake: Server) -> None:
    visit(page, fake.url, short=False)
    ask(page, "tell me something")
    click_word(page, "something")
    rows = page.locator(".words li").all_inner_texts()
    assert [row.split() for row in rows] == [
        ["something", "50", "%"],
        ["perhaps", "25", "%"],
        ["rather", "13", "%"],
        ["never", "<", "0.1", "%"],
    ]
    assert page.locator(".words [aria-current]").inner_text().startswith("something")
    asked = fake.told()["requests"][-1]
    assert asked["messages"][-1] == {"role": "assistant", "content": "You said: tell me"}
    assert (asked["max_tokens"], asked["logprobs"], asked["continue_final_message"]) == (1, True, True)
    page.locator(".words li").nth(1).get_by_role("button").click()
    page.wait_for_selector(".words", state="detached")
    finished(page)
    assert last_answer(page) == "You said: tell me perhaps and so on, to another end."
    branches = page.locator(".message.assistant .branches")
    eventually(page, lambda: branches.inner_text().strip(), "2 / 2")
    button(page, "Previous version").click()
    eventually(page, lambda: last_answer(page).startswith("You said: tell me something"), True)


def test_words_are_found_behind_markup_and_step_by_keyboard(page: Any, fake: Server) -> None:
    visit(page, fake.url, short=False)
    ask(page, "code")
    page.wait_for_selector(".hljs-keyword")
    click_word(page, "once")
    begun = fake.told()["requests"][-1]["messages"][-1]["content"]
    assert begun.endswith("It reads each character **")
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('.words strong').textContent === 'so'")
    page.keyboard.press("Escape")
    page.wait_for_selector(".words", state="detached")
    button(page, "Alternatives of a word").click()
    page.wait_for_selector(".words ol li")
    assert page.locator(".words strong").inner_text() == "Here"
    assert fake.told()["requests"][-1]["messages"][-1]["role"] == "user", "before the first word nothing was said"


def test_chinese_words(browser: Any, fake: Server) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    visit(page, fake.url, short=False)
    ask(page, "缓存是什么")
    click_word(page, "因此")
    assert fake.told()["requests"][-1]["messages"][-1]["content"].endswith("其余直接取自缓存。\n\n")
    assert "另起分支" in page.locator(".words").inner_text()
    context.close()


def test_selecting_text_asks_nothing(page: Any, fake: Server) -> None:
    visit(page, fake.url, short=False)
    ask(page, "tell me something")
    x, y = page.evaluate(POINT_OF, "tell")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y)
    page.mouse.up()
    page.wait_for_timeout(200)
    assert page.locator(".words").count() == 0


def test_a_line_says_why_an_answer_was_fast_or_slow(page: Any, fake: Server) -> None:
    timing = {"waited_s": 1.2, "read_s": 0.31, "wrote_s": 2.0}
    fake.set(notes={"timing": timing, "cache": {"cause": "system_changed"}, "warnings": ["user has no effect"]})
    visit(page, fake.url, short=False)
    ask(page, "Hello " * 40)
    line = page.locator(".why").inner_text()
    assert line.startswith("First word after 0.")
    assert "waited 1.2 s for other requests" in line
    assert "32 of 67 tokens read from memory · 35 tokens computed in 0.31 s" in line
    assert "the system prompt changed" in line
    assert "user has no effect" in page.locator(".message.assistant").inner_text()


def test_the_planner_says_what_this_machine_could_run(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    page.get_by_text("What else could this machine run?").click()
    dialog = page.locator("dialog")
    page.wait_for_selector(".command")
    assert "RTX 3090 could run Qwen3-14B with a context of 24,576 tokens" in dialog.inner_text()
    assert page.locator(".command code").inner_text() == "fastqwen serve Qwen/Qwen3-14B"
    assert page.locator(".runs tbody tr").count() == 2


def test_a_server_without_a_planner_offers_none(page: Any, fake: Server) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "other", "object": "model"}]}))
    visit(page, fake.url)
    assert page.get_by_text("What else could this machine run?").count() == 0
