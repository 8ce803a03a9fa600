"""`sdrt sign`, and what `sdrt verify --key` adds to the check of hashes and graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdrt.cli.output import BundleArgument, Json, print_json
from sdrt.errors import BundleError, CheckFailed, UsageError, printable


def sign(
    ctx: typer.Context,
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option("--key", metavar="PRIVATE.pem", help="An ed25519 private key in PEM, as `openssl genpkey -algorithm ed25519` makes it.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write the signature; NAME.sdrt.sig beside the bundle if not given.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a signature that is there.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Sign a bundle: its manifest, and with it every file, and each engine in it. Sign again after compiling more engines."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.signature import sign as run_sign

    path, made = run_sign(bundle, key, output=output, force=force)
    if as_json:
        print_json({"bundle": str(bundle), "signature": str(path), "key": made.key, "signed": sorted(made.signatures)})
        return
    typer.echo(f"signed {printable(', '.join(sorted(made.signatures)))} with the key {made.key[:16]}…")
    typer.echo(f"signature {printable(str(path))}")


def check_signed(bundle: Path, key: Path | None, signature: Path | None) -> str | None:
    """The identity of the key that signed a bundle, if `--key` asks for it.

    Raises:
        CheckFailed: the signature is missing or does not fit, or the bundle is not what its manifest says.
        UsageError: `--signature` without `--key`.
    """
    if key is None:
        if signature is not None:
            raise UsageError("--signature: nothing to check it with", "Pass the signer's public key: --key PUBLIC.pem")
        return None
    from sdrt.signature import check_signature

    try:
        return check_signature(bundle, key, signature=signature).key
    except BundleError as error:
        raise CheckFailed(error.message, error.fix) from error
