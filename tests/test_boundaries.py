"""What imports what: the runtime runs without torch, neither side names the other, only the command prints, and nothing
opens a socket.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKPOINT, LORA, ROOT
from locked_down import BUILD_ONLY, LOCKED_DOWN, run_python

from sdrt.machine.packages import install_command

PACKAGE = ROOT / "sdrt"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
COMMAND = [file for file in FILES if file.startswith("cli") or file == "__main__.py"]


def imported_by(*modules: str) -> set[str]:
    """Top-level names of all modules in memory after these were imported."""
    return set(
        json.loads(
            run_python(
                "import importlib, json, sys\nfor name in sys.argv[1:]:"
                " importlib.import_module(name)\nprint(json.dumps(list(sys.modules)))",
                *modules,
            )
        )
    )


def modules_of(folder: str) -> list[str]:
    below_it = pkgutil.walk_packages([str(PACKAGE / folder)], f"sdrt.{folder}.")
    return [f"sdrt.{folder}", *(module.name for module in below_it)]


# Imports that happen


def test_the_runtime_imports_no_torch() -> None:
    modules = [
        *modules_of("runtime"),
        *modules_of("compile"),
        "sdrt",
        "sdrt.bundle",
        "sdrt.errors",
        "sdrt.files.publish",
        "sdrt.bundle.reference",
        "sdrt.cli",
    ]
    assert {
        "sdrt.runtime.pipeline",
        "sdrt.runtime.backends.onnxruntime.engine",
        "sdrt.runtime.verify",
        "sdrt.compile",
    } <= set(modules)
    loaded = imported_by(*modules)
    assert set(modules) <= loaded
    assert not loaded & {*BUILD_ONLY, "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"}
    assert not {name for name in loaded if name.startswith(("sdrt.export", "sdrt.cached_bundle"))}


def test_the_runtime_imports_no_engine_until_it_loads_one() -> None:
    loaded = imported_by("sdrt.runtime")
    assert "sdrt.runtime.pipeline" in loaded
    assert not loaded & {"onnxruntime", "PIL", "typer", "rich", *BUILD_ONLY}


def test_inspecting_and_choosing_need_no_torch() -> None:
    """What reads headers only, and what the command imports before it knows that a file is good."""
    loaded = imported_by(
        "sdrt.export.inspect",
        "sdrt.export.adapters.match",
        "sdrt.export.read.checkpoint",
        "sdrt.export.architecture",
        "sdrt.export.weights",
        "sdrt.export.adapters.embedding",
        "sdrt.export.adapters.hypernetwork_weights",
        "sdrt.export.build",
    )
    assert not loaded & {"torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime"}


FUSE = """
from pathlib import Path
from sdrt.errors import MachineError
from sdrt.export.adapters.embedding import EmbeddingOption, extended_tables, open_embedding
from sdrt.export.adapters.hypernetwork import HypernetworkOption, open_hypernetwork
from sdrt.export.adapters.hypernetwork_weights import attach, check_values
from sdrt.export.adapters.match import LoraOption, open_lora
from sdrt.export.read.checkpoint import open_checkpoint
from sdrt.export.read.tensor_entry import FLOATS
from sdrt.export.weights import write_weights
checkpoint, adapter, folder = map(Path, sys.argv[1:])
model = open_checkpoint(checkpoint)
tensors = {name: tensor for name, tensor in model.tensors.items() if tensor.entry.dtype in FLOATS}
shapes = {name: tensor.shape for name, tensor in tensors.items()}
lora = open_lora(LoraOption(adapter), shapes, model.architecture)
_, made = extended_tables([open_embedding(EmbeddingOption(folder / "word.pt", "word"), model.architecture)], model.architecture)
linear, other = (
    open_hypernetwork(HypernetworkOption(folder / name), model.architecture.unet) for name in ("linear.pt", "mish.pt")
)
check_values([linear])
made |= attach([linear, other], model.architecture.unet, shapes)[1]
for precision in ("fp16", "bf16", "fp32"):
    written = write_weights(folder / precision, tensors, [lora], precision, lambda done: None, made)
    print(sorted(written.placed.keys() - tensors.keys()) == sorted(made.keys() - tensors.keys()))
try:
    check_values([other])
except MachineError as error:
    print(error)
