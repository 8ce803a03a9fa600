"""The TensorRT backend on the simulated GPU: pictures equal to ONNX Runtime's, exact counts per picture, and everything
that can go wrong.
"""

from __future__ import annotations

import gc
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cuda_simulator
import numpy as np
import pytest
import tensorrt_simulator
from cuda_simulator import installed
from gpu_simulator import Gpu
from simulated_plans import ACTIVATION_BYTES, compile_engine

from sdrt.bundle.folder import Bundle, open_bundle
from sdrt.bundle.graphs import GRAPHS, STEP, VAE_DECODER, VAE_ENCODER
from sdrt.engines.store import read_engine, read_plan, write_engine
from sdrt.engines.targets import TARGETS
from sdrt.errors import (
    BundleError,
    ClosedError,
    MachineError,
    MissingEngineError,
    NonFiniteError,
    ResourceError,
    UsageError,
)
from sdrt.files.cache import write_entry
from sdrt.files.publish import cache_folder
from sdrt.machine import doctor
from sdrt.runtime import Pipeline
from sdrt.runtime.backends.tensorrt import plans
from sdrt.runtime.backends.tensorrt.step import CapturedStep
from sdrt.runtime.engine import Job, Pixels, RunningBatch, tables
from sdrt.runtime.sampling.registry import SAMPLERS, plan_rows

Expected = Callable[..., Pixels]
QUICK: dict[str, Any] = {"steps": 3, "cfg": 3.0, "seed": 5}
LOADED = sorted(graph for graph in GRAPHS if graph != VAE_ENCODER)
"""In the order in which they are loaded."""
COMMAND = "sdrt compile .* --target tensorrt-rtx --sm 89"


