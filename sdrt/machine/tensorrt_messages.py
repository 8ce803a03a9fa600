"""What TensorRT says while it works: kept for the errors that its calls report with nothing but False or None.

TensorRT accepts only loggers of its own class, so this one is made from the TensorRT module at hand.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from sdrt.errors import printable

log = logging.getLogger("sdrt")
_KEPT_LINES = 200
OUT_OF_MEMORY = re.compile(
    r"out of memory|outofmemory|bad_alloc|insufficient memory|not enough memory|failed to allocate|allocation failed",
    re.IGNORECASE,
)
"""What its messages say where memory ran out."""


def make_log(trt: Any) -> Any:
    """A TensorRT logger that keeps warnings and errors in `lines`, newest last, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                log.debug("%s: %s", trt.__name__, message)
                self.lines.append(message)
                del self.lines[:-_KEPT_LINES]

    return Log()


def short(line: str) -> str:
    """A message as part of one line of ours."""
    return printable(" ".join(line.split())[:300])
