"""References that a bundle brings: archives of arrays, or refused in words, whatever they are."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sdrt.bundle.folder import file_record
from sdrt.errors import CheckFailed, MachineError
from sdrt.runtime.verify import verify

NAME = "reference/vae_decoder.npz"


def archive(arrays: dict[str, NDArray[Any]]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def members(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as written:
        for name, data in files.items():
            written.writestr(f"{name}.npy", data)
    return stream.getvalue()


def header(shape: str) -> bytes:
    """A .npy file of that shape and no numbers."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def pickled() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    return stream.getvalue()


Arrays = dict[str, NDArray[Any]]
BAD: list[tuple[Callable[[bytes, Arrays], bytes], str]] = [
    (lambda data, arrays: b"", "cannot be read as arrays"),
    (lambda data, arrays: b"text", "cannot be read as arrays"),
    (lambda data, arrays: data[: len(data) // 2], "cannot be read as arrays"),
    (lambda data, arrays: pickled(), "cannot be read as arrays"),
    (lambda data, arrays: members(**{"in.latents": pickled()}), "cannot be read as arrays"),
    (lambda data, arrays: members(**{"in.latents": header("(1000000000000, 1000)")}), "cannot be read as arrays"),
    (lambda data, arrays: members(**{"in.latents": header("(-1,)")}), "cannot be read as arrays"),
    (lambda data, arrays: members(**{"in.latents": header("(" * 3000)}), "cannot be read as arrays"),
    (lambda data, arrays: members(**{"in.latents": bytes(300 << 20)}), "more than the limit of 268,435,456"),
    (lambda data, arrays: members(), "inputs : expected latents, rounding"),
    (lambda data, arrays: archive({name: array for name, array in arrays.items() if name != "in.rounding"}), "inputs latents: expected latents, rounding"),
    (lambda data, arrays: archive({name: array for name, array in arrays.items() if name != "out.finite"}), "outputs pixels: expected finite, pixels"),
    (lambda data, arrays: archive(arrays | {"in.other": np.zeros(3)}), "inputs latents, other, rounding"),
    (lambda data, arrays: archive(arrays | {"in.latents": np.zeros((1, 4, 8), np.float32)}), "vae_decoder"),
    (lambda data, arrays: archive(arrays | {"in.latents": np.zeros((1, 4, 8, 8), np.complex64)}), "vae_decoder"),
    (lambda data, arrays: archive(arrays | {"out.pixels": np.zeros((0,), np.uint8)}), "differs from the reference by inf"),
    (lambda data, arrays: archive(arrays | {"out.pixels": np.array(["text"])}), "differs from the reference by inf"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_malformed_references(small_bundle: Path, tmp_path: Path, change: Callable[[bytes, Arrays], bytes], message: str) -> None:
    """In a bundle whose manifest agrees: `verify` says no in words, and takes no memory for what a header claims."""
    copy = tmp_path / "copy.sdrt"
    shutil.copytree(small_bundle, copy)
    data = (copy / NAME).read_bytes()
    with np.load(io.BytesIO(data)) as stored:
        (copy / NAME).write_bytes(change(data, dict(stored)))
    document = json.loads((copy / "manifest.json").read_text())
    document["files"][NAME] = asdict(file_record(copy / NAME))
    (copy / "manifest.json").write_text(json.dumps(document))
    with pytest.raises((CheckFailed, MachineError)) as caught:
        verify(copy)
    assert message in caught.value.message
