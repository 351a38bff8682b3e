"""From what a step chose to the record that the engine commits."""

from __future__ import annotations

from collections.abc import Mapping

from fastqwen.records import Failure, SampledRow, ScheduledBatch, StepOutput, TokenLogprobs

NOT_FINITE = Failure("not_finite", "the model computed values that are not finite numbers")


def step_output(
    batch: ScheduledBatch,
    tokens: list[int],
    *,
    logprobs: Mapping[int, TokenLogprobs],
    prompt_logprobs: Mapping[int, list[TokenLogprobs]],
    errors: Mapping[int, Failure],
) -> StepOutput:
    """``tokens`` are one for each logits of the step, ``logprobs`` by their places; the others by the row's place."""
    rows, end = [], 0
    for index, row in enumerate(batch.rows):
        start, end = end, end + row.num_logits
        if index in errors:
            rows.append(SampledRow(request_id=row.request_id, error=errors[index]))
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
