"""Bench the emoji model, keep the project's own history, and time the instruments alone.

Adds a line to benchmarks/history/history.jsonl and ends with exit code 1 if the newest run lies beyond the fence of earlier ones on the same machine. Lines are
comparable only within one machine and engine; `sdrt bench trend benchmarks/history` shows them.
Usage: python benchmarks/run.py [--history DIR] [--processes N] [--pictures N] [--instruments-only] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "emoji"
LIMIT_US = 50.0


def instruments_us_per_step(calls: int = 20_000, rounds: int = 9) -> float:
    """Microseconds that timing adds to a model call: the same empty call with the wrapper and without, in turn; the median of rounds."""
    from sdrt.bench.instruments import Readings, TimedBatch

    bare: Any = SimpleNamespace(step=lambda: None, latents=None, denoised=None, decode=None)
    costs = []
    for _ in range(rounds):
        timed = TimedBatch(bare, Readings())
        spans = []
        for step in (bare.step, timed.step):
            started = time.perf_counter()
            for _ in range(calls):
                step()
            spans.append(time.perf_counter() - started)
        costs.append((spans[1] - spans[0]) / calls * 1e6)
    return statistics.median(costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=Path, default=ROOT / "benchmarks" / "history")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--instruments-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cost = instruments_us_per_step()
    report: dict[str, Any] = {"instruments_us_per_step": cost, "limit_us": LIMIT_US, "ok": cost <= LIMIT_US}
    if not arguments.json:
        print(f"instruments per step: {cost:.2f} us, limit {LIMIT_US:g} us {'ok' if cost <= LIMIT_US else 'OVER'}", flush=True)
    if not arguments.instruments_only:
        sdrt = [sys.executable, "-m", "sdrt.cli"]
        with tempfile.TemporaryDirectory() as temporary:
            bundle = Path(temporary) / "emoji.sdrt"
            subprocess.run(
                [*sdrt, "build", "--checkpoint", str(EMOJI / "emoji.safetensors"), "--target", "onnxruntime", "--output", str(bundle)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            settings = ["--cfg", "3", "--prompt", "red apple", "--processes", str(arguments.processes), "--pictures", str(arguments.pictures)]
            run = [*sdrt, "bench", "run", str(bundle), *settings, "--history", str(arguments.history), "--json"]
            result = json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE).stdout)
        report |= {"stats": result["stats"], "counters": result["counters"], "warnings": result["warnings"]}
        if not arguments.json and subprocess.run([*sdrt, "bench", "trend", str(arguments.history), "--check"], check=False).returncode:
            sys.exit(1)
    if arguments.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
