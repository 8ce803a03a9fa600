"""The effect of hypernetworks on a UNet's tensors in the bundle: folded into the weights of keys and values, or traced
in.

A linear hypernetwork at the end of its width's chain is folded: with n(x) = M x + b, to_k(n(x)) = (W M) x + W b. All
others become part of the trace, as `sdrt.export.networks.unet.Hypernetworks`. Their values are weights like any other;
the trace knows only their structure. Imports torch only to check one that is not linear.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdrt.errors import AdapterError, MachineError, UsageError, printable
from sdrt.export.adapters.hypernetwork import AGAIN, PARTS, Hypernetwork
from sdrt.export.architecture import HypernetworkSpec, UNetSpec
from sdrt.export.floats import Array, as_float32, is_finite
from sdrt.export.weights import Made
from sdrt.machine.packages import install_command

Fused = Callable[[str], Array]


def check_values(hypernetworks: Sequence[Hypernetwork]) -> None:
    """Read all values once and check them.

    Raises:
        UsageError: a file was given twice.
        AdapterError: a value is NaN or infinite, or a hypernetwork changes nothing.
        MachineError: a hypernetwork is not linear, and torch is not installed.
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
            values = []
            for name in hypernetwork.names[layers[0], part]:
                values.append(as_float32(hypernetwork.file.read(name)))
                if not is_finite(values[-1]):
                    bad = int((~np.isfinite(values[-1])).sum())
                    raise AdapterError(
                        f"{path}: {printable(name)}: {bad} of {values[-1].size} values are NaN or infinite", AGAIN
                    )
            active = active or bool(_added(hypernetwork, layers, values).any())
        if not active:
            raise AdapterError(
                f"{path}: adds nothing to any input: the hypernetwork does nothing", "Train it longer, or leave it out."
            )


def _added(hypernetwork: Hypernetwork, layers: tuple[int, ...], values: Sequence[Array]) -> Array:
    """What a network with these values adds to some inputs, before its scale."""
    x = np.random.RandomState(0).standard_normal((4, layers[0])).astype(np.float32)
    if hypernetwork.linear:
        with np.errstate(all="ignore"):  # an overflow is not nothing
            for weight, bias in zip(values[::2], values[1::2], strict=True):
                x = x @ weight.T + bias
        return x
    try:
        import torch

        from sdrt.export.networks.unet import Residual
    except ImportError as error:
        raise MachineError(
            f"{hypernetwork.file.path}: a hypernetwork that is not linear is traced, which needs PyTorch",
            f"Install it with: {install_command('build')}",
        ) from error
    with torch.device("meta"):
        network = Residual(layers, hypernetwork.spec).eval().layers
    state = zip(_parameters(layers, hypernetwork.spec), map(torch.from_numpy, values), strict=True)
    network.load_state_dict(dict(state), assign=True)
    with torch.inference_mode():
        result: Array = network(torch.from_numpy(x)).numpy()
    return result


def _parameters(layers: tuple[int, ...], spec: HypernetworkSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of `Residual.layers`, in their order."""
    found: dict[str, tuple[int, ...]] = {}
    modules = 0  # activations have a number too
    for i, (width, following) in enumerate(itertools.pairwise(layers), 1):
        found |= {f"{modules}.weight": (following, width), f"{modules}.bias": (following,)}
        modules += 1 + (spec.activation is not None and (i < len(layers) - 1 or spec.activate_output))
        if spec.layer_norm:
            found |= {f"{modules}.weight": (following,), f"{modules}.bias": (following,)}
            modules += 1
    return found


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

    def reader(name: str) -> Callable[[Fused], Array]:
        return lambda fused: as_float32(file.read(name))

    made = {prefix + "scale": Made((1,), path, lambda fused: np.full(1, scale, np.float32))}
    parameters = _parameters(layers, hypernetwork.spec)
    for (parameter, shape), name in zip(parameters.items(), hypernetwork.names[layers[0], part], strict=True):
        made[f"{prefix}layers.{parameter}"] = Made(shape, path, reader(name))
    return made


def _folded_tensors(
    width: int, part: str, chain: Sequence[Hypernetwork], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Made]:
    known: list[tuple[Array, Array]] = []

    def affine() -> tuple[Array, Array]:
        """The whole chain as M and b in float64, computed once."""
        if not known:
            matrix, bias = np.eye(width), np.zeros(width)
            for hypernetwork in chain:
                m, b = matrix, bias
                values = [hypernetwork.file.read(name).astype(np.float64) for name in hypernetwork.names[width, part]]
                for weight, offset in zip(values[::2], values[1::2], strict=True):
                    m, b = weight @ m, weight @ b + offset
                matrix, bias = matrix + hypernetwork.option.scale * m, bias + hypernetwork.option.scale * b
            known.append((matrix, bias))
        return known[0]

    def folded_weight(weight: str) -> Callable[[Fused], Array]:
        return lambda fused: as_float32(fused(weight).astype(np.float64) @ affine()[0])

    def folded_bias(weight: str) -> Callable[[Fused], Array]:
        return lambda fused: as_float32(fused(weight).astype(np.float64) @ affine()[1])

    path, made = chain[-1].file.path, {}
    for weight in [
        name
        for name, shape in shapes.items()
        if re.search(rf"\.attn[12]\.to_{part}\.weight$", name) and shape[1] == width
    ]:
        made[weight] = Made(shapes[weight], path, folded_weight(weight))
        made[weight.removesuffix("weight") + "bias"] = Made(shapes[weight][:1], path, folded_bias(weight))
    return made
