"""Progress on stderr: a bar where it is a terminal, a line per stage where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event
from typing import Any

import typer

from sdrt.errors import printable

BUILD_STAGES = {
    "read": 4.0,
    "tokenizer": 0.5,
    "fuse": 6.0,
    "trace text_encoder": 3.0,
    "trace step": 35.0,
    "trace vae_decoder": 5.0,
    "trace vae_encoder": 5.0,
    "check text_encoder": 1.0,
    "check step": 8.0,
    "check vae_decoder": 1.0,
    "check vae_encoder": 1.0,
    "write": 3.0,
}
"""Rough seconds of each stage of a build. Only the estimate of the time left reads them."""
COMPILE_STAGES = {
    "read": 2.0,
    "compile text_encoder": 4.0,
    "compile step": 40.0,
    "compile vae_decoder": 8.0,
    "compile vae_encoder": 6.0,
    "write": 3.0,
}
"""The same for compiling."""

interrupted = Event()
"""Set when Ctrl-C or a signal stops the command.

Python drops an exception that a signal raises inside a finaliser. The next stage raises it again.
"""


def progress_bar() -> Any:
    """A bar of rich's on stderr, which shows nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def changing_line() -> Iterator[Callable[[str], None]]:
    """What says how far the work is: one line that changes where stderr is a terminal, and a line each elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: typer.echo(text, err=True)
        return
    with console.status("") as status:
        yield lambda text: status.update(Text(printable(text)))


class StageProgress:
    """Shows the stages of a build or of compiling. `stages` holds the rough seconds of each."""

    def __init__(self, stages: Mapping[str, float]) -> None:
        self._stages = stages
        self._bar = progress_bar()
        self._total = sum(stages.values())
        self._task = self._bar.add_task("starting", total=self._total)
        self._stage = ""
        self._done = 0.0

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done: float | None) -> None:
        """Show that `stage` runs, and what share of it, 0 to 1, is `done`; None where that is not known.

        Raises:
            KeyboardInterrupt: the command was stopped.
        """
        if interrupted.is_set():
            raise KeyboardInterrupt
        if stage != self._stage:
            self._done += self._stages.get(self._stage, 0.0)
            self._stage = stage
            if stage.startswith("bind "):  # the trace came from the cache: the time that tracing takes is not needed
                self._total -= self._stages.get(stage.replace("bind", "trace", 1), 0.0)
            if self._bar.disable:
                typer.echo(f"{stage} …", err=True)
        completed = self._done + self._stages.get(stage, 0.0) * (done or 0.0)
        self._bar.update(self._task, total=self._total, completed=completed, description=stage)
