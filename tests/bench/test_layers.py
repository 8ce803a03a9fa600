"""Profiles: arithmetic by hand and against torch's own count, times from the profilers' raw numbers, and both engines
on one model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_documents import ORT_EVENTS, ORT_OPERATORS
from conftest import ROOT

from sdrt.bench import layers
from sdrt.bench.instruments import Readings
from sdrt.bench.layers import analyse, check_backend, machine_peak, profile
from sdrt.bench.layers_openvino import time_of
from sdrt.bench.operators import fitted, matrix_flops, total
from sdrt.errors import MachineError
from sdrt.runtime import Pipeline

PEAK = {"flops_per_s": 1e9, "bytes_per_s": 1e9}


def test_arithmetic_of_operators_by_hand() -> None:
    assert matrix_flops("Conv", [[2, 4, 8, 8], [64, 4, 3, 3], [64]], [[2, 64, 8, 8]]) == 2 * 2 * 64 * 8 * 8 * 4 * 9
    assert matrix_flops("Conv", [[1, 32, 8, 8], [32, 1, 3, 3]], [[1, 32, 8, 8]]) == 2 * 32 * 64 * 9  # depthwise
    assert matrix_flops("MatMul", [[2, 77, 64]], [[2, 77, 128]]) == 2 * 2 * 77 * 128 * 64  # the weight was packed away
    assert matrix_flops("Gemm", [[1, 64], [256, 64], [256]], [[1, 256]]) == 2 * 256 * 64
    assert matrix_flops("FullyConnected", [[2, 64, 32], [512, 32], [512]], [[2, 64, 512]]) == 2 * 2 * 64 * 512 * 32
    assert (
        matrix_flops("Attention", [[1, 2, 10, 8], [1, 2, 20, 8], [1, 2, 20, 8]], [[1, 2, 10, 8]])
        == 2 * 2 * 10 * 20 * 16
    )
    assert matrix_flops("Add", [[4], [4]], [[4]]) is None
    assert matrix_flops("MatMul", [], []) is None


def test_a_profile_of_onnx_runtime_without_its_first_run() -> None:
    from sdrt.bench.layers_onnxruntime import operators_of

    assert operators_of(ORT_EVENTS) == ORT_OPERATORS
    found = analyse(ORT_OPERATORS, total(ORT_OPERATORS), 1.0, PEAK)
    assert [(one["name"], one["ms"]) for one in found["slowest"]] == [("conv", 0.05), ("mm", 0.01), ("add", 0.003)]
    assert found["kernels"] == 3 and sum(one["share"] for one in found["slowest"]) == pytest.approx(1)
    conv, mm, add = 2 * 2 * 64 * 64 * 36, 2 * 2 * 77 * 128 * 64, 2 * 64 * 64
    assert (found["flops"], found["matrix_flops"]) == (conv + mm + add, conv + mm)
    assert found["bytes"] == 2048 + 9472 + 32768 + 39424 + 78848 + 64 * 128 * 4 + 33024 + 32768
    assert found["share_of_peak"] == pytest.approx(found["flops"] / 1e-3 / 1e9)
    assert analyse(ORT_OPERATORS, total(ORT_OPERATORS), None, PEAK)["ms"] == pytest.approx(0.063)


def averages(*runs_us: float) -> list[int]:
    """What OpenVINO's counter says after each run: the average so far, rounded down."""
    return [int(sum(runs_us[: n + 1]) / (n + 1)) for n in range(len(runs_us))]


def test_times_from_openvinos_running_averages() -> None:
    assert time_of(averages(7692, 10, 9, 11, 10, 10)) == pytest.approx(10, abs=1.5)  # the first run warms up
    assert time_of(averages(500, 200, 201, 4200, 199, 202)) == pytest.approx(
        201, abs=6
    )  # a run in which the machine did something else
    assert time_of(averages(3, 2, 2, 2, 2, 2)) == pytest.approx(2, abs=1.5)
    assert time_of(averages(0, 0, 0, 0, 0, 0)) == 0 == time_of([5, 0, 0])


