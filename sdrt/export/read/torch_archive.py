"""Reads files of torch.save, in today's zip form and in the legacy form, into tensor entries and a tree of plain
values.

This file handles everything around the pickle: the members of the zip form, the storages of the legacy form, and the
check that every tensor lies within its storage. Formats: torch/serialization.py (`_save`, `_legacy_save`). Reads no
tensor data and imports no torch.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from sdrt.errors import InputFileError, UnsafeError, printable
from sdrt.export.read.pickle_names import Baggage, Name, StorageReference, TensorReference, kind, shown
from sdrt.export.read.pickles import MAX_DEPTH, MAX_PICKLE_BYTES, PickleBytes, read_pickle
from sdrt.export.read.tensor_entry import ITEM_BYTES, MAX_RANK, MAX_TENSORS, TensorEntry
from sdrt.export.read.zip_members import MAX_EXPANSION, Member, expansion_limit, members, read_member

MAX_VALUES = 200_000
MAX_NAME_LENGTH = 1000
MAX_NESTED_STATE_DICTS = 8
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_ITEM_BYTES = ITEM_BYTES | {"C64": 8, "C128": 16}
_MEMBER = re.compile(r"(version|byteorder|\.format_version|\.storage_alignment|\.data/[^/]+|data/[^/]+)")
_SHOWN_DROPPED = 5
_AGAIN = "Download the file again."
_SOURCE = "Get the file from its source again, as .safetensors if there is one."


@dataclass(frozen=True)
class TorchArchive:
    """The content of a file of torch.save: tensors by dotted name, the same as a tree of plain values with entries as
    leaves, and remarks for the user.
    """

    entries: Mapping[str, TensorEntry]
    tree: Any
    notes: tuple[str, ...]


def read_zip_archive(path: Path, stream: BinaryIO, size: int) -> TorchArchive:
    """The zip form, torch 1.6 and later. `stream` is the whole file.

    Raises:
        InputFileError: malformed, truncated, past a limit, or a zip of another kind.
        UnsafeError: see `zip_members.members` and `pickles.read_pickle`, and members that torch never writes.
    """
    found = members(path, stream, size)
    folder, by_name = _folder(path, found)
    pickle = by_name["data.pkl"]
    if pickle.size_bytes > MAX_PICKLE_BYTES:
        raise InputFileError(
            f"{path}: data.pkl: {pickle.size_bytes:,} bytes, more than the limit of {MAX_PICKLE_BYTES:,}", _SOURCE
        )
    if "byteorder" in by_name and (order := bytes(_small(path, stream, by_name["byteorder"]))) != b"little":
        raise InputFileError(
            f"{path}: byteorder: expected little, found {printable(order[:20].decode('latin-1'))}",
            "Save it on a little-endian machine.",
        )
    data = io.BytesIO(read_member(path, stream, pickle))
    where = f"{path}: {folder}/data.pkl"
    root = read_pickle(PickleBytes(data, pickle.size_bytes), where)
    if data.tell() != pickle.size_bytes:
        raise UnsafeError(
            f"{where}: {pickle.size_bytes - data.tell():,} bytes follow the pickle, expected none: they may hold"
            " something else",
            _SOURCE,
        )
    return _archive(path, size, root, lambda reference: by_name.get(f"data/{reference.key}"))


def read_legacy_archive(path: Path, stream: BinaryIO, size: int) -> TorchArchive:
    """The form before torch 1.6: five pickles, then each storage's size and bytes. `stream` is unbuffered, at any
    position.

    Raises:
        InputFileError: malformed, truncated, past a limit, or a pickle that torch.save did not write.
        UnsafeError: see `pickles.read_pickle`; or bytes follow the last storage.
    """
    stream.seek(0)
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), 1 << 16)
    try:
        magic = read_pickle(PickleBytes(buffered, size), str(path))
        if magic != LEGACY_MAGIC or isinstance(magic, float):
            raise InputFileError(
                f"{path}: a Python pickle that torch.save did not write", "Save it with torch.save, or as .safetensors."
            )
        protocol, system = (read_pickle(PickleBytes(buffered, size), str(path)) for _ in range(2))
        if protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
            raise InputFileError(
                f"{path}: legacy torch protocol {shown(protocol)}, expected {LEGACY_PROTOCOL}",
                "Save it with torch.save.",
            )
        if system.get("little_endian") is not True:
            raise InputFileError(f"{path}: big-endian data", "Save it on a little-endian machine.")
        storages: dict[str, StorageReference] = {}
        root = read_pickle(PickleBytes(buffered, size), str(path), storages)
        keys = read_pickle(PickleBytes(buffered, size), str(path))
        at = buffered.tell()
        if (
            not isinstance(keys, list)
            or not all(isinstance(key, str) and key in storages for key in keys)
            or len(set(keys)) != len(keys)
        ):
            raise InputFileError(f"{path}: the list of storages does not name the storages of the pickle", _AGAIN)
        found: dict[str, Member] = {}
        for key in keys:
            items, item_bytes = storages[key].items, _ITEM_BYTES[storages[key].dtype]
            stated = _integer(path, stream, at)
            if stated != items:
                raise InputFileError(
                    f"{path}: storage {printable(key)}: holds {stated:,} items, the pickle says {items:,}", _AGAIN
                )
            found[key] = Member(f"storage {key}", at + 8, items * item_bytes)
            at += 8 + items * item_bytes
            if at > size:
                raise InputFileError(
                    f"{path}: truncated: storage {printable(key)} ends at byte {at:,}, the file has {size:,}", _AGAIN
                )
        if at != size:
            raise UnsafeError(
                f"{path}: {size - at:,} bytes follow the last storage, expected none: the file may hold something"
                " else too",
                _SOURCE,
            )
    finally:
        buffered.detach()
    return _archive(path, size, root, lambda reference: found.get(reference.key))


def _integer(path: Path, stream: BinaryIO, at: int) -> int:
    stream.seek(at)
    data = stream.read(8)
    if len(data) != 8:
        raise InputFileError(f"{path}: truncated: expected 8 bytes at byte {at:,}, found {len(data)}", _AGAIN)
    return int.from_bytes(data, "little")


def _folder(path: Path, found: list[Member]) -> tuple[str, dict[str, Member]]:
    """The folder within the archive, and the folder's members by name."""
    pickles = [member.name for member in found if member.name.rpartition("/")[2] == "data.pkl"]
    names = {member.name for member in found}
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise InputFileError(
            f"{path}: a TorchScript archive: a program, not a checkpoint", "Get the checkpoint it was made from."
        )
    if not pickles:
        first = printable(found[0].name[:80]) if found else "nothing"
        raise InputFileError(
            f"{path}: a zip archive that torch.save did not write: it has no data.pkl, it holds {first}",
            "Give the file inside it, if that is a model.",
        )
    folder, _, _ = pickles[0].rpartition("/")
    if len(pickles) > 1 or not folder or "/" in folder:
        raise UnsafeError(
            f"{path}: {printable(pickles[-1])}: expected one data.pkl in one folder: two readers would see two files",
            _SOURCE,
        )
    by_name = {member.name.removeprefix(folder + "/"): member for member in found}
    for name in names:
        if name != pickles[0] and not (name.startswith(folder + "/") and _MEMBER.fullmatch(name[len(folder) + 1 :])):
            raise UnsafeError(f"{path}: {printable(name)}: not a member that torch.save writes", _SOURCE)
    return printable(folder), by_name


