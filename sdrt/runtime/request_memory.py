"""How much memory a request takes on a CPU at its peak, beside the loaded networks. The estimate is made from their
sizes before anything is computed.

An estimate that is too low lets a request through that makes the system end the process. One that is too high refuses a
request that would work. So an estimate counts only what is known to be in memory at the same time. docs/deploy.md has
the measured peaks that it was compared with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdrt.bundle.graphs import REGISTERS
from sdrt.bundle.manifest import WEIGHTS, Manifest
from sdrt.engines.shapes import JobShape
from sdrt.errors import BundleError, ResourceError

_FLOAT = 4
_FEATURES = 16
"""How many tensors of the size of the UNet's first one lie in memory at once: skip connections, and the wide middle of
the first feed-forward.
"""
_PIXEL_FEATURES = 4
"""How many tensors of the VAE's mean size, at full resolution, lie in memory at once on ONNX Runtime: input, norm,
product and shortcut of a block.
"""
_FUSED_PIXEL_FEATURES = 3
"""The same on OpenVINO, which fuses the norm."""
_STEP_SHARE = 0.8
"""The step's share of all weights, as in Stable Diffusion 1.x."""


@dataclass(frozen=True)
class Demand:
    """Bytes that a request takes at its peak, and the parts of this sum, in words."""

    size_bytes: int
    words: str


@dataclass(frozen=True)
class _Sizes:
    """The sizes of an architecture that the estimate needs. For each level with self-attention, `attention` holds the
    factor by which its sides are smaller, and its number of heads.
    """

    features: int
    attention: tuple[tuple[int, int], ...]
    vae: tuple[int, int]


def onnxruntime_demand(manifest: Manifest, shape: JobShape) -> Demand:
    """The estimate for ONNX Runtime, which computes in float32 and writes all scores of an attention layer at once. It
    keeps two blocks of memory: one for the scores that the guidance branches share, which are computed once, and one
    for the scores of every branch. Everything else fits into these blocks. Its sessions share the memory they have
    taken, so the larger one of step and VAE counts.
    """
    sizes, (queries, keys, heads) = _sizes(manifest), _largest_attention(manifest, shape)
    copies = shape.batch * (shape.branches + (0 if manifest.latents.concat_channels else 1))
    pixels, side = _latent_pixels(manifest, shape), f"{shape.size[0]}x{shape.size[1]}"
    scores = heads * queries * keys * _FLOAT * copies
    features = _features(manifest, shape, sizes) * _FLOAT
    vae = shape.batch * _FLOAT * max(_pixel_features(shape, sizes, _PIXEL_FEATURES), pixels * pixels)
    parts = [
        Demand(
            scores,
            f"attention {_gb(scores)} ({heads} heads of {queries:,} x {keys:,} scores of {_FLOAT} bytes, {copies}"
            " times)",
        ),
        Demand(features, f"features {_gb(features)}"),
        Demand(vae, f"decoding {shape.batch} of {side} pixels {_gb(vae)}"),
    ]
    return max(parts, key=lambda part: part.size_bytes)


def openvino_demand(
    manifest: Manifest, shape: JobShape, *, precision: str, step_loaded: bool, decoder_loaded: bool
) -> Demand:
    """The estimate for OpenVINO, which never holds the scores of an attention layer. A job has two infer requests, each
    with its own features. The VAE takes one picture at a time, and a loaded decoder uses the memory it has taken again.
    `precision` is bf16 or fp32. A step that is not loaded yet brings its weights once more.
    """
    sizes, width_bytes = _sizes(manifest), 2 if precision == "bf16" else _FLOAT
    features = 2 * _features(manifest, shape, sizes) * width_bytes
    vae = 0 if decoder_loaded else _pixel_features(shape, sizes, _FUSED_PIXEL_FEATURES) * width_bytes
    stored_bytes = _FLOAT if manifest.precision == "fp32" else 2
    weights = 0 if step_loaded else int(_STEP_SHARE * manifest.files[WEIGHTS].size_bytes * width_bytes / stored_bytes)
    words = f"features of two requests {_gb(features)}, decoding {_gb(vae)}" + (
        f", weights of a step to load {_gb(weights)}" if weights else ""
    )
    return Demand(features + vae + weights, words)


