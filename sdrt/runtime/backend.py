"""Which backend runs a bundle: the one asked for by name, or for `auto` the fastest that can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec

from sdrt.bundle.folder import Bundle
from sdrt.bundle.manifest import ENGINES
from sdrt.engines.store import list_engines, serves_default
from sdrt.engines.targets import ONNXRUNTIME, OPENVINO, READY, TARGETS, TENSORRT, TENSORRT_RTX, on_gpu
from sdrt.errors import MachineError, UsageError, nearest, one_of
from sdrt.machine.cpu import CORES, check_threads
from sdrt.machine.gpus import probe_gpus
from sdrt.machine.packages import install_command
from sdrt.runtime.engine import Engine

log = logging.getLogger("sdrt")

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
    whole_picture: bool | None = None,
) -> Engine:
    """The engine of a backend by name, with one of `ON_MISSING` for shapes it does not serve, and one of `CORES`. What
    it took is in every result. `whole_picture` is as in `Pipeline.load`.

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
    if backend != "auto" and backend not in TARGETS:
        raise UsageError(
            f"backend {backend!r}: unknown{nearest(backend, ['auto', *TARGETS])}",
            f"Choose one of: auto, {', '.join(READY)}.",
        )
    if backend not in ("auto", *READY):
        raise MachineError(
            f"backend {backend}: not supported yet by this version of sdrt", f"Choose one of: auto, {', '.join(READY)}."
        )
    chosen = _best(bundle) if backend == "auto" else backend
    if not on_gpu(chosen):
        check_threads(threads)
    load: dict[str, Callable[[], Engine]] = {
        ONNXRUNTIME.name: lambda: _onnxruntime(bundle, threads, shared),
        OPENVINO.name: lambda: _openvino(bundle, threads, shared, on_missing == "compile"),
        TENSORRT_RTX.name: lambda: _tensorrt(bundle, chosen, device, whole_picture),
        TENSORRT.name: lambda: _tensorrt(bundle, chosen, device, whole_picture),
    }
    engine = load[chosen]()
    if on_missing != "fallback" or TARGETS[chosen].shapes == "any":
        return engine
    from sdrt.runtime.backends.fallback import FallbackEngine

    return FallbackEngine(engine, load[ONNXRUNTIME.name], bundle.manifest.latents.factor)


def _onnxruntime(bundle: Bundle, threads: int | None, shared: bool) -> Engine:
    from sdrt.runtime.backends.onnxruntime.engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, threads, shared=shared)


def _openvino(bundle: Bundle, threads: int | None, shared: bool, compile_missing: bool) -> Engine:
    from sdrt.runtime.backends.openvino.engine import OpenVinoEngine

    return OpenVinoEngine(bundle, threads, compile_missing=compile_missing, shared=shared)


def _tensorrt(bundle: Bundle, target: str, device: int, whole_picture: bool | None) -> Engine:
    from sdrt.runtime.backends.tensorrt.engine import TensorRtEngine

    return TensorRtEngine(bundle, target, device, whole_picture)


def _best(bundle: Bundle) -> str:
    if not bundle.file(ENGINES).is_dir():
        return ONNXRUNTIME.name
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
    compiled = next((target for target in (TENSORRT.name, TENSORRT_RTX.name) if target in targets), None)
    if compiled is not None and probe_gpus().found:
        return compiled
    if OPENVINO.name not in targets:
        return ONNXRUNTIME.name
    if find_spec(OPENVINO.module) is None:
        log.warning(
            "%s: has OpenVINO engines, but openvino is not installed; ONNX Runtime runs it. %s",
            bundle.path,
            install_command(OPENVINO.extra),
        )
        return ONNXRUNTIME.name
    return OPENVINO.name
