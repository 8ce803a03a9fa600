"""The networks of every family in float32, against diffusers' and transformers' of the same sizes and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import reference
import torch
from tiny_model import levels

from sdrt.export.architecture import ClipSpec, UNetSpec, VaeSpec
from sdrt.export.families.family import END_TOKEN
from sdrt.export.families.keys import diffusers_module
from sdrt.export.networks.clip import TextEncoder
from sdrt.export.networks.unet import UNet, timestep_embedding
from sdrt.export.networks.vae import VaeDecoder, VaeEncoder

LIMIT = 1e-4
"""Largest relative L2 error; about 1e-6 is found."""
POOLED, SIZES, SIZE_WIDTH = 16, 6, 8


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def seed(module: Any) -> Any:
    """The module with weights that keep the size of what goes through them."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        bound = 1.0 if "embedding" in name and parameter.ndim == 2 else parameter[0].numel() ** -0.5
        parameter.copy_(
            torch.randn_like(parameter) * bound if parameter.ndim > 1 else 1 + 0.2 * torch.randn_like(parameter)
        )
    return module.eval()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# UNets


@dataclass(frozen=True)
class Case:
    """A UNet, and what diffusers calls its sizes where the two differ."""

    spec: UNetSpec
    diffusers: dict[str, Any]


