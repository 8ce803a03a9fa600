"""`sdrt build`: from the files people have to a bundle, one function per arrow."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdrt import __version__
from sdrt.bundle.bpe import read_bpe
from sdrt.bundle.folder import check_outside_bundles, file_record, is_bundle
from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from sdrt.bundle.manifest import (
    FORMAT,
    MAX_SIDE,
    MIN_SIDE,
    NETWORK,
    OPERATORS,
    SIZE_STEP,
    TOKENIZER,
    UNET,
    WEIGHTS,
    Component,
    Diffusion,
    FileRecord,
    Graph,
    Latents,
    Manifest,
    Source,
    Text,
    graph_path,
    reference_path,
    write_manifest,
)
from sdrt.bundle.onnx_graph import read_graph
from sdrt.errors import CheckFailed, ResourceError, SdrtError, UsageError, nearest
from sdrt.export.adapters.embedding import (
    Embedding,
    EmbeddingOption,
    bundled_embeddings,
    check_triggers,
    extended_tables,
    open_embedding,
    table_rows,
)
from sdrt.export.adapters.hypernetwork import Hypernetwork, HypernetworkOption, open_hypernetwork
from sdrt.export.adapters.match import Lora, LoraOption, open_lora
from sdrt.export.adapters.settings import FILE_NAME as CONFIG_NAME
from sdrt.export.architecture import Architecture
from sdrt.export.families.table import family_named
from sdrt.export.graph import Recipe, bind, model_dimensions, recipes
from sdrt.export.read.checkpoint import Checkpoint, Tensor, open_checkpoint, select
from sdrt.export.read.model_files import is_folder
from sdrt.export.read.tensor_entry import ITEM_BYTES
from sdrt.export.read.tensor_file import check_present, open_tensor_file
from sdrt.export.selfcheck import check
from sdrt.export.skeletons import at_hand, skeletons, weight_shapes
from sdrt.export.tokenizer import write_tokenizer
from sdrt.export.traces import NoTraceError
from sdrt.export.weights import CODES, Change, Made, Written, write_weights
from sdrt.files.lock import locked
from sdrt.files.publish import check_space, folders_made, new_folder, staged_folder


@dataclass(frozen=True)
class BuildOptions:
    """What to build. `size` is the default picture as (width, height); None takes the checkpoint's. `clip_skip` names
    the text-encoder layers to build, the first one being the default. `output` None names it after the inputs.

    prediction, zero_snr: what the UNet predicts, and whether its last timestep has no signal left, in place of what the
        checkpoint says. The prediction is "eps", "v" or "x0".
    vae_precision: what the VAE computes in on a GPU: fp32 or `precision`. None takes fp32 where the family's VAE
        overflows in float16, else `precision`.
    check: quick, or full, which compares every graph with its network through torch.
    """

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
    prediction: str | None = None
    zero_snr: bool | None = None
    vae_precision: str | None = None
    check: str = "quick"


@dataclass(frozen=True)
class BuildReport:
    """What was built: the bundle's folder, its manifest, remarks for the user, seconds per stage and which graphs came
    from the cache.
    """

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]
    stages_s: Mapping[str, float]
    cached: tuple[str, ...]


PREDICTIONS = ("eps", "v", "x0")
"""The words of `--prediction`."""
CHECKS = ("quick", "full")
"""The words of `--check`."""
_VAE = "vae"
_COMPONENTS = {TEXT_ENCODER: "text_encoder", STEP: UNET, VAE_DECODER: _VAE, VAE_ENCODER: _VAE}
"""The component whose weights each graph takes."""
_GRAPH_BYTES, _REFERENCE_BYTES = 4 << 20, 4 << 20
"""Room to find before a graph in all its precisions, and its reference, is written: more than any of Stable Diffusion
1.5 takes.
"""
_REST_BYTES = 4 * (_GRAPH_BYTES + _REFERENCE_BYTES)
"""Room for everything but the weights, the tokenizer included."""
_NO_MEMORY = re.compile("allocate memory|not enough memory|bad.?alloc|start new thread", re.IGNORECASE)

Progress = Callable[[str, float | None], None]
"""Called with the stage's name and how much of it is done, 0 to 1, or None where that is not known."""

