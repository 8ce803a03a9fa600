"""What a request takes in memory: the estimate against peaks that were measured, the refusal before the first step, and
what the system leaves.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.manifest import Manifest
from sdrt.cli.app import app
from sdrt.engines.shapes import JobShape
from sdrt.errors import BundleError, ResourceError, UsageError
from sdrt.machine import memory
from sdrt.runtime import Pipeline
from sdrt.runtime.backends.onnxruntime import engine as onnxruntime
from sdrt.runtime.request_memory import Demand, check_memory, onnxruntime_demand, openvino_demand, with_own

GB = 10**9
MEASURED_MB = [
    ((256, 256), 1, 2, 103),
    ((512, 256), 1, 2, 414),
    ((512, 512), 1, 2, 1664),
    ((512, 512), 1, 1, 1111),
    ((256, 256), 3, 2, 347),
]
"""Peaks of a request of two steps beside the loaded emoji model on ONNX Runtime 1.32, in fresh processes with one
thread.
"""


@pytest.fixture
def emoji(flat_bundle: Path) -> Manifest:
    return open_bundle(flat_bundle).manifest


@pytest.mark.parametrize(("size", "batch", "branches", "peak_mb"), MEASURED_MB)
def test_the_estimate_is_close_below_what_was_measured(
    emoji: Manifest, size: tuple[int, int], batch: int, branches: int, peak_mb: int
) -> None:
    """Above it would refuse what works; far below it would let through what the system ends."""
    shape = JobShape(size, batch, 77, branches)
    found = with_own(onnxruntime_demand(emoji, shape), emoji, shape, rows=2, pictures=batch).size_bytes / 1e6
    assert 0.8 * peak_mb <= found <= 1.05 * peak_mb


def test_the_size_of_stable_diffusion(emoji: Manifest) -> None:
    """512x512 with guidance on ONNX Runtime took 5.56 GB where 64x64 took 3.94, 1.62 GB more (docs/performance.md)."""
    sizes = {
        "unet": {
            "channels": [320, 640, 1280, 1280],
            "down_depth": [[1, 1], [1, 1], [1, 1], [0, 0]],
            "heads": 8,
            "head_width": None,
        },
        "vae": {"channels": [128, 256, 512, 512]},
    }
    large = replace(emoji, architecture=emoji.architecture | sizes)
    demand = onnxruntime_demand(large, JobShape((512, 512), 1, 77, 2))
    assert 1.5 * GB < demand.size_bytes < 1.7 * GB
    assert "(8 heads of 4,096 x 4,096 scores of 4 bytes, 3 times)" in demand.words


def test_what_killed_a_machine_of_24_gb_is_refused(emoji: Manifest) -> None:
    shape = JobShape((1024, 1024), 1, 77, 2)
    demand = onnxruntime_demand(emoji, shape)
    assert demand.size_bytes == 3 * 8 * 16384**2 * 4
    with pytest.raises(
        ResourceError,
        match=r"takes about 25\.77 GB, and 22\.00 GB are free: attention 25\.77 GB \(8 heads of 16,384 x 16,384 scores",
    ):
        check_memory(demand, shape, 22 * GB)
    check_memory(demand, shape, 26 * GB)
    check_memory(demand, shape, None)
    small = openvino_demand(emoji, shape, precision="bf16", step_loaded=True, decoder_loaded=False)
    assert small.size_bytes < GB / 2  # it never holds the scores
    assert (
        openvino_demand(emoji, shape, precision="fp32", step_loaded=False, decoder_loaded=False).size_bytes
        > 2 * small.size_bytes
    )


def test_the_whole_request_counts(emoji: Manifest) -> None:
    """Contexts of prompt editing in a large batch, and pictures that wait for the last one, are as much
    memory as any.
    """
    shape = JobShape((64, 64), 64, 2464, 16)
    own = with_own(Demand(0, ""), emoji, shape, contexts=8, rows=20)
    assert own.size_bytes > 8 * 64 * 16 * 2464 * 64 * 4
    assert (
        with_own(Demand(0, ""), emoji, JobShape((64, 64), 1, 77, 2), pictures=10_000).size_bytes > 10_000 * 64 * 64 * 3
    )


@pytest.mark.parametrize(
    "sizes",
    [{}, {"unet": 5}, {"unet": {"channels": [-1], "down_depth": [[1]], "heads": 8}, "vae": {"channels": [1]}}],
)
def test_a_bundle_that_says_nonsense(emoji: Manifest, sizes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"manifest\.architecture"):
        onnxruntime_demand(replace(emoji, architecture=sizes), JobShape((64, 64), 1, 77, 2))


def test_a_request_is_refused_before_it_starts(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnxruntime, "available_bytes", lambda: 100_000_000)
    monkeypatch.setattr(onnxruntime, "_kept", Demand(0, ""))
    arguments = [
        "generate",
        str(small_bundle),
        "apple",
        "--backend",
        "onnxruntime",
        "--size",
        "512x512",
        "--output",
        str(tmp_path / "a.png"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert (
        result.exit_code == 6 and "0.10 GB are free: attention" in result.stderr and "smaller --size" in result.stderr
    )
    assert not (tmp_path / "a.png").exists()
    with Pipeline.load(small_bundle, backend="onnxruntime") as pipe:
        with pytest.raises(ResourceError):
            pipe.stream("apple", size=(512, 512))
        assert pipe("apple", steps=1).images.shape == (1, 64, 64, 3)


def test_memory_that_an_earlier_picture_left_is_used_again(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime keeps what it has taken: the machine has less then, but the next picture needs no more of it."""
    monkeypatch.setattr(onnxruntime, "_kept", Demand(0, ""))
    with Pipeline.load(small_bundle, backend="onnxruntime") as pipe:
        first = pipe("apple", steps=1, size=(128, 128), seed=1)
        monkeypatch.setattr(onnxruntime, "available_bytes", lambda: 500_000)
        assert np.array_equal(pipe("apple", steps=1, size=(128, 128), seed=1).images, first.images)
        with pytest.raises(ResourceError):
            pipe("apple", steps=1, size=(256, 256))


