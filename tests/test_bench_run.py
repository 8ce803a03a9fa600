"""Measuring: instruments on a fake engine with a clock of its own, scenarios, interleaved runs of known costs, history, and what a process may die of."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_documents import COUNTERS, IDENTITY, answer, document, synthetic_measure

from sdrt.bench import history, measure
from sdrt.bench import run as bench_run
from sdrt.bench.compare import Comparison
from sdrt.bench.instruments import Readings, TimedEngine, instrumented
from sdrt.bench.layers import analyse, machine_peak, matrix_flops
from sdrt.bench.measure import Request
from sdrt.bench.metrics import Gates
from sdrt.bench.result import SCHEMA, assemble, read_result, write_json
from sdrt.bench.run import in_fresh_process, interleave, run
from sdrt.bench.scenarios import attained_rate, poisson_arrivals, repeat, serve, warm_up
from sdrt.bench.statistics import SAME, SLOWER
from sdrt.bundle import Bundle, open_bundle
from sdrt.errors import BundleError, InputFileError, LockedError, MachineError, ResourceError, UsageError

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
    assert pipe.prompts == ["fox, 1", "fox", "fox, 3", "fox"]


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


def test_samples_that_are_no_durations_are_dropped_and_counted() -> None:
    made = answer(np.random.default_rng(0))
    made["samples"]["total_ms"] += [float("nan"), -1.0]
    document = assemble([made, answer(np.random.default_rng(1))], IDENTITY, [])
    assert document["warnings"] == ["total_ms: 2 samples dropped: not a number, or negative because a clock went back"]
    assert document["stats"]["total_ms"]["n"] == 10


def test_a_counter_that_differs_between_processes_is_left_out_aloud() -> None:
    answers = [answer(np.random.default_rng(0)) | {"counters": COUNTERS | {"jobs": jobs}} for jobs in (1, 2)]
    document = assemble(answers, IDENTITY, [])
    assert "jobs" not in document["counters"] and "counter jobs: differs" in document["warnings"][0]


# The measuring process


def test_a_child_that_dies_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for script, kind, text in (
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "out of memory"),
        ("import os; os.abort()", MachineError, "signal 6"),
        ("import sys; print('first'); sys.exit('the last words')", MachineError, "exit code 1: the last words"),
        ("import os; os._exit(3)", MachineError, "exit code 3"),
    ):
        monkeypatch.setattr(bench_run, "_COMMAND", script)
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


# Results and history


def test_results_are_read_back_and_unknown_fields_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", document(1) | {"of the future": [1]})
    found, digest = read_result(tmp_path / "a.json")
    assert found["of the future"] == [1] and found["samples"] == document(1)["samples"] and found["stats"] == document(1)["stats"] and len(digest) == 64


@pytest.mark.parametrize(
    ("change", "kind", "fragment"),
    [({"schema": SCHEMA + 1}, MachineError, "this sdrt reads schema 1"), ({"schema": 0}, InputFileError, "schema: expected 1, found 0"),
     ({"schema": True}, InputFileError, "found True"), ({"samples": []}, InputFileError, "samples: expected an object, found list"),
     ({"samples": {"total_ms": [1.0]}}, InputFileError, "samples.total_ms: expected a list of numbers per process"),
     ({"samples": {"total_ms": [[]]}}, InputFileError, "no sample in it"), ({"samples": {"total_ms": [["1"]]}}, InputFileError, "samples.total_ms"),
     ({"counters": {"jobs": 1.5}}, InputFileError, "counters.jobs: expected a whole number"), ({"config": {}}, InputFileError, "config.scenario: missing"),
     ({"fidelity": {}}, InputFileError, "fidelity.ok"), ({"id": 5}, InputFileError, "id: expected text, found int"),
     ({"fidelity": {"ok": True, "picture": {"values": 1}}}, InputFileError, "fidelity.picture")],
)  # fmt: skip
def test_bad_results(tmp_path: Path, change: dict[str, Any], kind: type[Exception], fragment: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document(1) | change), encoding="utf-8")
    with pytest.raises(kind) as caught:
        read_result(path)
    assert fragment in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": NaN}', "{", "\x00", "[" * 100_000, '"text"'])
def test_results_that_are_no_json_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputFileError, match=r"a\.json"):
        read_result(path)
    with pytest.raises(InputFileError, match="cannot be read"):
        read_result(tmp_path / "none.json")


def test_history_keeps_runs_and_draws_a_fence_after_ten(tmp_path: Path) -> None:
    for seed in range(11):
        history.append(tmp_path / "runs", document(seed, 3))
    (trend,) = (trend for trend in history.trends(history.read(tmp_path / "runs")) if trend.name == "total_ms")
    assert len(trend.values) == 11 and trend.limit is not None and not trend.outside
    history.append(tmp_path / "runs", document(20, 3, slower=0.5))
    other = document(21, 3)
    other["config"]["steps"] = 30  # another line: never compared with the others
    history.append(tmp_path / "runs", other)
    found = [trend for trend in history.trends(history.read(tmp_path / "runs")) if trend.name == "total_ms"]
    assert [(len(trend.values), trend.outside) for trend in found] == [(12, True), (1, False)]


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    def write(first: int) -> None:
        for index in range(20):
            history.append(tmp_path, document(0, 1) | {"id": f"{first + index:032x}"})

    threads = [threading.Thread(target=write, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = history.read(tmp_path)
    assert len(runs) == 80 and len({record["id"] for record in runs}) == 80


def test_a_lock_that_is_held_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_LOCK_S", 0.05)
    with history._locked(tmp_path / history._LOCK), pytest.raises(LockedError, match="held by another process"):
        history.append(tmp_path, document(0, 1))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Writing stops half-way through a line."""
    real = os.write
    left = [100]

    def write(descriptor: int, data: bytes) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: left[0]]
        left[0] -= len(part)
        return real(descriptor, part)

    monkeypatch.setattr("sdrt.bench.history.os.write", write)
    yield
    monkeypatch.undo()


