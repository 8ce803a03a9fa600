"""`sdrt doctor`: this machine as it is, and machines played by replaced probes and libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sdrt.cli.app import app
from sdrt.engines.targets import TARGETS
from sdrt.machine import doctor
from sdrt.machine.doctor import MISMATCHED, MISSING, WORKS, Backend, examine
from sdrt.machine.gpus import Gpu, Gpus

ADA = Gpus((Gpu("NVIDIA GeForce RTX 4090", "sm_89"),), "13.0", "")
HOPPER = Gpus((Gpu("NVIDIA H100 80GB HBM3", "sm_90"),), "13.0", "")
NONE = Gpus((), "", "no NVIDIA driver is loaded")


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *args])


def by_name(backends: tuple[Backend, ...]) -> dict[str, Backend]:
    return {backend.name: backend for backend in backends}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that are installed, for the test to change."""
    found = {"onnxruntime": "1.32.0", "tensorrt-rtx-cu12": "1.7.1.116", "cuda-core": "1.2.2", "cuda-bindings": "13.5.0"}
    monkeypatch.setattr(doctor, "installed", lambda package: found.get(package, ""))
    return found


# This machine


def test_this_machine() -> None:
    report = examine()
    backends = by_name(report.backends)
    assert list(backends) == list(TARGETS) and report.ok
    assert (
        backends["onnxruntime"].state == WORKS
        and "CPUExecutionProvider" in backends["onnxruntime"].detail
        and backends["onnxruntime"].fix == ""
    )
    assert backends["tensorrt-rtx"].versions.keys() >= {"tensorrt-rtx", "cuda-core", "cuda-bindings"}
    for backend in report.backends:
        assert backend.state in (WORKS, MISSING, MISMATCHED)
        assert (backend.fix == "") == (backend.state == WORKS)
    if not report.gpus.found:
        assert report.gpus.detail and backends["tensorrt-rtx"].state != WORKS


def test_the_command() -> None:
    result = run()
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("python 3.")
    assert [line.split()[0] for line in lines[1:] if not line.startswith(" ")] == list(TARGETS)
    document = json.loads(run("--json").stdout)
    assert document["ok"] is True and [backend["name"] for backend in document["backends"]] == list(TARGETS)


def test_no_backend_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = run()
    assert result.exit_code == 5
    assert "onnxruntime       mismatched  does not load: ModuleNotFoundError" in result.stdout
    assert json.loads(run("--json").stdout)["ok"] is False


