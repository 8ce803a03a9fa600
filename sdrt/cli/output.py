"""What every command prints the same way: JSON and reports on stdout, the library's log and notes on stderr."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

import typer

from sdrt.errors import printable


class _OnStderr(logging.Handler):
    """Prints the library's log as lines on stderr, wherever stderr goes at the moment."""

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
    """Print the one JSON object that `--json` promises."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=True, default=str))


def print_notes(notes: Iterable[str]) -> None:
    """Print remarks for the user on stderr, a line each."""
    for note in notes:
        typer.echo(f"note: {printable(note)}", err=True)


def print_report(report: dict[str, Any], indent: str = "", bullet: str = "") -> None:
    """Print fields as lines, nested ones indented. In a list each record or word begins with a `bullet`."""
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
            typer.echo(f"{start}{printable(key)}: {printable(_shown(key, value))}")
        start = indent


def _shown(key: str, value: object) -> str:
    """A field's value in words: counts and sizes get commas."""
    if isinstance(value, int) and key.endswith(("bytes", "parameters")):
        return f"{value:,}"
    return str(list(value) if isinstance(value, tuple) else value)
