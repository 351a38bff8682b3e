"""fastqwen beside llama.cpp on this machine's CPU: the same file, the same prompts, the same number of threads.

    python bench/cpu_rivals.py [MODEL.gguf] [--threads 2] [--rounds 3]

llama.cpp comes from the package index (xllamacpp, its server as a library) into an environment of its own in the cache.
Each engine runs in a process of its own, one after the other, ``rounds`` times; of each figure the best round counts, since
others' work on the machine only makes it worse. The last line is JSON: all rounds, and how many times faster fastqwen is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RIVAL_PACKAGE = "xllamacpp==2026.10.11549"
PROMPT, NEW, STREAMS = 128, 64, 8
PREFILLS = (512, 2048)
CONTEXT = 4096  # tokens of a sequence
REPEATS = 3  # within a process
TIMEOUT_S = 1800
FIGURES = {  # whether more is better
    "load_s": False, "decode_tokens_per_s": True, "streams_tokens_per_s": True,
    **{f"prefill_{tokens}_tokens_per_s": True for tokens in PREFILLS},
}  # fmt: skip

Generate = Callable[[list[list[int]], int], float]  # prompts, new tokens of each -> seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="fastqwen beside llama.cpp on a CPU")
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file; default: the demo model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help="measure this one only, in this very environment")
    options = parser.parse_args()
    if options.engine is not None:
        print(json.dumps(measure(ENGINES[options.engine], options.model, options.threads)))
        return
    print(json.dumps(side_by_side(options.model or demo(), options.threads, options.rounds)))


def demo() -> Path:
    from fastqwen.demo import demo_path

    return demo_path()


def side_by_side(model: Path, threads: int, rounds: int) -> dict[str, Any]:
    pythons = {"fastqwen": Path(sys.executable), "llama.cpp": rival_python()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for _ in range(rounds):
        for name, python in pythons.items():
            found[name].append(in_process(python, name, model, threads))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    best = {name: best_of(each) for name, each in found.items()}
    ratios = {}
    for figure, more_is_better in FIGURES.items():
        ours, theirs = best["fastqwen"][figure], best["llama.cpp"][figure]
        ratios[figure] = ours / theirs if more_is_better else theirs / ours
        print(
            f"{figure:28} fastqwen {ours:9.2f}  llama.cpp {theirs:9.2f}  {ratios[figure]:6.2f} times as fast",
            file=sys.stderr,
        )
    return {
        "benchmark": "cpu_rivals",
        "model": model.name,
        "threads": threads,
        "rounds": found,
        "times_as_fast": ratios,
    }


def best_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: (max if more else min)(each[name] for each in rounds) for name, more in FIGURES.items()}


def rival_python() -> Path:
    from fastqwen.paths import cache_dir

    folder = cache_dir() / "rivals" / RIVAL_PACKAGE.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", RIVAL_PACKAGE], check=True)
        (folder / "ready").touch()
    return python


def in_process(python: Path, engine: str, model: Path, threads: int) -> dict[str, float]:
    command = [str(python), __file__, str(model), "--threads", str(threads), "--engine", engine]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=TIMEOUT_S)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


# ---- in each engine's own process ----


def measure(start: Callable[[Path, int], Generate], model: Path, threads: int) -> dict[str, float]:
    begin = time.perf_counter()
    generate = start(model, threads)
    generate(prompts(1, 8), 1)
    found = {"load_s": time.perf_counter() - begin}
    for tokens in PREFILLS:
        found[f"prefill_{tokens}_tokens_per_s"] = tokens / min(generate(prompts(1, tokens), 1) for _ in range(REPEATS))
    for name, count in (("decode", 1), ("streams", STREAMS)):
        first = min(generate(prompts(count, PROMPT), 1) for _ in range(REPEATS))
        whole = min(generate(prompts(count, PROMPT), 1 + NEW) for _ in range(REPEATS))
        if whole <= first:
            raise RuntimeError(
                f"{count} answers of {1 + NEW} tokens took no longer than of one: the machine is too busy"
            )
        found[f"{name}_tokens_per_s"] = count * NEW / (whole - first)
    return found


_made = iter(range(10**9))


def prompts(count: int, length: int) -> list[list[int]]:
    """No two alike, so that no engine finds one in its cache."""
    return [[1000 + (7919 * next(_made) + 31 * place) % 30000 for place in range(length)] for _ in range(count)]


def start_fastqwen(model: Path, threads: int) -> Generate:
    from fastqwen import LLM, SamplingParams

    llm = LLM(str(model), num_threads=threads, device="cpu", max_num_seqs=STREAMS, max_model_len=CONTEXT)

    def generate(ids: list[list[int]], new: int) -> float:
        begin = time.perf_counter()
        llm.generate(ids, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - begin

    return generate


def start_llama_cpp(model: Path, threads: int) -> Generate:
    import xllamacpp  # type: ignore[import-not-found]

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel, params.n_ctx = STREAMS, STREAMS * CONTEXT
    server, pool = xllamacpp.Server(params), ThreadPoolExecutor(STREAMS)

    def one(ids: list[int], new: int) -> None:
        wishes = {"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(wishes)
        told = answer if isinstance(answer, dict) else json.loads(answer)
        if told["usage"]["completion_tokens"] != new:
            raise RuntimeError(f"llama.cpp wrote {told['usage']['completion_tokens']} tokens of {new}")

    def generate(ids: list[list[int]], new: int) -> float:
        begin = time.perf_counter()
        list(pool.map(lambda prompt: one(prompt, new), ids))
        return time.perf_counter() - begin

    return generate


ENGINES: dict[str, Callable[[Path, int], Generate]] = {"fastqwen": start_fastqwen, "llama.cpp": start_llama_cpp}

if __name__ == "__main__":
    main()
