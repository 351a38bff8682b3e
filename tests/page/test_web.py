"""`fastqwen web`: the same page in front of another server."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.page.conftest import FASTQWEN, Server, free_port
from tests.page.steps import ask, button, eventually, finished, last_answer, say, until, visit
from tests.page.test_page import STORY, wait_until_idle
from tests.server.live import eventually as soon

pytestmark = pytest.mark.slow


@contextmanager
def web(*urls: str, more: str = "", **env: str) -> Iterator[str]:
    server = Server(f"{FASTQWEN} web {' '.join(f'--api {url}' for url in urls)} --port {{port}} {more}", free_port())
    server.launch(**env)
    try:
        soon(lambda: is_there(server.url), 30, "a page")
        yield server.url
    finally:
        server.kill()


def is_there(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=2):
            return True
    except OSError:
        return False


def test_a_conversation_and_a_stop_that_reaches_the_server_behind(page: Any, base_url: str) -> None:
    with web(base_url + "/v1") as url:
        visit(page, url)
        assert ask(page, "Hello there")
        assert " of 8,192 tokens" in page.locator(".meter-text").inner_text()
        assert "First word after" in page.locator(".why").inner_text()
        button(page, "Settings").click()
        page.fill("#set-max_tokens", "")
        say(page, STORY)
        page.wait_for_selector(".message.running .markdown")
        page.keyboard.press("Escape")
        finished(page)
        wait_until_idle(base_url)
        page.goto(url + "/admin")
        page.wait_for_selector(".card")
        assert "Memory: plan and reality" in page.locator("main").inner_text()


def test_the_server_behind_dies_and_comes_back(context: Any, mortal: Server) -> None:
    page = context.new_page()
    with web(mortal.url) as url:
        visit(page, url, short=False)
        say(page, STORY)
        page.wait_for_selector(".message.running .markdown")
        mortal.kill()
        page.wait_for_selector(".note.error")
        note = page.locator(".note.error").inner_text()
        assert "connection to the server broke in the middle of the answer" in note and mortal.url in note
        until(page, "document.querySelector('.banner.bad')?.textContent.includes('is that server running')")
        assert last_answer(page)
        button(page, "Settings").click()
        page.fill("#set-max_tokens", "12")
        say(page, "Are you there?")
        page.wait_for_selector(".note.waiting")
        mortal.start()
        page.wait_for_selector(".banner.good")
        finished(page)
        assert page.locator(".note.waiting").count() == 0
        assert last_answer(page)


def test_a_server_with_nothing_but_openais_routes(page: Any, fake: Server) -> None:
    fake.set(bare=True)
    with web(fake.url) as url:
        visit(page, url)
        assert ask(page, "Hello").startswith("You said")
        page.fill("#composer", "a draft that the page has to guess the size of")
        until(page, "document.querySelector('.meter-text').textContent.includes('tokens')")
        assert page.locator(".banner").count() == 0
        page.goto(url + "/admin")
        until(page, "document.querySelector('main')?.textContent.includes('tells no figures')")


def test_two_servers_side_by_side(page: Any, base_url: str, fake: Server) -> None:
    with web(base_url, fake.url) as url:
        visit(page, url)
        button(page, "Side by side").click()
        page.locator(".sides-head select").nth(0).select_option("demo")
        page.locator(".sides-head select").nth(1).select_option("Qwen3-4B")
        say(page, "Who are you?")
        finished(page)
        answers = page.locator(".sides .message.assistant .markdown").all_inner_texts()
        assert not answers[0].startswith("You said") and answers[1].startswith("You said: Who are you? (model Qwen3-4B")
        assert fake.told()["requests"][-1]["model"] == "Qwen3-4B"
        button(page, "B is better").click()
        eventually(page, lambda: button(page, "B is better").get_attribute("aria-pressed"), "true")


def test_keys_that_are_needed_and_keys_that_are_kept(page: Any, fake: Server) -> None:
    fake.set(key="secret")
    with web(fake.url) as url:
        page.goto(url)
        page.wait_for_selector("#api-key")
        page.fill("#api-key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog", state="detached")
        assert ask(page, "Hello").startswith("You said")
        page.evaluate("localStorage.clear()")
    with web(fake.url, FASTQWEN_API_KEY="secret") as url:
        bodies: list[str] = []
        page.on("response", lambda response: bodies.append(str(response.headers)))
        visit(page, url)
        assert ask(page, "Hello").startswith("You said")
        assert not any("secret" in body for body in bodies)
    with web(fake.url, FASTQWEN_API_KEY="wrong") as url:
        page.goto(url)
        until(page, "document.querySelector('.banner.bad')?.textContent.includes('--api-key')")


def test_a_website_is_no_api(page: Any, base_url: str) -> None:
    with web(base_url + "/static") as url:
        page.goto(url)
        page.wait_for_selector(".banner.bad")
        assert re.search(r"no OpenAI-compatible API.*/v1", page.locator(".banner.bad").inner_text())
