"""Where the time of each graph goes: its slowest operators, and its arithmetic beside what the machine can do.

For ONNX Runtime, through its own profiler. OpenVINO and TensorRT are refused until they can be measured here.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdrt import bundle as names
from sdrt.bundle import Bundle
from sdrt.errors import MachineError

SLOWEST = 15
_RUNS = 5
_GEMM = ("Gemm", "FusedGemm")
_MATMUL = ("MatMul", "FusedMatMul", "MatMulIntegerToFloat")
_ATTENTION = ("Attention", "MultiHeadAttention")
_CONVOLUTION = ("Conv", "FusedConv")
_FLOAT_BYTES = 4


def profile(pipe: Any, kept: Mapping[str, Any], threads: int | None, wall_ms: Mapping[str, float]) -> dict[str, Any]:
    """Profile each graph of a loaded pipeline on the inputs of its last picture, which `kept` holds: `text`, `job` and `latents`.

    `wall_ms` is what each graph takes unprofiled: the profiler slows small operators many times over. Where it is missing, the sum
    of the operators stands in.

    Raises:
        MachineError: the backend that runs has no profile here yet.
    """
    engine = pipe._engine
    check_backend(engine.backend)
    feeds = _feeds(pipe.bundle, kept)
    peaks = [machine_peak()]
    events = {}
    with tempfile.TemporaryDirectory() as folder:
        for graph, inputs in feeds.items():
            events[graph] = _events(pipe.bundle, graph, inputs, threads, Path(folder))
            peaks.append(machine_peak())  # several moments: others may have been at work in one of them
    peak = {name: max(found[name] for found in peaks) for name in peaks[0]}
    return {"backend": engine.backend, "peak": peak, "graphs": {graph: analyse(found, wall_ms.get(graph), peak) for graph, found in events.items()}}


def check_backend(backend: str) -> None:
    """Raise MachineError if a backend has no profile here yet."""
    if backend != "onnxruntime":
        raise MachineError(f"--layers: not available yet for {backend}", "Use --backend onnxruntime, or leave --layers out.")


def _feeds(bundle: Bundle, kept: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tokens, emphasis, _ = kept["text"]
    job, latents = kept["job"], np.asarray(kept["latents"], np.float32)
    registers = np.zeros((names.REGISTERS, *job.init.shape), np.float32)
    registers[0], registers[1] = job.init, job.unit_noise
    step = {name: getattr(job.tables, name) for name in names.STEP_TABLES if name != "noise"}
    step |= {"row": np.zeros(1, np.int64), "registers": registers, "noise": job.noise, "mask": job.mask}
    step |= {"context": job.contexts[job.context_of_row[0]], "init": job.init, "init_noise": job.unit_noise, "concat": job.concat}
    return {
        names.TEXT_ENCODER: {"tokens": tokens, "emphasis": emphasis},
        names.STEP: step,
        names.VAE_DECODER: {"latents": latents, "rounding": np.array([0.5], np.float32)},
    }


def _events(bundle: Bundle, graph: str, inputs: Mapping[str, Any], threads: int | None, folder: Path) -> list[dict[str, Any]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / graph)
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(bundle.graph(graph, "fp32")), options, providers=["CPUExecutionProvider"])
    if unknown := {entry.name for entry in session.get_inputs()} - inputs.keys():
        raise MachineError(f"--layers: {graph}: no recorded input for {sorted(unknown)}", "Leave --layers out for this bundle.")
    for _ in range(_RUNS + 1):
        session.run(None, {entry.name: inputs[entry.name] for entry in session.get_inputs()})
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_bytes())
    return events


def analyse(events: Iterable[Mapping[str, Any]], wall_ms: float | None, peak: Mapping[str, float]) -> dict[str, Any]:
    """The slowest operators and the arithmetic of one graph, from the events of an ONNX Runtime profile of several runs, the first for warming up."""
    kernels: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and "op_name" in event.get("args", {}):
            kernels.setdefault(f"{event['args'].get('node_index', '')} {event['name']}", []).append(event)
    operators = []
    for runs in kernels.values():
        first, timed = runs[0], runs[1:] or runs
        arguments = first["args"]
        matrix = matrix_flops(arguments)
        operators.append(
            {
                "name": str(first["name"]).removesuffix("_kernel_time"), "op": str(arguments["op_name"]), "ms": statistics.median(run["dur"] for run in timed) / 1e3,
                "flops": matrix if matrix is not None else _outputs(arguments), "matrix_flops": matrix or 0, "bytes": moved_bytes(arguments),
                "shape": "x".join(map(str, next(iter(_shapes(arguments, "output_type_shape")), []))),
            }
        )  # fmt: skip
    total = sum(one["ms"] for one in operators) or 1.0
    flops, moved = sum(one["flops"] for one in operators), sum(one["bytes"] for one in operators)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in operators:
        kinds.setdefault(one["op"], []).append(one)
    by_kind = [
        {"op": op, "count": len(group), "ms": sum(one["ms"] for one in group), "share": sum(one["ms"] for one in group) / total} for op, group in kinds.items()
    ]
    roof = min(peak["flops_per_s"], flops / moved * peak["bytes_per_s"]) if moved else peak["flops_per_s"]
    taken = total if wall_ms is None else wall_ms
    reached = flops / (taken / 1e3)
    return {
        "ms": taken,
        "operators_ms": total,
        "kernels": len(operators),
        "flops": flops,
        "matrix_flops": sum(one["matrix_flops"] for one in operators),
        "bytes": moved,
        "intensity": flops / moved if moved else None,
        "flops_per_s": reached,
        "share_of_peak": reached / peak["flops_per_s"],
        "share_of_roofline": reached / roof,
        "slowest": [one | {"share": one["ms"] / total} for one in sorted(operators, key=lambda one: -one["ms"])[:SLOWEST]],
        "by_kind": sorted(by_kind, key=lambda kind: -kind["ms"])[:SLOWEST],
    }


def _shapes(arguments: Mapping[str, Any], which: str) -> list[list[int]]:
    """Shapes of the inputs or outputs that are there. A weight that was packed when the model was loaded is not."""
    return [next(iter(entry.values()), []) for entry in arguments.get(which, [])]


def _outputs(arguments: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for shape in _shapes(arguments, "output_type_shape"))


def matrix_flops(arguments: Mapping[str, Any]) -> int | None:
    """Two per multiply-add of a convolution, matrix product or attention; None for any other operator, which counts one per value it writes."""
    op, inputs, outputs = arguments["op_name"], _shapes(arguments, "input_type_shape"), _shapes(arguments, "output_type_shape")
    if not inputs or not outputs:
        return None
    values = math.prod(outputs[0])
    if op in _CONVOLUTION and len(inputs) > 1 and len(inputs[1]) > 2:
        return 2 * values * math.prod(inputs[1][1:])
    if op in _MATMUL or op in _GEMM:
        return 2 * values * _depth(inputs[0], outputs[0])
    if op in _ATTENTION and len(inputs) > 2 and len(inputs[0]) == len(inputs[1]) == 4:
        batch, heads, queries, width = inputs[0]
        return 2 * batch * heads * queries * inputs[1][2] * (width + inputs[2][3])
    return None


def _depth(first: list[int], output: list[int]) -> int:
    """The side that a matrix product sums over; the first matrix may be given transposed."""
    if len(first) < 2 or len(output) < 2 or first[-2] == output[-2]:
        return first[-1] if first else 1
    return first[-2]


def moved_bytes(arguments: Mapping[str, Any]) -> int:
    """Bytes an operator reads and writes if nothing stays in a cache between operators, packed weights included."""
    counted = sum(int(arguments.get(size, 0)) for size in ("activation_size", "parameter_size", "output_size"))
    inputs, outputs = _shapes(arguments, "input_type_shape"), _shapes(arguments, "output_type_shape")
    if arguments["op_name"] in _MATMUL and len(inputs) == 1 and outputs:
        counted += inputs[0][-1] * outputs[0][-1] * _FLOAT_BYTES
    return counted


def machine_peak(sides: Sequence[int] = (512, 1536), copied_bytes: int = 1 << 27) -> dict[str, float]:
    """What this machine does at best: float32 operations per second in a matrix product, bytes per second in a copy. Both by numpy, best of several.

    It is numpy's best, on its threads, in this moment: an engine with better kernels, or a busier moment, may pass 100 % of it.
    """
    random = np.random.default_rng(0)
    flops = 0.0
    for side in sides:
        a, b = (random.standard_normal((side, side), np.float32) for _ in range(2))
        flops = max(flops, 2 * side**3 / _best(functools.partial(np.matmul, a, b)))
    source = np.ones(copied_bytes, np.uint8)
    target = np.empty_like(source)
    return {"flops_per_s": flops, "bytes_per_s": 2 * copied_bytes / _best(functools.partial(np.copyto, target, source))}


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)
