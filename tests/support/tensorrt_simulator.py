"""A stand-in for the part of the TensorRT-RTX runtime that the GPU runtime uses, over a simulated GPU; and for
enterprise TensorRT's, which is the same but for what `RTX_ONLY` lists.

A plan names an ONNX graph; ONNX Runtime computes it on the host, reading and writing at the addresses the context was
given. What TensorRT answers with False or None is answered so; what it leaves undefined is refused. Parameter names are
those of 1.7; tests compare.
"""

from __future__ import annotations

import enum
import functools
import gc
import json
import math
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from cuda_simulator import _installed, module
from gpu_simulator import ALIGNMENT, STALE, Bytes, Gpu, Node, Queue, Refused, Work, overlap
from simulated_plans import MAGIC, VERSION, evaluate, layers, session, tensors

__version__ = VERSION

Shape = tuple[int, ...]
RTX_ONLY: dict[str, frozenset[str]] = {
    "": frozenset(
        {"DynamicShapesKernelSpecializationStrategy", "EngineValidity", "EngineInvalidityDiagnostics", "IRuntimeCache"}
    ),
    "IExecutionContext": frozenset({"is_stream_capturable"}),
    "Runtime": frozenset({"engine_header_size", "get_engine_validity"}),
    "IRuntimeConfig": frozenset(
        {
            "dynamic_shapes_kernel_specialization_strategy",
            "create_runtime_cache",
            "set_runtime_cache",
            "get_runtime_cache",
        }
    ),
}
"""What enterprise TensorRT has not: names of the module, and attributes by class."""


class Part:
    """An object of the library. One of enterprise TensorRT has only what that has."""

    def __getattribute__(self, name: str) -> Any:
        if name in RTX_ONLY.get(type(self).__name__, ()) and _installed().enterprise:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in RTX_ONLY.get(type(self).__name__, ()) and _installed().enterprise:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        super().__setattr__(name, value)


