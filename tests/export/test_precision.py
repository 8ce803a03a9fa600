"""The float16 graphs: close to float32 with every value rounded, casts only at the borders of the network, and the same
weights file.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from reference import identity_step, psnr, relative

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import GRAPHS, STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from sdrt.bundle.manifest import TOKENIZER, WEIGHTS, Component
from sdrt.export.precision import to_half
from sdrt.runtime.engine import tables
from sdrt.runtime.prompts.chunks import chunk_segments
from sdrt.runtime.prompts.syntax import Segment
from sdrt.runtime.prompts.tokenizer import Tokenizer
from sdrt.runtime.sampling.noise import CpuNoise
from sdrt.runtime.sampling.registry import plan_rows

Array = NDArray[Any]
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
ELEMENTS = {
    "tensor(float)": FLOAT,
    "tensor(float16)": HALF,
    "tensor(int64)": TensorProto.INT64,
    "tensor(uint8)": TensorProto.UINT8,
    "tensor(bool)": TensorProto.BOOL,
}

BORDERS = {"text_encoder": (0, 1), "step": (3, 1), "vae_decoder": (1, 1), "vae_encoder": (1, 1)}
"""Casts down and up. The step's go down at the latents, the context and the timestep's sinusoid."""


class Graph:
    """A float16 graph file. `types` holds the element type of every value in it."""

    def __init__(self, path: Path, types: dict[str, int]) -> None:
        self.path = path
        self.model = onnx.load(path, load_external_data=False)
        self.nodes = list(self.model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.types = types | {name: tensor.data_type for name, tensor in self.initializers.items()}
        self.views = {
            name for name, tensor in self.initializers.items() if tensor.data_location == TensorProto.EXTERNAL
        }
        """Weights, and what is made of nothing but weights and constants."""
        for node in self.nodes:
            operands = [name for name in node.input if name]
            if self.views.intersection(operands) and all(
                name in self.views or name in self.initializers for name in operands
            ):
                self.views.update(node.output)

    def floats(self, values: Any) -> set[int]:
        """The floating types among values."""
        return {self.types[name] for name in values if name} & {FLOAT, HALF}

    def weighted(self) -> list[int]:
        """Places of the operators on activations and a weight."""
        return [
            i
            for i, node in enumerate(self.nodes)
            if self.views.intersection(node.input) and not self.views.issuperset(node.output)
        ]


# Fidelity


class Networks:
    """The graphs of one precision. With `watched`, every value inside them is an output: rounded to its type, and
    looked at.
    """

    def __init__(self, bundle: Path, precision: str, watched: Path | None = None) -> None:
        self._bundle, self._precision, self._watched = open_bundle(bundle), precision, watched
        self._sessions: dict[str, Any] = {}
        self.seen = 0

    def run(self, graph: str, **inputs: Array) -> dict[str, Array]:
        session = self._sessions.get(graph) or self._load(graph)
        outputs = [output.name for output in session.get_outputs()]
        found = dict(zip(outputs, session.run(outputs, inputs), strict=True))
        for name, value in found.items():
            assert value.dtype.kind != "f" or np.isfinite(value).all(), f"{graph}: {name}"
            self.seen += 1
        return found

    def picture(self, prompt: str, sampler: str, steps: int, seed: int, cfg: float = 3.0) -> tuple[Array, Array]:
        """Latents and pixels; the loop is written out here."""
        manifest = self._bundle.manifest
        tokenizer = Tokenizer(self._bundle.file(TOKENIZER), manifest.text)
        tokens = np.array(
            [chunk.tokens[0] for text in ("", prompt) for chunk in chunk_segments(tokenizer, [Segment(text, 1.0)])]
        )
        context = self.run(TEXT_ENCODER, tokens=tokens)["context_skip_1"]
        rows = plan_rows(sampler, "normal", steps, manifest.diffusion)
        table = tables(rows, [[1 - cfg, cfg]] * len(rows)) | {"next": np.arange(1, len(rows) + 1)}
        stream = CpuNoise(seed)
        unit, zeros = stream.draw((1, 4, 8, 8)), np.zeros((1, 4, 8, 8), np.float32)
        noise = np.concatenate([stream.draw((1, 4, 8, 8)) if row.noise is not None else zeros for row in rows])
        state = {"registers": np.stack([zeros, unit, *[zeros] * 6], axis=1), "row": np.zeros(1, np.int64)}
        still = {"noise": noise, "context": context[None], "mask": zeros[:, :1], "init": zeros, "init_noise": unit}
        for _ in rows:
            found = self.run(STEP, **table, **state, **still)
            state = {"registers": found["next_registers"], "row": found["next_row"]}
        latents = state["registers"][:, 0]
        return latents, self.run(VAE_DECODER, latents=latents, rounding=np.array([0.5], np.float32))["pixels"]

    def types(self, graph: str) -> dict[str, int]:
        """Element types of a graph's inputs and outputs, as ONNX Runtime infers them."""
        session = self._sessions.get(graph) or self._load(graph)
        return {value.name: ELEMENTS[value.type] for value in [*session.get_inputs(), *session.get_outputs()]}

    def _load(self, graph: str) -> Any:
        import onnxruntime

        path = self._bundle.graph(graph, self._precision)
        if self._watched is not None:
            model = onnx.load(path, load_external_data=False)
            known = {output.name for output in model.graph.output}
            inside = [name for node in model.graph.node for name in node.output if name and name not in known]
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside)
            path = self._watched / path.name
            onnx.save(model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._sessions[graph] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return self._sessions[graph]


@pytest.fixture(scope="module")
def single(flat_bundle: Path) -> Networks:
    return Networks(flat_bundle, "fp32")


@pytest.fixture(scope="module")
def half(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Networks:
    folder = tmp_path_factory.mktemp("watched")
    shutil.copyfile(flat_bundle / WEIGHTS, folder / "weights.safetensors")
    return Networks(flat_bundle, "fp16", watched=folder)


@pytest.fixture(scope="module")
def halves(flat_bundle: Path, half: Networks) -> dict[str, Graph]:
    return {graph: Graph(open_bundle(flat_bundle).graph(graph, "fp16"), half.types(graph)) for graph in GRAPHS}


@pytest.mark.parametrize(("prompt", "sampler", "seed"), [("red apple", "dpmpp_2m", 1), ("robot", "euler_a", 3)])
def test_pictures_after_20_steps(single: Networks, half: Networks, prompt: str, sampler: str, seed: int) -> None:
    """CPU kernels compute in float32, but every value is rounded to float16 where the graph says so, and finite."""
    latents, pixels = half.picture(prompt, sampler, 20, seed)
    exact, expected = single.picture(prompt, sampler, 20, seed)
    cosine = float(np.vdot(latents, exact) / (np.linalg.norm(latents) * np.linalg.norm(exact)))
    assert cosine >= 0.999 and psnr(pixels, expected) >= 35
    assert expected.std() > 20 and not np.array_equal(latents, exact)
    assert half.seen > 20 * 1000


def test_image_encoder(single: Networks, half: Networks) -> None:
    pixels = np.random.RandomState(4).randint(0, 256, (2, 64, 72, 3)).astype(np.uint8)
    noise = np.random.RandomState(5).standard_normal((2, 4, 8, 9)).astype(np.float32)
    found, expected = (networks.run(VAE_ENCODER, pixels=pixels, noise=noise)["latents"] for networks in (half, single))
    assert 0 < relative(found, expected) < 0.01


@pytest.mark.parametrize("timestep", [0.0, 1.783, 961.733, 999.0])
def test_timestep_keeps_its_fraction(single: Networks, half: Networks, timestep: float) -> None:
    """As a float16, 961.733 would be 961.5: the angles of the sinusoid would be off by a quarter of a radian."""
    angles = [name for name in half.run(STEP, **step_inputs(timestep)) if name in ("cos", "sin")]
    found, near = half.run(STEP, **step_inputs(timestep)), half.run(STEP, **step_inputs(float(np.float16(timestep))))
    assert sorted(angles) == ["cos", "sin"] and all(found[name].dtype == np.float32 for name in angles)
    frequencies = np.exp(-np.log(10000) * np.arange(found["cos"].shape[-1]) / found["cos"].shape[-1])
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        assert np.abs(found[name][0] - function(timestep * frequencies)).max() < 2e-4
    assert (timestep == float(np.float16(timestep))) == np.array_equal(found["cos"], near["cos"])


def step_inputs(timestep: float) -> dict[str, Array]:
    random = np.random.RandomState(6)
    inputs = identity_step(1, 8, 8, 1, random.standard_normal((1, 1, 77, 64)).astype(np.float32))
    inputs["registers"][:, 0] = random.standard_normal((1, 4, 8, 8))
    inputs["timestep"][0] = timestep
    return inputs


# Where the types change


@pytest.mark.parametrize("graph", GRAPHS)
def test_files_are_valid(halves: dict[str, Graph], tmp_path: Path, graph: str) -> None:
    """By path, so that the external weights are found; operand types are checked as a strongly typed engine checks
    them.
    """
    # A copy: the checker refuses weights with a second hard link, and other tests link this bundle's files.
    copied = Path(shutil.copytree(halves[graph].path.parent, tmp_path / "graphs")) / halves[graph].path.name
    onnx.checker.check_model(str(copied), full_check=True)


@pytest.mark.parametrize("graph", GRAPHS)
def test_borders_are_float32(halves: dict[str, Graph], graph: str, flat_bundle: Path) -> None:
    found, single = (
        halves[graph].model.graph,
        onnx.load(open_bundle(flat_bundle).graph(graph, "fp32"), load_external_data=False).graph,
    )
    assert HALF not in {value.type.tensor_type.elem_type for value in [*found.input, *found.output]}
    for ours, expected in zip([*found.input, *found.output], [*single.input, *single.output], strict=True):
        assert (ours.name, ours.type) == (expected.name, expected.type)


@pytest.mark.parametrize("graph", GRAPHS)
def test_casts_are_at_the_borders_only(halves: dict[str, Graph], graph: str) -> None:
    found = halves[graph]
    casts = [
        (found.types[node.input[0]], found.types[node.output[0]]) for node in found.nodes if node.op_type == "Cast"
    ]
    assert (casts.count((FLOAT, HALF)), casts.count((HALF, FLOAT))) == BORDERS[graph]
    assert all(HALF not in pair for pair in casts if pair not in ((FLOAT, HALF), (HALF, FLOAT)))
    if graph == STEP:
        assert len(casts) == 4


@pytest.mark.parametrize("graph", GRAPHS)
def test_operators_with_a_weight_run_in_half(halves: dict[str, Graph], graph: str) -> None:
    found = halves[graph]
    weighted = [found.nodes[i] for i in found.weighted()]
    assert {"step": 300, "text_encoder": 15, "vae_decoder": 60, "vae_encoder": 45}[graph] < len(weighted)
    for node in [*weighted, *(node for node in found.nodes if node.op_type in ("Conv", "Attention", "Gemm", "MatMul"))]:
        assert found.floats([*node.input, *node.output]) == {HALF}, f"{node.op_type} {node.name}"


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_operator_mixes_types(halves: dict[str, Graph], graph: str) -> None:
    """Scales of Resize aside, which are float32 by definition."""
    for node in halves[graph].nodes:
        if node.op_type not in ("Cast", "Resize"):
            assert len(halves[graph].floats([*node.input, *node.output])) <= 1, f"{node.op_type} {node.name}"


@pytest.mark.parametrize("graph", GRAPHS)
def test_tail_is_float32(halves: dict[str, Graph], graph: str) -> None:
    """After the last operator with a weight: guidance, the sampler's update, pixels."""
    found = halves[graph]
    last = max(found.weighted())
    after = set(found.nodes[last].output)
    tail = []
    for node in found.nodes[last + 1 :]:
        if after.intersection(node.input):
            after.update(node.output)
            tail.append(node)
    assert tail[0].op_type == "Cast" and len(tail) > {"vae_encoder": 5, "text_encoder": 0}.get(graph, 8)
    for node in tail[1:]:
        assert HALF not in found.floats([*node.input, *node.output]), f"{node.op_type} {node.name}"


def test_head_of_the_step_is_float32(halves: dict[str, Graph]) -> None:
    """Tables, registers, the mixing of the input and the timestep's sinusoid, up to the casts."""
    found = halves[STEP]
    reached = {value.name for value in found.model.graph.input} - {"context"}
    kinds = set()
    for node in found.nodes:
        if reached.intersection(node.input) and node.op_type != "Cast" and HALF not in found.floats(node.input):
            assert HALF not in found.floats(node.output)
            reached.update(node.output)
            kinds.add(node.op_type)
    assert {"Gather", "Sin", "Cos", "Mul", "ReduceSum"} <= kinds


@pytest.mark.parametrize("graph", GRAPHS)
def test_norm_statistics_are_float32(halves: dict[str, Graph], graph: str) -> None:
    """`stash_type` 1, the type of a norm's mean and variance; the default where it is not written."""
    norms = [node for node in halves[graph].nodes if node.op_type.endswith("Normalization")]
    assert norms
    for node in norms:
        assert [attribute.i for attribute in node.attribute if attribute.name == "stash_type"] in (
            [],
            [FLOAT],
        ), node.name


@pytest.mark.parametrize("graph", GRAPHS)
def test_weights_are_the_same_bytes(halves: dict[str, Graph], graph: str, flat_bundle: Path) -> None:
    """Both precisions point at the same places of one weights file, and the half graph takes them as they
    are stored.
    """
    single = onnx.load(open_bundle(flat_bundle).graph(graph, "fp32"), load_external_data=False).graph

    def places(tensors: Any) -> dict[str, Any]:
        external = [tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
        return {
            tensor.name: (
                tensor.data_type,
                list(tensor.dims),
                {entry.key: entry.value for entry in tensor.external_data},
            )
            for tensor in external
        }

    found = places(halves[graph].initializers.values())
    assert found == places(single.initializer) and len(found) > 30
    assert {kind for kind, _, _ in found.values()} == {HALF}
    assert {place["location"] for _, _, place in found.values()} == {"weights.safetensors"}
    assert sum(tensor.ByteSize() for tensor in halves[graph].initializers.values()) < 1 << 20, (
        "nothing but constants is stored twice"
    )


def test_the_manifest_says_so(flat_bundle: Path) -> None:
    manifest = open_bundle(flat_bundle).manifest
    assert manifest.components == dict.fromkeys(("text_encoder", "unet", "vae"), Component("fp16", "fp16"))
    for graph, by_compute in manifest.graphs.items():
        assert by_compute.keys() == {"fp32", "fp16"}
        component = {STEP: "unet", TEXT_ENCODER: "text_encoder"}.get(graph, "vae")
        assert {record.component for record in by_compute.values()} == {component}


# The rule on a graph made for it


def small(nodes: list[tuple[str, list[str], str]], outputs: list[str], constants: dict[str, Array]) -> ir.Model:
    """A float32 graph over activations x and t, and a weight w; nodes are (operator, inputs, output)."""
    made = [onnx.helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in nodes]
    values = [onnx.helper.make_tensor_value_info(name, FLOAT, [2, 2]) for name in ("x", "t", "w")]
    ends = [onnx.helper.make_tensor_value_info(name, FLOAT, [2, 2]) for name in outputs]
    graph = onnx.helper.make_graph(
        made, "small", values, ends, [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = onnx.shape_inference.infer_shapes(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    )
    return ir.from_proto(model)


@pytest.mark.parametrize(("precision", "kind"), [("fp16", ir.DataType.FLOAT16), ("bf16", ir.DataType.BFLOAT16)])
def test_rule(precision: str, kind: ir.DataType) -> None:
    model = small(
        [
            ("Mul", ["x", "c"], "before"),  # float32: x is
            ("Transpose", ["w"], "turned"),
            ("MatMul", ["before", "turned"], "inside"),  # half: a weight
            ("Mul", ["inside", "c"], "scaled"),  # half: nothing in it is float32, and a weight follows
            ("Add", ["scaled", "t"], "mixed"),  # float32: t is
            ("MatMul", ["mixed", "w"], "last"),  # half
            ("Mul", ["last", "c"], "after"),  # float32: no weight follows
        ],
        ["after"],
        {"c": np.array(0.1, np.float32)},
    )
    to_half(model, {"w"}, precision)
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert {name for name, found in types.items() if found == kind} == {
        "turned",
        "inside",
        "scaled",
        "last",
        "before.to_" + kind.name.lower(),
        "mixed.to_" + kind.name.lower(),
    }
    assert [node.name for node in model.graph if node.op_type == "Cast"] == [
        f"before.to_{kind.name.lower()}",
        "scaled.to_float",
        f"mixed.to_{kind.name.lower()}",
        "last.to_float",
    ]
    assert {name: value.dtype for name, value in model.graph.initializers.items()} == {
        "c": ir.DataType.FLOAT,
        f"c.{precision}": kind,
    }
    assert [value.dtype for value in model.graph.inputs] == [ir.DataType.FLOAT, ir.DataType.FLOAT, kind]


def test_kinds_of_operators_that_overflow_run_in_float32() -> None:
    """The products of queries and keys in a family whose scores overflow: float32 between two casts."""
    nodes = [
        ("MatMul", ["x", "w"], "a"),
        ("Attention", ["a", "a", "a"], "b"),
        ("Neg", ["b"], "c"),
        ("MatMul", ["c", "w"], "after"),
    ]
    types = {}
    for upcast in (frozenset[str](), frozenset({"Attention", "MatMul"})):
        model = small(nodes, ["after"], {})
        for node in model.graph:
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)  # onnx infers none of Attention's
        to_half(model, {"w"}, "fp16", upcast)
        (node,) = (node for node in model.graph if node.op_type == "Attention")
        types[bool(upcast)] = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
        assert [node.inputs[1].dtype for node in model.graph if node.op_type == "MatMul"] == [ir.DataType.FLOAT16] * 2
    assert types == {False: {ir.DataType.FLOAT16}, True: {ir.DataType.FLOAT}}


def test_values_are_cast_once() -> None:
    model = small(
        [("MatMul", ["x", "w"], "a"), ("MatMul", ["x", "w"], "b"), ("Add", ["a", "b"], "after")], ["after"], {}
    )
    to_half(model, {"w"}, "fp16")
    assert [node.name for node in model.graph if node.op_type == "Cast"] == ["x.to_float16", "a.to_float", "b.to_float"]


def test_scales_of_resize_stay_float32() -> None:
    nodes = [
        ("MatMul", ["x", "w"], "a"),
        ("Resize", ["a", "", "scales"], "b"),
        ("MatMul", ["b", "w"], "c"),
        ("Neg", ["c"], "after"),
    ]
    model = small(nodes, ["after"], {"scales": np.array([1, 1], np.float32)})
    to_half(model, {"w"}, "fp16")
    assert {name: value.dtype for name, value in model.graph.initializers.items()} == {"scales": ir.DataType.FLOAT}
    assert next(node for node in model.graph if node.op_type == "Resize").outputs[0].dtype == ir.DataType.FLOAT16


def test_output_that_would_be_half() -> None:
    """It is cast back: what leaves a graph is float32."""
    model = small([("MatMul", ["x", "w"], "a")], ["a"], {})
    to_half(model, {"w"}, "fp16")
    (output,) = model.graph.outputs
    producer = output.producer()
    assert output.dtype == ir.DataType.FLOAT and producer is not None and producer.op_type == "Cast"
