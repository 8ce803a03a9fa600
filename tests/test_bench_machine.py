"""What a machine does to measurements: throttling read from made-up systems, pictures dropped for it, and the noise report on known scatter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_documents import IDENTITY, answer
from bench_fakes import FakeEngine, FakePipe, FakeTime
from click.testing import Result
from typer.testing import CliRunner

from sdrt.bench import machine_noise as noise
from sdrt.bench import measure, steady_work
from sdrt.bench.instruments import Readings, TimedEngine
from sdrt.bench.machine_noise import MachineNoise, machine_noise, pictures_of
from sdrt.bench.measure import Request
from sdrt.bench.result import assemble
from sdrt.bench.run import _gpu_environment
from sdrt.bench.statistics import SLOWER, from_logs, judge
from sdrt.bench.throttle import GpuState, Watch, cpu_mhz, cpu_throttles, gpu_state
from sdrt.bundle.folder import open_bundle
from sdrt.cli import app
from sdrt.errors import CheckFailed

# Throttling


def system(root: Path, *, core: Sequence[int], package: Sequence[int], khz: Sequence[int]) -> Path:
    """A folder like Linux's of processors."""
    for index, (cores, packages, clock) in enumerate(zip(core, package, khz, strict=True)):
        for name, value in (
            ("thermal_throttle/core_throttle_count", cores),
            ("thermal_throttle/package_throttle_count", packages),
            ("cpufreq/scaling_cur_freq", clock),
        ):
            file = root / f"cpu{index}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
    (root / "cpufreq").mkdir(exist_ok=True)
    return root


