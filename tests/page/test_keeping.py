"""No loss and no surprise: full storage, addresses, system prompts, answers that broke off."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.page.conftest import Server
from tests.page.steps import MOD, ask, button, eventually, finished, last_answer, questions, say, shows, until, visit

pytestmark = pytest.mark.slow

FULL = """() => {  // as a browser does it: the write is taken, and its transaction is aborted afterwards
  window.full = true;
  const put = IDBObjectStore.prototype.put;
  IDBObjectStore.prototype.put = function (...given) {
    const request = put.apply(this, given);
    if (window.full) this.transaction.abort();
    return request;
  };
}"""
NO_DATABASE = "Object.defineProperty(window, 'indexedDB', {get() { throw new DOMException('no', 'SecurityError'); }})"


def path_of(page: Any) -> str:
    return str(page.evaluate("location.pathname"))


def test_full_storage_is_said_at_once_and_the_conversation_can_be_saved(page: Any, fake: Server) -> None:
    fake.set(answer="An answer.")  # not the question again, which is long
    visit(page, fake.url)
    ask(page, "This still fits")
    page.evaluate(FULL)
    ask(page, "This is too much " * 2000)
    page.wait_for_selector(".banner[role=alert]")
    assert "storage is full: this conversation is not being kept" in page.locator(".banner").inner_text()
    with page.expect_download() as download:
        button(page, "Save as a file").click()
    saved = json.loads(download.value.path().read_text())
    (side,) = saved["conversations"][0]["sides"]
    assert any("too much" in node["content"] for node in side["nodes"].values())
    page.evaluate("window.full = false")
    ask(page, "There is room again")
    page.wait_for_selector(".banner", state="detached")


def test_forbidden_storage_is_said_too(page: Any, fake: Server) -> None:
    page.add_init_script(NO_DATABASE)
    visit(page, fake.url)
    assert "forbids storage" in page.locator(".welcome").inner_text()
    ask(page, "Hello")
    assert "forbids storage" in page.locator(".banner").inner_text()
    assert button(page, "Save as a file").is_visible()


def test_each_conversation_has_an_address(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    ask(page, "the first one")
    first = path_of(page)
    assert re.fullmatch(r"/chat/[0-9a-f]{20}", first)
    button(page, "New chat", nth=0).click()
    page.wait_for_selector(".welcome")
    assert path_of(page) == "/"
    ask(page, "the second one")
    second = path_of(page)
    assert second != first
    page.go_back()
    shows(page, ["the first one"])
    page.go_forward()
    shows(page, ["the second one"])
    page.reload()
    shows(page, ["the second one"])
    page.goto(fake.url + first)
    shows(page, ["the first one"])
    assert ask(page, "and further").startswith("You said"), "addresses of the API do not depend on the page's own"
    page.locator(".entry").last.click()
    shows(page, ["the second one"])
    assert path_of(page) == second


def test_an_address_from_another_browser_is_explained(page: Any, fake: Server) -> None:
    page.goto(fake.url + "/chat/0123456789abcdef0123")
    page.wait_for_selector(".welcome")
    until(page, "document.querySelector('.toast').textContent.includes('not in this browser')")
    assert path_of(page) == "/"


def test_a_system_prompt_is_seen_and_not_inherited(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    page.keyboard.press(f"{MOD}+,")
    page.fill("#set-system", "Speak like a pirate.\nAlways.")
    page.fill("#set-temperature", "0.5")
    ask(page, "Hello")
    assert "Speak like a pirate." in page.locator(".system summary").inner_text()
    button(page, "New chat", nth=0).click()
    page.wait_for_selector(".welcome")
    ask(page, "Hello again")
    assert page.locator(".system").count() == 0
    assert [message["role"] for message in fake.told()["requests"][-1]["messages"]] == ["user"]
    assert fake.told()["requests"][-1]["temperature"] == 0.5, "how freely it speaks is kept, and shown in the settings"
    page.locator(".entry").last.click()
    page.wait_for_selector(".system")


@pytest.mark.parametrize("how", ["length", "stopped", "cut", "reloaded"])
def test_an_answer_that_broke_off_is_continued(page: Any, fake: Server, how: str) -> None:
    fake.set(cuts=how == "length")
    visit(page, fake.url, short=how == "length")
    question = {"length": "write some code", "cut": "cut this"}.get(how, "slow, please")
    say(page, question)
    if how in ("stopped", "reloaded"):
        until(page, "document.querySelector('.markdown')?.textContent.length > 40")
        page.wait_for_timeout(1200)
        page.keyboard.press("Escape") if how == "stopped" else page.reload()
    finished(page)
    if how == "cut":
        page.wait_for_selector(".note.error")
    begun = last_answer(page)
    button(page, "Continue").click()
    until(page, f"document.querySelector('.markdown').innerText.length > {len(begun) + 5}")
    body = fake.told()["requests"][-1]
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False
    assert [message["role"] for message in body["messages"]] == ["user", "assistant"]
    assert body["messages"][1]["content"].startswith(begun[:20])
    assert page.locator(".note.error").count() == 0
    assert questions(page) == [question]
    if how == "length":
        finished(page)
        button(page, "Continue").wait_for()
    else:
        page.keyboard.press("Escape")
        finished(page)
    whole = last_answer(page)
    assert whole.startswith(begun.rstrip()[:-5]) and "wordword" not in whole
    assert page.locator(".branches").count() == 0, "it is the same version, only longer"


def test_an_answer_that_is_whole_offers_no_continuation(page: Any, fake: Server) -> None:
    visit(page, fake.url, short=False)
    ask(page, "Hello")
    assert page.get_by_role("button", name="Continue").count() == 0
    eventually(page, lambda: page.locator(".why").count(), 1)
