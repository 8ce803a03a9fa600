"""Device and pinned host memory in blocks: named arrays at fixed offsets, so that one copy moves a whole picture's
inputs.

Imports `cuda.core` only through the objects it is given.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ALIGNMENT = 256
"""TensorRT asks for device addresses on this many bytes."""


class NoPinnedMemory(MemoryError):
    """The host has no page-locked memory left. CUDA says the same as where the device has none."""


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "OUT_OF_MEMORY" in str(error)


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
    """A block in device memory and, where `pinned` is set, its twin in page-locked host memory. `count` is told of what
    it starts: allocations, h2d, d2h.
    """

    def __init__(
        self, cuda: Any, device: Any, stream: Any, what: Layout, *, pinned: bool, count: Callable[[str], None]
    ) -> None:
        self.layout = what
        self._count = count
        count("allocations")
        self._cuda = cuda
        self._device = device.allocate(what.size_bytes, stream=stream)
        try:
            self._pinned = (
                cuda.LegacyPinnedMemoryResource().allocate(what.size_bytes, stream=stream) if pinned else None
            )
        except BaseException as error:
            self._device.close(stream)
            if isinstance(error, Exception) and out_of_memory(error):
                raise NoPinnedMemory(f"{what.size_bytes:,} bytes: {error}") from error
            raise
        self._host: NDArray[np.uint8] | None = None
        if self._pinned is not None:
            self._pinned.set_deallocation_stream(stream)  # else it waits for the default stream, which knows no copy
            memory = (ctypes.c_uint8 * what.size_bytes).from_address(int(self._pinned.handle))
            self._host = np.ctypeslib.as_array(memory)

    def address(self, name: str) -> int:
        """Device address of an array."""
        return int(self._device.handle) + self.layout.sections[name].offset

    def host(self, name: str) -> NDArray[Any]:
        """The host twin of an array, as a view to read or fill."""
        assert self._host is not None
        section = self.layout.sections[name]
        return (
            self._host[section.offset : section.offset + section.size_bytes].view(section.dtype).reshape(section.shape)
        )

    @contextmanager
    def host_kept(self) -> Iterator[None]:
        """Put the host's twin back as it was when the block ends. Nothing may be using it then."""
        assert self._host is not None
        before = self._host.copy()
        yield
        self._host[...] = before

    def upload(self, stream: Any, first: str, last: str) -> None:
        """Start one copy to the device of everything from `first` through `last`."""
        self.to_device(stream, *self._between(first, last))

    def upload_parts(self, stream: Any, parts: Sequence[tuple[str, int, int]]) -> None:
        """Start copies to the device of entries `first` up to `end` of arrays, along their first axis. What lies side
        by side is one copy.
        """
        spans: list[list[int]] = []
        for start, end in sorted(self._entries(*part) for part in parts):
            if spans and start <= spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([start, end])
        for start, end in spans:
            self.to_device(stream, start, end)

    def to_device(self, stream: Any, start: int, end: int) -> None:
        """Start one copy of the block's bytes from `start` up to `end`."""
        self._count("h2d")
        device, host = self._span(start, end)
        device.copy_from(host, stream=stream)

    def download(self, stream: Any, first: str, last: str) -> None:
        """Start one copy to the host; read `host` after the stream has been synchronised."""
        self._count("d2h")
        device, host = self._span(*self._between(first, last))
        host.copy_from(device, stream=stream)

    def copy(self, stream: Any, offset: int, source: Block, source_offset: int, size_bytes: int) -> None:
        """Start one copy within the device, from another block into this one. Offsets are in bytes; `offset` gives
        them.
        """
        target, origin = (
            self._cuda.Buffer.from_handle(int(block._device.handle) + start, size_bytes, owner=block._device)
            for block, start in ((self, offset), (source, source_offset))
        )
        target.copy_from(origin, stream=stream)

    def offset(self, name: str, *index: int) -> int:
        """Where an entry of an array begins in the block, in bytes."""
        section = self.layout.sections[name]
        sides = section.shape
        return section.offset + section.dtype.itemsize * sum(
            i * math.prod(sides[axis + 1 :]) for axis, i in enumerate(index)
        )

    def clear(self, stream: Any) -> None:
        self._device.fill(0, stream=stream)

    def close(self, stream: Any) -> None:
        self._host = None
        self._device.close(stream)
        if self._pinned is not None:
            self._pinned.close(stream)

    def _between(self, first: str, last: str) -> tuple[int, int]:
        end = self.layout.sections[last]
        return self.layout.sections[first].offset, end.offset + end.size_bytes

    def _entries(self, name: str, first: int, end: int) -> tuple[int, int]:
        """The bytes of entries of an array, and of the padding after it where they are its last ones."""
        start, stop = self.offset(name, first), self.offset(name, end)
        return start, -(-stop // ALIGNMENT) * ALIGNMENT if end == self.layout.sections[name].shape[0] else stop

    def _span(self, start: int, end: int) -> tuple[Any, Any]:
        assert self._pinned is not None

        def part(buffer: Any) -> Any:
            return self._cuda.Buffer.from_handle(int(buffer.handle) + start, end - start, owner=buffer)

        return part(self._device), part(self._pinned)


class Activations:
    """What TensorRT computes in. All that runs on one stream shares it, one after the other.

    A captured graph holds its address. So one that a larger one has replaced is kept until the last step that holds it
    has let it go.
    """

    def __init__(self, device: Any, stream: Any, size_bytes: int) -> None:
        self.size_bytes = max(size_bytes, 1)
        self.replaced = False
        self._holders = 0
        self._buffer = device.allocate(self.size_bytes, stream=stream)

    @property
    def address(self) -> int:
        return int(self._buffer.handle)

    def hold(self) -> None:
        self._holders += 1

    def let_go(self, stream: Any) -> None:
        self._holders -= 1
        if self.replaced and not self._holders:
            self._buffer.close(stream)

    def replace(self, stream: Any) -> None:
        self.replaced = True
        if not self._holders:
            self._buffer.close(stream)
