"""A checkpoint as tensors by canonical name, whatever its files and their spelling, and the architecture that these
tensors make. A tensor is read only when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sdrt.errors import CheckpointError, nearest, printable
from sdrt.export.architecture import Architecture, architecture, default_size
from sdrt.export.families.checkpoint_names import (
    EMA,
    canonical_names,
    components_of,
    ema_name,
    has_ema,
    is_vae_attention,
)
from sdrt.export.families.family import Component
from sdrt.export.families.table import COMPONENTS, FAMILIES, component_of, family_named
from sdrt.export.floats import Array, as_float32, is_finite
from sdrt.export.read.diffusers_config import SCHEDULER, TEXTS, check_family, check_sizes, sampling_note
from sdrt.export.read.diffusers_config import VAE as VAE_CONFIG
from sdrt.export.read.diffusion import STATED, with_diffusion
from sdrt.export.read.model_files import ModelFiles, Stored, open_model, open_vae
from sdrt.export.read.tensor_entry import FLOATS, TensorEntry
from sdrt.export.read.tensor_file import TensorFile

_IGNORED = (
    "alphas_cumprod",
    "betas",
    "log_one_minus_alphas_cumprod",
    "sqrt_",
    "posterior_",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    EMA,
    "scaled_fp8",
    "global_step",
    *STATED,
    *(start for family in FAMILIES for start in family.ignored),
    *(
        component.prefix + start
        for family in FAMILIES
        for component in family.components
        for start in component.ignored
    ),
)
_IGNORED_ENDS = (".scale_input", ".input_scale", ".scaled_fp8", ".comfy_quant")
_FP8_SCALES = (".scale_weight", ".weight_scale")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor of the model lies: its entry within its file, and how the model takes it.

    rows: the part of the stored rows that it is, from the first number to before the second; None for all. If
        `transposed`, these are the columns of the model's matrix.
    reshaped: the model's shape, where the file has another shape for the same values.
    scale: the entry of the number by which an 8-bit weight is multiplied.
    """

    file: TensorFile
    entry: TensorEntry
    reshaped: tuple[int, ...] | None = None
    scale: TensorEntry | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the model."""
        if self.reshaped is not None:
            return self.reshaped
        stored = self.entry.shape if self.rows is None else (self.rows[1] - self.rows[0], *self.entry.shape[1:])
        return stored[::-1] if self.transposed else stored

    def read(self) -> Array:
        """The stored values in the model's shape, of the type that `TensorFile.read` gives, 8-bit floats scaled. Only
        the needed part of the file is read.

        Raises:
            CheckpointError: the scale of an 8-bit weight is no finite number.
            InputFileError, UnsafeError: as `TensorFile.read`.
        """
        stored = self.file.read(self.entry.name, self.rows)
        if self.scale is not None:
            scale = as_float32(self.file.read(self.scale.name))
            if scale.size != 1 or not is_finite(scale):
                raise CheckpointError(
                    f"{self.file.path}: {printable(self.scale.name)}: expected one finite number, found shape"
                    f" {list(scale.shape)}"
                )
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is used
                stored *= scale.reshape(())
        return (stored.T.copy() if self.transposed else stored).reshape(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor by canonical name, and the architecture they make. `notes` tell the user what
    was decided.
    """

    model: ModelFiles
    vae: ModelFiles | None
    tensors: Mapping[str, Tensor]
    architecture: Architecture
    notes: tuple[str, ...] = ()

    def check_unchanged(self) -> None:
        """Raise InputFileError if a file may have changed since it was opened."""
        for files in (self.model, self.vae):
            if files is not None:
                files.check_unchanged()

    def close(self) -> None:
        for files in (self.model, self.vae):
            if files is not None:
                files.close()


