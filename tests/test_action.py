"""The composite action: its steps are run as a script, with every program they call replaced but the shell's own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from conftest import ROOT

from sdrt.cli import app

ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
CALLS = "calls"
PROGRAM = """#!/bin/sh
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
  "python -m venv "*) mkdir -p "$3/bin"; for name in pip python sdrt; do cp "$0" "$3/bin/$name"; done ;;
  "sdrt bench ab "*) echo "### sdrt bench" > "$RUNNER_TEMP/sdrt-bench/bench.md"; exit "$BENCH_ENDS" ;;
esac
"""


class Job:
    """A runner of the action with some inputs, where `sdrt bench ab` ends with the given code."""

    def __init__(self, folder: Path, bench_ends: int, inputs: Mapping[str, str], *, pull_request: bool = True) -> None:
        self.folder, self.outputs = folder, dict[str, str]()
        self.values = {f"inputs.{name}": inputs.get(name, str(given["default"])) for name, given in ACTION["inputs"].items()}
        self.values |= {"runner.temp": str(folder), "github.event.pull_request.number": "7", "github.event.pull_request": "yes" if pull_request else ""}
        bin_folder = folder / "bin"
        (folder / "sdrt-bench").mkdir(parents=True)
        bin_folder.mkdir()
        for name in ("git", "python", "gh"):
            (bin_folder / name).write_text(PROGRAM)
            (bin_folder / name).chmod(0o755)
        self.variables = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": str(folder / CALLS), "RUNNER_TEMP": str(folder), "GITHUB_OUTPUT": str(folder / "outputs"),
            "BENCH_ENDS": str(bench_ends),
        }  # fmt: skip

    def filled(self, text: str) -> str:
        return re.sub(r"\$\{\{ *(.*?) *\}\}", lambda found: self.values.get(found[1], ""), str(text))

    def holds(self, condition: str) -> bool:
        if condition == "always()":
            return True
        parts = [re.fullmatch(r"(\S+) == '(.*)'", part) or part for part in condition.split(" && ")]
        return all(bool(self.values[part]) if isinstance(part, str) else self.values[part[1]] == part[2] for part in parts)

    def run(self) -> int:
        """The code of the first step that fails, as a job's."""
        for step in ACTION["runs"]["steps"]:
            if "run" not in step or not self.holds(step.get("if", "always()")):
                continue
            assert step["shell"] == "bash" and "${{" not in step["run"], "what others write reaches a script as a variable only"
            variables = self.variables | {name: self.filled(value) for name, value in step.get("env", {}).items()}
            done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], env=variables, cwd=self.folder, capture_output=True, text=True, timeout=60)
            if (file := self.folder / "outputs").exists():
                self.values |= {f"steps.bench.outputs.{name}": value for name, _, value in (line.partition("=") for line in file.read_text().splitlines())}
            if done.returncode:
                return done.returncode
        return 0

    def called(self, start: str) -> Sequence[str]:
        return [line for line in (self.folder / CALLS).read_text().splitlines() if line.startswith(start)]


@pytest.mark.parametrize(
    ("bench_ends", "inputs", "ends"),
    [(0, {}, 0), (1, {}, 1), (8, {}, 0), (8, {"ambiguous": "fail"}, 8), (9, {}, 9), (5, {}, 5), (70, {}, 70), (9, {"comment": "false"}, 9)],
)  # fmt: skip
def test_the_job_ends_as_the_benchmark_does(tmp_path: Path, bench_ends: int, inputs: dict[str, str], ends: int) -> None:
    """Only what cannot be told may pass, if it is asked for; what is not comparable never does. The comment is written before."""
    job = Job(tmp_path, bench_ends, inputs | {"base": "main"})
    assert job.run() == ends
    assert len(job.called("gh pr comment 7 --body-file")) == (inputs.get("comment") != "false")
    assert job.called("git")[0].endswith(f"worktree add --detach {tmp_path}/sdrt-bench/base main")


def test_a_bundle_is_measured_with_both_and_nothing_is_built(tmp_path: Path) -> None:
    job = Job(tmp_path, 0, {"base": "main", "bundle": "my.sdrt"}, pull_request=False)
    assert job.run() == 0 and not job.called("sdrt build") and not job.called("gh")
    assert job.called("sdrt bench ab my.sdrt my.sdrt --old-python")
    job = Job(tmp_path / "built", 0, {"base": "main", "checkpoint": "model.safetensors"})
    assert job.run() == 0 and not job.called("python benchmarks")
    assert [line.split()[3] for line in job.called("sdrt build")] == ["model.safetensors"] * 2


def test_sdrt_knows_every_option_the_action_uses(tmp_path: Path) -> None:
    job = Job(tmp_path, 0, {"base": "main", "options": "--steps 10 --backend onnxruntime"})
    job.run()
    command: Any = typer.main.get_command(app)
    for line in (*job.called("sdrt build"), *job.called("sdrt bench")):
        words = line.split()[1:]
        found = command
        while words[0] in getattr(found, "commands", {}):
            found = found.commands[words.pop(0)]
        found.make_context("sdrt", words)  # raises for an option that is not there, or a value of another kind
