"""Files of torch.save: what the data-only reader reads equals torch, and whatever else a pickle or its archive holds is refused, and never runs."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import pickletools
import stat
import struct
import sys
import tarfile
import tracemalloc
import types
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from sdrt.errors import InputFileError, SdrtError, UnsafeError
from sdrt.export.tensor_entry import TensorEntry
from sdrt.export.tensor_file import open_tensor_file

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
        return {name: file.read(name) for name in file.entries}


def refused(path: Path, *fragments: str, kind: type[SdrtError] = InputFileError, reading: bool = False) -> SdrtError:
    """Opening `path` fails with exactly this class, in one printable line that names the file, and never advises to load it unsafely (P13)."""
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


def zipped_pickle(path: Path, data: bytes, members: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive as torch writes it around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"data.pkl": data, "version": b"3\n", **(members or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return path


# Reading


@pytest.mark.parametrize("zipped", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_type_and_layout_reads_as_torch_reads_it(tmp_path: Path, zipped: bool, protocol: int) -> None:
    oracle = tensors()
    found = read(saved(tmp_path / "x.ckpt", oracle, zipped, pickle_protocol=protocol))
    assert found.keys() == oracle.keys()
    for name, tensor in oracle.items():
        assert found[name].dtype == tensor.dtype and found[name].is_contiguous()
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats(tmp_path: Path, kind: torch.dtype) -> None:
    values = torch.linspace(-2, 2, 12).reshape(3, 4).to(kind)
    found = read(saved(tmp_path / "x.pt", {"a": values}))["a"]
    assert found.dtype == kind
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))


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
        assert plain == {"name": "toy", "step": 500, "rate": 0.5, "structure": [1, 2.5, 1], "kind": None, "on": True, "size": [1, 2], "type": "torch.float16"}
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


# P1-P3: what executes


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


def attacks(canary: Path) -> dict[str, tuple[bytes, str]]:
    """P1 and P2: pickles that would create the canary if anything ran them, and what the refusal must name."""
    command = f"touch {canary}"
    system = os.system.__module__ + ".system"
    plain = b"(" + text(command) + b"t"
    return {
        "REDUCE": (pickle.dumps(Call(os.system, command), 2), system),
        "REDUCE, protocol 0": (pickle.dumps(Call(os.system, command), 0), system),
        "STACK_GLOBAL": (pickle.dumps(Call(os.system, command), 4), system),
        "below state_dict": (pickle.dumps({"state_dict": {"a": Call(os.system, command)}}, 2), system),
        "beside state_dict": (pickle.dumps({"state_dict": {}, "callbacks": Call(os.system, command)}, 2), system),
        "nested pickle": (pickle.dumps(Call(pickle.loads, pickle.dumps(Call(os.system, command))), 2), "pickle.loads"),
        "INST": (b"(" + text(command) + b"ios\nsystem\n.", "os.system"),
        "OBJ": (b"(cos\nsystem\n" + text(command) + b"o.", "os.system"),
        "NEWOBJ": (b"\x80\x02cos\nsystem\n" + plain + b"\x81.", "os.system"),
        "NEWOBJ_EX": (b"\x80\x04cos\nsystem\n" + plain + b"}\x92.", "os.system"),
        "BUILD __setstate__": (
            b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb" + text(command) + b"b.",
            "Module",
        ),
        "STACK_GLOBAL from the memo": (b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93" + plain + b"R.", "os.system"),
        "STACK_GLOBAL, dotted": (b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + plain + b"R.", "torch.serialization.os.system"),
        "GLOBAL, dotted": (b"\x80\x04ctorch.serialization\nos.system\n" + plain + b"R.", "torch.serialization.os.system"),
        "GLOBAL with a space": (b"ctorch._utils _rebuild_tensor_v2\nx\n" + plain + b"R.", "torch._utils._rebuild_tensor_v2 x"),
        "STACK_GLOBAL of no text": (b"\x80\x04K\x01K\x02\x93)R.", "NoneType"),
        "EXT1": (b"\x80\x02\x82\x01)R.", "EXT1"),
        "EXT2": (b"\x80\x02\x83\x01\x00)R.", "EXT2"),
        "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00)R.", "EXT4"),
        "PERSID": (b"Pos.system\n.", "PERSID"),
        "BINPERSID of a module": (b"\x80\x02(" + text("module") + b"cos\nsystem\n" + text("x.py") + text("import os") + b"tQ.", "os.system"),
        "BINPERSID of a module without a name": (b"\x80\x02(" + text("module") + text("x.py") + text("import os") + b"tQ.", "'module'"),
        "REDUCE of a reference": (b"\x80\x02ctorch\nTensor\n)R.", "torch.Tensor"),
        "REDUCE of data": (b"\x80\x02}" + plain + b"R.", "a call of dict"),
        "BUILD of a tensor": (b"\x80\x02]}b.", "a state given to list"),
        "keywords": (b"\x80\x04ccollections\nOrderedDict\n)}" + text("a") + b"K\x01s\x92.", "keywords"),
        "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    }


ATTACKS = list(attacks(Path("canary")))


@pytest.mark.parametrize("container", ["zip", "bare"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_p1_p2_code_is_refused_by_name_and_never_runs(tmp_path: Path, attack: str, container: str) -> None:
    canary = tmp_path / "canary"
    data, named = attacks(canary)[attack]
    path = tmp_path / "x.ckpt"
    if container == "zip":
        zipped_pickle(path, data)
    else:
        path.write_bytes(b"N0" * 5 + data)
    refused(path, named, "nothing of it was run", kind=UnsafeError)
    assert not canary.exists()


def test_the_canary_sings() -> None:
    """The attacks are real: Python's own unpickler makes the canary."""
    canary = Path("/tmp") / f"canary-{os.getpid()}"
    assert pickle.loads(attacks(canary)["REDUCE"][0]) == 0
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub load", "numpy load", "torch load", "torch.storage _load_from_bytes", "torch._utils _rebuild_sparse_tensor", "torch._utils x", "builtins getattr",
        "builtins eval", "builtins exec", "builtins __import__", "operator methodcaller", "operator attrgetter", "functools partial", "os system", "posix system",
        "subprocess Popen", "runpy run_path", "torch.jit load", "pip main", "types CodeType", "collections namedtuple", "_codecs decode", "copyreg __newobj__",
        "pytorch_lightning.callbacks.model_checkpoint os", "torch._tensor os", "numpy.core.multiarray fromfile", "",
    ],
)  # fmt: skip
def test_p3_any_other_name_is_refused_whatever_its_module(tmp_path: Path, name: str) -> None:
    module, _, attribute = name.partition(" ")
    for data in (f"c{module}\n{attribute}\n.".encode(), b"\x80\x04" + text(module) + text(attribute) + b"\x93."):
        refused(zipped_pickle(tmp_path / "x.ckpt", data), f"the name {module}.{attribute}", kind=UnsafeError)


