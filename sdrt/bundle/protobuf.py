"""Reads and writes the encoding of protobuf messages (protobuf.dev/programming-guides/encoding), strictly. Standard
library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Value = int | memoryview
ONCE, MANY = False, True
"""How often a field may come. One that is marked once may not come twice, since readers differ about such repeats."""


def fields(data: memoryview, what: str, known: Mapping[int, bool]) -> Iterator[tuple[int, Value]]:
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


def packed(data: memoryview) -> list[int]:
    found, position = [], 0
    while position < len(data):
        value, position = _varint(data, position, "tensor")
        found.append(value)
    return found


def only(data: memoryview, what: str, known: Mapping[int, bool]) -> dict[int, Value]:
    """A message whose fields all come once, by field number."""
    return dict(fields(data, what, known))


def message(value: Value, what: str) -> memoryview:
    """A field's value that has to be bytes. Raises ValueError if it is a number."""
    if isinstance(value, int):
        raise ValueError(f"{what}: a number where a message should be")
    return value


def encoded(number: int, values: Iterable[int | bytes | str | memoryview]) -> bytes:
    """A field for each value: a number that is not negative, or text, bytes or a message."""
    found = bytearray()
    for value in values:
        if isinstance(value, int):
            found += _varint_bytes(number << 3 | _VARINT) + _varint_bytes(value)
            continue
        data = value.encode() if isinstance(value, str) else value
        found += _varint_bytes(number << 3 | _BYTES) + _varint_bytes(len(data)) + data
    return bytes(found)


def _varint_bytes(value: int) -> bytes:
    """A number that is not negative, seven bits a byte, lowest first."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
