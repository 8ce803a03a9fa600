"""The command line: exit codes, what goes to stdout and stderr, and what is left on disk."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from conftest import CHECKPOINT, LORA
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from sdrt import __version__, publish
from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import GRAPHS
from sdrt.cli import app
from sdrt.cli import compile as cli_compile
from sdrt.cli.output import print_report
from sdrt.errors import SdrtError
from sdrt.runtime import Pipeline, picture_file
from sdrt.runtime.picture_file import save_new_picture

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
SCRIPT = Path(sys.executable).with_name("sdrt")


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])  # type: ignore[return-value]


def failed(result: Result, code: int, *fragments: str) -> str:
    """The command ended with this code, one `error:` line that holds the fragments, at most one `fix:` line after it, and nothing on stdout."""
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert len(lines) - start in (1, 2)
    assert len(lines) - start == 1 or lines[-1].startswith("  fix: ")
    assert all(line.isprintable() for line in lines)
    assert result.stdout == ""
    for fragment in fragments:
        assert fragment in result.stderr
    return result.stderr


def only_json(result: Result) -> dict[str, Any]:
    """The one JSON object that is all of stdout."""
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


@pytest.fixture(autouse=True)
def nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--target auto` is ONNX Runtime here, whatever is installed; compiling has tests of its own."""
    monkeypatch.setattr(cli_compile, "_automatic", lambda: "onnxruntime")


