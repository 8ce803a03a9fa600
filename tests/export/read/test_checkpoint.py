"""Checkpoints: their sizes are inferred from shapes, their weights arrive in the bundle, and every other file is
refused by name.
"""

from __future__ import annotations

import hashlib
import math
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import SD15, VARIANTS
from conftest import CHECKPOINT, LORA, RawTensor, write_raw
from family_files import TINY_XL, sgm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from tiny_model import TINY, Shapes, expected_shapes, header_only, regular_unet, seeded, whole

from sdrt.bundle.manifest import FileRecord
from sdrt.errors import CheckpointError, InputFileError
from sdrt.export.architecture import Architecture, ClipSpec, VaeSpec, architecture
from sdrt.export.families.recognise import describe
from sdrt.export.families.sd1 import CLIP, SD1, UNET, VAE
from sdrt.export.inspect import inspect_file
from sdrt.export.read.checkpoint import Tensor, as_parts, open_checkpoint, select
from sdrt.export.read.tensor_entry import TensorEntry
from sdrt.export.read.tensor_file import TensorFile, open_tensor_file
from sdrt.export.weights import write_weights

EMOJI_SPEC = Architecture(
    "sd1",
    "epsilon",
    (64, 64),
    (ClipSpec(64, 2, 1, 256, 49408, 77),),
    regular_unet((64, 96, 128, 128), (2, 2, 2, 2), (1, 1, 1, 0), 1, 64, linear=False),
    VaeSpec((32, 32, 64, 64), 2, 4, 0.18215),
)


def opened(path: Path, vae: Path | None = None) -> Architecture:
    checkpoint = open_checkpoint(path, vae)
    checkpoint.close()
    return checkpoint.architecture


def refused(path: Path, *fragments: str, vae: Path | None = None, selecting: bool = False) -> CheckpointError:
    """Opening (and selecting from) the checkpoint fails with a line that names a file and holds the fragments."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint = open_checkpoint(path, vae)
        try:
            assert selecting, "opened without an error"
            select(checkpoint, expected_shapes(checkpoint.architecture))
        finally:
            checkpoint.close()
    error = caught.value
    assert error.exit_code == 3
    assert error.message.startswith(f"{path}: ") or (vae is not None and error.message.startswith(f"{vae}: "))
    for fragment in fragments:
        assert fragment in error.message
    return error


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file(seeded(TINY), path)
    return path


# Sizes


def test_emoji_sizes() -> None:
    assert opened(CHECKPOINT) == EMOJI_SPEC


def test_sd15_sizes(tmp_path: Path) -> None:
    assert opened(header_only(tmp_path / "sd15.safetensors", expected_shapes(SD15))) == SD15


def test_sd15_has_the_published_number_of_tensors_and_parameters() -> None:
    """Counts of runwayml/stable-diffusion-v1-5's three networks."""
    shapes = expected_shapes(SD15)
    counts = {prefix: sum(name.startswith(prefix) for name in shapes) for prefix in (UNET, VAE, CLIP)}
    parameters = {
        prefix: sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
        for prefix in (UNET, VAE, CLIP)
    }
    assert counts == {UNET: 686, VAE: 248, CLIP: 196}
    assert parameters == {UNET: 859_520_964, VAE: 83_653_863, CLIP: 123_060_480}


@pytest.mark.parametrize("arch", VARIANTS.values(), ids=VARIANTS.keys())
def test_other_sizes(tmp_path: Path, arch: Architecture) -> None:
    path = header_only(tmp_path / "x.safetensors", expected_shapes(arch))
    assert opened(path) == arch


def test_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    shapes = expected_shapes(TINY)
    assert opened(header_only(tmp_path / "x.safetensors", dict(reversed(shapes.items())))) == TINY


def test_names_without_text_model(tmp_path: Path) -> None:
    tensors = {name.replace("text_model.", ""): tensor for name, tensor in seeded(TINY).items()}
    assert not any("text_model" in name for name in tensors)
    save_file(tensors, tmp_path / "old.safetensors")
    checkpoint = open_checkpoint(tmp_path / "old.safetensors")
    with closing(checkpoint):
        assert checkpoint.architecture == TINY
        chosen, unknown = select(checkpoint, expected_shapes(TINY))
        assert not unknown
        name = CLIP + "text_model.encoder.layers.0.mlp.fc1.weight"
        assert np.array_equal(chosen[name].read(), seeded(TINY)[name])


