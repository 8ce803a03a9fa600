"""The arithmetic of `benchmarks/peers/race.py` and `benchmarks/studies/cost.py` on made-up figures. No peer is
installed or run.
"""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("peers", "studies"):
        monkeypatch.syspath_prepend(BENCHMARKS / folder)


def figures(scale: float, text: float | None = 1.0) -> dict[str, Any]:
    return {
        "step_ms": 10 * scale,
        "decode_ms": 20 * scale,
        "text_ms": text,
        "cold_ms": 500 * scale,
        "peak_rss_mb": 300.0,
    }


def made_report() -> dict[str, Any]:
    import report as peer_report

    drift = (1.0, 3.0, 0.5, 2.0)  # the machine's speed, the same for both rows of a round
    samples = {"ours": [figures(d) for d in drift], "theirs": [figures(2 * d, None) for d in drift], "gone": [None] * 4}
    grey = np.full((2, 2, 3), 100, np.uint8)
    settings = {"size": "emoji", "picture": (64, 64), "steps": 4, "cfg": 3.0, "threads": 2}
    pictures = {"ours": grey, "theirs": grey + np.uint8(1)}
    bases = {"ours": "ours", "theirs": "ours", "gone": "ours"}
    return peer_report.report(
        settings,
        bases,
        samples,
        {},
        pictures,
        {"ours": 300.0, "theirs": 900.0},
        {"gone": "exit code 1: no wheel"},
        "ours",
    )


def test_ratios_are_of_processes_of_one_round() -> None:
    row = made_report()["rows"]["theirs"]
    assert row["measures"]["step_ms"] == {
        "median": 30.0,
        "ratio": pytest.approx(2),
        "low": pytest.approx(2),
        "high": pytest.approx(2),
        "pairs": 4,
    }
    assert row["measures"]["peak_rss_mb"]["ratio"] == 1
    assert row["measures"]["text_ms"]["median"] is None
    assert row["install_ratio"] == 3
    assert row["psnr_db"] == pytest.approx(20 * math.log10(255))


def test_the_table_says_what_is_missing() -> None:
    import report as peer_report

    text = peer_report.markdown(made_report())
    assert "| theirs | 30.0 2.00x [2.00, 2.00] |" in text
    assert "not told" in text
    assert "- gone: exit code 1: no wheel" in text
    assert "48.1 dB" in text


def test_reading_files(tmp_path: Path) -> None:
    from race import read_files

    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    (tmp_path / "model" / "deep" / "weights").write_bytes(bytes(2**24 + 5))
    assert read_files(tmp_path / "model") == 2**24 + 7
    assert read_files(tmp_path / "model" / "config.json") == 2
    assert read_files(tmp_path / "no cache yet") == 0


def test_all_files_of_a_row_are_read_before_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And before its clock starts."""
    import race as peers

    read: list[Path] = []
    now = [100.0]

    def reading(path: Path) -> int:
        read.append(path)
        now[0] += 10
        return 0

    def process(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert json.loads(words[2])["started_s"] == now[0] == 100.0 + 10 * len(read)
        Path(words[3]).write_text("{}", encoding="utf-8")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(peers, "read_files", reading)
    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(peers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    race = peers.Race(tmp_path / "race", tmp_path / "venvs", "emoji", 2, 2)
    race.sample(peers.BFLOAT16, tmp_path / "model", "000")
    caches = race.folder / "caches" / "sdrt-openvino-bfloat16"
    assert read == [tmp_path / "venvs" / "sdrt-openvino", tmp_path / "model", caches, peers.ROOT / "sdrt"]
    assert (race.samples / "sdrt-openvino-bfloat16-000.json").exists()


def test_cost_model_finds_the_terms_it_was_made_from() -> None:
    from cost import Point, fitted

    points = []
    for side in (256, 384, 512, 768):
        for batch in (1, 2, 4):
            pixels = (side // 8) ** 2
            step = 5 + batch * pixels / 1e3 * 40 + batch * (pixels / 1e3) ** 2 * 3
            points.append(Point(side, batch, pixels, step, 0.0, 0.0, 0.0, []))
    exact, linear = fitted(points, attention=True), fitted(points, attention=False)
    assert list(exact.terms.values()) == pytest.approx([5, 40, 3])
    assert exact.error < 1e-9 and exact.left_out_error is not None and exact.left_out_error < 1e-9
    assert linear.error > 0.01
    assert min(linear.terms.values()) >= 0
