"""`sdrt build`: from the files people have to a bundle, one function per arrow."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt import __version__
from sdrt.bpe import read_bpe
from sdrt.bundle.folder import check_outside_bundles, file_record, is_bundle
from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from sdrt.bundle.manifest import (
    FORMAT,
    MAX_SIDE,
    MIN_SIDE,
    SIZE_STEP,
    TOKENIZER,
    UNET,
    WEIGHTS,
    Component,
    Diffusion,
    Graph,
    Latents,
    Manifest,
    Source,
    Text,
    graph_path,
    reference_path,
    write_manifest,
)
from sdrt.errors import ResourceError, SdrtError, UsageError
from sdrt.export.adapters import Lora, LoraOption, open_lora
from sdrt.export.architecture import Architecture
from sdrt.export.checkpoint import Checkpoint, open_checkpoint, select
from sdrt.export.embeddings import Embedding, EmbeddingOption, bundled_embeddings, check_triggers, extended_table, open_embedding, table_rows
from sdrt.export.families.table import family_named
from sdrt.export.hypernetworks import Hypernetwork, HypernetworkOption, open_hypernetwork
from sdrt.export.model_files import is_folder
from sdrt.export.peft_config import FILE_NAME as CONFIG_NAME
from sdrt.export.tensor_entry import ITEM_BYTES
from sdrt.export.tensor_file import check_present, open_tensor_file
from sdrt.export.tokenizer import write_tokenizer
from sdrt.export.weights import CODES, Change, Made, write_weights
from sdrt.lock import locked
from sdrt.publish import check_space, folders_made, new_folder, staged_folder

if TYPE_CHECKING:
    from sdrt.export.graph import Recipe


@dataclass(frozen=True)
class BuildOptions:
    """What to build. `size` is the default picture as (width, height); None takes the checkpoint's. `clip_skip` names the text-encoder layers to build, the first one being the default. `output` None names it after the inputs."""

    checkpoint: Path
    loras: tuple[LoraOption, ...] = ()
    vae: Path | None = None
    precision: str = "fp16"
    size: tuple[int, int] | None = None
    clip_skip: tuple[int, ...] = (1,)
    allow_unmatched: bool = False
    output: Path | None = None
    force: bool = False
    embeddings: tuple[EmbeddingOption, ...] = ()
    hypernetworks: tuple[HypernetworkOption, ...] = ()
    ema: bool = False


@dataclass(frozen=True)
class BuildReport:
    """What was built: the bundle's folder, its manifest, remarks for the user, seconds per stage and which graphs came from the cache."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]
    stages_s: Mapping[str, float]
    cached: tuple[str, ...]


_COMPONENTS = {TEXT_ENCODER: "text_encoder", STEP: UNET, VAE_DECODER: "vae", VAE_ENCODER: "vae"}
"""The component whose weights each graph takes."""
_GRAPH_BYTES, _REFERENCE_BYTES = 4 << 20, 4 << 20
"""Room to find before a graph in all its precisions, and its reference, is written: more than any of Stable Diffusion 1.5 takes."""
_REST_BYTES = 4 * (_GRAPH_BYTES + _REFERENCE_BYTES)
"""Room for everything but the weights, the tokenizer included."""
_NO_MEMORY = re.compile("allocate memory|not enough memory|bad.?alloc|start new thread", re.IGNORECASE)

Progress = Callable[[str, float | None], None]
"""Called with the stage's name and how much of it is done, 0 to 1, or None where that is not known."""


