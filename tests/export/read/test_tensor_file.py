"""The safetensors reader: what it reads equals the safetensors library, and every bad file is refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from conftest import CHECKPOINT, LORA, RawTensor, write_raw
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdrt.bundle import remembered
from sdrt.errors import InputFileError, SdrtError, UnsafeError
from sdrt.export.read import tensor_file
from sdrt.export.read.tensor_entry import ITEM_BYTES
from sdrt.export.read.tensor_file import open_tensor_file

Header = dict[str, Any]


def record(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: Header | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from a header and data; `length` lies about the header's size."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def refused(path: Path, *fragments: str, kind: type[SdrtError] = InputFileError) -> SdrtError:
    """Opening `path` fails with exactly this class, in one printable line that names the file and holds
    the fragments.
    """
    with pytest.raises(SdrtError) as caught:
        open_tensor_file(path).close()
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == {InputFileError: 3, UnsafeError: 4}[kind]
    assert error.message.startswith(str(path))
    assert error.message.isprintable(), error.message
    for fragment in fragments:
        assert fragment in error.message
    return error


GOOD: Header = {"a": record(), "b": record("F16", [2, 3], [8, 20])}
GOOD_DATA = bytes(range(20))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# Good files


TORCH_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def test_every_type_reads_as_the_library_reads_it(file: Path) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {code: (torch.rand(3, 5, generator=random) * 4 - 2).to(kind) for code, kind in TORCH_TYPES.items()}
    save_file(tensors, file)
    oracle = load_file(file)
    with open_tensor_file(file) as opened:
        assert opened.entries.keys() == tensors.keys()
        for code, kind in TORCH_TYPES.items():
            found = torch.from_numpy(opened.read(code))
            expected = oracle[code].float() if code.startswith(("BF", "F8")) else oracle[code]
            assert opened.entries[code].dtype == code and oracle[code].dtype == kind
            assert found.dtype == expected.dtype and found.shape == (3, 5)
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("code", ["U16", "U32", "U64"])
def test_unsigned_types_are_read_as_bytes_only(file: Path, code: str) -> None:
    data = bytes(range(2 * ITEM_BYTES[code]))
    file.write_bytes(packed({"a": record(code, [2], [0, len(data)])}, data))
    with open_tensor_file(file) as opened:
        assert opened.read_bytes(opened.entries["a"]) == data
        with pytest.raises(InputFileError, match=f"a: expected floating-point data, found {code}"):
            opened.read("a")


@pytest.mark.parametrize("path", [CHECKPOINT, LORA], ids=lambda p: p.stem)
def test_real_files_read_as_the_library_reads_them(path: Path) -> None:
    oracle = load_file(path)
    with open_tensor_file(path) as opened:
        assert opened.entries.keys() == oracle.keys()
        for name, tensor in oracle.items():
            assert torch.equal(torch.from_numpy(opened.read(name)), tensor), name
        assert opened.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert opened.size_bytes == path.stat().st_size
        with safetensors.safe_open(path, "pt") as other:
            assert opened.metadata == other.metadata()


def test_entries_keep_the_order_of_the_header_not_of_the_data(file: Path) -> None:
    file.write_bytes(
        packed({"z": record(offsets=[8, 16]), "a": record(offsets=[16, 24]), "m": record(offsets=[0, 8])}, bytes(24))
    )
    with open_tensor_file(file) as opened:
        assert list(opened.entries) == ["z", "a", "m"]


def test_metadata_is_read_and_is_not_a_tensor(file: Path) -> None:
    write_raw(file, {"a": RawTensor("F32", (1,), bytes(4))}, {"title": "ünï", "empty": ""})
    with open_tensor_file(file) as opened:
        assert opened.metadata == {"title": "ünï", "empty": ""}
        assert list(opened.entries) == ["a"]


def test_scalar_and_empty_tensors(file: Path) -> None:
    tensors = {
        "scalar": RawTensor("F32", (), b"\0\0\x80\x3f"),
        "none": RawTensor("F16", (0,), b""),
        "flat": RawTensor("F16", (3, 0, 2), b""),
        "last": RawTensor("U8", (1,), b"\x07"),
    }
    write_raw(file, tensors)
    with open_tensor_file(file) as opened:
        assert opened.read("scalar").item() == 1.0
        assert opened.read("none").shape == (0,)
        assert opened.read("flat").shape == (3, 0, 2)
        assert opened.read("flat").dtype == np.float16
        assert opened.read("last").item() == 7


def test_file_without_tensors(file: Path) -> None:
    file.write_bytes(packed({}))
    with open_tensor_file(file) as opened:
        assert not opened.entries
        assert not opened.metadata


def test_padded_header(file: Path) -> None:
    file.write_bytes(packed(json.dumps(GOOD) + " " * 31, GOOD_DATA))
    with open_tensor_file(file) as opened:
        assert opened.read_bytes(opened.entries["b"]) == GOOD_DATA[8:]


def test_c21_symlinked_file(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(packed(GOOD, GOOD_DATA))
    (tmp_path / "model.safetensors").symlink_to("blob")
    with open_tensor_file(tmp_path / "model.safetensors") as opened:
        assert opened.read_bytes(opened.entries["a"]) == GOOD_DATA[:8]


@pytest.mark.parametrize("name", ["two words.safetensors", "emoji 🍎.safetensors", "new\nline.safetensors"])
def test_odd_file_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(packed(GOOD, GOOD_DATA))
    with open_tensor_file(tmp_path / name) as opened:
        assert list(opened.entries) == ["a", "b"]


# Files of another kind, and broken downloads


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(8)], ids=["nothing", "7 bytes", "8 zeros"])
def test_c1_empty_downloads(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    error = refused(file, f"{len(content)} bytes", "empty or truncated download")
    assert "Download" in error.fix


def test_all_zero_file(file: Path) -> None:
    file.write_bytes(bytes(4096))
    refused(file, "4096 bytes", "all zero at the start")


@pytest.mark.parametrize("cut", [1, 10])
def test_c5_truncated_in_the_data(file: Path, cut: int) -> None:
    whole = packed(GOOD, GOOD_DATA)
    file.write_bytes(whole[:-cut])
    refused(file, ": b: truncated", f"need {len(whole)} bytes", f"the file has {len(whole) - cut}")


@pytest.mark.parametrize("low", [None, *b"<{[ \n"])
def test_c5_truncated_in_the_header(file: Path, low: int | None) -> None:
    """Whatever the first byte of its length looks like: `<` is no HTML page, `{` no JSON."""
    text = json.dumps(GOOD)
    text += " " * ((low - len(text)) % 256 if low is not None else 0)
    whole = packed(text, GOOD_DATA)
    assert low is None or whole[0] == low
    file.write_bytes(whole[:30])
    refused(file, "truncated", f"the header needs {8 + len(text)} bytes", "the file has 30")


def test_c2_git_lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n")
    assert "git lfs pull" in refused(file, "git-lfs pointer").fix


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("<!DOCTYPE html>\n<html><head><title>Sign in</title>", "an HTML page"),
        ("\n\n  <html>", "an HTML page"),
        ("\ufeff<!DOCTYPE html><html>", "an HTML page"),
        ('{"error": "Access to model is restricted\\u001b[0m"}', "JSON text"),
        ('  [{"error": 1}]', "JSON text"),
    ],
)
def test_c3_web_pages(file: Path, content: str, what: str) -> None:
    file.write_text(content, encoding="utf-8")
    error = refused(file, what, content.strip("\ufeff \n")[:8])
    assert "logged in" in error.fix


def test_c3_the_start_of_a_page_is_shown_escaped(file: Path) -> None:
    file.write_bytes(b"<html>\x1b[31m\x00" + b"x" * 500)
    refused(file, "\\x1b[31m\\x00")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_c4_the_content_tells_the_format_not_the_name(file: Path, zipped: bool) -> None:
    torch.save({"a": torch.arange(4.0)}, file, _use_new_zipfile_serialization=zipped)
    with open_tensor_file(file) as opened:
        assert opened.read("a").tolist() == [0, 1, 2, 3]
    save_file({"a": torch.arange(4.0)}, file.with_suffix(".ckpt"))
    with open_tensor_file(file.with_suffix(".ckpt")) as opened:
        assert opened.read("a").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_that_torch_did_not_write(file: Path, protocol: int) -> None:
    file.write_bytes(pickle.dumps({"state_dict": list(range(100))}, protocol=protocol))
    error = refused(file, "a Python pickle that torch.save did not write")
    assert "weights_only" not in error.fix


def test_gguf_under_another_name(file: Path) -> None:
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(100))
    refused(file, "a GGUF file")


def test_other_binary_file(file: Path) -> None:
    file.write_bytes((40).to_bytes(8, "little") + b"\x1b]0;" + bytes(100))
    refused(file, "not a safetensors file", "\\x1b]0;")


# Headers


@pytest.mark.parametrize("offsets", [[0, 8], [8, 16]], ids=["same offsets", "other offsets"])
def test_c9_duplicate_tensor(file: Path, offsets: list[int]) -> None:
    text = f'{{"a.weight":{json.dumps(record())},"a.weight":{json.dumps(record(offsets=offsets))}}}'
    file.write_bytes(packed(text, bytes(offsets[1])))
    refused(file, ": a.weight: ", "twice")


def test_duplicate_field_of_a_tensor(file: Path) -> None:
    file.write_bytes(packed('{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)))
    refused(file, "dtype", "twice")


def test_c7_overlapping_tensors(file: Path) -> None:
    file.write_bytes(packed({"first": record(), "second": record(offsets=[4, 12])}, bytes(12)))
    refused(file, ": second: overlaps", "starts at byte 4, expected 8")


def test_same_bytes_for_two_tensors(file: Path) -> None:
    file.write_bytes(packed({"first": record(), "second": record()}, bytes(8)))
    refused(file, ": second: overlaps")


@pytest.mark.parametrize("start", [1, 64])
def test_c7_hole(file: Path, start: int) -> None:
    file.write_bytes(packed({"first": record(), "second": record(offsets=[8 + start, 16 + start])}, bytes(16 + start)))
    refused(file, ": second: a hole", f"{start} bytes")


def test_hole_before_the_first_tensor(file: Path) -> None:
    file.write_bytes(packed({"first": record(offsets=[4, 12])}, bytes(12)))
    refused(file, ": first: a hole", "4 bytes")


@pytest.mark.parametrize(
    "offsets", [[8, 0], [0], [0, 4, 8], [0.0, 8.0], [-8, 0], [False, 8], "0-8", None, [0, 1 << 64]]
)
def test_c7_bad_offsets(file: Path, offsets: object) -> None:
    file.write_bytes(packed({"layer": record(offsets=offsets)}, bytes(8)))
    refused(file, ": layer: bad data_offsets")


def test_c7_offsets_past_the_end(file: Path) -> None:
    whole = packed({"layer": record(shape=[1 << 40], offsets=[0, 4 << 40])}, bytes(8))
    file.write_bytes(whole)
    refused(file, ": layer: truncated", f"{(4 << 40) + len(whole) - 8:,}", f"the file has {len(whole)}")


def test_c6_trailing_bytes(file: Path) -> None:
    file.write_bytes(packed(GOOD, GOOD_DATA + b"x" * 3))
    refused(file, "3 bytes follow the last tensor", kind=UnsafeError)


def test_c6_zip_appended(file: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("archive/data.pkl", b"payload")
    file.write_bytes(packed(GOOD, GOOD_DATA + archive.getvalue()))
    assert zipfile.is_zipfile(file)
    refused(file, f"{len(archive.getvalue())} bytes follow", kind=UnsafeError)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 200_000_000, 100_000_001])
def test_c8_header_above_the_limit(file: Path, length: int) -> None:
    file.write_bytes(packed("{" + " " * 600, length=length))
    refused(file, f"{length:,}", "100,000,000")


def test_header_above_the_limit_in_a_file_of_that_size(file: Path) -> None:
    file.write_bytes(packed("{", length=100_000_001))
    os.truncate(file, 100_000_001 + 8)
    refused(file, "100,000,001", "100,000,000")


def test_header_of_exactly_the_limit(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(GOOD)
    file.write_bytes(packed(text, GOOD_DATA))
    monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", len(text))
    open_tensor_file(file).close()
    monkeypatch.setattr(tensor_file, "MAX_HEADER_BYTES", len(text) - 1)
    refused(file, "more than the limit")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a\xff":1}',
        b"{" + b'"a":[' * 100_000,
        b'{"a":' * 100_000,
        b'{"a":1',
        b"{}{}",
        b"{'a':1}",
        b'{"a":' + b"9" * 10_000 + b"}",
        b'{"a\x00b":1}',
        '{"a":1}'.encode("utf-16-le"),
    ],
    ids=[
        "not utf-8",
        "deep lists",
        "deep objects",
        "unfinished",
        "two objects",
        "single quotes",
        "huge number",
        "raw NUL",
        "utf-16",
    ],
)
def test_c13_header_that_is_not_json(file: Path, header: bytes) -> None:
    file.write_bytes(packed(header, bytes(8)))
    refused(file, "the header is not valid JSON")


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_json_constants(file: Path, constant: str) -> None:
    file.write_bytes(packed(f'{{"a":{{"dtype":"F32","shape":[{constant}],"data_offsets":[0,8]}}}}', bytes(8)))
    refused(file, "not valid JSON", constant)


@pytest.mark.parametrize("metadata", ["text", 1, None, ["x"], {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}])
def test_metadata_that_is_not_an_object_of_strings(file: Path, metadata: object) -> None:
    file.write_bytes(packed({"__metadata__": metadata, **GOOD}, GOOD_DATA))
    refused(file, "__metadata__", "strings")


def test_c13_control_characters_in_names_are_shown_escaped(file: Path) -> None:
    file.write_bytes(packed({"\x1b[31mred\0\u202e": record("F13")}, bytes(8)))
    refused(file, "\\x1b[31mred\\x00\\u202e")


def test_control_characters_in_a_type_are_shown_escaped(file: Path) -> None:
    file.write_bytes(packed({"a": record("F\x1b[2J")}, bytes(8)))
    refused(file, ": a: unknown type", "\\x1b[2J")


@pytest.mark.parametrize("dtype", ["F13", "f32", "", 32, None, ["F32"], True])
def test_c11_unknown_type(file: Path, dtype: object) -> None:
    file.write_bytes(packed({"a": record(dtype)}, bytes(8)))
    refused(file, ": a: unknown type", "expected one of F64, F32")


@pytest.mark.parametrize(
    "shape",
    [[-2], [2.0], [True, 2], ["2"], "2", 2, None, {"0": 2}, [[2]], [1] * 20, [10**400]],
    ids=lambda s: str(s)[:20],
)
def test_c10_bad_shape(file: Path, shape: object) -> None:
    file.write_bytes(packed({"a": record(shape=shape)}, bytes(8)))
    error = refused(file, ": a: bad shape")
    assert len(error.message) < 400


@pytest.mark.parametrize("shape", [[3], [1], [], [2, 0], [1 << 62, 8], [(1 << 63) - 1] * 8])
def test_c10_shape_that_does_not_fill_its_bytes(file: Path, shape: list[int]) -> None:
    file.write_bytes(packed({"a": record(shape=shape)}, bytes(8)))
    refused(file, ": a: F32", f"needs {math.prod(shape) * 4:,} bytes", "data_offsets give 8")


@pytest.mark.parametrize("bad", [[], 1, None, {}, {"dtype": "F32", "shape": [2]}, record() | {"extra": 1}])
def test_records_of_another_form(file: Path, bad: object) -> None:
    file.write_bytes(packed({"a": bad}, bytes(8)))
    refused(file, ": a: expected dtype, shape and data_offsets")


def test_c8_too_many_tensors(file: Path) -> None:
    one = json.dumps(record("U8", [0], [0, 0]))
    names = ",".join(f'"{i}":{one}' for i in range(100_001))
    file.write_bytes(packed(f"{{{names}}}"))
    refused(file, "100,001 tensors", "100,000")


# Paths


def test_c19_folder(tmp_path: Path) -> None:
    refused(tmp_path, "found a folder")


def test_c19_pipe_does_not_wait_for_a_writer(file: Path) -> None:
    os.mkfifo(file)
    refused(file, "found a device, pipe or socket")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero")
def test_c19_device() -> None:
    refused(Path("/dev/zero"), "found a device, pipe or socket")


def test_missing_file_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "realistic-v2.safetensors").touch()
    (tmp_path / "other.txt").touch()
    refused(tmp_path / "realistc-v2.safetensors", "No such file", "did you mean 'realistic-v2.safetensors'?")


def test_missing_file_without_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "did you mean" not in refused(tmp_path / "model.safetensors", "No such file").message


def test_near_name_is_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "model\x1b[31m.safetensors").touch()
    refused(tmp_path / "model.safetensors", "did you mean 'model\\x1b[31m.safetensors'?")


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none" / "model.safetensors", "No such file")


def test_c19_dangling_symlink(file: Path) -> None:
    file.symlink_to("nowhere")
    refused(file, "No such file")


def test_symlink_loop(file: Path) -> None:
    file.symlink_to(file)
    refused(file, "cannot open")


@pytest.mark.parametrize(
    "name",
    ["x" * 4096, "a\0b.safetensors", "a\0b/c.safetensors", ""],
    ids=["4 KiB", "NUL", "NUL in the folder", "empty"],
)
def test_c19_impossible_paths(name: str) -> None:
    with pytest.raises(InputFileError) as caught:
        open_tensor_file(Path(name))
    assert caught.value.message.isprintable()


@pytest.mark.skipif(os.getuid() == 0, reason="root may read anything")
def test_unreadable_file(file: Path) -> None:
    file.write_bytes(packed(GOOD, GOOD_DATA))
    file.chmod(0)
    refused(file, "Permission denied")


# Files that change


def test_file_truncated_after_opening(file: Path) -> None:
    file.write_bytes(packed(GOOD, GOOD_DATA))
    with open_tensor_file(file) as opened:
        os.truncate(file, file.stat().st_size - 1)
        assert len(opened.read_bytes(opened.entries["a"])) == 8
        with pytest.raises(InputFileError, match="changed during the build") as caught:
            opened.read("b")
        assert f"{file}: b" in caught.value.message
        with pytest.raises(InputFileError, match="changed during the build"):
            opened.sha256()


@pytest.mark.parametrize("how", ["check_unchanged", "sha256"])
def test_file_rewritten_after_opening(file: Path, how: str) -> None:
    file.write_bytes(packed(GOOD, GOOD_DATA))
    with open_tensor_file(file) as opened:
        getattr(opened, how)()
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\xff")
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        with pytest.raises(InputFileError, match="changed during the build") as caught:
            getattr(opened, how)()
        assert str(file) in caught.value.message


def test_a_time_of_change_alone_is_looked_into(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a minute ahead, so that the file looks settled. Only then its times are trusted: a change of mode
    passes, another byte does not, and nothing is read where nothing happened.
    """
    now, reads = time.time_ns, list[int]()
    monkeypatch.setattr(remembered.time, "time_ns", lambda: now() + 60_000_000_000)
    monkeypatch.setattr(tensor_file, "hashlib", Hashes(reads))
    file.write_bytes(packed(GOOD, GOOD_DATA))
    with open_tensor_file(file) as opened:
        assert opened.changes_show
        opened.sha256()
        opened.check_unchanged()
        assert len(reads) == 1
        time.sleep(0.02)  # more than a tick of the file system's clock
        file.chmod(0o600)
        opened.check_unchanged()
        assert len(reads) == 2
        before = file.stat()
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\xff")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(InputFileError, match="changed during the build"):
            opened.check_unchanged()


