"""`sdrt generate`: settings from the command line or from an earlier picture, and the files that are made of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrt.cli import options
from sdrt.cli.cache import bundle_given
from sdrt.cli.output import print_json, print_notes
from sdrt.cli.progress import progress_bar
from sdrt.errors import UsageError, printable
from sdrt.files.publish import folders_made

if TYPE_CHECKING:
    from sdrt.bundle.manifest import Manifest
    from sdrt.runtime.pictures.contact_sheet import Frame
    from sdrt.runtime.pipeline import Result, Step


def generate(
    ctx: typer.Context,
    bundle: options.BundleOrCheckpoint,
    prompt: options.Prompt = None,
    negative: options.Negative = None,
    prompt_2: options.Prompt2 = None,
    negative_2: options.Negative2 = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Steps of the sampler, 1 to 1000.")] = 20,
    cfg: Annotated[float, typer.Option("--cfg", metavar="X", help="Guidance scale; 1 turns guidance off.")] = 7.0,
    image_cfg: options.ImageCfg = None,
    cfg_rescale: options.CfgRescale = 0.0,
    sampler: options.Sampler = "euler",
    schedule: options.Schedule = None,
    timesteps: options.Timesteps = None,
    sigmas: options.Sigmas = None,
    seed: options.Seed = None,
    size: options.Size = None,
    original_size: options.OriginalSize = None,
    crop_top_left: options.CropTopLeft = None,
    target_size: options.TargetSize = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Pictures per model call, 1 to 64.")] = 1,
    count: Annotated[int, typer.Option("--count", metavar="N", help="Pictures in total.")] = 1,
    init_image: options.InitImage = None,
    strength: options.Strength = None,
    mask: options.Mask = None,
    mask_blur: options.MaskBlur = None,
    resize: options.Resize = "stretch",
    compat: options.Compat = "a1111",
    noise: options.Noise = None,
    clip_skip: options.ClipSkip = None,
    prompt_syntax: options.PromptSyntax = None,
    emphasis: options.Emphasis = "original",
    network_tags: options.NetworkTags = "refuse",
    from_png: options.FromPng = None,
    settings_from: options.SettingsFrom = None,
    lora: options.Loras = None,
    embedding: options.Embeddings = None,
    hypernetwork: options.Hypernetworks = None,
    vae: options.Vae = None,
    preview: options.Preview = None,
    contact_sheet: options.ContactSheet = None,
    backend: options.Backend = "auto",
    on_missing: options.OnMissing = "compile",
    device: options.Device = 0,
    threads: options.Threads = None,
    cores: options.Cores = "own",
    output: options.NewPicture = None,
    force: Annotated[bool, typer.Option("--force", help="Replace whatever file is in the way.")] = False,
    as_json: options.Json = False,
) -> None:
    """Make pictures from a prompt, or from a picture and a prompt.

    BUNDLE may be a checkpoint, as it was downloaded, with --lora, --embedding, --hypernetwork and --vae for what goes
    into it. The first time this builds its bundle into the cache; from then on it starts at once. `sdrt cache` lists
    what is kept. A bundle of `sdrt build` takes none of these four.
    """
    from sdrt.bundle.folder import check_outside_bundles, open_bundle
    from sdrt.runtime import Pipeline
    from sdrt.runtime.pictures.file import FORMAT_OF_ENDING, save_new_picture, save_picture
    from sdrt.runtime.request import Request, resolved

    for option, file, endings in (
        ("--output", output, list(FORMAT_OF_ENDING)),
        ("--contact-sheet", contact_sheet, [".png"]),
    ):
        if file is not None and file.suffix.lower() not in endings:
            raise UsageError(f"{option} {file}: expected a name ending in {' or '.join(endings)}")
    if prompt is None and from_png is None and settings_from is None:
        raise UsageError("PROMPT: missing", 'Say what to show: sdrt generate BUNDLE "a red apple".')
    bundle = ctx.with_resource(bundle_given(bundle, backend, ctx.params))
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
        pipeline = Pipeline.load(
            bundle, backend=backend, device=device, threads=threads, on_missing=on_missing, cores=cores
        )
        stream = stack.enter_context(pipeline).stream(**settings)
        print_notes(taken.notes)
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
    print_notes(notes)
    _report(bundle, pictures, result, [*taken.notes, *notes], as_json)


@dataclass(frozen=True)
class _Taken:
    """The fields of a request, as given or out of a picture.

    `notes` say what of a picture's settings could not be used. `repeated` is what a picture that is made again says of
    itself.
    """

    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    repeated: Mapping[str, Any] | None = None


def _settings(ctx: typer.Context, manifest: Manifest) -> _Taken:
    """The settings of the command line, or those of a picture where one is named to take them from.

    Options that are given beside a picture replace its settings; options that are left out do not.
    """
    from sdrt.runtime.pictures.file import parameters_of, read_said
    from sdrt.runtime.pictures.settings import settings_to_repeat, settings_to_reuse
    from sdrt.runtime.request import Request

    again, other = ctx.params["from_png"], ctx.params["settings_from"]
    if again is not None and other is not None:
        raise UsageError(
            "--settings-from: given beside --from-png, which takes all settings of one picture", "Give one of the two."
        )
    given: dict[str, Any] = {}
    for name in (f.name for f in fields(Request)):
        source = ctx.get_parameter_source(name)
        if (again is None and other is None) or (source is not None and source.name == "COMMANDLINE"):
            value = ctx.params[name]
            given[name] = options.PARSERS[name](value) if name in options.PARSERS else value
    if again is not None:
        parameters = parameters_of(again, read_said(again))
        return _Taken(settings_to_repeat(again, parameters, manifest, given), repeated=parameters)
    if other is not None:
        reused = settings_to_reuse(other, manifest, given)
        return _Taken(reused.settings, tuple(f"{other}: not used: {line}" for line in reused.unused))
    return _Taken(given)


def _check_different(paths: Sequence[Path], sheets: Sequence[Path]) -> None:
    """Fail if the contact sheet would take the place of a picture."""
    places = {path.absolute().parent.resolve() / path.name for path in paths}
    for sheet in sheets:
        if sheet.absolute().parent.resolve() / sheet.name in places:
            raise UsageError(
                f"--contact-sheet {sheet}: a picture is to be written there", "Give it another name than --output."
            )


def _check_pictures(option: str, paths: Sequence[Path], force: bool) -> None:
    """Fail before the work, not after it, if a picture would replace a file that sdrt did not make."""
    from sdrt.runtime.pictures.file import is_ours

    for path in paths:
        if os.path.lexists(path) and not force and not is_ours(path):
            raise UsageError(
                f"{option} {path}: exists and is not a picture sdrt made", "Choose another name, or pass --force."
            )


def _write_previews(folder: Path, step: Step, first_seed: int) -> None:
    """Write the estimate of each picture of this model call, under the picture's seed and the call's number."""
    from PIL import Image

    from sdrt.files.publish import new_file, staged_file

    for i, pixels in enumerate(step.preview()):
        with (
            staged_file(folder / f"{first_seed + step.picture + i}-{step.index:03}.png") as stage,
            new_file(stage) as stream,
        ):
            Image.fromarray(pixels).save(stream, "PNG")


def _frames(step: Step) -> list[Frame]:
    """What the contact sheet shows of this model call: nothing for most calls, and for every picture but the first."""
    from sdrt.runtime.pictures.contact_sheet import Frame, shown_calls

    if step.picture or step.index not in shown_calls(step.count):
        return []
    return [Frame(step.noisy_preview()[0], step.preview()[0], f"{step.index} of {step.count}")]


def _write_sheet(path: Path, frames: Sequence[Frame]) -> None:
    from PIL.PngImagePlugin import PngInfo

    from sdrt.files.publish import new_file, staged_file
    from sdrt.runtime.pictures.contact_sheet import contact_sheet
    from sdrt.runtime.pictures.file import CONTACT_SHEET, JSON_CHUNK

    info = PngInfo()
    info.add_text(JSON_CHUNK, CONTACT_SHEET)  # ours, so that the next one may replace it
    with staged_file(path) as stage, new_file(stage) as stream:
        contact_sheet(frames).save(stream, "PNG", pnginfo=info)


def _differences(path: Path | None, repeated: Mapping[str, Any] | None, result: Result) -> Iterator[str]:
    """Why a picture that was made again may differ: another engine made it, or it was made from another picture."""
    if repeated is None:
        return
    made_by, engine = repeated.get("engine"), result.engine
    now: Mapping[str, Any] = result.parameters
    if isinstance(made_by, dict):
        before, after = ([str(of.get(part)) for part in ("backend", "compute")] for of in (made_by, engine))
        if before != after:
            engines = f"made on {' in '.join(before)}, now on {' in '.join(after)}"
            yield f"{path}: {engines}, whose arithmetic rounds otherwise; --backend chooses the engine"
    for name in ("init_image", "mask"):
        was = repeated.get(name)  # without a name the hash is that of pixels, which no file's hash can equal
        if was is not None and repeated.get(f"{name}_sha256") != now[f"{name}_sha256"]:
            yield f"{path}: made from another {name.replace('_', ' ')} than the one given now"


def _report(
    bundle: Path, pictures: Sequence[Mapping[str, Any]], result: Result, notes: Sequence[str], as_json: bool
) -> None:
    if as_json:
        print_json(
            {
                "bundle": str(bundle.absolute()),
                "pictures": pictures,
                "engine": result.engine,
                "parameters": result.parameters,
                "timings_ms": result.timings_ms,
                "notes": notes,
            }
        )
        return
    for picture in pictures:
        typer.echo(f"{printable(picture['path'])}  seed {picture['seed']}")
    typer.echo(f"{result.timings_ms['total'] / 1000:.2f} s on {result.engine['backend']}", err=True)
