"""The registry of samplers, their names, and the rows of a picture: sampler, schedule, steps and strength as numbers
for the step graph.

Samplers themselves are in `sigma_samplers.py` and `timestep_samplers.py`, what they pass through in `levels.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError, nearest, one_of
from sdrt.runtime.sampling import levels as lv
from sdrt.runtime.sampling import sigma_samplers as by_sigma
from sdrt.runtime.sampling import timestep_samplers as by_timestep
from sdrt.runtime.sampling.levels import Levels, Request
from sdrt.runtime.sampling.lists import listed_sigmas, listed_timesteps
from sdrt.runtime.sampling.schedule import ALIASES, MAX_STEPS, SCHEDULES, SPACINGS, training_sigmas
from sdrt.runtime.sampling.trace import Noise, Row, Trace

__all__ = ["COMPATS", "SAMPLERS", "Noise", "Recipe", "Row", "Sampler", "check_list", "parse_sampler", "plan_rows"]

_ORDINARY = Diffusion()

COMPATS = ("a1111", "diffusers")
"""The tools whose numbers are reproduced."""


@dataclass(frozen=True)
class Recipe:
    """How one tool runs a sampler: its levels and the schedules it takes. The first schedule is the default.

    lists: which of "timesteps" and "sigmas" may take the place of a schedule.
    terminal: the cumulative alpha that the tool puts in the place of 0 for zero terminal SNR; None where it has no such
        levels.
    continuous: whether it runs networks trained on every level between two sigmas.
    """

    run: Callable[[Trace, Levels], None]
    levels: Callable[[Request], Levels]
    schedules: tuple[str, ...]
    lists: tuple[str, ...] = ()
    terminal: float | None = None
    continuous: bool = False


@dataclass(frozen=True)
class Sampler:
    """A sampler as users name it. `label` is AUTOMATIC1111's name, `scheduler` the class of diffusers. `diffusers` is
    None where diffusers has no such class. `edm` is diffusers' other class, for networks trained on every level.
    """

    label: str
    about: str
    a1111: Recipe
    diffusers: Recipe | None = None
    scheduler: str | None = None
    edm: Recipe | None = None

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules it takes as AUTOMATIC1111 runs it."""
        return self.a1111.schedules


Run = Callable[[Trace, Levels], None]

_SIGMA_SCHEDULES = tuple(SCHEDULES)
_SIGMA_SPACINGS = (*SPACINGS, "karras", "exponential")
_LEADING = ("leading", "linspace", "trailing")
_BOTH = ("timesteps", "sigmas")

A1111_TERMINAL = 4.8973451890853435e-08
"""Largest sigma 4518.8, in AUTOMATIC1111, Forge and ComfyUI."""
DIFFUSERS_TERMINAL = 2.0**-24
"""Largest sigma 4096."""


def _a1111(run: Run, automatic: str = "normal", *, discard: bool = False) -> Recipe:
    return Recipe(
        run,
        partial(lv.a1111_levels, discard=discard),
        (automatic, *(name for name in _SIGMA_SCHEDULES if name != automatic)),
        _BOTH,
        A1111_TERMINAL,
        continuous=True,
    )


def _diffusers(run: Run, *, rounded: bool = False, terminal: float | None = None) -> Recipe:
    return Recipe(run, partial(lv.diffusers_levels, rounded=rounded), _SIGMA_SPACINGS, _BOTH, terminal)


def _multistep(run: Run) -> Recipe:
    return Recipe(run, lv.diffusers_multistep_levels, _SIGMA_SPACINGS, ("timesteps",), DIFFUSERS_TERMINAL)


def _edm(run: Run) -> Recipe:
    return Recipe(run, lv.diffusers_edm_levels, ("karras", "exponential"), ("sigmas",), continuous=True)


def _distilled(run: Run) -> Recipe:
    return Recipe(run, lv.diffusers_distilled_levels, ("leading",), ("timesteps",), 0.0)


_DDPM = Recipe(
    by_timestep.ddpm,
    partial(lv.diffusers_timestep_levels, strided=False, final="zero"),
    _LEADING,
    ("timesteps",),
    0.0,
)
_TCD = _distilled(by_timestep.tcd)
_DPM2_A = partial(by_sigma.dpm2, noisy=True)

SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(
        "Euler",
        "simple and fast",
        _a1111(by_sigma.euler),
        _diffusers(by_sigma.euler, terminal=DIFFUSERS_TERMINAL),
        "EulerDiscreteScheduler",
        _edm(by_sigma.euler),
    ),
    "euler_a": Sampler(
        "Euler a",
        "fresh noise every step",
        _a1111(by_sigma.euler_a),
        Recipe(by_sigma.euler_a, lv.diffusers_levels, SPACINGS, _BOTH, DIFFUSERS_TERMINAL),
        "EulerAncestralDiscreteScheduler",
    ),
    "heun": Sampler(
        "Heun",
        "second order, two model calls a step",
        _a1111(by_sigma.heun),
        _diffusers(by_sigma.heun),
        "HeunDiscreteScheduler",
    ),
    "lms": Sampler(
        "LMS",
        "linear multistep, fourth order",
        _a1111(by_sigma.lms),
        _diffusers(partial(by_sigma.lms, counts_skipped=True)),
        "LMSDiscreteScheduler",
    ),
    "ddim": Sampler(
        "DDIM",
        "deterministic, whole timesteps",
        Recipe(by_timestep.ddim, lv.a1111_ddim_levels, ("ddim_uniform",), terminal=A1111_TERMINAL),
        Recipe(by_timestep.ddim, lv.diffusers_timestep_levels, _LEADING, terminal=0.0),
        "DDIMScheduler",
    ),
    "ddpm": Sampler("DDPM", "the original, for many steps; not in AUTOMATIC1111", _DDPM, _DDPM, "DDPMScheduler"),
    "plms": Sampler(
        "PLMS",
        "linear multistep on whole timesteps",
        Recipe(
            by_timestep.plms,
            partial(lv.a1111_ddim_levels, improved=True),
            ("ddim_uniform",),
            terminal=A1111_TERMINAL,
        ),
        Recipe(partial(by_timestep.plms, raw=True), partial(lv.diffusers_timestep_levels, improved=True), _LEADING),
        "PNDMScheduler",
    ),
    "dpm2": Sampler(
        "DPM2",
        "midpoint, two model calls a step",
        _a1111(by_sigma.dpm2, "karras", discard=True),
        _diffusers(by_sigma.dpm2, rounded=True),
        "KDPM2DiscreteScheduler",
    ),
    "dpm2_a": Sampler(
        "DPM2 a",
        "DPM2 with fresh noise",
        _a1111(_DPM2_A, "karras", discard=True),
        _diffusers(_DPM2_A, rounded=True),
        "KDPM2AncestralDiscreteScheduler",
    ),
    "dpmpp_2s_a": Sampler("DPM++ 2S a", "two model calls a step, fresh noise", _a1111(by_sigma.dpmpp_2s_a, "karras")),
    "dpmpp_2m": Sampler(
        "DPM++ 2M",
        "second order, one model call a step",
        _a1111(by_sigma.dpmpp_2m, "karras"),
        _multistep(by_sigma.dpmpp_2m),
        "DPMSolverMultistepScheduler",
        _edm(by_sigma.dpmpp_2m),
    ),
    "dpmpp_sde": Sampler(
        "DPM++ SDE",
        "stochastic, two model calls a step",
        _a1111(by_sigma.dpmpp_sde, "karras"),
        _diffusers(by_sigma.dpmpp_sde),
        "DPMSolverSDEScheduler",
    ),
    "dpmpp_2m_sde": Sampler(
        "DPM++ 2M SDE",
        "stochastic, one model call a step",
        _a1111(by_sigma.dpmpp_2m_sde, "exponential"),
        _multistep(partial(by_sigma.dpmpp_2m_sde, brownian=False)),
        "DPMSolverMultistepScheduler (sde-dpmsolver++)",
        _edm(partial(by_sigma.dpmpp_2m_sde, brownian=False)),
    ),
    "dpmpp_3m_sde": Sampler(
        "DPM++ 3M SDE", "stochastic, third order", _a1111(by_sigma.dpmpp_3m_sde, "exponential", discard=True)
    ),
    "unipc": Sampler(
        "UniPC",
        "predictor and corrector, few steps",
        Recipe(
            partial(by_timestep.unipc, order=3, variant="bh1"),
            lv.a1111_unipc_levels,
            ("normal",),
            terminal=A1111_TERMINAL,
        ),
        _multistep(by_timestep.unipc),
        "UniPCMultistepScheduler",
    ),
    "lcm": Sampler(
        "LCM",
        "for LCM-distilled models, 4 to 8 steps",
        Recipe(by_sigma.lcm, lv.a1111_lcm_levels, _SIGMA_SCHEDULES, _BOTH, A1111_TERMINAL),
        _distilled(partial(by_sigma.lcm, scaled=True)),
        "LCMScheduler",
    ),
    "tcd": Sampler("TCD", "for TCD-distilled models, 4 to 8 steps; not in AUTOMATIC1111", _TCD, _TCD, "TCDScheduler"),
}


