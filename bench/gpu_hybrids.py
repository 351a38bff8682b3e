"""Hybrids on a GPU, in one call: are the kernels right, are the answers, how fast is each model.

python bench/gpu_hybrids.py OUT.json [--parts kernels golden decode prefill turn chats] [--models qwen3.5-0.8b ...]
                            [--seconds 400] [--tiny]

OUT.json is written after each part, so that a run which is cut leaves what it had. Dummy weights, greedy. Shares are of the
floor that bandwidth and rate of this machine give, measured first. A part that would begin after --seconds is left out and
named. --tiny has small models and lengths, for a CPU. Ends with an error if something is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.tune_kernels import graph_us
from fastqwen.benchmark import work
from fastqwen.benchmark.machine import Machine, measure, synchronize
from fastqwen.benchmark.report import commit
from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineCore
from fastqwen.errors import DoesNotFit
from fastqwen.kernels import DeltaShape
from fastqwen.records import EngineRequest, SamplingParams
from fastqwen.runner.start import Engine, start_engine
from tests.models.tiny_hybrid import write_tiny

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARTS = ("kernels", "golden", "decode", "prefill", "turn", "chats")
MODELS = ("qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-35b-a3b")
BASELINE = "qwen3-8b"  # whose prefill the hybrids' is compared with
# How far numbers may be off, as a part of 1 + themselves. Triton's interpreter, which stands for the GPU on a CPU, does not
# take bfloat16.
RIGHT = {torch.float32: 1e-3, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16: 4e-2}


@dataclass(frozen=True)
class Sizes:
    batches: tuple[int, ...] = (1, 8, 64)
    contexts: tuple[int, ...] = (1024, 32768)
    steps: int = 64
    prompts: tuple[int, int] = (32, 4096)
    turn: tuple[int, int, int] = (32768, 32, 64)  # tokens of the first prompt, its answer, what the second turn adds
    chats: tuple[int, int] = (64, 5)  # conversations, turns
    common: int = 512  # tokens with which all conversations begin
    said: int = 200  # tokens that a turn adds, each answered with ``answer`` tokens
    answer: int = 64
    heads: tuple[tuple[int, int], ...] = ((16, 16), (16, 32), (16, 48))  # key and value heads, of 128
    head: int = 128
    golden: tuple[tuple[int, ...], int] = (1, 3, 64, 65, 130, 300), 48  # prompts, and tokens of each answer
    rows: int = 64  # decoding, and tokens of a prompt, where kernels are timed
    long: int = 8192


TINY = Sizes(
    batches=(1, 2), contexts=(40, 80), steps=4, prompts=(2, 40), turn=(96, 4, 10), chats=(3, 2), common=32, said=20, answer=4,
    heads=((1, 2),), head=16, golden=((1, 20), 4), rows=2, long=70,
)  # fmt: skip


class Report:
    """Everything that was found, in a file that is complete after each line."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._ends_s = path, time.monotonic() + seconds
        self.found: dict[str, Any] = {}

    def note(self, name: str, /, **values: Any) -> None:
        self.found.setdefault(name, {}).update(values)
        shown = (
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
        )
        print(name, *shown, flush=True)
        self._path.write_text(json.dumps(self.found, indent=1))

    def part(self, name: str, run: Callable[[], None]) -> None:
        """What fails is written down, and the others go on."""
        if time.monotonic() > self._ends_s:
            self.note(name, left_out="no time was left")
            return
        began_s = time.monotonic()
        try:
            run()
        except Exception as error:
            told = " ".join(str(error).split())[:500]
            self.note(name, right=False, error=told or type(error).__name__)
        print(f"   {name}: {time.monotonic() - began_s:.1f} s", flush=True)

    @property
    def wrong(self) -> list[str]:
        return [name for name, values in self.found.items() if values.get("right") is False]


# ---- kernels ----


def kernels(report: Report, machine: Machine, sizes: Sizes) -> None:
    """Against the reference op on the same device, then the time of each alone."""
    for keys, values in sizes.heads:
        shape = DeltaShape(keys, values, sizes.head, sizes.head, 4)
        for dtype in RIGHT:
            rows = [(900, 1), (0, 1), (2, 1), (0, 70), (40, 65), (0, 2), (3, 7), (1, 64)]
            _check_rows(report, shape, dtype, rows if sizes.head > 16 else rows[1:5])
        _time_rows(report, machine, shape, [(900, 1)] * sizes.rows, "decode")
        _time_rows(report, machine, shape, [(0, sizes.long)], "prompt")


