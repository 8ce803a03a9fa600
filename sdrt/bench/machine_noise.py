"""How small a change this machine can show: the same work in fresh processes for a while, and the meaning of its
scatter in plain words.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdrt.bench.child import Child, in_fresh_process
from sdrt.bench.environment import environment, load
from sdrt.bench.measure import Request
from sdrt.bench.metrics import METRICS
from sdrt.bench.run import Progress
from sdrt.bench.statistics import MAX_PAIRS, MIN_PAIRS, detectable, paired, usable, visible
from sdrt.bench.throttle import cpu_throttles
from sdrt.bundle.folder import Bundle
from sdrt.errors import CheckFailed

PROCESSES = 12
"""How many processes share the time, if it is long enough. An even number, since neighbours are compared."""
_PAIRS = 10
"""The visible change is stated for a comparison of so many pairs."""
_MARGIN = METRICS["total_ms"].margin
_MOST = 100_000
_COMMAND = "from sdrt.bench.steady_work import serve; serve()"

Measure = Callable[[float], Sequence[float]]
"""Measures in one fresh process for about so many seconds. Returns the durations of the same work."""


@dataclass(frozen=True)
class MachineNoise:
    """What was seen. Shares are relative: 0.04 is 4 %.

    `visible` is the change that ten pairs of processes, run one after the other, could tell from no change.
    `visible_runs` is the same for two runs of as many processes. Both are None if too few processes fit into the time.
    `same` is the ratio of neighbours with its interval: 1 apart from noise.
    """

    work: str
    seconds: float
    processes: int
    samples: int
    within: float | None
    between: float | None
    visible: float | None
    visible_runs: float | None
    same: tuple[float, float, float] | None
    pairs_for_margin: int | None
    load_before: float | None
    load_after: float | None
    steal_s: float | None
    throttles: int | None
    governor: str | None
    cores: int

    @property
    def fit(self) -> bool:
        """Whether the default margin can be judged here with the default number of pairs."""
        return self.visible is not None and self.visible <= _MARGIN

    def words(self) -> list[str]:
        if self.visible is None or self.between is None or self.within is None or self.visible_runs is None:
            return [
                f"cannot tell: only {self.processes} processes fitted into {self.seconds:.0f} s, {MIN_PAIRS} are the"
                " least; give it more time with --check-time"
            ]
        found = [
            (
                f"This machine can see changes of {_percent(self.visible)} or more with {_PAIRS} pairs of processes,"
                f" one after the other, and of {_percent(self.visible_runs)} or more between two runs of"
                f" {self.processes} processes. Those of `sdrt bench ab` take turns, and see less than that."
            ),
            (
                f"Measured: {self.work}, {self.samples} times in {self.processes} processes, {self.seconds:.0f} s in"
                f" all. Times scatter by {self.within:.1%} within a process, and by {self.between:.1%} from process to"
                " process."
            ),
        ]
        if self.same is not None:
            found.append(
                f"Neighbours compared with each other, which should give 1: {self.same[0]:.3f}, 95 % interval"
                f" {self.same[1]:.3f} to {self.same[2]:.3f}."
            )
        steal = "not told" if self.steal_s is None else f"{self.steal_s:.1f} s"
        heat = "not told" if self.throttles is None else f"{self.throttles} times"
        busy = (
            "not told"
            if self.load_before is None or self.load_after is None
            else f"{self.load_before:.1f} before and {self.load_after:.1f} after, on {self.cores} cores"
        )
        found.append(
            f"Load: {busy}. Processor time taken by other guests: {steal}. Throttled: {heat}. Governor:"
            f" {self.governor or 'not told'}."
        )
        if self.fit:
            found.append(f"The default margin of {_MARGIN:.0%} can be judged here.")
        else:
            more = "" if self.pairs_for_margin is None else f"about {self.pairs_for_margin} pairs, or "
            found.append(
                f"Too noisy for the default margin of {_MARGIN:.0%}: it takes {more}a margin of"
                f" {_percent(self.visible)} or more in bench.toml, or a quieter machine."
            )
        return found


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def steady_work(seconds: float) -> Sequence[float]:
    """Work of numpy's in a fresh process, for machines without a bundle."""
    with Child(_COMMAND, {"seconds": seconds}, None, "the machine check") as child:
        found: list[float] = child.answer()["samples"]
    return found


