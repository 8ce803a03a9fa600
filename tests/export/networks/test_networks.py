"""The four graphs of a bundle, run by ONNX Runtime, against transformers and diffusers networks that hold the same
stored weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from reference import Graphs, identity_step, relative

Array = NDArray[Any]

LIMIT = 1e-5
"""Largest relative L2 error of a float32 graph; about 1e-6 is found."""
HALF_LIMIT = 1e-2
"""The same of a float16 graph."""
LATENT_SIZES = [(8, 8), (16, 16), (8, 24), (9, 13), (13, 9), (11, 16), (10, 6)]
"""(height, width) in latents: square, oblong, and ones that 2, 4 or 8 do not divide; (9, 13) is a picture of 104x72
pixels.
"""


@pytest.fixture(scope="module")
def graphs(flat_bundle: Path) -> Graphs:
    return Graphs(flat_bundle)


@pytest.fixture(scope="module")
def weights(flat_bundle: Path) -> reference.Weights:
    return reference.stored_weights(flat_bundle)


@pytest.fixture(scope="module")
def text_model(flat_bundle: Path, weights: reference.Weights) -> Any:
    return reference.text_model(weights, reference.sizes(flat_bundle)["texts"][0])


@pytest.fixture(scope="module")
def unet(flat_bundle: Path, weights: reference.Weights) -> Any:
    return reference.unet(weights, reference.sizes(flat_bundle)["unet"])


@pytest.fixture(scope="module")
def vae(flat_bundle: Path, weights: reference.Weights) -> Any:
    return reference.vae(weights, reference.sizes(flat_bundle)["vae"])


@pytest.fixture
def automatic1111(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' UNet with AUTOMATIC1111's treatment of odd latent sizes."""
    from diffusers.models.upsampling import Upsample2D

    monkeypatch.setattr(Upsample2D, "forward", reference.automatic1111_upsample)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def normal(seed: int, *shape: int) -> Array:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def prompts(seed: int, count: int, words: tuple[int, ...] = (3, 20, 75)) -> Array:
    """Token ids with start, `words` random tokens, end and padding."""
    random = np.random.RandomState(seed)
    tokens = np.full((count, 77), 49407, np.int64)
    for i in range(count):
        n = words[i % len(words)]
        tokens[i, : n + 1] = [49406, *random.randint(300, 49000, n)]
    return tokens


def diffusers_unet(unet: Any, latents: Array, timestep: float, context: Array) -> Array:
    sample = unet(
        torch.from_numpy(latents), torch.tensor(timestep), encoder_hidden_states=torch.from_numpy(context)
    ).sample
    return sample.numpy()


@pytest.mark.parametrize("count", [1, 3])
def test_text_encoder(graphs: Graphs, text_model: Any, count: int) -> None:
    tokens = prompts(count, count)
    expected = text_model(torch.from_numpy(tokens)).last_hidden_state.numpy()
    found = graphs.run("text_encoder", tokens=tokens)
    assert list(found) == ["context_skip_1"]
    assert relative(found["context_skip_1"], expected) < LIMIT


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip(flat_bundle: Path, weights: reference.Weights, text_model: Any, clip_skip: int) -> None:
    from sdrt.export.architecture import ClipSpec
    from sdrt.export.networks.clip import TextEncoder

    encoder = TextEncoder((ClipSpec(**reference.sizes(flat_bundle)["texts"][0] | {"clip_skip": (1, 2)}),)).eval()
    encoder.load_state_dict({name: tensor for name, tensor in weights.items() if name.startswith(reference.TEXT)})
    tokens = torch.from_numpy(prompts(3, 3))
    hidden = text_model(tokens, output_hidden_states=True).hidden_states[-clip_skip]
    norm = dict(text_model.named_modules())[
        next(name for name, _ in text_model.named_modules() if name.endswith("final_layer_norm"))
    ]
    found = encoder(tokens)[clip_skip - 1]
    assert relative(found.numpy(), norm(hidden).numpy()) < LIMIT


@pytest.mark.parametrize(("h", "w"), LATENT_SIZES)
def test_unet_sizes(graphs: Graphs, unet: Any, automatic1111: None, h: int, w: int) -> None:
    context = normal(1, 1, 77, 64)
    inputs = identity_step(1, h, w, 1, context[:, None])
    inputs["registers"][:, 0] = normal(2, 1, 4, h, w)
    found = graphs.run("step", **inputs)["denoised"]
    assert relative(found, diffusers_unet(unet, inputs["registers"][:, 0], 500.0, context)) < LIMIT


