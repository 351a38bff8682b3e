"""How many tokens a step may have on a GPU: what it computes in a time that people bear. Shorter steps on slower cards."""

from __future__ import annotations

from fastqwen.kernels.limits import MAX_RECORDED_TOKENS, TILE_TOKENS
from fastqwen.plan.facts import DeviceFacts
from fastqwen.plan.generations import generation_of

STREAM_PAUSE_S = 0.05  # how long running streams may pause for prompts that came later
STEP_S = 1.0  # how long the longest step may take: so long a request that comes next waits, and an abort
USUAL_TFLOPS = 200.0  # of a GPU whose data sheet is not known
MIXED_STEP = 256  # numbers of tokens from here on are multiples of it; less are of TILE_TOKENS
MOST_STEP_TOKENS = 8192
LEAST_STEP_TOKENS = 512


def mixed_tokens(active_parameters: int, facts: DeviceFacts) -> int:
    """Of a step in which prompts are computed beside running streams: what takes STREAM_PAUSE_S, and is recorded."""
    tokens = int(STREAM_PAUSE_S * _tokens_per_s(active_parameters, facts))
    size = MIXED_STEP if tokens >= MIXED_STEP else TILE_TOKENS
    return min(MAX_RECORDED_TOKENS, max(TILE_TOKENS, tokens // size * size))


def step_tokens(active_parameters: int, facts: DeviceFacts) -> int:
    """Of any step, where nobody asked for a number (``--max-num-batched-tokens``): what takes STEP_S."""
    if generation_of(facts.compute_capability).is_torch_only:
        return LEAST_STEP_TOKENS  # its attention holds the scores of all of a step's tokens
    tokens = int(STEP_S * _tokens_per_s(active_parameters, facts))
    return min(MOST_STEP_TOKENS, max(LEAST_STEP_TOKENS, tokens // LEAST_STEP_TOKENS * LEAST_STEP_TOKENS))


def _tokens_per_s(active_parameters: int, facts: DeviceFacts) -> float:
    """Of prompts: each parameter is a product and a sum for each token."""
    rate = (facts.matmul_tflops or USUAL_TFLOPS) * 1e12 * generation_of(facts.compute_capability).compute
    return rate / (2 * active_parameters)
