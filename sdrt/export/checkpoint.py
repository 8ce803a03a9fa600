"""A checkpoint file as tensors by canonical name: LDM names for UNet and VAE, Hugging Face CLIP names for the text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdrt.errors import CheckpointError, nearest, printable
from sdrt.export.architecture import CLIP, VAE, Architecture, architecture
from sdrt.export.tensor_entry import FLOATS, TensorEntry
from sdrt.export.tensor_file import TensorFile, open_tensor_file

if TYPE_CHECKING:
    import torch

_IGNORED = (
    "alphas_cumprod", "betas", "log_one_minus_alphas_cumprod", "sqrt_", "posterior_", "lvlb_weights", "logvar", "scale_factor",
    "model_ema.", CLIP + "text_model.embeddings.position_ids", "cond_stage_model.logit_scale", CLIP + "text_projection", VAE + "loss.",
)  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """Where a tensor of the model lies: its entry within its file."""

    file: TensorFile
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self) -> torch.Tensor:
        """The stored values, in the stored type; 8-bit floats as float32, since hardly any operator takes them. Raises as `TensorFile.read` does."""
        stored = self.file.read(self.entry.name)
        return stored.float() if self.entry.dtype.startswith("F8") else stored


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor by canonical name, and the architecture they make. No data has been read."""

    file: TensorFile
    vae_file: TensorFile | None
    tensors: Mapping[str, Tensor]
    architecture: Architecture

    def close(self) -> None:
        self.file.close()
        if self.vae_file is not None:
            self.vae_file.close()


def open_checkpoint(path: Path, vae: Path | None = None) -> Checkpoint:
    """Read the header of a single-file checkpoint, and of the file whose VAE replaces its own.

    Raises:
        CheckpointError: the file is of another kind or family, or a component is missing.
        InputFileError: the file is malformed.
    """
    file = open_tensor_file(path)
    vae_file = None
    try:
        tensors = _by_canonical_name(file, {name: canonical_name(name) for name in file.entries})
        if vae is not None:
            vae_file = open_tensor_file(vae)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(VAE)} | _vae_tensors(vae_file)
        shapes = {name: tensor.entry.shape for name, tensor in tensors.items()}
        return Checkpoint(file, vae_file, tensors, architecture(path, shapes, file.metadata))
    except BaseException:
        file.close()
        if vae_file is not None:
            vae_file.close()
        raise


def canonical_name(name: str) -> str:
    """The canonical name of a checkpoint tensor. Files of 2022 lack `text_model.` in the text encoder's names."""
    for part in ("embeddings.", "encoder.", "final_layer_norm."):
        if name.startswith(CLIP + part):
            return CLIP + "text_model." + name[len(CLIP) :]
    return name


def select(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], list[str]]:
    """The checkpoint's tensors for the expected names and shapes, and the names of those left over that nobody knows.

    Raises:
        CheckpointError: one is missing, has another shape, or is not floating-point.
    """
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        left_over = checkpoint.tensors.keys() - expected.keys()
        path = checkpoint.vae_file.path if checkpoint.vae_file is not None and missing[0].startswith(VAE) else checkpoint.file.path
        raise CheckpointError(
            f"{path}: {missing[0]}: missing{more}{nearest(missing[0], left_over)}",
            "The file is incomplete; download it again, or supply the VAE with --vae FILE.",
        )
    for name, shape in expected.items():
        path, entry = checkpoint.tensors[name].file.path, checkpoint.tensors[name].entry
        if entry.shape != shape:
            raise CheckpointError(f"{path}: {name}: expected shape {list(shape)}, found {list(entry.shape)}")
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {name}: expected one of {', '.join(FLOATS)}, found {entry.dtype}")
    unknown = [name for name in checkpoint.tensors if name not in expected and not name.startswith(_IGNORED)]
    return {name: checkpoint.tensors[name] for name in expected}, unknown


def _by_canonical_name(file: TensorFile, names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, canonical in names.items():
        if canonical in tensors:
            raise CheckpointError(f"{file.path}: {printable(name)}: stands for {printable(canonical)}, as {printable(tensors[canonical].entry.name)} does")
        tensors[canonical] = Tensor(file, file.entries[name])
    return tensors


def _vae_tensors(file: TensorFile) -> dict[str, Tensor]:
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    names = {name: name if name.startswith(VAE) else VAE + name for name in file.entries if name.startswith((VAE, *parts))}
    tensors = _by_canonical_name(file, names)
    if VAE + "decoder.conv_in.weight" not in tensors:
        raise CheckpointError(f"{file.path}: expected a VAE with {VAE}* or decoder.* tensors in LDM naming, found none", "Give a VAE in LDM naming.")
    return tensors
