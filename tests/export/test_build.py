"""The build: reproducible, quick the second time, all or nothing, and its own first critic."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import reference
import torch
from conftest import CHECKPOINT, LORA, ROOT, read_raw, write_raw
from safetensors.torch import load_file, save_file

from sdrt.bundle.folder import file_record, open_bundle
from sdrt.bundle.graphs import GRAPHS, TEXT_ENCODER, VAE_DECODER
from sdrt.bundle.manifest import TOKENIZER, WEIGHTS, Latents, Text
from sdrt.errors import CheckFailed, CheckpointError, InputFileError, NonFiniteError, SdrtError, UsageError
from sdrt.export import build as build_module
from sdrt.export import network_outputs as outputs_module
from sdrt.export import selfcheck
from sdrt.export import skeletons as skeletons_module
from sdrt.export import trace as trace_module
from sdrt.export.adapters.embedding import EmbeddingOption
from sdrt.export.adapters.hypernetwork import HypernetworkOption
from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, BuildReport, build, default_output
from sdrt.export.graph import Recipe, recipes
from sdrt.export.network_outputs import network_outputs
from sdrt.export.read.checkpoint import Tensor, open_checkpoint
from sdrt.export.read.tensor_file import TensorFile, open_tensor_file
from sdrt.export.run_in_parts import run_in_parts
from sdrt.export.skeletons import skeletons, weights_of
from sdrt.export.weights import Written, layout
from sdrt.files.publish import cache_folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No self-check, which is most of a cached build's time. For tests of everything around it."""

    def check(
        recipe: Recipe, known: object, weights: TensorFile, graphs: dict[str, Path], reference: Path, *, full: bool
    ) -> dict[str, float]:
        reference.write_bytes(b"not checked")
        return dict.fromkeys(graphs, 0.0)

    monkeypatch.setattr(build_module, "check", check)


