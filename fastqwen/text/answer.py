"""An answer's text, split while it grows into reasoning, content and tool calls.

Everything that is handed out is final. Accumulated, the parts are the same however the text was cut: a whole answer goes
through the same parser in one piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastqwen.text.detokenizer import overlap
from fastqwen.text.tool_calls import Call, CallFormat, CallReader

THINK, THINK_END = "<think>", "</think>"


@dataclass
class Parts:
    """What became final."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, other: Parts) -> None:
        self.reasoning += other.reasoning
        self.content += other.content
        self.calls += other.calls

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class TextParser(ABC):
    """Holds text until ``_step`` can tell what it is."""

    _held = ""

    @property
    @abstractmethod
    def thinking(self) -> bool:
        """Whether the next text would be reasoning."""

    def push(self, text: str) -> Parts:
        self._held += text
        return self._stepped(final=False)

    def finish(self) -> Parts:
        parts = self._stepped(final=True)
        self._end(parts)
        return parts

    def _stepped(self, *, final: bool) -> Parts:
        parts = Parts()
        while self._step(parts, final=final):
            pass
        return parts

    @abstractmethod
    def _step(self, parts: Parts, *, final: bool) -> bool:
        """Whether there may be more to do with what is held."""

    @abstractmethod
    def _end(self, parts: Parts) -> None:
        """The text has ended: what is still held goes into its last parts."""


class AnswerParser(TextParser):
    """``opened``: the prompt ends inside a thinking block. ``reasoning``: look for thinking at all.

    A tool call inside the thinking block counts if its name is one of ``tool_names``; prose about tool calls does not.
    """

    def __init__(
        self,
        *,
        reasoning: bool = True,
        opened: bool = False,
        calls: CallFormat | None = None,
        tool_names: Sequence[str] = (),
    ) -> None:
        self._calls = calls
        self._tool_names = frozenset(tool_names)
        self._undecided = reasoning
        self._section = "reasoning" if opened and reasoning else "content"
        self._space = ""  # white space that the next text decides about
        self._at_start = opened and reasoning
        self._reader: CallReader | None = None
        self._raw = ""  # what the reader has taken, should it turn out to be no call

    @property
    def thinking(self) -> bool:
        return self._section == "reasoning"

    def _end(self, parts: Parts) -> None:
        self._emit(parts, self._held)
        self._held = ""
        if self._section == "content":
            parts.content += self._space
        self._space = ""

    def _step(self, parts: Parts, *, final: bool) -> bool:
        if self._undecided:
            return self._decide(final)
        if self._reader is not None:
            return self._read_call(parts, self._reader, final)
        return self._scan(parts, final)

    def _decide(self, final: bool) -> bool:
        """Models whose prompt does not open the thinking block may open it themselves, at the very beginning."""
        text = self._held.lstrip()
        if THINK.startswith(text) and text != THINK and not final:
            return False
        self._undecided = False
        if text.startswith(THINK):
            self._held, self._section, self._at_start = text[len(THINK) :], "reasoning", True
        return True

    def _scan(self, parts: Parts, final: bool) -> bool:
        marks = [] if self._calls is None else list(self._calls.openers)
        if self._section == "reasoning":
            marks.append(THINK_END)
        found = min(((self._held.find(mark), mark) for mark in marks if mark in self._held), default=None)
        if found is None:
            keep = 0 if final else max((overlap(self._held, mark) for mark in marks), default=0)
            cut = len(self._held) - keep
            self._emit(parts, self._held[:cut])
            self._held = self._held[cut:]
            return False
        start, mark = found
        self._emit(parts, self._held[:start])
        self._held = self._held[start + len(mark) :]
        if mark == THINK_END:
            self._section, self._space, self._at_start = "content", "", True
        else:
            assert self._calls is not None
            self._reader, self._raw = self._calls.reader(mark), mark
        return True

    def _read_call(self, parts: Parts, reader: CallReader, final: bool) -> bool:
        text, self._held = self._held, ""
        self._raw += text
        outcome = reader.push(text)
        if outcome is None and not self._left_thinking(self._raw):
            if not final:
                return False
            outcome = reader.finish()
            if not outcome.calls:  # nothing in it will ever be complete
                self._reader = None
                self._emit(parts, self._raw)
                return False
        self._reader = None
        if outcome is None or not self._count(outcome.calls, self._raw[: len(self._raw) - len(outcome.rest)]):
            # No call: its first character is text, and what follows is looked at again.
            self._emit(parts, self._raw[0])
            self._held = self._raw[1:]
            return True
        self._held = outcome.rest
        parts.calls += outcome.calls
        self._space, self._at_start = "", True
        return True

    def _count(self, calls: Sequence[Call], taken: str) -> bool:
        if self._section == "content":
            return bool(calls)
        known = bool(calls) and all(call.name in self._tool_names for call in calls)
        return known and not self._left_thinking(taken)

    def _left_thinking(self, taken: str) -> bool:
        """A call that begins inside the thinking block must end there, or prose about calls would swallow the answer."""
        return self._section == "reasoning" and THINK_END in taken

    def _emit(self, parts: Parts, text: str) -> None:
        """Line breaks around a section belong to the format and are dropped; white space inside it is kept."""
        if self._at_start:
            text = text.lstrip("\r\n")
        if not text:
            return
        self._at_start = False
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if self._section == "reasoning":
            parts.reasoning += kept
        else:
            parts.content += kept


def prompt_opens_thinking(prompt_end: str) -> bool:
    """Whether a prompt, given by its last characters, ends with a thinking block that the model is to continue."""
    return prompt_end.rstrip().endswith(THINK)
