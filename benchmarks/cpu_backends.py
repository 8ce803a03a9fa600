"""ONNX Runtime, as it is and from models it saved, and OpenVINO beside each other on one bundle: cold start, step, decode, text, peak memory, and how far the pictures are apart.

Every run is a fresh process, and the backends take turns, so the ratios hold on a machine whose speed drifts. The bundle is copied: engines are
compiled into copies, OpenVINO's in float32 and, where the CPU has it, in bfloat16.
Usage: python benchmarks/cpu_backends.py BUNDLE.sdrt [--size WxH] [--steps N] [--runs N] [--json]
For the full size: python benchmarks/build.py --folder DIR, then python benchmarks/cpu_backends.py DIR/sd15.sdrt --steps 3 --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def picture(bundle: Path, backend: str, size: tuple[int, int], steps: int, output: Path) -> dict[str, float]:
    """Load, make two pictures of the same seed, save the second. Milliseconds; `first_step` counts from before the import to the end of the first
    step, `cold` is that less one warm step."""
    started = time.perf_counter()
    from sdrt.memory import peak_rss_bytes
    from sdrt.runtime import Pipeline

    with Pipeline.load(bundle, backend=backend) as pipe:
        loaded = time.perf_counter()
        stream = pipe.stream("red apple", steps=steps, cfg=3.0, seed=1, size=size)
        next(stream)
        first_step = time.perf_counter()
        for _ in stream:
            pass
        result = pipe("red apple", steps=steps, cfg=3.0, seed=1, size=size)
    np.save(output, result.images)
    step = statistics.median(result.timings_ms["steps"])
    return {
        "load_ms": (loaded - started) * 1000,
        "cold_ms": (first_step - started) * 1000 - step,
        "step_ms": step,
        "text_ms": result.timings_ms["text_encoder"],
        "decode_ms": result.timings_ms["decode"],
        "peak_rss_mb": (peak_rss_bytes() or 0) / 2**20,
    }


def compiled_copies(bundle: Path, folder: Path, size: tuple[int, int]) -> dict[str, tuple[Path, str]]:
    """The bundle for each row of the table, with the backend to run it on, and what compiling took on stderr."""
    from sdrt import engine_libraries
    from sdrt.bundle.folder import open_bundle
    from sdrt.compile import onnxruntime
    from sdrt.compile.openvino import compile_bundle
    from sdrt.compile.report import CompileOptions

    plain, saved = (folder / f"{name}.sdrt" for name in ("plain", "saved"))
    for copy in (plain, saved):
        shutil.copytree(bundle, copy, copy_function=os.link, ignore=shutil.ignore_patterns("engines"))
    rows = {"onnxruntime fp32": (plain, "onnxruntime"), "onnxruntime saved": (saved, "onnxruntime")}
    made = onnxruntime.compile_bundle(open_bundle(saved), CompileOptions("onnxruntime"))
    print(
        f"saved: {sum(graph.build_s for graph in made.graphs.values()):.1f} s, {sum(graph.plan_bytes for graph in made.graphs.values()) / 1e6:.1f} MB",
        file=sys.stderr,
    )
    able = "BF16" in engine_libraries.openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision in ("fp32", "bf16") if able else ("fp32",):
        copy = folder / f"{precision}.sdrt"
        shutil.copytree(bundle, copy, copy_function=os.link, ignore=shutil.ignore_patterns("engines"))
        (report,) = compile_bundle(open_bundle(copy), CompileOptions("openvino", size=(size, size), branches=(2,), precision=precision))
        graphs = ", ".join(f"{graph} {made.build_s:.1f} s {made.plan_bytes / 1e6:.1f} MB" for graph, made in report.graphs.items())
        print(f"compiled {precision}: {graphs}", file=sys.stderr)
        rows[f"openvino {precision}"] = copy, "openvino"
    return rows


def measured(rows: dict[str, tuple[Path, str]], size: tuple[int, int], steps: int, runs: int, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    images = {}
    for _ in range(runs):
        for name, (bundle, backend) in rows.items():
            output = folder / "picture.npy"
            command = [sys.executable, __file__, str(bundle), "--child", backend, "--size", "{}x{}".format(*size), "--steps", str(steps), "--output", output]
            samples[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            images[name] = np.load(output)
    return samples, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", help="WxH, the bundle's own by default")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size:
        width, height = (int(side) for side in arguments.size.split("x"))
    else:
        from sdrt.bundle.folder import open_bundle

        width, height = open_bundle(arguments.bundle).manifest.latents.size
    if arguments.child:
        print(json.dumps(picture(arguments.bundle, arguments.child, (width, height), arguments.steps, arguments.output)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.bundle.parent) as temporary:
        folder = Path(temporary)
        rows = compiled_copies(arguments.bundle, folder, (width, height))
        samples, images = measured(rows, (width, height), arguments.steps, arguments.runs, folder)
    first = next(iter(rows))
    report: dict[str, Any] = {}
    for name, runs in samples.items():
        error = float(((images[name].astype(float) - images[first].astype(float)) ** 2).mean())
        report[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        report[name] |= {f"{key}_ratio": statistics.median(run[key] / base[key] for run, base in zip(runs, samples[first], strict=True)) for key in runs[0]}
        report[name]["psnr_db"] = float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
    if arguments.json:
        print(json.dumps({"size": [width, height], "rows": report, "samples": samples}, indent=1))
        return
    keys = ("load_ms", "cold_ms", "step_ms", "text_ms", "decode_ms", "peak_rss_mb")
    print(f"{'':18}" + "".join(f"{key:>20}" for key in keys) + f"{'PSNR':>10}")
    for name, row in report.items():
        print(f"{name:18}" + "".join(f"{row[key]:>12.1f} {row[key + '_ratio']:>6.2f}x" for key in keys) + f"{row['psnr_db']:>7.1f} dB")


if __name__ == "__main__":
    main()
