"""What a file says about one tensor, in any format. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sdrt.export.read.zip_members import Member

MAX_TENSORS = 100_000
MAX_RANK = 8

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "BOOL": 1,
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file. `dtype` is the safetensors code. `offset` counts bytes from the start of the file, or of
    `storage` if that is set.

    `strides` count elements. They are empty where the tensor lies row-major without gaps.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    storage: Member | None = None
    strides: tuple[int, ...] = ()

    def rows(self, start: int, stop: int) -> TensorEntry:
        """The entry of the rows from `start` to before `stop`, along the first dimension."""
        assert self.shape and 0 <= start <= stop <= self.shape[0], (self.name, self.shape, start, stop)
        shape = (stop - start, *self.shape[1:])
        row = math.prod(self.shape[1:])
        item = ITEM_BYTES[self.dtype]
        step = self.strides[0] if self.strides else row
        return replace(self, shape=shape, offset=self.offset + start * step * item, size_bytes=math.prod(shape) * item)
