"""The algebra that samplers are written in: latents are vectors of coefficients, and rows of numbers come out.

A `Trace` stands in for the network. A sampler calls `denoise` with its latents and gets the denoised estimate back. It
combines both with ordinary arithmetic, and names the latents it wants to keep with `end_row`. The result is one row of
numbers per model call (docs/architecture.md, the linear machine). Nothing here touches pixels. Everything is float64 on
the host, once per picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.graphs import REGISTERS
from sdrt.bundle.manifest import Diffusion
from sdrt.runtime.sampling.levels import Levels
from sdrt.runtime.sampling.schedule import Sigmas, told_timestep

Latents = NDArray[np.float64]
"""Coefficients `[STATES]` over the registers, the denoised estimate D, the second combination E, and fresh noise."""

_DENOISED, _, _NOISE = range(REGISTERS, REGISTERS + 3)
STATES = REGISTERS + 3

Noise = Literal["draw"] | tuple[float, float] | None
"""Fresh unit noise of a row: none, the next draw of the picture's stream, or the increment of its Brownian path between
two sigmas.
"""


@dataclass(frozen=True)
class Row:
    """The numbers of one model call. The linear machine in docs/architecture.md names them.

    a, u `[R]`, M `[R, R+3]`. `inpaint` is (k, b, c), all 0 without a mask. `step` counts the sampler's own steps from
    0. `sigma` is the level of the call. Where `noise` names an interval of a Brownian path, `brownian` holds the ends
    of the whole path (smallest, largest sigma).
    """

    timestep: float
    a: Latents
    u: Latents
    q: float
    M: NDArray[np.float64]
    noise: Noise
    step: int
    sigma: float
    inpaint: tuple[float, float, float] = (0.0, 0.0, 0.0)
    brownian: tuple[float, float] | None = None


class Trace:
    """Records rows while a sampler runs. `diffusion` says what the network predicts. `from_image` says that the picture
    starts from init latents, not from noise alone.
    """

    def __init__(self, levels: Levels, training: Sigmas, diffusion: Diffusion, *, from_image: bool = False) -> None:
        self.rows: list[Row] = []
        self.noise = _unit(_NOISE)
        self.training = training
        self._levels = levels
        self._told = dict(zip(levels.sigmas, levels.timesteps, strict=False))
        self._diffusion = diffusion
        self._from_image = from_image
        self._call: tuple[float, Latents, Latents, float, float] | None = None
        self._step = 0

    def start(self) -> Latents:
        """The first latents: init latents plus noise at the first level. From text, unit noise at the scale of the
        tool.
        """
        if self._from_image:
            return _unit(0) + self._levels.start * _unit(1)
        return self._levels.noise_scale * _unit(1)

    def start_scaled(self) -> Latents:
        """The first latents divided by sqrt(1 + sigma^2), as variance-preserving samplers keep them. From text this is
        unit noise.
        """
        return self.start() / math.hypot(1, self._levels.start)

    def denoise(self, x: Latents, sigma: float, *, listed: bool = True) -> Latents:
        """The denoised estimate of latents `x` at level `sigma`: one model call.

        A level that the schedule does not list (a midpoint) is not `listed`. Its timestep lies between those of its
        neighbours, whatever the tool rounds.

        With s = sigma_data (1 but for EDM models) and c_in = 1 / sqrt(s^2 + sigma^2), the network's output being F:

            epsilon: D = x - sigma F(c_in x)                  v: D = (s c_in)^2 x - sigma s c_in F(c_in x)
            x0:      D = F(c_in x)                            edm: D = (s c_in)^2 x + sigma s c_in F(c_in x)
        """
        assert not x[REGISTERS:].any(), "a model call takes latents kept by end_row"
        u, q = self._form(x, sigma)
        told = self._told.get(sigma) if listed else None
        t = told_timestep(sigma, self.training, self._diffusion) if told is None else told
        self._call = (t, x[:REGISTERS] * self._c_in(sigma), u[:REGISTERS], q, sigma)
        return _unit(_DENOISED)

    def _c_in(self, sigma: float) -> float:
        return 1 / math.hypot(self._diffusion.sigma_data, sigma)

    def _form(self, x: Latents, sigma: float) -> tuple[Latents, float]:
        """u and q of D = u + q F."""
        skip = self._diffusion.sigma_data * self._c_in(sigma)
        if self._diffusion.prediction == "epsilon":
            return x, -sigma
        if self._diffusion.prediction == "x0":
            return 0 * x, 1.0
        return x * skip * skip, sigma * skip if self._diffusion.prediction == "edm" else -sigma * skip

    def denoise_scaled(self, x: Latents, sigma: float) -> Latents:
        """The same for latents that are already divided by sqrt(1 + sigma^2)."""
        return self.denoise(x * math.hypot(1, sigma), sigma)

    def output(self, denoised: Latents) -> Latents:
        """What the network predicted in the last model call."""
        assert self._call is not None
        _, _, u, q, _ = self._call
        return (denoised - np.pad(u, (0, STATES - REGISTERS))) / q

    def eps(self, output: Latents, x: Latents, sigma: float) -> Latents:
        """The noise in scaled latents `x` at level `sigma`, if the network predicted `output` for them."""
        x = x * math.hypot(1, sigma)
        u, q = self._form(x, sigma)
        return (x - u - q * output) / sigma

    def end_row(
        self, *kept: Latents, to: float, scaled: bool = False, noise: Noise = "draw", end_step: bool = True
    ) -> tuple[Latents, ...]:
        """Close the row of the last model call. `kept` are carried on. If the next row is the last, the first of them
        is the picture.

        A mask of diffusers' kind puts the init latents at level `to` into the first one; `scaled` says that the first
        one is divided by sqrt(1 + to^2). `noise` names the source of the noise, where the row holds any.
        """
        assert self._call is not None and len(kept) <= REGISTERS
        M = np.zeros((REGISTERS, STATES))
        M[: len(kept)] = kept
        t, a, u, q, sigma = self._call
        fresh = noise if M[:, _NOISE].any() else None
        scale = 1 / math.hypot(1, to) if scaled else 1.0
        self.rows.append(
            Row(
                t,
                a,
                u,
                q,
                M,
                fresh,
                self._step,
                sigma,
                (0.0, scale, scale * to),
                self._levels.brownian if isinstance(fresh, tuple) else None,
            )
        )
        self._call = None
        self._step += end_step
        return tuple(_unit(j) for j in range(len(kept)))


def _unit(index: int) -> Latents:
    vector = np.zeros(STATES)
    vector[index] = 1.0
    return vector