"""


def test_fusing_needs_no_torch(tmp_path: Path) -> None:
    """Every file is read, fused and rounded without it. Only to see what a hypernetwork's activation does, or to trace
    it, a build needs torch, and says so.
    """
    import hypernetwork_files
    import torch

    torch.save({"string_to_param": {"*": torch.ones(2, 64)}, "name": "word"}, tmp_path / "word.pt")
    for name, settings in (
        ("linear.pt", hypernetwork_files.Settings()),
        ("mish.pt", hypernetwork_files.Settings(activation="mish", layer_norm=True)),
    ):
        hypernetwork_files.save(tmp_path / name, settings, 1)
    said = run_python(LOCKED_DOWN + FUSE, str(CHECKPOINT), str(LORA), str(tmp_path)).splitlines()
    assert said[:3] == ["True"] * 3
    assert said[3:] == [
        f"{tmp_path / 'mish.pt'}: a hypernetwork that is not linear is traced, which needs PyTorch",
        f"Install it with: {install_command('build')}",
    ]


def test_every_module_imports_without_a_warning() -> None:
    names = [
        "sdrt." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for file in FILES
        if file != "__init__.py"
    ]
    assert set(names) <= imported_by(*names)


def test_generate_without_torch(blindbox_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    from sdrt.runtime import Pipeline

    script = LOCKED_DOWN + "from sdrt.cli.app import app\napp()"
    arguments = [
        "red apple",
        "--steps",
        "6",
        "--cfg",
        "3",
        "--seed",
        "11",
        "--sampler",
        "euler_a",
        "--output",
        "apple.png",
        "--json",
    ]
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
            above = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
            parent = ".".join(above) if node.level else node.module or ""
            found |= {parent, *(f"{parent}.{alias.name}" for alias in node.names)}
    return found


def below(names: set[str], *packages: str) -> set[str]:
    return {name for name in names for package in packages if name == package or name.startswith(package + ".")}


def calls(file: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


MAY_IMPORT = {
    "errors": (),
    "files": ("errors",),
    "machine": ("errors", "files"),
    "bundle": ("errors", "files", "machine"),
    "engines": ("errors", "files", "machine", "bundle"),
    "export": ("errors", "files", "machine", "bundle"),
    "runtime": ("errors", "files", "machine", "bundle", "engines"),
    "compile": ("errors", "files", "machine", "bundle", "engines", "runtime.backends"),
    "bench": ("errors", "files", "machine", "bundle", "engines", "runtime"),
    "cached_bundle": ("errors", "files", "machine", "bundle", "engines", "export", "compile"),
    "cli": (
        *("errors", "files", "machine", "bundle", "engines", "export", "runtime", "compile", "bench", "cached_bundle"),
    ),
    "__main__": ("cli",),
}
"""The whole of the project's own imports, lazy ones included: each package, and those it may use beside itself."""
ALSO = {
    "bundle/signature.py": ("engines",),  # a signature covers a bundle's engines too
    "machine/doctor.py": ("engines",),  # it speaks of every target
    # The one way from the runtime to a build: inside `Pipeline.load`, where it is given a checkpoint.
    "runtime/pipeline.py": ("cached_bundle",),
}


def test_packages_import_only_what_lies_below_them() -> None:
    offenders = []
    for file in FILES:
        package = Path(file).parts[0].removesuffix(".py")
        allowed = (*MAY_IMPORT.get(package, ()), *ALSO.get(file, ()), package)
        own = {name.removeprefix("sdrt.") for name in imports(file) if name.startswith("sdrt.")}
        modules = {name for name in own if not name.startswith("__") and (PACKAGE / name.partition(".")[0]).exists()}
        modules |= {name for name in own if (PACKAGE / f"{name.partition('.')[0]}.py").exists()}
        offenders += [f"{file}: {name}" for name in sorted(modules - below(modules, *allowed))]
    assert not offenders, "\n".join(offenders)
    assert {Path(file).parts[0].removesuffix(".py") for file in FILES} == {*MAY_IMPORT, "__init__"}


def test_no_two_modules_import_each_other() -> None:
    """Not by a round-about way either, imports inside functions included; what only a type checker reads is left out."""
    names = {"sdrt." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): file for file in FILES}
    arrows: dict[str, set[str]] = {}
    for name, file in names.items():
        unread = {
            inner
            for outer in ast.walk(tree(file))
            if isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING"
            for inner in ast.walk(outer)
        }
        arrows[name] = set()
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom) and node not in unread and node.module:
                found = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
                arrows[name] |= {
                    one for one in found if one in names and one != name and not names[one].endswith("__init__.py")
                }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in names:
        visit(name, ())


def test_only_export_imports_the_packages_of_a_build() -> None:
    offenders = [
        f"{file}: {name}"
        for file in FILES
        if not file.startswith("export/")
        for name in below(
            imports(file), *(("torch", "transformers", "diffusers") if file.startswith("compile/") else BUILD_ONLY)
        )
    ]
    assert not offenders


def test_what_promises_the_standard_library_keeps_to_it() -> None:
    files = {
        "errors.py",
        "files/publish.py",
        *(f for f in FILES if "tandard library only" in (ast.get_docstring(tree(f)) or "")),
    }
    found = {
        (file, name)
        for file in files
        for name in imports(file)
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "sdrt"}
    }
    assert not found and len(files) > 8


def test_engines_are_imported_with_their_reports_switched_off() -> None:
    """Only `machine/engine_libraries.py` imports them; what a type checker alone reads is left out."""
    offenders = []
    for file in (file for file in FILES if file != "machine/engine_libraries.py"):
        nodes = list(ast.walk(tree(file)))
        unread = {
            node.lineno
            for outer in nodes
            if isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING"
            for node in outer.body
        }
        named = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno not in unread]
        found = {alias.name for node in named if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module or "" for node in named if isinstance(node, ast.ImportFrom) and not node.level}
        offenders += [f"{file}: {name}" for name in below(found, "onnxruntime", "openvino")]
    assert not offenders


