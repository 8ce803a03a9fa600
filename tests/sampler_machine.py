"""The step graph's arithmetic in float64, and the toy network and noise that samplers are tested with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.engine import Tables
from sdrt.runtime.samplers import Row

Array = NDArray[np.float64]


def toy_network(x: Array, t: float) -> Array:
    """Smooth, not linear, and different at every timestep."""
    return np.tanh(0.7 * x + 0.3 * np.roll(x, 1)) + 0.2 * np.sin(t / 70 + x)


def normals(seed: int, shape: tuple[int, ...] = (6,)) -> Iterator[Array]:
    random = np.random.RandomState(seed)
    while True:
        yield random.standard_normal(shape)


def interval_noise(shape: tuple[int, ...] = (6,)) -> Callable[[float, float], Array]:
    """In place of a Brownian path: numbers that depend on the interval, and smoothly, so that rounding of its ends does not matter."""
    phase = np.arange(math.prod(shape)).reshape(shape)
    return lambda sigma, sigma_next: np.sin(phase + 3 * math.log(sigma) - 2 * math.log(sigma_next))


def run_machine(
    table: Tables | Sequence[Row],
    network: Callable[[Array, float], Array],
    unit_noise: Array,
    fresh: Iterator[Array],
    *,
    init: Array | None = None,
    mask: Array | None = None,
    rows: Sequence[Row] | None = None,
) -> Array:
    """Register 0 after the last row. Rows that draw take from `fresh`, rows that name an interval from `interval_noise`; `rows` say which, for tables."""
    if isinstance(table, Tables):
        assert rows is not None
        columns = list(zip(table.timestep, table.a, table.u, table.q, table.M, table.inpaint, strict=True))
    else:
        rows = table
        columns = [(row.timestep, row.a, row.u, row.q, row.M, row.inpaint) for row in table]
    zero = np.zeros_like(unit_noise)
    path = interval_noise(unit_noise.shape)
    kept = zero if init is None else init
    mask = zero if mask is None else mask
    r = np.stack([kept, unit_noise, zero, zero])
    for (t, a, u, q, M, (k, b, c)), row in zip(columns, rows, strict=True):
        denoised = np.tensordot(u.astype(np.float64), r, 1) + float(q) * network(np.tensordot(a.astype(np.float64), r, 1), float(t))
        denoised = denoised + k * mask * (kept - denoised)
        noise = zero if row.noise is None else next(fresh) if row.noise == "draw" else path(*row.noise)
        r = np.tensordot(M.astype(np.float64), np.stack([*r, denoised, noise]), 1)
        r[0] += (1 - k) * mask * (b * kept + c * unit_noise - r[0])
    return np.asarray(r[0])
