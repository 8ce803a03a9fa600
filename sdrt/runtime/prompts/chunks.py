"""Turn a prompt's segments into the rows that the text encoders take.

A row is a chunk of 75 tokens between a start and an end token. Chunks are cut where AUTOMATIC1111 cuts them. All
encoders of a model get the same chunks, each with its own padding and its own rows for learned embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdrt.bundle.manifest import MAX_CHUNKS, Text
from sdrt.errors import UsageError
from sdrt.runtime.prompts.syntax import BREAK, Segment
from sdrt.runtime.prompts.tokenizer import Place, Tokenizer

COMMA_BACKTRACK = 20
"""A full chunk ends at its last comma instead, if at most this many tokens follow that comma."""


@dataclass(frozen=True)
class Chunk:
    """77 token ids for each encoder, with start, end and padding, and the emphasis of each token."""

    tokens: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]


def empty_chunk(texts: Sequence[Text]) -> Chunk:
    """The only chunk of an empty prompt. It also fills shorter prompts up."""
    return _framed([], [], texts)


def chunk_segments(tokenizer: Tokenizer, segments: Iterable[Segment], name: str = "prompt") -> list[Chunk]:
    """Cut a prompt into chunks, 1 to `MAX_CHUNKS`. Each segment is tokenised alone. Error messages begin with `name`.

    A learned embedding takes as many places as it has vectors. All of them get the emphasis of its segment, and they
    never spread over two chunks.

    Raises:
        UsageError: the prompt is not valid Unicode, or too long.
    """
    capacity = tokenizer.text.tokens - 2
    chunks: list[Chunk] = []
    tokens: list[Place] = []
    weights: list[float] = []
    comma: int | None = None  # where the last comma of the open chunk is

    def close() -> None:
        nonlocal tokens, weights, comma
        if len(chunks) == MAX_CHUNKS:
            raise UsageError(
                f"{name}: more than {MAX_CHUNKS} chunks of {capacity} tokens",
                "Shorten it, or leave out BREAKs: each ends a chunk, however short.",
            )
        chunks.append(_framed(tokens, weights, tokenizer.texts))
        tokens, weights, comma = [], [], None

    for segment in segments:
        if segment == BREAK:
            close()
            continue
        ids = tokenizer.tokens(segment.text)
        position = 0
        while position < len(ids):
            found = tokenizer.embedding_at(ids, position)
            places, length = found if found is not None else (((ids[position],) * len(tokenizer.texts),), 1)
            if found is None and ids[position] == tokenizer.comma:
                comma = len(tokens)
            elif len(tokens) == capacity and comma is not None and capacity - comma <= COMMA_BACKTRACK:
                cut = comma + 1
                moved = tokens[cut:], weights[cut:]
                del tokens[cut:], weights[cut:]
                close()
                tokens, weights = moved
            if len(tokens) == capacity or len(tokens) + len(places) > capacity:
                close()
            tokens += places
            weights += [segment.weight] * len(places)
            position += length
    if tokens or not chunks:
        close()
    return chunks


def _framed(places: list[Place], weights: list[float], texts: Sequence[Text]) -> Chunk:
    """Add start, end and padding. Where the padding token is not the end token (OpenCLIP), padding starts after the
    first end token, as OpenCLIP does it.
    """
    rows = []
    for i, text in enumerate(texts):
        row = [text.bos, *(place[i] for place in places)]
        row += [text.eos] * (text.tokens - len(row))
        if text.pad != text.eos:
            first = row.index(text.eos) + 1
            row[first:] = [text.pad] * (len(row) - first)
        rows.append(tuple(row))
    return Chunk(tuple(rows), (1.0, *weights, *[1.0] * (texts[0].tokens - 1 - len(weights))))
