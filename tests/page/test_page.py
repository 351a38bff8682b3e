"""What anybody does on the page, in Chromium, against `fastqwen serve demo`."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from typing import Any

import pytest

from tests.page.conftest import Server
from tests.page.steps import MOD, ask, button, eventually, finished, last_answer, say, shows, until, visit

pytestmark = pytest.mark.slow

STORY = "Tell me a slow and very long story about every river of the world."


def running_requests(url: str) -> int:
    with urllib.request.urlopen(url + "/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(
        int(float(count)) for count in re.findall(r"^vllm:num_requests_(?:running|waiting)\S* (\S+)$", text, re.M)
    )


def wait_until_idle(url: str, *, within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while running_requests(url) != 0:
        assert time.monotonic() < deadline, "the server still works on an answer that nobody reads"
        time.sleep(0.1)


def test_conversation_streams_and_survives_a_reload(page: Any, base_url: str) -> None:
    visit(page, base_url)
    first = ask(page, "Hello there")
    assert first
    assert "tok/s" in page.locator(".figures").inner_text() or "tokens" in page.locator(".figures").inner_text()
    assert " of " in page.locator(".meter-text").inner_text()
    ask(page, "And again")
    page.reload()
    page.wait_for_selector(".message.user")
    shows(page, ["Hello there", "And again"])
    assert page.locator(".message.assistant .markdown").first.inner_text() == first


def test_first_paint_is_within_a_second(page: Any, base_url: str) -> None:
    visit(page, base_url)
    script = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    assert page.evaluate(script) < 1000


def test_stop_keeps_the_words_and_aborts_on_the_server(page: Any, base_url: str) -> None:
    visit(page, base_url, short=False)
    say(page, STORY)
    page.wait_for_selector(".message.running .markdown")
    assert running_requests(base_url) == 1
    page.keyboard.press("Escape")
    finished(page)
    assert "You stopped this answer" in page.locator(".message.assistant").inner_text()
    assert last_answer(page)
    wait_until_idle(base_url)


def test_regenerate_adds_a_version_and_arrows_switch(page: Any, base_url: str) -> None:
    visit(page, base_url)
    ask(page, "Hello")
    button(page, "Answer again").click()
    finished(page)
    branches = page.locator(".message.assistant .branches")
    eventually(page, lambda: branches.inner_text().strip(), "2 / 2")
    button(page, "Previous version").click()
    eventually(page, lambda: branches.inner_text().strip(), "1 / 2")


def test_editing_a_question_branches_and_keeps_the_old_one(page: Any, base_url: str) -> None:
    visit(page, base_url)
    ask(page, "first wording")
    ask(page, "follow-up")
    page.locator(".message.user").first.hover()
    button(page, "Edit and send again", nth=0).click()
    page.locator(".editor textarea").fill("second wording")
    page.locator(".editor").get_by_role("button", name="Send").click()
    finished(page)
    shows(page, ["second wording"])
    page.locator(".message.user").first.hover()
    button(page, "Previous version", nth=0).click()
    shows(page, ["first wording", "follow-up"])
    page.wait_for_timeout(300)  # the browser's database writes behind the page's back
    page.reload()
    page.wait_for_selector(".message.user")
    shows(page, ["first wording", "follow-up"])


def test_arrow_up_edits_the_last_question(page: Any, base_url: str) -> None:
    visit(page, base_url)
    ask(page, "typed to fast")
    page.press("#composer", "ArrowUp")
    assert page.locator(".editor textarea").input_value() == "typed to fast"


def test_side_by_side_with_a_vote_that_can_be_exported(page: Any, base_url: str) -> None:
    visit(page, base_url)
    button(page, "Side by side").click()
    button(page, "Settings").click()
    page.get_by_role("button", name="B", exact=True).click()
    page.fill("#set-temperature", "0.3")
    say(page, "Compare yourselves")
    finished(page)
    assert page.locator(".sides .message.assistant").count() == 2
    button(page, "A is better").click()
    eventually(page, lambda: button(page, "A is better").get_attribute("aria-pressed"), "true")
    ask(page, "Once more")
    shows(page, ["Compare yourselves", "Once more"])
    button(page, "Import and export").click()
    with page.expect_download() as download:
        button(page, "Export votes").click()
    (vote,) = json.loads(download.value.path().read_text())["votes"]
    assert vote["vote"] == "a"
    assert vote["question"] == "Compare yourselves"
    assert vote["b"]["settings"]["temperature"] == 0.3
    assert vote["a"]["settings"]["temperature"] is None


def test_blind_comparison_hides_the_names_until_the_vote(page: Any, base_url: str) -> None:
    visit(page, base_url)
    model = page.locator("select.model").input_value()
    button(page, "Side by side").click()
    page.get_by_label("Blind").check()
    ask(page, "Who are you?")
    assert page.locator(".sides-head").inner_text().count("hidden until you vote") == 2
    assert page.locator(".sides .who").all_inner_texts() == ["Model A", "Model B"]
    button(page, "Tie").click()
    eventually(page, lambda: page.locator(".sides-head select").first.input_value(), model)


def test_search_rename_and_delete(page: Any, base_url: str) -> None:
    visit(page, base_url)
    ask(page, "about zebras")
    button(page, "New chat", nth=0).click()
    ask(page, "about giraffes")
    page.wait_for_timeout(300)
    page.keyboard.press(f"{MOD}+k")
    page.keyboard.type("ZEBRAS")
    until(page, "document.querySelectorAll('.entry').length === 1")
    page.locator(".entry").click()
    shows(page, ["about zebras"])
    button(page, "Rename").click()
    page.keyboard.type("Striped")
    page.keyboard.press("Enter")
    page.fill(".search input", "")
    until(page, "document.querySelectorAll('.entry').length === 2")
    assert "Striped" in page.locator(".list").inner_text()
    button(page, "Delete").click()
    button(page, "Delete?").click()
    until(page, "document.querySelectorAll('.entry').length === 1")
    page.reload()
    page.wait_for_selector(".entry")
    eventually(page, lambda: page.locator(".entry").all_text_contents(), ["about giraffes"])


def test_export_and_import_in_both_formats(page: Any, base_url: str, tmp_path: Any) -> None:
    visit(page, base_url)
    answer = ask(page, "Keep this")
    saved = {}
    for kind in ("Markdown", "JSON"):
        button(page, "Import and export").click()
        with page.expect_download() as download:
            button(page, kind).click()
        saved[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(saved[kind])
        page.keyboard.press("Escape")
    assert "## You\n\nKeep this" in saved["Markdown"].read_text()
    for path in saved.values():
        button(page, "Import and export").click()
        page.set_input_files(".import-file", str(path))
        page.wait_for_selector("dialog", state="detached")
    until(page, "document.querySelectorAll('.entry').length === 3")
    for i in range(3):
        page.locator(".entry").nth(i).click()
        page.wait_for_selector(f".list li:nth-child({i + 1}).open")
        shows(page, ["Keep this"])
        eventually(page, lambda: last_answer(page), answer)


def test_import_of_something_else_is_explained(page: Any, base_url: str, tmp_path: Any) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    visit(page, base_url)
    button(page, "Import and export").click()
    page.set_input_files(".import-file", str(other))
    until(page, "document.querySelector('.toast').textContent.includes('no conversation')")


def test_settings_system_prompt_and_files_reach_the_server(page: Any, base_url: str, tmp_path: Any) -> None:
    note = tmp_path / "note.txt"
    note.write_bytes("注意事项 ```".encode("gb18030"))
    visit(page, base_url)
    button(page, "Settings").click()
    page.fill("#set-system", "Be brief.")
    for name, value in {"temperature": "0.5", "top_p": "0.9", "max_tokens": "64", "seed": "7"}.items():
        page.fill(f"#set-{name}", value)
    page.set_input_files("input[type=file]:not(.import-file)", str(note))
    page.wait_for_selector(".chip")
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Read the note")
    body = sent.value.post_data_json
    assert {k: body[k] for k in ("temperature", "top_p", "max_tokens", "seed", "stream")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 64,
        "seed": 7,
        "stream": True,
    }
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == "note.txt:\n````\n注意事项 ```\n````\n\nRead the note"
    finished(page)


def test_empty_settings_leave_the_choice_to_the_server(page: Any, base_url: str) -> None:
    visit(page, base_url, short=False)
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hello")
    assert set(sent.value.post_data_json) == {"model", "messages", "stream", "stream_options"}
    page.keyboard.press("Escape")
    finished(page)


def test_a_binary_file_is_refused_in_words(page: Any, base_url: str, tmp_path: Any) -> None:
    picture = tmp_path / "photo.png"
    picture.write_bytes(b"\x89PNG\x00\x00")
    visit(page, base_url)
    page.set_input_files("input[type=file]:not(.import-file)", str(picture))
    until(page, "document.querySelector('.toast').textContent === 'photo.png is not a text file.'")


def test_enter_of_an_input_method_does_not_send(page: Any, base_url: str) -> None:
    visit(page, base_url)
    page.fill("#composer", "ni hao")
    page.evaluate(
        """() => {
          const area = document.querySelector('#composer');
          const key = {key: 'Enter', bubbles: true, cancelable: true};
          area.dispatchEvent(new KeyboardEvent('keydown', {...key, isComposing: true}));
          area.dispatchEvent(new KeyboardEvent('keydown', {...key, keyCode: 229}));
        }"""
    )
    page.wait_for_timeout(200)
    assert page.locator(".message").count() == 0
    assert page.input_value("#composer") == "ni hao"
    page.press("#composer", "Shift+Enter")
    assert page.input_value("#composer") == "ni hao\n"
    page.press("#composer", "Enter")
    finished(page)
    shows(page, ["ni hao"])


def test_chinese_by_preference_of_the_browser_and_by_the_switch(browser: Any, base_url: str) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    visit(page, base_url)
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert "新对话" in page.locator(".sidebar").inner_text()
    page.get_by_role("button", name="English").click()
    page.get_by_role("button", name="New chat").first.wait_for()
    page.reload()
    page.wait_for_selector(".sidebar")
    assert "New chat" in page.locator(".sidebar").inner_text()
    context.close()


def test_dark_by_the_system_and_by_the_switch(browser: Any, base_url: str) -> None:
    context = browser.new_context(color_scheme="dark", locale="en-US")
    page = context.new_page()
    visit(page, base_url)
    root = page.locator("html")
    assert root.get_attribute("data-theme") == "dark"
    button(page, "Colours: as the system").click()
    eventually(page, lambda: root.get_attribute("data-theme"), "light")
    page.reload()
    page.wait_for_selector("#composer")
    assert root.get_attribute("data-theme") == "light"
    context.close()


def test_shortcuts_are_listed_and_work(page: Any, base_url: str) -> None:
    visit(page, base_url)
    ask(page, "Hello")
    page.locator(".messages").focus()
    page.keyboard.press("?")
    assert "Stop the answer" in page.locator("dialog").inner_text()
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "composer"
    page.keyboard.press(f"{MOD}+Shift+Enter")
    page.wait_for_selector(".branches")
    finished(page)
    page.keyboard.press(f"{MOD}+b")
    page.wait_for_selector(".sidebar", state="detached")
    page.keyboard.press(f"{MOD}+Shift+O")
    page.wait_for_selector(".message", state="detached")
    page.keyboard.press(f"{MOD}+,")
    page.wait_for_selector(".settings")


def test_a_phone_shows_everything_without_scrolling_sideways(browser: Any, base_url: str) -> None:
    context = browser.new_context(
        viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True, locale="en-US"
    )
    page = context.new_page()
    visit(page, base_url)
    page.fill("#composer", "Write code in Python with a table")
    page.press("#composer", "Enter")  # a new line on a phone; the button sends
    assert page.locator(".message").count() == 0
    button(page, "Send").tap()
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    button(page, "Show or hide the list").tap()
    assert page.locator(".sidebar").is_visible()
    page.locator(".entry").tap()
    page.wait_for_selector(".sidebar", state="detached")
    button(page, "Settings").tap()
    assert page.locator("#set-system").is_visible()
    context.close()


def test_every_control_has_a_name(page: Any, base_url: str) -> None:
    visit(page, base_url)
    ask(page, "Hello")
    button(page, "Settings").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([hidden]), textarea, select, a')].filter((e) =>
          !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("main, nav, aside").count() == 3
    assert page.locator("[role=log][aria-live=off]").count() == 1
    until(page, "document.querySelector('#announcer').textContent.startsWith('Answer finished.')")


def test_a_killed_server_is_named_and_the_page_recovers(context: Any, mortal: Server) -> None:
    page = context.new_page()
    visit(page, mortal.url, short=False)
    say(page, STORY)
    page.wait_for_selector(".message.running .markdown")
    mortal.kill()
    page.wait_for_selector(".note.error")
    assert "connection to the server broke in the middle of the answer" in page.locator(".note.error").inner_text()
    assert "The server does not answer." in page.locator(".banner").inner_text()
    assert last_answer(page), "the words that had arrived are kept"
    button(page, "Settings").click()
    page.fill("#set-max_tokens", "12")
    say(page, "Are you there?")
    page.wait_for_selector(".note.waiting")
    mortal.start()
    page.wait_for_selector(".banner.good")
    finished(page)
    assert page.locator(".note.waiting").count() == 0, "the question was sent again without a click"
    assert last_answer(page)


def test_operators_page_shows_figures_and_a_plot(page: Any, base_url: str) -> None:
    page.goto(base_url + "/admin")
    page.wait_for_selector(".plot path:not(.area)", state="attached")
    text = page.locator("main").inner_text()
    for word in ("Running", "KV cache in use", "Prefix cache hits", "Throughput", "Memory: plan and reality"):
        assert word in text
    assert re.search(r"Waiting: \d", text)
