"""What would a bundle save that pointed into the checkpoint itself, and what would it cost to load?

A checkpoint's tensors start where its header happens to end, not on a page. So: how long does each engine take to read
the step graph of a bundle when its weights lie as a build writes them, one byte further, and eight bytes further? And
how long does a build take to copy the weights, hashing included? Processes take turns; the ratio is to the aligned file
of the same round.
Usage: python benchmarks/studies/no_copy.py BUNDLE.sdrt CHECKPOINT.safetensors --folder DIR [--runs N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from sdrt.bundle.graphs import STEP
from sdrt.bundle.manifest import WEIGHTS, graph_path
from sdrt.bundle.onnx_graph import TYPES, read_graph, stored, stored_tensor
from sdrt.export.build import BuildOptions, build

SHIFTS = (0, 1, 8)
LOAD = {
    "onnxruntime": """
import sys, time, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
started = time.perf_counter()
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(time.perf_counter() - started)
""",
    "openvino": """
import sys, time, openvino
core = openvino.Core()
started = time.perf_counter()
core.compile_model(core.read_model(sys.argv[1]), "CPU")
print(time.perf_counter() - started)
""",
}


def shifted(bundle: Path, folder: Path, shift: int) -> Path:
    """The bundle's step graph over a copy of its weights that lies `shift` bytes further."""
    folder.mkdir(parents=True, exist_ok=True)
    source = bundle / WEIGHTS
    with source.open("rb") as weights, (folder / source.name).open("wb") as copy:
        copy.write(bytes(shift))
        shutil.copyfileobj(weights, copy, 1 << 24)
    graph = read_graph((bundle / graph_path(STEP, "fp32")).read_bytes())
    names = {number: name for name, number in TYPES.items()}
    for name, data in graph.constants.items():
        if (place := stored(data)) is not None:
            graph.constants[name] = stored_tensor(
                name, names[place.kind], place.shape, place.file, place.offset + shift, place.size_bytes
            )
    path = folder / "step.onnx"
    path.write_bytes(graph.to_bytes())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    graphs = {shift: shifted(arguments.bundle, arguments.folder / str(shift), shift) for shift in SHIFTS}
    ratios: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.runs):
        for engine, script in LOAD.items():
            seconds = {}
            for shift, path in graphs.items():
                path.with_name(Path(WEIGHTS).name).read_bytes()  # into memory
                done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
                seconds[shift] = float(done.stdout)
                ratios.setdefault((engine, shift), []).append(seconds[shift] / seconds[0])
            print(engine, {shift: round(value, 2) for shift, value in seconds.items()}, file=sys.stderr, flush=True)
    for (engine, shift), found in ratios.items():
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{engine}, {shift} bytes further: {statistics.median(found):.2f} of the aligned load ({spread})")
    for _ in range(arguments.runs):
        arguments.checkpoint.read_bytes()
        output, started = arguments.folder / "copy.sdrt", time.perf_counter()
        report = build(BuildOptions(arguments.checkpoint, output=output, force=True))
        whole = time.perf_counter() - started
        print(f"copying and hashing: {report.stages_s['fuse']:.1f} s of a build of {whole:.1f} s")
    os.sync()


if __name__ == "__main__":
    main()
