"""Every name of the GPU libraries that sdrt's code uses exists in the real ones, with parameters that take the call.

The code is read, not run: its attributes and calls on objects of TensorRT and `cuda.core` are looked up in the bindings
of enterprise TensorRT, in TensorRT-RTX and in `cuda.core`. Enterprise TensorRT's libraries cannot be installed
everywhere; its bindings load over empty libraries that the C compiler makes here, enough to look at classes, not to
call them.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

Surface = dict[str, dict[str, str]]
"""Classes of a library: the documentation of each attribute by name. Pybind writes signatures there."""

# What the objects of each file are: an expression as the file writes it, and its class. `trt` is the module itself.
TENSORRT = {
    "compile/tensorrt_network.py": {
        "trt": "trt",
        "compiler.trt": "trt",
        "builder": "Builder",
        "parsed.builder": "Builder",
        "network": "INetworkDefinition",
        "parsed.network": "INetworkDefinition",
        "parser": "OnnxParser",
        "first": "ParserError",
        "config": "IBuilderConfig",
        "config.get_timing_cache()": "ITimingCache",
        "made": "IOptimizationProfile",
        "tensor": "ITensor",
        "query": "ITensor",
        "key": "ITensor",
        "whole": "ITensor",
        "part": "ISliceLayer",
        "scores": "IMatrixMultiplyLayer",
        "weights": "ISoftMaxLayer",
        "product": "IMatrixMultiplyLayer",
        "together": "IConcatenationLayer",
        "layer": "IAttentionInputLayer",
        "attention": "IAttention",
        "compiler.trt.Runtime(log)": "Runtime",
        "engine": "ICudaEngine",
    },
    "compile/watch.py": {"trt": "trt"},
    "machine/tensorrt_messages.py": {"trt": "trt"},
    "runtime/backends/tensorrt/plans.py": {
        "self._trt": "trt",
        "self._runtime": "Runtime",
        "engine": "ICudaEngine",
        "config": "IRuntimeConfig",
        "context": "IExecutionContext",
    },
    "runtime/backends/tensorrt/kernels.py": {"config": "IRuntimeConfig", "self._cache": "IRuntimeCache"},
    "runtime/backends/tensorrt/step.py": {"context": "IExecutionContext"},
    "runtime/backends/tensorrt/picture.py": {"context": "IExecutionContext"},
    "bench/layers_tensorrt.py": {
        "trt": "trt",
        "plans.library": "trt",
        "context": "IExecutionContext",
        "context.engine": "ICudaEngine",
        "inspector": "EngineInspector",
    },
}
CUDA_CORE = {
    "compile/tensorrt_network.py": {"Device(compiler.gpu)": "Device"},
    "runtime/backends/tensorrt/plans.py": {
        "self._cuda": "cuda",
        "self._device": "Device",
        "self.stream": "Stream",
        "stream": "Stream",
    },
    "runtime/backends/tensorrt/step.py": {
        "plans.stream": "Stream",
        "self._plans.stream": "Stream",
        "stream": "Stream",
        "graph": "Graph",
        "event": "Event",
    },
    "runtime/backends/tensorrt/capture.py": {
        "plans.stream": "Stream",
        "builder": "GraphBuilder",
        "builder.end_building()": "GraphBuilder",
        "graph": "Graph",
    },
    "runtime/backends/tensorrt/picture.py": {"stream": "Stream", "plans.stream": "Stream", "self._graph": "Graph"},
    "bench/device_times.py": {"cuda": "cuda", "stream": "Stream"},
    "bench/layers_tensorrt.py": {"plans.stream": "Stream"},
    "bench/throttle.py": {"engine.plans.cuda.Device(device)": "Device"},
    "runtime/backends/tensorrt/blocks.py": {
        "cuda": "cuda",
        "self._cuda": "cuda",
        "device": "Device",
        "cuda.LegacyPinnedMemoryResource()": "LegacyPinnedMemoryResource",
        "self._cuda.Buffer": "Buffer",
        "self._device": "Buffer",
        "self._pinned": "Buffer",
        "self._buffer": "Buffer",
        "buffer": "Buffer",
        "host": "Buffer",
    },
}
BINDINGS = {
    "runtime/backends/tensorrt/plans.py": {"driver": "driver"},
    "machine/gpus.py": {"runtime": "runtime"},
    "bench/throttle.py": {"nvml": "nvml"},
}

# Behind a check in the code: TensorRT-RTX has these, enterprise TensorRT does not.
RTX_ONLY = {
    "trt.BuilderFlag.REQUIRE_USER_ALLOCATION",
    "trt.ComputeCapability",
    "trt.DynamicShapesKernelSpecializationStrategy",
    "trt.DynamicShapesKernelSpecializationStrategy.EAGER",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "trt.EngineInvalidityDiagnostics",
    "trt.EngineInvalidityDiagnostics.__members__",
    "trt.EngineValidity",
    "trt.EngineValidity.INVALID",
    "Runtime.engine_header_size",
    "Runtime.get_engine_validity",
    "IExecutionContext.is_stream_capturable",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
}


@dataclass(frozen=True)
class Use:
    """A name the code uses: Class.attribute, or trt.Enum.member; and the call, if it is called."""

    name: str
    where: str
    call: ast.Call | None


def uses(file: str, objects: dict[str, str]) -> Iterator[Use]:
    """Every attribute of the named objects in a file."""
    tree = ast.parse((ROOT / "sdrt" / file).read_text(encoding="utf-8"))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        where = f"{file}:{node.lineno}"
        if owner in objects:
            yield Use(f"{objects[owner]}.{node.attr}", where, calls.get(id(node)))
        elif isinstance(node.value, ast.Attribute) and objects.get(ast.unparse(node.value.value)) in (
            "trt",
            "runtime",
            "driver",
            "nvml",
        ):
            yield Use(
                f"{objects[ast.unparse(node.value.value)]}.{node.value.attr}.{node.attr}", where, calls.get(id(node))
            )


def all_uses(table: dict[str, dict[str, str]]) -> list[Use]:
    found = [use for file, objects in table.items() for use in uses(file, objects)]
    return [use for use in found if not use.name.endswith((".__class__", ".__name__", ".__version__"))]


# Libraries


LIST_SURFACE = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
surface = {"trt": {}}
for name in dir(trt):
    value = getattr(trt, name)
    surface["trt"][name] = getattr(value, "__doc__", None) or ""
    if isinstance(value, type):
        surface[name] = {}
        for attribute in dir(value):
            try:
                surface[name][attribute] = getattr(getattr(value, attribute), "__doc__", None) or ""
            except Exception:
                surface[name][attribute] = ""
print(json.dumps(surface))
"""