def test_one_tensor_under_both_text_names(tmp_path: Path) -> None:
    name = "final_layer_norm.bias"
    shapes = expected_shapes(TINY) | {CLIP + name: (64,)}
    refused(header_only(tmp_path / "x.safetensors", shapes), CLIP + name, CLIP + "text_model." + name)


@pytest.mark.parametrize(("text", "size"), [("768x512", (768, 512)), ("64x64", (64, 64))])
def test_default_size_from_the_metadata(tmp_path: Path, text: str, size: tuple[int, int]) -> None:
    path = header_only(tmp_path / "x.safetensors", expected_shapes(TINY), metadata={"modelspec.resolution": text})
    assert opened(path).size == size


class Counted(TensorFile):
    """Knows how many bytes of tensors were asked for."""

    asked = 0

    def _read_bytes(self, entry: TensorEntry) -> bytearray:
        data = super()._read_bytes(entry)
        self.asked += len(data)
        return data


def test_tensors_that_are_parts_of_stored_ones(tmp_path: Path) -> None:
    """Thirds of the rows, and a transpose, from every form of file; no more is read than the part."""
    joined, matrix = torch.randn(96, 32, generator=torch.Generator().manual_seed(0)), torch.randn(8, 4)
    component = replace(
        SD1.text_encoder,
        rows={"in_proj_weight": ("q.weight", "k.weight", "v.weight"), "in_proj_bias": ("q.bias", "k.bias")},
        transposed={"projection": "projection.weight"},
    )
    stored = {CLIP + "a.in_proj_weight": joined, CLIP + "projection": matrix, "other.projection": matrix.clone()}
    save_file(stored, tmp_path / "x.safetensors")
    torch.save(stored, tmp_path / "x.pt")
    torch.save(stored, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(stored | {CLIP + "a.in_proj_weight": joined.T.contiguous().T}, tmp_path / "strided.pt")
    for name in ("x.safetensors", "x.pt", "legacy.pt", "strided.pt"):
        with open_tensor_file(tmp_path / name) as file:
            file.__class__ = Counted
            tensors = as_parts(component, {name: Tensor(file, entry) for name, entry in file.entries.items()})
            assert tensors.keys() == {
                CLIP + "a.q.weight",
                CLIP + "a.k.weight",
                CLIP + "a.v.weight",
                CLIP + "projection.weight",
                "other.projection",
            }
            for i, part in enumerate("qkv"):
                tensor = tensors[f"{CLIP}a.{part}.weight"]
                assert tensor.shape == (32, 32) and np.array_equal(tensor.read(), joined[32 * i : 32 * i + 32])
            assert file.asked == joined.nbytes if name != "strided.pt" else file.asked < 3 * joined.nbytes
            projection = tensors[CLIP + "projection.weight"]
            assert projection.shape == (4, 8) and np.array_equal(projection.read(), matrix.T)
            assert np.array_equal(tensors["other.projection"].read(), matrix)
    bad = (
        {CLIP + "a.in_proj_weight": torch.ones(4, 2)},
        {CLIP + "a.in_proj_bias": torch.ones(())},
        {CLIP + "projection": torch.ones(4)},
    )
    twice = (
        {CLIP + "a.in_proj_bias": torch.ones(2), CLIP + "a.k.bias": torch.ones(1)},
        {CLIP + "projection": torch.ones(2, 2), CLIP + "projection.weight": torch.ones(2, 2)},
    )
    for content in (*bad, *twice):
        save_file(content, tmp_path / "bad.safetensors")
        with (
            open_tensor_file(tmp_path / "bad.safetensors") as file,
            pytest.raises(CheckpointError, match=r"equal parts|a matrix|beside it"),
        ):
            as_parts(component, {name: Tensor(file, entry) for name, entry in file.entries.items()})


def test_a_default_size_that_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    texts = [
        "",
        "512",
        "512x",
        "x512",
        "512x768 ",
        "512x512x3",
        "-512x512",
        "500x512",
        "0x0",
        "1024x8",
        "9000x512",
        "1e3x64",
        "512 x 512",
        "٥١٢x512",
        "9" * 300 + "x8",
    ]
    for text in texts:
        path = header_only(tmp_path / "x.safetensors", expected_shapes(TINY), metadata={"modelspec.resolution": text})
        checkpoint = open_checkpoint(path)
        checkpoint.close()
        (note,) = checkpoint.notes
        assert checkpoint.architecture.size == (512, 512)
        assert (
            note.startswith("x.safetensors: modelspec.resolution: expected WIDTHxHEIGHT in multiples of 8")
            and len(note) < 250
        )
        assert inspect_file(path)["buildable"] is True and inspect_file(path)["notes"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.diffusion_model.label_emb.weight", "told a class"),
        ("model.diffusion_model.input_blocks.1.1.gate", "unknown in a UNet"),
        ("first_stage_model.decoder.extra.weight", "unknown in a VAE"),
        (CLIP + "text_model.encoder.layers.0.gate", "unknown in a text encoder"),
    ],
)
def test_c15_a_tensor_that_changes_what_a_network_computes_refuses_the_file(
    tmp_path: Path, name: str, what: str
) -> None:
    path = header_only(tmp_path / "x.safetensors", expected_shapes(TINY) | {name: (32, 32)})
    with pytest.raises(CheckpointError) as caught, closing(open_checkpoint(path)) as checkpoint:
        select(checkpoint, expected_shapes(TINY))
    assert (
        name in caught.value.message
        and what in caught.value.message
        and caught.value.exit_code == 3
        and caught.value.fix
    )
    if "unknown" not in what:
        assert inspect_file(path)["buildable"] is False


