"""Where the time of each graph goes: its slowest operators, and its arithmetic compared with what the machine can do.

Operators are timed by ONNX Runtime's profiler, OpenVINO's counters and TensorRT's layer profiler.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bench import layers_onnxruntime, layers_openvino, layers_tensorrt
from sdrt.bench.operators import Arithmetic, Layer, Operator, total
from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER, dimensions, signatures
from sdrt.engines.targets import COMPILED, ONNXRUNTIME, OPENVINO, on_gpu
from sdrt.errors import MachineError
from sdrt.runtime.running_batch import HostMemory, Slots, step_sizes

SLOWEST = 15
_RUNS = 5

Peak = Mapping[str, float | None]
"""`flops_per_s` and `bytes_per_s` of a machine; None where not measured."""


def profile(pipe: Any, kept: Mapping[str, Any], wall_ms: Mapping[str, float]) -> dict[str, Any]:
    """Profile each graph of a loaded pipeline on the inputs of its last picture. `kept` holds them: `text`, `jobs`,
    `shape` and `latents`.

    `wall_ms` is the time of each graph without a profiler, because profilers make small operators many times slower.
    Where it is missing, the sum of the operators is used. Unknown values are None; the `notes` give the reason.

    Raises:
        MachineError: the running backend has no profile here yet.
    """
    backend = pipe._engine.backend
    check_backend(backend)
    return {"backend": backend} | (_on_gpu if on_gpu(backend) else _on_cpu)(pipe, kept, wall_ms)


def _on_cpu(pipe: Any, kept: Mapping[str, Any], wall_ms: Mapping[str, float]) -> dict[str, Any]:
    measure = {ONNXRUNTIME.name: _onnxruntime, OPENVINO.name: _openvino}[pipe._engine.backend]
    peaks = [machine_peak()]
    operators: dict[str, list[Operator]] = {}
    made_for: dict[str, Mapping[str, tuple[int, ...]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for graph, inputs in _feeds(pipe.bundle, kept).items():
            operators[graph], made_for[graph] = measure(pipe, kept, graph, inputs, Path(folder))
            peaks.append(machine_peak())  # several moments: others may have been at work in one of them
    if made_for[STEP]:
        # Static shapes: a run of the text encoder takes one row of tokens, of the decoder one picture, of the step as
        # many as it was made for.
        steps = -(-len(kept["jobs"]) // made_for[STEP]["init"][0])
        runs = {TEXT_ENCODER: kept["text"][0].shape[1], VAE_DECODER: len(kept["latents"]), STEP: steps}
        wall_ms = {graph: ms / runs.get(graph, 1) for graph, ms in wall_ms.items()}
    peak = {name: max(found[name] for found in peaks) for name in peaks[0]}
    graphs = {graph: analyse(found, total(found), wall_ms.get(graph), peak) for graph, found in operators.items()}
    return {
        "peak": peak,
        "peak_of": "numpy on this machine: a float32 matrix product, and a copy",
        "notes": [],
        "graphs": graphs,
    }


def _onnxruntime(
    pipe: Any, kept: Mapping[str, Any], graph: str, inputs: Mapping[str, Any], folder: Path
) -> tuple[list[Operator], Mapping[str, tuple[int, ...]]]:
    """Operators of a graph, and the shapes that it was made for: none, as it takes any."""
    session = pipe._engine.session(graph, folder / graph)
    return layers_onnxruntime.profile_session(session, graph, inputs, _RUNS), {}


def _openvino(
    pipe: Any, kept: Mapping[str, Any], graph: str, inputs: Mapping[str, Any], folder: Path
) -> tuple[list[Operator], Mapping[str, tuple[int, ...]]]:
    """Operators of a graph, and the shapes that it was made for."""
    compiled, shapes = pipe._engine.load_counting(graph, kept["shape"], len(kept["jobs"]))
    attention = layers_openvino.read_attention(pipe.bundle.graph(graph, "fp32"), shapes)
    return layers_openvino.profile_graph(compiled, attention, inputs, _RUNS), shapes


def _on_gpu(pipe: Any, kept: Mapping[str, Any], wall_ms: Mapping[str, float]) -> dict[str, Any]:
    plans = pipe._engine.plans
    peak = {"flops_per_s": None, "bytes_per_s": layers_tensorrt.device_bytes_per_s(plans)}
    notes, graphs = [layers_tensorrt.NO_PEAK], {}
    with tempfile.TemporaryDirectory() as folder:
        for graph, inputs in _feeds(pipe.bundle, kept).items():
            chosen, fitting = layers_tensorrt.fitted_inputs(plans, graph, kept["shape"], inputs)
            found = layers_tensorrt.profile_graph(plans, pipe.bundle, graph, chosen, fitting, _RUNS)
            counted = layers_tensorrt.arithmetic(pipe.bundle, graph, fitting, plans.record.key.precision, Path(folder))
            if counted is None and layers_tensorrt.NO_ARITHMETIC not in notes:
                notes.append(layers_tensorrt.NO_ARITHMETIC)
            given, taken = (len(next(iter(each.values()))) for each in (inputs, fitting))
            runs = 1 if graph == STEP else -(-given // taken)  # as many rows of tokens or pictures as the profile takes
            graphs[graph] = analyse(found, counted, wall_ms[graph] / runs if graph in wall_ms else None, peak)
    return {
        "peak": peak,
        "peak_of": "a copy within the GPU's memory, between CUDA events",
        "notes": notes,
        "graphs": graphs,
    }


def check_backend(backend: str) -> None:
    """Raise MachineError if a backend has no profile here yet."""
    if backend not in COMPILED:
        raise MachineError(
            f"--layers: not available yet for {backend}",
            f"Use --backend {', '.join(COMPILED[:-1])} or {COMPILED[-1]}, or leave --layers out.",
        )


def _feeds(bundle: Bundle, kept: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Inputs of each graph. Those of the step are as before the first call of the pictures' jobs."""
    jobs, shape = kept["jobs"], kept["shape"]
    known, rows = signatures(dimensions(bundle.manifest)), jobs[0].rows
    signature = known[STEP]
    memory: Any = HostMemory(signature, step_sizes(shape, len(jobs), rows))  # joined, never called
    batch = Slots(memory, signature, shape, len(jobs), rows)
    for job in jobs:
        batch.join(job)
    return {
        TEXT_ENCODER: dict(zip(known[TEXT_ENCODER].inputs, kept["text"][0], strict=True)),
        STEP: memory.bound(0)[0],
        VAE_DECODER: {"latents": np.asarray(kept["latents"], np.float32), "rounding": np.array([0.5], np.float32)},
    }


