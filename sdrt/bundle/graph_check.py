"""Checks a graph before an engine sees it. Until then the graph is the file of a stranger, and an engine does whatever
a graph says.

It knows the fields that builds write and refuses every other field, so that no two readers can see different graphs in
one file. It accepts one model with one graph; operators of ONNX's own set only; no functions; no graphs within graphs
(loops and branches); and a limited number of nodes. Weights must come from inside the bundle's weights file, with as
many bytes as their shape and type need. Standard library only.
"""

from __future__ import annotations

import math
from pathlib import Path

from sdrt.bundle.onnx_graph import ATTRIBUTE, ENTRY, EXTERNAL, GRAPH, MODEL, NODE, OPERATOR_SET, TENSOR
from sdrt.bundle.protobuf import Value, fields, message, only, packed
from sdrt.errors import BundleError, printable

MAX_GRAPH_BYTES = 32 << 20
"""Most bytes of a graph. Builds write half a megabyte; an engine takes many times the size of a graph in memory."""
MAX_NODES = 50_000
"""Most nodes of a graph. Builds write a few thousand."""
_MAX_LISTED = 200_000
"""Most entries of any other list: inputs, outputs, weights, shapes of values."""

_MOST_AXES = 8
_STORED_BYTES = {1: 4, 10: 2, 16: 2}
"""Bytes per number for each type of stored weights, by ONNX's number of the type: float32, float16, bfloat16."""

_OWN_DOMAINS = (b"", b"ai.onnx")


def check_graph(path: Path, weights: Path, weights_bytes: int) -> None:
    """Refuse a graph that is not as builds write them. `weights` is the weights file beside the graph; `weights_bytes`
    is the file's size.

    Raises:
        BundleError: the graph is missing, or holds something it should not; the message names the file and the part.
    """
    if path.parent != weights.parent:  # the graph would then name another file
        raise BundleError(f"{path}: expected beside {weights}", "Build the bundle again.")
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_GRAPH_BYTES + 1)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be read: {error.strerror}", "Copy the bundle again from where it was built."
        ) from error
    try:
        if len(data) > MAX_GRAPH_BYTES:
            raise ValueError(f"more than {MAX_GRAPH_BYTES:,} bytes")
        _check_model(memoryview(data), weights.name, weights_bytes)
    except ValueError as error:
        raise BundleError(
            f"{path}: not a graph that sdrt builds: {printable(str(error))}",
            "Build the bundle again, or get it from someone you trust.",
        ) from error


def _check_model(data: memoryview, weights: str, weights_bytes: int) -> None:
    graph = None
    for number, value in fields(data, "model", MODEL):
        if number == 7:
            graph = message(value, "graph")
        elif number == 8:
            _check_domain(only(message(value, "operator set"), "operator set", OPERATOR_SET).get(1, memoryview(b"")))
    if graph is None:
        raise ValueError("no graph in it")
    nodes = listed = 0
    for number, value in fields(graph, "graph", GRAPH):
        if number == 1:
            nodes += 1
            if nodes > MAX_NODES:
                raise ValueError(f"more than {MAX_NODES:,} nodes")
            _check_node(message(value, "node"))
            continue
        listed += 1
        if listed > _MAX_LISTED:
            raise ValueError(f"more than {_MAX_LISTED:,} inputs, outputs, weights and values")
        if number == 5:
            _check_tensor(message(value, "weight"), weights, weights_bytes)


def _check_node(data: memoryview) -> None:
    for number, value in fields(data, "node", NODE):
        if number == 7:
            _check_domain(value)
        if number == 5:
            for part, inner in fields(message(value, "attribute"), "attribute", ATTRIBUTE):
                if part == 5:
                    _check_tensor(message(inner, "attribute"), None, 0)


def _check_domain(value: Value) -> None:
    if message(value, "domain").tobytes() not in _OWN_DOMAINS:
        raise ValueError(f"operators of {_text(value)!r}, expected ONNX's own only")


def _check_tensor(data: memoryview, weights: str | None, weights_bytes: int) -> None:
    """A tensor holds its own numbers, or names a place inside the weights file, if there is one."""
    name: Value = memoryview(b"")
    kind = external = inside = 0
    dims: list[int] = []
    entries: dict[str, str] = {}
    for number, value in fields(data, "tensor", TENSOR):
        if number == 1:
            dims += [value] if isinstance(value, int) else packed(value)
        elif number == 2:
            kind = _number(value, "tensor")
        elif number == 8:
            name = value
        elif number == 13:
            entry = only(message(value, "tensor"), "external data", ENTRY)
            key = _text(entry.get(1, memoryview(b"")))
            if key in entries:
                raise ValueError(f"tensor {_text(name)!r}: external data names its {key!r} twice")
            entries[key] = _text(entry.get(2, memoryview(b"")))
        elif number == 14:
            external = _number(value, "tensor")
        elif number in (4, 5, 6, 7, 9, 10, 11):
            inside += 1
    if not entries and external != EXTERNAL:
        return
    where = f"tensor {_text(name)!r}"
    if external != EXTERNAL or inside:
        raise ValueError(f"{where}: holds its numbers and points to a file as well")
    if weights is None:
        raise ValueError(f"{where}: an attribute that points to a file")
    if entries.keys() != {"location", "offset", "length"} or entries["location"] != weights:
        raise ValueError(
            f"{where}: its numbers are said to be at {entries!r}, expected a location {weights!r}, an offset and a"
            " length"
        )
    offset, length = _decimal(entries["offset"], where), _decimal(entries["length"], where)
    if offset + length > weights_bytes:
        raise ValueError(f"{where}: bytes {offset:,} to {offset + length:,} of {weights}, which has {weights_bytes:,}")
    if kind not in _STORED_BYTES or len(dims) > _MOST_AXES or math.prod(dims) * _STORED_BYTES[kind] != length:
        raise ValueError(f"{where}: {length:,} bytes for the shape {dims[: _MOST_AXES + 1]} of type {kind}")


def _number(value: Value, what: str) -> int:
    if not isinstance(value, int):
        raise ValueError(f"{what}: bytes where a number should be")
    return value


def _text(value: Value) -> str:
    return str(value) if isinstance(value, int) else value.tobytes().decode(errors="replace")


def _decimal(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{where}: {text!r} where a number of bytes should be")
    return int(text)
