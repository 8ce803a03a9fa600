"""Learned embeddings: every layout gives the same vectors, rows of the token table against transformers, and what is
refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import CHECKPOINT, LORA
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from reference import Graphs, relative
from safetensors.torch import save_file
from tiny_model import SMALL

from sdrt.bundle.folder import open_bundle
from sdrt.errors import AdapterError, InputFileError, SdrtError, UsageError
from sdrt.export import trace as trace_module
from sdrt.export.adapters.embedding import (
    EmbeddingOption,
    open_embedding,
    parse_embedding_option,
    read_vectors,
    table_rows,
)
from sdrt.export.architecture import Architecture, ClipSpec
from sdrt.export.build import BuildOptions, build, default_output
from sdrt.export.graph import Recipe, recipes
from sdrt.export.inspect import inspect_file

EMOJI = replace(SMALL, texts=(ClipSpec(64, 2, 1, 256, 49408, 77),))
REAL = replace(SMALL, texts=(ClipSpec(768, 12, 12, 3072, 49408, 77),))
TABLE = reference.TEXT + "text_model.embeddings.token_embedding.weight"


def vectors(seed: int, count: int, width: int = 64) -> torch.Tensor:
    return 0.5 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def automatic1111(values: torch.Tensor, **more: Any) -> dict[str, Any]:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": values},
        "name": "other",
        "step": 500,
        "sd_checkpoint": None,
        **more,
    }


LAYOUTS: dict[str, tuple[str, Callable[[torch.Tensor], Any]]] = {
    "AUTOMATIC1111": ("x.pt", automatic1111),
    "AUTOMATIC1111, a parameter": ("x.pt", lambda v: automatic1111(torch.nn.Parameter(v))),
    "the first of all, a ParameterDict": (
        "x.pt",
        lambda v: {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(v)}),
        },
    ),
    "diffusers": ("learned_embeds.bin", lambda v: {"<style>": v}),
    "a bare tensor": ("x.pt", lambda v: v),
    "emb_params": ("x.safetensors", lambda v: {"emb_params": v}),
    "a token in safetensors": ("x.safetensors", lambda v: {"<my.style>": v}),
    "float64": ("x.safetensors", lambda v: {"emb_params": v.double()}),
    "clip_l alone": ("x.safetensors", lambda v: {"clip_l": v}),
    "text in a PNG": ("x.png", lambda v: png_text(automatic1111(v))),
}


def png_text(document: dict[str, Any]) -> str:
    """AUTOMATIC1111's EmbeddingEncoder and embedding_to_b64."""
    return base64.b64encode(
        json.dumps(document, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()}).encode()
    ).decode()


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".png":
        info = PngInfo()
        info.add_text("sd-ti-embedding", content)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def embedding_file(path: Path, values: torch.Tensor) -> Path:
    return write(path, automatic1111(values) if path.suffix == ".pt" else {"emb_params": values})


def refused(path: Path, *fragments: str, arch: Architecture = EMOJI, kind: type[SdrtError] = AdapterError) -> SdrtError:
    with pytest.raises(SdrtError) as caught:
        embedding = open_embedding(EmbeddingOption(path, "x"), arch)
        with embedding.file:
            read_vectors(embedding)
    assert type(caught.value) is kind
    assert caught.value.exit_code == kind.exit_code and caught.value.message.startswith(str(path)) and caught.value.fix
    for fragment in fragments:
        assert fragment in caught.value.message
    return caught.value


# The option


@pytest.mark.parametrize(
    ("text", "path", "trigger"),
    [
        ("style.pt", "style.pt", "style"),
        ("a/b.c/style.v2.safetensors", "a/b.c/style.v2.safetensors", "style.v2"),
        ("style.pt:toy", "style.pt", "toy"),
        ("style.pt:my own style", "style.pt", "my own style"),
        ("C:\\models\\style.pt", "C:\\models\\style.pt", None),
        ("C:/models/style.pt", "C:/models/style.pt", "style"),
        ("C:/models/style.pt:toy", "C:/models/style.pt", "toy"),
        ("a:b.pt:c", "a:b.pt", "c"),
    ],
)
def test_option(text: str, path: str, trigger: str | None) -> None:
    assert parse_embedding_option(text) == EmbeddingOption(Path(path), Path(path).stem if trigger is None else trigger)


