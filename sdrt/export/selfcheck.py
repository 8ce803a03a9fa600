"""A build's check of itself. Each graph runs through ONNX Runtime and is compared with the module it was traced from,
on the smallest picture.

The inputs and the module's outputs stay in the bundle. `sdrt verify` runs every engine against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from sdrt.bundle.graphs import STEP, TEXT_ENCODER, TOKENS, VAE_DECODER, concrete
from sdrt.bundle.manifest import MIN_SIDE, SIZE_STEP
from sdrt.bundle.reference import compare
from sdrt.errors import CheckFailed, NonFiniteError
from sdrt.export.families.family import END_TOKEN
from sdrt.export.graph import Recipe
from sdrt.export.read.tensor_file import TensorFile
from sdrt.export.run_in_parts import Arrays, run_in_parts
from sdrt.files.publish import new_file


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


class _StoredWeights(TorchFunctionMode):
    """Hands every operator its weights, read from the file in float32, and keeps none of them. So a network takes only
    the memory of its largest layer.

    Meanwhile the module stays on the meta device, as it was made. If an operator took a weight in a way that is not
    seen here, the weight would meet the activations as a meta tensor, which torch refuses. `unused` are the weights
    that no operator has taken.
    """

    def __init__(self, module: torch.nn.Module, weights: TensorFile) -> None:
        super().__init__()
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._weights = weights
        self.unused = set(self._names.values())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(self._value, args), **{key: self._value(value) for key, value in (kwargs or {}).items()})

    def _value(self, argument: Any) -> Any:
        name = self._names.get(argument) if isinstance(argument, torch.nn.Parameter) else None
        if name is None:
            return argument
        self.unused.discard(name)
        return self._weights.read(name).to(torch.float32).reshape(argument.shape)


def module_outputs(recipe: Recipe, weights: TensorFile, inputs: Arrays) -> Arrays:
    """The module's own outputs for the stored, rounded weights, in float32."""
    module = recipe.module()
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
        # how a sum is split over threads shows in its last bits, and references are to be equal bytes on any number of
        # cores
    )
    try:
        with torch.inference_mode(), _StoredWeights(module, weights) as stored:
            outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    finally:
        torch.set_num_threads(threads)
    assert not stored.unused, f"{recipe.graph}: weights that no operator takes: {', '.join(sorted(stored.unused))}"
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: output.numpy() for name, output in zip(recipe.signature.outputs, outputs, strict=True)}


def check(recipe: Recipe, weights: TensorFile, graphs: Mapping[str, Path], reference: Path) -> dict[str, float]:
    """Run a network and its graphs, given by compute type. Write the reference file, and return each graph's largest
    error.

    Raises:
        NonFiniteError: the network gives NaN or infinite values.
        CheckFailed: a graph differs from the network.
    """
    inputs = reference_inputs(recipe)
    expected = module_outputs(recipe, weights, inputs)
    for name, array in expected.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            message = (
                f"self-check: {recipe.graph}: {name}: {int((~np.isfinite(array)).sum())} values are NaN or infinite"
            )
            raise NonFiniteError(message, "The checkpoint is damaged or overflows; get another.")
    errors = {}
    for compute, path in graphs.items():
        worst = compare(expected, run_in_parts(path, inputs), compute)[0]
        if not worst.ok:
            message = (
                f"self-check: {path.name}: {worst.output}: relative error {worst.error:.2e}, expected at most"
                f" {worst.limit:.0e}"
            )
            fix = "This is a bug in sdrt or in ONNX Runtime; please report it."
            raise CheckFailed(
                message,
                (
                    fix
                    if compute == "fp32"
                    else "The model may overflow in half precision: build with --precision bf16 or fp32."
                ),
            )
        errors[compute] = worst.error
    arrays: dict[str, Any] = {f"in.{name}": array for name, array in inputs.items()} | {
        f"out.{name}": array for name, array in expected.items()
    }
    with new_file(reference) as stream:
        np.savez(stream, **arrays)
    return errors
