"""Build and run a model of the full Stable Diffusion 1.5 size, and report time, peak memory and bundle size of each process.

Random weights stand in for the real ones: cost does not depend on the values. Needs 8 GB of disk and 9 GB of memory; takes some minutes.
Usage: python benchmarks/full_size.py [--folder DIR] [--steps N] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from make_checkpoint import write_checkpoint, write_lora
from PIL import Image

LIMITS_GB = {"build": 6.0, "second build": 6.0, "picture": 9.0}


def measured(command: list[str], cache: Path) -> tuple[dict[str, object], dict[str, object]]:
    """Run a command to its end: its JSON output, and its wall time and peak resident memory as the kernel counted them."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"SDRT_CACHE_DIR": str(cache)})
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}: {output.decode()}")
    return json.loads(output), {"wall_s": round(time.perf_counter() - started, 1), "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go and stay; a temporary folder by default")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint, lora, bundle, cache = folder / "sd15.safetensors", folder / "rank32.safetensors", folder / "sd15.sdrt", folder / "cache"
        if not checkpoint.exists():
            write_checkpoint(checkpoint)
        write_lora(lora)
        sdrt = [sys.executable, "-m", "sdrt.cli"]
        build = [*sdrt, "build", "--checkpoint", str(checkpoint), "--lora", str(lora), "--target", "onnxruntime", "--output", str(bundle), "--force", "--json"]
        picture = folder / "picture.png"
        rows: dict[str, dict[str, object]] = {}
        first, rows["build"] = measured(build, cache)
        second, rows["second build"] = measured(build, cache)
        run, rows["picture"] = measured(
            [*sdrt, "generate", str(bundle), "a cute girl", "--steps", str(arguments.steps), "--seed", "1", "--output", str(picture), "--force", "--json"],
            cache,
        )
        pixels = np.asarray(Image.open(picture))
        report = {
            "rows": {name: row | {"limit_gb": LIMITS_GB[name], "ok": row["peak_rss_gb"] <= LIMITS_GB[name]} for name, row in rows.items()},  # type: ignore[operator]
            "bundle_bytes": first["size_bytes"],
            "build_stages_s": first["stages_s"],
            "second_build_stages_s": second["stages_s"],
            "picture": {"shape": list(pixels.shape), "mean": float(pixels.mean()), "deviation": float(pixels.std()), "timings_ms": run["timings_ms"]},
        }
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{'process':14}{'wall':>9}{'peak memory':>14}{'limit':>9}")
    for name, row in report["rows"].items():
        print(f"{name:14}{row['wall_s']:>7} s{row['peak_rss_gb']:>11} GB{row['limit_gb']:>6} GB  {'ok' if row['ok'] else 'OVER'}")
    print(f"bundle {first['size_bytes'] / 1e9:.2f} GB; picture {pixels.shape}, finite, deviation {pixels.std():.1f} levels; {arguments.steps} steps")


if __name__ == "__main__":
    main()
