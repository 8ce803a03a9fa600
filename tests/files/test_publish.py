"""Writing into place: all or nothing, whatever interrupts it, and what killed processes left behind is swept."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from sdrt.errors import ResourceError, UsageError
from sdrt.files import publish
from sdrt.files.publish import staged_file, staged_folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "model.sdrt"


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def old_folder(target: Path) -> None:
    (target / "graphs").mkdir(parents=True)
    (target / "graphs" / "old").write_text("old")


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its text, and every folder."""
    return {p.relative_to(folder).as_posix(): p.read_text() if p.is_file() else "/" for p in folder.rglob("*")}


OLD = {"model.sdrt": "/", "model.sdrt/graphs": "/", "model.sdrt/graphs/old": "old"}
NEW = {"model.sdrt": "/", "model.sdrt/new": "new"}


def write_new(target: Path, *, replace: bool = False) -> None:
    with staged_folder(target, replace=replace) as stage:
        (stage / "new").write_text("new")


# Folders


def test_folder_appears_at_the_end_only(target: Path) -> None:
    with staged_folder(target) as stage:
        assert stage.is_dir()
        assert stage.parent == target.parent
        assert not list(stage.iterdir())
        (stage / "new").write_text("new")
        assert not target.exists()
    assert tree(target.parent) == NEW


@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3), OSError(errno.EBADF, "x"), UsageError("x")],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replacing"])
def test_folder_is_given_up_on_any_error(target: Path, error: BaseException, exists: bool) -> None:
    if exists:
        old_folder(target)
    with pytest.raises(type(error)) as caught, staged_folder(target, replace=exists) as stage:
        (stage / "part").mkdir()
        (stage / "part" / "new").write_text("new")
        raise error
    assert caught.value is error
    assert tree(target.parent) == (OLD if exists else {})


@pytest.mark.parametrize(
    "make",
    [old_folder, Path.touch, Path.mkdir, lambda p: p.symlink_to("nowhere")],
    ids=["folder", "file", "empty folder", "dangling link"],
)
def test_existing_target_is_refused(target: Path, make: Callable[[Path], None]) -> None:
    make(target)
    before = tree(target.parent)
    with pytest.raises(UsageError, match="exists already") as caught:
        write_new(target)
    assert str(target) in caught.value.message
    assert "--force" in caught.value.fix
    assert tree(target.parent) == before
    assert target.is_symlink() or target.exists()


def test_target_that_appears_meanwhile_is_refused(target: Path) -> None:
    with pytest.raises(UsageError, match="exists already"), staged_folder(target) as stage:
        (stage / "new").write_text("new")
        old_folder(target)
    assert tree(target.parent) == OLD


def test_replacing_what_is_not_there(target: Path) -> None:
    write_new(target, replace=True)
    assert tree(target.parent) == NEW


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_replacing_is_one_exchange(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder(target)

    def no_rename(*_: object) -> None:
        raise AssertionError("the target was renamed, so it was missing for a moment")

    monkeypatch.setattr(os, "rename", no_rename)
    write_new(target, replace=True)
    assert tree(target.parent) == NEW


def without_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish.ctypes, "CDLL", lambda *_, **__: object())


def refusing_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def renameat2(*_: object) -> int:
            return -1

    monkeypatch.setattr(publish.ctypes, "CDLL", lambda *_, **__: Library)