def _small(path: Path, stream: BinaryIO, member: Member) -> bytearray:
    if member.size_bytes > 64:
        raise InputFileError(
            f"{path}: {printable(member.name)}: {member.size_bytes:,} bytes, expected at most 64", _AGAIN
        )
    return read_member(path, stream, member)


def _archive(path: Path, size: int, root: Any, storage: Callable[[StorageReference], Member | None]) -> TorchArchive:
    notes: list[str] = []
    nested = 0
    while isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        beside = sorted(key for key in root if isinstance(key, str) and key != "state_dict")
        notes += (
            [f"{path.name}: what lies beside the weights was ignored: {printable(', '.join(beside)[:200])}"]
            if beside
            else []
        )
        root = root["state_dict"]
        nested += 1
        if nested > MAX_NESTED_STATE_DICTS:
            raise InputFileError(
                f"{path}: state_dict nested deeper than the limit of {MAX_NESTED_STATE_DICTS}", _SOURCE
            )
    walk = _Walk(path, storage, strict=nested > 0)
    tree = walk.value(root, ())
    logical = sum(entry.size_bytes for entry in walk.entries.values())
    if logical > expansion_limit(size):
        raise InputFileError(
            f"{path}: its tensors unpack to {logical:,} bytes, more than the limit of {expansion_limit(size):,}"
            f" ({MAX_EXPANSION} times the file)",
            _SOURCE,
        )
    if walk.dropped:
        notes.append(f"{path.name}: ignored, as no tensor: {printable(', '.join(walk.dropped[:_SHOWN_DROPPED])[:200])}")
    return TorchArchive(walk.entries, tree, tuple(notes))