@pytest.mark.parametrize("mount", [("nfs4", "host:/x"), ("fuseblk", "/dev/sdb1"), ("ext4", "/dev/loop7")])
def test_times_are_not_trusted_where_another_keeps_them(
    file: Path, monkeypatch: pytest.MonkeyPatch, mount: tuple[str, str]
) -> None:
    now = time.time_ns
    monkeypatch.setattr(remembered.time, "time_ns", lambda: now() + 60_000_000_000)
    monkeypatch.setattr(remembered, "_mount", lambda descriptor: mount)
    file.write_bytes(packed(GOOD, GOOD_DATA))
    with open_tensor_file(file) as opened:
        assert not opened.changes_show


class Hashes:
    """hashlib that notes each hash that is begun."""

    def __init__(self, begun: list[int]) -> None:
        self.begun = begun

    def sha256(self, data: bytes = b"") -> Any:
        self.begun.append(len(data))
        return hashlib.sha256(data)


def test_reading_and_hashing_at_the_same_time(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, (64, 100_000), np.uint8)
    path = tmp_path / "x.safetensors"
    write_raw(path, {f"t{i}": RawTensor("U8", (100_000,), row.tobytes()) for i, row in enumerate(data)})
    with open_tensor_file(path) as opened, ThreadPoolExecutor(2) as pool:
        hashes = [pool.submit(opened.sha256) for _ in range(2)]
        for i, row in enumerate(data):
            assert opened.read_bytes(opened.entries[f"t{i}"]) == row.tobytes()
        assert {found.result() for found in hashes} == {hashlib.sha256(path.read_bytes()).hexdigest()}


