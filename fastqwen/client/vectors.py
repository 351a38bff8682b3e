"""What an engine makes of a text that pools, for the caller: a vector of length 1, or probabilities of labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastqwen.model_config import Activation
from fastqwen.records import RequestDelta


def numbers_of(delta: RequestDelta) -> NDArray[np.float32]:
    """As the model makes them: [hidden size], or [labels]."""
    assert delta.embedding is not None
    return np.frombuffer(delta.embedding, dtype="<f4")


def vector_of(delta: RequestDelta, dimensions: int | None = None, *, normalize: bool = True) -> NDArray[np.float32]:
    """The first ``dimensions`` of a request's vector, as models trained for it (Matryoshka) are used."""
    vector = numbers_of(delta)[:dimensions]
    if not normalize:
        return vector
    length = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    return (vector / max(length, 1e-12)).astype(np.float32)


def of_each_token(
    delta: RequestDelta, num_tokens: int, dimensions: int | None, activation: Activation | None, *, activate: bool
) -> NDArray[Any]:
    """[tokens, dimensions or labels], each token's as ``vector_of`` or ``activated`` makes it; ``activation`` is a head's."""
    found = numbers_of(delta).reshape(num_tokens, -1)
    if activation is None:
        found = found[:, :dimensions]
        if not activate:
            return found
        lengths = np.sqrt(np.square(found, dtype=np.float64).sum(-1, keepdims=True))
        return np.asarray((found / np.maximum(lengths, 1e-12)).astype(np.float32))
    return np.stack([activated(one, activation) for one in found]).astype(np.float32) if activate else found


def activated(numbers: NDArray[np.float32], activation: Activation) -> NDArray[np.float64]:
    """A label's number each as probabilities: of one label among all, or of each on its own."""
    exact = numbers.astype(np.float64)
    if activation == "softmax":
        weights = np.exp(exact - exact.max())
        return np.asarray(weights / weights.sum())
    if activation == "sigmoid":
        return np.asarray(0.5 * (1.0 + np.tanh(0.5 * exact)))  # which cannot overflow
    return exact
