"""What an application does with a pipeline: cancel, set deadlines, warm up, close it while it runs, draw several
prompts at once, and sort its errors.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from fake_engine import FakeBatch, FakeEngine
from PIL import Image
from typer.testing import CliRunner

from sdrt import errors, runtime
from sdrt.bundle.folder import open_bundle
from sdrt.cli.app import app
from sdrt.cli.output import show_log
from sdrt.errors import Cancelled, ClosedError, DeadlineError, MissingEngineError, SdrtError, TimeLimitError, UsageError
from sdrt.runtime import Parameters, Pipeline, Request, Settings, Timings
from sdrt.runtime.engine import BatchShape, RunningBatch
from sdrt.runtime.prompts.tokenizer import Tokenizer

QUICK: Settings = {"steps": 3, "cfg": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def pipe(small_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as loaded:
        yield loaded


class Gate(FakeEngine):
    """An engine whose model calls wait: a test lets each go, and is told when one has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.missing_branches: set[int] = set()

    def open(self, shape: BatchShape, capacity: int) -> RunningBatch:
        if shape.branches in self.missing_branches:
            raise MissingEngineError("no engine")
        self.batches.append(Waiting(self, capacity))
        return self.batches[-1]


class Waiting(FakeBatch):
    def step(self) -> None:
        assert isinstance(self.engine, Gate)
        self.engine.begun.release()
        assert self.engine.go.acquire(timeout=20)
        super().step()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(gate: Gate, small_bundle: Path) -> Pipeline:
    bundle = open_bundle(small_bundle)
    return Pipeline(bundle, gate, Tokenizer(bundle.file("tokenizer/tokenizer.json"), bundle.manifest.text))


class Running(threading.Thread):
    """A call in a thread of its own, and what came of it."""

    def __init__(self, call: Any) -> None:
        super().__init__(daemon=True)
        self.call, self.value, self.error = call, None, None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.call()
        except SdrtError as error:
            self.error = error

    def ended(self) -> Any:
        self.join(20)
        assert not self.is_alive()
        return self


# Ending early


def test_another_thread_cancels_within_one_model_call(gate: Gate, gated: Pipeline) -> None:
    """The call that runs ends, no other begins, and a request beside it is drawn as if nothing had happened."""
    cancelled, other = (gated.stream("fox", **QUICK) for _ in range(2))
    calls = [Running(stream.result) for stream in (cancelled, other)]
    assert gate.begun.acquire(timeout=20) and gate.begun.acquire(timeout=20)
    with pytest.raises(UsageError, match="another thread reads it"):
        cancelled.close()
    cancelled.cancel()
    gate.go.release(10)
    first, second = (call.ended() for call in calls)
    assert (
        isinstance(first.error, Cancelled)
        and first.error.message == "request: cancelled after 1 of 3 model calls of picture 1 of 1"
    )
    assert second.error is None and second.value.images.shape == (1, 64, 64, 3)
    assert sorted(batch.rows for batch in gate.batches) == [1, 3]
    assert all(batch.closed for batch in gate.batches)
    with pytest.raises(Cancelled):
        cancelled.result()
    other.cancel()  # too late: it is finished
    assert other.result() is second.value


@pytest.mark.parametrize(
    ("seen", "said"),
    [(0, "after 0 of 2 pictures"), (2, "after 2 of 3 model calls of picture 1"), (3, "after 1 of 2 pictures")],
)
def test_cancelling_between_steps(pipe: Pipeline, seen: int, said: str) -> None:
    stream = pipe.stream("fox", count=2, **QUICK)
    for _ in range(seen):
        next(stream)
    stream.cancel()
    with pytest.raises(Cancelled, match=said):
        next(stream)


def test_a_deadline(gate: Gate, gated: Pipeline) -> None:
    call = Running(lambda: gated("fox", deadline_s=0.05, **QUICK))
    assert gate.begun.acquire(timeout=20)
    threading.Event().wait(0.06)
    gate.go.release(10)
    assert (
        isinstance(call.ended().error, DeadlineError)
        and isinstance(call.error, TimeLimitError)
        and call.error.exit_code == 7
    )
    assert call.error.message == "request: its deadline of 0.05 s passed after 1 of 3 model calls of picture 1 of 1"
    assert [(batch.rows, batch.closed) for batch in gate.batches] == [(1, True)]
    assert gated("fox", deadline_s=np.float32(60), **QUICK).seeds == (5,)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), True, "5"])
def test_a_deadline_that_is_none(pipe: Pipeline, seconds: Any) -> None:
    with pytest.raises(UsageError, match=r"deadline .*: expected seconds, more than 0"):
        pipe.stream("fox", deadline_s=seconds)


def test_closing_while_it_runs(gate: Gate, gated: Pipeline) -> None:
    stream = gated.stream("fox", **QUICK)
    call = Running(stream.result)
    assert gate.begun.acquire(timeout=20)
    gated.close()
    gate.go.release(10)
    assert call.ended().error is None
    for use in (lambda: gated("fox"), lambda: gated.engine, gated.warm_up):
        with pytest.raises(ClosedError):
            use()


