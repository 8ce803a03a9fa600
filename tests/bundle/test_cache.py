"""The bundles in the cache folder: which are listed, which are in use, and which go when there are too many."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_jobs import in_child, names
from write_faults import arm

from sdrt.bundle import cache
from sdrt.bundle.cache import Entry, entries, in_use, keep_to_limit, limit_bytes, remove, set_limit
from sdrt.errors import BundleError, InputFileError, UsageError
from sdrt.files.publish import stage_name


@pytest.fixture
def kept(small_bundle: Path, own_cache: Path) -> Path:
    """The folder of four entries; a was used last, d longest ago."""
    for i, key in enumerate(("dddd", "cccc", "bbbb", "aaaa")):
        folder = own_cache / "bundles" / key
        shutil.copytree(small_bundle, folder / f"{key[0]}.sdrt", copy_function=os.link)
        os.utime(folder, (1000 + i, 1000 + i))
    return own_cache / "bundles"


def keys() -> list[str]:
    return [entry.key for entry in entries()]


def entry(key: str) -> Entry:
    return next(one for one in entries() if one.key == key)


def test_listed_last_used_first(kept: Path, small_bundle: Path) -> None:
    assert keys() == ["aaaa", "bbbb", "cccc", "dddd"]
    first = entries()[0]
    expected = sum(path.stat().st_size for path in small_bundle.rglob("*") if path.is_file())
    assert (first.name, first.bundle, first.size_bytes) == ("a", kept / "aaaa" / "a.sdrt", expected)
    assert [(source.kind, source.name) for source in first.sources] == [("checkpoint", "small.safetensors")]
    with in_use(kept / "dddd") as bundle:
        assert bundle == kept / "dddd" / "d.sdrt"
    assert keys() == ["dddd", "aaaa", "bbbb", "cccc"]  # listing is no use
    with in_use(kept / "none") as bundle:
        assert bundle is None


def test_what_is_in_use_is_not_removed(kept: Path) -> None:
    """Neither by the process that uses it nor by another, until the use ends."""
    code = "import sys\nfrom sdrt.bundle.cache import *\nprint([e.key for e in entries() if not remove(e)])"
    with in_use(kept / "bbbb"):
        assert not remove(entry("bbbb"))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "['bbbb']"
    assert names(kept) == ["bbbb"] and remove(entry("bbbb")) and names(kept) == []


def test_the_least_recently_used_go(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size_bytes = entries()[0].size_bytes
    monkeypatch.setenv("SDRT_CACHE_LIMIT", str(2 * size_bytes + size_bytes // 2))
    assert [one.key for one in keep_to_limit()] == ["dddd", "cccc"] and keys() == ["aaaa", "bbbb"]
    monkeypatch.setenv("SDRT_CACHE_LIMIT", "0")
    with in_use(kept / "aaaa"):
        assert keep_to_limit(newest=kept / "bbbb") == [] and keys() == ["aaaa", "bbbb"]
    assert [one.key for one in keep_to_limit(newest=kept / "bbbb")] == ["aaaa"]


def test_limits(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_bytes() == cache.DEFAULT_LIMIT_BYTES
    for text, expected in (
        ("1.5GB", 1_500_000_000),
        ("500 mb", 500_000_000),
        ("123", 123),
        ("none", None),
        ("2TB", 2 * 10**12),
    ):
        set_limit(text)
        assert limit_bytes() == expected
    monkeypatch.setenv("SDRT_CACHE_LIMIT", "7KB")
    assert limit_bytes() == 7000
    for text in ("GB", "-1GB", "1 XB", "1e9", "nan", "1GB2"):
        with pytest.raises(UsageError, match="expected a size") as refused:
            set_limit(text)
        assert "20GB" in refused.value.fix
    monkeypatch.setenv("SDRT_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match="SDRT_CACHE_LIMIT 'much': expected a size"):
        limit_bytes()
    monkeypatch.delenv("SDRT_CACHE_LIMIT")
    (own_cache / "bundles.limit").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"bundles\.limit"):
        limit_bytes()


def test_damaged_ones_are_listed_and_removed(kept: Path) -> None:
    (kept / "aaaa" / "a.sdrt" / "manifest.json").unlink()
    (kept / "bbbb" / "b.sdrt" / "graphs" / "weights.safetensors").unlink()
    shutil.rmtree(kept / "cccc" / "c.sdrt")
    found = {one.key: one for one in entries()}
    assert "no manifest.json" in found["aaaa"].problem and "missing" in found["bbbb"].problem
    assert (found["cccc"].name, found["cccc"].bundle, found["cccc"].problem[-28:]) == (
        "cccc",
        None,
        "expected one bundle, found 0",
    )
    for key in ("aaaa", "bbbb", "cccc"):
        with pytest.raises((BundleError, InputFileError)), in_use(kept / key):
            raise AssertionError
        assert remove(found[key])
    assert keys() == ["dddd"]


def test_i1_a_removal_that_was_killed(kept: Path) -> None:
    """Before or after the rename: the entry is whole or gone, and what is left goes the next time anyone looks."""
    for number in (1, 2):  # the rename, and the removal of what was renamed
        found = entries()[0]

        def killed(number: int = number, found: Entry = found) -> None:
            arm(number, "kill")
            remove(found)

        assert in_child(killed) == -9
        assert (found.folder / f"{found.name}.sdrt" / "manifest.json").exists() == (number == 1)
    assert len([name for name in names(kept) if name.startswith(".aaaa-")]) == 1
    assert keys() == ["bbbb", "cccc", "dddd"] == names(kept)


def test_what_a_killed_build_left_goes(kept: Path) -> None:
    left = stage_name(kept / "eeee")
    left = left.with_name(left.name.replace(str(os.getpid()), "999999999"))
    (left / "x.sdrt").mkdir(parents=True)
    assert keys() == names(kept) == ["aaaa", "bbbb", "cccc", "dddd"]


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "none"))
    assert entries() == keep_to_limit() == [] and cache.others() == {} and names(tmp_path) == []
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "bundles").write_text("")
    with pytest.raises(UsageError, match="bundles: cannot be read: Not a directory"):
        entries()
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "none" / "bundles"))
    with pytest.raises(UsageError, match="cannot be made"):
        set_limit("1GB")


def test_the_rest_is_removed(own_cache: Path) -> None:
    (own_cache / "checked").mkdir()
    (own_cache / "checked" / "1-2").write_text("12345")
    (own_cache / "locks").mkdir()
    for link in ("graphs", "blobs"):
        (own_cache / link).unlink()
    assert cache.others() == {own_cache / "checked": 5} and cache.remove_others() == 5
    assert names(own_cache) == ["locks"]
