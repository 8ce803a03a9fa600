"""The engine cache: keys, what lies on disk, and everything a damaged or foreign engine must not get away with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrt.bundle.folder import Bundle, open_bundle
from sdrt.bundle.graphs import GRAPHS, STEP, Dimensions, signatures
from sdrt.bundle.manifest import ENGINES, WEIGHTS
from sdrt.engines import record as engine_record
from sdrt.engines import store as engine_cache
from sdrt.engines.record import EngineKey, EngineRecord, Plan, Profile
from sdrt.engines.store import (
    arithmetic,
    check_all,
    engine_folders,
    folder_name,
    key_digest,
    list_engines,
    mismatch,
    prune,
    read_engine,
    read_plan,
    state_bytes,
    write_engine,
)
from sdrt.errors import BundleError, CheckFailed, MachineError, ResourceError, UsageError
from sdrt.files import publish
from sdrt.machine.cpu import platform_name
from sdrt.runtime.verify import verify

PLANS = {graph: f"native code of {graph}".encode() * 50 for graph in GRAPHS}


@pytest.fixture
def bundle(flat_bundle: Path, tmp_path: Path) -> Bundle:
    """The flat bundle without engines, its files shared."""
    shutil.copytree(flat_bundle, tmp_path / "flat.sdrt", copy_function=os.link, ignore=shutil.ignore_patterns(ENGINES))
    return open_bundle(tmp_path / "flat.sdrt")


def step_profile(branches: int) -> Profile:
    """Of one or two pictures of 64x64 to 128x128 pixels."""
    tables = dict.fromkeys(signatures(Dimensions(4, 0, 8, 64, 77, (1,)))[STEP].tables, ((129,), (129,), (257,)))
    tables |= {
        "w": ((129, branches), (129, branches), (257, branches)),
        "init": ((1, 4, 8, 8), (1, 4, 8, 8), (2, 4, 16, 16)),
    }
    return Profile(tables | {"context": ((1, branches, 77, 64), (1, branches, 77, 64), (2, branches, 77, 64))})


def record_for(bundle: Bundle, **changes: Any) -> EngineRecord:
    """A record whose key fits the bundle, `changes` of the key aside."""
    manifest, latents = bundle.manifest, Profile({"latents": ((1, 4, 8, 8), (1, 4, 8, 8), (2, 4, 16, 16))})
    key = EngineKey(
        target="tensorrt-rtx",
        compiler="1.7.1.116",
        device="sm_86,sm_89",
        platform="linux-x86_64",
        precision="fp16",
        graphs={graph: manifest.files[manifest.graphs[graph]["fp16"].path].sha256 for graph in GRAPHS},
        weights=manifest.files[WEIGHTS].sha256,
        profiles=dict.fromkeys(GRAPHS, (latents,))
        | {
            "step": (step_profile(1), step_profile(2)),
            "text_encoder": (Profile({"tokens": ((1, 77), (2, 77), (2, 77))}),),
        },
        flags=("no_tf32",),
    )
    plans = {
        graph: Plan(f"{graph}.plan", len(data), hashlib.sha256(data).hexdigest(), None) for graph, data in PLANS.items()
    }
    return EngineRecord(
        1, replace(key, **changes), (128, 128), 2, 77, 128, (1, 2), 1000, manifest.files[WEIGHTS].size_bytes, plans
    )


@pytest.fixture
def engine(bundle: Bundle) -> Path:
    return write_engine(bundle, record_for(bundle), PLANS)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `engine.json`; the folder keeps its name."""
    document = json.loads((folder / "engine.json").read_text())
    change(document)
    (folder / "engine.json").write_text(json.dumps(document))


# Keys


def test_equal_keys_have_equal_digests(bundle: Bundle) -> None:
    key = record_for(bundle).key
    shuffled = replace(key, graphs=dict(reversed(key.graphs.items())), profiles=dict(reversed(key.profiles.items())))
    assert key_digest(key) == key_digest(shuffled)
    assert (
        key_digest(key)
        == hashlib.sha256(json.dumps(asdict(key), sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )
    assert folder_name(key) == f"tensorrt-rtx-{key_digest(key)[:16]}"


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "tensorrt"},
        {"compiler": "1.7.2"},
        {"device": "sm_89"},
        {"platform": "windows-x86_64"},
        {"precision": "fp32"},
        {"graphs": {"step": "0" * 64}},
        {"weights": "0" * 64},
        {"flags": ()},
        {"profiles": {graph: (Profile({"latents": ((1, 4, 8, 8),) * 3}),) for graph in GRAPHS}},
    ],
)
def test_every_field_of_the_key_counts(bundle: Bundle, changes: dict[str, Any]) -> None:
    assert key_digest(record_for(bundle).key) != key_digest(record_for(bundle, **changes).key)


