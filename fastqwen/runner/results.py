"""From what a step chose to the record that the engine commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from fastqwen.records import Failure, SampledRow, ScheduledBatch, StepOutput, TokenLogprobs

NOT_FINITE = Failure("not_finite", "the model computed values that are not finite numbers")


def step_output(
    batch: ScheduledBatch,
    tokens: Sequence[int],
    *,
    logprobs: Mapping[int, TokenLogprobs],
    prompt_logprobs: Mapping[int, list[TokenLogprobs]],
    errors: Mapping[int, Failure],
) -> StepOutput:
    """``tokens`` are one for each logits of the step, ``logprobs`` by their places; the others by the row's place."""
    rows = []
    ends = accumulate(row.num_logits for row in batch.rows)
    for index, (row, end) in enumerate(zip(batch.rows, ends, strict=True)):
        if index in errors:
            rows.append(SampledRow(request_id=row.request_id, error=errors[index]))
            continue
        places = range(end - row.num_logits, end)
        rows.append(
            SampledRow(
                request_id=row.request_id,
                token_ids=[tokens[place] for place in places],
                logprobs=[logprobs[place] for place in places] if logprobs and end - 1 in logprobs else None,
                prompt_logprobs=prompt_logprobs.get(index),
            )
        )
    return StepOutput(step_id=batch.step_id, rows=rows)
