"""The `sdrt` command. Its files alone print and exit; every command imports what it needs when it runs."""

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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from sdrt import __version__, interruptible
from sdrt.cli import bench as cli_bench
from sdrt.cli import compile as cli_compile
from sdrt.cli import generate as cli_generate
from sdrt.cli import inspect as cli_inspect
from sdrt.cli import sign as cli_signature
from sdrt.cli.output import BUILD_STAGES, BundleArgument, Json, StageProgress, interrupted, print_json, show_log, size_option, time_limit
from sdrt.errors import MachineError, SdrtError, printable
from sdrt.machine.packages import install_command

BUG, INTERRUPTED = 70, 130
_COMMAND_LINE_ERROR: Any = typer.BadParameter.__base__
"""What the parser raises for options that are missing, unknown or of another type: click's UsageError, or typer's own copy of it."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_PACKAGES = {"torch": "build", "onnx": "build", "onnxscript": "build", "onnx_ir": "build", "onnxruntime": "cpu", "matplotlib": "bench", "openvino": "openvino"}


class ReportingGroup(TyperGroup):
    """Turns errors into one line on stderr, what to do about it, and DESIGN's exit codes. Tracebacks only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        words = [*ctx._protected_args, *ctx.args]
        if threading.current_thread() is threading.main_thread():
            interrupted.clear()
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a stopped build, or one whose terminal went away, cleans up like an interrupted one
                number = getattr(signal, name, None)
                if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):  # as nohup leaves it
                    signal.signal(number, _interrupt)
        if os.name == "posix" and (stderr := sys.__stderr__) is not None and sys.stderr is stderr:
            raw = io.BufferedWriter(_AsFarAsItGoes(stderr.fileno(), "wb", closefd=False))
            sys.stderr = io.TextIOWrapper(raw, stderr.encoding, stderr.errors, line_buffering=True)
        try:
            return super().invoke(ctx)
        except SdrtError as error:
            _fail(ctx, error.line, error.fix, error.exit_code, error.data)
        except KeyboardInterrupt:
            _fail(ctx, "interrupted; nothing was left behind", "", INTERRUPTED)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _PACKAGES:
                _bug(ctx, error)
            _fail(ctx, f"{package} is not installed", f"Install it with: {install_command(_PACKAGES[package])}", MachineError.exit_code)
        except BrokenPipeError:
            _discard_stdout()  # the reader went away, as in `| head`
            raise typer.Exit(0) from None
        except OSError as error:
            if error.errno not in _NO_ROOM:
                _bug(ctx, error)
            _fail(
                ctx, f"{error.filename or type(error).__name__}: {error.strerror}", "Free disk space, memory, or raise the limit on open files (ulimit -n).", 6
            )
        except MemoryError:
            _fail(ctx, "out of memory", "Choose a smaller size or batch, or a machine with more memory.", 6)
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click"):
                if isinstance(error, _COMMAND_LINE_ERROR) and "--json" in words[: words.index("--") if "--" in words else None]:
                    _print_error(error.format_message(), "Run the command with --help to see its options.", error.exit_code)
                raise
            if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
                _fail(ctx, "no more threads may be started here", "Raise the limit on processes (ulimit -u), or stop other programs.", 6)
            _bug(ctx, error)


