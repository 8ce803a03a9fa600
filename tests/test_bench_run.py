"""Measuring: instruments on a fake engine with a clock of its own, and interleaved runs of known costs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_documents import IDENTITY, answer, synthetic_measure, synthetic_pairs
from bench_fakes import FakeEngine, FakePipe, FakeTime

from sdrt.bench import measure
from sdrt.bench.compare import Comparison
from sdrt.bench.instruments import Readings, TimedEngine
from sdrt.bench.measure import Request
from sdrt.bench.metrics import Gates
from sdrt.bench.result import assemble
from sdrt.bench.run import run, side_by_side
from sdrt.bench.statistics import SAME, SLOWER
from sdrt.bundle.folder import Bundle, open_bundle
from sdrt.errors import MachineError


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
    batch = engine.open("shape", 1)
    batch.join("job")
    batch.step()
    batch.latents([0])
    batch.decode([0], 0.5)
    assert readings.calls == Counter({"batches": 1, "joins": 1, "latents_copies": 1, "decode_calls": 1})  # the latents kept for us are not counted
    assert (readings.kept["shape"], readings.kept["jobs"]) == ("shape", ["job"]) and "latents" in readings.kept
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


def test_a_real_pipeline_is_observed_from_its_loading_on(flat_bundle: Path) -> None:
    from sdrt.runtime import Pipeline

    readings = Readings()
    with Pipeline.load(flat_bundle, threads=1, observe=readings.observe) as pipe:
        result = pipe("red apple", steps=3, cfg=3, seed=0)
        assert readings.calls == {"text_encoder_calls": 1, "batches": 1, "joins": 1, "decode_calls": 1}
        assert len(readings.steps) == 3 and min(readings.steps) > 0
        assert result.timings_ms["tokenise"] > 0 and readings.engine_load > 0
        assert readings.inside == sum(readings.steps) + readings.text_encoder + readings.copies + readings.decode
    with Pipeline.load(flat_bundle, threads=1) as pipe:
        assert pipe("red apple", steps=3, cfg=3, seed=0).images.tobytes() == result.images.tobytes() and len(readings.steps) == 3


# Two side by side


@pytest.fixture(scope="module")
def bundle(flat_bundle: Path) -> Bundle:
    return open_bundle(flat_bundle)


def ab(bundle: Bundle, seed: int, slower: float, *, noise: float = 0.01, max_s: float = 1e9, pairs: int = 30, said: list[str] | None = None) -> Comparison:
    sides = [(bundle, Request("old.sdrt")), (bundle, Request("new.sdrt"))]
    made = synthetic_pairs(seed, {"old.sdrt": 0.0, "new.sdrt": slower}, noise)
    return side_by_side(*sides, Gates(pairs=pairs), (said if said is not None else []).append, max_s=max_s, measure=made)  # type: ignore[arg-type]


def test_ten_per_cent_slower_fails_and_the_same_passes_after_six_pairs(bundle: Bundle) -> None:
    failed = ab(bundle, 1, 0.10)
    words = {row.name: row.verdict for row in failed.rows}
    assert (failed.exit_code, words["total_ms"], words["step_ms"]) == (1, SLOWER, SLOWER)
    said: list[str] = []
    passed = ab(bundle, 2, 0.0, said=said)
    assert passed.exit_code == 0 and {row.verdict for row in passed.rows} == {SAME}
    assert len(said) == 1 + 6 and "total_ms" in said[-1] and "SAME" in said[-1] and "SAME" not in said[-2], "six pairs are the least"


def test_a_fake_engine_that_sleeps_ten_per_cent_longer_fails(bundle: Bundle) -> None:
    """The whole way from an engine's sleep to the exit code, on a clock that only it moves, with 1 % of noise per process."""
    random = np.random.default_rng(3)

    def verdict(new_ms: float) -> int:
        def side(step_ms: float) -> Mapping[str, Any]:
            sampler = sampled(step_ms * float(np.exp(random.normal(0, 0.01))))
            return answer(random) | {"samples": sampler.samples, "fit": sampler.points}

        sides = [(bundle, Request("old")), (bundle, Request("new"))]
        return side_by_side(*sides, Gates(), lambda _: None, max_s=1e9, measure=lambda *_: (side(10.0), side(new_ms))).exit_code  # type: ignore[arg-type]

    assert (verdict(11.0), verdict(10.0)) == (1, 0)


def test_it_goes_on_until_it_is_settled_or_the_time_is_over(bundle: Bundle) -> None:
    said: list[str] = []
    assert ab(bundle, 4, 0.0, noise=0.08, said=said, max_s=0).exit_code == 8 and len(said) == 1 + 6
    said.clear()
    assert ab(bundle, 4, 0.0, noise=0.08, said=said, pairs=9).exit_code == 8 and len(said) == 1 + 9
    said.clear()
    settled = ab(bundle, 4, 0.0, noise=0.04, said=said, pairs=50)
    assert settled.exit_code == 0 and 6 < len(said) - 1 < 50
    assert len(settled.base["samples"]["total_ms"]) == len(said) - 1


def test_two_that_ran_on_different_engines_are_told_apart_after_one_pair(bundle: Bundle) -> None:
    def made(old: Request, new: Request, pair: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        both = answer(np.random.default_rng(pair)), answer(np.random.default_rng(pair))
        both[1]["engine"]["backend"] = "openvino"
        return both

    said: list[str] = []
    found = side_by_side((bundle, Request("old")), (bundle, Request("new")), Gates(), said.append, max_s=1e9, measure=made)
    assert found.exit_code == 9 and found.rows == () and "engine.backend: 'onnxruntime' and 'openvino'" in found.headline and len(said) == 2


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
