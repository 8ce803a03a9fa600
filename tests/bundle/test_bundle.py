"""Bundles: what is written is read again, and a folder that is not exactly what its manifest says is never run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sdrt.bundle.folder import Bundle, check_files, file_record, is_bundle, open_bundle
from sdrt.bundle.graphs import GRAPHS, Dimensions, signatures
from sdrt.bundle.manifest import (
    FORMAT,
    MAX_MANIFEST_BYTES,
    TOKENIZER,
    WEIGHTS,
    Component,
    Diffusion,
    FileRecord,
    Graph,
    Latents,
    Manifest,
    Source,
    Text,
    Vector,
    write_manifest,
)
from sdrt.cli.app import app
from sdrt.errors import BundleError, CheckFailed, InputFileError, MachineError, SdrtError
from sdrt.runtime import Pipeline
from sdrt.runtime.verify import verify

GRAPH_FILES = [f"graphs/{graph}.{compute}.onnx" for graph in GRAPHS for compute in ("fp32", "fp16")]
FILES = [*GRAPH_FILES, WEIGHTS, *(f"reference/{graph}.npz" for graph in GRAPHS), TOKENIZER]


@pytest.fixture
def copy(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the emoji bundle to tamper with."""
    return Path(shutil.copytree(small_bundle, tmp_path / "copy.sdrt"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the graph files that ONNX Runtime has been asked to load."""
    names: list[str] = []

    class Spy(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, *args: Any, **options: Any) -> None:
            names.append(Path(path).name)
            super().__init__(path, *args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Spy)
    return names


def small_graph(graph: str, compute: str) -> Graph:
    path = f"graphs/{graph}.{compute}.onnx"
    component = {"step": "unet", "text_encoder": "text_encoder"}.get(graph, "vae")
    known = signatures(Dimensions(4, 0, 8, 64, 77, (1, 2)))[graph]
    return Graph(path, component, tuple(known.inputs), tuple(known.outputs), 1.5e-06)


COMPONENTS = {
    "text_encoder": Component("fp16", "fp16"),
    "unet": Component("fp16", "fp16"),
    "vae": Component("fp32", "fp32"),
}


def small(folder: Path) -> Manifest:
    """A bundle of files of a few bytes each, which opens but does not run. Returns its manifest."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    manifest = Manifest(
        format=FORMAT,
        sdrt="0.0",
        name="smäll",
        family="sd1",
        architecture={
            "unet": {"in_channels": 4},
            "vae": {"latent_channels": 4, "channels": [32, 32, 64, 64]},
            "texts": [{"tokens": 77, "width": 64, "vocabulary": 100, "layers": 2}],
        },
        diffusion=Diffusion(),
        text=(Text(64, 77, 1, 2, 3, (1, 2)),),
        latents=Latents(4, 8, (64, 128), 0),
        components=COMPONENTS,
        graphs={graph: {compute: small_graph(graph, compute) for compute in ("fp32", "fp16")} for graph in GRAPHS},
        sources=(
            Source("checkpoint", "base.safetensors", "a" * 64),
            Source("lora", "style.safetensors", "b" * 64, 0.5, 0.25, {"unet": 3}, {"unet": 0.125}),
        ),
        tools={"python": "3.11"},
        files={name: file_record(folder / name) for name in FILES},
    )
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "small.sdrt"
    small(path)
    return path


def refused(path: Path, *fragments: str, kind: type[SdrtError] = BundleError, code: int = 4) -> SdrtError:
    """Opening `path` fails with exactly this class, in one printable line that names the folder and holds the
    fragments.
    """
    with pytest.raises(SdrtError) as caught:
        open_bundle(path)
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == code
    assert error.message.startswith(str(path))
    assert error.message.isprintable()
    for fragment in fragments:
        assert fragment in error.message
    return error


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a bundle's manifest as JSON."""
    document = json.loads((path / "manifest.json").read_text())
    change(document)
    (path / "manifest.json").write_text(json.dumps(document))


# The manifest


def test_round_trip(tmp_path: Path) -> None:
    manifest = small(tmp_path / "x.sdrt")
    opened = open_bundle(tmp_path / "x.sdrt")
    assert opened == Bundle(tmp_path / "x.sdrt", manifest)
    check_files(opened)


def test_real_manifest_round_trip(flat_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(flat_bundle).manifest
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_bytes() == (flat_bundle / "manifest.json").read_bytes()
    assert list(manifest.files) == sorted(FILES)


def test_equal_manifests_are_equal_bytes(tmp_path: Path) -> None:
    manifest = small(tmp_path / "x.sdrt")
    shuffled = replace(
        manifest,
        files=dict(reversed(manifest.files.items())),
        graphs=dict(reversed(manifest.graphs.items())),
        tools=dict(reversed(manifest.tools.items())),
    )
    (tmp_path / "y").mkdir()
    write_manifest(tmp_path / "y", shuffled)
    assert (tmp_path / "y" / "manifest.json").read_bytes() == (tmp_path / "x.sdrt" / "manifest.json").read_bytes()


def test_names_that_are_not_unicode_survive(tmp_path: Path) -> None:
    """A file name of other bytes reaches Python with lone surrogates in it."""
    manifest = small(tmp_path / "x.sdrt")
    manifest = replace(manifest, name="\udcff", sources=(Source("checkpoint", "\udcff.safetensors", "a" * 64),))
    write_manifest(tmp_path / "x.sdrt", manifest)
    assert open_bundle(tmp_path / "x.sdrt").manifest == manifest


GOLDEN = """\
{
 "architecture": {
  "unet": {
   "channels": [
    32
   ]
  }
 },
 "components": {
  "text_encoder": {
   "compute": "fp16",
   "storage": "fp16"
  },
  "unet": {
   "compute": "fp16",
   "storage": "fp16"
  },
  "vae": {
   "compute": "fp32",
   "storage": "fp32"
  }
 },
 "diffusion": {
  "beta_end": 0.012,
  "beta_start": 0.00085,
  "num_timesteps": 1000,
  "prediction": "epsilon",
  "sigma_data": 1.0,
  "sigma_max": null,
  "sigma_min": null,
  "told_guidance": false,
  "zero_snr": false
 },
 "family": "sd1",
 "files": {
  "graphs/step.fp32.onnx": {
   "sha256": "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
   "size_bytes": 7
  }
 },
 "format": 2,
 "graphs": {
  "step": {
   "fp32": {
    "checked": "network",
    "component": "unet",
    "error": 1.5e-06,
    "inputs": [
     "x"
    ],
    "outputs": [
     "y",
     "z"
    ],
    "path": "graphs/step.fp32.onnx"
   }
  }
 },
 "latents": {
  "channels": 4,
  "concat_channels": 0,
  "concat_scale": 1.0,
  "factor": 8,
  "size": [
   512,
   768
  ]
 },
 "name": "smäll",
 "sdrt": "0.0",
 "sources": [
  {
   "applied": {
    "unet": 3
   },
   "kind": "lora",
   "name": "style.safetensors",
   "relative_change": {
    "unet": 0.125
   },
   "scale": 0.5,
   "sha256": "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
   "te_scale": 0.25,
   "trigger": null
  }
 ],
 "text": [
  {
   "bos": 1,
   "clip_skip": [
    1
   ],
   "embeddings": {},
   "eos": 2,
   "last_layer": 1,
   "pad": 3,
   "tokenizer": "tokenizer/tokenizer.json",
   "tokens": 77,
   "width": 64,
   "zero_empty": false
  }
 ],
 "tools": {
  "python": "3.11"
 },
 "vector": {
  "pooled": 0,
  "size_width": 0,
  "sizes": 0
 }
}
"""


def test_format_is_pinned(tmp_path: Path) -> None:
    """Bundles in use were written like this. A change of it is a new format number."""
    manifest = Manifest(
        format=FORMAT,
        sdrt="0.0",
        name="smäll",
        family="sd1",
        architecture={"unet": {"channels": (32,)}},
        diffusion=Diffusion(),
        text=(Text(64, 77, 1, 2, 3, (1,)),),
        latents=Latents(4, 8, (512, 768), 0),
        components=COMPONENTS,
        graphs={"step": {"fp32": Graph("graphs/step.fp32.onnx", "unet", ("x",), ("y", "z"), 1.5e-06)}},
        sources=(Source("lora", "style.safetensors", "b" * 64, 0.5, 0.25, {"unet": 3}, {"unet": 0.125}),),
        tools={"python": "3.11"},
        files={"graphs/step.fp32.onnx": FileRecord(7, "c" * 64)},
    )
    write_manifest(tmp_path, manifest)
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == GOLDEN


def test_missing_bundle(tmp_path: Path) -> None:
    error = refused(tmp_path / "none.sdrt", "no such bundle", kind=InputFileError, code=3)
    assert "sdrt build" in error.fix


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"], ids=["too long", "NUL"])
def test_impossible_path(name: str) -> None:
    with pytest.raises(InputFileError):
        open_bundle(Path(name))


def test_missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    refused(folder, "not a bundle", "manifest.json", kind=InputFileError, code=3)


def test_file_instead_of_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "x.sdrt").touch()
    refused(tmp_path / "x.sdrt", "not a bundle", kind=InputFileError, code=3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"{}{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1, "format": 1}',
        b"\x1b[31m",
    ],
    ids=[
        "empty",
        "unfinished",
        "null",
        "list",
        "string",
        "number",
        "two objects",
        "binary",
        "deep",
        "duplicate",
        "escape",
    ],
)
def test_manifest_that_is_not_one_json_object(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    refused(folder, "manifest.json")


@pytest.mark.parametrize("cut", [1, 2, 500])
def test_b3_truncated_manifest(folder: Path, cut: int) -> None:
    text = (folder / "manifest.json").read_text().rstrip()
    (folder / "manifest.json").write_text(text[:-cut])
    refused(folder, "manifest.json", "not valid JSON")


def test_b3_duplicate_keys_deep_inside(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"width": 64', '"width": 64, "width": 64'))
    refused(folder, "duplicate keys")


def test_manifest_above_the_limit(folder: Path) -> None:
    os.truncate(folder / "manifest.json", MAX_MANIFEST_BYTES + 1)
    refused(folder, f"{MAX_MANIFEST_BYTES + 1:,} bytes", f"{MAX_MANIFEST_BYTES:,}")


@pytest.mark.parametrize(("version", "fix"), [(1, "Build the bundle again"), (3, "Upgrade sdrt")])
def test_b3_another_format_does_not_fit_this_version(folder: Path, version: int, fix: str) -> None:
    edit(folder, lambda document: document.update(format=version, sdrt="9.9\x1b[0m", something="else"))
    error = refused(folder, f"format {version}", "9.9\\x1b[0m", "reads format 2", kind=MachineError, code=5)
    assert error.fix.startswith(fix)
    with pytest.raises(MachineError):
        verify(folder)


@pytest.mark.parametrize("version", [0, -1, "1", "2", 2.0, 2.5, True, None, [2]])
def test_what_is_no_format(folder: Path, version: object) -> None:
    edit(folder, lambda document: document.update(format=version))
    refused(folder, "format: expected 2")


def test_no_format(folder: Path) -> None:
    edit(folder, lambda document: document.pop("format"))
    refused(folder, "format: expected 2")


def values_of(value: Any) -> Iterator[Any]:
    """A dataclass and all dataclasses within it."""
    if is_dataclass(value):
        yield value
        for field in fields(value):
            yield from values_of(getattr(value, field.name))
    elif isinstance(value, (tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from values_of(each)


def test_absent_fields_take_their_defaults_or_are_missed(folder: Path) -> None:
    """Field by field of every part of a manifest. A field added later has a default, so this holds for it too."""
    kinds = {type(value): value for value in values_of(open_bundle(folder).manifest)}
    assert len(kinds) == 9
    whole = (folder / "manifest.json").read_text()
    for kind in kinds:
        for field in fields(kind):
            if (kind, field.name) == (Manifest, "format"):
                continue
            document = json.loads(whole)
            for record in document["graphs"]["text_encoder"].values():
                record["outputs"] = []  # which would tell what `clip_skip` is
            parts: list[dict[str, Any]] = {
                Manifest: [document],
                Text: document["text"],
                Diffusion: [document["diffusion"]],
                Latents: [document["latents"]],
                Vector: [document["vector"]],
                Source: document["sources"],
                Component: list(document["components"].values()),
                FileRecord: list(document["files"].values()),
                Graph: [record for by_compute in document["graphs"].values() for record in by_compute.values()],
            }[kind]
            for part in parts:
                del part[field.name]
            (folder / "manifest.json").write_text(json.dumps(document))
            if field.default is MISSING and field.default_factory is MISSING:
                refused(folder, "manifest.json", "missing fields", field.name)
                continue
            default = field.default if field.default_factory is MISSING else field.default_factory()
            found = [
                getattr(value, field.name) for value in values_of(open_bundle(folder).manifest) if type(value) is kind
            ]
            assert found == [default] * len(parts), (kind, field.name)


@pytest.mark.parametrize(
    "add",
    [
        lambda document: document.update(extra=1),
        lambda document: document["diffusion"].update(extra=1),
        lambda document: document["text"][0].update(extra=1),
        lambda document: document["latents"].update(extra=1),
        lambda document: document["components"]["vae"].update(extra=1),
        lambda document: document["sources"][0].update(extra=1),
        lambda document: document["graphs"]["step"]["fp32"].update(extra=1),
        lambda document: document["files"][WEIGHTS].update(extra=1),
        lambda document: document["graphs"].update(extra=document["graphs"]["step"]),
        lambda document: document["graphs"]["step"]["fp32"].update(component="extra"),
    ],
)
def test_what_is_unknown_or_not_there(folder: Path, add: Callable[[dict[str, Any]], object]) -> None:
    """A graph may have any name, if its reference is there: the one added here has none."""
    edit(folder, add)
    refused(folder, "manifest.json", "extra")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda document: document.update(text=[]), "no text encoder"),
        (lambda document: document["text"].append(document["text"][0] | {"tokens": 80}), "chunks of different lengths"),
        (lambda document: document["text"].append(document["text"][0] | {"bos": 2}), "different tokenizers"),
        (
            lambda document: document["text"].append(document["text"][0] | {"embeddings": {"bear": [4]}}),
            "different embeddings",
        ),
        (
            lambda document: document["text"].append(document["text"][0] | {"tokenizer": "tokenizer/other.json"}),
            "tokenizer/other.json",
        ),
        (lambda document: document["components"].pop("unet"), "no unet"),
        (lambda document: document.update(diffusion=[]), "expected an object"),
    ],
)
def test_parts_that_do_not_fit_each_other(folder: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(folder, change)
    refused(folder, "manifest.json", words)


def test_a_graph_of_another_name(folder: Path) -> None:
    """The table of graphs is open: a reader runs those it knows."""

    def add(document: dict[str, Any]) -> None:
        document["graphs"]["control_depth"] = {
            "fp32": document["graphs"]["step"]["fp32"] | {"path": "graphs/control_depth.fp32.onnx"}
        }
        for ours, theirs in names.items():
            document["files"][ours] = document["files"][theirs]

    names = {
        "reference/control_depth.npz": "reference/step.npz",
        "graphs/control_depth.fp32.onnx": "graphs/step.fp32.onnx",
    }
    for ours, theirs in names.items():
        (folder / ours).write_text(theirs)
    edit(folder, add)
    assert "control_depth" in open_bundle(folder).manifest.graphs


UNSAFE = [
    "../x",
    "..",
    "a/../b",
    "a/..",
    "./a",
    "a/./b",
    "a//b",
    "a/",
    "/etc/passwd",
    "//a",
    "",
    ".",
    "a\0b",
    "a\nb",
    "\x1b[31m",
    "a\\b",
    "C:x",
    "engines/x",
    "engines",
    "manifest.json",
]


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
def test_b3_unsafe_file_names(folder: Path, name: str) -> None:
    (folder.parent / "x").write_text("x")
    edit(
        folder,
        lambda document: document["files"].update({name: asdict(FileRecord(1, hashlib.sha256(b"x").hexdigest()))}),
    )
    refused(folder, "unsafe path")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "graphs/none.onnx", "manifest.json"])
