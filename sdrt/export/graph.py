"""From a network to an ONNX graph. The network is traced once per architecture into a skeleton without weights, which
is then bound to a weights file.

A skeleton is an ONNX model in which every weight is an input with its canonical name. It is cached in the user's cache
folder (`sdrt.files.cache`), under a key of everything that shapes it. Binding turns these inputs into external data
inside the bundle's weights file.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from sdrt.bundle.graphs import (
    STEP,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Dimensions,
    Shape,
    Signature,
    concrete,
    signatures,
)
from sdrt.export.architecture import NORM_GROUPS, Architecture
from sdrt.export.networks.clip import TextEncoder
from sdrt.export.networks.step import Step
from sdrt.export.networks.vae import VaeDecoder, VaeEncoder
from sdrt.export.precision import HALF, to_half
from sdrt.export.weights import Placed
from sdrt.files.cache import cache_key, cached, is_cached
from sdrt.files.publish import write_file

OPSET = 23
_SOURCES = {
    TEXT_ENCODER: ("export/networks/clip.py", "export/networks/attention.py"),
    STEP: ("export/networks/step.py", "export/networks/unet.py", "export/networks/attention.py"),
    VAE_DECODER: ("export/networks/vae.py", "export/networks/attention.py"),
    VAE_ENCODER: ("export/networks/vae.py", "export/networks/attention.py"),
}
_SOURCES_OF_ALL = ("export/graph.py", "bundle/graphs.py")
"""What shapes a trace besides its architecture. An edit to any of these files makes the graph be traced again."""


@dataclass(frozen=True)
class Recipe:
    """How one graph is made. `spec` has the sizes of its network, or of each of its networks. `sizes` gives each free
    axis a value to trace with. The values differ, so that no two axes look alike by chance.
    """

    graph: str
    spec: Any
    make: Callable[[], nn.Module]
    signature: Signature
    sizes: Mapping[str, int]
    upcast: frozenset[str] = frozenset()
    """Operators that run in float32 in a half-precision graph as well."""

    def module(self) -> nn.Module:
        """The network with its weights not yet allocated (on the meta device)."""
        with torch.device("meta"):
            return self.make().eval()

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.module().named_parameters()}


def model_dimensions(arch: Architecture) -> Dimensions:
    """The sizes of an architecture that the graphs' signatures depend on."""
    channels, factor = arch.vae.latent_channels, 2 ** (len(arch.vae.channels) - 1)
    return Dimensions(
        channels,
        arch.unet.in_channels - channels,
        factor,
        arch.unet.context_width,
        arch.texts[0].tokens,
        arch.texts[0].clip_skip,
        len(arch.texts),
        arch.vector.pooled,
        arch.vector.numbers,
        arch.unet.guidance_width > 0,
    )


def recipes(arch: Architecture) -> dict[str, Recipe]:
    """The four graphs of a Stable Diffusion model, by name."""
    known = signatures(model_dimensions(arch))
    sizes = {"N": 3, "G": 2, "S": 5, "h": 16, "w": 24, "T": arch.texts[0].tokens, "n": 4}
    networks: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
        TEXT_ENCODER: (arch.texts, lambda: TextEncoder(arch.texts)),
        STEP: (arch.unet, lambda: Step(arch.unet)),
        VAE_DECODER: (arch.vae, lambda: VaeDecoder(arch.vae)),
        VAE_ENCODER: (arch.vae, lambda: VaeEncoder(arch.vae)),
    }
    upcast = {STEP: frozenset({"Attention"})} if arch.unet.upcast_attention else {}
    return {
        graph: Recipe(graph, spec, make, known[graph], sizes, upcast.get(graph, frozenset()))
        for graph, (spec, make) in networks.items()
    }


def weight_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight of an architecture's graphs by its canonical name."""
    return {name: shape for recipe in recipes(arch).values() for name, shape in recipe.weight_shapes().items()}


