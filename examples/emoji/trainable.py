"""What each kind of fine-tuning trains, how the network uses it, and the file it is saved as; over the networks that
sdrt traces.

LoRA            Hu et al. 2021: W + alpha / rank * up @ down, for the UNet's transformers; kohya's file
embedding       Gal et al. 2022: new rows of the token table; `.safetensors` with `emb_params`, or AUTOMATIC1111's `.pt`
hypernetwork    x + layers(x) before keys and values; AUTOMATIC1111's `.pt`
DreamBooth      Ruiz et al. 2023: every weight of the UNet and the text encoder; a checkpoint in LDM's names
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from sdrt.bundle.bpe import read_bpe
from sdrt.errors import AdapterError
from sdrt.export.adapters.hypernetwork import ACTIVATIONS, attention_widths
from sdrt.export.architecture import Architecture, HypernetworkSpec
from sdrt.export.families.keys import diffusers_module
from sdrt.export.families.sd1 import SD1, UNET
from sdrt.export.networks.clip import TextEncoder
from sdrt.export.networks.unet import Hypernetworks, UNet
from sdrt.export.networks.vae import VaeDecoder, VaeEncoder
from sdrt.export.read.checkpoint import open_checkpoint
from sdrt.export.tokenizer import write_tokenizer
from sdrt.files.publish import staged_file, write_file


@dataclass(frozen=True)
class Model:
    """The networks of a checkpoint in float32, frozen, and CLIP's tokenizer with the ids of its start and end."""

    architecture: Architecture
    clip: TextEncoder
    unet: UNet
    encoder: VaeEncoder
    decoder: VaeDecoder
    tokenize: Callable[[str], list[int]]
    ends: tuple[int, int]
    name: str
    sha256: str
    metadata: Mapping[str, str]

    def state(self) -> dict[str, Tensor]:
        """Every weight by its canonical name, as a checkpoint holds it."""
        unet = {UNET + name: value for name, value in self.unet.state_dict().items()}
        return {**unet, **self.clip.state_dict(), **self.encoder.state_dict(), **self.decoder.state_dict()}

    def tokens(self, caption: str, extra: Iterable[int] = ()) -> Tensor:
        """Ids `[77]` of a caption, and `extra` ones before the end."""
        start, end = self.ends
        length = self.architecture.texts[0].tokens
        ids = [start, *[*self.tokenize(caption), *extra][: length - 2], end]
        return torch.tensor(ids + [end] * (length - len(ids)))


