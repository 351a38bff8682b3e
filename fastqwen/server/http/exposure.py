"""Who can reach the server, decided before anything is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from fastqwen.errors import BadConfig
from fastqwen.server.config import FrontConfig

log = logging.getLogger("fastqwen.server")

LOOPBACK = ("localhost", "::1")
MIN_KEY_CHARS = 8


def check_exposure(config: FrontConfig) -> None:
    """Raises BadConfig where other machines could use the server without a key, unless that was asked for, and for a key that
    no client can send."""
    for number, key in enumerate(config.api_keys, start=1):
        if not (key.isascii() and key.isprintable()) or key != key.strip():
            raise BadConfig(
                f"key {number} ({config.key_flag}, {config.key_variable}) cannot be sent in a header: use printable ASCII "
                "characters without spaces around them"
            )
    public = config.uds is None and config.host not in LOOPBACK and not config.host.startswith("127.")
    if any(len(key) < MIN_KEY_CHARS for key in config.api_keys):
        short = f"a key has less than {MIN_KEY_CHARS} characters ({config.key_flag}, {config.key_variable})"
        if public:
            raise BadConfig(f"{short}, which others guess: --host {config.host} lets other machines in")
        log.warning("%s: enough on this machine alone, too little for others", short)
    if public and not config.api_keys and not config.insecure:
        raise BadConfig(
            f"--host {config.host} lets other machines in, and there is no key: set {config.key_variable} (or "
            f"{config.key_flag}, {config.key_flag}-file), or say --insecure if that is meant"
        )


def read_keys(given: Sequence[str] | None, file: Path | None, config: type[FrontConfig]) -> tuple[str, ...]:
    """Keys from the config's flag, else from a file with one per line, else from the environment. Raises BadConfig."""
    flag, variable = config.key_flag, config.key_variable
    keys = [*(given or ())]
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise BadConfig(f"{flag}-file {file}: {error.strerror}") from None
        if not keys:
            raise BadConfig(f"{flag}-file {file} holds no key")
    if not keys:
        keys = [one.strip() for one in os.environ.get(variable, "").split(",") if one.strip()]
    for name in config.other_key_variables:
        if not keys and os.environ.get(name, "").strip():
            keys = [os.environ[name].strip()]  # one key, whatever it holds
    if not all(keys):
        raise BadConfig(f"{flag} is empty, which would be no key at all")
    return tuple(keys)
