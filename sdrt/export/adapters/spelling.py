"""How the LoRA family spells its keys: each key gives a module and a part of the change. Imports no torch.

Sources: kohya-ss networks/lora.py, LyCORIS modules/*.py (`weight_list` of each), diffusers utils/state_dict_utils.py,
peft `get_peft_model_state_dict`. Parts have LyCORIS's names, whatever the file's spelling.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from sdrt.errors import printable
from sdrt.export.families.family import Shapes
from sdrt.export.families.table import ADAPTERS, COMPONENTS, CONTEXTS, TEXT_MODULES, TEXTS, VECTORS

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
MAGNITUDE = "lora_magnitude_vector"
UP_BIAS = "lora_B.bias"

_OWN_NAMES = (
    DOWN,
    UP,
    MID,
    "alpha",
    "dora_scale",
    "diff",
    "diff_b",
    "w_norm",
    "b_norm",
    "bias_indices",
    "bias_values",
    "bias_size",
    "hada_w1_a",
    "hada_w1_b",
    "hada_w2_a",
    "hada_w2_b",
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t1",
    "lokr_t2",
)
_PARTS = {f".{part}": part for part in _OWN_NAMES} | {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_B.bias": UP_BIAS,
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    "_lora.down.weight": DOWN,
    "_lora.up.weight": UP,
    ".lora_layer.down.weight": DOWN,
    ".lora_layer.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
}
_KEY = re.compile("(.+?)(" + "|".join(re.escape(suffix) for suffix in _PARTS) + ")", re.DOTALL)
_ADAPTER_NAME = re.compile(
    r"(\.lora_(?:A|B|magnitude_vector|embedding_A|embedding_B))\.(?!(?:weight|bias)$)[^.]+(\.weight|\.bias|)", re.DOTALL
)
"""peft's state dictionaries name the adapter ("default", "default_0", ...) within each key; its files do not."""
_BASE_MODEL = re.compile(rf"((?:{'|'.join(component.name for component in COMPONENTS)})\.|)base_model\.model\.")
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\..+|[^.]+)", re.DOTALL)

_REFUSED = {
    "IA3": (".on_input", ".ia3_l"),
    "BOFT": (".boft_R", ".boft_s"),
    "OFT": (".oft_blocks", ".oft_diag", ".oft_r", ".oft_R.weight"),
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".glora_A"),
    "T-LoRA": (".lambda_layer",),
    "AdaLoRA": (".lora_E",),
    "VeRA": (".vera_lambda_b",),
    "ComfyUI's set_weight, whole weights in the place of the model's": (".set_weight",),
}
_NUMBERED = re.compile(r"((?:unet|text_encoder):\d{1,6}):(up|down)")


def split(key: str) -> tuple[str, str] | None:
    """The module's name in the file's spelling, and the part's name in LyCORIS's. None if the key ends like no part."""
    if numbered := _NUMBERED.fullmatch(key):
        return numbered[1], UP if numbered[2] == "up" else DOWN
    start = key.rfind(".lora_")
    if start >= 0 and (named := _ADAPTER_NAME.fullmatch(key, start)):
        key = key[:start] + named[1] + named[2]
    match = _KEY.fullmatch(key)
    return (match[1], _PARTS[match[2]]) if match else None


def below_base_model(key: str) -> str:
    """A key without peft's `base_model.model.`, which may stand at the start or below a component's name. A key without
    it is returned as it is.
    """
    match = _BASE_MODEL.match(key)
    return match[1] + key[match.end() :] if match else key


def bundled_trigger(key: str) -> tuple[str, str] | None:
    """The trigger of an embedding inside a LoRA file, if the key holds that embedding's vectors, and the vectors' name,
    which says of which text encoder they are: "" where there is one.

    AUTOMATIC1111 writes `bundle_emb.NAME.string_to_param.*`, OneTrainer `bundle_emb.NAME.clip_l` and, for SDXL,
    `bundle_emb.NAME.clip_g` beside it.
    """
    match = _BUNDLED.fullmatch(key)
    if match is None:
        return None
    if match[2].startswith("string_to_param."):
        return match[1], ""
    return (match[1], match[2]) if match[2] in VECTORS else None


def is_numbered(key: str) -> bool:
    """Whether a key is of the first LoRA format, which numbers the modules (`sdrt.export.adapters.numbered`)."""
    return _NUMBERED.fullmatch(key) is not None


def numbered_list(shapes: Shapes) -> dict[str, str]:
    """The first LoRA format as torch saved it: a bare list in which the matrices up and down alternate. Gives each key
    its numbered name. Empty for any other file.

    A text encoder is recognised by its attention layers: all have the same width in and out, and those of no UNet do.
    """
    if len(shapes) < 2 or len(shapes) % 2 or shapes.keys() != {str(number) for number in range(len(shapes))}:
        return {}
    pairs = [(shapes[str(number)], shapes[str(number + 1)]) for number in range(0, len(shapes), 2)]
    if not all(len(up) >= 2 and len(down) >= 2 and up[1] == down[0] for up, down in pairs):
        return {}
    component = "text_encoder" if len({up[0] for up, _ in pairs} | {down[1] for _, down in pairs}) == 1 else "unet"
    return {key: f"{component}:{int(key) // 2}:{'down' if int(key) % 2 else 'up'}" for key in shapes}


