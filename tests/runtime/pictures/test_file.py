"""What a PNG says of itself: read by an independent parser, replayed to the same pixels, and every picture that cannot
be replayed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import failed, run
from picture_files import bomb
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager

from sdrt.bundle.folder import bundle_id
from sdrt.errors import InputFileError, UsageError
from sdrt.runtime import Pipeline
from sdrt.runtime.pictures.file import encode, parameters_of, read_said, save_picture
from sdrt.runtime.pictures.infotext import infotext, parse_infotext, settings_of_infotext
from sdrt.runtime.pictures.settings import settings_to_repeat


@pytest.fixture(scope="module")
def loaded(flat_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(flat_bundle, backend="onnxruntime", threads=1) as pipe:
        yield pipe


@pytest.fixture
def shared(loaded: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The emoji bundle, loaded once for many commands, and an empty working folder."""
    monkeypatch.setattr(
        Pipeline, "load", lambda path, **_: Pipeline(loaded.bundle, loaded._engine, loaded._conditioner._tokenizer)
    )  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    return loaded.bundle.path


def read_parameters(path: Path) -> dict[str, Any]:
    return parameters_of(path, read_said(path))


def repeated(path: Path, pipe: Pipeline) -> dict[str, Any]:
    return settings_to_repeat(path, read_parameters(path), pipe.bundle.manifest, {})


def made(pipe: Pipeline, path: Path, prompt: str = "red apple", **settings: Any) -> Path:
    result = pipe(prompt, **{"steps": 2, "cfg": 3.0, "seed": 5} | settings)
    save_picture(path, encode(result.images[0], result.parameters | {"seed": result.seeds[0], "engine": result.engine}))
    return path


# AUTOMATIC1111's text


@pytest.mark.parametrize(
    ("prompt", "negative", "settings"),
    [
        ("red apple", "", {}),
        ("a (red:1.2) apple, [cat|dog]", "blue, ugly", {"sampler": "DPM++ 2M Karras", "seed": 2**40, "cfg": 7.5}),
        ("röd äpple 🍎", "日本", {"sampler": "euler_a", "noise": "cpu"}),
        ("two\nlines", "and\ntwo: more", {"sampler": "ddim", "steps": 3}),
        ("Steps: 20, Sampler: none", "", {}),
    ],
)
def test_an_independent_parser_reads_it(
    loaded: Pipeline, tmp_path: Path, prompt: str, negative: str, settings: dict[str, Any]
) -> None:
    path = made(loaded, tmp_path / "x.png", prompt, negative=negative, **settings)
    info = ParserManager().parse(path)
    assert info is not None and info.generator.value == "AUTOMATIC1111"
    (sampler,) = info.samplers
    asked = json.loads(json.dumps(read_parameters(path)))
    assert [text.value for text in sampler.prompts] == [prompt] and [
        text.value for text in sampler.negative_prompts
    ] == ([negative] if negative else [])
    assert sampler.parameters["steps"] == str(asked["steps"]) and sampler.parameters["seed"] == str(asked["seed"])
    assert float(sampler.parameters["cfg_scale"]) == asked["cfg"]
    assert info.metadata["Size"] == "64x64"
    assert (
        sampler.model is not None
        and sampler.model.name == "emoji"
        and loaded.bundle.manifest.sources[0].sha256.startswith(sampler.model.hash or "-")
    )
    if asked["sampler"] == "dpmpp_2m":
        assert (sampler.name, sampler.parameters["scheduler"]) == ("DPM++ 2M", "Karras")


def test_what_the_text_says_of_images_and_options(loaded: Pipeline) -> None:
    parameters = loaded("sun", steps=1, seed=1).parameters | {
        "strength": 0.6,
        "mask": "m.png",
        "mask_blur": 4,
        "clip_skip": 2,
        "noise": "cpu",
        "emphasis": "no norm",
        "schedule": "sgm_uniform",
        "cfg_rescale": 0.7,
    }
    line = infotext(parameters).splitlines()[-1]
    for part in (
        "Denoising strength: 0.6",
        "Mask blur: 4",
        "Clip skip: 2",
        "RNG: CPU",
        "Emphasis: No norm",
        "Schedule type: SGM Uniform",
        "CFG Rescale: 0.7",
        "Version: sdrt ",
    ):
        assert part in line.split(", ") or part in line


