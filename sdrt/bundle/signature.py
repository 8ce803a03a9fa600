"""Detached signatures over a bundle: ed25519 (RFC 8032) over the bytes of its manifest, and over the record of each
engine in it.

The manifest holds the hash of every file of the bundle, and an engine's record holds the hashes of its plans. So these
few signatures cover everything. They lie beside the bundle in one JSON file, `NAME.sdrt.sig`; the bundle itself is not
changed. Needs the package `cryptography`, which is imported when needed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdrt.bundle.folder import Bundle, check_outside_bundles, open_bundle
from sdrt.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES
from sdrt.engines.record import RECORD
from sdrt.engines.store import check_all, engine_folders
from sdrt.errors import CheckFailed, InputFileError, MachineError, UsageError, printable
from sdrt.files.publish import staged_file, write_file
from sdrt.files.read import read_given
from sdrt.machine.packages import install_command

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT = 1
ALGORITHM = "ed25519"
MAX_KEY_BYTES, MAX_SIGNATURE_BYTES = 1 << 16, 1 << 20
_MAKE_KEY = "Make one with: openssl genpkey -algorithm ed25519 -out private.pem"
_MAKE_PUBLIC = "Take it from the private one: openssl pkey -in private.pem -pubout -out public.pem"


@dataclass(frozen=True)
class Signature:
    """`key` identifies the key: the SHA-256 of its 32 public bytes. `signatures` holds 64 bytes for each file, by its
    name within the bundle.
    """

    key: str
    signatures: Mapping[str, bytes]


def signature_path(bundle: Path) -> Path:
    """Where a bundle's signature lies: beside it, NAME.sdrt.sig."""
    absolute = bundle.absolute()
    return absolute.with_name(absolute.name + ".sig")


