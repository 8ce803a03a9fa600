"""Measures time and counts calls at the engine's boundary, with a wrapper of the Engine protocol that the pipeline is
loaded with.

Imports only the runtime's own modules, because the imports before the first picture are measured too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sdrt.bench.device_times import DeviceTimes
from sdrt.engines.targets import TARGETS, on_gpu

if TYPE_CHECKING:
    from sdrt.runtime.engine import Engine

Clock = Callable[[], int]
"""Nanoseconds of a clock that never goes back."""


@dataclass
class Readings:
    """What the instruments saw since the last `reset`, in nanoseconds.

    `inside` is all time within the engine, for any purpose. `between` is called after each model call; `waited` is the
    time it took, which belongs to another process's turn. `device` times the parts on the GPU, None without one. With
    `keep`, the last inputs of each graph and the final latents are kept too.
    """

    clock: Clock = time.perf_counter_ns
    text_encoder: int = 0
    image_encoder: int = 0
    copies: int = 0
    decode: int = 0
    inside: int = 0
    engine_load: int = 0
    waited: int = 0
    between: Callable[[], None] | None = None
    steps: list[int] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    device: DeviceTimes | None = None
    keep: bool = False
    kept: dict[str, Any] = field(default_factory=dict)
    _depth: int = 0

    def reset(self) -> None:
        self.text_encoder = self.image_encoder = self.copies = self.decode = self.inside = self.waited = 0
        self.steps = []
        self.calls = Counter()
        if self.device is not None:
            self.device.read()

    def observe(self, load: Callable[[], Engine]) -> Engine:
        """For `Pipeline.load(observe=)`: time the loading of the engine, and everything that the pipeline asks of it.

        On a GPU, the launches, copies and allocations of our own code are counted too. Synchronisations are calls of
        compiled objects, which cannot be seen from here. Two CUDA events are recorded around each model call and each
        run of another graph, but for ONNX Runtime's, whose stream is its own.
        """
        started = self.clock()
        engine: Any = load()
        self.engine_load = self.clock() - started
        if on_gpu(engine.backend):
            if TARGETS[engine.backend].saved:
                self.device = self.device or DeviceTimes(engine.plans.cuda)
                engine.plans.watched.observer = self
            else:
                engine.watched.observer = self
        return TimedEngine(engine, self)

    def count(self, what: str) -> None:
        self.calls[what] += 1

    def around(self, graph: str, stream: Any, start: Callable[[], None]) -> None:
        assert self.device is not None
        self.device.around(graph, stream, start)


class TimedBatch:
    """A `RunningBatch` that times each call."""

    def __init__(self, batch: Any, readings: Readings) -> None:
        self._batch = batch
        self._step = batch.step
        self._readings = readings

    def join(self, job: Any) -> Any:
        if self._readings.keep:
            self._readings.kept.setdefault("jobs", []).append(job)
        return _timed(self._readings, "copies", "joins", self._batch.join, job)

    def step(self) -> None:
        readings = self._readings
        started = readings.clock()
        self._step()
        taken = readings.clock() - started
        readings.steps.append(taken)
        readings.inside += taken
        if readings.between is not None:
            started = readings.clock()
            readings.between()
            readings.waited += readings.clock() - started

    def latents(self, slots: Any) -> Any:
        return _timed(self._readings, "copies", "latents_copies", self._batch.latents, slots)

    def denoised(self, slots: Any) -> Any:
        return _timed(self._readings, "copies", "denoised_copies", self._batch.denoised, slots)

    def decode(self, slots: Any, rounding: float) -> Any:
        if self._readings.keep:
            counted = self._readings.calls.copy()
            self._readings.kept["latents"] = self._batch.latents(slots)
            self._readings.calls = counted  # this copy is ours, not the pipeline's
        return _timed(self._readings, "decode", "decode_calls", self._batch.decode, slots, rounding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


class TimedEngine:
    """An `Engine` that times each call. Attributes outside the protocol are passed on untimed."""

    def __init__(self, engine: Any, readings: Readings) -> None:
        self._engine = engine
        self._readings = readings

    def encode_text(self, *arguments: Any) -> Any:
        if self._readings.keep:
            self._readings.kept["text"] = arguments
        return _timed(self._readings, "text_encoder", "text_encoder_calls", self._engine.encode_text, *arguments)

    def encode_image(self, *arguments: Any) -> Any:
        return _timed(self._readings, "image_encoder", "image_encoder_calls", self._engine.encode_image, *arguments)

    def open(self, shape: Any, capacity: int) -> TimedBatch:
        if self._readings.keep:
            self._readings.kept |= {"shape": shape, "jobs": []}
        return TimedBatch(
            _timed(self._readings, "copies", "batches", self._engine.open, shape, capacity), self._readings
        )

    def decode(self, *arguments: Any) -> Any:
        return _timed(self._readings, "decode", "decode_calls", self._engine.decode, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _timed(readings: Readings, part: str, count: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call, and add its time to a part and to all time inside the engine. A call within a call is part of the
    outer one.
    """
    readings.calls[count] += 1
    if readings._depth:
        return call(*arguments)
    readings._depth += 1
    started = readings.clock()
    try:
        return call(*arguments)
    finally:
        taken = readings.clock() - started
        readings._depth -= 1
        setattr(readings, part, getattr(readings, part) + taken)
        readings.inside += taken
