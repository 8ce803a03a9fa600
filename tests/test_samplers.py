"""Samplers and schedules against k-diffusion's and DDIM's own formulas, written out here in plain float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import TRAINING, Graphs, relative

from sdrt.bundle import Diffusion, open_bundle
from sdrt.errors import UsageError
from sdrt.runtime.engine import Engine, Job, Tables, load_engine, tables
from sdrt.runtime.noise import CpuNoise
from sdrt.runtime.samplers import SAMPLERS, Row, parse_sampler, trace_rows
from sdrt.runtime.schedule import MAX_STEPS, SCHEDULES, timestep, training_sigmas

Array = NDArray[np.float64]
Network = Callable[[Array, float], Array]
"""Scaled latents and a fractional timestep to what the network predicts."""

CASES = [(key, schedule) for key, sampler in SAMPLERS.items() for schedule in sampler.schedules]
EXACT = 1e-9


# The references. `x` is unit noise at first, and sigmas end with the level that the last step reaches.

ALPHAS = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
LOG_SIGMAS = np.log(np.sqrt((1 - ALPHAS) / ALPHAS))


def t_to_sigma(t: float) -> float:
    low, high, w = math.floor(t), math.ceil(t), t - math.floor(t)
    return math.exp((1 - w) * LOG_SIGMAS[low] + w * LOG_SIGMAS[high])


def sigma_to_t(sigma: float) -> float:
    """k-diffusion's `DiscreteSchedule.sigma_to_t` without quantising."""
    low = min(int(np.argmax(np.cumsum(math.log(sigma) - LOG_SIGMAS >= 0))), len(LOG_SIGMAS) - 2)
    w = (LOG_SIGMAS[low] - math.log(sigma)) / (LOG_SIGMAS[low] - LOG_SIGMAS[low + 1])
    w = min(max(w, 0.0), 1.0)
    return (1 - w) * low + w * (low + 1)


def reference_sigmas(schedule: str, n: int) -> list[float]:
    if schedule == "discrete":
        return [*(t_to_sigma(999 - 999 * i / (n - 1) if n > 1 else 999.0) for i in range(n)), 0.0]
    if schedule == "karras":
        high, low = math.exp(LOG_SIGMAS[-1]) ** (1 / 7), math.exp(LOG_SIGMAS[0]) ** (1 / 7)
        return [*((high + (i / (n - 1) if n > 1 else 0.0) * (low - high)) ** 7 for i in range(n)), 0.0]
    steps = [1 + i * (1000 // n) for i in reversed(range(n))]
    return [math.exp(LOG_SIGMAS[t]) for t in (*steps, 0)]


class Denoiser:
    """k-diffusion's `DiscreteEpsDDPMDenoiser` and `DiscreteVDDPMDenoiser`."""

    def __init__(self, network: Network, prediction: str) -> None:
        self.network, self.prediction = network, prediction

    def __call__(self, x: Array, sigma: float) -> Array:
        out = self.network(x / math.sqrt(sigma**2 + 1), sigma_to_t(sigma))
        if self.prediction == "epsilon":
            return x - sigma * out
        return x / (sigma**2 + 1) - out * sigma / math.sqrt(sigma**2 + 1)


def sample_euler(model: Denoiser, x: Array, sigmas: list[float], noise: Iterator[Array]) -> Array:
    x = x * sigmas[0]
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i])) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def sample_euler_ancestral(model: Denoiser, x: Array, sigmas: list[float], noise: Iterator[Array]) -> Array:
    x = x * sigmas[0]
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        up = min(sigmas[i + 1], math.sqrt(sigmas[i + 1] ** 2 * (sigmas[i] ** 2 - sigmas[i + 1] ** 2) / sigmas[i] ** 2))
        down = math.sqrt(sigmas[i + 1] ** 2 - up**2)
        x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        if sigmas[i + 1] > 0:
            x = x + next(noise) * up
    return x


def sample_heun(model: Denoiser, x: Array, sigmas: list[float], noise: Iterator[Array]) -> Array:
    x = x * sigmas[0]
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i])) / sigmas[i]
        dt = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            x_2 = x + d * dt
            d_2 = (x_2 - model(x_2, sigmas[i + 1])) / sigmas[i + 1]
            x = x + (d + d_2) / 2 * dt
    return x


