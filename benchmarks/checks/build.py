"""What a build costs at the size of a published model, without torch: three builds, each with another LoRA or another
checkpoint.

For each, whole and by stage: wall time, peak resident memory (mapped files included), bytes read and written through
system calls; then the size of the bundle, and one picture. Random weights stand in for real ones: cost does not depend
on the values. Stable Diffusion 1.5's size needs 12 GB of disk and 9 GB of memory, 3 GB without the picture; SDXL's 28
GB of disk and 14 GB of memory. Linux.
Usage: python benchmarks/checks/build.py [--family sd15|sdxl|emoji] [--folder DIR] [--steps N] [--json]. Exit code 1 if
a target is missed; emoji has none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from make_checkpoint import ARCHITECTURES, write_checkpoint, write_lora

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"
GB = 1e9
BUILDS = ("first build", "another LoRA", "another checkpoint")

# Runs the command, and writes what the kernel counted for the process; of a build for every stage. The kernel's peak is
# set back where a stage starts.
RUNNER = """
import atexit, json, os, re, sys, time

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors"):
            raise ImportError(name + " is not for a build of a published size")

sys.meta_path.insert(0, Refuse())

def counted():
    text = open("/proc/self/io").read() + open("/proc/self/status").read()
    return {name: int(value) for name, value in re.findall(r"(rchar|wchar|VmHWM):\\s+(\\d+)", text)}

stages, last = [], {"name": "", "started": time.perf_counter()} | counted()

def begin(name):
    if name != last["name"]:
        now, counts = time.perf_counter(), counted()
        stage = {"name": last["name"], "wall_s": now - last["started"], "peak_rss_bytes": 1024 * counts["VmHWM"]}
        stages.append(stage | {"read_bytes": counts["rchar"] - last["rchar"], "written_bytes": counts["wchar"] - last["wchar"]})
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        last.update(counts, name=name, started=time.perf_counter())

def finish():
    begin("end")
    with open(os.environ["SDRT_BENCHMARK_COUNTS"], "w") as stream:
        json.dump(stages, stream)

atexit.register(finish)
if sys.argv[1] == "build":
    from sdrt.export import build as module
    build = module.build

    def staged(options, progress):
        begin("prepare")
        report = build(options, lambda stage, done: (begin(stage), progress(stage, done)))
        begin("report")
        return report

    module.build = staged
