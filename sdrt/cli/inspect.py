"""`sdrt inspect`: what a file or bundle is, in a summary. `--all` prints every field; `--json` always has them all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from sdrt.cli import options
from sdrt.cli.compile import largest_activations
from sdrt.cli.output import print_json, print_report
from sdrt.compile.compilers import flags_of
from sdrt.errors import SdrtError, UsageError

if TYPE_CHECKING:
    from sdrt.bundle.folder import Bundle
    from sdrt.engines.record import EngineRecord

_SHOWN_METADATA, _SHOWN_CHARACTERS = 8, 100
_TELLING = (
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.",
    "ss_output_name",
    "ss_base_model_version",
    "ss_network_",
    "ss_clip_skip",
    "ss_v2",
)
"""Beginnings of the metadata keys that most readers look for, most wanted first."""


def inspect(
    path: options.FileOrBundle,
    checkpoint: options.FittedCheckpoint = None,
    everything: options.AllFields = False,
    as_json: options.Json = False,
) -> None:
    """Say what a file or bundle is: family, components, adapters, sizes. Reads headers only."""
    from sdrt.bundle.folder import open_bundle
    from sdrt.bundle.manifest import MANIFEST
    from sdrt.export.inspect import inspect_file

    if os.path.exists(path / MANIFEST) or path.suffix == ".sdrt":
        if checkpoint is not None:
            raise UsageError(
                f"--for {checkpoint}: {path} is a bundle, which goes into no checkpoint",
                "Give it the file of an adapter or VAE.",
            )
        opened = open_bundle(path)
        size_bytes = sum(record.size_bytes for record in opened.manifest.files.values())
        report: dict[str, Any] = {"path": str(opened.path), "kind": "a bundle", "size_bytes": size_bytes}
        report |= asdict(opened.manifest) | {"engines": _engines(opened)}
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
    """The fields of a file that most readers look for."""

    def wanted(key: str) -> tuple[int, str]:
        return next((i for i, start in enumerate(_TELLING) if key.startswith(start)), len(_TELLING)), key

    short = {key: value for key, value in report.items() if key not in ("architecture", "metadata")}
    if metadata := report["metadata"]:
        shown = sorted(metadata, key=wanted)[:_SHOWN_METADATA]
        short["metadata"] = {key: metadata[key][:_SHOWN_CHARACTERS] for key in shown}
        if len(metadata) > _SHOWN_METADATA:
            short["metadata"]["..."] = f"{len(metadata) - _SHOWN_METADATA} more"
    if "components" in report:
        short["components"] = {
            name: f"{component['tensors']} tensors, {component['parameters']:,} parameters"
            for name, component in report["components"].items()
        }
    return short


def _bundle_summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a bundle that most readers look for."""
    short = {key: report[key] for key in ("path", "kind", "name", "size_bytes", "sdrt", "family")}
    short |= {
        "prediction": report["diffusion"]["prediction"],
        "size": "x".join(str(side) for side in report["latents"]["size"]),
        "precision": report["components"]["unet"]["storage"],
        "clip_skip": report["text"][0]["clip_skip"],
        "sources": [_source(source) for source in report["sources"]],
    }
    if report["text"][0]["embeddings"]:
        short["triggers"] = list(report["text"][0]["embeddings"])
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


def _engines(bundle: Bundle) -> list[dict[str, Any]]:
    """The engines of a bundle: what each is for, what it takes, whether it would not run here, and why."""
    from sdrt.engines.shapes import shapes_of
    from sdrt.engines.store import engine_folders, read_engine
    from sdrt.machine.gpus import probe_gpus

    folders = engine_folders(bundle)
    gpus: list[str | None] = [str(gpu) for gpu in probe_gpus().found] if folders else []
    listed: list[dict[str, Any]] = []
    for folder in folders:
        try:
            record = read_engine(folder)
        except SdrtError as error:
            listed.append({"engine": folder.name, "error": error.message})
            continue
        reasons = _reasons(record, bundle, gpus or [None])
        stale = "" not in reasons
        listed.append(
            {
                "engine": folder.name,
                "target": record.key.target,
                "compiler": record.key.compiler,
                "device": record.key.device,
                "precision": record.key.precision,
                "shapes": asdict(shapes_of(record, bundle.manifest)),
                "plan_bytes": sum(plan.disk_bytes for plan in record.plans.values()),
                "state_bytes": record.state_bytes,
                "activation_bytes": largest_activations(record),
                "stale": stale,
                **({"why": reasons[0]} if stale else {}),
            }
        )
    return listed


def _reasons(record: EngineRecord, bundle: Bundle, gpus: Sequence[str | None]) -> list[str]:
    """Why an engine does not run on this CPU, or on each of `gpus`; empty text where it does."""
    from sdrt.engines.store import mismatch
    from sdrt.engines.targets import TARGETS, on_gpu
    from sdrt.machine.cpu import cpu_identity, platform_name
    from sdrt.machine.doctor import compiler_version

    target = record.key.target
    known = partial(mismatch, record, bundle, compiler=compiler_version(target), platform=platform_name())
    if target in TARGETS and not on_gpu(target):
        return [known(cpu=cpu_identity(), flags=flags_of(record))]
    return [known(gpu=gpu) for gpu in gpus]
