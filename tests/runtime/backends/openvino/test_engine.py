"""OpenVINO: pictures against ONNX Runtime's float32 ones, engines found again without compiling, and everything a
bundle or machine can get wrong.

bfloat16 engines are held to 30 dB, float32 ones to 45 dB.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bf16 import HAS_BF16, needs_bf16
from locked_down import LOCKED_DOWN, run_python
from typer.testing import CliRunner

from sdrt.bench.fidelity import check_references
from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import GRAPHS, STEP, TEXT_ENCODER, VAE_DECODER
from sdrt.bundle.manifest import ENGINES
from sdrt.cli.app import app
from sdrt.compile import compilers
from sdrt.compile import openvino as compiling
from sdrt.compile.openvino import compile_bundle
from sdrt.compile.options import CompileOptions, CompileReport, GraphReport
from sdrt.engines.shapes import EngineShapes
from sdrt.engines.store import list_engines, read_engine, read_plan, write_engine
from sdrt.errors import BundleError, MachineError, MissingEngineError, ResourceError, UsageError
from sdrt.machine import cpu
from sdrt.runtime import Pipeline
from sdrt.runtime import backend as choice
from sdrt.runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from sdrt.runtime.backends.openvino import engine as backend
from sdrt.runtime.backends.openvino import model as openvino_model
from sdrt.runtime.backends.openvino.engine import OpenVinoEngine
from sdrt.runtime.backends.openvino.model import (
    StepShape,
    choose_precision,
    compile_graph,
    explained,
    import_blob,
    import_openvino,
)
from sdrt.runtime.engine import Job
from sdrt.runtime.verify import verify

ov = import_openvino("tests")
PSNR_DB = {"bf16": 30.0, "fp32": 45.0}
SHORT = (77, 77)
APPLE: dict[str, Any] = {"steps": 6, "cfg": 3.0, "seed": 11}


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def psnr(found: Any, expected: Any) -> float:
    error = float(((found.astype(float) - expected.astype(float)) ** 2).mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def copied(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to))


@pytest.fixture(scope="module")
def reports(flat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[CompileReport]:
    """Engines for 64x64 with one and two guidance branches, as this CPU computes fastest, from the bundle
    of `bundle`.
    """
    path = copied(flat_bundle, tmp_path_factory.mktemp("openvino") / "flat.sdrt")
    return compile_bundle(open_bundle(path), CompileOptions("openvino", tokens=SHORT))


@pytest.fixture(scope="module")
def bundle(reports: list[CompileReport]) -> Path:
    return reports[0].path.parents[1]


@pytest.fixture(scope="module")
def small(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with the same two engines, for tests that compile again, copy or change engines."""
    path = copied(small_bundle, tmp_path_factory.mktemp("openvino") / "small.sdrt")
    compile_bundle(open_bundle(path), CompileOptions("openvino", tokens=SHORT))
    return path


