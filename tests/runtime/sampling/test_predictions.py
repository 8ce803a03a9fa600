"""What a network predicts and the levels that it was trained on: zero terminal SNR and EDM models as AUTOMATIC1111's
samplers run them, against k-diffusion's formulas in float64; that float32 bears all of it; and rescaled guidance.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from k_diffusion import REFERENCES, Denoiser, EdmDenoiser, noise_of, ramp, rescaled, sigmas_of
from numpy.typing import NDArray
from reference import relative
from sampler_machine import normals, run_machine, toy_network

from sdrt.bundle.manifest import PREDICTIONS, Diffusion
from sdrt.errors import BundleError, UsageError
from sdrt.runtime.engine import tables
from sdrt.runtime.sampling.registry import COMPATS, SAMPLERS, plan_rows, recipe
from sdrt.runtime.sampling.schedule import training_sigmas

Array = NDArray[np.float64]

EXACT = 1e-8
ZERO_SNR = rescaled(4.8973451890853435e-08)


@pytest.mark.parametrize("sampler", REFERENCES)
def test_zero_terminal_snr(sampler: str) -> None:
    diffusion = Diffusion(prediction="v", zero_snr=True)
    assert ZERO_SNR[-1] == pytest.approx(4518.765)
    for schedule, steps in itertools.product(SAMPLERS[sampler].schedules, (2, 5, 20)):
        rows = plan_rows(sampler, schedule, steps, diffusion)
        sigmas = sigmas_of(sampler, schedule, steps, ZERO_SNR)
        unit = next(normals(1))
        expected = REFERENCES[sampler](
            Denoiser(toy_network, "v", ZERO_SNR), unit * sigmas[0], sigmas, noise_of(sampler, 2)
        )
        assert relative(run_machine(rows, toy_network, unit, normals(2)), expected) < EXACT, (schedule, steps)


@pytest.mark.parametrize("prediction", ["edm", "v"])
@pytest.mark.parametrize("sampler", REFERENCES)
def test_networks_of_every_level(sampler: str, prediction: str) -> None:
    """`normal` is even in what the network is told, ln(sigma) / 4, which is even in log sigma."""
    low, high, data = 0.002, 80.0, 0.5
    diffusion = Diffusion(prediction=prediction, sigma_min=low, sigma_max=high, sigma_data=data)
    schedules = {
        "karras": lambda n: [root**7 for root in ramp(n, low ** (1 / 7), high ** (1 / 7))],
        "exponential": lambda n: [math.exp(log) for log in ramp(n, math.log(low), math.log(high))],
        "normal": lambda n: [math.exp(4 * t) for t in ramp(n, math.log(low) / 4, math.log(high) / 4)],
        "sgm_uniform": lambda n: [math.exp(4 * t) for t in ramp(n + 1, math.log(low) / 4, math.log(high) / 4)[:-1]],
    }
    for schedule, steps in itertools.product(schedules, (2, 5, 20)):
        discards = sampler in ("dpm2", "dpm2_a", "dpmpp_3m_sde")
        levels = schedules[schedule](steps + discards)
        sigmas = [*levels[: steps if discards else None], 0.0]
        rows = plan_rows(sampler, schedule, steps, diffusion)
        unit = next(normals(1))
        model = EdmDenoiser(toy_network, prediction, data)
        expected = REFERENCES[sampler](model, unit * sigmas[0], sigmas, noise_of(sampler, 2))
        assert relative(run_machine(rows, toy_network, unit, normals(2)), expected) < EXACT, (schedule, steps)


def test_samplers_of_timesteps_refuse_networks_of_every_level() -> None:
    diffusion = Diffusion(sigma_min=0.002, sigma_max=120.0)
    for sampler in ("ddim", "ddpm", "plms", "unipc", "lcm", "tcd"):
        with pytest.raises(UsageError, match=f"sampler {sampler}: .* every level from 0.002 to 120.0") as caught:
            plan_rows(sampler, SAMPLERS[sampler].schedules[0], 8, diffusion)
        assert "euler, " in caught.value.fix and "ddim" not in caught.value.fix
    with pytest.raises(UsageError, match="sampler heun") as caught:
        plan_rows("heun", "karras", 8, diffusion, compat="diffusers")
    assert caught.value.fix == "Choose one of: euler, dpmpp_2m, dpmpp_2m_sde."


@pytest.mark.parametrize("zero_snr", [False, True])
def test_levels_that_no_sampler_can_pass(zero_snr: bool) -> None:
    """A manifest may be a stranger's. Its betas, if each is in range, may still leave no signal at all."""
    with pytest.raises(BundleError, match="their noise levels do not rise, or end in no signal at all"):
        training_sigmas(Diffusion(beta_start=0.9, beta_end=0.9999, num_timesteps=10_000, zero_snr=zero_snr), 2.0**-24)


KINDS = {
    "discrete": {},
    "zero_snr": {"zero_snr": True},
    "cosxl": {"sigma_min": 0.002, "sigma_max": 120.0},
    "playground": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compat", COMPATS)
def test_float32_bears_every_sampler(compat: str, kind: str, prediction: str) -> None:
    """Tables and registers in float32, as engines have them, beside the same in float64: finite, and in ten steps off by
    a few roundings of the largest sigma, since its noise and the picture that is left of it share a register.
    """
    diffusion = Diffusion(prediction=prediction, **KINDS[kind])  # type: ignore[arg-type]
    loss = float(training_sigmas(diffusion, 4.8973451890853435e-08)[-1]) * 2.0**-23
    for sampler in SAMPLERS:
        try:
            schedules = recipe(sampler, compat, diffusion).schedules
        except UsageError:
            continue
        for schedule, (steps, strength) in itertools.product(schedules, ((1, None), (2, 0.6), (10, None), (10, 0.6))):
            try:
                rows = plan_rows(sampler, schedule, steps, diffusion, compat=compat, strength=strength)
            except UsageError:
                continue  # no step left
            unit, init = next(normals(1)), next(normals(3))
            exact = run_machine(rows, toy_network, unit, normals(2), init=init)
            table = tables(rows, [[1.0]] * len(rows))
            assert all(np.isfinite(column).all() for column in table.values())
            single = run_machine(table, toy_network, unit, normals(2), init=init, rows=rows, kind=np.float32)
            assert np.isfinite(single).all()
            off = np.abs(single - exact).max() / max(1.0, np.abs(exact).max())
            assert steps < 10 or off < 4 * loss, (sampler, schedule, steps, strength)