def test_the_text_has_a_list_in_place_of_the_schedule(loaded: Pipeline) -> None:
    """And what reads it again asks for the same."""
    parameters = loaded("sun", steps=1, seed=1).parameters
    for name, numbers in (("timesteps", [999, 749, 499]), ("sigmas", [14.615, 0.1, 0.0])):
        text = infotext(parameters | {name: numbers, "cfg_rescale": 0.5})
        assert f'{name.capitalize()}: "{str(numbers)[1:-1]}"' in text and "Schedule type" not in text
        settings, unused = settings_of_infotext(parse_infotext(text))
        assert settings[name] == tuple(numbers) and settings["cfg_rescale"] == 0.5 and "schedule" not in settings
        assert not unused.keys() - {"Model", "Model hash", "Version"}


def test_what_was_fused_is_named(loaded: Pipeline) -> None:
    """Strengths as tags, text encoder first, and hashes of the files; sd_parsers reads the pairs."""
    fused = [
        {
            "kind": "checkpoint",
            "name": "base.safetensors",
            "sha256": "a" * 64,
            "scale": None,
            "te_scale": None,
            "trigger": None,
        },
        {"kind": "vae", "name": "soft.pt", "sha256": "b" * 64, "scale": None, "te_scale": None, "trigger": None},
        {"kind": "lora", "name": "one.safetensors", "sha256": "c" * 64, "scale": 0.8, "te_scale": 0.8, "trigger": None},
        {"kind": "lora", "name": "two.pt", "sha256": "d" * 64, "scale": 1.0, "te_scale": 0.25, "trigger": None},
        {
            "kind": "embedding",
            "name": "file.bin",
            "sha256": "e" * 64,
            "scale": None,
            "te_scale": None,
            "trigger": "cute",
        },
        {"kind": "hypernetwork", "name": "net.pt", "sha256": "f" * 64, "scale": 0.5, "te_scale": None, "trigger": None},
    ]
    first, pairs = infotext(loaded("sun", steps=1, seed=1).parameters | {"sources": fused}).splitlines()
    assert first == "sun <lora:one:0.8> <lora:two:0.25:1> <hypernet:net:0.5>"
    for part in (
        "Model hash: aaaaaaaaaa, Model: base, VAE hash: bbbbbbbbbb, VAE: soft.pt",
        'Lora hashes: "one: cccccccccccc, two: dddddddddddd"',
        'TI hashes: "cute: eeeeeeeeeeee"',
        'Hypernet hashes: "net: ffffffffffff"',
    ):
        assert part in pairs


def test_a_result_says_what_was_fused(blindbox_bundle: Path) -> None:
    with Pipeline.load(blindbox_bundle, backend="onnxruntime", threads=1) as pipe:
        source, parameters = pipe.bundle.manifest.sources[1], pipe("sun", steps=1, seed=1).parameters
    assert {
        "kind": "lora",
        "name": source.name,
        "sha256": source.sha256,
        "scale": 1.0,
        "te_scale": 1.0,
        "trigger": None,
    } in parameters["sources"]
    assert infotext(parameters).startswith("sun <lora:blindbox:1>\n")


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_every_format_says_how_it_was_made(loaded: Pipeline, format: str) -> None:
    """The text where AUTOMATIC1111 puts it (EXIF's UserComment in UTF-16, but for PNG), the JSON beside it, and the
    picture.
    """
    result = loaded("röd äpple 🍎", steps=2, seed=3)
    parameters = result.parameters | {"engine": result.engine}
    data = encode(result.images[0], parameters, format, quality=100)
    with Image.open(BytesIO(data)) as picture:
        assert picture.format == format.upper()
        difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - result.images[0])
        assert (
            difference.max() == 0 if format != "jpeg" else difference.mean() < 4
        )  # JPEG halves the resolution of colours
        if format == "png":
            text, everything = picture.info["parameters"], picture.info["sdrt"]
        else:
            exif = picture.getexif().get_ifd(0x8769)
            assert exif[0x9286][:8] == b"UNICODE\0"
            text, everything = exif[0x9286][8:].decode("utf-16-be"), exif[0x927C].removeprefix(b"sdrt\0")
    assert text == infotext(parameters) and json.loads(everything) == json.loads(json.dumps(parameters))
    assert encode(result.images[0], parameters, format, quality=100) == data
    with pytest.raises(UsageError, match="did you mean"):
        encode(result.images[0], parameters, format + "x")
    with pytest.raises(UsageError, match="quality 0"):
        encode(result.images[0], parameters, format, quality=0)


