"""The chat templates of a checkpoint's folder: which there are, and which one a request gets, as in transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

from fastqwen.errors import BadCheckpoint
from fastqwen.model_config import short
from fastqwen.text_files import read_text

log = logging.getLogger(__name__)

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
OF_PROCESSORS = "chat_template.json"  # of models that see or hear; no tokenizer reads it
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
        origin = str(folder / "tokenizer_config.json")
        named = _from_configuration(words, origin)
    named = {name: text for name, text in named.items() if _writes(text, name, origin)}
    if not named:
        if (folder / OF_PROCESSORS).is_file():
            log.warning("%s is not read, as in transformers: name it with --chat-template", folder / OF_PROCESSORS)
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
    path = folder / FILE
    named = {DEFAULT: read_text(path)} if path.is_file() else {}
    found = {file.stem: read_text(file) for file in files}
    if DEFAULT in named and DEFAULT in found:
        log.warning("%s: %s/%s.jinja counts, as in transformers, and %s is not used", folder, FOLDER, DEFAULT, FILE)
    return {**named, **found}, str(folder / FOLDER if DEFAULT in found or not named else path)


def _from_configuration(words: dict[str, Any], origin: str) -> dict[str, str]:
    """Raises BadCheckpoint for what is neither a template nor templates with names."""
    found = words.get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    items = [] if found is None else found
    if isinstance(found, dict):
        items = [{"name": name, "template": template} for name, template in found.items()]
    pairs = (
        [(one.get("name"), one.get("template")) for one in items if isinstance(one, dict)]
        if isinstance(items, list)
        else []
    )
    named = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    if not isinstance(items, list) or len(named) != len(items):
        raise BadCheckpoint(
            f"{origin}: chat_template is {short(found)}, expected a text or a list of names and templates"
        )
    return named


def _writes(text: str, name: str, origin: str) -> bool:
    """Whether a template writes anything of a chat. One that does not is told of."""
    if text.strip():
        return True
    log.warning("%s: the chat template %s is empty, and taken as none", origin, name)
    return False