def build(options: BuildOptions, progress: Progress = lambda stage, done: None) -> BuildReport:
    """Build a bundle. Nothing is left behind unless it succeeds, and an existing bundle is replaced only at the very end.

    Raises:
        UsageError: the output exists, or an option is out of range.
        CheckpointError, AdapterError, InputFileError: an input is bad.
        CheckFailed: a graph does not compute what its network computes.
        ResourceError: out of disk or memory; it names the stage.
        LockedError: another build of the same output did not end in time.
    """
    output = (options.output or default_output(options)).absolute()
    _check_output(output, options)
    given = [options.checkpoint, *([options.vae] if options.vae is not None else [])]
    given += [*(o.path for o in options.loras), *(o.path for o in options.embeddings), *(o.path for o in options.hypernetworks)]
    for path in given:
        if not is_folder(path):
            check_present(path)
    stages: dict[str, float] = {}

    @contextmanager
    def stage(name: str, needed_bytes: int = 0) -> Iterator[None]:
        progress(name, None)
        if needed_bytes:
            check_space(output.parent, needed_bytes, f"{output.name}: {name}")
        started = time.perf_counter()
        try:
            yield
        except Exception as error:  # torch and ONNX Runtime say it in their own errors' texts
            if isinstance(error, SdrtError) or not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
                raise
            raise ResourceError(f"{name}: out of memory", "Close other programs, or build on a machine with more memory.") from error
        stages[name] = stages.get(name, 0.0) + time.perf_counter() - started

    with ExitStack() as files:
        files.enter_context(folders_made("--output", output.parent))
        files.enter_context(locked(output, lambda: progress("waiting for another build of the same output", None)))
        hashing = files.enter_context(ThreadPoolExecutor(1))  # entered before any file is opened: files are closed first, which ends what it does
        _check_output(output, options)
        with stage("read"):
            checkpoint = open_checkpoint(options.checkpoint, options.vae, ema=options.ema)
            files.callback(checkpoint.close)
            sources = hashing.submit(_sources, checkpoint)  # takes as long as importing torch
            arch = _with_options(checkpoint.architecture, options)
            from sdrt.export.graph import bind, is_traced, model_dimensions, recipes, skeleton  # imports torch: only after the files are known to be good
            from sdrt.export.selfcheck import check

            expected = {name: shape for recipe in recipes(arch).values() for name, shape in recipe.weight_shapes().items()}
            tensors, unknown = select(checkpoint, expected)
            loras, embeddings, hypernetworks = list[Lora](), list[Embedding](), list[Hypernetwork]()
            for option in options.loras:
                loras.append(open_lora(option, expected, arch.unet, allow_unmatched=options.allow_unmatched))
                files.callback(loras[-1].file.close)
            embeddings += bundled_embeddings(loras, arch.clip)
            for learned in options.embeddings:
                embeddings.append(open_embedding(learned, arch.clip))
                files.callback(embeddings[-1].file.close)
            for chained in options.hypernetworks:
                hypernetworks.append(open_hypernetwork(chained, arch.unet, allow_unmatched=options.allow_unmatched))
                files.callback(hypernetworks[-1].file.close)
            vocabulary, computed = arch.clip.vocabulary, dict[str, Made]()
            if embeddings:
                table = family_named(arch.family).token_table
                computed[table] = extended_table(embeddings, arch.clip, table)
                arch = replace(arch, clip=replace(arch.clip, vocabulary=computed[table].shape[0]))
            if hypernetworks:
                from sdrt.export.hypernetwork_weights import attach, check_values

                check_values(hypernetworks)
                unet, attached = attach(hypernetworks, arch.unet, expected)
                arch, computed = replace(arch, unet=unet), computed | attached
            made = recipes(arch)
            sources.result()  # all of it before the first tensor is read: a change from then on shows at the end
        with staged_folder(output, replace=options.force) as folder:
            for part in ("graphs", "tokenizer", "reference"):
                new_folder(folder / part)
            shapes = {name: tensor.shape for name, tensor in tensors.items()} | {name: value.shape for name, value in computed.items()}
            weight_bytes = sum(map(math.prod, shapes.values())) * ITEM_BYTES[CODES[options.precision]]
            with stage("tokenizer", weight_bytes + _REST_BYTES):
                bos, eos = write_tokenizer(folder / TOKENIZER, vocabulary)
                notes = check_triggers(embeddings, read_bpe(folder / TOKENIZER).encode) if embeddings else []
            with stage("fuse", weight_bytes):
                weights_file = folder / WEIGHTS
                written = write_weights(weights_file, tensors, loras, options.precision, lambda done: progress("fuse", done), computed)
                changes = written.changes
            cached = []
            # No bfloat16 graph yet: ONNX Runtime's CPU provider cannot run one, and a build ships nothing it has not checked.
            computes = ("fp32", "fp16") if options.precision == "fp16" else ("fp32",)
            for graph, recipe in made.items():
                with stage(f"{'bind' if is_traced(recipe) else 'trace'} {graph}", _GRAPH_BYTES):
                    for compute in computes:
                        model, hit = skeleton(recipe)
                        bind(model, weights_file, written.placed, options.precision, compute, folder / graph_path(graph, compute))
                        cached += [graph] if hit and compute == "fp32" else []
            graphs = {}
            with open_tensor_file(weights_file) as weights:
                for graph, recipe in made.items():
                    with stage(f"check {graph}", _REFERENCE_BYTES):
                        paths = {compute: folder / graph_path(graph, compute) for compute in computes}
                        errors = check(recipe, weights, paths, folder / reference_path(graph))
                        graphs[graph] = {compute: _graph(recipe, _COMPONENTS[graph], compute, error) for compute, error in errors.items()}
            with stage("write"):
                checkpoint.check_unchanged()
                for file in dict.fromkeys([*(a.file for a in loras), *(a.file for a in embeddings), *(a.file for a in hypernetworks)]):
                    file.check_unchanged()
                for config in [lora.config for lora in loras if lora.config is not None]:
                    config.check_unchanged()
                sizes = model_dimensions(arch)
                manifest = Manifest(
                    format=FORMAT,
                    sdrt=__version__,
                    name=output.name.removesuffix(".sdrt"),
                    family=arch.family,
                    architecture={"unet": asdict(arch.unet), "vae": asdict(arch.vae), "clip": asdict(arch.clip)},
                    diffusion=Diffusion(prediction=arch.prediction),
                    text=(Text(arch.clip.width, arch.clip.tokens, bos, eos, eos, arch.clip.clip_skip, table_rows(embeddings, vocabulary)),),
                    latents=Latents(sizes.channels, sizes.factor, arch.size, sizes.concat_channels),
                    components=dict.fromkeys(_COMPONENTS.values(), Component(options.precision, computes[-1])),
                    graphs=graphs,
                    sources=(
                        *sources.result(),
                        *(source for lora, change in zip(loras, changes, strict=True) for source in _lora_sources(lora, change)),
                        *(_embedding_source(embedding) for embedding in embeddings),
                        *(_hypernetwork_source(hypernetwork) for hypernetwork in hypernetworks),
                    ),
                    tools=_tools(),
                    files={
                        path.relative_to(folder).as_posix(): written.record if path == weights_file else file_record(path)
                        for path in sorted(folder.rglob("*"))
                        if path.is_file()
                    },
                )
                write_manifest(folder, manifest)
    remarks = (*checkpoint.notes, *_notes(unknown, loras, changes), *notes, *_hypernetwork_notes(hypernetworks))
    return BuildReport(output, manifest, remarks, stages, tuple(cached))


