"""Engines for NVIDIA GPUs: one way over TensorRT-RTX and enterprise TensorRT, whose interfaces are nearly equal. No
torch.

TensorRT-RTX compiles ahead of time for a list of GPU generations and needs no GPU; enterprise TensorRT compiles on the
GPU that will run the engine. Precision is in the graph: networks are strongly typed. Refitting stays off;
docs/architecture.md says why.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress

from sdrt.bundle.folder import Bundle, check_files
from sdrt.bundle.graphs import GRAPHS, STEP
from sdrt.bundle.manifest import WEIGHTS
from sdrt.compile import worker
from sdrt.compile.options import CompileOptions, CompileReport, GraphReport
from sdrt.compile.shapes import largest_demand, profiles_of, resolve_shapes
from sdrt.compile.tensorrt_network import Compiler, Demand, build_flags, import_compiler, library
from sdrt.compile.together import engines_together
from sdrt.compile.watch import Progress
from sdrt.engines.record import FORMAT, EngineKey, EngineRecord, Plan
from sdrt.engines.store import NewEngine, arithmetic, engine_folder, read_intact, state_bytes, write_engine
from sdrt.engines.targets import TARGETS, Target
from sdrt.errors import BundleError, MachineError, UsageError
from sdrt.machine.cpu import platform_name
from sdrt.machine.gpus import probe_gpus

log = logging.getLogger("sdrt")

DEFAULT_SMS = (86, 89, 120)
"""Generations that an engine is for if nobody says which, beside that of the GPU of this machine."""


def compile_bundle(
    bundle: Bundle,
    options: CompileOptions,
    progress: Progress = lambda stage, done: None,
    joined: NewEngine | None = None,
) -> CompileReport:
    """Compile every graph of a bundle into an engine in its `engines` folder. An intact engine of the same key is left
    as it is.

    The engine appears by itself, or with those of the command that `joined` comes from.

    Raises:
        UsageError: an option is out of range or does not belong to the target.
        BundleError: a graph or the weights are missing or changed.
        MachineError: the compiler is not installed, has no GPU to build on, or refuses a graph.
        ResourceError: out of memory or disk.
        LockedError: another process that compiles this bundle did not end in time.
        KeyboardInterrupt: interrupted; nothing was left behind.
    """
    manifest = bundle.manifest
    shapes = resolve_shapes(
        manifest,
        size=options.size,
        batch=options.batch,
        tokens=options.tokens,
        branches=options.branches,
        rows=options.rows,
    )
    compiler = open_compiler(options.target, options.sms, options.device)
    precision = _precision(bundle, options.target, options.precision)
    made_from = arithmetic(manifest, options.target, precision)
    paths = {graph: bundle.graph(graph, made_from[graph]) for graph in GRAPHS}
    files = {graph: manifest.graphs[graph][made_from[graph]].path for graph in GRAPHS}
    progress("read", None)
    check_files(bundle, [WEIGHTS, *files.values()])
    profiles = {graph: profiles_of(graph, shapes, manifest) for graph in GRAPHS}
    key = EngineKey(
        target=options.target,
        compiler=compiler.version,
        device=compiler.device,
        platform=platform_name(),
        precision=precision,
        graphs={graph: manifest.files[file].sha256 for graph, file in files.items()},
        weights=manifest.files[WEIGHTS].sha256,
        profiles=profiles,
        flags=build_flags(compiler.trt),
    )
    folder = engine_folder(bundle, key)
    with engines_together(bundle, progress, joined) as new_engine:
        if not options.force:
            with suppress(BundleError, MachineError):  # missing or damaged: compiled again
                return CompileReport(folder, read_intact(folder), True, {})
        demand = Demand(*largest_demand(shapes, manifest))
        data: dict[str, memoryview] = {}
        plans: dict[str, Plan] = {}
        reports: dict[str, GraphReport] = {}
        for graph, path in paths.items():
            progress(f"compile {graph}", None)
            built, peak_bytes = worker.build(
                compiler, graph, path, profiles[graph], demand, lambda name, done: progress(f"compile {name}", done)
            )
            data[graph] = built.plan
            plans[graph] = Plan(
                f"{graph}.plan", len(built.plan), hashlib.sha256(built.plan).hexdigest(), built.device_memory_bytes
            )
            reports[graph] = GraphReport(
                built.parse_s, built.build_s, built.layers, len(built.plan), built.unfused, peak_bytes
            )
        progress("write", None)
        size, branches = (shapes.width[2], shapes.height[2]), max(shapes.branches)
        record = EngineRecord(
            format=FORMAT,
            key=key,
            size=size,
            batch=shapes.batch[2],
            tokens=shapes.tokens[2],
            rows=shapes.rows,
            branches=shapes.branches,
            state_bytes=state_bytes(
                manifest, size=size, batch=shapes.batch[2], tokens=shapes.tokens[2], rows=shapes.rows, branches=branches
            ),
            weight_bytes=manifest.files[WEIGHTS].size_bytes,
            plans=plans,
        )
        return CompileReport(write_engine(bundle, record, data, new_engine), record, False, reports)


def open_compiler(target: str, sms: tuple[int, ...] | None = None, device: int = 0) -> Compiler:
    """Import a target's library and find what it compiles for: the generations asked for, or the GPU of this machine.

    Raises:
        UsageError: the target is unknown, or the generations are not for it.
        MachineError: the library is not installed, or there is no GPU and it needs one.
    """
    row = TARGETS.get(target)
    if row is None or row.shapes != "ranges":
        ours = [row.name for row in TARGETS.values() if row.shapes == "ranges"]
        raise UsageError(f"target {target!r}: not one that compiles", f"Choose one of: {', '.join(ours)}.")
    if row.sms:
        wanted = tuple(sorted(set(sms))) if sms else _default_sms(row)
        for sm in wanted:
            if sm not in row.sms:
                raise UsageError(
                    f"sm {sm}: {row.title} compiles for {', '.join(map(str, row.sms))}",
                    "For a data-centre GPU such as H100 (90) or B200 (100), run this on it with --target tensorrt.",
                )
        return import_compiler(target, ",".join(f"sm_{sm}" for sm in wanted), None, wanted)
    if sms is not None:
        raise UsageError(
            f"sm: {row.title} compiles for the GPU of this machine", "Leave --sm out, or choose --target tensorrt-rtx."
        )
    library(target)
    return import_compiler(target, _gpu(device), device, ())


def check_compiler(target: str) -> None:
    """Raise MachineError unless a target's compiler is here, with a GPU where it needs one."""
    open_compiler(target)