# Weights


def written(path: Path, target: Path, precision: str = "fp16", vae: Path | None = None) -> dict[str, torch.Tensor]:
    """What the bundle's weights file of this checkpoint holds, as the safetensors library reads it."""
    checkpoint = open_checkpoint(path, vae)
    try:
        chosen, _ = select(checkpoint, expected_shapes(checkpoint.architecture))
        write_weights(target, chosen, [], precision, lambda done: None)
    finally:
        checkpoint.close()
    return load(target.read_bytes())


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_weights_are_rounded_once(tiny: Path, tmp_path: Path, precision: str, kind: torch.dtype) -> None:
    found, source = written(tiny, tmp_path / "w.safetensors", precision), seeded(TINY)
    assert found.keys() == source.keys()
    for name, tensor in found.items():
        assert tensor.dtype == kind
        assert torch.equal(tensor, source[name].to(kind)), name


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(torch.float64, 0.0), (torch.float32, 0.0), (torch.float16, 0.0), (torch.bfloat16, 2.0**-8)],
    ids=["fp64", "fp32", "fp16", "bf16"],
)
def test_c12_sources_of_every_type_give_the_same_weights(
    tiny: Path, tmp_path: Path, kind: torch.dtype, limit: float
) -> None:
    save_file({name: tensor.to(kind) for name, tensor in seeded(TINY).items()}, tmp_path / "source.safetensors")
    reference, found = (
        written(path, tmp_path / f"w{i}.safetensors") for i, path in enumerate((tiny, tmp_path / "source.safetensors"))
    )
    assert found.keys() == reference.keys()
    for name, tensor in found.items():
        difference = (tensor.float() - reference[name].float()).abs()
        assert bool((difference <= limit * reference[name].float().abs() + 2.0**-24).all()), name


def as_torch_saves_it(path: Path, kind: torch.dtype, zipped: bool) -> Path:
    """A checkpoint as training left it: nested, with baggage, some weights views of one storage."""
    weights = {name: tensor.to(kind) for name, tensor in seeded(TINY).items()}
    query = UNET + "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    key = query.replace("to_q", "to_k")
    both = torch.cat([weights[query], weights[key]]).t().contiguous()
    weights |= {query: both[:, :64].t(), key: both[:, 64:].t()}
    value = {
        "epoch": 1,
        "global_step": 2,
        "callbacks": {"a": 1},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "state_dict": weights,
    }
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("kind", "limit"),
    [(torch.float32, 0.0), (torch.float16, 0.0), (torch.bfloat16, 2.0**-8)],
    ids=["fp32", "fp16", "bf16"],
)
def test_checkpoints_of_torch_save_give_the_same_weights(
    tiny: Path, tmp_path: Path, zipped: bool, kind: torch.dtype, limit: float
) -> None:
    path = as_torch_saves_it(tmp_path / "model.ckpt", kind, zipped)
    reference, found = written(tiny, tmp_path / "a.safetensors"), written(path, tmp_path / "b.safetensors")
    assert found.keys() == reference.keys()
    for name, tensor in found.items():
        difference = (tensor.float() - reference[name].float()).abs()
        assert bool((difference <= limit * reference[name].float().abs() + 2.0**-24).all()), name
    checkpoint = open_checkpoint(path)
    with closing(checkpoint):
        assert checkpoint.notes == (
            "model.ckpt: what lies beside the weights was ignored: callbacks, epoch, global_step, optimizer_states",
        )
        assert select(checkpoint, expected_shapes(TINY))[1] == []