def test_graph_file_that_is_not_listed(folder: Path, name: str) -> None:
    edit(folder, lambda document: document["graphs"]["step"]["fp32"].update(path=name))
    refused(folder, name, "not listed")


@pytest.mark.parametrize("name", FILES)
def test_needed_file_that_is_not_listed(folder: Path, name: str) -> None:
    (folder / name).unlink()
    edit(folder, lambda document: document["files"].pop(name))
    refused(folder, name)


@pytest.mark.parametrize(
    "record",
    [
        {"size_bytes": -1},
        {"size_bytes": 1.0},
        {"size_bytes": True},
        {"sha256": "a" * 63},
        {"sha256": "A" * 64},
        {"sha256": 1},
    ],
)
def test_bad_file_record(folder: Path, record: dict[str, object]) -> None:
    edit(folder, lambda document: document["files"][WEIGHTS].update(record))
    refused(folder, "manifest.json", "expected", WEIGHTS)


_SMALL_LEAVES = [
    ("sdrt",),
    ("name",),
    ("family",),
    ("components",),
    ("components", "vae"),
    ("components", "vae", "storage"),
    ("architecture",),
    ("tools",),
    ("sources",),
    ("files",),
    ("graphs",),
    ("diffusion", "prediction"),
    ("diffusion", "beta_start"),
    ("diffusion", "beta_end"),
    ("diffusion", "num_timesteps"),
    ("text",),
    ("text", 0),
    *(("text", 0, name) for name in ("width", "tokens", "bos", "eos", "pad", "clip_skip", "tokenizer")),
    ("text", 0, "clip_skip", 0),
    ("latents", "channels"),
    ("latents", "factor"),
    ("latents", "size"),
    ("latents", "size", 1),
    ("graphs", "step"),
    ("graphs", "step", "fp32"),
    ("graphs", "step", "fp32", "path"),
    ("graphs", "step", "fp32", "component"),
    ("graphs", "step", "fp32", "inputs"),
    ("graphs", "step", "fp32", "outputs", 0),
    ("graphs", "step", "fp32", "error"),
    ("files", WEIGHTS),
    ("files", WEIGHTS, "size_bytes"),
    ("files", WEIGHTS, "sha256"),
]