def test_what_can_be_loaded_is_not_asked_from_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names providers that cannot run."""
    import onnxruntime

    for name in ("get_available_providers", "get_device"):
        monkeypatch.setattr(onnxruntime, name, lambda: pytest.fail("asked"))
    assert by_name(examine().backends)["onnxruntime"].state == WORKS


def test_importing_the_module_loads_no_library() -> None:
    script = (
        "import sys, sdrt.machine.doctor; print([m for m in ('onnxruntime', 'tensorrt_rtx', 'tensorrt', 'cuda',"
        " 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


# One probe that fails leaves the others be


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcublasLt.so.13: cannot open shared object file: No such file or directory"),
        OSError("libcublasLt.so.13: cannot open shared object file"),
        RuntimeError("libcublasLt.so.13"),
        SystemExit(3),
    ],
)
@pytest.mark.parametrize(
    ("probe", "name"),
    [
        ("probe_onnxruntime", "onnxruntime"),
        ("probe_onnxruntime_cuda", "onnxruntime-cuda"),
        ("probe_openvino", "openvino"),
    ],
)
def test_a_probe_that_fails(monkeypatch: pytest.MonkeyPatch, probe: str, name: str, error: BaseException) -> None:
    def fail(*_: object) -> Backend:
        raise error

    monkeypatch.setattr(doctor, probe, fail)
    backends = by_name(examine().backends)
    assert backends[name].state == MISMATCHED and type(error).__name__ in backends[name].detail
    assert backends[name].fix.startswith("pip install --force-reinstall '")
    if "libcublas" in str(error):
        assert backends[name].detail.endswith("; missing libcublasLt.so.13")
    assert {other: backend.state for other, backend in backends.items() if other != name}.keys() == set(TARGETS) - {
        name
    }
    assert name == "onnxruntime" or backends["onnxruntime"].state == WORKS


def test_the_gpu_probe_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Gpus:
        raise OSError("libcuda.so.1: wrong ELF class")

    monkeypatch.setattr(doctor, "probe_gpus", fail)
    report = examine()
    assert "wrong ELF class" in report.gpus.detail and report.ok


# ONNX Runtime


@pytest.mark.parametrize("probe", [doctor.probe_onnxruntime, lambda: doctor.probe_onnxruntime_cuda(ADA)])
def test_onnxruntime_twice(packages: dict[str, str], probe: Callable[[], Backend]) -> None:
    packages["onnxruntime-gpu"] = "1.31.1"
    backend = probe()
    assert backend.state == MISMATCHED
    assert backend.detail == "onnxruntime and onnxruntime-gpu are installed together and overwrite each other"
    wanted = "onnxruntime>=1.25" if backend.name == "onnxruntime" else "onnxruntime-gpu>=1.25"
    assert backend.fix == f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install '{wanted}'"
    assert backend.versions == {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}


def test_onnxruntime_is_missing(packages: dict[str, str]) -> None:
    assert (
        doctor.probe_onnxruntime_cuda(ADA).fix == "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu>=1.25'"
    )
    del packages["onnxruntime"]
    assert (doctor.probe_onnxruntime().state, doctor.probe_onnxruntime().fix) == (
        MISSING,
        "pip install 'onnxruntime>=1.25'",
    )
    assert doctor.probe_onnxruntime_cuda(ADA).fix == "pip install 'onnxruntime-gpu>=1.25'"


def test_onnxruntime_cuda_names_missing_libraries(
    packages: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The provider falls back to the CPU without a word; which libraries it wants stands in its file."""
    import onnxruntime

    packages["onnxruntime-gpu"] = packages.pop("onnxruntime")
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(
        b"\x7fELF\0libcublasLt.so.99\0libc.so.6\0libcublasLt.so.98\0libcudnn.so.99\0libcublasLt.so.99\0"
    )
    monkeypatch.setattr(doctor, "distribution", lambda name: SimpleNamespace(locate_file=lambda _: tmp_path))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    ran: list[tuple[int, ...]] = []
    monkeypatch.setattr(doctor, "_run_model", lambda model, shape, providers: ["CPUExecutionProvider"])
    backend = doctor.probe_onnxruntime_cuda(ADA)
    assert (backend.state, backend.detail) == (MISMATCHED, "missing libcublasLt.so.99, libcudnn.so.99")
    assert backend.fix == "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    monkeypatch.setattr(doctor, "_run_model", lambda model, shape, providers: ran.append(shape) or providers)
    backend = doctor.probe_onnxruntime_cuda(ADA)
    assert (backend.state, backend.fix, ran) == (WORKS, "", [(1,), (1, 1, 1, 1)])
    assert backend.detail == "ran a model on CUDAExecutionProvider; GPUs: NVIDIA GeForce RTX 4090, sm_89"

    def without_cudnn(model: bytes, shape: tuple[int, ...], providers: list[str]) -> list[str]:
        if len(shape) == 4:
            raise RuntimeError("CUDNN failure: libcudnn.so.9\ncannot be loaded")
        return providers

    monkeypatch.setattr(doctor, "_run_model", without_cudnn)
    backend = doctor.probe_onnxruntime_cuda(ADA)
    assert (backend.state, backend.detail) == (
        MISMATCHED,
        "CUDAExecutionProvider runs no convolution, which needs cuDNN: CUDNN failure: libcudnn.so.9 cannot be loaded",
    )
    assert backend.fix == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_the_models_of_the_probes() -> None:
    cpu = ["CPUExecutionProvider"]
    assert doctor._run_model(doctor._IDENTITY, (1,), cpu) == cpu
    assert doctor._run_model(doctor._CONVOLUTION, (1, 1, 1, 1), cpu) == cpu


def test_onnxruntime_cuda_without_a_gpu(packages: dict[str, str]) -> None:
    packages["onnxruntime-gpu"] = packages.pop("onnxruntime")
    assert doctor.probe_onnxruntime_cuda(NONE).state == MISSING
    old = doctor.probe_onnxruntime_cuda(Gpus((), "11.4", "the driver supports CUDA 11.4 only"))
    assert old.state == MISMATCHED and "CUDA 11.4 only" in old.detail and "driver" in old.fix


# TensorRT


def test_tensorrt_rtx_works(packages: dict[str, str]) -> None:
    backend = doctor.probe_tensorrt("tensorrt-rtx", ADA)
    assert (backend.state, backend.detail, backend.fix) == (WORKS, "NVIDIA GeForce RTX 4090 (sm_89)", "")
    assert backend.versions.keys() == {"tensorrt-rtx", "cuda-core", "cuda-bindings"}


def test_tensorrt_rtx_has_no_kernels_for_a_hopper(packages: dict[str, str]) -> None:
    backend = doctor.probe_tensorrt("tensorrt-rtx", HOPPER)
    assert backend.state == MISMATCHED and "no kernels for NVIDIA H100 80GB HBM3 (sm_90)" in backend.detail
    assert backend.fix == "pip install 'tensorrt>=11' 'cuda-core>=1.2' 'cuda-bindings>=13'"
    assert doctor.probe_tensorrt("tensorrt-rtx", Gpus(HOPPER.found + ADA.found, "13.0", "")).state == WORKS


def test_tensorrt_rtx_without_a_gpu_still_compiles(packages: dict[str, str]) -> None:
    backend = doctor.probe_tensorrt("tensorrt-rtx", NONE)
    assert backend.state == MISSING and "compiling for other machines works" in backend.detail


