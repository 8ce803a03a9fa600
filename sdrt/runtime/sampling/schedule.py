"""Noise schedules: the noise levels sigma that a picture passes through, in float64.

sigma is the variance-exploding level of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
Models": latents at timestep t are (image + sigma noise) / sqrt(1 + sigma^2). SCHEDULES are AUTOMATIC1111's, formulas
over the levels of training. SPACINGS are diffusers', lists of timesteps. `levels.py` turns them into the levels of a
sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.manifest import Diffusion
from sdrt.errors import BundleError, UsageError

MAX_STEPS = 1000

Sigmas = NDArray[np.float64]
"""Noise levels of training by timestep, `[num_timesteps]`, rising."""


LEAST_ALPHA_BAR = 1e-16
"""Stands for a cumulative alpha of 0, so that sigma stays finite: 1e8. What it leaves of the image is far below what
float32 can tell apart.
"""


def training_sigmas(diffusion: Diffusion, terminal: float = 0.0) -> Sigmas:
    """sigma at every training timestep. The betas are linear in their square roots (LDM's "scaled linear").

    For zero terminal SNR they are rescaled so that the last timestep has no signal (Lin et al. 2023, "Common Diffusion
    Noise Schedules", algorithm 1). `terminal` is the cumulative alpha that a tool puts in the place of that 0.

    A network trained on every level has none of its own: its levels are evenly spaced in log sigma, as ComfyUI takes
    them.

    Raises:
        BundleError: the levels do not rise, or are infinite.
    """
    if diffusion.sigma_min is not None and diffusion.sigma_max is not None:
        return np.geomspace(diffusion.sigma_min, diffusion.sigma_max, diffusion.num_timesteps)
    betas = (
        np.linspace(diffusion.beta_start**0.5, diffusion.beta_end**0.5, diffusion.num_timesteps, dtype=np.float64) ** 2
    )
    alphas_cumprod = np.cumprod(1.0 - betas)
    if diffusion.zero_snr:
        root = np.sqrt(alphas_cumprod)
        alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas_cumprod[-1] = max(terminal, LEAST_ALPHA_BAR)
    with np.errstate(divide="ignore", over="ignore"):
        sigmas = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
    if not (np.isfinite(sigmas).all() and (np.diff(sigmas) > 0).all()):
        raise BundleError(
            f"diffusion: betas from {diffusion.beta_start} to {diffusion.beta_end} over {diffusion.num_timesteps}"
            " timesteps: their noise levels do not rise, or end in no signal at all",
            "Build the bundle again.",
        )
    return sigmas


def told_timestep(sigma: float, training: Sigmas, diffusion: Diffusion) -> float:
    """The timestep that the network is told at a noise level: fractional, or ln(sigma) / 4 for a network trained on
    every level (Karras et al. 2022, table 1).
    """
    return timestep(sigma, training) if diffusion.sigma_max is None else math.log(sigma) / 4


def timestep(sigma: float, training: Sigmas) -> float:
    """The fractional timestep of a noise level, linear in log sigma between neighbours, clamped to the training range
    (k-diffusion).
    """
    return float(np.interp(np.log(sigma), np.log(training), np.arange(len(training))))


def sigmas_at(t: NDArray[np.float64], training: Sigmas) -> list[float]:
    """The noise levels of fractional timesteps: the reverse of `timestep`."""
    return [float(sigma) for sigma in np.exp(np.interp(t, np.arange(len(training)), np.log(training)))]


def normal(steps: int, training: Sigmas) -> list[float]:
    """Timesteps evenly spaced from the last to 0, log sigma interpolated between neighbours, then 0 (k-diffusion's
    `get_sigmas`).
    """
    return [*sigmas_at(np.linspace(len(training) - 1, 0, steps), training), 0.0]


def karras(steps: int, training: Sigmas, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5, between the model's smallest and largest sigma, then 0."""
    low, high = training[0] ** (1 / rho), training[-1] ** (1 / rho)
    return [*((high + np.linspace(0, 1, steps) * (low - high)) ** rho).tolist(), 0.0]


def exponential(steps: int, training: Sigmas) -> list[float]:
    """Evenly spaced in log sigma between the model's largest and smallest, then 0 (k-diffusion's
    `get_sigmas_exponential`).
    """
    return [*np.exp(np.linspace(math.log(training[-1]), math.log(training[0]), steps)).tolist(), 0.0]


def sgm_uniform(steps: int, training: Sigmas) -> list[float]:
    """Timesteps evenly spaced as for one step more. The last of them, timestep 0, is replaced by sigma 0 (Stability's
    generative-models).
    """
    return [*sigmas_at(np.linspace(len(training) - 1, 0, steps + 1)[:-1], training), 0.0]


def simple(steps: int, training: Sigmas) -> list[float]:
    """Every (n / steps)-th training level counted from the largest, rounded down, then 0 (ComfyUI's "simple")."""
    stride = len(training) / steps
    return [*(float(training[-(1 + int(i * stride))]) for i in range(steps)), 0.0]


def ddim_uniform(steps: int, training: Sigmas) -> list[float]:
    """Every (n // steps)-th training level from timestep 1 up, reversed, then 0. There are more than `steps` where n /
    steps is not whole.
    """
    return [*training[1 :: max(len(training) // steps, 1)][::-1].tolist(), 0.0]


SCHEDULES: dict[str, Callable[[int, Sigmas], list[float]]] = {
    "normal": normal,
    "karras": karras,
    "exponential": exponential,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "ddim_uniform": ddim_uniform,
}

SPACINGS = ("linspace", "leading", "trailing")
"""diffusers' `timestep_spacing`, after table 2 of Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps
Are Flawed".
"""

ALIASES = {
    "automatic": None,
    "discrete": "normal",
    "uniform": "normal",
    "sgm uniform": "sgm_uniform",
    "ddim uniform": "ddim_uniform",
    "ddim": "ddim_uniform",
}
"""Other spellings of schedules; None is the sampler's own."""


def spaced(spacing: str, steps: int, count: int, *, extra: int = 0) -> NDArray[np.float64]:
    """Falling timesteps `[steps]` out of `count`, as diffusers spaces them, not rounded. `steps_offset` is 1, as in
    Stable Diffusion's own configuration.

    `extra` is 1 for the multistep solvers: they space as for one step more and drop the last timestep, except with
    "trailing". It is 0 for all others.

    Raises:
        UsageError: so many steps that the offset leaves the training range.
    """
    timesteps: NDArray[np.float64]
    if spacing == "linspace":
        timesteps = np.linspace(0, count - 1, steps + extra)[::-1]
    elif spacing == "trailing":
        timesteps = np.asarray(
            np.arange(count, 0, -count / steps).round() - 1, np.float64
        )  # for 61 steps and some others, rounding makes one too many
    else:
        ratio = count // (steps + extra)
        timesteps = np.arange(steps + extra, dtype=np.float64)[::-1] * ratio + 1
        if ratio == 0 or timesteps[0] >= count:
            raise UsageError(
                f"steps {steps}: schedule leading takes at most {count - 1 - extra}",
                "Take fewer steps, or --schedule trailing.",
            )
    return timesteps[:steps]
