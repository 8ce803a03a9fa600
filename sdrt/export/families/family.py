"""What a family of models is. Imports no torch and nothing of sdrt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Shapes = Mapping[str, tuple[int, ...]]

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
"""Of a text encoder below its prefix."""
END_TOKEN = 49407
"""CLIP's end of a text, the last token of its vocabulary."""


@dataclass(frozen=True)
class Text:
    """What the shapes of a text encoder do not tell."""

    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of its MLPs."""
    head_width: int = 64
    """Channels of a head."""
    pad: int = END_TOKEN
    """Id of the token that fills a chunk after its end."""
    final_norm: bool = True
    """Whether contexts go through the norm after the last layer."""
    pooled: bool = False
    """Whether the UNet is told its projected vector of the whole prompt."""
    used_layers: int | None = None
    """The most layers of it that the family uses; those after them change nothing. None for all."""


@dataclass(frozen=True)
class Component:
    """One network of a model, and how files spell it.

    `name` is what reports call it, and the folder that diffusers saves it in; `title` is what messages call it.
    `network` says which of sdrt's networks it is. Canonical names of its tensors begin with `prefix`; checkpoints begin
    them with any of `prefixes`. Where no name has one of these, a file holds the bare network if one of `needed` is
    there; its tensors are then the names that begin with one of `bare`.
    """

    name: str
    title: str
    network: Literal["unet", "vae", "clip"]
    prefix: str
    prefixes: tuple[str, ...]
    needed: tuple[str, ...]
    bare: tuple[str, ...]
    adapters_flat: tuple[str, ...] = ()
    """What LoRAs put before a module's path joined by underscores."""
    adapters_dotted: tuple[str, ...] = ()
    """What LoRAs put before a module's path with its dots."""
    computes: str = ""
    """How the names below the prefix begin that change what the network computes; empty if all do."""
    ignored: tuple[str, ...] = ()
    """How the names below the prefix begin that change nothing."""
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ends of stored names to the ends of the model's names that stand for equal parts of the rows, first rows first.
    """
    transposed: Mapping[str, str] = field(default_factory=dict)
    """Ends of the names of matrices that are stored transposed, to the ends of the model's names."""
    text: Text = Text()
    """Of a text encoder only."""
    vectors: str = ""
    """What embeddings call a text encoder's vectors where a model has several."""

    @property
    def token_table(self) -> str:
        """Name of a text encoder's table of token vectors."""
        return self.prefix + TOKEN_TABLE

    def below(self, names: Iterable[str]) -> dict[str, str]:
        """The component's names among those of a file, to what follows the prefix. Bare names count only where none has
        a prefix.
        """
        names = list(names)
        longest = sorted(self.prefixes, key=len, reverse=True)
        found = {
            name: name[len(prefix) :]
            for name in names
            if name.startswith(self.prefixes)
            for prefix in [next(prefix for prefix in longest if name.startswith(prefix))]
        }
        if found or not set(self.needed).intersection(names):
            return found
        return {name: name for name in names if name.startswith(self.bare)}


@dataclass(frozen=True)
class Sign:
    """Shows of what kind a file is. All that are given must hold.

    starts: a name begins with one of them.
    within: a name contains it.
    beside: a name begins with it as well.
    holds: a tensor has that name, and the shape `shape` or so many columns if these are given.
    """

    kind: str
    starts: tuple[str, ...] = ()
    within: str = ""
    beside: str = ""
    holds: str = ""
    shape: tuple[int, ...] | None = None
    columns: int | None = None

    def __call__(self, names: Shapes) -> bool:
        if self.holds:
            shape = names.get(self.holds)
            return shape is not None and self.shape in (None, shape) and self.columns in (None, *shape[1:2])
        return any(name.startswith(self.starts or "") and self.within in name for name in names) and (
            not self.beside or any(name.startswith(self.beside) for name in names)
        )


@dataclass(frozen=True)
class Family:
    """A family that sdrt builds.

    `name` is what manifests say, `title` what messages say, `builds` names all of the family that is built. `kinds` are
    the words for a whole checkpoint, by the number of the UNet's input channels; `alone` those for a UNet without text
    encoders. Contexts of `context_width` show that an adapter is for this family.
    """

    name: str
    title: str
    builds: str
    kinds: Mapping[int, str]
    alone: str
    components: tuple[Component, ...]
    context_width: int
    tokens: Mapping[int, str]
    """Widths of token vectors that show the family, with the words for whose they are."""
    text_widths: tuple[int, ...]
    """Of its text encoders, also those that other families have."""
    heads: int | None
    """Of each attention of the UNet, where their number is fixed."""
    latent_scale: float
    """Multiplies latents after encoding, where the file does not say."""
    size: tuple[int, int]
    """The default picture as (width, height)."""
    prediction: str
    """Where the file does not say: "epsilon" or "v"."""
    ignored: tuple[str, ...]
    """How names outside of all components begin that change nothing."""
    refused: Mapping[str, str]
    """How tensors below the UNet's prefix begin that make it another kind of model, and of what kind."""
    pipelines: tuple[str, ...]
    """Classes of diffusers whose models are built."""
    settings: Mapping[str, Mapping[str, tuple[Any, ...]]]
    """Values that settings of diffusers' JSON files may have, by file and name; the rest is the same for all families
    (`diffusers_config`).
    """
    schedulers: tuple[str, ...]
    """Classes of schedulers that the family's own folders name, with timesteps spaced "leading"."""
    signs: tuple[Sign, ...] = ()
    """Any of them shows a checkpoint of the family, before its names are made canonical."""
    adapters: tuple[str, ...] = ()
    """How modules begin that show a LoRA of the family; several families may share them."""
    size_of_v: tuple[int, int] | None = None
    """The default picture of models that predict v, where it is another."""
    shows_v: tuple[str, float] | None = None
    """A tensor below the UNet's prefix. A larger deviation of its values than that shows a model that predicts v."""
    head_width: int | None = None
    """Channels of each head of the UNet, where the number of heads is not fixed."""
    upcast_attention: bool = False
    """Whether scores of the UNet's attention overflow in half precision."""
    vae_overflows: bool = False
    """Whether the VAE overflows in float16."""
    last_layer: int = 1
    """The latest layer of the text encoders that contexts come from: 1 is the last, 2 the one before it."""
    zero_empty: bool = False
    """Whether an empty negative prompt is zeros, not what the text encoders make of it."""
    sizes: int = 0
    """Sizes in pixels that the UNet is told in its vector."""
    size_width: int = 0
    """Numbers of the sinusoid of each of them."""

    def component(self, network: str) -> Component:
        return next(component for component in self.components if component.network == network)

    @property
    def unet(self) -> Component:
        return self.component("unet")

    @property
    def vae(self) -> Component:
        return self.component("vae")

    @property
    def text_encoder(self) -> Component:
        return self.component("clip")

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """All of them, in the order of their contexts."""
        return tuple(component for component in self.components if component.network == "clip")


@dataclass(frozen=True)
class OtherFamily:
    """A family that sdrt only knows by name, to say of what family a file is."""

    title: str
    signs: tuple[Sign, ...] = ()
    """Of checkpoints. The first that holds names the file."""
    adapters: tuple[str, ...] = ()
    """How the modules of its LoRAs begin."""