@pytest.fixture
def instant(quick: None, small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and the tokenizer are copied from a finished bundle of the small checkpoint, too."""

    def write_weights(
        path: Path, tensors: dict[str, Tensor], loras: object, precision: str, progress: object, made: object
    ) -> Any:
        shutil.copy(small_bundle / WEIGHTS, path)
        placed = layout({name: tensor.entry.shape for name, tensor in tensors.items()}, precision)[1]
        return Written(file_record(path), placed, [])

    def write_tokenizer(path: Path, size: int) -> tuple[int, int]:
        shutil.copy(small_bundle / TOKENIZER, path)
        return 49406, 49407

    monkeypatch.setattr(build_module, "write_weights", write_weights)
    monkeypatch.setattr(build_module, "write_tokenizer", write_tokenizer)


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(recipe: Recipe) -> dict[str, bytes]:
        raise AssertionError(f"{recipe.graph} was traced again")

    monkeypatch.setattr(trace_module, "trace", trace)


@pytest.fixture(scope="module", autouse=True)
def traced(flat_bundle: Path, small_bundle: Path) -> None:
    """The trace cache is filled."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to build into."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def old_bundle(path: Path) -> Path:
    """A folder that looks like a bundle of ours."""
    (path / "graphs").mkdir(parents=True)
    (path / "graphs" / "old").write_text("old")
    (path / "manifest.json").write_text(json.dumps({"format": 1, "sdrt": "0", "graphs": {}, "files": {}}))
    return path


def refused(options: BuildOptions, kind: type[SdrtError], *fragments: str) -> SdrtError:
    with pytest.raises(SdrtError) as caught:
        build(options)
    assert type(caught.value) is kind
    for fragment in fragments:
        assert fragment in caught.value.message
    return caught.value


# Reproducible


def test_same_inputs_give_the_same_bytes_anywhere(blindbox_bundle: Path, out: Path, no_trace: None) -> None:
    again = build(BuildOptions(CHECKPOINT, (LoraOption(LORA),), output=out / blindbox_bundle.name))
    first, second = contents(blindbox_bundle), contents(again.path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_name_is_the_only_trace_of_the_place(flat_bundle: Path, blindbox_bundle: Path) -> None:
    for path in (flat_bundle, blindbox_bundle):
        for name, data in contents(path).items():
            for place in (str(path), str(path.parent), str(ROOT), str(Path.home())):
                assert place.encode() not in data, (name, place)
    manifest = json.loads((flat_bundle / "manifest.json").read_text())
    assert manifest["name"] == "flat"


def test_folder_name_changes_the_manifest_only(
    small_checkpoint: Path, small_bundle: Path, out: Path, quick: None, no_trace: None
) -> None:
    build(BuildOptions(small_checkpoint, output=out / "other name"))
    first, second = contents(small_bundle), contents(out / "other name")
    changed = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert {name for name in changed if not name.startswith("reference/")} == {"manifest.json"}
    assert open_bundle(out / "other name").manifest.name == "other name"


# The trace cache


def test_i4_another_lora_is_not_traced_again(out: Path, quick: None, no_trace: None) -> None:
    save_file({name: tensor * 0.5 for name, tensor in load_file(LORA).items()}, out / "half.safetensors")
    report = build(BuildOptions(CHECKPOINT, (LoraOption(out / "half.safetensors", 0.3, 0.3),), output=out / "x.sdrt"))
    assert report.cached == GRAPHS


def test_another_checkpoint_and_precision_are_not_traced_again(
    small_checkpoint: Path, out: Path, quick: None, no_trace: None
) -> None:
    save_file(
        {name: tensor.float() * 0.9 for name, tensor in load_file(small_checkpoint).items()}, out / "other.safetensors"
    )
    assert (
        build(BuildOptions(out / "other.safetensors", precision="fp32", size=(128, 64), output=out / "x.sdrt")).cached
        == GRAPHS
    )


class Cache:
    """A trace cache of its own for a text encoder whose trace does not come with sdrt, and what would be traced in
    place of it.
    """

    def __init__(self, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = open_checkpoint(checkpoint)
        opened.close()
        self.recipe = recipes(opened.architecture)[TEXT_ENCODER]
        assert not self.recipe.is_shipped()
        self.skeletons, hit = skeletons(self.recipe)
        assert hit
        self.traced = 0
        monkeypatch.setattr(trace_module, "trace", self.trace)
        monkeypatch.setenv("SDRT_CACHE_DIR", str(folder / "cache"))

    def trace(self, recipe: Recipe) -> dict[str, bytes]:
        assert recipe == self.recipe
        self.traced += 1
        return self.skeletons

    def get(self) -> bool:
        """Ask for the skeletons. They are always the right ones; the result says whether they came from the cache."""
        found, hit = skeletons(self.recipe)
        assert found == self.skeletons
        return hit

    @property
    def entry(self) -> Path:
        (entry,) = (cache_folder() / "graphs").iterdir()
        return entry


@pytest.fixture
def cache(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    return Cache(small_checkpoint, tmp_path, monkeypatch)


def test_cache_is_filled_once(cache: Cache) -> None:
    assert [cache.get(), cache.get(), cache.get()] == [False, True, True]
    assert cache.traced == 1


def flip_a_byte(entry: Path) -> None:
    data = bytearray((entry / "data").read_bytes())
    data[len(data) // 2] ^= 1
    (entry / "data").write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped byte": flip_a_byte,
    "truncated": lambda entry: os.truncate(entry / "data", 100),
    "empty graph": lambda entry: (entry / "data").write_bytes(b""),
    "no graph": lambda entry: (entry / "data").unlink(),
    "no hash": lambda entry: (entry / "sha256").unlink(),
    "empty hash": lambda entry: (entry / "sha256").write_text(""),
    "binary hash": lambda entry: (entry / "sha256").write_bytes(b"\xff\xfe"),
    "other hash": lambda entry: (entry / "sha256").write_text("0" * 64),
    "folder": lambda entry: [(entry / "data").unlink(), (entry / "data").mkdir()],
    "empty": lambda entry: [path.unlink() for path in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_i5_damaged_entry_is_traced_again_and_mended(cache: Cache, damage: Callable[[Path], Any]) -> None:
    cache.get()
    damage(cache.entry)
    assert not cache.get()
    assert cache.traced == 2
    assert cache.get()
    assert cache.traced == 2


def test_cache_that_cannot_be_written_costs_time_only(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "file"))
    assert not cache.get()
    assert not cache.get()
    assert cache.traced == 2


def test_i4_entry_is_not_used_for_another_shape_or_version(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.get()
    monkeypatch.setattr(skeletons_module, "version", lambda package: "0.0")
    assert not cache.get()
    assert len(list((cache_folder() / "graphs").iterdir())) == 2


# All or nothing


@pytest.fixture(scope="module")
def stages(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The stages of a build in order."""
    seen: dict[str, None] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfcheck, "check", lambda recipe, weights, graphs, reference: dict.fromkeys(graphs, 0.0))
        build(
            BuildOptions(small_checkpoint, output=tmp_path_factory.mktemp("stages") / "x.sdrt"),
            lambda stage, done: seen.setdefault(stage),
        )
    return list(seen)


def test_stages(stages: list[str]) -> None:
    binds, checks = (
        [f"{what} {graph}" for graph in GRAPHS] for what in ("bind", "check")
    )  # the traces are in the cache
    assert stages == ["read", "tokenizer", "fuse", *binds, *checks, "write"]


@pytest.mark.parametrize("exists", [False, True], ids=["new", "replacing"])
def test_i2_interrupt_at_any_stage_leaves_everything_as_it_was(
    small_checkpoint: Path, out: Path, instant: None, stages: list[str], exists: bool
) -> None:
    if exists:
        old_bundle(out / "x.sdrt")
    before = contents(out)
    # Replacing differs from writing anew at the end only.
    for stage in stages[-1:] if exists else stages:

        def progress(name: str, done: float | None, stage: str = stage) -> None:
            if name == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(BuildOptions(small_checkpoint, output=out / "x.sdrt", force=exists), progress)
        assert contents(out) == before, stage
        assert [path.name for path in out.iterdir()] == (["x.sdrt"] if exists else []), stage


def test_interrupt_half_way_through_the_weights(small_checkpoint: Path, out: Path, quick: None) -> None:
    def progress(name: str, done: float | None) -> None:
        if name == "fuse" and done is not None and done > 0.5:
            assert any((path / WEIGHTS).stat().st_size for path in out.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(BuildOptions(small_checkpoint, output=out / "x.sdrt"), progress)
    assert not list(out.iterdir())


def test_existing_output_is_refused_before_any_work(out: Path) -> None:
    old_bundle(out / "x.sdrt")
    before = contents(out)
    error = refused(
        BuildOptions(out / "no such checkpoint", output=out / "x.sdrt"),
        UsageError,
        str(out / "x.sdrt"),
        "exists already",
    )
    assert "--force" in error.fix
    assert contents(out) == before


def test_force_replaces_a_bundle(small_checkpoint: Path, out: Path, instant: None) -> None:
    old_bundle(out / "x.sdrt")
    build(BuildOptions(small_checkpoint, output=out / "x.sdrt", force=True))
    assert [path.name for path in out.iterdir()] == ["x.sdrt"]
    assert "graphs/old" not in contents(out / "x.sdrt")
    open_bundle(out / "x.sdrt")


def test_force_keeps_the_bundle_when_the_build_fails(out: Path) -> None:
    old_bundle(out / "x.sdrt")
    before = contents(out)
    refused(BuildOptions(out / "no such checkpoint", output=out / "x.sdrt", force=True), InputFileError)
    assert contents(out) == before


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "folder": lambda path: [path.mkdir(), (path / "thesis.tex").write_text("x")],
    "folder with another manifest": lambda path: [
        path.mkdir(),
        (path / "manifest.json").write_text('{"name": "a web app"}'),
    ],
    "empty folder": Path.mkdir,
    "file": lambda path: path.write_text("x"),
    "link to a bundle": lambda path: path.symlink_to(old_bundle(path.with_name("other.sdrt"))),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "pipe for a manifest": lambda path: [path.mkdir(), os.mkfifo(path / "manifest.json")],
}


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_not_ours_is_never_replaced(
    small_checkpoint: Path, out: Path, make: Callable[[Path], Any], force: bool
) -> None:
    make(out / "x.sdrt")
    before = contents(out), sorted(out.rglob("*"))
    refused(
        BuildOptions(small_checkpoint, output=out / "x.sdrt", force=force), UsageError, str(out / "x.sdrt"), "exists"
    )
    assert (contents(out), sorted(out.rglob("*"))) == before


def test_the_folder_of_the_output_is_made(small_checkpoint: Path, small_lora: Path, out: Path) -> None:
    refused(BuildOptions(small_lora, output=out / "a" / "b" / "x.sdrt"), CheckpointError, "found a LoRA")
    assert not list(out.iterdir())
    assert build(BuildOptions(small_checkpoint, output=out / "a" / "b" / "x.sdrt")).path == out / "a" / "b" / "x.sdrt"
    refused(
        BuildOptions(small_checkpoint, output=out / "a" / "b" / "x.sdrt" / "y.sdrt"),
        UsageError,
        "would write into the bundle",
    )


@pytest.mark.parametrize("name", ["file/x.sdrt", "x" * 300], ids=["below a file", "name too long"])
def test_output_that_cannot_be(small_checkpoint: Path, out: Path, name: str) -> None:
    (out / "file").touch()
    refused(BuildOptions(small_checkpoint, output=out / name), UsageError, str(out / name).removesuffix("/x.sdrt"))
    assert [path.name for path in out.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"precision": ""}, "precision ''"),
        ({"size": (500, 512)}, "size 500x512"),
        ({"size": (0, 0)}, "size 0x0"),
        ({"size": (56, 64)}, "size 56x64"),
        ({"size": (64, 8200)}, "size 64x8200"),
        ({"size": (-64, 64)}, "size -64x64"),
        ({"clip_skip": (2, 2)}, "clip skip 2, 2: expected each layer once"),
        ({"clip_skip": (0,)}, "clip skip 0"),
        ({"clip_skip": (3,)}, "clip skip 3"),
        ({"clip_skip": (-1,)}, "clip skip -1"),
    ],
)
def test_options_out_of_range(out: Path, options: dict[str, Any], fragment: str) -> None:
    error = refused(BuildOptions(CHECKPOINT, output=out / "x.sdrt", **options), UsageError, fragment)
    assert error.exit_code == 2
    assert not list(out.iterdir())


# Inputs that change


def vae_of(checkpoint: Path, path: Path) -> Path:
    tensors, _ = read_raw(checkpoint)
    return write_raw(path, {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")})


def rewritten(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000))


def rewritten_unseen(path: Path) -> None:
    """Changed in content alone: the time is as it was."""
    before = path.stat().st_mtime_ns
    rewritten(path)
    os.utime(path, ns=(0, before))


@pytest.mark.parametrize("change", [rewritten, rewritten_unseen])
@pytest.mark.parametrize("which", ["checkpoint", "vae", "lora"])
def test_c20_input_that_changes_during_the_build(
    small_checkpoint: Path,
    out: Path,
    tmp_path: Path,
    instant: None,
    which: str,
    change: Callable[[Path], None],
    small_lora: Path,
) -> None:
    files = {
        "checkpoint": tmp_path / "c.safetensors",
        "vae": vae_of(small_checkpoint, tmp_path / "v.safetensors"),
        "lora": tmp_path / "l.safetensors",
    }
    shutil.copy(small_checkpoint, files["checkpoint"])
    shutil.copy(small_lora, files["lora"])

    def progress(stage: str, done: float | None) -> None:
        if stage == "write":
            change(files[which])

    with pytest.raises(InputFileError, match="changed during the build") as caught:
        build(
            BuildOptions(files["checkpoint"], (LoraOption(files["lora"]),), files["vae"], output=out / "x.sdrt"),
            progress,
        )
    assert caught.value.message.startswith(str(files[which]))
    assert not list(out.iterdir())


def test_c20_input_that_is_truncated_during_the_build(
    small_checkpoint: Path, out: Path, tmp_path: Path, quick: None
) -> None:
    shutil.copy(small_checkpoint, tmp_path / "c.safetensors")

    def progress(stage: str, done: float | None) -> None:
        if stage == "fuse" and done is None:
            os.truncate(tmp_path / "c.safetensors", 1_000_000)

    with pytest.raises(InputFileError, match="changed during the build"):
        build(BuildOptions(tmp_path / "c.safetensors", output=out / "x.sdrt"), progress)
    assert not list(out.iterdir())


def as_ckpt(checkpoint: Path, path: Path, zipped: bool) -> Path:
    """A checkpoint as torch saves it, with a little of what training leaves beside."""
    torch.save({"global_step": 5, "state_dict": load_file(checkpoint)}, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_ckpt_that_changes_during_the_build(
    small_checkpoint: Path, out: Path, tmp_path: Path, instant: None, zipped: bool
) -> None:
    path = as_ckpt(small_checkpoint, tmp_path / "c.ckpt", zipped)
    with pytest.raises(InputFileError, match=r"c\.ckpt: changed during the build"):
        build(
            BuildOptions(path, output=out / "x.sdrt"), lambda stage, done: rewritten(path) if stage == "write" else None
        )
    assert not list(out.iterdir())


@pytest.mark.parametrize("which", ["zip", "legacy", "folder"])
def test_the_same_model_in_another_form_gives_the_same_bundle(
    small_checkpoint: Path, out: Path, tmp_path: Path, quick: None, no_trace: None, small_bundle: Path, which: str
) -> None:
    path = tmp_path / "small.v1"
    if which == "folder":
        weights, spec = reference.stored_weights(small_bundle), reference.sizes(small_bundle)
        reference.unet(weights, spec["unet"]).save_pretrained(path / "unet")
        reference.vae(weights, spec["vae"]).save_pretrained(path / "vae")
        reference.text_model(weights, spec["texts"][0]).save_pretrained(path / "text_encoder")
        (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    else:
        path = as_ckpt(small_checkpoint, tmp_path / "small.ckpt", which == "zip")
    report = build(BuildOptions(path, output=out / "x.sdrt"))
    assert (report.path / WEIGHTS).read_bytes() == (small_bundle / WEIGHTS).read_bytes()
    assert [(source.kind, source.name) for source in report.manifest.sources] == [("checkpoint", path.name)]
    if which != "folder":
        assert report.notes[0] == "small.ckpt: what lies beside the weights was ignored: global_step"
        assert report.manifest.sources[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_output_is_named_after_the_whole_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.v1.5").mkdir()
    assert default_output(BuildOptions(tmp_path / "tiny.v1.5")) == Path("tiny.v1.5.sdrt")
    assert default_output(BuildOptions(tmp_path / "tiny.v1.5.ckpt")) == Path("tiny.v1.5.sdrt")
    monkeypatch.chdir(tmp_path / "tiny.v1.5")
    assert default_output(BuildOptions(Path())) == Path("tiny.v1.5.sdrt")


# The self-check


@pytest.mark.parametrize("compute", ["fp32", "fp16"])
def test_graph_that_differs_from_its_network_fails_the_build(
    small_checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, compute: str
) -> None:
    run = selfcheck.run_in_parts

    def perturbed(path: Path, *rest: Any, **options: Any) -> Any:
        outputs = run(path, *rest)
        if path.name == f"text_encoder.{compute}.onnx":
            outputs = {name: array * np.float32(1.05) for name, array in outputs.items()}
        return outputs

    monkeypatch.setattr(selfcheck, "run_in_parts", perturbed)
    error = refused(
        BuildOptions(small_checkpoint, output=out / "x.sdrt"),
        CheckFailed,
        "self-check",
        "text_encoder",
        "relative error",
    )
    assert error.exit_code == 1
    assert not list(out.iterdir())


@pytest.fixture
def parts(flat_bundle: Path) -> Iterator[tuple[dict[str, Recipe], TensorFile, Path]]:
    """The emoji model's recipes, its bundle's weights, and the folder of its graphs."""
    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    with open_tensor_file(flat_bundle / WEIGHTS) as weights:
        yield recipes(checkpoint.architecture), weights, flat_bundle / "graphs"


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_output_is_checked(
    parts: tuple[dict[str, Recipe], TensorFile, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    """Against the network's, and those of the half-precision graph against the float32 graph's."""
    made, weights, folder = parts
    recipe = made[graph]
    paths = {compute: folder / f"{graph}.{compute}.onnx" for compute in ("fp32", "fp16")}
    inputs = selfcheck.reference_inputs(recipe)
    right = run_in_parts(paths["fp32"], inputs)
    known = skeletons(recipe)[0]

    def check(of_network: Any, of_half: Any) -> dict[str, float]:
        (tmp_path / "r.npz").unlink(missing_ok=True)
        monkeypatch.setattr(outputs_module, "network_outputs", lambda *_: of_network)

        def run(path: Path, *rest: Any, **options: Any) -> Any:
            return of_half if path == paths["fp16"] else run_in_parts(path, *rest)

        monkeypatch.setattr(selfcheck, "run_in_parts", run)
        return selfcheck.check(recipe, known, weights, paths, tmp_path / "r.npz", full=True)

    assert check(right, right) == {"fp32": 0.0, "fp16": 0.0}
    for name, array in right.items():
        wrong = {
            name: array + 1 if array.dtype != bool else ~array,
            "shape": array[:0],
            "number": np.zeros_like(array) - np.nan if array.dtype.kind == "f" else array * 0 + 7,
        }
        for value in wrong.values():
            for outputs in ((right | {name: value}, right), (right, right | {name: value})):
                with pytest.raises(CheckFailed, match=f"{graph}.*{name}"):
                    check(*outputs)
                assert not (tmp_path / "r.npz").exists()


def test_graph_that_gives_nan_fails_the_build(
    small_checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = selfcheck.run_in_parts

    def broken(path: Path, *rest: Any, **options: Any) -> Any:
        found = run(path, *rest)
        next(iter(found.values())).flat[3] = np.nan
        return found

    monkeypatch.setattr(selfcheck, "run_in_parts", broken)
    refused(
        BuildOptions(small_checkpoint, output=out / "x.sdrt"),
        NonFiniteError,
        "self-check: text_encoder",
        "1 values are NaN or infinite",
    )
    assert not list(out.iterdir())


def test_checkpoint_that_overflows_in_its_own_network(small_checkpoint: Path, out: Path, tmp_path: Path) -> None:
    """Every weight is finite, what they compute is not."""
    tensors = {
        name: tensor.float() if tensor.dtype == torch.float16 else tensor
        for name, tensor in load_file(small_checkpoint).items()
    }
    tensors["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"].fill_(3e38)
    save_file(tensors, tmp_path / "c.safetensors")
    error = refused(
        BuildOptions(tmp_path / "c.safetensors", precision="fp32", output=out / "x.sdrt"),
        NonFiniteError,
        "self-check: text_encoder",
    )
    assert "checkpoint" in error.fix
    assert not list(out.iterdir())


def test_reference_is_what_the_network_computes(
    parts: tuple[dict[str, Recipe], TensorFile, Path], flat_bundle: Path
) -> None:
    made, weights, _ = parts
    for graph, recipe in made.items():
        with np.load(flat_bundle / "reference" / f"{graph}.npz", allow_pickle=False) as stored:
            inputs = {name[3:]: stored[name] for name in stored.files if name.startswith("in.")}
            assert inputs.keys() == recipe.signature.inputs.keys()
            for name, array in network_outputs(recipe, weights, inputs).items():
                assert np.allclose(stored[f"out.{name}"], array, rtol=1e-4, atol=1e-4), (graph, name)


def held_whole(recipe: Recipe, weights: TensorFile, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the network gives when it holds all of its weights, on one thread."""
    module = trace_module.module(recipe).to_empty(device="cpu")
    state = {name: torch.from_numpy(weights.read(name)).float() for name in weights_of(recipe)}
    module.load_state_dict(state, strict=False)
    with torch.inference_mode():
        outputs = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: output.numpy() for name, output in zip(recipe.signature.outputs, outputs, strict=True)}


@pytest.mark.parametrize("graph", GRAPHS)
def test_weights_read_as_they_are_needed_give_the_same_bits(
    parts: tuple[dict[str, Recipe], TensorFile, Path], graph: str
) -> None:
    made, weights, _ = parts
    inputs = selfcheck.reference_inputs(made[graph])
    assert torch.get_num_threads() == 1
    whole, found = held_whole(made[graph], weights, inputs), network_outputs(made[graph], weights, inputs)
    assert whole.keys() == found.keys()
    for name, array in whole.items():
        assert array.dtype == found[name].dtype and array.tobytes() == found[name].tobytes(), name


class Watched:
    """Weights that count how many of those handed out are still in memory."""

    def __init__(self, weights: TensorFile) -> None:
        self.weights, self.alive, self.most = weights, 0, 0
        self.seen: set[str] = set()

    def read(self, name: str) -> Any:
        value = self.weights.read(name).astype(np.float32)
        weakref.finalize(value, self.dropped)  # the tensor and every view of it keep the array
        self.seen.add(name)
        self.alive += 1
        self.most = max(self.most, self.alive)
        return value

    def dropped(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_check_holds_the_weights_of_one_operator_and_takes_every_one(
    parts: tuple[dict[str, Recipe], TensorFile, Path], graph: str
) -> None:
    made, weights, _ = parts
    watched: Any = Watched(weights)
    network_outputs(made[graph], watched, selfcheck.reference_inputs(made[graph]))
    assert watched.seen == weights_of(made[graph]).keys()
    assert watched.most == 2 and watched.alive == 0


def test_weights_that_no_operator_takes_are_not_passed_over(
    parts: tuple[dict[str, Recipe], TensorFile, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, weights, _ = parts
    recipe = made[VAE_DECODER]

    def with_another(recipe: Recipe) -> torch.nn.Module:
        module = trace_module.module(recipe)
        module.left_over = torch.nn.Parameter(torch.zeros(1))
        return module

    monkeypatch.setattr(outputs_module, "module", with_another)
    with pytest.raises(AssertionError, match="left_over"):
        network_outputs(recipe, weights, selfcheck.reference_inputs(recipe))


# The manifest


def test_manifest_tells_where_everything_came_from(blindbox_bundle: Path) -> None:
    manifest = open_bundle(blindbox_bundle).manifest
    checkpoint, lora = manifest.sources
    assert (checkpoint.kind, checkpoint.name) == ("checkpoint", "emoji.safetensors")
    assert checkpoint.sha256 == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    assert (checkpoint.scale, checkpoint.te_scale, checkpoint.applied) == (None, None, {})
    assert (lora.kind, lora.name, lora.scale, lora.te_scale) == ("lora", "blindbox.safetensors", 1.0, 1.0)
    assert lora.sha256 == hashlib.sha256(LORA.read_bytes()).hexdigest()
    modules = {name.partition(".lora_down")[0] for name in load_file(LORA) if ".lora_down" in name}
    text = sum(name.startswith("lora_te_") for name in modules)
    assert lora.applied == {"text_encoder": text, "unet": len(modules) - text}
    assert all(0 < change < 2 for change in lora.relative_change.values())
    assert lora.relative_change.keys() == lora.applied.keys()
    assert "torch" not in manifest.tools
    assert manifest.tools["onnxruntime"] == onnxruntime.__version__
    assert (manifest.family, manifest.name, manifest.precision) == ("sd1", "blindbox", "fp16")
    assert manifest.latents == Latents(4, 8, (64, 64), 0)
    assert manifest.text[0] == Text(64, 77, 49406, 49407, 49407, (1,))
    assert manifest.graphs.keys() == set(GRAPHS)
    assert {name: (blindbox_bundle / name).stat().st_size for name in manifest.files} == {
        n: r.size_bytes for n, r in manifest.files.items()
    }


def test_options_reach_the_manifest(out: Path, tmp_path: Path, quick: None) -> None:
    report = build(
        BuildOptions(
            CHECKPOINT,
            (LoraOption(LORA, 0.5, 0.25), LoraOption(LORA, 0.0, 0.0)),
            vae_of(CHECKPOINT, tmp_path / "other vae.safetensors"),
            precision="fp32",
            size=(128, 192),
            output=out / "x.sdrt",
        )
    )
    manifest = open_bundle(report.path).manifest
    assert manifest == replace(report.manifest, architecture=manifest.architecture)
    assert manifest.latents.size == (128, 192)
    assert manifest.precision == "fp32"
    assert [(s.kind, s.name, s.scale, s.te_scale, bool(s.applied)) for s in manifest.sources] == [
        ("checkpoint", "emoji.safetensors", None, None, False),
        ("vae", "other vae.safetensors", None, None, False),
        ("lora", "blindbox.safetensors", 0.5, 0.25, True),
        ("lora", "blindbox.safetensors", 0.0, 0.0, False),
    ]
    assert [note for note in report.notes if "scale 0" in note] == ["blindbox.safetensors: scale 0, nothing changed"]


def built_with(folder: Path, checkpoint: Path = CHECKPOINT, **options: Any) -> BuildReport:
    return build(BuildOptions(checkpoint, output=folder / "x.sdrt", **options))


def test_leftovers_are_noted(out: Path, tmp_path: Path, quick: None) -> None:
    save_file(load_file(CHECKPOINT) | {"my.notes": torch.zeros(3)}, tmp_path / "c.safetensors")
    save_file(load_file(LORA) | {"lora_unet_other.alpha": torch.zeros(())}, tmp_path / "l.safetensors")
    report = built_with(
        out, tmp_path / "c.safetensors", loras=(LoraOption(tmp_path / "l.safetensors"),), allow_unmatched=True
    )
    assert report.notes == (
        "1 tensors of the checkpoint are not used, such as my.notes",
        "l.safetensors: 1 keys belong to no module and were left out, such as lora_unet_other.alpha",
    )


def test_a_lora_brings_its_embedding(
    small_checkpoint: Path, small_bundle: Path, small_lora: Path, out: Path, tmp_path: Path, quick: None
) -> None:
    taught = 0.5 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    save_file(load_file(small_lora) | {"bundle_emb.<toy>.clip_l": taught}, tmp_path / "l.safetensors")
    report = built_with(
        out,
        small_checkpoint,
        loras=(LoraOption(tmp_path / "l.safetensors"), LoraOption(tmp_path / "l.safetensors", 0.5)),
    )
    assert report.manifest.text[0].embeddings == {"<toy>": (49408, 49409)}
    assert [(s.kind, s.name, s.trigger) for s in report.manifest.sources[3:]] == [
        ("embedding", "l.safetensors", "<toy>")
    ]
    table = load_file(report.path / WEIGHTS)[
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    ]
    assert torch.equal(table[49408:], taught.half()) and not any("belong to no module" in note for note in report.notes)
    assert set(report.stages_s) >= {"bind step", "bind text_encoder"} and not any(
        stage.startswith("trace") for stage in report.stages_s
    )


@pytest.mark.parametrize(("said", "prediction", "zero_snr"), [(None, "v", True), ("eps", "epsilon", False)])
def test_a_lora_says_how_the_model_predicts_after_it(
    small_checkpoint: Path,
    small_lora: Path,
    out: Path,
    tmp_path: Path,
    quick: None,
    said: str | None,
    prediction: str,
    zero_snr: bool,
) -> None:
    keys = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(load_file(small_lora) | keys, tmp_path / "l.safetensors")
    report = built_with(out, small_checkpoint, loras=(LoraOption(tmp_path / "l.safetensors"),), prediction=said)
    assert (report.manifest.diffusion.prediction, report.manifest.diffusion.zero_snr) == (prediction, zero_snr)
    assert any("v_pred: says that the model predicts v after it" in note for note in report.notes)


def test_a_missing_file_is_found_before_any_work(
    small_checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "open_checkpoint", lambda *_, **__: pytest.fail("the checkpoint was opened"))
    gone = Path("gone.safetensors")
    for given in (
        {"loras": (LoraOption(gone),)},
        {"embeddings": (EmbeddingOption(gone, "x"),)},
        {"hypernetworks": (HypernetworkOption(gone),)},
        {"vae": gone},
    ):
        with pytest.raises(InputFileError, match=r"gone\.safetensors: cannot open"):
            built_with(out, small_checkpoint, **given)


def test_file_names_that_are_not_unicode(small_checkpoint: Path, out: Path, tmp_path: Path, instant: None) -> None:
    path = tmp_path / os.fsdecode(b"\xff.safetensors")
    shutil.copy(small_checkpoint, path)
    report = build(BuildOptions(path, output=out / os.fsdecode(b"\xfe.sdrt")))
    assert open_bundle(report.path).manifest.sources[0].name == path.name


def test_default_output() -> None:
    loras = (LoraOption(Path("b/style.v2.safetensors")), LoraOption(Path("c/light.safetensors")))
    assert default_output(BuildOptions(Path("a/emoji.safetensors"))) == Path("emoji.sdrt")
    assert default_output(BuildOptions(Path("a/emoji.safetensors"), loras)) == Path("emoji+style.v2+light.sdrt")


def test_default_output_is_in_the_working_folder(
    small_checkpoint: Path, out: Path, instant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out)
    assert build(BuildOptions(small_checkpoint)).path == out / "small.sdrt"
    assert [path.name for path in out.iterdir()] == ["small.sdrt"]
