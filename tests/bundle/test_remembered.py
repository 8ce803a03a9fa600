"""Large files are hashed once, and again as soon as anything about them has changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from threading import Event

import pytest

from sdrt.bundle import remembered as checked
from sdrt.bundle.folder import Bundle, check_files, file_record, open_bundle
from sdrt.bundle.manifest import WEIGHTS, FileRecord
from sdrt.bundle.remembered import check_file, sha256_of
from sdrt.errors import BundleError
from sdrt.files.lock import locked
from sdrt.files.publish import cache_folder
from sdrt.runtime import Pipeline, pipeline
from sdrt.runtime.engine import Engine


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read whole."""
    names: list[str] = []

    def counted(bundle: Bundle, wanted: list[str], stop: Event | None) -> None:
        names.extend(wanted)
        check_files(bundle, wanted, stop)

    monkeypatch.setattr(checked, "check_files", counted)
    return names


@pytest.fixture
def bundle(flat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A copy of a bundle whose weights look a minute old: the clock is ahead, since nothing can set a file's change
    time.
    """
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(
        "HOME", str(tmp_path)
    )  # so that the copy lies on the file system of the home folder, wherever temporary files are
    copy = tmp_path / "copy.sdrt"
    shutil.copytree(flat_bundle, copy)
    now = time.time_ns
    monkeypatch.setattr(checked.time, "time_ns", lambda: now() + 60_000_000_000)
    return open_bundle(copy)


def test_read_once(bundle: Bundle, reads: list[str]) -> None:
    for _ in range(3):
        check_file(bundle, WEIGHTS)
    assert reads == [WEIGHTS]


def test_a_changed_byte_is_seen_though_size_and_times_are_set_back(bundle: Bundle, reads: list[str]) -> None:
    check_file(bundle, WEIGHTS)
    path = bundle.file(WEIGHTS)
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size
    with pytest.raises(BundleError, match=r"weights\.safetensors: changed since the build"):
        check_file(bundle, WEIGHTS)
    with pytest.raises(BundleError, match="changed since the build"):  # and what failed is not remembered
        check_file(bundle, WEIGHTS)
    assert reads == [WEIGHTS] * 3


def test_another_file_in_its_place_is_read(bundle: Bundle, reads: list[str]) -> None:
    check_file(bundle, WEIGHTS)
    path = bundle.file(WEIGHTS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.with_name("other").write_bytes(data)
    path.with_name("other").replace(path)
    with pytest.raises(BundleError, match="changed since the build"):
        check_file(bundle, WEIGHTS)


def test_what_has_just_changed_is_not_remembered(
    bundle: Bundle, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = max(bundle.file(WEIGHTS).stat().st_mtime_ns, bundle.file(WEIGHTS).stat().st_ctime_ns)
    for clock in (newest + 1_999_000_000, newest - 5_000_000_000):  # a moment ago, and a clock that went back
        monkeypatch.setattr(checked.time, "time_ns", lambda clock=clock: clock)
        check_file(bundle, WEIGHTS)
        check_file(bundle, WEIGHTS)
    assert reads == [WEIGHTS] * 4


@pytest.mark.parametrize(
    "mount",
    [
        ("ext4", "/dev/loop7"),
        ("fuse.sshfs", "host:/x"),
        ("fuseblk", "/dev/sdb1"),
        ("nfs4", "host:/x"),
        ("cifs", "//host/x"),
        ("9p", "x"),
        ("vfat", "/dev/sdb1"),
    ],
)
def test_nothing_is_remembered_where_the_times_are_not_this_kernels(
    bundle: Bundle, reads: list[str], monkeypatch: pytest.MonkeyPatch, mount: tuple[str, str]
) -> None:
    monkeypatch.setattr(checked, "_mount", lambda path: mount)
    check_file(bundle, WEIGHTS)
    check_file(bundle, WEIGHTS)
    assert reads == [WEIGHTS] * 2


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
def test_another_disk_is_read_at_every_start(bundle: Bundle, reads: list[str]) -> None:
    """It may be swapped for one of the same device number whose file has the same inode, size and times."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        copy = open_bundle(Path(shutil.copytree(bundle.path, Path(folder) / "copy.sdrt")))
        if copy.path.stat().st_dev in (Path("/").stat().st_dev, bundle.path.stat().st_dev):
            pytest.skip("no other file system")
        check_file(copy, WEIGHTS)
        check_file(copy, WEIGHTS)
    assert reads == [WEIGHTS] * 2


def test_nothing_is_remembered_beyond_a_start_of_the_system(
    bundle: Bundle, reads: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_file(bundle, WEIGHTS)
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(checked, "_BOOT", boot)
    check_file(bundle, WEIGHTS)
    check_file(bundle, WEIGHTS)
    boot.unlink()
    check_file(bundle, WEIGHTS)
    assert reads == [WEIGHTS] * 3


def test_a_user_without_a_home(bundle: Bundle, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a number: nothing is remembered or locked, and everything works."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SDRT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(OSError, match=r"set \$SDRT_CACHE_DIR"):
        cache_folder()
    check_file(bundle, WEIGHTS)
    check_file(bundle, WEIGHTS)
    with locked(bundle.path):
        pass
    assert reads == [WEIGHTS] * 2


def test_a_file_that_is_gone(bundle: Bundle) -> None:
    bundle.file(WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"weights\.safetensors: cannot be read: No such file"):
        check_file(bundle, WEIGHTS)


def test_a_damaged_or_unwritable_memory_only_costs_time(
    bundle: Bundle, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_file(bundle, WEIGHTS)
    (entry,) = (tmp_path / "cache" / "checked").iterdir()
    entry.write_bytes(b"\xff\x00")
    check_file(bundle, WEIGHTS)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "file"))
    check_file(bundle, WEIGHTS)
    assert reads == [WEIGHTS] * 3


def test_an_interrupted_start_does_not_hash_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the engine loads. The weights are a file of 1 TB, most of it a hole, that takes half an hour to
    hash.
    """
    os.truncate(bundle.file(WEIGHTS), 1 << 40)

    def interrupted(*arguments: object, **options: object) -> Engine:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "open_bundle", lambda path: bundle)  # opened before the file grew
    monkeypatch.setattr(pipeline, "load_engine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Pipeline.load(bundle.path)


def test_the_hash_of_any_file(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once; and again when another file of the same size and times, as far as they can be set, has its name."""
    path, other, read = tmp_path / "model.safetensors", tmp_path / "other", list[str]()
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    for file in (path, other):
        os.utime(file, ns=(10**18, 10**18))

    def found() -> str:
        return sha256_of(path, lambda: read.append(path.name))

    assert [found(), found(), *read] == [hashlib.sha256(b"one").hexdigest()] * 2 + [path.name]
    other.replace(path)
    assert [found(), found(), *read] == [hashlib.sha256(b"two").hexdigest()] * 2 + [path.name] * 2
    monkeypatch.setattr(checked, "_mount", lambda path: ("nfs4", "host:/x"))
    assert (found(), len(read)) == (hashlib.sha256(b"two").hexdigest(), 3)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        found()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"one")

    def changed(path: Path) -> FileRecord:
        record = file_record(path)
        path.write_bytes(b"two")
        return record

    with monkeypatch.context() as patch:
        patch.setattr(checked, "file_record", changed)
        assert sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    assert sha256_of(path) == hashlib.sha256(b"two").hexdigest()
