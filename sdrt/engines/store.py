"""Compiled engines in a bundle: what each was made under, and the only way to its bytes.

An engine is native code, made for one compiler version, one kind of GPU and one set of shapes, or a graph optimised for
one CPU. `engines/<target>-<key>/` holds the plans and `engine.json`, written last; the folder is published by rename.
Nothing hands out a plan whose hash differs from the record, but a hash says unchanged, not trustworthy: run engines you
made or got from someone you trust. Serves compile, runtime and cli; standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path

from sdrt.bundle.folder import Bundle, check_files, check_nothing_else
from sdrt.bundle.graphs import STEP, VAE_DECODER, dimensions, signatures, table_rows
from sdrt.bundle.manifest import ENGINES, MANIFEST, UNET, WEIGHTS, Manifest
from sdrt.engines.record import FORMAT, RECORD, EngineKey, EngineRecord, record_from
from sdrt.engines.shapes import fills_up
from sdrt.engines.targets import TARGETS
from sdrt.errors import BundleError, MachineError, UsageError, printable
from sdrt.files.publish import check_space, new_folder, no_room, remove_folder, staged_folders, sweep_stages, write_file
from sdrt.files.read import strict_json

NewEngine = Callable[[EngineKey, int], AbstractContextManager[Path]]
"""Makes the folder of a new engine, for its key and the bytes that its plans take."""
MAX_RECORD_BYTES = 1 << 20
ALIGNMENT = 256
"""TensorRT asks for device buffers that begin on this many bytes."""


def key_digest(key: EngineKey) -> str:
    """SHA-256 of the key as canonical JSON, in hex."""
    return hashlib.sha256(
        json.dumps(asdict(key), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    ).hexdigest()


def folder_name(key: EngineKey) -> str:
    return f"{key.target}-{key_digest(key)[:16]}"


def state_bytes(manifest: Manifest, *, size: tuple[int, int], batch: int, tokens: int, rows: int, branches: int) -> int:
    """Device memory that a running batch needs beside the engine: the step's inputs and outputs, and the decoder's
    pixels; in bytes.

    `rows` are those of each picture's slot.
    """
    width, height = size
    latents = manifest.latents
    sizes = {
        "N": batch,
        "G": branches,
        "S": table_rows(batch, rows),
        "T": tokens,
        "h": height // latents.factor,
        "w": width // latents.factor,
    }
    known = signatures(dimensions(manifest))
    kept = [*known[STEP].inputs.values(), *known[STEP].outputs.values(), known[VAE_DECODER].outputs["pixels"]]
    return sum(-(-tensor.size_bytes(sizes) // ALIGNMENT) * ALIGNMENT for tensor in kept)


def arithmetic(manifest: Manifest, target: str, precision: str) -> dict[str, str]:
    """The arithmetic of the graphs that an engine of a precision is made from, by graph.

    Where an engine computes in what its graphs say, and the precision is the UNet's own in the manifest, each component
    has its own: a VAE may need float32 beside a UNet in float16. Another precision holds for all components.
    """
    made_with, components = TARGETS.get(target), manifest.components
    if made_with is not None and made_with.source is not None:
        return dict.fromkeys(manifest.graphs, made_with.source)
    if precision != components[UNET].compute:
        return dict.fromkeys(manifest.graphs, precision)
    records = {graph: next(iter(by_precision.values()), None) for graph, by_precision in manifest.graphs.items()}
    return {
        graph: precision if record is None else components[record.component].compute
        for graph, record in records.items()
    }


def engine_folder(bundle: Bundle, key: EngineKey) -> Path:
    """Where the engine of a key lies, or would."""
    return bundle.path / ENGINES / folder_name(key)


def write_engine(
    bundle: Bundle, record: EngineRecord, plans: Mapping[str, bytes | memoryview], new_engine: NewEngine | None = None
) -> Path:
    """Publish an engine whose plans are in memory, by itself or with those of `new_engines`. Returns its folder.

    Raises:
        BundleError, ResourceError, UsageError: as `new_engines`.
    """
    make = new_engine or (lambda key, needed_bytes: staged_engine(bundle, key, needed_bytes))
    with make(record.key, sum(len(plan) for plan in plans.values())) as stage:
        for graph, plan in plans.items():
            write_file(stage / record.plans[graph].file, plan)
        write_record(stage, record)
    return engine_folder(bundle, record.key)


@contextmanager
def staged_engine(bundle: Bundle, key: EngineKey, needed_bytes: int) -> Iterator[Path]:
    """One engine of `new_engines`, by itself."""
    with new_engines(bundle) as new_engine, new_engine(key, needed_bytes) as stage:
        yield stage


@contextmanager
def new_engines(bundle: Bundle) -> Iterator[NewEngine]:
    """Yield a function that makes an empty folder for the engine of a key. All of them appear under `engines/` when
    this block ends without an exception, in place of those of the same keys; else none does.

    Put as many bytes of plans into a folder as was said, and the record last.

    Raises:
        BundleError: `engines` is not a folder.
        ResourceError: out of disk.
        UsageError: the bundle cannot be written.
    """
    root = bundle.path / ENGINES
    with staged_folders(replace=True) as staged:

        @contextmanager
        def new_engine(key: EngineKey, needed_bytes: int) -> Iterator[Path]:
            if os.path.lexists(root) and (root.is_symlink() or not root.is_dir()):
                raise BundleError(f"{root}: expected a folder", "Remove it.")
            check_space(
                bundle.path,
                needed_bytes + (1 << 20),
                "the engine",
                "Free some space, or pass --prune to drop stale engines.",
            )
            try:
                with suppress(FileExistsError):
                    new_folder(root)
            except OSError as error:
                if (full := no_room(root, error)) is not None:
                    raise full from error
                raise UsageError(
                    f"{root}: cannot write there: {error.strerror}",
                    "Compile a copy of the bundle in a folder that is writable.",
                ) from error
            with staged(engine_folder(bundle, key)) as stage:
                yield stage

        yield new_engine


def write_record(stage: Path, record: EngineRecord) -> None:
    """Write `engine.json`, the last file of an engine."""
    text = json.dumps(asdict(record), indent=1, sort_keys=True, ensure_ascii=True)
    write_file(stage / RECORD, text.encode() + b"\n")


def engine_folders(bundle: Bundle) -> list[Path]:
    """Folders of the bundle's engines, newest first; nothing in them has been read.

    Raises:
        BundleError: something there is not a folder of its own.
    """
    root = bundle.path / ENGINES
    if not os.path.lexists(root):
        return []
    if root.is_symlink() or not root.is_dir():
        raise BundleError(f"{root}: expected a folder, found a link or file", "Remove it.")
    found = [path for path in root.iterdir() if not path.name.startswith(".")]
    for path in found:
        if path.is_symlink() or not path.is_dir():
            raise BundleError(f"{path}: expected an engine's folder, found a link or file", "Remove it.")
    return sorted(found, key=lambda path: (-path.stat().st_mtime_ns, path.name))


def list_engines(bundle: Bundle) -> list[tuple[Path, EngineRecord]]:
    """The bundle's engines, newest first. Plans are listed, not read.

    Raises:
        BundleError: one is not what it should be.
        MachineError: a newer sdrt wrote one.
    """
    return [(folder, read_engine(folder)) for folder in engine_folders(bundle)]


def read_engine(folder: Path) -> EngineRecord:
    """Read and check an engine's record. It is untrusted input: strict fields, plain file names, the folder's name from
    the key.

    Raises:
        BundleError: it is missing, malformed, or lies under another key's name.
        MachineError: a newer sdrt wrote it.
    """
    path = folder / RECORD
    with _regular(path) as (stream, size_bytes):
        if size_bytes > MAX_RECORD_BYTES:
            raise BundleError(f"{path}: {size_bytes:,} bytes, more than the limit of {MAX_RECORD_BYTES:,}", _AGAIN)
        data = stream.read(size_bytes)
    try:
        document = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON: {printable(str(error))}", _AGAIN) from error
    if not isinstance(document, dict):
        raise BundleError(f"{path}: expected a JSON object, found {type(document).__name__}", _AGAIN)
    version = document.get("format")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT:
        raise MachineError(
            f"{path}: engine format {version}; this sdrt reads format {FORMAT}",
            "Upgrade sdrt, or remove the engine and compile again.",
        )
    try:
        record = record_from(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path}: does not have the expected form: {printable(str(error)[:500])}", _AGAIN) from error
    if folder.name != folder_name(record.key):
        raise BundleError(
            f"{folder}: lies under another engine's name: its key makes {folder_name(record.key)}", _AGAIN
        )
    return record


def read_plan(folder: Path, record: EngineRecord, graph: str) -> bytes:
    """A plan's bytes, compared with the record before they are returned: loading a plan is running native code.

    Raises:
        BundleError: it is missing, a link, or changed; it names the file.
    """
    plan = record.plans[graph]
    with _regular(folder / plan.file) as (stream, size_bytes):
        data = stream.read(size_bytes) if size_bytes == plan.size_bytes else b""
    if size_bytes != plan.size_bytes or len(data) != plan.size_bytes:
        raise BundleError(f"{folder / plan.file}: expected {plan.size_bytes:,} bytes, found {size_bytes:,}", _AGAIN)
    found = hashlib.sha256(data).hexdigest()
    if found != plan.sha256:
        raise BundleError(
            f"{folder / plan.file}: changed since it was compiled: expected sha256 {plan.sha256[:16]}…, found"
            f" {found[:16]}…",
            _AGAIN,
        )
    return data


def check_external_data(folder: Path, record: EngineRecord, graph: str) -> None:
    """Compare the weights beside a plan with the record; nothing where it has none. They may be gigabytes: nothing is
    kept.

    Raises:
        BundleError: the file is missing, a link, or changed; it names it.
    """
    data = record.plans[graph].external_data
    if data is None:
        return
    path = folder / data.file
    with _regular(path) as (stream, size_bytes):
        found = "" if size_bytes != data.size_bytes else hashlib.file_digest(stream, "sha256").hexdigest()
    if size_bytes != data.size_bytes:
        raise BundleError(f"{path}: expected {data.size_bytes:,} bytes, found {size_bytes:,}", _AGAIN)
    if found != data.sha256:
        raise BundleError(
            f"{path}: changed since it was compiled: expected sha256 {data.sha256[:16]}…, found {found[:16]}…", _AGAIN
        )


def read_intact(folder: Path) -> EngineRecord:
    """The record of an engine after comparing every file with it. Nothing else lies in its folder, hidden or not.

    Raises:
        BundleError, MachineError: as `read_engine` and `read_plan`; or there is something else.
    """
    record = read_engine(folder)
    for graph in record.plans:
        read_plan(folder, record, graph)
        check_external_data(folder, record, graph)
    check_nothing_else(folder, _files(record), "not in the engine's record", _AGAIN)
    return record


def check_all(bundle: Bundle) -> list[tuple[Path, EngineRecord]]:
    """Compare every file of a bundle with the manifest, every file of its engines with their records, and make sure
    that there is nothing else, hidden or not: what is there is all that a signature covers. Returns the engines, newest
    first.

    Raises:
        BundleError, MachineError: as `check_files` and `read_intact`; or there is something else.
    """
    check_files(bundle)
    engines = [(folder, read_intact(folder)) for folder in engine_folders(bundle)]
    known = {
        MANIFEST,
        *bundle.manifest.files,
        *(f"{ENGINES}/{folder.name}/{name}" for folder, record in engines for name in _files(record)),
    }
    fix = "Remove it; what a killed compilation left goes with: sdrt compile BUNDLE --prune"
    check_nothing_else(bundle.path, known, "not in the manifest, nor part of an engine", fix)
    return engines


def _files(record: EngineRecord) -> set[str]:
    """Names of the files of an engine's folder."""
    data = (plan.external_data.file for plan in record.plans.values() if plan.external_data is not None)
    return {RECORD, *(plan.file for plan in record.plans.values()), *data}


