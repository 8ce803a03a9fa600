"""`sdrt compile` and `sdrt doctor`, and how `build` and `inspect` speak of engines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrt.cli.output import COMPILE_STAGES, BundleArgument, Json, StageProgress, print_json, time_limit
from sdrt.errors import MachineError, SdrtError, UsageError, nearest, printable

if TYPE_CHECKING:
    from sdrt.bundle import Bundle, Manifest
    from sdrt.compile.report import CompileOptions, CompileReport
    from sdrt.engine_record import EngineRecord

TARGETS = ("auto", "onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
_COMPILED = ("openvino", "tensorrt-rtx", "tensorrt")
"""Targets that `build` compiles for. ONNX Runtime needs no engine; what it can save is for `compile` to ask for, as it takes disk."""
_CHOICES = "onnxruntime, openvino, tensorrt-rtx or tensorrt"


def compile_bundle(
    ctx: typer.Context,
    bundle: BundleArgument,
    target: Annotated[list[str] | None, typer.Option("--target", metavar="NAME", help="What to compile for; may be repeated: openvino (this CPU), onnxruntime (this CPU, any shape: its optimised graphs, for a fast start, at twice the disk of 16-bit weights), tensorrt-rtx (GeForce and RTX, ahead of time, needs no GPU) or tensorrt (on the GPU that will run it).")] = None,
    sm: Annotated[str | None, typer.Option("--sm", metavar="86,89,120", help="GPU generations of tensorrt-rtx: 75, 80, 86, 89, 120, 121. Each adds kernels to the engine. Default 86,89,120.")] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="WxH[:WxH]", help="Picture size in pixels, or the smallest and the largest; the bundle's own if not given.")] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N[:M]", help="Pictures per model call, or a range.")] = "1",
    tokens: Annotated[str | None, typer.Option("--tokens", metavar="N[:M]", help="Prompt tokens, multiples of 77, or a range; if not given 77, for openvino an engine for 77 and one for 154.")] = None,
    branches: Annotated[str, typer.Option("--branches", metavar="1,2", help="Numbers of guidance branches: 1 is guidance off, 2 a prompt and a negative one.")] = "1,2",
    precision: Annotated[str | None, typer.Option("--precision", metavar="NAME", help="Arithmetic: bf16 or fp32 for openvino, which takes bf16 where the CPU has it; a precision of the bundle's graphs for a GPU.")] = None,
    device: Annotated[int, typer.Option("--device", metavar="N", help="GPU that tensorrt compiles on, counted from 0.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Compile again even if the same engine is there.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove engines that can never run again: of other graphs or weights, of another version of the compiler, damaged.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="Seconds after which it ends with exit code 7, and no engine appears.")] = 7200.0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compile a bundle into engines for a target. Needs no PyTorch.

    One size costs least. A range of sizes, batches or tokens costs memory, speed and time to compile on a GPU; openvino takes one value of
    each, and several engines serve several sizes; onnxruntime takes any shape and none of these options. Engines lie in the bundle under
    `engines/`; `sdrt inspect` lists them. An engine is native code: run those you made, or got from someone you trust.
    """
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.bundle import open_bundle
    from sdrt.compile.report import CompileOptions

    if not target and not prune:
        raise UsageError("--target: missing", f"Choose {_CHOICES}, or pass --prune alone.")
    chosen = compiled_targets(target or [], must_compile=True)
    asked = [
        CompileOptions(
            name, sms=_numbers("--sm", sm) if sm is not None else None, size=_sizes(size), batch=_range("--batch", batch),
            tokens=_range("--tokens", tokens) if tokens is not None else None, branches=_numbers("--branches", branches), precision=precision, device=device, force=force,
        )
        for name in chosen
    ]  # fmt: skip
    opened = open_bundle(bundle)
    pruned = _prune(opened) if prune else []
    with time_limit(timeout, bundle):
        reports = run(opened, asked)
    if as_json:
        print_json({"bundle": str(opened.path), "engines": [as_fields(report) for report in reports], "pruned": [str(path) for path in pruned]})
        return
    for path in pruned:
        typer.echo(f"removed {path}")
    if prune and not pruned:
        typer.echo("no stale engines")
    for report in reports:
        print_compiled(report, opened.manifest)


def compiled_targets(names: Sequence[str], *, must_compile: bool) -> list[str]:
    """The targets among `names` to compile for; `auto` is what is installed and fastest here. ONNX Runtime only where `must_compile` is set.

    Raises:
        UsageError: a name is unknown.
    """
    found = []
    for name in names:
        if name not in TARGETS:
            raise UsageError(f"--target {name}: unknown{nearest(name, TARGETS)}", f"Choose one of: {', '.join(TARGETS)}.")
        chosen = _automatic() if name == "auto" else name
        if chosen in _COMPILED or must_compile:
            found.append(chosen)
    return list(dict.fromkeys(found))


