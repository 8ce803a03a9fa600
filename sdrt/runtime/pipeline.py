"""From prompt to pixels: the class that users meet. It makes the batches, takes the timings and writes what a result
says. The engine does the arithmetic.
"""

from __future__ import annotations

import inspect
import logging
import operator
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, TypedDict, Unpack, cast

import numpy as np

from sdrt.bundle.folder import Bundle, bundle_id, check_files, is_checkpoint, open_bundle
from sdrt.bundle.manifest import MAX_BRANCHES, MAX_CHUNKS, WEIGHTS
from sdrt.bundle.remembered import check_file
from sdrt.engines.shapes import EngineShapes, JobShape, any_shapes
from sdrt.engines.targets import on_gpu
from sdrt.errors import Cancelled, ClosedError, DeadlineError, MissingEngineError, NonFiniteError, UsageError
from sdrt.runtime.backend import check_backend, load_engine
from sdrt.runtime.engine import FEW_CALLS, Engine, Float, Job, Observe, Pixels, RunningBatch, tables
from sdrt.runtime.pictures.canvas import Canvas, blank_canvas, canvas, laid_over
from sdrt.runtime.pictures.file import QUALITY, encode
from sdrt.runtime.prompts.conditioning import Conditioning, Prompts, TextConditioner
from sdrt.runtime.prompts.tokenizer import Tokenizer
from sdrt.runtime.request import Parameters, Request, Settings, Texts, request_of_settings, resolved
from sdrt.runtime.request_json import IMAGES, request_to_json
from sdrt.runtime.request_memory import check_memory, with_own
from sdrt.runtime.sampling.noise import Draws, draw_noise
from sdrt.runtime.sampling.registry import Row, plan_rows

log = logging.getLogger("sdrt")

ROUNDING = {"a1111": 0.0, "diffusers": 0.5}
"""Added before pixels become whole numbers. AUTOMATIC1111 truncates, diffusers rounds."""
_OF_SOURCE = ("kind", "name", "sha256", "scale", "te_scale", "trigger")
"""What a result says about each file that went into the bundle."""


class Timings(TypedDict):
    """How long the parts of a request took, in milliseconds, for all its pictures together.

    `tokenise` is the reading of the prompts, before `total` begins. `image_encoder` is 0 without an init image. `steps`
    has one entry per model call of every batch, and `denoise` is their sum. `total` also contains the time that the
    reader of a stream took between its steps.
    """

    total: float
    tokenise: float
    text_encoder: float
    image_encoder: float
    denoise: float
    decode: float
    steps: list[float]


@dataclass(frozen=True, eq=False)
class Result:
    """Finished pictures: `images` uint8 `[N, H, W, 3]`, the seed of each, and how they were made.

    `engine` says what ran: `backend`, `version`, `device`, `compute` (the precision it computes in), and further facts
    of the backend. `parameters` are those of the request with every open choice made, the bundle's name and id, and the
    files that went into it. Two results are equal only if they are the same object.
    """

    images: Pixels
    seeds: tuple[int, ...]
    timings_ms: Timings
    engine: dict[str, Any]
    parameters: Parameters

    def picture(self, index: int) -> dict[str, Any]:
        """What a file of one picture says, as JSON: `parameters` with the seed and the prompts of picture `index`, and
        the engine.
        """
        said: Mapping[str, Any] = self.parameters
        own = {name: text[index] for name in Texts._fields if isinstance(text := said[name], list)}
        return {**self.parameters, **own, "seed": self.seeds[index], "engine": self.engine}

    def encode(self, format: str = "png", index: int = 0, *, quality: int = QUALITY) -> bytes:
        """Picture `index` as the bytes of a file, which says how the picture was made.

        Args:
            format: png, jpeg or webp.
            index: which picture, from 0.
            quality: 1 to 100, for jpeg and webp; webp loses nothing at 100.

        Raises:
            UsageError: an unknown format, a quality out of range, or more text than a JPEG holds.
        """
        return encode(self.images[index], self.picture(index), format, quality=quality)


