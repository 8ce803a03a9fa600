"""AUTOMATIC1111's DDIM, PLMS, UniPC and LCM against its own loops in plain float64, and UniPC's solver against
diffusers' on the same levels.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from k_diffusion import ALPHAS, LOG_SIGMAS, SIGMAS, Array, Denoiser, Network, ramp, reference_sigmas, rescaled
from reference import TRAINING, Graphs, relative
from sampler_machine import normals, run_engine, run_machine, toy_network

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError
from sdrt.runtime.backend import load_engine
from sdrt.runtime.engine import Engine, tables
from sdrt.runtime.sampling.registry import SAMPLERS, plan_rows

EXACT = 1e-9
PREDICTIONS = ["epsilon", "v"]
STEPS = (2, 3, 4, 20, 30)
"""30 does not divide 1000."""


def timesteps_of(steps: int) -> list[int]:
    return [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)]


def to_level(x: Array, eps: Array, t: int, t_next: int) -> Array:
    image = (x - math.sqrt(1 - ALPHAS[t]) * eps) / math.sqrt(ALPHAS[t])
    return np.asarray(math.sqrt(ALPHAS[t_next]) * image + math.sqrt(1 - ALPHAS[t_next]) * eps)


def ddim(model: Denoiser, x: Array, timesteps: list[int]) -> Array:
    for index in range(len(timesteps) - 1, 0, -1):
        t = timesteps[index]
        x = to_level(x, model.eps(x, t, ALPHAS[t]), t, timesteps[index - 1])
    return x


def plms(model: Denoiser, x: Array, timesteps: list[int]) -> Array:
    old: list[Array] = []
    for index in range(len(timesteps) - 1, 0, -1):
        t, t_next = timesteps[index], timesteps[index - 1]
        e = model.eps(x, t, ALPHAS[t])
        match len(old):
            case 0:
                blend = (e + model.eps(to_level(x, e, t, t_next), t_next, ALPHAS[t_next])) / 2
            case 1:
                blend = (3 * e - old[-1]) / 2
            case 2:
                blend = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
            case _:
                blend = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = to_level(x, blend, t, t_next)
        old = [*old, e][-3:]
    return x


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_text(sampler: str, prediction: str) -> None:
    for steps in STEPS:
        rows = plan_rows(sampler, "ddim_uniform", steps, Diffusion(prediction=prediction))
        x = next(normals(1))
        expected = {"ddim": ddim, "plms": plms}[sampler](Denoiser(toy_network, prediction), x, timesteps_of(steps))
        assert relative(run_machine(rows, toy_network, x, normals(2)), expected) < EXACT
        assert (
            relative(run_machine(tables(rows, [[1.0]] * len(rows)), toy_network, x, normals(2), rows=rows), expected)
            < 1e-5
        )
        assert len({row.step for row in rows}) == len(timesteps_of(steps)) - 1


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_image(sampler: str, strength: float) -> None:
    """`CompVisSampler.sample_img2img`: noise of timestep t_enc, then the loop over those below it."""
    ts = timesteps_of(20)
    t_enc = int(min(strength, 0.999) * 20)
    unit, init = next(normals(1)), next(normals(3))
    alpha = ALPHAS[ts[t_enc]]
    noisy = math.sqrt(alpha) * init + math.sqrt(1 - alpha) * unit
    expected = {"ddim": ddim, "plms": plms}[sampler](Denoiser(toy_network, "epsilon"), noisy, ts[:t_enc])
    rows = plan_rows(sampler, "ddim_uniform", 20, Diffusion(), strength=strength)
    assert relative(run_machine(rows, toy_network, unit, normals(2), init=init), expected) < EXACT


def test_inpainting_ends_on_the_image() -> None:
    init, mask = next(normals(3)), np.array([1.0, 0, 0, 1, 0, 1])
    for sampler, schedule in (
        ("ddim", "ddim_uniform"),
        ("plms", "ddim_uniform"),
        ("unipc", "normal"),
        ("lcm", "normal"),
    ):
        rows = plan_rows(sampler, schedule, 6, Diffusion(), strength=0.8, masked=True)
        found = run_machine(rows, toy_network, next(normals(1)), normals(2), init=init, mask=mask)
        assert found[mask == 1] == pytest.approx(init[mask == 1], rel=1e-12)
        free = run_machine([*rows[:-1]], toy_network, next(normals(1)), normals(2), init=init, mask=0 * mask)
        assert free == pytest.approx(
            run_machine(
                plan_rows(sampler, schedule, 6, Diffusion(), strength=0.8)[:-1],
                toy_network,
                next(normals(1)),
                normals(2),
                init=init,
            )
        )


@pytest.mark.parametrize(("steps", "strength"), [(1, None), (20, 0.09), (1, 1.0), (2, 0.5)])
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_nothing_left_to_do(sampler: str, steps: int, strength: float | None) -> None:
    with pytest.raises(UsageError, match=f"steps {steps}.*leaves nothing to do"):
        plan_rows(sampler, "ddim_uniform", steps, Diffusion(), strength=strength)


def unipc_levels(first: float, steps: int) -> tuple[list[float], list[float]]:
    """Levels of `NoiseScheduleVP` on discrete alphas: log alpha linear between timesteps, evenly spaced from `first` to
    0.
    """
    t = [first * (1 - i / steps) for i in range(steps + 1)]
    log_alpha = np.interp(t, np.arange(1000), 0.5 * np.log(ALPHAS))
    return [math.sqrt(1 - math.exp(2 * log)) / math.exp(log) for log in log_alpha], t[:-1]


def diffusers_unipc(
    x: Array, sigmas: list[float], timesteps: list[float], prediction: str = "epsilon", network: Network = toy_network
) -> Array:
    """diffusers' solver, of order 3 in its bh1 variant, on AUTOMATIC1111's levels, in float64."""
    import torch
    from diffusers import UniPCMultistepScheduler

    kind: Any = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    scheduler: Any = UniPCMultistepScheduler(**TRAINING, solver_order=3, solver_type="bh1", prediction_type=kind)
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas, scheduler.timesteps = (
        torch.tensor(sigmas, dtype=torch.float64),
        torch.tensor(timesteps, dtype=torch.float64),
    )
    scheduler.set_begin_index(0)
    latents = torch.from_numpy(x)[None]
    for t in timesteps:
        latents = scheduler.step(torch.from_numpy(network(latents[0].numpy(), t))[None], t, latents, return_dict=False)[
            0
        ]
    return np.asarray(latents[0].numpy())


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_unipc(prediction: str) -> None:
    for steps in (1, 2, 3, 5, 20, 30):
        count = len(timesteps_of(steps))
        sigmas, ts = unipc_levels(999.0, count)
        unit = next(normals(1))
        expected = diffusers_unipc(unit, sigmas, ts, prediction)
        rows = plan_rows("unipc", "normal", steps, Diffusion(prediction=prediction))
        assert [row.timestep for row in rows] == pytest.approx(ts)
        assert relative(run_machine(rows, toy_network, unit, normals(2)), expected) < 1e-8


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("sampler", ["ddim", "plms", "unipc"])
def test_zero_terminal_snr(monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    """The same loops over AUTOMATIC1111's rescaled alphas. Three steps of DDIM and PLMS begin at the last of them."""
    table = rescaled(4.8973451890853435e-08)
    monkeypatch.setattr(sys.modules[__name__], "ALPHAS", 1 / (1 + table**2))
    for steps in (2, 3, 20):
        rows = plan_rows(sampler, SAMPLERS[sampler].schedules[0], steps, Diffusion(prediction="v", zero_snr=True))
        x, ts = next(normals(1)), timesteps_of(steps)
        if sampler == "unipc":
            expected = diffusers_unipc(x, *unipc_levels(999.0, len(ts)), "v")
        else:
            expected = {"ddim": ddim, "plms": plms}[sampler](Denoiser(toy_network, "v", table), x, ts)
        assert relative(run_machine(rows, toy_network, x, normals(2)), expected) < 1e-8, steps


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("strength", [0.06, 0.5, 0.75, 1.0])
def test_unipc_image(strength: float) -> None:
    ts = timesteps_of(20)
    t_enc = int(min(strength, 0.999) * 20)
    sigmas, told = unipc_levels(ts[t_enc - 1], t_enc)
    unit, init = next(normals(1)), next(normals(3))
    noisy = math.sqrt(ALPHAS[ts[t_enc]]) * init + math.sqrt(1 - ALPHAS[ts[t_enc]]) * unit
    expected = diffusers_unipc(noisy, sigmas, told)
    rows = plan_rows("unipc", "normal", 20, Diffusion(), strength=strength)
    assert relative(run_machine(rows, toy_network, unit, normals(2), init=init), expected) < 1e-8