@pytest.mark.parametrize("suffix", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_c12_8_bit_weights_with_and_without_a_scale(tmp_path: Path, kind: torch.dtype, suffix: str) -> None:
    """As ComfyUI saves them: a number beside each scaled weight, norms in another type, and a mark."""
    stored: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(0, dtype=kind)}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in seeded(TINY).items():
        stored[name] = tensor.to(kind)
        expected[name] = stored[name].float()
        if name.startswith(UNET) and name.endswith(".to_q.weight"):
            stored[name.removesuffix(".weight") + suffix] = torch.tensor(0.5)
            stored[name.removesuffix(".weight") + ".scale_input"] = torch.tensor(1.0)
            expected[name] = expected[name] * 0.5
    save_file(stored, tmp_path / "fp8.safetensors")
    found = written(tmp_path / "fp8.safetensors", tmp_path / "w.safetensors", "fp32")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    checkpoint = open_checkpoint(tmp_path / "fp8.safetensors")
    with closing(checkpoint):
        assert select(checkpoint, expected_shapes(TINY))[1] == []


@pytest.mark.parametrize("scale", [torch.tensor(math.nan), torch.ones(2)], ids=["NaN", "two numbers"])
def test_bad_scale_of_an_8_bit_weight(tmp_path: Path, scale: torch.Tensor) -> None:
    name = UNET + "time_embed.0"
    tensors = seeded(TINY) | {
        name + ".weight": seeded(TINY)[name + ".weight"].to(torch.float8_e4m3fn),
        name + ".scale_weight": scale,
    }
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}\.scale_weight: expected one finite number"):
        written(tmp_path / "fp8.safetensors", tmp_path / "w.safetensors")


def test_matrices_of_the_vaes_attention_become_convolutions(tiny: Path, tmp_path: Path) -> None:
    tensors = {
        name: tensor[:, :, 0, 0] if ".mid.attn_1." in name and tensor.dim() == 4 else tensor
        for name, tensor in seeded(TINY).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    found = written(tmp_path / "x.safetensors", tmp_path / "w.safetensors", "fp32")
    assert all(torch.equal(found[name], tensor) for name, tensor in seeded(TINY).items())


# Averaged weights


def with_averages(path: Path, count: int | None = None) -> dict[str, torch.Tensor]:
    """Write a checkpoint that holds the UNet twice, as CompVis' LDM saves it. Returns the averages by
    canonical name.
    """
    averages = {name: tensor + 1 for name, tensor in seeded(TINY).items() if name.startswith(UNET)}
    keys = {"model_ema." + "".join(name.split(".")[1:]): tensor for name, tensor in list(averages.items())[:count]}
    save_file(
        seeded(TINY) | keys | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}, path
    )
    return averages


def test_averaged_weights_are_taken_only_when_asked_for_and_the_decision_is_said(tmp_path: Path) -> None:
    path = tmp_path / "ema.safetensors"
    averages = with_averages(path)
    for ema, words in (
        (False, "the plain weights were taken, --ema takes the averaged"),
        (True, "the averaged (EMA) weights were taken"),
    ):
        checkpoint = open_checkpoint(path, ema=ema)
        with closing(checkpoint):
            assert checkpoint.notes == (f"ema.safetensors: holds the UNet twice; {words}",)
            chosen, unknown = select(checkpoint, expected_shapes(TINY))
            assert not unknown
            expected = seeded(TINY) | (averages if ema else {})
            assert all(np.array_equal(tensor.read(), expected[name]) for name, tensor in chosen.items())


