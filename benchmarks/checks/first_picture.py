"""How long from a .safetensors file to the first picture, beside diffusers and stable-diffusion.cpp? Each row is a fresh
process, and the rows take turns; files are in memory, caches are empty, but for sdrt's second time.

Stable Diffusion 1.5's size with random weights, 512x512, one guided step. The clock starts before the process and ends
when the picture's pixels are in hand; what takes the seconds is told by the process itself.
Usage: python benchmarks/checks/first_picture.py --folder DIR --venvs DIR [--runs N] [--row NAME]...
The environments are those of `peers/race.py`. Exit code 1 if sdrt's first time is slower than the fastest other row's,
or its second time not twice as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "peers"), str(ROOT / "tests" / "support")]
from make_checkpoint import write_checkpoint  # noqa: E402
from setup import PeerFailed, installed, python_of  # noqa: E402

# Each script gets the checkpoint and a folder of its own, and prints the seconds of its parts as JSON.
SDRT = """
import json, sys, time
marks = [("start", float(sys.argv[3]))]
def mark(name):
    marks.append((name, time.monotonic()))
mark("import")
from pathlib import Path
from sdrt.cached_bundle import cached_bundle
from sdrt.runtime import Pipeline
def progress(stage, done):
    if stage != marks[-1][0]:
        mark(stage)
with cached_bundle(Path(sys.argv[1]), backend=sys.argv[4], progress=progress) as bundle:
    mark("load")
    with Pipeline.load(bundle, backend=sys.argv[4], on_missing="compile") as pipe:
        mark("draw")
        result = pipe("a red apple", steps=1, cfg=7.5, seed=1, size=(512, 512))
        assert result.images.shape == (1, 512, 512, 3)
        mark("end")
print(json.dumps([(name, after - at) for (name, at), (_, after) in zip(marks, marks[1:])]))
"""

DIFFUSERS = """
import json, sys, time
started = float(sys.argv[3])
marks = [("start", started), ("import", time.monotonic())]
import torch
from diffusers import StableDiffusionPipeline
marks.append(("load", time.monotonic()))
pipe = StableDiffusionPipeline.from_single_file(
    sys.argv[1], config=sys.argv[2], local_files_only=True, torch_dtype=getattr(torch, sys.argv[4]), safety_checker=None
)
pipe.unet.to(memory_format=torch.channels_last)
pipe.vae.to(memory_format=torch.channels_last)
pipe.set_progress_bar_config(disable=True)
marks.append(("draw", time.monotonic()))
image = pipe("a red apple", num_inference_steps=1, guidance_scale=7.5, output_type="np", width=512, height=512).images[0]
assert image.shape == (512, 512, 3)
marks.append(("end", time.monotonic()))
print(json.dumps([(name, after - at) for (name, at), (_, after) in zip(marks, marks[1:])]))
"""

CPP = """
import json, sys, time
marks = [("start", float(sys.argv[3])), ("import", time.monotonic())]
from stable_diffusion_cpp import StableDiffusion
marks.append(("load", time.monotonic()))
model = StableDiffusion(model_path=sys.argv[1], vae_decode_only=True, n_threads=2, wtype="f16", verbose=False)
marks.append(("draw", time.monotonic()))
(image,) = model.generate_image(
    "a red apple", width=512, height=512, cfg_scale=7.5, sample_method="euler", sample_steps=1, seed=1
)
assert image.size == (512, 512)
marks.append(("end", time.monotonic()))
print(json.dumps([(name, after - at) for (name, at), (_, after) in zip(marks, marks[1:])]))
"""

ROWS = {
    "sdrt openvino, first": ("sdrt-both", SDRT, "openvino"),
    "sdrt openvino, second": ("sdrt-both", SDRT, "openvino"),
    "sdrt onnxruntime, first": ("sdrt-onnxruntime", SDRT, "onnxruntime"),
    "sdrt onnxruntime, second": ("sdrt-onnxruntime", SDRT, "onnxruntime"),
    "diffusers float32": ("diffusers", DIFFUSERS, "float32"),
    "diffusers bfloat16": ("diffusers", DIFFUSERS, "bfloat16"),
    "stable-diffusion.cpp f16": ("stable-diffusion-cpp", CPP, "f16"),
}


def diffusers_settings(folder: Path) -> Path:
    """The JSON files of a diffusers folder of Stable Diffusion 1.5, without its weights."""
    import reference
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig

    if folder.exists():
        return folder
    unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    unet.save_config(folder / "unet")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    ).save_config(folder / "vae")
    PNDMScheduler(**reference.TRAINING, skip_prk_steps=True, steps_offset=1).save_config(folder / "scheduler")
    CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        architectures=["CLIPTextModel"],
    ).save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    reference.clip_tokenizer(folder / "tokenizer").save_pretrained(folder / "tokenizer")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"} | parts
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def seconds(python: Path, script: str, checkpoint: Path, folder: Path, option: str, cache: Path) -> list[list[object]]:
    """Run a row's script. Returns its parts with their seconds."""
    checkpoint.read_bytes()  # into memory
    environment = os.environ | {"SDRT_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [python, "-c", script, checkpoint, folder, time.monotonic(), option]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=environment, timeout=1800)
    if done.returncode:
        raise PeerFailed(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "said nothing")
    parts: list[list[object]] = json.loads(done.stdout.strip().splitlines()[-1])
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--venvs", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--row", action="append", choices=ROWS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.folder / "sd15.safetensors"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    settings = diffusers_settings(arguments.folder / "settings")
    found: dict[str, list[list[list[object]]]] = {name: [] for name in arguments.row or ROWS}
    for run in range(arguments.runs):
        for name in list(found):
            environment, script, option = ROWS[name]
            cache = arguments.folder / f"cache-{option}"
            if name.endswith("first"):
                shutil.rmtree(cache, ignore_errors=True)
            try:
                installed(arguments.venvs, environment)
                python = python_of(arguments.venvs, environment)
                found[name].append(seconds(python, script, checkpoint, settings, option, cache))
            except (PeerFailed, subprocess.TimeoutExpired) as error:
                print(f"{name}: {error}", flush=True)
                del found[name]
                continue
            total = sum(float(str(part[1])) for part in found[name][-1])
            print(f"run {run + 1}: {name}: {total:.1f} s", file=sys.stderr, flush=True)
    print(f"{'row':28}{'median':>8}  seconds of each part, in the median run")
    medians = {}
    for name, runs in found.items():
        totals = [sum(float(str(part[1])) for part in run) for run in runs]
        medians[name] = statistics.median_low(totals)
        middle = runs[totals.index(medians[name])]
        parts = ", ".join(f"{part} {value:.1f}" for part, value in middle if float(str(value)) >= 0.1)  # type: ignore[str-format]
        print(f"{name:28}{medians[name]:>7.1f} s  {parts}")
    others = [value for name, value in medians.items() if not name.startswith("sdrt")]
    first, second = (min(v for name, v in medians.items() if name.endswith(time)) for time in ("first", "second"))
    kept = not others or (first <= min(others) and 2 * second <= min(others))
    print(f"first {first:.1f} s, second {second:.1f} s, fastest other {min(others, default=0):.1f} s")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
