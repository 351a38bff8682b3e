"""The planner: from a model's sizes, the user's wishes and a device's facts to what the engine will be given.

The same code answers on paper and at start. Nothing here imports torch.
"""

from __future__ import annotations

import msgspec

from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, DoesNotFit
from fastqwen.model_config import ModelConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_KV_BYTES = 4 * 2**30
MIN_BF16_CAPABILITY = (8, 0)
GIB = 2**30


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a device, or read from a data sheet."""

    kind: str  # cpu or cuda
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None


class EnginePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the device and the model allow. Nobody changes it afterwards."""

    dtype: str
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weights_bytes: int
    kv_bytes_per_token: int
    notices: tuple[str, ...] = ()

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token


def choose_dtype(wished: str, model: ModelConfig, facts: DeviceFacts) -> tuple[str, list[str]]:
    """``auto`` is bfloat16 where the device computes it, else float16, and says so. Raises BadConfig."""
    has_bf16 = facts.kind == "cpu" or (facts.compute_capability or (0, 0)) >= MIN_BF16_CAPABILITY
    if wished == "bfloat16" and not has_bf16:
        major, minor = facts.compute_capability or (0, 0)
        raise BadConfig(
            f"{facts.name} has compute capability {major}.{minor}, bfloat16 needs 8.0 or more: use --dtype float16"
        )
    if wished != "auto":
        return wished, []
    if model.dtype == "float32" and facts.kind == "cpu":
        return "float32", []
    if model.quantization is not None and facts.kind == "cuda":
        return "float16", []
    if has_bf16:
        return "bfloat16", []
    return "float16", [f"{facts.name} does not compute in bfloat16, so float16 is used"]


def kv_bytes_per_token(model: ModelConfig, dtype: str) -> int:
    return 2 * model.num_layers * model.kv_size * DTYPE_BYTES[dtype]


def weights_bytes(model: ModelConfig, dtype: str) -> int:
    """Parameters times their size. GPTQ packs all linears but the head; routed experts are unpacked while loading."""
    attention = model.hidden_size * (2 * model.q_size + 2 * model.kv_size)
    dense = 3 * model.hidden_size * model.intermediate_size * model.num_dense_layers
    sparse = 0
    if model.moe is not None:
        per_layer = model.moe.num_experts * model.moe.expert_size + model.moe.shared_size
        sparse = 3 * model.hidden_size * per_layer * (model.num_layers - model.num_dense_layers)
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    linears = attention * model.num_layers + dense
    return int(linears * _bytes_per_weight(model, dtype) + (sparse + tables) * DTYPE_BYTES[dtype])


def _bytes_per_weight(model: ModelConfig, dtype: str) -> float:
    """A code of some bits, and for each group of inputs a scale and a zero of 16 bits."""
    quantization = model.quantization or {}
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    if not isinstance(bits, int) or not isinstance(group_size, int):
        return DTYPE_BYTES[dtype]
    return bits / 8 + (4 / group_size if group_size > 0 else 0)


def make_plan(
    model: ModelConfig, config: EngineConfig, facts: DeviceFacts, *, available_kv_bytes: int | None = None
) -> EnginePlan:
    """``available_kv_bytes`` is what a GPU has left once weights and the largest step were measured.

    Raises DoesNotFit if not even one sequence of the wished length has room, BadConfig for a length that the model
    cannot have.
    """
    dtype, notices = choose_dtype(config.dtype, model, facts)
    if config.rope_per_request and model.rope.kind not in ("yarn", "qwen1_ntk"):
        raise BadConfig(f"--rope-per-request: the config.json of {config.model} asks for no YaRN scaling")
    on_cpu = facts.kind == "cpu"
    block_size = config.block_size or (16 if on_cpu else 64)
    max_num_seqs = config.max_num_seqs or (64 if on_cpu else 256)
    per_token = kv_bytes_per_token(model, dtype)
    wished_len = config.max_model_len or model.default_max_len
    if wished_len > model.default_max_len:
        raise BadConfig(
            f"--max-model-len is {wished_len}, but {config.model} was made for at most {model.default_max_len} tokens"
        )
    kv_bytes = config.kv_cache_memory_bytes or available_kv_bytes
    if kv_bytes is None:
        kv_bytes = max(0, min(CPU_KV_BYTES, (facts.free_bytes - weights_bytes(model, dtype)) // 2))
    num_blocks = min(kv_bytes // (per_token * block_size), max_num_seqs * -(-wished_len // block_size))
    room = num_blocks * block_size
    if room < wished_len:
        if config.max_model_len is not None or room < 2 * block_size:
            raise DoesNotFit(
                f"one sequence of {wished_len} tokens needs {wished_len * per_token / GIB:.2f} GiB of KV cache, "
                f"{kv_bytes / GIB:.2f} GiB are free: use --max-model-len {max(room, 0)} or less"
            )
        notices.append(f"the KV cache holds {room} tokens, so the longest sequence is {room}, not {wished_len}")
    return EnginePlan(
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=min(wished_len, room),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or (512 if on_cpu else 8192),
        weights_bytes=weights_bytes(model, dtype),
        kv_bytes_per_token=per_token,
        notices=tuple(notices),
    )
