"""From an architecture to the ONNX graphs of a bundle. Imports no torch where a trace is at hand.

A network is traced once per architecture into skeletons: graphs in which every weight is an input with its canonical
name, one for each type that the network may compute in. Those of published models come with sdrt
(`sdrt.export.traces`); others are traced (`sdrt.export.trace`) and kept in the user's cache folder
(`sdrt.files.cache`). Binding turns the weights into external data inside the bundle's weights file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdrt.bundle.graphs import (
    STEP,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Dimensions,
    Signature,
    signatures,
)
from sdrt.bundle.onnx_graph import (
    TYPES,
    Node,
    OnnxGraph,
    number_attribute,
    read_graph,
    renamed,
    stored_tensor,
    type_and_shape,
)
from sdrt.export import traces
from sdrt.export.architecture import NORM_GROUPS, Architecture
from sdrt.export.weights import Placed
from sdrt.files.cache import cache_key, cached, is_cached
from sdrt.files.publish import write_file

if TYPE_CHECKING:
    from torch import nn

OPSET = 23
_TYPE_OF = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Recipe:
    """How one graph is made. `spec` has the sizes of its network, or of each of its networks. `sizes` gives each free
    axis a value to trace with. The values differ, so that no two axes look alike by chance.
    """

    graph: str
    spec: Any
    signature: Signature
    sizes: Mapping[str, int]
    upcast: frozenset[str] = frozenset()
    """Operators that run in float32 in a half-precision graph as well."""

    def module(self) -> nn.Module:
        """The network with its weights not yet allocated. Imports torch."""
        from sdrt.export.trace import module

        return module(self)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight by its canonical name. Imports torch only where no trace comes with sdrt.

        Raises:
            NoTraceError: torch is needed and not installed.
        """
        if (shipped := traces.shipped(self.key())) is None:
            self.require_torch()
            from sdrt.export.trace import weight_shapes

            return weight_shapes(self.module())
        inputs = read_graph(shipped["fp32"]).inputs
        shapes = {name: type_and_shape(data)[1] for name, data in inputs.items() if name not in self.signature.inputs}
        found = {name: tuple(map(int, shape)) for name, shape in shapes.items()}
        if self.graph == TEXT_ENCODER:  # no trace depends on the number of rows of the token tables
            tables = sorted(name for name in found if name.endswith("token_embedding.weight"))
            found |= {name: (spec.vocabulary, spec.width) for name, spec in zip(tables, self.spec, strict=True)}
        return found

    def key(self) -> dict[str, Any]:
        """Everything that shapes the trace but the sources of the network and the tools."""
        specs = [asdict(spec) for spec in (self.spec if isinstance(self.spec, tuple) else (self.spec,))]
        for spec in specs:
            for told_otherwise in ("vocabulary", "pad"):
                spec.pop(told_otherwise, None)
        return {
            "graph": self.graph,
            "specs": specs,
            "inputs": {name: [tensor.shape, tensor.dtype] for name, tensor in self.signature.inputs.items()},
            "outputs": {name: [tensor.shape, tensor.dtype] for name, tensor in self.signature.outputs.items()},
            "opset": OPSET,
            "norm_groups": NORM_GROUPS,
        }

    def is_shipped(self) -> bool:
        """Whether its trace comes with sdrt."""
        return traces.shipped(self.key()) is not None

    def require_torch(self) -> None:
        """Raise NoTraceError if torch is not installed. It says what no published model has."""
        if _tools() is None:
            raise traces.no_trace(self.key())


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
    specs = {TEXT_ENCODER: arch.texts, STEP: arch.unet, VAE_DECODER: arch.vae, VAE_ENCODER: arch.vae}
    upcast = {STEP: frozenset({"Attention"})} if arch.unet.upcast_attention else {}
    return {
        graph: Recipe(graph, spec, known[graph], sizes, upcast.get(graph, frozenset())) for graph, spec in specs.items()
    }


def weight_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight of an architecture's graphs by its canonical name."""
    return {name: shape for recipe in recipes(arch).values() for name, shape in recipe.weight_shapes().items()}


def at_hand(recipe: Recipe) -> bool:
    """Whether the skeletons of a graph come with sdrt or are in the cache, so that nothing need be traced."""
    key = _cache_key(recipe)
    return recipe.is_shipped() or (key is not None and is_cached("graphs", key))


def skeletons(recipe: Recipe) -> tuple[dict[str, bytes], bool]:
    """The skeletons of a graph by the type they compute in: those that come with sdrt, those in the cache, or new ones,
    which are then cached. The flag says whether they were at hand.

    Raises:
        NoTraceError: torch is needed and not installed.
    """
    if (shipped := traces.shipped(recipe.key())) is not None:
        return shipped, True
    if (key := _cache_key(recipe)) is None:
        raise traces.no_trace(recipe.key())

    def make() -> bytes:
        from sdrt.export.trace import trace

        return traces.packed(trace(recipe))

    data, hit = cached("graphs", key, make)
    return traces.unpacked(data), hit


def _tools() -> dict[str, str] | None:
    """The versions of the tools that trace. None if one is not installed."""
    names = ("torch", "onnx", "onnxscript", "onnx_ir")
    try:
        return {name: version(name) for name in names} if all(map(find_spec, names)) else None
    except (PackageNotFoundError, ImportError):
        return None


def _cache_key(recipe: Recipe) -> str | None:
    tools = _tools()
    if tools is None:
        return None
    return cache_key({**recipe.key(), "tools": tools, "sources": traces.source_hashes(recipe.graph)})


def bind(graph: OnnxGraph, weights_file: Path, placed: Mapping[str, Placed], precision: str, path: Path) -> None:
    """Write the graph to `path`, with its weight inputs pointing into `weights_file` in the same folder. Changes
    `graph`.

    `precision` is the type of the stored weights. Weights stored in a smaller type than the graph computes in are cast
    where they enter; an engine folds these casts when it loads.
    """
    stored = _TYPE_OF[precision]
    casts, widened = [], {}
    for name in [name for name in graph.inputs if name in placed]:
        place, kind = placed[name], type_and_shape(graph.inputs.pop(name))[0]
        graph.constants[name] = stored_tensor(
            name, stored, place.shape, weights_file.name, place.offset, place.size_bytes
        )
        if kind != TYPES[stored]:
            widened[name] = f"{name}.fp32"
            casts.append(Node("Cast", (name,), (widened[name],), f"{name}.cast", (number_attribute("to", kind),)))
    graph.nodes = casts + renamed(graph.nodes, widened)
    write_file(path, graph.to_bytes())