def sample_dpmpp_2m(model: Denoiser, x: Array, sigmas: list[float], noise: Iterator[Array]) -> Array:
    x = x * sigmas[0]
    old: Array | None = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        if sigmas[i + 1] == 0:
            x = denoised  # the limit of h to infinity
            continue
        t, t_next = -math.log(sigmas[i]), -math.log(sigmas[i + 1])
        h = t_next - t
        blend = denoised
        if old is not None:
            r = (t + math.log(sigmas[i - 1])) / h
            blend = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        x = math.exp(-t_next) / math.exp(-t) * x - math.expm1(-h) * blend
        old = denoised
    return x


def sample_ddim(model: Denoiser, x: Array, sigmas: list[float], noise: Iterator[Array]) -> Array:
    """Song et al. 2020, equation 12 with eta 0, on latents of unit variance."""
    for sigma, sigma_next in pairwise(sigmas):
        alpha, alpha_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
        out = model.network(x, sigma_to_t(sigma))
        eps = out if model.prediction == "epsilon" else math.sqrt(alpha) * out + math.sqrt(1 - alpha) * x
        x_0 = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        x = math.sqrt(alpha_next) * x_0 + math.sqrt(1 - alpha_next) * eps
    return x


REFERENCES = {"euler": sample_euler, "euler_a": sample_euler_ancestral, "heun": sample_heun, "dpmpp_2m": sample_dpmpp_2m, "ddim": sample_ddim}


def run_machine(table: Tables | list[Row], network: Network, unit_noise: Array, fresh: Iterator[Array], init: Array | None = None) -> Array:
    """The step graph's arithmetic over the rows, in float64."""
    if isinstance(table, Tables):
        columns = list(zip(table.timestep, table.a, table.u, table.q, table.M, strict=True))
    else:
        columns = [(row.timestep, row.a, row.u, row.q, row.M) for row in table]
    zero = np.zeros_like(unit_noise)
    r = np.stack([zero if init is None else init, unit_noise, zero, zero])
    for t, a, u, q, M in columns:
        denoised = np.tensordot(u.astype(np.float64), r, 1) + float(q) * network(np.tensordot(a.astype(np.float64), r, 1), float(t))
        noise = next(fresh) if M[:, 5].any() else zero
        r = np.tensordot(M.astype(np.float64), np.stack([*r, denoised, noise]), 1)
    return np.asarray(r[0])


def toy_network(x: Array, t: float) -> Array:
    """Smooth, not linear, and different at every timestep."""
    return np.tanh(0.7 * x + 0.3 * np.roll(x, 1)) + 0.2 * np.sin(t / 70 + x)


def shrinking(x_scaled: Array, t: float) -> Array:
    """The noise prediction whose denoised estimate is x / (1 + sigma^2)."""
    sigma = t_to_sigma(t)
    x = x_scaled * math.sqrt(1 + sigma**2)
    return (x - x / (1 + sigma**2)) / sigma


def normals(seed: int, shape: tuple[int, ...] = (6,)) -> Iterator[Array]:
    random = np.random.RandomState(seed)
    while True:
        yield random.standard_normal(shape)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_rows_are_the_sampler(sampler: str, schedule: str, steps: int, prediction: str) -> None:
    rows = trace_rows(sampler, schedule, steps, Diffusion(prediction=prediction))
    x = next(normals(1))
    expected = REFERENCES[sampler](Denoiser(toy_network, prediction), x, reference_sigmas(schedule, steps), normals(2))
    assert relative(run_machine(rows, toy_network, x, normals(2)), expected) < EXACT
    assert relative(run_machine(tables(rows, [1.0]), toy_network, x, normals(2)), expected) < 1e-5


@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_start_from_an_image(sampler: str, schedule: str) -> None:
    """Latents that begin as an image with noise on it, in the scale each sampler keeps them in."""
    rows = trace_rows(sampler, schedule, 6, Diffusion(), pure_noise=False)
    init, x = next(normals(3)), next(normals(4))
    sigmas = reference_sigmas(schedule, 6)
    noisy = (init + sigmas[0] * x) / (math.sqrt(1 + sigmas[0] ** 2) if sampler == "ddim" else sigmas[0])
    expected = REFERENCES[sampler](Denoiser(toy_network, "epsilon"), noisy, sigmas, normals(5))
    assert relative(run_machine(rows, toy_network, x, normals(5), init), expected) < EXACT


