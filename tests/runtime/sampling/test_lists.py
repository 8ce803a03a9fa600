"""Timesteps and sigmas in place of a schedule: as AUTOMATIC1111's samplers pass through them, which samplers take
them, and bad ones. tests/runtime/sampling/test_diffusers.py has them against diffusers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from k_diffusion import REFERENCES, SIGMAS, Denoiser, noise_of, t_to_sigma
from reference import relative
from sampler_machine import normals, run_machine, toy_network

from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError
from sdrt.runtime.sampling.registry import COMPATS, SAMPLERS, plan_rows

TIMESTEPS = (999, 749, 499, 249)
LEVELS = (14.615, 6.475, 3.861, 2.697, 1.886, 0.963, 0.399, 0.029, 0.0)
"""Like a published list of Align Your Steps (Sabour et al. 2024), whose ends lie a little outside of training's."""


@pytest.mark.parametrize("strength", [None, 0.6])
@pytest.mark.parametrize("sampler", REFERENCES)
def test_a_list_is_the_schedule(sampler: str, strength: float | None) -> None:
    """No schedule and no dropped level plays into it; an image takes the tail as AUTOMATIC1111 counts."""
    lists: list[tuple[dict[str, Any], list[float]]] = [
        ({"timesteps": TIMESTEPS}, [*map(t_to_sigma, TIMESTEPS), 0.0]),
        ({"sigmas": LEVELS}, list(LEVELS)),
    ]
    for given, sigmas in lists:
        rows = plan_rows(sampler, "karras", 20, Diffusion(prediction="v"), strength=strength, **given)
        unit, init = next(normals(1)), next(normals(3))
        steps = len(sigmas) - 1
        left = sigmas if strength is None else sigmas[steps - int(strength * steps) - 1 :]
        x = unit * left[0] + (0 if strength is None else init)
        expected = REFERENCES[sampler](Denoiser(toy_network, "v"), x, left, noise_of(sampler, 2))
        assert relative(run_machine(rows, toy_network, unit, normals(2), init=init), expected) < 1e-8, given


def test_a_distilled_model_is_told_the_timesteps_of_the_list() -> None:
    """AUTOMATIC1111's LCM rounds to the 50 timesteps of distillation; DMD2 was distilled at four others."""
    rows = plan_rows("lcm", "normal", 20, Diffusion(), timesteps=TIMESTEPS)
    assert [row.timestep for row in rows] == list(TIMESTEPS)
    assert [row.sigma for row in rows] == pytest.approx(SIGMAS[list(TIMESTEPS)])


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_which_samplers_take_them(sampler: str, compat: str) -> None:
    """Every sampler but those whose steps are tied to a spacing, and whole timesteps where it knows no others."""
    if SAMPLERS[sampler].diffusers is None and compat == "diffusers":
        return
    whole_only = ("ddpm", "tcd", *(("dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm") if compat == "diffusers" else ()))
    none = ("ddim", "plms", *(("unipc",) if compat == "a1111" else ()))
    for name, numbers in (("timesteps", TIMESTEPS), ("sigmas", LEVELS)):
        given: dict[str, Any] = {name: numbers}
        schedule = SAMPLERS[sampler].schedules[0]
        if sampler in none or (sampler in whole_only and name == "sigmas"):
            with pytest.raises(UsageError, match=f"{name}: sampler {sampler} takes no list of them") as caught:
                plan_rows(sampler, schedule, 20, Diffusion(), compat=compat, **given)
            assert "Choose one of: euler" in caught.value.fix or caught.value.fix == "Give it timesteps."
            continue
        rows = plan_rows(sampler, schedule, 20, Diffusion(), compat=compat, **given)
        assert len({row.step for row in rows}) == (4 if name == "timesteps" else 8)
        assert np.isfinite([row.M for row in rows]).all()


EVERY_LEVEL = Diffusion(prediction="edm", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)