@pytest.mark.parametrize("timestep", [0.0, 1.783, 961.733, 999.0])
def test_unet_timesteps(graphs: Graphs, unet: Any, timestep: float) -> None:
    context = normal(3, 1, 77, 64)
    inputs = identity_step(1, 8, 8, 1, context[:, None])
    inputs["registers"][:, 0] = normal(4, 1, 4, 8, 8)
    inputs["timestep"][0] = timestep
    found = graphs.run("step", **inputs)["denoised"]
    assert relative(found, diffusers_unet(unet, inputs["registers"][:, 0], timestep, context)) < LIMIT


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tokens", [77, 154])
def test_unet_batches_and_branches(
    graphs: Graphs, unet: Any, automatic1111: None, branches: int, count: int, tokens: int
) -> None:
    h, w = 9, 12
    context = normal(5, count, branches, tokens, 64)
    inputs = identity_step(count, h, w, branches, context)
    inputs["registers"][:, 0] = normal(6, count, 4, h, w)
    inputs["w"][0] = [-2.0, 3.0] if branches == 2 else [1.0]
    raw = diffusers_unet(
        unet, np.repeat(inputs["registers"][:, 0], branches, axis=0), 500.0, context.reshape(-1, tokens, 64)
    )
    expected = (raw.reshape(count, branches, 4, h, w) * inputs["w"][0].reshape(-1, 1, 1, 1)).sum(axis=1)
    assert relative(graphs.run("step", **inputs)["denoised"], expected) < LIMIT


def test_step_machine(graphs: Graphs, unet: Any) -> None:
    """Three pictures on rows of their own, two on one row: every term of the machine in float64, the network by
    diffusers.
    """
    rows, n, h, w, branches = 4, 3, 8, 16, 2
    random = np.random.RandomState(8)
    inputs = identity_step(n, h, w, branches, normal(9, n, branches, 77, 64))
    coefficients = {
        "a": (rows, 8),
        "w": (rows, 2),
        "v": (rows, 2),
        "rescale": (rows, 2),
        "u": (rows, 8),
        "q": (rows,),
        "M": (rows, 8, 11),
        "inpaint": (rows, 3),
    }
    for name, shape in coefficients.items():
        inputs[name] = random.uniform(-1, 1, shape).astype(np.float32)
    inputs["timestep"] = np.array([900.5, 600.25, 30.75, 0.0], np.float32)
    inputs["row"][...], inputs["next"] = [2, 0, 2], np.array([3, 2, 1, 0])
    inputs["noise"] = normal(10, rows, 4, h, w)
    inputs["mask"] = random.uniform(0, 1, (n, 1, h, w)).astype(np.float32)
    for i, name in enumerate(("registers", "init", "init_noise")):
        inputs[name] = normal(11 + i, *inputs[name].shape)

    found = graphs.run("step", **inputs)
    assert found["next_row"].tolist() == [1, 3, 1]
    exact = {name: array.astype(np.float64) for name, array in inputs.items()}
    for i, row in enumerate([2, 0, 2]):
        a, u, q, M, (k, b, c) = (exact[name][row] for name in ("a", "u", "q", "M", "inpaint"))
        r, mask, init = exact["registers"][i], exact["mask"][i], exact["init"][i]
        latents = np.tensordot(a, r, 1).astype(np.float32)
        raw = diffusers_unet(
            unet, np.stack([latents] * branches), float(inputs["timestep"][row]), inputs["context"][i]
        ).astype(np.float64)
        guided, rescale = np.tensordot(exact["w"][row], raw, 1), exact["rescale"][row]
        guided *= 1 - rescale.sum() + np.tensordot(rescale, raw, 1).std() / guided.std()
        D = np.tensordot(u, r, 1) + q * guided
        D = D + k * mask * (init - D)
        E = np.tensordot(exact["v"][row], raw, 1)
        following = np.tensordot(M, np.stack([*r, D, E, exact["noise"][row]]), 1)
        following[0] = following[0] + (1 - k) * mask * (b * init + c * exact["init_noise"][i] - following[0])
        assert relative(found["denoised"][i], D) < LIMIT
        for j in range(8):
            assert relative(found["next_registers"][i, j], following[j]) < LIMIT


@pytest.mark.parametrize(("h", "w"), LATENT_SIZES)
def test_vae_decoder_sizes(graphs: Graphs, vae: Any, h: int, w: int) -> None:
    check_decoder(graphs, vae, normal(20, 1, 4, h, w), 0.5)


@pytest.mark.parametrize("rounding", [0.0, 0.5])
def test_vae_decoder_batch_and_rounding(graphs: Graphs, vae: Any, rounding: float) -> None:
    check_decoder(graphs, vae, normal(21, 3, 4, 9, 13), rounding)


