"""POST /classify: each label's probability, of a model with a sequence-classification head."""

from __future__ import annotations

from typing import Any

from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.pooling import Pooled, PoolingFields, listing


class ClassifyRequest(PoolingFields):
    """With ``use_activation`` false ``probs`` are the head's own numbers."""


async def classify(state: ServerState, body: ClassifyRequest) -> dict[str, Any]:
    work = Pooled(state, body, "classify", "classify")
    await work.prepare()
    classifier = state.facts().model.classifier
    assert classifier is not None, "prepare refuses a model without one"
    data = [
        {
            "index": index,
            "label": classifier.labels[int(numbers.argmax())],
            "probs": numbers.tolist(),
            "num_classes": len(numbers),
        }
        for index, numbers in enumerate(await work.run())
    ]
    return listing(work, data)
