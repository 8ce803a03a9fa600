"""What a build costs at the full Stable Diffusion 1.5 size: the first, one with another LoRA, and one of another checkpoint, which find the traces cached.

For each: wall time and each stage's share, peak resident memory, bytes read and written through system calls, and the size of the bundle; then one picture.
Random weights stand in for real ones: cost does not depend on the values. The full size needs 12 GB of disk and 9 GB of memory.
Usage: python benchmarks/build.py [--size full|emoji] [--folder DIR] [--steps N] [--json]. Exit code 1 if a target is missed; the emoji size has none.
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

from make_checkpoint import write_checkpoint, write_lora

EMOJI = Path(__file__).parents[1] / "examples" / "emoji"
GB = 1e9

# Runs the command, then writes what the kernel counted for the process itself.
RUNNER = """
import atexit, os, sys
def count():
    with open("/proc/self/io") as stream, open(os.environ["SDRT_BENCHMARK_IO"], "w") as out:
        out.write(stream.read())
atexit.register(count)
from sdrt.cli import app
app()
"""


@dataclass(frozen=True)
class Measured:
    """One process. `read_bytes` and `written_bytes` went through system calls, page cache or not; mapped files are not in them."""

    wall_s: float
    peak_rss_bytes: int
    read_bytes: int
    written_bytes: int
    stages_s: dict[str, float]
    output: dict[str, Any]


def measured(arguments: list[object], cache: Path, folder: Path) -> Measured:
    """Run the command line to its end."""
    counted = folder / "io"
    started = time.perf_counter()
    environment = os.environ | {"SDRT_CACHE_DIR": str(cache), "SDRT_BENCHMARK_IO": str(counted)}
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, *map(str, arguments), "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    )
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments}: exit code {process.returncode}: {text.decode()}")
    io = {name: int(value) for name, value in (line.split(": ") for line in counted.read_text().splitlines())}
    output = json.loads(text)
    return Measured(round(time.perf_counter() - started, 1), usage.ru_maxrss * 1024, io["rchar"], io["wchar"], output.get("stages_s", {}), output)


def inputs(size: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """Two checkpoints and two LoRAs of one architecture."""
    if size == "emoji":
        from safetensors.torch import load_file, save_file

        other, half = folder / "other.safetensors", folder / "half.safetensors"
        save_file({name: tensor * 0.5 for name, tensor in load_file(EMOJI / "blindbox.safetensors").items()}, half)
        save_file(
            {name: tensor.flip(0).contiguous() if tensor.dim() == 1 else tensor for name, tensor in load_file(EMOJI / "emoji.safetensors").items()}, other
        )
        return [EMOJI / "emoji.safetensors", other], [EMOJI / "blindbox.safetensors", half]
    checkpoints, loras = [folder / f"sd15-{i}.safetensors" for i in (0, 1)], [folder / f"rank32-{i}.safetensors" for i in (0, 1)]
    for seed, path in enumerate(checkpoints):
        if not path.exists():
            write_checkpoint(path, seed)
    for seed, path in enumerate(loras, 1):
        write_lora(path, seed=seed)
    return checkpoints, loras


def targets(rows: dict[str, Measured], weight_bytes: int) -> dict[str, bool]:
    """What the full size must keep, by its words."""
    first, lora, checkpoint = rows["first build"], rows["another LoRA"], rows["another checkpoint"]
    size_bytes = first.output["size_bytes"]
    return {
        "a second build takes at most 30 s": max(lora.wall_s, checkpoint.wall_s) <= 30,
        "a second build takes at most a third of the first": max(lora.wall_s, checkpoint.wall_s) <= first.wall_s / 3,
        "the first build peaks at no more than 6 GB": first.peak_rss_bytes <= 6 * GB,
        "a second build peaks at no more than 3 GB": max(lora.peak_rss_bytes, checkpoint.peak_rss_bytes) <= 3 * GB,
        "the bundle is no more than 1.02 times its weights and 20 MB": size_bytes <= 1.02 * weight_bytes + 20e6,
        "the bytes written are no more than twice the weights and 100 MB": max(row.written_bytes for row in (lora, checkpoint)) <= 2 * weight_bytes + 100e6,
        "one picture peaks at no more than 9 GB": rows["picture"].peak_rss_bytes <= 9 * GB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["full", "emoji"], default="full")
    parser.add_argument("--folder", type=Path, help="where the files go and stay; a temporary folder by default")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        (checkpoint, other), (lora, half) = inputs(arguments.size, folder)
        cache, bundle = Path(temporary) / "cache", folder / ("sd15.sdrt" if arguments.size == "full" else "emoji.sdrt")

        def build(model: Path, adapter: Path) -> Measured:
            return measured(
                ["build", "--checkpoint", model, "--lora", adapter, "--output", bundle, "--target", "onnxruntime", "--force"], cache, Path(temporary)
            )

        rows = {"first build": build(checkpoint, lora), "another LoRA": build(checkpoint, half), "another checkpoint": build(other, lora)}
        weight_bytes = (bundle / "graphs" / "weights.safetensors").stat().st_size
        picture = [
            "generate",
            bundle,
            "a red apple",
            "--steps",
            arguments.steps,
            "--seed",
            1,
            "--backend",
            "onnxruntime",
            "--output",
            folder / "picture.png",
            "--force",
        ]
        rows["picture"] = measured(picture, cache, Path(temporary))
        kept = targets(rows, weight_bytes) if arguments.size == "full" else {}
        report = {
            "size": arguments.size, "checkpoint_bytes": checkpoint.stat().st_size, "weight_bytes": weight_bytes, "bundle_bytes": rows["first build"].output["size_bytes"],
            "rows": {name: {key: value for key, value in asdict(row).items() if key != "output"} for name, row in rows.items()}, "targets": kept,
        }  # fmt: skip
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{'process':20}{'wall':>9}{'peak memory':>14}{'read':>11}{'written':>11}   largest stages")
        for name, row in rows.items():
            whole = sum(row.stages_s.values()) or 1.0
            largest = sorted(row.stages_s.items(), key=lambda item: -item[1])[:3]
            shares = ", ".join(f"{stage} {seconds / whole:.0%}" for stage, seconds in largest)
            print(f"{name:20}{row.wall_s:>7} s{row.peak_rss_bytes / GB:>11.2f} GB{row.read_bytes / GB:>8.2f} GB{row.written_bytes / GB:>8.2f} GB   {shares}")
        print(f"bundle {report['bundle_bytes'] / GB:.3f} GB for {weight_bytes / GB:.3f} GB of weights")
        for words, ok in kept.items():
            print(f"{'ok  ' if ok else 'MISSED'}  {words}")
    sys.exit(0 if all(kept.values()) else 1)


if __name__ == "__main__":
    main()
