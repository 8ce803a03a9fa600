"""Trains adapters of either emoji model through diffusers' UNet and transformers' text encoders, on a CPU.

toy       a LoRA in kohya's SDXL names, of the UNet and both text encoders: everything as a glossy toy
velocity  a LoRA that turns the SDXL model into one of v-prediction with zero terminal SNR (Lin et al. 2024)
lcm       a LoRA for pictures in 4 steps without guidance: it learns where the guided model's own path ends (distilled
          as in Luo et al. 2023, towards the path's end in place of its next point)

Every kind trains `W + alpha / rank * up @ down`. A run saves itself to OUTPUT.training and draws OUTPUT.png; the same
command takes it up again.

Usage: python examples/emoji/train_diffusers.py toy|velocity|lcm CHECKPOINT OUTPUT [--help]
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdrt.bundle.bpe import read_bpe
from sdrt.export.tokenizer import write_tokenizer
from sdrt.files.publish import staged_file, write_file

HERE = Path(__file__).parent
SIDE = 64
SIZES = (SIDE, SIDE, 0, 0, SIDE, SIDE)
"""What SDXL is told of a picture: its height and width, where it was cut, the height and width wanted."""
START, END, VOCABULARY = 49406, 49407, 49408
TIMESTEPS = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
SIGNAL = torch.cumprod(1 - BETAS, 0)
"""Alpha bar of Ho et al. 2020: the share of a picture's variance in its latents at each timestep."""
TRAINING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
UNCAPTIONED = 0.1
WARM_UP = 50
TEACHER_STRIDE = 60
PATHS_TOGETHER = 32
"""Paths of the guided model that are followed in one batch."""
SHOWN = [
    "red apple",
    "cat face",
    "teddy bear",
    "rocket",
    "hamburger",
    "octopus",
    "robot",
    "unicorn",
    "rainbow",
    "sunflower",
    "fire",
    "ghost",
    "alien",
    "pizza",
    "banana",
    "red heart",
]


def zero_terminal(signal: Tensor) -> Tensor:
    """Alpha bar with nothing of the picture left at the last timestep (Lin et al. 2024, algorithm 1)."""
    root = signal.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


@dataclass(frozen=True)
class Networks:
    """A checkpoint's networks in float32, frozen. `names` are the UNet's modules as kohya's files spell them."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    texts: tuple[nn.Module, ...]
    names: Mapping[str, str]
    xl: bool
    path: Path

    def prompts(self, tokens: Tensor, sizes: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The UNet's context `[B, 77, W]` of token ids `[B, 77]`, and for SDXL its other conditions; sizes `[B, 6]`."""
        if not self.xl:
            return self.texts[0](tokens).last_hidden_state, None
        hidden, pooled = [], None
        for pad, text in zip((END, 0), self.texts, strict=True):
            ended = (tokens == END).cumsum(1) - (tokens == END).long()
            output = text(torch.where(ended > 0, pad, tokens), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", None)
        return torch.cat(hidden, dim=-1), {"text_embeds": pooled, "time_ids": sizes}

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pictures uint8 `[B, H, W, 3]`."""
        image = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.vae.encode(image).latent_dist.mean * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures uint8 `[B, H, W, 3]` of latents."""
        image = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def load(path: Path) -> Networks:
    """Read an emoji checkpoint, SD 1.x or SDXL."""
    stored = load_file(path)
    for name in [name for name in stored if name.endswith(".scale_weight")]:
        weight = name.removesuffix(".scale_weight") + ".weight"
        stored[weight] = stored[weight].float() * stored.pop(name)
    stored = {name: tensor.float() for name, tensor in stored.items()}
    xl = any(name.startswith("conditioner.") for name in stored)
    unet = UNet2DConditionModel(**(XL_UNET if xl else SD_UNET))
    converted = convert_ldm_unet_checkpoint(dict(stored), dict(unet.config))
    unet.load_state_dict(converted)
    original = {id(tensor): name.removeprefix("model.diffusion_model.") for name, tensor in stored.items()}
    names = {name: original[id(tensor)] if xl else name for name, tensor in converted.items()}
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if xl else 0.18215,
    )
    vae.load_state_dict(convert_ldm_vae_checkpoint(dict(stored), dict(vae.config)))
    texts: list[nn.Module] = []
    for prefix in ("conditioner.embedders.0.transformer.",) if xl else ("cond_stage_model.transformer.",):
        found = convert_ldm_clip_checkpoint(dict(stored), remove_prefix=prefix)
        texts.append(_text(CLIPTextModel, found, "quick_gelu", END))
    if xl:
        texts.append(_text(CLIPTextModelWithProjection, _open_clip(stored), "gelu", 0))
    for module in (unet, vae, *texts):
        module.requires_grad_(False).eval()
    return Networks(
        unet,
        vae,
        tuple(texts),
        {name.rpartition(".")[0]: own.rpartition(".")[0].replace(".", "_") for name, own in names.items()},
        xl,
        path,
    )


