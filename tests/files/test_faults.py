"""Failing the first, the second, ... write, until the work succeeds: the target is always the old one or the new one,
whole.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_runs import ENVIRONMENT, HERE, folder, run_python, small_disk
from faulty_jobs import FILES, JOBS, content, names, old_bundle, state, write_bundle
from write_faults import Fault

from sdrt.errors import LockedError, ResourceError, UsageError
from sdrt.files import publish
from sdrt.files.lock import locked


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of locks."""
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SDRT_LOCK_TIMEOUT", "0.2")
    return tmp_path / "cache" / "locks"


def after(folder: Path, job: str) -> tuple[str, str]:
    """What the target of a job holds before it and after it."""
    prepare, run = JOBS[job]
    folder.mkdir()
    prepare(folder)
    before = state(folder / "x.sdrt")
    run(folder)
    return before, state(folder / "x.sdrt")


@contextmanager
def armed(monkeypatch: pytest.MonkeyPatch, number: int, kind: str) -> Iterator[Fault]:
    with monkeypatch.context() as patch:
        fault = Fault(number, kind)
        patch.setattr(publish, "at_point", fault.point)
        yield fault


# Small jobs, every point


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("job", JOBS)
def test_i1_i10_kill_at_every_point(tmp_path: Path, job: str) -> None:
    old, new = after(tmp_path / "reference", job)
    (tmp_path / "jobs").mkdir()
    done = run_python(HERE / "faulty_jobs.py", tmp_path / "jobs", job)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["status"] for row in rows] == [-9] * (len(rows) - 1) + [0]
    assert len(rows) > (4 if job == "picture" else 20)
    # I10: where there is no exchange, a kill between the two renames leaves no target until the next start puts the old
    # one back.
    assert {row["after kill"] for row in rows} == ({old, new, ""} if job == "two renames" else {old, new})
    for row in rows:
        assert row["again"] == 0 or job == "new", row
        assert row["in the end"] == new
        assert row["beside"] == ["x.sdrt"]


@pytest.mark.parametrize("kind", ["enospc", "eio"])
@pytest.mark.parametrize("job", JOBS)
def test_d1_failure_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, kind: str) -> None:
    old, new = after(tmp_path / "reference", job)
    prepare, run = JOBS[job]
    failed = 0
    for number in range(1, 1000):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder)
        with armed(monkeypatch, number, kind) as fault:
            try:
                run(folder)
            except ResourceError as error:
                failed += 1
                assert str(folder / "x.sdrt") in error.message and "bytes free there" in error.message
                assert os.strerror(errno.ENOSPC if kind == "enospc" else errno.EIO) in error.message
                # Only the flush of the parent folder comes after the exchange.
                assert state(folder / "x.sdrt") == (new if fault.passed[number - 1] == ("fsync", folder) else old)
            else:
                assert state(folder / "x.sdrt") == new
        if len(fault.passed) >= number and fault.passed[number - 1][0] == "remove":
            continue  # the old bundle could not be removed; it is swept next time
        assert [path.name for path in folder.iterdir()] == (["x.sdrt"] if old or state(folder / "x.sdrt") else [])
        if len(fault.passed) < number:
            break
    assert failed == len(fault.passed) - (job != "picture")


@pytest.mark.parametrize("job", JOBS)
def test_short_writes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    _, new = after(tmp_path / "reference", job)
    prepare, run = JOBS[job]
    short = 0
    for number in range(1, 1000):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder)
        with armed(monkeypatch, number, "short") as fault:
            run(folder)
        assert state(folder / "x.sdrt") == new
        if len(fault.passed) < number:
            break
        short += fault.passed[number - 1][0] == "write"
    assert short >= (1 if job == "picture" else 5)


