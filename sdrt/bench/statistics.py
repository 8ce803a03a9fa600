"""The statistics of `sdrt bench`: summaries of samples, ratios with bootstrap intervals, verdicts, and the fit of fixed
and per-call cost. numpy only.

A process is the unit of variation: pictures of one process share its memory layout and its moment on the machine.

Two bundles measured side by side make pairs of processes. A pair gives one number, the median of the log ratios of its
turns. After every pair, Student's t judges the numbers of all pairs so far. The side that starts first alternates. So
without a change the numbers lie evenly around 0, each pair with a noise of its own. For normal noise of any mix of
widths, Student's two-sided test keeps its level up to 8 % (Bakirov and Szekely, 2005). Judging after every pair raises
the number of false alarms, so a single look may only raise LOOK_ALPHA.

Two separate runs are compared by the medians of processes. The interval comes from drawing processes, and pictures
within them, with replacement (Efron, 1979, percentile interval). The test is Wilcoxon's exact rank sum (Mann-Whitney).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

RESAMPLES = 10_000
SEED = 20_061
ALPHA = 0.04
"""The two-sided level for all gated metrics of two separate runs: a false SLOWER in at most 2 of 100, whatever the
noise.
"""
LOOK_ALPHA = 0.0025
"""The level for one look at pairs. Up to MAX_PAIRS - MIN_PAIRS + 1 looks, all at the same pairs, raise a false SLOWER
in at most 2 of 100 runs (see the tests).
"""
MIN_PAIRS, MAX_PAIRS = 6, 50
MIN_PROCESSES = 4
"""The clearest split of two unpaired groups of n is 2 of (2n over n) equally likely ones, which is below ALPHA from 4
on.
"""
_EXACT = 60
"""Up to this many processes of both sides, ranks are counted exactly. Beyond, the rank sum counts as normal."""
_FIT_POINTS = 500
_Z95, _Z90, _Z80 = 1.959964, 1.281552, 0.841621
SEEN = _Z95 + _Z80
"""A change of this many standard errors is recognised in four cases of five."""
_SETTLED = _Z95 + _Z90
"""With this many standard errors of room to either side, the 95 % interval stays inside in four cases of five."""

SLOWER, FASTER, SAME, AMBIGUOUS = "SLOWER", "FASTER", "SAME", "AMBIGUOUS"


def usable(values: Sequence[float]) -> tuple[list[float], int]:
    """The finite, non-negative values, and how many others were dropped: NaN, and durations measured while a clock went
    back.
    """
    kept = [float(value) for value in values if math.isfinite(value) and value >= 0]
    return kept, len(values) - len(kept)


@dataclass(frozen=True)
class Summary:
    """`n` values of `processes` processes. `ci95` is the interval of the median of the processes' medians, None for
    fewer than two processes.
    """

    n: int
    processes: int
    min: float
    p50: float
    p90: float
    p99: float
    mean: float
    mad: float
    ci95: tuple[float, float] | None


def summarise(processes: Sequence[Sequence[float]]) -> Summary:
    """Summary of one metric, a list of samples per process. At least one usable value is needed."""
    groups = [np.asarray(kept) for kept, _ in map(usable, processes) if kept]
    pooled = np.concatenate(groups)
    p50, p90, p99 = (float(value) for value in np.percentile(pooled, [50, 90, 99]))
    interval = None
    if len(groups) > 1:
        medians = np.array([np.median(group) for group in groups])
        low, high = np.percentile(bootstrap_medians(medians), [2.5, 97.5])
        interval = (float(low), float(high))
    mad = float(np.median(np.abs(pooled - p50)))
    return Summary(len(pooled), len(groups), float(pooled.min()), p50, p90, p99, float(pooled.mean()), mad, interval)


@cache
def _middles(n: int, resamples: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Ranks of the two middle values in each resample of n sorted values. The same draw of ranks serves every sample of
    that size.
    """
    ranks = np.sort(np.random.default_rng([seed, n]).integers(0, n, (resamples, n)), axis=1)
    return ranks[:, (n - 1) // 2], ranks[:, n // 2]


def bootstrap_medians(values: Doubles, resamples: int = RESAMPLES, seed: int = SEED) -> Doubles:
    """Medians of resamples with replacement, `[..., n]` to `[..., resamples]`."""
    ordered = np.sort(values, axis=-1)
    low, high = _middles(values.shape[-1], resamples, seed)
    medians: Doubles = (ordered[..., low] + ordered[..., high]) / 2
    return medians


@dataclass(frozen=True)
class Estimate:
    """A ratio new / base with its 95 % interval. `p_value` is that of the two-sided test; a change needs one below
    `alpha`.

    `enough` says whether n pairs (or processes per side) may be judged at all. `changed` is the share of the margin, in
    logarithms, from which a ratio may be called a change. In pairs it is less than 1: a change as large as the margin
    must be found, although half of all its measurements lie below the margin. For separate runs, which see the machine
    at two moments, it is 1. `seen` is the smallest relative change that is recognised in four cases of five.
    """

    ratio: float
    low: float
    high: float
    p_value: float
    n: int
    enough: bool
    alpha: float = ALPHA
    changed: float = 1.0
    seen: float = math.nan

    @property
    def error(self) -> float:
        """Standard error of the ratio's logarithm, from the width of its interval, which a stray pair widens little.
        Infinite for n = 1.
        """
        return math.log(self.high / self.low) / (2 * _Z95) if self.n > 1 else math.inf


def paired(base: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Estimate | None:
    """Ratio of processes in pairs: process i of both sides ran side by side.

    If both sides have equally many samples, they took turns and are compared sample by sample. A process that lost some
    samples because its machine slowed down is compared by its median. Pairs with an unusable side are left out. None if
    no pair is left.
    """
    logs = []
    for one, other in zip(base, new, strict=True):
        a, b = (np.array([value for value in usable(side)[0] if value > 0]) for side in (one, other))
        if len(a) and len(b):
            logs.append(float(np.median(np.log(b / a)) if len(a) == len(b) else np.log(np.median(b) / np.median(a))))
    return from_logs(np.array(logs)) if logs else None


def from_logs(logs: Doubles) -> Estimate:
    """Estimate from the log ratios of pairs, `[n]`: their mean, with Student's interval and test."""
    n, middle = len(logs), float(logs.mean())
    error = float(logs.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    reach = student_t(0.975, n - 1) * error if n > 1 else math.inf
    p_value = 1.0 if n < 2 or middle == 0 else 2 * (1 - student_share(abs(middle) / error, n - 1)) if error else 0.0
    low, high = (math.exp(max(-700.0, min(700.0, value))) for value in (middle - reach, middle + reach))
    return Estimate(
        math.exp(middle),
        low,
        high,
        p_value,
        n,
        n >= MIN_PAIRS,
        LOOK_ALPHA,
        0.5,
        visible(error * math.sqrt(n), n) if n > 1 else math.nan,
    )


def student_share(t: float, freedom: int) -> float:
    """Student's distribution function, for whole degrees of freedom (Abramowitz and Stegun, 1964, 26.7.3
    and 26.7.4).
    """
    angle = math.atan2(t, math.sqrt(freedom))
    odd, square = freedom % 2, math.cos(angle) ** 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= square * k / (k + 1)
    return 0.5 + (angle + total) / math.pi if odd else 0.5 + total / 2


@cache
def student_t(share: float, freedom: int) -> float:
    """The t below which this share of Student's distribution lies, for shares of at least 0.5."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_share(middle, freedom) < share else (low, middle)
    return high


def visible(deviation: float, pairs: int) -> float:
    """The smallest relative change that so many pairs recognise in four cases of five, if their log ratios scatter by
    `deviation`.
    """
    return math.expm1(min((student_t(1 - LOOK_ALPHA / 2, pairs - 1) + _Z80) * deviation / math.sqrt(pairs), 100.0))


def unpaired(base: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Estimate | None:
    """Ratio of two separate runs. Processes are drawn, and within each process its samples. None if a side has no
    usable value.
    """
    sides = []
    for offset, processes in enumerate((base, new)):
        groups = [np.asarray(kept) for kept, _ in map(usable, processes) if kept and np.median(kept) > 0]
        if not groups:
            return None
        medians = np.array([np.median(group) for group in groups])
        inner = np.stack([bootstrap_medians(group, seed=SEED + 1 + i) for i, group in enumerate(groups)])
        random = np.random.default_rng([SEED, offset])
        process = random.integers(0, len(groups), (RESAMPLES, len(groups)))
        draw = random.integers(0, RESAMPLES, process.shape)
        sides.append((medians, np.log(np.maximum(np.median(inner[process, draw], axis=1), np.finfo(float).tiny))))
    (old, old_draws), (now, new_draws) = sides
    n = min(len(old), len(now))
    low, high = (float(value) for value in np.percentile(new_draws - old_draws, [2.5, 97.5]))
    seen = math.expm1(min(SEEN * (high - low) / (2 * _Z95), 100.0))
    return Estimate(
        float(np.median(now) / np.median(old)),
        math.exp(low),
        math.exp(high),
        rank_sum(old, now),
        n,
        n >= MIN_PROCESSES,
        seen=seen,
    )


def rank_sum(base: Doubles, new: Doubles) -> float:
    """Two-sided p-value of Wilcoxon's rank-sum test, exact with ties."""
    ranks = _double_ranks(np.concatenate([base, new]))
    n, total, found = len(new), int(ranks.sum()), int(ranks[len(base) :].sum())
    if len(ranks) > _EXACT:
        share = n / len(ranks)
        return _two_sided(
            found - total * share, math.sqrt(float(ranks.astype(np.float64).var(ddof=1)) * n * (1 - share))
        )
    ways = np.zeros((n + 1, total + 1))
    ways[0, 0] = 1.0
    for rank in ranks:  # all choices of n ranks are equally likely
        ways[1:, rank:] += ways[:-1, : total + 1 - rank].copy()
    return _tails(ways[n], found)


def _double_ranks(values: Doubles) -> NDArray[np.int64]:
    """Twice the mid-ranks, which are whole numbers."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return np.asarray((2 * last - counts + 1)[inverse], np.int64)


def _tails(ways: Doubles, found: int) -> float:
    share = ways / ways.sum()
    return min(1.0, 2 * min(float(share[: found + 1].sum()), float(share[found:].sum())))


def _two_sided(distance: float, deviation: float) -> float:
    return math.erfc(abs(distance) / deviation / math.sqrt(2)) if deviation else 1.0


@dataclass(frozen=True)
class Verdict:
    """`word` is SLOWER, FASTER, SAME or AMBIGUOUS. `needed` is how many pairs would settle an AMBIGUOUS verdict; None
    if no number would, or if the verdict is settled.

    `visible` is the smallest relative change that this many pairs of this spread can tell from no change. NaN if there
    are too few pairs to decide anything.
    """

    word: str
    needed: int | None
    visible: float


def judge(estimates: Mapping[str, Estimate], margins: Mapping[str, float]) -> dict[str, Verdict]:
    """One verdict per metric. Holm's procedure (1979) tests all `estimates` together, so more metrics do not mean more
    false alarms.
    """
    ranked = sorted(estimates, key=lambda name: estimates[name].p_value)
    significant, still = {}, True
    for rank, name in enumerate(ranked):
        still = still and estimates[name].p_value <= estimates[name].alpha / (len(ranked) - rank)
        significant[name] = still
    return {
        name: _verdict(estimate, margins[name], significant[name], len(ranked)) for name, estimate in estimates.items()
    }


def _verdict(estimate: Estimate, margin: float, significant: bool, metrics: int) -> Verdict:
    bound = 1 + margin
    changed = bound**estimate.changed
    seen = estimate.seen if estimate.enough else math.nan
    if estimate.enough:
        if estimate.low >= 1 / bound and estimate.high <= bound:
            return Verdict(SAME, None, seen)
        if estimate.ratio >= changed and estimate.low > 1 and significant:
            return Verdict(SLOWER, None, seen)
        if estimate.ratio <= 1 / changed and estimate.high < 1 and significant:
            return Verdict(FASTER, None, seen)
    return Verdict(AMBIGUOUS, _needed(estimate, math.log(bound), metrics), seen)


def _needed(estimate: Estimate, bound: float, metrics: int) -> int | None:
    """How many pairs it takes until the interval fits between the ratio and the value it must exclude: the margin, or
    1. None if that is out of reach.
    """
    if not estimate.enough:
        return MIN_PAIRS
    size = abs(math.log(estimate.ratio))
    same = size < bound * estimate.changed
    room = bound - size if same else size
    if room <= 0.02 * bound:  # the ratio lies on the margin itself, and stays there with any number of pairs
        return None
    errors = _SETTLED if same else NormalDist().inv_cdf(1 - estimate.alpha / metrics / 2) + _Z90
    return max(MIN_PAIRS, estimate.n + 1, math.ceil(estimate.n * (errors * estimate.error / room) ** 2))


@dataclass(frozen=True)
class Fit:
    """time = fixed_ms + calls x per_call_ms. `residual_ms` is the largest median deviation among the measured numbers
    of calls.
    """

    fixed_ms: float
    per_call_ms: float
    residual_ms: float
    calls: tuple[int, ...]


def fit_cost(points: Sequence[tuple[int, float]]) -> Fit | None:
    """Fit the times of pictures with several numbers of model calls by the median of slopes (Theil, 1950; Sen, 1968).
    Up to 29 % outliers do not move it.

    `points` are (model calls, total ms). None if there are fewer than two different numbers of calls.
    """
    good = sorted((calls, ms) for calls, ms in points if math.isfinite(ms) and ms >= 0)
    good = good[
        :: math.ceil(len(good) / _FIT_POINTS) or 1
    ]  # all pairs of points are looked at; evenly fewer of the sorted ones tell the same
    numbers = sorted({calls for calls, _ in good})
    if len(numbers) < 2:
        return None
    x, y = np.array([c for c, _ in good], np.float64), np.array([ms for _, ms in good])
    i, j = np.triu_indices(len(x), 1)
    different = x[i] != x[j]
    slope = float(np.median((y[j] - y[i])[different] / (x[j] - x[i])[different]))
    fixed = float(np.median(y - slope * x))
    residual = max(abs(float(np.median(y[x == n] - slope * n - fixed))) for n in numbers)
    return Fit(fixed, slope, residual, tuple(numbers))


def detectable(processes: Sequence[Sequence[float]]) -> float | None:
    """The smallest relative change that a comparison of two runs like this one could tell from no change. None for too
    few processes.
    """
    medians = [float(np.median(kept)) for kept, _ in map(usable, processes) if kept]
    medians = [median for median in medians if median > 0]
    if len(medians) < MIN_PROCESSES:
        return None
    low, high = np.percentile(bootstrap_medians(np.log(medians)), [2.5, 97.5])
    return math.expm1(min(SEEN * math.sqrt(2) * float(high - low) / (2 * _Z95), 100.0))


def fence(history: Sequence[float]) -> float | None:
    """Tukey's far-out fence Q3 + 3 IQR of earlier runs. None for fewer than ten, which say too little."""
    if len(history) < 10:
        return None
    q1, q3 = np.percentile(history, [25, 75])
    return float(q3 + 3 * (q3 - q1))
