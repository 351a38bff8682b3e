"""Takes the pictures of docs/page.md: ``python scripts/page_screenshots.py`` (needs playwright, and Chromium on PATH).

The fake server answers, so that the pictures come out alike on every machine.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.page.conftest import BROWSER_FLAGS, FAKE, Server, free_port  # noqa: E402
from tests.page.steps import ask, button, finished, say, visit  # noqa: E402
from tests.page.test_words import click_word  # noqa: E402

IMAGES = ROOT / "docs/images"
MAX_BYTES = 200_000
LIKELY = {
    " sea": 0.58,
    " ocean": 0.24,
    " lake": 0.09,
    " delta": 0.05,
    " mouth": 0.02,
    " valley": 0.008,
    " mountains": 0.0004,
}
NOTES = {"timing": {"waited_s": 0.0, "read_s": 0.08, "wrote_s": 1.2}, "cache": {"cause": "new_text"}}
DESK = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US"}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}


def save(page: Any, name: str, *, full: bool = False) -> None:
    page.wait_for_timeout(600)
    page.mouse.move(0, 0)
    path = IMAGES / f"{name}.png"
    page.screenshot(path=path, full_page=full)
    size = path.stat().st_size
    assert size < MAX_BYTES, f"{path.name} has {size} bytes"
    print(f"{path.relative_to(ROOT)}: {size} bytes")


def empty(page: Any, url: str) -> None:
    visit(page, url, short=False)
    save(page, "page-empty")


def tool(page: Any, url: str) -> None:
    visit(page, url, short=False)
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    page.keyboard.press("Control+,")
    page.get_by_text("Tools (JSON)").click()
    page.get_by_role("textbox", name="Tools (JSON)").fill(json.dumps(tools))
    page.keyboard.press("Control+,")
    ask_for_tool(page)
    save(page, "page-tool")


def ask_for_tool(page: Any) -> None:
    say(page, "Which tool tells the weather in Hangzhou? Use that tool.")
    finished(page)
    page.locator(".tool textarea").fill("31 degrees, sunny")
    button(page, "Send the result").click()
    page.wait_for_selector(".message.tool")
    finished(page)


def light(page: Any, url: str) -> None:
    visit(page, url, short=False)
    ask(page, "Please think: what is six times seven?")
    ask(page, "Write a Python function that checks whether brackets are balanced.")
    page.wait_for_selector(".hljs-keyword")
    save(page, "page-light")
    page.keyboard.press("Control+,")
    save(page, "page-settings")


RIVER = """## The way of water

Snow melts, a river carries it to the sea, and the *sun* lifts it again.[^1]

```mermaid
flowchart LR
  Snow --> River --> Sea --> Clouds --> Snow
```

| stage | share |
|:--|--:|
| sea | 97.2 % |
| ice | 2.1 % |

- [x] rain, snow
- [ ] dew

[^1]: A drop stays in the air for about nine days.
"""


def words(page: Any, url: str) -> None:
    visit(page, url, short=False)
    ask(page, "Where does a river end?")
    click_word(page, "sea")
    save(page, "page-words")


def markup(page: Any, url: str) -> None:
    visit(page, url, short=False)
    ask(page, "How does water travel?")
    page.frame_locator("iframe.frame").locator("svg .node").first.wait_for()
    save(page, "page-markup")


def plan(page: Any, url: str) -> None:
    visit(page, url, short=False)
    page.locator(".plan").click()
    page.wait_for_selector(".command")
    save(page, "page-plan")


def dark(page: Any, url: str) -> None:
    visit(page, url, short=False)
    ask(page, "Show me some math.")
    page.wait_for_selector(".math.drawn")
    save(page, "page-dark")


def chinese(page: Any, url: str) -> None:
    visit(page, url, short=False)
    ask(page, "用简单的话解释：前缀缓存为什么能让对话更快？")
    page.wait_for_selector(".math.drawn")
    save(page, "page-chinese")


def phone(page: Any, url: str) -> None:
    visit(page, url, short=False)
    page.fill("#composer", "Write some code for me, please.")
    button(page, "Send").tap()
    finished(page)
    save(page, "page-phone")


def compare(page: Any, url: str) -> None:
    visit(page, url, short=False)
    button(page, "Side by side").click()
    page.locator(".sides-head select").nth(1).select_option("Qwen-7B-Chat")
    ask(page, "Show me some math.")
    save(page, "page-compare")


def loading(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector(".banner progress")
    page.fill("#composer", "Are you there already?")
    page.press("#composer", "Enter")
    page.wait_for_selector(".note.waiting")
    save(page, "page-loading")


def admin(page: Any, url: str) -> None:
    page.goto(url + "/admin")
    page.wait_for_timeout(58_000)
    save(page, "page-admin", full=True)


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "Chromium is not on PATH"
    IMAGES.mkdir(parents=True, exist_ok=True)
    server = Server(FAKE, free_port())
    server.start()
    views = [
        (empty, DESK),
        (light, DESK),
        (tool, DESK),
        (words, DESK),
        (markup, DESK),
        (plan, DESK),
        (dark, {**DESK, "color_scheme": "dark"}),
        (chinese, {**DESK, "locale": "zh-CN"}),
        (phone, {**PHONE, "locale": "en-US"}),
        (compare, DESK),
        (admin, DESK),
        (loading, DESK),
    ]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_FLAGS)
            for view, options in views:
                says = {words: "A river ends in the sea, and begins where rain falls.", markup: RIVER}.get(view, "")
                server.set(busy=view is admin, answer=says, notes=NOTES, likely=LIKELY if view is words else {})
                if view is loading:
                    server.set(state="loading", progress=0.42)
                context = browser.new_context(**options)
                view(context.new_page(), server.url)
                context.close()
            browser.close()
    finally:
        server.kill()


if __name__ == "__main__":
    main()
