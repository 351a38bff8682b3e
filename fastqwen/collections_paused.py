"""No garbage collection while something is made that stays.

Importing torch and reading a tokenizer make hundreds of thousands of objects that live as long as the process. Python looks
through them again and again as they become more: a tenth of the import, a third of the tokenizer (docs/ideas_tried.md).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collections_paused() -> Iterator[None]:
    """For the whole process; where collections are off already, they stay off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
