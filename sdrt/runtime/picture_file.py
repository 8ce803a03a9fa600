"""A finished picture as a PNG that says how it was made: AUTOMATIC1111's `parameters` text, which other tools read, and all of it as JSON.

The JSON (in the text chunk `sdrt`) is what `request_of` reads back, so that a picture can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

from sdrt.bundle.folder import bundle_id, file_record
from sdrt.bundle.manifest import Manifest
from sdrt.document import read_document
from sdrt.errors import InputFileError, UsageError, printable
from sdrt.publish import new_file, staged_file
from sdrt.runtime.engine import Pixels
from sdrt.runtime.images import MAX_FILE_BYTES
from sdrt.runtime.request import Request
from sdrt.runtime.samplers import SAMPLERS

JSON_CHUNK, TEXT_CHUNK = "sdrt", "parameters"
CONTACT_SHEET = "contact sheet"
"""What a contact sheet says in place of settings."""
_MAX_CHUNK = 1 << 20
_SCHEDULES = {"sgm_uniform": "SGM Uniform", "ddim_uniform": "DDIM"}
"""AUTOMATIC1111's labels where they are not the name with a capital."""


def save_png(path: Path, image: Pixels, parameters: Mapping[str, Any], manifest: Manifest) -> None:
    """Write one picture, uint8 `[H, W, 3]`, with what `parameters` (a result's, with `seed` the picture's own and `engine`) say of it.

    Raises:
        ResourceError: the disk is full.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(TEXT_CHUNK, automatic1111_text(parameters, manifest))
    info.add_itxt(JSON_CHUNK, json.dumps(dict(parameters), ensure_ascii=False))
    with staged_file(path) as stage, new_file(stage) as stream:
        Image.fromarray(image).save(stream, "PNG", pnginfo=info)


def automatic1111_text(parameters: Mapping[str, Any], manifest: Manifest) -> str:
    """The settings as AUTOMATIC1111 writes them under its pictures: prompt, negative prompt, and a line of `Name: value` pairs."""
    width, height = parameters["size"]
    checkpoint = next((source for source in manifest.sources if source.kind == "checkpoint"), None)
    pairs: dict[str, Any] = {
        "Steps": parameters["steps"],
        "Sampler": SAMPLERS[parameters["sampler"]].label,
        "Schedule type": _SCHEDULES.get(parameters["schedule"], parameters["schedule"].capitalize()),
        "CFG scale": f"{parameters['cfg']:g}",
        "Seed": parameters["seed"],
        "Size": f"{width}x{height}",
    }
    if checkpoint is not None:
        pairs |= {"Model hash": checkpoint.sha256[:10], "Model": Path(checkpoint.name).stem}
    if parameters["strength"] is not None:
        pairs["Denoising strength"] = f"{parameters['strength']:g}"
    if parameters["clip_skip"] != 1:
        pairs["Clip skip"] = parameters["clip_skip"]
    if parameters["mask"] is not None and parameters["mask_blur"]:
        pairs["Mask blur"] = parameters["mask_blur"]
    if parameters["noise"] == "cpu":
        pairs["RNG"] = "CPU"
    elif parameters["noise"] == "nv":
        pairs["RNG"] = "NV"
    if parameters["emphasis"] != "original":
        pairs["Emphasis"] = parameters["emphasis"].capitalize()
    adapters = [source for source in manifest.sources if source.kind in ("lora", "embedding", "hypernetwork")]
    if hashes := ", ".join(f"{Path(source.name).stem}: {source.sha256[:12]}" for source in adapters if source.kind == "lora"):
        pairs["Lora hashes"] = hashes
    pairs["Version"] = f"sdrt {parameters['sdrt']}"
    lines = [parameters["prompt"]]
    if parameters["negative"]:
        lines.append(f"Negative prompt: {parameters['negative']}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items())])


def _quoted(value: str) -> str:
    """As AUTOMATIC1111 quotes a value that would end its pair."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def request_of(path: Path, manifest: Manifest, parameters: Mapping[str, Any]) -> Request:
    """The request that made a picture of ours, for this bundle. `parameters` are what `read_parameters` found in it.

    Raises:
        InputFileError: its settings are not of the expected form, or what it was made from is gone.
        UsageError: another bundle made it; the message says what differs.
    """
    if parameters.get("bundle_id") != bundle_id(manifest):
        raise UsageError(
            f"{path}: made by bundle {printable(str(parameters.get('bundle')))} ({printable(str(parameters.get('bundle_id')))}), "
            f"this one is {manifest.name} ({bundle_id(manifest)})",
            "Name the bundle that made it, or give the prompt and settings yourself.",
        )
    known = {f.name for f in fields(Request)}
    values = {name: value for name, value in parameters.items() if name in known}
    damaged = InputFileError(f"{path}: its settings are not of the expected form", "Another version of sdrt wrote it; give the settings yourself.")
    if known - values.keys():
        raise damaged
    size = values["size"]
    if not isinstance(size, list) or not all(type(value) in (str, int, float, type(None)) for name, value in values.items() if name != "size"):
        raise damaged
    if not all(isinstance(values[name], str) for name in ("prompt", "negative", "sampler", "schedule", "compat", "resize", "emphasis")):
        raise damaged
    for name in ("init_image", "mask"):
        _check_unchanged(path, values[name], parameters.get(f"{name}_sha256"))
    return Request(**values | {"size": tuple(size), "count": 1, "batch": 1})


def _check_unchanged(path: Path, image: str | None, sha256: object) -> None:
    if image is None:
        return
    try:
        if not Path(image).is_file():  # the name is the picture's own: it may be that of a pipe, or of a device without an end
            raise FileNotFoundError(image)
        found = file_record(Path(image)).sha256
    except (OSError, ValueError) as error:
        raise InputFileError(f"{path}: made from {printable(image)}, which cannot be read", "Put it there again, or give another with --init-image.") from error
    if found != sha256:
        raise UsageError(f"{path}: made from {printable(image)}, which has changed since", "Put the old one there again, or give the settings yourself.")


def read_parameters(path: Path) -> dict[str, Any]:
    """What `save_png` wrote, as it was.

    Raises:
        InputFileError: there is no such file, or it is no picture that sdrt wrote.
    """
    from PIL import Image

    fix = "Give a PNG written by sdrt generate."
    try:
        with Image.open(BytesIO(read_document(path, MAX_FILE_BYTES, fix).data), formats=["PNG"]) as image:
            text = image.info.get(JSON_CHUNK)
    except FileNotFoundError as error:
        raise InputFileError(f"{path}: no such file", fix) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputFileError(f"{path}: cannot be read as a PNG: {printable(str(error))}", fix) from error
    if not isinstance(text, str):
        raise InputFileError(f"{path}: does not say how it was made", fix)
    if text == CONTACT_SHEET:
        raise InputFileError(f"{path}: a contact sheet, expected a picture", "Give the picture that generate wrote beside it.")
    try:
        parameters = json.loads(text[:_MAX_CHUNK])
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: its settings are damaged: {printable(str(error))}", fix) from error
    if not isinstance(parameters, dict):
        raise InputFileError(f"{path}: its settings are damaged", fix)
    return parameters
