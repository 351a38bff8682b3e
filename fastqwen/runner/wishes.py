"""From a newcomer's wishes to what the device's sampler reads (kernels/wishes.py), and which wishes it does not know."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastqwen.kernels.limits import MAX_BENT, MAX_TOLD
from fastqwen.kernels.wishes import IN_PROMPT, MAX_COUNT, WISHES
from fastqwen.records import Admission, Sampling

Words = NDArray[np.int32]
MAX_POSITION = 2**31 - 1


def neutral_line() -> Words:
    """Greedy, and nothing else."""
    line = np.zeros((), dtype=WISHES)
    line["top_p"] = line["repetition_penalty"] = 1.0
    line["num_told"] = -1
    return line.reshape(1).view(np.int32)


def line_of(one: Admission, vocab_size: int, counts: int) -> Words:
    """``counts``: the address of the sequence's counts of tokens; 0: there are none."""
    line = np.zeros((), dtype=WISHES)
    sampling = one.sampling
    for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        line[name] = getattr(sampling, name)
    line["seed"], line["counts"] = one.seed, counts
    line["temperature"] = 0.0 if sampling.greedy else sampling.temperature
    line["top_k"] = min(max(0, sampling.top_k), vocab_size)
    line["num_biases"] = len(sampling.logit_bias or ())
    line["num_bent"] = line["num_biases"] + (len(one.stop_token_ids) if sampling.min_tokens else 0)
    line["least_end"] = min(one.num_prompt_tokens + sampling.min_tokens, MAX_POSITION)
    line["bends"] = sampling.needs_history or line["num_bent"] > 0
    line["num_counted"] = len(one.token_ids)
    line["num_told"] = sampling.logprobs if device_tells(sampling) else -1
    return line.reshape(1).view(np.int32)


def bent_of(one: Admission) -> Words:
    """Pairs of a token and what is added to its logit; behind the biases the tokens that must not come yet, and nothing."""
    biases = one.sampling.logit_bias or {}
    held = one.stop_token_ids if one.sampling.min_tokens else []
    pairs = np.zeros((len(biases) + len(held), 2), dtype=np.int32)
    pairs[:, 0] = [*biases, *held]
    pairs[: len(biases), 1] = np.array(list(biases.values()), dtype=np.float32).view(np.int32)
    assert len(pairs) <= MAX_BENT, f"{len(pairs)} bent tokens"
    return pairs.ravel()


def counts_of(one: Admission, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """The tokens that the sequence has, and of each what the device keeps."""
    ids = np.clip(np.array(one.token_ids, dtype=np.int64), 0, vocab_size - 1)
    known, first = np.unique(ids, return_index=True)
    said, times = np.unique(ids[one.num_prompt_tokens :], return_counts=True)
    counts = np.where(first < one.num_prompt_tokens, IN_PROMPT, 0)
    counts[np.searchsorted(known, said)] |= np.minimum(times, MAX_COUNT)
    return known, counts.astype(np.uint16).view(np.int16)


def device_tells(sampling: Sampling) -> bool:
    """Whether the device's sampler finds the log-probabilities that are asked for."""
    return sampling.logprobs is not None and 0 <= sampling.logprobs <= MAX_TOLD and not sampling.logprob_token_ids


def host_forbids(sampling: Sampling) -> bool:
    """Whether tokens must not come for reasons that the device's sampler does not know."""
    return sampling.allowed_token_ids is not None or bool(sampling.bad_word_ids)