def mismatch(
    record: EngineRecord,
    bundle: Bundle,
    *,
    target: str | None = None,
    compiler: str | None = None,
    gpu: str | None = None,
    cpu: str | None = None,
    platform: str | None = None,
    flags: tuple[str, ...] | None = None,
) -> str:
    """Why an engine must not run: what it was built for and what there is, in words; empty if it fits. What is None is
    not compared.

    `compiler` is a full version, `gpu` such as "NVIDIA H100 80GB HBM3, sm_90", `cpu` a model with its instruction sets,
    `flags` how this sdrt builds such an engine.
    """
    key, manifest, reasons = record.key, bundle.manifest, []
    if target is not None and key.target != target:
        reasons.append(f"built for {key.target}, not {target}")
    made_with, made_from = TARGETS.get(key.target), arithmetic(manifest, key.target, key.precision)
    found = {graph: by_precision.get(made_from[graph]) for graph, by_precision in manifest.graphs.items()}
    digests = {graph: manifest.files[made.path].sha256 for graph, made in found.items() if made is not None}
    if any(digests.get(graph) != digest for graph, digest in key.graphs.items()):
        reasons.append("built for graphs that have changed")
    if key.weights != manifest.files[WEIGHTS].sha256:
        reasons.append("built for weights that have changed")
    if compiler is not None and key.compiler != compiler:
        title = key.target if made_with is None else made_with.title
        reasons.append(f"built for {title} {key.compiler}, this machine has {compiler}")
    if gpu is not None and gpu != key.device and not _made_for_generation(key, gpu):
        reasons.append(f"built for {key.device}, this GPU is {gpu}")
    if cpu is not None and key.device != cpu:
        reasons.append(f"built for {key.device}, this machine is {cpu}")
    if platform is not None and key.platform != platform:
        reasons.append(f"built for {key.platform}, this machine is {platform}")
    if flags is not None and key.flags != flags:
        reasons.append("built by another version of sdrt, in another way")
    return "; ".join(reasons)


