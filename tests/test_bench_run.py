"""Measuring: instruments on a fake engine with a clock of its own, scenarios, interleaved runs of known costs, and what a process may die of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_documents import IDENTITY, answer, synthetic_measure

from sdrt.bench import child, measure
from sdrt.bench.child import in_fresh_process
from sdrt.bench.compare import Comparison
from sdrt.bench.instruments import Readings, TimedEngine, instrumented
from sdrt.bench.measure import Request
from sdrt.bench.metrics import Gates
from sdrt.bench.result import assemble
from sdrt.bench.run import interleave, run
from sdrt.bench.scenarios import attained_rate, poisson_arrivals, repeat, serve, warm_up
from sdrt.bench.statistics import SAME, SLOWER
from sdrt.bundle import Bundle, open_bundle
from sdrt.errors import BundleError, InputFileError, MachineError, ResourceError, UsageError

MS = 1_000_000


class FakeTime:
    """A clock that only moves when somebody sleeps."""

    def __init__(self) -> None:
        self.ns = 0

    def __call__(self) -> int:
        return self.ns

    def seconds(self) -> float:
        return self.ns / 1e9

    def sleep(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)


class FakeEngine:
    """An engine of known cost: `step_ms` per model call, and fixed times for everything else."""

    backend = "fake"

    def __init__(self, time: FakeTime, step_ms: float) -> None:
        self.time, self.step_ms, self.extra = time, step_ms, "untouched"

    def encode_text(self, *_: Any) -> str:
        self.time.sleep(0.003)
        return "context"

    def denoise(self, _: Any) -> Any:
        self.time.sleep(0.002)
        return SimpleNamespace(
            step=lambda: self.time.sleep(self.step_ms / 1e3), latents=lambda: self.time.sleep(0.001) or np.zeros(3), denoised=lambda: self.time.sleep(0.001),
            decode=lambda rounding: self.decode(None, rounding), close=lambda: None,
        )  # fmt: skip

    def decode(self, *_: Any) -> str:
        self.time.sleep(0.004)
        return "pixels"

    def describe(self) -> dict[str, Any]:
        return {"backend": "fake", "device": "cpu", "compute": "fp32"}


class FakePipe:
    """A pipeline that spends 5 ms on the host and asks the engine for everything else."""

    def __init__(self, engine: Any, time: FakeTime) -> None:
        self.engine, self.time, self.prompts = engine, time, list[str]()

    def __call__(self, prompt: str, *, steps: int, **_: Any) -> Any:
        self.prompts.append(prompt)
        self.time.sleep(0.005)
        self.engine.encode_text(None)
        denoising = self.engine.denoise(None)
        for _index in range(steps):
            denoising.step()
        denoising.decode(0.5)
        return SimpleNamespace(timings_ms={}, engine=self.engine.describe(), parameters={})


def sampled(step_ms: float, pictures: int = 4) -> measure._Sampler:
    time = FakeTime()
    readings = Readings(clock=time)
    pipe: Any = FakePipe(TimedEngine(FakeEngine(time, step_ms), readings), time)
    sampler = measure._Sampler(pipe, readings, Request("fake", steps=10))
    for _ in range(pictures):
        sampler.picture(keep=True)
    for steps in (2, 5):
        sampler.picture(steps=steps)
    return sampler


# Instruments


def test_every_part_is_timed_at_the_engines_boundary() -> None:
    samples = sampled(7.0).samples
    assert samples["total_ms"] == [pytest.approx(5 + 3 + 2 + 70 + 4)] * 4
    assert samples["step_ms"] == [pytest.approx(7.0)] * 40
    assert (samples["text_encoder_ms"][0], samples["decode_ms"][0], samples["copies_ms"][0], samples["host_ms"][0]) == pytest.approx((3, 4, 2, 5))
    assert "tokenise_ms" not in samples  # nothing was tokenised, so there is no sample of it


def test_calls_are_counted_and_other_attributes_passed_on() -> None:
    time = FakeTime()
    readings = Readings(clock=time, keep=True)
    engine = TimedEngine(FakeEngine(time, 1.0), readings)
    denoising = engine.denoise("job")
    denoising.step()
    denoising.latents()
    denoising.decode(0.5)
    assert readings.calls == Counter({"jobs": 1, "latents_copies": 1, "decode_calls": 1})  # the latents kept for us are not counted
    assert readings.kept["job"] == "job" and "latents" in readings.kept
    assert (engine.extra, engine.backend, engine.describe()["compute"]) == ("untouched", "fake", "fp32")
    readings.reset()
    assert (readings.inside, readings.steps, readings.calls) == (0, [], Counter())


def test_every_call_has_a_prompt_of_its_own_unless_it_must_not() -> None:
    time = FakeTime()
    readings = Readings(clock=time)
    pipe: Any = FakePipe(TimedEngine(FakeEngine(time, 1.0), readings), time)
    sampler = measure._Sampler(pipe, readings, Request("fake", prompt="fox"))
    for same in (False, True, False, True):
        sampler.picture(same=same)
    sampler._request = Request("fake", prompt="fox", prompts=("sun", "cat"))  # several take turns
    for same in (False, False, True):
        sampler.picture(same=same)
    assert pipe.prompts == ["fox, 1", "fox", "fox, 3", "fox", "sun, 5", "cat, 6", "sun"]


def test_the_fit_of_a_fake_engine() -> None:
    """5 + 3 + 2 + 4 ms fixed, 7 ms a call."""
    sampler = sampled(7.0)
    made = answer(np.random.default_rng(0)) | {"samples": sampler.samples, "fit": sampler.points}
    fit = assemble([made], IDENTITY, [])["fit"]
    assert (fit["fixed_ms"], fit["per_call_ms"], fit["residual_ms"]) == pytest.approx((14.0, 7.0, 0.0), abs=1e-9)
    assert fit["calls"] == [2, 5, 10]


def test_instruments_are_taken_away_again(flat_bundle: Path) -> None:
    """A real pipeline, loaded within the block, is timed; the classes are as they were afterwards."""
    from sdrt.runtime import Pipeline, pipeline, tokenizer

    before = (vars(pipeline)["load_engine"], dict(vars(tokenizer.Tokenizer)))
    readings = Readings()
    with instrumented(readings), Pipeline.load(flat_bundle, threads=1) as pipe:
        pipe("red apple", steps=3, cfg=3, seed=0)
        assert readings.calls == {"text_encoder_calls": 1, "jobs": 1, "decode_calls": 1}
        assert len(readings.steps) == 3 and min(readings.steps) > 0
        assert readings.tokenise > 0 and readings.engine_load > 0
        assert readings.inside == sum(readings.steps) + readings.text_encoder + readings.copies + readings.decode
    assert (vars(pipeline)["load_engine"], dict(vars(tokenizer.Tokenizer))) == before


# Scenarios


def test_warm_up_ends_once_three_medians_agree() -> None:
    time, cost = FakeTime(), iter([9.0, 8, 7, 5, 5.2, 4.9, 5.05, 5, 5, 5, 5.02, 5, 1, 1, 1])

    def picture() -> float:
        time.sleep(seconds := next(cost))
        return seconds

    done = warm_up(picture, limit_s=1000, now=time.seconds)
    assert done.stable and done.pictures == 12
    assert done.seconds == pytest.approx(9 + 8 + 7 + 5 + 5.2 + 4.9 + 5.05 + 5 + 5 + 5 + 5.02 + 5)


def test_warm_up_that_never_settles_ends_at_its_limit() -> None:
    time, random = FakeTime(), np.random.default_rng(0)

    def picture() -> float:
        time.sleep(seconds := float(random.uniform(0.5, 2)))
        return seconds

    done = warm_up(picture, limit_s=30, now=time.seconds)
    assert not done.stable and 30 <= done.seconds < 32


def test_repeating_stops_at_its_limit_but_makes_one() -> None:
    time = FakeTime()
    made = 0
    for _ in repeat(100, limit_s=2.5, now=time.seconds):
        time.sleep(1)
        made += 1
    assert made == 3
    assert list(repeat(5, limit_s=0, now=time.seconds)) == [0]
    assert list(repeat(5, limit_s=1, now=time.seconds)) == [0, 1, 2, 3, 4]


def test_poisson_arrivals_have_the_rate_and_its_spread() -> None:
    counts = [len(poisson_arrivals(2.0, 50, seed)) for seed in range(200)]
    assert np.mean(counts) == pytest.approx(100, abs=3)
    assert np.var(counts) == pytest.approx(100, rel=0.3)  # the variance of a Poisson count is its mean
    times = poisson_arrivals(2.0, 50, 1)
    assert times == sorted(times) == poisson_arrivals(2.0, 50, 1) and times[0] > 0 and times[-1] < 50


def test_a_server_by_hand() -> None:
    """Pictures take 1 s, one may wait: of four that come while the first is made, one waits and three are rejected."""
    time = FakeTime()
    requests = serve([0.5, 0.6, 0.7, 0.8, 0.9, 5.0], lambda: time.sleep(1), queue=1, now=time.seconds, sleep=time.sleep)
    assert [(r.arrived, r.started, r.ended) for r in requests] == [
        (0.5, 0.5, 1.5), (0.6, 1.5, 2.5), (0.7, None, None), (0.8, None, None), (0.9, None, None), (5.0, 5.0, 6.0),
    ]  # fmt: skip
    assert attained_rate(requests) == pytest.approx(3 / 5.5)
    assert attained_rate(serve([], lambda: None, queue=1, now=time.seconds, sleep=time.sleep)) == 0.0


def test_a_server_without_a_queue_takes_only_who_finds_it_free() -> None:
    time = FakeTime()
    requests = serve([0.0, 0.5, 1.0, 1.2], lambda: time.sleep(0.9), queue=0, now=time.seconds, sleep=time.sleep)
    assert [r.started for r in requests] == [0.0, None, 1.0, None]


def test_queueing_is_that_of_theory() -> None:
    """M/D/1 at a load of 0.5: the mean wait is rho / (2 (1 - rho)) services (Pollaczek and Khinchine)."""
    time = FakeTime()
    requests = serve(poisson_arrivals(0.5, 40_000, 3), lambda: time.sleep(1), queue=10_000, now=time.seconds, sleep=time.sleep)
    waits = [r.started - r.arrived for r in requests if r.started is not None]
    assert len(waits) == len(requests) and np.mean(waits) == pytest.approx(0.5, rel=0.05)


def test_the_server_scenario_reports_what_it_attained(monkeypatch: pytest.MonkeyPatch) -> None:
    time = FakeTime()
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=time.seconds, sleep=time.sleep))
    readings = Readings(clock=time)
    pipe: Any = FakePipe(TimedEngine(FakeEngine(time, 10.0), readings), time)
    request = Request("fake", steps=20, rate=6.0, duration_s=30, queue=2)  # 0.214 s a picture: more than it can serve
    found = measure._serve(request, measure._Sampler(pipe, readings, request))
    assert found["completed"] + found["rejected"] == found["arrivals"] and found["rejected"] > 0
    assert found["attained_per_s"] < 1 / 0.214 < found["offered_per_s"]
    assert max(found["samples"]["queue_ms"]) <= 3 * 214
    document = assemble([answer(np.random.default_rng(0)) | {"server": found}], IDENTITY, [])
    assert document["server"]["rejected"] == found["rejected"]


# Interleaved runs


@pytest.fixture(scope="module")
def bundle(flat_bundle: Path) -> Bundle:
    return open_bundle(flat_bundle)


def ab(bundle: Bundle, seed: int, slower: float, *, noise: float = 0.01, max_s: float = 1e9, pairs: int = 10, said: list[str] | None = None) -> Comparison:
    sides = [(bundle, Request("old.sdrt")), (bundle, Request("new.sdrt"))]
    made = synthetic_measure(seed, {"old.sdrt": 0.0, "new.sdrt": slower}, noise)
    return interleave(*sides, Gates(pairs=pairs), (said if said is not None else []).append, max_s=max_s, measure=made)  # type: ignore[arg-type]


def test_ten_per_cent_slower_fails_and_the_same_passes(bundle: Bundle) -> None:
    failed = ab(bundle, 1, 0.10)
    words = {row.name: row.verdict for row in failed.rows}
    assert (failed.exit_code, words["total_ms"], words["step_ms"]) == (1, SLOWER, SLOWER)
    passed = ab(bundle, 2, 0.0)
    assert passed.exit_code == 0 and {row.verdict for row in passed.rows} == {SAME}


def test_a_fake_engine_that_sleeps_ten_per_cent_longer_fails(bundle: Bundle) -> None:
    """The whole way from an engine's sleep to the exit code, on a clock that only it moves, with 1 % of noise per process."""
    random = np.random.default_rng(3)

    def verdict(new_ms: float) -> int:
        def made(request: Request) -> Mapping[str, Any]:
            sampler = sampled((new_ms if request.bundle == "new" else 10.0) * float(np.exp(random.normal(0, 0.01))))
            return answer(random) | {"samples": sampler.samples, "fit": sampler.points}

        sides = [(bundle, Request("old")), (bundle, Request("new"))]
        return interleave(*sides, Gates(), lambda _: None, max_s=0, measure=made).exit_code  # type: ignore[arg-type]

    assert (verdict(11.0), verdict(10.0)) == (1, 0)


