"""Files of torch.save: what is read equals torch; other forms, lies about storages, and 10,000 kinds of damage end in a
clean error.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch_files import (
    FORM_NAMES,
    FORMS,
    forged,
    peak_bytes,
    read,
    refused,
    saved,
    simple_archive,
    tensors,
    text,
    zip_bytes,
    zipped_pickle,
)

from sdrt.errors import InputFileError, SdrtError, UnsafeError
from sdrt.export.read.tensor_entry import TensorEntry
from sdrt.export.read.tensor_file import open_tensor_file

# Reading


@pytest.mark.parametrize("zipped", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_type_and_layout_reads_as_torch_reads_it(tmp_path: Path, zipped: bool, protocol: int) -> None:
    oracle = tensors()
    found = read(saved(tmp_path / "x.ckpt", oracle, zipped, pickle_protocol=protocol))
    assert found.keys() == oracle.keys()
    for name, tensor in oracle.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert found[name].dtype == expected.dtype and found[name].is_contiguous()
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats(tmp_path: Path, kind: torch.dtype) -> None:
    values = torch.linspace(-2, 2, 12).reshape(3, 4).to(kind)
    found = read(saved(tmp_path / "x.pt", {"a": values}))["a"]
    assert torch.equal(found, values.float())


def test_a_tree_beside_the_flat_names(tmp_path: Path) -> None:
    """Embeddings and hypernetworks hold more than tensors: lists, numbers as keys, settings."""
    value = {
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 3))}),
        "name": "toy",
        "step": np.int64(500),
        "rate": np.float32(0.5),
        320: ({"linear.0.weight": torch.zeros(2)}, OrderedDict(a=torch.ones(1))),
        "structure": [1, 2.5, 1],
        "kind": None,
        "on": True,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
        "type": torch.float16,
    }
    with open_tensor_file(saved(tmp_path / "x.pt", value)) as file:
        assert list(file.entries) == ["string_to_param.*", "320.0.linear.0.weight", "320.1.a"]
        assert file.tree["string_to_param"] == {"*": file.entries["string_to_param.*"]}
        assert isinstance(file.tree[320][0]["linear.0.weight"], TensorEntry)
        plain = {key: item for key, item in file.tree.items() if key not in ("string_to_param", 320)}
        assert plain == {
            "name": "toy",
            "step": 500,
            "rate": 0.5,
            "structure": [1, 2.5, 1],
            "kind": None,
            "on": True,
            "size": [1, 2],
            "type": "torch.float16",
        }
        assert file.notes == ("x.pt: ignored, as no tensor: device",)
        assert file.metadata == {}


def test_a_bare_tensor_and_a_list(tmp_path: Path) -> None:
    assert list(read(saved(tmp_path / "x.pt", torch.ones(2)))) == ["tensor"]
    assert list(read(saved(tmp_path / "x.pt", [torch.ones(2), torch.ones(3)]))) == ["0", "1"]


def test_tensors_with_attributes_and_parameters(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    tensor.remark = "kept by torch"  # type: ignore[attr-defined]
    found = read(saved(tmp_path / "x.pt", {"a": tensor, "b": torch.nn.Parameter(torch.zeros(2))}))
    assert torch.equal(found["a"], torch.ones(3)) and torch.equal(found["b"], torch.zeros(2))


# P9: tensors outside their storages


def tensor_pickle(
    *,
    items: object = 8,
    offset: object = 0,
    shape: object = (2, 2),
    strides: object = (2, 1),
    storage: str = "FloatStorage",
    key: object = "0",
    name: str = "a",
) -> bytes:
    """A pickle of one tensor, protocol 2, whose numbers may lie."""

    def value(x: object) -> bytes:
        return pickle.dumps(x, 2)[2:-1]

    reference = (
        b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + value(key) + text("cpu") + value(items) + b"tQ"
    )
    rebuilt = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + value(offset) + value(shape) + value(strides) + b"\x89}tR"
    )
    return b"\x80\x02}" + text("state_dict") + b"}" + text(name) + rebuilt + b"ss."


P9: dict[str, tuple[dict[str, Any], str]] = {
    "stride 0 of 2^40": (
        {"shape": (1 << 40,), "strides": (0,)},
        "unpack to 4,398,046,511,104 bytes, more than the limit of 1,048,576",
    ),
    "strides 0 of 2^480": ({"shape": (1 << 60,) * 8, "strides": (0,) * 8}, "more than the limit"),
    "offset past the storage": ({"offset": 5}, "a: reaches byte 36 of a storage of 32 bytes"),
    "offset at the end": ({"offset": 8, "shape": (1,), "strides": (1,)}, "a: reaches byte 36"),
    "stride past the storage": ({"strides": (7, 1)}, "a: reaches byte 36"),
    "huge stride": ({"strides": (1 << 62, 1)}, "a: reaches byte"),
    "negative stride": ({"strides": (-1, 1)}, "a: shape [2, 2] with strides [-1, 1]"),
    "negative size": ({"shape": (-2, 2)}, "a: shape [-2, 2]"),
    "negative offset": ({"offset": -1}, "offset, shape or strides are not numbers"),
    "size of no number": ({"shape": (2.0, 2)}, "a: shape [2.0, 2]"),
    "flag for a size": ({"shape": (True, 2)}, "a: shape [True, 2]"),
    "shape of text": ({"shape": "22"}, "offset, shape or strides are not numbers"),
    "more strides than sizes": ({"strides": (4, 2, 1)}, "a: shape [2, 2] with strides [4, 2, 1]"),
    "size of 100,000 digits": ({"shape": (10**4000 << 300_000, 2)}, "a: shape [int, 2]"),
    "size of lists": ({"shape": ([[1], [2]], 2)}, "a: shape [list, 2]"),
    "storage with a long key": ({"key": "0" * 101}, "a storage without its type, key and size"),
    "rank 9": ({"shape": (1,) * 9, "strides": (1,) * 9}, "expected up to 8 sizes"),
    "storage longer than its member": ({"items": 9}, "storage 0: expected 36 bytes, found 32"),
    "storage shorter than its member": ({"items": 7}, "storage 0: expected 28 bytes, found 32"),
    "storage of another type": ({"storage": "DoubleStorage"}, "storage 0: expected 64 bytes, found 32"),
    "storage that is not there": ({"key": "7"}, "storage 7: expected 32 bytes, there is none"),
    "storage that climbs": ({"key": "../../etc/passwd"}, "there is none"),
    "storage key of no text": ({"key": 0}, "a storage without its type, key and size"),
    "storage of a negative size": ({"items": -8}, "a storage without its type, key and size"),
    "storage size of text": ({"items": "8"}, "a storage without its type, key and size"),
    "storage of another module's type": ({"storage": "float32"}, "a storage of type torch float32"),
}


@pytest.mark.parametrize("lie", P9)
def test_p9_tensors_that_do_not_lie_in_their_storage(tmp_path: Path, lie: str) -> None:
    changes, message = P9[lie]
    path = tmp_path / "x.ckpt"
    peak = peak_bytes(lambda: refused(zipped_pickle(path, tensor_pickle(**changes), {"data/0": bytes(32)}), message))
    assert peak < 4_000_000


def test_p9_the_forger_can_make_a_good_tensor(tmp_path: Path) -> None:
    data = np.arange(8, dtype=np.float32)
    path = zipped_pickle(tmp_path / "x.ckpt", tensor_pickle(offset=1, strides=(1, 3)), {"data/0": data.tobytes()})
    assert read(path)["a"].tolist() == [[1, 4], [2, 5]]


def test_p9_types_that_torch_cannot_give(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "x.ckpt", {"a": torch.ones(2, dtype=torch.complex64), "b": torch.ones(2, dtype=torch.uint16)}
    )
    with open_tensor_file(path) as file:
        for name, code in (("a", "C64"), ("b", "U16")):
            with pytest.raises(InputFileError, match=f"{name}: expected floating-point data, found {code}"):
                file.read(name)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    refused(
        saved(tmp_path / "x.ckpt", {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}), "a.b: two tensors of this name"
    )


# P10: other forms


def test_p10_tar_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refused(tmp_path / "x.pt", "a tar archive")


def test_p10_torchscript(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("x/data.pkl", "x/constants.pkl", "x/code/__torch__.py", "x/version"):
            archive.writestr(name, b"N.")
    refused(tmp_path / "x.pt", "a TorchScript archive")


def test_p10_other_zip_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("readme.txt", b"hello")
    refused(tmp_path / "x.ckpt", "a zip archive that torch.save did not write", "readme.txt")
    (tmp_path / "x.ckpt").write_bytes(zip_bytes([]))
    refused(tmp_path / "x.ckpt")


def test_p10_big_endian(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(simple_archive(change=forged("byteorder", data=b"big")))
    refused(tmp_path / "x.ckpt", "byteorder: expected little, found big")
    (tmp_path / "x.ckpt").write_bytes(simple_archive(change=forged("byteorder", data=b"little" * 100)))
    refused(tmp_path / "x.ckpt", "byteorder: 600 bytes")


def test_p10_frames_and_protocols(tmp_path: Path) -> None:
    """A frame may end at any opcode. Where it ends within one, readers differ: some read the rest of it from behind
    what they had in their buffer.
    """

    def framed(length: int, body: bytes) -> bytes:
        return b"\x95" + struct.pack("<Q", length) + body

    body = b"}" + text("step") + b"K\x05s."
    for length in (0, 1, len(body) - 4, len(body)):
        with open_tensor_file(zipped_pickle(tmp_path / "x.ckpt", b"\x80\x04" + framed(length, body))) as file:
            assert file.tree == {"step": 5}
    for length, message in (
        (3, "goes on behind the end of its frame"),
        (len(body) + 1, "are left"),
        (1 << 40, "are left"),
    ):
        refused(zipped_pickle(tmp_path / "x.ckpt", b"\x80\x04" + framed(length, body)), message)
    refused(
        zipped_pickle(tmp_path / "x.ckpt", b"\x80\x04" + framed(len(body) + 9, framed(len(body), body))),
        "within another",
    )
    refused(
        zipped_pickle(tmp_path / "x.ckpt", b"\x80\x04" + framed(len(body) + 1, body + b"N")),
        "1 bytes before the end of its frame",
    )
    refused(zipped_pickle(tmp_path / "x.ckpt", b"\x80\x06}."), "pickle protocol 6, expected at most 5")
    for protocol in range(6):
        with open_tensor_file(
            zipped_pickle(
                tmp_path / "x.ckpt",
                pickle.dumps({"a": [1, 2.5, None, True, "é", b"\xff", (1,)], "n": -(1 << 70)}, protocol),
            )
        ) as file:
            assert file.tree == {"a": [1, 2.5, None, True, "é", b"\xff", [1]], "n": -(1 << 70)}


def legacy_parts(value: object) -> tuple[list[bytes], bytes]:
    """The five pickles of a legacy file, and what follows."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    data, parts, start = stream.getvalue(), [], 0
    for _ in range(5):
        end = max(position for _, _, position in pickletools.genops(data[start:]) if position is not None) + 1
        parts.append(data[start : start + end])
        start += end
    return parts, data[start:]


