"""`sdrt verify`: a bundle's hashes, its graphs against their reference outputs, and with `--key` its signature."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import typer

from sdrt.cli import options
from sdrt.cli.output import print_json
from sdrt.errors import BundleError, CheckFailed, UsageError


def verify(
    bundle: options.BundleFolder,
    key: options.PublicKey = None,
    signature: options.Signature = None,
    timeout: options.VerifyTimeout = 900.0,
    as_json: options.Json = False,
) -> None:
    """Check a bundle's hashes, and each graph against the reference outputs kept in it.
    Exit code 1 if anything differs.
    """
    from sdrt.runtime.verify import verify as run_verify

    with options.time_limit(timeout, bundle):
        signed_by = _check_signed(bundle, key, signature)
        checks = run_verify(bundle)
    if as_json:
        fields = [asdict(check) for check in checks]
        print_json({"bundle": str(bundle), "ok": True, "signed_by": signed_by, "checks": fields})
        return
    if signed_by is not None:
        typer.echo(f"ok  signed with the key {signed_by[:16]}…")
    for check in checks:
        what = f"{check.graph:13} {check.compute:5} {check.output:16} {check.backend}"
        typer.echo(f"ok  {what}  error {check.error:.1e}, limit {check.limit:.0e}")


def _check_signed(bundle: Path, key: Path | None, signature: Path | None) -> str | None:
    """The identity of the key that signed a bundle; None without `--key`.

    Raises:
        CheckFailed: the signature is missing or does not fit, or the bundle is not what its manifest says.
        UsageError: `--signature` without `--key`.
    """
    if key is None:
        if signature is not None:
            raise UsageError("--signature: nothing to check it with", "Pass the signer's public key: --key PUBLIC.pem")
        return None
    from sdrt.bundle.signature import check_signature

    try:
        return check_signature(bundle, key, signature=signature).key
    except BundleError as error:
        raise CheckFailed(error.message, error.fix) from error
