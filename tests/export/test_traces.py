"""The traces that come with sdrt: what today's sources trace to, found for every published layout, refused if damaged,
and enough to build without torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CHECKPOINT, ROOT
from key_lists import RELATIVES, sd1, sd2, sdxl, with_vae
from locked_down import LOCKED_DOWN, run_python
from tiny_model import header_only

from sdrt.errors import MachineError
from sdrt.export import traces
from sdrt.export.build import BuildOptions, _with_options
from sdrt.export.graph import recipes
from sdrt.export.read.checkpoint import open_checkpoint
from sdrt.export.skeletons import weights_of

sys.path.insert(0, str(ROOT / "benchmarks"))
from architectures import traced

LAYOUTS = {
    "SD 1": sd1(),
    "SD 1 inpainting": sd1(9),
    "SD 1 edit": sd1(8),
    "SD 1 LCM": sd1(guidance=256),
    "SD 2": sd2(),
    "SD 2 inpainting": sd2(9),
    "SDXL": sdxl(),
    "SDXL inpainting": sdxl(9),
    "SDXL edit": sdxl(8),
    **RELATIVES,
}
MOST_BYTES = 2_000_000


def test_every_trace_is_of_todays_sources_and_was_compared_with_its_network() -> None:
    """If this fails, run benchmarks/make_traces.py."""
    wanted = {name: json.loads(json.dumps(recipe.key())) for name, recipe in traced()}
    assert {entry["name"]: entry["key"] for entry in traces.index()} == wanted
    files = {path.stem: path for path in traces.FOLDER.glob("*.xz")}
    assert files.keys() == wanted.keys()
    for entry in traces.index():
        assert entry["sources"] == traces.source_hashes(entry["key"]["graph"]), entry["name"]
        data = files[entry["name"]].read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert traces.unpacked(data).keys() == {"fp32", "fp16", "bf16"}
        assert entry["errors"]["fp32"] <= 1e-4 and entry["errors"]["fp16"] <= 2e-3, entry["name"]
    assert sum(path.stat().st_size for path in traces.FOLDER.iterdir()) < MOST_BYTES


@pytest.mark.parametrize("name", ["sd1-text-encoder", "sd1-step", "sd1-vae-decoder", "sd1-vae-encoder"])
def test_a_trace_that_comes_with_sdrt_is_what_is_traced_today(name: str) -> None:
    """The rest are held by the hashes of the sources: tracing all takes half an hour."""
    from sdrt.export.trace import module, trace, weight_shapes

    recipe = dict(traced())[name]
    shipped = traces.shipped(recipe.key())
    assert shipped == trace(recipe)
    assert weights_of(recipe) == weight_shapes(module(recipe))


@pytest.mark.parametrize("shapes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_published_layouts_have_traces(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """In every form in which a build asks for them."""
    path = header_only(tmp_path / "c.safetensors", with_vae(shapes))
    checkpoint = open_checkpoint(path)
    checkpoint.close()
    for skip in ((1,), (2,), (1, 2)) if "SD 1" in shapes else ((1,),):
        arch = _with_options(checkpoint.architecture, BuildOptions(path, clip_skip=skip))
        assert [graph for graph, recipe in recipes(arch).items() if not recipe.is_shipped()] == []


@pytest.fixture
def own_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the traces of the emoji model, which may be spoiled."""
    folder = tmp_path / "traces"
    shutil.copytree(
        traces.FOLDER, folder, ignore=lambda _, names: [n for n in names if n[:5] not in ("emoji", "index")]
    )
    monkeypatch.setattr(traces, "FOLDER", folder)
    for known in (traces.index, traces._entry, traces._read):
        known.cache_clear()
    yield folder
    for known in (traces.index, traces._entry, traces._read):
        known.cache_clear()


@pytest.mark.parametrize(
    ("damage", "name"), [("byte", "emoji-vae-decoder.xz"), ("gone", "emoji-vae-decoder.xz"), ("byte", "index.json")]
)
def test_a_damaged_trace_is_never_used(own_traces: Path, tmp_path: Path, damage: str, name: str) -> None:
    path = own_traces / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.unlink()
    if damage == "byte":
        path.write_bytes(data)
    with pytest.raises(MachineError, match=re.escape(name)) as caught:
        from sdrt.export.build import build

        build(BuildOptions(CHECKPOINT, output=tmp_path / "out" / "x.sdrt"))
    assert caught.value.fix == "Install sdrt again."
    assert not list((tmp_path / "out").glob("*"))


def test_sources_that_were_edited_are_traced_again(own_traces: Path) -> None:
    index = json.loads((own_traces / "index.json").read_text())
    for entry in index:
        entry["sources"] = dict.fromkeys(entry["sources"], "0" * 64)
    (own_traces / "index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    assert not any(recipe.is_shipped() for recipe in recipes(checkpoint.architecture).values())


BUILD = """
import sys
from pathlib import Path
from sdrt.export.adapters.embedding import EmbeddingOption
from sdrt.export.adapters.match import LoraOption
from sdrt.export.build import BuildOptions, build
checkpoint, lora, output, precision = sys.argv[1:5]
build(BuildOptions(Path(checkpoint), (LoraOption(Path(lora), 0.8, 0.5),), precision=precision, output=Path(output)))
"""


@pytest.mark.parametrize(("model", "lora"), [("emoji", "blindbox"), ("emoji-xl", "toy-xl")])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_bundle_is_the_same_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, lora: str, precision: str
) -> None:
    """Byte for byte, but for what the manifest says of the check and its tools."""
    from sdrt.export.adapters.match import LoraOption
    from sdrt.export.build import build

    files = [CHECKPOINT.with_name(f"{name}.safetensors") for name in (model, lora)]
    without = tmp_path / "without" / "x.sdrt"
    run_python(LOCKED_DOWN + BUILD, *map(str, files), str(without), precision)
    option = LoraOption(files[1], 0.8, 0.5)
    path = tmp_path / "with" / "x.sdrt"
    build(BuildOptions(files[0], (option,), precision=precision, output=path, check="full"))
    found, expected = (
        {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
        for folder in (without, path)
    )
    assert found.keys() == expected.keys()
    told = [json.loads(contents.pop("manifest.json")) for contents in (found, expected)]
    assert [name for name in found if found[name] != expected[name]] == []
    for manifest in told:
        del manifest["tools"]
        for graphs in manifest["graphs"].values():
            for graph in graphs.values():
                del graph["error"], graph["checked"]
    assert told[0] == told[1]


def test_an_odd_size_says_what_is_odd_and_what_to_install(small_checkpoint: Path, tmp_path: Path) -> None:
    script = """
from sdrt.errors import MachineError
try:
    build(BuildOptions(Path(sys.argv[1]), output=Path(sys.argv[2]) / "x.sdrt"))
except MachineError as error:
    print(error.line, error.fix)
"""
    said = run_python(
        LOCKED_DOWN + BUILD.partition("checkpoint, lora")[0] + script, str(small_checkpoint), str(tmp_path)
    )
    assert "small.safetensors: " in said and "no trace of it comes with sdrt" in said
    assert "expected" in said and "torch" in said
    assert not list(tmp_path.glob("x*"))
