"""An engine's vector for the caller: cut to fewer dimensions if asked for, and always of length 1."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastqwen.records import RequestDelta


def vector_of(delta: RequestDelta, dimensions: int | None = None) -> NDArray[np.float32]:
    """The first ``dimensions`` of a request's vector, as models trained for it (Matryoshka) are used."""
    assert delta.embedding is not None
    vector = np.frombuffer(delta.embedding, dtype="<f4")
    if dimensions is None or dimensions >= len(vector):
        return vector
    part = vector[:dimensions]
    length = float(np.sqrt(np.square(part, dtype=np.float64).sum()))
    return (part / max(length, 1e-12)).astype(np.float32)
