"""Fused weights against diffusers and peft, and the identities that fusing must keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import CHECKPOINT, LORA
from reference import TEXT
from safetensors.torch import load_file, save_file

from sdrt.export.adapters.match import LoraOption, open_lora
from sdrt.export.build import BuildOptions, build
from sdrt.export.families.keys import adapter_names
from sdrt.export.families.sd1 import SD1
from sdrt.export.graph import recipes
from sdrt.export.read.checkpoint import open_checkpoint, select
from sdrt.export.skeletons import weights_of
from sdrt.export.weights import Change, write_weights

UNET = "model.diffusion_model."
VAE = "first_stage_model."
Tensors = dict[str, torch.Tensor]
Fuse = Callable[..., Tensors]


def weight_shapes() -> dict[str, tuple[int, ...]]:
    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    return {
        name: shape
        for recipe in recipes(checkpoint.architecture).values()
        for name, shape in weights_of(recipe).items()
    }


def write_fused(path: Path, options: Sequence[LoraOption], precision: str = "fp32") -> Sequence[Mapping[str, Change]]:
    """The weights file of a build, without its graphs. Returns what each LoRA changed."""
    with ExitStack() as files:
        checkpoint = files.enter_context(closing(open_checkpoint(CHECKPOINT)))
        shapes = weight_shapes()
        loras = [open_lora(option, shapes, checkpoint.architecture) for option in options]
        for lora in loras:
            files.callback(lora.file.close)
        return write_weights(path, select(checkpoint, shapes)[0], loras, precision, lambda done: None).changes


@pytest.fixture
def fused_file(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the weights file fused with some LoRAs."""

    def fuse(*options: LoraOption, precision: str = "fp32") -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        write_fused(path, options, precision)
        return path

    return fuse


@pytest.fixture(scope="module")
def base() -> Tensors:
    """The checkpoint's own tensors in float32, as safetensors reads them."""
    return {name: tensor.float() for name, tensor in load_file(CHECKPOINT).items() if tensor.is_floating_point()}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The emoji checkpoint with its LoRA at scale 1, in float32."""
    path = tmp_path_factory.mktemp("fused") / "weights.safetensors"
    write_fused(path, [LoraOption(LORA)])
    return load_file(path)


def largest_error(found: Tensors, expected: Tensors) -> float:
    assert found.keys() == expected.keys()
    return max(
        reference.relative(found[name].numpy(), expected[name].numpy()) for name in expected if expected[name].any()
    )


def changed(found: Tensors, base: Tensors) -> set[str]:
    return {name for name in found if not torch.equal(found[name], base[name])}


def lora_weights(base: Tensors) -> set[str]:
    """The weights that the emoji's LoRA has modules for."""
    modules = {name.partition(".")[0] for name in load_file(LORA)}
    modules |= {ldm_spelling(module) for module in modules if module.startswith("lora_unet_")}
    kohya = {
        name: name.replace(UNET, "lora_unet_").replace(TEXT, "lora_te_").removesuffix(".weight").replace(".", "_")
        for name in base
        if ".weight" in name
    }
    return {name for name, module in kohya.items() if module in modules}


