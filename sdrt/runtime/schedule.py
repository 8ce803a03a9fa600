"""Noise schedules: which noise levels sigma a picture passes through, in float64.

sigma is the variance-exploding level of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models":
latents at timestep t are (image + sigma noise) / sqrt(1 + sigma^2).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import Diffusion
from sdrt.errors import UsageError

MAX_STEPS = 1000

Sigmas = NDArray[np.float64]


def training_sigmas(diffusion: Diffusion) -> Sigmas:
    """sigma at every training timestep, `[num_timesteps]`, rising. The betas are linear in their square roots (LDM's "scaled linear")."""
    betas = np.linspace(diffusion.beta_start**0.5, diffusion.beta_end**0.5, diffusion.num_timesteps, dtype=np.float64) ** 2
    alphas_cumprod = np.cumprod(1.0 - betas)
    return np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)


def timestep(sigma: float, training: Sigmas) -> float:
    """The fractional timestep of a noise level, linear in log sigma between neighbours, clamped to the training range (k-diffusion)."""
    return float(np.interp(np.log(sigma), np.log(training), np.arange(len(training))))


def discrete(steps: int, training: Sigmas) -> list[float]:
    """Timesteps evenly spaced from the last to 0, log sigma interpolated between neighbours, then 0 (k-diffusion's `get_sigmas`)."""
    t = np.linspace(len(training) - 1, 0, steps)
    return [*np.exp(np.interp(t, np.arange(len(training)), np.log(training))).tolist(), 0.0]


def karras(steps: int, training: Sigmas, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5, between the model's smallest and largest sigma, then 0."""
    low, high = training[0] ** (1 / rho), training[-1] ** (1 / rho)
    return [*((high + np.linspace(0, 1, steps) * (low - high)) ** rho).tolist(), 0.0]


def leading(steps: int, training: Sigmas) -> list[float]:
    """diffusers' "leading" spacing with steps_offset 1, ending at the first training sigma instead of 0 (`set_alpha_to_one=False`).

    Raises:
        UsageError: so many steps that the offset leaves the training range.
    """
    ratio = len(training) // steps
    if (steps - 1) * ratio + 1 >= len(training):
        raise UsageError(f"steps {steps}: schedule leading takes at most {len(training) - 1}")
    return [*training[(np.arange(steps) * ratio)[::-1] + 1].tolist(), float(training[0])]


SCHEDULES: dict[str, Callable[[int, Sigmas], list[float]]] = {"discrete": discrete, "karras": karras, "leading": leading}
