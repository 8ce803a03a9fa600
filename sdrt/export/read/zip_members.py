"""Finds the members of a zip archive and reads them, more strictly than the zip format demands.

The checks here make sure that two readers of one archive see the same: one directory at the very end, headers that
agree with it, no overlap, no gap, no duplicate. Written from PKWARE's APPNOTE 6.3.10; standard library only.
"""

from __future__ import annotations

import itertools
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sdrt.errors import InputFileError, UnsafeError, printable

MAX_MEMBERS = 65_535
MAX_NAME_BYTES = 1024
MIN_EXPANSION_BYTES = 1 << 20
MAX_EXPANSION = 4
"""A file may unpack to this many times its size, or to MIN_EXPANSION_BYTES if that is more. Weights hardly shrink under
deflate, bombs do.
"""

_STORED, _DEFLATED = 0, 8
_END, _END64, _LOCATOR, _CENTRAL, _LOCAL, _DESCRIPTOR = (
    b"PK" + bytes(pair) for pair in ((5, 6), (6, 6), (6, 7), (1, 2), (3, 4), (7, 8))
)
_DESCRIBED, _UTF8 = 0x8, 0x800
_CHUNK = 1 << 22
_AGAIN = "Download the file again."
_SOURCE = "Get the file from its source again, as .safetensors if there is one."


@dataclass(frozen=True)
class Member:
    """Bytes within a file: `size_bytes` stored bytes, or `deflated_bytes` that inflate to `size_bytes`. `crc32` is of
    the unpacked bytes, None where none was kept.
    """

    name: str
    offset: int
    size_bytes: int
    deflated_bytes: int | None = None
    crc32: int | None = None


@dataclass(frozen=True)
class _Header:
    name: bytes
    flags: int
    method: int
    crc32: int
    packed_bytes: int
    size_bytes: int
    offset: int


def expansion_limit(file_bytes: int) -> int:
    """How many bytes a file of this size may unpack to."""
    return max(MAX_EXPANSION * file_bytes, MIN_EXPANSION_BYTES)


def members(path: Path, stream: BinaryIO, size: int) -> list[Member]:
    """The members of the archive in `stream`, `size` bytes long, in the order of the archive's directory.

    Raises:
        InputFileError: the archive is truncated or malformed, or would unpack to more than `expansion_limit`.
        UnsafeError: something that readers of zip files disagree about, a name that leaves the archive, or encryption.
    """
    start, directory_bytes, count, end = _directory(path, stream, size)
    if count > MAX_MEMBERS:
        raise UnsafeError(
            f"{path}: a zip archive of {count:,} members, more than the limit of {MAX_MEMBERS:,}", _SOURCE
        )
    if start + directory_bytes != end:
        raise UnsafeError(
            f"{path}: the zip directory ends at byte {start + directory_bytes:,}, expected {end:,}", _SOURCE
        )
    headers = _central_headers(path, _exactly(path, stream, start, directory_bytes), count)
    deflated = sum(header.size_bytes for header in headers if header.method == _DEFLATED)
    if deflated > expansion_limit(size):
        raise InputFileError(
            f"{path}: its members unpack to {deflated:,} bytes, more than the limit of {expansion_limit(size):,}"
            f" ({MAX_EXPANSION} times the file)",
            _SOURCE,
        )
    found = {header.name: _member(path, stream, header, start) for header in headers}
    _check_gaps(path, stream, headers, found, start)
    return list(found.values())


def read_member(path: Path, stream: BinaryIO, member: Member) -> bytearray:
    """A member's bytes, unpacked and checked.

    Raises:
        InputFileError: the member is damaged, or the file is shorter than when it was opened.
        UnsafeError: the bytes do not have the checksum that the archive states.
    """
    where = f"{path}: {printable(member.name)}"
    if member.deflated_bytes is None:
        data = bytearray(member.size_bytes)
        stream.seek(member.offset)
        if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise InputFileError(f"{where}: the file changed during the build", "Run the build again.")
    else:
        data = _inflated(where, stream, member)
    if member.crc32 is not None and zlib.crc32(data) != member.crc32:
        raise UnsafeError(
            f"{where}: checksum {zlib.crc32(data):08x}, the archive says {member.crc32:08x}: damaged, or tampered with",
            _SOURCE,
        )
    return data


def check_member(path: Path, stream: BinaryIO, member: Member) -> None:
    """Compare the checksum of a stored member, in constant memory, before a part of the member is read. Raises as
    `read_member` does.
    """
    assert member.deflated_bytes is None
    if member.crc32 is None:
        return
    stream.seek(member.offset)
    crc32, left = 0, member.size_bytes
    while left and (chunk := stream.read(min(left, _CHUNK))):
        crc32, left = zlib.crc32(chunk, crc32), left - len(chunk)
    if crc32 != member.crc32:
        where = f"{path}: {printable(member.name)}"
        raise UnsafeError(
            f"{where}: checksum {crc32:08x}, the archive says {member.crc32:08x}: damaged, or tampered with", _SOURCE
        )


