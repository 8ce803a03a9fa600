"""How many CPU threads a pipeline should take, and whether they should spin: pictures a second, processor time a
picture and time a step, idle and busy.

For every choice of backend, threads and waiting, fresh processes in a new order each round draw pictures of one bundle
for a while; beside half of the rounds `--load` other processes keep the cores busy. A choice's figures are medians over
its rounds, and its ratio to the first choice of the list (what is the default now) is taken within a round. Processor
time a picture tells spinning (it grows) from waiting for a thread that lost its core (it stays, and the picture takes
longer).
Usage: python benchmarks/studies/threads.py BUNDLE.sdrt... [--backends openvino,onnxruntime] [--rounds 4] [--seconds 10]
[--load 2N] [--json FILE] Give it the emoji bundle and one of Stable Diffusion 1.5's size (benchmarks/make_checkpoint.py
makes the checkpoint), on a machine that does nothing else: 2 bundles x 2 backends x 3 choices x 8 rounds of 10 s and
their starts take 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, time
from sdrt.runtime import Pipeline
bundle, backend, threads, cores, seconds = sys.argv[1:]
with Pipeline.load(bundle, backend=backend, threads=int(threads) or None, cores=cores) as pipe:
    pipe("red apple", steps=2, cfg=3.0, seed=1)
    steps, pictures, cpu, started = [], 0, time.process_time(), time.perf_counter()
    while not pictures or time.perf_counter() - started < float(seconds):
        steps += pipe("red apple", steps=4, cfg=3.0, seed=1).timings_ms["steps"]
        pictures += 1
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(json.dumps({"pictures_s": pictures / wall, "cpu_s": cpu / pictures, "step_ms": sorted(steps)[len(steps) // 2]}))
"""


@dataclass(frozen=True)
class Choice:
    """How a process computes: `threads` 0 leaves the number to the engine; `cores` own or shared."""

    bundle: str
    backend: str
    threads: int
    cores: str


@dataclass(frozen=True)
class Sample:
    """One process: whether the cores were `busy`, pictures of 4 steps a second, processor seconds a picture, the median
    step in milliseconds.
    """

    choice: Choice
    busy: bool
    round: int
    pictures_s: float
    cpu_s: float
    step_ms: float


def _burn() -> None:
    while True:
        sum(range(10_000))


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep `processes` cores busy meanwhile."""
    context = multiprocessing.get_context("spawn")
    burning = [context.Process(target=_burn, daemon=True) for _ in range(processes)]
    for process in burning:
        process.start()
    try:
        time.sleep(1 if burning else 0)
        yield
    finally:
        for process in burning:
            process.kill()
            process.join()


def measured(choice: Choice, seconds: float) -> dict[str, float]:
    arguments = [choice.bundle, choice.backend, str(choice.threads), choice.cores, str(seconds)]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{choice}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def choices(bundle: str, backend: str) -> list[Choice]:
    """The default first; the same number of threads that sleep; one thread."""
    return [Choice(bundle, backend, 0, "own"), Choice(bundle, backend, 0, "shared"), Choice(bundle, backend, 1, "own")]


def table(samples: list[Sample]) -> list[dict[str, Any]]:
    """For each choice, idle and busy: medians, and the ratio of pictures a second to the first choice of its bundle and
    backend, smallest to largest.
    """
    rows = []
    for choice, busy in dict.fromkeys((sample.choice, sample.busy) for sample in samples):
        own = {sample.round: sample for sample in samples if (sample.choice, sample.busy) == (choice, busy)}
        first = choices(choice.bundle, choice.backend)[0]
        base = {sample.round: sample for sample in samples if (sample.choice, sample.busy) == (first, busy)}
        ratios = sorted(own[i].pictures_s / base[i].pictures_s for i in own.keys() & base.keys())
        medians = {
            name: statistics.median(getattr(sample, name) for sample in own.values())
            for name in ("pictures_s", "cpu_s", "step_ms")
        }
        rows.append(
            {**asdict(choice), "busy": busy, **medians, "ratio": [ratios[0], statistics.median(ratios), ratios[-1]]}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--backends", default="openvino,onnxruntime")
    parser.add_argument("--rounds", type=int, default=4, help="of each kind, idle and busy")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--load", type=int, default=2 * (os.cpu_count() or 1), help="processes that keep cores busy")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    each = [
        choice
        for bundle in given.bundles
        for backend in given.backends.split(",")
        for choice in choices(str(bundle), backend)
    ]
    samples: list[Sample] = []
    for number in range(given.rounds):
        for busy in (False, True):
            with load(given.load if busy else 0):
                for choice in random.sample(each, len(each)):
                    samples.append(Sample(choice, busy, number, **measured(choice, given.seconds)))
                    print(json.dumps(asdict(samples[-1])), file=sys.stderr, flush=True)
    rows = table(samples)
    if given.json:
        given.json.write_text(
            json.dumps(
                {"cores": os.cpu_count(), "rows": rows, "samples": [asdict(sample) for sample in samples]}, indent=1
            )
            + "\n"
        )
    print(
        f"{'bundle':20} {'backend':12} {'threads':>7} {'cores':7} {'':5} {'pictures/s':>10} {'cpu s':>8} {'step ms':>8}"
        "  of the default"
    )
    for row in rows:
        low, middle, high = row["ratio"]
        print(
            f"{Path(row['bundle']).name:20} {row['backend']:12} {row['threads'] or 'auto':>7} {row['cores']:7}"
            f" {'busy' if row['busy'] else 'idle':5} {row['pictures_s']:10.3f} {row['cpu_s']:8.2f}"
            f" {row['step_ms']:8.1f}  {middle:.2f} [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
