"""Which shapes an engine is compiled for: the ranges that the user asked for, and the range of each free axis of a
graph.

This file uses no engine API. A range is (smallest, best, largest). The best is the bundle's own value if the range
holds it, else the nearest value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sdrt.bundle.graphs import STEP, concrete, dimensions, signatures, table_rows
from sdrt.bundle.manifest import MAX_BATCH, MAX_BRANCHES, MAX_CHUNKS, MAX_SIDE, MIN_SIDE, SIZE_STEP, Manifest
from sdrt.engines.record import MAX_ROWS, Profile
from sdrt.errors import UsageError

Range = tuple[int, int, int]
Size = tuple[int, int]


@dataclass(frozen=True)
class Shapes:
    """The shapes an engine is compiled for: ranges of `width` and `height` in pixels, of pictures and of tokens; the
    numbers of guidance branches; and the table rows of a picture.
    """

    width: Range
    height: Range
    batch: Range
    tokens: Range
    branches: tuple[int, ...]
    rows: int


def resolve_shapes(
    manifest: Manifest,
    *,
    size: tuple[Size, Size] | None = None,
    batch: tuple[int, int] = (1, 1),
    tokens: tuple[int, int] | None = None,
    branches: tuple[int, ...] | None = None,
    rows: int = 128,
) -> Shapes:
    """Check the shapes that the user asked for. `size` is the smallest and largest (width, height). None takes the
    bundle's size, one chunk for `tokens`, and for `branches` those of a picture with and without guidance.

    Raises:
        UsageError: a value is out of range, or a range runs backwards.
    """
    chunk, own = manifest.chunk, manifest.latents.size
    branches = tuple(sorted({1, manifest.branches})) if branches is None else branches
    (low_width, low_height), (high_width, high_height) = size or (own, own)
    for side in (low_width, low_height, high_width, high_height):
        if side % SIZE_STEP or not MIN_SIDE <= side <= MAX_SIDE:
            raise UsageError(
                f"size: side of {side} pixels: expected a multiple of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}"
            )
    low_tokens, high_tokens = tokens or (chunk, chunk)
    for count in (low_tokens, high_tokens):
        if count % chunk or not 1 <= count // chunk <= MAX_CHUNKS:
            raise UsageError(
                f"tokens {count}: expected a multiple of {chunk}, this model's chunk, up to {chunk * MAX_CHUNKS}"
            )
    for count in batch:
        if not 1 <= count <= MAX_BATCH:
            raise UsageError(f"batch {count}: expected 1 to {MAX_BATCH}")
    if not branches or len(set(branches)) != len(branches) or not all(1 <= count <= MAX_BRANCHES for count in branches):
        raise UsageError(
            f"branches {','.join(map(str, branches))}: expected different numbers from 1 to {MAX_BRANCHES}"
        )
    if not 2 <= rows <= MAX_ROWS:
        raise UsageError(f"rows {rows}: expected 2 to {MAX_ROWS}")
    return Shapes(
        _range("size", low_width, own[0], high_width),
        _range("size", low_height, own[1], high_height),
        _range("batch", batch[0], 1, batch[1]),
        _range("tokens", low_tokens, chunk, high_tokens),
        tuple(sorted(branches)),
        rows,
    )


def _range(what: str, low: int, own: int, high: int) -> Range:
    if low > high:
        raise UsageError(f"{what}: the range runs from {low} to {high}", "Write the smaller one first.")
    return low, min(max(own, low), high), high


def axes(graph: str, shapes: Shapes, manifest: Manifest) -> list[dict[str, Range]]:
    """The range of each free axis of a graph, by the name of the axis in the ONNX file: one entry per optimization
    profile.

    The step has one profile for each number of guidance branches, other graphs have one in all. The text encoder takes
    all chunks of all branches' prompts at once, or any part of them. The VAE takes one picture: it alone fills a GPU,
    and what the VAE needs in between is by far the largest of all graphs.
    """
    factor, chunk = manifest.latents.factor, manifest.chunk
    low, best, high = shapes.batch

    def divided(sides: Range) -> Range:
        return sides[0] // factor, sides[1] // factor, sides[2] // factor

    known: dict[str, Range] = {
        "N": (low, best, high) if graph == STEP else (1, 1, 1),
        "h": divided(shapes.height),
        "w": divided(shapes.width),
        "T": shapes.tokens,
        "S": (table_rows(low, shapes.rows), table_rows(best, shapes.rows), table_rows(high, shapes.rows)),
        "n": (1, max(shapes.branches), max(shapes.branches) * shapes.tokens[2] // chunk),
    }
    if graph == STEP:
        return [known | {"G": (branches,) * 3} for branches in shapes.branches]
    return [known]


def profiles_of(graph: str, shapes: Shapes, manifest: Manifest) -> tuple[Profile, ...]:
    """Every input's shapes in each profile of a graph."""
    inputs = signatures(dimensions(manifest))[graph].inputs
    profiles = []
    for known in axes(graph, shapes, manifest):
        low, best, high = ({axis: sizes[i] for axis, sizes in known.items()} for i in range(3))
        profiles.append(
            Profile(
                {
                    name: (concrete(t.shape, low), concrete(t.shape, best), concrete(t.shape, high))
                    for name, t in inputs.items()
                }
            )
        )
    return tuple(profiles)


def largest_demand(shapes: Shapes, manifest: Manifest) -> tuple[str, str]:
    """The dimension that takes the most memory, compared with the bundle's own size, one picture and one chunk; and the
    flag that makes it smaller.
    """
    own = math.prod(manifest.latents.size)
    width, height = shapes.width[2], shapes.height[2]
    demands = {
        "--size": (width * height / own, f"the picture of {width}x{height} pixels"),
        "--batch": (shapes.batch[2], f"the batch of {shapes.batch[2]}"),
        "--tokens": (shapes.tokens[2] / manifest.chunk, f"the prompt of {shapes.tokens[2]} tokens"),
        "--branches": (max(shapes.branches) / manifest.branches, f"{max(shapes.branches)} guidance branches"),
    }
    flag = max(demands, key=lambda name: demands[name][0])
    return demands[flag][1], flag
