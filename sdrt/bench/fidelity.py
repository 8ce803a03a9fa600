"""Checks that the picture is still right: the measured engine runs on the bundle's reference inputs, and the fixed-seed
picture is kept as a sketch.

A wrong picture is no improvement however fast, so a run that fails here is no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import OF_TEXT, REGISTERS, STEP, TEXT_ENCODER, VAE_DECODER, dimensions, signatures, text_outputs
from sdrt.bundle.manifest import reference_path
from sdrt.bundle.reference import Parity, compare
from sdrt.errors import SdrtError
from sdrt.runtime.engine import Engine, Job

SKETCH = 256
"""Numbers in a sketch. Relative differences are estimated to within about 9 % of their value."""


def check_references(engine: Engine, bundle: Bundle) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Run text encoder, one denoising step and decoder of `engine` on the bundle's reference inputs, 64x64 pixels.

    Returns the checks (graph, output, error, limit), the problems found, and the checks that this engine could not run
    because it takes other shapes.
    """
    checks: list[dict[str, Any]] = []
    problems: list[str] = []
    skipped: list[str] = []
    for graph, run in ((TEXT_ENCODER, _text_encoder), (STEP, _step), (VAE_DECODER, _decoder)):
        with np.load(bundle.file(reference_path(graph)), allow_pickle=False) as stored:
            reference = {name: stored[name] for name in stored.files}
        try:
            found = run(engine, bundle, reference)
        except SdrtError as error:
            skipped.append(f"fidelity of {graph} not checked: {error.line}")
            continue
        for parity in found:
            checks.append(
                {"graph": graph, **asdict(parity)}
                | {"error": float(np.nan_to_num(parity.error, nan=1e30, posinf=1e30))}
            )
            if not parity.ok:
                problems.append(
                    f"{graph}: {parity.output}: differs from the bundle's reference by {parity.error:.2e}, expected at"
                    f" most {parity.limit:.0e}"
                )
    return checks, problems, skipped


def _text_encoder(engine: Engine, bundle: Bundle, reference: Mapping[str, NDArray[Any]]) -> list[Parity]:
    layer, signature = bundle.manifest.clip_skip[0], signatures(dimensions(bundle.manifest))[TEXT_ENCODER]
    outputs = text_outputs(signature, layer)
    found = engine.encode_text(np.stack([reference[f"in.{name}"] for name in signature.inputs]), layer)
    return compare(
        {name: reference[f"out.{name}"] for name in outputs}, dict(zip(outputs, found, strict=False)), _compute(engine)
    )


def _decoder(engine: Engine, bundle: Bundle, reference: Mapping[str, NDArray[Any]]) -> list[Parity]:
    pixels, _ = engine.decode(reference["in.latents"], float(reference["in.rounding"][0]))
    return compare({"pixels": reference["out.pixels"]}, {"pixels": pixels}, _compute(engine))


def _step(engine: Engine, bundle: Bundle, reference: Mapping[str, NDArray[Any]]) -> list[Parity]:
    """Compare the network's part of the denoised estimate, q · out. It comes from a job that gives the network the same
    input as the reference.

    A job starts from only two registers, while the reference uses all. But the step is linear around the network. So
    register 0 holds the network's input Σ a_j r_j, with a = (1, 0, 0, 0), and the other terms are subtracted from the
    reference's estimate.
    """
    exact = {name[3:]: array[0].astype(np.float64) for name, array in reference.items() if name.startswith("in.")}
    registers, mask, init = exact["registers"], exact["mask"], exact["init"]
    blend = exact["inpaint"][0] * mask
    estimate = (reference["out.denoised"][0].astype(np.float64) - blend * init) / (1 - blend)
    expected = estimate - np.tensordot(exact["u"], registers, 1)
    start = np.tensordot(exact["a"], registers, 1).astype(np.float32)
    given = {name[3:]: array for name, array in reference.items() if name.startswith("in.")}
    signature = signatures(dimensions(bundle.manifest))[STEP]
    apart = ("v", "u", "M", "inpaint", "noise", "mask", "init_noise")  # what is not of the network
    tables = {
        name: np.zeros_like(given[name]) if name in apart else given[name]
        for name in signature.tables
        if name != "next"
    }
    tables["a"] = np.eye(1, REGISTERS, dtype=np.float32)
    tables["M"][0, 0, REGISTERS] = 1  # the register keeps the estimate
    of_picture = {
        name: np.zeros_like(given[name][0]) if name in apart else given[name][0] for name in signature.of_picture
    }
    said = {name: of_picture.pop(name) for name in OF_TEXT if name in of_picture}
    job = Job(tables, of_picture | {"init": start}, (said,), (0,))
    batch = engine.open(job.shape, 1)
    try:
        slot = batch.join(job)
        batch.step()
        latents, compute = batch.latents([slot]), str(batch.describe()["compute"])
    finally:
        batch.close()
    return compare({"latents": expected[None].astype(np.float32)}, {"latents": latents}, compute)


def _compute(engine: Engine) -> str:
    """The precision that decides an engine's tolerance."""
    return str(engine.describe()["compute"])


def sketch(array: NDArray[Any]) -> list[float]:
    """256 sums of values with random signs. The signs are the same for every array of that size.

    This is a count sketch (Charikar, Chen, Farach-Colton, 2002). The distance of two sketches estimates the distance of
    their arrays, so two runs can be compared without keeping their pictures.
    """
    random = np.random.default_rng(array.size)
    bucket, sign = random.integers(0, SKETCH, array.size), random.choice([-1.0, 1.0], array.size)
    return [float(value) for value in np.bincount(bucket, sign * array.astype(np.float64).ravel(), SKETCH)]


def picture_record(
    seed: int, latents: NDArray[np.float32], pixels: NDArray[np.uint8]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The fixed-seed picture as a result keeps it, and the problems found: latents `[N, 4, h, w]`, pixels `[N, H, W,
    3]`.
    """
    if not np.isfinite(latents).all():
        return None, [f"latents of seed {seed} are NaN or infinite"]
    record = {
        "seed": seed,
        "values": int(pixels.size),
        "latents_sketch": sketch(latents),
        "pixels_sketch": sketch(pixels),
    }
    return record, [f"the picture of seed {seed} is one flat colour"] if pixels.min() == pixels.max() else []