@pytest.fixture(scope="module")
def loaded(small_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(small_bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture
def shared(loaded: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small bundle, whose engine is loaded once for many commands."""

    def load(path: Path, **_: object) -> Pipeline:
        assert path == loaded.bundle.path
        return Pipeline(loaded.bundle, loaded._engine, loaded._conditioner._tokenizer)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "load", load)
    return loaded.bundle.path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_help_warns_of_the_order_of_scales() -> None:
    text = " ".join(run("build", "--help").stdout.split())
    assert "TE_SCALE" in text
    assert "other order" in text


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


# Build, inspect, verify


@pytest.fixture
def quick(flat_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds without their self-check."""
    from sdrt.export import selfcheck

    def check(recipe: object, weights: object, graphs: dict[str, Path], reference: Path) -> dict[str, float]:
        reference.touch()
        return dict.fromkeys(graphs, 0.0)

    monkeypatch.setattr(selfcheck, "check", check)


def test_build_prints_one_json_object(here: Path, quick: None) -> None:
    output = here / "styled.sdrt"
    result = run("build", "--checkpoint", CHECKPOINT, "--lora", f"{LORA}:0.5:0.25", "--size", "128x64", "--output", output, "--json")
    report = only_json(result)
    assert report["bundle"] == str(output)
    assert report["cached_traces"] == list(GRAPHS)
    assert report["size_bytes"] == sum(record.size_bytes for record in open_bundle(output).manifest.files.values())
    assert [(s["name"], s["scale"], s["te_scale"]) for s in report["sources"]] == [("emoji.safetensors", None, None), ("blindbox.safetensors", 0.5, 0.25)]
    assert report["errors"].keys() == set(GRAPHS)
    assert "write" in report["stages_s"]
    for stage in ("read", "fuse", "check step", "write"):
        assert f"{stage} …" in result.stderr.splitlines()
    assert open_bundle(output).manifest.latents.size == (128, 64)


def test_build_in_words(here: Path, quick: None) -> None:
    result = run("build", "--checkpoint", CHECKPOINT, "--lora", LORA)
    assert result.exit_code == 0, result.stderr
    first, last = result.stdout.splitlines()
    assert re.fullmatch(r"blindbox\.safetensors at 1:1 .*12 modules of the text_encoder .*[\d.]+%.* 236 modules of the unet .*[\d.]+%.*", first)
    assert last.startswith(f"built {here / 'emoji+blindbox.sdrt'} (")
    assert 'next: sdrt generate emoji+blindbox.sdrt "your prompt"' in result.stderr
    assert names_in(here) == ["emoji+blindbox.sdrt"]


def test_verify(small_bundle: Path) -> None:
    report = only_json(run("verify", small_bundle, "--json"))
    assert report["ok"] is True
    assert {check["graph"] for check in report["checks"]} == set(GRAPHS)
    assert all(check["error"] <= check["limit"] for check in report["checks"])
    result = run("verify", small_bundle)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == len(report["checks"])
    assert all(line.startswith("ok ") for line in result.stdout.splitlines())


def test_inspect_a_checkpoint() -> None:
    report = only_json(run("inspect", CHECKPOINT, "--json"))
    assert report["kind"] == "a Stable Diffusion 1.x model"
    assert (report["buildable"], report["family"], report["size"]) == (True, "sd1", [64, 64])
    assert report["types"] == {"F16": 966, "F32": 2, "I64": 1}
    assert report["tensors"] == 969
    assert report["architecture"]["unet"]["channels"] == [64, 96, 128, 128]
    words = run("inspect", CHECKPOINT)
    assert words.exit_code == 0
    assert "kind: a Stable Diffusion 1.x model" in words.stdout
    assert "context_width" not in words.stdout and words.stderr == "all fields: sdrt inspect --all\n"
    assert "context_width: 64" in run("inspect", CHECKPOINT, "--all").stdout


def test_inspect_a_lora() -> None:
    report = only_json(run("inspect", LORA, "--json"))
    assert report["kind"] == "a LoRA"
    assert sum(report["modules"].values()) == sum(report["ranks"].values()) == 248
    assert report["ranks"].keys() == {"8", "16"}
    assert report["metadata"]["ss_output_name"] == "blindbox"


def test_inspect_a_bundle(small_bundle: Path) -> None:
    report = only_json(run("inspect", small_bundle, "--json"))
    assert report["kind"] == "a bundle"
    assert report["sources"][0]["name"] == "small.safetensors"
    words = run("inspect", small_bundle)
    assert words.exit_code == 0
    assert "family: sd1" in words.stdout


def test_inspect_shows_control_characters_escaped(tmp_path: Path) -> None:
    from conftest import RawTensor, write_raw

    path = write_raw(tmp_path / "x.safetensors", {"a": RawTensor("F32", (1,), bytes(4))}, {"title\x1b[31m": "\x1b]0;owned\x07"})
    result = run("inspect", path)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\\x1b]0;owned\\x07" in result.stdout


# Generate


def test_generate(shared: Path, here: Path, loaded: Pipeline) -> None:
    result = run("generate", shared, "red apple", "--negative", "blue", "--steps", 3, "--cfg", 3, "--seed", 7, "--output", "apple.png")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "apple.png  seed 7\n"
    assert re.fullmatch(r"[\d.]+ s on onnxruntime\n", result.stderr)
    assert names_in(here) == ["apple.png"]
    expected = loaded("red apple", negative="blue", steps=3, cfg=3, seed=7).images[0]
    with Image.open("apple.png") as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected)
        parameters = json.loads(image.info["sdrt"])
    assert {key: parameters[key] for key in ("prompt", "negative", "steps", "cfg", "seed", "sampler", "size", "bundle", "sdrt")} == {
        "prompt": "red apple", "negative": "blue", "steps": 3, "cfg": 3.0, "seed": 7, "sampler": "euler", "size": [64, 64], "bundle": "small", "sdrt": __version__,
    }  # fmt: skip
    assert parameters["engine"]["backend"] == "onnxruntime"


def test_generate_several(shared: Path, here: Path, loaded: Pipeline) -> None:
    report = only_json(
        run("generate", shared, "röd äpple 🍎", "--steps", 2, "--seed", 40, "--count", 3, "--batch", 2, "--size", "72x64", "-o", "fruit.png", "--json")
    )
    assert report["pictures"] == [{"path": f"fruit-{seed}.png", "seed": seed} for seed in (40, 41, 42)]
    assert names_in(here) == ["fruit-40.png", "fruit-41.png", "fruit-42.png"]
    assert report["engine"]["backend"] == "onnxruntime"
    assert report["parameters"]["prompt"] == "röd äpple 🍎"
    assert len(report["timings_ms"]["steps"]) == 4
    expected = loaded("röd äpple 🍎", steps=2, seed=40, count=3, batch=2, size=(72, 64)).images
    for i, seed in enumerate((40, 41, 42)):
        with Image.open(f"fruit-{seed}.png") as image:
            assert image.size == (72, 64)
            assert np.array_equal(np.asarray(image), expected[i])
            assert json.loads(image.info["sdrt"])["seed"] == seed


def test_generate_makes_folders_and_takes_them_back(shared: Path, here: Path) -> None:
    assert run("generate", shared, "apple", "--steps", 1, "--output", "a/b/x.png", "--contact-sheet", "c/s.png", "--preview", "d/e").exit_code == 0
    assert (names_in(here), names_in(here / "a/b"), names_in(here / "c"), names_in(here / "d/e")[0][-8:]) == (["a", "c", "d"], ["x.png"], ["s.png"], "-001.png")
    failed(run("generate", shared, "(apple:9999)", "--output", "f/g/x.png"), 2, "weight")
    failed(run("generate", shared, "apple", "--output", "a/b/x.png/y.png"), 2, "--output a/b/x.png: ", "x.png is no folder")
    assert names_in(here) == ["a", "c", "d"]


def test_generate_counts_up_and_says_what_it_replaced(shared: Path, here: Path) -> None:
    """Names that nobody chose replace nothing, whoever made what is there; a name that was chosen replaces a picture of ours and says so."""
    for prompt in ("teddy", "panda", "panda"):
        assert run("generate", shared, prompt, "--steps", 1, "--seed", 1).exit_code == 0
    (here / "small-2.png").write_text("mine")
    report = only_json(run("generate", shared, "fox", "--steps", 1, "--seed", 1, "--count", 2, "--json"))
    assert [picture["path"] for picture in report["pictures"]] == ["small-1-4.png", "small-2-2.png"]
    assert names_in(here) == ["small-1-2.png", "small-1-3.png", "small-1-4.png", "small-1.png", "small-2-2.png", "small-2.png"]
    with Image.open("small-1.png") as first, Image.open("small-1-2.png") as second:
        assert [json.loads(image.info["sdrt"])["prompt"] for image in (first, second)] == ["teddy", "panda"]
    again = run("generate", shared, "fox", "--steps", 1, "--output", "small-1.png")
    assert again.exit_code == 0 and "note: small-1.png: replaced the picture that was there" in again.stderr


def test_counting_up_survives_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the name between the look and the rename."""
    (tmp_path / "x.png").write_bytes(b"theirs")
    monkeypatch.setattr("os.path.lexists", lambda path: False)
    monkeypatch.setattr(publish, "_renameat2", lambda old, new, flags: errno.EEXIST if os.access(new, os.F_OK) else old.rename(new) and 0)
    assert save_new_picture(tmp_path / "x.png", b"ours") == tmp_path / "x-2.png"
    assert (tmp_path / "x.png").read_bytes() == b"theirs" and names_in(tmp_path) == ["x-2.png", "x.png"]


def test_generate_as_jpeg_and_webp(shared: Path, here: Path) -> None:
    for name, format in (("x.jpg", "JPEG"), ("x.webp", "WEBP")):
        assert run("generate", shared, "apple", "--steps", 1, "--seed", 3, "--output", name).exit_code == 0
        with Image.open(name) as image:
            assert image.format == format
        again = run("generate", shared, "--from-png", name, "--output", f"{format}.png")
        assert again.exit_code == 0, again.stderr
    assert Path("JPEG.png").read_bytes() == Path("WEBP.png").read_bytes()


@pytest.mark.parametrize(
    "options",
    [["--output", "{bundle}/x.png"], ["--output", "{bundle}/engines/a/b/x.png"], ["--contact-sheet", "link/s.png"], ["--preview", "{bundle}/p"], ["--preview", "{bundle}"]],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_generate_writes_into_no_bundle(shared: Path, here: Path, options: list[str]) -> None:
    (here / "link").symlink_to(shared)
    before = sorted(shared.rglob("*"))
    failed(
        run("generate", shared, "apple", "--steps", 1, *(part.format(bundle=shared) for part in options)),
        2,
        options[0],
        f"would write into the bundle {shared}",
    )
    assert sorted(shared.rglob("*")) == before


def test_nothing_else_writes_into_a_bundle(shared: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(shared.rglob("*"))
    failed(run("build", "--checkpoint", CHECKPOINT, "--output", shared / "new" / "x.sdrt"), 2, "would write into the bundle")
    failed(run("sign", shared, "--key", "none.pem", "--output", shared / "graphs" / "x.sig"), 2, "would write into the bundle")
    failed(run("bench", "run", shared, "--output", shared / "x.json"), 2, "would write into the bundle")
    failed(run("bench", "run", shared, "--history", shared / "runs"), 2, "would write into the bundle")
    failed(run("bench", "run", shared, "--emit", f"csv={shared / 'x.csv'}"), 2, "would write into the bundle")
    monkeypatch.chdir(shared)
    failed(run("generate", ".", "apple", "--steps", 1), 2, "--output: would write into the bundle")
    assert sorted(shared.rglob("*")) == before


def test_a_picture_is_named_after_the_folder(shared: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever leads to it."""
    load = Pipeline.load
    monkeypatch.setattr(Pipeline, "load", lambda path, **options: load(path.resolve(), **options))  # type: ignore[arg-type]
    (here / "latest").symlink_to(shared)
    for way in (shared / "graphs" / "..", "latest"):
        assert run("generate", way, "apple", "--steps", 1, "--seed", 5).exit_code == 0
    assert names_in(here) == ["latest", "small-5-2.png", "small-5.png"]


def test_generate_draws_and_reports_a_seed(shared: Path, here: Path) -> None:
    seeds = {only_json(run("generate", shared, "apple", "--steps", 1, "--json", *asked))["pictures"][0]["seed"] for asked in ((), (), ("--seed", -1))}
    assert len(seeds) == 3 and min(seeds) >= 0
    assert names_in(here) == sorted(f"small-{seed}.png" for seed in seeds)


def test_generate_replaces_its_own_pictures_only(shared: Path, here: Path) -> None:
    def command(*more: str) -> Result:
        return run("generate", shared, "apple", "--steps", 1, "--seed", 1, "--output", "x.png", *more)

    assert command().exit_code == 0
    ours = Path("x.png").read_bytes()
    Path("x.png").write_bytes(ours + b"")
    assert command().exit_code == 0
    assert Path("x.png").read_bytes() == ours
    info = PngInfo()
    info.add_text("parameters", "by another tool")
    Image.new("RGB", (8, 8)).save("foreign.png", pnginfo=info)
    foreign: list[bytes] = [Path("foreign.png").read_bytes(), b"", b"text", b"\x89PNG\r\n\x1a\n", ours[:40]]
    for content in foreign:
        Path("x.png").write_bytes(content)
        failed(command(), 2, "x.png", "not a picture sdrt made", "--force")
        assert Path("x.png").read_bytes() == content
    assert command("--force").exit_code == 0
    assert Path("x.png").read_bytes() == ours


def test_generate_checks_every_name_before_it_starts(shared: Path, here: Path) -> None:
    Path("x-42.png").write_text("mine")
    failed(run("generate", shared, "apple", "--steps", 1, "--seed", 41, "--count", 2, "--output", "x.png"), 2, "x-42.png")
    assert names_in(here) == ["x-42.png"]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--size", "501x512"], ["501x512", "504x512"]),
        (["--size", "0x0"], ["0x0", "64x64"]),
        (["--size", "56x64"], ["56x64", "64x64"]),
        (["--size", "64x8200"], ["64x8200", "64x8192"]),
        (["--size", "abc"], ["abc", "512x768"]),
        (["--size", "64"], ["64", "512x768"]),
        (["--size", "-64x64"], ["-64x64", "512x768"]),
        (["--size", "1e9x64"], ["1e9x64"]),
        (["--size", "99999999x64"], ["99999999x64"]),
        (["--size", ""], ["--size"]),
        (["--steps", "0"], ["steps 0", "1000"]),
        (["--steps", "-1"], ["steps -1"]),
        (["--steps", "1001"], ["steps 1001"]),
        (["--cfg", "nan"], ["cfg nan"]),
        (["--cfg", "inf"], ["cfg inf"]),
        (["--cfg", "1e9"], ["cfg 1000000000"]),
        (["--seed", "-2"], ["seed -2", "18446744073709551615"]),
        (["--seed", "18446744073709551616"], ["seed 18446744073709551616"]),
        (["--seed", "18446744073709551615", "--count", "2"], ["seed 18446744073709551615"]),
        (["--batch", "0"], ["batch 0", "1 to 64"]),
        (["--batch", "65"], ["batch 65"]),
        (["--count", "0"], ["count 0"]),
        (["--count", "-5"], ["count -5"]),
        (["--count", "10001"], ["count 10001"]),
        (["--sampler", "eulr"], ["eulr", "did you mean 'euler'"]),
        (["--sampler", ""], ["sampler"]),
        (["--schedule", "karass"], ["karass", "karras"]),
        (["--sampler", "euler", "--schedule", "leading"], ["leading"]),
        (["--count", "100000000"], ["count 100000000"]),  # before that many names are made
        (["--network-tags", "drop"], ["network tags 'drop'", "refuse, ignore"]),
        (["--output", "x.gif"], ["x.gif", ".png or .jpg or .jpeg or .webp"]),
        (["--output", "x.png", "--contact-sheet", "../here/x.png"], ["--contact-sheet ../here/x.png", "another name than --output"]),
        (["--output", "new/x-7.png", "--contact-sheet", "./new/x-7.png", "--seed", "7"], ["--contact-sheet new/x-7.png"]),
        (["--output", "x" * 300 + ".png"], ["File name too long"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_generate_with_bad_options(shared: Path, here: Path, options: list[str], fragments: list[str]) -> None:
    failed(run("generate", shared, "apple", *options), 2, *fragments)
    assert not names_in(here)


@pytest.mark.parametrize(
    ("options", "code", "fragments"),
    [
        (["--backend", "onnxrutime"], 2, ["onnxrutime", "did you mean 'onnxruntime'"]),
        (["--backend", "openvino"], 5, ["no openvino engine fits: there is none", "--target openvino"]),
        (["--threads", "0"], 2, ["threads 0"]),
        (["--threads", "-1"], 2, ["threads -1"]),
        (["--device", "-1"], 2, ["device -1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_on_a_bad_engine(small_bundle: Path, here: Path, options: list[str], code: int, fragments: list[str]) -> None:
    failed(run("generate", small_bundle, "apple", *options), code, *fragments)
    assert not names_in(here)


def test_long_prompt(shared: Path, here: Path) -> None:
    """Any length, unless diffusers' picture is asked for, which would leave the end out."""
    failed(run("generate", shared, "apple " * 76, "--compat", "diffusers"), 2, "prompt: 76 tokens", "75", "Shorten it")
    failed(run("generate", shared, "apple", "--negative", "apple " * 76, "--compat", "diffusers"), 2, "76 tokens")
    assert run("generate", shared, "apple " * 160, "--steps", 1).exit_code == 0


def test_failed_picture_leaves_nothing(shared: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:40])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(picture_file, "write_file", full)
    failed(run("generate", shared, "apple", "--steps", 1, "--output", "x.png"), 6, "No space left on device", "x.png")
    assert not names_in(here)


# Errors


@pytest.mark.parametrize(
    ("args", "fragment"),
    [
        (["generate", "--json"], "Missing argument 'BUNDLE'"),
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
    stderr = failed(run("build", "--checkpoint", "emoji-v2.safetensors"), 3, "emoji-v2.safetensors: cannot open", "did you mean 'emoji-v1.safetensors'?")
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
        (["generate", CHECKPOINT, "apple"], 3, "not a bundle"),
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
    stderr = failed(run("build", *others, option, "evil.pt"), 4, "evil.pt", "the name posix.system", "nothing of it was run")
    assert "weights_only" not in stderr
    failed(run("inspect", "evil.pt"), 4, "posix.system")
    assert names_in(here) == ["evil.pt"]


def test_averaged_weights_that_the_checkpoint_lacks(here: Path) -> None:
    failed(run("build", "--checkpoint", CHECKPOINT, "--ema"), 3, "has no averaged weights", "Leave out --ema.")


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
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 5, ["onnx is not installed", "pip install 'torch>=2.10' 'onnx>=1.21'"]),
        (ModuleNotFoundError("No module named 'onnxruntime.x'", name="onnxruntime.x"), 5, ["onnxruntime is not installed", "pip install 'onnxruntime>="]),
        (ModuleNotFoundError("No module named 'other'", name="other"), 70, ["other", "bug in sdrt"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exceptions_become_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, fragments: list[str]) -> None:
    def raises(*_: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("sdrt.export.build"), "build", raises)
    failed(run("build", "--checkpoint", "x"), code, *fragments)


# As a process of its own


def process(*args: object, cwd: Path, env: Mapping[str, str] | None = None, code: str = "") -> subprocess.CompletedProcess[str]:
    """The installed script, or the command line after some Python `code`."""
    command: Sequence[object] = [sys.executable, "-c", f"{code}\nfrom sdrt.cli import app\napp()", *args] if code else [SCRIPT, *args]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | dict(env or {})
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", errors="surrogateescape", check=False
    )


def test_script_in_plain_and_poor_terminals(here: Path) -> None:
    for env in ({"NO_COLOR": "1"}, {"COLUMNS": "20"}, {"LANG": "C", "LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}):
        done = process("build", "--help", cwd=here, env=env)
        assert (done.returncode, done.stderr) == (0, ""), env
        assert "--checkpoint" in re.sub(r"\s|│|\|", "", done.stdout), env
        assert "\x1b" not in done.stdout, env


@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["ascii", "C without UTF-8"]
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
    names = [os.fsdecode(byte + suffix) for byte, suffix in ((b"\xfd", b".png"), (b"\xfe", b".safetensors"), (b"\xff", b".safetensors"))]
    (here / names[1]).write_bytes(LORA.read_bytes())
    assert process("generate", small_bundle, "apple", "--steps", "1", "--output", names[0], cwd=here).returncode == 0
    assert "kind: a LoRA" in process("inspect", names[1], cwd=here).stdout
    assert process("inspect", names[2], cwd=here).returncode == 3
    assert names_in(here) == names[:2]


def test_error_of_the_script(here: Path) -> None:
    done = process("generate", "none.sdrt", "apple", cwd=here)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == f"error: {here}/none.sdrt: no such bundle\n  fix: Make one with: sdrt build --checkpoint FILE\n"


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["inspect", str(CHECKPOINT)], ["inspect", str(CHECKPOINT), "--json"]], ids=lambda a: a[0] + a[-1][:6]
)
def test_reader_that_went_away(here: Path, args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([str(SCRIPT), *args], stdout=closed, stderr=subprocess.PIPE, text=True, cwd=here, check=False)
    assert done.returncode in (0, 1)  # typer itself ends with 1 while it prints the help
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("stdout", "stderr", "code"), [("/dev/full", None, 6), (None, "/dev/full", 0), ("/dev/full", "/dev/full", 6)])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_under_what_is_printed(here: Path, small_bundle: Path, stdout: str | None, stderr: str | None, code: int, options: list[str]) -> None:
    """The picture is there; what cannot be told on stdout fails the command, what cannot be told on stderr does not."""
    command = [sys.executable, "-m", "sdrt.cli", "generate", str(small_bundle), "apple", "--steps", "1", "--output", "x.png", *options]
    with open(stdout or here / "out", "w") as out, open(stderr or here / "err", "w") as err:
        assert subprocess.run(command, cwd=here, stdout=out, stderr=err, timeout=120).returncode == code
    assert (here / "x.png").exists()
    if stderr is None:
        said = (here / "err").read_text()
        assert "Traceback" not in said and "No space left" in said
    else:
        assert stdout or (here / "out").read_text()


def test_no_stdout_at_all(here: Path) -> None:
    done = subprocess.run(["sh", "-c", '"$0" inspect "$1" >&-', str(SCRIPT), str(CHECKPOINT)], capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["torch", "onnx_ir"])
def test_build_without_its_packages(here: Path, missing: str) -> None:
    done = process("build", "--checkpoint", CHECKPOINT, cwd=here, code=f"import sys; sys.modules[{missing!r}] = None")
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[-2] == f"error: {missing} is not installed"
    assert done.stderr.splitlines()[-1].startswith("  fix: Install it with: pip install 'torch>=2.10' 'onnx>=1.21'")
    assert not names_in(here)


def test_generate_without_an_engine(here: Path, small_bundle: Path) -> None:
    done = process("generate", small_bundle, "apple", cwd=here, code="import sys; sys.modules['onnxruntime'] = None")
    assert done.returncode == 5
    assert "pip install 'onnxruntime>=1.25'" in done.stderr
    assert not names_in(here)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "stage"), [(signal.SIGINT, "check step"), (signal.SIGTERM, "fuse"), (signal.SIGHUP, "bind step")], ids=str)
def test_i2_stopped_build_leaves_nothing(small_checkpoint: Path, here: Path, small_bundle: Path, number: int, stage: str) -> None:
    command = [str(SCRIPT), "build", "--checkpoint", str(small_checkpoint), "--output", "x.sdrt"]
    with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8") as build:
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


def test_records_of_a_list_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    print_report({"sources": [{"kind": "lora", "applied": {"step": 2}, "scales": (1, 2)}, {"kind": "vae", "size_bytes": 1000}], "name": "a"})
    assert capsys.readouterr().out == (
        "sources:\n  - kind: lora\n    applied:\n      step: 2\n    scales: [1, 2]\n  - kind: vae\n    size_bytes: 1,000\nname: a\n"
    )


@pytest.mark.parametrize("command", [[], ["generate"], ["bench", "run"]])
def test_help(command: list[str]) -> None:
    short, long = (CliRunner().invoke(app, [*command, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout and "Usage" in short.stdout


def test_help_shows_the_prompt_syntax_as_it_is_typed() -> None:
    """Rich takes `:name:` for an emoji."""
    assert "[day:dusk:0.5]" in CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).stdout
