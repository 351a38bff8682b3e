"""Who can reach the server, decided before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastqwen.errors import BadConfig
from fastqwen.server.state import ServerConfig

LOOPBACK = ("localhost", "::1")
KEY_VARIABLE = "FASTQWEN_API_KEY"
MIN_KEY_CHARS = 8


def check_exposure(config: ServerConfig) -> None:
    """Raises BadConfig where other machines could use the server without a key, unless that was asked for."""
    public = config.host not in LOOPBACK and not config.host.startswith("127.")
    if public and not config.api_keys and not config.insecure:
        raise BadConfig(
            f"--host {config.host} lets other machines in, and there is no API key: set {KEY_VARIABLE} (or --api-key, "
            "--api-key-file), or say --insecure if that is meant"
        )


def read_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Keys from the flag, else from a file with one per line, else from the environment. Raises BadConfig."""
    keys = [*given]
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise BadConfig(f"--api-key-file {file}: {error.strerror}") from None
        if not keys:
            raise BadConfig(f"--api-key-file {file} holds no key")
    if not keys:
        keys = [one.strip() for one in os.environ.get(KEY_VARIABLE, "").split(",") if one.strip()]
    if any(len(key) < MIN_KEY_CHARS for key in keys):
        raise BadConfig(f"an API key must have at least {MIN_KEY_CHARS} characters")
    return tuple(keys)