@pytest.mark.parametrize("steps", [2, 7, 20, 333])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_is_diffusers_ddim(steps: int, prediction: str) -> None:
    import torch
    from diffusers import DDIMScheduler

    kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = DDIMScheduler(**TRAINING, steps_offset=1, set_alpha_to_one=False, clip_sample=False, timestep_spacing="leading", prediction_type=kind)
    scheduler.alphas_cumprod = torch.from_numpy(ALPHAS)  # diffusers' own are float32
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    rows = trace_rows("ddim", "leading", steps, Diffusion(prediction=prediction))
    assert [row.timestep for row in rows] == pytest.approx(scheduler.timesteps.tolist(), abs=1e-6)
    start = next(normals(6))
    x = torch.from_numpy(start)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.from_numpy(toy_network(x.numpy(), float(t))), int(t), x).prev_sample
    assert relative(run_machine(rows, toy_network, start, normals(7)), x.numpy()) < EXACT


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [("euler", [0.682161, -1.364322]), ("dpmpp_2m", [1.060861, -2.121722]), ("euler_a", [1.032269, -1.100374])],
)
def test_known_trajectories(sampler: str, expected: list[float]) -> None:
    rows = trace_rows(sampler, "karras", 5, Diffusion())
    fresh = (np.array([0.5, -0.5]) * (i + 1) for i in range(5))
    assert run_machine(rows, shrinking, np.array([1.0, -2.0]), fresh) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_heun_calls_the_model_twice_a_step_but_the_last(steps: int) -> None:
    rows = trace_rows("heun", "discrete", steps, Diffusion())
    assert len(rows) == 2 * steps - 1
    assert [row.step for row in rows] == [i // 2 for i in range(2 * steps - 1)]


@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_fresh_noise_only_where_it_is_used(sampler: str, schedule: str) -> None:
    rows = trace_rows(sampler, schedule, 7, Diffusion())
    assert [row.draws for row in rows] == ([True] * 6 + [False] if sampler == "euler_a" else [False] * len(rows))


def test_discrete_schedule() -> None:
    training = training_sigmas(Diffusion())
    assert SCHEDULES["discrete"](5, training) == pytest.approx([14.614641, 4.086081, 1.615580, 0.695150, 0.029167, 0.0], abs=1e-6)


def test_karras_schedule() -> None:
    training = training_sigmas(Diffusion())
    assert SCHEDULES["karras"](5, training) == pytest.approx([14.614641, 4.796535, 1.274100, 0.247950, 0.029167, 0.0], abs=1e-6)
    t = [timestep(sigma, training) for sigma in SCHEDULES["karras"](20, training)[:-1]]
    assert t[:4] == pytest.approx([999, 961.733, 921.042, 876.314], abs=1e-3)
    assert t[-3:] == pytest.approx([5.992, 1.783, 0], abs=1e-3)


def test_leading_schedule_is_diffusers() -> None:
    from diffusers import DDIMScheduler

    training = training_sigmas(Diffusion())
    scheduler = DDIMScheduler(**TRAINING, steps_offset=1, timestep_spacing="leading")
    for steps in (2, 3, 20, 50, 499, 501, 999):
        scheduler.set_timesteps(steps)
        found = SCHEDULES["leading"](steps, training)
        assert [timestep(sigma, training) for sigma in found[:-1]] == pytest.approx(scheduler.timesteps.tolist(), abs=1e-6)
        assert found[-1] == training[0]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 101])
def test_schedules(schedule: str, steps: int) -> None:
    assert SCHEDULES[schedule](steps, training_sigmas(Diffusion())) == pytest.approx(reference_sigmas(schedule, steps), rel=1e-12, abs=0)


def test_training_sigmas() -> None:
    training = training_sigmas(Diffusion())
    assert training[[0, -1]] == pytest.approx([0.0291672, 14.6146412], abs=1e-7)
    assert np.log(training) == pytest.approx(LOG_SIGMAS, rel=1e-12)


def test_timestep_of_sigma() -> None:
    training = training_sigmas(Diffusion())
    for sigma in np.exp(np.random.RandomState(0).uniform(LOG_SIGMAS[0], LOG_SIGMAS[-1], 200)):
        assert timestep(sigma, training) == pytest.approx(sigma_to_t(sigma), abs=1e-8)
    assert timestep(1e-3, training) == 0 and timestep(100.0, training) == 999


