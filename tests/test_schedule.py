"""Noise levels and schedules against their formulas in plain float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from k_diffusion import LOG_SIGMAS, reference_sigmas, sigma_to_t

from sdrt.bundle.manifest import Diffusion
from sdrt.runtime.schedule import SCHEDULES, timestep, training_sigmas


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
