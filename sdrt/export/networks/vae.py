"""The VAE of Stable Diffusion: a decoder from latents to pixels, and an encoder from pixels to latents.

This file has the two networks and the pixel arithmetic around them. Parameter names follow the LDM layout below
`first_stage_model.`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdrt.export.architecture import NORM_GROUPS, VaeSpec
from sdrt.export.networks.attention import attention


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)
        self.shortcut = channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.shortcut else x) + h


class AttnBlock(nn.Module):
    """Single-head attention over all positions. The projections are 1x1 convolutions, as in the checkpoint."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        h = attention(q, k, v, 1).transpose(1, 2).unflatten(2, (height, width))
        return x + self.proj_out(h)


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, channels: int, out_channels: int, res_blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(channels if i == 0 else out_channels, out_channels) for i in range(res_blocks)
        )


class Decoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        top = spec.channels[-1]
        self.conv_in = nn.Conv2d(spec.latent_channels, top, 3, padding=1)
        self.mid = Middle(top)
        levels, current = list[Level](), top
        for i in reversed(range(len(spec.channels))):
            level = Level(current, spec.channels[i], spec.res_blocks + 1)
            current = spec.channels[i]
            if i:
                level.upsample = Upsample(current)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(current)
        self.conv_out = nn.Conv2d(current, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            for block in self.up[i].block:
                h = block(h)
            if i:
                h = self.up[i].upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Encoder(nn.Module):
    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        current = spec.channels[0]
        self.conv_in = nn.Conv2d(3, current, 3, padding=1)
        self.down = nn.ModuleList()
        for i, channels in enumerate(spec.channels):
            level = Level(current, channels, spec.res_blocks)
            current = channels
            if i + 1 < len(spec.channels):
                level.downsample = Downsample(current)
            self.down.append(level)
        self.mid = Middle(current)
        self.norm_out = _norm(current)
        self.conv_out = nn.Conv2d(current, 2 * spec.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        h = self.conv_in(pixels)
        for i, level in enumerate(self.down):
            for block in level.block:
                h = block(h)
            if i + 1 < len(self.down):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


def _by_channel(numbers: tuple[float, ...]) -> Tensor:
    """Numbers for each latent channel, as `[1, C, 1, 1]`."""
    return torch.tensor(numbers)[None, :, None, None]


class VaeDecoder(nn.Module):
    """Latents to pixels, with scale and rounding inside."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.scale, self.mean, self.std = spec.scale, spec.mean, spec.std
        self.first_stage_model = nn.Module()
        self.first_stage_model.post_quant_conv = nn.Conv2d(spec.latent_channels, spec.latent_channels, 1)
        self.first_stage_model.decoder = Decoder(spec)

    def forward(self, latents: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
        """Latents float32 `[N, 4, h, w]` to pixels uint8 `[N, H, W, 3]` and `finite` bool `[N]`.

        `rounding` float32 `[1]` is added before truncation: 0.5 rounds to nearest as diffusers does, 0 truncates as
        AUTOMATIC1111 does. `finite` is taken before the clamp, since a clamp turns NaN into a black picture.
        """
        model = self.first_stage_model
        latents = latents / self.scale
        if self.std:
            latents = latents * _by_channel(self.std) + _by_channel(self.mean)
        image = model.decoder(model.post_quant_conv(latents)).float()
        finite = (image.abs() <= 3.0e38).flatten(1).all(dim=1)
        pixels = torch.floor((image * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0 + rounding)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8), finite


class VaeEncoder(nn.Module):
    """Pixels to latents: a sample of the posterior, or its mean when the noise is zero."""

    def __init__(self, spec: VaeSpec) -> None:
        super().__init__()
        self.scale, self.mean, self.std = spec.scale, spec.mean, spec.std
        self.first_stage_model = nn.Module()
        self.first_stage_model.encoder = Encoder(spec)
        self.first_stage_model.quant_conv = nn.Conv2d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Pixels uint8 `[N, H, W, 3]` and noise float32 `[N, 4, H/8, W/8]` to latents float32 `[N, 4, H/8, W/8]`."""
        model = self.first_stage_model
        image = pixels.to(noise.dtype).permute(0, 3, 1, 2) / 127.5 - 1.0  # cast first: TensorRT cannot permute bytes
        moments = model.quant_conv(model.encoder(image))
        mean, log_variance = moments.chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
        if self.std:
            latents = (latents - _by_channel(self.mean)) / _by_channel(self.std)
        return latents * self.scale
