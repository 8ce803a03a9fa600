"""A prompt's segments as the rows the text encoder takes: chunks of 75 tokens between start and end, cut as AUTOMATIC1111 cuts them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdrt.bundle.manifest import MAX_CHUNKS, Text
from sdrt.errors import UsageError
from sdrt.runtime.prompt import BREAK, Segment
from sdrt.runtime.tokenizer import Tokenizer

COMMA_BACKTRACK = 20
"""A full chunk ends at its last comma instead, if that is at most this many tokens back."""


@dataclass(frozen=True)
class Chunk:
    """77 token ids, start, end and padding included, and the emphasis of each."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def empty_chunk(text: Text) -> Chunk:
    """The one chunk of an empty prompt; it also fills shorter prompts up."""
    return _framed([], [], text)


def chunk_segments(tokenizer: Tokenizer, segments: Iterable[Segment], name: str = "prompt") -> list[Chunk]:
    """Cut a prompt into chunks, 1 to `MAX_CHUNKS`. Each segment is tokenised alone. `name` begins what is raised.

    A learned embedding takes as many places as it has vectors, all with its segment's emphasis, and lies in one chunk.

    Raises:
        UsageError: not valid Unicode, or too long.
    """
    capacity = tokenizer.text.tokens - 2
    chunks: list[Chunk] = []
    tokens: list[int] = []
    weights: list[float] = []
    comma: int | None = None  # where the last comma of the open chunk is

    def close() -> None:
        nonlocal tokens, weights, comma
        if len(chunks) == MAX_CHUNKS:
            raise UsageError(
                f"{name}: more than {MAX_CHUNKS} chunks of {capacity} tokens", "Shorten it, or leave out BREAKs: each ends a chunk, however short."
            )
        chunks.append(_framed(tokens, weights, tokenizer.text))
        tokens, weights, comma = [], [], None

    for segment in segments:
        if segment == BREAK:
            close()
            continue
        ids = tokenizer.tokens(segment.text)
        position = 0
        while position < len(ids):
            found = tokenizer.embedding_at(ids, position)
            rows, length = found if found is not None else (ids[position : position + 1], 1)
            if found is None and ids[position] == tokenizer.comma:
                comma = len(tokens)
            elif len(tokens) == capacity and comma is not None and capacity - comma <= COMMA_BACKTRACK:
                cut = comma + 1
                moved = tokens[cut:], weights[cut:]
                del tokens[cut:], weights[cut:]
                close()
                tokens, weights = moved
            if len(tokens) == capacity or len(tokens) + len(rows) > capacity:
                close()
            tokens += rows
            weights += [segment.weight] * len(rows)
            position += length
    if tokens or not chunks:
        close()
    return chunks


def _framed(tokens: list[int], weights: list[float], text: Text) -> Chunk:
    """With start, end and padding. Where padding is not the end token (OpenCLIP), it starts after the first end token, as there."""
    row = [text.bos, *tokens]
    row += [text.eos] * (text.tokens - len(row))
    if text.pad != text.eos:
        first = row.index(text.eos) + 1
        row[first:] = [text.pad] * (len(row) - first)
    return Chunk(tuple(row), (1.0, *weights, *[1.0] * (text.tokens - 1 - len(weights))))
