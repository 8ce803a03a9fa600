"""`sdrt bench` from the outside: exit codes, files, JSON, and one real run of the emoji model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from bench_documents import answer, document, synthetic_measure, synthetic_pairs
from click.testing import Result
from conftest import ROOT
from typer.testing import CliRunner

from sdrt.bench import run as bench_run
from sdrt.bench.measure import Request
from sdrt.bench.result import write_json
from sdrt.cli import app


def bench(*args: object) -> Result:
    return CliRunner().invoke(app, ["bench", *(str(arg) for arg in args)])  # type: ignore[return-value]


def refused(result: Result, code: int, *fragments: str) -> None:
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr and result.stdout == ""
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Path]:
    def written(name: str, seed: int, **changes: Any) -> Path:
        made = document(seed, 10, **{key: changes.pop(key) for key in ("slower", "noise") if key in changes})
        for part, value in changes.items():
            made[part] = made[part] | value if isinstance(value, dict) else value
        write_json(tmp_path / name, made)
        return tmp_path / name

    return written


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Processes that answer at once with known costs."""

    def install(**slower: float) -> None:
        costs = {f"{name}.sdrt": value for name, value in slower.items()}
        monkeypatch.setattr(bench_run.run, "__defaults__", (synthetic_measure(1, costs),))
        monkeypatch.setitem(bench_run.side_by_side.__kwdefaults__ or {}, "measure", synthetic_pairs(1, costs))

    return install


