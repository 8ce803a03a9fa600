"""The text that AUTOMATIC1111 writes under its pictures, written and read: prompt, negative prompt, and a line of
`Name: value` pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.runtime.prompts.syntax import NETWORKS, network_name, network_tag, without_networks
from sdrt.runtime.sampling.registry import SAMPLERS

_SCHEDULES = {"sgm_uniform": "SGM Uniform", "ddim_uniform": "DDIM"}
"""AUTOMATIC1111's labels, where a label is not just the name with a capital."""
_NEGATIVE = "Negative prompt:"
_PAIR = re.compile(r'\s*(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST_PAIRS = 3
"""A last line with fewer pairs belongs to the prompt."""


def infotext(parameters: Mapping[str, Any]) -> str:
    """The settings as AUTOMATIC1111 writes them under its pictures: prompt, negative prompt, and a line of `Name:
    value` pairs.

    Fused adapters appear as AUTOMATIC1111 names them: LoRAs and hypernetworks as tags after the prompt, with the hashes
    of their files among the pairs.
    """
    width, height = parameters["size"]
    sources = parameters.get("sources", [])
    of_kind = {
        kind: [source for source in sources if source["kind"] == kind]
        for kind in ("checkpoint", "vae", "lora", "embedding", "hypernetwork")
    }
    pairs: dict[str, Any] = {
        "Steps": parameters["steps"],
        "Sampler": SAMPLERS[parameters["sampler"]].label,
        **_levels(parameters),
        "CFG scale": f"{parameters['cfg']:g}",
        **({"Image CFG scale": f"{parameters['image_cfg']:g}"} if parameters.get("image_cfg") is not None else {}),
        "Seed": parameters["seed"],
        "Size": f"{width}x{height}",
    }
    for source in of_kind["checkpoint"][:1]:
        pairs |= {"Model hash": source["sha256"][:10], "Model": Path(source["name"]).stem}
    for source in of_kind["vae"][:1]:
        pairs |= {"VAE hash": source["sha256"][:10], "VAE": source["name"]}
    if parameters["strength"] is not None:
        pairs["Denoising strength"] = f"{parameters['strength']:g}"
    if parameters.get("cfg_rescale"):
        pairs["CFG Rescale"] = f"{parameters['cfg_rescale']:g}"
    if parameters["clip_skip"] != 1:
        pairs["Clip skip"] = parameters["clip_skip"]
    if (parameters["mask"] is not None or parameters.get("mask_sha256") is not None) and parameters["mask_blur"]:
        pairs["Mask blur"] = parameters["mask_blur"]
    if parameters["noise"] == "cpu":
        pairs["RNG"] = "CPU"
    elif parameters["noise"] == "nv":
        pairs["RNG"] = "NV"
    if parameters["emphasis"] != "original":
        pairs["Emphasis"] = parameters["emphasis"].capitalize()
    for name, kind in (("Lora hashes", "lora"), ("TI hashes", "embedding"), ("Hypernet hashes", "hypernetwork")):
        if hashes := ", ".join(
            f"{source.get('trigger') or network_name(source['name'])}: {source['sha256'][:12]}"
            for source in of_kind[kind]
        ):
            pairs[name] = hashes
    pairs["Version"] = f"sdrt {parameters['sdrt']}"
    said = without_networks(parameters["prompt"], lambda kind, tag: kind not in NETWORKS)
    tags = [
        network_tag(source["kind"], source["name"], source["scale"], source.get("te_scale"))
        for source in of_kind["lora"] + of_kind["hypernetwork"]
    ]
    lines = [" ".join([said.rstrip(), *tags]) if tags else said]
    if parameters["negative"]:
        lines.append(f"{_NEGATIVE} {parameters['negative']}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items())])


def _levels(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The schedule, or the list that took its place."""
    for field, name in (("timesteps", "Timesteps"), ("sigmas", "Sigmas")):
        if (numbers := parameters.get(field)) is not None:
            return {name: ", ".join(map(repr, numbers))}
    return {"Schedule type": _SCHEDULES.get(parameters["schedule"], parameters["schedule"].capitalize())}


def _quoted(value: str) -> str:
    """Quote a value that would end its pair, as AUTOMATIC1111 does."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


@dataclass(frozen=True)
class Infotext:
    """A text after reading. `pairs` are those of the last line, in their order."""

    prompt: str
    negative: str
    pairs: dict[str, str]


def parse_infotext(text: str) -> Infotext:
    """Read such a text. Every text can be read: without such a last line it is only a prompt."""
    lines = text.strip().split("\n")
    pairs = {match[1]: _unquoted(match[2]) for match in _PAIR.finditer(lines[-1])}
    if len(pairs) >= _FEWEST_PAIRS:
        lines.pop()
    else:
        pairs = {}
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).strip().removeprefix(_NEGATIVE).strip()
    return Infotext("\n".join(lines[:start]).strip(), negative, pairs)


def settings_of_infotext(read: Infotext) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of `Request` that a text gives, and the unused pairs: those of other settings, and those with
    unreadable values.
    """
    settings: dict[str, Any] = {"prompt": read.prompt, "negative": read.negative, "compat": "a1111"}
    rest: dict[str, str] = {}
    for name, value in read.pairs.items():
        try:
            field, of_text = _SETTINGS[name]
            settings[field] = of_text(value)
        except (KeyError, ValueError):
            rest[name] = value
    return settings, rest


def _unquoted(value: str) -> str:
    """A value without its quotes, if it has any."""
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _noise(text: str) -> str:
    return {"CPU": "cpu", "NV": "nv", "GPU": "nv"}[text]


_SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("steps", int),
    "Sampler": ("sampler", str),
    "Schedule type": ("schedule", str),
    "Timesteps": ("timesteps", _whole_numbers),
    "Sigmas": ("sigmas", _numbers),
    "CFG scale": ("cfg", float),
    "Image CFG scale": ("image_cfg", float),
    "CFG Rescale": ("cfg_rescale", float),
    "Seed": ("seed", int),
    "Size": ("size", _size),
    "Denoising strength": ("strength", float),
    "Clip skip": ("clip_skip", int),
    "Mask blur": ("mask_blur", int),
    "RNG": ("noise", _noise),
    "Emphasis": ("emphasis", str.lower),
}
"""The setting of each pair, and how to read its value."""
