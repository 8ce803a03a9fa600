"""What the pipeline needs of a backend: the Engine and Denoising protocols, and how a backend is chosen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import ENGINES, Bundle
from sdrt.engine_shapes import EngineShapes, JobShape
from sdrt.errors import MachineError, UsageError, nearest, one_of
from sdrt.machine.packages import install_command
from sdrt.runtime.cpu import CORES, check_threads
from sdrt.runtime.request_memory import Demand
from sdrt.runtime.samplers import Row

log = logging.getLogger("sdrt")

Float = NDArray[np.float32]
Pixels = NDArray[np.uint8]

BACKENDS = ("onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt-rtx", "tensorrt")
READY = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
ON_MISSING = ("compile", "fallback", "error")
"""What to do for a shape that no engine serves: compile it in memory where that takes seconds, which is on a CPU; run the bundle's graphs on ONNX Runtime; or
raise MissingEngineError, as `compile` does too for a GPU."""


@dataclass(frozen=True)
class Tables:
    """The step graph's tables, float32, S rows: timestep, q `[S]`; a, u `[S, R]`; w `[S, G]`; M `[S, R, R+2]`; inpaint `[S, 3]` (k, b, c)."""

    timestep: Float
    a: Float
    w: Float
    u: Float
    q: Float
    M: Float
    inpaint: Float


@dataclass(frozen=True)
class Job:
    """One batch of N pictures to denoise, all float32.

    noise `[S, N, 4, h, w]`; contexts: sets of `[G*N, T, C]`, branch-major, all of one shape; context_of_row: which of them each of the S
    rows takes; init and unit_noise `[N, 4, h, w]` (registers 0 and 1 at the start); mask `[N, 1, h, w]`, 1 keeps; concat `[G*N, C, h, w]`,
    what an inpainting model sees beside the latents, None for models that take none.
    """

    tables: Tables
    noise: Float
    contexts: tuple[Float, ...]
    context_of_row: tuple[int, ...]
    init: Float
    unit_noise: Float
    mask: Float
    concat: Float | None = None


