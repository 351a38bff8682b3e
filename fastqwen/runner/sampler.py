"""From logits to tokens. Each row is sampled as if it were alone: noise is a hash of (seed, position, token)."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from fastqwen.records import Sampling, TokenLogprobs

# Finite, because an infinite logit means that the model has failed, and still finite over the least temperature.
FORBIDDEN = -1e30
_MASK32 = 0xFFFFFFFF
_TOP_CANDIDATES = 1024


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    params: list[Sampling],
) -> Tensor:
    """logits float32 [rows, vocab], the other tensors [rows] -> token ids int64 [rows]

    A row of temperature 0 takes the largest logit, the lowest id among equals. ``params`` say the same on the
    host; they only decide which steps can be left out.
    """
    if all(one.greedy for one in params):
        return logits.argmax(-1)
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    if any(one.top_k > 0 or one.top_p < 1.0 for one in params if not one.greedy):
        scaled = _cut_top(scaled, top_k, top_p, params)
    if any(one.min_p > 0.0 for one in params if not one.greedy):
        least = scaled.amax(-1, keepdim=True) + torch.log(min_p)[:, None]
        scaled = scaled.masked_fill(scaled < least, float("-inf"))
    noisy = scaled + gumbel(seed, position, logits.shape[-1])
    return torch.where((temperature > 0)[:, None], noisy, logits).argmax(-1)


def _cut_top(scaled: Tensor, top_k: Tensor, top_p: Tensor, params: list[Sampling]) -> Tensor:
    """Keep each row's top_k largest, of these the fewest that have top_p of the mass. Equal logits stay together."""
    vocab = scaled.shape[-1]
    top_k = torch.where(top_k < vocab, top_k, 0)
    drawn = [one for one in params if not one.greedy]
    limits = [one.top_k for one in drawn if 0 < one.top_k < vocab]
    unlimited = any(one.top_p < 1.0 and not 0 < one.top_k < vocab for one in drawn)
    count = min(vocab, max([*limits, _TOP_CANDIDATES if unlimited else 1]))
    best, mass = _candidates(scaled, top_k, count)
    if unlimited and count < vocab and bool(((top_k <= 0) & (top_p < 1.0) & (mass[:, -1] < top_p)).any()):
        best, mass = _candidates(scaled, top_k, vocab)  # a flat distribution: look at all of it
    share = torch.where(top_p < 1.0, top_p, float("inf"))  # sums of nearly all of the mass may round to 1
    keep = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1) < share[:, None]
    keep &= best > float("-inf")
    keep[:, 0] = True  # the largest is always left, also of a row whose logits are not finite
    last = keep.sum(-1, keepdim=True) - 1
    least = torch.where(((top_k > 0) | (top_p < 1.0))[:, None], best.gather(-1, last), float("-inf"))
    return scaled.masked_fill(scaled < least, float("-inf"))


