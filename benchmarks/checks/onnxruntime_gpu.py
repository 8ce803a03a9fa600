"""Does the real onnxruntime-gpu take a bundle's graphs, and does `onnxruntime-cuda` refuse to run them without a GPU?

Makes an environment with that package beside sdrt's few others (250 MB from the package index) and asks there: every
graph is loaded with the package's CPU provider, the backend is asked for a picture, and each graph for a session on
CUDA. Where no GPU answers, all of these must be refused in sdrt's own words. Where one does, the picture is made.

Then, where a C compiler is found, the same provider runs on stubs of CUDA's libraries: memory is the host's, kernels do
nothing, calls are counted. So its choice is seen without a GPU: which nodes it takes, and what capture costs. Every
graph must get a session; a captured run must be one graph launch, and belong to its thread. Usage: python benchmarks/checks/onnxruntime_gpu.py BUNDLE.sdrt --folder DIR [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
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

ON_STUBS = """
import ctypes, json, sys, threading
from collections import Counter
from pathlib import Path
import numpy as np
import onnxruntime
from sdrt.bundle.folder import open_bundle
from sdrt.runtime.backends.onnxruntime_cuda.model import open_session

onnxruntime.set_default_logger_severity(4)
bundle, library, nodes, refused, made = open_bundle(Path(sys.argv[1])), ctypes.CDLL("libcudart.so.13"), {}, [], {}
for graph, precisions in bundle.manifest.graphs.items():
    for precision in precisions:
        path = bundle.graph(graph, precision)
        made[graph] = session = open_session(onnxruntime, path, 0)
        places = {}
        for part in session.get_provider_graph_assignment_info():
            places.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
        cuda = places.pop("CUDAExecutionProvider")
        nodes[path.name] = {"cuda": cuda.total(), "cpu": {kind: n for found in places.values() for kind, n in found.items()}}
        strict = onnxruntime.SessionOptions()
        strict.log_severity_level = 4
        strict.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            onnxruntime.InferenceSession(str(path), strict, providers=["CUDAExecutionProvider"], enable_fallback=0)
        except Exception:
            refused.append(path.name)

session = made["text_encoder"]
binding, kept = session.io_binding(), []

def shape(value):
    return [2 if isinstance(side, str) else side for side in value.shape]

for values, bind, kind in (
    (session.get_inputs(), binding.bind_ortvalue_input, np.int64),
    (session.get_outputs(), binding.bind_ortvalue_output, np.float32),
):
    for value in values:
        kept.append(onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape(value), kind, "cuda", 0))
        if kind is np.int64:
            kept[-1].update_inplace(np.zeros(shape(value), kind))
        bind(value.name, kept[-1])
runs = {}

def run(name, number):
    counters = {call: ctypes.c_long.in_dll(library, "count_" + call) for call in json.loads(sys.argv[2])}
    for counter in counters.values():
        counter.value = 0
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    session.run_with_iobinding(binding, options)
    runs[name] = {call: counter.value for call, counter in counters.items() if counter.value}

try:
    run("plain", -1)
except Exception as error:  # SDXL's text encoders take a minimum, for which the provider wants cuDNN
    runs["none"] = " ".join(str(error).split())[-200:]
else:
    run("first", 1)
    run("second", 1)
    other = threading.Thread(target=run, args=("second, another thread", 1))
    other.start()
    other.join()
