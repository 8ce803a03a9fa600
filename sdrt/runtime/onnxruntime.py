"""The ONNX Runtime backend: the bundle's float32 graphs on the CPU, as `sdrt compile` saved them where that fits this machine, else optimised now."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdrt import bundle as names
from sdrt.bundle import Bundle
from sdrt.engine_shapes import EngineShapes, JobShape, any_shapes
from sdrt.interruptible import interruptible
from sdrt.memory import available_bytes, rss_bytes
from sdrt.runtime.engine import Float, Job, Pixels, shape_of
from sdrt.runtime.onnxruntime_model import PRECISION, check_weights, end_run, explained, find_saved, import_onnxruntime, open_engine, open_graph, run_session
from sdrt.runtime.request_memory import Demand, onnxruntime_demand

if TYPE_CHECKING:
    import onnxruntime as ort

_RUN_GRAPHS = (names.STEP, names.VAE_DECODER, names.TEXT_ENCODER)


_kept = Demand(0, "")
"""The largest job that ran. All sessions of the process share what ONNX Runtime took for it and has not given back."""


def _keep(demand: Demand) -> None:
    global _kept
    _kept = max(_kept, demand, key=lambda one: one.size_bytes)


class OnnxRuntimeEngine:
    """Thread-safe: ONNX Runtime sessions may run from several threads, and every job has its own bindings."""

    backend = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int | None, *, shared: bool = False) -> None:
        """`shared` says that others keep the cores busy too."""
        self._ort = import_onnxruntime("backend onnxruntime")
        self._bundle, self._threads, self._shared = bundle, threads, shared
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

    def encode_text(self, tokens: NDArray[np.int64], emphasis: Float, clip_skip: int) -> Float:
        context: Float = self._run(names.TEXT_ENCODER, [names.context_output(clip_skip)], {"tokens": tokens, "emphasis": emphasis})[0]
        return context

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        with self._lock:  # most pictures start from text: the encoder is loaded when the first image comes
            if names.VAE_ENCODER not in self._sessions:
                self._sessions |= interruptible(lambda: self._load([names.VAE_ENCODER]))
        latents: Float = self._run(names.VAE_ENCODER, list(names.ENCODER_OUTPUTS), {"pixels": pixels, "noise": noise})[0]
        return latents

    def denoise(self, job: Job) -> OnnxRuntimeDenoising:
        try:
            return OnnxRuntimeDenoising(self, self._ort, self._sessions[names.STEP], job)
        except RuntimeError as error:  # the graph takes other inputs
            raise explained(self._ort, names.STEP, error) from error

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        inputs = {"latents": latents, "rounding": np.array([rounding], np.float32)}
        pixels, finite = self._run(names.VAE_DECODER, list(names.DECODER_OUTPUTS), inputs)
        return pixels, finite

    def shape_of(self, job: Job) -> JobShape:
        return shape_of(job, self._bundle.manifest.latents.factor)

    def describe(self, job: Job | None = None) -> dict[str, Any]:
        saved = {} if self._saved is None else {"engine": self._saved[0].name}
        return {"backend": self.backend, "version": self._ort.__version__, "device": "cpu", "compute": PRECISION, "threads": self._threads, **saved}

    def open(self, graph: str, profile: Path | None = None) -> ort.InferenceSession:
        """One more session of a graph, from where this engine's own come; with ONNX Runtime's profiler on where `profile` says how its files begin."""
        if self._saved is None:
            return open_graph(self._ort, self._bundle.graph(graph, PRECISION), self._threads, profile=profile, shared=self._shared)
        return open_engine(self._ort, self._saved, graph, self._threads, profile=profile, shared=self._shared)

    def _load(self, graphs: Sequence[str]) -> dict[str, ort.InferenceSession]:
        """Sessions load in parallel: folding and packing weights runs on one core each. The weights of saved models are hashed beside that; data alone
        cannot harm, and is used after the check."""
        with ThreadPoolExecutor(2 * len(graphs)) as pool:
            checks = [] if self._saved is None else [pool.submit(check_weights, self._saved, graph) for graph in graphs]
            try:
                return dict(zip(graphs, pool.map(self.open, graphs), strict=True))
            finally:
                for check in checks:
                    check.result()

    def _run(self, graph: str, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        return run_session(self._ort, self._sessions[graph], graph, outputs, inputs)


class OnnxRuntimeDenoising:
    """Two bindings in turn: what one row writes is what the next reads, so nothing is copied or allocated between rows."""

    def __init__(self, engine: OnnxRuntimeEngine, ort: Any, session: ort.InferenceSession, job: Job) -> None:
        self._engine = engine
        self._ort = ort
        self._session = session
        self._shape = engine.shape_of(job)
        registers = np.zeros((names.REGISTERS, *job.init.shape), np.float32)
        registers[0], registers[1] = job.init, job.unit_noise
        tables = job.tables
        constant = {
            "timestep": tables.timestep, "a": tables.a, "w": tables.w, "u": tables.u, "q": tables.q, "M": tables.M, "inpaint": tables.inpaint,
            "noise": job.noise, "mask": job.mask, "init": job.init, "init_noise": job.unit_noise,
        }  # fmt: skip

        def on_host(array: Any) -> Any:
            return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

        if job.concat is not None:
            constant["concat"] = job.concat
        inputs = {name: on_host(array) for name, array in constant.items()}
        self._contexts = [on_host(context) for context in job.contexts]
        self._context_of_row = job.context_of_row
        self._registers = [on_host(registers), on_host(np.zeros_like(registers))]
        self._denoised = on_host(np.zeros_like(job.init))
        row = [on_host(np.zeros(1, np.int64)), on_host(np.zeros(1, np.int64))]
        self._bindings = []
        for here, there in ((0, 1), (1, 0)):
            binding = session.io_binding()
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_input("context", self._contexts[job.context_of_row[0]])
            binding.bind_ortvalue_input("registers", self._registers[here])
            binding.bind_ortvalue_input("row", row[here])
            for name, value in zip(names.STEP_OUTPUTS, (self._registers[there], row[there], self._denoised), strict=True):
                binding.bind_ortvalue_output(name, value)
            self._bindings.append(binding)
        self._rows = 0
        self._options = ort.RunOptions()

    def step(self) -> None:
        current, before = (self._context_of_row[max(0, row)] for row in (self._rows, self._rows - 1))
        if current != before:
            for binding in self._bindings:
                binding.bind_ortvalue_input("context", self._contexts[current])
        try:
            binding = self._bindings[self._rows % 2]
            interruptible(lambda: self._session.run_with_iobinding(binding, self._options), lambda: end_run(self._options))
        except Exception as error:
            raise explained(self._ort, names.STEP, error) from error
        self._rows += 1

    def latents(self) -> Float:
        return np.array(self._registers[self._rows % 2].numpy()[0])

    def denoised(self) -> Float:
        return np.array(self._denoised.numpy())

    def decode(self, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self._engine.decode(self.latents(), rounding)

    def close(self) -> None:
        """Nothing to give back: the job's arrays go with it, and what ONNX Runtime took it keeps for the next job."""
        if self._rows:
            _keep(self._engine.demand(self._shape))
