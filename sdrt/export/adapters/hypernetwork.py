"""Reads the structure of hypernetworks (AUTOMATIC1111, modules/hypernetworks) and checks that they fit a UNet. Imports
no torch.

A hypernetwork has two small networks for each of some widths. In every attention layer with a context of that width,
keys are made from n_k(context) and values from n_v(context), where n(x) = x + scale * layers(x). The context of
self-attention is its own input. `sdrt.export.adapters.hypernetwork_weights` handles the values.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdrt.errors import AdapterError, UsageError, nearest, printable
from sdrt.export.adapters.match import how_to_give
from sdrt.export.architecture import HypernetworkSpec, UNetSpec
from sdrt.export.families.recognise import HYPERNETWORK as KIND
from sdrt.export.families.recognise import HYPERNETWORK_KEY, describe
from sdrt.export.families.table import CONTEXTS
from sdrt.export.read.tensor_entry import FLOATS
from sdrt.export.read.tensor_file import TensorFile, open_tensor_file

ACTIVATIONS = {
    "relu": "ReLU",
    "leakyrelu": "LeakyReLU",
    "elu": "ELU",
    "swish": "Hardswish",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "celu": "ELU",
    "gelu": "GELU",
    "hardshrink": "Hardshrink",
    "hardsigmoid": "Hardsigmoid",
    "hardswish": "Hardswish",
    "hardtanh": "Hardtanh",
    "logsigmoid": "LogSigmoid",
    "mish": "Mish",
    "relu6": "ReLU6",
    "rrelu": "RReLU",
    "selu": "SELU",
    "silu": "SiLU",
    "softplus": "Softplus",
    "softshrink": "Softshrink",
    "softsign": "Softsign",
    "tanhshrink": "Tanhshrink",
}
"""AUTOMATIC1111's names to classes of torch.nn: every activation that works elementwise and learns nothing.
AUTOMATIC1111's swish is Hardswish. CELU and ELU differ only in a parameter that AUTOMATIC1111 leaves at 1.
"""
SMALLEST, LARGEST = 0.001, 100.0
_LEGACY = {"linear1": "linear.0", "linear2": "linear.1"}
PARTS = ("k", "v")
AGAIN = "Get the hypernetwork again, or train it again."


@dataclass(frozen=True)
class HypernetworkOption:
    """A `--hypernetwork` argument. `scale` multiplies the output of the added layers."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class Hypernetwork:
    """An opened hypernetwork that fits a model. `spec` covers the widths that the model has. `names` gives, by width
    and part, the file's tensors in the order of the layers, weight before bias. `unmatched` holds widths that no
    attention layer has. `layers` counts the attention layers that it changes.
    """

    option: HypernetworkOption
    file: TensorFile
    sha256: str
    spec: HypernetworkSpec
    names: Mapping[tuple[int, str], tuple[str, ...]]
    unmatched: tuple[int, ...]
    layers: int

    @property
    def linear(self) -> bool:
        return self.spec.activation is None and not self.spec.layer_norm


def parse_hypernetwork_option(text: str) -> HypernetworkOption:
    """Parse `FILE[:SCALE]`. A colon inside the path (`C:\\x`, an existing `a:b.pt`) belongs to the path.

    Raises:
        UsageError: the scale is not a number of a useful size.
    """
    match = re.fullmatch(r"(.+):([^:/\\]*)", text, re.DOTALL)
    if match is None or os.path.exists(text):
        return HypernetworkOption(Path(text))
    try:
        scale = float(match[2])
    except ValueError:
        scale = math.nan
    if scale != 0 and not SMALLEST <= abs(scale) <= LARGEST:  # False also for NaN
        raise UsageError(
            f"--hypernetwork {printable(text)}: scale {printable(match[2])!r}: expected a number from {SMALLEST:g} to"
            f" {LARGEST:g}, its negative, or 0",
            "Write it as --hypernetwork style.pt:0.8.",
        )
    return HypernetworkOption(Path(match[1]), scale)


def attention_widths(unet: UNetSpec) -> Counter[int]:
    """Input widths of the keys and values, with the number of attention layers of each width."""
    widths: Counter[int] = Counter()
    levels = zip(unet.channels, unet.down_depth, unet.up_depth, strict=True)
    depths = [(channels, sum(down) + sum(up)) for channels, down, up in levels]
    for channels, blocks in [*depths, (unet.channels[-1], unet.middle or 0)]:
        if blocks:
            widths[channels] += blocks
            widths[unet.context_width] += blocks
    return widths


