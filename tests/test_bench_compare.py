"""Two results judged: what counts as worse, what cannot be compared, and what bench.toml changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from bench_documents import document

from sdrt.bench.compare import DOWN, MISSING, NEW, UP, Comparison, compare
from sdrt.bench.metrics import METRICS, Gate, Gates, read_gates
from sdrt.bench.statistics import AMBIGUOUS, FASTER, SAME, SLOWER
from sdrt.errors import InputFileError


def judged(base: Any, new: Any, *, gates: Gates | None = None, interleaved: bool = True, identical: bool = False) -> tuple[Comparison, dict[str, str]]:
    comparison = compare(base, new, gates or Gates(), interleaved=interleaved, identical=identical)
    return comparison, {row.name: row.verdict for row in comparison.rows}


def test_the_same_twice_passes() -> None:
    comparison, words = judged(document(1, 10), document(2, 10))
    assert comparison.exit_code == 0
    assert {words[name] for name in ("total_ms", "step_ms", "load_ms")} == {SAME}
    assert comparison.headline == "PASSED: nothing gated has changed"


def test_slower_fails_and_faster_passes() -> None:
    comparison, words = judged(document(1, 10), document(2, 10, slower=0.10))
    assert (comparison.exit_code, words["total_ms"], words["cold_ms"]) == (1, SLOWER, SLOWER)
    assert "total_ms SLOWER" in comparison.headline and "cold_ms" not in comparison.headline  # the latter is not gated
    comparison, words = judged(document(1, 10, slower=0.10), document(2, 10))
    assert (comparison.exit_code, words["total_ms"]) == (0, FASTER)
    assert "total_ms FASTER" in comparison.headline


def test_too_noisy_to_tell_is_inconclusive_and_says_what_it_could_see() -> None:
    comparison, words = judged(document(1, 10, noise=0.15), document(2, 10, noise=0.15))
    assert (comparison.exit_code, words["total_ms"]) == (8, AMBIGUOUS)
    assert "can see changes of" in comparison.headline and "pairs would" in comparison.headline
    row = next(row for row in comparison.rows if row.name == "total_ms")
    assert row.needed is not None and row.needed > 10 and row.visible is not None and row.visible > 0.05


def test_separate_runs_need_twice_the_margin() -> None:
    base, new = document(1, 5, noise=0.005), document(2, 5, noise=0.005, slower=0.07)
    assert judged(base, new, interleaved=False)[1]["total_ms"] == SAME
    comparison, words = judged(base, document(2, 5, noise=0.005, slower=0.2), interleaved=False)
    assert words["total_ms"] == SLOWER
    assert "2 times" in comparison.notes[0]


def test_counters_are_exact() -> None:
    base, new = document(1, 10), document(2, 10)
    new["counters"]["model_calls"] += 1
    new["counters"]["bundle_bytes"] -= 1
    comparison, words = judged(base, new)
    assert (words["model_calls"], words["bundle_bytes"], words["jobs"]) == (UP, DOWN, SAME)
    assert (comparison.exit_code, comparison.failures) == (1, ["model_calls UP"])


def test_a_counter_that_began_at_zero() -> None:
    base, new = document(1, 10), document(2, 10)
    base["counters"]["h2d"] = 0
    new["counters"]["h2d"] = 3
    assert judged(base, new)[1]["h2d"] == UP
    assert judged(new, base)[1]["h2d"] == DOWN


@pytest.mark.parametrize(("part", "name"), [("samples", "cold_ms"), ("counters", "jobs")])
def test_what_vanished_fails_even_ungated_and_what_is_new_is_listed(part: str, name: str) -> None:
    base, new = document(1, 10), document(2, 10)
    del new[part][name]
    comparison, words = judged(base, new)
    assert (words[name], comparison.exit_code) == (MISSING, 1)
    comparison, words = judged(new, base)
    assert (words[name], comparison.exit_code) == (NEW, 0)


def test_identical_files_are_the_same_whatever_their_noise() -> None:
    one = document(1, 1, noise=0.5)
    comparison, words = judged(one, copy.deepcopy(one), interleaved=False, identical=True)
    assert set(words.values()) == {SAME} and comparison.exit_code == 0
    assert "identical" in comparison.notes[0]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("config", "steps", 5), ("config", "size", [64, 72]), ("engine", "backend", "openvino"), ("engine", "compute", "bf16"), ("bundle", "family", "sdxl"),
     ("env", "cpu", "another"), ("env", "gpu", "a GPU"), ("config", "scenario", "server")],
)  # fmt: skip
def test_what_is_not_comparable_is_refused_by_field(part: str, name: str, value: Any) -> None:
    new = document(2)
    new[part][name] = value
    comparison, words = judged(document(1), new)
    assert (comparison.exit_code, words) == (9, {}) and len(comparison.different) == 1
    assert comparison.different[0].startswith(f"{part}.{name}: ") and comparison.different[0].endswith(f" and {value!r}")


def test_a_library_that_was_upgraded_may_be_compared() -> None:
    new = document(2, 10)
    new["engine"]["version"] = "9.9"
    assert judged(document(1, 10), new)[0].exit_code == 0


# Fidelity


def test_a_faster_wrong_picture_is_a_failure() -> None:
    base, new = document(1, 10, slower=0.5), document(2, 10)
    new["fidelity"] |= {"ok": False, "problems": ["vae_decoder: pixels: differs"]}
    comparison, words = judged(base, new)
    assert words["total_ms"] == FASTER
    assert (comparison.exit_code, comparison.problems) == (1, ("fidelity of new: vae_decoder: pixels: differs",))


def test_a_picture_that_moved_between_runs_is_a_failure() -> None:
    base, new = document(1, 10), document(2, 10)
    new["fidelity"]["picture"]["latents_sketch"][0] += 0.2
    new["fidelity"]["picture"]["pixels_sketch"][0] += 400.0
    comparison, _ = judged(base, new)
    assert comparison.exit_code == 1
    assert "latents of seed 0 moved" in comparison.problems[0] and "dB, expected at least 40" in comparison.problems[1]
    new["bundle"]["weights"] = "c" * 64  # another model draws another picture
    assert judged(base, new)[0].exit_code == 0


def test_rounding_moves_nothing() -> None:
    base, new = document(1, 10), document(2, 10)
    new["fidelity"]["picture"]["latents_sketch"][0] += 1e-4
    new["fidelity"]["picture"]["pixels_sketch"][0] += 4.0
    assert judged(base, new)[0].exit_code == 0


def test_a_sketch_of_another_size_is_no_match() -> None:
    new = document(2, 10)
    new["fidelity"]["picture"]["latents_sketch"] = [1.0]
    new["fidelity"]["picture"]["pixels_sketch"] = []
    assert len(judged(document(1, 10), new)[0].problems) == 2


# bench.toml


def toml(folder: Path, text: str) -> Path:
    path = folder / "bench.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_bench_toml_changes_margins_and_gates(tmp_path: Path) -> None:
    gates = read_gates(toml(tmp_path, "pairs = 20\n[metrics.total_ms]\nmargin = 0.5\n[metrics.cold_ms]\ngate = true\n[counters.bundle_bytes]\nmargin = 0.1\n"))
    assert (gates.pairs, gates.metric("total_ms"), gates.metric("cold_ms")) == (20, Gate(0.5, True), Gate(0.05, True))
    assert gates.metric("step_ms") == Gate(METRICS["step_ms"].margin, True)
    assert (gates.counter("bundle_bytes"), gates.counter("anything")) == (Gate(0.1, True), Gate(0.0, True))
    new = document(2, 10, slower=0.1)
    new["counters"]["bundle_bytes"] += 100_000
    comparison, words = judged(document(1, 10), new, gates=gates)
    assert (words["total_ms"], words["bundle_bytes"]) == (SAME, SAME)
    assert "cold_ms SLOWER" in comparison.failures


@pytest.mark.parametrize(
    ("text", "fragment"),
    [("pairs = ", "TOML"), ("pairs = 0", "pairs: expected 1 to 50"), ("pairs = true", "pairs"), ("pair = 5", "pair: unknown; did you mean 'pairs'"),
     ("[metrics.total]\nmargin = 1", "metrics.total: unknown; did you mean 'total_ms'"), ("[metrics.total_ms]\nmargins = 1", "did you mean 'margin'"),
     ("[metrics.total_ms]\nmargin = 0", "above 0"), ("[metrics.total_ms]\nmargin = nan", "nan"), ("[metrics.total_ms]\nmargin = '5%'", "5%"),
     ("[metrics.total_ms]\ngate = 1", "true or false"), ("metrics = 1", "metrics: expected a table"), ("[metrics]\ntotal_ms = 1", "total_ms: expected a table"),
     ("[counters.jobs]\nmargin = -1", "from 0 to 10")],
)  # fmt: skip
def test_bad_bench_toml(tmp_path: Path, text: str, fragment: str) -> None:
    with pytest.raises(InputFileError) as caught:
        read_gates(toml(tmp_path, text))
    assert fragment in caught.value.message and "bench.toml" in caught.value.message


def test_bench_toml_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="No such file"):
        read_gates(tmp_path / "bench.toml")