def default_output(options: BuildOptions) -> Path:
    """`emoji+blindbox.sdrt` in the working folder, from the stems of the checkpoint and the adapters."""
    checkpoint = options.checkpoint.absolute().name if is_folder(options.checkpoint) else options.checkpoint.stem  # a folder's name may hold a dot
    adapters = [*(o.path for o in options.loras), *(o.path for o in options.embeddings), *(o.path for o in options.hypernetworks)]
    return Path("+".join([checkpoint, *(path.stem for path in adapters)]) + ".sdrt")


def _check_output(output: Path, options: BuildOptions) -> None:
    if options.precision not in CODES:
        raise UsageError(f"precision {options.precision!r}: unknown", f"Choose one of: {', '.join(CODES)}.")
    if not output.name:
        raise UsageError(f"{output}: expected the name of a new folder", "Choose another --output.")
    check_outside_bundles("--output", output.parent)
    if os.path.lexists(output):
        if not options.force:
            raise UsageError(f"{output}: exists already", "Choose another --output, or pass --force to replace the bundle.")
        if output.is_symlink() or not is_bundle(output):
            raise UsageError(f"{output}: exists and is not a bundle; --force replaces bundles only", "Choose another --output.")


def _with_options(arch: Architecture, options: BuildOptions) -> Architecture:
    width, height = options.size or arch.size
    for side in (width, height):
        if side % SIZE_STEP or not MIN_SIDE <= side <= MAX_SIDE:
            raise UsageError(f"size {width}x{height}: expected multiples of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}")
    for layer in options.clip_skip:
        if not 1 <= layer <= arch.clip.layers:
            raise UsageError(f"clip skip {layer}: this text encoder has {arch.clip.layers} layers", f"Choose 1 to {arch.clip.layers}.")
    if not options.clip_skip or len(set(options.clip_skip)) != len(options.clip_skip):
        raise UsageError(f"clip skip {', '.join(map(str, options.clip_skip))}: expected each layer once", "Leave out the repeated one.")
    return replace(arch, size=(width, height), clip=replace(arch.clip, clip_skip=options.clip_skip))


