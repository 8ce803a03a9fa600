"""Bundles whose graphs were exchanged, with a manifest that agrees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from sdrt.bundle.folder import file_record
from sdrt.bundle.graphs import STEP
from sdrt.bundle.manifest import MANIFEST


def with_graph(source: Path, to: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of a bundle whose step graph is changed, and whose manifest agrees."""
    shutil.copytree(source, to)
    manifest = json.loads((to / MANIFEST).read_text())
    path = manifest["graphs"][STEP]["fp32"]["path"]
    stored = onnx.load(str(to / path), load_external_data=False)
    change(stored)
    (to / path).write_bytes(stored.SerializeToString())
    found = file_record(to / path)
    manifest["files"][path] = {"size_bytes": found.size_bytes, "sha256": found.sha256}
    (to / MANIFEST).write_text(json.dumps(manifest))
    return to
