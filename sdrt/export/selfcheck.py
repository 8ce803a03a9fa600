"""A build's check of itself: that each graph is the trace it was made of with the weights of the bundle, and computes
what these weights make.

The graphs run through ONNX Runtime without optimisations on the smallest picture. The inputs and the float32 graph's
outputs stay in the bundle. `sdrt verify` runs every engine against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from sdrt.bundle.graphs import STEP, TEXT_ENCODER, TOKENS, VAE_DECODER, concrete
from sdrt.bundle.manifest import MIN_SIDE, SIZE_STEP
from sdrt.bundle.onnx_graph import TYPES, OnnxGraph, read_graph, renamed, stored
from sdrt.bundle.reference import compare
from sdrt.errors import CheckFailed, NonFiniteError
from sdrt.export.check_operators import LIMIT, OperatorCheck
from sdrt.export.families.family import END_TOKEN
from sdrt.export.graph import Recipe
from sdrt.export.read.tensor_file import TensorFile
from sdrt.export.run_in_parts import Arrays, run_in_parts
from sdrt.files.publish import new_file

_BUG = "This is a bug in sdrt or in ONNX Runtime; please report it."
_TYPE_OF_CODE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def reference_inputs(recipe: Recipe) -> Arrays:
    """Seeded inputs for one graph at 64x64 pixels: one picture, one guided step, every input in use."""
    random = np.random.RandomState(0)
    side = MIN_SIDE // SIZE_STEP
    sizes = {**recipe.sizes, "N": 1, "G": 2, "S": 1, "n": 1, "h": side, "w": side}
    inputs: Arrays = {}
    for name, tensor in recipe.signature.inputs.items():
        dims = concrete(tensor.shape, sizes)
        if tensor.dtype == "uint8":
            inputs[name] = random.randint(0, 256, dims).astype(np.uint8)
        elif tensor.dtype == "int64":
            inputs[name] = random.randint(0, 40_000, dims) if name in TOKENS else np.zeros(dims, np.int64)
        else:
            inputs[name] = random.standard_normal(dims).astype(np.float32)
    if recipe.graph == STEP:
        # Coefficients of about the size that samplers use, and a half-way inpainting blend, so that no term hides
        # another one.
        inputs |= {"timestep": np.array([500.25], np.float32), "inpaint": np.array([[0.5, 0.7, 0.3]], np.float32)}
        inputs |= {"w": np.array([[-6.0, 7.0]], np.float32), "v": np.array([[-1.0, 1.0]], np.float32)}
        if "guidance" in inputs:
            inputs["guidance"] = np.array([7.5], np.float32)
        inputs["rescale"] = np.array([[0.1, 0.6]], np.float32)
        inputs["mask"] = random.uniform(0, 1, inputs["mask"].shape).astype(np.float32)
        for name in ("a", "u", "M"):
            inputs[name] = inputs[name] * np.float32(0.5)
    elif recipe.graph == TEXT_ENCODER:
        for tokens, spec in zip(TOKENS, recipe.spec, strict=False):
            inputs[tokens][:, -1] = spec.vocabulary - 1  # learned embeddings are the last rows of the token table
            inputs[tokens][:, -9:-5] = END_TOKEN
    elif recipe.graph == VAE_DECODER:
        inputs["rounding"] = np.array([0.5], np.float32)
    return inputs


def check(
    recipe: Recipe,
    skeletons: Mapping[str, bytes],
    weights: TensorFile,
    graphs: Mapping[str, Path],
    reference: Path,
    *,
    full: bool,
) -> dict[str, float]:
    """Check a network's graphs, given by compute type. Write the reference file, and return each graph's largest error.

    Every graph must be its skeleton, with every weight where the weights file has it. The float32 graph runs, its
    operators with weights are evaluated again in numpy, and its outputs must be finite. If `full`, they are compared
    with the network's own, through torch. The other graphs' outputs are compared with them.

    The error of the float32 graph is relative to the network's outputs if `full`, else it is the operators' largest, as
    a share of their limit times that limit. The others' are relative to the float32 graph's outputs.

    Raises:
        NonFiniteError: the network gives NaN or infinite values.
        CheckFailed: a graph is not its skeleton with these weights, or its outputs are wrong.
    """
    for compute, path in graphs.items():
        check_bound(read_graph(skeletons[compute]), path, weights)
    inputs = reference_inputs(recipe)
    path = graphs["fp32"]
    operators = OperatorCheck(read_graph(path.read_bytes()), weights)
    halves = [compute for compute in graphs if compute != "fp32"]
    with _beside([partial(run_in_parts, graphs[compute], inputs) for compute in halves]) as run:
        expected = run_in_parts(path, inputs, operators)
        found = dict(zip(halves, [one.result() for one in run], strict=True))
    for name, array in expected.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            message = (
                f"self-check: {recipe.graph}: {name}: {int((~np.isfinite(array)).sum())} values are NaN or infinite"
            )
            raise NonFiniteError(message, "The checkpoint is damaged or overflows; get another.")
    if not operators.error <= 1.0:
        raise CheckFailed(
            f"self-check: {path.name}: {operators.worst}: {operators.error:.1f} times the largest rounding error from"
            " what its weights give",
            _BUG,
        )
    weighted = read_graph(skeletons["fp32"]).inputs.keys() - recipe.signature.inputs.keys()
    if unseen := weighted - operators.seen:
        raise CheckFailed(f"self-check: {path.name}: {min(unseen)}: no operator takes it", _BUG)
    errors = {"fp32": operators.error * LIMIT}
    if full:
        from sdrt.export.network_outputs import network_outputs

        errors["fp32"] = _compared(path, network_outputs(recipe, weights, inputs), expected, "fp32")
    for compute, outputs in found.items():
        errors[compute] = _compared(graphs[compute], expected, outputs, compute)
    arrays: dict[str, Any] = {f"in.{name}": array for name, array in inputs.items()} | {
        f"out.{name}": array for name, array in expected.items()
    }
    with new_file(reference) as stream:
        np.savez(stream, **arrays)
    return errors


@contextmanager
def _beside(runs: Sequence[Callable[..., Arrays]]) -> Iterator[list[Future[Arrays]]]:
    """Make calls of `run_in_parts` in another thread while the block runs: each keeps one core busy. They end soon
    if the block fails.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as other:
        try:
            yield [other.submit(run, stop=stop) for run in runs]
        except BaseException:
            stop.set()
            raise


