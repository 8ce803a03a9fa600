"""Names and shapes of published checkpoints' tensors, computed from their sizes by the rules of LDM's, OpenCLIP's and
transformers' networks, and not by sdrt's.
"""

from __future__ import annotations

from tiny_model import Shapes, expected_shapes

from sdrt.export.families.sd1 import CLIP, UNET, VAE

Depths = tuple[tuple[int, ...], ...]


def _conv(name: str, out: int, into: int, kernel: int = 3) -> Shapes:
    return {name + ".weight": (out, into, kernel, kernel), name + ".bias": (out,)}


def _linear(name: str, out: int, into: int, *, bias: bool = True) -> Shapes:
    return {name + ".weight": (out, into)} | ({name + ".bias": (out,)} if bias else {})


def _norm(name: str, channels: int) -> Shapes:
    return {name + ".weight": (channels,), name + ".bias": (channels,)}


def _residual(name: str, into: int, out: int, time: int) -> Shapes:
    shapes = _norm(name + ".in_layers.0", into) | _conv(name + ".in_layers.2", out, into)
    shapes |= _linear(name + ".emb_layers.1", out, time) | _norm(name + ".out_layers.0", out)
    shapes |= _conv(name + ".out_layers.3", out, out)
    return shapes | (_conv(name + ".skip_connection", out, into, 1) if into != out else {})


def _transformer(name: str, width: int, depth: int, context: int, linear: bool) -> Shapes:
    def project(part: str) -> Shapes:
        return _linear(name + part, width, width) if linear else _conv(name + part, width, width, 1)

    shapes = _norm(name + ".norm", width) | project(".proj_in") | project(".proj_out")
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, into in ((".attn1", width), (".attn2", context)):
            shapes |= _linear(f"{block}{attention}.to_q", width, width, bias=False)
            shapes |= _linear(f"{block}{attention}.to_k", width, into, bias=False)
            shapes |= _linear(f"{block}{attention}.to_v", width, into, bias=False)
            shapes |= _linear(f"{block}{attention}.to_out.0", width, width)
        shapes |= _linear(f"{block}.ff.net.0.proj", 8 * width, width) | _linear(f"{block}.ff.net.2", width, 4 * width)
        for norm in "123":
            shapes |= _norm(f"{block}.norm{norm}", width)
    return shapes


def unet(
    channels: tuple[int, ...],
    down: Depths,
    up: Depths,
    middle: int | None,
    context: int,
    *,
    linear: bool,
    inputs: int = 4,
    vector: int = 0,
    guidance: int = 0,
) -> Shapes:
    """`down` and `up` have the transformer blocks after each residual block, for each level, finest first."""
    base, time = channels[0], 4 * channels[0]
    shapes = _linear("time_embed.0", time, base) | _linear("time_embed.2", time, time)
    if vector:
        shapes |= _linear("label_emb.0.0", time, vector) | _linear("label_emb.0.2", time, time)
    if guidance:
        shapes |= _linear("time_embed.cond_proj", base, guidance, bias=False)
    shapes |= _conv("input_blocks.0.0", base, inputs)
    skips, width, number = [base], base, 1
    for level, depths in enumerate(down):
        for depth in depths:
            shapes |= _residual(f"input_blocks.{number}.0", width, channels[level], time)
            width = channels[level]
            if depth:
                shapes |= _transformer(f"input_blocks.{number}.1", width, depth, context, linear)
            skips.append(width)
            number += 1
        if level + 1 < len(down):
            shapes |= _conv(f"input_blocks.{number}.0.op", width, width)
            skips.append(width)
            number += 1
    if middle is not None:
        shapes |= _residual("middle_block.0", width, width, time)
        if middle:
            shapes |= _transformer("middle_block.1", width, middle, context, linear)
            shapes |= _residual("middle_block.2", width, width, time)
    number = 0
    for level in reversed(range(len(up))):
        for i, depth in enumerate(up[level]):
            shapes |= _residual(f"output_blocks.{number}.0", width + skips.pop(), channels[level], time)
            width = channels[level]
            if depth:
                shapes |= _transformer(f"output_blocks.{number}.1", width, depth, context, linear)
            if level and i + 1 == len(up[level]):
                shapes |= _conv(f"output_blocks.{number}.{2 if depth else 1}.conv", width, width)
            number += 1
    shapes |= _norm("out.0", width) | _conv("out.2", 4, base)
    return {UNET + name: shape for name, shape in shapes.items()}