def test_closing_ends_a_hash_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tensor_file, "_BLOCK_BYTES", 1
    )  # a thousand blocks a millisecond at best: minutes for this file
    path = tmp_path / "x.safetensors"
    write_raw(path, {"t": RawTensor("U8", (50_000_000,), bytes(50_000_000))})
    opened = open_tensor_file(path)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(opened.sha256)
        opened.close()
        assert isinstance(found.exception(timeout=60), ValueError)


def test_file_replaced_after_opening_is_still_the_one_that_was_opened(file: Path, tmp_path: Path) -> None:
    file.write_bytes(packed(GOOD, GOOD_DATA))
    with open_tensor_file(file) as opened:
        other = tmp_path / "other"
        other.write_bytes(packed(GOOD, bytes(20)))
        other.replace(file)
        assert opened.read_bytes(opened.entries["b"]) == GOOD_DATA[8:]
        assert opened.sha256() == hashlib.sha256(packed(GOOD, GOOD_DATA)).hexdigest()


# Random damage

_SEED = packed(
    {
        "__metadata__": {"format": "pt", "title": "x"},
        "a": record(),
        "layers.0.b": record("F16", [2, 3], [8, 20]),
        "c": record("I8", [0, 4], [20, 20]),
        "d": record("BF16", [], [20, 22]),
    },
    bytes(range(22)),
)
_SNIPPETS = st.sampled_from(
    [
        b"",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b"0",
        b"1",
        b"-1",
        b"8",
        b"1e1",
        b"NaN",
        b"null",
        b"F32",
        b"U8",
        b"BOOL",
        b"\\u0000",
        b" ",
        b'"a"',
    ]
)
_REPLACED = st.tuples(
    st.integers(0, len(_SEED) - 1),
    st.just(1),
    st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from([b"0", b"2", b" "])),
    st.just(False),
)
_EDITED = st.tuples(
    st.integers(0, len(_SEED)),
    st.integers(0, 6),
    st.one_of(_SNIPPETS, st.binary(max_size=4)),
    st.sampled_from([True, True, False]),
)
_BLANKS = st.tuples(st.integers(8, len(_SEED) - 22), st.just(0), st.sampled_from([b" ", b"\n\t"]), st.just(True))


