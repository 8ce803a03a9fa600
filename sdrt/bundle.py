"""The bundle: the contract between the half that exports and the half that runs.

Owns the manifest (dataclasses, read, write), the names both halves use, and the check that a folder is what its manifest says.
Standard library only. docs/architecture.md describes the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sdrt.document import read_document, strict_json
from sdrt.errors import BundleError, InputFileError, MachineError, UsageError, nearest, printable
from sdrt.graph_check import check_graph
from sdrt.publish import write_file

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "graphs/weights.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"
ENGINES = "engines"
MAX_MANIFEST_BYTES = 16 << 20

TEXT_ENCODER, STEP, VAE_DECODER, VAE_ENCODER = GRAPHS = ("text_encoder", "step", "vae_decoder", "vae_encoder")

REGISTERS = 4
"""Latents a sampler may carry from one model call to the next (R)."""

SIZE_STEP = 8
"""Picture sides are multiples of this."""
MIN_SIDE, MAX_SIDE = 64, 8192
MAX_BATCH = 64
"""Pictures of one model call at most."""
MAX_CHUNKS = 32
"""Chunks of one prompt at most: 32 of 75 tokens are 2,400, some 1,700 English words."""
MAX_BRANCHES = 16
"""Guidance branches of one picture at most: the negative prompt and 15 parts between `AND`s."""

STEP_TABLES = ("timestep", "a", "w", "u", "q", "M", "inpaint", "noise")
STEP_INPUTS = ("row", *STEP_TABLES, "registers", "context", "mask", "init", "init_noise")
STEP_OUTPUTS = ("next_registers", "next_row", "denoised")
TEXT_INPUTS = ("tokens", "emphasis")
DECODER_INPUTS = ("latents", "rounding")
DECODER_OUTPUTS = ("pixels", "finite")
ENCODER_INPUTS = ("pixels", "noise")
ENCODER_OUTPUTS = ("latents",)

PRECISIONS = ("fp32", "fp16", "bf16")
PREDICTIONS = ("epsilon", "v", "sample")
"""What a network may predict: the noise, v of Salimans and Ho 2022 ("Progressive Distillation"), or the image."""
SOURCE_KINDS = ("checkpoint", "vae", "lora", "embedding", "hypernetwork")
MAX_TIMESTEPS = 10_000


def context_output(clip_skip: int) -> str:
    """Name of the text encoder's output for a clip skip, 1 being the last layer."""
    return f"context_skip_{clip_skip}"


def graph_path(graph: str, precision: str) -> str:
    """Where a graph lies in the bundle. Beside the weights, because external data may not leave its graph's folder."""
    return f"graphs/{graph}.{precision}.onnx"


@dataclass(frozen=True)
class FileRecord:
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Diffusion:
    """What the network predicts and the noise schedule it was trained under: `num_timesteps` betas, linear in their square roots."""

    prediction: str = "epsilon"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000


@dataclass(frozen=True)
class Text:
    """`tokens` per chunk, start and end included; `clip_skip` layers the text encoder gives out, the first one being the default.

    `embeddings` maps the trigger of each learned embedding to the rows of the token table that stand for it, in order.
    """

    width: int
    tokens: int
    bos: int
    eos: int
    pad: int
    clip_skip: tuple[int, ...]
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Latents:
    """`factor` pixels a side per latent; `size` is the default picture as (width, height) in pixels.

    `concat_channels` more are seen by the UNet beside the latents: 5 (mask and masked image) for inpainting models, else 0.
    """

    channels: int
    factor: int
    size: tuple[int, int]
    concat_channels: int


@dataclass(frozen=True)
class Source:
    """A file that went into the bundle. `kind` is checkpoint, vae, lora, embedding or hypernetwork; `trigger` is an embedding's.

    `applied` counts, per component, the modules it was applied to; for an embedding, its vectors; for a hypernetwork, attention layers.
    """

    kind: str
    name: str
    sha256: str
    scale: float | None = None
    te_scale: float | None = None
    applied: dict[str, int] = field(default_factory=dict)
    relative_change: dict[str, float] = field(default_factory=dict)
    trigger: str | None = None


@dataclass(frozen=True)
class Graph:
    """`weights` is the storage type, `compute` the type of the network's arithmetic, `islands` what is float32 within it all the same.

    `error` is the largest relative error the build measured against the traced network in float32.
    """

    path: str
    weights: str
    compute: str
    islands: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float


