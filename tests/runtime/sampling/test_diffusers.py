"""Samplers with --compat diffusers against diffusers' own schedulers, and its counting and blending from an image
against its pipelines.

The schedulers' cumulative alphas are set to float64 first; their sigmas and some updates stay float32, which is what
the 1e-5 leaves room for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
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
EDM_PREDICTIONS = {"edm": "epsilon", "v": "v_prediction"}
"""diffusers calls EDM's F "epsilon"."""
SCHEDULES = {key: sampler.diffusers.schedules for key, sampler in SAMPLERS.items() if sampler.diffusers}


def class_of(sampler: str) -> Any:
    import diffusers

    name = SAMPLERS[sampler].scheduler
    assert name is not None
    return getattr(diffusers, name.split()[0])


@functools.cache  # some take long to make, and set_timesteps clears what they remember
def scheduler_of(sampler: str, schedule: str | None, prediction: str = "epsilon", *, zero_snr: bool = False) -> Any:
    """As Stable Diffusion's own configuration has it: steps_offset 1, set_alpha_to_one and clip_sample off, every other
    value the class's.
    """
    kind = class_of(sampler)
    settings: dict[str, Any] = {
        **TRAINING,
        "steps_offset": 1,
        "prediction_type": {**PREDICTIONS, "x0": "sample"}[prediction],
    }
    if zero_snr:
        settings["rescale_betas_zero_snr"] = True
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
    elif sampler not in ("lcm", "tcd") and schedule is not None:
        settings["timestep_spacing"] = schedule
    scheduler = kind(**settings)
    alphas = ALPHAS
    if zero_snr:
        root = np.sqrt(ALPHAS)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas[-1] = float(scheduler.alphas_cumprod[-1])
    scheduler.alphas_cumprod = torch.from_numpy(alphas)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Iterator[Array]]]:
    """The stream that every scheduler's `randn_tensor` draws from, in a list so that a test can renew it."""
    stream = [normals(2)]
    drawing = ("ddpm", "euler_ancestral_discrete", "k_dpm_2_ancestral_discrete", "dpmsolver_multistep", "lcm", "tcd")
    for name in (*drawing, "edm_dpmsolver_multistep"):
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


def compared(case: object, rows: list[Row], expected: Array, unit: Array, limit: float = LIMIT, **picture: Any) -> None:
    assert relative(run_machine(rows, toy_network, unit, normals(2), **picture), expected) < limit, case
    by_table = run_machine(tables(rows, [[1.0]] * len(rows)), toy_network, unit, normals(2), rows=rows, **picture)
    assert relative(by_table, expected) < limit, case


@pytest.mark.parametrize("sampler", SCHEDULES)
def test_text(drawn: list[Iterator[Array]], sampler: str) -> None:
    for case in itertools.product(SCHEDULES[sampler], PREDICTIONS, (1, 2, 3, 4, 7, 20)):
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


def text_to_image(scheduler: Any, drawn: list[Iterator[Array]]) -> tuple[Array, Array]:
    """A picture by a scheduler whose timesteps are set: the unit noise it started from, and its latents."""
    drawn[0] = normals(2)
    unit = next(normals(1))
    return unit, run_scheduler(scheduler, scheduler.timesteps, batch(unit) * float(scheduler.init_noise_sigma))


@pytest.mark.parametrize("sampler", SCHEDULES)
def test_zero_terminal_snr(drawn: list[Iterator[Array]], sampler: str) -> None:
    """Every scheduler that rescales its betas, with the cumulative alpha that it puts at the end. Those that cannot are
    refused, and so is noise prediction where the end is 0.
    """
    diffusion = Diffusion(prediction="v", zero_snr=True)
    if "rescale_betas_zero_snr" not in inspect.signature(class_of(sampler)).parameters:
        with pytest.raises(UsageError, match=f"sampler {sampler}: cannot sample a model trained on zero terminal SNR"):
            plan_rows(sampler, SCHEDULES[sampler][0], 4, diffusion, compat="diffusers")
        return
    for schedule, steps in itertools.product(SCHEDULES[sampler], (1, 2, 7, 20)):
        scheduler = scheduler_of(sampler, schedule, "v", zero_snr=True)
        scheduler.set_timesteps(steps)
        rows = plan_rows(sampler, schedule, steps, diffusion, compat="diffusers")
        # Euler's latents are kept in float32 at sigma 4096, which is off by 2e-4 there; the others' are of variance 1.
        limit = 1e-3 if sampler.startswith("euler") else LIMIT
        compared((schedule, steps), rows, *reversed(text_to_image(scheduler, drawn)), limit=limit)
    blind = Diffusion(zero_snr=True)
    if float(scheduler.alphas_cumprod[-1]) == 0:
        with pytest.raises(UsageError, match="zero terminal SNR to predict the noise"):
            plan_rows(sampler, SCHEDULES[sampler][0], 4, blind, compat="diffusers")


