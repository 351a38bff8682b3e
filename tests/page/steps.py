"""What a person does on the page, in words."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

MOD = "Control"
PATIENCE_S = 180  # what takes 5 s alone takes a minute beside seven other programs on two cores


def until(page: Any, condition: str) -> None:
    """Waits for a JavaScript condition. Playwright's own wait needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + PATIENCE_S
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"still not so: {condition}"
        page.wait_for_timeout(50)


def eventually(page: Any, reading: Callable[[], Any], wanted: Any) -> None:
    """The page draws a moment after a click, so a reading is repeated until it is what is wanted."""
    deadline = time.monotonic() + PATIENCE_S
    while (seen := reading()) != wanted:
        assert time.monotonic() < deadline, f"wanted {wanted!r}, the page shows {seen!r}"
        page.wait_for_timeout(50)


# A small model may ramble on until its context is full; short answers keep the tests quick.
SHORT = """localStorage.getItem('fastqwen.settings') ||
  localStorage.setItem('fastqwen.settings', JSON.stringify({max_tokens: 12}))"""


def visit(page: Any, url: str, *, short: bool = True) -> None:
    if short:
        page.add_init_script(SHORT)
    page.goto(url + "/")
    page.wait_for_selector("#composer")
    until(page, "document.querySelector('select.model')?.value")


def say(page: Any, text: str) -> None:
    page.fill("#composer", text)
    page.press("#composer", "Enter")


def finished(page: Any) -> None:
    """Waits until nothing is being written any more."""
    page.wait_for_selector(".message.assistant")
    until(page, "!document.querySelector('.send.stop') && !document.querySelector('.message.running')")


def ask(page: Any, text: str) -> str:
    say(page, text)
    finished(page)
    return last_answer(page)


def last_answer(page: Any) -> str:
    return str(page.locator(".message.assistant .markdown").last.inner_text())


def questions(page: Any) -> list[str]:
    return [str(text) for text in page.locator(".message.user .bubble").all_text_contents()]


def let_the_model_say(page: Any, text: str) -> None:
    """A grammar leaves the model no other words: the real server streams exactly this text."""

    def add_grammar(route: Any) -> None:
        body = {**route.request.post_data_json, "structured_outputs": {"choice": [text]}, "max_tokens": 4000}
        route.continue_(post_data=json.dumps(body))

    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", add_grammar)


def shows(page: Any, wanted: list[str]) -> None:
    eventually(page, lambda: questions(page), wanted)


def button(page: Any, name: str, *, nth: int = -1) -> Any:
    return page.get_by_role("button", name=re.compile(f"^{re.escape(name)}$")).nth(nth)
