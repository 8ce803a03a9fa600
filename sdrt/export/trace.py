"""Traces a network: from a module to a graph without weights. Imports torch."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER, Shape, concrete
from sdrt.bundle.onnx_graph import read_graph
from sdrt.export.graph import OPSET, Recipe
from sdrt.export.networks.clip import TextEncoder
from sdrt.export.networks.step import Step
from sdrt.export.networks.vae import VaeDecoder, VaeEncoder
from sdrt.export.precision import HALF, to_half

_NETWORKS = {TEXT_ENCODER: TextEncoder, STEP: Step, VAE_DECODER: VaeDecoder, VAE_ENCODER: VaeEncoder}


def module(recipe: Recipe) -> nn.Module:
    """The network of a graph with its weights not yet allocated (on the meta device)."""
    with torch.device("meta"):
        network: nn.Module = _NETWORKS[recipe.graph](recipe.spec)
        return network.eval()


def weight_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every weight of a network by its canonical name."""
    return {name: tuple(weight.shape) for name, weight in network.named_parameters()}


def trace(recipe: Recipe, network: nn.Module | None = None) -> dict[str, bytes]:
    """Trace a network into its skeletons, by the type they compute in. `network`, on the meta device, is by default the
    recipe's own.
    """
    network = module(recipe) if network is None else network
    model, weights = _traced(recipe, network), set(weight_shapes(network))
    skeletons = {"fp32": _bytes(model)}
    for precision in HALF:
        half = model.clone()
        to_half(half, weights, precision, recipe.upcast)
        skeletons[precision] = _bytes(half)
    return skeletons


def _bytes(model: ir.Model) -> bytes:
    return read_graph(ir.to_proto(model).SerializeToString(deterministic=True)).to_bytes()


def _traced(recipe: Recipe, network: nn.Module) -> ir.Model:
    """The float32 skeleton. The network's weights are allocated but never written, so they take address space, but no
    memory.
    """
    network = network.to_empty(device="cpu")
    inputs = recipe.signature.inputs
    example = {
        name: torch.zeros(concrete(tensor.shape, recipe.sizes), dtype=getattr(torch, tensor.dtype))
        for name, tensor in inputs.items()
    }
    dynamic = {name: _dynamic_axes(tensor.shape) for name, tensor in inputs.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        exported = torch.export.export(network, (), kwargs=example, dynamic_shapes=dynamic, strict=False)
        program = torch.onnx.export(
            exported, (), kwargs=example, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )
        assert program is not None
        return _skeleton(program.model, recipe, set(dict(network.named_parameters())))


def _dynamic_axes(shape: Shape) -> dict[int, Any]:
    return {axis: Dim.AUTO for axis, size in enumerate(shape) if isinstance(size, str)}


def _skeleton(model: ir.Model, recipe: Recipe, weights: set[str]) -> ir.Model:
    """Turn weights into inputs before folding, so that the optimiser can neither fold nor rename them."""
    from onnxscript import optimizer

    graph = model.graph
    for name in [name for name in graph.initializers if name in weights]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize_ir(model, num_iterations=2)
    inputs, outputs = recipe.signature.inputs, recipe.signature.outputs
    for values, tensors in ((graph.inputs[: len(inputs)], inputs), (graph.outputs, outputs)):
        for value, (name, tensor) in zip(values, tensors.items(), strict=True):
            value.name = name
            value.shape = ir.Shape(tensor.shape)
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if (
                value not in kept
            ):  # the shapes of intermediate values name the tracer's symbols; engines infer these shapes again
                value.shape = None
    for value in kept:
        value.metadata_props.clear()
        value.doc_string = None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name, model.producer_name, model.producer_version = recipe.graph, "sdrt", None
    model.functions.clear()
    return model