def lcm(x: Array, sigmas: list[float], fresh: Any, network: Network = toy_network) -> Array:
    """`sample_lcm` over `LCMCompVisDenoiser`: 50 levels, the nearest one's timestep, the boundary condition on latents
    not divided.
    """
    for i in range(len(sigmas) - 1):
        t = int(np.abs(math.log(sigmas[i]) - LOG_SIGMAS[19::20]).argmin()) * 20 + 19
        out = network(x / math.sqrt(1 + sigmas[i] ** 2), t)
        scaled = t * 10.0
        x = scaled / math.sqrt(scaled**2 + 0.25) * (x - sigmas[i] * out) + 0.25 / (scaled**2 + 0.25) * x
        if sigmas[i + 1] > 0:
            x = x + sigmas[i + 1] * next(fresh)
    return x


def lcm_sigmas(steps: int) -> list[float]:
    return [*(math.exp(log) for log in np.interp(ramp(steps, 0.0, 49.0), np.arange(50), LOG_SIGMAS[19::20])), 0.0]


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_lcm(steps: int) -> None:
    unit, sigmas = next(normals(1)), lcm_sigmas(steps)
    rows = plan_rows("lcm", "normal", steps, Diffusion())
    assert relative(run_machine(rows, toy_network, unit, normals(2)), lcm(unit * sigmas[0], sigmas, normals(2))) < EXACT