def test_averaged_weights_that_are_not_there(tiny: Path, tmp_path: Path) -> None:
    with_averages(tmp_path / "few.safetensors", 50)
    for path in (tiny, tmp_path / "few.safetensors"):
        with pytest.raises(CheckpointError, match="has no averaged weights") as caught:
            open_checkpoint(path, ema=True)
        assert "--ema" in caught.value.fix
    with_averages(tmp_path / "most.safetensors", 101)
    with pytest.raises(CheckpointError, match="has no averaged weight, 101 others have one"):
        open_checkpoint(tmp_path / "most.safetensors", ema=True)


# What keys say of the training


def test_placed_offsets_point_at_the_data_from_a_page_on(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    with closing(checkpoint):
        chosen, _ = select(checkpoint, expected_shapes(TINY))
        progress: list[float] = []
        written = write_weights(tmp_path / "w.safetensors", chosen, [], "fp16", progress.append)
    data = (tmp_path / "w.safetensors").read_bytes()
    assert written.record == FileRecord(len(data), hashlib.sha256(data).hexdigest())
    assert min(place.offset for place in written.placed.values()) % 4096 == 0
    assert written.changes == []
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    for name, place in written.placed.items():
        value = torch.frombuffer(
            bytearray(data[place.offset : place.offset + place.size_bytes]), dtype=torch.float16
        ).reshape(place.shape)
        assert torch.equal(value, seeded(TINY)[name].half()), name
    with open_tensor_file(tmp_path / "w.safetensors") as file:
        assert {name: entry.offset for name, entry in file.entries.items()} == {
            name: place.offset for name, place in written.placed.items()
        }


def one_weight(tmp_path: Path, values: list[float], precision: str) -> None:
    save_file({"layer.weight": torch.tensor(values)}, tmp_path / "one.safetensors")
    with open_tensor_file(tmp_path / "one.safetensors") as file:
        write_weights(
            tmp_path / "w.safetensors",
            {"layer.weight": Tensor(file, file.entries["layer.weight"])},
            [],
            precision,
            lambda done: None,
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_c17_values_that_are_not_finite(tmp_path: Path, bad: float, precision: str) -> None:
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        one_weight(tmp_path, [1.0, bad, 2.0, bad], precision)
    assert f"{tmp_path / 'one.safetensors'}: layer.weight: 2 of 4 values" in caught.value.message


def test_c17_values_too_large_for_the_precision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="too large for fp16") as caught:
        one_weight(tmp_path, [1.0, -70_000.0], "fp16")
    assert f"{tmp_path / 'one.safetensors'}: layer.weight: 70000" in caught.value.message
    assert "--precision bf16" in caught.value.fix
    one_weight(tmp_path, [1.0, 65_504.0], "fp16")
    one_weight(tmp_path, [1.0, -70_000.0], "bf16")
    one_weight(tmp_path, [1.0, -70_000.0], "fp32")


# A VAE from another file


@pytest.mark.parametrize("prefix", [VAE, ""], ids=["LDM names", "bare names"])
def test_vae_replaces_the_checkpoints_own(tiny: Path, tmp_path: Path, prefix: str) -> None:
    other = {name: tensor for name, tensor in seeded(TINY, seed=1).items() if name.startswith(VAE)}
    save_file(
        {prefix + name[len(VAE) :]: tensor for name, tensor in other.items()} | {"ignored.weight": torch.zeros(2)},
        tmp_path / "vae.safetensors",
    )
    found = written(tiny, tmp_path / "w.safetensors", "fp32", tmp_path / "vae.safetensors")
    for name, tensor in (seeded(TINY) | other).items():
        assert torch.equal(found[name], tensor), name


def test_vae_of_other_sizes_than_the_checkpoints_own(tmp_path: Path) -> None:
    other = replace(TINY, vae=VaeSpec((32, 64, 96), 2, 4, 0.18215))
    base = header_only(tmp_path / "base.safetensors", expected_shapes(TINY))
    vae = header_only(
        tmp_path / "vae.safetensors", {n: s for n, s in expected_shapes(other).items() if n.startswith(VAE)}
    )
    assert opened(base, vae) == other


def test_vae_supplied_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    shapes = expected_shapes(TINY)
    base = header_only(tmp_path / "base.safetensors", {n: s for n, s in shapes.items() if not n.startswith(VAE)})
    vae = header_only(tmp_path / "vae.safetensors", {n[len(VAE) :]: s for n, s in shapes.items() if n.startswith(VAE)})
    assert opened(base, vae) == TINY


@pytest.mark.parametrize(
    "shapes",
    [
        {
            "decoder.up_blocks.0.resnets.0.conv1.weight": (32, 32, 3, 3),
            "decoder.mid_block.attentions.0.to_q.weight": (32, 32),
        },
        {UNET + "input_blocks.0.0.weight": (32, 4, 3, 3)},
        {},
    ],
    ids=["diffusers names", "a UNet", "nothing"],
)
def test_file_that_is_no_vae(tiny: Path, tmp_path: Path, shapes: Shapes) -> None:
    vae = header_only(tmp_path / "vae.safetensors", shapes)
    error = refused(tiny, "expected a VAE", vae=vae)
    assert error.message.startswith(str(vae))


def test_vae_of_another_family(tiny: Path, tmp_path: Path) -> None:
    other = replace(TINY, vae=replace(TINY.vae, latent_channels=16))
    vae = header_only(
        tmp_path / "vae.safetensors", {n: s for n, s in expected_shapes(other).items() if n.startswith(VAE)}
    )
    refused(tiny, "4 channels", "16", vae=vae)


@pytest.mark.parametrize(
    ("shape", "dtype", "what"), [((5, 5), "F16", "expected shape"), (None, "I64", "I64")], ids=["shape", "type"]
)
def test_bad_tensor_of_a_vae_names_its_own_file(
    tiny: Path, tmp_path: Path, shape: tuple[int, ...] | None, dtype: str, what: str
) -> None:
    tensors = {
        n: RawTensor("F16", s, bytes(2 * math.prod(s))) for n, s in expected_shapes(TINY).items() if n.startswith(VAE)
    }
    name = VAE + "encoder.conv_out.bias"
    size = tensors[name].shape if shape is None else shape
    tensors[name] = RawTensor(dtype, size, bytes(math.prod(size) * {"F16": 2, "I64": 8}[dtype]))
    vae = write_raw(tmp_path / "vae.safetensors", tensors)
    error = refused(tiny, name, what, vae=vae, selecting=True)
    assert error.message.startswith(str(vae))


def test_incomplete_vae_names_its_own_file(tiny: Path, tmp_path: Path) -> None:
    shapes = {n: s for n, s in expected_shapes(TINY).items() if n.startswith(VAE)}
    del shapes[VAE + "encoder.conv_out.bias"]
    vae = header_only(tmp_path / "vae.safetensors", shapes)
    error = refused(tiny, VAE + "encoder.conv_out.bias: missing", vae=vae, selecting=True)
    assert error.message.startswith(str(vae))


def test_files_are_closed_when_opening_fails(tiny: Path, tmp_path: Path) -> None:
    vae = header_only(tmp_path / "vae.safetensors", {})
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path, other in ((LORA, None), (tiny, vae), (tiny, tmp_path / "none.safetensors")):
        with pytest.raises(InputFileError):
            open_checkpoint(path, other)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# Incomplete and damaged checkpoints


def test_no_vae(tmp_path: Path) -> None:
    shapes = {n: s for n, s in expected_shapes(TINY).items() if not n.startswith(VAE)}
    assert "--vae" in refused(header_only(tmp_path / "x.safetensors", shapes), "has no VAE").fix


def test_c14_unet_only(tmp_path: Path) -> None:
    shapes = {n: s for n, s in expected_shapes(TINY).items() if n.startswith(UNET)}
    assert (
        "text encoder"
        in refused(
            header_only(tmp_path / "x.safetensors", shapes), "a Stable Diffusion UNet without its text encoder"
        ).fix
    )


def test_c14_no_text_encoder(tmp_path: Path) -> None:
    shapes = {n: s for n, s in expected_shapes(TINY).items() if not n.startswith(CLIP)}
    refused(header_only(tmp_path / "x.safetensors", shapes), "without its text encoder")


@pytest.mark.parametrize("prefix", [VAE, ""])
def test_c14_vae_only(tmp_path: Path, prefix: str) -> None:
    shapes = {prefix + n[len(VAE) :]: s for n, s in expected_shapes(TINY).items() if n.startswith(VAE)}
    assert "--vae" in refused(header_only(tmp_path / "x.safetensors", shapes), "found a VAE").fix


def test_text_encoder_only(tmp_path: Path) -> None:
    shapes = {n: s for n, s in expected_shapes(TINY).items() if n.startswith(CLIP)}
    refused(header_only(tmp_path / "x.safetensors", shapes), "found a CLIP text encoder")


def test_lora_given_as_the_checkpoint() -> None:
    error = refused(LORA, "found a LoRA")
    assert error.fix == "Pass it with --lora, beside the checkpoint it was trained on."


@pytest.mark.parametrize("shapes", [{"emb_params": (4, 768)}, {"clip_l": (4, 768), "clip_g": (4, 1280)}])
def test_embedding_given_as_the_checkpoint(tmp_path: Path, shapes: Shapes) -> None:
    error = refused(header_only(tmp_path / "x.safetensors", shapes), "found a textual-inversion embedding")
    assert "--embedding" in error.fix


def test_c14_file_of_nothing(tmp_path: Path) -> None:
    refused(header_only(tmp_path / "x.safetensors", {}), "found an empty file")


def test_file_of_something_else(tmp_path: Path) -> None:
    refused(header_only(tmp_path / "x.safetensors", {"layer.weight": (2, 2)}), "tensors of no kind that sdrt knows")


LATE = UNET + "output_blocks.2.0.out_layers.3.bias"


@pytest.mark.parametrize(
    "name", [LATE, UNET + "out.2.weight", CLIP + "text_model.final_layer_norm.weight", VAE + "quant_conv.weight"]
)
def test_c15_one_missing_tensor(tmp_path: Path, name: str) -> None:
    shapes = dict(expected_shapes(TINY))
    del shapes[name]
    refused(header_only(tmp_path / "x.safetensors", shapes), name.removeprefix(UNET), "missing", selecting=True)


def test_missing_tensor_with_a_near_name(tmp_path: Path) -> None:
    shapes = dict(expected_shapes(TINY))
    shapes[LATE + "s"] = shapes.pop(LATE)
    refused(
        header_only(tmp_path / "x.safetensors", shapes), f"{LATE}: missing", f"did you mean '{LATE}s'?", selecting=True
    )


def test_several_missing_tensors_are_counted(tmp_path: Path) -> None:
    shapes = {n: s for n, s in expected_shapes(TINY).items() if not n.startswith(UNET + "output_blocks.2.0.emb_layers")}
    refused(header_only(tmp_path / "x.safetensors", shapes), "missing and 1 more", selecting=True)


def test_c15_one_wrong_shape(tmp_path: Path) -> None:
    shapes = expected_shapes(TINY) | {LATE: (5,)}
    refused(header_only(tmp_path / "x.safetensors", shapes), f"{LATE}: expected shape [32], found [5]", selecting=True)


@pytest.mark.parametrize(
    "name",
    [
        UNET + "input_blocks.0.0.weight",
        CLIP + "text_model.embeddings.token_embedding.weight",
        VAE + "decoder.conv_in.weight",
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (32,), (32, 4, 0, 3)], ids=str)
def test_wrong_rank_where_sizes_are_read(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    refused(header_only(tmp_path / "x.safetensors", expected_shapes(TINY) | {name: shape}))


@pytest.mark.parametrize(("dtype", "size"), [("I64", 8), ("BOOL", 1)])
def test_c11_type_that_is_no_float(tmp_path: Path, dtype: str, size: int) -> None:
    tensors = {n: RawTensor("F16", s, bytes(2 * math.prod(s))) for n, s in expected_shapes(TINY).items()}
    tensors[LATE] = RawTensor(dtype, (32,), bytes(32 * size))
    refused(
        write_raw(tmp_path / "x.safetensors", tensors),
        f"{LATE}: expected one of F64, F32, F16, BF16, F8_E4M3, F8_E5M2, found {dtype}",
        selecting=True,
    )


def test_c15_unknown_tensors_are_reported_and_known_leftovers_are_not(tmp_path: Path) -> None:
    extra = {
        "my.notes": (3,),
        "model_ema.decay": (),
        "alphas_cumprod": (1000,),
        "cond_stage_model.logit_scale": (),
        CLIP + "text_model.embeddings.position_ids": (1, 77),
    }
    checkpoint = open_checkpoint(header_only(tmp_path / "x.safetensors", expected_shapes(TINY) | extra))
    with closing(checkpoint):
        chosen, unknown = select(checkpoint, expected_shapes(TINY))
    assert unknown == ["my.notes"]
    assert chosen.keys() == expected_shapes(TINY).keys()


@pytest.mark.parametrize(
    "pattern",
    [
        UNET + "input_blocks.{}.0.in_layers.2.weight",
        VAE + "decoder.up.{}.block.0.conv1.weight",
        CLIP + "text_model.encoder.layers.{}.mlp.fc1.weight",
    ],
)
def test_forged_number_of_blocks(tmp_path: Path, pattern: str) -> None:
    shapes = expected_shapes(TINY) | {pattern.format(i): (32, 1, 1, 1) for i in range(20_000)}
    refused(header_only(tmp_path / "x.safetensors", shapes), "20,000 blocks", "100")


def test_components_of_different_models(tmp_path: Path) -> None:
    other = expected_shapes(VARIANTS["wide text"])
    mixed = {n: s for n, s in expected_shapes(TINY).items() if not n.startswith(CLIP)} | {
        n: s for n, s in other.items() if n.startswith(CLIP)
    }
    error = refused(header_only(tmp_path / "x.safetensors", mixed), "64 wide", "128")
    assert "different models" in error.fix


# Random damage

_WHOLE: dict[str, Shapes] = {
    "SD 1.x": dict(expected_shapes(TINY)),
    "SDXL": {name: tuple(tensor.shape) for name, tensor in sgm(seeded(whole(TINY_XL))).items()},
}
"""Files to damage."""


def _damage(shapes: Shapes) -> st.SearchStrategy[list[Any]]:
    names = st.sampled_from(sorted(shapes))
    sizes = st.sampled_from([0, 1, 4, 8, 32, 63, 64, 77, 96, 128, 256])
    return st.lists(
        st.one_of(
            st.tuples(st.just("drop"), names),
            st.tuples(st.just("reshape"), names, st.lists(sizes, max_size=4)),
            st.tuples(st.just("renumber"), names, st.integers(0, 12)),
            st.tuples(st.just("downsample"), st.integers(1, 6)),
            st.tuples(st.just("drop below"), names, st.integers(1, 4)),
        ),
        min_size=1,
        max_size=4,
    )


@pytest.mark.parametrize("family", _WHOLE)
@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_damaged_headers_are_refused_or_complete(
    tmp_path_factory: pytest.TempPathFactory, family: str, data: st.DataObject
) -> None:
    undamaged = _WHOLE[family]
    shapes = dict(undamaged)
    for kind, *rest in data.draw(_damage(undamaged)):
        if kind == "drop":
            shapes.pop(rest[0], None)
        elif kind == "reshape":
            shapes[rest[0]] = tuple(rest[1])
        elif kind == "renumber":
            shapes[re.sub(r"\d+", str(rest[1]), rest[0], count=1)] = undamaged[rest[0]]
        elif kind == "downsample":
            shapes[f"{UNET}input_blocks.{rest[0]}.0.op.weight"] = (64, 64, 3, 3)
        else:
            prefix = ".".join(rest[0].split(".")[: rest[1] + 1]) + "."
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    path = header_only(tmp_path_factory.getbasetemp() / "damaged.safetensors", shapes)
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in error.message
        return
    with closing(checkpoint):
        expected = expected_shapes(checkpoint.architecture)
        try:
            chosen, _ = select(checkpoint, expected)
        except CheckpointError as error:
            assert str(path) in error.message
            return
        assert {name: tensor.shape for name, tensor in chosen.items()} == expected


def test_sizes_are_inferred_without_a_file() -> None:
    shapes = expected_shapes(EMOJI_SPEC)
    assert architecture(Path("x"), shapes, {"modelspec.resolution": "64x64"}, describe(shapes)) == EMOJI_SPEC
