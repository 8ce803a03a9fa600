"""Opens files of the LoRA family and matches them to a model's weights. Every key is applied or named in an error.

`spelling.py` knows how keys are spelled, `settings.py` peft's settings, and `formula.py` the formulas.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sdrt.errors import AdapterError, UsageError, nearest, printable
from sdrt.export.adapters.formula import (
    Delta,
    MisfitError,
    additive,
    decomposed,
    fitting_shape,
    kinds_of,
    missing_parts,
    norm_axis,
    rank_of,
)
from sdrt.export.adapters.numbered import check_numbers, numbered_modules
from sdrt.export.adapters.settings import FILE_NAME, PeftConfig, config_beside, config_in_header
from sdrt.export.adapters.spelling import (
    MAGNITUDE,
    UP_BIAS,
    below_base_model,
    bundled_trigger,
    first_channels,
    grouped,
    is_numbered,
    made_for,
    numbered_list,
    refused_kind,
    split,
)
from sdrt.export.architecture import Architecture, UNetSpec
from sdrt.export.families.keys import adapter_names, joined_modules, later_layers
from sdrt.export.families.recognise import LORA, OPTION_OF_KIND, describe
from sdrt.export.families.table import component_of, family_named, family_of
from sdrt.export.floats import Array, as_float32, is_finite
from sdrt.export.read.tensor_entry import FLOATS
from sdrt.export.read.tensor_file import TensorFile, open_tensor_file
from sdrt.files.read import Document

_SHOWN_KEYS = 5
_BIAS_PARTS = ("diff_b", UP_BIAS)
_SAME_AS = {"w_norm": "diff", "b_norm": "diff_b"}
_PREDICTS_V, _ZERO_SNR = "v_pred", "ztsnr"
"""Keys without a module that say how the model predicts after the change, as in checkpoints."""
_TAUGHT = "<embed>"
"""What the header of the first LoRA format says about a key with an embedding's vectors."""


@dataclass(frozen=True)
class LoraOption:
    """A `--lora` argument. `scale` multiplies the change of the UNet, `te_scale` the change of the text encoder."""

    path: Path
    scale: float = 1.0
    te_scale: float = 1.0


@dataclass(frozen=True)
class Lora:
    """An opened adapter of the LoRA family, matched to a model: its change of each weight, by canonical name.
    `unmatched` holds keys that fit nothing, where that was allowed.

    `predicts_v` says that the model predicts v after the change, `zero_snr` that its last step is noise alone.
    `config` is the `adapter_config.json` whose alpha is used, if there is one. `notes` are remarks for the user.
    `bundled` gives the keys of the embeddings inside the file, by trigger and by what the key says of the text encoder
    (`bundled_trigger`); they are not among the deltas.
    """

    option: LoraOption
    file: TensorFile
    sha256: str
    deltas: Mapping[str, Delta]
    unmatched: tuple[str, ...] = ()
    config: Document | None = None
    notes: tuple[str, ...] = ()
    bundled: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    predicts_v: bool = False
    zero_snr: bool = False

    @property
    def config_sha256(self) -> str | None:
        return self.config.sha256 if self.config is not None else None

    def scale(self, weight: str) -> float:
        component = component_of(weight)
        return self.option.te_scale if component is not None and component.network == "clip" else self.option.scale

    def rescales(self, weight: str) -> bool:
        """Whether its change of a weight depends on the weight's value, as DoRA's does, and therefore on the adapters
        before it.
        """
        return weight in self.deltas and self.deltas[weight].norm_axis is not None

    @np.errstate(all="ignore")  # an overflow is found in the sum
    def change(self, weight: str, current: Array) -> Array:
        """What this adapter adds, at its scale, to a weight with the value `current`; float32 of the weight's shape, in
        memory of its own.

        The scale multiplies the whole change. For DoRA that is W + scale * (W_dora - W), as in AUTOMATIC1111 and
        ComfyUI.

        Raises:
            AdapterError: a value is not finite.
        """
        delta = self.deltas[weight]
        try:
            made = additive(delta, lambda part: self._read(delta.keys[part]))
        except MisfitError as error:
            raise AdapterError(
                f"{self.file.path}: {printable(next(iter(delta.keys.values())))}: {error}: no part of a weight"
                f" {list(delta.shape)}"
            ) from error
        if delta.changes != current.shape:
            padding = np.zeros(current.shape, np.float32)
            padding[:, : delta.shape[1]] = made
            made = padding
        if delta.norm_axis is not None:
            magnitude = next(self._read(key) for part, key in delta.keys.items() if part in ("dora_scale", MAGNITUDE))
            if delta.rows is not None:
                magnitude = magnitude.flatten()[slice(*delta.rows)]
            made = decomposed(current, made, magnitude, delta.norm_axis)
        if (scale := self.scale(weight)) != 1:
            made *= np.float32(scale)
        return made

    def _read(self, key: str) -> Array:
        value = self.file.read(key)
        if (kind := self.file.entries[key].dtype) not in FLOATS:
            if key.endswith((".bias_indices", ".bias_size")):
                return value
            raise AdapterError(f"{self.file.path}: {printable(key)}: expected floating-point numbers, found {kind}")
        value = as_float32(value)
        if not is_finite(value):
            count = int((~np.isfinite(value)).sum())
            raise AdapterError(
                f"{self.file.path}: {printable(key)}: {count} values are NaN or infinite",
                "Download or train the adapter again.",
            )
        return value


