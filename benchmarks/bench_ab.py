"""Ask `sdrt bench ab` what is known: a bundle beside itself, and beside itself with every model call made longer by a share of its own time.

Each run is a line of --output, so that a stopped script goes on where it was. It ends with how often each verdict came, after how many seconds and pairs.
The longer calls are made in one of the two processes by a `sitecustomize.py` of this script; the product knows nothing of it.
Usage: python benchmarks/bench_ab.py BUNDLE.sdrt [--runs N] [--change X ...] [--steps N] [--cfg X] [--threads N] [--backend NAME] [--output FILE.jsonl] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sdrt.bench.measure import Request
from sdrt.bench.metrics import Gates
from sdrt.bench.run import side_by_side
from sdrt.bundle.folder import open_bundle

SLOWER = """
import os, time
from sdrt.bench import instruments
begin, share = instruments.TimedBatch.__init__, float(os.environ["SLOWER"])
def slowed(self, *arguments):
    begin(self, *arguments)
    step = self._step
    def longer():
        started = time.perf_counter()
        step()
        end = started + (time.perf_counter() - started) * (1 + share)
        while time.perf_counter() < end:
            pass
    self._step = longer
instruments.TimedBatch.__init__ = slowed
"""


def interpreter(folder: Path, share: float) -> str:
    """A Python whose model calls take longer by a share."""
    (folder / "sitecustomize.py").write_text(SLOWER)
    path = folder / f"python-{share:g}"
    places = os.pathsep.join([str(folder), *map(os.path.abspath, filter(None, sys.path))])
    path.write_text(f"#!/bin/sh\nSLOWER={share} PYTHONPATH='{places}' exec '{sys.executable}' \"$@\"\n")
    path.chmod(0o755)
    return str(path)


def measured(bundle: Path, arguments: argparse.Namespace, change: float) -> dict[str, Any]:
    opened, started, pairs = open_bundle(bundle), time.monotonic(), [0]

    def progress(text: str) -> None:
        pairs[0] += text.startswith("pair ")
        print(f"  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            str(bundle.absolute()), steps=arguments.steps, cfg=arguments.cfg, threads=arguments.threads, backend=arguments.backend, pictures=20, limit_s=5.0
        )  # fmt: skip
        sides = [(opened, Request(**{**vars(request), "python": interpreter(Path(folder), share)})) for share in (0.0, change)]
        found = side_by_side(*sides, Gates(), progress, max_s=900.0)
    gated = {row.name: row for row in found.rows if row.gated and row.ratio is not None and row.low is not None}
    return {
        "change": change, "exit_code": found.exit_code, "pairs": pairs[0], "seconds": round(time.monotonic() - started, 1), "load": os.getloadavg()[0],
        "verdicts": {name: row.verdict for name, row in gated.items()}, "ratios": {name: [row.ratio, row.low, row.high] for name, row in gated.items()},
        "headline": found.headline,
    }  # fmt: skip


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each change: how often each exit code came, and the medians of seconds and pairs."""
    changes = sorted({line["change"] for line in lines})
    of_change = {change: [line for line in lines if line["change"] == change] for change in changes}
    return {
        f"{change:.1%}": {
            "runs": len(found),
            "exit_codes": dict(sorted(Counter(str(line["exit_code"]) for line in found).items())),
            "seconds": statistics.median(line["seconds"] for line in found),
            "most_seconds": max(line["seconds"] for line in found),
            "pairs": statistics.median(line["pairs"] for line in found),
            "load": [min(line["load"] for line in found), max(line["load"] for line in found)],
        }
        for change, found in of_change.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=10, help="of each change")
    parser.add_argument("--change", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=7.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--output", type=Path, default=Path("bench_ab.jsonl"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    for run in range(arguments.runs):
        for change in arguments.change:
            if sum(line["change"] == change for line in lines) > run:
                continue
            print(f"run {run + 1} of {arguments.runs}, {change:.1%} slower", file=sys.stderr, flush=True)
            lines.append(measured(arguments.bundle, arguments, change))
            with arguments.output.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    found = summary([line for line in lines if line["change"] in arguments.change])
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(f"{change} slower: {told}" for change, told in found.items()))


if __name__ == "__main__":
    main()