@pytest.fixture
def pair(flat_bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two names of one bundle."""
    for name in ("old.sdrt", "new.sdrt"):
        (tmp_path / name).symlink_to(flat_bundle)
    return tmp_path / "old.sdrt", tmp_path / "new.sdrt"


# One real run


def test_a_real_run(flat_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    done = bench(
        "run", flat_bundle, "--processes", 1, "--pictures", 2, "--warm-up", 0.1, "--steps", 4, "--cfg", 3, "--threads", 1, "--layers", "--scenario", "batch", "--batch", 2,
        "--output", tmp_path / "a.json", "--history", tmp_path / "runs", "--json", *(f"--emit={name}={tmp_path / name}" for name in ("html", "junit", "csv")),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "a.json").read_text())
    jsonschema.validate(result, json.loads((ROOT / "docs" / "bench-schema.json").read_text()))
    assert {"total_ms", "picture_ms", "tokenise_ms", "text_encoder_ms", "step_ms", "decode_ms", "host_ms", "copies_ms", "cold_ms", "load_ms", "engine_load_ms",
            "peak_rss_bytes"} <= result["samples"].keys()  # fmt: skip
    assert len(result["samples"]["step_ms"][0]) == 2 * 4
    assert {name: result["counters"][name] for name in ("model_calls", "text_encoder_calls", "decode_calls", "batches")} == {
        "model_calls": 4, "text_encoder_calls": 1, "decode_calls": 1, "batches": 1,
    }  # fmt: skip
    assert result["packages"] == ["numpy", "onnxruntime", "sdrt"]
    checks = {check["graph"]: check["error"] / check["limit"] for check in result["fidelity"]["checks"]}
    assert set(checks) == {"text_encoder", "step", "vae_decoder"} and max(checks.values()) < 0.5
    assert len(result["fidelity"]["picture"]["latents_sketch"]) == 256
    assert result["config"]["size"] == [64, 64] and result["engine"]["backend"] == "onnxruntime"
    step = result["layers"]["graphs"]["step"]
    assert (
        step["matrix_flops"] > 0.9 * step["flops"] > 0
        and step["slowest"][0]["ms"] > 0
        and step["share_of_roofline"] > 0
    )
    for name in ("html", "junit", "csv", "summary.md", "runs/history.jsonl"):
        assert (
            "onnxruntime fp32 cpu, batch, 64x64, batch 2, 4 steps of euler" in (tmp_path / name).read_text()
            or name == "csv"
        )
    same = bench("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert same.exit_code == 0 and "PASSED" in same.stdout and "identical" in same.stderr


# compare


def test_compare_passes_fails_and_cannot_tell(files: Callable[..., Path]) -> None:
    base = files("base.json", 1)
    assert bench("compare", base, files("same.json", 2)).exit_code == 0
    done = bench("compare", base, files("slow.json", 2, slower=0.2))
    assert done.exit_code == 1 and "FAILED: total_ms SLOWER" in done.stdout
    done = bench("compare", files("loud.json", 3, noise=0.5), files("louder.json", 4, noise=0.5))
    assert done.exit_code == 8 and "AMBIGUOUS: " in done.stdout and "can see changes of" in done.stdout
    found = json.loads(bench("compare", base, files("slow.json", 2, slower=0.2), "--json").stdout)
    assert found["exit_code"] == 1 and found["metrics"][0]["verdict"] == "SLOWER" and found["new"]["samples"]


def test_compare_of_what_is_not_comparable_has_an_exit_code_of_its_own_and_writes_its_files(
    files: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A CI job that lets 8 pass must not let this pass, and its next steps find their files."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    names = ("markdown", "junit", "bencher", "github", "csv", "html")
    done = bench(
        "compare",
        files("a.json", 1),
        files("b.json", 2, config={"steps": 5}),
        *(f"--emit={name}={tmp_path / name}" for name in names),
    )
    assert (
        done.exit_code == 9
        and "error: not comparable: config.steps: 4 and 5" in done.stderr
        and "bench ab" in done.stderr
    )
    assert (
        all((tmp_path / name).stat().st_size > 200 for name in names)
        and 'errors="1"' in (tmp_path / "junit").read_text()
    )
    assert all(
        "NOT COMPARABLE, no verdict: config.steps: 4 and 5" in (tmp_path / name).read_text()
        for name in ("markdown", "html", "summary.md")
    )


def test_forced_comparisons_give_no_verdict(files: Callable[..., Path], tmp_path: Path) -> None:
    """Another machine, wrong pictures, a metric gone, half as fast: shown, and never a pass or a failure."""
    base = files("a.json", 1)
    new = files(
        "b.json",
        2,
        slower=1.0,
        env={"cpu": "Another"},
        counters={"jobs": 9},
        fidelity={"ok": False, "problems": ["step: latents: differs"]},
    )
    found = json.loads(new.read_text())
    del found["samples"]["cold_ms"]
    new.write_text(json.dumps(found))
    done = bench("compare", base, new)
    assert (
        done.exit_code == 9
        and "not comparable: env.cpu: 'A <fast> CPU' and 'Another'" in done.stderr
        and "bench compare --force" in done.stderr
    )
    done = bench(
        "compare",
        base,
        new,
        "--force",
        "--emit",
        f"junit={tmp_path / 'x.xml'}",
        "--emit",
        f"markdown={tmp_path / 'x.md'}",
    )
    assert (
        done.exit_code == 9
        and "NOT COMPARABLE, no verdict: env.cpu" in done.stdout
        and "SLOWER (not gated)" in done.stdout
        and "PASSED" not in done.stdout
    )
    assert "not comparable: env.cpu" in done.stderr and "step: latents: differs" in done.stdout + done.stderr
    assert (
        "NOT COMPARABLE" in (tmp_path / "x.md").read_text()
        and 'failures="1" skipped="0" errors="1"' in (tmp_path / "x.xml").read_text()
    )  # wrong pictures are wrong anywhere
    found = json.loads(bench("compare", base, new, "--force", "--json").stdout)
    assert (
        found["exit_code"] == 9
        and found["different"] == ["env.cpu: 'A <fast> CPU' and 'Another'"]
        and not any(row["failed"] or row["gated"] for row in found["metrics"])
    )
    assert (
        bench("compare", base, files("c.json", 2, slower=0.2), "--force").exit_code == 1
    )  # comparable: judged as ever


def test_a_metric_missing_in_one_file(files: Callable[..., Path], tmp_path: Path) -> None:
    base, new = files("a.json", 1), files("b.json", 2)
    found = json.loads(new.read_text())
    del found["samples"]["cold_ms"]
    new.write_text(json.dumps(found))
    done = bench("compare", base, new)
    assert done.exit_code == 1 and "cold_ms MISSING" in done.stdout
    assert bench("compare", new, base).exit_code == 0


def test_bad_files(files: Callable[..., Path], tmp_path: Path) -> None:
    good = files("a.json", 1)
    refused(bench("compare", good, tmp_path / "none.json"), 3, "none.json: cannot be read")
    refused(
        bench("compare", files("new.json", 1, schema=2), good),
        5,
        "benchmark schema 2; this sdrt reads schema 1",
        "Upgrade",
    )
    refused(bench("compare", files("old.json", 1, schema=0), good), 3, "schema: expected 1, found 0")
    (tmp_path / "bench.toml").write_text("[metrics.total]\n")
    refused(bench("compare", good, good), 3, "metrics.total: unknown; did you mean 'total_ms'")
    refused(bench("compare", good, good, "--config", tmp_path / "none.toml"), 3, "none.toml")


def test_emit_writes_files_and_refuses_what_it_cannot(files: Callable[..., Path], tmp_path: Path) -> None:
    good = files("a.json", 1)
    names = ("markdown", "junit", "bencher", "github", "csv", "html")
    assert bench("compare", good, good, *(f"--emit={name}={tmp_path / name}" for name in names)).exit_code == 0
    assert all((tmp_path / name).stat().st_size > 200 for name in names)
    refused(bench("compare", good, good, "--emit", "junitt=x"), 2, "did you mean 'junit'")
    refused(bench("compare", good, good, "--emit", "junit"), 2, "expected FORMAT=FILE")
    refused(bench("compare", good, good, "--emit", f"csv={tmp_path}/none/x"), 2, "no folder")


# run and ab on synthetic processes


def test_run_prints_a_table_with_the_engine(pair: tuple[Path, Path], synthetic: Callable[..., None]) -> None:
    synthetic(old=0.0)
    done = bench("run", pair[0])
    assert done.exit_code == 0, done.stderr
    assert (
        "onnxruntime fp32 cpu, 64x64, batch 1, 20 steps of euler" in done.stdout
        and "total_ms" in done.stdout
        and "time = " in done.stdout
    )
    assert "process 5 of 5" in done.stderr


def test_prompts_of_a_file(pair: tuple[Path, Path], synthetic: Callable[..., None], tmp_path: Path) -> None:
    synthetic(old=0.0, new=0.0)
    file = tmp_path / "prompts.txt"
    file.write_text("a red apple\n\n  a (green:1.2) pear \n")
    done = bench("run", pair[0], "--prompts", file, "--output", tmp_path / "a.json", "--json")
    config = json.loads(done.stdout)["config"]
    assert done.exit_code == 0 and config["prompt"] == "a red apple" and config["prompts"]["count"] == 2
    jsonschema.validate(json.loads(done.stdout), json.loads((ROOT / "docs" / "bench-schema.json").read_text()))
    assert bench("run", pair[0], "--output", tmp_path / "b.json").exit_code == 0
    done = bench("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert done.exit_code == 9 and "config.prompts" in done.stderr
    assert bench("ab", *pair, "--prompts", file).exit_code == 0
    for data, fragment in (
        (b"\n \n", "no prompt in it"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b"a\n" * 600_000, "1,200,000 bytes, more than the limit of 1,048,576 bytes"),
    ):
        file.write_bytes(data)
        refused(bench("run", pair[0], "--prompts", file), 3, f"prompts.txt: {fragment}")
    refused(bench("run", pair[0], "--prompts", tmp_path / "none.txt"), 3, "none.txt: cannot be read")


def test_run_fails_for_wrong_pictures(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    def wrong(_: Request) -> dict[str, Any]:
        made = answer(np.random.default_rng(0))
        made["fidelity"] |= {"ok": False, "problems": ["vae_decoder: pixels: differs"]}
        return made

    monkeypatch.setattr(bench_run.run, "__defaults__", (wrong,))
    done = bench("run", pair[0], "--output", tmp_path / "a.json", "--json")
    assert done.exit_code == 1 and "the pictures are wrong: vae_decoder: pixels: differs" in done.stderr
    assert json.loads(done.stdout)["fidelity"]["ok"] is False and (tmp_path / "a.json").exists()


def test_ab_fails_for_ten_per_cent_and_passes_for_the_same(
    pair: tuple[Path, Path], synthetic: Callable[..., None], tmp_path: Path
) -> None:
    synthetic(old=0.0, new=0.1)
    done = bench("ab", *pair, "--emit", f"junit={tmp_path / 'x.xml'}")
    assert done.exit_code == 1 and "total_ms SLOWER" in done.stdout, done.stderr
    assert "<failure" in (tmp_path / "x.xml").read_text()
    synthetic(old=0.0, new=0.0)
    assert bench("ab", *pair).exit_code == 0
    done = bench("ab", *pair, "--pairs", 2)
    assert (
        done.exit_code == 8
        and "total_ms: 2 pairs decide nothing, 6 are the least" in done.stdout
        and "can see" not in done.stdout
    )
    synthetic(old=0.0, new=0.1)
    assert bench("ab", *pair, "--margin", 0.3).exit_code == 0
    refused(bench("ab", *pair, "--margin", 0), 2, "--margin 0: expected a share above 0")
    refused(bench("ab", *pair, "--pairs", 51), 2, "--pairs 51: expected at most 50")


@pytest.mark.parametrize(
    ("options", "fragment"),
    [(["--scenario", "batches"], "did you mean 'batch'"), (["--processes", 0], "--processes 0: expected at least 1"), (["--pictures", 0], "at least 1"),
     (["--rate", 0], "--rate 0: expected above 0"), (["--rate", "nan"], "--rate nan"), (["--duration", -1], "--duration"), (["--queue", -1], "--queue -1"),
     (["--rate", 900, "--duration", 9000], "the limit is 100,000"), (["--size", "64"], "--size 64: expected WIDTHxHEIGHT"), (["--batch", 2], "choose --scenario batch"),
     (["--warm-up", "inf"], "--warm-up"), (["--scenario", "batch", "--batch", 0], "--batch 0: expected at least 1")],
)  # fmt: skip
def test_bad_options(flat_bundle: Path, options: list[object], fragment: str) -> None:
    done = bench("run", flat_bundle, *options)
    refused(done, 2)
    assert fragment.lower() in done.stderr.lower()


@pytest.mark.parametrize("command", ["run", "ab"])
def test_every_field_of_a_request_is_a_parameter(command: str) -> None:
    """A request takes what the parameter of the same name holds; the rest is for the processes that measure, or for `run` alone."""
    parameters = {
        parameter.name for parameter in typer.main.get_command(app).commands["bench"].commands[command].params
    }  # type: ignore[attr-defined]
    internal = {"bundle", "negative", "process", "python", "spawned_ns"}
    assert {field.name for field in fields(Request)} - internal - parameters == (
        {"layers"} if command == "ab" else set()
    )


def test_bundles_that_are_not_there(tmp_path: Path) -> None:
    refused(bench("run", tmp_path / "none.sdrt"), 3, "no such bundle")
    refused(bench("ab", tmp_path / "none.sdrt", tmp_path / "none.sdrt"), 3, "no such bundle")


def test_an_interpreter_that_is_not_there(pair: tuple[Path, Path]) -> None:
    refused(
        bench("ab", *pair, "--old-python", "none/python"), 2, "--old-python none/python: expected a Python interpreter"
    )


def test_full_disks_are_named(
    pair: tuple[Path, Path], synthetic: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    synthetic(old=0.0)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/dev/full")
    refused(
        bench("run", pair[0]),
        6,
        "/dev/full: cannot add the summary: No space left on device",
        "unset GITHUB_STEP_SUMMARY",
    )
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    history = tmp_path / "runs"
    assert bench("run", pair[0], "--history", history).exit_code == 0
    before = (history / "history.jsonl").read_bytes()
    script = (  # a limit on the size of files stops the second line half-way, as a full disk does
        "import resource, sys\nfrom pathlib import Path\nfrom bench_documents import document\nfrom sdrt.bench import history\nfrom sdrt.errors import ResourceError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100},) * 2)\n"
        "try:\n    history.append(Path(sys.argv[1]), document(0, 1))\nexcept ResourceError as error:\n    print(error.message)\n    sys.exit(error.exit_code)"
    )
    environment = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))}
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, str(history)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 6 and "history.jsonl: cannot add this run: File too large" in done.stdout, done.stderr
    assert (history / "history.jsonl").read_bytes() == before


# trend


def test_trend(pair: tuple[Path, Path], synthetic: Callable[..., None], tmp_path: Path) -> None:
    synthetic(old=0.0, new=0.5)
    for _ in range(11):
        assert bench("run", pair[0], "--history", tmp_path / "runs", "--processes", 2).exit_code == 0
    done = bench("trend", tmp_path / "runs", "--html", tmp_path / "t.html", "--check")
    assert done.exit_code == 0 and "within" in done.stdout and "<svg" in (tmp_path / "t.html").read_text()
    assert bench("run", pair[1], "--history", tmp_path / "runs", "--processes", 2).exit_code == 0
    assert bench("trend", tmp_path / "runs").exit_code == 0
    done = bench("trend", tmp_path / "runs", "--check", "--json")
    found = {trend["name"]: trend["outside"] for trend in json.loads(done.stdout)["trends"]}
    assert done.exit_code == 1 and found["total_ms"] and not found["jobs"]
    refused(bench("trend", tmp_path / "none"), 3, "cannot be read")


def test_measuring_imports_no_torch_and_no_plotting_library() -> None:
    script = (
        "import sys, pkgutil, importlib, sdrt.bench\n"
        "for m in pkgutil.iter_modules(sdrt.bench.__path__):\n    m.name in ('report', 'plots') or importlib.import_module('sdrt.bench.' + m.name)\n"
        "bad = {'torch', 'onnx', 'matplotlib', 'onnxruntime', 'openvino'} & set(sys.modules)\nsys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
