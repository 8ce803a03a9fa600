"""`sdrt generate`: the pictures it writes, their names, and every option that it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from commands import failed, names_in, only_json, run
from conftest import CHECKPOINT
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdrt import __version__
from sdrt.files import publish
from sdrt.runtime import Pipeline
from sdrt.runtime.pictures import file as picture_file
from sdrt.runtime.pictures.file import save_new_picture


def test_generate(shared: Path, here: Path, loaded: Pipeline) -> None:
    result = run(
        "generate",
        shared,
        "red apple",
        "--negative",
        "blue",
        "--steps",
        3,
        "--cfg",
        3,
        "--seed",
        7,
        "--output",
        "apple.png",
    )
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
        run(
            "generate",
            shared,
            "röd äpple 🍎",
            "--steps",
            2,
            "--seed",
            40,
            "--count",
            3,
            "--batch",
            2,
            "--size",
            "72x64",
            "-o",
            "fruit.png",
            "--json",
        )
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
    assert (
        run(
            "generate",
            shared,
            "apple",
            "--steps",
            1,
            "--output",
            "a/b/x.png",
            "--contact-sheet",
            "c/s.png",
            "--preview",
            "d/e",
        ).exit_code
        == 0
    )
    assert (names_in(here), names_in(here / "a/b"), names_in(here / "c"), names_in(here / "d/e")[0][-8:]) == (
        ["a", "c", "d"],
        ["x.png"],
        ["s.png"],
        "-001.png",
    )
    failed(run("generate", shared, "(apple:9999)", "--output", "f/g/x.png"), 2, "weight")
    failed(
        run("generate", shared, "apple", "--output", "a/b/x.png/y.png"), 2, "--output a/b/x.png: ", "x.png is no folder"
    )
    assert names_in(here) == ["a", "c", "d"]


def test_generate_counts_up_and_says_what_it_replaced(shared: Path, here: Path) -> None:
    """Names that nobody chose replace nothing, whoever made what is there; a name that was chosen replaces a picture of ours and says so."""
    for prompt in ("teddy", "panda", "panda"):
        assert run("generate", shared, prompt, "--steps", 1, "--seed", 1).exit_code == 0
    (here / "small-2.png").write_text("mine")
    report = only_json(run("generate", shared, "fox", "--steps", 1, "--seed", 1, "--count", 2, "--json"))
    assert [picture["path"] for picture in report["pictures"]] == ["small-1-4.png", "small-2-2.png"]
    assert names_in(here) == [
        "small-1-2.png",
        "small-1-3.png",
        "small-1-4.png",
        "small-1.png",
        "small-2-2.png",
        "small-2.png",
    ]
    with Image.open("small-1.png") as first, Image.open("small-1-2.png") as second:
        assert [json.loads(image.info["sdrt"])["prompt"] for image in (first, second)] == ["teddy", "panda"]
    again = run("generate", shared, "fox", "--steps", 1, "--output", "small-1.png")
    assert again.exit_code == 0 and "note: small-1.png: replaced the picture that was there" in again.stderr


def test_counting_up_survives_a_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the name between the look and the rename."""
    (tmp_path / "x.png").write_bytes(b"theirs")
    monkeypatch.setattr("os.path.lexists", lambda path: False)
    monkeypatch.setattr(
        publish,
        "_renameat2",
        lambda old, new, flags: errno.EEXIST if os.access(new, os.F_OK) else old.rename(new) and 0,
    )
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
    failed(
        run("build", "--checkpoint", CHECKPOINT, "--output", shared / "new" / "x.sdrt"),
        2,
        "would write into the bundle",
    )
    failed(
        run("sign", shared, "--key", "none.pem", "--output", shared / "graphs" / "x.sig"),
        2,
        "would write into the bundle",
    )
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
    seeds = {
        only_json(run("generate", shared, "apple", "--steps", 1, "--json", *asked))["pictures"][0]["seed"]
        for asked in ((), (), ("--seed", -1))
    }
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
    failed(
        run("generate", shared, "apple", "--steps", 1, "--seed", 41, "--count", 2, "--output", "x.png"), 2, "x-42.png"
    )
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
        (["--cfg-rescale", "2"], ["cfg rescale 2", "0 to 1"]),
        (["--timesteps", "999;499"], ["--timesteps 999;499", "999,749,499,249"]),
        (["--timesteps", "499,999"], ["timesteps: 499, 999: they rise"]),
        (["--timesteps", "1000,499"], ["timesteps: 1000", "999 to 0"]),
        (["--timesteps", "999,499", "--sampler", "plms"], ["sampler plms takes no list"]),
        (["--sigmas", "14.6,x,0"], ["--sigmas 14.6,x,0", "expected numbers"]),
        (["--sigmas", "14.6,1"], ["sigmas: the last is 1"]),
        (["--sigmas", "14.6,0", "--timesteps", "999"], ["timesteps: given beside sigmas"]),
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
        (
            ["--output", "x.png", "--contact-sheet", "../here/x.png"],
            ["--contact-sheet ../here/x.png", "another name than --output"],
        ),
        (
            ["--output", "new/x-7.png", "--contact-sheet", "./new/x-7.png", "--seed", "7"],
            ["--contact-sheet new/x-7.png"],
        ),
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
def test_generate_on_a_bad_engine(
    small_bundle: Path, here: Path, options: list[str], code: int, fragments: list[str]
) -> None:
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
