"""The file or folder that a model comes in: one file of tensors, or the folder that diffusers saves, with a subfolder
per network.

This file decides which files of a folder are read (docs/architecture.md has the order of preference), reads the
settings in its JSON files, and makes the hash that stands for all of them. Tensors have the names that one file would
give them: `unet.`, `vae.`, `text_encoder.` or `text_encoder_2.`, and the name within.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sdrt.bundle.manifest import MANIFEST
from sdrt.errors import CheckpointError, InputFileError, UnsafeError, nearest, printable
from sdrt.export.families.recognise import describe
from sdrt.export.families.table import BUILDS, FAMILIES
from sdrt.export.families.table import COMPONENTS as ALL
from sdrt.export.read.diffusers_config import Settings, read_settings
from sdrt.export.read.tensor_entry import TensorEntry
from sdrt.export.read.tensor_file import TensorFile, open_tensor_file
from sdrt.files.read import Document, read_document, unique

COMPONENTS = tuple(dict.fromkeys(component.name for component in ALL))
_UNUSED_COMPONENTS = (
    "tokenizer",
    "tokenizer_2",
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "requires_safety_checker",
    "add_watermarker",
    "force_zeros_for_empty_prompt",
    "is_cosxl_edit",
)
"""Other parts and settings of a pipeline. sdrt brings these itself, `read_settings` knows them, or they change no
picture. An image encoder serves IP-Adapters only.
"""
_PIPELINES = tuple(pipeline for family in FAMILIES for pipeline in family.pipelines)
MAX_DOCUMENT_BYTES = 16 << 20
_STEMS = {"clip": ("model", "pytorch_model")}
"""How names of weight files begin, by network; those of all others as diffusers has them."""
_AGAIN = "Download the folder again."


@dataclass(frozen=True)
class Stored:
    """A tensor's entry within the file that holds it."""

    file: TensorFile
    entry: TensorEntry


@dataclass(frozen=True)
class ModelFiles:
    """A model's open files by name below `path`, its JSON files, and every tensor by the name the model gives it. No
    tensor has been read.
    """

    path: Path
    files: Mapping[str, TensorFile]
    documents: Mapping[str, Document]
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    settings: Settings
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.name or self.path.absolute().name

    @cached_property
    def kind(self) -> str:
        """What the file or folder is, as `describe` says it."""
        return describe({name: stored.entry.shape for name, stored in self.tensors.items()}, self.settings.activation)

    @property
    def changes_show(self) -> bool:
        """Whether every change of the weights shows in the files' times."""
        return all(file.changes_show for file in self.files.values())

    def sha256(self, of_file: Callable[[TensorFile], str] = TensorFile.sha256) -> str:
        """SHA-256 of the file. For a folder it is the SHA-256 of the lines that `sha256sum` prints for the files that
        were read, sorted by name. `of_file` gives that of a file with tensors.

        Raises:
            InputFileError: a file was replaced or written to since it was opened.
        """
        if not self.documents and len(self.files) == 1:
            return of_file(next(iter(self.files.values())))
        sums = {name: of_file(file) for name, file in self.files.items()} | {
            name: document.sha256 for name, document in self.documents.items()
        }
        return hashlib.sha256(
            "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode("utf-8", "surrogateescape")
        ).hexdigest()

    def check_unchanged(self) -> None:
        """Raise InputFileError if a file that was read, weights or JSON, has changed."""
        for document in self.documents.values():
            document.check_unchanged()
        for file in self.files.values():
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_folder(path: Path) -> bool:
    """Whether a path is a folder. False also for names that no file can have, for which `Path.is_dir` raises."""
    return os.path.isdir(path)  # noqa: PTH112