def test_memory_bytes(small_bundle: Path) -> None:
    with Pipeline.load(small_bundle, backend="onnxruntime") as pipe:
        own = pipe.memory_bytes()
        assert 0 < own == pipe.memory_bytes((64, 64)) < pipe.memory_bytes(batch=4) < pipe.memory_bytes((256, 256), 4)
        assert own < pipe.memory_bytes(tokens=154) and pipe.memory_bytes((512, 512), branches=1) < pipe.memory_bytes(
            (512, 512)
        )
        (taken,) = pipe.shapes
        assert taken.holds(JobShape((8192, 8192), 64, 2464, 16)) and not taken.holds(
            JobShape((8192, 8192), 65, 2464, 16)
        )
        for wrong in ({"size": (63, 64)}, {"batch": 0}, {"tokens": 78}, {"tokens": 0}, {"branches": 17}):
            with pytest.raises(UsageError):
                pipe.memory_bytes(**wrong)


MEMINFO = "MemTotal: 32000 kB\nMemAvailable: 20000 kB\nSwapFree: 1000 kB\nHugePages_Total: 0\n"
GROUP_2 = {
    "memory.max": "9000000",
    "memory.current": "6000000",
    "memory.stat": "anon 4\nactive_file 1000000\ninactive_file 500000\n",
}
GROUP_1 = {
    "memory.limit_in_bytes": "9000000",
    "memory.usage_in_bytes": "6000000",
    "memory.stat": "active_file 7\ntotal_active_file 1000000\n",
}
FREE_OF_GROUP_2, FREE_OF_GROUP_1 = 4_500_000 + 1_024_000, 4_000_000 + 1_024_000
NONE_LEFT = {"memory.max": "9000000", "memory.current": "12000000", "memory.stat": ""}


@pytest.mark.parametrize(
    ("of_process", "groups", "expected"),
    [
        ("0::/\n", {}, 21000 * 1024),
        ("0::/\n", {"": GROUP_2}, FREE_OF_GROUP_2),
        ("0::/a/b\n", {"a": GROUP_2, "a/b": GROUP_2 | {"memory.max": "max"}}, FREE_OF_GROUP_2),
        ("0::/a/b\n", {"": GROUP_2}, FREE_OF_GROUP_2),  # the path is the host's, the root is the container
        ("4:memory:/box\n0::/\n", {"memory/box": GROUP_1}, FREE_OF_GROUP_1),
        (
            "4:cpu,memory:/box\n",
            {"memory": GROUP_1, "memory/box": GROUP_1 | {"memory.limit_in_bytes": "9223372036854771712"}},
            FREE_OF_GROUP_1,
        ),
        ("0::/../..\n", {"": NONE_LEFT}, 0),
        ("nonsense\n", {}, 21000 * 1024),
        (None, {}, 21000 * 1024),
    ],
)
def test_what_a_container_may_take(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_process: str | None,
    groups: dict[str, dict[str, str]],
    expected: int,
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    if of_process is not None:
        (tmp_path / "proc/self/cgroup").write_text(of_process)
    for group, files in groups.items():
        (tmp_path / "cgroup" / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "cgroup" / group / name).write_text(text)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    assert memory.available_bytes() == expected


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert memory.available_bytes() is None and memory.rss_bytes() is None