def test_more_text_than_a_jpeg_holds(loaded: Pipeline) -> None:
    result = loaded("sun", steps=1, seed=3)
    parameters = result.parameters | {"prompt": "sun " * 10_000}
    with pytest.raises(UsageError, match="longer than a JPEG's EXIF holds"):
        encode(result.images[0], parameters, "jpeg")
    assert len(encode(result.images[0], parameters, "webp")) > 40_000


# Replay


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--sampler", "euler_a", "--negative", "blue", "--size", "72x96"],
        ["--sampler", "DPM++ SDE Karras", "--compat", "a1111"],
        ["--sampler", "ddim", "--compat", "diffusers"],
        ["--noise", "cpu", "--prompt-syntax", "plain", "--cfg", "1"],
    ],
)
def test_replay(shared: Path, options: list[str]) -> None:
    assert (
        run(
            "generate", shared, "a [red:green:0.5] (apple:1.2)", "--steps", 4, "--seed", 9, "-o", "a.png", *options
        ).exit_code
        == 0
    )
    again = run("generate", shared, "--from-png", "a.png", "-o", "b.png")
    assert again.exit_code == 0 and "note" not in again.stderr, again.stderr
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b)) and a.info == b.info


@pytest.mark.parametrize(
    "made_by", [{"backend": "openvino", "compute": "bf16"}, {"backend": "onnxruntime"}, {}, {"backend": ["\x1b[2J"]}]
)
def test_replay_on_another_engine_says_so(shared: Path, made_by: dict[str, Any]) -> None:
    run("generate", shared, "sun", "--steps", 1, "--seed", 9, "-o", "a.png")
    with Image.open("a.png") as picture:
        parameters = json.loads(picture.info["sdrt"]) | {"engine": made_by}
        info = PngInfo()
        info.add_itxt("sdrt", json.dumps(parameters))
        picture.save("other.png", pnginfo=info)
    again = run("generate", shared, "--from-png", "other.png", "-o", "b.png")
    assert (
        again.exit_code == 0
        and "note: other.png: made on " in again.stderr
        and "now on onnxruntime in fp32" in again.stderr
    )
    assert "\x1b[2J" not in again.stderr


