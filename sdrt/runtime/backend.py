"""Which backend runs a bundle: the one asked for by name, or for `auto` the fastest that can."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from sdrt.bundle.folder import Bundle
from sdrt.bundle.manifest import ENGINES
from sdrt.engines.store import list_engines, serves_default
from sdrt.errors import MachineError, UsageError, nearest, one_of
from sdrt.machine.cpu import CORES, check_threads
from sdrt.machine.packages import install_command
from sdrt.runtime.engine import Engine

log = logging.getLogger("sdrt")

BACKENDS = ("onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt-rtx", "tensorrt")
READY = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
ON_MISSING = ("compile", "fallback", "error")
"""What to do for a shape that no engine serves: compile it in memory where that takes seconds, which is on a CPU; run
the bundle's graphs on ONNX Runtime; or raise MissingEngineError, as `compile` does too for a GPU.
"""


def load_engine(
    bundle: Bundle,
    backend: str,
    threads: int | None = None,
    device: int = 0,
    *,
    on_missing: str = "error",
    cores: str = "own",
) -> Engine:
    """The engine of a backend by name, with one of `ON_MISSING` for shapes it does not serve, and one of `CORES`. What
    it took is in every result.

    `auto` takes the fastest engine the bundle holds: TensorRT's where a GPU answers, else OpenVINO's where it is
    installed, else ONNX Runtime, which needs none. One without an engine for what a request asks for by default is
    passed over, with a warning. A GPU's engine that does not fit this GPU, or a shape that no engine was compiled for,
    is an error with the command to compile it unless `on_missing` says otherwise, never a silent step down.

    Raises:
        UsageError: no backend or choice has this name, or there are more threads than cores.
        MachineError: it cannot run here.
    """
    one_of("on_missing", on_missing, ON_MISSING)
    shared = one_of("cores", cores, CORES) == "shared"
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(
            f"backend {backend!r}: unknown{nearest(backend, ['auto', *BACKENDS])}",
            f"Choose one of: auto, {', '.join(READY)}.",
        )
    if backend not in ("auto", *READY):
        raise MachineError(
            f"backend {backend}: not supported yet by this version of sdrt", f"Choose one of: auto, {', '.join(READY)}."
        )
    chosen = _best(bundle) if backend == "auto" else backend
    if chosen in ("onnxruntime", "openvino"):
        check_threads(threads)
    if chosen == "onnxruntime":
        return _onnxruntime(bundle, threads, shared)
    engine: Engine
    if chosen == "openvino":
        from sdrt.runtime.backends.openvino.engine import OpenVinoEngine

        engine = OpenVinoEngine(bundle, threads, compile_missing=on_missing == "compile", shared=shared)
    else:
        from sdrt.runtime.backends.tensorrt.engine import TensorRtEngine

        engine = TensorRtEngine(bundle, chosen, device)
    if on_missing != "fallback":
        return engine
    from sdrt.runtime.backends.fallback import FallbackEngine

    return FallbackEngine(engine, lambda: _onnxruntime(bundle, threads, shared), bundle.manifest.latents.factor)


def _onnxruntime(bundle: Bundle, threads: int | None, shared: bool) -> Engine:
    from sdrt.runtime.backends.onnxruntime.engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, threads, shared=shared)


def _best(bundle: Bundle) -> str:
    if not bundle.file(ENGINES).is_dir():
        return "onnxruntime"
    engines = [record for _, record in list_engines(bundle)]
    targets = {record.key.target for record in engines if serves_default(record, bundle.manifest)}
    if others := sorted({record.key.target for record in engines} - targets):
        own = "x".join(map(str, bundle.manifest.latents.size))
        log.warning(
            "%s: has engines for %s, but none for its own size %s with guidance; --backend chooses them all the same",
            bundle.path,
            ", ".join(others),
            own,
        )
    compiled = next((target for target in ("tensorrt", "tensorrt-rtx") if target in targets), None)
    if compiled is not None and gpu_count():
        return compiled
    if "openvino" not in targets:
        return "onnxruntime"
    if find_spec("openvino") is None:
        log.warning(
            "%s: has OpenVINO engines, but openvino is not installed; ONNX Runtime runs it. %s",
            bundle.path,
            install_command("openvino"),
        )
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
