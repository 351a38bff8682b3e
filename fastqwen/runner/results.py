"""From what a step chose to the record that the engine commits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from fastqwen.records import Failure, SampledRow, ScheduledBatch, StepOutput, TokenLogprobs

NOT_FINITE = Failure(
    "not_finite",
    "the model computed values that are not finite numbers; in float16, whose largest is 65504, some models do: the server can "
    "use --dtype bfloat16 or float32",
)
NOT_CHOSEN = Failure("sampling", "choosing this request's next token failed; the server's log says why")

log = logging.getLogger("fastqwen.engine")


@contextmanager
def only_this_row(row: int, errors: dict[int, Failure]) -> Iterator[None]:
    """Whatever goes wrong inside ends the row's request, and no other: it is added to ``errors``."""
    try:
        yield
    except Exception:
        log.exception("choosing a token failed; its request ends, the others go on")
        errors.setdefault(row, NOT_CHOSEN)


def step_output(
    batch: ScheduledBatch,
    tokens: list[int],
    *,
    logprobs: Mapping[int, TokenLogprobs],
    prompt_logprobs: Mapping[int, list[TokenLogprobs]],
    errors: Mapping[int, Failure],
    late: Collection[int] = (),
) -> StepOutput:
    """``tokens`` are one for each logits of the step, ``logprobs`` by their places; the others by the row's place."""
    rows, end = [], 0
    for index, row in enumerate(batch.rows):
        start, end = end, end + row.num_logits
        if index in errors:
            rows.append(SampledRow(request_id=row.request_id, error=errors[index]))
            continue
        if index in late:
            told = prompt_logprobs.get(index)
            rows.append(SampledRow(request_id=row.request_id, prompt_logprobs=told, stepped_aside=True))
            continue
        rows.append(
            SampledRow(
                request_id=row.request_id,
                token_ids=tokens[start:end],
                logprobs=[logprobs[place] for place in range(start, end)] if start in logprobs else None,
                prompt_logprobs=prompt_logprobs.get(index),
            )
        )
    return StepOutput(step_id=batch.step_id, rows=rows)
