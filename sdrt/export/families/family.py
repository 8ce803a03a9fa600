"""What a family of models is. Imports no torch and nothing of sdrt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Shapes = Mapping[str, tuple[int, ...]]

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
    unused_layers: int = 0
    """Layers at its end that nothing of the family uses."""


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
    transposed: tuple[str, ...] = ()
    """Ends of the model's names whose matrices are stored transposed."""
    text: Text = Text()
    """Of a text encoder only."""


@dataclass(frozen=True)
class Sign:
    """Shows of what kind a file is: a name that begins with one of `starts`, or the name `holds`, which has the shape
    `shape` if one is given.
    """

    kind: str
    starts: tuple[str, ...] = ()
    holds: str = ""
    shape: tuple[int, ...] | None = None

    def __call__(self, names: Shapes) -> bool:
        if self.holds:
            return self.holds in names and self.shape in (None, names[self.holds])
        return any(name.startswith(self.starts) for name in names)


@dataclass(frozen=True)
class Family:
    """A family that sdrt builds.

    `name` is what manifests say, `title` what messages say, `builds` names all of the family that is built. `kinds` are
    the words for a whole checkpoint, by the number of the UNet's input channels. Contexts and token vectors of
    `context_width` and `token_width` show that an adapter is for this family.
    """

    name: str
    title: str
    builds: str
    kinds: Mapping[int, str]
    components: tuple[Component, ...]
    token_table: str
    context_width: int
    token_width: int
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
    head_width: int | None = None
    """Channels of each head of the UNet, where the number of heads is not fixed."""
    upcast_attention: bool = False
    """Whether scores of the UNet's attention overflow in half precision."""
    vae_overflows: bool = False
    """Whether the VAE overflows in float16."""
    last_layer: int = 1
    """The latest layer of the text encoders that contexts come from: 1 is the last, 2 the one before it."""
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
    """A family that sdrt only knows by name, to say of what family a file is. Widths are those of contexts and of token
    vectors, with words for each.
    """

    title: str
    signs: tuple[Sign, ...] = ()
    """Of checkpoints. The first that holds names the file."""
    contexts: Mapping[int, str] = field(default_factory=dict)
    """Widths of contexts, with the words for a UNet without its text encoders."""
    tokens: Mapping[int, str] = field(default_factory=dict)
    """Widths of token vectors, with the words for whose they are."""
    adapters: tuple[str, ...] = ()
    """How the modules of its LoRAs begin."""
    embeddings: tuple[str, ...] = ()
    """Names of tensors that only its embeddings hold."""