PLAIN = UNetSpec(4, 4, (32, 64, 64), *levels((2, 2, 2), (1, 1, 0)).values(), 1, 48, True, heads=None, head_width=16)
XL = replace(PLAIN, **levels((2, 2, 2), (0, 1, 2)), middle=2, vector_width=POOLED + SIZES * SIZE_WIDTH)
TOLD = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": SIZE_WIDTH,
    "projection_class_embeddings_input_dim": POOLED + SIZES * SIZE_WIDTH,
}
CASES = {
    "SD 2.x": Case(PLAIN, {}),
    "SD 2.x inpainting": Case(replace(PLAIN, in_channels=9), {}),
    "SDXL": Case(XL, TOLD | {"transformer_layers_per_block": [1, 1, 2]}),
    "SDXL editing": Case(replace(XL, in_channels=8), TOLD | {"transformer_layers_per_block": [1, 1, 2]}),
    "LCM": Case(replace(PLAIN, guidance_width=24), {"time_cond_proj_dim": 24}),
    "SDXL as LCM": Case(
        replace(XL, guidance_width=24), TOLD | {"transformer_layers_per_block": [1, 1, 2], "time_cond_proj_dim": 24}
    ),
    "SSD-1B": Case(
        replace(XL, up_depth=((0, 0, 0), (2, 1, 1), (2, 2, 3)), middle=0),
        TOLD
        | {
            "transformer_layers_per_block": [0, [1, 1], [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 0],
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
    "KOALA-700M": Case(
        replace(XL, **levels((1, 1, 1), (0, 1, 2)), middle=None),
        TOLD | {"transformer_layers_per_block": [1, 1, 2], "mid_block_type": None},
    ),
    "BK-SDM-Tiny": Case(
        replace(PLAIN, **levels((1, 1, 1), (1, 1, 1)), middle=None, heads=8, head_width=None, linear_projections=False),
        {"mid_block_type": None},
    ),
}  # fmt: skip


def theirs(case: Case, mine: UNet) -> Any:
    """diffusers' UNet with the weights of ours."""
    from diffusers import UNet2DConditionModel

    spec = case.spec
    heads = [spec.heads or channels // (spec.head_width or 0) for channels in spec.channels]
    options: dict[str, Any] = {
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "block_out_channels": spec.channels,
        "layers_per_block": spec.res_blocks[0],
        "cross_attention_dim": spec.context_width,
        "attention_head_dim": heads,  # diffusers' old misnomer: the number of heads
        "use_linear_projection": spec.linear_projections,
        "down_block_types": ["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in spec.down_depth],
        "up_block_types": ["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in reversed(spec.up_depth)],
    }
    model = UNet2DConditionModel(**options | case.diffusers)
    weights = {}
    for name, tensor in mine.state_dict().items():
        module, _, leaf = name.rpartition(".")
        weights[f"{diffusers_module(module, spec)}.{leaf}"] = tensor
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_unet(case: Case) -> None:
    """Two pictures of three branches at once, and each by itself. Everything that a model may be told differs between
    the branches of a picture, and its latents do where it sees more than the noisy ones.
    """
    from diffusers import LatentConsistencyModelPipeline

    spec, pictures, branches = case.spec, 2, 3
    mine = seed(UNet(spec))
    reference = theirs(case, mine)
    draw = torch.Generator().manual_seed(1)
    shared = spec.in_channels == 4
    latents = torch.randn(pictures if shared else pictures * branches, spec.in_channels, 8, 12, generator=draw)
    contexts = torch.randn(pictures * branches, 7, spec.context_width, generator=draw)
    pooled = torch.randn(pictures * branches, POOLED, generator=draw)
    sizes = torch.randint(0, 1024, (pictures * branches, SIZES), generator=draw).float()
    timesteps, scales = torch.tensor([801.0, 17.25]), torch.tensor([7.5, 1.0])
    told: dict[str, Any] = {}
    if spec.vector_width:
        vectors = timestep_embedding(sizes.flatten(), SIZE_WIDTH).reshape(len(sizes), -1)
        told["vector"] = torch.cat([pooled, vectors], dim=1)
    if spec.guidance_width:
        told["guidance"] = scales
    found = mine(latents, timesteps, contexts, branches=branches, shared=shared, **told)
    for i in range(pictures * branches):
        n = i // branches
        expected = reference(
            latents[n if shared else i][None],
            timesteps[n],
            contexts[i][None],
            added_cond_kwargs={"text_embeds": pooled[i][None], "time_ids": sizes[i][None]},
            timestep_cond=LatentConsistencyModelPipeline.get_guidance_scale_embedding(
                None,
                scales[n : n + 1] - 1,
                spec.guidance_width,  # type: ignore[arg-type]
            )
            if spec.guidance_width
            else None,
        ).sample
        assert error(found[i][None], expected) < LIMIT


def test_what_branches_share_is_computed_once() -> None:
    """In a model that is told a vector, the first convolutions run once a picture, everything after them once a
    branch.
    """
    mine, batches = seed(UNet(XL)), dict[str, int]()
    for name, module in mine.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output, name=name: batches.update({name: len(output)}))
    mine(
        torch.randn(2, 4, 8, 8),
        torch.tensor([5.0, 6.0]),
        torch.randn(6, 7, XL.context_width),
        branches=3,
        vector=torch.randn(6, XL.vector_width),
    )
    assert {name for name, count in batches.items() if count == 2} == {
        "input_blocks.0.0",
        "input_blocks.1.0.in_layers.2",
    }
    assert set(batches.values()) == {2, 6}


# Text encoders


L = ClipSpec(32, 3, 2, 64, 49410, 77, (2, 3), "quick_gelu", final_norm=False)
G = ClipSpec(48, 4, 3, 80, 49410, 77, (2, 3), "gelu", final_norm=False, projection=24, pad=0)
H = ClipSpec(48, 4, 3, 80, 49410, 77, (1, 2), "gelu", pad=0)


def transformers_model(spec: ClipSpec, mine: TextEncoder, prefix: str) -> Any:
    """transformers' text encoder with the weights of ours. Layers that ours leaves out are of ones."""
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(reference.text_config(asdict(spec))).eval()
    weights = {
        name.removeprefix(prefix): tensor for name, tensor in mine.state_dict().items() if name.startswith(prefix)
    }
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and len(weights) > 30
    return model


def tokens(spec: ClipSpec) -> torch.Tensor:
    """Prompts of different lengths with a learned word, whose id is larger than the end's, before and after the end."""
    ids = torch.randint(0, END_TOKEN, (3, 77), generator=torch.Generator().manual_seed(2))
    for row, end in zip(ids, (2, 40, 76), strict=True):
        row[0], row[1], row[end], row[end + 1 :] = END_TOKEN - 1, spec.vocabulary - 1, END_TOKEN, spec.pad
    return ids


def test_two_text_encoders() -> None:
    mine = seed(TextEncoder((L, G)))
    found = mine(tokens(L), tokens(G))
    first = transformers_model(L, mine, "cond_stage_model.transformer.")(tokens(L), output_hidden_states=True)
    second = transformers_model(G, mine, "conditioner.embedders.1.transformer.")(tokens(G), output_hidden_states=True)
    assert len(found) == 3
    for context, skip in zip(found, L.clip_skip, strict=False):
        expected = torch.cat([first.hidden_states[-skip], second.hidden_states[-skip]], dim=2)
        assert error(context, expected) < LIMIT
    assert error(found[2], second.text_embeds) < LIMIT


def test_a_text_encoder_with_gelu_and_the_final_norm() -> None:
    mine = seed(TextEncoder((H,)))
    model = transformers_model(H, mine, "cond_stage_model.transformer.")
    expected = model(tokens(H), output_hidden_states=True).hidden_states
    for context, skip in zip(mine(tokens(H)), H.clip_skip, strict=True):
        assert error(context, model.text_model.final_layer_norm(expected[-skip])) < LIMIT


def test_layers_that_no_output_needs_are_left_out() -> None:
    names = [name for name, _ in TextEncoder((L, G)).named_parameters()]
    below = [name.partition(".text_model.")[2] for name in names if name.startswith("cond_stage_model.")]
    assert {name.split(".")[2] for name in below if name.startswith("encoder.")} == {"0", "1"}
    assert "final_layer_norm.weight" not in below
    assert "conditioner.embedders.1.transformer.text_model.encoder.layers.3.mlp.fc1.weight" in names


# VAE


def test_latents_of_a_mean_and_deviation_for_each_channel() -> None:
    """diffusers' formula for VAEs with `latents_mean` and `latents_std`."""
    spec = VaeSpec((32, 32), 1, 4, 0.5, mean=(0.5, -0.25, 1.0, 0.0), std=(2.0, 0.5, 1.5, 3.0))
    plain = replace(spec, scale=1.0, mean=(), std=())
    mean, std = (torch.tensor(numbers)[None, :, None, None] for numbers in (spec.mean, spec.std))
    latents, rounding = torch.randn(2, 4, 8, 8), torch.tensor([0.5])
    found, expected = seed(VaeDecoder(spec)), seed(VaeDecoder(plain))
    assert torch.equal(found(latents, rounding)[0], expected(latents * std / 0.5 + mean, rounding)[0])
    pixels, noise = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8), torch.zeros(2, 4, 8, 8)
    wanted = (seed(VaeEncoder(plain))(pixels, noise) - mean) * 0.5 / std
    assert error(seed(VaeEncoder(spec))(pixels, noise), wanted) < LIMIT
