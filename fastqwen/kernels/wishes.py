"""What a request wishes of the sampler, as it lies in a device's memory: one line of words for each slot, so that a kernel
finds all of it behind one pointer, and a list of tokens whose logits are bent."""

from __future__ import annotations

import numpy as np

from fastqwen.kernels.limits import WISH_WORDS

_FIELDS = (
    ("seed", "<i8"),
    ("counts", "<i8"),  # address of int16 [vocab], where penalties depend on how often a token was said
    ("temperature", "<f4"),  # 0: greedy
    ("top_k", "<i4"),  # 0: no limit
    ("top_p", "<f4"),
    ("min_p", "<f4"),
    ("repetition_penalty", "<f4"),
    ("presence_penalty", "<f4"),
    ("frequency_penalty", "<f4"),
    ("bends", "<i4"),  # whether any of the others but the last changes logits
    ("num_biases", "<i4"),  # of the list's tokens, the first; the others must not come
    ("num_bent", "<i4"),  # tokens in the list
    ("least_end", "<i4"),  # before this position
    ("num_counted", "<i4"),  # tokens of the sequence that its counts know
    ("num_told", "<i4"),  # log-probabilities to tell beside the chosen token's; -1: not even that
)
WISHES = np.dtype(
    {"names": [name for name, _ in _FIELDS], "formats": [kind for _, kind in _FIELDS], "itemsize": 4 * WISH_WORDS},
    align=True,
)
COLUMN = {name: WISHES.fields[name][1] // 4 for name, _ in _FIELDS} if WISHES.fields is not None else {}
assert WISHES.itemsize == 4 * WISH_WORDS, "the planner counts so many"
IN_PROMPT = 0x8000  # a token's count, 16 bits: whether the prompt has it, and
MAX_COUNT = 0x7FFF  # how often the answer has; counted no further