def open_model(path: Path) -> ModelFiles:
    """Open a checkpoint: one file, or a diffusers pipeline's folder.

    Raises:
        InputFileError: a file is missing or malformed; or as `open_tensor_file` and `read_settings`.
        UnsafeError: an index leads out of its folder; or as `open_tensor_file`.
    """
    if not is_folder(path):
        file = open_tensor_file(path)
        stored = {name: Stored(file, entry) for name, entry in file.entries.items()}
        return ModelFiles(path, {path.name: file}, {}, stored, file.metadata, Settings(), file.notes)
    with ExitStack() as opened:
        folder = _Folder(path, opened)
        if os.path.exists(path / MANIFEST):
            raise CheckpointError(
                f"{path}: expected a checkpoint, found a bundle, which is built already",
                f"Draw with it: sdrt generate {path} PROMPT, or build another from the checkpoint it came from.",
            )
        if not os.path.lexists(path / "model_index.json") and os.path.exists(path / "config.json"):
            raise CheckpointError(
                f"{path}: expected a whole pipeline, found one network of it (config.json)",
                "Give the folder above, with model_index.json.",
            )
        index = folder.document(
            "model_index.json",
            "It is what diffusers saves beside the folders unet, vae and text_encoder; give such a folder, or one"
            " file.",
        )
        kind = str(index.get("_class_name"))
        for component, value in index.items():
            if (
                component not in (*COMPONENTS, *_UNUSED_COMPONENTS)
                and not component.startswith("_")
                and value not in (None, [None, None], False)
            ):
                raise CheckpointError(
                    f"{path}: model_index.json: a {printable(kind)} with a {printable(component)[:80]}: not"
                    " supported yet",
                    BUILDS,
                )
        components = _components(path, index)
        for component in components:
            if index.get(component, component) in (None, [None, None]) or (
                component not in index and not (path / component).is_dir()
            ):
                raise CheckpointError(
                    f"{path}: model_index.json: names no {component}, found {printable(kind)}",
                    "Give the folder of a whole pipeline.",
                )
            folder.component(component, f"{component}/")
        if kind not in _PIPELINES and "_class_name" in index:
            raise CheckpointError(f"{path}: model_index.json: a {printable(kind)[:80]}: not supported yet", BUILDS)
        configs = {component: folder.document(f"{component}/config.json", _AGAIN) for component in components}
        scheduler = folder.document("scheduler/scheduler_config.json", _AGAIN) if (path / "scheduler").is_dir() else {}
        settings = read_settings(path, configs, scheduler, index)
        model = folder.model(settings)
        opened.pop_all()
        return model


def _components(path: Path, index: Mapping[str, Any]) -> tuple[str, ...]:
    """The components that a pipeline must have: those of the first family with pipelines of its class. A second text
    encoder shows which family that is where no class does.
    """
    present = [name for name in COMPONENTS if name in index or (path / name).is_dir()]
    families = [family for family in FAMILIES if index.get("_class_name") in family.pipelines] or [
        family for family in FAMILIES if {part.name for part in family.components} <= set(present)
    ][-1:]
    return tuple(component.name for component in (families or FAMILIES)[0].components)


def open_vae(path: Path) -> ModelFiles:
    """Open a file or folder with a VAE: one file, a diffusers VAE's folder, or a whole pipeline's folder. Of the last
    only `vae` is read. Raises as `open_model`.
    """
    if not is_folder(path):
        return open_model(path)
    with ExitStack() as opened:
        folder = _Folder(path, opened)
        below = "vae/" if (path / "vae").is_dir() else ""
        config = folder.document(
            f"{below}config.json", "Give a VAE in one file, or a folder with config.json and the weights beside it."
        )
        kind = config.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL":
            raise CheckpointError(
                f"{path}: {below}config.json: expected an AutoencoderKL, found {printable(str(kind))[:80]}", BUILDS
            )
        folder.component("vae", below)
        model = folder.model(read_settings(path, {"vae": config}, {}))
        opened.pop_all()
        return model


