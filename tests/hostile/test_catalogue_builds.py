"""Builds as a user of a strange machine sees them: reproducible from anywhere, with full disks, small memory, few
descriptors, and stopped.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from sdrt.bundle.graphs import TEXT_ENCODER
from sdrt.errors import ResourceError
from sdrt.export import build as build_module
from sdrt.export import trace as trace_module
from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, build
from sdrt.export.graph import recipes
from sdrt.export.skeletons import skeletons
from sdrt.files.publish import cache_folder, write_file

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
    "PYTHONPATH": str(ROOT)
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No self-check, which is most of a cached build's time."""

    def check(
        recipe: object, known: object, weights: object, graphs: dict[str, Path], reference: Path, *, full: bool
    ) -> dict[str, float]:
        write_file(reference, b"not checked")
        return dict.fromkeys(graphs, 0.0)

    monkeypatch.setattr(build_module, "check", check)


@pytest.fixture(autouse=True)
def traced(small_bundle: Path) -> None:
    """The trace cache is filled."""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Reproducible


def test_the_same_bundle_from_another_place_process_and_time(
    small_checkpoint: Path, small_lora: Path, tmp_path: Path
) -> None:
    """Another folder, working folder, home, locale, time zone, hash seed, umask, file times and names of the inputs'
    folders.
    """
    inputs, out, here = tmp_path / "somewhere else", tmp_path / "out", tmp_path / "here"
    for folder in (inputs, out, here):
        folder.mkdir()
    for file in (small_checkpoint, small_lora):
        shutil.copy(file, inputs / file.name)
        os.utime(inputs / file.name, (10**9, 10**9))
    strange = {
        "HOME": str(here),
        "LC_ALL": "C",
        "TZ": "Asia/Kathmandu",
        "PYTHONHASHSEED": "7",
        "SOURCE_DATE_EPOCH": "1000000000",
        "TMPDIR": str(here),
    }
    arguments = [
        "build",
        "--checkpoint",
        "../somewhere else/small.safetensors",
        "--lora",
        "../somewhere else/lora.safetensors",
        "--output",
        "../out/x.sdrt",
        "--target",
        "onnxruntime",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "import os; os.umask(0o077); from sdrt.cli.app import app; app()", *arguments],
        cwd=here,
        env=ENVIRONMENT | strange,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    here_and_now = build(BuildOptions(small_checkpoint, (LoraOption(small_lora),), output=tmp_path / "x.sdrt"))
    first, second = contents(here_and_now.path), contents(out / "x.sdrt")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    for name, data in second.items():
        assert str(tmp_path).encode() not in data, name


