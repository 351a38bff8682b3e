"""Markdown as people know it, diagrams and previews, and that none of it reaches further than it should."""

from __future__ import annotations

from typing import Any

import pytest

from tests.page.conftest import Faults, Server
from tests.page.steps import ask, button, eventually, last_answer, until, visit

pytestmark = pytest.mark.slow

MARKUP = """- [x] buy *tea*
- [ ] drink it
- [link](https://example.com)

Water boils at 100 °C.[^1] H<sub>2</sub>O, x<sup>2</sup>, <kbd>Esc</kbd><br>next line

<details>
<summary>More **words**</summary>

Hidden `code`

- a list

<details><summary>Inner</summary>Deep</details>
</details>

After it.

[^1]: At sea level,
    of course.
"""
DIAGRAM = "```mermaid\nflowchart LR\n  A[Tea] --> B{Hot?}\n  B -->|yes| C[Drink]\n```\n\nAs drawn.\n"
WRONG = "```mermaid\nflowchart LR\n  A -->\n```\n"
PAGE = """```html
<h1 id="title">Hello</h1>
<style>h1 { color: rgb(1, 2, 3); }</style>
<img src="https://example.com/leak.png"><script src="https://example.com/leak.js"></script>
<script>
const told = [];
const note = (what) => told.push(what);
try { parent.document.title; } catch { note('no page around it'); }
try { localStorage.length; } catch { note('no storage'); }
fetch('https://example.com/leak').catch(() => note('no network'));
fetch('/v1/models').catch(() => { note('not even this server'); document.getElementById('title').textContent = told.join(', '); });
</script>
```
"""
SVG = '```svg\n<svg xmlns="http://www.w3.org/2000/svg" width="80" height="40"><rect width="80" height="40" fill="teal"/></svg>\n```\n'


def frame_of(page: Any) -> Any:
    page.wait_for_selector("iframe.frame")
    return page.frame_locator("iframe.frame")


def test_task_lists_footnotes_details_and_harmless_tags(page: Any, fake: Server) -> None:
    fake.set(answer=MARKUP)
    visit(page, fake.url, short=False)
    ask(page, "write")
    answer = page.locator(".message.assistant .markdown")
    boxes = answer.locator("input[type=checkbox]").evaluate_all("(all) => all.map((e) => [e.checked, e.disabled])")
    assert boxes == [[True, True], [False, True]]
    assert answer.locator("li.task em").inner_text() == "tea"
    assert answer.locator("sub, kbd, sup").all_inner_texts() == ["1", "2", "2", "Esc", "1"]
    assert answer.locator("br").count() == 1
    outer = answer.locator("details").first
    assert outer.evaluate("(e) => e.open") is False
    outer.locator("summary").first.click()
    assert outer.locator("summary strong").inner_text() == "words"
    assert "Hidden code" in outer.inner_text() and outer.locator("li").inner_text() == "a list"
    assert outer.locator("details").count() == 1
    assert answer.locator(".footnote").inner_text().replace("\n", " ") == "1 At sea level, of course."
    answer.locator(".note-mark").click()
    assert last_answer(page).index("After it.") > last_answer(page).index("Hidden")


def test_what_belongs_to_a_task_stands_inside_it(page: Any, fake: Server) -> None:
    fake.set(answer="- [ ] tea\n  - green\n- [x] milk")
    visit(page, fake.url, short=False)
    ask(page, "write")
    task, inside = (page.locator(f".markdown {place}").first.bounding_box() for place in ("li.task", "li.task li"))
    assert inside["x"] > task["x"] + 20


def test_markup_may_stream_in_small_pieces(page: Any, fake: Server) -> None:
    """Every state that a growing answer passes through is drawn; the last must be as if it had come at once."""
    fake.set(answer=MARKUP * 3)
    visit(page, fake.url, short=False)
    ask(page, "write")
    streamed = page.locator(".message.assistant .markdown").inner_html()
    page.reload()
    page.wait_for_selector(".message.assistant .markdown")
    eventually(page, lambda: page.locator(".message.assistant .markdown").inner_html(), streamed)


def test_a_diagram_is_drawn_in_a_frame_and_mermaid_loaded_only_for_it(page: Any, fake: Server) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    visit(page, fake.url, short=False)
    ask(page, "Hello")
    assert not any("mermaid" in url for url in asked)
    fake.set(answer=DIAGRAM)
    ask(page, "draw")
    frame = frame_of(page)
    frame.locator("svg .node").first.wait_for()
    assert frame.locator("svg .node").count() == 3
    until(page, "document.querySelector('iframe.frame').getBoundingClientRect().height > 60")
    assert not page.locator(".code pre").is_visible()
    button(page, "Diagram").click()
    assert "flowchart LR" in page.locator(".code pre").inner_text()
    assert page.locator("iframe.frame").count() == 0


def test_a_diagram_that_is_wrong_says_so_and_stays_code(page: Any, fake: Server) -> None:
    fake.set(answer=WRONG)
    visit(page, fake.url, short=False)
    ask(page, "draw")
    page.wait_for_selector(".code .fault")
    assert "cannot be drawn" in page.locator(".code .fault").inner_text()
    button(page, "Diagram").click()
    assert page.locator(".code pre").is_visible()


def test_a_preview_runs_without_network_storage_or_the_page(page: Any, fake: Server, faults: Faults) -> None:
    fake.set(answer=PAGE)
    outside: list[str] = []
    page.context.route("https://example.com/**", lambda route: (outside.append(route.request.url), route.abort()))
    visit(page, fake.url, short=False)
    ask(page, "write")
    assert page.locator("iframe").count() == 0, "nothing runs before it is asked for"
    button(page, "Preview").click()
    title = frame_of(page).locator("#title")
    eventually(page, lambda: title.inner_text(), "no page around it, no storage, no network, not even this server")
    assert title.evaluate("(e) => getComputedStyle(e).color") == "rgb(1, 2, 3)"
    assert outside == []
    blocked = [fault for fault in faults if "example.com" in fault or "/v1/models" in fault]
    assert blocked and len(blocked) == len(
        [fault for fault in faults if "Content Security Policy" in fault or "CSP" in fault]
    )
    faults.clear()


def test_svg_is_previewed(page: Any, fake: Server) -> None:
    fake.set(answer=SVG)
    visit(page, fake.url, short=False)
    ask(page, "draw")
    button(page, "Preview").click()
    assert frame_of(page).locator("rect").bounding_box()["width"] == 80
