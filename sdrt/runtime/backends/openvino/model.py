"""One graph inside OpenVINO: read with static shapes, compiled for this CPU, exported as a blob without weights, and
imported again.

Serves the backend and the compiler, so that both make the same engine. A blob is OpenVINO's model after its
optimisations; the weights stay in the bundle's weights file, which the import maps: engines of several sizes share it,
and none stores a copy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import STEP, concrete, dimensions, signatures, table_rows
from sdrt.bundle.manifest import Manifest
from sdrt.engines.record import EngineRecord
from sdrt.engines.store import mismatch
from sdrt.engines.targets import OPENVINO
from sdrt.errors import MachineError, ResourceError, SdrtError, UsageError, printable
from sdrt.machine import engine_libraries
from sdrt.machine.cpu import bound_cores, cpu_identity, platform_name, usable_cores
from sdrt.machine.interruptible import interruptible
from sdrt.machine.packages import install_command

TARGET = OPENVINO.name
"""The first version whose ONNX reader keeps Attention as one operator and whose CPU blobs can leave the weights out, as
far as tested.
"""
PRECISIONS = ("bf16", "fp32")
FLAGS = {
    "bf16": ("weightless", "stored_weights", "norms_in_place", "heads_filled", "float32_boundary", "latency"),
    "fp32": ("weightless", "stored_weights", "norms_in_place", "latency"),
}
"""What an engine of each precision is built with beside its shapes, as its key names it. An engine of other flags is
compiled again.
"""

_HINTS = {"bf16": "bf16", "fp32": "f32"}
_SIGNIFICANT = ("Convolution", "MatMul", "ScaledDotProductAttention")
_ATTENTION = "ScaledDotProductAttention"
_FUSED_LAYERS = ("Subgraph", "ScaledDotProductAttention")
_REGISTER = 16  # float32 numbers
_LONG = 4096  # keys
_MANY = 32768  # values of one picture
_DECOMPRESSION = "decompression_0"
_NOT_RUN = ("Const", "Input", "Output")

Shape = tuple[int, ...]


@dataclass(frozen=True, order=True)
class StepShape:
    """What a step engine is made for: pictures, latent rows and columns, prompt tokens, guidance branches, table rows
    of each picture.
    """

    batch: int
    height: int
    width: int
    tokens: int
    branches: int
    rows: int

    @property
    def size(self) -> tuple[int, int]:
        """Latent rows and columns."""
        return self.height, self.width

    def words(self, factor: int, *branches: int) -> str:
        """The shape as the options that compile for it, or for several numbers of `branches`; `factor` pixels a side
        per latent.
        """
        size = f"--size {self.width * factor}x{self.height * factor}"
        return (
            f"{size} --batch {self.batch} --tokens {self.tokens} --branches"
            f" {','.join(map(str, branches or (self.branches,)))}"
        )

    def inputs(self, graph: str, manifest: Manifest) -> dict[str, Shape]:
        """Static shapes of a graph's inputs. The text encoder takes one chunk at a time, the VAE one picture."""
        pictures = self.batch if graph == STEP else 1
        sizes = {
            "N": pictures,
            "G": self.branches,
            "S": table_rows(pictures, self.rows),
            "T": self.tokens,
            "h": self.height,
            "w": self.width,
            "n": 1,
        }
        return {
            name: concrete(tensor.shape, sizes)
            for name, tensor in signatures(dimensions(manifest))[graph].inputs.items()
        }


def import_openvino(where: str) -> Any:
    """The openvino module. `where` begins the message, such as "backend openvino".

    Raises:
        MachineError: it is not installed, does not load, or is older than what was tested.
    """
    try:
        openvino = engine_libraries.openvino()
    except (ImportError, OSError) as error:
        raise MachineError(
            f"{where}: cannot import openvino: {error}", f"Install it with: {install_command(OPENVINO.extra)}"
        ) from error
    found = str(openvino_version())
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OPENVINO.oldest:
        raise MachineError(
            f"{where}: openvino {found}, at least {'.'.join(map(str, OPENVINO.oldest))} is needed",
            f"Upgrade it with: {install_command(OPENVINO.extra, '--upgrade')}",
        )
    return openvino


