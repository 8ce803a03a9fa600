"""OpenVINO GenAI's text-to-image pipeline. `options`: `static` fixes the shapes with `reshape` and keeps compiled
models in a cache folder, as its documentation advises for speed; `precision` is its hint, None leaves its default
(bfloat16 where the CPU has it).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from timed_picture import Draw, Pixels, Settings, main


class GivenNoise(openvino_genai.Generator):  # type: ignore[misc]
    """Hands out the run's own noise instead of random numbers."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self._values = values

    def next(self) -> float:
        raise RuntimeError("one random number was asked for; only whole latents are known here")

    def randn_tensor(self, shape: Any) -> openvino.Tensor:
        return openvino.Tensor(np.ascontiguousarray(self._values.reshape(tuple(shape))))


def load(settings: Settings) -> Draw:
    width, height = settings.size
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.threads}
    if settings.options["precision"] is not None:
        properties["INFERENCE_PRECISION_HINT"] = settings.options["precision"]
    if settings.options["static"]:
        pipe = openvino_genai.Text2ImagePipeline(settings.model)
        pipe.reshape(1, height, width, settings.cfg)
        pipe.compile("CPU", CACHE_DIR=settings.cache, **properties)
    else:
        pipe = openvino_genai.Text2ImagePipeline(settings.model, "CPU", **properties)
    noise = settings.latents()

    def draw(prompt: str, marks: list[float]) -> tuple[Pixels, float | None]:
        def callback(step: int, steps: int, latent: openvino.Tensor) -> bool:
            marks.append(time.monotonic())
            return False

        image = pipe.generate(prompt, **settings.request(), generator=GivenNoise(noise), callback=callback)
        text = pipe.get_performance_metrics().get_text_encoder_infer_duration()
        return np.array(image.data[0]), sum(text.values())

    return draw


main(load)
