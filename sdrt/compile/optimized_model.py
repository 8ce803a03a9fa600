"""One graph is optimised by ONNX Runtime for this CPU, saved, loaded back and compared. Runs in a process of its own
(`sdrt.compile.worker`).
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle.reference import compare, read_reference
from sdrt.errors import MachineError, ResourceError, SdrtError
from sdrt.runtime.backends.onnxruntime.model import (
    PRECISION,
    explained,
    import_onnxruntime,
    open_graph,
    open_saved,
    outputs_of,
)

_NOT_WRITTEN = ("Failed to write external initializers", "Protobuf serialization failed", "No space left")
"""ONNX Runtime's messages for a file that it could not write. They do not give the reason."""


def save_model(graph: str, path: Path, folder: Path, reference: Path) -> dict[str, Any]:
    """Save `<graph>.onnx` and its weights in `folder`. Returns the seconds it took, and whether the saved model gave
    exactly the same outputs as the original.

    Raises:
        MachineError: ONNX Runtime fails, or the saved model computes something else.
        ResourceError: out of memory or disk.
    """
    ort = import_onnxruntime("target onnxruntime")
    inputs, _ = read_reference(reference)
    model = folder / f"{graph}.onnx"
    try:
        started = time.perf_counter()
        session = open_graph(ort, path, None, save_as=model)
        build_s = time.perf_counter() - started
        expected = outputs_of(ort, session, graph, inputs)
        del session  # several gigabytes of memory
        saved = open_saved(ort, model.read_bytes(), model, None)
        found = outputs_of(ort, saved, graph, inputs)
    except Exception as error:
        raise _reported(ort, f"{path}: {graph}", folder, error) from error
    worst = compare(expected, found, PRECISION)[0]
    if not worst.ok:
        raise MachineError(
            f"{path}: {graph}: ONNX Runtime {ort.__version__} saved a model whose {worst.output} differs by"
            f" {worst.error:.2e}, expected at most {worst.limit:.0e}",
            "Leave it uncompiled: the bundle's own graphs run without it.",
        )
    return {"build_s": build_s, "exact": all(np.array_equal(array, found[name]) for name, array in expected.items())}


def _reported(ort: Any, where: str, folder: Path, error: Exception) -> SdrtError:
    """A failure as one of ours: what could not be written, or was written short, means a full disk."""
    free = shutil.disk_usage(folder).free
    said = f"{error} {error.__cause__}"  # our own errors cut long messages
    if any(text in said for text in _NOT_WRITTEN) or free < 1 << 20:
        return ResourceError(
            f"{where}: ONNX Runtime cannot write the whole model to {folder}, {free:,} bytes free there",
            "Free some space; --prune drops stale engines.",
        )
    return error if isinstance(error, SdrtError) else explained(ort, where, error)
