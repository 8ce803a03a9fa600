"""Samplers, schedules and counting as AUTOMATIC1111 has them, against the formulas of k-diffusion and of its own loops, here in plain float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import Graphs, relative
from sampler_machine import interval_noise, normals, run_machine, toy_network

from sdrt.bundle import Diffusion, open_bundle
from sdrt.errors import UsageError
from sdrt.runtime.engine import Engine, Job, load_engine, tables
from sdrt.runtime.noise import CpuNoise
from sdrt.runtime.samplers import COMPATS, SAMPLERS, parse_sampler, plan_rows
from sdrt.runtime.schedule import MAX_STEPS, SCHEDULES, timestep, training_sigmas

Array = NDArray[np.float64]
Network = Callable[[Array, float], Array]
"""Scaled latents and a fractional timestep to what the network predicts."""
Noise = Callable[[float, float], Array]
"""Unit noise of a step between two levels."""

EXACT = 1e-9

# The references.

ALPHAS = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
SIGMAS = np.sqrt((1 - ALPHAS) / ALPHAS)
LOG_SIGMAS = np.log(SIGMAS)


def t_to_sigma(t: float) -> float:
    low, high, w = math.floor(t), math.ceil(t), t - math.floor(t)
    return math.exp((1 - w) * LOG_SIGMAS[low] + w * LOG_SIGMAS[high])


def sigma_to_t(sigma: float) -> float:
    """k-diffusion's `DiscreteSchedule.sigma_to_t` without quantising."""
    low = min(int(np.argmax(np.cumsum(math.log(sigma) - LOG_SIGMAS >= 0))), len(LOG_SIGMAS) - 2)
    w = (LOG_SIGMAS[low] - math.log(sigma)) / (LOG_SIGMAS[low] - LOG_SIGMAS[low + 1])
    w = min(max(w, 0.0), 1.0)
    return (1 - w) * low + w * (low + 1)


def ramp(n: int, low: float, high: float) -> list[float]:
    """n values from high to low, the first alone for one."""
    return [high + (i / (n - 1) if n > 1 else 0.0) * (low - high) for i in range(n)]


