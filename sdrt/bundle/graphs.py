"""The signature of every graph: names, shapes and types of its inputs and outputs. Nothing else lists them.

Export, self-check, compilers, backends, benchmarks and the GPU simulator read this table. A new input of a model is one
line here, and a value in the job. Shapes name their free axes:

    N  pictures of a call        S  rows of the tables, all pictures together     h, w  rows and columns of the latents
    G  guidance branches         T  tokens of a prompt                            n     chunks of tokens

The first axis of a step input shows its kind. S stands for a table, of which each picture reads one row. N stands for
an input that belongs to one picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sdrt.bundle.manifest import Manifest

TEXT_ENCODER, STEP, VAE_DECODER, VAE_ENCODER = GRAPHS = ("text_encoder", "step", "vae_decoder", "vae_encoder")

REGISTERS = 8
"""How many latents a picture carries from one model call to the next (R). Samplers need four. Forecasting a model call
from earlier ones needs six.
"""

FED_BACK = {"registers": "next_registers", "row": "next_row"}
"""Step inputs that come from an output of the call before, and the names of those outputs."""
IDLE_ROW = 0
"""The table row for a slot without a picture. It names itself as the next row and leaves the registers as they are."""

Shape = tuple[int | str, ...]
TOKENS = ("tokens", "tokens_2")
"""Inputs of the text encoders' graph, one for each encoder of a model, in the manifest's order."""
POOLED = "pooled"
"""The text encoders' output of one vector for a whole prompt, where a model has it."""
OF_TEXT = (CONTEXT, VECTOR) = ("context", "vector")
"""Step inputs that are made of a picture's prompts. They change when prompt editing changes a prompt."""
_ITEM_BYTES = {"float32": 4, "int64": 8, "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class Tensor:
    """An input or output. `shape` holds numbers, names of free axes, and products such as `8*h`. `dtype` is numpy's
    name of the type.
    """

    shape: Shape
    dtype: str = "float32"

    def size_bytes(self, sizes: Mapping[str, int]) -> int:
        return math.prod(concrete(self.shape, sizes)) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a graph by name, in the order of the ONNX file."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def tables(self) -> tuple[str, ...]:
        """Inputs that are read by row."""
        return tuple(name for name, tensor in self.inputs.items() if tensor.shape[0] == "S")

    @property
    def of_picture(self) -> tuple[str, ...]:
        """Inputs that belong to one picture and do not change from call to call."""
        return tuple(name for name, tensor in self.inputs.items() if tensor.shape[0] == "N" and name not in FED_BACK)


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model on which its signatures depend.

    channels: channels of a latent.
    concat_channels: further channels that the UNet sees beside the latents.
    factor: pixels a side per latent.
    context_width: numbers per token.
    chunk: tokens per chunk.
    clip_skip: layers of the text encoders that are outputs.
    encoders: text encoders.
    pooled: numbers of the one vector that the text encoders give for a whole prompt; 0 if they give none.
    vector: numbers that the UNet is told beside timestep and context: the pooled ones and those of sizes; 0 if none.
    told_guidance: whether the UNet is told the guidance scale.
    """

    channels: int
    concat_channels: int
    factor: int
    context_width: int
    chunk: int
    clip_skip: tuple[int, ...]
    encoders: int = 1
    pooled: int = 0
    vector: int = 0
    told_guidance: bool = False


def dimensions(manifest: Manifest) -> Dimensions:
    """The dimensions of a bundle's model."""
    latents = manifest.latents
    return Dimensions(
        latents.channels,
        latents.concat_channels,
        latents.factor,
        manifest.context_width,
        manifest.chunk,
        manifest.clip_skip,
        len(manifest.text),
        manifest.vector.pooled,
        manifest.vector.numbers,
        manifest.diffusion.told_guidance,
    )


def context_output(clip_skip: int) -> str:
    """Name of the text encoder's output for a clip skip, where 1 is the last layer."""
    return f"context_skip_{clip_skip}"


def text_outputs(text_encoder: Signature, clip_skip: int) -> tuple[str, ...]:
    """The outputs of the text encoder that a clip skip asks for: the context, and the pooled vector where there is
    one.
    """
    return (context_output(clip_skip), *([POOLED] if POOLED in text_encoder.outputs else []))


def signatures(model: Dimensions) -> dict[str, Signature]:
    """The signature of every graph of a model, by the graph's name."""
    latents, plane = ("N", model.channels, "h", "w"), ("N", 1, "h", "w")
    tokens = ("n", model.chunk)
    pixels = Tensor(("N", f"{model.factor}*h", f"{model.factor}*w", 3), "uint8")
    registers = Tensor(("N", REGISTERS, *latents[1:]))
    guidance = {"guidance": Tensor(("S",))} if model.told_guidance else {}
    vector = {VECTOR: Tensor(("N", "G", model.vector))} if model.vector else {}
    pooled = {POOLED: Tensor(("n", model.pooled))} if model.pooled else {}
    concat = {"concat": Tensor(("N", "G", model.concat_channels, "h", "w"))} if model.concat_channels else {}
    step = Signature(
        {
            "row": Tensor(("N",), "int64"),
            "next": Tensor(("S",), "int64"),
            "timestep": Tensor(("S",)),
            "a": Tensor(("S", REGISTERS)),
            "w": Tensor(("S", "G")),
            "v": Tensor(("S", "G")),
            "rescale": Tensor(("S", "G")),
            "u": Tensor(("S", REGISTERS)),
            "q": Tensor(("S",)),
            "M": Tensor(("S", REGISTERS, REGISTERS + 3)),
            "inpaint": Tensor(("S", 3)),
            **guidance,
            "noise": Tensor(("S", *latents[1:])),
            "registers": registers,
            CONTEXT: Tensor(("N", "G", "T", model.context_width)),
            **vector,
            "mask": Tensor(plane),
            "init": Tensor(latents),
            "init_noise": Tensor(latents),
            **concat,
        },
        {"next_registers": registers, "next_row": Tensor(("N",), "int64"), "denoised": Tensor(latents)},
    )
    return {
        TEXT_ENCODER: Signature(
            dict.fromkeys(TOKENS[: model.encoders], Tensor(tokens, "int64")),
            {context_output(layer): Tensor((*tokens, model.context_width)) for layer in model.clip_skip} | pooled,
        ),
        STEP: step,
        VAE_DECODER: Signature(
            {"latents": Tensor(latents), "rounding": Tensor((1,))}, {"pixels": pixels, "finite": Tensor(("N",), "bool")}
        ),
        VAE_ENCODER: Signature({"pixels": pixels, "noise": Tensor(latents)}, {"latents": Tensor(latents)}),
    }


def table_rows(pictures: int, rows: int) -> int:
    """The size of axis S if each of `pictures` slots has `rows` rows: those of all slots, and the idle row, which all
    slots share.
    """
    return 1 + pictures * rows


def size(side: int | str, sizes: Mapping[str, int]) -> int:
    """A side of a shape as a number. `sizes` gives the free axes their values."""
    if isinstance(side, int):
        return side
    return math.prod(int(factor) if factor.isdecimal() else sizes[factor] for factor in side.split("*"))


def concrete(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape in numbers."""
    return tuple(size(side, sizes) for side in shape)
