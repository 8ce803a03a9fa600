"""The skeletons of a graph: those that come with sdrt, those in the user's cache, or new ones.

A network is traced once per architecture, into one skeleton for each type that it may compute in. Those of published
models come with sdrt (`sdrt.export.traces`). Others are traced (`sdrt.export.trace`, which imports torch) and kept in
the user's cache folder (`sdrt.files.cache`).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from sdrt.bundle.graphs import TEXT_ENCODER
from sdrt.bundle.onnx_graph import read_graph, type_and_shape
from sdrt.export import traces
from sdrt.export.architecture import Architecture
from sdrt.export.graph import Recipe, recipes
from sdrt.files.cache import cache_key, cached, is_cached


def weights_of(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Every weight of a graph by its canonical name. Imports torch only where no trace comes with sdrt.

    Raises:
        NoTraceError: torch is needed and not installed.
    """
    if (shipped := traces.shipped(recipe.key())) is None:
        if _tools() is None:
            raise traces.no_trace(recipe.key())
        from sdrt.export.trace import module, weight_shapes

        return weight_shapes(module(recipe))
    inputs = read_graph(shipped["fp32"]).inputs
    shapes = {name: type_and_shape(data)[1] for name, data in inputs.items() if name not in recipe.signature.inputs}
    found = {name: tuple(map(int, shape)) for name, shape in shapes.items()}
    if recipe.graph == TEXT_ENCODER:  # no trace depends on the number of rows of the token tables
        tables = sorted(name for name in found if name.endswith("token_embedding.weight"))
        found |= {name: (spec.vocabulary, spec.width) for name, spec in zip(tables, recipe.spec, strict=True)}
    return found


def weight_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight of an architecture's graphs by its canonical name."""
    return {name: shape for recipe in recipes(arch).values() for name, shape in weights_of(recipe).items()}


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