def trace(recipe: Recipe) -> ir.Model:
    """Trace a network into a skeleton. Its weights are allocated but never written, so they take address space, but no
    memory.
    """
    module = recipe.module().to_empty(device="cpu")
    inputs = recipe.signature.inputs
    example = {
        name: torch.zeros(concrete(tensor.shape, recipe.sizes), dtype=getattr(torch, tensor.dtype))
        for name, tensor in inputs.items()
    }
    dynamic = {name: _dynamic_axes(tensor.shape) for name, tensor in inputs.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        exported = torch.export.export(module, (), kwargs=example, dynamic_shapes=dynamic, strict=False)
        program = torch.onnx.export(
            exported, (), kwargs=example, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )
        assert program is not None
        return _skeleton(program.model, recipe, set(dict(module.named_parameters())))


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


def is_traced(recipe: Recipe) -> bool:
    """Whether the skeleton of a graph is in the cache, so that `skeleton` need not trace it."""
    return is_cached("graphs", _cache_key(recipe))


def skeleton(recipe: Recipe) -> tuple[ir.Model, bool]:
    """The skeleton of a graph, from the cache, or traced and then cached. The flag says whether it came from the
    cache.
    """
    data, hit = cached(
        "graphs", _cache_key(recipe), lambda: ir.to_proto(trace(recipe)).SerializeToString(deterministic=True)
    )
    return ir.from_proto(_parse(data)), hit


def _parse(data: bytes) -> Any:
    import onnx

    return onnx.ModelProto.FromString(data)


def _cache_key(recipe: Recipe) -> str:
    package = Path(__file__).parents[1]
    specs = [asdict(spec) for spec in (recipe.spec if isinstance(recipe.spec, tuple) else (recipe.spec,))]
    for spec in specs:
        # No trace depends on the number of rows of the token table: binding gives the table its shape.
        spec.pop("vocabulary", None)
    parts = {
        "graph": recipe.graph,
        "specs": specs,
        "opset": OPSET,
        "norm_groups": NORM_GROUPS,
        "tools": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnx_ir")},
        "sources": {
            name: hashlib.sha256((package / name).read_bytes()).hexdigest()
            for name in (*_SOURCES[recipe.graph], *_SOURCES_OF_ALL)
        },
    }
    return cache_key(parts)


def bind(
    model: ir.Model,
    weights_file: Path,
    placed: Mapping[str, Placed],
    precision: str,
    compute: str,
    path: Path,
    upcast: Set[str] = frozenset(),
) -> None:
    """Write the graph to `path`, with its weight inputs pointing into `weights_file` in the same folder. Changes
    `model`.

    `precision` is the type of the stored weights. `compute` is the type that the network runs in
    (`sdrt.export.precision`): float32 or the stored type. Operators of the kinds in `upcast` run in float32 in either.
    Weights stored in a smaller type than the compute type are cast where they enter; an engine folds these casts when
    it loads.
    """
    stored = {"fp32": ir.DataType.FLOAT, **HALF}[precision]
    graph = model.graph
    if compute != "fp32":
        assert compute == precision, "half-precision graphs run in the stored type"
        to_half(model, set(placed), compute, upcast)
    casts = []
    for value in [v for v in graph.inputs if v.name in placed]:
        assert value.name is not None
        place = placed[value.name]
        tensor = ir.ExternalTensor(
            weights_file.name,
            place.offset,
            place.size_bytes,
            stored,
            shape=ir.Shape(place.shape),
            name=value.name,
            base_dir=weights_file.parent,
        )
        weight = ir.Value(name=value.name, shape=ir.Shape(place.shape), type=ir.TensorType(stored), const_value=tensor)
        graph.inputs.remove(value)
        if value.dtype == stored:
            ir.convenience.replace_all_uses_with(value, weight)
        else:
            cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"{value.name}.cast")
            cast.outputs[0].name = f"{value.name}.fp32"
            casts.append(cast)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.initializers[value.name] = weight
    if casts:
        graph.insert_before(graph[0], casts)
    for node in graph:
        for value in node.outputs:
            if value not in graph.outputs:
                value.type = None
    write_file(path, ir.to_proto(model).SerializeToString(deterministic=True))