Stage = Callable[..., AbstractContextManager[None]]
"""Called with a stage's name and the bytes it needs on disk: what it does is timed, and reported as that stage's."""


@dataclass(frozen=True)
class _Inputs:
    """The files, open and found to belong together, each list in the order given. `arch` is the checkpoint's own with
    the options applied, `expected` the shapes of its graphs' weights, `unknown` tensors that no network has. `sources`
    are the checkpoint's and the VAE's records, once their files are hashed.
    """

    checkpoint: Checkpoint
    sources: Future[list[Source]]
    arch: Architecture
    expected: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor]
    unknown: Sequence[str]
    loras: Sequence[Lora]
    embeddings: Sequence[Embedding]
    hypernetworks: Sequence[Hypernetwork]


@dataclass(frozen=True)
class _Model:
    """What the bundle will hold: the architecture with all adapters in it, its graphs' recipes, the arithmetic of its
    components, tensors that are computed in place of or beside the checkpoint's, and the size of all weights.
    """

    arch: Architecture
    recipes: Mapping[str, Recipe]
    components: Mapping[str, Component]
    computed: Mapping[str, Made]
    weights_bytes: int

    def computes(self, graph: str) -> tuple[str, ...]:
        """The arithmetics in which a graph is written: float32, and what its component computes in on a GPU."""
        return tuple(dict.fromkeys(("fp32", self.components[_COMPONENTS[graph]].compute)))


@dataclass(frozen=True)
class _Tokenizer:
    """The numbers of the first and the last token, and remarks on the embeddings' triggers."""

    bos: int
    eos: int
    notes: Sequence[str]


@dataclass(frozen=True)
class _Contents:
    """What the stages have written into the folder of the bundle."""

    folder: Path
    tokenizer: _Tokenizer
    weights: Written
    graphs: Mapping[str, dict[str, Graph]]


def build(options: BuildOptions, progress: Progress = lambda stage, done: None) -> BuildReport:
    """Build a bundle. Nothing is left behind unless it succeeds, and an existing bundle is replaced only at the very
    end.

    Raises:
        UsageError: the output exists, or an option is out of range.
        CheckpointError, AdapterError, InputFileError: an input is bad.
        CheckFailed: a graph does not compute what its network computes.
        ResourceError: out of disk or memory; it names the stage.
        LockedError: another build of the same output did not end in time.
    """
    output = (options.output or default_output(options)).absolute()
    _check_output(output, options)
    _check_inputs(options)
    stages_s: dict[str, float] = {}
    stage = _stages(output, progress, stages_s)
    with ExitStack() as files:
        files.enter_context(folders_made("--output", output.parent))
        files.enter_context(locked(output, lambda: progress("waiting for another build of the same output", None)))
        # Entered before any file is opened: files are closed first, which ends what it does.
        hashing = files.enter_context(ThreadPoolExecutor(1))
        _check_output(output, options)
        with stage("read"):
            inputs = _read(options, files, hashing)
            model = _combine(inputs, options)
            if not inputs.checkpoint.changes_show:
                inputs.sources.result()  # before the first tensor is read, so that a change shows in a second hash
        with staged_folder(output, replace=options.force) as folder:
            for part in ("graphs", "tokenizer", "reference"):
                new_folder(folder / part)
            tokenizer = _write_tokenizer(inputs, model, folder, stage)
            weights = _fuse(inputs, model, folder, options.precision, stage, progress)
            cached = _bind(model, weights, folder, options.precision, stage)
            graphs = _check(model, weights, folder, stage, hashing, full=options.check == "full")
            contents = _Contents(folder, tokenizer, weights, graphs)
            with stage("write"):
                _check_unchanged(inputs)
                manifest = _manifest(output.name.removesuffix(".sdrt"), inputs, model, contents)
                write_manifest(folder, manifest)
    notes = (
        *inputs.checkpoint.notes,
        *_notes(inputs, weights.changes),
        *tokenizer.notes,
        *_hypernetwork_notes(inputs),
    )
    return BuildReport(output, manifest, notes, stages_s, cached)


