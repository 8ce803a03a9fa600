"""Files of torch.save: what the data-only reader reads equals torch, and whatever else a pickle or its archive holds is refused, and never runs."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
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
