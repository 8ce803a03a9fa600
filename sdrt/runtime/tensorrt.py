"""The TensorRT backends: compiled engines on a GPU, one CUDA-graph launch per model call, through `cuda.core` and nothing else.

Everything a picture needs is on the device before its first step: tables, noise, context, registers. Two captured graphs take turns
(an engine's output must not alias its input), so between two steps the host launches one graph and computes, allocates and copies nothing.
One stream, one activation block shared by all engines: they run one after the other.

This code has not run on a GPU yet; tests run it on a strict simulator of the two libraries.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER, Tensor, concrete, context_output, dimensions, signatures
from sdrt.engine_cache import list_engines, mismatch, read_plan, state_bytes
from sdrt.engine_record import EngineRecord
from sdrt.engine_shapes import EngineShapes, JobShape, shapes_of
from sdrt.errors import MachineError, MissingEngineError, ResourceError, SdrtError
from sdrt.machine.packages import install_command
from sdrt.runtime.captured_step import CapturedStep, TensorRtMemory
from sdrt.runtime.device_memory import Block, layout
from sdrt.runtime.engine import BatchShape, Float, Pixels, Watched
from sdrt.runtime.request_memory import Demand
from sdrt.runtime.running_batch import Slots

log = logging.getLogger("sdrt")

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_FREE_STEPS = 4
"""Idle sets of buffers, contexts and graphs kept, least recently used dropped first."""
_KEPT_BLOCKS = 8
_LOAD = "load"


class TensorRtEngine:
    """Thread-safe: a lock guards the stream, and each job has its own buffers, contexts and graphs."""

    def __init__(self, bundle: Bundle, target: str, device: int) -> None:
        self.backend = target
        self._bundle = bundle
        self.signatures = signatures(dimensions(bundle.manifest))
        self._trt, self._cuda = _import(target)
        self._lock = RLock()
        self._dead: str | None = None
        self._graphs_disabled = False
        self.watched = Watched()
        self._free: deque[CapturedStep] = deque()
        self._blocks: dict[Any, Block] = {}
        self._more_activations: list[Any] = []
        self._device: Any = None
        self._stream: Any = None
        with self.guarded(_LOAD):
            self._device = self._cuda.Device(device)
            self._device.set_current()
            major, minor = self._device.compute_capability
            self._folder, self.record = _choose(bundle, target, self._trt.__version__, f"sm_{major}{minor}")
            assert self.record.rows is not None  # None for engines of any shape only
            self.rows = self.record.rows
            self._stream = self._device.create_stream()
            self._loaded = [graph for graph in self.record.plans if graph != VAE_ENCODER]
            self._check_memory()
            self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
            self._engines = {graph: self._deserialize(graph) for graph in self._loaded}
            self.activation_bytes = max(int(engine.device_memory_size_v2) for engine in self._engines.values())
            self._activations = self._device.allocate(max(self.activation_bytes, 1), stream=self._stream)
            self._contexts = {graph: self.context(graph) for graph in (TEXT_ENCODER, VAE_DECODER)}

    def __del__(self) -> None:
        self.settle()  # before the buffers go: a cancelled picture's copies may still be on their way

    # Engine protocol

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        return (shapes_of(self.record, self._bundle.manifest),)

    def serves(self, shape: JobShape) -> bool:
        return any(engine.holds(shape) for engine in self.shapes)

    def demand(self, shape: JobShape) -> Demand:
        if not self.serves(shape):
            raise self._missing(f"no {self.backend} engine for {shape.options}; there is: {'; '.join(map(str, self.shapes))}", shape)
        needed = state_bytes(self._bundle.manifest, size=shape.size, batch=shape.batch, tokens=shape.tokens, rows=self.rows, branches=shape.branches)
        return Demand(needed, f"state {needed:,} bytes")

    def free_bytes(self, shape: JobShape) -> int | None:
        return None  # a job that finds no room raises ResourceError, and no system ends the process

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> Float:
        most = self.record.key.profiles[TEXT_ENCODER][0].shapes["tokens"][2][0]
        groups = [slice(first, first + most) for first in range(0, len(tokens), most)]
        return np.concatenate([self._encode_group(tokens[group], clip_skip) for group in groups])

    def _encode_group(self, tokens: NDArray[np.int64], clip_skip: int) -> Float:
        wanted = context_output(clip_skip)
        with self.guarded(TEXT_ENCODER):
            result: Float = self._run(TEXT_ENCODER, {"tokens": tokens}, {"n": len(tokens)}, wanted).host(wanted).copy()
            return result

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        count, _, height, width = noise.shape
        with self.guarded(VAE_ENCODER):
            if VAE_ENCODER not in self._contexts:  # most pictures start from text: the encoder is loaded when the first image comes
                self._engines[VAE_ENCODER] = self._deserialize(VAE_ENCODER)
                self._contexts[VAE_ENCODER] = self.context(VAE_ENCODER)
            sizes = {"N": count, "h": height, "w": width}
            result: Float = self._run(VAE_ENCODER, {"pixels": pixels, "noise": noise}, sizes, "latents").host("latents").copy()
            return result

    def _run(self, graph: str, inputs: dict[str, NDArray[Any]], sizes: Mapping[str, int], output: str) -> Block:
        """Run one graph on host arrays and wait for `output`, which the block then holds. `sizes` says what the free axes are."""
        block = self._kept(graph, sizes)
        for name, array in inputs.items():
            block.host(name)[...] = array
        block.upload(self._stream, *_ends(self.signatures[graph].inputs))
        self._enqueue_on(block, graph)
        block.download(self._stream, output, output)
        self._stream.sync()
        return block

    def _enqueue_on(self, block: Block, graph: str) -> None:
        """Start one run of a graph whose inputs and outputs are all in one block."""
        context, signature = self._contexts[graph], self.signatures[graph]
        self.bind(context, graph, 0, {name: (block.address(name), block.layout.sections[name].shape) for name in signature.inputs})
        for name in signature.outputs:
            context.set_tensor_address(name, block.address(name))
        self.watched.around(graph, self._stream, lambda: self.enqueue(context, graph, self._stream))

    def open(self, shape: BatchShape, capacity: int) -> Slots:
        with self.guarded(STEP):
            fewest = self.record.key.profiles[STEP][self.profile(shape)].shapes["init"][0][0]
            capacity = max(capacity, fewest)
            step = self._take(shape, capacity)
            try:
                return Slots(TensorRtMemory(self, step), self.signatures[STEP], shape, capacity, self.rows)
            except BaseException:
                step.close(self._stream)
                raise

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        count, _, height, width = latents.shape
        with self.guarded(VAE_DECODER):
            block = self._kept(VAE_DECODER, {"N": count, "h": height, "w": width})
            block.host("latents")[...] = latents
            block.host("rounding")[0] = rounding
            block.upload(self._stream, "latents", "rounding")
            return self._decoded(block)

    def decode_from(self, source: Block, offsets: Sequence[int], shape: BatchShape, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        """Decode latents that lie on the device, each at an offset in bytes in `source`; one copy back."""
        block = self._kept(VAE_DECODER, {"N": len(offsets), "h": shape.height, "w": shape.width})
        size_bytes = block.offset("latents", 1) - block.offset("latents", 0)
        for i, offset in enumerate(offsets):
            block.copy(self._stream, block.offset("latents", i), source, offset, size_bytes)
        block.host("rounding")[0] = rounding
        block.upload(self._stream, "rounding", "rounding")
        return self._decoded(block)

    def _decoded(self, block: Block) -> tuple[Pixels, NDArray[np.bool_]]:
        self._enqueue_on(block, VAE_DECODER)
        outputs = self.signatures[VAE_DECODER].outputs
        block.download(self._stream, *_ends(outputs))
        self._stream.sync()
        return block.host("pixels").copy(), block.host("finite").copy()

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.backend, "version": self._trt.__version__, "device": self._device.name, "compute": self.record.key.precision,
            "engine": self._folder.name, "cuda_graphs": not self._graphs_disabled,
        }  # fmt: skip

    # What jobs and benchmarks use

    @property
    def library(self) -> Any:
        """TensorRT's or TensorRT-RTX's module."""
        return self._trt

    @property
    def cuda(self) -> Any:
        """`cuda.core`."""
        return self._cuda

    def guarded(self, where: str) -> _Guard:
        return _Guard(self, where)

    def block(self, fields: list[Any], *, pinned: bool = True) -> Block:
        return Block(self._cuda, self._device, self._stream, layout(fields), pinned=pinned, count=self.watched.count)

    def _kept(self, graph: str, sizes: Mapping[str, int]) -> Block:
        """A block for a graph's inputs and outputs that is used and synchronised within one guarded call, kept for the next call of the same sizes."""
        key = (graph, *sizes.values())
        block = self._blocks.pop(key, None)
        if block is None:
            signature = self.signatures[graph]
            both = {**signature.inputs, **signature.outputs}
            block = self.block([(name, concrete(tensor.shape, sizes), tensor.dtype) for name, tensor in both.items()])
        self._blocks[key] = block
        if len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.pop(next(iter(self._blocks))).close(self._stream)
        return block

    def context(self, graph: str) -> Any:
        """A new execution context on the shared activation block."""
        engine, strategy = self._engines[graph], self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(engine, "create_runtime_config") and hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX compiles kernels for shapes it meets; lazily, a captured graph would freeze the fallback kernels.
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise ResourceError(
                f"{graph}: the GPU has no memory left for another execution context", "Close other programs on the GPU, or choose a smaller --size or --batch."
            )
        context.set_device_memory(*self._activations_for(engine))
        return context

    def _activations_for(self, engine: Any) -> tuple[int, int]:
        """Address and size of the activation block; a larger one of its own for an engine that was loaded later and needs it."""
        needed = int(engine.device_memory_size_v2)
        if needed <= self.activation_bytes:
            return int(self._activations.handle), max(self.activation_bytes, 1)
        self._more_activations.append(self._device.allocate(needed, stream=self._stream))
        return int(self._more_activations[-1].handle), needed

    def bind(self, context: Any, graph: str, profile: int, inputs: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        """Choose a profile, then set the shape and address of every input.

        Raises:
            MissingEngineError: a shape is outside what the engine was compiled for.
        """
        ranges = self.record.key.profiles[graph][profile].shapes
        for name, (_, shape) in inputs.items():
            if name in ranges:
                low, _, high = ranges[name]
                if len(low) != len(shape) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
                    raise self._missing(f"{graph}: {name}: shape {list(shape)}, the engine was compiled for {list(low)} to {list(high)}")
        if context.active_optimization_profile != profile and not context.set_optimization_profile_async(profile, int(self._stream.handle)):
            raise MachineError(f"{graph}: TensorRT refused optimization profile {profile}", self._compile_hint())
        for name, (address, shape) in inputs.items():
            if not context.set_input_shape(name, shape) or not context.set_tensor_address(name, address):
                raise MachineError(f"{graph}: TensorRT refused input {name} of shape {list(shape)}", self._compile_hint())

    def enqueue(self, context: Any, graph: str, stream: Any) -> None:
        if not context.execute_async_v3(int(stream.handle)):
            raise MachineError(f"{graph}: TensorRT refused to run; its outputs are not valid", "Run again with a new pipeline; if it persists, compile again.")

    def profile(self, shape: BatchShape) -> int:
        """The step engine's profile for a number of guidance branches."""
        if shape.branches not in self.record.branches:
            built = ", ".join(str(n) for n in self.record.branches)
            raise self._missing(f"step: {shape.branches} guidance branches, the engine was compiled for {built}")
        return self.record.branches.index(shape.branches)

    def disable_graphs(self, why: str) -> None:
        if not self._graphs_disabled:
            log.warning("CUDA graphs are off for this pipeline: %s", why)
        self._graphs_disabled = True

    @property
    def graphs_disabled(self) -> bool:
        return self._graphs_disabled

    @property
    def stream(self) -> Any:
        return self._stream

    def give_back(self, step: CapturedStep) -> None:
        """Keep a captured step for a later batch. Calls nothing of CUDA: the garbage collector comes here, from any thread, even within a capture."""
        self._free.append(step)

    def settle(self) -> Exception | None:
        """Wait until nothing that a failed call started still uses pinned memory. Returns the error that the device reports instead, if any."""
        try:
            if self._stream is not None:
                self._stream.sync()
        except Exception as error:
            return error
        return None

    def failed(self, where: str, error: Exception) -> SdrtError:
        """A CUDA failure as one of ours. Out of memory leaves the pipeline usable; any other CUDA error is sticky."""
        text = " ".join(str(error).split())[:300]
        if _out_of_memory(error):
            self._close_free(0)
            fix = "Choose a smaller --size or --batch; the pipeline stays usable."
            if where == _LOAD:
                fix = "Close other programs on the GPU, or compile for a smaller --size or --batch."
            return ResourceError(f"{where}: out of device memory: {text}", fix)
        if "CUDA_ERROR" in text:
            self._dead = text
            return MachineError(f"{where}: the GPU failed: {text}", "This pipeline is dead: restart the process.")
        return MachineError(f"{where}: {type(error).__name__}: {text}", "Run: sdrt doctor")

    def enter(self) -> None:
        self._lock.acquire()
        if self._dead is not None:
            self._lock.release()
            raise MachineError(f"pipeline: dead after a GPU failure: {self._dead}", "Restart the process.")
        if self._device is not None:
            self._device.set_current()  # the current device is a thread's own

    def leave(self) -> None:
        self._lock.release()

    def _take(self, shape: BatchShape, capacity: int) -> CapturedStep:
        """A free captured step of this shape and capacity, or a new one in the place of the least recently used."""
        found = None
        for _ in range(len(self._free)):  # a whole turn, which keeps the order; the garbage collector may append meanwhile
            step = self._free.popleft()
            if found is None and (step.shape, step.capacity) == (shape, capacity):
                found = step
            else:
                self._free.append(step)
        self._close_free(_FREE_STEPS - 1)
        if found is not None:
            return found
        try:
            return CapturedStep(self, self.signatures[STEP], shape, capacity)
        except Exception as error:
            if not self._free or not (_out_of_memory(error) or isinstance(error, ResourceError)):
                raise
        self._close_free(0)
        return CapturedStep(self, self.signatures[STEP], shape, capacity)

    def _close_free(self, kept: int) -> None:
        while len(self._free) > kept:
            self._free.popleft().close(self._stream)

    def _deserialize(self, graph: str) -> Any:
        plan = read_plan(self._folder, self.record, graph)  # hashed before TensorRT sees it: a plan is native code
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise MachineError(f"{self._folder}: {graph}: TensorRT {self._trt.__version__} cannot load this plan", self._compile_hint())
        return engine

    def _check_memory(self) -> None:
        plans = [self.record.plans[graph] for graph in self._loaded]
        activations = max(plan.device_memory_bytes or 0 for plan in plans)  # shared: the largest of them
        needed = self.record.state_bytes + sum(plan.size_bytes for plan in plans) + activations
        free = _free_bytes()
        if free is not None and needed > free:
            raise ResourceError(
                f"{self._folder}: needs about {needed:,} bytes on the GPU, {free:,} are free",
                "Close other programs on it, or compile for a smaller --size or --batch.",
            )

    def _missing(self, message: str, wanted: JobShape | None = None) -> MissingEngineError:
        error = MissingEngineError(message, self._compile_hint(*([] if wanted is None else [wanted.options])))
        error.data = {"shapes": [asdict(one) for one in self.shapes], **({} if wanted is None else {"wanted": asdict(wanted)})}
        return error

    def _compile_hint(self, options: str = "--size WxH --batch N") -> str:
        return f"Compile for it with: sdrt compile {self._bundle.path} --target {self.backend} {options}"


class _Guard:
    """The engine's lock, its device made current, and failures of CUDA turned into ours."""

    def __init__(self, engine: TensorRtEngine, where: str) -> None:
        self._engine = engine
        self._where = where

    def __enter__(self) -> None:
        self._engine.enter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                cause = self._engine.settle() or error
                if isinstance(cause, Exception) and not isinstance(cause, SdrtError):
                    raise self._engine.failed(self._where, cause) from cause
        finally:
            self._engine.leave()


def _ends(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The first and the last name."""
    first, *_, last = [*tensors, *tensors]
    return first, last


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "OUT_OF_MEMORY" in str(error)


def _import(target: str) -> tuple[Any, Any]:
    import importlib

    try:
        return importlib.import_module(MODULES[target]), importlib.import_module("cuda.core")
    except ImportError as error:
        raise MachineError(f"backend {target}: {error}", f"Install it with: {install_command(target)}") from error


def _choose(bundle: Bundle, target: str, compiler: str, sm: str) -> tuple[Path, EngineRecord]:
    """The newest engine of a target that fits this bundle and machine."""
    reasons = []
    for folder, record in list_engines(bundle):
        if record.key.target != target:
            continue
        reason = mismatch(record, bundle, target=target, compiler=compiler, device_sm=sm)
        if not reason:
            return folder, record
        reasons.append(f"{folder.name}: {reason}")
    found = "; ".join(reasons) or "there is none"
    raise MachineError(f"{bundle.path}: no {target} engine fits: {found}", f"Make one here with: sdrt compile {bundle.path} --target {target}")


def _free_bytes() -> int | None:
    """Free memory of the current device, or None where the driver does not say."""
    from cuda.bindings import driver

    status, free, _ = driver.cuMemGetInfo()
    return int(free) if status == driver.CUresult.CUDA_SUCCESS else None
