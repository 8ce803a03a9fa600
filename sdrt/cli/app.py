"""The `sdrt` command itself: its commands, its exit codes, and how it says what went wrong."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from sdrt import __version__
from sdrt.cli.bench import app as bench
from sdrt.cli.build import build
from sdrt.cli.cache import app as cache
from sdrt.cli.compile import compile_bundle
from sdrt.cli.doctor import doctor
from sdrt.cli.generate import generate
from sdrt.cli.inspect import inspect
from sdrt.cli.output import show_log
from sdrt.cli.progress import interrupted
from sdrt.cli.sign import sign
from sdrt.cli.verify import verify
from sdrt.engines.targets import ONNXRUNTIME, OPENVINO
from sdrt.errors import MachineError, ResourceError, SdrtError, printable
from sdrt.machine import interruptible
from sdrt.machine.packages import install_command

BUG, INTERRUPTED = 70, 130
_COMMAND_LINE_ERROR: Any = typer.BadParameter.__base__
"""What the parser raises for an option that is missing, unknown or of another type.

It is click's UsageError, or typer's own copy of that class.
"""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_EXTRAS = {
    "torch": "build",
    "onnx": "build",
    "onnxscript": "build",
    "onnx_ir": "build",
    "matplotlib": "bench",
    ONNXRUNTIME.module: ONNXRUNTIME.extra,
    OPENVINO.module: OPENVINO.extra,
}
"""The extra of sdrt that brings a package which may be missing."""


class ReportingGroup(TyperGroup):
    """Turns an error into one line on stderr, a line that says what to do about it, and an exit code.

    A traceback is printed only with --debug.
    """

    def invoke(self, ctx: Any) -> Any:
        words = [*ctx._protected_args, *ctx.args]
        _catch_signals()
        _let_stderr_fail()
        try:
            return super().invoke(ctx)
        except SdrtError as error:
            _fail(ctx, error.line, error.fix, error.exit_code, error.data)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; nothing was left behind", "", INTERRUPTED)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                _bug(ctx, error)
            fix = f"Install it with: {install_command(_EXTRAS[package])}"
            _fail(ctx, f"{package} is not installed", fix, MachineError.exit_code)
        except BrokenPipeError:
            _discard_stdout()  # the reader went away, as in `| head`
            raise typer.Exit(0) from None
        except OSError as error:
            if error.errno not in _NO_ROOM:
                _bug(ctx, error)
            message = f"{error.filename or type(error).__name__}: {error.strerror}"
            fix = "Free disk space, memory, or raise the limit on open files (ulimit -n)."
            _fail(ctx, message, fix, ResourceError.exit_code)
        except MemoryError:
            fix = "Choose a smaller size or batch, or a machine with more memory."
            _fail(ctx, "out of memory", fix, ResourceError.exit_code)
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click"):
                if isinstance(error, _COMMAND_LINE_ERROR) and "--json" in _options(words):
                    fix = "Run the command with --help to see its options."
                    _print_error(error.format_message(), fix, error.exit_code)
                raise
            if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
                fix = "Raise the limit on processes (ulimit -u), or stop other programs."
                _fail(ctx, "no more threads may be started here", fix, ResourceError.exit_code)
            _bug(ctx, error)


def _options(words: Sequence[str]) -> Sequence[str]:
    """The words of a command line before `--`, after which no word is an option."""
    return words[: words.index("--")] if "--" in words else words


def _catch_signals() -> None:
    """Let a command that is stopped, or whose terminal goes away, clean up like one that Ctrl-C interrupts."""
    if threading.current_thread() is not threading.main_thread():
        return
    interrupted.clear()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is None or (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # as nohup sets it
            continue
        signal.signal(number, _interrupt)


def _let_stderr_fail() -> None:
    """Make stderr drop what it cannot write."""
    if os.name == "posix" and (stderr := sys.__stderr__) is not None and sys.stderr is stderr:
        raw = io.BufferedWriter(_AsFarAsItGoes(stderr.fileno(), "wb", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, stderr.encoding, stderr.errors, line_buffering=True)


class _AsFarAsItGoes(io.FileIO):
    """A file that drops what it cannot write: a full disk under a log must not fail the work that the log tells of."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(memoryview(data).cast("B"))


def _bug(ctx: Any, error: Exception) -> NoReturn:
    fix = "This is a bug in sdrt; please report it with the output of --debug."
    _fail(ctx, f"{type(error).__name__}: {error}", fix, BUG)


def _interrupt(*_: object) -> NoReturn:
    interrupted.set()
    raise KeyboardInterrupt


def _fail(ctx: Any, message: str, fix: str, code: int, data: Mapping[str, Any] | None = None) -> NoReturn:
    """Print an error and end the command with exit code `code`. `data` joins the error in JSON."""
    if ctx.params.get("debug"):
        traceback.print_exc()
    typer.echo(f"error: {printable(message)}", err=True)
    if fix:
        typer.echo(f"  fix: {printable(fix)}", err=True)
    if ctx.find_root().obj == "json":
        with suppress(OSError):  # stdout may be what has failed
            _print_error(message, fix, code, data)
    if not _flushed(sys.stdout):
        _discard_stdout()
    if interruptible.abandoned:  # an engine works on and does not end: an ordinary exit would crash in it
        os._exit(code)
    raise typer.Exit(code)


def _print_error(message: str, fix: str, code: int, data: Mapping[str, Any] | None = None) -> None:
    """Print an error as the one JSON object on stdout that `--json` promises."""
    typer.echo(json.dumps({"error": {"message": message, "fix": fix, "exit_code": code, **(data or {})}}))


def _flushed(stream: TextIO | None) -> bool:
    """Whether all that was printed has gone out. Python would try again at exit, and complain that it cannot."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        return False
    return True


def _discard_stdout() -> None:
    """Send to nowhere what is still to be printed on stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=ReportingGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sdrt {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            show_default=False,
            help="Say on stderr what is done; -vv says more. Warnings are shown in any case.",
        ),
    ] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile Stable Diffusion and its LoRAs into a bundle, and run it without PyTorch.

    One command does it:

        sdrt generate model.safetensors "a red apple" --lora style.safetensors:0.8

    Or two, where the bundle is to have a name and go to another machine:

        sdrt build --checkpoint model.safetensors --lora style.safetensors:0.8

        sdrt generate model+style.sdrt "a red apple" --output apple.png

    Exit codes: 0 ok; 1 a check said no; 2 usage; 3 bad input file; 4 refused as unsafe; 5 this machine does not fit;
    6 out of disk or memory; 7 locked or timed out; 8 inconclusive; 9 not comparable; 70 a bug in sdrt;
    130 interrupted.
    """
    show_log((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


app.command(
    "build",
    epilog="Example: sdrt build --checkpoint model.safetensors --lora style.safetensors:0.8:0.5 --output styled.sdrt",
)(build)
app.command(
    "generate",
    epilog='Example: sdrt generate model.safetensors "a red apple" --lora style.safetensors:0.8 --steps 20 --seed 7',
)(generate)
app.command("inspect", epilog="Example: sdrt inspect style.safetensors --for model.safetensors")(inspect)
app.command("verify", epilog="Example: sdrt verify emoji.sdrt")(verify)
app.command(
    "compile",
    epilog="Example: sdrt compile model.sdrt --target tensorrt-rtx --sm 89 --size 512x512:768x768 --batch 1:4",
)(compile_bundle)
app.command("sign", epilog="Example: sdrt sign model.sdrt --key private.pem")(sign)
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")
app.command("doctor", epilog="Example: sdrt doctor --json")(doctor)
