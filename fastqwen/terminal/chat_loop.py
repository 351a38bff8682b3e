"""The conversation: lines in, streamed answers out, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from fastqwen.client.history import Messages
from fastqwen.client.partner import Partner
from fastqwen.demo import ABOUT
from fastqwen.errors import BadConfig, BadRequest, FastqwenError
from fastqwen.names import DEMO
from fastqwen.terminal.line_editor import LineEditor, quiet_keyboard
from fastqwen.terminal.paint import Painter
from fastqwen.text.answer import Parts

HELP = '''\
/help                  this list
/new                   forget the conversation
/system TEXT           set the system prompt (without TEXT: show it)
/set NAME VALUE        temperature, top_p, max_tokens or seed (without NAME: show them; VALUE default: the model's own)
/set think on          think before the answer, or off, or default: for models whose template has the switch
/model [NAME]          talk to another model or server (without NAME: show this one)
/regen                 answer the last question again
/edit                  change the last question in $EDITOR, or write one there, and ask it
/verbose               after each answer say how fast it was (again: stop saying it)
/tokens                how much of the model's context is used
/save FILE             keep the conversation as JSON
/load FILE             go on with a kept one
/exit                  end (so does Ctrl-D)
Alt-Enter              a new line in the message; pasted lines stay together, too
"""                    begins and ends a message of several lines; a backslash at the end of a line joins the next one
arrow up               earlier messages, also those of earlier conversations
Ctrl-C                 stop the answer'''
HELP_COLUMN = 23
QUOTES = '"""'
PROMPT = "> "
PROMPT_INSIDE = ". "  # of a message of several lines
CONTEXT_HELP = "/new forgets the conversation, /set max_tokens 200 leaves more room for it"

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "max_tokens": int,
    "seed": int,
    "think": {"on": True, "off": False}.__getitem__,
}
THINK = "think"  # goes to the template, the others to the sampler
MAX_SAVED_BYTES = 64 * 2**20
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def run(conversation: Conversation, *, prompt: str | None, as_json: bool = False) -> int:
    """With a prompt, or with text on a pipe: one answer. Else a conversation. Returns the exit status."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    if prompt is not None or piped.strip():
        question = "\n\n".join(part for part in (prompt, piped.strip()) if part)
        return conversation.ask_as_json(question) if as_json else conversation.ask(question)
    if as_json:
        raise BadConfig("--json is for one answer: give a prompt, or text on a pipe")
    name = conversation.partner.name
    print(f"{name} is ready. /help lists the commands.", file=sys.stderr)
    if name == DEMO:
        print(ABOUT, file=sys.stderr)
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


def edited(text: str) -> str:
    """What the user makes of it in $VISUAL, $EDITOR or vi. Raises FastqwenError where there is no such program."""
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "message.md"
        file.write_text(text, encoding="utf-8")
        try:
            done = subprocess.run([*command, str(file)], check=False)
        except OSError as error:
            raise FastqwenError(f"{command[0]} cannot be started ({error.strerror}): set EDITOR") from None
        if done.returncode:
            raise FastqwenError(f"{command[0]} ended with {done.returncode}, so nothing is asked")
        return file.read_text(encoding="utf-8").rstrip("\n")


def _finish(painter: Painter | None) -> None:
    if painter is not None:
        painter.finish()


def _printer() -> Painter | None:
    """None where what is printed goes into a file or a pipe, or to a terminal without colours."""
    plain = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("NO_COLOR")
    if plain or not sys.stdout.isatty():
        return None
    return Painter(lambda text: print(text, end="", flush=True))


class Conversation:
    """``open_partner`` makes another side of a name that /model was given."""

    def __init__(
        self,
        partner: Partner,
        system: str | None,
        options: dict[str, Any],
        open_partner: Callable[[str], Partner] | None = None,
    ) -> None:
        self.partner = partner
        self._open_partner = open_partner
        self._system = system
        self._options = dict(options)
        self._turns: Messages = []
        self._verbose = False

    @property
    def messages(self) -> Messages:
        head = [{"role": "system", "content": self._system}] if self._system else []
        return [*head, *self._turns]

    def ask(self, question: str) -> int:
        """Print the answer as it comes and remember both. Returns an exit status."""
        self._turns.append({"role": "user", "content": question})
        text, painter = "", _printer()
        began_s = time.monotonic()
        first_s = None
        try:
            answering = contextlib.closing(without_thoughts(self._answer()))
            with quiet_keyboard(), answering as pieces:
                for piece in pieces:
                    first_s = first_s or time.monotonic()
                    text += piece
                    if painter is None:
                        print(piece, end="", flush=True)
                    else:
                        painter.feed(piece)
        except KeyboardInterrupt:
            _finish(painter)
            print(" [stopped]", end="")
        except FastqwenError as error:
            self._turns.pop()
            _finish(painter)
            if text:
                print()
            print(f"fastqwen: {error}", file=sys.stderr)
            if isinstance(error, BadRequest) and error.code == "context_length_exceeded" and self._turns:
                print(CONTEXT_HELP, file=sys.stderr)
            return 1
        _finish(painter)
        print()
        self._turns.append({"role": "assistant", "content": text})
        if self._verbose and first_s is not None:
            self._say_speed(first_s - began_s, time.monotonic() - first_s)
        return 0

    def ask_as_json(self, question: str) -> int:
        """One object, once the answer is there."""
        self._turns.append({"role": "user", "content": question})
        parts = Parts()
        for piece in self._answer():
            parts.add(piece)
        found = {"model": self.partner.name, "prompt": question, "reasoning": parts.reasoning, "text": parts.content}
        print(json.dumps(found, ensure_ascii=False))
        return 0

    def _answer(self) -> Generator[Parts, None, None]:
        options = {name: value for name, value in self._options.items() if name != THINK}
        template = {"enable_thinking": self._options[THINK]} if THINK in self._options else None
        return self.partner.answer(self.messages, options, *([template] if template else []))

    def _say_speed(self, first_s: float, rest_s: float) -> None:
        """Servers tell the text and not its tokens, so these are counted anew, with what the template puts around them."""
        try:
            count = self.partner.count_tokens(self.messages) - self.partner.count_tokens(self.messages[:-1])
        except FastqwenError:
            print(f"(first word after {first_s:.2f} s, the rest in {rest_s:.2f} s)", file=sys.stderr)
            return
        speed = f", {count / rest_s:.1f} tokens/s" if rest_s > 0.01 else ""
        print(f"(about {count} tokens{speed}, first word after {first_s:.2f} s)", file=sys.stderr)

    def command(self, line: str) -> bool:
        """Whether the conversation goes on."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return False
        known = {
            "/help": lambda rest: print(_wrapped(HELP)),
            "/new": self._new,
            "/system": self._set_system,
            "/set": self._set,
            "/model": self._model,
            "/regen": self._regenerate,
            "/edit": self._edit,
            "/verbose": self._be_verbose,
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
                self._options[name] = SETTINGS[name](value.strip())
            except (ValueError, KeyError):
                print(f"{value!r} is no value for {name}")
                return
        told = {**self._options}
        if THINK in told:
            told[THINK] = "on" if told[THINK] else "off"
        print(", ".join(f"{one} {told.get(one, 'default')}" for one in SETTINGS))
        if name == THINK and value and self.partner.thinks is False:
            print(f"{self.partner.name} does not think before it answers, so this changes nothing.")

    def _model(self, name: str) -> None:
        if not name:
            others = [one for one in self.partner.names if one != self.partner.name]
            print(self.partner.name + (f" (there are also {', '.join(others)})" if others else ""))
            return
        if name in self.partner.names:
            self.partner.name = name
        elif self._open_partner is None:
            print(f"There is no model {name} here.")
            return
        else:
            found = self._open_partner(name)
            self.partner.close()
            self.partner = found
        print(f"{self.partner.name} answers from here on, and knows the conversation so far.")

    def _be_verbose(self, rest: str) -> None:
        self._verbose = not self._verbose
        print("Speeds are said after each answer." if self._verbose else "Speeds are no longer said.")

    def _edit(self, rest: str) -> None:
        answered = bool(self._turns) and self._turns[-1]["role"] == "assistant"
        last = self._turns[-2 if answered else -1]["content"] if self._turns else ""
        text = edited(last)
        if not text.strip():
            print("Nothing was written, so nothing is asked.")
            return
        if self._turns:
            del self._turns[-2 if answered else -1 :]
        self.ask(text)

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
        print(f"{self.partner.count_tokens(self.messages)} of {self.partner.max_model_len or '?'} tokens")

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


def _wrapped(table: str) -> str:
    """As wide as the terminal; what does not fit stands below its own column."""
    width = shutil.get_terminal_size().columns
    indent = " " * HELP_COLUMN
    return "\n".join(textwrap.fill(line, width, subsequent_indent=indent) for line in table.splitlines())
