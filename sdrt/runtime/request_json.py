"""Requests to and from JSON, for what pictures say about themselves and for what other programs ask. A picture in a
request is the name of its file.
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
"""The settings whose values are pictures."""


def request_to_json(request: Request) -> dict[str, Any]:
    """The fields of a request. A picture becomes the path it was given as, or None if it was not given as a path."""
    images = {name: str(given) if isinstance(given := getattr(request, name), (str, Path)) else None for name in IMAGES}
    document: dict[str, Any] = _as_json(asdict(replace(request, init_image=None, mask=None)) | images)
    return document


def settings_from_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Request` in a JSON object. Their types are checked, their ranges are not. Missing fields keep
    their defaults; unknown names are ignored.

    Raises:
        ValueError: a field has another type; the message names the field.
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
    """Whether a value from JSON is of a type."""
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
