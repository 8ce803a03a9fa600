"""The exact table behind `pickles.py`: every name that a pickle may hold, and the inert builder that stands in for it.
Imports no torch.

A builder only notes its arguments. Python never looks up a name of this table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STORAGE_TYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
    "UntypedStorage": "U8",
}
_TYPES = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "long": "I64",
    "int32": "I32",
    "int": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
    "complex128": "C128",
}


@dataclass(frozen=True, eq=False)
class Name:
    """A name of the table, as data. It is never looked up."""

    text: str


@dataclass(frozen=True)
class StorageReference:
    """Bytes that tensors are views of, with the key under which the file holds them. In a legacy file a storage may
    itself be a view of these bytes; `first_item` is where it starts.
    """

    key: str
    dtype: str
    items: int
    first_item: int = 0


@dataclass(frozen=True, eq=False)
class TensorReference:
    """A view of a storage, as in the pickle, not yet checked against the storage. Counts are in items of `dtype`."""

    storage: StorageReference
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Baggage:
    """Something a training script left in the file. It is known to hold no weights, and its content was dropped."""

    name: str


@dataclass(frozen=True, eq=False)
class NumpyType:
    code: str


class MalformedPickle(ValueError):
    """The parts of a pickle do not fit together. `read_pickle` adds where."""


class Parameters(dict[Any, Any]):
    """A ParameterDict of torch, as a plain dictionary."""


def kind(value: object) -> str:
    return (
        value.text.replace(" ", ".")
        if isinstance(value, Name)
        else value.name
        if isinstance(value, Baggage)
        else type(value).__name__
    )


def shown(value: object) -> str:
    """A value in a few characters. Never its repr: Python refuses the repr of a huge number, and the repr of shared
    lists may be endless.
    """
    if isinstance(value, tuple | list):
        return (
            "["
            + ", ".join(shown(item) if not isinstance(item, tuple | list) else kind(item) for item in value[:9])
            + (", ...]" if len(value) > 9 else "]")
        )
    return (
        str(value) if isinstance(value, bool | float) or (type(value) is int and abs(value) < 1 << 64) else kind(value)
    )


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise MalformedPickle("a key without a value")
    return {hashable(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def hashable(value: Any) -> Any:
    # Only keys that hash in constant time: a tuple of tuples with shared parts takes exponential time.
    return value if value is None or isinstance(value, str | int | float | bytes | Name) else Baggage(kind(value))


def _tensor(name: str, arguments: tuple[Any, ...]) -> TensorReference:
    """`_rebuild_tensor(storage, offset, shape, strides)`; v2 adds flags and hooks, v3 also the type of an untyped
    storage's items.
    """
    if len(arguments) < 4 or not isinstance(arguments[0], StorageReference):
        raise MalformedPickle("a tensor without a storage")
    storage, offset, shape, strides = arguments[:4]
    dtype = storage.dtype
    if name.endswith("_v3"):
        if len(arguments) < 7 or not isinstance(arguments[6], Name) or not arguments[6].text.startswith("torch "):
            raise MalformedPickle("a tensor without its type")
        dtype = _TYPES.get(arguments[6].text.removeprefix("torch "), "")
    if not is_count(offset) or not isinstance(shape, tuple | list) or not isinstance(strides, tuple | list):
        raise MalformedPickle("a tensor's offset, shape or strides are not numbers")
    return TensorReference(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(name: str, arguments: tuple[Any, ...]) -> TensorReference:
    if not arguments or not isinstance(arguments[0], TensorReference):
        raise MalformedPickle("a parameter that is not a tensor")
    return arguments[0]


def _tensor_with_attributes(name: str, arguments: tuple[Any, ...]) -> TensorReference:
    """`_rebuild_from_type_v2(builder, type, arguments, attributes)`: a tensor that had Python attributes."""
    builder, inner = (arguments[0], arguments[2]) if len(arguments) == 4 else (None, None)
    if (
        not isinstance(builder, Name)
        or not builder.text.startswith("torch._utils _rebuild_tensor")
        or not isinstance(inner, tuple)
    ):
        raise MalformedPickle("a tensor of an unknown type")
    return _tensor(builder.text, inner)


def _dictionary(name: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    items = arguments[-1] if arguments and not name.endswith("defaultdict") else {}
    if isinstance(items, dict):
        return dict(items)
    if not isinstance(items, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in items):
        raise MalformedPickle("a dictionary made of something else than pairs")
    return {hashable(key): value for key, value in items}


def _parameters(name: str, arguments: tuple[Any, ...]) -> Parameters:
    return Parameters()


def _size(name: str, arguments: tuple[Any, ...]) -> list[Any]:
    if len(arguments) != 1 or not isinstance(arguments[0], tuple | list):
        raise MalformedPickle("a size that is no list of numbers")
    return list(arguments[0])


def _baggage(name: str, arguments: tuple[Any, ...]) -> Baggage:
    return Baggage(name.replace(" ", "."))


def _reconstructed(name: str, arguments: tuple[Any, ...]) -> Any:
    """`copyreg._reconstructor(class, object, None)`: how protocols 0 and 1 spell an object without arguments."""
    target = arguments[0] if arguments else None
    builder = NAMES[target.text] if isinstance(target, Name) else None
    if len(arguments) != 3 or not isinstance(target, Name) or builder not in (_parameters, _baggage):
        raise MalformedPickle(f"an object made from {kind(target)}")
    return builder(target.text, ())


def _encoded(name: str, arguments: tuple[Any, ...]) -> bytes:
    """`_codecs.encode(text, "latin1")`: how protocol 2 spells bytes."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        raise MalformedPickle("bytes in an unknown encoding")
    return arguments[0].encode("latin-1")