def openvino_version() -> str | None:
    """Version as the installed package says, without loading it, else as the module says, as with an unpacked archive;
    None without OpenVINO.
    """
    try:
        return version(OPENVINO.module)
    except PackageNotFoundError:
        pass
    try:
        return str(engine_libraries.openvino().__version__)
    except (ImportError, OSError):
        return None


def choose_precision(core: Any, asked: str | None, stored: str) -> str:
    """bf16 where the CPU computes in it and the bundle is not stored in float32, else fp32; or what was asked for.

    Raises:
        UsageError: not a precision OpenVINO's CPU engines have.
        MachineError: bf16, and this CPU has none.
    """
    able = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if asked is None:
        return "bf16" if able and stored != "fp32" else "fp32"
    if asked not in PRECISIONS:
        raise UsageError(
            f"precision {asked!r}: an OpenVINO engine computes in {' or '.join(PRECISIONS)}",
            "Leave --precision out to take the fastest.",
        )
    if asked == "bf16" and not able:
        raise MachineError(
            "precision bf16: this CPU has no bfloat16 arithmetic", "Leave --precision out, or choose fp32."
        )
    return asked


def fit(core: Any, bundle: Bundle, record: EngineRecord) -> tuple[str, str]:
    """Why an engine's blobs do not fit this machine, empty if they do, and the precision it computes in here, where
    need be compiled again.
    """
    made_for = record.key.precision
    why = mismatch(
        record,
        bundle,
        compiler=openvino_version(),
        cpu=cpu_identity(),
        platform=platform_name(),
        flags=FLAGS.get(made_for),
    )
    return why, choose_precision(core, None, made_for) if why else made_for


def compile_properties(
    precision: str, threads: int | None, *, counting: bool = False, shared: bool = False
) -> dict[str, Any]:
    """Settings for one caller at a time. Threads are pinned to cores only when all cores are used that this process is
    bound to: processes that share them, as containers do that have a quota of a larger machine, would be pinned to the
    same ones. With `counting` every operator is timed, which costs time. `shared` cores are kept busy by others too: no
    thread is pinned, and work is not dealt out beforehand, so that a thread that has its core does what is left of one
    that lost it.
    """
    used = threads or usable_cores()
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": used,
        "ENABLE_CPU_PINNING": used == bound_cores() and not shared,
        **({"TBB_PARTITIONER": "AUTO"} if shared else {}),
        **({"PERF_COUNT": True} if counting else {}),
    }


def compile_graph(
    ov: Any,
    core: Any,
    path: Path,
    shapes: Mapping[str, Shape],
    precision: str,
    threads: int | None,
    *,
    counting: bool = False,
    shared: bool = False,
) -> tuple[Any, tuple[str, ...]]:
    """Read an ONNX graph, fix its shapes, and compile it for this CPU. Also returns the names of its attention
    operators.

    Raises:
        MachineError: OpenVINO cannot read or compile it.
        ResourceError: out of memory.
    """
    try:
        model = core.read_model(str(path))
        inputs = {parameter.get_any_name() for parameter in model.inputs}
        if inputs != shapes.keys():
            other = printable(", ".join(sorted(inputs ^ shapes.keys())))
            raise MachineError(
                f"{path}: inputs {other}: unknown to this version of sdrt, or missing",
                "Upgrade sdrt, or build the bundle again with it.",
            )
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        attention = tuple(op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() == _ATTENTION)
        _keep_stored_weights(model)
        _normalise_in_place(ov, model)
        if precision != "fp32":
            _fill_heads(ov, model)
            _keep_boundary(ov, model)
        return (
            core.compile_model(
                model,
                "CPU",
                compile_properties(precision, threads, counting=counting, shared=shared)
                | {"CACHE_MODE": "OPTIMIZE_SIZE"},
            ),
            attention,
        )
    except Exception as error:
        raise explained(ov, str(path), error) from error


def export_blob(compiled: Any) -> bytes:
    """A compiled graph as bytes: everything but the weights, which come from the file its ONNX graph points into."""
    stream = BytesIO()
    compiled.export_model(stream)
    return stream.getvalue()


