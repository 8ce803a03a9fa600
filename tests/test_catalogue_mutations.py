"""10,000 seeded mutations of a checkpoint's header, a LoRA's header and a manifest: refused with exit code 3 or 4 and a message, or read. Never a bug."""

from __future__ import annotations

import json
import math
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKPOINT, LORA
from safetensors.torch import save_file
from tiny_model import SMALL

from sdrt.bundle import open_bundle
from sdrt.errors import SdrtError
from sdrt.export.adapters import LoraOption, open_lora
from sdrt.export.architecture import UNetSpec
from sdrt.export.checkpoint import open_checkpoint, select
from sdrt.export.graph import recipes

COUNTS = {"checkpoint": 2_000, "lora": 4_000, "manifest": 4_000}
HANG_S = 60
MEMORY_BYTES = 300 << 20
WORDS = [
    b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b'""', b"[]", b"{}", b"9" * 30, b'"\\u0000"', b'"\\ud800"', b'"F64"', b'"BOOL"', b'"../x"', b"[[[[[[[[", b"4611686018427387904",
    b'"\\u001b[31m"', b'"lora_unet_x.lora_up.weight"', b'"format":', b',"a":1', b"}}", b"]", b'"data_offsets":[0,4]', b"\xff\xfe", b"\\", b" ",
]  # fmt: skip


def mutated(data: bytes, generator: random.Random) -> bytes:
    """One to four edits: bits, bytes, cuts, repeats, a word of JSON's own in place of something."""
    result = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4))):
        start = generator.randrange(len(result) + 1)
        end = min(len(result), start + generator.choice((0, 1, 1, 2, 8, 40, 400)))
        kind = generator.randrange(5)
        if kind == 0 and start < len(result):
            result[start] ^= 1 << generator.randrange(8)
        elif kind == 1:
            result[start:end] = generator.randbytes(end - start)
        elif kind == 2:
            result[start:end] = b""
        elif kind == 3:
            result[start:start] = result[start:end] * generator.choice((1, 2, 50))
        else:
            result[start:end] = generator.choice(WORDS)
    return bytes(result)


def swapped(data: bytes, generator: random.Random) -> bytes:
    """Still JSON: values exchanged, removed, repeated under other names, or replaced."""
    document = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                collect(node[key])

    collect(document)
    for _ in range(generator.choice((1, 1, 2, 5))):
        node, key = generator.choice(places)
        other_node, other_key = generator.choice(places)
        try:
            kind = generator.randrange(4)
            if kind == 0:
                node[key], other_node[other_key] = other_node[other_key], node[key]
            elif kind == 1:
                del node[key]
            elif kind == 2 and isinstance(node, dict):
                node[str(other_key)] = node[key]
            else:
                node[key] = generator.choice([0, -1, 2**64, 1.5, None, True, "", "\0\x1b[2J", "é" * 300, [], {}, [0, 0], [-1], ["x"], {"a": {}}])
        except (KeyError, IndexError):
            continue
    try:
        return json.dumps(document).encode()
    except (ValueError, RecursionError):  # a value was put into itself
        return data


@contextmanager
def no_hang(what: str) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return

    def too_long(*_: object) -> None:
        raise AssertionError(f"{what}: still not answered after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, original: bytes, attempt: Callable[[bytes], None]) -> None:
    resource = pytest.importorskip("resource")
    generator = random.Random(f"mutations of a {name}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for index in range(COUNTS[name]):
        data = swapped(original, generator) if index % 3 == 0 else mutated(original, generator)
        with no_hang(f"{name} {index}"):
            try:
                attempt(data)
            except SdrtError as error:
                assert error.exit_code in (3, 4) or (name == "manifest" and "upgrade" in error.fix.lower()), (index, error)
                assert len(error.message) > 20, (index, error)
                assert error.message.isprintable(), (index, error)
                refused += 1
    assert refused > COUNTS[name] // 2
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_BYTES


def header(path: Path) -> tuple[bytes, int]:
    with path.open("rb") as stream:
        size_bytes = int.from_bytes(stream.read(8), "little")
        return stream.read(size_bytes), path.stat().st_size - 8 - size_bytes


def write(path: Path, text: bytes, data_bytes: int, length: int | None = None) -> None:
    """A file with this header over a hole of data."""
    with path.open("wb") as stream:
        stream.write((len(text) if length is None else length).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + data_bytes)


def test_c_checkpoint_headers(tmp_path: Path) -> None:
    expected = {name: shape for recipe in recipes(SMALL).values() for name, shape in recipe.weight_shapes().items()}
    records, data_bytes = dict[str, Any](), 0
    for name, shape in expected.items():
        records[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [data_bytes, data_bytes := data_bytes + 2 * math.prod(shape)]}
    original = json.dumps(records).encode()

    def attempt(text: bytes) -> None:
        write(tmp_path / "x.safetensors", text, data_bytes)
        opened = open_checkpoint(tmp_path / "x.safetensors")
        try:
            select(opened, expected)
        finally:
            opened.close()

    attempt(original)
    run("checkpoint", original, attempt)


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few modules of the emoji LoRA."""
    from safetensors.torch import load_file

    tensors = load_file(LORA)
    kept = sorted({name.partition(".")[0] for name in tensors})[::16]
    path = tmp_path_factory.mktemp("lora") / "small.safetensors"
    save_file({name: tensor.to(torch.float32) for name, tensor in tensors.items() if name.partition(".")[0] in kept}, path)
    return path


def test_l_lora_headers(tmp_path: Path, small_lora: Path) -> None:
    original, data_bytes = header(small_lora)
    checkpoint = open_checkpoint(CHECKPOINT)
    expected = {name: tensor.entry.shape for name, tensor in checkpoint.tensors.items()}
    unet: UNetSpec = checkpoint.architecture.unet
    checkpoint.close()
    whole = open_lora(LoraOption(small_lora), expected, unet, allow_unmatched=False)
    whole.file.close()
    expected = {name: shape for name, shape in expected.items() if name in whole.deltas}  # a short table of names is searched quickly

    def attempt(text: bytes) -> None:
        write(tmp_path / "x.safetensors", text, data_bytes)
        open_lora(LoraOption(tmp_path / "x.safetensors"), expected, unet, allow_unmatched=False).file.close()

    attempt(original)
    run("lora", original, attempt)


def test_b_manifests(tmp_path: Path, flat_bundle: Path) -> None:
    bundle = tmp_path / "x.sdrt"
    original = (flat_bundle / "manifest.json").read_bytes()
    for name, record in json.loads(original)["files"].items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        with (bundle / name).open("wb") as stream:
            stream.truncate(record["size_bytes"])

    def attempt(text: bytes) -> None:
        (bundle / "manifest.json").write_bytes(text)
        open_bundle(bundle)

    attempt(original)
    run("manifest", original, attempt)
