"""Operators of a graph in OpenVINO, timed by its own counters. Their shapes come from the model that OpenVINO runs.

The counters are averages over all runs since the graph was loaded, in whole microseconds. An operator that takes less
than one microsecond counts as zero.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from sdrt.bench.operators import Operator, attention_flops, fitted, matrix_flops, operator
from sdrt.machine import engine_libraries

Attention = tuple[tuple[int, ...], ...]
"""Shapes `[n, heads, rows, width]` of the query, key and value of an attention."""
_ATTENTION = "ScaledDotProductAttention"
_FUSED = ("Subgraph", _ATTENTION)


def profile_graph(
    compiled: Any, attention: Sequence[Attention], inputs: Mapping[str, NDArray[Any]], runs: int
) -> list[Operator]:
    """Run a graph with counters once to warm up and `runs` times more, and return its operators.

    `attention` lists the attention operators of its ONNX graph. `inputs` are cut or padded to the engine's shapes.
    """
    ov = engine_libraries.openvino()
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        array = fitted(inputs[port.get_any_name()], tuple(port.get_shape()))
        request.set_tensor(port.get_any_name(), ov.Tensor(array))
    averages = []
    for _ in range(runs + 1):
        request.infer()
        averages.append(
            {entry.node_name: round(entry.real_time.total_seconds() * 1e6) for entry in request.profiling_info}
        )
    taken = {name: time_of([average.get(name, 0) for average in averages]) / 1e3 for name in averages[0]}
    return operators_of(compiled.get_runtime_model().get_ordered_ops(), taken, attention)


def time_of(averages_us: Sequence[int]) -> float:
    """Microseconds per run, from the average after each of several runs. The first run, which warmed up, is left out.

    The result is the mean of the other runs. It is their median if the two differ by more than rounding explains,
    because then another program was at work during one run.
    """
    totals = [average * run for run, average in enumerate(averages_us, 1)]
    runs = [after - before for before, after in itertools.pairwise(totals)]
    mean, middle = statistics.fmean(runs), statistics.median(runs)
    return max(0.0, middle if abs(mean - middle) > len(averages_us) else mean)


def operators_of(nodes: Sequence[Any], taken_ms: Mapping[str, float], attention: Sequence[Attention]) -> list[Operator]:
    """The nodes of a model that run: all nodes that took time, and every matrix product however short. `taken_ms` is by
    the node's name.
    """
    found = []
    for node in nodes:
        op, ms = node.get_rt_info()["layerType"].astype(str), taken_ms.get(node.get_friendly_name(), 0.0)
        inputs, outputs = ([tuple(port.get_shape()) for port in ports] for ports in (node.inputs(), node.outputs()))
        matrix = matrix_flops(op, inputs, outputs)
        if op in _FUSED and (whole := next((one for one in attention if _is_attention(inputs, one)), None)) is not None:
            op, matrix = "Attention", attention_flops(*whole)
        if ms > 0 or matrix is not None:
            found.append(
                operator(node.get_friendly_name(), op, ms, matrix, _moved_bytes(node, matrix is not None), outputs)
            )
    return found


def _is_attention(inputs: Sequence[tuple[int, ...]], attention: Attention) -> bool:
    """Whether a fused node's inputs are the query, key and value of an attention operator.

    Names do not tell: a node that was fused with the one after it has the name of the latter. Shapes do. The key may be
    transposed. The heads of query and value may come after the rows.
    """
    query, key, value = attention
    if len(inputs) < 3 or inputs[1] not in (key, (*key[:2], key[3], key[2])):
        return False
    return sorted(inputs[0]) == sorted(query) and sorted(inputs[2]) == sorted(value)


def read_attention(path: Path, shapes: Mapping[str, Sequence[int]]) -> list[Attention]:
    """The distinct attention operators of an ONNX graph at these input shapes."""
    model = engine_libraries.openvino().Core().read_model(str(path))
    model.reshape({name: list(shape) for name, shape in shapes.items()})
    operators = [op for op in model.get_ordered_ops() if op.get_type_name() == _ATTENTION]
    return list(dict.fromkeys(tuple(tuple(op.input(i).get_shape()) for i in range(3)) for op in operators))


def _moved_bytes(node: Any, matrix: bool) -> int:
    """Bytes that a node reads and writes if nothing stays in a cache between nodes.

    The model lists weights as they are stored, but kernels hold them in the type they compute in.
    """
    sizes = [(math.prod(port.get_shape()), port.get_element_type().size) for port in (*node.inputs(), *node.outputs())]
    if matrix and len(node.inputs()) > 1:
        sizes[1] = (sizes[1][0], min(sizes[0][1], sizes[1][1]))
    return sum(values * size for values, size in sizes)
