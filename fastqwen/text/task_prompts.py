"""What an embedding model's makers put before texts of each kind: the prompts of config_sentence_transformers.json."""

from __future__ import annotations

from pathlib import Path

from fastqwen.errors import BadCheckpoint
from fastqwen.model_config import read_json

FILE_NAME = "config_sentence_transformers.json"
MAX_PROMPTS, MAX_PROMPT_CHARS = 256, 8192
COHERES = {"search_query": "query", "search_document": "document"}  # Cohere's clients send no others for a search


def read_task_prompts(path: Path) -> dict[str, str]:
    """By the kind's name; none for a model that has no such file. Raises BadCheckpoint."""
    file = path / FILE_NAME
    if not file.is_file():  # a GGUF file is no folder either
        return {}
    prompts = read_json(file).get("prompts") or {}
    if not isinstance(prompts, dict) or len(prompts) > MAX_PROMPTS:
        raise BadCheckpoint(f"{file}: prompts must be an object with at most {MAX_PROMPTS} texts")
    for name, text in prompts.items():
        if not isinstance(text, str) or len(text) > MAX_PROMPT_CHARS:
            raise BadCheckpoint(f"{file}: prompts.{name[:60]} must be a text of at most {MAX_PROMPT_CHARS} characters")
    return prompts


def kind_of(prompts: dict[str, str], input_type: str) -> str | None:
    """The prompts' own name for it, or what they have for Cohere's; None if neither is there."""
    return next((name for name in (input_type, COHERES.get(input_type)) if name in prompts), None)
