"""From a bundle to pictures, with numpy and one engine and no torch.

>>> from sdrt.runtime import Pipeline
>>> with Pipeline.load("model.sdrt") as pipe:
...     result = pipe("a cute girl", steps=20, cfg=7, seed=42)
"""

from sdrt.runtime.pipeline import Pipeline, Result, Step

__all__ = ["Pipeline", "Result", "Step"]