def list_surface(module: str, **environment: str) -> Surface:
    done = subprocess.run(
        [sys.executable, "-c", LIST_SURFACE, module], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


STUBS = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries of TensorRT's names whose functions do nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "a C compiler is needed: apt-get install gcc"
    folder = tmp_path_factory.mktemp("stubs")
    for name, functions in STUBS.items():
        source = folder / f"{name}.c"
        source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions))
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)], check=True
        )
    return folder


@pytest.fixture(scope="module")
def enterprise(stubs: Path) -> Surface:
    return list_surface("tensorrt_bindings", LD_LIBRARY_PATH=str(stubs))


@pytest.fixture(scope="module")
def rtx() -> Surface:
    return list_surface("tensorrt_rtx")


def test_the_bindings_need_their_libraries() -> None:
    """So what the tests below read is the real thing, and sdrt's own import of TensorRT fails where only the bindings
    are there.
    """
    done = subprocess.run([sys.executable, "-c", "import tensorrt_bindings"], capture_output=True, text=True)
    assert done.returncode == 1 and re.search(
        r"ImportError: lib\w+\.so\.11: cannot open shared object file", done.stderr
    )
    assert subprocess.run([sys.executable, "-c", "import tensorrt"], capture_output=True).returncode == 1


# Names


def test_the_code_is_read() -> None:
    """A renamed variable must not silently empty the tables above."""
    for table in (TENSORRT, CUDA_CORE, BINDINGS):
        for file, objects in table.items():
            tree = ast.parse((ROOT / "sdrt" / file).read_text(encoding="utf-8"))
            written = {ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert set(objects) <= written, (file, set(objects) - written)
    names = {use.name for use in all_uses(TENSORRT)}
    assert names >= RTX_ONLY
    assert {
        "trt.DataType.FLOAT",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.device_memory_size_v2",
        "IBuilderConfig.progress_monitor",
    } <= names
    assert len(names) > 50
    assert {
        "IExecutionContext.report_to_profiler",
        "IExecutionContext.enqueue_emits_profile",
        "EngineInspector.get_engine_information",
    } <= names
    assert {
        "GraphBuilder.begin_building",
        "Stream.sync",
        "Buffer.from_handle",
        "Event.is_done",
        "cuda.EventOptions",
    } <= {use.name for use in all_uses(CUDA_CORE)}


@pytest.mark.parametrize(
    "file",
    [
        "compile/tensorrt_network.py",
        "compile/watch.py",
        "machine/tensorrt_messages.py",
        "compile/tensorrt.py",
        "compile/worker.py",
        "bench/device_times.py",
        "bench/layers_tensorrt.py",
        *(
            f"runtime/backends/tensorrt/{name}.py"
            for name in ("engine", "step", "picture", "capture", "plans", "kernels", "blocks")
        ),
    ],
)
def test_modules_are_not_used_under_other_names(file: str) -> None:
    """Every mention of a library's module goes through an expression that the tables know."""
    known = {
        name for table in (TENSORRT, CUDA_CORE) for name, kind in table.get(file, {}).items() if kind in ("trt", "cuda")
    }
    tree = ast.parse((ROOT / "sdrt" / file).read_text(encoding="utf-8"))
    found = {
        ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"(.*[._])?(trt|cuda)", ast.unparse(node.value))
    }
    assert found <= known