def test_an_existing_file_with_a_colon(tmp_path: Path) -> None:
    path = tmp_path / "a:b.pt"
    path.touch()
    assert parse_embedding_option(str(path)) == EmbeddingOption(path, "a:b")


@pytest.mark.parametrize("trigger", ["", " ", "\t", "a\nb", "\x1b[31m", "\ud800"])
def test_e4_impossible_trigger(trigger: str) -> None:
    with pytest.raises(UsageError, match="trigger") as caught:
        parse_embedding_option(f"style.pt:{trigger}")
    assert caught.value.exit_code == 2 and caught.value.message.isprintable()


# Layouts


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_e1_every_layout_gives_the_same_vectors(tmp_path: Path, layout: str, count: int) -> None:
    name, content = LAYOUTS[layout]
    embedding = open_embedding(EmbeddingOption(write(tmp_path / name, content(vectors(0, count))), "x"), EMOJI)
    with embedding.file:
        assert embedding.vectors == count
        assert np.array_equal(read_vectors(embedding), vectors(0, count))


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors"])
def test_one_vector_without_a_row_axis(tmp_path: Path, name: str) -> None:
    embedding = open_embedding(EmbeddingOption(write(tmp_path / name, {"<style>": vectors(0, 1)[0]}), "x"), EMOJI)
    with embedding.file:
        assert np.array_equal(read_vectors(embedding), vectors(0, 1))


def test_inspect(tmp_path: Path) -> None:
    report = inspect_file(embedding_file(tmp_path / "toy style.pt", vectors(0, 4, 768)))
    assert report["kind"] == "a textual-inversion embedding"
    assert (report["trigger"], report["vectors"], report["width"], report["base_family"]) == (
        "toy style",
        4,
        768,
        "Stable Diffusion 1.x",
    )
    sdxl = write(tmp_path / "x.safetensors", {"clip_l": vectors(0, 2, 768), "clip_g": vectors(0, 2, 1280)})
    assert inspect_file(sdxl)["base_family"] == "SDXL"


# Refused


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1.x"), (1024, "Stable Diffusion 2.x"), (1280, "SDXL")]
)
def test_e2_width_of_another_family(tmp_path: Path, width: int, family: str) -> None:
    path = embedding_file(tmp_path / "x.pt", vectors(0, 2, width))
    refused(path, "expected vectors 64 wide", f"found {width}", f"made for {family}")
    if width != 768:
        refused(
            path,
            "expected vectors 768 wide, as Stable Diffusion 1.x has",
            f"found {width}",
            f"made for {family}",
            arch=REAL,
        )


def test_e2_embedding_for_sdxl(tmp_path: Path) -> None:
    refused(
        write(tmp_path / "x.safetensors", {"clip_l": vectors(0, 2, 768), "clip_g": vectors(0, 2, 1280)}),
        "clip_g, clip_l",
        "SDXL",
        arch=REAL,
    )


@pytest.mark.parametrize("count", [0, 76, 500])
def test_e3_as_many_vectors_as_no_chunk_holds(tmp_path: Path, count: int) -> None:
    refused(write(tmp_path / "x.safetensors", {"emb_params": vectors(0, count)}), f"{count} vectors, expected 1 to 75")


@pytest.mark.parametrize(
    "content",
    [{"<a>": vectors(0, 1), "<b>": vectors(1, 1)}, {"string_to_param": {"a": vectors(0, 1), "b": vectors(1, 1)}}],
)
def test_e3_several_embeddings_in_one_file(tmp_path: Path, content: Any) -> None:
    refused(write(tmp_path / "x.pt", content), "holds 2 embeddings")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_e5_value_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    values = vectors(0, 2)
    values[1, 3] = bad
    refused(embedding_file(tmp_path / "x.pt", values), "string_to_param.*", "1 of 128 values are NaN or infinite")


