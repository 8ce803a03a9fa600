"""`sdrt sign`: a signature of a bundle and of the engines in it."""

from __future__ import annotations

from typing import Annotated

import typer

from sdrt.cli import options
from sdrt.cli.output import print_json
from sdrt.errors import printable


def sign(
    bundle: options.BundleFolder,
    key: options.PrivateKey,
    output: options.NewSignature = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a signature that is there.")] = False,
    as_json: options.Json = False,
) -> None:
    """Sign a bundle: its manifest, and with it every file, and each engine in it.
    Sign again after compiling more engines.
    """
    from sdrt.bundle.signature import sign as run_sign

    path, made = run_sign(bundle, key, output=output, force=force)
    signed = sorted(made.signatures)
    if as_json:
        print_json({"bundle": str(bundle), "signature": str(path), "key": made.key, "signed": signed})
        return
    typer.echo(f"signed {printable(', '.join(signed))} with the key {made.key[:16]}…")
    typer.echo(f"signature {printable(str(path))}")
