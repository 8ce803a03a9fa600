"""A checkpoint where a bundle is expected: its bundle in the user's cache, which is built the first time and found
there afterwards.

The key of a bundle stands for everything that shapes it: the content and the name of every file, in their order, the
options, the version of sdrt and the source of its builds. `sdrt.bundle.cache` keeps the bundles.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdrt import __version__
from sdrt.bundle.cache import ELSEWHERE, bundles_folder, in_use, keep_to_limit, limit_bytes
from sdrt.bundle.folder import is_checkpoint, open_bundle
from sdrt.bundle.manifest import FORMAT, Manifest
from sdrt.bundle.remembered import sha256_of
from sdrt.compile.compilers import compiled_targets, compiler_of, is_compiled
from sdrt.compile.options import CompileOptions
from sdrt.engines.targets import ONNXRUNTIME
from sdrt.errors import InputFileError, MachineError, ResourceError, SdrtError, UsageError
from sdrt.export.adapters.embedding import parse_embedding_option
from sdrt.export.adapters.hypernetwork import parse_hypernetwork_option
from sdrt.export.adapters.match import parse_lora_option
from sdrt.export.adapters.settings import FILE_NAME as LORA_CONFIG
from sdrt.export.adapters.settings import MAX_CONFIG_BYTES
from sdrt.export.build import BuildOptions, Progress, build, default_output
from sdrt.export.families.table import component_of
from sdrt.export.read.checkpoint import open_checkpoint
from sdrt.export.read.tensor_entry import ITEM_BYTES
from sdrt.export.read.tensor_file import open_tensor_file
from sdrt.export.weights import CODES
from sdrt.files.cache import cache_key
from sdrt.files.lock import locked
from sdrt.files.publish import folders_made, staged_folder, sweep_stages
from sdrt.files.read import read_document
from sdrt.machine.packages import install_command

Say = Callable[[str], None]
Words = str | Path | Sequence[str | Path]
"""Adapters as the options of `sdrt build` have them, such as style.safetensors:0.8; one, or several."""
log = logging.getLogger("sdrt")

CLIP_SKIP = (1, 2)
"""The layers of the text encoder that people choose from, as far as it has them."""
_LONGEST_NAME, _LARGE_BYTES = 55, 100_000_000
_OF_BUILD = ("--allow-unmatched", "--ema", "--precision", "--prediction", "--vae-precision", "--zero-snr")
"""Options of `sdrt build` that messages of a build speak of, and that nothing else takes."""
_SHAPING = ("export", "bundle")
"""Folders whose source, and whose list of traces, shape a bundle."""


@dataclass(frozen=True)
class _Wanted:
    """A bundle that was asked for: where the cache has it, or would, what it is built from, and about how large it is.
    `hashes` are those of the files that it is built from, as they were when the key was made.
    """

    folder: Path
    options: BuildOptions
    hashes: frozenset[str]
    size_bytes: int

    @property
    def name(self) -> str:
        """The stems of the checkpoint and the adapters, as far as a file's name can hold them."""
        return str(default_output(self.options)).removesuffix(".sdrt")[:_LONGEST_NAME]


