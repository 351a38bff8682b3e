"""Signs of life on pipes, with a clock that the test turns."""

from __future__ import annotations

import os

from fastqwen.ranks.pulse import Pulses


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_silent_rank_is_told_from_one_that_speaks_and_from_one_that_ended():
    clock = Clock()
    (first, to_first), (second, to_second) = os.pipe(), os.pipe()
    pulses = Pulses([first, second], clock)
    for _ in range(4):
        clock.now_s += 0.5
        os.write(to_first, b".")
        assert pulses.look() is None
    assert pulses.silent_s == [0.0, 2.0]
    os.write(to_second, b".")
    clock.now_s += 0.5
    assert pulses.look() is None and pulses.silent_s[1] == 0.0
    os.close(to_second)
    assert pulses.look() == 1
    os.close(to_first)
    pulses.close()


def test_a_machine_that_slept_is_no_hang():
    clock = Clock()
    reader, writer = os.pipe()
    pulses = Pulses([reader], clock)
    clock.now_s += 3600
    assert pulses.look() is None and pulses.silent_s == [1.0]
    os.close(writer)
    pulses.close()