def test_a_fresh_trace_is_the_cached_one(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the smallest graph: what two machines with empty caches would make of it."""
    from sdrt.export.read.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(small_checkpoint)
    checkpoint.close()
    made = recipes(checkpoint.architecture)[TEXT_ENCODER]
    cached, _ = skeletons(made)
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "empty"))
    fresh, hit = skeletons(made)
    assert not hit and fresh == cached
    assert left(tmp_path / "empty" / "locks") == []


# D: disk and memory


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_d1_a_disk_too_small_is_found_before_the_work(small_checkpoint: Path, tmp_path: Path, quick: None) -> None:
    seen = []
    with (
        small_disk(tmp_path / "disk", "size=38m") as disk,
        pytest.raises(ResourceError, match=r"needs about [\d,]+ bytes, 39,\d{3},\d{3} are free") as caught,
    ):
        build(BuildOptions(small_checkpoint, output=disk / "x.sdrt"), lambda stage, done: seen.append(stage))
    assert "x.sdrt: tokenizer" in caught.value.message and "fuse" not in seen


@pytest.mark.parametrize("size", ["1m", "8m", "10m"])
def test_d1_a_disk_that_fills_up_in_the_work(
    small_checkpoint: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """As when another process takes the room after the check."""
    monkeypatch.setattr(build_module, "check_space", lambda *_: None)
    with small_disk(tmp_path / "disk", f"size={size}") as disk:
        with pytest.raises(
            ResourceError,
            match=r"No space left on device(: weights\.safetensors needs [\d,]+ bytes)?, [\d,]+ bytes free there",
        ):
            build(BuildOptions(small_checkpoint, output=disk / "x.sdrt"))
        assert left(disk) == []


def test_d2_a_full_cache_costs_time_only(
    small_checkpoint: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is cached is traced again and not kept; here the trace itself is taken from the full cache's neighbour."""
    known = {}

    def from_memory(recipe: Any) -> Any:
        return known[recipe.graph]

    from sdrt.export.read.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(small_checkpoint)
    checkpoint.close()
    for graph, recipe in recipes(checkpoint.architecture).items():
        known[graph] = skeletons(recipe)[0]
    monkeypatch.setattr(trace_module, "trace", from_memory)
    with small_disk(tmp_path / "cache", "size=16k") as cache:
        monkeypatch.setenv("SDRT_CACHE_DIR", str(cache))
        report = build(BuildOptions(small_checkpoint, output=tmp_path / "x.sdrt"))
        assert "step" not in report.cached
        assert not [path for path in cache.rglob("*") if path.name.startswith(".")]
    assert (tmp_path / "x.sdrt" / "manifest.json").is_file()


def test_d3_no_inodes(small_checkpoint: Path, tmp_path: Path, quick: None) -> None:
    with small_disk(tmp_path / "disk", "size=200m,nr_inodes=6") as disk:
        with pytest.raises(ResourceError, match="No space left on device"):
            build(BuildOptions(small_checkpoint, output=disk / "x.sdrt"))
        assert left(disk) == []


LIMITED = """
import resource, sys
from sdrt.export import build as module
write_weights, what = module.write_weights, sys.argv.pop(1)

def limited(*arguments):
    if what == "files":
        import os
        kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (kept[-1] + 1, kept[-1] + 1))
        try:
            return write_weights(*arguments)
        finally:
            for descriptor in kept:
                os.close(descriptor)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), used + (4 << 20)))
    return write_weights(*arguments)

module.write_weights = limited
from sdrt.cli.app import app
app()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's limits")
@pytest.mark.parametrize("what", ["files", "memory"])
def test_d3_d4_too_few_descriptors_and_too_little_memory(small_checkpoint: Path, tmp_path: Path, what: str) -> None:
    arguments = ["build", "--checkpoint", small_checkpoint, "--target", "onnxruntime", "--output", tmp_path / "x.sdrt"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, what, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 6, done.stderr
    assert "Too many open files" in done.stderr if what == "files" else "out of memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes",
        "Failed to allocate memory for requested buffer",
        "std::bad_alloc",
    ],
)
def test_d4_the_words_of_torch_and_onnxruntime(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def check(*_: object, full: bool) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(build_module, "check", check)
    with pytest.raises(ResourceError, match="check text_encoder: out of memory"):
        build(BuildOptions(small_checkpoint, output=tmp_path / "x.sdrt"))
    assert left(tmp_path) == []


def test_other_errors_of_torch_are_not_memory(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: object, full: bool) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(build_module, "check", check)
    with pytest.raises(RuntimeError, match="shapes"):
        build(BuildOptions(small_checkpoint, output=tmp_path / "x.sdrt"))


# I: interrupted, and several at once


def build_command(checkpoint: Path, output: Path) -> list[str]:
    script = "from sdrt.cli.app import app; app()"
    return [
        sys.executable,
        "-c",
        script,
        "build",
        "--checkpoint",
        str(checkpoint),
        "--target",
        "onnxruntime",
        "--output",
        str(output),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_i2_stopped_twice(small_checkpoint: Path, tmp_path: Path) -> None:
    """An impatient second signal may leave the stage; nothing else, and the next build sweeps it."""
    with subprocess.Popen(
        build_command(small_checkpoint, tmp_path / "x.sdrt"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("bind step"):
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGINT)
                break
        process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGINT, -signal.SIGTERM, 1)
    assert not (tmp_path / "x.sdrt").exists()
    assert all(name.startswith(".x.sdrt-") for name in left(tmp_path))


def test_i6_two_builds_of_one_output(small_checkpoint: Path, tmp_path: Path, small_bundle: Path) -> None:
    """The second waits for the first, then finds its output; with --force it builds again."""
    command = build_command(small_checkpoint, tmp_path / "small.sdrt")
    running = [
        subprocess.Popen(
            [*command, *extra], env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        for extra in ([], ["--force"])
    ]
    said = [process.communicate(timeout=300)[1] for process in running]
    codes = [process.returncode for process in running]
    assert codes in ([0, 0], [2, 0]), said
    assert any("waiting for another build of the same output" in text for text in said)
    assert left(tmp_path) == ["small.sdrt"]
    first, second = contents(small_bundle), contents(tmp_path / "small.sdrt")
    assert [name for name in first if first[name] != second.get(name)] == []


def test_i7_a_lock_that_does_not_come_free(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdrt.errors import LockedError
    from sdrt.files.lock import locked

    monkeypatch.setenv("SDRT_LOCK_TIMEOUT", "0.1")
    with locked(tmp_path / "x.sdrt"), pytest.raises(LockedError, match=f"process {os.getpid()} is writing it"):
        build(BuildOptions(small_checkpoint, output=tmp_path / "x.sdrt"))
    assert left(tmp_path) == []


def test_i8_times_of_files_mean_nothing_to_the_cache(
    small_checkpoint: Path, small_lora: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(recipe: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(trace_module, "trace", trace)
    for entry in (cache_folder() / "graphs").iterdir():
        os.utime(entry, (10**10, 10**10))
    build(BuildOptions(small_checkpoint, (LoraOption(small_lora, 0.5, 0.5),), output=tmp_path / "x.sdrt"))


def test_eio_is_told_as_it_is(
    small_checkpoint: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match="Input/output error"):
        build(BuildOptions(small_checkpoint, output=tmp_path / "x.sdrt"))
    assert left(tmp_path) == []