def _numpy_type(name: str, arguments: tuple[Any, ...]) -> NumpyType:
    if not arguments or not isinstance(arguments[0], str):
        raise MalformedPickle("a numpy type without its code")
    return NumpyType(arguments[0])


def _numpy_scalar(name: str, arguments: tuple[Any, ...]) -> Any:
    formats = {
        "f8": "<d",
        "f4": "<f",
        "f2": "<e",
        "i8": "<q",
        "i4": "<i",
        "i2": "<h",
        "i1": "<b",
        "u8": "<Q",
        "u4": "<L",
        "u2": "<H",
        "u1": "<B",
        "b1": "<?",
    }
    if len(arguments) != 2 or not isinstance(arguments[0], NumpyType) or not isinstance(arguments[1], bytes):
        return _baggage(name, arguments)
    form = formats.get(arguments[0].code)
    if form is None or struct.calcsize(form) != len(arguments[1]):
        return _baggage(name, arguments)
    return struct.unpack(form, arguments[1])[0]


Builder = Callable[[str, tuple[Any, ...]], Any]

NAMES: dict[str, Builder | None] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    "torch._tensor _rebuild_from_type_v2": _tensor_with_attributes,
    "torch Tensor": None,
    "torch.nn.parameter Parameter": None,
    "torch Size": _size,
    "torch device": _baggage,
    "torch.storage UntypedStorage": None,
    "torch.nn.modules.container ParameterDict": _parameters,
    "collections OrderedDict": _dictionary,
    "collections defaultdict": _dictionary,
    "collections Counter": _dictionary,
    "_codecs encode": _encoded,
    "numpy dtype": _numpy_type,
    "numpy ndarray": None,
    "argparse Namespace": _baggage,
    **{
        f"{module} {name}": _baggage
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
    "typing Any": None,
    **{f"{module} {name}": None for module in ("torch", "torch.cuda") for name in STORAGE_TYPES},
    **{f"torch {name}": None for name in _TYPES},
    **{f"{module} scalar": _numpy_scalar for module in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{f"{module} _reconstruct": _baggage for module in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{f"{module} _reconstructor": _reconstructed for module in ("copyreg", "copy_reg")},
    **{
        f"{module} {name}": None
        for module in ("builtins", "__builtin__")
        for name in ("object", "dict", "list", "tuple", "int", "float", "bool", "str", "long")
    },
    **{
        f"{module} {name}": _baggage
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "complex", "slice")
    },
    **{
        f"{package}.callbacks.{name}": _baggage
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "model_checkpoint ModelCheckpoint",
            "early_stopping EarlyStopping",
            "lr_monitor LearningRateMonitor",
            "timer Timer",
        )
    },
    "pytorch_lightning.utilities.parsing AttributeDict": _baggage,
    "lightning_fabric.utilities.data AttributeDict": _baggage,
    "lightning.fabric.utilities.data AttributeDict": _baggage,
    **{
        f"omegaconf.{name}": _baggage
        for name in ("dictconfig DictConfig", "listconfig ListConfig", "base ContainerMetadata", "base Metadata")
    },
    **{
        f"omegaconf.nodes {name}": _baggage
        for name in ("AnyNode", "IntegerNode", "FloatNode", "StringNode", "BooleanNode")
    },
}
"""Every name a pickle may hold, as one text "module name", and the stand-in for a call of it. None: the name may be
mentioned but not called.
"""
