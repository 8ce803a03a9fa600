"""A stand-in for the part of the TensorRT-RTX runtime that the GPU runtime uses, over a simulated GPU.

A plan names an ONNX graph; ONNX Runtime computes it on the host, reading and writing at the addresses the context was given. What
TensorRT answers with False or None is answered so; what it leaves undefined is refused. Parameter names are those of 1.7; tests compare.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from cuda_simulator import _installed, module
from gpu_simulator import ALIGNMENT, STALE, Bytes, Gpu, Node, Queue, Refused, Work, overlap

from sdrt import bundle as names
from sdrt.bundle import WEIGHTS, open_bundle
from sdrt.engine_cache import FORMAT, EngineKey, EngineRecord, Plan, Profile, platform_name, state_bytes, write_engine

__version__ = "1.7.1.116"
MAGIC = b"a plan of the simulator\n"
ACTIVATION_BYTES = {names.TEXT_ENCODER: 1000, names.STEP: 5000, names.VAE_DECODER: 9000, names.VAE_ENCODER: 9000}

Shape = tuple[int, ...]


class Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self, min_severity: int = WARNING) -> None:
        self.min_severity = min_severity


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class IRuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._allocation = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC) -> None:
        self._allocation = strategy


class Runtime:
    def __init__(self, logger: Logger) -> None:
        if not isinstance(logger, Logger):
            raise TypeError("__init__(): incompatible constructor arguments")
        self._gpu = _installed()

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        with self._gpu.call("engines", unsafe=True):
            data = bytes(serialized_engine)
            if self._gpu.faults.no_engine or not data.startswith(MAGIC):
                return None
            plan = json.loads(data.removeprefix(MAGIC))
            return ICudaEngine._make(self._gpu, plan) if plan["version"] == __version__ else None


@dataclass(frozen=True)
class Tensor:
    """An input or output of a network, its free axes named."""

    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]
    is_input: bool


class ICudaEngine:
    def __init__(self) -> None:
        raise TypeError("tensorrt_rtx.ICudaEngine: No constructor defined!")

    @classmethod
    def _make(cls, gpu: Gpu, plan: dict[str, Any]) -> ICudaEngine:
        self = object.__new__(cls)
        self._gpu, self._session = gpu, session(plan["graph"])
        self.name: str = plan["name"]
        self.device_memory_size_v2: int = plan["activation_bytes"]
        self._profiles = [{name: tuple(map(tuple, three)) for name, three in profile.items()} for profile in plan["profiles"]]
        self._tensors = tensors(self._session)
        return self

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy | IRuntimeConfig = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext | None:
        with self._gpu.call("contexts", unsafe=True):
            if self._gpu.faults.strikes("no_context"):
                return None
            config = strategy
            if isinstance(config, ExecutionContextAllocationStrategy):
                config = IRuntimeConfig()
                config.set_execution_context_allocation_strategy(strategy)  # type: ignore[arg-type]
            if config._allocation != ExecutionContextAllocationStrategy.USER_MANAGED:
                raise Refused(f"{self.name}: a context with an activation block of its own: all share one")
            return IExecutionContext._make(self, config)


@dataclass(frozen=True)
class Run:
    """One run of a network with everything it reads and writes, as it was bound."""

    engine: ICudaEngine
    addresses: dict[str, int]
    shapes: dict[str, Shape]
    memory: tuple[int, int]

    def size_bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.engine._tensors[name].dtype.itemsize

    def check(self) -> None:
        """Refuse what would be undefined."""
        gpu, where = self.engine._gpu, self.engine.name
        ranges = {name: (self.addresses[name], self.size_bytes(name)) for name in self.shapes}
        for name, (address, size) in ranges.items():
            if address % ALIGNMENT:
                raise Refused(f"{where}: {name} at {address:#x}, not on {ALIGNMENT} bytes")
            if gpu.find(address, size).kind != "device":
                raise Refused(f"{where}: {name} is not in device memory")
            if overlap(address, size, *self.memory):
                raise Refused(f"{where}: {name} lies in the activation block")
            for other, span in ranges.items():
                if other != name and not self.engine._tensors[name].is_input and overlap(address, size, *span):
                    raise Refused(f"{where}: output {name} shares memory with {other}")
        gpu.find(*self.memory)

    def compute(self) -> None:
        """Read and write at the addresses; afterwards the activation block holds nothing of use."""
        gpu, io = self.engine._gpu, self.engine._session.io_binding()
        for name, tensor in self.engine._tensors.items():
            gpu.view(self.addresses[name], self.size_bytes(name))
            bind = io.bind_input if tensor.is_input else io.bind_output
            bind(name, "cpu", 0, tensor.dtype.type, self.shapes[name], self.addresses[name])
        self.engine._session.run_with_iobinding(io)
        gpu.view(*self.memory)[...] = STALE

    def float_outputs(self) -> list[Bytes]:
        floats = [name for name, tensor in self.engine._tensors.items() if not tensor.is_input and tensor.dtype.kind == "f"]
        return [self.engine._gpu.view(self.addresses[name], self.size_bytes(name)) for name in floats]


class IExecutionContext:
    def __init__(self) -> None:
        raise TypeError("tensorrt_rtx.IExecutionContext: No constructor defined!")

    @classmethod
    def _make(cls, engine: ICudaEngine, config: IRuntimeConfig) -> IExecutionContext:
        self = object.__new__(cls)
        self.engine, self._config, self._gpu = engine, config, engine._gpu
        self.active_optimization_profile = 0
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._profile_queue: Queue | None = None
        self._warm: object = None
        return self

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self.engine.device_memory_size_v2:
            raise Refused(f"{self.engine.name}: an activation block of {size} bytes, {self.engine.device_memory_size_v2} are needed")
        if memory % ALIGNMENT:
            raise Refused(f"{self.engine.name}: an activation block at {memory:#x}, not on {ALIGNMENT} bytes")
        self._gpu.find(memory, size)
        self._memory = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        with self._gpu.call("profiles", unsafe=True):
            self._profile_queue = self._gpu.queue(int(stream_handle))
            if not 0 <= profile_index < len(self.engine._profiles):
                return self._no(f"profile {profile_index} of {len(self.engine._profiles)}")
            self.active_optimization_profile = profile_index
            self._shapes.clear()
            return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self.engine._profiles[self.active_optimization_profile].get(name, ((), (), ()))
        if not low or len(low) != len(shape) or not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return self._no(f"{name}: shape {tuple(shape)} is not within {low} to {high}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._tensors:
            return self._no(f"{name}: there is no such tensor")
        self._addresses[name] = int(memory)
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, name = self._gpu, self.engine.name
        with gpu.call("runs"):
            queue = gpu.queue(int(stream_handle))
            capture = gpu.capture_of(queue)
            gpu.faults.runs[name] = gpu.faults.runs.get(name, 0) - 1
            if gpu.faults.runs[name] == 0:
                return self._no("a fault on purpose")
            run, state = self._run(), self._state()
            if run is None:
                return False
            run.check()
            if self._profile_queue not in (None, queue):
                raise Refused(f"{name}: the profile was set on another stream")
            if capture is None:
                queue.work.append(Work(lambda: gpu.compute(lambda: self._compute(run, state))))
                return True
            if gpu.faults.capture in ("refused", "invalidated"):
                capture.invalidated = gpu.faults.capture == "invalidated"
                return self._no("a fault on purpose")
            if self._warm != state:
                raise Refused(f"{name}: captured before one finished run with the same shapes, addresses, profile and activation block")
            if self._config.dynamic_shapes_kernel_specialization_strategy != DynamicShapesKernelSpecializationStrategy.EAGER:
                raise Refused(f"{name}: kernels are specialised lazily: the graph would keep the fallback ones")
            capture.nodes.append(Node(functools.partial(_still_bound, weakref.ref(self), run, state), run.compute, run.float_outputs))
            return True

    def _no(self, why: str) -> bool:
        self._gpu.log.append(f"{self.engine.name}: {why}")
        return False

    def _compute(self, run: Run, state: object) -> None:
        run.compute()
        self._warm = state

    def _state(self) -> object:
        """What a captured graph holds fixed."""
        return self.active_optimization_profile, self._memory, tuple(sorted(self._addresses.items())), tuple(sorted(self._shapes.items()))

    def _run(self) -> Run | None:
        """What would run now; None where TensorRT returns False: something is not set, or shapes contradict each other."""
        if self._memory is None:
            raise Refused(f"{self.engine.name}: no activation block is set")
        shapes, sizes = {}, dict[str, int]()
        for name, tensor in self.engine._tensors.items():
            if name not in self._addresses or (tensor.is_input and name not in self._shapes):
                self._no(f"{name}: its {'shape' if name in self._addresses else 'address'} is not set")
                return None
            if tensor.is_input:
                shapes[name] = self._shapes[name]
                sizes |= {axis: size for axis, size in zip(tensor.shape, shapes[name], strict=True) if isinstance(axis, str) and axis.isidentifier()}
        for name, tensor in self.engine._tensors.items():
            expected = tuple(evaluate(axis, sizes) for axis in tensor.shape)
            if shapes.setdefault(name, expected) != expected:
                self._no(f"{name}: shape {shapes[name]}, the other inputs ask for {expected}")
                return None
        return Run(self.engine, dict(self._addresses), shapes, self._memory)


def _still_bound(context: weakref.ref[IExecutionContext], run: Run, state: object) -> None:
    found = context()
    if found is None:
        raise Refused(f"{run.engine.name}: a graph whose execution context is gone")
    if found._state() != state:
        raise Refused(f"{run.engine.name}: shapes, addresses, profile or activation block changed since the capture")
    run.check()


# Networks and plans

_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_}


@functools.cache
def session(graph: str) -> Any:
    """ONNX Runtime on a graph file, made once per file, on one thread: the networks are small and cores are shared."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def tensors(network: Any) -> dict[str, Tensor]:
    both = [(tensor, True) for tensor in network.get_inputs()] + [(tensor, False) for tensor in network.get_outputs()]
    return {tensor.name: Tensor(tuple(tensor.shape), np.dtype(_DTYPES[tensor.type]), is_input) for tensor, is_input in both}


