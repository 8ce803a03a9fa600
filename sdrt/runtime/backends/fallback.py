"""An engine whose shapes are static, with ONNX Runtime behind it for the shapes it does not serve. Chosen by
`on_missing="fallback"`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.engines.shapes import EngineShapes, JobShape
from sdrt.errors import MissingEngineError
from sdrt.runtime.engine import BatchShape, Engine, Float, Pixels, RunningBatch, job_shape
from sdrt.runtime.request_memory import Demand

log = logging.getLogger("sdrt")


class FallbackEngine:
    """Thread-safe. Each batch runs whole on one of the two; results name which, with `instead_of` where it is the
    second.
    """

    def __init__(self, first: Engine, load_second: Callable[[], Engine], factor: int) -> None:
        """`load_second` is called once, when the first request needs it; `factor` pixels a side per latent."""
        self.backend = first.backend
        self._first, self._load_second, self._factor = first, load_second, factor
        self._second: Engine | None = None
        self._told = set[JobShape]()
        self._lock = Lock()

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        return self._first.shapes

    def serves(self, shape: JobShape) -> bool:
        return True

    def demand(self, shape: JobShape) -> Demand:
        return self._of(shape).demand(shape)

    def free_bytes(self, shape: JobShape) -> int | None:
        return self._of(shape).free_bytes(shape)

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        try:
            return self._first.encode_text(tokens, clip_skip)
        except MissingEngineError:
            return self._other().encode_text(tokens, clip_skip)

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        try:
            return self._first.encode_image(pixels, noise)
        except MissingEngineError:
            return self._other().encode_image(pixels, noise)

    def open(self, shape: BatchShape, capacity: int) -> RunningBatch:
        wanted = job_shape(shape, capacity, self._factor)
        if self._first.serves(wanted):
            return self._first.open(shape, capacity)
        other = self._other()
        with self._lock:
            told = wanted in self._told
            self._told.add(wanted)
        if not told:
            log.warning("no %s engine for %s; %s runs it", self._first.backend, wanted.options, other.backend)
        return _Instead(other.open(shape, capacity), self._first.backend)

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        try:
            return self._first.decode(latents, rounding)
        except MissingEngineError:
            return self._other().decode(latents, rounding)

    def describe(self) -> dict[str, Any]:
        return self._first.describe()

    def _of(self, shape: JobShape) -> Engine:
        return self._first if self._first.serves(shape) else self._other()

    def _other(self) -> Engine:
        with self._lock:
            if self._second is None:
                self._second = self._load_second()
            return self._second


class _Instead:
    """A running batch of the second engine, which says so."""

    def __init__(self, batch: RunningBatch, first: str) -> None:
        self._batch, self._first = batch, first
        self.capacity = batch.capacity
        self.join, self.step, self.leave, self.close = batch.join, batch.step, batch.leave, batch.close
        self.latents, self.denoised, self.decode = batch.latents, batch.denoised, batch.decode

    def describe(self) -> dict[str, Any]:
        return self._batch.describe() | {"instead_of": self._first}
