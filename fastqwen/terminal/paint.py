"""An answer as it comes, on a terminal: lines break between words, code and bold are set apart.

Every character that the model wrote is printed, its Markdown included, so that what is copied from the screen is the answer.
"""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable

CODE, BOLD, PLAIN = "\x1b[36m", "\x1b[1m", "\x1b[0m"
FENCES = ("```", "~~~")
NARROWEST = 20  # columns; on less, breaking between words leaves nothing to read


def width_of(character: str) -> int:
    """Columns that it takes: 2 for Chinese, 0 for what combines with the one in front."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def breaks_anywhere(character: str) -> bool:
    """Chinese and its like have no spaces to break lines at."""
    return width_of(character) == 2


class Painter:
    """``feed`` pieces as they come, ``finish`` at the end. Of a piece only the last, unfinished word is kept back."""

    def __init__(self, write: Callable[[str], None], columns: int | None = None) -> None:
        self._write = write
        self._columns = (shutil.get_terminal_size().columns if columns is None else columns) - 1
        self._column = 0
        self._word: list[str] = []
        self._word_width = 0
        self._line = ""  # of the answer, as far as it came
        self._spaces = 0  # in front of the word, not printed yet
        self._in_fence = self._in_code = self._is_bold = False
        self._stars = self._ticks = 0  # of those that came last, whose meaning shows when something else follows

    def feed(self, text: str) -> None:
        for character in text:
            self._take(character)

    def finish(self) -> None:
        """Print what was kept back, and leave the terminal as it was."""
        self._end_stars()
        self._end_ticks()
        self._place_word()
        if self._in_fence or self._in_code or self._is_bold:
            self._write(PLAIN)
        self._in_fence = self._in_code = self._is_bold = False

    def _take(self, character: str) -> None:
        if character != "*":
            self._end_stars()
        if character != "`":
            self._end_ticks()
        if character == "\n":
            self._end_line()
            return
        self._line += character
        if self._in_fence or self._is_fence():
            self._word.append(character)  # code keeps its lines: nothing is broken, marked or held to a width
        elif character == " ":
            self._place_word()
            self._spaces += 1
        elif character == "*":
            self._stars += 1
            self._add(character)
        elif character == "`":
            self._ticks += 1
            self._add(character)
        else:
            if breaks_anywhere(character):
                self._place_word()
            self._add(character)

    def _add(self, character: str) -> None:
        self._word.append(character)
        self._word_width += width_of(character)

    def _end_stars(self) -> None:
        """Two stars begin and end what is bold; inside code they are stars."""
        if self._stars == 2 and not self._in_code and not self._in_fence:
            self._is_bold = not self._is_bold
            style = BOLD if self._is_bold else PLAIN
            self._word.insert(len(self._word) - 2 if self._is_bold else len(self._word), style)
        self._stars = 0

    def _end_ticks(self) -> None:
        """They begin and end code, unless they are a fence."""
        if self._ticks and not self._in_fence and not self._is_fence():
            self._in_code = not self._in_code
            if self._in_code:
                self._word.insert(len(self._word) - self._ticks, CODE)
            else:
                self._word.append(PLAIN + (BOLD if self._is_bold else ""))
        self._ticks = 0

    def _is_fence(self) -> bool:
        return self._line.lstrip().startswith(FENCES)

    def _end_line(self) -> None:
        fence = self._is_fence()
        if fence and not self._in_fence:
            self._word.insert(0, CODE)
        self._place_word()
        if fence and self._in_fence:
            self._write(PLAIN)
        if fence:
            self._in_fence = not self._in_fence
        elif self._in_code and not self._in_fence:
            self._write(PLAIN)
        if not self._in_fence and not fence:
            if self._is_bold:
                self._write(PLAIN)
            self._in_code = self._is_bold = False  # neither goes on behind a line's end
        self._write("\n")
        self._line, self._column = "", 0

    def _place_word(self) -> None:
        room = self._columns - self._column - self._spaces
        if self._in_fence or self._columns < NARROWEST or self._column == 0 or self._word_width <= room:
            self._write(" " * self._spaces + "".join(self._word))
            self._column += self._spaces + self._word_width
        elif self._word:
            self._write("\n" + "".join(self._word))
            self._column = self._word_width
        else:
            return  # spaces at the end of what may become a line: they wait for a word
        self._word, self._word_width, self._spaces = [], 0, 0
