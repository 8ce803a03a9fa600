"""One operator of a profiled graph, and the arithmetic of matrix operators from their shapes, for every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shapes = Sequence[Sequence[int]]

_CONVOLUTION = ("Conv", "FusedConv", "Convolution")
_MATRIX = ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulIntegerToFloat", "FullyConnected")
_ATTENTION = ("Attention", "MultiHeadAttention")


@dataclass(frozen=True)
class Operator:
    """The cost of one operator: ms per run, operations (of these `matrix_flops` in matrix products), and bytes it reads
    and writes.

    `shape` is that of its first output, such as `2x64x8x8`.
    """

    name: str
    op: str
    ms: float
    flops: int
    matrix_flops: int
    bytes: int
    shape: str


@dataclass(frozen=True)
class Layer:
    """A layer of an engine that only names its layers: ms per run. `op` is its kind, or a substitute for it."""

    name: str
    op: str
    ms: float


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a whole graph: operations (of these `matrix_flops` in matrix products), and bytes that its
    operators read and write.
    """

    flops: int
    matrix_flops: int
    bytes: int


def total(operators: Sequence[Operator]) -> Arithmetic:
    """The arithmetic of a graph from that of its operators."""
    return Arithmetic(
        sum(one.flops for one in operators),
        sum(one.matrix_flops for one in operators),
        sum(one.bytes for one in operators),
    )


def operator(name: str, op: str, ms: float, matrix: int | None, moved: int, outputs: Shapes) -> Operator:
    """An operator with a known number of `matrix` operations. None stands for an operator that is no matrix product: it
    counts one operation for each value that it writes.
    """
    flops = sum(map(math.prod, outputs)) if matrix is None else matrix
    return Operator(name, op, ms, flops, matrix or 0, moved, "x".join(map(str, next(iter(outputs), []))))


def matrix_flops(op: str, inputs: Shapes, outputs: Shapes) -> int | None:
    """Two operations per multiply-add of a convolution, matrix product or attention `[n, heads, rows, width]`. None for
    any other operator.
    """
    if not inputs or not outputs:
        return None
    values = math.prod(outputs[0])
    if op in _CONVOLUTION and len(inputs) > 1 and len(inputs[1]) > 2:
        return 2 * values * math.prod(inputs[1][1:])
    if op in _MATRIX:
        return 2 * values * _depth(inputs[0], outputs[0])
    if op in _ATTENTION and len(inputs) > 2 and len(inputs[0]) == len(inputs[1]) == 4:
        return attention_flops(*inputs[:3])
    return None


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Operations of both products of an attention, from the shapes `[n, heads, rows, width]` of its query, key and
    value.
    """
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _depth(first: Sequence[int], output: Sequence[int]) -> int:
    """The side that a matrix product sums over. The first matrix may be transposed."""
    if len(first) < 2 or len(output) < 2 or first[-2] == output[-2]:
        return first[-1] if first else 1
    return first[-2]


def fitted(array: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """`array` cut to `shape`. Where it is smaller, its last values are repeated: timings need sizes, not values."""
    cut = array[tuple(slice(0, side) for side in shape)]
    return np.ascontiguousarray(
        np.pad(cut, [(0, side - have) for side, have in zip(shape, cut.shape, strict=True)], mode="edge")
    )
