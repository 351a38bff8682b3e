"""Run vLLM's own examples against this checkout: each with its import of vLLM, or the server's address, changed, and the model.

python scripts/vllm_examples.py           # all; fetches vLLM's source package with pip, into a temporary room
python scripts/vllm_examples.py chat      # those whose path has this word
VLLM_SOURCE=vllm-0.33.0.tar.gz python scripts/vllm_examples.py

The models are the demo and tiny ones with random weights, so what is proven is that the scripts run through, and that none of
their calls or requests is refused. Where a script wants an answer that the demo is too small for, the model is one that says
what it is told to (tests/scripted).
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

VERSION = "0.33.0"
ROOT = Path(__file__).parents[1]
# What pip needs to read the source package's name and version without building it.
BUILD_PARTS = ("setuptools", "setuptools-scm", "setuptools-rust", "packaging", "wheel", "jinja2", "cmake", "ninja")
TIMEOUT_S = 600
ADDRESS = re.compile(r"http://(?:localhost|0\.0\.0\.0|127\.0\.0\.1):8000")
IMPORT = re.compile(r"^(\s*)(from|import) vllm\b", re.MULTILINE)


class Example(NamedTuple):
    """``model``: demo, or the name of a tiny one below. ``named``: the model's name in the script, where no flag sets it.
    ``served``: the script asks a server. ``says``: the end of a question in it, and the scripted model's answer to that."""

    path: str
    model: str = "demo"
    arguments: tuple[str, ...] = ()
    named: str = ""
    served: bool = False
    says: tuple[str, str] = ("", "")


WEATHER = (
    "<think>Dallas is in Texas.</think>\n\n<tool_call>\n"
    '{"name": "get_current_weather", "arguments": {"city": "Dallas", "state": "TX", "unit": "fahrenheit"}}\n</tool_call>'
)
SHORT = ("--max-model-len", "2048")
PORT = ("--port", "PORT")
EXAMPLES = (
    Example("basic/offline_inference/basic.py", named="facebook/opt-125m"),
    Example("basic/offline_inference/generate.py", arguments=("--model", "MODEL", "--max-tokens", "8", *SHORT)),
    Example("basic/offline_inference/chat.py", arguments=("--model", "MODEL", "--max-tokens", "4", *SHORT)),
    Example("basic/offline_inference/classify.py", "classifier", ("--model", "MODEL")),
    Example("basic/offline_inference/embed.py", "embedder", ("--model", "MODEL")),
    Example("basic/offline_inference/score.py", "cross-encoder", ("--model", "MODEL")),
    Example("features/automatic_prefix_caching/prefix_caching_offline.py", named="facebook/opt-125m"),
    Example("features/reset_kv/reset_kv_offline.py", arguments=("--model", "MODEL", *SHORT)),
    Example("pooling/token_embed/multi_vector_retrieval_offline.py", "embedder", ("--model", "MODEL")),
    Example("deployment/llm_engine_example.py", arguments=("--model", "MODEL", *SHORT)),
    Example("deployment/async_llm_streaming.py", named="meta-llama/Llama-3.2-1B-Instruct"),
    Example("features/structured_outputs/structured_outputs_offline.py", named="Qwen/Qwen2.5-3B-Instruct"),
    Example("observability/metrics/offline.py", named="facebook/opt-125m"),
    Example("pooling/embed/embed_matryoshka_fy_offline.py", "embedder", ("--model", "MODEL")),
    Example(
        "pooling/reward/sequence_reward_offline.py", "cross-encoder", ("--model", "MODEL", "--max-model-len", "256")
    ),
    Example("pooling/score/qwen3_reranker_offline.py", named="Qwen/Qwen3-Reranker-0.6B"),
    Example("basic/online_serving/openai_chat_completion_client.py", served=True),
    Example("basic/online_serving/openai_completion_client.py", served=True),
    Example("generate/batched_chat_completions_online.py", "scripted", served=True),
    Example("reasoning/openai_chat_completion_with_reasoning.py", served=True),
    Example("reasoning/openai_chat_completion_with_reasoning_streaming.py", served=True),
    Example(
        "reasoning/openai_chat_completion_tool_calls_with_reasoning.py",
        "scripted",
        served=True,
        says=("in Dallas, in fahrenheit?", WEATHER),
    ),
    Example("reasoning/openai_responses_client.py", served=True),
    Example("tool_calling/openai_chat_completion_client_with_tools.py", served=True),
    Example("tool_calling/openai_chat_completion_client_with_tools_required.py", served=True),
    Example("tool_calling/openai_responses_client_with_tools.py", served=True),
    Example("pooling/classify/classification_online.py", "classifier", PORT, served=True),
    Example("pooling/embed/openai_embedding_client.py", "embedder", served=True),
    Example("pooling/token_embed/multi_vector_retrieval_online.py", "embedder", PORT, served=True),
    Example("pooling/embed/openai_embedding_matryoshka_fy_client.py", "embedder", served=True),
    Example("pooling/reward/sequence_reward_online.py", "cross-encoder", PORT, served=True),
    Example("pooling/score/rerank_api_online.py", "cross-encoder", served=True),
    Example("pooling/score/score_api_online.py", "cross-encoder", PORT, served=True),
    Example("pooling/score/qwen3_reranker_online.py", "cross-encoder", served=True),
)


