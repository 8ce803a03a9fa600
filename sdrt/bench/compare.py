"""Judges two results: which metrics changed, and what that means for a gate. `bench compare` compares two files, `bench
ab` two interleaved runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sdrt.bench.metrics import METRICS, UNPAIRED_FACTOR, Gates
from sdrt.bench.result import COMPARABLE, ran
from sdrt.bench.statistics import AMBIGUOUS, MIN_PAIRS, SAME, SLOWER, Estimate, judge, paired, summarise, unpaired
from sdrt.errors import InconclusiveError, NotComparableError, printable

UP, DOWN, MISSING, NEW = "UP", "DOWN", "MISSING", "NEW"

LATENTS_LIMIT = {"fp32": 1e-2, "half": 0.2}
"""Largest relative difference of final latents from the same weights and seed. Rounding errors grow along a
trajectory.
"""
PSNR_LIMIT_DB = {"fp32": 40.0, "half": 22.0}


@dataclass(frozen=True)
class Row:
    """One metric or counter of both sides. `base` and `new` are medians. `low` and `high` are the 95 % interval of
    `ratio`.

    `needed` is how many pairs (or processes per side) would settle an AMBIGUOUS verdict, None if no number would.
    `visible` is the smallest change that this run can see. A row that is not `judged` never fails, because its two
    sides are not comparable.
    """

    name: str
    unit: str
    verdict: str
    gated: bool
    margin: float
    base: float | None
    new: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    needed: int | None = None
    visible: float | None = None
    judged: bool = True

    @property
    def failed(self) -> bool:
        return self.judged and (self.verdict == MISSING or (self.gated and self.verdict in (SLOWER, UP)))


@dataclass(frozen=True)
class Comparison:
    """`problems` are reasons to fail beside the rows: lost fidelity. `different` are fields that make the two results
    not comparable, where a comparison was forced. `ran` says which engine and shapes ran.
    """

    base: Mapping[str, Any]
    new: Mapping[str, Any]
    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    interleaved: bool
    different: tuple[str, ...] = ()

    @property
    def ran(self) -> str:
        return ran(self.new)

    @property
    def failures(self) -> list[str]:
        return [*self.problems, *(f"{row.name} {row.verdict}" for row in self.rows if row.failed)]

    @property
    def undecided(self) -> list[Row]:
        return [row for row in self.rows if row.gated and row.verdict == AMBIGUOUS]

    @property
    def exit_code(self) -> int:
        if self.different:
            return NotComparableError.exit_code
        return 1 if self.failures else InconclusiveError.exit_code if self.undecided else 0

    @property
    def headline(self) -> str:
        if self.different:
            return f"NOT COMPARABLE, no verdict: {listed(self.different)}"
        if self.failures:
            return "FAILED: " + "; ".join(self.failures)
        if self.undecided:
            return "AMBIGUOUS: " + "; ".join(
                f"{row.name}: {what_settles(row, self.interleaved)}" for row in self.undecided
            )
        better = [f"{row.name} {row.verdict}" for row in self.rows if row.gated and row.verdict not in (SAME, NEW)]
        return "PASSED" + (": " + "; ".join(better) if better else ": nothing gated has changed")


def what_settles(row: Row, interleaved: bool) -> str:
    """What would settle an AMBIGUOUS metric, in words."""
    unit = "pairs" if interleaved else "processes a side"
    if interleaved and row.n < MIN_PAIRS:
        return f"{row.n} pairs decide nothing, {MIN_PAIRS} are the least"
    seen = "" if row.visible is None else f"; this run can see changes of {row.visible:.1%} or more"
    if row.needed is None:
        return f"its ratio is too near the margin for any number of {unit} to settle{seen}"
    return f"cannot tell, about {row.needed} {unit} would{seen}"


def different_fields(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two results differ so that they cannot be compared, with both values."""
    found = []
    for part, names in COMPARABLE.items():
        for name in names:
            one, other = base[part].get(name), new[part].get(name)
            if one != other:
                found.append(printable(f"{part}.{name}: {one!r} and {other!r}"))
    return found


def listed(different: Sequence[str]) -> str:
    return "; ".join(different[:5]) + (f" and {len(different) - 5} more" if len(different) > 5 else "")


def compare(
    base: Mapping[str, Any],
    new: Mapping[str, Any],
    gates: Gates,
    *,
    interleaved: bool,
    identical: bool = False,
    force: bool = False,
    notes: Sequence[str] = (),
) -> Comparison:
    """Judge `new` against `base`. `interleaved` says that process i of both sides ran at the same time. `identical`
    says that both are one file.

    Two results that measured different things are not judged. Then `different` names the fields, and there are no rows.
    With `force` there are rows, but no verdict on the whole.
    """
    different = different_fields(base, new)
    if different and not force:
        return Comparison(base, new, (), (), tuple(notes), interleaved, tuple(different))
    problems = [
        f"fidelity of {side}: {problem}"
        for side, document in (("base", base), ("new", new))
        for problem in fidelity_problems(document)
    ]
    if not identical and not different:
        problems += drift(base, new)
    rows = [
        *_metric_rows(base, new, gates, interleaved, identical),
        *_counter_rows(base["counters"], new["counters"], gates),
    ]
    said = list(notes)
    if identical:
        said.append("the two files are identical, so everything is SAME")
    elif not interleaved:
        said.append(
            f"two separate runs: margins of timings are {UNPAIRED_FACTOR:g} times those of interleaved runs (sdrt"
            " bench ab)"
        )
    if different:
        said += [*(f"not comparable: {field}" for field in different), *problems]
        rows = [replace(row, gated=False, judged=False) for row in rows]
    return Comparison(base, new, tuple(rows), tuple(problems), tuple(said), interleaved, tuple(different))


