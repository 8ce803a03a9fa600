"""ONNX Runtime's CUDA provider, with the CPU in the GPU's place: the same code, on tensors that the host cannot see into,
and sessions that hold to the rules of graph capture. Then the refusals, with the real library.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from sdrt.bench.instruments import Readings
from sdrt.bundle.graphs import GRAPHS, STEP, VAE_DECODER
from sdrt.cli.app import app
from sdrt.errors import MachineError, ResourceError, SdrtError, UsageError
from sdrt.machine import doctor
from sdrt.machine.doctor import MISMATCHED, WORKS
from sdrt.machine.gpus import Gpu, Gpus
from sdrt.runtime import Pipeline, backend
from sdrt.runtime.backends.onnxruntime_cuda import engine as engine_module
from sdrt.runtime.backends.onnxruntime_cuda import model

ADA = Gpus((Gpu("NVIDIA GeForce RTX 4090", "sm_89"),), "13.0", "")
WORKING = doctor.Backend("onnxruntime-cuda", WORKS, "ran a model", "")
QUICK: dict[str, Any] = {"steps": 3, "cfg": 3.0, "seed": 5}
NAMES = itertools.count()


class Session:
    """A session that holds to the rules of graph capture: one thread, one binding a number, buffers as they were. A
    number's first run is made three times, as ONNX Runtime does to capture.
    """

    made: ClassVar[list[Session]] = []
    broken = 0
    """This run of a binding fails, counted from now; 0 is none."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.graphs, self.threads = inner, {}, set()
        self.runs: Counter[str] = Counter()
        Session.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, outputs: Any, inputs: Any, options: Any) -> Any:
        self.threads.add(threading.get_ident())
        assert options.get_run_config_entry("gpu_graph_id") == "-1"
        self.runs["plain"] += 1
        return self.inner.run(outputs, inputs, options)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.threads.add(threading.get_ident())
        Session.broken = max(0, (left := Session.broken) - 1)
        if left == 1:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        number = int(options.get_run_config_entry("gpu_graph_id"))
        assert number != 0, "reserved"
        if number == -1:
            self.runs["plain"] += 1
            self.inner.run_with_iobinding(binding, options)
        elif number in self.graphs:
            assert self.graphs[number] is binding
            self.runs["replayed"] += 1
            self.inner.run_with_iobinding(binding, options)
        else:
            self.graphs[number] = binding
            self.runs["captured"] += 1
            for _ in range(3):
                self.inner.run_with_iobinding(binding, options)


class Tensors:
    """`OrtValue` on a device that shares no memory with the host."""

    def ortvalue_from_shape_and_type(self, shape: Any, dtype: Any, device: str, number: int) -> Any:
        assert device == "cpu" and number == 0
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, number)
        if np.dtype(dtype).kind == "f":
            value.update_inplace(np.full(shape, np.nan, dtype))
        return value


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's provider and memory under the names of CUDA's."""
    library = SimpleNamespace(
        **{name: getattr(onnxruntime, name) for name in ("SessionOptions", "RunOptions", "__version__")},
        OrtValue=Tensors(),
        InferenceSession=lambda *args, **kwargs: Session(onnxruntime.InferenceSession(*args, **kwargs)),
    )
    monkeypatch.setattr(model, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(model, "DEVICE", "cpu")
    monkeypatch.setattr(model, "import_with_gpu", lambda device: (library, ADA.found[device]))
    monkeypatch.setattr(Session, "made", [])
    monkeypatch.setattr(Session, "broken", 0)


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch, stand_in: None) -> None:
    """The arithmetic of the CPU's own backend, so that pictures can be equal."""
    monkeypatch.setattr(engine_module, "_precisions", lambda bundle: dict.fromkeys(GRAPHS, "fp32"))


@pytest.fixture(scope="module")
def cpu(small_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small_bundle, backend="onnxruntime") as pipeline:
        yield pipeline


def load(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle, backend="onnxruntime-cuda")


class Counting:
    """An observer that counts."""

    def __init__(self, pipe: Pipeline) -> None:
        self.calls: Counter[str] = Counter()
        engine: Any = pipe._engine
        engine.watched.observer = self

    def count(self, what: str) -> None:
        self.calls[what] += 1


# The same pictures


