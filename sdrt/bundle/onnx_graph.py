"""An ONNX graph as nodes, constants, inputs and outputs: read from a file's bytes, changed, and written again.

Owns the fields of onnx.proto3 that builds write. Keeps what an engine needs to run a graph, and drops the rest: types
of intermediate values, and remarks. Standard library only, so that a build needs no other reader of ONNX.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sdrt.bundle.protobuf import MANY, ONCE, Value, encoded, fields, message, only, packed

MODEL = {1: ONCE, 2: ONCE, 3: ONCE, 4: ONCE, 5: ONCE, 6: ONCE, 7: ONCE, 8: MANY, 14: MANY}
GRAPH = {1: MANY, 2: ONCE, 5: MANY, 10: ONCE, 11: MANY, 12: MANY, 13: MANY, 16: MANY}
NODE = {1: MANY, 2: MANY, 3: ONCE, 4: ONCE, 5: MANY, 6: ONCE, 7: ONCE, 9: MANY}
ATTRIBUTE = {1: ONCE, 2: ONCE, 3: ONCE, 4: ONCE, 5: ONCE, 7: MANY, 8: MANY, 9: MANY, 13: ONCE, 20: ONCE}
TENSOR = dict.fromkeys((1, 4, 5, 6, 7, 10, 11, 13, 16), MANY) | dict.fromkeys((2, 8, 9, 12, 14), ONCE)
OPERATOR_SET = {1: ONCE, 2: ONCE}
ENTRY = {1: ONCE, 2: ONCE}
VALUE = {1: ONCE, 2: ONCE, 3: ONCE, 4: MANY}
TYPE = {1: ONCE}
TENSOR_TYPE = {1: ONCE, 2: ONCE}
SHAPE = {1: MANY}
SIDE = {1: ONCE, 2: ONCE, 3: ONCE}

TYPES = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "bfloat16": 16,
}
"""ONNX's number for each type of numbers."""
EXTERNAL = 1
_INT = 2  # the kind of an attribute that holds one whole number

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Node:
    """One operator. An input that is left out is the empty text. `attributes` are as the file encodes them."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    name: str = ""
    attributes: tuple[bytes, ...] = ()

    def numbers(self) -> dict[str, int | float | list[int]]:
        """The attributes that are a number or a list of whole numbers, by name."""
        found: dict[str, int | float | list[int]] = {}
        for data in self.attributes:
            name, many = "", list[int]()
            value: int | float | None = None
            for number, part in fields(memoryview(data), "attribute", ATTRIBUTE):
                if number == 1:
                    name = _text(part)
                elif number == 2:
                    assert isinstance(part, memoryview)
                    (value,) = struct.unpack("<f", part)
                elif number == 3:
                    assert isinstance(part, int)
                    value = _signed(part)
                elif number == 8:
                    many += map(_signed, [part] if isinstance(part, int) else packed(part))
            if value is not None or many:
                found[name] = many if value is None else value
        return found


@dataclass
class OnnxGraph:
    """A graph that may be changed. The dictionaries keep the order of the file; their values are encoded messages.

    constants: tensors by name, those in a weights file included.
    inputs, outputs: values with their types, by name.
    model: the encoded fields of the file other than the graph.
    """

    name: str
    nodes: list[Node]
    constants: dict[str, bytes]
    inputs: dict[str, bytes]
    outputs: dict[str, bytes]
    model: bytes = b""

    def to_bytes(self) -> bytes:
        graph = (
            encoded(1, [_node_bytes(node) for node in self.nodes]),
            encoded(2, [self.name]),
            encoded(5, self.constants.values()),
            encoded(11, self.inputs.values()),
            encoded(12, self.outputs.values()),
        )
        return self.model + encoded(7, [b"".join(graph)])


def read_graph(data: bytes) -> OnnxGraph:
    """Read a graph that a build wrote or traced.

    Raises:
        ValueError: the data is no such graph.
    """
    model, graph = bytearray(), None
    for number, value in fields(memoryview(data), "model", MODEL):
        if number == 7:
            graph = value
        elif number not in (6, 14):  # remarks
            model += encoded(number, [value])
    if not isinstance(graph, memoryview):
        raise ValueError("no graph in it")
    found = OnnxGraph("", [], {}, {}, {}, bytes(model))
    for number, value in fields(graph, "graph", GRAPH):
        if number == 2:
            found.name = _text(value)
            continue
        part = message(value, "graph")
        if number == 1:
            found.nodes.append(_node(part))
        elif number in (5, 11, 12):
            which, place = {5: (found.constants, 8), 11: (found.inputs, 1), 12: (found.outputs, 1)}[number]
            which[_name(part, place)] = bytes(part)
    return found


def _name(data: memoryview, place: int) -> str:
    known = TENSOR if place == 8 else VALUE
    return next((_text(value) for number, value in fields(data, "value", known) if number == place), "")


def _node(data: memoryview) -> Node:
    parts: dict[int, list[Value]] = {number: [] for number in NODE}
    for number, value in fields(data, "node", NODE):
        parts[number].append(value)
    return Node(
        "".join(map(_text, parts[4])),
        tuple(map(_text, parts[1])),
        tuple(map(_text, parts[2])),
        "".join(map(_text, parts[3])),
        tuple(bytes(value) for value in parts[5] if isinstance(value, memoryview)),
    )


def _node_bytes(node: Node) -> bytes:
    return b"".join(
        (
            encoded(1, node.inputs),
            encoded(2, node.outputs),
            encoded(3, [node.name] if node.name else []),
            encoded(4, [node.operator]),
            encoded(5, node.attributes),
        )
    )


def number_attribute(name: str, value: int) -> bytes:
    """An encoded attribute that holds one whole number."""
    return encoded(1, [name]) + encoded(3, [value]) + encoded(20, [_INT])


def value(name: str, dtype: str | None = None, shape: Shape = ()) -> bytes:
    """An encoded value, such as an input. Free sides of the shape are texts. Without a type the engine finds it out."""
    if dtype is None:
        return encoded(1, [name])
    sides = [encoded(2, [side]) if isinstance(side, str) else encoded(1, [side]) for side in shape]
    tensor = encoded(1, [TYPES[dtype]]) + encoded(2, [encoded(1, sides)])
    return encoded(1, [name]) + encoded(2, [encoded(1, [tensor])])


def type_and_shape(data: bytes) -> tuple[int, Shape]:
    """ONNX's number of a value's type, and its shape."""
    typed = only(message(only(memoryview(data), "value", VALUE)[2], "type"), "type", TYPE)
    parts = only(message(typed[1], "type"), "type", TENSOR_TYPE)
    kind, shape = parts[1], message(parts.get(2, memoryview(b"")), "shape")
    assert isinstance(kind, int)
    sides: list[int | str] = []
    for _, side in fields(shape, "shape", SHAPE):
        known = only(message(side, "side"), "side", SIDE)
        size = known.get(1)
        sides.append(size if isinstance(size, int) else _text(known.get(2, memoryview(b""))))
    return kind, tuple(sides)


def stored_tensor(name: str, dtype: str, shape: Iterable[int], file: str, offset: int, size_bytes: int) -> bytes:
    """An encoded tensor whose numbers lie in a file beside the graph's."""
    entries = {"location": file, "offset": str(offset), "length": str(size_bytes)}
    return b"".join(
        (
            encoded(1, shape),
            encoded(2, [TYPES[dtype]]),
            encoded(8, [name]),
            encoded(13, [encoded(1, [key]) + encoded(2, [text]) for key, text in entries.items()]),
            encoded(14, [EXTERNAL]),
        )
    )


