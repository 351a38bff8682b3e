"""Log lines of all processes: uvicorn's familiar form, or one JSON object each.

Control characters never reach a terminal or a file raw.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _one_line(value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value
    text = str(value)
    return text.replace("\n", "\\n") if "\n" in text else value


class TextFormatter(logging.Formatter):
    def __init__(self, process: str = "") -> None:
        super().__init__(f"%(levelname)s:%(padding)s {f'[{process}] ' if process else ''}%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.padding = " " * (8 - len(record.levelname))
        if isinstance(record.args, tuple):  # only what is written here may begin a line: no name from elsewhere
            record = logging.makeLogRecord({**vars(record), "args": tuple(map(_one_line, record.args))})
        return escaped(super().format(record)).replace("\r", "\\r")


class JsonFormatter(logging.Formatter):
    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._process:
            entry["process"] = self._process
        entry |= getattr(record, "fields", {})  # what the message says, one by one
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=True)


def configure_logging(log_format: str, process: str = "") -> None:
    """``process`` names one that is not the server's own."""
    logging.raiseExceptions = False  # a full disk or a closed pipe must not cost a request
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