def another_lora(path: Path, seed: int, scale: float = 0.05) -> Path:
    """A LoRA of the same modules with other numbers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor if name.endswith(".alpha") else scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(LORA).items()
    }
    save_file(tensors, path, {"ss_network_module": "networks.lora"})
    return path


# Against diffusers and peft


def diffusers_fused(bundle: Path, folder: Path, unet_scale: float, text_scale: float) -> Any:
    pipeline = reference.diffusers_pipeline(bundle, reference.clip_tokenizer(folder))
    pipeline.load_lora_weights(str(LORA.parent), weight_name=LORA.name, local_files_only=True)
    pipeline.fuse_lora(components=["unet"], lora_scale=unet_scale)
    pipeline.fuse_lora(components=["text_encoder"], lora_scale=text_scale)
    pipeline.unload_lora_weights()
    return pipeline


@pytest.mark.parametrize(("unet_scale", "text_scale"), [(1.0, 1.0), (0.7, -0.4)])
def test_fused_weights_are_peft_s(
    flat_bundle: Path,
    tmp_path: Path,
    base: Tensors,
    fused_file: Callable[..., Path],
    unet_scale: float,
    text_scale: float,
) -> None:
    pipeline = diffusers_fused(flat_bundle, tmp_path, unet_scale, text_scale)
    found, spec = load_file(fused_file(LoraOption(LORA, unet_scale, text_scale))), reference.sizes(flat_bundle)
    assert largest_error(reference.unet(found, spec["unet"]).state_dict(), pipeline.unet.state_dict()) < 1e-5
    assert (
        largest_error(reference.text_model(found, spec["texts"][0]).state_dict(), pipeline.text_encoder.state_dict())
        < 1e-5
    )
    touched = changed(found, base)
    zero = {
        name
        for name in lora_weights(base)
        if name.endswith(("middle_block.1.transformer_blocks.0.attn1.to_q.weight", "attn1.to_k.weight"))
    } - touched
    assert (
        len(zero) == 2
    )  # at 64x64 the middle block attends to one position only, so training never moved its queries and keys
    assert touched == lora_weights(base) - zero and len(touched) == 246
    for prefix in (UNET, TEXT):  # far enough from the base that the comparison says something
        assert (
            max(
                reference.relative(found[name].numpy(), base[name].numpy())
                for name in touched
                if name.startswith(prefix)
            )
            > 1e-2
        )


def attention_lora(base: Tensors, spelling: str) -> Tensors:
    """A seeded LoRA of every attention projection of both networks under the names of one of the formats diffusers
    reads.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    generator = torch.Generator().manual_seed(9)
    names = {name: name for name in base if name.startswith(UNET)}
    paths = {ldm: ("unet.", name) for name, ldm in convert_ldm_unet_checkpoint(names, {"layers_per_block": 2}).items()}
    paths |= {name: ("text_encoder.", name.removeprefix(TEXT)) for name in base if name.startswith(TEXT)}
    lora: Tensors = {}
    for name, (network, path) in paths.items():
        module = path.removesuffix(".weight")
        if not path.endswith(".weight") or not re.search(r"attn\d\.to_|self_attn\.", module):
            continue
        up, down = (
            0.05 * torch.randn((len(base[name]), 3), generator=generator),
            0.05 * torch.randn((3, base[name].shape[1]), generator=generator),
        )
        if spelling.startswith("peft"):
            lora |= {f"{network}{module}.lora_B.weight": up, f"{network}{module}.lora_A.weight": down}
            if (
                spelling == "peft, DoRA"
            ):  # diffusers drops the magnitudes of a kohya file, so only its own names can be compared
                lora[f"{network}{module}.lora_magnitude_vector.weight"] = base[name].norm(dim=1) * (
                    1 + 0.1 * torch.rand(len(up), generator=generator)
                )
            continue
        if spelling == "diffusers, old" and network == "unet.":
            stem = network + module.replace(".to_", ".processor.to_").removesuffix(".0") + "_lora"
        elif spelling == "diffusers, old":
            stem = network + re.sub(r"(\w+)_proj$", r"to_\1", module) + "_lora"
        else:
            stem = f"{network}{module}.{'lora' if network == 'unet.' else 'lora_linear_layer'}"
        lora |= {f"{stem}.up.weight": up, f"{stem}.down.weight": down}
    assert len(lora) > 2 * 120
    return lora