def _stages(output: Path, progress: Progress, seconds: dict[str, float]) -> Stage:
    """A function that opens a stage and adds the seconds it took to `seconds`."""

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
            raise ResourceError(
                f"{name}: out of memory", "Close other programs, or build on a machine with more memory."
            ) from error
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return stage


def _read(options: BuildOptions, files: ExitStack, hashing: ThreadPoolExecutor) -> _Inputs:
    """Open every file and match it with the model. `files` closes them; `hashing` hashes the model's meanwhile."""
    checkpoint = open_checkpoint(
        options.checkpoint, options.vae, ema=options.ema, prediction=options.prediction, zero_snr=options.zero_snr
    )
    files.callback(checkpoint.close)
    sources = hashing.submit(_sources, checkpoint)  # takes as long as fusing
    arch = _with_options(checkpoint.architecture, options)
    try:
        expected = weight_shapes(arch)
    except NoTraceError as error:
        raise NoTraceError(f"{options.checkpoint}: {error.message}", error.fix) from None
    tensors, unknown = select(checkpoint, expected)
    loras, embeddings, hypernetworks = list[Lora](), list[Embedding](), list[Hypernetwork]()
    for option in options.loras:
        loras.append(open_lora(option, expected, arch, allow_unmatched=options.allow_unmatched))
        files.callback(loras[-1].file.close)
    arch = _as_told(arch, loras, options)
    embeddings += bundled_embeddings(loras, arch)
    for learned in options.embeddings:
        embeddings.append(open_embedding(learned, arch))
        files.callback(embeddings[-1].file.close)
    for chained in options.hypernetworks:
        hypernetworks.append(open_hypernetwork(chained, arch.unet, allow_unmatched=options.allow_unmatched))
        files.callback(hypernetworks[-1].file.close)
    return _Inputs(checkpoint, sources, arch, expected, tensors, unknown, loras, embeddings, hypernetworks)


def _as_told(arch: Architecture, loras: Sequence[Lora], options: BuildOptions) -> Architecture:
    """The model with the prediction that a LoRA says it has after it. An option goes before what files say."""
    if options.prediction is None and any(lora.predicts_v for lora in loras):
        arch = replace(arch, prediction="v")
    if options.zero_snr is None and arch.prediction == "v" and any(lora.zero_snr for lora in loras):
        arch = replace(arch, zero_snr=True)
    return arch


def _combine(inputs: _Inputs, options: BuildOptions) -> _Model:
    """Put embeddings and hypernetworks into the model. LoRAs change no shape; they are fused as weights are written."""
    arch, computed = inputs.arch, dict[str, Made]()
    if inputs.embeddings:
        arch, computed = extended_tables(inputs.embeddings, arch)
    if inputs.hypernetworks:
        from sdrt.export.adapters.hypernetwork_weights import attach, check_values

        check_values(inputs.hypernetworks)
        unet, attached = attach(inputs.hypernetworks, arch.unet, inputs.expected)
        arch, computed = replace(arch, unet=unet), computed | attached
    shapes = {name: tensor.shape for name, tensor in inputs.tensors.items()} | {
        name: value.shape for name, value in computed.items()
    }
    precision = options.precision
    size_bytes = sum(map(math.prod, shapes.values())) * ITEM_BYTES[CODES[precision]]
    components = dict.fromkeys(_COMPONENTS.values(), Component(precision, _compute(precision)))
    if options.vae_precision == "fp32" or (options.vae_precision is None and family_named(arch.family).vae_overflows):
        components[_VAE] = Component(precision, "fp32")
    return _Model(arch, recipes(arch), components, computed, size_bytes)