def test_lcm_on_karras_sigmas() -> None:
    roots = ramp(6, SIGMAS[19] ** (1 / 7), SIGMAS[-1] ** (1 / 7))
    sigmas = [*(root**7 for root in roots), 0.0]
    unit = next(normals(1))
    rows = plan_rows("lcm", "karras", 6, Diffusion())
    assert relative(run_machine(rows, toy_network, unit, normals(2)), lcm(unit * sigmas[0], sigmas, normals(2))) < EXACT


def test_samplers_that_automatic1111_lacks_are_those_of_diffusers() -> None:
    for sampler in ("ddpm", "tcd"):
        ours, theirs = (
            plan_rows(sampler, "leading", 8, Diffusion(), compat=compat) for compat in ("a1111", "diffusers")
        )
        assert all(np.array_equal(a.M, b.M) and a.timestep == b.timestep for a, b in zip(ours, theirs, strict=True))


def test_ddim_uniform_of_k_diffusion_samplers_goes_on_to_zero() -> None:
    assert [row.sigma for row in plan_rows("euler", "ddim_uniform", 20, Diffusion())] == pytest.approx(
        reference_sigmas("ddim_uniform", 20)[:-1]
    )


@pytest.fixture(scope="module")
def engine(flat_bundle: Path) -> Engine:
    return load_engine(open_bundle(flat_bundle), "onnxruntime", None)


@pytest.fixture(scope="module")
def graphs(flat_bundle: Path) -> Graphs:
    return Graphs(flat_bundle)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("sampler", ["ddim", "plms", "unipc", "lcm"])
def test_on_the_emoji_model(engine: Engine, graphs: Graphs, sampler: str) -> None:
    """The engine over the tables against the same loops, calling the same graph for its raw prediction only."""
    rows = plan_rows(sampler, "ddim_uniform" if sampler in ("ddim", "plms") else "normal", 5, Diffusion())
    found, network, unit, drawn = run_engine(engine, graphs, rows)
    match sampler:
        case "unipc":
            expected = diffusers_unipc(unit, *unipc_levels(999.0, 5), network=network)
        case "lcm":
            expected = lcm(unit * lcm_sigmas(5)[0], lcm_sigmas(5), drawn, network)
        case _:
            expected = {"ddim": ddim, "plms": plms}[sampler](Denoiser(network, "epsilon"), unit, timesteps_of(5))
    assert relative(found, expected) < 1e-4