def open_checkpoint(
    path: Path,
    vae: Path | None = None,
    *,
    ema: bool = False,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> Checkpoint:
    """Read a checkpoint, one file or a diffusers folder, except for its tensors' values. `vae` is a file or folder
    whose VAE replaces the checkpoint's own.

    `ema` takes the UNet's averaged weights, which some checkpoints hold beside the plain ones. `prediction` and
    `zero_snr` go before what the files say (`with_diffusion`).

    Raises:
        CheckpointError: the checkpoint is of another kind or family, a component is missing, or it has no averaged
            weights.
        InputFileError: a file is malformed.
        UnsafeError: a file holds something other than data.
    """
    model = open_model(path)
    vae_model = None
    try:
        tensors = canonical_tensors(model)
        notes = [*model.notes]
        if has_ema(tensors):
            notes.append(
                f"{model.name}: holds the UNet twice; "
                + (
                    "the averaged (EMA) weights were taken"
                    if ema
                    else "the plain weights were taken, --ema takes the averaged"
                )
            )
        if ema:
            tensors |= _averaged(model, tensors)
        if vae is not None:
            vae_model = open_vae(vae)
            notes += vae_model.notes
            tensors = {name: tensor for name, tensor in tensors.items() if not _is_vae(name)} | _vae_tensors(vae_model)
        arch, remarks = model_architecture(model, tensors, vae_model, prediction=prediction, zero_snr=zero_snr)
        notes += remarks
        tensors, remarks = _used_layers(model, tensors, arch)
        notes += remarks
        return Checkpoint(model, vae_model, tensors, arch, tuple(notes))
    except BaseException:
        model.close()
        if vae_model is not None:
            vae_model.close()
        raise


def _used_layers(
    model: ModelFiles, tensors: dict[str, Tensor], arch: Architecture
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without those of text encoders' layers after the last that is used, and what to tell about them."""
    notes = []
    for component, text in zip(family_named(arch.family).text_encoders, arch.texts, strict=True):
        start = component.prefix + "text_model.encoder.layers."
        numbers = {name: name[len(start) :].partition(".")[0] for name in tensors if name.startswith(start)}
        after = {name for name, number in numbers.items() if number.isdecimal() and int(number) >= text.layers}
        if after and component.name in model.settings.text_layers:
            notes.append(
                f"{model.name}: its settings use {text.layers} layers of the {component.title}, those after them were"
                " left out"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if name not in after}
    return tensors, notes


def model_architecture(
    model: ModelFiles,
    tensors: Mapping[str, Tensor],
    vae: ModelFiles | None = None,
    *,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> tuple[Architecture, list[str]]:
    """The architecture that tensors by canonical name make, together with the settings stored with the model and the
    VAE, and remarks for the user. Raises as `architecture` and `with_diffusion` do.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    arch = architecture(model.path, shapes, model.metadata, model.kind)
    family = family_named(arch.family)
    stated, scale = model.settings, (vae or model).settings.vae_scale
    if scale is not None:
        arch = replace(arch, vae=replace(arch.vae, scale=scale))
    weights = {name: Stored(tensor.file, tensor.entry) for name, tensor in tensors.items()}
    arch, notes = with_diffusion(arch, model, weights, family, prediction=prediction, zero_snr=zero_snr)
    if remark := default_size(model.metadata, arch.size)[1]:
        notes.append(f"{model.name}: {remark}")
    if remark := sampling_note(stated.configs.get(SCHEDULER, {}), family):
        notes.append(f"{model.path.absolute().name}: {remark}")
    if stated.zero_empty is not None:
        arch = replace(arch, zero_empty=stated.zero_empty)
    texts = list(arch.texts)
    for i, component in enumerate(family.text_encoders):
        layers = stated.text_layers.get(component.name)
        if layers is None:
            continue
        if layers > texts[i].layers:
            raise CheckpointError(
                f"{model.path}: {TEXTS[i]}: num_hidden_layers: {layers}, but the tensors say {texts[i].layers}",
                "The folder's files belong to different models; download it again.",
            )
        texts[i] = replace(texts[i], layers=layers)
    arch = replace(arch, texts=tuple(texts))
    own = {name: config for name, config in stated.configs.items() if vae is None or name != VAE_CONFIG}
    for path, configs in [(model.path, own), *([(vae.path, vae.settings.configs)] if vae is not None else [])]:
        check_family(path, configs, family)
        check_sizes(path, configs, arch)
    if stated.sample_size is not None:
        side = stated.sample_size * 2 ** (len(arch.vae.channels) - 1)
        arch = replace(arch, size=(side, side))
    return arch, notes


def canonical_tensors(model: ModelFiles) -> dict[str, Tensor]:
    """Every tensor of a model by its canonical name.

    Raises:
        CheckpointError: two names in the files mean one tensor.
    """
    shapes = {name: stored.entry.shape for name, stored in model.tensors.items()}
    names = canonical_names(model.path, shapes, model.kind)
    tensors: dict[str, Tensor] = {}
    for name, canonical in names.items():
        stored = model.tensors[name]
        if canonical in tensors:
            raise CheckpointError(
                f"{stored.file.path}: {printable(name)}: stands for {printable(canonical)}, as"
                f" {printable(tensors[canonical].entry.name)} does"
            )
        matrix = is_vae_attention(canonical) and len(stored.entry.shape) == 2
        tensors[canonical] = Tensor(stored.file, stored.entry, (*stored.entry.shape, 1, 1) if matrix else None)
    for component in components_of(model.kind):
        tensors = as_parts(component, tensors)
    for name in [name for name in tensors if name.endswith(_FP8_SCALES)]:
        weight = name.rpartition(".")[0] + ".weight"
        if weight in tensors and tensors[weight].entry.dtype.startswith("F8"):
            tensors[weight] = replace(tensors[weight], scale=tensors.pop(name).entry)
    return tensors


def as_parts(component: Component, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a component as the model has them. A stored tensor that holds several is divided into them. A stored
    transpose becomes the matrix.

    Raises:
        CheckpointError: a stored tensor's rows do not divide into its parts, the file also has one of these parts by
            itself, or a stored transpose is no matrix.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ends = (*component.rows, *component.transposed) if name.startswith(component.prefix) else ()
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            found[name] = tensor
            continue
        where, shape = f"{tensor.file.path}: {printable(tensor.entry.name)}", list(tensor.entry.shape)
        below = name.removesuffix(end)
        if end in component.rows:
            parts = component.rows[end]
            if not shape or shape[0] % len(parts):
                raise CheckpointError(f"{where}: expected rows in {len(parts)} equal parts, found shape {shape}")
            count = shape[0] // len(parts)
            made = {below + part: replace(tensor, rows=(i * count, (i + 1) * count)) for i, part in enumerate(parts)}
        else:
            if len(shape) != 2:
                raise CheckpointError(f"{where}: expected a matrix, found shape {shape}")
            made = {below + component.transposed[end]: replace(tensor, transposed=True)}
        if twice := made.keys() & tensors.keys():
            raise CheckpointError(f"{where}: holds {printable(min(twice))}, which the file has beside it")
        found |= made
    return found


def select(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], list[str]]:
    """The checkpoint's tensors for the expected names and shapes, and the names of left-over tensors that belong to no
    network.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is not floating-point; or an expected network has a
            tensor too many, which changes what the network computes.
    """
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        left_over = checkpoint.tensors.keys() - expected.keys()
        path = checkpoint.vae.path if checkpoint.vae is not None and _is_vae(missing[0]) else checkpoint.model.path
        raise CheckpointError(
            f"{path}: {missing[0]}: missing{more}{nearest(missing[0], left_over)}",
            "The file is incomplete; download it again, or supply the VAE with --vae FILE.",
        )
    for name, shape in expected.items():
        tensor = checkpoint.tensors[name]
        path, entry = tensor.file.path, tensor.entry
        if tensor.shape != shape:
            raise CheckpointError(f"{path}: {name}: expected shape {list(shape)}, found {list(entry.shape)}")
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {name}: expected one of {', '.join(FLOATS)}, found {entry.dtype}")
    known = {*expected, *_unneeded(checkpoint.architecture, expected)}
    unknown = [
        name
        for name in checkpoint.tensors
        if name not in known and not name.startswith(_IGNORED) and not name.endswith(_IGNORED_ENDS)
    ]
    asked = [component for component in COMPONENTS if any(name.startswith(component.prefix) for name in expected)]
    for component in asked:
        if foreign := [name for name in unknown if name.startswith(component.prefix + component.computes)]:
            others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise CheckpointError(
                f"{checkpoint.tensors[foreign[0]].file.path}: {printable(foreign[0])}{others}: unknown in a"
                f" {component.title}, which would compute something else without it",
                "The checkpoint is of a kind that this version of sdrt does not build, or was put together of several;"
                " use another.",
            )
    return {name: checkpoint.tensors[name] for name in expected}, unknown


def _unneeded(arch: Architecture, expected: Mapping[str, object]) -> Iterator[str]:
    """Names of the text encoders' tensors that no output may need: those of its layers, and of the norm after them."""
    for component, text in zip(family_named(arch.family).text_encoders, arch.texts, strict=True):
        model = component.prefix + "text_model."
        first = model + "encoder.layers.0."
        leaves = [name.removeprefix(first) for name in expected if name.startswith(first)]
        yield from (f"{model}encoder.layers.{layer}.{leaf}" for layer in range(text.layers) for leaf in leaves)
        yield from (f"{model}final_layer_norm.{leaf}" for leaf in ("weight", "bias"))


def _averaged(model: ModelFiles, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not has_ema(tensors):
        raise CheckpointError(f"{model.path}: has no averaged weights ({EMA}*)", "Leave out --ema.")
    unet = {
        name: ema_name(name)
        for name in tensors
        if (component := component_of(name)) is not None and component.network == "unet"
    }
    if len(set(unet.values())) != len(unet):
        raise CheckpointError(f"{model.path}: two weights of the UNet have one averaged weight", "Leave out --ema.")
    averaged = {name: tensors[ema] for name, ema in unet.items() if ema in tensors}
    if absent := [name for name in unet if name not in averaged]:
        raise CheckpointError(
            f"{model.path}: {printable(absent[0])}: has no averaged weight, {len(averaged)} others have one",
            "Leave out --ema.",
        )
    return averaged


def _vae_tensors(model: ModelFiles) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in canonical_tensors(model).items() if _is_vae(name)}
    if not any(name.endswith("decoder.conv_in.weight") for name in tensors):
        raise CheckpointError(
            f"{model.path}: expected a VAE, found {model.kind}",
            "Give a VAE in LDM's or diffusers' naming, or a checkpoint that holds one.",
        )
    return tensors


def _is_vae(name: str) -> bool:
    component = component_of(name)
    return component is not None and component.network == "vae"
