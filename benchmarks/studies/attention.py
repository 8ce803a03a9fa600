"""Every way that OpenVINO offers to run self-attention, timed beside the best matrix product of the machine.

The shapes are those of Stable Diffusion 1.5 with guidance: the largest at 768x768, then all at 512x512. A variant is a
graph of one attention, its inputs already split by nothing but a reshape, as the network has them, and a projection
after it. Its time is that of all operators but the projection.
Usage: python benchmarks/studies/attention.py [--precision bf16|f32] [--runs N] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sdrt.machine import engine_libraries

ov = engine_libraries.openvino()
SHAPES = ((9216, 8, 40), (4096, 8, 40), (1024, 8, 80), (256, 8, 160))
"""Tokens, heads and width of a head: the largest level of 768x768, and the levels of 512x512 that have attention over
more than 64 tokens.
"""
PICTURES = 2
op = ov.opset13


def whole(*values: int) -> Any:
    return op.constant(list(values), dtype="int64")


def fused(q: Any, k: Any, v: Any, scale: float) -> Any:
    return op.scaled_dot_product_attention(q, k, v, None, op.constant(np.float32(scale)), False)


def primitives(q: Any, k: Any, v: Any, scale: float) -> Any:
    return op.matmul(op.softmax(op.matmul(op.multiply(q, np.float32(scale)), k, False, True), -1), v, False, False)


def by_head(q: Any, k: Any, v: Any, scale: float) -> Any:
    heads = q.get_output_shape(0)[1]
    parts = [op.split(x, op.constant(np.int64(1)), heads) for x in (q, k, v)]
    return op.concat([fused(*(part.output(i) for part in parts), scale) for i in range(heads)], 1)


def by_rows(q: Any, k: Any, v: Any, scale: float, parts: int = 4) -> Any:
    rows = op.split(q, op.constant(np.int64(2)), parts)
    return op.concat([fused(rows.output(i), k, v, scale) for i in range(parts)], 2)


def padded(width: int) -> Callable[[Any, Any, Any, float], Any]:
    """Heads filled up with zeros to a multiple of `width`, where they are none."""

    def attend(q: Any, k: Any, v: Any, scale: float) -> Any:
        head = q.get_output_shape(0)[3]
        more = -head % width
        q, k, v = (
            op.pad(x, whole(0, 0, 0, 0), whole(0, 0, 0, more), "constant", op.constant(np.float32(0)))
            for x in (q, k, v)
        )
        return op.slice(fused(q, k, v, scale), whole(0), whole(head), whole(1), whole(3))

    return attend


VARIANTS: dict[str, tuple[Callable[[Any, Any, Any, float], Any], bool, dict[str, str]]] = {
    "one operator": (fused, False, {}),
    "products and softmax": (primitives, False, {}),
    "one operator a head": (by_head, False, {}),
    "one operator a quarter of the rows": (by_rows, False, {}),
    "one operator, heads filled up to 48": (padded(48), False, {}),
    "one operator, heads filled up to 64": (padded(64), False, {}),
    "one operator, shapes known at run time": (fused, True, {}),
    "not fused": (primitives, False, {"SNIPPETS_MODE": "DISABLE"}),
}


def timed(model: Any, feeds: dict[int, np.ndarray], properties: dict[str, Any], runs: int) -> tuple[float, float]:
    """The best run: milliseconds of all operators, and of the fully connected ones among them."""
    compiled = ov.compile_model(model, "CPU", properties | {"PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True})
    request = compiled.create_infer_request()
    best = (math.inf, 0.0)
    for _ in range(runs):
        started = time.perf_counter()
        request.infer(feeds)
        wall_ms = (time.perf_counter() - started) * 1000
        projection = (
            sum(one.real_time.total_seconds() for one in request.profiling_info if one.node_type == "FullyConnected")
            * 1000
        )
        best = min(best, (wall_ms, projection))
    return best


def attention_ms(shape: tuple[int, int, int], variant: str, properties: dict[str, Any], runs: int) -> float:
    tokens, heads, width = shape
    attend, dynamic, more = VARIANTS[variant]
    channels = heads * width
    random = np.random.default_rng(0)
    parameters = [op.parameter([PICTURES, tokens, channels], np.float32) for _ in range(3)]
    split = whole(0, tokens, heads, width)
    q, k, v = (op.transpose(op.reshape(x, split, True), whole(0, 2, 1, 3)) for x in parameters)
    attended = op.reshape(op.transpose(attend(q, k, v, width**-0.5), whole(0, 2, 1, 3)), whole(0, 0, channels), True)
    weight = op.constant((random.standard_normal((channels, channels)) / math.sqrt(channels)).astype(np.float32))
    model = ov.Model([op.matmul(attended, weight, False, False)], parameters)
    if dynamic:
        model.reshape({i: [-1, tokens, channels] for i in range(3)})
    feeds = {i: random.standard_normal((PICTURES, tokens, channels)).astype(np.float32) for i in range(3)}
    wall, projection = timed(model, feeds, properties | more, runs)
    return wall - projection


def peak_flops(properties: dict[str, Any], runs: int) -> float:
    """Operations per second of the best of a few large matrix products."""
    best = 0.0
    for m, k, n in ((4096, 1280, 1280), (2048, 2560, 2560)):
        random = np.random.default_rng(0)
        x = op.parameter([m, k], np.float32)
        model = ov.Model(
            [op.matmul(x, op.constant(random.standard_normal((k, n)).astype(np.float32)), False, False)], [x]
        )
        _, product_ms = timed(model, {0: random.standard_normal((m, k)).astype(np.float32)}, properties, runs)
        best = max(best, 2 * m * k * n / product_ms * 1000)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="0: OpenVINO's choice")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": arguments.precision,
        "INFERENCE_NUM_THREADS": arguments.threads,
    }
    peak = peak_flops(properties, arguments.runs)
    rows = []
    for shape in SHAPES:
        tokens, heads, width = shape
        flops = 4 * PICTURES * tokens**2 * heads * width
        for variant in VARIANTS:
            ms = attention_ms(shape, variant, properties, arguments.runs)
            rows.append(
                {
                    "tokens": tokens,
                    "head_width": width,
                    "variant": variant,
                    "ms": ms,
                    "share_of_peak": flops / ms * 1000 / peak,
                }
            )
    if arguments.json:
        print(json.dumps({"precision": arguments.precision, "peak_flops_per_s": peak, "rows": rows}, indent=1))
        return
    print(f"best matrix product: {peak / 1e9:.0f} GFLOP/s in {arguments.precision}\n")
    print(
        "| | "
        + " | ".join(f"{tokens} tokens, heads of {width}" for tokens, _, width in SHAPES)
        + " |\n|---|"
        + "---|" * len(SHAPES)
    )
    for variant in VARIANTS:
        cells = [f"{row['ms']:.1f} ms, {row['share_of_peak']:.0%}" for row in rows if row["variant"] == variant]
        print(f"| {variant} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