def check_bound(skeleton: OnnxGraph, path: Path, weights: TensorFile) -> None:
    """Check that a graph is its skeleton with every weight at the place where the weights file has it.

    Raises:
        CheckFailed: it is not.
    """
    graph = read_graph(path.read_bytes())
    names = skeleton.inputs.keys() - graph.inputs.keys()
    found = {name: stored(graph.constants[name]) for name in names if name in graph.constants}
    for name in sorted(names):
        entry, place = weights.entries[name], found.get(name)
        if place is None or (place.kind, place.shape, place.file, place.offset, place.size_bytes) != (
            TYPES[_TYPE_OF_CODE[entry.dtype]],
            entry.shape,
            weights.path.name,
            entry.offset,
            entry.size_bytes,
        ):
            raise CheckFailed(f"self-check: {path.name}: {name}: not where {weights.path.name} has it", _BUG)
    casts = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.inputs[0] in names}
    casts = {made: name for made, name in casts.items() if made == f"{name}.fp32"}
    graph.nodes = renamed((node for node in graph.nodes if node.outputs[0] not in casts), casts)
    graph.constants = {name: data for name, data in graph.constants.items() if name not in names}
    skeleton.inputs = {name: data for name, data in skeleton.inputs.items() if name not in names}
    if graph.to_bytes() != skeleton.to_bytes():
        raise CheckFailed(f"self-check: {path.name}: differs from the trace that it was made of", _BUG)


def _compared(path: Path, expected: Arrays, found: Arrays, compute: str) -> float:
    """The largest error of outputs. Raises CheckFailed if it is beyond its limit."""
    worst = compare(expected, found, compute)[0]
    if not worst.ok:
        raise CheckFailed(
            f"self-check: {path.name}: {worst.output}: relative error {worst.error:.2e}, expected at most"
            f" {worst.limit:.0e}",
            _BUG
            if compute == "fp32"
            else "The model may overflow in half precision: build with --precision bf16 or fp32.",
        )
    return worst.error
