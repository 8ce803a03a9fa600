"""Spellings: one LoRA in every tool's names, kinds that are refused, families that do not fit, and sets that are not
whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import pytest
import reference
import torch
from adapter_files import (
    EMBEDDING,
    KERNEL,
    LINEAR,
    NORM,
    POINTWISE,
    QUERY,
    SQUARE,
    TEXT,
    architecture,
    change_of,
    model,
    opened,
)
from conftest import CHECKPOINT
from safetensors.torch import load_file, save_file

from sdrt.errors import AdapterError, InputFileError
from sdrt.export.adapters.embedding import bundled_embeddings
from sdrt.export.adapters.match import LoraOption, open_lora
from sdrt.export.adapters.spelling import kinds, made_for, ranks, split
from sdrt.export.families.keys import adapter_names
from sdrt.export.families.recognise import describe
from sdrt.export.families.sd1 import SD1, UNET
from sdrt.export.inspect import inspect_file

Tensors = dict[str, torch.Tensor]
OUTPUT = (
    SQUARE[0].replace("to_q", "to_out.0"),
    SQUARE[1].replace("to_q", "to_out_0"),
    SQUARE[2].replace("to_q", "to_out.0"),
)


def seeded(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def refused(
    path: Path, tensors: Mapping[str, torch.Tensor], *fragments: str, allow_unmatched: bool = False
) -> AdapterError:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(AdapterError) as caught:
        adapter = opened(path, allow_unmatched=allow_unmatched)
        with adapter.file:  # numbers are read only when they are used
            for weight in adapter.deltas:
                change_of(adapter, weight, torch.ones(model()[0][weight]))
    error = caught.value
    assert error.exit_code == 3 and error.message.startswith(f"{path}: ") and error.message.isprintable()
    for fragment in fragments:
        assert fragment in error.message, error.message
    return error


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "style.safetensors"


# One LoRA in every spelling


def kohya(module: tuple[str, str, str], part: str) -> str:
    return f"{module[1]}.lora_{part}.weight"


def kohya_ldm(module: tuple[str, str, str], part: str) -> str:
    return (
        f"lora_unet_{module[0].removeprefix(UNET).replace('.', '_')}.lora_{part}.weight"
        if module[0].startswith(UNET)
        else kohya(module, part)
    )


def onetrainer(module: tuple[str, str, str], part: str) -> str:
    return kohya(module, part).replace("lora_te_", "lora_te1_")


def lycoris(module: tuple[str, str, str], part: str) -> str:
    return f"lycoris_{module[2].replace('.', '_')}.lora_{part}.weight"


def component(module: tuple[str, str, str]) -> str:
    return "unet." if module[0].startswith(UNET) else "text_encoder."


def peft(module: tuple[str, str, str], part: str) -> str:
    return f"{component(module)}{module[2]}.lora_{'A' if part == 'down' else 'B'}.weight"


def peft_alone(module: tuple[str, str, str], part: str) -> str:
    return f"base_model.model.{module[2]}.lora_{'A' if part == 'down' else 'B'}.weight"


def comfy(module: tuple[str, str, str], part: str) -> str:
    return (
        "diffusion_model." + module[0].removeprefix(UNET) + f".lora_{part}.weight"
        if module[0].startswith(UNET)
        else f"text_encoders.clip_l.transformer.{module[2]}.lora_{part}.weight"
    )


def peft_state(module: tuple[str, str, str], part: str) -> str:
    return peft(module, part).replace(".weight", ".default_0.weight")


def peft_below_component(module: tuple[str, str, str], part: str) -> str:
    return f"{component(module)}base_model.model.{module[2]}.lora_{'A' if part == 'down' else 'B'}.weight"


def diffusers(module: tuple[str, str, str], part: str) -> str:
    return (
        f"{component(module)}{module[2]}.{'lora' if module[0].startswith(UNET) else 'lora_linear_layer'}.{part}.weight"
    )


def lora_layer(module: tuple[str, str, str], part: str) -> str:
    return f"{component(module)}{module[2]}.lora_layer.{part}.weight"


def diffusers_old(module: tuple[str, str, str], part: str) -> str:
    if "attn" in module[2] and module[0].startswith(UNET):
        return f"unet.{module[2].replace('.to_', '.processor.to_').replace('to_out.0', 'to_out')}_lora.{part}.weight"
    if "self_attn" in module[2]:
        return f"text_encoder.{module[2].replace('q_proj', 'to_q')}_lora.{part}.weight"
    return diffusers(module, part)


SPELLINGS = [
    kohya,
    kohya_ldm,
    onetrainer,
    lycoris,
    peft,
    peft_alone,
    peft_state,
    peft_below_component,
    comfy,
    diffusers,
    lora_layer,
    diffusers_old,
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_l3_one_lora_in_every_spelling(file: Path, spelling: Callable[[tuple[str, str, str], str], str]) -> None:
    tensors: Tensors = {}
    expected: Tensors = {}
    for seed, module in enumerate((LINEAR, SQUARE, OUTPUT, POINTWISE, KERNEL, QUERY, TEXT)):
        shape = model()[0][f"{module[0]}.weight"]
        ones = [1] * len(shape[2:])
        up, down = seeded((shape[0], 4, *ones), (4, *shape[1:]), seed=seed)
        tensors |= {spelling(module, "up"): up, spelling(module, "down"): down}
        expected[f"{module[0]}.weight"] = torch.einsum("or,ri...->oi...", up.flatten(1), down)
    save_file(tensors, file)
    adapter = opened(file)
    with adapter.file:
        assert adapter.deltas.keys() == expected.keys() and adapter.unmatched == ()
        for weight, change in expected.items():
            torch.testing.assert_close(
                change_of(adapter, weight, torch.zeros(change.shape)), change, rtol=1e-5, atol=1e-5
            )
    report = inspect_file(file)
    assert report["kind"] == "a LoRA" and report["kinds"] == {"LoRA": 7} and report["ranks"] == {"4": 7}
    assert report["modules"] == {"unet": 5, "text_encoder": 2}


def test_lora_saved_by_torch(tmp_path: Path) -> None:
    up, down = seeded((96, 4), (4, 64))
    torch.save(
        {kohya(LINEAR, "up"): up, kohya(LINEAR, "down"): down, f"{LINEAR[1]}.alpha": torch.tensor(2.0)},
        tmp_path / "style.pt",
    )
    adapter = opened(tmp_path / "style.pt")
    with adapter.file:
        torch.testing.assert_close(change_of(adapter, f"{LINEAR[0]}.weight", torch.zeros(96, 64)), up @ down / 2)


def test_two_spellings_of_one_module_are_refused(file: Path) -> None:
    up, down = seeded((96, 4), (4, 64))
    refused(
        file,
        {kohya(LINEAR, "up"): up, kohya(LINEAR, "down"): down, peft(LINEAR, "up"): up, peft(LINEAR, "down"): down},
        "another key",
        LINEAR[0],
    )


def test_split_takes_the_longest_ending() -> None:
    assert split("a.lora_linear_layer.down.weight") == ("a", "lora_down.weight")
    assert split("a.processor.to_q_lora.down.weight") == ("a.processor.to_q", "lora_down.weight")
    assert split("a.lora_magnitude_vector.weight") == ("a", "lora_magnitude_vector")
    assert split("a.diff_b") == ("a", "diff_b") and split("a.lokr_w1_a") == ("a", "lokr_w1_a")
    assert split("model.diffusion_model.input_blocks.0.0.weight") is None and split(".alpha") is None


# Kinds that are not fused

REFUSED = {
    "IA3": {"{}.weight": (96,), "{}.on_input": ()},
    "OFT": {"{}.oft_blocks": (4, 24, 24), "{}.alpha": ()},
    "OFT ": {"{}.oft_diag": (4, 24, 24), "{}.rescale": (96, 1)},
    "BOFT": {"{}.oft_blocks": (3, 4, 24, 24), "{}.alpha": ()},
    "GLoRA": {"{}.a1.weight": (4, 64), "{}.a2.weight": (64, 4), "{}.b1.weight": (4, 64), "{}.b2.weight": (96, 4)},
    "T-LoRA": {"{}.q_layer.weight": (4, 64), "{}.p_layer.weight": (96, 4), "{}.lambda_layer": (1, 4)},
    "IA3 of peft": {"base_model.model.{}.ia3_l": (96, 1)},
    "OFT of peft": {"base_model.model.{}.oft_R.weight": (4, 276)},
    "BOFT of peft": {"base_model.model.{}.boft_R": (1, 4, 24, 24), "base_model.model.{}.boft_s": (96, 1)},
    "AdaLoRA": {
        "base_model.model.{}.lora_A": (4, 64),
        "base_model.model.{}.lora_B": (96, 4),
        "base_model.model.{}.lora_E": (4, 1),
    },
    "VeRA": {"base_model.model.{}.vera_lambda_b": (96,), "base_model.model.{}.vera_lambda_d": (4,)},
    "ComfyUI's set_weight": {"{}.set_weight": (96, 64)},
    "motion LoRA of AnimateDiff": {
        "down_blocks.0.motion_modules.0.temporal_transformer.to_q_lora.down.weight": (4, 64)
    },
}


@pytest.mark.parametrize(("kind", "shapes"), REFUSED.items())
def test_l6_kinds_that_are_refused_by_name(file: Path, kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Alone, and beside a plain pair: never fused in part, never an unknown file."""
    name = LINEAR[2] if any("base_model" in key for key in shapes) else LINEAR[1]
    tensors = {key.format(name): torch.ones(shape) for key, shape in shapes.items()}
    up, down = seeded((256, 4), (4, 64))
    for more in ({}, {kohya(TEXT, "up"): up, kohya(TEXT, "down"): down}):
        for allowed in (False, True):
            error = refused(
                file, tensors | more, kind.removesuffix(" of peft").strip(), "not supported", allow_unmatched=allowed
            )
            assert "LoHa" in error.fix
    report = inspect_file(file)
    assert report["kind"] == "a LoRA" and report["buildable"] is False and "not supported" in report["why"]