def import_blob(
    ov: Any,
    core: Any,
    where: str,
    blob: bytes,
    weights: Path,
    precision: str,
    threads: int | None,
    *,
    counting: bool = False,
    shared: bool = False,
) -> Any:
    """The compiled graph of `export_blob`, ready to run. `blob` has been compared with its record: importing is running
    native code.

    Raises:
        MachineError: OpenVINO refuses it.
        ResourceError: out of memory.
    """
    settings = compile_properties(precision, threads, counting=counting, shared=shared) | {
        "ENABLE_WEIGHTLESS": True,
        "WEIGHTS_PATH": str(weights),
    }
    try:
        return core.import_model(blob, "CPU", settings)
    except Exception as error:
        raise explained(ov, where, error) from error


def run_once(ov: Any, compiled: Any, where: str, inputs: Mapping[str, Any]) -> Any:
    """Run a compiled graph once, and return its outputs by name; a signal ends it. `where` begins what is said of a
    failure.

    Raises:
        MachineError, ResourceError: OpenVINO fails.
    """
    try:
        request = compiled.create_infer_request()
        return interruptible(lambda: request.infer(inputs), request.cancel)
    except Exception as error:
        raise explained(ov, where, error) from error


def unfused_attention(compiled: Any, attention: tuple[str, ...]) -> tuple[str, ...]:
    """Attention operators of a graph that do not run as one operator.

    With static shapes the CPU plugin runs one as a single Subgraph: both products and the softmax, block by block, no
    score matrix in memory.
    """
    kinds: dict[str, str] = {}
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind = info["layerType"].astype(str)
        if "originalLayersNames" in info:
            kinds |= dict.fromkeys(info["originalLayersNames"].astype(str).split(","), kind)
    return tuple(name for name in attention if kinds.get(name) not in _FUSED_LAYERS)


def layer_count(compiled: Any) -> int:
    """Operators that run, reorders among them."""
    kinds = [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ops()]
    return sum(kind not in _NOT_RUN for kind in kinds)


def explained(ov: Any, where: str, error: Exception) -> SdrtError:
    """An OpenVINO failure as one of ours; out of memory is told from the rest by its text, the only place
    it says so.
    """
    if isinstance(error, SdrtError):
        return error
    words = " ".join(str(error).split())
    text = printable(words[-300:])
    if isinstance(error, MemoryError) or re.search(r"bad_alloc|allocate|out of memory", words, re.IGNORECASE):
        return ResourceError(f"{where}: out of memory: {text}", "Choose a smaller --size or --batch.")
    return MachineError(f"{where}: OpenVINO {openvino_version()} failed: {text}", "Run: sdrt verify BUNDLE")


def _keep_stored_weights(model: Any) -> None:
    """Keep constants in the type the bundle stores them in, mapped from its file, until a kernel packs them in its own
    layout.

    Without this the CPU plugin computes each weight's cast to float32 on loading, and holds the result beside the
    packed copy for as long as the model lives: twice the time and three times the memory. The mark is the one that
    OpenVINO's own format gives to weights compressed to float16.
    """
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Convert" and op.input_value(0).get_node().get_type_name() == "Constant":
            op.get_rt_info()[_DECOMPRESSION] = ""


def _normalise_in_place(ov: Any, model: Any) -> None:
    """Write group norms as sums over rows and columns, which run in the channels-last layout of the convolutions around
    them.

    The CPU plugin's own norm wants whole channels one after the other, so it moves all pixels to that layout and back:
    a tenth of a VAE's time in bfloat16. Norms of few values stay: there it costs less than the few operators more.
    """
    for norm in model.get_ordered_ops():
        if (
            norm.get_type_name() != "GroupNormalization"
            or len(norm.get_output_shape(0)) != 4
            or math.prod(norm.get_output_shape(0)[1:]) < _MANY
        ):
            continue
        _replace(norm, _group_norm(ov.opset13, norm))
    model.validate_nodes_and_infer_types()


