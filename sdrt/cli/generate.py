"""`sdrt generate`: settings from the command line or from a picture made before, and the files that come of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrt.cli.output import BundleArgument, Json, print_json, progress_bar, size_option
from sdrt.errors import UsageError, printable
from sdrt.publish import folders_made

if TYPE_CHECKING:
    from sdrt.bundle import Manifest
    from sdrt.runtime.contact_sheet import Frame
    from sdrt.runtime.pipeline import Result, Step


def generate(
    ctx: typer.Context,
    bundle: BundleArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to show, in AUTOMATIC1111's syntax: (word:1.2), [day:dusk:0.5], AND, BREAK. Left out only with --from-png or --settings-from.", show_default=False)] = None,
    negative: Annotated[str, typer.Option("--negative", metavar="TEXT", help="What to steer away from.")] = "",
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps of the sampler, 1 to 1000.")] = 20,
    cfg: Annotated[float, typer.Option("--cfg", metavar="X", help="Guidance scale; 1 turns guidance off.")] = 7.0,
    sampler: Annotated[str, typer.Option("--sampler", metavar="NAME", help="One of euler, euler_a, heun, lms, ddim, ddpm, plms, dpm2, dpm2_a, dpmpp_2s_a, dpmpp_2m, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, unipc, lcm, tcd; AUTOMATIC1111's spelling (\"DPM++ 2M Karras\") and diffusers' class names work too.")] = "euler",
    schedule: Annotated[str | None, typer.Option("--schedule", metavar="NAME", help="Noise levels to pass through, such as karras or sgm_uniform; the sampler's own if not given.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of the first picture; picture i has seed + i. Drawn and reported if not given, or -1.")] = None,
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
    network_tags: Annotated[str, typer.Option("--network-tags", metavar="refuse|ignore", help="What becomes of <lora:name:0.8> in a prompt, unless it is what the bundle holds at that strength.")] = "refuse",
    from_png: Annotated[Path | None, typer.Option("--from-png", metavar="F.png", help="Make a picture of sdrt again with its own bundle and settings; options given beside it replace them. Pictures it was made from are looked for beside it.")] = None,
    settings_from: Annotated[Path | None, typer.Option("--settings-from", metavar="F.png", help="Use the prompt and settings of any picture of sdrt or AUTOMATIC1111 as far as this bundle can; says what it could not use. Options given beside it replace them.")] = None,
    preview: Annotated[Path | None, typer.Option("--preview", metavar="DIR", help="Write the estimate of each picture after every model call into this folder while it runs.")] = None,
    contact_sheet: Annotated[Path | None, typer.Option("--contact-sheet", metavar="F.png", help="Write the way from noise to the first picture as one image.")] = None,
    backend: Annotated[str, typer.Option("--backend", metavar="NAME", help="auto, onnxruntime, openvino, tensorrt-rtx or tensorrt. auto takes the fastest engine in the bundle that can run here.")] = "auto",
    on_missing: Annotated[str, typer.Option("--on-missing", metavar="compile|fallback|error", help="What to do for a size, prompt length or number of AND parts that no engine of the bundle serves: compile it in memory, in seconds and anew each time (OpenVINO; on a GPU an error), run it on ONNX Runtime, or end with an error.")] = "compile",
    device: Annotated[int, typer.Option("--device", metavar="N", help="GPU to use, counted from 0; ignored on a CPU.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads; the engine's own choice if not given.")] = None,
    cores: Annotated[str, typer.Option("--cores", metavar="own|shared", help="shared where other processes keep the cores busy too: threads then sleep while they wait, instead of spinning.")] = "own",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="F.png", help="Picture to write, its folder too: PNG, or by its ending JPEG (.jpg) or WebP (.webp), which lose a little; several become F-SEED.png. A picture sdrt made is replaced, any other file only with --force. By default BUNDLE-SEED.png in the working folder, or BUNDLE-SEED-2.png and so on: nothing is replaced.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace whatever file is in the way.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make pictures from a prompt, or from a picture and a prompt. Needs no PyTorch."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.bundle import check_outside_bundles, open_bundle
    from sdrt.runtime import Pipeline
    from sdrt.runtime.picture_file import FORMAT_OF_ENDING, save_new_picture, save_picture
    from sdrt.runtime.request import Request, resolved

    for option, file, endings in (("--output", output, list(FORMAT_OF_ENDING)), ("--contact-sheet", contact_sheet, [".png"])):
        if file is not None and file.suffix.lower() not in endings:
            raise UsageError(f"{option} {file}: expected a name ending in {' or '.join(endings)}")
    if prompt is None and from_png is None and settings_from is None:
        raise UsageError("PROMPT: missing", 'Say what to show: sdrt generate BUNDLE "a red apple".')
    manifest = open_bundle(bundle).manifest
    taken = _settings(ctx, manifest)
    request = resolved(Request(**taken.settings), manifest)
    settings = taken.settings | {"seed": request.seed}
    target = output if output is not None else Path(f"{bundle.resolve().name.removesuffix('.sdrt') or 'picture'}.png")
    alone = output is not None and request.count == 1
    paths = [target if alone else target.with_name(f"{target.stem}-{seed}{target.suffix}") for seed in request.seeds]
    sheets = [] if contact_sheet is None else [contact_sheet]
    folders = [("--output", target.parent), *(("--contact-sheet", sheet.parent) for sheet in sheets)]
    folders += [("--preview", preview)] if preview is not None else []
    for option, folder in folders:
        check_outside_bundles(option, folder)
    _check_different(paths, sheets)
    _check_pictures("--output", paths if output is not None else [], force)
    _check_pictures("--contact-sheet", sheets, force)
    frames: list[Frame] = []
    with ExitStack() as stack:
        for option, folder in folders:
            stack.enter_context(folders_made(option, folder))
        pipe = stack.enter_context(Pipeline.load(bundle, backend=backend, device=device, threads=threads, on_missing=on_missing, cores=cores))
        stream = pipe.stream(**settings)
        for note in taken.notes:
            typer.echo(f"note: {printable(note)}", err=True)
        with progress_bar() as bar:
            task = bar.add_task("denoising", total=None)
            for step in stream:
                bar.update(
                    task,
                    total=step.count * -(-request.count // request.batch),
                    completed=step.picture // request.batch * step.count + step.index,
                    description=f"denoising, picture {step.picture + 1} of {step.pictures}",
                )
                if preview is not None:
                    _write_previews(preview, step, request.seeds[0])
                if contact_sheet is not None:
                    frames += _frames(step)
        result = step.result
        assert result is not None
        pictures, notes = [], []
        for index, (path, seed) in enumerate(zip(paths, result.seeds, strict=True)):
            data = result.encode(FORMAT_OF_ENDING[path.suffix.lower()], index)
            if output is None:
                path = save_new_picture(path, data)
            else:
                notes += [f"{path}: replaced the picture that was there"] if os.path.lexists(path) else []
                save_picture(path, data)
            pictures.append({"path": str(path), "seed": seed})
        if contact_sheet is not None:
            _write_sheet(contact_sheet, frames)
    notes += _differences(from_png, taken.repeated, result)
    for note in notes:
        typer.echo(f"note: {printable(note)}", err=True)
    _report(pictures, result, [*taken.notes, *notes], as_json)


@dataclass(frozen=True)
class _Taken:
    """The request's fields as given, or out of a picture; `notes` say what of it could not be used, `repeated` is what the picture says of itself."""

    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    repeated: Mapping[str, Any] | None = None


