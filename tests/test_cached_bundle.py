"""A checkpoint where a bundle is expected: built once, found afterwards, and everything that may be wrong with the cache."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from conftest import CHECKPOINT, EMOJI, LORA
from faulty_jobs import names
from locked_down import LOCKED_DOWN, run_python
from tiny_model import SMALL, lively
from write_faults import Fault

import sdrt.cached_bundle as module
from sdrt.bundle.cache import entries
from sdrt.bundle.folder import open_bundle
from sdrt.bundle.manifest import WEIGHTS
from sdrt.cached_bundle import cached_bundle
from sdrt.compile import compilers
from sdrt.errors import (
    AdapterError,
    BundleError,
    CheckpointError,
    InputFileError,
    MachineError,
    ResourceError,
    SdrtError,
    UsageError,
)
from sdrt.export import skeletons
from sdrt.export.adapters.embedding import EmbeddingOption
from sdrt.export.adapters.hypernetwork import HypernetworkOption
from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, build
from sdrt.files import publish
from sdrt.runtime import Pipeline


@pytest.fixture(autouse=True)
def nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is ONNX Runtime here, whatever is installed."""
    monkeypatch.setattr(compilers, "_automatic", lambda: "onnxruntime")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def model(small_checkpoint: Path, own_cache: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint that a test may change."""
    return Path(shutil.copy(small_checkpoint, tmp_path / "model.safetensors"))


@contextmanager
def bundle_of(checkpoint: Path, said: list[str], **more: Any) -> Iterator[Path]:
    with cached_bundle(checkpoint, backend="onnxruntime", say=said.append, **more) as bundle:
        yield bundle


def key(checkpoint: Path, **options: Any) -> str:
    wanted = module._wanted(replace(BuildOptions(checkpoint, clip_skip=(1, 2)), **options), lambda stage, done: None)
    return wanted.folder.name


# Once


def test_built_once(model: Path, small_lora: Path, said: list[str], own_cache: Path) -> None:
    with bundle_of(model, said, loras=[f"{small_lora}:0.5"]) as first:
        assert first.parent.parent == own_cache / "bundles" and first.name == "model+lora.sdrt"
        assert open_bundle(first).manifest.name == "model+lora"
        assert open_bundle(first).manifest.text[0].clip_skip == (1,)  # it has one layer
    assert [text.partition(" (")[0] for text in said] == ["building model+lora into the cache", "built model+lora"]
    assert f"; kept in {own_cache / 'bundles'})" in said[0]
    before = first.stat()
    with bundle_of(model, said, loras=f"{small_lora}:0.5") as second:
        assert second == first and second.stat() == before and len(said) == 2
    assert names(own_cache / "bundles") == [first.parent.name]


def test_it_is_what_a_build_makes(own_cache: Path, tmp_path: Path, said: list[str]) -> None:
    """Adapters of every kind, and both layers that `clip_skip` chooses from."""
    gold, frost, violet = EMOJI / "gold.pt", EMOJI / "frost.safetensors", EMOJI / "violet.safetensors"
    given = {"loras": [LORA, f"{frost}:0.5"], "embeddings": [f"{violet}:purple"], "hypernetworks": [f"{gold}:0.5"]}
    named = BuildOptions(
        CHECKPOINT,
        (LoraOption(LORA), LoraOption(frost, 0.5, 0.5)),
        vae=CHECKPOINT,
        clip_skip=(1, 2),
        embeddings=(EmbeddingOption(violet, "purple"),),
        hypernetworks=(HypernetworkOption(gold, 0.5),),
        output=tmp_path / "x.sdrt",
    )
    settings: dict[str, Any] = {"steps": 2, "cfg": 3.0, "seed": 5, "clip_skip": 2}
    with Pipeline.load(build(named).path, backend="onnxruntime", threads=1) as pipeline:
        expected = pipeline("a purple apple", **settings)
    with Pipeline.load(CHECKPOINT, **given, vae=str(CHECKPOINT), backend="onnxruntime", threads=1) as pipeline:
        assert pipeline.bundle.manifest.name == "emoji+blindbox+frost+violet+gold"
        found = pipeline("a purple apple", **settings)
    assert np.array_equal(found.images, expected.images)
    assert found.parameters["sources"] == expected.parameters["sources"]
    assert found.parameters["bundle_id"] == expected.parameters["bundle_id"]


def test_no_start_needs_torch(own_cache: Path, tmp_path: Path) -> None:
    """Neither the first, of a model whose traces come with sdrt, nor the second."""
    script = LOCKED_DOWN + "from sdrt.cli.app import app\napp()"
    command = ["generate", str(CHECKPOINT), "apple", "--lora", str(LORA), "--steps", "1", "--backend", "onnxruntime"]
    bundles = [json.loads(run_python(script, *command, "--json", cwd=tmp_path))["bundle"] for _ in range(2)]
    (entry,) = entries()
    assert bundles == [str(entry.bundle)] * 2


def test_the_pipeline_keeps_its_bundle(model: Path, small_lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever needs room, as long as it lives; the least recently used of the others goes."""
    monkeypatch.setenv("SDRT_CACHE_LIMIT", "1MB")
    said = list[str]()
    with Pipeline.load(model, backend="onnxruntime", threads=1):
        with bundle_of(model, said, loras=[small_lora]):
            assert {entry.name for entry in entries()} == {"model", "model+lora"}
        with bundle_of(model, said, loras=[f"{small_lora}:2"]) as newest:
            assert {entry.name for entry in entries()} == {"model", "model+lora"}
    assert said[-1].startswith("removed model+lora (") and len(entries()) == 2
    with bundle_of(model, said, loras=[f"{small_lora}:2"]) as again:
        assert again == newest


# The key


def test_l9_everything_that_shapes_a_bundle_is_in_its_key(
    model: Path, small_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = Path(shutil.copy(small_lora, tmp_path / "lora.safetensors"))
    other = Path(shutil.copy(small_lora, tmp_path / "other.safetensors"))
    pt, violet = EMOJI / "gold.pt", EMOJI / "violet.safetensors"

    def all_keys() -> list[str]:
        return [
            key(model),
            key(model, vae=model),
            key(model, loras=(LoraOption(lora),)),
            key(model, loras=(LoraOption(lora, 0.5),)),
            key(model, loras=(LoraOption(lora, 1.0, 0.5),)),
            key(model, loras=(LoraOption(lora), LoraOption(other))),
            key(model, loras=(LoraOption(other), LoraOption(lora))),
            key(model, embeddings=(EmbeddingOption(violet, "a"),)),
            key(model, embeddings=(EmbeddingOption(violet, "b"),)),
            key(model, hypernetworks=(HypernetworkOption(pt),)),
            key(model, hypernetworks=(HypernetworkOption(pt, 0.5),)),
            key(model, precision="fp32"),
        ]

    first = all_keys()
    assert len(set(first)) == len(first) and all_keys() == first
    (tmp_path / "there").mkdir()
    moved = Path(shutil.copy(model, tmp_path / "there" / "model.safetensors"))
    assert key(moved) == first[0]  # where it lies changes nothing
    assert key(model.rename(tmp_path / "renamed.safetensors")) != first[0]  # what a bundle calls it does
    (tmp_path / "renamed.safetensors").rename(model)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert all_keys()[2] != first[2]
    (tmp_path / "adapter_config.json").unlink()
    for name, value in (("__version__", "0"), ("FORMAT", 0), ("_source_digest", lambda: "")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert not set(all_keys()) & set(first)
    assert all_keys() == first


def test_another_checkpoint_under_the_same_name(model: Path, said: list[str], tmp_path: Path) -> None:
    """As large, and as old as the system lets anyone say."""
    with bundle_of(model, said) as before:
        pass
    status, data = model.stat(), bytearray(model.read_bytes())
    data[-1] ^= 1
    (tmp_path / "other").write_bytes(data)
    os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "other").replace(model)
    assert (model.stat().st_size, model.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with bundle_of(model, said) as after:
        found = [open_bundle(path).manifest.sources[0].sha256 for path in (before, after)]
    assert after != before and found[0] != found[1] and len(entries()) == 2


def test_c20_a_file_that_is_replaced_before_the_build_opens_it(
    model: Path, said: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept under a key is what the key says."""
    data = bytearray(model.read_bytes())

    def late(*arguments: Any) -> Any:
        model.unlink()
        model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return build(*arguments)

    monkeypatch.setattr(module, "build", late)
    with pytest.raises(InputFileError, match=r"model\.safetensors changed as the build began"), bundle_of(model, said):
        pass
    assert not (own_cache / "bundles").exists()  # made for it, and taken back


def test_a_folder_that_diffusers_saved(own_cache: Path, tmp_path: Path, said: list[str]) -> None:
    """Every file of it that is read counts, and no other."""
    from diffusers import DDIMScheduler

    folder, weights = tmp_path / "tiny.v1", lively(SMALL)
    networks = {
        "unet": reference.unet(weights, asdict(SMALL.unet)),
        "vae": reference.vae(weights, asdict(SMALL.vae)),
        "text_encoder": reference.text_model(weights, asdict(SMALL.texts[0])),
        "scheduler": DDIMScheduler(**reference.TRAINING, steps_offset=1, clip_sample=False),
    }
    for name, network in networks.items():
        network.save_pretrained(folder / name)
    kinds = {name: ["diffusers", type(network).__name__] for name, network in networks.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | kinds))
    with bundle_of(folder, said) as bundle:
        assert bundle.name == "tiny.v1.sdrt" and open_bundle(bundle).manifest.sources[0].name == "tiny.v1"
    (folder / "README.md").write_text("A model.")
    with bundle_of(folder, said) as again:
        assert again == bundle
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text() + "\n")
    assert key(folder) != bundle.parent.name


def test_a_long_name(model: Path, small_lora: Path, said: list[str], tmp_path: Path) -> None:
    long = Path(shutil.copy(small_lora, tmp_path / ("é" * 100 + ".safetensors")))
    with bundle_of(model, said, loras=[long] * 2) as bundle:
        assert open_bundle(bundle).manifest.name == "model+" + "é" * 49


# A cache that is damaged, full or closed


@pytest.mark.parametrize("lost", [f"model.sdrt/{WEIGHTS}", "model.sdrt/manifest.json", "model.sdrt"])
def test_i5_a_bundle_that_is_damaged_is_built_again(model: Path, said: list[str], lost: str) -> None:
    with bundle_of(model, said) as first:
        pass
    path = first.parent / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said.clear()
    with bundle_of(model, said) as second:
        assert second == first
    assert said[0].startswith("model: its bundle in the cache is damaged and will be built again: ") and len(said) == 3
    assert len(entries()) == 1 and not entries()[0].problem


def test_a_changed_byte_is_found_as_in_every_bundle(model: Path, said: list[str]) -> None:
    with bundle_of(model, said) as bundle, (bundle / WEIGHTS).open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x7f")
    with pytest.raises(BundleError, match="changed since the build") as refused:
        Pipeline.load(model, backend="onnxruntime", threads=1)
    assert f"sdrt cache remove {bundle.parent.name}" in refused.value.fix


@pytest.mark.parametrize("point", [1, 2, 5, 20, -4, -2])
def test_d1_a_full_disk(
    model: Path, said: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """At the first points of the writer, in the middle, and at the last ones before the entry appears."""
    if point < 0:
        with monkeypatch.context() as patch:
            passed = Fault(0, "enospc")
            patch.setattr(publish, "at_point", passed.point)
            with bundle_of(model, said) as bundle:
                renames = [i for i, (what, path) in enumerate(passed.passed) if path == bundle.parent]
        shutil.rmtree(bundle.parent)
        point += renames[0] + 2
    with monkeypatch.context() as patch:
        fault = Fault(point, "enospc")
        patch.setattr(publish, "at_point", fault.point)
        with pytest.raises(ResourceError, match=os.strerror(errno.ENOSPC)) as refused, bundle_of(model, said):
            pass
    assert "sdrt cache remove" in refused.value.fix and "SDRT_CACHE_DIR" in refused.value.fix
    assert not (own_cache / "bundles").exists() or names(own_cache / "bundles") == []


def test_too_little_space(model: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda folder: usage(10, 9, 1))
    with pytest.raises(ResourceError, match="1 are free there") as refused, bundle_of(model, said):
        pass
    assert "sdrt cache remove" in refused.value.fix


def test_a_cache_that_cannot_be_written(
    model: Path, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "model.safetensors"))
    with pytest.raises(UsageError, match="is no folder") as refused, bundle_of(model, said):
        pass
    assert "SDRT_CACHE_DIR" in refused.value.fix and "sdrt build" in refused.value.fix

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SDRT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UsageError, match="no home folder") as refused, bundle_of(model, said):
        pass
    assert "SDRT_CACHE_DIR" in refused.value.fix


def test_a_cache_that_may_only_be_read(
    model: Path, said: list[str], small_lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is used."""
    with bundle_of(model, said) as bundle:
        pass

    def closed(operation: str, path: Path) -> bool:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(publish, "at_point", closed)
    monkeypatch.setattr(os, "utime", lambda path: closed("utime", path))
    with bundle_of(model, said) as again:
        assert again == bundle
    with (
        pytest.raises(UsageError, match="cannot write there: Read-only") as refused,
        bundle_of(model, said, loras=[small_lora]),
    ):
        pass
    assert "SDRT_CACHE_DIR" in refused.value.fix and "sdrt build" in refused.value.fix


def test_a_limit_that_is_no_size(model: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDRT_CACHE_LIMIT", "much")
    with pytest.raises(UsageError, match="SDRT_CACHE_LIMIT 'much'"), bundle_of(model, said):
        pass
    assert said == []  # before the work


# What is given


def test_a_bundle_takes_no_adapters(small_bundle: Path, small_lora: Path, own_cache: Path) -> None:
    for given in ({"loras": [small_lora]}, {"embeddings": ["x"]}, {"hypernetworks": ["x"]}, {"vae": "x"}):
        with pytest.raises(UsageError, match=r"small\.sdrt: a bundle, which takes no LoRA") as refused:
            Pipeline.load(small_bundle, **given)
        assert "sdrt build --checkpoint FILE --lora FILE" in refused.value.fix
    with pytest.raises(InputFileError, match="no such bundle"):
        Pipeline.load(small_bundle.with_name("none.sdrt"), loras=[small_lora])


def test_files_that_are_no_checkpoint(model: Path, small_lora: Path, small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a red apple, and more than a header's length of words about it")
    cases: list[tuple[Path, dict[str, Any], type[SdrtError], str, str]] = [
        (small_lora, {}, CheckpointError, "found a LoRA", "--lora"),
        (tmp_path / "text", {}, InputFileError, "text", ""),
        (tmp_path / "modl.safetensors", {}, InputFileError, r"did you mean 'model\.safetensors'", ""),
        (
            tmp_path / "model.safetensor",
            {},
            InputFileError,
            r"no such bundle; did you mean 'model\.safetensors'",
            "sdrt build",
        ),
        (model, {"loras": [model]}, AdapterError, "expected a LoRA", ""),
        (model, {"loras": [tmp_path / "none"]}, InputFileError, "No such file", ""),
        (model, {"loras": [tmp_path]}, InputFileError, "found a folder", ""),
        (model, {"embeddings": [small_lora]}, AdapterError, "LoRA", "--lora"),
        (model, {"vae": small_lora}, CheckpointError, "LoRA", ""),
        (model, {"loras": ["x:y.safetensors:z"]}, UsageError, "scale 'z'", ""),
    ]
    for path, given, kind, message, fix in cases:
        with pytest.raises(kind, match=message) as refused:
            Pipeline.load(path, **given)
        assert fix in refused.value.fix
    with pytest.raises(UsageError, match="backend 'x'"):
        Pipeline.load(model, backend="x")
    assert entries() == []


def test_options_of_builds_are_named_as_theirs(model: Path, small_lora: Path, tmp_path: Path, said: list[str]) -> None:
    """A message of a build may speak of an option that nothing else has."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(small_lora)
    save_file(tensors | {"lora_unet_nowhere.lora_up.weight": tensors.popitem()[1]}, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError) as refused, bundle_of(model, said, loras=[tmp_path / "odd.safetensors"]):
        pass
    assert refused.value.fix.endswith("(--allow-unmatched: of sdrt build)")


def test_without_the_packages_of_a_build(
    model: Path, small_lora: Path, said: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is used; torch is needed to trace what no published model has, ONNX Runtime in any case."""
    with bundle_of(model, said):
        pass
    monkeypatch.setattr(skeletons, "_tools", lambda: None)
    for missing in ("torch", "onnxruntime"):
        with bundle_of(model, said):
            pass
        with pytest.raises(MachineError) as refused, bundle_of(model, said, loras=[small_lora]):
            pass
        assert f"pip install '{missing}" in refused.value.fix
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert len(entries()) == 1


# Engines


def test_compiled_once(model: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the backend stands for; again if no engine that is there runs here."""
    pytest.importorskip("openvino")
    from sdrt.compile import openvino
    from sdrt.machine import cpu

    with bundle_of(model, said) as bundle:
        assert not (bundle / "engines").exists()
    with cached_bundle(model, backend="openvino", say=said.append):
        assert len(names(bundle / "engines")) == 4  # two lengths of prompts, with and without guidance
    with monkeypatch.context() as patch:
        patch.setattr(openvino, "compile_bundle", None)
        with cached_bundle(model, backend="openvino", say=said.append):
            pass
    assert len(said) == 2
    with Pipeline.load(model, backend="openvino") as pipeline:
        assert "engine" in pipeline.engine
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "cpu_identity", lambda: "another")
        assert not compilers.is_compiled(open_bundle(bundle), "openvino")


def test_what_cannot_be_compiled_is_said(model: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiler:
        def check_compiler(self, target: str) -> None:
            raise MachineError("no compiler here")

    monkeypatch.setattr(module, "compiler_of", lambda target: Compiler())
    with cached_bundle(model, backend="openvino", say=said.append) as bundle:
        assert open_bundle(bundle)
    assert said[-1] == "model: not compiled for openvino: no compiler here"
