"""How OpenVINO reads, rewrites and compiles one graph: norms in place and filled heads against float64, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import STEP, VAE_DECODER
from sdrt.runtime import openvino_model
from sdrt.runtime.openvino_model import StepShape, compile_graph, import_openvino

ov = import_openvino("tests")
HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16")


def test_what_guidance_branches_share_is_computed_once(flat_bundle: Path) -> None:
    """Up to the first cross-attention the branches of a picture are equal: one picture, not two, passes the first self-attention."""
    opened = open_bundle(flat_bundle)
    step = ov.Core().read_model(str(opened.graph(STEP, "fp32")))
    inputs = StepShape(1, 8, 8, 77, 2, 2).inputs(STEP, opened.manifest)
    step.reshape({name: list(shape) for name, shape in inputs.items()})
    attention = [op for op in step.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention"]
    assert [op.output(0).get_shape()[0] for op in attention] == [1] + [2] * 31


def norm_errors(mean: float, precision: str) -> tuple[float, float]:
    """RMS error of a group norm between two convolutions that change nothing, against float64: of the plugin's own norm, and of ours."""
    op, rng = ov.opset13, np.random.default_rng(0)
    x, gain, bias = ((rng.standard_normal(shape) + offset).astype(np.float32) for shape, offset in (((2, 64, 24, 22), mean), ((64,), 1.0), ((64,), 0.0)))
    if precision == "bf16":  # as a network's activations are
        x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    one = np.eye(64, dtype=np.float32)[:, :, None, None]
    grouped = x.astype(np.float64).reshape(2, 32, -1)
    grouped = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    expected = grouped.reshape(x.shape) * gain[:, None, None] + bias[:, None, None]

    def convolved(value: Any) -> Any:
        return op.convolution(value, op.constant(one), [1, 1], [0, 0], [0, 0], [1, 1])

    errors = []
    for rewritten in (False, True):
        parameter = op.parameter(list(x.shape), np.float32)
        normalised = ov.opset12.group_normalization(convolved(parameter), op.constant(gain), op.constant(bias), 32, 1e-5)
        model = ov.Model([convolved(normalised)], [parameter])
        if rewritten:
            openvino_model._normalise_in_place(ov, model)
        compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        layers = [layer for layer in compiled.get_runtime_model().get_ops() if str(layer.get_rt_info()["layerType"].astype(str)) == "Reorder"]
        moved = sum(tuple(layer.output(0).get_shape()) == x.shape for layer in layers)
        assert (moved > 2) is not rewritten  # to the first convolution's layout and from the last one's is all there should be
        errors.append(float(np.sqrt(np.mean((compiled(x)[0] - expected) ** 2))))
    return errors[0], errors[1]


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_norms_in_place(mean: float) -> None:
    """As exact as float32 allows, also where the mean is a thousand deviations, and without moving pixels between layouts."""
    assert norm_errors(mean, "f32")[1] < 1e-6


@pytest.mark.parametrize(("side", "left"), [(31, 1), (32, 0)])
def test_norms_of_few_values_stay(side: int, left: int) -> None:
    parameter = ov.opset13.parameter([2, 32, side, side], np.float32)
    gain = ov.opset13.constant(np.ones(32, np.float32))
    model = ov.Model([ov.opset12.group_normalization(parameter, gain, gain, 32, 1e-5)], [parameter])
    openvino_model._normalise_in_place(ov, model)
    assert kinds(model).count("GroupNormalization") == left


@needs_bf16
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0, 100.0])
def test_norms_in_place_in_bfloat16(mean: float) -> None:
    """Of the size of the plugin's own error, that of rounding the result, however large the mean: one rounding more, of the scale."""
    theirs, ours = norm_errors(mean, "bf16")
    assert ours < 2 * theirs


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray | None) -> np.ndarray:
    """Attention in float64."""
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) * scale
    weights = np.exp(scores if mask is None else np.where(mask, scores, -np.inf))
    return np.asarray(weights / weights.sum(-1, keepdims=True) @ v)


