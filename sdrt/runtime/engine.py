"""What the pipeline needs of a backend: the Engine and Denoising protocols, and how a backend is chosen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import ENGINES, Bundle
from sdrt.errors import MachineError, UsageError, nearest
from sdrt.machine.packages import install_command
from sdrt.runtime.cpu import check_threads
from sdrt.runtime.samplers import Row

log = logging.getLogger("sdrt")

Float = NDArray[np.float32]
Pixels = NDArray[np.uint8]

BACKENDS = ("onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt-rtx", "tensorrt")
READY = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")


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


class Engine(Protocol):
    """The graphs of one bundle, ready to run. Thread-safe."""

    backend: str

    def encode_text(self, tokens: NDArray[np.int64], emphasis: Float, clip_skip: int) -> Float:
        """Token ids and weights `[n, 77]` to context `[n, 77, C]`."""

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        """Pixels `[N, H, W, 3]` and unit noise `[N, 4, h, w]` (zeros for the posterior's mean) to latents `[N, 4, h, w]`."""

    def denoise(self, job: Job) -> Denoising: ...

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


def load_engine(bundle: Bundle, backend: str, threads: int | None = None, device: int = 0) -> Engine:
    """The engine of a backend by name. What it took is in every result.

    `auto` takes the fastest engine the bundle holds: TensorRT's where a GPU answers, else OpenVINO's where it is installed, else ONNX Runtime,
    which needs none. A GPU's engine that does not fit this GPU, or a shape that no engine was compiled for, is an error with the command to
    compile it, never a silent step down.

    Raises:
        UsageError: no backend has this name, or there are more threads than cores.
        MachineError: it cannot run here.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"backend {backend!r}: unknown{nearest(backend, ['auto', *BACKENDS])}", f"Choose one of: auto, {', '.join(READY)}.")
    if backend not in ("auto", *READY):
        raise MachineError(f"backend {backend}: not supported yet by this version of sdrt", f"Choose one of: auto, {', '.join(READY)}.")
    chosen = _best(bundle) if backend == "auto" else backend
    if chosen in ("onnxruntime", "openvino"):
        check_threads(threads)
    if chosen == "onnxruntime":
        from sdrt.runtime.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, threads)
    if chosen == "openvino":
        from sdrt.runtime.openvino import OpenVinoEngine

        return OpenVinoEngine(bundle, threads)
    from sdrt.runtime.tensorrt import TensorRtEngine

    return TensorRtEngine(bundle, chosen, device)


def _best(bundle: Bundle) -> str:
    if not bundle.file(ENGINES).is_dir():
        return "onnxruntime"
    from sdrt.engine_cache import list_engines

    targets = {record.key.target for _, record in list_engines(bundle)}
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
