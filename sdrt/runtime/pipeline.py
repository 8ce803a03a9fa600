"""From prompt to pixels: the class users meet. Owns argument checks, seeds, batches and timings; the arithmetic is the engine's."""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sdrt.bundle import MAX_SIDE, MIN_SIDE, SIZE_STEP, WEIGHTS, Bundle, check_files, open_bundle
from sdrt.errors import NonFiniteError, UsageError
from sdrt.runtime.engine import Denoising, Engine, Float, Job, Pixels, load_engine, tables
from sdrt.runtime.noise import MAX_SEED, CpuNoise
from sdrt.runtime.samplers import Row, parse_sampler, trace_rows
from sdrt.runtime.schedule import MAX_STEPS
from sdrt.runtime.tokenizer import Tokenizer

_ROUND_TO_NEAREST = 0.5


@dataclass(frozen=True)
class Result:
    """Finished pictures: `images` uint8 `[N, H, W, 3]`, the seed of each, and how they came to be.

    `timings_ms` holds `total`, `text_encoder`, `denoise`, `decode` and the list `steps`, one entry per model call of every batch.
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
    result: Result | None = None

    def denoised(self) -> Float:
        """The denoised estimate, latents `[N, 4, h, w]`. Read it before asking the stream for the next step."""
        return self._denoising.denoised()

    def preview(self) -> Pixels:
        """The denoised estimate decoded, uint8 `[N, H, W, 3]`; costs one decode. Read it before asking for the next step."""
        return self._engine.decode(self._denoising.denoised(), _ROUND_TO_NEAREST)[0]


@dataclass(frozen=True)
class _Request:
    """Checked arguments of one call."""

    prompt: str
    negative: str
    steps: int
    cfg: float
    sampler: str
    schedule: str
    size: tuple[int, int]
    seeds: tuple[int, ...]
    batch: int


class Pipeline:
    """A bundle, loaded. Thread-safe: calls may run at the same time and do not see each other."""

    def __init__(self, bundle: Bundle, engine: Engine, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self._engine: Engine | None = engine
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str | Path, *, backend: str = "auto", device: int = 0, threads: int | None = None) -> Pipeline:
        """Load a bundle after checking every file of it against its manifest.

        `device` counts GPUs and is ignored on a CPU; `threads` is for CPU engines, None leaves the choice to them.

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
            checked: Future[None] = pool.submit(check_files, bundle, [WEIGHTS])
            try:
                engine = load_engine(bundle, backend, threads, device)
            finally:
                checked.result()
        return cls(bundle, engine, Tokenizer(bundle.file("tokenizer/tokenizer.json"), bundle.manifest.text))

    def close(self) -> None:
        """Let go of the engine. Calls that are running finish; later ones raise UsageError."""
        self._engine = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(
        self,
        prompt: str,
        *,
        negative: str = "",
        steps: int = 20,
        cfg: float = 7.0,
        seed: int | None = None,
        sampler: str = "euler",
        schedule: str | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 1,
        count: int = 1,
    ) -> Result:
        """Make `count` pictures of a prompt, `batch` at a time. Picture i has seed + i and its own noise.

        Args:
            prompt: what to show; may be empty. At most 75 tokens for now.
            negative: what to steer away from; unused at guidance scale 1.
            steps: 1 to 1000. Samplers of two model calls a step (heun) take nearly twice as many calls.
            cfg: guidance scale, 1 or more usually; 1 turns guidance off and halves the work.
            seed: 0 to 2**64 - 1; None draws one, which the result names.
            sampler: a key or label of `sdrt.runtime.samplers.SAMPLERS`.
            schedule: discrete, karras or leading; None takes the sampler's own.
            size: (width, height) in pixels, multiples of 8 from 64 to 8192; None takes the bundle's.

        Raises:
            UsageError: an argument is out of range, or the pipeline is closed.
            NonFiniteError: latents or pixels came out NaN or infinite. The pipeline stays usable.
            ResourceError: out of memory. The pipeline stays usable.
        """
        stream = self.stream(
            prompt, negative=negative, steps=steps, cfg=cfg, seed=seed, sampler=sampler, schedule=schedule, size=size, batch=batch, count=count
        )
        (last,) = deque(stream, maxlen=1)
        assert last.result is not None
        return last.result

    def stream(
        self,
        prompt: str,
        *,
        negative: str = "",
        steps: int = 20,
        cfg: float = 7.0,
        seed: int | None = None,
        sampler: str = "euler",
        schedule: str | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 1,
        count: int = 1,
    ) -> Generator[Step, None, None]:
        """The same as a generator over model calls: for progress, previews, and cancelling by leaving the loop.

        Arguments and errors are those of a call; they are checked here, before the first step is asked for.
        """
        engine = self._engine
        if engine is None:
            raise UsageError("pipeline: closed", "Load it again with Pipeline.load.")
        key, chosen = parse_sampler(sampler, schedule)
        request = _Request(
            prompt,
            negative,
            _range("steps", steps, 1, MAX_STEPS),
            _number("cfg", cfg),
            key,
            chosen,
            self._size(size),
            _seeds(seed, count),
            _range("batch", batch, 1, 64),
        )
        rows = trace_rows(key, chosen, steps, self.bundle.manifest.diffusion)
        tokens = [self._tokenizer.encode(text) for text in ((negative, prompt) if request.cfg != 1 else (prompt,))]
        return self._run(engine, request, rows, np.concatenate(tokens))

    def _run(self, engine: Engine, request: _Request, rows: list[Row], tokens: Any) -> Generator[Step, None, None]:
        started = time.perf_counter()
        clip_skip = self.bundle.manifest.text.clip_skip[0]
        context = engine.encode_text(tokens, np.ones(tokens.shape, np.float32), clip_skip)
        timings: dict[str, Any] = {"text_encoder": _since(started), "denoise": 0.0, "decode": 0.0, "steps": []}
        guidance = [1 - request.cfg, request.cfg] if request.cfg != 1 else [1.0]
        step_tables = tables(rows, [guidance] * len(rows))
        images: list[Pixels] = []
        for first in range(0, len(request.seeds), request.batch):
            seeds = request.seeds[first : first + request.batch]
            denoising = engine.denoise(self._job(request, rows, step_tables, context, seeds))
            try:
                for index, row in enumerate(rows, 1):
                    step_started = time.perf_counter()
                    denoising.step()
                    timings["steps"].append(_since(step_started))
                    step = Step(index, len(rows), first, len(request.seeds), row.sigma, denoising, engine)
                    if index < len(rows):
                        yield step
                images.append(self._decode(denoising, seeds, timings))
                if first + request.batch >= len(request.seeds):
                    timings["denoise"] = sum(timings["steps"])
                    timings["total"] = _since(started)
                    step = replace(step, result=self._result(engine, request, images, timings, clip_skip))
                yield step
            finally:
                denoising.close()

    def _result(self, engine: Engine, request: _Request, images: list[Pixels], timings: dict[str, Any], clip_skip: int) -> Result:
        parameters = {
            "prompt": request.prompt, "negative": request.negative, "steps": request.steps, "cfg": request.cfg, "sampler": request.sampler,
            "schedule": request.schedule, "size": list(request.size), "batch": request.batch, "noise": "cpu", "clip_skip": clip_skip,
            "bundle": self.bundle.manifest.name, "sdrt": self.bundle.manifest.sdrt,
        }  # fmt: skip
        return Result(np.concatenate(images), request.seeds, timings, engine.describe(), parameters)

    def _job(self, request: _Request, rows: list[Row], step_tables: Any, context: Float, seeds: tuple[int, ...]) -> Job:
        latents = self.bundle.manifest.latents
        shape = (latents.channels, request.size[1] // latents.factor, request.size[0] // latents.factor)
        noise = np.zeros((len(rows), len(seeds), *shape), np.float32)
        unit_noise = np.empty((len(seeds), *shape), np.float32)
        for i, seed in enumerate(seeds):
            stream = CpuNoise(seed)
            unit_noise[i] = stream.draw(shape)
            for j, row in enumerate(rows):
                if row.draws:
                    noise[j, i] = stream.draw(shape)
        zeros = np.zeros_like(unit_noise)
        return Job(step_tables, noise, (np.repeat(context, len(seeds), axis=0),), (0,) * len(rows), zeros, unit_noise, zeros[:, :1])

    def _decode(self, denoising: Denoising, seeds: tuple[int, ...], timings: dict[str, Any]) -> Pixels:
        started = time.perf_counter()
        pixels, finite = denoising.decode(_ROUND_TO_NEAREST)
        if not finite.all():
            if not np.isfinite(denoising.latents()).all():
                raise NonFiniteError(f"denoising: latents of seeds {list(seeds)} are NaN or infinite", "Check the bundle with: sdrt verify BUNDLE")
            bad = [seed for seed, ok in zip(seeds, finite, strict=True) if not ok]
            raise NonFiniteError(
                f"VAE decoder: pixels of seeds {bad} are NaN or infinite", "Build the bundle with --precision bf16 or fp32, or with another --vae."
            )
        timings["decode"] += _since(started)
        return pixels

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        chosen = self.bundle.manifest.latents.size if size is None else size
        if len(chosen) != 2 or not all(isinstance(side, int) for side in chosen):
            raise UsageError(f"size {chosen!r}: expected (width, height) in pixels")
        width, height = chosen
        for side in (width, height):
            if side % SIZE_STEP or not MIN_SIDE <= side <= MAX_SIDE:
                raise UsageError(f"size {width}x{height}: expected multiples of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}", _nearest_size(width, height))
        return width, height


def _nearest_size(width: int, height: int) -> str:
    sides = (min(MAX_SIDE, max(MIN_SIDE, round(side / SIZE_STEP) * SIZE_STEP)) for side in (width, height))
    return "The nearest is {}x{}.".format(*sides)


def draw_seed() -> int:
    """A random seed, 0 to 2**32 - 1."""
    return secrets.randbelow(2**32)


def _seeds(seed: int | None, count: int) -> tuple[int, ...]:
    _range("count", count, 1, 10_000)
    first = draw_seed() if seed is None else seed
    _range("seed", first, 0, MAX_SEED - (count - 1))
    return tuple(range(first, first + count))


def _range(name: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} {value!r}: expected a whole number")
    if not low <= value <= high:
        raise UsageError(f"{name} {value}: expected {low} to {high}")
    return value


def _number(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UsageError(f"{name} {value!r}: expected a number")
    if not math.isfinite(value) or abs(value) > 1e4:
        raise UsageError(f"{name} {value}: expected a finite number, 1 to 30 usually")
    return value


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000.0
