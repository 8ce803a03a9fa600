"""sdrt itself, with diffusers' rules where tools differ. `options`: `backend`. `model` is a bundle with engines of one
precision.
"""

from __future__ import annotations

import time

from timed_picture import Draw, Pixels, Settings, main

from sdrt.runtime import Pipeline


def load(settings: Settings) -> Draw:
    pipe = Pipeline.load(settings.model, backend=settings.options["backend"], threads=settings.threads)

    def draw(prompt: str, marks: list[float]) -> tuple[Pixels, float | None]:
        result = None
        for step in pipe.stream(
            prompt,
            negative=settings.negative,
            steps=settings.steps,
            cfg=settings.cfg,
            seed=settings.seed,
            size=settings.size,
            sampler="euler",
            schedule="linspace",
            compat="diffusers",
            noise="nv",
        ):
            if step.result is None:
                marks.append(time.monotonic())
            result = step.result
        assert result is not None
        marks.append(marks[-1] + result.timings_ms["steps"][-1] / 1000)  # the last step is handed out after decoding
        return result.images[0], result.timings_ms["text_encoder"]

    return draw


main(load)
