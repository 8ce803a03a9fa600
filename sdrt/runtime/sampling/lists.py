"""Lists of timesteps or of noise levels that take the place of a schedule: what a valid one is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError
from sdrt.runtime.sampling.schedule import MAX_STEPS, Sigmas

LEAST_FALL = 1e-4
"""How much lower than the level before, relative to it, a sigma must be. Multistep samplers divide by the distance."""
_BEYOND = 1.01
"""Lists are printed with rounded ends: the first sigma may lie this much above the model's largest."""
_BELOW = 0.5


def listed_timesteps(values: Sequence[int], diffusion: Diffusion) -> tuple[int, ...]:
    """The timesteps as plain numbers: whole, falling, of the model's training.

    Raises:
        UsageError: they are not.
    """
    timesteps = tuple(int(t) for t in _numbers("timesteps", values, Integral, "whole numbers", MAX_STEPS))
    last = diffusion.num_timesteps - 1
    for t in timesteps:
        if not 0 <= t <= last:
            raise UsageError(f"timesteps: {t}: expected {last} to 0, those of the model's training")
    _check_falling("timesteps", timesteps, 0.0)
    return timesteps


def listed_sigmas(values: Sequence[float], training: Sigmas) -> tuple[float, ...]:
    """The noise levels as plain numbers: falling from within the model's training, and 0 at the end.

    Raises:
        UsageError: they are not.
    """
    sigmas = tuple(float(sigma) for sigma in _numbers("sigmas", values, Real, "numbers", MAX_STEPS + 1))
    if len(sigmas) < 2 or sigmas[-1] != 0:
        raise UsageError(f"sigmas: the last is {sigmas[-1]:g}", "Let one or more of them lead down to 0.")
    for sigma in sigmas[:-1]:
        if not training[0] * _BELOW <= sigma <= training[-1] * _BEYOND:
            raise UsageError(
                f"sigmas: {sigma:g}: expected {training[-1]:.6g} to {training[0]:.4g}, those of the model's training,"
                " and 0 at the end alone"
            )
    _check_falling("sigmas", sigmas, LEAST_FALL)
    return sigmas


def _numbers(name: str, values: Sequence[Any], kind: type, what: str, most: int) -> Sequence[Any]:
    if not isinstance(values, (list, tuple)):
        raise UsageError(f"{name}: expected a list, found {type(values).__name__}")
    if not 1 <= len(values) <= most:
        raise UsageError(f"{name}: {len(values)} of them: expected 1 to {most}")
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{name}: {value!r}: expected {what}")
    return values


def _check_falling(name: str, numbers: Sequence[float], least: float) -> None:
    for one, below in pairwise(numbers):
        if below == one:
            raise UsageError(f"{name}: {one:g} is given twice", "Give each once: a step needs two different levels.")
        if below > one:
            raise UsageError(f"{name}: {one:g}, {below:g}: they rise", "Give them falling, the most noise first.")
        if below > one * (1 - least):
            raise UsageError(f"{name}: {one:g}, {below:g}: too close", "Leave one of them out.")
