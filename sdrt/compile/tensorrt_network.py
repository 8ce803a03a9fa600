"""Compiling one graph inside TensorRT: parse it, set its shapes, let attention without a fused kernel decompose, build.

Runs in a process of its own (`sdrt.compile.worker`). One way over both libraries: `trt` is the tensorrt_rtx or tensorrt
module.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from sdrt.compile.watch import Progress, make_monitor
from sdrt.engines.record import Profile
from sdrt.engines.targets import TARGETS
from sdrt.errors import MachineError, ResourceError, SdrtError, printable
from sdrt.files.publish import cache_folder, staged_file, write_file
from sdrt.machine.packages import install_command
from sdrt.machine.tensorrt_messages import OUT_OF_MEMORY, make_log, short

logger = logging.getLogger("sdrt")

_FUSED_HEAD = range(12, 257)
"""Sizes of an attention head that have fused kernels in half precision."""
_NOT_FUSED = "is_decomposable"
_SCORES_BYTES = 1 << 28
"""The most that the scores of an attention without a fused kernel may take, queries times keys."""
_NO_KERNEL = re.compile(r"could not find any implementation for node ([^\n]{1,200})", re.IGNORECASE)

Side = int | str
"""A side of an input's shape: a number, or the name of a free axis."""


@dataclass(frozen=True)
class Compiler:
    """A library and what it compiles for. `device` is as in the engine's key, `gpu` counts from 0 where the library
    needs one, `sms` where not.
    """

    trt: Any
    target: str
    version: str
    device: str
    gpu: int | None
    sms: tuple[int, ...]

    def __str__(self) -> str:
        return f"{TARGETS[self.target].title} {self.version}"


@dataclass(frozen=True)
class Demand:
    """The dimension that asks for most memory, in words, and the flag that lowers it."""

    words: str
    flag: str


@dataclass(frozen=True)
class Built:
    """A compiled graph: its plan, seconds, layers of the network, attention layers allowed to run without a fused
    kernel, and activation bytes if known.
    """

    plan: memoryview
    parse_s: float
    build_s: float
    layers: int
    unfused: tuple[str, ...]
    device_memory_bytes: int | None


@dataclass(frozen=True)
class _Network:
    """A parsed graph. The parser, what it read and the `constants` that were added must outlive the build."""

    builder: Any
    network: Any
    parser: Any
    log: Any
    constants: list[Any]


def import_compiler(target: str, device: str, gpu: int | None, sms: tuple[int, ...]) -> Compiler:
    """A target's library for a device that is known."""
    trt = library(target)
    return Compiler(trt, target, str(trt.__version__), device, gpu, sms)


def use_gpu(compiler: Compiler) -> None:
    """Make the GPU that a compiler needs this thread's current one, on which TensorRT builds. It takes memory there.

    Raises:
        MachineError: `cuda.core` is not installed.
    """
    if compiler.gpu is None:
        return
    try:
        from cuda.core import Device
    except ImportError as error:
        raise MachineError(
            f"target {compiler.target}: {error}", f"Install it with: {install_command(TARGETS[compiler.target].extra)}"
        ) from error
    Device(compiler.gpu).set_current()


def library(target: str) -> Any:
    """The module of a target.

    Raises:
        MachineError: it is not installed, or does not load.
    """
    try:
        return import_module(TARGETS[target].module)
    except (ImportError, OSError) as error:
        raise MachineError(
            f"target {target}: cannot import {TARGETS[target].title}: {error}",
            f"Install it with: {install_command(TARGETS[target].extra)}",
        ) from error


def build_graph(
    compiler: Compiler,
    graph: str,
    path: Path,
    profiles: Sequence[Profile],
    demand: Demand,
    progress: Progress,
    stop: Event,
) -> Built:
    """Compile one graph with a profile for each of `profiles`; axes on which all agree are static. Ends soon after
    `stop` is set.

    Attention that has no fused kernel is decomposed on the network: the ONNX file stays portable.

    Raises:
        MachineError: the graph cannot be read or compiled.
        ResourceError: out of memory.
        KeyboardInterrupt: stopped.
    """
    log = make_log(compiler.trt)
    decompose_all = False
    while True:
        started = time.perf_counter()
        parsed = _parse(compiler, graph, path)
        config = parsed.builder.create_builder_config()
        _configure(compiler, config)
        scores = _largest_scores(compiler.trt, parsed.network, profiles)
        _set_shapes(parsed, config, profiles)
        unfused = _decompose(compiler.trt, parsed, scores, everything=decompose_all)
        monitor = make_monitor(compiler.trt, lambda done: progress(graph, done), stop)
        config.progress_monitor = monitor
        parse_s, started = time.perf_counter() - started, time.perf_counter()
        with _timing_cache(compiler, config):
            plan = parsed.builder.build_serialized_network(parsed.network, config)
        build_s = time.perf_counter() - started
        if monitor.error is not None:
            raise monitor.error
        if plan is not None:
            return Built(
                memoryview(plan),
                parse_s,
                build_s,
                parsed.network.num_layers,
                unfused,
                _device_memory(compiler, log, plan),
            )
        if stop.is_set():
            raise KeyboardInterrupt
        if decompose_all or not any(_NOT_FUSED in line for line in parsed.log.lines):
            raise build_error(f"{path}: {graph}: {compiler}", parsed.log.lines, demand)
        decompose_all = True