@pytest.mark.parametrize(
    ("name", "schedule", "expected"),
    [
        ("euler", None, ("euler", "discrete")),
        ("Euler", "karras", ("euler", "karras")),
        ("Euler a", None, ("euler_a", "discrete")),
        ("EULER A  Karras", None, ("euler_a", "karras")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("dpm++ 2m", "Karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m karras", None, ("dpmpp_2m", "karras")),
        ("Heun", None, ("heun", "discrete")),
        ("DDIM", None, ("ddim", "leading")),
        ("ddim", "discrete", ("ddim", "discrete")),
    ],
)
def test_names(name: str, schedule: str | None, expected: tuple[str, str]) -> None:
    assert parse_sampler(name, schedule) == expected


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("eulr", None, "did you mean 'euler'"),
        ("DPM++ 2", None, "did you mean 'dpm\\+\\+ 2m'"),
        ("dpmpp2m", None, "did you mean 'dpmpp_2m'"),
        ("", None, "sampler ''"),
        ("xyzzy", None, "sampler 'xyzzy': unknown"),
        ("euler", "karas", "did you mean 'karras'"),
        ("euler", "", "schedule ''"),
        ("euler", "leading", "euler cannot take it"),
        ("Heun leading", None, "heun cannot take it"),
    ],
)
def test_unknown_names(name: str, schedule: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_sampler(name, schedule)
    assert caught.value.fix.startswith("Choose one of: ")
    assert ("did you mean" in caught.value.message) == ("did you mean" in message)


@pytest.mark.parametrize("steps", [0, -1, MAX_STEPS + 1])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(UsageError, match=f"steps {steps}: expected 1 to"):
        trace_rows("euler", "discrete", steps, Diffusion())


@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_most_steps(sampler: str, schedule: str) -> None:
    """The documented maximum works, or is refused as a usage error where a schedule cannot be so fine."""
    try:
        rows = trace_rows(sampler, schedule, MAX_STEPS, Diffusion())
    except UsageError:
        return
    assert all(np.isfinite(row.M).all() and math.isfinite(row.timestep) for row in rows)


@pytest.fixture(scope="module")
def engine(flat_bundle: Path) -> Engine:
    return load_engine(open_bundle(flat_bundle), "onnxruntime", None)


@pytest.fixture(scope="module")
def graphs(flat_bundle: Path) -> Graphs:
    return Graphs(flat_bundle)


@pytest.mark.parametrize(("sampler", "schedule"), CASES)
def test_whole_loop(engine: Engine, graphs: Graphs, sampler: str, schedule: str) -> None:
    """The engine over the tables, against the formulas calling the same graph for its raw prediction only; two pictures, guided."""
    steps, shape, guidance = 8, (2, 4, 8, 8), 3.0
    stream = CpuNoise(11)
    unit_noise = stream.draw(shape)
    random = np.random.RandomState(12)
    tokens = np.full((4, 77), 49407, np.int64)
    tokens[:, :4] = random.randint(300, 40_000, (4, 4))
    context = engine.encode_text(tokens, np.ones(tokens.shape, np.float32), 1)

    def network(x: Array, t: float) -> Array:
        out = graphs.unet(np.concatenate([x, x]).astype(np.float32), t, context).astype(np.float64)
        return (1 - guidance) * out[:2] + guidance * out[2:]

    rows = trace_rows(sampler, schedule, steps, Diffusion())
    noise = np.zeros((len(rows), *shape), np.float32)
    for i in range(len(rows)):
        noise[i] = stream.draw(shape)
    zeros = np.zeros(shape, np.float32)
    denoising = engine.denoise(Job(tables(rows, [[1 - guidance, guidance]] * len(rows)), noise, (context,), (0,) * len(rows), zeros, unit_noise, zeros[:, :1]))
    for _ in rows:
        denoising.step()
    fresh = (row.astype(np.float64) for row in noise)
    expected = REFERENCES[sampler](Denoiser(network, "epsilon"), unit_noise.astype(np.float64), reference_sigmas(schedule, steps), fresh)
    assert relative(denoising.latents(), expected) < 1e-4


def test_prediction_of_the_manifest_is_used() -> None:
    rows = {kind: trace_rows("euler", "discrete", 3, replace(Diffusion(), prediction=kind)) for kind in ("epsilon", "v")}
    assert rows["epsilon"][0].q == pytest.approx(-14.6146412) and rows["v"][0].q == pytest.approx(-14.6146412 / math.hypot(1, 14.6146412))


def columns(table: Any) -> set[int]:
    return {len(column) for column in vars(table).values()}


def test_tables_are_float32_and_as_long_as_the_rows() -> None:
    table = tables(trace_rows("heun", "karras", 4, Diffusion()), [-6.0, 7.0])
    assert columns(table) == {7}
    assert {column.dtype for column in vars(table).values()} == {np.dtype(np.float32)}
    assert table.w.tolist() == [[-6.0, 7.0]] * 7 and not table.inpaint.any()
