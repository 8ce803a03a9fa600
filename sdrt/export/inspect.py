"""What a model file is, read from its header alone: `sdrt inspect FILE`. Imports no torch and reads no tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdrt.errors import SdrtError
from sdrt.export.adapters import embedding as embeddings
from sdrt.export.adapters import hypernetwork as hypernetworks
from sdrt.export.adapters.match import bundled_keys
from sdrt.export.adapters.spelling import (
    below_base_model,
    component_of_module,
    kinds,
    made_for,
    numbered_list,
    ranks,
    refused_kind,
    split,
)
from sdrt.export.families.recognise import EMBEDDING, HYPERNETWORK, LORA
from sdrt.export.families.table import component_name
from sdrt.export.read.checkpoint import canonical_tensors, model_architecture
from sdrt.export.read.model_files import open_model


def inspect_file(path: Path) -> dict[str, Any]:
    """Kind, size, tensor types, components or adapter ranks, and the verdict of `sdrt build`, as plain values for JSON.

    Raises:
        InputFileError: the file is malformed.
    """
    with open_model(path) as model:
        tensors = canonical_tensors(model)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        report: dict[str, Any] = {
            "path": str(path),
            "kind": model.kind,
            "size_bytes": sum(file.size_bytes for file in model.files.values()),
            "tensors": len(model.tensors),
            "types": dict(Counter(stored.entry.dtype for stored in model.tensors.values()).most_common()),
            "metadata": {key: value[:200] for key, value in sorted(model.metadata.items())},
        }
        if model.notes:
            report["notes"] = list(model.notes)
        if report["kind"] == LORA:
            return report | _lora(shapes, bundled_keys(next(iter(model.files.values()))))
        if report["kind"] == EMBEDDING:
            return report | embeddings.summary(next(iter(model.files.values())))
        if report["kind"] == HYPERNETWORK:
            return report | hypernetworks.summary(next(iter(model.files.values())))
        # One stored tensor may be several of the model's.
        stored = {component_name(name): set[str]() for name in shapes}
        for name, tensor in tensors.items():
            stored[component_name(name)].add(tensor.entry.name)
        report["components"] = {
            name: {"tensors": len(entries), "parameters": _parameters(shapes, name)}
            for name, entries in sorted(stored.items())
        }
        try:
            arch, remarks = model_architecture(model, tensors)
        except SdrtError as error:
            return report | {"buildable": False, "why": error.message, "fix": error.fix}
        sizes = {"unet": asdict(arch.unet), "vae": asdict(arch.vae), "texts": [asdict(text) for text in arch.texts]}
        notes = {"notes": [*model.notes, *remarks]} if model.notes or remarks else {}
        return (
            report
            | notes
            | {
                "buildable": True,
                "family": arch.family,
                "prediction": arch.prediction,
                **({"zero_snr": True} if arch.zero_snr else {}),
                **({"sigmas": list(arch.sigmas)} if arch.sigmas is not None else {}),
                "size": list(arch.size),
                "architecture": sizes,
            }
        )


def _parameters(shapes: dict[str, tuple[int, ...]], wanted: str) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if component_name(name) == wanted)


def _lora(shapes: dict[str, tuple[int, ...]], bundled: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    spelled = numbered_list(shapes)
    shapes = {spelled.get(key, key): shape for key, shape in shapes.items()}
    modules = {parsed[0] for name in shapes if (parsed := split(below_base_model(name)))}
    components = Counter(map(component_of_module, modules))
    report: dict[str, Any] = {
        "modules": {name: components[name] for name in sorted(components)},
        "kinds": kinds(shapes),
        "ranks": {str(rank): count for rank, count in ranks(shapes).items()},
    }
    if bundled:
        report["embeddings"] = {
            trigger: embeddings.count_and_width(shapes[key] for key in keys.values())
            for trigger, keys in sorted(bundled.items())
        }
    if families := made_for(shapes):
        report["made_for"] = " or ".join(families)
    if refused := refused_kind(shapes):
        report |= {"buildable": False, "why": f"{refused[0]}: not supported"}
    return report