def _inflated(where: str, stream: BinaryIO, member: Member) -> bytearray:
    assert member.deflated_bytes is not None
    inflate, data, left = zlib.decompressobj(-zlib.MAX_WBITS), bytearray(), member.deflated_bytes
    stream.seek(member.offset)
    try:
        while left and not inflate.eof and len(data) <= member.size_bytes:
            chunk = stream.read(min(left, _CHUNK))
            if not chunk:
                break
            left -= len(chunk)
            while chunk and len(data) <= member.size_bytes:
                data += inflate.decompress(chunk, member.size_bytes + 1 - len(data))
                chunk = inflate.unconsumed_tail
    except zlib.error as error:
        raise InputFileError(f"{where}: damaged: {error}", _AGAIN) from error
    if len(data) != member.size_bytes or not inflate.eof or left or inflate.unused_data:
        found = f"more than {member.size_bytes:,}" if len(data) > member.size_bytes else f"{len(data):,}"
        raise InputFileError(f"{where}: unpacks to {found} bytes, the archive says {member.size_bytes:,}", _AGAIN)
    return data


def _exactly(path: Path, stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    data = stream.read(size)
    if len(data) != size:
        raise InputFileError(
            f"{path}: truncated: expected {size:,} bytes at byte {offset:,}, found {len(data):,}", _AGAIN
        )
    return data


def _directory(path: Path, stream: BinaryIO, size: int) -> tuple[int, int, int, int]:
    """Start, size and member count of the directory, and where the directory must end."""
    tail_start = max(0, size - 65_557)
    tail = _exactly(path, stream, tail_start, size - tail_start)
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise InputFileError(f"{path}: a truncated zip archive: it has no directory at its end", _AGAIN)
    if at + 22 != len(tail):
        raise UnsafeError(
            f"{path}: {len(tail) - at - 22:,} bytes follow the zip archive, expected none: the file may hold something"
            " else too",
            _SOURCE,
        )
    _, disk, first_disk, here, count, directory_bytes, start, _ = struct.unpack("<4s4H2LH", tail[at:])
    end = tail_start + at
    if disk or first_disk or here != count:
        raise UnsafeError(f"{path}: a zip archive in several parts, expected one", _SOURCE)
    if at < 20 or tail[at - 20 : at - 16] != _LOCATOR:
        return start, directory_bytes, count, end
    _, disk, end64, disks = struct.unpack("<4sLQL", tail[at - 20 : at])
    if disk or disks != 1 or end64 + 56 != end - 20:
        raise UnsafeError(f"{path}: the two ends of the zip archive contradict each other", _SOURCE)
    signature, record_bytes, _, _, disk, first_disk, here64, count64, directory_bytes64, start64 = struct.unpack(
        "<4sQ2H2L4Q", _exactly(path, stream, end64, 56)
    )
    agrees = all(
        short in (full, escape)
        for short, full, escape in (
            (count, count64, 0xFFFF),
            (directory_bytes, directory_bytes64, 0xFFFFFFFF),
            (start, start64, 0xFFFFFFFF),
        )
    )
    if signature != _END64 or record_bytes != 44 or disk or first_disk or here64 != count64 or not agrees:
        raise UnsafeError(f"{path}: the two ends of the zip archive contradict each other", _SOURCE)
    return start64, directory_bytes64, count64, end64


def _central_headers(path: Path, directory: bytes, count: int) -> list[_Header]:
    headers, at = [], 0
    seen: set[bytes] = set()
    for _ in range(count):
        if directory[at : at + 4] != _CENTRAL or len(directory) - at < 46:
            raise InputFileError(f"{path}: the zip directory is malformed at its byte {at:,}", _AGAIN)
        fields = struct.unpack("<4s6H3L5H2L", directory[at : at + 46])
        flags, method, crc32, packed, size, name_bytes, extra_bytes, comment_bytes = *fields[3:5], *fields[7:13]
        disk, attributes, offset = fields[13], fields[15], fields[16]
        name = directory[at + 46 : at + 46 + name_bytes]
        extra = directory[at + 46 + name_bytes : at + 46 + name_bytes + extra_bytes]
        at += 46 + name_bytes + extra_bytes + comment_bytes
        where = f"{path}: {printable(name.decode('utf-8', 'replace'))}"
        size, packed, offset = _wide(where, extra, size, packed, offset)
        _check_header(where, name, flags, method, attributes)
        if name in seen:
            raise UnsafeError(f"{where}: the zip archive holds this member twice", _SOURCE)
        if disk or comment_bytes or (method == _STORED and packed != size):
            raise UnsafeError(
                f"{where}: a zip member stored as {packed:,} bytes of {size:,}, or with a comment: readers disagree"
                " about such",
                _SOURCE,
            )
        seen.add(name)
        headers.append(_Header(name, flags, method, crc32, packed, size, offset))
    if at != len(directory):
        raise UnsafeError(
            f"{path}: the zip directory holds {len(directory) - at:,} bytes after its {count:,} members", _SOURCE
        )
    return headers


def _wide(where: str, extra: bytes, *values: int) -> list[int]:
    """The values. Those too large for 32 bits come from the zip64 field of `extra`."""
    fields, at = {}, 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack("<2H", extra[at : at + 4])
        fields[kind] = extra[at + 4 : at + 4 + size]
        at += 4 + size
    wide, used, result = fields.get(1, b""), 0, []
    for value in values:
        if value == 0xFFFFFFFF:
            if used + 8 > len(wide):
                raise UnsafeError(f"{where}: a zip64 member without its sizes", _SOURCE)
            value = int.from_bytes(wide[used : used + 8], "little")
            used += 8
        result.append(value)
    if used != len(wide):
        raise UnsafeError(f"{where}: a zip member with two sets of sizes", _SOURCE)
    return result


def _check_header(where: str, name: bytes, flags: int, method: int, attributes: int) -> None:
    if flags & ~(_DESCRIBED | _UTF8 | 0x6):  # 0x6: how hard the deflater tried
        what = "is encrypted" if flags & 0x41 else "has flags"
        raise UnsafeError(f"{where}: the zip member {what} (0x{flags:x}), expected plain data", _SOURCE)
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    parts = text.split("/")
    if (
        not text
        or len(name) > MAX_NAME_BYTES
        or "\\" in text
        or "\0" in text
        or any(part in ("", ".", "..") for part in parts)
        or parts[0].endswith(":")
    ):
        raise UnsafeError(f"{where}: a zip member's name that is not a plain relative path", _SOURCE)
    if stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG):
        raise UnsafeError(f"{where}: a zip member that is a link, folder or device, expected a file", _SOURCE)
    if method not in (_STORED, _DEFLATED):
        raise InputFileError(
            f"{where}: packed by method {method}, expected stored or deflated", "Save the file again with torch.save."
        )