@dataclass(frozen=True)
class Manifest:
    format: int
    sdrt: str
    name: str
    family: str
    architecture: dict[str, Any]
    diffusion: Diffusion
    text: Text
    latents: Latents
    precision: str
    graphs: dict[str, dict[str, Graph]]
    sources: tuple[Source, ...]
    tools: dict[str, str]
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: `path` is its absolute folder. Nothing but the manifest has been read."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name

    def graph(self, graph: str, precision: str) -> Path:
        """Path of a graph file that `sdrt.graph_check` has read: the one way for an engine to a graph.

        Raises:
            BundleError: the bundle has no such graph at that precision, or it is not as builds write them.
        """
        record = self.manifest.graphs.get(graph, {}).get(precision)
        if record is None:
            raise BundleError(f"{self.path}: no {precision} {graph} graph", "Build the bundle again with this version of sdrt.")
        path = self.file(record.path)
        check_graph(path, self.file(WEIGHTS), self.manifest.files[WEIGHTS].size_bytes)
        return path


def bundle_id(manifest: Manifest) -> str:
    """16 hex digits that equal bundles share whatever their names: a hash of their files' hashes."""
    text = "\n".join(f"{name} {record.sha256}" for name, record in sorted(manifest.files.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_record(path: Path) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileRecord(stream.tell(), digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`, the last file of a bundle. Keys are sorted, so equal manifests are equal bytes."""
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False)
    # A lone surrogate, from a file name that is not Unicode, becomes the JSON escape it was.
    write_file(folder / MANIFEST, (text + "\n").encode("utf-8", errors="backslashreplace"))


def is_bundle(path: Path) -> bool:
    """Whether `path` looks like a folder of ours, finished or tampered with; used before replacing it."""
    try:
        if not (path / MANIFEST).is_file():  # opening a FIFO would wait for a writer
            return False
        with (path / MANIFEST).open("rb") as stream:
            document = json.loads(stream.read(MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"format", "sdrt", "graphs", "files"} <= document.keys()


def check_outside_bundles(option: str, folder: Path) -> None:
    """Refuse to write into a bundle, which would no longer be what its manifest says. Only engines, and what belongs to them, go into one.

    Raises:
        UsageError: `folder`, where `option` would write, is a bundle or lies in one.
    """
    try:
        place = folder.resolve()
    except (OSError, RuntimeError):  # a loop of links: opening it says so
        return
    for outer in (place, *place.parents):
        if is_bundle(outer):
            raise UsageError(f"{option}: would write into the bundle {outer}, which is refused once another file is in it", "Name a place outside of it.")


def open_bundle(path: Path) -> Bundle:
    """Read and check a bundle's manifest, and that exactly its files are there with their sizes. Hashes are `check_files`'s.

    Raises:
        InputFileError: there is no such folder, no manifest in it, or it cannot be read.
        MachineError: a newer sdrt wrote it.
        BundleError: the manifest or the folder is not what it should be.
    """
    path = path.absolute()
    if not os.path.exists(path):
        raise InputFileError(f"{path}: no such bundle", "Make one with: sdrt build --checkpoint FILE")
    manifest_file = path / MANIFEST
    if not path.is_dir() or not os.path.lexists(manifest_file):
        raise InputFileError(f"{path}: not a bundle: it has no {MANIFEST}", "Make one with: sdrt build --checkpoint FILE")
    if manifest_file.is_symlink() or not manifest_file.is_file():
        raise BundleError(f"{manifest_file}: expected a regular file")
    if manifest_file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{manifest_file}: {manifest_file.stat().st_size:,} bytes, more than the limit of {MAX_MANIFEST_BYTES:,}")
    manifest = _parse_manifest(manifest_file, read_document(manifest_file, MAX_MANIFEST_BYTES, "Make it readable for this user.").data)
    _check_listing(path, manifest)
    return Bundle(path, manifest)


def check_files(bundle: Bundle, names: Iterable[str] | None = None) -> None:
    """Compare the SHA-256 of the named files (all by default) with the manifest. A hash says unchanged, not trustworthy.

    Raises:
        BundleError: a file differs or cannot be read; it names the file.
    """
    for name in bundle.manifest.files if names is None else names:
        try:
            expected, found = bundle.manifest.files[name], file_record(bundle.file(name))
        except OSError as error:
            raise BundleError(f"{bundle.path}: {name}: cannot be read: {error.strerror}", "Copy the bundle again from where it was built.") from error
        if found != expected:
            raise BundleError(
                f"{bundle.path}: {name}: changed since the build: expected sha256 {expected.sha256[:16]}…, found {found.sha256[:16]}…",
                "Build the bundle again, or copy it again from where it was built.",
            )


def _parse_manifest(path: Path, data: bytes) -> Manifest:
    try:
        document = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON: {printable(str(error))}", "Build the bundle again.") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path}: expected a JSON object, found {type(document).__name__}")
    version = document.get("format")
    if type(version) is int and version > FORMAT:
        raise MachineError(
            f"{path}: bundle format {version}, written by sdrt {printable(str(document.get('sdrt')))}; this sdrt reads format {FORMAT}",
            "Upgrade sdrt, or build the bundle again with this version.",
        )
    if type(version) is not int or version != FORMAT:
        raise BundleError(f"{path}: format: expected {FORMAT}, found {printable(repr(version))}")
    try:
        manifest = _manifest(document)
        _check_values(manifest)
        return manifest
    except ValueError as error:
        raise BundleError(f"{path}: not of the expected form: {printable(str(error)[:500])}", "Build the bundle again.") from error


def _manifest(document: dict[str, Any]) -> Manifest:
    manifest: Manifest = _read(Manifest, document, "manifest")
    for name, file in manifest.files.items():
        _safe_name(name)
        if len(file.sha256) != 64 or set(file.sha256) - set("0123456789abcdef"):
            raise ValueError(f"{name}: expected a sha256, found {file.sha256!r}")
    if unknown := manifest.graphs.keys() - set(GRAPHS):
        raise ValueError(f"unknown graphs {sorted(unknown)}")
    needed = {WEIGHTS, TOKENIZER, *(f"reference/{graph}.npz" for graph in manifest.graphs)}
    needed |= {record.path for by_precision in manifest.graphs.values() for record in by_precision.values()}
    if missing := needed - manifest.files.keys():
        raise ValueError(f"{sorted(missing)} not listed under files")
    return manifest


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gave it, as the dataclass or type `kind`; ValueError where it is of another form. Every int is a count."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            found = sorted(value.keys() ^ hints.keys()) if isinstance(value, dict) else value
            raise ValueError(f"{where}: missing or unknown fields: {found!r}")
        return kind(**{name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})  # type: ignore[operator]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list) and (arguments[-1] is ... or len(value) == len(arguments)):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(_read(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if origin is UnionType:
        return None if value is None else _read(arguments[0], value, where)
    if kind is Any or (type(value) is kind and (kind is not int or value >= 0)):
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {value!r}")


def _check_values(manifest: Manifest) -> None:
    """That every number is in its range, every word known, and what is said twice said alike. ValueError otherwise; nothing later checks again."""
    diffusion, text, latents = manifest.diffusion, manifest.text, manifest.latents
    clip, unet, vae = (_part(manifest.architecture, name) for name in ("clip", "unet", "vae"))
    _known("precision", manifest.precision, PRECISIONS)
    _known("diffusion.prediction", diffusion.prediction, PREDICTIONS)
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        raise ValueError(f"diffusion: betas from {diffusion.beta_start} to {diffusion.beta_end}: expected them to rise between 0 and 1")
    _within("diffusion.num_timesteps", diffusion.num_timesteps, 2, MAX_TIMESTEPS)

    _equal("text.tokens", text.tokens, "clip.tokens", clip.get("tokens"))
    _equal("text.width", text.width, "clip.width", clip.get("width"))
    _within("text.tokens", text.tokens, 3, 1 << 10)
    _within("text.width", text.width, 1, 1 << 16)
    vocabulary = _count("clip.vocabulary", clip.get("vocabulary"))
    rows = [("text.bos", text.bos), ("text.eos", text.eos), ("text.pad", text.pad)]
    rows += [(f"text.embeddings.{trigger}", row) for trigger, several in text.embeddings.items() for row in several]
    for where, row in rows:
        _within(where, row, 0, vocabulary - 1)
    layers = _count("clip.layers", clip.get("layers"))
    if not text.clip_skip or len(set(text.clip_skip)) != len(text.clip_skip) or not all(1 <= layer <= layers for layer in text.clip_skip):
        raise ValueError(f"text.clip_skip: {list(text.clip_skip)}: expected different layers from 1 to {layers}")

    _equal("latents.channels", latents.channels, "vae.latent_channels", vae.get("latent_channels"))
    _within("latents.channels", latents.channels, 1, 1 << 10)
    levels = vae.get("channels")
    _equal(
        "latents.factor", latents.factor, "vae.channels, 2 for each after the first", 2 ** (len(levels) - 1) if isinstance(levels, list) and levels else None
    )
    if not 1 <= latents.factor <= SIZE_STEP or SIZE_STEP % latents.factor:
        raise ValueError(f"latents.factor: {latents.factor}: expected a divisor of {SIZE_STEP}")
    _equal("latents.concat_channels", latents.channels + latents.concat_channels, "unet.in_channels", unet.get("in_channels"))
    for side in latents.size:
        _within("latents.size", side, MIN_SIDE, MAX_SIDE)
        if side % SIZE_STEP:
            raise ValueError(f"latents.size: {side}: expected a multiple of {SIZE_STEP}")

    for source in manifest.sources:
        _known("sources: kind", source.kind, SOURCE_KINDS)
    for graph, by_precision in manifest.graphs.items():
        for precision, record in by_precision.items():
            where = f"graphs.{graph}.{precision}"
            _known(where, precision, PRECISIONS)
            _known(f"{where}.weights", record.weights, PRECISIONS)
            _equal(f"{where}.compute", record.compute, "its name", precision)
            _equal(f"{where}.path", record.path, "its graph", graph_path(graph, precision))
            if record.error < 0:
                raise ValueError(f"{where}.error: {record.error}: expected 0 or more")
            if graph == TEXT_ENCODER:
                _equal(f"{where}.outputs", sorted(record.outputs), "text.clip_skip", sorted(map(context_output, text.clip_skip)))


def _part(architecture: dict[str, Any], name: str) -> dict[str, Any]:
    part = architecture.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"architecture.{name}: expected an object, found {part!r}")
    return part


def _known(where: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{where}: {value!r}: expected one of {', '.join(choices)}{nearest(value, choices)}")


def _within(where: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{where}: {value}: expected {low} to {high}")


def _count(where: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"architecture.{where}: {value!r}: expected a count")
    return value


def _equal(where: str, value: object, other: str, expected: object) -> None:
    if value != expected:
        raise ValueError(f"{where}: {value!r}: expected {expected!r}, by {other}")


def _safe_name(name: str) -> str:
    """`name` if it is a plain relative path below the bundle, else ValueError."""
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and ":" not in name
    if not plain or path.is_absolute() or ".." in path.parts or str(path) != name or name in (".", MANIFEST) or path.parts[0] == ENGINES:
        raise ValueError(f"unsafe path {name!r}")
    return name


def _check_listing(path: Path, manifest: Manifest) -> None:
    found = _regular_files(path)
    for name, record in manifest.files.items():
        if name not in found:
            raise BundleError(f"{path}: {name}: missing", "Build the bundle again, or copy it again whole.")
        if found[name] != record.size_bytes:
            raise BundleError(f"{path}: {name}: expected {record.size_bytes:,} bytes, found {found[name]:,}", "Build the bundle again, or copy it again whole.")
    if extra := sorted(found.keys() - manifest.files.keys()):
        raise BundleError(f"{path}: {printable(extra[0])}: not in the manifest", "Remove it, or build the bundle again.")


def check_nothing_else(root: Path, names: Collection[str], what: str, fix: str) -> None:
    """Make sure that below `root` there are no files but the `names`, and no folders but theirs and `engines`. Hidden ones count.

    Raises:
        BundleError: there is one; it says that it is `what`, and the `fix`.
    """
    folders = {ENGINES, *(parent.as_posix() for name in names for parent in PurePosixPath(name).parents)}

    def unreadable(error: OSError) -> None:
        raise BundleError(f"{root}: {printable(str(error.filename))}: cannot be read: {error.strerror}", "Make it readable for this user.") from error

    for folder, below, files in os.walk(root, onerror=unreadable):
        for name in [*below, *files]:
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            mode = path.lstat().st_mode
            if not (relative in names and stat.S_ISREG(mode)) and not (relative in folders and stat.S_ISDIR(mode)):
                raise BundleError(f"{root}: {printable(relative)}: {what}", fix)


def _regular_files(root: Path) -> Mapping[str, int]:
    """Sizes of all files below `root` by relative name, engines, hidden files and the manifest left out. Links and special files are refused."""
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
                raise BundleError(f"{root}: {printable(relative)}: expected a regular file, found a link or special file", "Copy the bundle with real files.")
            if not (at_root and name == MANIFEST):
                sizes[relative] = status.st_size
    return sizes