@pytest.mark.parametrize("system", [without_renameat2, refusing_renameat2])
def test_replacing_without_an_exchange(
    target: Path, monkeypatch: pytest.MonkeyPatch, system: Callable[[pytest.MonkeyPatch], None]
) -> None:
    system(monkeypatch)
    old_folder(target)
    write_new(target, replace=True)
    assert tree(target.parent) == NEW


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_replacing_without_an_exchange_that_fails_half_way(
    target: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    without_renameat2(monkeypatch)
    old_folder(target)
    rename, calls = Path.rename, list[Path]()

    def second_fails(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(type(error)):
        write_new(target, replace=True)
    assert len(calls) == 3
    assert tree(target.parent) == OLD


def test_everything_is_flushed_before_it_is_published(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, publish._renameat2

    def seen_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def seen_rename(old: Path, new: Path, flags: int) -> int:
        events.append("rename")
        return rename(old, new, flags)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(publish, "_renameat2", seen_rename)
    with staged_folder(target) as stage:
        (stage / "part").mkdir()
        (stage / "part" / "a").write_text("a")
        (stage / "b").write_text("b")
        name = stage.name
    assert sorted(events[:4]) == sorted(["part", "a", "b", name])
    assert events[4:] == ["rename", "out"]


def test_parent_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write there") as caught:
        write_new(tmp_path / "none" / "model.sdrt")
    assert str(tmp_path / "none" / "model.sdrt") in caught.value.message
    assert not list(tmp_path.iterdir())


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write there"):
        write_new(tmp_path / "file" / "model.sdrt")
    assert tree(tmp_path) == {"file": "x"}


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("mode", [0o500, 0o300, 0o000], ids=oct)
def test_parent_without_permission(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    folder.chmod(mode)
    try:
        with pytest.raises(UsageError, match="cannot write there"):
            write_new(folder / "model.sdrt")
    finally:
        folder.chmod(0o700)
    assert not list(folder.iterdir())


def test_parent_that_may_not_be_listed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UsageError, match="cannot write there: Permission denied"):
        write_new(target)


@pytest.mark.parametrize("length", [250, 300])
def test_name_that_is_too_long(tmp_path: Path, length: int) -> None:
    """250 characters would fit, were it not for the stage beside it."""
    with pytest.raises(UsageError, match="File name too long"):
        write_new(tmp_path / ("x" * length))
    with pytest.raises(UsageError, match="File name too long"), staged_file(tmp_path / ("x" * length)) as stage:
        stage.write_text("new")
    assert not list(tmp_path.iterdir())


# What killed processes leave


def stage_of(target: Path, pid: int | str, suffix: str = "") -> Path:
    stage = target.with_name(f".{target.name}-{pid}-0123abcd{suffix}")
    stage.mkdir()
    (stage / "part").write_text("part")
    return stage


def test_stage_of_a_dead_process_is_swept(target: Path, dead_pid: int) -> None:
    stage_of(target, dead_pid)
    write_new(target)
    assert tree(target.parent) == NEW


def test_stage_file_of_a_dead_process_is_swept(target: Path, dead_pid: int) -> None:
    target.with_name(f".{target.name}-{dead_pid}-0123abcd").write_text("x")
    write_new(target)
    assert tree(target.parent) == NEW


@pytest.mark.parametrize("pid", [os.getpid(), os.getppid(), 1], ids=["ours", "our parent's", "the first"])
def test_stage_of_a_live_process_is_kept(target: Path, pid: int) -> None:
    stage = stage_of(target, pid)
    write_new(target)
    assert tree(stage) == {"part": "part"}
    assert tree(target) == {"new": "new"}


def test_stage_of_another_target_is_kept(target: Path, dead_pid: int) -> None:
    others = [
        stage_of(target.with_name("model.sdrt2"), dead_pid),
        stage_of(target.with_name("modelXsdrt"), dead_pid),
        target.with_name(f".{target.name}-{dead_pid}-0123abcd.bak"),
        target.with_name(f".{target.name}-{dead_pid}-0123"),
        target.with_name(f"{target.name}-{dead_pid}-0123abcd"),
        target.with_name(f".{target.name}-{10**30}-0123abcd"),
    ]
    for path in others[2:]:
        path.mkdir()
    write_new(target)
    assert all(path.is_dir() for path in others)


def test_link_that_looks_like_a_stage_is_not_followed(target: Path, dead_pid: int, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    links = [target.with_name(f".{target.name}-{dead_pid}-0123abc{i}") for i in range(2)]
    links[0].symlink_to(tmp_path / "precious")
    links[1].symlink_to(tmp_path / "precious" / "file")
    write_new(target)
    assert tree(tmp_path / "precious") == {"file": "x"}
    assert all(link.is_symlink() for link in links)


def test_i10_folder_set_aside_goes_back(target: Path, dead_pid: int) -> None:
    """A replacement was killed between its two renames."""
    stage_of(target, dead_pid, ".old")
    stage_of(target, dead_pid)
    with pytest.raises(UsageError, match="exists already"):
        write_new(target)
    assert tree(target.parent) == {"model.sdrt": "/", "model.sdrt/part": "part"}
    write_new(target, replace=True)
    assert tree(target.parent) == NEW


def test_folder_set_aside_is_removed_where_the_target_is(target: Path, dead_pid: int) -> None:
    """A replacement was killed after its second rename."""
    old_folder(target)
    stage_of(target, dead_pid, ".old")
    with pytest.raises(UsageError, match="exists already"):
        write_new(target)
    assert tree(target.parent) == OLD


def test_kill_leaves_a_stage_that_the_next_run_sweeps(target: Path) -> None:
    old_folder(target)
    code = (
        "import sys, pathlib, sdrt.files.publish\nwith sdrt.files.publish.staged_folder(pathlib.Path(sys.argv[1]),"
        " replace=True) as stage:\n    (stage / 'x').touch()\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(target.parent.iterdir())) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(target.parent.iterdir())) == 2
    assert tree(target) == {"graphs": "/", "graphs/old": "old"}
    write_new(target, replace=True)
    assert tree(target.parent) == NEW


# A full disk

FULL = """
import pathlib, resource, sys
from sdrt.errors import ResourceError
from sdrt.files.publish import staged_file, staged_folder
target = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    if sys.argv[2] == "folder":
        with staged_folder(target, replace=True) as stage:
            (stage / "small").write_bytes(bytes(100))
            (stage / "big").write_bytes(bytes(5000))
    else:
        with staged_file(target) as stage:
            stage.write_bytes(bytes(5000))
except ResourceError as error:
    print(error.exit_code, error.message, error.fix)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replacing"])
def test_file_too_large(target: Path, kind: str, exists: bool) -> None:
    if exists:
        old_folder(target) if kind == "folder" else target.write_text("old")
    before = tree(target.parent)
    done = subprocess.run(
        [sys.executable, "-B", "-c", FULL, str(target), kind], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"6 {target}: File too large")
    assert "bytes free there" in done.stdout
    assert tree(target.parent) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_disk_errors_become_one_message(target: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    old_folder(target)

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)  # a late write error is reported here
    with pytest.raises(ResourceError, match=os.strerror(code)):
        write_new(target, replace=True)
    assert tree(target.parent) == OLD


# Files


def test_file_appears_at_the_end_only(target: Path) -> None:
    with staged_file(target) as stage:
        assert stage.parent == target.parent
        stage.write_text("new")
        assert not target.exists()
    assert tree(target.parent) == {"model.sdrt": "new"}


def test_file_replaces_the_old_one(target: Path) -> None:
    target.write_text("old")
    with staged_file(target) as stage:
        stage.write_text("new")
        assert target.read_text() == "old"
    assert tree(target.parent) == {"model.sdrt": "new"}


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_file_is_given_up_on_any_error(target: Path, error: BaseException) -> None:
    target.write_text("old")
    with pytest.raises(type(error)), staged_file(target) as stage:
        stage.write_text("new")
        raise error
    assert tree(target.parent) == {"model.sdrt": "old"}


def test_file_that_nobody_wrote(target: Path) -> None:
    with pytest.raises(UsageError), staged_file(target):
        pass
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("parent", ["none", "file"])
def test_file_in_a_parent_that_is_no_folder(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write there"), staged_file(tmp_path / parent / "picture.png") as stage:
        stage.write_text("new")
    assert tree(tmp_path) == {"file": "x"}


def test_file_where_a_folder_is(target: Path) -> None:
    old_folder(target)
    with pytest.raises(UsageError, match="cannot write there"), staged_file(target) as stage:
        stage.write_text("new")
    assert tree(target.parent) == OLD


def test_file_replaces_a_link_not_what_it_points_at(target: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    target.symlink_to(tmp_path / "other")
    with staged_file(target) as stage:
        stage.write_text("new")
    assert (tmp_path / "other").read_text() == "other"
    assert not target.is_symlink()
    assert target.read_text() == "new"


# The one writer


WRITES = {
    "write_bytes",
    "write_text",
    "mkdir",
    "makedirs",
    "rename",
    "unlink",
    "rmtree",
    "rmdir",
    "touch",
    "symlink_to",
    "hardlink_to",
    "copy",
    "copyfile",
    "copytree",
    "savez",
    "mkdtemp",
}
ALLOWED = {
    "cli/generate.py": {"mkdir"},  # the folder of previews, which the user names
    "files/publish.py": WRITES,
    "files/lock.py": {"mkdir", "unlink"},  # locks only save work and hold no data
    "files/cache.py": {"mkdir"},  # the cache's own folders
    "bundle/cache.py": {"mkdir"},
    "bundle/remembered.py": {"mkdir"},
    "compile/tensorrt_network.py": {"mkdir"},
    "bench/history.py": {
        "mkdir",
        "open",
    },  # a journal that processes append to under a lock, cut back where a line fails
    "bench/measure.py": {"write_text"},  # messages between two processes, in a temporary folder
    "bench/child.py": {"write_text"},
    "bench/steady_work.py": {"write_text"},
    "cli/bench.py": {"open"},  # appends to a file that belongs to the CI
    "export/selfcheck.py": {"savez"},  # into a file that the writer opened
}


def test_nothing_else_writes() -> None:
    """Every other file writes through this module."""
    for path in (ROOT / "sdrt").rglob("*.py"):
        file = path.relative_to(ROOT / "sdrt").as_posix()
        assert writes(path.read_text(encoding="utf-8")) <= ALLOWED.get(file, set()), file


def writes(source: str) -> set[str]:
    """Names of what writes that a file's source calls, and `open` where the mode does."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        modes = [
            word.value
            for word in [*node.args, *(k.value for k in node.keywords)]
            if isinstance(word, ast.Constant) and isinstance(word.value, str)
        ]
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name in WRITES and (name != "copy" or owner == "shutil"):
            found.add(name)
        if name == "open" and any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes):
            found.add("open")
    return found