# P4: what real files carry


@pytest.fixture
def baggage(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pytorch-lightning keeps beside the weights, from classes that need not be installed to be read."""
    for name, attribute in (
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("pytorch_lightning.utilities.parsing", "AttributeDict"),
        ("omegaconf.dictconfig", "DictConfig"),
    ):
        module = types.ModuleType(name)
        kind = type(attribute, (dict,) if attribute == "AttributeDict" else (), {"__module__": name, "__reduce_ex__": object.__reduce_ex__})
        setattr(module, attribute, kind)
        monkeypatch.setitem(sys.modules, name, module)
        for parent in itertools.accumulate(name.split(".")[:-1], "{}.{}".format):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    configuration = sys.modules["omegaconf.dictconfig"].DictConfig()  # type: ignore[attr-defined]
    configuration._content = {"lr": 1e-4, "parent": configuration}
    settings = sys.modules["pytorch_lightning.utilities.parsing"].AttributeDict(lr=1e-4)  # type: ignore[attr-defined]
    checkpoint = sys.modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint  # type: ignore[attr-defined]
    return {
        "epoch": 4,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {checkpoint: {"monitor": None, "best_model_score": np.float64(0.25), "best": torch.tensor(1.0), "where": Path("/training")}},
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}],
        "lr_schedulers": [{"best": np.float32(1), "history": np.arange(3), "seen": {1, 2}, "frozen": frozenset({3}), "n": defaultdict(int, a=1)}],
        "hyper_parameters": {"model": configuration, "settings": settings, "sizes": complex(1, 2)},
    }


@pytest.mark.parametrize("zipped", FORMS, ids=FORM_NAMES)
def test_p4_the_baggage_of_training_is_ignored_and_said(tmp_path: Path, baggage: dict[str, Any], zipped: bool) -> None:
    module = torch.nn.Linear(2, 3)
    path = saved(tmp_path / "real.ckpt", baggage | {"state_dict": {"state_dict": module.state_dict()}}, zipped)
    with open_tensor_file(path) as file:
        assert list(file.entries) == ["weight", "bias"]
        assert torch.equal(file.read("weight"), module.weight)
        assert file.notes == (f"real.ckpt: what lies beside the weights was ignored: {', '.join(sorted(baggage))}",)


def test_p4_baggage_among_the_weights_is_no_weight(tmp_path: Path, baggage: dict[str, Any]) -> None:
    path = saved(tmp_path / "x.ckpt", {"state_dict": {"a": torch.ones(1), "b": np.arange(3)}})
    refused(path, "state_dict.b"[11:] + ": expected a tensor or a plain value, found numpy")
    path = saved(tmp_path / "y.ckpt", {"a": torch.ones(1), "callbacks": baggage["callbacks"]})
    with open_tensor_file(path) as file:
        assert list(file.entries) == ["a"]
        assert "callbacks.the key pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in file.notes[0]


def test_p4_a_callback_of_ones_own_is_refused_by_name(tmp_path: Path) -> None:
    path = zipped_pickle(tmp_path / "x.ckpt", pickle.dumps({"state_dict": {}}, 2)[:-1] + b"cmytraining\nMyCallback\n0.")
    refused(path, "mytraining.MyCallback", kind=UnsafeError)


# P5, P6: archives that two readers would read differently


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


def zip_bytes(entries: Sequence[ZipEntry], *, count: int | None = None, before: bytes = b"", comment: bytes = b"", start: int | None = None) -> bytes:
    """A zip archive from parts that may lie (PKWARE's APPNOTE 4.3)."""
    out, directory = bytearray(before), b""
    for entry in entries:
        packed = entry.packed if entry.packed is not None else entry.data
        fields = {"crc": zlib.crc32(entry.data), "packed": len(packed), "size": len(entry.data), "flags": entry.flags, "method": entry.method}
        local, central = fields | entry.local, fields | {"offset": len(out)} | entry.central
        name = entry.name if entry.local_name is None else entry.local_name
        out += struct.pack("<4s5H3L2H", b"PK\3\4", 20, local["flags"], local["method"], 0, 0, local["crc"], local["packed"], local["size"], len(name), 0)
        out += name + packed + entry.after
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, central["flags"], central["method"], 0, 0, central["crc"], central["packed"], central["size"],
            len(entry.name), len(entry.extra), 0, 0, 0, entry.attributes << 16, central["offset"],
        )  # fmt: skip
        directory += entry.name + entry.extra
    number = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, number, number, len(directory), len(out) if start is None else start, len(comment))
    return bytes(out) + directory + end + comment


