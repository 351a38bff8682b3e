"""How much GPU memory is left for the KV cache: measured with the largest step that the engine may schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastqwen.config import EngineConfig
from fastqwen.kernels import PromptTiles, StateRoom, StepTokens
from fastqwen.kernels.limits import TILE_TOKENS
from fastqwen.layers.decoder import Decoder
from fastqwen.model_config import ModelConfig
from fastqwen.plan import EnginePlan
from fastqwen.runner.device import CACHE_DTYPES
from fastqwen.runner.step_layout import cut_tiles

GRAPH_RESERVE_BYTES = 512 * 2**20  # graphs are captured after the cache was made; the planner's estimate, rounded up


@dataclass(frozen=True)
class Room:
    """``kv_bytes`` are left for the cache; ``step_bytes`` of the rest are free between steps only."""

    kv_bytes: int
    step_bytes: int


@torch.inference_mode()
def measure_room(
    model: ModelConfig, config: EngineConfig, plan: EnginePlan, decoder: Decoder, device: torch.device
) -> Room:
    """Bytes within ``gpu_memory_utilization`` that neither weights, nor other programs, nor the largest step need."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info(device)
    torch.cuda.reset_peak_memory_stats(device)
    allocated = torch.cuda.memory_allocated(device)
    _largest_step(model, plan, decoder, device)
    torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_allocated(device) - allocated
    used = total - free_before
    graphs = 0 if config.enforce_eager else GRAPH_RESERVE_BYTES
    torch.cuda.empty_cache()
    return Room(int(total * config.gpu_memory_utilization) - used - step_bytes - graphs, step_bytes)


def _largest_step(model: ModelConfig, plan: EnginePlan, decoder: Decoder, device: torch.device) -> None:
    """A prompt of max_num_batched_tokens, all in one block, and logits for max_num_seqs rows."""
    tokens = plan.max_num_batched_tokens
    room = StateRoom(2, plan.block_size, 1, CACHE_DTYPES[plan.kv_cache_dtype], device)
    zeros = torch.zeros(tokens, dtype=torch.int32, device=device)
    tiles, fresh = cut_tiles([(0, 0, tokens)], 0, library=getattr(decoder.ops, "library_prefill", False))
    step = StepTokens(
        positions=torch.arange(tokens, dtype=torch.int32, device=device),
        slots=zeros,
        row_starts=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        cos_sin=torch.zeros((tokens, model.rotary_dim), device=device),
        q_scale=None if model.logn_len is None else torch.ones(tokens, device=device),
        block_tables=torch.zeros((1, tokens // plan.block_size + 2), dtype=torch.int32, device=device),
        num_decode_rows=0,
        prompts=PromptTiles(torch.from_numpy(tiles).to(device), TILE_TOKENS, fresh),
        held=zeros[:1],
    )
    residual = decoder.embed(zeros, decoder.ops)
    for layer in decoder.layers:  # one layer's state at a time, which is not what is measured here
        layer.mixer.add_to(residual, step, layer.mixer.make_state(room))
        layer.feed_forward.add_to(residual, step)
    decoder.logits(residual[: min(tokens, plan.max_num_seqs)]).float()