@pytest.mark.parametrize(
    ("given", "diffusion", "message"),
    [
        ({"timesteps": TIMESTEPS, "sigmas": LEVELS}, Diffusion(), "timesteps: given beside sigmas"),
        ({"timesteps": []}, Diffusion(), "timesteps: 0 of them: expected 1 to 1000"),
        ({"timesteps": [999, 249, 499]}, Diffusion(), "timesteps: 249, 499: they rise\nGive them falling"),
        ({"timesteps": [249, 499, 749]}, Diffusion(), "timesteps: 249, 499: they rise"),
        ({"timesteps": [999, 499, 499]}, Diffusion(), "timesteps: 499 is given twice"),
        ({"timesteps": [1000, 499]}, Diffusion(), "timesteps: 1000: expected 999 to 0"),
        ({"timesteps": [99, 49]}, Diffusion(num_timesteps=50), "timesteps: 99: expected 49 to 0"),
        ({"timesteps": [499, -1]}, Diffusion(), "timesteps: -1: expected 999 to 0"),
        ({"timesteps": [999.5, 499]}, Diffusion(), r"timesteps: 999\.5: expected whole numbers"),
        ({"timesteps": [True]}, Diffusion(), "timesteps: True: expected whole numbers"),
        ({"timesteps": "999,499"}, Diffusion(), "timesteps: expected a list, found str"),
        ({"timesteps": list(range(5000, 3000, -1))}, Diffusion(num_timesteps=10_000), "timesteps: 2000 of them"),
        ({"timesteps": TIMESTEPS}, EVERY_LEVEL, "timesteps: a model trained on every level has no list"),
        ({"sigmas": []}, Diffusion(), "sigmas: 0 of them"),
        ({"sigmas": [0.0]}, Diffusion(), "sigmas: the last is 0\nLet one or more of them lead down to 0"),
        ({"sigmas": [14.6, 1.0]}, Diffusion(), "sigmas: the last is 1\n"),
        ({"sigmas": [14.6, 0.0, 0.0]}, Diffusion(), r"sigmas: 0: expected 14\.6146 to 0\.02917"),
        ({"sigmas": [80.0, 1.0, 0.0]}, Diffusion(), r"sigmas: 80: expected 14\.6146 to 0\.02917"),
        ({"sigmas": [14.6, 0.001, 0.0]}, Diffusion(), r"sigmas: 0\.001: expected"),
        ({"sigmas": [4.0, 8.0, 0.0]}, Diffusion(), "sigmas: 4, 8: they rise"),
        ({"sigmas": [4.0, 4.0, 0.0]}, Diffusion(), "sigmas: 4 is given twice"),
        ({"sigmas": [4.0, 3.99999, 0.0]}, Diffusion(), "sigmas: 4, 3.99999: too close"),
        ({"sigmas": [math.nan, 1.0, 0.0]}, Diffusion(), "sigmas: nan: expected"),
        ({"sigmas": [math.inf, 1.0, 0.0]}, Diffusion(), "sigmas: inf: expected"),
        ({"sigmas": [14.6, 1.0, math.nan]}, Diffusion(), "sigmas: the last is nan"),
        ({"sigmas": [14.6, "1", 0.0]}, Diffusion(), "sigmas: '1': expected numbers"),
        ({"sigmas": [4519.0, 100.0, 0.0], "sampler": "ddim"}, Diffusion(zero_snr=True), "sigmas: sampler ddim takes"),
        ({"sigmas": [5000.0, 100.0, 0.0]}, Diffusion(zero_snr=True), r"sigmas: 5000: expected 4518\.76"),
        ({"timesteps": [999, 499], "strength": 0.001, "compat": "diffusers"}, Diffusion(), "leaves no step"),
    ],
)
def test_bad_lists(given: dict[str, Any], diffusion: Diffusion, message: str) -> None:
    sampler = given.pop("sampler", "euler")
    with pytest.raises(UsageError, match=message):
        plan_rows(sampler, "karras", 20, diffusion, **given)


def test_as_many_as_there_are() -> None:
    assert len(plan_rows("euler", "normal", 20, Diffusion(), timesteps=list(range(999, -1, -1)))) == 1000
    assert len(plan_rows("euler", "normal", 20, Diffusion(zero_snr=True), sigmas=[4518.7, 60.0, 0.0])) == 2
    assert len(plan_rows("euler", "normal", 20, EVERY_LEVEL, sigmas=[80.0, 6.0, 0.002, 0.0])) == 3
