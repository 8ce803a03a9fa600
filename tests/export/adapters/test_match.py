"""LoRA files: the option's syntax, every key applied or named in an error, and the change they make against plain
convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapter_files import change_of, model, opened
from conftest import CHECKPOINT, LORA, RawTensor, read_raw, write_raw
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

from sdrt.errors import AdapterError, CheckpointError, InputFileError, UsageError
from sdrt.export.adapters.match import LoraOption, open_lora, parse_lora_option
from sdrt.export.families.sd1 import CLIP, UNET
from sdrt.export.read.checkpoint import Tensor
from sdrt.export.read.tensor_file import open_tensor_file
from sdrt.export.weights import Change, write_weights

# One weight of each kind: its canonical name, and the module's name in a kohya file.
LINEAR = (
    UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
)
POINTWISE = (UNET + "input_blocks.4.1.proj_in.weight", "lora_unet_down_blocks_1_attentions_0_proj_in")
KERNEL = (UNET + "input_blocks.4.0.in_layers.2.weight", "lora_unet_down_blocks_1_resnets_0_conv1")
TEXT = (CLIP + "text_model.encoder.layers.0.mlp.fc1.weight", "lora_te_text_model_encoder_layers_0_mlp_fc1")


def refused(path: Path, *fragments: str, allow_unmatched: bool = False) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        opened(path, allow_unmatched=allow_unmatched).file.close()
    error = caught.value
    assert error.exit_code == 3
    assert error.message.startswith(f"{path}: ")
    assert error.message.isprintable()
    for fragment in fragments:
        assert fragment in error.message
    return error


def pair(
    module: str, up: Sequence[int], down: Sequence[int], alpha: torch.Tensor | float | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """One module's tensors in a kohya file, seeded."""
    random = torch.Generator().manual_seed(seed)
    tensors = {
        f"{module}.lora_up.weight": torch.randn(tuple(up), generator=random),
        f"{module}.lora_down.weight": torch.randn(tuple(down), generator=random),
    }
    if alpha is not None:
        tensors[f"{module}.alpha"] = alpha if isinstance(alpha, torch.Tensor) else torch.tensor(float(alpha))
    return tensors


