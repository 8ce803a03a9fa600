"""The options of the `sdrt` command: every long one, and every one that several commands take, declared once.

A type here says an option's name, its help and what it holds. Its default stands in the command that takes it.
The functions at the end read the values of options.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sdrt.errors import UsageError
from sdrt.machine import interruptible

# Several commands take these.


def _note_json(ctx: typer.Context, as_json: bool) -> bool:
    """Remember for the whole command that stdout is JSON, so that an error is printed as JSON too."""
    ctx.find_root().obj = "json" if as_json else None
    return as_json


BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder made by `sdrt build`, such as model.sdrt.")
]
BundleOrCheckpoint = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE|CHECKPOINT",
        help="A folder made by `sdrt build`, such as model.sdrt; or a checkpoint, as one file or as the folder that "
        "diffusers saves.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=_note_json, help="Print one JSON object on stdout; words and progress stay on stderr."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="CPU threads; the engine's own choice if not given.")
]

# sdrt build

Checkpoint = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        metavar="FILE|DIR",
        help="Stable Diffusion checkpoint: one .safetensors, .ckpt, .pt or .bin file in any tool's layout, "
        "or a folder that diffusers saved. Nothing in it is ever executed.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE[:TE_SCALE]]",
        help="LoRA, LyCORIS or DoRA file to fuse; may be repeated, and they act in the order given, which matters only "
        "where one is a DoRA. SCALE (default 1) weighs its change of the UNet, TE_SCALE (default SCALE) that of the "
        "text encoder. AUTOMATIC1111's prompt syntax has the two in the other order.",
    ),
]
Embeddings = Annotated[
    list[str] | None,
    typer.Option(
        "--embedding",
        metavar="FILE[:TRIGGER]",
        help="Textual-inversion embedding to put into the vocabulary; may be repeated. TRIGGER (default the file's "
        "stem) is what a prompt says to use it.",
    ),
]
Hypernetworks = Annotated[
    list[str] | None,
    typer.Option(
        "--hypernetwork",
        metavar="FILE[:SCALE]",
        help="Hypernetwork to build in, AUTOMATIC1111's .pt; may be repeated, they apply in the order given. SCALE "
        "(default 1) weighs it.",
    ),
]
Vae = Annotated[
    Path | None,
    typer.Option(
        "--vae",
        metavar="FILE|DIR",
        help="VAE to use instead of the checkpoint's own: a file in any layout, a diffusers VAE's folder, or another "
        "checkpoint.",
    ),
]
Ema = Annotated[
    bool, typer.Option("--ema", help="Take the UNet's averaged (EMA) weights, of a checkpoint that holds both.")
]
PreparedTargets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="NAME",
        help="Engine to prepare; may be repeated: onnxruntime and onnxruntime-cuda run the bundle as it is, and "
        "nothing is saved for them (sdrt compile does for onnxruntime, which takes gigabytes); openvino, tensorrt-rtx "
        "and tensorrt compile it for the bundle's size once it is built, openvino for prompts of up to 75 and of up to "
        "150 tokens. auto is tensorrt where it is installed and a GPU answers, else openvino where it is installed, "
        "else onnxruntime.",
    ),
]
StoragePrecision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="fp16|bf16|fp32",
        help="Storage type of the weights. ONNX Runtime computes in float32 whatever it is, OpenVINO in bfloat16 where "
        "the CPU has it and this is not fp32.",
    ),
]
VaePrecision = Annotated[
    str | None,
    typer.Option(
        "--vae-precision",
        metavar="fp16|fp32",
        help="What the VAE computes in on a GPU: fp32, or fp16 as the rest. If not given: fp32 for SDXL, whose VAE "
        "overflows in float16, else as the rest. Give fp16 with a VAE that was made for it.",
    ),
]
BuildCheck = Annotated[
    str,
    typer.Option(
        "--check",
        metavar="quick|full",
        help="How the build checks its graphs: quick evaluates every operator with weights again, full also compares "
        "each graph with its network in PyTorch. A graph whose trace does not come with sdrt is always compared.",
    ),
]
Prediction = Annotated[
    str | None,
    typer.Option(
        "--prediction",
        metavar="eps|v|x0",
        help="What the UNet predicts: the noise, v, or the picture (x0, one-step models); what the checkpoint says if "
        "not given.",
    ),
]
ZeroSnr = Annotated[
    bool,
    typer.Option(
        "--zero-snr",
        help="The UNet was trained with no signal left at its last timestep; what the checkpoint says if not given.",
    ),
]
NoZeroSnr = Annotated[
    bool, typer.Option("--no-zero-snr", help="The UNet was not trained so, whatever the checkpoint says.")
]
DefaultSize = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="WxH",
        help="Default picture size in pixels, multiples of 8; the checkpoint's own if not given. `generate` may choose "
        "any other that an engine takes.",
    ),
]
BuiltClipSkips = Annotated[
    list[int] | None,
    typer.Option(
        "--clip-skip",
        metavar="N",
        help="Text-encoder layer to use, counted from the end as AUTOMATIC1111 does: 1, the last, if not given. Repeat "
        "it to build several; `generate --clip-skip` then chooses, the first being its default.",
    ),
]
AllowUnmatched = Annotated[
    bool,
    typer.Option(
        "--allow-unmatched",
        help="Leave out LoRA keys that belong to no module of the model, and the part of a hypernetwork that belongs "
        "to no layer, instead of failing.",
    ),
]
NewBundle = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="NAME.sdrt",
        help="Folder to write; by default the stems of the checkpoint and LoRAs, in the working folder.",
    ),
]

# sdrt generate

Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="What to show, in AUTOMATIC1111's syntax: (word:1.2), [day:dusk:0.5], AND, BREAK. Left out only with "
        "--from-png or --settings-from.",
        show_default=False,
    ),
]
Negative = Annotated[
    str | None,
    typer.Option(
        "--negative",
        metavar="TEXT",
        help='What to steer away from. --compat diffusers tells "" from none given, for models with two text encoders.',
    ),
]
Prompt2 = Annotated[
    str | None,
    typer.Option(
        "--prompt-2",
        metavar="TEXT",
        help="What the second text encoder reads, of a model that has two and with --compat diffusers; PROMPT if not "
        "given.",
    ),
]
Negative2 = Annotated[
    str | None, typer.Option("--negative-2", metavar="TEXT", help="The same of --negative, which has to be given too.")
]
ImageCfg = Annotated[
    float | None,
    typer.Option(
        "--image-cfg", metavar="X", help="How much the picture guides that an edit model edits; 1.5 if not given."
    ),
]
Sampler = Annotated[
    str,
    typer.Option(
        "--sampler",
        metavar="NAME",
        help="One of euler, euler_a, heun, lms, ddim, ddpm, plms, dpm2, dpm2_a, dpmpp_2s_a, dpmpp_2m, dpmpp_sde, "
        "dpmpp_2m_sde, dpmpp_3m_sde, unipc, lcm, tcd; AUTOMATIC1111's spelling (\"DPM++ 2M Karras\") and diffusers' "
        "class names work too.",
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        metavar="NAME",
        help="Noise levels to pass through, such as karras or sgm_uniform; the sampler's own if not given.",
    ),
]
CfgRescale = Annotated[
    float,
    typer.Option(
        "--cfg-rescale",
        metavar="X",
        help="Bring the contrast that guidance adds back by this share, 0 to 1; 0.7 suits models with zero terminal "
        "SNR.",
    ),
]
Timesteps = Annotated[
    str | None,
    typer.Option(
        "--timesteps",
        metavar="N,N,N",
        help="In place of --steps and --schedule, the timesteps to pass through, falling: 999,749,499,249.",
    ),
]
Sigmas = Annotated[
    str | None,
    typer.Option(
        "--sigmas",
        metavar="X,X,0",
        help="The same as noise levels, falling and ending in 0: 14.6,4.8,1.3,0.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        help="Seed of the first picture; picture i has seed + i. Drawn and reported if not given, or -1.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="WxH", help="Picture size in pixels, multiples of 8; the bundle's own if not given."
    ),
]
OriginalSize = Annotated[
    str | None,
    typer.Option(
        "--original-size",
        metavar="WxH",
        help="Size that a model that is told sizes is told the picture had before it was cropped; that of the picture "
        "if not given. A small one makes it blurred.",
    ),
]
CropTopLeft = Annotated[
    str | None,
    typer.Option(
        "--crop-top-left",
        metavar="T,L",
        help="Where such a model is told the picture was cropped, in pixels from the top and the left; 0,0 if not "
        "given.",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        "--target-size",
        metavar="WxH",
        help="Size that such a model is told the picture has; the picture's own if not given.",
    ),
]
InitImage = Annotated[
    Path | None,
    typer.Option(
        "--init-image",
        metavar="F",
        help="Picture to start from instead of noise alone, or, for an edit model, to edit.",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        metavar="X",
        help="How much the init image may change, more than 0 to 1; 0.75 if not given (diffusers: 0.8, under a mask "
        "1).",
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option("--mask", metavar="F", help="What to repaint of the init image: white is repainted, black kept."),
]
MaskBlur = Annotated[
    int | None,
    typer.Option(
        "--mask-blur", metavar="PX", help="How far the mask's edge is softened; 4 if not given (diffusers: 0)."
    ),
]
Resize = Annotated[
    str, typer.Option("--resize", metavar="stretch|crop|fill", help="How an init image of another size is fitted.")
]
Compat = Annotated[
    str,
    typer.Option(
        "--compat",
        metavar="a1111|diffusers",
        help="Whose picture to make where the two differ: timesteps, step counts, noise, rounding.",
    ),
]
Noise = Annotated[
    str | None,
    typer.Option(
        "--noise",
        metavar="nv|cpu",
        help="Noise source: nv is AUTOMATIC1111's default, cpu is PyTorch's and the default of --compat diffusers.",
    ),
]
ClipSkip = Annotated[
    int | None,
    typer.Option(
        "--clip-skip",
        metavar="N",
        help="Text-encoder layer counted from the end, among those the bundle was built with.",
    ),
]
PromptSyntax = Annotated[
    str | None,
    typer.Option(
        "--prompt-syntax",
        metavar="a1111|plain",
        help="plain takes brackets as text; the default of --compat diffusers.",
    ),
]
Emphasis = Annotated[
    str, typer.Option("--emphasis", metavar="NAME", help="What (word:1.2) does: original, no norm, none or ignore.")
]
NetworkTags = Annotated[
    str,
    typer.Option(
        "--network-tags",
        metavar="refuse|ignore",
        help="What becomes of <lora:name:0.8> in a prompt, unless it is what the bundle holds at that strength.",
    ),
]
FromPng = Annotated[
    Path | None,
    typer.Option(
        "--from-png",
        metavar="F.png",
        help="Make a picture of sdrt again with its own bundle and settings; options given beside it replace them. "
        "Pictures it was made from are looked for beside it.",
    ),
]
SettingsFrom = Annotated[
    Path | None,
    typer.Option(
        "--settings-from",
        metavar="F.png",
        help="Use the prompt and settings of any picture of sdrt or AUTOMATIC1111 as far as this bundle can; says what "
        "it could not use. Options given beside it replace them.",
    ),
]
Preview = Annotated[
    Path | None,
    typer.Option(
        "--preview",
        metavar="DIR",
        help="Write the estimate of each picture after every model call into this folder while it runs.",
    ),
]
ContactSheet = Annotated[
    Path | None,
    typer.Option(
        "--contact-sheet", metavar="F.png", help="Write the way from noise to the first picture as one image."
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="auto, onnxruntime, onnxruntime-cuda, openvino, tensorrt-rtx or tensorrt. auto takes the fastest that can "
        "run here: an engine in the bundle, or ONNX Runtime, which needs none.",
    ),
]
OnMissing = Annotated[
    str,
    typer.Option(
        "--on-missing",
        metavar="compile|fallback|error",
        help="What to do for a size, prompt length or number of AND parts that no engine of the bundle serves: compile "
        "it in memory, in seconds and anew each time (OpenVINO; on a GPU an error), run it on ONNX Runtime, or end "
        "with an error.",
    ),
]
Device = Annotated[int, typer.Option("--device", metavar="N", help="GPU to use, counted from 0; ignored on a CPU.")]
Cores = Annotated[
    str,
    typer.Option(
        "--cores",
        metavar="own|shared",
        help="shared where other processes keep the cores busy too: threads then sleep while they wait, instead of "
        "spinning.",
    ),
]
NewPicture = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="F.png",
        help="Picture to write, its folder too: PNG, or by its ending JPEG (.jpg) or WebP (.webp), which lose a "
        "little; several become F-SEED.png. A picture sdrt made is replaced, any other file only with --force. By "
        "default BUNDLE-SEED.png in the working folder, or BUNDLE-SEED-2.png and so on: nothing is replaced.",
    ),
]

# sdrt inspect

FileOrBundle = Annotated[
    Path,
    typer.Argument(
        metavar="FILE|BUNDLE", help="A checkpoint, adapter or VAE in any format, a diffusers folder, or a bundle."
    ),
]
FittedCheckpoint = Annotated[
    Path | None,
    typer.Option(
        "--for",
        metavar="CHECKPOINT",
        help="Say too whether the file, a LoRA, embedding, hypernetwork or VAE, fits this checkpoint. Exit code 1 if "
        "not.",
    ),
]
AllFields = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Print every field: sizes of the networks, all metadata, hashes of all files. --json has them anyway.",
    ),
]

# sdrt verify and sdrt sign

PublicKey = Annotated[
    Path | None,
    typer.Option(
        "--key",
        metavar="PUBLIC.pem",
        help="Also check that this ed25519 key signed the bundle and every engine in it, before anything else.",
    ),
]
Signature = Annotated[
    Path | None,
    typer.Option(
        "--signature", metavar="FILE", help="Where the signature is; NAME.sdrt.sig beside the bundle if not given."
    ),
]
VerifyTimeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="S",
        help="Seconds after which it ends with exit code 7: a graph may be made to take for ever.",
    ),
]
PrivateKey = Annotated[
    Path,
    typer.Option(
        "--key",
        metavar="PRIVATE.pem",
        help="An ed25519 private key in PEM, as `openssl genpkey -algorithm ed25519` makes it.",
    ),
]
NewSignature = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Where to write the signature; NAME.sdrt.sig beside the bundle if not given.",
    ),
]

# sdrt compile

CompiledTargets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="NAME",
        help="What to compile for; may be repeated: openvino (this CPU), onnxruntime (this CPU, any shape: its "
        "optimised graphs, for a fast start, at twice the disk of 16-bit weights), tensorrt-rtx (GeForce and RTX, "
        "ahead of time, needs no GPU) or tensorrt (on the GPU that will run it).",
    ),
]
GpuGenerations = Annotated[
    str | None,
    typer.Option(
        "--sm",
        metavar="86,89,120",
        help="GPU generations of tensorrt-rtx: 75, 80, 86, 89, 120, 121. Each adds kernels to the engine. Default "
        "86,89,120, and this machine's.",
    ),
]
SizeRange = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="WxH[:WxH]",
        help="Picture size in pixels, or the smallest and the largest; the bundle's own if not given.",
    ),
]
BatchRange = Annotated[str, typer.Option("--batch", metavar="N[:M]", help="Pictures per model call, or a range.")]
TokenRange = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="N[:M]",
        help="Prompt tokens, multiples of 77, or a range; if not given 77, for openvino an engine for 77 and one for "
        "154.",
    ),
]
Branches = Annotated[
    str | None,
    typer.Option(
        "--branches",
        metavar="1,2",
        help="Numbers of guidance branches: 1 is guidance off, 2 a prompt and a negative one, 3 what an edit model "
        "takes. If not given 1 and what the model takes with guidance.",
    ),
]
Arithmetic = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="Arithmetic: bf16 or fp32 for openvino, which takes bf16 where the CPU has it; a precision of the "
        "bundle's graphs for a GPU.",
    ),
]
CompilingDevice = Annotated[
    int, typer.Option("--device", metavar="N", help="GPU that tensorrt compiles on, counted from 0.")
]
Prune = Annotated[
    bool,
    typer.Option(
        "--prune",
        help="Remove engines that can never run again: of other graphs or weights, of another version of the "
        "compiler, damaged.",
    ),
]
CompileTimeout = Annotated[
    float,
    typer.Option("--timeout", metavar="S", help="Seconds after which it ends with exit code 7, and no engine appears."),
]

# sdrt bench

BENCH_FORMATS = ("markdown", "junit", "bencher", "github", "csv", "html")

BenchScenario = Annotated[
    str,
    typer.Option(
        "--scenario",
        metavar="NAME",
        help="single: one picture after the other; batch: --batch at a time; server: requests arrive at random, --rate "
        "per second.",
    ),
]
BenchSize = Annotated[
    str | None, typer.Option("--size", metavar="WxH", help="Picture size in pixels; the bundle's own if not given.")
]
BenchSteps = Annotated[int, typer.Option("--steps", metavar="N", help="Steps of the sampler.")]
BenchCfg = Annotated[float, typer.Option("--cfg", metavar="X", help="Guidance scale; 1 turns guidance off.")]
BenchSampler = Annotated[str, typer.Option("--sampler", metavar="NAME", help="Sampler, as for generate.")]
BenchSchedule = Annotated[str | None, typer.Option("--schedule", metavar="NAME", help="Schedule, as for generate.")]
BenchPrompt = Annotated[
    str,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="What to show. Every picture gets a number after it, so that no cache of prompts hides the text encoder.",
    ),
]
BenchPrompts = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Prompts that take turns, one a line, in place of --prompt."),
]
BenchSeed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed of every call, and of the arrivals of a server.")
]
BenchBatch = Annotated[
    int | None, typer.Option("--batch", metavar="N", help="Pictures per model call; 1, or 4 for the batch scenario.")
]
Processes = Annotated[int, typer.Option("--processes", metavar="N", help="Fresh processes, one after the other.")]
Pictures = Annotated[int, typer.Option("--pictures", metavar="N", help="Calls measured per process.")]
MaxPictureTime = Annotated[
    float,
    typer.Option("--max-picture-time", metavar="S", help="Stop a process's measured calls after this many seconds."),
]
WarmUp = Annotated[
    float,
    typer.Option("--warm-up", metavar="S", help="Longest warm-up; it ends sooner once three medians agree within 2 %."),
]
Rate = Annotated[float, typer.Option("--rate", metavar="X", help="server: requests per second.")]
Duration = Annotated[
    float, typer.Option("--duration", metavar="S", help="server: seconds during which requests arrive.")
]
Queue = Annotated[
    int, typer.Option("--queue", metavar="N", help="server: requests that may wait; further ones are rejected.")
]
BenchBackend = Annotated[str, typer.Option("--backend", metavar="NAME", help="Engine to measure, as for generate.")]
BenchDevice = Annotated[int, typer.Option("--device", metavar="N", help="GPU to use, counted from 0.")]
MeasuredBundle = Annotated[
    Path | None,
    typer.Argument(
        metavar="BUNDLE|CHECKPOINT",
        help="What to measure, as for generate; only --check-machine can do without.",
    ),
]
Layers = Annotated[
    bool,
    typer.Option(
        "--layers", help="Also profile each graph: slowest operators, arithmetic, share of the machine's measured peak."
    ),
]
Label = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="TEXT",
        help="What to call the bundle in a history and in series of CI systems; its own name if not given. Runs of one "
        "label are one series.",
    ),
]
CheckMachine = Annotated[
    bool,
    typer.Option(
        "--check-machine",
        help="Only say how small a change this machine can show: with BUNDLE's pictures, or without one by work of "
        "numpy's. Exit code 8 if the default margin is out of reach.",
    ),
]
CheckTime = Annotated[float, typer.Option("--check-time", metavar="S", help="Seconds that --check-machine may take.")]
Emit = Annotated[
    list[str] | None,
    typer.Option(
        "--emit",
        metavar="FORMAT=FILE",
        help=f"Also write a file for a CI system; may be repeated. Formats: {', '.join(BENCH_FORMATS)}.",
    ),
]
Gates = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="bench.toml",
        help="Margins and gates; bench.toml beside the new bundle or file if it is there.",
    ),
]
CompareAnyway = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Show two results that are not comparable side by side all the same. There is no verdict then, and the "
        "exit code stays 9.",
    ),
]
Pairs = Annotated[
    int | None,
    typer.Option(
        "--pairs",
        metavar="N",
        help="At most so many pairs of processes; as bench.toml says, or 30. Fewer than 6 decide nothing.",
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        "--margin",
        metavar="X",
        help="Margin of the gated timings, such as 0.05; as bench.toml says, or 0.05.",
    ),
]
MaxTime = Annotated[
    float,
    typer.Option(
        "--max-time",
        metavar="S",
        help="Begin no pair after the sixth that would end after so many seconds.",
    ),
]
OldPython = Annotated[
    Path | None,
    typer.Option(
        "--old-python",
        metavar="FILE",
        help="Interpreter to run OLD.sdrt with, where another version of sdrt is installed; this one if not given. "
        "Compares runtimes too.",
    ),
]
FailBeyondFence = Annotated[
    bool, typer.Option("--check", help="Exit code 1 if the newest run of any metric lies beyond its fence.")
]

# Values


def parse_size(text: str | None, option: str = "--size") -> tuple[int, int] | None:
    """The (width, height) in pixels that an option `WxH` names.

    Raises:
        UsageError: it is not two numbers with an x between them.
    """
    if text is None:
        return None
    size = _size(text)
    if size is None:
        raise UsageError(f"{option} {text}: expected WIDTHxHEIGHT in pixels", f"Write it as {option} 512x768.")
    return size


def parse_corner(text: str | None) -> tuple[int, int] | None:
    """The (top, left) in pixels that a `--crop-top-left T,L` names.

    Raises:
        UsageError: it is not two numbers with a comma between them.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6}),(\d{1,6})", text)
    if match is None:
        raise UsageError(f"--crop-top-left {text}: expected TOP,LEFT in pixels", "Write it as --crop-top-left 0,0.")
    return int(match[1]), int(match[2])