@contextmanager
def cached_bundle(
    checkpoint: Path,
    *,
    loras: Words = (),
    embeddings: Words = (),
    hypernetworks: Words = (),
    vae: Path | None = None,
    backend: str = "auto",
    progress: Progress = lambda stage, done: None,
    say: Say = log.info,
) -> Iterator[Path]:
    """Yield the bundle of a checkpoint and its adapters. It stays in the cache until the block ends, whoever else needs
    room there.

    It is built if the cache does not have it, and compiled for what `backend` stands for, as `sdrt build --target`
    does, unless it is already. Processes that want the same bundle wait for the one that builds it. Bundles that have
    not been used for longest go when the limit is passed. `say` is told in words what is done.

    Raises:
        UsageError: what is given is a bundle, an adapter is written wrongly, or the cache cannot be written.
        InputFileError, UnsafeError: as `sdrt.export.build.build`.
        MachineError: what a build needs is not installed: ONNX Runtime, or torch for what no published model has.
        ResourceError: out of disk or memory.
        LockedError: another process that builds the same did not end in time.
    """
    if not is_checkpoint(checkpoint):
        open_bundle(checkpoint)
        raise UsageError(
            f"{checkpoint}: a bundle, which takes no LoRA, embedding, hypernetwork or VAE any more",
            "Give the checkpoint in its place, or make another bundle: sdrt build --checkpoint FILE --lora FILE",
        )
    options = BuildOptions(
        checkpoint,
        loras=tuple(parse_lora_option(str(text)) for text in _several(loras)),
        vae=vae,
        clip_skip=CLIP_SKIP,
        embeddings=tuple(parse_embedding_option(str(text)) for text in _several(embeddings)),
        hypernetworks=tuple(parse_hypernetwork_option(str(text)) for text in _several(hypernetworks)),
    )
    wanted = _wanted(options, progress)
    with ExitStack() as stack:
        try:
            bundle = stack.enter_context(in_use(wanted.folder))
        except SdrtError:  # damaged
            bundle = None
        if bundle is not None:
            log.info("%s: using %s, built before", checkpoint, bundle)
            _compile(bundle, backend, progress, say)
        else:
            bundle = _built(wanted, stack, progress, say)
            _compile(bundle, backend, progress, say)
            _make_room(wanted.folder, say)
        yield bundle


def _several(words: Words) -> Sequence[str | Path]:
    return (words,) if isinstance(words, (str, Path)) else words


# The key


def _wanted(options: BuildOptions, progress: Progress) -> _Wanted:
    """Look at every file, and make the key."""
    adapters = [option.path for option in options.loras]
    adapters += [option.path for option in options.embeddings]
    adapters += [option.path for option in options.hypernetworks]
    for path in adapters:
        open_tensor_file(path).close()
    checkpoint = open_checkpoint(options.checkpoint, options.vae)
    with closing(checkpoint):
        models = [model for model in (checkpoint.model, checkpoint.vae) if model is not None]
        hashes = [model.sha256(lambda file: _hash(file.path, progress)) for model in models]
    hashes += [_hash(path, progress) for path in adapters]
    hashes += [_config_hash(option.path) for option in options.loras]
    parts = {
        "sdrt": __version__,
        "format": FORMAT,
        "source": _source_digest(),
        "options": _described(options),
        "hashes": hashes,
    }
    layers = min(text.layers for text in checkpoint.architecture.texts)
    values = sum(math.prod(t.shape) for name, t in checkpoint.tensors.items() if component_of(name) is not None)
    return _Wanted(
        bundles_folder() / cache_key(parts),
        replace(options, clip_skip=tuple(skip for skip in options.clip_skip if skip <= layers)),
        frozenset(hashes),
        values * ITEM_BYTES[CODES[options.precision]],
    )


def _hash(path: Path, progress: Progress) -> str:
    def reading() -> None:
        if path.stat().st_size >= _LARGE_BYTES:
            progress(f"hash {path.name}", None)

    try:
        return sha256_of(path, reading)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read: {error.strerror}", "Check the disk.") from error


def _config_hash(lora: Path) -> str:
    """The hash of peft's settings beside a LoRA, which some of them need."""
    try:
        return read_document(lora.with_name(LORA_CONFIG), MAX_CONFIG_BYTES).sha256
    except FileNotFoundError:
        return ""
    except InputFileError as error:
        return error.message


def _described(value: Any) -> Any:
    """Options as JSON values. Of a path only the name counts, as a bundle keeps it; its content has a hash."""
    if isinstance(value, Path):
        return value.absolute().name
    if is_dataclass(value):
        return {field.name: _described(getattr(value, field.name)) for field in fields(value)}
    return [_described(one) for one in value] if isinstance(value, tuple) else value


