"""Engines for CPUs through OpenVINO. No torch.

Shapes are static. An engine has one size, one number of pictures, one prompt length and one number of guidance
branches. A bundle holds as many engines as it needs. Each takes only a few megabytes, since all of them read the
bundle's own weights file. Compilation runs in this process and takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from sdrt.bundle.folder import Bundle, check_files
from sdrt.bundle.graphs import GRAPHS
from sdrt.bundle.manifest import WEIGHTS
from sdrt.compile.options import CompileOptions, CompileReport, GraphReport
from sdrt.compile.shapes import resolve_shapes
from sdrt.compile.together import engines_together
from sdrt.compile.watch import Progress
from sdrt.engines.record import FORMAT, EngineKey, EngineRecord, Plan, Profile
from sdrt.engines.store import NewEngine, engine_folder, read_intact, state_bytes, write_engine
from sdrt.engines.targets import OPENVINO
from sdrt.errors import BundleError, MachineError, UsageError
from sdrt.files.cache import cache_key, cached
from sdrt.machine.cpu import cpu_identity, platform_name
from sdrt.machine.interruptible import interruptible
from sdrt.runtime.backends.openvino.model import (
    FLAGS,
    TARGET,
    StepShape,
    choose_precision,
    compile_graph,
    export_blob,
    import_openvino,
    layer_count,
    openvino_version,
    unfused_attention,
)

DEFAULT_CHUNKS = (1, 2)
"""Prompt lengths that engines are made for unless asked otherwise: most prompts are of up to 75 tokens, nearly all of
up to 150.
"""


@dataclass(frozen=True)
class _Blob:
    data: bytes
    report: GraphReport


def compile_bundle(
    bundle: Bundle,
    options: CompileOptions,
    progress: Progress = lambda stage, done: None,
    joined: NewEngine | None = None,
) -> list[CompileReport]:
    """Compile every graph of a bundle: one engine for each prompt length and each number of guidance branches. An
    intact engine with the same key is kept.

    The engines appear together, or together with those of the command that `joined` comes from.

    Raises:
        UsageError: an option is out of range, is a range where one value is needed, or does not belong to the target.
        BundleError: a graph or the weights are missing or changed.
        MachineError: OpenVINO is not installed, too old, or refuses a graph.
        ResourceError: out of memory or disk.
        LockedError: another process that compiles this bundle did not end in time.
        KeyboardInterrupt: interrupted; nothing was left behind.
    """
    manifest = bundle.manifest
    shapes = _static_shapes(bundle, options)
    ov = import_openvino(f"target {TARGET}")
    core = ov.Core()
    precision = choose_precision(core, options.precision, manifest.precision)
    files = {graph: manifest.graphs[graph][OPENVINO.source_of(precision)].path for graph in GRAPHS}
    progress("read", None)
    check_files(bundle, [WEIGHTS, *files.values()])
    made: dict[Any, _Blob] = {}  # a graph that two engines share is compiled once
    reports = []
    with engines_together(bundle, progress, joined) as new_engine:
        for shape in shapes:
            inputs = {graph: shape.inputs(graph, manifest) for graph in GRAPHS}
            key = _key(bundle, files, precision, inputs)
            folder = engine_folder(bundle, key)
            if not options.force:
                with suppress(BundleError, MachineError):  # missing or damaged: compiled again
                    reports.append(CompileReport(folder, read_intact(folder), True, {}))
                    continue
            blobs = {}
            for graph in GRAPHS:
                known = (graph, tuple(sorted(inputs[graph].items())))
                if known not in made:
                    progress(f"compile {graph}", None)
                    made[known] = _blob(ov, core, bundle, graph, inputs[graph], key, fresh=options.force)
                blobs[graph] = made[known]
            progress("write", None)
            record = _record(bundle, shape, key, blobs)
            written = write_engine(bundle, record, {graph: blob.data for graph, blob in blobs.items()}, new_engine)
            reports.append(CompileReport(written, record, False, {graph: blob.report for graph, blob in blobs.items()}))
    return reports


def check_compiler(target: str) -> None:
    """Raise MachineError unless OpenVINO is here and new enough."""
    import_openvino(f"target {target}")


def _static_shapes(bundle: Bundle, options: CompileOptions) -> list[StepShape]:
    if options.sms is not None:
        raise UsageError(
            "sm: OpenVINO compiles for the CPU of this machine", "Leave --sm out, or choose --target tensorrt-rtx."
        )
    manifest = bundle.manifest
    shapes = resolve_shapes(
        manifest,
        size=options.size,
        batch=options.batch,
        tokens=options.tokens,
        branches=options.branches,
        rows=options.rows,
    )
    for option, (low, _, high) in (
        ("size", shapes.width),
        ("size", shapes.height),
        ("batch", shapes.batch),
        ("tokens", shapes.tokens),
    ):
        if low != high:
            fix = f"Give --{option} one value, and compile once for each you need: an engine takes a few megabytes."
            raise UsageError(f"{option}: from {low} to {high}: OpenVINO engines have static shapes", fix)
    factor = manifest.latents.factor
    height, width = shapes.height[0] // factor, shapes.width[0] // factor
    lengths = [chunks * manifest.chunk for chunks in DEFAULT_CHUNKS] if options.tokens is None else [shapes.tokens[0]]
    return [
        StepShape(shapes.batch[0], height, width, tokens, branches, shapes.rows)
        for tokens in lengths
        for branches in shapes.branches
    ]


def _key(
    bundle: Bundle, files: Mapping[str, str], precision: str, inputs: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> EngineKey:
    records = bundle.manifest.files
    version = openvino_version()
    assert version is not None  # it has been imported
    return EngineKey(
        target=TARGET,
        compiler=version,
        device=cpu_identity(),
        platform=platform_name(),
        precision=precision,
        graphs={graph: records[file].sha256 for graph, file in files.items()},
        weights=records[WEIGHTS].sha256,
        profiles={
            graph: (Profile({name: (shape,) * 3 for name, shape in shapes.items()}),)
            for graph, shapes in inputs.items()
        },
        flags=FLAGS[precision],
    )


def _compile(
    ov: Any, core: Any, bundle: Bundle, graph: str, shapes: Mapping[str, tuple[int, ...]], precision: str
) -> _Blob:
    started = time.perf_counter()
    path = bundle.graph(graph, OPENVINO.source_of(precision))
    compiled, attention = interruptible(lambda: compile_graph(ov, core, path, shapes, precision, None))
    build_s = time.perf_counter() - started
    data = interruptible(lambda: export_blob(compiled))
    return _Blob(
        data, GraphReport(0.0, build_s, layer_count(compiled), len(data), unfused_attention(compiled, attention), None)
    )


def _blob(
    ov: Any,
    core: Any,
    bundle: Bundle,
    graph: str,
    shapes: Mapping[str, tuple[int, ...]],
    key: EngineKey,
    *,
    fresh: bool,
) -> _Blob:
    """A graph's blob from the user's cache; or compiled, and then cached. `fresh` compiles it in any case.

    A blob depends on no weight, only on where each one lies in the weights file, which the graph says. So all
    checkpoints of an architecture, and all adapters fused into them, share their blobs.
    """
    if fresh:
        return _compile(ov, core, bundle, graph, shapes, key.precision)

    def make() -> bytes:
        blob = _compile(ov, core, bundle, graph, shapes, key.precision)
        return json.dumps(asdict(blob.report)).encode() + b"\n" + blob.data

    parts = asdict(replace(key, weights="", graphs={graph: key.graphs[graph]}, profiles={graph: key.profiles[graph]}))
    data, hit = cached("blobs", cache_key(parts), make)
    head, _, blob = data.partition(b"\n")
    report = GraphReport(**json.loads(head))
    return _Blob(blob, replace(report, unfused=tuple(report.unfused), build_s=0.0 if hit else report.build_s))


def _record(bundle: Bundle, shape: StepShape, key: EngineKey, blobs: Mapping[str, _Blob]) -> EngineRecord:
    factor = bundle.manifest.latents.factor
    size = (shape.width * factor, shape.height * factor)
    return EngineRecord(
        format=FORMAT,
        key=key,
        size=size,
        batch=shape.batch,
        tokens=shape.tokens,
        rows=shape.rows,
        branches=(shape.branches,),
        state_bytes=state_bytes(
            bundle.manifest, size=size, batch=shape.batch, tokens=shape.tokens, rows=shape.rows, branches=shape.branches
        ),
        weight_bytes=bundle.manifest.files[WEIGHTS].size_bytes,
        plans={
            graph: Plan(f"{graph}.blob", len(blob.data), hashlib.sha256(blob.data).hexdigest(), None)
            for graph, blob in blobs.items()
        },
    )