def _member(path: Path, stream: BinaryIO, header: _Header, directory_start: int) -> Member:
    where = f"{path}: {printable(header.name.decode())}"
    if header.offset + 30 > directory_start:
        raise InputFileError(
            f"{where}: starts at byte {header.offset:,}, past the members' end at {directory_start:,}", _AGAIN
        )
    fields = struct.unpack("<4s5H3L2H", _exactly(path, stream, header.offset, 30))
    signature, flags, method, crc32, packed, size, name_bytes, extra_bytes = fields[0], *fields[2:4], *fields[6:]
    rest = _exactly(path, stream, header.offset + 30, name_bytes + extra_bytes)
    expected: tuple[object, ...] = (_LOCAL, header.flags, header.method, header.name)
    agrees = (signature, flags, method, rest[:name_bytes]) == expected
    if agrees and not (flags & _DESCRIBED and (crc32, packed, size) == (0, 0, 0)):
        size, packed = _wide(where, rest[name_bytes:], size, packed)
        agrees = (crc32, packed, size) == (header.crc32, header.packed_bytes, header.size_bytes)
    if not agrees:
        raise UnsafeError(
            f"{where}: its header contradicts the zip directory: two readers would see two files", _SOURCE
        )
    start = header.offset + 30 + name_bytes + extra_bytes
    if start + header.packed_bytes > directory_start:
        raise InputFileError(
            f"{where}: {header.packed_bytes:,} bytes from byte {start:,}, past the members' end at {directory_start:,}",
            _AGAIN,
        )
    return Member(
        header.name.decode(),
        start,
        header.size_bytes,
        header.packed_bytes if header.method == _DEFLATED else None,
        header.crc32,
    )


def _check_gaps(
    path: Path, stream: BinaryIO, headers: Sequence[_Header], found: dict[bytes, Member], directory_start: int
) -> None:
    """Check that nothing lies between members but the data descriptors that their flags announce."""
    ordered = sorted(headers, key=lambda header: header.offset)
    starts = [header.offset for header in ordered] + [directory_start]
    if starts[0] != 0:
        raise UnsafeError(
            f"{path}: {starts[0]:,} bytes before the first zip member, expected none: the file may hold something"
            " else too",
            _SOURCE,
        )
    for header, (_, next_start) in zip(ordered, itertools.pairwise(starts), strict=True):
        end = found[header.name].offset + header.packed_bytes
        gap = next_start - end
        where = f"{path}: {printable(header.name.decode())}"
        if gap < 0:
            raise UnsafeError(f"{where}: overlaps the next zip member by {-gap:,} bytes", _SOURCE)
        if gap == 0:
            continue
        described = b""
        if header.flags & _DESCRIBED and gap in (12, 16, 20, 24):
            described = _exactly(path, stream, end, gap)
        sizes = {12: "<3L", 16: "<3L", 20: "<L2Q", 24: "<L2Q"}
        body = (
            described[4:] if gap in (16, 24) and described[:4] == _DESCRIPTOR else described if gap in (12, 20) else b""
        )
        if not body or struct.unpack(sizes[gap], body) != (header.crc32, header.packed_bytes, header.size_bytes):
            raise UnsafeError(f"{where}: {gap:,} bytes follow this zip member that belong to none", _SOURCE)
