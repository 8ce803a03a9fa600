"""Which backend runs a bundle: the one asked for by name, or for `auto` the fastest that can."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from sdrt.bundle.folder import Bundle
from sdrt.bundle.manifest import ENGINES
from sdrt.engines.store import list_engines, serves_default
from sdrt.engines.targets import ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TARGETS, TENSORRT, TENSORRT_RTX, on_gpu
from sdrt.errors import UsageError, nearest, one_of
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

    `auto` takes the fastest that can run here: TensorRT's engine where the bundle has one and a GPU answers, else ONNX
    Runtime's CUDA provider where that runs a model, else OpenVINO's engine where that is installed, else ONNX Runtime,
    which needs none. A bundle without an engine for what a request asks for by default is told in a warning. A GPU's
    engine that does not fit this GPU, or a shape that no engine was compiled for, is an error with the command to
    compile it unless `on_missing` says otherwise, never a silent step down.

    Raises:
        UsageError: no backend or choice has this name, or there are more threads than cores.
        MachineError: it cannot run here.
    """
    one_of("on_missing", on_missing, ON_MISSING)
    shared = one_of("cores", cores, CORES) == "shared"
    check_backend(backend)
    chosen = _best(bundle) if backend == "auto" else backend
    if not on_gpu(chosen):
        check_threads(threads)
    load: dict[str, Callable[[], Engine]] = {
        ONNXRUNTIME.name: lambda: _onnxruntime(bundle, threads, shared),
        ONNXRUNTIME_CUDA.name: lambda: _onnxruntime_cuda(bundle, device),
        OPENVINO.name: lambda: _openvino(bundle, threads, shared, on_missing == "compile"),
        TENSORRT_RTX.name: lambda: _tensorrt(bundle, chosen, device, whole_picture),
        TENSORRT.name: lambda: _tensorrt(bundle, chosen, device, whole_picture),
    }
    engine = load[chosen]()
    if on_missing != "fallback" or TARGETS[chosen].shapes == "any":
        return engine
    from sdrt.runtime.backends.fallback import FallbackEngine

    return FallbackEngine(engine, load[ONNXRUNTIME.name], bundle.manifest.latents.factor)


def check_backend(name: str) -> None:
    """Check that a backend is known, whether or not it can run here.

    Raises:
        UsageError: no backend has this name.
    """
    if name != "auto" and name not in TARGETS:
        raise UsageError(
            f"backend {name!r}: unknown{nearest(name, ['auto', *TARGETS])}",
            f"Choose one of: auto, {', '.join(TARGETS)}.",
        )


def _onnxruntime(bundle: Bundle, threads: int | None, shared: bool) -> Engine:
    from sdrt.runtime.backends.onnxruntime.engine import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, threads, shared=shared)


def _onnxruntime_cuda(bundle: Bundle, device: int) -> Engine:
    from sdrt.runtime.backends.onnxruntime_cuda.engine import OnnxRuntimeCudaEngine

    return OnnxRuntimeCudaEngine(bundle, device)


def _openvino(bundle: Bundle, threads: int | None, shared: bool, compile_missing: bool) -> Engine:
    from sdrt.runtime.backends.openvino.engine import OpenVinoEngine

    return OpenVinoEngine(bundle, threads, compile_missing=compile_missing, shared=shared)


def _tensorrt(bundle: Bundle, target: str, device: int, whole_picture: bool | None) -> Engine:
    from sdrt.runtime.backends.tensorrt.engine import TensorRtEngine

    return TensorRtEngine(bundle, target, device, whole_picture)


def _best(bundle: Bundle) -> str:
    targets = _compiled_targets(bundle) if bundle.file(ENGINES).is_dir() else set()
    compiled = next((target for target in (TENSORRT.name, TENSORRT_RTX.name) if target in targets), None)
    if compiled is not None and probe_gpus().found:
        return compiled
    if _cuda_provider_runs():
        return ONNXRUNTIME_CUDA.name
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


def _compiled_targets(bundle: Bundle) -> set[str]:
    """The targets that a bundle has an engine for, for what a request asks for by default."""
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
    return targets


def _cuda_provider_runs() -> bool:
    """Whether ONNX Runtime's CUDA provider runs a model here. Where it is installed and a GPU answers, but it does not,
    a warning says why.
    """
    if not _has_cuda_provider():
        return False
    from sdrt.machine import doctor  # a tenth of a second that most machines need not spend

    gpus = probe_gpus()
    if not gpus.found:
        return False
    found = doctor.probe_onnxruntime_cuda(gpus)
    if found.state != doctor.WORKS:
        log.warning("%s: a GPU answers, but it does not run: %s. %s", found.name, found.detail, found.fix)
    return found.state == doctor.WORKS


def _has_cuda_provider() -> bool:
    """Whether the installed ONNX Runtime comes with the CUDA provider's library."""
    found = find_spec(ONNXRUNTIME_CUDA.module)
    folders = (found and found.submodule_search_locations) or ()
    return any(True for folder in folders for _ in Path(folder, "capi").glob("*onnxruntime_providers_cuda*"))