@cache
def _source_digest() -> str:
    """A hash of the code that makes bundles, so that a version in the making finds none of the day before."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    files = [path for folder in _SHAPING for path in (root / folder).rglob("*") if path.suffix in (".py", ".json")]
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# The bundle


def _built(wanted: _Wanted, stack: ExitStack, progress: Progress, say: Say) -> Path:
    """Build the bundle into the cache, unless another process does. It is in use until `stack` is closed."""
    folder, name = wanted.folder, wanted.name
    if find_spec(ONNXRUNTIME.module) is None:
        raise MachineError(
            f"{wanted.options.checkpoint}: its bundle has to be built first, and {ONNXRUNTIME.title}, which checks what"
            " is built, is not installed",
            f"{install_command(ONNXRUNTIME.extra)}; or build it elsewhere: sdrt build --checkpoint FILE",
        )
    limit_bytes()  # one that is no size is refused before the work
    with ExitStack() as work:
        work.enter_context(_reported())
        with _elsewhere():
            work.enter_context(folders_made("SDRT_CACHE_DIR", folder.parent))
        work.enter_context(locked(folder, lambda: progress("waiting for another build of the same bundle", None)))
        try:
            if (found := stack.enter_context(in_use(folder))) is not None:
                return found
        except SdrtError as error:
            say(f"{name}: its bundle in the cache is damaged and will be built again: {error.message}")
        megabytes, started = wanted.size_bytes / 1e6, time.perf_counter()
        say(f"building {name} into the cache (about {megabytes:,.0f} MB; kept in {folder.parent})")
        sweep_stages(folder.parent)
        with ExitStack() as staged:
            with _elsewhere():
                stage = staged.enter_context(staged_folder(folder, replace=True))
            report = build(replace(wanted.options, output=stage / f"{name}.sdrt"), progress)
            _check_same(wanted, report.manifest)
        for note in report.notes:
            say(f"note: {_of_build(note)}")
        bundle = stack.enter_context(in_use(folder))
        assert bundle is not None
        size_bytes = sum(record.size_bytes for record in report.manifest.files.values())
        say(f"built {name} ({size_bytes / 1e6:,.1f} MB) in {time.perf_counter() - started:.1f} s")
    return bundle


def _compile(bundle: Path, backend: str, progress: Progress, say: Say) -> None:
    """Compile a bundle for what `backend` stands for, unless that is done. What cannot be compiled is said: requests
    find another way, or say what is missing.
    """
    for target in compiled_targets([backend], must_compile=False):
        opened = open_bundle(bundle)
        if is_compiled(opened, target):
            continue
        try:
            compiler = compiler_of(target)
            compiler.check_compiler(target)
            compiler.compile_bundle(opened, CompileOptions(target), progress)
        except SdrtError as error:
            say(f"{opened.manifest.name}: not compiled for {target}: {error.line}")


def _make_room(newest: Path, say: Say) -> None:
    """Keep within the limit. A cache that another user filled is no reason to fail."""
    try:
        for entry in keep_to_limit(newest):
            say(f"removed {entry.name} ({entry.size_bytes / 1e6:,.1f} MB) from the cache, to keep within its limit")
    except SdrtError as error:
        say(error.line)


def _check_same(wanted: _Wanted, manifest: Manifest) -> None:
    """Refuse a bundle of other files than those whose hashes are in the key."""
    changed = [source.name for source in manifest.sources if source.sha256 not in wanted.hashes]
    if changed:
        raise InputFileError(
            f"{wanted.options.checkpoint}: {changed[0]} changed as the build began",
            "Run the command again when nothing writes to the file.",
        )


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Have an error about the output of a build speak of the cache."""
    try:
        yield
    except UsageError as error:
        fix = f"{ELSEWHERE} Or make a bundle elsewhere: sdrt build --checkpoint FILE --output NAME.sdrt"
        raise UsageError(error.message, fix) from error


@contextmanager
def _reported() -> Iterator[None]:
    """Have the errors of a build say what can be done about them here."""
    try:
        yield
    except SdrtError as error:
        error.fix = _of_build(error.fix)
        cause = error.__cause__
        if isinstance(error, ResourceError) and (cause is None or isinstance(cause, OSError)):  # the disk
            error.fix = "Free some space there, as with: sdrt cache remove; or set SDRT_CACHE_DIR to another folder."
        raise


def _of_build(text: str) -> str:
    """A text of a build that may name options which only `sdrt build` has."""
    named = [option for option in _OF_BUILD if option in text]
    return f"{text} ({', '.join(named)}: of sdrt build)" if named else text
