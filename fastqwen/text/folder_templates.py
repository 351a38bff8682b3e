"""The chat templates of a checkpoint's folder: which there are, and which one a request gets, as in transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from fastqwen.errors import BadCheckpoint
from fastqwen.text_files import read_text

log = logging.getLogger(__name__)

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
DEFAULT, WITH_TOOLS = "default", "tool_use"


class Templates(NamedTuple):
    default: str | None
    with_tools: str | None  # for requests that bring tools; None: the default one
    origin: str


def folder_templates(folder: Path, words: dict[str, Any]) -> Templates:
    """``words`` is what the tokenizer's configuration says. Files of their own go before what it holds.

    Raises BadCheckpoint where there are several and none is for chats without tools.
    """
    named, origin = _from_files(folder)
    if not named:
        named, origin = _from_configuration(words), str(folder / "tokenizer_config.json")
    if not named:
        return Templates(None, None, "")
    if DEFAULT not in named:
        raise BadCheckpoint(
            f"{origin} has chat templates named {', '.join(sorted(named))[:200]}, but none named {DEFAULT}: "
            "name one with --chat-template"
        )
    unused = sorted(named.keys() - {DEFAULT, WITH_TOOLS})
    if unused:
        log.warning("%s: the chat templates %s are not used", origin, ", ".join(unused))
    return Templates(named[DEFAULT], named.get(WITH_TOOLS), origin)


def _from_files(folder: Path) -> tuple[dict[str, str], str]:
    files = sorted((folder / FOLDER).glob("*.jinja")) if (folder / FOLDER).is_dir() else []
    named = {file.stem: read_text(file) for file in files}
    path = folder / FILE
    if path.is_file():
        named[DEFAULT] = read_text(path)
    return named, str(path if path.is_file() or not files else folder / FOLDER)


def _from_configuration(words: dict[str, Any]) -> dict[str, str]:
    found = words.get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    items = found if isinstance(found, list) else []
    if isinstance(found, dict):
        items = [{"name": name, "template": template} for name, template in found.items()]
    pairs = [(one.get("name"), one.get("template")) for one in items if isinstance(one, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
