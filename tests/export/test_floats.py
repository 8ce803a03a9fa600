"""Reading and rounding of numbers against torch's types, every code of the small types and every kind of float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdrt.export.floats import STORED, as_float32, is_finite, rounded, widened

TORCH = {
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "F32": torch.float32,
}


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def float32_values() -> np.ndarray:
    """Random bits, which hold everything; and around each value of the 16-bit types, half-way cases included, what
    rounds to it or just not.
    """
    codes = np.arange(1 << 16, dtype=np.uint16)
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    upper = codes.astype(np.uint32) << 16
    near_bfloat = [upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    half = codes.view(np.float16)[np.isfinite(codes.view(np.float16))].astype(np.float64)
    following = np.nextafter(half.astype(np.float16), np.float16(np.inf)).astype(np.float64)
    following[~np.isfinite(following)] = 65536.0  # where float16 would go on
    middle = ((half + following) / 2).astype(np.float32)
    around = [middle, np.nextafter(middle, np.float32(-np.inf)), np.nextafter(middle, np.float32(np.inf))]
    patterns = [random, *near_bfloat, *(value.view(np.uint32) for value in around)]
    return np.concatenate(patterns).view(np.float32)


@pytest.mark.parametrize("code", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_every_code_means_what_it_means_to_torch(code: str) -> None:
    kind = np.dtype(STORED[code])
    codes = np.arange(1 << 8 * kind.itemsize).astype(kind)
    found = widened(codes, code)
    expected = torch.from_numpy(codes.copy()).view(TORCH[code]).to(torch.float32).numpy()
    assert found.dtype == np.float32
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    number = ~np.isnan(expected)
    assert np.array_equal(bits(found)[number], bits(expected)[number])


@pytest.mark.parametrize("code", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_shapes_stay(code: str) -> None:
    for shape in ((), (0, 3), (2, 3)):
        found = widened(np.zeros(shape, STORED[code]), code)
        assert isinstance(found, np.ndarray) and found.shape == shape and found.flags.writeable


def test_what_numpy_has_stays_as_it_is() -> None:
    for code in ("F64", "F32", "F16", "I64", "BOOL"):
        values = np.zeros(3, STORED[code])
        assert widened(values, code) is values
    assert as_float32(values := np.zeros(3, np.float32)) is values


@pytest.mark.parametrize("code", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16])
def test_rounding_gives_the_bytes_of_torch(code: str, source: type) -> None:
    with np.errstate(all="ignore"):
        values = float32_values().astype(source)
    if source is np.float64:
        values = np.concatenate([values, values * (1 + 2.0**-30), values * 1e30])
    expected = torch.from_numpy(values).to(torch.float32).to(TORCH[code])
    nan = torch.isnan(expected).numpy()
    found = rounded(values, code)
    assert found.dtype == (np.uint16 if code == "BF16" else STORED[code])
    expected_bits = expected.view(torch.uint16 if found.itemsize == 2 else torch.uint32).numpy()
    assert np.array_equal(bits(found)[~nan], expected_bits[~nan])
    assert not nan.all() and nan.any() and not is_finite(found[nan][:1])
    assert np.isnan(widened(found, code)[nan]).all()


def test_rounding_keeps_shapes_and_copies_nothing_without_need() -> None:
    for shape in ((), (0, 3), (2, 3), (300, 301)):
        values = np.ones(shape, np.float32)
        for code in ("F16", "BF16", "F32"):
            assert rounded(values, code).shape == shape and (widened(rounded(values, code), code) == 1).all()
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert (widened(rounded(turned, "BF16"), "BF16") == turned).all()
    for code in ("F16", "F32"):
        values = np.zeros(3, STORED[code])
        assert rounded(values, code) is values


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.uint16])
def test_finite(kind: type) -> None:
    """The largest numbers are, and a single value of either sign that is none shows wherever it stands."""
    bfloat = kind is np.uint16
    largest = 0x7F7F if bfloat else np.finfo(kind).max
    smallest = 0xFF7F if bfloat else np.finfo(kind).min
    assert is_finite(np.array([], kind)) and is_finite(np.array(largest, kind))
    assert is_finite(np.array([[largest, smallest], [0, 1]], kind))
    assert is_finite(np.array([smallest], kind))
    others = [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF]
    if not bfloat:
        others = [np.inf, -np.inf, np.nan, -np.nan]
    for other in others:
        for position in range(3):
            values = np.array([largest, smallest, 1], kind)
            values[position] = other
            assert not is_finite(values), (kind, other, position)
        assert not is_finite(np.array(other, kind))
