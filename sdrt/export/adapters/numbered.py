"""The first LoRA format of all (cloneofsimo/lora, 2022) numbers the modules in its keys. This file knows which number
is which module. Imports no torch.

Modules are numbered in the order in which diffusers 0.10 holds them: down blocks, up blocks, middle block; within each
transformer block `attn1`, `ff`, `attn2`. By default the format trains all linear layers of the attentions and the first
one of `ff`. In the text encoder it trains the linear layers of the attentions.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from sdrt.errors import AdapterError, printable
from sdrt.export.families.keys import Levels, diffusers_prefixes
from sdrt.export.families.table import COMPONENTS

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_BLOCK = (*(f"attn1.{name}" for name in _ATTENTION), "ff.net.0.proj", *(f"attn2.{name}" for name in _ATTENTION))
_TEXT_LAYER = tuple(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out"))
_PARTS_OF_THE_UNET = ("input_blocks.", "output_blocks.", "middle_block.")


def numbered_modules(modules: Collection[str], levels: Levels) -> dict[str, str]:
    """For each module that the format can change, the format's name, such as `unet:12` or `text_encoder:0`, to the
    canonical name.
    """

    def blocks(pattern: str, leaves: tuple[str, ...]) -> Iterator[str]:
        for number in itertools.count():
            if pattern.format(number) + leaves[0] not in modules:
                return
            yield from (pattern.format(number) + leaf for leaf in leaves)

    attentions = [ldm for ldm, diffusers in diffusers_prefixes(levels).items() if ".attentions." in diffusers]
    ordered = [name for part in _PARTS_OF_THE_UNET for name in attentions if name.startswith(part)]
    patterns = {
        "unet": ([f"{name}transformer_blocks.{{}}." for name in ordered], _BLOCK),
        "clip": (["text_model.encoder.layers.{}."], _TEXT_LAYER),
    }
    names: dict[str, str] = {}
    for component in COMPONENTS:
        below, leaves = patterns.get(component.network, ((), ()))
        found = [module for pattern in below for module in blocks(component.prefix + pattern, leaves)]
        names |= {f"{component.name}:{number}": module for number, module in enumerate(found)}
    return names


def check_numbers(path: Path, found: Collection[str], known: Collection[str], trained: str) -> None:
    """Check that a file numbers all modules of a component or none. If other modules had been trained too, a number
    would mean another module.

    `found` are the file's names, `known` those of `numbered_modules`. `trained` is what the header says about the
    trained modules.

    Raises:
        AdapterError: the file numbers more modules, or fewer.
    """
    counts, expected = (Counter(name.partition(":")[0] for name in names) for names in (found, known))
    for component, count in counts.items():
        if count != expected[component] or not set(found) <= set(known):
            said = f" (its header: {printable(trained)[:80]})" if trained else ""
            raise AdapterError(
                f"{path}: a LoRA in the first format of all, whose keys number the modules: {count} of the"
                f" {component}{said}; expected {expected[component]}, all attention layers of this model",
                "Which module a number means is known for that set only: use the adapter with the model's family, or"
                " convert it with the tool that trained it.",
            )
