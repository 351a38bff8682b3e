"""fastqwen batch and fastqwen check URL, against the real server with the mock engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastqwen.errors import BadConfig
from fastqwen.terminal import batch, conformance
from tests.reliability.mock_model import make_model
from tests.reliability.server import serving


def request_line(name: str, **body) -> str:
    body = {"prompt": name, "max_tokens": 5, "seed": 1, "ignore_eos": True, **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}) + "\n"


def run(source: Path, output: Path, url: str) -> int:
    return batch.run(source, output, url, {}, concurrency=4, api_key=None)


def test_a_batch_answers_each_request_once_also_after_a_kill(tmp_path: Path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(request_line(f"r{i}") for i in range(12)) + request_line("bad", temperature=-1))
    with serving(make_model(tmp_path), step_s=0.0) as server:
        assert run(source, output, server.url) == 1
        lines = output.read_text().splitlines()
        answers = {json.loads(line)["custom_id"]: json.loads(line) for line in lines}
        assert len(lines) == len(answers) == 13
        assert answers["bad"]["response"]["status_code"] == 400
        assert len(answers["r3"]["response"]["body"]["choices"][0]["text"]) == 5
        output.write_text("".join(line + "\n" for line in lines[:6]) + lines[6][:20])  # killed while it wrote
        run(source, output, server.url)
        again = [json.loads(line) for line in output.read_text().splitlines()]
        assert {one["custom_id"] for one in again} == set(answers)
        assert len(again) == 13
        texts = {one["custom_id"]: one["response"]["body"].get("choices") for one in again}
        assert texts == {name: one["response"]["body"].get("choices") for name, one in answers.items()}


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "line 1"), ('{"custom_id": "a"}', "url"), ("[]", "line 1"), ("\udc80", "UTF-8")],
)
def test_a_file_without_a_right_line_is_refused_and_a_wrong_line_named(tmp_path: Path, text: str, words: str):
    (tmp_path / "in.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadConfig, match=words):
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "http://localhost:1")


STRANGE_NAMES = [
    "\u2028 \x85 \x0b \x1c",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "\0",
    "密钥",
    " ",
]
BROKEN = [
    b"{", b"\xff\xfe", b"[]", b"1", b'"x"', b"null", b"[" * 100_000, b'{"custom_id": 7}', b'{"custom_id": "\\ud800"}',
    b'{"custom_id": "huge", "url": "/v1/completions", "body": {"temperature": 1e999}}',
    b'{"custom_id": "digits", "url": "/v1/completions", "body": {"seed": ' + b"9" * 5000 + b"}}",
    b'{"custom_id": "nan", "url": "/v1/completions", "body": {"temperature": NaN}}',
    b'{"custom_id": "put", "method": "PUT", "url": "/v1/completions", "body": {}}',
    b'{"custom_id": "where", "url": "/v1/nowhere", "body": {}}', b'{"custom_id": "bodyless", "url": "/v1/completions"}',
    request_line("again").encode(), request_line("again").encode(),
]  # fmt: skip


def test_any_broken_line_is_one_failed_line_and_stops_nothing(tmp_path: Path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [request_line(name, prompt=name).encode() for name in STRANGE_NAMES]
    raw = json.dumps(json.loads(request_line("raw", prompt="a\u2028b\x85c")), ensure_ascii=False).encode()
    lines = [b"\xef\xbb\xbf" + good[0], *BROKEN, *good[1:], raw, b"", b"  ", b"\r"]
    source.write_bytes(b"\n".join(line.rstrip(b"\n") for line in lines))
    with serving(make_model(tmp_path), step_s=0.0) as server:
        assert run(source, output, server.url) == 1
        found = [json.loads(line) for line in output.read_bytes().split(b"\n") if line]
        answered = {one["custom_id"] for one in found if one["response"] is not None}
        assert {*STRANGE_NAMES, "raw", "again"} <= answered
        assert all(one["response"]["status_code"] == 200 for one in found if one["custom_id"] in STRANGE_NAMES)
        assert len(found) == len(BROKEN) + len(good) + 1
        assert all(one["error"]["message"] for one in found if one["response"] is None)
        assert run(source, output, server.url) == 0  # what failed stays failed, and is not asked again
        assert len(output.read_bytes().split(b"\n")) == len(found) + 1


def test_a_file_that_holds_no_answers_is_not_overwritten(tmp_path: Path):
    (tmp_path / "in.jsonl").write_text(request_line("a"))
    (tmp_path / "out.jsonl").write_text("something else\n")
    with pytest.raises(BadConfig, match=r"out\.jsonl, line 1"):
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "http://localhost:1")


def test_our_own_server_breaks_no_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serving(make_model(tmp_path), step_s=0.0) as server:
        conformance.run(server.url, api_key=None, as_json=True)
        results = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
        # The mock says letters and knows no grammar; what needs a model is checked against one in the clients' tests.
        needs_model = {"json schema", "tools", "tools with a schema", "annotations", "references"}
        broken = {name for name, one in results.items() if one["status"] == "broken"} - needs_model
        assert not broken, results


def test_a_server_that_ignores_stop_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    post = conformance.Server.post
    monkeypatch.setattr(conformance.Server, "post", lambda self, *a, **body: post(self, *a, **{**body, "stop": None}))
    with serving(make_model(tmp_path), step_s=0.0) as server:
        found = {one.name: one.status for one in conformance.check_all(conformance.Server(server.url, None))}
        assert found["stop strings"] == "broken"
