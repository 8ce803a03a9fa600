"""The traces that come with sdrt: skeletons of the graphs of published models, so that their checkpoints are built
without torch.

`data/traces/index.json` lists them. Each lies beside it in a packed file. `python -m sdrt.export.make_traces` makes
them. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sdrt.bundle.graphs import STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from sdrt.errors import MachineError
from sdrt.machine.packages import install_command

log = logging.getLogger("sdrt")
FOLDER = Path(__file__).parent / "data" / "traces"
INDEX = "index.json"
_AGAIN = "Install sdrt again."
_PACKAGE = Path(__file__).parents[1]
_SOURCES = {
    TEXT_ENCODER: ("export/networks/clip.py", "export/networks/attention.py"),
    STEP: ("export/networks/step.py", "export/networks/unet.py", "export/networks/attention.py"),
    VAE_DECODER: ("export/networks/vae.py", "export/networks/attention.py"),
    VAE_ENCODER: ("export/networks/vae.py", "export/networks/attention.py"),
}
_SOURCES_OF_ALL = ("export/trace.py", "export/precision.py")
"""What shapes a trace besides `Recipe.key`. An edit to any of these files makes the graph be traced again."""


@cache
def source_hashes(graph: str) -> dict[str, str]:
    """SHA-256 of every source that shapes a graph's traces, by its path in the package."""
    return {
        name: hashlib.sha256((_PACKAGE / name).read_bytes()).hexdigest()
        for name in (*_SOURCES[graph], *_SOURCES_OF_ALL)
    }


def packed(skeletons: Mapping[str, bytes]) -> bytes:
    """Skeletons by the type they compute in, as the bytes of one file."""
    sizes = json.dumps({compute: len(data) for compute, data in skeletons.items()}).encode()
    return lzma.compress(b"\n".join([sizes, b"".join(skeletons.values())]), preset=9 | lzma.PRESET_EXTREME)


def unpacked(data: bytes) -> dict[str, bytes]:
    """The skeletons of a packed file."""
    sizes, _, rest = lzma.decompress(data).partition(b"\n")
    found, start = {}, 0
    for compute, size in json.loads(sizes).items():
        found[compute] = rest[start : start + size]
        start += size
    return found


@cache
def index() -> list[dict[str, Any]]:
    """What `index.json` says of each trace: its `name`, which is its file's; `key`, as `Recipe.key` has it; `sources`,
    the hashes of what it was traced from; the `sha256` of its file; and `errors`, how far each of its graphs was from
    the network on random weights.

    Raises:
        MachineError: the file is damaged.
    """
    try:
        entries: list[dict[str, Any]] = json.loads((FOLDER / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise MachineError(f"{FOLDER / INDEX}: not the index that sdrt came with: {error}", _AGAIN) from error
    return entries


def shipped(key: Mapping[str, Any]) -> dict[str, bytes] | None:
    """The skeletons that come with sdrt for a recipe's key. None if there are none, or if the network's source was
    edited since.

    Raises:
        MachineError: the file is not the one that sdrt came with.
    """
    entry = _entry(json.dumps(key))
    if entry is None:
        return None
    if entry["sources"] != source_hashes(entry["key"]["graph"]):
        log.info("trace %s: made from other sources than these, so it is not used", entry["name"])
        return None
    return _read(entry["name"], entry["sha256"])


@cache
def _entry(key: str) -> dict[str, Any] | None:
    wanted = json.loads(key)
    return next((entry for entry in index() if entry["key"] == wanted), None)


@cache
def _read(name: str, sha256: str) -> dict[str, bytes]:
    path = FOLDER / f"{name}.xz"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}", _AGAIN) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise MachineError(f"{path}: not the trace that sdrt came with: its SHA-256 differs", _AGAIN)
    return unpacked(data)


class NoTraceError(MachineError):
    """A graph has to be traced, and torch, which traces, is not installed."""


def no_trace(key: Mapping[str, Any]) -> NoTraceError:
    """Why a graph cannot be made without torch: what no published model has."""
    same = [entry for entry in index() if entry["key"]["graph"] == key["graph"]]
    differences = [(_differences(key["specs"], entry["key"]["specs"]), entry["name"]) for entry in same]
    fix = f"Tracing needs PyTorch. Install it with: {install_command('build')}"
    if not differences:
        return NoTraceError(f"{key['graph']}: no trace of it comes with sdrt", fix)
    (unusual, name) = min(differences, key=lambda found: len(found[0]))
    listed = "; ".join(unusual[:3]) or "its source or its inputs were changed"
    return NoTraceError(f"{key['graph']}: no trace of it comes with sdrt; beside {name}, the nearest: {listed}", fix)


def _differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    if len(found) != len(expected):
        return [f"{len(found)} networks, expected {len(expected)}"]
    return [
        f"{field} {json.dumps(mine[field])}, expected {json.dumps(other.get(field))}"
        for mine, other in zip(json.loads(json.dumps(found)), expected, strict=True)
        for field in mine
        if mine[field] != other.get(field)
    ]