def test_a_stream_that_was_closed_has_no_result(pipe: Pipeline) -> None:
    with pipe.stream("fox", **QUICK) as stream:
        next(stream)
    with pytest.raises(UsageError, match="closed before its end"):
        stream.result()


def test_an_old_step_shows_nothing(pipe: Pipeline) -> None:
    """Not the newest picture in its place; nor after the end, when the engine may draw something else there."""
    stream = pipe.stream("fox", count=2, **QUICK)
    steps = []
    for step in stream:
        assert step.preview().shape == (1, 64, 64, 3)
        steps.append(step)
    for step in steps:
        for look in (step.preview, step.noisy_preview, step.denoised):
            with pytest.raises(UsageError, match="step: passed already"):
                look()
    assert stream.result() is steps[-1].result


# A prompt for each picture


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("sampler", ["euler", "euler_a"])
def test_each_picture_of_several_prompts_is_the_one_drawn_alone(pipe: Pipeline, sampler: str, batch: int) -> None:
    """Prompts of one chunk and of three, of two branches and of three, edited on the way."""
    prompts = [
        "red apple",
        "cat face",
        "red apple, " * 60,
        "robot",
        "red apple AND cat face",
        "[red:blue:0.5] apple",
        "ghost",
    ]
    negatives = ["", "dog", "", "dog", "blue", "", "dog"]
    result = pipe(prompts, negative=negatives, batch=batch, sampler=sampler, **QUICK)
    assert result.seeds == tuple(range(5, 12)) and result.parameters["count"] == 7
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = pipe(prompt, negative=negative, sampler=sampler, steps=3, cfg=3.0, seed=5 + i)
        assert np.array_equal(result.images[i], alone.images[0]), i
        assert (result.picture(i)["prompt"], result.picture(i)["negative"], result.picture(i)["seed"]) == (
            prompt,
            negative,
            5 + i,
        )


