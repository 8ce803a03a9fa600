"""Opens a file of tensors: safetensors, a file of torch.save, or a PNG that carries an embedding. Names, types and
shapes come at once, data on demand. Nothing in the file is ever executed.

A safetensors header is checked more strictly than the safetensors library does (format document: safetensors README).
Duplicate keys, holes and trailing bytes are refused, and every message names the file and the tensor. Imports no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NoReturn

import numpy as np

from sdrt.errors import InputFileError, UnsafeError, printable
from sdrt.export.adapters.png_embedding import read_png_embedding
from sdrt.export.floats import STORED, Array, widened
from sdrt.export.read.tensor_entry import ITEM_BYTES, MAX_RANK, MAX_TENSORS, TensorEntry
from sdrt.export.read.torch_archive import read_legacy_archive, read_zip_archive
from sdrt.export.read.zip_members import Member, check_member, read_member
from sdrt.files.read import DuplicateKeyError, unique

MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 1 << 20
MAX_SEPARATORS = 4_000_000
"""Most brackets, colons and commas in a header, those in the text of its metadata included. 100,000 tensors have 1.5
million. Bounds the work of parsing.
"""
_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURES = {
    "JPEG": (b"\xff\xd8\xff",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "JPEG XL": (b"\xff\x0a", b"\x00\x00\x00\x0cJXL "),
}
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_LEGACY_TEXT_START = b"L119547037146038801333356L"  # torch's magic number, as protocol 0 spells it


class TensorFile:
    """An open file of tensors. All reads go through one descriptor, so the file cannot be swapped between two reads.
    Thread-safe.

    entries: the tensors by name.
    tree: the same as the file nests them: dictionaries, lists, text and numbers, with entries as leaves. A safetensors
        file is one flat dictionary. If there is a `state_dict`, both `entries` and `tree` start below it.
    metadata: a safetensors file's own.
    notes: remarks for the user.
    decoded: the tensors' bytes, where the file spells them in another way. The offsets of entries then count from its
        start.
    """

    def __init__(
        self,
        path: Path,
        stream: BinaryIO,
        entries: Mapping[str, TensorEntry],
        metadata: Mapping[str, str],
        tree: Any,
        notes: tuple[str, ...] = (),
        decoded: bytes | None = None,
    ) -> None:
        self.path = path
        self.entries = entries
        self.metadata = metadata
        self.tree = tree
        self.notes = notes
        self._stream = stream
        self._decoded = decoded
        self._lock = Lock()  # held from a seek to the end of the read after it
        self._opened = _identity(os.fstat(stream.fileno()))
        self._sha256: str | None = None
        self._checked: set[Member] = set()
        self._inflated: tuple[Member, bytearray] | None = None
        self.size_bytes = self._opened[2]

    def close(self) -> None:
        """Close the file. A thread that is hashing it fails at once."""
        with self._lock:
            self._stream.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_bytes(self, entry: TensorEntry) -> bytearray:
        """The tensor's bytes, little-endian, row-major. Where the entry has strides, all bytes from the first element
        to the last. `TensorEntry.rows` makes an entry of a part; then only the part is read.

        Raises:
            InputFileError: the file is shorter than when it was opened, or damaged.
            UnsafeError: the bytes do not have the checksum that the file states.
        """
        with self._lock:
            return self._read_bytes(entry)

    def _read_bytes(self, entry: TensorEntry) -> bytearray:
        size, start = entry.size_bytes, entry.offset
        if entry.strides and size:
            size = (1 + sum((n - 1) * stride for n, stride in zip(entry.shape, entry.strides, strict=True))) * (
                size // math.prod(entry.shape)
            )
        if self._decoded is not None:
            return bytearray(self._decoded[start : start + size])
        member = entry.storage
        if member is not None and member.deflated_bytes is not None:
            if self._inflated is None or self._inflated[0] != member:
                self._inflated = (member, read_member(self.path, self._stream, member))
            return self._inflated[1][start : start + size]
        if member is not None:
            if member not in self._checked:
                check_member(self.path, self._stream, member)
                self._checked.add(member)
            start += member.offset
        data = bytearray(size)
        with _reading(self.path):
            self._stream.seek(start)
            whole = self._stream.readinto(data) == len(data)  # type: ignore[attr-defined]
        if not whole:
            raise InputFileError(
                f"{self.path}: {printable(entry.name)}: the file changed during the build", "Run the build again."
            )
        return data

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """The tensor's values, row-major, in memory of their own. The type is the stored one, or float32 for bfloat16
        and 8-bit floats, which numpy lacks. With `rows` only the rows from the first number to before the second are
        read.

        Raises:
            InputFileError: the tensor is of a type that is not in `STORED`; or as `read_bytes`.
            UnsafeError: as `read_bytes`.
        """
        entry = self.entries[name] if rows is None else self.entries[name].rows(*rows)
        if entry.dtype not in STORED:
            raise InputFileError(f"{self.path}: {printable(name)}: expected floating-point data, found {entry.dtype}")
        kind = np.dtype(STORED[entry.dtype])
        steps = [stride * kind.itemsize for stride in entry.strides] if entry.size_bytes else []
        stored: Array = np.ndarray(entry.shape, kind, self.read_bytes(entry), strides=steps or None)
        return widened(stored.copy() if steps else stored, entry.dtype)

    def sha256(self) -> str:
        """SHA-256 of the whole file through the same descriptor.

        Raises:
            InputFileError: the file was replaced or written to since it was opened.
        """
        self._sha256 = self._hash()
        return self._sha256

    def check_unchanged(self) -> None:
        """Raise InputFileError if the file has changed: its size or time since it was opened, or its content since
        `sha256` was taken. Another file under the same name counts as a change.
        """
        if sys.platform != "win32":  # nobody can replace an open file on Windows
            try:
                replaced = not os.path.samestat(self.path.stat(), os.fstat(self._stream.fileno()))
            except OSError:
                replaced = True
            if replaced:
                raise self._changed()
        if self._sha256 is None:
            self._check_identity()
        elif self._hash() != self._sha256:
            raise self._changed()

    def _hash(self) -> str:
        digest, block, hashed = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES)), 0
        while True:
            with self._lock, _reading(self.path):
                self._stream.seek(hashed)
                count: int = self._stream.readinto(block)  # type: ignore[attr-defined]
            if not count:
                break
            digest.update(block[:count])
            hashed += count
        self._check_identity()
        return digest.hexdigest()

    def _check_identity(self) -> None:
        if _identity(os.fstat(self._stream.fileno())) != self._opened:
            raise self._changed()

    def _changed(self) -> InputFileError:
        return InputFileError(
            f"{self.path}: changed during the build", "Run the build again when nothing writes to the file."
        )


def open_tensor_file(path: Path) -> TensorFile:
    """Open a safetensors file or a file of torch.save, and check everything except the tensors' values. The content
    decides which of the two it is, not the name.

    Raises:
        InputFileError: the file is missing, not a regular file, of another format, malformed, or past a limit; the
            message says which.
        UnsafeError: bytes follow the last tensor, so the file may be two files in one; or a pickle names anything but
            tensors and plain values.
    """
    stream = _opened(path)
    try:
        with _reading(path):
            status = os.fstat(stream.fileno())
            size, start = status.st_size, stream.read(512) or b""  # None: a file of /proc without anything to read yet
        header_bytes = int.from_bytes(start[:8], "little")
        if start.startswith(_PNG):
            entries, tree, decoded = read_png_embedding(path, stream)
            return TensorFile(path, stream, entries, {}, tree, (), decoded)
        if not (start[8:9] == b"{" and header_bytes <= MAX_HEADER_BYTES and 8 + header_bytes <= size):
            read = (
                read_zip_archive
                if start.startswith(b"PK\x03\x04")
                else read_legacy_archive
                if _is_pickle(path, start)
                else None
            )
            if read is None:
                _refuse(path, start, size, header_bytes)
            archive = read(path, stream, size)
            return TensorFile(path, stream, archive.entries, {}, archive.tree, archive.notes)
        with _reading(path):
            stream.seek(8)
            header = stream.read(header_bytes)
        entries, metadata = _parse_header(path, header, 8 + header_bytes, size)
        return TensorFile(path, stream, entries, metadata, dict(entries))
    except BaseException:
        stream.close()
        raise


def check_present(path: Path) -> None:
    """Check that a file of tensors exists and may be read, before work that takes long.

    Raises:
        InputFileError: it is missing, cannot be opened, or is no regular file.
    """
    _opened(path).close()


def _opened(path: Path) -> BinaryIO:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputFileError(
            f"{printable(str(path))}: cannot open: {reason}{_similar_file(path)}", "Check the path."
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise InputFileError(
            f"{path}: expected a file of tensors, found {kind}", "Give one .safetensors, .ckpt, .pt or .bin file."
        )
    return os.fdopen(descriptor, "rb", buffering=0)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn a failed read of an input into an error that names the input. Inside a build any other error would be taken
    for one of the output.
    """
    try:
        yield
    except OSError as error:
        raise InputFileError(
            f"{path}: cannot be read: {error.strerror}", "Check the disk, or copy the file to another."
        ) from error


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _similar_file(path: Path) -> str:
    try:
        names = [p.name for p in path.absolute().parent.iterdir()]
    except (OSError, ValueError):
        return ""
    match = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {match[0]!r}?" if match and match[0] != path.name else ""


