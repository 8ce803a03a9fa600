"""Pickles: whatever is not tensors and plain values is refused by name and never runs, and nothing grows past its
limit.
"""

from __future__ import annotations

import itertools
import os
import pickle
import struct
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_files import FORM_NAMES, FORMS, peak_bytes, refused, saved, tensors, text, zipped_pickle

from sdrt.errors import UnsafeError
from sdrt.export.read.tensor_file import open_tensor_file

# P1-P3: what executes


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


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
            b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb"
            + text(command)
            + b"b.",
            "Module",
        ),
        "STACK_GLOBAL from the memo": (
            b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93" + plain + b"R.",
            "os.system",
        ),
        "STACK_GLOBAL, dotted": (
            b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + plain + b"R.",
            "torch.serialization.os.system",
        ),
        "GLOBAL, dotted": (
            b"\x80\x04ctorch.serialization\nos.system\n" + plain + b"R.",
            "torch.serialization.os.system",
        ),
        "GLOBAL with a space": (
            b"ctorch._utils _rebuild_tensor_v2\nx\n" + plain + b"R.",
            "torch._utils._rebuild_tensor_v2 x",
        ),
        "STACK_GLOBAL of no text": (b"\x80\x04K\x01K\x02\x93)R.", "NoneType"),
        "EXT1": (b"\x80\x02\x82\x01)R.", "EXT1"),
        "EXT2": (b"\x80\x02\x83\x01\x00)R.", "EXT2"),
        "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00)R.", "EXT4"),
        "PERSID": (b"Pos.system\n.", "PERSID"),
        "BINPERSID of a module": (
            b"\x80\x02(" + text("module") + b"cos\nsystem\n" + text("x.py") + text("import os") + b"tQ.",
            "os.system",
        ),
        "BINPERSID of a module without a name": (
            b"\x80\x02(" + text("module") + text("x.py") + text("import os") + b"tQ.",
            "'module'",
        ),
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
        "torch.hub load",
        "numpy load",
        "torch load",
        "torch.storage _load_from_bytes",
        "torch._utils _rebuild_sparse_tensor",
        "torch._utils x",
        "builtins getattr",
        "builtins eval",
        "builtins exec",
        "builtins __import__",
        "operator methodcaller",
        "operator attrgetter",
        "functools partial",
        "os system",
        "posix system",
        "subprocess Popen",
        "runpy run_path",
        "torch.jit load",
        "pip main",
        "types CodeType",
        "collections namedtuple",
        "_codecs decode",
        "copyreg __newobj__",
        "pytorch_lightning.callbacks.model_checkpoint os",
        "torch._tensor os",
        "numpy.core.multiarray fromfile",
        "",
    ],
)
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
        kind = type(
            attribute,
            (dict,) if attribute == "AttributeDict" else (),
            {"__module__": name, "__reduce_ex__": object.__reduce_ex__},
        )
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
        "callbacks": {
            checkpoint: {
                "monitor": None,
                "best_model_score": np.float64(0.25),
                "best": torch.tensor(1.0),
                "where": Path("/training"),
            }
        },
        "optimizer_states": [
            {"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}
        ],
        "lr_schedulers": [
            {
                "best": np.float32(1),
                "history": np.arange(3),
                "seen": {1, 2},
                "frozen": frozenset({3}),
                "n": defaultdict(int, a=1),
            }
        ],
        "hyper_parameters": {"model": configuration, "settings": settings, "sizes": complex(1, 2)},
    }


@pytest.mark.parametrize("zipped", FORMS, ids=FORM_NAMES)
def test_p4_the_baggage_of_training_is_ignored_and_said(tmp_path: Path, baggage: dict[str, Any], zipped: bool) -> None:
    module = torch.nn.Linear(2, 3)
    path = saved(tmp_path / "real.ckpt", baggage | {"state_dict": {"state_dict": module.state_dict()}}, zipped)
    with open_tensor_file(path) as file:
        assert list(file.entries) == ["weight", "bias"]
        assert torch.equal(torch.from_numpy(file.read("weight")), module.weight)
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


# P8: pickles that grow


P8: dict[str, tuple[bytes, str]] = {
    "billion laughs": (
        b"\x80\x02]q\x00K\x01a0" + b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(60)) + b"h\x3c.",
        "more values than the limit of 200,000",
    ),
    "opcodes": (b"\x80\x02" + b"N0" * 600_000 + b"N.", "more opcodes than the limit of 1,000,000"),
    "marks": (b"\x80\x02" + b"(" * 100_000 + b"N.", "nested deeper than the limit of 200"),
    "lists in lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested deeper than the limit of 200"),
    "tuples in tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", "nested deeper than the limit of 200"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "nested deeper than the limit of 200"),
    "a dictionary in itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "nested deeper than the limit of 200"),
    "a state_dict in itself": (
        b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
        "state_dict nested deeper than the limit of 8",
    ),
    "a string of 2^60 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.", "truncated"),
    "bytes of 2^31": (b"\x80\x04B" + struct.pack("<L", (1 << 31) - 1) + b"x.", "truncated"),
    "a number of 2^31 bytes": (b"\x80\x02\x8b" + struct.pack("<L", (1 << 31) - 1) + b"x.", "truncated"),
    "a long line": (b"S'" + b"x" * (1 << 20) + b"'\n.", "a line of more than"),
    "a number of many digits": (b"I" + b"9" * 100_000 + b"\n.", "malformed"),
}


