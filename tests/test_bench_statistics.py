"""The statistics of benchmarks on synthetic samples of known shift and noise: false alarms, power, and samples that are not nice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from sdrt.bench.statistics import (
    AMBIGUOUS,
    FASTER,
    MAX_PAIRS,
    MIN_PAIRS,
    SAME,
    SLOWER,
    Estimate,
    bootstrap_medians,
    detectable,
    fence,
    fit_cost,
    from_logs,
    judge,
    paired,
    rank_sum,
    student_share,
    student_t,
    summarise,
    unpaired,
    usable,
    visible,
)

RUNS, PAIRS, MARGIN = 1000, 10, 0.05
GATED = ("total_ms", "step_ms", "load_ms")


def noisy(random: np.random.Generator, processes: int, cv: float, shift: float = 0.0, pictures: int = 10, within: float = 0.01) -> list[list[float]]:
    """Processes that differ by `cv`, pictures in each that differ by `within`, around 100 ms."""
    levels = 100 * (1 + shift) * np.exp(random.normal(0, cv, (processes, 1)))
    return [list(row) for row in levels * np.exp(random.normal(0, within, (processes, pictures)))]


def word(base: list[list[float]], new: list[list[float]], margin: float = MARGIN) -> str:
    estimate = paired(base, new)
    assert estimate is not None
    return judge({"total_ms": estimate}, {"total_ms": margin})["total_ms"].word


def sequential(logs: np.ndarray, margin: float = MARGIN) -> tuple[set[str], int]:
    """What a run comes to that may look at the log ratios `[metrics, pairs]` after each pair from the sixth: the words of the last look, and its pairs."""
    for pairs in range(MIN_PAIRS, logs.shape[1] + 1):
        found = judge({str(i): from_logs(row[:pairs]) for i, row in enumerate(logs)}, {str(i): margin for i in range(len(logs))})
        words = {verdict.word for verdict in found.values()}
        if SLOWER in words or AMBIGUOUS not in words:
            break
    return words, pairs


def mixed(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of a machine whose unrest changes from pair to pair."""
    return np.asarray(random.normal(0, 0.02, shape) * np.exp(random.normal(0, 1, shape[-1])))


