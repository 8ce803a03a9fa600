"""ONNX Runtime's saved models: the same pictures as without them, a start that optimises nothing, and everything a
bundle, disk or machine can get wrong.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from faulty_jobs import names
from locked_down import LOCKED_DOWN, run_python
from typer.testing import CliRunner
from write_faults import Fault

from sdrt.bench import layers
from sdrt.bench.instruments import Readings
from sdrt.bundle import remembered as checked
from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import GRAPHS, STEP, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from sdrt.bundle.manifest import ENGINES, WEIGHTS
from sdrt.bundle.reference import read_reference
from sdrt.cli.app import app
from sdrt.compile import compilers, optimized_model, worker
from sdrt.compile import onnxruntime as compiling
from sdrt.compile.onnxruntime import compile_bundle
from sdrt.compile.options import CompileOptions, CompileReport
from sdrt.engines import record as engine_record
from sdrt.engines import store as engine_cache
from sdrt.engines.record import EngineKey
from sdrt.engines.store import list_engines, read_engine, staged_engine, write_record
from sdrt.errors import BundleError, MachineError, ResourceError, UsageError
from sdrt.files import publish
from sdrt.runtime import Pipeline
from sdrt.runtime.backends.onnxruntime import engine as backend
from sdrt.runtime.backends.onnxruntime import model as onnxruntime_model
from sdrt.runtime.verify import verify

ONE: dict[str, Any] = {"steps": 2, "cfg": 3.0, "seed": 5, "size": (64, 64)}
OPTIONS = CompileOptions("onnxruntime")


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def copied(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to))


@pytest.fixture(scope="module")
def report(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> CompileReport:
    path = copied(small_bundle, tmp_path_factory.mktemp("saved") / "small.sdrt")
    return compile_bundle(open_bundle(path), OPTIONS)


@pytest.fixture(scope="module")
def bundle(report: CompileReport) -> Path:
    return report.path.parents[1]


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, backend="onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain(small_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small_bundle, backend="onnxruntime") as loaded:
        yield loaded


def saved_of(pipeline: Pipeline) -> str | None:
    assert isinstance(pipeline._engine, backend.OnnxRuntimeEngine)
    return pipeline._engine.describe().get("engine")


# Pictures


@pytest.mark.parametrize(
    "arguments",
    [{}, {"cfg": 1.0, "sampler": "euler_a"}, {"size": (96, 64), "batch": 2, "count": 2}, {"prompt": "apple " * 90}],
    ids=["guided", "one branch", "another size, two pictures", "two chunks of text"],
)
def test_pictures_are_equal_to_the_last_bit(
    pipe: Pipeline, plain: Pipeline, report: CompileReport, arguments: dict[str, Any]
) -> None:
    """One engine serves every shape."""
    found, expected = (p(**{"prompt": "red apple"} | ONE | arguments) for p in (pipe, plain))
    assert np.array_equal(found.images, expected.images)
    assert found.engine["engine"] == report.path.name and "engine" not in expected.engine
    assert {**found.engine, "engine": None} == {**expected.engine, "engine": None}


def test_images_are_encoded_alike(pipe: Pipeline, plain: Pipeline) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found, expected = (p("red apple", **ONE, init_image=image, strength=0.5) for p in (pipe, plain))
    assert np.array_equal(found.images, expected.images)
    assert isinstance(pipe._engine, backend.OnnxRuntimeEngine) and set(pipe._engine._sessions) == set(GRAPHS)


# Starting


def test_a_second_start_optimises_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bundle's graphs none is opened; the models are loaded as they are, their weights mapped where they lie."""
    seen: list[tuple[Any, ...]] = []
    session = ort.InferenceSession

    def opened(model: Any, options: Any, **more: Any) -> Any:
        seen.append((type(model), options.graph_optimization_level, options.optimized_model_filepath))
        return session(model, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    monkeypatch.setattr(backend, "open_graph", lambda *_, **__: pytest.fail("optimised again"))
    with Pipeline.load(bundle) as loaded:
        assert seen == [(bytes, ort.GraphOptimizationLevel.ORT_DISABLE_ALL, "")] * 3
        if sys.platform == "linux":
            mapped = {
                Path(line.split()[-1]).name
                for line in Path("/proc/self/maps").read_text().splitlines()
                if str(bundle) in line
            }
            assert {"step.weights", "text_encoder.weights", "vae_decoder.weights"} <= mapped
        assert saved_of(loaded) is not None
    result = run("compile", bundle, "--target", "onnxruntime")
    assert (
        result.exit_code == 0
        and "already there" in result.stderr
        and "any size, batch, prompt and guidance" in result.stdout
    )


def test_weights_that_nobody_touched_are_hashed_once(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDRT_CACHE_DIR", str(tmp_path / "cache"))
    now, read = time.time_ns, []
    monkeypatch.setattr(checked.time, "time_ns", lambda: now() + 60_000_000_000)
    check = engine_cache.check_external_data
    monkeypatch.setattr(
        onnxruntime_model,
        "check_external_data",
        lambda folder, record, graph: (read.append(graph), check(folder, record, graph)),
    )
    for _ in range(2):
        Pipeline.load(bundle, backend="onnxruntime").close()
    assert sorted(read) == sorted([STEP, TEXT_ENCODER, VAE_DECODER])


def test_generating_needs_neither_torch_nor_a_socket(bundle: Path, report: CompileReport, tmp_path: Path) -> None:
    script = LOCKED_DOWN + "from sdrt.cli.app import app\napp()"
    said = run_python(
        script,
        "generate",
        str(bundle),
        "red apple",
        "--steps",
        "1",
        "--seed",
        "1",
        "--size",
        "64x64",
        "--output",
        "a.png",
        "--json",
        cwd=tmp_path,
    )
    assert json.loads(said)["engine"]["engine"] == report.path.name


def test_the_record(report: CompileReport, bundle: Path) -> None:
    record, opened = report.record, open_bundle(bundle)
    assert read_engine(report.path) == record and not report.cached
    assert (record.size, record.batch, record.tokens, record.rows, record.branches, record.state_bytes) == (
        None,
        None,
        None,
        None,
        (),
        0,
    )
    assert record.key.profiles == dict.fromkeys(GRAPHS, ()) and record.key.compiler == ort.__version__
    assert names(report.path) == sorted(
        ["engine.json", *(f"{graph}.onnx" for graph in GRAPHS), *(f"{graph}.weights" for graph in GRAPHS)]
    )
    stored = opened.manifest.files[WEIGHTS].size_bytes
    assert stored < sum(plan.disk_bytes for plan in record.plans.values()) < 2 * stored + compiling._MARGIN_BYTES
    assert all(report.graphs[graph].plan_bytes == record.plans[graph].disk_bytes for graph in GRAPHS)
    assert sys.platform != "linux" or all((made.peak_bytes or 0) > 10**7 for made in report.graphs.values())


def test_the_peak_and_bytes_are_told(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: CompileReport
) -> None:
    monkeypatch.setattr(worker, "save_model", from_(report.path))
    result = run("compile", copied(small_bundle, tmp_path / "a.sdrt"), "--target", "onnxruntime")
    assert result.exit_code == 0 and "layers" not in result.stdout and "0.01 GB peak" in result.stdout


def test_inspect_and_verify(bundle: Path, report: CompileReport) -> None:
    (listed,) = json.loads(run("inspect", bundle, "--json").stdout)["engines"]
    assert (listed["target"], listed["stale"]) == ("onnxruntime", False)
    assert listed["shapes"] == {
        "size": [[64, 64], [8192, 8192]],
        "batch": [1, 64],
        "tokens": [77, 2464],
        "branches": list(range(1, 17)),
    }
    assert listed["plan_bytes"] == sum(plan.disk_bytes for plan in report.record.plans.values())
    checks = [check for check in verify(bundle) if check.backend == f"onnxruntime {report.path.name}"]
    assert {check.graph for check in checks} == set(GRAPHS) and all(check.error <= check.limit for check in checks)


def test_the_operators_of_saved_models_are_profiled(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "machine_peak", lambda: {"flops_per_s": 1e9, "bytes_per_s": 1e9})
    readings = Readings(keep=True)
    with Pipeline.load(bundle, backend="onnxruntime", threads=1, observe=readings.observe) as loaded:
        loaded("sun", **ONE)
        monkeypatch.setattr(backend, "open_graph", lambda *_, **__: pytest.fail("another model than runs"))
        found = layers.profile(loaded, readings.kept, {})["graphs"]
    assert set(found) == {STEP, TEXT_ENCODER, VAE_DECODER} and all(made["flops"] > 0 for made in found.values())


# What is compiled for


def test_only_compile_saves_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """`build --target onnxruntime` writes nothing more: the disk is the user's."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    for name in ("onnxruntime", "auto"):
        assert compilers.compiled_targets([name], must_compile=False) == []
        assert compilers.compiled_targets([name], must_compile=True) == ["onnxruntime"]


@pytest.mark.parametrize(
    "option",
    ["--size 128x128", "--batch 2", "--tokens 154", "--branches 2", "--precision fp32", "--sm 89", "--device 1"],
    ids=lambda option: option.split()[0],
)
def test_options_that_nothing_reads(small_bundle: Path, option: str) -> None:
    result = run("compile", small_bundle, "--target", "onnxruntime", *option.split())
    name = option.split()[0]
    assert (
        result.exit_code == 2 and f"{name[2:]}: ONNX Runtime " in result.stderr and f"Leave {name} out" in result.stderr
    )
    assert not (small_bundle / ENGINES).exists()


def test_onnxruntime_is_missing(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("compile", small_bundle, "--target", "onnxruntime")
    assert (
        result.exit_code == 5
        and "target onnxruntime: cannot import" in result.stderr
        and "pip install 'onnxruntime>=1.25'" in result.stderr
    )


# What does not fit


def altered(source: Path, to: Path, **changes: Any) -> Path:
    """A copy of a bundle whose engine says it was made under another key."""
    copy = copied(source, to)
    opened = open_bundle(copy)
    ((folder, record),) = list_engines(opened)
    changed = replace(record, key=replace(record.key, **changes))
    with staged_engine(opened, changed.key, 0) as stage:
        for path in folder.iterdir():
            os.link(path, stage / path.name)
        (stage / "engine.json").unlink()
        write_record(stage, changed)
    shutil.rmtree(folder)
    return copy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "Another CPU (avx2)"}, "built for Another CPU (avx2), this machine is"),
        ({"compiler": "1.2.3"}, f"built for ONNX Runtime 1.2.3, this machine has {ort.__version__}"),
        ({"platform": "plan9-mips"}, "built for plan9-mips, this machine is"),
        ({"weights": "0" * 64}, "built for weights that have changed"),
        ({"graphs": dict.fromkeys(GRAPHS, "0" * 64)}, "built for graphs that have changed"),
        ({"flags": ("ORT_ENABLE_EXTENDED",)}, "built by another version of sdrt, in another way"),
    ],
    ids=["processor", "version", "platform", "weights", "graphs", "flags"],
)
def test_b8_b9_an_engine_that_does_not_fit(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], said: str
) -> None:
    """It is never used, and one warning says why and gives the command."""
    copy = altered(bundle, tmp_path / "other.sdrt", **changes)
    assert onnxruntime_model.find_saved(open_bundle(copy), ort.__version__) is None
    (warned,) = [record.getMessage() for record in caplog.records]
    assert said in warned and warned.endswith(f"sdrt compile {copy} --target onnxruntime")


def test_b9_on_another_processor_the_bundles_own_graphs_run(
    bundle: Path, plain: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = altered(bundle, tmp_path / "other.sdrt", device="Another CPU (avx2)")
    with caplog.at_level(logging.WARNING), Pipeline.load(copy, backend="onnxruntime") as loaded:
        assert saved_of(loaded) is None
        assert np.array_equal(loaded("red apple", **ONE).images, plain("red apple", **ONE).images)
    assert len(caplog.records) == 1
    (listed,) = json.loads(run("inspect", copy, "--json").stdout)["engines"]
    assert listed["stale"] is True and "built for Another CPU (avx2), this machine is" in listed["why"]


def test_verify_runs_only_what_was_made_here(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        onnxruntime_model,
        "run_graph",
        lambda path, inputs: read_reference(path.parents[1] / f"reference/{path.name.partition('.')[0]}.npz")[1],
    )
    copy = altered(bundle, tmp_path / "other.sdrt", device="Another CPU (avx2)")
    assert not [check for check in verify(copy) if check.backend.startswith("onnxruntime ")]
    assert caplog.text.count("only its hashes are checked: built for Another CPU") == 1


def test_prune_and_force(bundle: Path, report: CompileReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = altered(bundle, tmp_path / "other.sdrt", compiler="1.2.3")
    shutil.copytree(report.path, copy / ENGINES / report.path.name)
    result = run("compile", copy, "--prune")
    assert result.exit_code == 0 and result.stdout.count("removed") == 1
    assert [folder.name for folder, _ in list_engines(open_bundle(copy))] == [report.path.name]
    saved: list[str] = []
    monkeypatch.setattr(worker, "save_model", from_(report.path, saved))
    assert compile_bundle(open_bundle(copy), OPTIONS).cached and saved == []
    assert not compile_bundle(open_bundle(copy), replace(OPTIONS, force=True)).cached and saved == list(GRAPHS)
    assert names(copy / ENGINES) == [report.path.name]


def test_another_sdrts_engine_and_other_targets_leave_it_alone(
    small_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = copied(small_bundle, tmp_path / "a.sdrt")
    for name, text in (("openvino-0123456789abcdef", "nonsense"), ("onnxruntime-0123456789abcdef", '{"format": 9}')):
        (copy / ENGINES / name).mkdir(parents=True)
        (copy / ENGINES / name / "engine.json").write_text(text)
    with Pipeline.load(copy, backend="onnxruntime") as loaded:
        assert saved_of(loaded) is None
    assert caplog.text.count("engine format 9") == 1


# What was changed


@pytest.mark.parametrize("name", ["step.onnx", "step.weights", "text_encoder.weights"])
def test_b1_a_changed_byte(
    bundle: Path, report: CompileReport, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(bundle, tmp_path / "changed.sdrt")
    path = copy / ENGINES / report.path.name / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = run("generate", copy, "red apple", "--steps", "1", "--size", "64x64", "--output", tmp_path / "a.png")
    assert (
        result.exit_code == 4
        and f"{name}: changed since it was compiled" in result.stderr
        and not (tmp_path / "a.png").exists()
    )
    result = run("verify", copy)
    assert result.exit_code == 1 and f"{name}: changed since it was compiled" in result.stderr
    monkeypatch.setattr(worker, "save_model", from_(report.path))
    assert not compile_bundle(open_bundle(copy), OPTIONS).cached
    assert path.read_bytes() == (report.path / name).read_bytes()


def test_weights_of_the_encoder_are_checked_when_it_is_loaded(
    bundle: Path, report: CompileReport, tmp_path: Path
) -> None:
    copy = copied(bundle, tmp_path / "changed.sdrt")
    path = copy / ENGINES / report.path.name / f"{VAE_ENCODER}.weights"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with Pipeline.load(copy, backend="onnxruntime") as loaded:
        for _ in range(2):
            with pytest.raises(BundleError, match=r"vae_encoder\.weights: changed since it was compiled"):
                loaded("red apple", **ONE, init_image=np.zeros((64, 64, 3), np.uint8))
        assert loaded("red apple", **ONE).images.shape == (1, 64, 64, 3)


def test_weights_that_are_missing_a_link_or_cut_short(bundle: Path, report: CompileReport, tmp_path: Path) -> None:
    copy = copied(bundle, tmp_path / "changed.sdrt")
    path = copy / ENGINES / report.path.name / "step.weights"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"step\.weights: expected [\d,]+ bytes, found [\d,]+"):
        Pipeline.load(copy, backend="onnxruntime")
    path.unlink()
    with pytest.raises(BundleError, match=r"step\.weights: cannot be read: No such file"):
        Pipeline.load(copy, backend="onnxruntime")
    path.symlink_to(report.path / "step.weights")
    with pytest.raises(BundleError, match=r"step\.weights"):
        Pipeline.load(copy, backend="onnxruntime")


@pytest.mark.parametrize("place", ["../outside.weights", "/etc/passwd"])
def test_b5_a_model_that_points_out_of_its_folder(report: CompileReport, tmp_path: Path, place: str) -> None:
    import onnx

    model = onnx.load(str(report.path / "vae_decoder.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = place if entry.key == "location" else entry.value
    shutil.copyfile(report.path / "vae_decoder.weights", tmp_path / "outside.weights")
    (tmp_path / "engine").mkdir()
    with pytest.raises(MachineError, match="External data path"):
        onnxruntime_model.open_saved(
            onnxruntime_model.import_onnxruntime("tests"),
            model.SerializeToString(),
            tmp_path / "engine" / "a.onnx",
            None,
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(size=[64, 64]),
        lambda document: document.update(branches=[2]),
        lambda document: document.update(rows=0),
        lambda document: document["key"]["profiles"].update(step=[{"shapes": {}}]),
        lambda document: document["key"].update(target="openvino"),
        lambda document: document["plans"]["step"]["external_data"].update(file="../weights"),
        lambda document: document["plans"]["step"]["external_data"].update(file="text_encoder.weights"),
        lambda document: document["plans"]["step"]["external_data"].update(more=1),
        lambda document: document["plans"]["step"].update(external_data=3),
    ],
)
def test_a_record_that_is_not_as_it_should_be(report: CompileReport, change: Any) -> None:
    document = json.loads((report.path / "engine.json").read_text())
    assert engine_record.record_from(document) == report.record
    change(document)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        engine_record.record_from(document)


def test_records_from_before_there_was_external_data(report: CompileReport) -> None:
    document = json.loads((report.path / "engine.json").read_text())
    for plan in document["plans"].values():
        del plan["external_data"]
    assert all(plan.external_data is None for plan in engine_record.record_from(document).plans.values())


# What can go wrong while compiling


def from_(folder: Path, saved: list[str] | None = None) -> Any:
    """Stands in for the worker: links files of a finished engine."""

    def save_model(graph: str, path: Path, stage: Path, reference: Path, version: str) -> tuple[dict[str, Any], int]:
        for name in (f"{graph}.onnx", f"{graph}.weights"):
            os.link(folder / name, stage / name)
        if saved is not None:
            saved.append(graph)
        return {"build_s": 0.1, "exact": True}, 10**7

    return save_model


@pytest.mark.parametrize("kind", ["enospc", "eio"])
def test_i1_d1_failing_writes_leave_nothing(
    small_bundle: Path, report: CompileReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """At every point of the writer in turn, until the work succeeds."""
    monkeypatch.setattr(worker, "save_model", from_(report.path))
    opened = open_bundle(copied(small_bundle, tmp_path / "a.sdrt"))
    for number in range(1, 100):
        monkeypatch.setattr(publish, "at_point", (fault := Fault(number, kind)).point)
        try:
            found = compile_bundle(opened, OPTIONS)
        except ResourceError as error:
            assert error.exit_code == 6 and "bytes free there" in error.message
        else:
            assert engine_cache.read_intact(found.path) == found.record
            break
        assert (
            not [name for name in names(opened.path / ENGINES) if name.startswith(".")]
            if (opened.path / ENGINES).exists()
            else True
        )
        shutil.rmtree(opened.path / ENGINES, ignore_errors=True)
    assert 10 < number < 30 and len(fault.passed) >= number - 1


def test_d1_too_little_disk(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr("sdrt.files.publish.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ResourceError, match=r"the engine needs about [\d,]+ bytes, 1,000,000 are free") as raised:
        compile_bundle(open_bundle(small_bundle), OPTIONS)
    stored = open_bundle(small_bundle).manifest.files[WEIGHTS].size_bytes
    assert f"{2 * stored + compiling._MARGIN_BYTES + (1 << 20):,}" in raised.value.message


def test_d1_a_disk_that_fills_up_while_onnxruntime_writes(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's limit on the size of a file stands in for the disk."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or what is imported under the limit stays cut off
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    opened = open_bundle(copied(small_bundle, tmp_path / "a.sdrt"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(
            ResourceError,
            match=r"text_encoder: ONNX Runtime cannot write the whole model to .*, [\d,]+ bytes free there",
        ):
            compile_bundle(opened, OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(opened.path / ENGINES) == []


def test_i1_a_killed_compilation_leaves_nothing_that_stays(
    small_bundle: Path, report: CompileReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(small_bundle, tmp_path / "a.sdrt")
    code = (
        "import sdrt.compile.worker as w, time; w.save_model = lambda *a: (print('there', flush=True), time.sleep(60));"
        " from sdrt.cli.app import app; app()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-c", code, "compile", str(copy), "--target", "onnxruntime"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        process.kill()
    (left,) = names(copy / ENGINES)
    assert left.startswith(f".{report.path.name}-")
    monkeypatch.setattr(worker, "save_model", from_(report.path))
    compile_bundle(open_bundle(copy), OPTIONS)
    assert names(copy / ENGINES) == [report.path.name]


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [
        (signal.SIGKILL, ResourceError, "most likely out of memory"),
        (signal.SIGSEGV, MachineError, "ended with exit code -11"),
    ],
)
def test_a_worker_that_dies(
    small_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: signal.Signals,
    kind: type[Exception],
    said: str,
) -> None:
    opened = open_bundle(copied(small_bundle, tmp_path / "a.sdrt"))
    start = subprocess.Popen

    def ended(command: list[str], **more: Any) -> Any:
        process = start([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(end)})"], **more)
        process.wait()
        return process

    monkeypatch.setattr(worker.subprocess, "Popen", ended)  # type: ignore[attr-defined]
    with pytest.raises(kind, match=f"text_encoder: ONNX Runtime {ort.__version__}: .*{said}"):
        compile_bundle(opened, OPTIONS)
    assert names(opened.path / ENGINES) == []


def test_a_worker_ends_with_its_caller(small_bundle: Path, tmp_path: Path) -> None:
    """ONNX Runtime itself does not look whether it should stop."""
    script = "import time, sdrt.compile.worker as w; w.save_model_here = lambda *a: time.sleep(60); w.serve()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    request = {
        "task": "save",
        "graph": STEP,
        "path": str(tmp_path / "step.fp32.onnx"),
        "folder": str(tmp_path),
        "reference": "none",
    }
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.close()
        assert process.wait(30) == -signal.SIGTERM


def test_a_saved_model_that_computes_something_else(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, scales = open_bundle(small_bundle), iter([1.0, 1.001])
    real = optimized_model.outputs_of

    def scaled(*arguments: Any) -> dict[str, Any]:
        scale = next(scales)
        return {name: array * np.float32(scale) for name, array in real(*arguments).items()}

    monkeypatch.setattr(optimized_model, "outputs_of", scaled)
    with pytest.raises(MachineError, match=r"saved a model whose latents differs by 1\.00e-03, expected at most 1e-04"):
        optimized_model.save_model(
            VAE_ENCODER, opened.graph(VAE_ENCODER, "fp32"), tmp_path, opened.file(f"reference/{VAE_ENCODER}.npz")
        )


def test_a_saved_model_gives_the_same_bytes(small_bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(small_bundle)
    made = optimized_model.save_model(STEP, opened.graph(STEP, "fp32"), tmp_path, opened.file(f"reference/{STEP}.npz"))
    assert made["exact"] is True


@pytest.mark.parametrize("name", [WEIGHTS, "graphs/step.fp32.onnx", "reference/step.npz"])
def test_a_bundle_that_changed_is_not_compiled(small_bundle: Path, tmp_path: Path, name: str) -> None:
    copy = copied(small_bundle, tmp_path / "a.sdrt")
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}: changed since the build"):
        compile_bundle(open_bundle(copy), OPTIONS)
    assert not (copy / ENGINES).exists()


def test_a_bad_option_is_told_before_anything_is_read(tmp_path: Path, small_bundle: Path) -> None:
    with pytest.raises(UsageError, match="rows: ONNX Runtime takes every shape"):
        compile_bundle(open_bundle(small_bundle), replace(OPTIONS, rows=64))
    assert EngineKey.__doc__ is not None and "any shape" in EngineKey.__doc__
