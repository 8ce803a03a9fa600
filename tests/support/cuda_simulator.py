"""Stand-ins for the part of cuda.core and cuda.bindings that the GPU runtime uses, over a simulated GPU.

Names, parameters and the order of calls are those of cuda.core 1.2; tests compare them.
"""

from __future__ import annotations

import enum
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from gpu_simulator import Allocation, Capture, CUDAError, Gpu, Queue, Refused, Work

BUILT_FOR_CUDA = 13000
"""The CUDA of cuda.bindings, as `cudaDriverGetVersion` writes it: its runtime refuses an older driver."""


class Handle:
    """A library's own type for an address; `int` gives the number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Stream objects cannot be instantiated directly. Please use Device APIs (create_stream).")

    @classmethod
    def _make(cls, gpu: Gpu) -> Stream:
        self = object.__new__(cls)
        self._gpu, self._queue = gpu, Queue(0x5000 + 0x10 * (len(gpu.queues) + 1))
        gpu.queues[self._queue.handle] = self._queue
        return self

    @property
    def handle(self) -> Handle:
        return Handle(self._queue.handle)

    def sync(self) -> None:
        self._gpu.synchronise(self._queue)

    def record(self, event: Event | None = None, options: Any = None) -> Event:
        with self._gpu.call("records"):
            if event is None:
                self._gpu.counts["events"] += 1
                event = Event._make(self._gpu, timing=options is not None and bool(options.timing_enabled))
            event._record(self._queue)
            return event

    def create_graph_builder(self) -> GraphBuilder:
        return GraphBuilder._make(self._gpu, self)


@dataclass
class EventOptions:
    timing_enabled: bool | None = False
    blocking_sync: bool | None = False
    ipc_enabled: bool | None = False


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Event objects cannot be instantiated directly. Please use Stream APIs (record).")

    @classmethod
    def _make(cls, gpu: Gpu, *, timing: bool) -> Event:
        self = object.__new__(cls)
        self._gpu, self._recorded, self._passed, self._timing, self._passed_ms = gpu, 0, 0, timing, 0.0
        return self

    def _record(self, queue: Queue) -> None:
        self._queue, self._captured = queue, self._gpu.capture_of(queue) is not None
        self._recorded += 1
        if not self._captured:
            queue.work.append(Work(self._pass_by(self._recorded), marker=True))

    def _pass_by(self, recorded: int) -> Any:
        def passed() -> None:
            self._passed, self._passed_ms = recorded, self._gpu.clock_ms

        return passed

    @property
    def is_timing_enabled(self) -> bool:
        return self._timing

    def __sub__(self, other: Event) -> float:
        """Milliseconds on the device's clock from the other event to this one."""
        with self._gpu.call(current=False, unsafe=True):
            for event in (self, other):
                if not event._timing:
                    raise Refused("a time between events that were not made for timing")
                if event._captured:
                    raise Refused("an event recorded into a capture says nothing")
                if event._passed != event._recorded:
                    raise Refused("a time between events that have not passed: wait for the stream first")
            return self._passed_ms - other._passed_ms

    @property
    def is_done(self) -> bool:
        with self._gpu.call("polls", current=False, unsafe=True):
            if self._captured:
                raise Refused("an event recorded into a capture says nothing")
            if self._passed != self._recorded:
                self._gpu.advance(self._queue, everything=False)
            return self._passed == self._recorded

    def sync(self) -> None:
        with self._gpu.call("syncs", current=False, unsafe=True):
            while self._passed != self._recorded:
                self._gpu.advance(self._queue, everything=False)


