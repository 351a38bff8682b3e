"""Command lines of FastChat's README and of Qwen's, under our commands' names."""

from __future__ import annotations

import pytest

from fastqwen.cli.fastchat_flags import translated
from fastqwen.errors import BadConfig
from tests.server.live import one_line, run


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("--host 0.0.0.0 --dispatch-method shortest_queue", "--host 0.0.0.0"),
        (
            "--model-path Qwen/Qwen-7B-Chat --controller-address http://localhost:21001 --num-gpus 1 --conv-template qwen",
            "--model-path Qwen/Qwen-7B-Chat --controller http://localhost:21001 --tensor-parallel-size 1",
        ),
        ("--model-names qwen,gpt-4 --worker-address=http://a:1", "--served-model-name qwen --served-model-name gpt-4 --worker-address=http://a:1"),
        ("--api-keys one,two --host localhost", "--api-key one --api-key two --host localhost"),
        ("--controller-url=http://a:21001 --model-list-mode reload", "--controller http://a:21001"),
        ("--limit-worker-concurrency 5 --dtype float16", "--dtype float16"),
        ("--gptq-wbits 4 --gptq-act-order --debug --port 1", "--port 1"),
        ('--allow-credentials --allowed-methods ["*"] --api-keys ["one","two"]', "--api-key one --api-key two"),
    ],
)  # fmt: skip
def test_what_means_the_same_is_ours(words: str, ours: str):
    assert translated(words.split()).words == ours.split()


def test_what_changes_nothing_is_said():
    [notice] = translated(["--conv-template", "qwen"]).notices
    assert "--conv-template" in notice and "template" in notice


@pytest.mark.parametrize(
    "flag",
    ["--no-register", "--share", "--ssl", "--moderate", "--gpus", "--load-8bit", "--cpu-offloading", "--gptq-ckpt"],
)
def test_what_cannot_hold_is_refused(flag: str):
    with pytest.raises(BadConfig, match=flag):
        translated([flag])


def test_the_commands_hear_them():
    assert "no controller answers" not in one_line(
        run("worker", "--controller-address", "http://x y:1", "--model-path", "demo")
    )
    assert "either a MODEL" in one_line(run("worker"))
    assert "--dtype is for a model" in one_line(run("worker", "--upstream", "http://localhost:1", "--dtype", "float16"))
    assert "either --api" in one_line(run("web"))
    assert "fastqwen worker" in one_line(run("vllm_worker"))
