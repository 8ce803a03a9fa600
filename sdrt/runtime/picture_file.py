"""A finished picture as a PNG, JPEG or WebP that says how it was made: AUTOMATIC1111's text, which other tools read, and all of it as JSON.

A PNG holds the text in its chunk `parameters` and the JSON in the chunk `sdrt`; the others hold them as EXIF, in UserComment and MakerNote. The
JSON is what `request_of` reads back, so that a picture can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

from sdrt.bundle import Manifest, bundle_id, file_record
from sdrt.document import read_document
from sdrt.errors import InputFileError, UsageError, one_of, printable
from sdrt.publish import staged_file, write_file
from sdrt.runtime.engine import Pixels
from sdrt.runtime.images import MAX_FILE_BYTES
from sdrt.runtime.request import Request
from sdrt.runtime.samplers import SAMPLERS

PICTURE_FORMATS = ("png", "jpeg", "webp")
JSON_CHUNK, TEXT_CHUNK = "sdrt", "parameters"
CONTACT_SHEET = "contact sheet"
"""What a contact sheet says in place of settings."""
QUALITY = 90
_MAX_CHUNK = 1 << 20
_SCHEDULES = {"sgm_uniform": "SGM Uniform", "ddim_uniform": "DDIM"}
"""AUTOMATIC1111's labels where they are not the name with a capital."""
_EXIF, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_UNICODE, _OURS = b"UNICODE\0", b"sdrt\0"
"""What the two EXIF values begin with: EXIF's own code for UTF-16, and who wrote the note."""


def encode(image: Pixels, parameters: Mapping[str, Any], format: str = "png", *, quality: int = QUALITY) -> bytes:
    """One picture as the bytes of a file that says how it was made.

    Args:
        image: uint8 `[H, W, 3]`.
        parameters: those of a result, with the picture's own `seed`, and its `engine`.
        format: png, jpeg or webp.
        quality: 1 to 100, for jpeg and webp; webp loses nothing at 100.

    Raises:
        UsageError: an unknown format, a quality out of range, or more text than JPEG holds.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    one_of("format", format, PICTURE_FORMATS)
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise UsageError(f"quality {quality!r}: expected a whole number from 1 to 100")
    text, everything = automatic1111_text(parameters), json.dumps(dict(parameters), ensure_ascii=False)
    stream = BytesIO()
    picture = Image.fromarray(image)
    if format == "png":
        info = PngInfo()
        info.add_text(TEXT_CHUNK, text)
        info.add_itxt(JSON_CHUNK, everything)
        picture.save(stream, "PNG", pnginfo=info)
        return stream.getvalue()
    exif = Image.Exif()
    exif.get_ifd(_EXIF).update({_USER_COMMENT: _UNICODE + text.encode("utf-16-be"), _MAKER_NOTE: _OURS + everything.encode()})
    if format == "webp":
        picture.save(stream, "WEBP", quality=quality, lossless=quality == 100, exif=exif)
        return stream.getvalue()
    try:
        picture.save(stream, "JPEG", quality=quality, exif=exif)
    except ValueError as error:  # one segment holds all of it, 65,533 bytes
        raise UsageError("format 'jpeg': the prompt and settings are longer than a JPEG's EXIF holds", "Choose png or webp.") from error
    return stream.getvalue()


def save_picture(path: Path, data: bytes) -> None:
    """Write the bytes of a picture to a file, whole or not at all.

    Raises:
        ResourceError: the disk is full.
        UsageError: the folder cannot be written.
    """
    with staged_file(path) as stage:
        write_file(stage, data)


def automatic1111_text(parameters: Mapping[str, Any]) -> str:
    """The settings as AUTOMATIC1111 writes them under its pictures: prompt, negative prompt, and a line of `Name: value` pairs.

    What was fused is named as its prompts and pairs do: LoRAs and hypernetworks as tags after the prompt, with the hashes of their files.
    """
    width, height = parameters["size"]
    sources = parameters.get("sources", [])
    of_kind = {kind: [source for source in sources if source["kind"] == kind] for kind in ("checkpoint", "vae", "lora", "embedding", "hypernetwork")}
    pairs: dict[str, Any] = {
        "Steps": parameters["steps"],
        "Sampler": SAMPLERS[parameters["sampler"]].label,
        "Schedule type": _SCHEDULES.get(parameters["schedule"], parameters["schedule"].capitalize()),
        "CFG scale": f"{parameters['cfg']:g}",
        "Seed": parameters["seed"],
        "Size": f"{width}x{height}",
    }
    for source in of_kind["checkpoint"][:1]:
        pairs |= {"Model hash": source["sha256"][:10], "Model": Path(source["name"]).stem}
    for source in of_kind["vae"][:1]:
        pairs |= {"VAE hash": source["sha256"][:10], "VAE": source["name"]}
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
    for name, kind in (("Lora hashes", "lora"), ("TI hashes", "embedding"), ("Hypernet hashes", "hypernetwork")):
        if hashes := ", ".join(f"{source.get('trigger') or Path(source['name']).stem}: {source['sha256'][:12]}" for source in of_kind[kind]):
            pairs[name] = hashes
    pairs["Version"] = f"sdrt {parameters['sdrt']}"
    lines = [" ".join([parameters["prompt"], *map(_tag, of_kind["lora"] + of_kind["hypernetwork"])])]
    if parameters["negative"]:
        lines.append(f"Negative prompt: {parameters['negative']}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items())])


def _tag(source: Mapping[str, Any]) -> str:
    """An adapter at its strength as a prompt of AUTOMATIC1111's loads it; a LoRA's text encoder comes first there."""
    name, scale, text_scale = Path(source["name"]).stem, source["scale"], source.get("te_scale")
    kind = "lora" if source["kind"] == "lora" else "hypernet"
    both = f"{scale:g}" if text_scale in (None, scale) else f"{text_scale:g}:{scale:g}"
    return f"<{kind}:{name}:{both}>"


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
    """What `encode` wrote into a PNG, as it was.

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