def parse_lora_option(text: str) -> LoraOption:
    """Parse `FILE[:SCALE[:TE_SCALE]]`. TE_SCALE defaults to SCALE. A colon inside the path (`C:\\x`, `a:b.safetensors`)
    belongs to the path.

    Raises:
        UsageError: a scale is not a finite number.
    """
    path, scales = text, list[str]()
    # os.path.exists, since Path.exists raises for a name that is too long
    while len(scales) < 2 and (match := re.fullmatch(r"(.+):([^:/\\]*)", path, re.DOTALL)) and not os.path.exists(path):
        if not _is_number(match[2]) and (len(match[1]) == 1 or re.fullmatch(r".*\.\w+", match[2])):
            break
        path, scales = match[1], [match[2], *scales]
    for scale in scales:
        if not _is_number(scale) or not math.isfinite(float(scale)):
            raise UsageError(
                f"--lora {text}: scale {scale!r}: expected a finite number",
                "Write it as --lora style.safetensors:0.8, or style.safetensors:0.8:0.5 with a text-encoder scale.",
            )
    numbers = [float(scale) for scale in scales] or [1.0]
    return LoraOption(Path(path), numbers[0], numbers[-1])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def open_lora(
    option: LoraOption, shapes: Mapping[str, tuple[int, ...]], arch: Architecture, *, allow_unmatched: bool = False
) -> Lora:
    """Open an adapter of the LoRA family and match each of its keys to a weight of the model. `shapes` gives the
    weights by canonical name.

    Keys of text encoder layers that the model does not use are left out, and `notes` say so.

    Raises:
        AdapterError: the file is no such adapter, is of a kind that cannot be fused, is for another family, or lacks
            matrices. Without `allow_unmatched`, also for a key that belongs to no module. An adapter that matches
            nothing always raises.
    """
    file = open_tensor_file(option.path)
    try:
        _check_kind(file)
        _check_family(file, arch)
        family, spec = family_named(arch.family), arch.unet
        known = _modules_of(shapes)
        joined = joined_modules(known, family)
        shapes = dict(shapes) | _joined_shapes(shapes, joined)
        table = adapter_names([*known, *joined, *_modules_of(later_layers(arch, shapes))], spec, family)
        spelled = numbered_list({name: entry.shape for name, entry in file.entries.items()})
        if numbered := {name.rpartition(":")[0] for name in spelled.values() or file.entries if is_numbered(name)}:
            numbers = numbered_modules(set(known), spec)
            check_numbers(file.path, numbered, numbers, file.metadata.get(next(iter(numbered)).partition(":")[0], ""))
            table |= numbers
        bundled = bundled_keys(file)
        apart = {key for keys in bundled.values() for key in keys.values()} | {_PREDICTS_V, _ZERO_SNR}
        modules, unmatched = _modules(file, spelled, apart, table, allow_unmatched)
        config = config_in_header(file.path, file.metadata)
        notes = []
        if unused := [name for name in modules if f"{name}.weight" not in shapes]:
            count = sum(len(modules.pop(name).keys) for name in unused)
            notes.append(f"{count} of its keys change layers of a text encoder that the model does not use")
        if _PREDICTS_V in file.entries:
            notes.append(f"{_PREDICTS_V}: says that the model predicts v after it")
        if config is None and any(module.below_base_model for module in modules.values()):
            config = config_beside(file.path)
            if config is None:
                notes.append(f"{FILE_NAME} is not beside it, so alpha is taken to be the rank")
        deltas: dict[str, Delta] = {}
        for module in modules.values():
            made = dict[str, Delta]()
            _add_deltas(file, module, shapes, spec, config, made, unmatched, allow_unmatched)
            for weight, delta in _apart(file, module, made, joined).items():
                if weight in deltas:
                    raise AdapterError(
                        f"{file.path}: {printable(module.name)}: changes {weight}, which another key of the file"
                        " changes too"
                    )
                deltas[weight] = delta
        sha256 = file.sha256()
        return Lora(
            option,
            file,
            sha256,
            deltas,
            tuple(unmatched),
            config.document if config is not None else None,
            tuple(notes),
            bundled,
            _PREDICTS_V in file.entries,
            _ZERO_SNR in file.entries,
        )
    except BaseException:
        file.close()
        raise