def test_i9_nothing_is_published_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a power cut: only what was flushed survives. At the rename that is everything, the names in each
    folder included.
    """
    with armed(monkeypatch, 0, "kill") as fault:
        write_bundle(tmp_path / "x.sdrt")
    operations = [(operation, path.relative_to(tmp_path).parts) for operation, path in fault.passed]
    (published,) = [i for i, (operation, _) in enumerate(operations) if operation == "rename"]
    flushed = {parts: i for i, (operation, parts) in enumerate(operations[:published]) if operation == "fsync"}
    stage = operations[0][1]
    for i, (operation, parts) in enumerate(operations[:published]):
        if operation in ("open", "write", "mkdir"):
            assert flushed[parts] > i, parts  # the bytes, or the empty folder
            assert parts == stage or flushed[parts[:-1]] > i, parts  # its name
    assert operations[published + 1] == ("fsync", ())
    assert {operation for operation, _ in operations[published + 1 :]} <= {"fsync", "remove"}


def test_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with armed(monkeypatch, 0, "kill") as fault:
        write_bundle(tmp_path / "x.sdrt")
    assert [path.name for operation, path in fault.passed if operation == "open"][-1] == "manifest.json"


# The switch


def test_only_code_arms_it(tmp_path: Path) -> None:
    """No variable of the environment ends a process."""
    assert publish.at_point is None
    code = "import sys, pathlib, faulty_jobs; faulty_jobs.write_new(pathlib.Path(sys.argv[1]))"
    assert run_python("-c", code, tmp_path, environment={"SDRT_FAULT": "7:kill"}).returncode == 0
    assert names(tmp_path) == ["x.sdrt"]


# A full disk


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.getuid() != 0,
    reason="only root may mount; the limit on file size stands in",
)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replacing"])
def test_d1_disks_of_every_size(tmp_path: Path, exists: bool) -> None:
    needed = sum(FILES.values())
    outcomes = set()
    for size_bytes in [4096, 16_384, 65_536, *range(100_000, needed + 600_000, 250_000)]:
        disk = tmp_path / str(size_bytes)
        disk.mkdir()
        with small_disk(disk, size_bytes):
            if exists:
                try:
                    old_bundle(disk / "x.sdrt")
                except OSError:
                    continue
            before = state(disk / "x.sdrt")
            try:
                write_bundle(disk / "x.sdrt", replace=exists)
                outcomes.add(True)
            except ResourceError as error:
                assert "No space left on device" in error.message and "bytes free there" in error.message
                assert state(disk / "x.sdrt") == before
                outcomes.add(False)
            assert names(disk) == (["x.sdrt"] if state(disk / "x.sdrt") else [])
    assert outcomes == {True, False}


LIMITED = """
import pathlib, resource, sys, faulty_jobs
from sdrt.errors import ResourceError
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    faulty_jobs.write_over(pathlib.Path(sys.argv[1]))
except ResourceError as error:
    print(error.message)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
@pytest.mark.parametrize("limit", [0, 1, 4096, 69_999, 2_999_999, 3_000_000])
def test_d1_limits_on_the_size_of_files(tmp_path: Path, limit: int) -> None:
    old_bundle(tmp_path / "x.sdrt")
    before = state(tmp_path / "x.sdrt")
    done = run_python("-c", LIMITED, tmp_path, str(limit))
    assert done.returncode == 0, done.stderr
    assert ("File too large" in done.stdout) == (limit < 3_000_000)
    assert (state(tmp_path / "x.sdrt") == before) == (limit < 3_000_000)
    assert names(tmp_path) == ["x.sdrt"]


def test_d1_room_is_taken_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size_bytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_bundle(tmp_path / "x.sdrt")
    assert not list(tmp_path.iterdir())


def test_file_systems_that_cannot_take_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, start: int, size_bytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refused)
    write_bundle(tmp_path / "x.sdrt")
    assert (tmp_path / "x.sdrt" / "graphs" / "weights.safetensors").read_bytes() == content(
        "graphs/weights.safetensors", 3_000_000
    )


def test_space_is_checked_with_the_numbers(tmp_path: Path) -> None:
    publish.check_space(tmp_path, 1, "a byte")
    with pytest.raises(
        ResourceError, match=r"weights needs about 1,000,000,000,000,000,000 bytes, [\d,]+ are free there"
    ) as caught:
        publish.check_space(tmp_path, 10**18, "weights")
    assert str(tmp_path) in caught.value.message and caught.value.exit_code == 6


# Several at once

