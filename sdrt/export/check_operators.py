"""Evaluates every operator that takes a weight again, in numpy and float64, for a few of its outputs. The weights come
from the weights file by name, the other operands from the run of the graph.

So a weight that a graph takes from a wrong place, from another layer or transposed shows, whatever its size. The work
is small: of a matrix or a kernel only the rows of these outputs are read.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.onnx_graph import Node, OnnxGraph
from sdrt.export.read.tensor_file import TensorFile

Float = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

LIMIT = 1e-5
"""Largest error of a sum of products, relative to the sum of their sizes. Sums of float32 stay a tenth of it."""
NORM_LIMIT = 1e-3
"""Largest error of a norm, relative to its largest output. A mean far from zero costs float32 some digits."""
_SAMPLES = 8
"""Outputs of each operator that are evaluated."""
_VIEWS = ("Cast", "Transpose", "Unsqueeze")


class OperatorCheck:
    """Takes the nodes of a graph with their values as they run. `error` is the largest error so far, as a share of its
    limit, and `worst` the operator that had it. `seen` are the weights of the operators that were evaluated.
    """

    def __init__(self, graph: OnnxGraph, weights: TensorFile) -> None:
        self.error, self.worst = 0.0, ""
        self.seen: set[str] = set()
        self._weights = weights
        self._views = {name: name for name in graph.constants if name in weights.entries}
        """The weight of each value that is made of one weight alone."""
        for node in graph.nodes:
            if node.operator in _VIEWS and node.inputs[0] in self._views:
                self._views[node.outputs[0]] = self._views[node.inputs[0]]

    def __call__(self, nodes: list[Node], values: Arrays) -> None:
        for node in nodes:
            taken = [name for name in node.inputs if name in self._views]
            if not taken or node.operator in _VIEWS:
                continue
            with np.errstate(invalid="ignore", over="ignore"):  # a model that overflows is told by its outputs
                found, expected, scale, limit = self._evaluated(node, values)
                error = float(np.max(np.abs(found - expected) / (limit * scale), initial=0.0))
            if not error <= self.error:  # NaN included
                self.error, self.worst = error, f"{node.operator} of {self._views[taken[0]]}"
            self.seen |= {self._views[name] for name in taken}

    def _evaluated(self, node: Node, values: Arrays) -> tuple[Float, Float, Float | float, float]:
        """Some outputs as the engine gave them, the same from numpy, the size of what was summed, and the limit."""
        output = values[node.outputs[0]]
        match node.operator:
            case "Conv":
                return *self._convolution(node, values, output), LIMIT
            case "Gemm" | "MatMul":
                return *self._product(node, values, output), LIMIT
            case "GroupNormalization" | "LayerNormalization":
                expected = self._norm(node, values)
                return output.astype(np.float64), expected, float(np.abs(expected).max()) or 1.0, NORM_LIMIT
            case "Gather":
                ids = values[node.inputs[1]]
                rows = {int(i): self._rows(node.inputs[0], [int(i)])[0] for i in np.unique(ids)}
                expected = np.stack([rows[int(i)] for i in ids.flat]).reshape(output.shape)
                return output.astype(np.float64), expected, float(np.abs(expected).max()) or 1.0, LIMIT
            case "Add" | "Mul":
                a, b = (self._operand(name, values) for name in node.inputs)
                expected, size = (a + b, np.abs(a) + np.abs(b)) if node.operator == "Add" else (a * b, np.abs(a * b))
                return output.astype(np.float64), expected, size + 1e-30, LIMIT
        raise AssertionError(f"{node.operator} takes a weight, which no check knows")

    def _convolution(self, node: Node, values: Arrays, output: NDArray[Any]) -> tuple[Float, Float, Float]:
        attributes = node.numbers()
        x = values[node.inputs[0]]
        pads: Any = attributes.get("pads", [0, 0, 0, 0])
        strides: Any = attributes.get("strides", [1, 1])
        dilations: Any = attributes.get("dilations", [1])
        assert attributes.get("group", 1) == 1 and set(dilations) == {1}
        top, left, bottom, right = pads
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right))).astype(np.float64)
        places = _places(node.name, output.shape)
        kernels = self._rows(node.inputs[1], [channel for _, channel, _, _ in places])
        height, width = kernels.shape[2:]
        patches = np.stack(
            [
                x[n, :, i * strides[0] : i * strides[0] + height, j * strides[1] : j * strides[1] + width]
                for n, _, i, j in places
            ]
        )
        bias = self._bias(node, 2)[[channel for _, channel, _, _ in places]] if len(node.inputs) > 2 else np.zeros(1)
        return (
            np.array([output[place] for place in places], np.float64),
            (patches * kernels).sum(axis=(1, 2, 3)) + bias,
            np.abs(patches * kernels).sum(axis=(1, 2, 3)) + np.abs(bias) + 1e-30,
        )

    def _product(self, node: Node, values: Arrays, output: NDArray[Any]) -> tuple[Float, Float, Float]:
        """A linear layer. Its weight is `[out, in]` in every network, however the graph turns it."""
        attributes = node.numbers()
        assert attributes.get("transA", 0) == 0 and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        x = values[node.inputs[0]].reshape(-1, values[node.inputs[0]].shape[-1]).astype(np.float64)
        flat = output.reshape(-1, output.shape[-1])
        places = _places(node.name, flat.shape)
        columns = [j for _, j in places]
        matrix = self._rows(node.inputs[1], columns)
        rows = x[[i for i, _ in places]]
        bias = self._bias(node, 2)[columns] if len(node.inputs) > 2 else np.zeros(1)
        return (
            np.array([flat[place] for place in places], np.float64),
            (rows * matrix).sum(axis=1) + bias,
            np.abs(rows * matrix).sum(axis=1) + np.abs(bias) + 1e-30,
        )

    def _norm(self, node: Node, values: Arrays) -> Float:
        """Ba et al. 2016 over the last axis, Wu and He 2018 over groups of channels."""
        attributes, x = node.numbers(), values[node.inputs[0]].astype(np.float64)
        scale, offset = self._bias(node, 1), self._bias(node, 2)
        if node.operator == "LayerNormalization":
            grouped, axes = x, (-1,)
        else:
            groups = attributes["num_groups"]
            assert isinstance(groups, int)
            grouped, axes = x.reshape(x.shape[0], groups, -1), (-1,)
            scale, offset = (part.reshape(-1, *[1] * (x.ndim - 2)) for part in (scale, offset))
        epsilon: Any = attributes.get("epsilon", 1e-5)
        centred = grouped - grouped.mean(axis=axes, keepdims=True)
        normed = centred / np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + epsilon)
        result: Float = normed.reshape(x.shape) * scale + offset
        return result

    def _operand(self, name: str, values: Arrays) -> Float:
        return self._read(self._views[name]) if name in self._views else values[name].astype(np.float64)

    def _bias(self, node: Node, place: int) -> Float:
        return self._read(self._views[node.inputs[place]])

    def _read(self, name: str) -> Float:
        result: Float = np.asarray(self._weights.read(name)).astype(np.float64)
        return result

    def _rows(self, name: str, rows: Iterable[int]) -> Float:
        """Rows of a weight, each read by itself."""
        stored = self._views[name]
        read = [np.asarray(self._weights.read(stored, (row, row + 1))).astype(np.float64) for row in rows]
        return np.concatenate(read)


def _places(name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A few places of an output, the same in every run: the first, the last, and some between."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    between = [tuple(int(random.randint(side)) for side in shape) for _ in range(_SAMPLES - 2)]
    return [tuple(0 for _ in shape), tuple(side - 1 for side in shape), *between]
