"""Several GPUs of one host: are the tokens right, how fast is decoding, how long does a sum take.

python bench/gpu_parallel.py OUT.json [correct] [reduce] [decode] [offline] [prefill] [alone] [CASE ...] [MODEL ...]

Without words all but offline and prefill run, of qwen3-14b, on two GPUs (GPUS=4 in the environment: on four); ``alone``: the
models on one GPU as well. Each part is a process of its own, so that one that fails or hangs costs no other; its last lines
are printed and kept. Dummy weights, greedy, the work of bench/gpu_check.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import gpu_check
from fastqwen.config import EngineConfig
from fastqwen.ranks.start import start_engine
from fastqwen.runner.start import Engine
from tests.models.tiny import MOE, greedy, make, prompt
from tests.quant.test_gptq import LAYOUTS, pack

ROOT = Path(__file__).parents[1]
GPUS = int(os.environ.get("GPUS", "2"))
CASES = ("Qwen3Config", "Qwen2Config", "Qwen3MoeConfig", "Qwen2MoeConfig", "int4", "int4-desc-act", "int8")
PARTS = ("correct", "reduce", "decode", "offline", "prefill")
PART_TIMEOUT_S = {"correct": 420, "reduce": 150}
HEADS = {"hidden_size": 128, "head_dim": 32}  # the least that tensor cores take
LENGTHS = (1, 17, 40, 150)
TOKENS = 48


def started(folder: Path, count: int, **wishes: Any) -> Engine:
    config = EngineConfig(model=str(folder), tensor_parallel_size=count, device="cuda", **wishes)
    return start_engine(config, folder)


def end(engine: Engine) -> None:
    """Of several ranks: their GPUs are free for the next."""
    group = getattr(engine.core._executor, "_group", None)
    if group is not None:
        group.close()


def folder_of(case: str, at: Path) -> Path:
    if case.startswith("int"):
        make(at, "Qwen3Config", **HEADS)
        return pack(at, LAYOUTS[case])[0]
    changes = {
        "Qwen3MoeConfig": MOE,
        "Qwen2MoeConfig": {**MOE, "shared_expert_intermediate_size": 96},
        "Qwen2Config": {"tie_word_embeddings": True},
    }.get(case, {})
    make(at, case, **{**changes, **HEADS})
    return at


def correct(*cases: str) -> dict[str, Any]:
    """Greedy tokens in float32 (packed weights: float16) of one GPU and of several: together, again with a warm prefix
    cache, alone, launched one by one, and pushed out by each other for want of blocks."""
    prompts = [prompt(length) for length in LENGTHS]
    found: dict[str, Any] = {}
    for case in cases or CASES:
        dtype = "float16" if case.startswith("int") else "float32"
        wishes = {"dtype": dtype, "max_model_len": 256, "max_num_seqs": 8}
        with tempfile.TemporaryDirectory() as at:
            folder = folder_of(case, Path(at))
            told: dict[str, Any] = {}
            for count in (1, GPUS):
                engine = started(folder, count, **wishes)
                told[f"{count}"] = [greedy(engine.core, prompts, TOKENS) for _ in range(2)]
                told[f"{count}"].append([greedy(engine.core, [ids], TOKENS)[0] for ids in prompts])
                end(engine)
                engine = started(folder, count, **wishes, enforce_eager=True)
                told[f"{count}"].append(greedy(engine.core, prompts, TOKENS))
                num_blocks = 256 // engine.plan.block_size + 1
                blocks = num_blocks * engine.plan.block_size * engine.plan.kv_bytes_per_token
                end(engine)
                narrow = {**wishes, "kv_cache_memory_bytes": blocks}
                engine = started(folder, count, **narrow, enforce_eager=True)
                told[f"{count}"].append(greedy(engine.core, [prompt(60), prompt(61), prompt(62)], TOKENS))
                told[f"preemptions {count}"] = engine.core.stats().num_preemptions
                end(engine)
            names = ("together", "warm", "alone", "eager", "pushed")
            pairs = zip(told["1"], told[f"{GPUS}"], strict=True)
            found[case] = {name: one == several for name, (one, several) in zip(names, pairs, strict=True)}
            found[case]["preemptions"] = [told["preemptions 1"], told[f"preemptions {GPUS}"]]
            print(case, found[case], flush=True)
    return found


def decode(model: str, count: int) -> dict[str, Any]:
    engine = dummy(model, count)
    for batch, context in ((1, 128), (64, 1024)):
        gpu_check.decode(engine, model, batch, context)
    end(engine)
    return dict(gpu_check.RESULTS)


def dummy(model: str, count: int) -> Engine:
    began_s = time.perf_counter()
    engine = started(
        ROOT / "tests" / "configs" / model, count, load_format="dummy", enable_prefix_caching=False, prompts_first=True
    )
    print(
        model, count, f"started in {time.perf_counter() - began_s:.1f} s, {engine.plan.num_blocks} blocks", flush=True
    )
    return engine


def offline(model: str, count: int) -> dict[str, Any]:
    engine = dummy(model, count)
    gpu_check.offline(engine, model)
    end(engine)
    return dict(gpu_check.RESULTS)


def prefill(model: str, count: int) -> dict[str, Any]:
    engine = dummy(model, count)
    gpu_check.prefill(engine, model)
    end(engine)
    return dict(gpu_check.RESULTS)


def reduce() -> dict[str, Any]:
    """One process a GPU; the first one's figures."""
    with tempfile.TemporaryDirectory() as at:
        meeting, out = Path(at) / "meeting", Path(at) / "out.json"
        words = [sys.executable, str(Path(__file__)), "--rank"]
        ranks = [subprocess.Popen([*words, str(index), str(meeting), str(out)]) for index in range(GPUS)]
        statuses = [one.wait(120) for one in ranks]
        if any(statuses):
            raise SystemExit(f"the ranks ended with {statuses}")
        return json.loads(out.read_text())