def _write_tokenizer(inputs: _Inputs, model: _Model, folder: Path, stage: Stage) -> _Tokenizer:
    with stage("tokenizer", model.weights_bytes + _REST_BYTES):
        path = folder / TOKENIZER
        bos, eos = write_tokenizer(path, inputs.arch.texts[0].vocabulary)
        notes = check_triggers(inputs.embeddings, read_bpe(path).encode) if inputs.embeddings else []
        return _Tokenizer(bos, eos, notes)


def _fuse(inputs: _Inputs, model: _Model, folder: Path, precision: str, stage: Stage, progress: Progress) -> Written:
    with stage("fuse", model.weights_bytes):
        done = lambda part: progress("fuse", part)  # noqa: E731
        return write_weights(folder / WEIGHTS, inputs.tensors, inputs.loras, precision, done, model.computed)


def _compute(precision: str) -> str:
    """What a component computes in on a GPU whose weights are stored in that type.

    No bfloat16 graph yet: ONNX Runtime's CPU provider cannot run one, and a build ships nothing it has not checked.
    """
    return "fp16" if precision == "fp16" else "fp32"


def _bind(model: _Model, weights: Written, folder: Path, precision: str, stage: Stage) -> tuple[str, ...]:
    """Trace each network, or take its trace from the cache, and write its graphs onto the weights. Returns the graphs
    that the cache had.
    """
    cached = list[str]()
    for graph, recipe in model.recipes.items():
        with stage(f"{'bind' if at_hand(recipe) else 'trace'} {graph}", _GRAPH_BYTES):
            by_type, hit = skeletons(recipe)
            for compute in model.computes(graph):
                bound = read_graph(by_type[compute])
                bind(bound, folder / WEIGHTS, weights.placed, precision, folder / graph_path(graph, compute))
            cached += [graph] if hit else []
    return tuple(cached)


def _check(
    model: _Model, written: Written, folder: Path, stage: Stage, hashing: ThreadPoolExecutor, *, full: bool
) -> dict[str, dict[str, Graph]]:
    """Check the weights file and each graph, and keep what it was given and gave. Returns the manifest's graphs.

    A trace that comes with sdrt was compared with its network before. Any other is compared here, as all are if `full`.
    """
    graphs = {}
    with open_tensor_file(folder / WEIGHTS) as weights:
        stored = hashing.submit(weights.sha256)  # closing the file ends it
        for graph, recipe in model.recipes.items():
            with stage(f"check {graph}", _REFERENCE_BYTES):
                paths = {compute: folder / graph_path(graph, compute) for compute in model.computes(graph)}
                network = full or not recipe.is_shipped()
                kept = folder / reference_path(graph)
                errors = check(recipe, skeletons(recipe)[0], weights, paths, kept, full=network)
                checked = NETWORK if network else OPERATORS
                graphs[graph] = {name: _graph(recipe, name, error, checked) for name, error in errors.items()}
        if stored.result() != written.record.sha256:
            raise CheckFailed(f"self-check: {weights.path}: is not what was written", "Check the disk; build again.")
    return graphs


def _check_unchanged(inputs: _Inputs) -> None:
    """Refuse files that changed while they were read."""
    inputs.sources.result()
    inputs.checkpoint.check_unchanged()
    files = (
        *(lora.file for lora in inputs.loras),
        *(embedding.file for embedding in inputs.embeddings),
        *(hypernetwork.file for hypernetwork in inputs.hypernetworks),
    )
    for file in dict.fromkeys(files):
        file.check_unchanged()
    for lora in inputs.loras:
        if lora.config is not None:
            lora.config.check_unchanged()


