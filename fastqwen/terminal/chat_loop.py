"""The conversation: lines in, streamed answers out, and a few commands."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from fastqwen.errors import FastqwenError
from fastqwen.terminal.session import Messages, Partner

HELP = """\
/help             this list
/new              forget the conversation
/system TEXT      set the system prompt (without TEXT: show it)
/exit             end (so does Ctrl-D)
Ctrl-C            stop the answer"""


def run(partner: Partner, *, prompt: str | None, system: str | None, options: dict[str, Any]) -> int:
    """With a prompt, or with text on a pipe: one answer. Else a conversation. Returns the exit status."""
    conversation = Conversation(partner, system, options)
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    if prompt is not None or piped.strip():
        question = "\n\n".join(part for part in (prompt, piped.strip()) if part)
        return conversation.ask(question)
    print(f"{partner.name} is ready. /help lists the commands.", file=sys.stderr)
    for line in _lines():
        if line.startswith("/"):
            if not conversation.command(line):
                return 0
        elif line.strip():
            conversation.ask(line)
    return 0


class Conversation:
    def __init__(self, partner: Partner, system: str | None, options: dict[str, Any]) -> None:
        self._partner = partner
        self._system = system
        self._options = options
        self._turns: Messages = []

    @property
    def messages(self) -> Messages:
        head = [{"role": "system", "content": self._system}] if self._system else []
        return [*head, *self._turns]

    def ask(self, question: str) -> int:
        """Print the answer as it comes and remember both. Returns an exit status."""
        self._turns.append({"role": "user", "content": question})
        text = ""
        try:
            with contextlib.closing(self._partner.answer(self.messages, self._options)) as pieces:
                for piece in pieces:
                    text += piece
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except FastqwenError as error:
            self._turns.pop()
            print(f"fastqwen: {error}", file=sys.stderr)
            return 1
        print()
        self._turns.append({"role": "assistant", "content": text})
        return 0

    def command(self, line: str) -> bool:
        """Whether the conversation goes on."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word == "/new":
            self._turns = []
        elif word == "/system":
            if rest.strip():
                self._system = rest.strip()
            print(f"System prompt: {self._system or '(none)'}")
        elif word == "/help":
            print(HELP)
        else:
            print(f"There is no command {word}; /help lists them.")
        return True


def _lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 line editing and history for input()
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")