NOISES = {
    "quiet": lambda random, shape: random.normal(0, 0.01, shape),
    "hopeless": lambda random, shape: random.normal(0, 1.0, shape),
    "restless": mixed,
    "two kinds of process": lambda random, shape: random.choice([-0.4, 0.0, 0.0, 0.4], shape) + random.normal(0, 0.01, shape),
    "one sample a process": lambda random, shape: random.standard_t(2, shape) * 0.05,
}


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_looking_after_every_pair_raises_few_false_alarms(noise: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> None:
    """Nothing has changed, three independent timings are gated, and a run goes on for as long as it may: at most 2 of 100 end SLOWER."""
    random = np.random.default_rng(1)
    runs = 400
    assert sum(SLOWER in sequential(noise(random, (len(GATED), MAX_PAIRS)))[0] for _ in range(runs)) <= 0.02 * runs


def test_a_change_of_the_margin_is_seen_in_nine_of_ten_runs_and_none_is_the_same_in_six_pairs() -> None:
    """At the scatter between pairs of a busy machine, 2 %, with two timings that nearly agree, as the whole and its largest part do."""
    random = np.random.default_rng(2)

    def run(change: float) -> tuple[set[str], int]:
        shared = random.normal(0, 0.02, 30) + math.log1p(change)
        return sequential(np.stack([shared, shared + random.normal(0, 0.003, 30)]))

    slower = [run(MARGIN) for _ in range(300)]
    assert sum(SLOWER in words for words, _ in slower) >= 0.9 * len(slower)
    same = [run(0.0) for _ in range(300)]
    assert sum(words == {SAME} for words, _ in same) >= 0.98 * len(same) and np.median([pairs for _, pairs in same]) == MIN_PAIRS


def test_turns_cancel_what_both_sides_share() -> None:
    """A machine whose speed doubles from one picture to the next: neighbours share it, medians of a process do not."""
    random = np.random.default_rng(3)
    base, new = [], []
    for _ in range(MIN_PAIRS):
        speed = 100 * np.exp(random.normal(0, 0.4, 20))
        base.append(list(speed * np.exp(random.normal(0, 0.02, 20))))
        new.append(list(speed * 1.05 * np.exp(random.normal(0, 0.02, 20))))
    estimate = paired(base, new)
    assert estimate is not None and 1.03 < estimate.low < 1.05 < estimate.high < 1.07
    assert word(base, new) == SLOWER
    apart = paired([side[:-1] for side in base], new)  # as many samples on both sides are turns; otherwise medians are compared
    assert apart is not None and math.log(apart.high / apart.low) > 3 * math.log(estimate.high / estimate.low)


def test_shifts_below_the_margin_do_not_alarm() -> None:
    """3 % slower is within the margin of 5 %, and a quiet machine says so."""
    random = np.random.default_rng(4)
    found = [word(noisy(random, PAIRS, 0.005), noisy(random, PAIRS, 0.005, 0.03)) for _ in range(200)]
    assert found.count(SAME) >= 0.99 * len(found)


def test_false_alarms_of_separate_runs() -> None:
    """Two files of five processes each, at the doubled margin."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(RUNS // 5):
        estimate = unpaired(noisy(random, 5, 0.03), noisy(random, 5, 0.03))
        assert estimate is not None
        found.append(judge({"x": estimate}, {"x": 2 * MARGIN})["x"].word)
    assert found.count(SLOWER) <= 0.02 * len(found)
    estimate = unpaired(noisy(random, 5, 0.01), noisy(random, 5, 0.01, 0.3))
    assert estimate is not None and judge({"x": estimate}, {"x": 2 * MARGIN})["x"].word == SLOWER


def test_coverage_of_the_interval() -> None:
    """Of 1,000 intervals of a known ratio about 95 in 100 hold it."""
    logs = np.random.default_rng(6).normal(math.log(1.1), 0.03, (RUNS, PAIRS))
    estimates = [from_logs(run) for run in logs]
    assert 0.93 <= np.mean([estimate.low <= 1.1 <= estimate.high for estimate in estimates]) <= 0.97


@pytest.mark.parametrize(("freedom", "share", "t"), [(1, 0.975, 12.7062), (2, 0.975, 4.3027), (5, 0.998, 5.0302), (9, 0.975, 2.2622), (30, 0.95, 1.6973)])
def test_student_against_a_table(freedom: int, share: float, t: float) -> None:
    """scipy's values."""
    assert student_t(share, freedom) == pytest.approx(t, abs=1e-4)
    assert student_share(t, freedom) == pytest.approx(share, abs=1e-5)


def test_what_is_said_to_be_visible_is_seen_in_four_cases_of_five() -> None:
    random = np.random.default_rng(7)
    change = visible(0.03, PAIRS)
    found = [judge({"x": from_logs(random.normal(math.log1p(change), 0.03, PAIRS))}, {"x": 0.01})["x"].word for _ in range(RUNS)]
    assert 0.75 <= found.count(SLOWER) / RUNS <= 0.85


def test_bootstrap_is_that_of_the_definition() -> None:
    values = np.random.default_rng(7).normal(size=9)
    ours = bootstrap_medians(values, resamples=20_000)
    plain = np.median(np.random.default_rng(8).choice(values, (20_000, 9)), axis=1)
    assert np.quantile(ours, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(plain, [0.025, 0.5, 0.975]), abs=0.05)


@pytest.mark.parametrize(("base", "new"), [([1.0, 2, 3], [4.0, 5]), ([1.0, 1, 2], [1.0, 2, 2, 3]), ([5.0] * 3, [5.0] * 3), ([9.0, 8, 7, 6], [1.0, 2, 3, 4])])
def test_rank_sums_by_counting_every_choice(base: list[float], new: list[float]) -> None:
    both = np.array(base + new)
    ranks = np.array([(both < v).sum() + ((both == v).sum() + 1) / 2 for v in both])
    found = ranks[len(base) :].sum()
    sums = np.array([sum(choice) for choice in itertools.combinations(ranks, len(new))])
    assert rank_sum(np.array(base), np.array(new)) == pytest.approx(min(1, 2 * min((sums <= found).mean(), (sums >= found).mean())))


def test_many_ranks_are_taken_as_normal() -> None:
    random = np.random.default_rng(16)
    for shift in (0.0, 0.3):
        values = random.normal(shift, 1, 60)
        assert rank_sum(values[:30], values[30:]) == pytest.approx(rank_sum(values[:31], values[30:]), rel=0.3, abs=0.05)


def test_slow_drift_cancels_when_runs_interleave() -> None:
    """A machine that gets 30 % slower during the run: A B B A puts each side first as often as last."""
    random = np.random.default_rng(9)
    speed = iter(np.linspace(1, 1.3, 2 * PAIRS))
    base, new = [], []
    for pair in range(PAIRS):
        for side in (base, new) if pair % 2 == 0 else (new, base):
            side.append(list(100 * next(speed) * np.exp(random.normal(0, 0.005, 10))))
    assert word(base, new) == SAME


def test_bimodal_processes() -> None:
    """Half the processes land on a slow core, on either side: no alarm, and not called the same either."""
    random = np.random.default_rng(10)
    found = []
    for _ in range(200):
        slow = np.where(random.random((2, PAIRS)) < 0.5, 1.5, 1.0)
        base, new = ([list(100 * level * np.exp(random.normal(0, 0.01, 10))) for level in side] for side in slow)
        found.append(word(base, new))
    assert found.count(SLOWER) + found.count(FASTER) <= 0.05 * len(found)
    assert found.count(AMBIGUOUS) > 0.5 * len(found)


def test_outliers_do_not_move_a_verdict() -> None:
    random = np.random.default_rng(11)
    base, new = noisy(random, PAIRS, 0.005), noisy(random, PAIRS, 0.005)
    for side, process in ((base, 0), (new, 3), (new, 7)):
        side[process][2] *= 10
    assert word(base, new) == SAME
    new[5] = [value * 10 for value in new[5]]  # a whole process stalled: that pair keeps it from being told, and raises no alarm
    assert word(base, new) == AMBIGUOUS


def test_constant_samples() -> None:
    same = [[5.0] * 10] * PAIRS
    assert word(same, same) == SAME
    assert word(same, [[5.5] * 10] * PAIRS) == SLOWER
    assert word(same, [[4.5] * 10] * PAIRS) == FASTER
    summary = summarise(same)
    assert (summary.mad, summary.ci95, summary.p99) == (0.0, (5.0, 5.0), 5.0)


def test_one_sample_says_nothing() -> None:
    estimate = paired([[100.0]], [[150.0]])
    assert estimate is not None
    verdict = judge({"x": estimate}, {"x": MARGIN})["x"]
    assert (verdict.word, verdict.needed) == (AMBIGUOUS, MIN_PAIRS)
    assert math.isnan(verdict.visible)
    assert summarise([[100.0]]).ci95 is None
    assert detectable([[100.0]]) is None
    assert detectable([[100.0]] * 3) is None, "three processes a side give no verdict, so they can show no change"


@pytest.mark.parametrize("pairs", range(2, MIN_PAIRS))
def test_too_few_pairs_never_decide(pairs: int) -> None:
    """However clear five pairs are, their interval is not a 95 % one."""
    assert word([[100.0]] * pairs, [[200.0]] * pairs) == AMBIGUOUS


def test_not_a_number_and_a_clock_that_went_back_are_dropped() -> None:
    assert usable([1.0, math.nan, -3.0, math.inf, 0.0]) == ([1.0, 0.0], 3)
    base = [[100.0, math.nan, -5.0]] * PAIRS
    assert word(base, [[100.0, 100.0]] * PAIRS) == SAME
    estimate = paired(base, [[math.nan]] + [[111.0]] * (PAIRS - 1))
    assert estimate is not None and estimate.n == PAIRS - 1
    assert paired([[math.nan]], [[1.0]]) is None
    assert unpaired([[math.nan]], [[1.0]]) is None


def test_pairs_needed_settle_it() -> None:
    """What AMBIGUOUS asks for is about enough: with that many pairs, most runs decide."""
    random = np.random.default_rng(12)
    spread, needed = 0.14, []
    for _ in range(50):
        estimate = from_logs(random.normal(0, spread, PAIRS))
        verdict = judge({"x": estimate}, {"x": MARGIN})["x"]
        if abs(math.log(estimate.ratio)) < 0.01:  # near what is true: no change
            assert verdict.word == AMBIGUOUS
            assert verdict.needed is not None and verdict.needed > PAIRS
            needed.append(verdict.needed)
    settled = [judge({"x": from_logs(random.normal(0, spread, int(np.median(needed))))}, {"x": MARGIN})["x"].word == SAME for _ in range(100)]
    assert sum(settled) > 80


def test_a_ratio_on_the_margin_cannot_be_settled() -> None:
    on_it = Estimate(1.05, 0.99, 1.11, 0.3, 10, True)
    assert judge({"x": on_it}, {"x": MARGIN})["x"].needed is not None  # it must leave 1 behind
    below = Estimate(1.0499, 0.99, 1.11, 0.3, 10, True)
    assert judge({"x": below}, {"x": MARGIN})["x"].needed is None


def test_holm_asks_more_of_many_metrics() -> None:
    """A p-value of 0.03 alone is significant; among ten metrics it is not."""
    weak = Estimate(1.08, 1.01, 1.2, 0.03, 10, True)
    none = Estimate(1.0, 0.99, 1.01, 0.9, 10, True)
    assert judge({"x": weak}, {"x": MARGIN})["x"].word == SLOWER
    many = {"x": weak} | {f"y{i}": none for i in range(9)}
    assert judge(many, dict.fromkeys(many, MARGIN))["x"].word == AMBIGUOUS


def test_the_fit_recovers_known_costs() -> None:
    random = np.random.default_rng(13)
    points = [(calls, 40 + 12.5 * calls + float(random.normal(0, 1))) for calls in (5, 10, 20) for _ in range(9)]
    points += [(20, 900.0), (5, 400.0), (10, math.nan)]
    fit = fit_cost(points)
    assert fit is not None
    assert (fit.fixed_ms, fit.per_call_ms) == (pytest.approx(40, abs=1.5), pytest.approx(12.5, abs=0.15))
    assert fit.calls == (5, 10, 20) and fit.residual_ms < 2
    many = fit_cost([(calls, 40 + 12.5 * calls) for calls in (5, 10, 20) for _ in range(40_000)])
    assert many is not None and (many.fixed_ms, many.per_call_ms) == (pytest.approx(40), pytest.approx(12.5))
    exact = fit_cost([(2, 10.0), (4, 14.0)])
    assert exact is not None and (exact.fixed_ms, exact.per_call_ms, exact.residual_ms) == (6.0, 2.0, 0.0)
    assert fit_cost([(2, 10.0), (2, 11.0)]) is None


def test_summary_against_numpy() -> None:
    random = np.random.default_rng(14)
    processes = noisy(random, 5, 0.03)
    pooled = np.concatenate([np.array(p) for p in processes])
    summary = summarise(processes)
    assert (summary.n, summary.processes) == (50, 5)
    assert (summary.p50, summary.p90, summary.p99) == tuple(pytest.approx(np.percentile(pooled, q)) for q in (50, 90, 99))
    assert summary.ci95 is not None and summary.ci95[0] <= np.median([np.median(p) for p in processes]) <= summary.ci95[1]


def test_what_a_run_can_see() -> None:
    random = np.random.default_rng(15)
    quiet, loud = detectable(noisy(random, 5, 0.005)), detectable(noisy(random, 5, 0.2))
    assert quiet is not None and loud is not None and quiet < 0.05 < 0.1 < loud


def test_the_fence_needs_ten_runs() -> None:
    assert fence([1.0] * 9) is None
    assert fence([1.0] * 10) == 1.0
    assert fence([*range(1, 12)]) == pytest.approx(8.5 + 3 * 5)