def _check_rows(report: Report, shape: DeltaShape, dtype: torch.dtype, rows: list[tuple[int, int]]) -> None:
    from tests.kernels.test_delta import REFERENCE, TritonOps, copied, make_parts, make_step, random

    torch.manual_seed(0)
    parts = make_parts(shape, dtype)
    step, state = make_step(rows, shape, dtype)
    other = copied(state)
    projected = random(int(step.row_starts[-1]), shape.width, dtype=dtype)
    found = TritonOps(DEVICE).gated_delta(projected, step, state, parts).float()
    expected = REFERENCE.gated_delta(projected, step, other, parts).float()
    live = torch.isfinite(other.memory)
    errors = {
        "out": _furthest(found, expected),
        "memory": _furthest(state.memory[live], other.memory[live]),
    }
    right = max(errors.values()) <= RIGHT[dtype] and bool(torch.isfinite(found).all())
    report.note(f"kernels {shape.num_key_heads}/{shape.num_value_heads} {dtype}", right=right, **errors)


def _furthest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs() / (1 + expected.abs())).max())


def _time_rows(report: Report, machine: Machine, shape: DeltaShape, rows: list[tuple[int, int]], kind: str) -> None:
    from tests.kernels.test_delta import TritonOps, make_parts, make_step, random

    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    ops, parts = TritonOps(DEVICE), make_parts(shape, dtype)
    step, state = make_step(rows, shape, dtype)
    tokens = int(step.row_starts[-1])
    projected = random(tokens, shape.width, dtype=dtype)
    us = _best_us(lambda: ops.gated_delta(projected, step, state, parts))
    # A recurrence reads and writes each row's memory, and every token's inputs and outputs once.
    number = 4 * 2 * shape.value_size * shape.key_dim * len(rows)
    number += projected.element_size() * tokens * (shape.width + shape.value_size)
    floor_us = number / machine.read_gb_s / 1e3
    name = f"kernels {shape.num_key_heads}/{shape.num_value_heads} {kind}"
    report.note(name, tokens=tokens, us=us, floor_us=floor_us, share=floor_us / us)


def _best_us(run: Callable[[], Any]) -> float:
    """Of several calls; on a GPU from a graph, as in a recorded step, so that the host's time is none of it."""
    if DEVICE.type == "cuda":
        return graph_us(run, 1)
    began_s = time.perf_counter()
    run()
    return (time.perf_counter() - began_s) * 1e6


# ---- answers ----


def golden(report: Report, sizes: Sizes) -> None:
    """A tiny model's answers against the CPU's, which are held to transformers' by the tests: in a batch, in chunks, from a
    warm cache; recorded and launched one by one."""
    from tests.models.tiny import greedy, logits, prompt, start

    lengths, count = sizes.golden
    prompts = [prompt(length, 512) for length in lengths]
    for sparse in (False, True):
        with tempfile.TemporaryDirectory() as at:
            folder = write_tiny(Path(at) / "model", sparse=sparse)
            expected = greedy(start(folder, device="cpu"), prompts, count)
            exact = logits(folder, prompts[-1], device="cpu")
            wishes: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8}
            found = logits(folder, prompts[-1], enforce_eager=True, **wishes)
            error = float((found - exact).abs().max())
            core = start(folder, **wishes)
            values: dict[str, Any] = {
                "logits_error": error,
                "batch": greedy(core, prompts, count) == expected,
                "warm": greedy(core, prompts, count) == expected and core.scheduler.num_prefix_hits > 0,
                "eager": greedy(start(folder, enforce_eager=True, **wishes), prompts, count) == expected,
                "chunks": greedy(start(folder, max_num_batched_tokens=16, **wishes), prompts, count) == expected,
            }
            half = {**wishes, "dtype": "bfloat16" if DEVICE.type == "cuda" else "float32"}
            recorded = greedy(start(folder, **half), prompts, count)
            values["half_recorded"] = recorded == greedy(start(folder, enforce_eager=True, **half), prompts, count)
            values["right"] = error <= 1e-3 and all(value for value in values.values() if isinstance(value, bool))
            report.note(f"golden {'sparse' if sparse else 'dense'}", **values)


# ---- speed ----


