"""Writes a bundle's weights into one safetensors file: the checkpoint's tensors, with every adapter's change made in
float32, rounded once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdrt.bundle.manifest import FileRecord
from sdrt.errors import AdapterError, CheckpointError
from sdrt.export.adapters.match import Lora
from sdrt.export.families.table import component_name
from sdrt.export.floats import Array, as_float32, is_finite, rounded, widened
from sdrt.export.read.checkpoint import Tensor
from sdrt.export.read.tensor_entry import ITEM_BYTES
from sdrt.files.publish import new_file

ALIGNMENT = 4096
"""The first tensor starts at a multiple of this, a page, so that an engine may map the file."""

CODES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_MAKERS = 2
"""Threads that read, fuse and round. A third one writes and hashes."""
_AHEAD_BYTES = 64 << 20
"""Size in the file of the tensors that are made or wait to be written. There may be more where one alone is larger."""
_PIECE = 4096


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
    make: Callable[[Callable[[str], Array]], Array]


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
    """Write the weights file. Each tensor is read once and written once. The next ones are read, fused and rounded on
    other cores while one is written and hashed.

    Adapters act in the order given. A DoRA rescales the weight it meets, so its place matters. All others only add.
    Between two DoRAs they are added in the order of their files' hashes, so that the order given does not change even
    the last bit. Tensors that are `made` replace or join `tensors`.

    Raises:
        CheckpointError: a stored value is not finite, or too large for the precision.
        AdapterError: an adapter changes nothing, or the sum is too large for the precision.
    """
    fusion = _Fusion(tensors, loras, precision, made or {})
    header, placed = layout(fusion.shapes(), precision)
    norms: list[dict[str, tuple[float, float]]] = [{} for _ in loras]
    total = sum(place.size_bytes for place in placed.values())
    digest, done = hashlib.sha256(header), 0
    with (
        new_file(path, len(header) + total) as stream,
        closing(_made_ahead(fusion.make, {name: place.size_bytes for name, place in placed.items()})) as ready,
    ):
        stream.write(header)
        for place, tensor in zip(placed.values(), ready, strict=True):
            assert tensor.values.shape == place.shape
            data = tensor.values.reshape(-1).view(np.uint8).data
            stream.write(data)
            digest.update(data)
            for i, weight, pair in tensor.norms:
                norms[i][weight] = pair
            done += place.size_bytes
            progress(done / total)
    changes = []
    for i, (lora, by_weight) in enumerate(zip(loras, norms, strict=True)):
        wanted = any(lora.scale(weight) != 0 for weight in lora.deltas)
        if wanted and not any(size for size, _ in by_weight.values()):
            raise AdapterError(
                f"{lora.file.path}: all its changes are zero: the LoRA does nothing",
                "Train it longer, or leave it out.",
            )
        if wanted and i not in fusion.survived:
            raise AdapterError(
                f"{lora.file.path}: its changes vanish when the weights are rounded to {precision}",
                "Raise its scale, build with --precision fp32, or leave it out.",
            )
        changes.append(_changes(by_weight))
    return Written(FileRecord(len(header) + total, digest.hexdigest()), placed, changes)


@dataclass(frozen=True)
class _Finished:
    """A tensor as the file holds it. `norms` has, for each LoRA and each weight in it, the norm of the change and that
    of the weight it changed.
    """

    values: Array
    norms: Sequence[tuple[int, str, tuple[float, float]]]


def _made_ahead(make: Callable[[str], _Finished], sizes_bytes: Mapping[str, int]) -> Generator[_Finished]:
    """What `make` gives for each name, in order. Other threads make the next ones meanwhile, a few of them: together
    with their sizes in the file, `sizes_bytes`, that bounds the memory taken.
    """
    with ThreadPoolExecutor(_MAKERS) as makers:
        ahead: deque[tuple[int, Future[_Finished]]] = deque()
        try:
            for name, size_bytes in sizes_bytes.items():
                ahead.append((size_bytes, makers.submit(make, name)))
                while len(ahead) > _MAKERS and sum(size for size, _ in ahead) > _AHEAD_BYTES:
                    yield ahead.popleft()[1].result()
            while ahead:
                yield ahead.popleft()[1].result()
        finally:
            for _, future in ahead:
                future.cancel()


class _Fusion:
    """Makes the tensors of a weights file, each by itself and in any thread.

    survived: the LoRAs that changed some weight by more than its rounding.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], loras: Sequence[Lora], precision: str, made: Mapping[str, Made]
    ) -> None:
        self._tensors = tensors
        self._loras = loras
        self._precision = precision
        self._code = CODES[precision]
        self._made = made
        self.survived: set[int] = set()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored = {name: tensor.shape for name, tensor in self._tensors.items()}
        return stored | {name: tensor.shape for name, tensor in self._made.items()}

    @np.errstate(all="ignore")  # an overflow is found in the result
    def make(self, name: str) -> _Finished:
        """A tensor of the file. Raises as `write_weights`."""
        norms: list[tuple[int, str, tuple[float, float]]] = []
        if name in self._made:
            value = self._made[name].make(lambda weight: as_float32(self._fused(weight, norms)))
        else:
            value = self._fused(name, norms)
        values = rounded(value, self._code)
        if not is_finite(values):
            raise self._too_large(name, value)
        return _Finished(values, norms)

    def _fused(self, name: str, norms: list[tuple[int, str, tuple[float, float]]]) -> Array:
        """A checkpoint's tensor with the LoRAs fused: float32 where a LoRA touches it, else as stored. May be asked for
        more than once.
        """
        source = self._tensors[name]
        stored = source.read()
        if not is_finite(stored):
            count = int((~np.isfinite(stored)).sum())
            raise CheckpointError(
                f"{source.file.path}: {source.entry.name}: {count} of {stored.size} values are NaN or infinite",
                "The file is damaged, or its training diverged; get another.",
            )
        touching = _order(name, self._loras)
        if not touching:
            return stored
        value = stored.astype(np.float32)
        pristine = _norm(value)
        for i in touching:
            change = self._loras[i].change(name, value)
            value += change
            norms.append((i, name, (_norm(change), pristine)))
        if not self.survived.issuperset(touching):
            before, after = (widened(rounded(values, self._code), self._code) for values in (stored, value))
            if not np.array_equal(before, after):
                self.survived.update(touching)
        return value

    def _too_large(self, name: str, value: Array) -> AdapterError | CheckpointError:
        largest = float(np.nan_to_num(np.abs(value), nan=np.inf, posinf=np.inf).max())
        what = f"{name}: {largest:.6g} is too large for {self._precision}"
        if name in self._made:
            blamed = [self._made[name].path]
        else:
            blamed = [self._loras[i].file.path for i in _order(name, self._loras)]
        if blamed and (name in self._made or is_finite(rounded(self._tensors[name].read(), self._code))):
            files = ", ".join(str(file) for file in blamed)
            return AdapterError(f"{files}: {what}", "Lower the scale, or build with --precision bf16 or fp32.")
        return CheckpointError(f"{self._tensors[name].file.path}: {what}", "Build with --precision bf16 or fp32.")


def _norm(values: Array) -> float:
    """The Frobenius norm of float32 values, summed in float64 over pieces that float32 sums well."""
    flat = values.reshape(-1)
    whole = flat.size // _PIECE * _PIECE
    pieces, rest = flat[:whole].reshape(-1, _PIECE), flat[whole:]
    return math.sqrt(float(np.vecdot(pieces, pieces).sum(dtype=np.float64)) + float(np.vecdot(rest, rest)))


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