def test_e5_whole_numbers(tmp_path: Path) -> None:
    refused(write(tmp_path / "x.safetensors", {"emb_params": torch.ones(2, 64, dtype=torch.int32)}), "found I32")


@pytest.mark.parametrize(
    ("path", "found", "fix"), [(LORA, "a LoRA", "--lora"), (CHECKPOINT, "a Stable Diffusion 1.x model", "--checkpoint")]
)
def test_another_file_given_as_an_embedding(path: Path, found: str, fix: str) -> None:
    assert fix in refused(path, f"expected a textual-inversion embedding, found {found}").fix


def test_e6_picture_given_as_an_embedding(tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    assert "in its pixels" in refused(plain, "a picture (PNG) that holds no embedding as text", kind=InputFileError).fix
    for name, kind in (("x.jpg", "JPEG"), ("x.webp", "WebP")):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        refused(tmp_path / name, f"a picture ({kind})", kind=InputFileError)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "?",
        "e30=",
        "W10=",
        "bnVsbA==",
        png_text({"string_to_param": {"*": {"TORCHTENSOR": [[1.0, 2.0], [1.0]]}}}),
        png_text({"a": {"TORCHTENSOR": "x"}}),
        png_text({"a": {"TORCHTENSOR": [[None]]}}),
        base64.b64encode(b"[" * 100_000).decode(),
        png_text({"a": {"TORCHTENSOR": [[10**400]]}}),
    ],
)
def test_e6_damaged_text_in_a_picture(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        SdrtError, match=r"sd-ti-embedding|values are NaN|expected a textual|expected vectors"
    ) as caught:
        open_embedding(EmbeddingOption(write(tmp_path / "x.png", text), "x"), EMOJI)
    assert caught.value.exit_code == 3


