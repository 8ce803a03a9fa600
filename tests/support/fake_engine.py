"""An engine that computes nothing: what the pipeline asks of one, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.engines.shapes import JobShape
from sdrt.errors import ResourceError
from sdrt.runtime.engine import BatchShape, Float, Job, Pixels, RunningBatch
from sdrt.runtime.request_memory import Demand


class FakeBatch:
    def __init__(self, engine: FakeEngine, capacity: int) -> None:
        self.engine, self.capacity, self.rows, self.closed = engine, capacity, 0, False
        self.jobs: list[Job] = []

    def join(self, job: Job) -> int:
        self.jobs.append(job)
        return len(self.jobs) - 1

    def step(self) -> None:
        assert not self.closed and len(self.jobs) == self.capacity
        if self.rows == self.engine.fail_at_row:
            raise ResourceError("fake: out of memory")
        self.rows += 1

    def leave(self, slot: int) -> None:
        raise AssertionError("the batch is closed instead")

    def latents(self, slots: Sequence[int]) -> Float:
        assert all(self.rows == job.rows for job in self.jobs) and not self.closed
        final = np.stack([self.jobs[slot].inputs["init_noise"] for slot in slots])
        for i in self.engine.bad_latents & set(range(len(final))):
            final[i, 0, 0, 0] = np.inf
        return final

    def denoised(self, slots: Sequence[int]) -> Float:
        assert not self.closed
        return np.stack([np.full_like(self.jobs[slot].inputs["init"], self.rows) for slot in slots])

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self.engine.decode(self.latents(slots), rounding)

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """Records what it is asked. Its contexts hold the token ids, 64 numbers of each encoder; its pooled vectors the
    first three ids of the last encoder; its pictures are black.
    """

    backend = "fake"

    def __init__(self) -> None:
        self.texts: list[tuple[NDArray[np.int64], int]] = []
        self.images: list[tuple[Pixels, Float]] = []
        self.batches: list[FakeBatch] = []
        self.roundings: list[float] = []
        self.bad_latents: set[int] = set()
        self.bad_pixels: set[int] = set()
        self.fail_at_row: int | None = None

    def demand(self, shape: JobShape) -> Demand:
        return Demand(0, "")

    def free_bytes(self, shape: JobShape) -> int | None:
        return None

    @property
    def jobs(self) -> list[Job]:
        return [job for batch in self.batches for job in batch.jobs]

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        self.texts.append((tokens, clip_skip))
        context = np.concatenate([np.repeat(each[:, :, None], 64, axis=2) for each in tokens], axis=2)
        return context.astype(np.float32), tokens[-1, :, :3].astype(np.float32)

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        self.images.append((pixels, noise))
        return np.full_like(noise, 0.5)

    def open(self, shape: BatchShape, capacity: int) -> RunningBatch:
        self.batches.append(FakeBatch(self, capacity))
        return self.batches[-1]

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        self.roundings.append(rounding)
        n, _, h, w = latents.shape
        finite = np.array([i not in self.bad_pixels and bool(np.isfinite(latents[i]).all()) for i in range(n)])
        return np.zeros((n, 8 * h, 8 * w, 3), np.uint8), finite

    def describe(self) -> dict[str, Any]:
        return {"backend": self.backend, "device": "none"}