SD_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64, 96, 128, 128),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
}
XL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 64 + 6 * 256,
}


def _text(kind: type[nn.Module], weights: Mapping[str, Tensor], activation: str, pad: int) -> nn.Module:
    layers = 1 + max(int(name.split(".")[3]) for name in weights if ".layers." in name)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=1,
        hidden_act=activation,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=pad,
    )
    model = kind(config)
    known = model.state_dict()
    bare = not any(name.startswith("text_model.") for name in known)  # as transformers 5 names CLIPTextModel's
    given = {name.removeprefix("text_model.") if bare else name: tensor for name, tensor in weights.items()}
    model.load_state_dict({name: given[name] for name in known})
    return model


def _open_clip(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The second encoder's tensors by transformers' names."""
    prefix = "conditioner.embedders.1.model."
    given = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    found = {
        "text_model.embeddings.position_embedding.weight": given["positional_embedding"],
        "text_model.embeddings.token_embedding.weight": given["token_embedding.weight"],
        "text_projection.weight": given["text_projection"].T.contiguous(),
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for name, tensor in given.items():
        if name.startswith("ln_final."):
            found["text_model." + name.replace("ln_final", "final_layer_norm")] = tensor
        if not name.startswith("transformer.resblocks."):
            continue
        layer, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
        start = f"text_model.encoder.layers.{layer}."
        if rest.startswith("attn.in_proj_"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{start}self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = rows
        elif rest.startswith("attn.out_proj."):
            found[start + "self_" + rest] = tensor
        else:
            module, _, leaf = rest.rpartition(".")
            found[f"{start}{inner[module]}.{leaf}"] = tensor
    return found


class LowRank(nn.Module):
    """`weight + strength * alpha / rank * up @ down` of a matrix or a convolution. `up` begins at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, random: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        self.rank, self.alpha, self.strength = min(rank, outputs, inputs), alpha, 1.0
        begun = torch.randn(self.rank, inputs, generator=random) / math.sqrt(inputs)
        self.down, self.up = nn.Parameter(begun), nn.Parameter(torch.zeros(outputs, self.rank))

    def forward(self, weight: Tensor) -> Tensor:
        if self.strength == 0:
            return weight
        with torch.autocast("cpu", enabled=False):
            return weight + (self.strength * self.alpha / self.rank) * (self.up @ self.down).view_as(weight)


def adapt(networks: Networks, options: argparse.Namespace, random: torch.Generator) -> dict[str, LowRank]:
    """Put a low-rank change on the modules that this kind trains; they come back by kohya's names."""
    found = {}
    sources = [("lora_unet_", networks.unet, networks.names)]
    if options.kind == "toy":
        for number, text in enumerate(networks.texts, 1):
            own = {
                name: "text_model_" + name.removeprefix("text_model.").replace(".", "_")
                for name, _ in text.named_modules()
            }
            sources.append((f"lora_te{number if networks.xl else ''}_", text, own))
    for prefix, network, names in sources:
        for name, module in network.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            text = prefix != "lora_unet_"
            if options.kind != "velocity" and not (
                ("attn" in name or ".mlp." in name) if text else ("attentions" in name or "resnets" in name)
            ):
                continue
            small = isinstance(module, nn.Linear) or module.kernel_size == (1, 1)
            rank = options.rank if small else options.conv_rank
            change = LowRank(module.weight, rank, rank / 2, random)
            found[prefix + names[name]] = change
            parametrize.register_parametrization(module, "weight", change)
    return found


@dataclass(frozen=True)
class Lessons:
    """Latents `[P, 4, 8, 8]` of the pictures, token ids `[P, 77]` of their captions, those of none `[77]`, and those of
    the prompts that are drawn `[16, 77]`.
    """

    latents: Tensor
    tokens: Tensor
    empty: Tensor
    shown: Tensor


def lessons(networks: Networks, captioned: pictures.Captioned) -> Lessons:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "tokenizer.json", VOCABULARY)
        tokenize = read_bpe(Path(folder) / "tokenizer.json").encode

    def ids(caption: str) -> Tensor:
        found = [START, *tokenize(caption), END]
        return torch.tensor(found + [END] * (77 - len(found)))

    pixels = torch.from_numpy(np.stack([picture for _, picture in captioned]))
    article = [f"{'an' if caption[0] in 'aeiou' else 'a'} {caption}" for caption, _ in captioned]
    tokens = torch.stack([ids(caption) for caption, _ in captioned] + [ids(caption) for caption in article])
    with torch.no_grad():
        latents = torch.cat([networks.encode(part) for part in pixels.split(32)])
    return Lessons(torch.cat([latents, latents]), tokens, ids(""), torch.stack([ids(prompt) for prompt in SHOWN]))