def evaluate(axis: int | str, sizes: Mapping[str, int]) -> int:
    """The size of an axis: a number, a name, or a product of them such as `8*h`."""
    if isinstance(axis, int):
        return axis
    return math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in axis.split("*"))


def plan(graph: Path, name: str, profiles: Sequence[Mapping[str, Any]], *, activation_bytes: int, version: str = __version__) -> bytes:
    """A plan file for a graph file."""
    document = {"graph": str(graph), "name": name, "profiles": list(profiles), "activation_bytes": activation_bytes, "version": version}
    return MAGIC + json.dumps(document).encode()


def compile_engine(
    bundle: Path,
    *,
    graphs: Path | None = None,
    heights: tuple[int, int] = (64, 64),
    widths: tuple[int, int] = (64, 64),
    batch: int = 1,
    rows: int = 128,
    branches: tuple[int, ...] = (1, 2),
    sm: str = "sm_89",
    target: str = "tensorrt-rtx",
    compiler: str = __version__,
) -> Path:
    """Put an engine of the simulator into a bundle, over its float32 graphs. Plans name those of `graphs`, a bundle of equal ones.

    `heights` and `widths` are the smallest and largest picture in pixels.
    """
    opened = open_bundle(bundle)
    manifest = opened.manifest
    factor = manifest.latents.factor
    profiles: dict[str, tuple[Profile, ...]] = {}
    plans, blobs = {}, {}
    for graph in names.GRAPHS:
        network = tensors(session(str(open_bundle(graphs or bundle).graph(graph, "fp32"))))
        free = {"N": (1, batch), "h": tuple(side // factor for side in heights), "w": tuple(side // factor for side in widths)}
        free |= {"S": (rows, rows), "T": (manifest.text.tokens,) * 2, "n": (1, 2)}
        profiles[graph] = tuple(_profile(network, free | {"G": (count, count)}) for count in (branches if graph == names.STEP else (1,)))
        blobs[graph] = plan(
            open_bundle(graphs or bundle).graph(graph, "fp32"), graph, [p.shapes for p in profiles[graph]], activation_bytes=ACTIVATION_BYTES[graph]
        )
        digest = hashlib.sha256(blobs[graph]).hexdigest()
        plans[graph] = Plan(f"{graph}.plan", len(blobs[graph]), digest, ACTIVATION_BYTES[graph])
    key = EngineKey(
        target=target,
        compiler=compiler,
        device=sm,
        platform=platform_name(),
        precision="fp32",
        graphs={graph: manifest.files[manifest.graphs[graph]["fp32"].path].sha256 for graph in names.GRAPHS},
        weights=manifest.files[WEIGHTS].sha256,
        profiles=profiles,
        flags=(),
    )
    size, tokens = (widths[1], heights[1]), manifest.text.tokens
    state = state_bytes(manifest, size=size, batch=batch, tokens=tokens, rows=rows, branches=max(branches))
    record = EngineRecord(FORMAT, key, size, batch, tokens, rows, branches, state, manifest.files[WEIGHTS].size_bytes, plans)
    return write_engine(opened, record, blobs)


def _profile(network: Mapping[str, Tensor], free: Mapping[str, tuple[int, ...]]) -> Profile:
    low, high = ({axis: sizes[end] for axis, sizes in free.items()} for end in (0, -1))
    return Profile(
        {
            name: tuple(tuple(evaluate(axis, sizes) for axis in tensor.shape) for sizes in (low, low, high))  # type: ignore[misc]
            for name, tensor in network.items()
            if tensor.is_input
        }
    )


def modules() -> dict[str, ModuleType]:
    kinds = (Logger, ExecutionContextAllocationStrategy, DynamicShapesKernelSpecializationStrategy, Runtime, ICudaEngine, IExecutionContext, IRuntimeConfig)
    return {"tensorrt_rtx": module("tensorrt_rtx", __version__=__version__, **{kind.__name__: kind for kind in kinds})}