def _metric_rows(
    base: Mapping[str, Any], new: Mapping[str, Any], gates: Gates, interleaved: bool, identical: bool
) -> list[Row]:
    estimates: dict[str, Estimate] = {}
    rows: dict[str, Row] = {}
    names = [*METRICS, *(name for side in (base, new) for name in side["samples"] if name not in METRICS)]
    for name in dict.fromkeys(names):
        old, now = base["samples"].get(name), new["samples"].get(name)
        gate, unit = gates.metric(name), METRICS[name].unit if name in METRICS else ""
        if old is None and now is None:
            continue
        medians = (summarise(old).p50 if old else None, summarise(now).p50 if now else None)
        margin = gate.margin if interleaved else gate.margin * UNPAIRED_FACTOR
        if old is None or now is None:
            rows[name] = Row(name, unit, NEW if old is None else MISSING, gate.gated, margin, *medians)
            continue
        if identical:
            rows[name] = Row(name, unit, SAME, gate.gated, margin, *medians, 1.0, 1.0, 1.0, len(old))
            continue
        estimate = paired(old, now) if interleaved else unpaired(old, now)
        rows[name] = Row(name, unit, AMBIGUOUS, gate.gated, margin, *medians)
        if estimate is not None:
            estimates[name] = estimate
    for gated in (True, False):  # metrics that are only reported must not make the gated ones harder to judge
        group = {name: estimate for name, estimate in estimates.items() if rows[name].gated is gated}
        for name, verdict in judge(group, {name: rows[name].margin for name in group}).items():
            row, estimate = rows[name], estimates[name]
            visible = verdict.visible if math.isfinite(verdict.visible) else None
            rows[name] = Row(
                name,
                row.unit,
                verdict.word,
                row.gated,
                row.margin,
                row.base,
                row.new,
                estimate.ratio,
                estimate.low,
                estimate.high,
                estimate.n,
                verdict.needed,
                visible,
            )
    return list(rows.values())


def _counter_rows(base: Mapping[str, int], new: Mapping[str, int], gates: Gates) -> list[Row]:
    rows = []
    for name in dict.fromkeys([*base, *new]):
        gate, old, now = gates.counter(name), base.get(name), new.get(name)
        unit = "bytes" if name.endswith("_bytes") else "count"
        if old is None or now is None:
            verdict = NEW if old is None else MISSING
        elif now > old * (1 + gate.margin):
            verdict = UP
        else:
            verdict = DOWN if now < old * (1 - gate.margin) else SAME
        rows.append(
            Row(name, unit, verdict, gate.gated, gate.margin, old, now, now / old if old and now is not None else None)
        )
    return rows


def fidelity_problems(document: Mapping[str, Any]) -> list[str]:
    """Why a result is no valid measurement: its pictures are wrong."""
    fidelity = document["fidelity"]
    return (
        []
        if fidelity["ok"]
        else [printable(str(problem)) for problem in fidelity.get("problems", [])] or ["its checks failed"]
    )


def drift(base: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How the fixed-seed picture changed between two results with the same weights. Empty if the weights differ."""
    old, now = base["fidelity"].get("picture"), new["fidelity"].get("picture")
    if (
        not old
        or not now
        or base["bundle"].get("weights") is None
        or base["bundle"].get("weights") != new["bundle"].get("weights")
    ):
        return []
    exact = "fp32" if base["engine"].get("compute") == new["engine"].get("compute") == "fp32" else "half"
    a, b = (np.asarray(side["latents_sketch"], np.float64) for side in (old, now))
    error = float(np.linalg.norm(a - b) / (np.linalg.norm(a) or 1.0)) if a.shape == b.shape else math.inf
    found = []
    if not error <= LATENTS_LIMIT[exact]:
        found.append(
            f"latents of seed {old.get('seed')} moved by {error:.2g} of their size, expected at most"
            f" {LATENTS_LIMIT[exact]:g}"
        )
    a, b = (np.asarray(side["pixels_sketch"], np.float64) for side in (old, now))
    mean_square = float(((a - b) ** 2).sum() / max(old["values"], 1)) if a.shape == b.shape else math.inf
    psnr = (
        math.inf
        if mean_square == 0
        else -math.inf
        if math.isinf(mean_square)
        else 10 * math.log10(255**2 / mean_square)
    )
    if not psnr >= PSNR_LIMIT_DB[exact]:
        found.append(
            f"the picture of seed {old.get('seed')} moved: about {psnr:.0f} dB, expected at least"
            f" {PSNR_LIMIT_DB[exact]:g}"
        )
    return found
