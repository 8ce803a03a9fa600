"""Runs a graph once through ONNX Runtime, part after part, with the memory of its largest part.

A whole run keeps more: whatever depends on a weight alone, its cast and its transposition, may run long before its
result is needed, and all of these results together are larger than the model. So each part gets what its own operators
need, and ends before the next one begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from sdrt.machine import engine_libraries
from sdrt.machine.interruptible import interruptible

if TYPE_CHECKING:
    import onnx

Arrays = dict[str, NDArray[Any]]

PART_BYTES = 256 << 20
"""Weights after which a part ends, as stored."""


def run_in_parts(path: Path, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Run a graph on the CPU without optimisations. Its weights lie in the same folder. Returns the outputs by name."""
    import onnx

    graph = (model := onnx.load(str(path), load_external_data=False)).graph
    outputs = [output.name for output in graph.output]
    nodes = _late(graph)
    last_use = {name: i for i, node in enumerate(nodes) for name in node.input}
    values: Arrays = dict(inputs)
    done = 0
    for part in _parts(graph, nodes):
        done += len(part)
        made = {name for node in part for name in node.output}
        wanted = [name for name in made if name in outputs or last_use.get(name, -1) >= done]
        values |= _run(model, path.parent, part, values, wanted)
        for name in [name for name in values if name not in outputs and last_use.get(name, -1) < done]:
            del values[name]
    return {name: values[name] for name in outputs}


def _late(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes in an order in which those that depend on weights alone come right before the first that needs them."""
    known = {tensor.name for tensor in graph.initializer}
    waiting: dict[str, onnx.NodeProto] = {}
    ordered: list[onnx.NodeProto] = []

    def place(node: onnx.NodeProto) -> None:
        for name in node.input:
            if (early := waiting.get(name)) is not None:
                for output in early.output:
                    del waiting[output]
                place(early)
        ordered.append(node)

    for node in graph.node:
        if all(not name or name in known or name in waiting for name in node.input):
            waiting |= dict.fromkeys(node.output, node)
        else:
            place(node)
    outputs = {output.name for output in graph.output}
    for name in [name for name in waiting if name in outputs]:
        if name in waiting:
            place(waiting[name])
    return ordered


def _parts(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> Iterator[list[onnx.NodeProto]]:
    """The nodes cut where the weights of a part come to `PART_BYTES`."""
    sizes = {
        tensor.name: int(entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    }
    part: list[onnx.NodeProto] = []
    taken = 0
    for node in nodes:
        part.append(node)
        taken += sum(sizes.get(name, 0) for name in node.input)
        if taken >= PART_BYTES:
            yield part
            part, taken = [], 0
    if part:
        yield part


def _run(model: onnx.ModelProto, folder: Path, part: list[onnx.NodeProto], values: Arrays, wanted: list[str]) -> Arrays:
    """Run some nodes. `values` holds what the nodes before them gave."""
    import onnx
    from onnx import helper

    onnxruntime = engine_libraries.onnxruntime()
    used = {name for node in part for name in node.input}
    given = {name: values[name] for name in used if name in values}
    graph = helper.make_graph(
        part,
        model.graph.name,
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in wanted],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    small = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # each weight is used once
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.log_severity_level = 3
    run = onnxruntime.RunOptions()
    data = small.SerializeToString()
    session = interruptible(lambda: onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]))
    stop = partial(setattr, run, "terminate", True)
    return dict(zip(wanted, interruptible(lambda: session.run(wanted, given, run), stop), strict=True))
