"""Parts of a graph give what the whole graph gives, and no part needs many weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from sdrt.bundle.graphs import GRAPHS
from sdrt.export import run_in_parts as module
from sdrt.export.run_in_parts import run_in_parts


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_parts_give_what_the_whole_gives(
    small_xl_bundle: Path, monkeypatch: pytest.MonkeyPatch, graph: str, compute: str
) -> None:
    """Equal but for rounding. Each part holds no more than its limit and the weights of the operator that passes it, so
    the weights of all parts together are those of the whole: none is taken twice.
    """
    path = small_xl_bundle / "graphs" / f"{graph}.{compute}.onnx"
    if not path.exists():
        pytest.skip("a VAE that overflows has no half-precision graph")
    with np.load(small_xl_bundle / "reference" / f"{graph}.npz") as stored:
        inputs = {name[3:]: stored[name] for name in stored.files if name.startswith("in.")}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    whole = dict(zip(names, session.run(names, inputs), strict=True))

    sizes = {
        tensor.name: int(entry.value)
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    }
    parts: list[set[str]] = []
    run = module._run

    def watched(model: Any, folder: Path, part: list[Any], *rest: Any) -> Any:
        parts.append({name for node in part for name in node.inputs if name in sizes})
        return run(model, folder, part, *rest)

    limit = sum(sizes.values()) // 8
    monkeypatch.setattr(module, "PART_BYTES", limit)
    monkeypatch.setattr(module, "_run", watched)
    found = run_in_parts(path, inputs)
    assert found.keys() == whole.keys()
    for name in names:
        error = np.abs(found[name].astype(np.float64) - whole[name]).max()
        assert error <= {"fp32": 1e-5, "fp16": 5e-3}[compute] * max(1.0, np.abs(whole[name].astype(np.float64)).max())
    taken = [sum(sizes[name] for name in part) for part in parts]
    assert len(taken) >= 3 and max(taken) <= limit + 2 * max(sizes.values())
    assert sum(taken) <= 1.05 * sum(sizes.values())