def check_decoder(graphs: Graphs, vae: Any, latents: Array, rounding: float) -> None:
    image = vae.decode(torch.from_numpy(latents) / 0.18215).sample.numpy().transpose(0, 2, 3, 1)
    levels = np.clip(image.astype(np.float64) / 2 + 0.5, 0, 1) * 255
    expected = (np.round(levels) if rounding else np.floor(levels)).astype(np.uint8)
    found = graphs.run("vae_decoder", latents=latents, rounding=np.array([rounding], np.float32))
    assert found["pixels"].dtype == np.uint8 and found["pixels"].shape == expected.shape
    assert expected.std() > 10
    difference = np.abs(found["pixels"].astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert found["finite"].tolist() == [True] * len(latents)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_vae_decoder_tells_which_picture_is_not_finite(graphs: Graphs, bad: float) -> None:
    latents = normal(22, 3, 4, 8, 8)
    latents[1, 2, 3, 4] = bad
    found = graphs.run("vae_decoder", latents=latents, rounding=np.array([0.5], np.float32))
    assert found["finite"].tolist() == [True, False, True]


@pytest.mark.parametrize(("n", "height", "width"), [(1, 64, 64), (1, 72, 104), (3, 104, 72), (1, 64, 192)])
@pytest.mark.parametrize("noisy", [False, True])
def test_vae_encoder(graphs: Graphs, vae: Any, n: int, height: int, width: int, noisy: bool) -> None:
    pixels = np.random.RandomState(23).randint(0, 256, (n, height, width, 3)).astype(np.uint8)
    pixels[:, : height // 2] //= 4
    noise = normal(24, n, 4, height // 8, width // 8) * noisy
    image = torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(0, 3, 1, 2)
    posterior = vae.encode(image).latent_dist
    expected = ((posterior.mean + posterior.std * torch.from_numpy(noise)) * 0.18215).numpy()
    assert relative(graphs.run("vae_encoder", pixels=pixels, noise=noise)["latents"], expected) < LIMIT


def test_half_precision_text_encoder(graphs: Graphs, text_model: Any) -> None:
    tokens = prompts(30, 3)
    expected = text_model(torch.from_numpy(tokens)).last_hidden_state.numpy()
    found = graphs.run("text_encoder", "fp16", tokens=tokens)["context_skip_1"]
    assert found.dtype == np.float32
    assert 0 < relative(found, expected) < HALF_LIMIT


@pytest.mark.parametrize(("h", "w"), [(16, 16), (9, 13)])
def test_half_precision_step(graphs: Graphs, unet: Any, automatic1111: None, h: int, w: int) -> None:
    context = normal(31, 2, 2, 77, 64)
    inputs = identity_step(2, h, w, 2, context)
    inputs["registers"][:, 0] = normal(32, 2, 4, h, w)
    inputs["timestep"][0] = 961.733  # 961.5 in float16
    inputs["w"][0] = [-2.0, 3.0]
    inputs["M"][0] = np.random.RandomState(33).uniform(-1, 1, (8, 11))
    inputs["M"][0, :, 9] = 0  # the second combination is no output
    raw = diffusers_unet(unet, np.repeat(inputs["registers"][:, 0], 2, axis=0), 961.733, context.reshape(4, 77, 64))
    found = graphs.run("step", "fp16", **inputs)
    assert {found[name].dtype for name in ("denoised", "next_registers")} == {np.dtype(np.float32)}
    assert 0 < relative(found["denoised"], 3 * raw[1::2] - 2 * raw[::2]) < HALF_LIMIT
    # The update after the network is float32: exact but for what the network gave.
    zeros = np.zeros_like(inputs["noise"][0])
    states = np.stack(
        [[*inputs["registers"][i], found["denoised"][i], zeros, inputs["noise"][0]] for i in range(2)]
    ).astype(np.float64)
    assert (
        relative(found["next_registers"], np.einsum("ij,njchw->nichw", inputs["M"][0].astype(np.float64), states))
        < 1e-6
    )


def test_half_precision_vae(graphs: Graphs, vae: Any) -> None:
    latents = normal(34, 2, 4, 9, 13)
    image = vae.decode(torch.from_numpy(latents) / 0.18215).sample.numpy().transpose(0, 2, 3, 1)
    levels = np.round(np.clip(image / 2 + 0.5, 0, 1) * 255)
    found = graphs.run("vae_decoder", "fp16", latents=latents, rounding=np.array([0.5], np.float32))
    assert relative(found["pixels"].astype(np.float32), levels) < HALF_LIMIT and found["finite"].all()
    pixels = levels.astype(np.uint8)
    mean = (
        vae.encode(torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)).latent_dist.mean.numpy()
        * 0.18215
    )
    assert (
        0
        < relative(graphs.run("vae_encoder", "fp16", pixels=pixels, noise=np.zeros_like(latents))["latents"], mean)
        < HALF_LIMIT
    )
