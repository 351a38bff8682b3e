"""The keys of a config.json that describe a sequence-classification head: a matrix ``score`` from the last token's hidden
state to a number for each label."""

from __future__ import annotations

from typing import Any

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import Activation, Classifier, Fields

CLASSIFIER = "ForSequenceClassification"
MAX_LABELS = 65536

# As transformers' loss functions understand them (loss/loss_utils.py, ForSequenceClassificationLoss).
OF_PROBLEM: dict[str, Activation] = {
    "regression": "none", "single_label_classification": "softmax", "multi_label_classification": "sigmoid",
}  # fmt: skip


def classifier_of(fields: Fields) -> Classifier | None:
    """None for a checkpoint without such a head. Raises BadCheckpoint, Unsupported."""
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not str((architectures or [""])[0]).endswith(CLASSIFIER):
        return None
    labels = _labels(fields)
    return Classifier(labels, _activation(fields, len(labels)))


def _labels(fields: Fields) -> tuple[str, ...]:
    """transformers writes two labels' names only where they are not its default ones."""
    given = fields.get("id2label")
    if given is None:
        count = fields.int("num_labels", default=2, high=MAX_LABELS)
        return tuple(f"LABEL_{index}" for index in range(count))
    if not isinstance(given, dict) or not 1 <= len(given) <= MAX_LABELS:
        raise BadCheckpoint(f"{fields.source}: id2label must be an object with 1 to {MAX_LABELS} labels")
    names = {str(key): str(name) for key, name in given.items()}
    if set(names) != {str(index) for index in range(len(names))}:
        raise BadCheckpoint(f"{fields.source}: id2label must name each of 0 to {len(names) - 1}")
    return tuple(names[str(index)] for index in range(len(names)))


def _activation(fields: Fields, num_labels: int) -> Activation:
    problem = fields.get("problem_type")
    if problem is not None:
        if problem not in OF_PROBLEM:
            raise Unsupported(
                f"{fields.source}: problem_type is {str(problem)[:60]!r}; supported: {', '.join(OF_PROBLEM)}"
            )
        # A softmax over one number is always 1.
        return "sigmoid" if OF_PROBLEM[problem] == "softmax" and num_labels == 1 else OF_PROBLEM[problem]
    told: Any = fields.get("sentence_transformers")
    named = told.get("activation_fn") if isinstance(told, dict) else fields.get("sbert_ce_default_activation_function")
    word = str(named or "").rpartition(".")[2]
    if word not in ("", "Identity", "Sigmoid", "Softmax"):
        raise Unsupported(f"{fields.source}: scores go through {word[:60]!r}; supported: Identity, Sigmoid, Softmax")
    if word == "Identity":
        return "none"
    return "sigmoid" if num_labels == 1 else "softmax"
