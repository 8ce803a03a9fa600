"""From prompt to pixels: the class users meet. Owns batches, timings and what a result says; the arithmetic is the engine's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import numpy as np

from sdrt.bundle import MAX_BRANCHES, MAX_CHUNKS, WEIGHTS, Bundle, bundle_id, check_files, open_bundle
from sdrt.checked import check_file
from sdrt.engine_shapes import EngineShapes, JobShape, any_shapes
from sdrt.errors import NonFiniteError, UsageError
from sdrt.runtime.conditioning import Prompts, TextConditioner
from sdrt.runtime.engine import Denoising, Engine, Float, Job, Pixels, Tables, load_engine, tables
from sdrt.runtime.images import Canvas, blank_canvas, canvas, laid_over
from sdrt.runtime.noise import Draws, draw_noise
from sdrt.runtime.request import Request, Settings, request_of_settings, resolved
from sdrt.runtime.request_json import IMAGES, request_to_json
from sdrt.runtime.request_memory import check_memory, with_own
from sdrt.runtime.samplers import Row, plan_rows
from sdrt.runtime.tokenizer import Tokenizer

ROUNDING = {"a1111": 0.0, "diffusers": 0.5}
"""Added before pixels become whole numbers: AUTOMATIC1111 truncates, diffusers rounds."""
_OF_SOURCE = ("kind", "name", "sha256", "scale", "te_scale", "trigger")
"""What a result says of each file that went into the bundle."""


@dataclass(frozen=True)
class Result:
    """Finished pictures: `images` uint8 `[N, H, W, 3]`, the seed of each, and how they came to be.

    `timings_ms` holds `total`, `text_encoder`, `image_encoder` (0 without an init image), `denoise`, `decode` and the list `steps`, one entry per
    model call of every batch. `parameters` are the request's, every open choice made, the bundle's name and id, and what went into it.
    """

    images: Pixels
    seeds: tuple[int, ...]
    timings_ms: dict[str, Any]
    engine: dict[str, Any]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A model call that has just finished. `result` is set on the last one only.

    `picture` is the index of the first picture of the batch it belongs to, `index` counts its model calls from 1 to `count`.
    """

    index: int
    count: int
    picture: int
    pictures: int
    sigma: float
    _denoising: Denoising = field(repr=False)
    _engine: Engine = field(repr=False)
    _rounding: float = field(repr=False)
    result: Result | None = None

    def denoised(self) -> Float:
        """The denoised estimate, latents `[N, 4, h, w]`. Read it before asking the stream for the next step."""
        return self._denoising.denoised()

    def preview(self) -> Pixels:
        """The denoised estimate decoded, uint8 `[N, H, W, 3]`; costs one decode. Read it before asking for the next step."""
        return self._engine.decode(self._denoising.denoised(), self._rounding)[0]

    def noisy_preview(self) -> Pixels:
        """The latents as they are, noise and all, decoded, uint8 `[N, H, W, 3]`; costs one decode. Until the last call they are brought to unit variance."""
        latents = self._denoising.latents()
        if self.index < self.count:
            latents = latents / np.maximum(1, latents.std(axis=(1, 2, 3), keepdims=True))
        return self._engine.decode(latents, self._rounding)[0]


@dataclass(frozen=True)
class _Plan:
    """What all batches of a request share."""

    request: Request
    rows: list[Row]
    tables: Tables
    contexts: tuple[Float, ...]
    context_of_row: tuple[int, ...]
    start: Canvas | None


