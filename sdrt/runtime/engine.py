"""What the pipeline needs of a backend: the Engine and RunningBatch protocols, and the values that they speak of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.graphs import CONTEXT
from sdrt.engines.shapes import EngineShapes, JobShape
from sdrt.runtime.request_memory import Demand
from sdrt.runtime.sampling.registry import Row

FEW_CALLS = 8
"""Up to so many model calls, all of a picture is one launch on a GPU."""

Float = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, order=True)
class BatchShape:
    """What all pictures of a running batch share: latent rows and columns, prompt tokens, guidance branches."""

    height: int
    width: int
    tokens: int
    branches: int


@dataclass(frozen=True)
class Job:
    """One picture to denoise. Names, types and the shapes behind the first axis are those of the step's inputs
    (`sdrt.bundle.graphs`).

    tables: the picture's own rows, `[S, ...]` each, one per model call; noise is one of them. `next` is the batch's to
        fill in.
    inputs: what belongs to the picture: `mask` `[1, h, w]`, 1 keeps; `init` and `init_noise` `[C, h, w]`, registers 0
        and 1 at the start; `concat` `[G, C, h, w]` for models that see it beside the latents.
    contexts: sets of the inputs that prompts make (`OF_TEXT`), by name: `context` `[G, T, W]`, and `vector` `[G, V]`
        where the model has one. All sets have the same shapes.
    context_of_row: which of the sets each of the S rows takes.
    """

    tables: Mapping[str, Float]
    inputs: Mapping[str, Float]
    contexts: tuple[Mapping[str, Float], ...]
    context_of_row: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Model calls of the picture."""
        return len(self.context_of_row)

    @property
    def shape(self) -> BatchShape:
        height, width = self.inputs["init"].shape[1:]
        branches, tokens, _ = self.contexts[0][CONTEXT].shape
        return BatchShape(height, width, tokens, branches)


class RunningBatch(Protocol):
    """Slots for pictures of one shape that are denoised together. Not thread-safe; the engine it came from is.

    `capacity` is the number of slots. A picture may have fewer guidance branches than the batch. After its last row it
    stays as it is, whatever steps follow, until it leaves.
    """

    capacity: int

    def join(self, job: Job) -> int:
        """Put a picture into a free slot and return the slot, 0 to `capacity` - 1. No other slot is touched.

        Raises:
            UsageError: no slot is free, or the picture is of another shape.
        """

    def step(self) -> None:
        """One model call for every picture: the next row of each. It may still be running on the device when this
        returns.
        """

    def leave(self, slot: int) -> None:
        """Free a slot, finished or not."""

    def latents(self, slots: Sequence[int]) -> Float:
        """Register 0 of slots after the last step, `[len(slots), C, h, w]`, copied to the host."""

    def denoised(self, slots: Sequence[int]) -> Float:
        """The denoised estimates of the last step, `[len(slots), C, h, w]`, copied to the host."""

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        """Register 0 of slots as pixels `[len(slots), H, W, 3]`, and whether each picture was finite
        before the clamp.
        """

    def describe(self) -> dict[str, Any]:
        """What runs: as `Engine.describe`, for the engine that this batch took."""

    def close(self) -> None:
        """Give back what the batch holds. Calling it twice is fine; nothing else may be called after it."""


class InParts:
    """A running batch whose parts run one after the other within each step, since no engine takes all its pictures at
    once. Pictures of a batch do not see each other, so they are the same.
    """

    def __init__(self, parts: Sequence[RunningBatch]) -> None:
        self._parts = parts
        self._places: dict[int, tuple[int, int]] = {}
        self.capacity = sum(part.capacity for part in parts)

    def join(self, job: Job) -> int:
        part = next((i for i in range(len(self._parts)) if self._taken(i) < self._parts[i].capacity), 0)
        slot = next(slot for slot in range(self.capacity + 1) if slot not in self._places)
        self._places[slot] = part, self._parts[part].join(job)
        return slot

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def leave(self, slot: int) -> None:
        part, inner = self._places.pop(slot)
        self._parts[part].leave(inner)

    def latents(self, slots: Sequence[int]) -> Float:
        return np.concatenate(
            [self._parts[part].latents([inner]) for part, inner in map(self._places.__getitem__, slots)]
        )

    def denoised(self, slots: Sequence[int]) -> Float:
        return np.concatenate(
            [self._parts[part].denoised([inner]) for part, inner in map(self._places.__getitem__, slots)]
        )

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        decoded = [self._parts[part].decode([inner], rounding) for part, inner in map(self._places.__getitem__, slots)]
        pixels, finite = zip(*decoded, strict=True)
        return np.concatenate(pixels), np.concatenate(finite)

    def describe(self) -> dict[str, Any]:
        return self._parts[0].describe()

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def _taken(self, part: int) -> int:
        return sum(here == part for here, _ in self._places.values())