@pytest.mark.parametrize(
    ("package", "version", "wanted"), [("cuda-core", "0.3.2", "1.2"), ("cuda-bindings", "12.9.1", "13.0")]
)
def test_versions_that_are_too_old(packages: dict[str, str], package: str, version: str, wanted: str) -> None:
    packages[package] = version
    backend = doctor.probe_tensorrt("tensorrt-rtx", ADA)
    assert (backend.state, backend.detail) == (MISMATCHED, f"{package} {version}, at least {wanted} is needed")
    assert backend.fix == "pip install --upgrade 'tensorrt-rtx-cu12>=1.7' 'cuda-core>=1.2' 'cuda-bindings>=13'"


@pytest.mark.parametrize("package", ["tensorrt-rtx-cu12", "cuda-core", "cuda-bindings"])
def test_packages_that_are_missing(packages: dict[str, str], package: str) -> None:
    del packages[package]
    backend = doctor.probe_tensorrt("tensorrt-rtx", ADA)
    assert (backend.state, backend.fix) == (
        MISSING,
        "pip install 'tensorrt-rtx-cu12>=1.7' 'cuda-core>=1.2' 'cuda-bindings>=13'",
    )


def test_tensorrt_rtx_for_two_versions_of_cuda(packages: dict[str, str]) -> None:
    """Both write the module tensorrt_rtx."""
    packages |= dict.fromkeys(
        ("tensorrt-rtx-cu12-libs", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"), "1.7.1.116"
    )
    backend = doctor.probe_tensorrt("tensorrt-rtx", ADA)
    assert (backend.state, backend.detail) == (
        MISMATCHED,
        "tensorrt-rtx-cu12 and tensorrt-rtx-cu13 are installed together and overwrite each other",
    )
    assert backend.fix == (
        "pip uninstall -y tensorrt-rtx-cu12 tensorrt-rtx-cu12-libs tensorrt-rtx-cu13 tensorrt-rtx-cu13-bindings"
        " && pip install 'tensorrt-rtx-cu12>=1.7' 'cuda-core>=1.2' 'cuda-bindings>=13'"
    )


@pytest.mark.parametrize(
    ("driver", "detail"),
    [
        ("12.8", "tensorrt-rtx-cu13 needs a driver for CUDA 13, this one supports 12.8"),
        ("13.0", "NVIDIA GeForce RTX 4090 (sm_89)"),
    ],
)
def test_driver_older_than_the_package(packages: dict[str, str], driver: str, detail: str) -> None:
    packages["tensorrt-rtx-cu13"] = packages.pop("tensorrt-rtx-cu12")
    backend = doctor.probe_tensorrt("tensorrt-rtx", Gpus(ADA.found, driver, ""))
    assert (backend.state == WORKS, backend.detail) == (driver == "13.0", detail)
    assert "nvidia.com/drivers" in backend.fix or backend.state == WORKS


def test_tensorrt_is_missing(packages: dict[str, str]) -> None:
    backend = doctor.probe_tensorrt("tensorrt", HOPPER)
    assert (backend.state, backend.fix) == (MISSING, "pip install 'tensorrt>=11' 'cuda-core>=1.2' 'cuda-bindings>=13'")
    assert backend.detail == (
        "tensorrt is not installed; its libraries come from https://pypi.nvidia.com, which pip must reach"
    )
    assert doctor.compiler_version("tensorrt") is None and doctor.compiler_version("tensorrt-rtx") == "1.7.1.116"


@pytest.mark.parametrize(
    ("source", "state", "fragment"),
    [
        ("__version__ = '11.4.0.106'", WORKS, "H100"),
        ("__version__ = '10.16.1'", MISMATCHED, "tensorrt 10.16.1, at least 11.0 is needed"),
        (
            "raise ImportError('libnvinfer.so.11: cannot open shared object file')",
            MISMATCHED,
            "missing libnvinfer.so.11",
        ),
        ("import ctypes; ctypes.CDLL('libnvinfer.so.11')", MISMATCHED, "missing libnvinfer.so.11"),
    ],
)
def test_tensorrt(
    packages: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, state: str, fragment: str
) -> None:
    packages["tensorrt"] = "11.4.0.106"
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(doctor, "probe_gpus", lambda: HOPPER)
    backend = by_name(examine().backends)["tensorrt"]
    sys.modules.pop("tensorrt", None)
    assert backend.state == state and fragment in backend.detail


def test_openvino() -> None:
    backend = doctor.probe_openvino()
    assert backend.state == WORKS and "ran a model on" in backend.detail and backend.versions["openvino"]


@pytest.mark.parametrize(
    ("version", "state", "fix"),
    [
        (None, MISSING, "pip install 'openvino>=2026.4'"),
        ("2025.4.1", MISMATCHED, "pip install --upgrade 'openvino>=2026.4'"),
    ],
)
def test_openvino_missing_or_old(monkeypatch: pytest.MonkeyPatch, version: str | None, state: str, fix: str) -> None:
    monkeypatch.setattr(doctor, "compiler_version", lambda target: version)
    backend = doctor.probe_openvino()
    assert (backend.state, backend.fix) == (state, fix)
