"""The project's own gate: what a picture costs in calls, copies and imports is exact, and must not grow unnoticed.

`benchmarks/counters.json` holds the numbers. A change that lowers or, for a reason, raises one changes the file in the
same commit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_simulator
import numpy as np
import pytest
import tensorrt_simulator
from bench_documents import IDENTITY, answer
from conftest import ROOT
from cuda_simulator import installed
from gpu_simulator import Gpu
from simulated_plans import compile_engine

from sdrt.bench.compare import compare
from sdrt.bench.fidelity import check_references, picture_record, sketch
from sdrt.bench.instruments import Readings
from sdrt.bench.measure import _packages
from sdrt.bench.metrics import Gates
from sdrt.bench.result import assemble
from sdrt.bundle.folder import open_bundle
from sdrt.runtime import Pipeline
from sdrt.runtime.backend import load_engine

EXPECTED: dict[str, dict[str, int]] = json.loads((ROOT / "benchmarks" / "counters.json").read_text(encoding="utf-8"))
SETTINGS: dict[str, dict[str, Any]] = {
    "euler, 20 steps, guided": {"sampler": "euler", "steps": 20, "cfg": 3.0},
    "euler, 20 steps, unguided": {"sampler": "euler", "steps": 20, "cfg": 1.0},
    "heun, 5 steps, guided": {"sampler": "heun", "steps": 5, "cfg": 3.0},
    "dpmpp_2m, 4 steps, batch 2 of 3": {"sampler": "dpmpp_2m", "steps": 4, "cfg": 3.0, "batch": 2, "count": 3},
}


def document(counters: dict[str, int]) -> Any:
    return assemble([answer(np.random.default_rng(0)) | {"counters": counters}], IDENTITY, [])


def gated(name: str, found: dict[str, int]) -> None:
    """As `bench compare` gates a pull request: nothing up, nothing gone. Nothing down or new either: the file would be
    out of date.
    """
    comparison = compare(document(EXPECTED[name]), document(found), Gates(), interleaved=True)
    assert not comparison.failures, (name, found)
    assert found == EXPECTED[name], f"{name}: better than benchmarks/counters.json says; put {found} there"


@pytest.mark.parametrize("change", [{"launches": 21}, {"launches": 19}, {"allocations": 1}, {"syncs": None}])
def test_the_gate_holds_every_counter_exactly(change: dict[str, int | None]) -> None:
    """One up, one down, one new, one gone: each fails until the file says so."""
    name = "simulated GPU: euler, 20 steps, guided"
    found = {count: number for count, number in (EXPECTED[name] | change).items() if number is not None}
    with pytest.raises(AssertionError):
        gated(name, found)
    gated(name, dict(EXPECTED[name]))


def counted(pipe: Pipeline, readings: Readings, settings: dict[str, Any]) -> dict[str, int]:
    readings.reset()
    pipe("fox", seed=5, **settings)
    return dict(sorted(readings.calls.items())) | {"model_calls": len(readings.steps)}


@pytest.mark.parametrize("name", SETTINGS)
def test_counters_on_a_cpu(flat_bundle: Path, name: str) -> None:
    readings = Readings()
    with Pipeline.load(flat_bundle, backend="onnxruntime", threads=1, observe=readings.observe) as pipe:
        gated(f"onnxruntime: {name}", counted(pipe, readings, SETTINGS[name]))


@pytest.fixture(scope="module")
def compiled(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(flat_bundle, tmp_path_factory.mktemp("counters") / "flat.sdrt"))
    compile_engine(copy, graphs=flat_bundle, heights=(64, 64), widths=(64, 64), batch=2)
    return copy


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with installed(Gpu(), cuda_simulator.modules() | tensorrt_simulator.modules()) as simulated:
        yield simulated


@pytest.mark.parametrize("name", SETTINGS)
def test_counters_on_a_simulated_gpu(gpu: Gpu, compiled: Path, name: str) -> None:
    """The third picture, once graphs are captured. What the instruments count is what the simulator counts, and
    synchronisations are its alone.
    """
    readings = Readings()
    with Pipeline.load(compiled, backend="tensorrt-rtx", observe=readings.observe) as pipe:
        for prompt in (
            "sun",
            "cat",
        ):  # the second finds the empty negative prompt encoded, as the picture that is counted does
            pipe(prompt, seed=1, **SETTINGS[name])
        with gpu.counted() as simulated:
            found = counted(pipe, readings, SETTINGS[name])
        assert {count: found.get(count, 0) for count in ("launches", "h2d", "d2h")} == {
            count: simulated.get(count, 0) for count in ("launches", "h2d", "d2h")
        }
        assert "allocations" not in found and "allocations" not in simulated
        gated(f"simulated GPU: {name}", found | {"syncs": simulated["syncs"]})


def test_the_references_hold_on_a_simulated_gpu(gpu: Gpu, compiled: Path) -> None:
    """The guard asks any engine through its protocol; the GPU's code path too."""
    bundle = open_bundle(compiled)
    checks, problems, skipped = check_references(load_engine(bundle, "tensorrt-rtx"), bundle)
    assert (
        not problems and not skipped and {check["graph"] for check in checks} == {"text_encoder", "step", "vae_decoder"}
    )