@pytest.fixture(scope="module")
def bundle(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with an engine for 64 to 96 pixels a side, up to three pictures."""
    copy = Path(shutil.copytree(small_bundle, tmp_path_factory.mktemp("gpu") / "small.sdrt"))
    compile_engine(copy, graphs=small_bundle, heights=(64, 96), widths=(64, 96), batch=3)
    return copy


@pytest.fixture(scope="module")
def spare(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path_factory.mktemp("spare") / "spare.sdrt"))


@pytest.fixture
def blank(spare: Path) -> Path:
    """The small bundle without an engine, for a test to put its own into."""
    shutil.rmtree(spare / "engines", ignore_errors=True)
    return spare


@pytest.fixture(scope="module")
def expected(small_bundle: Path) -> Iterator[Expected]:
    """The pictures that ONNX Runtime makes, each made once."""
    made: dict[str, Pixels] = {}
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:

        def pictures(prompt: str = "fox", **settings: Any) -> Pixels:
            key = repr((prompt, sorted(settings.items())))
            if key not in made:
                made[key] = cpu(prompt, **settings).images
            return made[key]

        yield pictures


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with installed(Gpu(), cuda_simulator.modules() | tensorrt_simulator.modules()) as simulated:
        yield simulated


@pytest.fixture
def pipe(gpu: Gpu, bundle: Path) -> Iterator[Pipeline]:
    with load(bundle) as pipeline:
        yield pipeline


def load(bundle: Path, **options: Any) -> Pipeline:
    """A pipeline that launches each model call by itself. Those of few steps, whose pictures are one launch, have tests
    of their own.
    """
    return Pipeline.load(bundle, backend="tensorrt-rtx", **{"whole_picture": False, **options})


def engine_of(pipe: Pipeline) -> Any:
    return pipe._engine


def same(pipe: Pipeline, expected: Expected, prompt: str = "fox", **settings: Any) -> None:
    """The simulated GPU draws what ONNX Runtime draws, to the last bit, on captured graphs."""
    result = pipe(prompt, **settings)
    assert np.array_equal(result.images, expected(prompt, **settings))
    assert result.engine["cuda_graphs"] is True


# The same pictures


def test_pictures_differ_in_whatever_is_asked(expected: Expected) -> None:
    """So equal pictures below mean that prompt, seed, guidance, steps and sampler arrived."""
    first = expected(**QUICK)
    others: list[tuple[str, dict[str, Any]]] = [
        ("cat", {}),
        ("fox", {"negative": "sun"}),
        ("fox", {"seed": 6}),
        ("fox", {"cfg": 4.0}),
        ("fox", {"steps": 4}),
    ]
    others += [("fox", {"sampler": "heun"}), ("fox", {"sampler": "euler_a"})]
    for prompt, settings in others:
        assert (expected(prompt, **QUICK | settings) != first).mean() > 0.5, (prompt, settings)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(pipe: Pipeline, expected: Expected, sampler: str) -> None:
    same(pipe, expected, sampler=sampler, steps=5, cfg=3.0, seed=1)
    schedule = SAMPLERS[sampler].schedules[-1]
    same(pipe, expected, sampler=sampler, schedule=schedule, steps=4, cfg=3.0, seed=2)


@pytest.mark.parametrize("size", [(64, 64), (72, 96)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_sizes_batches_and_branches(
    pipe: Pipeline, expected: Expected, size: tuple[int, int], batch: int, cfg: float
) -> None:
    same(
        pipe, expected, size=size, batch=batch, count=batch, cfg=cfg, steps=3, seed=4, negative="sun", sampler="euler_a"
    )


def test_more_pictures_than_a_batch(pipe: Pipeline, expected: Expected) -> None:
    same(pipe, expected, batch=2, count=5, **QUICK)


def test_settings_change_from_call_to_call(pipe: Pipeline, expected: Expected) -> None:
    for settings in (
        {"sampler": "heun", "cfg": 3.0, "steps": 3},
        {"sampler": "ddim", "cfg": 1.0, "steps": 4},
        {"sampler": "dpmpp_2m", "cfg": 5.0, "steps": 6, "size": (96, 64)},
        {"sampler": "euler_a", "cfg": 2.0, "steps": 1},
        {"sampler": "heun", "cfg": 3.0, "steps": 3},
    ):
        same(pipe, expected, seed=7, **settings)  # type: ignore[arg-type]


def test_engines_are_named_in_the_result(pipe: Pipeline, bundle: Path) -> None:
    (folder,) = (bundle / "engines").iterdir()
    assert pipe("fox", **QUICK).engine == {
        "backend": "tensorrt-rtx",
        "version": tensorrt_simulator.__version__,
        "device": "NVIDIA Simulated",
        "compute": "fp32",
        "engine": folder.name,
        "cuda_graphs": True,
    }


def test_previews(pipe: Pipeline, expected: Expected, small_bundle: Path) -> None:
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
        steps = zip(
            pipe.stream("fox", batch=2, count=3, **QUICK), cpu.stream("fox", batch=2, count=3, **QUICK), strict=True
        )
        for ours, reference in steps:
            assert (ours.index, ours.picture) == (reference.index, reference.picture)
            assert np.array_equal(ours.denoised(), reference.denoised())
            assert np.array_equal(ours.preview(), reference.preview())
    assert ours.result is not None and np.array_equal(ours.result.images, expected(batch=2, count=3, **QUICK))


@pytest.mark.parametrize("passed", [1, 2, 3, 5])
def test_t4_cancelled_then_another(pipe: Pipeline, expected: Expected, passed: int) -> None:
    """The next picture takes over the buffers while the cancelled one's work is still queued."""
    stream = pipe.stream("sun", steps=6, cfg=3.0, seed=9, sampler="euler_a")
    for _ in range(passed):
        next(stream)
    stream.close()
    same(pipe, expected, **QUICK)


def test_threads(pipe: Pipeline, expected: Expected) -> None:
    seeds = (1, 2, 3, 4)
    pictures = {seed: expected(steps=4, cfg=3.0, seed=seed) for seed in seeds}
    with ThreadPoolExecutor(len(seeds)) as pool:
        results = list(pool.map(lambda seed: pipe("fox", steps=4, cfg=3.0, seed=seed), seeds * 2))
    assert all(np.array_equal(result.images, pictures[result.seeds[0]]) for result in results)
    assert all(result.engine["cuda_graphs"] for result in results)


@pytest.mark.parametrize("sizes", [((64, 64), (64, 64)), ((64, 64), (72, 96))])
def test_t2_interleaved_streams(pipe: Pipeline, expected: Expected, sizes: tuple[tuple[int, int], ...]) -> None:
    calls = [
        {"steps": 4, "cfg": 3.0, "seed": seed, "size": size, "sampler": "euler_a"} for seed, size in enumerate(sizes)
    ]
    streams = [pipe.stream("fox", **settings) for settings in calls]  # type: ignore[arg-type]
    for settings, last in zip(calls, list(zip(*streams, strict=True))[-1], strict=True):
        assert last.result is not None and np.array_equal(last.result.images, expected(**settings))


def test_t6_stream_dropped_in_another_thread(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    held = [pipe.stream("sun", steps=5, cfg=3.0, seed=9) for _ in range(6)]
    for stream in held:
        next(stream)
    del stream
    thread = threading.Thread(target=held.clear)  # it has no current device
    thread.start()
    thread.join()
    gc.collect()
    same(pipe, expected, **QUICK)


# Exact counts


def test_counts_of_a_picture(pipe: Pipeline, gpu: Gpu) -> None:
    for prompt in (
        "fox",
        "cat",
    ):  # the second finds the empty negative prompt encoded, as the picture that is counted does
        pipe(prompt, **QUICK)
    gpu.journal.clear()
    with gpu.counted() as counts:
        pipe("sun", steps=20, cfg=3.0, seed=1)
    assert counts == {
        "launches": 20,  # one per model call
        "runs": 2,  # text encoder, decoder
        "h2d": 3,  # tokens; tables, noise, context and latents in one; the rounding
        "d2h": 2,  # context, pictures
        "d2d": 1,  # the latents, to the decoder's
        "syncs": 2,  # after the text encoder, after the decoder
        "records": 20 + 1,
        "events": 3,
        "polls": 19,  # a model call each, and the copies of what joined
    }
    first, last = gpu.journal.index("launches"), len(gpu.journal) - gpu.journal[::-1].index("launches")
    assert set(gpu.journal[first:last]) == {"launches", "records", "polls"}


@pytest.mark.parametrize(
    ("settings", "calls"),
    [({"batch": 3, "count": 3}, 1), ({"batch": 1, "count": 3}, 3), ({"cfg": 1.0}, 1), ({"size": (72, 96)}, 1)],
)
def test_counts_of_other_pictures(pipe: Pipeline, gpu: Gpu, settings: dict[str, Any], calls: int) -> None:
    """A batch costs what a picture costs, but for each picture a copy of noise, one of latents and a run of the decoder;
    the text encoder runs once a call.
    """
    settings = QUICK | settings
    for prompt in ("fox", "cat"):
        pipe(prompt, **settings)
    with gpu.counted() as counts:
        pipe("sun", **settings)
    together = settings.get("batch", 1)
    assert counts == {
        "launches": 3 * calls,
        "runs": 1 + together * calls,
        "h2d": 1 + (together + 1) * calls,
        "d2h": 1 + calls,
        "d2d": together * calls,
        "syncs": 1 + calls,
        "records": 4 * calls,
        "events": 3 * calls,
        "polls": (1 + together) * calls,  # the simulator makes a copy a poll
    }


def test_counts_of_two_calls_a_step(pipe: Pipeline, gpu: Gpu) -> None:
    pipe("fox", **QUICK)
    with gpu.counted() as counts:
        pipe("fox", sampler="heun", steps=5, cfg=3.0, seed=1)
    assert (counts["launches"], counts["syncs"], counts["h2d"]) == (9, 1, 2)  # the prompt is still encoded


def test_counts_of_a_prompt_asked_again(pipe: Pipeline, gpu: Gpu) -> None:
    """The text encoder does not run."""
    pipe("fox", **QUICK)
    with gpu.counted() as counts:
        pipe("fox", **QUICK)
    assert counts == {
        "launches": 3,
        "runs": 1,
        "h2d": 2,
        "d2h": 1,
        "d2d": 1,
        "syncs": 1,
        "records": 4,
        "events": 3,
        "polls": 2,
    }


def test_counts_of_a_preview(pipe: Pipeline, gpu: Gpu) -> None:
    pipe("fox", **QUICK)
    stream = pipe.stream("fox", **QUICK)
    step = next(stream)
    step.preview()
    with gpu.counted() as counts:
        step.preview()
    assert counts == {"h2d": 1, "d2h": 2, "runs": 1, "syncs": 2}
    stream.close()


def test_counts_of_loading_and_the_first_picture(gpu: Gpu, bundle: Path) -> None:
    with gpu.counted() as counts:
        pipe = load(bundle)
    assert counts == {"contexts": 2, "engines": 3, "syncs": 1}  # before memory is checked
    with gpu.counted() as counts:
        pipe("fox", **QUICK)
    assert counts == {
        "allocations": 4 + 2,  # activations: those of the text encoder, then those of step and decoder
        "frees": 1,
        "pinned_allocations": 4,
        "fills": 2,
        "contexts": 2,
        "profiles": 2,
        "captures": 2,
        "runs": 2 + 2 * 3,
        "launches": 3 + 2,  # each graph runs plain twice, is captured once and replayed once
        "h2d": 3 + 1 + 2,
        "d2h": 2 + 4,
        "d2d": 1,
        "syncs": 2 + 4,
        "records": 4,
        "events": 3,
        "polls": 2,
    }


def test_table_refill(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """128 rows fit; the copies of a refill, one a table, come between two launches."""
    pipe("fox", steps=1, cfg=1.0, seed=1)
    with gpu.counted() as counts:
        same(pipe, expected, steps=258, cfg=1.0, seed=3, sampler="euler_a")
    assert counts == {
        "launches": 258,
        "runs": 1,
        "h2d": 2 + 2 * 11,
        "d2h": 1,
        "d2d": 1,
        "syncs": 1,
        "records": 258 + 3,
        "events": 3,
        "polls": 257 + 13,
    }


@pytest.mark.parametrize("rows", [2, 5])
def test_few_table_rows(gpu: Gpu, small_bundle: Path, blank: Path, expected: Expected, rows: int) -> None:
    """An odd number of rows refills while the registers are on the other side."""
    compile_engine(blank, graphs=small_bundle, rows=rows)
    with load(blank) as pipe:
        for steps in (rows, 2 * rows, 12):
            same(pipe, expected, steps=steps, cfg=3.0, seed=3, sampler="euler_a")


@pytest.mark.parametrize(("bytes_", "rows"), [(1, 43), (1 << 18, 85), (1 << 28, 128)])
def test_page_locked_memory_for_noise_is_bounded(
    pipe: Pipeline, expected: Expected, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, bytes_: int, rows: int
) -> None:
    """A batch of many pictures has fewer rows for each, as few as the engine takes, and refills them."""
    monkeypatch.setattr(plans, "_NOISE_BYTES", bytes_)
    same(pipe, expected, batch=3, count=3, steps=90, cfg=1.0, seed=3, sampler="euler_a")
    (step,) = engine_of(pipe).plans.idle
    assert step.rows == rows and step.inputs.host("noise").shape[0] == 1 + 3 * rows


# Contexts that change on the way, and pictures as input


def jobs_of_contexts(bundle: Bundle, sets: tuple[int, ...], pictures: int = 1) -> list[Job]:
    """Guided jobs of one row per entry of `sets`, over three context sets each."""
    rows = plan_rows("euler_a", "normal", len(sets), bundle.manifest.diffusion)
    random = np.random.RandomState(1)

    def draw(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32)

    zeros = np.zeros((4, 8, 8), np.float32)
    table = tables(rows, [[-2.0, 3.0]] * len(rows))
    return [
        Job(
            {**table, "noise": draw(len(rows), 4, 8, 8)},
            {"init": zeros, "init_noise": draw(4, 8, 8), "mask": zeros[:1]},
            tuple({"context": draw(2, 77, 64)} for _ in range(3)),
            sets,
        )
        for _ in range(pictures)
    ]


def joined(pipe: Pipeline, jobs: list[Job]) -> tuple[RunningBatch, list[int]]:
    batch: RunningBatch = engine_of(pipe).open(jobs[0].shape, len(jobs))
    return batch, [batch.join(job) for job in jobs]


def run(pipe: Pipeline, jobs: list[Job]) -> tuple[Any, Any]:
    batch, slots = joined(pipe, jobs)
    for _ in range(jobs[0].rows):
        batch.step()
    try:
        return batch.latents(slots), batch.denoised(slots)
    finally:
        batch.close()


@pytest.mark.parametrize("sets", [(0, 0, 1, 1, 2), (2, 0, 2, 0), (1, 1, 1), (0, 1)])
@pytest.mark.parametrize("pictures", [1, 3])
def test_context_changes_between_rows(
    pipe: Pipeline, gpu: Gpu, small_bundle: Path, sets: tuple[int, ...], pictures: int
) -> None:
    """One copy within the device for each picture and row whose context set differs from the row's before it; nothing
    else between first row and last.
    """
    jobs = jobs_of_contexts(pipe.bundle, sets, pictures)
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
        reference = run(cpu, jobs)
    assert not np.array_equal(
        reference[0], run(pipe, [replace(job, context_of_row=(0,) * len(sets)) for job in jobs])[0]
    )
    for found, wanted in zip(run(pipe, jobs), reference, strict=True):
        assert np.array_equal(found, wanted)
    gpu.journal.clear()
    with gpu.counted() as counts:
        batch, _ = joined(pipe, jobs)
        for _ in sets:
            batch.step()
    changes = sum(one != two for one, two in pairwise(sets)) * pictures
    copies = pictures if changes else 0  # each picture's context sets, where they change
    assert (
        counts.pop("records") == len(sets) + 1 + copies
    )  # a model call each, the pictures' copies, and those of their sets
    assert counts.pop("h2d") == pictures + copies  # all but noise in one
    counts.pop("polls", None)  # as many as the device's pace asks for
    expected = {"launches": len(sets), "d2d": changes, "events": 3}
    assert counts == {
        name: count for name, count in expected.items() if count
    }  # no allocation: the batch before left its memory
    first, last = gpu.journal.index("launches"), len(gpu.journal) - gpu.journal[::-1].index("launches")
    assert gpu.journal[first:last].count("d2d") == changes
    assert set(gpu.journal[first:last]) <= {"launches", "records", "polls", "d2d"}
    batch.close()


def test_more_context_sets_than_before(pipe: Pipeline, small_bundle: Path) -> None:
    """The memory for sets grows with the picture that needs it, and the smaller one after it still finds its own."""
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
        for sets, kept in (((0, 1), 2), ((0, 1, 2), 3), ((1, 0), 2)):
            jobs = [replace(job, contexts=job.contexts[:kept]) for job in jobs_of_contexts(pipe.bundle, sets)]
            assert np.array_equal(run(pipe, jobs)[0], run(cpu, jobs)[0])


def test_context_changes_over_a_refill(gpu: Gpu, small_bundle: Path, blank: Path) -> None:
    compile_engine(blank, graphs=small_bundle, rows=3)
    with load(blank) as pipe, Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
        jobs = jobs_of_contexts(pipe.bundle, (0, 0, 1, 2, 2, 0, 1))
        assert np.array_equal(run(pipe, jobs)[0], run(cpu, jobs)[0])


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 72, 96)])
def test_images_are_encoded(pipe: Pipeline, gpu: Gpu, small_bundle: Path, shape: tuple[int, int, int]) -> None:
    """The encoder is loaded when the first image comes, and once."""
    random = np.random.RandomState(2)
    pixels = random.randint(0, 256, (*shape, 3)).astype(np.uint8)
    noise = random.standard_normal((shape[0], 4, shape[1] // 8, shape[2] // 8)).astype(np.float32)
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
        expected_latents = engine_of(cpu).encode_image(pixels, noise)
    assert VAE_ENCODER not in engine_of(pipe).plans._engines
    assert np.array_equal(engine_of(pipe).encode_image(pixels, noise), expected_latents)
    with gpu.counted() as counts:
        assert np.array_equal(engine_of(pipe).encode_image(pixels, noise), expected_latents)
    assert counts == {"h2d": 1, "runs": shape[0], "d2h": 1, "syncs": 1}  # one picture at a time


IMAGE = np.random.RandomState(4).randint(0, 256, (64, 64, 3)).astype(np.uint8)
MASK = np.repeat(np.repeat(np.array([[0, 255], [0, 255]], np.uint8), 32, axis=0), 32, axis=1)


@pytest.mark.parametrize("compat", ["a1111", "diffusers"])
@pytest.mark.parametrize("batch", [1, 3])
def test_image_to_image(pipe: Pipeline, expected: Expected, compat: str, batch: int) -> None:
    settings: dict[str, Any] = {
        "steps": 4,
        "cfg": 3.0,
        "seed": 2,
        "batch": batch,
        "count": batch,
        "compat": compat,
        "init_image": IMAGE,
        "strength": 0.7,
    }
    same(pipe, expected, **settings)
    same(pipe, expected, mask=MASK, sampler="euler_a", **settings)


def test_prompt_editing(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """From the second picture on, its encodings being cached, the change of prompt is one copy within the device."""
    settings: dict[str, Any] = {"steps": 6, "cfg": 3.0, "seed": 2}
    same(pipe, expected, "a [cat:dog:2] face", **settings)
    with gpu.counted() as counts:
        same(pipe, expected, "a [cat:dog:2] face", **settings)
    counts.pop("polls")
    assert counts == {
        "launches": 6,
        "runs": 1,
        "h2d": 3,
        "d2d": 1 + 1,
        "d2h": 1,
        "syncs": 1,
        "records": 6 + 2,
        "events": 3,
    }


def test_more_chunks_than_the_text_engine_takes(pipe: Pipeline, small_bundle: Path) -> None:
    """They are encoded in groups."""
    tokens = np.random.RandomState(3).randint(0, 40_000, (1, 7, 77))
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
        reference = np.concatenate([engine_of(cpu).encode_text(tokens[:, i : i + 2], 1)[0] for i in range(0, 7, 2)])
    context, pooled = engine_of(pipe).encode_text(tokens, 1)
    assert np.array_equal(context, reference) and pooled.shape == (7, 0)


def test_two_encoders_and_a_vector(gpu: Gpu, small_xl_bundle: Path, tmp_path: Path) -> None:
    """The vector changes with the context where the prompt does, in every slot."""
    copy = Path(shutil.copytree(small_xl_bundle, tmp_path / "xl.sdrt"))
    compile_engine(copy, graphs=small_xl_bundle, batch=2)
    prompt, settings = "[fox:red apple:1]", {**QUICK, "sampler": "euler", "count": 2, "batch": 2}
    with load(copy) as pipe, Pipeline.load(small_xl_bundle, backend="onnxruntime", threads=1) as cpu:
        expected = cpu(prompt, negative="sun", **settings).images
        assert np.array_equal(pipe(prompt, negative="sun", **settings).images, expected)
        assert not np.array_equal(pipe("fox", negative="sun", **settings).images, expected)
        jobs = [
            replace(job, contexts=tuple(one | {"vector": job.contexts[0]["vector"]} for one in job.contexts))
            for job in jobs_of_two(pipe, (0, 0, 1, 1))
        ]
        still = run(pipe, jobs)[0]
        changing = jobs_of_two(pipe, (0, 0, 1, 1))
        assert np.array_equal(run(pipe, changing)[0], run(cpu, changing)[0])
        assert not np.array_equal(run(pipe, changing)[0], still)


def jobs_of_two(pipe: Pipeline, sets: tuple[int, ...]) -> list[Job]:
    """As `jobs_of_contexts`, for the small SDXL."""
    manifest, random = pipe.bundle.manifest, np.random.RandomState(2)
    jobs = jobs_of_contexts(pipe.bundle, sets, pictures=2)

    def draw(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32)

    made = tuple(
        {"context": draw(2, 77, manifest.context_width), "vector": draw(2, manifest.vector.numbers)} for _ in range(3)
    )
    return [replace(job, contexts=made) for job in jobs]


# A picture in one launch


@pytest.fixture
def whole(gpu: Gpu, bundle: Path) -> Iterator[Pipeline]:
    """A pipeline as applications load it: pictures of up to eight model calls are one launch."""
    with load(bundle, whole_picture=None) as pipeline:
        yield pipeline


def asked_again(pipe: Pipeline, gpu: Gpu, prompt: str = "fox", **settings: Any) -> dict[str, int]:
    """What is counted of a picture whose prompts are encoded already."""
    pipe(prompt, **settings)
    with gpu.counted() as counts:
        pipe(prompt, **settings)
    return counts


ONE = {"launches": 1, "h2d": 1, "d2h": 1, "syncs": 1}


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "heun", "dpmpp_2m", "ddim", "lcm"])
def test_a_picture_is_one_launch(whole: Pipeline, expected: Expected, gpu: Gpu, sampler: str) -> None:
    """One copy to the device, one launch, one copy back, one wait, and nothing else."""
    for steps, cfg in ((2, 1.0), (3, 3.0)):
        settings: dict[str, Any] = {"sampler": sampler, "steps": steps, "cfg": cfg}
        same(whole, expected, seed=1, **settings)
        with gpu.counted() as counts:
            same(whole, expected, seed=1, **settings)
        assert counts == ONE
        same(whole, expected, seed=2, **settings)  # whatever the graph holds, it is not a picture's own


@pytest.mark.parametrize(("size", "batch", "count"), [((64, 64), 3, 3), ((72, 96), 1, 3), ((96, 72), 2, 5)])
def test_batches_in_one_launch(
    whole: Pipeline, expected: Expected, gpu: Gpu, size: tuple[int, int], batch: int, count: int
) -> None:
    """Each picture adds its own copy of noise; a batch that is not full has a graph of its own."""
    settings: dict[str, Any] = {"size": size, "batch": batch, "count": count, **QUICK, "sampler": "euler_a"}
    same(whole, expected, **settings)
    batches = -(-count // batch)
    counts = asked_again(whole, gpu, **settings)
    assert counts == {"launches": batches, "h2d": count, "d2h": batches, "syncs": batches}


def test_more_calls_than_a_few(whole: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """Then they are launched one by one, so that progress is true; unless the other is asked for."""
    assert asked_again(whole, gpu, steps=8, cfg=3.0, seed=1) == ONE
    assert asked_again(whole, gpu, steps=9, cfg=3.0, seed=1)["launches"] == 9
    assert asked_again(whole, gpu, steps=5, cfg=3.0, seed=1, sampler="heun")["launches"] == 9


def test_many_calls_in_one_launch(gpu: Gpu, bundle: Path, expected: Expected) -> None:
    with load(bundle, whole_picture=True) as pipe:
        for steps in (20, 21):
            same(pipe, expected, steps=steps, cfg=3.0, seed=1, sampler="euler_a")
            assert asked_again(pipe, gpu, steps=steps, cfg=3.0, seed=1, sampler="euler_a") == ONE
        counts = asked_again(pipe, gpu, steps=130, cfg=1.0, seed=1)  # more than its rows
        assert counts["launches"] == 130


def test_prompt_editing_is_not_one_launch(whole: Pipeline, expected: Expected, gpu: Gpu) -> None:
    settings: dict[str, Any] = {"steps": 6, "cfg": 3.0, "seed": 2}
    same(whole, expected, "a [cat:dog:2] face", **settings)
    assert asked_again(whole, gpu, "a [cat:dog:2] face", **settings)["launches"] == 6


@pytest.mark.parametrize("compat", ["a1111", "diffusers"])
def test_image_to_image_in_one_launch(whole: Pipeline, expected: Expected, gpu: Gpu, compat: str) -> None:
    """From the encoded picture on; the encoder has a copy either way, a run and a wait of its own."""
    settings: dict[str, Any] = {**QUICK, "compat": compat, "init_image": IMAGE, "strength": 0.7}
    same(whole, expected, **settings)
    same(whole, expected, mask=MASK, sampler="euler_a", **settings)
    counts = asked_again(whole, gpu, **settings)
    assert counts == {"launches": 1, "h2d": 2, "d2h": 2, "syncs": 2, "runs": 1}


def test_a_vector_and_two_encoders_in_one_launch(gpu: Gpu, small_xl_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_xl_bundle, tmp_path / "xl.sdrt"))
    compile_engine(copy, graphs=small_xl_bundle)
    with (
        load(copy, whole_picture=None) as pipe,
        Pipeline.load(small_xl_bundle, backend="onnxruntime", threads=1) as cpu,
    ):
        assert np.array_equal(pipe("fox", **QUICK).images, cpu("fox", **QUICK).images)
        assert asked_again(pipe, gpu, **QUICK) == ONE


@pytest.mark.parametrize("looked_at", [1, 2, 3])
def test_a_step_that_is_looked_at(whole: Pipeline, expected: Expected, small_bundle: Path, looked_at: int) -> None:
    """It is what a CPU's is, and the calls so far and from there on are launched one by one."""
    settings: dict[str, Any] = {**QUICK, "steps": 4}
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
        for ours, reference in zip(whole.stream("fox", **settings), cpu.stream("fox", **settings), strict=True):
            if ours.index == looked_at:
                assert np.array_equal(ours.denoised(), reference.denoised())
                assert np.array_equal(ours.preview(), reference.preview())
    assert ours.result is not None and np.array_equal(ours.result.images, expected(**settings))


@pytest.mark.parametrize("passed", [1, 2])
def test_cancelled_before_its_launch(whole: Pipeline, expected: Expected, gpu: Gpu, passed: int) -> None:
    """Nothing of it has started, and nothing of it is left."""
    same(whole, expected, **QUICK)
    stream = whole.stream("fox", **QUICK | {"seed": 9})
    with gpu.counted() as counts:
        for _ in range(passed):
            next(stream)
        stream.close()
    assert counts == {}
    same(whole, expected, **QUICK)


def test_pictures_that_join_and_leave_meanwhile(whole: Pipeline, small_bundle: Path) -> None:
    """Calls that wait are started before anything is written over what they read."""
    first, second = (replace(job, contexts=job.contexts[:1]) for job in jobs_of_contexts(whole.bundle, (0, 0, 0), 2))

    def course(pipe: Pipeline) -> Any:
        batch: RunningBatch = engine_of(pipe).open(first.shape, 2)
        slots = [batch.join(first)]
        batch.step()
        slots.append(batch.join(second))
        for _ in range(2):
            batch.step()
        batch.leave(slots[0])
        batch.step()
        found = batch.latents(slots[1:]), batch.decode(slots[1:], 0.5)[0]
        batch.close()
        return found

    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
        for found, wanted in zip(course(whole), course(cpu), strict=True):
            assert np.array_equal(found, wanted)


def test_latents_after_one_launch(whole: Pipeline, small_bundle: Path) -> None:
    """They are those of the last call, on whichever side that leaves them, and a call after them goes on from there."""
    for rows in (1, 2, 3):
        (job,) = (replace(job, contexts=job.contexts[:1]) for job in jobs_of_contexts(whole.bundle, (0,) * rows))

        def course(pipe: Pipeline, job: Job = job) -> Any:
            batch, slots = joined(pipe, [job])
            for _ in range(job.rows):
                batch.step()
            found = [batch.decode(slots, 0.5)[0], batch.latents(slots), batch.denoised(slots)]
            batch.leave(slots[0])
            again = batch.join(job)
            for _ in range(job.rows):
                batch.step()
            found += [batch.latents([again]), batch.decode([again], 0.5)[0]]
            batch.close()
            return found

        with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as cpu:
            for found, wanted in zip(course(whole), course(cpu), strict=True):
                assert np.array_equal(found, wanted)


def test_whole_picture_that_is_not_finite(whole: Pipeline, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = nan_job(whole)
    with monkeypatch.context() as patched:
        patched.setattr(whole, "_jobs", lambda *_: [broken])
        with pytest.raises(NonFiniteError, match=r"latents of seeds \[5\]"):
            whole("fox", **QUICK)
    same(whole, expected, **QUICK)


def test_whole_pictures_on_threads(whole: Pipeline, expected: Expected) -> None:
    seeds = (1, 2, 3, 4)
    pictures = {seed: expected(steps=4, cfg=3.0, seed=seed) for seed in seeds}
    with ThreadPoolExecutor(len(seeds)) as pool:
        results = list(pool.map(lambda seed: whole("fox", steps=4, cfg=3.0, seed=seed), seeds * 2))
    assert all(np.array_equal(result.images, pictures[result.seeds[0]]) for result in results)


@pytest.mark.parametrize("fault", ["refused", "invalidated", "instantiate"])
def test_whole_picture_that_cannot_be_captured(
    whole: Pipeline, expected: Expected, gpu: Gpu, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    whole("fox", steps=9, cfg=3.0, seed=1)  # the step's own graphs are there
    gpu.faults.capture = fault
    check_without_whole_pictures(whole, expected, gpu, caplog, "capturing failed")


@pytest.mark.parametrize("fault", ["wrong", "nothing"])
@pytest.mark.parametrize("steps", [3, 4])
def test_whole_picture_whose_replay_differs(
    whole: Pipeline, expected: Expected, gpu: Gpu, caplog: pytest.LogCaptureFixture, fault: str, steps: int
) -> None:
    whole("fox", steps=9, cfg=3.0, seed=1)
    gpu.faults.replay = fault
    with caplog.at_level(logging.WARNING, "sdrt"), suppress(NonFiniteError):  # the step's own graphs replay so too
        whole("fox", steps=steps, cfg=3.0, seed=1)
    gpu.faults.replay = ""
    assert "a replayed graph gave another picture than plain execution" in caplog.records[0].getMessage()
    assert asked_again(whole, gpu, **QUICK)["launches"] == 3


def check_without_whole_pictures(
    pipe: Pipeline, expected: Expected, gpu: Gpu, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """Launched call by call, right pictures, one warning for the whole pipeline."""
    with caplog.at_level(logging.WARNING, "sdrt"):
        for steps in (3, 4, 3):
            same(pipe, expected, steps=steps, cfg=3.0, seed=5)
    (warning,) = caplog.records
    assert warning.getMessage().startswith("pictures are launched call by call in this pipeline: ")
    assert why in warning.getMessage()
    gpu.faults.capture = ""
    assert asked_again(pipe, gpu, **QUICK)["launches"] == 3


def test_no_memory_for_a_whole_picture(
    whole: Pipeline, expected: Expected, gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    """That costs no picture, and is no reason to warn."""
    whole("fox", steps=9, cfg=3.0, seed=1)
    for fault in ("allocation", "no_context"):
        setattr(gpu.faults, fault, 1)
        same(whole, expected, steps=3 if fault == "allocation" else 4, cfg=3.0, seed=5)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert gpu.used_bytes() == kept_bytes(whole)


def test_warming_up_for_few_steps(whole: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """The graph of a picture is for its number of calls."""
    settings: dict[str, Any] = {"steps": 4, "cfg": 3.0, "sampler": "heun"}
    whole.warm_up("fox", **settings)
    with gpu.counted() as counts:
        same(whole, expected, **settings, seed=5)
    assert counts == ONE


def test_graphs_of_whole_pictures_are_bounded(whole: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """The four used last are kept with a step, and go with it."""

    def captures(steps: int) -> int:
        with gpu.counted() as counts:
            same(whole, expected, steps=steps, cfg=3.0, seed=5)
        return counts.get("captures", 0)

    assert [captures(steps) for steps in (1, 2, 3, 4, 1, 5, 1, 3, 2)] == [2 + 1, 1, 1, 1, 0, 1, 0, 0, 1]
    engine_of(whole).plans.close_idle(0)
    assert gpu.used_bytes() == kept_bytes(whole)


def test_who_times_calls_gets_them_one_by_one(gpu: Gpu, bundle: Path) -> None:
    """Unless whole pictures were asked for."""

    class Observer:
        def __init__(self) -> None:
            self.parts: list[str] = []

        def count(self, what: str) -> None:
            """Nothing to do."""

        def around(self, graph: str, stream: Any, start: Callable[[], None]) -> None:
            self.parts.append(graph)
            start()

    for asked, parts in ((None, [STEP] * 3 + [VAE_DECODER]), (True, ["picture"])):
        observer = Observer()
        with load(bundle, whole_picture=asked) as pipe:
            pipe("fox", **QUICK)
            engine_of(pipe).plans.watched.observer = observer
            pipe("fox", **QUICK)
        assert observer.parts == parts


# Kernels that TensorRT-RTX compiles


def test_kernels_are_compiled_once(gpu: Gpu, bundle: Path, expected: Expected) -> None:
    """Once for each graph and each of its shapes, whatever number of contexts, batches, pipelines and processes."""
    with load(bundle) as pipe:
        same(pipe, expected, **QUICK)
        first = len(gpu.compiled)
        assert first == 2 * len(LOADED), "of each graph those for all shapes, and those for this one"
        streams = [pipe.stream("fox", **QUICK) for _ in range(2)]
        for stream in streams:
            next(stream)
        assert len(gpu.compiled) == first
        for stream in streams:
            stream.close()
    with load(bundle) as pipe:  # as another process would
        same(pipe, expected, **QUICK)
        assert len(gpu.compiled) == first
        same(pipe, expected, size=(72, 96), **QUICK)
        assert len(gpu.compiled) == first + 2, "the step's and the decoder's for another size"
    with load(bundle) as pipe:
        same(pipe, expected, size=(72, 96), **QUICK)
        assert len(gpu.compiled) == first + 2


def kept_kernels() -> Path:
    (entry,) = (cache_folder() / "kernels").iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["data", "sha256"]
    return entry


def test_nothing_is_written_where_nothing_was_compiled(gpu: Gpu, bundle: Path) -> None:
    written = set()
    for _ in range(2):
        with load(bundle) as pipe:
            for _ in range(2):
                pipe("fox", **QUICK)
                written.add((kept_kernels() / "data").stat().st_mtime_ns)
    assert len(written) == 1


@pytest.mark.parametrize("change", [{"driver_cuda": 14000}, {"name": "NVIDIA Other"}, {"__version__": "1.6.0.1"}])
def test_kernels_of_another_machine(
    gpu: Gpu, bundle: Path, expected: Expected, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    """Another driver, or a cache that came from elsewhere: TensorRT-RTX takes nothing of it. The kernels are compiled
    again, which is said once, and kept in its place.
    """
    gpu.set_current(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in change.items():
            patch.setattr(tensorrt_simulator if name.startswith("_") else gpu, name, value)
        elsewhere = tensorrt_simulator.IRuntimeCache._make(gpu)
        elsewhere._kernels.add("of another machine")
        blob = bytes(elsewhere.serialize())
    write_entry("kernels", "1.7.1.116-NVIDIA-Simulated-sm_89", blob)
    for _ in range(2):
        with load(bundle) as pipe:
            same(pipe, expected, **QUICK)
        assert len(gpu.compiled) == 2 * len(LOADED)
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "the kernels kept for NVIDIA Simulated, sm_89 are of another driver, GPU or TensorRT-RTX: they are compiled"
        " again, once"
    )
    assert "of another machine" not in (kept_kernels() / "data").read_text()


def test_i5_changed_kernels_are_not_loaded(gpu: Gpu, bundle: Path, expected: Expected) -> None:
    """They are native code: TensorRT-RTX does not see them."""
    with load(bundle) as pipe:
        pipe("fox", **QUICK)
    kept, first = kept_kernels(), len(gpu.compiled)
    data = bytearray((kept / "data").read_bytes())
    data[len(data) // 2] ^= 1
    (kept / "data").write_bytes(data)
    with load(bundle) as pipe:
        same(pipe, expected, **QUICK)
    assert len(gpu.compiled) == 2 * first
    with load(bundle) as pipe:
        same(pipe, expected, **QUICK)
    assert len(gpu.compiled) == 2 * first, "and a whole one has taken their place"


# State left behind


def nan_job(pipe: Pipeline) -> Job:
    """A job that fills every register with NaN."""
    rows = plan_rows("euler", "normal", 3, pipe.bundle.manifest.diffusion)
    latents = np.full((4, 8, 8), np.nan, np.float32)
    table = {**tables(rows, [[-2.0, 3.0]] * 3), "noise": np.full((3, 4, 8, 8), np.nan, np.float32)}
    return Job(
        table,
        {"init": latents, "init_noise": latents, "mask": latents[:1]},
        ({"context": np.full((2, 77, 64), np.nan, np.float32)},),
        (0,) * 3,
    )


def sized_job(pipe: Pipeline, size: tuple[int, int]) -> Job:
    """A job of one row for a size in pixels."""
    (job,) = jobs_of_contexts(pipe.bundle, (0,) * 3)
    width, height = (side // 8 for side in size)
    zeros = np.zeros((4, height, width), np.float32)
    noise = np.zeros((3, 4, height, width), np.float32)
    return replace(
        job, tables={**job.tables, "noise": noise}, inputs={"init": zeros, "init_noise": zeros, "mask": zeros[:1]}
    )


@pytest.mark.parametrize("calls", [2, 3])
def test_stale_nan(pipe: Pipeline, expected: Expected, calls: int) -> None:
    """Left in every register, on the device and in the pinned memory of either side."""
    batch, slots = joined(pipe, [nan_job(pipe)])
    for _ in range(calls):
        batch.step()
    assert np.isnan(batch.latents(slots)).all() and np.isnan(batch.denoised(slots)).all()
    _, finite = batch.decode(slots, 0.5)
    assert finite.tolist() == [False]
    batch.close()
    batch.close()
    same(pipe, expected, steps=4, cfg=3.0, seed=1, sampler="dpmpp_2m")


def test_buffers_taken_over_while_their_copies_are_queued(pipe: Pipeline) -> None:
    """The batch before was given up with its inputs still on their way from pinned memory."""
    job = nan_job(pipe)
    zeros, noise = (
        np.zeros((4, 8, 8), np.float32),
        np.random.RandomState(0).standard_normal((4, 8, 8)).astype(np.float32),
    )
    inputs = {"init": zeros, "init_noise": noise, "mask": zeros[:1]}
    good = replace(
        job,
        tables={**job.tables, "noise": np.zeros((3, 4, 8, 8), np.float32)},
        inputs=inputs,
        contexts=({"context": np.zeros((2, 77, 64), np.float32)},),
    )
    latents = []
    for first in (good, job):
        given_up, _ = joined(pipe, [first])
        given_up.step()
        given_up.close()
        latents.append(run(pipe, [good])[0])
    assert np.isfinite(latents).all() and np.array_equal(*latents)


def test_picture_that_is_not_finite(pipe: Pipeline, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = nan_job(pipe)
    with monkeypatch.context() as patched:
        patched.setattr(pipe, "_jobs", lambda *_: [broken])
        with pytest.raises(NonFiniteError, match=r"latents of seeds \[5\]"):
            pipe("fox", **QUICK)
    same(pipe, expected, **QUICK)


def test_use_after_close(pipe: Pipeline) -> None:
    batch, slots = joined(pipe, [nan_job(pipe)])
    batch.close()
    for use in (
        batch.step,
        lambda: batch.latents(slots),
        lambda: batch.denoised(slots),
        lambda: batch.decode(slots, 0.5),
    ):
        with pytest.raises(UsageError, match="passed already"):
            use()


def test_batch_left_to_the_garbage_collector(pipe: Pipeline, gpu: Gpu) -> None:
    pipe("fox", **QUICK)
    with gpu.counted() as counts:
        for _ in range(2):
            joined(pipe, [nan_job(pipe)])[0].step()
    assert "allocations" not in counts and counts["launches"] == 2


def test_job_that_does_not_fit(pipe: Pipeline, expected: Expected) -> None:
    """It is refused before anything is written, and its slot stays free."""
    job = nan_job(pipe)
    batch: RunningBatch = engine_of(pipe).open(job.shape, 1)
    for name, wrong in (
        ("mask", replace(job, inputs={**job.inputs, "mask": np.zeros((1, 3, 3), np.float32)})),
        ("noise", replace(job, tables={**job.tables, "noise": np.zeros((2, 4, 8, 8), np.float32)})),
        ("context 0", replace(job, contexts=({"context": np.zeros((3, 77, 64), np.float32)},))),
        ("concat", replace(job, inputs={**job.inputs, "concat": np.zeros((2, 5, 8, 8), np.float32)})),
    ):
        with pytest.raises(UsageError, match=f"step: {name}: shape .*, this batch takes"):
            batch.join(wrong)
    assert batch.join(job) == 0
    with pytest.raises(UsageError, match="all 1 slots are taken"):
        batch.join(job)
    batch.close()
    same(pipe, expected, **QUICK)


def test_idle_slots_are_bounded(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """Four shapes are kept, the least recently used goes first."""

    def captures(size: tuple[int, int]) -> int:
        with gpu.counted() as counts:
            same(pipe, expected, size=size, steps=1, cfg=1.0, seed=1)
        assert len(engine_of(pipe).plans.idle) <= 4
        return counts.get("captures", 0)

    a, b, c, d, e = [(64, side) for side in (96, 64, 72, 80, 88)]  # the largest first: activations do not grow
    assert [captures(size) for size in (a, b, c, d, a, e, a, c, b)] == [2, 2, 2, 2, 0, 2, 0, 0, 2]


def test_buffers_are_bounded(pipe: Pipeline, gpu: Gpu) -> None:
    sizes = [(width, height) for width in (64, 72) for height in (64, 72, 80, 88, 96)]
    used = []
    for _ in range(3):
        for size in sizes:
            pipe("fox", size=size, steps=1, cfg=1.0, seed=1)
        used.append((gpu.used_bytes(), gpu.used_bytes("pinned")))
    assert used[1] == used[2]  # in the first turn activations grow


def test_many_streams_at_once(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    settings = {"steps": 3, "cfg": 1.0, "seed": 2}
    streams = [pipe.stream("fox", **settings) for _ in range(7)]  # type: ignore[arg-type]
    for last in list(zip(*streams, strict=True))[-1]:
        assert last.result is not None and np.array_equal(last.result.images, expected(**settings))
    del streams, last
    same(pipe, expected, **settings)
    assert len(engine_of(pipe).plans.idle) <= 4


def test_closing_gives_everything_back(gpu: Gpu, bundle: Path) -> None:
    pipe = load(bundle)
    pipe("fox", **QUICK)
    stream = pipe.stream("sun", **QUICK)
    next(stream)
    stream.close()  # its copies are still queued
    assert gpu.used_bytes() and gpu.used_bytes("pinned")
    gc.disable()
    try:
        pipe.close()
        assert (gpu.used_bytes(), gpu.used_bytes("pinned")) == (0, 0), "without waiting for the garbage collector"
    finally:
        gc.enable()
    with pytest.raises(ClosedError, match="closed"):
        pipe("fox", **QUICK)


def test_t7_stream_outlives_its_pipeline(gpu: Gpu, bundle: Path, expected: Expected) -> None:
    pipe = load(bundle)
    stream = pipe.stream("fox", **QUICK)
    next(stream)
    pipe.close()
    *_, last = stream
    assert last.result is not None and np.array_equal(last.result.images, expected(**QUICK))


# CUDA graphs off


@pytest.mark.parametrize("fault", ["refused", "invalidated", "instantiate", "not capturable"])
def test_t8_capture_fails(
    pipe: Pipeline, expected: Expected, gpu: Gpu, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    gpu.faults.capture = fault
    check_without_graphs(pipe, expected, gpu, caplog, "capturing failed")


@pytest.mark.parametrize("fault", ["wrong", "nothing"])
def test_replay_differs(
    pipe: Pipeline, expected: Expected, gpu: Gpu, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    gpu.faults.replay = fault
    check_without_graphs(pipe, expected, gpu, caplog, "other numbers than plain execution")


@pytest.mark.parametrize("fault", ["refused", "invalidated", "instantiate"])
def test_capture_that_fails_once(pipe: Pipeline, expected: Expected, gpu: Gpu, fault: str) -> None:
    """Whatever another part of the process did meanwhile may have broken it: it is tried again."""
    gpu.faults.capture, gpu.faults.captures = fault, 1
    same(pipe, expected, **QUICK)


@pytest.mark.parametrize("drift", ["first run", "replays"])
def test_numbers_that_differ_a_little(pipe: Pipeline, gpu: Gpu, drift: str) -> None:
    """Kernels of the first run with new shapes may be others, and sums of atomic additions differ in the last bit."""
    gpu.faults.drift = drift
    assert pipe("fox", **QUICK).engine["cuda_graphs"] is True


@pytest.mark.parametrize(("fault", "graphs"), [("", True), ("nothing", False)])
def test_replay_is_checked_where_numbers_are_not_finite(
    pipe: Pipeline, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, fault: str, graphs: bool
) -> None:
    """A network that overflows on the numbers of the check keeps its graphs, if a replay overflows too."""
    real = CapturedStep.fill_for_check

    def overflow(step: CapturedStep, stream: Any) -> None:
        real(step, stream)
        stream.sync()
        registers = step.inputs.host("registers")
        registers[:, 0] = np.nan
        step.inputs.upload(stream, "registers", "registers")

    monkeypatch.setattr(CapturedStep, "fill_for_check", overflow)
    gpu.faults.replay = fault
    assert pipe("fox", **QUICK).engine["cuda_graphs"] is graphs


def test_collector_within_a_capture(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """It would free buffers of others on the thread that captures, which spoils the capture: it is off meanwhile."""
    gpu.faults.garbage = True
    own = engine_of(pipe).plans
    for size in ((64, 64), (72, 96)):
        cycle: list[Any] = [own.block([("bytes", (64,), np.uint8)])]
        cycle.append(cycle)
        del cycle
        same(pipe, expected, size=size, **QUICK)
        assert gc.isenabled()


def test_pinned_memory_left_to_the_collector(pipe: Pipeline, gpu: Gpu) -> None:
    """It waits for the stream whose copies use it, not for the default stream."""
    own = engine_of(pipe).plans
    with own.guarded(STEP):
        block = own.block([("bytes", (64,), np.uint8)])
        block.upload(own.stream, "bytes", "bytes")
        del block
        gc.collect()
        own.stream.sync()
    assert gpu.used_bytes("pinned") == 0


def check_without_graphs(
    pipe: Pipeline, expected: Expected, gpu: Gpu, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """Plain launches, right pictures, one warning for the whole pipeline."""
    with caplog.at_level(logging.WARNING, "sdrt"):
        for size in ((64, 64), (72, 96), (64, 64)):
            result = pipe("fox", size=size, **QUICK)
            assert np.array_equal(result.images, expected(size=size, **QUICK))
            assert result.engine["cuda_graphs"] is False
    (warning,) = caplog.records
    assert warning.getMessage().startswith("CUDA graphs are off for this pipeline: ") and why in warning.getMessage()
    with gpu.counted() as counts:
        pipe("fox", **QUICK)
    assert counts == {"runs": 3 + 1, "h2d": 2, "d2h": 1, "d2d": 1, "syncs": 1, "records": 4, "events": 3, "polls": 2}


def test_memory_runs_out_during_capture(pipe: Pipeline, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is not a reason to give graphs up."""
    real = cuda_simulator.GraphBuilder.complete

    def once(self: Any, options: Any = None) -> Any:
        monkeypatch.setattr(cuda_simulator.GraphBuilder, "complete", real)
        raise cuda_simulator.CUDAError("CUDA_ERROR_OUT_OF_MEMORY: no room for the graph")

    monkeypatch.setattr(cuda_simulator.GraphBuilder, "complete", once)
    with pytest.raises(ResourceError, match="step: out of device memory"):
        pipe("fox", **QUICK)
    same(pipe, expected, **QUICK)


# TensorRT says no


@pytest.mark.parametrize("graph", LOADED)
def test_t9_execute_refuses(pipe: Pipeline, expected: Expected, gpu: Gpu, graph: str) -> None:
    for _ in range(2):
        gpu.faults.runs[graph] = 1
        with pytest.raises(MachineError, match=f"{graph}: TensorRT refused to run.*: {graph}: a fault on purpose"):
            pipe("sun", **QUICK)
    same(pipe, expected, **QUICK)  # nothing of the failed call is still in flight


def test_execute_refuses_without_graphs(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    gpu.faults.capture = "refused"
    pipe("fox", **QUICK)
    gpu.faults.runs[STEP] = 2
    with pytest.raises(MachineError, match="step: TensorRT refused to run"):
        pipe("sun", **QUICK)
    assert np.array_equal(pipe("fox", **QUICK).images, expected(**QUICK))


def test_no_context(gpu: Gpu, bundle: Path, expected: Expected) -> None:
    gpu.faults.no_context = 1
    with pytest.raises(ResourceError, match=r"no memory left for another execution context: .*persistent memory"):
        load(bundle)
    with load(bundle) as pipe:
        gpu.faults.no_context = 2
        with pytest.raises(ResourceError, match=r"step: .*no memory left"):
            pipe("fox", **QUICK)
        same(pipe, expected, **QUICK)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(128, 64), (64, 56 + 64)])
def test_shape_outside_the_profile(
    pipe: Pipeline, expected: Expected, gpu: Gpu, batch: int, size: tuple[int, int]
) -> None:
    pipe("fox", **QUICK)
    used = gpu.used_bytes()
    wanted = f"--size {size[0]}x{size[1]} --batch {batch} --tokens 77 --branches 2"
    with pytest.raises(
        MissingEngineError,
        match=f"^no tensorrt-rtx engine for {wanted}; there is: 64x64 to 96x96, batch 1 to 3, 77 tokens",
    ) as caught:
        pipe("fox", size=size, batch=batch, count=batch, steps=2, cfg=3.0, seed=1)
    assert re.search(f"{COMMAND} {wanted}", caught.value.fix)
    assert caught.value.data["wanted"] == {"size": size, "batch": batch, "tokens": 77, "branches": 2}
    assert gpu.used_bytes() == used, "while the error is still held"
    same(pipe, expected, **QUICK)


def test_batch_outside_the_profile(pipe: Pipeline) -> None:
    with pytest.raises(MissingEngineError, match="no tensorrt-rtx engine for --size 64x64 --batch 4") as caught:
        pipe("fox", batch=4, count=4, **QUICK)
    assert "--batch" in caught.value.fix


def test_branches_outside_the_engine(gpu: Gpu, small_bundle: Path, blank: Path, expected: Expected) -> None:
    compile_engine(blank, graphs=small_bundle, branches=(2,))
    with load(blank) as pipe:
        with pytest.raises(MissingEngineError, match=r"--branches 1; there is: .* 2 guidance branches"):
            pipe("fox", cfg=1.0, steps=2, seed=1)
        same(pipe, expected, **QUICK)


def test_shape_outside_the_profile_as_the_engine_meets_it(
    pipe: Pipeline, gpu: Gpu, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline asks first. What does not is refused all the same, and leaves nothing on the device."""
    pipe("fox", **QUICK)
    used = gpu.used_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(engine_of(pipe), "serves", lambda shape: True)
        with pytest.raises(
            MissingEngineError, match=r"step: \w+: shape \[.*\], the engine was compiled for \[.*\] to \["
        ):
            pipe("fox", size=(128, 64), steps=2, cfg=3.0, seed=1)
    assert gpu.used_bytes() == used
    same(pipe, expected, **QUICK)


def test_a_shape_without_an_engine_falls_back(bundle: Path, gpu: Gpu, expected: Expected) -> None:
    """Where that was asked for, and nowhere else: `compile`, the command's default, is an error here."""
    large: dict[str, Any] = {"size": (128, 64), "steps": 2, "cfg": 3.0, "seed": 1}
    with load(bundle, on_missing="fallback") as pipe:
        found = pipe("fox", **large)
        assert (found.engine["backend"], found.engine["instead_of"]) == ("onnxruntime", "tensorrt-rtx")
        assert np.array_equal(found.images, expected(**large))
        same(pipe, expected, **QUICK)
    with (
        load(bundle, on_missing="compile") as pipe,
        pytest.raises(MissingEngineError, match="no tensorrt-rtx engine for --size 128x64"),
    ):
        pipe("fox", **large)


# Out of memory


@pytest.mark.parametrize("nth", [1, 3])
def test_d5_no_memory_at_load(gpu: Gpu, bundle: Path, expected: Expected, nth: int) -> None:
    """TensorRT finds none for weights: it says no, and why in its log."""
    gpu.faults.no_weights = nth
    with pytest.raises(ResourceError, match=r"cannot load this plan: out of memory: weights") as caught:
        load(bundle)
    assert "compile for a smaller --size" in caught.value.fix
    assert gpu.taken_bytes() == 0
    with load(bundle) as pipe:
        same(pipe, expected, **QUICK)


def memory_needed(bundle: Path) -> tuple[int, int]:
    """Bytes of an engine's plans that are loaded at once, and of its largest batch: state, and the activations of the
    graph that needs most. They are shared, and the encoder of images is loaded later.
    """
    (folder,) = (bundle / "engines").iterdir()
    record = read_engine(folder)
    plans = [record.plans[graph] for graph in LOADED]
    return sum(plan.size_bytes for plan in plans), record.state_bytes + max(
        plan.device_memory_bytes or 0 for plan in plans
    )


def test_memory_is_checked_before_load(gpu: Gpu, small_bundle: Path, blank: Path) -> None:
    compile_engine(blank, graphs=small_bundle)
    needed = sum(memory_needed(blank))
    gpu.memory_bytes = needed - 1
    with pytest.raises(ResourceError, match=f"needs about {needed:,} bytes on the GPU, {needed - 1:,} are free"):
        load(blank)
    assert gpu.counts["engines"] == 0
    gpu.memory_bytes = needed
    load(blank).close()


def test_memory_is_checked_again_after_load(gpu: Gpu, small_bundle: Path, blank: Path) -> None:
    """Activations of an engine that was made ahead of time are not known before."""
    folder = compile_engine(blank, graphs=small_bundle)
    record = read_engine(folder)
    unknown = {graph: replace(plan, device_memory_bytes=None) for graph, plan in record.plans.items()}
    plans = {graph: read_plan(folder, record, graph) for graph in record.plans}
    plans_bytes, batch_bytes = memory_needed(blank)
    write_engine(open_bundle(blank), replace(record, plans=unknown), plans)
    gpu.memory_bytes = plans_bytes + batch_bytes - 1
    with pytest.raises(ResourceError, match=f"needs about {batch_bytes:,} bytes .*, {batch_bytes - 1:,} are free"):
        load(blank)
    assert gpu.counts["engines"] == 3 and gpu.taken_bytes() == 0


def test_memory_for_a_range_of_shapes(
    gpu: Gpu, bundle: Path, expected: Expected, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine for large batches draws a small picture where only that one has room, and says so."""
    plans_bytes, batch_bytes = memory_needed(bundle)
    gpu.memory_bytes = plans_bytes + batch_bytes // 2
    with load(bundle) as pipe:
        same(pipe, expected, **QUICK)
        with pytest.raises(ResourceError, match="step: out of device memory"):
            pipe("fox", size=(96, 96), batch=3, count=3, **QUICK)
        same(pipe, expected, **QUICK)
    (warning,) = caplog.records
    assert f"needs about {batch_bytes:,} bytes on the GPU" in warning.getMessage()
    assert warning.getMessage().endswith("that is for its largest batch, smaller ones may fit")
    gpu.memory_bytes = plans_bytes - 1
    with pytest.raises(ResourceError, match=f"needs about .* bytes on the GPU, {plans_bytes - 1:,} are free"):
        load(bundle)


def test_activations_are_those_of_the_shapes_in_use(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """One block for all, as large as the largest graph needs it at the sizes met so far. Where it grows the idle steps,
    whose graphs hold the smaller one, are made again once.
    """
    largest = ACTIVATION_BYTES[VAE_DECODER]

    def drawn(size: tuple[int, int]) -> tuple[int, int]:
        """Captures that a picture took, and bytes of activations after it."""
        with gpu.counted() as counts:
            same(pipe, expected, size=size, **QUICK)
        return counts.get("captures", 0), engine_of(pipe).plans._activations.size_bytes

    captures, small = drawn((64, 64))
    assert captures == 2 and small < largest / 2
    assert drawn((96, 96)) == (2, largest)
    assert drawn((64, 64)) == (2, largest)
    assert drawn((96, 96)) == drawn((64, 64)) == (0, largest)


def kept_bytes(pipe: Pipeline) -> int:
    """Device memory that a pipeline keeps between pictures, by its own books."""
    own = engine_of(pipe).plans
    steps = [block for step in own.idle for block in (step.inputs, step.outputs)]
    blocks = [*(held.block for held in own._blocks.values()), *steps]
    activations = 0 if own._activations is None else own._activations.size_bytes
    return activations + sum(block.layout.size_bytes for block in blocks)


def test_activations_grow_under_a_running_batch(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """Its graphs go on in the block that they were captured with, which is freed with the last step that holds it."""
    running = pipe.stream("fox", **QUICK)
    next(running)
    small = engine_of(pipe).plans._activations
    same(pipe, expected, size=(96, 96), **QUICK)
    *_, last = running
    assert last.result is not None and np.array_equal(last.result.images, expected(**QUICK))
    del running, last
    assert gpu.used_bytes() == kept_bytes(pipe) + small.size_bytes
    with gpu.counted() as counts:
        same(pipe, expected, **QUICK)
    assert counts["captures"] == 2 and gpu.used_bytes() == kept_bytes(pipe)


def test_one_allocation_of_activations_for_step_and_decoder(pipe: Pipeline, gpu: Gpu) -> None:
    """The step asks for what the decoder will need too: what it captures is never outgrown by its own picture."""
    pipe("fox", **QUICK)
    before = engine_of(pipe).plans._activations
    pipe("fox", **QUICK)
    (step,) = engine_of(pipe).plans.idle
    assert engine_of(pipe).plans._activations is before and not step.outgrown


@pytest.mark.parametrize("nth", range(1, 11))
def test_no_memory_at_the_first_picture(pipe: Pipeline, expected: Expected, gpu: Gpu, nth: int) -> None:
    """Four blocks, each on the device and pinned, and twice activations. Whichever does not fit, what had been taken is
    given back at once.
    """
    gpu.faults.allocation = nth
    kind = "page-locked host" if nth in (2, 5, 7, 10) else "device"
    with pytest.raises(ResourceError, match=f": out of {kind} memory: ") as caught:
        pipe("fox", **QUICK)
    assert "smaller --size or --batch" in caught.value.fix
    assert gpu.used_bytes() == kept_bytes(pipe), "while the error is still held"
    same(pipe, expected, **QUICK)


def test_d5_no_memory_at_a_larger_shape(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    pipe("fox", **QUICK)
    gpu.memory_bytes = gpu.taken_bytes() + 1000
    for _ in range(2):
        with pytest.raises(ResourceError, match="step: out of device memory") as caught:
            pipe("fox", size=(96, 96), batch=3, count=3, steps=2, cfg=3.0, seed=1)
        same(pipe, expected, **QUICK)
        assert caught.value.exit_code == 6


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_d5_no_memory_in_a_step(pipe: Pipeline, expected: Expected, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """A graph's launch takes memory of the driver's own, which may have none."""
    pipe("fox", **QUICK)
    real, launches = cuda_simulator.Graph.launch, iter(range(1, 100))

    def launch(self: Any, stream: Any) -> None:
        if next(launches) == nth:
            raise cuda_simulator.CUDAError("CUDA_ERROR_OUT_OF_MEMORY: no room to launch the graph")
        real(self, stream)

    monkeypatch.setattr(cuda_simulator.Graph, "launch", launch)
    with pytest.raises(ResourceError, match=r"step: out of device memory: .*no room to launch") as caught:
        pipe("sun", steps=6, cfg=3.0, seed=1)
    assert "the pipeline stays usable" in caught.value.fix
    same(pipe, expected, **QUICK)


def test_idle_buffers_make_room(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """A picture that fits only without what is kept for other shapes is drawn."""
    large: dict[str, Any] = {"size": (96, 96), "steps": 2, "cfg": 3.0, "seed": 1}
    pipe("fox", **large)
    for height in (64, 72, 80):
        pipe("fox", size=(64, height), steps=1, cfg=3.0, seed=1)
    engine_of(pipe).plans.close_idle(0)
    pipe("fox", **QUICK)
    gpu.memory_bytes = gpu.used_bytes() + gpu.library_bytes + 700_000
    same(pipe, expected, **large)
    same(pipe, expected, **QUICK)


def test_memory_of_a_closed_pipeline_is_there_for_the_next(gpu: Gpu, bundle: Path, expected: Expected) -> None:
    """The device's pool keeps what is freed, unless it is told to give it back: neither a second pipeline nor
    TensorRT's own allocations would find it.
    """
    with load(bundle) as pipe:
        pipe("fox", size=(96, 96), batch=3, count=3, steps=2, cfg=3.0, seed=1)
        most = gpu.taken_bytes()
        same(pipe, expected, **QUICK)
    assert gpu.taken_bytes() == 0
    gpu.memory_bytes = most
    with load(bundle) as pipe:
        same(pipe, expected, **QUICK)


def test_freed_memory_is_there_for_tensorrt(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """A context takes memory of TensorRT's own: what idle steps gave up must leave the pool first."""
    pipe("fox", size=(96, 96), batch=3, count=3, steps=2, cfg=3.0, seed=1)
    gpu.context_bytes = 20_000
    gpu.memory_bytes = gpu.taken_bytes()
    same(pipe, expected, **QUICK)


def test_memory_is_given_back_where_loading_fails(gpu: Gpu, bundle: Path) -> None:
    """At once, while the error is still held."""
    gpu.faults.no_context = 2
    with pytest.raises(ResourceError, match="another execution context"):
        load(bundle)
    assert gpu.taken_bytes() == 0


@pytest.mark.parametrize("graphs", [True, False])
def test_steps_are_given_up_while_they_run(pipe: Pipeline, expected: Expected, gpu: Gpu, graphs: bool) -> None:
    """Their work is waited for first: TensorRT's contexts must not be destroyed under it."""
    gpu.faults.capture = "" if graphs else "refused"
    sizes = [(64, height) for height in (64, 72, 80)]
    batches = [joined(pipe, [sized_job(pipe, size)])[0] for size in sizes]
    for batch in batches:
        batch.step()
        batch.step()
    for batch in batches:
        batch.close()
    with engine_of(pipe).plans.guarded(STEP):
        engine_of(pipe).plans.close_idle(0)
    assert np.array_equal(pipe("fox", **QUICK).images, expected(**QUICK))


# A device that fails


@pytest.mark.parametrize("nth", [1, 2, 6, 8, 10])
def test_d6_illegal_address(pipe: Pipeline, gpu: Gpu, nth: int) -> None:
    """Whatever the failing kernel belongs to, and wherever the host meets the error: a clear text, and the pipeline is
    dead.
    """
    gpu.faults.illegal_address = nth
    with pytest.raises(MachineError, match="the GPU failed: CUDA_ERROR_ILLEGAL_ADDRESS") as caught:
        pipe("fox", steps=4, cfg=3.0, seed=1)
    assert "restart the process" in caught.value.fix
    for _ in range(2):
        with pytest.raises(MachineError, match="dead after a GPU failure: CUDA_ERROR_ILLEGAL_ADDRESS"):
            pipe("fox", **QUICK)


def test_illegal_address_seen_by_others(pipe: Pipeline, gpu: Gpu) -> None:
    """Streams that were on their way, a thread that waits, previews and closing all end in our errors."""
    pipe("fox", **QUICK)
    streams = [pipe.stream("fox", steps=9, cfg=3.0, seed=seed) for seed in (1, 2)]
    steps = [next(stream) for stream in streams]
    gpu.faults.illegal_address = 1
    with pytest.raises(MachineError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        for _ in range(4):
            next(streams[0])
    with pytest.raises(MachineError, match="dead"):
        next(streams[1])
    for step in steps:
        with pytest.raises((MachineError, UsageError)):
            step.preview()
    for stream in streams:
        stream.close()


def test_call_that_cuda_refuses(pipe: Pipeline, expected: Expected, gpu: Gpu) -> None:
    """That is an error of this call alone."""
    pipe("fox", **QUICK)
    gpu.faults.copy = 1
    with pytest.raises(MachineError, match=r"text_encoder: .*CUDA_ERROR_INVALID_VALUE"):
        pipe("sun", **QUICK)
    same(pipe, expected, **QUICK)


# Engines that do not fit


@pytest.mark.parametrize(
    ("graph", "damage"),
    [
        *((graph, "one byte") for graph in LOADED),
        *((LOADED[1], damage) for damage in ("truncated", "longer", "missing")),
    ],
)
def test_damaged_plan(gpu: Gpu, small_bundle: Path, blank: Path, graph: str, damage: str) -> None:
    """Refused before TensorRT sees it."""
    plan = compile_engine(blank, graphs=small_bundle) / f"{graph}.plan"
    data = bytearray(plan.read_bytes())
    plan.unlink()
    if damage == "one byte":
        data[-20] ^= 1
    if damage != "missing":
        plan.write_bytes({"truncated": data[:-1], "one byte": data, "longer": data + b"\n"}[damage])
    with pytest.raises(BundleError, match=rf"{graph}\.plan"):
        load(blank)
    assert gpu.counts["engines"] == LOADED.index(graph)


def test_damaged_plan_of_a_graph_that_is_not_loaded(gpu: Gpu, small_bundle: Path, blank: Path) -> None:
    (compile_engine(blank, graphs=small_bundle) / f"{VAE_ENCODER}.plan").unlink()
    load(blank).close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compiler": "1.6.0.1"}, r"built for TensorRT-RTX 1\.6\.0\.1, this machine has 1\.7\.1\.116"),
        ({"sm": "sm_86,sm_120"}, r"built for sm_86,sm_120, this GPU is NVIDIA Simulated, sm_89"),
        ({"target": "tensorrt"}, "no tensorrt-rtx engine fits: there is none"),
    ],
)
def test_b8_engine_of_another_machine(
    gpu: Gpu, small_bundle: Path, blank: Path, options: dict[str, Any], reason: str
) -> None:
    compile_engine(blank, graphs=small_bundle, **options)
    with pytest.raises(MachineError, match=reason) as caught:
        load(blank)
    assert caught.value.fix == f"Make one here with: sdrt compile {blank} --target tensorrt-rtx --sm 89"
    assert gpu.counts["engines"] == 0


def test_gpu_that_tensorrt_rtx_has_no_kernels_for(gpu: Gpu, bundle: Path) -> None:
    """The way on is the other target, not the same command once more."""
    gpu.name, gpu.sm = "NVIDIA H200", (9, 0)
    with pytest.raises(
        MachineError, match="backend tensorrt-rtx: TensorRT-RTX has no kernels for NVIDIA H200, sm_90"
    ) as caught:
        load(bundle)
    assert "pip install 'tensorrt>=11'" in caught.value.fix
    assert caught.value.fix.endswith(f"sdrt compile {bundle} --target tensorrt")


@pytest.fixture
def data_centre() -> Iterator[Gpu]:
    """A GPU that has enterprise TensorRT."""
    with installed(
        Gpu(name="NVIDIA H200", sm=(9, 0), enterprise=True),
        cuda_simulator.modules() | tensorrt_simulator.enterprise_modules(),
    ) as simulated:
        yield simulated


def test_b8_enterprise_tensorrt(data_centre: Gpu, small_bundle: Path, blank: Path, expected: Expected) -> None:
    """An engine runs on the model of GPU that it was built on. One of the same generation is another model."""
    compile_engine(blank, graphs=small_bundle, target="tensorrt", sm="NVIDIA H100 80GB HBM3, sm_90")
    with pytest.raises(
        MachineError, match="built for NVIDIA H100 80GB HBM3, sm_90, this GPU is NVIDIA H200, sm_90"
    ) as caught:
        Pipeline.load(blank, backend="tensorrt")
    assert caught.value.fix == f"Make one here with: sdrt compile {blank} --target tensorrt"
    compile_engine(blank, graphs=small_bundle, target="tensorrt", sm="NVIDIA H200, sm_90")
    with Pipeline.load(blank, backend="tensorrt") as pipe:
        same(pipe, expected, **QUICK)


@pytest.mark.parametrize("changed", ["graphs", "weights"])
def test_engine_of_another_bundle(gpu: Gpu, bundle: Path, blank: Path, changed: str) -> None:
    (folder,) = (bundle / "engines").iterdir()
    record = read_engine(folder)
    digest = "0" * 64
    key = (
        replace(record.key, weights=digest)
        if changed == "weights"
        else replace(record.key, graphs=record.key.graphs | {STEP: digest})
    )
    write_engine(
        open_bundle(blank),
        replace(record, key=key),
        {graph: read_plan(folder, record, graph) for graph in record.plans},
    )
    with pytest.raises(MachineError, match=f"built for {changed} that have changed") as caught:
        load(blank)
    assert "sdrt compile" in caught.value.fix


def test_no_engine(gpu: Gpu, blank: Path) -> None:
    with pytest.raises(MachineError, match="no tensorrt-rtx engine fits: there is none") as caught:
        load(blank)
    assert "sdrt compile" in caught.value.fix


def test_engine_that_fits_among_others(gpu: Gpu, small_bundle: Path, blank: Path, expected: Expected) -> None:
    fits = compile_engine(blank, graphs=small_bundle)
    compile_engine(blank, graphs=small_bundle, sm="sm_120")
    compile_engine(blank, graphs=small_bundle, compiler="1.8.0.1")
    with load(blank) as pipe:
        assert pipe("fox", **QUICK).engine["engine"] == fits.name
        same(pipe, expected, **QUICK)


def test_plan_that_tensorrt_cannot_load(gpu: Gpu, bundle: Path) -> None:
    gpu.faults.no_engine = True
    with pytest.raises(
        MachineError, match=r"step: TensorRT 1\.7\.1\.116 cannot load this plan: IRuntime::deserializeCudaEngine"
    ) as caught:
        load(bundle)
    assert "sdrt compile" in caught.value.fix


@pytest.mark.parametrize(
    ("problems", "kind", "words", "fix"),
    [
        (1 | 2, MachineError, "another version made it, it has no kernels for this GPU", "sdrt compile"),
        (4, MachineError, "the driver is too old for it", "Update the NVIDIA driver"),
        (16, ResourceError, "the GPU has too little memory", "Close other programs"),
        (1 << 20, MachineError, "it gives no reason", "sdrt compile"),
    ],
)
def test_plan_whose_header_does_not_fit(
    gpu: Gpu, bundle: Path, problems: int, kind: type[Exception], words: str, fix: str
) -> None:
    """TensorRT-RTX is asked before the plan is loaded, and says why."""
    gpu.faults.problems = problems
    with pytest.raises(kind, match=f"step: .* this plan does not run here: {words}") as caught:
        load(bundle)
    assert fix in caught.value.fix  # type: ignore[attr-defined]
    assert gpu.counts["engines"] == 0


def test_words_of_earlier_calls_are_not_told(pipe: Pipeline, gpu: Gpu) -> None:
    """Nor does a message of a call that went well end up in an error that is ours alone."""
    gpu.faults.runs[STEP] = 1
    with pytest.raises(MachineError, match="a fault on purpose"):
        pipe("sun", **QUICK)
    gpu.faults.allocation = 1
    with pytest.raises(ResourceError) as caught:
        pipe("fox", size=(72, 72), **QUICK)
    assert "on purpose" not in str(caught.value)


# Machines that do not fit


@pytest.mark.parametrize("module", ["tensorrt_rtx", "cuda.core"])
def test_missing_module(gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError, match=f"backend tensorrt-rtx: .*{module}") as caught:
        load(bundle)
    assert (
        caught.value.fix == "Install it with: pip install 'tensorrt-rtx-cu12>=1.7' 'cuda-core>=1.2' 'cuda-bindings>=13'"
    )


def test_cuda_core_of_old(gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["cuda.core"], "Device")
    with pytest.raises(MachineError, match="backend tensorrt-rtx: cuda-core is too old") as caught:
        load(bundle)
    assert "pip install --upgrade" in caught.value.fix


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"driver_cuda": 0, "devices": 0}, r"no NVIDIA driver is loaded \(cudaErrorInsufficientDriver\)"),
        ({"driver_cuda": 12080}, r"the driver supports CUDA 12\.8 only \(cudaErrorInsufficientDriver\)"),
        ({"devices": 0}, r"the driver finds no device \(cudaErrorNoDevice\)"),
    ],
)
def test_machine_without_a_gpu_that_answers(gpu: Gpu, bundle: Path, machine: dict[str, int], words: str) -> None:
    vars(gpu).update(machine)
    with pytest.raises(MachineError, match=f"backend tensorrt-rtx: no GPU answers: {words}") as caught:
        load(bundle)
    assert "nvidia.com/drivers" in caught.value.fix and "sdrt doctor" in caught.value.fix
    with pytest.raises(MachineError, match="no GPU answers"):
        Pipeline.load(bundle, backend="tensorrt-rtx", on_missing="fallback")


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        (("tensorrt-rtx-cu12", "tensorrt-rtx-cu13"), "are installed together and overwrite each other"),
        (("tensorrt-rtx-cu14",), r"tensorrt-rtx-cu14 needs a driver for CUDA 14, this one supports 13\.0"),
    ],
)
def test_packages_that_do_not_go_together(
    gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: "1.7.1.116" if package in packages else "")
    row = replace(TARGETS["tensorrt-rtx"], packages=packages)
    monkeypatch.setitem(TARGETS, "tensorrt-rtx", row)
    with pytest.raises(MachineError, match=f"backend tensorrt-rtx: .*{words}"):
        load(bundle)
    assert gpu.counts["engines"] == 0


def test_devices(bundle: Path, expected: Expected) -> None:
    with installed(Gpu(devices=2), cuda_simulator.modules() | tensorrt_simulator.modules()) as gpu:
        with pytest.raises(MachineError, match="backend tensorrt-rtx: device 2: this machine has 2") as caught:
            load(bundle, device=2)
        assert caught.value.fix == "Choose 0 to 1."
        with load(bundle, device=1) as pipe:
            same(pipe, expected, **QUICK)
        assert gpu._threads.device == 1


def test_auto(gpu: Gpu, bundle: Path, small_bundle: Path, blank: Path) -> None:
    """TensorRT where there is an engine and a GPU, else ONNX Runtime; an engine that does not fit is never passed over
    in silence.
    """
    for path, devices, backend in ((bundle, 1, "tensorrt-rtx"), (bundle, 0, "onnxruntime"), (blank, 1, "onnxruntime")):
        gpu.devices = devices
        with Pipeline.load(path) as pipe:
            assert engine_of(pipe).backend == backend
    compile_engine(blank, graphs=small_bundle, sm="sm_120")
    with pytest.raises(MachineError, match="this GPU is NVIDIA Simulated, sm_89"):
        Pipeline.load(blank)