def open_hypernetwork(option: HypernetworkOption, unet: UNetSpec, *, allow_unmatched: bool = False) -> Hypernetwork:
    """Open a hypernetwork. Check its structure, and that it fits a UNet. Reads headers and settings only.

    Widths that the model lacks are left out. A hypernetwork for another family's context is refused, unless
    `allow_unmatched` is set.

    Raises:
        AdapterError: the file is no hypernetwork, its settings and tensors disagree, its activation is unknown, or it
            is for another model.
        InputFileError: the file is malformed.
    """
    file = open_tensor_file(option.path)
    try:
        spec, names = read_structure(file)
        widths, known = [layers[0] for layers in spec.layers], attention_widths(unet)
        unmatched = tuple(width for width in widths if width not in known)
        if unmatched and (len(unmatched) == len(widths) or not (unet.context_width in widths or allow_unmatched)):
            family = next((CONTEXTS[width] for width in unmatched if width in CONTEXTS), "")
            raise AdapterError(
                f"{file.path}: has networks for contexts {_words(widths)} wide, expected some of"
                f" {_words(sorted(known))}" + (f"; it was made for {family}" if family else ""),
                "Use a hypernetwork made for this checkpoint's family"
                + (", or pass --allow-unmatched to apply the rest." if len(unmatched) < len(widths) else "."),
            )
        fitting = replace(spec, layers=tuple(layers for layers in spec.layers if layers[0] in known))
        touched = sum(known[layers[0]] for layers in fitting.layers)
        return Hypernetwork(option, file, file.sha256(), fitting, names, unmatched, touched)
    except BaseException:
        file.close()
        raise


def read_structure(file: TensorFile) -> tuple[HypernetworkSpec, dict[tuple[int, str], tuple[str, ...]]]:
    """A hypernetwork's structure, from its settings and the shapes of its tensors; and the names of its tensors by
    width and part.

    Raises:
        AdapterError: the file is no hypernetwork, or settings and tensors disagree.
    """
    kind = describe({name: entry.shape for name, entry in file.entries.items()})
    if kind != KIND:
        raise AdapterError(
            f"{file.path}: expected {KIND}, found {kind}",
            how_to_give(kind) or "--hypernetwork takes AUTOMATIC1111's .pt files.",
        )
    settings = _settings(file)
    activation = _activation(file, settings)
    networks: dict[tuple[int, str], dict[int, dict[str, str]]] = {}
    for name in file.entries:
        match = HYPERNETWORK_KEY.fullmatch(name)
        parts = re.fullmatch(r"linear\.(\d+)\.(weight|bias)", _modern(match[3])) if match else None
        if match is None or parts is None:
            raise AdapterError(f"{file.path}: {printable(name)}: belongs to no layer of a hypernetwork", AGAIN)
        networks.setdefault((int(match[1]), PARTS[int(match[2])]), {}).setdefault(int(parts[1]), {})[parts[2]] = name
    layers: dict[int, tuple[int, ...]] = {}
    names: dict[tuple[int, str], tuple[str, ...]] = {}
    norms: set[bool] = set()
    for (width, part), by_index in sorted(networks.items()):
        widths, has_norms = _network(file, width, by_index, activation, settings)
        norms.add(has_norms)
        if layers.setdefault(width, widths) != widths:
            raise AdapterError(
                f"{file.path}: {width}: the network for keys has layers {_words(layers[width])} wide, the one for"
                f" values {_words(widths)}",
                AGAIN,
            )
        names[width, part] = tuple(by_index[i][kind] for i in sorted(by_index) for kind in ("weight", "bias"))
    for width in layers:
        if missing := [part for part in PARTS if (width, part) not in names]:
            raise AdapterError(
                f"{file.path}: {width}: the network for {'keys' if missing[0] == 'k' else 'values'} is missing", AGAIN
            )
    stated = bool(settings.get("is_layer_norm", norms == {True}))
    if norms != {stated}:
        raise AdapterError(
            f"{file.path}: is_layer_norm: expected {not stated}, which the tensors say, found {stated}", AGAIN
        )
    spec = HypernetworkSpec(
        tuple(layers.values()),
        activation,
        stated,
        activation is not None and bool(settings.get("activate_output", True)),
    )
    return spec, names


def _settings(file: TensorFile) -> Mapping[str, Any]:
    tree = getattr(file, "tree", None)
    return {key: value for key, value in tree.items() if isinstance(key, str)} if isinstance(tree, Mapping) else {}


def _activation(file: TensorFile, settings: Mapping[str, Any]) -> str | None:
    name = settings.get("activation_func")
    if name is None or name == "linear":
        return None
    if not isinstance(name, str) or name not in ACTIVATIONS:
        shown = printable(str(name)[:80])
        raise AdapterError(
            f"{file.path}: activation_func: unknown activation {shown!r}{nearest(shown, ACTIVATIONS)}",
            f"sdrt knows linear, {', '.join(ACTIVATIONS)}.",
        )
    return ACTIVATIONS[name]


