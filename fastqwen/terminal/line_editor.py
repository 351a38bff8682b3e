"""The prompt of `fastqwen chat`: editing over several lines, and a history that outlives the program."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastqwen.errors import BadConfig
from fastqwen.paths import state_dir

MAX_KEPT = 1000
KEYS = (
    "set enable-bracketed-paste on",  # pasted lines are one message, not one question each
    r'"\e\C-m": "\C-v\C-j"',  # Alt-Enter: a new line
)


class LineEditor:
    """input() with readline where there is one. Messages are remembered whole, in a file that only the user can read."""

    def __init__(self, history: Path | None = None) -> None:
        self._readline: Any = None
        self._file = history or _history_file()
        with contextlib.suppress(ImportError):
            import readline

            self._readline = readline
            readline.set_auto_history(False)
            if os.environ.get("TERM", "dumb") != "dumb":  # which would show the codes
                for line in KEYS:
                    readline.parse_and_bind(line)
            for message in self._kept():
                readline.add_history(message)

    def remember(self, message: str) -> None:
        kept = self._kept()
        if not message.strip() or (kept and kept[-1] == message):
            return
        if self._readline is not None:
            self._readline.add_history(message)
        with contextlib.suppress(OSError):  # a full disk must not end a conversation
            text = "".join(json.dumps(one) + "\n" for one in [*kept, message][-MAX_KEPT:])
            with open(os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                file.write(text)

    def _kept(self) -> list[str]:
        try:
            found = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            return []
        return [one for one in found if isinstance(one, str)][-MAX_KEPT:]


def _history_file() -> Path:
    """Where messages are remembered; where no folder can be written, they are forgotten, and said to be."""
    try:
        return state_dir() / "chat_history.jsonl"
    except BadConfig as error:
        print(f"messages are not remembered: {error}", file=sys.stderr)
        return Path(os.devnull)


@contextlib.contextmanager
def quiet_keyboard() -> Iterator[None]:
    """What is typed while an answer comes is kept for the next prompt, but not mixed into the answer. Ctrl-C still works."""
    if not sys.stdin.isatty() or sys.platform == "win32":
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = before.copy()
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
