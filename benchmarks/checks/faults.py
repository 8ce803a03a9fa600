"""Whole commands failed at every numbered point of the one writer, in every way: killed, no space, an input/output
error, a short write.

`sdrt build` over a bundle, a first build with an empty cache, and `sdrt compile` for OpenVINO and for ONNX Runtime, of
a tiny seeded model: after a kill the old bundle is there byte for byte (or the new one, once it is published), and the
next run ends with what an uninterrupted one makes. The tests take a sample.
Usage: python benchmarks/checks/faults.py [--points N|all] [--folder DIR] [--json]. Exit code 1 if anything is not as it
must be. Needs fork.
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

SUPPORT = Path(__file__).parents[2] / "tests" / "support"
KINDS = ("kill", "enospc", "eio", "short")
SHOWN = 20
MAKE = """
import sys
from safetensors.torch import save_file
from tiny_model import SMALL, seeded
save_file(seeded(SMALL), sys.argv[1])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="all", help="how many points of each job and kind; all if not given")
    parser.add_argument("--folder", type=Path, help="where to work, some 100 MB; a temporary folder if not given")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    reports, problems = {}, 0
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        checkpoint = Path(temporary) / "small.safetensors"
        subprocess.run([sys.executable, "-c", MAKE, checkpoint], check=True, env=environment)
        for job in ("build", "first build", "compile", "save"):
            started, folder = time.perf_counter(), Path(temporary) / job
            folder.mkdir()
            command = [
                sys.executable,
                SUPPORT / "faulty_commands.py",
                folder,
                job,
                checkpoint,
                *(f"{kind}={options.points}" for kind in KINDS),
            ]
            done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
            reports[job] = report = json.loads(done.stdout)
            problems += len(report["problems"])
            if not options.json:
                print(
                    f"{job:12} {report['points']:4} points, runs {report['done']}, {len(report['problems'])} problems,"
                    f" {time.perf_counter() - started:.0f} s"
                )
                print("".join(f"  {problem}\n" for problem in report["problems"][:SHOWN]), end="", flush=True)
    if options.json:
        print(json.dumps(reports, indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