class Model:
    """An engine with dummy weights."""

    def __init__(self, name: str, folder: Path, sizes: Sizes) -> None:
        self.name = name
        longest = max(max(sizes.contexts) + sizes.steps, sizes.prompts[1], sum(sizes.turn) + sizes.answer) + 64
        most = max(*sizes.batches, sizes.chats[0])
        self.engine = self._start(folder, longest, (most, *(count for count in (16, 4) if count < most)))
        self.core: EngineCore = self.engine.core
        self._chance = random.Random(0)

    def _start(self, folder: Path, longest: int, counts: tuple[int, ...]) -> Engine:
        """With as many sequences as the card has room for beside the weights."""
        for count in counts:
            try:
                config = EngineConfig(
                    model=self.name, load_format="dummy", max_model_len=longest, max_num_seqs=count, prompts_first=True,
                    **({"dtype": "float32"} if DEVICE.type == "cpu" else {}),
                )  # fmt: skip
                return start_engine(config, folder)
            except DoesNotFit:
                if count == counts[-1]:
                    raise
            forget()  # what was loaded before it was found out
        raise AssertionError("no counts")

    def ids(self, count: int) -> list[int]:
        return [self._chance.randrange(self.engine.model.vocab_size) for _ in range(count)]

    def cached(self, wanted: bool) -> None:
        self.core.scheduler.enable_prefix_caching = wanted

    def add(self, name: str, token_ids: list[int], max_tokens: int) -> None:
        self.core.add(
            EngineRequest(
                request_id=name, prompt_token_ids=token_ids, sampling=SamplingParams(temperature=0.0), stop_token_ids=[],
                max_tokens=max_tokens, seed=0,
            )
        )  # fmt: skip

    def holds(self, batch: int, tokens: int) -> bool:
        size = self.engine.plan.block_size
        return self.engine.plan.num_blocks >= batch * -(-tokens // size) and self.engine.plan.max_num_seqs >= batch

    def answer(self, token_ids: list[int], max_tokens: int) -> tuple[float, list[int], int]:
        """Seconds to the first token, all tokens, and how many of the prompt were found in the cache."""
        synchronize(DEVICE)
        began_s, first_s, said, cached = time.perf_counter(), 0.0, [], 0
        self.add("one", token_ids, max_tokens)
        while self.core.has_work:
            for delta in self.core.step():
                if not said:
                    first_s, cached = time.perf_counter() - began_s, delta.num_cached_tokens
                said += delta.token_ids
        return first_s, said, cached


def decode(report: Report, machine: Machine, sizes: Sizes, model: Model) -> None:
    """Milliseconds a step once all sequences decode."""
    model.cached(False)
    by_context: dict[int, float] = {}
    for context in sizes.contexts:
        for batch in sizes.batches:
            name = f"{model.name} decode b{batch} c{context}"
            if not model.holds(batch, context + sizes.steps + 16):
                report.note(name, left_out=f"{model.engine.plan.num_blocks} blocks do not hold it")
                continue
            ms = _step_ms(model, batch, context, sizes.steps)
            needs = work.decode_step(
                model.engine.model, model.engine.plan.dtype, batch=batch, context_tokens=context + sizes.steps / 2
            )
            floor_ms = max(needs.read_bytes / machine.read_gb_s / 1e6, needs.operations / machine.matmul_tflops / 1e9)
            report.note(name, ms=ms, floor_ms=floor_ms, share=floor_ms / ms)
            if context == sizes.contexts[0]:
                by_context[batch] = ms
            elif batch in by_context:
                report.note(name, of_short=ms / by_context[batch])


def _step_ms(model: Model, batch: int, context: int, steps: int) -> float:
    core, counts = model.core, dict.fromkeys(map(str, range(batch)), 0)
    for name in counts:
        model.add(name, model.ids(context), steps + 12)
    began_s = ended_s = 0.0
    while core.has_work:
        for delta in core.step():
            counts[delta.request_id] += len(delta.token_ids)
        least = min(counts.values())
        if least >= 4 and not began_s:
            began_s, begun = time.perf_counter(), least
        if least >= steps + 4:
            ended_s, done = time.perf_counter(), least
            break
    for name in counts:
        core.abort(name)
    while core.has_work:
        core.step()
    core.step()
    return (ended_s - began_s) / (done - begun) * 1e3


def prefill(report: Report, machine: Machine, sizes: Sizes, model: Model) -> None:
    model.cached(False)
    count, length = sizes.prompts
    fit = min(count, model.engine.plan.num_blocks * model.engine.plan.block_size // (length + 16))
    seconds = []
    for _ in range(2):
        for index in range(fit):
            model.add(str(index), model.ids(length), 1)
        synchronize(DEVICE)
        began_s = time.perf_counter()
        while model.core.has_work:
            model.core.step()
        seconds.append(time.perf_counter() - began_s)
    needs = work.prefill(model.engine.model, model.engine.plan.dtype, batch=fit, tokens=length)
    rate = needs.operations / min(seconds) / 1e12
    values = {"tok_s": fit * length / min(seconds), "tflops": rate, "share": rate / machine.matmul_tflops}
    baseline = report.found.get(f"{BASELINE} prefill", {}).get("tflops")
    if baseline and model.name != BASELINE:
        values["of_baseline"] = rate / baseline
    report.note(f"{model.name} prefill", prompts=fit, length=length, **values)


def turn(report: Report, sizes: Sizes, model: Model) -> None:
    """The second turn of a long conversation: only what is new is computed."""
    model.cached(True)
    length, said, more = sizes.turn
    if not model.holds(1, sum(sizes.turn) + sizes.answer):
        report.note(f"{model.name} turn", left_out=f"{model.engine.plan.num_blocks} blocks do not hold it")
        return
    model.answer(model.ids(length), 1)  # what is compiled or tuned by size
    ids = model.ids(length)
    first_s, tokens, _ = model.answer(ids, said)
    second_s, _, cached = model.answer(ids + tokens + model.ids(more), sizes.answer)
    report.note(
        f"{model.name} turn", first_s=first_s, second_s=second_s, share=second_s / first_s, cached=cached,
        right=cached >= length + said - 2 * model.engine.plan.block_size,
    )  # fmt: skip


def chats(report: Report, sizes: Sizes, model: Model) -> None:
    """Conversations at once, each of which says more when it was answered: with the cache and without."""
    common = model.ids(sizes.common)
    said = [[model.ids(sizes.said) for _ in range(sizes.chats[1])] for _ in range(sizes.chats[0])]
    seconds = {}
    for cached in (False, True):
        model.cached(cached)
        before = model.core.scheduler.num_prefix_hits
        seconds[cached] = _converse(model, common, said, sizes.answer)
        hits = model.core.scheduler.num_prefix_hits - before
    report.note(
        f"{model.name} chats", without_s=seconds[False], with_s=seconds[True], share=seconds[True] / seconds[False],
        hit_tokens=hits, snapshots=model.engine.plan.max_state_snapshots, preemptions=model.core.scheduler.num_preemptions,
    )  # fmt: skip


def _converse(model: Model, common: list[int], said: list[list[list[int]]], answer: int) -> float:
    history = [common + turns[0] for turns in said]
    turn_of = [0] * len(said)
    for index, ids in enumerate(history):
        model.add(str(index), ids, answer)
    synchronize(DEVICE)
    began_s = time.perf_counter()
    while model.core.has_work:
        for delta in model.core.step():
            index = int(delta.request_id)
            history[index] = history[index] + delta.token_ids
            if delta.finish_reason and turn_of[index] + 1 < len(said[index]):
                turn_of[index] += 1
                history[index] = history[index] + said[index][turn_of[index]]
                model.add(str(index), history[index], answer)
    return time.perf_counter() - began_s


def speed(report: Report, machine: Machine, sizes: Sizes, name: str, folder: Path, parts: list[str]) -> None:
    began_s = time.monotonic()
    model = Model(name, folder, sizes)
    plan = model.engine.plan
    report.note(
        f"{name} start", seconds=time.monotonic() - began_s, kv_blocks=plan.num_blocks, max_num_seqs=plan.max_num_seqs,
        snapshots=plan.max_state_snapshots, states_gib=plan.states_bytes / 2**30, dtype=plan.dtype,
    )  # fmt: skip
    runs: dict[str, Callable[[], None]] = {
        "decode": lambda: decode(report, machine, sizes, model),
        "prefill": lambda: prefill(report, machine, sizes, model),
        "turn": lambda: turn(report, sizes, model),
        "chats": lambda: chats(report, sizes, model),
    }
    for part in parts:
        report.part(f"{name} {part}", runs[part])


def forget() -> None:
    gc.unfreeze()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="folders of tests/configs")
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    report, sizes = Report(options.out, options.seconds), TINY if options.tiny else Sizes()
    machine = measure(DEVICE, "bfloat16" if DEVICE.type == "cuda" else "float32")
    report.note(
        "machine", name=machine.name, torch=machine.torch, commit=commit(), read_gb_s=machine.read_gb_s,
        matmul_tflops=machine.matmul_tflops,
    )  # fmt: skip
    if "kernels" in options.parts:
        report.part("kernels", lambda: kernels(report, machine, sizes))
    if "golden" in options.parts:
        report.part("golden", lambda: golden(report, sizes))
    timed = [part for part in PARTS[2:] if part in options.parts]
    with tempfile.TemporaryDirectory() as at:
        places = {name: CONFIGS / name for name in options.models}
        if options.tiny:
            places = {"tiny": write_tiny(Path(at) / "tiny", sparse=False)}
        elif "prefill" in timed and DEVICE.type == "cuda":
            short = replace(sizes, contexts=(1024,), turn=(1024, 32, 64))
            report.part(BASELINE, lambda: speed(report, machine, short, BASELINE, CONFIGS / BASELINE, ["prefill"]))
            forget()
        for name, folder in places.items() if timed else ():
            report.part(name, lambda: speed(report, machine, sizes, name, folder, timed))  # noqa: B023 called at once
            forget()
    print(json.dumps(report.found))
    print("wrong:", ", ".join(report.wrong) or "nothing")
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