def test_inputs_are_fitted_to_an_engines_shapes() -> None:
    found = fitted(np.arange(6, dtype=np.float32).reshape(2, 3), (4, 2))
    assert found.tolist() == [[0, 1], [3, 4], [3, 4], [3, 4]] and found.dtype == np.float32 and found.flags.c_contiguous


def test_the_machines_peak_is_positive() -> None:
    assert all(value > 0 for value in machine_peak((64,), 1 << 16).values())


def test_a_backend_without_a_profile_is_refused_by_name() -> None:
    with pytest.raises(MachineError, match="--layers: not available yet for onnxruntime-cuda") as caught:
        check_backend("onnxruntime-cuda")
    assert "--backend onnxruntime, openvino, tensorrt-rtx or tensorrt" in caught.value.fix


@pytest.fixture(scope="module")
def profiles(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Profiles of one guided picture of the emoji model, by engine. OpenVINO's takes two pictures at a time and gets
    one.
    """
    pytest.importorskip("openvino")
    from sdrt.bundle.folder import open_bundle
    from sdrt.compile.openvino import compile_bundle
    from sdrt.compile.options import CompileOptions

    path = Path(shutil.copytree(flat_bundle, tmp_path_factory.mktemp("layers") / "flat.sdrt"))
    compile_bundle(
        open_bundle(path),
        CompileOptions("openvino", batch=(2, 2), tokens=(77, 77), branches=(2,), rows=4, precision="fp32"),
    )
    found = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(layers, "machine_peak", lambda: PEAK)
    for backend in ("onnxruntime", "openvino"):
        readings = Readings(keep=True)
        with Pipeline.load(path, backend=backend, threads=1, observe=readings.observe) as pipe:
            pipe("sun", steps=1, cfg=3, seed=0)
            found[backend] = profile(pipe, readings.kept, {"vae_decoder": 2.0})
    patch.undo()
    return found


def test_flops_of_the_decoder_are_those_torch_counts(profiles: dict[str, Any]) -> None:
    """An independent count: torch's own, of the module the graph was traced from."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sdrt.export import trace
    from sdrt.export.graph import recipes
    from sdrt.export.read.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(ROOT / "examples" / "emoji" / "emoji.safetensors")
    checkpoint.close()
    module = trace.module(recipes(checkpoint.architecture)["vae_decoder"]).to_empty(device="cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(latents=torch.zeros(1, 4, 8, 8), rounding=torch.zeros(1))
    found = {backend: made["graphs"]["vae_decoder"]["matrix_flops"] for backend, made in profiles.items()}
    # Torch counts plain multiply-adds, and so do OpenVINO's shapes; ONNX Runtime pads the last convolution's 3 channels
    # to a block of 8 or 16.
    assert found["openvino"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert found["onnxruntime"] == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_both_engines_do_the_same_arithmetic(profiles: dict[str, Any]) -> None:
    onnx, openvino = (profiles[backend]["graphs"] for backend in ("onnxruntime", "openvino"))
    assert openvino["step"]["matrix_flops"] == pytest.approx(2 * onnx["step"]["matrix_flops"], rel=0.02)  # two pictures
    attention = [{one["op"]: one["count"] for one in made["step"]["by_kind"]}["Attention"] for made in (onnx, openvino)]
    assert attention[0] == attention[1] > 0
    for made in openvino.values():
        assert made["kernels"] > 10 and made["slowest"][0]["ms"] > 0 and made["bytes"] > 0 and made["operators_ms"] > 0
        assert sum(kind["share"] for kind in made["by_kind"]) <= 1 + 1e-9
    assert openvino["vae_decoder"]["ms"] == 2.0 == onnx["vae_decoder"]["ms"]
