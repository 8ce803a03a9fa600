"""Hypernetworks against the formulas: every structure and activation, read, traced and folded; and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypernetwork_files as files
import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, LORA
from hypernetwork_files import Settings
from numpy.typing import NDArray
from reference import relative
from safetensors.torch import save_file
from tiny_model import regular_unet
from torch import nn

from sdrt.bundle import graphs
from sdrt.bundle.onnx_graph import read_graph
from sdrt.errors import AdapterError, InputFileError, SdrtError, UsageError
from sdrt.export.adapters.hypernetwork import (
    ACTIVATIONS,
    Hypernetwork,
    HypernetworkOption,
    attention_widths,
    open_hypernetwork,
    parse_hypernetwork_option,
)
from sdrt.export.adapters.hypernetwork_weights import attach, check_values
from sdrt.export.architecture import HypernetworkSpec, UNetSpec
from sdrt.export.graph import Recipe, bind, recipes
from sdrt.export.inspect import inspect_file
from sdrt.export.networks.unet import CrossAttention, Hypernetworks, Residual
from sdrt.export.read.checkpoint import Tensor, open_checkpoint
from sdrt.export.read.tensor_file import open_tensor_file
from sdrt.export.run_in_parts import run_in_parts
from sdrt.export.trace import trace, weight_shapes
from sdrt.export.weights import Made, write_weights

EMOJI = regular_unet((64, 96, 128, 128), (2, 2, 2, 2), (1, 1, 1, 0), 1, 64, linear=False)
SD1 = regular_unet((320, 640, 1280, 1280), (2, 2, 2, 2), (1, 1, 1, 0), 1, 768, linear=False)
SD2 = replace(SD1, context_width=1024)
SDXL = regular_unet((320, 640, 1280), (2, 2, 2), (0, 2, 10), 10, 2048, linear=True)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def opened(path: Path, unet: UNetSpec = EMOJI, scale: float = 1.0, **options: Any) -> Hypernetwork:
    return open_hypernetwork(HypernetworkOption(path, scale), unet, **options)


def refused(path: Path, *fragments: str, unet: UNetSpec = EMOJI, kind: type[SdrtError] = AdapterError) -> SdrtError:
    with pytest.raises(SdrtError) as caught:
        hypernetwork = opened(path, unet)
        with hypernetwork.file:
            check_values([hypernetwork])
    assert type(caught.value) is kind
    assert caught.value.exit_code == kind.exit_code and str(path) in caught.value.message and caught.value.fix
    for fragment in fragments:
        assert fragment in caught.value.message
    return caught.value


# The option


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("style.pt", "style.pt", 1.0),
        ("style.pt:0.7", "style.pt", 0.7),
        ("style.pt:-1", "style.pt", -1.0),
        ("style.pt:0", "style.pt", 0.0),
        ("a:b.pt:1e-2", "a:b.pt", 0.01),
        ("C:\\models\\style.pt", "C:\\models\\style.pt", 1.0),
        ("C:\\models\\style.pt:0.5", "C:\\models\\style.pt", 0.5),
    ],
)
def test_option(text: str, path: str, scale: float) -> None:
    assert parse_hypernetwork_option(text) == HypernetworkOption(Path(path), scale)


@pytest.mark.parametrize("scale", ["abc", "", "nan", "inf", "-inf", "1e9", "101", "1e-9", "0,5", "\x1b[31m"])
def test_h4_scale_that_is_none(scale: str) -> None:
    with pytest.raises(UsageError, match=r"scale .*expected a number from 0.001 to 100") as caught:
        parse_hypernetwork_option(f"style.pt:{scale}")
    assert caught.value.exit_code == 2 and caught.value.message.isprintable()


# Reading


STRUCTURES = [
    Settings(),
    Settings(structure=(1, 2, 4, 2, 1)),
    Settings(structure=(1, 1)),
    Settings(structure=(1, 1.5, 1.25, 1), activation="relu"),
    Settings(activation="relu", activate_output=False),
    Settings(layer_norm=True),
    Settings(structure=(1, 2, 2, 1), activation="mish", layer_norm=True),
    Settings(structure=(1, 2, 2, 1), activation="mish", layer_norm=True, activate_output=False),
    Settings(structure=(1, 2, 2, 1), activation="tanh", dropout=(0, 0.3, 0.05, 0)),
    Settings(structure=(1, 2, 2, 1), activation="tanh", layer_norm=True, dropout=(0, 0.3, 0.05, 0.3)),
    Settings(structure=(1, 2, 2, 1), dropout=(0, 0.3, 0, 0)),
    Settings(widths=(96,), activation=None),
]


@pytest.mark.parametrize("settings", STRUCTURES, ids=str)
def test_h1_every_structure(tmp_path: Path, settings: Settings) -> None:
    hypernetwork = opened(files.save(tmp_path / "x.pt", settings, 1), scale=0.7)
    with hypernetwork.file:
        check_values([hypernetwork])
        assert hypernetwork.linear == (settings.activation in (None, "linear") and not settings.layer_norm)
        assert hypernetwork.layers == sum(attention_widths(EMOJI)[width] for width in settings.widths)
        compare_modules([hypernetwork], [(settings, files.content(settings, 1), 0.7)], fold=False)


def made_of(tensor: Made, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.from_numpy(tensor.make(lambda name: weights[name].numpy()))


def compare_modules(chain: Sequence[Hypernetwork], reference: files.Chain, *, fold: bool) -> None:
    """The modules that would be traced, holding the values that would be stored, against the formula in float64."""
    spec, made = attach(chain, EMOJI, {}, fold=fold)
    module = Hypernetworks(spec.hypernetworks).eval()
    module.load_state_dict({name.removeprefix("hypernetworks."): made_of(tensor, {}) for name, tensor in made.items()})
    assert all(tuple(value.shape) == made["hypernetworks." + name].shape for name, value in module.state_dict().items())
    for width in (64, 96, 128, 48):
        x = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(width))
        for found, expected in zip(module(x), files.keys_and_values(reference, x.double()), strict=True):
            assert relative(found.numpy(), expected.numpy()) < 1e-6


@pytest.mark.parametrize("name", files.ACTIVATIONS)
def test_every_activation(tmp_path: Path, name: str) -> None:
    settings = Settings(widths=(64,), activation=name)
    hypernetwork = opened(files.save(tmp_path / "x.pt", settings, 2))
    with hypernetwork.file:
        compare_modules([hypernetwork], [(settings, files.content(settings, 2), 1.0)], fold=True)


def test_activations_are_all_there() -> None:
    assert ACTIVATIONS.keys() == files.ACTIVATIONS.keys()


def test_activations_are_automatic1111_s_names() -> None:
    """It takes the classes of torch.nn.modules.activation by their names in lower case."""
    for name, module in ACTIVATIONS.items():
        assert name in ("swish", "celu") or name == module.lower()
        assert getattr(nn.modules.activation, module) is getattr(nn, module)


def test_names_of_the_first_hypernetworks(tmp_path: Path) -> None:
    settings = Settings()
    old = files.content(settings, 3)
    for width in settings.widths:
        old[width] = tuple(
            {name.replace("linear.0", "linear1").replace("linear.1", "linear2"): t for name, t in part.items()}
            for part in old[width]
        )
    torch.save(
        {key: value for key, value in old.items() if isinstance(key, int) or key in ("step", "name")}, tmp_path / "x.pt"
    )
    hypernetwork = opened(tmp_path / "x.pt")
    with hypernetwork.file:
        compare_modules([hypernetwork], [(settings, files.content(settings, 3), 1.0)], fold=False)


def test_output_is_activated_where_the_file_does_not_say(tmp_path: Path) -> None:
    settings = Settings(activation="relu")
    hypernetwork = opened(files.save(tmp_path / "x.pt", settings, 4, activate_output=None, is_layer_norm=None))
    hypernetwork.file.close()
    assert hypernetwork.spec == HypernetworkSpec(((64, 128, 64), (96, 192, 96), (128, 256, 128)), "ReLU", False, True)


def test_half_precision_and_a_legacy_file(tmp_path: Path) -> None:
    settings = Settings(activation="relu")
    content = files.content(settings, 5)
    half = {
        key: tuple({n: t.half() for n, t in part.items()} for part in value) if isinstance(key, int) else value
        for key, value in content.items()
    }
    torch.save(half, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    hypernetwork = opened(tmp_path / "x.pt")
    with hypernetwork.file:
        compare_modules([hypernetwork], [(settings, half, 1.0)], fold=False)


def test_attention_widths_are_the_network_s(tmp_path: Path) -> None:
    assert attention_widths(EMOJI) == {64: 16 + 5, 96: 5, 128: 6}
    assert attention_widths(SD1) == {768: 16, 320: 5, 640: 5, 1280: 6}


def test_inspect(tmp_path: Path) -> None:
    report = inspect_file(
        files.save(
            tmp_path / "x.pt", Settings(widths=(320, 640, 768, 1280), activation="mish", structure=(1, 0.1, 1)), 1
        )
    )
    assert report["kind"] == "a hypernetwork" and report["widths"] == [320, 640, 768, 1280]
    assert (report["activation"], report["base_family"], report["layer_structure"]) == (
        "Mish",
        "Stable Diffusion 1.x",
        [1, 0.1, 1],
    )
    assert "folded" in inspect_file(files.save(tmp_path / "y.pt", Settings(), 1))["form"]


# Attached: folded and traced


def chain_of(
    folder: Path, *settings: Settings, scales: Sequence[float] = (0.7, -0.4, 1.3)
) -> tuple[list[Hypernetwork], files.Chain]:
    chain = [opened(files.save(folder / f"{i}.pt", s, 10 + i), scale=scales[i]) for i, s in enumerate(settings)]
    return chain, [(s, files.content(s, 10 + i), scales[i]) for i, s in enumerate(settings)]


LINEAR, MISH = Settings(), Settings(activation="mish")


@pytest.mark.parametrize(
    ("settings", "traced", "folded"),
    [
        ((LINEAR,), [], (64, 96, 128)),
        ((MISH,), [(64, 96, 128)], ()),
        ((LINEAR, LINEAR), [], (64, 96, 128)),
        ((MISH, LINEAR), [(64, 96, 128)], (64, 96, 128)),
        ((LINEAR, MISH), [(64, 96, 128), (64, 96, 128)], ()),
        ((LINEAR, replace(MISH, widths=(64,))), [(64,), (64,)], (96, 128)),
        (
            (replace(MISH, widths=(128,)), replace(LINEAR, widths=(64, 128)), replace(MISH, widths=(96,))),
            [(128,), (96,)],
            (64, 128),
        ),
    ],
)
def test_what_is_folded(
    tmp_path: Path, settings: tuple[Settings, ...], traced: list[tuple[int, ...]], folded: tuple[int, ...]
) -> None:
    """The linear ones that no other follows, width by width."""
    chain, reference = chain_of(tmp_path, *settings)
    names = {f"l{w}.attn2.to_{part}.weight": (32, w) for w in (64, 96, 128) for part in "kv"}
    spec, made = attach(chain, EMOJI, names)
    assert [tuple(layers[0] for layers in h.layers) for h in spec.hypernetworks] == traced and spec.biased == folded
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    module = Hypernetworks(spec.hypernetworks).eval()
    module.load_state_dict(
        {
            n.removeprefix("hypernetworks."): made_of(t, weights)
            for n, t in made.items()
            if n.startswith("hypernetworks.")
        }
    )
    for width in (64, 96, 128):
        x = torch.randn(2, 5, width, generator=generator)
        for part, inputs, expected in zip("kv", module(x), files.keys_and_values(reference, x.double()), strict=True):
            name = f"l{width}.attn2.to_{part}"
            weight, bias = (
                made_of(made[n], weights) if n in made else None for n in (name + ".weight", name + ".bias")
            )
            found = inputs @ (weights[name + ".weight"] if weight is None else weight).T + (0 if bias is None else bias)
            assert relative(found.numpy(), (expected @ weights[name + ".weight"].double().T).numpy()) < 1e-6
    for hypernetwork in chain:
        hypernetwork.file.close()


def test_h4_scale_zero_changes_nothing(tmp_path: Path) -> None:
    chain, _ = chain_of(tmp_path, LINEAR, MISH, scales=(0.0, 0.0))
    assert attach(chain, EMOJI, {"l.attn1.to_k.weight": (64, 64)}) == (EMOJI, {})
    for hypernetwork in chain:
        hypernetwork.file.close()


WIDE = regular_unet((320, 640, 1280, 1024, 64), (1, 1, 1, 1, 1), (1, 1, 1, 1, 1), 1, 768, linear=False)
WIDTHS = (64, 320, 640, 768, 1024, 1280)


class Attentions(nn.Module):
    """An attention layer for every width that models have, behind hypernetworks."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.hypernetworks = Hypernetworks(spec.hypernetworks)
        self.layers = nn.ModuleDict(
            {str(w): nn.ModuleDict({"attn2": CrossAttention(64, w, 8, biased=w in spec.biased)}) for w in WIDTHS}
        )

    def forward(
        self,
        x: torch.Tensor,
        context_64: torch.Tensor,
        context_320: torch.Tensor,
        context_640: torch.Tensor,
        context_768: torch.Tensor,
        context_1024: torch.Tensor,
        context_1280: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        contexts = (context_64, context_320, context_640, context_768, context_1024, context_1280)
        return tuple(self.layers[str(c.shape[-1])]["attn2"](x, *self.hypernetworks(c)) + x for c in contexts)  # type: ignore[index]


@dataclass(frozen=True)
class Compiled:
    """A graph of `Attentions` in each arithmetic, and the structure it was traced with."""

    spec: UNetSpec
    paths: dict[str, Path]


class Sizes:
    """One compiled chain of a nonlinear and a linear hypernetwork with networks for every width, folded as far as can
    be or not at all.
    """

    def __init__(self, folder: Path) -> None:
        self.settings = (Settings(WIDTHS, (1, 0.5, 1), "swish", layer_norm=True), Settings(WIDTHS, (1, 0.25, 1)))
        self.scales = (0.6, 1.2)
        self.reference: files.Chain = [
            (s, files.content(s, i), scale) for i, (s, scale) in enumerate(zip(self.settings, self.scales, strict=True))
        ]
        plain = Attentions(WIDE)
        generator = torch.Generator().manual_seed(7)
        self.weights = {
            name: torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1])
            for name, p in plain.named_parameters()
        }
        save_file(self.weights, folder / "base.safetensors")
        random = np.random.RandomState(8)
        self.inputs = {"x": random.standard_normal((2, 5, 64)).astype(np.float32)}
        self.inputs |= {f"context_{w}": random.standard_normal((2, 7, w)).astype(np.float32) for w in WIDTHS}
        paths = [files.save(folder / f"{i}.pt", s, i) for i, s in enumerate(self.settings)]
        chain = [opened(path, WIDE, scale) for path, scale in zip(paths, self.scales, strict=True)]
        self.folded, self.traced = (self._compile(folder / str(fold), chain, fold) for fold in (True, False))
        for hypernetwork in chain:
            hypernetwork.file.close()

    def _compile(self, folder: Path, chain: list[Hypernetwork], fold: bool) -> Compiled:
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        spec, made = attach(chain, WIDE, shapes, fold=fold)
        inputs = {name: graphs.Tensor(("n", *array.shape[1:])) for name, array in self.inputs.items()}
        signature = graphs.Signature(inputs, {f"y_{w}": graphs.Tensor(("n", 5, 64)) for w in WIDTHS})
        with torch.device("meta"):
            network = Attentions(spec)
        skeletons = trace(Recipe("step", spec, signature, {"n": 2}), network)
        paths = {}
        with open_tensor_file(folder.parent / "base.safetensors") as base:
            tensors = {name: Tensor(base, entry) for name, entry in base.entries.items()}
            for precision in ("fp32", "fp16"):
                (folder / precision).mkdir(parents=True)
                weights_file = folder / precision / "weights.safetensors"
                placed = write_weights(weights_file, tensors, [], precision, lambda done: None, made).placed
                assert placed.keys() == weight_shapes(network).keys()
                paths[precision] = folder / precision / "x.onnx"
                bind(read_graph(skeletons[precision]), weights_file, placed, precision, paths[precision])
        return Compiled(spec, paths)

    def run(self, compiled: Compiled, precision: str) -> dict[str, NDArray[Any]]:
        return run_in_parts(compiled.paths[precision], self.inputs)

    def expected(self, width: int) -> NDArray[Any]:
        """Attention over what the hypernetworks make of the context, in float64."""
        x, context = (torch.from_numpy(self.inputs[name]).double() for name in ("x", f"context_{width}"))
        keys, values = files.keys_and_values(self.reference, context)
        w = {
            name.removeprefix(f"layers.{width}.attn2."): weight.double()
            for name, weight in self.weights.items()
            if f".{width}." in name
        }
        q, k, v = (a @ w[f"to_{part}.weight"].T for part, a in (("q", x), ("k", keys), ("v", values)))
        q, k, v = (a.unflatten(-1, (8, 8)).transpose(1, 2) for a in (q, k, v))
        out = (torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), dim=-1) @ v).transpose(1, 2).flatten(2)
        return (out @ w["to_out.0.weight"].T + w["to_out.0.bias"] + x).numpy()


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Sizes:
    return Sizes(tmp_path_factory.mktemp("sizes"))