def _manifest(name: str, inputs: _Inputs, model: _Model, contents: _Contents) -> Manifest:
    """The manifest of a bundle whose other files are all written."""
    arch, sizes, tokenizer = model.arch, model_dimensions(model.arch), contents.tokenizer
    rows, eos = table_rows(inputs.embeddings, inputs.arch.texts[0].vocabulary), tokenizer.eos
    return Manifest(
        format=FORMAT,
        sdrt=__version__,
        name=name,
        family=arch.family,
        architecture={
            "unet": asdict(arch.unet),
            "vae": asdict(arch.vae),
            "texts": [asdict(text) for text in arch.texts],
        },
        diffusion=_diffusion(arch),
        text=tuple(
            Text(
                text.width,
                text.tokens,
                tokenizer.bos,
                eos,
                text.pad,
                text.clip_skip,
                rows,
                last_layer=arch.last_layer,
                zero_empty=arch.zero_empty,
            )
            for text in arch.texts
        ),
        vector=arch.vector,
        latents=Latents(sizes.channels, sizes.factor, arch.size, sizes.concat_channels, arch.concat_scale),
        components=dict(model.components),
        graphs=dict(contents.graphs),
        sources=_all_sources(inputs, contents.weights.changes),
        tools=_tools(
            any(graph.checked == NETWORK for by_type in contents.graphs.values() for graph in by_type.values())
        ),
        files=_files(contents),
    )


