"""The settings of a call, with their defaults, checked against a bundle before any work. No arithmetic and no
engine.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypedDict

from sdrt.bundle.manifest import MAX_BATCH, MAX_SIDE, MIN_SIDE, SIZE_STEP, Manifest
from sdrt.errors import UsageError, nearest, one_of
from sdrt.runtime.prompts.conditioning import EMPHASES, NETWORK_TAGS, SYNTAXES, chosen_layer
from sdrt.runtime.sampling.noise import MAX_SEED, NOISES
from sdrt.runtime.sampling.registry import COMPATS, check_list, parse_sampler, steps_of
from sdrt.runtime.sampling.schedule import MAX_STEPS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    ImageInput = str | Path | bytes | BinaryIO | Image.Image | NDArray[Any]

RESIZES = ("stretch", "crop", "fill")
MAX_COUNT, MAX_BLUR = 10_000, 64


class Settings(TypedDict, total=False):
    """The keyword arguments of `Pipeline.__call__` and `Pipeline.stream`; `Request` documents them."""

    negative: str | Sequence[str] | None
    prompt_2: str | Sequence[str] | None
    negative_2: str | Sequence[str] | None
    steps: int
    cfg: float
    image_cfg: float | None
    cfg_rescale: float
    seed: int | None
    sampler: str
    schedule: str | None
    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None
    size: tuple[int, int] | None
    original_size: tuple[int, int] | None
    crop_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    batch: int
    count: int
    compat: str
    noise: str | None
    clip_skip: int | None
    prompt_syntax: str | None
    emphasis: str
    network_tags: str
    init_image: ImageInput | None
    strength: float | None
    mask: ImageInput | None
    mask_blur: int | None
    resize: str


class Parameters(TypedDict):
    """What a result says about its request, as JSON, with every open choice made.

    These are the fields of `Request`. `prompt` and `negative` are lists where the request gave lists. `negative` is
    None where that means something else than an empty prompt. What the model does not have is None. `init_image` and
    `mask` are the paths as given, None where the pictures were not given as paths; `init_image_sha256` and
    `mask_sha256` are the hashes of what was read. Then follow the bundle's name and id, the files that went into the
    bundle (kind, name, sha256, scale, te_scale, trigger), and the version of sdrt that built it.
    """

    prompt: str | list[str]
    negative: str | list[str] | None
    prompt_2: str | list[str] | None
    negative_2: str | list[str] | None
    steps: int
    cfg: float
    image_cfg: float | None
    cfg_rescale: float
    seed: int
    sampler: str
    schedule: str
    timesteps: list[int] | None
    sigmas: list[float] | None
    size: list[int]
    original_size: list[int] | None
    crop_top_left: list[int] | None
    target_size: list[int] | None
    batch: int
    count: int
    compat: str
    noise: str
    clip_skip: int
    prompt_syntax: str
    emphasis: str
    network_tags: str
    init_image: str | None
    init_image_sha256: str | None
    strength: float | None
    mask: str | None
    mask_sha256: str | None
    mask_blur: int
    resize: str
    bundle: str
    bundle_id: str
    sources: list[dict[str, Any]]
    sdrt: str


class Texts(NamedTuple):
    """The prompts of one picture, as in `Request`."""

    prompt: str
    negative: str | None
    prompt_2: str | None
    negative_2: str | None


@dataclass(frozen=True)
class Request:
    """The settings of one call. Numbers may be numpy's.

    prompt: what to show; may be empty. docs/prompts.md has the syntax. A list gives each picture its own prompt, and
        `count` is then the length of the list.
    negative: what to steer away from; unused at guidance scale 1. One for all pictures, or a list as long as that of
        the prompts. None is an empty one. For SDXL compat diffusers tells the two apart, as diffusers does.
    prompt_2, negative_2: what the second text encoder reads, of models that have two; given like `prompt` and
        `negative`. None is `prompt` and `negative`. For compat diffusers and the plain syntax.
    steps: 1 to 1000. Samplers with two model calls a step (heun) make nearly twice as many calls.
    cfg: guidance scale, usually 1 or more; 1 turns guidance off and halves the work. In diffusers, so does less than 1.
        A model that is told the scale has no guidance beside that.
    image_cfg: of an edit model, how much the image to edit guides; None is 1.5.
    cfg_rescale: how far the deviation of the guided output is brought back to that of the conditional one, 0 to 1
        (diffusers' `guidance_rescale`). For models trained to zero terminal SNR, which guidance overexposes.
    seed: 0 to 2**64 - 1. None, or -1 as in AUTOMATIC1111, draws a seed, which the result names. Picture i of a call has
        seed + i and its own noise.
    sampler: a key or label of `sdrt.runtime.sampling.registry.SAMPLERS`, or diffusers' class name.
    schedule: the noise levels to pass through; None takes the sampler's own.
    timesteps: in place of steps and schedule, the training timesteps to pass through: whole numbers, falling, such as
        999, 749, 499, 249. An image takes the tail of them.
    sigmas: the same as noise levels, falling and ending in 0.
    size: (width, height) in pixels, multiples of 8 from 64 to 8192; None takes the bundle's.
    original_size, target_size: (width, height) in pixels that a model like SDXL is told: of the picture before it was
        cropped and scaled, and after. None is the size of the picture.
    crop_top_left: (top, left) in pixels that such a model is told: where the picture was cropped. None is (0, 0).
    batch: pictures per model call, 1 to 64.
    count: pictures in total, 1 to 10,000.
    compat: a1111 or diffusers: which tool's picture to make where the two differ. docs/compatibility.md lists the
        differences.
    noise: nv (AUTOMATIC1111's default, NVIDIA's generator) or cpu (PyTorch's). None is nv for a1111 and cpu for
        diffusers.
    clip_skip: text-encoder layer counted from the end, 1 is the last. The bundle must have been built with it; None
        takes the first one of the bundle.
    prompt_syntax: a1111 or plain; None is plain for diffusers, else a1111.
    emphasis: what `(word:1.2)` does: one of `sdrt.runtime.prompts.conditioning.EMPHASES`.
    network_tags: refuse or ignore `<lora:name:0.8>` and similar tags that the bundle does not hold at that strength.
        What the bundle holds needs no tag.
    init_image: start from this picture instead of from noise alone: a path, the bytes of a file, a file object, a
        Pillow image, or uint8 `[H, W, 3]`. An edit model needs one.
    strength: how much of the schedule an init image goes through, more than 0 to 1. None is 0.75 for a1111; for
        diffusers it is 0.8, or 1 with a mask. An edit model starts from noise alone if it is None for diffusers.
    mask: what to repaint of the init image: white is repainted, black is kept. Given like `init_image`; an array may
        also be uint8 `[H, W]`.
    mask_blur: radius in pixels by which the mask's edge is softened, 0 to 64; None is 4 for a1111, 0 for diffusers.
    resize: how an init image of another size is fitted: stretch, crop, or fill (its edges are extended).
    """

    prompt: str | Sequence[str]
    negative: str | Sequence[str] | None = None
    prompt_2: str | Sequence[str] | None = None
    negative_2: str | Sequence[str] | None = None
    steps: int = 20
    cfg: float = 7.0
    image_cfg: float | None = None
    cfg_rescale: float = 0.0
    seed: int | None = None
    sampler: str = "euler"
    schedule: str | None = None
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    size: tuple[int, int] | None = None
    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    batch: int = 1
    count: int = 1
    compat: str = "a1111"
    noise: str | None = None
    clip_skip: int | None = None
    prompt_syntax: str | None = None
    emphasis: str = "original"
    network_tags: str = "refuse"
    init_image: ImageInput | None = None
    strength: float | None = None
    mask: ImageInput | None = None
    mask_blur: int | None = None
    resize: str = "stretch"

    @property
    def seeds(self) -> tuple[int, ...]:
        assert self.seed is not None
        return tuple(range(self.seed, self.seed + self.count))

    @property
    def texts(self) -> tuple[Texts, ...]:
        """What is said of each picture."""
        of_each: list[tuple[Any, ...]] = [
            (given,) * self.count if given is None or isinstance(given, str) else tuple(given)
            for given in (getattr(self, name) for name in Texts._fields)
        ]
        return tuple(map(Texts, *of_each))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that a model is told, in pixels and in the order of `sdrt.bundle.manifest.SIZES`."""
        assert self.size is not None
        (width, height), (target_width, target_height) = self.original_size or self.size, self.target_size or self.size
        return (height, width, *(self.crop_top_left or (0, 0)), target_height, target_width)


def request_of_settings(prompt: str | Sequence[str], settings: Settings) -> Request:
    """The request of a call with these keyword arguments. Only their names are checked.

    Raises:
        UsageError: there is no setting of that name.
    """
    known = Settings.__annotations__
    for name in settings:
        if name not in known:
            raise UsageError(f"setting {name!r}: unknown{nearest(name, known)}", f"Choose among: {', '.join(known)}.")
    return Request(prompt, **settings)


def resolved(request: Request, manifest: Manifest) -> Request:
    """The request with every open choice made.

    Raises:
        UsageError: a setting is out of range, of the wrong type, or does not go with another.
    """
    compat = one_of("compat", request.compat, COMPATS)
    diffusers = compat == "diffusers"
    diffusion = manifest.diffusion
    listed = request.timesteps is not None or request.sigmas is not None
    named = None if request.schedule is None or listed else _text("schedule", request.schedule)
    sampler, schedule = parse_sampler(_text("sampler", request.sampler), named, compat, diffusion)
    timesteps, sigmas = check_list(
        sampler, diffusion, compat=compat, timesteps=request.timesteps, sigmas=request.sigmas
    )
    syntax = one_of("prompt syntax", request.prompt_syntax or ("plain" if diffusers else "a1111"), SYNTAXES)
    texts, count = _texts(request)
    if texts["negative"] is None and not (diffusers and any(text.zero_empty for text in manifest.text)):
        texts["negative"] = ""
    _check_second(texts, manifest, compat, syntax)
    edits = manifest.latents.edits
    if edits and request.init_image is None:
        raise UsageError(
            "init image: missing; this model edits a picture", "Give the picture to edit, with --init-image."
        )
    if not edits and request.image_cfg is not None:
        raise UsageError("image cfg: this model does not edit a picture", "Leave it out.")
    image_cfg = 1.5 if request.image_cfg is None else _number("image cfg", request.image_cfg, "1 to 3 usually")
    blur = (0 if diffusers else 4) if request.mask_blur is None else request.mask_blur
    return replace(
        request,
        **texts,
        image_cfg=image_cfg if edits else None,
        count=count,
        steps=_range("steps", steps_of(request.steps, timesteps, sigmas), 1, MAX_STEPS),
        cfg=_number("cfg", request.cfg, "1 to 30 usually"),
        cfg_rescale=_share("cfg rescale", request.cfg_rescale),
        seed=_range("seed", draw_seed() if request.seed in (None, -1) else request.seed, 0, MAX_SEED - (count - 1)),
        sampler=sampler,
        schedule=schedule,
        timesteps=timesteps,
        sigmas=sigmas,
        size=_size(request.size, manifest),
        original_size=_told("original size", request.original_size, manifest, "(width, height)", 1),
        crop_top_left=_told("crop top left", request.crop_top_left, manifest, "(top, left)", 0),
        target_size=_told("target size", request.target_size, manifest, "(width, height)", 1),
        batch=_range("batch", request.batch, 1, MAX_BATCH),
        noise=one_of("noise", request.noise or ("cpu" if diffusers else "nv"), NOISES),
        clip_skip=chosen_layer(manifest.text[0], request.clip_skip),
        prompt_syntax=syntax,
        emphasis=one_of("emphasis", request.emphasis, EMPHASES),
        network_tags=one_of("network tags", request.network_tags, NETWORK_TAGS),
        strength=_strength(request, diffusers, edits),
        mask_blur=_range("mask blur", blur, 0, MAX_BLUR),
        resize=one_of("resize", request.resize, RESIZES),
    )


def draw_seed() -> int:
    """A random seed, 0 to 2**32 - 1."""
    return secrets.randbelow(2**32)


_NAMES = {
    "prompt": "prompt",
    "negative": "negative prompt",
    "prompt_2": "prompt 2",
    "negative_2": "negative prompt 2",
}
"""What messages call the prompts."""


def _texts(request: Request) -> tuple[dict[str, Any], int]:
    """The prompts by field, each one text, one per picture, or None; and the number of pictures."""
    count = _range("count", request.count, 1, MAX_COUNT)
    texts = {
        field: None if given is None and field != "prompt" else _one_or_each(name, given)
        for field, name in _NAMES.items()
        for given in (getattr(request, field),)
    }
    prompt = texts["prompt"]
    others = {_NAMES[field]: text for field, text in texts.items() if isinstance(text, tuple) and field != "prompt"}
    if isinstance(prompt, str):
        for name, text in others.items():
            raise UsageError(f"{name}: a list of {len(text)}, with one prompt", "Give the prompts as a list too.")
        return texts, count
    assert prompt is not None
    if not 1 <= len(prompt) <= MAX_COUNT:
        raise UsageError(f"prompt: a list of {len(prompt)}, expected 1 to {MAX_COUNT}")
    if count not in (1, len(prompt)):
        raise UsageError(
            f"count {count}: there are {len(prompt)} prompts",
            "Leave the count out: a list of prompts makes one picture of each.",
        )
    for name, text in others.items():
        if len(text) != len(prompt):
            raise UsageError(
                f"{name}: a list of {len(text)}, with {len(prompt)} prompts",
                "Give one for all, or one for each prompt.",
            )
    return texts, len(prompt)


def _check_second(texts: Mapping[str, Any], manifest: Manifest, compat: str, syntax: str) -> None:
    """Refuse prompts for a second text encoder where there is none, or where they would mean nothing."""
    for field in ("prompt_2", "negative_2"):
        if texts[field] is None:
            continue
        name = _NAMES[field]
        if len(manifest.text) == 1:
            raise UsageError(f"{name}: this model has one text encoder", f"Say it all in the {name[:-2]}.")
        if compat != "diffusers" or syntax != "plain":
            raise UsageError(
                f"{name}: goes with compat diffusers and the plain prompt syntax, found {compat} and {syntax}",
                "Choose --compat diffusers, or leave it out.",
            )
    if texts["negative_2"] is not None and texts["negative"] is None:
        raise UsageError("negative prompt 2: given without a negative prompt", "Give that too, with --negative.")


def _told(name: str, given: tuple[int, int] | None, manifest: Manifest, parts: str, low: int) -> tuple[int, int] | None:
    """A size that the model is told; None where it is that of the picture."""
    if given is None:
        return None
    if not manifest.vector.sizes:
        raise UsageError(f"{name}: this model is not told sizes", "Leave it out; --size is that of the picture.")
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise UsageError(f"{name} {given!r}: expected {parts} in pixels")
    first, second = (_range(name, side, low, MAX_SIDE) for side in given)
    return first, second


def _one_or_each(name: str, value: str | Sequence[str]) -> str | tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(_text(f"{name} {i}", each) for i, each in enumerate(value, 1))
    return _text(name, value)


def _strength(request: Request, diffusers: bool, edits: bool) -> float | None:
    if request.init_image is None:
        for name, value in (("strength", request.strength), ("mask", request.mask)):
            if value is not None:
                raise UsageError(
                    f"{name}: given without an init image", "Give the picture to start from, with --init-image."
                )
        return None
    if request.strength is None:
        if diffusers and edits:
            return None  # from noise alone, as its pipelines of edit models start
        return (0.8 if request.mask is None else 1.0) if diffusers else 0.75
    strength = _number("strength", request.strength, "more than 0 and at most 1")
    if not 0 < strength <= 1:
        raise UsageError(
            f"strength {strength}: expected more than 0 and at most 1",
            "0.75 repaints most of an image, 0.3 keeps its composition.",
        )
    return strength


def _size(size: tuple[int, int] | None, manifest: Manifest) -> tuple[int, int]:
    chosen = manifest.latents.size if size is None else size
    if (
        not isinstance(chosen, (tuple, list))
        or len(chosen) != 2
        or not all(isinstance(side, Integral) for side in chosen)
    ):
        raise UsageError(f"size {chosen!r}: expected (width, height) in pixels")
    width, height = map(int, chosen)
    for side in (width, height):
        if side % SIZE_STEP or not MIN_SIDE <= side <= MAX_SIDE:
            raise UsageError(
                f"size {width}x{height}: expected multiples of {SIZE_STEP} from {MIN_SIDE} to {MAX_SIDE}",
                _nearest_size(width, height),
            )
    return width, height


def _nearest_size(width: int, height: int) -> str:
    sides = (min(MAX_SIDE, max(MIN_SIDE, round(side / SIZE_STEP) * SIZE_STEP)) for side in (width, height))
    return "The nearest is {}x{}.".format(*sides)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name}: expected text, found {type(value).__name__}")
    return value


def _range(name: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UsageError(f"{name} {value!r}: expected a whole number")
    if not low <= value <= high:
        raise UsageError(f"{name} {value}: expected {low} to {high}")
    return int(value)


def _share(name: str, value: float) -> float:
    number = _number(name, value, "0 to 1")
    if not 0 <= number <= 1:
        raise UsageError(f"{name} {value}: expected 0 to 1", "0.7 suits most models with zero terminal SNR.")
    return number


def _number(name: str, value: float, usual: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise UsageError(f"{name} {value!r}: expected a number")
    if not math.isfinite(value) or abs(value) > 1e4:
        raise UsageError(f"{name} {value}: expected a finite number, {usual}")
    return int(value) if isinstance(value, Integral) else float(value)
