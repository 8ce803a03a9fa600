"""`sdrt compile`: a bundle's graphs become engines for a target. `sdrt build` compiles through this file too."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrt.cli import options
from sdrt.cli.output import print_json, print_notes
from sdrt.cli.progress import COMPILE_STAGES, StageProgress
from sdrt.compile.compilers import compiled_targets, compiler_of, flags_of
from sdrt.engines.targets import COMPILED, TARGETS, on_gpu
from sdrt.errors import SdrtError, UsageError

if TYPE_CHECKING:
    from sdrt.bundle.folder import Bundle
    from sdrt.bundle.manifest import Manifest
    from sdrt.compile.options import CompileOptions, CompileReport
    from sdrt.engines.record import EngineRecord

_CHOICES = f"{', '.join(COMPILED[:-1])} or {COMPILED[-1]}"


def compile_bundle(
    bundle: options.BundleFolder,
    target: options.CompiledTargets = None,
    sm: options.GpuGenerations = None,
    size: options.SizeRange = None,
    batch: options.BatchRange = "1",
    tokens: options.TokenRange = None,
    branches: options.Branches = None,
    precision: options.Arithmetic = None,
    device: options.CompilingDevice = 0,
    force: Annotated[bool, typer.Option("--force", help="Compile again even if the same engine is there.")] = False,
    prune: options.Prune = False,
    timeout: options.CompileTimeout = 7200.0,
    as_json: options.Json = False,
) -> None:
    """Compile a bundle into engines for a target. Needs no PyTorch.

    One size costs least. A range of sizes, batches or tokens costs memory, speed and time to compile on a GPU; openvino
    takes one value of each, and several engines serve several sizes; onnxruntime takes any shape and none of these
    options. Engines lie in the bundle under `engines/`; `sdrt inspect` lists them. An engine is native code: run those
    you made, or got from someone you trust.
    """
    from sdrt.bundle.folder import open_bundle
    from sdrt.compile.options import CompileOptions

    if not target and not prune:
        raise UsageError("--target: missing", f"Choose {_CHOICES}, or pass --prune alone.")
    asked = [
        CompileOptions(
            name,
            sms=options.parse_numbers("--sm", sm) if sm is not None else None,
            size=options.parse_sizes(size),
            batch=options.parse_range("--batch", batch),
            tokens=options.parse_range("--tokens", tokens) if tokens is not None else None,
            branches=options.parse_numbers("--branches", branches) if branches is not None else None,
            precision=precision,
            device=device,
            force=force,
        )
        for name in compiled_targets(target or [], must_compile=True)
    ]
    opened = open_bundle(bundle)
    pruned = _prune(opened) if prune else []
    with options.time_limit(timeout, bundle):
        reports = _run(opened, asked)
    if as_json:
        engines = [as_fields(report) for report in reports]
        print_json({"bundle": str(opened.path), "engines": engines, "pruned": [str(path) for path in pruned]})
        return
    for path in pruned:
        typer.echo(f"removed {path}")
    if prune and not pruned:
        typer.echo("no stale engines")
    for report in reports:
        print_compiled(report, opened.manifest)


def _run(bundle: Bundle, asked: Sequence[CompileOptions]) -> list[CompileReport]:
    """Compile for several targets, with progress on stderr. All engines appear together, or none."""
    from sdrt.compile.together import engines_together

    reports: list[CompileReport] = []
    if not asked:
        return reports
    with ExitStack() as stack:
        with StageProgress(COMPILE_STAGES) as progress:
            new_engine = stack.enter_context(engines_together(bundle, progress))
        for options in asked:
            with StageProgress(COMPILE_STAGES) as progress:
                made = compiler_of(options.target).compile_bundle(bundle, options, progress, new_engine)
                reports += made if isinstance(made, list) else [made]
    return reports


def compile_after_build(path: Path, targets: Sequence[str]) -> list[CompileReport]:
    """Compile the new bundle at `path` for the targets of `sdrt build`. A failure leaves the bundle and says so."""
    from sdrt.bundle.folder import open_bundle
    from sdrt.compile.options import CompileOptions

    try:
        return _run(open_bundle(path), [CompileOptions(name) for name in targets])
    except SdrtError as error:
        message = f"the bundle {path} is built and works; compiling it failed: {error.line}"
        raise type(error)(message, error.fix) from error


def print_compiled(report: CompileReport, manifest: Manifest) -> None:
    """Say what was compiled: time, size and memory of each graph, and what the engine is for."""
    if report.cached:
        typer.echo(f"already there: {report.path}", err=True)
    for graph, made in report.graphs.items():
        peak = f"  {made.peak_bytes / 1e9:5.2f} GB peak" if made.peak_bytes is not None else ""
        layers = f"  {made.layers:5} layers" if made.layers is not None else ""
        typer.echo(f"{graph:13} {made.build_s:7.1f} s  {made.plan_bytes / 1e6:8.1f} MB{layers}{peak}")
        if made.unfused:
            perhaps = "may have no fused kernel and then " if on_gpu(report.record.key.target) else ""
            print_notes([f"{graph}: {len(made.unfused)} attention layers {perhaps}run as several"])
    for line in _engine_lines(report.record, manifest):
        typer.echo(line)
    typer.echo(f"engine {report.path}")


def _engine_lines(record: EngineRecord, manifest: Manifest) -> list[str]:
    """What an engine is for, and what it takes on disk or on the device, in words."""
    from sdrt.engines.shapes import shapes_of

    key = record.key
    shapes = shapes_of(record, manifest) if record.size is not None else "any size, batch, prompt and guidance"
    purpose = f"{key.target} {key.compiler} for {key.device}, {key.precision}, {shapes}"
    plans_bytes = sum(plan.size_bytes for plan in record.plans.values())
    disk_bytes = sum(plan.disk_bytes for plan in record.plans.values())
    if TARGETS[key.target].weights == "bundle":
        elsewhere = f"those are read from the bundle's own file, {record.weight_bytes / 1e6:.1f} MB"
        return [purpose, f"on disk: {plans_bytes / 1e6:.1f} MB without weights; {elsewhere}"]
    if TARGETS[key.target].weights == "beside":
        weights = "weights in float32 among them, which loading maps"
        return [purpose, f"on disk: {disk_bytes / 1e6:.1f} MB, {weights}"]
    activation_bytes = largest_activations(record)
    activations = "activations known once a GPU has loaded it"
    if activation_bytes is not None:
        activations = f"activations {activation_bytes / 1e6:.1f} MB"
    plans, state = f"plans with weights {plans_bytes / 1e6:.1f} MB", f"state {record.state_bytes / 1e6:.1f} MB at most"
    return [purpose, f"memory on the device: {plans}, {state}, {activations}"]


def largest_activations(record: EngineRecord) -> int | None:
    """Bytes of activations of the plan that needs most; None while a plan's are not known."""
    sizes = [plan.device_memory_bytes for plan in record.plans.values()]
    known = [size for size in sizes if size is not None]
    return max(known) if len(known) == len(sizes) else None


def as_fields(report: CompileReport) -> dict[str, Any]:
    """An engine as `--json` shows it."""
    return {
        "path": str(report.path),
        "cached": report.cached,
        "graphs": {graph: asdict(made) for graph, made in report.graphs.items()},
        **asdict(report.record),
    }


def _prune(bundle: Bundle) -> list[Path]:
    """Remove the engines that can never run again, and return the folders that they were in."""
    from sdrt.engines.store import mismatch
    from sdrt.engines.store import prune as prune_engines
    from sdrt.machine.doctor import compiler_version

    def runs(record: EngineRecord) -> bool:
        compiler = compiler_version(record.key.target)
        return not mismatch(record, bundle, compiler=compiler, flags=flags_of(record))

    return prune_engines(bundle, keep=runs)
