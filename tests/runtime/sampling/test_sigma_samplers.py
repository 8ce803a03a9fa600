"""Samplers over noise levels against the formulas of k-diffusion: from text, from an image, under a mask, and on the
emoji model.
"""

from __future__ import annotations

import itertools
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


def shrinking(x_scaled: Array, t: float) -> Array:
    """The noise prediction whose denoised estimate is x / (1 + sigma^2)."""
    sigma = t_to_sigma(t)
    x = x_scaled * math.sqrt(1 + sigma**2)
    return (x - x / (1 + sigma**2)) / sigma


@pytest.mark.parametrize("sampler", REFERENCES)
def test_rows_are_the_sampler(sampler: str) -> None:
    for case in itertools.product(SCHEDULES, ["epsilon", "v"], (1, 2, 3, 20)):
        schedule, prediction, steps = case
        rows = plan_rows(sampler, schedule, steps, Diffusion(prediction=prediction))
        x = next(normals(1))
        sigmas = sigmas_of(sampler, schedule, steps)
        expected = REFERENCES[sampler](Denoiser(toy_network, prediction), x * sigmas[0], sigmas, noise_of(sampler, 2))
        assert relative(run_machine(rows, toy_network, x, normals(2)), expected) < EXACT, case
        by_table = run_machine(tables(rows, [1.0]), toy_network, x, normals(2), rows=rows)
        assert relative(by_table, expected) < 1e-5, case


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
    ("strength", "steps", "calls"), [(0.75, 20, 16), (1.0, 20, 20), (0.5, 20, 11), (0.01, 20, 1), (0.3, 7, 3)]
)
def test_steps_left_of_an_image(strength: float, steps: int, calls: int) -> None:
    """`setup_img2img_steps`: t_enc = int(min(strength, 0.999) steps), and t_enc + 1 calls."""
    rows = plan_rows("euler", "normal", steps, Diffusion(), strength=strength)
    assert len(rows) == calls
    assert [row.sigma for row in rows] == pytest.approx(reference_sigmas("normal", steps)[steps - calls : steps])


@pytest.mark.parametrize("sampler", REFERENCES)
def test_start_from_an_image(sampler: str) -> None:
    init, x = next(normals(3)), next(normals(4))
    for schedule in SCHEDULES:
        rows = plan_rows(sampler, schedule, 8, Diffusion(), strength=0.6)
        sigmas = sigmas_of(sampler, schedule, 8)[8 - int(0.6 * 8) - 1 :]
        model, noise = Denoiser(toy_network, "epsilon"), noise_of(sampler, 5)
        expected = REFERENCES[sampler](model, init + sigmas[0] * x, sigmas, noise)
        assert relative(run_machine(rows, toy_network, x, normals(5), init=init), expected) < EXACT, schedule


@pytest.mark.parametrize("sampler", REFERENCES)
def test_inpainting_blends_the_denoised_estimate(sampler: str) -> None:
    """CFGDenoiser's blend after guidance, and the finished latents' own: outside the mask nothing changes, inside stays
    the image.
    """
    init, x, mask = next(normals(3)), next(normals(4)), np.array([1.0, 0, 1, 1, 0, 0])
    model = Denoiser(toy_network, "epsilon")

    class Blending(Denoiser):
        def __call__(self, x: Array, sigma: float) -> Array:
            return init * mask + (1 - mask) * model(x, sigma)

    for schedule in SCHEDULES:
        rows = plan_rows(sampler, schedule, 8, Diffusion(), strength=0.6, masked=True)
        sigmas = sigmas_of(sampler, schedule, 8)[8 - int(0.6 * 8) - 1 :]
        blending, noise = Blending(toy_network, "epsilon"), noise_of(sampler, 5)
        expected = REFERENCES[sampler](blending, init + sigmas[0] * x, sigmas, noise)
        expected = init * mask + (1 - mask) * expected
        found = run_machine(rows, toy_network, x, normals(5), init=init, mask=mask)
        assert relative(found, expected) < EXACT, schedule
        assert found[mask == 1] == pytest.approx(init[mask == 1], rel=1e-12), schedule


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