@dataclass
class _Folder:
    """A folder whose files are being opened."""

    path: Path
    opened: ExitStack
    files: dict[str, TensorFile] = field(default_factory=dict)
    documents: dict[str, Document] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def model(self, settings: Settings) -> ModelFiles:
        notes = [note for file in self.files.values() for note in file.notes]
        return ModelFiles(self.path, self.files, self.documents, self.tensors, {}, settings, (*self.notes, *notes))

    def document(self, name: str, fix: str) -> dict[str, Any]:
        """Read a JSON object once. The hash is taken of the same bytes."""
        path = self.path / name
        try:
            document = read_document(path, MAX_DOCUMENT_BYTES, fix)
        except FileNotFoundError as error:
            raise InputFileError(f"{path}: cannot open: {error.strerror}", fix) from error
        try:
            found = json.loads(document.data, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise InputFileError(f"{path}: not valid JSON: {printable(str(error))[:200]}", _AGAIN) from error
        if not isinstance(found, dict):
            raise InputFileError(f"{path}: expected a JSON object, found {type(found).__name__}", _AGAIN)
        self.documents[name] = document
        return found

    def component(self, component: str, below: str) -> None:
        """Open a network's weights: one file, or the shards listed in an index."""
        folder = self.path / below
        try:
            present = {entry.name for entry in folder.iterdir()}
        except OSError as error:
            raise InputFileError(
                f"{folder}: cannot open: {error.strerror}", f"The pipeline has no {component}; {_AGAIN.lower()}"
            ) from error
        network = next(known.network for known in ALL if known.name == component)
        choices = [name for stem in _STEMS.get(network, ("diffusion_pytorch_model",)) for name in _preferred(stem)]
        choices.sort(key=lambda name: (".fp16." in name, ".bin" in name))
        name = next((name for name in choices if name in present), None)
        if name is None:
            raise InputFileError(
                f"{folder}: no weights, expected one of {', '.join(choices[:4])}{nearest(choices[0], present)}", _AGAIN
            )
        if ".fp16." in name:
            self.notes.append(f"{self.path.name}: {below}{name} is the fp16 variant; there is no other")
        if not name.endswith(".json"):
            self._add(component, below + name, None)
            return
        weight_map = self.document(below + name, _AGAIN).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(shard, str) for shard in weight_map.values())
        ):
            raise InputFileError(f"{folder / name}: weight_map: expected names of tensors and of their files", _AGAIN)
        for shard in sorted(set(weight_map.values())):
            if shard in ("", ".", "..") or "/" in shard or "\\" in shard or "\0" in shard:
                raise UnsafeError(
                    f"{folder / name}: {printable(shard)[:200]}: a shard outside its folder",
                    "Get the folder from its source again.",
                )
            if shard not in present:
                raise InputFileError(
                    f"{folder / name}: names the shard {printable(shard)[:200]}, which is not there", _AGAIN
                )
        for shard in sorted(set(weight_map.values())):
            self._add(component, below + shard, [tensor for tensor, where in weight_map.items() if where == shard])

    def _add(self, component: str, name: str, expected: Sequence[str] | None) -> None:
        file = open_tensor_file(self.path / name)
        self.opened.callback(file.close)
        if expected is not None and set(expected) != file.entries.keys():
            odd = sorted(set(expected) ^ file.entries.keys())[0]
            raise InputFileError(
                f"{self.path / name}: {printable(odd)}: in the index or in the shard, but not in both", _AGAIN
            )
        self.files[name] = file
        self.tensors |= {f"{component}.{tensor}": Stored(file, entry) for tensor, entry in file.entries.items()}


def _preferred(stem: str) -> tuple[str, ...]:
    """Names of weight files and of shard indices that diffusers and transformers save."""
    return tuple(
        f"{stem}{name}"
        for kind in ("safetensors", "bin")
        for name in (
            f".{kind}",
            f".{kind}.index.json",
            f".fp16.{kind}",
            f".{kind}.index.fp16.json",
            f".fp16.{kind}.index.json",
        )
    )