def simple_archive(*others: ZipEntry, change: Callable[[dict[str, ZipEntry]], None] | None = None, **options: Any) -> bytes:
    """One float32 tensor "a" of two ones, as torch saves it, with changes."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    with zipfile.ZipFile(stream) as archive:
        entries = {name.split("/", 1)[1]: ZipEntry(name.encode(), archive.read(name)) for name in archive.namelist()}
    if change is not None:
        change(entries)
    return zip_bytes([*entries.values(), *others], **options)


def test_the_forger_can_make_a_good_archive(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(simple_archive())
    assert torch.equal(read(tmp_path / "x.ckpt")["a"], torch.ones(2))


def forged(name: str = "data.pkl", **changes: Any) -> Callable[[dict[str, ZipEntry]], None]:
    def change(entries: dict[str, ZipEntry]) -> None:
        entries[name] = replace(entries[name], **changes)

    return change


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
    "checksum of the pickle": (simple_archive(change=forged(local={"crc": 1}, central={"crc": 1})), "the archive says 00000001"),
    "checksum of a tensor": (simple_archive(change=forged("data/0", local={"crc": 1}, central={"crc": 1})), "the archive says 00000001"),
    "name that climbs": (simple_archive(ZipEntry(b"archive/data/../../x", b"")), "plain relative path"),
    "absolute name": (simple_archive(ZipEntry(b"/etc/x", b"")), "plain relative path"),
    "drive": (simple_archive(ZipEntry(b"C:/x", b"")), "plain relative path"),
    "backslash": (simple_archive(ZipEntry(b"archive\\x", b"")), "plain relative path"),
    "folder": (simple_archive(ZipEntry(b"archive/data/", b"")), "plain relative path"),
    "name of no text": (simple_archive(ZipEntry(b"archive/data/\xff", b"")), "plain relative path"),
    "link": (simple_archive(ZipEntry(b"archive/data/7", b"/etc/passwd", attributes=stat.S_IFLNK | 0o777)), "a link"),
    "member of no torch file": (simple_archive(ZipEntry(b"archive/run.py", b"")), "archive/run.py: not a member that torch.save writes"),
    "duplicate tensor": (simple_archive(ZipEntry(b"x/data/0", b"")), "not a member"),
    "fewer members counted": (simple_archive(count=3), "after its 3 members"),
    "bytes before": (simple_archive(before=b"#!/bin/sh\n"), "bytes before the first zip member"),
    "comment": (simple_archive(comment=b"hello"), "5 bytes follow the zip archive"),
    "bytes after": (simple_archive() + b"MZ", "2 bytes follow the zip archive"),
    "gap": (simple_archive(change=forged("version", after=b"payload")), "7 bytes follow this zip member"),
    "false descriptor": (simple_archive(change=forged("version", flags=8, after=b"PK\7\10" + bytes(12))), "16 bytes follow this zip member"),
    "overlap": (simple_archive(change=forged("data/0", central={"size": 40, "packed": 40}, local={"size": 40, "packed": 40})), "overlaps"),
    "zip64 without sizes": (simple_archive(change=forged(central={"size": 0xFFFFFFFF})), "zip64 member without its sizes"),
    "zip64 sizes that are not wanted": (simple_archive(change=forged(extra=struct.pack("<2HQ", 1, 8, 3))), "two sets of sizes"),
    "stored but shorter": (simple_archive(change=forged("version", central={"size": 1})), "stored as 2 bytes of 1"),
}  # fmt: skip


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


def peak_bytes(action: Callable[[], object]) -> int:
    """The most memory an action held at once."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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
    (tmp_path / "x.ckpt").write_bytes(simple_archive(change=forged(data=bytes(8), packed=packed, method=8, local=small, central=small)))
    peak = peak_bytes(lambda: refused(tmp_path / "x.ckpt", "unpacks to more than 1,000 bytes"))
    assert peak < 4_000_000