def test_p10_legacy_parts_that_lie(tmp_path: Path) -> None:
    parts, storages = legacy_parts({"a": torch.ones(2)})
    assert storages == struct.pack("<Q2f", 2, 1, 1)
    keys = pickle.loads(parts[4])
    path = tmp_path / "x.ckpt"

    def given(index: int, value: object, rest: bytes = storages) -> Path:
        path.write_bytes(
            b"".join([*parts[:index], pickle.dumps(value, 2) if index < 5 else b"", *parts[index + 1 :], rest])
        )
        return path

    assert torch.equal(read(given(5, None))["a"], torch.ones(2))
    refused(given(0, 12345), "a Python pickle that torch.save did not write")
    refused(given(1, 1002), "legacy torch protocol 1002")
    refused(given(2, {"little_endian": False}), "big-endian")
    refused(given(2, [1]), "legacy torch protocol")
    refused(given(4, []), "16 bytes follow the last storage", kind=UnsafeError)
    refused(given(4, [], b""), "a: storage", "there is none")
    refused(given(4, [*keys, "other"]), "does not name the storages")
    refused(given(4, keys * 2), "does not name the storages")
    refused(given(4, {}), "does not name the storages")
    refused(given(5, None, struct.pack("<Q2f", 3, 1, 1)), "holds 3 items, the pickle says 2")
    refused(given(5, None, storages[:-1]), "truncated: storage", f"ends at byte {sum(map(len, parts)) + 16:,}")
    refused(given(5, None, storages[:7]), "truncated: expected 8 bytes")
    refused(given(5, None, storages + b"MZ"), "2 bytes follow the last storage", kind=UnsafeError)


