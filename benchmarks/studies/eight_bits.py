"""What 8-bit arithmetic would save: the products of a Stable Diffusion 1.5 step in the CPU's own precision and with
8-bit weights and activations.

sdrt makes no 8-bit engines. This times OpenVINO's kernels for the products that take most of a step at 512x512 with
guidance, of random numbers between fixed ranges: the most there is to gain, at whatever cost to the picture.
Usage: python benchmarks/studies/eight_bits.py [--runs N] [--threads N] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from sdrt.machine import engine_libraries

ov = engine_libraries.openvino()
PICTURES = 2
CONVOLUTIONS = ((320, 64), (640, 32), (1280, 16))
"""Channels, and rows and columns, of 3x3 convolutions."""
PROJECTIONS = ((4096, 320, 2560), (1024, 640, 5120), (256, 1280, 10240))
"""Tokens, inputs and outputs of the feed-forward layers."""
PRODUCTS = ("Convolution", "FullyConnected")
op = ov.opset13


def rounded(values: Any, largest: np.ndarray, lowest: int) -> Any:
    """`values` as whole numbers from `lowest` to 127, 127 being `largest`: what OpenVINO turns into 8-bit arithmetic
    without zero points.
    """
    low, high = op.constant((largest * lowest / 127).astype(np.float32)), op.constant(largest.astype(np.float32))
    return op.fake_quantize(values, low, high, low, high, 128 - lowest)


def convolution(channels: int, side: int, eight_bits: bool) -> tuple[Any, float]:
    weights = (np.random.default_rng(0).standard_normal((channels, channels, 3, 3)) / math.sqrt(9 * channels)).astype(
        np.float32
    )
    x = op.parameter([PICTURES, channels, side, side], np.float32)
    source, kernel = operands(x, weights, eight_bits)
    return ov.Model(
        [op.relu(op.convolution(source, kernel, [1, 1], [1, 1], [1, 1], [1, 1]))], [x]
    ), 2.0 * PICTURES * side * side * 9 * channels**2


def projection(tokens: int, inputs: int, outputs: int, eight_bits: bool) -> tuple[Any, float]:
    weights = (np.random.default_rng(0).standard_normal((outputs, inputs)) / math.sqrt(inputs)).astype(np.float32)
    x = op.parameter([PICTURES, tokens, inputs], np.float32)
    source, matrix = operands(x, weights, eight_bits)
    return ov.Model([op.matmul(source, matrix, False, True)], [x]), 2.0 * PICTURES * tokens * inputs * outputs


def operands(x: Any, weights: np.ndarray, eight_bits: bool) -> tuple[Any, Any]:
    if not eight_bits:
        return x, op.constant(weights)
    of_channel = np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True)
    return rounded(x, np.array(4.0), -128), rounded(op.constant(weights), of_channel, -127)


def best_ms(model: Any, eight_bits: bool, runs: int, threads: int) -> float:
    """The best of `runs`.

    Raises:
        SystemExit: the product does not run in the precision it is timed for.
    """
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
    layers = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    (found,) = (
        str(layer["runtimePrecision"].astype(str))
        for layer in layers
        if str(layer["layerType"].astype(str)) in PRODUCTS
    )
    if (found in ("i8", "u8")) is not eight_bits:
        raise SystemExit(f"{'8-bit' if eight_bits else 'plain'} product runs in {found}")
    request = compiled.create_infer_request()
    feed = np.random.default_rng(1).standard_normal(tuple(model.inputs[0].shape)).astype(np.float32)
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        request.infer([feed])
        times.append((time.perf_counter() - started) * 1000)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="0: OpenVINO's choice")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    products: dict[str, Callable[[bool], tuple[Any, float]]] = {}
    for channels, side in CONVOLUTIONS:
        products[f"3x3 convolution, {channels} channels, {side}x{side}"] = partial(convolution, channels, side)
    for tokens, inputs, outputs in PROJECTIONS:
        products[f"{tokens} tokens, {inputs} to {outputs}"] = partial(projection, tokens, inputs, outputs)
    rows = []
    for name, product in products.items():
        model, flops = product(False)
        full, eight = (
            best_ms(one, bits, arguments.runs, arguments.threads)
            for one, bits in ((model, False), (product(True)[0], True))
        )
        rows.append({"product": name, "ms": full, "eight_bits_ms": eight, "ratio": eight / full, "flops": flops})
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| | GFLOP/s | 8-bit, of that time |\n|---|---|---|")
    for row in rows:
        print(f"| {row['product']} | {row['flops'] / row['ms'] / 1e6:.0f} | {row['ratio']:.2f} |")


if __name__ == "__main__":
    main()
