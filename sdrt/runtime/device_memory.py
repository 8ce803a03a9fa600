"""Device and pinned host memory in blocks: named arrays at fixed offsets, so that one copy moves a whole picture's inputs.

Imports `cuda.core` only through the objects it is given.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 256
"""TensorRT asks for device addresses on this many bytes."""


@dataclass(frozen=True)
class Section:
    """One array of a block: `offset` in bytes from its start."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    sections: dict[str, Section]
    size_bytes: int


def layout(fields: Sequence[tuple[str, tuple[int, ...], DTypeLike]]) -> Layout:
    """Arrays one after the other, each on a device boundary."""
    sections, offset = {}, 0
    for name, shape, dtype in fields:
        section = Section(offset, shape, np.dtype(dtype))
        sections[name] = section
        offset += -(-section.size_bytes // ALIGNMENT) * ALIGNMENT
    return Layout(sections, offset)


class Block:
    """A block in device memory and, where `pinned` is set, its twin in page-locked host memory. `count` is told of what it starts: allocations, h2d, d2h."""

    def __init__(self, cuda: Any, device: Any, stream: Any, what: Layout, *, pinned: bool, count: Callable[[str], None]) -> None:
        self.layout = what
        self._count = count
        count("allocations")
        self._cuda = cuda
        self._device = device.allocate(what.size_bytes, stream=stream)
        try:
            self._pinned = cuda.LegacyPinnedMemoryResource().allocate(what.size_bytes, stream=stream) if pinned else None
        except BaseException:
            self._device.close(stream)
            raise
        self._host: NDArray[np.uint8] | None = None
        if self._pinned is not None:
            memory = (ctypes.c_uint8 * what.size_bytes).from_address(int(self._pinned.handle))
            self._host = np.ctypeslib.as_array(memory)

    def address(self, name: str) -> int:
        """Device address of an array."""
        return int(self._device.handle) + self.layout.sections[name].offset

    def host(self, name: str) -> NDArray[Any]:
        """The host twin of an array, as a view to read or fill."""
        assert self._host is not None
        section = self.layout.sections[name]
        return self._host[section.offset : section.offset + section.size_bytes].view(section.dtype).reshape(section.shape)

    def upload(self, stream: Any, first: str, last: str, last_bytes: int | None = None) -> None:
        """Start one copy to the device of everything from `first` through `last`, or through the first `last_bytes` of it."""
        self._count("h2d")
        device, host = self._span(first, last, last_bytes)
        device.copy_from(host, stream=stream)

    def download(self, stream: Any, first: str, last: str) -> None:
        """Start one copy to the host; read `host` after the stream has been synchronised."""
        self._count("d2h")
        device, host = self._span(first, last, None)
        host.copy_from(device, stream=stream)

    def copy(self, stream: Any, name: str, source: Block, source_name: str) -> None:
        """Start one copy within the device: an array of this block from an equal one of another."""
        target, origin = self.layout.sections[name], source.layout.sections[source_name]
        assert (target.shape, target.dtype) == (origin.shape, origin.dtype)
        buffers = [
            self._cuda.Buffer.from_handle(block.address(of), target.size_bytes, owner=block._device) for block, of in ((self, name), (source, source_name))
        ]
        buffers[0].copy_from(buffers[1], stream=stream)

    def clear(self, stream: Any) -> None:
        self._device.fill(0, stream=stream)

    def close(self, stream: Any) -> None:
        self._host = None
        self._device.close(stream)
        if self._pinned is not None:
            self._pinned.close(stream)

    def _span(self, first: str, last: str, last_bytes: int | None) -> tuple[Any, Any]:
        assert self._pinned is not None
        start, end = self.layout.sections[first], self.layout.sections[last]
        size = end.offset + (end.size_bytes if last_bytes is None else last_bytes) - start.offset

        def part(buffer: Any) -> Any:
            return self._cuda.Buffer.from_handle(int(buffer.handle) + start.offset, size, owner=buffer)

        return part(self._device), part(self._pinned)
