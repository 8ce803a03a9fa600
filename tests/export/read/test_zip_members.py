"""Zip archives: those that two readers would read differently are refused, and bombs before they unpack."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch_files import ZipEntry, forged, peak_bytes, read, refused, saved, simple_archive, tensors

from sdrt.errors import InputFileError, SdrtError, UnsafeError
from sdrt.export.read.tensor_file import open_tensor_file

# P5, P6: archives that two readers would read differently


def test_the_forger_can_make_a_good_archive(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(simple_archive())
    assert torch.equal(read(tmp_path / "x.ckpt")["a"], torch.ones(2))


def more_pickle(entries: dict[str, ZipEntry]) -> None:
    entries["data.pkl"].data += b"cos\nsystem\n."


PAYLOAD = ZipEntry(b"archive/data.pkl", b"cos\nsystem\n.")
P5_P6: dict[str, tuple[bytes, str]] = {
    "payload after STOP": (simple_archive(change=more_pickle), "bytes follow the pickle"),
    "second data.pkl": (simple_archive(PAYLOAD), "holds this member twice"),
    "data.pkl in another folder": (simple_archive(replace(PAYLOAD, name=b"other/data.pkl")), "expected one data.pkl"),
    "data.pkl deeper": (simple_archive(replace(PAYLOAD, name=b"archive/data/data.pkl")), "expected one data.pkl"),
    "local name": (simple_archive(change=forged(local_name=b"archive/datb.pkl")), "contradicts the zip directory"),
    "local size": (simple_archive(change=forged(local={"size": 3, "packed": 3})), "contradicts the zip directory"),
    "local checksum": (simple_archive(change=forged(local={"crc": 1})), "contradicts the zip directory"),
    "local method": (simple_archive(change=forged(local={"method": 8})), "contradicts the zip directory"),
    "local flags": (simple_archive(change=forged(local={"flags": 8})), "contradicts the zip directory"),
    "encrypted": (simple_archive(change=forged(flags=0x1)), "is encrypted"),
    "patched": (simple_archive(change=forged(flags=0x20)), "has flags"),
    "strongly encrypted": (simple_archive(change=forged(flags=0x40)), "is encrypted"),
    "checksum of the pickle": (
        simple_archive(change=forged(local={"crc": 1}, central={"crc": 1})),
        "the archive says 00000001",
    ),
    "checksum of a tensor": (
        simple_archive(change=forged("data/0", local={"crc": 1}, central={"crc": 1})),
        "the archive says 00000001",
    ),
    "name that climbs": (simple_archive(ZipEntry(b"archive/data/../../x", b"")), "plain relative path"),
    "absolute name": (simple_archive(ZipEntry(b"/etc/x", b"")), "plain relative path"),
    "drive": (simple_archive(ZipEntry(b"C:/x", b"")), "plain relative path"),
    "backslash": (simple_archive(ZipEntry(b"archive\\x", b"")), "plain relative path"),
    "folder": (simple_archive(ZipEntry(b"archive/data/", b"")), "plain relative path"),
    "name of no text": (simple_archive(ZipEntry(b"archive/data/\xff", b"")), "plain relative path"),
    "link": (simple_archive(ZipEntry(b"archive/data/7", b"/etc/passwd", attributes=stat.S_IFLNK | 0o777)), "a link"),
    "member of no torch file": (
        simple_archive(ZipEntry(b"archive/run.py", b"")),
        "archive/run.py: not a member that torch.save writes",
    ),
    "duplicate tensor": (simple_archive(ZipEntry(b"x/data/0", b"")), "not a member"),
    "fewer members counted": (simple_archive(count=3), "after its 3 members"),
    "bytes before": (simple_archive(before=b"#!/bin/sh\n"), "bytes before the first zip member"),
    "comment": (simple_archive(comment=b"hello"), "5 bytes follow the zip archive"),
    "bytes after": (simple_archive() + b"MZ", "2 bytes follow the zip archive"),
    "gap": (simple_archive(change=forged("version", after=b"payload")), "7 bytes follow this zip member"),
    "false descriptor": (
        simple_archive(change=forged("version", flags=8, after=b"PK\7\10" + bytes(12))),
        "16 bytes follow this zip member",
    ),
    "overlap": (
        simple_archive(change=forged("data/0", central={"size": 40, "packed": 40}, local={"size": 40, "packed": 40})),
        "overlaps",
    ),
    "zip64 without sizes": (
        simple_archive(change=forged(central={"size": 0xFFFFFFFF})),
        "zip64 member without its sizes",
    ),
    "zip64 sizes that are not wanted": (
        simple_archive(change=forged(extra=struct.pack("<2HQ", 1, 8, 3))),
        "two sets of sizes",
    ),
    "stored but shorter": (simple_archive(change=forged("version", central={"size": 1})), "stored as 2 bytes of 1"),
}


@pytest.mark.parametrize("attack", P5_P6)
def test_p5_p6_archives_that_two_readers_read_differently(tmp_path: Path, attack: str) -> None:
    data, message = P5_P6[attack]
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    if data.startswith(b"PK"):
        refused(path, message, kind=UnsafeError, reading=attack == "checksum of a tensor")
    else:
        refused(path, kind=InputFileError)  # not even taken for an archive


def test_p6_bytes_before_an_archive(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(simple_archive(before=b"PK\3\4" + bytes(26)))
    refused(tmp_path / "x.ckpt", "30 bytes before the first zip member", kind=UnsafeError)


def test_p6_members_without_end(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        for i in range(70_000):
            archive.writestr(zipfile.ZipInfo(f"archive/data/{i}"), b"")
    refused(tmp_path / "x.ckpt", "70,000 members", "65,535", kind=UnsafeError)


def test_p6_two_ends_that_contradict(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    good = stream.getvalue()
    for at, value in ((-98 + 24, 1), (-98 + 32, 3), (-98 + 48, 1), (-42 + 8, 0), (-22 + 8, 2)):
        data = bytearray(good)
        data[at : at + 1] = bytes([value])
        (tmp_path / "x.ckpt").write_bytes(data)
        with pytest.raises(SdrtError) as caught:
            open_tensor_file(tmp_path / "x.ckpt")
        assert caught.value.exit_code == 4, (at, caught.value)


# P7: bombs


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_p7_a_bomb_is_refused_before_it_unpacks(tmp_path: Path, name: str) -> None:
    data = bytes(50_000_000)
    bomb = simple_archive(change=forged(name, data=data, packed=deflated(data), method=8))
    assert len(bomb) < 100_000
    (tmp_path / "x.ckpt").write_bytes(bomb)
    peak = peak_bytes(lambda: refused(tmp_path / "x.ckpt", "unpack to 50,000,0", "more than the limit of 1,048,576"))
    assert peak < 4_000_000


def test_p7_a_bomb_that_lies_about_its_size(tmp_path: Path) -> None:
    packed = deflated(bytes(50_000_000))
    small = {"size": 1000}
    (tmp_path / "x.ckpt").write_bytes(
        simple_archive(change=forged(data=bytes(8), packed=packed, method=8, local=small, central=small))
    )
    peak = peak_bytes(lambda: refused(tmp_path / "x.ckpt", "unpacks to more than 1,000 bytes"))
    assert peak < 4_000_000


def test_p7_40_gb_declared(tmp_path: Path) -> None:
    size = 40 << 30
    wide = struct.pack("<2HQ", 1, 8, size)
    entry = forged(
        "data/0",
        method=8,
        packed=deflated(b"x" * 8),
        local={"size": 0, "crc": 0},
        central={"size": 0xFFFFFFFF},
        extra=wide,
    )
    (tmp_path / "x.ckpt").write_bytes(simple_archive(change=entry))
    peak = peak_bytes(lambda: refused(tmp_path / "x.ckpt", f"unpack to {size:,}"))
    assert peak < 4_000_000


def test_deflated_archives_are_read(tmp_path: Path) -> None:
    good = saved(tmp_path / "x.ckpt", tensors())
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "y.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    found, expected = read(tmp_path / "y.ckpt"), read(good)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_damaged_deflated_member(tmp_path: Path) -> None:
    for packed in (b"\xff" * 40, deflated(bytes(100))[:-1], deflated(bytes(99)), deflated(bytes(100)) + b"x"):
        (tmp_path / "x.ckpt").write_bytes(simple_archive(change=forged(data=bytes(100), packed=packed, method=8)))
        refused(tmp_path / "x.ckpt", "data.pkl")


def test_other_compressions_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(simple_archive(change=forged(method=14)))
    refused(tmp_path / "x.ckpt", "packed by method 14")
