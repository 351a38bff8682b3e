"""The benchmarks do their work and account for it; how fast they were is not a test's business."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fastqwen.benchmark import progress
from fastqwen.benchmark.curves import plot_decode
from fastqwen.benchmark.http_load import Stream
from fastqwen.benchmark.latency import host_ms, sampling_of
from fastqwen.benchmark.machine import Machine
from fastqwen.benchmark.progress import Progress
from fastqwen.benchmark.report import commit, shares, table
from fastqwen.benchmark.serve import quantile, summary
from fastqwen.benchmark.work import Needs, Span, decode_step, prefill, span
from fastqwen.client.local_engine import LocalEngine
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.models import read_config
from fastqwen.plot import check_plot, save_plot
from fastqwen.version import __version__
from tests.engine.fakes import READY, make_engine, request
from tests.models.tiny import MOE, make
from tests.server.live import ROOT, environment, one_line, run

MACHINE = Machine(
    name="Fast Chip", threads=2, torch="2", python="3", dtype="bfloat16", read_gb_s=100.0, matmul_tflops=2.0
)


@pytest.fixture(scope="module")
def config_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as benchmarks of models that nobody downloaded use it: config.json and nothing else."""
    whole = tmp_path_factory.mktemp("whole")
    make(whole, "Qwen3Config", head_dim=16)
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text((whole / "config.json").read_text())
    return folder