@pytest.fixture(scope="module")
def loader(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline over the checkpoint's weights, to load adapters into."""
    return reference.diffusers_pipeline(flat_bundle, reference.clip_tokenizer(tmp_path_factory.mktemp("clip")))


@pytest.mark.parametrize("spelling", ["peft", "peft, DoRA", "diffusers", "diffusers, old"])
def test_fused_weights_are_those_of_diffusers_loader(
    flat_bundle: Path, loader: Any, tmp_path: Path, base: Tensors, fused_file: Callable[..., Path], spelling: str
) -> None:
    lora, pipeline = attention_lora(base, spelling), loader
    save_file(lora, tmp_path / "lora.safetensors")
    networks = (pipeline.unet, pipeline.text_encoder)
    pristine = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    pipeline.load_lora_weights(dict(lora))
    pipeline.fuse_lora(lora_scale=1.0)
    pipeline.unload_lora_weights()
    fused_by_diffusers = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    for network, state in zip(networks, pristine, strict=True):
        network.load_state_dict(state)
    found, spec = load_file(fused_file(LoraOption(tmp_path / "lora.safetensors"))), reference.sizes(flat_bundle)
    assert largest_error(reference.unet(found, spec["unet"]).state_dict(), fused_by_diffusers[0]) < 1e-5
    assert largest_error(reference.text_model(found, spec["texts"][0]).state_dict(), fused_by_diffusers[1]) < 1e-5
    for prefix, count in ((UNET, 96), (TEXT, 8)):
        touched = [name for name in changed(found, base) if name.startswith(prefix)]
        assert (
            len(touched) >= count
            and max(reference.relative(found[name].numpy(), base[name].numpy()) for name in touched) > 1e-2
        )


def test_the_bundle_holds_the_fused_weights_rounded_once(blindbox_bundle: Path, fused: Tensors) -> None:
    stored = load_file(blindbox_bundle / "graphs" / "weights.safetensors")
    assert stored.keys() == fused.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, fused[name].half()), name


def test_bfloat16_is_rounded_once(fused: Tensors, fused_file: Callable[..., Path]) -> None:
    stored = load_file(fused_file(LoraOption(LORA), precision="bf16"))
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, fused[name].bfloat16()), name


# Every module, in both spellings

LDM_RESNET = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0", "conv2": "out_layers_3", "conv_shortcut": "skip_connection",
}  # fmt: skip
LDM_OUTER = {
    "conv_in": "input_blocks_0_0", "conv_norm_out": "out_0", "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2",
}  # fmt: skip


def ldm_spelling(module: str) -> str:
    """The LDM spelling of a kohya UNet module name in diffusers' spelling, for two blocks a level and four levels."""
    name = module.removeprefix("lora_unet_")
    if name in LDM_OUTER:
        return "lora_unet_" + LDM_OUTER[name]
    place, index, kind, item, rest = re.fullmatch(
        r"(down|mid|up)_blocks?_(?:(\d)_)?(resnets|attentions|downsamplers|upsamplers)_(\d)_(.+)", name
    ).groups()  # type: ignore[union-attr]
    level, i = int(index or 0), int(item)
    rest = LDM_RESNET[rest] if kind == "resnets" else rest
    if kind == "downsamplers":
        block = f"input_blocks_{3 * level + 3}_0_op"
        return "lora_unet_" + block
    if kind == "upsamplers":
        return f"lora_unet_output_blocks_{3 * level + 2}_{1 if level == 0 else 2}_conv"
    layer = int(kind == "attentions")
    block = {
        "down": f"input_blocks_{1 + 3 * level + i}_{layer}",
        "mid": f"middle_block_{1 if layer else 2 * i}",
        "up": f"output_blocks_{3 * level + i}_{layer}",
    }[place]
    return f"lora_unet_{block}_{rest}"


def rename(tensors: Tensors, spelling: Callable[[str], str]) -> Tensors:
    """Tensors of a LoRA with the UNet modules' names replaced."""
    return {
        (
            spelling(name.partition(".")[0]) + "." + name.partition(".")[2] if name.startswith("lora_unet_") else name
        ): tensor
        for name, tensor in tensors.items()
    }


def test_both_spellings_are_the_same_lora(tmp_path: Path, fused: Tensors, fused_file: Callable[..., Path]) -> None:
    tensors = load_file(LORA)
    ldm = rename(tensors, ldm_spelling)
    assert len(ldm) == len(tensors) == 744 and sum("_blocks_" in name and "output_blocks" in name for name in ldm) > 100
    save_file(ldm, tmp_path / "ldm.safetensors")
    assert (
        fused_file(LoraOption(tmp_path / "ldm.safetensors")).read_bytes() == fused_file(LoraOption(LORA)).read_bytes()
    )