def pictures_of(bundle: Bundle, request: Request) -> Measure:
    """Pictures of a bundle in a fresh process, as `bench run` makes them. Loading comes on top of the seconds that are
    asked for.

    Raises:
        CheckFailed: later, where the pictures are wrong.
    """

    def measure(seconds: float) -> Sequence[float]:
        answer = in_fresh_process(replace(request, pictures=_MOST, limit_s=0.6 * seconds, warm_up_s=0.2 * seconds))
        if not answer["fidelity"]["ok"]:
            raise CheckFailed(
                f"{bundle.path}: the pictures are wrong: {'; '.join(answer['fidelity']['problems'])}",
                "Run: sdrt verify BUNDLE",
            )
        found: list[float] = answer["samples"]["total_ms"]
        return found

    return measure


def machine_noise(
    measure: Measure, work: str, limit_s: float, progress: Progress, *, now: Callable[[], float] = time.monotonic
) -> MachineNoise:
    """Measure in fresh processes, one after the other, until another one like the longest so far would end after
    `limit_s`.

    Raises:
        SdrtError: what a process raised.
    """
    started, before, heat = now(), load(), cpu_throttles()
    groups: list[list[float]] = []
    longest = 0.0
    while len(groups) < PROCESSES and (not groups or now() - started + longest <= limit_s):
        began = now()
        progress(f"process {len(groups) + 1} of at most {PROCESSES}")
        groups.append(usable(measure(0.9 * limit_s / PROCESSES))[0])
        longest = max(longest, now() - began)
    after, seconds = load(), now() - started
    described = environment()
    groups = [group for group in groups if group]
    steal = None if before["steal_s"] is None or after["steal_s"] is None else after["steal_s"] - before["steal_s"]
    throttled = None if heat is None else (cpu_throttles() or heat) - heat
    within, between, runs, visible, same, pairs = _scatter(groups) if len(groups) >= MIN_PAIRS else (None,) * 6
    return MachineNoise(
        work,
        seconds,
        len(groups),
        sum(map(len, groups)),
        within,
        between,
        visible,
        runs,
        same,
        pairs,
        before["load_1min"],
        after["load_1min"],
        steal,
        throttled,
        described["governor"],
        described["affinity"] or described["cores"] or 1,
    )


def _scatter(
    groups: Sequence[Sequence[float]],
) -> tuple[float, float, float | None, float | None, tuple[float, float, float] | None, int | None]:
    """Scatter within and between processes, changes that two runs and ten pairs can see, neighbours' ratio, pairs for
    the default margin.
    """
    logs = [np.log(np.maximum(np.asarray(group), np.finfo(float).tiny)) for group in groups]
    medians = [float(np.median(group)) for group in logs]
    within = statistics.median(
        1.4826 * float(np.median(np.abs(group - middle))) for group, middle in zip(logs, medians, strict=True)
    )  # of a normal's deviation
    runs = detectable(groups)
    pair = paired(groups[0::2][: len(groups) // 2], groups[1::2])
    # Neighbours share their moment, as pairs of `ab` do, so their differences tell what pairs see.
    per_pair = math.sqrt(statistics.fmean((medians[i] - medians[i + 1]) ** 2 for i in range(0, len(medians) - 1, 2)))
    needed = next((pairs for pairs in range(MIN_PAIRS, MAX_PAIRS + 1) if visible(per_pair, pairs) <= _MARGIN), None)
    same = (pair.ratio, pair.low, pair.high) if pair is not None else None
    return within, statistics.stdev(medians), runs, visible(per_pair, _PAIRS), same, needed
