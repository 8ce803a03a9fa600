"""What is measured: each metric's unit and meaning, whether it is gated, and how tightly. `bench.toml` can change the
gates.

Counters are not in the table. Any counter may appear in a result, and each is gated exactly, unless `bench.toml` says
otherwise.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdrt.bench.statistics import MAX_PAIRS
from sdrt.errors import InputFileError, UsageError, nearest, printable
from sdrt.files.read import read_document

MAX_GATES_BYTES = 1 << 20
UNPAIRED_FACTOR = 2.0
"""Two separate runs see the machine at two moments, so their margins are this many times those of interleaved runs."""
DEFAULT_PAIRS = 30


@dataclass(frozen=True)
class Metric:
    """A metric. For all of them, smaller is better."""

    unit: str
    meaning: str
    gated: bool = False
    margin: float = 0.05


METRICS: Mapping[str, Metric] = {
    "total_ms": Metric("ms", "one call, prompt to pixels", gated=True),
    "picture_ms": Metric("ms", "one picture of a batch: the call's time over the batch"),
    "tokenise_ms": Metric("ms", "prompts to token ids"),
    "text_encoder_ms": Metric("ms", "text encoder"),
    "step_ms": Metric("ms", "one model call of the denoising loop, as the host sees it", gated=True),
    "step_gpu_ms": Metric("ms", "one model call on the GPU, between two CUDA events", gated=True),
    "decode_ms": Metric("ms", "VAE decoder"),
    "text_encoder_gpu_ms": Metric("ms", "text encoder on the GPU"),
    "decode_gpu_ms": Metric("ms", "VAE decoder on the GPU"),
    "host_ms": Metric("ms", "the call less all time inside the engine"),
    "copies_ms": Metric("ms", "giving the engine its inputs, and latents back"),
    "latency_ms": Metric("ms", "server: arrival to pixels"),
    "queue_ms": Metric("ms", "server: arrival to start"),
    "cold_ms": Metric("ms", "process start to the first picture"),
    "import_ms": Metric("ms", "process start to the runtime imported"),
    "load_ms": Metric("ms", "Pipeline.load", gated=True),
    "engine_load_ms": Metric("ms", "loading the engine, within load_ms; not compiling it beforehand"),
    "first_picture_ms": Metric("ms", "the first call after loading"),
    "peak_rss_bytes": Metric("bytes", "largest resident memory of the process"),
    "device_bytes": Metric("bytes", "memory taken on the device", gated=True, margin=0.02),
}


@dataclass(frozen=True)
class Gate:
    """How one metric is judged: the relative margin, and whether crossing it fails the run."""

    margin: float
    gated: bool


@dataclass(frozen=True)
class Gates:
    """The gates of a comparison, and the most pairs that it may make. Names that `bench.toml` does not mention keep
    their defaults.
    """

    pairs: int = DEFAULT_PAIRS
    chosen: Mapping[str, Gate] = field(default_factory=dict)

    def metric(self, name: str) -> Gate:
        default = METRICS.get(name, Metric("", ""))
        return self.chosen.get(name, Gate(default.margin, default.gated))

    def counter(self, name: str) -> Gate:
        return self.chosen.get(name, Gate(0.0, True))


def with_margin(gates: Gates, margin: float) -> Gates:
    """The same gates with another margin for every gated timing.

    Raises:
        UsageError: the margin is not a share above 0.
    """
    if not 0 < margin <= 10:
        raise UsageError(f"--margin {margin:g}: expected a share above 0, at most 10", "Write 5 % as --margin 0.05.")
    timings = [name for name, metric in METRICS.items() if metric.unit == "ms" and gates.metric(name).gated]
    return replace(gates, chosen={**gates.chosen, **{name: Gate(margin, True) for name in timings}})


def read_gates(path: Path) -> Gates:
    """Read a `bench.toml`: `pairs = N`, and tables `[metrics.NAME]` and `[counters.NAME]` with `margin` and `gate`.

    Raises:
        InputFileError: the file cannot be read, or holds an unknown key, name or value.
    """
    try:
        document = tomllib.loads(read_document(path, MAX_GATES_BYTES).data.decode())
    except (OSError, ValueError) as error:
        raise InputFileError(
            f"{path}: not readable as TOML: {printable(str(error))}", "docs/ci.md shows one."
        ) from error
    _known(path, "", document, ("pairs", "metrics", "counters"))
    pairs = document.get("pairs", DEFAULT_PAIRS)
    if type(pairs) is not int or not 1 <= pairs <= MAX_PAIRS:
        raise InputFileError(f"{path}: pairs: expected 1 to {MAX_PAIRS}, found {pairs!r}")
    metrics, counters = (_table(path, name, document.get(name, {})) for name in ("metrics", "counters"))
    _known(path, "metrics.", metrics, tuple(METRICS))
    chosen = {}
    for section, tables in (("metrics", metrics), ("counters", counters)):
        for name, value in tables.items():
            where = f"{section}.{name}"
            table = _table(path, where, value)
            _known(path, f"{where}.", table, ("margin", "gate"))
            default = Gates().metric(name) if section == "metrics" else Gates().counter(name)
            margin, gated = table.get("margin", default.margin), table.get("gate", default.gated)
            if type(margin) not in (int, float) or not 0 <= margin <= 10 or (section == "metrics" and margin == 0):
                least = "above 0" if section == "metrics" else "0"
                raise InputFileError(
                    f"{path}: {where}.margin: expected a share from {least} to 10, such as 0.05, found {margin!r}"
                )
            if type(gated) is not bool:
                raise InputFileError(f"{path}: {where}.gate: expected true or false, found {gated!r}")
            chosen[name] = Gate(float(margin), gated)
    return Gates(pairs, chosen)


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputFileError(f"{path}: {name}: expected a table, found {value!r}")
    return value


def _known(path: Path, prefix: str, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in table:
        if name not in names:
            raise InputFileError(
                f"{path}: {printable(prefix + name)}: unknown{nearest(name, names)}", f"Known here: {', '.join(names)}."
            )
