"""Settings out of pictures: of AUTOMATIC1111, of other bundles, of older versions; and that what a picture names is no
way to other files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager

from sdrt.bundle.folder import bundle_id, open_bundle
from sdrt.bundle.manifest import Manifest, Source
from sdrt.errors import InputFileError, SdrtError, UsageError
from sdrt.runtime.pictures.file import parameters_of, read_said
from sdrt.runtime.pictures.infotext import parse_infotext
from sdrt.runtime.pictures.settings import Reused, settings_to_repeat, settings_to_reuse
from sdrt.runtime.request import Request, resolved

A1111 = """a (red:1.2) apple <lora:frost:0.5:0.8>, <lora:absent:1>
on two lines
Negative prompt: blue,
ugly
Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 1234567890, Size: 128x64, Model hash: aaaaaaaaaa, Model: base, \
VAE hash: 123456789a, VAE: other.pt, Denoising strength: 0.4, Clip skip: 2, RNG: CPU, Emphasis: No norm, Hires upscale: 2, \
Lora hashes: "frost: cccccccccccc, absent: 1234567890ab", TI hashes: "cute: eeeeeeeeeeee", Version: v1.10.1"""
FUSED = (
    Source("checkpoint", "base.safetensors", "a" * 64),
    Source("lora", "frost.safetensors", "c" * 64, 0.8, 0.5),
    Source("embedding", "e.pt", "e" * 64, trigger="cute"),
)


@pytest.fixture(scope="module")
def manifest(small_bundle: Path) -> Manifest:
    return replace(open_bundle(small_bundle).manifest, sources=FUSED)


def saved(path: Path, parameters: dict[str, Any] | None = None, text: str | None = None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_itxt("parameters", text)
    if parameters is not None:
        info.add_itxt("sdrt", json.dumps(parameters))
    Image.new("RGB", (64, 64)).save(path, "PNG", pnginfo=info)
    return path


def ours(manifest: Manifest, **changes: Any) -> dict[str, Any]:
    sources = [
        {
            "kind": s.kind,
            "name": s.name,
            "sha256": s.sha256,
            "scale": s.scale,
            "te_scale": s.te_scale,
            "trigger": s.trigger,
        }
        for s in manifest.sources
    ]
    return {
        "prompt": "sun",
        "steps": 7,
        "seed": 5,
        "bundle": "b",
        "bundle_id": bundle_id(manifest),
        "sources": sources,
    } | changes


def repeated(path: Path, manifest: Manifest, **given: Any) -> dict[str, Any]:
    return settings_to_repeat(path, parameters_of(path, read_said(path)), manifest, given)


# AUTOMATIC1111


def as_png(path: Path) -> None:
    saved(path, text=A1111)


def as_photo(path: Path, format: str) -> None:
    """As AUTOMATIC1111 writes a JPEG or WebP."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    Image.new("RGB", (64, 64)).save(path, format, exif=exif)


@pytest.mark.parametrize(
    "write",
    [as_png, lambda path: as_photo(path, "JPEG"), lambda path: as_photo(path, "WEBP")],
    ids=["png", "jpeg", "webp"],
)
def test_a_picture_of_automatic1111(tmp_path: Path, manifest: Manifest, write: Callable[[Path], None]) -> None:
    write(tmp_path / "x")
    reused = settings_to_reuse(tmp_path / "x", manifest, {})
    assert reused.settings == {
        "prompt": "a (red:1.2) apple <lora:frost:0.5:0.8>, \non two lines",
        "negative": "blue,\nugly",
        "steps": 30,
        "sampler": "DPM++ 2M",
        "schedule": "Karras",
        "cfg": 5.5,
        "seed": 1234567890,
        "size": (128, 64),
        "noise": "cpu",
        "emphasis": "no norm",
        "compat": "a1111",
    }
    lines = "\n".join(reused.unused)
    for said in (
        "<lora:absent:1>",
        "VAE hash: 123456789a other.pt",
        "strength: 0.4, without an init image",
        "clip skip 2",
        "Hires upscale: 2",
        "absent: 1234",
    ):
        assert said in lines
    assert len(reused.unused) == 6, lines  # the model, frost and cute are in the bundle; versions are no setting
    request = resolved(Request(**reused.settings), manifest)
    assert (request.sampler, request.schedule) == ("dpmpp_2m", "karras")


