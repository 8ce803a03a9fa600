"""The algebra of the LoRA family: from an adapter's matrices to the change of one weight, in float32.

W is a weight `[out, in, *kernel]`, ΔW its change, r the rank. Sources: Hu et al. 2021 (LoRA, eq. 3); LyCORIS modules
and functional/*.py (LoCon, LoHa after Hyeon-Woo et al. 2022 (FedPara), LoKr); Liu et al. 2024 (DoRA, eq. 5) with
LyCORIS's two axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from sdrt.export.adapters.spelling import DOWN, MAGNITUDE, MID, UP, UP_BIAS
from sdrt.export.floats import Array

Shape = tuple[int, ...]
Read = Callable[[str], Array]
"""Reads a part by its name, in float32 and checked to be finite. Indices keep their type."""


@dataclass(frozen=True)
class Delta:
    """The change that one adapter makes to one weight. `keys` are the keys of its parts in the file. `factor` is alpha
    over rank.

    `shape` is the shape that the matrices make. It is the weight's, or that of the weight's first four input channels
    where an inpainting model has more. `norm_axis` is the axis of W along which DoRA's magnitudes run: 0 for one per
    output, 1 for one per input, None without DoRA. `rows` are those of the made change that change this weight, from
    the first to before the second, where one module of the file stands for several of the model; None for all.
    """

    keys: Mapping[str, str]
    shape: Shape
    factor: float = 1.0
    norm_axis: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def changes(self) -> Shape:
        """The shape of the part that changes the weight."""
        return self.shape if self.rows is None else (self.rows[1] - self.rows[0], *self.shape[1:])


class MisfitError(Exception):
    """The shapes of an adapter's parts make no change of the weight. The message has the shapes."""


