"""GPUs that answer: as the CUDA runtime says, or the driver where cuda-bindings is not installed; both are replaced."""

from __future__ import annotations

import builtins
from types import SimpleNamespace
from typing import Any

import pytest

from sdrt.machine import gpus
from sdrt.machine.gpus import Gpu, Gpus, probe_gpus


def test_in_words() -> None:
    assert str(Gpu("NVIDIA H100 80GB HBM3", "sm_90")) == "NVIDIA H100 80GB HBM3, sm_90"


def answer(monkeypatch: pytest.MonkeyPatch, status: str, count: int | None, driver: int) -> None:
    from cuda.bindings import runtime

    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (getattr(runtime.cudaError_t, status), count))
    monkeypatch.setattr(runtime, "cudaDriverGetVersion", lambda: (runtime.cudaError_t.cudaSuccess, driver))
    properties = SimpleNamespace(name=b"NVIDIA GeForce RTX 4090\0", major=8, minor=9)
    monkeypatch.setattr(runtime, "cudaGetDeviceProperties", lambda index: (runtime.cudaError_t.cudaSuccess, properties))


@pytest.mark.parametrize(
    ("status", "count", "driver", "expected"),
    [
        ("cudaSuccess", 2, 13000, Gpus((Gpu("NVIDIA GeForce RTX 4090", "sm_89"),) * 2, "13.0", "")),
        ("cudaSuccess", 0, 12080, Gpus((), "12.8", "the driver finds no device (cudaSuccess)")),
        ("cudaErrorNoDevice", None, 12080, Gpus((), "12.8", "the driver finds no device (cudaErrorNoDevice)")),
        (
            "cudaErrorInsufficientDriver",
            None,
            0,
            Gpus((), "", "no NVIDIA driver is loaded (cudaErrorInsufficientDriver)"),
        ),
        (
            "cudaErrorInsufficientDriver",
            None,
            11040,
            Gpus((), "11.4", "the driver supports CUDA 11.4 only (cudaErrorInsufficientDriver)"),
        ),
    ],
)
def test_the_runtime_answers(
    monkeypatch: pytest.MonkeyPatch, status: str, count: int | None, driver: int, expected: Gpus
) -> None:
    answer(monkeypatch, status, count, driver)
    assert probe_gpus() == expected


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make the import of a module and of what is in it fail."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == module or name.startswith(module + "."):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_bindings_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "cuda")

    class Driver:
        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:
            count._obj.value = 1
            return 0

        def cuDriverGetVersion(self, version: Any) -> int:
            version._obj.value = 12040
            return 0

        def cuDeviceGetName(self, text: Any, size: int, device: int) -> int:
            text.value = b"NVIDIA A100"
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
            value._obj.value = {75: 8, 76: 0}[attribute]
            return 0

    def load(name: str) -> Driver:
        return Driver()

    monkeypatch.setattr(gpus.ctypes, "CDLL", load)
    assert probe_gpus() == Gpus((Gpu("NVIDIA A100", "sm_80"),), "12.4", "")
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)
    assert probe_gpus() == Gpus((), "", "the driver answers with error 100")

    def absent(name: str) -> Driver:
        raise OSError(name)

    monkeypatch.setattr(gpus.ctypes, "CDLL", absent)
    assert probe_gpus().detail.startswith("no NVIDIA driver: ")
