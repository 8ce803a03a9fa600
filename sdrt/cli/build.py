"""`sdrt build`: a checkpoint and its adapters become a bundle, and engines for it where `--target` asks for them."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sdrt.cli import options
from sdrt.cli.compile import as_fields, compile_after_build, print_compiled
from sdrt.cli.output import print_json, print_notes
from sdrt.cli.progress import BUILD_STAGES, StageProgress
from sdrt.compile.compilers import checked_targets
from sdrt.errors import UsageError, printable

if TYPE_CHECKING:
    from sdrt.bundle.manifest import Source


def build(
    checkpoint: options.Checkpoint,
    lora: options.Loras = None,
    embedding: options.Embeddings = None,
    hypernetwork: options.Hypernetworks = None,
    vae: options.Vae = None,
    ema: options.Ema = False,
    target: options.PreparedTargets = None,
    precision: options.StoragePrecision = "fp16",
    vae_precision: options.VaePrecision = None,
    prediction: options.Prediction = None,
    zero_snr: options.ZeroSnr = False,
    no_zero_snr: options.NoZeroSnr = False,
    size: options.DefaultSize = None,
    clip_skip: options.BuiltClipSkips = None,
    allow_unmatched: options.AllowUnmatched = False,
    check: options.BuildCheck = "quick",
    output: options.NewBundle = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output if it is a bundle. Nothing else is ever replaced.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Turn a checkpoint and its adapters into a bundle.

    Models of a published size need no PyTorch: the traces of their networks come with sdrt. Other sizes are traced
    with PyTorch, about a minute; later builds of the same sizes take the traces from the cache ($SDRT_CACHE_DIR, or
    ~/.cache/sdrt). Every build checks each graph before it calls itself done.
    """
    from sdrt.export.adapters.embedding import parse_embedding_option
    from sdrt.export.adapters.hypernetwork import parse_hypernetwork_option
    from sdrt.export.adapters.match import parse_lora_option
    from sdrt.export.build import BuildOptions
    from sdrt.export.build import build as run_build

    targets = checked_targets(target or ["auto"])
    if zero_snr and no_zero_snr:
        raise UsageError("--zero-snr, --no-zero-snr: say opposite things", "Give one of them.")
    asked = BuildOptions(
        checkpoint,
        loras=tuple(parse_lora_option(text) for text in lora or []),
        vae=vae,
        precision=precision,
        size=options.parse_size(size),
        clip_skip=tuple(clip_skip or [1]),
        allow_unmatched=allow_unmatched,
        output=output,
        force=force,
        embeddings=tuple(parse_embedding_option(text) for text in embedding or []),
        hypernetworks=tuple(parse_hypernetwork_option(text) for text in hypernetwork or []),
        ema=ema,
        prediction=prediction,
        zero_snr=True if zero_snr else False if no_zero_snr else None,
        vae_precision=vae_precision,
        check=check,
    )
    with StageProgress(BUILD_STAGES) as progress:
        report = run_build(asked, progress)
    manifest = report.manifest
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    print_notes(report.notes)
    engines = compile_after_build(report.path, targets)
    if as_json:
        errors = {
            graph: {compute: record.error for compute, record in precisions.items()}
            for graph, precisions in manifest.graphs.items()
        }
        print_json(
            {
                "bundle": str(report.path),
                "size_bytes": size_bytes,
                "sources": [asdict(source) for source in manifest.sources],
                "notes": list(report.notes),
                "stages_s": dict(report.stages_s),
                "cached_traces": list(report.cached),
                "errors": errors,
                "engines": [as_fields(engine) for engine in engines],
            }
        )
        return
    for source in manifest.sources:
        _print_applied(source)
    seconds = sum(report.stages_s.values())
    typer.echo(f"built {printable(str(report.path))} ({size_bytes / 1e6:.1f} MB) in {seconds:.1f} s")
    for engine in engines:
        print_compiled(engine, manifest)
    bundle = printable(os.path.relpath(report.path))
    typer.echo(f'next: sdrt generate {bundle} "your prompt" --output picture.png', err=True)


def _print_applied(source: Source) -> None:
    """Say what an adapter changed. A checkpoint or VAE is not spoken of."""
    name, applied = printable(source.name), source.applied
    if source.kind == "lora":
        changes = [
            f"{count} modules of the {component} (change {source.relative_change[component]:.1%})"
            for component, count in applied.items()
        ]
        typer.echo(f"{name} at {source.scale:g}:{source.te_scale:g} applied to {', '.join(changes) or 'nothing'}")
    elif source.kind == "embedding":
        said = printable(source.trigger or "")
        typer.echo(f"{name}: {applied['text_encoder']} vectors; a prompt uses it by saying {said}")
    elif source.kind == "hypernetwork":
        typer.echo(f"{name} at {source.scale:g} applied to {applied.get('unet', 0)} attention layers")