class _AsFarAsItGoes(io.FileIO):
    """Stderr as it is, where what cannot be written is left out: a full disk under a log must not fail the work that it tells of."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(memoryview(data).cast("B"))


def _bug(ctx: Any, error: Exception) -> NoReturn:
    _fail(ctx, f"{type(error).__name__}: {error}", "This is a bug in sdrt; please report it with the output of --debug.", BUG)


def _interrupt(*_: object) -> NoReturn:
    interrupted.set()
    raise KeyboardInterrupt


def _fail(ctx: Any, message: str, fix: str, code: int, data: Mapping[str, Any] | None = None) -> NoReturn:
    if ctx.params.get("debug"):
        traceback.print_exc()
    typer.echo(f"error: {printable(message)}", err=True)
    if fix:
        typer.echo(f"  fix: {printable(fix)}", err=True)
    if ctx.find_root().obj == "json":
        with suppress(OSError):  # it may be what has failed
            _print_error(message, fix, code, data)
    if not _flushed(sys.stdout):
        _discard_stdout()
    if interruptible.abandoned:  # an engine that does not end; taking it down while it works would crash
        os._exit(code)
    raise typer.Exit(code)


def _print_error(message: str, fix: str, code: int, data: Mapping[str, Any] | None = None) -> None:
    """An error as the JSON object on stdout that `--json` promises."""
    typer.echo(json.dumps({"error": {"message": message, "fix": fix, "exit_code": code, **(data or {})}}))


def _flushed(stream: TextIO | None) -> bool:
    """Whether all that was printed has gone out; Python would try again at exit, and say that it cannot."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        return False
    return True


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=ReportingGroup, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False, context_settings=HELP
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sdrt {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say on stderr what is done; -vv says more. Warnings are shown in any case.")
    ] = 0,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Compile Stable Diffusion and its LoRAs into a bundle, and run it without PyTorch.

    Two commands do it:

        sdrt build --checkpoint model.safetensors --lora style.safetensors:0.8

        sdrt generate model+style.sdrt "a red apple" --output apple.png

    Exit codes: 0 ok; 1 a check said no; 2 usage; 3 bad input file; 4 refused as unsafe; 5 this machine does not fit; 6 out of disk or
    memory; 7 locked or timed out; 8 inconclusive; 70 a bug in sdrt; 130 interrupted.
    """
    show_log((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


@app.command(epilog="Example: sdrt build --checkpoint model.safetensors --lora style.safetensors:0.8:0.5 --output styled.sdrt")
def build(
    ctx: typer.Context,
    checkpoint: Annotated[Path, typer.Option("--checkpoint", metavar="FILE|DIR", help="Stable Diffusion checkpoint: one .safetensors, .ckpt, .pt or .bin file in any tool's layout, or a folder that diffusers saved. Nothing in it is ever executed.")],
    lora: Annotated[list[str] | None, typer.Option("--lora", metavar="FILE[:SCALE[:TE_SCALE]]", help="LoRA, LyCORIS or DoRA file to fuse; may be repeated, and they act in the order given, which matters only where one is a DoRA. SCALE (default 1) weighs its change of the UNet, TE_SCALE (default SCALE) that of the text encoder. AUTOMATIC1111's prompt syntax has the two in the other order.")] = None,
    embedding: Annotated[list[str] | None, typer.Option("--embedding", metavar="FILE[:TRIGGER]", help="Textual-inversion embedding to put into the vocabulary; may be repeated. TRIGGER (default the file's stem) is what a prompt says to use it.")] = None,
    hypernetwork: Annotated[list[str] | None, typer.Option("--hypernetwork", metavar="FILE[:SCALE]", help="Hypernetwork to build in, AUTOMATIC1111's .pt; may be repeated, they apply in the order given. SCALE (default 1) weighs it.")] = None,
    vae: Annotated[Path | None, typer.Option("--vae", metavar="FILE|DIR", help="VAE to use instead of the checkpoint's own: a file in any layout, a diffusers VAE's folder, or another checkpoint.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the UNet's averaged (EMA) weights, of a checkpoint that holds both.")] = False,
    target: Annotated[list[str] | None, typer.Option("--target", metavar="NAME", help="Engine to prepare; may be repeated: onnxruntime runs the bundle as it is, and nothing is saved for it, as that takes gigabytes (sdrt compile does); openvino, tensorrt-rtx and tensorrt compile it for the bundle's size once it is built, openvino for prompts of up to 75 and of up to 150 tokens. auto is tensorrt where it is installed and a GPU answers, else openvino where it is installed, else onnxruntime.")] = None,
    precision: Annotated[str, typer.Option("--precision", metavar="fp16|bf16|fp32", help="Storage type of the weights. ONNX Runtime computes in float32 whatever it is, OpenVINO in bfloat16 where the CPU has it and this is not fp32.")] = "fp16",
    size: Annotated[str | None, typer.Option("--size", metavar="WxH", help="Default picture size in pixels, multiples of 8; the checkpoint's own if not given. `generate` may choose any other that an engine takes.")] = None,
    clip_skip: Annotated[list[int] | None, typer.Option("--clip-skip", metavar="N", help="Text-encoder layer to use, counted from the end as AUTOMATIC1111 does: 1, the last, if not given. Repeat it to build several; `generate --clip-skip` then chooses, the first being its default.")] = None,
    allow_unmatched: Annotated[bool, typer.Option("--allow-unmatched", help="Leave out LoRA keys that belong to no module of the model, and the part of a hypernetwork that belongs to no layer, instead of failing.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="NAME.sdrt", help="Folder to write; by default the stems of the checkpoint and LoRAs, in the working folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it is a bundle. Nothing else is ever replaced.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Turn a checkpoint and its adapters into a bundle.

    The first build of an architecture traces its networks, about a minute; later ones of any checkpoint or LoRA take the traces from the
    cache ($SDRT_CACHE_DIR, or ~/.cache/sdrt). Every build runs each graph against the network it came from before it calls itself done.
    """
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.export.adapters import parse_lora_option
    from sdrt.export.build import BuildOptions
    from sdrt.export.build import build as run_build
    from sdrt.export.embeddings import parse_embedding_option
    from sdrt.export.hypernetworks import parse_hypernetwork_option

    targets = cli_compile.checked_targets(target or ["auto"])
    options = BuildOptions(
        checkpoint, tuple(parse_lora_option(text) for text in lora or []), vae, precision, size_option(size), tuple(clip_skip or [1]), allow_unmatched, output, force,
        embeddings=tuple(parse_embedding_option(text) for text in embedding or []), hypernetworks=tuple(parse_hypernetwork_option(text) for text in hypernetwork or []), ema=ema,
    )  # fmt: skip
    with StageProgress(BUILD_STAGES) as progress:
        report = run_build(options, progress)
    manifest = report.manifest
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    for note in report.notes:
        typer.echo(f"note: {printable(note)}", err=True)
    engines = cli_compile.compile_after_build(report.path, targets)
    if as_json:
        print_json(
            {
                "bundle": str(report.path), "size_bytes": size_bytes, "sources": [asdict(source) for source in manifest.sources], "notes": list(report.notes),
                "stages_s": dict(report.stages_s), "cached_traces": list(report.cached), "errors": {g: {c: record.error for c, record in p.items()} for g, p in manifest.graphs.items()},
                "engines": [cli_compile.as_fields(engine) for engine in engines],
            }
        )  # fmt: skip
        return
    for source in manifest.sources:
        if source.kind == "lora":
            changes = ", ".join(f"{source.applied[c]} modules of the {c} (change {source.relative_change[c]:.1%})" for c in source.applied) or "nothing"
            typer.echo(f"{printable(source.name)} at {source.scale:g}:{source.te_scale:g} applied to {changes}")
        elif source.kind == "embedding":
            typer.echo(f"{printable(source.name)}: {source.applied['text_encoder']} vectors; a prompt uses it by saying {printable(source.trigger or '')}")
        elif source.kind == "hypernetwork":
            typer.echo(f"{printable(source.name)} at {source.scale:g} applied to {source.applied.get('unet', 0)} attention layers")
    typer.echo(f"built {printable(str(report.path))} ({size_bytes / 1e6:.1f} MB) in {sum(report.stages_s.values()):.1f} s")
    for engine in engines:
        cli_compile.print_compiled(engine, manifest)
    typer.echo(f'next: sdrt generate {printable(os.path.relpath(report.path))} "your prompt" --output picture.png', err=True)


