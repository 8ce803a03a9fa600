"""The step graph's arithmetic in float64 and on an engine, and the toy network and noise that samplers are tested
with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference import Graphs

from sdrt.runtime.engine import BatchShape, Engine, Job, tables
from sdrt.runtime.sampling.noise import CpuNoise
from sdrt.runtime.sampling.registry import Row

Array = NDArray[np.float64]


def toy_network(x: Array, t: float) -> Array:
    """Smooth, not linear, and different at every timestep."""
    return np.tanh(0.7 * x + 0.3 * np.roll(x, 1)) + 0.2 * np.sin(t / 70 + x)


def normals(seed: int, shape: tuple[int, ...] = (6,)) -> Iterator[Array]:
    random = np.random.RandomState(seed)
    while True:
        yield random.standard_normal(shape)


def interval_noise(shape: tuple[int, ...] = (6,)) -> Callable[[float, float], Array]:
    """In place of a Brownian path: numbers that depend on the interval, and smoothly, so that rounding of its ends does
    not matter.
    """
    phase = np.arange(math.prod(shape)).reshape(shape)
    return lambda sigma, sigma_next: np.sin(phase + 3 * math.log(sigma) - 2 * math.log(sigma_next))


def run_machine(
    table: Mapping[str, NDArray[np.float32]] | Sequence[Row],
    network: Callable[[Array, float], Array],
    unit_noise: Array,
    fresh: Iterator[Array],
    *,
    init: Array | None = None,
    mask: Array | None = None,
    rows: Sequence[Row] | None = None,
    kind: type[np.floating[Any]] = np.float64,
) -> Array:
    """Register 0 after the last row. Rows that draw take from `fresh`, rows that name an interval from
    `interval_noise`; `rows` say which, for tables. `kind` is the type of all numbers, float32 as on an engine.
    """
    if isinstance(table, Mapping):
        assert rows is not None
        columns = list(zip(*(table[name] for name in ("timestep", "a", "u", "q", "M", "inpaint")), strict=True))
    else:
        rows = table
        columns = [(row.timestep, row.a, row.u, row.q, row.M, row.inpaint) for row in table]
    zero = np.zeros_like(unit_noise, kind)
    path = interval_noise(unit_noise.shape)
    kept = zero if init is None else init.astype(kind)
    mask = zero if mask is None else mask.astype(kind)
    r = np.stack([kept, unit_noise.astype(kind), *[zero] * 6])
    for (t, a, u, q, M, inpaint), row in zip(columns, rows, strict=True):
        out = network(np.tensordot(a.astype(kind), r, 1), float(t)).astype(kind)
        denoised = np.tensordot(u.astype(kind), r, 1) + kind(q) * out
        k, b, c = map(kind, inpaint)
        denoised = denoised + k * mask * (kept - denoised)
        noise = zero if row.noise is None else next(fresh) if row.noise == "draw" else path(*row.noise)
        r = np.tensordot(M.astype(kind), np.stack([*r, denoised, zero, noise.astype(kind)]), 1)
        r[0] += (1 - k) * mask * (b * kept + c * unit_noise.astype(kind) - r[0])
    assert r.dtype == kind
    return r[0].astype(np.float64)


def run_engine(
    engine: Engine, graphs: Graphs, rows: Sequence[Row]
) -> tuple[Array, Callable[[Array, float], Array], Array, Iterator[Array]]:
    """Two small pictures, guided, through an engine.

    Gives the finished latents, and what a reference loop needs to make them again: the network (the same graph, asked
    for its raw prediction only), unit noise, and the fresh noise in the order that it was used.
    """
    shape, guidance = (2, 4, 8, 8), 3.0
    stream = CpuNoise(11)
    unit_noise = stream.draw(shape)
    tokens = np.full((4, 77), 49407, np.int64)
    tokens[:, :4] = np.random.RandomState(12).randint(300, 40_000, (4, 4))
    context, _ = engine.encode_text(tokens[None], 1)  # the negative of both pictures, then what both show

    def network(x: Array, t: float) -> Array:
        out = graphs.unet(np.concatenate([x, x]).astype(np.float32), t, context).astype(np.float64)
        return (1 - guidance) * out[:2] + guidance * out[2:]

    noise = np.zeros((len(rows), *shape), np.float32)
    path = interval_noise(shape)
    for i, row in enumerate(rows):
        if row.noise is not None:
            noise[i] = stream.draw(shape) if row.noise == "draw" else path(*row.noise)
    table = tables(rows, [[1 - guidance, guidance]] * len(rows))
    zeros = np.zeros(shape[1:], np.float32)
    batch = engine.open(BatchShape(*shape[2:], context.shape[1], 2), shape[0])
    slots = []
    for i in range(shape[0]):
        inputs = {"init": zeros, "init_noise": unit_noise[i], "mask": zeros[:1]}
        slots.append(
            batch.join(
                Job({**table, "noise": noise[:, i]}, inputs, ({"context": context[i :: shape[0]]},), (0,) * len(rows))
            )
        )
    for _ in rows:
        batch.step()
    drawn = (noise[i].astype(np.float64) for i, row in enumerate(rows) if row.noise is not None)
    return batch.latents(slots).astype(np.float64), network, unit_noise.astype(np.float64), drawn
