"""Reads LoRA files and turns them into changes of weights. Every key is applied, or named in an error.

Formats and formulas: kohya-ss networks/lora.py; Hu et al. 2021 (LoRA). A change is computed in float32 from the pristine weight.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.errors import AdapterError, UsageError, nearest, printable
from sdrt.export.architecture import CLIP, UNET, UNetSpec, describe
from sdrt.export.keys import kohya_names
from sdrt.export.tensor_file import TensorFile, open_tensor_file

if TYPE_CHECKING:
    import torch

_PARTS = (".lora_down.weight", ".lora_up.weight", ".alpha")
_OTHER_KINDS = {
    ".lora_mid.weight": "LoCon with a mid tensor", ".hada_w1_a": "LoHa", ".lokr_w1": "LoKr", ".lokr_w1_a": "LoKr", ".dora_scale": "DoRA", ".diff": "full difference",
    ".on_input": "IA3", ".oft_blocks": "OFT", ".oft_diag": "OFT", ".a1.weight": "GLoRA", ".lora_A.weight": "peft LoRA", "lora.down.weight": "diffusers LoRA",
    ".lora_linear_layer.down.weight": "diffusers LoRA",
}  # fmt: skip
_SHOWN_KEYS = 5


@dataclass(frozen=True)
class LoraOption:
    """A `--lora` argument. `scale` multiplies the change of the UNet, `te_scale` that of the text encoder."""

    path: Path
    scale: float = 1.0
    te_scale: float = 1.0


@dataclass(frozen=True)
class _Pair:
    """Keys of one module's matrices in the file, and its alpha over rank."""

    down: str
    up: str
    factor: float


@dataclass(frozen=True)
class Lora:
    """An opened LoRA, matched to a model: pairs by the canonical name of the weight they change. `unmatched` keys were allowed to be."""

    option: LoraOption
    file: TensorFile
    sha256: str
    pairs: Mapping[str, _Pair]
    unmatched: tuple[str, ...]

    def scale(self, weight: str) -> float:
        return self.option.te_scale if weight.startswith(CLIP) else self.option.scale

    def delta(self, weight: str, shape: Sequence[int]) -> torch.Tensor:
        """What this LoRA adds to a weight at its scale, float32 of the weight's shape.

        Linear and 1x1: up @ down. 3x3: the same on the flattened kernel, since `up` is 1x1 (kohya's convolution of the two).

        Raises:
            AdapterError: a value is not finite.
        """
        import torch

        pair = self.pairs[weight]
        down, up = (self.file.read(name).to(torch.float32) for name in (pair.down, pair.up))
        for name, value in ((pair.down, down), (pair.up, up)):
            if not torch.isfinite(value).all():
                raise AdapterError(
                    f"{self.file.path}: {name}: {int((~torch.isfinite(value)).sum())} values are NaN or infinite", "Download or train the LoRA again."
                )
        product = up.flatten(1) @ down.flatten(1)
        return (product * (self.scale(weight) * pair.factor)).reshape(tuple(shape))


