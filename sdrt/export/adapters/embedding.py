"""Reads learned embeddings (textual inversion, Gal et al. 2022): which tensor of the file holds the vectors, for which
text encoder, under which trigger.

Layouts: AUTOMATIC1111's `string_to_param`, also as text within a PNG; diffusers' single tensor under its token;
`emb_params`; `clip_l` alone; SDXL's `clip_l` and `clip_g`; and embeddings inside a LoRA file. Before `read_vectors`
only headers are read. The vectors become rows of the bundle's token table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.errors import AdapterError, UsageError, printable
from sdrt.export.adapters.match import Lora, how_to_give
from sdrt.export.architecture import Architecture, ClipSpec
from sdrt.export.families.recognise import EMBEDDING as KIND
from sdrt.export.families.recognise import describe
from sdrt.export.families.table import EMBEDDINGS, TOKENS, family_named
from sdrt.export.floats import Array, as_float32, is_finite
from sdrt.export.read.tensor_entry import FLOATS, TensorEntry
from sdrt.export.read.tensor_file import TensorFile, open_tensor_file
from sdrt.export.weights import Made

_RETRIEVE = "Get the embedding again, or train it again."


@dataclass(frozen=True)
class EmbeddingOption:
    """An `--embedding` argument. `trigger` is the text in a prompt that uses the embedding."""

    path: Path
    trigger: str


@dataclass(frozen=True)
class Embedding:
    """An opened embedding that fits a model. `entries` has one tensor for each text encoder, in their order, of shape
    `[width]` or `[vectors, width]`; each holds as many vectors as `vectors` says.
    """

    option: EmbeddingOption
    file: TensorFile
    sha256: str
    entries: tuple[TensorEntry, ...]
    vectors: int


def parse_embedding_option(text: str) -> EmbeddingOption:
    """Parse `FILE[:TRIGGER]`. Without a trigger the file's stem is used. A colon inside the path (`C:\\x`, an existing
    `a:b.pt`) belongs to the path.

    Raises:
        UsageError: the trigger is empty or has characters that no prompt can hold.
    """
    path, trigger = text, None
    match = re.fullmatch(r"(.+):([^:/\\]*)", text, re.DOTALL)
    if match and not os.path.exists(text):
        path, trigger = match[1], match[2]
    chosen = Path(path).stem if trigger is None else trigger
    if not chosen.strip() or not chosen.isprintable():
        raise UsageError(
            f"--embedding {printable(text)}: trigger {printable(chosen)!r}: expected words",
            "Write it as --embedding style.pt:my-style.",
        )
    return EmbeddingOption(Path(path), chosen)


def vector_entries(file: TensorFile) -> list[TensorEntry]:
    """The tensors that hold vectors in an embedding file of any layout. Empty for another kind of file."""
    if describe({name: entry.shape for name, entry in file.entries.items()}) != KIND:
        return []
    entries = list(file.entries.values())
    return [entry for entry in entries if entry.name.startswith("string_to_param.")] or entries


def open_embedding(option: EmbeddingOption, arch: Architecture) -> Embedding:
    """Open an embedding and check that it fits a model's text encoders.

    Raises:
        AdapterError: the file is no embedding, holds several or too many vectors, lacks those for a text encoder, or
            has the width of another model; the message names that model's family.
        InputFileError: the file is malformed.
    """
    file = open_tensor_file(option.path)
    try:
        return _fitting(option, file, file.sha256(), _named_entries(file, arch), arch)
    except BaseException:
        file.close()
        raise


def bundled_embeddings(loras: Sequence[Lora], arch: Architecture) -> list[Embedding]:
    """The embeddings inside LoRA files, under their own triggers. A LoRA that is given several times counts once. They
    share the LoRA's open file.

    Raises:
        AdapterError: as `open_embedding`.
    """
    found: dict[tuple[str, str], Embedding] = {}
    for lora in loras:
        for trigger, keys in lora.bundled.items():
            if (lora.sha256, trigger) not in found:
                entries = {name: lora.file.entries[key] for name, key in keys.items()}
                option = EmbeddingOption(lora.option.path, trigger)
                found[lora.sha256, trigger] = _fitting(option, lora.file, lora.sha256, entries, arch)
    return list(found.values())


def _fitting(
    option: EmbeddingOption, file: TensorFile, sha256: str, found: Mapping[str, TensorEntry], arch: Architecture
) -> Embedding:
    """An embedding of the tensors `found`, by the names that tell their text encoders. Raises if it does not fit."""
    family = family_named(arch.family)
    needed, shown = [component.vectors for component in family.text_encoders], ", ".join(map(printable, sorted(found)))
    title = next((EMBEDDINGS[name] for name in found if name in EMBEDDINGS), family.title)
    if title != family.title:
        raise AdapterError(
            f"{file.path}: {shown}: an embedding made for {title}",
            "Use an embedding made for this checkpoint's family.",
        )
    if len(needed) == 1 and len(found) == 1:
        found = dict.fromkeys(needed, *found.values())
    if len(found) > len(needed):
        raise AdapterError(
            f"{file.path}: holds {len(found)} embeddings ({shown}), expected one", "Save each in a file of its own."
        )
    if missing := [name for name in needed if name not in found]:
        widths = [entry.shape[-1] for name, entry in found.items() if name not in needed and entry.shape]
        origin = next((f": it was made for {TOKENS[width]}" for width in widths if width in TOKENS), "")
        raise AdapterError(
            f"{file.path}: {missing[0]} is missing: expected vectors for each text encoder, {' and '.join(needed)},"
            f" found {shown} alone{origin}",
            "Use an embedding made for this checkpoint's family.",
        )
    entries = tuple(found[name] for name in needed)
    counts = [_vectors(file, entry, clip) for entry, clip in zip(entries, arch.texts, strict=True)]
    if len(set(counts)) > 1:
        raise AdapterError(
            f"{file.path}: {' and '.join(needed)} hold {' and '.join(map(str, counts))} vectors, expected as many for"
            " each text encoder",
            _RETRIEVE,
        )
    return Embedding(option, file, sha256, entries, counts[0])


def _vectors(file: TensorFile, entry: TensorEntry, clip: ClipSpec) -> int:
    """How many vectors a tensor holds. Raises if it fits no text encoder."""
    where = f"{file.path}: {printable(entry.name)}"
    if entry.dtype not in FLOATS:
        raise AdapterError(f"{where}: expected one of {', '.join(FLOATS)}, found {entry.dtype}", _RETRIEVE)
    if len(entry.shape) not in (1, 2):
        raise AdapterError(f"{where}: expected vectors of shape [count, width], found {list(entry.shape)}", _RETRIEVE)
    width, vectors = entry.shape[-1], 1 if len(entry.shape) == 1 else entry.shape[0]
    if width != clip.width:
        made_for = f": it was made for {TOKENS[width]}" if width in TOKENS else ""
        needed = f", as {TOKENS[clip.width]} has" if clip.width in TOKENS else ""
        raise AdapterError(
            f"{where}: expected vectors {clip.width} wide{needed}, found {width}{made_for}",
            "Use an embedding made for this checkpoint's family.",
        )
    limit = clip.tokens - 2
    if not 1 <= vectors <= limit:
        raise AdapterError(
            f"{where}: {vectors} vectors, expected 1 to {limit}, what a chunk of a prompt holds", _RETRIEVE
        )
    return vectors


def _named_entries(file: TensorFile, arch: Architecture) -> dict[str, TensorEntry]:
    """The tensors with vectors in an embedding file, by name."""
    found = {entry.name: entry for entry in vector_entries(file)}
    if not found:
        kind = describe({name: entry.shape for name, entry in file.entries.items()})
        raise AdapterError(
            f"{file.path}: expected {KIND}, found {kind}",
            how_to_give(kind) or "--embedding takes a textual-inversion embedding.",
        )
    if output := sorted(name for name in found if name.endswith("_out")):
        raise AdapterError(
            f"{file.path}: {printable(output[0])}: vectors for a text encoder's output, which sdrt does not replace",
            "Train or save the embedding without output vectors (OneTrainer: output embedding off).",
        )
    return found


def read_vectors(embedding: Embedding, encoder: int = 0) -> Array:
    """The vectors for one of the text encoders, float32 `[vectors, width]`.

    Raises:
        AdapterError: a value is NaN or infinite.
    """
    name = embedding.entries[encoder].name
    values = as_float32(embedding.file.read(name)).reshape(embedding.vectors, -1)
    if not is_finite(values):
        bad = int((~np.isfinite(values)).sum())
        raise AdapterError(
            f"{embedding.file.path}: {printable(name)}: {bad} of {values.size} values are NaN or infinite",
            _RETRIEVE,
        )
    return values


def extended_tables(embeddings: Sequence[Embedding], arch: Architecture) -> tuple[Architecture, dict[str, Made]]:
    """The model with every embedding's vectors after its token tables, in order, and these tables by name.

    Raises:
        AdapterError: a value is NaN or infinite, or the text encoders' tables differ in length.
    """
    tables, texts, path = dict[str, Made](), list[ClipSpec](), embeddings[-1].file.path
    if len(lengths := {clip.vocabulary for clip in arch.texts}) > 1:
        raise AdapterError(
            f"{path}: the text encoders know {' and '.join(map(str, sorted(lengths)))} tokens: one row cannot hold an"
            " embedding in both",
            "Leave the embedding out.",
        )
    for i, (component, clip) in enumerate(zip(family_named(arch.family).text_encoders, arch.texts, strict=True)):
        rows = [read_vectors(embedding, i) for embedding in embeddings]
        count = clip.vocabulary + sum(map(len, rows))
        name = component.token_table
        tables[name] = Made((count, clip.width), path, partial(_extended, name, rows))
        texts.append(replace(clip, vocabulary=count))
    return replace(arch, texts=tuple(texts)), tables


def _extended(table: str, rows: Sequence[Array], fused: Callable[[str], Array]) -> Array:
    return np.concatenate([fused(table), *rows])


def table_rows(embeddings: Sequence[Embedding], vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The rows of the token table for each trigger. They follow the `vocabulary` rows of the model, in order."""
    rows, first = {}, vocabulary
    for embedding in embeddings:
        rows[embedding.option.trigger] = tuple(range(first, first + embedding.vectors))
        first += embedding.vectors
    return rows