def test_p7_40_gb_declared(tmp_path: Path) -> None:
    size = 40 << 30
    wide = struct.pack("<2HQ", 1, 8, size)
    entry = forged("data/0", method=8, packed=deflated(b"x" * 8), local={"size": 0, "crc": 0}, central={"size": 0xFFFFFFFF}, extra=wide)
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


# P8: pickles that grow


P8: dict[str, tuple[bytes, str]] = {
    "billion laughs": (b"\x80\x02]q\x00K\x01a0" + b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(60)) + b"h\x3c.", "more values than the limit of 200,000"),
    "opcodes": (b"\x80\x02" + b"N0" * 600_000 + b"N.", "more opcodes than the limit of 1,000,000"),
    "marks": (b"\x80\x02" + b"(" * 100_000 + b"N.", "nested deeper than the limit of 200"),
    "lists in lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested deeper than the limit of 200"),
    "tuples in tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", "nested deeper than the limit of 200"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "nested deeper than the limit of 200"),
    "a dictionary in itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "nested deeper than the limit of 200"),
    "a state_dict in itself": (b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.", "state_dict nested deeper than the limit of 8"),
    "a string of 2^60 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.", "truncated"),
    "bytes of 2^31": (b"\x80\x04B" + struct.pack("<L", (1 << 31) - 1) + b"x.", "truncated"),
    "a number of 2^31 bytes": (b"\x80\x02\x8b" + struct.pack("<L", (1 << 31) - 1) + b"x.", "truncated"),
    "a long line": (b"S'" + b"x" * (1 << 20) + b"'\n.", "a line of more than"),
    "a number of many digits": (b"I" + b"9" * 100_000 + b"\n.", "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", P8)
