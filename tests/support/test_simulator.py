"""The simulated GPU: every rule it keeps is broken here on purpose, every fault is set off, and its surface is that of
the real libraries.
"""

from __future__ import annotations

import gc
import inspect
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import cuda_simulator as cuda
import gpu_simulator
import numpy as np
import pytest
import tensorrt_simulator as trt
from cuda_simulator import installed
from gpu_simulator import CUDAError, Gpu, Refused
from numpy.typing import NDArray
from simulated_plans import plan

SIDE = 4
WIDE = trt.DynamicShapesKernelSpecializationStrategy.EAGER
MANAGED = trt.ExecutionContextAllocationStrategy.USER_MANAGED


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = x + x with x `[N, 4]`."""
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", SIDE]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    path = tmp_path_factory.mktemp("network") / "double.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with installed(Gpu(), cuda.modules() | trt.modules()) as simulated:
        yield simulated


class Bench:
    """A device with a stream, an activation block, an input, an output and a network; `bind` makes it ready to run."""

    def __init__(self, gpu: Gpu, network: Path, *, kernels: Any = WIDE, bound: bool = True) -> None:
        self.gpu, self.device = gpu, cuda.Device(0)
        self.device.set_current()
        self.stream = self.device.create_stream()
        self.activations, self.x, self.y = (
            self.device.allocate(size, stream=self.stream) for size in (512, 1024, 1024)
        )
        self.host = cuda.LegacyPinnedMemoryResource().allocate(1024, stream=self.stream)
        profiles = [{"x": ((1, SIDE), (1, SIDE), (top, SIDE))} for top in (2, 8)]
        made = plan(network, "double", profiles, activation_bytes=300)
        self.engine: Any = trt.Runtime(trt.Logger()).deserialize_cuda_engine(made)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = kernels
        self.context: Any = self.engine.create_execution_context(config)
        self.context.set_device_memory(self.activations.handle, 512)
        if bound:
            assert self.context.set_input_shape("x", (2, SIDE))
            assert self.context.set_tensor_address("x", self.x.handle) and self.context.set_tensor_address(
                "y", self.y.handle
            )

    def run(self, stream: Any = None) -> bool:
        return bool(self.context.execute_async_v3(int((stream or self.stream).handle)))

    def warm(self) -> None:
        assert self.run()
        self.stream.sync()

    def captured(self) -> Any:
        builder = self.begin()
        assert self.run(builder.stream)
        graph = builder.end_building().complete()
        builder.close()
        return graph

    def begin(self) -> Any:
        builder = self.stream.create_graph_builder()
        return builder.begin_building("thread_local")

    def part(self, buffer: Any, size: int = 32, offset: int = 0) -> Any:
        return cuda.Buffer.from_handle(buffer.handle + offset, size, owner=buffer)

    def values(self, buffer: Any = None) -> NDArray[np.float32]:
        """The first numbers of the pinned block, as the host sees them."""
        return self.gpu.view(self.host.handle, 32).view(np.float32)

    def write(self, number: float) -> None:
        """Put a number into the input, waiting for it."""
        self.values()[...] = number
        self.part(self.x).copy_from(self.part(self.host), stream=self.stream)
        self.stream.sync()

    def read(self) -> list[float]:
        self.part(self.host).copy_from(self.part(self.y), stream=self.stream)
        self.stream.sync()
        return [float(number) for number in self.values()]


@pytest.fixture
def bench(gpu: Gpu, network: Path) -> Bench:
    return Bench(gpu, network)


def refuses(match: str) -> Any:
    return pytest.raises(Refused, match=match)


def in_thread(work: Callable[[], object]) -> list[BaseException]:
    """Run in a thread of its own. Returns what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


# What works


def test_run_and_replay(bench: Bench) -> None:
    bench.write(1.5)
    bench.warm()
    graph = bench.captured()
    assert bench.read() == [3.0] * 8
    bench.write(2.5)
    assert bench.read() == [3.0] * 8, "a captured run is only recorded"
    graph.upload(bench.stream)
    graph.launch(bench.stream)
    assert bench.read() == [5.0] * 8


def test_a_replay_sees_only_what_the_captured_addresses_hold(bench: Bench) -> None:
    bench.write(1.0)
    bench.warm()
    graph = bench.captured()
    other = bench.device.allocate(1024, stream=bench.stream)
    bench.values()[...] = 9.0
    bench.part(other).copy_from(bench.part(bench.host), stream=bench.stream)
    bench.stream.sync()
    bench.write(2.0)
    graph.launch(bench.stream)
    assert bench.read() == [4.0] * 8


def test_copies_and_fills_can_be_captured(bench: Bench) -> None:
    bench.write(1.0)
    bench.warm()
    builder = bench.begin()
    bench.part(bench.x).fill(0, stream=builder)
    assert bench.run(builder.stream)
    graph = builder.end_building().complete()
    builder.close()
    graph.launch(bench.stream)
    assert bench.read() == [0.0] * 8


def test_work_is_lazy(bench: Bench) -> None:
    """One poll, one piece of work; the event after it is passed at once."""
    bench.write(1.0)
    assert bench.run()
    first = bench.stream.record()
    bench.part(bench.host).copy_from(bench.part(bench.y), stream=bench.stream)
    second = bench.stream.record()
    assert np.isnan(bench.values()).all(), "the host must not see a result before it has waited"
    assert [first.is_done, first.is_done, second.is_done] == [True, True, True]
    assert bench.values().tolist() == [2.0] * 8
    assert bench.run() and bench.run()
    assert bench.stream.record(first) is first
    assert [first.is_done, first.is_done] == [False, True]
    bench.stream.record(first)
    first.sync()


