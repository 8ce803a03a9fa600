"""Settings out of a picture. With its own bundle all of them are taken, to make the picture again. Another bundle takes
the settings it can use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PureWindowsPath
from typing import Any

from sdrt.bundle.folder import bundle_id
from sdrt.bundle.manifest import Manifest, Source
from sdrt.errors import InputFileError, UsageError, printable
from sdrt.files.read import read_document
from sdrt.runtime.pictures.file import CONTACT_SHEET, parameters_of, read_said
from sdrt.runtime.pictures.infotext import parse_infotext, settings_of_infotext
from sdrt.runtime.pictures.input import MAX_FILE_BYTES
from sdrt.runtime.prompts.conditioning import is_fused
from sdrt.runtime.prompts.syntax import network_name, without_networks
from sdrt.runtime.request import Request, resolved
from sdrt.runtime.request_json import IMAGES, settings_from_json

_OF_IMAGES = ("strength", "mask", "mask_blur", "resize")
"""Settings that mean nothing without an init image."""


@dataclass(frozen=True)
class Reused:
    """Fields of `Request` that a picture gives, and what could not be used, one line each."""

    settings: dict[str, Any]
    unused: tuple[str, ...]


def settings_to_repeat(
    path: Path, parameters: Mapping[str, Any], manifest: Manifest, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of `Request` that made a picture of ours, for this bundle. A field that the picture lacks keeps its
    default.

    `parameters` are what `parameters_of` found in the picture. `given` are the fields that the user chose instead. If
    the picture was made from an image, that image is looked for in the same folder, under its bare name, and must be
    unchanged: a picture comes from a stranger, so it may not name a file anywhere else.

    Raises:
        InputFileError: the settings do not have the expected form, or the image it was made from is not in the folder.
        UsageError: another bundle made the picture, and the message says what differs; or the image has changed.
    """
    if parameters.get("bundle_id") != bundle_id(manifest):
        raise UsageError(
            f"{path}: made by bundle {printable(str(parameters.get('bundle')))}"
            f" ({printable(str(parameters.get('bundle_id')))}), this one is {manifest.name} ({bundle_id(manifest)})",
            "Name the bundle that made it, or take what fits this one with --settings-from.",
        )
    settings = _typed(path, parameters)
    for name in IMAGES:
        option = f"--{name.replace('_', '-')}"
        sha256 = parameters.get(f"{name}_sha256")
        if name in given or (settings.get(name) is None and sha256 is None):
            continue
        if settings.get(name) is None:
            raise InputFileError(
                f"{path}: made from a picture that was no file (sha256 {printable(str(sha256))})",
                f"Give it, saved, with {option}.",
            )
        beside, problem = _beside(path, settings[name], sha256)
        if problem:
            kind = UsageError if "changed" in problem else InputFileError
            raise kind(
                f"{path}: made from {printable(settings[name])}, {problem}",
                f"Put it beside the picture, or name it with {option}.",
            )
        settings[name] = beside
    return _without_list(settings, given) | {"count": 1, "batch": 1} | dict(given)


def settings_to_reuse(path: Path, manifest: Manifest, given: Mapping[str, Any]) -> Reused:
    """The settings of any picture, of another bundle or of AUTOMATIC1111, as far as this bundle can use them. Fields in
    `given` replace them.

    Raises:
        InputFileError: it cannot be read as a picture, or does not say how it was made.
    """
    said = read_said(path)
    if said.ours not in (None, CONTACT_SHEET):
        parameters = parameters_of(path, said)
        settings, unused = _typed(path, parameters), _other_sources(parameters, manifest)
        settings |= {"count": 1, "batch": 1}
        for name in IMAGES:
            sha256 = parameters.get(f"{name}_sha256")
            if name not in given and (settings.get(name) is not None or sha256 is not None):
                beside, problem = (
                    _beside(path, settings[name], sha256)
                    if settings.get(name) is not None
                    else (None, "which was no file")
                )
                unused += [f"{name}: {printable(str(settings.get(name)))}, {problem}"] if problem else []
                settings[name] = beside
    elif said.text is not None:
        read = parse_infotext(said.text)
        settings, rest = settings_of_infotext(read)
        unused = _other_pairs(rest, manifest)
    else:
        raise InputFileError(
            f"{path}: does not say how it was made", "Give a picture written by sdrt generate or AUTOMATIC1111."
        )
    if "prompt" not in given and given.get("network_tags", settings.get("network_tags")) != "ignore":
        settings["prompt"] = _without_absent(settings.get("prompt", ""), manifest.sources, unused)
    return _usable(_without_list(settings, given), manifest, given, unused)


_LISTS = ("timesteps", "sigmas")
"""Settings that take the place of steps and schedule."""


