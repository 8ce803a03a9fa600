"""k-diffusion's samplers and AUTOMATIC1111's schedules in plain float64, as the references that rows are tested
against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sampler_machine import interval_noise, normals

Array = NDArray[np.float64]
Network = Callable[[Array, float], Array]
"""Scaled latents and a fractional timestep to what the network predicts."""
Noise = Callable[[float, float], Array]
"""Unit noise of a step between two levels."""


ALPHAS = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
SIGMAS = np.sqrt((1 - ALPHAS) / ALPHAS)
LOG_SIGMAS = np.log(SIGMAS)


def rescaled(terminal: float) -> Array:
    """The levels after AUTOMATIC1111's `rescale_zero_terminal_snr_abar`, with a cumulative alpha of the last one."""
    root = np.sqrt(ALPHAS)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas = root**2
    alphas[-1] = terminal
    return np.asarray(np.sqrt((1 - alphas) / alphas))


def t_to_sigma(t: float, sigmas: Array = SIGMAS) -> float:
    logs = np.log(sigmas)
    low, high, w = math.floor(t), math.ceil(t), t - math.floor(t)
    return math.exp((1 - w) * logs[low] + w * logs[high])


def sigma_to_t(sigma: float, sigmas: Array = SIGMAS) -> float:
    """k-diffusion's `DiscreteSchedule.sigma_to_t` without quantising."""
    logs = np.log(sigmas)
    low = min(int(np.argmax(np.cumsum(math.log(sigma) - logs >= 0))), len(logs) - 2)
    w = (logs[low] - math.log(sigma)) / (logs[low] - logs[low + 1])
    w = min(max(w, 0.0), 1.0)
    return (1 - w) * low + w * (low + 1)


def ramp(n: int, low: float, high: float) -> list[float]:
    """n values from high to low, the first alone for one."""
    return [high + (i / (n - 1) if n > 1 else 0.0) * (low - high) for i in range(n)]


def reference_sigmas(schedule: str, n: int, table: Array = SIGMAS) -> list[float]:
    """The formulas of k-diffusion and of AUTOMATIC1111's sd_schedulers, over the levels of training."""
    match schedule:
        case "normal":
            return [*(t_to_sigma(t, table) for t in ramp(n, 0.0, 999.0)), 0.0]
        case "karras":
            return [*(root**7 for root in ramp(n, table[0] ** (1 / 7), table[-1] ** (1 / 7))), 0.0]
        case "exponential":
            return [*(math.exp(log) for log in ramp(n, math.log(table[0]), math.log(table[-1]))), 0.0]
        case "sgm_uniform":
            return [*(t_to_sigma(t, table) for t in ramp(n + 1, 0.0, 999.0)[:-1]), 0.0]
        case "simple":
            return [*(table[999 - int(i * 1000 / n)] for i in range(n)), 0.0]
        case "ddim_uniform":
            return [*(table[t] for t in reversed(range(1, 1000, max(1000 // n, 1)))), 0.0]
    raise ValueError(schedule)


def without_penultimate(schedule: str, n: int, table: Array = SIGMAS) -> list[float]:
    sigmas = reference_sigmas(schedule, n + 1, table)
    return [*sigmas[:-2], sigmas[-1]]


Model = Callable[[Array, float], Array]
"""Latents and their level to the denoised estimate."""


class Denoiser:
    """k-diffusion's `DiscreteEpsDDPMDenoiser` and `DiscreteVDDPMDenoiser`."""

    def __init__(self, network: Network, prediction: str, table: Array = SIGMAS) -> None:
        self.network, self.prediction, self.table = network, prediction, table

    def __call__(self, x: Array, sigma: float) -> Array:
        out = self.network(x / math.sqrt(sigma**2 + 1), sigma_to_t(sigma, self.table))
        if self.prediction == "epsilon":
            return x - sigma * out
        return x / (sigma**2 + 1) - out * sigma / math.sqrt(sigma**2 + 1)

    def eps(self, x: Array, t: float, alpha: float) -> Array:
        """The noise in latents of unit variance, as AUTOMATIC1111's timestep samplers take it."""
        out = self.network(x, t)
        if self.prediction == "epsilon":
            return out
        return math.sqrt(alpha) * out + math.sqrt(1 - alpha) * x


class EdmDenoiser:
    """Preconditioning of Karras et al. 2022, table 1, for networks trained on every level: k-diffusion's `Denoiser`,
    and with "v" `VDenoiser`, whose output has the other sign.
    """

    def __init__(self, network: Network, prediction: str, sigma_data: float) -> None:
        self.network, self.sign, self.sigma_data = network, {"edm": 1, "v": -1}[prediction], sigma_data

    def __call__(self, x: Array, sigma: float) -> Array:
        variance = sigma**2 + self.sigma_data**2
        out = self.network(x / math.sqrt(variance), math.log(sigma) / 4)
        return self.sigma_data**2 / variance * x + self.sign * sigma * self.sigma_data / math.sqrt(variance) * out


def get_ancestral_step(sigma: float, sigma_next: float) -> tuple[float, float]:
    up = min(sigma_next, math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


def sample_euler(model: Model, x: Array, sigmas: list[float], noise: Noise) -> Array:
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i])) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def sample_euler_ancestral(model: Model, x: Array, sigmas: list[float], noise: Noise) -> Array:
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        down, up = get_ancestral_step(sigmas[i], sigmas[i + 1])
        x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        if sigmas[i + 1] > 0:
            x = x + noise(sigmas[i], sigmas[i + 1]) * up
    return x


def sample_heun(model: Model, x: Array, sigmas: list[float], noise: Noise) -> Array:
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i])) / sigmas[i]
        dt = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            x_2 = x + d * dt
            d_2 = (x_2 - model(x_2, sigmas[i + 1])) / sigmas[i + 1]
            x = x + (d + d_2) / 2 * dt
    return x


