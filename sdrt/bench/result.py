"""The result of a run, a JSON document of schema 1 (docs/bench-schema.json): how it is made, written and read back.

It always holds the raw samples, one list per process. Everything else can be computed from them again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from sdrt.bench.metrics import METRICS
from sdrt.bench.statistics import detectable, fit_cost, summarise, usable
from sdrt.errors import InputFileError, MachineError, printable
from sdrt.files.publish import staged_file, write_file
from sdrt.files.read import read_given

SCHEMA = 1
MAX_RESULT_BYTES = 256 << 20
_MAKE_ONE = "Make one with: sdrt bench run BUNDLE --output FILE.json"

Document = dict[str, Any]

_PARTS: Mapping[str, type] = {
    "id": str,
    "time": str,
    "tool": dict,
    "bundle": dict,
    "config": dict,
    "engine": dict,
    "env": dict,
    "samples": dict,
    "stats": dict,
    "counters": dict,
    "fidelity": dict,
    "warnings": list,
}

FIXED_BY_CALLER = (
    "scenario",
    "size",
    "batch",
    "steps",
    "sampler",
    "schedule",
    "cfg",
    "prompt",
    "prompts",
    "negative",
    "seed",
    "rate",
    "duration_s",
    "queue",
)
"""The fields of `config` that change what is measured. Numbers of pictures and processes only change how well."""
COMPARABLE: Mapping[str, tuple[str, ...]] = {
    "config": FIXED_BY_CALLER,
    "engine": ("backend", "device", "compute", "threads", "cuda_graphs"),
    "bundle": ("family",),
    "env": ("machine", "cpu", "cores", "affinity", "gpu", "gpu_driver"),
}
"""Fields that must be equal for two results to be compared."""


def assemble(children: Sequence[Mapping[str, Any]], identity: Mapping[str, Any], warnings: Sequence[str]) -> Document:
    """One document from the measurements of each process. `identity` holds id, time, tool, bundle, config and env."""
    notes = list(warnings)
    samples: dict[str, list[list[float]]] = {}
    for name in METRICS:
        per_process = [list(child["samples"].get(name, [])) for child in children]
        if any(per_process):
            samples[name] = per_process
    stats = {}
    for name, per_process in samples.items():
        dropped = sum(usable(values)[1] for values in per_process)
        if dropped:
            notes.append(f"{name}: {dropped} samples dropped: not a number, or negative because a clock went back")
        samples[name] = [usable(values)[0] for values in per_process]
        if any(samples[name]):
            stats[name] = asdict(summarise(samples[name]))
    samples = {name: values for name, values in samples.items() if any(values)}
    counters: dict[str, int] = {}
    for name in dict.fromkeys(name for child in children for name in child["counters"]):
        found = {child["counters"].get(name) for child in children}
        if len(found) == 1:
            counters[name] = children[0]["counters"][name]
        else:
            notes.append(f"counter {name}: differs between processes: {sorted(map(str, found))}; left out")
    notes += dict.fromkeys(note for child in children for note in child.get("warnings", []))
    fit = fit_cost([(calls, ms) for child in children for calls, ms in child.get("fit", [])])
    total = samples.get("total_ms", [])
    document: Document = {
        "schema": SCHEMA,
        **identity,
        "engine": dict(children[0]["engine"]),
        "samples": samples,
        "stats": stats,
        "counters": counters,
        "fit": asdict(fit) if fit is not None else None,
        "fidelity": merged_fidelity([child["fidelity"] for child in children]),
        "noise": {
            "metric": "total_ms",
            "detectable": detectable(total) if total else None,
            "warm_up": [child.get("warm_up") for child in children],
            "throttled_pictures": sum(child.get("machine", {}).get("dropped", 0) for child in children),
            "machine": [child.get("machine") for child in children],
        },
        "warnings": notes,
    }
    servers = [child["server"] for child in children if child.get("server")]
    if servers:
        document["server"] = {
            "offered_per_s": servers[0]["offered_per_s"],
            "attained_per_s": [server["attained_per_s"] for server in servers],
            **{name: sum(server[name] for server in servers) for name in ("arrivals", "completed", "rejected")},
        }
    plain: Document = json.loads(
        json.dumps(document, allow_nan=False)
    )  # turns tuples into lists, so that a new document equals one that was read back
    return plain


def merged_fidelity(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst of each check over all processes, and the first process's picture."""
    checks: dict[tuple[str, str], dict[str, Any]] = {}
    for part in parts:
        for check in part["checks"]:
            key = (check["graph"], check["output"])
            if key not in checks or not check["error"] <= checks[key]["error"]:
                checks[key] = dict(check)
    return {
        "ok": all(part["ok"] for part in parts),
        "checks": list(checks.values()),
        "problems": list(dict.fromkeys(problem for part in parts for problem in part["problems"])),
        "picture": parts[0].get("picture"),
    }