GOOD = pair(LINEAR[1], (96, 4), (4, 64), 2.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "style.safetensors"


# The option


@pytest.mark.parametrize(
    ("text", "path", "scale", "te_scale"),
    [
        ("x.safetensors", "x.safetensors", 1.0, 1.0),
        ("x.safetensors:0.8", "x.safetensors", 0.8, 0.8),
        ("x.safetensors:0.8:0.5", "x.safetensors", 0.8, 0.5),
        ("x.safetensors:-1", "x.safetensors", -1.0, -1.0),
        ("x.safetensors:.5:0", "x.safetensors", 0.5, 0.0),
        ("x.safetensors:1e-3:+2", "x.safetensors", 1e-3, 2.0),
        ("folder/x.v2.safetensors:2", "folder/x.v2.safetensors", 2.0, 2.0),
        ("x:0.5", "x", 0.5, 0.5),
        ("a:b.safetensors", "a:b.safetensors", 1.0, 1.0),
        ("a:b.safetensors:0.5", "a:b.safetensors", 0.5, 0.5),
        ("a:b/x.safetensors:0.5:0.25", "a:b/x.safetensors", 0.5, 0.25),
        ("a:0.5/x.safetensors", "a:0.5/x.safetensors", 1.0, 1.0),
        (r"C:\x\y.safetensors", r"C:\x\y.safetensors", 1.0, 1.0),
        (r"C:\x\y.safetensors:0.5", r"C:\x\y.safetensors", 0.5, 0.5),
        (r"C:\x\y.safetensors:0.5:0.25", r"C:\x\y.safetensors", 0.5, 0.25),
        ("C:/x/y.safetensors:0.5", "C:/x/y.safetensors", 0.5, 0.5),
        ("C:y.safetensors", "C:y.safetensors", 1.0, 1.0),
        ("C:y.safetensors:0.5", "C:y.safetensors", 0.5, 0.5),
        ("new\nline.safetensors:0.5", "new\nline.safetensors", 0.5, 0.5),
    ],
)
def test_l11_option(text: str, path: str, scale: float, te_scale: float) -> None:
    assert parse_lora_option(text) == LoraOption(Path(path), scale, te_scale)


@pytest.mark.parametrize(
    "text",
    [
        "x.safetensors:abc",
        "x.safetensors:nan",
        "x.safetensors:inf",
        "x.safetensors:-inf",
        "x.safetensors:1e999",
        "x.safetensors:",
        "x.safetensors::",
        "x.safetensors:0.5:",
        "x.safetensors::0.5",
        "x.safetensors:0,8",
        "x.safetensors:0.8:abc",
        "x.safetensors:abc:0.8",
        r"C:\x\y.safetensors:abc",
    ],
)
def test_l7_bad_scale(text: str) -> None:
    with pytest.raises(UsageError, match="expected a finite number") as caught:
        parse_lora_option(text)
    assert caught.value.exit_code == 2
    assert f"--lora {text}: scale" in caught.value.message
    assert "style.safetensors:0.8" in caught.value.fix


def test_l11_existing_file_with_colons_in_its_name(tmp_path: Path) -> None:
    for name in ("style:0.5", "style:1:2", "a:b"):
        (tmp_path / name).touch()
        assert parse_lora_option(f"{tmp_path}/{name}") == LoraOption(tmp_path / name)
        assert parse_lora_option(f"{tmp_path}/{name}:0.25") == LoraOption(tmp_path / name, 0.25, 0.25)


@pytest.mark.parametrize("name", ["x" * 5000, "x\0y"], ids=["too long", "NUL"])
def test_impossible_name_is_no_crash(name: str) -> None:
    option = parse_lora_option(f"{name}:0.5")
    assert option == LoraOption(Path(name), 0.5, 0.5)
    with pytest.raises(InputFileError):
        opened(option.path)


@given(
    scale=st.floats(allow_nan=False, allow_infinity=False), te_scale=st.floats(allow_nan=False, allow_infinity=False)
)
def test_every_finite_scale_survives(scale: float, te_scale: float) -> None:
    assert parse_lora_option(f"no such/file.safetensors:{scale!r}:{te_scale!r}") == LoraOption(
        Path("no such/file.safetensors"), scale, te_scale
    )


# Matching


def test_every_key_of_the_emoji_lora_is_applied() -> None:
    lora = opened(LORA)
    with lora.file:
        assert len(lora.deltas) == 248
        assert len(lora.file.entries) == 3 * 248
        assert lora.unmatched == ()


def test_ldm_and_diffusers_spellings_make_the_same_change(tmp_path: Path) -> None:
    spellings = {
        "diffusers": LINEAR[1],
        "ldm": "lora_unet_" + LINEAR[0][len(UNET) :].removesuffix(".weight").replace(".", "_"),
    }
    deltas = []
    for name, module in spellings.items():
        save_file(pair(module, (96, 4), (4, 64), 2.0), tmp_path / f"{name}.safetensors")
        lora = opened(tmp_path / f"{name}.safetensors")
        with lora.file:
            deltas.append(change_of(lora, LINEAR[0], torch.zeros(96, 64)))
    assert torch.equal(*deltas)


def test_one_weight_under_both_spellings(file: Path) -> None:
    ldm = "lora_unet_" + LINEAR[0][len(UNET) :].removesuffix(".weight").replace(".", "_")
    save_file(GOOD | pair(ldm, (96, 4), (4, 64)), file)
    refused(file, LINEAR[0], "another key")


def test_l1_no_key_matches(file: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(7):
        tensors |= pair(f"lora_unet_other_blocks_{i}_conv", (8, 2), (2, 8), 1.0)
    save_file(tensors, file)
    error = refused(file, "21 of 21 keys", "lora_unet_other_blocks_0_conv", "21 x lora_unet_other_blocks_N_conv")
    assert "--allow-unmatched" not in error.fix
    assert (
        error.message.count(".lora_up.weight")
        + error.message.count(".lora_down.weight")
        + error.message.count(".alpha")
        == 5
    )
    refused(file, "21 of 21 keys", allow_unmatched=True)


def test_no_key_matches_and_the_file_says_what_it_was_made_for(file: Path) -> None:
    save_file(pair("lora_unet_other", (8, 2), (2, 8)), file, {"ss_base_model_version": "sd_v2\x1b[0m"})
    refused(file, "it was made for sd_v2\\x1b[0m")


def test_l1_one_key_does_not_match(file: Path) -> None:
    typo = LINEAR[1].replace("attn2", "attn3")
    save_file(GOOD | pair(typo, (96, 4), (4, 64)), file)
    error = refused(
        file,
        "2 of 5 keys",
        f"{typo}.lora_",
        "did you mean",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn",
    )
    assert "--allow-unmatched" in error.fix
    lora = opened(file, allow_unmatched=True)
    with lora.file:
        assert sorted(lora.unmatched) == [f"{typo}.lora_down.weight", f"{typo}.lora_up.weight"]
        assert list(lora.deltas) == [LINEAR[0]]


def test_key_of_another_kind_beside_good_ones(file: Path) -> None:
    save_file(GOOD | {f"{LINEAR[1]}.bias": torch.zeros(96)}, file)
    refused(file, "1 of 4 keys", f"{LINEAR[1]}.bias")


def test_control_characters_in_keys_are_shown_escaped(file: Path) -> None:
    bad = RawTensor("F32", (1,), bytes(4))
    write_raw(file, read_raw_tensors(GOOD) | {"lora_unet_\x1b[31m.alpha": bad})
    refused(file, "lora_unet_\\x1b[31m.alpha")


def read_raw_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, RawTensor]:
    return {name: RawTensor("F32", tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        (
            [
                "lora_te1_text_model_encoder_layers_0_mlp_fc1",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1",
                "lora_unet_input_blocks_4_1_proj_in",
            ],
            "SDXL",
        ),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1"], "SDXL"),
        (["lora_unet_double_blocks_0_img_attn_proj", "lora_unet_single_blocks_0_linear1"], "Flux"),
        (["lora_unet_joint_blocks_0_x_block_attn_proj"], "SD3"),
    ],
)
def test_l2_lora_of_another_family(file: Path, modules: list[str], family: str) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        tensors |= pair(module, (640, 4), (4, 640), 1.0)
    save_file(tensors, file)
    refused(file, f"made for {family}")


@pytest.mark.parametrize(
    ("module", "up", "down", "shape"),
    [
        (LINEAR[1], (96, 4), (4, 768), "[96, 64]"),
        (LINEAR[1], (320, 4), (4, 64), "[96, 64]"),
        (TEXT[1], (3072, 4), (4, 768), "[256, 64]"),
        (KERNEL[1], (96, 4, 1, 1), (4, 64, 1, 1), "[96, 64, 3, 3]"),
        (KERNEL[1], (96, 4, 3, 3), (4, 64, 3, 3), "[96, 64, 3, 3]"),
        (POINTWISE[1], (96, 4, 1, 1), (4, 96, 3, 3), "[96, 96, 1, 1]"),
    ],
    ids=["context 768", "320 channels", "text 768", "1x1 for 3x3", "3x3 up", "3x3 for 1x1"],
)
def test_l2_lora_for_other_widths(
    file: Path, module: str, up: tuple[int, ...], down: tuple[int, ...], shape: str
) -> None:
    save_file(pair(module, up, down), file)
    error = refused(file, module, str(list(up)), str(list(down)), shape)
    assert "other sizes" in error.fix


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight"])
def test_l4_half_a_pair(file: Path, part: str) -> None:
    tensors = dict(GOOD)
    del tensors[f"{LINEAR[1]}.{part}"]
    save_file(tensors, file)
    refused(file, f"{LINEAR[1]}: {part} is missing")


def test_alpha_alone(file: Path) -> None:
    save_file({f"{LINEAR[1]}.alpha": torch.tensor(1.0)}, file)
    refused(file, LINEAR[1], "is missing")


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ((96, 4), (8, 64)),
        ((96, 8), (4, 64)),
        ((96, 0), (0, 64)),
        ((96,), (4, 64)),
        ((96, 4), (64,)),
        ((), ()),
        ((96, 4, 2), (4, 64)),
    ],
    ids=lambda shape: "x".join(map(str, shape)) or "scalar",
)
def test_l4_shapes_that_do_not_fit_together(file: Path, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    save_file(pair(LINEAR[1], up, down), file)
    refused(file, LINEAR[1], f"up {list(up)} and down {list(down)}")


@pytest.mark.parametrize(
    ("shapes", "what", "fix"),
    [
        ({"emb_params": (4, 768)}, "a textual-inversion embedding", "--embedding"),
        ({"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}, "a VAE", "--vae"),
        ({"conditioner.embedders.1.model.ln_final.weight": (1280,)}, "a CLIP text encoder", "LyCORIS"),
        ({"some.weight": (2, 2)}, "tensors of no kind", "LyCORIS"),
        ({}, "an empty file", "LyCORIS"),
    ],
)
def test_l10_other_file_given_as_a_lora(file: Path, shapes: dict[str, tuple[int, ...]], what: str, fix: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    assert fix in refused(file, f"expected a LoRA, found {what}").fix


def test_l10_checkpoint_given_as_a_lora() -> None:
    assert "--checkpoint" in refused(CHECKPOINT, "found a Stable Diffusion 1.x model").fix


def test_missing_file_and_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "blindbox.safetensors").write_bytes(LORA.read_bytes()[:-1])
    with pytest.raises(InputFileError, match="truncated"):
        opened(tmp_path / "blindbox.safetensors")
    with pytest.raises(InputFileError, match=r"did you mean 'blindbox\.safetensors'"):
        opened(tmp_path / "blind-box.safetensors")


# Alpha


def factor(file: Path, alpha: torch.Tensor | float | None) -> float:
    """What alpha makes of a rank-4 LoRA's change, relative to up @ down."""
    tensors = pair(LINEAR[1], (96, 4), (4, 64), alpha)
    save_file(tensors, file)
    lora = opened(file)
    with lora.file:
        delta = change_of(lora, LINEAR[0], torch.zeros(96, 64))
    product = tensors[f"{LINEAR[1]}.lora_up.weight"] @ tensors[f"{LINEAR[1]}.lora_down.weight"]
    ratio = delta / product
    assert torch.allclose(ratio, ratio.mean(), rtol=1e-5)
    return float(ratio.mean())


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (None, 1.0),
        (0.0, 1.0),
        (4.0, 1.0),
        (2.0, 0.5),
        (8.0, 2.0),
        (-2.0, -0.5),
        (torch.tensor(2, dtype=torch.int64), 0.5),
        (torch.tensor(2.0, dtype=torch.bfloat16), 0.5),
        (torch.tensor(2.0, dtype=torch.float16), 0.5),
        (torch.tensor([2.0], dtype=torch.float64), 0.5),
        (torch.tensor([[2.0]]), 0.5),
    ],
    ids=["missing", "zero", "rank", "half", "double", "negative", "int", "bf16", "fp16", "one number", "one by one"],
)
def test_l5_alpha(file: Path, alpha: torch.Tensor | float | None, expected: float) -> None:
    assert factor(file, alpha) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "alpha", [torch.tensor([1.0, 2.0]), torch.zeros(0), torch.ones(2, 1)], ids=["two", "none", "2x1"]
)
def test_l5_alpha_of_several_numbers(file: Path, alpha: torch.Tensor) -> None:
    save_file(pair(LINEAR[1], (96, 4), (4, 64), alpha), file)
    refused(file, f"{LINEAR[1]}.alpha: expected one number, found shape {list(alpha.shape)}")


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_l5_alpha_that_is_not_finite(file: Path, alpha: float) -> None:
    save_file(pair(LINEAR[1], (96, 4), (4, 64), alpha), file)
    refused(file, f"{LINEAR[1]}.alpha: expected a finite number, found {alpha}")


