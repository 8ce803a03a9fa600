"""The plans of a bundle's engine on a GPU, through `cuda.core` and TensorRT's own module and nothing else: what was
loaded, the stream it runs on, execution contexts, and the memory that runs have in common.

One stream, one activation block for all plans: they run one after the other. What the device or the library reports
becomes an error of ours in here.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import (
    STEP,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Signature,
    Tensor,
    concrete,
    dimensions,
    signatures,
)
from sdrt.engines.record import EngineRecord
from sdrt.engines.shapes import EngineShapes, JobShape, shapes_of
from sdrt.engines.store import list_engines, mismatch, read_plan
from sdrt.engines.targets import TARGETS, TENSORRT
from sdrt.errors import MachineError, MissingEngineError, ResourceError, SdrtError
from sdrt.machine.gpus import Gpu, probe_gpus
from sdrt.machine.packages import NEW_DRIVER, install_command
from sdrt.machine.tensorrt_messages import OUT_OF_MEMORY, make_log, short
from sdrt.runtime.backends.tensorrt.blocks import Activations, Block, NoPinnedMemory, layout, out_of_memory
from sdrt.runtime.backends.tensorrt.kernels import KernelCache
from sdrt.runtime.engine import FEW_CALLS, BatchShape, Pixels, Watched

log = logging.getLogger("sdrt")

_KEPT_BLOCKS = 8
_ROOM = "Close other programs on the GPU, or compile for a smaller --size or --batch."
_NOISE_BYTES, _FEWEST_ROWS = 1 << 28, 32
_LOAD = "load"
_PROBLEMS = {
    "VERSION_MISMATCH": "another version made it",
    "UNSUPPORTED_CC": "it has no kernels for this GPU",
    "OLD_CUDA_DRIVER": "the driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "MALFORMED_ENGINE": "it is malformed",
    "CUDA_ERROR": "CUDA's driver or runtime is not installed as it should be",
}
"""What TensorRT-RTX may find in a plan's header, by its own names."""
_REFUSED = re.compile(r"CUDA_ERROR_(INVALID_VALUE|NOT_SUPPORTED|NOT_PERMITTED|STREAM_CAPTURE_\w+)\b")
"""CUDA's errors of one call, which leave the device as it was."""


class Idle(Protocol):
    """What is kept for a later batch, and can be given up where the device has no memory left."""

    def close(self, stream: Any) -> None:
        """Give its memory back."""


def places_of(name: str, tensor: Tensor, pictures: int) -> list[str]:
    """Sections of a block for a tensor: one for each picture where it has an axis of them."""
    return [f"{name} {picture}" for picture in range(pictures)] if tensor.shape[0] == "N" else [name]


@dataclass(frozen=True)
class GraphBlock:
    """The inputs and outputs of a graph in one block. It takes one picture at a time, so each has its own sections: an
    address that TensorRT is given lies on a boundary.
    """

    graph: str
    signature: Signature
    block: Block
    pictures: int

    def place(self, name: str, picture: int) -> str:
        """The section of an input or output for a picture."""
        places = self._places(name)
        return places[picture if len(places) > 1 else 0]

    def ends(self, *names: str) -> tuple[str, str]:
        """The first and the last section of tensors that lie side by side, in their order."""
        return self._places(names[0])[0], self._places(names[-1])[-1]

    def write(self, name: str, array: NDArray[Any]) -> None:
        places = self._places(name)
        parts = [array] if len(places) == 1 else np.split(array, len(places))
        for place, part in zip(places, parts, strict=True):
            self.block.host(place)[...] = part

    def read(self, name: str) -> NDArray[Any]:
        """A copy of what was copied back."""
        return np.concatenate([self.block.host(place) for place in self._places(name)])

    def _places(self, name: str) -> list[str]:
        tensor = {**self.signature.inputs, **self.signature.outputs}[name]
        return places_of(name, tensor, self.pictures)


