"""sdrt beside every peer that runs on a CPU, in one run: the same weights, noise, steps and guidance; fresh processes
that take turns.

Each peer has its own environment, made from its pinned requirements in benchmarks/peers/, and runs at the best settings
its documentation gives.
Reported: a warm step, decoding, text encoding, cold start (process start to the end of the first step, less a warm
step), peak memory and installed size, each as a ratio to sdrt on OpenVINO in the same precision (float32, or bfloat16
for all that is shorter), with a bootstrap interval over the pairs of processes; and the picture's PSNR to diffusers' in
float32 (bfloat16 for SDXL, whose float32 takes too much memory). A peer that cannot be installed or run is a line that says why.

Caches that a peer documents (compiled code, compiled models, a bundle's engines) are filled by one uncounted process
each, and before each process its environment, model and caches are read once: rows that share files would otherwise
find them in memory, and the others wait for the disk. Every sample is a file under --folder: a run that was stopped
goes on where it was, and more --runs add to it. Pairs share a moment on the machine only where all rows ran together:
take a new --folder for figures to quote, not one that rows were added to.
Usage: python benchmarks/peers/race.py --folder DIR [--venvs DIR] [--size emoji|sd15|sdxl] [--runs N] [--steps N] [--peer
NAME]... [--threads N] Writes DIR/peers.json and DIR/peers.md. sd15 is Stable Diffusion 1.5's layout with random weights
at 512x512: 20 GB of disk, 12 GB of memory, hours. sdxl is SDXL's at 1024x1024: 50 GB of disk, 20 GB of memory. It needs an installation for development (see CONTRIBUTING.md) and a
package index.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import report as peer_report
from setup import PEERS, ROOT, Installed, Models, PeerFailed, installed, python_of

SEED = 1
LIMIT_S = 3600
"""For one process, the compilation of its first one included."""
PROMPT, NEGATIVE = "red apple", ""


@dataclass(frozen=True)
class Size:
    """What is drawn: (width, height) in pixels, guidance scale, steps and counted runs unless others are asked for.
    `reference` is the row whose picture the others are compared with, which runs in any case.
    """

    picture: tuple[int, int]
    cfg: float
    steps: int
    runs: int
    reference: str = "diffusers float32"


SIZES = {
    "emoji": Size((64, 64), 3.0, 10, 7),
    "sd15": Size((512, 512), 7.5, 4, 7),
    "sdxl": Size((1024, 1024), 7.5, 2, 3),
}


@dataclass(frozen=True)
class Peer:
    """A row. `environment` names its requirements, `script` run_<script>.py, `model` a form of `Models`; `base` is the
    row it is compared with.
    """

    environment: str
    script: str
    model: str
    base: str
    options: dict[str, Any] = field(default_factory=dict)


FLOAT32, BFLOAT16 = "sdrt OpenVINO float32", "sdrt OpenVINO bfloat16"
ROWS = {
    FLOAT32: Peer("sdrt-openvino", "sdrt", "bundle-fp32", FLOAT32, {"backend": "openvino"}),
    BFLOAT16: Peer("sdrt-openvino", "sdrt", "bundle-bf16", BFLOAT16, {"backend": "openvino"}),
    "sdrt ONNX Runtime float32": Peer("sdrt-onnxruntime", "sdrt", "bundle-saved", FLOAT32, {"backend": "onnxruntime"}),
    "diffusers float32": Peer("diffusers", "diffusers", "diffusers", FLOAT32, {"dtype": "float32", "compile": False}),
    "diffusers bfloat16": Peer(
        "diffusers", "diffusers", "diffusers", BFLOAT16, {"dtype": "bfloat16", "compile": False}
    ),
    "diffusers torch.compile float32": Peer(
        "diffusers", "diffusers", "diffusers", FLOAT32, {"dtype": "float32", "compile": True}
    ),
    "diffusers torch.compile bfloat16": Peer(
        "diffusers", "diffusers", "diffusers", BFLOAT16, {"dtype": "bfloat16", "compile": True}
    ),
    "OpenVINO GenAI default": Peer(
        "openvino-genai", "openvino_genai", "openvino-genai", BFLOAT16, {"static": False, "precision": None}
    ),
    "OpenVINO GenAI static": Peer(
        "openvino-genai", "openvino_genai", "openvino-genai", BFLOAT16, {"static": True, "precision": None}
    ),
    "OpenVINO GenAI static float32": Peer(
        "openvino-genai", "openvino_genai", "openvino-genai", FLOAT32, {"static": True, "precision": "f32"}
    ),
    "optimum-onnx float32": Peer("optimum-onnx", "optimum_onnx", "onnx", FLOAT32),
    "stable-diffusion.cpp f16": Peer(
        "stable-diffusion-cpp", "stable_diffusion_cpp", "checkpoint", BFLOAT16, {"type": "f16", "conv_direct": False}
    ),
    "stable-diffusion.cpp f16, direct": Peer(
        "stable-diffusion-cpp", "stable_diffusion_cpp", "checkpoint", BFLOAT16, {"type": "f16", "conv_direct": True}
    ),
    "stable-diffusion.cpp q8_0": Peer(
        "stable-diffusion-cpp", "stable_diffusion_cpp", "checkpoint", BFLOAT16, {"type": "q8_0", "conv_direct": False}
    ),
}


class Race:
    """One folder of samples, all under the same settings."""

    def __init__(self, folder: Path, environments: Path, size: str, steps: int, threads: int) -> None:
        self.folder, self.environments = folder, environments
        self.samples = folder / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)
        environments.mkdir(parents=True, exist_ok=True)
        wanted = SIZES[size]
        self.reference = wanted.reference
        self.settings = {
            "size": size,
            "picture": wanted.picture,
            "steps": steps,
            "cfg": wanted.cfg,
            "threads": threads,
            "seed": SEED,
            "prompt": PROMPT,
        }
        self.settings |= {"start": "files in memory"}
        record = folder / "settings.json"
        if record.exists() and json.loads(record.read_text()) != json.loads(json.dumps(self.settings)):
            raise SystemExit(f"{folder}: holds a run of other settings: {record.read_text()}. Take another --folder.")
        record.write_text(json.dumps(self.settings))
        self.models = Models(folder, environments, size, wanted.picture)
        self.noise = folder / "noise.npy"
        if not self.noise.exists():
            from sdrt.runtime.sampling.noise import NvNoise

            width, height = wanted.picture
            np.save(self.noise, NvNoise(SEED).draw((1, 4, height // 8, width // 8)))
        self.installed: dict[str, Installed] = {}
        self.failures: dict[str, str] = {}

    def prepare(self, name: str) -> Path:
        """Install a row's environment and make its model.

        Raises:
            PeerFailed: one of them cannot be had.
        """
        self.installed[name] = installed(self.environments, ROWS[name].environment)
        return self.models.path(ROWS[name].model)

    def picture(self, name: str) -> Path:
        return self.samples / f"{slug(name)}.npy"

    def sample(self, name: str, model: Path, run: str) -> None:
        """Run a row's process once and keep its figures, unless they are there.

        Raises:
            PeerFailed: it ended badly.
        """
        target = self.samples / f"{slug(name)}-{run}.json"
        if target.exists():
            return
        row, log = ROWS[name], self.samples / f"{slug(name)}.log"
        cache = self.folder / "caches" / slug(name)
        cache.mkdir(parents=True, exist_ok=True)
        threads = str(self.settings["threads"])
        variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, "SDRT_CACHE_DIR": str(cache)}
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
        if row.script == "sdrt":
            environment["PYTHONPATH"] = str(ROOT)
        settings = {key: self.settings[key] for key in ("prompt", "steps", "cfg", "seed", "threads")}
        settings |= {
            "size": self.settings["picture"],
            "negative": NEGATIVE,
            "model": str(model),
            "noise": str(self.noise),
            "options": row.options,
        }
        settings |= {"picture": str(self.picture(name)), "cache": str(cache)}
        for used in (
            self.environments / row.environment,
            model,
            cache,
            *([ROOT / "sdrt"] if row.script == "sdrt" else []),
        ):
            read_files(used)
        unfinished = target.with_suffix(".unfinished")
        settings["started_s"] = time.monotonic()
        words = [
            python_of(self.environments, row.environment),
            PEERS / f"run_{row.script}.py",
            json.dumps(settings),
            unfinished,
        ]
        with log.open("w") as output:
            try:
                status = subprocess.run(
                    [str(word) for word in words],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    timeout=LIMIT_S,
                ).returncode
            except subprocess.TimeoutExpired:
                raise PeerFailed(f"not done after {LIMIT_S} s") from None
        if status:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise PeerFailed(f"exit code {status}: {lines[-1].strip()[:300] if lines else 'said nothing'}")
        unfinished.rename(target)

    def run(self, names: list[str], runs: int) -> None:
        """An uncounted process of each row, then rounds in which each has its turn, in an order drawn anew every
        round.
        """
        models = {}
        for name in names:
            try:
                models[name] = self.prepare(name)
                print(f"{name}: first process", file=sys.stderr, flush=True)
                self.sample(name, models[name], "first")
            except PeerFailed as error:
                models.pop(name, None)
                self.failures[name] = str(error)
                print(f"{name}: {error}", file=sys.stderr, flush=True)
        for i in range(runs):
            order = sorted(models)
            random.Random(i).shuffle(order)
            for name in order:
                print(f"round {i + 1} of {runs}: {name}", file=sys.stderr, flush=True)
                try:
                    self.sample(name, models[name], f"{i:03d}")
                except PeerFailed as error:
                    del models[name]
                    self.failures[name] = f"in round {i + 1}: {error}"

    def report(self, names: list[str], runs: int) -> dict[str, Any]:
        samples = {name: [self._figures(name, f"{i:03d}") for i in range(runs)] for name in names}
        first = {name: figures for name in names if (figures := self._figures(name, "first")) is not None}
        pictures = {
            name: np.load(self.picture(name))
            for name in names
            if self.picture(name).exists() and name not in self.failures
        }
        sizes = {name: made.size_bytes / 1e6 for name, made in self.installed.items()}
        bases = {name: ROWS[name].base for name in names}
        return peer_report.report(self.settings, bases, samples, first, pictures, sizes, self.failures, self.reference)

    def _figures(self, name: str, run: str) -> dict[str, Any] | None:
        path = self.samples / f"{slug(name)}-{run}.json"
        figures: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return figures


def read_files(path: Path) -> int:
    """Bring a file, or all files under a folder, into the page cache; how many bytes they are."""
    size, block = 0, bytearray(1 << 24)
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as source:
                while count := source.readinto(block):
                    size += count
    return size


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def main() -> None:
    from sdrt.machine.cpu import usable_cores

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="models, samples and the report")
    parser.add_argument("--venvs", type=Path, help="the peers' environments; FOLDER/venvs by default")
    parser.add_argument("--size", choices=tuple(SIZES), default="emoji")
    parser.add_argument("--runs", type=int, help="counted processes of each row")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--peer", action="append", choices=tuple(ROWS), help="only these rows, and those they are compared with"
    )
    parser.add_argument("--note", help="a line for the head of the report, such as what else the machine was doing")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    runs, steps = arguments.runs or size.runs, arguments.steps or size.steps
    if steps < 2:
        parser.error("--steps: at least 2, since a warm step is counted from the end of the one before it")
    asked = arguments.peer or list(ROWS)
    names = [
        name
        for name in ROWS
        if name in asked
        or name in (size.reference, ROWS[size.reference].base)
        or any(ROWS[other].base == name for other in asked)
    ]
    race = Race(
        arguments.folder.absolute(),
        (arguments.venvs or arguments.folder / "venvs").absolute(),
        arguments.size,
        steps,
        arguments.threads,
    )
    race.run(names, runs)
    report = race.report(names, runs) | {"note": arguments.note}
    (arguments.folder / "peers.json").write_text(json.dumps(report, indent=1))
    text = peer_report.markdown(report)
    (arguments.folder / "peers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