@pytest.mark.parametrize("path", _SMALL_LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_values_of_another_type(folder: Path, path: tuple[str | int, ...]) -> None:
    """Wherever the manifest is changed to another JSON type, opening refuses it: nothing later has to check again."""
    original = json.loads((folder / "manifest.json").read_text())
    value = original
    for step in path:
        value = value[step]
    for wrong in (None, True, "text", 7, 0.5, [[]], {"a": {}}):
        if type(wrong) is type(value) or (isinstance(value, float) and wrong == 7):
            continue
        document = json.loads(json.dumps(original))
        parent = document
        for step in path[:-1]:
            parent = parent[step]
        parent[path[-1]] = wrong
        (folder / "manifest.json").write_text(json.dumps(document))
        refused(folder, "manifest.json")


def well_typed(value: object) -> bool:
    """Whether a manifest holds only what its dataclasses say, as far as plain values go."""
    if is_dataclass(value):
        return all(well_typed(getattr(value, f.name)) for f in fields(value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and well_typed(v) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return all(map(well_typed, value))
    return value is None or isinstance(value, (str, int, float))


@given(
    edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=4)
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_b_damaged_manifests_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.sdrt"
    if not path.exists():
        small(path)
        shutil.copy(path / "manifest.json", path.with_suffix(".json"))
    data = path.with_suffix(".json").read_bytes()
    for position, removed, inserted in edits:
        data = data[:position] + inserted + data[position + removed :]
    (path / "manifest.json").write_bytes(data)
    try:
        opened = open_bundle(path)
    except (BundleError, MachineError) as error:
        assert error.message.startswith(str(path))
    else:
        assert well_typed(opened.manifest)
        assert opened.manifest.files.keys() == set(FILES)


MANY = 10**30
NUMBERS: list[tuple[str, Any]] = [
    ("components.unet.storage", "fp8"),
    ("components.vae.compute", ""),
    ("diffusion.prediction", "flow"),
    ("diffusion.prediction", ""),
    ("diffusion.beta_start", 0.0),
    ("diffusion.beta_start", -0.5),
    ("diffusion.beta_start", 0.5),
    ("diffusion.beta_start", 10**400),
    ("diffusion.beta_start", float("nan")),
    ("diffusion.beta_end", 1.0),
    ("diffusion.beta_end", float("inf")),
    ("diffusion.num_timesteps", 1),
    ("diffusion.num_timesteps", 10_001),
    ("diffusion.num_timesteps", MANY),
    ("text.0.width", 0),
    ("text.0.width", 65),
    ("text.0.width", MANY),
    ("text.0.tokens", 0),
    ("text.0.tokens", 1),
    ("text.0.tokens", 76),
    ("text.0.tokens", MANY),
    ("vector.sizes", 5),
    ("text.0.bos", 100),
    ("text.0.bos", MANY),
    ("text.0.eos", 100),
    ("text.0.pad", 2**63),
    ("text.0.clip_skip", []),
    ("text.0.clip_skip", [0]),
    ("text.0.clip_skip", [3]),
    ("text.0.clip_skip", [1, 1]),
    ("text.0.clip_skip", [1]),
    ("text.0.embeddings", {"bear": [100]}),
    ("text.0.embeddings", {"bear": [MANY]}),
    ("latents.channels", 0),
    ("latents.channels", 5),
    ("latents.channels", MANY),
    ("latents.factor", 0),
    ("latents.factor", 1),
    ("latents.factor", 16),
    ("latents.factor", MANY),
    ("latents.concat_channels", 5),
    ("latents.concat_channels", MANY),
    ("latents.size", [64, 0]),
    ("latents.size", [64, 68]),
    ("latents.size", [64, 8200]),
    ("latents.size", [64, MANY]),
    ("graphs.step.fp32.path", GRAPH_FILES[0]),
    ("graphs.step.fp32.inputs", ["row"]),
    ("graphs.step.fp32.error", float("nan")),
    ("graphs.step.fp32.error", -1.0),
    ("graphs.text_encoder.fp32.outputs", ["context_skip_1"]),
    ("sources.0.kind", "plugin"),
    ("sources.1.scale", float("-inf")),
    ("files.tokenizer/tokenizer~json.size_bytes", MANY),
    ("architecture.texts", None),
    ("architecture.texts", []),
    ("architecture.texts.0", 5),
    ("architecture.texts.0.vocabulary", "100"),
    ("architecture.texts.0.vocabulary", float("nan")),
    ("architecture.texts.0.layers", True),
    ("architecture.vae.channels", []),
    ("architecture.vae.channels", 4),
    ("architecture.unet.in_channels", MANY),
    ("architecture.unet.other", MANY),
]


@pytest.mark.parametrize(("where", "value"), NUMBERS, ids=lambda value: str(value)[:40])
def test_b3_values_out_of_range_or_at_odds(folder: Path, where: str, value: Any) -> None:
    """Opening refuses them, so that nothing later has to check again."""

    def change(document: Any) -> None:
        *parents, last = [int(part) if part.isdecimal() else part.replace("~", ".") for part in where.split(".")]
        for part in parents:
            document = document[part]
        document[last] = value

    edit(folder, change)
    refused(folder, "manifest.json")


def test_a_manifest_that_this_user_may_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def forbidden(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("manifest.json"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", forbidden)
    refused(folder, "Permission denied", kind=InputFileError, code=3)


# The folder


@pytest.mark.parametrize("name", FILES)
def test_b2_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f": {name}: missing")


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_size(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    os.truncate(folder / name, 0)
    refused(folder, f": {name}: expected {size} bytes, found 0")


def test_b2_renamed_file(folder: Path) -> None:
    (folder / GRAPH_FILES[0]).rename(folder / "graphs" / "other.onnx")
    refused(folder, f": {GRAPH_FILES[0]}: missing")


@pytest.mark.parametrize(
    "name",
    ["extra", "graphs/extra.onnx", "reference/x\x1b[31m", "new/file", "graphs/manifest.json", "graphs/engines/x"],
)
def test_b2_extra_file(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    refused(folder, name.replace("\x1b", "\\x1b"), "not in the manifest")


def test_engines_and_hidden_files_may_lie_beside(folder: Path) -> None:
    (folder / "engines" / "tensorrt").mkdir(parents=True)
    (folder / "engines" / "tensorrt" / "step.engine").touch()
    (folder / ".DS_Store").touch()
    (folder / "graphs" / ".nfs0001").touch()
    open_bundle(folder)


def replaced_by_link_out(path: Path) -> None:
    outside = path.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def replaced_by_link_in(path: Path) -> None:
    path.rename(path.with_name(".hidden"))
    path.symlink_to(".hidden")


def replaced_by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


REPLACEMENTS = [
    replaced_by_link_out,
    replaced_by_link_in,
    replaced_by_dangling_link,
    replaced_by_pipe,
    replaced_by_folder,
]


@pytest.mark.parametrize("how", REPLACEMENTS)
@pytest.mark.parametrize("name", [GRAPH_FILES[1], WEIGHTS, TOKENIZER])
def test_b4_file_replaced_by_something_else(folder: Path, name: str, how: Callable[[Path], None]) -> None:
    how(folder / name)
    refused(folder, f": {name}: ")


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_b4_manifest_replaced_by_something_else(folder: Path, how: Callable[[Path], None]) -> None:
    (folder.parent / "a").mkdir()
    moved = folder.rename(folder.parent / "a" / "small.sdrt")
    how(moved / "manifest.json")
    refused(moved, "manifest.json: expected a regular file")


def test_folder_inside_replaced_by_a_link(folder: Path) -> None:
    (folder / "graphs").rename(folder.parent / "graphs")
    (folder / "graphs").symlink_to(folder.parent / "graphs")
    refused(folder, ": graphs: expected a regular file")


def test_pipe_beside_the_files(folder: Path) -> None:
    os.mkfifo(folder / "graphs" / "extra")
    refused(folder, ": graphs/extra: expected a regular file")


def test_graph_by_name(small_bundle: Path) -> None:
    opened = open_bundle(small_bundle)
    assert opened.graph("step", "fp32") == small_bundle / "graphs/step.fp32.onnx"
    for graph, precision in (("step", "bf16"), ("none", "fp32")):
        with pytest.raises(BundleError, match=f"no {precision} {graph} graph"):
            opened.graph(graph, precision)


def test_hashes_of_chosen_files(folder: Path) -> None:
    opened = open_bundle(folder)
    (folder / TOKENIZER).write_text(TOKENIZER[::-1])
    check_files(opened, [WEIGHTS])
    with pytest.raises(BundleError, match=TOKENIZER):
        check_files(opened, [WEIGHTS, TOKENIZER])
    with pytest.raises(BundleError, match=TOKENIZER):
        check_files(opened)


def test_is_bundle(folder: Path, tmp_path: Path) -> None:
    assert is_bundle(folder)
    (folder / WEIGHTS).unlink()
    assert is_bundle(folder), "a damaged bundle is ours to replace"
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "none")
    for content in ("", "{}", "[]", '{"format": 1, "name": "x"}'):
        (folder / "manifest.json").write_text(content)
        assert not is_bundle(folder)


def test_is_bundle_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    assert not is_bundle(tmp_path)


# Tampering with a bundle that runs


def test_files_are_the_ones_tampered_with_here(small_bundle: Path) -> None:
    assert sorted(open_bundle(small_bundle).manifest.files) == sorted(FILES)


def flip(path: Path, where: float) -> None:
    """Flip one bit, `where` of the way through the file."""
    position = int(where * (path.stat().st_size - 1))
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", FILES)
def test_b1_one_changed_byte_stops_everything(copy: Path, name: str, loaded: list[str]) -> None:
    for where in (0.0, 0.5, 1.0):
        flip(copy / name, where)
        with pytest.raises(BundleError, match="changed since the build") as caught:
            Pipeline.load(copy)
        assert f": {name}: " in caught.value.message
        if name == WEIGHTS:
            # loading and hashing the weights run beside each other; the graphs themselves are checked already
            loaded.clear()
        assert loaded == []
        flip(copy / name, where)
    flip(copy / name, 0.5)
    runner = CliRunner()
    result = runner.invoke(app, ["generate", str(copy), "red apple", "--output", str(copy.parent / "x.png")])
    assert result.exit_code == 4
    assert name in result.stderr
    assert not (copy.parent / "x.png").exists()
    loaded.clear()
    result = runner.invoke(app, ["verify", str(copy)])
    assert result.exit_code == 1
    assert name in result.stderr
    assert loaded == []


def test_b2_swapped_files_stop_everything(copy: Path, loaded: list[str]) -> None:
    first, second = (copy / name for name in GRAPH_FILES[:2])
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    with pytest.raises(BundleError, match=r"\.onnx: expected .* bytes"):
        Pipeline.load(copy)
    with pytest.raises(CheckFailed, match=r"\.onnx: expected .* bytes"):
        verify(copy)
    assert loaded == []


def test_verify_runs_the_graphs_against_the_reference(copy: Path) -> None:
    """A graph exchanged together with its hash is still found out."""
    assert {check.graph for check in verify(copy)} == set(GRAPHS)
    reference = copy / "reference" / "vae_decoder.npz"
    with np.load(reference) as stored:
        arrays = dict(stored)
    arrays["out.pixels"] = 255 - arrays["out.pixels"]
    np.savez(reference, **arrays)
    edit(copy, lambda document: document["files"].update({"reference/vae_decoder.npz": asdict(file_record(reference))}))
    with pytest.raises(CheckFailed, match="vae_decoder: pixels: onnxruntime: differs from the reference"):
        verify(copy)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in (folder, *folder.rglob("*"))
    }


def test_b10_bundle_works_read_only_moved_and_through_a_link_and_is_not_written_to(
    small_bundle: Path, copy: Path
) -> None:
    with Pipeline.load(small_bundle, threads=1) as pipe:
        expected = pipe("red apple", steps=2, seed=1).images
    moved = copy.rename(copy.with_name("moved elsewhere.sdrt"))
    for path in (moved, *moved.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(moved)
    link = moved.with_name("link")
    link.symlink_to(moved)
    try:
        for path in (moved, link):
            with Pipeline.load(path, threads=1) as pipe:
                assert np.array_equal(pipe("red apple", steps=2, seed=1).images, expected)
        verify(moved)
        assert snapshot(moved) == before
    finally:
        for path in (moved, *moved.rglob("*")):
            path.chmod(0o755)
