"""`sdrt doctor`: what works on this machine."""

from __future__ import annotations

from dataclasses import asdict

import typer

from sdrt.cli import options
from sdrt.cli.output import print_json
from sdrt.errors import MachineError, printable


def doctor(as_json: options.Json = False) -> None:
    """Say what works on this machine: each backend, its versions, and the command that mends it.
    Exit code 5 if none works.
    """
    from sdrt.machine.doctor import examine

    report = examine()
    if as_json:
        print_json(asdict(report) | {"ok": report.ok})
    else:
        gpus = ", ".join(f"{gpu.name} ({gpu.sm})" for gpu in report.gpus.found) or f"none: {report.gpus.detail}"
        driver = f", driver for CUDA {report.gpus.driver_cuda}" if report.gpus.driver_cuda else ""
        typer.echo(f"python {report.python}, {report.platform}; GPUs: {printable(gpus)}{driver}")
        for backend in report.backends:
            versions = ", ".join(f"{package} {version}" for package, version in backend.versions.items())
            known = f" ({versions})" if versions else ""
            typer.echo(f"{backend.name:17} {backend.state:11} {printable(backend.detail)}{known}")
            if backend.fix:
                typer.echo(f"{'':17} fix: {backend.fix}")
    if not report.ok:
        raise typer.Exit(MachineError.exit_code)