@pytest.mark.usefixtures("in_float32")
def test_pictures_are_those_of_the_cpu(small_bundle: Path, cpu: Pipeline) -> None:
    """Samplers with one register and with several, more rows than a slot holds, batches, prompts that change."""
    with load(small_bundle) as pipe:
        for prompt, settings in (
            ("fox", {}),
            ("fox", {"sampler": "dpmpp_2m", "steps": 4}),
            ("fox", {"sampler": "lms", "steps": 5}),
            ("fox", {"sampler": "heun", "steps": 70}),
            ("fox", {"count": 3, "batch": 2}),
            ("[fox:cat:2] in the sun", {"steps": 4}),
            ("a AND b", {"size": (96, 64)}),
        ):
            asked = QUICK | settings
            found = pipe(prompt, **asked)
            assert np.abs(found.images.astype(int) - cpu(prompt, **asked).images.astype(int)).max() <= 1, (
                prompt,
                asked,
            )
            assert found.engine["cuda_graphs"] is True
    assert len({thread for session in Session.made for thread in session.threads}) == 1
    step = next(session for session in Session.made if session.graphs)
    assert step.runs["plain"] == 0 and step.runs["captured"] == len(step.graphs)


@pytest.mark.usefixtures("in_float32")
def test_image_to_image(small_bundle: Path, cpu: Pipeline) -> None:
    image = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    asked = QUICK | {"init_image": image, "strength": 0.7}
    with load(small_bundle) as pipe:
        found, expected = pipe("fox", **asked).images, cpu("fox", **asked).images
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.usefixtures("stand_in")
def test_float16_graphs(small_bundle: Path, cpu: Pipeline) -> None:
    with load(small_bundle) as pipe:
        found = pipe("fox", **QUICK)
    assert found.engine["compute"] == "fp16" and found.engine["device"] == ADA.found[0].name
    assert np.abs(found.images.astype(int) - cpu("fox", **QUICK).images.astype(int)).max() <= 16


@pytest.mark.usefixtures("stand_in")
def test_each_component_has_its_own_precision(small_xl_bundle: Path, small_bundle: Path) -> None:
    """SDXL's VAE overflows in float16."""
    with load(small_xl_bundle) as pipe:
        engine: Any = pipe._engine
        assert (engine._precisions[STEP], engine._precisions[VAE_DECODER]) == ("fp16", "fp32")
        assert pipe("fox", **QUICK | {"steps": 2}).images.std() > 0


@pytest.mark.usefixtures("in_float32")
def test_joining_touches_no_other_slot(small_bundle: Path, cpu: Pipeline) -> None:
    """A picture joins while another runs: what that one has fed back is on the device alone."""
    jobs: list[Any] = []

    class Kept:
        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def join(self, job: Any) -> Any:
            jobs.append(job)
            return self.batch.join(job)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.batch, name)

    engine: Any = cpu._engine
    opened = engine.open
    engine.open = lambda shape, capacity: Kept(opened(shape, capacity))
    try:
        cpu("fox", **QUICK)
        cpu("cat", **QUICK | {"seed": 6})
    finally:
        del engine.open
    with load(small_bundle) as pipe:
        latents = []
        for on in (engine, pipe._engine):
            batch = on.open(jobs[0].shape, 2)
            first = batch.join(jobs[0])
            batch.step()
            second = batch.join(jobs[1])
            for _ in range(3):
                batch.step()
            latents.append((batch.latents([first, second]), batch.denoised([first, second])))
            batch.close()
        for found, expected in zip(latents[1], latents[0], strict=True):
            assert np.isfinite(found).all() and np.allclose(found, expected, atol=1e-4)


# What is copied and launched


@pytest.mark.usefixtures("in_float32")
def test_counts_of_a_picture(small_bundle: Path) -> None:
    """Once its shape was met: nothing is allocated, and no copy comes between the first step and the last."""
    with load(small_bundle) as pipe:
        pipe("fox", **QUICK)
        counting = Counting(pipe)
        engine: Any = pipe._engine
        inputs = len(engine.signatures[STEP].inputs)
        for prompt, steps in (("cat", 3), ("dog", 6)):
            counting.calls.clear()
            pipe(prompt, **QUICK | {"steps": steps})
            # tokens, latents and rounding beside the step's inputs, each once; context, registers, pixels and finite
            assert counting.calls == {"launches": steps + 2, "h2d": inputs + 3, "d2h": 4}
        counting.calls.clear()
        pipe("[cat:dog:2]", **QUICK | {"steps": 4})  # both encoded before; one copy where the prompt changes
        assert counting.calls == {"launches": 4 + 1, "h2d": inputs + 2 + 1, "d2h": 3}


@pytest.mark.usefixtures("in_float32")
def test_a_benchmark_counts_them(small_bundle: Path) -> None:
    """There are no device times: ONNX Runtime's stream is its own."""
    readings = Readings()
    with Pipeline.load(small_bundle, backend="onnxruntime-cuda", observe=readings.observe) as pipe:
        pipe("fox", **QUICK)
        readings.reset()
        pipe("cat", **QUICK)
    assert readings.device is None and readings.calls["launches"] == QUICK["steps"] + 2 and len(readings.steps) == 3


