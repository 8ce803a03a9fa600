"""Does the real onnxruntime-gpu load a bundle's graphs, and does `onnxruntime-cuda` refuse to run them without a GPU?

Makes an environment with that package beside sdrt's few others (250 MB from the package index) and asks there: every
graph is loaded with the package's CPU provider, the backend is asked for a picture, and each graph for a session on
CUDA. Where no GPU answers, all of these must be refused in sdrt's own words. Where one does, the picture is made.
Usage: python benchmarks/checks/onnxruntime_gpu.py BUNDLE.sdrt --folder DIR [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("onnxruntime-gpu>=1.25", "numpy>=2.0", "Pillow>=12.2", "typer>=0.29", "rich>=13")

INSIDE = """
import json, sys
from pathlib import Path
import onnxruntime
from sdrt.bundle.folder import open_bundle
from sdrt.errors import SdrtError
from sdrt.machine import doctor
from sdrt.machine.gpus import Gpu, Gpus, probe_gpus
from sdrt.runtime import Pipeline
from sdrt.runtime.backends.onnxruntime_cuda.model import on_device, open_session

def asked(run):
    try:
        return {"made": str(run())}
    except SdrtError as error:
        return {"refused": error.message, "fix": error.fix}

bundle, gpus = open_bundle(Path(sys.argv[1])), probe_gpus()
graphs = [bundle.graph(graph, precision) for graph, made in bundle.manifest.graphs.items() for precision in made]
for path in graphs:
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
as_if = doctor.probe_onnxruntime_cuda(Gpus((Gpu("a GPU that is not there", "sm_89"),), "13.0", ""))

def picture(backend):
    with Pipeline.load(bundle.path, backend=backend) as pipe:
        return pipe("a red apple", steps=2).engine

print(json.dumps({
    "version": onnxruntime.__version__,
    "named": onnxruntime.get_available_providers(),
    "gpus": [str(gpu) for gpu in gpus.found],
    "loaded": [path.name for path in graphs],
    "doctor": doctor.probe_onnxruntime_cuda(gpus).detail,
    "doctor, were there a GPU": as_if.detail,
    "sessions": {path.name: asked(lambda: on_device(lambda: open_session(onnxruntime, path, 0))) for path in graphs},
    "picture": asked(lambda: picture("onnxruntime-cuda")),
    "auto": asked(lambda: picture("auto")["backend"]),
}))
"""


def environment(folder: Path) -> Path:
    """The Python of an environment with the package, made once."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stdout=subprocess.DEVNULL)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where the environment is made, or lies")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    python = environment(options.folder.absolute())
    ran = subprocess.run(
        [python, "-c", INSIDE, options.bundle.absolute()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        print(ran.stderr, file=sys.stderr)
        return 1
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    answers = [*found["sessions"].values(), found["picture"]]
    wanted = "made" if found["gpus"] else "refused"
    ok = all(wanted in answer for answer in answers) and (bool(found["gpus"]) or found["auto"]["made"] == "onnxruntime")
    if options.json:
        print(json.dumps(found | {"ok": ok}, indent=2))
    else:
        print(f"onnxruntime-gpu {found['version']}, GPUs: {', '.join(found['gpus']) or 'none'}")
        print(f"loaded with the CPU provider: {', '.join(found['loaded'])}")
        print(f"doctor: {found['doctor']}\ndoctor, were there a GPU: {found['doctor, were there a GPU']}")
        for name, answer in {**found["sessions"], "picture": found["picture"], "auto": found["auto"]}.items():
            print(f"{name}: {answer.get('refused') or answer.get('made')}")
        print("as it should be" if ok else f"NOT as it should be: each was to be {wanted}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
