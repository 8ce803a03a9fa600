"""The Brownian path in numpy against torchsde's, as k-diffusion and diffusers query it and as AUTOMATIC1111 seeds it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sdrt.bundle.manifest import Diffusion
from sdrt.runtime.brownian import BrownianPath
from sdrt.runtime.noise import MAX_SEED, CpuNoise, NvNoise, draw_noise
from sdrt.runtime.samplers import plan_rows

Array = NDArray[np.float32]
SHAPE = (4, 8, 8)
LIMIT = 1e-6
"""Float32 rounding along some twenty halvings, over the root of the interval."""

pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")  # torchsde, where float32 rounds an end past the tree's


def theirs(seed: int, low: float, high: float) -> Callable[[float, float], Array]:
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    sampler = BrownianTreeNoiseSampler(torch.zeros(1, *SHAPE), low, high, seed)
    return lambda sigma, sigma_next: np.asarray(sampler(torch.tensor(sigma, dtype=torch.float32), torch.tensor(sigma_next, dtype=torch.float32))[0])  # type: ignore[arg-type]


def ours(seed: int, low: float, high: float, stream: type[CpuNoise] | type[NvNoise] = CpuNoise) -> BrownianPath:
    return BrownianPath(seed, low, high, lambda point: stream(point).draw(SHAPE))


@pytest.mark.parametrize("seed", [0, 42, 2**32 + 5, MAX_SEED])
def test_equals_torchsde(seed: int) -> None:
    low, high = 0.0291671, 14.6146
    path, reference = ours(seed, low, high), theirs(seed, low, high)
    sigmas = np.geomspace(high, low, 8)
    for sigma, sigma_next in pairwise(sigmas):
        for end in (np.sqrt(sigma * sigma_next), sigma_next):
            found = path.unit_increment(sigma, end)
            assert found.dtype == np.float32 and found.shape == SHAPE
            assert np.abs(found - reference(sigma, end)).max() < LIMIT


def test_order_of_queries_does_not_matter() -> None:
    path, again = ours(3, 0.03, 14.0), ours(3, 0.03, 14.0)
    queries = [(14.0, 5.0), (5.0, 1.0), (1.0, 0.2), (0.2, 0.03), (14.0, 0.03), (0.5, 2.0)]
    found = [path.unit_increment(*query) for query in queries]
    assert all(np.array_equal(again.unit_increment(*query), value) for query, value in reversed(list(zip(queries, found, strict=True))))


def test_increments_add_up_and_turn_their_sign() -> None:
    path = ours(3, 0.03, 14.0)
    whole, first, second = (path.unit_increment(*ends) * np.sqrt(ends[0] - ends[1]) for ends in ((9.0, 1.0), (9.0, 4.0), (4.0, 1.0)))
    assert whole == pytest.approx(first + second, abs=1e-5)
    assert np.array_equal(path.unit_increment(1.0, 9.0), -path.unit_increment(9.0, 1.0))


def test_ends_beyond_the_path_are_its_ends() -> None:
    path = ours(3, 0.03, 14.0)
    inside = path.unit_increment(14.0, 1.0)
    assert path.unit_increment(14.0 + 1e-6, 1.0) == pytest.approx(inside, abs=1e-5)
    assert not path.unit_increment(1.0, 1.0).any()


def test_statistics() -> None:
    values = np.stack([ours(seed, 0.03, 14.0).unit_increment(3.3, 2.1) for seed in range(60)]).astype(np.float64)
    assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03


@pytest.mark.parametrize(("source", "stream"), [("cpu", CpuNoise), ("nv", NvNoise)])
@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_rows_take_the_path_automatic1111_makes(monkeypatch: pytest.MonkeyPatch, sampler: str, source: str, stream: Any) -> None:
    """`create_noise_sampler`: a tree per picture, seeded with its seed, over all levels of the schedule, its points from the chosen source."""
    monkeypatch.setattr("torchsde._brownian.brownian_interval._randn", lambda size, dtype, device, seed: torch.from_numpy(stream(int(seed)).draw(tuple(size))))
    rows = plan_rows(sampler, "karras", 4, Diffusion(), strength=0.8)
    whole = [row.sigma for row in plan_rows(sampler, "karras", 4, Diffusion())]
    draws = draw_noise(17, source, SHAPE, rows, compat="a1111", encode=True)
    reference = theirs(17, float(np.float32(min(whole))), float(np.float32(max(whole))))
    for row, noise in zip(rows, draws.steps, strict=True):
        assert np.abs(noise - (reference(*row.noise) if isinstance(row.noise, tuple) else 0)).max() < LIMIT


def test_diffusers_scheduler_seeded_with_the_picture() -> None:
    """DPMSolverSDEScheduler(noise_sampler_seed=seed): every increment its steps add."""
    rows = plan_rows("dpmpp_sde", "karras", 4, Diffusion(), compat="diffusers")
    draws = draw_noise(5, "cpu", SHAPE, rows, compat="diffusers")
    assert rows[0].brownian is not None
    reference = theirs(5, *(float(np.float32(sigma)) for sigma in rows[0].brownian))
    for row, noise in zip(rows[:-1], draws.steps, strict=False):
        assert isinstance(row.noise, tuple)
        assert np.abs(noise - reference(*row.noise)).max() < LIMIT
    assert np.array_equal(draws.unit, CpuNoise(5).draw(SHAPE)) and not draws.steps[-1].any()
