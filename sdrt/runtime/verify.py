"""`sdrt verify`: is a bundle what its manifest says, and does each of its graphs still compute what the build measured?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdrt.bundle import check_files, open_bundle
from sdrt.errors import BundleError, CheckFailed
from sdrt.parity import compare
from sdrt.runtime.onnxruntime import run_graph


@dataclass(frozen=True)
class GraphCheck:
    graph: str
    compute: str
    backend: str
    output: str
    error: float
    limit: float


def verify(path: Path) -> list[GraphCheck]:
    """Check every file's hash, then run every graph on its reference inputs.

    Raises:
        CheckFailed: a file is missing or changed, or an output is not what the build recorded.
        InputFileError: there is no bundle at `path`.
        MachineError: the bundle or the backend does not fit this machine.
    """
    try:
        bundle = open_bundle(path)
        check_files(bundle)
    except BundleError as error:
        raise CheckFailed(error.message, error.fix) from error
    checks = []
    for graph, by_precision in bundle.manifest.graphs.items():
        for precision in by_precision:
            with np.load(bundle.file(f"reference/{graph}.npz"), allow_pickle=False) as stored:
                inputs = {name[3:]: stored[name] for name in stored.files if name.startswith("in.")}
                expected = {name[4:]: stored[name] for name in stored.files if name.startswith("out.")}
            found = run_graph(bundle, graph, precision, inputs)
            checks += [
                GraphCheck(graph, precision, "onnxruntime", parity.output, parity.error, parity.limit)
                for parity in compare(expected, found, by_precision[precision].compute)
            ]
    if bad := [check for check in checks if not check.error <= check.limit]:
        where = f"{bundle.path}: {bad[0].graph}: {bad[0].output}"
        raise CheckFailed(
            f"{where}: differs from the reference by {bad[0].error:.2e}, expected at most {bad[0].limit:.0e}", "Build the bundle again on this machine."
        )
    return checks
