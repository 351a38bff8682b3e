"""--skip-tokenizer-init: a folder with config.json alone can be served, to be measured or driven with ids."""

from __future__ import annotations

import json
from pathlib import Path

from tests.models.tiny import make
from tests.server.live import LiveServer, run


def test_ids_in_and_counted_tokens_out(tmp_path: Path):
    make(tmp_path / "whole", "Qwen3Config", head_dim=16)
    (tmp_path / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    flags = ["--load-format", "dummy", "--skip-tokenizer-init"]
    with LiveServer(str(tmp_path), *flags) as server:
        answer = server.client.completions.create(
            model="", prompt=[1, 2, 3], max_tokens=5, extra_body={"ignore_eos": True}
        )
        assert (answer.usage.completion_tokens, answer.choices[0].text) == (5, "")
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/completions", {"prompt": [1], "response_format": {"type": "json_object"}}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "text"}]}),
            ("/tokenize", {"prompt": "text"}),
        ):
            refused = server.http.post(path, json=body)
            assert 400 <= refused.status_code < 500, refused.text
            assert refused.json()["error"]["message"]
        assert server.is_idle()
    done = run("bench", "serve", str(tmp_path), *flags, "--concurrency", "2", "--input-len", "5", "--output-len", "3")
    assert done.returncode == 0, done.stderr
    [one] = json.loads(done.stdout.splitlines()[-1])["results"]
    assert (one["requests"], one["errors"]) == (8, 0)