from sdrt.cli.app import app
app()
"""


@dataclass(frozen=True)
class Stage:
    """A part of a process. `read_bytes` and `written_bytes` went through system calls, page cache or not; mapped files
    are not in them.
    """

    name: str
    wall_s: float
    peak_rss_bytes: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Measured:
    """One process from its start to its end: its stages, and what they come to."""

    wall_s: float
    stages: tuple[Stage, ...]
    output: dict[str, Any]

    @property
    def peak_rss_bytes(self) -> int:
        return max(stage.peak_rss_bytes for stage in self.stages)

    @property
    def read_bytes(self) -> int:
        return sum(stage.read_bytes for stage in self.stages)

    @property
    def written_bytes(self) -> int:
        return sum(stage.written_bytes for stage in self.stages)


def measured(arguments: list[object], cache: Path, folder: Path) -> Measured:
    """Run the command line to its end."""
    counts = folder / "counts.json"
    environment = os.environ | {"SDRT_CACHE_DIR": str(cache), "SDRT_BENCHMARK_COUNTS": str(counts)}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    wall_s = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{arguments}: exit code {done.returncode}: {done.stdout.decode()}")
    return Measured(
        round(wall_s, 1), tuple(Stage(**stage) for stage in json.loads(counts.read_text())), json.loads(done.stdout)
    )


@dataclass(frozen=True)
class Limits:
    """What a build of a family may cost, in seconds and GB of peak memory, and on what its picture is drawn."""

    build_s: float
    build_gb: float
    picture_gb: float
    backend: str


LIMITS = {"sd15": Limits(20, 1.5, 9, "onnxruntime"), "sdxl": Limits(70, 4, 14, "openvino")}


def inputs(family: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """Two checkpoints and two LoRAs of one architecture."""
    if family == "emoji":
        from safetensors.torch import load_file, save_file

        other, half = folder / "other.safetensors", folder / "half.safetensors"
        save_file({name: tensor * 0.5 for name, tensor in load_file(EMOJI / "blindbox.safetensors").items()}, half)
        save_file(
            {
                name: tensor.flip(0).contiguous() if tensor.dim() == 1 else tensor
                for name, tensor in load_file(EMOJI / "emoji.safetensors").items()
            },
            other,
        )
        return [EMOJI / "emoji.safetensors", other], [EMOJI / "blindbox.safetensors", half]
    checkpoints, loras = (
        [folder / f"{family}-{i}.safetensors" for i in (0, 1)],
        [folder / f"{family}-rank32-{i}.safetensors" for i in (0, 1)],
    )
    for seed, path in enumerate(checkpoints):
        if not path.exists():
            write_checkpoint(path, seed, ARCHITECTURES[family])
    for seed, path in enumerate(loras, 1):
        if not path.exists():
            write_lora(path, seed=seed, architecture=ARCHITECTURES[family])
    return checkpoints, loras


def targets(limits: Limits, rows: dict[str, Measured], input_bytes: int, weight_bytes: int) -> dict[str, bool]:
    """What a family must keep, by its words. `input_bytes` is what a checkpoint and a LoRA come to."""
    builds = [rows[name] for name in BUILDS]
    kept = {
        f"a build takes at most {limits.build_s:g} s": all(row.wall_s <= limits.build_s for row in builds),
        f"a build peaks at no more than {limits.build_gb:g} GB": all(
            row.peak_rss_bytes <= limits.build_gb * GB for row in builds
        ),
        "the bundle is no more than 1.02 times its weights and 20 MB": (
            builds[0].output["size_bytes"] <= 1.02 * weight_bytes + 20e6
        ),
        "a build reads its inputs at most twice and what it wrote once, besides what engines map": all(
            row.read_bytes <= 2 * input_bytes + weight_bytes + 100e6 for row in builds
        ),
        "a build writes each tensor once": all(row.written_bytes <= weight_bytes + 30e6 for row in builds),
    }
    return kept | (
        {
            f"one picture peaks at no more than {limits.picture_gb:g} GB": (
                rows["picture"].peak_rss_bytes <= limits.picture_gb * GB
            )
        }
        if "picture" in rows
        else {}
    )


def table(row: Measured) -> str:
    """A process's stages, those that take a fiftieth of its time or more, and the rest in one line."""
    large = [stage for stage in row.stages if stage.wall_s >= row.wall_s / 50]
    small = [stage for stage in row.stages if stage not in large]
    lines = [(stage.name or "start", stage) for stage in large]
    if small:
        peak = max(stage.peak_rss_bytes for stage in small)
        wall_s, read, written = (
            sum(s.wall_s for s in small),
            sum(s.read_bytes for s in small),
            sum(s.written_bytes for s in small),
        )
        lines.append((f"{len(small)} more", Stage("", wall_s, peak, read, written)))
    lines.append(("all", Stage("", row.wall_s, row.peak_rss_bytes, row.read_bytes, row.written_bytes)))
    return "\n".join(
        f"  {name:20}{stage.wall_s:>7.1f} s{stage.wall_s / row.wall_s:>6.0%}{stage.peak_rss_bytes / GB:>8.2f} GB"
        f"{stage.read_bytes / GB:>8.2f} GB{stage.written_bytes / GB:>8.2f} GB"
        for name, stage in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=[*LIMITS, "emoji"], default="sd15")
    parser.add_argument("--folder", type=Path, help="where the files go and stay; a temporary folder by default")
    parser.add_argument("--steps", type=int, default=2, help="of the picture; 0 makes none")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (checkpoint, other), (lora, half) = inputs(arguments.family, folder)
        cache, bundle = Path(temporary) / "cache", folder / f"{arguments.family}.sdrt"
        limits = LIMITS.get(arguments.family)
        backend = limits.backend if limits else "onnxruntime"

        def build(model: Path, adapter: Path) -> Measured:
            words: list[object] = ["--checkpoint", model, "--lora", adapter, "--output", bundle]
            return measured(["build", *words, "--target", "onnxruntime", "--force"], cache, Path(temporary))

        files = ((checkpoint, lora), (checkpoint, half), (other, lora))
        rows = {name: build(*pair) for name, pair in zip(BUILDS, files, strict=True)}
        weight_bytes = (bundle / "graphs" / "weights.safetensors").stat().st_size
        if arguments.steps and backend != "onnxruntime":
            words: list[object] = ["--target", backend, "--tokens", 77, "--branches", 2]
            rows["compile"] = measured(["compile", bundle, *words], cache, Path(temporary))
        if arguments.steps:
            options: list[object] = [
                "--steps",
                arguments.steps,
                "--seed",
                1,
                "--backend",
                backend,
                "--output",
                folder / "picture.png",
                "--force",
            ]
            rows["picture"] = measured(["generate", bundle, "a red apple", *options], cache, Path(temporary))
        input_bytes = checkpoint.stat().st_size + lora.stat().st_size
        kept = targets(limits, rows, input_bytes, weight_bytes) if limits else {}
        bundle_bytes = rows["first build"].output["size_bytes"]
    if arguments.json:
        measures = {
            name: (
                {key: value for key, value in asdict(row).items() if key != "output"}
                | {key: getattr(row, key) for key in ("peak_rss_bytes", "read_bytes", "written_bytes")}
            )
            for name, row in rows.items()
        }
        sizes = {"input_bytes": input_bytes, "weight_bytes": weight_bytes, "bundle_bytes": bundle_bytes}
        print(json.dumps({"family": arguments.family, **sizes, "rows": measures, "targets": kept}, indent=1))
    else:
        for name, row in rows.items():
            print(f"{name:20}   wall  share   peak memory       read    written\n{table(row)}")
        print(f"bundle {bundle_bytes / GB:.3f} GB for {weight_bytes / GB:.3f} GB of weights")
        for words, ok in kept.items():
            print(f"{'ok  ' if ok else 'MISSED'}  {words}")
    sys.exit(0 if all(kept.values()) else 1)


if __name__ == "__main__":
    main()