def parse_lora_option(text: str) -> LoraOption:
    """`FILE[:SCALE[:TE_SCALE]]` as typed; TE_SCALE defaults to SCALE. A colon inside the path (`C:\\x`, `a:b.safetensors`) is kept.

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


def open_lora(option: LoraOption, shapes: Mapping[str, tuple[int, ...]], spec: UNetSpec, *, allow_unmatched: bool = False) -> Lora:
    """Open a kohya LoRA and match every key of it to a weight of the model, given by canonical name and shape.

    Raises:
        AdapterError: the file is not a LoRA, is for another family, has an incomplete pair or, without `allow_unmatched`, a key that
            belongs to no module; never silent when nothing matches.
    """
    file = open_tensor_file(option.path)
    try:
        pairs, unmatched = _match(file, kohya_names([name for name in shapes if name.endswith(".weight")], spec), shapes, allow_unmatched)
        return Lora(option, file, file.sha256(), pairs, tuple(unmatched))
    except BaseException:
        file.close()
        raise


def _match(file: TensorFile, table: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], allow_unmatched: bool) -> tuple[dict[str, _Pair], list[str]]:
    kind = describe({name: entry.shape for name, entry in file.entries.items()})
    if kind != "a LoRA":
        option = "--vae" if kind == "a VAE" else "--checkpoint" if "model" in kind else ""
        fix = f"Pass it with {option}." if option else "--lora takes a kohya-format LoRA in a .safetensors file."
        raise AdapterError(f"{file.path}: expected a LoRA, found {kind}", fix)
    for suffix, name in _OTHER_KINDS.items():
        if key := next((k for k in file.entries if k.endswith(suffix)), None):
            raise AdapterError(f"{file.path}: {printable(key)}: {name}: not supported yet", "This version of sdrt fuses kohya-format LoRA.")
    modules: dict[str, set[str]] = {}
    unmatched = []
    for key in file.entries:
        part = next((p for p in _PARTS if key.endswith(p)), None)
        module = key.removesuffix(part or "")
        if part is None or module not in table:
            unmatched.append(key)
        else:
            modules.setdefault(module, set()).add(part)
    if unmatched and (not modules or not allow_unmatched):
        _refuse_unmatched(file, unmatched, modules, table)
    if not modules:
        raise AdapterError(
            f"{file.path}: no key of this LoRA belongs to this model: 0 modules would change", "Check which model it was trained for: sdrt inspect FILE"
        )
    pairs: dict[str, _Pair] = {}
    for module, parts in modules.items():
        weight = table[module]
        if weight in pairs:
            raise AdapterError(f"{file.path}: {printable(module)}: changes {weight}, which another key of the file changes too")
        pairs[weight] = _pair(file, module, parts, shapes[weight])
    return pairs, unmatched


def _refuse_unmatched(file: TensorFile, unmatched: Sequence[str], modules: Mapping[str, object], table: Mapping[str, str]) -> None:
    base = file.metadata.get("ss_base_model_version", "")
    families = {
        "lora_te1_": "SDXL",
        "lora_te2_": "SDXL",
        "lora_unet_double_blocks": "Flux",
        "lora_unet_joint_blocks": "SD3",
        "lora_transformer_": "SD3 or Flux",
    }
    family = next((f for prefix, f in families.items() if any(k.startswith(prefix) for k in unmatched)), "")
    made_for = f"; it was made for {family or printable(base)}" if family or (base and not modules) else ""
    groups = Counter(re.sub(r"\d+", "N", next((k.removesuffix(p) for p in _PARTS if k.endswith(p)), k)) for k in unmatched)
    summary = ", ".join(f"{count} x {printable(group)}" for group, count in groups.most_common(3))
    shown = ", ".join(printable(k) for k in unmatched[:_SHOWN_KEYS])
    module = next((unmatched[0].removesuffix(p) for p in _PARTS if unmatched[0].endswith(p)), unmatched[0])
    message = (
        f"{file.path}: {len(unmatched)} of {len(file.entries)} keys belong to no module of this model{made_for}: {shown}{nearest(module, table)} ({summary})"
    )
    fix = "Use a LoRA made for this checkpoint's family" + (", or pass --allow-unmatched to fuse the rest." if modules else ".")
    raise AdapterError(message, fix)


def _pair(file: TensorFile, module: str, parts: set[str], shape: tuple[int, ...]) -> _Pair:
    where = f"{file.path}: {printable(module)}"
    for part in _PARTS[:2]:
        if part not in parts:
            raise AdapterError(f"{where}: {part[1:]} is missing, the rest of the pair is there", "The LoRA is incomplete; download or train it again.")
    down, up = file.entries[module + _PARTS[0]], file.entries[module + _PARTS[1]]
    rank = down.shape[0] if down.shape else 0
    kernel = math.prod(shape[2:])
    good = (
        rank > 0
        and len(down.shape) >= 2
        and len(up.shape) >= 2
        and up.shape[0] == shape[0]
        and math.prod(up.shape[1:]) == rank
        and down.shape[1] == shape[1]
        and math.prod(down.shape[2:]) == kernel
    )
    if not good:
        dims = f"up {list(up.shape)} and down {list(down.shape)}"
        raise AdapterError(
            f"{where}: {dims} do not make a change of a weight of shape {list(shape)}",
            "The LoRA was made for a model of other sizes; use one made for this checkpoint's family.",
        )
    alpha = float(rank)
    if _PARTS[2] in parts:
        stored = file.read(module + _PARTS[2]).flatten()
        if stored.numel() != 1:
            raise AdapterError(f"{where}.alpha: expected one number, found shape {list(file.entries[module + _PARTS[2]].shape)}")
        alpha = float(stored[0])
        if not math.isfinite(alpha):
            raise AdapterError(f"{where}.alpha: expected a finite number, found {alpha}")
        alpha = alpha if alpha != 0 else float(rank)  # kohya writes 0 for "no alpha"
    return _Pair(down.name, up.name, alpha / rank)


def component(weight: str) -> str:
    """The component a canonical weight name belongs to, as reports name it."""
    return "unet" if weight.startswith(UNET) else "text_encoder" if weight.startswith(CLIP) else "vae"