def _settings(ctx: typer.Context, manifest: Manifest) -> _Taken:
    """Settings of the command line: all of them, or, beside a picture to take them from, those that are named in place of the picture's."""
    from sdrt.runtime.picture_file import parameters_of, read_said
    from sdrt.runtime.picture_settings import settings_to_repeat, settings_to_reuse
    from sdrt.runtime.request import Request

    again, other = ctx.params["from_png"], ctx.params["settings_from"]
    if again is not None and other is not None:
        raise UsageError("--settings-from: given beside --from-png, which takes all settings of one picture", "Give one of the two.")
    given: dict[str, Any] = {}
    for name in (f.name for f in fields(Request)):
        source = ctx.get_parameter_source(name)
        if (again is None and other is None) or (source is not None and source.name == "COMMANDLINE"):
            given[name] = size_option(ctx.params[name]) if name == "size" else ctx.params[name]
    if again is not None:
        parameters = parameters_of(again, read_said(again))
        return _Taken(settings_to_repeat(again, parameters, manifest, given), repeated=parameters)
    if other is not None:
        reused = settings_to_reuse(other, manifest, given)
        return _Taken(reused.settings, tuple(f"{other}: not used: {line}" for line in reused.unused))
    return _Taken(given)


def _check_different(paths: Sequence[Path], sheets: Sequence[Path]) -> None:
    places = {path.absolute().parent.resolve() / path.name for path in paths}
    for sheet in sheets:
        if sheet.absolute().parent.resolve() / sheet.name in places:
            raise UsageError(f"--contact-sheet {sheet}: a picture is to be written there", "Give it another name than --output.")


def _check_pictures(option: str, paths: Sequence[Path], force: bool) -> None:
    """Fail before the work, not after it, if a picture would replace a file that is not ours."""
    from sdrt.runtime.picture_file import is_ours

    for path in paths:
        if os.path.lexists(path) and not force and not is_ours(path):
            raise UsageError(f"{option} {path}: exists and is not a picture sdrt made", "Choose another name, or pass --force.")


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


def _differences(path: Path | None, repeated: Mapping[str, Any] | None, result: Result) -> Iterator[str]:
    """Why a picture that was made again may be another, in words: its engine was, or what it was made from."""
    if repeated is None:
        return
    made_by, engine = repeated.get("engine"), result.engine
    now: Mapping[str, Any] = result.parameters
    if isinstance(made_by, dict):
        before, after = ([str(of.get(part)) for part in ("backend", "compute")] for of in (made_by, engine))
        if before != after:
            yield f"{path}: made on {' in '.join(before)}, now on {' in '.join(after)}, whose arithmetic rounds otherwise; --backend chooses the engine"
    for name in ("init_image", "mask"):
        was = repeated.get(name)  # without a name its hash is that of pixels, which a file's cannot equal
        if was is not None and repeated.get(f"{name}_sha256") != now[f"{name}_sha256"]:
            yield f"{path}: made from another {name.replace('_', ' ')} than the one given now"


def _report(pictures: Sequence[Mapping[str, Any]], result: Result, notes: Sequence[str], as_json: bool) -> None:
    if as_json:
        print_json({"pictures": pictures, "engine": result.engine, "parameters": result.parameters, "timings_ms": result.timings_ms, "notes": notes})
        return
    for picture in pictures:
        typer.echo(f"{printable(picture['path'])}  seed {picture['seed']}")
    typer.echo(f"{result.timings_ms['total'] / 1000:.2f} s on {result.engine['backend']}", err=True)