_PIECE, _PIECE_ROWS = 1 << 18, 64
"""Multiplications in a piece of a product that OpenBLAS, which numpy brings, leaves to one thread; and its rows."""
_SPARSE = ("bias_indices", "bias_values", "bias_size")
_KINDS = {
    "LoRA": (UP, DOWN, MID, *_SPARSE),
    "LoRA of an embedding": ("lora_embedding_A", "lora_embedding_B"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"),
    "full difference": ("diff",),
}


def kinds_of(parts: Mapping[str, object]) -> list[str]:
    """The kinds of change to which the parts of one module's weight belong. An alpha or a magnitude alone tells no
    kind.
    """
    return [kind for kind, own in _KINDS.items() if any(part in parts for part in own)]


def missing_parts(parts: Mapping[str, object]) -> tuple[str, ...]:
    """The parts that are missing from a whole change of one module's weight; an empty tuple if none is."""
    kind = next(iter(kinds_of(parts)), "LoRA")
    needed: list[str] = []
    if kind == "LoRA":
        needed = [UP, DOWN, *(_SPARSE if any(part in parts for part in _SPARSE) else ())]
    elif kind == "LoRA of an embedding":
        needed = list(_KINDS[kind])
    elif kind == "LoHa":
        needed = list(_KINDS[kind][: 6 if "hada_t1" in parts or "hada_t2" in parts else 4])
    elif kind == "LoKr":
        for whole in ("lokr_w1", "lokr_w2"):
            if whole not in parts:
                needed += [f"{whole}_a", f"{whole}_b"] if f"{whole}_a" in parts or f"{whole}_b" in parts else [whole]
    return tuple(part for part in needed if part not in parts)


def rank_of(shapes: Mapping[str, Shape]) -> int | None:
    """The rank by which alpha is divided. None where alpha does not count (a difference, a LoKr of two whole
    matrices).
    """
    for part in (DOWN, "hada_w1_b", "lora_embedding_A", "lokr_w2_b", "lokr_w1_b"):
        if part in shapes:
            return shapes[part][0] if shapes[part] else 0
    return None


def fitting_shape(shapes: Mapping[str, Shape], weight: Shape, channels: int | None = None) -> Shape:
    """The shape of the change that the parts make: the weight's, or the same with `channels` inputs.

    Raises:
        MisfitError: the parts make no such change.
    """
    made = _made(shapes)
    candidates = [weight] + ([(weight[0], channels, *weight[2:])] if channels is not None and len(weight) == 4 else [])
    for shape in candidates:
        if _stripped(made) == _stripped(shape) or made == (shape[0], math.prod(shape[1:])):
            return shape
    raise MisfitError(_described(shapes))


def _stripped(shape: Shape) -> Shape:
    """The shape without a 1x1 kernel. Files write linear layers and 1x1 convolutions in either form."""
    return shape[:2] if len(shape) > 2 and all(size == 1 for size in shape[2:]) else shape


def _described(shapes: Mapping[str, Shape]) -> str:
    names = {DOWN: "down", UP: "up", MID: "mid"}
    order = (UP, DOWN, MID)
    shown = sorted(
        (part for part in shapes if part not in ("alpha", "dora_scale", MAGNITUDE)),
        key=lambda part: (order.index(part) if part in order else len(order), part),
    )
    return " and ".join(f"{names.get(part, part)} {list(shapes[part])}" for part in shown)


def _made(shapes: Mapping[str, Shape]) -> Shape:
    """The shape of the change. Raises MisfitError. A factor may be flattened to two dimensions."""

    def check(good: bool) -> None:
        if not good:
            raise MisfitError(_described(shapes))

    def product(a: Shape, b: Shape, core: Shape | None) -> Shape:
        """`[out, r] @ [r, in, *kernel]`, or with a core `[r, r, *kernel]` between `[r, out]` and `[r, in]`."""
        check(len(a) >= 2 and len(b) >= 2 and 0 not in a + b)
        if core is None:
            check(math.prod(a[1:]) == b[0])
            return (a[0], *b[1:])
        check(len(core) >= 2 and len(a) == len(b) == 2 and core[:2] == (a[0], b[0]))
        return (a[1], b[1], *core[2:])

    if DOWN in shapes:
        up, down, mid = shapes[UP], shapes[DOWN], shapes.get(MID)
        if mid is None:
            return product(up, down, None)
        check(len(_stripped(up)) == 2 and len(_stripped(down)) == 2)
        return product(_stripped(up)[::-1], _stripped(down), mid)
    if "lora_embedding_A" in shapes:
        a, b = shapes["lora_embedding_A"], shapes["lora_embedding_B"]
        check(len(a) == len(b) == 2 and a[0] == b[1] and 0 not in a + b)
        return a[1], b[0]
    if "hada_w1_a" in shapes:
        one, two = (
            product(shapes[f"hada_{w}_a"], shapes[f"hada_{w}_b"], shapes.get(f"hada_{t}"))
            for w, t in (("w1", "t1"), ("w2", "t2"))
        )
        check(one == two)
        return one
    if "diff" in shapes:
        check(len(shapes["diff"]) >= 1)
        return shapes["diff"]
    small = shapes["lokr_w1"] if "lokr_w1" in shapes else product(shapes["lokr_w1_a"], shapes["lokr_w1_b"], None)
    large = (
        shapes["lokr_w2"]
        if "lokr_w2" in shapes
        else product(shapes["lokr_w2_a"], shapes["lokr_w2_b"], shapes.get("lokr_t2"))
    )
    small = _stripped(small)
    check(len(small) == 2 and len(large) >= 2 and 0 not in small + large)
    return (small[0] * large[0], small[1] * large[1], *large[2:])


def norm_axis(parts: Mapping[str, Shape], shape: Shape) -> int | None:
    """The axis along which DoRA's magnitudes run. In peft's files it is always that of the outputs; in LyCORIS's files
    their shape tells. None without DoRA.

    Raises:
        MisfitError: they run along neither axis.
    """
    if MAGNITUDE in parts:
        if math.prod(parts[MAGNITUDE]) == shape[0]:
            return 0
        raise MisfitError(f"{MAGNITUDE} {list(parts[MAGNITUDE])}")
    if "dora_scale" not in parts:
        return None
    scale = parts["dora_scale"]
    if len(scale) >= 2:
        if scale[0] == shape[0] and math.prod(scale) == shape[0]:
            return 0
        if scale[1] == shape[1] and math.prod(scale) == shape[1]:
            return 1
    elif math.prod(scale) in shape[:2] and scale:
        return 0 if scale[0] == shape[0] else 1
    raise MisfitError(f"dora_scale {list(scale)}")


def additive(delta: Delta, read: Read) -> Array:
    """ΔW with its factor, float32 of `delta.changes`, without DoRA's rescaling, in memory of its own.

    Raises:
        MisfitError: a sparse residual points outside the weight.
    """
    keys = delta.keys
    if DOWN in keys:
        down, up = _matrix(read(DOWN)), _matrix(read(UP))
        made = _core(read(MID), up.T, down) if MID in keys else _product(up, down)
    elif "lora_embedding_A" in keys:
        made = _product(read("lora_embedding_A").T, read("lora_embedding_B").T)
    elif "hada_w1_a" in keys:
        made = _pair(keys, read, "hada_w1", "hada_t1")
        made *= _pair(keys, read, "hada_w2", "hada_t2")
    elif "diff" in keys:
        made = read("diff")
    elif UP_BIAS in keys:
        made = read(UP_BIAS)
    else:
        small = read("lokr_w1") if "lokr_w1" in keys else _pair(keys, read, "lokr_w1", "")
        large = read("lokr_w2") if "lokr_w2" in keys else _pair(keys, read, "lokr_w2", "lokr_t2")
        made = _kronecker(_matrix(small), _matrix(large))
    made = made.reshape(delta.shape)
    if "bias_indices" in keys:
        made += _sparse(read, delta.shape)
    if delta.rows is not None:
        made = made[slice(*delta.rows)]
    if delta.factor != 1:
        made *= np.float32(delta.factor)
    return made


def _matrix(values: Array) -> Array:
    """`[a, b, ...]` with all but the first dimension in one."""
    return values.reshape(len(values), -1)


def _pair(keys: Mapping[str, str], read: Read, pair: str, core: str) -> Array:
    """`a @ b` flattened to `[out, in * kernel]`; with a core `[out, in, *kernel]`."""
    a, b = read(f"{pair}_a"), read(f"{pair}_b")
    return _core(read(core), a, b) if core in keys else _product(_matrix(a), _matrix(b))


def _product(a: Array, b: Array) -> Array:
    """`a @ b` in float32, in pieces too small for BLAS to divide among threads. So it has the same bits on any number
    of cores, and no thread waits busily beside those that read and write.
    """
    (out, inner), width = a.shape, b.shape[1]
    rows = max(1, min(_PIECE_ROWS, _PIECE // inner))
    columns = max(1, _PIECE // (rows * inner))
    result = np.empty((out, width), np.float32)
    for i in range(0, out, rows):
        for j in range(0, width, columns):
            piece = result[i : i + rows, j : j + columns]
            np.matmul(a[i : i + rows], b[:, j : j + columns], out=piece)
    return result


def _core(core: Array, a: Array, b: Array) -> Array:
    """Tucker's form: R[p, q, ...] = Σ_ij core[i, j, ...] · a[i, p] · b[j, q]. Shapes: core `[r, r, *kernel]`, a `[r,
    out]`, b `[r, in]`.
    """
    half = _product(a.T, _matrix(core)).reshape(a.shape[1], core.shape[1], -1)  # [out, r, kernel]
    whole = _product(half.swapaxes(1, 2).reshape(-1, b.shape[0]), b)  # [out * kernel, in]
    whole = np.ascontiguousarray(whole.reshape(a.shape[1], -1, b.shape[1]).swapaxes(1, 2))
    return whole.reshape(a.shape[1], b.shape[1], *core.shape[2:])


def _kronecker(a: Array, b: Array) -> Array:
    """`[p, q]` and `[o, i]` to `[p * o, q * i]`. If a kernel is flattened into i, it is flattened in the result too."""
    blocks: Array = a[:, None, :, None] * b[None, :, None, :]
    return blocks.reshape(a.shape[0] * b.shape[0], -1)


def _sparse(read: Read, shape: Shape) -> Array:
    """The residual that LyCORIS's extraction may keep beside the low rank: indices `[2, n]`, values `[n]`, and the size
    `[2]` of a matrix `[out, in * kernel]`.
    """
    indices, values = read("bias_indices").astype(np.int64), read("bias_values")
    size = [int(n) for n in read("bias_size").flatten()]
    good = (
        len(size) == 2
        and size == [shape[0], math.prod(shape[1:])]
        and indices.shape == (2, values.size)
        and values.ndim == 1
    )
    if not good or (values.size and (indices.min() < 0 or (indices.max(axis=1) >= size).any())):
        raise MisfitError(
            f"bias_size {size} with bias_indices {list(indices.shape)} and bias_values {list(values.shape)}"
        )
    dense = np.zeros(size, np.float32)
    np.add.at(dense, (indices[0], indices[1]), values)
    return dense.reshape(shape)


def decomposed(weight: Array, change: Array, magnitude: Array, axis: int) -> Array:
    """DoRA's change: V · m / |V| - W with V = W + ΔW, where |V| are the norms along `axis` and m the magnitudes, one
    for each norm.

    V is normalised, as in its trainers (peft, LyCORIS). Some tools divide by the norm of W instead, where the axis is
    that of the outputs.
    """
    moved = weight + change
    others = tuple(i for i in range(weight.ndim) if i != axis)
    squares = np.sum(np.square(moved), axis=others, keepdims=True, dtype=np.float64)
    norms = np.sqrt(squares).astype(np.float32) + np.finfo(np.float32).eps
    moved *= magnitude.reshape(norms.shape) / norms
    moved -= weight
    return moved
