"""What runs on this machine: each backend works, is missing or does not match, and the command that mends it.

Every probe is alone: one that fails says so and leaves the others be. Nothing is taken on trust: ONNX Runtime names
providers that cannot run, so a one-node model is run through each. What a probe needs is imported when it runs.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from sdrt.engines.store import RTX_SMS, platform_name
from sdrt.machine import engine_libraries
from sdrt.machine.packages import install_command

WORKS, MISSING, MISMATCHED = "works", "missing", "mismatched"
BACKENDS = ("onnxruntime", "onnxruntime-cuda", "openvino", "tensorrt-rtx", "tensorrt")
_EXTRA = dict(zip(BACKENDS, ("cpu", "cuda", "openvino", "tensorrt-rtx", "tensorrt"), strict=True))

_OLDEST = {
    "tensorrt-rtx": (1, 7),
    "tensorrt": (11, 0),
    "cuda-core": (1, 2),
    "cuda-bindings": (13, 0),
    "openvino": (2026, 4),
}
_ORT_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-qnn")
_COMPILER_PACKAGES = {
    "onnxruntime": _ORT_PACKAGES,
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "openvino": ("openvino",),
}
_LIBRARY = re.compile(r"(?:lib)?[\w.+-]+\.(?:so(?:\.\d+)*|dll|dylib)")
_CUDA_LIBRARY = re.compile(rb"lib(?:cublasLt|cublas|cudnn|cufft|curand|cudart|nvrtc)\.so\.\d+")

# y = x, for x float32 [1]: the smallest model, in ONNX's own encoding.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01g'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@dataclass(frozen=True)
class Gpu:
    """A GPU that answers: its name and generation, such as sm_89."""

    name: str
    sm: str


@dataclass(frozen=True)
class Gpus:
    """The GPUs that answer, the newest CUDA the driver supports ("" without one), and why none answers."""

    found: tuple[Gpu, ...]
    driver_cuda: str
    detail: str


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
        "onnxruntime": probe_onnxruntime,
        "onnxruntime-cuda": lambda: probe_onnxruntime_cuda(gpus),
        "openvino": probe_openvino,
        "tensorrt-rtx": lambda: probe_tensorrt("tensorrt-rtx", gpus),
        "tensorrt": lambda: probe_tensorrt("tensorrt", gpus),
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
        install_command(_EXTRA[name], "--force-reinstall"),
        _versions(name),
    )


def installed(package: str) -> str:
    """Version of an installed package, or an empty string."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def compiler_version(target: str) -> str | None:
    """Version of the compiler of a target as its package says, without loading it; None if it is not installed."""
    return next((found for package in _COMPILER_PACKAGES[target] if (found := installed(package))), None)