def test_runs_interleave_a_b_b_a(bundle: Bundle) -> None:
    said: list[str] = []
    ab(bundle, 3, 0.0, pairs=4, max_s=0, said=said)
    assert [text.rpartition(" ")[2] for text in said] == ["old", "new", "new", "old", "old", "new", "new", "old"]


def test_ambiguous_makes_the_pairs_it_needs_once_if_time_allows(bundle: Bundle) -> None:
    said: list[str] = []
    first = ab(bundle, 4, 0.0, noise=0.04, max_s=0, said=said)
    assert first.exit_code == 8 and len(said) == 20
    said.clear()
    second = ab(bundle, 4, 0.0, noise=0.04, said=said)
    assert len(said) > 20
    assert len(second.base["samples"]["total_ms"]) == len(said) // 2


def test_the_same_at_three_per_cent_noise_seldom_alarms_even_when_it_may_look_twice(bundle: Bundle) -> None:
    alarms = sum(bool(ab(bundle, seed, 0.0, noise=0.03, pairs=10).failures) for seed in range(100, 130))
    assert alarms <= 1


def test_a_run_of_one_process(bundle: Bundle) -> None:
    said: list[str] = []
    made = run(bundle, Request("old.sdrt"), 1, said.append, synthetic_measure(5, {"old.sdrt": 0.0}))
    assert said == ["process 1 of 1"]
    assert made["stats"]["total_ms"]["ci95"] is None and made["noise"]["detectable"] is None
    assert made["bundle"]["sha256"] != made["bundle"]["weights"] and "hostname" not in json.dumps(made)