class Buffer:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Buffer objects cannot be instantiated directly. Please use MemoryResource APIs.")

    @classmethod
    def _make(cls, gpu: Gpu, address: int, size: int, allocation: Allocation | None, owner: object) -> Buffer:
        self = object.__new__(cls)
        self._gpu, self._address, self._size, self._allocation, self._owner, self._closed = (
            gpu,
            address,
            size,
            allocation,
            owner,
            False,
        )
        return self

    @staticmethod
    def from_handle(ptr: int, size: int, mr: Any = None, owner: object = None, *, stream: Any = None) -> Buffer:
        if mr is not None or stream is not None:
            raise NotImplementedError("only views are simulated")
        return Buffer._make(_installed(), int(ptr), size, None, owner)

    @property
    def handle(self) -> int:
        return self._open()._address

    @property
    def size(self) -> int:
        return self._size

    def copy_from(self, src: Buffer, *, stream: Stream | GraphBuilder, options: Any = None) -> None:
        self._open()._gpu.copy(self._address, src._open()._address, _same_size(self, src), _queue(stream))

    def copy_to(self, dst: Buffer | None = None, *, stream: Stream | GraphBuilder, options: Any = None) -> Buffer:
        if dst is None:
            raise NotImplementedError("only copies to a given buffer are simulated")
        dst.copy_from(self, stream=stream)
        return dst

    def fill(self, value: int, *, stream: Stream | GraphBuilder) -> None:
        self._open()._gpu.fill(self._address, value, self._size, _queue(stream))

    def close(self, stream: Stream | GraphBuilder | None = None) -> None:
        if self._allocation is not None:
            self._gpu.free(self._allocation, None if stream is None else _queue(stream))
        self._closed = True

    def set_deallocation_stream(self, stream: Stream | GraphBuilder) -> None:
        """Without it, pinned memory that is dropped waits for the legacy default stream, which orders nothing here."""
        allocation = self._open()._allocation
        if allocation is not None:
            allocation.queue = _queue(stream)

    def _open(self) -> Buffer:
        if self._closed:
            raise RuntimeError("Buffer has been closed.")
        return self

    def __del__(self) -> None:
        if getattr(self, "_allocation", None) is not None and not self._closed:
            self._gpu.drop(self._allocation)


class LegacyPinnedMemoryResource:
    def allocate(self, size: int, *, stream: Stream | GraphBuilder | None = None) -> Buffer:
        gpu = _installed()
        allocation = gpu.allocate("pinned", size)
        return Buffer._make(gpu, allocation.address, size, allocation, None)


class GraphBuilder:
    """As in cuda.core, `end_building` only says that a capture broke: it is `close` that ends such a one,
    and raises.
    """

    def __init__(self) -> None:
        raise NotImplementedError(
            "directly creating a Graph object can be ambiguous. Please either call Device or"
            " stream.create_graph_builder()"
        )

    @classmethod
    def _make(cls, gpu: Gpu, stream: Stream) -> GraphBuilder:
        self = object.__new__(cls)
        self._gpu, self._stream = gpu, stream
        self._capture: Capture | None = None
        self._ended = False
        return self

    @property
    def stream(self) -> Stream | None:
        return self._stream

    @property
    def is_building(self) -> bool:
        capture = None if self._stream is None else self._stream._queue.capture
        if capture is not None and capture.invalidated:
            raise RuntimeError(
                "Build process encountered an error and has been invalidated. Build process must now be ended."
            )
        return capture is not None

    def begin_building(self, mode: str | None = "relaxed") -> GraphBuilder:
        with self._gpu.call("captures"):
            if self._capture is not None or self._stream is None:
                raise RuntimeError("Cannot resume building after building has ended.")
            if mode != "thread_local":
                raise Refused(f"capture mode {mode}: only thread_local leaves other threads' work on the device alone")
            if self._stream._queue.capture is not None:
                raise CUDAError("CUDA_ERROR_ILLEGAL_STATE: the stream is being captured already")
            self._capture = self._stream._queue.capture = Capture(threading.get_ident())
            return self

    def end_building(self) -> GraphBuilder:
        with self._gpu.call():
            if not self.is_building or self._stream is None:
                raise RuntimeError("Graph builder is not building.")
            self._stream._queue.capture, self._ended = None, True
            return self

    def complete(self, options: Any = None) -> Graph:
        with self._gpu.call():
            if not self._ended or self._capture is None:
                raise RuntimeError("Graph has not finished building.")
            if self._gpu.faults.breaks_capture("instantiate"):
                raise RuntimeError("Graph instantiation failed with unexpected error code: 1")
            return Graph._make(self._gpu, self._capture)

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None and self._capture is not None and not self._ended:
            stream._queue.capture = None
            if self._capture.invalidated:
                raise CUDAError(
                    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: The operation is not permitted: an error before broke the"
                    " capture"
                )

    def __del__(self) -> None:
        if getattr(self, "_capture", None) is not None and not self._ended and self._stream is not None:
            self._stream._queue.capture = None
            self._gpu.leaks.append("a graph builder was dropped while its stream was being captured")


