"""Compile a bundle for TensorRT-RTX and report, per graph, seconds, layers, plan size and peak memory. Needs no GPU.

Usage: python benchmarks/studies/compile.py BUNDLE.sdrt [--sm 86,89,120] [--json]; `benchmarks/checks/build.py --folder
DIR` leaves a bundle of full size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sm", default="86,89,120")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "sdrt",
        "compile",
        str(arguments.bundle),
        "--target",
        "tensorrt-rtx",
        "--sm",
        arguments.sm,
        "--force",
        "--json",
    ]
    engine = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["engines"][0]
    if arguments.json:
        print(json.dumps(engine, indent=1))
        return
    print(f"{'graph':14}{'parse':>8}{'build':>9}{'layers':>8}{'plan':>12}{'peak memory':>14}")
    for graph, made in engine["graphs"].items():
        peak = f"{made['peak_bytes'] / 1e9:.2f} GB" if made["peak_bytes"] else "unknown"
        print(
            f"{graph:14}{made['parse_s']:>6.1f} s{made['build_s']:>7.1f}"
            f" s{made['layers']:>8}{made['plan_bytes'] / 1e6:>9.1f} MB{peak:>14}"
        )
    print(f"TensorRT-RTX {engine['key']['compiler']} for {engine['key']['device']}, {engine['key']['precision']}")


if __name__ == "__main__":
    main()
