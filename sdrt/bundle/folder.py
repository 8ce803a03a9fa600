"""The folder of a bundle: opened, listed, and compared with its manifest. docs/architecture.md describes the folder.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event

from sdrt.bundle.graph_check import check_graph
from sdrt.bundle.graphs import dimensions, signatures
from sdrt.bundle.manifest import ENGINES, MANIFEST, MAX_MANIFEST_BYTES, WEIGHTS, FileRecord, Manifest, read_manifest
from sdrt.errors import BundleError, InputFileError, UsageError, nearest, printable
from sdrt.files.publish import cache_folder

IN_CACHE = "bundles"
"""The kind of the cache's entries that hold bundles, each in a folder named by its key."""
_TENSOR_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_MODEL_INDEX = "model_index.json"
_BUILD = "Make one with: sdrt build --checkpoint FILE"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `path` is its absolute folder. Only the manifest has been read."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name

    def graph(self, graph: str, precision: str) -> Path:
        """Path of a graph file that has passed `sdrt.bundle.graph_check`. Engines get their graphs only here.

        Raises:
            BundleError: the bundle has no such graph at that precision, or the graph is not as builds write them.
        """
        record = self.manifest.graphs.get(graph, {}).get(precision)
        if record is None:
            raise BundleError(
                f"{self.path}: no {precision} {graph} graph", "Build the bundle again with this version of sdrt."
            )
        path = self.file(record.path)
        check_graph(path, self.file(WEIGHTS), self.manifest.files[WEIGHTS].size_bytes)
        return path


