"""Seeded Gaussian noise, one stream per picture, so that a picture does not depend on its batch.

This file has the streams (`cpu` as torch draws on a CPU, `nv` as AUTOMATIC1111 draws by default) and the order in which
each tool draws from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import one_of
from sdrt.runtime.sampling.brownian import BrownianPath
from sdrt.runtime.sampling.trace import Row

Array = NDArray[np.float32]

MAX_SEED = 2**64 - 1
NOISES = ("cpu", "nv")
_BLOCK = 16


class CpuNoise:
    """The stream that `torch.Generator("cpu").manual_seed(seed)` gives `torch.randn`, without torch.

    PyTorch fills 24-bit uniforms from MT19937 (the seed cut to 32 bits) and applies Box-Muller to blocks of 16
    (aten/src/ATen/native/cpu/DistributionTemplates.h, `normal_fill`). Values differ from torch's by float32 rounding,
    below 5e-7.
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


def philox(counter: list[NDArray[np.uint64]], key: tuple[int, int]) -> list[NDArray[np.uint64]]:
    """Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four words of 32 bits per
    counter, in uint64.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    words, (key_0, key_1) = counter, key
    for _ in range(10):
        first, second = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (second >> half) ^ words[1] ^ np.uint64(key_0),
            second & low,
            (first >> half) ^ words[3] ^ np.uint64(key_1),
            first & low,
        ]
        key_0, key_1 = (key_0 + 0x9E3779B9) & 0xFFFFFFFF, (key_1 + 0xBB67AE85) & 0xFFFFFFFF
    return words


class NvNoise:
    """The stream AUTOMATIC1111 calls "NV", after CUDA's generator. Every value has a Philox counter of its own.

    The key is the seed, the counter is (draw, 0, index of the value, 0). The first two of the four words make one
    normal, by Box-Muller's sine. torch.randn on a GPU gives these values only for tensors that are small enough for one
    pass of its grid.
    """

    def __init__(self, seed: int) -> None:
        self._key = (seed & 0xFFFFFFFF, seed >> 32)
        self._draws = 0

    def draw(self, shape: tuple[int, ...]) -> Array:
        """The next unit normals, float32."""
        index = np.arange(int(np.prod(shape)), dtype=np.uint64)
        zero = np.zeros_like(index)
        words = philox([np.full_like(index, self._draws), zero, index, zero], self._key)
        self._draws += 1
        u = words[0] * 2.0**-32 + 2.0**-33
        v = (words[1] * 2.0**-32 + 2.0**-33) * (2 * np.pi)
        return np.asarray(np.sqrt(-2.0 * np.log(u)) * np.sin(v), np.float32).reshape(shape)


class Stream(Protocol):
    """Unit normals in the order they are drawn."""

    def draw(self, shape: tuple[int, ...]) -> Array: ...


def noise_stream(source: str, seed: int) -> Stream:
    """The stream of a seed, 0 to 2**64 - 1.

    Raises:
        UsageError: no source has this name.
    """
    one_of("noise", source, NOISES)
    return CpuNoise(seed) if source == "cpu" else NvNoise(seed)


@dataclass(frozen=True)
class Draws:
    """All noise of one picture, float32 `[4, h, w]` each: for the image's encoding, for the first latents, and for each
    of S rows (zero where a row takes none).

    `encode` and `masked` are for the encodings of the image and of the image under a mask. They are None unless asked
    for.
    """

    encode: Array | None
    unit: Array
    steps: Array
    masked: Array | None = None


def draw_noise(
    seed: int,
    source: str,
    shape: tuple[int, int, int],
    rows: Sequence[Row],
    *,
    compat: str,
    encode: bool = False,
    masked: bool = False,
) -> Draws:
    """The noise of one picture, drawn in the tool's order. `shape` is (4, h, w).

    diffusers draws everything from one generator: the sample of the image's posterior if one is encoded, the first
    latents, the sample of the masked image's posterior (its inpainting pipeline encodes that for every model), then a
    draw per row that asks for one. AUTOMATIC1111 takes the posterior's sample from a generator of the process, which no
    seed fixes, so `encode` and `masked` are zeros there: the mean. Brownian rows take no draws: their path is seeded
    with the picture's seed, and its points come from `source`.

    Raises:
        UsageError: no source has this name.
    """
    stream = noise_stream(source, seed)
    zeros = np.zeros(shape, np.float32)
    sampled = compat == "diffusers"
    encoded = (stream.draw(shape) if sampled else zeros) if encode else None
    unit = stream.draw(shape)
    under_mask = (stream.draw(shape) if sampled else zeros) if masked else None
    steps = np.zeros((len(rows), *shape), np.float32)
    path: BrownianPath | None = None
    for i, row in enumerate(rows):
        if row.noise == "draw":
            steps[i] = stream.draw(shape)
        elif row.noise is not None:
            assert row.brownian is not None, "a row that names an interval also names its path's span"
            path = path or BrownianPath(seed, *row.brownian, lambda point: noise_stream(source, point).draw(shape))
            steps[i] = path.unit_increment(*row.noise)
    return Draws(encoded, unit, steps, under_mask)
