"""What runs on this machine: each backend works, is missing or does not match, and the command that mends it.

Every probe is alone: one that fails says so and leaves the others be. Nothing is taken on trust: ONNX Runtime names
providers that cannot run, so a one-node model is run through each. What a probe needs is imported when it runs.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
from io import StringIO
from pathlib import Path
from typing import Any

from sdrt.engines.targets import ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TARGETS, TENSORRT, TENSORRT_RTX
from sdrt.machine import engine_libraries
from sdrt.machine.cpu import platform_name
from sdrt.machine.gpus import Gpus, probe_gpus
from sdrt.machine.packages import NEW_DRIVER, install_command

WORKS, MISSING, MISMATCHED = "works", "missing", "mismatched"
CUDA_PACKAGE = "onnxruntime-gpu"
"""The one package of ONNX Runtime that brings its CUDA provider."""
_FATAL = 4
_LIBRARY = re.compile(r"(?:lib)?[\w.+-]+\.(?:so(?:\.\d+)*|dll|dylib)")
_OF_CUDA = re.compile(r"-cu(\d+)$")
_CUDA_LIBRARY = re.compile(rb"lib(?:cublasLt|cublas|cudnn|cufft|curand|cudart|nvrtc)\.so\.\d+")

# y = x, for x float32 [1]: the smallest model, in ONNX's own encoding.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01g'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)

# y = x convolved with itself, for x float32 [1, 1, 1, 1].
_CONVOLUTION = (
    b'\x08\x08:N\n\x0f\n\x01x\n\x01x\x12\x01y"\x04Conv\x12\x01g'
    b"Z\x1b\n\x01x\x12\x16\n\x14\x08\x01\x12\x10\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01"
    b"b\x1b\n\x01y\x12\x16\n\x14\x08\x01\x12\x10\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@dataclass(frozen=True)
class Backend:
    """`state` is works, missing or mismatched; `fix` is the command that mends it, empty where it works."""

    name: str
    state: str
    detail: str
    fix: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    python: str
    platform: str
    gpus: Gpus
    backends: tuple[Backend, ...]

    @property
    def ok(self) -> bool:
        """Whether at least one backend works."""
        return any(backend.state == WORKS for backend in self.backends)


def examine() -> Report:
    """Probe this machine. Takes seconds: every library that is installed gets loaded."""
    gpus = _isolated(probe_gpus, lambda error: Gpus((), "", f"the probe failed: {error}"))
    probes: dict[str, Callable[[], Backend]] = {
        ONNXRUNTIME.name: probe_onnxruntime,
        ONNXRUNTIME_CUDA.name: lambda: probe_onnxruntime_cuda(gpus),
        OPENVINO.name: probe_openvino,
        TENSORRT_RTX.name: lambda: probe_tensorrt(TENSORRT_RTX.name, gpus),
        TENSORRT.name: lambda: probe_tensorrt(TENSORRT.name, gpus),
    }
    backends = tuple(_isolated(probe, partial(_crashed, name)) for name, probe in probes.items())
    return Report(platform.python_version(), platform_name(), gpus, backends)


def _isolated(probe: Callable[[], Any], failed: Callable[[str], Any]) -> Any:
    try:
        return probe()
    except (Exception, SystemExit) as error:
        return failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _crashed(name: str, why: str) -> Backend:
    return Backend(
        name,
        MISMATCHED,
        f"does not load: {why}{_named_libraries(why)}",
        install_command(TARGETS[name].extra, "--force-reinstall"),
        _versions(name),
    )


def installed(package: str) -> str:
    """Version of an installed package, or an empty string."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def compiler_version(target: str) -> str | None:
    """Version of the compiler of a target as its package says, without loading it; None if it is not installed, or the
    target is one of a newer sdrt.
    """
    packages = TARGETS[target].packages if target in TARGETS else ()
    return next((found for package in packages if (found := installed(package))), None)


def _onnxruntime_conflict(name: str) -> Backend | None:
    """Two packages that write the same folder: the one installed last has won, and removing either breaks the other."""
    found = [package for package in ONNXRUNTIME.packages if installed(package)]
    if len(found) < 2:
        return None
    fix = f"pip uninstall -y {' '.join(found)} && {install_command(TARGETS[name].extra)}"
    return Backend(
        name, MISMATCHED, f"{' and '.join(found)} are installed together and overwrite each other", fix, _versions(name)
    )


