"""What a network itself computes from the weights of a bundle, through torch: the other side of a full check."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from sdrt.export.graph import Recipe
from sdrt.export.read.tensor_file import TensorFile
from sdrt.export.run_in_parts import Arrays
from sdrt.export.trace import module


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
        value = np.asarray(self._weights.read(name), np.float32)
        return torch.from_numpy(value).reshape(argument.shape)


def network_outputs(recipe: Recipe, weights: TensorFile, inputs: Arrays) -> Arrays:
    """The module's own outputs for the stored, rounded weights, in float32."""
    network = module(recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
        # how a sum is split over threads shows in its last bits, and references are to be equal bytes on any number of
        # cores
    )
    try:
        with torch.inference_mode(), _StoredWeights(network, weights) as stored:
            outputs = network(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    finally:
        torch.set_num_threads(threads)
    assert not stored.unused, f"{recipe.graph}: weights that no operator takes: {', '.join(sorted(stored.unused))}"
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: output.numpy() for name, output in zip(recipe.signature.outputs, outputs, strict=True)}