@dataclass
class _Walk:
    """Turns a pickle's value into plain values and checked entries, naming each tensor by its path."""

    path: Path
    storage: Callable[[StorageReference], Member | None]
    strict: bool
    entries: dict[str, TensorEntry] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    values: int = 0

    def value(self, value: Any, at: tuple[str, ...]) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise InputFileError(f"{self.path}: more values than the limit of {MAX_VALUES:,}", _SOURCE)
        if len(at) > MAX_DEPTH:
            raise InputFileError(f"{self.path}: nested deeper than the limit of {MAX_DEPTH}", _SOURCE)
        if sum(map(len, at)) > MAX_NAME_LENGTH:
            raise InputFileError(
                f"{self.path}: a name longer than the limit of {MAX_NAME_LENGTH:,} characters:"
                f" {printable(at[0][:40])}...",
                _SOURCE,
            )
        if isinstance(value, TensorReference):
            return self._tensor(value, ".".join(at) or "tensor")
        if isinstance(value, dict):
            kept: dict[str | int, Any] = {}
            for key, item in value.items():
                if isinstance(key, str) or (type(key) is int and abs(key) < 1 << 64):
                    kept[key] = item
                else:
                    self._drop(key, (*at, f"the key {kind(key)}"))
            return {
                key: self.value(item, (*at, str(key)))
                for key, item in kept.items()
                if not self._baggage(item, (*at, str(key)))
            }
        if isinstance(value, list | tuple):
            return [
                self.value(item, (*at, str(i)))
                for i, item in enumerate(value)
                if not self._baggage(item, (*at, str(i)))
            ]
        if isinstance(value, Name):
            return value.text.replace(" ", ".")
        if value is None or isinstance(value, str | int | float | bytes):
            return value
        self._drop(value, at)
        return None

    def _baggage(self, value: Any, at: tuple[str, ...]) -> bool:
        if isinstance(value, Baggage):
            self._drop(value, at)
        return isinstance(value, Baggage)

    def _drop(self, value: Any, at: tuple[str, ...]) -> None:
        if self.strict or not at:
            raise InputFileError(
                f"{self.path}: {printable('.'.join(at)[:200])}: expected a tensor or a plain value, found"
                f" {printable(kind(value))}",
                _SOURCE,
            )
        if len(self.dropped) <= _SHOWN_DROPPED:
            self.dropped.append(".".join(at)[:MAX_NAME_LENGTH])

    def _tensor(self, view: TensorReference, name: str) -> TensorEntry:
        where = f"{self.path}: {printable(name[:200])}"
        if name in self.entries:
            raise InputFileError(
                f"{where}: two tensors of this name", "Save the file again; two tensors cannot share a name."
            )
        if len(self.entries) >= MAX_TENSORS:
            raise InputFileError(f"{self.path}: more tensors than the limit of {MAX_TENSORS:,}", _SOURCE)
        item = _ITEM_BYTES.get(view.dtype)
        if item is None:
            raise InputFileError(f"{where}: a type that sdrt does not know")
        if (
            len(view.shape) > MAX_RANK
            or len(view.strides) != len(view.shape)
            or not all(_is_size(n) for n in (*view.shape, *view.strides))
        ):
            raise InputFileError(
                f"{where}: shape {shown(view.shape)} with strides {shown(view.strides)}: expected up to {MAX_RANK}"
                " sizes, none negative",
                _SOURCE,
            )
        member = self.storage(view.storage)
        declared = view.storage.items * _ITEM_BYTES[view.storage.dtype]
        if member is None or member.size_bytes != declared:
            found = "there is none" if member is None else f"found {member.size_bytes:,}"
            raise InputFileError(
                f"{where}: storage {printable(view.storage.key[:40])}: expected {declared:,} bytes, {found}", _AGAIN
            )
        count = math.prod(view.shape)
        last = (
            view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
            if count
            else view.offset
        )
        first_byte = view.storage.first_item * _ITEM_BYTES[view.storage.dtype]
        if (last + (count > 0)) * item + first_byte > declared:
            raise InputFileError(
                f"{where}: reaches byte {(last + 1) * item:,} of a storage of {declared:,} bytes", _SOURCE
            )
        dense = _dense(view.shape, view.strides)
        entry = TensorEntry(
            name,
            view.dtype,
            view.shape,
            first_byte + view.offset * item,
            count * item,
            member,
            () if dense else view.strides,
        )
        self.entries[name] = entry
        return entry


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor lies row-major without gaps. The strides of an empty tensor, or of a dimension of size one, mean
    nothing.
    """
    step = 1
    for size, stride in reversed(list(zip(shape, strides, strict=True))):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True
