"""The NVIDIA GPUs that answer on this machine, and the newest CUDA that their driver supports.

Nothing else asks how many there are. `cuda.bindings` is imported when it is asked, and no other library ever.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU that answers: its name and generation, such as sm_89."""

    name: str
    sm: str

    def __str__(self) -> str:
        """Such as "NVIDIA H100 80GB HBM3, sm_90", as in the key of an engine that was built on it."""
        return f"{self.name}, {self.sm}"


@dataclass(frozen=True)
class Gpus:
    """The GPUs that answer, the newest CUDA the driver supports ("" without one), and why none answers."""

    found: tuple[Gpu, ...]
    driver_cuda: str
    detail: str


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
