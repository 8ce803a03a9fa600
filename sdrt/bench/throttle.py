"""Clocks, heat and throttling: Linux's files for the processor, NVML for a GPU. Unknown values are None; nothing here
raises.

NVML comes with `cuda-bindings`, which the GPU backends need anyway. It has been called on no GPU yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdrt.engines.targets import on_gpu

_CPUS = Path("/sys/devices/system/cpu")
_COUNTERS = {
    "thermal_throttle/core_throttle_count": ("topology/physical_package_id", "topology/core_id"),
    "thermal_throttle/package_throttle_count": ("topology/physical_package_id",),
}
"""Counters of a logical CPU, and the files that name its core or package. All logical CPUs of a core or package repeat
its count.
"""

SLOWING = {
    "hardware slowdown": 0x8,
    "software thermal slowdown": 0x20,
    "hardware thermal slowdown": 0x40,
    "power brake": 0x80,
}
"""NVML's reasons (nvmlClocksEventReasons) why a GPU's clocks are below what the load asks for. The power cap, 0x4, is
missing here: a busy data-centre GPU runs at it all the time, so it is recorded, but samples stay valid.
"""
_RECORDED = {"power cap": 0x4} | SLOWING


def cpu_throttles(root: Path = _CPUS) -> int | None:
    """How often any core or package of the processor has throttled since the system started."""
    counts: dict[tuple[object, ...], int] = {}
    for counter, owner in _COUNTERS.items():
        for file in root.glob(f"cpu[0-9]*/{counter}"):
            cpu = file.parents[1]
            place = [_number(cpu / part) for part in owner]
            if (count := _number(file)) is not None:
                counts[counter, *((cpu,) if None in place else place)] = count
    return sum(counts.values()) if counts else None


def cpu_mhz(root: Path = _CPUS) -> float | None:
    """Mean clock of all cores at this moment."""
    clocks = [clock for file in root.glob("cpu[0-9]*/cpufreq/scaling_cur_freq") if (clock := _number(file)) is not None]
    return sum(clocks) / len(clocks) / 1000 if clocks else None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class GpuState:
    """One GPU as NVML sees it. `nvml` is `cuda.bindings.nvml`, already initialised."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def reasons(self) -> int | None:
        """Why the clocks are as they are, as a mask of NVML's reasons."""
        nvml = self._nvml
        found: int | None = _asked(lambda: int(nvml.device_get_current_clocks_event_reasons(self._handle)))
        return found

    def now(self) -> dict[str, Any]:
        """Clocks in MHz, degrees Celsius, watts, and why the clocks are low."""
        nvml, handle, reasons = self._nvml, self._handle, self.reasons()
        return {
            "sm_mhz": _asked(lambda: int(nvml.device_get_clock_info(handle, nvml.ClockType.SM))),
            "memory_mhz": _asked(lambda: int(nvml.device_get_clock_info(handle, nvml.ClockType.MEM))),
            "celsius": _asked(lambda: int(nvml.device_get_temperature_v(handle, nvml.TemperatureSensors.GPU))),
            "watts": _asked(lambda: nvml.device_get_power_usage(handle) / 1000),
            "lowered_by": None if reasons is None else [name for name, bit in _RECORDED.items() if reasons & bit],
        }

    def identity(self) -> dict[str, Any]:
        """What does not change during a run. The GPU's own number is hashed: the hash tells two GPUs apart, but not
        whose they are.
        """
        nvml, handle = self._nvml, self._handle
        return {
            "uuid_hash": _asked(lambda: hashlib.sha256(str(nvml.device_get_uuid(handle)).encode()).hexdigest()[:16]),
            "driver": _asked(lambda: str(nvml.system_get_driver_version())),
            "cuda": _asked(lambda: "{}.{}".format(*_version(int(nvml.system_get_cuda_driver_version_v2())))),
            "memory_bytes": _asked(lambda: int(nvml.device_get_memory_info_v2(handle).total)),
            "ecc": _asked(lambda: bool(nvml.device_get_ecc_mode(handle)[0])),
            "mig": _asked(lambda: bool(nvml.device_get_mig_mode(handle)[0])),
            "power_limit_watts": _asked(lambda: nvml.device_get_enforced_power_limit(handle) / 1000),
            "max_sm_mhz": _asked(lambda: int(nvml.device_get_max_clock_info(handle, nvml.ClockType.SM))),
            "processes": _asked(lambda: len(nvml.device_get_compute_running_processes_v3(handle))),
        }


def gpu_state(engine: Any, device: int) -> GpuState | None:
    """The GPU that an engine runs on; None on a CPU, or where NVML does not answer."""
    if not on_gpu(engine.backend):
        return None
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        return GpuState(nvml, nvml.device_get_handle_by_pci_bus_id_v2(engine.plans.cuda.Device(device).pci_bus_id))
    except Exception:  # no NVML, no permission, a simulated device: then nothing is told
        return None


class Watch:
    """Whether the machine throttled between two moments."""

    def __init__(self, gpu: GpuState | None, cpu: Callable[[], int | None] = cpu_throttles) -> None:
        self._gpu, self._cpu = gpu, cpu
        self.told = {"cpu": cpu() is not None, "gpu": gpu is not None and gpu.reasons() is not None}
        self._throttles = cpu()

    def begin(self) -> None:
        self._throttles = self._cpu()

    def throttled(self) -> bool:
        """Whether, since `begin`, the processor's counters grew, or the GPU's clocks are held down now."""
        before, after = self._throttles, self._cpu()
        reasons = self._gpu.reasons() if self._gpu is not None else None
        return (before is not None and after is not None and after > before) or bool(
            (reasons or 0) & sum(SLOWING.values())
        )

    def now(self) -> dict[str, Any]:
        """Clocks and throttling at this moment, for the record."""
        return {
            "cpu_mhz": cpu_mhz(),
            "cpu_throttles": self._cpu(),
            "gpu": self._gpu.now() if self._gpu is not None else None,
        }


def _version(number: int) -> tuple[int, int]:
    """CUDA writes 13.2 as 13020."""
    return number // 1000, number % 1000 // 10


def _asked(question: Callable[[], Any]) -> Any:
    """NVML's answer to a question; None where this GPU or driver has none."""
    try:
        return question()
    except Exception:
        return None