class Pipeline:
    """A bundle, loaded. Thread-safe: calls may run at the same time and do not see each other."""

    def __init__(self, bundle: Bundle, engine: Engine, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self._engine: Engine | None = engine
        self._conditioner = TextConditioner(tokenizer, bundle.manifest.sources)

    @classmethod
    def load(
        cls, path: str | Path, *, backend: str = "auto", device: int = 0, threads: int | None = None, on_missing: str = "error", cores: str = "own"
    ) -> Pipeline:
        """Load a bundle after checking every file of it against its manifest; weights that were checked before and are untouched are not read again.

        `device` counts GPUs and is ignored on a CPU; `threads` is for CPU engines, None leaves the choice to them. `on_missing` is what a request gets
        whose size, prompt length or number of guidance branches no engine of the bundle serves: "error"; "compile", seconds of compiling in memory
        where the engines are OpenVINO's, an error elsewhere; or "fallback", ONNX Runtime in their place, which the result names. `cores` is "own", or
        "shared" where other processes keep the CPU's cores busy: docs/deploy.md says what that changes.

        Raises:
            InputFileError: there is no bundle at `path`.
            BundleError: a file of it is missing or changed.
            MachineError: the bundle or the backend does not fit this machine.
            UsageError: an argument is out of range.
        """
        if threads is not None and threads < 1:
            raise UsageError(f"threads {threads}: expected at least 1")
        if device < 0:
            raise UsageError(f"device {device}: expected 0 or more")
        bundle = open_bundle(Path(path))
        check_files(bundle, [name for name in bundle.manifest.files if name != WEIGHTS])
        with ThreadPoolExecutor(1) as pool:
            # Hashing the weights takes as long as reading them, so it runs beside loading. Data alone cannot harm: it is used after the check.
            checked: Future[None] = pool.submit(check_file, bundle, WEIGHTS)
            try:
                engine = load_engine(bundle, backend, threads, device, on_missing=on_missing, cores=cores)
            finally:
                checked.result()
        return cls(bundle, engine, Tokenizer(bundle.file("tokenizer/tokenizer.json"), bundle.manifest.text))

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        """The batches that engines lie ready for. What else a request asks for is up to `on_missing`."""
        return self._open_engine().shapes

    def memory_bytes(self, size: tuple[int, int] | None = None, batch: int = 1, *, tokens: int | None = None, branches: int = 2) -> int:
        """About how much memory a call takes at its peak, beside what the pipeline holds already: of the machine, or of the GPU that runs it.

        `size` is (width, height) in pixels, None the bundle's; `tokens` multiples of 77, None one chunk; `branches` 1 without guidance, 2 with, and one
        more for each `AND`. On a CPU a call that asks for more than is available raises ResourceError before its first step.

        Raises:
            MissingEngineError: no engine serves the shape, and `on_missing` is "error".
            UsageError: a value is out of range, or the pipeline is closed.
        """
        manifest = self.bundle.manifest
        request = resolved(Request("", size=size, batch=batch), manifest)
        assert request.size is not None
        chunk = manifest.text.tokens
        shape = JobShape(request.size, batch, chunk if tokens is None else tokens, branches)
        if shape.tokens % chunk or not any_shapes(manifest).holds(shape):
            raise UsageError(
                f"tokens {shape.tokens}, branches {branches}: expected a multiple of {chunk} up to {chunk * MAX_CHUNKS}, and 1 to {MAX_BRANCHES} branches"
            )
        return with_own(self._open_engine().demand(shape), manifest, shape, rows=request.steps, pictures=batch).size_bytes

    def close(self) -> None:
        """Let go of the engine. Calls that are running finish; later ones raise UsageError."""
        self._engine = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, prompt: str, **settings: Unpack[Settings]) -> Result:
        """Make `count` pictures of a prompt, `batch` at a time. `sdrt.runtime.request.Request` documents the settings.

        Raises:
            UsageError: a setting is out of range, or the pipeline is closed.
            MissingEngineError: no engine serves what the request asks for, and `on_missing` is "error".
            InputFileError: an init image or mask cannot be read.
            NonFiniteError: latents or pixels came out NaN or infinite. The pipeline stays usable.
            ResourceError: out of memory, or asked for more than there is. The pipeline stays usable.
        """
        (last,) = deque(self.stream(prompt, **settings), maxlen=1)
        assert last.result is not None
        return last.result

    def stream(self, prompt: str, **settings: Unpack[Settings]) -> Generator[Step, None, None]:
        """The same as a generator over model calls: for progress, previews, and cancelling by leaving the loop.

        Settings and errors are those of a call; settings are checked here, before the first step is asked for.
        """
        engine = self._open_engine()
        request = resolved(request_of_settings(prompt, settings), self.bundle.manifest)
        rows = self._rows(request)
        prompts = self._read_prompts(request, rows)
        self._check_memory(engine, request, rows, prompts)
        return self._run(engine, request, rows, prompts, self._canvas(request))

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise UsageError("pipeline: closed", "Load it again with Pipeline.load.")
        return self._engine

    def _check_memory(self, engine: Engine, request: Request, rows: Sequence[Row], prompts: Prompts) -> None:
        """Before anything is computed: the system ends a process that takes too much, and whatever else it does with it."""
        assert request.size is not None
        batch, manifest = min(request.batch, request.count), self.bundle.manifest
        shape = JobShape(request.size, batch, prompts.chunks * manifest.text.tokens, len(prompts.weights))
        demand = with_own(engine.demand(shape), manifest, shape, contexts=prompts.contexts, rows=len(rows), pictures=request.count)
        check_memory(demand, shape, engine.free_bytes(shape))

    def _rows(self, request: Request) -> list[Row]:
        return plan_rows(
            request.sampler,
            request.schedule or "",
            request.steps,
            self.bundle.manifest.diffusion,
            compat=request.compat,
            strength=request.strength,
            masked=request.mask is not None,
        )

    def _canvas(self, request: Request) -> Canvas | None:
        factor = self.bundle.manifest.latents.factor
        assert request.size is not None and request.mask_blur is not None
        if request.init_image is None:
            return blank_canvas(request.size, factor) if self.bundle.manifest.latents.concat_channels else None
        return canvas(request.init_image, request.mask, request.size, resize=request.resize, blur=request.mask_blur, compat=request.compat, factor=factor)

    def _run(self, engine: Engine, request: Request, rows: list[Row], prompts: Prompts, start: Canvas | None) -> Generator[Step, None, None]:
        started = time.perf_counter()
        timings: dict[str, Any] = {"image_encoder": 0.0, "denoise": 0.0, "decode": 0.0, "steps": []}
        said = self._conditioner.encode(engine, prompts)
        timings["text_encoder"] = _since(started)
        # AUTOMATIC1111 counts a prompt's steps in model calls; an image's schedule ends before the count does.
        of_row = [min(row, len(said.set_of_step) - 1) for row in range(len(rows))]
        weights = [said.weights[step] for step in of_row]
        plan = _Plan(request, rows, tables(rows, weights), said.sets, tuple(said.set_of_step[step] for step in of_row), start)
        rounding = ROUNDING[request.compat]
        images: list[Pixels] = []
        for first in range(0, request.count, request.batch):
            seeds = request.seeds[first : first + request.batch]
            job = self._job(engine, plan, seeds, timings)
            denoising = engine.denoise(job)
            try:
                for index, row in enumerate(rows, 1):
                    step_started = time.perf_counter()
                    denoising.step()
                    timings["steps"].append(_since(step_started))
                    step = Step(index, len(rows), first, request.count, row.sigma, denoising, engine, rounding)
                    if index < len(rows):
                        yield step
                images.append(_decode(denoising, seeds, rounding, timings))
                if start is not None:
                    images[-1] = np.stack([laid_over(picture, start) for picture in images[-1]])
                if first + request.batch >= request.count:
                    timings["denoise"] = sum(timings["steps"])
                    timings["total"] = _since(started)
                    step = replace(step, result=Result(np.concatenate(images), request.seeds, timings, engine.describe(job), self._parameters(plan)))
                yield step
            finally:
                denoising.close()

    def _read_prompts(self, request: Request, rows: Sequence[Row]) -> Prompts:
        calls_a_step = 2 if len(rows) > len({row.step for row in rows}) else 1
        return self._conditioner.read(
            request.prompt,
            request.negative,
            steps=request.steps * calls_a_step,
            cfg=request.cfg,
            clip_skip=request.clip_skip,
            syntax=request.prompt_syntax,
            emphasis=request.emphasis,
            compat=request.compat,
            network_tags=request.network_tags,
        )

    def _parameters(self, plan: _Plan) -> dict[str, Any]:
        manifest, sha256 = self.bundle.manifest, {} if plan.start is None else plan.start.sha256
        sources = [{name: getattr(source, name) for name in _OF_SOURCE} for source in manifest.sources]
        made_from = {f"{name}_sha256": sha256.get(name) for name in IMAGES}
        made_by = {"bundle": manifest.name, "bundle_id": bundle_id(manifest), "sources": sources, "sdrt": manifest.sdrt}
        return request_to_json(plan.request) | made_from | made_by

    def _job(self, engine: Engine, plan: _Plan, seeds: tuple[int, ...], timings: dict[str, Any]) -> Job:
        draws, count = self._draws(plan, seeds), len(seeds)
        unit_noise = np.stack([draw.unit for draw in draws])
        noise = np.stack([draw.steps for draw in draws], axis=1)
        started = time.perf_counter()
        init = np.zeros_like(unit_noise)
        if plan.start is not None and draws[0].encode is not None:
            init = _encoded(engine, plan.start.pixels, [draw.encode for draw in draws])
        concat = self._concat(engine, plan, draws) if self.bundle.manifest.latents.concat_channels else None
        timings["image_encoder"] += _since(started) if plan.start is not None else 0.0
        keep = np.zeros_like(unit_noise[:, :1])
        # diffusers leaves an inpainting model to itself: what it keeps comes through its own inputs.
        if plan.start is not None and not (concat is not None and plan.request.compat == "diffusers"):
            keep = np.repeat(plan.start.keep[None], count, axis=0)
        contexts = tuple(np.repeat(context, count, axis=0) for context in plan.contexts)
        return Job(plan.tables, noise, contexts, plan.context_of_row, init, unit_noise, keep, concat)

    def _concat(self, engine: Engine, plan: _Plan, draws: Sequence[Draws]) -> Float:
        """What an inpainting model sees beside the latents: the mask (1 repaints), and the image with grey under it."""
        assert plan.start is not None
        start = plan.start
        masked = _encoded(engine, start.pixels if start.masked_pixels is None else start.masked_pixels, [draw.masked for draw in draws])
        repaint = np.ones_like(start.keep) if plan.request.mask is None else 1 - start.keep
        both = np.concatenate([np.repeat(repaint[None], len(draws), axis=0), masked], axis=1)
        return np.tile(both, (plan.tables.w.shape[1], 1, 1, 1)).astype(np.float32)

    def _draws(self, plan: _Plan, seeds: tuple[int, ...]) -> list[Draws]:
        request, latents = plan.request, self.bundle.manifest.latents
        assert request.size is not None and request.noise is not None
        shape = (latents.channels, request.size[1] // latents.factor, request.size[0] // latents.factor)
        # diffusers' inpainting encodes the image itself only where it starts from it, or blends with it.
        encode = request.init_image is not None and (request.mask is None or not latents.concat_channels or request.strength != 1)
        masked = request.mask is not None or bool(latents.concat_channels)
        return [draw_noise(seed, request.noise, shape, plan.rows, compat=request.compat, encode=encode, masked=masked) for seed in seeds]


def _encoded(engine: Engine, pixels: Pixels, posterior: Sequence[Float | None]) -> Float:
    """One image to the latents of each picture, sampled with the noise given, or the posterior's mean."""
    noise = np.stack([np.zeros_like(posterior[0]) if draw is None else draw for draw in posterior])
    return engine.encode_image(np.repeat(pixels[None], len(posterior), axis=0), noise)


def _decode(denoising: Denoising, seeds: tuple[int, ...], rounding: float, timings: dict[str, Any]) -> Pixels:
    started = time.perf_counter()
    pixels, finite = denoising.decode(rounding)
    if not finite.all():
        if not np.isfinite(denoising.latents()).all():
            raise NonFiniteError(f"denoising: latents of seeds {list(seeds)} are NaN or infinite", "Check the bundle with: sdrt verify BUNDLE")
        bad = [seed for seed, ok in zip(seeds, finite, strict=True) if not ok]
        raise NonFiniteError(
            f"VAE decoder: pixels of seeds {bad} are NaN or infinite", "Build the bundle with --precision bf16 or fp32, or with another --vae."
        )
    timings["decode"] += _since(started)
    return pixels


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0
