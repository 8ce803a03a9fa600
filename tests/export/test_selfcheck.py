"""What a build's check of itself finds: weights that were tampered with, swapped or transposed, each in more than one
way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINT

from sdrt.bundle.graphs import GRAPHS, STEP, TEXT_ENCODER, VAE_DECODER
from sdrt.bundle.manifest import WEIGHTS
from sdrt.bundle.onnx_graph import OnnxGraph, read_graph, renamed, stored, stored_tensor
from sdrt.bundle.reference import compare
from sdrt.errors import CheckFailed
from sdrt.export import build as build_module
from sdrt.export.build import BuildOptions, build
from sdrt.export.check_operators import OperatorCheck
from sdrt.export.graph import Recipe, recipes
from sdrt.export.network_outputs import network_outputs
from sdrt.export.read.checkpoint import open_checkpoint
from sdrt.export.read.tensor_file import TensorFile, open_tensor_file
from sdrt.export.run_in_parts import run_in_parts
from sdrt.export.selfcheck import check_bound, reference_inputs
from sdrt.export.skeletons import skeletons, weights_of


@dataclass(frozen=True)
class Bound:
    """A graph of the emoji model that may be spoiled, and what it belongs to."""

    recipe: Recipe
    path: Path
    weights: TensorFile

    def spoil(self, change: Callable[[OnnxGraph], Any]) -> None:
        graph = read_graph(self.path.read_bytes())
        change(graph)
        self.path.write_bytes(graph.to_bytes())

    def by_structure(self) -> None:
        check_bound(read_graph(skeletons(self.recipe)[0]["fp32"]), self.path, self.weights)

    def by_operators(self) -> tuple[float, str]:
        operators = OperatorCheck(read_graph(self.path.read_bytes()), self.weights)
        run_in_parts(self.path, reference_inputs(self.recipe), operators)
        assert operators.seen == weights_of(self.recipe).keys()
        return operators.error, operators.worst

    def by_network(self) -> bool:
        inputs = reference_inputs(self.recipe)
        return compare(network_outputs(self.recipe, self.weights, inputs), run_in_parts(self.path, inputs), "fp32")[
            0
        ].ok


@pytest.fixture
def bound(flat_bundle: Path, tmp_path: Path) -> Iterator[Callable[[str], Bound]]:
    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    weights = tmp_path / Path(WEIGHTS).name
    shutil.copy(flat_bundle / WEIGHTS, weights)
    with open_tensor_file(weights) as file:

        def one(graph: str) -> Bound:
            path = tmp_path / f"{graph}.onnx"
            shutil.copy(flat_bundle / "graphs" / f"{graph}.fp32.onnx", path)
            return Bound(recipes(checkpoint.architecture)[graph], path, file)

        yield one


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_good_graph_passes_with_every_weight_seen(bound: Callable[[str], Bound], graph: str) -> None:
    good = bound(graph)
    good.by_structure()
    assert good.by_operators()[0] < 0.5


BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."
LAYER = "cond_stage_model.transformer.text_model.encoder.layers."
SWAPPED = {
    "matrices": (STEP, BLOCK + "attn1.to_q.weight", BLOCK + "attn1.to_k.weight"),
    "biases": (TEXT_ENCODER, LAYER + "0.mlp.fc1.bias", LAYER + "1.mlp.fc1.bias"),
    "norms": (STEP, BLOCK + "norm1.weight", BLOCK + "norm2.weight"),
    "kernels": (
        VAE_DECODER,
        "first_stage_model.decoder.mid.block_1.conv1.weight",
        "first_stage_model.decoder.mid.block_2.conv1.weight",
    ),
}


@pytest.mark.parametrize(("graph", "one", "other"), SWAPPED.values(), ids=SWAPPED.keys())
def test_swapped_weights_are_seen_in_three_ways(
    bound: Callable[[str], Bound], graph: str, one: str, other: str
) -> None:
    wrong = bound(graph)

    def swap(graph: OnnxGraph) -> None:
        for name, taken in ((one, other), (other, one)):
            entry = wrong.weights.entries[taken]
            graph.constants[name] = stored_tensor(
                name, "float16", entry.shape, wrong.weights.path.name, entry.offset, entry.size_bytes
            )

    wrong.spoil(swap)
    with pytest.raises(CheckFailed, match=f"{min(one, other)}: not where"):
        wrong.by_structure()
    error, worst = wrong.by_operators()
    assert error > 10 and (one in worst or other in worst)
    assert not wrong.by_network()


def test_a_transposed_weight_is_seen_in_three_ways(bound: Callable[[str], Bound]) -> None:
    wrong, name = bound(TEXT_ENCODER), LAYER + "1.self_attn.q_proj.weight"

    def transpose(graph: OnnxGraph) -> None:
        (made,) = (n.outputs[0] for n in graph.nodes if n.operator == "Transpose" and n.inputs == (f"{name}.fp32",))
        graph.nodes = renamed((n for n in graph.nodes if n.outputs[0] != made), {made: f"{name}.fp32"})

    wrong.spoil(transpose)
    with pytest.raises(CheckFailed, match="differs from the trace"):
        wrong.by_structure()
    error, worst = wrong.by_operators()
    assert error > 10 and worst == f"MatMul of {name}"
    assert not wrong.by_network()


def test_an_operator_that_was_changed_is_seen(bound: Callable[[str], Bound]) -> None:
    """One that has no weight: only the trace and the network tell."""
    wrong = bound(TEXT_ENCODER)

    def change(graph: OnnxGraph) -> None:
        graph.nodes = [
            replace(node, operator="Softplus") if node.operator == "Sigmoid" else node for node in graph.nodes
        ]

    wrong.spoil(change)
    with pytest.raises(CheckFailed, match="differs from the trace"):
        wrong.by_structure()
    assert not wrong.by_network()


@pytest.mark.parametrize("check", ["quick", "full"])
def test_weights_that_changed_on_the_disk_fail_the_build(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    bind = build_module.bind

    def tampering(graph: OnnxGraph, weights_file: Path, *rest: Any) -> None:
        bind(graph, weights_file, *rest)
        data = bytearray(weights_file.read_bytes())
        data[-100:] = bytes(100)
        weights_file.write_bytes(data)

    monkeypatch.setattr(build_module, "bind", tampering)
    with pytest.raises(CheckFailed, match=r"weights\.safetensors: is not what was written"):
        build(BuildOptions(small_checkpoint, output=tmp_path / "out" / "x.sdrt", check=check))
    assert not list((tmp_path / "out").glob("*"))


def test_operators_are_evaluated_as_written(bound: Callable[[str], Bound]) -> None:
    """The smallest change of one weight that is larger than rounding shows: here of one convolution's bias."""
    good = bound(VAE_DECODER)
    name = "first_stage_model.decoder.conv_in.bias"
    entry = good.weights.entries[name]
    place = stored(read_graph(good.path.read_bytes()).constants[name])
    assert place is not None and place.offset == entry.offset
    file = good.path.parent / "moved.bin"
    values = np.asarray(good.weights.read(name), np.float16) + np.float16(0.01)
    file.write_bytes(values.tobytes())

    def move(graph: OnnxGraph) -> None:
        graph.constants[name] = stored_tensor(name, "float16", entry.shape, file.name, 0, entry.size_bytes)

    good.spoil(move)
    assert good.by_operators()[1] == "Conv of first_stage_model.decoder.conv_in.weight"
    assert good.by_operators()[0] > 1