def rank(index: int, meeting: Path, out: Path) -> None:
    """Sums of 1 to 64 rows of 5120 in bfloat16, in recorded sequences: NCCL, ours, ours with RMSNorm; NCCL followed by it."""
    from fastqwen.kernels import Norm
    from fastqwen.kernels.triton import pointwise
    from fastqwen.ranks.peers import ROWS, open_peers, recorded_us
    from fastqwen.ranks.world import join

    torch.cuda.set_device(index)
    device, width, dtype = torch.device("cuda", index), 5120, torch.bfloat16
    world = join(index, GPUS, device, meeting)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        peers = open_peers(world, width, dtype, device)
        found["ours is there and right"] = peers is not None
        norm = Norm(torch.ones(width, dtype=dtype, device=device), 1e-6)
        for rows in ROWS:
            residual = torch.zeros((rows, width), dtype=dtype, device=device)
            part = torch.zeros_like(residual)

            def nccl_and_norm(residual=residual, part=part) -> None:
                world.all_reduce(part)
                residual += part
                pointwise.rms_norm(residual, norm)

            calls: dict[str, Any] = {
                "NCCL": lambda part=part: world.all_reduce(part),
                "NCCL, residual, norm": nccl_and_norm,
            }
            if peers is not None:
                calls["ours"] = lambda residual=residual, part=part: peers.add(residual, part)
                calls["ours with norm"] = lambda residual=residual, part=part: peers.add(residual, part, norm)
            found[f"{rows} rows, us"] = {
                name: round(recorded_us(call, world, device), 2) for name, call in calls.items()
            }
            if peers is not None and rows <= 8:
                residual.normal_(generator=torch.Generator(device).manual_seed(1))
                normed = peers.add(residual, part, norm)
                expected = pointwise.rms_norm(residual, norm)
                assert normed is not None
                found[f"{rows} rows, norm"] = bool(torch.allclose(normed, expected, rtol=2**-6, atol=2**-6))
            if index == 0:
                print(f"{rows} rows of {width}, us:", found[f"{rows} rows, us"], flush=True)
    if index == 0:
        out.write_text(json.dumps(found))


def in_process(part: str, *words: str) -> dict[str, Any]:
    """The part in a process of its own: what it found, or how it ended."""
    with tempfile.TemporaryDirectory() as at:
        out = Path(at) / "out.json"
        log = Path(at) / "log"
        command = [sys.executable, str(Path(__file__)), "--part", str(out), part, *words]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            try:
                status: Any = process.wait(PART_TIMEOUT_S.get(part, 200))
            except subprocess.TimeoutExpired:
                process.kill()
                status = "timed out"
        text = log.read_text(errors="replace")
        print(text[-6000:], flush=True)
        if out.is_file():
            return {"status": status, **json.loads(out.read_text())}
        return {"status": status, "log": text[-3000:]}


def one_part(out: Path, part: str, *words: str) -> None:
    if part == "correct":
        found = correct(*words)
    elif part == "reduce":
        found = reduce()
    else:
        model, count = words
        found = {"decode": decode, "offline": offline, "prefill": prefill}[part](model, int(count))
    out.write_text(json.dumps(found))


def main() -> None:
    if sys.argv[1] == "--rank":
        rank(int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
        return
    if sys.argv[1] == "--part":
        one_part(Path(sys.argv[2]), *sys.argv[3:])
        return
    out, words = Path(sys.argv[1]), sys.argv[2:]
    parts = [word for word in words if word in PARTS] or list(PARTS[:3])
    cases = [word for word in words if word in CASES]
    models = [word for word in words if word not in (*PARTS, *CASES, "alone")] or ["qwen3-14b"]
    counts = (GPUS, 1) if "alone" in words else (GPUS,)
    jobs: list[tuple[str, ...]] = []
    for part in parts:  # in their order
        if part in PARTS[:2]:
            jobs.append((part, *(cases if part == "correct" else ())))
        else:
            jobs += [(part, model, str(count)) for model in models for count in counts]
    results: dict[str, Any] = {"gpus": GPUS, "torch": torch.__version__}
    for job in jobs:
        print(f"---- {' '.join(job)}", flush=True)
        results[" ".join(job)] = in_process(*job)
        out.write_text(json.dumps(results, indent=1))  # so far
    print(json.dumps(results))


if __name__ == "__main__":
    main()
