"""`sdrt verify`: does a bundle match its manifest, and do its graphs and engines still compute what the build
measured?
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.folder import Bundle, open_bundle
from sdrt.bundle.graphs import STEP, dimensions, signatures
from sdrt.bundle.manifest import WEIGHTS, reference_path
from sdrt.bundle.reference import compare, read_reference
from sdrt.engines.record import EngineRecord
from sdrt.engines.store import check_all, mismatch, read_plan
from sdrt.engines.targets import ONNXRUNTIME, OPENVINO
from sdrt.errors import BundleError, CheckFailed, printable
from sdrt.machine.cpu import cpu_identity, platform_name
from sdrt.machine.interruptible import interruptible
from sdrt.runtime.backends.onnxruntime import model as onnxruntime_model

log = logging.getLogger("sdrt")

Arrays = dict[str, NDArray[Any]]
Reference = tuple[Arrays, Arrays]
"""Inputs of a graph and the expected outputs, by name."""


@dataclass(frozen=True)
class GraphCheck:
    graph: str
    compute: str
    backend: str
    output: str
    error: float
    limit: float


def verify(path: Path) -> list[GraphCheck]:
    """Check the hash of every file, engines included, and that there is no other file. Then run every graph on its
    reference inputs, through ONNX Runtime and each engine for a CPU.

    Engines for GPUs are not run.

    Raises:
        CheckFailed: a file is missing or changed, or an output differs from what the build recorded.
        InputFileError: there is no bundle at `path`.
        MachineError: the bundle or the backend does not fit this machine.
    """
    try:
        bundle = open_bundle(path)
        engines = check_all(bundle)
        references = {graph: _reference(bundle, graph) for graph in bundle.manifest.graphs}
    except BundleError as error:
        raise CheckFailed(error.message, error.fix) from error
    checks: list[GraphCheck] = []
    for graph, by_precision in bundle.manifest.graphs.items():
        inputs, expected = references[graph]
        for compute in by_precision:
            found = onnxruntime_model.run_graph(bundle.graph(graph, compute), inputs)
            checks += _compared(graph, compute, ONNXRUNTIME.name, expected, found)
    on_cpu = {OPENVINO.name: _openvino_checks, ONNXRUNTIME.name: _onnxruntime_checks}
    for folder, engine in engines:
        if (checked := on_cpu.get(engine.key.target)) is not None:
            checks += checked(bundle, folder, engine, references)
    if bad := [check for check in checks if not check.error <= check.limit]:
        where = f"{bundle.path}: {bad[0].graph}: {bad[0].output}: {bad[0].backend}"
        raise CheckFailed(
            f"{where}: differs from the reference by {bad[0].error:.2e}, expected at most {bad[0].limit:.0e}",
            "Build the bundle again on this machine.",
        )
    return checks


def _reference(bundle: Bundle, graph: str) -> Reference:
    """The inputs of a graph and the expected outputs.

    Raises:
        BundleError: the file is no archive of arrays, or has the wrong arrays.
    """
    path = bundle.file(reference_path(graph))
    inputs, expected = read_reference(path)
    for record in bundle.manifest.graphs[graph].values():
        for kind, found, named in (("inputs", inputs, record.inputs), ("outputs", expected, record.outputs)):
            if named and found.keys() != set(named):
                raise BundleError(
                    f"{path}: {kind} {printable(', '.join(sorted(found))[:200])}: expected {', '.join(sorted(named))}",
                    "Build the bundle again.",
                )
    return inputs, expected


def _compared(graph: str, compute: str, backend: str, expected: Arrays, found: Arrays) -> Iterator[GraphCheck]:
    for parity in compare(expected, found, compute):
        yield GraphCheck(graph, compute, backend, parity.output, parity.error, parity.limit)


def _onnxruntime_checks(
    bundle: Bundle, folder: Path, record: EngineRecord, references: Mapping[str, Reference]
) -> Iterator[GraphCheck]:
    """Compare every saved model with the reference. A model made for another machine is skipped, since it never runs
    here.
    """
    if mismatch(record, bundle):
        return  # made from other graphs or weights, so never used
    version = onnxruntime_model.import_onnxruntime("backend onnxruntime").__version__
    if why := mismatch(
        record, bundle, compiler=version, cpu=cpu_identity(), platform=platform_name(), flags=onnxruntime_model.FLAGS
    ):
        log.warning("%s: only its hashes are checked: %s", folder, why)
        return
    for graph in record.plans:
        inputs, expected = references[graph]
        found = onnxruntime_model.run_engine((folder, record), graph, inputs)
        yield from _compared(graph, record.key.precision, f"onnxruntime {folder.name}", expected, found)


def _openvino_checks(
    bundle: Bundle, folder: Path, record: EngineRecord, references: Mapping[str, Reference]
) -> Iterator[GraphCheck]:
    """Compare every graph of an engine with the reference. The engine's blob runs if it was made for this machine and
    for the reference's shapes. Otherwise the same graph is compiled in the same way for these shapes.
    """
    from sdrt.runtime.backends.openvino import model as openvino_model

    if mismatch(record, bundle, target=OPENVINO.name):
        return  # of other graphs or weights: never used
    if openvino_model.openvino_version() is None:
        log.warning("%s: only its hashes are checked: openvino is not installed", folder)
        return
    tables = signatures(dimensions(bundle.manifest))[STEP].tables
    ov = openvino_model.import_openvino("backend openvino")
    core = ov.Core()
    stale, precision = openvino_model.fit(core, bundle, record)
    for graph in record.plans:
        inputs, expected = references[graph]
        made_for = {name: largest for name, (_, _, largest) in record.key.profiles[graph][0].shapes.items()}
        padded = {
            name: _more_rows(array, made_for[name][0]) if graph == STEP and name in tables else array
            for name, array in inputs.items()
        }
        if not stale and {name: array.shape for name, array in padded.items()} == made_for:
            inputs, blob = padded, read_plan(folder, record, graph)
            compiled = interruptible(
                partial(
                    openvino_model.import_blob,
                    ov,
                    core,
                    f"{folder}: {graph}",
                    blob,
                    bundle.file(WEIGHTS),
                    precision,
                    None,
                )
            )
        else:
            shapes = {name: array.shape for name, array in inputs.items()}
            path = bundle.graph(graph, "fp32")
            compiled, _ = interruptible(partial(openvino_model.compile_graph, ov, core, path, shapes, precision, None))
        found = openvino_model.run_once(ov, compiled, f"{folder}: {graph}", inputs)
        outputs = {name: np.asarray(found[name]).astype(array.dtype, copy=False) for name, array in expected.items()}
        yield from _compared(graph, precision, f"openvino {folder.name}", expected, outputs)


def _more_rows(table: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.concatenate([table, np.zeros((max(rows - len(table), 0), *table.shape[1:]), table.dtype)])