def last_json(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert found["machine"]["read_gb_s"] > 0 and found["machine"]["matmul_tflops"] > 0
    assert found["command"].startswith("fastqwen bench ")
    assert (found["version"], found["commit"]) == (__version__, commit())
    return found


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_latency(config_only: Path, tmp_path: Path):
    picture = tmp_path / "speed.png"
    words = ["--batch-size", "1", "--batch-size", "3", "--input-len", "8", "--output-len", "4", "--plot", str(picture)]
    done = run("bench", "latency", str(config_only), "--load-format", "dummy", *words, "--prefill", "2x16")
    assert done.returncode == 0, done.stderr
    found = last_json(done.stdout)
    assert [one["batch"] for one in found["results"]] == [1, 3, 2]
    for one in found["results"]:
        assert one["tokens_per_s"] > 0 and 0 < one["flop_share"] < 1
        assert one["floor_share"] == max(one["bandwidth_share"], one["flop_share"])
        assert one.get("host_ms") is None, "a CPU computes the step itself"
    assert "of bandwidth" in done.stdout
    assert png_size(picture) == (1200, 700)


def test_latency_of_what_people_ask_for(config_only: Path):
    words = ["--batch-size", "2", "--output-len", "3", "--prefill", "1x8", "--input-len", "8", "--input-len", "12"]
    wishes = ["--penalties", "--logprobs", "3"]
    done = run("bench", "latency", str(config_only), "--load-format", "dummy", *words, *wishes)
    assert done.returncode == 0, done.stderr
    works = [one["work"] for one in last_json(done.stdout)["results"]]
    assert works == ["decode, 2 at 8+3 tokens", "decode, 2 at 12+3 tokens", "prefill, 1 x 8 tokens"]
    assert sampling_of(sampled=False, penalties=False, logprobs=None).greedy
    wished = sampling_of(sampled=False, penalties=True, logprobs=3)
    assert (wished.top_k, wished.presence_penalty, wished.logprobs) == (20, 1.5, 3)


def test_latency_under_a_schema(tmp_path: Path):
    """Every second sequence is held to it, and the others are timed apart."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"type": "integer"}, "minItems": 1000}')
    words = ["--batch-size", "2", "--output-len", "3", "--num-iters", "1", "--prefill", "1x8", "--input-len", "8"]
    done = run("bench", "latency", "demo", *words, "--json-schema", str(schema), "--max-model-len", "512")
    assert done.returncode == 0, done.stderr
    decoded, read = last_json(done.stdout)["results"]
    assert 0 < decoded["free_ms"] <= decoded["ms"] * 1.01 and "free_ms" not in read
    assert "ms of rows without it" in done.stdout
    assert "--json-schema" in one_line(run("bench", "latency", "demo", "--json-schema", str(tmp_path / "none")))


def test_the_hosts_work_is_what_a_step_takes_when_the_device_is_idle():
    core, executor = make_engine(run_ahead=2)
    stream = LocalEngine(core, READY).stream([request(name, 10, 6) for name in "abc"])
    asked = []
    assert host_ms(stream, lambda: asked.append(len(executor.batches))) > 0
    assert not core.has_work and len(asked) >= 6, "the device was waited for before each step"


def test_throughput(config_only: Path):
    words = ["--num-prompts", "5", "--input-len", "3-9", "--output-len", "4"]
    done = run("bench", "throughput", str(config_only), "--load-format", "dummy", *words)
    assert done.returncode == 0, done.stderr
    [one] = last_json(done.stdout)["results"]
    assert one["output_tokens"] == 20 and 15 <= one["prompt_tokens"] <= 45
    assert one["output_tokens_per_s"] == pytest.approx(20 / one["seconds"])


def test_what_cannot_run_at_once_is_said(config_only: Path):
    words = ["--load-format", "dummy", "--max-num-seqs", "4"]
    assert "--max-num-seqs" in one_line(run("bench", "latency", str(config_only), *words, "--batch-size", "5"))
    assert "4x512" in one_line(run("bench", "latency", str(config_only), *words, "--prefill", "512"))


def test_needs_of_a_step(tmp_path: Path):
    """By hand: a llama of 3 layers, hidden 64, heads 4 of which 2 have keys, head size 16, MLP 128, vocabulary 256."""
    make(tmp_path, "LlamaConfig", intermediate_size=128)
    model = read_config(tmp_path)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128
    weights = 3 * layer + 256 * 64
    needs = decode_step(model, "float32", batch=5, context_tokens=100)
    assert needs.read_bytes == 4 * weights + 5 * 100 * (2 * 3 * 32 * 4)
    assert needs.operations == 5 * (2 * weights + 4 * 3 * 64 * 100)
    half = decode_step(model, "float32", batch=5, context_tokens=100, num_gpus=2, kv_cache_dtype="int8")
    assert half.read_bytes == pytest.approx(2 * weights + 5 * 100 * 3 * 2 * (16 + 2), rel=0.01)
    assert half.operations == needs.operations / 2
    prompts = prefill(model, "float32", batch=2, tokens=10)
    assert prompts.operations == 2 * (10 * (2 * 3 * layer + 4 * 3 * 64 * 5) + 2 * 256 * 64)


def test_a_step_of_experts_reads_those_that_are_chosen(tmp_path: Path):
    make(tmp_path, "Qwen3MoeConfig", **MOE, head_dim=16)
    model = read_config(tmp_path)
    expert = 3 * 64 * 48 * 2
    one, many = (decode_step(model, "bfloat16", batch=batch, context_tokens=0).read_bytes for batch in (1, 1000))
    assert many - one == pytest.approx(3 * (8 - 3) * expert)


def test_spans():
    assert span("128") == Span(128, 128)
    generator = random.Random(0)
    assert {span("3-5").draw(generator) for _ in range(100)} == {3, 4, 5}
    for text in ("0", "5-3", "x", "-1", "1-2-3"):
        with pytest.raises(BadConfig):
            span(text)


def test_quantiles():
    values = [float(value) for value in range(1, 101)]
    random.Random(0).shuffle(values)
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([7.0], 0.99)) == (50.0, 99.0, 7.0)


def test_a_summary_counts_errors_apart():
    good = Stream(start_s=1.0, first_s=1.5, last_s=2.0, gaps_s=[0.25, 0.25], num_tokens=3)
    found = summary([good, Stream(start_s=1.0, error="broken")], 2, 2.0)
    assert (found["requests"], found["errors"], found["output_tokens_per_s"]) == (2, 1, 1.5)
    assert (found["ttft_p50_ms"], found["itl_p99_ms"]) == (500.0, 250.0)
    with pytest.raises(FastqwenError, match="broken"):
        summary([Stream(start_s=1.0, error="broken")], 1, 1.0)


def test_a_table():
    assert table(["a", "bb"], [["ccc", "1"], ["d", "22"]]) == "a    bb\n---  --\nccc   1\nd    22"


def test_the_floor_is_the_slower_of_reading_and_computing():
    """100 GB/s and 2 TFLOP/s, half a second of the one and a quarter of the other."""
    read, compute = Needs(50e9, 0.5e12), Needs(25e9, 1e12)
    assert shares(read, 1.0, MACHINE) == {"bandwidth_share": 0.5, "flop_share": 0.25, "floor_share": 0.5}
    assert shares(compute, 2.0, MACHINE) == {"bandwidth_share": 0.125, "flop_share": 0.25, "floor_share": 0.25}


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_says_whether_the_files_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def seen() -> str | None:
        commit.cache_clear()
        return commit(tmp_path)

    assert seen() is None
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "code")
    git("tag", "-a", "-m", "a tag is no commit", "v9")
    assert seen() == git("rev-parse", "--short", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert seen() == git("rev-parse", "--short", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert seen() is None
    commit.cache_clear()


def test_a_picture_of_any_results(tmp_path: Path):
    """One batch size, sizes in any order, more than all of the bandwidth, and names that are long or look like formulas."""
    results = [
        {"batch": batch, "tokens_per_s": speed, "bandwidth_share": share}
        for batch, speed, share in ((64, 8409.0, 0.78), (1, 23.8, 0.84), (256, 14000.0, 1.2))
    ]
    for name, part in (("Qwen/Qwen3-8B", results), ("$a$b$" + 200 * "x", results[:1])):
        path = tmp_path / f"{len(part)}.png"
        save_plot(plot_decode(name, MACHINE, part, input_len=128, output_len=64), path)
        assert png_size(path) == (1200, 700)


def test_the_picture_says_what_was_measured(tmp_path: Path):
    (tmp_path / "Qwen3-8B").mkdir()
    results = [{"batch": batch, "tokens_per_s": 10.0 * batch, "bandwidth_share": 0.5} for batch in (1, 8)]
    figure = plot_decode(str(tmp_path / "Qwen3-8B"), MACHINE, results, input_len=128, output_len=64)
    title = figure.get_suptitle()
    assert title == "Qwen3-8B, bfloat16, context of 128 to 192 tokens\nFast Chip, 2 threads"
    left, right = figure.axes
    assert (left.get_xscale(), [label.get_text() for label in left.get_xticklabels()]) == ("log", ["1", "8"])
    assert (left.get_ylabel(), right.get_ylim()) == ("tokens/s", (0, 100))
    assert list(right.lines[0].get_ydata()) == [50, 50]


@pytest.mark.parametrize(
    ("name", "words"), [("no/speed.png", "No such file"), ("speed.txt", "must end in"), ("folder.png", "directory")]
)
def test_where_no_picture_can_be_is_said_before_the_work(tmp_path: Path, name: str, words: str):
    (tmp_path / "folder.png").mkdir()
    said = one_line(run("bench", "latency", "demo", "--plot", str(tmp_path / name)))
    assert "--plot" in said and words in said


def test_asking_where_a_picture_may_be_leaves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = tmp_path / "old.PNG"
    old.write_text("kept")
    check_plot(old)
    check_plot(tmp_path / "new.png")
    assert [one.name for one in tmp_path.iterdir()] == ["old.PNG"] and old.read_text() == "kept"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadConfig, match=r"--plot needs matplotlib: pip install 'fastqwen\[plot\]'"):
        check_plot(tmp_path / "new.png")


def test_a_picture_of_what_the_gpu_script_wrote(tmp_path: Path):
    def draw(*files: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "bench/plot_decode.py", str(tmp_path / "models.png"), *map(str, files)]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

    results = ROOT / "bench" / "results"
    done = draw(results / "h200-qwen3-0.6b.json", results / "h200-qwen3-8b.json")
    assert done.returncode == 0, done.stderr
    assert png_size(tmp_path / "models.png") == (1200, 700)
    done = draw(results / "h200-plan-check.json")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "h200-plan-check.json" in done.stderr


def test_long_work_says_how_far_it_is(capsys, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("fastqwen.benchmark.progress.time.perf_counter", lambda: now[0])
    progress = Progress("decode", 40, "steps")
    for second in range(20):
        now[0] = float(second)
        progress.tick(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "decode: 6 of 40 steps, 3.0 a second so far" and len(lines) == 4


def test_work_of_one_call_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "FIRST_AFTER_S", 0.01)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    told = threading.Event()

    def line(seconds: float) -> str:
        told.set()
        return f"{seconds >= 0.01} so far"

    with progress.watched("work", line):
        assert told.wait(30)
    assert capsys.readouterr().err.startswith("work: True so far\n")
    num_threads = threading.active_count()
    with pytest.raises(ZeroDivisionError), progress.watched("work", line):
        raise ZeroDivisionError
    assert threading.active_count() == num_threads
