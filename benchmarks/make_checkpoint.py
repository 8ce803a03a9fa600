"""Make a random-weight checkpoint in the exact layout and size of Stable Diffusion 1.5, and a LoRA for it.

Latency and memory do not depend on the values, so this stands in for a real model where none may be shipped: 2.1 GB of
float16, written in a stream, the same bytes for the same seed. `--tiny` makes the same topology small enough for CI: 30
MB, 64x64 pixels.
Usage: python benchmarks/make_checkpoint.py OUTPUT.safetensors [--tiny] [--seed N] [--lora FILE --rank R]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sdrt.export.architecture import Architecture, ClipSpec, UNetSpec, VaeSpec
from sdrt.export.families.keys import diffusers_module
from sdrt.export.families.sd1 import CLIP, UNET
from sdrt.export.graph import recipes

DOWN, UP = ((1, 1), (1, 1), (1, 1), (0, 0)), ((1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0))
SD15 = Architecture(
    "sd1",
    "epsilon",
    (512, 512),
    (ClipSpec(width=768, layers=12, heads=12, mlp_width=3072, vocabulary=49408, tokens=77),),
    UNetSpec(4, 4, (320, 640, 1280, 1280), DOWN, UP, 1, 768, False, 8, None),
    VaeSpec((128, 256, 512, 512), 2, 4, 0.18215),
)
TINY = Architecture(
    "sd1",
    "epsilon",
    (64, 64),
    (ClipSpec(width=64, layers=2, heads=1, mlp_width=256, vocabulary=49408, tokens=77),),
    UNetSpec(4, 4, (64, 96, 128, 128), DOWN, UP, 1, 64, False, 8, None),
    VaeSpec((32, 32, 64, 64), 2, 4, 0.18215),
)
POSITION_IDS = CLIP + "text_model.embeddings.position_ids"


def weight_shapes(architecture: Architecture = SD15) -> dict[str, tuple[int, ...]]:
    """Every weight of an architecture by its checkpoint name."""
    return {name: shape for recipe in recipes(architecture).values() for name, shape in recipe.weight_shapes().items()}


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
        code, item = ("I64", 8) if name == POSITION_IDS else ("F16", 2)
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
    """A checkpoint in the layout of v1-5-pruned-emaonly.safetensors."""
    shapes = {POSITION_IDS: (1, 77), **weight_shapes(architecture)}
    generator = np.random.default_rng(seed)

    def tensors() -> Iterator[np.ndarray]:
        for name, shape in shapes.items():
            yield np.arange(77, dtype=np.int64)[None] if name == POSITION_IDS else random_weight(name, shape, generator)

    resolution = "{}x{}".format(*architecture.size)
    write_stream(
        path,
        shapes,
        tensors(),
        {"modelspec.resolution": resolution, "modelspec.title": "random weights, SD 1.5 layout"},
    )


def write_lora(path: Path, rank: int = 32, seed: int = 1, architecture: Architecture = SD15) -> None:
    """A kohya LoRA over every attention and feed-forward layer of the UNet and the text encoder, as trainers make by
    default.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weight_shapes(architecture).items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and name.startswith(UNET) and "transformer_blocks" in name:
            key = "lora_unet_" + diffusers_module(module[len(UNET) :], architecture.unet).replace(".", "_")
        elif len(shape) == 2 and name.startswith(CLIP) and "encoder.layers" in name:
            key = "lora_te_" + module[len(CLIP) :].replace(".", "_")
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
        {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_base_model_version": "sd_v1"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="the topology of SD 1.5 at a hundredth of its size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=Path, help="also write a LoRA here")
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    architecture = TINY if arguments.tiny else SD15
    write_checkpoint(arguments.output, arguments.seed, architecture)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
    if arguments.lora:
        write_lora(arguments.lora, arguments.rank, architecture=architecture)
        print(f"{arguments.lora}: {arguments.lora.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
