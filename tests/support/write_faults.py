"""A write made to fail at a numbered point, so that a test fails the first, the second, ... until the work succeeds.

`sdrt.files.publish` says where the points are, and calls its `at_point` there. The method is SQLite's (its page on how
it is tested).
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from sdrt.files import publish

_CODES = {"enospc": errno.ENOSPC, "eio": errno.EIO}


@dataclass
class Fault:
    """Fails the point `number`, counted from 1; 0 fails none. `passed` lists the points so far, as (operation, path).

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


def arm(number: int, kind: str) -> Fault:
    """Have this process fail at a point, from now on."""
    fault = Fault(number, kind)
    publish.at_point = fault.point
    return fault
