"""What imports what: the runtime runs without torch, neither side names the other, only the command prints, and nothing opens a socket."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINT, LORA, ROOT

PACKAGE = ROOT / "sdrt"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
COMMAND = [file for file in FILES if file.startswith("cli") or file == "__main__.py"]
BUILD_ONLY = ("torch", "transformers", "tokenizers", "huggingface_hub", "diffusers", "peft", "safetensors", "onnx", "onnxscript", "onnx_ir")

# Refuses the packages of a build, and every use of a socket.
LOCKED_DOWN = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BUILD_ONLY!r}:
            raise ImportError(name + " is not for the runtime")
sys.meta_path.insert(0, Refuse())
def audit(event, arguments):
    if event.startswith("socket."):
        raise AssertionError(event)
sys.addaudithook(audit)
"""


def run_python(script: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Run a script in a fresh interpreter that treats warnings as errors, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", script, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(*modules: str) -> set[str]:
    """Top-level names of all modules in memory after these were imported."""
    return set(
        json.loads(
            run_python("import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(json.dumps(list(sys.modules)))", *modules)
        )
    )


def modules_of(folder: str) -> list[str]:
    return [f"sdrt.{folder}", *(f"sdrt.{folder}.{module.name}" for module in pkgutil.iter_modules([str(PACKAGE / folder)]))]


# Imports that happen


def test_the_runtime_imports_no_torch() -> None:
    modules = [*modules_of("runtime"), *modules_of("compile"), "sdrt", *modules_of("bundle"), "sdrt.errors", "sdrt.publish", "sdrt.parity", "sdrt.cli"]
    assert {"sdrt.runtime.pipeline", "sdrt.runtime.onnxruntime", "sdrt.runtime.verify", "sdrt.compile"} <= set(modules)
    loaded = imported_by(*modules)
    assert set(modules) <= loaded
    assert not loaded & {*BUILD_ONLY, "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"}
    assert not {name for name in loaded if name.startswith("sdrt.export")}


def test_the_runtime_imports_no_engine_until_it_loads_one() -> None:
    loaded = imported_by("sdrt.runtime")
    assert "sdrt.runtime.pipeline" in loaded
    assert not loaded & {"onnxruntime", "PIL", "typer", "rich", *BUILD_ONLY}


def test_inspecting_and_choosing_need_no_torch() -> None:
    """What reads headers only, and what the command imports before it knows that a file is good."""
    loaded = imported_by("sdrt.export.inspect", "sdrt.export.adapters", "sdrt.export.checkpoint", "sdrt.export.architecture", "sdrt.export.build")
    assert not loaded & {"torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime"}


def test_every_module_imports_without_a_warning() -> None:
    names = ["sdrt." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in FILES if file != "__init__.py"]
    assert set(names) <= imported_by(*names)


def test_generate_without_torch(blindbox_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    from sdrt.runtime import Pipeline

    script = LOCKED_DOWN + "from sdrt.cli import app\napp()"
    arguments = ["red apple", "--steps", "6", "--cfg", "3", "--seed", "11", "--sampler", "euler_a", "--output", "apple.png", "--json"]
    report = json.loads(run_python(script, "generate", str(blindbox_bundle), *arguments, cwd=tmp_path))
    assert report["pictures"] == [{"path": "apple.png", "seed": 11}]
    with Pipeline.load(blindbox_bundle) as pipeline:
        expected = pipeline("red apple", steps=6, cfg=3, seed=11, sampler="euler_a").images[0]
    with Image.open(tmp_path / "apple.png") as image:
        found = np.asarray(image)
    assert found.std() > 20
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_the_lock_holds() -> None:
    """The test above would fail if the runtime imported torch or opened a socket."""
    for line in (
        "import torch",
        "import onnx.helper",
        "import safetensors.numpy",
        "import socket; socket.socket()",
        "import urllib.request as u; u.urlopen('http://127.0.0.1')",
    ):
        with pytest.raises(AssertionError, match=r"not for the runtime|socket\."):
            run_python(LOCKED_DOWN + line)


# Imports that are written


def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imports(file: str) -> set[str]:
    """Absolute names of everything a file imports, at its top or inside functions: for `from a import b` both a and a.b."""
    package = ["sdrt", *Path(file).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module or ""
            found |= {parent, *(f"{parent}.{alias.name}" for alias in node.names)}
    return found


def below(names: set[str], *packages: str) -> set[str]:
    return {name for name in names for package in packages if name == package or name.startswith(package + ".")}


def calls(file: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def in_folder(folder: str) -> list[str]:
    files = [file for file in FILES if file.startswith(folder + "/")]
    assert files
    return files


def test_the_files_are_found() -> None:
    assert {"cli.py", "bundle/graphs.py", "export/build.py", "runtime/pipeline.py", "compile/__init__.py"} <= set(FILES)
    assert {"sdrt.bundle.graphs", "sdrt.export.graph", "sdrt.export.selfcheck.check"} <= imports("export/build.py")  # also those inside functions


@pytest.mark.parametrize("file", in_folder("export"))
def test_export_names_neither_runtime_nor_compile(file: str) -> None:
    assert not below(imports(file), "sdrt.runtime", "sdrt.compile", "sdrt.cli")


@pytest.mark.parametrize("file", in_folder("runtime"))
def test_runtime_names_neither_export_nor_compile(file: str) -> None:
    assert not below(imports(file), "sdrt.export", "sdrt.compile", "sdrt.cli", *BUILD_ONLY)


@pytest.mark.parametrize("file", in_folder("compile"))
def test_compile_names_no_build_package(file: str) -> None:
    assert not below(imports(file), "sdrt.cli", "torch", "transformers", "diffusers")


@pytest.mark.parametrize("file", [file for file in FILES if "/" not in file or file.startswith("bundle/")])
def test_shared_files_name_no_build_package(file: str) -> None:
    assert not below(imports(file), *BUILD_ONLY)
    if file not in COMMAND:
        assert not below(imports(file), "sdrt.export", "sdrt.runtime", "sdrt.compile", "sdrt.cli")


@pytest.mark.parametrize(
    "file", sorted({*in_folder("bundle"), "errors.py", "publish.py", *(f for f in FILES if "tandard library only" in (ast.get_docstring(tree(f)) or ""))})
)
def test_standard_library_only(file: str) -> None:
    assert {name.partition(".")[0] for name in imports(file)} <= {*sys.stdlib_module_names, "sdrt"}


@pytest.mark.parametrize("file", [file for file in FILES if file != "engine_libraries.py"])
def test_engines_are_imported_with_their_reports_switched_off(file: str) -> None:
    """Only `engine_libraries.py` imports them; what a type checker alone reads is left out."""
    unread = {node for outer in ast.walk(tree(file)) if isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING" for node in outer.body}
    lines = {node.lineno for node in unread}
    named = [node for node in ast.walk(tree(file)) if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno not in lines]
    found = {alias.name for node in named if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in named if isinstance(node, ast.ImportFrom) and not node.level}
    assert not below(found, "onnxruntime", "openvino")


def test_families_are_named_in_their_own_folder_only() -> None:
    """No other file says or compares a family's name, begins a tensor's name as one of them does, or imports one family's file."""
    own, word = (
        "export/families/",
        re.compile(r"\bsd[123x]|\bsdxl|stable diffusion [0-9x]|\bflux\b|diffusion_model\b|first_stage_model|cond_stage_model|conditioner\.", re.IGNORECASE),
    )
    offenders = []
    for file in (file for file in FILES if not file.startswith(own)):
        nodes = list(ast.walk(tree(file)))
        documented = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        said = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in documented]
        offenders += [f"{file}: {text}" for text in said if word.search(text)]
        offenders += [f"{file}: {name}" for name in imports(file) if re.search(r"families\.(?!family|table|recognise)", name)]
        compared = [n for n in nodes if isinstance(n, ast.Compare) and any(isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for op in n.ops)]
        offenders += [f"{file}: {ast.unparse(n)}" for n in compared if re.search(r"\bfamily(\.name)?\b(?!\.)", ast.unparse(n))]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("file", FILES)
def test_imports_by_string_hide_nothing(file: str) -> None:
    called = {name for name, _ in calls(file)}
    assert not called & {"__import__", "exec", "eval"}
    if called & {"import_module", "importlib.import_module"}:
        texts = {node.value for node in ast.walk(tree(file)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not {text for text in texts if " " not in text and (text.startswith("sdrt.") or text.partition(".")[0] in BUILD_ONLY)}


@pytest.mark.parametrize("file", [file for file in FILES if file not in COMMAND])
def test_only_the_command_prints_and_exits(file: str) -> None:
    speaking = {"print", "exit", "quit", "sys.exit", "os._exit", "SystemExit", "typer.echo", "typer.secho", "typer.Exit"}
    assert not [ast.unparse(node) for name, node in calls(file) if name in speaking or name.startswith(("sys.stdout", "sys.stderr", "warnings.warn"))]
    assert not [node for node in ast.walk(tree(file)) if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc)]
    assert not below(imports(file), "typer", "rich", "click")


def test_the_command_does_print() -> None:
    assert "typer.echo" in {name for name, _ in calls("cli.py")}


# The network


def test_build_and_generate_without_network(no_network: None, tmp_path: Path) -> None:
    from sdrt.export.adapters import LoraOption
    from sdrt.export.build import BuildOptions, build
    from sdrt.runtime import Pipeline

    report = build(BuildOptions(CHECKPOINT, (LoraOption(LORA, 0.5, 0.5),), output=tmp_path / "half.sdrt"))
    with Pipeline.load(report.path) as pipeline:
        assert pipeline("red apple", steps=2, cfg=3, seed=1).images.shape == (1, 64, 64, 3)


def test_tracing_without_network(no_network: None) -> None:
    from sdrt.export.checkpoint import open_checkpoint
    from sdrt.export.graph import recipes, trace

    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    model: Any = trace(recipes(checkpoint.architecture)["text_encoder"])
    assert [value.name for value in model.graph.outputs] == ["context_skip_1"]


def test_the_network_is_refused(no_network: None) -> None:
    import socket

    with pytest.raises(AssertionError, match="socket"):
        socket.create_connection(("127.0.0.1", 9))
