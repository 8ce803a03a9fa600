"""Name tables between the spellings of one module: LDM (checkpoints), diffusers, and what adapters make of either."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from sdrt.export.architecture import Architecture, UNetSpec
from sdrt.export.families.family import Component, Family
from sdrt.export.families.table import family_named

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
OUTER = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip

OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
}  # fmt: skip
"""transformers' modules of a text encoder to OpenCLIP's."""
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip
"""The same within a layer."""


class Levels(Protocol):
    """As much of a `UNetSpec` as its blocks' names depend on."""

    @property
    def down_depth(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def up_depth(self) -> tuple[tuple[int, ...], ...]: ...


def diffusers_prefixes(spec: Levels) -> dict[str, str]:
    """LDM prefixes of the UNet's blocks to diffusers', both with a trailing dot, e.g. `input_blocks.1.0.` to
    `down_blocks.0.resnets.0.`.
    """
    table: dict[str, str] = {}
    index = 1
    for level, blocks in enumerate(spec.down_depth):
        for i in range(len(blocks)):
            table[f"input_blocks.{index}.0."] = f"down_blocks.{level}.resnets.{i}."
            table[f"input_blocks.{index}.1."] = f"down_blocks.{level}.attentions.{i}."
            index += 1
        if level + 1 < len(spec.down_depth):
            table[f"input_blocks.{index}.0.op."] = f"down_blocks.{level}.downsamplers.0.conv."
            index += 1
    table |= {
        "middle_block.0.": "mid_block.resnets.0.",
        "middle_block.1.": "mid_block.attentions.0.",
        "middle_block.2.": "mid_block.resnets.1.",
    }
    index = 0
    for up, blocks in enumerate(reversed(spec.up_depth)):
        for i, depth in enumerate(blocks):
            table[f"output_blocks.{index}.0."] = f"up_blocks.{up}.resnets.{i}."
            if depth:
                table[f"output_blocks.{index}.1."] = f"up_blocks.{up}.attentions.{i}."
            if up + 1 < len(spec.up_depth) and i + 1 == len(blocks):
                table[f"output_blocks.{index}.{2 if depth else 1}.conv."] = f"up_blocks.{up}.upsamplers.0.conv."
            index += 1
    return table


def diffusers_module(module: str, spec: UNetSpec) -> str:
    """The diffusers name of a UNet module, given its LDM name below the UNet's prefix; KeyError if there is none."""
    if module in OUTER:
        return OUTER[module]
    for ldm, diffusers in diffusers_prefixes(spec).items():
        if (module + ".").startswith(ldm):
            rest = module[len(ldm) :]
            return (diffusers + (RESNET.get(rest, rest) if ".resnets." in diffusers else rest)).rstrip(".")
    raise KeyError(module)


def later_layers(arch: Architecture, expected: Iterable[str]) -> Iterator[str]:
    """Names of the text encoders' tensors that no output of a model may need: those of all its layers, and of the norm
    after them. `expected` are names of tensors that it needs.
    """
    names = list(expected)
    for component, text in zip(family_named(arch.family).text_encoders, arch.texts, strict=True):
        model = component.prefix + "text_model."
        first = model + "encoder.layers.0."
        leaves = [name.removeprefix(first) for name in names if name.startswith(first)]
        layers = text.layers + (component.text.used_layers is not None)
        yield from (f"{model}encoder.layers.{layer}.{leaf}" for layer in range(layers) for leaf in leaves)
        yield from (f"{model}final_layer_norm.{leaf}" for leaf in ("weight", "bias"))


def open_clip_module(module: str) -> str | None:
    """OpenCLIP's name of a module of a text encoder, given transformers' name below the component's prefix; None if it
    has none.
    """
    if module in OPEN_CLIP:
        return OPEN_CLIP[module]
    layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", module)
    if layer is None:
        return None
    ours = next((name for name in OPEN_CLIP_LAYER if (layer[2] + ".").startswith(name + ".")), "")
    return f"transformer.resblocks.{layer[1]}.{OPEN_CLIP_LAYER.get(ours, '')}{layer[2].removeprefix(ours)}"


def joined_modules(modules: Collection[str], family: Family) -> dict[str, tuple[str, ...]]:
    """Modules that some files join into one, by its name: OpenCLIP's `in_proj` makes queries, keys and values. They
    are equal parts of its rows, in this order.
    """
    known, found = set(modules), dict[str, tuple[str, ...]]()
    for component in family.components:
        for stored, ends in component.rows.items():
            whole, parts = stored.removesuffix("_weight"), [end.removesuffix(".weight") for end in ends]
            for module in modules:
                block = module.removesuffix(parts[0])
                names = tuple(block + part for part in parts)
                if stored != whole and block.startswith(component.prefix) and known.issuperset(names):
                    found[block + whole] = names
    return found


def adapter_names(modules: Iterable[str], spec: UNetSpec, family: Family) -> dict[str, str]:
    """Every name an adapter may use for a module of this model, in each tool's spelling, to the module's canonical
    name.

    kohya and LyCORIS join the path with underscores below a prefix, in LDM's or diffusers' spelling; peft and diffusers
    keep the dots. diffusers' first files go through `processor` and call the text encoder's projections as the UNet's.
    Text encoders of OpenCLIP are spelled as transformers does or as OpenCLIP does.
    Built from the model's own names, never parsed from the adapter's: an underscore there is ambiguous.
    """
    table: dict[str, str] = {}
    for module in modules:
        component = next((component for component in family.components if module.startswith(component.prefix)), None)
        if component is None or not component.adapters_flat:
            continue
        name = module[len(component.prefix) :]
        if component.network == "unet":
            names = [name, diffusers_module(name, spec)]
            dotted = [spelling for name in names for spelling in (name, *_old_attention(name))]
        else:
            names = _text_names(name, component)
            dotted = [*names, *_old_text(name)]
        table |= {prefix + name.replace(".", "_"): module for name in names for prefix in component.adapters_flat}
        table |= {prefix + name: module for name in dotted for prefix in component.adapters_dotted}
    return table


def _text_names(name: str, component: Component) -> list[str]:
    """What tools call a module of a text encoder below their prefixes. transformers 5 has no outer `text_model`."""
    names = [name, name.removeprefix("text_model.")]
    theirs = open_clip_module(name) if component.rows else None
    return [*names, theirs] if theirs is not None else names


def _old_attention(name: str) -> list[str]:
    """What diffusers before 0.22 called an attention projection of the UNet: `attn1.processor.to_q` + `_lora`, and
    `to_out` for `to_out.0`.
    """
    block, dot, projection = name.partition(".to_")
    if not dot or not block.endswith((".attn1", ".attn2")):
        return []
    short = "to_" + projection.removesuffix(".0")
    return [f"{block}.processor.{short}", f"{block}.processor.to_{projection}", f"{block}.{short}"]


def _old_text(name: str) -> list[str]:
    """What diffusers before 0.18 called a projection of the text encoder: `self_attn.to_q` + `_lora` for
    `self_attn.q_proj`.
    """
    block, dot, projection = name.rpartition(".self_attn.")
    return [f"{block}.self_attn.to_{projection.removesuffix('_proj')}"] if dot else []