def probe_gpus() -> Gpus:
    """Ask the CUDA runtime, or the driver where cuda-bindings is not installed. A library's own list of devices proves
    nothing.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        return _driver_gpus()
    driver = runtime.cudaDriverGetVersion()[1] or 0
    supported = f"{driver // 1000}.{driver % 1000 // 10}" if driver else ""
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess or not count:
        if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
            why = f"the driver supports CUDA {supported} only" if supported else "no NVIDIA driver is loaded"
        else:
            why = "the driver finds no device"
        return Gpus((), supported, f"{why} ({status.name})")
    found = []
    for index in range(count):
        properties = runtime.cudaGetDeviceProperties(index)[1]
        name = (
            properties.name.decode(errors="replace").rstrip("\0")
            if isinstance(properties.name, bytes)
            else str(properties.name)
        )
        found.append(Gpu(name, f"sm_{properties.major}{properties.minor}"))
    return Gpus(tuple(found), supported, "")


def _driver_gpus() -> Gpus:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return Gpus((), "", f"no NVIDIA driver: {name} is not there")
    count, newest, major, minor, text = (
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.c_int(),
        ctypes.create_string_buffer(256),
    )
    if (status := driver.cuInit(0)) or (status := driver.cuDeviceGetCount(ctypes.byref(count))):
        return Gpus((), "", f"the driver answers with error {status}")
    driver.cuDriverGetVersion(ctypes.byref(newest))
    found = []
    for device in range(count.value):
        driver.cuDeviceGetName(text, len(text), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.append(Gpu(text.value.decode(errors="replace"), f"sm_{major.value}{minor.value}"))
    return Gpus(
        tuple(found),
        f"{newest.value // 1000}.{newest.value % 1000 // 10}",
        "" if found else "the driver finds no device",
    )


def _onnxruntime_conflict(wanted: str, name: str) -> Backend | None:
    """Two packages that write the same folder: the one installed last has won, and removing either breaks the other."""
    found = [package for package in _ORT_PACKAGES if installed(package)]
    if len(found) < 2:
        return None
    fix = f"pip uninstall -y {' '.join(found)} && {install_command(_EXTRA[name])}"
    return Backend(
        name, MISMATCHED, f"{' and '.join(found)} are installed together and overwrite each other", fix, _versions(name)
    )


def probe_onnxruntime() -> Backend:
    name = "onnxruntime"
    if conflict := _onnxruntime_conflict(name, name):
        return conflict
    if not any(installed(package) for package in _ORT_PACKAGES):
        return Backend(name, MISSING, "onnxruntime is not installed", install_command(_EXTRA[name]))
    providers = _run_identity(["CPUExecutionProvider"])
    return Backend(name, WORKS, f"ran a model on {', '.join(providers)}", "", _versions(name))


def probe_onnxruntime_cuda(gpus: Gpus) -> Backend:
    name, provider = "onnxruntime-cuda", "CUDAExecutionProvider"
    if conflict := _onnxruntime_conflict("onnxruntime-gpu", name):
        return conflict
    if not installed("onnxruntime-gpu"):
        replace = "pip uninstall -y onnxruntime && " if installed("onnxruntime") else ""
        return Backend(name, MISSING, "onnxruntime-gpu is not installed", f"{replace}{install_command(_EXTRA[name])}")
    if not gpus.found:
        return _no_gpu(name, gpus)
    engine_libraries.onnxruntime().preload_dlls()
    if provider not in _run_identity([provider, "CPUExecutionProvider"]):
        missing = _missing_cuda_libraries()
        detail = f"missing {', '.join(missing)}" if missing else "the CUDA provider did not start and gave no reason"
        return Backend(name, MISMATCHED, detail, "pip install 'onnxruntime-gpu[cuda,cudnn]'", _versions(name))
    return Backend(
        name,
        MISSING,
        "ONNX Runtime runs on this GPU, but this version of sdrt has no backend for it yet",
        install_command(_EXTRA["tensorrt"]),
        _versions(name),
    )


def _run_identity(providers: list[str]) -> list[str]:
    """The providers a session of the one-node model really got, after running it."""
    import numpy as np

    onnxruntime = engine_libraries.onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_IDENTITY, options, providers=providers)
    session.run(None, {"x": np.ones(1, np.float32)})
    return list(session.get_providers())


def _missing_cuda_libraries() -> list[str]:
    """CUDA libraries that ONNX Runtime's provider names and the system cannot load."""
    root = (
        Path(str(distribution("onnxruntime-gpu").locate_file("onnxruntime")))
        / "capi"
        / "libonnxruntime_providers_cuda.so"
    )
    if not root.exists():
        return []
    with root.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        names = sorted({match.decode() for match in _CUDA_LIBRARY.findall(data)})
    return [name for name in names if not _loads(name)]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def probe_openvino() -> Backend:
    """Whether OpenVINO is installed, new enough, and runs a model on this CPU."""
    name = "openvino"
    found = compiler_version(name)
    if found is None:
        return Backend(name, MISSING, f"{name} is not installed", install_command(_EXTRA[name]))
    if _numbers(found) < _OLDEST[name]:
        wanted = ".".join(map(str, _OLDEST[name]))
        return Backend(
            name,
            MISMATCHED,
            f"{name} {found}, at least {wanted} is needed",
            install_command(_EXTRA[name], "--upgrade"),
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
    if compiler_version(name) is None:
        return Backend(name, MISSING, f"{name} is not installed", install_command(_EXTRA[name]), _versions(name))
    if name == "tensorrt-rtx":
        import tensorrt_rtx as trt
    else:
        import tensorrt as trt
    for package in ("cuda-core", "cuda-bindings"):
        if not installed(package):
            return Backend(name, MISSING, f"{package} is not installed", install_command(_EXTRA[name]), _versions(name))
    import cuda.core  # noqa: F401  its libraries must load too

    versions = _versions(name) | {name: str(trt.__version__)}
    for package, oldest in _OLDEST.items():
        if package in versions and _numbers(versions[package]) < oldest:
            wanted = ".".join(map(str, oldest))
            return Backend(
                name,
                MISMATCHED,
                f"{package} {versions[package]}, at least {wanted} is needed",
                install_command(_EXTRA[name], "--upgrade"),
                versions,
            )
    if not gpus.found:
        return _no_gpu(name, gpus)
    if name == "tensorrt-rtx" and not any(gpu.sm in {f"sm_{sm}" for sm in RTX_SMS} for gpu in gpus.found):
        sms = ", ".join(f"{gpu.name} ({gpu.sm})" for gpu in gpus.found)
        return Backend(
            name, MISMATCHED, f"TensorRT-RTX has no kernels for {sms}", install_command(_EXTRA["tensorrt"]), versions
        )
    return Backend(name, WORKS, ", ".join(f"{gpu.name} ({gpu.sm})" for gpu in gpus.found), "", versions)


def _no_gpu(name: str, gpus: Gpus) -> Backend:
    if gpus.driver_cuda:
        return Backend(
            name,
            MISMATCHED,
            f"no GPU answers: {gpus.detail}",
            "Update the NVIDIA driver: https://www.nvidia.com/drivers",
            _versions(name),
        )
    detail = f"no GPU answers: {gpus.detail}" + (
        "; compiling for other machines works" if name == "tensorrt-rtx" else ""
    )
    return Backend(
        name, MISSING, detail, "Install an NVIDIA GPU's driver: https://www.nvidia.com/drivers", _versions(name)
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _named_libraries(text: str) -> str:
    names = [name for name in dict.fromkeys(_LIBRARY.findall(text)) if not _loads(name)]
    return f"; missing {', '.join(names)}" if names else ""


def _versions(name: str) -> dict[str, str]:
    """Versions of the installed packages a backend is made of."""
    if name.startswith("onnxruntime"):
        packages: tuple[str, ...] = _ORT_PACKAGES
    elif name == "openvino":
        packages = ("openvino",)
    else:
        packages = ("cuda-core", "cuda-bindings")
    found = {package: text for package in packages if (text := installed(package))}
    if (
        packages is not _ORT_PACKAGES
        and name in _COMPILER_PACKAGES
        and (compiler := compiler_version(name)) is not None
    ):
        found[name] = compiler
    return found
