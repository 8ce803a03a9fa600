"""The command line: exit codes, what goes to stdout and stderr, and what is left on disk."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import typer
from commands import failed, names_in, run
from conftest import CHECKPOINT, LORA
from typer.testing import CliRunner

from sdrt import __version__
from sdrt.cli import app
from sdrt.errors import SdrtError

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
SCRIPT = Path(sys.executable).with_name("sdrt")


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert f"Example: sdrt {command}" in " ".join(result.stdout.split())


def test_help_names_the_way_and_the_exit_codes() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert result.stderr == ""
    text = " ".join(result.stdout.split())
    for part in ("sdrt build --checkpoint", "sdrt generate", "3 bad input file", "130 interrupted", *COMMANDS):
        assert part in text


def test_no_arguments_show_the_help() -> None:
    result = run()
    assert result.exit_code in (0, 2)
    assert "sdrt build --checkpoint" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"sdrt {__version__}\n"


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["biuld"], "Did you mean 'build'"),
        (["--no-such-option"], "--no-such-option"),
        (["build", "--checkpoint", "x", "--no-such-option"], "--no-such-option"),
        (["build"], "--checkpoint"),
        (["build", "--checkpoint"], "--checkpoint"),
        (["generate"], "BUNDLE"),
        (["generate", "x.sdrt"], "PROMPT"),
        (["generate", "x.sdrt", "apple", "--steps", "many"], "--steps"),
        (["generate", "x.sdrt", "apple", "--cfg", "high"], "--cfg"),
        (["generate", "x.sdrt", "apple", "--steps", "1.5"], "--steps"),
        (["generate", "x.sdrt", "apple", "pear"], "pear"),
        (["inspect"], "FILE"),
        (["verify", "a", "b"], "b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(args: list[str], fragment: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert fragment in result.stderr
    assert "Traceback" not in result.stderr


# Errors


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["generate", "--json"], "Missing argument 'BUNDLE|CHECKPOINT'"),
        (["generate", "x", "--json", "--widht", "8"], "No such option: --widht"),
        (["build", "--json", "--checkpoint"], "requires an argument"),
        (["bench", "run", "x", "--steps", "many", "--json"], "--steps"),
        (["biuld", "--json"], "biuld"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_json_too(args: list[str], fragment: str) -> None:
    result = run(*args)
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == error["exit_code"] == 2 and fragment in error["message"] and "--help" in error["fix"]
    assert run(*(arg for arg in args if arg != "--json")).stdout == ""
    assert run("generate", "--bad", "--", "--json").stdout == ""  # a prompt


def test_missing_checkpoint(here: Path) -> None:
    Path("emoji-v1.safetensors").touch()
    stderr = failed(
        run("build", "--checkpoint", "emoji-v2.safetensors"),
        3,
        "emoji-v2.safetensors: cannot open",
        "did you mean 'emoji-v1.safetensors'?",
    )
    assert stderr.splitlines()[-1] == "  fix: Check the path."
    assert names_in(here) == ["emoji-v1.safetensors"]


@pytest.mark.parametrize(
    ("args", "code", "fragment"),
    [
        (["build", "--checkpoint", CHECKPOINT, "--lora", "x.safetensors:abc"], 2, "scale 'abc'"),
        (["build", "--checkpoint", CHECKPOINT, "--target", "onnxruntim"], 2, "did you mean 'onnxruntime'"),
        (["build", "--checkpoint", CHECKPOINT, "--precision", "int8"], 2, "precision 'int8'"),
        (["build", "--checkpoint", CHECKPOINT, "--size", "64"], 2, "--size 64"),
        (["build", "--checkpoint", CHECKPOINT, "--clip-skip", "0"], 2, "clip skip 0"),
        (["build", "--checkpoint", LORA, "--output", "none/x.sdrt"], 3, "found a LoRA"),  # and no folder is left
        (["build", "--checkpoint", LORA], 3, "found a LoRA"),
        (["build", "--checkpoint", CHECKPOINT, "--lora", CHECKPOINT], 3, "expected a LoRA"),
        (["generate", "none.sdrt", "apple"], 3, "no such bundle"),
        (["generate", LORA, "apple"], 3, "found a LoRA"),
        (["generate", ".", "apple"], 3, "not a bundle"),
        (["generate", "none.safetensors", "apple"], 3, "No such file"),
        (["verify", CHECKPOINT], 3, "not a bundle"),
        (["verify", "none.sdrt"], 3, "no such bundle"),
        (["inspect", "none.sdrt"], 3, "no such bundle"),
        (["inspect", "none.safetensors"], 3, "No such file"),
        (["inspect", "."], 3, "model_index.json"),
        (["inspect", "x" * 300], 3, "File name too long"),
        (["verify", "x" * 300], 3, "no such bundle"),
        (["build", "--checkpoint", "x" * 300], 3, "File name too long"),
    ],
    ids=lambda value: " ".join(str(v) for v in value if isinstance(v, str))[:50] if isinstance(value, list) else "",
)
def test_errors_with_and_without_json(here: Path, args: list[object], code: int, fragment: str) -> None:
    stderr = failed(run(*args), code, fragment)
    result = run(*args, "--json")
    assert result.exit_code == code
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == code
    assert fragment in error["message"]
    assert f"error: {error['message']}" in stderr
    assert error["fix"] in stderr
    assert not names_in(here)


@pytest.mark.parametrize("option", ["--checkpoint", "--vae", "--lora", "--embedding", "--hypernetwork"])
def test_h3_l12_a_pickle_with_code_in_it_is_refused_wherever_it_is_given(here: Path, option: str) -> None:
    Path("evil.pt").write_bytes(b"\x80\x02cposix\nsystem\nX\x0c\x00\x00\x00touch canary\x85R.")
    others = [] if option == "--checkpoint" else ["--checkpoint", CHECKPOINT]
    stderr = failed(
        run("build", *others, option, "evil.pt"), 4, "evil.pt", "the name posix.system", "nothing of it was run"
    )
    assert "weights_only" not in stderr
    failed(run("inspect", "evil.pt"), 4, "posix.system")
    assert names_in(here) == ["evil.pt"]


def test_debug_shows_the_traceback(here: Path) -> None:
    result = run("--debug", "build", "--checkpoint", "none.safetensors")
    assert result.exit_code == 3
    assert "Traceback (most recent call last)" in result.stderr
    assert "error: none.safetensors" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "fragments"),
    [
        (RuntimeError("odd \x1b[31mthing"), 70, ["RuntimeError: odd \\x1b[31mthing", "bug in sdrt"]),
        (SdrtError("odd thing"), 70, ["odd thing"]),
        (MemoryError(), 6, ["out of memory"]),
        (OSError(24, "Too many open files", "x"), 6, ["x: Too many open files", "ulimit -n"]),
        (OSError(11, "Resource temporarily unavailable"), 6, ["Resource temporarily unavailable"]),
        (OSError(9, "Bad file descriptor"), 70, ["bug in sdrt"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (
            ModuleNotFoundError("No module named 'onnx'", name="onnx"),
            5,
            ["onnx is not installed", "pip install 'torch>=2.10' 'onnx>=1.21'"],
        ),
        (
            ModuleNotFoundError("No module named 'onnxruntime.x'", name="onnxruntime.x"),
            5,
            ["onnxruntime is not installed", "pip install 'onnxruntime>="],
        ),
        (ModuleNotFoundError("No module named 'other'", name="other"), 70, ["other", "bug in sdrt"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exceptions_become_exit_codes(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, fragments: list[str]
) -> None:
    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("sdrt.export.build"), "build", raises)
    failed(run("build", "--checkpoint", "x"), code, *fragments)


# As a process of its own


def process(
    *args: object, cwd: Path, env: Mapping[str, str] | None = None, code: str = ""
) -> subprocess.CompletedProcess[str]:
    """The installed script, or the command line after some Python `code`."""
    command: Sequence[object] = (
        [sys.executable, "-c", f"{code}\nfrom sdrt.cli import app\napp()", *args] if code else [SCRIPT, *args]
    )
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | dict(env or {})
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=False,
    )


def test_script_in_plain_and_poor_terminals(here: Path) -> None:
    for env in (
        {"NO_COLOR": "1"},
        {"COLUMNS": "20"},
        {"LANG": "C", "LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb"},
    ):
        done = process("build", "--help", cwd=here, env=env)
        assert (done.returncode, done.stderr) == (0, ""), env
        assert "--checkpoint" in re.sub(r"\s|│|\|", "", done.stdout), env
        assert "\x1b" not in done.stdout, env


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii", "C without UTF-8"],
)
def test_names_that_the_terminal_cannot_show(here: Path, small_bundle: Path, env: dict[str, str]) -> None:
    (here / "äpfel").mkdir()
    done = process("generate", small_bundle, "apple", "--steps", "1", "--output", "äpfel/ö.png", cwd=here, env=env)
    assert done.returncode == 0, done.stderr
    assert (here / "äpfel" / "ö.png").is_file()
    done = process("inspect", "ü.safetensors", cwd=here, env=env)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")


def test_names_that_are_not_unicode(here: Path, small_bundle: Path) -> None:
    names = [
        os.fsdecode(byte + suffix)
        for byte, suffix in ((b"\xfd", b".png"), (b"\xfe", b".safetensors"), (b"\xff", b".safetensors"))
    ]
    (here / names[1]).write_bytes(LORA.read_bytes())
    assert process("generate", small_bundle, "apple", "--steps", "1", "--output", names[0], cwd=here).returncode == 0
    assert "kind: a LoRA" in process("inspect", names[1], cwd=here).stdout
    assert process("inspect", names[2], cwd=here).returncode == 3
    assert names_in(here) == names[:2]


def test_error_of_the_script(here: Path) -> None:
    done = process("generate", "none.sdrt", "apple", cwd=here)
    assert done.returncode == 3
    assert done.stdout == ""
    assert (
        done.stderr == f"error: {here}/none.sdrt: no such bundle\n  fix: Make one with: sdrt build --checkpoint FILE\n"
    )


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["inspect", str(CHECKPOINT)], ["inspect", str(CHECKPOINT), "--json"]],
    ids=lambda a: a[0] + a[-1][:6],
)
def test_reader_that_went_away(here: Path, args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [str(SCRIPT), *args], stdout=closed, stderr=subprocess.PIPE, text=True, cwd=here, check=False
        )
    assert done.returncode in (0, 1)  # typer itself ends with 1 while it prints the help
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("stdout", "stderr", "code"), [("/dev/full", None, 6), (None, "/dev/full", 0), ("/dev/full", "/dev/full", 6)]
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_under_what_is_printed(
    here: Path, small_bundle: Path, stdout: str | None, stderr: str | None, code: int, options: list[str]
) -> None:
    """The picture is there; what cannot be told on stdout fails the command, what cannot be told on stderr does not."""
    command = [
        sys.executable,
        "-m",
        "sdrt",
        "generate",
        str(small_bundle),
        "apple",
        "--steps",
        "1",
        "--output",
        "x.png",
        *options,
    ]
    with open(stdout or here / "out", "w") as out, open(stderr or here / "err", "w") as err:
        assert subprocess.run(command, cwd=here, stdout=out, stderr=err, timeout=120).returncode == code
    assert (here / "x.png").exists()
    if stderr is None:
        said = (here / "err").read_text()
        assert "Traceback" not in said and "No space left" in said
    else:
        assert stdout or (here / "out").read_text()


def test_no_stdout_at_all(here: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$0" inspect "$1" >&-', str(SCRIPT), str(CHECKPOINT)],
        capture_output=True,
        text=True,
        cwd=here,
        check=False,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["torch", "onnx_ir"])
def test_build_of_an_odd_size_without_its_packages(here: Path, small_checkpoint: Path, missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None"
    done = process("build", "--checkpoint", small_checkpoint, cwd=here, code=code)
    assert done.returncode == 5, done.stderr
    error, fix = done.stderr.splitlines()[-2:]
    assert error.startswith("error: ") and "small.safetensors: text_encoder: no trace of it comes with sdrt" in error
    assert fix.startswith("  fix: Tracing needs PyTorch. Install it with: pip install 'torch>=2.10' 'onnx>=1.21'")
    assert not names_in(here)


def test_generate_without_an_engine(here: Path, small_bundle: Path) -> None:
    done = process("generate", small_bundle, "apple", cwd=here, code="import sys; sys.modules['onnxruntime'] = None")
    assert done.returncode == 5
    assert "pip install 'onnxruntime>=1.25'" in done.stderr
    assert not names_in(here)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("number", "stage"),
    [(signal.SIGINT, "check step"), (signal.SIGTERM, "fuse"), (signal.SIGHUP, "bind step")],
    ids=str,
)
def test_i2_stopped_build_leaves_nothing(
    small_checkpoint: Path, here: Path, small_bundle: Path, number: int, stage: str
) -> None:
    command = [str(SCRIPT), "build", "--checkpoint", str(small_checkpoint), "--output", "x.sdrt"]
    with subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as build:
        assert build.stderr is not None
        for line in build.stderr:
            if line.startswith(stage):
                assert names_in(here), "the stage is there"
                build.send_signal(number)
                break
        stdout, stderr = build.communicate(timeout=120)
    assert build.returncode == 130
    assert stdout == ""
    assert stderr.splitlines()[-1] == "error: interrupted; nothing was left behind"
    assert "Traceback" not in stderr
    assert not names_in(here)


@pytest.mark.parametrize("command", [[], ["generate"], ["bench", "run"]])
def test_help(command: list[str]) -> None:
    short, long = (CliRunner().invoke(app, [*command, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout and "Usage" in short.stdout


def test_help_shows_the_prompt_syntax_as_it_is_typed() -> None:
    """Rich takes `:name:` for an emoji."""
    assert "[day:dusk:0.5]" in CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).stdout
