"""From a bundle to pictures, with numpy and one engine and no torch. docs/python.md describes all of it.

>>> from sdrt.runtime import Pipeline
>>> with Pipeline.load("model.sdrt") as pipe:
...     result = pipe("a cute girl", steps=20, cfg=7, seed=42)
"""

from sdrt.errors import (
    BundleError,
    Cancelled,
    CheckFailed,
    ClosedError,
    DeadlineError,
    InputFileError,
    LockedError,
    MachineError,
    MissingEngineError,
    NonFiniteError,
    ResourceError,
    SdrtError,
    TimeLimitError,
    UnsafeError,
    UsageError,
)
from sdrt.runtime.pipeline import Pipeline, Result, Step, Stream, Timings
from sdrt.runtime.request import Parameters, Request, Settings

__all__ = [
    "BundleError",
    "Cancelled",
    "CheckFailed",
    "ClosedError",
    "DeadlineError",
    "InputFileError",
    "LockedError",
    "MachineError",
    "MissingEngineError",
    "NonFiniteError",
    "Parameters",
    "Pipeline",
    "Request",
    "ResourceError",
    "Result",
    "SdrtError",
    "Settings",
    "Step",
    "Stream",
    "TimeLimitError",
    "Timings",
    "UnsafeError",
    "UsageError",
]