def test_replay_of_one_of_several(shared: Path) -> None:
    run("generate", shared, "sun", "--steps", 2, "--seed", 30, "--count", 3, "-o", "x.png")
    assert run("generate", shared, "--from-png", "x-32.png", "-o", "y.png").exit_code == 0
    with Image.open("x-32.png") as a, Image.open("y.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_replay_with_another_seed(shared: Path) -> None:
    """What the command line names stands in the picture's place."""
    run("generate", shared, "sun", "--steps", 3, "--seed", 30, "--cfg", "2.5", "-o", "x.png")
    run("generate", shared, "--from-png", "x.png", "--seed", 31, "-o", "y.png")
    old, new = read_parameters(Path("x.png")), read_parameters(Path("y.png"))
    assert new == old | {"seed": 31}
    run("generate", shared, "moon", "--from-png", "x.png", "-o", "z.png")
    assert read_parameters(Path("z.png")) == old | {"prompt": "moon"}


def test_replay_from_an_image(shared: Path) -> None:
    Image.effect_noise((64, 64), 90).save("init.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    done = run(
        "generate",
        shared,
        "sun",
        "--steps",
        3,
        "--init-image",
        "init.png",
        "--mask",
        "mask.png",
        "--strength",
        "0.8",
        "-o",
        "x.png",
    )
    assert done.exit_code == 0, done.stderr
    run("generate", shared, "--from-png", "x.png", "-o", "y.png")
    with Image.open("x.png") as a, Image.open("y.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
    same = run("generate", shared, "--from-png", "x.png", "--init-image", "init.png", "-o", "z.png")
    Image.effect_noise((64, 64), 91).save("init.png")
    other = run("generate", shared, "--from-png", "x.png", "--init-image", "init.png", "-o", "z.png")
    assert (
        "made from another" not in same.stderr
        and "note: x.png: made from another init image than the one given now" in other.stderr
    )
    failed(run("generate", shared, "--from-png", "x.png", "-o", "y.png"), 2, "init.png, which has changed since")
    Path("init.png").unlink()
    failed(
        run("generate", shared, "--from-png", "x.png", "-o", "y.png"),
        3,
        "init.png, and no init.png that can be read is beside it",
        "--init-image",
    )


def test_a_picture_made_from_memory_knows_it(loaded: Pipeline, shared: Path) -> None:
    start = Image.effect_noise((64, 64), 90).convert("RGB")
    start.save("init.png")
    path = made(loaded, Path("x.png"), init_image=start, strength=0.5)
    failed(
        run("generate", shared, "--from-png", path, "-o", "y.png"),
        3,
        "made from a picture that was no file",
        "--init-image",
    )
    again = run("generate", shared, "--from-png", path, "--init-image", "init.png", "-o", "y.png")
    assert again.exit_code == 0 and "made from another" not in again.stderr, again.stderr
    with Image.open(path) as a, Image.open("y.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_settings_from_another_tool_s_picture(shared: Path) -> None:
    info = PngInfo()
    info.add_text(
        "parameters",
        "sun <lora:x:1>\nSteps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3, Seed: 77, Size: 72x64, Model"
        " hash: 0123456789",
    )
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    done = run("generate", shared, "--settings-from", "theirs.png", "--steps", 3, "-o", "x.png")
    assert done.exit_code == 0, done.stderr
    assert "note: theirs.png: not used: <lora:x:1>" in done.stderr and "not used: Model hash: 0123456789" in done.stderr
    parameters = read_parameters(Path("x.png"))
    assert {name: parameters[name] for name in ("prompt", "steps", "sampler", "schedule", "cfg", "seed", "size")} == {
        "prompt": "sun ",
        "steps": 3,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "cfg": 3.0,
        "seed": 77,
        "size": [72, 64],
    }
    report = json.loads(run("generate", shared, "--settings-from", "theirs.png", "-o", "x.png", "--json").stdout)
    assert len(report["notes"]) == 3 and report["notes"][2] == "x.png: replaced the picture that was there"
    failed(run("generate", shared, "--from-png", "theirs.png"), 3, "does not say how sdrt made it", "--settings-from")
    failed(run("generate", shared, "--from-png", "x.png", "--settings-from", "x.png"), 2, "Give one of the two")


def test_replay_with_another_bundle(loaded: Pipeline, blindbox_bundle: Path, tmp_path: Path) -> None:
    path = made(loaded, tmp_path / "x.png")
    with Pipeline.load(blindbox_bundle, backend="onnxruntime", threads=1) as other, pytest.raises(UsageError) as raised:
        repeated(path, other)
    for name in ("flat", "blindbox", bundle_id(loaded.bundle.manifest), bundle_id(other.bundle.manifest)):
        assert name in raised.value.message


def test_a_copy_under_another_name_is_the_same_bundle(loaded: Pipeline, flat_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(flat_bundle, tmp_path / "other.sdrt"))
    path = made(loaded, tmp_path / "x.png")
    with Pipeline.load(copy, backend="onnxruntime", threads=1) as other:
        assert repeated(path, other)["seed"] == 5


def tampered(loaded: Pipeline, path: Path, **changes: Any) -> Path:
    parameters = read_parameters(made(loaded, path)) | changes
    parameters = {name: value for name, value in parameters.items() if value != "LEFT OUT"}
    info = PngInfo()
    info.add_itxt("sdrt", json.dumps(parameters))
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "LEFT OUT"},
        {"init_image": 5},
        {"mask": 7.5},
        {"size": 64},
        {"size": {}},
        {"sampler": 5},
        {"prompt": None},
        {"steps": [1]},
        {"steps": "many"},
        {"cfg": "x"},
        {"size": [1]},
        {"size": ["a", "b"]},
        {"seed": {}},
    ],
)
def test_settings_that_are_not_ours(loaded: Pipeline, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputFileError, match=r"x\.png: its settings are not of the expected form"):
        path = tampered(loaded, tmp_path / "x.png", **changes)
        repeated(path, loaded)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"size": [1, 2]}, {"sampler": "eulr"}, {"seed": -2}, {"cfg": 1e9}])
