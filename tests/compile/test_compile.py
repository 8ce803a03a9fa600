"""Compiling: real TensorRT-RTX engines of the emoji model; shapes, errors, and stopping.

Building needs no GPU; running does, so nothing here says that an engine computes the right numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from sdrt.bundle.folder import Bundle, open_bundle
from sdrt.bundle.graphs import GRAPHS, STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from sdrt.bundle.manifest import ENGINES
from sdrt.cli.app import app
from sdrt.compile import tensorrt, worker
from sdrt.compile import tensorrt_network as network
from sdrt.compile.shapes import axes, largest_demand, profiles_of, resolve_shapes
from sdrt.compile.tensorrt import CompileOptions, CompileReport, compile_bundle, open_compiler
from sdrt.compile.tensorrt_network import Built, Compiler, Demand, build_error, build_graph
from sdrt.engines.record import Profile
from sdrt.engines.store import list_engines, mismatch, read_intact, read_plan
from sdrt.errors import BundleError, MachineError, ResourceError, UsageError
from sdrt.machine.cpu import platform_name
from sdrt.machine.gpus import Gpu, Gpus

DEMAND = Demand("the batch of 8", "--batch")


def fresh(bundle: Path, to: Path) -> Path:
    """A copy of a bundle without engines, its files shared."""
    shutil.copytree(bundle, to, copy_function=os.link, ignore=shutil.ignore_patterns(ENGINES))
    return to


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@dataclass(frozen=True)
class Compiled:
    """The emoji bundle compiled by the command, and what the command said."""

    bundle: Path
    said: dict[str, Any]


@pytest.fixture(scope="module")
def compiled(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """For one GPU generation: it takes half a minute as it is."""
    bundle = fresh(flat_bundle, tmp_path_factory.mktemp("compiled") / "flat.sdrt")
    result = run("compile", bundle, "--target", "tensorrt-rtx", "--sm", "89", "--json")
    assert result.exit_code == 0, result.stderr
    return Compiled(bundle, json.loads(result.stdout))


@pytest.fixture
def rtx() -> Compiler:
    return open_compiler("tensorrt-rtx", (89,))


# Real engines


def test_every_graph_compiles(compiled: Compiled) -> None:
    """The build refuses what a CUDA graph could not capture."""
    ((folder, record),) = list_engines(open_bundle(compiled.bundle))
    assert Path(compiled.said["engines"][0]["path"]).name == folder.name
    assert record.plans.keys() == set(GRAPHS)
    assert "require_user_allocation" in record.key.flags


def test_headers_of_real_plans_are_enough_to_ask_about(compiled: Compiled) -> None:
    """Whatever else TensorRT-RTX finds wrong with this machine, as where it has no GPU."""
    import tensorrt_rtx as trt

    ((folder, record),) = list_engines(open_bundle(compiled.bundle))
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    header = read_plan(folder, record, STEP)[: runtime.engine_header_size]
    malformed = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    assert not runtime.get_engine_validity(header)[1] & malformed
    assert runtime.get_engine_validity(bytes(len(header)))[1] & malformed


def test_what_is_recorded(compiled: Compiled) -> None:
    bundle = open_bundle(compiled.bundle)
    ((folder, record),) = list_engines(bundle)
    manifest = bundle.manifest
    assert (record.size, record.batch, record.tokens, record.rows, record.branches) == ((64, 64), 1, 77, 128, (1, 2))
    assert (record.key.target, record.key.device, record.key.platform, record.key.precision) == (
        "tensorrt-rtx",
        "sm_89",
        platform_name(),
        manifest.precision,
    )
    assert (
        mismatch(
            record,
            bundle,
            target="tensorrt-rtx",
            compiler=record.key.compiler,
            gpu="NVIDIA GeForce RTX 4090, sm_89",
            platform=platform_name(),
        )
        == ""
    )
    assert record.weight_bytes == manifest.files["graphs/weights.safetensors"].size_bytes
    assert record.state_bytes > 2 * 8 * 4 * 8 * 8 * 4 + 128 * 4 * 8 * 8 * 4
    for graph in GRAPHS:
        assert record.key.graphs[graph] == manifest.files[manifest.graphs[graph][manifest.precision].path].sha256
        assert record.plans[graph].size_bytes == (folder / f"{graph}.plan").stat().st_size
        assert record.plans[graph].device_memory_bytes is None  # only a GPU that has loaded it can say
        for profile in record.key.profiles[graph]:
            assert profile.shapes.keys() == set(manifest.graphs[graph][manifest.precision].inputs)
    one, two = (profile.shapes for profile in record.key.profiles[STEP])
    assert one["w"] == ((129, 1),) * 3 and two["w"] == ((129, 2),) * 3
    assert one["context"] == ((1, 1, 77, 64),) * 3 and two["context"] == ((1, 2, 77, 64),) * 3
    assert one["noise"] == ((129, 4, 8, 8),) * 3 and one["registers"] == ((1, 8, 4, 8, 8),) * 3
    assert [p.shapes["tokens"] for p in record.key.profiles[TEXT_ENCODER]] == [((1, 77), (2, 77), (2, 77))]
    assert [p.shapes["pixels"] for p in record.key.profiles[VAE_ENCODER]] == [((1, 64, 64, 3),) * 3]


def test_what_the_command_says(compiled: Compiled) -> None:
    bundle, report = compiled.bundle, compiled.said
    (engine,) = report["engines"]
    assert report["bundle"] == str(bundle) and report["pruned"] == []
    assert engine["cached"] is False and engine["key"]["device"] == "sm_89"
    assert engine["graphs"].keys() == set(GRAPHS)
    for made in engine["graphs"].values():
        assert made["build_s"] > 0 and made["layers"] > 100 and made["plan_bytes"] > 10**6
        assert made["peak_bytes"] > made["plan_bytes"]
    assert len(engine["graphs"][STEP]["unfused"]) == 10  # heads of 8 numbers, of 32 layers


def test_an_engine_that_is_there_is_left(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = compiled.bundle
    before = {path: path.stat().st_mtime_ns for path in (bundle / ENGINES).rglob("*")}
    monkeypatch.setattr(worker, "build", lambda *_: pytest.fail("compiled again"))
    result = run("compile", bundle, "--target", "tensorrt-rtx", "--sm", "89")
    assert result.exit_code == 0 and "already there" in result.stderr
    assert "memory on the device: plans with weights" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in (bundle / ENGINES).rglob("*")} == before


def stand_in(monkeypatch: pytest.MonkeyPatch, data: bytes = b"plan") -> list[str]:
    """Let workers compile to fixed bytes; returns the graphs they are asked for, as they come."""
    asked: list[str] = []

    def build(compiler: Compiler, graph: str, *_: object) -> tuple[Built, int]:
        asked.append(graph)
        return Built(memoryview(data), 0.1, 0.2, 300, (), None), 10**9

    monkeypatch.setattr(worker, "build", build)
    return asked


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "step.plan").write_bytes(b"plam"),
        lambda f: (f / "step.plan").unlink(),
        lambda f: (f / "engine.json").write_text("{"),
    ],
)
def test_a_damaged_engine_is_compiled_again(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any]
) -> None:
    asked = stand_in(monkeypatch)
    bundle = open_bundle(fresh(small_bundle, tmp_path / "flat.sdrt"))
    options = CompileOptions("tensorrt-rtx")
    folder = compile_bundle(bundle, options).path
    assert compile_bundle(bundle, options).cached
    damage(folder)
    with pytest.raises(BundleError):
        read_intact(folder)
    again = compile_bundle(bundle, options)
    assert not again.cached and again.path == folder and asked == [*GRAPHS, *GRAPHS]
    assert read_intact(folder) == again.record


def test_force_compiles_again(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = fresh(small_bundle, tmp_path / "flat.sdrt")
    stand_in(monkeypatch)
    first = run("compile", bundle, "--target", "tensorrt-rtx")
    assert first.exit_code == 0 and "sm_86,sm_89,sm_120" in first.stdout
    stand_in(monkeypatch, b"other")
    assert run("compile", bundle, "--target", "tensorrt-rtx", "--force").exit_code == 0
    ((folder, record),) = list_engines(open_bundle(bundle))
    assert read_plan(folder, record, STEP) == b"other"


def test_prune(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    bundle = open_bundle(fresh(small_bundle, tmp_path / "flat.sdrt"))
    good = compile_bundle(bundle, CompileOptions("tensorrt-rtx", sms=(89,))).path
    compiler = tensorrt.open_compiler
    monkeypatch.setattr(tensorrt, "open_compiler", lambda *arguments: replace(compiler(*arguments), version="1.6.0.1"))
    old = compile_bundle(bundle, CompileOptions("tensorrt-rtx", sms=(89,))).path
    listed = {
        engine["engine"]: engine for engine in json.loads(run("inspect", bundle.path, "--json").stdout)["engines"]
    }
    assert listed[good.name]["stale"] is False and listed[good.name]["shapes"] == {
        "size": [[64, 64], [64, 64]],
        "batch": [1, 1],
        "tokens": [77, 77],
        "branches": [1, 2],
    }
    assert (
        listed[old.name]["stale"] is True
        and "built for TensorRT-RTX 1.6.0.1, this machine has 1." in listed[old.name]["why"]
    )
    result = run("compile", bundle.path, "--prune")
    assert result.exit_code == 0 and result.stdout == f"removed {old}\n"
    assert good.is_dir() and not old.exists()
    assert run("compile", bundle.path, "--prune").stdout == "no stale engines\n"


def test_inspect_shows_a_damaged_engine(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    bundle = open_bundle(fresh(small_bundle, tmp_path / "flat.sdrt"))
    folder = compile_bundle(bundle, CompileOptions("tensorrt-rtx", size=((64, 64), (96, 128)), batch=(1, 4))).path
    words = run("inspect", bundle.path, "--all").stdout
    assert "batch: [1, 4]" in words and "stale: False" in words
    (folder / "engine.json").write_text("{")
    (engine,) = json.loads(run("inspect", bundle.path, "--json").stdout)["engines"]
    assert engine["engine"] == folder.name and "not valid JSON" in engine["error"]


# Shapes


def resolved(bundle: Path, **ranges: Any) -> Any:
    return resolve_shapes(open_bundle(bundle).manifest, **ranges)


def test_shapes_by_default_are_the_bundles_own(flat_bundle: Path) -> None:
    shapes = resolved(flat_bundle)
    assert (shapes.width, shapes.height, shapes.batch, shapes.tokens) == ((64,) * 3, (64,) * 3, (1,) * 3, (77,) * 3)


def test_precisions_that_a_bundle_has(small_xl_bundle: Path) -> None:
    """SDXL's VAE has no float16 graph, and needs none for an engine in float16."""
    bundle = open_bundle(small_xl_bundle)
    assert tensorrt._precision(bundle, "tensorrt-rtx", None) == "fp16"
    assert tensorrt._precision(bundle, "tensorrt-rtx", "fp32") == "fp32"
    with pytest.raises(MachineError, match="no bf16 graphs to compile, it has fp16, fp32"):
        tensorrt._precision(bundle, "tensorrt-rtx", "bf16")


