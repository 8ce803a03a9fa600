"""The noise levels a sampler passes through in each tool, and the timestep the network is told at each.

An image skips the first levels. This file counts them as AUTOMATIC1111 (`t_enc`) and as diffusers (`int(steps *
strength)`) do. It also has their roundings, and the levels at which they start and end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError
from sdrt.runtime.sampling.schedule import (
    SCHEDULES,
    SPACINGS,
    Sigmas,
    exponential,
    karras,
    sigmas_at,
    spaced,
    timestep,
    told_timestep,
)

ALMOST_ONE = 0.999
"""AUTOMATIC1111 limits strength to this."""

LCM_STEPS = 50
"""How many levels consistency models are distilled at (`original_inference_steps`)."""


@dataclass(frozen=True)
class Request:
    """What was asked for. `strength` is None from text.

    At most one of two lists takes the place of the schedule, `steps` being its number of steps: `timesteps` `[steps]`,
    falling; or `sigmas` `[steps + 1]`, falling to 0. A sampler gets only a list that its recipe takes.
    """

    schedule: str
    steps: int
    training: Sigmas
    strength: float | None = None
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    diffusion: Diffusion = field(default_factory=Diffusion)

    def told(self, sigma: float) -> float:
        """The timestep that the network is told at a level of no list."""
        return told_timestep(sigma, self.training, self.diffusion)


@dataclass(frozen=True)
class Levels:
    """The levels of one picture of n steps.

    sigmas: `[n + 1]`; the picture ends at the last one.
    timesteps: `[n]`; what the network is told at each level but the last.
    noise_scale: from text, the first latents are unit noise times this.
    start: from an image, the first latents are the image plus noise of this level.
    jumps: per call of a timestep sampler, the levels the call goes from and to. Empty where these are neighbours in
        `sigmas`.
    brownian: the smallest and the largest sigma of the whole schedule, levels that an image skips included.
    skipped: the levels of the schedule that an image skips.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    start: float
    noise_scale: float
    brownian: tuple[float, float]
    jumps: tuple[tuple[float, float], ...] = ()
    skipped: tuple[float, ...] = ()

    def steps(self) -> list[tuple[float, float]]:
        """For each step the level it goes from and the level it goes to."""
        return list(self.jumps or pairwise(self.sigmas))


def _levels(sigmas: list[float], timesteps: list[float], noise_scale: float) -> Levels:
    positive = [sigma for sigma in sigmas if sigma > 0]
    return Levels(tuple(sigmas), tuple(timesteps), sigmas[0], noise_scale, (min(positive), max(positive)))


def _without(levels: Levels, first: int) -> Levels:
    """The levels without the first `first` ones, for a picture that starts from an image.

    Raises:
        UsageError: no level is left.
    """
    if first >= len(levels.timesteps):
        raise UsageError(f"strength: leaves no step of {len(levels.timesteps)}", "Take more strength, or more steps.")
    return replace(
        levels,
        sigmas=levels.sigmas[first:],
        timesteps=levels.timesteps[first:],
        start=levels.sigmas[first],
        jumps=levels.jumps[first:],
        skipped=levels.sigmas[:first],
    )


def a1111_left(request: Request) -> int | None:
    """AUTOMATIC1111's t_enc: an image is left t_enc + 1 of the steps (`setup_img2img_steps`). None from text."""
    return None if request.strength is None else int(min(request.strength, ALMOST_ONE) * request.steps)


def a1111_levels(request: Request, *, discard: bool = False) -> Levels:
    """Levels of k-diffusion's samplers: fractional timesteps. `discard` asks for one level more and drops the one
    before the last, which is sigma 0. It does not touch a list.
    """
    return _a1111(request, request.training, discard, request.told)


