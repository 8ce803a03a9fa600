"""How the time of a denoising step, and of a picture, grows with steps, size and batch, and the model that it follows.

For every size and batch: a step graph of that shape, and warm pictures of several numbers of steps; what they cost is fitted as fixed + steps x step
(`sdrt.bench.statistics.fit_cost`). Then two models of the step over all shapes, p being pictures x latent pixels:
linear, a + b p, and with attention, a + b p + c p x (latent pixels), by least squares of the relative error, no term below zero. If cost grows as the work
does, the second one leaves little; each is also asked for the shapes it was not fitted on, one left out at a time.
Every shape is a file under --folder once it is measured: a run that was stopped goes on with the next. All must have the same settings.
Usage: python benchmarks/cost.py BUNDLE.sdrt --folder DIR [--backend openvino|onnxruntime] [--sizes 256,384,512,640,768] [--batches 1,2,4] [--steps 2,4,6]
       [--pictures N] [--precision bf16|fp32] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CFG = 3.0


@dataclass(frozen=True)
class Point:
    """One shape. Times in milliseconds, all for a whole batch; `latent_pixels` of one picture; `samples` are (steps, total)."""

    side: int
    batch: int
    latent_pixels: int
    step_ms: float
    fixed_ms: float
    decode_ms: float
    residual_ms: float
    samples: list[tuple[int, float]]


@dataclass(frozen=True)
class Model:
    """Coefficients in milliseconds, and the relative errors of the step times, fitted and left out, the largest of each."""

    terms: dict[str, float]
    error: float
    left_out_error: float | None


def measured(bundle: Path, backend: str, side: int, batch: int, steps: Sequence[int], pictures: int) -> Point:
    """Warm pictures of one shape, numbers of steps in turn."""
    from sdrt.bench.statistics import fit_cost
    from sdrt.runtime import Pipeline

    samples: list[tuple[int, float]] = []
    decodes, singles = [], []
    with Pipeline.load(bundle, backend=backend) as pipe:
        for i, count in enumerate([min(steps), *(pictures * list(steps))]):
            result = pipe("red apple", steps=count, cfg=CFG, seed=1, size=(side, side), batch=batch, count=batch)
            if i:
                samples.append((count, result.timings_ms["total"]))
                decodes.append(result.timings_ms["decode"])
                singles.extend(result.timings_ms["steps"])
    fit = fit_cost(samples)
    fixed, residual = (fit.fixed_ms, fit.residual_ms) if fit else (float("nan"), float("nan"))
    return Point(side, batch, (side // 8) ** 2, statistics.median(singles), fixed, statistics.median(decodes), residual, samples)


def fitted(points: Sequence[Point], *, attention: bool) -> Model:
    """Least squares of relative errors with no negative term: of all choices of terms whose coefficients come out positive, the closest."""
    names, work = _work(points, attention)
    times = np.array([point.step_ms for point in points])
    terms = _positive_fit(work, times)
    left_out = []
    if len(points) > len(names):
        for i in range(len(points)):
            others = np.arange(len(points)) != i
            left_out.append(abs(float(work[i] @ _positive_fit(work[others], times[others])) / times[i] - 1))
    error = float(np.abs(work @ terms / times - 1).max())
    return Model(dict(zip(names, terms.tolist(), strict=True)), error, max(left_out, default=None))


def _work(points: Sequence[Point], attention: bool) -> tuple[list[str], np.ndarray]:
    pixels = np.array([float(point.latent_pixels) for point in points])
    pictures = np.array([float(point.batch) for point in points])
    columns = {"call": np.ones(len(points)), "per 1000 latent pixels": pictures * pixels / 1e3}
    if attention:
        columns["per 1000 latent pixels squared"] = pictures * (pixels / 1e3) ** 2
    return list(columns), np.stack(list(columns.values()), axis=1)


def _positive_fit(work: np.ndarray, times: np.ndarray) -> np.ndarray:
    relative = work / times[:, None]
    best, least = np.zeros(work.shape[1]), np.inf
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(work.shape[1]), n) for n in range(1, work.shape[1] + 1)):
        terms = np.zeros(work.shape[1])
        terms[list(chosen)] = np.linalg.lstsq(relative[:, chosen], np.ones(len(times)), rcond=None)[0]
        error = float(((relative @ terms - 1) ** 2).sum())
        if (terms >= 0).all() and error < least:
            best, least = terms, error
    return best


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="what each shape cost, and the bundle's copy with one engine at a time")
    parser.add_argument("--backend", choices=("openvino", "onnxruntime"), default="openvino")
    parser.add_argument("--sizes", type=numbers, default=[256, 384, 512, 640, 768], help="sides of square pictures, pixels")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4])
    parser.add_argument("--steps", type=numbers, default=[2, 4, 6])
    parser.add_argument("--pictures", type=int, default=3, help="counted pictures of every shape and number of steps, after one uncounted of the shape")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="of OpenVINO's engines; its own choice by default")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(arguments).items() if name in ("bundle", "backend", "steps", "pictures", "precision")}
    record = folder / "settings.json"
    if record.exists() and json.loads(record.read_text()) != settings:
        raise SystemExit(f"{folder}: holds a run of other settings: {record.read_text()}. Take another --folder.")
    record.write_text(json.dumps(settings))
    points = []
    for side, batch in itertools.product(arguments.sizes, arguments.batches):
        done = folder / f"{side}-{batch}.json"
        if not done.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                copy = Path(temporary) / "cost.sdrt"
                shutil.copytree(arguments.bundle, copy, copy_function=os.link, ignore=shutil.ignore_patterns("engines"))
                if arguments.backend == "openvino":
                    compile_shape(copy, side, batch, arguments.precision)
                point = measured(copy, arguments.backend, side, batch, arguments.steps, arguments.pictures)
            publish(done, json.dumps(asdict(point)))
        points.append(Point(**json.loads(done.read_text())))
        print(f"{side}x{side}, batch {batch}: {points[-1].step_ms:.1f} ms a step", file=sys.stderr, flush=True)
    models = {"linear": fitted(points, attention=False), "with attention": fitted(points, attention=True)}
    if arguments.json:
        print(json.dumps({"points": [asdict(point) for point in points], "models": {name: asdict(model) for name, model in models.items()}}, indent=1))
        return
    print(table(points, models))


def publish(path: Path, text: str) -> None:
    """Written under another name first, so that what was interrupted is not taken for done."""
    stage = path.with_suffix(".unfinished")
    stage.write_text(text)
    stage.rename(path)


def compile_shape(bundle: Path, side: int, batch: int, precision: str | None) -> None:
    from sdrt.bundle.folder import open_bundle
    from sdrt.compile.openvino import compile_bundle
    from sdrt.compile.report import CompileOptions

    size = (side, side)
    compile_bundle(open_bundle(bundle), CompileOptions("openvino", size=(size, size), batch=(batch, batch), branches=(2,), precision=precision))


def table(points: Sequence[Point], models: dict[str, Model]) -> str:
    _, linear = _work(points, False)
    _, square = _work(points, True)
    by_name: dict[str, Any] = {"linear": linear, "with attention": square}
    lines = ["| side | batch | step, ms | a picture's step, ms | linear | with attention | decode, ms | fixed, ms | fit's residual, ms |", "|---" * 9 + "|"]
    for i, point in enumerate(points):
        shares = [float(by_name[name][i] @ np.array(list(model.terms.values()))) / point.step_ms - 1 for name, model in models.items()]
        cells = [f"{point.step_ms:.1f}", f"{point.step_ms / point.batch:.1f}", *(f"{share:+.1%}" for share in shares)]
        cells += [f"{value:.1f}" for value in (point.decode_ms, point.fixed_ms, point.residual_ms)]
        lines.append(f"| {point.side} | {point.batch} | " + " | ".join(cells) + " |")
    for name, model in models.items():
        terms = " + ".join(f"{value:.3g} {term}" for term, value in model.terms.items())
        unseen = "" if model.left_out_error is None else f", {model.left_out_error:.1%} of a shape left out"
        lines.append(f"\n{name}: step, ms = {terms}; largest error {model.error:.1%}{unseen}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
