"""Part of vLLM's module layout: the names that its scripts import from here."""

from __future__ import annotations

from pathlib import Path

from fastqwen.text.load import read_template

__all__ = ["load_chat_template"]


def load_chat_template(chat_template: Path | str | None, *, is_literal: bool = False) -> str | None:
    """A template's text: of a file, or as it is. Raises BadConfig where there is no such file."""
    if chat_template is None or is_literal:
        return None if chat_template is None else str(chat_template)
    return read_template(str(chat_template))
