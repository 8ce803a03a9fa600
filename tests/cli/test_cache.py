"""`sdrt cache`, and the commands that take a checkpoint where they expect a bundle."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from bench_documents import synthetic_measure
from commands import failed, names_in, only_json, run

from sdrt.bench import run as bench_run
from sdrt.bundle.cache import in_use


@pytest.fixture
def model(small_checkpoint: Path, own_cache: Path, here: Path) -> Path:
    """A checkpoint in the working folder."""
    return Path(shutil.copy(small_checkpoint, here / "model.safetensors"))


@pytest.fixture
def kept(small_bundle: Path, own_cache: Path) -> list[str]:
    """Keys of three bundles in the cache, the one that was used last first; the last two have one name."""
    keys = ["a" * 32, "b" * 32, "c" * 32]
    for i, (key, name) in enumerate(zip(keys, ("style", "model", "model"), strict=True)):
        folder = own_cache / "bundles" / key
        shutil.copytree(small_bundle, folder / f"{name}.sdrt", copy_function=os.link)
        os.utime(folder, (10_000 - i, 10_000 - i))
    return keys


def test_generate_from_a_checkpoint(model: Path, small_lora: Path, here: Path, own_cache: Path) -> None:
    command = ("generate", "model.safetensors", "apple", "--lora", f"{small_lora}:0.5", "--steps", 1, "--seed", 7)
    first = run(*command)
    assert first.exit_code == 0, first.stderr
    assert first.stdout == "model+lora-7.png  seed 7\n" and names_in(here) == ["model+lora-7.png", "model.safetensors"]
    lines = first.stderr.splitlines()
    building = f"building model+lora into the cache (about 10 MB; kept in {own_cache / 'bundles'})"
    assert re.sub(r"about \d+ MB", "about 10 MB", lines[lines.index("read …") - 1]) == building
    assert re.fullmatch(r"built model\+lora \([\d.]+ MB\) in [\d.]+ s", lines[-2])
    second = run(*command)
    assert re.fullmatch(r"[\d.]+ s on onnxruntime\n", second.stderr)
    report = only_json(run(*command, "--json"))
    (entry,) = only_json(run("cache", "list", "--json"))["bundles"]
    assert report["bundle"] == entry["bundle"] and report["parameters"]["bundle"] == "model+lora"
    picture = here / "model+lora-7.png"
    again = run("generate", model, "--lora", f"{small_lora}:0.5", "--from-png", picture, "-o", "again.png")
    assert again.exit_code == 0 and (here / "again.png").read_bytes() == picture.read_bytes()


def test_a_mistake_that_shows_before_the_build(model: Path, own_cache: Path, here: Path, small_lora: Path) -> None:
    for given, code, fragment in (
        ([], 2, "PROMPT: missing"),
        (["apple", "--output", "x.gif"], 2, "--output x.gif"),
        (["apple", "--backend", "x"], 2, "backend 'x'"),
        (["apple", "--lora", "none.safetensors"], 3, "No such file"),
        (["apple", "--lora", "xx:y"], 2, "scale 'y'"),
    ):
        failed(run("generate", model, *given), code, fragment)
    assert not (own_cache / "bundles").exists()


def test_a_bundle_takes_no_adapters(small_bundle: Path, small_lora: Path, own_cache: Path, here: Path) -> None:
    for command in (["generate", small_bundle, "apple"], ["bench", "run", small_bundle]):
        message = failed(run(*command, "--lora", small_lora), 2, "small.sdrt: a bundle, which takes no LoRA")
        assert "sdrt build --checkpoint FILE --lora FILE" in message


def test_bench_run_of_a_checkpoint(model: Path, small_lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    measure = synthetic_measure(1, {".sdrt": 0.0})
    monkeypatch.setattr(bench_run.run, "__defaults__", (lambda request: seen.append(request) or measure(request),))
    done = run("bench", "run", model, "--lora", small_lora, "--processes", 1, "--json")
    assert only_json(done)["bundle"]["name"] == "model+lora"
    assert [Path(request.bundle).name for request in seen] == ["model+lora.sdrt"]
    failed(run("bench", "run", model, "--processes", 0), 2, "--processes 0")
    failed(run("bench", "run", "--check-machine", "--vae", model), 2, "--vae: --check-machine without a BUNDLE")


# sdrt cache


def test_list(kept: list[str], own_cache: Path) -> None:
    result = run("cache", "list")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [key[:8] for key in kept]
    assert re.fullmatch(r"a{8}  1970-01-01 \d\d:\d\d +[\d.]+ MB  style: small\.safetensors", lines[0])
    assert re.fullmatch(r"3 bundles, [\d.]+ MB; the limit is 20 GB", lines[3])
    assert [line.split(":")[0] for line in lines[4:]] == ["blobs", "graphs"]
    assert result.stderr == f"in {own_cache}\n"
    listed = only_json(run("cache", "list", "--json"))
    assert [entry["key"] for entry in listed["bundles"]] == kept
    first = listed["bundles"][0]
    assert (first["name"], first["bundle"]) == ("style", str(own_cache / "bundles" / kept[0] / "style.sdrt"))
    assert listed["size_bytes"] == 3 * first["size_bytes"] and listed["limit_bytes"] == 20_000_000_000
    assert first["sources"][0]["name"] == "small.safetensors" and listed["folder"] == str(own_cache)
    (own_cache / "bundles" / kept[0] / "style.sdrt" / "manifest.json").unlink()
    assert "no manifest.json" in run("cache", "list").stdout.splitlines()[0]
    assert "no manifest.json" in only_json(run("cache", "list", "--json"))["bundles"][0]["problem"]


def test_remove(kept: list[str], own_cache: Path) -> None:
    for given in (["none"], ["aaa"], ["stile"]):
        failed(run("cache", "remove", *given), 2, f"{given[0]}: no such bundle in the cache")
    assert "did you mean 'style'" in run("cache", "remove", "stile").stderr
    failed(run("cache", "remove"), 2, "expected either bundles to remove, or --all")
    failed(run("cache", "remove", "style", "--all"), 2, "expected either")
    assert names_in(own_cache / "bundles") == kept
    assert run("cache", "remove", "cccc").stdout.splitlines()[0] == "removed cccccccc  model"
    with in_use(own_cache / "bundles" / kept[0]):
        result = run("cache", "remove", "style", "model")
        assert result.exit_code == 7 and "style: in use by another process" in result.stderr
        assert result.stdout.splitlines()[0] == "removed bbbbbbbb  model"
        result = run("cache", "remove", "style", "--json")
        assert result.exit_code == 7 and [one["name"] for one in json.loads(result.stdout)["in_use"]] == ["style"]
    removed = only_json(run("cache", "remove", "style", "--json"))
    assert [entry["key"] for entry in removed["removed"]] == [kept[0]] and removed["freed_bytes"] > 1_000_000
    assert names_in(own_cache / "bundles") == []


def test_remove_everything(kept: list[str], own_cache: Path) -> None:
    for kind in ("blobs", "graphs"):
        (own_cache / kind).unlink()  # links to the traces of all tests
        (own_cache / kind).mkdir()
    assert run("cache", "limit", "1GB").exit_code == 0
    result = run("cache", "remove", "--all")
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 4
    assert names_in(own_cache) == ["bundles", "bundles.limit"] and names_in(own_cache / "bundles") == []
    assert run("cache", "remove", "--all").stdout == "0.0 MB freed\n"


def test_limit(kept: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("cache", "limit").stdout == "20 GB\n"
    assert run("cache", "limit", "none").stdout == "no limit\n"
    assert "no limit" in run("cache", "list").stdout
    size_bytes = only_json(run("cache", "list", "--json"))["bundles"][0]["size_bytes"]
    report = only_json(run("cache", "limit", size_bytes, "--json"))
    assert report["limit_bytes"] == size_bytes and [one["key"] for one in report["removed"]] == [kept[2], kept[1]]
    failed(run("cache", "limit", "much"), 2, "limit 'much': expected a size", "20GB")
    monkeypatch.setenv("SDRT_CACHE_LIMIT", "5GB")
    result = run("cache", "limit", "7GB")
    assert (result.stdout, result.stderr) == ("5 GB\n", "note: SDRT_CACHE_LIMIT is set, and goes before it\n")
    monkeypatch.setenv("SDRT_CACHE_LIMIT", "much")
    failed(run("cache", "list"), 2, "SDRT_CACHE_LIMIT 'much': expected a size")