def probe_onnxruntime() -> Backend:
    name = ONNXRUNTIME.name
    if conflict := _onnxruntime_conflict(name):
        return conflict
    if not any(installed(package) for package in ONNXRUNTIME.packages):
        return Backend(name, MISSING, "onnxruntime is not installed", install_command(TARGETS[name].extra))
    providers = _run_model(_IDENTITY, (1,), ["CPUExecutionProvider"])
    return Backend(name, WORKS, f"ran a model on {', '.join(providers)}", "", _versions(name))


def probe_onnxruntime_cuda(gpus: Gpus) -> Backend:
    name, provider = ONNXRUNTIME_CUDA.name, "CUDAExecutionProvider"
    if conflict := _onnxruntime_conflict(name):
        return conflict
    if not installed(CUDA_PACKAGE):
        replace = f"pip uninstall -y {ONNXRUNTIME.packages[0]} && " if installed(ONNXRUNTIME.packages[0]) else ""
        return Backend(
            name, MISSING, f"{CUDA_PACKAGE} is not installed", f"{replace}{install_command(TARGETS[name].extra)}"
        )
    if not gpus.found:
        return _no_gpu(name, gpus)
    onnxruntime = engine_libraries.onnxruntime()
    onnxruntime.set_default_logger_severity(_FATAL)  # what is missing is said below
    with redirect_stdout(StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
    detail, ran = "", "model"
    try:
        if provider not in _run_model(_IDENTITY, (1,), [provider, "CPUExecutionProvider"]):
            missing = _missing_cuda_libraries()
            detail = f"missing {', '.join(missing)}" if missing else f"{provider} did not start and gave no reason"
        else:
            ran = "convolution, which needs cuDNN"
            _run_model(_CONVOLUTION, (1, 1, 1, 1), [provider])
    except Exception as error:
        detail = f"{provider} runs no {ran}: {' '.join(str(error).split())[:300]}"
    if detail:
        return Backend(name, MISMATCHED, detail, f"pip install '{CUDA_PACKAGE}[cuda,cudnn]'", _versions(name))
    found = ", ".join(map(str, gpus.found))
    return Backend(name, WORKS, f"ran a model on {provider}; GPUs: {found}", "", _versions(name))


def _run_model(model: bytes, shape: tuple[int, ...], providers: list[str]) -> list[str]:
    """The providers that a session of a one-node model really got, after running it."""
    import numpy as np

    onnxruntime = engine_libraries.onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    session.run(None, {"x": np.ones(shape, np.float32)})
    return list(session.get_providers())


def _missing_cuda_libraries() -> list[str]:
    """CUDA libraries that ONNX Runtime's provider names and the system cannot load."""
    root = (
        Path(str(distribution(CUDA_PACKAGE).locate_file(ONNXRUNTIME.module)))
        / "capi"
        / "libonnxruntime_providers_cuda.so"
    )
    if not root.exists():
        return []
    with root.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = sorted({match.decode() for match in _CUDA_LIBRARY.findall(data)}, key=_numbers)
    newest = {name.partition(".")[0]: name for name in found}  # an older version is named as a second choice only
    return [name for name in sorted(newest.values()) if not _loads(name)]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def probe_openvino() -> Backend:
    """Whether OpenVINO is installed, new enough, and runs a model on this CPU."""
    name = OPENVINO.name
    found = compiler_version(name)
    if found is None:
        return Backend(name, MISSING, f"{name} is not installed", install_command(TARGETS[name].extra))
    if _numbers(found) < OPENVINO.oldest:
        wanted = ".".join(map(str, OPENVINO.oldest))
        return Backend(
            name,
            MISMATCHED,
            f"{name} {found}, at least {wanted} is needed",
            install_command(TARGETS[name].extra, "--upgrade"),
            _versions(name),
        )
    import numpy as np

    core = engine_libraries.openvino().Core()
    core.compile_model(core.read_model(_IDENTITY), "CPU").create_infer_request().infer({"x": np.ones(1, np.float32)})
    precision = "bfloat16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "float32"
    return Backend(
        name,
        WORKS,
        f"ran a model on {core.get_property('CPU', 'FULL_DEVICE_NAME').strip()}, which computes in {precision}",
        "",
        _versions(name),
    )


def probe_tensorrt(name: str, gpus: Gpus) -> Backend:
    """Whether engines of a target run here: the library, `cuda.core`, versions, and a GPU the library has
    kernels for.
    """
    target = TARGETS[name]
    if compiler_version(name) is None:
        elsewhere = f"; its libraries come from {target.index}, which pip must reach" if target.index else ""
        return Backend(
            name, MISSING, f"{name} is not installed{elsewhere}", install_command(target.extra), _versions(name)
        )
    if problem := wrong_cuda(name, gpus):
        return Backend(name, MISMATCHED, *problem, _versions(name))
    trt = import_module(target.module)
    for package in target.oldest_beside:
        if not installed(package):
            return Backend(
                name, MISSING, f"{package} is not installed", install_command(TARGETS[name].extra), _versions(name)
            )
    import cuda.core  # noqa: F401  its libraries must load too

    versions = _versions(name) | {name: str(trt.__version__)}
    for package, oldest in {name: target.oldest, **target.oldest_beside}.items():
        if _numbers(versions[package]) < oldest:
            wanted = ".".join(map(str, oldest))
            return Backend(
                name,
                MISMATCHED,
                f"{package} {versions[package]}, at least {wanted} is needed",
                install_command(TARGETS[name].extra, "--upgrade"),
                versions,
            )
    if not gpus.found:
        return _no_gpu(name, gpus)
    if target.sms and not any(gpu.sm in {f"sm_{sm}" for sm in target.sms} for gpu in gpus.found):
        sms = ", ".join(f"{gpu.name} ({gpu.sm})" for gpu in gpus.found)
        return Backend(
            name, MISMATCHED, f"{target.title} has no kernels for {sms}", install_command(TENSORRT.extra), versions
        )
    return Backend(name, WORKS, ", ".join(f"{gpu.name} ({gpu.sm})" for gpu in gpus.found), "", versions)


def wrong_cuda(name: str, gpus: Gpus) -> tuple[str, str] | None:
    """What is wrong with the packages of a target, and what mends it: those for two versions of CUDA write the same
    files, and one for a newer CUDA than the driver's does not run. None if nothing is.
    """
    target = TARGETS[name]
    found = {
        package: int(match[1])
        for package in target.packages
        if (match := _OF_CUDA.search(package)) and installed(package)
    }
    if len(set(found.values())) > 1:
        fix = f"pip uninstall -y {' '.join(part for package in found for part in _parts(package))}"
        return (
            f"{' and '.join(found)} are installed together and overwrite each other",
            f"{fix} && {install_command(target.extra)}",
        )
    for package, cuda in found.items():
        if gpus.driver_cuda and int(gpus.driver_cuda.partition(".")[0]) < cuda:
            return f"{package} needs a driver for CUDA {cuda}, this one supports {gpus.driver_cuda}", NEW_DRIVER
    return None


def _parts(package: str) -> list[str]:
    """A package of TensorRT and those that come with it, as far as they are installed."""
    return [part for part in (package, f"{package}-bindings", f"{package}-libs") if installed(part)]


def _no_gpu(name: str, gpus: Gpus) -> Backend:
    if gpus.driver_cuda:
        return Backend(name, MISMATCHED, f"no GPU answers: {gpus.detail}", NEW_DRIVER, _versions(name))
    detail = f"no GPU answers: {gpus.detail}" + ("; compiling for other machines works" if TARGETS[name].sms else "")
    return Backend(
        name, MISSING, detail, "Install an NVIDIA GPU's driver: https://www.nvidia.com/drivers", _versions(name)
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _named_libraries(text: str) -> str:
    names = [name for name in dict.fromkeys(_LIBRARY.findall(text)) if not _loads(name)]
    return f"; missing {', '.join(names)}" if names else ""


def _versions(name: str) -> dict[str, str]:
    """Versions of the installed packages a backend is made of; those of ONNX Runtime each under its own name."""
    target = TARGETS[name]
    shared = target.module == ONNXRUNTIME.module
    packages = target.packages if shared else tuple(target.oldest_beside)
    found = {package: text for package in packages if (text := installed(package))}
    if not shared and (compiler := compiler_version(name)) is not None:
        found[name] = compiler
    return found
