"""Samplers with --compat diffusers against diffusers' own schedulers, and its counting and blending from an image
against its pipelines.

The schedulers' cumulative alphas are set to float64 first; their sigmas and some updates stay float32, which is what
the 1e-5 leaves room for.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference import TRAINING, relative
from sampler_machine import interval_noise, normals, run_machine, toy_network

from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError
from sdrt.runtime.engine import tables
from sdrt.runtime.sampling.registry import SAMPLERS, Row, plan_rows

Array = NDArray[np.float64]

ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
LIMIT = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers, in numpy 2
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
SCHEDULES = {key: sampler.diffusers.schedules for key, sampler in SAMPLERS.items() if sampler.diffusers}


@functools.cache  # some take long to make, and set_timesteps clears what they remember
def scheduler_of(sampler: str, schedule: str, prediction: str = "epsilon") -> Any:
    """As Stable Diffusion's own configuration has it: steps_offset 1, set_alpha_to_one and clip_sample off, every other
    value the class's.
    """
    import diffusers

    settings: dict[str, Any] = {**TRAINING, "steps_offset": 1, "prediction_type": PREDICTIONS[prediction]}
    name = SAMPLERS[sampler].scheduler
    assert name is not None
    if sampler == "dpmpp_2m_sde":
        settings["algorithm_type"] = "sde-dpmsolver++"
    if sampler in ("ddim", "ddpm"):
        settings["clip_sample"] = False
    if sampler in ("ddim", "plms"):
        settings["set_alpha_to_one"] = False
    if sampler == "plms":
        settings["skip_prk_steps"] = True
    if schedule in ("karras", "exponential"):
        settings[f"use_{schedule}_sigmas"] = True
    elif sampler not in ("lcm", "tcd"):
        settings["timestep_spacing"] = schedule
    scheduler = getattr(diffusers, name.split()[0])(**settings)
    scheduler.alphas_cumprod = torch.from_numpy(ALPHAS)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Iterator[Array]]]:
    """The stream that every scheduler's `randn_tensor` draws from, in a list so that a test can renew it."""
    stream = [normals(2)]
    for name in ("ddpm", "euler_ancestral_discrete", "k_dpm_2_ancestral_discrete", "dpmsolver_multistep", "lcm", "tcd"):
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.from_numpy(next(stream[0]))[None])
    yield stream


def batch(latents: Array) -> Any:
    return torch.from_numpy(latents)[None]


def run_scheduler(scheduler: Any, timesteps: Any, x: Any, after: Any = None) -> Array:
    """The denoising loop of diffusers' pipelines."""
    path = interval_noise()
    scheduler.noise_sampler = lambda sigma, sigma_next: torch.from_numpy(path(float(sigma), float(sigma_next)))[None]
    for i, t in enumerate(timesteps):
        out = torch.from_numpy(toy_network(scheduler.scale_model_input(x, t).double().numpy(), float(t)))
        x = scheduler.step(out, t, x, return_dict=False)[0].double()
        if after is not None:
            x = after(i, x)
    return np.asarray(x[0].numpy())


def compared(case: object, rows: list[Row], expected: Array, unit: Array, **picture: Any) -> None:
    assert relative(run_machine(rows, toy_network, unit, normals(2), **picture), expected) < LIMIT, case
    by_table = run_machine(tables(rows, [[1.0]] * len(rows)), toy_network, unit, normals(2), rows=rows, **picture)
    assert relative(by_table, expected) < LIMIT, case


@pytest.mark.parametrize("sampler", SCHEDULES)
def test_text(drawn: list[Iterator[Array]], sampler: str) -> None:
    for case in itertools.product(SCHEDULES[sampler], PREDICTIONS, (1, 2, 3, 7, 20)):
        schedule, prediction, steps = case
        if (sampler, steps) == ("dpm2_a", 2):
            # The level between the two steps is sqrt(a - b) of two float32 numbers that agree in all but their last
            # bit: diffusers has 0 there on one processor and 0.02 timesteps on another.
            continue
        scheduler = scheduler_of(sampler, schedule, prediction)
        scheduler.set_timesteps(steps)
        rows = plan_rows(sampler, schedule, steps, Diffusion(prediction=prediction), compat="diffusers")
        assert [row.timestep for row in rows] == pytest.approx([float(t) for t in scheduler.timesteps], abs=2e-3), case
        drawn[0] = normals(2)
        unit = next(normals(1))
        expected = run_scheduler(scheduler, scheduler.timesteps, batch(unit) * float(scheduler.init_noise_sigma))
        compared(case, rows, expected, unit)


