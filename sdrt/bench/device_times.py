"""Times on a GPU: a pair of CUDA events around each part, in its stream, read once the picture is done.

Recording an event makes neither the host nor the device wait. Nothing is recorded unless a benchmark asks for it.
Imports no engine: `cuda.core` comes with the engine that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER

DEVICE_METRICS = {TEXT_ENCODER: "text_encoder_gpu_ms", STEP: "step_gpu_ms", VAE_DECODER: "decode_gpu_ms"}
"""The metric of each timed part."""


class DeviceTimes:
    """Pairs of events of one stream. The events made for the first picture are used again for the next ones."""

    def __init__(self, cuda: Any) -> None:
        self._options = cuda.EventOptions(timing_enabled=True)
        self._idle: list[Any] = []
        self._pairs: list[tuple[str, Any, Any]] = []

    def around(self, part: str, stream: Any, start: Callable[[], None]) -> None:
        """Start work on a stream between two events. The time that the device waits for the host before the work is not
        included.
        """
        began = self._recorded(stream)
        start()
        self._pairs.append((part, began, self._recorded(stream)))

    def read(self) -> dict[str, list[float]]:
        """Milliseconds of each part since the last `read`, in order. The stream must have been waited for since then;
        the end of every picture does that.
        """
        found: dict[str, list[float]] = {}
        for part, began, ended in self._pairs:
            found.setdefault(part, []).append(float(ended - began))
            self._idle += (began, ended)
        self._pairs.clear()
        return found

    def _recorded(self, stream: Any) -> Any:
        if self._idle:
            return stream.record(self._idle.pop())
        return stream.record(options=self._options)
