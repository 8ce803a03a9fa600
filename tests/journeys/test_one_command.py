"""From a checkpoint and a LoRA, as they were downloaded, to pictures with one command; also when two people type it at
once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKPOINT, LORA
from fault_runs import ENVIRONMENT
from faulty_jobs import names

from sdrt.bundle.cache import entries


def started(folder: Path, cache: Path) -> subprocess.Popen[str]:
    """The command, in a process of its own."""
    command = ["generate", str(CHECKPOINT), "red apple", "--lora", f"{LORA}:0.5", "--clip-skip", "2", "--json"]
    more = ["--cfg", "3", "--steps", "3", "--seed", "7", "--backend", "onnxruntime"]
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "sdrt", *command, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=ENVIRONMENT | {"SDRT_CACHE_DIR": str(cache)},
    )


def until(process: subprocess.Popen[str], stage: str) -> None:
    """Read what a process says until it says this."""
    assert process.stderr is not None
    said = [line for line in iter(process.stderr.readline, f"{stage} …\n") if line or pytest.fail("ended early")]
    assert not any(line.startswith("error") for line in said), said


def test_i6_two_at_once(own_cache: Path, tmp_path: Path) -> None:
    """One builds, the other waits and takes what was built."""
    first = started(tmp_path / "a", own_cache)
    until(first, "fuse")
    second = started(tmp_path / "b", own_cache)
    until(second, "waiting for another build of the same bundle")
    done = [process.communicate(timeout=500) for process in (first, second)]
    assert first.returncode == second.returncode == 0, done
    reports = [json.loads(out) for out, _ in done]
    assert "built emoji+blindbox (" in done[0][1] and "built" not in done[1][1]
    assert reports[0]["bundle"] == reports[1]["bundle"] == str(entries()[0].bundle)
    pictures = [(tmp_path / name / "emoji+blindbox-7.png").read_bytes() for name in ("a", "b")]
    assert pictures[0] == pictures[1]
    assert names(own_cache / "bundles") == [entries()[0].key]


def test_i1_one_is_killed(own_cache: Path, tmp_path: Path) -> None:
    """The one that waits builds then, and nothing of the other stays."""
    first = started(tmp_path / "a", own_cache)
    until(first, "fuse")
    second = started(tmp_path / "b", own_cache)
    until(second, "waiting for another build of the same bundle")
    first.kill()
    first.communicate(timeout=60)
    out, said = second.communicate(timeout=500)
    assert second.returncode == 0, said
    assert "built emoji+blindbox (" in said and json.loads(out)["parameters"]["clip_skip"] == 2
    assert [path.name for path in (own_cache / "bundles").iterdir()] == [entries()[0].key]
