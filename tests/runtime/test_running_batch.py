"""Pictures that differ in everything but their shape, in one running batch: each comes out as if it were alone, to the
last bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cuda_simulator
import numpy as np
import pytest
import tensorrt_simulator
from cuda_simulator import installed
from gpu_simulator import Gpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_plans import compile_engine

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import STEP
from sdrt.bundle.manifest import Diffusion
from sdrt.errors import UsageError
from sdrt.runtime.backend import load_engine
from sdrt.runtime.backends.onnxruntime import engine as onnxruntime
from sdrt.runtime.backends.tensorrt.blocks import Block
from sdrt.runtime.engine import Engine, Float, Job, tables
from sdrt.runtime.sampling.noise import draw_noise
from sdrt.runtime.sampling.registry import SAMPLERS, plan_rows

ROWS, CAPACITY = 3, 3
"""Few table rows, so that most pictures are given more on the way."""
SHAPE = (4, 8, 8)


@dataclass(frozen=True)
class Picture:
    sampler: str
    steps: int
    cfg: float
    seed: int
    strength: float | None
    masked: bool
    compat: str
    edited: bool
    """Whether the prompt changes half-way."""


@dataclass(frozen=True)
class Visit:
    """A picture that comes `after` steps of the batch, stays `lingers` steps beyond its last row, or leaves after
    `cancelled` of its rows.
    """

    picture: Picture
    after: int
    lingers: int
    cancelled: int | None


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    compat = draw(st.sampled_from(["a1111", "diffusers"]))
    names = [name for name, sampler in SAMPLERS.items() if compat == "a1111" or sampler.diffusers is not None]
    strength = draw(st.sampled_from([None, 0.6, 0.9]))
    cfg = draw(st.sampled_from([1.0, 3.0, 7.5]))
    return Picture(
        draw(st.sampled_from(names)),
        draw(st.integers(4, 6)),
        cfg,
        draw(st.integers(0, 3)),
        strength,
        strength is not None and draw(st.booleans()),
        compat,
        draw(st.booleans()),
    )


VISITS = st.lists(
    st.builds(Visit, pictures(), st.integers(0, 5), st.integers(0, 2), st.none() | st.integers(0, 4)),
    min_size=2,
    max_size=6,
)


@cache
def job_of(picture: Picture) -> Job:
    """A picture's job, made as the pipeline makes it, but of seeded noise for contexts, image and mask."""
    schedule = (
        SAMPLERS[picture.sampler].schedules[0]
        if picture.compat == "a1111"
        else SAMPLERS[picture.sampler].diffusers.schedules[0]
    )  # type: ignore[union-attr]
    rows = plan_rows(
        picture.sampler,
        schedule,
        picture.steps,
        Diffusion(),
        compat=picture.compat,
        strength=picture.strength,
        masked=picture.masked,
    )
    weights = [1.0] if picture.cfg == 1 else [1 - picture.cfg, picture.cfg]
    draws = draw_noise(picture.seed, "cpu", SHAPE, rows, compat=picture.compat)
    random = np.random.RandomState(picture.seed)

    def noise(*shape: int) -> Float:
        return random.standard_normal(shape).astype(np.float32)

    init = noise(*SHAPE) if picture.strength is not None else np.zeros(SHAPE, np.float32)
    mask = np.float32(noise(1, *SHAPE[1:]) > 0) if picture.masked else np.zeros((1, *SHAPE[1:]), np.float32)
    contexts = tuple({"context": noise(len(weights), 77, 64)} for _ in range(2))
    changes = tuple(int(picture.edited and row >= len(rows) / 2) for row in range(len(rows)))
    return Job(
        {**tables(rows, [weights] * len(rows)), "noise": draws.steps},
        {"init": init, "init_noise": draws.unit, "mask": mask},
        contexts,
        changes,
    )


def alone(engine: Engine, job: Job) -> Float:
    batch = engine.open(job.shape, 1)
    slot = batch.join(job)
    for _ in range(job.rows):
        batch.step()
    latents = batch.latents([slot])[0]
    batch.close()
    return latents


def check_mixed(engine: Engine, expected: dict[Picture, Float], visits: list[Visit]) -> None:
    """Run visits through one batch of two branches: first come, first served."""
    batch = engine.open(job_of(Picture("euler", 1, 2.0, 0, None, False, "a1111", False)).shape, CAPACITY)
    assert batch.capacity == CAPACITY
    waiting, here, time = list(visits), dict[int, tuple[Visit, int]](), 0
    while waiting or here:
        while waiting and waiting[0].after <= time and len(here) < CAPACITY:
            visit = waiting.pop(0)
            here[batch.join(job_of(visit.picture))] = visit, time
        batch.step()
        time += 1
        for slot, (visit, began) in list(here.items()):
            rows = job_of(visit.picture).rows
            if visit.cancelled is not None and visit.cancelled < rows:
                if time - began > visit.cancelled:
                    batch.leave(slot)
                    del here[slot]
            elif time - began == rows + visit.lingers:
                assert np.array_equal(batch.latents([slot])[0], expected[visit.picture]), visit
                batch.leave(slot)
                del here[slot]
    batch.close()


