"""The registry: names, what each tool takes, and arguments out of range."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError
from sdrt.runtime.sampling.registry import COMPATS, SAMPLERS, parse_sampler, plan_rows
from sdrt.runtime.sampling.schedule import MAX_STEPS


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
        assert (
            parse_sampler(key)[0] == parse_sampler(sampler.label)[0] == parse_sampler(sampler.label.upper())[0] == key
        )
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
                    rows = plan_rows(
                        sampler,
                        schedule,
                        steps,
                        Diffusion(),
                        compat=compat,
                        strength=strength,
                        masked=strength is not None,
                    )
                except UsageError as error:
                    assert error.fix and ("steps" in error.message or "strength" in error.message)
                    continue
                assert rows and all(0 <= row.timestep <= 999 and row.sigma > 0 for row in rows)
                assert np.isfinite([np.hstack([row.a, row.u, row.q, row.M.ravel(), row.inpaint]) for row in rows]).all()


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("strength", [0, 0.0, -0.1, 1.5, 1.0001, math.nan])
def test_strength_out_of_range(strength: float, compat: str) -> None:
    with pytest.raises(UsageError, match=f"strength {strength}: expected more than 0 and at most 1"):
        plan_rows("ddpm", "leading", 20, Diffusion(), strength=strength, compat=compat)


def test_networks_of_few_timesteps() -> None:
    """Every sampler plans or refuses in words for any length of training."""
    for timesteps in (2, 30, 51, 100):
        for key, sampler in SAMPLERS.items():
            for compat, how in (("a1111", sampler.a1111), ("diffusers", sampler.diffusers)):
                for steps in (1, 2, 30):
                    try:
                        rows = (
                            plan_rows(key, how.schedules[0], steps, Diffusion(num_timesteps=timesteps), compat=compat)
                            if how
                            else []
                        )
                    except UsageError as error:
                        assert "steps" in error.message
                        continue
                    assert all(np.isfinite(row.M).all() for row in rows)
