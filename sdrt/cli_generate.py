"""`sdrt generate`: settings from the command line or from a picture made before, and the files that come of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrt.cli_output import BundleArgument, Json, print_json, progress_bar, size_option
from sdrt.document import read_document
from sdrt.errors import InputFileError, UsageError, printable

if TYPE_CHECKING:
    from sdrt.bundle import Manifest
    from sdrt.runtime.contact_sheet import Frame
    from sdrt.runtime.pipeline import Result, Step


def generate(
    ctx: typer.Context,
    bundle: BundleArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to show, in AUTOMATIC1111's syntax: (word:1.2), [day:dusk:0.5], AND, BREAK. Left out only with --from-png.", show_default=False)] = None,
    negative: Annotated[str, typer.Option("--negative", metavar="TEXT", help="What to steer away from.")] = "",
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps of the sampler, 1 to 1000.")] = 20,
    cfg: Annotated[float, typer.Option("--cfg", metavar="X", help="Guidance scale; 1 turns guidance off.")] = 7.0,
    sampler: Annotated[str, typer.Option("--sampler", metavar="NAME", help="One of euler, euler_a, heun, lms, ddim, ddpm, plms, dpm2, dpm2_a, dpmpp_2s_a, dpmpp_2m, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, unipc, lcm, tcd; AUTOMATIC1111's spelling (\"DPM++ 2M Karras\") and diffusers' class names work too.")] = "euler",
    schedule: Annotated[str | None, typer.Option("--schedule", metavar="NAME", help="Noise levels to pass through, such as karras or sgm_uniform; the sampler's own if not given.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of the first picture; picture i has seed + i. Drawn and reported if not given.")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Picture size in pixels, multiples of 8; the bundle's own if not given.")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Pictures per model call, 1 to 64.")] = 1,
    count: Annotated[int, typer.Option("--count", metavar="N", help="Pictures in total.")] = 1,
    init_image: Annotated[Path | None, typer.Option("--init-image", metavar="F", help="Picture to start from instead of noise alone.")] = None,
    strength: Annotated[float | None, typer.Option("--strength", metavar="X", help="How much the init image may change, more than 0 to 1; 0.75 if not given (diffusers: 0.8, under a mask 1).")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", metavar="F", help="What to repaint of the init image: white is repainted, black kept.")] = None,
    mask_blur: Annotated[int | None, typer.Option("--mask-blur", metavar="PX", help="How far the mask's edge is softened; 4 if not given (diffusers: 0).")] = None,
    resize: Annotated[str, typer.Option("--resize", metavar="stretch|crop|fill", help="How an init image of another size is fitted.")] = "stretch",
    compat: Annotated[str, typer.Option("--compat", metavar="a1111|diffusers", help="Whose picture to make where the two differ: timesteps, step counts, noise, rounding.")] = "a1111",
    noise: Annotated[str | None, typer.Option("--noise", metavar="nv|cpu", help="Noise source: nv is AUTOMATIC1111's default, cpu is PyTorch's and the default of --compat diffusers.")] = None,
    clip_skip: Annotated[int | None, typer.Option("--clip-skip", metavar="N", help="Text-encoder layer counted from the end, among those the bundle was built with.")] = None,
    prompt_syntax: Annotated[str | None, typer.Option("--prompt-syntax", metavar="a1111|plain", help="plain takes brackets as text; the default of --compat diffusers.")] = None,
    emphasis: Annotated[str, typer.Option("--emphasis", metavar="NAME", help="What (word:1.2) does: original, no norm, none or ignore.")] = "original",
    from_png: Annotated[Path | None, typer.Option("--from-png", metavar="F.png", help="Make a picture of sdrt again with its own settings; options given beside it replace them.")] = None,
    preview: Annotated[Path | None, typer.Option("--preview", metavar="DIR", help="Write the estimate of each picture after every model call into this folder while it runs.")] = None,
    contact_sheet: Annotated[Path | None, typer.Option("--contact-sheet", metavar="F.png", help="Write the way from noise to the first picture as one image.")] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="auto, onnxruntime, openvino, tensorrt-rtx or tensorrt. auto takes the fastest engine in the bundle that can run here; a shape it was not compiled for is an error that says what to do.")] = "auto",
    device: Annotated[int, typer.Option("--device", metavar="N", help="GPU to use, counted from 0; ignored on a CPU.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads; the engine's own choice if not given.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="F.png", help="PNG to write; several pictures become F-SEED.png. By default BUNDLE-SEED.png in the working folder. A picture sdrt made is replaced; any other file needs --force.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace whatever file is in the way.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make pictures from a prompt, or from a picture and a prompt. Needs no PyTorch."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.bundle import open_bundle
    from sdrt.runtime import Pipeline
    from sdrt.runtime.picture_file import read_parameters, save_picture
    from sdrt.runtime.request import draw_seed

    for name, path in (("--output", output), ("--contact-sheet", contact_sheet)):
        if path is not None and path.suffix.lower() != ".png":
            raise UsageError(f"{name} {path}: expected a name ending in .png")
    replayed = (open_bundle(bundle).manifest, read_parameters(from_png)) if from_png is not None else None
    settings = _settings(ctx, replayed)
    if settings.get("seed") is None:
        settings["seed"] = draw_seed()
    first, count = settings["seed"], settings["count"]
    target = output if output is not None else Path(f"{bundle.name.removesuffix('.sdrt')}-{first}.png")
    paths = [target if count == 1 else target.with_name(f"{target.stem}-{first + i}{target.suffix}") for i in range(max(count, 0))]
    frames: list[Frame] = []
    with Pipeline.load(bundle, backend=backend, device=device, threads=threads) as pipe:
        stream = pipe.stream(**settings)
        _check_pictures([*paths, *([contact_sheet] if contact_sheet is not None else [])], force)
        if preview is not None:
            _make_folder(preview)
        with progress_bar() as bar:
            task = bar.add_task("denoising", total=None)
            for step in stream:
                batch = settings["batch"]
                bar.update(
                    task,
                    total=step.count * -(-count // batch),
                    completed=step.picture // batch * step.count + step.index,
                    description=f"denoising, picture {step.picture + 1} of {step.pictures}",
                )
                if preview is not None:
                    _write_previews(preview, step, first)
                if contact_sheet is not None:
                    frames += _frames(step)
    result = step.result
    assert result is not None
    for i, path in enumerate(paths):
        save_picture(path, result.encode("png", i))
    if contact_sheet is not None:
        _write_sheet(contact_sheet, frames)
    _report(paths, result, as_json)
    if replayed is not None and (note := _other_engine(replayed[1].get("engine"), result.engine)):
        typer.echo(f"note: {printable(str(from_png))}: {note}", err=True)


def _settings(ctx: typer.Context, replayed: tuple[Manifest, dict[str, Any]] | None) -> dict[str, Any]:
    """The request's fields as given: all of them, or, beside --from-png, those of the picture with what the command line names in their place."""
    from sdrt.runtime.picture_file import request_of
    from sdrt.runtime.request import Request

    given: dict[str, Any] = {}
    base: dict[str, Any] = {}
    if replayed is not None:
        request = request_of(ctx.params["from_png"], *replayed)
        base = {f.name: getattr(request, f.name) for f in fields(Request)}
    for name in (f.name for f in fields(Request)):
        source = ctx.get_parameter_source(name)
        if not base or (source is not None and source.name == "COMMANDLINE"):
            value = ctx.params[name]
            given[name] = size_option(value) if name == "size" else value
    settings = base | given
    if settings.get("prompt") is None:
        raise UsageError("PROMPT: missing", 'Say what to show: sdrt generate BUNDLE "a red apple".')
    return settings