def _files(contents: _Contents) -> dict[str, FileRecord]:
    folder = contents.folder
    return {
        path.relative_to(folder).as_posix(): contents.weights.record if path == folder / WEIGHTS else file_record(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _diffusion(arch: Architecture) -> Diffusion:
    lowest, highest = arch.sigmas or (None, None)
    return Diffusion(
        prediction=arch.prediction,
        zero_snr=arch.zero_snr,
        sigma_min=lowest,
        sigma_max=highest,
        sigma_data=arch.sigma_data,
        told_guidance=arch.unet.guidance_width > 0,
    )


def default_output(options: BuildOptions) -> Path:
    """`emoji+blindbox.sdrt` in the working folder, from the stems of the checkpoint and the adapters."""
    checkpoint = (
        options.checkpoint.absolute().name if is_folder(options.checkpoint) else options.checkpoint.stem
    )  # a folder's name may hold a dot
    return Path("+".join([checkpoint, *(path.stem for path in _adapters(options))]) + ".sdrt")


def _adapters(options: BuildOptions) -> list[Path]:
    loras, embeddings = [o.path for o in options.loras], [o.path for o in options.embeddings]
    return [*loras, *embeddings, *(o.path for o in options.hypernetworks)]


def _check_inputs(options: BuildOptions) -> None:
    """Refuse a file that is not there, before anything is opened."""
    for path in [options.checkpoint, *([options.vae] if options.vae is not None else []), *_adapters(options)]:
        if not is_folder(path):
            check_present(path)


def _check_output(output: Path, options: BuildOptions) -> None:
    if options.precision not in CODES:
        raise UsageError(f"precision {options.precision!r}: unknown", f"Choose one of: {', '.join(CODES)}.")
    if options.prediction is not None and options.prediction not in PREDICTIONS:
        raise UsageError(
            f"prediction {options.prediction!r}: unknown{nearest(options.prediction, PREDICTIONS)}",
            f"Choose one of: {', '.join(PREDICTIONS)}.",
        )
    if options.check not in CHECKS:
        raise UsageError(
            f"check {options.check!r}: unknown{nearest(options.check, CHECKS)}", f"Choose one of: {', '.join(CHECKS)}."
        )
    if options.vae_precision not in (None, "fp32", options.precision):
        raise UsageError(
            f"VAE precision {options.vae_precision!r}: expected fp32, or {options.precision} as the weights are stored",
            "Choose one of these, or another --precision.",
        )
    if not output.name:
        raise UsageError(f"{output}: expected the name of a new folder", "Choose another --output.")
    check_outside_bundles("--output", output.parent)
    if os.path.lexists(output):
        if not options.force:
            raise UsageError(
                f"{output}: exists already", "Choose another --output, or pass --force to replace the bundle."
            )
        if output.is_symlink() or not is_bundle(output):
            raise UsageError(
                f"{output}: exists and is not a bundle; --force replaces bundles only", "Choose another --output."
            )


def _with_options(arch: Architecture, options: BuildOptions) -> Architecture:
    width, height = options.size or arch.size
    for side in (width, height):
        if side % SIZE_STEP or not MIN_SIDE <= side <= MAX_SIDE:
            raise UsageError(f"size {width}x{height}: expected multiples of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}")
    layers = min(text.layers for text in arch.texts)
    for layer in options.clip_skip:
        if not 1 <= layer <= layers:
            raise UsageError(f"clip skip {layer}: this text encoder has {layers} layers", f"Choose 1 to {layers}.")
    if not options.clip_skip or len(set(options.clip_skip)) != len(options.clip_skip):
        raise UsageError(
            f"clip skip {', '.join(map(str, options.clip_skip))}: expected each layer once",
            "Leave out the repeated one.",
        )
    clip_skip = tuple(dict.fromkeys(max(layer, arch.last_layer) for layer in options.clip_skip))
    texts = tuple(replace(text, clip_skip=clip_skip) for text in arch.texts)
    return replace(
        arch,
        size=(width, height),
        texts=texts,
    )


def _sources(checkpoint: Checkpoint) -> list[Source]:
    sources = [Source("checkpoint", checkpoint.model.name, checkpoint.model.sha256())]
    if checkpoint.vae is not None:
        sources.append(Source("vae", checkpoint.vae.name, checkpoint.vae.sha256()))
    return sources


def _all_sources(inputs: _Inputs, changes: Sequence[Mapping[str, Change]]) -> tuple[Source, ...]:
    return (
        *inputs.sources.result(),
        *(s for lora, change in zip(inputs.loras, changes, strict=True) for s in _lora_sources(lora, change)),
        *(_embedding_source(embedding) for embedding in inputs.embeddings),
        *(_hypernetwork_source(hypernetwork) for hypernetwork in inputs.hypernetworks),
    )


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
    return Source(
        "hypernetwork",
        option.path.name,
        hypernetwork.sha256,
        option.scale,
        applied={"unet": hypernetwork.layers} if option.scale != 0 else {},
    )


def _graph(recipe: Recipe, compute: str, error: float, checked: str) -> Graph:
    signature = recipe.signature
    return Graph(
        graph_path(recipe.graph, compute),
        _COMPONENTS[recipe.graph],
        tuple(signature.inputs),
        tuple(signature.outputs),
        float(f"{error:.1e}"),
        checked,
    )


def _tools(torch_ran: bool) -> dict[str, str]:
    tools = {"python": platform.python_version(), "numpy": version("numpy")}
    for package in (*(("torch", "onnx", "onnxscript") if torch_ran else ()), "onnxruntime"):
        try:
            tools[package] = version(package)
        except PackageNotFoundError:
            continue
    return tools


def _notes(inputs: _Inputs, changes: Sequence[Mapping[str, Change]]) -> Iterator[str]:
    loras, unknown = inputs.loras, inputs.unknown
    if unknown:
        yield f"{len(unknown)} tensors of the checkpoint are not used, such as {unknown[0]}"
    for lora, change in zip(loras, changes, strict=True):
        if not change:
            reason = "scale 0" if lora.deltas else "changes only layers that no output of the text encoders needs"
            yield f"{lora.option.path.name}: {reason}, nothing changed"
        if lora.sha256 in [other.sha256 for other in loras if other is not lora]:
            yield f"{lora.option.path.name}: given more than once; its changes add up"
        yield from (f"{lora.option.path.name}: {note}" for note in lora.notes)
        if lora.unmatched:
            yield (
                f"{lora.option.path.name}: {len(lora.unmatched)} keys belong to no module and were left out, such as"
                f" {lora.unmatched[0]}"
            )


def _hypernetwork_notes(inputs: _Inputs) -> Iterator[str]:
    for hypernetwork in inputs.hypernetworks:
        name = hypernetwork.option.path.name
        if hypernetwork.option.scale == 0:
            yield f"{name}: scale 0, nothing changed"
        if hypernetwork.unmatched:
            widths = ", ".join(str(width) for width in hypernetwork.unmatched)
            yield (
                f"{name}: its networks for contexts {widths} wide belong to no attention layer of this model and were"
                " left out"
            )