def test_the_order_of_profiles_counts(bundle: Bundle) -> None:
    """The runtime chooses a profile by its index."""
    one, two = Profile({"w": ((128, 1),) * 3}), Profile({"w": ((128, 2),) * 3})
    assert key_digest(record_for(bundle, profiles={"step": (one, two)}).key) != key_digest(
        record_for(bundle, profiles={"step": (two, one)}).key
    )


def test_the_digest_never_changes() -> None:
    """Engines on disk are found by it: a change of this number orphans every engine of every user."""
    key = EngineKey(
        "tensorrt",
        "11.4",
        "X, sm_90",
        "linux-x86_64",
        "fp16",
        {"step": "a" * 64},
        "b" * 64,
        {"step": (Profile({"w": ((1, 1),) * 3}),)},
        ("f",),
    )
    assert key_digest(key) == "9c0e1b18e354c5c82dd3dab7fab3d4cc77f21d9e61ea96bbb84811d803df2f1b"


def test_platform_name() -> None:
    system, machine = platform_name().split("-", 1)
    assert system == system.lower() and machine


# On disk


def test_write_and_read(bundle: Bundle) -> None:
    record = record_for(bundle)
    folder = write_engine(bundle, record, {graph: memoryview(data) for graph, data in PLANS.items()})
    assert folder == bundle.path / "engines" / folder_name(record.key)
    assert sorted(path.name for path in folder.iterdir()) == [
        "engine.json",
        *(f"{graph}.plan" for graph in sorted(GRAPHS)),
    ]
    assert read_engine(folder) == record
    assert list_engines(bundle) == [(folder, record)]
    assert {graph: read_plan(folder, record, graph) for graph in GRAPHS} == PLANS
    assert open_bundle(bundle.path).manifest == bundle.manifest  # engines are no part of what the manifest covers


def test_an_engine_of_the_same_key_is_replaced(bundle: Bundle, engine: Path) -> None:
    data = PLANS | {"step": b"other code"}
    old = record_for(bundle)
    record = replace(
        old, plans=old.plans | {"step": Plan("step.plan", 10, hashlib.sha256(b"other code").hexdigest(), 4096)}
    )
    assert write_engine(bundle, record, data) == engine
    assert read_plan(engine, read_engine(engine), "step") == b"other code"
    assert [path.name for path in (bundle.path / ENGINES).iterdir()] == [engine.name]


def test_the_newest_comes_first(bundle: Bundle, engine: Path) -> None:
    newer = write_engine(bundle, record_for(bundle, device="sm_89"), PLANS)
    os.utime(engine, ns=(0, 0))
    assert [folder for folder, _ in list_engines(bundle)] == [newer, engine]


def test_no_engines(bundle: Bundle) -> None:
    assert list_engines(bundle) == engine_folders(bundle) == prune(bundle, keep=lambda record: False) == []


def test_a_failed_write_leaves_nothing(bundle: Bundle) -> None:
    class Broken(dict[str, bytes]):
        def items(self) -> Any:
            yield "step", PLANS["step"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_engine(bundle, record_for(bundle), Broken(PLANS))
    assert list((bundle.path / ENGINES).iterdir()) == []


def test_a_full_disk(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"the engine needs about [\d,]+ bytes, 100 are free there"):
        write_engine(bundle, record_for(bundle), PLANS)


def test_a_read_only_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="engines: cannot write there: Permission denied"):
        write_engine(bundle, record_for(bundle), PLANS)


# What must not get through


def test_a_truncated_plan(bundle: Bundle, engine: Path) -> None:
    (engine / "step.plan").write_bytes(PLANS["step"][:-1])
    with pytest.raises(BundleError, match=r"step\.plan: expected 950 bytes, found 949") as raised:
        read_plan(engine, read_engine(engine), "step")
    assert "sdrt compile" in raised.value.fix