app.command("generate", epilog='Example: sdrt generate emoji.sdrt "red apple" --cfg 3 --seed 7 --count 4 --output apple.png')(cli_generate.generate)


app.command("inspect", epilog="Example: sdrt inspect style.safetensors --for model.safetensors")(cli_inspect.inspect)


@app.command(epilog="Example: sdrt verify emoji.sdrt")
def verify(
    ctx: typer.Context,
    bundle: BundleArgument,
    key: Annotated[Path | None, typer.Option("--key", metavar="PUBLIC.pem", help="Also check that this ed25519 key signed the bundle and every engine in it, before anything else.")] = None,
    signature: Annotated[Path | None, typer.Option("--signature", metavar="FILE", help="Where the signature is; NAME.sdrt.sig beside the bundle if not given.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="Seconds after which it ends with exit code 7: a graph may be made to take for ever.")] = 900.0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Check a bundle's hashes, and each graph against the reference outputs kept in it. Exit code 1 if anything differs."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.runtime.verify import verify as run_verify

    with time_limit(timeout, bundle):
        signed_by = cli_signature.check_signed(bundle, key, signature)
        checks = run_verify(bundle)
    if as_json:
        print_json({"bundle": str(bundle), "ok": True, "signed_by": signed_by, "checks": [asdict(check) for check in checks]})
        return
    if signed_by is not None:
        typer.echo(f"ok  signed with the key {signed_by[:16]}…")
    for check in checks:
        typer.echo(f"ok  {check.graph:13} {check.compute:5} {check.output:16} {check.backend}  error {check.error:.1e}, limit {check.limit:.0e}")


app.command("compile", epilog="Example: sdrt compile model.sdrt --target tensorrt-rtx --sm 89 --size 512x512:768x768 --batch 1:4")(cli_compile.compile_bundle)
app.command("sign", epilog="Example: sdrt sign model.sdrt --key private.pem")(cli_signature.sign)
app.add_typer(cli_bench.app, name="bench")
app.command("doctor", epilog="Example: sdrt doctor --json")(cli_compile.doctor)
