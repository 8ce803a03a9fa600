"""The options of a compilation and its report, the same for every target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdrt.compile.shapes import Size
from sdrt.engines.record import EngineRecord


@dataclass(frozen=True)
class CompileOptions:
    """What to compile. Ranges are (smallest, largest).

    `size` None takes the bundle's. `branches` None takes those of a picture with and without guidance.
    `tokens` None takes one chunk; for openvino it makes one engine for one chunk and
    another for two. onnxruntime takes none of these options.

    `precision` None takes the bundle's. For openvino it takes the fastest on this CPU, unless the bundle is stored in
    float32. `sms` are GPU generations for tensorrt-rtx, None for the default. `device` is the GPU for tensorrt, counted
    from 0.
    """

    target: str
    sms: tuple[int, ...] | None = None
    size: tuple[Size, Size] | None = None
    batch: tuple[int, int] = (1, 1)
    tokens: tuple[int, int] | None = None
    branches: tuple[int, ...] | None = None
    rows: int = 128
    precision: str | None = None
    device: int = 0
    force: bool = False


@dataclass(frozen=True)
class GraphReport:
    """How one graph was compiled: seconds, layers of the network, bytes of the plan with its weights, and attention
    layers that run, or may run, as several kernels. `layers` is None where they are not counted.

    `peak_bytes` is the most memory that the compiling process took, None where the system does not say.
    """

    parse_s: float
    build_s: float
    layers: int | None
    plan_bytes: int
    unfused: tuple[str, ...]
    peak_bytes: int | None


@dataclass(frozen=True)
class CompileReport:
    """An engine in its folder. If `cached`, the engine already existed, and `graphs` is empty."""

    path: Path
    record: EngineRecord
    cached: bool
    graphs: Mapping[str, GraphReport]
