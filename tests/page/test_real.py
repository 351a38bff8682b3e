"""What is easily believed of a scripted server, shown with the real one: markup, long conversations, full context, failures."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.page.conftest import Faults, Server, call
from tests.page.fake_api import CODE, HTML, MARKDOWN_PARAGRAPH, MATH
from tests.page.steps import ask, button, eventually, finished, last_answer, let_the_model_say, say, shows, until, visit
from tests.server.live import engines

pytestmark = pytest.mark.slow

STORY = "Tell me a slow and very long story about every river of the world."


def test_html_in_an_answer_stays_text(page: Any, base_url: str) -> None:
    visit(page, base_url)
    let_the_model_say(page, HTML)
    ask(page, "Attack me")
    page.wait_for_timeout(300)
    assert page.evaluate("window.pwned") is None
    answer = page.locator(".message.assistant .markdown")
    assert "<script>window.pwned=2</script>" in answer.inner_text()
    assert answer.locator("img, script, b").count() == 0
    links = answer.locator("a").evaluate_all("(all) => all.map((a) => [a.getAttribute('href'), a.rel])")
    assert links == [["https://example.com/x.png", "noopener noreferrer nofollow"]]
    page.reload()
    page.wait_for_selector(".message.assistant .markdown")
    assert page.evaluate("window.pwned") is None, "nor when it comes out of the browser's database"


def test_html_in_a_question_a_title_and_a_file_name_stays_text(page: Any, base_url: str, tmp_path: Any) -> None:
    bad = "<img src=x onerror=window.pwned=1>"
    note = tmp_path / f"{bad}.txt"
    note.write_text(bad)
    visit(page, base_url)
    page.set_input_files("input[type=file]:not(.import-file)", str(note))
    page.wait_for_selector(".chip")
    ask(page, bad)
    page.reload()
    page.wait_for_selector(".message.user")
    shows(page, [bad])
    assert page.locator(".message img, .list img").count() == 0
    assert page.evaluate("window.pwned") is None


def test_code_and_formulas(page: Any, context: Any, base_url: str) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit(page, base_url)
    let_the_model_say(page, CODE)
    ask(page, "Write code")
    page.wait_for_selector(".hljs-keyword")
    page.locator("button.copy").click()
    until(page, "document.querySelector('.toast').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()").startswith("def balanced(")
    let_the_model_say(page, MATH)
    ask(page, "Write formulas")
    page.wait_for_selector(".math.drawn .katex")
    assert "$5 or $6" in last_answer(page)


def test_tagged_thoughts_are_folded_and_timed(page: Any, base_url: str) -> None:
    visit(page, base_url)
    let_the_model_say(page, "<think>\nThe user asks for a number. I count on my fingers.\n</think>\n\nForty-two.")
    ask(page, "Think")
    summary = page.locator(".thinking summary")
    assert summary.inner_text().startswith("Thought for ")
    assert page.locator(".thinking").get_attribute("open") is None
    assert last_answer(page) == "Forty-two."


def test_cached_tokens_are_shown(page: Any, base_url: str) -> None:
    visit(page, base_url)
    ask(page, "Hello, this is a first message with a few words in it, so that there is something to be found again")
    ask(page, "Hello again")
    assert "read from memory" in page.locator(".why").last.inner_text()
    assert "read from memory" in page.locator(".meter-text").inner_text()


def test_a_page_closed_while_writing_says_so_afterwards(page: Any, base_url: str) -> None:
    visit(page, base_url, short=False)
    say(page, STORY)
    page.wait_for_selector(".message.running .markdown")
    page.wait_for_timeout(1500)
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert "closed or reloaded" in page.locator(".message.assistant").inner_text()
    shows(page, [STORY])


def test_answering_goes_on_in_the_background(page: Any, base_url: str) -> None:
    visit(page, base_url, short=False)
    let_the_model_say(page, "One two three four five six seven eight nine ten. " * 20 + "The end.")
    say(page, "Count")
    page.wait_for_selector(".message.running .markdown")
    button(page, "New chat", nth=0).click()
    page.wait_for_selector(".message", state="detached")
    page.wait_for_timeout(1000)
    page.locator(".entry").click()
    finished(page)
    assert last_answer(page).endswith("The end.")


def test_files_are_dropped_on_the_page(page: Any, base_url: str) -> None:
    visit(page, base_url)
    page.evaluate(
        """() => {
          const files = new DataTransfer();
          files.items.add(new File(['dropped text'], 'dropped.txt', {type: 'text/plain'}));
          const place = document.querySelector('main');
          for (const kind of ['dragenter', 'dragover', 'drop']) {
            place.dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true}));
          }
        }"""
    )
    page.wait_for_selector(".chip")
    assert "dropped.txt" in page.locator(".chip").inner_text()
    assert page.locator(".drop").count() == 0


def test_the_policy_that_the_server_sends_is_never_broken(page: Any, base_url: str, faults: Faults) -> None:
    """The browser writes violations of the Content-Security-Policy to its console, which `faults` collects."""
    with urllib.request.urlopen(base_url, timeout=10) as answer:
        assert "script-src 'self';" in answer.headers["content-security-policy"]
    outside: list[str] = []
    page.on("request", lambda request: None if request.url.startswith(base_url) else outside.append(request.url))
    visit(page, base_url)
    for text in (CODE, MATH, HTML):
        let_the_model_say(page, text)
        ask(page, "Speak")
    for action in ("Settings", "Keyboard shortcuts"):
        button(page, action).click()
    page.goto(base_url + "/admin")
    page.wait_for_selector(".plot path:not(.area)", state="attached")
    assert [url for url in outside if not url.startswith(("blob:", "data:"))] == []
    assert faults == []


LONG_TASKS = """() => {
  window.longest = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) window.longest = Math.max(window.longest, entry.duration);
  }).observe({entryTypes: ['longtask']});
}"""
SCROLL = """async () => {
  const box = document.querySelector('.messages');
  box.scrollTop = 0;
  const frames = [];
  let last = performance.now();
  while (box.scrollTop + box.clientHeight < box.scrollHeight - 5 && frames.length < 400) {
    box.scrollTop += 400;
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - last);
    last = performance.now();
  }
  frames.sort((a, b) => a - b);
  return {count: frames.length, p95: frames[Math.floor(frames.length * 0.95)], height: box.scrollHeight};
}"""
FRAMES = """() => {
  window.frames_ms = [];
  let last = performance.now();
  const next = (now) => { if (!window.frames_ms) return; window.frames_ms.push(now - last); last = now; requestAnimationFrame(next); };
  requestAnimationFrame(next);
}"""


def long_conversation(tokens_each: int, turns: int) -> dict[str, Any]:
    """As the page exports it. The old turns are marked as not sent: the demo model's context is shorter than they are."""
    nodes: dict[str, Any] = {}
    parent = None
    for i in range(turns):
        answer = "".join(MARKDOWN_PARAGRAPH.format(i=k) for k in range(tokens_each // 27)) + CODE
        for role, content in (("user", f"Question {i}"), ("assistant", answer)):
            node = {
                "id": f"{role}{i}",
                "parent": parent,
                "role": role,
                "content": content,
                "time": i,
                "forgotten": True,
            }
            nodes[str(node["id"])] = node
            parent = node["id"]
    side = {"model": "demo", "settings": {}, "nodes": nodes, "chosen": {}}
    return {"format": "fastqwen-conversations", "conversations": [{"title": "Long", "sides": [side]}]}


def least(measure: Callable[[], float], *, below: float) -> float:
    """The best of three readings: other work on the machine can only make them worse."""
    best = measure()
    for _ in range(2):
        if best >= below:
            best = min(best, measure())
    return best


FRAME_MS = 1000 / 60
PLAIN = "<div class=messages style='height: 600px; overflow: auto'>" + "<p>one line of text</p>" * 1500 + "</div>"


def scroll_of_a_plain_page_ms(page: Any) -> float:
    """What a frame costs here and now, with nothing of ours in it: other work on the machine shows in both."""
    plain = page.context.new_page()
    try:
        plain.set_content(PLAIN)
        return float(plain.evaluate(SCROLL)["p95"])
    finally:
        plain.close()


@pytest.mark.timeout(1500)  # the model writes some hundred tokens, several times
def test_twenty_thousand_tokens_scroll_and_stream_smoothly(page: Any, base_url: str, tmp_path: Any) -> None:
    whole = long_conversation(tokens_each=2600, turns=8)
    nodes = whole["conversations"][0]["sides"][0]["nodes"].values()
    counts = [call(base_url + "/tokenize", {"prompt": node["content"]})["count"] for node in nodes]
    assert sum(counts) > 20_000
    path = tmp_path / "long.json"
    path.write_text(json.dumps(whole))
    visit(page, base_url, short=False)
    button(page, "Import and export").click()
    page.set_input_files(".import-file", str(path))
    page.wait_for_selector("dialog", state="detached")
    page.locator(".entry").click()
    page.wait_for_selector(".message.assistant .hljs-keyword", state="attached")
    page.evaluate(LONG_TASKS)

    def freeze_while(action: Callable[[], Any]) -> float:
        page.evaluate("window.longest = 0")
        action()
        return float(page.evaluate("window.longest"))

    def scroll_p95_ms() -> float:
        found = page.evaluate(SCROLL)
        assert found["count"] > 50
        return float(found["p95"])

    scrolling = least(scroll_p95_ms, below=50)
    plain_ms = scroll_of_a_plain_page_ms(page)
    let_the_model_say(page, CODE + MATH)
    page.evaluate(FRAMES)
    streaming = least(lambda: freeze_while(lambda: ask(page, "And now?")), below=200)
    frames = sorted(page.evaluate("window.frames_ms"))
    p95 = frames[int(len(frames) * 0.95)]
    page.evaluate("window.frames_ms = null")
    while_streaming: list[float] = []

    def scroll_while_it_streams() -> None:
        say(page, "Once more")
        page.wait_for_selector(".message.running")
        while_streaming.append(scroll_p95_ms())
        finished(page)

    scroll_while_it_streams()
    typing = least(
        lambda: freeze_while(lambda: page.locator("#composer").press_sequentially("still quick", delay=5)), below=150
    )
    # On a busy machine every page is slow: the limits grow by what one costs that does nothing, before and after.
    slowness = max(1.0, max(plain_ms, scroll_of_a_plain_page_ms(page)) / FRAME_MS)
    smooth_ms = 50 * slowness
    print(
        f"\n{sum(counts)} tokens: scroll p95 {scrolling:.0f} ms a frame, {while_streaming[0]:.0f} while streaming; streaming "
        f"p95 {p95:.0f} ms a frame, longest task {streaming:.0f} ms; typing, longest task {typing:.0f} ms; "
        f"smooth is {smooth_ms:.0f} ms"
    )
    assert scrolling < smooth_ms and p95 < smooth_ms
    assert streaming < 200 * slowness and typing < 150 * slowness


def test_a_full_context_is_explained_and_can_be_left(page: Any, narrow: Server) -> None:
    page.goto(narrow.url)
    page.wait_for_selector("#api-key")
    page.fill("#api-key", "wrong-key")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('dialog')?.textContent.includes('did not accept')")
    page.fill("#api-key", "a-secret-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog", state="detached")
    button(page, "Settings").click()
    page.fill("#set-max_tokens", "60")
    until(page, "document.querySelector('select.model')?.value")
    for i in range(4):
        say(page, f"Question {i}: please tell me something about the sea, the wind and the rain in autumn.")
        finished(page)
        if page.locator(".note.error").count():
            break
    note = page.locator(".note.error").inner_text()
    assert "no longer fits into the model's context (256)" in note
    assert "--max-model-len" in note
    button(page, "Leave out the oldest half and try again").click()
    finished(page)
    assert page.locator(".note.error").count() == 0
    assert last_answer(page)
    assert page.locator(".message.forgotten").count() >= 2


def test_an_engine_that_dies_is_named_and_the_page_goes_on(context: Any, mortal: Server) -> None:
    page = context.new_page()
    visit(page, mortal.url, short=False)
    say(page, STORY)
    page.wait_for_selector(".message.running .markdown")
    assert mortal.process is not None
    [engine] = engines(mortal.process.pid)
    os.kill(engine, signal.SIGKILL)
    page.wait_for_selector(".note.error")
    assert last_answer(page), "the words that had arrived are kept"
    button(page, "Settings").click()
    page.fill("#set-max_tokens", "12")
    say(page, "Are you there?")
    eventually(page, lambda: page.locator(".message.assistant").count(), 2)
    until(page, "!document.querySelector('.banner.bad') && !document.querySelector('.note.waiting')")
    finished(page)
    assert last_answer(page)


def test_an_answer_cut_at_the_limit_goes_on(page: Any, base_url: str) -> None:
    visit(page, base_url)
    begun = ask(page, "Write a short story about a cat.")
    button(page, "Continue").click()
    until(page, "document.querySelector('.send.stop')")
    finished(page)
    whole = last_answer(page)
    assert whole.startswith(begun.rstrip()) and len(whole) > len(begun) + 10
    assert page.locator(".branches").count() == 0


def test_alternatives_of_a_word_and_a_branch_from_one(page: Any, base_url: str) -> None:
    visit(page, base_url)
    answer = ask(page, "What is gravity?")
    button(page, "Alternatives of a word").click()
    page.wait_for_selector(".words ol li")
    for _ in range(3):
        button(page, "Next word").click()
    page.wait_for_selector(".words ol li")
    shares = page.locator(".words li b").all_inner_texts()
    assert len(shares) == 8 and all("%" in share for share in shares)
    word = page.locator(".words strong").inner_text()
    other = page.locator(".words li button:not([disabled])").first
    chosen = other.locator("span").inner_text()
    other.click()
    finished(page)
    eventually(page, lambda: page.locator(".message.assistant .branches").inner_text().strip(), "2 / 2")
    begun = answer[: answer.index(word)].rstrip()
    assert last_answer(page).startswith(begun) and chosen in last_answer(page)[len(begun) :][: len(chosen) + 2]
