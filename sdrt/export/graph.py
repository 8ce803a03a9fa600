"""From an architecture to the ONNX graphs of a bundle: what each is made of, and how a skeleton, a graph in which every
weight is an input with its canonical name, is bound to a weights file. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    renamed,
    stored_tensor,
    type_and_shape,
)
from sdrt.export import traces
from sdrt.export.architecture import NORM_GROUPS, Architecture
from sdrt.export.weights import Placed
from sdrt.files.publish import write_file

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