@given(
    edits=st.lists(st.one_of(_REPLACED, _BLANKS, _EDITED), max_size=4),
    cut=st.one_of(st.just(0), st.just(0), st.integers(0, 30)),
)
@example(edits=[], cut=0)
@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
def test_c_damaged_files_are_refused_or_read_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, edits: list[Any], cut: int
) -> None:
    """`edits` replace a few bytes somewhere; where the last member is true, the header's length is mended so that the
    JSON is reached.
    """
    data = _SEED
    for position, removed, inserted, mend in edits:
        grown = data[:position] + inserted + data[position + removed :]
        if mend and position >= 8:
            length = int.from_bytes(grown[:8], "little") + len(grown) - len(data)
            grown = (length % (1 << 64)).to_bytes(8, "little") + grown[8:]
        data = grown
    data = data[: len(data) - cut]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(data)
    try:
        opened = open_tensor_file(path)
    except (InputFileError, UnsafeError) as error:
        assert error.message.isprintable()
        assert edits or cut
        return
    with opened:
        found = {
            name: (entry.dtype, list(entry.shape), bytes(opened.read_bytes(entry)))
            for name, entry in opened.entries.items()
        }
        assert opened.sha256() == hashlib.sha256(data).hexdigest()
    expected = {
        name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(data)
    }
    assert found == expected