def test_p10_a_legacy_view_of_a_storage(tmp_path: Path) -> None:
    """Files of torch before 0.4 hold views: (key, offset, size) within the storage that is written."""
    parts, _ = legacy_parts({"a": torch.ones(2)})
    key = pickle.loads(parts[4])[0]
    old = text("cpu") + b"q\x08" if text("cpu") + b"q\x08" in parts[3] else text("cpu")
    head, tail = parts[3].split(old, 1)
    view = b"(" + text("view") + b"K\x03K\x02t"
    changed = head + old + b"K\x05" + view + tail[tail.index(b"t") :]
    (tmp_path / "x.ckpt").write_bytes(b"".join([*parts[:3], changed, parts[4], struct.pack("<Q5f", 5, 1, 2, 3, 4, 5)]))
    assert key in parts[3].decode("latin-1")
    assert read(tmp_path / "x.ckpt")["a"].tolist() == [4, 5]
    (tmp_path / "x.ckpt").write_bytes(
        b"".join(
            [
                *parts[:3],
                changed.replace(b"K\x03K\x02t", b"K\x04K\x02t"),
                parts[4],
                struct.pack("<Q5f", 5, 1, 2, 3, 4, 5),
            ]
        )
    )
    refused(tmp_path / "x.ckpt", "a view of a storage that does not lie within it")