@dataclass(frozen=True)
class Step:
    """A model call that has just finished. Only the last one has a `result`.

    `picture` is the index of the first picture of the batch. `index` counts the batch's model calls from 1 to `count`.
    `denoised` and the previews work until the stream is asked for the next step; after that they raise UsageError.
    """

    index: int
    count: int
    picture: int
    pictures: int
    sigma: float
    _batch: RunningBatch = field(repr=False)
    _slots: tuple[int, ...] = field(repr=False)
    _engine: Engine = field(repr=False)
    _rounding: float = field(repr=False)
    _course: _Course = field(repr=False)
    _place: int = field(repr=False)
    result: Result | None = None

    def denoised(self) -> Float:
        """The denoised estimate, latents `[N, 4, h, w]`."""
        self._course.check_place(self._place)
        return self._batch.denoised(self._slots)

    def preview(self) -> Pixels:
        """The denoised estimate decoded, uint8 `[N, H, W, 3]`; costs one decode."""
        return self._engine.decode(self.denoised(), self._rounding)[0]

    def noisy_preview(self) -> Pixels:
        """The latents as they are, noise included, decoded to uint8 `[N, H, W, 3]`; costs one decode. Before the last
        call they are scaled to unit variance.
        """
        self._course.check_place(self._place)
        latents = self._batch.latents(self._slots)
        if self.index < self.count:
            latents = latents / np.maximum(1, latents.std(axis=(1, 2, 3), keepdims=True))
        return self._engine.decode(latents, self._rounding)[0]


class _Course:
    """How far a stream is, and when it must end. The stream shares this with its steps and with the thread that cancels
    it.
    """

    def __init__(self, deadline_s: float | None) -> None:
        self.place = 0
        """Counts up whenever the views of the newest step are about to become invalid."""
        self.cancelled = Event()
        self._deadline_s = deadline_s
        self._started = time.monotonic()

    def check_place(self, place: int) -> None:
        if place != self.place:
            raise UsageError("step: passed already", "Read a step before asking the stream for the next one.")

    def check(self, done: str) -> None:
        """Raise if the request was cancelled or its deadline has passed. `done` says how far the request is."""
        if self.cancelled.is_set():
            raise Cancelled(f"request: cancelled {done}")
        if self._deadline_s is not None and time.monotonic() - self._started >= self._deadline_s:
            raise DeadlineError(
                f"request: its deadline of {self._deadline_s:g} s passed {done}",
                "Ask for fewer steps or a smaller size, or allow it more time.",
            )


class Stream(Iterator[Step]):
    """The model calls of a request. Each one runs when it is asked for. Only one thread at a time may read a stream;
    any thread may call `cancel`.

    Leaving the loop over the stream, `close` and `with` also end it early. An error ends it.
    """

    def __init__(self, steps: Generator[Step, None, None], course: _Course) -> None:
        self._steps, self._course = (
            steps,
            course,
        )  # neither knows the stream, so everything is freed when the loop over the stream is left
        self._result: Result | None = None

    def __next__(self) -> Step:
        step = next(self._steps)
        self._result = step.result
        return step

    def result(self) -> Result:
        """Run the rest, and return the pictures.

        Raises:
            Cancelled, DeadlineError: the stream ended early.
            UsageError: the stream was closed before its end.
        """
        for _ in self:
            pass
        if self._result is None:
            self._course.check("before its end")
            raise UsageError("stream: closed before its end", "Ask the pipeline for another.")
        return self._result

    def cancel(self) -> None:
        """End the stream from another thread. A call that waits for a step raises Cancelled as soon as the running
        model call has ended. Other requests go on.
        """
        self._course.cancelled.set()

    def close(self) -> None:
        """End the stream and free what it holds. For the thread that reads it.

        Raises:
            UsageError: another thread waits for a step.
        """
        if inspect.getgeneratorstate(self._steps) == inspect.GEN_RUNNING:
            raise UsageError("stream: another thread reads it", "Call cancel, which any thread may.")
        self._steps.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Plan:
    """What all batches of a request share."""

    request: Request
    rows: list[Row]
    prompts: Mapping[Texts, Prompts]
    tokenise_ms: float
    start: Canvas | None


