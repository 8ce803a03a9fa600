"""Run a bundle for long: pictures of changing size, sampler and batch from several threads, with random cancels and
errors in between.

Every picture must be the one that its settings gave before, alone in one thread; resident memory must not grow, and
file descriptors and threads stay.
Usage: python benchmarks/checks/soak.py BUNDLE.sdrt [--pictures 500] [--threads 4] [--seed 0] [--backend onnxruntime]
[--json]. Exit code 1 if a limit is not kept.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdrt.errors import UsageError
from sdrt.runtime import Pipeline

RSS_LIMIT_BYTES = 10_000
SETTINGS: tuple[Mapping[str, Any], ...] = tuple(
    {
        "prompt": prompt,
        "sampler": sampler,
        "size": size,
        "batch": batch,
        "count": count,
        "steps": 3,
        "cfg": cfg,
        "seed": 100 * i,
    }
    for i, (prompt, sampler, size, batch, count, cfg) in enumerate(
        [
            ("red apple", "euler", (64, 64), 1, 1, 3.0),
            ("teddy bear", "euler_a", (64, 64), 2, 3, 3.0),
            ("", "heun", (96, 64), 1, 1, 1.0),
            ("blue car", "dpmpp_2m", (64, 128), 1, 2, 5.0),
            ("tree", "ddim", (128, 64), 2, 2, 3.0),
            ("a cat", "euler_a", (72, 88), 1, 1, 7.0),
        ]
    )
)


@dataclass(frozen=True)
class Report:
    """`wrong` names pictures that were not the expected ones. Memory growth is the median slope over the last four
    fifths, in bytes per picture.
    """

    pictures: int
    cancelled: int
    refused: int
    wrong: tuple[str, ...]
    rss_bytes_per_picture: float
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    wall_s: float

    @property
    def ok(self) -> bool:
        return (
            not self.wrong
            and self.rss_bytes_per_picture < RSS_LIMIT_BYTES
            and len({*self.descriptors}) == 1
            and len({*self.threads}) == 1
        )


def soak(bundle: Path, pictures: int, threads: int, seed: int, backend: str = "onnxruntime") -> Report:
    """Make at least `pictures` pictures from `threads` threads that share one pipeline."""
    started = time.perf_counter()
    with Pipeline.load(bundle, backend=backend, threads=1) as pipe:
        expected = [_digest(pipe(**settings).images) for settings in SETTINGS]
        lock = threading.Lock()
        counts = {"pictures": 0, "cancelled": 0, "refused": 0}
        wrong: list[str] = []
        memory: list[tuple[int, int]] = []

        def work(number: int) -> None:
            generator = random.Random(f"{seed} {number}")
            while True:
                with lock:
                    if counts["pictures"] >= pictures:
                        return
                which = generator.randrange(len(SETTINGS))
                outcome, found = _one(pipe, SETTINGS[which], generator)
                with lock:
                    counts[outcome] += int(SETTINGS[which]["count"]) if outcome == "pictures" else 1
                    memory.append((counts["pictures"], rss_bytes()))
                    if found is not None and found != expected[which]:
                        wrong.append(f"{SETTINGS[which]}")

        team = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        warm = [threading.Thread(target=pipe, kwargs=dict(settings)) for settings in SETTINGS[:threads]]
        _run(warm)
        before = len(descriptors()), system_threads()
        _run(team)
        after = len(descriptors()), system_threads()
    return Report(
        pictures=counts["pictures"],
        cancelled=counts["cancelled"],
        refused=counts["refused"],
        wrong=tuple(wrong),
        rss_bytes_per_picture=slope(memory[len(memory) // 5 :]),
        descriptors=(before[0], after[0]),
        threads=(before[1], after[1]),
        wall_s=round(time.perf_counter() - started, 1),
    )


def _run(team: Sequence[threading.Thread]) -> None:
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()


def _one(pipe: Pipeline, settings: Mapping[str, Any], generator: random.Random) -> tuple[str, str | None]:
    chance = generator.random()
    if chance < 0.1:
        stream = pipe.stream(**settings)
        for _ in range(generator.randrange(3)):
            next(stream)
        stream.close()
        return "cancelled", None
    if chance < 0.2:
        try:
            pipe(**(dict(settings) | {"steps": 0}))
        except UsageError:
            return "refused", None
        raise AssertionError("0 steps were not refused")
    return "pictures", _digest(pipe(**settings).images)


def _digest(images: Any) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


def rss_bytes() -> int:
    """Resident memory of this process. Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def descriptors() -> list[str]:
    return [path.name for path in Path("/proc/self/fd").iterdir()]


def system_threads() -> int:
    """Threads of this process as the kernel counts them, those of its libraries too. Linux."""
    time.sleep(0.5)  # a thread that was joined may still be on its way out
    return len(list(Path("/proc/self/task").iterdir()))


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Theil-Sen: the median of the slopes between pairs, 0 for fewer than two places."""
    every = max(1, len(points) // 200)
    pairs = itertools.combinations(points[::every], 2)
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairs if x2 > x1]
    return statistics.median(slopes) if slopes else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = soak(arguments.bundle, arguments.pictures, arguments.threads, arguments.seed, arguments.backend)
    if arguments.json:
        print(json.dumps(asdict(report) | {"ok": report.ok}, indent=1))
    else:
        print(
            f"{report.pictures} pictures from {arguments.threads} threads in {report.wall_s} s; {report.cancelled}"
            f" cancelled, {report.refused} refused"
        )
        print(
            f"wrong: {len(report.wrong)}; memory {report.rss_bytes_per_picture:+,.0f} bytes per picture, limit"
            f" {RSS_LIMIT_BYTES:,}"
        )
        print(
            f"descriptors {report.descriptors[0]} then {report.descriptors[1]}; threads {report.threads[0]} then"
            f" {report.threads[1]}"
        )
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