def start_from_image(sampler: str, schedule: str, steps: int, strength: float) -> tuple[Any, Any]:
    """A scheduler made ready by the real pipeline's counting, and the timesteps left."""
    from diffusers import StableDiffusionImg2ImgPipeline

    scheduler = scheduler_of(sampler, schedule)
    scheduler.set_timesteps(steps)
    timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(
        SimpleNamespace(scheduler=scheduler), steps, strength, "cpu"
    )
    return scheduler, timesteps


def image_schedules(sampler: str) -> list[str]:
    """The first schedule of a sampler, and those that count an image's steps in another way."""
    return [name for i, name in enumerate(SCHEDULES[sampler]) if i == 0 or name in ("karras", "trailing")]


@pytest.mark.parametrize("sampler", SCHEDULES)
def test_image(drawn: list[Iterator[Array]], sampler: str) -> None:
    counts = ((20, 0.75), (7, 0.5), (7, 0.3), (10, 0.95), (5, 1.0), (4, 0.26))
    for case in itertools.product(image_schedules(sampler), counts):
        schedule, (steps, strength) = case
        scheduler, timesteps = start_from_image(sampler, schedule, steps, strength)
        rows = plan_rows(sampler, schedule, steps, Diffusion(), compat="diffusers", strength=strength)
        assert len(rows) == len(timesteps), case
        drawn[0] = normals(2)
        unit, init = next(normals(1)), next(normals(3))
        noisy = scheduler.add_noise(batch(init), batch(unit), timesteps[:1]).double()
        compared(case, rows, run_scheduler(scheduler, timesteps, noisy), unit, init=init)


@pytest.mark.parametrize("sampler", SCHEDULES)
def test_inpainting(drawn: list[Iterator[Array]], sampler: str) -> None:
    """The loop of StableDiffusionInpaintPipeline on a model of 4 channels: kept latents return at the next level,
    strength 1 starts from noise.
    """
    mask = np.array([1.0, 0, 1, 0, 0.25, 0])  # 1 keeps
    for case in itertools.product(image_schedules(sampler), ((8, 0.75), (6, 1.0))):
        schedule, (steps, strength) = case
        scheduler, timesteps = start_from_image(sampler, schedule, steps, strength)
        unit, init = next(normals(1)), next(normals(3))
        image, noise, keep = batch(init), batch(unit), batch(mask)

        def blend(
            i: int,
            x: Any,
            scheduler: Any = scheduler,
            timesteps: Any = timesteps,
            image: Any = image,
            noise: Any = noise,
            keep: Any = keep,
        ) -> Any:
            kept = image
            if i < len(timesteps) - 1:
                kept = scheduler.add_noise(image, noise, torch.tensor([timesteps[i + 1]]))
            return (1 - keep) * x + keep * kept

        start = (
            noise * float(scheduler.init_noise_sigma)
            if strength == 1
            else scheduler.add_noise(image, noise, timesteps[:1]).double()
        )
        drawn[0] = normals(2)
        expected = run_scheduler(scheduler, timesteps, start, blend)
        rows = plan_rows(sampler, schedule, steps, Diffusion(), compat="diffusers", strength=strength, masked=True)
        compared(case, rows, expected, unit, init=init, mask=mask)


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 33])
def test_count_of_an_image(steps: int) -> None:
    """For every strength in hundredths, as many model calls as the pipeline's own counting leaves, or a refusal where
    that leaves none.
    """
    for hundredths in range(1, 101):
        _, timesteps = start_from_image("euler", "linspace", steps, hundredths / 100)
        if len(timesteps) == 0:
            with pytest.raises(UsageError, match=f"steps {steps}, strength {hundredths / 100}: leaves no step"):
                plan_rows("euler", "linspace", steps, Diffusion(), compat="diffusers", strength=hundredths / 100)
        else:
            assert len(
                plan_rows("euler", "linspace", steps, Diffusion(), compat="diffusers", strength=hundredths / 100)
            ) == len(timesteps)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_spacings(spacing: str) -> None:
    """Timesteps of every number of steps to 200 and some above."""
    for sampler in ("euler", "ddim", "dpmpp_2m"):
        for steps in (*range(1, 200, 7), 48, 61, 96, 499, 501, 999):
            scheduler = scheduler_of(sampler, spacing)
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.tolist()
            if theirs[-1] == -1:  # numpy's arange gives trailing one timestep too many for some, which has no level
                theirs.pop()
            try:
                rows = plan_rows(sampler, spacing, steps, Diffusion(), compat="diffusers")
            except UsageError:
                assert len(set(theirs)) < steps or theirs[0] > 999 or (spacing == "leading" and steps == 999)
                continue
            assert [row.timestep for row in rows] == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
def test_distilled_models_take_few_steps(sampler: str) -> None:
    with pytest.raises(UsageError, match="steps 51: a distilled model's sampler takes at most 50"):
        plan_rows(sampler, "leading", 51, Diffusion(), compat="diffusers")
