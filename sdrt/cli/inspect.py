"""`sdrt inspect`: what a file or bundle is. A summary in words; `--all` prints every field, and `--json` always has them all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sdrt.cli import compile as cli_compile
from sdrt.cli.output import Json, print_json, print_report
from sdrt.errors import UsageError

_SHOWN_METADATA, _SHOWN_CHARACTERS = 8, 100
_TELLING = ("modelspec.title", "modelspec.architecture", "modelspec.", "ss_output_name", "ss_base_model_version", "ss_network_", "ss_clip_skip", "ss_v2")
"""How the metadata that most readers look for starts, most wanted first."""


def inspect(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE|BUNDLE", help="A checkpoint, adapter or VAE in any format, a diffusers folder, or a bundle.")],
    checkpoint: Annotated[Path | None, typer.Option("--for", metavar="CHECKPOINT", help="Say too whether the file, a LoRA, embedding, hypernetwork or VAE, fits this checkpoint. Exit code 1 if not.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every field: sizes of the networks, all metadata, hashes of all files. --json has them anyway.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Say what a file or bundle is: family, components, adapters, sizes. Reads headers only."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.bundle import MANIFEST, open_bundle
    from sdrt.export.inspect import inspect_file

    if os.path.exists(path / MANIFEST) or path.suffix == ".sdrt":
        if checkpoint is not None:
            raise UsageError(f"--for {checkpoint}: {path} is a bundle, which goes into no checkpoint", "Give it the file of an adapter or VAE.")
        opened = open_bundle(path)
        report: dict[str, Any] = {"path": str(opened.path), "kind": "a bundle", "size_bytes": sum(f.size_bytes for f in opened.manifest.files.values())}
        report |= asdict(opened.manifest) | {"engines": cli_compile.engines_of(opened)}
    else:
        report = inspect_file(path)
    if checkpoint is not None:
        from sdrt.export.fitting import fit

        report |= fit(path, report["kind"], checkpoint)
    if as_json:
        print_json(report)
    elif everything:
        print_report(report)
    else:
        print_report(_bundle_summary(report) if report["kind"] == "a bundle" else _file_summary(report))
        typer.echo("all fields: sdrt inspect --all", err=True)
    if not report.get("fits", True):
        raise typer.Exit(1)


def _file_summary(report: Mapping[str, Any]) -> dict[str, Any]:
    short = {key: value for key, value in report.items() if key not in ("architecture", "metadata")}
    if metadata := report["metadata"]:
        wanted = sorted(metadata, key=lambda key: (next((i for i, start in enumerate(_TELLING) if key.startswith(start)), len(_TELLING)), key))
        short["metadata"] = {key: metadata[key][:_SHOWN_CHARACTERS] for key in wanted[:_SHOWN_METADATA]}
        if len(metadata) > _SHOWN_METADATA:
            short["metadata"]["..."] = f"{len(metadata) - _SHOWN_METADATA} more"
    if "components" in report:
        short["components"] = {
            name: f"{component['tensors']} tensors, {component['parameters']:,} parameters" for name, component in report["components"].items()
        }
    return short


def _bundle_summary(report: Mapping[str, Any]) -> dict[str, Any]:
    short = {key: report[key] for key in ("path", "kind", "name", "size_bytes", "sdrt", "family")}
    short |= {
        "prediction": report["diffusion"]["prediction"],
        "size": "x".join(str(side) for side in report["latents"]["size"]),
        "precision": report["precision"],
        "clip_skip": report["text"]["clip_skip"],
        "sources": [_source(source) for source in report["sources"]],
    }
    if report["text"]["embeddings"]:
        short["triggers"] = list(report["text"]["embeddings"])
    short["engines"] = [_engine(engine) for engine in report["engines"]] or "none; ONNX Runtime runs the graphs"
    return short


def _source(source: Mapping[str, Any]) -> str:
    words = f"{source['kind']} {source['name']}"
    if source["scale"] is not None:
        words += f" at {source['scale']:g}" + (f":{source['te_scale']:g}" if source["te_scale"] is not None else "")
    return words + (f", trigger {source['trigger']}" if source["trigger"] is not None else "")


def _engine(engine: Mapping[str, Any]) -> str:
    if "error" in engine:
        return f"{engine['engine']}: {engine['error']}"
    stale = f"; does not run here as it is: {engine['why']}" if engine["stale"] else ""
    return f"{engine['engine']}: {engine['shapes']}, {engine['precision']}{stale}"
