"""Fixtures: the emoji model built once, and tiny checkpoints made from seeds. The trace cache is shared by the whole
run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "examples" / "emoji"
CHECKPOINT = EMOJI / "emoji.safetensors"
EMOJI_XL = EMOJI / "emoji-xl.safetensors"
LORA = EMOJI / "blindbox.safetensors"

# Traces are kept between runs, as a user's are, but never shared with the user's own.
os.environ["SDRT_CACHE_DIR"] = os.environ.get(
    "SDRT_TEST_CACHE", str(Path(tempfile.gettempdir()) / f"sdrt-test-cache-{os.getuid()}")
)


@pytest.fixture(scope="session")
def flat_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji checkpoint alone, weights in float16."""
    from sdrt.export.build import BuildOptions, build

    return build(BuildOptions(CHECKPOINT, output=tmp_path_factory.mktemp("flat") / "flat.sdrt")).path


@pytest.fixture(scope="session")
def blindbox_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji checkpoint with its LoRA at scale 1, weights in float16."""
    from sdrt.export.adapters.match import LoraOption
    from sdrt.export.build import BuildOptions, build

    return build(
        BuildOptions(CHECKPOINT, (LoraOption(LORA),), output=tmp_path_factory.mktemp("blindbox") / "blindbox.sdrt")
    ).path


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded checkpoint for 64x64 pixels that builds in half a second once its architecture is traced."""
    from safetensors.torch import save_file
    from tiny_model import SMALL, lively

    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(lively(SMALL), path, metadata={"modelspec.resolution": "64x64"})
    return path


@pytest.fixture(scope="session")
def small_bundle(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built of it."""
    from sdrt.export.build import BuildOptions, build

    return build(BuildOptions(small_checkpoint, output=tmp_path_factory.mktemp("small") / "small.sdrt")).path


@pytest.fixture(scope="session")
def small_xl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded SDXL for 64x64 pixels in sgm's names: CLIP's vocabulary, and all layers that a file holds."""
    from dataclasses import replace

    from family_files import TINY_XL, sgm
    from safetensors.torch import save_file
    from tiny_model import lively, whole

    from sdrt.export.architecture import VaeSpec

    texts = tuple(replace(text, vocabulary=49408) for text in TINY_XL.texts)
    arch = whole(replace(TINY_XL, texts=texts, vae=VaeSpec((32, 32, 32, 32), 1, 4, 0.13025)))
    path = tmp_path_factory.mktemp("small") / "xl.safetensors"
    save_file(sgm(lively(arch)), path, metadata={"modelspec.resolution": "64x64"})
    return path


@pytest.fixture(scope="session")
def small_xl_bundle(small_xl_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is built of it."""
    from sdrt.export.build import BuildOptions, build

    return build(BuildOptions(small_xl_checkpoint, output=tmp_path_factory.mktemp("small") / "xl.sdrt")).path


@pytest.fixture(scope="session")
def small_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of one module of the small checkpoint."""
    import torch
    from safetensors.torch import save_file

    path, module = (
        tmp_path_factory.mktemp("small") / "lora.safetensors",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    )
    save_file(
        {f"{module}.lora_down.weight": torch.full((2, 64), 0.1), f"{module}.lora_up.weight": torch.full((64, 2), 0.1)},
        path,
    )
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, but for the traces of the whole run."""
    from sdrt.files.publish import cache_folder

    own = tmp_path / "cache"
    for kind in ("graphs", "blobs"):
        (cache_folder() / kind).mkdir(parents=True, exist_ok=True)
        own.mkdir(exist_ok=True)
        (own / kind).symlink_to(cache_folder().absolute() / kind)
    monkeypatch.setenv("SDRT_CACHE_DIR", str(own))
    monkeypatch.delenv("SDRT_CACHE_LIMIT", raising=False)
    return own


@dataclass(frozen=True)
class RawTensor:
    """A tensor as bytes, for files that a library would refuse to write."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def write_raw(path: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file from raw parts, in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(tensor.data)],
        }
        offset += len(tensor.data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t.data for t in tensors.values()))
    return path


def read_raw(path: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """The parts of a good safetensors file, to change and write again."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    return {
        n: RawTensor(r["dtype"], tuple(r["shape"]), data[start + r["data_offsets"][0] : start + r["data_offsets"][1]])
        for n, r in header.items()
    }, metadata


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sockets raise."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    yield