def parse_sizes(text: str | None) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The smallest and the largest size that a `--size WxH[:WxH]` names; both are the same where it names one.

    Raises:
        UsageError: it is neither a size nor two with a colon between them.
    """
    if text is None:
        return None
    low, colon, high = text.partition(":")
    smallest, largest = _size(low), _size(high if colon else low)
    if smallest is None or largest is None:
        raise UsageError(
            f"--size {text}: expected WIDTHxHEIGHT, or a smallest and a largest",
            "Write it as --size 512x768 or --size 512x512:768x768.",
        )
    return smallest, largest


def _size(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text)
    return None if match is None else (int(match[1]), int(match[2]))


def parse_range(option: str, text: str) -> tuple[int, int]:
    """The smallest and the largest number that an option `N[:M]` names.

    Raises:
        UsageError: it is neither a number nor two with a colon between them.
    """
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text)
    if match is None:
        fix = f"Write it as {option} 1 or {option} 1:4."
        raise UsageError(f"{option} {text}: expected a number, or a smallest and a largest", fix)
    return int(match[1]), int(match[2] or match[1])


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers that an option `N,N,N` lists.

    Raises:
        UsageError: it is not a list of numbers.
    """
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", text) is None:
        raise UsageError(f"{option} {text}: expected numbers with commas between them")
    return tuple(int(part) for part in text.split(","))


