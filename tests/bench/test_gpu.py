"""Measuring on a GPU, simulated: times between CUDA events, which cost no wait, and TensorRT's layers, timed beside the
captured graphs.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_simulator
import numpy as np
import pytest
import tensorrt_simulator
from cuda_simulator import installed
from gpu_simulator import Gpu
from simulated_plans import compile_engine, layers

from sdrt.bench import layers as bench_layers
from sdrt.bench import layers_onnxruntime, layers_tensorrt, measure
from sdrt.bench.instruments import Readings
from sdrt.bench.layers import profile
from sdrt.bench.measure import Request
from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER
from sdrt.errors import MachineError
from sdrt.runtime import Pipeline
from sdrt.runtime.engine import Observe

COSTS = {TEXT_ENCODER: 3.0, STEP: 7.0, VAE_DECODER: 4.0}


@pytest.fixture(scope="module")
def compiled(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(flat_bundle, tmp_path_factory.mktemp("bench-gpu") / "flat.sdrt"))
    compile_engine(copy, graphs=flat_bundle, batch=2)
    return copy


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with installed(Gpu(), cuda_simulator.modules() | tensorrt_simulator.modules()) as simulated:
        simulated.costs_ms = dict(COSTS)
        yield simulated


def pictures(
    compiled: Path, readings: Readings | None, gpu: Gpu
) -> tuple[list[str], list[dict[str, list[float]]], dict[str, int], Any]:
    """What the third of three pictures calls, what each took on the device, what is counted, and its pixels. Without
    readings it is not timed.
    """
    found: list[dict[str, list[float]]] = []
    result: Any = None

    def make(observe: Observe | None) -> None:
        nonlocal result
        with Pipeline.load(compiled, backend="tensorrt-rtx", whole_picture=False, observe=observe) as pipe:
            for index in range(3):
                gpu.journal.clear()
                with gpu.counted() as counts:
                    result = pipe(f"fox {index}", steps=4, cfg=3.0, seed=5)
                counted.update(counts)
                if readings is not None and readings.device is not None:
                    found.append(readings.device.read())

    counted: dict[str, int] = {}
    make(None if readings is None else readings.observe)
    return list(gpu.journal), found, counted, result.images


def test_each_part_is_timed_by_the_devices_own_clock(gpu: Gpu, compiled: Path) -> None:
    _, found, _, _ = pictures(compiled, Readings(), gpu)
    assert found[0] == {TEXT_ENCODER: [3.0], STEP: [7.0] * 4, VAE_DECODER: [4.0]}
    assert found[2] == {TEXT_ENCODER: [3.0], STEP: [7.0] * 4, VAE_DECODER: [4.0]}


def test_timing_waits_for_nothing_and_only_benchmarks_time(gpu: Gpu, compiled: Path) -> None:
    """The same calls in the same order but for the events, none of them a wait, the same pixels; and no event is made
    for a later picture.
    """
    plain, _, without, expected = pictures(compiled, None, gpu)
    timed, _, counted, pixels = pictures(compiled, Readings(), gpu)
    assert [call for call in timed if call not in ("records", "polls")] == [
        call for call in plain if call not in ("records", "polls")
    ]
    own = 1 + 4  # after the picture's inputs went up, and after each model call
    assert without["records"] == own and counted["records"] == own + 2 * (1 + 4 + 1)
    assert {name: n for name, n in counted.items() if name not in ("records", "polls")} == {
        n: v for n, v in without.items() if n not in ("records", "polls")
    }
    first, last = (
        at[0] for at in ([i for i, call in enumerate(order) if call == "launches"] for order in (timed, timed[::-1]))
    )
    assert "syncs" not in timed[first : len(timed) - last]
    assert np.array_equal(pixels, expected)


def test_samples_of_a_gpu_are_among_the_others(gpu: Gpu, compiled: Path) -> None:
    readings = Readings()
    with Pipeline.load(compiled, backend="tensorrt-rtx", observe=readings.observe) as pipe:
        sampler = measure._Sampler(pipe, readings, Request(str(compiled), steps=3, cfg=3.0))
        sampler.picture()
        sampler.picture(keep=True)
    assert sampler.samples["step_gpu_ms"] == [7.0] * 3 and len(sampler.samples["step_ms"]) == 3
    assert (sampler.samples["text_encoder_gpu_ms"], sampler.samples["decode_gpu_ms"]) == ([3.0], [4.0])


@pytest.fixture
def profiled(gpu: Gpu, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Readings]]:
    """A pipeline that has made a picture, and what the instruments kept of it. Copies are small, and take
    their time.
    """
    monkeypatch.setattr(bench_layers, "_RUNS", 2)
    monkeypatch.setattr(layers_tensorrt.device_bytes_per_s, "__defaults__", (4096,))
    readings = Readings(keep=True)
    with Pipeline.load(compiled, backend="tensorrt-rtx", observe=readings.observe) as pipe:
        pipe("sun", steps=2, cfg=3.0, seed=0)
        yield pipe, readings


def test_an_inspector_that_tells_nothing(
    profiled: tuple[Any, Readings], monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    """Then layers have no kinds but what their names say."""
    monkeypatch.setattr(tensorrt_simulator.EngineInspector, "get_engine_information", lambda *_: "")
    pipe, readings = profiled
    found = profile(pipe, readings.kept, {})
    assert found["graphs"][STEP]["slowest"][0]["op"]


def test_layers_of_each_graph(profiled: tuple[Any, Readings], gpu: Gpu, compiled: Path) -> None:
    pipe, readings = profiled
    slots = list(pipe._engine.plans.idle)
    before = gpu.used_bytes()
    gpu.costs_ms["d2d"] = 2.0
    with gpu.counted() as counts:
        found = profile(pipe, readings.kept, {STEP: 8.0})
    assert (
        counts["runs"] == 3 * (1 + 2)
        and "captures" not in counts
        and "launches" not in counts
        and counts["contexts"] == 3
    )
    bundle = open_bundle(compiled)
    for graph, made in found["graphs"].items():
        known = layers(str(bundle.graph(graph, "fp32")))
        assert made["kernels"] == len({name for name, _ in known}) and made["operators_ms"] == pytest.approx(
            COSTS[graph]
        )
        assert made["slowest"][0]["name"] == known[-1][0] and made["slowest"][0]["ms"] == pytest.approx(
            COSTS[graph] * 2 / (len(known) + 1)
        )
    step = found["graphs"][STEP]
    assert (step["ms"], found["graphs"][VAE_DECODER]["ms"]) == (8.0, pytest.approx(4.0))
    assert found["peak"] == {"flops_per_s": None, "bytes_per_s": 2 * 4096 / 2e-3} and found["notes"] == [
        layers_tensorrt.NO_PEAK
    ]
    assert step["share_of_peak"] is None is step["share_of_roofline"] and step["share_of_bandwidth"] == pytest.approx(
        step["bytes_per_s"] / found["peak"]["bytes_per_s"]
    )
    pipe._engine.plans.settle()
    assert gpu.used_bytes() == before and list(pipe._engine.plans.idle) == slots, (
        "nothing of it stays, and captured contexts are as they were"
    )
    assert pipe("sun", steps=2, cfg=3.0, seed=0).engine["cuda_graphs"] is True


def test_arithmetic_is_that_of_the_onnx_graph(profiled: tuple[Any, Readings], compiled: Path, tmp_path: Path) -> None:
    """The step of two branches, counted from the graph by itself."""
    pipe, readings = profiled
    feeds = bench_layers._feeds(pipe.bundle, readings.kept)
    operators = layers_onnxruntime.profile_graph(open_bundle(compiled).graph(STEP, "fp32"), feeds[STEP], 1, tmp_path, 1)
    made = profile(pipe, readings.kept, {})["graphs"][STEP]
    assert made["matrix_flops"] == sum(one.matrix_flops for one in operators) > 1e8
    chosen, fitting = layers_tensorrt.fitted_inputs(pipe._engine.plans, STEP, readings.kept["shape"], feeds[STEP])
    assert chosen == 1 and fitting["noise"].shape[0] == 129 and "concat" not in fitting
    half = layers_tensorrt.arithmetic(pipe.bundle, STEP, fitting, "fp16", tmp_path)
    assert half is not None and half.flops == made["flops"] and half.bytes == made["bytes"] // 2


def test_kinds_of_layers_where_the_plan_tells_them_and_what_is_unknown(
    profiled: tuple[Any, Readings], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ONNX Runtime beside TensorRT no operations are counted; where a copy takes no time on the simulated clock
    no bandwidth is.
    """
    pipe, readings = profiled
    monkeypatch.setattr(layers_tensorrt, "find_spec", lambda _: None)
    named = profile(pipe, readings.kept, {})
    gpu.detailed_plans = True
    detailed = profile(pipe, readings.kept, {})["graphs"][TEXT_ENCODER]["by_kind"]
    assert {"MatMul", "LayerNormalization"} <= {kind["op"] for kind in detailed}
    kinds = named["graphs"][TEXT_ENCODER]["by_kind"]
    assert not any(re.search(r"\d", kind["op"]) for kind in kinds) and sum(kind["share"] for kind in kinds) <= 1 + 1e-9
    assert named["notes"] == [layers_tensorrt.NO_PEAK, layers_tensorrt.NO_ARITHMETIC]
    assert all(
        made["flops"] is None is made["bytes"] is made["share_of_bandwidth"] for made in named["graphs"].values()
    )
    assert named["peak"]["bytes_per_s"] is None


def test_a_profile_that_fails_leaves_the_pipeline_usable(profiled: tuple[Any, Readings], gpu: Gpu) -> None:
    pipe, readings = profiled
    before = gpu.used_bytes()
    gpu.faults.runs[STEP] = 3
    with pytest.raises(MachineError, match="step: TensorRT refused to run"):
        profile(pipe, readings.kept, {})
    pipe._engine.plans.settle()
    assert gpu.used_bytes() == before
    assert pipe("sun", steps=2, cfg=3.0, seed=0).images.shape == (1, 64, 64, 3)


def test_a_full_gpu_has_no_bandwidth_to_tell(profiled: tuple[Any, Readings], gpu: Gpu) -> None:
    plans = profiled[0]._engine.plans
    gpu.costs_ms["d2d"] = 1.0
    for which in (1, 2):
        before = gpu.used_bytes()
        gpu.faults.allocation = which
        assert layers_tensorrt.device_bytes_per_s(plans) is None
        plans.settle()
        assert gpu.used_bytes() <= before
    assert layers_tensorrt.device_bytes_per_s(plans) == 2 * 4096 / 1e-3