def told_sizes(count: int, random: torch.Generator) -> Tensor:
    """Size numbers `[count, 6]`: the usual ones nine times in ten, as the model was trained."""
    usual = torch.tensor(SIZES).float().repeat(count, 1)
    other = usual.clone()
    other[:, :2] = torch.randint(32, 129, (count, 2), generator=random).float()
    return torch.where(torch.rand(count, 1, generator=random) < 0.9, usual, other)


def denoising_loss(networks: Networks, data: Lessons, options: argparse.Namespace, random: torch.Generator) -> Tensor:
    """The mean squared error of the predicted noise (Ho et al. 2020, equation 14), or of the velocity (Salimans and Ho
    2022) with zero terminal SNR.
    """
    count = options.batch
    picked = torch.randint(0, len(data.latents), (count,), generator=random)
    timestep = torch.randint(0, TIMESTEPS, (count,), generator=random)
    latents = data.latents[picked]
    noise = torch.randn(latents.shape, generator=random)
    velocity = options.kind == "velocity"
    signal = (zero_terminal(SIGNAL) if velocity else SIGNAL)[timestep].float()[:, None, None, None]
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    target = signal.sqrt() * noise - (1 - signal).sqrt() * latents if velocity else noise
    silent = torch.rand(count, generator=random) < UNCAPTIONED
    with torch.set_grad_enabled(options.kind == "toy"):
        context, added = networks.prompts(
            torch.where(silent[:, None], data.empty, data.tokens[picked]), told_sizes(count, random)
        )
    output = networks.unet(noisy, timestep, context, added_cond_kwargs=added).sample
    return F.mse_loss(output.float(), target)