def with_own(
    demand: Demand, manifest: Manifest, shape: JobShape, *, contexts: int = 1, rows: int = 1, pictures: int = 1
) -> Demand:
    """Add the memory of our own arrays: `contexts` that the prompts make over the steps, the noise of `rows` model
    calls, and finished `pictures`.
    """
    latents = manifest.latents.channels * _latent_pixels(manifest, shape) * _FLOAT * shape.batch
    numbers = shape.tokens * manifest.context_width + manifest.vector.numbers
    text = contexts * shape.branches * shape.batch * numbers * _FLOAT
    own = text + latents * (rows + 2 * REGISTERS) + 3 * shape.size[0] * shape.size[1] * pictures
    return Demand(demand.size_bytes + own, f"{demand.words}, prompts, noise and pictures {_gb(own)}")


def check_memory(demand: Demand, shape: JobShape, free_bytes: int | None) -> None:
    """Refuse a request that does not fit into the free memory.

    Raises:
        ResourceError: it does not fit; the message has the sum.
    """
    if free_bytes is not None and demand.size_bytes > free_bytes:
        raise ResourceError(
            f"request for {shape.batch} of {shape.size[0]}x{shape.size[1]} at once: takes about"
            f" {_gb(demand.size_bytes)}, and {_gb(free_bytes)} are free: {demand.words}",
            "Choose a smaller --size or --batch, or a shorter prompt; OpenVINO engines take far less than ONNX Runtime"
            " for large pictures.",
        )


def _sizes(manifest: Manifest) -> _Sizes:
    try:
        unet, vae = manifest.architecture["unet"], manifest.architecture["vae"]
        channels, depths = unet["channels"], unet["down_depth"]
        heads = [unet["heads"] or width // unet["head_width"] for width in channels]
        attention = tuple((2**level, heads[level]) for level, blocks in enumerate(depths) if any(blocks))
        found = _Sizes(channels[0], attention, (vae["channels"][0], vae["channels"][min(1, len(vae["channels"]) - 1)]))
        _all_counts([found.features, *found.vae, *(number for pair in attention for number in pair)])
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise BundleError(
            f"manifest.architecture: not of the expected form: {error}", "Build the bundle again."
        ) from error
    return found


def _all_counts(values: Iterable[object]) -> None:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"expected a count, found {value!r}")


def _largest_attention(manifest: Manifest, shape: JobShape) -> tuple[int, int, int]:
    """Queries, keys and heads of the attention layer with the most scores, either between pixels or from pixels to a
    long prompt. Zeros if there is none.
    """
    width, height = (side // manifest.latents.factor for side in shape.size)
    levels = [(-(-width // smaller) * -(-height // smaller), heads) for smaller, heads in _sizes(manifest).attention]
    layers = [(pixels, max(pixels, shape.tokens), heads) for pixels, heads in levels]
    return max(layers, key=lambda layer: layer[0] * layer[1] * layer[2], default=(0, 0, 0))


def _features(manifest: Manifest, shape: JobShape, sizes: _Sizes) -> int:
    """How many numbers the UNet's features in memory at once have."""
    return _FEATURES * sizes.features * _latent_pixels(manifest, shape) * shape.batch * shape.branches


def _pixel_features(shape: JobShape, sizes: _Sizes, tensors: int) -> int:
    """How many numbers the VAE's features of one picture in memory at once have."""
    return tensors * sum(sizes.vae) * shape.size[0] * shape.size[1] // 2


def _latent_pixels(manifest: Manifest, shape: JobShape) -> int:
    factor = manifest.latents.factor
    return (shape.size[0] // factor) * (shape.size[1] // factor)


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB"