print(json.dumps({"nodes": nodes, "refused by session.disable_cpu_ep_fallback": refused, "runs": runs}))
"""

COUNTED = ("cudaGraphLaunch", "cudaStreamBeginCapture", "__cudaLaunchKernel", "cudaMemcpy", "cudaMemcpyAsync")
PROPERTIES = {360: 8, 364: 9, 384: 128, 308: 32, 320: 1024, 604: 1536, 296: 49152, 672: 101376}
"""Of cudaDeviceProp of CUDA 13, by offset: compute capability 8.9, multiprocessors, threads of a warp, a block and a
multiprocessor, shared memory of a block and the most of it.
"""
NEW = "(void **made) { *made = malloc(4096); return 0; }"
ALLOCATED = "(void **made, size_t size) { *made = malloc(size + 1); return 0; }"
BODIES = {
    **dict.fromkeys(("cudaMalloc", "cudaMallocHost", "cudaHostAlloc"), ALLOCATED),
    **dict.fromkeys(("cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaEventCreate"), NEW),
    **dict.fromkeys(("cudaEventCreateWithFlags", "cublasCreate_v2", "cublasLtCreate", "cudaGraphInstantiate"), NEW),
    "cudaStreamEndCapture": "(void *stream, void **made) { *made = malloc(8); return 0; }",
    **dict.fromkeys(("cudaFree", "cudaFreeHost"), "(void *memory) { free(memory); return 0; }"),
    **dict.fromkeys(
        ("cudaMemcpy", "cudaMemcpyAsync"), "(void *to, const void *from, size_t n) { memcpy(to, from, n); return 0; }"
    ),
    **dict.fromkeys(
        ("cudaMemset", "cudaMemsetAsync"), "(void *to, int value, size_t n) { memset(to, value, n); return 0; }"
    ),
    "cudaGetDevice": "(int *found) { *found = 0; return 0; }",
    "cudaGetDeviceCount": "(int *found) { *found = 1; return 0; }",
    "cudaMemGetInfo": "(size_t *free, size_t *total) { *free = *total = (size_t)8 << 30; return 0; }",
    **dict.fromkeys(("cudaRuntimeGetVersion", "cudaDriverGetVersion"), "(int *found) { *found = 13000; return 0; }"),
    "cudaStreamIsCapturing": "(void *stream, int *found) { *found = 0; return 0; }",
    "cudaDeviceGetAttribute": "(int *found, int which) { *found = which == 75 ? 8 : which == 76 ? 9 : 64; return 0; }",
    "cudaGetDeviceProperties": "(char *found) { memset(found, 0, 1008); "
    + " ".join(f"*(int *)(found + {offset}) = {value};" for offset, value in PROPERTIES.items())
    + " return 0; }",
}
"""What the stubs do. Every other function returns 0, which is success."""
TEXTS = ("cudaGetErrorString", "cudaGetErrorName", "cublasGetStatusName", "cublasGetStatusString")


def stubs(provider: Path, folder: Path) -> None:
    """Libraries with every function that the provider takes from CUDA's."""
    needed = subprocess.run(["readelf", "-d", provider], capture_output=True, text=True, check=True).stdout
    taken = subprocess.run(
        ["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True
    ).stdout
    functions: dict[str, set[str]] = {name: set() for name in re.findall(r"\[(lib(?:cu\w+)\.so\.\d+)\]", needed)}
    for name, library in re.findall(r"U (\w+)@(lib\w+\.so\.\d+)", taken):
        functions.setdefault(library, set()).add(name)
    functions["libcuda.so.1"].add("cuTensorMapEncodeTiled")
    folder.mkdir(parents=True, exist_ok=True)
    for library, names in functions.items():
        lines = ["#include <stdlib.h>", "#include <string.h>", "static void *handle[4];"]
        for name in sorted(names):
            body = BODIES.get(name, "(void) { return 0; }")
            if name in COUNTED:
                lines.append(f"long count_{name};")
                body = body.replace("{", f"{{ count_{name}++;", 1)
            kind = "int"
            if name in TEXTS:
                kind, body = "const char *", '(void) { return "stub"; }'
            elif name == "__cudaRegisterFatBinary":
                kind, body = "void *", "(void) { return handle; }"
            lines.append(f"{kind} {name}{body}")
        source, versions = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
        subprocess.run(
            [
                "cc",
                "-w",
                "-shared",
                "-fPIC",
                "-o",
                folder / library,
                source,
                f"-Wl,-soname,{library}",
                f"-Wl,--version-script={versions}",
            ],
            check=True,
        )


def on_stubs(python: Path, bundle: Path, folder: Path) -> dict[str, Any]:
    """What the provider does with a bundle where CUDA's libraries do nothing."""
    [provider] = folder.glob("venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so")
    stubs(provider, folder / "stubs")
    ran = subprocess.run(
        [python, "-c", ON_STUBS, bundle, json.dumps(COUNTED)],
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder / "stubs")},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        return {"failed": ran.stderr[-2000:], "ok": False}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    runs = found["runs"]
    if "none" in runs:
        return found | {"ok": "cuDNN" in runs["none"]}
    captured = [runs[name].get("cudaStreamBeginCapture", 0) for name in ("plain", "first", "second, another thread")]
    return found | {"ok": runs["second"] == {"cudaGraphLaunch": 1} and captured == [0, 1, 1]}


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
    if shutil.which("cc") and shutil.which("nm"):
        found["on stubs"] = on_stubs(python, options.bundle.absolute(), options.folder.absolute())
        ok = ok and found["on stubs"]["ok"]
    if options.json:
        print(json.dumps(found | {"ok": ok}, indent=2))
    else:
        print(f"onnxruntime-gpu {found['version']}, GPUs: {', '.join(found['gpus']) or 'none'}")
        print(f"loaded with the CPU provider: {', '.join(found['loaded'])}")
        print(f"doctor: {found['doctor']}\ndoctor, were there a GPU: {found['doctor, were there a GPU']}")
        for name, answer in {**found["sessions"], "picture": found["picture"], "auto": found["auto"]}.items():
            print(f"{name}: {answer.get('refused') or answer.get('made')}")
        for name, value in found.get("on stubs", {}).items():
            print(f"on stubs: {name}: {json.dumps(value)}")
        print(
            "as it should be" if ok else f"NOT as it should be: each was to be {wanted}, and all is to be ok on stubs"
        )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