def checked_targets(names: Sequence[str]) -> list[str]:
    """`compiled_targets` for a build, which should not run for a minute to find that the compiler is missing."""
    found = compiled_targets(names, must_compile=False)
    for name in found:
        if name == "openvino":
            from sdrt.runtime.openvino_model import import_openvino

            import_openvino(f"target {name}")
        else:
            from sdrt.compile.tensorrt import open_compiler

            open_compiler(name)
    return found


def _automatic() -> str:
    """TensorRT where it is installed and a GPU answers, else OpenVINO where it is installed and new enough, else ONNX Runtime."""
    from sdrt.doctor import compiler_version, probe_gpus
    from sdrt.runtime.openvino_model import import_openvino

    if compiler_version("tensorrt") is not None and probe_gpus().found:
        return "tensorrt"
    try:
        import_openvino("target auto")
    except MachineError:
        return "onnxruntime"
    return "openvino"


def run(bundle: Bundle, asked: Sequence[CompileOptions]) -> list[CompileReport]:
    """Compile for several targets with progress on stderr; all engines appear together, or none."""
    from sdrt.compile import onnxruntime, openvino, tensorrt
    from sdrt.compile.together import engines_together

    reports: list[CompileReport] = []
    if not asked:
        return reports
    with ExitStack() as stack:
        with StageProgress(COMPILE_STAGES) as progress:
            new_engine = stack.enter_context(engines_together(bundle, progress))
        for options in asked:
            with StageProgress(COMPILE_STAGES) as progress:
                if options.target == "openvino":
                    reports += openvino.compile_bundle(bundle, options, progress, new_engine)
                elif options.target == "onnxruntime":
                    reports.append(onnxruntime.compile_bundle(bundle, options, progress, new_engine))
                else:
                    reports.append(tensorrt.compile_bundle(bundle, options, progress, new_engine))
    return reports


def compile_after_build(path: Path, targets: Sequence[str]) -> list[CompileReport]:
    """What `sdrt build --target` does once the bundle is there; a failure leaves the bundle as it is and says so."""
    from sdrt.bundle import open_bundle
    from sdrt.compile.report import CompileOptions

    try:
        return run(open_bundle(path), [CompileOptions(name) for name in targets])
    except SdrtError as error:
        raise type(error)(f"the bundle {path} is built and works; compiling it failed: {error.line}", error.fix) from error


def print_compiled(report: CompileReport, manifest: Manifest) -> None:
    if report.cached:
        typer.echo(f"already there: {report.path}", err=True)
    for graph, made in report.graphs.items():
        peak = f"  {made.peak_bytes / 1e9:5.2f} GB peak" if made.peak_bytes is not None else ""
        layers = f"  {made.layers:5} layers" if made.layers is not None else ""
        typer.echo(f"{graph:13} {made.build_s:7.1f} s  {made.plan_bytes / 1e6:8.1f} MB{layers}{peak}")
        if made.unfused:
            typer.echo(
                f"note: {graph}: {len(made.unfused)} attention layers {'' if report.record.key.target == 'openvino' else 'may have no fused kernel and then '}run as several",
                err=True,
            )
    for line in engine_lines(report.record, manifest):
        typer.echo(line)
    typer.echo(f"engine {report.path}")


def engine_lines(record: EngineRecord, manifest: Manifest) -> list[str]:
    """What an engine is for and what it takes on the device, in words."""
    from sdrt.engine_shapes import shapes_of

    key = record.key
    shapes = shapes_of(record, manifest) if record.size is not None else "any size, batch, prompt and guidance"
    if key.target == "openvino":
        blobs = sum(plan.size_bytes for plan in record.plans.values())
        return [
            f"{key.target} {key.compiler} for {key.device}, {key.precision}, {shapes}",
            f"on disk: {blobs / 1e6:.1f} MB without weights; those are read from the bundle's own file, {record.weight_bytes / 1e6:.1f} MB",
        ]
    if key.target == "onnxruntime":
        return [
            f"{key.target} {key.compiler} for {key.device}, {key.precision}, {shapes}",
            f"on disk: {sum(plan.disk_bytes for plan in record.plans.values()) / 1e6:.1f} MB, weights in float32 among them, which loading maps",
        ]
    activations = [plan.device_memory_bytes for plan in record.plans.values()]
    known = [size for size in activations if size is not None]
    largest = f"activations {max(known) / 1e6:.1f} MB" if len(known) == len(activations) else "activations known once a GPU has loaded it"
    plans = sum(plan.size_bytes for plan in record.plans.values())
    return [
        f"{key.target} {key.compiler} for {key.device}, {key.precision}, {shapes}",
        f"memory on the device: plans with weights {plans / 1e6:.1f} MB, state {record.state_bytes / 1e6:.1f} MB at most, {largest}",
    ]


