"""The effect of hypernetworks on a UNet's tensors in the bundle: folded into the weights of keys and values, or traced
in.

A linear hypernetwork at the end of its width's chain is folded: with n(x) = M x + b, to_k(n(x)) = (W M) x + W b. All
others become part of the trace, as `sdrt.export.networks.unet.Hypernetworks`. Their values are weights like any other;
the trace knows only their structure.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from sdrt.errors import AdapterError, UsageError, printable
from sdrt.export.adapters.hypernetwork import AGAIN, PARTS, Hypernetwork
from sdrt.export.architecture import UNetSpec
from sdrt.export.networks.unet import Residual
from sdrt.export.weights import Made

Fused = Callable[[str], torch.Tensor]


def check_values(hypernetworks: Sequence[Hypernetwork]) -> None:
    """Read all values once and check them.

    Raises:
        UsageError: a file was given twice.
        AdapterError: a value is NaN or infinite, or a hypernetwork changes nothing.
    """
    known: dict[str, Hypernetwork] = {}
    for hypernetwork in hypernetworks:
        path, active = hypernetwork.file.path, False
        if (other := known.setdefault(hypernetwork.sha256, hypernetwork)) is not hypernetwork:
            raise UsageError(
                f"--hypernetwork {path}: given twice, as {other.file.path} too",
                "Give it once, with the scale you want.",
            )
        for layers, part in itertools.product(hypernetwork.spec.layers, PARTS):
            network = _network(hypernetwork, layers, part)
            for (_, value), name in zip(
                network.layers.named_parameters(), hypernetwork.names[layers[0], part], strict=True
            ):
                if bad := int((~torch.isfinite(value)).sum()):
                    raise AdapterError(
                        f"{path}: {printable(name)}: {bad} of {value.numel()} values are NaN or infinite", AGAIN
                    )
            with torch.inference_mode():
                active = active or bool(
                    network.layers(torch.randn(4, layers[0], generator=torch.Generator().manual_seed(0))).any()
                )
        if not active:
            raise AdapterError(
                f"{path}: adds nothing to any input: the hypernetwork does nothing", "Train it longer, or leave it out."
            )


def _network(hypernetwork: Hypernetwork, layers: tuple[int, ...], part: str) -> Residual:
    with torch.device("meta"):
        network = Residual(layers, hypernetwork.spec).eval()
    values = (hypernetwork.file.read(name).to(torch.float32) for name in hypernetwork.names[layers[0], part])
    state = dict(zip(dict(network.layers.named_parameters()), values, strict=True))
    network.layers.load_state_dict(state, assign=True)
    return network


def attach(
    hypernetworks: Sequence[Hypernetwork], unet: UNetSpec, shapes: Mapping[str, tuple[int, ...]], *, fold: bool = True
) -> tuple[UNetSpec, dict[str, Made]]:
    """Apply hypernetworks, in order, to a UNet whose weights have `shapes`. Returns the UNet's structure, and the
    tensors that change or are new.

    For each width, a linear hypernetwork is folded unless a non-linear one comes after it; all others are traced. Scale
    0 leaves a hypernetwork out.
    """
    acting = [h for h in hypernetworks if h.option.scale != 0]
    folded: dict[int, list[Hypernetwork]] = {}
    traced: list[tuple[Hypernetwork, list[tuple[int, ...]]]] = [(h, []) for h in acting]
    blocked: set[int] = set()
    for hypernetwork, kept in reversed(traced):
        for layers in hypernetwork.spec.layers:
            if fold and hypernetwork.linear and layers[0] not in blocked:
                folded.setdefault(layers[0], []).insert(0, hypernetwork)
            else:
                blocked.add(layers[0])
                kept.append(layers)
    traced = [(h, kept) for h, kept in traced if kept]
    made: dict[str, Made] = {}
    for index, (hypernetwork, kept) in enumerate(traced):
        for layers, part in itertools.product(kept, PARTS):
            made |= _traced_tensors(f"hypernetworks.{index}.{layers[0]}.{part}.", hypernetwork, layers, part)
    for width, chain in folded.items():
        for part in PARTS:
            made |= _folded_tensors(width, part, chain, shapes)
    structure = tuple(replace(h.spec, layers=tuple(kept)) for h, kept in traced)
    return replace(unet, hypernetworks=structure, biased=tuple(sorted(folded))), made


def _traced_tensors(prefix: str, hypernetwork: Hypernetwork, layers: tuple[int, ...], part: str) -> dict[str, Made]:
    file, path, scale = hypernetwork.file, hypernetwork.file.path, hypernetwork.option.scale

    def reader(name: str) -> Callable[[Fused], torch.Tensor]:
        return lambda fused: file.read(name).to(torch.float32)

    with torch.device("meta"):
        parameters = dict(Residual(layers, hypernetwork.spec).layers.named_parameters(prefix="layers"))
    made = {prefix + "scale": Made((1,), path, lambda fused: torch.full((1,), scale))}
    for (parameter, value), name in zip(parameters.items(), hypernetwork.names[layers[0], part], strict=True):
        made[prefix + parameter] = Made(tuple(value.shape), path, reader(name))
    return made


def _folded_tensors(
    width: int, part: str, chain: Sequence[Hypernetwork], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Made]:
    known: list[tuple[torch.Tensor, torch.Tensor]] = []

    def affine() -> tuple[torch.Tensor, torch.Tensor]:
        """The whole chain as M and b in float64, computed once."""
        if not known:
            matrix, bias = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
            for hypernetwork in chain:
                m, b = matrix, bias
                values = [hypernetwork.file.read(name).to(torch.float64) for name in hypernetwork.names[width, part]]
                for weight, offset in zip(values[::2], values[1::2], strict=True):
                    m, b = weight @ m, weight @ b + offset
                matrix, bias = matrix + hypernetwork.option.scale * m, bias + hypernetwork.option.scale * b
            known.append((matrix, bias))
        return known[0]

    def folded_weight(weight: str) -> Callable[[Fused], torch.Tensor]:
        return lambda fused: (fused(weight).to(torch.float64) @ affine()[0]).to(torch.float32)

    def folded_bias(weight: str) -> Callable[[Fused], torch.Tensor]:
        return lambda fused: (fused(weight).to(torch.float64) @ affine()[1]).to(torch.float32)

    path, made = chain[-1].file.path, {}
    for weight in [
        name
        for name, shape in shapes.items()
        if re.search(rf"\.attn[12]\.to_{part}\.weight$", name) and shape[1] == width
    ]:
        made[weight] = Made(shapes[weight], path, folded_weight(weight))
        made[weight.removesuffix("weight") + "bias"] = Made(shapes[weight][:1], path, folded_bias(weight))
    return made
