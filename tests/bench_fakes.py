"""An engine and a pipeline of known cost, on a clock that only moves when somebody sleeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class FakeTime:
    """A clock that only moves when somebody sleeps."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns

    def seconds(self) -> float:
        return self.ns / 1e9

    def sleep(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)


class FakeEngine:
    """An engine of known cost: `step_ms` per model call, and fixed times for everything else."""

    backend = "fake"

    def __init__(self, time: FakeTime, step_ms: float) -> None:
        self.time, self.step_ms, self.extra = time, step_ms, "untouched"

    def encode_text(self, *_: Any) -> str:
        self.time.sleep(0.003)
        return "context"

    def open(self, *_: Any) -> Any:
        self.time.sleep(0.001)
        return SimpleNamespace(
            step=lambda: self.time.sleep(self.step_ms / 1e3), latents=lambda _: self.time.sleep(0.001) or np.zeros(3),
            denoised=lambda _: self.time.sleep(0.001), decode=lambda _, rounding: self.decode(None, rounding), close=lambda: None,
            join=lambda _: self.time.sleep(0.001) or 0,
        )  # fmt: skip

    def decode(self, *_: Any) -> str:
        self.time.sleep(0.004)
        return "pixels"

    def describe(self, _: Any = None) -> dict[str, Any]:
        return {"backend": "fake", "device": "cpu", "compute": "fp32"}


class FakePipe:
    """A pipeline that spends 5 ms on the host and asks the engine for everything else."""

    def __init__(self, engine: Any, time: FakeTime) -> None:
        self.engine, self.time, self.prompts = engine, time, list[str]()

    def __call__(self, prompt: str, *, steps: int, **_: Any) -> Any:
        self.prompts.append(prompt)
        self.time.sleep(0.005)
        self.engine.encode_text(None)
        batch = self.engine.open(None, 1)
        slots = [batch.join(None)]
        for _index in range(steps):
            batch.step()
        batch.decode(slots, 0.5)
        return SimpleNamespace(timings_ms={}, engine=self.engine.describe(), parameters={})
