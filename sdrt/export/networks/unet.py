"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL as a plain module. Its parameter names are the
checkpoint's.

This file has the network, its sizes, and the hypernetworks that change the input of its attention. Parameter names
follow the LDM single-file layout below `model.diffusion_model.` (Rombach et al. 2022, "High-Resolution Image Synthesis
with Latent Diffusion Models").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdrt.export.architecture import NORM_GROUPS, HypernetworkSpec, UNetSpec
from sdrt.export.networks.attention import attention


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Sinusoids of a float32 timestep `[B]` as `[B, width]`, cosines first (LDM's order). Always float32: in float16,
    961.733 would become 961.5.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = timestep.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Sinusoids of a guidance scale `[B]` as `[B, width]`, sines first, in float32 (Luo et al. 2023, "Latent
    Consistency Models").
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angles = (scale.float() - 1.0)[:, None] * 1000.0 * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeEmbedding(nn.ModuleDict):
    """What every residual block is told of the timestep, and of the guidance scale where a model is told it."""

    def __init__(self, base: int, guidance_width: int) -> None:
        width = base * 4
        super().__init__({"0": nn.Linear(base, width), "2": nn.Linear(width, width)})
        self.base, self.guidance_width = base, guidance_width
        if guidance_width:
            self.cond_proj = nn.Linear(guidance_width, base, bias=False)

    def forward(self, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Timesteps `[N]` and guidance scales `[N]`, both float32, to `[N, 4 * base]`."""
        x = timestep_embedding(timestep, self.base).to(dtype)
        if guidance is not None:
            x = x + self.cond_proj(guidance_embedding(guidance, self.guidance_width).to(dtype))
        return self["2"](F.silu(self["0"](x)))


class Residual(nn.Module):
    """One network of a hypernetwork: x + scale * layers(x). The scale is a weight, so that another scale needs no other
    trace.
    """

    def __init__(self, widths: tuple[int, ...], spec: HypernetworkSpec) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        layers: list[nn.Module] = []
        for i, (width, following) in enumerate(itertools.pairwise(widths), 1):
            layers.append(nn.Linear(width, following))
            if spec.activation is not None and (i < len(widths) - 1 or spec.activate_output):
                layers.append(_activation(spec.activation))
            if spec.layer_norm:
                layers.append(nn.LayerNorm(following))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.layers(x)


class LogSigmoid(nn.Module):
    """Like torch.nn.LogSigmoid. That one would be traced as the logarithm of a sigmoid, which is wrong for large
    negative inputs: there the sigmoid is 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        return -F.softplus(-x)


def _activation(name: str) -> nn.Module:
    """An activation of torch.nn with its defaults. RReLU's slope is random in training; at inference the mean slope is
    used.
    """
    special = {"RReLU": nn.LeakyReLU((1 / 8 + 1 / 3) / 2), "LogSigmoid": LogSigmoid()}
    module: nn.Module = special[name] if name in special else getattr(nn, name)()
    return module


class Hypernetworks(nn.Module):
    """Hypernetworks in the order they apply (AUTOMATIC1111, modules/hypernetworks). Each has, for some widths, one
    network for keys and one for values.

    Parameters are named `<i>.<width>.<k|v>.*`. If a hypernetwork lacks the width of an input, the input passes through
    unchanged.
    """

    def __init__(self, specs: tuple[HypernetworkSpec, ...]) -> None:
        super().__init__()
        for i, spec in enumerate(specs):
            pairs = {
                str(widths[0]): nn.ModuleDict({part: Residual(widths, spec) for part in ("k", "v")})
                for widths in spec.layers
            }
            self.add_module(str(i), nn.ModuleDict(pairs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of the keys and of the values, both made from `x` `[B, T, C]`."""
        keys = values = x
        for by_width in self.children():
            assert isinstance(by_width, nn.ModuleDict)
            if (width := str(x.shape[-1])) in by_width:
                pair = by_width[width]
                assert isinstance(pair, nn.ModuleDict)
                keys, values = pair["k"](keys), pair["v"](values)
        return keys, values


def pass_through(x: Tensor) -> tuple[Tensor, Tensor]:
    """No hypernetwork: keys and values are made from the input itself."""
    return x, x


@dataclass(frozen=True)
class Context:
    """What attention sees besides its own input. Keys and values of cross-attention are made from the tensors here,
    `[N*G, T, C]`. Those of self-attention are made from what `hypernetworks` makes of its input.

    A picture's G guidance branches differ only in their context and, if `told_apart`, in what residual blocks are told
    beside the timestep. So before the first cross-attention, or before the first such embedding is added, they all have
    the same features. While `shared` is true, these features are computed once per picture, `[N, ...]`. From then on
    they are computed per branch, `[N*G, ...]`.
    """

    keys: Tensor
    values: Tensor
    hypernetworks: Callable[[Tensor], tuple[Tensor, Tensor]]
    branches: int
    shared: bool
    told_apart: bool

    def for_each_branch(self, x: Tensor) -> Tensor:
        """`x` `[N, ...]` as `[N*G, ...]`. Unchanged if it has its branches already."""
        return _repeated(x, self.branches) if self.shared else x


def _repeated(x: Tensor, branches: int) -> Tensor:
    """`x` `[N, ...]`, repeated for each branch, as `[N*G, ...]`. All branches of the first picture come first."""
    return x[:, None].expand(-1, branches, *[-1] * (x.dim() - 1)).flatten(0, 1)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, embedding_width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, out_channels))
        # The Identity replaces the dropout of training, so that the convolution keeps its index in the checkpoint.
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, context: Context) -> Tensor:
        h, skipped = self.in_layers(x), self.skip_connection(x)
        if context.told_apart:
            h, skipped = context.for_each_branch(h), context.for_each_branch(skipped)
        return skipped + self.out_layers(h + self.emb_layers(embedding)[:, :, None, None])


class CrossAttention(nn.Module):
    def __init__(self, channels: int, context_width: int, heads: int, *, biased: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=biased)
        self.to_v = nn.Linear(context_width, channels, bias=biased)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.to_out(attention(self.to_q(x), self.to_k(keys), self.to_v(values), self.heads))


class GEGLU(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, channels * 4), nn.Identity(), nn.Linear(channels * 4, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context_width: int, heads: int, biased: tuple[int, ...]) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads, biased=channels in biased)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_width, heads, biased=context_width in biased)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h = self.norm1(x)
        x = context.for_each_branch(x + self.attn1(h, *context.hypernetworks(h)))
        x = x + self.attn2(self.norm2(x), context.keys, context.values)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(
        self, channels: int, context_width: int, heads: int, depth: int, linear: bool, biased: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, context_width, heads, biased) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, context: Context) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        h = self.proj_in(h) if self.linear else h
        x, within = context.for_each_branch(x), context
        for block in self.transformer_blocks:
            h = block(h, within)
            within = replace(within, shared=False)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).unflatten(2, (height, width))
        return x + (h if self.linear else self.proj_out(h))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Context) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Context) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class InputConv(nn.Conv2d):
    """The first convolution, callable like every other layer of a block."""

    def forward(self, x: Tensor, embedding: Tensor, context: Context) -> Tensor:
        return super().forward(x)


class UNet(nn.Module):
    """Predicts noise (or v) from scaled latents.

    Any latent size works, odd ones too. Before every concat the up path is cut to the size of its skip. AUTOMATIC1111
    resizes to nearest there, which is the same (from h+1 rows to h, nearest keeps rows 0 to h-1).
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        base = spec.channels[0]
        width = base * 4

        def transformer(channels: int, depth: int) -> SpatialTransformer:
            heads = spec.heads if spec.heads is not None else channels // (spec.head_width or channels)
            return SpatialTransformer(channels, spec.context_width, heads, depth, spec.linear_projections, spec.biased)

        self.time_embed = TimeEmbedding(base, spec.guidance_width)
        if spec.vector_width:
            # Nested as in checkpoints, where it is one of several kinds of label.
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(spec.vector_width, width), nn.SiLU(), nn.Linear(width, width))
            )
        self.input_blocks = nn.ModuleList([nn.ModuleList([InputConv(spec.in_channels, base, 3, padding=1)])])
        current, skips = base, [base]
        for level, channels in enumerate(spec.channels):
            for depth in spec.down_depth[level]:
                layers: list[nn.Module] = [ResBlock(current, channels, width)]
                if depth:
                    layers.append(transformer(channels, depth))
                self.input_blocks.append(nn.ModuleList(layers))
                current = channels
                skips.append(current)
            if level + 1 < len(spec.channels):
                self.input_blocks.append(nn.ModuleList([Downsample(current)]))
                skips.append(current)
        self.middle_block = nn.ModuleList()
        if spec.middle is not None:
            self.middle_block.append(ResBlock(current, current, width))
        if spec.middle:
            self.middle_block.extend([transformer(current, spec.middle), ResBlock(current, current, width)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(spec.channels))):
            channels = spec.channels[level]
            for i, depth in enumerate(spec.up_depth[level]):
                layers = [ResBlock(current + skips.pop(), channels, width)]
                if depth:
                    layers.append(transformer(channels, depth))
                if level and i + 1 == len(spec.up_depth[level]):
                    layers.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(layers))
                current = channels
        self.out = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, base), nn.SiLU(), nn.Conv2d(base, spec.out_channels, 3, padding=1)
        )

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        hypernetworks: Callable[[Tensor], tuple[Tensor, Tensor]] = pass_through,
        branches: int = 1,
        *,
        shared: bool = True,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """From scaled latents of N pictures, a timestep for each, float32 `[N]`, and contexts `[N*G, T,
        context_width]`, to `[N*G, C, h, w]`.

        `branches` is G. If the latents are `shared`, all guidance branches of a picture denoise the same ones, and they
        are `[N, C, h, w]`. Otherwise they are `[N*G, C, h, w]`, for models whose branches differ in more than the
        context. `hypernetworks` gives the inputs of keys and values, for the context and for each input of
        self-attention. A model may also be told a `vector` `[N*G, vector_width]` and a `guidance` scale `[N]`.
        """
        told_apart = vector is not None
        seen = Context(
            *hypernetworks(context), hypernetworks, branches, shared, told_apart
        )  # keys and values are the same for every layer, so made once
        embedding = self.time_embed(timestep, guidance, x.dtype)
        if told_apart or not shared:
            embedding = _repeated(embedding, branches)
        if vector is not None:
            embedding = embedding + self.label_emb(vector)
        skips: list[Tensor] = []
        for block in (*self.input_blocks, self.middle_block):
            for layer in block:
                x = layer(x, embedding, seen)
                if seen.shared and isinstance(layer, ResBlock if told_apart else SpatialTransformer):
                    embedding = embedding if told_apart else seen.for_each_branch(embedding)
                    skips = [seen.for_each_branch(skip) for skip in skips]
                    seen = replace(seen, shared=False)
            skips.append(x)
        skips.pop()  # the output of the middle block goes straight up
        for block in self.output_blocks:
            skip = skips.pop()
            x = torch.cat([x[:, :, : skip.shape[2], : skip.shape[3]], skip], dim=1)
            for layer in block:
                x = layer(x, embedding, seen)
        return self.out(x)
