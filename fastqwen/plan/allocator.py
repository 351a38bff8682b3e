"""What torch's caching allocator takes of a GPU for a sequence of tensors: it keeps what was freed, and never moves anything.

Its rules (c10/cuda/CUDACachingAllocator, default settings): tensors of more than 1 MiB come from segments of their own pool; a
segment is 20 MiB for a tensor below 10 MiB, else the tensor rounded up to 2 MiB. A free piece is taken if it is large enough,
the smallest such first, and cut if more than 1 MiB would be left over; neighbours that are free join again.
"""

from __future__ import annotations

from math import ceil

from fastqwen.plan.facts import MIB

ALIGN_BYTES = 512
SMALL_BYTES = MIB  # up to here tensors share segments of 2 MiB
SHARED_SEGMENT_BYTES = 20 * MIB
LEAST_OWN_SEGMENT_BYTES = 10 * MIB
SEGMENT_STEP_BYTES = 2 * MIB


def segment_bytes(size: int) -> int:
    """Of a new segment for a tensor of this size."""
    if size <= SMALL_BYTES:
        return SEGMENT_STEP_BYTES
    if size < LEAST_OWN_SEGMENT_BYTES:
        return SHARED_SEGMENT_BYTES
    return ceil(size / SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES


def rounded_up_bytes(size: int) -> int:
    """What a tensor that stays takes: one with a segment of its own wastes its end, others are packed."""
    return segment_bytes(size) if size >= LEAST_OWN_SEGMENT_BYTES else size


class _Piece:
    """Of a segment, in order: ``before`` and ``after`` are its neighbours there."""

    __slots__ = ("after", "before", "is_free", "size", "small")

    def __init__(self, size: int, small: bool) -> None:
        self.size = size
        self.small = small
        self.is_free = True
        self.before: _Piece | None = None
        self.after: _Piece | None = None


class Allocator:
    """Tensors have names; a name that is taken again replaces the tensor once the new one exists."""

    def __init__(self) -> None:
        self.reserved = 0
        self.allocated = 0
        self.most_allocated = 0
        self._free: list[_Piece] = []
        self._taken: dict[str, tuple[_Piece, int]] = {}

    def take(self, name: str, size: int) -> None:
        size = max(1, ceil(size / ALIGN_BYTES)) * ALIGN_BYTES
        small = size <= SMALL_BYTES
        fitting = [piece for piece in self._free if piece.small == small and piece.size >= size]
        piece = min(fitting, key=lambda one: one.size) if fitting else self._segment(size, small)
        self._cut(piece, size)
        piece.is_free = False
        self._free.remove(piece)
        self.allocated += size
        self.most_allocated = max(self.most_allocated, self.allocated)
        if name in self._taken:
            self.drop(name)
        self._taken[name] = piece, size

    def drop(self, *names: str) -> None:
        for name in names:
            piece, size = self._taken.pop(name)
            self.allocated -= size
            piece.is_free = True
            self._free.append(piece)
            if piece.after is not None and piece.after.is_free:
                self._join(piece, piece.after)
            if piece.before is not None and piece.before.is_free:
                self._join(piece.before, piece)

    def _segment(self, size: int, small: bool) -> _Piece:
        piece = _Piece(segment_bytes(size), small)
        self.reserved += piece.size
        self._free.append(piece)
        return piece

    def _cut(self, piece: _Piece, size: int) -> None:
        left = piece.size - size
        if left >= (ALIGN_BYTES if piece.small else SMALL_BYTES + 1):
            rest = _Piece(left, piece.small)
            rest.before, rest.after = piece, piece.after
            if piece.after is not None:
                piece.after.before = rest
            piece.after, piece.size = rest, size
            self._free.append(rest)

    def _join(self, first: _Piece, second: _Piece) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        self._free.remove(second)