def test_a_longer_plan(bundle: Bundle, engine: Path) -> None:
    (engine / "step.plan").write_bytes(PLANS["step"] + bytes(10))
    with pytest.raises(BundleError, match=r"step\.plan: expected 950 bytes, found 960"):
        read_plan(engine, read_engine(engine), "step")


@pytest.mark.parametrize("position", [0, 500, -1])
def test_b1_a_changed_byte(bundle: Bundle, engine: Path, position: int) -> None:
    data = bytearray(PLANS["vae_decoder"])
    data[position] ^= 1
    (engine / "vae_decoder.plan").write_bytes(data)
    with pytest.raises(BundleError, match=r"vae_decoder\.plan: changed since it was compiled"):
        read_plan(engine, read_engine(engine), "vae_decoder")
    assert read_plan(engine, read_engine(engine), "step") == PLANS["step"]


def test_a_missing_plan(bundle: Bundle, engine: Path) -> None:
    (engine / "step.plan").unlink()
    with pytest.raises(BundleError, match=r"step\.plan: cannot be read: No such file"):
        read_plan(engine, read_engine(engine), "step")


def test_a_plan_that_is_a_link(bundle: Bundle, engine: Path, tmp_path: Path) -> None:
    """The right bytes now, but whoever owns the target may change them between two reads."""
    (engine / "step.plan").rename(tmp_path / "elsewhere")
    (engine / "step.plan").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"step\.plan"):
        read_plan(engine, read_engine(engine), "step")


def test_a_plan_that_is_a_pipe(bundle: Bundle, engine: Path) -> None:
    (engine / "step.plan").unlink()
    os.mkfifo(engine / "step.plan")
    with pytest.raises(BundleError, match="expected a regular file"):
        read_plan(engine, read_engine(engine), "step")