@pytest.mark.parametrize("sampler", [key for key, sampler in SAMPLERS.items() if sampler.edm])
@pytest.mark.parametrize("prediction", EDM_PREDICTIONS)
def test_networks_of_every_level(drawn: list[Iterator[Array]], sampler: str, prediction: str) -> None:
    """CosXL's and Playground's kind of model, from noise and from an image."""
    import diffusers

    kinds = {
        "euler": (diffusers.EDMEulerScheduler, {}),
        "dpmpp_2m": (diffusers.EDMDPMSolverMultistepScheduler, {}),
        "dpmpp_2m_sde": (diffusers.EDMDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    }
    kind, settings = kinds[sampler]
    edm = SAMPLERS[sampler].edm
    assert edm is not None
    for schedule, steps, (high, data) in itertools.product(edm.schedules, (1, 2, 7, 20), ((120.0, 1.0), (80.0, 0.5))):
        limits = {"sigma_min": 0.002, "sigma_max": high, "sigma_data": data}
        scheduler = kind(prediction_type=EDM_PREDICTIONS[prediction], sigma_schedule=schedule, **limits, **settings)
        scheduler.set_timesteps(steps)
        diffusion = Diffusion(prediction=prediction, **limits)
        rows = plan_rows(sampler, schedule, steps, diffusion, compat="diffusers")
        assert [row.timestep for row in rows] == pytest.approx(scheduler.timesteps.tolist(), abs=1e-5)
        compared((schedule, steps), rows, *reversed(text_to_image(scheduler, drawn)))
        if steps < 7:
            continue
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(steps - int(steps * 0.6))
        left = scheduler.timesteps[steps - int(steps * 0.6) :]
        rows = plan_rows(sampler, schedule, steps, diffusion, compat="diffusers", strength=0.6)
        drawn[0] = normals(2)
        unit, init = next(normals(1)), next(normals(3))
        noisy = scheduler.add_noise(batch(init), batch(unit), left[:1]).double()
        compared((schedule, steps), rows, run_scheduler(scheduler, left, noisy), unit, init=init)


LISTS = {
    "timesteps": ((999, 749, 499, 249), (999, 845, 730, 587, 443, 310, 193, 116, 53, 13), (399,), (500, 3, 0)),
    "sigmas": ((14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029, 0.0), (7.0, 0.0)),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("sampler", SCHEDULES)
def test_lists(drawn: list[Iterator[Array]], sampler: str, name: str) -> None:
    """Timesteps and sigmas in place of a schedule, wherever diffusers' own schedulers take them."""
    if name not in inspect.signature(class_of(sampler).set_timesteps).parameters or sampler == "unipc":
        return  # UniPC's are for flows
    for numbers in LISTS[name]:
        scheduler = scheduler_of(sampler, None, "v")
        scheduler.set_timesteps(**{name: list(numbers)})
        diffusion = Diffusion(prediction="v")
        asked: dict[str, Any] = {"compat": "diffusers", name: numbers}
        rows = plan_rows(sampler, SCHEDULES[sampler][0], 20, diffusion, **asked)
        assert [row.timestep for row in rows] == pytest.approx([float(t) for t in scheduler.timesteps], abs=2e-3)
        compared(numbers, rows, *reversed(text_to_image(scheduler, drawn)))
        calls = scheduler.timesteps[diffusers_skips(scheduler, len(rows), name, numbers) :]
        if len(calls) == 0:
            continue
        scheduler.set_timesteps(**{name: list(numbers)})
        rows = plan_rows(sampler, SCHEDULES[sampler][0], 20, diffusion, strength=0.6, **asked)
        assert len(rows) == len(calls)
        drawn[0] = normals(2)
        unit, init = next(normals(1)), next(normals(3))
        if sampler != "ddpm":  # it keeps no place in its list
            scheduler.set_begin_index(len(scheduler.timesteps) - len(calls))
        noisy = scheduler.add_noise(batch(init), batch(unit), calls[:1]).double()
        compared(numbers, rows, run_scheduler(scheduler, calls, noisy), unit, init=init)


def diffusers_skips(scheduler: Any, rows: int, name: str, numbers: tuple[float, ...]) -> int:
    """How many model calls `StableDiffusionImg2ImgPipeline.get_timesteps` skips at strength 0.6."""
    steps = len(numbers) - (name == "sigmas")
    return (steps - int(steps * 0.6)) * int(scheduler.order)


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m", "lcm", "tcd"])
def test_networks_that_predict_the_image(drawn: list[Iterator[Array]], sampler: str) -> None:
    """Lightning's model of one step is one."""
    for schedule, steps in itertools.product(SCHEDULES[sampler][:1] + SCHEDULES[sampler][2:3], (1, 4)):
        scheduler = scheduler_of(sampler, schedule, "x0")
        scheduler.set_timesteps(steps)
        rows = plan_rows(sampler, schedule, steps, Diffusion(prediction="x0"), compat="diffusers")
        compared((schedule, steps), rows, *reversed(text_to_image(scheduler, drawn)))
