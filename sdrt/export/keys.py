"""Name tables between the spellings of one module: LDM (checkpoints), diffusers, and kohya's underscored form of either."""

from __future__ import annotations

from collections.abc import Iterable

from sdrt.export.architecture import CLIP, UNET, UNetSpec

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_OUTER = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip


def diffusers_prefixes(spec: UNetSpec) -> dict[str, str]:
    """LDM prefixes of the UNet's blocks to diffusers', both with a trailing dot, e.g. `input_blocks.1.0.` to `down_blocks.0.resnets.0.`."""
    table: dict[str, str] = {}
    index = 1
    for level, blocks in enumerate(spec.res_blocks):
        for i in range(blocks):
            table[f"input_blocks.{index}.0."] = f"down_blocks.{level}.resnets.{i}."
            table[f"input_blocks.{index}.1."] = f"down_blocks.{level}.attentions.{i}."
            index += 1
        if level + 1 < len(spec.res_blocks):
            table[f"input_blocks.{index}.0.op."] = f"down_blocks.{level}.downsamplers.0.conv."
            index += 1
    table |= {"middle_block.0.": "mid_block.resnets.0.", "middle_block.1.": "mid_block.attentions.0.", "middle_block.2.": "mid_block.resnets.1."}
    index = 0
    for up, level in enumerate(reversed(range(len(spec.res_blocks)))):
        for i in range(spec.res_blocks[level] + 1):
            table[f"output_blocks.{index}.0."] = f"up_blocks.{up}.resnets.{i}."
            if spec.transformer_depth[level]:
                table[f"output_blocks.{index}.1."] = f"up_blocks.{up}.attentions.{i}."
            if level and i == spec.res_blocks[level]:
                table[f"output_blocks.{index}.{2 if spec.transformer_depth[level] else 1}.conv."] = f"up_blocks.{up}.upsamplers.0.conv."
            index += 1
    return table


def diffusers_module(module: str, spec: UNetSpec) -> str:
    """The diffusers name of a UNet module, given its LDM name below `model.diffusion_model.`; KeyError if there is none."""
    if module in _OUTER:
        return _OUTER[module]
    for ldm, diffusers in diffusers_prefixes(spec).items():
        if (module + ".").startswith(ldm):
            rest = module[len(ldm) :]
            return (diffusers + (_RESNET.get(rest, rest) if ".resnets." in diffusers else rest)).rstrip(".")
    raise KeyError(module)


def kohya_names(weights: Iterable[str], spec: UNetSpec) -> dict[str, str]:
    """Every kohya name a LoRA may use for a weight of this model, in both spellings, to the weight's canonical name.

    Built from the model's own names, never parsed from the LoRA's: an underscore there is ambiguous.
    """
    table: dict[str, str] = {}
    for weight in weights:
        module = weight.removesuffix(".weight")
        if weight.startswith(UNET):
            ldm = module[len(UNET) :]
            for name in (ldm, diffusers_module(ldm, spec)):
                table["lora_unet_" + name.replace(".", "_")] = weight
        elif weight.startswith(CLIP):
            table["lora_te_" + module[len(CLIP) :].replace(".", "_")] = weight
    return table