def _sources(checkpoint: Checkpoint) -> list[Source]:
    sources = [Source("checkpoint", checkpoint.model.name, checkpoint.model.sha256())]
    if checkpoint.vae is not None:
        sources.append(Source("vae", checkpoint.vae.name, checkpoint.vae.sha256()))
    return sources


def _lora_sources(lora: Lora, changes: Mapping[str, Change]) -> Iterator[Source]:
    yield Source(
        kind="lora",
        name=lora.option.path.name,
        sha256=lora.sha256,
        scale=lora.option.scale,
        te_scale=lora.option.te_scale,
        applied={component: change.modules for component, change in changes.items()},
        relative_change={component: float(f"{change.relative:.4g}") for component, change in changes.items()},
    )
    if lora.config_sha256 is not None:
        yield Source("lora-config", CONFIG_NAME, lora.config_sha256)


def _embedding_source(embedding: Embedding) -> Source:
    option, applied = embedding.option, {"text_encoder": embedding.vectors}
    return Source("embedding", option.path.name, embedding.sha256, applied=applied, trigger=option.trigger)


def _hypernetwork_source(hypernetwork: Hypernetwork) -> Source:
    option = hypernetwork.option
    return Source("hypernetwork", option.path.name, hypernetwork.sha256, option.scale, applied={"unet": hypernetwork.layers} if option.scale != 0 else {})


def _graph(recipe: Recipe, component: str, compute: str, error: float) -> Graph:
    signature = recipe.signature
    return Graph(graph_path(recipe.graph, compute), component, tuple(signature.inputs), tuple(signature.outputs), float(f"{error:.1e}"))


def _tools() -> dict[str, str]:
    tools = {"python": platform.python_version()}
    for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
        try:
            tools[package] = version(package)
        except PackageNotFoundError:
            continue
    return tools


def _notes(unknown: Sequence[str], loras: Sequence[Lora], changes: Sequence[Mapping[str, Change]]) -> Iterator[str]:
    if unknown:
        yield f"{len(unknown)} tensors of the checkpoint are not used, such as {unknown[0]}"
    for lora, change in zip(loras, changes, strict=True):
        if not change:
            yield f"{lora.option.path.name}: scale 0, nothing changed"
        if lora.sha256 in [other.sha256 for other in loras if other is not lora]:
            yield f"{lora.option.path.name}: given more than once; its changes add up"
        yield from (f"{lora.option.path.name}: {note}" for note in lora.notes)
        if lora.unmatched:
            yield f"{lora.option.path.name}: {len(lora.unmatched)} keys belong to no module and were left out, such as {lora.unmatched[0]}"


def _hypernetwork_notes(hypernetworks: Sequence[Hypernetwork]) -> Iterator[str]:
    for hypernetwork in hypernetworks:
        name = hypernetwork.option.path.name
        if hypernetwork.option.scale == 0:
            yield f"{name}: scale 0, nothing changed"
        if hypernetwork.unmatched:
            widths = ", ".join(str(width) for width in hypernetwork.unmatched)
            yield f"{name}: its networks for contexts {widths} wide belong to no attention layer of this model and were left out"