def test_p8_pickles_that_grow(tmp_path: Path, name: str) -> None:
    data, message = P8[name]
    refused(zipped_pickle(tmp_path / "x.ckpt", data), message)


def test_p8_keys_that_take_forever_to_hash(tmp_path: Path) -> None:
    """A tuple of twice the same tuple, 5,000 deep: hashing it visits 2^5000 leaves."""
    key = b")" + b"2\x86" * 5000
    refused(zipped_pickle(tmp_path / "x.ckpt", b"\x80\x02}X\x0a\x00\x00\x00state_dict}" + key + b"Nss."), "the key tuple: expected a tensor or a plain value")
    path = zipped_pickle(tmp_path / "y.ckpt", b"\x80\x02}" + key + b"Ns.")
    with open_tensor_file(path) as file:
        assert file.tree == {}


def test_p8_a_pickle_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrt.export.torch_archive.MAX_PICKLE_BYTES", 100)
    refused(saved(tmp_path / "x.ckpt", tensors()), "data.pkl", "more than the limit of 100")
    monkeypatch.setattr("sdrt.export.pickles.MAX_PICKLE_BYTES", 100)
    refused(saved(tmp_path / "y.ckpt", tensors(), False), "longer than the limit of 100 bytes")


def test_p8_the_number_of_tensors_and_the_memo_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.ckpt", tensors())
    monkeypatch.setattr("sdrt.export.torch_archive.MAX_TENSORS", 5)
    refused(path, "more tensors than the limit of 5")
    monkeypatch.setattr("sdrt.export.pickles.MAX_MEMO", 10)
    refused(path, "more memo entries than the limit of 10")


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

    reference = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + value(key) + text("cpu") + value(items) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + value(offset) + value(shape) + value(strides) + b"\x89}tR"
    return b"\x80\x02}" + text("state_dict") + b"}" + text(name) + rebuilt + b"ss."


