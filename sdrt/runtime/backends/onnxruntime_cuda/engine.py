"""The backend of ONNX Runtime's CUDA provider: the bundle's graphs on a GPU, each component in its own precision, with
nothing compiled before.

A running batch has its buffers on the device, bound once. Two bindings take turns: what one call writes is what the
next reads, so the host copies nothing between two calls. Each binding has its own captured graph. ONNX Runtime captures
in the first run of a binding, which it makes several times over; that changes nothing, since a call writes no input of
its own.

This code has not run on a GPU yet; tests run it with the CPU in the GPU's place.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import (
    FED_BACK,
    OF_TEXT,
    STEP,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    dimensions,
    signatures,
    text_outputs,
)
from sdrt.bundle.manifest import UNET
from sdrt.engines.shapes import EngineShapes, JobShape, any_shapes
from sdrt.engines.store import arithmetic, state_bytes
from sdrt.errors import UsageError
from sdrt.runtime.backends.onnxruntime_cuda import model
from sdrt.runtime.backends.onnxruntime_cuda.model import GRAPH_ID, PLAIN, TARGET, WHO, failed, on_device, out_of_memory
from sdrt.runtime.engine import BatchShape, Float, Pixels, Watched, context_and_pooled
from sdrt.runtime.request_memory import Demand
from sdrt.runtime.running_batch import HostMemory, Part, Slots, step_sizes

if TYPE_CHECKING:
    import onnxruntime as ort

log = logging.getLogger("sdrt")

ROWS = 128
"""Table rows of a slot: a picture of more model calls is given more on the way."""
_LOADED = (STEP, VAE_DECODER, TEXT_ENCODER)
_IDLE_STEPS = 4
_MOST_GRAPHS = 64
"""Captured graphs of a session. It gives none back while it lives, so batches of ever new shapes run without in the
end.
"""


class OnnxRuntimeCudaEngine:
    """Thread-safe: everything of the device runs in one thread."""

    backend = TARGET

    def __init__(self, bundle: Bundle, device: int) -> None:
        self.library, self._gpu = model.import_with_gpu(device)
        self._bundle, self._device = bundle, device
        self.signatures = signatures(dimensions(bundle.manifest))
        self.watched = Watched()
        self.graphs_disabled = False
        self._precisions = _precisions(bundle)
        self._numbers = count(1)
        self._idle: deque[_Step] = deque()
        self._sessions = on_device(lambda: {graph: self._open(graph) for graph in _LOADED})

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        return (any_shapes(self._bundle.manifest),)

    def serves(self, shape: JobShape) -> bool:
        return True

    def demand(self, shape: JobShape) -> Demand:
        needed = state_bytes(
            self._bundle.manifest,
            size=shape.size,
            batch=shape.batch,
            tokens=shape.tokens,
            rows=ROWS,
            branches=shape.branches,
        )
        return Demand(needed, f"state {needed:,} bytes")

    def free_bytes(self, shape: JobShape) -> int | None:
        return None  # a job that finds no room raises ResourceError, and no system ends the process

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        signature = self.signatures[TEXT_ENCODER]
        inputs = dict(zip(signature.inputs, tokens, strict=True))
        return context_and_pooled(self._run(TEXT_ENCODER, [*text_outputs(signature, clip_skip)], inputs))

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        made = [
            self._run(VAE_ENCODER, ["latents"], {"pixels": pixels[i : i + 1], "noise": noise[i : i + 1]})[0]
            for i in range(len(pixels))  # one picture at a time: a batch of them takes the most memory of all
        ]
        latents: Float = np.concatenate(made)
        return latents

    def open(self, shape: BatchShape, capacity: int) -> Slots:
        step = on_device(lambda: self._take_step(shape, capacity))
        return Slots(CudaMemory(self, step), self.signatures[STEP], shape, capacity, ROWS)

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        made = [
            self._run(
                VAE_DECODER,
                ["pixels", "finite"],
                {"latents": latents[i : i + 1], "rounding": np.array([rounding], np.float32)},
            )
            for i in range(len(latents))
        ]
        pixels, finite = zip(*made, strict=True)
        return np.concatenate(pixels), np.concatenate(finite)

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "version": self.library.__version__,
            "device": self._gpu.name,
            "compute": self._precisions[STEP],
            "cuda_graphs": not self.graphs_disabled,
        }

    def launch(self, step: _Step, side: int) -> None:
        """Start one model call and wait for it. On the device's thread."""
        self.watched.count("launches")
        number = PLAIN if self.graphs_disabled else step.numbers[side]
        session = self._sessions[STEP]
        try:
            try:
                session.run_with_iobinding(step.bindings[side], self._options(number))
            except Exception as error:
                if number == PLAIN or side in step.captured or out_of_memory(error):
                    raise
                session.run_with_iobinding(step.bindings[side], self._options(PLAIN))  # else it was not the capture
                self.graphs_disabled = True
                why = " ".join(str(error).split())[:200]
                log.warning("%s: CUDA graphs are off: capturing failed: %s", WHO, why)
        except Exception as error:
            raise failed(self.library, STEP, error) from error
        step.captured.add(side)

    def give_back(self, step: _Step) -> None:
        """Keep a step that no batch uses any more for the next one of its shape. Touches nothing of the device."""
        self._idle.append(step)

    def _take_step(self, shape: BatchShape, capacity: int) -> _Step:
        """A step of this shape and capacity: an idle one or a new one."""
        found = None
        for _ in range(len(self._idle)):  # a whole turn, which keeps the order; another thread may append meanwhile
            step = self._idle.popleft()
            if found is None and (step.shape, step.capacity) == (shape, capacity):
                found = step
            else:
                self._idle.append(step)
        while len(self._idle) > _IDLE_STEPS - 1:
            self._idle.popleft()
        if found is not None:
            return found
        try:
            return self._new_step(shape, capacity)
        except Exception as error:
            if not self._idle or not out_of_memory(error):
                raise
        self._idle.clear()
        return self._new_step(shape, capacity)

    def _new_step(self, shape: BatchShape, capacity: int) -> _Step:
        first = next(self._numbers)
        numbers = (2 * first - 1, 2 * first) if 2 * first <= _MOST_GRAPHS else (PLAIN, PLAIN)
        try:
            return _Step(self, self._sessions[STEP], shape, capacity, numbers, self._device)
        except Exception as error:
            raise failed(self.library, STEP, error) from error

    def _options(self, number: int) -> ort.RunOptions:
        options: ort.RunOptions = self.library.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(number))
        return options

    def _open(self, graph: str) -> ort.InferenceSession:
        return model.open_session(self.library, self._bundle.graph(graph, self._precisions[graph]), self._device)

    def _run(self, graph: str, outputs: list[str], inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
        """Run a graph once on arrays of the host."""

        def run() -> list[Any]:
            if graph not in self._sessions:  # most pictures start from text: the encoder waits for the first image
                self._sessions[graph] = self._open(graph)
            for what, times in (("h2d", len(inputs)), ("launches", 1), ("d2h", len(outputs))):
                for _ in range(times):
                    self.watched.count(what)
            try:
                return list(self._sessions[graph].run(outputs, dict(inputs), self._options(PLAIN)))
            except Exception as error:
                raise failed(self.library, graph, error) from error

        return on_device(run)


class _Step:
    """The buffers of a running batch, and their bindings.

    `host` is the twin on the host, and knows which side of the fed-back inputs the next call reads. `numbers` are those
    of the captured graphs, one for each side; `captured` are the sides that have run.
    """

    def __init__(
        self,
        engine: OnnxRuntimeCudaEngine,
        session: ort.InferenceSession,
        shape: BatchShape,
        capacity: int,
        numbers: tuple[int, int],
        device: int,
    ) -> None:
        self.shape, self.capacity, self.numbers = shape, capacity, numbers
        self.captured: set[int] = set()
        self.host = HostMemory(engine.signatures[STEP], step_sizes(shape, capacity, ROWS))
        self._watched = engine.watched
        self._values: dict[int, ort.OrtValue] = {}
        for arrays in (self.host.inputs, self.host.outputs, *self.host.fed_back):
            for array in arrays.values():
                self._watched.count("allocations")
                self._values[id(array)] = engine.library.OrtValue.ortvalue_from_shape_and_type(
                    list(array.shape), array.dtype.type, model.DEVICE, device
                )
                self.write(array)  # zeros: what memory held before could be no number
        self.bindings = [session.io_binding() for _ in range(2)]
        for side, binding in enumerate(self.bindings):
            read, written = self.host.bound(side)
            for name, array in read.items():
                binding.bind_ortvalue_input(name, self._values[id(array)])
            for name, array in written.items():
                binding.bind_ortvalue_output(name, self._values[id(array)])

    def write(self, array: NDArray[Any]) -> None:
        """Copy an array of the host's twin to the device."""
        self._watched.count("h2d")
        self._values[id(array)].update_inplace(array)

    def read(self, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of what the device has for an array of the host's twin."""
        self._watched.count("d2h")
        return np.array(self._values[id(array)].numpy())


class CudaMemory:
    """`StepMemory` on a GPU. `close` gives its buffers back; leaving that to the garbage collector works too."""

    def __init__(self, engine: OnnxRuntimeCudaEngine, step: _Step) -> None:
        self._engine = engine
        self._step: _Step | None = step

    def host(self, name: str) -> NDArray[Any]:
        return self._open().host.host(name)

    def together(self, calls: int) -> None:
        """Nothing waits: a call is a launch of its own."""

    def upload(self, parts: Sequence[Part]) -> None:
        step = self._open()
        on_device(lambda: self._upload(step, parts))

    def _upload(self, step: _Step, parts: Sequence[Part]) -> None:
        """One copy an input: ONNX Runtime copies whole tensors. What other slots have fed back is on the device alone,
        and is fetched first.
        """
        try:
            for name in dict.fromkeys(name for name, _, _ in parts):
                array = step.host.host(name)
                if name in FED_BACK:
                    written = np.zeros(len(array), np.bool_)
                    for _, first, end in (part for part in parts if part[0] == name):
                        written[first:end] = True
                    if not written.all():
                        array[~written] = step.read(array)[~written]
                step.write(array)
        except Exception as error:
            raise failed(self._engine.library, STEP, error) from error

    def ready(self) -> None:
        """Always ready: a copy or a call has ended when it returns."""
        self._open()

    def hold_contexts(self, slot: int, contexts: Sequence[Mapping[str, Float]]) -> None:
        self._open().host.hold_contexts(slot, contexts)

    def change_context(self, slot: int, index: int) -> None:
        step = self._open()
        step.host.change_context(slot, index)
        self.upload([(name, slot, slot + 1) for name in OF_TEXT if name in step.host.inputs])

    def call(self) -> None:
        step = self._open()
        on_device(lambda: self._engine.launch(step, step.host.calls % 2))
        step.host.calls += 1

    def latents(self, slots: Sequence[int]) -> Float:
        registers = self._read(self.host("registers"))
        return registers[list(slots), 0]

    def denoised(self, slots: Sequence[int]) -> Float:
        return self._read(self._open().host.outputs["denoised"])[list(slots)]

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self._engine.decode(self.latents(slots), rounding)

    def describe(self) -> dict[str, Any]:
        return self._engine.describe()

    def close(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            self._engine.give_back(step)

    def _read(self, array: NDArray[Any]) -> NDArray[Any]:
        step = self._open()
        return on_device(lambda: step.read(array))

    def _open(self) -> _Step:
        if self._step is None:
            raise UsageError("step: passed already", "Read a step before asking the stream for the next one.")
        return self._step


def _precisions(bundle: Bundle) -> dict[str, str]:
    """The precision of each graph: its component's own where the bundle has such a graph, else float32."""
    manifest = bundle.manifest
    own = arithmetic(manifest, TARGET, manifest.components[UNET].compute)
    return {graph: own[graph] if own[graph] in graphs else "fp32" for graph, graphs in manifest.graphs.items()}
