"""The torch-free noise stream against torch's own generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdrt.runtime.noise import MAX_SEED, CpuNoise

LIMIT = 5e-7
SEEDS = [0, 1, 42, 2**32 - 1, 2**32, 2**32 + 5, 2**63, MAX_SEED]
SHAPES = [(16,), (17,), (31,), (32,), (4, 8, 8), (4, 9, 13), (1, 3, 7), (4, 64, 64), (4, 11, 107)]


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch_generator(seed)).numpy()
    found = CpuNoise(seed).draw(shape)
    assert found.dtype == np.float32 and found.shape == shape
    assert np.abs(found - expected).max() <= LIMIT


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_draws_continue_the_stream(seed: int) -> None:
    generator, noise = torch_generator(seed), CpuNoise(seed)
    for shape in [(4, 8, 8), (4, 9, 13), (17,), (4, 8, 8), (33,), (4, 32, 24)]:
        expected = torch.randn(shape, generator=generator).numpy()
        assert np.abs(noise.draw(shape) - expected).max() <= LIMIT


def test_seeds_are_cut_to_32_bits_as_torch_cuts_them() -> None:
    assert np.array_equal(CpuNoise(2**32 + 5).draw((64,)), CpuNoise(5).draw((64,)))
    assert not np.array_equal(CpuNoise(6).draw((64,)), CpuNoise(5).draw((64,)))


def test_streams_are_independent_of_each_other() -> None:
    first, second = CpuNoise(3), CpuNoise(3)
    first.draw((4, 8, 8))
    assert np.array_equal(second.draw((20,)), CpuNoise(3).draw((20,)))


def test_statistics() -> None:
    values = CpuNoise(1).draw((4, 256, 256)).astype(np.float64)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01


@pytest.mark.parametrize("shape", [(15,), (1,), (0,), (3, 5), (4, 0, 8)])
def test_too_few_values(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 16"):
        CpuNoise(0).draw(shape)