def as_fields(report: CompileReport) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "cached": report.cached,
        "graphs": {graph: asdict(made) for graph, made in report.graphs.items()},
        **asdict(report.record),
    }


def _prune(bundle: Bundle) -> list[Path]:
    from sdrt.doctor import compiler_version
    from sdrt.engine_cache import mismatch
    from sdrt.engine_cache import prune as prune_engines

    return prune_engines(bundle, keep=lambda record: not mismatch(record, bundle, compiler=compiler_version(record.key.target), flags=_flags(record)))


def _flags(record: EngineRecord) -> tuple[str, ...] | None:
    """How this sdrt builds an engine of its target and precision; None where that depends on the compiler."""
    from sdrt.runtime import onnxruntime_model, openvino_model

    of_openvino = openvino_model.FLAGS.get(record.key.precision)
    return {"openvino": of_openvino, "onnxruntime": onnxruntime_model.FLAGS}.get(record.key.target)


def engines_of(bundle: Bundle) -> list[dict[str, Any]]:
    """The engines of a bundle for `inspect`: what each is for, what it takes, whether it would not run here, and why."""
    from sdrt.doctor import compiler_version, probe_gpus
    from sdrt.engine_cache import engine_folders, mismatch, platform_name, read_engine
    from sdrt.engine_shapes import shapes_of
    from sdrt.runtime.cpu import cpu_identity

    folders = engine_folders(bundle)
    gpus = probe_gpus().found if folders else ()
    listed: list[dict[str, Any]] = []
    for folder in folders:
        try:
            record = read_engine(folder)
        except SdrtError as error:
            listed.append({"engine": folder.name, "error": error.message})
            continue
        compiler = compiler_version(record.key.target)
        sms: list[str | None] = [gpu.sm for gpu in gpus] or [None]
        if record.key.target in ("openvino", "onnxruntime"):
            reasons = [mismatch(record, bundle, compiler=compiler, cpu=cpu_identity(), platform=platform_name(), flags=_flags(record))]
        else:
            reasons = [mismatch(record, bundle, compiler=compiler, device_sm=sm, platform=platform_name()) for sm in sms]
        memory = [plan.device_memory_bytes for plan in record.plans.values()]
        known = [size for size in memory if size is not None]
        listed.append(
            {
                "engine": folder.name, "target": record.key.target, "compiler": record.key.compiler, "device": record.key.device, "precision": record.key.precision,
                "shapes": asdict(shapes_of(record, bundle.manifest)), "plan_bytes": sum(plan.disk_bytes for plan in record.plans.values()), "state_bytes": record.state_bytes,
                "activation_bytes": max(known) if len(known) == len(memory) else None, "stale": "" not in reasons, **({"why": reasons[0]} if "" not in reasons else {}),
            }
        )  # fmt: skip
    return listed


def doctor(ctx: typer.Context, as_json: Json = False) -> None:
    """Say what works on this machine: each backend, its versions, and the command that mends it. Exit code 5 if none works."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.doctor import examine

    report = examine()
    if as_json:
        print_json(asdict(report) | {"ok": report.ok})
    else:
        gpus = ", ".join(f"{gpu.name} ({gpu.sm})" for gpu in report.gpus.found) or f"none: {report.gpus.detail}"
        driver = f", driver for CUDA {report.gpus.driver_cuda}" if report.gpus.driver_cuda else ""
        typer.echo(f"python {report.python}, {report.platform}; GPUs: {printable(gpus)}{driver}")
        for backend in report.backends:
            versions = ", ".join(f"{package} {version}" for package, version in backend.versions.items())
            typer.echo(f"{backend.name:17} {backend.state:11} {printable(backend.detail)}{f' ({versions})' if versions else ''}")
            if backend.fix:
                typer.echo(f"{'':17} fix: {backend.fix}")
    if not report.ok:
        raise typer.Exit(MachineError.exit_code)


def _sizes(text: str | None) -> tuple[tuple[int, int], tuple[int, int]] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})(?::(\d{1,6})[xX](\d{1,6}))?", text)
    if match is None:
        raise UsageError(f"--size {text}: expected WIDTHxHEIGHT, or a smallest and a largest", "Write it as --size 512x768 or --size 512x512:768x768.")
    low = (int(match[1]), int(match[2]))
    return low, low if match[3] is None else (int(match[3]), int(match[4]))


def _range(option: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text)
    if match is None:
        raise UsageError(f"{option} {text}: expected a number, or a smallest and a largest", f"Write it as {option} 1 or {option} 1:4.")
    return int(match[1]), int(match[2] or match[1])


def _numbers(option: str, text: str) -> tuple[int, ...]:
    if re.fullmatch(r"\d{1,4}(,\d{1,4})*", text) is None:
        raise UsageError(f"{option} {text}: expected numbers with commas between them")
    return tuple(int(part) for part in text.split(","))
