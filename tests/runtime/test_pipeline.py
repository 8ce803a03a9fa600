"""The pipeline: whole pictures against diffusers, batches, threads, streams, errors, and its logic over a
fake engine.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import reference
import torch
from conftest import EMOJI
from fake_engine import FakeEngine
from reference import TRAINING, psnr

from sdrt.bundle.folder import Bundle, open_bundle
from sdrt.bundle.manifest import Vector
from sdrt.engines.shapes import JobShape
from sdrt.errors import (
    BundleError,
    ClosedError,
    InputFileError,
    MachineError,
    NonFiniteError,
    ResourceError,
    UsageError,
)
from sdrt.runtime import Pipeline, Result, Step
from sdrt.runtime.engine import BatchShape, Engine, Float, Pixels, RunningBatch
from sdrt.runtime.prompts.tokenizer import Tokenizer
from sdrt.runtime.request_json import settings_from_json
from sdrt.runtime.request_memory import Demand

LIKE_DIFFUSERS_DB = 55.0
"""One value in five off by one level; truncation instead of rounding would be 51 dB."""
PROMPTS = ("red apple", "cat face", "robot")
QUICK: dict[str, Any] = {"steps": 4, "cfg": 3.0}
ZERO_SNR: dict[str, Any] = {
    **TRAINING,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


@pytest.fixture(scope="module")
def flat(flat_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(flat_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def blindbox(blindbox_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(blindbox_bundle, threads=1) as pipeline:
        yield pipeline


Draw = Callable[..., Pixels]


@pytest.fixture(scope="module")
def diffusers_pictures(flat_bundle: Path, blindbox_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Draw:
    """A function that draws pictures with diffusers, one for each prompt and seed, from the stored weights of the flat
    or the blindbox bundle.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    tokenizer = reference.clip_tokenizer(tmp_path_factory.mktemp("clip"))
    bundles = {"flat": flat_bundle, "blindbox": blindbox_bundle}
    made: dict[str, Any] = {}
    schedulers = {
        "euler": EulerDiscreteScheduler(**TRAINING, timestep_spacing="linspace", steps_offset=1),
        "ddim": DDIMScheduler(
            **TRAINING, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=False
        ),
        "euler, zero SNR": EulerDiscreteScheduler(**ZERO_SNR),
        "ddim, zero SNR": DDIMScheduler(**ZERO_SNR, set_alpha_to_one=False, clip_sample=False),
    }

    def draw(
        bundle: str,
        prompts: Sequence[str],
        *,
        sampler: str,
        seeds: Sequence[int],
        cfg: float = 3.0,
        steps: int = 20,
        size: tuple[int, int] = (64, 64),
        negative: str = "",
        cfg_rescale: float = 0.0,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Pixels:
        if bundle not in made:
            made[bundle] = reference.diffusers_pipeline(bundles[bundle], tokenizer)
        pipeline, (width, height) = made[bundle], size
        pipeline.scheduler = schedulers[sampler]
        latents = torch.cat(
            [
                torch.randn((1, 4, height // 8, width // 8), generator=torch.Generator("cpu").manual_seed(seed))
                for seed in seeds
            ]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch tensors under numpy 2, inside diffusers
            image = pipeline(
                list(prompts),
                negative_prompt=[negative] * len(prompts),
                latents=latents,
                guidance_scale=cfg,
                guidance_rescale=cfg_rescale,
                num_inference_steps=steps,
                timesteps=timesteps,
                sigmas=sigmas,
                height=height,
                width=width,
                output_type="np",
            ).images
        return np.round(image * 255).astype(np.uint8)

    return draw


# Whole pictures


def test_prompts_are_the_example_s() -> None:
    assert set(PROMPTS) <= set((EMOJI / "prompts.txt").read_text().splitlines())


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
@pytest.mark.parametrize("bundle", ["flat", "blindbox"])
def test_pictures_are_diffusers_pictures(
    request: pytest.FixtureRequest, diffusers_pictures: Draw, bundle: str, sampler: str
) -> None:
    """diffusers draws the prompts in one batch, which costs it less; here each is a call of its own."""
    seeds = range(100, 100 + len(PROMPTS))
    for prompt, seed, expected in zip(
        PROMPTS, seeds, diffusers_pictures(bundle, PROMPTS, sampler=sampler, seeds=seeds), strict=True
    ):
        result = request.getfixturevalue(bundle)(
            prompt, cfg=3, steps=20, seed=seed, sampler=sampler, compat="diffusers"
        )
        assert result.images.dtype == np.uint8 and result.images.std() > 20
        assert psnr(result.images, expected[None]) >= LIKE_DIFFUSERS_DB, (prompt, seed)


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_the_lora_is_seen(flat: Pipeline, blindbox: Pipeline, sampler: str) -> None:
    without, fused = (pipeline(PROMPTS[0], cfg=3, seed=0, sampler=sampler).images for pipeline in (flat, blindbox))
    assert psnr(fused, without) < 25


def test_one_pipeline_takes_any_settings(
    flat_bundle: Path, diffusers_pictures: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampler, guidance, size and steps change from call to call; nothing is loaded again and every
    picture is right.
    """
    import onnxruntime

    settings: list[dict[str, Any]] = [
        {"sampler": "euler", "cfg": 3.0, "steps": 10, "size": (64, 64)},
        {"sampler": "ddim", "cfg": 5.5, "steps": 7, "size": (128, 64)},
        {"sampler": "euler", "cfg": 1.0, "steps": 12, "size": (64, 192)},
        {"sampler": "ddim", "cfg": 2.0, "steps": 20, "size": (128, 128), "negative": "green apple"},
        {"sampler": "euler", "cfg": 6.0, "cfg_rescale": 0.7, "steps": 10, "size": (64, 64)},
        {"sampler": "ddim", "cfg": 3.0, "cfg_rescale": 1.0, "steps": 7, "size": (64, 64), "negative": "green"},
        {"sampler": "euler", "cfg": 0.0, "steps": 8, "size": (64, 64), "negative": "green apple"},
        {"sampler": "euler", "cfg": 3.0, "timesteps": [999, 749, 499, 249], "size": (64, 64)},
        {"sampler": "euler", "cfg": 3.0, "sigmas": [14.6, 5.0, 1.7, 0.6, 0.1, 0.0], "size": (64, 64)},
        {"sampler": "euler", "cfg": 3.0, "steps": 10, "size": (64, 64)},
    ]
    with Pipeline.load(flat_bundle, threads=1) as pipeline:
        monkeypatch.setattr(onnxruntime, "InferenceSession", None)
        results = [pipeline("red apple", seed=5, compat="diffusers", **kwargs) for kwargs in settings]
    assert np.array_equal(results[0].images, results[-1].images)
    for result, kwargs in zip(results, settings, strict=True):
        assert result.images.shape == (1, kwargs["size"][1], kwargs["size"][0], 3)
        assert psnr(result.images, diffusers_pictures("flat", ["red apple"], seeds=[5], **kwargs)) >= LIKE_DIFFUSERS_DB


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_zero_terminal_snr(flat: Pipeline, diffusers_pictures: Draw, sampler: str) -> None:
    """From noise of sigma 4096 (Euler) and from noise alone (DDIM), on the engine in float32. That the model was not
    trained so changes the picture, not the formulas.
    """
    manifest = flat.bundle.manifest
    diffusion = replace(manifest.diffusion, prediction="v", zero_snr=True)
    changed = Bundle(flat.bundle.path, replace(manifest, diffusion=diffusion))
    pipeline = Pipeline(
        changed,
        cast(Engine, flat._engine),
        Tokenizer(changed.file("tokenizer/tokenizer.json"), manifest.text),
    )
    settings: dict[str, Any] = {"cfg": 4.0, "cfg_rescale": 0.7, "steps": 8}
    found = pipeline("red apple", seed=5, sampler=sampler, schedule="trailing", compat="diffusers", **settings).images
    expected = diffusers_pictures("flat", ["red apple"], seeds=[5], sampler=f"{sampler}, zero SNR", **settings)
    assert found.std() > 20 and psnr(found, expected) >= LIKE_DIFFUSERS_DB


def test_every_sampler_draws_the_same_subject(flat: Pipeline) -> None:
    """Deterministic samplers agree on a picture, if not on its pixels; the ancestral one draws another."""
    pictures = {
        name: flat("red heart", cfg=3, steps=30, seed=3, sampler=name).images
        for name in ("euler", "heun", "ddim", "dpmpp_2m", "DPM++ 2M Karras")
    }
    for name, picture in pictures.items():
        assert psnr(picture, pictures["heun"]) > 18, name
    ancestral = flat("red heart", cfg=3, steps=30, seed=3, sampler="euler_a").images
    assert psnr(ancestral, pictures["euler"]) < 40


def test_odd_latent_sizes(flat: Pipeline) -> None:
    result = flat("sun", seed=1, size=(104, 72), **QUICK)
    assert result.images.shape == (1, 72, 104, 3) and result.images.std() > 5


def test_negative_prompt_and_guidance_matter(flat: Pipeline) -> None:
    plain = flat("red apple", seed=2, **QUICK).images
    assert not np.array_equal(plain, flat("red apple", seed=2, negative="red heart", **QUICK).images)
    assert not np.array_equal(plain, flat("red apple", seed=2, steps=4, cfg=6.0).images)


def test_negative_prompt_is_unused_without_guidance(flat: Pipeline) -> None:
    one, other = (flat("red apple", seed=2, steps=4, cfg=1.0, negative=text).images for text in ("", "red heart"))
    assert np.array_equal(one, other)


def test_empty_prompt(flat: Pipeline) -> None:
    assert flat("", seed=2, **QUICK).images.shape == (1, 64, 64, 3)


# Seeds, batches, threads


@pytest.mark.parametrize("sampler", ["euler", "euler_a"])
@pytest.mark.parametrize(("batch", "count"), [(4, 4), (3, 4), (64, 2)])
def test_a_picture_does_not_depend_on_its_batch(flat: Pipeline, sampler: str, batch: int, count: int) -> None:
    result = flat("ghost", seed=40, sampler=sampler, batch=batch, count=count, **QUICK)
    assert result.seeds == tuple(range(40, 40 + count)) and len(result.images) == count
    for seed, image in zip(result.seeds, result.images, strict=True):
        single = flat("ghost", seed=seed, sampler=sampler, **QUICK).images[0]
        assert np.abs(image.astype(int) - single.astype(int)).max() <= 1


def test_t1_eight_threads(flat: Pipeline) -> None:
    def draw(seed: int) -> Pixels:
        kwargs = [{"sampler": "euler"}, {"sampler": "euler_a"}, {"size": (96, 64)}, {"sampler": "heun", "cfg": 2.0}][
            seed % 4
        ]
        return flat(PROMPTS[seed % 3], seed=seed, **QUICK | kwargs).images

    alone = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(8)))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_drawn_seed_is_reported(flat: Pipeline) -> None:
    first, second = (flat("star", **QUICK) for _ in range(2))
    assert first.seeds != second.seeds
    assert np.array_equal(flat("star", seed=first.seeds[0], **QUICK).images, first.images)
    several = flat("star", count=2, batch=2, **QUICK)
    assert several.seeds == (several.seeds[0], several.seeds[0] + 1)


@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
def test_extreme_seeds(flat: Pipeline, seed: int) -> None:
    assert flat("star", seed=seed, steps=1, cfg=1.0).seeds == (seed,)


# Streams


def test_stream_counts_model_calls(flat: Pipeline) -> None:
    steps = list(flat.stream("fox", seed=1, sampler="heun", **QUICK))
    assert [(step.index, step.count, step.picture, step.pictures) for step in steps] == [
        (i, 7, 0, 1) for i in range(1, 8)
    ]
    assert [step.result is None for step in steps] == [True] * 6 + [False]
    sigmas = [step.sigma for step in steps]
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-4) and sigmas == sorted(sigmas, reverse=True)
    assert steps[-1].result is not None
    assert np.array_equal(steps[-1].result.images, flat("fox", seed=1, sampler="heun", **QUICK).images)
    assert len(steps[-1].result.timings_ms["steps"]) == 7


def test_stream_of_more_pictures_than_fit_a_batch(flat: Pipeline) -> None:
    seen = []
    for step in flat.stream("fox", seed=1, batch=2, count=5, size=(64, 96), steps=3, cfg=3.0):
        pictures = min(2, 5 - step.picture)
        assert step.denoised().shape == (pictures, 4, 12, 8)
        assert step.preview().shape == (pictures, 96, 64, 3)
        seen.append((step.picture, step.index, step.count, step.pictures, step.result is not None))
    assert seen == [(first, i, 3, 5, (first, i) == (4, 3)) for first in (0, 2, 4) for i in (1, 2, 3)]
    assert step.result is not None and step.result.images.shape == (5, 96, 64, 3)
    assert len(step.result.timings_ms["steps"]) == 9


def test_previews_come_to_the_picture(flat: Pipeline) -> None:
    previews = []
    for step in flat.stream("fox", seed=1, steps=10, cfg=3.0):
        previews.append(step.preview())
    assert step.result is not None and previews[0].dtype == np.uint8
    distances = [psnr(preview, step.result.images) for preview in previews]
    assert distances[0] < distances[5] < distances[-1]
    assert (
        np.abs(previews[-1].astype(int) - step.result.images.astype(int)).max() <= 1
    )  # Euler ends on the denoised estimate


def test_leaving_a_stream(flat: Pipeline) -> None:
    expected = flat("fox", seed=1, **QUICK).images
    for step in flat.stream("sun", seed=9, **QUICK):
        if step.index == 2:
            break
    with closing(flat.stream("sun", seed=9, **QUICK)) as stream:
        next(stream)
    assert np.array_equal(flat("fox", seed=1, **QUICK).images, expected)


def test_t2_streams_in_turn(flat: Pipeline) -> None:
    """Two streams of one thread, a step of each in turn."""
    alone = [flat(prompt, seed=seed, **QUICK).images for seed, prompt in enumerate(PROMPTS[:2])]
    streams = [flat.stream(prompt, seed=seed, **QUICK) for seed, prompt in enumerate(PROMPTS[:2])]
    last = list(zip(*streams, strict=True))[-1]
    for step, expected in zip(last, alone, strict=True):
        assert step.result is not None and np.array_equal(step.result.images, expected)


# Closing


def test_t7_closed(flat_bundle: Path) -> None:
    with Pipeline.load(flat_bundle, threads=1) as pipeline:
        running = pipeline.stream("fox", seed=1, **QUICK)
        next(running)
    with pytest.raises(ClosedError, match="closed"):
        pipeline("fox")
    with pytest.raises(ClosedError, match="closed"):
        pipeline.stream("fox")
    *_, last = running  # what runs finishes
    assert last.result is not None
    pipeline.close()


# What a run leaves behind


class Poisoned:
    """An engine that starts every job from NaN while `armed`."""

    backend = "poisoned"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.armed = True
        self.encode_text = engine.encode_text
        self.decode = engine.decode
        self.describe = engine.describe

    def demand(self, shape: JobShape) -> Demand:
        return Demand(0, "")

    def free_bytes(self, shape: JobShape) -> int | None:
        return None

    def open(self, shape: BatchShape, capacity: int) -> RunningBatch:
        batch: Any = self._engine.open(shape, capacity)
        join = batch.join
        batch.join = lambda job: join(
            replace(job, inputs=job.inputs | {"init_noise": np.full_like(job.inputs["init_noise"], np.nan)})
            if self.armed
            else job
        )
        opened: RunningBatch = batch
        return opened


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "heun", "dpmpp_2m"])
def test_nothing_is_left_of_a_run_gone_wrong(flat: Pipeline, flat_bundle: Path, sampler: str) -> None:
    expected = flat("fox", seed=1, sampler=sampler, **QUICK).images
    real = flat._engine
    assert real is not None
    engine = Poisoned(real)
    pipeline = Pipeline(open_bundle(flat_bundle), engine, flat._conditioner._tokenizer)
    with pytest.raises(NonFiniteError, match=r"seeds \[1\]"):
        pipeline("fox", seed=1, sampler=sampler, **QUICK)
    engine.armed = False
    assert np.array_equal(pipeline("fox", seed=1, sampler=sampler, **QUICK).images, expected)


def test_guidance_so_large_that_it_overflows(flat: Pipeline) -> None:
    expected = flat("fox", seed=1, **QUICK).images
    for cfg in (1e4, -1e4):
        try:
            assert flat("fox", seed=1, steps=20, cfg=cfg).images.dtype == np.uint8
        except NonFiniteError as error:
            assert "NaN or infinite" in error.message
        assert np.array_equal(flat("fox", seed=1, **QUICK).images, expected)


# Bad arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "steps 0: expected 1 to 1000"),
        ({"steps": -3}, "steps -3: expected 1 to 1000"),
        ({"steps": 1001}, "steps 1001: expected 1 to 1000"),
        ({"cfg": float("nan")}, "cfg nan: expected a finite number"),
        ({"cfg": float("inf")}, "cfg inf: expected a finite number"),
        ({"cfg": 1e30}, "cfg 1e\\+30: expected a finite number"),
        ({"size": (100, 64)}, "size 100x64: expected multiples of 8 from 64 to 8192\nThe nearest is (96|104)x64"),
        ({"size": (0, 0)}, "size 0x0: .*\nThe nearest is 64x64"),
        ({"size": (64, -64)}, "size 64x-64: .*\nThe nearest is 64x64"),
        ({"size": (8200, 64)}, "size 8200x64: .*\nThe nearest is 8192x64"),
        ({"size": (56, 64)}, "size 56x64"),
        ({"batch": 0}, "batch 0: expected 1 to"),
        ({"batch": 65}, "batch 65: expected 1 to 64"),
        ({"count": 0}, "count 0: expected 1 to"),
        ({"count": -1}, "count -1: expected 1 to"),
        ({"count": 10_001}, "count 10001: expected 1 to 10000"),
        ({"seed": -2}, "seed -2: expected 0 to 18446744073709551615"),
        ({"seed": 2**64}, "seed 18446744073709551616: expected 0 to 18446744073709551615"),
        ({"seed": 2**64 - 1, "count": 2}, "seed 18446744073709551615: expected 0 to 18446744073709551614"),
        ({"size": 5}, r"size 5: expected \(width, height\)"),
        ({"size": "64x64"}, "size '64x64': expected"),
        ({"size": (64.0, 64)}, r"size \(64\.0, 64\): expected"),
        ({"sampler": None}, "sampler: expected text, found NoneType"),
        ({"schedule": 5}, "schedule: expected text, found int"),
        ({"compat": None}, "compat None: unknown"),
        ({"noise": 5}, "noise 5: unknown"),
        ({"emphasis": []}, r"emphasis \[\]: unknown"),
        ({"clip_skip": []}, r"clip skip \[\]: this bundle was built for 1"),
        ({"batch": "2"}, "batch '2': expected a whole number"),
        ({"cfg": "7"}, "cfg '7': expected a number"),
        ({"guidance": 3}, "setting 'guidance': unknown\nChoose among: negative, prompt_2"),
        ({"sampler_name": "euler"}, "setting 'sampler_name': unknown; did you mean 'sampler'"),
        ({"init_image": 5}, "init image: expected a path, bytes, a file object, a Pillow image or an array, found int"),
        (
            {"init_image": np.zeros((64, 64, 3), np.uint8), "strength": float("nan")},
            "strength nan: expected a finite number, more than 0 and at most 1",
        ),
        ({"cfg_rescale": 1.5}, "cfg rescale 1.5: expected 0 to 1"),
        ({"cfg_rescale": -0.1}, "cfg rescale -0.1: expected 0 to 1"),
        ({"cfg_rescale": None}, "cfg rescale None: expected a number"),
        ({"timesteps": [249, 499]}, "timesteps: 249, 499: they rise"),
        ({"timesteps": 999}, "timesteps: expected a list, found int"),
        ({"sampler": "plms", "timesteps": [999, 499]}, "timesteps: sampler plms takes no list of them"),
        ({"sigmas": [14.0, 1.0]}, "sigmas: the last is 1"),
        ({"timesteps": [999], "sigmas": [14.0, 0.0]}, "timesteps: given beside sigmas"),
        ({"sampler": "eulr"}, "sampler 'eulr': unknown; did you mean 'euler'"),
        ({"schedule": "leading"}, "schedule 'leading': sampler euler cannot take it"),
        ({"prompt": "word " * 76, "compat": "diffusers"}, "76 tokens"),
        ({"negative": "word " * 76, "compat": "diffusers"}, "76 tokens"),
        ({"prompt": "a \ud83d b"}, "not valid Unicode"),
        ({"prompt": b"fox"}, "prompt: expected text, found bytes"),
        ({"negative": 7}, "negative prompt: expected text, found int"),
        ({"compat": "a1112"}, "compat 'a1112': unknown; did you mean 'a1111'"),
        ({"noise": "gpu"}, "noise 'gpu': unknown"),
        ({"emphasis": "orignal"}, "emphasis 'orignal': unknown; did you mean 'original'"),
        ({"prompt_syntax": "compel"}, "prompt syntax 'compel': unknown"),
        ({"clip_skip": 2}, "clip skip 2: this bundle was built for 1"),
        ({"strength": 0.5}, "strength: given without an init image"),
        ({"mask": np.zeros((64, 64), np.uint8)}, "mask: given without an init image"),
        (
            {"init_image": np.zeros((64, 64, 3), np.uint8), "strength": 0},
            "strength 0: expected more than 0 and at most 1",
        ),
        (
            {"init_image": np.zeros((64, 64, 3), np.uint8), "strength": 1.5},
            "strength 1.5: expected more than 0 and at most 1",
        ),
        ({"init_image": np.zeros((64, 64, 3), np.uint8), "mask_blur": 65}, "mask blur 65: expected 0 to 64"),
        ({"init_image": np.zeros((64, 64, 3), np.uint8), "resize": "squash"}, "resize 'squash': unknown"),
        ({"sampler": "dpmpp_2s_a", "compat": "diffusers"}, "sampler dpmpp_2s_a: diffusers has no scheduler"),
    ],
)
def test_bad_arguments(flat: Pipeline, kwargs: dict[str, Any], message: str) -> None:
    arguments = {"prompt": "fox", "steps": 2, "cfg": 3.0} | kwargs
    with pytest.raises(UsageError, match=message):
        flat(**arguments)
    with pytest.raises(UsageError, match=message):
        flat.stream(**arguments)  # before the first step is asked for


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"threads": 0}, UsageError, "threads 0: expected at least 1"),
        ({"threads": -2}, UsageError, "threads -2: expected at least 1"),
        ({"device": -1}, UsageError, "device -1: expected 0 or more"),
        ({"backend": "onnxrutime"}, UsageError, "unknown; did you mean 'onnxruntime'"),
        ({"backend": ""}, UsageError, "backend ''"),
        ({"backend": "openvino"}, MachineError, "no openvino engine fits: there is none"),
        ({"threads": 4096}, UsageError, "threads 4096: this process may use"),
    ],
)
def test_bad_load_arguments(flat_bundle: Path, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pipeline.load(flat_bundle, **kwargs)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no such bundle"):
        Pipeline.load(tmp_path / "none.sdrt")


@pytest.mark.parametrize(
    "name", ["graphs/weights.safetensors", "graphs/step.fp32.onnx", "tokenizer/tokenizer.json", "reference/step.npz"]
)
def test_a_changed_bundle_is_not_loaded(flat_bundle: Path, tmp_path: Path, name: str) -> None:
    changed = tmp_path / "changed.sdrt"
    shutil.copytree(flat_bundle, changed)
    data = bytearray((changed / name).read_bytes())
    data[-100] ^= 1
    (changed / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}: changed since the build"):
        Pipeline.load(changed)


# Logic, over an engine that computes nothing


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def over_fake(fake: FakeEngine, flat_bundle: Path) -> Pipeline:
    bundle = open_bundle(flat_bundle)
    return Pipeline(bundle, fake, Tokenizer(bundle.file("tokenizer/tokenizer.json"), bundle.manifest.text))


def clip_ids(word: str) -> list[int]:
    """A word of one token, between start and padding."""
    return [49406, {"fox": 3240, "sun": 2176}[word], *[49407] * 75]


def randn(seed: int, draws: int, shape: tuple[int, ...] = (4, 8, 8)) -> list[Float]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for _ in range(draws)]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_noise_of_an_ancestral_sampler(fake: FakeEngine, over_fake: Pipeline, batch: int) -> None:
    """One stream per picture: first the unit noise, then one draw per row in order; the last row takes none."""
    over_fake("fox", noise="cpu", seed=2**33 + 7, sampler="euler_a", steps=4, batch=batch, count=3)
    assert [len(each.jobs) for each in fake.batches] == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[batch]
    for i, job in enumerate(fake.jobs):
        expected, noise = randn(2**33 + 7 + i, 4), job.tables["noise"]
        assert noise.shape == (4, 4, 8, 8)
        assert np.abs(job.inputs["init_noise"] - expected[0]).max() < 1e-6
        for row in range(3):
            assert np.abs(noise[row] - expected[row + 1]).max() < 1e-6
        assert not noise[3].any()


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "dpmpp_2m"])
def test_noise_of_other_samplers(fake: FakeEngine, over_fake: Pipeline, sampler: str) -> None:
    over_fake("fox", noise="cpu", seed=8, sampler=sampler, steps=3, size=(96, 64))
    (job,) = fake.jobs
    assert np.abs(job.inputs["init_noise"] - randn(8, 1, (4, 8, 12))[0]).max() < 1e-6
    assert not job.tables["noise"].any() and not job.inputs["init"].any() and not job.inputs["mask"].any()


def test_jobs_with_guidance(fake: FakeEngine, over_fake: Pipeline) -> None:
    over_fake("fox", negative="sun", cfg=2.5, seed=1, steps=3, batch=2, count=2, size=(72, 104))
    ((tokens, clip_skip),) = fake.texts
    fox, sun = clip_ids("fox"), clip_ids("sun")
    assert tokens.tolist() == [[sun, fox]] and tokens.dtype == np.int64 and clip_skip == 1
    one, two = fake.jobs
    for job in (one, two):
        assert (
            job.contexts[0]["context"][:, :, 0].tolist() == [sun, fox]
            and job.contexts[0]["context"].shape == (2, 77, 64)
            and job.context_of_row == (0, 0, 0)
        )
        assert job.tables["w"].tolist() == [[-1.5, 2.5]] * 3 and job.tables["noise"].shape == (3, 4, 13, 9)
        assert {name: array.shape for name, array in job.inputs.items()} == {
            "init": (4, 13, 9),
            "init_noise": (4, 13, 9),
            "mask": (1, 13, 9),
        }
        assert {array.dtype for array in (*job.inputs.values(), *job.tables.values())} == {np.dtype(np.float32)}
    assert not np.array_equal(one.inputs["init_noise"], two.inputs["init_noise"])
    assert [batch.rows for batch in fake.batches] == [3] and fake.roundings == [0.0]


def test_jobs_without_guidance(fake: FakeEngine, over_fake: Pipeline) -> None:
    over_fake("fox", negative="sun", cfg=1, seed=1, steps=3, batch=2, count=3)
    ((tokens, _),) = fake.texts  # encoded once for all batches
    assert tokens.tolist() == [[clip_ids("fox")]]
    assert [len(batch.jobs) for batch in fake.batches] == [2, 1]
    assert all(
        job.contexts[0]["context"].shape == (1, 77, 64) and job.tables["w"].tolist() == [[1.0]] * 3 for job in fake.jobs
    )


def over(fake: FakeEngine, bundle: Path, **parts: Any) -> Pipeline:
    """A pipeline over an engine that computes nothing, with parts of the manifest replaced."""
    opened = open_bundle(bundle)
    changed = Bundle(opened.path, replace(opened.manifest, **parts))
    return Pipeline(changed, fake, Tokenizer(opened.file("tokenizer/tokenizer.json"), changed.manifest.text))


@pytest.fixture
def of_two(fake: FakeEngine, flat_bundle: Path) -> Pipeline:
    """Two text encoders, three pooled numbers, and sizes of two numbers each: cosine and sine."""
    text = replace(open_bundle(flat_bundle).manifest.text[0], zero_empty=True)
    return over(fake, flat_bundle, text=(text, replace(text, pad=0)), vector=Vector(3, 6, 2))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (104, 72, 0, 0, 104, 72)),
        (
            {"original_size": (640, 480), "crop_top_left": (16, 8), "target_size": (200, 100)},
            (480, 640, 16, 8, 100, 200),
        ),
    ],
)
@pytest.mark.parametrize("compat", ["a1111", "diffusers"])
def test_sizes_are_told(
    fake: FakeEngine, of_two: Pipeline, compat: str, settings: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    """Original height and width, top and left of the crop, target height and width; the same for all branches."""
    result = of_two("fox", negative="sun", compat=compat, size=(72, 104), steps=2, seed=1, **settings)
    expected = [number for size in sizes for number in (np.cos(size), np.sin(size))]
    (job,) = fake.jobs
    for told, word in zip(job.contexts[0]["vector"], ("sun", "fox"), strict=True):
        np.testing.assert_allclose(told, [49406, clip_ids(word)[1], 49407, *expected], rtol=1e-6)
    assert job.contexts[0]["context"].shape == (2, 77, 128)
    assert result.parameters["original_size"] == ([640, 480] if settings else None)


def test_prompts_of_the_second_encoder(fake: FakeEngine, of_two: Pipeline) -> None:
    result = of_two(
        ["fox", "sun"], negative="fox", prompt_2=["sun", "fox"], compat="diffusers", steps=1, seed=1, batch=2
    )
    fox, sun = clip_ids("fox")[1], clip_ids("sun")[1]
    said = [job.contexts[0]["context"][:, 1, ::64].tolist() for job in fake.jobs]
    assert said == [[[fox, fox], [fox, sun]], [[fox, fox], [sun, fox]]]
    assert [result.picture(i)["prompt_2"] for i in range(2)] == ["sun", "fox"]
    assert result.picture(1)["negative"] == "fox" and result.picture(1)["negative_2"] is None


def test_no_negative_prompt(fake: FakeEngine, of_two: Pipeline, over_fake: Pipeline) -> None:
    """diffusers tells none from an empty one, which it encodes; AUTOMATIC1111 does not."""
    for settings, zeros, said in (
        ({"compat": "diffusers"}, True, None),
        ({"compat": "diffusers", "negative": ""}, False, ""),
        ({}, True, ""),
        ({"negative": ""}, True, ""),
    ):
        result = of_two("fox", steps=1, seed=1, **settings)  # type: ignore[arg-type]
        assert (not fake.jobs[-1].contexts[0]["context"][0].any()) == zeros
        assert result.parameters["negative"] == said
    assert over_fake("fox", steps=1, seed=1, compat="diffusers").parameters["negative"] == ""
    assert fake.jobs[-1].contexts[0]["context"][0].any()


def test_an_edit_model(fake: FakeEngine, flat_bundle: Path) -> None:
    """Its branches are the negative prompt without the image, the negative prompt, and the prompt. diffusers starts from
    noise alone.
    """
    latents = replace(open_bundle(flat_bundle).manifest.latents, concat_channels=4, concat_scale=3.0)
    pipeline = over(fake, flat_bundle, latents=latents)
    picture = np.zeros((64, 64, 3), np.uint8)
    result = pipeline("fox", negative="sun", init_image=picture, compat="diffusers", steps=2, seed=1)
    ((_, noise),) = fake.images  # encoded once, to the mean of the posterior
    assert not noise.any()
    (job,) = fake.jobs
    np.testing.assert_allclose(job.tables["w"], [[1 - 1.5, 1.5 - 7, 7]] * 2)
    np.testing.assert_array_equal(job.inputs["concat"][:, 0, 0, 0], [0, 1.5, 1.5])
    fox, sun = clip_ids("fox")[1], clip_ids("sun")[1]
    assert job.contexts[0]["context"][:, 1, 0].tolist() == [sun, sun, fox]
    assert not job.inputs["init"].any() and result.parameters["strength"] is None
    assert result.parameters["image_cfg"] == 1.5
    for scales in ({"cfg": 1}, {"image_cfg": 0.5}):  # diffusers then guides with neither
        pipeline("fox", init_image=picture, compat="diffusers", steps=1, seed=1, **scales)  # type: ignore[arg-type]
        assert fake.jobs[-1].tables["w"].tolist() == [[1]] and fake.jobs[-1].inputs["concat"][0].all()
    pipeline("fox", init_image=picture, steps=4, seed=1, image_cfg=1.0)
    assert fake.jobs[-1].inputs["init"].any() and fake.jobs[-1].inputs["concat"].shape[0] == 2
    assert pipeline.memory_bytes(branches=3) > 0
    with pytest.raises(UsageError, match=r"^init image: missing; this model edits a picture") as caught:
        pipeline("fox")
    assert "--init-image" in caught.value.fix


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_cfg": 1.5}, "^image cfg: this model does not edit a picture"),
        ({"prompt_2": "a"}, "^prompt 2: goes with compat diffusers and the plain prompt syntax, found a1111 and a1111"),
        ({"negative_2": "a", "negative": "b"}, "^negative prompt 2: goes with compat diffusers"),
        ({"negative_2": "a", "compat": "diffusers"}, "^negative prompt 2: given without a negative prompt"),
        (
            {"prompt_2": "a", "compat": "diffusers", "prompt_syntax": "a1111"},
            "^prompt 2: goes with .* found diffusers and a1111",
        ),
        ({"prompt_2": ["a", "b"], "compat": "diffusers"}, "^prompt 2: a list of 2, with one prompt"),
        ({"prompt_2": 7, "compat": "diffusers"}, "^prompt 2: expected text, found int"),
        ({"original_size": (0, 64)}, "^original size 0: expected 1 to 8192"),
        ({"target_size": 64}, r"^target size 64: expected \(width, height\) in pixels"),
        ({"crop_top_left": (-1, 0)}, "^crop top left -1: expected 0 to 8192"),
        ({"crop_top_left": (0.5, 0)}, "^crop top left 0.5: expected a whole number"),
    ],
)
def test_settings_that_a_model_does_not_take(of_two: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        of_two("fox", **settings)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_2": "a", "compat": "diffusers"}, "^prompt 2: this model has one text encoder"),
        ({"original_size": (64, 64)}, "^original size: this model is not told sizes"),
    ],
)
def test_settings_of_other_families(over_fake: Pipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        over_fake("fox", **settings)


def test_rescaled_guidance(fake: FakeEngine, over_fake: Pipeline) -> None:
    """phi times the weights of the conditional output: the parts' weights in proportion, nothing of the negative."""
    over_fake("fox", negative="sun", cfg=4, cfg_rescale=0.75, seed=1, steps=2)
    over_fake("fox :3 AND sun :1", cfg=4, cfg_rescale=0.5, seed=1, steps=2)
    over_fake("fox :1 AND sun :-1", cfg=4, cfg_rescale=0.5, seed=1, steps=2)  # no conditional output is left
    over_fake("fox", cfg=4, seed=1, steps=2)
    assert [job.tables["rescale"].tolist() for job in fake.jobs] == [
        [[0, 0.75]] * 2,
        [[0, 0.375, 0.125]] * 2,
        [[0, 0, 0]] * 2,
        [[0, 0]] * 2,
    ]


def test_networks_that_are_told_the_guidance_scale(fake: FakeEngine, flat_bundle: Path) -> None:
    """The scale is in a table of its own. There is one branch, and the negative prompt is not even encoded."""
    opened = open_bundle(flat_bundle)
    manifest = replace(opened.manifest, diffusion=replace(opened.manifest.diffusion, told_guidance=True))
    pipeline = Pipeline(
        Bundle(opened.path, manifest), fake, Tokenizer(opened.file("tokenizer/tokenizer.json"), manifest.text)
    )
    result = pipeline("fox", negative="sun", cfg=8.5, seed=1, sampler="lcm", steps=4)
    (job,) = fake.jobs
    assert job.tables["guidance"].tolist() == [8.5] * 4 and job.tables["guidance"].dtype == np.float32
    assert job.tables["w"].tolist() == [[1.0]] * 4 and result.parameters["cfg"] == 8.5
    assert [tokens.tolist() for tokens, _ in fake.texts] == [[[clip_ids("fox")]]]


def test_lists_replace_steps_and_schedule(fake: FakeEngine, over_fake: Pipeline) -> None:
    """Numpy's numbers too. What a result says asks for the same again."""
    timesteps = np.array([999, 749, 499, 249])
    said = over_fake("fox", seed=1, steps=30, schedule="karras", timesteps=list(timesteps)).parameters
    assert (said["steps"], said["timesteps"], said["sigmas"]) == (4, [999, 749, 499, 249], None)
    again = settings_from_json(json.loads(json.dumps(said)))
    for settings in ({}, {"timesteps": None, "sigmas": [14.6, 1.0, 0.0]}):
        over_fake(**{name: value for name, value in again.items() if name != "prompt"} | settings, prompt="fox")
    of_timesteps, repeated, of_sigmas = fake.jobs
    assert of_timesteps.tables["timestep"].tolist() == [999, 749, 499, 249]
    assert all(np.array_equal(of_timesteps.tables[name], repeated.tables[name]) for name in of_timesteps.tables)
    assert of_sigmas.rows == 2


def test_what_a_result_says(over_fake: Pipeline) -> None:
    result: Result = over_fake(
        "fox", negative="sun", cfg=2, seed=4, steps=3, sampler="DPM++ 2M Karras", batch=2, count=3
    )
    assert result.seeds == (4, 5, 6) and result.images.shape == (3, 64, 64, 3)
    assert result.engine == {"backend": "fake", "device": "none"}
    expected = {
        "prompt": "fox",
        "negative": "sun",
        "steps": 3,
        "cfg": 2,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "size": [64, 64],
        "batch": 2,
        "clip_skip": 1,
    }
    assert {name: result.parameters[name] for name in expected} == expected
    assert (
        set(result.timings_ms) == {"total", "tokenise", "text_encoder", "image_encoder", "denoise", "decode", "steps"}
        and len(result.timings_ms["steps"]) == 6
    )


def test_default_size_is_the_bundle_s(fake: FakeEngine, flat_bundle: Path) -> None:
    opened = open_bundle(flat_bundle)
    bundle = Bundle(opened.path, replace(opened.manifest, latents=replace(opened.manifest.latents, size=(128, 72))))
    pipeline = Pipeline(bundle, fake, Tokenizer(bundle.file("tokenizer/tokenizer.json"), bundle.manifest.text))
    assert pipeline("fox", steps=1).images.shape == (1, 72, 128, 3)
    assert pipeline("fox", steps=1, size=(64, 80)).images.shape == (1, 80, 64, 3)


def test_t9_latents_that_are_not_finite(fake: FakeEngine, over_fake: Pipeline) -> None:
    fake.bad_latents = {1}
    with pytest.raises(NonFiniteError, match="latents of seeds"):
        over_fake("fox", seed=7, steps=2, batch=2, count=2)
    fake.bad_latents = set()
    assert over_fake("fox", seed=7, steps=2).seeds == (7,)


def test_t9_pixels_that_are_not_finite(fake: FakeEngine, over_fake: Pipeline) -> None:
    fake.bad_pixels = {1}
    with pytest.raises(NonFiniteError, match=r"VAE decoder: pixels of seeds \[8\]") as caught:
        over_fake("fox", seed=7, steps=2, batch=2, count=2)
    assert "--precision" in caught.value.fix


def test_stream_works_only_when_asked(fake: FakeEngine, over_fake: Pipeline) -> None:
    stream = over_fake.stream("fox", seed=7, steps=3)
    assert fake.texts == [] and fake.jobs == []
    step: Step = next(stream)
    assert [batch.rows for batch in fake.batches] == [1]
    assert (step.denoised() == 1).all() and step.preview().shape == (1, 64, 64, 3)
    next(stream)
    assert fake.batches[0].rows == 2 and not fake.batches[0].closed
    stream.close()
    assert fake.batches[0].rows == 2 and fake.batches[0].closed


def test_every_job_is_closed(fake: FakeEngine, over_fake: Pipeline) -> None:
    for step in over_fake.stream("fox", seed=7, steps=3, batch=2, count=5):
        assert step.preview().shape[1:] == (64, 64, 3)  # the last step of a batch too
        assert [batch.closed for batch in fake.batches] == [True] * (step.picture // 2) + [False]
    assert [batch.closed for batch in fake.batches] == [True] * 3
    fake.fail_at_row = 1
    with pytest.raises(ResourceError):
        over_fake("fox", seed=7, steps=3)
    fake.fail_at_row = None
    fake.bad_pixels = {0}
    with pytest.raises(NonFiniteError):
        over_fake("fox", seed=7, steps=3)
    assert len(fake.batches) == 5 and all(batch.closed for batch in fake.batches)