def test_counters(bench: Bench) -> None:
    with bench.gpu.counted() as counts:
        bench.write(1.0)
        bench.warm()
        bench.captured().launch(bench.stream)
        bench.read()
        bench.x.fill(0, stream=bench.stream)
        bench.part(bench.y).copy_to(bench.part(bench.x), stream=bench.stream)
        bench.device.allocate(4, stream=bench.stream).close(bench.stream)
        bench.stream.record().sync()
    assert counts == {
        "allocations": 1,
        "captures": 1,
        "d2d": 1,
        "d2h": 1,
        "events": 1,
        "fills": 1,
        "frees": 1,
        "h2d": 1,
        "launches": 1,
        "records": 1,
        "runs": 2,
        "syncs": 4,
    }


def test_fresh_and_freed_memory_is_nan(bench: Bench) -> None:
    assert np.isnan(bench.gpu.view(bench.x.handle, 1024).view(np.float32)).all()
    bench.write(1.0)
    inside = bench.gpu.view(bench.x.handle, 32)
    bench.x.close(bench.stream)
    assert not gpu_simulator.stale(inside), "a free waits for its turn"
    bench.stream.sync()
    assert gpu_simulator.stale(inside)


def test_memory_is_counted(bench: Bench) -> None:
    assert (bench.gpu.used_bytes(), bench.gpu.used_bytes("pinned")) == (512 + 1024 + 1024, 1024)
    weights = bench.gpu.library_bytes
    assert cuda.cuMemGetInfo() == (0, (1 << 30) - 2560 - weights, 1 << 30) and weights
    del bench.y
    assert bench.gpu.used_bytes() == 1536, "dropping a buffer frees it"
    del bench.context, bench.engine
    assert bench.gpu.library_bytes == 0


def test_the_pool_keeps_what_was_freed(bench: Bench) -> None:
    """Nobody else gets it before the pool is trimmed, and that comes after the free has been waited for."""
    gpu, pool = bench.gpu, bench.device.memory_resource.handle
    gpu.memory_bytes = gpu.taken_bytes() + 100
    bench.y.close(bench.stream)
    assert bench.gpu.used_bytes() == 1536 and cuda.cuMemGetInfo()[1] == 100
    gpu.context_bytes = 1000
    assert bench.engine.create_execution_context(MANAGED) is None and "out of memory" in gpu.log[-1]
    again = bench.device.allocate(1024, stream=bench.stream)
    again.close(bench.stream)
    cuda.cuMemPoolTrimTo(pool, 0)
    assert cuda.cuMemGetInfo()[1] == 100, "the host has not seen the free"
    bench.stream.sync()
    cuda.cuMemPoolTrimTo(pool, 2048)
    assert cuda.cuMemGetInfo()[1] == 100 + 512
    assert cuda.cuMemPoolTrimTo(pool, 0) == (0,)
    assert cuda.cuMemGetInfo()[1] == 100 + 1024
    assert bench.engine.create_execution_context(MANAGED) is not None
    with refuses("not the device's"):
        cuda.cuMemPoolTrimTo(bench.stream.handle, 0)


# Addresses


def test_unaligned_address(bench: Bench) -> None:
    bench.context.set_tensor_address("y", bench.y.handle + 128)
    with refuses("not on 256 bytes"):
        bench.run()


