"""Time and counts at the engine's boundary: a wrapper of the Engine protocol, and where it is put so that the pipeline need not know.

Imports nothing but the runtime's own modules, since what a process imports before its first picture is measured too.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sdrt.bench.device_times import DeviceTimes
from sdrt.bundle.graphs import STEP

Clock = Callable[[], int]
"""Nanoseconds that only grow."""


@dataclass
class Readings:
    """What the instruments saw since the last `reset`, nanoseconds.

    `inside` is all time within the engine, whatever it was for. `between` is called after each model call, and `waited` is the time it took: that of another process's turn. `device` times the parts on the GPU, None where there is none. With `keep`, the
    last inputs of each graph and the final latents are kept too.
    """

    clock: Clock = time.perf_counter_ns
    tokenise: int = 0
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
        self.tokenise = self.text_encoder = self.image_encoder = self.copies = self.decode = self.inside = self.waited = 0
        self.steps = []
        self.calls = Counter()
        if self.device is not None:
            self.device.read()


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
            self._readings.calls = counted  # a copy of ours, not of the pipeline's
        return _timed(self._readings, "decode", "decode_calls", self._batch.decode, slots, rounding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


class TimedEngine:
    """An `Engine` that times each call. Anything of the engine that is not of the protocol is passed on untimed."""

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
        return TimedBatch(_timed(self._readings, "copies", "batches", self._engine.open, shape, capacity), self._readings)

    def decode(self, *arguments: Any) -> Any:
        return _timed(self._readings, "decode", "decode_calls", self._engine.decode, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _timed(readings: Readings, part: str, count: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and add the time to a part and to all time inside the engine. A call within a call is part of the outer one."""
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


@contextmanager
def instrumented(readings: Readings) -> Iterator[None]:
    """Within the block, every pipeline that is loaded gets a timed engine, and its tokenizer's public methods are timed.

    The pipeline asks `load_engine` of its own module for an engine; that name is where the wrapper goes. On a GPU, what our own
    code starts is counted too: launches, copies, allocations. Synchronisations are calls of compiled objects, which cannot be seen from here. And
    each model call and each run of another graph goes between two CUDA events.
    """
    from sdrt.runtime import pipeline, tokenizer

    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    load, kind = vars(pipeline)["load_engine"], tokenizer.Tokenizer

    def timed_load(*arguments: Any, **options: Any) -> Any:
        started = readings.clock()
        engine = load(*arguments, **options)
        readings.engine_load = readings.clock() - started
        if engine.backend.startswith("tensorrt"):
            from sdrt.runtime.captured_step import CapturedStep
            from sdrt.runtime.device_memory import Block
            from sdrt.runtime.tensorrt import TensorRtEngine

            if readings.device is None:
                readings.device = DeviceTimes(engine.cuda)
                replace(CapturedStep, "launch", _timed_launch(CapturedStep.launch, readings.device))
                replace(TensorRtEngine, "enqueue", _timed_enqueue(TensorRtEngine.enqueue, readings.device))
                for owner, name, count in (
                    (CapturedStep, "launch", "launches"), (Block, "to_device", "h2d"), (Block, "download", "d2h"), (Block, "__init__", "allocations"),
                ):  # fmt: skip
                    replace(owner, name, _counted(vars(owner)[name], readings, count))
        return TimedEngine(engine, readings)

    for name, method in list(vars(kind).items()):
        if callable(method) and not name.startswith("_"):
            replace(kind, name, _timed_method(method, readings))
    replace(pipeline, "load_engine", timed_load)
    try:
        yield
    finally:
        readings.device = None
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)


def _counted(method: Callable[..., Any], readings: Readings, count: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(*arguments: Any, **options: Any) -> Any:
        readings.calls[count] += 1
        return method(*arguments, **options)

    return counted


def _timed_launch(launch: Callable[..., None], times: DeviceTimes) -> Callable[..., None]:
    @functools.wraps(launch)
    def timed(step: Any, engine: Any, call: int) -> None:
        times.around(STEP, engine.stream, lambda: launch(step, engine, call))

    return timed


def _timed_enqueue(enqueue: Callable[..., None], times: DeviceTimes) -> Callable[..., None]:
    """Model calls are timed where they are launched; their own enqueueing may also be a capture, where events say nothing."""

    @functools.wraps(enqueue)
    def timed(engine: Any, context: Any, graph: str, stream: Any) -> None:
        if graph == STEP:
            enqueue(engine, context, graph, stream)
        else:
            times.around(graph, stream, lambda: enqueue(engine, context, graph, stream))

    return timed


def _timed_method(method: Callable[..., Any], readings: Readings) -> Callable[..., Any]:
    nested = False

    @functools.wraps(method)
    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal nested
        if nested:
            return method(*arguments, **options)
        nested = True
        started = readings.clock()
        try:
            return method(*arguments, **options)
        finally:
            readings.tokenise += readings.clock() - started
            nested = False

    return timed