def sample_lms(model: Model, x: Array, sigmas: list[float], noise: Noise, order: int = 4) -> Array:
    from scipy import integrate

    ds: list[Array] = []
    for i in range(len(sigmas) - 1):
        ds.append((x - model(x, sigmas[i])) / sigmas[i])
        n = min(i + 1, order)
        for j in range(n):

            def basis(tau: float, i: int = i, j: int = j, n: int = n) -> float:
                return math.prod((tau - sigmas[i - k]) / (sigmas[i - j] - sigmas[i - k]) for k in range(n) if k != j)

            x = x + integrate.quad(basis, sigmas[i], sigmas[i + 1], epsrel=1e-12)[0] * ds[-1 - j]
    return x


def sample_dpm_2(model: Model, x: Array, sigmas: list[float], noise: Noise, ancestral: bool = False) -> Array:
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i])) / sigmas[i]
        down, up = get_ancestral_step(sigmas[i], sigmas[i + 1]) if ancestral else (sigmas[i + 1], 0.0)
        if down == 0:
            x = x + d * (down - sigmas[i])
            continue
        middle = math.exp((math.log(sigmas[i]) + math.log(down)) / 2)
        x_2 = x + d * (middle - sigmas[i])
        x = x + (x_2 - model(x_2, middle)) / middle * (down - sigmas[i])
        if ancestral:
            x = x + noise(sigmas[i], sigmas[i + 1]) * up
    return x


def sample_dpm_2_ancestral(model: Model, x: Array, sigmas: list[float], noise: Noise) -> Array:
    return sample_dpm_2(model, x, sigmas, noise, ancestral=True)


def sample_dpmpp_2s_ancestral(model: Model, x: Array, sigmas: list[float], noise: Noise) -> Array:
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        down, up = get_ancestral_step(sigmas[i], sigmas[i + 1])
        if down == 0:
            x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        else:
            t, t_next = -math.log(sigmas[i]), -math.log(down)
            h = t_next - t
            s = t + h / 2
            x_2 = (math.exp(-s) / math.exp(-t)) * x - math.expm1(-h / 2) * denoised
            x = (math.exp(-t_next) / math.exp(-t)) * x - math.expm1(-h) * model(x_2, math.exp(-s))
        if sigmas[i + 1] > 0:
            x = x + noise(sigmas[i], sigmas[i + 1]) * up
    return x