class ILogger:
    """As in the real bindings, a subclass that does not call this constructor cannot be used."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError("log is for a subclass to define")


class Logger(ILogger):
    """Prints to stderr, which nobody reads."""

    def __init__(self, min_severity: int = ILogger.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: int, msg: str) -> None:
        _installed().log.append(msg)


class EngineValidity(enum.IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class IRuntimeConfig(Part):
    def __init__(self) -> None:
        if not _installed().enterprise:
            self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._allocation = ExecutionContextAllocationStrategy.STATIC
        self._cache: weakref.ref[IRuntimeCache] | None = None

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._allocation = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache._make(_installed())

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        if not isinstance(cache, IRuntimeCache):
            raise TypeError("set_runtime_cache(): incompatible function arguments")
        self._cache = weakref.ref(cache)
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return None if self._cache is None else self._cache()


class IRuntimeCache:
    """Kernels by what they were compiled for. TensorRT-RTX runs what is in it: one that was changed is refused here."""

    def __init__(self) -> None:
        raise TypeError("tensorrt_rtx.IRuntimeCache: No constructor defined!")

    @classmethod
    def _make(cls, gpu: Gpu) -> IRuntimeCache:
        self = object.__new__(cls)
        self._gpu, self._kernels = gpu, set[str]()
        return self

    def _machine(self) -> dict[str, Any]:
        return {"version": __version__, "gpu": self._gpu.name, "sm": self._gpu.sm, "driver": self._gpu.driver_cuda}

    def serialize(self) -> memoryview:
        with self._gpu.call(unsafe=True):
            text = json.dumps({**self._machine(), "kernels": sorted(self._kernels)}).encode()
            return memoryview(b"%08x" % zlib.crc32(text) + text)

    def deserialize(self, blob: bytes) -> bool:
        with self._gpu.call(unsafe=True):
            checksum, text = bytes(blob[:8]), bytes(blob[8:])
            if b"%08x" % zlib.crc32(text) != checksum:
                raise Refused("a runtime cache that was changed: it holds native code, which runs")
            found = json.loads(text)
            kernels, driver, here = found.pop("kernels"), found.pop("driver"), self._machine()
            newest = here.pop("driver")
            if found != json.loads(json.dumps(here)) or driver // 1000 != newest // 1000 or newest < driver:
                return False
            self._kernels |= set(kernels)
            return True

    def reset(self) -> bool:
        self._kernels.clear()
        return True


class Runtime(Part):
    def __init__(self, logger: ILogger) -> None:
        if not isinstance(logger, ILogger) or not hasattr(logger, "_made"):
            raise TypeError("__init__(): incompatible constructor arguments")
        self._gpu, self._logger = _installed(), logger

    @property
    def engine_header_size(self) -> int:
        return len(MAGIC)

    def get_engine_validity(self, buffer: bytes) -> tuple[EngineValidity, int]:
        with self._gpu.call(unsafe=True):
            if len(buffer) < self.engine_header_size:
                raise Refused("a header cut short")
            problems = self._gpu.faults.problems
            if not bytes(buffer).startswith(MAGIC):
                problems |= EngineInvalidityDiagnostics.MALFORMED_ENGINE
            return (EngineValidity.INVALID if problems else EngineValidity.VALID), problems

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        with self._gpu.call("engines", unsafe=True):
            data = bytes(serialized_engine)
            plan = json.loads(data.removeprefix(MAGIC)) if data.startswith(MAGIC) else {"version": "none"}
            if self._gpu.faults.no_engine or plan["version"] != __version__:
                self._say(f"IRuntime::deserializeCudaEngine: version {plan['version']}, {__version__} is expected")
                return None
            if self._gpu.faults.strikes("no_weights") or not self._gpu.take(len(data)):
                self._say("out of memory: weights")
                return None
            return ICudaEngine._make(self, plan, len(data))

    def _say(self, why: str) -> None:
        self._logger.log(ILogger.ERROR, why)


class ICudaEngine:
    def __init__(self) -> None:
        raise TypeError("tensorrt_rtx.ICudaEngine: No constructor defined!")

    @classmethod
    def _make(cls, runtime: Runtime, plan: dict[str, Any], size_bytes: int) -> ICudaEngine:
        self = object.__new__(cls)
        self._runtime, self._gpu, self._session = runtime, runtime._gpu, session(plan["graph"])
        self._taken_bytes = size_bytes
        self.name: str = plan["name"]
        self._digest = f"{zlib.crc32(json.dumps(plan).encode()):08x}"
        self.device_memory_size_v2: int = plan["activation_bytes"]
        self._profiles = [
            {name: tuple(map(tuple, three)) for name, three in profile.items()} for profile in plan["profiles"]
        ]
        self._tensors = tensors(self._session)
        self._layers = layers(plan["graph"])
        return self

    def __del__(self) -> None:
        if hasattr(self, "_taken_bytes"):
            self._gpu.library_bytes -= self._taken_bytes

    @property
    def _cost_ms(self) -> float:
        return self._gpu.costs_ms.get(self.name, 1.0)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector._make(self)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy | IRuntimeConfig = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext | None:
        with self._gpu.call("contexts", unsafe=True):
            if self._gpu.faults.strikes("no_context") or not self._gpu.take(self._gpu.context_bytes):
                self._runtime._say(f"IExecutionContext: {self.name}: out of memory: persistent memory of 512 bytes")
                return None
            config = strategy
            if isinstance(config, ExecutionContextAllocationStrategy):
                config = IRuntimeConfig()
                config.set_execution_context_allocation_strategy(strategy)  # type: ignore[arg-type]
            if config._allocation != ExecutionContextAllocationStrategy.USER_MANAGED:
                raise Refused(f"{self.name}: a context with an activation block of its own: all share one")
            context = IExecutionContext._make(self, config)
            context._compile("whatever the shapes")
            return context


class LayerInformationFormat(enum.IntEnum):
    ONELINE = 0
    JSON = 1


class EngineInspector:
    """Plans keep names of layers, and their kinds too where they were made with details."""

    def __init__(self) -> None:
        raise TypeError("tensorrt_rtx.EngineInspector: No constructor defined!")

    @classmethod
    def _make(cls, engine: ICudaEngine) -> EngineInspector:
        self = object.__new__(cls)
        self._engine = engine
        return self

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        if format != LayerInformationFormat.JSON:
            raise NotImplementedError("only JSON is simulated")
        detailed = self._engine._gpu.detailed_plans
        return json.dumps(
            {
                "Layers": [
                    {"Name": name, "LayerType": kind} if detailed else name for name, kind in self._engine._layers
                ],
                "Bindings": [],
            }
        )


class IProfiler:
    """As in the real bindings, a subclass that does not call this constructor cannot be given to a context."""

    def __init__(self) -> None:
        self._made = True

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError("report_layer_time is for a subclass to define")


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
        gpu.clock_ms += self.engine._cost_ms

    def float_outputs(self) -> list[Bytes]:
        floats = [
            name for name, tensor in self.engine._tensors.items() if not tensor.is_input and tensor.dtype.kind == "f"
        ]
        return [self.engine._gpu.view(self.addresses[name], self.size_bytes(name)) for name in floats]


@dataclass
class Past:
    """What a context has run: its last state that is done, and runs since the last report; and whether it is gone."""

    warm: object = None
    timed: int = 0
    gone: bool = False

    def compute(self, run: Run, state: object) -> None:
        self.check(run.engine.name)
        run.compute()
        if run.engine._gpu.faults.drift == "first run" and self.warm != state:
            for written in run.float_outputs():
                written.view(np.float32)[...] *= 1.05
        self.warm, self.timed = state, self.timed + 1

    def check(self, where: str) -> None:
        if self.gone:
            raise Refused(f"{where}: its execution context was destroyed while work of it was queued")

    def end(self) -> None:
        self.gone = True


class IExecutionContext(Part):
    """`_life` is destroyed with it. The garbage collector does not know such arrays: what watches this one is told when
    the context goes, not before the finalizers of those that hold it.
    """

    def __init__(self) -> None:
        raise TypeError("tensorrt_rtx.IExecutionContext: No constructor defined!")

    @classmethod
    def _make(cls, engine: ICudaEngine, config: IRuntimeConfig) -> IExecutionContext:
        self = object.__new__(cls)
        self.engine, self._config, self._gpu = engine, config, engine._gpu
        self._kernels: set[str] = set()
        self._taken_bytes = self._gpu.context_bytes
        self.active_optimization_profile = 0
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._divided: object = None
        self._profile_queue: Queue | None = None
        self._past, self._life = Past(), np.zeros(1)
        weakref.finalize(self._life, self._past.end).atexit = False
        self._profiler: IProfiler | None = None
        self.enqueue_emits_profile = True
        return self

    def __del__(self) -> None:
        if hasattr(self, "_taken_bytes"):
            self._gpu.library_bytes -= self._taken_bytes

    @property
    def profiler(self) -> IProfiler | None:
        return self._profiler

    @profiler.setter
    def profiler(self, value: IProfiler) -> None:
        if not isinstance(value, IProfiler) or not hasattr(value, "_made"):
            raise TypeError("profiler: an IProfiler whose constructor has run is expected")
        self._profiler = value

    def get_tensor_shape(self, name: str) -> Shape:
        run = self._run(addresses=False, memory=False)
        return run.shapes[name] if run is not None else (-1,) * len(self.engine._tensors[name].shape)

    def report_to_profiler(self) -> bool:
        """Report the run before, whose work must have ended. It waits for it in the real library; here a caller that
        has not waited is refused.
        """
        with self._gpu.call(unsafe=True):
            if self._profiler is None:
                return self._no("report_to_profiler without a profiler")
            if self.enqueue_emits_profile:
                raise Refused(
                    f"{self.engine.name}: report_to_profiler where enqueueing reports by itself: every layer would be"
                    " told twice"
                )
            if self._past.timed != 1:
                raise Refused(
                    f"{self.engine.name}: {self._past.timed} finished runs since the last report, 1 is expected: wait for"
                    " the stream first"
                )
            self._report()
            return True

    def _report(self) -> None:
        assert self._profiler is not None
        self._past.timed = 0
        for position, (name, _) in enumerate(self.engine._layers, 1):  # the n-th layer takes n shares of the run
            self._profiler.report_layer_time(
                name, self.engine._cost_ms * 2 * position / (len(self.engine._layers) * (len(self.engine._layers) + 1))
            )

    def update_device_memory_size_for_shapes(self) -> int:
        """What the shapes at hand need, a part of what the largest of the profile do."""
        with self._gpu.call(unsafe=True):
            run = self._run(addresses=False, memory=False)
            if run is None:
                raise Refused(f"{self.engine.name}: not all shapes are set: TensorRT would divide nothing sensibly")
            self._divided = tuple(sorted(self._shapes.items()))
            return self._needed_bytes()

    def _needed_bytes(self) -> int:
        if self._divided != tuple(sorted(self._shapes.items())):
            return self.engine.device_memory_size_v2
        profile = self.engine._profiles[self.active_optimization_profile]
        sizes = [(math.prod(shape), math.prod(profile[name][2])) for name, shape in self._shapes.items()]
        return -(-self.engine.device_memory_size_v2 * sum(a for a, _ in sizes) // sum(b for _, b in sizes))

    def set_device_memory(self, memory: int, size: int) -> None:
        if size < self._needed_bytes():
            raise Refused(f"{self.engine.name}: an activation block of {size} bytes, {self._needed_bytes()} are needed")
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
        if (
            not low
            or len(low) != len(shape)
            or not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
        ):
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
            if run.memory[1] < self._needed_bytes():
                raise Refused(f"{name}: these shapes need another activation block than the one that is set")
            if self._profile_queue not in (None, queue):
                raise Refused(f"{name}: the profile was set on another stream")
            if capture is None:
                self._compile(f"profile {self.active_optimization_profile}, {sorted(run.shapes.items())}")
                past = self._past
                queue.work.append(Work(lambda: gpu.compute(lambda: past.compute(run, state))))
                if self._profiler is not None and self.enqueue_emits_profile:
                    gpu.synchronise(queue)  # enqueueing with a profiler waits, and tells it
                    self._report()
                return True
            if self._profiler is not None:
                raise Refused(f"{name}: captured with a profiler set: every replay would record its events")
            if gpu.faults.garbage and gc.isenabled():
                gc.collect()
            broken = gpu.faults.capture == "invalidated"
            if gpu.faults.breaks_capture("refused", "invalidated"):
                capture.invalidated = broken
                return self._no("a fault on purpose")
            if self._past.warm != state:
                raise Refused(
                    f"{name}: captured before one finished run with the same shapes, addresses, profile and activation"
                    " block"
                )
            if (
                not gpu.enterprise
                and self._config.dynamic_shapes_kernel_specialization_strategy
                != DynamicShapesKernelSpecializationStrategy.EAGER
            ):
                raise Refused(f"{name}: kernels are specialised lazily: the graph would keep the fallback ones")
            capture.nodes.append(
                Node(
                    functools.partial(_still_bound, weakref.ref(self), run, state),
                    run.compute,
                    run.float_outputs,
                    functools.partial(self._past.check, name),
                )
            )
            return True

    def _compile(self, purpose: str) -> None:
        """Compile kernels unless this context or its cache has them. Enterprise TensorRT has them in its plans."""
        if self._gpu.enterprise:
            return
        key, known = f"{self.engine._digest}: {purpose}", self._kernels
        if self._config._cache is not None:
            if (cache := self._config._cache()) is None:
                raise Refused(f"{self.engine.name}: the runtime cache of its context is gone")
            known = cache._kernels
        if key not in known and key not in self._kernels:
            self._gpu.compiled.append(self.engine.name)
        known.add(key)
        self._kernels.add(key)

    def is_stream_capturable(self, stream: int) -> bool:
        with self._gpu.call(unsafe=True):
            self._gpu.queue(int(stream))
            if self._gpu.faults.breaks_capture("not capturable"):
                return self._no("a copy to the host cannot be captured")
            return True

    def _no(self, why: str) -> bool:
        self.engine._runtime._say(f"{self.engine.name}: {why}")
        return False

    def _state(self) -> object:
        """What a captured graph holds fixed."""
        return (
            self.active_optimization_profile,
            self._memory,
            tuple(sorted(self._addresses.items())),
            tuple(sorted(self._shapes.items())),
        )

    def _run(self, *, addresses: bool = True, memory: bool = True) -> Run | None:
        """What would run now; None where TensorRT returns False: something is not set, or shapes contradict each
        other.
        """
        if memory and self._memory is None:
            raise Refused(f"{self.engine.name}: no activation block is set")
        shapes, sizes = {}, dict[str, int]()
        for name, tensor in self.engine._tensors.items():
            if (addresses and name not in self._addresses) or (tensor.is_input and name not in self._shapes):
                self._no(f"{name}: its {'shape' if name in self._addresses else 'address'} is not set")
                return None
            if tensor.is_input:
                shapes[name] = self._shapes[name]
                sizes |= {
                    axis: size
                    for axis, size in zip(tensor.shape, shapes[name], strict=True)
                    if isinstance(axis, str) and axis.isidentifier()
                }
        for name, tensor in self.engine._tensors.items():
            expected = tuple(evaluate(axis, sizes) for axis in tensor.shape)
            if shapes.setdefault(name, expected) != expected:
                self._no(f"{name}: shape {shapes[name]}, the other inputs ask for {expected}")
                return None
        return Run(self.engine, dict(self._addresses), shapes, self._memory or (0, 0))


def _still_bound(context: weakref.ref[IExecutionContext], run: Run, state: object) -> None:
    found = context()
    if found is None:
        raise Refused(f"{run.engine.name}: a graph whose execution context is gone")
    if found._state() != state:
        raise Refused(f"{run.engine.name}: shapes, addresses, profile or activation block changed since the capture")
    run.check()


def modules() -> dict[str, ModuleType]:
    """TensorRT-RTX's module."""
    return {"tensorrt_rtx": _module("tensorrt_rtx")}


def enterprise_modules() -> dict[str, ModuleType]:
    """Enterprise TensorRT's module, for a `Gpu` that is `enterprise`."""
    made = _module("tensorrt")
    for name in RTX_ONLY[""]:
        delattr(made, name)
    return {"tensorrt": made}


def _module(name: str) -> ModuleType:
    kinds = (
        ILogger,
        Logger,
        EngineValidity,
        EngineInvalidityDiagnostics,
        ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy,
        Runtime,
        ICudaEngine,
        IExecutionContext,
        IRuntimeCache,
        IRuntimeConfig,
        IProfiler,
        EngineInspector,
        LayerInformationFormat,
    )
    return module(name, __version__=__version__, **{kind.__name__: kind for kind in kinds})