def a1111_lcm_levels(request: Request) -> Levels:
    """Levels of AUTOMATIC1111's LCM: schedules over the 50 levels of distillation. The network is told the timestep of
    the nearest of them, or that of the list.
    """
    k = max(1, len(request.training) // LCM_STEPS)
    trained = request.training[k - 1 :: k]
    return _a1111(
        request, trained, False, lambda sigma: float(np.abs(math.log(sigma) - np.log(trained)).argmin() * k + k - 1)
    )


def _a1111(request: Request, table: Sigmas, discard: bool, told: Callable[[float], float]) -> Levels:
    steps, t_enc = request.steps, a1111_left(request)
    if request.sigmas is not None:
        sigmas = list(request.sigmas)
    elif request.timesteps is not None:
        sigmas = [*sigmas_at(np.array(request.timesteps, np.float64), request.training), 0.0]
    else:
        sigmas = SCHEDULES[request.schedule](steps + discard, table)
    if len(set(sigmas)) < len(sigmas):
        raise UsageError(
            f"steps {request.steps}: schedule {request.schedule} has only {len(set(sigmas)) - 1} levels for this"
            " sampler",
            "Take fewer steps.",
        )
    if discard and request.sigmas is None and request.timesteps is None:
        del sigmas[-2]
    timesteps = (
        [told(sigma) for sigma in sigmas[:-1]] if request.timesteps is None else [*map(float, request.timesteps)]
    )
    levels = _levels(sigmas, timesteps, sigmas[0])
    return levels if t_enc is None else _without(levels, steps - t_enc - 1)


def a1111_timesteps(steps: int, count: int) -> list[int]:
    """AUTOMATIC1111's timesteps of DDIM, PLMS and UniPC, rising. There are more than `steps` where count / steps is not
    whole.
    """
    return [min(t + 1, count - 1) for t in range(0, count, count // steps)]


def a1111_ddim_levels(request: Request, *, improved: bool = False) -> Levels:
    """Levels of AUTOMATIC1111's DDIM and PLMS. They end at timestep 1, so n timesteps make n - 1 steps.

    From an image, the noise is that of timestep t_enc, but the network is told the timestep below at the first call.
    `improved` adds the second call of PLMS's first step.

    Raises:
        UsageError: no step is left.
    """
    steps, t_enc = request.steps, a1111_left(request)
    ts = a1111_timesteps(steps, len(request.training))
    used = ts if t_enc is None else ts[:t_enc]
    if len(used) < 2:
        raise UsageError(
            f"steps {request.steps}"
            + ("" if t_enc is None else f", strength {request.strength}")
            + ": leaves nothing to do for this sampler as AUTOMATIC1111 counts",
            "Take more steps, another sampler, or --compat diffusers.",
        )
    start = float(request.training[ts[-1] if t_enc is None else ts[t_enc]])
    falling = used[::-1]
    sigmas = [float(sigma) for sigma in request.training[falling]]
    jumps = list(pairwise(sigmas))
    calls = list(zip(falling, jumps, strict=False))
    if improved:
        calls.insert(1, (falling[1], jumps[0]))
    told = [t for t, _ in calls]
    at = [float(sigma) for sigma in request.training[told]]
    return Levels(
        (*at, sigmas[-1]),
        tuple(map(float, told)),
        start,
        math.hypot(1, start),
        (sigmas[-1], sigmas[0]),
        tuple(jump for _, jump in calls),
    )


def a1111_unipc_levels(request: Request) -> Levels:
    """Levels of AUTOMATIC1111's UniPC: fractional timesteps evenly spaced down to 0. log alpha is interpolated between
    neighbours.

    Raises:
        UsageError: no step is left.
    """
    steps, t_enc = request.steps, a1111_left(request)
    ts = a1111_timesteps(steps, len(request.training))
    if t_enc == 0:
        raise UsageError(
            f"steps {request.steps}, strength {request.strength}: leaves nothing to do for unipc",
            "Take more steps or more strength.",
        )
    first, count = (len(request.training) - 1, len(ts)) if t_enc is None else (ts[t_enc - 1], t_enc)
    t = np.linspace(first, 0, count + 1)
    log_alpha = -0.5 * np.log1p(request.training**2)
    alpha = np.exp(np.interp(t, np.arange(len(log_alpha)), log_alpha))
    sigmas = [float(sigma) for sigma in np.sqrt(1 - alpha**2) / alpha]
    levels = _levels(sigmas, t[:-1].tolist(), math.hypot(1, sigmas[0]))
    return levels if t_enc is None else replace(levels, start=float(request.training[ts[t_enc]]))


# diffusers. Its sampling starts at the level of the schedule's first timestep. `order` is how many model calls a step
# takes; diffusers counts in calls.


def diffusers_first(request: Request, count: int) -> int:
    """How many of `count` steps diffusers skips for an image (`get_timesteps`).

    Raises:
        UsageError: all steps would be skipped.
    """
    if request.strength is None:
        return 0
    left = min(int(request.steps * request.strength), request.steps)
    if left < 1:
        raise UsageError(
            f"steps {request.steps}, strength {request.strength}: leaves no step", "Take more steps or more strength."
        )
    return count - left


def _listed(request: Request) -> NDArray[np.float64]:
    """The timesteps asked for, `[steps]`."""
    return np.array(request.timesteps, np.float64)


def _interpolated(timesteps: NDArray[np.float64], training: Sigmas) -> list[float]:
    return [float(sigma) for sigma in np.interp(timesteps, np.arange(len(training)), training)]


def diffusers_levels(request: Request, *, rounded: bool = False) -> Levels:
    """Levels of diffusers' k-diffusion schedulers: sigma itself interpolated at fractional timesteps, then 0.

    `rounded` rounds the timesteps of the karras schedule, as KDPM2 does.
    """
    training, steps = request.training, request.steps
    if request.sigmas is not None:
        sigmas = list(request.sigmas[:-1])
        timesteps = [timestep(sigma, training) for sigma in sigmas]
    elif request.timesteps is not None or request.schedule in SPACINGS:
        t = _listed(request) if request.timesteps is not None else spaced(request.schedule, steps, len(training))
        sigmas = _interpolated(t, training)
        timesteps = t.tolist()
    else:
        # Both span the levels of the linspace spacing. For one step that spacing holds the smallest level only.
        sigmas = {"karras": karras, "exponential": exponential}[request.schedule](
            steps, training if steps > 1 else training[:1]
        )[:-1]
        timesteps = [timestep(sigma, training) for sigma in sigmas]
        if rounded and request.schedule == "karras":
            timesteps = [float(round(t)) for t in timesteps]
    leading = request.schedule == "leading" and request.timesteps is None and request.sigmas is None
    scale = math.hypot(1, max(sigmas)) if leading else max(sigmas)
    return _without(_levels([*sigmas, 0.0], timesteps, scale), diffusers_first(request, steps))


def diffusers_edm_levels(request: Request) -> Levels:
    """Levels of diffusers' EDM schedulers, for a network trained on every level between two sigmas, then 0. From text
    the first latents have the deviation that an image of unit variance has at the largest level.
    """
    training, steps = request.training, request.steps
    if request.sigmas is not None:
        sigmas = list(request.sigmas[:-1])
    elif request.schedule == "karras":
        sigmas = karras(steps, training)[:-1]
    else:  # its exponential schedule of one step has the smallest level only
        sigmas = exponential(steps, training if steps > 1 else training[:1])[:-1]
    levels = _levels([*sigmas, 0.0], [request.told(sigma) for sigma in sigmas], math.hypot(1, training[-1]))
    return _without(levels, diffusers_first(request, steps))


def diffusers_multistep_levels(request: Request) -> Levels:
    """Levels of diffusers' multistep solvers: whole timesteps, spaced as for one step more, then sigma 0. The start is
    unit noise.

    Raises:
        UsageError: so many steps that a timestep would repeat; diffusers divides by zero there.
    """
    training, steps = request.training, request.steps
    if request.timesteps is not None or request.schedule in SPACINGS:
        t = (
            _listed(request)
            if request.timesteps is not None
            else spaced(request.schedule, steps, len(training), extra=request.schedule != "trailing").round()
        )
        sigmas = _interpolated(t, training)
        if len(set(sigmas)) < steps:
            raise UsageError(
                f"steps {steps}: schedule linspace takes at most {len(training) - 1} for this sampler",
                "Take fewer steps, or --schedule trailing.",
            )
    else:
        sigmas = {"karras": karras, "exponential": exponential}[request.schedule](steps, training)[:-1]
        told = np.array([timestep(sigma, training) for sigma in sigmas])
        t = told.round() if request.schedule == "karras" else np.trunc(told)
    return _without(_levels([*sigmas, 0.0], t.tolist(), math.hypot(1, sigmas[0])), diffusers_first(request, steps))


def diffusers_timestep_levels(
    request: Request, *, improved: bool = False, strided: bool = True, final: Literal["first", "zero"] = "first"
) -> Levels:
    """Levels of diffusers' DDIM, PNDM and DDPM: whole timesteps. A `strided` step always goes down by count // steps
    timesteps, wherever the next timestep is.

    `final` is the level below timestep 0: that of timestep 0 (`set_alpha_to_one=False`, as in Stable Diffusion's own
    configuration), or zero. `improved` adds the second call of PNDM's first step, and the step back that belongs to it.
    """
    training, steps = request.training, request.steps
    if request.timesteps is not None:
        whole = list(request.timesteps)
    else:
        whole = [int(t) for t in spaced(request.schedule, steps, len(training)).round()]
    ratio = len(training) // steps
    if improved and steps > 1:
        whole.insert(1, whole[1])

    def level(t: int) -> float:
        if t >= 0:
            return float(training[t])
        return float(training[0]) if final == "first" else 0.0

    whole = whole[diffusers_first(request, steps) :]
    sigmas = [level(t) for t in whole]
    if not strided:
        jumps = list(pairwise([*sigmas, level(-1)]))
    else:
        jumps = [
            (level(t + ratio), level(t)) if improved and i == 1 else (level(t), level(t - ratio))
            for i, t in enumerate(whole)
        ]
    last = jumps[-1][1]
    return Levels(
        (*sigmas, last),
        tuple(map(float, whole)),
        sigmas[0],
        math.hypot(1, sigmas[0]),
        (sigmas[-1], sigmas[0]),
        tuple(jumps),
    )


def diffusers_distilled_levels(request: Request) -> Levels:
    """Levels of diffusers' LCM and TCD: some of the 50 whole timesteps of distillation, or those of the list. They end
    at the level of timestep 0.

    Raises:
        UsageError: more steps than there are such timesteps.
    """
    training, steps = request.training, request.steps
    if request.timesteps is None and (steps > LCM_STEPS or len(training) < LCM_STEPS):
        raise UsageError(
            f"steps {steps}: a distilled model's sampler takes at most {LCM_STEPS}, and {LCM_STEPS} timesteps or more"
            " to train",
            "4 to 8 suit most.",
        )
    if request.timesteps is not None:
        t = np.array(request.timesteps)
    else:
        k = len(training) // LCM_STEPS
        trained = (np.arange(1, LCM_STEPS + 1) * k - 1)[::-1]
        t = trained[np.floor(np.linspace(0, LCM_STEPS, steps, endpoint=False)).astype(int)]
    levels = _levels(
        [*training[t].tolist(), float(training[0])], t.astype(float).tolist(), math.hypot(1, training[t[0]])
    )
    return _without(levels, diffusers_first(request, steps))