def analyse(
    operators: Sequence[Operator | Layer], arithmetic: Arithmetic | None, wall_ms: float | None, peak: Peak
) -> dict[str, Any]:
    """The slowest operators and the arithmetic of one graph, None where unknown. `peak` is the machine's, from
    `machine_peak`.
    """
    operators_ms = sum(one.ms for one in operators)
    kinds: dict[str, list[Operator | Layer]] = {}
    for one in operators:
        kinds.setdefault(one.op, []).append(one)
    whole = operators_ms or 1.0
    times = {op: sum(one.ms for one in group) for op, group in kinds.items()}
    by_kind = [
        {"op": op, "count": len(kinds[op]), "ms": times[op], "share": times[op] / whole}
        for op in sorted(times, key=lambda op: -times[op])
    ]
    taken = whole if wall_ms is None else wall_ms
    return {
        "ms": taken,
        "operators_ms": operators_ms,
        "kernels": len(operators),
        **_reached(arithmetic, taken, peak),
        "slowest": [
            asdict(one) | {"share": one.ms / whole} for one in sorted(operators, key=lambda one: -one.ms)[:SLOWEST]
        ],
        "by_kind": by_kind[:SLOWEST],
    }


def _reached(arithmetic: Arithmetic | None, taken_ms: float, peak: Peak) -> dict[str, Any]:
    """Arithmetic of a graph, and the shares of the machine's peaks that it reaches in `taken_ms`."""
    known = (
        "flops",
        "matrix_flops",
        "bytes",
        "intensity",
        "flops_per_s",
        "bytes_per_s",
        "share_of_peak",
        "share_of_bandwidth",
        "share_of_roofline",
    )
    found: dict[str, Any] = dict.fromkeys(known)
    if arithmetic is None:
        return found
    found |= asdict(arithmetic)
    seconds, top, wide = taken_ms / 1e3, peak["flops_per_s"], peak["bytes_per_s"]
    found |= {"flops_per_s": arithmetic.flops / seconds, "bytes_per_s": arithmetic.bytes / seconds}
    if arithmetic.bytes:
        found["intensity"] = arithmetic.flops / arithmetic.bytes
    if wide is not None:
        found["share_of_bandwidth"] = found["bytes_per_s"] / wide
    if top is not None:
        found["share_of_peak"] = found["flops_per_s"] / top
        if wide is not None:
            roof = min(top, found["intensity"] * wide) if arithmetic.bytes else top
            found["share_of_roofline"] = found["flops_per_s"] / roof
    return found


def machine_peak(sides: Sequence[int] = (512, 1536), copied_bytes: int = 1 << 27) -> dict[str, float]:
    """The best this machine can do: float32 operations per second in a matrix product, and bytes per second in a copy.
    Both with numpy, the best of several tries.

    This is numpy's best, on numpy's threads, at this moment. An engine with better kernels may pass 100 % of it, and so
    may any engine if other programs were busy during the tries.
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
