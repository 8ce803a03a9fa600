"""Every option that takes a path, given everything a path can be that is no such file: answered at once, with the exit
code of bad input or bad usage.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import LORA
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from PIL import Image
from typer.testing import CliRunner

from sdrt.cli.app import app

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes, devices and links as Unix has them")
HANG_S = 20


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": bound_socket,
    "folder": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path),
    "link to an endless device": lambda path: path.symlink_to("/dev/zero"),
    "link to an empty device": lambda path: path.symlink_to("/dev/null"),
    "link to a proc file that cannot be read": lambda path: path.symlink_to("/proc/self/mem"),
    "link to a proc file without a size": lambda path: path.symlink_to("/proc/self/environ"),
    "link to a proc file that may wait": lambda path: path.symlink_to("/proc/kmsg"),
    "nothing": Path.touch,
    "text": lambda path: path.write_text("\x1b[31mtext"),
}
NAME = "odd \x1b[31m\nname.png"  # .png, since `generate --output` wants one


@pytest.fixture
def alarmed() -> Iterator[None]:
    def too_long(*_: object) -> None:
        raise AssertionError(f"still not answered after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a key of each kind and a picture."""
    folder = tmp_path_factory.mktemp("good")
    key = ed25519.Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
    (folder / "private.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "public.pem").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "picture.png")
    return folder


def command(where: str, path: Path, checkpoint: Path, bundle: Path, good: Path, out: Path) -> list[object]:
    """A command line that is right but for `path`."""
    build = ["build", "--target", "onnxruntime"]
    generate = ["generate", bundle, "x", "--steps", "1", "--size", "64x64"]
    return {
        "build --checkpoint": [*build, "--checkpoint", path, "--output", out],
        "build --lora": [*build, "--checkpoint", checkpoint, "--lora", path, "--output", out],
        "build --embedding": [*build, "--checkpoint", checkpoint, "--embedding", f"{path}:word", "--output", out],
        "build --hypernetwork": [*build, "--checkpoint", checkpoint, "--hypernetwork", path, "--output", out],
        "build --vae": [*build, "--checkpoint", checkpoint, "--vae", path, "--output", out],
        "build --output": [*build, "--checkpoint", checkpoint, "--output", path],
        "build --force --output": [*build, "--checkpoint", checkpoint, "--force", "--output", path],
        "inspect": ["inspect", path],
        "inspect --for": ["inspect", LORA, "--for", path],
        "verify": ["verify", path],
        "verify --key": ["verify", bundle, "--key", path],
        "verify --signature": ["verify", bundle, "--key", good / "public.pem", "--signature", path],
        "sign": ["sign", path, "--key", good / "private.pem"],
        "sign --key": ["sign", bundle, "--key", path, "--output", out],
        "sign --output": ["sign", bundle, "--key", good / "private.pem", "--output", path],
        "compile": ["compile", path, "--target", "openvino"],
        "generate": ["generate", path, "x", "--output", out],
        "generate --output": [*generate, "--output", path],
        "generate --init-image": [*generate, "--init-image", path, "--output", out],
        "generate --mask": [*generate, "--init-image", good / "picture.png", "--mask", path, "--output", out],
        "generate --from-png": ["generate", bundle, "--from-png", path, "--output", out],
        "bench run": ["bench", "run", path],
        "bench run --prompts": ["bench", "run", bundle, "--prompts", path, "--size", "64x64"],
        "bench compare": ["bench", "compare", path, path],
        "bench trend": ["bench", "trend", path],
    }[where]


WHERE = [
    "build --checkpoint",
    "build --lora",
    "build --embedding",
    "build --hypernetwork",
    "build --vae",
    "build --output",
    "build --force --output",
    "inspect",
    "inspect --for",
    "verify",
    "verify --key",
    "verify --signature",
    "sign",
    "sign --key",
    "sign --output",
    "compile",
    "generate",
    "generate --output",
    "generate --init-image",
    "generate --mask",
    "generate --from-png",
    "bench run",
    "bench run --prompts",
    "bench compare",
    "bench trend",
]
SLOW = ("generate --output", "generate --init-image", "generate --mask")
"""These load the bundle before they read the file; a few kinds will do."""
FEW = ("pipe", "dangling link", "link to an endless device", "link to a proc file that may wait")
FINE = {("bench run --prompts", "text"), ("bench run --prompts", "link to a proc file without a size")}
"""Any text is a prompt."""


@pytest.mark.parametrize("where", WHERE)
def test_c19_every_input_and_everything_it_may_not_be(
    where: str, tmp_path: Path, small_checkpoint: Path, small_bundle: Path, good: Path, alarmed: None
) -> None:
    expected = (2,) if where.endswith("--output") else (1,) if where == "verify --signature" else (3,)
    out = tmp_path / "out.png"
    for kind, make in KINDS.items():
        if (
            (where, kind) in FINE
            or (where in SLOW and kind not in FEW)
            or (kind.endswith("wait") and not os.access("/proc/kmsg", os.R_OK))
        ):
            continue
        path = tmp_path / kind / NAME
        path.parent.mkdir()
        make(path)
        before = os.lstat(path)
        answer = CliRunner().invoke(
            app, [str(argument) for argument in command(where, path, small_checkpoint, small_bundle, good, out)]
        )
        assert answer.exit_code in expected, (kind, answer.exit_code, answer.stderr)
        errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and errors[0].isprintable() and "name.png" in errors[0], (kind, answer.stderr)
        assert "odd \\x1b[31m\\nname.png" in errors[0], (kind, errors)
        assert os.lstat(path).st_ino == before.st_ino and os.lstat(path).st_size == before.st_size, kind
        assert [entry.name for entry in path.parent.iterdir()] == [NAME], kind
        assert not os.path.lexists(out), kind


@pytest.mark.parametrize("where", WHERE)
def test_c19_names_that_no_file_can_have(
    where: str, tmp_path: Path, small_checkpoint: Path, small_bundle: Path, good: Path, alarmed: None
) -> None:
    for name in ("x" * 5000 + ".png", "a\0b.png", ""):
        arguments = command(where, Path(name), small_checkpoint, small_bundle, good, tmp_path / "out.png")
        answer = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert answer.exit_code in ((1, 2, 3) if where != "bench run --prompts" else (2, 3)), (
            name[:20],
            answer.exit_code,
            answer.stderr[-500:],
        )
        assert "Traceback" not in answer.stderr
    assert not os.path.lexists(tmp_path / "out.png")


SIDE_FILES = (
    "adapter_config.json",
    "model_index.json",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
)


@pytest.mark.parametrize("name", SIDE_FILES)
def test_c19_files_beside_the_one_that_was_given(
    tmp_path: Path, small_checkpoint: Path, alarmed: None, name: str
) -> None:
    """What a folder, or an adapter's folder, may hold in place of a file that is read with it."""
    for kind, make in KINDS.items():
        folder = tmp_path / kind
        for part in ("unet", "vae", "text_encoder", "scheduler"):
            (folder / part).mkdir(parents=True)
        if name == "adapter_config.json":
            peft_lora(folder / "lora.safetensors")
            arguments = ["build", "--checkpoint", small_checkpoint, "--lora", folder / "lora.safetensors"]
        else:
            (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
            for part in ("unet", "vae", "text_encoder"):
                (folder / part / "config.json").write_text("{}")
                stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
                (folder / part / f"{stem}.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
            (folder / "scheduler" / "scheduler_config.json").write_text("{}")
            (folder / name).unlink()
            arguments = ["build", "--checkpoint", folder]
        make(folder / name)
        answer = CliRunner().invoke(
            app, [str(a) for a in [*arguments, "--target", "onnxruntime", "--output", tmp_path / "out.sdrt"]]
        )
        if kind == "dangling link" and name == "adapter_config.json":
            assert answer.exit_code == 0, answer.stderr  # as if it were not there, and the build says so
            assert "adapter_config.json is not beside it" in answer.stderr
            shutil.rmtree(tmp_path / "out.sdrt")
            continue
        assert answer.exit_code == 3, (kind, answer.exit_code, answer.stderr)
        assert Path(name).name in answer.stderr or "no weights" in answer.stderr, (kind, answer.stderr)
        assert not (tmp_path / "out.sdrt").exists()


def peft_lora(path: Path) -> None:
    """A LoRA of one module as peft names it, whose alpha lies in the file beside it."""
    import torch
    from safetensors.torch import save_file

    save_file(
        {
            f"base_model.model.{MODULE}.lora_{part}.weight": torch.ones(shape)
            for part, shape in (("A", (2, 64)), ("B", (64, 2)))
        },
        path,
    )


MODULE = "text_model.encoder.layers.0.self_attn.q_proj"
