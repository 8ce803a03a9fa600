"""Which shapes an engine is compiled for: the ranges asked for, and what they make of each axis that a graph leaves free.

Owns no engine API. A range is (smallest, best, largest); the best is the bundle's own value where the range holds it, else the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sdrt.bundle import MAX_BATCH, MAX_BRANCHES, MAX_CHUNKS, MAX_SIDE, MIN_SIDE, SIZE_STEP, STEP, Manifest
from sdrt.engine_record import MAX_ROWS, Profile
from sdrt.errors import MachineError, UsageError, printable

Range = tuple[int, int, int]
Size = tuple[int, int]


@dataclass(frozen=True)
class Shapes:
    """What an engine is compiled for: `width`, `height` in pixels, pictures and tokens as ranges; numbers of guidance branches; table rows."""

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
    branches: tuple[int, ...] = (1, 2),
    rows: int = 128,
) -> Shapes:
    """Check what was asked for. `size` is the smallest and largest (width, height); None takes the bundle's, one chunk for `tokens`.

    Raises:
        UsageError: a value is out of range, or a range runs backwards.
    """
    chunk, own = manifest.text.tokens, manifest.latents.size
    (low_width, low_height), (high_width, high_height) = size or (own, own)
    for side in (low_width, low_height, high_width, high_height):
        if side % SIZE_STEP or not MIN_SIDE <= side <= MAX_SIDE:
            raise UsageError(f"size: side of {side} pixels: expected a multiple of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}")
    low_tokens, high_tokens = tokens or (chunk, chunk)
    for count in (low_tokens, high_tokens):
        if count % chunk or not 1 <= count // chunk <= MAX_CHUNKS:
            raise UsageError(f"tokens {count}: expected a multiple of {chunk}, this model's chunk, up to {chunk * MAX_CHUNKS}")
    for count in batch:
        if not 1 <= count <= MAX_BATCH:
            raise UsageError(f"batch {count}: expected 1 to {MAX_BATCH}")
    if not branches or len(set(branches)) != len(branches) or not all(1 <= count <= MAX_BRANCHES for count in branches):
        raise UsageError(f"branches {','.join(map(str, branches))}: expected different numbers from 1 to {MAX_BRANCHES}")
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
    """What each free axis of a graph may be, by the name it has in the ONNX file: one entry per optimization profile.

    The step has a profile for each number of guidance branches, the others have one. The text encoder takes every chunk of every branch's
    prompt at once, or any part of them.
    """
    factor, chunk = manifest.latents.factor, manifest.text.tokens

    def divided(sides: Range) -> Range:
        return sides[0] // factor, sides[1] // factor, sides[2] // factor

    known: dict[str, Range] = {
        "N": shapes.batch,
        "h": divided(shapes.height),
        "w": divided(shapes.width),
        "T": shapes.tokens,
        "S": (shapes.rows,) * 3,
        "n": (1, max(shapes.branches), max(shapes.branches) * shapes.tokens[2] // chunk),
    }
    if graph == STEP:
        return [known | {"G": (branches,) * 3} for branches in shapes.branches]
    return [known]


def axis_range(expression: str, known: Mapping[str, Range]) -> Range:
    """A product of names and numbers such as `G*N` or `8*h`, as a range.

    Raises:
        MachineError: a name is unknown, so a newer sdrt wrote the graph.
    """
    result = (1, 1, 1)
    for factor in expression.split("*"):
        if factor.isdecimal():
            one: Range = (int(factor),) * 3
        elif factor in known:
            one = known[factor]
        else:
            raise MachineError(f"axis {printable(repr(expression))}: unknown to this version of sdrt", "Upgrade sdrt, or build the bundle again with it.")
        result = result[0] * one[0], result[1] * one[1], result[2] * one[2]
    return result


def profiles_of(inputs: Mapping[str, tuple[int | str, ...]], graph: str, shapes: Shapes, manifest: Manifest) -> tuple[Profile, ...]:
    """Every input's shapes in each profile of a graph. `inputs` holds their sides: numbers, or the names of free axes."""
    profiles = []
    for known in axes(graph, shapes, manifest):
        three = {}
        for name, sides in inputs.items():
            ranges = [axis_range(side, known) if isinstance(side, str) else (side,) * 3 for side in sides]
            three[name] = (tuple(r[0] for r in ranges), tuple(r[1] for r in ranges), tuple(r[2] for r in ranges))
        profiles.append(Profile(three))
    return tuple(profiles)


def largest_demand(shapes: Shapes, manifest: Manifest) -> tuple[str, str]:
    """The dimension that asks for the most memory beside the bundle's own size, one picture and one chunk, and the flag that lowers it."""
    own = math.prod(manifest.latents.size)
    width, height = shapes.width[2], shapes.height[2]
    demands = {
        "--size": (width * height / own, f"the picture of {width}x{height} pixels"),
        "--batch": (shapes.batch[2], f"the batch of {shapes.batch[2]}"),
        "--tokens": (shapes.tokens[2] / manifest.text.tokens, f"the prompt of {shapes.tokens[2]} tokens"),
        "--branches": (max(shapes.branches) / 2, f"{max(shapes.branches)} guidance branches"),
    }
    flag = max(demands, key=lambda name: demands[name][0])
    return demands[flag][1], flag