def _default_sms(target: Target) -> tuple[int, ...]:
    """The usual generations and those of this machine's GPUs, as far as the library has kernels for them."""
    wanted = set(DEFAULT_SMS)
    for gpu in probe_gpus().found:
        if (sm := int(gpu.sm.removeprefix("sm_"))) in target.sms:
            wanted.add(sm)
        else:
            log.warning("%s has no kernels for %s: the engine is for other machines", target.title, gpu)
    return tuple(sorted(wanted))


def _gpu(device: int) -> str:
    """Name and generation of a GPU, such as "NVIDIA H100 80GB HBM3, sm_90"."""
    gpus = probe_gpus()
    if not gpus.found:
        raise MachineError(
            f"target tensorrt: compiles on a GPU, and none answers here: {gpus.detail}",
            "Run this on the machine that will run the engine, or compile ahead of time with --target tensorrt-rtx.",
        )
    if device >= len(gpus.found):
        raise MachineError(
            f"target tensorrt: device {device}: this machine has {len(gpus.found)}",
            f"Choose 0 to {len(gpus.found) - 1}.",
        )
    return str(gpus.found[device])


def _precision(bundle: Bundle, target: str, asked: str | None) -> str:
    manifest = bundle.manifest
    precision = asked or manifest.precision
    have = [
        each
        for each in sorted(manifest.graphs[STEP])
        if all(own in manifest.graphs[graph] for graph, own in arithmetic(manifest, target, each).items())
    ]
    if precision not in have:
        raise MachineError(
            f"{bundle.path}: no {precision} graphs to compile, it has {', '.join(have) or 'none'}",
            "Build the bundle again with this version of sdrt; --precision fp16 gives graphs for a GPU.",
        )
    return precision