def _check_kind(file: TensorFile) -> None:
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    if refused := refused_kind(shapes):
        kind, key = refused
        raise AdapterError(
            f"{file.path}: {printable(key)}: {kind}: not supported",
            "sdrt fuses LoRA, LoCon, LoHa, LoKr, DoRA and full differences; convert the adapter, or train one of"
            " these.",
        )
    kind = describe(shapes)
    if kind != LORA:
        raise AdapterError(
            f"{file.path}: expected {LORA}, found {kind}",
            how_to_give(kind) or "--lora takes LoRA, LyCORIS and DoRA files.",
        )


def _check_family(file: TensorFile, arch: Architecture) -> None:
    """Refuse an adapter that its names and widths show to be another family's, or an inpainting or edit model's where
    this is none.
    """
    shapes, family = {name: entry.shape for name, entry in file.entries.items()}, family_named(arch.family)
    families, fix = made_for(shapes), "Use a LoRA made for this checkpoint's family."
    if families and family.title not in families:
        raise AdapterError(
            f"{file.path}: a LoRA made for {' or '.join(families)}, expected one for {family.title}", fix
        )
    channels = first_channels(shapes)
    if channels > arch.unet.in_channels:
        kind = family.kinds.get(channels, f"a model of {channels} input channels")
        raise AdapterError(
            f"{file.path}: a LoRA made for {kind}: it changes a first layer of {channels} channels, this model's has"
            f" {arch.unet.in_channels}",
            "Use it with such a model, or a LoRA made for this one.",
        )


def _modules_of(weights: Iterable[str]) -> list[str]:
    """The modules that have a weight of these names."""
    return [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]