@pytest.mark.parametrize("form", ["folded", "traced"])
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2e-6), ("fp16", 1e-2)])
def test_every_width(sizes: Sizes, form: str, precision: str, limit: float) -> None:
    found = sizes.run(getattr(sizes, form), precision)
    for width in WIDTHS:
        assert relative(found[f"y_{width}"], sizes.expected(width)) < limit, width


def test_folded_is_traced(sizes: Sizes) -> None:
    assert sizes.folded.spec.biased == WIDTHS and len(sizes.folded.spec.hypernetworks) == 1
    assert sizes.traced.spec.biased == () and len(sizes.traced.spec.hypernetworks) == 2
    folded, traced = (sizes.run(compiled, "fp32") for compiled in (sizes.folded, sizes.traced))
    for name in folded:
        assert relative(folded[name], traced[name]) < 2e-6


def test_half_precision_graph_runs_in_half(sizes: Sizes) -> None:
    """Every matrix product does; the chain adds to the context in float32, since the context is."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(sizes.traced.paths["fp16"], load_external_data=False))
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    products = [
        types[node.output[0]] for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "LayerNormalization")
    ]
    assert len(products) > 50 and products.count(onnx.TensorProto.FLOAT) == 0


class EveryActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleDict(
            {
                name: Residual((64, 64, 64), HypernetworkSpec((), module, False, True))
                for name, module in ACTIVATIONS.items()
            }
        )
        self.last = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.last(network(x)) + x for network in self.all.values())


def test_every_activation_compiles(tmp_path: Path) -> None:
    recipe = Recipe(
        "step",
        None,
        graphs.Signature(
            {"x": graphs.Tensor(("n", 5, 64))}, {f"y_{name}": graphs.Tensor(("n", 5, 64)) for name in ACTIVATIONS}
        ),
        {"n": 3},
    )
    with torch.device("meta"):
        network = EveryActivation()
    skeletons = trace(recipe, network)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) / (8 if len(shape) > 1 else 1)
        for name, shape in weight_shapes(network).items()
    }
    save_file(weights, tmp_path / "base.safetensors")
    x = 4 * torch.randn(1, 5, 64, generator=generator)  # far enough out for every branch of the activations
    x[0, 0] = torch.linspace(-300, 300, 64)
    with open_tensor_file(tmp_path / "base.safetensors") as base:
        tensors = {name: Tensor(base, entry) for name, entry in base.entries.items()}
        for precision, limit in (("fp32", 1e-5), ("fp16", 5e-3)):
            (tmp_path / precision).mkdir()
            placed = write_weights(
                tmp_path / precision / "w.safetensors", tensors, [], precision, lambda done: None
            ).placed
            bind(
                read_graph(skeletons[precision]),
                tmp_path / precision / "w.safetensors",
                placed,
                precision,
                tmp_path / precision / "x.onnx",
            )
            found = run_in_parts(tmp_path / precision / "x.onnx", {"x": x.numpy()})
            for name in ACTIVATIONS:
                part = {
                    key.removeprefix(f"all.{name}.layers."): weight
                    for key, weight in weights.items()
                    if key.startswith(f"all.{name}.")
                }
                state = {f"linear.{key}": weight for key, weight in part.items()}
                out = files.apply(
                    Settings((64,), (1, 1, 1), name), state, x.double(), float(weights[f"all.{name}.scale"])
                )
                expected = out @ weights["last.weight"].double().T + weights["last.bias"].double() + x
                assert relative(found[f"y_{name}"], expected.numpy()) < limit, (precision, name)


def test_trace_knows_the_structure_not_the_values(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()

    def key(settings: Settings, seed: int, scale: float) -> str:
        hypernetwork = opened(files.save(tmp_path / f"{len(list(tmp_path.iterdir()))}.pt", settings, seed), scale=scale)
        hypernetwork.file.close()
        unet = attach([hypernetwork], checkpoint.architecture.unet, {})[0]
        return json.dumps(recipes(replace(checkpoint.architecture, unet=unet))["step"].key())

    first = key(MISH, 1, 1.0)
    assert key(MISH, 2, 0.5) == first
    others = [
        replace(MISH, widths=(64,)),
        replace(MISH, activation="relu"),
        replace(MISH, structure=(1, 3, 1)),
        replace(MISH, layer_norm=True),
    ]
    others += [replace(MISH, activate_output=False), LINEAR, replace(LINEAR, widths=(64,))]
    assert len({first, *(key(settings, 1, 1.0) for settings in others)}) == 1 + len(others)
    assert key(LINEAR, 1, 1.0) == key(
        replace(LINEAR, structure=(1, 2, 4, 2, 1)), 2, 0.3
    )  # folded: its layers are in the weights


# Refused


@pytest.mark.parametrize(
    "name",
    [
        "glu",
        "softmax",
        "multiheadattention",
        "prelu",
        "threshold",
        "mihs",
        "Mish",
        "\x1b[31m",
        "x" * 10_000,
        7,
        ["relu"],
    ],
)
def test_h1_unknown_activation(tmp_path: Path, name: object) -> None:
    error = refused(
        files.save(tmp_path / "x.pt", MISH, 1, activation_func=name), "activation_func", "unknown activation"
    )
    assert "mish" in error.fix and error.message.isprintable() and len(error.message) < 300
    if name == "mihs":
        assert "did you mean 'mish'" in error.message


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"layer_structure": [1, 4, 1]}, "layer_structure"),
        ({"layer_structure": [1, 2, 2, 1]}, "layer_structure"),
        ({"layer_structure": "1, 2, 1"}, "layer_structure"),
        ({"layer_structure": [1, math.nan, 1]}, "layer_structure"),
        ({"layer_structure": [1, 1e308, 1]}, "layer_structure"),
        ({"is_layer_norm": True}, "is_layer_norm"),
        ({"activation_func": "linear"}, "activation_func"),
        ({"activation_func": None}, "activation_func"),
    ],
)
def test_h1_settings_that_the_tensors_contradict(tmp_path: Path, changed: dict[str, Any], field: str) -> None:
    refused(files.save(tmp_path / "x.pt", MISH, 1, **changed), field)


def test_activation_that_the_tensors_have_no_room_for(tmp_path: Path) -> None:
    refused(files.save(tmp_path / "x.pt", LINEAR, 1, activation_func="relu"), "activation_func", "no room")


def changed_tensors(path: Path, change: Any) -> Path:
    content = files.content(MISH, 1)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[64][0].pop("linear.0.bias"), "expected a weight and a bias"),
        (lambda c: c[64][1].update({"linear.2.weight": torch.zeros(64, 100)}), "do not follow"),
        (
            lambda c: c[64][1].update({"linear.2.weight": torch.zeros(60, 128), "linear.2.bias": torch.zeros(60)}),
            "last layer is 60 wide, expected 64",
        ),
        (lambda c: c[64][0].update({"linear.0.weight": torch.zeros(128, 64, dtype=torch.int64)}), "found I64"),
        (lambda c: c.update({64: c[64][:1]}), "the network for values is missing"),
        (lambda c: c[64][0].update({"norm.weight": torch.ones(64)}), "belongs to no layer"),
        (lambda c: c.update({"extra": {"x": torch.ones(64)}}), "belongs to no layer"),
        (
            lambda c: c[64][0].update({"linear.4.weight": torch.ones(64), "linear.4.bias": torch.ones(64)}),
            "1 norms for 2 layers",
        ),
        (lambda c: c.update({96: files.content(replace(MISH, structure=(1, 3, 1)), 1)[96]}), "layer_structure"),
    ],
)
def test_tensors_that_make_no_network(tmp_path: Path, change: Any, message: str) -> None:
    refused(changed_tensors(tmp_path / "x.pt", change), message)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_value_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    refused(
        changed_tensors(tmp_path / "x.pt", lambda c: c[96][1]["linear.2.bias"].__setitem__(3, bad)),
        "96.1.linear.2.bias",
        "1 of 96 values",
    )


def test_hypernetwork_that_does_nothing(tmp_path: Path) -> None:
    def silence(content: dict[Any, Any]) -> None:
        for width in (64, 96, 128):
            for part in content[width]:
                part["linear.2.weight"].zero_()
                part["linear.2.bias"].zero_()

    refused(changed_tensors(tmp_path / "x.pt", silence), "does nothing")


def test_given_twice(tmp_path: Path) -> None:
    path = files.save(tmp_path / "x.pt", MISH, 1)
    chain = [opened(path, scale=scale) for scale in (0.5, 1.0)]
    with pytest.raises(UsageError, match="given twice"):
        check_values(chain)
    for hypernetwork in chain:
        hypernetwork.file.close()


@pytest.mark.parametrize(
    ("widths", "unet", "family"),
    [
        ((320, 640, 768, 1280), EMOJI, "Stable Diffusion 1.x"),
        ((320, 640, 1024, 1280), SD1, "Stable Diffusion 2.x"),
        ((320, 768), SD2, "Stable Diffusion 1.x"),
        ((320, 640, 768, 1280), SDXL, "Stable Diffusion 1.x"),
    ],
)
def test_h2_hypernetwork_for_another_family(
    tmp_path: Path, widths: tuple[int, ...], unet: UNetSpec, family: str
) -> None:
    path = files.save(tmp_path / "x.pt", Settings(widths, (1, 0.1, 1)), 1)
    refused(path, ", ".join(map(str, widths)), family, str(unet.context_width), unet=unet)
    if unet is not EMOJI:
        hypernetwork = opened(path, unet, allow_unmatched=True)
        hypernetwork.file.close()
        assert hypernetwork.unmatched and {layers[0] for layers in hypernetwork.spec.layers} == set(widths) - set(
            hypernetwork.unmatched
        )


def test_h2_widths_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    hypernetwork = opened(files.save(tmp_path / "x.pt", Settings((320, 768, 1024), (1, 0.1, 1)), 1), SD1)
    hypernetwork.file.close()
    assert (
        hypernetwork.unmatched == (1024,)
        and [layers[0] for layers in hypernetwork.spec.layers] == [320, 768]
        and hypernetwork.layers == 21
    )


@pytest.mark.parametrize(
    ("path", "found", "fix"), [(LORA, "a LoRA", "--lora"), (CHECKPOINT, "a Stable Diffusion 1.x model", "--checkpoint")]
)
def test_another_file_given_as_a_hypernetwork(path: Path, found: str, fix: str) -> None:
    assert fix in refused(path, f"expected a hypernetwork, found {found}").fix


def test_h3_optimizer_state_beside_it(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"not a file of torch")
    refused(tmp_path / "x.pt", kind=InputFileError)