def check_triggers(embeddings: Sequence[Embedding], encode: Callable[[str], Sequence[int]]) -> list[str]:
    """Check that the tokenizer can tell each trigger from the others. Returns remarks for the user.

    Raises:
        UsageError: two triggers have the same token ids (letter case and Unicode form do not tell them apart), or a
            trigger has none.
    """
    known: dict[tuple[int, ...], Embedding] = {}
    notes = []
    for embedding in embeddings:
        trigger, path = embedding.option.trigger, embedding.file.path
        ids = tuple(encode(trigger))
        if not ids:
            raise UsageError(
                f"--embedding {path}: trigger {trigger!r}: the tokenizer sees nothing in it",
                "Choose a word: --embedding FILE:TRIGGER.",
            )
        if (other := known.setdefault(ids, embedding)) is not embedding:
            raise UsageError(
                f"{path}: trigger {trigger!r} is that of {other.file.path} too ({other.option.trigger!r}): one trigger"
                " cannot stand for two embeddings",
                "Give one of them another trigger: --embedding FILE:TRIGGER. One that a LoRA brings along keeps its"
                " own.",
            )
        if len(ids) == 1:
            notes.append(
                f"{path.name}: the trigger {trigger!r} is a word of the vocabulary: every prompt with that word uses"
                " the embedding"
            )
    return notes


def count_and_width(shapes: Iterable[tuple[int, ...]]) -> list[int]:
    """How many vectors tensors of these shapes hold for one prompt, one tensor a text encoder, and how wide they are
    together.
    """
    stacked = [(1, *shape)[-2:] for shape in shapes if shape]
    return [max((count for count, _ in stacked), default=0), sum(width for _, width in stacked)]


def summary(file: TensorFile) -> dict[str, Any]:
    """The part of `inspect` about an embedding: its trigger, vectors, width and family."""
    found = vector_entries(file)
    widths = sorted({entry.shape[-1] for entry in found if entry.shape})
    others = [EMBEDDINGS[entry.name] for entry in found if entry.name in EMBEDDINGS]
    families = others or [TOKENS[width] for width in widths if width in TOKENS]
    return {
        "use": "--embedding FILE[:TRIGGER]",
        "trigger": file.path.stem,
        "vectors": count_and_width(entry.shape for entry in found)[0],
        "width": widths[0] if len(widths) == 1 else widths,
        "base_family": ", ".join(families) or "unknown",
    }
