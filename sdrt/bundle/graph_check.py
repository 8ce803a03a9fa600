"""Checks a graph before an engine sees it. Until then the graph is the file of a stranger, and an engine does whatever
a graph says.

This is a small strict reader of ONNX's protobuf. It knows the fields that builds write and refuses every other field,
so that no two readers can see different graphs in one file. It accepts one model with one graph; operators of ONNX's
own set only; no functions; no graphs within graphs (loops and branches); and a limited number of nodes. Weights must
come from inside the bundle's weights file, with as many bytes as their shape and type need. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdrt.errors import BundleError, printable

MAX_GRAPH_BYTES = 32 << 20
"""Most bytes of a graph. Builds write half a megabyte; an engine takes many times the size of a graph in memory."""
MAX_NODES = 50_000
"""Most nodes of a graph. Builds write a few thousand."""
_MAX_LISTED = 200_000
"""Most entries of any other list: inputs, outputs, weights, shapes of values."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1
_MOST_AXES = 8
_STORED_BYTES = {1: 4, 10: 2, 16: 2}
"""Bytes per number for each type of stored weights, by ONNX's number of the type: float32, float16, bfloat16."""

# The fields of onnx.proto3 that builds write, by number. A field marked once may not come twice, since readers differ
# about such repeats.
_ONCE, _MANY = False, True
_MODEL = {1: _ONCE, 2: _ONCE, 3: _ONCE, 4: _ONCE, 5: _ONCE, 6: _ONCE, 7: _ONCE, 8: _MANY, 14: _MANY}
_GRAPH = {1: _MANY, 2: _ONCE, 5: _MANY, 10: _ONCE, 11: _MANY, 12: _MANY, 13: _MANY, 16: _MANY}
_NODE = {1: _MANY, 2: _MANY, 3: _ONCE, 4: _ONCE, 5: _MANY, 6: _ONCE, 7: _ONCE, 9: _MANY}
_ATTRIBUTE = {1: _ONCE, 2: _ONCE, 3: _ONCE, 4: _ONCE, 5: _ONCE, 7: _MANY, 8: _MANY, 9: _MANY, 13: _ONCE, 20: _ONCE}
_TENSOR = {
    1: _MANY,
    2: _ONCE,
    4: _MANY,
    5: _MANY,
    6: _MANY,
    7: _MANY,
    8: _ONCE,
    9: _ONCE,
    10: _MANY,
    11: _MANY,
    12: _ONCE,
    13: _MANY,
    14: _ONCE,
    16: _MANY,
}
_OPERATOR_SET = {1: _ONCE, 2: _ONCE}
_ENTRY = {1: _ONCE, 2: _ONCE}
_OWN_DOMAINS = (b"", b"ai.onnx")

Value = int | memoryview


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
    for number, value in _fields(data, "model", _MODEL):
        if number == 7:
            graph = _message(value, "graph")
        elif number == 8:
            _check_domain(_only(_message(value, "operator set"), "operator set", _OPERATOR_SET).get(1, memoryview(b"")))
    if graph is None:
        raise ValueError("no graph in it")
    nodes = listed = 0
    for number, value in _fields(graph, "graph", _GRAPH):
        if number == 1:
            nodes += 1
            if nodes > MAX_NODES:
                raise ValueError(f"more than {MAX_NODES:,} nodes")
            _check_node(_message(value, "node"))
            continue
        listed += 1
        if listed > _MAX_LISTED:
            raise ValueError(f"more than {_MAX_LISTED:,} inputs, outputs, weights and values")
        if number == 5:
            _check_tensor(_message(value, "weight"), weights, weights_bytes)


def _check_node(data: memoryview) -> None:
    for number, value in _fields(data, "node", _NODE):
        if number == 7:
            _check_domain(value)
        if number == 5:
            for part, inner in _fields(_message(value, "attribute"), "attribute", _ATTRIBUTE):
                if part == 5:
                    _check_tensor(_message(inner, "attribute"), None, 0)


def _check_domain(value: Value) -> None:
    if _message(value, "domain").tobytes() not in _OWN_DOMAINS:
        raise ValueError(f"operators of {_text(value)!r}, expected ONNX's own only")


def _check_tensor(data: memoryview, weights: str | None, weights_bytes: int) -> None:
    """A tensor holds its own numbers, or names a place inside the weights file, if there is one."""
    name: Value = memoryview(b"")
    kind = external = inside = 0
    dims: list[int] = []
    entries: dict[str, str] = {}
    for number, value in _fields(data, "tensor", _TENSOR):
        if number == 1:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == 2:
            kind = _number(value, "tensor")
        elif number == 8:
            name = value
        elif number == 13:
            entry = _only(_message(value, "tensor"), "external data", _ENTRY)
            key = _text(entry.get(1, memoryview(b"")))
            if key in entries:
                raise ValueError(f"tensor {_text(name)!r}: external data names its {key!r} twice")
            entries[key] = _text(entry.get(2, memoryview(b"")))
        elif number == 14:
            external = _number(value, "tensor")
        elif number in (4, 5, 6, 7, 9, 10, 11):
            inside += 1
    if not entries and external != _EXTERNAL:
        return
    where = f"tensor {_text(name)!r}"
    if external != _EXTERNAL or inside:
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


def _fields(data: memoryview, what: str, known: Mapping[int, bool]) -> Iterator[tuple[int, Value]]:
    """The fields of a message in order. Numbers stay numbers; fixed-size fields and byte strings are bytes.

    Raises:
        ValueError: the message is cut short, has an unknown field, or repeats a field that may come once.
    """
    position, end = 0, len(data)
    seen = set()
    while position < end:
        key = data[position]
        position += 1
        if key > 127:
            key, position = _varint(data, position - 1, what)
        number, kind = key >> 3, key & 7
        if number not in known:
            raise ValueError(f"{what}: field {number}, which builds do not write")
        if not known[number]:
            if number in seen:
                raise ValueError(f"{what}: field {number} twice")
            seen.add(number)
        if kind in (_BYTES, _VARINT):
            if position < end and data[position] < 128:
                size = data[position]
                position += 1
            else:
                size, position = _varint(data, position, what)
            if kind == _VARINT:
                yield number, size
                continue
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"{what}: field {number} is of kind {kind}, which nobody writes any more")
        if size > end - position:
            raise ValueError(f"{what}: field {number} is cut short")
        yield number, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int, what: str) -> tuple[int, int]:
    """The number at a position, and the position after the number."""
    value = 0
    for i, byte in enumerate(data[position : position + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if value >= 1 << 64:
                break
            return value, position + i + 1
    raise ValueError(f"{what}: a number that is cut short or too long")


def _packed(data: memoryview) -> list[int]:
    found, position = [], 0
    while position < len(data):
        value, position = _varint(data, position, "tensor")
        found.append(value)
    return found


def _only(data: memoryview, what: str, known: Mapping[int, bool]) -> dict[int, Value]:
    """A message whose fields all come once, by field number."""
    return dict(_fields(data, what, known))


def _message(value: Value, what: str) -> memoryview:
    if isinstance(value, int):
        raise ValueError(f"{what}: a number where a message should be")
    return value


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