@pytest.fixture(scope="module")
def expected(small_bundle: Path) -> dict[Picture, Float]:
    """Latents of pictures drawn alone by ONNX Runtime, each when it is first asked for."""
    engine = load_engine(open_bundle(small_bundle), "onnxruntime", 1)

    class Alone(dict[Picture, Float]):
        def __missing__(self, picture: Picture) -> Float:
            self[picture] = alone(engine, job_of(picture))
            return self[picture]

    return Alone()


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(visits=VISITS)
def test_mixed_on_onnxruntime(small_bundle: Path, expected: dict[Picture, Float], visits: list[Visit]) -> None:
    engine = load_engine(open_bundle(small_bundle), "onnxruntime", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "ROWS", ROWS)
        check_mixed(engine, expected, visits)


@pytest.fixture(scope="module")
def compiled(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(small_bundle, tmp_path_factory.mktemp("mixed") / "small.sdrt"))
    compile_engine(copy, graphs=small_bundle, batch=CAPACITY, rows=ROWS)
    return copy


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    with installed(Gpu(), cuda_simulator.modules() | tensorrt_simulator.modules()) as simulated:
        yield simulated


@pytest.fixture(scope="module")
def simulated(gpu: Gpu, compiled: Path) -> Engine:
    return load_engine(open_bundle(compiled), "tensorrt-rtx")


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(visits=VISITS)
def test_mixed_on_a_simulated_gpu(
    simulated: Engine, gpu: Gpu, expected: dict[Picture, Float], visits: list[Visit]
) -> None:
    """Two graphs are captured for the shape, whoever sits in the slots. All counts are of the whole run."""
    captured = gpu.counts["captures"]
    check_mixed(simulated, expected, visits)
    assert gpu.counts["captures"] in (2, captured)


def test_joining_copies_one_slot(simulated: Any, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another runs: some copies, all into the slot's own rows and places; no capture, no allocation, no
    synchronisation, a launch a step.
    """
    copied: list[tuple[Block, int, int]] = []
    real = Block.to_device

    def to_device(self: Block, stream: Any, start: int, end: int) -> None:
        copied.append((self, start, end))
        real(self, stream, start, end)

    jobs = [
        job_of(Picture(sampler, 4, 3.0, seed, None, False, "a1111", False))
        for seed, sampler in enumerate(("heun", "euler_a"))
    ]
    batch: Any = simulated.open(jobs[0].shape, CAPACITY)
    batch.join(jobs[0])
    batch.step()
    monkeypatch.setattr(Block, "to_device", to_device)
    with gpu.counted() as counts:
        slot = batch.join(jobs[1])
        batch.step()
    assert counts["launches"] == 1 and counts["h2d"] == len(copied) > 0
    assert counts.keys() <= {"launches", "h2d", "records", "events", "polls"}
    step = batch._memory._step
    signature = simulated.plans.signatures[STEP]
    own = {
        name: (1 + slot * ROWS, 1 + (slot + 1) * ROWS) if name in signature.tables else (slot, slot + 1)
        for name in signature.inputs
    }
    places = [  # with the padding behind the last entry
        (block, block.offset(name, first), block._entries(name, first, end)[1])
        for name, (first, end) in own.items()
        for block in (step.inputs, step.outputs)
        if name in block.layout.sections
    ]
    for block, start, end in copied:
        assert any(here is block and first <= start and end <= limit for here, first, limit in places), (start, end)
    with gpu.counted() as counts:
        batch.leave(slot)
        batch.step()
    assert counts["h2d"] == 1 and counts["launches"] == 1  # the row of the slot, which is idle from now on
    assert counts.keys() <= {"launches", "h2d", "records", "events", "polls"}
    batch.close()


def test_a_full_batch_and_a_slot_that_was_left(small_bundle: Path) -> None:
    engine = load_engine(open_bundle(small_bundle), "onnxruntime", 1)
    job = job_of(Picture("euler", 4, 3.0, 0, None, False, "a1111", False))
    batch = engine.open(job.shape, 2)
    assert [batch.join(job), batch.join(job)] == [0, 1]
    with pytest.raises(UsageError, match="all 2 slots are taken"):
        batch.join(job)
    batch.leave(0)
    assert batch.join(job) == 0
    three = Job(
        {**job.tables, "w": np.ones((job.rows, 3), np.float32), "v": np.zeros((job.rows, 3), np.float32)},
        job.inputs,
        job.contexts,
        job.context_of_row,
    )
    batch.leave(1)
    with pytest.raises(UsageError, match="step: w: shape"):
        batch.join(three)
    batch.close()
