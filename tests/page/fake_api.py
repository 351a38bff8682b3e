"""An OpenAI-compatible server with scripted answers, for the chat page's tests and screenshots; no engine needed.

``python -m tests.page.fake_api --port 8001`` serves the page at / as well. A word in the last message picks the answer:
code, math, html, think, tags, tool, slow, long N, midstream, cut, context, overload, fail. ``POST /_fake`` changes the
server's state ({"state": "loading", "progress": 0.4}, {"key": "secret"}), ``GET /_fake`` tells what it received.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fastqwen.server.http.pages import add_pages, policy_of

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MAX_LEN = 32768

CODE = """Here is a function that checks brackets with a stack:

```python
def balanced(text: str) -> bool:
    pairs = {")": "(", "]": "[", "}": "{"}
    stack = []
    for char in text:
        if char in pairs.values():
            stack.append(char)
        elif char in pairs:
            if not stack or stack.pop() != pairs[char]:
                return False  # closed by the wrong bracket
    return not stack
```

| input | result |
|---|---|
| `([])` | `True` |
| `([)]` | `False` |

It reads each character **once**, so it takes $O(n)$ time.
"""
MATH = r"""Suppose $\sqrt{2} = \frac{p}{q}$ in lowest terms. Squaring gives

$$p^2 = 2q^2 \quad\Longrightarrow\quad p = 2k,$$

so that \(q^2 = 2k^2\), and $q$ is even as well: a contradiction. The price of \$5 or $6 is no formula.

\[
\int_{-\infty}^{\infty} e^{-x^2}\,dx = \sqrt{\pi}, \qquad
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}^{\!\top}
\]
"""
CHINESE = """前缀缓存会保留已经计算过的**键值**：

1. 第一轮对话时，模型读入全部提示词；
2. 第二轮只需读入*新增*的部分，其余直接取自缓存。

因此首词元时间从 $O(n)$ 降到 $O(\\Delta n)$，长对话也能很快开始回答。

> 缓存按块共享，互不影响。
"""
HTML = """<img src=x onerror="window.pwned=1"><script>window.pwned=2</script> <b>bold?</b>

