"""Which arithmetic each part of a graph runs in. Nothing else decides it.

Half-precision graphs are made from the float32 skeleton, not traced again. The rule is a type promotion that follows
the graph:

- An operator with a weight among its operands runs in the weights' type. Its float32 activations are cast down.
- Everything after the last such operator is float32: guidance and the sampler's update, pixel arithmetic, and every
output.
- An operator of a kind that overflows in a family, such as its attention, runs in float32 if it has no weight.
- Any other operator runs in float32 if one of its operands is float32 (latents, tables, the timestep's sinusoid), else
in half.

Norm statistics stay float32 inside half operators. Engines take that from attributes of the operators.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import onnx_ir as ir

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOAT = ir.DataType.FLOAT

# Operands that keep their type, whatever type the operator runs in: scales and sizes of Resize, by position.
_FIXED_OPERANDS = {"Resize": (1, 2, 3)}
_STATISTICS = ("GroupNormalization", "LayerNormalization")


def to_half(model: ir.Model, weights: set[str], precision: str, upcast: Set[str] = frozenset()) -> None:
    """Turn a float32 skeleton into one whose weights and network run in `precision` (fp16 or bf16). Inputs and outputs
    keep their types. `upcast` names the kinds of operators that overflow.

    Every value of `model` must carry its type. The rule is in the docstring of this module.
    """
    half = HALF[precision]
    graph = model.graph
    weighty = _weights_and_views(graph, weights)
    inner = _before_weights(graph, weighty)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        if (value, to) not in casts:
            if value.const_value is not None and value.is_initializer():
                number = np.asarray(value.const_value.numpy(), dtype=np.float32)
                tensor = ir.Tensor(number.astype(to.numpy()), name=f"{value.name}.{precision}")
                constant = ir.Value(name=tensor.name, type=ir.TensorType(to), shape=value.shape, const_value=tensor)
                graph.register_initializer(constant)
                casts[value, to] = constant
                return constant
            node = ir.node("Cast", [value], {"to": to}, name=f"{value.name}.to_{to.name.lower()}")
            node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(to)
            graph.insert_before(before, node)
            casts[value, to] = node.outputs[0]
        return casts[value, to]

    for value in graph.inputs:
        if value.name in weights:
            value.type = ir.TensorType(half)
    for node in list(graph):
        operands = [
            (i, v)
            for i, v in enumerate(node.inputs)
            if v is not None and i not in _FIXED_OPERANDS.get(node.op_type, ()) and _floating(v)
        ]
        if not operands or node.op_type == "Cast":
            continue
        weighted = any(v in weighty for _, v in operands)
        dynamic = [v for _, v in operands if not v.is_initializer()]
        plain = node in inner and node.op_type not in upcast
        runs_half = weighted or (plain and bool(dynamic) and all(v.dtype == half for v in dynamic))
        wanted = half if runs_half else FLOAT
        for i, value in operands:
            if value.dtype != wanted:
                node.replace_input_with(i, cast(value, wanted, node))
        for value in node.outputs:
            if _floating(value):
                value.type = ir.TensorType(wanted)
        if node.op_type in _STATISTICS:
            assert node.attributes.get_int("stash_type", 1) == 1, "norm statistics must be float32"
    for i, value in enumerate(graph.outputs):
        if _floating(value) and value.dtype != FLOAT:
            graph.outputs[i] = _widened(graph, value)


def _widened(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A half output as a float32 one of the same name and shape."""
    name, inner = value.name, value.producer()
    assert name is not None and inner is not None
    value.name = f"{name}.half"
    node = ir.node("Cast", [value], {"to": FLOAT}, name=f"{name}.cast")
    result = node.outputs[0]
    result.name, result.type, result.shape, value.shape = name, ir.TensorType(FLOAT), value.shape, None
    graph.insert_after(inner, node)
    return result


def _floating(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype in (FLOAT, *HALF.values())


def _weights_and_views(graph: ir.Graph, weights: set[str]) -> set[ir.Value]:
    """The weight inputs, and values made only of a weight and constants, such as a transposed weight."""
    found = {value for value in graph.inputs if value.name in weights}
    for node in graph:
        operands = [v for v in node.inputs if v is not None]
        if any(v in found for v in operands) and all(v in found or v.is_initializer() for v in operands):
            found.update(node.outputs)
    return found


def _before_weights(graph: ir.Graph, weighty: set[ir.Value]) -> set[ir.Node]:
    """Nodes from which an operator on activations and a weight can still be reached. All other nodes are the tail,
    which is float32.
    """
    reached: set[ir.Node] = set()
    for node in reversed(list(graph)):
        for user in (use.node for output in node.outputs for use in output.uses()):
            if user in reached or any(v in weighty for v in user.inputs):
                reached.add(node)
                break
    return reached
