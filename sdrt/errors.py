"""Every error sdrt raises on purpose, and the exit code the command line ends with.

    SdrtError                 70  a bug in sdrt, when nothing finer fits
    ├── CheckFailed            1  a check ran and said no
    │   └── NonFiniteError     1  a latent or pixel is NaN or infinite
    ├── UsageError             2  an argument is out of range or misspelt
    ├── MissingEngineError     2  a request is in order, but the bundle holds no engine of its shape
    ├── InputFileError         3  a file that was given is bad
    │   ├── CheckpointError    3  ... the checkpoint or VAE
    │   └── AdapterError       3  ... a LoRA
    ├── UnsafeError            4  refused as unsafe
    │   └── BundleError        4  ... a bundle that is not what its manifest says
    ├── MachineError           5  this machine, or an installed version, does not fit
    ├── ResourceError          6  out of disk or memory
    ├── LockedError            7  another process holds what is needed
    ├── TimeLimitError         7  not done in the time allowed
    └── InconclusiveError      8  a measurement that decides nothing

The library raises; only `sdrt.cli` prints and exits. Standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class SdrtError(Exception):
    """`message` says where, what was expected and what was found, in one line; `fix` says what to do about it."""

    exit_code = 70
    data: Mapping[str, Any] = {}
    """What a program may want to know beside the words, as JSON takes it. `--json` prints it with them."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n{self.fix}" if self.fix else self.message


class CheckFailed(SdrtError):
    exit_code = 1


class NonFiniteError(CheckFailed):
    pass


class UsageError(SdrtError):
    exit_code = 2


class MissingEngineError(SdrtError):
    """`data` has the shape that was `wanted` and the `shapes` that engines of the bundle take, as `sdrt.engine_shapes` has them."""

    exit_code = 2


class InputFileError(SdrtError):
    exit_code = 3


class CheckpointError(InputFileError):
    pass


class AdapterError(InputFileError):
    pass


class UnsafeError(SdrtError):
    exit_code = 4


class BundleError(UnsafeError):
    pass


class MachineError(SdrtError):
    exit_code = 5


class ResourceError(SdrtError):
    exit_code = 6


class LockedError(SdrtError):
    exit_code = 7


class TimeLimitError(SdrtError):
    exit_code = 7


class InconclusiveError(SdrtError):
    exit_code = 8


def printable(text: str) -> str:
    """`text` with control characters escaped, for names that come from files."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the choice most like `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """`value` if it is one of the choices.

    Raises:
        UsageError: it is not; the message names the nearest.
    """
    if value not in choices:
        raise UsageError(f"{name} {value!r}: unknown{nearest(str(value), choices)}", f"Choose one of: {', '.join(choices)}.")
    return value