def ran(document: Mapping[str, Any]) -> str:
    """What ran, for every line of every output: `onnxruntime fp32 cpu, 512x512, batch 1, 20 steps of euler`."""
    engine, config = document["engine"], document["config"]
    width, height = config["size"]
    scenario = "" if config["scenario"] == "single" else f"{config['scenario']}, "
    what = " ".join(str(engine[part]) for part in ("backend", "compute", "device") if engine.get(part))
    return (
        f"{what}, {scenario}{width}x{height}, batch {config['batch']}, {config['steps']} steps of {config['sampler']}"
    )


def series(document: Mapping[str, Any]) -> str:
    """The name of a series of runs like this one: the bundle's label, and what ran."""
    bundle = document["bundle"]
    return f"{bundle.get('label') or bundle.get('name') or 'unnamed'}: {ran(document)}"


def series_key(document: Mapping[str, Any]) -> str:
    """A short hash of everything that must be equal for two results to belong to one series: the fields that make them
    comparable, and the label.
    """
    fields: dict[str, Any] = {
        part: {name: document[part].get(name) for name in names} for part, names in COMPARABLE.items()
    }
    fields["series"] = series(document)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document whole or not at all.

    Raises:
        ResourceError: the disk is full.
        UsageError: the folder is missing or not writable.
    """
    with staged_file(path) as stage:
        write_file(stage, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def read_result(path: Path) -> tuple[Document, str]:
    """A document written by `sdrt bench`, and the SHA-256 of its file. Fields that this version does not know are kept.

    Raises:
        InputFileError: there is no such file, or it is not a result of this schema.
        MachineError: a newer sdrt wrote it.
    """
    file = read_given(path, MAX_RESULT_BYTES, _MAKE_ONE)
    return parse_result(path, file.data), file.sha256


def parse_result(path: Path, data: bytes) -> Document:
    document = parse_json(path, data)
    check_schema(path, document)
    for part, kind in _PARTS.items():
        if not isinstance(document.get(part), kind):
            found = "nothing" if part not in document else type(document[part]).__name__
            raise InputFileError(f"{path}: {part}: expected {_WORDS[kind]}, found {found}", "Run the benchmark again.")
    for name in ("scenario", "size", "batch", "steps", "sampler"):
        if name not in document["config"]:
            raise InputFileError(f"{path}: config.{name}: missing", "Run the benchmark again.")
    if not isinstance(document["config"]["size"], list) or len(document["config"]["size"]) != 2:
        raise InputFileError(f"{path}: config.size: expected width and height", "Run the benchmark again.")
    for name, processes in document["samples"].items():
        if (
            not isinstance(processes, list)
            or not processes
            or not all(isinstance(values, list) and all(map(_is_number, values)) for values in processes)
        ):
            raise InputFileError(
                f"{path}: samples.{printable(name)}: expected a list of numbers per process", "Run the benchmark again."
            )
        if not any(value >= 0 for values in processes for value in values):
            raise InputFileError(f"{path}: samples.{printable(name)}: no sample in it", "Run the benchmark again.")
    for name, value in document["counters"].items():
        if type(value) is not int:
            raise InputFileError(
                f"{path}: counters.{printable(name)}: expected a whole number, found {value!r}",
                "Run the benchmark again.",
            )
    if not isinstance(document["fidelity"].get("ok"), bool):
        raise InputFileError(f"{path}: fidelity.ok: expected true or false", "Run the benchmark again.")
    picture = document["fidelity"].get("picture")
    if picture is not None and not (
        isinstance(picture, dict)
        and _is_number(picture.get("values"))
        and _is_sketch(picture.get("latents_sketch"))
        and _is_sketch(picture.get("pixels_sketch"))
    ):
        raise InputFileError(
            f"{path}: fidelity.picture: expected two sketches, lists of numbers", "Run the benchmark again."
        )
    if not isinstance(document["fidelity"].get("problems", []), list):
        raise InputFileError(f"{path}: fidelity.problems: expected a list", "Run the benchmark again.")
    for name, processes in document["samples"].items():  # so that a summary never differs from its samples
        summary = asdict(summarise(processes))
        document["stats"][name] = summary | {"ci95": list(summary["ci95"]) if summary["ci95"] else None}
    document["stats"] = {name: document["stats"][name] for name in document["samples"]}
    return document


_WORDS: Mapping[type, str] = {str: "text", dict: "an object", list: "a list"}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_sketch(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def parse_json(path: Path, data: bytes) -> Document:
    """Read a JSON object, in which NaN and infinity are not allowed.

    Raises:
        InputFileError: the data is something else.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number in JSON")

    try:
        document = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: not valid JSON: {printable(str(error))}", "Run the benchmark again.") from error
    if not isinstance(document, dict):
        raise InputFileError(
            f"{path}: expected a JSON object, found {type(document).__name__}", "Run the benchmark again."
        )
    return document


def check_schema(path: Path, document: Mapping[str, Any]) -> None:
    schema = document.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise MachineError(
            f"{path}: benchmark schema {schema}; this sdrt reads schema {SCHEMA}",
            "Upgrade sdrt, or run the benchmark again with this version.",
        )
    if type(schema) is not int or schema != SCHEMA:
        raise InputFileError(
            f"{path}: schema: expected {SCHEMA}, found {printable(repr(schema))}",
            "Run the benchmark again with this version of sdrt.",
        )