def attention_graph(queries: int, keys: int, width: int, scale: float | None = None, masked: bool = False, causal: bool = False) -> bytes:
    """An ONNX graph of one Attention with two heads."""
    shapes = {"q": (1, 2, queries, width), "k": (1, 2, keys, width), "v": (1, 2, keys, width)}
    inputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    inputs += [onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, (queries, keys))] * masked
    settings = {"is_causal": int(causal)} | ({} if scale is None else {"scale": scale})
    node = onnx.helper.make_node("Attention", [value.name for value in inputs], ["y"], name="look", **settings)
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shapes["q"])
    graph = onnx.helper.make_graph([node], "attention", inputs, [result])
    return bytes(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10).SerializeToString())


def kinds(model: Any) -> list[str]:
    return [op.get_type_name() for op in model.get_ordered_ops()]


def layers(compiled: Any) -> list[str]:
    return [str(op.get_rt_info()["layerType"].astype(str)) for op in compiled.get_runtime_model().get_ops()]


@pytest.mark.parametrize(
    ("scale", "masked", "causal"), [(None, False, False), (0.3, False, False), (None, True, False), (0.3, True, False), (None, False, True)]
)
@pytest.mark.parametrize("width", [40, 56])
@pytest.mark.parametrize("precision", ["f32", pytest.param("bf16", marks=needs_bf16)])
def test_filled_heads(scale: float | None, masked: bool, causal: bool, width: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attention as in float64, and one operator still."""
    monkeypatch.setattr(openvino_model, "_LONG", 32)
    model = ov.Core().read_model(attention_graph(24, 32, width, scale, masked, causal))
    name = next(op for op in model.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention").get_friendly_name()
    openvino_model._fill_heads(ov, model)
    assert kinds(model).count("Pad") == 3
    (operator,) = [op for op in model.get_ordered_ops() if op.get_type_name() == "ScaledDotProductAttention"]
    assert operator.input_value(0).get_shape()[-1] % 16 == 0
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    assert causal or openvino_model.unfused_attention(compiled, (name,)) == ()
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, rows, width)).astype(np.float32) for rows in (24, 32, 32))
    mask = rng.random((24, 32)) < 0.7 if masked else np.tri(24, 32, dtype=bool) if causal else None
    found = compiled([q, k, v, mask] if masked else [q, k, v])[0]
    error = np.abs(found - attended(q, k, v, width**-0.5 if scale is None else scale, mask)).max()
    assert error < (1e-5 if precision == "f32" else 0.1)


@pytest.mark.parametrize(("width", "keys", "pads"), [(40, 4096, 3), (40, 4095, 0), (8, 4096, 0), (24, 4096, 0), (48, 4096, 0)])
def test_heads_are_left_where_filling_costs_more_than_it_saves(width: int, keys: int, pads: int) -> None:
    model = ov.Core().read_model(attention_graph(8, keys, width))
    openvino_model._fill_heads(ov, model)
    assert kinds(model).count("Pad") == pads


@pytest.mark.parametrize(("precision", "pads"), [("fp32", 0), pytest.param("bf16", 3, marks=needs_bf16)])
def test_engines_fill_heads_in_bfloat16(precision: str, pads: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openvino_model, "_LONG", 32)
    path = tmp_path / "attention.onnx"
    path.write_bytes(attention_graph(24, 32, 40))
    compiled, attention = compile_graph(ov, ov.Core(), path, {"q": (1, 2, 24, 40), "k": (1, 2, 32, 40), "v": (1, 2, 32, 40)}, precision, 1)
    assert layers(compiled).count("Pad") == pads
    assert len(attention) == 1 and openvino_model.unfused_attention(compiled, attention) == ()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_engines_normalise_in_place(flat_bundle: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_bundle(flat_bundle)
    inputs = StepShape(1, 8, 8, 77, 2, 2).inputs(VAE_DECODER, opened.manifest)
    sums = []
    for many in (openvino_model._MANY, 10**9):
        monkeypatch.setattr(openvino_model, "_MANY", many)
        compiled, _ = compile_graph(ov, ov.Core(), opened.graph(VAE_DECODER, "fp32"), inputs, precision, 1)
        sums.append(layers(compiled).count("Reduce"))
    assert sums[0] > sums[1] + 10
