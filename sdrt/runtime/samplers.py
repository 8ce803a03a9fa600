"""Samplers as tables. Each sampler is the paper's code, written once over an algebra in which latents are coefficient vectors.

A `Trace` stands in for the network: a sampler calls `denoise` with its latents and gets the denoised estimate back, combines them with
ordinary arithmetic, and names with `end_row` the latents it wants to keep. What comes out is one row of numbers per model call
(docs/architecture.md, the linear machine). Nothing here touches pixels; everything is float64 on the host, once per picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import REGISTERS, Diffusion
from sdrt.errors import UsageError, nearest
from sdrt.runtime.schedule import MAX_STEPS, SCHEDULES, Sigmas, timestep, training_sigmas

Latents = NDArray[np.float64]
"""Coefficients `[REGISTERS + 2]` over the registers, the denoised estimate and fresh noise."""


@dataclass(frozen=True)
class Row:
    """The numbers of one model call. `draws` says whether it takes fresh noise; `step` counts the sampler's own steps from 0."""

    timestep: float
    a: Latents
    u: Latents
    q: float
    M: NDArray[np.float64]
    draws: bool
    step: int
    sigma: float


class Trace:
    """Records rows while a sampler runs. `pure_noise` says the picture starts from noise alone, not from init latents."""

    def __init__(self, training: Sigmas, prediction: str, *, pure_noise: bool = True) -> None:
        self.rows: list[Row] = []
        self.pure_noise = pure_noise
        self.noise = _unit(REGISTERS + 1)
        self._training = training
        self._prediction = prediction
        self._call: tuple[float, Latents, Latents, float, float] | None = None
        self._step = 0

    def start(self, sigma: float) -> Latents:
        """Init latents (zeros for a picture from text) plus noise at level `sigma`."""
        return _unit(0) + sigma * _unit(1)

    def start_scaled(self, sigma: float) -> Latents:
        """The same divided by sqrt(1 + sigma^2), as variance-preserving samplers keep it; from text it is unit noise."""
        alpha = 1 / math.hypot(1, sigma)
        return alpha * _unit(0) + (1.0 if self.pure_noise else sigma * alpha) * _unit(1)

    def denoise(self, x: Latents, sigma: float) -> Latents:
        """The denoised estimate of latents `x` at level `sigma`: one model call.

        eps: D = x - sigma eps(c_in x). v: D = c_in^2 x - sigma c_in v(c_in x), with c_in = 1 / sqrt(1 + sigma^2).
        """
        return self._denoise(x, sigma, 1 / math.hypot(1, sigma))

    def denoise_scaled(self, x: Latents, sigma: float) -> Latents:
        """The same for latents already divided by sqrt(1 + sigma^2)."""
        return self._denoise(x * math.hypot(1, sigma), sigma, 1 / math.hypot(1, sigma))

    def _denoise(self, x: Latents, sigma: float, c_in: float) -> Latents:
        assert not x[REGISTERS:].any(), "a model call takes latents kept by end_row"
        u, q = (x * c_in * c_in, -sigma * c_in) if self._prediction == "v" else (x, -sigma)
        self._call = (timestep(sigma, self._training), x[:REGISTERS] * c_in, u[:REGISTERS], q, sigma)
        return _unit(REGISTERS)

    def end_row(self, *kept: Latents, end_step: bool = True) -> tuple[Latents, ...]:
        """Close the row of the last model call: `kept` are carried on, the first one being the picture if the next row is the last."""
        assert self._call is not None and len(kept) <= REGISTERS
        M = np.zeros((REGISTERS, REGISTERS + 2))
        M[: len(kept)] = kept
        t, a, u, q, sigma = self._call
        self.rows.append(Row(t, a, u, q, M, bool(M[:, REGISTERS + 1].any()), self._step, sigma))
        self._call = None
        self._step += end_step
        return tuple(_unit(j) for j in range(len(kept)))


def _unit(index: int) -> Latents:
    vector = np.zeros(REGISTERS + 2)
    vector[index] = 1.0
    return vector