def fetch(room: Path) -> Path:
    """The source package: the one that VLLM_SOURCE names, or what pip finds."""
    if given := os.environ.get("VLLM_SOURCE"):
        return Path(given)
    parts = room / "parts"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--target", str(parts), *BUILD_PARTS], check=True)
    env = {**os.environ, "PYTHONPATH": str(parts), "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": VERSION}
    wanted = ["--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--dest", str(room), f"vllm=={VERSION}"]
    subprocess.run([*pip, "download", *wanted], env=env, check=True)
    return room / f"vllm-{VERSION}.tar.gz"


def unpack(package: Path, room: Path) -> Path:
    with tarfile.open(package) as archive:
        members = [one for one in archive.getmembers() if "/examples/" in one.name]
        archive.extractall(room, members, filter="data")
    return room / f"vllm-{VERSION}" / "examples"


def make_models(room: Path) -> dict[str, str]:
    sys.path.insert(0, str(ROOT))
    from tests.models.classifier import make_classifier
    from tests.models.embedding import make_embedder
    from tests.reliability.mock_model import make_model
    from tests.server.harness import QWEN3

    places = {name: room / name for name in ("classifier", "cross-encoder", "embedder", "scripted")}
    make_classifier(places["classifier"], "Qwen2Config", num_labels=2)
    make_classifier(places["cross-encoder"], "Qwen2Config", num_labels=1, max_position_embeddings=2048)
    for name in ("embedder", "scripted"):
        places[name].mkdir()
    make_embedder(places["embedder"], tie_word_embeddings=True, max_position_embeddings=1024)
    make_model(places["scripted"])
    words = {"chat_template": QWEN3, "eos_token": "<|im_end|>"}
    (places["scripted"] / "tokenizer_config.json").write_text(json.dumps(words), encoding="utf-8")
    return {"demo": "demo", **{name: str(place) for name, place in places.items()}}


@contextmanager
def serving(model: str, room: Path) -> Iterator[str]:
    """A server's port, while it runs."""
    flags = ["--port", "0", "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
    command = ["-m", "fastqwen.cli.main", "serve", model, *flags]
    if Path(model).name == "scripted":
        command = ["-m", "tests.scripted", model, '{"port": 0}']
    log = room / "server.log"
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            [sys.executable, *command],
            cwd=room, env=environment(), stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield _port(server, log)
    finally:
        server.terminate()
        server.wait(60)


def _port(server: subprocess.Popen[bytes], log: Path) -> str:
    import httpx

    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s and server.poll() is None:
        found = re.search(r"http://[^\s:]+:(\d+)", log.read_text(encoding="utf-8"))
        try:
            if found and httpx.get(f"http://127.0.0.1:{found[1]}/health/ready", timeout=10).status_code == 200:
                return found[1]
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(example: Example, examples: Path, model: str, port: str) -> str:
    """What went wrong; nothing, if nothing did."""
    source = examples / example.path
    text = source.read_text(encoding="utf-8")
    changed = IMPORT.sub(r"\1\2 fastqwen.vllm", text)
    changed = ADDRESS.sub(f"http://127.0.0.1:{port}", changed)
    if example.named:
        if example.named not in text:
            return f"{example.named} is not named in it"
        changed = changed.replace(example.named, model)
    question, answer = example.says
    if answer:
        if question not in text:
            return f"{question} does not stand in it"
        told = base64.b64encode(json.dumps(answer).encode()).decode()
        changed = changed.replace(question, f"{question} SAY:{told}:")
    copy = source.with_name(f"changed_{source.name}")
    copy.write_text(changed, encoding="utf-8")
    arguments = [{"MODEL": model, "PORT": port}.get(one, one) for one in example.arguments]
    try:
        done = subprocess.run(
            [sys.executable, str(copy), *arguments], cwd=source.parent, env=environment(), timeout=TIMEOUT_S,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT_S} s"
    refused = re.search(r"invalid_request_error.*", done.stdout)
    if done.returncode == 0 and refused is None:
        return ""
    return refused[0][:500] if refused else done.stderr.strip()[-1500:] or f"exit status {done.returncode}"


def main() -> int:
    wanted = sys.argv[1:]
    chosen = [one for one in EXAMPLES if not wanted or any(word in one.path for word in wanted)]
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        examples, models = unpack(fetch(room), room), make_models(room)
        groups = {(one.served, one.model) for one in chosen}
        for served, model in sorted(groups):
            part = [one for one in chosen if (one.served, one.model) == (served, model)]
            if served:
                with serving(models[model], room) as port:
                    failed += sum(told(one, run(one, examples, models[model], port)) for one in part)
            else:
                failed += sum(told(one, run(one, examples, models[model], "8000")) for one in part)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return 1 if failed else 0


def told(example: Example, wrong: str) -> bool:
    print(f"{'FAILED' if wrong else 'passed'}  {example.path}" + (f"\n{wrong}" if wrong else ""), flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