def test_e6_a_picture_cut_short(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.png", png_text(automatic1111(vectors(0, 2)))).read_bytes()
    for length in (8, 9, 20, 40, 60, len(whole) // 2):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(InputFileError):
            open_embedding(EmbeddingOption(tmp_path / "cut.png", "x"), EMOJI)


@pytest.mark.parametrize("shape", [(1, 3, 64), ()])
def test_vectors_of_another_rank(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = write(tmp_path / "x.safetensors", {"emb_params": torch.ones(shape)})
    refused(path, f"expected vectors of shape [count, width], found {list(shape)}")
    assert inspect_file(path)["kind"] == "a textual-inversion embedding"


def test_output_vectors_are_refused_by_name(tmp_path: Path) -> None:
    refused(
        write(tmp_path / "x.safetensors", {"clip_l": vectors(0, 2), "clip_l_out": vectors(1, 2)}),
        "clip_l_out: vectors for a text encoder's output",
    )


def test_missing_file(tmp_path: Path) -> None:
    embedding_file(tmp_path / "style.pt", vectors(0, 1))
    refused(tmp_path / "stile.pt", "did you mean 'style.pt'", kind=InputFileError)


# Built in


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch, flat_bundle: Path) -> None:
    def trace(recipe: Recipe) -> None:
        raise AssertionError(f"{recipe.graph} was traced again")

    monkeypatch.setattr(trace_module, "trace", trace)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("embeddings")
    return embedding_file(folder / "toy.pt", vectors(1, 3)), embedding_file(folder / "style.safetensors", vectors(2, 1))


@pytest.fixture(scope="module")
def learned_bundle(flat_bundle: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emoji checkpoint with two embeddings, of three vectors and of one."""
    options = (EmbeddingOption(files[0], "toy"), EmbeddingOption(files[1], "my style"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module, "trace", lambda recipe: pytest.fail(f"{recipe.graph} was traced again"))
        return build(
            BuildOptions(CHECKPOINT, embeddings=options, output=tmp_path_factory.mktemp("learned") / "learned.sdrt")
        ).path


def test_manifest_names_triggers_and_rows(learned_bundle: Path, files: tuple[Path, Path]) -> None:
    manifest = open_bundle(learned_bundle).manifest
    assert manifest.text[0].embeddings == {"toy": (49408, 49409, 49410), "my style": (49411,)}
    assert manifest.architecture["texts"][0]["vocabulary"] == 49412
    found = [(s.kind, s.name, s.trigger, s.scale, s.applied) for s in manifest.sources[1:]]
    assert found == [
        ("embedding", "toy.pt", "toy", None, {"text_encoder": 3}),
        ("embedding", "style.safetensors", "my style", None, {"text_encoder": 1}),
    ]


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 1e-2)])
def test_text_encoder_is_transformers_with_the_rows_added(
    flat_bundle: Path, learned_bundle: Path, precision: str, limit: float
) -> None:
    weights, clip = reference.stored_weights(flat_bundle), reference.sizes(flat_bundle)["texts"][0]
    weights[TABLE] = torch.cat([weights[TABLE], vectors(1, 3).half().float(), vectors(2, 1).half().float()])
    model = reference.text_model(weights, clip | {"vocabulary": 49412})
    tokens = np.full((2, 77), 49407, np.int64)
    tokens[0, :7] = [49406, 320, 49408, 49409, 49410, 736, 3055]
    tokens[1, :3] = [49406, 49411, 3055]
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)).last_hidden_state.numpy()
        without = model(torch.from_numpy(np.where(tokens >= 49408, 320, tokens))).last_hidden_state.numpy()
    found = Graphs(learned_bundle).run("text_encoder", precision, tokens=tokens)["context_skip_1"]
    for i in range(2):
        assert relative(found[i], expected[i]) < limit < relative(without[i], expected[i])


def test_rows_follow_the_order_given(tmp_path: Path) -> None:
    opened = [
        open_embedding(EmbeddingOption(embedding_file(tmp_path / f"{i}.pt", vectors(i, i)), str(i)), EMOJI)
        for i in (2, 1, 3)
    ]
    assert table_rows(opened, 100) == {"2": (100, 101), "1": (102,), "3": (103, 104, 105)}
    for embedding in opened:
        embedding.file.close()


def test_trace_does_not_depend_on_the_vocabulary(flat_bundle: Path, learned_bundle: Path) -> None:
    from dataclasses import replace

    from sdrt.export.read.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(CHECKPOINT)
    checkpoint.close()
    arch = checkpoint.architecture
    keys = {
        json.dumps(recipes(replace(arch, texts=(replace(arch.texts[0], vocabulary=n),)))["text_encoder"].key())
        for n in (49408, 49409, 50000)
    }
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("triggers", "message"),
    [
        (("toy", "toy"), "one trigger"),
        (("Toy", "tOY"), "'Toy'"),
        (("caf\u00e9", "cafe\u0301"), "one trigger"),
        (("  toy", "toy "), "one trigger"),
    ],
    ids=["equal", "letter case", "Unicode form", "spaces"],
)
def test_e4_two_embeddings_with_one_trigger(
    tmp_path: Path, files: tuple[Path, Path], no_trace: None, triggers: tuple[str, str], message: str
) -> None:
    options = tuple(EmbeddingOption(file, trigger) for file, trigger in zip(files, triggers, strict=True))
    with pytest.raises(UsageError, match=message) as caught:
        build(BuildOptions(CHECKPOINT, embeddings=options, output=tmp_path / "x.sdrt"))
    assert caught.value.exit_code == 2 and str(files[0]) in caught.value.message and list(tmp_path.iterdir()) == []


def test_default_output_names_every_adapter() -> None:
    assert default_output(BuildOptions(CHECKPOINT, embeddings=(EmbeddingOption(Path("a/toy.pt"), "x"),))) == Path(
        "emoji+toy.sdrt"
    )
