"""Engines for CPUs through ONNX Runtime: its optimised graphs, saved. So a start neither folds the weights again nor
needs the memory for that. No torch.

These engines take any shape, like the graphs. They take disk space: the weights once more, as float32. ONNX Runtime
writes the files itself, in a process of its own, into the folder that will be published.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from sdrt.bundle.folder import Bundle, check_files, file_record
from sdrt.bundle.graphs import GRAPHS
from sdrt.bundle.manifest import WEIGHTS
from sdrt.compile import worker
from sdrt.compile.options import CompileOptions, CompileReport, GraphReport
from sdrt.compile.together import engines_together
from sdrt.compile.watch import Progress
from sdrt.engines.record import FORMAT, EngineKey, EngineRecord, ExternalData, Plan
from sdrt.engines.store import NewEngine, engine_folder, read_intact, write_record
from sdrt.errors import BundleError, MachineError, UsageError
from sdrt.machine.cpu import cpu_identity, platform_name
from sdrt.runtime.backends.onnxruntime.model import FLAGS, PRECISION, TARGET, import_onnxruntime, weights_path

log = logging.getLogger("sdrt")

_MARGIN_BYTES = 1 << 26
"""Room beside the weights: four graphs, and the gap before each large weight, which begins on a page."""
_READ = ("target", "force")
"""The only options that these engines read."""


def compile_bundle(
    bundle: Bundle,
    options: CompileOptions,
    progress: Progress = lambda stage, done: None,
    joined: NewEngine | None = None,
) -> CompileReport:
    """Save every graph of a bundle as ONNX Runtime has optimised it for this CPU. An intact engine with the same key is
    kept.

    The engine appears alone, or together with those of the command that `joined` comes from.

    Raises:
        UsageError: an option was given that these engines do not use.
        BundleError: a graph, the weights or a reference are missing or changed.
        MachineError: ONNX Runtime is not installed or fails, or the saved model computes something else.
        ResourceError: out of memory or disk.
        LockedError: another process that compiles this bundle did not end in time.
        KeyboardInterrupt: interrupted; nothing was left behind.
    """
    _refuse_unread(options)
    version = str(import_onnxruntime(f"target {TARGET}").__version__)
    manifest = bundle.manifest
    files = {graph: manifest.graphs[graph][PRECISION].path for graph in GRAPHS}
    references = {graph: f"reference/{graph}.npz" for graph in GRAPHS}
    progress("read", None)
    check_files(bundle, [WEIGHTS, *files.values(), *references.values()])
    weights = manifest.files[WEIGHTS]
    key = EngineKey(
        target=TARGET,
        compiler=version,
        device=cpu_identity(),
        platform=platform_name(),
        precision=PRECISION,
        graphs={graph: manifest.files[file].sha256 for graph, file in files.items()},
        weights=weights.sha256,
        profiles=dict.fromkeys(files, ()),
        flags=FLAGS,
    )
    folder = engine_folder(bundle, key)
    with engines_together(bundle, progress, joined) as new_engine:
        if not options.force:
            with suppress(BundleError, MachineError):  # missing or damaged: compiled again
                return CompileReport(folder, read_intact(folder), True, {})
        plans: dict[str, Plan] = {}
        reports: dict[str, GraphReport] = {}
        widened = any(component.storage != PRECISION for component in manifest.components.values())
        needed_bytes = weights.size_bytes * (2 if widened else 1) + _MARGIN_BYTES
        with new_engine(key, needed_bytes) as stage:
            for graph in GRAPHS:
                progress(f"compile {graph}", None)
                made, peak_bytes = worker.save_model(
                    graph, bundle.graph(graph, PRECISION), stage, bundle.file(references[graph]), version
                )
                if not made["exact"]:
                    log.info("%s: the saved model's outputs differ from the optimised graph's, within the gate", graph)
                plans[graph] = _plan(stage / f"{graph}.onnx")
                reports[graph] = GraphReport(0.0, made["build_s"], None, plans[graph].disk_bytes, (), peak_bytes)
            progress("write", None)
            record = EngineRecord(FORMAT, key, None, None, None, None, (), 0, weights.size_bytes, plans)
            write_record(stage, record)
    return CompileReport(folder, record, False, reports)


def check_compiler(target: str) -> None:
    """Raise MachineError unless ONNX Runtime is here."""
    import_onnxruntime(f"target {target}")


def _refuse_unread(options: CompileOptions) -> None:
    default = CompileOptions(TARGET)
    for field in fields(CompileOptions):
        if field.name not in _READ and getattr(options, field.name) != getattr(default, field.name):
            name = field.name.removesuffix("s") if field.name == "sms" else field.name
            why = {
                "sms": "optimises for the CPU of this machine",
                "device": "runs on the CPU",
                "precision": "computes in float32 on a CPU",
            }
            raise UsageError(
                f"{name}: ONNX Runtime {why.get(field.name, 'takes every shape: one engine serves them all')}",
                f"Leave --{name} out, or compile for {TARGET} with a command of its own.",
            )


def _plan(model: Path) -> Plan:
    """The record of a saved model: its files and their hashes."""
    weights, graph, data = weights_path(model), file_record(model), None
    if weights.exists():  # absent if all weights are small enough to be inside the graph
        found = file_record(weights)
        data = ExternalData(weights.name, found.size_bytes, found.sha256)
    return Plan(model.name, graph.size_bytes, graph.sha256, None, data)
