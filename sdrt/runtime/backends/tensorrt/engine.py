"""The TensorRT backends: compiled engines on a GPU, one CUDA-graph launch per model call.

Everything a picture needs is on the device before its first step: tables, noise, context, registers. Two captured
graphs take turns (an engine's output must not alias its input), so between two steps the host launches one graph and
computes, allocates and copies nothing.

From the top down: this file is what a pipeline asks; `step` has the buffers and captured graphs of a running batch;
`picture` a batch's whole course as one graph; `capture` how a graph is made and checked; `plans` what is loaded on the
device; `kernels` what TensorRT-RTX compiled for it; `blocks` memory. Each knows those after it only.

This code has not run on a GPU yet; tests run it on a strict simulator of the two libraries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER, text_outputs
from sdrt.engines.shapes import EngineShapes, JobShape
from sdrt.engines.store import state_bytes
from sdrt.runtime.backends.tensorrt.plans import Plans
from sdrt.runtime.backends.tensorrt.step import TensorRtMemory, take_step
from sdrt.runtime.engine import BatchShape, Float, Pixels, context_and_pooled
from sdrt.runtime.request_memory import Demand
from sdrt.runtime.running_batch import Slots


class TensorRtEngine:
    """Thread-safe: a lock guards the stream, and each job has its own buffers, contexts and graphs."""

    def __init__(self, bundle: Bundle, target: str, device: int, whole_picture: bool | None = None) -> None:
        self.backend = target
        self.plans = Plans(bundle, target, device, whole_picture)
        self._bundle = bundle

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        return self.plans.shapes

    def serves(self, shape: JobShape) -> bool:
        return any(engine.holds(shape) for engine in self.shapes)

    def demand(self, shape: JobShape) -> Demand:
        if not self.serves(shape):
            raise self.plans.missing(
                f"no {self.backend} engine for {shape.options}; there is: {'; '.join(map(str, self.shapes))}", shape
            )
        factor = self._bundle.manifest.latents.factor
        needed = state_bytes(
            self._bundle.manifest,
            size=shape.size,
            batch=shape.batch,
            tokens=shape.tokens,
            rows=self.plans.rows(
                BatchShape(shape.size[1] // factor, shape.size[0] // factor, shape.tokens, shape.branches), shape.batch
            ),
            branches=shape.branches,
        )
        return Demand(needed, f"state {needed:,} bytes")

    def free_bytes(self, shape: JobShape) -> int | None:
        return None  # a job that finds no room raises ResourceError, and no system ends the process

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        first_input = next(iter(self.plans.signatures[TEXT_ENCODER].inputs))
        most, count = self.plans.record.key.profiles[TEXT_ENCODER][0].shapes[first_input][2][0], tokens.shape[1]
        groups = [tokens[:, first : first + most] for first in range(0, count, most)]
        outputs = zip(*(self._encode_group(group, clip_skip) for group in groups), strict=True)
        return context_and_pooled([np.concatenate(parts) for parts in outputs])

    def _encode_group(self, tokens: NDArray[np.int64], clip_skip: int) -> list[Float]:
        signature = self.plans.signatures[TEXT_ENCODER]
        inputs, wanted = dict(zip(signature.inputs, tokens, strict=True)), text_outputs(signature, clip_skip)
        with self.plans.guarded(TEXT_ENCODER):
            held = self.plans.run(TEXT_ENCODER, inputs, {"n": tokens.shape[1]}, *wanted)
            return [held.read(name) for name in wanted]

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        count, _, height, width = noise.shape
        with self.plans.guarded(VAE_ENCODER):
            self.plans.load(VAE_ENCODER)  # most pictures start from text: it is loaded when the first image comes
            sizes = {"N": count, "h": height, "w": width}
            return self.plans.run(VAE_ENCODER, {"pixels": pixels, "noise": noise}, sizes, "latents").read("latents")

    def open(self, shape: BatchShape, capacity: int) -> Slots:
        with self.plans.guarded(STEP):
            fewest = self.plans.record.key.profiles[STEP][self.plans.profile(shape)].shapes["init"][0][0]
            capacity = max(capacity, fewest)
            step = take_step(self.plans, shape, capacity)
            try:
                return Slots(TensorRtMemory(self.plans, step), self.plans.signatures[STEP], shape, capacity, step.rows)
            except BaseException:
                step.close(self.plans.stream)
                raise

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        with self.plans.guarded(VAE_DECODER):
            return self.plans.decode(latents, rounding)

    def describe(self) -> dict[str, Any]:
        return self.plans.describe()