def missing(surface: Surface, found: list[Use]) -> dict[str, str]:
    """Uses that a library does not know, and where they are."""
    return {use.name: use.where for use in found if not has(surface, use.name)}


def has(surface: Surface, name: str) -> bool:
    parts = name.split(".")
    if len(parts) == 3:  # trt.Enum.member
        return parts[1] in surface["trt"] and parts[2] in surface.get(parts[1], {})
    return parts[1] in surface.get(parts[0], {})


def test_tensorrt_rtx_has_every_name(rtx: Surface) -> None:
    assert missing(rtx, all_uses(TENSORRT)) == {}


def test_enterprise_tensorrt_has_every_name_but_those_of_rtx(enterprise: Surface) -> None:
    assert missing(enterprise, all_uses(TENSORRT)).keys() == RTX_ONLY


def test_a_name_that_does_not_exist_is_found(enterprise: Surface, rtx: Surface) -> None:
    """The check would fail, as it would for what TensorRT 10 had."""
    for surface in (enterprise, rtx):
        for name in (
            "IExecutionContext.execute_async_v2",
            "trt.BuilderFlag.FP16",
            "trt.NoSuchThing",
            "ICudaEngine.device_memory_size",
            "Nothing.at_all",
        ):
            assert not has(surface, name)


def test_rtx_only_names_are_checked_for(enterprise: Surface) -> None:
    """Nothing runs unguarded on enterprise TensorRT: each RTX-only name stands behind a check of the class or of the
    target. A runtime cache exists only where the call that makes it does.
    """
    for use in all_uses(TENSORRT):
        if use.name in RTX_ONLY and not use.name.startswith("IRuntimeCache."):
            file, line = use.where.split(":")
            before = "\n".join(
                (ROOT / "sdrt" / file).read_text(encoding="utf-8").splitlines()[max(0, int(line) - 9) : int(line)]
            )
            assert re.search(r"hasattr\(|compiler\.sms|build_flags", before), use.where


# Parameters


def signatures(documentation: str) -> list[list[tuple[str, bool]]]:
    """The parameters of each overload in a pybind docstring: name, and whether it has a default; self left out."""
    found = []
    for line in documentation.splitlines():
        match = re.match(r"(?:\d+\. )?\w+\((.*)\)(?: -> |$)", line)
        if match is None:
            continue
        parameters, depth, start = [], 0, 0
        text = match[1] + ","
        for i, character in enumerate(text):
            depth += (character in "([{") - (character in ")]}")
            if character == "," and depth == 0:
                part = text[start:i].strip()
                start = i + 1
                if part and part not in ("/", "*") and not part.startswith("self"):
                    parameters.append((re.split(r"[:=]", part)[0].strip(), "=" in part))
        found.append(parameters)
    return found


def accepts(parameters: list[tuple[str, bool]], call: ast.Call) -> bool:
    """Whether a call's arguments fit. A star may stand for any number."""
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return len(call.args) - 1 <= len(parameters)
    given = {keyword.arg for keyword in call.keywords}
    names = [name for name, _ in parameters]
    if len(call.args) > len(parameters) or not given <= set(names[len(call.args) :]):
        return False
    return all(name in given or default for name, default in parameters[len(call.args) :])


def wrong_calls(surface: Surface, found: list[Use]) -> list[str]:
    wrong = []
    for use in found:
        if use.call is None or not has(surface, use.name):
            continue
        parts = use.name.split(".")
        documentation = surface[parts[-2]].get(parts[-1], "")
        if parts[0] == "trt" and len(parts) == 2:  # a class: its constructor
            documentation = surface.get(parts[1], {}).get("__init__", "")
        overloads = signatures(documentation)
        if overloads and not any(accepts(parameters, use.call) for parameters in overloads):
            wrong.append(f"{use.where}: {use.name}: {ast.unparse(use.call)} does not fit {overloads}")
    return wrong