class Denoising(Protocol):
    """One job on its way. Not thread-safe; the engine it came from is."""

    def step(self) -> None:
        """Run the next row of the tables."""

    def latents(self) -> Float:
        """Register 0 after the last row that ran, `[N, 4, h, w]`, copied to the host."""

    def denoised(self) -> Float:
        """The last row's denoised estimate, `[N, 4, h, w]`, copied to the host."""

    def decode(self, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        """Register 0 as pixels `[N, H, W, 3]`, and whether each picture was finite before the clamp `[N]`."""

    def close(self) -> None:
        """Give back what the job holds. Calling it twice is fine; nothing else may be called after it."""


class InParts:
    """A job whose parts run one after the other within each row, since no engine takes all its pictures at once. Pictures of a batch do not see each other,
    so they are the same."""

    def __init__(self, parts: Sequence[Denoising]) -> None:
        self._parts = parts

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def latents(self) -> Float:
        return np.concatenate([part.latents() for part in self._parts])

    def denoised(self) -> Float:
        return np.concatenate([part.denoised() for part in self._parts])

    def decode(self, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        pixels, finite = zip(*(part.decode(rounding) for part in self._parts), strict=True)
        return np.concatenate(pixels), np.concatenate(finite)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def part_of(job: Job, first: int, count: int) -> Job:
    """The job of some of its pictures: `count` of them from `first` on, or as many as there are."""
    pictures, branches = len(job.init), job.tables.w.shape[1]
    chosen = slice(first, min(first + count, pictures))
    by_branch = np.concatenate([np.arange(branch * pictures, (branch + 1) * pictures)[chosen] for branch in range(branches)])
    return replace(
        job,
        noise=job.noise[:, chosen],
        contexts=tuple(context[by_branch] for context in job.contexts),
        init=job.init[chosen],
        unit_noise=job.unit_noise[chosen],
        mask=job.mask[chosen],
        concat=None if job.concat is None else job.concat[by_branch],
    )


def shape_of(job: Job, factor: int) -> JobShape:
    """What a job asks of an engine; `factor` pixels a side per latent."""
    pictures, _, height, width = job.init.shape
    return JobShape((width * factor, height * factor), pictures, job.contexts[0].shape[1], job.tables.w.shape[1])


class Engine(Protocol):
    """The graphs of one bundle, ready to run. Thread-safe."""

    backend: str

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        """The batches that engines lie ready for."""

    def serves(self, shape: JobShape) -> bool:
        """Whether `denoise` takes a job of this shape, if need be in parts or compiled in memory first."""

    def demand(self, shape: JobShape) -> Demand:
        """About what memory a job of this shape takes at its peak beside what is loaded: of the machine, or of the GPU.

        Raises:
            MissingEngineError: no engine serves it.
        """

    def free_bytes(self, shape: JobShape) -> int | None:
        """How much of that memory a job of this shape may take; None where that is not known, or running out does no harm."""

    def encode_text(self, tokens: NDArray[np.int64], emphasis: Float, clip_skip: int) -> Float:
        """Token ids and weights `[n, 77]` to context `[n, 77, C]`."""

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        """Pixels `[N, H, W, 3]` and unit noise `[N, 4, h, w]` (zeros for the posterior's mean) to latents `[N, 4, h, w]`."""

    def denoise(self, job: Job) -> Denoising:
        """Start a job.

        Raises:
            MissingEngineError: no engine serves its shape.
        """

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        """Latents `[N, 4, h, w]` to pixels `[N, H, W, 3]` and whether each picture was finite before the clamp `[N]`."""

    def describe(self, job: Job | None = None) -> dict[str, Any]:
        """What runs: library and version, precision, threads or device; with a job what runs that, else what runs the bundle's own size."""


def tables(rows: Sequence[Row], guidance: Sequence[Sequence[float]]) -> Tables:
    """Rows as the graph takes them. `guidance` weighs the branches of the guidance batch for each row; each sums to 1."""

    def column(values: list[Any]) -> Float:
        return np.array(values, dtype=np.float32)

    return Tables(
        timestep=column([row.timestep for row in rows]),
        a=column([row.a for row in rows]),
        w=column(list(guidance)),
        u=column([row.u for row in rows]),
        q=column([row.q for row in rows]),
        M=column([row.M for row in rows]),
        inpaint=column([row.inpaint for row in rows]),
    )


def load_engine(bundle: Bundle, backend: str, threads: int | None = None, device: int = 0, *, on_missing: str = "error", cores: str = "own") -> Engine:
    """The engine of a backend by name, with one of `ON_MISSING` for shapes it does not serve, and one of `CORES`. What it took is in every result.

    `auto` takes the fastest engine the bundle holds: TensorRT's where a GPU answers, else OpenVINO's where it is installed, else ONNX Runtime,
    which needs none. One without an engine for what a request asks for by default is passed over, with a warning. A GPU's engine that does not
    fit this GPU, or a shape that no engine was compiled for, is an error with the command to compile it unless `on_missing` says otherwise,
    never a silent step down.

    Raises:
        UsageError: no backend or choice has this name, or there are more threads than cores.
        MachineError: it cannot run here.
    """
    one_of("on_missing", on_missing, ON_MISSING)
    shared = one_of("cores", cores, CORES) == "shared"
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: unknown{nearest(backend, ['auto', *BACKENDS])}", f"Choose one of: auto, {', '.join(READY)}.")
    if backend not in ("auto", *READY):
        raise MachineError(f"backend {backend}: not supported yet by this version of sdrt", f"Choose one of: auto, {', '.join(READY)}.")
    chosen = _best(bundle) if backend == "auto" else backend
    if chosen in ("onnxruntime", "openvino"):
        check_threads(threads)
    if chosen == "onnxruntime":
        return _onnxruntime(bundle, threads, shared)
    engine: Engine
    if chosen == "openvino":
        from sdrt.runtime.openvino import OpenVinoEngine

        engine = OpenVinoEngine(bundle, threads, compile_missing=on_missing == "compile", shared=shared)
    else:
        from sdrt.runtime.tensorrt import TensorRtEngine

        engine = TensorRtEngine(bundle, chosen, device)
    if on_missing != "fallback":
        return engine
    from sdrt.runtime.fallback import FallbackEngine

    return FallbackEngine(engine, lambda: _onnxruntime(bundle, threads, shared), bundle.manifest.latents.factor)


def _onnxruntime(bundle: Bundle, threads: int | None, shared: bool) -> Engine:
    from sdrt.runtime.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, threads, shared=shared)


def _best(bundle: Bundle) -> str:
    if not bundle.file(ENGINES).is_dir():
        return "onnxruntime"
    from sdrt.engine_cache import list_engines, serves_default

    engines = [record for _, record in list_engines(bundle)]
    targets = {record.key.target for record in engines if serves_default(record, bundle.manifest)}
    if others := sorted({record.key.target for record in engines} - targets):
        own = "x".join(map(str, bundle.manifest.latents.size))
        log.warning(
            "%s: has engines for %s, but none for its own size %s with guidance; --backend chooses them all the same", bundle.path, ", ".join(others), own
        )
    compiled = next((target for target in ("tensorrt", "tensorrt-rtx") if target in targets), None)
    if compiled is not None and gpu_count():
        return compiled
    if "openvino" not in targets:
        return "onnxruntime"
    if find_spec("openvino") is None:
        log.warning("%s: has OpenVINO engines, but openvino is not installed; ONNX Runtime runs it. %s", bundle.path, install_command("openvino"))
        return "onnxruntime"
    return "openvino"


def gpu_count() -> int:
    """CUDA devices that answer; 0 without a driver or without cuda-bindings."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return 0
    status, count = runtime.cudaGetDeviceCount()
    return int(count) if status == runtime.cudaError_t.cudaSuccess else 0