def test_an_independent_parser_agrees(tmp_path: Path) -> None:
    as_png(tmp_path / "x.png")
    info = ParserManager().parse(tmp_path / "x.png")
    assert info is not None
    read = parse_infotext(A1111)
    assert [text.value for text in info.prompts] == [read.prompt] and [
        text.value for text in info.negative_prompts
    ] == [read.negative]
    assert {name: info.metadata[name] for name in ("Size", "Clip skip", "Hires upscale")} == {
        name: read.pairs[name] for name in ("Size", "Clip skip", "Hires upscale")
    }


def test_settings_for_an_edit_model(tmp_path: Path, manifest: Manifest) -> None:
    """It takes nothing without a picture; with one, AUTOMATIC1111's second guidance scale."""
    edits = replace(manifest, latents=replace(manifest.latents, concat_channels=4))
    text = "sun\nSteps: 5, Sampler: Euler, CFG scale: 6, Image CFG scale: 1.25, Denoising strength: 0.9"
    picture = saved(tmp_path / "x.png", text=text)
    reused = settings_to_reuse(picture, edits, {"init_image": "i.png"})
    assert not reused.unused
    request = resolved(Request(**reused.settings), edits)
    assert (request.image_cfg, request.cfg, request.steps, request.strength) == (1.25, 6, 5, 0.9)
    assert "image cfg: this model does not edit a picture" in "".join(settings_to_reuse(picture, manifest, {}).unused)


@pytest.mark.parametrize(
    ("pairs", "unused"),
    [
        ("Steps: many, Sampler: Euler, Seed: 3", "Steps: many"),
        ("Steps: 5, Sampler: DPM fast, Seed: 3", "sampler 'DPM fast': unknown"),
        ("Steps: 5, Sampler: Euler, Size: 500x500", "size 500x500"),
        ("Steps: 5, Sampler: Euler, Size: 512", "Size: 512"),
        ("Steps: 5, Sampler: Euler, Seed: 99999999999999999999999", "seed 9999"),
        ("Steps: 5, Sampler: DDIM, Schedule type: Karras", "schedule 'karras': sampler ddim cannot take it"),
        ("Steps: 5, Sampler: Euler, Model: other", "Model: other"),
    ],
)
def test_what_cannot_be_used_is_listed_and_left(tmp_path: Path, manifest: Manifest, pairs: str, unused: str) -> None:
    reused = settings_to_reuse(saved(tmp_path / "x.png", text=f"sun\n{pairs}"), manifest, {})
    assert len(reused.unused) == 1 and unused in reused.unused[0]
    resolved(Request(**reused.settings), manifest)


def test_what_is_given_comes_first(tmp_path: Path, manifest: Manifest) -> None:
    given = {"prompt": "moon", "sampler": "ddim", "init_image": "i.png", "seed": 8}
    reused = settings_to_reuse(saved(tmp_path / "x.png", text=A1111), manifest, given)
    assert {name: reused.settings[name] for name in given} == given and reused.settings["strength"] == 0.4
    assert any("sampler ddim cannot take it" in line for line in reused.unused) and not any(
        "<lora" in line for line in reused.unused
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sun",
        "sun\nNegative prompt: x",
        "a: b, c",
        "Steps: 1, Seed: 2, CFG scale: 3",
        "x" * 500_000,
        "w " * 300_000,
        'Steps: "' * 90_000,
    ],
)
def test_any_text_is_read(text: str) -> None:
    read = parse_infotext(text)
    assert read.prompt == text.split("\n")[0].strip() or read.pairs


