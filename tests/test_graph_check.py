"""No engine sees a graph that builds would not write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from sdrt import graph_check
from sdrt.bundle.folder import file_record, open_bundle
from sdrt.bundle.graphs import STEP
from sdrt.bundle.manifest import MANIFEST, WEIGHTS
from sdrt.cli import app
from sdrt.engine_cache import list_engines, read_plan, write_engine
from sdrt.errors import BundleError
from sdrt.graph_check import check_graph

SIZE_BYTES = 4096


def place(tensor: Any, **entries: str) -> None:
    """Have a tensor say where its numbers lie."""
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")


def model() -> Any:
    """A graph like a build's: a weight in the weights file and a number in the graph."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[4, 8])
    place(weight, location="weights.safetensors", offset="128", length="64")
    nodes = [helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT), helper.make_node("Mul", ["c", "two"], ["y"])]
    graph = helper.make_graph(nodes, "g", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])], [weight])
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(2), "two"))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def weight_at(**entries: str) -> Callable[[Any], Any]:
    return lambda m: place(m.graph.initializer[0], **({"location": "weights.safetensors", "offset": "128", "length": "64"} | entries))


def branch(depth: int) -> Any:
    """A graph of nested Ifs."""
    inner = [branch(depth - 1)] if depth else [helper.make_node("Identity", ["y"], ["z"])]
    graph = helper.make_graph(inner, "inner", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    return helper.make_node("If", ["y"], ["z"], then_branch=graph, else_branch=graph)


def constant_elsewhere(m: Any) -> None:
    tensor = TensorProto(name="k", data_type=TensorProto.FLOAT, dims=[2])
    place(tensor, location="weights.safetensors", offset="0", length="8")
    m.graph.node.append(helper.make_node("Constant", [], ["k"], value=tensor))


def function(m: Any) -> None:
    m.functions.append(helper.make_function("f", "F", ["x"], ["x"], [helper.make_node("Identity", ["x"], ["x"])], m.opset_import))


def endless_loop(m: Any) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", [], [])
    m.graph.node.append(helper.make_node("Loop", ["n", "", "y"], ["z"], body=body))


def sparse(m: Any) -> None:
    m.graph.sparse_initializer.append(onnx.SparseTensorProto())


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an address of the process": (weight_at(location="*/_ORT_MEM_ADDR_/*", offset="94000000000000"), "said to be at"),
    "another file": (weight_at(location="/etc/passwd"), "said to be at"),
    "a folder above": (weight_at(location="../weights.safetensors"), "said to be at"),
    "a base path": (weight_at(basepath="/"), "said to be at"),
    "behind the end": (weight_at(offset="4064"), "which has 4,096"),
    "a large offset": (weight_at(offset="9" * 18), "which has 4,096"),
    "a larger offset": (weight_at(offset="9" * 40), "where a number of bytes"),
    "a negative offset": (weight_at(offset="-1"), "where a number of bytes"),
    "another way to write a number": (weight_at(offset="0x10"), "where a number of bytes"),
    "no length": (lambda m: place(m.graph.initializer[0], location="weights.safetensors", offset="0"), "said to be at"),
    "a length of its own": (weight_at(length="32"), "32 bytes for the shape"),
    "a type that no weight has": (lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.STRING), "of type 8"),
    "many axes": (lambda m: m.graph.initializer[0].dims.extend([2**62] * 100_000), "for the shape"),
    "a place named twice": (lambda m: m.graph.initializer[0].external_data.add(key="location", value="/etc/passwd"), "twice"),
    "numbers here and there": (lambda m: setattr(m.graph.initializer[0], "raw_data", b"x" * 64), "points to a file as well"),
    "a place that is not meant": (lambda m: setattr(m.graph.initializer[0], "data_location", 0), "points to a file as well"),
    "an attribute's numbers elsewhere": (constant_elsewhere, "attribute that points"),
    "a node of another domain": (lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"), "com.microsoft"),
    "operators of another domain": (lambda m: m.opset_import.append(helper.make_opsetid("x", 1)), "operators of 'x'"),
    "a function": (function, "field 25"),
    "an endless loop": (endless_loop, "field 6"),
    "nested branches": (lambda m: m.graph.node.append(branch(12)), "field 6"),
    "sparse weights": (sparse, "field 15"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_b5_what_a_graph_may_not_be(change: str, tmp_path: Path) -> None:
    path, weights, good = tmp_path / "g.onnx", tmp_path / "weights.safetensors", model()
    path.write_bytes(good.SerializeToString())
    check_graph(path, weights, SIZE_BYTES)
    CHANGES[change][0](good)
    path.write_bytes(good.SerializeToString())
    with pytest.raises(BundleError, match=CHANGES[change][1]):
        check_graph(path, weights, SIZE_BYTES)


def damaged(data: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "two graphs": data + model().SerializeToString(),
        "a second graph in the first": data + b"\x3a\x00",
        "cut short": data[:-3],
        "an unknown field": data + b"\xfa\x7f\x01a",
        "a group": data + b"\x3b\x3c",
        "an endless number": data + b"\x08" + b"\xff" * 20,
        "a number where the graph should be": b"\x38\x01",
        "text": b"not a graph",
    }


@pytest.mark.parametrize("how", damaged(b""))
def test_b5_bytes_that_two_readers_would_read_differently(how: str, tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(damaged(model().SerializeToString())[how])
    with pytest.raises(BundleError, match="not a graph that sdrt builds"):
        check_graph(path, tmp_path / "weights.safetensors", SIZE_BYTES)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, weights = tmp_path / "g.onnx", tmp_path / "weights.safetensors"
    path.write_bytes(model().SerializeToString())
    for limit, value, said in (("MAX_NODES", 1, "more than 1 nodes"), ("_MAX_LISTED", 1, "more than 1 inputs"), ("MAX_GRAPH_BYTES", 50, "more than 50 bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(graph_check, limit, value)
            with pytest.raises(BundleError, match=said):
                check_graph(path, weights, SIZE_BYTES)
    with pytest.raises(BundleError, match="expected beside"):
        check_graph(path, tmp_path / "other" / weights.name, SIZE_BYTES)
    with pytest.raises(BundleError, match="cannot be read"):
        check_graph(tmp_path / "missing.onnx", weights, SIZE_BYTES)


def test_every_way_of_cutting_or_changing_a_byte_ends_in_our_error_or_none(tmp_path: Path) -> None:
    path, weights, data = tmp_path / "g.onnx", tmp_path / "weights.safetensors", model().SerializeToString()
    refused = 0
    for at in range(len(data)):
        for changed in (data[:at], data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :], data[:at] + b"\xff\xff\xff\xff" + data[at:]):
            path.write_bytes(changed)
            try:
                check_graph(path, weights, SIZE_BYTES)
            except BundleError:
                refused += 1
    assert refused > len(data)


def with_graph(source: Path, to: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of a bundle whose step graph is changed, and whose manifest agrees."""
    shutil.copytree(source, to)
    manifest = json.loads((to / MANIFEST).read_text())
    path = manifest["graphs"][STEP]["fp32"]["path"]
    stored = onnx.load(str(to / path), load_external_data=False)
    change(stored)
    (to / path).write_bytes(stored.SerializeToString())
    found = file_record(to / path)
    manifest["files"][path] = {"size_bytes": found.size_bytes, "sha256": found.sha256}
    (to / MANIFEST).write_text(json.dumps(manifest))
    return to


def read_memory(m: Any) -> None:
    tensor = next(tensor for tensor in m.graph.initializer if tensor.external_data)
    place(tensor, location="*/_ORT_MEM_ADDR_/*", offset="94000000000000", length=next(e.value for e in tensor.external_data if e.key == "length"))


def test_b5_no_engine_sees_such_a_graph(small_bundle: Path, tmp_path: Path) -> None:
    """Through every door: generating on both CPU engines (one compiled on loading), verifying, compiling for each target."""
    hostile = with_graph(small_bundle, tmp_path / "hostile.sdrt", read_memory)
    run = CliRunner()
    compiled = tmp_path / "compiled.sdrt"
    shutil.copytree(small_bundle, compiled)
    assert run.invoke(app, ["compile", str(compiled), "--target", "openvino", "--branches", "2"]).exit_code == 0
    folder, record = list_engines(open_bundle(compiled))[0]
    opened = open_bundle(hostile)
    graphs = {graph: opened.manifest.files[by["fp32"].path].sha256 for graph, by in opened.manifest.graphs.items()}
    key = replace(record.key, compiler="2026.4.0", graphs=graphs, weights=opened.manifest.files[WEIGHTS].sha256)  # an older version's: compiled again
    write_engine(opened, replace(record, key=key), {graph: read_plan(folder, record, graph) for graph in record.plans})
    for command in (
        ["generate", str(hostile), "x", "--backend", "onnxruntime", "--output", str(tmp_path / "x.png")],
        ["generate", str(hostile), "x", "--backend", "openvino", "--output", str(tmp_path / "x.png")],
        ["verify", str(hostile)],
        ["compile", str(hostile), "--target", "openvino", "--force"],
        ["compile", str(hostile), "--target", "onnxruntime"],
        ["compile", str(hostile), "--target", "tensorrt-rtx", "--precision", "fp32"],
    ):
        done = run.invoke(app, command)
        assert done.exit_code == 4 and "not a graph that sdrt builds" in done.stderr, (command, done.stderr)


def fail_to_run(m: Any) -> None:
    last = m.graph.node[next(i for i, node in enumerate(m.graph.node) if "denoised" in node.output)]
    last.output[list(last.output).index("denoised")] = "before"
    m.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7, 11, 13], np.int64), "sides"))
    m.graph.node.append(helper.make_node("Reshape", ["before", "sides"], ["denoised"]))


def take_other_inputs(m: Any) -> None:
    for node in m.graph.node:
        node.input[:] = ["other" if name == "init_noise" else name for name in node.input]
    next(value for value in m.graph.input if value.name == "init_noise").name = "other"


@pytest.mark.parametrize("change", [fail_to_run, take_other_inputs])
def test_a_graph_that_cannot_run_ends_alike_everywhere(change: Any, small_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not as a bug of ours, and told in our words alone."""
    broken = str(with_graph(small_bundle, tmp_path / "broken.sdrt", change))
    for command in (["generate", broken, "x", "--backend", "onnxruntime", "--output", str(tmp_path / "x.png")], ["verify", broken]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 5 and "ONNX Runtime" in done.stderr, (command, done.stderr)
    assert capfd.readouterr() == ("", "")


def test_every_graph_of_a_build_passes(small_bundle: Path) -> None:
    bundle = open_bundle(small_bundle)
    for graph, by_precision in bundle.manifest.graphs.items():
        for precision in by_precision:
            assert bundle.graph(graph, precision).is_file()