def every_shape(document: dict[str, Any], name: str, shape: list[int]) -> None:
    """Smallest, best and largest shape of an input in the first of the step's profiles."""
    document["key"]["profiles"]["step"][0]["shapes"][name] = [shape] * 3


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda d: d.pop("rows"), "rows"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["key"].pop("flags"), "flags"),
        (lambda d: d["key"].update(graphs=[]), "engine.json"),
        (lambda d: d.update(batch=-1), "expected a count"),
        (lambda d: d.update(batch=True), "expected a count"),
        (lambda d: d.update(size=[8]), "not enough values"),
        (lambda d: d.update(format=True), "format"),
        (lambda d: d.update(format="1"), "format"),
        (lambda d: d.update(plans={}), "different graphs"),
        (lambda d: d["plans"].pop("step"), "different graphs"),
        (lambda d: d["plans"].update(other=d["plans"]["step"]), "different graphs"),
        (lambda d: d["plans"]["step"].update(sha256="0" * 63), "expected a sha256"),
        (lambda d: d["plans"]["step"].update(size_bytes=1.5), "expected a count"),
        (lambda d: d["plans"]["step"].update(device_memory_bytes="4"), "expected a count"),
        (lambda d: d["plans"]["step"].update(file="../../manifest.json"), "unsafe file name"),
        (lambda d: d["plans"]["step"].update(file="/etc/passwd"), "unsafe file name"),
        (lambda d: d["plans"]["step"].update(file="a\\b"), "unsafe file name"),
        (lambda d: d["plans"]["step"].update(file="C:x"), "unsafe file name"),
        (lambda d: d["plans"]["step"].update(file=".."), "unsafe file name"),
        (lambda d: d["plans"]["step"].update(file="engine.json"), "unsafe file name"),
        (lambda d: d["plans"]["step"].update(file="a\nb"), "expected a word"),
        (lambda d: d["plans"]["step"].update(file="vae_decoder.plan"), "two plans share a file"),
        (
            lambda d: d["key"]["profiles"]["step"][0]["shapes"].update(latents=[[2], [1], [3]]),
            "expected smallest <= best <= largest",
        ),
        (lambda d: d["key"]["profiles"]["step"][0]["shapes"].update(latents=[[1, 2], [1], [3]]), "engine.json"),
        (
            lambda d: d["key"]["profiles"]["step"][0]["shapes"].update(latents=[[0], [1], [3]]),
            "expected smallest <= best <= largest",
        ),
        (lambda d: d["key"]["profiles"]["step"].pop(), "profiles of step: expected 2, found 1"),
        (lambda d: d["key"]["profiles"]["vae_decoder"].clear(), "profiles of vae_decoder: expected 1, found 0"),
        (lambda d: d["key"]["profiles"]["step"][0]["shapes"].pop("w"), "no shape for w of step"),
        (
            lambda d: d["key"]["profiles"]["text_encoder"][0]["shapes"].pop("tokens"),
            "no shape for tokens of text_encoder",
        ),
        (lambda d: every_shape(d, "w", []), "w: 0 sides"),
        (lambda d: every_shape(d, "q", []), "q: 0 sides"),
        (lambda d: every_shape(d, "w", [1, 2]), "w: expected 257 rows"),
        (lambda d: every_shape(d, "w", [10**9, 2]), "expected smallest <= best <= largest, each 1 to 16,777,216"),
        (lambda d: every_shape(d, "w", [10**30, 2]), "a number of 31 digits"),
        (lambda d: every_shape(d, "w", [257, 3]), "3 guidance branches, expected 1"),
        (lambda d: every_shape(d, "init", [2, 4, 16]), "init: 3 sides, expected 4"),
        (lambda d: every_shape(d, "init", [2, 4, 16, 8]), "init: 2 of 8x16, expected 2 of 128x128 pixels"),
        (lambda d: every_shape(d, "init", [3, 4, 16, 16]), "init: 3 of 16x16, expected 2"),
        (lambda d: every_shape(d, "context", [77]), "context: 1 sides, expected 4"),
        (lambda d: every_shape(d, "context", [2, 1, 154, 64]), "expected 2 of 1 branches of 77 tokens"),
        (lambda d: d.update(size=[128, 132]), "expected a multiple of 8"),
        (lambda d: d.update(size=[128, 0]), "expected 64 to 8192"),
        (lambda d: d.update(batch=0), "batch: 0: expected 1 to 64"),
        (lambda d: d.update(tokens=10**9), "tokens: 1000000000: expected 1 to"),
        (lambda d: d.update(rows=5000), "rows: 5000: expected 2 to 4096"),
        (lambda d: d.update(branches=[]), "branches"),
        (lambda d: d.update(branches=[1, 1]), "branches: [1, 1]: expected different numbers"),
        (lambda d: d.update(branches=[1, 17]), "branches: 17: expected 1 to 16"),
        (lambda d: d["key"].update(precision="zz"), "precision: 'zz': expected one of fp32, fp16, bf16"),
        (lambda d: d["key"].update(precision=[]), "precision: []"),
        (lambda d: d["plans"]["step"].update(size_bytes=10**30), "a number of 31 digits"),
        (lambda d: d.update(state_bytes=float("nan")), "the number NaN"),
        (lambda d: d["key"].update(device=3), "expected a word"),
        (lambda d: d["key"].update(compiler=""), "expected a word"),
    ],
)
def test_a_malformed_record(engine: Path, change: Callable[[dict[str, Any]], Any], fragment: str) -> None:
    edit(engine, change)
    with pytest.raises(BundleError) as raised:
        read_engine(engine)
    assert fragment in raised.value.message
    assert str(engine / "engine.json") in raised.value.message
    assert raised.value.message.isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.update(compiler="1.7.2"),
        lambda k: k.update(device="sm_90"),
        lambda k: k["graphs"].update(step="0" * 64),
    ],
)
def test_a_key_edited_to_fit(engine: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The folder's name is the key's digest."""
    edit(engine, lambda document: change(document["key"]))
    with pytest.raises(BundleError, match="lies under another engine's name"):
        read_engine(engine)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1, "format": 1}', "[" * 100_000, "\xff"])
def test_a_record_that_is_no_json_object(engine: Path, text: str) -> None:
    (engine / "engine.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"engine\.json"):
        read_engine(engine)


def test_a_huge_record(engine: Path) -> None:
    (engine / "engine.json").write_bytes(b" " * (engine_cache.MAX_RECORD_BYTES + 1))
    with pytest.raises(BundleError, match="more than the limit"):
        read_engine(engine)


def test_a_record_of_a_newer_format(engine: Path) -> None:
    edit(engine, lambda document: document.update(format=2, unheard_of=1))
    with pytest.raises(MachineError, match="engine format 2; this sdrt reads format 1") as raised:
        read_engine(engine)
    assert "Upgrade sdrt" in raised.value.fix


def test_a_plan_said_to_be_huge_is_not_read(bundle: Bundle) -> None:
    record = record_for(bundle)
    record = replace(record, plans=record.plans | {"step": replace(record.plans["step"], size_bytes=10**17)})
    folder = write_engine(bundle, record, PLANS)
    with pytest.raises(BundleError, match="expected 100,000,000,000,000,000 bytes"):
        read_plan(folder, read_engine(folder), "step")


@pytest.mark.parametrize("name", ["extra.plan", ".hidden", "folder", "link"])
@pytest.mark.parametrize("place", ["engine", "engines", "graphs", "."])
def test_b2_nothing_else_may_lie_in_a_bundle_that_is_verified_or_signed(
    bundle: Bundle, engine: Path, tmp_path: Path, place: str, name: str
) -> None:
    """Hidden files may lie in a bundle that is used, as file managers leave them; a signature covers all there is, or
    is not given.
    """
    assert [folder for folder, _ in check_all(bundle)] == [engine]
    where = {"engine": engine, "engines": engine.parent}.get(place, bundle.path / place) / name
    if name == "folder":
        where.mkdir()
    elif name == "link":
        where.symlink_to(tmp_path)
    else:
        where.write_bytes(b"x")
    with pytest.raises(BundleError, match=name.replace(".", r"\.")) as caught:
        check_all(bundle)
    assert caught.value.exit_code == 4
    with pytest.raises(CheckFailed, match=name.replace(".", r"\.")):
        verify(bundle.path)


def test_engines_that_are_links(bundle: Bundle, engine: Path, tmp_path: Path) -> None:
    engine.rename(tmp_path / engine.name)
    engine.symlink_to(tmp_path / engine.name)
    with pytest.raises(BundleError, match="expected an engine's folder, found a link"):
        list_engines(bundle)
    shutil.rmtree(tmp_path / engine.name)
    engine.unlink()
    (bundle.path / ENGINES).rmdir()
    (bundle.path / ENGINES).symlink_to(tmp_path)
    with pytest.raises(BundleError, match="expected a folder, found a link"):
        list_engines(bundle)
    with pytest.raises(BundleError, match="expected a folder"):
        write_engine(bundle, record_for(bundle), PLANS)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
)
def test_any_value_anywhere_is_refused_as_ours(value: Any) -> None:
    """Whatever stands in a field, the parser answers with ValueError, KeyError, TypeError or AttributeError, which
    `read_engine` reports.
    """
    document = {
        "format": 1,
        "key": value,
        "size": [8, 8],
        "batch": 1,
        "tokens": 77,
        "rows": 1,
        "branches": [1],
        "state_bytes": 0,
        "weight_bytes": 0,
        "plans": {},
    }
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        engine_record.record_from(document)


# Whether it fits


HOPPER = "NVIDIA H100 80GB HBM3, sm_90"


def test_an_engine_that_fits(bundle: Bundle) -> None:
    record = record_for(bundle)
    assert mismatch(record, bundle) == ""
    assert (
        mismatch(
            record,
            bundle,
            target="tensorrt-rtx",
            compiler="1.7.1.116",
            gpu="NVIDIA GeForce RTX 4090, sm_89",
            platform="linux-x86_64",
        )
        == ""
    )


@pytest.mark.parametrize(
    ("changes", "machine", "words"),
    [
        ({}, {"target": "tensorrt"}, "built for tensorrt-rtx, not tensorrt"),
        ({"weights": "0" * 64}, {}, "built for weights that have changed"),
        ({"precision": "bf16"}, {}, "built for graphs that have changed"),
        ({}, {"compiler": "1.7.2"}, "built for TensorRT-RTX 1.7.1.116, this machine has 1.7.2"),
        ({"target": "tensorrt"}, {"compiler": "11.5"}, "built for TensorRT 1.7.1.116, this machine has 11.5"),
        ({}, {"gpu": HOPPER}, f"built for sm_86,sm_89, this GPU is {HOPPER}"),
        ({}, {"gpu": "GPU, sm_8"}, "built for sm_86,sm_89, this GPU is GPU, sm_8"),
        ({"target": "tensorrt", "device": HOPPER}, {"gpu": HOPPER}, ""),
        (
            {"target": "tensorrt", "device": HOPPER},
            {"gpu": "NVIDIA H200, sm_90"},  # of the same generation
            f"built for {HOPPER}, this GPU is NVIDIA H200, sm_90",
        ),
        ({}, {"platform": "windows-x86_64"}, "built for linux-x86_64, this machine is windows-x86_64"),
        ({}, {"flags": ("weightless",)}, "built by another version of sdrt, in another way"),
        ({"flags": ("weightless",)}, {"flags": ("weightless",)}, ""),
        (
            {},
            {"compiler": "2", "gpu": HOPPER},
            f"built for TensorRT-RTX 1.7.1.116, this machine has 2; built for sm_86,sm_89, this GPU is {HOPPER}",
        ),
    ],
)
def test_b8_an_engine_that_does_not_fit(
    bundle: Bundle, changes: dict[str, Any], machine: dict[str, Any], words: str
) -> None:
    assert mismatch(record_for(bundle, **changes), bundle, **machine) == words


@pytest.mark.parametrize("graph", GRAPHS)
def test_another_graph(bundle: Bundle, graph: str) -> None:
    record = record_for(bundle)
    assert (
        mismatch(replace(record, key=replace(record.key, graphs=record.key.graphs | {graph: "0" * 64})), bundle)
        == "built for graphs that have changed"
    )


def test_each_component_has_its_own_arithmetic(bundle: Bundle) -> None:
    """A float32 VAE beside a float16 UNet, unless another precision is asked for. Engines of float32 graphs stay."""
    components = bundle.manifest.components
    manifest = replace(bundle.manifest, components=components | {"vae": replace(components["vae"], compute="fp32")})
    changed = Bundle(bundle.path, manifest)
    own = {"text_encoder": "fp16", "step": "fp16", "vae_decoder": "fp32", "vae_encoder": "fp32"}
    assert arithmetic(manifest, "tensorrt-rtx", "fp16") == own
    assert set(arithmetic(manifest, "tensorrt-rtx", "fp32").values()) == {"fp32"}
    assert set(arithmetic(manifest, "openvino", "bf16").values()) == {"fp32"}
    graphs = {graph: manifest.files[manifest.graphs[graph][compute].path].sha256 for graph, compute in own.items()}
    assert mismatch(record_for(changed, graphs=graphs), changed) == ""
    assert mismatch(record_for(changed), changed) == "built for graphs that have changed"


def test_state_bytes(bundle: Bundle) -> None:
    """The sum over the step's buffers, each rounded up to 256 bytes, written out."""
    width = bundle.manifest.context_width
    latent, rows = 4 * 3 * 4 * 8 * 12, 1 + 3 * 128
    tables = [8 * rows, *(4 * rows * columns for columns in (1, 8, 2, 2, 2, 8, 1, 8 * 11, 3)), rows * latent // 3]
    buffers = [8 * 3, *tables, 8 * latent, 4 * 3 * 2 * 77 * width, latent // 4, latent, latent]
    buffers += [8 * latent, 8 * 3, latent, 3 * 3 * 64 * 96]
    assert state_bytes(bundle.manifest, size=(96, 64), batch=3, tokens=77, rows=128, branches=2) == sum(
        (b + 255) // 256 * 256 for b in buffers
    )


# Pruning


def test_prune(bundle: Bundle, engine: Path) -> None:
    stale = write_engine(bundle, record_for(bundle, weights="0" * 64), PLANS)
    broken = write_engine(bundle, record_for(bundle, device="sm_120"), PLANS)
    newer = write_engine(bundle, record_for(bundle, device="sm_75"), PLANS)
    (broken / "engine.json").write_text("{")
    damaged = write_engine(bundle, record_for(bundle, device="sm_121"), PLANS)
    (damaged / "step.plan").write_bytes(PLANS["step"][::-1])
    edit(newer, lambda document: document.update(format=9))
    left = bundle.path / ENGINES / f".{engine.name}-999999999-00000000"  # of a killed process
    left.mkdir()
    assert sorted(prune(bundle, keep=lambda record: mismatch(record, bundle) == "")) == sorted([stale, broken, damaged])
    assert sorted((bundle.path / ENGINES).iterdir()) == sorted([engine, newer])


def test_prune_leaves_what_others_are_writing(bundle: Bundle, engine: Path) -> None:
    being_written = publish.stage_name(engine)
    being_written.mkdir()
    prune(bundle, keep=lambda record: True)
    assert being_written.is_dir() and engine.is_dir()
