"""Scenarios: warming up, repeating, and a server by hand and by queueing theory, on a clock of their own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_documents import IDENTITY, answer
from bench_fakes import FakeEngine, FakePipe, FakeTime

from sdrt.bench import measure
from sdrt.bench.instruments import Readings, TimedEngine
from sdrt.bench.measure import Request
from sdrt.bench.result import assemble
from sdrt.bench.scenarios import attained_rate, poisson_arrivals, repeat, serve, warm_up


def test_warm_up_ends_once_three_medians_agree() -> None:
    time, cost = FakeTime(), iter([9.0, 8, 7, 5, 5.2, 4.9, 5.05, 5, 5, 5, 5.02, 5, 1, 1, 1])

    def picture() -> float:
        time.sleep(seconds := next(cost))
        return seconds

    done = warm_up(picture, limit_s=1000, now=time.seconds)
    assert done.stable and done.pictures == 12
    assert done.seconds == pytest.approx(9 + 8 + 7 + 5 + 5.2 + 4.9 + 5.05 + 5 + 5 + 5 + 5.02 + 5)


def test_warm_up_that_never_settles_ends_at_its_limit() -> None:
    time, random = FakeTime(), np.random.default_rng(0)

    def picture() -> float:
        time.sleep(seconds := float(random.uniform(0.5, 2)))
        return seconds

    done = warm_up(picture, limit_s=30, now=time.seconds)
    assert not done.stable and 30 <= done.seconds < 32


def test_repeating_stops_at_its_limit_but_makes_one() -> None:
    time = FakeTime()
    made = 0
    for _ in repeat(100, limit_s=2.5, now=time.seconds):
        time.sleep(1)
        made += 1
    assert made == 3
    assert list(repeat(5, limit_s=0, now=time.seconds)) == [0]
    assert list(repeat(5, limit_s=1, now=time.seconds)) == [0, 1, 2, 3, 4]


def test_poisson_arrivals_have_the_rate_and_its_spread() -> None:
    counts = [len(poisson_arrivals(2.0, 50, seed)) for seed in range(200)]
    assert np.mean(counts) == pytest.approx(100, abs=3)
    assert np.var(counts) == pytest.approx(100, rel=0.3)  # the variance of a Poisson count is its mean
    times = poisson_arrivals(2.0, 50, 1)
    assert times == sorted(times) == poisson_arrivals(2.0, 50, 1) and times[0] > 0 and times[-1] < 50


def test_a_server_by_hand() -> None:
    """Pictures take 1 s, one may wait: of four that come while the first is made, one waits and three are rejected."""
    time = FakeTime()
    requests = serve([0.5, 0.6, 0.7, 0.8, 0.9, 5.0], lambda: time.sleep(1), queue=1, now=time.seconds, sleep=time.sleep)
    assert [(r.arrived, r.started, r.ended) for r in requests] == [
        (0.5, 0.5, 1.5), (0.6, 1.5, 2.5), (0.7, None, None), (0.8, None, None), (0.9, None, None), (5.0, 5.0, 6.0),
    ]  # fmt: skip
    assert attained_rate(requests) == pytest.approx(3 / 5.5)
    assert attained_rate(serve([], lambda: None, queue=1, now=time.seconds, sleep=time.sleep)) == 0.0


def test_a_server_without_a_queue_takes_only_who_finds_it_free() -> None:
    time = FakeTime()
    requests = serve([0.0, 0.5, 1.0, 1.2], lambda: time.sleep(0.9), queue=0, now=time.seconds, sleep=time.sleep)
    assert [r.started for r in requests] == [0.0, None, 1.0, None]


def test_queueing_is_that_of_theory() -> None:
    """M/D/1 at a load of 0.5: the mean wait is rho / (2 (1 - rho)) services (Pollaczek and Khinchine)."""
    time = FakeTime()
    requests = serve(
        poisson_arrivals(0.5, 40_000, 3), lambda: time.sleep(1), queue=10_000, now=time.seconds, sleep=time.sleep
    )
    waits = [r.started - r.arrived for r in requests if r.started is not None]
    assert len(waits) == len(requests) and np.mean(waits) == pytest.approx(0.5, rel=0.05)


def test_the_server_scenario_reports_what_it_attained(monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=time.seconds, sleep=time.sleep))
    readings = Readings(clock=time)
    pipe: Any = FakePipe(TimedEngine(FakeEngine(time, 10.0), readings), time)
    request = Request("fake", steps=20, rate=6.0, duration_s=30, queue=2)  # 0.214 s a picture: more than it can serve
    found = measure._serve(request, measure._Sampler(pipe, readings, request))
    assert found["completed"] + found["rejected"] == found["arrivals"] and found["rejected"] > 0
    assert found["attained_per_s"] < 1 / 0.214 < found["offered_per_s"]
    assert max(found["samples"]["queue_ms"]) <= 3 * 214
    document = assemble([answer(np.random.default_rng(0)) | {"server": found}], IDENTITY, [])
    assert document["server"]["rejected"] == found["rejected"]