def reference_sigmas(schedule: str, n: int) -> list[float]:
    """The formulas of k-diffusion and of AUTOMATIC1111's sd_schedulers."""
    match schedule:
        case "normal":
            return [*(t_to_sigma(t) for t in ramp(n, 0.0, 999.0)), 0.0]
        case "karras":
            return [*(root**7 for root in ramp(n, SIGMAS[0] ** (1 / 7), SIGMAS[-1] ** (1 / 7))), 0.0]
        case "exponential":
            return [*(math.exp(log) for log in ramp(n, LOG_SIGMAS[0], LOG_SIGMAS[-1])), 0.0]
        case "sgm_uniform":
            return [*(t_to_sigma(t) for t in ramp(n + 1, 0.0, 999.0)[:-1]), 0.0]
        case "simple":
            return [*(SIGMAS[999 - int(i * 1000 / n)] for i in range(n)), 0.0]
        case "ddim_uniform":
            return [*(SIGMAS[t] for t in reversed(range(1, 1000, max(1000 // n, 1)))), 0.0]
    raise ValueError(schedule)


def without_penultimate(schedule: str, n: int) -> list[float]:
    sigmas = reference_sigmas(schedule, n + 1)
    return [*sigmas[:-2], sigmas[-1]]


class Denoiser:
    """k-diffusion's `DiscreteEpsDDPMDenoiser` and `DiscreteVDDPMDenoiser`, and one that predicts the image."""

    def __init__(self, network: Network, prediction: str) -> None:
        self.network, self.prediction = network, prediction

    def __call__(self, x: Array, sigma: float) -> Array:
        out = self.network(x / math.sqrt(sigma**2 + 1), sigma_to_t(sigma))
        if self.prediction == "epsilon":
            return x - sigma * out
        if self.prediction == "sample":
            return out
        return x / (sigma**2 + 1) - out * sigma / math.sqrt(sigma**2 + 1)

    def eps(self, x: Array, t: float, alpha: float) -> Array:
        """The noise in latents of unit variance, as AUTOMATIC1111's timestep samplers take it."""
        out = self.network(x, t)
        if self.prediction == "epsilon":
            return out
        if self.prediction == "sample":
            return (x - math.sqrt(alpha) * out) / math.sqrt(1 - alpha)
        return math.sqrt(alpha) * out + math.sqrt(1 - alpha) * x


def get_ancestral_step(sigma: float, sigma_next: float) -> tuple[float, float]:
    up = min(sigma_next, math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


def sample_euler(model: Denoiser, x: Array, sigmas: list[float], noise: Noise) -> Array:
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i])) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def sample_euler_ancestral(model: Denoiser, x: Array, sigmas: list[float], noise: Noise) -> Array:
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        down, up = get_ancestral_step(sigmas[i], sigmas[i + 1])
        x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        if sigmas[i + 1] > 0:
            x = x + noise(sigmas[i], sigmas[i + 1]) * up
    return x


def sample_heun(model: Denoiser, x: Array, sigmas: list[float], noise: Noise) -> Array:
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


def sample_lms(model: Denoiser, x: Array, sigmas: list[float], noise: Noise, order: int = 4) -> Array:
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


def sample_dpm_2(model: Denoiser, x: Array, sigmas: list[float], noise: Noise, ancestral: bool = False) -> Array:
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


def sample_dpm_2_ancestral(model: Denoiser, x: Array, sigmas: list[float], noise: Noise) -> Array:
    return sample_dpm_2(model, x, sigmas, noise, ancestral=True)


def sample_dpmpp_2s_ancestral(model: Denoiser, x: Array, sigmas: list[float], noise: Noise) -> Array:
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


def sample_dpmpp_sde(model: Denoiser, x: Array, sigmas: list[float], noise: Noise) -> Array:
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
        x_2 = (math.exp(-s_down) / math.exp(-t)) * x - math.expm1(t - s_down) * denoised + noise(math.exp(-t), math.exp(-s)) * up
        denoised_2 = model(x_2, math.exp(-s))
        down, up = get_ancestral_step(math.exp(-t), math.exp(-t_next))
        t_down = -math.log(down)
        blend = (1 - factor) * denoised + factor * denoised_2
        x = (math.exp(-t_down) / math.exp(-t)) * x - math.expm1(t - t_down) * blend + noise(math.exp(-t), math.exp(-t_next)) * up
    return x


def sample_dpmpp_2m(model: Denoiser, x: Array, sigmas: list[float], noise: Noise) -> Array:
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


def sample_dpmpp_2m_sde(model: Denoiser, x: Array, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Array:
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


def sample_dpmpp_3m_sde(model: Denoiser, x: Array, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Array:
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
CASES = [(key, schedule) for key in REFERENCES for schedule in SCHEDULES]


def sigmas_of(sampler: str, schedule: str, n: int) -> list[float]:
    return (without_penultimate if sampler in DISCARDING else reference_sigmas)(schedule, n)


def noise_of(sampler: str, seed: int, shape: tuple[int, ...] = (6,)) -> Noise:
    """What the reference's steps draw: points of a path between levels, or the next of a stream."""
    if sampler in BROWNIAN:
        return interval_noise(shape)
    stream = normals(seed, shape)
    return lambda sigma, sigma_next: next(stream)


def shrinking(x_scaled: Array, t: float) -> Array:
    """The noise prediction whose denoised estimate is x / (1 + sigma^2)."""
    sigma = t_to_sigma(t)
    x = x_scaled * math.sqrt(1 + sigma**2)
    return (x - x / (1 + sigma**2)) / sigma


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_rows_are_the_sampler(sampler: str, schedule: str, prediction: str) -> None:
    for steps in (1, 2, 3, 20):
        rows = plan_rows(sampler, schedule, steps, Diffusion(prediction=prediction))
        x = next(normals(1))
        sigmas = sigmas_of(sampler, schedule, steps)
        expected = REFERENCES[sampler](Denoiser(toy_network, prediction), x * sigmas[0], sigmas, noise_of(sampler, 2))
        assert relative(run_machine(rows, toy_network, x, normals(2)), expected) < EXACT
        assert relative(run_machine(tables(rows, [1.0]), toy_network, x, normals(2), rows=rows), expected) < 1e-5


@pytest.mark.parametrize(("sampler", "expected"), [("euler", [0.682161, -1.364322]), ("dpmpp_2m", [1.060861, -2.121722]), ("euler_a", [1.032269, -1.100374])])
def test_known_trajectories(sampler: str, expected: list[float]) -> None:
    rows = plan_rows(sampler, "karras", 5, Diffusion())
    fresh = (np.array([0.5, -0.5]) * (i + 1) for i in range(5))
    assert run_machine(rows, shrinking, np.array([1.0, -2.0]), fresh) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sampler", ["heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde"])
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_two_model_calls_a_step_but_the_last(sampler: str, steps: int) -> None:
    rows = plan_rows(sampler, "normal", steps, Diffusion())
    assert len(rows) == 2 * steps - 1
    assert [row.step for row in rows] == [i // 2 for i in range(2 * steps - 1)]


def test_fresh_noise_only_where_it_is_used() -> None:
    for key, sampler in SAMPLERS.items():
        rows = plan_rows(key, sampler.schedules[0], 7, Diffusion())
        kinds = [("draw" if row.noise == "draw" else "path") if row.noise else "" for row in rows]
        twice = len(rows) > 7
        if key in ("euler_a", "lcm", "tcd", "ddpm"):
            assert kinds == ["draw"] * 6 + [""]
        elif key in ("dpm2_a", "dpmpp_2s_a"):
            assert kinds == ["", "draw"] * 6 + [""]
        elif key in BROWNIAN:
            assert kinds == (["path", "path"] if twice else ["path"]) * 6 + [""]
            assert all(row.brownian == (min(r.sigma for r in rows if not isinstance(r.step, float)), rows[0].sigma) for row in rows[:-1]) or twice
        else:
            assert not any(kinds)
        assert [row.draws for row in rows] == [bool(kind) for kind in kinds]


def test_known_schedules() -> None:
    training = training_sigmas(Diffusion())
    assert SCHEDULES["normal"](5, training) == pytest.approx([14.614641, 4.086081, 1.615580, 0.695150, 0.029167, 0.0], abs=1e-6)
    assert SCHEDULES["karras"](5, training) == pytest.approx([14.614641, 4.796535, 1.274100, 0.247950, 0.029167, 0.0], abs=1e-6)
    t = [timestep(sigma, training) for sigma in SCHEDULES["karras"](20, training)[:-1]]
    assert t[:4] == pytest.approx([999, 961.733, 921.042, 876.314], abs=1e-3)
    assert t[-3:] == pytest.approx([5.992, 1.783, 0], abs=1e-3)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 101, 1000])
def test_schedules(schedule: str, steps: int) -> None:
    found = SCHEDULES[schedule](steps, training_sigmas(Diffusion()))
    assert found == pytest.approx(reference_sigmas(schedule, steps), rel=1e-12, abs=0)
    assert all(a > b for a, b in pairwise(found)) and found[-1] == 0


def test_training_sigmas() -> None:
    training = training_sigmas(Diffusion())
    assert training[[0, -1]] == pytest.approx([0.0291672, 14.6146412], abs=1e-7)
    assert np.log(training) == pytest.approx(LOG_SIGMAS, rel=1e-12)


def test_timestep_of_sigma() -> None:
    training = training_sigmas(Diffusion())
    for sigma in np.exp(np.random.RandomState(0).uniform(LOG_SIGMAS[0], LOG_SIGMAS[-1], 200)):
        assert timestep(sigma, training) == pytest.approx(sigma_to_t(sigma), abs=1e-8)
    assert timestep(1e-3, training) == 0 and timestep(100.0, training) == 999


# From an image


@pytest.mark.parametrize(("strength", "steps", "fix", "calls"), [
    (0.75, 20, False, 16), (1.0, 20, False, 20), (0.5, 20, False, 11), (0.01, 20, False, 1), (0.3, 7, False, 3), (0.75, 20, True, 20), (0.01, 3, True, 3),
])  # fmt: skip
def test_steps_left_of_an_image(strength: float, steps: int, fix: bool, calls: int) -> None:
    """`setup_img2img_steps`: t_enc = int(min(strength, 0.999) steps), and t_enc + 1 calls; or as many as asked for, of a longer schedule."""
    rows = plan_rows("euler", "normal", steps, Diffusion(), strength=strength, fix_steps=fix)
    whole = int(steps / min(strength, 0.999)) if fix else steps
    assert len(rows) == calls
    assert [row.sigma for row in rows] == pytest.approx(reference_sigmas("normal", whole)[whole - calls : whole])


@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_start_from_an_image(sampler: str, schedule: str) -> None:
    rows = plan_rows(sampler, schedule, 8, Diffusion(), strength=0.6)
    init, x = next(normals(3)), next(normals(4))
    sigmas = sigmas_of(sampler, schedule, 8)[8 - int(0.6 * 8) - 1 :]
    expected = REFERENCES[sampler](Denoiser(toy_network, "epsilon"), init + sigmas[0] * x, sigmas, noise_of(sampler, 5))
    assert relative(run_machine(rows, toy_network, x, normals(5), init=init), expected) < EXACT


@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_inpainting_blends_the_denoised_estimate(sampler: str, schedule: str) -> None:
    """CFGDenoiser's blend after guidance, and the finished latents' own: outside the mask nothing changes, inside stays the image."""
    rows = plan_rows(sampler, schedule, 8, Diffusion(), strength=0.6, masked=True)
    init, x, mask = next(normals(3)), next(normals(4)), np.array([1.0, 0, 1, 1, 0, 0])
    sigmas = sigmas_of(sampler, schedule, 8)[8 - int(0.6 * 8) - 1 :]
    model = Denoiser(toy_network, "epsilon")

    class Blending(Denoiser):
        def __call__(self, x: Array, sigma: float) -> Array:
            return init * mask + (1 - mask) * model(x, sigma)

    expected = REFERENCES[sampler](Blending(toy_network, "epsilon"), init + sigmas[0] * x, sigmas, noise_of(sampler, 5))
    expected = init * mask + (1 - mask) * expected
    found = run_machine(rows, toy_network, x, normals(5), init=init, mask=mask)
    assert relative(found, expected) < EXACT
    assert found[mask == 1] == pytest.approx(init[mask == 1], rel=1e-12)


def test_no_mask_no_blend() -> None:
    assert {row.inpaint for row in plan_rows("euler", "normal", 4, Diffusion(), strength=0.5)} == {(0.0, 0.0, 0.0)}
    assert [row.inpaint for row in plan_rows("euler", "normal", 3, Diffusion(), strength=1.0, masked=True)] == [(1, 0, 0), (1, 0, 0), (0, 1, 0)]


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("strength", [0, 0.0, -0.1, 1.5, 1.0001, math.nan])
def test_strength_out_of_range(strength: float, compat: str) -> None:
    with pytest.raises(UsageError, match=f"strength {strength}: expected more than 0 and at most 1"):
        plan_rows("ddpm", "leading", 20, Diffusion(), strength=strength, compat=compat)


# Names


@pytest.mark.parametrize(
    ("name", "schedule", "expected"),
    [
        ("euler", None, ("euler", "normal")),
        ("Euler", "karras", ("euler", "karras")),
        ("Euler", "Automatic", ("euler", "normal")),
        ("Euler a", None, ("euler_a", "normal")),
        ("EULER A  Karras", None, ("euler_a", "karras")),
        ("DPM++ 2M", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "discrete", ("dpmpp_2m", "normal")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M Karras", "Karras", ("dpmpp_2m", "karras")),
        ("dpm++ 2m", "Karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", None, ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE", None, ("dpmpp_2m_sde", "exponential")),
        ("DPM++ SDE Karras", None, ("dpmpp_sde", "karras")),
        ("DPM++ 3M SDE", "SGM Uniform", ("dpmpp_3m_sde", "sgm_uniform")),
        ("Euler SGM Uniform", None, ("euler", "sgm_uniform")),
        ("euler", "Uniform", ("euler", "normal")),
        ("LMS Karras", None, ("lms", "karras")),
        ("DPM2 a Karras", None, ("dpm2_a", "karras")),
        ("Heun", None, ("heun", "normal")),
        ("UniPC", None, ("unipc", "normal")),
        ("LCM", None, ("lcm", "normal")),
        ("EulerDiscreteScheduler", None, ("euler", "normal")),
        ("PNDMScheduler", None, ("plms", SAMPLERS["plms"].schedules[0])),
        ("DPMSolverMultistepScheduler", None, ("dpmpp_2m", "karras")),
    ],
)
def test_names(name: str, schedule: str | None, expected: tuple[str, str]) -> None:
    assert parse_sampler(name, schedule) == expected


@pytest.mark.parametrize(
    ("name", "schedule", "expected"),
    [
        ("Euler", None, ("euler", "linspace")),
        ("EulerDiscreteScheduler", "trailing", ("euler", "trailing")),
        ("EulerAncestralDiscreteScheduler", None, ("euler_a", "linspace")),
        ("DDIM", None, ("ddim", "leading")),
        ("PNDMScheduler", None, ("plms", "leading")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPMSolverSDEScheduler", None, ("dpmpp_sde", "linspace")),
        ("KDPM2AncestralDiscreteScheduler", "exponential", ("dpm2_a", "exponential")),
        ("UniPCMultistepScheduler", "automatic", ("unipc", "linspace")),
        ("LCMScheduler", None, ("lcm", "leading")),
    ],
)
def test_names_of_diffusers(name: str, schedule: str | None, expected: tuple[str, str]) -> None:
    assert parse_sampler(name, schedule, "diffusers") == expected


@pytest.mark.parametrize(
    ("name", "schedule", "compat", "message"),
    [
        ("eulr", None, "a1111", "did you mean 'euler'"),
        ("DPM++ 2", None, "a1111", "did you mean 'dpm\\+\\+ 2m'"),
        ("dpmpp2m", None, "a1111", "did you mean 'dpmpp_2m'"),
        ("EulerDiscretScheduler", None, "a1111", "did you mean 'eulerdiscretescheduler'"),
        ("DDIM CFG++", None, "a1111", "sampler 'DDIM CFG\\+\\+': unknown"),
        ("DPM fast", None, "a1111", "sampler 'DPM fast': unknown"),
        ("", None, "a1111", "sampler ''"),
        ("xyzzy", None, "a1111", "sampler 'xyzzy': unknown"),
        ("euler", "karas", "a1111", "did you mean 'karras'"),
        ("euler", "", "a1111", "schedule ''"),
        ("euler", "leading", "a1111", "euler cannot take it"),
        ("Heun leading", None, "a1111", "heun cannot take it"),
        ("euler", "simple", "diffusers", "euler cannot take it with --compat diffusers"),
        ("Euler a Karras", None, "diffusers", "euler_a cannot take it"),
        ("lcm", "karras", "diffusers", "lcm cannot take it"),
        ("DPM++ 2S a", None, "diffusers", "diffusers has no scheduler"),
        ("dpmpp_3m_sde", None, "diffusers", "diffusers has no scheduler"),
        ("euler", None, "comfy", "compat 'comfy': unknown"),
        ("euler", None, "difusers", "did you mean 'diffusers'"),
    ],
)
def test_unknown_names(name: str, schedule: str | None, compat: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_sampler(name, schedule, compat)
    assert caught.value.fix.startswith("Choose ")
    assert caught.value.exit_code == 2


def test_schedule_named_twice() -> None:
    with pytest.raises(UsageError, match="names schedule karras, but schedule 'simple' was asked for"):
        parse_sampler("Euler Karras", "simple")


def test_every_name_of_the_registry_is_understood() -> None:
    for key, sampler in SAMPLERS.items():
        assert parse_sampler(key)[0] == parse_sampler(sampler.label)[0] == parse_sampler(sampler.label.upper())[0] == key
        assert sampler.about and not sampler.about.endswith(".")
        for compat in COMPATS:
            found = sampler.a1111 if compat == "a1111" else sampler.diffusers
            for schedule in found.schedules if found else ():
                assert parse_sampler(key, schedule, compat) == (key, schedule)


@pytest.mark.parametrize("steps", [0, -1, MAX_STEPS + 1])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(UsageError, match=f"steps {steps}: expected 1 to"):
        plan_rows("euler", "normal", steps, Diffusion())


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_number_is_ever_bad(sampler: str, compat: str) -> None:
    """1 to 1000 steps give finite rows, or are refused in words where a schedule cannot be so coarse or fine."""
    how = SAMPLERS[sampler].a1111 if compat == "a1111" else SAMPLERS[sampler].diffusers
    for index, schedule in enumerate(how.schedules if how else ()):
        for steps in (1, 2, 3, 4, 50, 51, MAX_STEPS) if index < 2 else (1, 3, 51):
            for strength in (None, 1.0, 0.4, 0.001) if steps < 50 else (None,):
                try:
                    rows = plan_rows(sampler, schedule, steps, Diffusion(), compat=compat, strength=strength, masked=strength is not None)
                except UsageError as error:
                    assert error.fix and ("steps" in error.message or "strength" in error.message)
                    continue
                assert rows and all(0 <= row.timestep <= 999 and row.sigma > 0 for row in rows)
                assert np.isfinite([np.hstack([row.a, row.u, row.q, row.M.ravel(), row.inpaint]) for row in rows]).all()


# On the emoji model


@pytest.fixture(scope="module")
def engine(flat_bundle: Path) -> Engine:
    return load_engine(open_bundle(flat_bundle), "onnxruntime", None)


@pytest.fixture(scope="module")
def graphs(flat_bundle: Path) -> Graphs:
    return Graphs(flat_bundle)


@pytest.mark.parametrize("sampler", REFERENCES)
def test_whole_loop(engine: Engine, graphs: Graphs, sampler: str) -> None:
    """The engine over the tables, with the sampler's own schedule, against the formulas calling the same graph for its raw prediction only; two pictures, guided."""
    steps, shape, guidance, schedule = 8, (2, 4, 8, 8), 3.0, SAMPLERS[sampler].schedules[0]
    stream = CpuNoise(11)
    unit_noise = stream.draw(shape)
    random = np.random.RandomState(12)
    tokens = np.full((4, 77), 49407, np.int64)
    tokens[:, :4] = random.randint(300, 40_000, (4, 4))
    context = engine.encode_text(tokens, np.ones(tokens.shape, np.float32), 1)

    def network(x: Array, t: float) -> Array:
        out = graphs.unet(np.concatenate([x, x]).astype(np.float32), t, context).astype(np.float64)
        return (1 - guidance) * out[:2] + guidance * out[2:]

    rows = plan_rows(sampler, schedule, steps, Diffusion())
    noise = np.zeros((len(rows), *shape), np.float32)
    path = interval_noise(shape)
    for i, row in enumerate(rows):
        if row.noise is not None:
            noise[i] = stream.draw(shape) if row.noise == "draw" else path(*row.noise)
    zeros = np.zeros(shape, np.float32)
    denoising = engine.denoise(Job(tables(rows, [[1 - guidance, guidance]] * len(rows)), noise, (context,), (0,) * len(rows), zeros, unit_noise, zeros[:, :1]))
    for _ in rows:
        denoising.step()
    drawn = (noise[i].astype(np.float64) for i, row in enumerate(rows) if row.noise is not None)
    sigmas = sigmas_of(sampler, schedule, steps)
    start = unit_noise.astype(np.float64) * sigmas[0]
    expected = REFERENCES[sampler](Denoiser(network, "epsilon"), start, sigmas, lambda sigma, sigma_next: next(drawn))
    assert relative(denoising.latents(), expected) < 1e-4


def test_prediction_of_the_manifest_is_used() -> None:
    rows = {kind: plan_rows("euler", "normal", 3, replace(Diffusion(), prediction=kind)) for kind in ("epsilon", "v")}
    assert rows["epsilon"][0].q == pytest.approx(-14.6146412) and rows["v"][0].q == pytest.approx(-14.6146412 / math.hypot(1, 14.6146412))


def columns(table: Any) -> set[int]:
    return {len(column) for column in vars(table).values()}


def test_tables_are_float32_and_as_long_as_the_rows() -> None:
    table = tables(plan_rows("heun", "karras", 4, Diffusion()), [[-6.0, 7.0]] * 7)
    assert columns(table) == {7}
    assert {column.dtype for column in vars(table).values()} == {np.dtype(np.float32)}
    assert table.w.tolist() == [[-6.0, 7.0]] * 7 and not table.inpaint.any()
