"""The gated delta rule in plain torch, as a recurrence and in chunks; both in float32. See Ops.gated_delta."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastqwen.kernels import DeltaParts, DeltaState
from fastqwen.kernels.limits import DELTA_CHUNK

LENGTH_EPS = 1e-6


def delta_of_row(projected: Tensor, slot: int, start: int, held: int, state: DeltaState, parts: DeltaParts) -> Tensor:
    """One row: projected [tokens, width] of positions from ``start`` on -> float32 [tokens, value_heads, value_dim], after
    the gated norm. ``held`` tokens are in the slot's state."""
    shape = parts.shape
    tokens = projected.shape[0]
    assert start == held or (tokens == 1 and start == held - 1), f"position {start} behind {held} tokens of state"
    mixed, z, b, a = projected[:, : shape.width].split(
        [shape.channels, shape.value_size, shape.num_value_heads, shape.num_value_heads], dim=-1
    )
    mixed = _convolved(mixed, slot, start, state, parts)
    q, k, v = mixed.split([shape.key_size, shape.key_size, shape.value_size], dim=-1)
    q = _unit(q.unflatten(1, (-1, shape.key_dim))) * shape.key_dim**-0.5
    k = _unit(k.unflatten(1, (-1, shape.key_dim)))
    q, k = (one.repeat_interleave(shape.group, dim=1).transpose(0, 1) for one in (q, k))  # [heads, tokens, key_dim]
    v = v.unflatten(1, (-1, shape.value_dim)).transpose(0, 1)
    fade = (parts.decay * functional.softplus(a.float() + parts.decay_bias)).t()  # logarithms, [heads, tokens]
    beta = torch.sigmoid(b.float()).t()
    before = state.memory[slot] if held else torch.zeros_like(state.memory[slot])
    if start < held:
        out = torch.einsum("htk,hkv->htv", q, before)
    else:
        rule = recurrent if tokens == 1 else chunked
        out, after = rule(q, k, v, fade, beta, before)
        state.memory[slot] = after
    return _gated_norm(out.transpose(0, 1), z.unflatten(1, (-1, shape.value_dim)), parts)


def recurrent(q: Tensor, k: Tensor, v: Tensor, fade: Tensor, beta: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Token after token: q, k [heads, tokens, key_dim], v [heads, tokens, value_dim], fade, beta [heads, tokens], memory
    [heads, key_dim, value_dim] -> outputs like v, and the memory afterwards"""
    out = torch.empty_like(v)
    for token in range(v.shape[1]):
        memory = memory * fade[:, token, None, None].exp()
        found = torch.einsum("hk,hkv->hv", k[:, token], memory)
        new = beta[:, token, None] * (v[:, token] - found)
        memory = memory + k[:, token, :, None] * new[:, None]
        out[:, token] = torch.einsum("hk,hkv->hv", q[:, token], memory)
    return out, memory


def chunked(q: Tensor, k: Tensor, v: Tensor, fade: Tensor, beta: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The same, chunk after chunk: what a chunk's tokens write depends on each other by a triangular system (section 3.2 of
    arXiv 2412.06464)."""
    out = torch.empty_like(v)
    for start in range(0, v.shape[1], DELTA_CHUNK):
        part = slice(start, start + DELTA_CHUNK)
        out[:, part], memory = _chunk(q[:, part], k[:, part], v[:, part], fade[:, part], beta[:, part], memory)
    return out, memory


def _chunk(q: Tensor, k: Tensor, v: Tensor, fade: Tensor, beta: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    # Of each token since the chunk's beginning; in float64, for differences of large sums are small.
    sums = fade.double().cumsum(-1)
    between = (sums[:, :, None] - sums[:, None, :]).float().tril().exp().tril()  # exp of what is above could overflow
    left, total = (sums[:, -1:] - sums).float(), sums.float()
    weighted = beta[..., None] * k
    system = (weighted @ k.transpose(1, 2) * between).tril(-1)
    right = torch.cat([beta[..., None] * v, weighted * total[..., None].exp()], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    new = values - keys @ memory
    out = (q * total[..., None].exp()) @ memory + (q @ k.transpose(1, 2) * between) @ new
    memory = memory * total[:, -1:, None].exp() + (k * left[..., None].exp()).transpose(1, 2) @ new
    return out, memory


def _convolved(mixed: Tensor, slot: int, start: int, state: DeltaState, parts: DeltaParts) -> Tensor:
    """mixed [tokens, channels] -> float32, after the causal convolution and SiLU; the ring gets the row's last inputs."""
    taps, tokens = parts.shape.taps, mixed.shape[0]
    ring = state.inputs[slot]
    earlier = torch.zeros((taps - 1, mixed.shape[1]), dtype=torch.float32, device=mixed.device)
    for back in range(1, min(taps, start + 1)):
        earlier[-back] = ring[(start - back) % taps].float()
    inputs = torch.cat([earlier, mixed.float()])
    for token in range(max(0, tokens - taps), tokens):
        ring[(start + token) % taps] = mixed[token]
    weight = parts.conv.float()
    total = inputs[:tokens] * weight[:, 0]
    for tap in range(1, taps):
        total += inputs[tap : tap + tokens] * weight[:, tap]
    return functional.silu(total)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)


def _gated_norm(out: Tensor, z: Tensor, parts: DeltaParts) -> Tensor:
    """out, z [tokens, heads, value_dim]"""
    scaled = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + parts.norm.eps)
    return scaled * parts.norm.weight * functional.silu(z.float())
