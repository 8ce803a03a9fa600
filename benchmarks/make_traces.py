"""Make the traces that come with sdrt: one of each graph of every published model (`architectures.py`).

Each is traced, bound to random weights, and compared with its network through PyTorch, in float32 and in float16. What
is up to date is left alone. The traces and their index lie in sdrt/export/data/traces. Takes half an hour, 6 GB of
memory and 6 GB of disk when all are made.
Usage: python benchmarks/make_traces.py [--only PART_OF_A_NAME] [--again]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from architectures import traced

from sdrt.bundle.manifest import WEIGHTS
from sdrt.bundle.onnx_graph import read_graph
from sdrt.export import traces
from sdrt.export.graph import Recipe, bind
from sdrt.export.read.tensor_file import open_tensor_file
from sdrt.export.selfcheck import check
from sdrt.export.trace import module, trace, weight_shapes
from sdrt.export.weights import Placed, layout

CHECKED = ("fp32", "fp16")
"""What ONNX Runtime's CPU provider can run."""


def random_weights(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Placed]:
    """Write float16 weights that keep activations near unit size, biases and norms included. All come from one pool of
    numbers, each from another place of it.
    """
    pool = np.random.RandomState(0).standard_normal(1 << 24).astype(np.float32)
    header, placed = layout(shapes, "fp16")
    with path.open("wb") as stream:
        stream.write(header)
        for name, place in placed.items():
            size = place.size_bytes // 2
            values = np.resize(np.roll(pool, zlib.crc32(name.encode())), size)
            if len(place.shape) == 1:
                values = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
            else:
                values *= 0.02 if "embedding" in name else (size / place.shape[0]) ** -0.5
            stream.write(values.astype(np.float16).tobytes())
    return placed


def errors(recipe: Recipe, skeletons: Mapping[str, bytes]) -> dict[str, float]:
    """How far each graph is from the network on random weights."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / Path(WEIGHTS).name
        placed = random_weights(weights, weight_shapes(module(recipe)))
        paths = {compute: Path(folder) / f"{compute}.onnx" for compute in CHECKED}
        for compute, path in paths.items():
            bind(read_graph(skeletons[compute]), weights, placed, "fp16", path)
        with open_tensor_file(weights) as file:
            found = check(recipe, skeletons, file, paths, Path(folder) / "reference.npz", full=True)
    return {compute: float(f"{error:.1e}") for compute, error in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only the traces whose names have this in them")
    parser.add_argument("--again", action="store_true", help="also those that are up to date")
    arguments = parser.parse_args()
    traces.FOLDER.mkdir(exist_ok=True)
    wanted = dict(traced())
    kept = {entry["name"]: entry for entry in traces.index() if entry["name"] in wanted}
    for name, recipe in wanted.items():
        key = json.loads(json.dumps(recipe.key()))
        sources = traces.source_hashes(recipe.graph)
        entry, path = kept.get(name), traces.FOLDER / f"{name}.xz"
        fresh = entry is not None and entry["key"] == key and entry["sources"] == sources and path.exists()
        if arguments.only not in name or (fresh and not arguments.again):
            continue
        started = time.perf_counter()
        skeletons = trace(recipe)
        data = traces.packed(skeletons)
        same = entry is not None and entry["key"] == key and entry["sha256"] == hashlib.sha256(data).hexdigest()
        kept[name] = {
            "name": name,
            "key": key,
            "sources": sources,
            "sha256": hashlib.sha256(data).hexdigest(),
            "errors": errors(recipe, skeletons),
        }
        path.write_bytes(data)
        _write_index([kept[name] for name in wanted if name in kept])
        print(
            f"{name}: {len(data):,} bytes, {'as before' if same else 'new'}, errors {kept[name]['errors']},"
            f" {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    for path in traces.FOLDER.glob("*.xz"):
        if path.stem not in kept:
            path.unlink()


def _write_index(entries: list[dict[str, object]]) -> None:
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (traces.FOLDER / traces.INDEX).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