def clip(prefix: str, layers: int, width: int, projection: int = 0) -> Shapes:
    """As transformers names it."""
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", width, width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
        shapes |= _linear(f"{layer}.mlp.fc1", 4 * width, width) | _linear(f"{layer}.mlp.fc2", width, 4 * width)
    shapes |= _norm("text_model.final_layer_norm", width)
    shapes |= _linear("text_projection", projection, width, bias=False) if projection else {}
    return {prefix + name: shape for name, shape in shapes.items()}


def open_clip(prefix: str, layers: int, width: int) -> Shapes:
    """As OpenCLIP names it."""
    shapes: Shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}.attn.out_proj", width, width)
        shapes |= _norm(f"{block}.ln_1", width) | _norm(f"{block}.ln_2", width)
        shapes |= _linear(f"{block}.mlp.c_fc", 4 * width, width) | _linear(f"{block}.mlp.c_proj", width, 4 * width)
    shapes |= _norm("ln_final", width)
    return {prefix + name: shape for name, shape in shapes.items()}


def _same(depths: tuple[int, ...], blocks: int) -> Depths:
    return tuple((depth,) * blocks for depth in depths)


_SD, _XL = (320, 640, 1280, 1280), (320, 640, 1280)
_ONE = (1, 1, 1, 0)


def sd1(inputs: int = 4, guidance: int = 0) -> Shapes:
    return unet(_SD, _same(_ONE, 2), _same(_ONE, 3), 1, 768, linear=False, inputs=inputs, guidance=guidance) | clip(
        CLIP, 12, 768
    )


def sd2(inputs: int = 4, prefix: str = "cond_stage_model.model.") -> Shapes:
    return unet(_SD, _same(_ONE, 2), _same(_ONE, 3), 1, 1024, linear=True, inputs=inputs) | open_clip(prefix, 24, 1024)


def xl_texts() -> Shapes:
    first = clip("conditioner.embedders.0.transformer.", 12, 768)
    return first | open_clip("conditioner.embedders.1.model.", 32, 1280)


def xl_unet(down: Depths, up: Depths, middle: int | None, inputs: int = 4) -> Shapes:
    return unet(_XL, down, up, middle, 2048, linear=True, inputs=inputs, vector=2816)


def sdxl(inputs: int = 4) -> Shapes:
    return xl_unet(_same((0, 2, 10), 2), _same((0, 2, 10), 3), 10, inputs) | xl_texts()


def refiner() -> Shapes:
    depths = (0, 4, 4, 0)
    parts = unet((384, 768, 1536, 1536), _same(depths, 2), _same(depths, 3), 4, 1280, linear=True, vector=2560)
    return parts | open_clip("conditioner.embedders.0.model.", 32, 1280)


RELATIVES: dict[str, Shapes] = {
    "SSD-1B": xl_unet(((0, 0), (2, 2), (4, 4)), ((0, 0, 0), (2, 1, 1), (4, 4, 10)), 0) | xl_texts(),
    "Vega": xl_unet(((0, 0), (1, 1), (2, 2)), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), 0) | xl_texts(),
    "KOALA 1B": xl_unet(_same((0, 2, 6), 1), _same((0, 2, 6), 2), 6) | xl_texts(),
    "KOALA 700M": xl_unet(_same((0, 2, 5), 1), _same((0, 2, 5), 2), None) | xl_texts(),
    "BK-SDM small": unet(_SD, _same(_ONE, 1), _same(_ONE, 2), None, 768, linear=False) | clip(CLIP, 12, 768),
    "BK-SDM tiny": unet(_XL, _same((1, 1, 1), 1), _same((1, 1, 1), 2), None, 768, linear=False) | clip(CLIP, 12, 768),
}
"""Distilled models: blocks and the middle are missing, depths differ within a level."""


def with_vae(shapes: Shapes) -> Shapes:
    """With the VAE that all of them have."""
    from checkpoint_files import SD15

    return shapes | {name: shape for name, shape in expected_shapes(SD15).items() if name.startswith(VAE)}
