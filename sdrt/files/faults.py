"""Numbered points at which a write can be made to fail, so that a test fails the first, the second, ... until the work
succeeds.

Owns the counting only; `sdrt.files.publish` says where the points are. Off unless $SDRT_FAULT is N:KIND when the
process starts, and then it costs one comparison per file operation. The method is SQLite's (its page on how it is
tested). Standard library only.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from sdrt.errors import UsageError

_CODES = {"enospc": errno.ENOSPC, "eio": errno.EIO}
KINDS = ("kill", "short", *_CODES)


@dataclass
class Faults:
    """Fails the point with this `number`, counted from 1. `passed` lists the points so far, as (operation, path).

    kill ends the process before the operation, as SIGKILL does. enospc and eio raise that OSError instead of the
    operation. short makes one write take only half of its bytes, which the system may do at any time; everything else
    then passes.
    """

    number: int
    kind: str
    passed: list[tuple[str, Path]] = field(default_factory=list)

    def point(self, operation: str, path: Path) -> bool:
        """Pass a point. True if this write must be short.

        Raises:
            OSError: this is the point that fails.
        """
        self.passed.append((operation, path))
        if len(self.passed) != self.number:
            return False
        if self.kind == "kill":
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        if self.kind in _CODES:
            raise OSError(_CODES[self.kind], os.strerror(_CODES[self.kind]), str(path))
        return operation == "write"


def parse(text: str) -> Faults:
    """A fault from `N:KIND`.

    Raises:
        UsageError: it has another form.
    """
    number, _, kind = text.partition(":")
    if not number.isdecimal() or kind not in KINDS:
        raise UsageError(
            f"SDRT_FAULT={text}: expected N:KIND, KIND one of {', '.join(KINDS)}", "Unset it; it is there for tests."
        )
    return Faults(int(number), kind)


armed: Faults | None = parse(os.environ["SDRT_FAULT"]) if os.environ.get("SDRT_FAULT") else None
