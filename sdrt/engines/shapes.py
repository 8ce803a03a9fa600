"""What a batch of pictures asks of an engine, and which of these an engine takes: shapes as data. Standard library
only.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdrt.bundle.graphs import STEP
from sdrt.bundle.manifest import MAX_BATCH, MAX_BRANCHES, MAX_CHUNKS, MAX_SIDE, MIN_SIDE, Manifest
from sdrt.engines.record import EngineRecord
from sdrt.engines.targets import TARGETS

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class JobShape:
    """One batch: `size` (width, height) in pixels, `batch` pictures, `tokens` of the longest prompt with its padding,
    guidance `branches` of each picture.
    """

    size: Size
    batch: int
    tokens: int
    branches: int

    @property
    def options(self) -> str:
        """The options of `sdrt compile` that make an engine for it."""
        width, height = self.size
        return f"--size {width}x{height} --batch {self.batch} --tokens {self.tokens} --branches {self.branches}"


@dataclass(frozen=True)
class EngineShapes:
    """The batches an engine takes: smallest and largest of each, sizes as (width, height) in pixels; the numbers of
    guidance branches.
    """

    size: tuple[Size, Size]
    batch: tuple[int, int]
    tokens: tuple[int, int]
    branches: tuple[int, ...]

    def holds(self, shape: JobShape) -> bool:
        """Whether the engine takes a batch as it is."""
        (narrowest, lowest), (widest, highest) = self.size
        width, height = shape.size
        return (
            narrowest <= width <= widest
            and lowest <= height <= highest
            and self.batch[0] <= shape.batch <= self.batch[1]
            and self.tokens[0] <= shape.tokens <= self.tokens[1]
            and shape.branches in self.branches
        )

    def __str__(self) -> str:
        size = _span(*("x".join(map(str, size)) for size in self.size))
        guidance = f"{' or '.join(map(str, self.branches))} guidance branch{'es' * (self.branches != (1,))}"
        return f"{size}, batch {_span(*self.batch)}, {_span(*self.tokens)} tokens, {guidance}"


def _span(low: object, high: object) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def any_shapes(manifest: Manifest) -> EngineShapes:
    """What ONNX Runtime's graphs take: everything that a request may ask for."""
    chunk = manifest.chunk
    return EngineShapes(
        ((MIN_SIDE, MIN_SIDE), (MAX_SIDE, MAX_SIDE)),
        (1, MAX_BATCH),
        (chunk, chunk * MAX_CHUNKS),
        tuple(range(1, MAX_BRANCHES + 1)),
    )


def fills_up(record: EngineRecord) -> bool:
    """Whether an engine has static shapes, so that a batch that is not full is filled up."""
    return record.key.target in TARGETS and TARGETS[record.key.target].shapes == "static"


def shapes_of(record: EngineRecord, manifest: Manifest) -> EngineShapes:
    """What a compiled engine takes. One of static shapes takes smaller batches too: they are filled up."""
    if record.size is None or record.batch is None or record.tokens is None:
        return any_shapes(manifest)
    profiles = record.key.profiles.get(STEP)
    if not profiles or not {"init", "context"} <= profiles[0].shapes.keys():
        return EngineShapes(
            (record.size, record.size), (1, record.batch), (record.tokens, record.tokens), record.branches
        )
    low, factor = profiles[0].shapes["init"][0], manifest.latents.factor
    smallest = 1 if fills_up(record) else low[0]
    return EngineShapes(
        ((low[3] * factor, low[2] * factor), record.size),
        (smallest, record.batch),
        (profiles[0].shapes["context"][0][2], record.tokens),
        record.branches,
    )