class Plans:
    """Thread-safe within `guarded`, which locks the stream.

    `idle` are steps of no batch, the least recently used first.
    """

    def __init__(self, bundle: Bundle, target: str, device: int, whole_picture: bool | None) -> None:
        self._whole_picture = whole_picture
        self._pictures_disabled = False
        self._device: Any = None
        self.target = target
        self._bundle = bundle
        self.signatures = signatures(dimensions(bundle.manifest))
        self._trt, self._cuda = _import(target)
        self._lock = RLock()
        self._dead: str | None = None
        self.graphs_disabled = False
        self.watched = Watched()
        self.idle: deque[Idle] = deque()
        self._blocks: dict[Any, GraphBlock] = {}
        self._activations: Activations | None = None
        self._engines: dict[str, Any] = {}
        self._contexts: dict[str, Any] = {}
        self._bound: dict[str, Any] = {}
        self._shapes_met: set[Any] = set()
        self._new_kernels = False
        self._log: Any = None
        self.stream: Any = None
        _check_machine(target, device)
        with self.guarded(_LOAD):
            self._device = self._cuda.Device(device)
            self._device.set_current()
            major, minor = self._device.compute_capability
            self._gpu = Gpu(self._device.name, f"sm_{major}{minor}")
            self._folder, self.record = _choose(bundle, target, self._trt.__version__, self._gpu)
            assert self.record.rows is not None  # None for engines of any shape only
            self._rows = self.record.rows
            self.stream = self._device.create_stream()
            try:
                self._load()
            except BaseException:
                self._close()  # now, not when the error is forgotten
                raise

    def __del__(self) -> None:
        if self._device is not None and self.stream is not None:
            with suppress(Exception):  # a device that has failed gives nothing back
                self._device.set_current()
                self._close()

    def _load(self) -> None:
        loaded = [graph for graph in self.record.plans if graph != VAE_ENCODER]
        self.trim()
        self._check_memory(
            sum(self.record.plans[graph].size_bytes for graph in loaded),
            max(self.record.plans[graph].device_memory_bytes or 0 for graph in loaded),
        )
        self._kernels = KernelCache(self._trt.__version__, self._gpu)
        self._log = make_log(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        for graph in loaded:
            self._engines[graph] = self._deserialize(graph)
        self._check_memory(0, max(int(engine.device_memory_size_v2) for engine in self._engines.values()))
        for graph in (TEXT_ENCODER, VAE_DECODER):
            self._contexts[graph] = self.context(graph)

    def _close(self) -> None:
        """Give back everything, and to the device itself."""
        self.settle()  # a cancelled picture's copies may still be on their way
        self.close_idle(0)
        for held in self._blocks.values():
            held.block.close(self.stream)
        if self._activations is not None:
            self._activations.replace(self.stream)
            self._activations = None
        for loaded in (self._blocks, self._contexts, self._engines):
            loaded.clear()
        self.trim()

    @property
    def library(self) -> Any:
        """TensorRT's or TensorRT-RTX's module."""
        return self._trt

    @property
    def cuda(self) -> Any:
        """`cuda.core`."""
        return self._cuda

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        """The batches that the plans take."""
        return (shapes_of(self.record, self._bundle.manifest),)

    def describe(self) -> dict[str, Any]:
        """What runs: as `Engine.describe`."""
        return {
            "backend": self.target,
            "version": self._trt.__version__,
            "device": self._device.name,
            "compute": self.record.key.precision,
            "engine": self._folder.name,
            "cuda_graphs": not self.graphs_disabled,
        }

    def guarded(self, where: str) -> _Guard:
        return _Guard(self, where)

    def block(self, fields: list[Any], *, pinned: bool = True) -> Block:
        return Block(self._cuda, self._device, self.stream, layout(fields), pinned=pinned, count=self.watched.count)

    def load(self, graph: str) -> None:
        """Load a graph's plan, unless it is loaded."""
        if graph not in self._contexts:
            self._engines[graph] = self._deserialize(graph)
            self._contexts[graph] = self.context(graph)

    def run(self, graph: str, inputs: dict[str, NDArray[Any]], sizes: Mapping[str, int], *outputs: str) -> GraphBlock:
        """Run one graph on host arrays and wait for `outputs`, which the block then holds. `sizes` says what the free
        axes are.
        """
        held = self.kept(graph, sizes)
        for name, array in inputs.items():
            held.write(name, array)
        held.block.upload(self.stream, *held.ends(*self.signatures[graph].inputs))
        self._enqueue_on(held)
        for output in outputs:
            held.block.download(self.stream, *held.ends(output))
        self.stream.sync()
        return held

    def _enqueue_on(self, held: GraphBlock) -> None:
        """Start the runs of a graph whose inputs and outputs are all in one block: one for each picture."""
        context, signature, block = self._contexts[held.graph], held.signature, held.block

        def start() -> None:
            for picture in range(held.pictures):
                places = {name: held.place(name, picture) for name in (*signature.inputs, *signature.outputs)}
                if not picture:
                    self._bind_once(context, held, {name: places[name] for name in signature.inputs})
                for name, at in places.items():
                    context.set_tensor_address(name, block.address(at))
                self.enqueue(context, held.graph, self.stream)

        self.watched.around(held.graph, self.stream, start)

    def _bind_once(self, context: Any, held: GraphBlock, inputs: Mapping[str, str]) -> None:
        """Bind unless the context has these shapes and this activation block."""
        sections = {name: held.block.layout.sections[place] for name, place in inputs.items()}
        shapes = [section.shape for section in sections.values()]
        if self._bound.get(held.graph) != (shapes, self._activations):
            self._bound.pop(held.graph, None)
            self.bind(
                context,
                held.graph,
                0,
                {name: (held.block.address(inputs[name]), section.shape) for name, section in sections.items()},
            )
            self._bound[held.graph] = shapes, self._activations

    def kept(self, graph: str, sizes: Mapping[str, int]) -> GraphBlock:
        """A block for a graph's inputs and outputs that is used and synchronised within one guarded call, kept for the
        next call of the same sizes.
        """
        key = (graph, *sizes.values())
        held = self._blocks.pop(key, None)
        if held is None:
            signature, pictures = self.signatures[graph], sizes.get("N", 1)
            fields = [
                (place, concrete(tensor.shape, {**sizes, "N": 1}), tensor.dtype)
                for name, tensor in {**signature.inputs, **signature.outputs}.items()
                for place in places_of(name, tensor, pictures)
            ]
            held = GraphBlock(graph, signature, self.block(fields), pictures)
        self._blocks[key] = held
        if len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.pop(next(iter(self._blocks))).block.close(self.stream)
        return held

    def decode(self, latents: NDArray[np.float32], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        """Decode latents `[N, 4, h, w]` of the host."""
        count, _, height, width = latents.shape
        held = self.kept(VAE_DECODER, {"N": count, "h": height, "w": width})
        held.write("latents", latents)
        return self._decoded(held, rounding, "latents", "rounding")

    def decode_from(
        self, source: Block, offsets: Sequence[int], shape: BatchShape, rounding: float
    ) -> tuple[Pixels, NDArray[np.bool_]]:
        """Decode latents that lie on the device, each at an offset in bytes in `source`; one copy back."""
        held = self.kept(VAE_DECODER, {"N": len(offsets), "h": shape.height, "w": shape.width})
        for picture, offset in enumerate(offsets):
            section = held.block.layout.sections[held.place("latents", picture)]
            held.block.copy(self.stream, section.offset, source, offset, section.size_bytes)
        return self._decoded(held, rounding, "rounding")

    def _decoded(self, held: GraphBlock, rounding: float, *inputs: str) -> tuple[Pixels, NDArray[np.bool_]]:
        """Pixels `[N, H, W, 3]`, and whether each picture was finite. `inputs` are those to copy to the device."""
        held.block.host("rounding")[0] = rounding
        held.block.upload(self.stream, *held.ends(*inputs))
        self._enqueue_on(held)
        held.block.download(self.stream, *held.ends(*held.signature.outputs))
        self.stream.sync()
        self.keep_kernels()
        return held.read("pixels"), held.read("finite")

    def keep_kernels(self) -> None:
        """Keep what TensorRT-RTX compiled for a shape it met first; for when a picture is done, and nothing waits for
        the device.
        """
        if self._new_kernels:
            self._kernels.keep()
            self._new_kernels = False

    def context(self, graph: str) -> Any:
        """A new execution context. `bind` gives it its activation block."""
        engine, strategy = self._engines[graph], self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(engine, "create_runtime_config") and hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX compiles kernels for shapes it meets; lazily, a captured graph would freeze the fallback
            # kernels.
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = (
                self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self._kernels.attach(config)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            raise ResourceError(
                f"{graph}: the GPU has no memory left for another execution context{self.words()}",
                "Close other programs on the GPU, or choose a smaller --size or --batch.",
            )
        return context

    def bind(
        self,
        context: Any,
        graph: str,
        profile: int,
        inputs: dict[str, tuple[int, tuple[int, ...]]],
        beside: Callable[[], int] = lambda: 0,
    ) -> Activations:
        """Choose a profile, set the shape and address of every input, and give the context the shared activation block.
        That one grows where these shapes need more, or what is told by `beside`, which will come soon.

        Raises:
            MissingEngineError: a shape is outside what the engine was compiled for.
        """
        needed = self._shape(context, graph, profile, {name: shape for name, (_, shape) in inputs.items()})
        memory = self._activations_of(max(needed, beside()))
        context.set_device_memory(memory.address, memory.size_bytes)
        for name, (address, shape) in inputs.items():
            if not context.set_tensor_address(name, address):
                raise self._refused(f"{graph}: TensorRT refused input {name} of shape {list(shape)}")
        return memory

    def decoder_bytes(self, shape: BatchShape) -> int:
        """What the decoder will compute in for pictures of a batch."""
        sizes = {"N": 1, "h": shape.height, "w": shape.width}
        inputs = self.signatures[VAE_DECODER].inputs
        self._bound.pop(VAE_DECODER, None)
        return self._shape(
            self._contexts[VAE_DECODER],
            VAE_DECODER,
            0,
            {name: concrete(tensor.shape, sizes) for name, tensor in inputs.items()},
        )

    def _shape(self, context: Any, graph: str, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Choose a profile and set shapes. Returns what the context then computes in, in bytes."""
        ranges = self.record.key.profiles[graph][profile].shapes
        for name, shape in shapes.items():
            if name in ranges:
                low, _, high = ranges[name]
                if len(low) != len(shape) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
                    raise self.missing(
                        f"{graph}: {name}: shape {list(shape)}, the engine was compiled for {list(low)} to {list(high)}"
                    )
        if context.active_optimization_profile != profile and not context.set_optimization_profile_async(
            profile, int(self.stream.handle)
        ):
            raise self._refused(f"{graph}: TensorRT refused optimization profile {profile}")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._refused(f"{graph}: TensorRT refused input {name} of shape {list(shape)}")
        met = (graph, profile, *shapes.values())
        self._new_kernels |= met not in self._shapes_met
        self._shapes_met.add(met)
        return int(context.update_device_memory_size_for_shapes())

    def _activations_of(self, needed: int) -> Activations:
        """The shared activation block, a new one where it is too small. Idle steps are given up then: their graphs hold
        the smaller one.
        """
        if self._activations is None or self._activations.size_bytes < needed:
            self.close_idle(0)
            if self._activations is not None:
                self._activations.replace(self.stream)
                self._activations = None
            self._activations = Activations(self._device, self.stream, needed)
        return self._activations

    def _refused(self, what: str) -> MachineError:
        return MachineError(f"{what}{self.words()}", self._compile_hint())

    def enqueue(self, context: Any, graph: str, stream: Any) -> None:
        if not context.execute_async_v3(int(stream.handle)):
            raise MachineError(
                f"{graph}: TensorRT refused to run; its outputs are not valid{self.words()}",
                "Run again with a new pipeline; if it persists, compile again.",
            )

    def rows(self, shape: BatchShape, capacity: int) -> int:
        """Table rows of each slot of a batch: those that the engine was compiled for, or fewer where the noise of so
        many pictures would take too much page-locked memory. Pictures of more model calls refill their rows.
        """
        row_bytes = self.signatures[STEP].inputs["noise"].size_bytes({"S": 1, "h": shape.height, "w": shape.width})
        fewest = self.record.key.profiles[STEP][self.profile(shape)].shapes["noise"][0][0]
        most = max(_FEWEST_ROWS, -(-(fewest - 1) // capacity), _NOISE_BYTES // (capacity * row_bytes))
        return min(self._rows, most)

    def profile(self, shape: BatchShape) -> int:
        """The step engine's profile for a number of guidance branches."""
        if shape.branches not in self.record.branches:
            built = ", ".join(str(n) for n in self.record.branches)
            raise self.missing(f"step: {shape.branches} guidance branches, the engine was compiled for {built}")
        return self.record.branches.index(shape.branches)

    def disable_graphs(self, why: str) -> None:
        if not self.graphs_disabled:
            log.warning("CUDA graphs are off for this pipeline: %s", why)
        self.graphs_disabled = True

    def whole(self, calls: int) -> bool:
        """Whether a picture of so many model calls is launched as one graph. Unless that was asked for, only where
        nobody times its calls.
        """
        if self.graphs_disabled or self._pictures_disabled or self._whole_picture is False:
            return False
        return self._whole_picture is True or (calls <= FEW_CALLS and self.watched.observer is None)

    def disable_pictures(self, why: str) -> None:
        log.warning("pictures are launched call by call in this pipeline: %s", why)
        self._pictures_disabled = True

    def settle(self) -> Exception | None:
        """Wait until nothing that a failed call started still uses pinned memory. Returns the error that the device
        reports instead, if any.
        """
        try:
            if self.stream is not None:
                self.stream.sync()
        except Exception as error:
            return error
        return None

    def failed(self, where: str, error: Exception) -> SdrtError:
        """A CUDA failure as one of ours. Most are sticky; out of memory is not, nor is a call that was refused."""
        text = " ".join(str(error).split())[:300]
        if out_of_memory(error):
            with suppress(Exception):  # a device that has failed meanwhile says so at the next call
                self.make_room()
            fix = "Choose a smaller --size or --batch; the pipeline stays usable."
            if isinstance(error, NoPinnedMemory):
                return ResourceError(f"{where}: out of page-locked host memory: {text}", f"Free some, or: {fix}")
            if where == _LOAD:
                fix = _ROOM
            return ResourceError(f"{where}: out of device memory: {text}", fix)
        if "CUDA_ERROR" in text and not _REFUSED.search(text):
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
        if self._log is not None:
            self._log.lines.clear()

    def leave(self) -> None:
        self._lock.release()

    def close_idle(self, kept: int) -> None:
        """Give up idle steps until `kept` are left."""
        while len(self.idle) > kept:
            self.idle.popleft().close(self.stream)

    def make_room(self) -> None:
        """Give up what is kept for later."""
        self.close_idle(0)
        self.trim()

    def trim(self) -> None:
        """Have the device's memory pool give back what nobody uses. It keeps what is freed, for whoever comes to it;
        TensorRT's own allocations, other pipelines' checks and other programs do not come to it.
        """
        from cuda.bindings import driver

        pool = getattr(self._device.memory_resource, "handle", None)
        if pool is not None:  # None on a device without pools
            self.stream.sync()  # what the host has not seen freed counts as in use
            driver.cuMemPoolTrimTo(pool, 0)

    def _deserialize(self, graph: str) -> Any:
        plan = read_plan(self._folder, self.record, graph)  # hashed before TensorRT sees it: a plan is native code
        self._check_header(graph, plan)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            what = f"{self._folder}: {graph}: TensorRT {self._trt.__version__} cannot load this plan"
            if OUT_OF_MEMORY.search(self.words()):
                raise ResourceError(f"{what}{self.words()}", _ROOM)
            raise self._refused(what)
        return engine

    def _check_header(self, graph: str, plan: bytes) -> None:
        """Ask TensorRT-RTX about a plan before gigabytes of it are loaded: it gives reasons, and loading gives none."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, problems = self._runtime.get_engine_validity(plan[: self._runtime.engine_header_size])
        if validity != self._trt.EngineValidity.INVALID:
            return
        known = self._trt.EngineInvalidityDiagnostics.__members__
        names = [name for name, bit in known.items() if int(problems) & int(bit)]
        words = ", ".join(_PROBLEMS.get(name, name) for name in names) or "it gives no reason"
        library = f"TensorRT-RTX {self._trt.__version__}"
        where = f"{self._folder}: {graph}: {library}: this plan does not run here: {words}{self.words()}"
        if names == ["INSUFFICIENT_GPU_MEMORY"]:
            raise ResourceError(where, _ROOM)
        raise MachineError(where, NEW_DRIVER if "OLD_CUDA_DRIVER" in names else self._compile_hint())

    def words(self) -> str:
        """What TensorRT said last within this guarded call, which its answers do not tell."""
        return f": {short(self._log.lines[-1])}" if self._log.lines else ""

    def _check_memory(self, plans_bytes: int, activation_bytes: int) -> None:
        """Compare what loading and the largest batch take with what is free. Where an engine takes a range of shapes,
        that is not told until it is loaded, and then it is a warning: smaller batches may fit.
        """
        needed = self.record.state_bytes + plans_bytes + activation_bytes
        free = _free_bytes()
        if free is None or needed <= free:
            return
        words = f"{self._folder}: needs about {needed:,} bytes on the GPU, {free:,} are free"
        if plans_bytes > free or not self._takes_ranges():
            raise ResourceError(words, _ROOM)
        if not plans_bytes:
            log.warning("%s: that is for its largest batch, smaller ones may fit", words)

    def _takes_ranges(self) -> bool:
        profiles = (profile for graph in (STEP, VAE_DECODER) for profile in self.record.key.profiles[graph])
        return any(low != high for profile in profiles for low, _, high in profile.shapes.values())

    def missing(self, message: str, wanted: JobShape | None = None) -> MissingEngineError:
        error = MissingEngineError(message, self._compile_hint(*([] if wanted is None else [wanted.options])))
        error.data = {
            "shapes": [asdict(one) for one in self.shapes],
            **({} if wanted is None else {"wanted": asdict(wanted)}),
        }
        return error

    def _compile_hint(self, options: str = "--size WxH --batch N") -> str:
        return f"Compile for it with: {_command(self._bundle, self.target, self._gpu)} {options}"


class _Guard:
    """The plans' lock, its device made current, and failures of CUDA turned into ours."""

    def __init__(self, plans: Plans, where: str) -> None:
        self._plans = plans
        self._where = where

    def __enter__(self) -> None:
        self._plans.enter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                cause = self._plans.settle() or error
                if isinstance(cause, Exception) and not isinstance(cause, SdrtError):
                    raise self._plans.failed(self._where, cause) from cause
        finally:
            self._plans.leave()


def _import(target: str) -> tuple[Any, Any]:
    import importlib

    row = TARGETS[target]
    try:
        trt, cuda = importlib.import_module(row.module), importlib.import_module("cuda.core")
    except ImportError as error:
        raise MachineError(f"backend {target}: {error}", f"Install it with: {install_command(row.extra)}") from error
    if not hasattr(cuda, "Device"):  # before 1.0 all of it lay in cuda.core.experimental
        raise MachineError(
            f"backend {target}: cuda-core is too old", f"Install it with: {install_command(row.extra, '--upgrade')}"
        )
    return trt, cuda


def _check_machine(target: str, device: int) -> None:
    """That a GPU answers under this number, and that packages and driver go together: CUDA's own words come late and
    say little.
    """
    from sdrt.machine.doctor import wrong_cuda

    gpus = probe_gpus()
    if problem := wrong_cuda(target, gpus):
        raise MachineError(f"backend {target}: {problem[0]}", problem[1])
    if not gpus.found:
        raise MachineError(f"backend {target}: no GPU answers: {gpus.detail}", f"{NEW_DRIVER}; then: sdrt doctor")
    if device >= len(gpus.found):
        raise MachineError(
            f"backend {target}: device {device}: this machine has {len(gpus.found)}",
            f"Choose 0 to {len(gpus.found) - 1}.",
        )


def _choose(bundle: Bundle, target: str, compiler: str, gpu: Gpu) -> tuple[Path, EngineRecord]:
    """The newest engine of a target that fits this bundle and machine."""
    row, reasons = TARGETS[target], []
    if row.sms and gpu.sm not in {f"sm_{sm}" for sm in row.sms}:
        raise MachineError(
            f"backend {target}: {row.title} has no kernels for {gpu}",
            f"{TENSORRT.title} has: {install_command(TENSORRT.extra)}; {_command(bundle, TENSORRT.name, gpu)}",
        )
    for folder, record in list_engines(bundle):
        if record.key.target != target:
            continue
        reason = mismatch(record, bundle, target=target, compiler=compiler, gpu=str(gpu))
        if not reason:
            return folder, record
        reasons.append(f"{folder.name}: {reason}")
    found = "; ".join(reasons) or "there is none"
    raise MachineError(
        f"{bundle.path}: no {target} engine fits: {found}",
        f"Make one here with: {_command(bundle, target, gpu)}",
    )


def _command(bundle: Bundle, target: str, gpu: Gpu) -> str:
    """What compiles a bundle for a GPU that the target has kernels for."""
    generation = f" --sm {gpu.sm.removeprefix('sm_')}" if TARGETS[target].sms else ""
    return f"sdrt compile {bundle.path} --target {target}{generation}"


def _free_bytes() -> int | None:
    """Free memory of the current device, or None where the driver does not say."""
    from cuda.bindings import driver

    status, free, _ = driver.cuMemGetInfo()
    return int(free) if status == driver.CUresult.CUDA_SUCCESS else None