def test_an_edit_model_takes_three_branches(flat_bundle: Path) -> None:
    manifest = open_bundle(flat_bundle).manifest
    edits = replace(manifest, latents=replace(manifest.latents, concat_channels=4))
    told = replace(manifest, diffusion=replace(manifest.diffusion, told_guidance=True))
    assert [resolve_shapes(one).branches for one in (manifest, edits, told)] == [(1, 2), (1, 3), (1,)]
    assert resolve_shapes(edits, branches=(2,)).branches == (2,)


def test_the_best_shape_is_the_bundles_own_where_the_range_holds_it(flat_bundle: Path) -> None:
    shapes = resolved(flat_bundle, size=((64, 128), (256, 512)), batch=(2, 4), tokens=(77, 231), branches=(2, 1))
    assert (shapes.width, shapes.height) == ((64, 64, 256), (128, 128, 512))
    assert (shapes.batch, shapes.tokens, shapes.branches) == ((2, 2, 4), (77, 77, 231), (1, 2))


def test_axes(flat_bundle: Path) -> None:
    manifest = open_bundle(flat_bundle).manifest
    shapes = resolve_shapes(manifest, size=((64, 128), (128, 128)), batch=(2, 4), tokens=(77, 154), branches=(1, 3))
    one, three = axes(STEP, shapes, manifest)
    assert one["G"] == (1, 1, 1) and three["G"] == (3, 3, 3)
    assert (one["h"], one["w"], one["N"], one["T"], one["S"]) == (
        (16,) * 3,
        (8, 8, 16),
        (2, 2, 4),
        (77, 77, 154),
        (257, 257, 513),
    )
    assert axes(TEXT_ENCODER, shapes, manifest)[0]["n"] == (1, 3, 6)
    assert axes(VAE_DECODER, shapes, manifest)[0]["N"] == axes(VAE_ENCODER, shapes, manifest)[0]["N"] == (1, 1, 1)