@pytest.mark.parametrize("name", P8)
def test_p8_pickles_that_grow(tmp_path: Path, name: str) -> None:
    data, message = P8[name]
    refused(zipped_pickle(tmp_path / "x.ckpt", data), message)


def test_p8_keys_that_take_forever_to_hash(tmp_path: Path) -> None:
    """A tuple of twice the same tuple, 5,000 deep: hashing it visits 2^5000 leaves."""
    key = b")" + b"2\x86" * 5000
    refused(
        zipped_pickle(tmp_path / "x.ckpt", b"\x80\x02}X\x0a\x00\x00\x00state_dict}" + key + b"Nss."),
        "the key tuple: expected a tensor or a plain value",
    )
    path = zipped_pickle(tmp_path / "y.ckpt", b"\x80\x02}" + key + b"Ns.")
    with open_tensor_file(path) as file:
        assert file.tree == {}


LONG_LIST = b"](" + b"N" * 1000 + b"e"
PAIRS = b"](" + b"".join(b"K%cN\x86" % i for i in range(256)) * 4 + b"e"
P8_COPIES = {
    "dictionaries of one list": b"ccollections\nOrderedDict\nq\x00" + PAIRS + b"q\x010" + b"h\x00h\x01\x85R0" * 2000,
    "sizes of one list": b"ctorch\nSize\nq\x00" + LONG_LIST + b"q\x010" + b"h\x00h\x01\x85R0" * 2000,
    "bytes of one text": b"c_codecs\nencode\nq\x00"
    + text("x" * 1_000_000)
    + b"q\x010"
    + text("latin1")
    + b"q\x020"
    + b"h\x00h\x01h\x02\x86R" * 200,
    "parameters of one dictionary": b"ctorch.nn.modules.container\nParameterDict\nq\x00}"
    + text("_parameters")
    + b"}("
    + b"".join(b"M%c%cN" % (i % 256, i // 256) for i in range(1000))
    + b"usq\x01"
    + b"0h\x00)\x81h\x01b" * 2000,
}


@pytest.mark.parametrize("name", P8_COPIES)
def test_p8_one_value_copied_many_times(tmp_path: Path, name: str) -> None:
    path = zipped_pickle(tmp_path / "x.ckpt", b"\x80\x02" + P8_COPIES[name] + b"N.")
    peak = peak_bytes(lambda: refused(path, "it repeats itself beyond the limit of 1,000,000 values"))
    assert peak < 120_000_000


def test_p8_names_and_numbers_too_long_to_print(tmp_path: Path) -> None:
    nested = b"\x80\x02" + text("k" * 400) + b"q\x000" + b"}h\x00" * 4 + b"N" + b"s" * 4 + b"."
    refused(zipped_pickle(tmp_path / "x.ckpt", nested), "a name longer than the limit of 1,000 characters")
    with open_tensor_file(
        zipped_pickle(tmp_path / "x.ckpt", pickle.dumps({1 << 100_000: 1, "a": 1 << 100_000}, 2))
    ) as file:
        assert file.tree == {"a": 1 << 100_000}
        assert file.notes == ("x.ckpt: ignored, as no tensor: the key int",)
    error = refused(
        zipped_pickle(tmp_path / "x.ckpt", b"\x80\x04" + text("m" * 1_000_000) + text("n") + b"\x93."),
        "the name mmm",
        kind=UnsafeError,
    )
    assert len(error.message) < 1000


def test_p8_a_pickle_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrt.export.read.torch_archive.MAX_PICKLE_BYTES", 100)
    refused(saved(tmp_path / "x.ckpt", tensors()), "data.pkl", "more than the limit of 100")
    monkeypatch.setattr("sdrt.export.read.pickles.MAX_PICKLE_BYTES", 100)
    refused(saved(tmp_path / "y.ckpt", tensors(), False), "longer than the limit of 100 bytes")


def test_p8_the_number_of_tensors_and_the_memo_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.ckpt", tensors())
    monkeypatch.setattr("sdrt.export.read.torch_archive.MAX_TENSORS", 5)
    refused(path, "more tensors than the limit of 5")
    monkeypatch.setattr("sdrt.export.read.pickles.MAX_MEMO", 10)
    refused(path, "more memo entries than the limit of 10")
