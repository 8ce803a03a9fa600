"""Samplers over noise levels against the formulas of k-diffusion: from text, from an image, under a mask, and on the
emoji model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from k_diffusion import BROWNIAN, REFERENCES, Array, Denoiser, noise_of, reference_sigmas, sigmas_of, t_to_sigma
from reference import Graphs, relative
from sampler_machine import normals, run_engine, run_machine, toy_network

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.manifest import Diffusion
from sdrt.runtime.backend import load_engine
from sdrt.runtime.engine import Engine, tables
from sdrt.runtime.sampling.registry import SAMPLERS, plan_rows
from sdrt.runtime.sampling.schedule import SCHEDULES

EXACT = 1e-9
CASES = [(key, schedule) for key in REFERENCES for schedule in SCHEDULES]


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


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [("euler", [0.682161, -1.364322]), ("dpmpp_2m", [1.060861, -2.121722]), ("euler_a", [1.032269, -1.100374])],
)
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
            assert {row.brownian for row in rows[:-1]} == {(rows[-1].sigma, rows[0].sigma)}
        else:
            assert not any(kinds)


# From an image


@pytest.mark.parametrize(
    ("strength", "steps", "fix", "calls"),
    [
        (0.75, 20, False, 16),
        (1.0, 20, False, 20),
        (0.5, 20, False, 11),
        (0.01, 20, False, 1),
        (0.3, 7, False, 3),
        (0.75, 20, True, 20),
        (0.01, 3, True, 3),
    ],
)
def test_steps_left_of_an_image(strength: float, steps: int, fix: bool, calls: int) -> None:
    """`setup_img2img_steps`: t_enc = int(min(strength, 0.999) steps), and t_enc + 1 calls; or as many as asked for, of
    a longer schedule.
    """
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
    """CFGDenoiser's blend after guidance, and the finished latents' own: outside the mask nothing changes, inside stays
    the image.
    """
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
    assert [row.inpaint for row in plan_rows("euler", "normal", 3, Diffusion(), strength=1.0, masked=True)] == [
        (1, 0, 0),
        (1, 0, 0),
        (0, 1, 0),
    ]


# On the emoji model


@pytest.fixture(scope="module")
def engine(flat_bundle: Path) -> Engine:
    return load_engine(open_bundle(flat_bundle), "onnxruntime", None)


@pytest.fixture(scope="module")
def graphs(flat_bundle: Path) -> Graphs:
    return Graphs(flat_bundle)


@pytest.mark.parametrize("sampler", REFERENCES)
def test_whole_loop(engine: Engine, graphs: Graphs, sampler: str) -> None:
    """The engine over the tables, with the sampler's own schedule, against the formulas calling the same graph for its
    raw prediction only.
    """
    schedule = SAMPLERS[sampler].schedules[0]
    rows = plan_rows(sampler, schedule, 5, Diffusion())
    found, network, unit, drawn = run_engine(engine, graphs, rows)
    sigmas = sigmas_of(sampler, schedule, 5)
    expected = REFERENCES[sampler](
        Denoiser(network, "epsilon"), unit * sigmas[0], sigmas, lambda sigma, sigma_next: next(drawn)
    )
    assert relative(found, expected) < 1e-4


def test_prediction_of_the_manifest_is_used() -> None:
    rows = {kind: plan_rows("euler", "normal", 3, replace(Diffusion(), prediction=kind)) for kind in ("epsilon", "v")}
    assert rows["epsilon"][0].q == pytest.approx(-14.6146412) and rows["v"][0].q == pytest.approx(
        -14.6146412 / math.hypot(1, 14.6146412)
    )


def test_tables_are_float32_and_as_long_as_the_rows() -> None:
    table = tables(plan_rows("heun", "karras", 4, Diffusion()), [[-6.0, 7.0]] * 7)
    assert {len(column) for column in table.values()} == {7}
    assert {column.dtype for column in table.values()} == {np.dtype(np.float32)}
    assert table["w"].tolist() == [[-6.0, 7.0]] * 7 and not table["inpaint"].any() and not table["v"].any()