def new_model(architecture: Architecture, name: str, sha256: str, metadata: Mapping[str, str]) -> Model:
    """A model of these sizes with weights as torch begins them. `metadata` is what a checkpoint says of itself, such as
    its pictures' size.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        ends = write_tokenizer(path, architecture.texts[0].vocabulary)
        tokenize = read_bpe(path).encode
    made = (
        TextEncoder(architecture.texts),
        UNet(architecture.unet),
        VaeEncoder(architecture.vae),
        VaeDecoder(architecture.vae),
    )
    for module in made:
        module.requires_grad_(False)
    return Model(architecture, *made, tokenize, ends, name, sha256, metadata)


def load_model(path: Path) -> Model:
    """A checkpoint as the networks that sdrt traces, in float32. Raises as `open_checkpoint` does."""
    checkpoint = open_checkpoint(path)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        model = new_model(checkpoint.architecture, path.stem, digest, checkpoint.model.metadata)
        for module, prefix in ((model.unet, UNET), (model.clip, ""), (model.encoder, ""), (model.decoder, "")):
            module.load_state_dict(
                {
                    name: torch.from_numpy(checkpoint.tensors[prefix + name].read()).float()
                    for name in module.state_dict()
                }
            )
        return model
    finally:
        checkpoint.close()


@dataclass(frozen=True)
class Trainable:
    """What is trained. `context` takes token ids `[B, 77]` to `[B, 77, C]`; `predict` takes noisy latents `[B, 4, h,
    w]`, timesteps float32 `[B]` and contexts to the noise in the latents; `save` writes the file after so many steps.
    """

    parameters: dict[str, Tensor]
    context: Callable[[Tensor], Tensor]
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]
    save: Callable[[Path, int], None]
    trains_text: bool
    extra_tokens: tuple[int, ...] = ()


def _encode(model: Model, tokens: Tensor, changed: dict[str, Tensor] | None = None) -> Tensor:
    return functional_call(model.clip, changed or {}, (tokens,))[0]


def _learned(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in values.items()}


def _write(path: Path, data: bytes) -> None:
    with staged_file(path) as stage:
        write_file(stage, data)


def _pickled(content: dict[Any, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _stored(value: Tensor) -> Tensor:
    return value.detach().to(torch.float16).contiguous()


def check_finite(parameters: dict[str, Tensor]) -> None:
    """Raise AdapterError if training has run away."""
    for name, value in parameters.items():
        if not torch.isfinite(value).all():
            raise AdapterError(f"{name}: NaN or infinite after training", "Lower --rate.")


def lora(model: Model, rank: int, alpha: float, random: torch.Generator) -> Trainable:
    """Two matrices for each projection of the UNet's transformers, 1x1 convolutions included, which is what kohya's
    scripts train by default.
    """
    modules = {
        name: module
        for name, module in model.unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and re.search(r"transformer_blocks|\.proj_(in|out)$", name)
    }
    begun = {}
    for name, module in modules.items():
        outputs, inputs = module.weight.shape[:2]
        begun[name + ".down"] = torch.randn(rank, inputs, generator=random) / math.sqrt(inputs)
        begun[name + ".up"] = torch.zeros(outputs, rank)
    parameters = _learned(begun)

    def predict(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        changed = {
            f"{name}.weight": module.weight
            + (alpha / rank) * (parameters[name + ".up"] @ parameters[name + ".down"]).view_as(module.weight)
            for name, module in modules.items()
        }
        return functional_call(model.unet, changed, (x, timestep, context))

    def save_file(path: Path, steps: int) -> None:
        tensors = {}
        for name, module in modules.items():
            kohya = "lora_unet_" + diffusers_module(name, model.architecture.unet).replace(".", "_")
            ends = (1,) * (module.weight.dim() - 2)
            tensors[f"{kohya}.lora_down.weight"] = _stored(parameters[name + ".down"].reshape(rank, -1, *ends))
            tensors[f"{kohya}.lora_up.weight"] = _stored(parameters[name + ".up"].reshape(-1, rank, *ends))
            tensors[f"{kohya}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
        settings = {
            "network_module": "networks.lora",
            "network_dim": rank,
            "network_alpha": alpha,
            "steps": steps,
            "output_name": path.stem,
        }
        settings |= {"sd_model_name": model.name, "new_sd_model_hash": model.sha256}
        _write(path, save(tensors, metadata={f"ss_{key}": str(value) for key, value in settings.items()}))

    return Trainable(parameters, lambda tokens: _encode(model, tokens), predict, save_file, trains_text=False)


def embedding(model: Model, vectors: int, initial: str, random: torch.Generator) -> Trainable:
    """`vectors` rows after the token table's own, which begin as those of the words `initial`, repeated, with a little
    noise.
    """
    table = model.clip.state_dict()[SD1.text_encoder.token_table]
    words = model.tokenize(initial)
    begun = torch.stack([table[words[i % len(words)]] for i in range(vectors)])
    parameters = _learned({"vectors": begun + 0.1 * begun.std() * torch.randn(begun.shape, generator=random)})

    def context(tokens: Tensor) -> Tensor:
        return _encode(model, tokens, {SD1.text_encoder.token_table: torch.cat([table, parameters["vectors"]])})

    def save_file(path: Path, steps: int) -> None:
        found = parameters["vectors"].detach().clone()
        if path.suffix == ".pt":
            settings = {
                "name": path.stem,
                "step": steps,
                "sd_checkpoint": model.sha256[:10],
                "sd_checkpoint_name": model.name,
            }
            _write(path, _pickled({"string_to_token": {"*": 265}, "string_to_param": {"*": found}, **settings}))
        else:
            _write(path, save({"emb_params": found}))

    new = tuple(range(len(table), len(table) + vectors))
    return Trainable(parameters, context, model.unet, save_file, trains_text=True, extra_tokens=new)


def hypernetwork(model: Model, structure: tuple[float, ...], activation: str, random: torch.Generator) -> Trainable:
    """A network for keys and one for values at each width of the UNet's attention. The last layer begins at zero, so
    the first step changes nothing.
    """
    sizes = model.architecture.unet
    widths = sorted(attention_widths(sizes))
    spec = HypernetworkSpec(
        tuple(tuple(int(width * n) for n in structure) for width in widths), ACTIVATIONS[activation], False, False
    )
    module = Hypernetworks((spec,)).requires_grad_(False)
    begun = {name: torch.zeros_like(value) for name, value in module.named_parameters() if not name.endswith(".scale")}
    last = max(int(name.split(".")[4]) for name in begun)
    for name, value in begun.items():
        if value.dim() == 2 and int(name.split(".")[4]) != last:
            begun[name] = torch.randn(value.shape, generator=random) / math.sqrt(value.shape[1])
    parameters = _learned(begun)

    def applied(x: Tensor) -> tuple[Tensor, Tensor]:
        return functional_call(module, parameters, (x,))

    def predict(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return model.unet(x, timestep, context, applied)

    def save_file(path: Path, steps: int) -> None:
        def network(width: int, part: str) -> dict[str, Tensor]:
            prefix = f"0.{width}.{part}.layers."
            return {
                "linear." + name.removeprefix(prefix): _stored(value)
                for name, value in parameters.items()
                if name.startswith(prefix)
            }

        content: dict[Any, Any] = {width: (network(width, "k"), network(width, "v")) for width in widths}
        content |= {
            "step": steps,
            "name": path.stem,
            "layer_structure": list(structure),
            "activation_func": activation,
            "is_layer_norm": False,
        }
        content |= {
            "weight_initialization": "Normal",
            "use_dropout": False,
            "activate_output": False,
            "last_layer_dropout": False,
        }
        content |= {"sd_checkpoint": model.sha256[:10], "sd_checkpoint_name": model.name}
        _write(path, _pickled(content))

    return Trainable(parameters, lambda tokens: _encode(model, tokens), predict, save_file, trains_text=False)


def whole(model: Model, *, vae: bool = False) -> Trainable:
    """Every weight of the UNet and of the text encoder, and with `vae` those of the autoencoder, trained where they
    are; saved as a checkpoint.
    """
    modules: list[nn.Module] = [model.unet, model.clip, *([model.encoder, model.decoder] if vae else [])]
    for module in modules:
        module.requires_grad_(True)
    parameters: dict[str, Tensor] = {
        f"{i}.{name}": value for i, module in enumerate(modules) for name, value in module.named_parameters()
    }

    def save_file(path: Path, steps: int) -> None:
        _write(
            path,
            save(
                {name: _stored(value) for name, value in model.state().items()},
                metadata={**model.metadata, "modelspec.title": path.stem, "steps": str(steps)},
            ),
        )

    return Trainable(parameters, lambda tokens: _encode(model, tokens), model.unet, save_file, trains_text=True)
