"""`sdrt build`: what it prints, in words and as JSON."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import failed, names_in, only_json, run
from conftest import CHECKPOINT, LORA

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.graphs import GRAPHS


def test_help_warns_of_the_order_of_scales() -> None:
    text = " ".join(run("build", "--help").stdout.split())
    assert "TE_SCALE" in text
    assert "other order" in text


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
    result = run(
        "build",
        "--checkpoint",
        CHECKPOINT,
        "--lora",
        f"{LORA}:0.5:0.25",
        "--size",
        "128x64",
        "--output",
        output,
        "--json",
    )
    report = only_json(result)
    assert report["bundle"] == str(output)
    assert report["cached_traces"] == list(GRAPHS)
    assert report["size_bytes"] == sum(record.size_bytes for record in open_bundle(output).manifest.files.values())
    assert [(s["name"], s["scale"], s["te_scale"]) for s in report["sources"]] == [
        ("emoji.safetensors", None, None),
        ("blindbox.safetensors", 0.5, 0.25),
    ]
    assert report["errors"].keys() == set(GRAPHS)
    assert "write" in report["stages_s"]
    for stage in ("read", "fuse", "check step", "write"):
        assert f"{stage} …" in result.stderr.splitlines()
    assert open_bundle(output).manifest.latents.size == (128, 64)


def test_build_in_words(here: Path, quick: None) -> None:
    result = run("build", "--checkpoint", CHECKPOINT, "--lora", LORA)
    assert result.exit_code == 0, result.stderr
    first, last = result.stdout.splitlines()
    assert re.fullmatch(
        r"blindbox\.safetensors at 1:1 .*12 modules of the text_encoder .*[\d.]+%.* 236 modules of the unet .*[\d.]+%.*",
        first,
    )
    assert last.startswith(f"built {here / 'emoji+blindbox.sdrt'} (")
    assert 'next: sdrt generate emoji+blindbox.sdrt "your prompt"' in result.stderr
    assert names_in(here) == ["emoji+blindbox.sdrt"]


def test_averaged_weights_that_the_checkpoint_lacks(here: Path) -> None:
    failed(run("build", "--checkpoint", CHECKPOINT, "--ema"), 3, "has no averaged weights", "Leave out --ema.")