def _without_list(settings: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture, without its list of levels where steps, a schedule or another list are given."""
    if given.keys().isdisjoint(("steps", "schedule", *_LISTS)):
        return settings
    return {name: value for name, value in settings.items() if name not in _LISTS}


def _usable(settings: dict[str, Any], manifest: Manifest, given: Mapping[str, Any], unused: list[str]) -> Reused:
    """Take the settings one after the other. A setting that the bundle refuses keeps its default."""
    taken = {"prompt": settings.get("prompt", "")} | dict(given)
    if taken.get("init_image", settings.get("init_image")) is None:
        unused += [
            f"{name}: {settings[name]}, without an init image"
            for name in ("strength", "mask")
            if settings.get(name) is not None and name not in given
        ]
        settings = {name: value for name, value in settings.items() if name not in _OF_IMAGES}
    # First come the settings that decide how others are read: the image, without which an edit model takes nothing and
    # to which strength and mask belong, and the tool.
    names = sorted(
        (name for name in settings if name not in taken),
        key=lambda name: (name != "init_image", name != "compat", _ORDER[name]),
    )
    for name in names:
        candidate = taken | {name: settings[name]}
        try:
            resolved(Request(**candidate), manifest)
        except UsageError as error:
            unused.append(error.message)
        else:
            taken = candidate
    return Reused(taken, tuple(unused))


_ORDER = {f.name: i for i, f in enumerate(fields(Request))}


def _typed(path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    try:
        settings = settings_from_json(parameters)
    except ValueError as error:
        raise InputFileError(
            f"{path}: its settings are not of the expected form: {error}", "Give the settings yourself."
        ) from error
    if "prompt" not in settings:
        raise InputFileError(
            f"{path}: its settings are not of the expected form: prompt: missing", "Give the settings yourself."
        )
    return settings


def _beside(path: Path, name: str, sha256: object) -> tuple[Path | None, str]:
    """The file of that name in the picture's own folder, or what is wrong with it. Links are not followed."""
    beside = path.parent / PureWindowsPath(name).name  # `name` may be a Windows or a POSIX path
    try:
        if beside.is_symlink():
            return None, "which is a link"
        found = hashlib.sha256(read_document(beside, MAX_FILE_BYTES).data).hexdigest()
    except (OSError, InputFileError, ValueError):
        return None, f"and no {printable(beside.name)} that can be read is beside it"
    return (beside, "") if found == sha256 else (None, "which has changed since")


def _other_sources(parameters: Mapping[str, Any], manifest: Manifest) -> list[str]:
    """What went into the picture's bundle but not into this one, or not at that strength."""
    listed = parameters.get("sources")
    if not isinstance(listed, list):
        other = parameters.get("bundle_id") != bundle_id(manifest)
        return [f"bundle: {printable(str(parameters.get('bundle')))}, this one is {manifest.name}"] if other else []
    ours = {(source.kind, source.sha256, source.scale, source.te_scale) for source in manifest.sources}
    lines = []
    for source in listed:
        if not isinstance(source, dict):
            continue
        kind, sha256, *scales = (source.get(name) for name in ("kind", "sha256", "scale", "te_scale"))
        if (kind, sha256, *scales) not in ours:
            strength = ":".join(f"{scale:g}" for scale in scales if isinstance(scale, (int, float)))
            lines.append(
                f"{printable(str(kind))}: {printable(str(source.get('name')))}{' at ' * bool(strength)}{strength}, not"
                " in this bundle"
            )
    return lines


def _other_pairs(pairs: Mapping[str, str], manifest: Manifest) -> list[str]:
    """The pairs of AUTOMATIC1111's text that no setting of ours takes, except those that this bundle fulfils anyway."""
    lines = []
    for name, value in pairs.items():
        kind = _HASHES.get(name)
        if name == "Version" or (name == "Model" and "Model hash" in pairs) or (name == "VAE" and "VAE hash" in pairs):
            continue
        if kind in ("checkpoint", "vae"):
            called = f"{value} {pairs.get(name.removesuffix(' hash'), '')}".strip()
            held = any(source.kind == kind and source.sha256.startswith(value.lower()) for source in manifest.sources)
            lines += [] if held else [f"{name}: {printable(called)}, not in this bundle"]
        elif kind is not None:
            absent = [
                each
                for each in value.split(",")
                if each.strip() and each.partition(":")[0].strip() not in _names(manifest.sources, kind)
            ]
            lines += [f"{name}: {printable(each.strip())}, not in this bundle" for each in absent]
        else:
            lines.append(f"{printable(name)}: {printable(value)}")
    return lines


_HASHES = {
    "Model hash": "checkpoint",
    "VAE hash": "vae",
    "Lora hashes": "lora",
    "TI hashes": "embedding",
    "Hypernet hashes": "hypernetwork",
}


def _names(sources: Iterable[Source], kind: str) -> set[str]:
    return {source.trigger or network_name(source.name) for source in sources if source.kind == kind}


def _without_absent(prompt: str, sources: Iterable[Source], unused: list[str]) -> str:
    """Remove the tags of adapters that the bundle does not hold at their strength, and list them in `unused`."""

    def keep(kind: str, tag: str) -> bool:
        if held := is_fused(tag, sources):
            return held
        unused.append(f"{printable(tag)}, not in this bundle at that strength")
        return False

    return without_networks(prompt, keep)