# The change


@pytest.mark.parametrize("part", ["lora_up", "lora_down"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_matrix_that_is_not_finite(file: Path, part: str, bad: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in GOOD.items()}
    tensors[f"{LINEAR[1]}.{part}.weight"][:2, 1] = bad
    save_file(tensors, file)
    lora = opened(file)
    with lora.file, pytest.raises(AdapterError, match="NaN or infinite") as caught:
        change_of(lora, LINEAR[0], torch.zeros(96, 64))
    assert caught.value.message.startswith(f"{file}: {LINEAR[1]}.{part}.weight: 2 values")


def test_change_of_a_convolution_is_the_two_convolutions_after_each_other(file: Path) -> None:
    tensors = pair(KERNEL[1], (96, 4, 1, 1), (4, 64, 3, 3), 2.0)
    save_file(tensors, file)
    lora = opened(file, 0.7)
    with lora.file:
        delta = change_of(lora, KERNEL[0], torch.zeros(96, 64, 3, 3))
    x = torch.randn(2, 64, 9, 11, generator=torch.Generator().manual_seed(1))
    low = F.conv2d(x, tensors[f"{KERNEL[1]}.lora_down.weight"], padding=1)
    expected = F.conv2d(low, tensors[f"{KERNEL[1]}.lora_up.weight"]) * 0.7 * 2.0 / 4
    torch.testing.assert_close(F.conv2d(x, delta, padding=1), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("flat", [False, True], ids=["4-D", "2-D"])
def test_change_of_a_pointwise_convolution(file: Path, flat: bool) -> None:
    ones: tuple[int, ...] = () if flat else (1, 1)
    tensors = pair(POINTWISE[1], (96, 4, *ones), (4, 96, *ones), 2.0)
    save_file(tensors, file)
    lora = opened(file, 0.7)
    with lora.file:
        delta = change_of(lora, POINTWISE[0], torch.zeros(96, 96, 1, 1))
    x = torch.randn(2, 96, 5, 7, generator=torch.Generator().manual_seed(1))
    down, up = (
        tensors[f"{POINTWISE[1]}.{part}.weight"].reshape(*shape, 1, 1)
        for part, shape in (("lora_down", (4, 96)), ("lora_up", (96, 4)))
    )
    torch.testing.assert_close(
        F.conv2d(x, delta), F.conv2d(F.conv2d(x, down), up) * 0.7 * 2.0 / 4, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("flat", [False, True], ids=["4-D", "2-D"])
def test_change_of_a_linear_layer(file: Path, flat: bool) -> None:
    ones: tuple[int, ...] = () if flat else (1, 1)
    tensors = pair(LINEAR[1], (96, 4, *ones), (4, 64, *ones), 2.0)
    save_file(tensors, file)
    lora = opened(file, -0.3)
    with lora.file:
        delta = change_of(lora, LINEAR[0], torch.zeros(96, 64))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    down, up = (tensors[f"{LINEAR[1]}.{part}.weight"].flatten(1) for part in ("lora_down", "lora_up"))
    torch.testing.assert_close(
        F.linear(x, delta), F.linear(F.linear(x, down), up) * -0.3 * 2.0 / 4, rtol=1e-4, atol=1e-3
    )


def test_each_scale_weighs_its_own_network(file: Path) -> None:
    save_file(GOOD | pair(TEXT[1], (256, 4), (4, 64)), file)
    deltas = []
    for scale, te_scale in ((1.0, 1.0), (0.5, 3.0)):
        lora = opened(file, scale, te_scale)
        with lora.file:
            deltas.append(
                (change_of(lora, LINEAR[0], torch.zeros(96, 64)), change_of(lora, TEXT[0], torch.zeros(256, 64)))
            )
    torch.testing.assert_close(deltas[1][0], deltas[0][0] * 0.5)
    torch.testing.assert_close(deltas[1][1], deltas[0][1] * 3.0)


# In the weights file

BASE = {
    name: torch.randn(model()[0][name], generator=torch.Generator().manual_seed(i))
    for i, (name, _) in enumerate((LINEAR, POINTWISE, KERNEL, TEXT))
}


def fused(
    folder: Path, loras: Sequence[LoraOption], precision: str = "fp32", base: Mapping[str, torch.Tensor] = BASE
) -> tuple[dict[str, torch.Tensor], bytes, Sequence[Mapping[str, Change]]]:
    """The weights file of a few base tensors and these LoRAs: as tensors and bytes, and the changes it reports."""
    shapes, arch = model()
    save_file(dict(base), folder / "base.safetensors")
    adapters = [open_lora(option, shapes, arch) for option in loras]
    try:
        with open_tensor_file(folder / "base.safetensors") as file:
            tensors = {name: Tensor(file, entry) for name, entry in file.entries.items()}
            changes = write_weights(folder / "w.safetensors", tensors, adapters, precision, lambda done: None).changes
    finally:
        for adapter in adapters:
            adapter.file.close()
    data = (folder / "w.safetensors").read_bytes()
    return load(data), data, changes


@pytest.fixture
def style(file: Path) -> Path:
    """A LoRA of all four weights."""
    save_file(
        pair(LINEAR[1], (96, 4), (4, 64), 2.0)
        | pair(POINTWISE[1], (96, 4, 1, 1), (4, 96, 1, 1), 2.0)
        | pair(KERNEL[1], (96, 4, 1, 1), (4, 64, 3, 3), 2.0)
        | pair(TEXT[1], (256, 4), (4, 64), 2.0),
        file,
    )
    return file


def test_change_is_added_to_the_weights(tmp_path: Path, style: Path) -> None:
    found, _, changes = fused(tmp_path, [LoraOption(style, 0.5, 0.25)])
    squares: dict[str, list[float]] = {"unet": [0.0, 0.0], "text_encoder": [0.0, 0.0]}
    lora = opened(style, 0.5, 0.25)
    with lora.file:
        for name, tensor in BASE.items():
            delta = change_of(lora, name, tensor)
            torch.testing.assert_close(found[name], tensor + delta)
            assert not torch.equal(found[name], tensor)
            squares["text_encoder" if name.startswith(CLIP) else "unet"][0] += float(delta.double().square().sum())
            squares["text_encoder" if name.startswith(CLIP) else "unet"][1] += float(tensor.double().square().sum())
    assert {component: change.modules for component, change in changes[0].items()} == {"unet": 3, "text_encoder": 1}
    for component, (delta_squares, base_squares) in squares.items():
        assert changes[0][component].relative == pytest.approx(math.sqrt(delta_squares / base_squares), rel=1e-4)


def test_l8_same_lora_twice_is_twice_its_scale(tmp_path: Path, style: Path) -> None:
    twice, _, _ = fused(tmp_path, [LoraOption(style), LoraOption(style)])
    double, _, _ = fused(tmp_path, [LoraOption(style, 2.0, 2.0)])
    for name in BASE:
        torch.testing.assert_close(twice[name], double[name], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(twice[name], BASE[name])


def test_l8_order_of_loras_does_not_matter(tmp_path: Path, style: Path) -> None:
    save_file(
        pair(KERNEL[1], (96, 2, 1, 1), (2, 64, 3, 3), seed=7) | pair(LINEAR[1], (96, 2), (2, 64), seed=8),
        tmp_path / "other.safetensors",
    )
    options = [
        LoraOption(style, 0.3, 0.3),
        LoraOption(tmp_path / "other.safetensors", 1.7, 1.7),
        LoraOption(style, -0.9, 0.1),
    ]
    results = [fused(tmp_path, order) for order in (options, options[::-1], [options[1], options[2], options[0]])]
    assert results[0][1] == results[1][1] == results[2][1]
    assert results[0][2] == results[1][2][::-1]


def dora(path: Path, seed: int) -> Path:
    """A DoRA of one weight, its magnitudes along the outputs."""
    magnitude = torch.linspace(1, 3, 96).reshape(96, 1)
    save_file(pair(LINEAR[1], (96, 4), (4, 64), 2.0, seed) | {f"{LINEAR[1]}.dora_scale": magnitude}, path)
    return path


def applied(weight: torch.Tensor, path: Path, scale: float) -> torch.Tensor:
    """A weight after one adapter of it, by the formula in float64: W + scale (V m / |V| - W) with magnitudes, else W +
    scale (alpha / r) up @ down.
    """
    tensors = {
        name.removeprefix(f"{LINEAR[1]}."): tensor.double()
        for name, tensor in load_file(path).items()
        if name.startswith(LINEAR[1])
    }
    low = tensors["lora_up.weight"] @ tensors["lora_down.weight"] * tensors["alpha"] / 4
    if "dora_scale" not in tensors:
        return weight + scale * low
    moved = weight + low
    return weight + scale * (moved * tensors["dora_scale"] / moved.norm(dim=1, keepdim=True) - weight)


def test_adapters_act_one_after_the_other(tmp_path: Path, style: Path) -> None:
    """A DoRA rescales what those before it made; one after it is added whole. Two DoRAs the same way."""
    one, two = dora(tmp_path / "one.safetensors", 5), dora(tmp_path / "two.safetensors", 6)
    results = []
    for stack in (
        [(style, 0.7), (one, 0.5)],
        [(one, 0.5), (style, 0.7)],
        [(one, 0.5), (two, 0.8)],
        [(two, 0.8), (style, 0.7), (one, 0.5)],
    ):
        expected = BASE[LINEAR[0]].double()
        for path, scale in stack:
            expected = applied(expected, path, scale)
        found, _, changes = fused(tmp_path, [LoraOption(path, scale, scale) for path, scale in stack])
        torch.testing.assert_close(found[LINEAR[0]].double(), expected, rtol=1e-5, atol=1e-5)
        assert all(change["unet"].relative > 0.01 for change in changes)
        results.append(found[LINEAR[0]])
    assert (results[0] - results[1]).norm() > 0.01 * results[0].norm()


def test_order_matters_only_across_a_dora(tmp_path: Path, style: Path) -> None:
    save_file(pair(LINEAR[1], (96, 2), (2, 64), seed=8), tmp_path / "other.safetensors")
    middle = LoraOption(dora(tmp_path / "one.safetensors", 5))
    first, second = LoraOption(style, 0.3, 0.3), LoraOption(tmp_path / "other.safetensors")
    both = [fused(tmp_path, order)[1] for order in ([first, second, middle], [second, first, middle])]
    assert both[0] == both[1]
    assert fused(tmp_path, [first, middle, second])[1] not in both
    still = LoraOption(middle.path, 0.0, 0.0)  # a DoRA at scale 0 is not there
    assert fused(tmp_path, [first, still, second])[1] == fused(tmp_path, [second, first])[1]


def test_l7_scale_zero_changes_no_bit(tmp_path: Path, style: Path) -> None:
    plain = fused(tmp_path, [])[1]
    _, data, changes = fused(tmp_path, [LoraOption(style, 0.0, 0.0)])
    assert data == plain
    assert changes == [{}]


@pytest.mark.parametrize(("scale", "te_scale", "changed"), [(0.0, 1.0, "text_encoder"), (1.0, 0.0, "unet")])
def test_scale_zero_for_one_network(tmp_path: Path, style: Path, scale: float, te_scale: float, changed: str) -> None:
    found, _, changes = fused(tmp_path, [LoraOption(style, scale, te_scale)])
    assert list(changes[0]) == [changed]
    for name, tensor in BASE.items():
        assert torch.equal(found[name], tensor) == ((changed == "text_encoder") != name.startswith(CLIP))


@pytest.mark.parametrize("part", ["lora_up", "lora_down"])
def test_lora_of_zeros_does_nothing(tmp_path: Path, file: Path, part: str) -> None:
    save_file({name: torch.zeros_like(tensor) if part in name else tensor for name, tensor in GOOD.items()}, file)
    with pytest.raises(AdapterError, match="does nothing") as caught:
        fused(tmp_path, [LoraOption(file)])
    assert caught.value.message.startswith(f"{file}: ")


def test_lora_that_changes_weights_of_zero_does_something(tmp_path: Path, file: Path) -> None:
    save_file(GOOD, file)
    found, _, changes = fused(tmp_path, [LoraOption(file)], base={LINEAR[0]: torch.zeros(96, 64)})
    assert found[LINEAR[0]].abs().max() > 0
    assert changes[0]["unet"].modules == 1


@pytest.mark.parametrize(
    ("scale", "precision"), [(1e6, "fp16"), (1e38, "fp32"), (1e38, "bf16"), (1e300, "fp32"), (1e300, "fp16")]
)
def test_l7_scale_that_overflows(tmp_path: Path, file: Path, scale: float, precision: str) -> None:
    save_file(GOOD, file)
    with pytest.raises(AdapterError, match=f"too large for {precision}") as caught:
        fused(tmp_path, [LoraOption(file, scale, scale)], precision)
    assert caught.value.message.startswith(f"{file}: {LINEAR[0]}: ")
    assert "nan" not in caught.value.message
    assert "scale" in caught.value.fix


def test_overflow_that_is_not_the_loras_fault(tmp_path: Path, file: Path) -> None:
    save_file(GOOD, file)
    with pytest.raises(CheckpointError, match="too large for fp16") as caught:
        fused(tmp_path, [LoraOption(file, 1e-3, 1e-3)], "fp16", {LINEAR[0]: BASE[LINEAR[0]] * 1e6})
    assert caught.value.message.startswith(str(tmp_path / "base.safetensors"))


def test_change_that_rounding_swallows(tmp_path: Path, file: Path) -> None:
    save_file(GOOD, file)
    with pytest.raises(AdapterError, match="vanish when the weights are rounded to fp16") as caught:
        fused(
            tmp_path,
            [LoraOption(file, 1e-9, 1e-9)],
            "fp16",
            {name: tensor.half().float() for name, tensor in BASE.items()},
        )
    assert caught.value.message.startswith(str(file))


def test_half_precision_is_rounded_after_the_sum(tmp_path: Path, style: Path) -> None:
    exact, rounded = (fused(tmp_path, [LoraOption(style, 0.1, 0.1)], precision)[0] for precision in ("fp32", "fp16"))
    for name in BASE:
        assert torch.equal(rounded[name], exact[name].half())


def test_matrices_in_bfloat16(tmp_path: Path) -> None:
    tensors, metadata = read_raw(LORA)
    assert {tensor.dtype for tensor in tensors.values()} == {"F16"}
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(LORA).items()}
    save_file(stored, tmp_path / "bf16.safetensors", metadata)
    lora, original = opened(tmp_path / "bf16.safetensors"), opened(LORA)
    with lora.file, original.file:
        for name in list(original.deltas)[::40]:
            shape = model()[0][name]
            torch.testing.assert_close(
                change_of(lora, name, torch.zeros(shape)),
                change_of(original, name, torch.zeros(shape)),
                rtol=0.2,
                atol=1e-3,
            )