def test_calls_fit_tensorrt(enterprise: Surface, rtx: Surface) -> None:
    for surface in (enterprise, rtx):
        assert wrong_calls(surface, all_uses(TENSORRT)) == []


def test_calls_are_compared(enterprise: Surface) -> None:
    """Signatures are there to compare with, and a call that does not fit is found."""
    checked = [use for use in all_uses(TENSORRT) if use.call is not None and has(enterprise, use.name)]
    known = [use for use in checked if signatures(enterprise[use.name.split(".")[-2]].get(use.name.split(".")[-1], ""))]
    assert len(known) > 20 and len(known) > 0.6 * len(checked)
    for text in ("c.set_input_shape('a')", "c.set_input_shape('a', (1,), 3)", "c.set_input_shape(name='a', no_such=1)"):
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        assert wrong_calls(enterprise, [Use("IExecutionContext.set_input_shape", "here", call)])


def test_callbacks_have_the_libraries_parameters(enterprise: Surface, rtx: Surface) -> None:
    """TensorRT calls what we override."""
    for surface in (enterprise, rtx):
        assert {"phase_start", "step_complete", "phase_finish"} <= surface["IProgressMonitor"].keys()
        assert len(signatures(surface["IProgressMonitor"]["phase_start"])[0]) == 3
        assert len(signatures(surface["IProgressMonitor"]["step_complete"])[0]) == 2
        assert len(signatures(surface["IProgressMonitor"]["phase_finish"])[0]) == 1
        assert len(signatures(surface["ILogger"]["log"])[0]) == 2
        assert [name for name, _ in signatures(surface["IProfiler"]["report_layer_time"])[0]] == ["layer_name", "ms"]


def test_a_profiler_can_be_derived() -> None:
    """As the code does it, on the real class; a context to give it to needs a GPU."""
    import tensorrt_rtx

    class Profiler(tensorrt_rtx.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt_rtx.IProfiler.__init__(self)
            self.told: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.told.append((layer_name, ms))

    profiler = Profiler()
    profiler.report_layer_time("a", 1.0)
    assert profiler.told == [("a", 1.0)]
    properties = vars(tensorrt_rtx.IExecutionContext)
    assert properties["profiler"].fset is not None and properties["enqueue_emits_profile"].fset is not None


# cuda.core and cuda.bindings


def cuda_class(name: str) -> Any:
    import cuda.core
    from cuda.core import graph

    return cuda.core if name == "cuda" else getattr(cuda.core, name, None) or getattr(graph, name)


def test_cuda_core_has_every_name() -> None:
    absent = {
        use.name: use.where
        for use in all_uses(CUDA_CORE)
        if not hasattr(cuda_class(use.name.split(".")[0]), use.name.split(".")[1])
    }
    assert absent.keys() <= {"Device.copy_from"}  # a buffer that the code calls device


def test_calls_fit_cuda_core() -> None:
    wrong, checked = [], 0
    for use in all_uses(CUDA_CORE):
        owner, attribute = use.name.split(".")
        if use.call is None or not hasattr(cuda_class(owner), attribute):
            continue
        try:
            signature = inspect.signature(getattr(cuda_class(owner), attribute))
        except (TypeError, ValueError):
            continue
        method = [name for name in signature.parameters if name not in ("self", "cls")]
        optional = {name for name in method if signature.parameters[name].default is not inspect.Parameter.empty}
        keyword_only = {name for name in method if signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY}
        if any(
            signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            for name in method
        ):
            continue
        checked += 1
        positional = [name for name in method if name not in keyword_only]
        parameters = [(name, name in optional) for name in positional] + [
            (name, name in optional) for name in keyword_only
        ]
        if len(use.call.args) > len(positional) or not accepts(parameters, use.call):
            wrong.append(f"{use.where}: {ast.unparse(use.call)} does not fit {signature}")
    assert wrong == []
    assert checked > 10


def test_cuda_bindings_have_every_name() -> None:
    from cuda.bindings import driver, nvml, runtime

    modules = {"runtime": runtime, "driver": driver, "nvml": nvml}
    for use in all_uses(BINDINGS):
        value: Any = modules[use.name.split(".")[0]]
        for part in use.name.split(".")[1:]:
            assert hasattr(value, part), use
            value = getattr(value, part)


def test_reasons_of_throttling_have_nvmls_numbers() -> None:
    from cuda.bindings import nvml

    from sdrt.bench.throttle import SLOWING

    real = {int(member) for name, member in nvml.ClocksEventReasons.__members__.items() if "SLOWDOWN" in name}
    assert set(SLOWING.values()) == real, "slowdowns by hardware, heat and power brake"
    assert int(nvml.ClocksEventReasons.EVENT_REASON_SW_POWER_CAP) == 0x4