def test_address_of_nothing(bench: Bench) -> None:
    bench.context.set_tensor_address("y", np.zeros(64).ctypes.data // 256 * 256)
    with refuses("neither device nor pinned"):
        bench.run()


def test_range_that_leaves_its_allocation(bench: Bench) -> None:
    small = bench.device.allocate(16, stream=bench.stream)
    bench.context.set_tensor_address("y", small.handle)
    with refuses("16 bytes|32 bytes"):
        bench.run()


def test_freed_address(bench: Bench) -> None:
    bench.y.close(bench.stream)
    with refuses("freed"):
        bench.run()


def test_buffer_used_after_close(bench: Bench) -> None:
    part = bench.part(bench.y)
    bench.y.close(bench.stream)
    with refuses("freed"):
        part.fill(0, stream=bench.stream)
    with pytest.raises(RuntimeError, match="closed"):
        bench.y.fill(0, stream=bench.stream)


def test_pinned_memory_as_a_binding(bench: Bench) -> None:
    bench.context.set_tensor_address("x", bench.host.handle)
    with refuses("not in device memory"):
        bench.run()


def test_output_that_aliases_an_input(bench: Bench) -> None:
    bench.context.set_tensor_address("y", bench.x.handle)
    with refuses("output y shares memory with x"):
        bench.run()


def test_binding_in_the_activation_block(bench: Bench) -> None:
    bench.context.set_tensor_address("x", bench.activations.handle)
    with refuses("activation block"):
        bench.run()


# Shapes


@pytest.mark.parametrize("shape", [(3, SIDE), (0, SIDE), (2, SIDE + 1), (2,), (1, 2, SIDE)])
def test_shape_outside_the_profile(bench: Bench, shape: tuple[int, ...]) -> None:
    assert not bench.context.set_input_shape("x", shape)
    assert not bench.context.set_input_shape("y", (2, SIDE)), "an output has no shape to set"


def test_nothing_set(gpu: Gpu, network: Path) -> None:
    bench = Bench(gpu, network, bound=False)
    assert not bench.run() and "address is not set" in gpu.log[-1]
    bench.context.set_tensor_address("x", bench.x.handle)
    assert not bench.run() and "shape is not set" in gpu.log[-1]
    bench.context.set_input_shape("x", (1, SIDE))
    assert not bench.run() and "y: its address" in gpu.log[-1]
    assert not bench.context.set_tensor_address("z", bench.y.handle)
    bench.context.set_tensor_address("y", bench.y.handle)
    assert bench.run()


def test_profiles(bench: Bench) -> None:
    handle = int(bench.stream.handle)
    assert not bench.context.set_optimization_profile_async(2, handle)
    assert bench.context.set_optimization_profile_async(1, handle) and bench.context.active_optimization_profile == 1
    assert not bench.run(), "a profile forgets the shapes"
    assert bench.context.set_input_shape("x", (8, SIDE)) and bench.run()
    other = bench.device.create_stream()
    with refuses("set on another stream"):
        bench.run(other)


# The activation block


def test_activation_block_too_small(bench: Bench) -> None:
    with refuses("300 are needed"):
        bench.context.set_device_memory(bench.activations.handle, 299)


def test_activation_block_for_the_shapes_in_use(bench: Bench) -> None:
    """Less than for the largest ones, where TensorRT was told to divide it for them; until other shapes are set."""
    assert bench.context.set_input_shape("x", (1, SIDE))
    with refuses("300 are needed"):
        bench.context.set_device_memory(bench.activations.handle, 150)
    assert bench.context.update_device_memory_size_for_shapes() == 150
    with refuses("150 are needed"):
        bench.context.set_device_memory(bench.activations.handle, 149)
    bench.context.set_device_memory(bench.activations.handle, 150)
    assert bench.run()
    assert bench.context.set_input_shape("x", (2, SIDE))
    with refuses("another activation block"):
        bench.run()


def test_activation_block_for_no_shapes(gpu: Gpu, network: Path) -> None:
    with refuses("not all shapes are set"):
        Bench(gpu, network, bound=False).context.update_device_memory_size_for_shapes()


def test_activation_block_unaligned(bench: Bench) -> None:
    with refuses("not on 256 bytes"):
        bench.context.set_device_memory(bench.activations.handle + 128, 384)


def test_activation_block_unset(bench: Bench) -> None:
    config = bench.engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(MANAGED)
    bench.context = bench.engine.create_execution_context(config)
    with refuses("no activation block"):
        bench.run()


def test_activation_block_freed(bench: Bench) -> None:
    bench.activations.close(bench.stream)
    with refuses("freed"):
        bench.run()


def test_activation_block_of_its_own(bench: Bench) -> None:
    with refuses("of its own"):
        bench.engine.create_execution_context()
    assert bench.engine.create_execution_context(MANAGED) is not None


def test_activation_block_keeps_nothing(bench: Bench) -> None:
    bench.activations.fill(0, stream=bench.stream)
    bench.warm()
    assert gpu_simulator.stale(bench.gpu.view(bench.activations.handle, 512))


# Host memory and copies


def test_copy_from_memory_that_is_not_pinned(bench: Bench) -> None:
    array = np.zeros(8, np.float32)
    with refuses("neither device nor pinned"):
        bench.part(bench.x).copy_from(cuda.Buffer.from_handle(array.ctypes.data, 32, owner=array), stream=bench.stream)


def test_copy_between_host_ranges(bench: Bench) -> None:
    with refuses("from pinned to pinned"):
        bench.part(bench.host).copy_from(bench.part(bench.host, offset=512), stream=bench.stream)


def test_copy_onto_itself(bench: Bench) -> None:
    with refuses("overlap"):
        bench.part(bench.x).copy_from(bench.part(bench.x, offset=16), stream=bench.stream)


def test_copy_of_another_size(bench: Bench) -> None:
    with pytest.raises(ValueError, match="sizes mismatch"):
        bench.part(bench.x, 16).copy_from(bench.part(bench.host, 32), stream=bench.stream)


def test_fill_of_pinned_memory(bench: Bench) -> None:
    with refuses("fill of pinned"):
        bench.host.fill(0, stream=bench.stream)


def test_host_changes_what_a_queued_copy_reads(bench: Bench) -> None:
    bench.part(bench.x).copy_from(bench.part(bench.host), stream=bench.stream)
    bench.values()[3] = 7.0
    with refuses("h2d: the host changed"):
        bench.stream.sync()


def test_host_changes_what_a_queued_copy_writes(bench: Bench) -> None:
    bench.part(bench.host).copy_from(bench.part(bench.x), stream=bench.stream)
    bench.values()[3] = 7.0
    with refuses("d2h: the host changed"):
        bench.stream.sync()


def test_copy_back_over_a_source_still_being_read(bench: Bench) -> None:
    """Allowed: the copies run in order."""
    bench.values()[...] = 1.0
    bench.part(bench.x).copy_from(bench.part(bench.host), stream=bench.stream)
    assert bench.run()
    bench.part(bench.host).copy_from(bench.part(bench.y), stream=bench.stream)
    bench.stream.sync()
    assert bench.values().tolist() == [2.0] * 8


def test_pinned_memory_dropped_while_in_use(bench: Bench) -> None:
    bench.part(bench.x).copy_from(bench.part(bench.host), stream=bench.stream)
    del bench.host
    gc.collect()
    with refuses("dropped while a queued copy"):
        bench.stream.sync()


def test_pinned_memory_dropped_with_a_stream_to_wait_for(bench: Bench) -> None:
    bench.write(1.0)
    bench.host.set_deallocation_stream(bench.stream)
    bench.part(bench.x).copy_from(bench.part(bench.host), stream=bench.stream)
    del bench.host
    gc.collect()
    assert bench.gpu.used_bytes("pinned") == 0
    with refuses("default stream"):
        bench.x.set_deallocation_stream(cuda.LEGACY_DEFAULT_STREAM)


def test_pinned_memory_closed_without_a_stream(bench: Bench) -> None:
    with refuses("without a stream"):
        bench.host.close()
    with bench.gpu.counted() as counts:
        bench.host.close(bench.stream)
        bench.host.close(bench.stream)
    assert counts == {"pinned_frees": 1, "syncs": 1}, "closing pinned memory waits for the stream"


# Streams and threads


@pytest.mark.parametrize("handle", [0, 1, 2])
def test_default_stream_by_handle(bench: Bench, handle: int) -> None:
    with refuses("default stream"):
        bench.context.execute_async_v3(handle)


@pytest.mark.parametrize("stream", [cuda.LEGACY_DEFAULT_STREAM, cuda.PER_THREAD_DEFAULT_STREAM])
def test_default_stream(bench: Bench, stream: object) -> None:
    for call in (
        lambda: bench.x.fill(0, stream=stream),
        lambda: bench.device.allocate(4, stream=stream),
        lambda: bench.part(bench.x).copy_from(bench.part(bench.host), stream=stream),
        lambda: bench.x.close(stream),
    ):
        with refuses("default stream"):
            call()


def test_unknown_stream(bench: Bench) -> None:
    with refuses("unknown"):
        bench.context.execute_async_v3(0x77)
    with pytest.raises(TypeError, match="Stream or GraphBuilder expected"):
        bench.x.fill(0, stream=None)


def test_thread_without_a_device(bench: Bench) -> None:
    for call in (
        bench.run,
        bench.stream.record,
        lambda: bench.x.fill(0, stream=bench.stream),
        lambda: bench.device.allocate(4, stream=bench.stream),
        lambda: cuda.LegacyPinnedMemoryResource().allocate(4),
        lambda: bench.part(bench.x).copy_from(bench.part(bench.host), stream=bench.stream),
        cuda.cuMemGetInfo,
    ):
        (error,) = in_thread(call)
        assert isinstance(error, Refused) and "no current device" in str(error)
    assert in_thread(lambda: (bench.device.set_current(), bench.run())) == []
    bench.gpu.forget_current()
    with refuses("no current device"):
        bench.run()


def test_device_that_is_not_there(gpu: Gpu) -> None:
    with pytest.raises(ValueError, match="device_id must be within"):
        cuda.Device(1)


# Capture


@pytest.mark.parametrize("mode", ["relaxed", "global"])
def test_capture_mode(bench: Bench, mode: str) -> None:
    with refuses("only thread_local"):
        bench.stream.create_graph_builder().begin_building(mode)
    with refuses("only thread_local"):
        bench.stream.create_graph_builder().begin_building()


def test_capture_without_a_run_before(bench: Bench) -> None:
    builder = bench.begin()
    with refuses("captured before one finished run"):
        bench.run(builder.stream)
    builder.close()


def test_capture_after_a_run_that_has_not_finished(bench: Bench) -> None:
    assert bench.run()
    builder = bench.begin()
    with refuses("captured before one finished run"):
        bench.run(builder.stream)
    builder.close()


@pytest.mark.parametrize("change", ["shape", "address", "profile", "memory"])
def test_capture_after_a_run_with_other_bindings(bench: Bench, change: str) -> None:
    bench.warm()
    rebind(bench, change)
    builder = bench.begin()
    with refuses("captured before one finished run"):
        bench.run(builder.stream)
    builder.close()


@pytest.mark.parametrize("change", ["shape", "address", "profile", "memory"])
def test_replay_after_a_change(bench: Bench, change: str) -> None:
    bench.warm()
    graph = bench.captured()
    rebind(bench, change)
    with refuses("changed since the capture"):
        graph.launch(bench.stream)


def rebind(bench: Bench, change: str) -> None:
    context = bench.context
    if change == "shape":
        assert context.set_input_shape("x", (1, SIDE))
    elif change == "address":
        assert context.set_tensor_address("y", bench.y.handle + 256)
    elif change == "profile":
        assert context.set_optimization_profile_async(1, int(bench.stream.handle)) and context.set_input_shape(
            "x", (2, SIDE)
        )
    else:
        bench.second = bench.device.allocate(512, stream=bench.stream)  # type: ignore[attr-defined]
        context.set_device_memory(bench.second.handle, 512)  # type: ignore[attr-defined]


def test_replay_after_a_free(bench: Bench) -> None:
    bench.warm()
    graph = bench.captured()
    bench.y.close(bench.stream)
    with refuses("freed"):
        graph.launch(bench.stream)


def test_replay_without_its_context(bench: Bench) -> None:
    bench.warm()
    graph = bench.captured()
    del bench.context
    with refuses("context is gone"):
        graph.launch(bench.stream)


def test_context_destroyed_in_flight(bench: Bench) -> None:
    """Whether its run was captured or not."""
    bench.warm()
    graph = bench.captured()
    graph.launch(bench.stream)
    del bench.context
    with refuses("destroyed while work of it was queued"):
        bench.stream.sync()


def test_context_destroyed_with_a_run_queued(bench: Bench) -> None:
    assert bench.run()
    del bench.context
    with refuses("destroyed while work of it was queued"):
        bench.stream.sync()


def test_closed_graph(bench: Bench) -> None:
    bench.warm()
    graph = bench.captured()
    graph.close()
    for use in (graph.launch, graph.upload):
        with refuses("closed"):
            use(bench.stream)


@pytest.mark.parametrize(
    "kernels", [trt.DynamicShapesKernelSpecializationStrategy.LAZY, trt.DynamicShapesKernelSpecializationStrategy.NONE]
)
def test_capture_with_fallback_kernels(gpu: Gpu, network: Path, kernels: Any) -> None:
    bench = Bench(gpu, network, kernels=kernels)
    bench.warm()
    builder = bench.begin()
    with refuses("fallback"):
        bench.run(builder.stream)
    builder.close()


def test_work_that_cannot_be_captured(bench: Bench) -> None:
    bench.warm()
    graph, event = bench.captured(), bench.stream.record()
    spare, runtime = bench.device.create_stream(), trt.Runtime(trt.Logger())
    calls: dict[str, Callable[[], object]] = {
        "allocation": lambda: bench.device.allocate(4, stream=bench.stream),
        "allocation elsewhere": lambda: bench.device.allocate(4, stream=spare),
        "pinned allocation": lambda: cuda.LegacyPinnedMemoryResource().allocate(4),
        "free": lambda: bench.y.close(bench.stream),
        "pinned free": lambda: bench.host.close(bench.stream),
        "sync": bench.stream.sync,
        "sync of another stream": spare.sync,
        "sync of the device": bench.device.sync,
        "poll": lambda: event.is_done,
        "sync of an event": event.sync,
        "launch": lambda: graph.launch(bench.stream),
        "context": lambda: bench.engine.create_execution_context(MANAGED),
        "engine": lambda: runtime.deserialize_cuda_engine(b""),
        "profile": lambda: bench.context.set_optimization_profile_async(0, int(bench.stream.handle)),
    }
    for name, call in calls.items():
        builder = bench.begin()
        with refuses(r"cannot be captured|being captured"):
            call()
        with pytest.raises(RuntimeError, match="has been invalidated"):
            builder.end_building()
        with pytest.raises(CUDAError, match="STREAM_CAPTURE_INVALIDATED"):
            bench.run(builder.stream)
        with pytest.raises(CUDAError, match="STREAM_CAPTURE_INVALIDATED"):
            builder.close()
        assert bench.run(), f"{name}: the stream works again"
        bench.stream.sync()


def test_host_waits_for_an_event_of_a_capture(bench: Bench) -> None:
    builder = bench.begin()
    event = bench.stream.record()
    builder.end_building()
    builder.close()
    with refuses("recorded into a capture"):
        _ = event.is_done


def test_another_thread_uses_a_stream_that_is_being_captured(bench: Bench) -> None:
    bench.warm()
    builder = bench.begin()
    (error,) = in_thread(lambda: (bench.device.set_current(), bench.run()))
    assert isinstance(error, Refused) and "another thread" in str(error)
    assert in_thread(lambda: (bench.device.set_current(), bench.device.create_stream().sync())) == [], (
        "its own stream is its own business"
    )
    builder.end_building()
    builder.close()


def test_capture_within_a_capture(bench: Bench) -> None:
    builder = bench.begin()
    with pytest.raises(CUDAError, match="ILLEGAL_STATE"):
        bench.begin()
    builder.close()


def test_order_of_building(bench: Bench) -> None:
    builder = bench.stream.create_graph_builder()
    with pytest.raises(RuntimeError, match="not building"):
        builder.end_building()
    with pytest.raises(RuntimeError, match="not finished"):
        builder.complete()
    builder.begin_building("thread_local")
    with pytest.raises(RuntimeError, match="not finished"):
        builder.complete()
    builder.end_building()
    with pytest.raises(RuntimeError, match="Cannot resume"):
        builder.begin_building("thread_local")


def test_builder_dropped_while_capturing(network: Path) -> None:
    gpu = Gpu()
    with (
        pytest.raises(AssertionError, match="graph builder was dropped"),
        installed(gpu, cuda.modules() | trt.modules()),
    ):
        Bench(gpu, network).begin()
        gc.collect()


def test_stream_left_capturing(network: Path) -> None:
    gpu = Gpu()
    with pytest.raises(AssertionError, match="left capturing"), installed(gpu, cuda.modules() | trt.modules()):
        builder = Bench(gpu, network).begin()
    with suppress(CUDAError):  # the bench and its buffers are gone
        builder.close()


@pytest.mark.parametrize(
    "kind",
    [cuda.Stream, cuda.Event, cuda.Buffer, cuda.GraphBuilder, cuda.Graph, trt.ICudaEngine, trt.IExecutionContext],
)
def test_made_by_the_library_only(kind: Any) -> None:
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        kind()


# Faults


def test_fault_allocation(bench: Bench) -> None:
    bench.gpu.faults.allocation = 2
    bench.device.allocate(4, stream=bench.stream)
    with pytest.raises(CUDAError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        cuda.LegacyPinnedMemoryResource().allocate(4)
    bench.device.allocate(4, stream=bench.stream)


def test_memory_runs_out(bench: Bench) -> None:
    bench.gpu.memory_bytes = bench.gpu.taken_bytes() + 1000
    with pytest.raises(CUDAError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        bench.device.allocate(1001, stream=bench.stream)
    bench.device.allocate(1000, stream=bench.stream)


def test_fault_copy(bench: Bench) -> None:
    bench.gpu.faults.copy = 1
    with pytest.raises(CUDAError, match="INVALID_VALUE"):
        bench.write(1.0)
    bench.write(1.0)


def test_fault_run(bench: Bench) -> None:
    bench.gpu.faults.runs["double"] = 2
    assert [bench.run() for _ in range(3)] == [True, False, True]


def test_fault_illegal_address(bench: Bench) -> None:
    """The launch is accepted; the error comes when the host waits, and stays."""
    bench.warm()
    graph = bench.captured()
    bench.gpu.faults.illegal_address = 2
    assert bench.run()
    graph.launch(bench.stream)
    event = bench.stream.record()
    for call in (
        bench.stream.sync,
        bench.stream.sync,
        bench.run,
        lambda: graph.launch(bench.stream),
        lambda: event.is_done,
        bench.stream.record,
    ):
        with pytest.raises(CUDAError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            call()
    bench.host.close(bench.stream)
    bench.x.close(bench.stream)


def test_fault_replay(bench: Bench) -> None:
    bench.write(1.0)
    bench.warm()
    graph = bench.captured()
    assert bench.read() == [2.0] * 8
    bench.write(3.0)
    bench.gpu.faults.replay = "nothing"
    graph.launch(bench.stream)
    assert bench.read() == [2.0] * 8
    bench.gpu.faults.replay = "wrong"
    graph.launch(bench.stream)
    assert bench.read() not in ([2.0] * 8, [6.0] * 8)


def test_fault_capture(bench: Bench) -> None:
    bench.warm()
    bench.gpu.faults.capture = "refused"
    builder = bench.begin()
    assert not bench.run(builder.stream)
    builder.end_building()
    bench.gpu.faults.capture = "invalidated"
    builder = bench.begin()
    assert not bench.run(builder.stream)
    with pytest.raises(RuntimeError, match="invalidated"):
        builder.end_building()
    with suppress(CUDAError):
        builder.close()
    bench.gpu.faults.capture = "instantiate"
    with pytest.raises(RuntimeError, match="instantiation failed"):
        bench.captured()
    bench.gpu.faults.capture = ""
    bench.captured().launch(bench.stream)


def test_fault_of_one_capture(bench: Bench) -> None:
    bench.warm()
    bench.gpu.faults.capture, bench.gpu.faults.captures = "instantiate", 1
    with pytest.raises(RuntimeError, match="instantiation failed"):
        bench.captured()
    bench.captured()


def test_streams_that_tensorrt_would_not_capture(bench: Bench) -> None:
    handle = int(bench.stream.handle)
    assert bench.context.is_stream_capturable(handle)
    bench.gpu.faults.capture = "not capturable"
    assert not bench.context.is_stream_capturable(handle) and "cannot be captured" in bench.gpu.log[-1]


def test_numbers_that_drift(bench: Bench) -> None:
    bench.write(1.0)
    bench.gpu.faults.drift = "first run"
    found = []
    for _ in range(3):
        bench.warm()
        found.append(bench.read()[0])
    assert found == [np.float32(2.0 * 1.05), 2.0, 2.0]
    graph = bench.captured()
    bench.gpu.faults.drift = "replays"
    found = []
    for _ in range(3):
        graph.launch(bench.stream)
        found.append(bench.read()[0])
    up, down = (float(np.nextafter(np.float32(2), np.float32(side))) for side in (np.inf, 0))
    assert found == [up, down, up]


def test_the_collector_within_a_capture(bench: Bench) -> None:
    """It frees buffers of a cycle, which breaks the capture. The freeing itself comes later."""
    bench.warm()
    bench.gpu.faults.garbage = True
    used = bench.gpu.used_bytes()
    for collects in (True, False):
        cycle: list[Any] = [bench.device.allocate(64, stream=bench.stream)]
        cycle.append(cycle)
        del cycle
        if not collects:
            gc.disable()
        builder = bench.begin()
        try:
            assert bench.run(builder.stream)
        finally:
            gc.enable()
        if not collects:
            builder.end_building()
        with suppress(CUDAError):
            builder.close()
        assert bench.gpu.used_bytes() == used + 64 * (not collects)
    gc.collect()


def test_fault_context_and_engine(bench: Bench, network: Path) -> None:
    bench.gpu.faults.no_context = 1
    assert bench.engine.create_execution_context(MANAGED) is None
    assert bench.engine.create_execution_context(MANAGED) is not None
    runtime = trt.Runtime(trt.Logger())
    made = plan(network, "double", [], activation_bytes=1)
    assert runtime.deserialize_cuda_engine(made) is not None
    assert runtime.deserialize_cuda_engine(made[3:]) is None
    assert runtime.deserialize_cuda_engine(plan(network, "double", [], activation_bytes=1, version="1.6.0.1")) is None
    bench.gpu.faults.no_weights = 1
    assert runtime.deserialize_cuda_engine(made) is None and "out of memory" in bench.gpu.log[-1]
    bench.gpu.faults.no_engine = True
    assert runtime.deserialize_cuda_engine(made) is None
    assert "deserializeCudaEngine" in bench.gpu.log[-1]


def test_headers(bench: Bench, network: Path) -> None:
    runtime = trt.Runtime(trt.Logger())
    header = plan(network, "double", [], activation_bytes=1)[: runtime.engine_header_size]
    assert runtime.get_engine_validity(header) == (trt.EngineValidity.VALID, 0)
    malformed = runtime.get_engine_validity(bytes(len(header)))
    assert malformed == (trt.EngineValidity.INVALID, trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    bench.gpu.faults.problems = 4
    assert runtime.get_engine_validity(header) == (trt.EngineValidity.INVALID, 4)
    with refuses("cut short"):
        runtime.get_engine_validity(header[1:])


def test_loggers_that_cannot_be(bench: Bench) -> None:
    class Unmade(trt.ILogger):
        def __init__(self) -> None:
            """Forgets the constructor of its base."""

    for wrong in (object(), Unmade()):
        with pytest.raises(TypeError, match="incompatible constructor"):
            trt.Runtime(wrong)  # type: ignore[arg-type]


# Kernels that are compiled when they are met


def test_every_context_compiles_without_a_cache(bench: Bench) -> None:
    assert bench.gpu.compiled == ["double"], "as it is made"
    assert bench.run() and bench.run() and len(bench.gpu.compiled) == 2, "for a shape, once"
    assert bench.context.set_input_shape("x", (1, SIDE)) and bench.run() and len(bench.gpu.compiled) == 3
    bench.context = bench.engine.create_execution_context(configured(bench))
    assert len(bench.gpu.compiled) == 4


def configured(bench: Bench, cache: Any = None) -> Any:
    config = bench.engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = WIDE
    if cache is not None:
        assert config.set_runtime_cache(cache) and config.get_runtime_cache() is cache
    return config


def test_contexts_with_a_cache_share_what_was_compiled(bench: Bench) -> None:
    cache = bench.engine.create_runtime_config().create_runtime_cache()
    first, second = (bench.engine.create_execution_context(configured(bench, cache)) for _ in range(2))
    assert len(bench.gpu.compiled) == 1 + 1
    for context in (first, second):
        context.set_device_memory(bench.activations.handle, 512)
        context.set_input_shape("x", (2, SIDE))
        context.set_tensor_address("x", bench.x.handle)
        context.set_tensor_address("y", bench.y.handle)
        assert context.execute_async_v3(int(bench.stream.handle))
    assert len(bench.gpu.compiled) == 1 + 2
    del cache
    assert second.set_input_shape("x", (1, SIDE))
    with refuses("the runtime cache of its context is gone"):
        second.execute_async_v3(int(bench.stream.handle))


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"driver_cuda": 13020}, True),
        ({"driver_cuda": 12080}, False),
        ({"driver_cuda": 14000}, False),
        ({"name": "NVIDIA Other"}, False),
        ({"sm": (8, 6)}, False),
    ],
)
def test_caches_of_other_machines(bench: Bench, change: dict[str, Any], taken: bool) -> None:
    config = bench.engine.create_runtime_config()
    cache = config.create_runtime_cache()
    bench.context = bench.engine.create_execution_context(configured(bench, cache))
    blob = bytes(cache.serialize())
    vars(bench.gpu).update(change)
    other = config.create_runtime_cache()
    assert other.deserialize(blob) is taken and bool(other._kernels) is taken
    assert other.reset() and not other._kernels
    with refuses("was changed"):
        other.deserialize(blob[:-3] + b"?" + blob[-2:])


# Times and profiles


TIMED = cuda.EventOptions(timing_enabled=True)


def test_events_tell_the_devices_time(bench: Bench) -> None:
    bench.gpu.costs_ms["double"] = 2.5
    began = bench.stream.record(options=TIMED)
    assert bench.run() and bench.run()
    ended = bench.stream.record(options=TIMED)
    bench.stream.sync()
    assert ended - began == 5.0 and began.is_timing_enabled
    bench.stream.record(began)  # used again, it tells its new place
    bench.stream.sync()
    assert ended - began == 0.0


def test_times_between_events_that_tell_none(bench: Bench) -> None:
    plain, timed = bench.stream.record(), bench.stream.record(options=TIMED)
    bench.stream.sync()
    with refuses("not made for timing"):
        _ = timed - plain
    with refuses("have not passed"):
        _ = bench.stream.record(options=TIMED) - timed
    builder = bench.begin()
    captured = bench.stream.record(options=TIMED)
    builder.end_building()
    builder.close()
    with refuses("recorded into a capture"):
        _ = captured - timed


class Layers(trt.IProfiler):
    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.told: list[tuple[str, float]] = []

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        self.told.append((layer_name, ms))


def test_a_profiler_is_told_each_layer_once_a_run(bench: Bench) -> None:
    profiler = Layers()
    bench.context.profiler = profiler
    assert bench.run() and profiler.told == [("layer 0", 1.0)], "enqueueing waits and reports, unless it is told not to"
    bench.context.enqueue_emits_profile = False
    assert bench.run() and len(profiler.told) == 1
    with refuses("0 finished runs since the last report"):
        bench.context.report_to_profiler()
    bench.stream.sync()
    assert bench.context.report_to_profiler() and len(profiler.told) == 2
    bench.warm()
    bench.warm()
    with refuses("2 finished runs since the last report"):
        bench.context.report_to_profiler()


def test_profilers_that_cannot_be(bench: Bench) -> None:
    assert not bench.context.report_to_profiler() and "without a profiler" in bench.gpu.log[-1]

    class Unmade(trt.IProfiler):
        def __init__(self) -> None:
            """Forgets the constructor of its base."""

    for wrong in (object(), Unmade()):
        with pytest.raises(TypeError, match="IProfiler whose constructor"):
            bench.context.profiler = wrong
    bench.context.profiler = Layers()
    with refuses("every layer would be told twice"):
        bench.context.report_to_profiler()
    bench.warm()
    builder = bench.begin()
    with refuses("captured with a profiler set"):
        bench.run(builder.stream)
    builder.end_building()
    builder.close()


def test_shapes_of_outputs_follow_the_inputs(bench: Bench, network: Path) -> None:
    assert bench.context.get_tensor_shape("y") == (2, SIDE)
    assert Bench(bench.gpu, network, bound=False).context.get_tensor_shape("y") == (-1, -1)


# The same surface as the real libraries


def parameters(function: Any) -> list[tuple[str, Any]]:
    """Names and kinds, the object itself left out."""
    return [(name, p.kind) for name, p in inspect.signature(function).parameters.items() if name not in ("self", "cls")]


CUDA_METHODS = {
    "Device": ("__new__", "set_current", "create_stream", "allocate", "sync"),
    "Stream": ("sync", "record", "create_graph_builder"),
    "Event": ("sync",),
    "Buffer": ("from_handle", "copy_from", "copy_to", "fill", "close", "set_deallocation_stream"),
    "LegacyPinnedMemoryResource": ("allocate",),
    "DeviceMemoryResource": (),
    "GraphBuilder": ("begin_building", "end_building", "complete", "close"),
    "Graph": ("upload", "launch", "close"),
}
CUDA_PROPERTIES = {
    "Device": ("name", "pci_bus_id", "compute_capability", "memory_resource"),
    "DeviceMemoryResource": ("handle",),
    "Stream": ("handle",),
    "Event": ("is_done", "is_timing_enabled"),
    "Buffer": ("handle", "size"),
    "GraphBuilder": ("stream", "is_building"),
}


@pytest.mark.parametrize("kind", CUDA_METHODS)
def test_surface_of_cuda_core(kind: str) -> None:
    core = pytest.importorskip("cuda.core", exc_type=ImportError)
    ours, real = getattr(cuda, kind), getattr(core, kind, None) or getattr(pytest.importorskip("cuda.core.graph"), kind)
    for name in CUDA_METHODS[kind]:
        assert parameters(getattr(ours, name)) == parameters(getattr(real, name)), name
    for name in CUDA_PROPERTIES.get(kind, ()):
        assert hasattr(real, name) and isinstance(inspect.getattr_static(ours, name), property), name
    public = {name for name in vars(ours) if not name.startswith("_")}
    assert public == {*CUDA_METHODS[kind], *CUDA_PROPERTIES.get(kind, ())} - {"__new__"}


def test_options_of_events() -> None:
    core = pytest.importorskip("cuda.core", exc_type=ImportError)
    assert [field.name for field in fields(cuda.EventOptions)] == [field.name for field in fields(core.EventOptions)]
    assert core.EventOptions(timing_enabled=True).timing_enabled and not core.EventOptions().timing_enabled
    assert callable(core.Event.__sub__)


def test_surface_of_cuda_bindings() -> None:
    driver, runtime = (
        pytest.importorskip(f"cuda.bindings.{name}", exc_type=ImportError) for name in ("driver", "runtime")
    )
    for name in ("cuMemGetInfo", "cuMemPoolTrimTo"):
        assert parameters(getattr(cuda, name)) == parameters(getattr(driver, name)), name
    for name in ("cudaGetDeviceCount", "cudaDriverGetVersion", "cudaGetDeviceProperties"):
        assert parameters(getattr(cuda, name)) == parameters(getattr(runtime, name)), name
    assert int(driver.CUresult.CUDA_SUCCESS) == cuda.CUresult.CUDA_SUCCESS
    for member in cuda.cudaError_t:
        assert int(getattr(runtime.cudaError_t, member.name)) == member.value


TENSORRT_METHODS = {
    "Logger": ("__init__",),
    "ILogger": ("__init__", "log"),
    "Runtime": ("__init__", "deserialize_cuda_engine"),
    "ICudaEngine": ("create_execution_context", "create_runtime_config", "create_engine_inspector"),
    "EngineInspector": ("get_engine_information",),
    "IProfiler": ("__init__", "report_layer_time"),
    "IRuntimeCache": ("serialize", "deserialize", "reset"),
    "IRuntimeConfig": (
        "set_execution_context_allocation_strategy",
        "create_runtime_cache",
        "set_runtime_cache",
        "get_runtime_cache",
    ),
    "IExecutionContext": (
        "set_device_memory",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "execute_async_v3",
        "get_tensor_shape",
        "report_to_profiler",
        "is_stream_capturable",
        "update_device_memory_size_for_shapes",
    ),
}
UNDOCUMENTED = {"Logger": ("log",), "Runtime": ("get_engine_validity",)}
"""Methods whose documentation gives no parameters, or that a base class documents."""
TENSORRT_PROPERTIES = {
    "Runtime": ("engine_header_size",),
    "ICudaEngine": ("device_memory_size_v2", "name"),
    "IRuntimeConfig": ("dynamic_shapes_kernel_specialization_strategy",),
    "IExecutionContext": ("active_optimization_profile", "engine", "profiler", "enqueue_emits_profile"),
}


@pytest.mark.parametrize("kind", TENSORRT_METHODS)
def test_surface_of_tensorrt(kind: str) -> None:
    real_library = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    ours, real = getattr(trt, kind), getattr(real_library, kind)
    for name in TENSORRT_METHODS[kind]:
        text = re.sub(r" = <[^>]*>", "", getattr(real, name).__doc__)  # default values
        overloads = re.findall(rf"{name}\(self: [^,)]*(?:, )?(.*)\) ->", text)
        names = [re.findall(r"(\w+): ", overload) for overload in overloads]
        assert [name for name, _ in parameters(getattr(ours, name))] in names, name
    for name in TENSORRT_PROPERTIES.get(kind, ()):
        assert isinstance(inspect.getattr_static(real, name), property), name
    public = {name for name in vars(ours) if not name.startswith("_") and callable(getattr(ours, name))}
    assert public == {*TENSORRT_METHODS[kind], *UNDOCUMENTED.get(kind, ())} - {"__init__"}
    assert all(hasattr(real, name) for name in UNDOCUMENTED.get(kind, ()))


def test_what_enterprise_tensorrt_has_not() -> None:
    """It is there in TensorRT-RTX; `test_bindings` holds the real enterprise library against the code."""
    real = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    with installed(Gpu(enterprise=True), cuda.modules() | trt.enterprise_modules()):
        import tensorrt  # type: ignore[import-not-found]

        for kind, names in trt.RTX_ONLY.items():
            for name in names:
                assert hasattr(getattr(real, kind) if kind else real, name), name
                assert not hasattr(object.__new__(getattr(tensorrt, kind)) if kind else tensorrt, name), name


def test_enumerations_of_tensorrt() -> None:
    real = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    for ours in (
        trt.ExecutionContextAllocationStrategy,
        trt.DynamicShapesKernelSpecializationStrategy,
        trt.LayerInformationFormat,
        trt.EngineValidity,
        trt.EngineInvalidityDiagnostics,
    ):
        members = getattr(real, ours.__name__).__members__
        assert {name: int(member) for name, member in members.items()} == {member.name: member.value for member in ours}
    for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        assert int(getattr(real.ILogger, name)) == getattr(trt.ILogger, name)
