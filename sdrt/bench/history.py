"""A folder of past runs, one JSON line each. A line is appended under a lock, completely or not at all, and read back
for trends.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.bench.metrics import METRICS
from sdrt.bench.result import SCHEMA, check_schema, parse_json, series, series_key
from sdrt.bench.statistics import fence
from sdrt.errors import InputFileError, LockedError, ResourceError, UsageError
from sdrt.files.read import read_given

FILE = "history.jsonl"
MAX_HISTORY_BYTES = 256 << 20
_MAKE_ONE = "Make one with: sdrt bench run BUNDLE --history DIR"
_LOCK = ".lock"
_LOCK_S = 10.0


def append(folder: Path, document: Mapping[str, Any]) -> Path:
    """Add a run's medians and counters to `folder`, which is made if missing. Returns the file.

    Raises:
        ResourceError: the disk is full; the file is unchanged.
        LockedError: another process has held the lock for ten seconds.
        UsageError: the folder cannot be written.
    """
    record = {
        "schema": SCHEMA,
        "id": document["id"],
        "time": document["time"],
        "tool": document["tool"],
        "key": series_key(document),
        "ran": series(document),
        "engine": document["engine"],
        "stats": document["stats"],
        "counters": document["counters"],
        "fidelity": document["fidelity"]["ok"],
        "env": document["env"],
        "warnings": document["warnings"],
    }
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    file = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / _LOCK), file.open("a+b") as stream:
            _write(stream.fileno(), line)
    except OSError as error:
        kind: type[ResourceError] | type[UsageError] = (
            UsageError if isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)) else ResourceError
        )
        raise kind(
            f"{file}: cannot add this run: {error.strerror}",
            "Free some space, or choose another --history folder; the history is as it was.",
        ) from error
    return file


def _write(descriptor: int, line: bytes) -> None:
    """Append a line. If that fails half-way, the file is cut back. A torn last line from a killed process is removed
    too.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    whole = _whole_bytes(descriptor, end)
    if whole != end:
        os.ftruncate(descriptor, whole)
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, whole)
        raise


def _whole_bytes(descriptor: int, end: int) -> int:
    """The length of the file up to its last line feed."""
    position = end
    while position > 0:
        start = max(0, position - 65_536)
        os.lseek(descriptor, start, os.SEEK_SET)
        found = os.read(descriptor, position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock beside the file. The locks of `sdrt.files.lock` only save work, so work goes on without them. Here
    two writers without a lock would tear lines.
    """
    with path.open("a+b") as stream:
        deadline = time.monotonic() + _LOCK_S
        while not _try_lock(stream.fileno()):
            if time.monotonic() > deadline:
                raise LockedError(
                    f"{path}: held by another process for {_LOCK_S:g} s",
                    "Wait for the other benchmark to end, or stop it.",
                )
            time.sleep(0.02)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def read(folder: Path) -> list[dict[str, Any]]:
    """All runs, oldest first. A torn last line is left out.

    Raises:
        InputFileError: there is no history, or a line is not one of ours.
        MachineError: a newer sdrt wrote a line.
    """
    # Path.is_file raises for a name that is too long.
    file = folder if os.path.isfile(folder) else folder / FILE  # noqa: PTH113
    data = read_given(file, MAX_HISTORY_BYTES, _MAKE_ONE).data
    runs = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        where = Path(f"{file}:{number}")
        record = parse_json(where, line)
        check_schema(where, record)
        stats, counters = record.get("stats"), record.get("counters")
        if (
            not isinstance(stats, dict)
            or not isinstance(counters, dict)
            or not all(isinstance(record.get(name), str) for name in ("id", "time", "key", "ran"))
        ):
            raise InputFileError(
                f"{where}: not a run: id, time, key, ran, stats or counters missing", "Remove the line."
            )
        for name, value in [
            *((n, s.get("p50") if isinstance(s, dict) else None) for n, s in stats.items()),
            *counters.items(),
        ]:
            if type(value) not in (int, float):
                raise InputFileError(f"{where}: {name}: expected a number, found {value!r}", "Remove the line.")
        runs.append(record)
    if not runs:
        raise InputFileError(f"{file}: no runs in it", "Add one with: sdrt bench run BUNDLE --history DIR")
    return runs


@dataclass(frozen=True)
class Trend:
    """One metric over the runs with the same label, engine, machine and shape. `ran` names all of these but the
    machine. `limit` is Q3 + 3 IQR of all runs but the last; None if there are fewer than ten of them.
    """

    key: str
    ran: str
    name: str
    unit: str
    times: tuple[str, ...]
    values: tuple[float, ...]
    limit: float | None

    @property
    def outside(self) -> bool:
        return self.limit is not None and self.values[-1] > self.limit


def trends(runs: Sequence[Mapping[str, Any]]) -> list[Trend]:
    """Every metric and counter of every kind of run, in the order of their first appearance. Only runs of the same kind
    share a line.
    """
    found: dict[tuple[str, str], list[tuple[str, float]]] = {}
    labels: dict[str, str] = {}
    for run in runs:
        labels[run["key"]] = run["ran"]
        values = {name: stats["p50"] for name, stats in run["stats"].items()} | run["counters"]
        for name, value in values.items():
            found.setdefault((run["key"], name), []).append((run["time"], float(value)))
    made = []
    for (key, name), points in found.items():
        times, numbers = zip(*points, strict=True)
        unit = METRICS[name].unit if name in METRICS else "bytes" if name.endswith("_bytes") else "count"
        made.append(Trend(key, labels[key], name, unit, times, numbers, fence(numbers[:-1])))
    return made
