"""Stores the large tensors of a checkpoint in 8 bits: token tables, matrices and the UNet's convolutions as F8_E4M3
with a `.scale_weight` beside each. Norms, biases, the UNet's first and last layer and the VAE stay as they are.

Usage: python examples/emoji/to_eight_bits.py CHECKPOINT.safetensors OUTPUT.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from sdrt.files.publish import staged_file, write_file

LARGEST = torch.finfo(torch.float8_e4m3fn).max
NARROWEST = 5
"""Channels in and out below which a convolution stays: those from and to the latents."""


def shrinks(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor goes into 8 bits."""
    convolution = tensor.dim() == 4 and "diffusion_model." in name and min(tensor.shape[:2]) >= NARROWEST
    return name.endswith(".weight") and (tensor.dim() == 2 or convolution)


def main(source: Path, output: Path) -> None:
    tensors = dict[str, torch.Tensor]()
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            tensor = file.get_tensor(name)
            if shrinks(name, tensor):
                scale = tensor.float().abs().max() / LARGEST
                tensors[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
                tensors[name.removesuffix(".weight") + ".scale_weight"] = scale
            else:
                tensors[name] = tensor
    with staged_file(output) as stage:
        write_file(stage, memoryview(save(tensors, metadata=metadata)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