class Pipeline:
    """A loaded bundle. Thread-safe: calls may run at the same time and do not affect each other."""

    def __init__(self, bundle: Bundle, engine: Engine, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self._engine: Engine | None = engine
        self._conditioner = TextConditioner(tokenizer, bundle.manifest.sources, bundle.manifest.vector)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        loras: Sequence[str | Path] = (),
        embeddings: Sequence[str | Path] = (),
        hypernetworks: Sequence[str | Path] = (),
        vae: str | Path | None = None,
        backend: str = "auto",
        device: int = 0,
        threads: int | None = None,
        on_missing: str = "error",
        cores: str = "own",
        whole_picture: bool | None = None,
        observe: Observe | None = None,
    ) -> Pipeline:
        """Load a bundle after checking every file against the manifest. Weights that were checked before and have not
        changed are not read again.

        A checkpoint's bundle is built into the user's cache folder the first time, which may take minutes, and found
        there afterwards. docs/deploy.md describes the cache.

        Args:
            path: the bundle's folder; or a checkpoint, as one file or as the folder that diffusers saves.
            loras: for a checkpoint, LoRA files with their scales, as "style.safetensors:0.8". embeddings,
                hypernetworks, vae: the same as the options of `sdrt build` have them.
            backend: what runs the graphs; "auto" lets sdrt choose.
            device: the GPU, counted from 0; ignored on a CPU.
            threads: for CPU engines; None leaves the choice to them.
            on_missing: what to do if no engine of the bundle serves a request's size, prompt length or number of
                guidance branches. "error" refuses the request. "compile" compiles in memory, which takes seconds, where
                the engines are OpenVINO's; elsewhere it is an error. "fallback" uses ONNX Runtime instead, and the
                result says so.
            cores: "own", or "shared" if other processes keep the CPU's cores busy. docs/deploy.md says what that
                changes.
            whole_picture: on a GPU, whether all model calls of a picture and its decoding are one launch, without
                progress in between. None is yes for pictures of up to 8 calls without prompt editing. Looking at a step
                on the way starts its calls one by one. Ignored on a CPU.
            observe: may put something between the pipeline and its engine, as a benchmark does.

        Raises:
            InputFileError: there is no bundle at `path`, or a file to build it from is bad.
            BundleError: a file of the bundle is missing or changed.
            MachineError: the bundle or the backend does not fit this machine, or a build's packages are missing.
            UsageError: an argument is out of range, or adapters were given with a bundle.
            ResourceError, LockedError: a bundle could not be built.
        """
        threads, device = None if threads is None else operator.index(threads), operator.index(device)
        if threads is not None and threads < 1:
            raise UsageError(f"threads {threads}: expected at least 1")
        if device < 0:
            raise UsageError(f"device {device}: expected 0 or more")
        check_backend(backend)
        place, started = Path(path), time.perf_counter()
        with ExitStack() as held:
            if is_checkpoint(place) or loras or embeddings or hypernetworks or vae is not None:
                from sdrt.cached_bundle import cached_bundle  # the build, for this alone

                built = cached_bundle(
                    place,
                    loras=loras,
                    embeddings=embeddings,
                    hypernetworks=hypernetworks,
                    vae=None if vae is None else Path(vae),
                    backend=backend,
                )
                place = held.enter_context(built)
            bundle = open_bundle(place)
            choices: dict[str, Any] = {"on_missing": on_missing, "cores": cores, "whole_picture": whole_picture}
            load = partial(load_engine, bundle, backend, threads, device, **choices)
            engine = _checked(bundle, load if observe is None else partial(observe, load))
            texts = bundle.manifest.text
            pipeline = cls(bundle, engine, Tokenizer(bundle.file(texts[0].tokenizer), texts))
            weakref.finalize(pipeline, held.pop_all().close)  # calls that still run outlive `close`
        log.info("%s: loaded on %s in %.0f ms", bundle.path, engine.backend, _since(started))
        return pipeline

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        """The batches that engines are ready for. `on_missing` decides about all others."""
        return self._open_engine().shapes

    def memory_bytes(
        self, size: tuple[int, int] | None = None, batch: int = 1, *, tokens: int | None = None, branches: int = 2
    ) -> int:
        """About how much memory a call takes at its peak, beside what the pipeline already holds: memory of the
        machine, or of the GPU that runs the call.

        `size` is (width, height) in pixels, None the bundle's. `tokens` is a multiple of 77, None one chunk. `branches`
        is 1 without guidance, 2 with guidance, and one more for each `AND`. On a CPU, a call that needs more than is
        available raises ResourceError before its first step.

        Raises:
            MissingEngineError: no engine serves the shape, and `on_missing` is "error".
            UsageError: a value is out of range, or the pipeline is closed.
        """
        manifest = self.bundle.manifest
        # An edit model asks for a picture, which is not looked at.
        request = resolved(Request("", size=size, batch=batch, init_image=b""), manifest)
        assert request.size is not None
        chunk = manifest.chunk
        shape = JobShape(request.size, batch, chunk if tokens is None else tokens, branches)
        if shape.tokens % chunk or not any_shapes(manifest).holds(shape):
            raise UsageError(
                f"tokens {shape.tokens}, branches {branches}: expected a multiple of {chunk} up to"
                f" {chunk * MAX_CHUNKS}, and 1 to {MAX_BRANCHES} branches"
            )
        return with_own(
            self._open_engine().demand(shape), manifest, shape, rows=request.steps, pictures=batch
        ).size_bytes

    def close(self) -> None:
        """Free the engine. Running calls and existing streams finish; later ones raise ClosedError."""
        self._engine = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def engine(self) -> dict[str, Any]:
        """What runs a picture of the bundle's own size: `backend`, `version`, `device`, `compute`, and further facts of
        the backend.

        Raises:
            ClosedError: the pipeline is closed.
        """
        return self._open_engine().describe()

    def __call__(
        self, prompt: str | Sequence[str], *, deadline_s: float | None = None, **settings: Unpack[Settings]
    ) -> Result:
        """Make `count` pictures of a prompt, or one picture for each prompt of a list, `batch` at a time. `Request`
        documents the settings.

        `deadline_s` is how many seconds the call may take. It is checked between model calls.

        Raises:
            UsageError: a setting is out of range.
            MissingEngineError: no engine of the bundle serves the request, and `on_missing` is "error".
            ClosedError: the pipeline is closed.
            InputFileError: an init image or mask cannot be read.
            DeadlineError: the call took too long. The pipeline stays usable, also after the errors below.
            NonFiniteError: latents or pixels came out NaN or infinite.
            ResourceError: out of memory, or more was asked for than there is.
            MachineError: the engine failed.
        """
        return self.stream(prompt, deadline_s=deadline_s, **settings).result()

    def stream(
        self, prompt: str | Sequence[str], *, deadline_s: float | None = None, **settings: Unpack[Settings]
    ) -> Stream:
        """The same, one model call at a time: for progress, previews, and cancelling.

        Settings and errors are those of a call. Settings are checked here; the work begins with the first step.
        `deadline_s` counts from here, so it includes the time that the stream waits for its turn.
        """
        engine = self._open_engine()
        course = _Course(_deadline(deadline_s))
        request = resolved(request_of_settings(prompt, settings), self.bundle.manifest)
        rows = self._rows(request)
        started = time.perf_counter()
        prompts = self._read_prompts(request, rows)
        plan = _Plan(request, rows, prompts, _since(started), self._canvas(request))
        self._check_memory(engine, plan)
        return Stream(self._run(engine, plan, course), course)

    def warm_up(self, prompt: str | Sequence[str] = "", **settings: Unpack[Settings]) -> None:
        """Draw something small of the same shape as a call with these settings. The first such call is then as fast as
        later ones.

        The shape depends on the size, the batch, whether there is guidance, the length of the prompt, its number of
        parts joined by AND, and whether there is an init image or a mask. Without `cfg` two shapes are drawn: with
        guidance, and without guidance if the bundle has an engine for that.

        Raises:
            The errors of a call.
        """
        self._draw_quickly(prompt, settings)
        if "cfg" not in settings:
            try:
                self._draw_quickly(prompt, {**settings, "cfg": 1.0})
            except MissingEngineError as error:
                log.info("not warmed up without guidance: %s", error.line)

    def _draw_quickly(self, prompt: str | Sequence[str], settings: Settings) -> None:
        quick: Settings = {
            **settings,
            "sampler": "euler",
            "schedule": None,
            "timesteps": None,
            "sigmas": None,
            "steps": 3,
            "seed": 0,
        }  # three calls, since two buffers take turns
        steps = settings.get("steps")
        if steps is not None and steps <= FEW_CALLS and on_gpu(self._open_engine().backend):
            quick = {**settings, "seed": 0}  # it is one graph for its number of calls
        if isinstance(prompt, str):
            quick["count"] = settings.get("batch", 1)
        if settings.get("init_image") is not None:
            quick["strength"] = 0.9
        self(prompt, **quick)

    def _open_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise ClosedError("pipeline: closed", "Load it again with Pipeline.load.")
        return engine

    def _check_memory(self, engine: Engine, plan: _Plan) -> None:
        """Check the memory before anything is computed. The system would end a process that takes too much, with all
        its other work.
        """
        request, manifest, prompts = plan.request, self.bundle.manifest, plan.prompts.values()
        assert request.size is not None
        chunks, branches = max(each.chunks for each in prompts), max(len(each.weights) for each in prompts)
        shape = JobShape(request.size, min(request.batch, request.count), chunks * manifest.chunk, branches)
        contexts = max(each.contexts for each in prompts)
        demand = with_own(
            engine.demand(shape), manifest, shape, contexts=contexts, rows=len(plan.rows), pictures=request.count
        )
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
            timesteps=request.timesteps,
            sigmas=request.sigmas,
        )

    @property
    def _inpaints(self) -> bool:
        """Whether the model sees a mask and a masked image beside the latents."""
        latents = self.bundle.manifest.latents
        return bool(latents.concat_channels) and not latents.edits

    def _canvas(self, request: Request) -> Canvas | None:
        factor = self.bundle.manifest.latents.factor
        assert request.size is not None and request.mask_blur is not None
        if request.init_image is None:
            return blank_canvas(request.size, factor) if self._inpaints else None
        return canvas(
            request.init_image,
            request.mask,
            request.size,
            resize=request.resize,
            blur=request.mask_blur,
            compat=request.compat,
            factor=factor,
        )

    def _run(self, engine: Engine, plan: _Plan, course: _Course) -> Generator[Step, None, None]:
        request, rows = plan.request, plan.rows
        started = time.perf_counter()
        timings: Timings = {
            "total": 0.0,
            "tokenise": plan.tokenise_ms,
            "text_encoder": 0.0,
            "image_encoder": 0.0,
            "denoise": 0.0,
            "decode": 0.0,
            "steps": [],
        }
        rounding = ROUNDING[request.compat]
        images: list[Pixels] = []
        said: dict[Texts, Conditioning] = {}
        sizes = request.sizes if self.bundle.manifest.vector.sizes else ()
        all_seeds, all_texts = request.seeds, request.texts
        for pictures in _batches(plan):
            course.check(f"after {pictures.start} of {request.count} pictures")
            seeds, texts = all_seeds[pictures], all_texts[pictures]
            encoding = time.perf_counter()
            said = {
                each: said[each] if each in said else self._conditioner.encode(engine, plan.prompts[each], sizes)
                for each in texts
            }
            timings["text_encoder"] += _since(encoding)
            jobs = self._jobs(engine, plan, seeds, [said[each] for each in texts], timings)
            batch = engine.open(jobs[0].shape, len(jobs))
            try:
                slots = tuple(batch.join(job) for job in jobs)
                for index, row in enumerate(rows, 1):
                    course.check(
                        f"after {index - 1} of {len(rows)} model calls of picture {pictures.start + 1} of"
                        f" {request.count}"
                    )
                    course.place += 1
                    step_started = time.perf_counter()
                    batch.step()
                    timings["steps"].append(_since(step_started))
                    step = Step(
                        index,
                        len(rows),
                        pictures.start,
                        request.count,
                        row.sigma,
                        batch,
                        slots,
                        engine,
                        rounding,
                        course,
                        course.place,
                    )
                    if index < len(rows):
                        yield step
                course.check(f"before picture {pictures.start + 1} of {request.count} was decoded")
                images.append(_decode(batch, slots, seeds, rounding, timings))
                if plan.start is not None:
                    images[-1] = np.stack([laid_over(picture, plan.start) for picture in images[-1]])
                if pictures.stop == request.count:
                    timings["denoise"] = sum(timings["steps"])
                    timings["total"] = _since(started)
                    log.debug("%d pictures of %dx%d in %.0f ms", request.count, *(request.size or ()), timings["total"])
                    step = replace(
                        step,
                        result=Result(
                            np.concatenate(images), request.seeds, timings, batch.describe(), self._parameters(plan)
                        ),
                    )
                yield step
            finally:
                course.place += 1
                batch.close()

    def _read_prompts(self, request: Request, rows: Sequence[Row]) -> dict[Texts, Prompts]:
        """The distinct prompts of all pictures, read once."""
        calls_a_step = 2 if len(rows) > len({row.step for row in rows}) else 1

        def read(texts: Texts) -> Prompts:
            return self._conditioner.read(
                **texts._asdict(),
                steps=request.steps * calls_a_step,
                cfg=1 if self.bundle.manifest.diffusion.told_guidance else request.cfg,
                image_cfg=request.image_cfg,
                clip_skip=request.clip_skip,
                syntax=request.prompt_syntax,
                emphasis=request.emphasis,
                compat=request.compat,
                network_tags=request.network_tags,
            )

        return {texts: read(texts) for texts in dict.fromkeys(request.texts)}

    def _parameters(self, plan: _Plan) -> Parameters:
        manifest, sha256 = self.bundle.manifest, {} if plan.start is None else plan.start.sha256
        sources = [{name: getattr(source, name) for name in _OF_SOURCE} for source in manifest.sources]
        made_from = {f"{name}_sha256": sha256.get(name) for name in IMAGES}
        made_by = {"bundle": manifest.name, "bundle_id": bundle_id(manifest), "sources": sources, "sdrt": manifest.sdrt}
        return cast(Parameters, request_to_json(plan.request) | made_from | made_by)

    def _jobs(
        self, engine: Engine, plan: _Plan, seeds: tuple[int, ...], said: Sequence[Conditioning], timings: Timings
    ) -> list[Job]:
        draws = self._draws(plan, seeds)
        started = time.perf_counter()
        init = np.zeros((len(seeds), *draws[0].unit.shape), np.float32)
        if plan.start is not None and draws[0].encode is not None:
            init = _encoded(engine, plan.start.pixels, [draw.encode for draw in draws])
        concat = self._concat(engine, plan, draws) if self.bundle.manifest.latents.concat_channels else None
        timings["image_encoder"] += _since(started) if plan.start is not None else 0.0
        keep = np.zeros_like(init[0, :1])
        # diffusers blends nothing into an inpainting model: such a model gets the kept parts through its own inputs.
        if plan.start is not None and not (self._inpaints and plan.request.compat == "diffusers"):
            keep = plan.start.keep
        jobs = []
        for i, (draw, each) in enumerate(zip(draws, said, strict=True)):
            # AUTOMATIC1111 counts a prompt's steps in model calls. The schedule of an image ends before the count does.
            of_row = [min(row, len(each.set_of_step) - 1) for row in range(len(plan.rows))]
            numbers = tables(
                plan.rows,
                [each.weights[step] for step in of_row],
                conditional=each.conditional,
                rescale=plan.request.cfg_rescale,
                told_guidance=plan.request.cfg if self.bundle.manifest.diffusion.told_guidance else None,
            ) | {"noise": draw.steps}
            inputs = {"init": init[i], "init_noise": draw.unit, "mask": keep}
            if concat is not None:
                inputs["concat"] = np.stack([concat[i] if image else np.zeros_like(concat[i]) for image in each.images])
            jobs.append(Job(numbers, inputs, each.sets, tuple(each.set_of_step[step] for step in of_row)))
        return jobs

    def _concat(self, engine: Engine, plan: _Plan, draws: Sequence[Draws]) -> Float:
        """What the model sees beside the latents. An edit model sees the image to edit, `[N, C, h, w]`. An inpainting
        model sees the mask (1 repaints), and the image with grey under the mask, `[N, 1 + C, h, w]`.
        """
        assert plan.start is not None
        start, scale = plan.start, np.float32(self.bundle.manifest.latents.concat_scale)
        if not self._inpaints:
            image = scale * _encoded(engine, start.pixels, [np.zeros_like(draws[0].unit)])
            return np.repeat(image, len(draws), axis=0)
        masked = scale * _encoded(
            engine,
            start.pixels if start.masked_pixels is None else start.masked_pixels,
            [draw.masked for draw in draws],
        )
        repaint = np.ones_like(start.keep) if plan.request.mask is None else 1 - start.keep
        return np.concatenate([np.repeat(repaint[None], len(draws), axis=0), masked], axis=1).astype(np.float32)

    def _draws(self, plan: _Plan, seeds: tuple[int, ...]) -> list[Draws]:
        request, latents = plan.request, self.bundle.manifest.latents
        assert request.size is not None and request.noise is not None
        shape = (latents.channels, request.size[1] // latents.factor, request.size[0] // latents.factor)
        # The image itself is encoded if the picture starts from it or is blended with it. With an inpainting model,
        # diffusers blends nothing.
        starts = request.strength is not None and (not self._inpaints or request.mask is None or request.strength != 1)
        encode = starts or (request.mask is not None and not self._inpaints)
        masked = request.mask is not None or self._inpaints
        return [
            draw_noise(seed, request.noise, shape, plan.rows, compat=request.compat, encode=encode, masked=masked)
            for seed in seeds
        ]


def _checked(bundle: Bundle, load: Callable[[], Engine]) -> Engine:
    """The engine that `load` makes, once every file of the bundle was compared with the manifest."""
    check_files(bundle, [name for name in bundle.manifest.files if name != WEIGHTS])
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        # Hashing the weights takes as long as reading them, so it runs beside loading. Unchecked data alone does no
        # harm: it is used only after the check.
        checked: Future[None] = pool.submit(check_file, bundle, WEIGHTS, stop)
        try:
            engine = load()
            checked.result()
        except Exception:
            checked.result()  # changed weights explain any other error
            raise
        except BaseException:  # Ctrl-C waits for nothing
            stop.set()
            raise
    return engine


def _deadline(seconds: float | None) -> float | None:
    if seconds is not None and not (isinstance(seconds, Real) and not isinstance(seconds, bool) and seconds > 0):
        raise UsageError(f"deadline {seconds!r}: expected seconds, more than 0")
    return None if seconds is None else float(seconds)


def _batches(plan: _Plan) -> Iterator[slice]:
    """The pictures of each batch. They are neighbours, and their prompts have the same number of chunks and branches
    and the same weights. Filling up the shorter prompts would change them.
    """
    forms = [(plan.prompts[pair].chunks, plan.prompts[pair].weights) for pair in plan.request.texts]
    first = 0
    for here in range(1, len(forms) + 1):
        if here == len(forms) or here - first == plan.request.batch or forms[here] != forms[first]:
            yield slice(first, here)
            first = here


def _encoded(engine: Engine, pixels: Pixels, posterior: Sequence[Float | None]) -> Float:
    """The latents of one image for each picture, sampled with the noise given, or the mean of the posterior."""
    noise = np.stack([np.zeros_like(posterior[0]) if draw is None else draw for draw in posterior])
    return engine.encode_image(np.repeat(pixels[None], len(posterior), axis=0), noise)


def _decode(
    batch: RunningBatch, slots: Sequence[int], seeds: tuple[int, ...], rounding: float, timings: Timings
) -> Pixels:
    started = time.perf_counter()
    pixels, finite = batch.decode(slots, rounding)
    if not finite.all():
        if not np.isfinite(batch.latents(slots)).all():
            raise NonFiniteError(
                f"denoising: latents of seeds {list(seeds)} are NaN or infinite",
                "Check the bundle with: sdrt verify BUNDLE",
            )
        bad = [seed for seed, ok in zip(seeds, finite, strict=True) if not ok]
        raise NonFiniteError(
            f"VAE decoder: pixels of seeds {bad} are NaN or infinite",
            "Build the bundle with --vae-precision fp32, with --precision bf16 or fp32, or with another --vae.",
        )
    timings["decode"] += _since(started)
    return pixels


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0
