"""Signing a bundle and checking the signature, against openssl as the independent reference."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat
from typer.testing import CliRunner

from sdrt.bundle.folder import check_files, open_bundle
from sdrt.cli import app
from sdrt.errors import BundleError, CheckFailed, InputFileError, SdrtError, UsageError
from sdrt.signature import check_signature, sign, signature_path


def write_keys(folder: Path, seed: int = 1) -> tuple[Path, Path]:
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    private, public = folder / f"private{seed}.pem", folder / f"public{seed}.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


@pytest.fixture
def bundle(flat_bundle: Path, tmp_path: Path) -> Path:
    """A copy whose manifest, and engine folder, may be changed."""
    path = tmp_path / "flat.sdrt"
    shutil.copytree(flat_bundle, path, copy_function=os.link)
    (path / "manifest.json").unlink()
    shutil.copy(flat_bundle / "manifest.json", path / "manifest.json")
    return path


@pytest.fixture
def engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine in the bundle; its record is not read by these tests."""
    monkeypatch.setattr("sdrt.signature.check_all", check_files)
    folder = bundle / "engines" / "tensorrt-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text("{}")
    return folder


def refused(kind: type[SdrtError], fragment: str, call: Callable[[], object]) -> SdrtError:
    with pytest.raises(SdrtError) as caught:
        call()
    assert type(caught.value) is kind, caught.value
    assert fragment in caught.value.message
    return caught.value


