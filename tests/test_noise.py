"""The noise streams against torch's generator and Philox's published vectors, and the order in which each tool draws from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError
from sdrt.runtime.noise import MAX_SEED, NOISES, CpuNoise, NvNoise, draw_noise, noise_stream, philox
from sdrt.runtime.samplers import Row, plan_rows

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


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The vectors of Random123's own tests (philox4x32, 10 rounds)."""
    assert [int(word[0]) for word in philox([np.array([value], np.uint64) for value in counter], key)] == list(words)


def test_nv_documented_values() -> None:
    """Of seed 0, as AUTOMATIC1111's generator documents them."""
    expected = [
        -0.92466259,
        -0.42534415,
        -2.6438457,
        0.14518388,
        -0.12086647,
        -0.57972564,
        -0.62285122,
        -0.32838709,
        -1.07454231,
        -0.36314407,
        -1.67105067,
        2.26550497,
    ]
    found = NvNoise(0).draw((3, 4))
    assert found.dtype == np.float32
    assert found.ravel() == pytest.approx(expected, abs=2e-7)


def test_nv_counts_draws_and_values() -> None:
    """A value depends on seed, draw and index alone: not on the shape, nor on how much was drawn before."""
    stream = NvNoise(7)
    first, second = stream.draw((4, 8, 8)), stream.draw((2, 5))
    assert np.array_equal(NvNoise(7).draw((20,)), first.ravel()[:20])
    other = NvNoise(7)
    other.draw((1,))
    assert np.array_equal(other.draw((10,)), second.ravel())
    assert not np.array_equal(first.ravel()[:10], second.ravel())


def test_nv_seeds_have_64_bits() -> None:
    seeds = (0, 1, 2**32, 2**32 + 1, MAX_SEED)
    assert len({NvNoise(seed).draw((4,)).tobytes() for seed in seeds}) == len(seeds)


def test_nv_statistics() -> None:
    values = NvNoise(1).draw((4, 256, 256)).astype(np.float64)
    assert np.isfinite(values).all()
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01


@pytest.mark.parametrize("source", ["gpu", "", "CPU", "nvv"])
def test_unknown_source(source: str) -> None:
    with pytest.raises(UsageError, match=f"noise {source!r}: unknown") as caught:
        noise_stream(source, 0)
    assert caught.value.fix == "Choose one of: cpu, nv."


# The order of draws

SHAPE = (4, 8, 8)


def rows_of(sampler: str, schedule: str, compat: str, steps: int = 5) -> list[Row]:
    return plan_rows(sampler, schedule, steps, Diffusion(), compat=compat)


def test_diffusers_draws_everything_from_one_generator() -> None:
    """Posterior, first latents, the masked image's posterior, then the steps (prepare_latents, prepare_mask_latents, step)."""
    rows = rows_of("euler_a", "linspace", "diffusers")
    generator = torch_generator(9)
    theirs = [torch.randn((1, *SHAPE), generator=generator)[0].numpy() for _ in range(7)]
    draws = draw_noise(9, "cpu", SHAPE, rows, compat="diffusers", encode=True, masked=True)
    assert draws.encode is not None and draws.masked is not None
    for found, expected in zip((draws.encode, draws.unit, draws.masked, *draws.steps[:4]), theirs, strict=True):
        assert np.abs(found - expected).max() <= LIMIT
    assert not draws.steps[4].any() and draws.steps.shape == (5, *SHAPE) and draws.steps.dtype == np.float32


def test_diffusers_from_text_draws_the_first_latents_first() -> None:
    draws = draw_noise(9, "cpu", SHAPE, rows_of("euler", "linspace", "diffusers"), compat="diffusers")
    assert draws.encode is None and draws.masked is None and not draws.steps.any()
    assert np.array_equal(draws.unit, CpuNoise(9).draw(SHAPE))


@pytest.mark.parametrize("source", NOISES)
def test_automatic1111_draws_latents_then_steps(source: str) -> None:
    """An image is encoded to its posterior's mean: no seed fixes the sample there."""
    draws = draw_noise(9, source, SHAPE, rows_of("dpm2_a", "karras", "a1111"), compat="a1111", encode=True, masked=True)
    stream = noise_stream(source, 9)
    assert draws.encode is not None and not draws.encode.any() and draws.masked is not None and not draws.masked.any()
    assert np.array_equal(draws.unit, stream.draw(SHAPE))
    for i, noise in enumerate(draws.steps):
        assert np.array_equal(noise, stream.draw(SHAPE)) if i % 2 and i < 8 else not noise.any()
