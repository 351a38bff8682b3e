"""Rows that end in a vector: the last token's hidden state after the final norm, or a number for each of a classifier's labels;
and rows of which each token gives one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from fastqwen.engine.executor import StepHandle
from fastqwen.layers.decoder import Decoder
from fastqwen.records import Row, SampledRow, StepOutput
from fastqwen.runner.results import NOT_FINITE


def last_vectors(decoder: Decoder, rows: list[Row], hidden: Tensor | None) -> Tensor | None:
    """float32 [tokens that pool, hidden size] on the host, on its way there without waiting; None if no row pools.

    ``hidden`` [tokens, hidden size] are all of the step's tokens, row after row, before the final norm.
    """
    if not any(row.pools or row.pools_all for row in rows):
        return None
    ends = itertools.accumulate(row.num_tokens for row in rows)
    places = [place for end, row in zip(ends, rows, strict=True) for place in range(end - _num_vectors(row), end)]
    assert hidden is not None, "a step with such a row keeps its hidden states"
    picked = hidden[torch.tensor(places, device=hidden.device)]
    return decoder.final(picked).float().to("cpu", non_blocking=True)


def _num_vectors(row: Row) -> int:
    return row.num_tokens if row.pools_all else int(row.pools)


class PooledStep:
    """A step some of whose rows pool. Once the step's own result is there, so are the vectors launched before it."""

    def __init__(self, step: StepHandle, rows: list[Row], vectors: Tensor, classifier: Tensor | None = None) -> None:
        """``classifier`` float32 [labels, hidden size], on the host."""
        self._step = step
        self._rows = rows
        self._vectors = vectors
        self._classifier = None if classifier is None else classifier.double().numpy()

    @property
    def late(self) -> Sequence[str]:
        return self._step.late

    def result(self) -> StepOutput:
        output = self._step.result()
        counts = [_num_vectors(row) for row in self._rows]
        parts = np.split(self._vectors.numpy(), np.cumsum(counts)[:-1])
        rows = [
            _with_vectors(found, part, self._classifier) if len(part) else found
            for found, part in zip(output.rows, parts, strict=True)
        ]
        return StepOutput(step_id=output.step_id, rows=rows)


def _with_vectors(row: SampledRow, vectors: np.ndarray, classifier: np.ndarray | None) -> SampledRow:
    """vectors [tokens, hidden size]"""
    if row.error is not None:
        return row
    if classifier is not None:  # one vector at a time, so that its bits depend on nothing else in the batch
        vectors = np.stack([classifier @ vector for vector in vectors])
    if not np.isfinite(vectors).all():
        return msgspec.structs.replace(row, error=NOT_FINITE)
    return msgspec.structs.replace(row, embedding=vectors.astype("<f4").tobytes())