def is_adapter(shapes: Shapes) -> bool:
    """Whether the names are those of an adapter of the LoRA family, fused or refused by sdrt."""
    known = any((parsed := split(key)) is not None and parsed[1] != "alpha" for key in shapes)
    return known or bool(numbered_list(shapes)) or refused_kind(shapes) is not None


def refused_kind(shapes: Shapes) -> tuple[str, str] | None:
    """The kind of an adapter that sdrt does not fuse, and the key that shows it; None for any other file."""
    for key, shape in shapes.items():
        if ".motion_modules." in key and split(key):
            return "a motion LoRA of AnimateDiff", key
        for kind, endings in _REFUSED.items():
            if key.endswith(endings):
                return ("BOFT" if kind == "OFT" and len(shape) == 4 else kind), key
    return None


def made_for(shapes: Shapes) -> tuple[str, ...]:
    """The families that an adapter may have been made for, told by its names and by the widths of contexts and text
    encoders. Empty if they do not tell.
    """
    modules = _parts(shapes)
    named = next((titles for start, titles in ADAPTERS.items() if any(name.startswith(start) for name in modules)), ())
    context, text = (
        ("attn2_to_k", "attn2.to_k", "attn2.processor.to_k"),
        ("self_attn_q_proj", "self_attn.q_proj", "self_attn.to_q"),
    )
    wide: tuple[str, ...] = ()
    for endings, table in ((context, {width: (title,) for width, title in CONTEXTS.items()}), (text, TEXTS)):
        widths = (_inputs(parts) for module, parts in modules.items() if module.endswith(endings))
        wide = wide or next((table[width] for width in widths if width in table), ())
    return tuple(title for title in named if title in wide) or wide or named


def first_channels(shapes: Shapes) -> int:
    """How many channels the UNet's first layer takes in the model that an adapter was made for; 0 if it does not change
    that layer.
    """
    ends = ("conv_in", "input_blocks_0_0", "input_blocks.0.0")
    found = next((_inputs(parts) for module, parts in _parts(shapes).items() if module.endswith(ends)), 0)
    return found // 9 if found >= 36 and found % 9 == 0 else found  # some factors join the 3x3 kernel to the channels


def _parts(shapes: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of an adapter by module, in the file's spelling, and part."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if parsed := split(below_base_model(key)):
            modules.setdefault(parsed[0], {})[parsed[1]] = shape
    return modules


def component_of_module(module: str) -> str:
    """The name of the component that a module belongs to, given in the file's spelling."""
    fitting = [start for start in TEXT_MODULES if module.startswith(start)]
    return TEXT_MODULES[max(fitting, key=len)] if fitting else "unet"


def _inputs(parts: Shapes) -> int:
    """How many input channels the change of a linear layer has, if one shape alone tells; 0 if none does."""
    for part in (DOWN, "hada_w1_b", "diff"):
        if len(parts.get(part, ())) >= 2:
            return parts[part][1]
    small, large = (
        next((parts[p] for p in (f"lokr_{w}", f"lokr_{w}_b") if len(parts.get(p, ())) >= 2), (0, 0))
        for w in ("w1", "w2")
    )
    return small[1] * large[1]


def kinds(shapes: Shapes) -> dict[str, int]:
    """How many modules of an adapter are of each kind, the most common first: "LoRA", "LoHa", "LoKr", "full
    difference", "norm". "DoRA" comes before them all.
    """
    modules: dict[str, set[str]] = {}
    for key in shapes:
        if parsed := split(key):
            modules.setdefault(parsed[0], set()).add(parsed[1])
    counts = Counter[str]()
    for parts in modules.values():
        name = next((name for name, signs in _SIGNS.items() if parts & signs), "other")
        counts["DoRA " + name if parts & {"dora_scale", MAGNITUDE} else name] += 1
    return dict(counts.most_common())


_SIGNS = {
    "LoCon with mid": {MID},
    "LoRA": {DOWN, UP, "lora_embedding_A"},
    "LoHa": {"hada_w1_a", "hada_w1_b"},
    "LoKr": {"lokr_w1", "lokr_w1_a", "lokr_w2", "lokr_w2_a"},
    "full difference": {"diff", "diff_b"},
    "norm": {"w_norm", "b_norm"},
}


def ranks(shapes: Shapes) -> dict[int, int]:
    """How many modules have each rank, the lowest first. A LoKr of two whole matrices has no rank, nor has a
    difference.
    """
    found: dict[str, int] = {}
    for key, shape in shapes.items():
        parsed = split(key)
        if parsed and shape and parsed[1] in (DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "lora_embedding_A"):
            found[parsed[0]] = shape[0]
    return dict(sorted(Counter(found.values()).items()))


def grouped(keys: Iterable[str]) -> str:
    """Keys in words, without their numbers: `21 x lora_unet_down_blocks_N_conv`. The three most common."""
    groups = Counter(re.sub(r"\d+", "N", parsed[0] if (parsed := split(key)) else key) for key in keys)
    return ", ".join(f"{count} x {printable(group)}" for group, count in groups.most_common(3))
