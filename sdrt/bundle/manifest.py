"""The content of `manifest.json`: its dataclasses, the strict reader and the writer. docs/manifest.md states every
field.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sdrt.errors import BundleError, MachineError, nearest, printable
from sdrt.files.publish import write_file
from sdrt.files.read import read_document, strict_json

FORMAT = 2
MANIFEST = "manifest.json"
WEIGHTS = "graphs/weights.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"
ENGINES = "engines"
MAX_MANIFEST_BYTES = 16 << 20

SIZE_STEP = 8
"""Picture sides are multiples of this."""
MIN_SIDE, MAX_SIDE = 64, 8192
MAX_BATCH = 64
"""Most pictures of one model call."""
MAX_CHUNKS = 32
"""Most chunks of one prompt: 32 chunks of 75 tokens are 2,400 tokens, about 1,700 English words."""
MAX_BRANCHES = 16
"""Most guidance branches of one picture: the negative prompt and 15 parts between `AND`s."""

PRECISIONS = ("fp32", "fp16", "bf16")
PREDICTIONS = ("epsilon", "v", "edm", "x0")
"""What a network may predict: the noise, v of Salimans and Ho 2022 ("Progressive Distillation"), F of Karras et al.
2022 ("Elucidating the Design Space"), table 1, or the image without noise.
"""
SOURCE_KINDS = ("checkpoint", "vae", "lora", "lora-config", "embedding", "hypernetwork")
MAX_TIMESTEPS = 10_000
MAX_SIGMA = 1e5
MAX_VECTOR = 1 << 14
SIZES = 6
"""How many sizes a network is told, if any: original height and width, top and left of the crop, target height and
width.
"""


def graph_path(graph: str, compute: str) -> str:
    """Where a graph lies in the bundle: beside the weights, because external data may not leave the folder of its
    graph.
    """
    return f"graphs/{graph}.{compute}.onnx"


def reference_path(graph: str) -> str:
    """Where the small inputs and outputs lie that verify a graph."""
    return f"reference/{graph}.npz"


@dataclass(frozen=True)
class FileRecord:
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Diffusion:
    """What the network predicts, and the noise schedule of its training: `num_timesteps` betas, linear in their square
    roots.

    zero_snr: the last timestep was trained with no signal left.
    sigma_min, sigma_max: both are set for a network trained on every level between them (EDM, Karras et al. 2022). Its
        timestep is ln(sigma) / 4, and `sigma_data` is the deviation of its data.
    told_guidance: the network is told the guidance scale, which takes the place of guidance.
    """

    prediction: str = "epsilon"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_timesteps: int = 1000
    zero_snr: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigma_data: float = 1.0
    told_guidance: bool = False


@dataclass(frozen=True)
class Text:
    """A text encoder.

    width: numbers per token.
    tokens: tokens per chunk, with start and end.
    bos, eos, pad: the ids of the start, end and padding tokens.
    clip_skip: the layers that are outputs, counted from the last layer; the first entry is the default.
    last_layer: the latest layer that contexts of this family come from. A request for a later one takes this one.
    embeddings: for the trigger of each learned embedding the rows of the token table that stand for it, in order.
    tokenizer: its file in the bundle.
    zero_empty: an empty negative prompt is zeros, not what the encoder makes of it. docs/compatibility.md says what
        counts as empty.
    """

    width: int
    tokens: int
    bos: int
    eos: int
    pad: int
    clip_skip: tuple[int, ...] = (1,)
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokenizer: str = TOKENIZER
    last_layer: int = 1
    zero_empty: bool = False


@dataclass(frozen=True)
class Vector:
    """What the network is told beside timestep and context, as one vector: `pooled` numbers of the last text encoder,
    then `sizes` sizes in pixels of `size_width` numbers each. All 0 where it is told nothing.

    The sizes are those of `SIZES`, in that order (Podell et al. 2023, section 2.2).
    """

    pooled: int = 0
    sizes: int = 0
    size_width: int = 0

    @property
    def numbers(self) -> int:
        return self.pooled + self.sizes * self.size_width


NO_VECTOR = Vector()


@dataclass(frozen=True)
class Latents:
    """`factor` is pixels a side per latent. `size` is the default picture as (width, height) in pixels.

    `concat_channels` counts the channels that the UNet sees beside the latents: 5 (mask and masked image) for
    inpainting models, 4 (the image to edit) for edit models, else 0. `concat_scale` multiplies the latents among them.
    """

    channels: int
    factor: int
    size: tuple[int, int]
    concat_channels: int = 0
    concat_scale: float = 1.0

    @property
    def edits(self) -> bool:
        """Whether the UNet sees the image to edit beside the latents."""
        return self.concat_channels == self.channels


@dataclass(frozen=True)
class Source:
    """A file that went into the bundle. `kind` is checkpoint, vae, lora, embedding or hypernetwork. `trigger` is set
    for an embedding.

    `applied` counts, per component, the modules that the file changed. For an embedding it counts vectors, for a
    hypernetwork attention layers.
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
class Component:
    """A network of the model. `storage` is the type its weights are stored in. `compute` is the type it should run in
    on a GPU.
    """

    storage: str = "fp32"
    compute: str = "fp32"