def test_profiles(flat_bundle: Path) -> None:
    manifest = open_bundle(flat_bundle).manifest
    shapes = resolve_shapes(manifest, batch=(1, 2))
    one, two = profiles_of(STEP, shapes, manifest)
    assert one.shapes["context"] == ((1, 1, 77, 64), (1, 1, 77, 64), (2, 1, 77, 64)) and one.shapes["row"] == (
        (1,),
        (1,),
        (2,),
    )
    assert two.shapes["context"] == ((1, 2, 77, 64), (1, 2, 77, 64), (2, 2, 77, 64))
    (encoder,) = profiles_of(VAE_ENCODER, shapes, manifest)
    assert encoder.shapes["pixels"] == ((1, 64, 64, 3),) * 3


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({"size": ((60, 64), (64, 64))}, "multiple of 8"),
        ({"size": ((64, 64), (64, 9000))}, "from 64 to 8192"),
        ({"size": ((128, 64), (64, 64))}, "the range runs from 128 to 64"),
        ({"batch": (0, 1)}, "batch 0: expected 1 to 64"),
        ({"batch": (4, 1)}, "the range runs from 4 to 1"),
        ({"batch": (1, 65)}, "batch 65"),
        ({"tokens": (77, 78)}, "tokens 78: expected a multiple of 77"),
        ({"tokens": (0, 77)}, "tokens 0"),
        ({"branches": ()}, "branches"),
        ({"branches": (1, 1)}, "expected different numbers"),
        ({"branches": (17,)}, "from 1 to 16"),
        ({"rows": 0}, "rows 0"),
    ],
)
def test_shapes_out_of_range(flat_bundle: Path, ranges: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as raised:
        resolved(flat_bundle, **ranges)
    assert words in raised.value.message


@pytest.mark.parametrize(
    ("ranges", "flag"),
    [
        ({}, "--size"),
        ({"size": ((128, 64), (128, 128))}, "--size"),
        ({"batch": (1, 8), "size": ((128, 128), (128, 128))}, "--batch"),
        ({"tokens": (77, 770), "batch": (1, 8)}, "--tokens"),
        ({"branches": (1, 8)}, "--branches"),
    ],
)
def test_the_largest_demand(flat_bundle: Path, ranges: dict[str, Any], flag: str) -> None:
    manifest = open_bundle(flat_bundle).manifest
    assert largest_demand(resolve_shapes(manifest, **ranges), manifest)[1] == flag


def test_ranges_compile(flat_bundle: Path, rtx: Compiler) -> None:
    bundle = open_bundle(flat_bundle)
    path = bundle.graph(VAE_DECODER, bundle.manifest.precision)
    shapes = resolved(flat_bundle, size=((64, 64), (96, 128)), batch=(1, 3))
    profiles = profiles_of(VAE_DECODER, shapes, bundle.manifest)
    assert profiles[0].shapes["latents"] == ((1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 16, 12))
    built, _ = worker.build(rtx, VAE_DECODER, path, profiles, DEMAND, lambda *_: None)
    assert built.plan.nbytes > 10**6


# Attention without a fused kernel


def attention_graph(
    path: Path, *, heads: int, width: int, tokens: int | str = 64, batch: int | str = 1, kind: int = TensorProto.FLOAT16
) -> Path:
    """softmax(q k) v of one input, and a product before it so that there is something to fuse."""
    shape = [batch, heads, tokens, width]
    number = helper.make_tensor(
        "number",
        kind,
        [1],
        np.array([0.5], np.float16 if kind == TensorProto.FLOAT16 else np.float32).tobytes(),
        raw=True,
    )
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "number"], ["q"], name="scale"),
            helper.make_node("Attention", ["q", "x", "x"], ["a"], name="look"),
            helper.make_node("Abs", ["a"], ["y"], name="abs"),
        ],
        "attention",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
        [number],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("sizes", "unfused"),
    [
        ({"heads": 2, "width": 64}, False),
        ({"heads": 2, "width": 12}, False),
        ({"heads": 2, "width": 256}, False),
        ({"heads": 2, "width": 8}, True),
        ({"heads": 1, "width": 512}, True),
        ({"heads": 2, "width": 64, "kind": TensorProto.FLOAT}, True),
        ({"heads": 2, "width": 64, "tokens": "T"}, False),
        ({"heads": 1, "width": 64, "tokens": "T"}, True),
    ],
)
def test_attention_decomposes_only_where_it_must(
    rtx: Compiler, tmp_path: Path, sizes: dict[str, Any], unfused: bool
) -> None:
    path = attention_graph(tmp_path / "attention.onnx", **sizes)
    tokens = (32, 64, 128) if "tokens" in sizes else (64,) * 3
    profile = Profile({"x": tuple((1, sizes["heads"], count, sizes["width"]) for count in tokens)})  # type: ignore[dict-item]
    built, peak_bytes = worker.build(rtx, STEP, path, [profile], DEMAND, lambda *_: None)
    assert built.unfused == (("look",) if unfused else ())
    assert built.plan.nbytes > 1000 and peak_bytes is not None


