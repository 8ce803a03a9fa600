"""What an engine's `engine.json` says: its fields, and the strict parser that reads them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sdrt.bundle.graphs import STEP, TEXT_ENCODER, TOKENS, Dimensions, signatures, table_rows
from sdrt.bundle.manifest import MAX_BATCH, MAX_BRANCHES, MAX_CHUNKS, MAX_SIDE, MIN_SIDE, PRECISIONS, SIZE_STEP
from sdrt.engines.targets import TARGETS

FORMAT = 1
RECORD = "engine.json"
MAX_ROWS = 4096
_TABLES = signatures(Dimensions(1, 0, 1, 1, 1, (1,)))[STEP].tables
"""The tables that the step of every model has."""
_MAX_TOKENS, _MAX_SIDE = MAX_CHUNKS << 10, 1 << 24

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """One optimization profile: every input's smallest, optimal and largest shape, all three equal where
    it is static.
    """

    shapes: dict[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on: equal keys, interchangeable engines.

    `target` is tensorrt-rtx, tensorrt, openvino or onnxruntime, `compiler` its full version. `device` is "sm_86,sm_89"
    for an engine built ahead of time, "NVIDIA H100 80GB HBM3, sm_90" for one built on its GPU, or a CPU's model and
    instruction sets. `precision` is that of the graphs, for openvino that of the arithmetic: its engines are made from
    the fp32 graphs, as onnxruntime's are. `graphs` holds the SHA-256 of each ONNX file, `weights` that of the weights.
    `profiles` come in the order the engine has them; the step's are one per number of guidance branches. onnxruntime's
    engines have none: they take any shape.
    """

    target: str
    compiler: str
    device: str
    platform: str
    precision: str
    graphs: dict[str, str]
    weights: str
    profiles: dict[str, tuple[Profile, ...]]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class ExternalData:
    """A file of weights beside a plan."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Plan:
    """A plan file. `device_memory_bytes` is what its activations take; None where no GPU has loaded it yet.

    `external_data` holds the weights where the plan is a graph that maps them from a file of its own, as onnxruntime's
    are.
    """

    file: str
    size_bytes: int
    sha256: str
    device_memory_bytes: int | None
    external_data: ExternalData | None = None

    @property
    def disk_bytes(self) -> int:
        """Bytes of both files."""
        return self.size_bytes + (0 if self.external_data is None else self.external_data.size_bytes)


@dataclass(frozen=True)
class EngineRecord:
    """What `engine.json` says. `size` (width, height) in pixels, `batch` and `tokens` are the largest the engine takes.

    `rows` is how many rows the step's tables hold for each picture, `branches` the numbers of guidance branches.
    `state_bytes` is what the pipeline keeps on the device beside the engine at those shapes, `weight_bytes` the size of
    the bundle's weights. For an engine that takes any shape the first four are None, it names no branches, and
    keeps nothing on a device.
    """

    format: int
    key: EngineKey
    size: tuple[int, int] | None
    batch: int | None
    tokens: int | None
    rows: int | None
    branches: tuple[int, ...]
    state_bytes: int
    weight_bytes: int
    plans: dict[str, Plan]


def record_from(document: dict[str, Any]) -> EngineRecord:
    """Check the fields of `engine.json`, which is untrusted input.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: they are not as they should be.
    """
    _exactly(document, EngineRecord)
    if document["format"] != FORMAT or isinstance(document["format"], bool):
        raise ValueError(f"format: expected {FORMAT}, found {document['format']!r}")
    key = document["key"]
    _exactly(key, EngineKey)
    profiles = {
        _graph(graph): tuple(_profile(profile) for profile in several) for graph, several in key["profiles"].items()
    }
    plans = {_graph(graph): _plan(plan) for graph, plan in document["plans"].items()}
    graphs = {_graph(graph): _hex(digest) for graph, digest in key["graphs"].items()}
    if not plans or not plans.keys() == graphs.keys() == profiles.keys():
        raise ValueError("plans, graphs and profiles name different graphs")
    files = [
        file
        for plan in plans.values()
        for file in (plan.file, None if plan.external_data is None else plan.external_data.file)
        if file is not None
    ]
    if len(set(files)) != len(files):
        raise ValueError("two plans share a file")
    target = _text(key["target"])
    limits = [document[name] for name in ("size", "batch", "tokens", "rows")]
    takes_any = target in TARGETS and TARGETS[target].shapes == "any"
    if takes_any and (limits != [None] * 4 or document["branches"] != [] or any(profiles.values())):
        raise ValueError(f"an engine of {target} takes any shape, this one has limits")
    record = EngineRecord(
        format=FORMAT,
        key=EngineKey(
            target=target,
            compiler=_text(key["compiler"]),
            device=_text(key["device"]),
            platform=_text(key["platform"]),
            precision=_precision(key["precision"]),
            graphs=graphs,
            weights=_hex(key["weights"]),
            profiles=profiles,
            flags=tuple(_text(flag) for flag in key["flags"]),
        ),
        size=None if takes_any else _size(document["size"]),
        batch=None if takes_any else _count(document["batch"]),
        tokens=None if takes_any else _count(document["tokens"]),
        rows=None if takes_any else _count(document["rows"]),
        branches=tuple(_count(number) for number in document["branches"]),
        state_bytes=_count(document["state_bytes"]),
        weight_bytes=_count(document["weight_bytes"]),
        plans=plans,
    )
    if not takes_any:
        _check_shapes(record)
    return record


def _check_shapes(record: EngineRecord) -> None:
    """That an engine's limits are in range, and that its profiles say the same. ValueError otherwise; nothing later
    checks again.
    """
    assert (
        record.size is not None and record.batch is not None and record.tokens is not None and record.rows is not None
    )
    for side in record.size:
        if side % SIZE_STEP:
            raise ValueError(f"size: {side}: expected a multiple of {SIZE_STEP}")
        _within("size", side, MIN_SIDE, MAX_SIDE)
    _within("batch", record.batch, 1, MAX_BATCH)
    _within("tokens", record.tokens, 1, _MAX_TOKENS)
    _within("rows", record.rows, 2, MAX_ROWS)
    for count in record.branches:
        _within("branches", count, 1, MAX_BRANCHES)
    if not record.branches or len(set(record.branches)) != len(record.branches):
        raise ValueError(f"branches: {list(record.branches)}: expected different numbers")
    for graph, profiles in record.key.profiles.items():
        if len(profiles) != (expected := len(record.branches) if graph == STEP else 1):
            raise ValueError(f"profiles of {graph}: expected {expected}, found {len(profiles)}")
    _largest(record.key.profiles, TEXT_ENCODER, 0, TOKENS[0], 2)
    for i, count in enumerate(record.branches):
        expected_rows = table_rows(record.batch, record.rows)
        for table in _TABLES:
            if _largest(record.key.profiles, STEP, i, table)[0] != expected_rows:
                raise ValueError(f"step, {table}: expected {expected_rows} rows")
        if (found := _largest(record.key.profiles, STEP, i, "w", 2)[1]) != count:
            raise ValueError(f"step, w: {found} guidance branches, expected {count}")
        pictures, _, height, width = _largest(record.key.profiles, STEP, i, "init", 4)
        if pictures != record.batch or width * record.size[1] != height * record.size[0] or record.size[0] % width:
            raise ValueError(
                f"step, init: {pictures} of {width}x{height}, expected {record.batch} of"
                f" {record.size[0]}x{record.size[1]} pixels"
            )
        if (context := _largest(record.key.profiles, STEP, i, "context", 4))[:3] != (pictures, count, record.tokens):
            raise ValueError(
                f"step, context: {list(context)}, expected {pictures} of {count} branches of {record.tokens} tokens"
            )


def _largest(
    profiles: dict[str, tuple[Profile, ...]], graph: str, index: int, name: str, rank: int | None = None
) -> Shape:
    """The largest shape of a graph's input in one of its profiles; it has a side, and `rank` of them where that is
    given.
    """
    three = profiles[graph][index].shapes.get(name) if graph in profiles else None
    if three is None:
        raise ValueError(f"profiles: no shape for {name} of {graph}")
    largest = three[2]
    if not largest or (rank is not None and len(largest) != rank):
        raise ValueError(f"{graph}, {name}: {len(largest)} sides, expected {'some' if rank is None else rank}")
    return largest


def _within(where: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{where}: {value}: expected {low} to {high}")


def _exactly(document: dict[str, Any], kind: type[Any]) -> None:
    if wrong := document.keys() ^ {field.name for field in fields(kind)}:
        raise ValueError(f"fields {sorted(wrong)}")


def _profile(document: dict[str, Any]) -> Profile:
    _exactly(document, Profile)
    shapes = {}
    for name, (low, best, high) in document["shapes"].items():
        three = tuple(tuple(_count(side) for side in shape) for shape in (low, best, high))
        if not all(0 < a <= b <= c <= _MAX_SIDE for a, b, c in zip(*three, strict=True)):
            raise ValueError(
                f"profile of {name!r}: expected smallest <= best <= largest, each 1 to {_MAX_SIDE:,}, found {three}"
            )
        shapes[_text(name)] = three
    return Profile(shapes)  # type: ignore[arg-type]


def _plan(document: dict[str, Any]) -> Plan:
    document = {"external_data": None, **document}  # records from before there was any do not say so
    _exactly(document, Plan)
    memory, data = document["device_memory_bytes"], document["external_data"]
    return Plan(
        _file(document["file"]),
        _count(document["size_bytes"]),
        _hex(document["sha256"]),
        None if memory is None else _count(memory),
        None if data is None else _external_data(data),
    )


def _external_data(document: dict[str, Any]) -> ExternalData:
    _exactly(document, ExternalData)
    return ExternalData(_file(document["file"]), _count(document["size_bytes"]), _hex(document["sha256"]))


def _file(value: object) -> str:
    name = _text(value)
    if name in (".", "..", RECORD) or set(name) & set('/\\:<>"|?*') or name.startswith("."):
        raise ValueError(f"unsafe file name {name!r}")
    return name


def _size(value: Any) -> tuple[int, int]:
    width, height = value
    return _count(width), _count(height)


def _graph(name: str) -> str:
    return _text(name)


def _precision(value: object) -> str:
    if value not in PRECISIONS:
        raise ValueError(f"precision: {value!r}: expected one of {', '.join(PRECISIONS)}")
    return str(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise ValueError(f"expected a word, found {value!r}")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a count, found {value!r}")
    return value


def _hex(value: object) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"expected a sha256, found {value!r}")
    return value