def bundle_id(manifest: Manifest) -> str:
    """16 hex digits that equal bundles share whatever their names: a hash of the hashes of their files."""
    text = "\n".join(f"{name} {record.sha256}" for name, record in sorted(manifest.files.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_record(path: Path, stop: Event | None = None) -> FileRecord:
    """Size and hash of a file.

    Raises:
        CancelledError: `stop` was set before the end.
    """
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            if stop is not None and stop.is_set():
                raise CancelledError
            digest.update(memoryview(block)[:count])
        return FileRecord(stream.tell(), digest.hexdigest())


def is_bundle(path: Path) -> bool:
    """Whether `path` looks like a bundle, finished or tampered with. Asked before the folder is replaced."""
    try:
        if not (path / MANIFEST).is_file():  # opening a FIFO would wait for a writer
            return False
        with (path / MANIFEST).open("rb") as stream:
            document = json.loads(stream.read(MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"format", "sdrt", "graphs", "files"} <= document.keys()


def is_checkpoint(path: Path) -> bool:
    """Whether what was given where a bundle is expected is a checkpoint, from which a bundle can be built: a file, also
    one that is not there, or a folder that diffusers saved. `open_bundle` says what is wrong with anything else.
    """
    if path.suffix == ".sdrt" or os.path.exists(path / MANIFEST):
        return False
    return path.suffix.lower() in _TENSOR_FILES or os.path.isfile(path) or os.path.exists(path / _MODEL_INDEX)  # noqa: PTH113


def check_outside_bundles(option: str, folder: Path) -> None:
    """Refuse to write into a bundle, which would then differ from its manifest. Only engines, and files that belong to
    them, may go into a bundle.

    Raises:
        UsageError: `folder`, the target of `option`, is a bundle or lies in one.
    """
    try:
        place = folder.resolve()
    except (OSError, RuntimeError):  # a loop of links; opening the folder reports it
        return
    for outer in (place, *place.parents):
        if is_bundle(outer):
            raise UsageError(
                f"{option}: would write into the bundle {outer}, which is refused once another file is in it",
                "Name a place outside of it.",
            )


def open_bundle(path: Path) -> Bundle:
    """Read and check a bundle's manifest. Check that exactly its files are in the folder, with their sizes.
    `check_files` checks the hashes.

    Raises:
        InputFileError: there is no such folder, no manifest in it, or the manifest cannot be read.
        MachineError: an older or newer sdrt wrote the bundle.
        BundleError: the manifest or the folder is malformed.
    """
    path = path.absolute()
    if not os.path.exists(path):
        raise InputFileError(f"{path}: no such bundle{_similar(path)}", _BUILD)
    manifest_file = path / MANIFEST
    if not path.is_dir() or not os.path.lexists(manifest_file):
        raise InputFileError(f"{path}: not a bundle: it has no {MANIFEST}", _BUILD)
    if manifest_file.is_symlink() or not manifest_file.is_file():
        raise BundleError(f"{manifest_file}: expected a regular file")
    if manifest_file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{manifest_file}: {manifest_file.stat().st_size:,} bytes, more than the limit of {MAX_MANIFEST_BYTES:,}"
        )
    manifest = read_manifest(manifest_file)
    _check_signatures(manifest_file, manifest)
    _check_listing(path, manifest)
    return Bundle(path, manifest)


def check_files(bundle: Bundle, names: Iterable[str] | None = None, stop: Event | None = None) -> None:
    """Compare the SHA-256 of the named files (all by default) with the manifest. An equal hash means unchanged, not
    trustworthy.

    Raises:
        BundleError: a file differs or cannot be read; the message names the file.
        CancelledError: `stop` was set before the end.
    """
    for name in bundle.manifest.files if names is None else names:
        try:
            expected, found = bundle.manifest.files[name], file_record(bundle.file(name), stop)
        except OSError as error:
            raise BundleError(
                f"{bundle.path}: {name}: cannot be read: {error.strerror}",
                _mend(bundle.path),
            ) from error
        if found != expected:
            raise BundleError(
                f"{bundle.path}: {name}: changed since the build: expected sha256 {expected.sha256[:16]}…, found"
                f" {found.sha256[:16]}…",
                _mend(bundle.path),
            )


def _mend(path: Path) -> str:
    """What to do about a bundle that has changed."""
    with suppress(OSError):  # no cache
        if path.parent.parent == cache_folder().absolute() / IN_CACHE:
            return f"Remove it with: sdrt cache remove {path.parent.name}; it is built again when it is next asked for."
    return "Build the bundle again, or copy it again from where it was built."


def _similar(path: Path) -> str:
    with suppress(OSError, ValueError):
        return nearest(path.name, [name for name in os.listdir(path.parent) if name != path.name])  # noqa: PTH208
    return ""


def _check_signatures(path: Path, manifest: Manifest) -> None:
    """Check that the known graphs have the inputs and outputs that this sdrt expects."""
    for graph, signature in signatures(dimensions(manifest)).items():
        for compute, record in manifest.graphs.get(graph, {}).items():
            for what, found, expected in (
                ("inputs", record.inputs, signature.inputs),
                ("outputs", record.outputs, signature.outputs),
            ):
                if found and sorted(found) != sorted(expected):
                    raise BundleError(
                        f"{path}: not of the expected form: graphs.{graph}.{compute}.{what}: {printable(repr(found))}:"
                        f" expected {', '.join(expected)}",
                        "Build the bundle again.",
                    )


def _check_listing(path: Path, manifest: Manifest) -> None:
    found = _regular_files(path)
    for name, record in manifest.files.items():
        if name not in found:
            raise BundleError(f"{path}: {name}: missing", "Build the bundle again, or copy it again whole.")
        if found[name] != record.size_bytes:
            raise BundleError(
                f"{path}: {name}: expected {record.size_bytes:,} bytes, found {found[name]:,}",
                "Build the bundle again, or copy it again whole.",
            )
    if extra := sorted(found.keys() - manifest.files.keys()):
        raise BundleError(
            f"{path}: {printable(extra[0])}: not in the manifest", "Remove it, or build the bundle again."
        )


def check_nothing_else(root: Path, names: Collection[str], what: str, fix: str) -> None:
    """Make sure that `root` holds no files but `names`, and no folders but theirs and `engines`. Hidden files and
    folders count.

    Raises:
        BundleError: there is something else; the message calls it `what` and ends with `fix`.
    """
    folders = {ENGINES, *(parent.as_posix() for name in names for parent in PurePosixPath(name).parents)}

    def unreadable(error: OSError) -> None:
        raise BundleError(
            f"{root}: {printable(str(error.filename))}: cannot be read: {error.strerror}",
            "Make it readable for this user.",
        ) from error

    for folder, below, files in os.walk(root, onerror=unreadable):
        for name in [*below, *files]:
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            mode = path.lstat().st_mode
            if not (relative in names and stat.S_ISREG(mode)) and not (relative in folders and stat.S_ISDIR(mode)):
                raise BundleError(f"{root}: {printable(relative)}: {what}", fix)


def _regular_files(root: Path) -> Mapping[str, int]:
    """Sizes of all files below `root` by relative name, without engines, hidden files and the manifest. Links and
    special files are refused.
    """
    sizes: dict[str, int] = {}
    for folder, folders, names in os.walk(root):
        at_root = Path(folder) == root
        if at_root and ENGINES in folders:
            folders.remove(ENGINES)
        for name in [*folders, *names]:
            path = Path(folder) / name
            status = path.lstat()
            relative = path.relative_to(root).as_posix()
            if stat.S_ISDIR(status.st_mode) or name.startswith("."):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(
                    f"{root}: {printable(relative)}: expected a regular file, found a link or special file",
                    "Copy the bundle with real files.",
                )
            if not (at_root and name == MANIFEST):
                sizes[relative] = status.st_size
    return sizes
