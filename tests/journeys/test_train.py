"""examples/emoji/train.py: every kind for two steps on three small pictures, taken up again to the same weights, and
read by sdrt as what it is. examples/emoji/train_diffusers.py: that sdrt applies all it writes.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import change_of
from conftest import EMOJI, read_raw
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import TINY, seeded

from sdrt.errors import SdrtError
from sdrt.export.adapters.embedding import EmbeddingOption, open_embedding
from sdrt.export.adapters.hypernetwork import HypernetworkOption, open_hypernetwork
from sdrt.export.adapters.match import LoraOption, open_lora
from sdrt.export.families.table import component_name
from sdrt.export.read.checkpoint import open_checkpoint
from sdrt.export.skeletons import weight_shapes

SMALL = replace(
    TINY, texts=(replace(TINY.texts[0], vocabulary=49408),), vae=replace(TINY.vae, channels=(32, 32, 32, 32))
)
METADATA = {"modelspec.resolution": "64x64"}
KINDS = {
    "lora": "x.safetensors",
    "embedding": "x.pt",
    "hypernetwork": "x.pt",
    "dreambooth": "x.safetensors",
    "model": "x.safetensors",
}


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EMOJI)
    import train

    return train


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, one of them partly transparent, one of another size."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for name, side in (("red_apple", 64), ("cat_face", 64), ("robot", 80)):
        Image.fromarray(random.randint(0, 256, (side, side, 4 if name == "robot" else 3)).astype(np.uint8)).save(
            folder / f"{name}.png"
        )
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the least of everything but CLIP's whole vocabulary."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file({name: tensor.to(torch.float16) for name, tensor in seeded(SMALL).items()}, path, metadata=METADATA)
    return path


def options(train: ModuleType, kind: str, tiny: Path, pictures: Path, output: Path, *more: str) -> Namespace:
    if kind == "model":
        more = ("--autoencoder-steps", "1", *more)
    if kind == "dreambooth":
        more = ("--class-pictures", str(pictures), *more)
    if kind in ("dreambooth", "model"):
        more = ("--rate", "0.1", *more)  # so that float16 shows the two steps
    found: Namespace = train.arguments().parse_args(
        [
            kind,
            "--checkpoint",
            str(tiny),
            "--pictures",
            str(pictures),
            "--output",
            str(output),
            "--steps",
            "2",
            "--batch",
            "2",
            "--save-every",
            "1",
            *more,
        ]
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    train: ModuleType,
    tiny: Path,
    three: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "stopped").mkdir()
    straight = train.train(options(train, kind, tiny, three, tmp_path / "straight" / KINDS[kind]))
    stopped = options(train, kind, tiny, three, tmp_path / "stopped" / KINDS[kind])
    real, calls = train.denoising_loss, list[int]()

    def stop(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == (1 if kind == "model" else 2):  # the model's first step is the autoencoder's
            raise KeyboardInterrupt
        found: torch.Tensor = real(*arguments)
        return found

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "denoising_loss", stop)
        train.train(stopped)
    assert not stopped.output.exists()
    capsys.readouterr()
    assert content(train.train(stopped)) == content(straight)
    assert "going on at step 1" in capsys.readouterr().err
    state = torch.load(stopped.output.with_name(stopped.output.name + ".training"), weights_only=True)
    assert state["step"] == 2 and len(state["optimizer"]["state"]) >= (
        len(state["parameters"]) if kind != "model" else 1
    )
    check(kind, tiny, straight)


def content(path: Path) -> object:
    """A file's bytes; of a safetensors file, whose header is in no fixed order, metadata and tensors."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors, metadata = read_raw(path)
    return {name: (t.dtype, t.shape, hashlib.sha256(t.data).hexdigest()) for name, t in tensors.items()}, metadata