def ancestral(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """Split a step into a deterministic part down to the first level returned and fresh noise of the second (k-diffusion)."""
    up = min(sigma_next, eta * math.sqrt(max(0.0, sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)))
    return math.sqrt(sigma_next**2 - up**2), up


def euler(trace: Trace, sigmas: Sequence[float]) -> None:
    """Karras et al. 2022, algorithm 2 without churn and correction."""
    x = trace.start(sigmas[0])
    for sigma, sigma_next in pairwise(sigmas):
        denoised = trace.denoise(x, sigma)
        d = (x - denoised) / sigma
        (x,) = trace.end_row(x + d * (sigma_next - sigma))


def euler_a(trace: Trace, sigmas: Sequence[float]) -> None:
    """Euler with ancestral noise (k-diffusion's `sample_euler_ancestral`, eta 1)."""
    x = trace.start(sigmas[0])
    for sigma, sigma_next in pairwise(sigmas):
        sigma_down, sigma_up = ancestral(sigma, sigma_next)
        denoised = trace.denoise(x, sigma)
        d = (x - denoised) / sigma
        (x,) = trace.end_row(x + d * (sigma_down - sigma) + sigma_up * trace.noise)


def heun(trace: Trace, sigmas: Sequence[float]) -> None:
    """Karras et al. 2022, algorithm 2 without churn: two model calls a step, the last step one."""
    x = trace.start(sigmas[0])
    for sigma, sigma_next in pairwise(sigmas):
        denoised = trace.denoise(x, sigma)
        d = (x - denoised) / sigma
        if sigma_next == 0:
            (x,) = trace.end_row(x + d * (sigma_next - sigma))
            continue
        x_2, x, d = trace.end_row(x + d * (sigma_next - sigma), x, d, end_step=False)
        d_2 = (x_2 - trace.denoise(x_2, sigma_next)) / sigma_next
        (x,) = trace.end_row(x + (d + d_2) / 2 * (sigma_next - sigma))


def ddim(trace: Trace, sigmas: Sequence[float]) -> None:
    """Song et al. 2020, "Denoising Diffusion Implicit Models", equation 12 with eta 0, on latents of unit variance."""
    x = trace.start_scaled(sigmas[0])
    for sigma, sigma_next in pairwise(sigmas):
        alpha, alpha_next = 1 / math.hypot(1, sigma), 1 / math.hypot(1, sigma_next)
        denoised = trace.denoise_scaled(x, sigma)
        eps = (x - alpha * denoised) / (sigma * alpha)
        (x,) = trace.end_row(alpha_next * denoised + sigma_next * alpha_next * eps)


def dpmpp_2m(trace: Trace, sigmas: Sequence[float]) -> None:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (multistep, second order), with t = -log sigma and h the step in it."""
    x = trace.start(sigmas[0])
    old: Latents | None = None
    h_last = 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = trace.denoise(x, sigma)
        if sigma_next == 0:
            (x,) = trace.end_row(denoised)
            continue
        h = math.log(sigma / sigma_next)
        D = denoised
        if old is not None:
            r = h_last / h
            D = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x, old = trace.end_row((sigma_next / sigma) * x - math.expm1(-h) * D, denoised)
        h_last = h


@dataclass(frozen=True)
class Sampler:
    """A sampler as users name it: `label` is AUTOMATIC1111's, the first of `schedules` is the default."""

    run: Callable[[Trace, Sequence[float]], None]
    label: str
    schedules: tuple[str, ...] = ("discrete", "karras")


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, "Euler"),
    "euler_a": Sampler(euler_a, "Euler a"),
    "heun": Sampler(heun, "Heun"),
    "ddim": Sampler(ddim, "DDIM", ("leading", "discrete", "karras")),
    "dpmpp_2m": Sampler(dpmpp_2m, "DPM++ 2M"),
}


def parse_sampler(name: str, schedule: str | None = None) -> tuple[str, str]:
    """Sampler and schedule from their names; AUTOMATIC1111's spelling ("DPM++ 2M Karras") is understood, and a schedule in it.

    Raises:
        UsageError: either is unknown, or the sampler cannot take the schedule.
    """
    labels = {sampler.label.lower(): key for key, sampler in SAMPLERS.items()}
    plain = " ".join(name.lower().split())
    for suffix in SCHEDULES:
        if plain.endswith(" " + suffix):
            if schedule is not None and schedule.lower() != suffix:
                raise UsageError(f"sampler {name!r}: names schedule {suffix}, but schedule {schedule!r} was asked for", "Give the schedule once.")
            plain, schedule = plain.removesuffix(" " + suffix), suffix
    key = labels.get(plain, plain)
    if key not in SAMPLERS:
        raise UsageError(f"sampler {name!r}: unknown{nearest(plain, [*SAMPLERS, *labels])}", f"Choose one of: {', '.join(SAMPLERS)}.")
    allowed = SAMPLERS[key].schedules
    chosen = allowed[0] if schedule is None else schedule.lower()
    if chosen not in SCHEDULES:
        raise UsageError(f"schedule {schedule!r}: unknown{nearest(chosen, SCHEDULES)}", f"Choose one of: {', '.join(allowed)}.")
    if chosen not in allowed:
        raise UsageError(f"schedule {chosen!r}: sampler {key} cannot take it", f"Choose one of: {', '.join(allowed)}.")
    return key, chosen


def trace_rows(sampler: str, schedule: str, steps: int, diffusion: Diffusion, *, pure_noise: bool = True) -> list[Row]:
    """The rows of a sampler over a schedule, one per model call.

    Raises:
        UsageError: `steps` is out of range.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"steps {steps}: expected 1 to {MAX_STEPS}", "20 to 30 suit most samplers.")
    training = training_sigmas(diffusion)
    trace = Trace(training, diffusion.prediction, pure_noise=pure_noise)
    SAMPLERS[sampler].run(trace, SCHEDULES[schedule](steps, training))
    return trace.rows
