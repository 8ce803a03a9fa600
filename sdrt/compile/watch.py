"""Watches a TensorRT build: reports its progress, and stops it.

TensorRT accepts only objects of its own classes, so the class here is made from the TensorRT module at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Lock
from typing import Any

Progress = Callable[[str, float | None], None]
"""Called with the name of a stage and the part of it that is done, 0 to 1, or None if unknown. May be called from
another thread.
"""

WAITING = "waiting for another process that compiles this bundle"
"""The name of a stage: waiting for another compilation of the same engine, because two would do the same work twice."""


def make_monitor(trt: Any, report: Callable[[float], None], stop: Event) -> Any:
    """A TensorRT progress monitor. It calls `report` with the part done, 0 to 1, and ends the build once `stop` is set.

    An exception from `report` also ends the build. It is kept in `error`, because it must not pass through TensorRT.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self._lock = Lock()
            self._phases: list[list[Any]] = []  # [name, steps, steps done], outermost first
            self._reported = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._phases.append([name, max(steps, 1), 0])

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                for phase in reversed(self._phases):
                    if phase[0] == name:
                        phase[2] = step + 1
                        break
                self._report()
                return not stop.is_set()

        def phase_finish(self, name: str) -> None:
            with self._lock:
                for i in reversed(range(len(self._phases))):
                    if self._phases[i][0] == name:
                        del self._phases[i]
                        break

        def _report(self) -> None:
            done, share = 0.0, 1.0
            for _, steps, finished in self._phases:
                share /= steps
                done += share * min(finished, steps)
            if done < self._reported + 0.01:
                return
            self._reported = done
            try:
                report(min(done, 1.0))
            except BaseException as error:
                self.error = error
                stop.set()

    return Monitor()
