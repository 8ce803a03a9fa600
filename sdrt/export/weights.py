"""Writes a bundle's weights into one safetensors file: the checkpoint's tensors, with every adapter's change made in
float32, rounded once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.bundle.manifest import FileRecord
from sdrt.errors import AdapterError, CheckpointError
from sdrt.export.adapters.match import Lora
from sdrt.export.families.table import component_name
from sdrt.export.read.checkpoint import Tensor
from sdrt.export.read.tensor_entry import ITEM_BYTES
from sdrt.files.publish import new_file

if TYPE_CHECKING:
    import torch

ALIGNMENT = 4096
"""The first tensor starts at a multiple of this, a page, so that an engine may map the file."""

CODES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Placed:
    """A tensor in the weights file. `offset` counts from the start of the file."""

    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Change:
    """What one adapter did to one component: the number of modules it was applied to (a few may hold zeros), and the
    size of the change relative to the weights it changed (Frobenius norms).
    """

    modules: int
    relative: float


@dataclass(frozen=True)
class Written:
    """The weights file: its hash and size, the place of each tensor and, per LoRA, the change of each component."""

    record: FileRecord
    placed: Mapping[str, Placed]
    changes: Sequence[Mapping[str, Change]]


@dataclass(frozen=True)
class Made:
    """A tensor of the bundle that is computed instead of copied, or a tensor of the checkpoint that more than LoRAs
    change.

    `make` gives it in float32. It receives a function that gives any of the checkpoint's tensors in float32, with the
    LoRAs fused. `path` is the file to name when the result is too large.
    """

    shape: tuple[int, ...]
    path: Path
    make: Callable[[Callable[[str], torch.Tensor]], torch.Tensor]


def layout(shapes: Mapping[str, tuple[int, ...]], precision: str) -> tuple[bytes, dict[str, Placed]]:
    """Header of the weights file, and the place of each tensor. Tensors that fill whole cache lines come first, so that
    they stay aligned.
    """
    code = CODES[precision]
    item = ITEM_BYTES[code]
    order = sorted(shapes, key=lambda name: (math.prod(shapes[name]) * item % 64 != 0, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    spans, offset = {}, 0
    for name in order:
        size = math.prod(shapes[name]) * item
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [offset, offset + size]}
        spans[name] = (offset, size)
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        name: Placed(shapes[name], start + o, size) for name, (o, size) in spans.items()
    }


def write_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    loras: Sequence[Lora],
    precision: str,
    progress: Callable[[float], None],
    made: Mapping[str, Made] | None = None,
) -> Written:
    """Write the weights file. Each tensor is read once and written once. It is written and hashed on another core while
    the next one is made.

    Adapters act in the order given. A DoRA rescales the weight it meets, so its place matters. All others only add.
    Between two DoRAs they are added in the order of their files' hashes, so that the order given does not change even
    the last bit. Tensors that are `made` replace or join `tensors`.

    Raises:
        CheckpointError: a stored value is not finite, or too large for the precision.
        AdapterError: an adapter changes nothing, or the sum is too large for the precision.
    """
    import torch

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    made = made or {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()} | {
        name: tensor.shape for name, tensor in made.items()
    }
    header, placed = layout(shapes, precision)
    norms: list[dict[str, tuple[float, float]]] = [
        {} for _ in loras
    ]  # per weight: the norm of the change, and of the weight it changed
    survived: set[int] = set()  # LoRAs that changed some weight by more than its rounding
    total = sum(p.size_bytes for p in placed.values())
    done = 0

    def fused(name: str) -> torch.Tensor:
        """A checkpoint's tensor with the LoRAs fused: float32 where a LoRA touches it, else as stored. May be asked for
        more than once.
        """
        source = tensors[name]
        stored = source.read()
        _check_finite(stored, source)
        touching = _order(name, loras)
        if not touching:
            return stored
        value = stored.to(torch.float32, copy=True)
        pristine = float(value.norm())
        for i in touching:
            change = loras[i].change(name, value)
            value += change
            norms[i][name] = float(change.norm()), pristine
        if not survived.issuperset(touching) and not torch.equal(value.to(kind), stored.to(kind)):
            survived.update(touching)
        return value

    digest = hashlib.sha256(header)
    with new_file(path, len(header) + total) as stream, ThreadPoolExecutor(1) as writing:
        stream.write(header)

        def write(data: memoryview) -> None:
            stream.write(data)
            digest.update(data)

        written = writing.submit(lambda: None)
        for name, place in placed.items():
            value = made[name].make(lambda weight: fused(weight).to(torch.float32)) if name in made else fused(name)
            assert tuple(value.shape) == place.shape, name
            rounded = value.to(kind)
            if not _finite(rounded):
                largest = float(value.abs().nan_to_num(math.inf).max())
                what = f"{name}: {largest:.6g} is too large for {precision}"
                blamed = [made[name].path] if name in made else [loras[i].file.path for i in _order(name, loras)]
                if blamed and (name in made or _finite(tensors[name].read().to(kind))):
                    files = ", ".join(str(file) for file in blamed)
                    raise AdapterError(f"{files}: {what}", "Lower the scale, or build with --precision bf16 or fp32.")
                raise CheckpointError(f"{tensors[name].file.path}: {what}", "Build with --precision bf16 or fp32.")
            data = (rounded.contiguous() if rounded.dim() else rounded.reshape(1)).view(torch.uint8).numpy().data
            written.result()  # of the tensor before: two tensors are in memory, never more
            written = writing.submit(write, data)
            done += place.size_bytes
            progress(done / total)
        written.result()
    changes = []
    for i, (lora, by_weight) in enumerate(zip(loras, norms, strict=True)):
        wanted = any(lora.scale(weight) != 0 for weight in lora.deltas)
        if wanted and not any(size for size, _ in by_weight.values()):
            raise AdapterError(
                f"{lora.file.path}: all its changes are zero: the LoRA does nothing",
                "Train it longer, or leave it out.",
            )
        if wanted and i not in survived:
            raise AdapterError(
                f"{lora.file.path}: its changes vanish when the weights are rounded to {precision}",
                "Raise its scale, build with --precision fp32, or leave it out.",
            )
        changes.append(_changes(by_weight))
    return Written(FileRecord(len(header) + total, digest.hexdigest()), placed, changes)


def _changes(norms: Mapping[str, tuple[float, float]]) -> dict[str, Change]:
    """By component: how many modules changed, and by how much in total."""
    by_component: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for weight, pair in norms.items():
        by_component[component_name(weight)][weight] = pair
    changes = {}
    for name, pairs in sorted(by_component.items()):
        change, whole = (math.hypot(*(pair[i] for pair in pairs.values())) for i in (0, 1))
        changes[name] = Change(len({weight.rpartition(".")[0] for weight in pairs}), change / whole if whole else 0.0)
    return changes


def _order(weight: str, loras: Sequence[Lora]) -> list[int]:
    """The indices of the adapters that change a weight, in the order they act: each DoRA at its place, those between
    two DoRAs by hash.
    """
    runs: list[list[int]] = [[]]
    for i, lora in enumerate(loras):
        if weight in lora.deltas and lora.scale(weight) != 0:
            if lora.rescales(weight):
                runs += [[i], []]
            else:
                runs[-1].append(i)
    return [
        i
        for run in runs
        for i in sorted(
            run,
            key=lambda i: (
                loras[i].sha256,
                loras[i].config_sha256 or "",
                loras[i].option.scale,
                loras[i].option.te_scale,
            ),
        )
    ]


def _finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. The extremes show it, NaN included. In float16 they cost a fortieth of a
    test of each value.
    """
    import torch

    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _check_finite(stored: torch.Tensor, source: Tensor) -> None:
    import torch

    if not _finite(stored):
        count = int((~torch.isfinite(stored)).sum())
        raise CheckpointError(
            f"{source.file.path}: {source.entry.name}: {count} of {stored.numel()} values are NaN or infinite",
            "The file is damaged, or its training diverged; get another.",
        )
