"""Compiles what steps of a model launch on a GPU, on a machine without one.

``python -m tests.kernels.compile_for_gpu CAPABILITY [MODEL ...]``, 80 or 120: the runner's own code runs on tensors that have
shapes and no memory (torch's meta device), under a driver that names the GPU and launches nothing. So every size, constant and
tiling is the real one, and what the interpreter lets pass and the compiler does not (types that change in a loop, a size of 1,
which becomes a constant, more shared memory than there is) fails here. Run by test_compile.py in a process of its own, in
which Triton is not an interpreter. Prints a line of JSON for each kernel that was compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from fastqwen.build import build_decoder
from fastqwen.config import EngineConfig
from fastqwen.kernels.limits import shared_bytes, usual_block_size
from fastqwen.kernels.triton import launch
from fastqwen.model_config import ModelConfig
from fastqwen.models import parse_config, read_config
from fastqwen.plan import make_plan
from fastqwen.plan.facts import GIB, DeviceFacts
from fastqwen.records import Row
from fastqwen.runner.device import TORCH_DTYPES
from fastqwen.weights.source import Weights

CONFIGS = Path(__file__).parents[1] / "configs"
MULTIPROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}  # of a usual card of each capability
META = torch.device("meta")

PUBLISHED = ("qwen1-7b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "qwen3-14b", "qwen3-30b-a3b")
HYBRIDS = ("qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-35b-a3b")
ODD = {  # sizes of one, sizes that no block divides
    "model_type": "qwen2_moe", "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "vocab_size": 151,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 9000,
    "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 36, "shared_expert_intermediate_size": 44,
    "decoder_sparse_step": 2, "norm_topk_prob": False, "tie_word_embeddings": True,
}  # fmt: skip

DECODE_SIZES = (1, 2, 8, 64, 256)
PROMPT_SIZES = (16, 64, 512)
EAGER_STEPS = ((1, 17, 3000), (2500,))  # tokens of a step's rows


class NamesTarget(DriverBase):
    """No GPU, but what Triton asks of one to compile for it."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return META

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class ShapesOnly(Weights):
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device, self.num_bytes = dtype, META, 0

    def has(self, name: str) -> bool:
        return not name.endswith(".bias") or "q_proj" in name

    def is_same(self, name: str, other: str, shape: tuple[int, ...]) -> bool:
        return True

    def unread(self) -> list[str]:
        return []

    def tensor(self, name: str, shape: tuple[int, ...], **_: Any) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=META)


class Event:
    def record(self) -> None: ...


def stand_in(capability: int) -> dict[str, Any]:
    """Nothing is launched, everything is compiled. Returns what was, by name and the compiler's key."""
    found: dict[str, Any] = {}
    pair = divmod(capability, 10)
    card = launch.Card(pair, shared_bytes(pair), MULTIPROCESSORS[capability])
    launch.card_of = lambda device: card  # type: ignore[assignment]
    triton.runtime.driver.set_active(NamesTarget(capability))
    torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[assignment,method-assign]
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    original = JITFunction.run  # Gluon's kernels inherit it

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = original(kernel, *args, **{**kwargs, "warmup": True})
        found[compiled.hash] = compiled
        return compiled

    JITFunction.run = run  # type: ignore[method-assign]
    return found


