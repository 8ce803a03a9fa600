"""Whether a file fits a checkpoint: `sdrt inspect FILE --for CHECKPOINT`. The checks are those of a build. The only
values read are the alphas of a LoRA.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sdrt.errors import SdrtError, UsageError
from sdrt.export.adapters import embedding as embeddings
from sdrt.export.adapters import hypernetwork as hypernetworks
from sdrt.export.adapters.match import LoraOption, open_lora
from sdrt.export.families.recognise import EMBEDDING, HYPERNETWORK, OPTION_OF_KIND, VAE
from sdrt.export.families.table import component_name
from sdrt.export.graph import recipes
from sdrt.export.read.checkpoint import open_checkpoint, select
from sdrt.export.skeletons import weights_of


def fit(path: Path, kind: str, checkpoint_path: Path) -> dict[str, Any]:
    """Whether the file at `path` can be built into a checkpoint. `kind` is what `inspect_file` calls the file. Returns
    `fits`, and what the file touches or why it does not fit.

    Raises:
        UsageError: no checkpoint takes files of that kind.
        CheckpointError, InputFileError: the checkpoint cannot be built.
    """
    if kind not in OPTION_OF_KIND:
        raise UsageError(
            f"--for {checkpoint_path}: {path} is {kind}, which goes into no checkpoint",
            f"--for takes {', '.join(OPTION_OF_KIND)}.",
        )
    open_checkpoint(checkpoint_path).close()
    report: dict[str, Any] = {"for": str(checkpoint_path), "fits": True}
    try:
        return report | _touched(path, kind, checkpoint_path)
    except SdrtError as error:
        return report | {"fits": False, "why": error.message, "fix": error.fix}


def _touched(path: Path, kind: str, checkpoint_path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(checkpoint_path, path if kind == VAE else None)
    try:
        arch = checkpoint.architecture
        texts = tuple(replace(text, clip_skip=(arch.last_layer,)) for text in arch.texts)  # those of a plain build
        arch = replace(arch, texts=texts)
        if kind == EMBEDDING:
            embedding = embeddings.open_embedding(embeddings.EmbeddingOption(path, path.stem), arch)
            embedding.file.close()
            return {"touches": {"text_encoder": embedding.vectors}}
        if kind == HYPERNETWORK:
            hypernetwork = hypernetworks.open_hypernetwork(hypernetworks.HypernetworkOption(path), arch.unet)
            hypernetwork.file.close()
            return {"touches": {"unet": hypernetwork.layers}}
        shapes = {graph: weights_of(recipe) for graph, recipe in recipes(arch).items()}
        if kind == VAE:
            expected = {
                name: shape for graph in ("vae_decoder", "vae_encoder") for name, shape in shapes[graph].items()
            }
            return {"touches": {"vae": len(select(checkpoint, expected)[0])}}
        lora = open_lora(
            LoraOption(path), {name: shape for graph in shapes.values() for name, shape in graph.items()}, arch
        )
        lora.file.close()
        components = [component_name(weight) for weight in lora.deltas]
        touched = {component: components.count(component) for component in sorted(set(components))}
        bundled = {
            embedding.option.trigger: embedding.vectors for embedding in embeddings.bundled_embeddings([lora], arch)
        }
        return {"touches": touched} | ({"embeddings": bundled} if bundled else {})
    finally:
        checkpoint.close()