def context_and_pooled(outputs: Sequence[Float]) -> tuple[Float, Float]:
    """What `encode_text` gives, of the outputs of a text encoder that may give no pooled vector."""
    context, *pooled = outputs
    return context, pooled[0] if pooled else np.zeros((len(context), 0), np.float32)


def job_shape(shape: BatchShape, capacity: int, factor: int) -> JobShape:
    """What a running batch asks of an engine; `factor` pixels a side per latent."""
    return JobShape((shape.width * factor, shape.height * factor), capacity, shape.tokens, shape.branches)


class Engine(Protocol):
    """The graphs of one bundle, ready to run. Thread-safe."""

    backend: str

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        """The batches that engines lie ready for."""

    def serves(self, shape: JobShape) -> bool:
        """Whether `open` takes a batch of this shape, if need be in parts or compiled in memory first."""

    def demand(self, shape: JobShape) -> Demand:
        """About what memory a batch of this shape takes at its peak beside what is loaded: of the machine, or of the
        GPU.

        Raises:
            MissingEngineError: no engine serves it.
        """

    def free_bytes(self, shape: JobShape) -> int | None:
        """How much of that memory a batch of this shape may take; None where that is not known, or running out does no
        harm.
        """

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        """Token ids `[E, n, 77]` of the E text encoders to the context `[n, 77, C]`, their outputs side by side, and to
        the pooled vectors `[n, P]`; P is 0 for models that have none.
        """

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        """Pixels `[N, H, W, 3]` and unit noise `[N, 4, h, w]` (zeros for the posterior's mean) to latents `[N, 4, h,
        w]`.
        """

    def open(self, shape: BatchShape, capacity: int) -> RunningBatch:
        """A running batch with all slots free; it may have more of them than asked for.

        Raises:
            MissingEngineError: no engine serves this shape.
            ResourceError: out of memory.
        """

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        """Latents `[N, 4, h, w]` to pixels `[N, H, W, 3]` and whether each picture was finite before the
        clamp `[N]`.
        """

    def describe(self) -> dict[str, Any]:
        """What runs the bundle's own size: library and version, precision, threads or device."""


class Observer(Protocol):
    """What may watch a GPU engine at work. It must make nothing wait."""

    def count(self, what: str) -> None:
        """A launch, a copy (`h2d`, `d2h`) or an allocation is about to start."""

    def around(self, graph: str, stream: Any, start: Callable[[], None]) -> None:
        """Start a run of a graph on a stream, with whatever the observer puts before and after it."""


class Watched:
    """Passes on what a GPU engine starts, where somebody observes it. Apart from the engine, so that its buffers need
    not hold it.
    """

    def __init__(self) -> None:
        self.observer: Observer | None = None

    def count(self, what: str) -> None:
        if self.observer is not None:
            self.observer.count(what)

    def around(self, graph: str, stream: Any, start: Callable[[], None]) -> None:
        if self.observer is None:
            start()
        else:
            self.observer.around(graph, stream, start)


Observe = Callable[[Callable[[], Engine]], Engine]
"""Calls what it is given, which loads the engine, and returns what a pipeline is to use: that engine, or one of its own
around it.
"""


def tables(
    rows: Sequence[Row],
    guidance: Sequence[Sequence[float]],
    *,
    conditional: Sequence[float] = (),
    rescale: float = 0.0,
    told_guidance: float | None = None,
) -> dict[str, Float]:
    """Rows as the graph takes them, all tables but `noise` and `next`.

    guidance: for each row the weights of the branches of the guidance batch; each sums to 1.
    conditional: the weights of the branches in what the prompt alone gives, without guidance; they sum to 1. Needed
        where guidance is rescaled.
    rescale: phi, how far the deviation of the guided output is brought back to that of the conditional one, 0 to 1.
    told_guidance: the guidance scale, for a network that is told it; None for others.

    No sampler keeps the second combination: `v` is 0.
    """

    def column(values: list[Any]) -> Float:
        return np.array(values, dtype=np.float32)

    w = column(list(guidance))
    return {
        "timestep": column([row.timestep for row in rows]),
        "a": column([row.a for row in rows]),
        "w": w,
        "v": np.zeros_like(w),
        "rescale": np.zeros_like(w) + column([rescale * weight for weight in conditional] or [0.0]),
        "u": column([row.u for row in rows]),
        "q": column([row.q for row in rows]),
        "M": column([row.M for row in rows]),
        "inpaint": column([row.inpaint for row in rows]),
    } | ({} if told_guidance is None else {"guidance": column([told_guidance] * len(rows))})