def parse_timesteps(text: str | None) -> tuple[int, ...] | None:
    """The timesteps that `--timesteps` lists. Their range and order are the request's to check.

    Raises:
        UsageError: it is not a list of whole numbers.
    """
    if text is None:
        return None
    if re.fullmatch(r"-?\d{1,6}(,-?\d{1,6})*", text) is None:
        raise UsageError(
            f"--timesteps {text}: expected whole numbers with commas between them",
            "Write it as --timesteps 999,749,499,249.",
        )
    return tuple(int(part) for part in text.split(","))


def parse_sigmas(text: str | None) -> tuple[float, ...] | None:
    """The noise levels that `--sigmas` lists. Their range and order are the request's to check.

    Raises:
        UsageError: it is not a list of numbers.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--sigmas {text}: expected numbers with commas between them", "Write it as --sigmas 14.6,4.8,1.3,0."
        ) from error


PARSERS: dict[str, Callable[[str | None], object]] = {
    "size": parse_size,
    "original_size": partial(parse_size, option="--original-size"),
    "target_size": partial(parse_size, option="--target-size"),
    "crop_top_left": parse_corner,
    "timesteps": parse_timesteps,
    "sigmas": parse_sigmas,
}
"""How to read the values of options that name a setting of a request, where they are texts there and none in it."""


def time_limit(seconds: float, bundle: Path) -> AbstractContextManager[None]:
    """End what runs inside, a command on `bundle`, with exit code 7 after the `seconds` that `--timeout` gives it.

    Raises:
        UsageError: the time is not above 0, or more than a clock can hold.
    """
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UsageError(f"--timeout {seconds:g}: expected seconds, more than 0", "Leave it out for the default.")
    fix = "Give it more with --timeout, if you trust the bundle; one that was made to take for ever never ends."
    return interruptible.time_limit(seconds, str(bundle), fix)