def test_prompts_of_one_form_share_a_batch(gate: Gate, gated: Pipeline) -> None:
    gate.go.release(100)
    steps = list(gated.stream(("fox", "sun", "fox AND sun", "fox", "fox", "sun"), negative="fox", batch=2, **QUICK))
    assert [len(batch.jobs) for batch in gate.batches] == [2, 1, 2, 1]
    assert [step.picture for step in steps[::3]] == [0, 2, 3, 5]
    fox, sun = 3240, 2176
    assert [job.contexts[0]["context"][:, 1, 0].tolist() for job in gate.batches[0].jobs] == [
        [fox, fox],
        [fox, sun],
    ]  # each its negative, then its prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt: a list of 0, expected 1 to"),
        ({"prompt": ["a", "b"], "count": 3}, "count 3: there are 2 prompts"),
        ({"prompt": ["a", "b"], "negative": ["c"]}, "negative prompt: a list of 1, with 2 prompts"),
        ({"prompt": "a", "negative": ["c"]}, "negative prompt: a list of 1, with one prompt"),
        ({"prompt": ["a", 3]}, "prompt 2: expected text, found int"),
        ({"prompt": ["a", "b"], "seed": 2**64 - 1}, "seed 18446744073709551615: expected 0 to 18446744073709551614"),
    ],
)
def test_prompts_that_do_not_go_together(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipe.stream(**arguments)


# Warming up


def test_warm_up_draws_the_shapes_of_later_calls(gate: Gate, gated: Pipeline) -> None:
    gate.go.release(1000)

    def shapes() -> set[tuple[BatchShape, int]]:
        return {(batch.jobs[0].shape, batch.capacity) for batch in gate.batches}

    picture = np.zeros((64, 64, 3), np.uint8)
    for prompt, settings in (
        ("", {}),
        ("fox " * 100, {"size": (96, 64), "batch": 2}),
        (["fox", "sun"], {"batch": 2}),
        ("fox AND sun", {"init_image": picture}),
    ):
        gate.batches.clear(), gate.images.clear()
        gated.warm_up(prompt, **settings)  # type: ignore[arg-type]
        warm = shapes()
        encoded = bool(gate.images)
        for cfg in (7.0, 1.0):
            gate.batches.clear(), gate.images.clear()
            gated(
                prompt, cfg=cfg, count=1 if isinstance(prompt, list) else settings.get("batch", 1), steps=5, **settings
            )  # type: ignore[arg-type, misc]
            assert shapes() <= warm and bool(gate.images) == encoded
    gate.batches.clear()
    gated.warm_up(cfg=1)
    assert [job.shape.branches for job in gate.jobs] == [1]


def test_warm_up_wants_the_engine_that_is_asked_for(gate: Gate, gated: Pipeline) -> None:
    gate.go.release(1000)
    gate.missing_branches = {1}
    gated.warm_up()
    with pytest.raises(MissingEngineError):
        gated.warm_up(cfg=1)
    gate.missing_branches = {2}
    with pytest.raises(MissingEngineError):
        gated.warm_up()


# What a result is


def test_a_result_compares_hashes_pickles_and_encodes(pipe: Pipeline) -> None:
    first, second = (pipe(["fox", "sun"], **QUICK) for _ in range(2))
    assert first == first and first != second and len({first, second, first}) == 2
    assert np.array_equal(pickle.loads(pickle.dumps(first)).images, second.images)
    with Image.open(BytesIO(first.encode("png", 1))) as image:
        assert np.array_equal(np.asarray(image), first.images[1])
        assert image.info["parameters"].startswith("sun\n") and "Seed: 6" in image.info["parameters"]
    for format in ("jpeg", "webp"):
        with Image.open(BytesIO(first.encode(format, quality=50))) as image:
            assert image.format == format.upper() and image.size == (64, 64) and image.getexif()
    assert first.engine == pipe.engine and first.engine["backend"] == "onnxruntime"


def test_what_a_result_says_is_typed(pipe: Pipeline) -> None:
    result = pipe("fox", **QUICK)
    assert result.parameters.keys() == Parameters.__annotations__.keys()
    assert result.timings_ms.keys() == Timings.__annotations__.keys()
    assert Settings.__annotations__.keys() == {field.name for field in fields(Request)} - {"prompt"}


@pytest.mark.parametrize("whole", [np.int64, np.uint8, np.int16])
def test_numbers_of_numpy(pipe: Pipeline, whole: Any) -> None:
    """They are numbers, and a result's text is made of Python's."""
    given = pipe(
        "fox",
        seed=whole(5),
        steps=whole(3),
        cfg=np.float32(3),
        size=(whole(64), whole(72)),
        batch=whole(1),
        count=whole(1),
        clip_skip=whole(1),
    )
    assert np.array_equal(given.images, pipe("fox", size=(64, 72), **QUICK).images)
    assert b"Seed: 5" in given.encode()
    for setting in ("seed", "steps", "batch", "count", "cfg"):
        with pytest.raises(UsageError, match=setting):
            pipe("fox", **{setting: np.bool_(True)})  # type: ignore[misc, arg-type]


# Errors, the command, the log


def test_errors_are_public_and_sorted() -> None:
    """Each has an exit code of its family and an HTTP status; the caller's mistake, a missing engine and a broken
    machine are told apart.
    """
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SdrtError)]
    documented = {
        (words[0], int(words[1]), int(words[2]))
        for words in (
            [*line.replace("│", "").replace("├──", "").replace("└──", "").split(), ""]
            for line in (errors.__doc__ or "").splitlines()
        )
        if words[:2][-1].isdigit()
    }
    assert {(kind.__name__, kind.exit_code, kind.http_status) for kind in tree} == documented
    build_only = {"CheckpointError", "AdapterError", "InconclusiveError", "NotComparableError"}
    assert {kind.__name__ for kind in tree} - build_only <= set(runtime.__all__)
    assert all(getattr(runtime, name) for name in runtime.__all__)
    kinds = (UsageError, MissingEngineError, errors.MachineError)
    assert not [(a, b) for a in kinds for b in kinds if a is not b and issubclass(a, b)]


def test_a_path_is_beside_the_message() -> None:
    error = MissingEngineError("no engine for 8x8", "Compile one.", path=Path("/srv/a.sdrt"))
    assert (error.message, error.path, error.line) == (
        "no engine for 8x8",
        "/srv/a.sdrt",
        "/srv/a.sdrt: no engine for 8x8",
    )
    assert str(error) == "/srv/a.sdrt: no engine for 8x8\nCompile one."
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.fix, again.path) == (error.message, error.fix, error.path)


def test_python_m_sdrt() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdrt", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "sdrt")


def test_the_log_is_quiet_until_asked(small_bundle: Path, tmp_path: Path) -> None:
    script = (
        "import logging, sdrt\nlog ="
        " logging.getLogger('sdrt')\nlog.warning('beware')\nlogging.basicConfig()\nlog.warning('heard')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "heard" in done.stderr and "beware" not in done.stderr

    def said(*options: str) -> str:
        result = CliRunner().invoke(
            app,
            [
                *options,
                "generate",
                str(small_bundle),
                "fox",
                "--steps",
                "1",
                "--backend",
                "onnxruntime",
                "--output",
                str(tmp_path / "a.png"),
            ],
        )
        assert result.exit_code == 0, result.output
        return result.stderr

    try:
        assert "loaded on" not in said()
        assert f"info: {small_bundle}: loaded on onnxruntime in " in said("-v") and "debug: " not in said("--verbose")
        assert "debug: 1 pictures of 64x64 in " in said("-vv")
        assert "loaded on" not in said()  # nothing stays from one call to the next
    finally:
        show_log(logging.WARNING)
