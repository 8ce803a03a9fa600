"""Layers of a graph in TensorRT, timed by its own profiler. The profiler gets contexts of its own, so that the
pipeline's captured ones do not change.

Written from the API's documentation and run on the simulator only; no profile has been taken on a GPU yet.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bench.device_times import DeviceTimes
from sdrt.bench.operators import Arithmetic, Layer, fitted, total
from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import STEP
from sdrt.engines.targets import ONNXRUNTIME
from sdrt.errors import MachineError, ResourceError
from sdrt.runtime.engine import BatchShape

_COPIED_BYTES = 1 << 28
_COPIES = 5
NO_PEAK = (
    "operations per second were not measured: sdrt has no GPU kernel of its own to measure them with, and TensorRT"
    " tells no peak"
)
NO_ARITHMETIC = (
    "operations and bytes are unknown: ONNX Runtime, which counts them, is not installed beside TensorRT (pip install"
    " onnxruntime)"
)


def fitted_inputs(
    plans: Any, graph: str, shape: BatchShape, inputs: Mapping[str, NDArray[Any]]
) -> tuple[int, dict[str, NDArray[Any]]]:
    """The profile of an engine for a running batch, and inputs cut or padded to the nearest shapes it takes."""
    profile = plans.profile(shape) if graph == STEP else 0
    ranges = plans.record.key.profiles[graph][profile].shapes
    made = {}
    for name, array in inputs.items():
        low, _, high = ranges.get(name, (array.shape,) * 3)
        made[name] = fitted(array, [min(max(side, a), b) for side, a, b in zip(array.shape, low, high, strict=True)])
    return profile, made


def profile_graph(
    plans: Any, bundle: Bundle, graph: str, profile: int, inputs: Mapping[str, NDArray[Any]], runs: int
) -> list[Layer]:
    """Run a graph of the engine once to warm up and `runs` times more, without capturing it. Returns the median of each
    layer.

    Raises:
        MachineError: TensorRT refuses, or reports no layers.
    """
    with plans.guarded(graph):
        context = plans.context(graph)
        fields = [(name, array.shape, array.dtype) for name, array in inputs.items()]
        given = plans.block(fields)
        taken = None
        try:
            for name, array in inputs.items():
                given.host(name)[...] = array
            given.upload(plans.stream, fields[0][0], fields[-1][0])
            plans.bind(
                context, graph, profile, {name: (given.address(name), array.shape) for name, array in inputs.items()}
            )
            outputs = [
                (name, tuple(context.get_tensor_shape(name)), tensor.dtype)
                for name, tensor in plans.signatures[graph].outputs.items()
            ]
            taken = plans.block(outputs, pinned=False)
            for name, _, _ in outputs:
                context.set_tensor_address(name, taken.address(name))
            timed = _layer_times(plans, context, graph, runs)
            kinds = _kinds(plans, context)
        finally:
            for block in (given, taken):
                if block is not None:
                    block.close(plans.stream)
    return [Layer(name, kinds.get(name) or _without_numbers(name), ms) for name, ms in timed.items()]


def _layer_times(plans: Any, context: Any, graph: str, runs: int) -> dict[str, float]:
    trt: Any = plans.library

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Adds up the times of a run by layer. A name may occur more than once in a run."""

        def __init__(self) -> None:
            super().__init__()
            self.run: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.run[layer_name] = self.run.get(layer_name, 0.0) + ms

    profiler = Profiler()
    context.profiler = profiler
    context.enqueue_emits_profile = False  # reported below, after the run: the report then waits for nothing
    found: list[dict[str, float]] = []
    for _ in range(runs + 1):
        profiler.run = {}
        plans.enqueue(context, graph, plans.stream)
        plans.stream.sync()
        if not context.report_to_profiler():
            raise MachineError(f"--layers: {graph}: TensorRT did not report its layers", "Leave --layers out.")
        found.append(profiler.run)
    if not found[-1]:
        raise MachineError(f"--layers: {graph}: TensorRT reported no layer", "Leave --layers out.")
    return {name: statistics.median(run.get(name, 0.0) for run in found[1:]) for name in found[-1]}


def _kinds(plans: Any, context: Any) -> dict[str, str]:
    """Kinds of layers by name, of plans that were made with details; none where TensorRT tells nothing."""
    inspector = context.engine.create_engine_inspector()
    try:
        told = json.loads(inspector.get_engine_information(plans.library.LayerInformationFormat.JSON))
    except ValueError:
        return {}
    return {
        str(layer.get("Name")): str(layer.get("LayerType", ""))
        for layer in told.get("Layers", [])
        if isinstance(layer, dict)
    }


def _without_numbers(name: str) -> str:
    return re.sub(r"[_.]*\d+", "", name) or name


def arithmetic(
    bundle: Bundle, graph: str, inputs: Mapping[str, NDArray[Any]], precision: str, folder: Path
) -> Arithmetic | None:
    """Operations and bytes of a graph, counted in one run of its float32 version in ONNX Runtime. None where ONNX
    Runtime is not installed.

    Half-precision engines move half of these bytes; the parts that they keep in float32 are small.
    """
    if find_spec(ONNXRUNTIME.module) is None:
        return None
    from sdrt.bench.layers_onnxruntime import profile_graph as profile_onnx

    found = total(profile_onnx(bundle.graph(graph, "fp32"), inputs, None, folder, 0))
    return found if precision == "fp32" else replace(found, bytes=found.bytes // 2)


def device_bytes_per_s(plans: Any, size_bytes: int = _COPIED_BYTES) -> float | None:
    """What a copy within the GPU's memory reads and writes per second, between CUDA events, best of several.

    None if the GPU has no memory left for the copy, or if the copy takes no time at all.
    """
    try:
        with plans.guarded("copy"):
            best = _copy_ms(plans, size_bytes)
    except ResourceError:
        return None
    return 2 * size_bytes / (best / 1e3) if best > 0 else None


def _copy_ms(plans: Any, size_bytes: int) -> float:
    times, blocks = DeviceTimes(plans.cuda), []
    try:
        for _ in range(2):
            blocks.append(plans.block([("bytes", (size_bytes,), np.uint8)], pinned=False))
        target, source = blocks
        source.clear(plans.stream)
        for _ in range(_COPIES):
            times.around("copy", plans.stream, lambda: target.copy(plans.stream, 0, source, 0, size_bytes))
        plans.stream.sync()
        return min(times.read()["copy"])
    finally:
        for block in blocks:
            block.close(plans.stream)
