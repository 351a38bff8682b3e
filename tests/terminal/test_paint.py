"""What a terminal shows of an answer: whole words, code and bold set apart, and every character that the model wrote."""

from __future__ import annotations

import random
import re

import pytest

from fastqwen.terminal.paint import BOLD, CODE, PLAIN, Painter, width_of

ANSWER = """# Head
The **quick brown** fox uses `code here` and a*b*c, then jumps over the lazy dog again.

```python
def f(x):   return x ** 2 + 1000000000000000000000  # `not` **this**
```
你好，这是一个很长的中文句子，没有空格，需要换行。 ``two ticks`` end
- item **bold**, unclosed **bold
- *emphasis* and ** and ` alone
"""


def painted(text: str, columns: int = 31, piece_chars: int = 1) -> str:
    out: list[str] = []
    painter = Painter(out.append, columns)
    for start in range(0, len(text), piece_chars):
        painter.feed(text[start : start + piece_chars])
    painter.finish()
    return "".join(out)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[\d+m", "", text)


def test_words_stay_whole_and_marks_are_coloured():
    shown = painted(ANSWER)
    assert f"{BOLD}**quick brown**{PLAIN}" in shown
    assert f"{CODE}`code here`{PLAIN}" in shown
    assert "a*b*c" in shown
    assert (
        f"{CODE}```python\ndef f(x):   return x ** 2 + 1000000000000000000000  # `not` **this**\n```{PLAIN}\n" in shown
    )
    lines = [line for line in plain(shown).splitlines() if "return" not in line]
    assert all(sum(map(width_of, line)) <= 30 for line in lines)
    assert shown.endswith("\n") and shown.count("\x1b") % 2 == 0


@pytest.mark.parametrize("columns", [0, 5, 31, 200])
@pytest.mark.parametrize("piece_chars", [1, 3, 1000])
def test_nothing_of_the_answer_is_lost(columns: int, piece_chars: int):
    shown = plain(painted(ANSWER, columns, piece_chars))
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", ANSWER)
    assert shown == plain(painted(ANSWER, columns)), "how the answer was cut into pieces makes no difference"
    if columns in (0, 5, 200):
        assert shown == ANSWER


def test_any_text_ends_with_a_plain_terminal():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab *`~\n你", k=rng.randrange(40)))
        shown = painted(text, 25)
        assert re.sub(r"\s", "", plain(shown)) == re.sub(r"\s", "", text)
        styles = re.findall(r"\x1b\[\d+m", shown)
        assert not styles or styles[-1] == PLAIN


def test_words_come_without_waiting_for_the_line():
    out: list[str] = []
    painter = Painter(out.append, 80)
    painter.feed("One two thr")
    assert "".join(out) == "One two"