def test_layers_are_profiled_in_the_first_process_only(bundle: Bundle) -> None:
    asked: list[Request] = []

    def made(request: Request) -> Mapping[str, Any]:
        asked.append(request)
        return answer(np.random.default_rng(0))

    run(bundle, Request("x", layers=True), 3, lambda _: None, made)
    assert [(request.process, request.layers) for request in asked] == [(0, True), (1, False), (2, False)]


def test_layers_of_a_backend_without_a_profile_are_refused_after_the_first_picture() -> None:
    time = FakeTime()
    readings = Readings(clock=time)
    pipe: Any = FakePipe(TimedEngine(FakeEngine(time, 1.0), readings), time)
    request = Request("fake", layers=True)
    sampler = measure._Sampler(pipe, readings, request)
    sampler.picture()
    with pytest.raises(MachineError, match="--layers: not available yet for fake"):
        measure._sustained(request, pipe, readings, sampler, {}, [])
    assert len(pipe.prompts) == 1


# The measuring process


def test_a_child_that_dies_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for script, kind, text in (
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "out of memory"),
        ("import os; os.abort()", MachineError, "signal 6"),
        ("import sys; print('first'); sys.exit('the last words')", MachineError, "exit code 1: the last words"),
        ("import os; os._exit(3)", MachineError, "exit code 3"),
    ):
        monkeypatch.setattr(child, "_COMMAND", script)
        with pytest.raises(kind, match=text) as caught:
            in_fresh_process(Request("toy.sdrt"))
        assert "toy.sdrt" in str(caught.value)


