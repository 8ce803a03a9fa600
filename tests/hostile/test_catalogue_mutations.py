"""Seeded mutations of a checkpoint, a LoRA and a manifest: refused with exit code 3 or 4 and a message, or read and
used. Never a bug, a hang or much memory.

The whole of it is 10,000 of each: SDRT_MUTATIONS=10000 pytest tests/hostile/test_catalogue_mutations.py (some minutes).
The tests take the first of them.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import change_of
from conftest import CHECKPOINT, LORA
from safetensors.torch import save_file
from tiny_model import SMALL

from sdrt.bundle.folder import open_bundle
from sdrt.errors import SdrtError
from sdrt.export.adapters.match import LoraOption, open_lora
from sdrt.export.architecture import Architecture
from sdrt.export.graph import recipes
from sdrt.export.read.checkpoint import open_checkpoint, select
from sdrt.export.skeletons import weights_of
from sdrt.export.weights import write_weights

_ALL = os.environ.get("SDRT_MUTATIONS")
COUNTS = (
    dict.fromkeys(("checkpoint", "lora", "manifest"), int(_ALL))
    if _ALL
    else {"checkpoint": 500, "lora": 1_000, "manifest": 2_000}
)
HANG_S = 60
MEMORY_BYTES = 300 << 20
WORDS = [
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"9" * 30,
    b'"\\u0000"',
    b'"\\ud800"',
    b'"F64"',
    b'"BOOL"',
    b'"../x"',
    b"[[[[[[[[",
    b"4611686018427387904",
    b'"\\u001b[31m"',
    b'"lora_unet_x.lora_up.weight"',
    b'"format":',
    b',"a":1',
    b"}}",
    b"]",
    b'"data_offsets":[0,4]',
    b"\xff\xfe",
    b"\\",
    b" ",
]


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
                node[key] = generator.choice(
                    [0, -1, 2**64, 1.5, None, True, "", "\0\x1b[2J", "é" * 300, [], {}, [0, 0], [-1], ["x"], {"a": {}}]
                )
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
                assert error.exit_code in (3, 4) or (name == "manifest" and "upgrade" in error.fix.lower()), (
                    index,
                    error,
                )
                assert len(error.message) > 20, (index, error)
                assert error.message.isprintable(), (index, error)
                refused += 1
    assert refused > COUNTS[name] // 2
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_BYTES


def file_of(text: bytes, index: int, generator: random.Random) -> tuple[bytes, int]:
    """A header in front, and by how many bytes the data is to be longer; now and then its length, or the data's, is a
    lie.
    """
    length = len(text)
    if index % 16 == 5:
        length += generator.choice((-1, 1, 8, -8, 300, 1 << 20, 1 << 40, (1 << 64) - 1))
    return (length % (1 << 64)).to_bytes(8, "little") + text, (
        generator.choice((-1, 1, 7, -500, 4096)) if index % 16 == 11 else 0
    )


def write(path: Path, text: bytes, data: bytes | int, generator: random.Random) -> None:
    """A file with this header over its data, or over a hole of that many bytes."""
    start, more = file_of(text, generator.randrange(1 << 20), generator)
    with path.open("wb") as stream:
        stream.write(start)
        if isinstance(data, int):
            stream.truncate(max(len(start), len(start) + data + more))
        else:
            stream.write(data[: len(data) + more] + bytes(max(0, more)))


def test_c_checkpoint_headers(tmp_path: Path) -> None:
    expected = {name: shape for recipe in recipes(SMALL).values() for name, shape in weights_of(recipe).items()}
    records, data_bytes = dict[str, Any](), 0
    for name, shape in expected.items():
        records[name] = {
            "dtype": "F16",
            "shape": list(shape),
            "data_offsets": [data_bytes, data_bytes := data_bytes + 2 * math.prod(shape)],
        }
    original, generator = json.dumps(records).encode(), random.Random("lengths")

    def attempt(text: bytes) -> None:
        write(tmp_path / "x.safetensors", text, data_bytes, generator)
        opened = open_checkpoint(tmp_path / "x.safetensors")
        try:
            tensors, _ = select(opened, expected)
            write_weights(tmp_path / "weights", tensors, [], "fp16", lambda done: None)
        finally:
            opened.close()

    run("checkpoint", original, attempt)


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few modules of the emoji LoRA."""
    from safetensors.torch import load_file

    tensors = load_file(LORA)
    kept = sorted({name.partition(".")[0] for name in tensors})[::16]
    path = tmp_path_factory.mktemp("lora") / "small.safetensors"
    save_file(
        {name: tensor.to(torch.float32) for name, tensor in tensors.items() if name.partition(".")[0] in kept}, path
    )
    return path


def test_l_lora_headers(tmp_path: Path, small_lora: Path) -> None:
    """The values too: bytes of them are changed, and what was read is fused."""
    content = small_lora.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    original, data, generator = content[8:start], content[start:], random.Random("values")
    checkpoint = open_checkpoint(CHECKPOINT)
    expected = {name: tensor.entry.shape for name, tensor in checkpoint.tensors.items()}
    arch: Architecture = checkpoint.architecture
    checkpoint.close()
    whole = open_lora(LoraOption(small_lora), expected, arch, allow_unmatched=False)
    whole.file.close()
    expected = {
        name: shape for name, shape in expected.items() if name in whole.deltas
    }  # a short table of names is searched quickly

    def attempt(text: bytes) -> None:
        values = bytearray(data)
        for _ in range(generator.choice((0, 0, 1, 5))):
            at = generator.randrange(len(values) - 8)
            values[at : at + 4] = generator.choice(
                (generator.randbytes(4), b"\0\0\x80\x7f", b"\0\0\xc0\xff", b"\xff\xff\x7f\x7f", bytes(4))
            )
        write(tmp_path / "x.safetensors", text, bytes(values), generator)
        lora = open_lora(LoraOption(tmp_path / "x.safetensors"), expected, arch, allow_unmatched=False)
        with lora.file:
            for name in lora.deltas:
                change_of(lora, name, torch.zeros(expected[name]))

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
