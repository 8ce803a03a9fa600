"""How the `sdrt` command shows things: JSON, reports, progress on stderr. Only the files of the command print."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer

from sdrt import interruptible
from sdrt.errors import UsageError, printable

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; words and progress stay on stderr.")]
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder made by `sdrt build`, such as model.sdrt.")]


class _OnStderr(logging.Handler):
    """The library's log as lines on stderr, wherever that is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{record.levelname.lower()}: {printable(self.format(record))}", err=True)


def show_log(level: int) -> None:
    """Print what the library logs from `level` on."""
    log = logging.getLogger("sdrt")
    for handler in [handler for handler in log.handlers if isinstance(handler, _OnStderr)]:
        log.removeHandler(handler)
    log.addHandler(_OnStderr(level))
    log.setLevel(level if level < logging.WARNING else logging.NOTSET)


def print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=True, default=str))


def print_report(report: dict[str, Any], indent: str = "", bullet: str = "") -> None:
    """Fields as lines, nested ones indented; in a list of records or words each begins with a `bullet`."""
    start, indent = indent + bullet, indent + " " * len(bullet)
    for key, value in report.items():
        if isinstance(value, dict) and value:
            typer.echo(f"{start}{printable(key)}:")
            print_report(value, indent + "  ")
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            typer.echo(f"{start}{printable(key)}:")
            for item in value:
                print_report(item, indent + "  ", "- ")
        elif isinstance(value, list) and value and isinstance(value[0], str):
            typer.echo(f"{start}{printable(key)}:")
            for item in value:
                typer.echo(f"{indent}  - {printable(item)}")
        else:
            shown = f"{value:,}" if key.endswith(("bytes", "parameters")) and isinstance(value, int) else list(value) if isinstance(value, tuple) else value
            typer.echo(f"{start}{printable(key)}: {printable(str(shown))}")
        start = indent


def size_option(text: str | None) -> tuple[int, int] | None:
    """A `--size` argument, WxH, as numbers."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text)
    if match is None:
        raise UsageError(f"--size {text}: expected WIDTHxHEIGHT in pixels", "Write it as --size 512x768.")
    return int(match[1]), int(match[2])


def time_limit(seconds: float, bundle: Path) -> AbstractContextManager[None]:
    """The time that `--timeout` gives to a command on a bundle."""
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UsageError(f"--timeout {seconds:g}: expected seconds, more than 0", "Leave it out for the default.")
    fix = "Give it more with --timeout, if you trust the bundle; one that was made to take for ever never ends."
    return interruptible.time_limit(seconds, str(bundle), fix)


def progress_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


# Rough seconds of each stage, for the estimate of what is left only.
BUILD_STAGES = {
    "read": 4.0, "tokenizer": 0.5, "fuse": 6.0, "trace text_encoder": 3.0, "trace step": 35.0, "trace vae_decoder": 5.0, "trace vae_encoder": 5.0,
    "check text_encoder": 1.0, "check step": 8.0, "check vae_decoder": 1.0, "check vae_encoder": 1.0, "write": 3.0,
}  # fmt: skip
COMPILE_STAGES = {"read": 2.0, "compile text_encoder": 4.0, "compile step": 40.0, "compile vae_decoder": 8.0, "compile vae_encoder": 6.0, "write": 3.0}


interrupted = Event()
"""Set by Ctrl-C or a stop. Python drops the exception of a signal that arrives inside a finaliser; the next stage then raises it again."""


class StageProgress:
    """Stages on stderr: a bar where it is a terminal, a line per stage where it is not. `stages` holds the rough seconds of each."""

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
        if interrupted.is_set():
            raise KeyboardInterrupt
        if stage != self._stage:
            self._done += self._stages.get(self._stage, 0.0)
            self._stage = stage
            if stage.startswith("bind "):  # the trace came from the cache, and takes none of the time it was given
                self._total -= self._stages.get(stage.replace("bind", "trace", 1), 0.0)
            if self._bar.disable:
                typer.echo(f"{stage} …", err=True)
        self._bar.update(self._task, total=self._total, completed=self._done + self._stages.get(stage, 0.0) * (done or 0.0), description=stage)
