"""What some networks are told beside timestep and context, as one vector: the pooled numbers of a prompt, and sizes in
pixels (Podell et al. 2023, "SDXL", section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdrt.runtime.engine import Float

_PERIOD = 10_000.0


def size_numbers(sizes: Sequence[int], width: int) -> Float:
    """Each size as `width` numbers, `[len(sizes) * width]`: cosines and then sines of ever lower frequency, as a
    timestep is told.
    """
    half = width // 2
    frequencies = np.exp(-np.log(_PERIOD) * np.arange(half) / half)
    angles = np.array(sizes, np.float64).reshape(-1, 1) * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).ravel().astype(np.float32)
