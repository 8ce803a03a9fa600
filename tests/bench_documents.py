"""Benchmark answers and documents made from chosen costs and seeds, for tests that must not depend on a clock."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sdrt.bench.measure import Request
from sdrt.bench.operators import Operator
from sdrt.bench.result import Document, assemble

IDENTITY: dict[str, Any] = {
    "id": "0" * 32,
    "time": "2026-11-23T12:00:00+00:00",
    "tool": {"sdrt": "0.1.0", "git": "abc"},
    "bundle": {"name": "toy", "family": "sd1", "precision": "fp16", "weights": "a" * 64, "sha256": "b" * 64, "lora": []},
    "config": {
        "scenario": "single", "steps": 4, "cfg": 7.0, "sampler": "euler", "schedule": "discrete", "prompt": "a | b", "negative": "", "seed": 0, "batch": 1,
        "threads": None, "pictures": 5, "limit_s": 30.0, "warm_up_s": 30.0, "size": [64, 64], "processes": 5,
    },
    "env": {"python": "3.11.7", "os": "Linux", "machine": "x86_64", "cpu": "A <fast> CPU", "cores": 2, "affinity": 2, "gpu": None},
}  # fmt: skip
COUNTERS = {"decode_calls": 1, "jobs": 1, "text_encoder_calls": 1, "model_calls": 4, "bundle_bytes": 34_000_000}
ENGINE = {"backend": "onnxruntime", "version": "1.32.0", "device": "cpu", "compute": "fp32", "threads": None}
PARAMETERS = {"size": [64, 64], "sampler": "euler", "schedule": "discrete"}


def fidelity() -> dict[str, Any]:
    picture = {"seed": 0, "values": 12_288, "latents_sketch": [1.0, -2.0, 3.0], "pixels_sketch": [100.0, -50.0, 25.0]}
    return {"ok": True, "checks": [{"graph": "step", "output": "latents", "error": 1e-6, "limit": 1e-4}], "problems": [], "picture": picture}


def answer(random: np.random.Generator, *, slower: float = 0.0, noise: float = 0.01, fixed: float = 10.0, per_call: float = 20.0) -> dict[str, Any]:
    """What a process would answer whose pictures take fixed + calls x per_call ms, `slower` all over, at a level of its own."""
    level = (1 + slower) * float(np.exp(random.normal(0, noise)))

    def picture(calls: int) -> float:
        return (fixed + calls * per_call) * level * float(np.exp(random.normal(0, noise / 3)))

    calls = COUNTERS["model_calls"]
    totals = [picture(calls) for _ in range(5)]
    samples = {
        "total_ms": totals, "step_ms": [per_call * level * float(np.exp(random.normal(0, noise / 3))) for _ in range(5 * calls)],
        "load_ms": [500 * level], "cold_ms": [1500 * level], "peak_rss_bytes": [250e6],
    }  # fmt: skip
    points = [(calls, total) for total in totals] + [(n, picture(n)) for n in (1, 2) for _ in range(3)]
    return {
        "samples": samples, "counters": dict(COUNTERS), "engine": dict(ENGINE), "parameters": dict(PARAMETERS), "fit": points,
        "warm_up": {"pictures": 9, "seconds": 1.0, "stable": True}, "warnings": [], "fidelity": fidelity(),
    }  # fmt: skip


def document(seed: int = 0, processes: int = 5, **costs: float) -> Document:
    random = np.random.default_rng(seed)
    return assemble([answer(random, **costs) for _ in range(processes)], copy.deepcopy(IDENTITY), [])


def synthetic_measure(seed: int, slower: Mapping[str, float], noise: float = 0.01) -> Callable[[Request], Mapping[str, Any]]:
    """A stand-in for a measuring process: each bundle, by the end of its path, has its known slowdown."""
    random = np.random.default_rng(seed)

    def measure(request: Request) -> Mapping[str, Any]:
        return answer(random, slower=next(value for end, value in slower.items() if request.bundle.endswith(end)), noise=noise)

    return measure


def synthetic_pairs(
    seed: int, slower: Mapping[str, float], noise: float = 0.01
) -> Callable[[Request, Request, int], tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The same for pairs of processes."""
    measure = synthetic_measure(seed, slower, noise)
    return lambda old, new, _: (measure(old), measure(new))


def _event(op: str, name: str, dur: int, inputs: list[list[int]], output: list[int], **sizes: int) -> dict[str, Any]:
    arguments = {"op_name": op, "node_index": name, "input_type_shape": [{"float": shape} for shape in inputs], "output_type_shape": [{"float": output}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": arguments | {size: str(value) for size, value in sizes.items()}}


ORT_EVENTS = [
    {"cat": "Session", "name": "model_run", "dur": 9, "args": {}},
    *(_event("Conv", "conv", dur, [[2, 4, 8, 8], [64, 4, 3, 3], [64]], [2, 64, 8, 8], activation_size=2048, parameter_size=9472, output_size=32768) for dur in (500, 40, 60)),
    *(_event("MatMul", "mm", dur, [[2, 77, 64]], [2, 77, 128], activation_size=39424, output_size=78848) for dur in (90, 10, 10)),
    *(_event("Add", "add", dur, [[2, 64, 8, 8], [64]], [2, 64, 8, 8], activation_size=33024, output_size=32768) for dur in (9, 2, 4)),
]  # fmt: skip
"""Events of three runs of three operators, the first of each to warm up."""
ORT_OPERATORS = [
    Operator("conv", "Conv", 0.05, 589_824, 589_824, 44_288, "2x64x8x8"),
    Operator("mm", "MatMul", 0.01, 2_523_136, 2_523_136, 151_040, "2x77x128"),
    Operator("add", "Add", 0.003, 8_192, 0, 65_792, "2x64x8x8"),
]
"""The same operators, by hand."""
