"""Samplers over training timesteps: latents are (image + sigma noise) / sqrt(1 + sigma^2), of unit variance.

alpha is 1 / sqrt(1 + sigma^2), the square root of the papers' cumulative alpha; eps is the noise in the latents.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.sampling.levels import Levels
from sdrt.runtime.sampling.trace import Latents, Trace


def _alpha(sigma: float) -> float:
    return 1 / math.hypot(1, sigma)


def ddim(trace: Trace, levels: Levels) -> None:
    """Song et al. 2020, "Denoising Diffusion Implicit Models", equation 12 with eta 0."""
    x = trace.start_scaled()
    for i, (sigma, sigma_next) in enumerate(levels.steps(), 1):
        denoised = trace.denoise_scaled(x, sigma)
        eps = (x / _alpha(sigma) - denoised) / sigma
        (x,) = trace.end_row(_alpha(sigma_next) * (denoised + sigma_next * eps), to=levels.sigmas[i], scaled=True)


def ddpm(trace: Trace, levels: Levels) -> None:
    """Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7: mean and variance of the posterior
    given the denoised estimate.
    """
    x = trace.start_scaled()
    for sigma, sigma_next in levels.steps():
        denoised = trace.denoise_scaled(x, sigma)
        alpha, alpha_next = _alpha(sigma), _alpha(sigma_next)
        ratio = (alpha / alpha_next) ** 2
        beta, beta_next = 1 - alpha**2, 1 - alpha_next**2
        mean = alpha_next * (1 - ratio) / beta * denoised + math.sqrt(ratio) * beta_next / beta * x
        (x,) = trace.end_row(mean + math.sqrt(beta_next / beta * (1 - ratio)) * trace.noise, to=sigma_next, scaled=True)


def plms(trace: Trace, levels: Levels, *, raw: bool = False) -> None:
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models", equations 9 and 12, started by an improved
    Euler step of two model calls.

    The second call repeats the first step with the mean of both outputs. `raw` extrapolates the network's prediction,
    as diffusers does; otherwise eps is extrapolated, as in AUTOMATIC1111. The two differ for v prediction.
    """
    x = trace.start_scaled()
    history: list[Latents] = []
    first = x
    for i, (sigma, sigma_next) in enumerate(levels.steps()):
        called = levels.sigmas[i]
        denoised = trace.denoise_scaled(x, called)
        out = trace.output(denoised) if raw else (x / _alpha(called) - denoised) / called
        if i == 1:
            blend, x = (out + history[0]) / 2, first
        else:
            history = [out, *history[:3]]
            weights = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))[
                len(history) - 1
            ]
            blend = sum((w * e for w, e in zip(weights, history, strict=True)), 0 * x)
        eps = trace.eps(blend, x, sigma) if raw else blend
        alpha, alpha_next = _alpha(sigma), _alpha(sigma_next)
        x_next = alpha_next / alpha * x + alpha_next * (sigma_next - sigma) * eps
        to = levels.sigmas[i + 1]
        if i == 0 and len(levels.timesteps) > 1:
            x, e, first = trace.end_row(x_next, history[0], x, to=to, scaled=True, end_step=False)
            history = [e]
        else:
            x, *history = trace.end_row(x_next, *history[:3], to=to, scaled=True)


def unipc(trace: Trace, levels: Levels, *, order: int = 2, variant: str = "bh2") -> None:
    """Zhao et al. 2023, "UniPC", algorithms 5 and 6: data prediction, multistep. `variant` is the choice of B(h).

    The corrector needs the denoised estimate of the next call. Everything else the corrector needs is carried along in
    one register, `corrected`.
    """
    x = trace.start_scaled()
    sigmas = levels.sigmas
    n = len(sigmas) - 1
    corrected: Latents | None = None
    gain = 0.0
    history: list[Latents] = []
    for i, (sigma, sigma_next) in enumerate(levels.steps()):
        denoised = trace.denoise_scaled(x, sigma)
        if sigma_next == 0:
            (x,) = trace.end_row(denoised, to=0.0, scaled=True)
            break
        if corrected is not None:
            x = corrected + gain * denoised
        history = [denoised, *history]
        p = min(order, n - i, len(history))
        alpha_next = _alpha(sigma_next)
        h = math.log(sigma / sigma_next)
        r = [math.log(sigma / sigmas[i - k]) / h for k in range(1, p)]
        D = [(history[k] - denoised) / r[k - 1] for k in range(1, p)]
        B = -h if variant == "bh1" else math.expm1(-h)
        predictor, corrector = _unipc_weights(r, h, B)
        base = alpha_next * sigma_next / (_alpha(sigma) * sigma) * x - alpha_next * math.expm1(-h) * denoised
        x_next = base - alpha_next * B * sum((w * d for w, d in zip(predictor, D, strict=True)), 0 * base)
        gain = -alpha_next * B * float(corrector[-1])
        correction = (
            base
            - alpha_next * B * sum((w * d for w, d in zip(corrector[:-1], D, strict=True)), 0 * base)
            - gain * denoised
        )
        x, corrected, *history = trace.end_row(x_next, correction, *history[: order - 1], to=sigma_next, scaled=True)


def _unipc_weights(r: list[float], h: float, B: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of predictor and corrector (Zhao et al. 2023, equation 5, in h' = -h). Order 1 and 2 have the paper's
    constant 1/2.
    """
    hh = -h
    phi, factorial = math.expm1(hh) / hh - 1, 1
    powers, b = [], []
    for k in range(1, len(r) + 2):
        powers.append(np.array([*r, 1.0]) ** (k - 1))
        b.append(phi * factorial / B)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    R, right = np.array(powers), np.array(b)
    half = np.array([0.5])
    predictor = np.array([]) if not r else half if len(r) == 1 else np.linalg.solve(R[:-1, :-1], right[:-1])
    return predictor, np.linalg.solve(R, right) if r else half


def tcd(trace: Trace, levels: Levels, gamma: float = 0.3) -> None:
    """Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 4: down to a timestep below the next one,
    then up to the next one with fresh noise.
    """
    x = trace.start_scaled()
    timesteps = (*levels.timesteps, 0.0)
    for i, (sigma, sigma_next) in enumerate(levels.steps(), 1):
        denoised = trace.denoise_scaled(x, sigma)
        eps = (x / _alpha(sigma) - denoised) / sigma
        # In float32, as diffusers rounds it: of timestep 730 that makes 511, of float64 510.
        below = float(trace.training[math.floor(np.float32(1 - gamma) * np.float32(timesteps[i]))])
        fresh = math.sqrt(sigma_next**2 - below**2)
        (x,) = trace.end_row(
            _alpha(sigma_next) * (denoised + below * eps + fresh * trace.noise), to=sigma_next, scaled=True
        )