# Other bundles and versions


def test_a_picture_of_another_bundle(tmp_path: Path, manifest: Manifest) -> None:
    other = replace(
        manifest, files={}, sources=(FUSED[0], replace(FUSED[1], scale=0.3), Source("vae", "soft.pt", "b" * 64))
    )
    path = saved(tmp_path / "x.png", ours(other, clip_skip=2, cfg=3.0))
    with pytest.raises(UsageError, match="--settings-from"):
        repeated(path, manifest)
    reused = settings_to_reuse(path, manifest, {})
    assert {name: reused.settings[name] for name in ("prompt", "steps", "seed", "cfg")} == {
        "prompt": "sun",
        "steps": 7,
        "seed": 5,
        "cfg": 3.0,
    }
    assert [line.partition(", ")[0] for line in reused.unused[:2]] == [
        "lora: frost.safetensors at 0.3:0.5",
        "vae: soft.pt",
    ] and "clip skip 2" in reused.unused[2]
    saved(path, {name: value for name, value in ours(other).items() if name != "sources"})
    assert settings_to_reuse(path, manifest, {}).unused == ("bundle: b, this one is small",)


def test_a_picture_of_this_bundle_is_used_whole(tmp_path: Path, manifest: Manifest) -> None:
    path = saved(tmp_path / "x.png", ours(manifest))
    assert settings_to_reuse(path, manifest, {"seed": 6}) == Reused(
        {"prompt": "sun", "steps": 7, "seed": 6, "count": 1, "batch": 1}, ()
    )


def test_a_setting_that_a_picture_lacks_keeps_its_default(tmp_path: Path, manifest: Manifest) -> None:
    request = Request(**repeated(saved(tmp_path / "x.png", ours(manifest, unheard_of=1)), manifest))
    assert request == Request("sun", steps=7, seed=5)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"seed": 6}, {"timesteps": (999, 499)}),
        ({"timesteps": (999, 9)}, {"timesteps": (999, 9)}),
        ({"sigmas": (1.0, 0.0)}, {"sigmas": (1.0, 0.0)}),
        ({"steps": 30}, {"steps": 30}),
        ({"schedule": "karras"}, {"schedule": "karras"}),
    ],
)
def test_what_is_given_beside_a_picture_of_a_list(
    tmp_path: Path, manifest: Manifest, given: dict[str, Any], left: dict[str, Any]
) -> None:
    """Steps, a schedule or a list take the place of the picture's list, whichever of them it was."""
    path = saved(tmp_path / "x.png", ours(manifest, steps=2, schedule="normal", timesteps=[999, 499], sigmas=None))
    for settings in (repeated(path, manifest, **given), settings_to_reuse(path, manifest, given).settings):
        lists = {name: settings[name] for name in ("timesteps", "sigmas") if settings.get(name) is not None}
        assert lists == {name: numbers for name, numbers in left.items() if name in ("timesteps", "sigmas")}
        assert left.items() <= settings.items()
        resolved(Request(**settings), manifest)


# What a picture was made from


def pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("{elsewhere}/secret.png", lambda path: path.write_bytes(b"secret")),
        ("{elsewhere}/none.png", lambda path: None),
        ("../elsewhere/secret.png", lambda path: path.write_bytes(b"secret")),
        ("/proc/self/pagemap", lambda path: None),
        ("beside.png", pipe),
        ("beside.png", lambda path: path.mkdir()),
        ("\0", lambda path: None),
        ("..", lambda path: None),
        ("", lambda path: None),
        ("x" * 5000, lambda path: None),
    ],
    ids=["elsewhere", "absent", "above", "endless", "pipe", "folder", "nul", "dots", "empty", "long"],
)
def test_a_picture_names_no_file_but_one_beside_it(
    tmp_path: Path, manifest: Manifest, name: str, put: Callable[[Path], Any]
) -> None:
    """With the hash right, too: the answer is the same whether the file is there or not."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    elsewhere.mkdir()
    folder.mkdir()
    name = name.format(elsewhere=elsewhere)
    put(elsewhere / "secret.png" if "secret" in name else folder / "beside.png")
    sha256 = hashlib.sha256(b"secret").hexdigest()
    path = saved(folder / "x.png", ours(manifest, init_image=name, init_image_sha256=sha256, strength=0.5))
    with pytest.raises(InputFileError, match="that can be read is beside it") as raised:
        repeated(path, manifest)
    assert "--init-image" in raised.value.fix
    reused = settings_to_reuse(path, manifest, {})
    assert (
        "init_image" not in {name for name, value in reused.settings.items() if value is not None}
        and "strength" not in reused.settings
    )
    assert len(reused.unused) == 2
    assert repeated(path, manifest, init_image="given.png")["init_image"] == "given.png"


def test_a_link_beside_a_picture_leads_nowhere(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "i.png").write_bytes(b"secret")
    (tmp_path / "link.png").symlink_to(tmp_path / "i.png")
    sha256 = hashlib.sha256(b"secret").hexdigest()
    path = saved(tmp_path / "x.png", ours(manifest, init_image="link.png", init_image_sha256=sha256))
    with pytest.raises(InputFileError, match="which is a link"):
        repeated(path, manifest)


def test_what_is_beside_a_picture_is_found_and_compared(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "i.png").write_bytes(b"image")
    path = saved(
        tmp_path / "x.png",
        ours(
            manifest,
            init_image="C:\\photos\\i.png",
            init_image_sha256=hashlib.sha256(b"image").hexdigest(),
            strength=0.5,
        ),
    )
    assert repeated(path, manifest)["init_image"] == tmp_path / "i.png"
    reused = settings_to_reuse(path, manifest, {})
    assert (
        reused.settings["init_image"] == tmp_path / "i.png" and reused.settings["strength"] == 0.5 and not reused.unused
    )
    (tmp_path / "i.png").write_bytes(b"other")
    with pytest.raises(UsageError, match="which has changed since"):
        repeated(path, manifest)


def test_a_picture_made_from_one_in_memory_says_what_it_needs(tmp_path: Path, manifest: Manifest) -> None:
    path = saved(tmp_path / "x.png", ours(manifest, init_image=None, init_image_sha256="abc", strength=0.3))
    with pytest.raises(InputFileError, match=r"made from a picture that was no file \(sha256 abc\)") as raised:
        repeated(path, manifest)
    assert "--init-image" in raised.value.fix
    assert repeated(path, manifest, init_image="i.png")["strength"] == 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {"init_image": 5},
        {"mask": 7},
        {"mask": ["x"]},
        {"prompt": 5},
        {"steps": True},
        {"size": [1, 2, 3]},
        {"network_tags": None},
    ],
)
def test_settings_of_another_type(tmp_path: Path, manifest: Manifest, changes: dict[str, Any]) -> None:
    path = saved(tmp_path / "x.png", ours(manifest, **changes))
    read: list[Callable[[], object]] = [lambda: repeated(path, manifest), lambda: settings_to_reuse(path, manifest, {})]
    for each in read:
        with pytest.raises(InputFileError, match=f"not of the expected form: {next(iter(changes))}"):
            each()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: saved(path),
        lambda path: saved(path, text=None),
        lambda path: path.write_bytes(b"no picture"),
        lambda path: None,
    ],
)
def test_pictures_that_say_nothing(tmp_path: Path, manifest: Manifest, write: Callable[[Path], Any]) -> None:
    write(tmp_path / "x.png")
    with pytest.raises(SdrtError) as raised:
        settings_to_reuse(tmp_path / "x.png", manifest, {})
    assert raised.value.exit_code == 3 and "object at 0x" not in str(raised.value)