@dataclass(frozen=True)
class Graph:
    """One graph in one arithmetic. `component` holds its weights.

    `error` is the largest relative error that the build measured. `checked` says against what: NETWORK, the traced
    network in float32, or OPERATORS, its operators with weights one by one, each evaluated again in numpy.
    """

    path: str
    component: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    error: float = 0.0
    checked: str = "network"


NETWORK, OPERATORS = CHECKED = ("network", "operators")
"""What the error of a graph was measured against."""
UNET = "unet"
"""The component that denoises."""


@dataclass(frozen=True)
class Manifest:
    """`graphs` holds every graph, by name and by arithmetic. A reader runs the graphs it knows."""

    format: int
    sdrt: str
    name: str
    family: str
    architecture: dict[str, Any]
    text: tuple[Text, ...]
    latents: Latents
    components: dict[str, Component]
    graphs: dict[str, dict[str, Graph]]
    files: dict[str, FileRecord]
    diffusion: Diffusion = Diffusion()
    vector: Vector = NO_VECTOR
    sources: tuple[Source, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """The type in which the denoising network's weights are stored."""
        return self.components[UNET].storage

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, the same for all text encoders."""
        return self.text[0].tokens

    @property
    def context_width(self) -> int:
        """Numbers per token in the context. The outputs of several text encoders lie side by side."""
        return sum(text.width for text in self.text)

    @property
    def branches(self) -> int:
        """Guidance branches of a picture that chooses nothing: a prompt and a negative one; for an edit model also the
        negative one without the image; the prompt alone for a network that is told the guidance scale.
        """
        return 1 if self.diffusion.told_guidance else 3 if self.latents.edits else 2

    @property
    def clip_skip(self) -> tuple[int, ...]:
        """Text-encoder layers in the bundle, the default first."""
        return self.text[0].clip_skip


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`. This is the last file of a bundle. Keys are sorted, so equal manifests have
    equal bytes.
    """
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False)
    # A lone surrogate comes from a file name that is not Unicode. It becomes the JSON escape it was.
    write_file(folder / MANIFEST, (text + "\n").encode("utf-8", errors="backslashreplace"))


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest at `path`. The file is untrusted input.

    Raises:
        InputFileError: the file cannot be read.
        MachineError: the file has another format: an older or newer sdrt wrote it.
        BundleError: the content is no valid manifest.
    """
    data = read_document(path, MAX_MANIFEST_BYTES, "Make it readable for this user.").data
    try:
        document = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not valid JSON: {printable(str(error))}", "Build the bundle again.") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path}: expected a JSON object, found {type(document).__name__}")
    version = document.get("format")
    if type(version) is int and version > 0 and version != FORMAT:
        again = "Build the bundle again with this version of sdrt."
        raise MachineError(
            f"{path}: bundle format {version}, written by sdrt {printable(str(document.get('sdrt')))}; this sdrt reads"
            f" format {FORMAT}",
            again if version < FORMAT else f"Upgrade sdrt. {again}",
        )
    if type(version) is not int or version != FORMAT:
        raise BundleError(f"{path}: format: expected {FORMAT}, found {printable(repr(version))}")
    try:
        manifest = _manifest(document)
        _check_values(manifest)
        return manifest
    except ValueError as error:
        raise BundleError(
            f"{path}: not of the expected form: {printable(str(error)[:500])}", "Build the bundle again."
        ) from error


def _manifest(document: dict[str, Any]) -> Manifest:
    manifest: Manifest = _read(Manifest, document, "manifest")
    for name, file in manifest.files.items():
        _safe_name(name)
        if len(file.sha256) != 64 or set(file.sha256) - set("0123456789abcdef"):
            raise ValueError(f"{name}: expected a sha256, found {file.sha256!r}")
    if not manifest.text:
        raise ValueError("text: no text encoder")
    if len({(text.tokens, text.clip_skip, text.last_layer) for text in manifest.text}) > 1:
        raise ValueError("text: encoders of chunks of different lengths, or of different layers")
    if UNET not in manifest.components:
        raise ValueError(f"components: no {UNET}")
    graphs = [record for by_compute in manifest.graphs.values() for record in by_compute.values()]
    if strange := {record.component for record in graphs} - manifest.components.keys():
        raise ValueError(f"graphs of components that are not listed: {sorted(strange)}")
    needed = {
        WEIGHTS,
        *(text.tokenizer for text in manifest.text),
        *map(reference_path, manifest.graphs),
        *(record.path for record in graphs),
    }
    if missing := needed - manifest.files.keys():
        raise ValueError(f"{sorted(missing)} not listed under files")
    if len({(text.bos, text.eos, text.tokenizer) for text in manifest.text}) > 1:
        raise ValueError("text: encoders with different tokenizers")
    if any(_vectors(text) != _vectors(manifest.text[0]) for text in manifest.text):
        raise ValueError("text: encoders with different embeddings")
    return manifest


def _vectors(text: Text) -> dict[str, int]:
    """How many vectors each learned embedding of an encoder has, by trigger."""
    return {trigger: len(rows) for trigger, rows in text.embeddings.items()}


def _read(kind: Any, value: Any, where: str) -> Any:
    """Turn `value`, as JSON gave it, into the dataclass or type `kind`. Every int is a count. ValueError if the value
    has another form.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, found {value!r}")
        if unknown := value.keys() - hints.keys():
            raise ValueError(f"{where}: unknown fields: {sorted(unknown)!r}")
        required = {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
        if missing := required - value.keys():
            raise ValueError(f"{where}: missing fields: {sorted(missing)!r}")
        read = {name: _read(hints[name], one, f"{where}.{name}") for name, one in value.items()}
        return kind(**read)  # type: ignore[operator]
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
    """Check that every number is in its range, that every word is known, and that repeated facts agree. ValueError
    otherwise. Nothing later checks again.
    """
    diffusion, latents = manifest.diffusion, manifest.latents
    unet, vae = (_part(f"architecture.{name}", manifest.architecture.get(name)) for name in ("unet", "vae"))
    texts = manifest.architecture.get("texts")
    if not isinstance(texts, list) or len(texts) != len(manifest.text):
        raise ValueError(f"architecture.texts: expected one for each of the {len(manifest.text)} text encoders")
    for name, component in manifest.components.items():
        _known(f"components.{name}.storage", component.storage, PRECISIONS)
        _known(f"components.{name}.compute", component.compute, PRECISIONS)
    _known("diffusion.prediction", diffusion.prediction, PREDICTIONS)
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        raise ValueError(
            f"diffusion: betas from {diffusion.beta_start} to {diffusion.beta_end}: expected them to rise between 0"
            " and 1"
        )
    _within("diffusion.num_timesteps", diffusion.num_timesteps, 2, MAX_TIMESTEPS)
    if (diffusion.sigma_min is None) != (diffusion.sigma_max is None):
        raise ValueError("diffusion: sigma_min and sigma_max: expected both or neither")
    low, high = diffusion.sigma_min, diffusion.sigma_max
    if low is not None and high is not None and not 0 < low < high <= MAX_SIGMA:
        raise ValueError(f"diffusion: sigmas from {low} to {high}: expected them to rise between 0 and {MAX_SIGMA}")
    if not 0 < diffusion.sigma_data <= MAX_SIGMA:
        raise ValueError(f"diffusion.sigma_data: {diffusion.sigma_data}: expected more than 0 and at most {MAX_SIGMA}")
    for name, count in (("pooled", manifest.vector.pooled), ("size_width", manifest.vector.size_width)):
        _within(f"vector.{name}", count, 0, MAX_VECTOR)
    if manifest.vector.sizes not in (0, SIZES):
        raise ValueError(f"vector.sizes: {manifest.vector.sizes}: expected 0 or {SIZES}")

    for i, (text, spec) in enumerate(zip(manifest.text, texts, strict=True)):
        spec = _part(f"architecture.texts.{i}", spec)
        _equal("text.tokens", text.tokens, f"texts.{i}.tokens", spec.get("tokens"))
        _equal("text.width", text.width, f"texts.{i}.width", spec.get("width"))
        vocabulary = _count(f"texts.{i}.vocabulary", spec.get("vocabulary"))
        layers = _count(f"texts.{i}.layers", spec.get("layers"))
        _within("text.tokens", text.tokens, 3, 1 << 10)
        _within("text.width", text.width, 1, 1 << 16)
        rows = [("text.bos", text.bos), ("text.eos", text.eos), ("text.pad", text.pad)]
        rows += [(f"text.embeddings.{trigger}", row) for trigger, several in text.embeddings.items() for row in several]
        for where, row in rows:
            _within(where, row, 0, vocabulary - 1)
        if (
            not text.clip_skip
            or len(set(text.clip_skip)) != len(text.clip_skip)
            or not all(1 <= layer <= layers for layer in text.clip_skip)
        ):
            raise ValueError(f"text.clip_skip: {list(text.clip_skip)}: expected different layers from 1 to {layers}")

    _equal("latents.channels", latents.channels, "vae.latent_channels", vae.get("latent_channels"))
    _within("latents.channels", latents.channels, 1, 1 << 10)
    levels = vae.get("channels")
    _equal(
        "latents.factor",
        latents.factor,
        "vae.channels, 2 for each after the first",
        2 ** (len(levels) - 1) if isinstance(levels, list) and levels else None,
    )
    if not 1 <= latents.factor <= SIZE_STEP or SIZE_STEP % latents.factor:
        raise ValueError(f"latents.factor: {latents.factor}: expected a divisor of {SIZE_STEP}")
    _equal(
        "latents.concat_channels",
        latents.channels + latents.concat_channels,
        "unet.in_channels",
        unet.get("in_channels"),
    )
    for side in latents.size:
        _within("latents.size", side, MIN_SIDE, MAX_SIDE)
        if side % SIZE_STEP:
            raise ValueError(f"latents.size: {side}: expected a multiple of {SIZE_STEP}")

    for source in manifest.sources:
        _known("sources: kind", source.kind, SOURCE_KINDS)
    for graph, by_compute in manifest.graphs.items():
        for compute, record in by_compute.items():
            where = f"graphs.{graph}.{compute}"
            _known(where, compute, PRECISIONS)
            _equal(f"{where}.path", record.path, "its graph", graph_path(graph, compute))
            if record.error < 0:
                raise ValueError(f"{where}.error: {record.error}: expected 0 or more")
            if record.checked not in CHECKED:
                raise ValueError(f"{where}.checked: {record.checked!r}: expected {' or '.join(CHECKED)}")


def _part(where: str, part: object) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ValueError(f"{where}: expected an object, found {part!r}")
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
    if (
        not plain
        or path.is_absolute()
        or ".." in path.parts
        or str(path) != name
        or name in (".", MANIFEST)
        or path.parts[0] == ENGINES
    ):
        raise ValueError(f"unsafe path {name!r}")
    return name