@dataclass(frozen=True)
class Stored:
    """What a graph says of a tensor in a file beside it. `kind` is ONNX's number of its type."""

    kind: int
    shape: tuple[int, ...]
    file: str
    offset: int
    size_bytes: int


def stored(data: bytes) -> Stored | None:
    """Where the numbers of a tensor lie, None if they are in the graph itself."""
    shape, kind, entries = list[int](), 0, dict[str, str]()
    for number, part in fields(memoryview(data), "tensor", TENSOR):
        if number == 1:
            shape += [part] if isinstance(part, int) else packed(part)
        elif number == 2 and isinstance(part, int):
            kind = part
        elif number == 13 and isinstance(part, memoryview):
            entry = only(part, "external data", ENTRY)
            entries[_text(entry[1])] = _text(entry[2])
    if not entries:
        return None
    return Stored(kind, tuple(shape), entries["location"], int(entries["offset"]), int(entries["length"]))


def renamed(nodes: Iterable[Node], names: Mapping[str, str]) -> list[Node]:
    """The nodes, with other values as inputs."""
    return [
        replace(node, inputs=tuple(names.get(name, name) for name in node.inputs))
        if any(name in names for name in node.inputs)
        else node
        for node in nodes
    ]


def _text(value: Value) -> str:
    if isinstance(value, int):
        raise ValueError("a number where text should be")
    return value.tobytes().decode(errors="replace")


def _signed(value: int) -> int:
    """A number of 64 bits with its sign."""
    return value - (1 << 64) if value >> 63 else value