def _modern(key: str) -> str:
    """Rename linear1 and linear2, as the first hypernetworks called their layers."""
    first, _, rest = key.partition(".")
    return f"{_LEGACY[first]}.{rest}" if first in _LEGACY else key


def _network(
    file: TensorFile,
    width: int,
    by_index: Mapping[int, Mapping[str, str]],
    activation: str | None,
    settings: Mapping[str, Any],
) -> tuple[tuple[int, ...], bool]:
    """The widths along one network, and whether each layer has a norm after it. Indices also count activations and
    dropouts, which hold no tensors.
    """
    linears, norms, widths = list[int](), list[int](), [width]
    for index in sorted(by_index):
        where = f"{file.path}: {printable(next(iter(by_index[index].values())))}"
        if by_index[index].keys() != {"weight", "bias"}:
            raise AdapterError(f"{where}: expected a weight and a bias, found one of them", AGAIN)
        weight, bias = (file.entries[by_index[index][kind]] for kind in ("weight", "bias"))
        for entry in (weight, bias):
            if entry.dtype not in FLOATS:
                raise AdapterError(
                    f"{file.path}: {printable(entry.name)}: expected one of {', '.join(FLOATS)}, found {entry.dtype}",
                    AGAIN,
                )
        if (
            len(weight.shape) == 2
            and weight.shape[1] == widths[-1]
            and weight.shape[0]
            and bias.shape == weight.shape[:1]
        ):
            linears.append(index)
            widths.append(weight.shape[0])
        elif weight.shape == bias.shape == (widths[-1],) and linears and (not norms or norms[-1] < linears[-1]):
            norms.append(index)
        else:
            raise AdapterError(
                f"{where}: weight {list(weight.shape)} and bias {list(bias.shape)} do not follow a layer {widths[-1]}"
                " wide",
                AGAIN,
            )
    if widths[-1] != width:
        raise AdapterError(f"{file.path}: {width}: the last layer is {widths[-1]} wide, expected {width}", AGAIN)
    if norms and len(norms) != len(linears):
        raise AdapterError(
            f"{file.path}: {width}: {len(norms)} norms for {len(linears)} layers, expected one for each or none", AGAIN
        )
    _check_settings(file, width, widths, activation, settings)
    dropout = bool(settings.get("use_dropout") or settings.get("dropout_structure"))
    for first, second in itertools.pairwise(linears):
        spare = second - first - 1 - bool(norms) - (activation is not None)
        if spare < 0 or spare > dropout:
            between = "leave no room for one" if spare < 0 else "have something else between two layers"
            stated = printable(str(settings.get("activation_func")))
            raise AdapterError(f"{file.path}: activation_func: {stated}, but the tensors of {width} {between}", AGAIN)
    return tuple(widths), bool(norms)


def _check_settings(
    file: TensorFile, width: int, widths: Sequence[int], activation: str | None, settings: Mapping[str, Any]
) -> None:
    stated = settings.get("layer_structure")
    if stated is None:
        return
    good = isinstance(stated, (list, tuple)) and all(isinstance(n, (int, float)) and 0 < n <= 1000 for n in stated)
    if not good or [int(width * n) for n in stated] != list(widths):
        found = _words([n / width for n in widths])
        raise AdapterError(
            f"{file.path}: layer_structure: {printable(str(stated)[:80])}, but the tensors of {width} are {found} times"
            " as wide",
            AGAIN,
        )


def _words(numbers: Sequence[float]) -> str:
    return ", ".join(f"{n:g}" for n in numbers)


def summary(file: TensorFile) -> dict[str, Any]:
    """The part of `inspect` about a hypernetwork: its widths, layers, activation and family.

    Raises:
        AdapterError: settings and tensors disagree.
    """
    spec, _ = read_structure(file)
    widths = [layers[0] for layers in spec.layers]
    return {
        "use": "--hypernetwork FILE[:SCALE]",
        "widths": widths,
        "layer_structure": _settings(file).get("layer_structure") or [n / widths[0] for n in spec.layers[0]],
        "activation": spec.activation or "none",
        "layer_norm": spec.layer_norm,
        "activate_output": spec.activate_output,
        "form": (
            "linear: folded into the weights of keys and values"
            if spec.activation is None and not spec.layer_norm
            else "traced into the UNet"
        ),
        "base_family": ", ".join(CONTEXTS[width] for width in widths if width in CONTEXTS) or "unknown",
    }
