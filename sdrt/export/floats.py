"""Numbers as files store them and as numpy holds them: the types that numpy lacks, the rounding to what a bundle
stores, and a quick test for NaN and infinity.

numpy has no bfloat16 and no 8-bit floats. Read, they become float32, which holds each of them exactly. Rounded,
bfloat16 is kept as its bits, an array of uint16. Imports numpy alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STORED = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
"""numpy's type for the stored values of each type that can be read; for those that numpy lacks, their bits."""

_BLOCK = 1 << 16
"""Values rounded at a time, so that what lies between stays in the cache."""
_INFINITY = {"float64": 0x7FF << 52, "float32": 0xFF << 23, "float16": 0x1F << 10, "uint16": 0xFF << 7}
"""The bits of infinity, by numpy's type. Those of NaN are larger; uint16 holds the bits of bfloat16."""


def widened(stored: Array, code: str) -> Array:
    """Stored values of a type `code`, as `STORED` has them, in a type that numpy computes with. None changes."""
    flat = stored.reshape(-1)  # of a single value numpy makes no array
    if code == "BF16":
        return np.left_shift(flat, 16, dtype=np.uint32).view(np.float32).reshape(stored.shape)
    if code in _EIGHT_BITS:
        return _EIGHT_BITS[code][flat].reshape(stored.shape)
    return stored


def as_float32(values: Array) -> NDArray[np.float32]:
    """The values in float32, the same array if it is float32 already. What is too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):  # invalid: a NaN of the signalling kind
        return values.astype(np.float32, copy=False)


def rounded(values: Array, code: str) -> Array:
    """Floating-point values rounded to the nearest of F32, F16 or BF16, ties to even; BF16 as bits. Without a copy
    where nothing changes. What is too large becomes infinite. float64 is rounded to float32 first, as all arithmetic
    of a build has it.
    """
    if code == "BF16":
        return _bfloat16(as_float32(values))
    if code == "F32" or values.dtype == np.float64:
        values = as_float32(values)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(STORED[code], copy=False)


def is_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite; uint16 holds the bits of bfloat16. As whole numbers the bits are quicker to
    compare than the values: in float16 thirty times.
    """
    infinity, item_bits = _INFINITY[values.dtype.name], 8 * values.itemsize
    positive, all_bits = values.view(f"i{values.itemsize}"), values.view(f"u{values.itemsize}")
    negative_infinity = infinity | 1 << (item_bits - 1)
    return int(positive.max(initial=0)) < infinity and int(all_bits.max(initial=0)) < negative_infinity


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    flat = values.reshape(-1)
    result = np.empty(flat.shape, np.uint16)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        bits = block.view(np.uint32)
        carry = bits >> 16
        carry &= 1
        carry += 0x7FFF  # more than this in the lower half rounds up, and so does exactly half above an odd number
        carry += bits
        carry >>= 16
        result[start : start + _BLOCK] = carry
        if (nan := np.isnan(block)).any():  # the carry may have made it a number
            result[start : start + _BLOCK][nan] = 0x7FC0
    return result.reshape(values.shape)


def _float8_e4m3fn() -> NDArray[np.float32]:
    """Micikevicius et al. 2022 (arXiv:2209.05433): 4 bits of exponent and 3 of mantissa; no infinity, and NaN where
    all are set.
    """
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size[code & 127 == 127] = np.nan
    return np.copysign(size, np.where(code & 128, -1.0, 1.0)).astype(np.float32)


def _float8_e5m2() -> NDArray[np.float32]:
    """As above; it is the upper half of float16."""
    return as_float32((np.arange(256, dtype=np.uint16) << 8).view(np.float16))


_EIGHT_BITS = {"F8_E4M3": _float8_e4m3fn(), "F8_E5M2": _float8_e5m2()}
"""The number that each of the 256 codes of a type means."""
