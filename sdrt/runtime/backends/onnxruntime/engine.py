"""The ONNX Runtime backend: the bundle's float32 graphs on the CPU, as `sdrt compile` saved them where that fits this
machine, else optimised now.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import (
    STEP,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Signature,
    dimensions,
    signatures,
    text_outputs,
)
from sdrt.engines.shapes import EngineShapes, JobShape, any_shapes
from sdrt.machine.interruptible import interruptible
from sdrt.machine.memory import available_bytes, rss_bytes
from sdrt.runtime.backends.onnxruntime.model import (
    PRECISION,
    TARGET,
    check_weights,
    end_run,
    explained,
    find_saved,
    import_onnxruntime,
    open_engine,
    open_graph,
    run_session,
)
from sdrt.runtime.engine import BatchShape, Float, Pixels, context_and_pooled, job_shape
from sdrt.runtime.request_memory import Demand, onnxruntime_demand
from sdrt.runtime.running_batch import HostMemory, Slots, step_sizes

if TYPE_CHECKING:
    import onnxruntime as ort

ROWS = 128
"""Table rows of a slot: a picture of more model calls is given more on the way."""
_RUN_GRAPHS = (STEP, VAE_DECODER, TEXT_ENCODER)


_kept = Demand(0, "")
"""The largest batch that ran. All sessions of the process share what ONNX Runtime took for it and has not given back.
"""


def _keep(demand: Demand) -> None:
    global _kept
    _kept = max(_kept, demand, key=lambda one: one.size_bytes)


class OnnxRuntimeEngine:
    """Thread-safe: ONNX Runtime sessions may run from several threads, and every running batch has its own bindings."""

    backend = TARGET

    def __init__(self, bundle: Bundle, threads: int | None, *, shared: bool = False) -> None:
        """`shared` says that others keep the cores busy too."""
        self._ort = import_onnxruntime("backend onnxruntime")
        self._bundle, self._threads, self._shared = bundle, threads, shared
        self._signatures = signatures(dimensions(bundle.manifest))
        self._lock = Lock()
        self._saved = find_saved(bundle, self._ort.__version__)
        self._sessions = interruptible(lambda: self._load(_RUN_GRAPHS))

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        return (any_shapes(self._bundle.manifest),)

    def serves(self, shape: JobShape) -> bool:
        return True

    def demand(self, shape: JobShape) -> Demand:
        return onnxruntime_demand(self._bundle.manifest, shape)

    def free_bytes(self, shape: JobShape) -> int | None:
        available = available_bytes()
        return None if available is None else available + min(_kept.size_bytes, rss_bytes() or 0)

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        signature = self._signatures[TEXT_ENCODER]
        inputs = dict(zip(signature.inputs, tokens, strict=True))
        return context_and_pooled(self._run(TEXT_ENCODER, [*text_outputs(signature, clip_skip)], inputs))

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        with self._lock:  # most pictures start from text: the encoder is loaded when the first image comes
            if VAE_ENCODER not in self._sessions:
                self._sessions |= interruptible(lambda: self._load([VAE_ENCODER]))
        latents: Float = self._run(VAE_ENCODER, ["latents"], {"pixels": pixels, "noise": noise})[0]
        return latents

    def open(self, shape: BatchShape, capacity: int) -> Slots:
        signature = self._signatures[STEP]
        try:
            memory = _StepMemory(self, self._ort, self._sessions[STEP], signature, shape, capacity)
        except RuntimeError as error:  # the graph takes other inputs
            raise explained(self._ort, STEP, error) from error
        return Slots(memory, signature, shape, capacity, ROWS)

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        inputs = {"latents": latents, "rounding": np.array([rounding], np.float32)}
        pixels, finite = self._run(VAE_DECODER, ["pixels", "finite"], inputs)
        return pixels, finite

    def keep(self, shape: BatchShape, capacity: int) -> None:
        """Note that ONNX Runtime has taken what such a batch needs."""
        _keep(self.demand(job_shape(shape, capacity, self._bundle.manifest.latents.factor)))

    def describe(self) -> dict[str, Any]:
        saved = {} if self._saved is None else {"engine": self._saved[0].name}
        return {
            "backend": self.backend,
            "version": self._ort.__version__,
            "device": "cpu",
            "compute": PRECISION,
            "threads": self._threads,
            **saved,
        }

    def session(self, graph: str, profile: Path | None = None) -> ort.InferenceSession:
        """One more session of a graph, from where this engine's own come; with ONNX Runtime's profiler on where
        `profile` says how its files begin.
        """
        if self._saved is None:
            return open_graph(
                self._ort, self._bundle.graph(graph, PRECISION), self._threads, profile=profile, shared=self._shared
            )
        return open_engine(self._ort, self._saved, graph, self._threads, profile=profile, shared=self._shared)

    def _load(self, graphs: Sequence[str]) -> dict[str, ort.InferenceSession]:
        """Sessions load in parallel: folding and packing weights runs on one core each. The weights of saved models are
        hashed beside that; data alone cannot harm, and is used after the check.
        """
        with ThreadPoolExecutor(2 * len(graphs)) as pool:
            checks = [] if self._saved is None else [pool.submit(check_weights, self._saved, graph) for graph in graphs]
            try:
                return dict(zip(graphs, pool.map(self.session, graphs), strict=True))
            finally:
                for check in checks:
                    check.result()

    def _run(self, graph: str, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        return run_session(self._ort, self._sessions[graph], graph, outputs, inputs)


class _StepMemory(HostMemory):
    """Two bindings in turn: what one call writes is what the next reads, so nothing is copied or allocated between
    calls.
    """

    def __init__(
        self,
        engine: OnnxRuntimeEngine,
        ort: Any,
        session: ort.InferenceSession,
        signature: Signature,
        shape: BatchShape,
        capacity: int,
    ) -> None:
        super().__init__(signature, step_sizes(shape, capacity, ROWS))
        self._shape, self._capacity = shape, capacity
        self._engine, self._ort, self._session = engine, ort, session
        self._bindings = []
        for side in (0, 1):
            binding = session.io_binding()
            read, written = self.bound(side)
            for arrays, bind in ((read, binding.bind_ortvalue_input), (written, binding.bind_ortvalue_output)):
                for name, array in arrays.items():
                    bind(name, ort.OrtValue.ortvalue_from_numpy(array))  # on a CPU it shares the array's memory
            self._bindings.append(binding)
        self._options = ort.RunOptions()

    def call(self) -> None:
        try:
            binding = self._bindings[self.calls % 2]
            interruptible(
                lambda: self._session.run_with_iobinding(binding, self._options), lambda: end_run(self._options)
            )
        except Exception as error:
            raise explained(self._ort, STEP, error) from error
        self.calls += 1

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self._engine.decode(self.latents(slots), rounding)

    def describe(self) -> dict[str, Any]:
        return self._engine.describe()

    def close(self) -> None:
        """Nothing to give back: the arrays go with it, and what ONNX Runtime took it keeps for the next batch."""
        if self.calls:
            self._engine.keep(self._shape, self._capacity)
