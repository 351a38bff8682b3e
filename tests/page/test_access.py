"""For everybody: axe-core finds nothing on a desk, on a phone, in Chinese, in the dark; a finger hits what it aims at."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

from tests.page.conftest import Server
from tests.page.steps import MOD, finished, visit
from tests.page.test_markup import DIAGRAM, MARKUP

pytestmark = pytest.mark.slow

DESK = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US"}
PHONE = {"viewport": {"width": 375, "height": 700}, "is_mobile": True, "has_touch": True, "locale": "en-US"}
DEVICES = {
    "desk": DESK,
    "dark": {**DESK, "color_scheme": "dark"},
    "phone": PHONE,
    "chinese phone": {**PHONE, "locale": "zh-CN"},
}
LEAST_PX = 44
SMALL = """(least) => [...document.querySelectorAll('button, a, select, input, textarea, summary, [role=option]')]
  .filter((e) => e.checkVisibility({opacityProperty: true, visibilityProperty: true}) && !e.disabled && !e.closest('[inert]'))
  .filter((e) => !e.matches('.markdown a, .skip, label input'))  // links are as high as their text; a label is hit for its box
  .map((e) => [e, e.closest('label.pill, label.search') ?? e])
  .map(([e, hit]) => [e.outerHTML.slice(0, 90), hit.getBoundingClientRect()])
  .filter(([, box]) => box.width > 0 && (box.height < least - 0.5 || box.width < least - 0.5))
  .map(([name, box]) => `${Math.round(box.width)} x ${Math.round(box.height)}: ${name}`)"""


def violations(page: Any) -> list[str]:
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run({iframes: false}).then((r) => r.violations)")
    return [f"{one['id']}: {node['html'][:120]}" for one in found for node in one["nodes"]]


def empty(page: Any) -> None:
    page.wait_for_selector(".ideas")


def conversation(page: Any) -> None:
    page.fill("#composer", "write")
    page.locator(".send").click()
    finished(page)
    page.wait_for_selector("iframe.frame")


def words(page: Any) -> None:
    conversation(page)
    page.locator(".actions [aria-label^='Alternatives'], .actions [aria-label^='查看词语']").click()
    page.wait_for_selector(".words li")


def settings(page: Any) -> None:
    page.locator("header .icon-button").last.click()
    for summary in page.locator(".settings summary").all():
        summary.click()


def sidebar(page: Any) -> None:
    conversation(page)
    if page.locator(".sidebar").count() == 0:
        page.locator("header .icon-button").first.click()
    page.wait_for_selector(".entry-tools")


def slash(page: Any) -> None:
    page.fill("#composer", "/")
    page.wait_for_selector(".slash li")


def library(page: Any) -> None:
    settings(page)
    page.locator(".settings > .button").first.click()
    page.wait_for_selector("dialog")


def planner(page: Any) -> None:
    page.locator(".plan").click()
    page.wait_for_selector(".command")


def compare(page: Any) -> None:
    if page.locator(".sidebar").count() == 0:
        page.locator("header .icon-button").first.click()
    page.locator(".new.quiet").click()
    page.wait_for_selector(".compare-intro")


def admin(page: Any) -> None:
    page.goto(page.url.rstrip("/") + "/admin")
    page.wait_for_selector(".plot path:not(.area)", state="attached")


VIEWS = (empty, conversation, words, settings, sidebar, slash, library, planner, compare, admin)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_axe_finds_nothing_and_fingers_hit(
    browser: Any, fake: Server, view: Callable[[Any], None], device: str
) -> None:
    fake.set(answer=MARKUP + DIAGRAM + "\n```python\nprint(1)\n```\n")
    context = browser.new_context(**DEVICES[device])
    context.set_default_timeout(60_000)
    page = context.new_page()
    visit(page, fake.url, short=False)
    view(page)
    page.wait_for_timeout(100)
    assert violations(page) == []
    if "phone" in device:
        assert page.evaluate(SMALL, LEAST_PX) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    context.close()


def test_the_page_is_usable_with_the_keyboard_alone(page: Any, fake: Server) -> None:
    visit(page, fake.url, short=False)
    page.keyboard.type("tell me something")
    page.keyboard.press("Enter")
    finished(page)
    page.locator(".message.assistant .actions .icon-button").first.focus()
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # Alternatives of a word
    page.wait_for_selector(".words li")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.wait_for_selector(".words", state="detached")
    page.keyboard.press(f"{MOD}+,")
    page.wait_for_selector(".settings")