# The first format, which numbers the modules


def numbered() -> dict[str, list[str]]:
    """The modules of the emoji model in the order of the first format, by diffusers' names: diffusers' own order of
    blocks, and within a transformer block that of diffusers 0.10, whose constructor made attn1, ff and attn2 one after
    the other.
    """
    weights = {name: tensor for name, tensor in load_file(CHECKPOINT).items() if "position_ids" not in name}
    sizes = {name: asdict(part) for name, part in (("unet", architecture().unet), ("clip", architecture().texts[0]))}
    unet = [
        f"{name}.{part}.{layer}"
        for name, block in reference.unet(weights, sizes["unet"]).named_modules()
        if type(block).__name__ == "BasicTransformerBlock"
        for part, layers in (("attn1", block.attn1), ("ff.net.0", block.ff.net[0]), ("attn2", block.attn2))
        for layer, module in layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    text = reference.text_model(weights, sizes["clip"])
    attentions = [
        name for name, module in text.named_modules() if isinstance(module, torch.nn.Linear) and ".self_attn." in name
    ]
    return {
        "unet": unet,
        "text_encoder": [name if name.startswith("text_model.") else f"text_model.{name}" for name in attentions],
    }


@pytest.fixture(scope="module")
def first_format() -> tuple[Tensors, Tensors, Tensors]:
    """The same random LoRA in the first format, in diffusers' spelling, and as the lists that torch saved, the UNet's
    before the text encoder's.
    """
    shapes, arch = model()
    known = adapter_names([name.removesuffix(".weight") for name in shapes if name.endswith(".weight")], arch.unet, SD1)
    old: Tensors = {}
    new: Tensors = {}
    for component, modules in numbered().items():
        for i, module in enumerate(modules):
            shape = shapes[known[f"{component}.{module}"] + ".weight"]
            up, down = seeded((shape[0], 4), (4, shape[1]), seed=len(old))
            old |= {f"{component}:{i}:up": up, f"{component}:{i}:down": down}
            new |= {f"{component}.{module}.lora_B.weight": up, f"{component}.{module}.lora_A.weight": down}
    return old, new, {"<s1>": torch.randn(1, 64), "<s2>": torch.randn(2, 64)}


def test_first_format_is_the_same_lora_in_names(
    first_format: tuple[Tensors, Tensors, Tensors], file: Path, tmp_path: Path
) -> None:
    old, new, vectors = first_format
    save_file(new, tmp_path / "new.safetensors")
    save_file(
        old | vectors,
        file,
        {"unet": '["CrossAttention", "Attention", "GEGLU"]', "<s1>": "<embed>", "<s2>": "<embed>", "unet:0:rank": "4"},
    )
    torch.save([tensor for key, tensor in old.items() if key.startswith("unet")], tmp_path / "unet.pt")
    torch.save([tensor for key, tensor in old.items() if key.startswith("text")], tmp_path / "text.pt")
    expected = opened(tmp_path / "new.safetensors")
    found = [opened(path) for path in (file, tmp_path / "unet.pt", tmp_path / "text.pt")]
    assert found[0].bundled == {"<s1>": {"": "<s1>"}, "<s2>": {"": "<s2>"}} and found[0].unmatched == ()
    assert found[0].deltas.keys() == expected.deltas.keys() == {*found[1].deltas, *found[2].deltas}
    for weight in expected.deltas:
        zeros = torch.zeros(model()[0][weight])
        change = change_of(expected, weight, zeros)
        assert torch.equal(change_of(found[0], weight, zeros), change)
        assert torch.equal(change_of(found[1 if weight.startswith(UNET) else 2], weight, zeros), change)
    for adapter in (expected, *found):
        adapter.file.close()
    report = inspect_file(file)
    assert report["modules"] == {"text_encoder": 8, "unet": len(old) // 2 - 8} and report["embeddings"] == {
        "<s1>": [1, 64],
        "<s2>": [2, 64],
    }
    assert inspect_file(tmp_path / "text.pt")["modules"] == {"text_encoder": 8}


def test_first_format_of_other_modules_is_refused(first_format: tuple[Tensors, Tensors, Tensors], file: Path) -> None:
    """More modules, fewer, or another order: never a number taken for another module."""
    old = first_format[0]
    more = {f"unet:500:{part}": old[f"unet:0:{part}"].clone() for part in ("up", "down")}
    header = {"unet": '["ResnetBlock2D", "Attention"]'}
    for tensors in (old | more, {key: tensor for key, tensor in old.items() if not key.startswith("unet:0:")}):
        save_file(tensors, file, header)
        for allowed in (False, True):
            with pytest.raises(AdapterError, match=r"the first format of all.*all attention layers of this model"):
                opened(file, allow_unmatched=allowed)
    order = [0, 1, 2, 3, 5, 6, 7, 8, 4]  # attn1, attn2, ff, as later versions of diffusers have it
    moved = {f"unet:{i // 9 * 9 + order[i % 9]}:{part}": i for i in range(len(old) // 2 - 8) for part in ("up", "down")}
    shuffled = {key: old[f"unet:{i}:{key.rpartition(':')[2]}"] for key, i in moved.items()}
    refused(file, shuffled, "do not make a change of a weight")


# Embeddings that a LoRA brings along


def test_bundled_embeddings_are_taken_and_counted(file: Path) -> None:
    up, down = seeded((96, 4), (4, 64))
    pair = {kohya(LINEAR, "up"): up, kohya(LINEAR, "down"): down}
    save_file(
        pair
        | {
            "bundle_emb.<a>.clip_l": torch.ones(2, 64),
            "bundle_emb.my.style.string_to_param.*": torch.zeros(3, 64),
        },
        file,
    )
    adapter = opened(file)
    adapter.file.close()
    assert adapter.unmatched == () and len(adapter.deltas) == 1
    assert adapter.bundled == {
        "<a>": {"clip_l": "bundle_emb.<a>.clip_l"},
        "my.style": {"": "bundle_emb.my.style.string_to_param.*"},
    }
    arch = architecture()
    found = bundled_embeddings([adapter, adapter], arch)  # the same file twice
    assert [(embedding.option.trigger, embedding.vectors) for embedding in found] == [("<a>", 2), ("my.style", 3)]
    assert inspect_file(file)["embeddings"] == {"<a>": [2, 64], "my.style": [3, 64]}
    with pytest.raises(AdapterError, match=r"bundle_emb\.<a>\.clip_l: expected vectors 768 wide"):
        bundled_embeddings([adapter], replace(arch, texts=(replace(arch.texts[0], width=768),)))
    save_file(pair | {"bundle_emb.<a>.clip_g": torch.ones(2, 1280)}, file)
    adapter = opened(file)
    with adapter.file, pytest.raises(AdapterError, match="an embedding made for SDXL"):
        bundled_embeddings([adapter], arch)
    refused(file, pair | {"bundle_emb.<a>.t5": torch.ones(2, 64)}, "an embedding's vectors for another text encoder")
    refused(file, pair | {"bundle_emb.a\n.clip_l": torch.ones(2, 64)}, "no word that a prompt can say")


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{TEXT[2]}.base_layer.bias",
        f"base_model.model.{KERNEL[2]}.weight",
        f"base_model.model.{NORM[2]}.bias",
    ],
)
def test_whole_values_of_peft_are_named(file: Path, key: str) -> None:
    up, down = seeded((96, 4), (4, 64))
    error = refused(
        file,
        {peft_alone(LINEAR, "up"): up, peft_alone(LINEAR, "down"): down, key: torch.ones(8)},
        key,
        "a whole ",
        "peft's",
    )
    assert "merge_and_unload" in error.fix and "--allow-unmatched" in error.fix


OTHER_FILES = {
    "an IP-Adapter": {"ip_adapter.1.to_k_ip.weight": (64, 64), "image_proj.proj.weight": (64, 64)},
    "a ControlNet": {
        "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
        "control_model.time_embed.0.weight": (64, 64),
    },
    "a Control-LoRA": {"lora_controlnet": (), "input_blocks.0.0.up": (64, 4), "input_blocks.0.0.down": (4, 4)},
    "a T2I-Adapter": {"body.0.block1.weight": (64, 64, 3, 3), "conv_in.weight": (64, 192, 3, 3)},
    "a motion module of AnimateDiff": {"down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight": (64, 64)},
}


@pytest.mark.parametrize(("kind", "shapes"), OTHER_FILES.items())
def test_files_of_other_kinds_are_named(file: Path, kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    refused(file, {name: torch.ones(shape) for name, shape in shapes.items()}, f"expected a LoRA, found {kind}")


# Families


def pair_for(module: str, outputs: int, inputs: int) -> Tensors:
    up, down = seeded((outputs, 4), (4, inputs))
    return {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}


@pytest.mark.parametrize(
    ("width", "name"),
    [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (2048, "SDXL")],
    ids=["SD 1", "SD 2", "SDXL"],
)
@pytest.mark.parametrize("kind", ["lora", "peft", "loha", "lokr", "diff"])
def test_family_is_named_by_the_width_it_attends_to(file: Path, width: int, name: str, kind: str) -> None:
    shapes = {
        "lora": {"lora_up.weight": (320, 4), "lora_down.weight": (4, width)},
        "peft": {"lora_B.weight": (320, 4), "lora_A.weight": (4, width)},
        "loha": {"hada_w1_a": (320, 4), "hada_w1_b": (4, width), "hada_w2_a": (320, 4), "hada_w2_b": (4, width)},
        "lokr": {"lokr_w1": (8, 8), "lokr_w2_a": (40, 4), "lokr_w2_b": (4, width // 8)},
        "diff": {"diff": (320, width)},
    }[kind]
    module = f"unet.{LINEAR[2]}" if kind == "peft" else LINEAR[1]
    said = "[96, 64]" if width == 768 else f"made for {name}, expected one for Stable Diffusion 1.x"
    refused(file, {f"{module}.{part}": torch.ones(shape) for part, shape in shapes.items()}, said)
    assert inspect_file(file)["made_for"] == name


@pytest.mark.parametrize(
    ("width", "name"), [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (1280, "SDXL")]
)
def test_family_of_a_text_encoder_alone(file: Path, width: int, name: str) -> None:
    refused(file, pair_for(QUERY[1], width, width), "[64, 64]" if width == 768 else f"made for {name}")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "SDXL"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "SDXL"),
        ("lora_unet_single_blocks_0_linear1", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("diffusion_model.double_blocks.0.img_attn.proj", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj", "SD3"),
        ("transformer.transformer_blocks.0.attn.to_q", "SD3 or Flux"),
        ("lycoris_transformer_blocks_0_attn_to_q", "SD3 or Flux"),
    ],
)
def test_family_is_named_by_its_modules(file: Path, module: str, name: str) -> None:
    refused(file, pair_for(module, 64, 64), f"made for {name}, expected one for Stable Diffusion 1.x")


def test_family_that_nothing_tells() -> None:
    """Widths of no family; one text encoder without a number is that of 1.x or 2.x, one 768 wide that of 1.x or SDXL."""
    assert made_for({kohya(LINEAR, "down"): (4, 64), kohya(LINEAR, "up"): (96, 4)}) == ()
    assert made_for({kohya(QUERY, "down"): (4, 64)}) == ("Stable Diffusion 1.x", "Stable Diffusion 2.x")
    assert made_for({onetrainer(QUERY, "down"): (4, 768)}) == ("Stable Diffusion 1.x", "SDXL")


def test_family_of_the_model_itself_is_not_blamed(file: Path) -> None:
    """A misspelt key in a LoRA for 1.x, given to a model of 1.x: the names are wrong, not the family."""
    shapes, arch = model()
    save_file(pair_for(LINEAR[1], 96, 768) | pair_for(LINEAR[1] + "2", 96, 768), file)
    with pytest.raises(AdapterError) as caught:
        open_lora(LoraOption(file), shapes | {f"{LINEAR[0]}.weight": (96, 768)}, arch)
    assert "2 of 4 keys" in caught.value.message and "made for" not in caught.value.message


def test_lora_for_inpainting_on_another_model(file: Path) -> None:
    up, down = seeded((64, 4, 1, 1), (4, 9, 3, 3))
    tensors = {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.lora_down.weight": down}
    refused(file, tensors, "made for a Stable Diffusion 1.x inpainting model", "9 channels, this model's has 4")


def test_sdxl_lora_under_ldm_names_is_told_from_its_extra_blocks(file: Path) -> None:
    deep = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    refused(file, pair_for(deep, 640, 2048) | pair_for(LINEAR[1], 640, 2048), "made for SDXL", allow_unmatched=True)
    error = refused(
        file,
        pair_for(deep, 640, 64) | pair_for(LINEAR[1], 96, 64),
        deep,
        "did you mean 'lora_unet_input_blocks_4_1_transf",
    )
    assert "--allow-unmatched" in error.fix


# Sets that are not whole, and shapes that do not fit


def whole(kind: str) -> tuple[str, Tensors]:
    """A good adapter of one module, of a kind."""
    name, shapes = {
        "lora": (LINEAR[1], {"lora_up.weight": (96, 4), "lora_down.weight": (4, 64)}),
        "mid": (
            KERNEL[1],
            {"lora_up.weight": (96, 4, 1, 1), "lora_down.weight": (4, 64, 1, 1), "lora_mid.weight": (4, 4, 3, 3)},
        ),
        "sparse": (
            LINEAR[1],
            {
                "lora_up.weight": (96, 4),
                "lora_down.weight": (4, 64),
                "bias_indices": (2, 3),
                "bias_values": (3,),
                "bias_size": (2,),
            },
        ),
        "embedding": (f"text_encoder.{EMBEDDING[2]}", {"lora_embedding_A": (4, 77), "lora_embedding_B": (64, 4)}),
        "loha": (LINEAR[1], {"hada_w1_a": (96, 4), "hada_w1_b": (4, 64), "hada_w2_a": (96, 4), "hada_w2_b": (4, 64)}),
        "loha tucker": (
            KERNEL[1],
            {
                "hada_w1_a": (4, 96),
                "hada_w1_b": (4, 64),
                "hada_w2_a": (4, 96),
                "hada_w2_b": (4, 64),
                "hada_t1": (4, 4, 3, 3),
                "hada_t2": (4, 4, 3, 3),
            },
        ),
        "lokr": (LINEAR[1], {"lokr_w1": (8, 8), "lokr_w2_a": (12, 2), "lokr_w2_b": (2, 8)}),
        "lokr factored": (
            LINEAR[1],
            {"lokr_w1_a": (8, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (12, 2), "lokr_w2_b": (2, 8)},
        ),
        "lokr tucker": (
            KERNEL[1],
            {"lokr_w1": (8, 8), "lokr_w2_a": (2, 12), "lokr_w2_b": (2, 8), "lokr_t2": (2, 2, 3, 3)},
        ),
    }[kind]
    tensors = dict(zip((f"{name}.{part}" for part in shapes), seeded(*shapes.values()), strict=True))
    if kind == "sparse":
        tensors[f"{name}.bias_indices"], tensors[f"{name}.bias_size"] = (
            torch.zeros(2, 3, dtype=torch.int16),
            torch.tensor([96, 64], dtype=torch.int16),
        )
    return name, tensors


WHOLE = ["lora", "mid", "sparse", "embedding", "loha", "loha tucker", "lokr", "lokr factored", "lokr tucker"]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_set_is_good_and_each_part_is_needed(file: Path, kind: str) -> None:
    name, tensors = whole(kind)
    save_file(tensors, file)
    opened(file).file.close()
    for part in tensors:
        if part.endswith("lora_mid.weight"):
            refused(
                file, {k: v for k, v in tensors.items() if k != part}, name, "[96, 64, 3, 3]"
            )  # what is left is a LoRA of a 1x1 convolution
        elif part.endswith("lokr_t2"):
            refused(file, {k: v for k, v in tensors.items() if k != part}, name, "[96, 64, 3, 3]")
        else:
            missing = (
                part.rpartition(".")[2]
                if "lora_up" not in part and "lora_down" not in part
                else part.removeprefix(f"{name}.")
            )
            missing = "lokr_w1" if part.endswith(".lokr_w1") else missing
            error = refused(file, {k: v for k, v in tensors.items() if k != part}, f"{name}: {missing} is missing")
            assert "incomplete" in error.fix


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("axis", [0, 1])
def test_part_of_another_size(file: Path, kind: str, axis: int) -> None:
    name, tensors = whole(kind)
    for part, tensor in tensors.items():
        if "bias_" not in part and tensor.dim() > axis:
            wrong = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
            message = refused(file, tensors | {part: wrong}, name, "do not make a change of a weight of shape").message
            assert str(list(wrong.shape)) in message


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite(file: Path, kind: str, bad: float) -> None:
    _, tensors = whole(kind)
    for part, tensor in tensors.items():
        if tensor.is_floating_point():
            broken = tensor.clone()
            broken.view(-1)[0] = bad
            refused(file, tensors | {part: broken}, f"{part}: 1 values are NaN or infinite")


def test_matrix_of_integers(file: Path) -> None:
    _, tensors = whole("lora")
    part = kohya(LINEAR, "up")
    refused(
        file,
        tensors | {part: torch.ones(96, 4, dtype=torch.int8)},
        f"{part}: expected floating-point numbers, found I8",
    )


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("bias_indices", torch.tensor([[0, 96, 1], [0, 0, 0]], dtype=torch.int16)),
        ("bias_indices", torch.tensor([[0, 1, 1], [0, 0, -1]], dtype=torch.int16)),
        ("bias_indices", torch.zeros(2, 4, dtype=torch.int16)),
        ("bias_size", torch.tensor([96, 65], dtype=torch.int16)),
        ("bias_size", torch.tensor([96], dtype=torch.int16)),
        ("bias_size", torch.tensor([30000, 30000], dtype=torch.int16)),
    ],
    ids=["row", "column", "count", "another size", "one size", "huge"],
)
def test_sparse_residual_outside_its_weight(file: Path, part: str, value: torch.Tensor) -> None:
    name, tensors = whole("sparse")
    refused(file, tensors | {f"{name}.{part}": value}, name, "bias_size", "[96, 64]")


def test_two_kinds_for_one_module(file: Path) -> None:
    refused(file, whole("lora")[1] | whole("loha")[1], LINEAR[1], "holds both LoRA and LoHa")


@pytest.mark.parametrize("shape", [(95, 1), (1, 63), (1, 96), (64, 1), (96, 64), (), (3,)], ids=str)
def test_magnitudes_of_another_length(file: Path, shape: tuple[int, ...]) -> None:
    refused(
        file,
        whole("lora")[1] | {f"{LINEAR[1]}.dora_scale": torch.ones(shape)},
        LINEAR[1],
        f"dora_scale {list(shape)}",
        "[96, 64]",
    )
    refused(
        file, whole("lora")[1] | {f"{LINEAR[1]}.lora_magnitude_vector": torch.ones(64)}, "lora_magnitude_vector [64]"
    )


# Biases and norms


def test_bias_the_model_has_not(file: Path) -> None:
    tensors = whole("lora")[1] | {f"{LINEAR[1]}.diff_b": torch.ones(96)}
    error = refused(file, tensors, f"{LINEAR[1]}.diff_b: changes a bias, and {LINEAR[0]} has none")
    assert "--allow-unmatched" in error.fix
    save_file(tensors, file)
    adapter = opened(file, allow_unmatched=True)
    with adapter.file:
        assert adapter.unmatched == (f"{LINEAR[1]}.diff_b",) and list(adapter.deltas) == [f"{LINEAR[0]}.weight"]


def test_bias_beside_a_lora_and_bias_alone(file: Path) -> None:
    bias = seeded((256,))[0]
    for more in (pair_for(TEXT[1], 256, 64), {}, {f"{TEXT[1]}.alpha": torch.tensor(1.0)}):
        save_file(more | {f"{TEXT[1]}.diff_b": bias}, file)
        adapter = opened(file, 1.0, 0.5)
        with adapter.file:
            assert f"{TEXT[0]}.bias" in adapter.deltas and len(adapter.deltas) == (2 if len(more) == 2 else 1)
            torch.testing.assert_close(change_of(adapter, f"{TEXT[0]}.bias", torch.ones(256)), bias * 0.5)


def test_bias_and_norm_of_another_size(file: Path) -> None:
    refused(
        file, {f"{TEXT[1]}.diff_b": torch.ones(3072)}, f"{TEXT[1]}.diff_b: expected a bias of shape [256], found [3072]"
    )
    refused(
        file,
        {f"{NORM[1]}.w_norm": torch.ones(640), f"{NORM[1]}.b_norm": torch.ones(640)},
        NORM[1],
        "diff [640]",
        "[64]",
    )


# The 4-channel conv_in of a LoRA on a model for inpainting

CONV_IN = (UNET + "input_blocks.0.0.weight", "lora_unet_conv_in")


def open_for(path: Path, channels: int) -> Tensors:
    """The change of conv_in where the model has this many input channels."""
    shapes, arch = model()
    shape = (64, channels, 3, 3)
    adapter = open_lora(
        LoraOption(path), shapes | {CONV_IN[0]: shape}, replace(arch, unet=replace(arch.unet, in_channels=channels))
    )
    with adapter.file:
        return {name: change_of(adapter, name, torch.ones(shape)) for name in adapter.deltas}


@pytest.mark.parametrize("channels", [9, 8])
@pytest.mark.parametrize("kind", ["lora", "diff", "mid"])
def test_four_channels_of_conv_in_change_the_first_four(file: Path, channels: int, kind: str) -> None:
    up, down, diff, mid = seeded((64, 4, 1, 1), (4, 4, 3, 3), (64, 4, 3, 3), (4, 4, 3, 3))
    parts = {
        "lora": {"lora_up.weight": up, "lora_down.weight": down},
        "diff": {"diff": diff},
        "mid": {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": torch.eye(4)[:, :, None, None]},
    }[kind]
    save_file({f"{CONV_IN[1]}.{part}": tensor.contiguous() for part, tensor in parts.items()}, file)
    plain, padded = open_for(file, 4)[CONV_IN[0]], open_for(file, channels)[CONV_IN[0]]
    assert plain.any() and torch.equal(padded[:, :4], plain) and not padded[:, 4:].any()


def test_other_layers_and_other_counts_are_not_padded(file: Path) -> None:
    up, down = seeded((64, 4, 1, 1), (4, 3, 3, 3))
    save_file({f"{CONV_IN[1]}.lora_up.weight": up, f"{CONV_IN[1]}.lora_down.weight": down}, file)
    with pytest.raises(AdapterError, match=r"\[64, 9, 3, 3\]"):
        open_for(file, 9)
    up, down, scale = seeded((64, 4, 1, 1), (4, 4, 3, 3), (64, 1, 1, 1))
    save_file(
        {f"{CONV_IN[1]}.lora_up.weight": up, f"{CONV_IN[1]}.lora_down.weight": down, f"{CONV_IN[1]}.dora_scale": scale},
        file,
    )
    with pytest.raises(AdapterError, match="DoRA for 4 input channels"):
        open_for(file, 9)


# What inspect says


def test_kinds_and_ranks() -> None:
    shapes = {
        f"m{i}.{name.removeprefix(whole(kind)[0] + '.')}": tuple(t.shape)
        for i, kind in enumerate(WHOLE)
        for name, t in whole(kind)[1].items()
    } | {
        "n.w_norm": (4,),
        "d.diff": (4, 4),
        "m0.dora_scale": (96, 1),
    }
    assert kinds(shapes) == {
        "LoRA": 2,
        "LoHa": 2,
        "LoKr": 3,
        "LoCon with mid": 1,
        "DoRA LoRA": 1,
        "norm": 1,
        "full difference": 1,
    }
    assert ranks(shapes) == {2: 3, 4: 6}
    assert describe(shapes) == "a LoRA"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputFileError):
        opened(tmp_path / "none.safetensors")


def test_two_changes_of_one_bias(file: Path) -> None:
    tensors = pair_for(TEXT[1], 256, 64) | {
        f"{TEXT[1]}.diff_b": torch.ones(256),
        f"{TEXT[1]}.lora_B.bias": torch.ones(256),
    }
    refused(file, tensors, TEXT[1], "holds both diff_b and lora_B.bias")


def test_any_set_of_parts_is_fused_or_refused(file: Path) -> None:
    """Seeded sets of parts with sizes of 0 to 3 dimensions, most of them wrong: a named error or a change of the
    weight's shape, nothing else.
    """
    random = Random(0)
    parts = sorted(
        {name.rpartition(f"{whole(kind)[0]}.")[2] for kind in WHOLE for name in whole(kind)[1]}
        | {"alpha", "dora_scale", "diff", "diff_b", "w_norm"}
    )
    outcomes = Counter[bool]()
    for _ in range(100):
        base = whole(random.choice(WHOLE))[1] if random.random() < 0.7 else {}
        name = next(iter(base), f"{LINEAR[1]}.x").partition(".")[0]
        tensors = dict(base) if name.startswith("lora_unet") else {}
        for part in random.sample(parts, random.randrange(1, 3)):
            shape = tuple(random.choice((0, 1, 2, 4, 64, 96)) for _ in range(random.randrange(5)))
            tensors[f"{name if name.startswith('lora_unet') else LINEAR[1]}.{part}"] = torch.zeros(shape)
        save_file(tensors, file)
        try:
            adapter = opened(file)
            with adapter.file:
                for weight in adapter.deltas:
                    assert change_of(adapter, weight, torch.ones(model()[0][weight])).shape == model()[0][weight]
            outcomes[True] += 1
        except AdapterError as error:
            assert error.exit_code == 3 and error.message.startswith(str(file))
            outcomes[False] += 1
    assert outcomes[False] > 40 and outcomes[True] > 0