def test_errors_of_a_child_keep_their_kind(flat_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no such bundle"):
        in_fresh_process(Request(str(tmp_path / "none.sdrt")))
    with pytest.raises(UsageError, match="sampler"):
        in_fresh_process(Request(str(flat_bundle), sampler="eulr", pictures=1, warm_up_s=0.1))


def test_a_changed_bundle_is_not_measured(flat_bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(flat_bundle, tmp_path / "changed.sdrt"))
    file = copy / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"b"', 1))
    with pytest.raises(BundleError, match="changed since the build"):
        in_fresh_process(Request(str(copy)))


def test_requests_and_answers_travel_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version's fields are ignored; errors become part of the answer."""
    asked: list[Request] = []

    def fail(request: Request) -> Any:
        asked.append(request)
        raise UsageError("steps 0: expected 1 to 1000", "Choose more.")

    monkeypatch.setattr(measure, "measure", fail)
    monkeypatch.setattr("sys.argv", ["-c", str(tmp_path / "request"), str(tmp_path / "answer")])
    (tmp_path / "request").write_text(json.dumps(asdict(Request("x", size=(64, 72), prompts=("sun", "cat"))) | {"of the future": 1}))
    measure.serve()
    assert asked == [Request("x", size=(64, 72), prompts=("sun", "cat"))]
    assert json.loads((tmp_path / "answer").read_text()) == {
        "error": {"kind": "UsageError", "message": "steps 0: expected 1 to 1000", "fix": "Choose more."}
    } | {"understood": sorted(asdict(Request("x")))}


def test_another_interpreter_finds_its_own_modules(tmp_path: Path) -> None:
    """`--old-python` starts what it is given, and does not show it our modules."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nprintf \'{"path": "%s"}\' "$PYTHONPATH" > "$5"\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "theirs")
        assert in_fresh_process(Request("toy.sdrt", python=str(script))) == {"path": "theirs"}


def test_an_older_version_that_ignores_prompts_is_not_believed(tmp_path: Path) -> None:
    """It would have measured another prompt than the other side."""
    script = tmp_path / "python"
    for answered, fails in (("{}", True), ('{"understood": ["prompts"]}', False)):
        script.write_text(f"#!/bin/sh\necho '{answered}' > \"$5\"\n")
        script.chmod(0o755)
        request = Request("toy.sdrt", python=str(script), prompts=("sun", "cat"))
        if fails:
            with pytest.raises(MachineError, match="the sdrt there does not know --prompts and measured without it"):
                in_fresh_process(request)
            assert in_fresh_process(replace(request, prompts=())) == {}
        else:
            assert in_fresh_process(request) == {"understood": ["prompts"]}
