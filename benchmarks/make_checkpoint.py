"""Make a random-weight checkpoint in the exact layout and size of a published model, and a LoRA for it.

Latency and memory do not depend on the values, so this stands in for a real model where none may be shipped: float16,
written in a stream, the same bytes for the same seed. `--family` is sd15 (2.1 GB), sd2 (2.6 GB), sdxl (6.9 GB) or tiny:
Stable Diffusion 1.5's topology small enough for CI, 30 MB, 64x64 pixels.
Usage: python benchmarks/make_checkpoint.py OUTPUT.safetensors [--family F] [--seed N] [--lora FILE --rank R]
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from architectures import ARCHITECTURES, SD15

from sdrt.export.architecture import Architecture
from sdrt.export.families.keys import diffusers_module
from sdrt.export.families.sd1 import CLIP, UNET
from sdrt.export.graph import recipes
from sdrt.export.skeletons import weights_of

POSITION_IDS = "position_ids"
CLIP_2 = "conditioner.embedders.1.transformer."

_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
}
"""Parts of Hugging Face's names of a text encoder, and OpenCLIP's."""


def weight_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight of an architecture by its canonical name, also of layers that contexts skip."""
    texts = tuple(replace(text, clip_skip=(1,), final_norm=True) for text in architecture.texts)
    every = recipes(replace(architecture, texts=texts)).values()
    return {name: shape for recipe in every for name, shape in weights_of(recipe).items()}


def stored_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published file by its stored name. Text encoders of OpenCLIP have its names, queries, keys and
    values in one tensor, and Stable Diffusion 2's the layer that nobody uses.
    """
    family, (first, *_) = architecture.family, architecture.texts
    if family == "sd1":
        return {CLIP + "text_model.embeddings.position_ids": (1, 77), **weight_shapes(architecture)}
    if family == "sd2":
        architecture = replace(architecture, texts=(replace(first, layers=first.layers + 1),))
    prefixes = {CLIP: "cond_stage_model.model."}
    if family == "sdxl":
        prefixes = {CLIP: "conditioner.embedders.0.transformer.", CLIP_2: "conditioner.embedders.1.model."}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weight_shapes(architecture).items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        stored = name.replace(prefix, prefixes[prefix], 1) if prefix else name
        if prefix and ".model." in prefixes[prefix]:
            for theirs, ours in _OPEN_CLIP.items():
                stored = stored.replace(theirs, ours, 1)
            if joined := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", stored):
                if joined[2] == "q":
                    shapes[f"{joined[1]}.attn.in_proj_{joined[3]}"] = (3 * shape[0], *shape[1:])
                continue
        shapes[stored] = shape
    if family == "sdxl":
        shapes["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = (1, 77)
        shapes["conditioner.embedders.1.model.logit_scale"] = ()
    return shapes


def random_weight(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Float16 values that keep activations near unit size: 1 for norm weights, 0 for biases, normal over the fan-in
    otherwise.
    """
    if len(shape) == 1:
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float16)
    deviation = 0.02 if "embedding" in name else 1.0 / math.sqrt(math.prod(shape[1:]))
    return (generator.standard_normal(shape, np.float32) * np.float32(deviation)).astype(np.float16)


def write_stream(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write tensors one at a time; integers are int64, everything else float16."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        code, item = ("I64", 8) if name.endswith(POSITION_IDS) else ("F16", 2)
        header[name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [offset, offset := offset + math.prod(shape) * item],
        }
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(tensor.tobytes())


def write_checkpoint(path: Path, seed: int = 0, architecture: Architecture = SD15) -> None:
    """A checkpoint in the layout of v1-5-pruned-emaonly, v2-1_768-ema-pruned or sd_xl_base_1.0."""
    shapes = stored_shapes(architecture)
    generator = np.random.default_rng(seed)

    def tensors() -> Iterator[np.ndarray]:
        for name, shape in shapes.items():
            ids = name.endswith(POSITION_IDS)
            yield np.arange(77, dtype=np.int64)[None] if ids else random_weight(name, shape, generator)

    metadata = {
        "modelspec.resolution": "{}x{}".format(*architecture.size),
        "modelspec.title": f"random weights, {architecture.family} layout",
    }
    if architecture.prediction == "v":
        metadata["modelspec.prediction_type"] = "v"
    write_stream(path, shapes, tensors(), metadata)


def write_lora(path: Path, rank: int = 32, seed: int = 1, architecture: Architecture = SD15) -> None:
    """A kohya LoRA over every attention and feed-forward layer of the UNet and the text encoders, as trainers make by
    default.
    """
    texts = {CLIP: "lora_te1_", CLIP_2: "lora_te2_"} if len(architecture.texts) > 1 else {CLIP: "lora_te_"}
    base = {"sd1": "sd_v1", "sd2": "sd_v2_768_v", "sdxl": "sdxl_base_v1-0"}[architecture.family]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weight_shapes(architecture).items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and name.startswith(UNET) and "transformer_blocks" in name:
            key = "lora_unet_" + diffusers_module(module[len(UNET) :], architecture.unet).replace(".", "_")
        elif len(shape) == 2 and name.startswith(tuple(texts)) and "encoder.layers" in name:
            prefix = next(prefix for prefix in texts if name.startswith(prefix))
            key = texts[prefix] + module[len(prefix) :].replace(".", "_")
        else:
            continue
        shapes |= {
            f"{key}.alpha": (),
            f"{key}.lora_down.weight": (rank, shape[1]),
            f"{key}.lora_up.weight": (shape[0], rank),
        }
    generator = np.random.default_rng(seed)

    def tensors() -> Iterator[np.ndarray]:
        for name, shape in shapes.items():
            yield (
                np.array(rank / 2, np.float16)
                if name.endswith("alpha")
                else random_weight(name, shape, generator) * np.float16(0.1)
            )

    write_stream(
        path,
        shapes,
        tensors(),
        {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_base_model_version": base},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--family", choices=tuple(ARCHITECTURES), default="sd15")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=Path, help="also write a LoRA here")
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    architecture = ARCHITECTURES[arguments.family]
    write_checkpoint(arguments.output, arguments.seed, architecture)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
    if arguments.lora:
        write_lora(arguments.lora, arguments.rank, architecture=architecture)
        print(f"{arguments.lora}: {arguments.lora.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
