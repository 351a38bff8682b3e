"""Whole numbers of 2, 3, 4 or 8 bits in 32-bit words, the first in the lowest bits; of 3 bits, 32 lie in three words."""

from __future__ import annotations

import torch
from torch import Tensor


def numbers_of_unit(bits: int) -> int:
    """The fewest numbers that fill whole words."""
    return 32 if bits == 3 else 32 // bits


def words_of_unit(bits: int) -> int:
    return numbers_of_unit(bits) * bits // 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [words, n] -> int32 [numbers, n], along the first dimension"""
    top = 2**bits - 1
    units = words.unflatten(0, (-1, words_of_unit(bits)))
    found = []
    for number in range(numbers_of_unit(bits)):
        word, shift = divmod(number * bits, 32)
        value = units[:, word] >> shift
        if shift + bits > 32:  # its last bits begin the next word
            low = 32 - shift
            value = (value & (2**low - 1)) | (units[:, word + 1] << low)
        found.append(value & top)
    return torch.stack(found, dim=1).flatten(0, 1)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """The other way, for sizes that share words evenly."""
    shares = numbers.unflatten(0, (-1, 32 // bits))
    words = torch.zeros_like(shares[:, 0], dtype=torch.int32)
    for place in range(32 // bits):
        words |= shares[:, place].to(torch.int32) << (bits * place)
    return words
