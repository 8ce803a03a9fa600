"""Bundles side by side: the same prompts and seeds through each, one row of pictures a bundle. Needs no PyTorch.

Usage: python examples/emoji/compare.py OUTPUT.png BUNDLE.sdrt [BUNDLE.sdrt ...] [--prompt TEXT]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from sdrt.runtime import Pipeline

PROMPTS = ("red apple", "cat face", "teddy bear", "rocket", "hamburger", "octopus", "robot", "unicorn")
ENLARGE = 2


def row(bundle: Path, prompts: tuple[str, ...]) -> np.ndarray:
    """One picture a prompt, prompt i with seed i, joined along the width: uint8 `[H, prompts * W, 3]`."""
    with Pipeline.load(bundle) as pipe:
        return np.concatenate(
            [pipe(prompt, cfg=3, seed=seed, compat="diffusers").images[0] for seed, prompt in enumerate(prompts)],
            axis=1,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--prompt", help="one prompt for all pictures of a row, in place of eight")
    options = parser.parse_args()
    prompts = PROMPTS if options.prompt is None else (options.prompt,) * len(PROMPTS)
    grid = Image.fromarray(np.concatenate([row(bundle, prompts) for bundle in options.bundles]))
    grid.resize((grid.width * ENLARGE, grid.height * ENLARGE), Image.Resampling.LANCZOS).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