MANY = """
import pathlib, sys, faulty_jobs
for _ in range(6):
    faulty_jobs.write_over(pathlib.Path(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_i6_eight_writers_of_one_output_without_a_lock(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", MANY, tmp_path], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert names(tmp_path) == ["x.sdrt"]
    write_bundle(tmp_path / "reference")
    assert state(tmp_path / "x.sdrt") == state(tmp_path / "reference")


def test_a_stage_may_be_published_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / ".x.sdrt-1-00000000"
    stage.mkdir()

    def publishes_meanwhile(pid: int) -> bool:
        stage.rmdir()
        return True

    monkeypatch.setattr(publish, "_alive", publishes_meanwhile)
    assert not publish._abandoned(stage, 1)


HOLD = """
import pathlib, sys
from sdrt.files.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, cache: Path) -> Iterator[subprocess.Popen[str]]:
    environment = ENVIRONMENT | {"SDRT_CACHE_DIR": str(cache)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_i7_timeout_names_the_holder(tmp_path: Path, locks: Path) -> None:
    waited = []
    with holder(tmp_path / "x.sdrt", tmp_path / "cache") as process:
        with (
            pytest.raises(LockedError, match=f"process {process.pid} is writing it") as caught,
            locked(tmp_path / "x.sdrt", lambda: waited.append(1)),
        ):
            raise AssertionError("the lock was given twice")
        assert caught.value.exit_code == 7 and str(tmp_path / "x.sdrt") in caught.value.message
        assert waited
        with locked(tmp_path / "other.sdrt"):
            pass
    with locked(tmp_path / "x.sdrt"):  # the holder was killed: its lock went with it
        (file,) = locks.iterdir()
        assert file.read_text() == str(os.getpid())
    assert not list(locks.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_i7_a_lock_comes_free(tmp_path: Path, locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRT_LOCK_TIMEOUT", "60")
    with holder(tmp_path / "x.sdrt", tmp_path / "cache") as process, locked(tmp_path / "x.sdrt", process.kill):
        assert process.wait() == -9


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_i7_two_names_of_one_folder_are_one_lock(tmp_path: Path, locks: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with locked(tmp_path / "real" / "x"), pytest.raises(LockedError), locked(tmp_path / "link" / "x"):
        pass


def stale_file(locks: Path, name: str) -> None:
    (locks / name).write_text("999999")


def link_elsewhere(locks: Path, name: str) -> None:
    (locks.parent / "precious").write_text("precious")
    (locks / name).symlink_to(locks.parent / "precious")


def pipe(locks: Path, name: str) -> None:
    os.mkfifo(locks / name)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.parametrize("there", [stale_file, link_elsewhere, pipe, folder])
def test_i7_whatever_lies_at_the_locks_name(tmp_path: Path, locks: Path, there: Callable[[Path, str], None]) -> None:
    with locked(tmp_path / "x"):
        (name,) = names(locks)
    there(locks, name)
    with locked(tmp_path / "x"):
        pass
    if there is link_elsewhere:
        assert (locks.parent / "precious").read_text() == "precious"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_i7_no_locks_to_be_had(tmp_path: Path, locks: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fcntl = pytest.importorskip("fcntl")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path / "x"), locked(tmp_path / "x"):
        write_bundle(tmp_path / "x.sdrt")
    assert state(tmp_path / "x.sdrt")


def test_i7_a_cache_folder_that_is_a_file(tmp_path: Path, locks: Path) -> None:
    locks.parent.write_text("in the way")
    with locked(tmp_path / "x"):
        pass


@pytest.mark.parametrize("text", ["soon", "1s"])
def test_bad_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SDRT_LOCK_TIMEOUT", text)
    with pytest.raises(UsageError, match="SDRT_LOCK_TIMEOUT"), locked(tmp_path / "x"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_one_lock_among_threads(tmp_path: Path, locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRT_LOCK_TIMEOUT", "60")
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(5):
            with locked(tmp_path / "x"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and not list(locks.iterdir())


# Stages of others


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_stage_held_by_a_process_unknown_here_is_kept(tmp_path: Path) -> None:
    """As in two containers that share a volume: the other's number names nobody here, but its lock holds."""
    stage = tmp_path / ".x.sdrt-4194999-0123abcd"
    stage.mkdir()
    held = publish._hold(stage)
    assert held is not None
    write_bundle(tmp_path / "x.sdrt")
    assert stage.is_dir()
    os.close(held)
    write_bundle(tmp_path / "x.sdrt", replace=True)
    assert names(tmp_path) == ["x.sdrt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.parametrize(("age_s", "kept"), [(0, True), (23 * 3600, True), (25 * 3600, False), (-25 * 3600, True)])
def test_i8_a_number_that_came_again(tmp_path: Path, age_s: int, kept: bool) -> None:
    """The dead owner's number now names another process, which holds no lock: swept after a day. A time in the future
    means nothing.
    """
    stage = tmp_path / f".x.sdrt-{os.getppid()}-0123abcd"
    stage.mkdir()
    then = stage.stat().st_mtime - age_s
    os.utime(stage, (then, then))
    write_bundle(tmp_path / "x.sdrt")
    assert stage.is_dir() == kept