def stack_bytes(cubin: bytes) -> int:
    """What each thread keeps in memory because registers do not hold it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(number) for number in re.findall(r"STACK:(\d+)", said))


def make_runner(model: ModelConfig, dtype: str, block_size: int, cache_dtype: str, capability: int) -> Any:
    from fastqwen.kernels.triton import streamed, streamed_attention, streamed_narrow, streamed_scalar
    from fastqwen.kernels.triton.ops import TritonOps
    from fastqwen.runner.cuda_runner import CudaRunner

    for module in (streamed, streamed_attention, streamed_narrow, streamed_scalar):
        module.try_out = lambda device: None  # type: ignore[assignment]  # it would look at numbers
    config = EngineConfig(
        model="meta", dtype=dtype, max_model_len=8192, block_size=block_size, kv_cache_dtype=cache_dtype  # type: ignore[arg-type]
    )  # fmt: skip
    facts = DeviceFacts(
        kind="cuda", name="", total_bytes=80 * GIB, free_bytes=80 * GIB,
        compute_capability=divmod(capability, 10), multiprocessors=MULTIPROCESSORS[capability],
    )  # fmt: skip
    plan = make_plan(model, config, facts)
    decoder = build_decoder(model, ShapesOnly(TORCH_DTYPES[dtype]), TritonOps(META))
    return CudaRunner(model, decoder, plan, META)


def compute_steps(runner: Any) -> None:
    decode, prompts = runner._layouts()
    for layout in (*decode, *prompts):
        if layout.tokens in (PROMPT_SIZES if layout.tiles else DECODE_SIZES):
            runner._recorded_step(layout)
    for counts in EAGER_STEPS:
        runner._launch([row(slot, count) for slot, count in enumerate(counts)])


def row(slot: int, count: int) -> Row:
    start = 40 if count == 1 else 0
    return Row(slot=slot, request_id="", start=start, num_tokens=count, new_blocks=(), num_logits=1)


def models(capability: int) -> Iterator[tuple[str, ModelConfig, str, int, str]]:
    """Name, model, dtype, block size, type of the cache. One layer of each kind: the others have the same shapes."""
    half = "bfloat16" if capability >= 80 else "float16"
    widest = 256 if capability >= 80 else 128
    usual = usual_block_size(divmod(capability, 10), 64)
    for name in PUBLISHED:
        model = read_config(CONFIGS / name)
        yield name, msgspec.structs.replace(model, num_layers=1), half, usual, "auto"
    for name in HYBRIDS if capability >= 80 else ():
        model = read_config(CONFIGS / name)
        assert model.delta is not None
        delta = msgspec.structs.replace(model.delta, layers=(0,))
        yield name, msgspec.structs.replace(model, num_layers=2, delta=delta), half, usual, "auto"
    for name, cache_dtype in (("qwen3-8b", "int8"), ("qwen3-8b", "fp8"), ("qwen1-7b", "int8")):
        model = msgspec.structs.replace(read_config(CONFIGS / name), num_layers=1)
        yield f"{name}-{cache_dtype}-cache", model, half, usual, cache_dtype
    small = msgspec.structs.replace(read_config(CONFIGS / "qwen3-0.6b"), num_layers=1)
    yield "large-blocks", small, half, 256 if capability >= 80 else 16, "auto"
    yield (
        "partly-rotated",
        msgspec.structs.replace(small, head_dim=widest, rotated=64),
        half,
        usual,
        "auto",
    )
    yield (
        "wide-float32",
        msgspec.structs.replace(small, head_dim=widest),
        "float32",
        64 if capability >= 80 else 16,
        "auto",
    )
    odd = parse_config(ODD, "odd")
    for dtype in ("float32", "float16"):
        yield f"odd-{dtype}", odd, dtype, 16, "auto"


def main() -> None:
    capability, names = int(sys.argv[1]), sys.argv[2:]
    index, count = map(int, names.pop().split("/")) if names and "/" in names[-1] else (0, 1)  # 0/2: every second one
    found = stand_in(capability)
    for place, (name, model, dtype, block_size, cache_dtype) in enumerate(models(capability)):
        if (names and name not in names) or place % count != index:
            continue
        before = set(found)
        with torch.inference_mode():
            compute_steps(make_runner(model, dtype, block_size, cache_dtype, capability))
        for key in found.keys() - before:
            asked = found[key].metadata.shared
            fits = asked <= shared_bytes(divmod(capability, 10))
            line = {"model": name, "kernel": found[key].metadata.name, "shared_bytes": asked, "fits": fits}
            line["stack_bytes"] = stack_bytes(found[key].asm["cubin"])
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
