"""Files of torch.save to read, and forgeries of them: archives and pickles whose parts may lie."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdrt.errors import InputFileError, SdrtError, UnsafeError
from sdrt.export.read.tensor_file import open_tensor_file

FORMS = [True, False]
FORM_NAMES = ["zip", "legacy"]


def tensors() -> dict[str, torch.Tensor]:
    """A few tensors of every type and layout that torch.save knows, from a seed."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=random)
    return {
        "plain": base.clone(),
        "half": base.half(),
        "bfloat": base.bfloat16(),
        "double": base.double(),
        "integer": torch.arange(5),
        "short": torch.arange(5, dtype=torch.int16),
        "byte": torch.arange(5, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.t(),
        "row": base[1],
        "column": base[:, 2],
        "stepped": base[::2, ::3],
        "one": base[1:2, 3:4],
        "expanded": base[:1].expand(3, 6),
        "shared": base,
    }


def saved(path: Path, value: object, zipped: bool = True, **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_tensor_file(path) as file:
        return {name: torch.from_numpy(file.read(name)) for name in file.entries}


def refused(path: Path, *fragments: str, kind: type[SdrtError] = InputFileError, reading: bool = False) -> SdrtError:
    """Opening `path` fails with exactly this class, in one printable line that names the file, and never advises to
    load it unsafely (P13).
    """
    with pytest.raises(SdrtError) as caught, open_tensor_file(path) as file:
        assert reading, "opened without an error"
        for name in file.entries:
            file.read(name)
    error = caught.value
    assert type(error) is kind, error
    assert error.exit_code == {InputFileError: 3, UnsafeError: 4}[kind]
    assert error.message.startswith(str(path))
    assert error.message.isprintable(), error.message
    assert "weights_only" not in error.message + error.fix
    assert ".load" not in error.fix and "--" not in error.fix
    for fragment in fragments:
        assert fragment in error.message, error.message
    return error


def zipped_pickle(
    path: Path, data: bytes, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    """An archive as torch writes it around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **(members or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


@dataclass
class ZipEntry:
    """A zip member; `local` and `central` replace fields of its two headers."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    attributes: int = 0
    packed: bytes | None = None
    local: dict[str, int] = field(default_factory=dict)
    central: dict[str, int] = field(default_factory=dict)
    local_name: bytes | None = None
    extra: bytes = b""
    after: bytes = b""


def zip_bytes(
    entries: Sequence[ZipEntry],
    *,
    count: int | None = None,
    before: bytes = b"",
    comment: bytes = b"",
    start: int | None = None,
) -> bytes:
    """A zip archive from parts that may lie (PKWARE's APPNOTE 4.3)."""
    out, directory = bytearray(before), b""
    for entry in entries:
        packed = entry.packed if entry.packed is not None else entry.data
        fields = {
            "crc": zlib.crc32(entry.data),
            "packed": len(packed),
            "size": len(entry.data),
            "flags": entry.flags,
            "method": entry.method,
        }
        local, central = fields | entry.local, fields | {"offset": len(out)} | entry.central
        name = entry.name if entry.local_name is None else entry.local_name
        out += struct.pack(
            "<4s5H3L2H",
            b"PK\3\4",
            20,
            local["flags"],
            local["method"],
            0,
            0,
            local["crc"],
            local["packed"],
            local["size"],
            len(name),
            0,
        )
        out += name + packed + entry.after
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\1\2",
            20,
            20,
            central["flags"],
            central["method"],
            0,
            0,
            central["crc"],
            central["packed"],
            central["size"],
            len(entry.name),
            len(entry.extra),
            0,
            0,
            0,
            entry.attributes << 16,
            central["offset"],
        )
        directory += entry.name + entry.extra
    number = len(entries) if count is None else count
    end = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, number, number, len(directory), len(out) if start is None else start, len(comment)
    )
    return bytes(out) + directory + end + comment


def simple_archive(
    *others: ZipEntry, change: Callable[[dict[str, ZipEntry]], None] | None = None, **options: Any
) -> bytes:
    """One float32 tensor "a" of two ones, as torch saves it, with changes."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    with zipfile.ZipFile(stream) as archive:
        entries = {name.split("/", 1)[1]: ZipEntry(name.encode(), archive.read(name)) for name in archive.namelist()}
    if change is not None:
        change(entries)
    return zip_bytes([*entries.values(), *others], **options)


def forged(name: str = "data.pkl", **changes: Any) -> Callable[[dict[str, ZipEntry]], None]:
    def change(entries: dict[str, ZipEntry]) -> None:
        entries[name] = replace(entries[name], **changes)

    return change


def peak_bytes(action: Callable[[], object]) -> int:
    """The most memory an action held at once."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
