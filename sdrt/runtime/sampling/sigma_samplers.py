"""Samplers over noise levels, as in k-diffusion: latents are image + sigma noise.

Each is the code of its paper over the algebra of `trace.py`, in the symbols of k-diffusion: x latents, d the derivative
(x - denoised) / sigma, t = -log sigma, h a step in t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdrt.runtime.sampling.levels import Levels
from sdrt.runtime.sampling.trace import Latents, Noise, Trace


def ancestral(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """Split a step into two levels: a deterministic part goes down to the first, fresh noise of the second is added
    (k-diffusion).
    """
    up = min(sigma_next, eta * math.sqrt(max(0.0, sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)))
    return math.sqrt(sigma_next**2 - up**2), up


def euler(trace: Trace, levels: Levels) -> None:
    """Karras et al. 2022, algorithm 2 without churn and correction."""
    x = trace.start()
    for sigma, sigma_next in levels.steps():
        denoised = trace.denoise(x, sigma)
        d = (x - denoised) / sigma
        (x,) = trace.end_row(x + d * (sigma_next - sigma), to=sigma_next)


def euler_a(trace: Trace, levels: Levels) -> None:
    """Euler with ancestral noise (k-diffusion's `sample_euler_ancestral`, eta 1)."""
    x = trace.start()
    for sigma, sigma_next in levels.steps():
        sigma_down, sigma_up = ancestral(sigma, sigma_next)
        denoised = trace.denoise(x, sigma)
        d = (x - denoised) / sigma
        (x,) = trace.end_row(x + d * (sigma_down - sigma) + sigma_up * trace.noise, to=sigma_next)


def heun(trace: Trace, levels: Levels) -> None:
    """Karras et al. 2022, algorithm 2 without churn: two model calls a step, the last step one."""
    x = trace.start()
    for sigma, sigma_next in levels.steps():
        denoised = trace.denoise(x, sigma)
        d = (x - denoised) / sigma
        if sigma_next == 0:
            (x,) = trace.end_row(x + d * (sigma_next - sigma), to=sigma_next)
            continue
        x_2, x, d = trace.end_row(x + d * (sigma_next - sigma), x, d, to=sigma_next, end_step=False)
        d_2 = (x_2 - trace.denoise(x_2, sigma_next)) / sigma_next
        (x,) = trace.end_row(x + (d + d_2) / 2 * (sigma_next - sigma), to=sigma_next)


def _integral(nodes: Sequence[float], j: int, start: float, end: float) -> float:
    """The j-th Lagrange polynomial of at most four nodes over [start, end]: two Gauss points integrate a cubic
    exactly.
    """
    half, middle = (end - start) / 2, (end + start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return half * sum(
        math.prod((point - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j) for point in points
    )


def lms(trace: Trace, levels: Levels, *, counts_skipped: bool = False) -> None:
    """Linear multistep of order four (Adams-Bashforth) in sigma: the polynomial through the last derivatives,
    integrated over the step (k-diffusion's `sample_lms`).

    `counts_skipped` also counts the levels that an image skips among the four nodes, although they have no derivatives.
    diffusers does that.
    """
    x = trace.start()
    ds: list[Latents] = []
    sigmas = levels.sigmas
    for i, (sigma, sigma_next) in enumerate(levels.steps()):
        ds = [(x - trace.denoise(x, sigma)) / sigma, *ds]
        x_next = x
        passed = (*levels.skipped, *sigmas[: i + 1]) if counts_skipped else sigmas[: i + 1]
        nodes = passed[-4:][::-1]
        for j, d in enumerate(ds):
            x_next = x_next + _integral(nodes, j, sigma, sigma_next) * d
        x, *ds = trace.end_row(x_next, *ds[:3], to=sigma_next)


def dpm2(trace: Trace, levels: Levels, *, noisy: bool = False) -> None:
    """DPM-Solver-2's midpoint in log sigma on Karras et al.'s derivative. `noisy` adds ancestral noise (k-diffusion's
    `sample_dpm_2`, `sample_dpm_2_ancestral`).
    """
    x = trace.start()
    for sigma, sigma_next in levels.steps():
        sigma_down, sigma_up = ancestral(sigma, sigma_next) if noisy else (sigma_next, 0.0)
        d = (x - trace.denoise(x, sigma)) / sigma
        if sigma_down == 0:
            (x,) = trace.end_row(x + d * (sigma_down - sigma), to=sigma_next)
            continue
        sigma_mid = math.sqrt(sigma * sigma_down)
        x_2, x = trace.end_row(x + d * (sigma_mid - sigma), x, to=sigma_next, end_step=False)
        d_2 = (x_2 - trace.denoise(x_2, sigma_mid, listed=False)) / sigma_mid
        (x,) = trace.end_row(x + d_2 * (sigma_down - sigma) + sigma_up * trace.noise, to=sigma_next)


def dpmpp_2s_a(trace: Trace, levels: Levels) -> None:
    """Lu et al. 2022, "DPM-Solver++", algorithm 1 (single step, second order, r = 1/2) with ancestral noise."""
    x = trace.start()
    for sigma, sigma_next in levels.steps():
        sigma_down, sigma_up = ancestral(sigma, sigma_next)
        denoised = trace.denoise(x, sigma)
        if sigma_down == 0:
            (x,) = trace.end_row(denoised, to=sigma_next)
            continue
        h = math.log(sigma / sigma_down)
        sigma_mid = sigma * math.exp(-h / 2)
        x_2, x = trace.end_row(
            (sigma_mid / sigma) * x - math.expm1(-h / 2) * denoised, x, to=sigma_next, end_step=False
        )
        denoised_2 = trace.denoise(x_2, sigma_mid, listed=False)
        (x,) = trace.end_row(
            (sigma_down / sigma) * x - math.expm1(-h) * denoised_2 + sigma_up * trace.noise, to=sigma_next
        )


def dpmpp_sde(trace: Trace, levels: Levels) -> None:
    """DPM-Solver++ as a stochastic equation, second order with the midpoint in log sigma (k-diffusion's
    `sample_dpmpp_sde`, r = 1/2, eta 1).

    Both calls take their noise from the picture's Brownian path, starting at sigma: the first up to the midpoint, the
    second up to the next level.
    """
    x = trace.start()
    for sigma, sigma_next in levels.steps():
        denoised = trace.denoise(x, sigma)
        if sigma_next == 0:
            (x,) = trace.end_row(denoised, to=sigma_next)
            continue
        sigma_mid = math.sqrt(sigma * sigma_next)
        down, up = ancestral(sigma, sigma_mid)
        x_2 = (down / sigma) * x + (1 - down / sigma) * denoised + up * trace.noise
        x_2, x = trace.end_row(x_2, x, to=sigma_next, noise=(sigma, sigma_mid), end_step=False)
        denoised_2 = trace.denoise(x_2, sigma_mid, listed=False)
        down, up = ancestral(sigma, sigma_next)
        x_next = (down / sigma) * x + (1 - down / sigma) * denoised_2 + up * trace.noise
        (x,) = trace.end_row(x_next, to=sigma_next, noise=(sigma, sigma_next))


def dpmpp_2m(trace: Trace, levels: Levels) -> None:
    """Lu et al. 2022, "DPM-Solver++", algorithm 2 (multistep, second order)."""
    x = trace.start()
    old: Latents | None = None
    h_last = 0.0
    for sigma, sigma_next in levels.steps():
        denoised = trace.denoise(x, sigma)
        if sigma_next == 0:
            (x,) = trace.end_row(denoised, to=sigma_next)
            continue
        h = math.log(sigma / sigma_next)
        D = denoised
        if old is not None and h_last > 0:
            D = denoised + (h / (2 * h_last)) * (denoised - old)
        x, old = trace.end_row((sigma_next / sigma) * x - math.expm1(-h) * D, denoised, to=sigma_next)
        h_last = h


def dpmpp_2m_sde(trace: Trace, levels: Levels, *, brownian: bool = True) -> None:
    """DPM-Solver++ 2M as a stochastic equation, midpoint form, eta 1 (k-diffusion's `sample_dpmpp_2m_sde`; diffusers'
    "sde-dpmsolver++").

    With `brownian` the noise comes from the picture's Brownian path, otherwise from the picture's stream.
    """
    x = trace.start()
    old: Latents | None = None
    h_last = 0.0
    for sigma, sigma_next in levels.steps():
        denoised = trace.denoise(x, sigma)
        if sigma_next == 0:
            (x,) = trace.end_row(denoised, to=sigma_next)
            continue
        h = math.log(sigma / sigma_next)
        D = denoised
        if old is not None and h_last > 0:
            D = denoised + (h / (2 * h_last)) * (denoised - old)
        x_next = (
            (sigma_next / sigma) * math.exp(-h) * x
            - math.expm1(-2 * h) * D
            + sigma_next * math.sqrt(-math.expm1(-2 * h)) * trace.noise
        )
        noise: Noise = (sigma, sigma_next) if brownian else "draw"
        x, old = trace.end_row(x_next, denoised, to=sigma_next, noise=noise)
        h_last = h


def dpmpp_3m_sde(trace: Trace, levels: Levels) -> None:
    """DPM-Solver++ 3M as a stochastic equation, eta 1 (k-diffusion's `sample_dpmpp_3m_sde`); phi are the exponential
    integrator's functions.
    """
    x = trace.start()
    old: list[Latents] = []
    hs: list[float] = []
    for sigma, sigma_next in levels.steps():
        denoised = trace.denoise(x, sigma)
        if sigma_next == 0:
            (x,) = trace.end_row(denoised, to=sigma_next)
            continue
        h = math.log(sigma / sigma_next)
        x_next = (
            math.exp(-2 * h) * x
            - math.expm1(-2 * h) * denoised
            + sigma_next * math.sqrt(-math.expm1(-2 * h)) * trace.noise
        )
        phi_2 = math.expm1(-2 * h) / (2 * h) + 1
        phi_3 = phi_2 / (2 * h) - 0.5
        if len(old) == 2:
            r_0, r_1 = hs[0] / h, hs[1] / h
            d_0, d_1 = (denoised - old[0]) / r_0, (old[0] - old[1]) / r_1
            x_next = x_next + phi_2 * (d_0 + (d_0 - d_1) * r_0 / (r_0 + r_1)) - phi_3 * (d_0 - d_1) / (r_0 + r_1)
        elif len(old) == 1:
            x_next = x_next + phi_2 * (denoised - old[0]) * h / hs[0]
        x, *old = trace.end_row(x_next, denoised, *old[:1], to=sigma_next, noise=(sigma, sigma_next))
        hs = [h, *hs[:1]]


def lcm(trace: Trace, levels: Levels, *, scaled: bool = False) -> None:
    """Luo et al. 2023, "Latent Consistency Models", algorithm 3, with the boundary condition of its equation 9
    (sigma_data 1/2, timesteps times 10).

    `scaled` applies the boundary condition to latents divided by sqrt(1 + sigma^2), as diffusers does. AUTOMATIC1111
    does not divide.
    """
    x = trace.start()
    for i, (sigma, sigma_next) in enumerate(levels.steps(), 1):
        t = 10 * levels.timesteps[i - 1]
        c_skip, c_out = 0.25 / (t**2 + 0.25), t / math.sqrt(t**2 + 0.25)
        denoised = c_out * trace.denoise(x, sigma) + c_skip * x / (math.hypot(1, sigma) if scaled else 1.0)
        last = i == len(levels.timesteps)
        (x,) = trace.end_row(denoised if last else denoised + sigma_next * trace.noise, to=sigma_next)