def sign(path: Path, private_key: Path, *, output: Path | None = None, force: bool = False) -> tuple[Path, Signature]:
    """Sign a bundle after checking all of it, engines included. Returns the path of the signature, and the signature.

    Raises:
        InputFileError: the key is no ed25519 private key in PEM, or there is no bundle.
        BundleError: the bundle differs from its manifest, or an engine from its record; then nothing is signed.
        UsageError: the signature exists and `force` is off, or its path lies in a bundle.
        MachineError: `cryptography` is not installed.
    """
    bundle = open_bundle(path)
    target = (output or signature_path(path)).absolute()
    check_outside_bundles("--output", target.parent)
    if os.path.lexists(target) and not force:
        raise UsageError(f"{target}: exists already", "Choose another --output, or pass --force to sign again.")
    key = _private_key(private_key)
    check_all(bundle)
    made = Signature(
        _fingerprint(key.public_key()), {name: key.sign(_bytes(bundle.file(name))) for name in signed_names(bundle)}
    )
    document = {
        "format": FORMAT,
        "algorithm": ALGORITHM,
        "key": made.key,
        "signatures": {name: base64.b64encode(signature).decode() for name, signature in made.signatures.items()},
    }
    with staged_file(target) as stage:
        write_file(stage, json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")
    return target, made


def check_signature(path: Path, public_key: Path, *, signature: Path | None = None) -> Signature:
    """Check that a key signed a bundle's manifest and the record of every engine in it. `verify` checks whether the
    files match these.

    Raises:
        CheckFailed: there is no signature, it is malformed, it is of another key or another bundle, or something in the
            bundle is not signed.
        InputFileError: the key is no ed25519 public key in PEM, or there is no bundle.
        BundleError: the manifest is malformed.
        MachineError: another version of sdrt wrote the bundle, or `cryptography` is not installed.
    """
    bundle = open_bundle(path)
    key = _public_key(public_key)
    from cryptography.exceptions import InvalidSignature

    place = signature or signature_path(path)
    found = _read_signature(place)
    if found.key != _fingerprint(key):
        raise CheckFailed(
            f"{place}: signed with the key {found.key[:16]}…, not with {public_key} ({_fingerprint(key)[:16]}…)",
            "Get the signer's public key.",
        )
    for name in signed_names(bundle):
        if name not in found.signatures:
            raise CheckFailed(
                f"{bundle.path}: {printable(name)}: not signed",
                "Sign the bundle again with: sdrt sign; or remove what was added.",
            )
        try:
            key.verify(found.signatures[name], _bytes(bundle.file(name)))
        except InvalidSignature as error:
            message = (
                f"{bundle.path}: {printable(name)}: the signature does not fit: it was changed, or another bundle was"
                " signed"
            )
            raise CheckFailed(message, "Get the bundle and its signature again from whoever signed it.") from error
    return found


def signed_names(bundle: Bundle) -> list[str]:
    """Names of the signed files within the bundle: the manifest and each engine's record."""
    return [
        MANIFEST,
        *sorted((folder / RECORD).relative_to(bundle.path).as_posix() for folder in engine_folders(bundle)),
    ]


def _fingerprint(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def _private_key(path: Path) -> Ed25519PrivateKey:
    key = _load_pem(path, "private", _MAKE_KEY)
    if not isinstance(key, _cryptography().asymmetric.ed25519.Ed25519PrivateKey):
        raise InputFileError(f"{path}: expected an ed25519 private key, found {type(key).__name__}", _MAKE_KEY)
    return cast("Ed25519PrivateKey", key)


def _public_key(path: Path) -> Ed25519PublicKey:
    key = _load_pem(path, "public", _MAKE_PUBLIC)
    if not isinstance(key, _cryptography().asymmetric.ed25519.Ed25519PublicKey):
        raise InputFileError(f"{path}: expected an ed25519 public key, found {type(key).__name__}", _MAKE_PUBLIC)
    return cast("Ed25519PublicKey", key)


def _load_pem(path: Path, kind: str, fix: str) -> Any:
    serialization = _cryptography().serialization
    data = _read(path, MAX_KEY_BYTES)
    if kind == "public" and b"PRIVATE KEY" in data:
        raise InputFileError(f"{path}: a private key, expected a public one; keep it to yourself", fix)
    try:
        return (
            serialization.load_pem_private_key(data, None)
            if kind == "private"
            else serialization.load_pem_public_key(data)
        )
    except TypeError as error:
        raise InputFileError(
            f"{path}: the key is encrypted; sdrt reads plain ones",
            f"Decrypt it: openssl pkey -in {path} -out plain.pem",
        ) from error
    except Exception as error:  # the library raises many kinds of errors for a file that is no key
        raise InputFileError(f"{path}: not a {kind} key in PEM", fix) from error


def _cryptography() -> Any:
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519
        import cryptography.hazmat.primitives.serialization
    except ImportError as error:
        raise MachineError("cryptography is not installed", f"Install it with: {install_command('sign')}") from error
    return cryptography.hazmat.primitives


def _read_signature(path: Path) -> Signature:
    try:
        document = json.loads(_read(path, MAX_SIGNATURE_BYTES))
        if (
            document.keys() != {"format", "algorithm", "key", "signatures"}
            or document["format"] != FORMAT
            or document["algorithm"] != ALGORITHM
        ):
            raise ValueError("other fields, or another format")
        signatures = {str(name): base64.b64decode(text, validate=True) for name, text in document["signatures"].items()}
        if not isinstance(document["key"], str) or any(len(signature) != 64 for signature in signatures.values()):
            raise ValueError("a signature is not 64 bytes")
    except InputFileError as error:
        raise CheckFailed(
            f"no signature: {error.message}",
            "Get NAME.sdrt.sig from whoever made the bundle, or name it with --signature.",
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise CheckFailed(
            f"{path}: not a signature: {printable(str(error))}", "Get it again from whoever signed the bundle."
        ) from error
    return Signature(document["key"], signatures)


def _bytes(path: Path) -> bytes:
    return _read(path, MAX_MANIFEST_BYTES)


def _read(path: Path, limit: int) -> bytes:
    return read_given(path, limit, "Check the path.").data