def _is_pickle(path: Path, start: bytes) -> bool:
    """Whether a file that is no safetensors file starts as a pickle. Protocols 0 and 1 have no mark of their own, so
    the name decides too.
    """
    marked = start[0:1] == b"\x80" and start[1:2] <= b"\x05" and len(start) > 8
    texts = (b"<", b"{", b"[", b"version https://git-lfs", b"GGUF", b"\0", b"\xef\xbb\xbf")
    named = (
        path.suffix.lower() in PICKLE_SUFFIXES
        and len(start) > 8
        and not start.lstrip().startswith(texts)
        and start[257:262] != b"ustar"
    )
    return marked or start.startswith(_LEGACY_TEXT_START) or named


def _refuse(path: Path, start: bytes, size: int, header_bytes: int) -> NoReturn:
    """Refuse a file that is not safetensors, and say what it is, as far as its first bytes tell."""
    again = "Download the file again."
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if size <= 8 or header_bytes == 0:
        raise InputFileError(
            f"{path}: {size} bytes{', all zero at the start' if size >= 8 else ''}: an empty or truncated download",
            again,
        )
    if start.startswith(b"version https://git-lfs"):
        raise InputFileError(f"{path}: a git-lfs pointer, not the file itself", "Fetch the file with: git lfs pull")
    if picture := next((name for name, marks in _PICTURES.items() if start.startswith(marks)), None) or (
        "WebP" if start[8:12] == b"WEBP" else None
    ):
        raise InputFileError(
            f"{path}: a picture ({picture}), expected a model's file",
            "Give a model, adapter or bundle; of pictures only a PNG can hold an embedding.",
        )
    if start[257:262] == b"ustar":
        raise InputFileError(
            f"{path}: a tar archive (the form of torch before 0.2?), expected safetensors",
            "Save it again with a later torch.",
        )
    if start.startswith(b"GGUF"):
        raise InputFileError(f"{path}: a GGUF file, expected safetensors", "Get the .safetensors version of the model.")
    if (
        text[:1] in (b"<", b"{", b"[") and header_bytes > MAX_HEADER_BYTES
    ):  # the length of a real header may start with these bytes too
        what = "an HTML page" if text[:1] == b"<" else "JSON text"
        shown = text[:40].decode("utf-8", "replace")
        raise InputFileError(
            f"{path}: {what}, not a safetensors file: it starts with {shown!r}",
            "Download the file again, logged in if the site asks for it.",
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise InputFileError(
            f"{path}: a header of {header_bytes:,} bytes, more than the limit of {MAX_HEADER_BYTES:,}: not a"
            " safetensors file",
            again,
        )
    if 8 + header_bytes > size:
        raise InputFileError(
            f"{path}: truncated: the header needs {8 + header_bytes:,} bytes, the file has {size:,}", again
        )
    raise InputFileError(
        f"{path}: not a safetensors file: the header starts with {start[8:16].decode('latin-1')!r}, expected '{{'",
        again,
    )


def _parse_header(path: Path, header: bytes, start: int, size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    if (separators := sum(header.count(mark) for mark in (b"{", b"[", b":", b","))) > MAX_SEPARATORS:
        message = (
            f"{path}: the header: {separators:,} brackets, colons and commas, more than the limit of {MAX_SEPARATORS:,}"
        )
        raise InputFileError(message, "Save the file without its metadata.")
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=_unicode, parse_constant=_no_constant)
    except DuplicateKeyError as error:
        raise InputFileError(
            f"{path}: {printable(error.name)}: the header holds this name twice",
            "Save the file again; two tensors cannot share a name.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(
            f"{path}: the header is not valid JSON: {printable(str(error))}", "Download the file again."
        ) from error
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputFileError(f"{path}: __metadata__: expected an object of strings")
    if len(document) > MAX_TENSORS:
        raise InputFileError(f"{path}: {len(document):,} tensors, more than the limit of {MAX_TENSORS:,}")
    entries = {name: _entry(path, name, record, start) for name, record in document.items()}
    end = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.offset + e.size_bytes)):
        where = f"{path}: {printable(entry.name)}"
        if entry.offset < end:
            raise InputFileError(
                f"{where}: overlaps the tensor before it: starts at byte {entry.offset - start:,}, expected"
                f" {end - start:,}",
                "Save the file again.",
            )
        if entry.offset > end:
            raise InputFileError(f"{where}: a hole of {entry.offset - end:,} bytes before it", "Save the file again.")
        end = entry.offset + entry.size_bytes
        if end > size:
            raise InputFileError(
                f"{where}: truncated: the tensors need {max(e.offset + e.size_bytes for e in entries.values()):,}"
                f" bytes, the file has {size:,}",
                "Download the file again.",
            )
    if end < size:
        raise UnsafeError(
            f"{path}: {size - end:,} bytes follow the last tensor, expected none: the file may hold something else too",
            "Get the file from its source again.",
        )
    return entries, metadata


def _unicode(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for text in (text for pair in pairs for text in pair if isinstance(text, str)):
        text.encode()  # half of a surrogate pair raises ValueError, as in every JSON reader but Python's
    return unique(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _entry(path: Path, name: str, record: object, start: int) -> TensorEntry:
    where = f"{path}: {printable(name)}"
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputFileError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputFileError(f"{where}: unknown type {printable(repr(dtype))}, expected one of {', '.join(ITEM_BYTES)}")
    if not _counts(shape) or len(shape) > MAX_RANK:
        raise InputFileError(f"{where}: bad shape {printable(repr(shape)[:80])}, expected at most {MAX_RANK} sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputFileError(f"{where}: bad data_offsets {printable(repr(offsets)[:80])}")
    expected, found = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if expected != found:
        raise InputFileError(
            f"{where}: {dtype} {shape} needs {expected:,} bytes, data_offsets give {found:,}", "Save the file again."
        )
    return TensorEntry(name, dtype, tuple(shape), start + offsets[0], found)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in value
    )