class Graph:
    def __init__(self) -> None:
        raise RuntimeError("directly constructing a Graph instance is not supported")

    @classmethod
    def _make(cls, gpu: Gpu, capture: Capture) -> Graph:
        self = object.__new__(cls)
        self._gpu, self._nodes, self._closed = gpu, capture.nodes, False
        return self

    def upload(self, stream: Stream) -> None:
        self._open()
        with self._gpu.call():
            _queue(stream)

    def launch(self, stream: Stream) -> None:
        self._open()
        self._gpu.launch(self._nodes, _queue(stream))

    def close(self) -> None:
        self._closed = True

    def _open(self) -> None:
        if self._closed:
            raise Refused("a graph that has been closed")


class PoolHandle(Handle):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__(0xB00)
        self.gpu = gpu


class DeviceMemoryResource:
    """Of the device's own pool; only its handle is simulated."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    @property
    def handle(self) -> PoolHandle:
        return PoolHandle(self._gpu)


class ComputeCapability(NamedTuple):
    major: int
    minor: int


class Device:
    def __new__(cls, device_id: Device | int | None = None) -> Device:
        gpu, number = _installed(), device_id if isinstance(device_id, int) else 0
        if not 0 <= number < gpu.devices:
            raise ValueError(f"device_id must be within [0, {gpu.devices}), got {number}")
        self = object.__new__(cls)
        self._gpu, self.device_id = gpu, number
        return self

    @property
    def name(self) -> str:
        return self._gpu.name

    @property
    def pci_bus_id(self) -> str:
        return f"0000:{self.device_id:02x}:00.0"

    @property
    def compute_capability(self) -> ComputeCapability:
        return ComputeCapability(*self._gpu.sm)

    @property
    def memory_resource(self) -> DeviceMemoryResource:
        return DeviceMemoryResource(self._gpu)

    def set_current(self, ctx: Any = None) -> None:
        self._gpu.set_current(self.device_id)

    def create_stream(self, obj: Any = None, options: Any = None) -> Stream:
        with self._gpu.call():
            return Stream._make(self._gpu)

    def allocate(self, size: int, *, stream: Stream | GraphBuilder) -> Buffer:
        allocation = self._gpu.allocate("device", size, _queue(stream))
        return Buffer._make(self._gpu, allocation.address, size, allocation, None)

    def sync(self) -> None:
        for queue in self._gpu.queues.values():
            self._gpu.synchronise(queue)


LEGACY_DEFAULT_STREAM = object()
PER_THREAD_DEFAULT_STREAM = object()


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100


def cuMemGetInfo() -> tuple[CUresult, int, int]:
    gpu = _installed()
    with gpu.call():
        return CUresult.CUDA_SUCCESS, gpu.memory_bytes - gpu.taken_bytes(), gpu.memory_bytes


def cuMemPoolTrimTo(pool: Handle, minBytesToKeep: int) -> tuple[CUresult]:
    if not isinstance(pool, PoolHandle):
        raise Refused("a memory pool that is not the device's")
    pool.gpu.trim(minBytesToKeep)
    return (CUresult.CUDA_SUCCESS,)


class cudaDeviceProp(NamedTuple):
    name: bytes
    major: int
    minor: int


def cudaGetDeviceCount() -> tuple[cudaError_t, int | None]:
    gpu = _installed()
    if gpu.driver_cuda < BUILT_FOR_CUDA:
        return cudaError_t.cudaErrorInsufficientDriver, None
    return (cudaError_t.cudaSuccess if gpu.devices else cudaError_t.cudaErrorNoDevice), gpu.devices


def cudaDriverGetVersion() -> tuple[cudaError_t, int]:
    return cudaError_t.cudaSuccess, _installed().driver_cuda


def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, cudaDeviceProp]:
    gpu = _installed()
    return cudaError_t.cudaSuccess, cudaDeviceProp(gpu.name.encode().ljust(256, b"\0"), *gpu.sm)


def _queue(stream: Any) -> Queue:
    """The queue of what a call takes as a stream."""
    if stream is LEGACY_DEFAULT_STREAM or stream is PER_THREAD_DEFAULT_STREAM:
        raise Refused("the default stream: it waits for every other one and cannot be captured")
    if isinstance(stream, GraphBuilder):
        stream = stream.stream
    if not isinstance(stream, Stream):
        raise TypeError(f"Stream or GraphBuilder expected, got {type(stream).__name__}")
    return stream._queue


def _same_size(target: Buffer, source: Buffer) -> int:
    if target.size != source.size:
        raise ValueError(f"buffer sizes mismatch between src and dst (sizes are: src={source.size}, dst={target.size})")
    return target.size


_gpu: Gpu | None = None


def _installed() -> Gpu:
    if _gpu is None:
        raise RuntimeError("no simulated GPU is installed")
    return _gpu


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def modules() -> dict[str, ModuleType]:
    graph = module("cuda.core.graph", Graph=Graph, GraphBuilder=GraphBuilder)
    core = module(
        "cuda.core",
        graph=graph,
        LEGACY_DEFAULT_STREAM=LEGACY_DEFAULT_STREAM,
        PER_THREAD_DEFAULT_STREAM=PER_THREAD_DEFAULT_STREAM,
    )
    vars(core).update(
        {kind.__name__: kind for kind in (Device, Stream, Event, EventOptions, Buffer, LegacyPinnedMemoryResource)}
    )
    driver = module(
        "cuda.bindings.driver", cuMemGetInfo=cuMemGetInfo, cuMemPoolTrimTo=cuMemPoolTrimTo, CUresult=CUresult
    )
    runtime = module("cuda.bindings.runtime", cudaError_t=cudaError_t)
    vars(runtime).update(
        {call.__name__: call for call in (cudaGetDeviceCount, cudaDriverGetVersion, cudaGetDeviceProperties)}
    )
    bindings = module("cuda.bindings", driver=driver, runtime=runtime)
    made = [module("cuda", core=core, bindings=bindings), core, graph, bindings, driver, runtime]
    return {made_module.__name__: made_module for made_module in made}


@contextmanager
def installed(gpu: Gpu, stand_ins: dict[str, ModuleType]) -> Iterator[Gpu]:
    """Put modules in the place of the real ones, over `gpu`, on a machine with a cache folder of its own. At the end
    nothing may have been left capturing.
    """
    global _gpu
    cache = os.environ.get("SDRT_CACHE_DIR")
    real = {name: sys.modules.get(name) for name in stand_ins}
    outer, _gpu = _gpu, gpu
    sys.modules.update(stand_ins)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SDRT_CACHE_DIR"] = folder
            yield gpu
        assert not gpu.leaks, gpu.leaks
        assert not any(queue.capture for queue in gpu.queues.values()), "a stream was left capturing"
    finally:
        _gpu = outer
        os.environ.pop("SDRT_CACHE_DIR", None)
        if cache is not None:
            os.environ["SDRT_CACHE_DIR"] = cache
        for name, before in real.items():
            if before is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = before
