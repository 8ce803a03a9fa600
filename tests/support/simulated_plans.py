"""Plans of the TensorRT simulator: what a network takes and gives, which layers it has, and how an engine of it gets
into a bundle.

A plan is a line that names it as the simulator's, and JSON: the graph's file, profiles, size of the activation block.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import (
    GRAPHS,
    STEP,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    concrete,
    dimensions,
    signatures,
    table_rows,
)
from sdrt.bundle.graphs import Tensor as Signed
from sdrt.bundle.manifest import WEIGHTS
from sdrt.engines.record import FORMAT, EngineKey, EngineRecord, Plan, Profile
from sdrt.engines.store import state_bytes, write_engine
from sdrt.machine.cpu import platform_name

VERSION = "1.7.1.116"
MAGIC = b"a plan of the simulator\n"
ACTIVATION_BYTES = {TEXT_ENCODER: 1000, STEP: 5000, VAE_DECODER: 9000, VAE_ENCODER: 9000}


@dataclass(frozen=True)
class Tensor:
    """An input or output of a network, its free axes named."""

    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]
    is_input: bool


_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_}


@functools.cache
def layers(graph: str) -> list[tuple[str, str]]:
    """Names and kinds of the operators of a graph file, a plan's layers here."""
    import onnx

    return [
        (node.name or f"layer {index}", node.op_type)
        for index, node in enumerate(onnx.load(graph, load_external_data=False).graph.node)
    ]


@functools.cache
def session(graph: str) -> Any:
    """ONNX Runtime on a graph file, made once per file, on one thread: the networks are small and cores are shared."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def tensors(network: Any) -> dict[str, Tensor]:
    both = [(tensor, True) for tensor in network.get_inputs()] + [(tensor, False) for tensor in network.get_outputs()]
    return {
        tensor.name: Tensor(tuple(tensor.shape), np.dtype(_DTYPES[tensor.type]), is_input) for tensor, is_input in both
    }


def evaluate(axis: int | str, sizes: Mapping[str, int]) -> int:
    """The size of an axis: a number, a name, or a product of them such as `8*h`."""
    if isinstance(axis, int):
        return axis
    return math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in axis.split("*"))


def plan(
    graph: Path, name: str, profiles: Sequence[Mapping[str, Any]], *, activation_bytes: int, version: str = VERSION
) -> bytes:
    """A plan file for a graph file."""
    document = {
        "graph": str(graph),
        "name": name,
        "profiles": list(profiles),
        "activation_bytes": activation_bytes,
        "version": version,
    }
    return MAGIC + json.dumps(document).encode()


def compile_engine(
    bundle: Path,
    *,
    graphs: Path | None = None,
    heights: tuple[int, int] = (64, 64),
    widths: tuple[int, int] = (64, 64),
    batch: int = 1,
    rows: int = 128,
    branches: tuple[int, ...] = (1, 2),
    sm: str = "sm_89",
    target: str = "tensorrt-rtx",
    compiler: str = VERSION,
) -> Path:
    """Put an engine of the simulator into a bundle, over its float32 graphs. Plans name those of `graphs`, a bundle of
    equal ones.

    `heights` and `widths` are the smallest and largest picture in pixels.
    """
    opened = open_bundle(bundle)
    manifest = opened.manifest
    factor = manifest.latents.factor
    known = signatures(dimensions(manifest))
    profiles: dict[str, tuple[Profile, ...]] = {}
    plans, blobs = {}, {}
    for graph in GRAPHS:
        inputs = known[graph].inputs
        free: dict[str, tuple[int, ...]] = {
            "N": (1, batch),
            "h": tuple(side // factor for side in heights),
            "w": tuple(side // factor for side in widths),
        }
        free |= {"S": (table_rows(1, rows), table_rows(batch, rows)), "T": (manifest.chunk,) * 2, "n": (1, 2)}
        profiles[graph] = tuple(
            _profile(inputs, free | ({"G": (count, count)} if graph == STEP else {"N": (1, 1)}))
            for count in (branches if graph == STEP else (1,))
        )
        blobs[graph] = plan(
            open_bundle(graphs or bundle).graph(graph, "fp32"),
            graph,
            [p.shapes for p in profiles[graph]],
            activation_bytes=ACTIVATION_BYTES[graph],
        )
        digest = hashlib.sha256(blobs[graph]).hexdigest()
        plans[graph] = Plan(f"{graph}.plan", len(blobs[graph]), digest, ACTIVATION_BYTES[graph])
    key = EngineKey(
        target=target,
        compiler=compiler,
        device=sm,
        platform=platform_name(),
        precision="fp32",
        graphs={graph: manifest.files[manifest.graphs[graph]["fp32"].path].sha256 for graph in GRAPHS},
        weights=manifest.files[WEIGHTS].sha256,
        profiles=profiles,
        flags=(),
    )
    size, tokens = (widths[1], heights[1]), manifest.chunk
    state = state_bytes(manifest, size=size, batch=batch, tokens=tokens, rows=rows, branches=max(branches))
    record = EngineRecord(
        FORMAT, key, size, batch, tokens, rows, branches, state, manifest.files[WEIGHTS].size_bytes, plans
    )
    return write_engine(opened, record, blobs)


def _profile(inputs: Mapping[str, Signed], free: Mapping[str, tuple[int, ...]]) -> Profile:
    low, high = ({axis: sizes[end] for axis, sizes in free.items()} for end in (0, -1))
    return Profile(
        {name: (concrete(t.shape, low), concrete(t.shape, low), concrete(t.shape, high)) for name, t in inputs.items()}
    )
