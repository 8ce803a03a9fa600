"""Graphs read and written without the onnx package, against that package."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from sdrt.bundle.graphs import GRAPHS
from sdrt.bundle.onnx_graph import Node, number_attribute, read_graph, renamed, stored, stored_tensor, type_and_shape
from sdrt.bundle.onnx_graph import value as encoded_value


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_what_is_read_and_written_again_is_the_same(flat_bundle: Path, graph: str, compute: str) -> None:
    data = (flat_bundle / "graphs" / f"{graph}.{compute}.onnx").read_bytes()
    model, found = onnx.ModelProto.FromString(data), read_graph(data)
    assert found.to_bytes() == data
    assert [(n.operator, n.name, n.inputs, n.outputs) for n in found.nodes] == [
        (n.op_type, n.name, tuple(n.input), tuple(n.output)) for n in model.graph.node
    ]
    for node, other in zip(found.nodes, model.graph.node, strict=True):
        numbers = {a.name: helper.get_attribute_value(a) for a in other.attribute if a.type in (1, 2, 7)}
        assert node.numbers() == numbers
    for name, values in ((found.inputs, model.graph.input), (found.outputs, model.graph.output)):
        assert list(name) == [value.name for value in values]
        for data, other in zip(name.values(), values, strict=True):
            tensor = other.type.tensor_type
            sides = tuple(side.dim_param or side.dim_value for side in tensor.shape.dim)
            assert type_and_shape(data) == (tensor.elem_type, sides)
    for data, other in zip(found.constants.values(), model.graph.initializer, strict=True):
        place, told = stored(data), {entry.key: entry.value for entry in other.external_data}
        if place is None:
            assert not told
            continue
        assert (place.kind, place.shape, place.file) == (other.data_type, tuple(other.dims), told["location"])
        assert (place.offset, place.size_bytes) == (int(told["offset"]), int(told["length"]))


def test_what_is_made_is_what_onnx_makes() -> None:
    tensor = onnx.TensorProto.FromString(stored_tensor("w", "bfloat16", (3, 300), "f", 1 << 33, 1800))
    assert (tensor.name, tensor.data_type, list(tensor.dims)) == ("w", onnx.TensorProto.BFLOAT16, [3, 300])
    assert {entry.key: entry.value for entry in tensor.external_data} == {
        "location": "f",
        "offset": str(1 << 33),
        "length": "1800",
    }
    assert (
        encoded_value("x", "int64", ("N", 77)) == helper.make_tensor_value_info("x", 7, ["N", 77]).SerializeToString()
    )
    assert encoded_value("x") == onnx.ValueInfoProto(name="x").SerializeToString()
    assert number_attribute("to", 10) == helper.make_attribute("to", 10).SerializeToString()
    nodes = [Node("Add", ("a", "b"), ("c",)), Node("Abs", ("c",), ("d",))]
    assert renamed(nodes, {"a": "z"}) == [Node("Add", ("z", "b"), ("c",)), nodes[1]]
    negative = Node("X", (), (), "", (helper.make_attribute("axis", -1).SerializeToString(),))
    assert negative.numbers() == {"axis": -1}


def test_what_is_no_graph_is_refused() -> None:
    for data in (b"", b"\x08\x09", b"\xff" * 12):
        with pytest.raises(ValueError, match=r"no graph|cut short|field"):
            read_graph(data)