@pytest.mark.usefixtures("in_float32")
def test_steps_are_used_again(small_bundle: Path) -> None:
    with load(small_bundle) as pipe:
        engine: Any = pipe._engine
        for _ in range(3):
            pipe("fox", **QUICK)
        step = next(session for session in Session.made if session.graphs)
        assert sorted(step.graphs) == [1, 2] and step.runs["captured"] == 2
        shape = engine._idle[0].shape
        held = [engine.open(shape, capacity) for capacity in range(1, 7)]
        for batch in held:
            batch.close()
        with pytest.raises(UsageError, match="passed already"):
            held[0].step()
        engine.open(shape, 7).close()
        assert len(engine._idle) == 4 and engine._idle[-1].capacity == 7


@pytest.mark.usefixtures("in_float32")
def test_graphs_end_somewhere(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session keeps every graph it captures, so batches of ever new shapes run without one in the end."""
    monkeypatch.setattr(engine_module, "_MOST_GRAPHS", 2)
    with load(small_bundle) as pipe:
        pipe("fox", **QUICK)
        pipe("fox", **QUICK | {"size": (96, 64)})
    step = next(session for session in Session.made if session.graphs)
    assert step.runs["captured"] == 2 and step.runs["plain"] == 3


# What goes wrong


@pytest.mark.usefixtures("in_float32")
def test_a_capture_fails(small_bundle: Path, cpu: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with load(small_bundle) as pipe:
        Session.broken = 2
        result = pipe("fox", **QUICK)
        assert result.engine["cuda_graphs"] is False
        assert "CUDA graphs are off: capturing failed: CUDA failure 900" in caplog.text
        assert np.abs(result.images.astype(int) - cpu("fox", **QUICK).images.astype(int)).max() <= 1
        Session.broken = 2
        with pytest.raises(MachineError, match=r"step: ONNX Runtime .* failed on the GPU: CUDA failure 900"):
            pipe("fox", **QUICK)
        assert pipe("fox", **QUICK).images.shape == result.images.shape


@pytest.mark.usefixtures("in_float32")
def test_no_memory(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle steps are given up first; then the request fails, and a smaller one works."""
    with load(small_bundle) as pipe:
        engine: Any = pipe._engine
        pipe("fox", **QUICK)
        made = engine.library.OrtValue.ortvalue_from_shape_and_type

        def once_idle_are_gone(*args: Any) -> Any:
            if engine._idle:
                raise RuntimeError("CUDA failure 2: out of memory")
            return made(*args)

        def never(*args: Any) -> Any:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 9")

        for allocate in (once_idle_are_gone, never):
            with monkeypatch.context() as patch:
                patch.setattr(engine.library.OrtValue, "ortvalue_from_shape_and_type", allocate, raising=False)
                if allocate is never:
                    with pytest.raises(ResourceError, match="step: out of memory on the GPU") as caught:
                        pipe("fox", **QUICK | {"size": (128, 64)})
                    assert caught.value.fix == "Choose a smaller --size or --batch."
                else:
                    pipe("fox", **QUICK | {"size": (96, 64)})
        assert pipe("fox", **QUICK).images.shape == (1, 64, 64, 3)


FORKED = """
import os, warnings
from sdrt.runtime.backends.onnxruntime_cuda.model import on_device
warnings.simplefilter("ignore")  # of threads that a fork leaves behind
assert on_device(lambda: 1) == 1
if not (child := os.fork()):
    os._exit(on_device(lambda: 7))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_a_forked_process_has_its_own_thread() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


# No step down to the CPU


def refused(match: str, load: Any, kind: type[SdrtError] = MachineError) -> str:
    with pytest.raises(kind, match=match) as caught:
        load()
    return caught.value.fix


def test_the_real_library_draws_nothing_on_the_cpu(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's ONNX Runtime is asked for CUDA, and takes the CPU without an error."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is the package with the provider")
    refused("onnxruntime-gpu is not installed", lambda: load(small_bundle))
    monkeypatch.setattr(model, "import_with_gpu", lambda device: (onnxruntime, ADA.found[device]))
    fix = refused("ONNX Runtime took CPUExecutionProvider instead of CUDAExecutionProvider", lambda: load(small_bundle))
    assert fix.startswith("Run: sdrt doctor")


def places(*parts: tuple[str, str]) -> Any:
    """A session whose nodes lie where `parts` say: provider and operator."""
    return SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_provider_graph_assignment_info=lambda: [
            SimpleNamespace(
                ep_name=provider, get_nodes=lambda kind=kind: [SimpleNamespace(op_type=kind, name=f"n{next(NAMES)}")]
            )
            for provider, kind in parts
        ],
    )


def library(made: Any) -> Any:
    """An ONNX Runtime that makes this session, but none that may capture if it computes on the CPU."""

    def session(path: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        [(provider, chosen)] = providers
        assert provider == "CUDAExecutionProvider" and not enable_fallback and chosen["device_id"] == 1
        computing = [part for part in made.get_provider_graph_assignment_info() if part.ep_name != provider]
        if chosen["enable_cuda_graph"] and [
            node for part in computing for node in part.get_nodes() if node.op_type != "Div"
        ]:
            raise RuntimeError(
                "This session cannot use the graph capture feature as requested by the user as all compute"
            )
        return made

    return SimpleNamespace(SessionOptions=onnxruntime.SessionOptions, InferenceSession=session, __version__="1.31.1")


def test_nodes_on_the_cpu_are_named() -> None:
    cuda, cpu, path = "CUDAExecutionProvider", "CPUExecutionProvider", Path("step.fp16.onnx")
    fine = places((cuda, "Conv"), (cpu, "Div"))
    assert model.open_session(library(fine), path, 1) is fine
    fix = refused(
        r"step.fp16.onnx: ONNX Runtime has no CUDA kernel here for Attention n\d+, Resize n\d+, and would compute on",
        lambda: model.open_session(library(places((cuda, "Conv"), (cpu, "Attention"), (cpu, "Resize"))), path, 1),
    )
    assert fix == "Install a newer version: pip install --upgrade 'onnxruntime-gpu>=1.25'"
    many = places(*[(cpu, "Conv")] * 8)
    refused("and 3 more, and would compute", lambda: model.open_session(library(many), path, 1))
    # A session that may capture, and yet has one: the list is read all the same.
    quiet = places((cpu, "Conv"))
    lenient = SimpleNamespace(
        SessionOptions=onnxruntime.SessionOptions, InferenceSession=lambda *_, **__: quiet, __version__="1.31.1"
    )
    refused("no CUDA kernel here for Conv", lambda: model.open_session(lenient, path, 1))
    # Copies between the two, of nodes that are all allowed.
    refused(
        "failed on the GPU: This session cannot use the graph capture",
        lambda: model.open_session(library(places((cpu, "Add"))), path, 1),
    )


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = ADA
    monkeypatch.setattr(model, "probe_gpus", lambda: gpus)
    for state in (
        doctor.Backend("onnxruntime-cuda", MISMATCHED, "missing libcudnn.so.9", "pip install 'x'"),
        doctor.Backend("onnxruntime-cuda", MISMATCHED, "onnxruntime and onnxruntime-gpu overwrite each other", "pip u"),
    ):
        monkeypatch.setattr(doctor, "probe_onnxruntime_cuda", lambda gpus, state=state: state)
        assert refused(f"backend onnxruntime-cuda: {state.detail}", lambda: model.import_with_gpu(0)) == state.fix
    monkeypatch.setattr(doctor, "probe_onnxruntime_cuda", lambda gpus: WORKING)
    refused("device 1: 1 GPUs answer", lambda: model.import_with_gpu(1), UsageError)
    assert model.import_with_gpu(0) == (onnxruntime, ADA.found[0])


# What `auto` takes, and what is compiled


def test_auto_takes_it_only_where_it_runs(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from sdrt.bundle.folder import open_bundle

    bundle, gpus, found = open_bundle(small_bundle), Gpus((), "", "no driver"), WORKING
    asked: list[str] = []
    monkeypatch.setattr(backend, "probe_gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "probe_onnxruntime_cuda", lambda _: asked.append("probe") or found)
    assert backend._best(bundle) == "onnxruntime"
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").touch()
    monkeypatch.setattr(backend, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    assert backend._best(bundle) == "onnxruntime" and not asked
    gpus = ADA
    assert backend._best(bundle) == "onnxruntime-cuda" and not caplog.text
    found = doctor.Backend("onnxruntime-cuda", MISMATCHED, "missing libcudnn.so.9", "pip install 'x'")
    assert backend._best(bundle) == "onnxruntime"
    assert "a GPU answers, but it does not run: missing libcudnn.so.9. pip install 'x'" in caplog.text


def test_nothing_is_compiled(small_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(small_bundle, tmp_path / "b.sdrt")
    result = CliRunner().invoke(app, ["compile", str(bundle), "--target", "onnxruntime-cuda"])
    assert result.exit_code == 2 and "nothing is to be compiled: ONNX Runtime on a GPU takes a bundle" in result.stderr
    assert "--backend onnxruntime-cuda" in result.stderr and not (bundle / "engines").exists()