[click](javascript:window.pwned=3) ![pic](https://example.com/x.png)

```html
<script>window.pwned=4</script>
```
"""
MARKDOWN_PARAGRAPH = "Paragraph {i}: the *quick* brown fox jumps over the **lazy** dog, `x = {i}`, and on it goes.\n\n"


class Fake:
    """What the tests can change and read."""

    def __init__(self) -> None:
        self.state = "ready"
        self.progress = 0.0
        self.key = ""
        self.bare = False  # has no route but OpenAI's
        self.busy = False  # pretends to have other users, for the operators' page
        self.likely: dict[str, float] = {}  # words in an answered one's place; else three of its own
        self.cuts = False  # ends answers at max_tokens, which scripts are longer than
        self.answer = ""  # instead of a script's
        self.notes: dict[str, Any] = {}  # what the last chunk of an answer says besides: cache, timing, warnings
        self.requests: list[dict[str, Any]] = []
        self.aborted = 0
        self.running = 0
        self.generated = 0
        self.prompt = 0
        self.cached = 0
        self.started = time.time()


def problem(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    error = {"message": message, "type": "error", "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)


def text_of(messages: list[dict[str, Any]]) -> str:
    return "\n".join(str(message.get("content") or "") for message in messages)


def count(messages: list[dict[str, Any]]) -> int:
    return len(text_of(messages)) // 4 + 8 * len(messages)


def script(body: dict[str, Any]) -> tuple[str, str, float]:
    """(thoughts, answer, seconds between tokens). An answer that has begun goes on where it stands."""
    messages = body["messages"]
    if body.get("continue_final_message"):
        begun = messages[-1]["content"]
        _, whole, pause_s = script({**body, "messages": messages[:-1], "continue_final_message": False})
        return "", whole[len(begun) :] if whole.startswith(begun) else " and so on, to another end.", pause_s
    last = messages[-1]
    asked = str(last.get("content") or "")
    thoughts = "The user asks something.\nI look at it from two sides, then answer briefly.\n" * 3
    if last["role"] == "tool":
        return "", f"The tool says: {asked}", 0.005
    if match := re.search(r"long (\d+)", asked):
        words = int(match[1])
        return "", "".join(MARKDOWN_PARAGRAPH.format(i=i) for i in range(words // 20)), 0.0
    for word, answer in {
        "code": CODE,
        "Python": CODE,
        "math": MATH,
        "证明": MATH,
        "html": HTML,
        "缓存": CHINESE,
    }.items():
        if word in asked:
            return "", answer, 0.004
    if "think" in asked:
        return thoughts, "Forty-two.", 0.02
    if "tags" in asked:
        return "", f"<think>\n{thoughts}</think>\n\nForty-two.", 0.005
    if "slow" in asked or "midstream" in asked or "cut" in asked:
        return "", "word " * 400, 0.03
    temperature = body.get("temperature")
    return "", f"You said: {asked} (model {body['model']}, temperature {temperature})", 0.005


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def make_app(fake: Fake) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def guard(request: Request, call_next):  # type: ignore[no-untyped-def]
        path = request.url.path
        if fake.bare and path in {
            "/tokenize",
            "/health/ready",
            "/admin/data",
            "/admin/history",
            "/admin/plan",
            "/metrics",
        }:
            return problem(404, "Not Found")
        closed = path.startswith("/v1") or path in {
            "/tokenize",
            "/admin/data",
            "/admin/history",
            "/admin/plan",
            "/metrics",
        }
        if closed and fake.key and request.headers.get("authorization") != f"Bearer {fake.key}":
            return problem(401, "no valid API key was given", "invalid_api_key")
        response = await call_next(request)
        response.headers.update(HEADERS)
        if policy := policy_of(path):
            response.headers["Content-Security-Policy"] = policy.decode()
        return response

    def unready() -> Response | None:
        if fake.state == "loading":
            message = f"loading weights, {fake.progress:.0%}"
            return JSONResponse({"status": "loading", "progress": fake.progress, "message": message}, status_code=503)
        if fake.state == "restarting":
            return JSONResponse({"status": "engine restarting", "message": "the engine ended"}, status_code=503)
        return None

    add_pages(app)

    @app.get("/health/ready")
    async def ready() -> Response:
        return unready() or JSONResponse({"status": "ready"})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = ["Qwen3-4B", "Qwen-7B-Chat"]
        return {
            "object": "list",
            "data": [{"id": n, "object": "model", "root": f"Qwen/{n}", "max_model_len": MAX_LEN} for n in names],
        }

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"count": count(body["messages"]), "max_model_len": MAX_LEN, "tokens": []}

    @app.post("/_fake")
    async def change(request: Request) -> dict[str, Any]:
        for name, value in (await request.json()).items():
            setattr(fake, name, value)
        return {}

    @app.get("/_fake")
    async def tell() -> dict[str, Any]:
        return {"requests": fake.requests, "aborted": fake.aborted, "running": fake.running}

    @app.get("/admin/plan")
    async def plan() -> dict[str, Any]:
        """As an RTX 3090's owner would see it."""
        rows = [("Qwen3-14B", 24_576, 23.1), ("Qwen3-8B", 40_960, 21.4), ("Qwen3-4B-Instruct-2507", 98_304, 22.0)]
        speed = {"batch": 1, "context_tokens": 4096, "low": 30.2, "high": 44.8}
        models = [
            {
                "model": f"Qwen/{m}",
                "command": f"fastqwen serve Qwen/{m}",
                "context": n,
                "gib": gib,
                "tokens_per_second": speed,
            }
            for m, n, gib in rows
        ]
        return {"device": "NVIDIA GeForce RTX 3090", "serving": "Qwen/Qwen3-4B", "models": models}

    @app.get("/admin/history")
    async def history() -> dict[str, Any]:
        wave = [900 + 300 * math.sin(i / 40) + 90 * math.sin(i / 7) for i in range(700)]
        load = {"running": [round(v / 100) for v in wave], "waiting": [max(0, round(v / 100 - 10)) for v in wave]}
        return {"every_s": 5, "generated": wave, "read": [v / 2 for v in wave], **load}

    @app.get("/admin/data")
    async def admin_data() -> dict[str, Any]:
        return admin_figures(fake)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        body = await request.json()
        fake.requests.append(body)
        asked = str(body["messages"][-1].get("content") or "")
        if body.get("logprobs") and not body.get("stream"):
            return JSONResponse(likeliest(fake, body))
        if waiting := unready():
            return waiting
        if "overload" in asked:
            return problem(429, "64 requests are waiting already", "overloaded")
        if "fail" in asked:
            return problem(500, "a kernel returned NaN", "internal_error")
        prompt = count(body["messages"])
        if prompt > MAX_LEN or ("context" in asked and len(body["messages"]) > 2):
            return problem(
                400,
                f"This model's maximum context length is {MAX_LEN} tokens, the messages have {prompt}.",
                "context_length_exceeded",
                "messages",
            )
        return StreamingResponse(stream(fake, body, asked, prompt), media_type="text/event-stream")

    return app


def likeliest(fake: Fake, body: dict[str, Any]) -> dict[str, Any]:
    """One token, and what might have stood in its place."""
    begun = body["messages"][-1]["content"] if body.get("continue_final_message") else ""
    match = re.match(r"\s*\S+", fake.answer[len(begun) :] if fake.answer else script(body)[1])
    said = match[0] if match else ""
    words = fake.likely or {said: 0.5, " perhaps": 0.25, " rather": 0.125, " never": 0.0004}
    top = [{"token": word, "logprob": math.log(share), "bytes": None} for word, share in words.items()]
    choice = {"index": 0, "message": {"role": "assistant", "content": top[0]["token"]}, "finish_reason": "length"}
    return {"choices": [{**choice, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}]}


def admin_figures(fake: Fake) -> dict[str, Any]:
    age_s = time.time() - fake.started
    wave = math.sin(age_s / 4) + 0.4 * math.sin(age_s / 1.7)  # counters below are the integral of a swaying rate
    area = 4 * (1 - math.cos(age_s / 4)) + 0.4 * 1.7 * (1 - math.cos(age_s / 1.7))
    return {
        "running": round(9 + 4 * wave) if fake.busy else fake.running,
        "waiting": max(0, round(4 * wave - 2)) if fake.busy else 0,
        "kv_usage": 0.4 + 0.1 * wave,
        "num_blocks": 4096,
        "prefix_queries_tokens": 182_400 + fake.prompt,
        "prefix_hits_tokens": 141_900 + fake.cached,
        "prompt_tokens_total": int(182_400 + fake.prompt + 640 * age_s - 220 * area),
        "generation_tokens_total": int(96_200 + fake.generated + 1130 * age_s + 300 * area),
        "num_preemptions": 2,
        "uptime_s": 93_600 + age_s,
        "model": "Qwen3-4B",
        "plan": {
            "weights_bytes": 8_044_936_192,
            "peak_bytes": 19_327_352_832,
            "kv_bytes_per_token": 147_456,
            "block_size": 16,
            "num_blocks": 4096,
            "max_model_len": 32768,
            "max_num_seqs": 256,
            "dtype": "bfloat16",
            "notices": [],
        },
        "measured": {"weights_bytes": 8_046_000_128, "peak_bytes": 18_894_225_408, "num_blocks": 4096},
        "recent_errors": [
            {"time": time.time() - 640, "message": "BadRequest: max_tokens is 0, but must be at least 1"},
            {"time": time.time() - 65, "message": "Overloaded: 64 requests are waiting already"},
        ],
    }


async def stream(fake: Fake, body: dict[str, Any], asked: str, prompt: int) -> AsyncIterator[str]:
    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        notes = fake.notes if finish else {}
        return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'choices': [choice], **notes})}\n\n"

    thoughts, answer, pause_s = ("", fake.answer, 0.002) if fake.answer else script(body)
    fake.running += 1
    tokens = 0
    try:
        await asyncio.sleep(0.05)
        yield event({"role": "assistant", "content": ""})
        for piece in pieces(thoughts, 8):
            tokens += 1
            yield event({"reasoning_content": piece})
            await asyncio.sleep(pause_s)
        if body.get("tools") and "tool" in asked:
            function = {"name": "get_weather", "arguments": ""}
            yield event({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]})
            for piece in pieces('{"city": "Hangzhou", "unit": "C"}', 6):
                tokens += 1
                yield event({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
                await asyncio.sleep(0.01)
            yield event({}, "tool_calls")
        else:
            limit = body.get("max_tokens")
            written = answer[: 5 * limit] if limit and fake.cuts else answer
            for piece in pieces(written, 5 if pause_s else 80):
                tokens += 1
                yield event({"content": piece})
                await asyncio.sleep(pause_s)
                if tokens == 12 and "midstream" in asked:
                    yield 'data: {"error": {"message": "engine process ended", "code": "engine_gone"}}\n\n'
                    return
                if tokens == 12 and "cut" in asked:
                    return
            yield event({}, "length" if (limit and tokens > limit) or len(written) < len(answer) else "stop")
        cached = prompt // 2 // 16 * 16
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        fake.prompt += prompt
        fake.cached += cached
        yield f"data: {json.dumps({'id': 'x', 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
    except asyncio.CancelledError:
        fake.aborted += 1
        raise
    finally:
        fake.running -= 1
        fake.generated += tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8001)
    port = parser.parse_args().port
    uvicorn.run(make_app(Fake()), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