def build_error(where: str, lines: Sequence[str], demand: Demand) -> SdrtError:
    """A build that gave no plan as an error, from what was logged: for memory and missing kernels it names the
    dimension and the flag.
    """
    fix = f"What asks for most is {demand.words}: lower {demand.flag}"
    for line in lines:
        if OUT_OF_MEMORY.search(line):
            return ResourceError(f"{where}: out of memory: {short(line)}", f"{fix}, or free memory on this machine.")
        if no_kernel := _NO_KERNEL.search(line):
            return MachineError(
                f"{where}: no kernel for node {short(no_kernel[1])}",
                f"{fix}, or build the bundle with another --precision.",
            )
    return MachineError(
        f"{where}: gave no engine: {short(lines[-1]) if lines else 'no reason given'}", "Run: sdrt doctor"
    )


def _parse(compiler: Compiler, graph: str, path: Path) -> _Network:
    trt = compiler.trt
    log = make_log(trt)
    builder = trt.Builder(log)
    # Networks are always strongly typed in TensorRT-RTX and from TensorRT 11 on; there the flag is ignored.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):  # by path: the weights lie beside the graph
        where, why = "the file", "no reason given"
        if parser.num_errors:
            first = parser.get_error(0)
            where = f"node {first.node_name()} ({first.node_operator()})" if first.node_name() else where
            why = first.desc()
        raise MachineError(
            f"{path}: {graph}: {compiler} cannot read {printable(where)}: {short(why)}",
            "Build the bundle again with this version of sdrt, or install the version of TensorRT it was tested with.",
        )
    return _Network(builder, network, parser, log, [])