def _recipe(sampler: str, compat: str, diffusion: Diffusion) -> Recipe | None:
    """How a tool runs a sampler for such a network; None where it does not."""
    known, continuous = SAMPLERS[sampler], diffusion.sigma_max is not None
    found = known.a1111 if compat == "a1111" else known.edm if continuous else known.diffusers
    if found is None or (continuous and not found.continuous):
        return None
    if diffusion.zero_snr and not continuous:
        # Without signal at the last level the noise does not tell the image: a division by zero.
        blind = found.terminal == 0 and diffusion.prediction == "epsilon"
        return None if found.terminal is None or blind else found
    return found


def recipe(sampler: str, compat: str, diffusion: Diffusion) -> Recipe:
    """How a tool runs a sampler for such a network.

    Raises:
        UsageError: no tool of this name, or it has no such sampler, or not for this network.
    """
    one_of("compat", compat, COMPATS)
    if found := _recipe(sampler, compat, diffusion):
        return found
    if compat == "diffusers" and SAMPLERS[sampler].diffusers is None:
        raise UsageError(
            f"sampler {sampler}: diffusers has no scheduler that computes it",
            "Choose another sampler, or --compat a1111.",
        )
    if diffusion.sigma_max is not None:
        kind = f"every level from {diffusion.sigma_min} to {diffusion.sigma_max}, which has no list of timesteps"
    else:
        kind = "zero terminal SNR" + " to predict the noise" * (diffusion.prediction == "epsilon")
    others = [key for key in SAMPLERS if _recipe(key, compat, diffusion)]
    raise UsageError(
        f"sampler {sampler}: cannot sample a model trained on {kind}, with --compat {compat}",
        f"Choose one of: {', '.join(others)}.",
    )


