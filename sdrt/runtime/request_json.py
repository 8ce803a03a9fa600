"""Requests to and from JSON: what pictures say of themselves, and what other programs ask for. Pictures in a request
are the names of their files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sdrt.runtime.request import Request

IMAGES = ("init_image", "mask")
"""The settings that are pictures."""


def request_to_json(request: Request) -> dict[str, Any]:
    """The fields of a request. A picture is the path it was given as, None where it was given otherwise."""
    images = {name: str(given) if isinstance(given := getattr(request, name), (str, Path)) else None for name in IMAGES}
    document: dict[str, Any] = _as_json(asdict(replace(request, init_image=None, mask=None)) | images)
    return document


def settings_from_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Request` that a JSON object holds, with their types checked, not their ranges. What it lacks keeps
    its default; the rest is left.

    Raises:
        ValueError: a field is of another type; it names the field.
    """
    hints = _hints()
    settings: dict[str, Any] = {}
    for name in (f.name for f in fields(Request) if f.name in document):
        value = document[name]
        if not _is(hints[name], value):
            raise ValueError(f"{name}: of an unexpected type, {type(value).__name__}")
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(Request, localns={"ImageInput": str})


def _is(kind: Any, value: object) -> bool:
    """Whether a value, as JSON gives it, is of a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_is(each, value) for each in arguments)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_is, arguments, value))
    if origin is Sequence:
        return isinstance(value, list) and all(_is(arguments[0], each) for each in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (NoneType if kind is None else kind)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(each) for key, each in value.items()}
    return [_as_json(each) for each in value] if isinstance(value, (list, tuple)) else value