def _joined_shapes(
    shapes: Mapping[str, tuple[int, ...]], joined: Mapping[str, Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights and biases of modules that files join into one."""
    found = {}
    for whole, parts in joined.items():
        for leaf in (".weight", ".bias"):
            if all(part + leaf in shapes for part in parts):
                rows, *rest = shapes[parts[0] + leaf]
                found[whole + leaf] = (rows * len(parts), *rest)
    return found


def _apart(
    file: TensorFile, module: _Module, deltas: Mapping[str, Delta], joined: Mapping[str, Sequence[str]]
) -> dict[str, Delta]:
    """The changes that a module of the file makes, by weight of the model: several where it stands for several."""
    if module.canonical not in joined:
        return dict(deltas)
    found, parts = dict[str, Delta](), joined[module.canonical]
    for name, delta in deltas.items():
        if delta.norm_axis == 1:
            raise AdapterError(
                f"{file.path}: {printable(module.name)}: DoRA with a magnitude for each input of a joined projection",
                "Train it with a magnitude for each output (LyCORIS: wd_on_output).",
            )
        rows = delta.shape[0] // len(parts)
        for i, part in enumerate(parts):
            found[part + name.removeprefix(module.canonical)] = replace(delta, rows=(i * rows, (i + 1) * rows))
    return found


def how_to_give(kind: str) -> str:
    """Advice on how to give a build a file of that kind; empty for a kind that a build does not take."""
    option = OPTION_OF_KIND.get(kind, "--checkpoint" if family_of(kind) is not None else "")
    return f"Pass it with {option}." if option else ""


def bundled_keys(file: TensorFile) -> dict[str, dict[str, str]]:
    """The keys of the embeddings inside a LoRA file, by trigger and by the name that an embedding file would give them:
    `clip_l`, `clip_g`, or another where there is one text encoder.

    Raises:
        AdapterError: two keys hold one embedding, or a trigger has characters that no prompt can hold.
    """
    found: dict[str, dict[str, str]] = {}
    for key in file.entries:
        bundled = (key, "") if file.metadata.get(key) == _TAUGHT else bundled_trigger(key)
        if bundled is None:
            continue
        trigger, name = bundled
        known = found.setdefault(trigger, {})
        if name in known or not trigger.strip() or not trigger.isprintable():
            reason = f"is {printable(known[name])} too" if name in known else "is no word that a prompt can say"
            raise AdapterError(
                f"{file.path}: {printable(key)}: the embedding of {printable(trigger)!r} {reason}",
                "Get the adapter again.",
            )
        known[name] = key
    return found


@dataclass(frozen=True)
class _Module:
    """The keys of one module in the file, by part. `name` is the file's spelling of the module, without peft's
    `base_model.model.`.
    """

    name: str
    canonical: str
    below_base_model: bool
    keys: dict[str, str]


def _modules(
    file: TensorFile,
    spelled: Mapping[str, str],
    apart: Collection[str],
    table: Mapping[str, str],
    allow_unmatched: bool,
) -> tuple[dict[str, _Module], list[str]]:
    """The file's keys by canonical module, without those `apart` from modules; and the keys that belong to no module.
    `spelled` gives names to keys that have none of their own.
    """
    modules: dict[str, _Module] = {}
    unmatched = []
    for key in file.entries:
        if key in apart:
            continue
        inner = below_base_model(spelled.get(key, key))
        parsed = split(inner)
        if parsed is None or parsed[0] not in table:
            unmatched.append(key)
            continue
        name, canonical, part = parsed[0], table[parsed[0]], _SAME_AS.get(parsed[1], parsed[1])
        module = modules.setdefault(canonical, _Module(name, canonical, inner != spelled.get(key, key), {}))
        if part in module.keys or module.name != name:
            raise AdapterError(
                f"{file.path}: {printable(key)}: changes {canonical}.weight, which another key of the file changes too"
            )
        module.keys[part] = key
    if unmatched and (not modules or not allow_unmatched):
        _refuse_unmatched(file, unmatched, modules, table)
    if not modules:
        raise AdapterError(
            f"{file.path}: no key of this LoRA belongs to this model: 0 modules would change",
            "Check which model it was trained for: sdrt inspect FILE",
        )
    return modules, unmatched


def _refuse_unmatched(
    file: TensorFile, unmatched: Sequence[str], modules: Mapping[str, object], table: Mapping[str, str]
) -> None:
    base = file.metadata.get("ss_base_model_version", "")
    said = f"; it was made for {printable(base)}" if base and not modules else ""
    shown = ", ".join(printable(k) for k in unmatched[:_SHOWN_KEYS])
    counted = f"{file.path}: {len(unmatched)} of {len(file.entries)} keys"
    for key in unmatched:
        if what := _whole(below_base_model(key), table):
            raise AdapterError(
                f"{counted} are no change of a weight: {printable(key)} is {what} ({grouped(unmatched)})", _MERGE
            )
    if vectors := [key for key in unmatched if key.startswith("bundle_emb.")]:
        raise AdapterError(
            f"{counted} belong to no module of this model{said}: {printable(vectors[0])} holds an embedding's"
            " vectors for another text encoder",
            "Use a LoRA made for this checkpoint's family, or pass --allow-unmatched to leave these out.",
        )
    inner = below_base_model(unmatched[0])
    name = parsed[0] if (parsed := split(inner)) else inner
    alike = [choice for choice in table if choice[:5] == name[:5]] or table
    message = f"{counted} belong to no module of this model{said}: {shown}{nearest(name, alike)} ({grouped(unmatched)})"
    fix = "Use a LoRA made for this checkpoint's family" + (
        ", or pass --allow-unmatched to fuse the rest." if modules else "."
    )
    raise AdapterError(message, fix)


_MERGE = (
    "Merge the adapter in the tool that trained it (peft: merge_and_unload) and build the merged model, or pass"
    " --allow-unmatched to leave these out."
)


def _whole(inner: str, table: Mapping[str, str]) -> str:
    """What a key is if it holds a module's trained values themselves instead of a change; empty if it does not."""
    module, _, leaf = inner.rpartition(".")
    if leaf not in ("weight", "bias"):
        return ""
    if module.endswith(".base_layer"):
        return f"a whole {leaf}, as peft's bias='lora_only' and 'all' keep it"
    if ".modules_to_save" in module or module in table:
        return f"a whole {leaf}, as peft's modules_to_save and bias='all' keep it"
    return ""


def _add_deltas(
    file: TensorFile,
    module: _Module,
    shapes: Mapping[str, tuple[int, ...]],
    spec: UNetSpec,
    config: PeftConfig | None,
    deltas: dict[str, Delta],
    unmatched: list[str],
    allow_unmatched: bool,
) -> None:
    """Add the changes that a module's keys make to its weight and to its bias. If the model lacks the bias, the key
    goes to `unmatched` where that is allowed.
    """
    where = f"{file.path}: {printable(module.name)}"
    keys = {part: key for part, key in module.keys.items() if part not in _BIAS_PARTS}
    entries = {part: file.entries[key].shape for part, key in keys.items()}
    factor = 1.0
    if keys.keys() - {"alpha"} or not module.keys.keys() & set(_BIAS_PARTS):
        weight = shapes[f"{module.canonical}.weight"]
        if len(kinds := kinds_of(keys)) > 1:
            raise AdapterError(
                f"{where}: holds both {kinds[0]} and {kinds[1]}, expected one of them", "Get the adapter again."
            )
        if missing := missing_parts(keys):
            raise AdapterError(
                f"{where}: {missing[0]} is missing, the rest of the set is there",
                "The LoRA is incomplete; download or train it again.",
            )
        if config is not None and config.use_dora(module.name) and MAGNITUDE not in keys:
            raise AdapterError(
                f"{where}: {MAGNITUDE} is missing, and {config.source} says use_dora",
                "The adapter is incomplete; get it again.",
            )
        try:
            shape = fitting_shape(entries, weight, _plain_channels(module.canonical, spec))
            axis = norm_axis(entries, shape)
            if axis is not None and shape != weight:
                raise MisfitError(f"DoRA for {shape[1]} input channels")
        except MisfitError as error:
            raise AdapterError(
                f"{where}: {error} do not make a change of a weight of shape {list(weight)}",
                "The LoRA was made for a model of other sizes; use one made for this checkpoint's family.",
            ) from error
        factor = _factor(file, module, rank_of(entries), config)
        used = {part: key for part, key in keys.items() if part not in ("alpha", "lokr_t1")}
        deltas[f"{module.canonical}.weight"] = Delta(used, shape, 1.0 if "diff" in used else factor, axis)
    biases = [part for part in _BIAS_PARTS if part in module.keys]
    if len(biases) > 1:
        raise AdapterError(
            f"{where}: holds both {biases[0]} and {biases[1]}, expected one of them", "Get the adapter again."
        )
    for part in biases:
        key, bias = module.keys[part], shapes.get(f"{module.canonical}.bias")
        found = file.entries[key].shape
        if bias is None and allow_unmatched:
            unmatched.append(key)
        elif bias is None:
            raise AdapterError(
                f"{file.path}: {printable(key)}: changes a bias, and {module.canonical} has none in this model",
                "Use an adapter made for this checkpoint's family, or pass --allow-unmatched to leave such biases out.",
            )
        elif math.prod(found) != bias[0]:
            raise AdapterError(
                f"{file.path}: {printable(key)}: expected a bias of shape {list(bias)}, found {list(found)}"
            )
        else:
            deltas[f"{module.canonical}.bias"] = Delta(
                {"diff" if part == "diff_b" else part: key}, bias, 1.0 if part == "diff_b" else factor
            )


def _factor(file: TensorFile, module: _Module, rank: int | None, config: PeftConfig | None) -> float:
    """Alpha over rank. A file's own alpha goes before settings. Without either, alpha is the rank."""
    if "alpha" not in module.keys:
        stated = config.factor(module.name, rank) if config is not None else None
        return 1.0 if stated is None else stated
    where, key = f"{file.path}: {printable(module.name)}.alpha", module.keys["alpha"]
    stored = file.read(key).flatten()
    if stored.size != 1:
        raise AdapterError(f"{where}: expected one number, found shape {list(file.entries[key].shape)}")
    alpha = float(stored[0])
    if not math.isfinite(alpha):
        raise AdapterError(f"{where}: expected a finite number, found {alpha}")
    return 1.0 if alpha == 0 or not rank else alpha / rank  # kohya writes 0 for "no alpha"


def _plain_channels(module: str, spec: UNetSpec) -> int | None:
    """For the UNet's first layer in a model with inputs beside the latents: its input channels without these inputs.
    None for any other layer or model.
    """
    component = component_of(module)
    first = component is not None and component.network == "unet" and module == component.prefix + "input_blocks.0.0"
    return spec.out_channels if first and spec.in_channels > spec.out_channels else None