def _group_norm(op: Any, norm: Any) -> Any:
    """A GroupNormalization `[N, C, H, W]` in operators of the set `op`.

    In bfloat16 a mean is known to 1/256, and E[x^2] - E[x]^2 would lose everything where it is large beside the
    deviation. So the mean is taken away first, and what is left of it once more: with c = x - m, var = E[c^2] - E[c]^2
    and (c - E[c]) / deviation = c * scale + offset.
    """
    x, gain, bias = norm.input_values()
    pictures, channels, height, width = norm.get_output_shape(0)
    settings = norm.get_attributes()
    groups = settings["num_groups"]

    def by_group(values: Any, first: int) -> Any:
        return op.reshape(values, _whole(op, first, groups, channels // groups, 1), False)

    def by_channel(values: Any) -> Any:
        return op.reshape(values, _whole(op, pictures, channels, 1, 1), False)

    def of_group(reduce: Any, values: Any) -> Any:
        """`values` `[N, C, H, W]` reduced to `[N, G, 1, 1]`: over rows and columns, then over the channels of each
        group.
        """
        return reduce(by_group(reduce(values, _whole(op, 2, 3), True), pictures), _whole(op, 2), True)

    mean = op.broadcast(of_group(op.reduce_mean, x), _whole(op, pictures, groups, channels // groups, 1))
    centred = op.subtract(x, by_channel(mean))
    rest, length = of_group(op.reduce_mean, centred), of_group(op.reduce_l2, centred)
    square = op.multiply(op.multiply(length, length), np.float32(1 / (height * width * channels // groups)))
    variance = op.subtract(square, op.multiply(rest, rest))
    scale = op.divide(by_group(gain, 1), op.sqrt(op.add(variance, np.float32(settings["epsilon"]))))
    offset = op.subtract(by_group(bias, 1), op.multiply(rest, scale))
    return op.add(op.multiply(centred, by_channel(scale)), by_channel(offset))


def _fill_heads(ov: Any, model: Any) -> None:
    """Fill the heads of long self-attention with zeros up to a multiple of 16 numbers, a vector register of float32:
    Stable Diffusion 1.x has heads of 40.

    In bfloat16 the CPU plugin's fused operator loses time on the rest of a register, nothing that shows below 4096
    keys, a quarter of its time at 9216 (768x512 pixels are 6144). In float32, with fewer keys, or where zeros would be
    more than a quarter of the head, filling costs more than it saves. Zeros add nothing to a product, so the picture is
    the same.
    """
    op = ov.opset13
    for attention in model.get_ordered_ops():
        if attention.get_type_name() != _ATTENTION:
            continue
        (q, k, v), rest = attention.input_values()[:3], attention.input_values()[3:]
        width, missing = q.get_shape()[-1], -q.get_shape()[-1] % _REGISTER
        if not 0 < missing <= width // 4 or k.get_shape()[-2] < _LONG or v.get_shape()[-1] != width or len(rest) > 2:
            continue
        filled = [
            op.pad(x, _whole(op, 0, 0, 0, 0), _whole(op, 0, 0, 0, missing), "constant", op.constant(np.float32(0)))
            for x in (q, k, v)
        ]
        mask, scale = rest[0] if rest else None, rest[1] if len(rest) > 1 else op.constant(np.float32(width**-0.5))
        attended = op.scaled_dot_product_attention(*filled, mask, scale, attention.get_attributes()["causal"])
        attended.set_friendly_name(attention.get_friendly_name())
        _replace(attention, op.slice(attended, _whole(op, 0), _whole(op, width), _whole(op, 1), _whole(op, -1)))
    model.validate_nodes_and_infer_types()


def _replace(node: Any, result: Any) -> None:
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(result.output(0))


def _whole(op: Any, *values: int) -> Any:
    return op.constant(list(values), dtype="int64")


def _keep_boundary(ov: Any, model: Any) -> None:
    """Keep everything before the first product in float32: the mix of latents, the timestep and its sinusoid (961.733
    is 960 in bfloat16).

    The CPU plugin turns all arithmetic into bfloat16 except what lies between an output and the last product before it.
    So what enters the first products becomes an output too; nobody reads it, and it costs its size in memory:
    kilobytes, in the VAE's encoder the picture in float32.
    """
    live: set[str] = set()  # depends on an input's values
    after: set[str] = set()  # a product, or behind one
    entering: dict[str, Any] = {}
    for op in model.get_ordered_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        sources = op.input_values()
        parents = [source.get_node().get_friendly_name() for source in sources]
        if kind == "Parameter":
            live.add(name)
        if kind in ("Parameter", "ShapeOf") or not live.intersection(parents):
            continue
        live.add(name)
        if kind in _SIGNIFICANT:
            for source, parent in zip(sources, parents, strict=True):
                if parent in live and parent not in after and source.get_node().get_type_name() != "Parameter":
                    entering[parent] = source
        if kind in _SIGNIFICANT or after.intersection(parents):
            after.add(name)
    model.add_results([ov.opset13.result(source) for source in entering.values()])