def test_a_full_disk_leaves_the_history_as_it_was(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = history.append(tmp_path, document(0, 1))
    before = file.read_bytes()
    request.getfixturevalue("full_disk")
    with pytest.raises(ResourceError, match="No space left") as caught:
        history.append(tmp_path, document(1, 1))
    assert caught.value.exit_code == 6 and file.read_bytes() == before


def test_a_torn_last_line_is_left_out_and_mended(tmp_path: Path) -> None:
    file = history.append(tmp_path, document(0, 1))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:50])
    assert len(history.read(tmp_path)) == 1
    history.append(tmp_path, document(1, 1))
    assert len(history.read(tmp_path)) == 2
    file.write_bytes(b"torn")
    history.append(tmp_path, document(1, 1))
    assert len(history.read(tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "kind", "fragment"),
    [("", InputFileError, "no runs"), ("{}\n", InputFileError, "schema"), ('{"schema": 2}\n', MachineError, "Upgrade"), ("x\n", InputFileError, ":1: not valid JSON"),
     ('{"schema": 1}\n', InputFileError, ":1: not a run"),
     ('{"schema": 1, "id": "", "time": "", "key": "", "ran": "", "stats": {"x": {}}, "counters": {}}\n', InputFileError, "x: expected a number, found None")],
)  # fmt: skip
def test_bad_histories(tmp_path: Path, text: str, kind: type[Exception], fragment: str) -> None:
    (tmp_path / history.FILE).write_text(text, encoding="utf-8")
    with pytest.raises(kind) as caught:
        history.read(tmp_path)
    assert fragment in str(caught.value)


def test_history_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        history.append(tmp_path / "file", document(0, 1))
    with pytest.raises(InputFileError, match="cannot be read"):
        history.read(tmp_path / "none")


# Profile


def test_arithmetic_of_operators_by_hand() -> None:
    def flops(op: str, inputs: list[list[int]], output: list[int]) -> int | None:
        return matrix_flops({"op_name": op, "input_type_shape": [{"float": shape} for shape in inputs], "output_type_shape": [{"float": output}]})

    assert flops("Conv", [[2, 4, 8, 8], [64, 4, 3, 3], [64]], [2, 64, 8, 8]) == 2 * 2 * 64 * 8 * 8 * 4 * 9
    assert flops("Conv", [[1, 32, 8, 8], [32, 1, 3, 3]], [1, 32, 8, 8]) == 2 * 32 * 64 * 9  # depthwise
    assert flops("MatMul", [[2, 77, 64]], [2, 77, 128]) == 2 * 2 * 77 * 128 * 64  # the weight was packed away
    assert flops("Gemm", [[1, 64], [256, 64], [256]], [1, 256]) == 2 * 256 * 64
    assert flops("Attention", [[1, 2, 10, 8], [1, 2, 20, 8], [1, 2, 20, 8]], [1, 2, 10, 8]) == 2 * 2 * 10 * 20 * 16
    assert flops("Add", [[4], [4]], [4]) is None
    assert flops("MatMul", [], []) is None


def test_a_profile_without_its_first_run() -> None:
    from test_bench_formats import EVENTS

    found = analyse(EVENTS, 1.0, {"flops_per_s": 1e9, "bytes_per_s": 1e9})
    assert [(one["name"], one["ms"]) for one in found["slowest"]] == [("conv", 0.05), ("mm", 0.01), ("add", 0.003)]
    assert found["kernels"] == 3 and sum(one["share"] for one in found["slowest"]) == pytest.approx(1)
    conv, mm, add = 2 * 2 * 64 * 64 * 36, 2 * 2 * 77 * 128 * 64, 2 * 64 * 64
    assert (found["flops"], found["matrix_flops"]) == (conv + mm + add, conv + mm)
    assert found["bytes"] == 2048 + 9472 + 32768 + 39424 + 78848 + 64 * 128 * 4 + 33024 + 32768
    assert found["share_of_peak"] == pytest.approx(found["flops"] / 1e-3 / 1e9)
    assert analyse(EVENTS, None, {"flops_per_s": 1e9, "bytes_per_s": 1e9})["ms"] == pytest.approx(0.063)


def test_the_machines_peak_is_positive() -> None:
    assert all(value > 0 for value in machine_peak((64,), 1 << 16).values())


def test_requests_and_answers_travel_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version's fields are ignored; errors become part of the answer."""
    asked: list[Request] = []

    def fail(request: Request) -> Any:
        asked.append(request)
        raise UsageError("steps 0: expected 1 to 1000", "Choose more.")

    monkeypatch.setattr(measure, "measure", fail)
    monkeypatch.setattr("sys.argv", ["-c", str(tmp_path / "request"), str(tmp_path / "answer")])
    (tmp_path / "request").write_text(json.dumps(asdict(Request("x", size=(64, 72))) | {"of the future": 1}))
    measure.serve()
    assert asked == [Request("x", size=(64, 72))]
    assert json.loads((tmp_path / "answer").read_text()) == {"error": {"kind": "UsageError", "message": "steps 0: expected 1 to 1000", "fix": "Choose more."}}


def test_another_interpreter_finds_its_own_modules(tmp_path: Path) -> None:
    """`--old-python` starts what it is given, and does not show it our modules."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\nprintf \'{"path": "%s"}\' "$PYTHONPATH" > "$5"\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "theirs")
        assert in_fresh_process(Request("toy.sdrt", python=str(script))) == {"path": "theirs"}