def test_settings_out_of_range(loaded: Pipeline, shared: Path, changes: dict[str, Any]) -> None:
    failed(run("generate", shared, "--from-png", tampered(loaded, Path("x.png"), **changes), "-o", "y.png"), 2)


def test_pictures_that_say_nothing(shared: Path) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("text.png").write_text("no picture")
    info = PngInfo()
    info.add_itxt("sdrt", "{")
    Image.new("RGB", (8, 8)).save("broken.png", pnginfo=info)
    info = PngInfo()
    info.add_itxt("sdrt", "[1]")
    Image.new("RGB", (8, 8)).save("list.png", pnginfo=info)
    for name, message in (
        ("plain.png", "does not say how sdrt made it"),
        ("text.png", "cannot be read as a picture: it is none of PNG, JPEG, WEBP"),
        ("none.png", "no such file"),
        ("broken.png", "its settings are damaged"),
        ("list.png", "its settings are damaged"),
    ):
        failed(run("generate", shared, "--from-png", name), 3, name, message)


# Previews and the contact sheet


def test_a_picture_of_absurd_size(shared: Path) -> None:
    """Its header alone makes the library refuse it, in a way of its own."""
    bomb(Path("huge.png"))
    failed(
        run("generate", shared, "--from-png", "huge.png", "-o", "y.png"), 3, "huge.png", "cannot be read as a picture"
    )
    failed(
        run("generate", shared, "moon", "--steps", 1, "-o", "huge.png"),
        2,
        "huge.png",
        "exists and is not a picture sdrt made",
    )


def test_previews(shared: Path) -> None:
    assert (
        run(
            "generate",
            shared,
            "sun",
            "--steps",
            3,
            "--seed",
            4,
            "--count",
            2,
            "--batch",
            2,
            "--preview",
            "p",
            "-o",
            "x.png",
        ).exit_code
        == 0
    )
    assert sorted(path.name for path in Path("p").iterdir()) == [
        f"{seed}-{call:03}.png" for seed in (4, 5) for call in (1, 2, 3)
    ]
    with Image.open("p/5-003.png") as last, Image.open("x-5.png") as picture:
        assert np.abs(np.asarray(last).astype(int) - np.asarray(picture)).mean() < 4  # the last estimate is the picture
    Path("file").write_text("")
    failed(run("generate", shared, "sun", "--steps", 1, "--preview", "file"), 2, "--preview file")