def test_round_trip(bundle: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    path, made = sign(bundle, private)
    assert path == signature_path(bundle) == bundle.with_name("flat.sdrt.sig")
    assert sorted(made.signatures) == ["manifest.json"]
    assert check_signature(bundle, public) == made
    raw = ed25519.Ed25519PrivateKey.from_private_bytes(b"\1" * 32).public_key().public_bytes_raw()
    assert made.key == hashlib.sha256(raw).hexdigest()
    open_bundle(bundle)  # the bundle itself is as it was


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is the reference here")
def test_openssl_agrees(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = sign(bundle, keys[0])
    (tmp_path / "raw").write_bytes(base64.b64decode(json.loads(path.read_text())["signatures"]["manifest.json"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys[1], "-rawin", "-in", bundle / "manifest.json", "-sigfile", tmp_path / "raw"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (bundle / "manifest.json").write_bytes((bundle / "manifest.json").read_bytes() + b"\n")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes the keys with openssl")
def test_the_documented_commands_make_keys(bundle: Path, tmp_path: Path) -> None:
    private, public = tmp_path / "a.pem", tmp_path / "b.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    sign(bundle, private)
    check_signature(bundle, public)


def test_signatures_are_reproducible(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    first, _ = sign(bundle, keys[0])
    second, _ = sign(bundle, keys[0], output=tmp_path / "other.sig")
    assert first.read_bytes() == second.read_bytes()


def test_b6_manifest_edited_together_with_a_file(bundle: Path, keys: tuple[Path, Path]) -> None:
    """The hashes fit, so only the signature tells."""
    sign(bundle, keys[0])
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["name"] = "other"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    open_bundle(bundle)
    refused(CheckFailed, "manifest.json: the signature does not fit", lambda: check_signature(bundle, keys[1]))


def test_b7_signature_of_another_bundle(bundle: Path, blindbox_bundle: Path, keys: tuple[Path, Path]) -> None:
    sign(blindbox_bundle, keys[0], output=signature_path(bundle))
    refused(CheckFailed, "another bundle was signed", lambda: check_signature(bundle, keys[1]))


def test_b7_signature_by_another_key(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(bundle, keys[0])
    _, other = write_keys(tmp_path, 2)
    refused(CheckFailed, "signed with the key", lambda: check_signature(bundle, other))
    document = json.loads(signature_path(bundle).read_text())
    document["key"] = hashlib.sha256(ed25519.Ed25519PrivateKey.from_private_bytes(b"\2" * 32).public_key().public_bytes_raw()).hexdigest()
    signature_path(bundle).write_text(json.dumps(document))
    refused(CheckFailed, "does not fit", lambda: check_signature(bundle, other))


def test_b7_signature_removed(bundle: Path, keys: tuple[Path, Path]) -> None:
    assert "NAME.sdrt.sig" in refused(CheckFailed, "no signature", lambda: check_signature(bundle, keys[1])).fix


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "{}", '{"format": 2, "algorithm": "ed25519", "key": "", "signatures": {}}', '{"format": 1, "algorithm": "rsa", "key": "", "signatures": {}}',
     '{"format": 1, "algorithm": "ed25519", "key": 1, "signatures": {}}', '{"format": 1, "algorithm": "ed25519", "key": "", "signatures": {"manifest.json": "AAAA"}}',
     '{"format": 1, "algorithm": "ed25519", "key": "", "signatures": {"manifest.json": "\u00e9"}}', '{"format": 1, "algorithm": "ed25519", "key": "", "signatures": []}', "[" * 100_000],
)  # fmt: skip
def test_malformed_signatures(bundle: Path, keys: tuple[Path, Path], text: str) -> None:
    signature_path(bundle).write_text(text, encoding="utf-8")
    refused(CheckFailed, "not a signature", lambda: check_signature(bundle, keys[1]))


def test_an_engine_that_was_added(bundle: Path, keys: tuple[Path, Path], engine: Path) -> None:
    path, made = sign(bundle, keys[0])
    name = f"engines/{engine.name}/engine.json"
    assert sorted(made.signatures) == [name, "manifest.json"]
    check_signature(bundle, keys[1])
    (engine / "engine.json").write_text("{ }")
    refused(CheckFailed, f"{name}: the signature does not fit", lambda: check_signature(bundle, keys[1]))
    document = json.loads(path.read_text())
    del document["signatures"][name]
    path.write_text(json.dumps(document))
    refused(CheckFailed, f"{name}: not signed", lambda: check_signature(bundle, keys[1]))


def test_a_damaged_bundle_is_not_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    file = bundle / "tokenizer" / "tokenizer.json"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.unlink()
    file.write_bytes(data)
    refused(BundleError, "tokenizer/tokenizer.json", lambda: sign(bundle, keys[0]))
    assert not signature_path(bundle).exists()


def test_a_damaged_engine_is_not_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    folder = bundle / "engines" / "tensorrt-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text("{}")
    refused(BundleError, "engine.json", lambda: sign(bundle, keys[0]))


def test_an_existing_signature_needs_force(bundle: Path, keys: tuple[Path, Path]) -> None:
    sign(bundle, keys[0])
    refused(UsageError, "exists already", lambda: sign(bundle, keys[0]))
    sign(bundle, keys[0], force=True)


def other_kind(path: Path) -> None:
    path.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def encrypted(path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))


BAD_KEYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be read"),
    "text": (lambda path: path.write_text("key"), "not a private key"),
    "empty": (Path.touch, "not a private key"),
    "folder": (Path.mkdir, "expected a file"),
    "pipe": (os.mkfifo, "expected a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "expected a file"),
    "large": (lambda path: path.write_bytes(bytes(70_000)), "more than the limit of 65,536 bytes"),
    "another algorithm": (other_kind, "expected an ed25519 private key"),
    "encrypted": (encrypted, "encrypted"),
}


@pytest.mark.parametrize(("make", "fragment"), BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_bad_keys(bundle: Path, tmp_path: Path, make: Callable[[Path], object], fragment: str) -> None:
    make(tmp_path / "key.pem")
    assert str(tmp_path / "key.pem") in refused(InputFileError, fragment, lambda: sign(bundle, tmp_path / "key.pem")).message


def test_keys_in_each_others_place(bundle: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    refused(InputFileError, "not a private key", lambda: sign(bundle, public))
    sign(bundle, private)
    refused(InputFileError, "a private key, expected a public one", lambda: check_signature(bundle, private))


# The command


def test_the_command(bundle: Path, keys: tuple[Path, Path]) -> None:
    run = CliRunner().invoke
    private, public = map(str, keys)
    signed = run(app, ["sign", str(bundle), "--key", private, "--json"])
    assert signed.exit_code == 0 and json.loads(signed.stdout)["signed"] == ["manifest.json"]
    verified = run(app, ["verify", str(bundle), "--key", public, "--json"])
    assert verified.exit_code == 0 and json.loads(verified.stdout)["signed_by"] == json.loads(signed.stdout)["key"]
    assert run(app, ["sign", str(bundle), "--key", private]).exit_code == 2
    assert run(app, ["sign", str(bundle)]).exit_code == 2
    assert run(app, ["verify", str(bundle), "--signature", "x"]).exit_code == 2
    signature_path(bundle).unlink()
    assert run(app, ["verify", str(bundle), "--key", public]).exit_code == 1
    assert run(app, ["verify", str(bundle), "--key", "none.pem"]).exit_code == 3


def test_without_the_package(bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cryptography.hazmat.primitives.asymmetric.ed25519", "cryptography.hazmat.primitives.serialization"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    result = CliRunner().invoke(app, ["sign", str(bundle), "--key", str(keys[0])])
    assert result.exit_code == 5 and "pip install 'cryptography>=44'" in result.stderr