def teach(networks: Networks, data: Lessons, tokens: Tensor, guidance: float, random: torch.Generator) -> list[Tensor]:
    """Paths of the guided model from noise to pictures, by DDIM: timesteps `[K]`, latents `[B, K + 1, 4, 8, 8]` at
    these and at the end, float16.
    """
    first = 999 - int(torch.randint(1, 1 + TEACHER_STRIDE // 20, (1,), generator=random)) * 20
    timesteps = [999, *range(first, 0, -TEACHER_STRIDE)]
    count = len(tokens)
    sizes = torch.tensor(SIZES).float().repeat(2 * count, 1)
    x = torch.randn(count, 4, SIDE // 8, SIDE // 8, generator=random)
    points = [x]
    context, added = networks.prompts(torch.cat([data.empty.repeat(count, 1), tokens]), sizes)
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        output = networks.unet(torch.cat([x, x]), timestep, context, added_cond_kwargs=added).sample.float()
        without, with_prompt = output.chunk(2)
        eps = without + guidance * (with_prompt - without)
        signal = float(SIGNAL[timestep])
        following_signal = 1.0 if following is None else float(SIGNAL[following])
        picture = (x - math.sqrt(1 - signal) * eps) / math.sqrt(signal)
        x = math.sqrt(following_signal) * picture + math.sqrt(1 - following_signal) * eps
        points.append(x)
    return [torch.tensor(timesteps), torch.stack(points, dim=1).half()]


def lcm_loss(
    networks: Networks, data: Lessons, paths: list[Any], options: argparse.Namespace, random: torch.Generator
) -> Tensor:
    """How far the picture seen from a point of a path is from the path's end (pseudo-Huber, as Luo et al. 2023)."""
    x, timestep, end, tokens = [], [], [], []
    for _ in range(options.batch):
        captions, timesteps, points = paths[int(torch.randint(0, len(paths), (1,), generator=random))]
        row = int(torch.randint(0, len(captions), (1,), generator=random))
        first = float(torch.rand((), generator=random)) < 0.25
        at = 0 if first else int(torch.randint(1, len(timesteps), (1,), generator=random))
        x.append(points[row, at].float())
        end.append(points[row, -1].float())
        timestep.append(timesteps[at])
        tokens.append(data.tokens[captions[row]])
    noisy, steps = torch.stack(x), torch.stack(timestep)
    with torch.no_grad():
        context, added = networks.prompts(torch.stack(tokens), torch.tensor(SIZES).float().repeat(len(x), 1))
    eps = networks.unet(noisy, steps, context, added_cond_kwargs=added).sample.float()
    signal = SIGNAL[steps].float()[:, None, None, None]
    picture = (noisy - (1 - signal).sqrt() * eps) / signal.sqrt()
    error = (picture - torch.stack(end)).pow(2).mean((1, 2, 3))
    return ((error + 1e-4).sqrt() - 1e-2).mean()


def draw(networks: Networks, data: Lessons, kind: str) -> Image.Image:
    """Sixteen prompts with seeds 0 to 15, as this kind is meant to be used."""
    if kind == "lcm":
        scheduler, steps, guidance = LCMScheduler(**TRAINING), 4, 1.0
    elif kind == "velocity":
        zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        scheduler, steps, guidance = DDIMScheduler(**TRAINING, **zero), 20, 3.0
    else:
        scheduler, steps, guidance = DDIMScheduler(**TRAINING, timestep_spacing="linspace"), 20, 3.0
    scheduler.set_timesteps(steps)
    x = torch.cat(
        [torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(i)) for i in range(len(SHOWN))]
    )
    random = torch.Generator().manual_seed(0)
    sizes = torch.tensor(SIZES).float().repeat(2 * len(x), 1)
    with torch.no_grad():
        context, added = networks.prompts(torch.cat([data.empty.repeat(len(x), 1), data.shown]), sizes)
        for timestep in scheduler.timesteps:
            output = networks.unet(torch.cat([x, x]), timestep, context, added_cond_kwargs=added).sample
            without, with_prompt = output.chunk(2)
            output = without + guidance * (with_prompt - without)
            more = {"generator": random} if kind == "lcm" else {}
            x = scheduler.step(output, timestep, x, **more).prev_sample
        found = networks.decode(x)
    rows = [np.concatenate(list(found[i : i + 8]), axis=1) for i in range(0, len(found), 8)]
    return Image.fromarray(np.concatenate(rows))


def write(path: Path, data: bytes | memoryview) -> None:
    with staged_file(path) as stage:
        write_file(stage, memoryview(data))


def save_adapter(networks: Networks, changes: Mapping[str, LowRank], options: argparse.Namespace, steps: int) -> None:
    """The trained changes in kohya's format, float16."""
    modules = {
        id(change): module
        for network in (networks.unet, *networks.texts)
        for module in network.modules()
        if parametrize.is_parametrized(module)
        for change in module.parametrizations.weight
    }
    tensors = {}
    for name, change in changes.items():
        weight = modules[id(change)].parametrizations.weight.original
        down = change.down.detach().reshape(change.rank, *weight.shape[1:])
        tensors[f"{name}.lora_down.weight"] = down.half().contiguous()
        ends = (1,) * (weight.dim() - 2)
        tensors[f"{name}.lora_up.weight"] = change.up.detach().reshape(-1, change.rank, *ends).half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(change.alpha, dtype=torch.float16)
    if options.kind == "velocity":
        tensors |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(options.rank),
        "ss_network_alpha": str(options.rank / 2),
        "ss_network_args": f'{{"conv_dim": "{options.conv_rank}", "conv_alpha": "{options.conv_rank / 2}"}}',
        "ss_base_model_version": "sdxl_base_v1-0" if networks.xl else "sd_v1",
        "ss_sd_model_name": networks.path.name,
        "ss_new_sd_model_hash": hashlib.sha256(networks.path.read_bytes()).hexdigest(),
        "ss_output_name": options.output.stem,
        "ss_steps": str(steps),
    }
    write(options.output, save(tensors, metadata=metadata))


def rate_at(step: int, steps: int, peak: float) -> float:
    """The learning rate: a linear start, then half a cosine down to a fiftieth of the peak."""
    return peak * min(1.0, (step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def train(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    random = torch.Generator().manual_seed(options.seed)
    networks = load(options.checkpoint)
    changes = adapt(networks, options, random)
    look, known = "toy" if options.kind == "toy" else "flat", (HERE / "prompts.txt").read_text().split("\n")
    data = lessons(
        networks,
        pictures.from_folder(options.pictures, look)
        if options.pictures
        else pictures.from_packages(options.node_modules, [line for line in known if line], look),
    )
    parameters = [value for change in changes.values() for value in change.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.99), weight_decay=0.0)
    state = options.output.with_name(options.output.name + ".training")
    first, paths = 0, list[Any]()
    if state.exists():
        saved = torch.load(state, weights_only=True)
        with torch.no_grad():
            for value, kept in zip(parameters, saved["parameters"], strict=True):
                value.copy_(kept)
        optimizer.load_state_dict(saved["optimizer"])
        first, paths = saved["step"], saved["paths"]
        print(f"{state}: going on at step {first}, {len(paths)} paths", file=sys.stderr, flush=True)

    def keep(step: int) -> None:
        stream = io.BytesIO()
        kept = {"step": step, "parameters": [value.detach() for value in parameters], "paths": paths}
        torch.save({**kept, "optimizer": optimizer.state_dict()}, stream)
        write(state, stream.getbuffer())

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16)

    saved_s = time.monotonic()
    if options.kind == "lcm":
        for change in changes.values():
            change.strength = 0.0
        while len(paths) < options.paths:
            random.manual_seed(options.seed * 7_000_003 + len(paths))
            captions = torch.randint(0, len(data.tokens), (PATHS_TOGETHER,), generator=random)
            with torch.no_grad(), autocast():
                path = teach(networks, data, data.tokens[captions], options.guidance, random)
            paths.append([captions, *path])
            if time.monotonic() - saved_s > options.save_every_s or len(paths) == options.paths:
                keep(0)
                saved_s = time.monotonic()
                print(f"{len(paths)} paths, {time.process_time():.0f} s of CPU time", file=sys.stderr, flush=True)
        for change in changes.values():
            change.strength = 1.0
    losses = list[float]()
    for step in range(first, options.steps):
        random.manual_seed(options.seed * 1_000_003 + step)  # a run taken up again draws the same
        with autocast():
            loss = (
                lcm_loss(networks, data, paths, options, random)
                if options.kind == "lcm"
                else denoising_loss(networks, data, options, random)
            )
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, options.steps, options.rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        last = step + 1 == options.steps
        if last or time.monotonic() - saved_s > options.save_every_s:
            keep(step + 1)
            save_adapter(networks, changes, options, step + 1)
            draw(networks, data, options.kind).save(options.output.with_suffix(".png"))
            saved_s = time.monotonic()
            print(
                f"step {step + 1} of {options.steps}, loss {sum(losses) / len(losses):.4f}, {time.process_time():.0f} s"
                " of CPU time",
                file=sys.stderr,
                flush=True,
            )
            losses.clear()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("toy", "velocity", "lcm"))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--node-modules", type=Path, default=Path("demo/node_modules"), help="where npm put the emoji")
    parser.add_argument(
        "--pictures", type=Path, help="a folder of pictures to learn from instead, named after what they show"
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--batch", type=int, default=48, help="pictures per step")
    parser.add_argument("--rank", type=int, default=16, help="of matrices and 1x1 convolutions")
    parser.add_argument("--conv-rank", type=int, default=8, help="of larger convolutions")
    parser.add_argument(
        "--paths", type=int, default=80, help=f"for lcm: batches of {PATHS_TOGETHER} paths to learn from"
    )
    parser.add_argument("--guidance", type=float, default=3.0, help="for lcm: the guidance of these paths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every-s", type=float, default=150.0)
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16; faster where the CPU can")
    return parser


if __name__ == "__main__":
    train(arguments().parse_args())