@pytest.mark.parametrize(("steps", "columns"), [(1, 1), (5, 5), (20, 8)])
def test_contact_sheet(shared: Path, steps: int, columns: int) -> None:
    assert (
        run(
            "generate", shared, "sun", "--steps", steps, "--seed", 4, "-o", "x.png", "--contact-sheet", "s.png"
        ).exit_code
        == 0
    )
    with Image.open("s.png") as sheet, Image.open("x.png") as picture:
        cell = 128
        assert sheet.size == (20 + columns * (cell + 6) - 6, 20 + 2 * cell + 6 + 18)
        last = np.asarray(sheet)[10 : 10 + cell, sheet.width - 10 - cell : sheet.width - 10 : 1]
        assert (
            np.abs(last[::2, ::2].astype(int) - np.asarray(picture)).mean() < 4
        )  # the last column is the picture, enlarged twice
        first = np.asarray(sheet)[10 : 10 + cell, 10 : 10 + cell]
        assert steps == 1 or np.abs(first[::2, ::2].astype(int) - np.asarray(picture)).mean() > 20
    assert (
        run(
            "generate", shared, "sun", "--steps", steps, "--seed", 4, "-o", "x.png", "--contact-sheet", "s.png"
        ).exit_code
        == 0
    )  # its own is replaced
    failed(
        run("generate", shared, "sun", "--steps", 1, "-o", "x.png", "--contact-sheet", "s.jpg"),
        2,
        "--contact-sheet s.jpg",
    )
    failed(
        run("generate", shared, "--from-png", "s.png", "-o", "y.png"), 3, "s.png: a contact sheet, expected a picture"
    )
    Image.new("RGB", (8, 8)).save("mine.png")
    failed(run("generate", shared, "sun", "--steps", 1, "-o", "x.png", "--contact-sheet", "mine.png"), 2, "mine.png")


# Options of generate


@pytest.mark.parametrize(
    ("options", "code", "fragments"),
    [
        ([], 2, ["PROMPT: missing"]),
        (["sun", "--strength", "0.5"], 2, ["strength: given without an init image"]),
        (["sun", "--mask", "m.png"], 2, ["mask: given without an init image"]),
        (["sun", "--init-image", "none.png"], 3, ["init image none.png: no such file"]),
        (["sun", "--init-image", "i.png", "--strength", "0"], 2, ["strength 0", "0.75"]),
        (["sun", "--init-image", "i.png", "--strength", "1.5"], 2, ["strength 1.5"]),
        (["sun", "--init-image", "i.png", "--mask", "m.png"], 2, ["mask: 32x32", "64x64"]),
        (["sun", "--compat", "a111"], 2, ["compat 'a111'", "a1111"]),
        (["sun", "--noise", "gpu"], 2, ["noise 'gpu'"]),
        (["sun", "--clip-skip", "2"], 2, ["clip skip 2", "--clip-skip 2"]),
        (["sun <lora:x:1>"], 2, ["<lora:x:1>", "baked"]),
    ],
)
def test_bad_options(shared: Path, options: list[str], code: int, fragments: list[str]) -> None:
    Image.new("RGB", (64, 64)).save("i.png")
    Image.new("L", (32, 32)).save("m.png")
    failed(run("generate", shared, *options), code, *fragments)


def test_unbalanced_brackets_are_text(shared: Path) -> None:
    assert run("generate", shared, "((a [cat", "--steps", 1, "-o", "x.png").exit_code == 0


def test_a_layer_that_was_built(tmp_path: Path) -> None:
    """Two layers in one bundle; which is used is chosen at run time."""
    from conftest import CHECKPOINT

    from sdrt.export.build import BuildOptions, build

    bundle = build(BuildOptions(CHECKPOINT, clip_skip=(1, 2), output=tmp_path / "two.sdrt")).path
    with Pipeline.load(bundle, backend="onnxruntime", threads=1) as pipe:
        first, second, default = (pipe("red apple", steps=3, cfg=3, seed=1, clip_skip=layer) for layer in (1, 2, None))
    assert np.array_equal(first.images, default.images) and not np.array_equal(first.images, second.images)
    assert second.parameters["clip_skip"] == 2
