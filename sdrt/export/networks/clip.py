"""CLIP's text encoder as a plain module, and all text encoders of a model as one network. Parameter names are the
canonical ones.

This file has the network (Radford et al. 2021). Names follow Hugging Face's CLIP. The first text encoder lies below
`cond_stage_model.transformer.`, as in the LDM single-file layout of Stable Diffusion 1.x, a second one below
`conditioner.embedders.1.transformer.`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdrt.export.architecture import ClipSpec
from sdrt.export.families.family import END_TOKEN
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
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.quick = spec.activation == "quick_gelu"
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.fc2 = nn.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class EncoderLayer(nn.Module):
    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.self_attn = SelfAttention(spec.width, spec.heads)
        self.layer_norm1 = nn.LayerNorm(spec.width)
        self.mlp = Mlp(spec)
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
    """The layers that some output needs, and the norm after the last layer if one needs that."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        layers = spec.layers if spec.projection else spec.layers + 1 - min(spec.clip_skip)
        self.embeddings = Embeddings(spec)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(EncoderLayer(spec) for _ in range(layers))
        if spec.final_norm or spec.projection:
            self.final_layer_norm = nn.LayerNorm(spec.width)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Token ids `[n, 77]` to the hidden states after each layer, `[n, 77, width]`, first layer first."""
        h = self.embeddings(tokens)
        states = []
        for layer in self.encoder.layers:
            h = layer(h)
            states.append(h)
        return states


class Clip(nn.Module):
    """A text encoder with everything that is made from its hidden states."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.layers = [spec.layers - n for n in spec.clip_skip]
        self.final_norm = spec.final_norm
        self.text_model = TextModel(spec)
        if spec.projection:
            self.text_projection = nn.Linear(spec.width, spec.projection, bias=False)

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Token ids int64 `[n, 77]` to one context `[n, 77, width]` per clip-skip layer, and the states after each
        layer.
        """
        states = self.text_model(tokens)
        contexts = [states[layer] for layer in self.layers]
        if self.final_norm:
            contexts = [self.text_model.final_layer_norm(context) for context in contexts]
        return contexts, states

    def pooled(self, tokens: Tensor, last: Tensor) -> Tensor:
        """The state `last` `[n, 77, width]` of the last layer at the first end token, projected: `[n, projection]`.

        The first end token, not the largest id, because rows of learned embeddings come after it.
        """
        chunk = tokens.shape[1]
        places = torch.where(tokens == END_TOKEN, torch.arange(chunk)[None], chunk - 1)
        first = places.amin(dim=1)[:, None, None].expand(-1, 1, last.shape[2])
        return self.text_projection(self.text_model.final_layer_norm(last.gather(1, first)[:, 0]))


class TextEncoder(nn.Module):
    """Token ids to context, by all text encoders of a model. Chunks are encoded independently."""

    def __init__(self, specs: tuple[ClipSpec, ...]) -> None:
        super().__init__()
        self.pools = specs[-1].projection > 0
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.transformer = Clip(specs[0])
        self.conditioner = nn.Module()
        self.conditioner.embedders = nn.ModuleDict(
            {str(i): nn.ModuleDict({"transformer": Clip(spec)}) for i, spec in enumerate(specs) if i}
        )

    def forward(self, tokens: Tensor, tokens_2: Tensor | None = None) -> tuple[Tensor, ...]:
        """Token ids int64 `[n, 77]` for each encoder to one context float32 `[n, 77, width]` per clip-skip layer. The
        contexts of two encoders lie side by side. After them, if the model has one, comes the pooled vector of the
        last encoder, `[n, projection]`.
        """
        encoders = [self.cond_stage_model.transformer]
        encoders += [embedder["transformer"] for embedder in self.conditioner.embedders.values()]
        inputs = [tokens] if tokens_2 is None else [tokens, tokens_2]
        found = [encoder(ids) for encoder, ids in zip(encoders, inputs, strict=True)]
        contexts = zip(*(contexts for contexts, _ in found), strict=True)
        outputs = [torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in contexts]
        if self.pools:
            outputs.append(encoders[-1].pooled(inputs[-1], found[-1][1][-1]))
        return tuple(output.float() for output in outputs)
