"""The conversation: lines in, streamed answers out, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from fastqwen.client.history import Messages
from fastqwen.client.partner import Partner
from fastqwen.errors import BadRequest, FastqwenError
from fastqwen.terminal.line_editor import LineEditor, quiet_keyboard
from fastqwen.text.answer import Parts

HELP = '''\
/help                  this list
/new                   forget the conversation
/system TEXT           set the system prompt (without TEXT: show it)
/set NAME VALUE        temperature, top_p, max_tokens or seed (without NAME: show them; VALUE default: the model's own)
/regen                 answer the last question again
/tokens                how much of the model's context is used
/save FILE             keep the conversation as JSON
/load FILE             go on with a kept one
/exit                  end (so does Ctrl-D)
Alt-Enter              a new line in the message; pasted lines stay together, too
"""                    begins and ends a message of several lines; a backslash at the end of a line joins the next one
arrow up               earlier messages, also those of earlier conversations
Ctrl-C                 stop the answer'''
QUOTES = '"""'
PROMPT = "> "
PROMPT_INSIDE = ". "  # of a message of several lines
CONTEXT_HELP = "/new forgets the conversation, /set max_tokens 200 leaves more room for it"

SETTINGS: dict[str, type] = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
MAX_SAVED_BYTES = 64 * 2**20
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def run(partner: Partner, *, prompt: str | None, system: str | None, options: dict[str, Any]) -> int:
    """With a prompt, or with text on a pipe: one answer. Else a conversation. Returns the exit status."""
    conversation = Conversation(partner, system, options)
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    if prompt is not None or piped.strip():
        question = "\n\n".join(part for part in (prompt, piped.strip()) if part)
        return conversation.ask(question)
    print(f"{partner.name} is ready. /help lists the commands.", file=sys.stderr)
    editor = LineEditor()
    for message in messages_from(input):
        editor.remember(message)
        if message.startswith("/"):
            if not conversation.command(message):
                return 0
        elif message.strip():
            conversation.ask(message)
    return 0


def messages_from(read: Callable[[str], str]) -> Iterator[str]:
    """Messages until the end of the input. Ctrl-C drops what was typed so far."""
    while True:
        try:
            yield _message(read)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")


def _message(read: Callable[[str], str]) -> str:
    """One line, or several between two lines of three quotes, or joined by backslashes."""
    line = read(PROMPT)
    if line.strip() == QUOTES:
        block = []
        while (inner := read(PROMPT_INSIDE)).strip() != QUOTES:
            block.append(inner)
        return "\n".join(block)
    parts = [line]
    while parts[-1].endswith("\\"):
        parts[-1] = parts[-1][:-1]
        parts.append(read(PROMPT_INSIDE))
    return "\n".join(parts)


def without_thoughts(answer: Generator[Parts, None, None]) -> Generator[str, None, None]:
    """The answer's text. Thoughts are no part of it: they are shown dimly on a terminal, and nowhere else."""
    thinking = False
    try:
        for parts in answer:
            if parts.reasoning and sys.stderr.isatty():
                print(parts.reasoning if thinking else f"{DIM}{parts.reasoning}", end="", file=sys.stderr, flush=True)
                thinking = True
            if parts.content:
                if thinking:
                    print(f"{PLAIN}\n", file=sys.stderr, flush=True)
                    thinking = False
                yield parts.content
    finally:
        answer.close()
        if thinking:
            print(PLAIN, file=sys.stderr, flush=True)


class Conversation:
    def __init__(self, partner: Partner, system: str | None, options: dict[str, Any]) -> None:
        self._partner = partner
        self._system = system
        self._options = dict(options)
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
            answering = contextlib.closing(without_thoughts(self._partner.answer(self.messages, self._options)))
            with quiet_keyboard(), answering as pieces:
                for piece in pieces:
                    text += piece
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except FastqwenError as error:
            self._turns.pop()
            if text:
                print()
            print(f"fastqwen: {error}", file=sys.stderr)
            if isinstance(error, BadRequest) and error.code == "context_length_exceeded" and self._turns:
                print(CONTEXT_HELP, file=sys.stderr)
            return 1
        print()
        self._turns.append({"role": "assistant", "content": text})
        return 0

    def command(self, line: str) -> bool:
        """Whether the conversation goes on."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return False
        known = {
            "/help": lambda rest: print(HELP),
            "/new": self._new,
            "/system": self._set_system,
            "/set": self._set,
            "/regen": self._regenerate,
            "/tokens": self._tokens,
            "/save": self._save,
            "/load": self._load,
        }
        if word not in known:
            print(f"There is no command {word}; /help lists them.")
            return True
        try:
            known[word](rest.strip())
        except (FastqwenError, OSError) as error:
            print(f"fastqwen: {error}", file=sys.stderr)
        return True

    def _new(self, rest: str) -> None:
        self._turns.clear()
        print("The conversation is forgotten; the system prompt and the settings stay.")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = text
        print(f"System prompt: {self._system or '(none)'}")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name and name not in SETTINGS:
            print(f"There is no setting {name}; known: {', '.join(SETTINGS)}")
            return
        if value.strip() == "default":
            self._options.pop(name, None)
        elif value:
            try:
                self._options[name] = SETTINGS[name](value)
            except ValueError:
                print(f"{value!r} is no value for {name}")
                return
        print(", ".join(f"{one} {self._options.get(one, 'default')}" for one in SETTINGS))

    def _regenerate(self, rest: str) -> None:
        if not self._turns:
            print("There is nothing to answer again.")
            return
        if self._turns[-1]["role"] == "assistant":
            self._turns.pop()
        self.ask(self._turns.pop()["content"])

    def _tokens(self, rest: str) -> None:
        if not self.messages:
            print("The conversation is empty.")
            return
        print(f"{self._partner.count_tokens(self.messages)} of {self._partner.max_model_len or '?'} tokens")

    def _save(self, name: str) -> None:
        if not name:
            print("Usage: /save FILE")
            return
        Path(name).expanduser().write_text(json.dumps(self.messages, ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"Saved {len(self._turns)} messages to {name}")

    def _load(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name or path.stat().st_size > MAX_SAVED_BYTES:
            print("Usage: /load FILE, a conversation that /save wrote")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in found]
        except (ValueError, KeyError, TypeError):
            print(f"{name} is not a conversation that /save wrote")
            return
        self._system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self._turns = [one for one in messages if one["role"] != "system"]
        print(f"Loaded {len(self._turns)} messages from {name}")
