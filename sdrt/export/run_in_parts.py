"""Runs a graph once through ONNX Runtime, part after part, with the memory of its largest part.

A whole run keeps more: whatever depends on a weight alone, its cast and its transposition, may run long before its
result is needed, and all of these results together are larger than the model. So each part gets what its own operators
need, and ends before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from numpy.typing import NDArray

from sdrt.bundle.onnx_graph import Node, OnnxGraph, read_graph, stored, value
from sdrt.machine import engine_libraries
from sdrt.machine.interruptible import interruptible

Arrays = dict[str, NDArray[Any]]

PART_BYTES = 64 << 20
"""Weights after which a part ends, as stored."""

Observe = Callable[[list[Node], Arrays], None]
"""Called with the nodes of each part that has run, and with every value that they took or gave, weights excepted."""


def run_in_parts(
    path: Path, inputs: Mapping[str, NDArray[Any]], observe: Observe | None = None, stop: Event | None = None
) -> Arrays:
    """Run a graph on the CPU without optimisations. Its weights lie in the same folder. Returns the outputs by name.

    Raises:
        CancelledError: `stop` was set, by another thread.
    """
    graph = read_graph(path.read_bytes())
    nodes, of_weights = _late(graph)
    last_use = {name: i for i, node in enumerate(nodes) for name in node.inputs}
    values: Arrays = dict(inputs)
    done = 0
    for part in _parts(graph, nodes):
        if stop is not None and stop.is_set():
            raise CancelledError
        done += len(part)
        made = [name for node in part for name in node.outputs]
        later = {name for name in made if name in graph.outputs or last_use.get(name, -1) >= done}
        wanted = [name for name in made if name in later or (observe is not None and name not in of_weights)]
        values |= _run(graph, path.parent, part, values, wanted)
        if observe is not None:
            observe(part, values)
        for name in [name for name in values if name not in graph.outputs and last_use.get(name, -1) < done]:
            del values[name]
    return {name: values[name] for name in graph.outputs}


def _late(graph: OnnxGraph) -> tuple[list[Node], set[str]]:
    """The nodes in an order in which those that depend on weights alone come right before the first that needs them,
    and the values that depend on weights alone.
    """
    of_weights = set(graph.constants)
    waiting: dict[str, Node] = {}
    ordered: list[Node] = []

    def place(node: Node) -> None:
        for name in node.inputs:
            if (early := waiting.get(name)) is not None:
                for output in early.outputs:
                    del waiting[output]
                place(early)
        ordered.append(node)

    for node in graph.nodes:
        if all(not name or name in of_weights for name in node.inputs):
            waiting |= dict.fromkeys(node.outputs, node)
            of_weights.update(node.outputs)
        else:
            place(node)
    for name in [name for name in waiting if name in graph.outputs]:
        if name in waiting:
            place(waiting[name])
    return ordered, of_weights


def _parts(graph: OnnxGraph, nodes: list[Node]) -> Iterator[list[Node]]:
    """The nodes cut where the weights of a part come to `PART_BYTES`."""
    places = {name: stored(data) for name, data in graph.constants.items()}
    sizes = {name: place.size_bytes for name, place in places.items() if place is not None}
    part: list[Node] = []
    taken = 0
    for node in nodes:
        part.append(node)
        taken += sum(sizes.get(name, 0) for name in node.inputs)
        if taken >= PART_BYTES:
            yield part
            part, taken = [], 0
    if part:
        yield part


def _run(graph: OnnxGraph, folder: Path, part: list[Node], values: Arrays, wanted: list[str]) -> Arrays:
    """Run some nodes. `values` holds what the nodes before them gave."""
    onnxruntime = engine_libraries.onnxruntime()
    used = {name for node in part for name in node.inputs}
    given = {name: values[name] for name in used if name in values}
    data = OnnxGraph(
        graph.name,
        part,
        {name: tensor for name, tensor in graph.constants.items() if name in used},
        {name: value(name, array.dtype.name, array.shape) for name, array in given.items()},
        {name: value(name) for name in wanted},
        graph.model,
    ).to_bytes()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")  # each weight is used once
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.log_severity_level = 3
    run = onnxruntime.RunOptions()
    session = interruptible(lambda: onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]))
    stop = partial(setattr, run, "terminate", True)
    return dict(zip(wanted, interruptible(lambda: session.run(wanted, given, run), stop), strict=True))
