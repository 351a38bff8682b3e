"""Part of vLLM's module layout: a logger as Python has it."""

from __future__ import annotations

import logging

__all__ = ["init_logger"]


def init_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)
