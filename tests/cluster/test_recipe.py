"""FastChat's recipe with its own flags: controller, worker, web server and API server, then both of OpenAI's clients."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.cluster.live import Cluster
from tests.reliability.server import free_port
from tests.server.live import ROOT, command

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Recipe(Cluster):
    """``api`` and ``web``: addresses of the API server and of the web server."""

    api = web = ""


@pytest.fixture(scope="module")
def recipe(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    with Recipe(tmp_path_factory.mktemp("recipe")) as made:
        old = [
            "--controller-address",
            f"http://localhost:{made.port}",
            "--worker-address",
            f"http://localhost:{(port := free_port())}",
        ]
        words = ["--model-path", str(demo_gguf), "--trust-remote-code", "--dtype", "float32", "--num-gpus", "1"]
        names = ["--model-names", "Qwen,gpt-4", "--conv-template", "qwen", "--host", "localhost", "--port", str(port)]
        made.start("worker", command("worker", *old, *words, *names))
        for role, flag in (("api", "--controller-address"), ("web", "--controller-url")):
            number = free_port()
            made.start(role, command(role, flag, f"http://localhost:{made.port}", "--port", str(number)))
            made.url = f"http://127.0.0.1:{number}"
            made.until_replicas(1, "Qwen")
            setattr(made, role, made.url)
        yield made


def test_the_page_and_the_api_have_the_model(recipe: Recipe):
    for url in (recipe.api, recipe.web):
        assert [one["id"] for one in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]] == ["Qwen", "gpt-4"]
    assert "text/html" in httpx.get(recipe.web, timeout=60).headers["content-type"]
    assert "--conv-template of FastChat changes nothing here" in recipe.log("worker").read_text()


def test_the_new_client(recipe: Recipe):
    client = openai.OpenAI(base_url=f"{recipe.api}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="gpt-4", messages=QUESTION, temperature=0, max_tokens=20)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "The capital of France is Paris."


def test_what_the_old_client_sends_and_reads(recipe: Recipe):
    """openai 0.28 sends extra arguments as they are, and its readers ask whether a delta has content."""
    body = {"model": "Qwen", "messages": QUESTION, "stream": True, "temperature": 0, "stop_token_ids": [151645 % 40000]}
    text = ""
    with httpx.stream("POST", f"{recipe.api}/v1/chat/completions", json=body, timeout=180) as response:
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                [choice] = json.loads(line[6:])["choices"]
                assert choice["delta"].get("content", "") is not None
                text += choice["delta"].get("content", "")
    assert text == "The capital of France is Paris."


def test_the_old_client_itself(recipe: Recipe, tmp_path: Path):
    """openai 0.28, in an environment of its own, with the script that `make test-clients` runs against serve."""
    python = tmp_path / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    wanted = ["openai==0.28.1", "setuptools<81"]
    made = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"pip cannot bring openai 0.28: {made.stderr.strip().splitlines()[-1]}")
    script = str(ROOT / "scripts/clients/openai_old.py")
    done = subprocess.run(
        [python, script, f"{recipe.api}/v1"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "openai 0.28: ok\n", done.stderr