def sample_dpmpp_sde(model: Model, x: Array, sigmas: list[float], noise: Noise) -> Array:
    r = 1 / 2
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            continue
        t, t_next = -math.log(sigmas[i]), -math.log(sigmas[i + 1])
        s = t + (t_next - t) * r
        factor = 1 / (2 * r)
        down, up = get_ancestral_step(math.exp(-t), math.exp(-s))
        s_down = -math.log(down)
        x_2 = (
            (math.exp(-s_down) / math.exp(-t)) * x
            - math.expm1(t - s_down) * denoised
            + noise(math.exp(-t), math.exp(-s)) * up
        )
        denoised_2 = model(x_2, math.exp(-s))
        down, up = get_ancestral_step(math.exp(-t), math.exp(-t_next))
        t_down = -math.log(down)
        blend = (1 - factor) * denoised + factor * denoised_2
        x = (
            (math.exp(-t_down) / math.exp(-t)) * x
            - math.expm1(t - t_down) * blend
            + noise(math.exp(-t), math.exp(-t_next)) * up
        )
    return x


def sample_dpmpp_2m(model: Model, x: Array, sigmas: list[float], noise: Noise) -> Array:
    old: Array | None = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = denoised  # the limit of h to infinity
            continue
        t, t_next = -math.log(sigmas[i]), -math.log(sigmas[i + 1])
        h = t_next - t
        blend = denoised
        if old is not None:
            r = (t + math.log(sigmas[i - 1])) / h
            blend = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = math.exp(-t_next) / math.exp(-t) * x - math.expm1(-h) * blend
        old = denoised
    return x


def sample_dpmpp_2m_sde(model: Model, x: Array, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Array:
    old: Array | None = None
    h_last = 0.0
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = denoised
            continue
        h = -math.log(sigmas[i + 1]) + math.log(sigmas[i])
        eta_h = eta * h
        x = sigmas[i + 1] / sigmas[i] * math.exp(-eta_h) * x - math.expm1(-h - eta_h) * denoised
        if old is not None:
            x = x - 0.5 * math.expm1(-h - eta_h) * (1 / (h_last / h)) * (denoised - old)
        x = x + noise(sigmas[i], sigmas[i + 1]) * sigmas[i + 1] * math.sqrt(-math.expm1(-2 * eta_h))
        old, h_last = denoised, h
    return x


def sample_dpmpp_3m_sde(model: Model, x: Array, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Array:
    denoised_1: Any = None
    denoised_2: Any = None
    h_1 = h_2 = 0.0
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = denoised
            continue
        h = -math.log(sigmas[i + 1]) + math.log(sigmas[i])
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if denoised_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        elif denoised_1 is not None:
            x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
        x = x + noise(sigmas[i], sigmas[i + 1]) * sigmas[i + 1] * math.sqrt(-math.expm1(-2 * h * eta))
        denoised_1, denoised_2, h_1, h_2 = denoised, denoised_1, h, h_1
    return x


REFERENCES = {
    "euler": sample_euler,
    "euler_a": sample_euler_ancestral,
    "heun": sample_heun,
    "lms": sample_lms,
    "dpm2": sample_dpm_2,
    "dpm2_a": sample_dpm_2_ancestral,
    "dpmpp_2s_a": sample_dpmpp_2s_ancestral,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_sde": sample_dpmpp_sde,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "dpmpp_3m_sde": sample_dpmpp_3m_sde,
}
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
DISCARDING = ("dpm2", "dpm2_a", "dpmpp_3m_sde")


def sigmas_of(sampler: str, schedule: str, n: int, table: Array = SIGMAS) -> list[float]:
    return (without_penultimate if sampler in DISCARDING else reference_sigmas)(schedule, n, table)


def noise_of(sampler: str, seed: int, shape: tuple[int, ...] = (6,)) -> Noise:
    """What the reference's steps draw: points of a path between levels, or the next of a stream."""
    if sampler in BROWNIAN:
        return interval_noise(shape)
    stream = normals(seed, shape)
    return lambda sigma, sigma_next: next(stream)
