"""What every peer's process measures, in the same way: two pictures, timestamps after each step, and the memory peak.
numpy only.

The first picture's prompt is another one, so a cache of encoded prompts does not help the second, whose steps, decoding
and text are the warm ones. Decoding is all from the end of the last step to uint8 pixels in hand.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WARM_UP_PROMPT = "blue car"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """One run. `model` is what the peer reads, `noise` a .npy of unit normals float32 `[1, 4, h, w]`, `picture` where
    its pixels go, `started_s` the monotonic clock just before the process was made, `options` whatever tells this
    peer's variants apart.
    """

    model: str
    prompt: str
    negative: str
    size: tuple[int, int]
    steps: int
    cfg: float
    seed: int
    threads: int
    noise: str
    picture: str
    cache: str
    started_s: float
    options: dict[str, Any]

    def latents(self) -> NDArray[np.float32]:
        return np.asarray(np.load(self.noise), np.float32)

    def request(self) -> dict[str, Any]:
        """What a picture is asked for with, by the names that pipelines in diffusers' style give it."""
        width, height = self.size
        return {
            "negative_prompt": self.negative,
            "num_inference_steps": self.steps,
            "guidance_scale": self.cfg,
            "width": width,
            "height": height,
        }


Draw = Callable[[str, list[float]], tuple[Pixels, float | None]]
"""(prompt, list to which the monotonic clock is added after each step) -> pixels uint8 `[H, W, 3]`, milliseconds of
text encoding or None.
"""


def drawn_by_diffusers(pipe: Any, settings: Settings, latents: Any) -> Draw:
    """How a pipeline of diffusers, or of its form, draws. `latents` are the run's own, as a tensor of the pipeline's
    type.
    """
    pipe.set_progress_bar_config(disable=True)
    encode = pipe.encode_prompt
    text_ms = 0.0

    def timed_encode(*arguments: Any, **options: Any) -> Any:
        nonlocal text_ms
        started = time.monotonic()
        encoded = encode(*arguments, **options)
        text_ms = (time.monotonic() - started) * 1000
        return encoded

    pipe.encode_prompt = timed_encode

    def draw(prompt: str, marks: list[float]) -> tuple[Pixels, float | None]:
        def step_end(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            marks.append(time.monotonic())
            return tensors

        image = pipe(prompt, **settings.request(), latents=latents.clone(), callback_on_step_end=step_end).images[0]
        return np.asarray(image), text_ms

    return draw


def peak_rss_mb() -> float:
    """This program's own peak. getrusage's would count the process that started it as well, until its program was
    replaced.
    """
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) / 1024


def main(load: Callable[[Settings], Draw]) -> None:
    """Run a peer: settings are the process's first argument, as JSON; its second is the file the figures go to, in
    milliseconds and MB.
    """
    given = json.loads(sys.argv[1])
    settings = Settings(**given | {"size": tuple(given["size"])})
    draw = load(settings)
    loaded = time.monotonic()
    cold: list[float] = []
    draw(WARM_UP_PROMPT, cold)
    marks: list[float] = []
    pixels, text_ms = draw(settings.prompt, marks)
    finished = time.monotonic()
    if len(marks) != settings.steps:
        raise SystemExit(f"{len(marks)} steps were seen, expected {settings.steps}")
    np.save(settings.picture, pixels)
    steps = [(b - a) * 1000 for a, b in itertools.pairwise(marks)]
    step = statistics.median(steps)
    figures = {
        "load_ms": (loaded - settings.started_s) * 1000,
        "cold_ms": (cold[0] - settings.started_s) * 1000 - step,
        "step_ms": step,
        "decode_ms": (finished - marks[-1]) * 1000,
        "text_ms": text_ms,
        "peak_rss_mb": peak_rss_mb(),
        "steps_ms": steps,
    }
    Path(sys.argv[2]).write_text(json.dumps(figures), encoding="utf-8")
