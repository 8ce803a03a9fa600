"""Operators of a graph in ONNX Runtime, timed by its own profiler."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdrt.bench.operators import Operator, matrix_flops, operator
from sdrt.errors import MachineError
from sdrt.runtime.backends.onnxruntime.model import import_onnxruntime, open_graph

_PACKED = ("MatMul", "FusedMatMul", "MatMulIntegerToFloat")
_FLOAT_BYTES = 4


def profile_graph(
    path: Path, inputs: Mapping[str, Any], threads: int | None, folder: Path, runs: int
) -> list[Operator]:
    """Run an ONNX graph once to warm up and `runs` times more, and return its operators. The profiler writes its file
    into `folder`.

    Raises:
        MachineError: the graph has an input that `inputs` lacks.
    """
    ort = import_onnxruntime("--layers")
    return profile_session(open_graph(ort, path, threads, profile=folder / path.stem), path.name, inputs, runs)


def profile_session(session: Any, name: str, inputs: Mapping[str, Any], runs: int) -> list[Operator]:
    """`profile_graph` for a session made with the profiler on.

    Raises:
        MachineError: the graph has an input that `inputs` lacks.
    """
    wanted = [entry.name for entry in session.get_inputs()]
    if unknown := set(wanted) - inputs.keys():
        raise MachineError(
            f"--layers: {name}: no recorded input for {sorted(unknown)}", "Leave --layers out for this bundle."
        )
    for _ in range(runs + 1):
        session.run(None, {name: inputs[name] for name in wanted})
    return operators_of(json.loads(Path(session.end_profiling()).read_bytes()))


def operators_of(events: Iterable[Mapping[str, Any]]) -> list[Operator]:
    """The operators in the events of a profile of several runs. The time of each is the median over its runs, without
    the first run, which warmed up.
    """
    kernels: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and "op_name" in event.get("args", {}):
            kernels.setdefault(f"{event['args'].get('node_index', '')} {event['name']}", []).append(event)
    found = []
    for events_of_one in kernels.values():
        arguments, timed = events_of_one[0]["args"], events_of_one[1:] or events_of_one
        op, inputs, outputs = (
            str(arguments["op_name"]),
            _shapes(arguments, "input_type_shape"),
            _shapes(arguments, "output_type_shape"),
        )
        name = str(events_of_one[0]["name"]).removesuffix("_kernel_time")
        ms = statistics.median(event["dur"] for event in timed) / 1e3
        found.append(
            operator(
                name, op, ms, matrix_flops(op, inputs, outputs), _moved_bytes(arguments, op, inputs, outputs), outputs
            )
        )
    return found


def _shapes(arguments: Mapping[str, Any], which: str) -> list[list[int]]:
    """Shapes of the inputs or outputs that an event lists. A weight that was packed when the model was loaded is not
    listed.
    """
    return [next(iter(entry.values()), []) for entry in arguments.get(which, [])]


def _moved_bytes(arguments: Mapping[str, Any], op: str, inputs: list[list[int]], outputs: list[list[int]]) -> int:
    """Bytes that an operator reads and writes if nothing stays in a cache between operators. Packed weights are
    included.
    """
    counted = sum(int(arguments.get(size, 0)) for size in ("activation_size", "parameter_size", "output_size"))
    if op in _PACKED and len(inputs) == 1 and outputs:
        counted += inputs[0][-1] * outputs[0][-1] * _FLOAT_BYTES
    return counted
