"""Runs a benchmark: for one bundle, fresh processes one after the other; for two bundles, pairs of processes side by
side.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sdrt import __version__
from sdrt.bench.child import in_fresh_process
from sdrt.bench.compare import Comparison, compare
from sdrt.bench.environment import environment, git_revision, load
from sdrt.bench.measure import Request
from sdrt.bench.metrics import Gates
from sdrt.bench.result import Document, assemble
from sdrt.bench.statistics import MIN_PAIRS
from sdrt.bench.turns import Answers, Pairs
from sdrt.bundle.folder import Bundle
from sdrt.bundle.manifest import WEIGHTS

Measure = Callable[[Request], Mapping[str, Any]]
"""Measures one bundle in one process and returns the answer of that process."""
MeasurePair = Callable[[Request, Request, int], Answers]
"""Measures the pair with this number: the old side and the new one."""
Progress = Callable[[str], None]


def run(
    bundle: Bundle, request: Request, processes: int, progress: Progress, measure: Measure = in_fresh_process
) -> Document:
    """Measure a bundle in `processes` fresh processes, one after the other. The first one also profiles the layers.

    Raises:
        SdrtError: a process raised it.
    """
    before = load()
    answers = []
    for index in range(processes):
        progress(f"process {index + 1} of {processes}")
        answers.append(measure(replace(request, process=index, layers=request.layers and index == 0)))
    return document_of(bundle, request, answers, before)


def side_by_side(
    old: tuple[Bundle, Request],
    new: tuple[Bundle, Request],
    gates: Gates,
    progress: Progress,
    *,
    max_s: float,
    measure: MeasurePair | None = None,
) -> Comparison:
    """Measure two bundles in pairs of fresh processes that take turns. Judge after each pair, until the verdict is
    settled.

    At least MIN_PAIRS are made, unless `gates.pairs` asks for fewer. No pair is begun that would end after `max_s`.
    `sdrt.bench.statistics` says why judging after every pair raises no false alarms. Bundles that cannot be compared
    are found before anything is measured; the comparison then has no rows.

    Raises:
        SdrtError: a process raised it.
    """
    started, before = time.monotonic(), load()
    answers: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] = ([], [])

    def compared(sides: Sequence[Sequence[Mapping[str, Any]]], notes: Sequence[str] = ()) -> Comparison:
        base, changed = (document_of(*side, found, before) for side, found in zip((old, new), sides, strict=True))
        return compare(base, changed, gates, interleaved=True, notes=notes)

    def agree(found: Answers) -> None:
        nothing = {"samples": {}, "counters": {}, "fidelity": {"ok": True, "checks": [], "problems": []}}
        if (result := compared([[{**one, **nothing}] for one in found])).different:
            raise _NotComparable(result)

    pairs = Pairs(agree)
    make = measure or pairs
    progress(f"at most {gates.pairs} pairs of processes")
    try:
        while True:
            for side, answer in zip(answers, make(old[1], new[1], len(answers[0])), strict=True):
                side.append(answer)
            done = len(answers[0])
            notes = [f"processes ran one after the other, which tells less: {pairs.alone}"] if pairs.alone else []
            result = compared(answers, notes)
            progress(
                f"pair {done}:"
                f" {'; '.join(_so_far(result)) or 'nothing gated is timed'}{f' ({pairs.alone})' if pairs.alone else ''}"
            )
            settled = done >= MIN_PAIRS and (result.failures or not result.undecided)
            taken = time.monotonic() - started
            if (
                settled
                or result.different
                or done >= gates.pairs
                or (done >= MIN_PAIRS and taken * (done + 1) / done > max_s)
            ):
                return result
    except _NotComparable as found:
        return found.comparison


class _NotComparable(Exception):
    """Ends a measurement of two bundles that cannot be compared."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison


def _so_far(result: Comparison) -> list[str]:
    """What is known so far about each gated timing."""
    rows = [
        row
        for row in result.rows
        if row.gated and row.ratio is not None and row.low is not None and row.high is not None
    ]
    return [
        f"{row.name} {row.ratio:.3f}"
        + (f" [{row.low:.3f}, {row.high:.3f}] {row.verdict}" if row.n >= MIN_PAIRS else "")
        for row in rows
    ]


def document_of(
    bundle: Bundle, request: Request, answers: Sequence[Mapping[str, Any]], before: Mapping[str, Any]
) -> Document:
    """The result document, made from the answers of the processes."""
    manifest, parameters, engine = bundle.manifest, answers[0]["parameters"], answers[0]["engine"]
    settings = {
        name: getattr(request, name)
        for name in (
            "scenario",
            "steps",
            "cfg",
            "sampler",
            "schedule",
            "prompt",
            "negative",
            "seed",
            "batch",
            "threads",
            "pictures",
            "limit_s",
            "warm_up_s",
        )
    }
    if request.scenario == "server":
        settings |= {name: getattr(request, name) for name in ("rate", "duration_s", "queue")}
    if request.prompts:
        settings |= {
            "prompt": request.prompts[0],
            "prompts": {
                "count": len(request.prompts),
                "sha256": hashlib.sha256("\n".join(request.prompts).encode()).hexdigest(),
            },
        }
    config = settings | {
        "size": list(parameters["size"]),
        "sampler": parameters["sampler"],
        "schedule": parameters["schedule"],
        "processes": len(answers),
    }
    after = load()
    env = environment() | {
        "gpu": None if engine.get("device") == "cpu" else engine.get("device"),
        "load_before": before["load_1min"],
        "load_after": after["load_1min"],
    }
    env |= _gpu_environment(answers[0].get("machine", {}).get("gpu") or {})
    env["steal_s"] = (
        None
        if before["steal_s"] is None or after["steal_s"] is None
        else round(after["steal_s"] - before["steal_s"], 3)
    )
    identity = {
        "id": uuid.uuid4().hex,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "tool": {"sdrt": __version__, "git": git_revision()},
        "bundle": {
            "name": manifest.name,
            "family": manifest.family,
            "precision": manifest.precision,
            "weights": manifest.files[WEIGHTS].sha256,
            "sha256": _digest(bundle),
            "lora": [source.name for source in manifest.sources if source.kind == "lora"],
        },
        "config": config,
        "env": env,
    }
    document = assemble(answers, identity, _busy(env))
    document["packages"] = answers[0].get("packages", [])
    if layers := next((answer["layers"] for answer in answers if answer.get("layers")), None):
        document["layers"] = layers
    return document


def _gpu_environment(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What NVML says about the GPU. Results are comparable if the driver's major version, `gpu_driver`, is equal."""
    driver = identity.get("driver")
    found = {f"gpu_{name}": value for name, value in identity.items() if name != "driver"}
    return found | ({"gpu_driver": driver.partition(".")[0], "gpu_driver_version": driver} if driver else {})


def _busy(env: Mapping[str, Any]) -> list[str]:
    cores = env["affinity"] or env["cores"] or 1
    found = []
    if env["load_before"] is not None and env["load_before"] > 0.5 * cores:
        found.append(
            f"the machine was busy before the run: load {env['load_before']:.1f} on {cores} cores; prefer `sdrt bench"
            " ab`, which interleaves"
        )
    if env["steal_s"] and env["steal_s"] > 1:
        found.append(f"other guests of this machine took {env['steal_s']:.1f} s of processor time during the run")
    if (others := (env.get("gpu_processes") or 1) - 1) > 0:
        found.append(f"{others} other programs had the GPU open")
    return found


def _digest(bundle: Bundle) -> str:
    """A hash of the hashes of all files of the bundle."""
    text = json.dumps({name: record.sha256 for name, record in bundle.manifest.files.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
