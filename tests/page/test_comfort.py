"""Thinking, presets, folders, sharing, more settings, imports, installing, tools in a loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.page.conftest import Server
from tests.page.steps import MOD, ask, button, eventually, finished, last_answer, questions, say, shows, until, visit

pytestmark = pytest.mark.slow

CHATGPT = [
    {
        "title": "Tea",
        "create_time": 1700000000.5,
        "update_time": 1700000100,
        "current_node": "d2",
        "mapping": {
            "root": {"id": "root", "message": None, "parent": None, "children": ["a"]},
            "a": {
                "parent": "root",
                "message": {"author": {"role": "system"}, "content": {"content_type": "text", "parts": ["Be brief."]}},
            },
            "b": {
                "parent": "a",
                "message": {
                    "author": {"role": "user"},
                    "create_time": 1700000001,
                    "content": {"content_type": "multimodal_text", "parts": [{"content_type": "image"}, "How long?"]},
                },
            },
            "c": {
                "parent": "b",
                "message": {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": [""]}},
            },
            "d1": {
                "parent": "c",
                "message": {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["Four."]}},
            },
            "d2": {
                "parent": "c",
                "message": {"author": {"role": "assistant"}, "content": {"content_type": "text", "parts": ["Three."]}},
            },
        },
    }
]
OPEN_WEBUI = [
    {
        "id": "x",
        "title": "Rivers",
        "updated_at": 1700000000,
        "created_at": 1700000000,
        "pinned": True,
        "chat": {
            "title": "Rivers",
            "params": {"system": "You know rivers."},
            "history": {
                "currentId": "2",
                "messages": {
                    "1": {"id": "1", "parentId": None, "role": "user", "content": "Longest?", "timestamp": 1700000000},
                    "2": {"id": "2", "parentId": "1", "role": "assistant", "content": "The Nile.", "model": "qwen3:8b"},
                },
            },
        },
    }
]


def body_of(fake: Server) -> dict[str, Any]:
    return dict(fake.told()["requests"][-1])


def take_file(page: Any, path: Path) -> None:
    button(page, "Import and export").click()
    page.set_input_files(".import-file", str(path))
    page.wait_for_selector("dialog", state="detached")


def test_thinking_is_switched_beside_send(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    switch = page.locator(".composer select")
    for value, wanted in (
        ("off", (False, None)),
        ("on", (True, None)),
        ("on 2048", (True, 2048)),
        ("auto", (None, None)),
    ):
        switch.select_option(value)
        ask(page, "Hello")
        body = body_of(fake)
        assert (body.get("chat_template_kwargs", {}).get("enable_thinking"), body.get("thinking_budget")) == wanted


def test_prompts_and_presets_are_chosen_with_a_slash(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    box = page.locator("#composer")
    box.press_sequentially("/transl")
    assert page.locator(".slash li").all_inner_texts()[0].startswith("Translate")
    box.press("Enter")
    assert box.input_value().startswith("Translate this into Chinese")
    box.fill("")
    button(page, "Settings").click()
    page.fill("#set-system", "Answer in verse.")
    page.fill("#set-temperature", "0.2")
    button(page, "Presets and prompts").click()
    page.fill("#entry-name", "Poet")
    page.get_by_label("With this conversation's settings").check()
    page.locator("dialog").get_by_role("button", name="Save").click()
    page.wait_for_selector(".library li")
    page.keyboard.press("Escape")
    button(page, "New chat", nth=0).click()
    box.press_sequentially("/poe")
    page.locator(".slash li").click()
    ask(page, "A line, please")
    assert body_of(fake)["messages"][0] == {"role": "system", "content": "Answer in verse."}
    assert body_of(fake)["temperature"] == 0.2
    assert ask(page, "/etc/hosts is a file").startswith("You said: /etc/hosts"), "a slash alone is no command"


def test_pins_and_folders(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    for text in ("about tea", "about rivers", "about hills"):
        button(page, "New chat", nth=0).click()
        ask(page, text)
    button(page, "Folder").click()
    page.keyboard.type("Landscape")
    page.keyboard.press("Enter")
    page.wait_for_selector("details.folder")
    assert "Landscape" in page.locator("details.folder summary").inner_text()
    assert page.locator("details.folder .entry").inner_text() == "about hills"
    page.locator(".entry", has_text="about tea").click()
    shows(page, ["about tea"])
    button(page, "Pin").click()
    eventually(page, lambda: page.locator(".list h2").first.inner_text(), "Pinned")
    page.wait_for_timeout(300)
    page.reload()
    page.wait_for_selector("details.folder")
    assert page.locator(".list h2").all_inner_texts() == ["Pinned", "Today"]


def test_a_conversation_is_shared_as_a_web_page(page: Any, fake: Server, tmp_path: Path) -> None:
    visit(page, fake.url, short=False)
    ask(page, "<b>code</b>, please")
    button(page, "Import and export").click()
    with page.expect_download() as download:
        button(page, "Web page, to share").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.suffix == ".html"
    shared = page.context.new_page()
    asked: list[str] = []
    shared.on("request", lambda request: asked.append(request.url))
    shared.goto(path.as_uri())
    assert "def balanced" in shared.inner_text("body") and "<b>code</b>" in shared.inner_text("body")
    assert shared.locator("script, button, img").count() == 0
    assert [url for url in asked if not url.startswith("file:")] == []


def test_more_settings_reach_the_server(page: Any, fake: Server) -> None:
    visit(page, fake.url)
    button(page, "Settings").click()
    page.get_by_text("More", exact=True).click()
    numbers = {
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
    }
    for name, value in numbers.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#set-stop", "END\n###")
    page.get_by_text("JSON schema of the answer").click()
    schema = page.get_by_role("textbox", name="JSON schema of the answer")
    schema.fill("[1]")
    assert page.locator(".fault").inner_text().startswith("This is not a JSON schema")
    schema.fill('{"type": "object"}')
    ask(page, "Hello")
    body = body_of(fake)
    assert {name: body[name] for name in numbers} == numbers
    assert body["stop"] == ["END", "###"]
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    button(page, "Back to the server's defaults").click()
    ask(page, "Hello")
    assert set(body_of(fake)) == {"model", "messages", "stream", "stream_options"}


def test_the_publishers_sampling_is_shown_and_left_to_the_server(page: Any, fake: Server) -> None:
    models = {"data": [{"id": "one", "object": "model", "default_sampling": {"temperature": 0.2, "top_p": 0.9}}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    visit(page, fake.url)
    button(page, "Settings").click()
    assert page.locator("#set-temperature").get_attribute("placeholder") == "0.2"
    assert page.locator("#set-top_k").get_attribute("placeholder") == "default"
    ask(page, "Hello")
    assert "temperature" not in body_of(fake)


def test_exports_of_other_pages_are_read(page: Any, fake: Server, tmp_path: Path) -> None:
    for name, data in (("chatgpt", CHATGPT), ("webui", OPEN_WEBUI)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    visit(page, fake.url)
    take_file(page, tmp_path / "chatgpt.json")
    page.locator(".entry", has_text="Tea").click()
    shows(page, ["[image]\nHow long?"])
    assert last_answer(page) == "Three."
    assert page.locator(".message.assistant .branches").inner_text().strip() == "2 / 2"
    assert "Be brief." in page.locator(".system").inner_text()
    take_file(page, tmp_path / "webui.json")
    assert page.locator(".list h2").first.inner_text() == "Pinned"
    page.locator(".entry", has_text="Rivers").click()
    shows(page, ["Longest?"])
    assert last_answer(page) == "The Nile."
    assert ask(page, "And then?").startswith("You said")


def test_the_page_is_installable_and_opens_without_its_server(page: Any, fake: Server) -> None:
    visit(page, fake.url, short=False)
    ask(page, "Remember the tea")
    manifest = page.evaluate("fetch(document.querySelector('link[rel=manifest]').href).then((r) => r.json())")
    assert manifest["display"] == "standalone" and manifest["icons"]
    page.evaluate("navigator.serviceWorker.ready.then(() => true)")
    until(page, "Boolean(navigator.serviceWorker.controller)")
    page.wait_for_timeout(500)
    fake.kill()
    page.reload()
    shows(page, ["Remember the tea"])
    page.wait_for_selector(".banner.bad")
    assert "The server does not answer." in page.locator(".banner").inner_text()


def test_only_what_the_server_has_is_offered(page: Any, fake: Server) -> None:
    models = {"object": "list", "data": [{"id": "small", "object": "model", "thinks": False, "mcp_tools": False}]}
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.set_viewport_size({"width": 390, "height": 844})
    visit(page, fake.url, short=False)
    assert page.locator(".composer .pill").count() == 0 and not any("mcp" in url for url in asked)
    send, row = page.locator(".send").bounding_box(), page.locator(".composer").bounding_box()
    assert row["x"] + row["width"] - send["x"] - send["width"] < 20, "Send stands at the edge"


def test_tools_run_in_a_loop_and_only_when_confirmed(page: Any, fake: Server) -> None:
    tool = {
        "name": "get_weather",
        "server": "sky",
        "tool": "get_weather",
        "description": "",
        "parameters": {"type": "object"},
    }
    called: list[Any] = []

    def answer(route: Any) -> None:
        called.append(route.request.post_data_json)
        route.fulfill(json={"text": "31 degrees", "is_error": False})

    models = {"object": "list", "data": [{"id": "Qwen3-4B", "object": "model", "mcp_tools": True}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.route("**/mcp/tools", lambda route: route.fulfill(json={"tools": [tool]}))
    page.route("**/mcp/call", answer)
    visit(page, fake.url, short=False)
    ask(page, "Hello")
    assert "tools" not in body_of(fake), "tools are off until the reader turns them on"
    button(page, "Tools: 1").click()
    say(page, "use the tool")
    finished(page)
    assert body_of(fake)["tools"][0]["function"]["name"] == "get_weather"
    assert '"city": "Hangzhou"' in page.locator(".tool pre").inner_text()
    assert called == []
    button(page, "Run it and go on").click()
    page.wait_for_selector(".message.tool")
    finished(page)
    assert called == [{"name": "get_weather", "arguments": {"city": "Hangzhou", "unit": "C"}}]
    assert last_answer(page) == "The tool says: 31 degrees"
    say(page, "use the tool")
    finished(page)
    button(page, "Refuse").click()
    finished(page)
    assert len(called) == 1
    assert last_answer(page) == "The tool says: The user refused this call."
    assert questions(page) == ["Hello", "use the tool", "use the tool"]
    page.keyboard.press(f"{MOD}+Shift+O")
    ask(page, "Hello")
    assert "tools" not in body_of(fake), "a new conversation does not inherit them"
