"""What each kind of adapter adds to a weight, against the modules of LyCORIS and peft that train them, and plain
formulas in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapter_files import (
    EMBEDDING,
    KERNEL,
    LAYER_NORM,
    LINEAR,
    NORM,
    POINTWISE,
    SQUARE,
    change_of,
    model,
    opened,
    randomised,
    relative,
)
from safetensors.torch import save_file
from torch import nn

Module = tuple[str, str]


def layer(module: Module) -> nn.Module:
    """A seeded torch layer of the sizes of a module of the emoji model, in float64 with values that float32 holds."""
    shape = model()[0][f"{module[0]}.weight"]
    bias = f"{module[0]}.bias" in model()[0]
    if len(shape) == 4:
        made: nn.Module = nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2, bias=bias)
    elif module is EMBEDDING:
        made = nn.Embedding(*shape)
    elif len(shape) == 2:
        made = nn.Linear(shape[1], shape[0], bias=bias)
    else:
        made = nn.LayerNorm(shape[0]) if module is LAYER_NORM else nn.GroupNorm(32, shape[0])
    return randomised(made, 7).double()


def effective_weight(forward: Callable[[torch.Tensor], torch.Tensor], base: nn.Module) -> torch.Tensor:
    """The weight of a linear map or a convolution, found by what it makes of unit inputs."""
    shape = base.weight.shape
    zero = torch.zeros(1, shape[1], *([3, 3] if len(shape) == 4 else []), dtype=torch.float64)
    with torch.no_grad():
        if len(shape) == 2:
            return (forward(torch.eye(shape[1], dtype=torch.float64)) - forward(zero)).T
        impulse = torch.zeros(shape[1], shape[1], 3, 3, dtype=torch.float64)
        impulse[range(shape[1]), range(shape[1]), 1, 1] = 1
        answer = (forward(impulse) - forward(zero)).transpose(0, 1)  # out, in, and the kernel turned round its middle
        return answer.flip(2, 3) if shape[2] == 3 else answer[:, :, 1:2, 1:2]


def saved(path: Path, module: str, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file({f"{module}.{part}": tensor.detach().float().contiguous() for part, tensor in tensors.items()}, path)
    return path


def change(path: Path, weight: str, current: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    adapter = opened(path, scale)
    with adapter.file:
        return change_of(adapter, weight, current.detach().float())


# LyCORIS

LYCORIS: dict[str, tuple[str, Module, dict[str, Any]]] = {
    "LoRA linear": ("LoConModule", LINEAR, {}),
    "LoRA 1x1": ("LoConModule", POINTWISE, {}),
    "LoRA 3x3": ("LoConModule", KERNEL, {}),
    "LoRA rank-stabilised": ("LoConModule", LINEAR, {"rs_lora": True}),
    "LoCon with mid": ("LoConModule", KERNEL, {"use_tucker": True}),
    "LoHa linear": ("LohaModule", LINEAR, {}),
    "LoHa 1x1": ("LohaModule", POINTWISE, {}),
    "LoHa 3x3": ("LohaModule", KERNEL, {}),
    "LoHa tucker": ("LohaModule", KERNEL, {"use_tucker": True}),
    "LoKr linear": ("LokrModule", LINEAR, {"factor": 4}),
    "LoKr both factored": ("LokrModule", LINEAR, {"lora_dim": 2, "decompose_both": True}),
    "LoKr both whole": ("LokrModule", LINEAR, {"full_matrix": True}),
    "LoKr both whole by rank": ("LokrModule", LINEAR, {"lora_dim": 1000}),
    "LoKr 1x1": ("LokrModule", POINTWISE, {"lora_dim": 2}),
    "LoKr 3x3": ("LokrModule", KERNEL, {"lora_dim": 2, "factor": 4}),
    "LoKr 3x3 both whole": ("LokrModule", KERNEL, {"full_matrix": True}),
    "LoKr tucker": ("LokrModule", KERNEL, {"lora_dim": 2, "factor": 4, "use_tucker": True}),
    "LoKr tucker both factored": ("LokrModule", KERNEL, {"lora_dim": 2, "use_tucker": True, "decompose_both": True}),
    "DoRA by outputs": ("LoConModule", LINEAR, {"weight_decompose": True, "wd_on_out": True}),
    "DoRA by inputs": ("LoConModule", LINEAR, {"weight_decompose": True, "wd_on_out": False}),
    "DoRA by outputs, square": ("LoConModule", SQUARE, {"weight_decompose": True, "wd_on_out": True}),
    "DoRA by inputs, square": ("LoConModule", SQUARE, {"weight_decompose": True, "wd_on_out": False}),
    "DoRA 3x3 by outputs": ("LoConModule", KERNEL, {"weight_decompose": True, "wd_on_out": True}),
    "DoRA 3x3 by inputs": ("LoConModule", KERNEL, {"weight_decompose": True, "wd_on_out": False}),
    "DoRA 1x1 square by inputs": ("LoConModule", POINTWISE, {"weight_decompose": True, "wd_on_out": False}),
    "DoRA with mid": ("LoConModule", KERNEL, {"use_tucker": True, "weight_decompose": True}),
    "DoRA LoHa": ("LohaModule", LINEAR, {"weight_decompose": True, "wd_on_out": False}),
    "DoRA LoHa tucker": ("LohaModule", KERNEL, {"use_tucker": True, "weight_decompose": True}),
    "DoRA LoKr": ("LokrModule", LINEAR, {"factor": 4, "weight_decompose": True}),
    "DoRA LoKr tucker by inputs": (
        "LokrModule",
        KERNEL,
        {"lora_dim": 2, "factor": 4, "use_tucker": True, "weight_decompose": True, "wd_on_out": False},
    ),
}


@pytest.mark.parametrize(("kind", "module", "options"), LYCORIS.values(), ids=LYCORIS.keys())
def test_l6_change_is_lycoris_own(tmp_path: Path, kind: str, module: Module, options: dict[str, Any]) -> None:
    import lycoris

    base = layer(module)
    theirs = randomised(
        getattr(lycoris, kind)("name", base, **({"lora_dim": 4, "alpha": 2.0} | options)), 11, keep=("alpha", "scalar")
    )
    parts = theirs.state_dict()
    theirs = theirs.double()
    expected = effective_weight(theirs, base) - base.weight
    found = change(saved(tmp_path / "a.safetensors", module[1], parts), f"{module[0]}.weight", base.weight)
    assert expected.norm() > 0.05 * base.weight.norm()
    assert relative(found, expected) < 1e-5


def test_full_difference_is_lycoris_own(tmp_path: Path) -> None:
    import lycoris

    base = layer(KERNEL)
    theirs = (
        randomised(lycoris.FullModule("name", base), 3).float().double()
    )  # before it is applied, it holds the difference itself
    path = saved(tmp_path / "a.safetensors", KERNEL[1], {"diff": theirs.weight, "diff_b": theirs.bias})
    weight, bias = theirs.get_merged_weight()
    for name, before, after in (("weight", base.weight, weight), ("bias", base.bias, bias)):
        assert relative(change(path, f"{KERNEL[0]}.{name}", before), after - before) < 1e-5


@pytest.mark.parametrize("module", [NORM, LAYER_NORM], ids=["group norm", "layer norm"])
def test_norm_is_lycoris_own(tmp_path: Path, module: Module) -> None:
    import lycoris

    base = layer(module)
    theirs = randomised(lycoris.NormModule("name", base), 3).double()
    path = saved(
        tmp_path / "a.safetensors",
        module[1],
        {name: value for name, value in theirs.state_dict().items() if name.endswith("_norm")},
    )
    weight, bias = theirs.make_weight()
    for name, before, after in (("weight", base.weight, weight), ("bias", base.bias, bias)):
        assert relative(change(path, f"{module[0]}.{name}", before), after - before) < 1e-5


# peft, by the files it saves

PEFT: dict[str, tuple[Module, str, dict[str, Any]]] = {
    "LoRA": (LINEAR, "LoraConfig", {"lora_alpha": 3}),
    "rank-stabilised": (LINEAR, "LoraConfig", {"lora_alpha": 3, "use_rslora": True}),
    "LoRA 3x3": (KERNEL, "LoraConfig", {"lora_alpha": 3}),
    "LoRA with a bias": (KERNEL, "LoraConfig", {"lora_alpha": 3, "lora_bias": True}),
    "LoRA embedding": (EMBEDDING, "LoraConfig", {"lora_alpha": 3}),
    "alpha pattern": (LINEAR, "LoraConfig", {"lora_alpha": 3, "alpha_pattern": {"attn2.to_k": 7, "to_k": 9}}),
    "rank pattern": (LINEAR, "LoraConfig", {"lora_alpha": 3, "rank_pattern": {"attn2.to_k": 2}}),
    "DoRA": (LINEAR, "LoraConfig", {"lora_alpha": 3, "use_dora": True}),
    "DoRA, square": (SQUARE, "LoraConfig", {"lora_alpha": 3, "use_dora": True}),
    "DoRA 3x3": (KERNEL, "LoraConfig", {"lora_alpha": 3, "use_dora": True}),
    "LoHa": (LINEAR, "LoHaConfig", {"alpha": 3}),
    "LoHa 3x3": (KERNEL, "LoHaConfig", {"alpha": 3}),
    "LoHa 3x3 tucker": (KERNEL, "LoHaConfig", {"alpha": 3, "use_effective_conv2d": True}),
    "LoKr": (LINEAR, "LoKrConfig", {"alpha": 3, "r": 2}),
    "LoKr both factored": (LINEAR, "LoKrConfig", {"alpha": 3, "r": 2, "decompose_both": True}),
    "LoKr both whole": (LINEAR, "LoKrConfig", {"alpha": 3, "r": 64}),
    "LoKr 3x3": (KERNEL, "LoKrConfig", {"alpha": 3, "r": 2}),
    "LoKr 3x3 tucker": (KERNEL, "LoKrConfig", {"alpha": 3, "r": 2, "use_effective_conv2d": True}),
}


def network_of(module: Module, path: str) -> nn.Module:
    """A network that is nothing but the one layer, at its path in diffusers' or transformers' network."""
    root = at = nn.Module()
    *names, last = path.split(".")
    for name in names:
        at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    at.add_module(last, layer(module).float())
    return root


@pytest.mark.filterwarnings(
    "ignore:.*LoRA tensor.s. have invalid shape"
)  # peft takes the bias of lora_bias for a matrix cut short
@pytest.mark.parametrize(("module", "config", "options"), PEFT.values(), ids=PEFT.keys())
def test_file_that_peft_saves(tmp_path: Path, module: Module, config: str, options: dict[str, Any]) -> None:
    import peft

    path = module[2]
    network = network_of(module, path)
    base = {name: value.clone().double() for name, value in network.get_submodule(path).state_dict().items()}
    adapted = peft.get_peft_model(network, getattr(peft, config)(**({"r": 4, "target_modules": [path]} | options)))  # type: ignore[arg-type]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for name, parameter in adapted.named_parameters():
            if "base_layer" not in name:
                parameter.copy_(0.3 + 0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    merged = adapted.double().merge_and_unload().get_submodule(path).state_dict()
    adapter = opened(tmp_path / "adapter_model.safetensors")
    with adapter.file:
        assert adapter.notes == () and adapter.config_sha256 is not None and adapter.unmatched == ()
        changed = {name for name in base if not torch.equal(base[name], merged[name])}
        assert {f"{module[0]}.{name}" for name in changed} == set(adapter.deltas)
        for name in changed:
            assert (
                relative(change_of(adapter, f"{module[0]}.{name}", base[name].float()), merged[name] - base[name])
                < 1e-5
            )


# Formulas


def matrices(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_sparse_residual_is_added_to_the_low_rank(tmp_path: Path) -> None:
    """LyCORIS's extraction keeps what the low rank misses as a sparse matrix, in int16."""
    up, down, values = matrices((96, 4), (4, 64), (3,))
    indices = torch.tensor([[0, 95, 40], [63, 0, 7]], dtype=torch.int16)
    tensors = {
        "lora_up.weight": up,
        "lora_down.weight": down,
        "alpha": torch.tensor([4.0]).half(),
        "bias_indices": indices,
        "bias_values": values.half(),
        "bias_size": torch.tensor([96, 64], dtype=torch.int16),
    }
    save_file({f"{LINEAR[1]}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "a.safetensors")
    expected = up.double() @ down.double()
    for row, column, value in zip(*indices.tolist(), values.half().double(), strict=True):
        expected[row, column] += value
    assert (
        relative(change(tmp_path / "a.safetensors", f"{LINEAR[0]}.weight", torch.zeros(96, 64), 0.5), expected * 0.5)
        < 1e-5
    )


@pytest.mark.parametrize("scale", [0.5, -0.7, 2.0])
def test_scale_weighs_the_whole_change_of_a_dora(tmp_path: Path, scale: float) -> None:
    """W + scale (V m / |V| - W), V = W + (alpha / r) up @ down, norms over each output: AUTOMATIC1111's and ComfyUI's
    rule, in float64.
    """
    up, down, magnitude = matrices((96, 4), (4, 64), (96, 1))
    weight = matrices((96, 64), seed=3)[0]
    path = saved(
        tmp_path / "a.safetensors",
        LINEAR[1],
        {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0), "dora_scale": magnitude.abs()},
    )
    moved = weight.double() + 0.5 * up.double() @ down.double()
    decomposed = moved * magnitude.abs().double() / moved.square().sum(1, keepdim=True).sqrt()
    assert relative(change(path, f"{LINEAR[0]}.weight", weight, scale), scale * (decomposed - weight)) < 1e-5


def test_magnitudes_without_a_second_dimension(tmp_path: Path) -> None:
    """peft's vector runs along the outputs, LyCORIS's along the axis that has its length."""
    up, down, weight = matrices((96, 4), (4, 64), (96, 64))
    changes = []
    for part, length in (("dora_scale", 96), ("lora_magnitude_vector", 96), ("dora_scale", 64)):
        magnitude = torch.linspace(1, 2, length)
        path = saved(
            tmp_path / f"{len(changes)}.safetensors",
            LINEAR[1],
            {"lora_up.weight": up, "lora_down.weight": down, part: magnitude},
        )
        changes.append(change(path, f"{LINEAR[0]}.weight", weight))
        lengths = (weight + changes[-1]).norm(dim=1 if length == 96 else 0)
        torch.testing.assert_close(lengths, magnitude, rtol=1e-5, atol=1e-5)
    assert torch.equal(changes[0], changes[1])


def test_row_of_zeros_under_a_dora_stays_finite(tmp_path: Path) -> None:
    up, down, weight = matrices((96, 4), (4, 64), (96, 64))
    up[5], weight[5] = 0, 0
    path = saved(
        tmp_path / "a.safetensors",
        LINEAR[1],
        {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": torch.ones(96, 1)},
    )
    found = change(path, f"{LINEAR[0]}.weight", weight)
    assert bool(torch.isfinite(found).all()) and not found[5].any()


def test_change_of_a_tucker_convolution_is_three_convolutions_after_each_other(tmp_path: Path) -> None:
    up, mid, down = matrices((96, 4, 1, 1), (4, 4, 3, 3), (4, 64, 1, 1))
    path = saved(
        tmp_path / "a.safetensors", KERNEL[1], {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    )
    x = matrices((2, 64, 5, 7), seed=9)[0]
    expected = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    torch.testing.assert_close(
        F.conv2d(x, change(path, f"{KERNEL[0]}.weight", torch.zeros(96, 64, 3, 3)), padding=1),
        expected,
        rtol=1e-4,
        atol=1e-2,
    )


def test_numbers_of_a_kronecker_product(tmp_path: Path) -> None:
    """Element [p·o + a, q·i + b] is w1[p, q] · w2[a, b], and two whole matrices ignore alpha."""
    small, large = matrices((4, 8), (24, 8))
    path = saved(
        tmp_path / "a.safetensors", LINEAR[1], {"lokr_w1": small, "lokr_w2": large, "alpha": torch.tensor(0.01)}
    )
    found = change(path, f"{LINEAR[0]}.weight", torch.zeros(96, 64))
    assert math.isclose(float(found[3 * 24 + 5, 2 * 8 + 7]), float(small[3, 2] * large[5, 7]), rel_tol=1e-6)
