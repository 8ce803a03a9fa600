"""A Brownian path over noise levels. It equals torchsde's `BrownianTree` point for point, without torch.

Stochastic samplers take their noise from one path per picture, so that the noise does not depend on where the steps lie
(k-diffusion's `BrownianTreeNoiseSampler`). The path is a binary tree. Each node halves an interval and draws the value
in the middle by the Brownian bridge (Li et al. 2020, "Scalable Gradients for Stochastic Differential Equations",
section 4). Its place in the tree gives the seed.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_DIGITS = 6
"""Sigmas are rounded to this many decimal places: a tolerance of 1e-6."""
_POOL_SIZE = 24


_KEPT = 64
"""How many nodes are remembered. A step ends where the next one begins, so both walk nearly the same nodes."""


@dataclass(frozen=True)
class _Interval:
    """A node of the tree: its place in the tree, and the path's increment W over [start, end]."""

    start: float
    end: float
    key: int
    depth: int
    W: Array


class BrownianPath:
    """The path of one picture between two sigmas; `draw` gives the unit normals of a 32-bit seed. Not thread-safe."""

    def __init__(self, seed: int, sigma_min: float, sigma_max: float, draw: Callable[[int], Array]) -> None:
        self._seed = seed
        self._draw = draw
        self._halves: OrderedDict[tuple[int, int], tuple[_Interval, _Interval]] = OrderedDict()
        low, high = _single(sigma_min), _single(sigma_max)
        first = int(np.random.SeedSequence(entropy=seed, pool_size=_POOL_SIZE).generate_state(1)[0])
        self._root = _Interval(
            round(low, _DIGITS), round(high, _DIGITS), 0, 0, draw(first) * np.float32(math.sqrt(high - low))
        )

    def unit_increment(self, sigma: float, sigma_next: float) -> Array:
        """The path's increment from one sigma to another over the root of their distance: unit noise, float32."""
        low, high = sorted((_single(sigma), _single(sigma_next)))
        span = np.sqrt(np.float32(high) - np.float32(low))
        low, high = (min(max(round(end, _DIGITS), self._root.start), self._root.end) for end in (low, high))
        parts: list[Array] = []
        self._collect(self._root, low, high, parts)
        total = sum(parts[1:], parts[0]) if parts else np.zeros_like(self._root.W)
        if sigma > sigma_next:
            total = -total
        return np.asarray(total / span if span > 0 else total, np.float32)

    def _collect(self, node: _Interval, low: float, high: float, parts: list[Array]) -> None:
        """Append the increments of the largest nodes that make up [low, high] within `node`, left to right."""
        if low >= high:
            return
        if low == node.start and high == node.end:
            parts.append(node.W)
            return
        left, right = self._split(node)
        self._collect(left, low, min(high, left.end), parts)
        self._collect(right, max(low, right.start), high, parts)

    def _split(self, node: _Interval) -> tuple[_Interval, _Interval]:
        place = (node.key, node.depth)
        if place not in self._halves:
            self._halves[place] = self._halve(node)
            if len(self._halves) > _KEPT:
                self._halves.popitem(last=False)
        self._halves.move_to_end(place)
        return self._halves[place]

    def _halve(self, node: _Interval) -> tuple[_Interval, _Interval]:
        """The halves of a node, by the Brownian bridge at its middle."""
        middle = round(0.5 * (node.end + node.start), _DIGITS)
        seeds = np.random.SeedSequence(entropy=self._seed, spawn_key=(node.key, node.depth), pool_size=_POOL_SIZE)
        inverse = 1 / (node.end - node.start)
        before, after = middle - node.start, node.end - middle
        mean = np.float32(before) * node.W * np.float32(inverse)
        W = mean + np.float32(math.sqrt(before * after * inverse)) * self._draw(int(seeds.generate_state(1)[0]))
        return (
            _Interval(node.start, middle, 2 * node.key, node.depth + 1, W),
            _Interval(middle, node.end, 2 * node.key + 1, node.depth + 1, node.W - W),
        )


def _single(sigma: float) -> float:
    """Round to float32, as the tools store a sigma."""
    return float(np.float32(sigma))