P9: dict[str, tuple[dict[str, Any], str]] = {
    "stride 0 of 2^40": ({"shape": (1 << 40,), "strides": (0,)}, "unpack to 4,398,046,511,104 bytes, more than the limit of 1,048,576"),
    "strides 0 of 2^480": ({"shape": (1 << 60,) * 8, "strides": (0,) * 8}, "more than the limit"),
    "offset past the storage": ({"offset": 5}, "a: reaches byte 36 of a storage of 32 bytes"),
    "offset at the end": ({"offset": 8, "shape": (1,), "strides": (1,)}, "a: reaches byte 36"),
    "stride past the storage": ({"strides": (7, 1)}, "a: reaches byte 36"),
    "huge stride": ({"strides": (1 << 62, 1)}, "a: reaches byte"),
    "negative stride": ({"strides": (-1, 1)}, "a: shape (2, 2) with strides (-1, 1)"),
    "negative size": ({"shape": (-2, 2)}, "a: shape (-2, 2)"),
    "negative offset": ({"offset": -1}, "offset, shape or strides are not numbers"),
    "size of no number": ({"shape": (2.0, 2)}, "a: shape (2.0, 2)"),
    "flag for a size": ({"shape": (True, 2)}, "a: shape (True, 2)"),
    "shape of text": ({"shape": "22"}, "offset, shape or strides are not numbers"),
    "more strides than sizes": ({"strides": (4, 2, 1)}, "a: shape (2, 2) with strides (4, 2, 1)"),
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
    path = saved(tmp_path / "x.ckpt", {"a": torch.ones(2, dtype=torch.complex64), "b": torch.ones(2, dtype=torch.uint16)})
    with open_tensor_file(path) as file:
        for name, code in (("a", "C64"), ("b", "U16")):
            with pytest.raises(InputFileError, match=f"{name}: expected floating-point data, found {code}"):
                file.read(name)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.ckpt", {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}), "a.b: two tensors of this name")


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
    """Frames may straddle opcodes here: they are hints for a reader's buffer and change nothing."""
    body = text("step") + b"K\x05s."
    for frame in (0, 3, len(body) + 1, 1 << 40):
        path = zipped_pickle(tmp_path / "x.ckpt", b"\x80\x04\x95" + struct.pack("<Q", frame) + b"}" + body)
        with open_tensor_file(path) as file:
            assert file.tree == {"step": 5}
    refused(zipped_pickle(tmp_path / "x.ckpt", b"\x80\x06}."), "pickle protocol 6, expected at most 5")
    for protocol in range(6):
        with open_tensor_file(
            zipped_pickle(tmp_path / "x.ckpt", pickle.dumps({"a": [1, 2.5, None, True, "é", b"\xff", (1,)], "n": -(1 << 70)}, protocol))
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
        path.write_bytes(b"".join([*parts[:index], pickle.dumps(value, 2) if index < 5 else b"", *parts[index + 1 :], rest]))
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
    (tmp_path / "x.ckpt").write_bytes(b"".join([*parts[:3], changed.replace(b"K\x03K\x02t", b"K\x04K\x02t"), parts[4], struct.pack("<Q5f", 5, 1, 2, 3, 4, 5)]))
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
    "state_dict": OrderedDict(weight=torch.arange(6.0).reshape(2, 3), turned=torch.arange(6.0).reshape(2, 3).t(), half=torch.ones(2).half()),
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
            assert found.keys() == right.keys() and all(torch.equal(found[name], tensor) for name, tensor in right.items())
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
                zipped_pickle(path, mutated(parts["data.pkl"], random), {name: data for name, data in parts.items() if name not in ("data.pkl", "version")})
            else:
                path.write_bytes(mutated(legacy, random))
            found = outcome(path)
            codes[found if isinstance(found, int) else "read"] += 1

    assert peak_bytes(lambda: run(1000)) < 16_000_000
    run(4000)
    assert min(codes[3], codes[4], codes["read"]) > 100, codes


# P12 and what else a path can be


def test_p12_one_descriptor_from_check_to_last_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = saved(tmp_path / "x.ckpt", {"a": torch.ones(2)}), saved(tmp_path / "other.ckpt", {"a": torch.zeros(2)})
    opens: list[object] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *arguments, **options: (opens.append(arguments[0]), real(*arguments, **options))[1])
    with open_tensor_file(path) as file:
        other.replace(path)
        assert torch.equal(file.read("a"), torch.ones(2))
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
