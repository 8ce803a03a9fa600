"""Bundles side by side: the same prompts and seeds through each, one row of pictures a bundle. Needs no PyTorch.

Usage: python examples/emoji/compare.py OUTPUT.png BUNDLE.sdrt [BUNDLE.sdrt ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sdrt.runtime import Pipeline

PROMPTS = ("red apple", "cat face", "teddy bear", "rocket", "hamburger", "octopus", "robot", "unicorn")
ENLARGE = 2


def row(bundle: Path) -> np.ndarray:
    """One picture a prompt, prompt i with seed i, joined along the width: uint8 `[H, 8 * W, 3]`."""
    with Pipeline.load(bundle) as pipe:
        return np.concatenate([pipe(prompt, cfg=3, seed=seed).images[0] for seed, prompt in enumerate(PROMPTS)], axis=1)


def main() -> None:
    output, *bundles = (Path(argument) for argument in sys.argv[1:])
    grid = Image.fromarray(np.concatenate([row(bundle) for bundle in bundles]))
    grid.resize((grid.width * ENLARGE, grid.height * ENLARGE), Image.Resampling.LANCZOS).save(output)
    print(output)


if __name__ == "__main__":
    main()
