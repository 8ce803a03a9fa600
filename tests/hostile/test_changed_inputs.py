"""Every file that a build reads, changed while it runs: the build fails, names the file, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import hypernetwork_files
import pytest
import reference
import torch
from safetensors.torch import save_file
from tiny_model import SMALL, seeded

from sdrt.bundle import remembered
from sdrt.bundle.manifest import WEIGHTS
from sdrt.errors import InputFileError
from sdrt.export import build as build_module
from sdrt.export.adapters.embedding import EmbeddingOption
from sdrt.export.adapters.hypernetwork import HypernetworkOption
from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, build
from sdrt.export.read.tensor_file import TensorFile
from sdrt.files.publish import write_file


def unseen(path: Path) -> None:
    """One byte of it, the size and the time as they were."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another file of that name, with the same bytes: it may be changed next."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    unseen(other)
    other.replace(path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def now_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES = (unseen, replaced, truncated, Path.unlink, now_a_folder)
INPUTS = (
    "model.tiny/model_index.json",
    "model.tiny/unet/config.json",
    "model.tiny/vae/config.json",
    "model.tiny/text_encoder/config.json",
    "model.tiny/scheduler/scheduler_config.json",
    "model.tiny/unet/diffusion_pytorch_model.safetensors",
    "model.tiny/text_encoder/model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "peft/adapter_model.safetensors",
    "peft/adapter_config.json",
    "word.pt",
    "chain.pt",
)
CASES = [(name, change) for i, name in enumerate(INPUTS) for change in (CHANGES[0], CHANGES[1 + i % 4])]
"""The least change that there is of every one, and one of the others."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that a build takes: a diffusers folder, a VAE's folder, a LoRA with its settings, an embedding
    and a hypernetwork.
    """
    folder, weights = tmp_path_factory.mktemp("inputs"), seeded(SMALL)
    model = folder / "model.tiny"
    reference.unet(weights, asdict(SMALL.unet)).save_pretrained(model / "unet")
    reference.text_model(weights, asdict(SMALL.texts[0])).save_pretrained(model / "text_encoder")
    for place in (model / "vae", folder / "vae"):
        reference.vae(weights, asdict(SMALL.vae)).save_pretrained(place)
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (model / "scheduler").mkdir()
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    (folder / "peft").mkdir()
    module = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{module}A.weight": torch.ones(2, 64), f"{module}B.weight": torch.ones(64, 2)},
        folder / "peft" / "adapter_model.safetensors",
    )
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    torch.save({"string_to_param": {"*": torch.ones(2, 64)}, "name": "word"}, folder / "word.pt")
    hypernetwork_files.save(folder / "chain.pt", hypernetwork_files.Settings(widths=(64,)), 1)
    return folder


@pytest.fixture
def inputs(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change; graphs are neither written nor checked, which has to do with none of it."""

    def check(
        recipe: object, skeletons: object, weights: object, graphs: dict[str, Path], reference: Path, *, full: bool
    ) -> dict[str, float]:
        write_file(reference, b"not checked")
        return dict.fromkeys(graphs, 0.0)

    monkeypatch.setattr(build_module, "check", check)
    monkeypatch.setattr(build_module, "at_hand", lambda recipe: True)
    monkeypatch.setattr(build_module, "skeletons", lambda recipe: ({"fp32": b"", "fp16": b""}, True))
    monkeypatch.setattr(build_module, "read_graph", lambda data: data)
    monkeypatch.setattr(build_module, "bind", lambda *arguments: write_file(arguments[4], b"no graph"))
    shutil.copytree(saved, tmp_path / "inputs")
    (tmp_path / "out").mkdir()
    return tmp_path / "inputs"


def options(inputs: Path) -> BuildOptions:
    return BuildOptions(
        inputs / "model.tiny",
        (LoraOption(inputs / "peft" / "adapter_model.safetensors"),),
        inputs / "vae",
        size=(64, 64),
        embeddings=(EmbeddingOption(inputs / "word.pt", "word"),),
        hypernetworks=(HypernetworkOption(inputs / "chain.pt"),),
        output=inputs.parent / "out" / "x.sdrt",
    )


def test_c20_all_of_these_are_read(inputs: Path) -> None:
    report = build(options(inputs))
    assert [source.kind for source in report.manifest.sources] == [
        "checkpoint",
        "vae",
        "lora",
        "lora-config",
        "embedding",
        "hypernetwork",
    ]


@pytest.fixture(params=["just written", "settled"])
def age(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just written, the files are hashed twice. The others look a minute old, since nothing can set a time of change,
    and are trusted to show a change.
    """
    if request.param == "settled":
        now = time.time_ns
        monkeypatch.setattr(remembered.time, "time_ns", lambda: now() + 60_000_000_000)


@pytest.mark.parametrize(("name", "change"), CASES, ids=[f"{name}-{change.__name__}" for name, change in CASES])
def test_c20_an_input_that_changes(inputs: Path, age: None, name: str, change: Callable[[Path], object]) -> None:
    def progress(stage: str, done: float | None) -> None:
        if stage == "write":
            change(inputs / name)

    with pytest.raises(InputFileError, match="changed during the build") as caught:
        build(options(inputs), progress)
    assert caught.value.message.startswith(str(inputs / name)) and caught.value.exit_code == 3
    assert not list((inputs.parent / "out").iterdir())


def test_inputs_are_hashed_while_their_weights_are_fused(
    inputs: Path, age: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash waits until fusing has begun. Where a change may not show in a file's times it is waited for instead, so
    that a second hash shows it.
    """
    settled = "settled" in request.node.callspec.id
    fused, hashed, hash_file = threading.Event(), list[bool](), TensorFile._hash

    def hashing(file: TensorFile) -> str:
        of_input = file.path.name != Path(WEIGHTS).name
        if of_input and threading.current_thread() is not threading.main_thread():
            hashed.append(fused.wait(60 if settled else 0.05))
        return hash_file(file)

    def progress(stage: str, done: float | None) -> None:
        if stage == "fuse" and done is not None:
            fused.set()

    monkeypatch.setattr(TensorFile, "_hash", hashing)
    build(options(inputs), progress)
    assert hashed and set(hashed) == {settled}


def test_an_input_is_read_once_more_only_where_a_change_may_not_show(
    inputs: Path, age: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, hash_file = Counter[Path](), TensorFile._hash

    def counted(file: TensorFile) -> str:
        if file.path.name != Path(WEIGHTS).name:  # the bundle's own, hashed again once they are written
            passes[file.path] += 1
        return hash_file(file)

    monkeypatch.setattr(TensorFile, "_hash", counted)
    build(options(inputs))
    assert len(passes) == 7 and set(passes.values()) == {1 if "settled" in request.node.callspec.id else 2}


@pytest.mark.parametrize("name", ["model.tiny/unet/config.json", "peft/adapter_config.json"])
def test_c20_a_time_alone_is_no_change_of_settings(inputs: Path, name: str) -> None:
    """Settings are compared by content alone; weights by their times too, which catches a writer that is not done."""
    build(options(inputs), lambda stage, done: os.utime(inputs / name) if stage == "write" else None)
