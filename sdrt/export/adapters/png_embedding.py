"""The form in which AUTOMATIC1111 shares embeddings: a PNG with a text chunk, `sd-ti-embedding`, of base64 over JSON.
Imports no torch.

AUTOMATIC1111 also hides the vectors in the picture's pixels, for pictures that lose their text. Those vectors are not
read.
"""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sdrt.errors import InputFileError, printable
from sdrt.export.read.tensor_entry import MAX_TENSORS, TensorEntry

TEXT = "sd-ti-embedding"
MAX_TEXT_BYTES = 16 << 20
"""Most characters of the text that are decoded. 75 vectors of Stable Diffusion 1.x take two million."""
_AGAIN = "Get the embedding again, as .pt or .safetensors if there is one."


def read_png_embedding(path: Path, stream: BinaryIO) -> tuple[dict[str, TensorEntry], dict[str, Any], bytes]:
    """Read the embedding in a PNG. Returns the vectors as entries by dotted name, the document around them as a tree
    with the entries as leaves, and the bytes of the vectors, float32.

    Raises:
        InputFileError: the picture holds no embedding as text, or a damaged one.
    """
    from PIL import Image

    stream.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # no pixel is decoded
            text = Image.open(stream, formats=["PNG"]).info.get(TEXT)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputFileError(f"{path}: a damaged PNG picture: {printable(str(error))[:200]}", _AGAIN) from error
    if not isinstance(text, str):
        raise InputFileError(
            f"{path}: a picture (PNG) that holds no embedding as text ({TEXT}), expected a model's file",
            "Give a model, adapter or bundle. An embedding that a picture keeps in its pixels alone is not read: get it"
            " as .pt or .safetensors.",
        )
    where = f"{path}: {TEXT}"
    if len(text) > MAX_TEXT_BYTES:
        raise InputFileError(f"{where}: {len(text):,} characters, more than the limit of {MAX_TEXT_BYTES:,}", _AGAIN)
    try:
        document = json.loads(base64.b64decode(text, validate=True))
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{where}: not base64 of JSON: {printable(str(error))[:200]}", _AGAIN) from error
    entries: dict[str, TensorEntry] = {}
    data = bytearray()
    tree = _read(where, document, "", entries, data) if isinstance(document, dict) else {}
    if not entries:
        raise InputFileError(f"{where}: holds no vectors", _AGAIN)
    return entries, tree, bytes(data)


def _read(where: str, value: dict[str, Any], name: str, entries: dict[str, TensorEntry], data: bytearray) -> Any:
    """A part of the document, with an entry in place of each `{"TORCHTENSOR": [...]}`. The bytes of the entry are added
    to `data`.
    """
    if value.keys() == {"TORCHTENSOR"}:
        try:
            vectors = np.array(value["TORCHTENSOR"], dtype=np.float64).astype("<f4")
        except (ValueError, TypeError, OverflowError) as error:
            raise InputFileError(
                f"{where}: {printable(name)}: expected vectors of numbers: {printable(str(error))[:200]}", _AGAIN
            ) from error
        if len(entries) == MAX_TENSORS:
            raise InputFileError(f"{where}: more than {MAX_TENSORS:,} tensors", _AGAIN)
        entries[name] = TensorEntry(name, "F32", vectors.shape, len(data), vectors.nbytes)
        data += vectors.tobytes()
        return entries[name]
    return {
        key: _read(where, part, f"{name}.{key}".removeprefix("."), entries, data) if isinstance(part, dict) else part
        for key, part in value.items()
    }
