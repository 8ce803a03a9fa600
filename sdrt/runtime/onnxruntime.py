"""The ONNX Runtime backend: the bundle's float32 graphs on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdrt import bundle as names
from sdrt.bundle import Bundle
from sdrt.errors import MachineError, ResourceError, SdrtError
from sdrt.runtime.engine import Float, Job, Pixels

if TYPE_CHECKING:
    import onnxruntime as ort

_PRECISION = "fp32"
_RUN_GRAPHS = (names.STEP, names.VAE_DECODER, names.TEXT_ENCODER)


class OnnxRuntimeEngine:
    """Thread-safe: ONNX Runtime sessions may run from several threads, and every job has its own bindings."""

    backend = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        ort = _import()
        self._ort = ort
        self._bundle, self._threads = bundle, threads
        self._lock = Lock()
        # Sessions load in parallel: folding and packing weights runs on one core each.
        with ThreadPoolExecutor(len(_RUN_GRAPHS)) as pool:
            sessions = pool.map(lambda graph: _session(ort, bundle, graph, threads), _RUN_GRAPHS)
            self._sessions = dict(zip(_RUN_GRAPHS, sessions, strict=True))

    def encode_text(self, tokens: NDArray[np.int64], emphasis: Float, clip_skip: int) -> Float:
        context: Float = self._run(names.TEXT_ENCODER, [names.context_output(clip_skip)], {"tokens": tokens, "emphasis": emphasis})[0]
        return context

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        with self._lock:  # most pictures start from text: the encoder is loaded when the first image comes
            if names.VAE_ENCODER not in self._sessions:
                self._sessions[names.VAE_ENCODER] = _session(self._ort, self._bundle, names.VAE_ENCODER, self._threads)
        latents: Float = self._run(names.VAE_ENCODER, list(names.ENCODER_OUTPUTS), {"pixels": pixels, "noise": noise})[0]
        return latents

    def denoise(self, job: Job) -> OnnxRuntimeDenoising:
        return OnnxRuntimeDenoising(self, self._ort, self._sessions[names.STEP], job)

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        inputs = {"latents": latents, "rounding": np.array([rounding], np.float32)}
        pixels, finite = self._run(names.VAE_DECODER, list(names.DECODER_OUTPUTS), inputs)
        return pixels, finite

    def describe(self) -> dict[str, Any]:
        return {"backend": self.backend, "version": self._ort.__version__, "device": "cpu", "compute": _PRECISION, "threads": self._threads}

    def _run(self, graph: str, outputs: list[str], inputs: dict[str, Any]) -> list[Any]:
        try:
            return list(self._sessions[graph].run(outputs, inputs))
        except Exception as error:
            raise _explained(self._ort, graph, error) from error


class OnnxRuntimeDenoising:
    """Two bindings in turn: what one row writes is what the next reads, so nothing is copied or allocated between rows."""

    def __init__(self, engine: OnnxRuntimeEngine, ort: Any, session: ort.InferenceSession, job: Job) -> None:
        self._engine = engine
        self._ort = ort
        self._session = session
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

    def step(self) -> None:
        current, before = (self._context_of_row[max(0, row)] for row in (self._rows, self._rows - 1))
        if current != before:
            for binding in self._bindings:
                binding.bind_ortvalue_input("context", self._contexts[current])
        try:
            self._session.run_with_iobinding(self._bindings[self._rows % 2])
        except Exception as error:
            raise _explained(self._ort, names.STEP, error) from error
        self._rows += 1

    def latents(self) -> Float:
        return np.array(self._registers[self._rows % 2].numpy()[0])

    def denoised(self) -> Float:
        return np.array(self._denoised.numpy())

    def decode(self, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self._engine.decode(self.latents(), rounding)

    def close(self) -> None:
        """Nothing to give back: the job's arrays go with it."""


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError(f"backend onnxruntime: cannot import onnxruntime: {error}", "Install it with: pip install 'sdrt[cpu]'") from error
    onnxruntime.set_default_logger_severity(3)
    _share_arena(onnxruntime)
    return onnxruntime


_arena_lock = Lock()
_arena_shared = False


def _share_arena(ort: Any) -> None:
    """One memory arena for all sessions of this process, made once: the decoder then reuses what the denoising step has let go of.

    With an arena each, a 512x512 picture of SD 1.5 peaks 1.3 GB higher. Only sessions that ask for it use it, so other users of
    ONNX Runtime in the process are not touched.
    """
    global _arena_shared
    with _arena_lock:
        if not _arena_shared:
            defaults = ort.OrtArenaCfg({"max_mem": 0, "arena_extend_strategy": -1, "initial_chunk_size_bytes": -1, "max_dead_bytes_per_chunk": -1})
            memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            ort.create_and_register_allocator(memory, defaults)
            _arena_shared = True


def _session(ort: Any, bundle: Bundle, graph: str, threads: int | None, precision: str = _PRECISION) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    path = bundle.graph(graph, precision)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _explained(ort, f"{path}", error) from error


def _explained(ort: Any, where: str, error: Exception) -> SdrtError:
    """An ONNX Runtime failure as one of ours; out of memory is told from the rest by its text, the only place it says so."""
    words = " ".join(str(error).split())
    text = words[:300]
    if isinstance(error, MemoryError) or "allocate memory" in words or "bad_alloc" in words or "bad allocation" in words:
        return ResourceError(f"{where}: out of memory: {text}", "Choose a smaller --size or --batch.")
    return MachineError(f"{where}: ONNX Runtime {ort.__version__} failed: {text}", "Run: sdrt verify BUNDLE")


def run_graph(bundle: Bundle, graph: str, precision: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run one graph once, optimised as in use, and return its outputs by name."""
    ort = _import()
    session = _session(ort, bundle, graph, None, precision)
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, inputs), strict=True))
