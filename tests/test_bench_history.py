"""Results written and read back, the history of runs, and what may go wrong with either."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_documents import COUNTERS, IDENTITY, answer, document

from sdrt.bench import history
from sdrt.bench.formats import bencher, github_action_benchmark
from sdrt.bench.result import SCHEMA, Document, assemble, read_result, write_json
from sdrt.errors import InputFileError, LockedError, MachineError, ResourceError, UsageError


def test_results_are_read_back_and_unknown_fields_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", document(1) | {"of the future": [1]})
    found, digest = read_result(tmp_path / "a.json")
    assert found["of the future"] == [1] and found["samples"] == document(1)["samples"] and found["stats"] == document(1)["stats"] and len(digest) == 64


@pytest.mark.parametrize(
    ("change", "kind", "fragment"),
    [({"schema": SCHEMA + 1}, MachineError, "this sdrt reads schema 1"), ({"schema": 0}, InputFileError, "schema: expected 1, found 0"),
     ({"schema": True}, InputFileError, "found True"), ({"samples": []}, InputFileError, "samples: expected an object, found list"),
     ({"samples": {"total_ms": [1.0]}}, InputFileError, "samples.total_ms: expected a list of numbers per process"),
     ({"samples": {"total_ms": [[]]}}, InputFileError, "no sample in it"), ({"samples": {"total_ms": [["1"]]}}, InputFileError, "samples.total_ms"),
     ({"counters": {"jobs": 1.5}}, InputFileError, "counters.jobs: expected a whole number"), ({"config": {}}, InputFileError, "config.scenario: missing"),
     ({"fidelity": {}}, InputFileError, "fidelity.ok"), ({"id": 5}, InputFileError, "id: expected text, found int"),
     ({"fidelity": {"ok": True, "picture": {"values": 1}}}, InputFileError, "fidelity.picture")],
)  # fmt: skip
def test_bad_results(tmp_path: Path, change: dict[str, Any], kind: type[Exception], fragment: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document(1) | change), encoding="utf-8")
    with pytest.raises(kind) as caught:
        read_result(path)
    assert fragment in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": NaN}', "{", "\x00", "[" * 100_000, '"text"'])
def test_results_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputFileError, match=r"a\.json"):
        read_result(path)
    with pytest.raises(InputFileError, match="cannot be read"):
        read_result(tmp_path / "none.json")


def test_samples_that_are_no_durations_are_dropped_and_counted() -> None:
    made = answer(np.random.default_rng(0))
    made["samples"]["total_ms"] += [float("nan"), -1.0]
    document = assemble([made, answer(np.random.default_rng(1))], IDENTITY, [])
    assert document["warnings"] == ["total_ms: 2 samples dropped: not a number, or negative because a clock went back"]
    assert document["stats"]["total_ms"]["n"] == 10


def test_a_counter_that_differs_between_processes_is_left_out_aloud() -> None:
    answers = [answer(np.random.default_rng(0)) | {"counters": COUNTERS | {"jobs": jobs}} for jobs in (1, 2)]
    document = assemble(answers, IDENTITY, [])
    assert "jobs" not in document["counters"] and "counter jobs: differs" in document["warnings"][0]


def test_history_keeps_runs_and_draws_a_fence_after_ten(tmp_path: Path) -> None:
    for seed in range(11):
        history.append(tmp_path / "runs", document(seed, 3))
    (trend,) = (trend for trend in history.trends(history.read(tmp_path / "runs")) if trend.name == "total_ms")
    assert len(trend.values) == 11 and trend.limit is not None and not trend.outside
    history.append(tmp_path / "runs", document(20, 3, slower=0.5))
    other = document(21, 3)
    other["config"]["steps"] = 30  # another line: never compared with the others
    history.append(tmp_path / "runs", other)
    found = [trend for trend in history.trends(history.read(tmp_path / "runs")) if trend.name == "total_ms"]
    assert [(len(trend.values), trend.outside) for trend in found] == [(12, True), (1, False)]


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    def write(first: int) -> None:
        for index in range(20):
            history.append(tmp_path, document(0, 1) | {"id": f"{first + index:032x}"})

    threads = [threading.Thread(target=write, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = history.read(tmp_path)
    assert len(runs) == 80 and len({record["id"] for record in runs}) == 80


def test_a_lock_that_is_held_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_LOCK_S", 0.05)
    with history._locked(tmp_path / history._LOCK), pytest.raises(LockedError, match="held by another process"):
        history.append(tmp_path, document(0, 1))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Writing stops half-way through a line."""
    real = os.write
    left = [100]

    def write(descriptor: int, data: bytes) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: left[0]]
        left[0] -= len(part)
        return real(descriptor, part)

    monkeypatch.setattr("sdrt.bench.history.os.write", write)
    yield
    monkeypatch.undo()


def test_a_full_disk_leaves_the_history_as_it_was(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = history.append(tmp_path, document(0, 1))
    before = file.read_bytes()
    request.getfixturevalue("full_disk")
    with pytest.raises(ResourceError, match="No space left") as caught:
        history.append(tmp_path, document(1, 1))
    assert caught.value.exit_code == 6 and file.read_bytes() == before


def test_a_torn_last_line_is_left_out_and_mended(tmp_path: Path) -> None:
    file = history.append(tmp_path, document(0, 1))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:50])
    assert len(history.read(tmp_path)) == 1
    history.append(tmp_path, document(1, 1))
    assert len(history.read(tmp_path)) == 2
    file.write_bytes(b"torn")
    history.append(tmp_path, document(1, 1))
    assert len(history.read(tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "kind", "fragment"),
    [("", InputFileError, "no runs"), ("{}\n", InputFileError, "schema"), ('{"schema": 2}\n', MachineError, "Upgrade"), ("x\n", InputFileError, ":1: not valid JSON"),
     ('{"schema": 1}\n', InputFileError, ":1: not a run"),
     ('{"schema": 1, "id": "", "time": "", "key": "", "ran": "", "stats": {"x": {}}, "counters": {}}\n', InputFileError, "x: expected a number, found None")],
)  # fmt: skip
def test_bad_histories(tmp_path: Path, text: str, kind: type[Exception], fragment: str) -> None:
    (tmp_path / history.FILE).write_text(text, encoding="utf-8")
    with pytest.raises(kind) as caught:
        history.read(tmp_path)
    assert fragment in str(caught.value)


def test_history_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        history.append(tmp_path / "file", document(0, 1))
    with pytest.raises(InputFileError, match="cannot be read"):
        history.read(tmp_path / "none")


def bencher_names(made: Document) -> set[str]:
    return set(json.loads(bencher(made)))


def github_names(made: Document) -> set[str]:
    return {entry["name"] for entry in json.loads(github_action_benchmark(made))}


def test_two_bundles_are_two_series_and_a_label_makes_them_one(tmp_path: Path) -> None:
    """The same machine, engine and settings: another model is another line, in a history and for CI systems."""
    one, other = document(1), document(2)
    other["bundle"] = other["bundle"] | {"name": "styled"}
    for made in (one, other):
        history.append(tmp_path, made)
    assert {trend.ran.partition(":")[0] for trend in history.trends(history.read(tmp_path))} == {"toy", "styled"}
    assert not bencher_names(one) & bencher_names(other) and not github_names(one) & github_names(other)
    one["bundle"]["label"] = other["bundle"]["label"] = "release"
    assert bencher_names(one) == bencher_names(other) and github_names(one) == github_names(other)
    for made in (one, other):
        history.append(tmp_path / "labelled", made)
    assert {len(trend.values) for trend in history.trends(history.read(tmp_path / "labelled"))} == {2}
