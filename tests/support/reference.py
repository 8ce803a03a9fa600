"""Independent references: transformers and diffusers networks that hold a bundle's stored weights, CLIP's tokenizer,
and distances.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file

torch.set_num_threads(
    1
)  # the networks are small: threads would only wait for each other, long where the cores are shared

Weights = dict[str, torch.Tensor]

VOCABULARY = Path(__file__).parents[2] / "sdrt" / "export" / "data" / "bpe_simple_vocab_16e6.txt.gz"
TEXT = "cond_stage_model.transformer."
TRAINING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""The noise schedule of Stable Diffusion 1.x, as diffusers' schedulers take it."""


def sizes(bundle: Path) -> dict[str, Any]:
    """The manifest's architecture: sizes of `unet`, `vae` and `texts`."""
    architecture: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())["architecture"]
    return architecture


def stored_weights(bundle: Path) -> Weights:
    """The bundle's weights as stored, widened to float32."""
    return {name: tensor.float() for name, tensor in load_file(bundle / "graphs" / "weights.safetensors").items()}


def text_config(clip: Mapping[str, Any]) -> Any:
    """transformers' settings of a text encoder of these sizes, the fields of a `ClipSpec`."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=clip["vocabulary"],
        hidden_size=clip["width"],
        intermediate_size=clip["mlp_width"],
        num_hidden_layers=clip["layers"],
        num_attention_heads=clip["heads"],
        max_position_embeddings=clip["tokens"],
        hidden_act=clip["activation"],
        projection_dim=clip["projection"] or 512,
        eos_token_id=49407,
        pad_token_id=clip["pad"],
    )


def text_model(weights: Weights, clip: Mapping[str, Any], start: str = TEXT) -> Any:
    """A text encoder whose names begin with `start`, with its projection if it has one."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    model = (CLIPTextModelWithProjection if clip["projection"] else CLIPTextModel)(text_config(clip)).eval()
    # transformers 5 drops the outer `text_model.`
    prefix = start if any(name.startswith("text_model.") for name in model.state_dict()) else start + "text_model."
    model.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    )
    return model


def unet(weights: Weights, spec: Mapping[str, Any]) -> Any:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=spec["in_channels"],
        out_channels=spec["out_channels"],
        block_out_channels=tuple(spec["channels"]),
        layers_per_block=len(spec["down_depth"][0]),
        cross_attention_dim=spec["context_width"],
        attention_head_dim=spec["heads"],  # diffusers' old misnomer: the number of heads
        down_block_types=tuple("CrossAttnDownBlock2D" if any(depth) else "DownBlock2D" for depth in spec["down_depth"]),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if any(depth) else "UpBlock2D" for depth in reversed(spec["up_depth"])
        ),
    ).eval()
    model.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), dict(model.config)))
    return model


def vae(weights: Weights, spec: Mapping[str, Any]) -> Any:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = len(spec["channels"])
    model = AutoencoderKL(
        block_out_channels=tuple(spec["channels"]),
        layers_per_block=spec["res_blocks"],
        latent_channels=spec["latent_channels"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=spec["scale"],
    ).eval()
    model.load_state_dict(convert_ldm_vae_checkpoint(dict(weights), dict(model.config)))
    return model


def diffusers_pipeline(bundle: Path, tokenizer: Any) -> Any:
    """diffusers' StableDiffusionPipeline over the stored weights; set its `scheduler` before use."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    weights, spec = stored_weights(bundle), sizes(bundle)
    pipeline = StableDiffusionPipeline(
        vae=vae(weights, spec["vae"]),
        text_encoder=text_model(weights, spec["texts"][0]),
        tokenizer=tokenizer,
        unet=unet(weights, spec["unet"]),
        scheduler=DDIMScheduler(**TRAINING, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl_pipeline(checkpoint: Path, spec: Mapping[str, Any], folder: Path) -> Any:
    """diffusers' StableDiffusionXLPipeline over a single file whose second text encoder has OpenCLIP's names; `spec` is
    the manifest's architecture. Set its `scheduler` before use.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
    from transformers import CLIPTextModelWithProjection

    weights = widened(checkpoint)
    unet_spec, clip, openclip = spec["unet"], *spec["texts"]
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=unet_spec["in_channels"],
        block_out_channels=tuple(unet_spec["channels"]),
        layers_per_block=2,
        cross_attention_dim=clip["width"] + openclip["width"],
        attention_head_dim=tuple(width // 64 for width in unet_spec["channels"]),  # the number of heads
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[max(1, *depths) for depths in unet_spec["down_depth"]],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=openclip["projection"] + 6 * 256,
    ).eval()
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(weights), dict(unet.config)))
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    layers = {name.split(".")[7] for name in weights if name.startswith(first + "text_model.encoder.layers.")}
    text_encoder = text_model(weights, {**clip, "layers": len(layers)}, first)
    layers = {name.split(".")[6] for name in weights if name.startswith(second + "transformer.resblocks.")}
    text_encoder_2 = CLIPTextModelWithProjection(text_config({**openclip, "layers": len(layers)})).eval()
    text_encoder_2.load_state_dict(convert_open_clip_checkpoint(text_encoder_2, weights, second))
    tokenizer = clip_tokenizer(folder)
    tokenizer_2 = clip_tokenizer(folder)
    tokenizer_2.pad_token = "!"  # id 0
    return StableDiffusionXLPipeline(
        vae=vae(weights, spec["vae"]),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**TRAINING),
        add_watermarker=False,
    )


