"""What sdrt costs around the network: import, host work per step, and process start to first picture beside diffusers.

All on the emoji model, in one run: diffusers loads the same weights, saved in its own folder format beforehand. Ratios
are of runs that alternate, so they hold on a machine whose speed drifts. Usage: python benchmarks/checks/startup.py
[--runs N] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "examples" / "emoji"
IMPORT_LIMIT_S, HOST_LIMIT_MS, COLD_RATIO_LIMIT = 0.25, 0.2, 0.2

DIFFUSERS_PICTURE = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32, local_files_only=True)
pipe.set_progress_bar_config(disable=True)
pipe("red apple", num_inference_steps=20, guidance_scale=3.0, height=64, width=64, generator=torch.Generator("cpu").manual_seed(0)).images[0].save(sys.argv[2])
"""


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    return time.perf_counter() - started


def alternating(first: list[str], second: list[str], runs: int) -> tuple[list[float], list[float]]:
    """Wall seconds of two commands run in turn, after one uncounted run of each."""
    seconds(first)
    seconds(second)
    pairs = [(seconds(first), seconds(second)) for _ in range(runs)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def host_ms_per_step(bundle: Path, steps: int) -> float:
    """Milliseconds a denoising step spends outside the engine call: everything the pipeline's own loop does."""
    from sdrt.runtime import Pipeline
    from sdrt.runtime.running_batch import Slots

    inside = 0.0

    class Timed:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            nonlocal inside
            started = time.perf_counter()
            self.session.run_with_iobinding(binding, options)
            inside += time.perf_counter() - started

    with Pipeline.load(bundle) as pipe:
        list(pipe.stream("red apple", steps=3, cfg=3, seed=0))
        stream = pipe.stream("red apple", steps=steps, cfg=3, seed=0)
        step = next(stream)  # text encoding, noise and tables are done here
        assert isinstance(step._batch, Slots)
        memory: Any = step._batch._memory
        memory._session = Timed(memory._session)
        started = time.perf_counter()
        for _ in range(steps - 2):  # the last one decodes
            next(stream)
        elapsed = time.perf_counter() - started
        stream.close()
    return (elapsed - inside) / (steps - 2) * 1000


def save_for_diffusers(bundle: Path, folder: Path) -> None:
    """The bundle's stored weights as a diffusers folder."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import reference
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    weights, sizes = reference.stored_weights(bundle), reference.sizes(bundle)
    vocabulary = folder.parent / "vocabulary"
    vocabulary.mkdir()
    StableDiffusionPipeline(
        vae=reference.vae(weights, sizes["vae"]),
        text_encoder=reference.text_model(weights, sizes["texts"][0]),
        tokenizer=reference.clip_tokenizer(vocabulary),
        unet=reference.unet(weights, sizes["unet"]),
        scheduler=EulerDiscreteScheduler(**reference.TRAINING, timestep_spacing="linspace"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = folder / "emoji.sdrt"
        sdrt = [sys.executable, "-m", "sdrt"]
        subprocess.run(
            [
                *sdrt,
                "build",
                "--checkpoint",
                str(EMOJI / "emoji.safetensors"),
                "--target",
                "onnxruntime",
                "--output",
                str(bundle),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        save_for_diffusers(bundle, folder / "diffusers")
        numpy_s, runtime_s = alternating(
            [sys.executable, "-c", "import numpy"],
            [sys.executable, "-c", "import numpy, sdrt.runtime"],
            arguments.runs * 2,
        )
        ours = [
            *sdrt,
            "generate",
            str(bundle),
            "red apple",
            "--cfg",
            "3",
            "--seed",
            "0",
            "--output",
            str(folder / "ours.png"),
        ]
        theirs = [sys.executable, "-c", DIFFUSERS_PICTURE, str(folder / "diffusers"), str(folder / "theirs.png")]
        ours_s, theirs_s = alternating(ours, theirs, arguments.runs)
        host_ms = host_ms_per_step(bundle, 100)
    over_numpy = statistics.median(b - a for a, b in zip(numpy_s, runtime_s, strict=True))
    ratio = statistics.median(a / b for a, b in zip(ours_s, theirs_s, strict=True))
    rows = [
        ("import sdrt.runtime over import numpy", over_numpy, "s", IMPORT_LIMIT_S),
        ("host time per step outside the engine", host_ms, "ms", HOST_LIMIT_MS),
        ("process start to picture, sdrt / diffusers", ratio, "x", COLD_RATIO_LIMIT),
    ]
    if arguments.json:
        samples = {"numpy_s": numpy_s, "runtime_s": runtime_s, "sdrt_s": ours_s, "diffusers_s": theirs_s}
        print(
            json.dumps(
                {
                    "rows": [
                        {"name": n, "value": v, "unit": u, "limit": limit, "ok": v <= limit} for n, v, u, limit in rows
                    ],
                    "samples": samples,
                },
                indent=1,
            )
        )
        return
    for name, value, unit, limit in rows:
        print(f"{name:44}{value:9.3f} {unit:3} limit {limit:5} {'ok' if value <= limit else 'OVER'}")
    print(
        f"process start to picture: sdrt {statistics.median(ours_s):.2f} s, diffusers {statistics.median(theirs_s):.2f}"
        f" s (medians of {arguments.runs})"
    )


if __name__ == "__main__":
    main()