# P11: damage


def outcome(path: Path) -> dict[str, torch.Tensor] | int:
    """What reading gives: tensors, or the exit code of a clean refusal. Anything else is raised."""
    try:
        return read(path)
    except SdrtError as error:
        assert error.exit_code in (3, 4) and error.message.startswith(str(path)) and error.message.isprintable(), error
        return error.exit_code


SMALL: dict[str, Any] = {
    "state_dict": OrderedDict(
        weight=torch.arange(6.0).reshape(2, 3), turned=torch.arange(6.0).reshape(2, 3).t(), half=torch.ones(2).half()
    ),
    "epoch": np.float64(3),
    "optimizer_states": [{"lr": 0.5, "betas": (1, 2)}],
}


@pytest.mark.parametrize("zipped", FORMS, ids=FORM_NAMES)
def test_p11_truncated_at_every_byte(tmp_path: Path, zipped: bool) -> None:
    data = saved(tmp_path / "x.ckpt", SMALL, zipped).read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut.ckpt").write_bytes(data[:size])
        assert outcome(tmp_path / "cut.ckpt") == 3, size


def mutated(data: bytes, random: Random) -> bytes:
    """One to four changes: bytes flipped or set, parts removed, doubled or moved."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, size = random.randrange(len(changed)), random.choice((1, 1, 2, 4, 16))
        kind = random.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            changed[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, *b"(.0R}]tQcbh", random.randrange(256)))
        elif kind == 2:
            del changed[at : at + size]
        elif kind == 3:
            changed[at:at] = changed[at : at + size]
        elif kind == 4:
            changed[at : at + size] = random.randbytes(size)
        else:
            other = random.randrange(len(changed))
            changed[at : at + size] = changed[other : other + size]
        changed = changed or bytearray(data)
    return bytes(changed)


def test_p11_5000_mutations_of_an_archive(tmp_path: Path) -> None:
    """Its checksums tell every change of a value, so what is still read is right."""
    data = saved(tmp_path / "x.ckpt", SMALL).read_bytes()
    right, random, path = read(tmp_path / "x.ckpt"), Random(1), tmp_path / "m.ckpt"
    codes: Counter[object] = Counter()
    for _ in range(5000):
        path.write_bytes(mutated(data, random))
        found = outcome(path)
        if isinstance(found, dict):
            assert found.keys() == right.keys() and all(
                torch.equal(found[name], tensor) for name, tensor in right.items()
            )
        codes[found if isinstance(found, int) else "read"] += 1
    assert min(codes[3], codes[4], codes["read"]) > 100, codes


def test_p11_5000_mutations_of_the_pickle_itself(tmp_path: Path) -> None:
    """Under right checksums, and in the legacy form, which has none: whatever is read lies within the file."""
    archive = zipfile.ZipFile(saved(tmp_path / "x.ckpt", SMALL))
    parts = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    archive.close()
    legacy = saved(tmp_path / "l.ckpt", SMALL, False).read_bytes()
    random, path = Random(2), tmp_path / "m.ckpt"
    codes: Counter[object] = Counter()

    def run(count: int) -> None:
        for i in range(count):
            if i % 2:
                zipped_pickle(
                    path,
                    mutated(parts["data.pkl"], random),
                    {name: data for name, data in parts.items() if name not in ("data.pkl", "version")},
                )
            else:
                path.write_bytes(mutated(legacy, random))
            found = outcome(path)
            codes[found if isinstance(found, int) else "read"] += 1

    assert peak_bytes(lambda: run(1000)) < 16_000_000
    run(4000)
    assert min(codes[3], codes[4], codes["read"]) > 100, codes


# P12 and what else a path can be


def test_p12_one_descriptor_from_check_to_last_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = (
        saved(tmp_path / "x.ckpt", {"a": torch.ones(2)}),
        saved(tmp_path / "other.ckpt", {"a": torch.zeros(2)}),
    )
    opens: list[object] = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda *arguments, **options: (opens.append(arguments[0]), real(*arguments, **options))[1]
    )
    with open_tensor_file(path) as file:
        other.replace(path)
        assert file.read("a").tolist() == [1, 1]
        file.sha256()
    assert opens == [path]


@pytest.mark.parametrize("zipped", FORMS, ids=FORM_NAMES)
def test_p12_a_file_that_changes_after_it_was_opened(tmp_path: Path, zipped: bool) -> None:
    path = saved(tmp_path / "x.ckpt", {"a": torch.ones(20_000)}, zipped)
    with open_tensor_file(path) as file:
        os.truncate(path, 10_000)
        with pytest.raises(SdrtError, match=r"changed during the build|checksum"):
            file.read("a")
        with pytest.raises(InputFileError, match="changed during the build"):
            file.check_unchanged()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth"])
def test_paths_that_are_no_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    refused(path, "cannot open")
    path.mkdir()
    refused(path, "found a folder")
    path.rmdir()
    os.mkfifo(path)
    refused(path, "a device, pipe or socket")
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(path, "a device, pipe or socket")
    path.unlink()
    path.symlink_to("nowhere")
    refused(path, "cannot open")


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(8), b"\x80\x02"])
def test_empty_and_tiny_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    refused(tmp_path / "x.ckpt", "empty or truncated download")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b'{"error": "restricted"}', "JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"GGUF" + bytes(99), "GGUF"),
    ],
)
def test_web_pages_and_pointers_under_a_checkpoints_name(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    refused(tmp_path / "x.ckpt", what)