def widened(checkpoint: Path) -> Weights:
    """A checkpoint's tensors in float32, those of 8 bits times their scale."""
    stored = load_file(checkpoint)
    return {
        name: tensor.float() * stored.get(name.removesuffix(".weight") + ".scale_weight", 1.0)
        for name, tensor in stored.items()
        if not name.endswith((".scale_weight", ".position_ids"))
    }


def automatic1111_upsample(
    self: Any, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None
) -> torch.Tensor:
    """AUTOMATIC1111's rule in place of diffusers' `Upsample2D.forward`: double, convolve, and only then take the size
    of the skip.
    """
    h = self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
    return h if output_size is None else F.interpolate(h, size=tuple(output_size), mode="nearest")


def vocabulary_files(folder: Path) -> Path:
    """CLIP's vocab.json and merges.txt from the published merges, as OpenAI's simple_tokenizer numbers them."""
    merges = gzip.decompress(VOCABULARY.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    tokens = (
        symbols
        + [symbol + "</w>" for symbol in symbols]
        + ["".join(merge.split()) for merge in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


def clip_tokenizer(folder: Path) -> Any:
    """transformers' CLIP tokenizer, from files written into `folder`."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(vocabulary_files(folder)), model_max_length=77, local_files_only=True)


class Graphs:
    """ONNX Runtime sessions over a bundle's graph files, each made when it is first run."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self._sessions: dict[str, Any] = {}

    def run(self, graph: str, precision: str = "fp32", **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        import onnxruntime

        name = f"{graph}.{precision}.onnx"
        if name not in self._sessions:
            self._sessions[name] = onnxruntime.InferenceSession(
                str(self.bundle / "graphs" / name), providers=["CPUExecutionProvider"]
            )
        session = self._sessions[name]
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, inputs), strict=True))

    def unet(self, latents: NDArray[np.float32], timestep: float, context: NDArray[np.float32]) -> NDArray[np.float32]:
        """The step graph as nothing but its network: latents `[N, 4, h, w]` and one context each to the raw output."""
        inputs = identity_step(len(latents), *latents.shape[2:], 1, context[:, None])
        inputs["registers"][:, 0] = latents
        inputs["timestep"][0] = timestep
        return self.run("step", **inputs)["denoised"]


def identity_step(n: int, h: int, w: int, branches: int, context: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Inputs of the step graph for n pictures whose one row feeds register 0 to the network and gives the plain sum of
    its branches as `denoised`.

    `context` is `[n, branches, T, W]`.
    """
    latents, plane = (n, 4, h, w), (n, 1, h, w)
    f32 = np.float32
    return {
        "row": np.zeros(n, np.int64),
        "next": np.zeros(1, np.int64),
        "timestep": np.array([500.0], f32),
        "a": np.eye(1, 8, dtype=f32),
        "w": np.ones((1, branches), f32),
        "v": np.zeros((1, branches), f32),
        "rescale": np.zeros((1, branches), f32),
        "u": np.zeros((1, 8), f32),
        "q": np.ones(1, f32),
        "M": np.zeros((1, 8, 11), f32),
        "inpaint": np.zeros((1, 3), f32),
        "noise": np.zeros((1, *latents[1:]), f32),
        "registers": np.zeros((n, 8, *latents[1:]), f32),
        "context": context,
        "mask": np.zeros(plane, f32),
        "init": np.zeros(latents, f32),
        "init_noise": np.zeros(latents, f32),
    }


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Relative error, in L2 norms."""
    assert found.shape == expected.shape
    exact = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    assert found.shape == expected.shape
    error = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