def _check_pictures(paths: Sequence[Path], force: bool) -> None:
    """Fail before the work, not after it, if a picture could not be written or would replace a file that is not ours."""
    from PIL import Image

    from sdrt.runtime.images import MAX_FILE_BYTES

    for path in paths:
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--output {path}: its folder does not exist", "Create the folder first.")
        if force or not os.path.lexists(path):
            continue
        try:
            with Image.open(BytesIO(read_document(path, MAX_FILE_BYTES).data), formats=["PNG"]) as image:
                ours = "sdrt" in image.info
        except (OSError, SyntaxError, ValueError, InputFileError, Image.DecompressionBombError):
            ours = False
        if not ours:
            raise UsageError(f"--output {path}: exists and is not a picture sdrt made", "Choose another name, or pass --force.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"--preview {folder}: cannot be made: {error.strerror}", "Choose another folder.") from error


def _write_previews(folder: Path, step: Step, first_seed: int) -> None:
    from PIL import Image

    from sdrt.publish import new_file, staged_file

    for i, pixels in enumerate(step.preview()):
        with staged_file(folder / f"{first_seed + step.picture + i}-{step.index:03}.png") as stage, new_file(stage) as stream:
            Image.fromarray(pixels).save(stream, "PNG")


def _frames(step: Step) -> list[Frame]:
    """What the contact sheet shows of this model call: nothing, if it is not one of those shown or belongs to a later picture."""
    from sdrt.runtime.contact_sheet import Frame, shown_calls

    if step.picture or step.index not in shown_calls(step.count):
        return []
    return [Frame(step.noisy_preview()[0], step.preview()[0], f"{step.index} of {step.count}")]


def _write_sheet(path: Path, frames: Sequence[Frame]) -> None:
    from PIL.PngImagePlugin import PngInfo

    from sdrt.publish import new_file, staged_file
    from sdrt.runtime.contact_sheet import contact_sheet
    from sdrt.runtime.picture_file import CONTACT_SHEET, JSON_CHUNK

    info = PngInfo()
    info.add_text(JSON_CHUNK, CONTACT_SHEET)  # ours, so that the next one may replace it
    with staged_file(path) as stage, new_file(stage) as stream:
        contact_sheet(frames).save(stream, "PNG", pnginfo=info)


def _other_engine(made_by: object, engine: Mapping[str, Any]) -> str:
    """That a picture was first made on another engine, in words; empty if not."""
    if not isinstance(made_by, dict):
        return ""
    before, now = ([str(of.get(part)) for part in ("backend", "compute")] for of in (made_by, engine))
    if before == now:
        return ""
    return f"made on {printable(' in '.join(before))}, now on {' in '.join(now)}, whose arithmetic rounds otherwise; --backend chooses the engine"


def _report(paths: Sequence[Path], result: Result, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "pictures": [{"path": str(path), "seed": seed} for path, seed in zip(paths, result.seeds, strict=True)],
                "engine": result.engine,
                "parameters": result.parameters,
                "timings_ms": result.timings_ms,
            }
        )
        return
    for path, seed in zip(paths, result.seeds, strict=True):
        typer.echo(f"{printable(str(path))}  seed {seed}")
    typer.echo(f"{result.timings_ms['total'] / 1000:.2f} s on {result.engine['backend']}", err=True)