def _candidates(scaled: Tensor, top_k: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest logits in order, those past a row's own top_k at -inf, and the mass up to each.

    Sums are taken in ways whose bits depend neither on the other rows nor on ``count``, which comes from them: logsumexp
    splits a single row over threads, log_softmax never does.
    """
    best = scaled.topk(count, dim=-1).values
    limit = torch.where(top_k > 0, top_k, scaled.shape[-1])[:, None]
    beyond = torch.arange(count, device=scaled.device) >= limit
    total = best[:, :1] - scaled.log_softmax(-1).amax(-1, keepdim=True)
    best = best.masked_fill(beyond, float("-inf"))
    mass = (best - total).exp().cumsum(-1)
    return best, torch.where((top_k > 0)[:, None], mass / mass[:, -1:], mass)


def gumbel(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, float32 [rows, vocab], from int64 seed and position [rows].

    argmax(logits + noise) is a draw from softmax(logits) (Gumbel 1954). The hash is two rounds of MurmurHash3's
    32-bit finaliser, the same on every device.
    """
    low = _mix32(seed & _MASK32)
    high = _mix32(((seed >> 32) & _MASK32) ^ low)
    key = _mix32(high ^ (position.long() * 0x9E3779B1 & _MASK32))
    # In place and in 32 bits, of which products keep the lowest: eight times as fast on a CPU as it is written above.
    tokens = torch.arange(vocab, dtype=torch.int32, device=seed.device) * _signed(0x85EBCA77)
    bits = _mix32_in_place(tokens[None, :] ^ key.to(torch.int32)[:, None])
    bits = _mix32_in_place(bits.add_(low.to(torch.int32)[:, None]))
    # 24 bits: exact in float32, never 0 or 1
    uniform = bits.bitwise_right_shift_(9).bitwise_and_(_MASK32 >> 9).float().add_(0.5).mul_(2.0**-23)
    return uniform.log_().neg_().log_().neg_()


def _mix32(x: Tensor) -> Tensor:
    """int64"""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK32
    return x ^ (x >> 16)


def _mix32_in_place(x: Tensor) -> Tensor:
    """int32: its shifts bring the sign in, which is taken out again."""
    x.bitwise_xor_((x >> 16).bitwise_and_(_MASK32 >> 16)).mul_(_signed(0x85EBCA6B))
    x.bitwise_xor_((x >> 13).bitwise_and_(_MASK32 >> 13)).mul_(_signed(0xC2B2AE35))
    return x.bitwise_xor_((x >> 16).bitwise_and_(_MASK32 >> 16))


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def penalize(logits: Tensor, token_ids: Tensor, num_prompt: Tensor, num_known: Tensor, params: list[Sampling]) -> None:
    """Repetition, presence and frequency penalties, in place.

    logits [rows, vocab]; token_ids [rows, length] known tokens, the prompt's first; num_prompt, num_known [rows].
    Repetition looks at prompt and output (as Qwen's and Hugging Face's code does), the other two at the output.
    """
    rows, vocab = logits.shape
    index = torch.arange(token_ids.shape[1], device=logits.device)[None, :]
    known = index < num_known[:, None]
    output = known & (index >= num_prompt[:, None])
    ids = token_ids.long().clamp(0, vocab - 1)
    seen = torch.zeros((rows, vocab), device=logits.device).scatter_add_(1, ids, known.float()) > 0
    counts = torch.zeros((rows, vocab), device=logits.device).scatter_add_(1, ids, output.float())

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(one, name) for one in params], device=logits.device)[:, None]

    repetition = column("repetition_penalty")
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits.copy_(torch.where(seen, repeated.clamp(FORBIDDEN, -FORBIDDEN), logits))  # a small penalty must not give inf
    logits -= column("frequency_penalty") * counts + column("presence_penalty") * (counts > 0)


def top_logprobs(
    logits: Tensor, chosen: Tensor, counts: list[int], asked: dict[int, list[int]] | None = None
) -> list[TokenLogprobs]:
    """Log-probabilities of the model's own distribution, before temperature, penalties and cuts.

    logits [rows, vocab], chosen int64 [rows]; row r reports counts[r] alternatives, or the tokens of asked[r].
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    picked = logprobs.gather(-1, chosen[:, None])
    ranks = (logprobs > picked).sum(-1) + 1
    top = logprobs.topk(min(max(1, *counts), logits.shape[-1]), dim=-1)
    found = [
        TokenLogprobs(token, logprob, rank, ids[:count], values[:count])
        for token, logprob, rank, ids, values, count in zip(
            chosen.tolist(),
            picked[:, 0].tolist(),
            ranks.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            counts,
            strict=True,
        )
    ]
    for row, ids in (asked or {}).items():
        values = logprobs[row, torch.tensor(ids, device=logits.device)]
        above = (logprobs[row] > values[:, None]).sum(-1) + 1
        found[row] = msgspec.structs.replace(
            found[row], top_ids=ids, top_logprobs=values.tolist(), top_ranks=above.tolist()
        )
    return found