def _made_for_generation(key: EngineKey, gpu: str) -> bool:
    """Whether an engine was compiled for generations of GPUs, and this GPU is of one. Kernels that were chosen by time
    on one GPU belong to that model alone: another one of its generation runs them slowly, or not at all.
    """
    target = TARGETS.get(key.target)
    return target is not None and bool(target.sms) and gpu.rpartition(", ")[2] in key.device.split(",")


def serves_default(record: EngineRecord, manifest: Manifest) -> bool:
    """Whether an engine takes a request that chooses nothing: the bundle's own size, one picture, a prompt of one
    chunk, guidance.
    """
    if record.size is None or record.batch is None or record.tokens is None or record.branches is None:
        return True  # any shape
    width, height = manifest.latents.size
    own = (width, height, 1, manifest.chunk)
    most = (*record.size, record.batch, record.tokens)
    if manifest.branches not in record.branches:
        return False
    if fills_up(record):
        return own == (*most[:2], 1, most[3])
    factor = manifest.latents.factor
    for profile in record.key.profiles.get(STEP, ()):
        pictures, _, rows, columns = profile.shapes["init"][0]
        least = (columns * factor, rows * factor, pictures, profile.shapes["context"][0][-2])
        if all(low <= one <= high for low, one, high in zip(least, own, most, strict=True)):
            return True
    return False


def prune(bundle: Bundle, *, keep: Callable[[EngineRecord], bool]) -> list[Path]:
    """Remove engines that `keep` does not want, damaged ones, and what killed compilations left. Returns the engines'
    folders.

    Engines of a newer sdrt are left alone.
    """
    removed = []
    for folder in engine_folders(bundle):
        try:
            if keep(read_intact(folder)):
                continue
        except BundleError:
            pass
        except MachineError:
            continue
        remove_folder(folder)
        removed.append(folder)
    sweep_stages(bundle.path / ENGINES)
    return removed


_AGAIN = "Compile it again with the same options, or remove it with: sdrt compile BUNDLE --prune"


@contextmanager
def _regular(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file open for reading, and its size; a link is refused where the system can tell while opening."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        )
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path}: expected a regular file", _AGAIN)
            yield stream, status.st_size
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}", _AGAIN) from error
