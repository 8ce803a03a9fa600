"""Seeded Gaussian noise, one stream per picture, so that a picture does not depend on the batch it came in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

MAX_SEED = 2**64 - 1
_BLOCK = 16


class CpuNoise:
    """The stream `torch.Generator("cpu").manual_seed(seed)` gives `torch.randn`, without torch.

    PyTorch fills 24-bit uniforms from MT19937 (its seed cut to 32 bits) and applies Box-Muller to blocks of 16
    (aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill`). Differences to torch are of float32 rounding, below 5e-7.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._bits.state = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)  # type: ignore[assignment]

    def draw(self, shape: tuple[int, ...]) -> Array:
        """The next unit normals, float32. `shape` must hold at least 16 values: torch takes another path below that."""
        count = int(np.prod(shape))
        if count < _BLOCK:
            raise ValueError(f"noise of {count} values, expected at least {_BLOCK}")
        values = self._uniforms(count)
        whole = count - count % _BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole != count:  # torch redoes the last 16, overlapping the block before
            values[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return values.reshape(shape)

    def _uniforms(self, count: int) -> Array:
        bits = self._bits.random_raw(count) & np.uint64(0xFFFFFF)
        return bits.astype(np.float32) / np.float32(1 << 24)


def _box_muller(uniforms: Array) -> Array:
    u = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
    theta = np.float32(2 * np.pi) * u[:, 1]
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)