def test_families_are_named_in_their_own_folder_only() -> None:
    """No other file says or compares a family's name, begins a tensor's name as one of them does, or imports one
    family's file.
    """
    own, word = (
        "export/families/",
        re.compile(
            r"\bsd[123x]|\bsdxl|stable diffusion"
            r" [0-9x]|\bflux\b|diffusion_model\b|first_stage_model|cond_stage_model|conditioner\.",
            re.IGNORECASE,
        ),
    )
    offenders = []
    for file in (file for file in FILES if not file.startswith(own)):
        nodes = list(ast.walk(tree(file)))
        documented = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        said = [
            n.value
            for n in nodes
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in documented
            if file != "cli/options.py"  # help
        ]
        offenders += [f"{file}: {text}" for text in said if word.search(text)]
        offenders += [
            f"{file}: {name}"
            for name in imports(file)
            if re.search(r"families\.(?!family|table|recognise|keys|checkpoint_names)", name)
        ]
        compared = [
            n
            for n in nodes
            if isinstance(n, ast.Compare)
            and any(isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for op in n.ops)
        ]
        offenders += [
            f"{file}: {ast.unparse(n)}" for n in compared if re.search(r"\bfamily(\.name)?\b(?!\.)", ast.unparse(n))
        ]
    assert not offenders, "\n".join(offenders)


def test_targets_are_named_in_their_table_only() -> None:
    """A name is written in `engines/targets.py` and in that backend's folder, and compared nowhere: a field of the row
    says what differs, or one mapping sends each to its own.
    """
    from sdrt.engines.targets import TARGETS

    spoken = {
        "engines/targets.py",
        "cli/options.py",  # help
        "machine/packages.py",  # extras
        "export/build.py",  # the packages of a build
    }
    offenders = []
    for file in (file for file in FILES if file not in spoken):
        nodes = list(ast.walk(tree(file)))
        said = [node.value for node in nodes if isinstance(node, ast.Constant) and node.value in TARGETS]
        folder = Path(file).parent.name
        offenders += [f"{file}: {name}" for name in said if not file.startswith("runtime/backends/") or name != folder]
        sides = [
            ast.unparse(side)
            for node in nodes
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq))
            for side in (node.left, *node.comparators)
        ]
        offenders += [f"{file}: compares {side}" for side in sides if re.fullmatch(r"[A-Z_.]*[A-Z]\.name", side)]
    assert not offenders, "\n".join(offenders)


def test_imports_by_string_hide_nothing() -> None:
    for file in FILES:
        called = {name for name, _ in calls(file)}
        assert not called & {"__import__", "exec", "eval"}, file
        if called & {"import_module", "importlib.import_module"}:
            texts = {
                node.value
                for node in ast.walk(tree(file))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            hidden = {text for text in texts if " " not in text and text.startswith("sdrt.")}
            assert not hidden and not {
                text for text in texts if text.partition(".")[0] in BUILD_ONLY and " " not in text
            }, file


def test_only_the_command_prints_and_exits() -> None:
    speaking = {
        "print",
        "exit",
        "quit",
        "sys.exit",
        "os._exit",
        "SystemExit",
        "typer.echo",
        "typer.secho",
        "typer.Exit",
    }
    streams = ("sys.stdout", "sys.stderr", "warnings.warn")
    offenders = []
    for file in (file for file in FILES if file not in COMMAND):
        offenders += [
            f"{file}: {ast.unparse(node)}" for name, node in calls(file) if name in speaking or name.startswith(streams)
        ]
        raised = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Raise) and node.exc is not None]
        offenders += [f"{file}: {ast.unparse(node)}" for node in raised if "SystemExit" in ast.unparse(node)]
        offenders += [f"{file}: {name}" for name in below(imports(file), "typer", "rich", "click")]
    assert not offenders, "\n".join(offenders)
    assert "typer.echo" in {name for file in COMMAND for name, _ in calls(file)}


# The network


def test_build_and_generate_without_network(no_network: None, tmp_path: Path) -> None:
    from sdrt.export.adapters.match import LoraOption
    from sdrt.export.build import BuildOptions, build
    from sdrt.runtime import Pipeline

    report = build(BuildOptions(CHECKPOINT, (LoraOption(LORA, 0.5, 0.5),), output=tmp_path / "half.sdrt"))
    with Pipeline.load(report.path) as pipeline:
        assert pipeline("red apple", steps=2, cfg=3, seed=1).images.shape == (1, 64, 64, 3)


def test_tracing_without_network(no_network: None) -> None:
    from sdrt.bundle.onnx_graph import read_graph
    from sdrt.export.graph import recipes
    from sdrt.export.read.checkpoint import open_checkpoint
    from sdrt.export.trace import trace

    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    skeletons = trace(recipes(checkpoint.architecture)["text_encoder"])
    assert list(read_graph(skeletons["fp32"]).outputs) == ["context_skip_1"]


def test_the_network_is_refused(no_network: None) -> None:
    import socket

    with pytest.raises(AssertionError, match="socket"):
        socket.create_connection(("127.0.0.1", 9))