def test_attention_that_no_rule_foresees(rtx: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first build fails for want of a kernel, the second lets every layer decompose."""
    monkeypatch.setattr(network, "_FUSED_HEAD", range(1, 1000))
    path = attention_graph(tmp_path / "attention.onnx", heads=2, width=8)
    profile = Profile({"x": ((1, 2, 64, 8),) * 3})
    assert build_graph(rtx, STEP, path, [profile], DEMAND, lambda *_: None, Event()).unfused == ("look",)


def evaluated(trt: Any, parsed: Any, given: dict[str, np.ndarray], wanted: str) -> np.ndarray:
    """A tensor of a network in float64, from others by name. Knows the layers that slicing an attention adds."""
    makers = {}
    for layer in (parsed.network.get_layer(i) for i in range(parsed.network.num_layers)):
        makers[layer.get_output(0).name] = layer
    found = dict(given)
    element_wise = {"PROD": np.multiply, "FLOOR_DIV": np.floor_divide, "SUM": np.add, "SUB": np.subtract}

    def value(name: str) -> np.ndarray:
        if name not in found:
            found[name] = made(makers[name])
        return found[name]

    def made(layer: Any) -> np.ndarray:
        kind = layer.type.name
        inputs = [value(layer.get_input(i).name) for i in range(layer.num_inputs)]
        if kind == "SHAPE":
            return np.array(inputs[0].shape)
        if kind == "CONSTANT":
            layer.__class__ = trt.IConstantLayer
            return np.array(layer.weights).reshape(tuple(layer.shape))
        if kind == "ELEMENTWISE":
            layer.__class__ = trt.IElementWiseLayer
            return element_wise[layer.op.name](*inputs)
        if kind == "SLICE":
            tensor, start, size = inputs
            return tensor[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        if kind == "MATRIX_MULTIPLY":
            layer.__class__ = trt.IMatrixMultiplyLayer
            assert layer.op0.name == "NONE"
            return inputs[0] @ (inputs[1].swapaxes(-1, -2) if layer.op1.name == "TRANSPOSE" else inputs[1])
        if kind == "SOFTMAX":
            layer.__class__ = trt.ISoftMaxLayer
            assert layer.axes == 1 << 3
            powers = np.exp(inputs[0] - inputs[0].max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True)
        assert kind == "CONCATENATION", kind
        layer.__class__ = trt.IConcatenationLayer
        return np.concatenate(inputs, layer.axis)

    return value(wanted)


@pytest.mark.parametrize("tokens", [7, 64, 67])
@pytest.mark.parametrize(("free", "slices"), [(True, 3), (True, 5), (False, 4)])
def test_slices_of_queries_are_the_whole_attention(
    rtx: Compiler, tmp_path: Path, free: bool, slices: int, tokens: int
) -> None:
    """To the last bits of float64, with free and with fixed lengths, whether they divide evenly or not."""
    sizes: dict[str, Any] = {"heads": 2, "width": 8, "tokens": "T" if free else tokens}
    parsed = network._parse(rtx, STEP, attention_graph(tmp_path / "attention.onnx", **sizes))
    (attention,) = network._attentions(rtx.trt, parsed.network)
    given = [attention.get_input(i).name for i in range(3)]
    reader = next(
        layer
        for layer in (parsed.network.get_layer(i) for i in range(parsed.network.num_layers))
        if layer.num_inputs == 1 and layer.get_input(0).name == attention.get_output(0).name
    )
    network._slice_queries(rtx.trt, parsed, attention, slices)
    random = np.random.default_rng(0)
    query, key, value = (random.standard_normal((1, 2, tokens, 8)) for _ in range(3))
    scores = np.exp(query @ key.swapaxes(-1, -2))
    whole = scores / scores.sum(-1, keepdims=True) @ value
    found = evaluated(rtx.trt, parsed, dict(zip(given, (query, key, value), strict=True)), reader.get_input(0).name)
    assert found.shape == whole.shape and np.abs(found - whole).max() < 1e-12


def test_scores_are_sliced_where_they_are_large(
    rtx: Compiler, flat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VAE's one head over a range of sizes, and one as wide as Stable Diffusion's at one size: real builds, which
    refuse what cannot be captured.
    """
    bundle = open_bundle(flat_bundle)
    told: list[int] = []
    real = network._slice_queries

    def slice_queries(trt: Any, parsed: Any, attention: Any, slices: int) -> None:
        told.append(slices)
        real(trt, parsed, attention, slices)

    monkeypatch.setattr(network, "_slice_queries", slice_queries)
    shapes = resolved(flat_bundle, size=((64, 64), (96, 128)))
    precision, scores = bundle.manifest.precision, (12 * 16) ** 2 * 2
    cases = [
        (graph, bundle.graph(graph, precision), list(profiles_of(graph, shapes, bundle.manifest)), scores)
        for graph in (VAE_DECODER, VAE_ENCODER)
    ]
    wide = attention_graph(tmp_path / "attention.onnx", heads=1, width=512)
    cases.append((STEP, wide, [Profile({"x": ((1, 1, 64, 512),) * 3})], 64**2 * 2))
    for graph, path, profiles, scores in cases:
        for budget, slices in ((scores, []), (scores // 4, [4])):
            told.clear()
            monkeypatch.setattr(network, "_SCORES_BYTES", budget)
            built = build_graph(rtx, graph, path, profiles, DEMAND, lambda *_: None, Event())
            assert told == slices and len(built.unfused) == 1 and built.plan.nbytes > 1000


def test_masked_attention_is_never_sliced(rtx: Compiler, small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a text encoder, which is short."""
    monkeypatch.setattr(network, "_SCORES_BYTES", 1)
    monkeypatch.setattr(network, "_slice_queries", lambda *_: pytest.fail("sliced"))
    bundle = open_bundle(small_bundle)
    profiles = profiles_of(TEXT_ENCODER, resolved(small_bundle), bundle.manifest)
    assert build_graph(
        rtx, TEXT_ENCODER, bundle.graph(TEXT_ENCODER, "fp32"), profiles, DEMAND, lambda *_: None, Event()
    ).unfused


# What goes wrong


def test_a_graph_the_compiler_cannot_read(rtx: Compiler, tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    graph = helper.make_graph(
        [helper.make_node("GroupNorm", ["x"], ["y"], name="odd one", domain="com.microsoft")],
        "g",
        [text],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    onnx.save(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=10
        ),
        tmp_path / "odd.onnx",
    )
    with pytest.raises(
        MachineError, match=r"odd\.onnx: step: TensorRT-RTX [\d.]+ cannot read node odd one \(GroupNorm\)"
    ):
        worker.build(rtx, STEP, tmp_path / "odd.onnx", [], DEMAND, lambda *_: None)


def test_a_file_that_is_no_graph(rtx: Compiler, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(MachineError, match=r"bad\.onnx: step: TensorRT-RTX [\d.]+ cannot read"):
        worker.build(rtx, STEP, tmp_path / "bad.onnx", [], DEMAND, lambda *_: None)


def test_weights_that_are_gone(small_bundle: Path, rtx: Compiler, tmp_path: Path) -> None:
    bundle = open_bundle(small_bundle)
    shutil.copy(bundle.graph(VAE_DECODER, bundle.manifest.precision), tmp_path / "alone.onnx")
    with pytest.raises(MachineError, match="cannot read"):
        worker.build(rtx, VAE_DECODER, tmp_path / "alone.onnx", [], DEMAND, lambda *_: None)


@pytest.mark.parametrize("file", ["graphs/step.fp16.onnx", "graphs/weights.safetensors"])
def test_a_changed_bundle_is_not_compiled(small_bundle: Path, tmp_path: Path, file: str) -> None:
    bundle = fresh(small_bundle, tmp_path / "flat.sdrt")
    data = bytearray((bundle / file).read_bytes())
    data[-1] ^= 1
    (bundle / file).unlink()
    (bundle / file).write_bytes(data)
    result = run("compile", bundle, "--target", "tensorrt-rtx")
    assert result.exit_code == 4 and f"{file}: changed since the build" in result.stderr
    assert not (bundle / ENGINES).exists()


def test_a_bundle_without_graphs_of_its_precision(small_bundle: Path) -> None:
    bundle = open_bundle(small_bundle)
    components = {name: replace(each, storage="bf16") for name, each in bundle.manifest.components.items()}
    bundle = Bundle(bundle.path, replace(bundle.manifest, components=components))
    with pytest.raises(MachineError, match="no bf16 graphs to compile, it has fp16, fp32"):
        compile_bundle(bundle, CompileOptions("tensorrt-rtx"))


@pytest.mark.parametrize(
    ("gpu", "sms"),
    [("NVIDIA GeForce RTX 2080, sm_75", (75, 86, 89, 120)), ("NVIDIA H200, sm_90", (86, 89, 120)), ("", (86, 89, 120))],
)
def test_generations_by_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gpu: str, sms: tuple[int, ...]
) -> None:
    """This machine's own is among them, so that what is compiled here runs here. Where it cannot, that is said."""
    found = Gpus((Gpu(*gpu.split(", ")),) if gpu else (), "13.0", "")
    monkeypatch.setattr(tensorrt, "probe_gpus", lambda: found)
    assert open_compiler("tensorrt-rtx").sms == sms
    assert open_compiler("tensorrt-rtx", (120,)).sms == (120,)
    words = [record.getMessage() for record in caplog.records]
    assert words == ([f"TensorRT-RTX has no kernels for {gpu}: the engine is for other machines"] * ("90" in gpu))


@pytest.mark.parametrize(("target", "module"), [("tensorrt-rtx", "tensorrt_rtx"), ("tensorrt", "tensorrt")])
def test_the_compiler_is_missing(small_bundle: Path, monkeypatch: pytest.MonkeyPatch, target: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run("compile", small_bundle, "--target", target)
    assert result.exit_code == 5 and f"target {target}: cannot import" in result.stderr
    assert f"pip install '{target}" in result.stderr


def test_the_compiler_lacks_a_library(small_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file: No such file or directory')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    result = run("compile", small_bundle, "--target", "tensorrt")
    assert result.exit_code == 5 and "libnvinfer.so.11" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--target", "tensorrt-rtx", "--sm", "90"], 2, "--target tensorrt"),
        (["--target", "tensorrt-rtx", "--sm", "89;90"], 2, "expected numbers with commas"),
        (["--target", "tensorrt", "--sm", "90"], 2, "Leave --sm out"),
        (["--target", "tensorrt-rtx", "--size", "500x512"], 2, "multiple of 8"),
        (["--target", "tensorrt-rtx", "--size", "512"], 2, "expected WIDTHxHEIGHT"),
        (["--target", "tensorrt-rtx", "--size", "512x512:64x64"], 2, "Write the smaller one first"),
        (["--target", "tensorrt-rtx", "--batch", "0"], 2, "batch 0"),
        (["--target", "tensorrt-rtx", "--batch", "1:2:3"], 2, "--batch 1:4"),
        (["--target", "tensorrt-rtx", "--tokens", "80"], 2, "multiple of 77"),
        (["--target", "tensorrt-rtx", "--branches", "0"], 2, "from 1 to 16"),
        (["--target", "tensorrtx"], 2, "did you mean"),
        (["--target", "openvino", "--sm", "89"], 2, "Leave --sm out"),
        (["--target", "openvino", "--batch", "1:2"], 2, "Give --batch one value"),
        (["--target", "openvino", "--size", "64x64:96x96"], 2, "Give --size one value"),
        (["--target", "openvino", "--tokens", "77:154"], 2, "Give --tokens one value"),
        (["--target", "openvino", "--precision", "fp16"], 2, "bf16 or fp32"),
        ([], 2, "--target: missing"),
    ],
)
def test_bad_options(small_bundle: Path, options: list[str], code: int, words: str) -> None:
    result = run("compile", small_bundle, *options)
    assert result.exit_code == code, result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    assert json.loads(run("compile", small_bundle, *options, "--json").stdout)["error"]["exit_code"] == code


@pytest.mark.parametrize(
    ("lines", "kind", "words"),
    [
        (
            ["[virtualMemoryBuffer.cpp::resizePhysical] Error Code 2: OutOfMemory (no further information)"],
            ResourceError,
            "out of memory",
        ),
        (["x", "CUDA error: out of memory when allocating 123 bytes", "y"], ResourceError, "123 bytes"),
        (["terminate called after throwing an instance of 'std::bad_alloc'"], ResourceError, "bad_alloc"),
        (
            ["Error Code 10: Could not find any implementation for node {ForeignNode[/mid/attn...Add]}."],
            MachineError,
            "{ForeignNode[/mid/attn...Add]}",
        ),
        (["first", "Error Code 1: Myelin (something else\x1b[2J)"], MachineError, "something else\\x1b"),
        ([], MachineError, "no reason given"),
    ],
)
def test_what_a_failed_build_says(lines: list[str], kind: type[Exception], words: str) -> None:
    error = build_error("step: TensorRT 11.4", lines, DEMAND)
    assert type(error) is kind and error.message.startswith("step: TensorRT 11.4: ")
    assert words in error.message and error.message.isprintable()
    if kind is ResourceError or "ForeignNode" in words:
        assert "the batch of 8: lower --batch" in error.fix


def test_no_room_for_the_plan(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    bundle = fresh(small_bundle, tmp_path / "flat.sdrt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))  # type: ignore[attr-defined]
    result = run("compile", bundle, "--target", "tensorrt-rtx")
    assert result.exit_code == 6 and "the engine needs" in result.stderr


# Stopping


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The workers that are started, as they come."""
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(worker.subprocess, "Popen", Recorded)  # type: ignore[attr-defined]
    return started


def decoder(small_bundle: Path) -> tuple[Path, list[Profile]]:
    bundle = open_bundle(small_bundle)
    latents, rounding = (((1, 4, 8, 8),) * 3, ((1,),) * 3)
    return bundle.graph(VAE_DECODER, bundle.manifest.precision), [Profile({"latents": latents, "rounding": rounding})]


def test_i3_a_worker_that_the_system_kills(
    small_bundle: Path, rtx: Compiler, workers: list[subprocess.Popen[bytes]]
) -> None:
    """As the kernel does when memory runs out."""
    with pytest.raises(
        ResourceError, match=r"vae_decoder: TensorRT-RTX [0-9.]+: killed by the system, most likely out of memory"
    ) as raised:
        worker.build(rtx, VAE_DECODER, *decoder(small_bundle), DEMAND, lambda *_: workers[-1].kill())
    assert "the batch of 8: lower --batch" in raised.value.fix


def test_i3_a_worker_that_crashes(small_bundle: Path, rtx: Compiler, workers: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(MachineError, match="ended with exit code -11"):
        worker.build(
            rtx, VAE_DECODER, *decoder(small_bundle), DEMAND, lambda *_: workers[-1].send_signal(signal.SIGSEGV)
        )


def test_a_worker_that_cannot_start(
    small_bundle: Path, rtx: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sdrt.py").write_text("raise SystemError('another package of this name')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MachineError, match="another package of this name"):
        worker.build(rtx, VAE_DECODER, *decoder(small_bundle), DEMAND, lambda *_: None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_of_the_caller_ends_the_worker(
    small_bundle: Path, rtx: Compiler, workers: list[subprocess.Popen[bytes]], error: type[BaseException]
) -> None:
    def progress(graph: str, done: float | None) -> None:
        raise error

    with pytest.raises(error):
        worker.build(rtx, VAE_DECODER, *decoder(small_bundle), DEMAND, progress)
    assert workers[-1].poll() is not None


def test_a_build_stops_at_its_next_step(small_bundle: Path, rtx: Compiler) -> None:
    stop = Event()
    steps: list[float | None] = []

    def progress(graph: str, done: float | None) -> None:
        steps.append(done)
        stop.set()

    with pytest.raises(KeyboardInterrupt):
        build_graph(rtx, VAE_DECODER, *decoder(small_bundle), DEMAND, progress, stop)
    assert len(steps) == 1


def test_progress_that_fails_ends_the_build(small_bundle: Path, rtx: Compiler) -> None:
    """The exception must not pass through TensorRT, and must not get lost."""

    def progress(graph: str, done: float | None) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_graph(rtx, VAE_DECODER, *decoder(small_bundle), DEMAND, progress, Event())


def test_progress_only_grows(small_bundle: Path, rtx: Compiler) -> None:
    seen: list[float] = []
    worker.build(rtx, VAE_DECODER, *decoder(small_bundle), DEMAND, lambda graph, done: seen.append(done or 0.0))
    assert len(seen) > 5 and seen == sorted(seen) and seen[0] > 0 and seen[-1] <= 1


@pytest.fixture
def compiling(flat_bundle: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """`sdrt compile` in the middle of the step's graph: the process, its worker's number, and the bundle."""
    bundle = fresh(flat_bundle, tmp_path / "flat.sdrt")
    command = [sys.executable, "-m", "sdrt", "compile", str(bundle), "--target", "tensorrt-rtx", "--sm", "89"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("compile step"):
                    break
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not (started := children.read_text().split()):
                time.sleep(0.05)
            (child,) = started
            yield process, int(child), bundle
        finally:
            process.kill()


def gone(number: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [False, True])
def test_stopping_the_command(
    compiling: tuple[subprocess.Popen[str], int, Path], number: int, whole_group: bool
) -> None:
    """Ctrl-C in a terminal reaches the whole group, `kill` one process."""
    process, child, bundle = compiling
    (os.killpg if whole_group and number == signal.SIGINT else os.kill)(process.pid, number)
    _, words = process.communicate(timeout=10)
    assert process.returncode == 130 and "interrupted; nothing was left behind" in words
    assert gone(child)
    assert not (bundle / ENGINES).exists()


def test_a_killed_command_leaves_no_worker(compiling: tuple[subprocess.Popen[str], int, Path]) -> None:
    """It stops at the build's next step."""
    process, child, bundle = compiling
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while not gone(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(child)
    assert not (bundle / ENGINES).exists()


# `sdrt build --target`


def test_build_checks_the_compiler_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.chdir(tmp_path)
    result = run("build", "--checkpoint", "missing.safetensors", "--target", "tensorrt-rtx")
    assert result.exit_code == 5 and "cannot import TensorRT-RTX" in result.stderr


def test_build_compiles(
    small_checkpoint: Path, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdrt.export import selfcheck

    ((folder, record),) = list_engines(open_bundle(compiled.bundle))
    seen: list[CompileOptions] = []

    def compile_stand_in(bundle: Bundle, options: CompileOptions, progress: Any, joined: Any = None) -> CompileReport:
        seen.append(options)
        if len(seen) > 1:
            raise ResourceError("step: out of memory", "Lower --batch.")
        return CompileReport(folder, record, False, {})

    monkeypatch.setattr(
        selfcheck,
        "check",
        lambda recipe, weights, graphs, reference: [dict.fromkeys(graphs, 0.0), reference.touch()][0],
    )
    monkeypatch.setattr(tensorrt, "compile_bundle", compile_stand_in)
    options = [
        "build",
        "--checkpoint",
        small_checkpoint,
        "--target",
        "onnxruntime",
        "--target",
        "tensorrt-rtx",
        "--output",
        tmp_path / "a.sdrt",
    ]
    result = run(*options, "--json")
    assert result.exit_code == 0, result.stderr
    assert [engine["path"] for engine in json.loads(result.stdout)["engines"]] == [str(folder)]
    assert seen == [CompileOptions("tensorrt-rtx")]
    failed = run(*options, "--force")
    assert failed.exit_code == 6 and "is built and works; compiling it failed: step: out of memory" in failed.stderr
    assert open_bundle(tmp_path / "a.sdrt").manifest.name == "a"


# Enterprise TensorRT, played by TensorRT-RTX

H100 = "NVIDIA H100 80GB HBM3"
FAKE_TENSORRT = """
import warnings
warnings.simplefilter("ignore")
from tensorrt_rtx import *
import tensorrt_rtx
__version__ = "11.4.0.106"

class BuilderFlag:
    TF32 = tensorrt_rtx.BuilderFlag.TF32

class Engine:
    device_memory_size_v2 = 12345

class Runtime:
    def __init__(self, log):
        pass
    def deserialize_cuda_engine(self, plan):
        return Engine() if len(memoryview(plan)) > 1000 else None

import cuda.core

class Device:
    def __init__(self, index):
        assert index == 1
    def set_current(self):
        import os, pathlib
        with open(pathlib.Path(__file__).parents[2] / "current", "a") as stream:
            print(os.getpid(), file=stream)

cuda.core.Device = Device
"""


@pytest.fixture
def enterprise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A module `tensorrt` that is TensorRT-RTX with an H100, and a cache folder of its own."""
    from cuda import core
    from cuda.bindings import runtime

    (tmp_path / "modules" / "tensorrt").mkdir(parents=True)
    (tmp_path / "modules" / "tensorrt" / "__init__.py").write_text(FAKE_TENSORRT)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(core, "Device", core.Device)  # puts the real one back
    success, properties = runtime.cudaError_t.cudaSuccess, SimpleNamespace(name=H100.encode(), major=9, minor=0)
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (success, 2))
    monkeypatch.setattr(runtime, "cudaGetDeviceProperties", lambda index: (success, properties))
    yield tmp_path
    sys.modules.pop("tensorrt", None)


def test_enterprise(enterprise: Path, small_bundle: Path) -> None:
    """The GPU is in the key, the activations are known at once, and what the build measured is kept for the next."""
    compiler = open_compiler("tensorrt", None, 1)
    assert (compiler.version, compiler.device, compiler.gpu, compiler.sms) == (
        "11.4.0.106",
        "NVIDIA H100 80GB HBM3, sm_90",
        1,
        (),
    )
    assert tensorrt.build_flags(compiler.trt) == ("no_tf32", "no_auxiliary_streams")
    for _ in range(2):
        built, _ = worker.build(compiler, VAE_DECODER, *decoder(small_bundle), DEMAND, lambda *_: None)
        assert built.device_memory_bytes == 12345
        assert [path.name for path in (enterprise / "cache" / "timing").iterdir()] == [
            "11.4.0.106-NVIDIA-H100-80GB-HBM3-sm_90.cache"
        ]
    using = {int(line) for line in (enterprise / "current").read_text().split()}
    assert len(using) == 2 and os.getpid() not in using, "the GPU's memory is for the worker, not for its caller too"


def test_enterprise_without_its_gpu(enterprise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import runtime

    with pytest.raises(MachineError, match="device 2: this machine has 2"):
        open_compiler("tensorrt", None, 2)
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (runtime.cudaError_t.cudaErrorInsufficientDriver, None))
    with pytest.raises(
        MachineError, match=r"compiles on a GPU, and none answers here: .* \(cudaErrorInsufficientDriver\)"
    ) as raised:
        open_compiler("tensorrt")
    assert "--target tensorrt-rtx" in raised.value.fix