@pytest.fixture(scope="module")
def exact(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 engine of the small bundle for two pictures of 96x64, with tables of four rows."""
    path = copied(small_bundle, tmp_path_factory.mktemp("exact") / "exact.sdrt")
    size = (96, 64)
    compile_bundle(
        open_bundle(path),
        CompileOptions(
            "openvino", size=(size, size), batch=(2, 2), tokens=SHORT, branches=(2,), rows=4, precision="fp32"
        ),
    )
    return path


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def exact_pipe(exact: Path) -> Iterator[Pipeline]:
    with Pipeline.load(exact, backend="openvino") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(flat_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(flat_bundle, backend="onnxruntime", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def small_reference(small_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small_bundle, backend="onnxruntime", threads=1) as loaded:
        yield loaded


# Pictures


@pytest.mark.parametrize(
    "arguments", [{"sampler": "euler"}, {"cfg": 1.0, "sampler": "euler_a"}, {"sampler": "heun", "steps": 8}]
)
def test_pictures(pipe: Pipeline, reference: Pipeline, arguments: dict[str, Any]) -> None:
    """Of Heun's sampler eight steps: four are so coarse that a bfloat16 rounding decides the picture."""
    found, expected = pipe("red apple", **APPLE | arguments), reference("red apple", **APPLE | arguments)
    compute = found.engine["compute"]
    assert found.engine["backend"] == "openvino" and compute == ("bf16" if HAS_BF16 else "fp32")
    assert expected.engine["backend"] == "onnxruntime"
    assert psnr(found.images, expected.images) >= PSNR_DB[compute]


def test_batches_and_refilled_tables(exact_pipe: Pipeline, small_reference: Pipeline) -> None:
    """Seven rows on tables of four, and a second batch of one picture."""
    arguments: dict[str, Any] = {"steps": 7, "cfg": 3.0, "seed": 4, "size": (96, 64), "count": 3, "sampler": "euler_a"}
    found = exact_pipe("red apple", batch=2, **arguments)
    expected = small_reference("red apple", **arguments)
    assert found.engine["compute"] == "fp32" and found.seeds == (4, 5, 6)
    for one, other in zip(found.images, expected.images, strict=True):
        assert psnr(one, other) >= PSNR_DB["fp32"]


def test_two_encoders_and_a_vector(small_xl_bundle: Path, tmp_path: Path) -> None:
    """The vector changes with the prompt. The bench's guard reads all inputs and outputs too."""
    path = copied(small_xl_bundle, tmp_path / "xl.sdrt")
    compile_bundle(open_bundle(path), CompileOptions("openvino", tokens=SHORT, branches=(2,), precision="fp32"))
    settings: dict[str, Any] = {"negative": "", "steps": 4, "cfg": 3.0, "seed": 4, "count": 2, "batch": 2}
    pictures = {}
    for name in ("openvino", "onnxruntime"):
        with Pipeline.load(path, backend=name, threads=1) as pipeline:
            pictures[name] = pipeline("[fox:red apple:2]", **settings).images
            checks, problems, skipped = check_references(pipeline._engine, open_bundle(path))  # type: ignore[arg-type]
            outputs = {check["output"] for check in checks}
            assert not problems and not skipped and outputs == {"context_skip_2", "pooled", "latents", "pixels"}
    assert psnr(pictures["openvino"], pictures["onnxruntime"]) >= PSNR_DB["fp32"]


def job(rows: int, *, tokens: int = 77, branches: int = 2, width: int = 12) -> Job:
    """One picture, seeded numbers for tables, and contexts that change at every third row."""
    rng = np.random.default_rng(5)

    def drawn(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    tables = {
        "timestep": np.linspace(999, 1, rows, dtype=np.float32),
        "a": 0.3 * drawn(rows, 8),
        "w": drawn(rows, branches),
        "v": drawn(rows, branches),
        "rescale": 0.3 * drawn(rows, branches),
        "u": 0.2 * drawn(rows, 8),
        "q": 0.3 * drawn(rows),
        "M": 0.2 * drawn(rows, 8, 11),
        "inpaint": np.zeros((rows, 3), np.float32),
        "noise": drawn(rows, 4, 8, width),
    }
    sets = tuple({"context": drawn(branches, tokens, 64)} for _ in range(2))
    inputs = {
        "init": np.zeros((4, 8, width), np.float32),
        "init_noise": drawn(4, 8, width),
        "mask": np.zeros((1, 8, width), np.float32),
    }
    return Job(tables, inputs, sets, tuple(row // 3 % 2 for row in range(rows)))


def test_contexts_change_between_rows(exact_pipe: Pipeline, small_reference: Pipeline) -> None:
    latents = []
    for pipeline in (exact_pipe, small_reference):
        assert pipeline._engine is not None
        batch = pipeline._engine.open(job(7).shape, 1)
        slot = batch.join(job(7))
        for _ in range(7):
            batch.step()
        latents.append(batch.latents([slot]))
        batch.close()
        batch.close()
    assert np.linalg.norm(latents[0] - latents[1]) <= 1e-4 * np.linalg.norm(latents[1])


def test_what_a_batch_reads_outlives_its_setup(exact_pipe: Pipeline) -> None:
    """OpenVINO keeps the addresses of what it reads, so somebody must keep the memory."""
    engine = exact_pipe._engine
    assert engine is not None
    batches = [engine.open(job(2).shape, 1) for _ in range(2)]
    garbage = [
        np.full(size // 4, np.nan, np.float32) for size in (768, 3072) for _ in range(2000)
    ]  # the sizes of mask, init and unit noise
    latents = []
    for batch in batches:
        slot = batch.join(job(2))
        batch.step()
        batch.step()
        latents.append(batch.latents([slot]))
    assert len(garbage) == 4000 and np.isfinite(latents).all() and np.array_equal(*latents)


def test_images_are_encoded(exact_pipe: Pipeline, small_reference: Pipeline) -> None:
    rng = np.random.default_rng(0)
    pixels, noise = (
        rng.integers(0, 256, (3, 64, 96, 3), np.uint8),
        rng.standard_normal((3, 4, 8, 12)).astype(np.float32),
    )
    engines = [p._engine for p in (exact_pipe, small_reference)]
    found, expected = (e.encode_image(pixels, noise) for e in engines if e is not None)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_t1_eight_threads_give_eight_single_threaded_pictures(pipe: Pipeline) -> None:
    def picture(seed: int) -> Any:
        return pipe("red apple", steps=2, cfg=3.0 if seed % 2 else 1.0, seed=seed).images

    alone = [picture(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(picture, range(8)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_t1_requests_are_used_again_and_never_by_two_at_once(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four calls that are all inside at once have four requests; of calls one after the other, each takes one of those.
    Pictures are the same.
    """
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((4, 1, 4, 8, 12)).astype(np.float32)
    with Pipeline.load(exact, backend="openvino") as loaded:
        engine = loaded._engine
        assert isinstance(engine, OpenVinoEngine)
        infer, used, inside = engine.infer, list[Any](), threading.Barrier(4)

        def watched(request: Any, graph: str, kept: Any) -> None:
            used.append(request)
            if not inside.broken:
                inside.wait(60)
            infer(request, graph, kept)

        monkeypatch.setattr(engine, "infer", watched)
        with ThreadPoolExecutor(4) as pool:
            together = [pixels for pixels, _ in pool.map(lambda x: engine.decode(x, 0.5), latents)]
        assert len({id(request) for request in used}) == 4
        inside.abort()
        alone = [engine.decode(x, 0.5)[0] for x in latents]
    assert len({id(request) for request in used}) == 4
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_cancelled_picture_leaves_the_pipeline_usable(pipe: Pipeline) -> None:
    expected = pipe("red apple", **APPLE).images
    stream = pipe.stream("teddy bear", **APPLE | {"seed": 1})
    assert np.isfinite(next(stream).denoised()).all()
    stream.close()
    assert np.array_equal(pipe("red apple", **APPLE).images, expected)


def test_generating_needs_neither_torch_nor_a_socket(bundle: Path, tmp_path: Path) -> None:
    script = LOCKED_DOWN + "from sdrt.cli.app import app\napp()"
    said = run_python(
        script,
        "generate",
        str(bundle),
        "red apple",
        "--steps",
        "2",
        "--seed",
        "1",
        "--threads",
        "1",
        "--output",
        "a.png",
        "--json",
        cwd=tmp_path,
    )
    assert json.loads(said)["engine"] | {"version": "", "compute": "", "engine": ""} == {
        "backend": "openvino",
        "version": "",
        "device": "cpu",
        "compute": "",
        "threads": 1,
        "engine": "",
    }


# What is compiled


def test_attention_is_one_operator(reports: list[CompileReport], bundle: Path) -> None:
    opened = open_bundle(bundle)
    for report in reports:
        assert report.graphs[STEP].unfused == () and report.graphs[VAE_DECODER].unfused == ()
        assert len(report.graphs[TEXT_ENCODER].unfused) == 2  # causal: a small part of the work
    nodes = onnx.load(str(opened.graph(STEP, "fp32")), load_external_data=False).graph.node
    read = ov.Core().read_model(str(opened.graph(STEP, "fp32"))).get_ordered_ops()
    assert (
        sum(op.get_type_name() == "ScaledDotProductAttention" for op in read)
        == sum(node.op_type == "Attention" for node in nodes)
        == 32
    )
    inputs = StepShape(1, 8, 8, 77, 2, 2).inputs(VAE_DECODER, opened.manifest)
    compiled, attention = compile_graph(ov, ov.Core(), opened.graph(VAE_DECODER, "fp32"), inputs, "fp32", 1)
    assert len(attention) == 1 and openvino_model.unfused_attention(compiled, (*attention, "another")) == ("another",)


def test_weights_stay_as_they_are_stored(bundle: Path) -> None:
    """A weight widened to float32 when a graph is loaded would stay in memory beside its packed copy."""
    opened = open_bundle(bundle)
    folder, record = list_engines(opened)[0]
    for graph in GRAPHS:
        blob = read_plan(folder, record, graph)
        compiled = import_blob(
            ov, ov.Core(), graph, blob, opened.file("graphs/weights.safetensors"), record.key.precision, 1
        )
        size = dict.fromkeys(("f16", "f32"), 0)
        for op in compiled.get_runtime_model().get_ordered_ops():
            kind, stored = (str(op.get_rt_info()[key].astype(str)) for key in ("layerType", "outputPrecisions"))
            if kind == "Const" and stored in size:
                size[stored] += int(np.prod(op.output(0).get_shape()))
        assert size["f16"] > 1e5 and size["f16"] > 20 * size["f32"], graph  # norms and biases are float32


@needs_bf16
def test_latents_and_timesteps_stay_float32(bundle: Path) -> None:
    """Nothing before the first products or after the last one is bfloat16, in the blob as it is imported."""
    opened = open_bundle(bundle)
    folder, record = list_engines(opened)[0]
    compiled = import_blob(
        ov, ov.Core(), "step", read_plan(folder, record, STEP), opened.file("graphs/weights.safetensors"), "bf16", 1
    )
    ops = compiled.get_runtime_model().get_ordered_ops()

    def said(op: Any, key: str) -> str:
        return str(op.get_rt_info()[key].astype(str))

    products = [op for op in ops if said(op, "layerType") in ("Convolution", "FullyConnected")]
    assert sum(said(op, "runtimePrecision") == "bf16" for op in products) == len(products) > 250
    after: set[str] = set()
    edges = {"before": 0, "behind": 0}
    for op in ops:
        parents = {value.get_node().get_friendly_name() for value in op.input_values()}
        if op in products or after & parents:
            after.add(op.get_friendly_name())
        elif said(op, "layerType") not in ("Const", "Input", "Reorder"):
            edges["before"] += 1
            assert said(op, "runtimePrecision") != "bf16", op.get_friendly_name()
    last = max(i for i, op in enumerate(ops) if op in products)
    for op in ops[last + 1 :]:
        if said(op, "layerType") != "Reorder":
            edges["behind"] += 1
            assert said(op, "runtimePrecision") != "bf16", op.get_friendly_name()
    assert edges["before"] > 10 and edges["behind"] > 10


def test_blobs_hold_no_weights(reports: list[CompileReport]) -> None:
    for report in reports:
        assert (
            sum(plan.size_bytes for plan in report.record.plans.values()) < report.record.weight_bytes / 4
        )  # the rest is operators and their names
        assert (report.record.branches, report.record.batch, report.record.size) == (
            (report.record.branches[0],),
            1,
            (64, 64),
        )
    assert [report.record.branches for report in reports] == [(1,), (2,)]
    one, two = (report.record.plans for report in reports)
    assert all(one[graph] == two[graph] for graph in GRAPHS if graph != STEP)  # compiled once for both


COMPILE = """
import hashlib, sys
from pathlib import Path
from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import GRAPHS
from sdrt.runtime.backends.openvino.model import StepShape, compile_graph, export_blob, import_openvino
ov, bundle = import_openvino("tests"), open_bundle(Path(sys.argv[1]))
core, shape = ov.Core(), StepShape(1, 8, 8, 77, 2, 16)
for graph in GRAPHS:
    compiled, _ = compile_graph(ov, core, bundle.graph(graph, "fp32"), shape.inputs(graph, bundle.manifest), "fp32", 1)
    print(hashlib.sha256(export_blob(compiled)).hexdigest())
"""


def test_another_lora_compiles_nothing(
    bundle: Path, blindbox_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blobs are equal to the last byte whatever the weights are, but for names that a process counts up; so they come
    from the cache.
    """
    assert run_python(COMPILE, str(bundle)) == run_python(COMPILE, str(blindbox_bundle))
    other = Path(shutil.copytree(blindbox_bundle, tmp_path / "other.sdrt"))
    monkeypatch.setattr(compiling, "compile_graph", lambda *_: pytest.fail("compiled again"))
    (found,) = compile_bundle(open_bundle(other), CompileOptions("openvino", branches=(2,), tokens=SHORT))
    known = {record.branches: record for _, record in list_engines(open_bundle(bundle))}[(2,)]
    assert not found.cached and found.record.plans == known.plans and found.record.key.weights != known.key.weights
    with Pipeline.load(other, backend="openvino", threads=1) as loaded:
        assert loaded("red apple", steps=1, seed=1).engine["engine"] == found.path.name


def test_a_second_start_compiles_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        pytest.fail("compiled again")

    monkeypatch.setattr(backend, "compile_graph", refused)
    monkeypatch.setattr(compiling, "compile_graph", refused)
    with Pipeline.load(bundle, threads=1) as loaded:
        assert loaded("red apple", steps=1, seed=1).engine["threads"] == 1
        assert isinstance(loaded._engine, OpenVinoEngine) and loaded._engine.compiled == 0
    result = run("compile", bundle, "--target", "openvino", "--tokens", 77)
    assert result.exit_code == 0 and result.stderr.count("already there") == 2
    assert "without weights" in result.stdout


def test_several_sizes_share_what_is_equal_and_memory_is_bounded(
    small: Path, tmp_path: Path, small_reference: Pipeline
) -> None:
    copy = copied(small, tmp_path / "two.sdrt")
    compile_bundle(open_bundle(copy), CompileOptions("openvino", size=((64, 96), (64, 96)), branches=(2,)))
    with Pipeline.load(copy) as loaded:
        assert isinstance(loaded._engine, OpenVinoEngine)
        for size, cfg in (((64, 96), 3.0), ((64, 64), 3.0), ((64, 64), 1.0), ((64, 96), 3.0)):
            found, expected = (p("red apple", **APPLE | {"size": size, "cfg": cfg}) for p in (loaded, small_reference))
            assert psnr(found.images, expected.images) >= PSNR_DB[found.engine["compute"]]
        kept = [key[0] for key in loaded._engine._graphs]
        assert kept.count(STEP) == 2 and kept.count(TEXT_ENCODER) == 1 and kept.count(VAE_DECODER) == 2


def test_of_any_number_of_sizes_two_graphs_of_a_kind_stay_in_memory(small: Path, tmp_path: Path) -> None:
    copy = copied(small, tmp_path / "three.sdrt")
    sizes = [(64, 64), (64, 96), (96, 64)]
    for size in sizes[1:]:
        compile_bundle(open_bundle(copy), CompileOptions("openvino", size=(size, size), branches=(2,)))
    with Pipeline.load(copy) as loaded:
        assert isinstance(loaded._engine, OpenVinoEngine)
        first = [loaded("red apple", **APPLE | {"size": size}).images for size in sizes]
        assert [key[0] for key in loaded._engine._graphs].count(VAE_DECODER) == 2
        again = [loaded("red apple", **APPLE | {"size": size}).images for size in sizes]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_ran_is_told_for_each_picture(small: Path, tmp_path: Path) -> None:
    """A result names the engine that its steps took, and that engine's precision."""
    copy = copied(small, tmp_path / "mixed.sdrt")
    compile_bundle(
        open_bundle(copy), CompileOptions("openvino", size=((64, 96), (64, 96)), branches=(2,), precision="fp32")
    )
    by_shape = {
        (record.size, record.branches): (folder.name, record.key.precision)
        for folder, record in list_engines(open_bundle(copy))
    }
    with Pipeline.load(copy) as loaded:
        for size, cfg, branches in (((64, 64), 1.0, 1), ((64, 64), 3.0, 2), ((64, 96), 3.0, 2)):
            told = loaded("red apple", steps=1, seed=1, cfg=cfg, size=size).engine
            assert (told["engine"], told["compute"]) == by_shape[size, (branches,)]


def test_the_engine_loaded_first_is_the_one_most_asked_for(small: Path, tmp_path: Path) -> None:
    """Not the newest, which may be for long prompts or several pictures: the first picture would wait for another
    engine to load.
    """
    copy = copied(small, tmp_path / "many.sdrt")
    for more in ({"tokens": (154, 154)}, {"batch": (2, 2)}, {"size": ((64, 96), (64, 96))}):
        compile_bundle(open_bundle(copy), CompileOptions("openvino", **more))
    loaded = OpenVinoEngine(open_bundle(copy), 1)
    assert loaded._default.shape == StepShape(1, 8, 8, 77, 2, loaded._default.shape.rows)


# The backend is chosen


def test_auto_takes_the_fastest_that_runs(
    bundle: Path, flat_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choice._best(open_bundle(bundle)) == "openvino"
    assert choice._best(open_bundle(flat_bundle)) == "onnxruntime"
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert choice._best(open_bundle(bundle)) == "onnxruntime"
    assert "pip install 'openvino>=2026.4'" in caplog.text


def test_build_prepares_what_auto_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compilers.compiled_targets(["auto"], must_compile=False) == ["openvino"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert compilers.compiled_targets(["auto"], must_compile=False) == []


def test_verify_and_inspect(small: Path) -> None:
    checks = [check for check in verify(small) if check.backend.startswith("openvino")]
    assert {check.graph for check in checks} == set(GRAPHS) and all(check.error <= check.limit for check in checks)
    assert len({check.backend for check in checks}) == 2
    engines = json.loads(run("inspect", small, "--json").stdout)["engines"]
    assert [(e["target"], e["stale"]) for e in engines] == [("openvino", False)] * 2


def test_verify_runs_engines_of_other_shapes_too(exact: Path) -> None:
    checks = [check for check in verify(exact) if check.backend.startswith("openvino")]
    assert {check.graph for check in checks} == set(GRAPHS) and {check.compute for check in checks} == {"fp32"}


# What can be wrong


def altered(source: Path, to: Path, **changes: Any) -> Path:
    """A copy of a bundle whose two-branch engine says it was made under another key."""
    copy = copied(source, to)
    opened = open_bundle(copy)
    engines = list_engines(opened)
    folder, record = next((f, r) for f, r in engines if r.branches == (2,))
    plans = {graph: read_plan(folder, record, graph) for graph in record.plans}
    write_engine(opened, replace(record, key=replace(record.key, **changes)), plans)
    for old, _ in engines:
        shutil.rmtree(old)
    return copy


def test_b9_an_engine_of_another_cpu_is_compiled_again(
    bundle: Path, tmp_path: Path, pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    copy = altered(bundle, tmp_path / "other.sdrt", device="Another CPU (avx2)")
    with caplog.at_level(logging.WARNING), Pipeline.load(copy) as loaded:
        found = loaded("red apple", **APPLE)
        assert isinstance(loaded._engine, OpenVinoEngine) and loaded._engine.compiled == 3
    assert np.array_equal(found.images, pipe("red apple", **APPLE).images)
    (said,) = [record.message for record in caplog.records if "compiling again" in record.message]
    command = (
        f"sdrt compile {copy} --target openvino --size 64x64 --batch 1 --tokens 77 --branches 2 --precision"
        f" {found.engine['compute']}"
    )
    assert "Another CPU" in said and said.endswith(command)
    assert json.loads(run("inspect", copy, "--json").stdout)["engines"][0]["stale"] is True


def test_an_engine_of_another_version_is_compiled_again(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = altered(small, tmp_path / "other.sdrt", compiler="2026.3.0")
    (engine,) = backend._usable(open_bundle(copy), ov.Core())
    assert "built for OpenVINO 2026.3.0" in engine.stale and caplog.text.count("compiling again") == 1
    assert run("compile", copy, "--prune").exit_code == 0 and list_engines(open_bundle(copy)) == []


def test_an_engine_built_in_another_way_is_compiled_again(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = altered(small, tmp_path / "other.sdrt", flags=("weightless", "latency"))
    (engine,) = backend._usable(open_bundle(copy), ov.Core())
    assert (
        engine.stale == "built by another version of sdrt, in another way" and caplog.text.count("compiling again") == 1
    )
    assert json.loads(run("inspect", copy, "--json").stdout)["engines"][0]["why"] == engine.stale
    assert {check.graph for check in verify(copy) if check.backend.startswith("openvino")} == set(GRAPHS)
    assert run("compile", copy, "--prune").exit_code == 0 and list_engines(open_bundle(copy)) == []


@needs_bf16
def test_b9_on_a_cpu_without_bfloat16_an_engine_computes_in_float32(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so, in the result and in the command that makes one for it."""
    copy = altered(small, tmp_path / "other.sdrt", device="Another CPU (avx512_bf16)")
    core = ov.Core()
    monkeypatch.setattr(ov, "Core", lambda: CoreWithoutBf16(core))
    with Pipeline.load(copy) as loaded:
        assert loaded("red apple", steps=1, seed=1).engine["compute"] == "fp32"
    assert caplog.text.count("--branches 2 --precision fp32") == 1


class CoreWithoutBf16:
    """OpenVINO's core, as on a CPU without bfloat16."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def get_property(self, device: str, name: str) -> Any:
        found = self._core.get_property(device, name)
        return [one for one in found if one != "BF16"] if name == "OPTIMIZATION_CAPABILITIES" else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def test_an_engine_of_other_weights_is_never_used(small: Path, tmp_path: Path) -> None:
    copy = altered(small, tmp_path / "other.sdrt", weights="0" * 64)
    with pytest.raises(MachineError, match="built for weights that have changed") as raised:
        Pipeline.load(copy, backend="openvino")
    assert f"sdrt compile {copy} --target openvino" in raised.value.fix


def test_a_changed_byte(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(small, tmp_path / "changed.sdrt")
    for folder, _ in list_engines(open_bundle(copy)):
        data = bytearray((folder / "step.blob").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "step.blob").write_bytes(data)
    result = run("generate", copy, "red apple", "--steps", "1", "--output", tmp_path / "a.png")
    assert result.exit_code == 4 and "step.blob: changed since it was compiled" in result.stderr
    result = run("verify", copy)
    assert result.exit_code == 1 and "step.blob: changed since it was compiled" in result.stderr
    assert not (tmp_path / "a.png").exists()
    intact = next((f, r) for f, r in list_engines(open_bundle(small)) if r.branches == (1,))
    report = GraphReport(0.0, 0.0, 1, 1, (), None)
    monkeypatch.setattr(compiling, "_compile", lambda *args: compiling._Blob(read_plan(*intact, args[3]), report))
    (mended,) = compile_bundle(open_bundle(copy), CompileOptions("openvino", branches=(1,), tokens=SHORT))
    assert not mended.cached and read_engine(mended.path) == mended.record


LONG = "red apple BREAK green apple"
MISSING = [
    ("red apple", {"size": (64, 96)}, "--size 64x96 --batch 1 --tokens 77 --branches 2"),
    (LONG, {}, "--size 64x64 --batch 1 --tokens 154 --branches 2"),
    ("red apple AND grey apple", {"batch": 2, "count": 2}, "--size 64x64 --batch 2 --tokens 77 --branches 3"),
]


@pytest.mark.parametrize(("prompt", "settings", "wanted"), MISSING, ids=["size", "tokens", "branches"])
def test_a_shape_without_an_engine(pipe: Pipeline, prompt: str, settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(MissingEngineError, match=f"no OpenVINO engine for {wanted}; there is: --size 64x64") as raised:
        pipe(prompt, **APPLE | settings)
    assert f" --target openvino {wanted};" in raised.value.fix and "--backend onnxruntime" in raised.value.fix
    assert ".sdrt" not in raised.value.message and raised.value.path.endswith(
        ".sdrt"
    )  # the message may be shown to a client


def test_a_shape_without_an_engine_as_data(small: Path) -> None:
    result = run("generate", small, LONG, "--on-missing", "error", "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)["error"]
    taken = {"size": [[64, 64], [64, 64]], "batch": [1, 1], "tokens": [77, 77]}
    assert told["wanted"] == {"size": [64, 64], "batch": 1, "tokens": 154, "branches": 2}
    assert sorted(told["shapes"], key=lambda one: one["branches"]) == [
        {**taken, "branches": [1]},
        {**taken, "branches": [2]},
    ]
    listed = json.loads(run("inspect", small, "--json").stdout)["engines"]
    assert [engine["shapes"] for engine in listed] == told["shapes"]
    with Pipeline.load(small) as loaded:
        assert sorted(loaded.shapes, key=lambda one: one.branches) == [
            EngineShapes(((64, 64), (64, 64)), (1, 1), (77, 77), (n,)) for n in (1, 2)
        ]


def test_engines_are_made_for_short_and_long_prompts(small: Path, tmp_path: Path) -> None:
    opened = open_bundle(small)
    assert [(s.tokens, s.branches) for s in compiling._static_shapes(opened, CompileOptions("openvino"))] == [
        (77, 1),
        (77, 2),
        (154, 1),
        (154, 2),
    ]
    assert [
        s.tokens for s in compiling._static_shapes(opened, CompileOptions("openvino", tokens=(231, 231), branches=(2,)))
    ] == [231]


def test_a_batch_without_an_engine_runs_one_by_one(pipe: Pipeline) -> None:
    settings: dict[str, Any] = APPLE | {"count": 3, "sampler": "euler_a"}
    together, alone = pipe("red apple", batch=3, **settings), pipe("red apple", **settings)
    assert np.array_equal(together.images, alone.images) and together.seeds == alone.seeds
    assert together.engine == alone.engine


def test_each_part_of_a_batch_has_its_own_pictures_inputs(small: Path, small_reference: Pipeline) -> None:
    """Five pictures that differ in everything, on engines of one and of two pictures."""
    rng = np.random.default_rng(3)
    made = job(4, width=8)

    def drawn(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    several = [
        replace(
            made,
            tables={**made.tables, "noise": drawn(4, 4, 8, 8), "inpaint": np.full((4, 3), 0.5, np.float32)},
            inputs={
                "init": drawn(4, 8, 8),
                "init_noise": drawn(4, 8, 8),
                "mask": rng.integers(0, 2, (1, 8, 8)).astype(np.float32),
            },
            contexts=({"context": drawn(2, 77, 64)}, {"context": drawn(2, 77, 64)}),
        )
        for _ in range(5)
    ]
    latents = []
    engines = [OpenVinoEngine(open_bundle(small), 1), small_reference._engine]
    for one in engines:
        assert one is not None
        batch = one.open(made.shape, 5)
        slots = [batch.join(each) for each in several]
        for _ in range(4):
            batch.step()
        latents.append(batch.latents(slots))
        batch.close()
    tolerance = 2e-2 if HAS_BF16 else 1e-4
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*latents, strict=True)]
    assert len(errors) == 5 and max(errors) <= tolerance


@pytest.mark.parametrize(("prompt", "settings", "wanted"), MISSING, ids=["size", "tokens", "branches"])
def test_a_shape_without_an_engine_is_compiled_in_memory(
    small: Path,
    small_reference: Pipeline,
    prompt: str,
    settings: dict[str, Any],
    wanted: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Pipeline.load(small, on_missing="compile") as loaded:
        ready = loaded.shapes
        first, again = (loaded(prompt, **APPLE | settings) for _ in range(2))
        assert loaded.shapes == ready
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "compiling it in memory" in said and said.endswith(f"sdrt compile {small} --target openvino {wanted}")
    assert first.engine["backend"] == "openvino" and first.engine["engine"] == "compiled in memory"
    assert np.array_equal(first.images, again.images)
    assert psnr(first.images, small_reference(prompt, **APPLE | settings).images) >= PSNR_DB[first.engine["compute"]]


def test_an_image_of_another_size_is_compiled_for_once(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The encoder of the init image comes before the step, of the same new engine."""
    image = np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)
    with Pipeline.load(small, on_missing="compile") as loaded:
        loaded("red apple", **APPLE | {"size": (64, 96), "init_image": image})
    assert caplog.text.count("compiling it in memory") == 1


@pytest.mark.parametrize(("prompt", "settings", "wanted"), MISSING, ids=["size", "tokens", "branches"])
def test_a_shape_without_an_engine_falls_back(
    small: Path,
    small_reference: Pipeline,
    prompt: str,
    settings: dict[str, Any],
    wanted: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Pipeline.load(small, on_missing="fallback", threads=1) as loaded:
        found, own = loaded(prompt, **APPLE | settings), loaded("red apple", **APPLE)
        found = loaded(prompt, **APPLE | settings)
    assert found.engine["backend"] == "onnxruntime" and found.engine["instead_of"] == "openvino"
    assert own.engine["backend"] == "openvino" and "instead_of" not in own.engine
    assert caplog.text.count(f"no openvino engine for {wanted}; onnxruntime runs it") == 1
    assert psnr(found.images, small_reference(prompt, **APPLE | settings).images) >= PSNR_DB["fp32"]


def test_the_command_compiles_what_is_missing(small: Path, tmp_path: Path) -> None:
    result = run("generate", small, LONG, "--steps", 1, "--output", tmp_path / "a.png", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["engine"]["engine"] == "compiled in memory"
    result = run("generate", small, LONG, "--on-missing", "compil")
    assert result.exit_code == 2 and "did you mean 'compile'?" in result.stderr


def test_no_engine(flat_bundle: Path, tmp_path: Path) -> None:
    result = run("generate", flat_bundle, "apple", "--backend", "openvino", "--output", tmp_path / "a.png")
    assert result.exit_code == 5 and f"sdrt compile {flat_bundle} --target openvino" in result.stderr


def test_openvino_is_missing(flat_bundle: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for command in (
        ["compile", flat_bundle, "--target", "openvino"],
        ["generate", bundle, "apple", "--backend", "openvino"],
    ):
        result = run(*command)
        assert result.exit_code == 5 and "pip install 'openvino>=2026.4'" in result.stderr


def test_openvino_is_no_package(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unpacked archive on the module path: the version is the module's own, and engines of the package's do not pass
    for its.
    """

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(openvino_model, "version", missing)
    assert openvino_model.openvino_version() == ov.__version__
    assert import_openvino("tests") is ov
    assert all(engine.stale for engine in backend._usable(open_bundle(small), ov.Core()))
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert openvino_model.openvino_version() is None


def test_openvino_is_too_old(flat_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_model, "openvino_version", lambda: "2025.4.1")
    result = run("compile", flat_bundle, "--target", "openvino")
    assert (
        result.exit_code == 5
        and "openvino 2025.4.1, at least 2026.4 is needed" in result.stderr
        and "--upgrade" in result.stderr
    )
    result = run("build", "--checkpoint", "missing.safetensors", "--target", "openvino")  # before anything is read
    assert result.exit_code == 5 and "at least 2026.4" in result.stderr


def test_precision() -> None:
    assert choose_precision(CoreWithoutBf16(ov.Core()), None, "fp16") == "fp32"
    assert choose_precision(ov.Core(), None, "fp32") == "fp32"  # stored in float32: that was asked for
    with pytest.raises(MachineError, match="no bfloat16"):
        choose_precision(CoreWithoutBf16(ov.Core()), "bf16", "fp16")
    with pytest.raises(UsageError, match="bf16 or fp32"):
        choose_precision(CoreWithoutBf16(ov.Core()), "int8", "fp16")


def test_threads(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "usable_cores", lambda: 3)
    result = run("generate", bundle, "apple", "--threads", "4")
    assert (
        result.exit_code == 2
        and "threads 4: this process may use 3 cores" in result.stderr
        and "1 to 3" in result.stderr
    )
    monkeypatch.setattr(openvino_model, "usable_cores", lambda: 3)
    assert openvino_model.compile_properties("fp32", None)["INFERENCE_NUM_THREADS"] == 3
    for bound, pinned in (
        (3, [True, True, False]),
        (8, [False, False, False]),
    ):  # 8 and a quota of 3: others share those 8
        monkeypatch.setattr(openvino_model, "bound_cores", lambda bound=bound: bound)
        assert [openvino_model.compile_properties("fp32", n)["ENABLE_CPU_PINNING"] for n in (None, 3, 2)] == pinned


def test_shared_cores(small: Path, small_reference: Pipeline) -> None:
    """Threads that neither spin nor are pinned draw the same picture."""
    settings = openvino_model.compile_properties("fp32", None, shared=True)
    assert settings["ENABLE_CPU_PINNING"] is False and settings["TBB_PARTITIONER"] == "AUTO"
    assert "TBB_PARTITIONER" not in openvino_model.compile_properties("fp32", None)
    pictures = []
    for cores in ("own", "shared"):
        with Pipeline.load(small, cores=cores) as loaded:
            pictures.append(loaded("red apple", **APPLE).images)
    assert np.array_equal(*pictures)
    with Pipeline.load(small, backend="onnxruntime", cores="shared") as loaded:
        assert isinstance(loaded._engine, OnnxRuntimeEngine)
        options = loaded._engine._sessions[STEP].get_session_options()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert np.array_equal(loaded("red apple", **APPLE).images, small_reference("red apple", **APPLE).images)
    with pytest.raises(UsageError, match="cores 'share': unknown; did you mean 'shared'"):
        Pipeline.load(small, cores="share")


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", 8), ("150000 100000\n", 2), ("10000 100000", 1), ("nonsense", 8), (None, 8)]
)
def test_a_container_may_have_fewer_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, cores: int
) -> None:
    quota = tmp_path / "cpu.max"
    if text is not None:
        quota.write_text(text)
    monkeypatch.setattr(cpu, "_CGROUP_QUOTA", quota)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert cpu.usable_cores() == cores
    assert "," not in cpu.cpu_identity() and cpu.cpu_identity().isprintable()


def test_no_memory_for_a_request(exact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory while a job or a call is set up is as much of an answer as while it runs, and the next
    call works.
    """

    class Full:
        outputs = ()

        def create_infer_request(self) -> Any:
            raise RuntimeError("std::bad_alloc")

    with Pipeline.load(exact, backend="openvino") as loaded:
        engine = loaded._engine
        assert isinstance(engine, OpenVinoEngine)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_load", lambda *_: backend._Loaded(Full()))
            for call in (
                lambda: engine.decode(np.zeros((1, 4, 8, 12), np.float32), 0.5),
                lambda: engine.open(job(2).shape, 1),
            ):
                with pytest.raises(
                    ResourceError, match=rf"^{re.escape(str(exact))}: (vae_decoder|step): out of memory"
                ):
                    call()
        assert engine.decode(np.zeros((1, 4, 8, 12), np.float32), 0.5)[1].all()


def test_failures_are_explained(bundle: Path, tmp_path: Path) -> None:
    assert isinstance(explained(ov, "step", RuntimeError("std::bad_alloc")), ResourceError)
    assert isinstance(explained(ov, "step", MemoryError()), ResourceError)
    with pytest.raises(MachineError, match=r"step.blob: OpenVINO .* failed"):
        import_blob(ov, ov.Core(), "step.blob", b"not a blob", bundle / "graphs/weights.safetensors", "fp32", 1)
    shape = StepShape(1, 8, 8, 77, 1, 2)
    inputs = shape.inputs(STEP, open_bundle(bundle).manifest) | {"tau": (1,)}
    with pytest.raises(MachineError, match="inputs tau: unknown"):
        compile_graph(ov, ov.Core(), bundle / "graphs/step.fp32.onnx", inputs, "fp32", 1)
    empty = tmp_path / "empty.onnx"
    empty.touch()
    with pytest.raises(MachineError, match=r"empty\.onnx"):
        compile_graph(ov, ov.Core(), empty, inputs, "fp32", 1)


def test_an_interrupted_compilation_leaves_nothing(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(small_bundle, tmp_path / "flat.sdrt")

    def interrupted(*_: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "write_engine", interrupted)
    monkeypatch.setattr(compiling, "GRAPHS", (TEXT_ENCODER,))
    assert run("compile", copy, "--target", "openvino").exit_code == 130
    assert not (copy / ENGINES).exists()


def test_a_bundle_that_changed_is_not_compiled(small_bundle: Path, tmp_path: Path) -> None:
    copy = copied(small_bundle, tmp_path / "flat.sdrt")
    weights = copy / "graphs/weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights.safetensors: changed"):
        compile_bundle(open_bundle(copy), CompileOptions("openvino"))


def test_a_warm_pipeline_has_loaded_all_it_needs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that most pictures do without, and both numbers of guidance branches."""
    photo = np.zeros((64, 64, 3), np.uint8)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a graph is loaded")

    for how in ("openvino", "onnxruntime"):
        with Pipeline.load(small, backend=how, threads=1) as loaded:
            monkeypatch.setattr(loaded._engine, "_read" if how == "openvino" else "session", refuse)
            with pytest.raises(AssertionError, match="a graph is loaded"):
                loaded("apple", steps=2, init_image=photo)
            monkeypatch.undo()
            loaded.warm_up(init_image=photo)
            monkeypatch.setattr(loaded._engine, "_read" if how == "openvino" else "session", refuse)
            for cfg in (1.0, 7.0):
                loaded("apple", steps=2, cfg=cfg, init_image=photo)
            monkeypatch.undo()
