"""The CLIP text encoder as a plain module. Its parameter names are the checkpoint's.

This file has the network (Radford et al. 2021). Names follow Hugging Face's CLIP below `cond_stage_model.transformer.`,
which is the LDM single-file layout of Stable Diffusion 1.x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdrt.export.architecture import ClipSpec
from sdrt.export.networks.attention import attention


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class Mlp(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # CLIP-L's quick GELU


class EncoderLayer(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.self_attn = SelfAttention(spec.width, spec.heads)
        self.layer_norm1 = nn.LayerNorm(spec.width)
        self.mlp = Mlp(spec.width, spec.mlp_width)
        self.layer_norm2 = nn.LayerNorm(spec.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.position_embedding = nn.Embedding(spec.tokens, spec.width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight[None]


class TextModel(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(spec) for _ in range(spec.layers))
        self.final_layer_norm = nn.LayerNorm(spec.width)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Token ids `[n, 77]` to the hidden states after each layer, `[n, 77, width]`, first layer first."""
        h = self.embeddings(tokens)
        states = []
        for layer in self.encoder.layers:
            h = layer(h)
            states.append(h)
        return states


class TextEncoder(nn.Module):
    """Token ids to context. Chunks are encoded independently."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.clip_skip = spec.clip_skip
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.transformer = nn.Module()
        self.cond_stage_model.transformer.text_model = TextModel(spec)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Token ids int64 `[n, 77]` to one context float32 `[n, 77, width]` per clip-skip layer."""
        model = self.cond_stage_model.transformer.text_model
        states = model(tokens)
        return tuple(model.final_layer_norm(states[-n]).float() for n in self.clip_skip)
