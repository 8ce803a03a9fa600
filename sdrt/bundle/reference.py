"""How far an engine's outputs are from the reference outputs. One measure serves the build's self-check, `sdrt verify`,
and models saved by ONNX Runtime.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import BundleError, printable

MAX_REFERENCE_BYTES = 256 << 20
"""Most bytes of a reference, all its arrays together. They are small, whatever the model's size."""
FLOAT32_LIMIT = 1e-4
"""Largest relative L2 error of a float32 graph."""
PIXEL_LIMIT = 0.01
"""For uint8 outputs of a float32 graph: the largest share of values that may be off by one level, because they rounded
the other way.
"""
HALF_LIMIT = 2e-2
"""Largest relative L2 error of a half-precision graph, pixels included. float16 keeps 11 bits, and a deep network loses
a few of them.
"""

BFLOAT16_LIMIT = 8 * HALF_LIMIT
"""The same for bfloat16, which keeps three bits fewer."""


@dataclass(frozen=True)
class Parity:
    """One compared output. `error` is relative (L2 norms); for integers it is the share of values that differ."""

    output: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


def read_reference(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """The small inputs of a graph, and the outputs of the traced network that the build left for it.

    Raises:
        BundleError: the file is no archive of arrays, or the arrays are too large.
    """
    again = "Build the bundle again."
    try:
        with zipfile.ZipFile(path) as archive:
            size_bytes = sum(member.file_size for member in archive.infolist())
        if size_bytes > MAX_REFERENCE_BYTES:
            raise BundleError(
                f"{path}: arrays of {size_bytes:,} bytes, more than the limit of {MAX_REFERENCE_BYTES:,}", again
            )
        with np.load(path, allow_pickle=False) as stored:
            inputs = {name[3:]: stored[name] for name in stored.files if name.startswith("in.")}
            expected = {name[4:]: stored[name] for name in stored.files if name.startswith("out.")}
    except BundleError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds of errors
        raise BundleError(f"{path}: cannot be read as arrays: {printable(str(error)[:200])}", again) from error
    return inputs, expected


def compare(expected: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]], compute: str) -> list[Parity]:
    """Compare every expected output of a graph whose arithmetic is `compute` (fp32, fp16, bf16), worst first."""
    exact = compute == "fp32"
    loose = BFLOAT16_LIMIT if compute == "bf16" else HALF_LIMIT
    results = []
    for name, array in expected.items():
        limit = loose if not exact else PIXEL_LIMIT if array.dtype == np.uint8 else FLOAT32_LIMIT
        results.append(Parity(name, _error(array, found.get(name), exact), limit))
    return sorted(
        results, key=lambda parity: (parity.ok, -parity.error / parity.limit)
    )  # failures first, NaN among them


def _error(expected: NDArray[Any], found: NDArray[Any] | None, exact: bool) -> float:
    if found is None or expected.shape != found.shape or expected.dtype != found.dtype or not expected.size:
        return float("inf")
    if expected.dtype == np.uint8 and exact:
        difference = np.abs(expected.astype(int) - found.astype(int))
        return 1.0 if difference.max() > 1 else float((difference > 0).mean())
    if expected.dtype.kind not in "fu":
        return float((expected != found).mean())
    reference = expected.astype(np.float64)
    return float(np.linalg.norm(reference - found.astype(np.float64)) / (np.linalg.norm(reference) or 1.0))