def test_counters_of_a_processor(tmp_path: Path) -> None:
    root = system(tmp_path, core=(3, 4), package=(10, 10), khz=(2_000_000, 3_000_000))
    assert cpu_throttles(root) == 27 and cpu_mhz(root) == 2500.0  # as far as can be told, two packages of one core
    assert cpu_throttles(tmp_path / "none") is None is cpu_mhz(tmp_path / "none")
    (root / "cpu0" / "thermal_throttle" / "core_throttle_count").write_text("?")
    assert cpu_throttles(root) == 24
    same = system(tmp_path / "same", core=(3, 3, 5, 5), package=(10, 10, 10, 10), khz=(1, 1, 1, 1))
    for index in range(4):  # two cores of two threads each, in one package
        for name, value in (("physical_package_id", 0), ("core_id", index // 2)):
            file = same / f"cpu{index}" / "topology" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"{value}\n")
    assert cpu_throttles(same) == 3 + 5 + 10


class Nvml:
    """NVML with one GPU of chosen state; what is None it refuses, as it does for what a GPU lacks."""

    ClockType = SimpleNamespace(SM=1, MEM=2)
    TemperatureSensors = SimpleNamespace(GPU=0)

    def __init__(self, **told: Any) -> None:
        self.told = {"device_get_current_clocks_event_reasons": 0} | told

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.told:
            raise RuntimeError(f"NVML_ERROR_NOT_SUPPORTED: {name}")
        return lambda *_: self.told[name]


def test_what_nvml_tells_of_a_gpu_and_what_it_does_not() -> None:
    nvml = Nvml(
        device_get_current_clocks_event_reasons=0x4 | 0x20, device_get_clock_info=1500, device_get_temperature_v=83, device_get_power_usage=300_000,
        system_get_driver_version="580.65.06", system_get_cuda_driver_version_v2=13020, device_get_uuid="GPU-1", device_get_ecc_mode=(1, 1),
        device_get_compute_running_processes_v3=[1, 2],
    )  # fmt: skip
    gpu = GpuState(nvml, 0)
    assert gpu.now() == {"sm_mhz": 1500, "memory_mhz": 1500, "celsius": 83, "watts": 300.0, "lowered_by": ["power cap", "software thermal slowdown"]}
    identity = gpu.identity()
    assert (identity["driver"], identity["cuda"], identity["ecc"], identity["mig"], identity["memory_bytes"]) == ("580.65.06", "13.2", True, None, None)
    assert "GPU-1" not in json.dumps(identity) and len(identity["uuid_hash"]) == 16
    found = _gpu_environment(identity)
    assert (found["gpu_driver"], found["gpu_driver_version"], found["gpu_processes"]) == ("580", "580.65.06", 2)
    assert GpuState(Nvml(device_get_current_clocks_event_reasons=None), 0).now()["lowered_by"] is None
    assert gpu_state(SimpleNamespace(backend="openvino"), 0) is None
    assert gpu_state(SimpleNamespace(backend="tensorrt", cuda=SimpleNamespace(Device=lambda _: 1 / 0)), 0) is None, "no NVML here"


def test_what_counts_as_throttling() -> None:
    counts = iter([0, 5, 5, 5, 6, 6, 6])
    watch = Watch(None, lambda: next(counts))
    assert watch.told == {"cpu": True, "gpu": False}
    watch.begin()
    assert not watch.throttled(), "5 before and after"
    assert watch.throttled(), "6 after"
    silent = Watch(None, lambda: None)
    silent.begin()
    assert silent.told == {"cpu": False, "gpu": False} and not silent.throttled()
    for reasons, expected in ((0, False), (0x4, False), (0x1, False), (0x8, True), (0x40, True), (0x80, True), (0x24, True)):
        assert Watch(GpuState(Nvml(device_get_current_clocks_event_reasons=reasons), 0), lambda: None).throttled() is expected


@pytest.mark.parametrize(("throttled", "n", "said"), [((1, 3), 3, "2 pictures of a process dropped"), ((), 5, ""), (range(5), 5, "none was dropped")])
def test_pictures_made_while_the_machine_throttled_are_dropped(throttled: Sequence[int], n: int, said: str) -> None:
    time = FakeTime()
    readings = Readings(clock=time)
    pipe: Any = FakePipe(TimedEngine(FakeEngine(time, 1.0), readings), time)
    sampler = measure._Sampler(pipe, readings, Request("fake", steps=4))
    made = iter(range(5))
    sampler.watch = SimpleNamespace(begin=lambda: None, throttled=lambda: next(made) in throttled)  # type: ignore[assignment]
    for _ in range(5):
        sampler.picture(keep=True)
    samples, notes = sampler.counted()
    assert (len(samples["total_ms"]), len(samples["step_ms"]), sampler.dropped) == (n, 4 * n, len(throttled))
    assert [note for note in notes if said not in note] == [] and bool(notes) == bool(said)
    document = assemble([answer(np.random.default_rng(0)) | {"machine": {"dropped": sampler.dropped}, "warnings": notes}], IDENTITY, [])
    assert document["noise"]["throttled_pictures"] == len(throttled) and document["warnings"] == notes


# The noise report


def scattered(seed: int, within: float, between: float, *, cost_s: float = 5.0) -> tuple[Callable[[float], list[float]], FakeTime]:
    """Processes of known scatter, on a clock of their own."""
    random, time = np.random.default_rng(seed), FakeTime()

    def made(_: float) -> list[float]:
        time.sleep(cost_s)
        level = float(np.exp(random.normal(0, between)))
        return [10 * level * float(np.exp(random.normal(0, within))) for _ in range(50)]

    return made, time


def report(seed: int, within: float, between: float, limit_s: float = 60.0, **options: float) -> MachineNoise:
    made, time = scattered(seed, within, between, **options)
    return machine_noise(made, "work", limit_s, lambda _: None, now=time.seconds)


def test_a_quiet_machine_can_judge_the_default_margin() -> None:
    found = report(1, 0.01, 0.005)
    assert found.fit and found.processes == 12 and found.samples == 600
    assert found.within == pytest.approx(0.01, rel=0.2) and found.between == pytest.approx(0.005, rel=0.6)
    assert "This machine can see changes of " in found.words()[0] and found.words()[-1] == "The default margin of 5% can be judged here."


def test_a_noisy_machine_says_what_it_can_see_and_what_would_help() -> None:
    found = report(2, 0.03, 0.04)
    assert not found.fit and found.visible is not None and 0.05 < found.visible < 0.4
    assert found.pairs_for_margin is not None and 10 < found.pairs_for_margin <= 50
    assert "Too noisy for the default margin of 5%" in found.words()[-1] and "or a quieter machine" in found.words()[-1]


def test_what_it_can_see_is_what_ten_pairs_see() -> None:
    """A change of that size is told from none in about four runs of five: the promise, on the scatter it was made for."""
    visible = float(np.median([found for seed in range(40) if (found := report(seed, 0.01, 0.03).visible) is not None]))
    random, seen = np.random.default_rng(9), 0
    for _ in range(300):
        pairs = random.normal(np.log1p(visible), 0.03 * np.sqrt(2), 10)
        seen += judge({"x": from_logs(pairs)}, {"x": 0.01})["x"].word == SLOWER
    assert 0.65 < seen / 300 < 0.92


def test_the_time_is_a_limit() -> None:
    made, time = scattered(3, 0.01, 0.01, cost_s=9.0)
    found = machine_noise(made, "work", 60, lambda _: None, now=time.seconds)
    assert found.processes == 6 and time.seconds() <= 60
    slow = report(3, 0.01, 0.01, cost_s=40.0)
    assert slow.processes == 1 and not slow.fit and slow.visible is None and slow.words() == [
        "cannot tell: only 1 processes fitted into 40 s, 6 are the least; give it more time with --check-time"
    ]  # fmt: skip


def test_work_that_never_varies() -> None:
    found = machine_noise(lambda _: [1.0, 1.0], "work", 60, lambda _: None)
    assert found.fit and (found.visible, found.within, found.between) == (0.0, 0.0, 0.0)


def test_steady_work_runs_in_a_process_of_its_own() -> None:
    samples = noise.steady_work(0.2)
    assert samples and min(samples) > 0
    assert len(steady_work.timed_work(0.0)) == 1


def test_pictures_of_a_bundle(flat_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []

    def made(request: Request) -> Mapping[str, Any]:
        asked.append(request)
        return answer(np.random.default_rng(0))

    monkeypatch.setattr(noise, "in_fresh_process", made)
    bundle = open_bundle(flat_bundle)
    assert len(pictures_of(bundle, Request("x"))(10.0)) == 5
    assert (asked[0].limit_s, asked[0].warm_up_s) == (6.0, 2.0) and asked[0].pictures >= 1000
    wrong = answer(np.random.default_rng(0))
    wrong["fidelity"] |= {"ok": False, "problems": ["step: latents: differs"]}
    monkeypatch.setattr(noise, "in_fresh_process", lambda _: wrong)
    with pytest.raises(CheckFailed, match="the pictures are wrong: step: latents: differs"):
        pictures_of(bundle, Request("x"))(10.0)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "run", *map(str, arguments)])  # type: ignore[return-value]


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for between, code in ((0.002, 0), (0.2, 8)):
        made, _ = scattered(4, 0.002, between)
        monkeypatch.setattr(noise, "steady_work", made)
        done = bench("--check-machine")
        assert done.exit_code == code and "This machine can see changes of" in done.stdout and "process 12 of at most 12" in done.stderr
        found = json.loads(bench("--check-machine", "--json").stdout)
        assert found["fit"] is (code == 0) and found["processes"] == 12 and found["words"]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [((), "BUNDLE is missing"), (("--check-machine", "--check-time", 1), "--check-time 1: expected 5 to 3600"), (("--check-machine", "--layers"), "measures no result"),
     (("--check-machine", "--output", "x.json"), "measures no result"), (("--check-machine", "--scenario", "server"), "not at a server"),
     (("--check-machine", "--steps", 4, "--max-picture-time", 1), "--max-picture-time, --steps: --check-machine without a BUNDLE does not use it"),
     (("x.sdrt", "--check-machine", "--steps", 4, "--processes", 3), "--processes: --check-machine does not use it"), (("x.sdrt", "--check-time", 9), "is for --check-machine")],
)  # fmt: skip
def test_bad_options(arguments: tuple[object, ...], fragment: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2 and fragment in done.stderr and done.stdout == ""


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    done = bench(tmp_path / "none.sdrt", "--check-machine")
    assert done.exit_code == 3 and "no such bundle" in done.stderr
