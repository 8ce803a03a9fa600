"""Every error sdrt raises on purpose, the exit code the command line ends with, and the HTTP status that suits it where a request ran into it.

    SdrtError                 70 500  a bug in sdrt, when nothing finer fits
    ├── CheckFailed            1 500  a check ran and said no
    │   └── NonFiniteError     1 500  a latent or pixel is NaN or infinite
    ├── UsageError             2 400  an argument is out of range or misspelt
    ├── MissingEngineError     2 503  a request is in order, but the bundle holds no engine of its shape
    ├── ClosedError            2 503  the pipeline was closed
    ├── InputFileError         3 400  a file that was given is bad
    │   ├── CheckpointError    3 400  ... the checkpoint or VAE
    │   └── AdapterError       3 400  ... a LoRA
    ├── UnsafeError            4 500  refused as unsafe
    │   └── BundleError        4 500  ... a bundle that is not what its manifest says
    ├── MachineError           5 500  this machine, or an installed version, does not fit
    ├── ResourceError          6 503  out of disk or memory
    ├── LockedError            7 503  another process holds what is needed
    ├── TimeLimitError         7 504  not done in the time allowed
    │   └── DeadlineError      7 504  ... to a request
    ├── InconclusiveError      8 500  a measurement that decides nothing
    ├── NotComparableError     9 500  two measurements of different things
    └── Cancelled            130 499  a request was cancelled; 499 is nginx's, as nobody waits for the answer

The library raises; only `sdrt.cli` prints and exits. Standard library only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any


class SdrtError(Exception):
    """What went wrong, in parts for different readers.

    message: where, what was expected and what was found, in one line. Where the class is `public` it names no path of this machine, unless the caller
        gave it, so it may be shown to a client.
    fix: what to do about it; for whoever runs sdrt. It may name commands and paths.
    path: the file or bundle it is about, where the message leaves it out; empty otherwise. For a log.
    """

    exit_code = 70
    http_status = 500
    public = False
    data: Mapping[str, Any] = {}
    """What a program may want to know beside the words, as JSON takes it. `--json` prints it with them."""

    def __init__(self, message: str, fix: str = "", *, path: str | PathLike[str] = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.path = fspath(path)

    @property
    def line(self) -> str:
        """The path, if there is one, and the message."""
        return f"{self.path}: {self.message}" if self.path else self.message

    def __str__(self) -> str:
        return f"{self.line}\n{self.fix}" if self.fix else self.line


class CheckFailed(SdrtError):
    exit_code = 1


class NonFiniteError(CheckFailed):
    pass


class UsageError(SdrtError):
    exit_code = 2
    http_status = 400
    public = True


class MissingEngineError(SdrtError):
    """`data` has the shape that was `wanted` and the `shapes` that engines of the bundle take, as `sdrt.engine_shapes` has them."""

    exit_code = 2
    http_status = 503
    public = True


class ClosedError(SdrtError):
    exit_code = 2
    http_status = 503
    public = True


class InputFileError(SdrtError):
    exit_code = 3
    http_status = 400


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
    http_status = 503


class LockedError(SdrtError):
    exit_code = 7
    http_status = 503


class TimeLimitError(SdrtError):
    exit_code = 7
    http_status = 504


class DeadlineError(TimeLimitError):
    public = True


class InconclusiveError(SdrtError):
    exit_code = 8


class NotComparableError(SdrtError):
    exit_code = 9


class Cancelled(SdrtError):
    exit_code = 130
    http_status = 499
    public = True


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