def _inputs(network: Any) -> list[tuple[Any, tuple[Side, ...]]]:
    """Each input with its sides."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    return [
        (
            tensor,
            tuple(
                side if side >= 0 else tensor.get_dimension_name(i) or f"axis {i}"
                for i, side in enumerate(tensor.shape)
            ),
        )
        for tensor in tensors
    ]


def _configure(compiler: Compiler, config: Any) -> None:
    trt = compiler.trt
    for flag in build_flags(trt):
        if flag == "require_user_allocation":
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0
    if compiler.sms:
        config.num_compute_capabilities = len(compiler.sms)
        for i, sm in enumerate(compiler.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)


def build_flags(trt: Any) -> tuple[str, ...]:
    """What every engine is built with beside its shapes, as its key names it.

    User allocation refuses a network that a CUDA graph could not capture, where the library has the flag. Without TF32,
    what the graph says is float32 is float32. Without auxiliary streams there is one chain of kernels: less memory, and
    nothing to fork in a captured graph.
    """
    return (
        *(("require_user_allocation",) if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") else ()),
        "no_tf32",
        "no_auxiliary_streams",
    )


def _set_shapes(parsed: _Network, config: Any, profiles: Sequence[Profile]) -> None:
    """Fix every axis that all profiles agree on; add the profiles if any axis is left free."""
    free = []
    for tensor, sides in _inputs(parsed.network):
        every = [shape for profile in profiles for shape in profile.shapes[tensor.name]]
        sizes = [{shape[i] for shape in every} for i in range(len(sides))]
        tensor.shape = tuple(size.pop() if len(size) == 1 else -1 for size in sizes)
        if -1 in tuple(tensor.shape):
            free.append(str(tensor.name))
    for profile in profiles if free else ():
        made = parsed.builder.create_optimization_profile()
        for name in free:
            made.set_shape(name, *profile.shapes[name])
        config.add_optimization_profile(made)


def _attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Each attention of a network."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give out the base class
            yield layer.attention


def _largest_scores(trt: Any, network: Any, profiles: Sequence[Profile]) -> dict[str, int]:
    """Bytes that the scores of each attention take at the largest shapes, `[B, H, S, T]`. Leaves those shapes set."""
    found: dict[str, int] = {}
    for profile in profiles:
        for tensor, _ in _inputs(network):
            tensor.shape = profile.shapes[tensor.name][2]
        for attention in _attentions(trt, network):
            query, key = attention.get_input(0), attention.get_input(1)
            numbers = math.prod(tuple(query.shape)[:3]) * tuple(key.shape)[2]
            found[attention.name] = max(found.get(attention.name, 0), numbers * query.dtype.itemsize)
    return found


def _decompose(trt: Any, parsed: _Network, scores: Mapping[str, int], *, everything: bool) -> tuple[str, ...]:
    """Let attention layers that may lack a fused kernel run as several kernels: float32, unusual head sizes, one head
    of free shape. Their scores are then in memory: where they are large, the queries are taken a slice at a time, which
    gives the same numbers.
    """
    chosen = []
    for attention in list(_attentions(trt, parsed.network)):
        query = attention.get_input(0)  # [B, H, S, D]
        shape = tuple(query.shape)
        if (
            everything
            or query.dtype == trt.DataType.FLOAT
            or shape[-1] not in _FUSED_HEAD
            or (shape[1] == 1 and -1 in shape)
        ):
            attention.decomposable = True
            chosen.append(str(attention.name))
            slices = -(-scores[attention.name] // _SCORES_BYTES)
            if slices > 1 and attention.mask is None and not attention.causal:
                _slice_queries(trt, parsed, attention, slices)
    return tuple(chosen)


def _slice_queries(trt: Any, parsed: _Network, attention: Any, slices: int) -> None:
    """Have an attention computed as `slices` of it side by side, each of about as many of its queries `[B, H, S, D]`:
    softmax(Q K^T) V. Its scale is in Q and K already. The layer itself stays, with nobody to read it.
    """
    network = parsed.network
    query, key, value, whole = (*(attention.get_input(i) for i in range(3)), attention.get_output(0))
    readers = [
        (layer, i)
        for layer in (network.get_layer(j) for j in range(network.num_layers))
        for i in range(layer.num_inputs)
        if (tensor := layer.get_input(i)) is not None and tensor.name == whole.name
    ]

    def vector(*numbers: int) -> Any:
        parsed.constants.append(np.array(numbers, np.int64))
        return network.add_constant((4,), parsed.constants[-1]).get_output(0)

    def combined(operation: str, first: Any, second: Any) -> Any:
        return network.add_elementwise(first, second, getattr(trt.ElementWiseOperation, operation)).get_output(0)

    shape = network.add_shape(query).get_output(0)
    others = combined("PROD", shape, vector(1, 1, 0, 1))
    # S is divided here, not when the engine is built: it may be free.
    bounds = [
        combined("FLOOR_DIV", combined("PROD", shape, vector(0, 0, i, 0)), vector(1, 1, slices, 1))
        for i in range(slices + 1)
    ]
    parts = []
    for i, (start, end) in enumerate(pairwise(bounds)):
        part = network.add_slice(query, (0,) * 4, (0,) * 4, (1,) * 4)
        part.set_input(1, start)
        part.set_input(2, combined("SUM", others, combined("SUB", end, start)))
        scores = network.add_matrix_multiply(
            part.get_output(0), trt.MatrixOperation.NONE, key, trt.MatrixOperation.TRANSPOSE
        )
        weights = network.add_softmax(scores.get_output(0))
        weights.axes = 1 << 3  # over the keys
        product = network.add_matrix_multiply(
            weights.get_output(0), trt.MatrixOperation.NONE, value, trt.MatrixOperation.NONE
        )
        for layer, what in ((scores, "scores"), (weights, "weights"), (product, "values")):
            layer.name = f"{attention.name}, {what} {i + 1} of {slices}"
        parts.append(product.get_output(0))
    together = network.add_concatenation(parts)
    together.axis = 2
    for layer, i in readers:
        layer.set_input(i, together.get_output(0))


@contextmanager
def _timing_cache(compiler: Compiler, config: Any) -> Iterator[None]:
    """Enterprise TensorRT measures kernels on the GPU; what it measured is kept for that version and GPU in the user's
    cache folder.
    """
    if compiler.gpu is None:
        yield
        return
    name = re.sub(r"[^\w.]+", "-", f"{compiler.version}-{compiler.device}")
    file, blob = None, b""
    with suppress(OSError):  # the cache only saves time
        file = cache_folder() / "timing" / f"{name}.cache"
        blob = file.read_bytes()
    cache = config.create_timing_cache(blob) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    yield
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(file) as stage:
            write_file(stage, memoryview(config.get_timing_cache().serialize()))
    except (OSError, SdrtError) as error:
        logger.info("timing cache not written: %s", error)


def _device_memory(compiler: Compiler, log: Any, plan: Any) -> int | None:
    """Bytes of activations the engine takes, where its GPU is here: only a loaded engine says."""
    if compiler.gpu is None:
        return None
    engine = compiler.trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise MachineError(
            f"{compiler}: cannot load the engine it has just made:"
            f" {short(log.lines[-1]) if log.lines else 'no reason given'}",
            "Run: sdrt doctor",
        )
    return int(engine.device_memory_size_v2)