def test_names_of_every_module_are_diffusers_own(flat_bundle: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    everything = [name for name in checkpoint.tensors if name.startswith((UNET, TEXT))]
    names = [name for name in everything if name.endswith(".weight")]
    table = adapter_names([name.removesuffix(".weight") for name in names], checkpoint.architecture.unet, SD1)
    # Conversion only moves values, so names converted in place of tensors say what becomes what.
    moved = convert_ldm_unet_checkpoint({name: name for name in everything}, {"layers_per_block": 2})
    moved = {name: ldm_name for name, ldm_name in moved.items() if name.endswith(".weight")}
    assert len(moved) == sum(name.startswith(UNET) for name in names)
    for diffusers_name, ldm_name in moved.items():
        diffusers_key = "lora_unet_" + diffusers_name.removesuffix(".weight").replace(".", "_")
        ldm_key = "lora_unet_" + ldm_name.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
        assert table[diffusers_key] == table[ldm_key] == ldm_name.removesuffix(".weight")
        assert ldm_spelling(diffusers_key) == ldm_key
    texts = [name for name in names if name.startswith(TEXT)]
    assert all(
        table["lora_te_" + name.removeprefix(TEXT).removesuffix(".weight").replace(".", "_")]
        == name.removesuffix(".weight")
        for name in texts
    )
    assert set(table.values()) == {name.removesuffix(".weight") for name in names}


@pytest.mark.parametrize("spelling", ["diffusers", "ldm"])
def test_a_lora_of_every_module(tmp_path: Path, base: Tensors, fused_file: Callable[..., Path], spelling: str) -> None:
    """Rank 3 and alpha 2 on every matrix and convolution of the UNet and every linear of the text encoder, added in
    float64.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    generator = torch.Generator().manual_seed(5)
    names = {name: name for name in base if name.startswith(UNET)}
    modules = {
        ldm: "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        for name, ldm in convert_ldm_unet_checkpoint(names, {"layers_per_block": 2}).items()
    }
    modules |= {
        name: "lora_te_" + name.removeprefix(TEXT).removesuffix(".weight").replace(".", "_")
        for name in base
        if name.startswith(TEXT)
    }
    modules = {name: module for name, module in modules.items() if base[name].dim() >= 2 and "embeddings" not in name}
    lora: Tensors = {}
    expected: Tensors = dict(base)
    for name, module in modules.items():
        key = ldm_spelling(module) if spelling == "ldm" and name.startswith(UNET) else module
        outputs, inputs, *kernel = base[name].shape
        down = 0.05 * torch.randn((3, inputs, *kernel), generator=generator)
        up = 0.05 * torch.randn((outputs, 3, *[1] * len(kernel)), generator=generator)
        lora |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
        delta = torch.einsum("or,ri...->oi...", up.double().reshape(outputs, 3), down.double())
        expected[name] = base[name].double() + 0.5 * 2 / 3 * delta
    assert len(modules) > 280
    save_file(lora, tmp_path / "lora.safetensors")
    found = load_file(fused_file(LoraOption(tmp_path / "lora.safetensors", 0.5, 0.5)))
    assert changed(found, base) == set(modules)
    assert largest_error(found, {name: expected[name] for name in found}) < 1e-6


# Identities


def test_order_does_not_matter(tmp_path: Path, base: Tensors, fused_file: Callable[..., Path]) -> None:
    first, second = LoraOption(LORA, 0.7, 0.3), LoraOption(another_lora(tmp_path / "other.safetensors", 1), 1.1, 0.9)
    both = fused_file(first, second)
    assert both.read_bytes() == fused_file(second, first).read_bytes()
    alone = [load_file(fused_file(option)) for option in (first, second)]
    expected = {name: alone[0][name].double() + alone[1][name].double() - base[name].double() for name in alone[0]}
    assert largest_error(load_file(both), expected) < 1e-6


def test_order_of_one_lora_given_twice(fused_file: Callable[..., Path]) -> None:
    first, second = LoraOption(LORA, 0.7, 0.3), LoraOption(LORA, 0.1, 0.6)
    assert fused_file(first, second).read_bytes() == fused_file(second, first).read_bytes()
    sum_of_scales = load_file(fused_file(LoraOption(LORA, 0.8, 0.9)))
    assert largest_error(load_file(fused_file(first, second)), sum_of_scales) < 1e-6


@pytest.mark.parametrize("scale", [0.73, -1.6])
def test_scale_is_a_factor_of_the_up_matrices(tmp_path: Path, fused_file: Callable[..., Path], scale: float) -> None:
    tensors = {name: tensor.float() * (scale if ".lora_up." in name else 1) for name, tensor in load_file(LORA).items()}
    save_file(tensors, tmp_path / "scaled.safetensors")
    expected = load_file(fused_file(LoraOption(tmp_path / "scaled.safetensors")))
    assert largest_error(load_file(fused_file(LoraOption(LORA, scale, scale))), expected) < 1e-6


def test_scales_of_unet_and_text_encoder_are_separate(
    base: Tensors, fused: Tensors, fused_file: Callable[..., Path]
) -> None:
    unet_only = load_file(fused_file(LoraOption(LORA, 1.0, 0.0)))
    text_only = load_file(fused_file(LoraOption(LORA, 0.0, 1.0)))
    for name, whole in fused.items():
        assert torch.equal(unet_only[name], whole if name.startswith(UNET) else base[name]), name
        assert torch.equal(text_only[name], whole if name.startswith(TEXT) else base[name]), name
    assert any(not torch.equal(fused[name], base[name]) for name in fused if name.startswith(TEXT))


def test_what_a_lora_changed_is_reported(tmp_path: Path, base: Tensors, fused: Tensors) -> None:
    (change,) = write_fused(tmp_path / "weights.safetensors", [LoraOption(LORA)])
    assert {component: what.modules for component, what in change.items()} == {"text_encoder": 12, "unet": 236}
    for component, prefix in (("unet", UNET), ("text_encoder", TEXT)):
        touched = [name for name in lora_weights(base) if name.startswith(prefix)]
        deltas, weights = (
            np.concatenate([x[name].double().numpy().ravel() for name in touched])
            for x in ({n: fused[n] - base[n] for n in touched}, base)
        )
        assert change[component].relative == pytest.approx(
            float(np.linalg.norm(deltas) / np.linalg.norm(weights)), rel=1e-3
        )


def test_scale_0_is_no_lora(flat_bundle: Path, tmp_path: Path) -> None:
    report = build(BuildOptions(CHECKPOINT, (LoraOption(LORA, 0.0, 0.0),), output=tmp_path / "zero.sdrt"))
    assert report.notes == ("blindbox.safetensors: scale 0, nothing changed",)
    for folder in ("graphs", "reference", "tokenizer"):
        files = sorted(path.relative_to(flat_bundle) for path in (flat_bundle / folder).rglob("*"))
        assert files == sorted(
            path.relative_to(tmp_path / "zero.sdrt") for path in (tmp_path / "zero.sdrt" / folder).rglob("*")
        )
        for file in files:
            assert (tmp_path / "zero.sdrt" / file).read_bytes() == (flat_bundle / file).read_bytes(), file
    lora = report.manifest.sources[-1]
    assert replace(lora, sha256="") == replace(
        lora,
        sha256="",
        kind="lora",
        name="blindbox.safetensors",
        scale=0.0,
        te_scale=0.0,
        applied={},
        relative_change={},
    )


def test_the_vae_is_never_touched(base: Tensors, fused: Tensors) -> None:
    names = [name for name in fused if name.startswith(VAE)]
    assert len(names) > 100 and all(torch.equal(fused[name], base[name]) for name in names)