def check(kind: str, tiny: Path, path: Path) -> None:
    """sdrt takes the file for what it is, and it is not what the checkpoint was."""
    checkpoint = open_checkpoint(tiny)
    arch, shapes = checkpoint.architecture, {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    before = {
        name: torch.from_numpy(tensor.read())
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(("to_k.weight", "fc1.weight", "decoder.conv_in.weight"))
    }
    checkpoint.close()
    if kind == "lora":
        lora = open_lora(LoraOption(path), shapes, arch)
        assert (
            len(lora.deltas) == 4 * 12 and lora.file.metadata["ss_network_dim"] == "4"
        )  # 4 transformers of 12 projections
        assert all(bool(change_of(lora, name, torch.zeros(lora.deltas[name].shape)).any()) for name in lora.deltas)
        lora.file.close()
    elif kind == "embedding":
        found = open_embedding(EmbeddingOption(path, "x"), arch)
        assert found.vectors == 2
        found.file.close()
    elif kind == "hypernetwork":
        network = open_hypernetwork(HypernetworkOption(path), arch.unet)
        assert (
            network.spec.layers == ((32,) * 3, (64,) * 3)
            and network.spec.activation == "Hardswish"
            and not network.spec.activate_output
        )
        network.file.close()
    else:
        trained = open_checkpoint(path)
        assert trained.architecture == arch and trained.tensors.keys() >= {
            name for name in shapes if "position_ids" not in name
        }
        changed = {
            name: not torch.equal(torch.from_numpy(trained.tensors[name].read()).float(), value.float())
            for name, value in before.items()
        }
        assert all(changed[name] == (kind == "model" or not name.startswith("first_stage_model")) for name in changed)
        trained.close()


def test_a_saved_lora_is_what_was_trained(train: ModuleType, tiny: Path, three: Path, tmp_path: Path) -> None:
    """kohya's formula in numpy over the file's matrices, against the network as it was in training."""
    path = train.train(options(train, "lora", tiny, three, tmp_path / "x.safetensors", "--alpha", "2"))
    tensors, trained = load_file(path), torch.load(f"{path}.training", weights_only=True)["parameters"]
    name = "lora_unet_down_blocks_0_attentions_0_proj_out"
    up, down = (tensors[f"{name}.lora_{part}.weight"].flatten(1).double().numpy() for part in ("up", "down"))
    ours = "input_blocks.1.1.proj_out"
    expected = 0.5 * (trained[f"{ours}.up"] @ trained[f"{ours}.down"]).numpy()
    assert float(tensors[f"{name}.alpha"]) == 2
    np.testing.assert_allclose(up @ down * 2 / 4, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_looks_change_the_picture_and_keep_white(train: ModuleType) -> None:
    import pictures

    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 4, 8))
    found = {look: make(picture.copy()) for look, make in pictures.LOOKS.items()}
    assert all((pixels[:, 6:7] == 255).all() for pixels in found.values())
    red, blue = (found["frozen"][0, 0, i] for i in (0, 2))
    assert blue > red + 50 and found["golden"][0, 0, 0] > found["golden"][0, 0, 2] + 50
    assert found["drawn"][0, 4, 0] < 60 and (found["drawn"][2:6, 1:3] == 255).all()


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        ("none", 3, "expected pictures .*found none"),
        ("broken", 3, "broken.png: expected a picture, found none that can be read"),
        ("settings", 2, "was trained with rate '0.002', expected '0.1'"),
        ("state", 3, "expected a saved run, found something else"),
        ("rate", 2, "--rate nan: expected a number above 0"),
        ("packages", 5, "the emoji are not there\nGet them with npm install"),
        ("nan", 3, "NaN or infinite after training"),
    ],
)
def test_bad_input(
    train: ModuleType, tiny: Path, three: Path, tmp_path: Path, spoil: str, code: int, message: str
) -> None:
    output, pictures, more = tmp_path / "x.safetensors", three, list[str]()
    if spoil in ("none", "broken"):
        pictures = tmp_path / "empty"
        pictures.mkdir()
    if spoil == "broken":
        (pictures / "broken.png").write_bytes(b"not a picture")
    if spoil == "state":
        Path(f"{output}.training").write_bytes(b"not a run")
    if spoil == "settings":
        train.train(options(train, "lora", tiny, pictures, output))
        more = ["--rate", "0.1"]
    if spoil == "rate":
        more = ["--rate", "nan"]
    if spoil == "nan":
        more = ["--rate", "1e38"]
    chosen = options(train, "lora", tiny, pictures, output, *more)
    if spoil == "packages":
        chosen.pictures, chosen.node_modules = None, tmp_path / "node_modules"
    with pytest.raises(SdrtError, match=message) as caught:
        train.train(chosen)
    assert caught.value.exit_code == code and caught.value.fix


def test_unknown_emoji_is_named_with_its_nearest(train: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "@iconify-json" / "fluent-emoji-flat"
    package.mkdir(parents=True)
    (package / "package.json").write_text("{}")
    (package / "icons.json").write_text(json.dumps({"icons": {"raccoon": {"body": ""}}}))
    import pictures

    with pytest.raises(SdrtError, match="racoon: no emoji is called that; did you mean 'raccoon'") as caught:
        pictures.from_packages(tmp_path, ["racoon"], "flat")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "checkpoint", "modules", "encoders"),
    [("toy", "emoji-xl", 289, 2), ("velocity", "emoji-xl", 263, 0), ("lcm", "emoji", 272, 0)],
)
def test_adapters_through_diffusers_networks(
    three: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    checkpoint: str,
    modules: int,
    encoders: int,
) -> None:
    """A run of two steps writes a file that sdrt applies whole; started again, it finds itself done."""
    monkeypatch.syspath_prepend(EMOJI)
    import train_diffusers

    monkeypatch.setattr(train_diffusers, "SHOWN", ["red apple"])
    monkeypatch.setattr(train_diffusers, "PATHS_TOGETHER", 2)
    model, path = EMOJI / f"{checkpoint}.safetensors", tmp_path / "x.safetensors"
    words = f"{kind} {model} {path} --pictures {three} --steps 2 --batch 2 --rank 2 --conv-rank 1 --paths 1"
    for _ in range(2):
        train_diffusers.train(train_diffusers.arguments().parse_args(words.split()))
        written = read_raw(path)
    opened = open_checkpoint(model)
    opened.close()
    lora = open_lora(LoraOption(path), weight_shapes(opened.architecture), opened.architecture)
    with lora.file:
        assert len(lora.deltas) == modules and read_raw(path) == written
        assert lora.predicts_v is lora.zero_snr is (kind == "velocity")
        assert len({component_name(name) for name in lora.deltas} - {"unet"}) == encoders
        # queries and keys of self-attention over one latent change nothing, so they learn nothing
        learned = [name for name in lora.deltas if change_of(lora, name, torch.zeros(lora.deltas[name].shape)).any()]
        assert len(learned) > 0.95 * modules
    with Image.open(path.with_suffix(".png")) as drawn:
        assert drawn.size == (64, 64)
