"""One call on a GPU machine: is the planner's prediction of memory what the engine takes, term by term.

python bench/plan_check.py OUT.json [--configs DIR] [--only WORD] [--budget-s 150]

Each combination of model, type and length runs in a process of its own, with dummy weights and a cache of fixed size, so that
the whole plan is known beforehand. The engine is watched while it starts; then it gets its worst steps: as many prompt
tokens as a step may have (as one prompt, as a later piece of a long prompt, as many short prompts that all sample), decode
steps with the most sequences, and sampling with everything that it offers. Needs torch, Triton and what fastqwen
imports (numpy, msgspec, llguidance); the repository itself need not be installed.

OUT.json is written after each combination. ``terms`` names for each term where its constant or formula stands.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_readings import BELONGS_TO, CudaMeter, Log, Meter, compared, measured

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path.cwd()))  # the copy that is checked, wherever this file lies

GIB, MIB = 2**30, 2**20
GOAL = 0.03
USUAL_S = 25  # a combination takes about this long; the last ones are left out rather than begun too late

# model: a folder of DIR. length x at_once is the cache. The first ten are the proof; packed weights are the slowest and come last.
COMBINATIONS: list[dict[str, Any]] = [
    {"model": "qwen3-0.6b", "dtype": "bfloat16", "length": 4096, "at_once": 8, "num_seqs": 256},
    {"model": "qwen3-8b", "dtype": "bfloat16", "length": 8192, "at_once": 4, "num_seqs": 64},
    {"model": "qwen3-8b", "dtype": "bfloat16", "length": 32768, "at_once": 8, "num_seqs": 128, "eager": True},
    {"model": "qwen1-7b", "dtype": "float16", "length": 2048, "at_once": 4, "num_seqs": 32},
    {"model": "qwen1-7b", "dtype": "float16", "length": 8192, "at_once": 2, "num_seqs": 64, "eager": True},
    {"model": "qwen2.5-7b", "dtype": "bfloat16", "length": 16384, "at_once": 8, "num_seqs": 256, "eager": True},
    {"model": "qwen3-14b", "dtype": "bfloat16", "length": 8192, "at_once": 4, "num_seqs": 16},
    {"model": "qwen3-30b-a3b", "dtype": "bfloat16", "length": 8192, "at_once": 4, "num_seqs": 64, "eager": True},
    {"model": "qwen3-0.6b", "dtype": "float16", "length": 16384, "at_once": 2, "num_seqs": 32, "eager": True},
    {"model": "qwen2.5-7b", "dtype": "float16", "length": 4096, "at_once": 8, "num_seqs": 64},
    {"model": "qwen1-7b-int4", "dtype": "float16", "length": 8192, "at_once": 2, "num_seqs": 16, "eager": True},
    {"model": "qwen2.5-7b-int4", "dtype": "float16", "length": 8192, "at_once": 4, "num_seqs": 16},
]


def watch_start(log: Log) -> None:
    from fastqwen.runner import measure, start
    from fastqwen.runner.cuda_runner import CudaRunner

    log.after(start, "choose_ops", "kernels' scratch")
    log.after(start, "_load", "weights")
    log.after(measure, "measure_room", "largest step on trial")
    log.after(CudaRunner, "__init__", "cache")
    log.after(CudaRunner, "_warm_up", "kernels compiled")
    log.after(CudaRunner, "capture", "graphs")


def config_of(spec: dict[str, Any], model: Any) -> Any:
    """The engine's wishes: a cache of exactly ``at_once`` sequences of this length."""
    from fastqwen.config import EngineConfig
    from fastqwen.plan import kv_bytes_per_token

    block_size = spec.get("block_size", 64)
    blocks = spec["at_once"] * -(-spec["length"] // block_size)
    return EngineConfig(
        model=spec["model"],
        load_format="dummy",
        dtype=spec["dtype"],
        max_model_len=spec["length"],
        max_num_seqs=spec["num_seqs"],
        max_num_batched_tokens=spec.get("step_tokens", 8192),
        block_size=block_size,
        kv_cache_memory_bytes=blocks * block_size * kv_bytes_per_token(model, spec["dtype"]),
        enforce_eager=spec.get("eager", False),
        enable_prefix_caching=False,
        device=spec.get("device", "cuda"),
        seed=0,
    )


def predicted(model: Any, config: Any, facts: Any, num_blocks: int) -> dict[str, int]:
    """The planner's terms for this engine."""
    import msgspec

    from fastqwen.plan import kv_bytes_per_token
    from fastqwen.plan.engine import need_of_engine

    need = need_of_engine(model, config, facts, dtype=config.dtype, max_model_len=config.max_model_len)
    terms = {name: value for name, value in msgspec.structs.asdict(need).items() if name in BELONGS_TO}
    terms["kv_cache"] = num_blocks * config.block_size * kv_bytes_per_token(model, config.dtype)
    terms["total"] = need.fixed + terms["kv_cache"]
    return terms


def add(core: Any, tag: str, lengths: list[int], outputs: int, vocab: int, **sampling: Any) -> None:
    from fastqwen.records import EngineRequest, SamplingParams

    generator = random.Random(0)
    for index, length in enumerate(lengths):
        request = EngineRequest(
            request_id=f"{tag}-{index}",
            prompt_token_ids=[generator.randrange(vocab) for _ in range(length)],
            sampling=SamplingParams(**sampling),
            stop_token_ids=[],
            max_tokens=outputs,
            seed=index,
        )
        core.add(request)


def finish(core: Any) -> int:
    """Run until nothing is left; the number of tokens. Raises RuntimeError for a sequence that failed."""
    tokens = 0
    while core.has_work:
        for delta in core.step():
            tokens += len(delta.token_ids)
            if getattr(delta, "error", None):
                raise RuntimeError(delta.error)
    return tokens


def worst_steps(engine: Any, log: Log) -> None:
    """Every kind of step that takes much; each is read by itself, and the first of a kind grows the memory."""
    core, plan, vocab = engine.core, engine.plan, engine.model.vocab_size
    longest, step = plan.max_model_len - 4, plan.max_num_batched_tokens
    drawn = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}
    fitting = min(plan.max_num_seqs, plan.num_blocks // -(-plan.max_model_len // plan.block_size))
    count = max(1, min(fitting, step // longest))
    add(core, "whole", [min(longest, step // count)] * count, 2, vocab, **drawn)
    finish(core)
    log.note("whole prompts")
    if longest > step + plan.block_size:
        add(core, "long", [longest], 2, vocab, **drawn)
        finish(core)
        log.note("a long prompt in pieces")
    short = max(1, min(longest, step // plan.max_num_seqs))
    each = -(-(short + 6) // plan.block_size)
    rows = min(plan.max_num_seqs, plan.num_blocks // each)
    add(core, "rows", [short] * rows, 6, vocab, **drawn)
    finish(core)
    log.note(f"{rows} rows that sample")
    add(core, "all", [short] * rows, 6, vocab, **drawn, logprobs=20, presence_penalty=0.5, frequency_penalty=0.1)
    finish(core)
    log.note(f"{rows} rows with penalties and log-probabilities")


def check(
    spec: dict[str, Any], configs: Path, meter: Meter, before: int, watch: Callable[[Log], None]
) -> dict[str, Any]:
    """One combination, in this process."""
    from fastqwen.models import read_config
    from fastqwen.runner.device import choose_device, device_facts
    from fastqwen.runner.start import start_engine

    began_s = time.perf_counter()
    folder = configs / spec["model"]
    model = read_config(folder)
    config = config_of(spec, model)
    log = Log(meter)
    log.note("context")
    facts = device_facts(choose_device(config))
    watch(log)
    engine = start_engine(config, folder)
    started_s = time.perf_counter() - began_s
    if "cache" not in log.readings:
        log.note("cache")
    worst_steps(engine, log)
    plan = predicted(model, config, facts, engine.plan.num_blocks)
    found = measured(log.readings, before)
    return {
        **spec,
        "gpu": facts.name,
        "multiprocessors": facts.multiprocessors,
        "num_blocks": engine.plan.num_blocks,
        "predicted": plan,
        "measured": found,
        "compared": compared(plan, found),
        "difference": plan["total"] / found["total"] - 1,
        "at_start": [line.text for line in engine.comparison],
        "readings": log.readings,
        "start_s": started_s,
        "seconds": time.perf_counter() - began_s,
    }


def used_before() -> tuple[int, str]:
    """Bytes of the GPU that others hold, asked of the driver: torch cannot tell before it has made a context."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout.split()[0]) * MIB, "nvidia-smi"
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return 0, f"unknown, taken as 0: {error}"


def child(spec: dict[str, Any], configs: Path, out: Path) -> None:
    """Import what takes long, wait for a line (another combination may still run), then check."""
    import torch

    import fastqwen.runner.start  # noqa: F401

    sys.stdin.readline()
    before, source = used_before()
    torch.empty(1, device="cuda")
    torch.cuda.synchronize()
    found = check(spec, configs, CudaMeter(), before, watch_start)
    out.write_text(json.dumps({**found, "used_before": before, "used_before_from": source}))


class Running:
    """A combination's process, which waits for ``go``."""

    def __init__(self, spec: dict[str, Any], configs: Path, folder: Path) -> None:
        self.spec = spec
        self._out = folder / f"{random.getrandbits(48):x}.json"
        words = [sys.executable, __file__, "--child", json.dumps(spec), "--configs", str(configs), str(self._out)]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def go(self, timeout_s: float) -> dict[str, Any]:
        try:
            said, _ = self._process.communicate("\n", timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said = self._process.communicate()[0]
            return {**self.spec, "failed": f"took more than {timeout_s:.0f} s", "said": said[-2000:]}
        if self._process.returncode or not self._out.exists():
            return {**self.spec, "failed": f"exit status {self._process.returncode}", "said": said[-4000:]}
        return dict(json.loads(self._out.read_text()), warnings=said[-2000:])

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def title(spec: dict[str, Any]) -> str:
    how = "eager" if spec.get("eager") else "graphs"
    return f"{spec['model']} {spec['dtype']} {spec['length']} x {spec['at_once']}, {spec['num_seqs']} rows, {how}"


def show(result: dict[str, Any]) -> None:
    print(f"\n{title(result)}", flush=True)
    if "failed" in result:
        print(f"FAILED: {result['failed']}\n{result['said']}", flush=True)
        return
    for row in result["compared"]:
        predicted_mib, measured_mib = row["predicted_bytes"] / MIB, row["measured_bytes"] / MIB
        print(
            f"  {row['part']:20} predicted {predicted_mib:9.1f} MiB  measured {measured_mib:9.1f} MiB "
            f"{predicted_mib - measured_mib:+9.1f} MiB {row['difference']:+7.2%} of the whole",
        )
    kept = {name: round(value / MIB, 1) for name, value in result["measured"].items()}
    print(f"  measured, MiB: {kept}")
    print(f"  predicted, MiB: { ({name: round(value / MIB, 1) for name, value in result['predicted'].items()}) }")
    print(f"  {result['seconds']:.1f} s, of it start {result['start_s']:.1f} s", flush=True)


def summary(results: list[dict[str, Any]]) -> None:
    print(f"\n{'combination':62} {'predicted':>10} {'measured':>10} {'reserved':>10}  difference")
    for result in results:
        if "failed" in result:
            print(f"{title(result):62} failed: {result['failed']}")
            continue
        total, found = result["predicted"]["total"] / GIB, result["measured"]["total"] / GIB
        reserved = result["measured"]["peak reserved"] / GIB
        print(f"{title(result):62} {total:10.3f} {found:10.3f} {reserved:10.3f}  {result['difference']:+.2%}")
    passed = sum(abs(result.get("difference", 1.0)) <= GOAL for result in results)
    print(f"{passed} of {len(results)} within {GOAL:.0%}", flush=True)


def all_of(specs: list[dict[str, Any]], configs: Path, out: Path, budget_s: float) -> list[dict[str, Any]]:
    """One after the other; the next one's imports run meanwhile."""
    began_s, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        waiting = [Running(spec, configs, Path(folder)) for spec in specs[:1]]
        try:
            for index, spec in enumerate(specs):
                running = waiting.pop()
                waiting += [Running(later, configs, Path(folder)) for later in specs[index + 1 : index + 2]]
                left_s = budget_s - (time.monotonic() - began_s)
                if left_s < USUAL_S and index:
                    running.stop()
                    results.append({**spec, "failed": "left out: no time left", "said": ""})
                else:
                    results.append(running.go(max(left_s, USUAL_S)))
                show(results[-1])
                report = {"command": sys.argv, "commit": commit(), "terms": BELONGS_TO, "results": results}
                out.write_text(json.dumps(report, indent=1))
        finally:
            for running in waiting:
                running.stop()
    return results


def commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--configs", type=Path, default=ROOT / "tests" / "configs")
    parser.add_argument("--only", help="only combinations whose title has this word")
    parser.add_argument("--budget-s", type=float, default=150.0)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        try:
            child(given.child, given.configs, given.out)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
        return
    specs = [spec for spec in COMBINATIONS if not given.only or given.only in title(spec)]
    if not specs:
        raise SystemExit(f"no combination has {given.only!r} in its title")
    summary(all_of(specs, given.configs, given.out, given.budget_s))


if __name__ == "__main__":
    main()