def test_packages_of_the_project_alone() -> None:
    assert _packages(["sdrt.runtime", "numpy.linalg", "json", "_ctypes", "os.path", "cython_runtime", "torch.nn"]) == {
        "sdrt",
        "numpy",
        "torch",
    }


# The fidelity guard


class Wrong:
    """An engine whose outputs are a little off, in one place at a time."""

    def __init__(self, engine: Any, what: str) -> None:
        self.engine, self.what = engine, what

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def encode_text(self, *arguments: Any) -> Any:
        context, pooled = self.engine.encode_text(*arguments)
        return context * np.float32(1.001) if self.what == "text_encoder" else context, pooled

    def open(self, *arguments: Any) -> Any:
        batch = self.engine.open(*arguments)
        if self.what == "step":
            latents = batch.latents
            batch.latents = lambda slots: latents(slots) * np.float32(1.001)
        return batch

    def decode(self, *arguments: Any) -> Any:
        pixels, finite = self.engine.decode(*arguments)
        return (pixels ^ 2 if self.what == "vae_decoder" else pixels), finite


@pytest.mark.parametrize("what", ["text_encoder", "step", "vae_decoder"])
def test_a_wrong_engine_is_found(flat_bundle: Path, what: str) -> None:
    bundle = open_bundle(flat_bundle)
    engine: Any = Wrong(load_engine(bundle, "onnxruntime", threads=1), what)
    checks, problems, skipped = check_references(engine, bundle)
    assert len(checks) == 3 and not skipped
    assert len(problems) == 1 and problems[0].startswith(what) and "differs from the bundle's reference" in problems[0]


def test_sketches_estimate_distances() -> None:
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(20):
        a, b = random.standard_normal((2, 1, 4, 64, 64))
        near = a + 0.01 * b
        distance = np.linalg.norm(np.array(sketch(near)) - np.array(sketch(a)))
        ratios.append(distance / np.linalg.norm(near - a))
    assert np.mean(ratios) == pytest.approx(1, abs=0.05) and max(abs(r - 1) for r in ratios) < 0.3
    assert sketch(np.zeros((2, 2))) == [0.0] * 256


def test_pictures_that_are_none() -> None:
    latents, flat = np.zeros((1, 4, 8, 8), np.float32), np.full((1, 8, 8, 3), 7, np.uint8)
    assert picture_record(3, latents, flat)[1] == ["the picture of seed 3 is one flat colour"]
    assert picture_record(3, latents * np.nan, flat) == (None, ["latents of seed 3 are NaN or infinite"])
