"""The command line in this process: run it, and say how it must have ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from sdrt.cli import app


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])  # type: ignore[return-value]


def failed(result: Result, code: int, *fragments: str) -> str:
    """The command ended with this code, one `error:` line that holds the fragments, at most one `fix:` line after it, and nothing on stdout."""
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert len(lines) - start in (1, 2)
    assert len(lines) - start == 1 or lines[-1].startswith("  fix: ")
    assert all(line.isprintable() for line in lines)
    assert result.stdout == ""
    for fragment in fragments:
        assert fragment in result.stderr
    return result.stderr


def only_json(result: Result) -> dict[str, Any]:
    """The one JSON object that is all of stdout."""
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