def check_list(
    sampler: str,
    diffusion: Diffusion,
    *,
    compat: str = "a1111",
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """The timesteps or sigmas that are to take the place of a schedule, as plain numbers. `sampler` is as
    `parse_sampler` gives it.

    Raises:
        UsageError: both are given, the sampler does not take them, or they are not falling numbers of the model's
            range: whole timesteps, or sigmas that end in 0.
    """
    if timesteps is None and sigmas is None:
        return None, None
    if timesteps is not None and sigmas is not None:
        raise UsageError("timesteps: given beside sigmas", "Give one of the two.")
    name = "sigmas" if timesteps is None else "timesteps"
    how = recipe(sampler, compat, diffusion)
    if timesteps is not None and diffusion.sigma_max is not None:
        raise UsageError("timesteps: a model trained on every level has no list of them", "Give it sigmas.")
    if name not in how.lists:
        others = [key for key in SAMPLERS if (it := _recipe(key, compat, diffusion)) and name in it.lists]
        raise UsageError(
            f"{name}: sampler {sampler} takes no list of them with --compat {compat}",
            f"Give it {how.lists[0]}." if how.lists else f"Choose one of: {', '.join(others)}.",
        )
    if timesteps is not None:
        return listed_timesteps(timesteps, diffusion), None
    assert sigmas is not None
    return None, listed_sigmas(sigmas, training_sigmas(diffusion, how.terminal or 0.0))


def parse_sampler(
    name: str, schedule: str | None = None, compat: str = "a1111", diffusion: Diffusion = _ORDINARY
) -> tuple[str, str]:
    """Sampler and schedule from their names. `diffusion` is that of the model.

    AUTOMATIC1111's labels are understood, with or without a schedule after them ("DPM++ 2M Karras"), and so are the
    names of diffusers' classes. No schedule, or "automatic", takes the tool's own for the sampler.

    Raises:
        UsageError: either name is unknown, the tool does not have the sampler, or the sampler cannot take the schedule.
    """
    names = {sampler.label.lower(): key for key, sampler in SAMPLERS.items()}
    names |= {
        sampler.scheduler.lower(): key for key, sampler in reversed(SAMPLERS.items()) if sampler.scheduler is not None
    }
    plain = " ".join(name.lower().split())
    schedules = {
        spelling: known for known in (*SCHEDULES, *SPACINGS) for spelling in (known, known.replace("_", " "))
    } | ALIASES
    for suffix in sorted(schedules, key=len, reverse=True):
        if plain.endswith(" " + suffix):
            if schedule is not None and schedules.get(" ".join(schedule.lower().split())) != schedules[suffix]:
                raise UsageError(
                    f"sampler {name!r}: names schedule {suffix}, but schedule {schedule!r} was asked for",
                    "Give the schedule once.",
                )
            plain, schedule = plain.removesuffix(" " + suffix), suffix
            break
    key = names.get(plain, plain)
    if key not in SAMPLERS:
        raise UsageError(
            f"sampler {name!r}: unknown{nearest(plain, [*SAMPLERS, *names])}", f"Choose one of: {', '.join(SAMPLERS)}."
        )
    allowed = recipe(key, compat, diffusion).schedules
    spelling = "automatic" if schedule is None else " ".join(schedule.lower().split())
    if spelling not in schedules:
        raise UsageError(
            f"schedule {schedule!r}: unknown{nearest(spelling, schedules)}", f"Choose one of: {', '.join(allowed)}."
        )
    chosen = schedules[spelling] or allowed[0]
    if chosen not in allowed:
        raise UsageError(
            f"schedule {chosen!r}: sampler {key} cannot take it with --compat {compat}",
            f"Choose one of: {', '.join(allowed)}.",
        )
    return key, chosen


def steps_of(steps: int, timesteps: Sequence[int] | None, sigmas: Sequence[float] | None) -> int:
    """How many steps there are: those of a list where there is one, else `steps`."""
    return len(timesteps) if timesteps is not None else len(sigmas) - 1 if sigmas is not None else steps


def plan_rows(
    sampler: str,
    schedule: str,
    steps: int,
    diffusion: Diffusion,
    *,
    compat: str = "a1111",
    strength: float | None = None,
    masked: bool = False,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> list[Row]:
    """The rows of a picture, one per model call. `sampler` and `schedule` are as `parse_sampler` gives them.

    Args:
        timesteps, sigmas: take the place of `schedule` and `steps`; `check_list` has their rules. An image takes the
            tail of them.
        strength: None from text. From an image, how much of the schedule is left, more than 0 to 1, counted as the tool
            counts. Register 0 then starts as the image's latents and register 1 as unit noise; row 0 mixes them.
        masked: fill `Row.inpaint`. AUTOMATIC1111 blends the denoised estimate (k = 1) and, in the last row, the
            finished latents (k, b, c = 0, 1, 0). diffusers blends the latents with the image at their next noise level;
            with strength 1 it starts from noise alone.

    Raises:
        UsageError: steps, strength or a list are out of range, or leave no model call; or the sampler cannot be had for
            this network.
    """
    timesteps, sigmas = check_list(sampler, diffusion, compat=compat, timesteps=timesteps, sigmas=sigmas)
    steps = steps_of(steps, timesteps, sigmas)
    most = min(MAX_STEPS, diffusion.num_timesteps)
    if not 1 <= steps <= most:
        raise UsageError(f"steps {steps}: expected 1 to {most}", "20 to 30 suit most samplers.")
    if strength is not None and not 0 < strength <= 1:
        raise UsageError(
            f"strength {strength}: expected more than 0 and at most 1",
            "0.75 repaints most of an image, 0.3 keeps its composition.",
        )
    how = recipe(sampler, compat, diffusion)
    training = training_sigmas(diffusion, how.terminal or 0.0)
    levels = how.levels(Request(schedule, steps, training, strength, timesteps, sigmas, diffusion))
    from_noise = strength is None or (masked and strength == 1 and compat == "diffusers")
    trace = Trace(levels, training, diffusion, from_image=not from_noise)
    how.run(trace, levels)
    return [
        replace(row, inpaint=_inpaint(row, i == len(trace.rows), compat) if masked else (0.0, 0.0, 0.0))
        for i, row in enumerate(trace.rows, 1)
    ]


def _inpaint(row: Row, last: bool, compat: str) -> tuple[float, float, float]:
    if last:  # both tools put the image's own latents into the finished ones
        return (0.0, 1.0, 0.0)
    return (1.0, 0.0, 0.0) if compat == "a1111" else row.inpaint
