"""Turn a prompt's segments into the rows that the text encoder takes.

A row is a chunk of 75 tokens between a start and an end token. Chunks are cut where AUTOMATIC1111 cuts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdrt.bundle.manifest import MAX_CHUNKS, Text
from sdrt.errors import UsageError
from sdrt.runtime.prompts.syntax import BREAK, Segment
from sdrt.runtime.prompts.tokenizer import Tokenizer

COMMA_BACKTRACK = 20
"""A full chunk ends at its last comma instead, if at most this many tokens follow that comma."""


@dataclass(frozen=True)
class Chunk:
    """77 token ids, with start, end and padding, and the emphasis of each token."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def empty_chunk(text: Text) -> Chunk:
    """The only chunk of an empty prompt. It also fills shorter prompts up."""
    return _framed([], [], text)


def chunk_segments(tokenizer: Tokenizer, segments: Iterable[Segment], name: str = "prompt") -> list[Chunk]:
    """Cut a prompt into chunks, 1 to `MAX_CHUNKS`. Each segment is tokenised alone. Error messages begin with `name`.

    A learned embedding takes as many places as it has vectors. All of them get the emphasis of its segment, and they
    never spread over two chunks.

    Raises:
        UsageError: the prompt is not valid Unicode, or too long.
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
                f"{name}: more than {MAX_CHUNKS} chunks of {capacity} tokens",
                "Shorten it, or leave out BREAKs: each ends a chunk, however short.",
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
    """Add start, end and padding. Where the padding token is not the end token (OpenCLIP), padding starts after the
    first end token, as OpenCLIP does it.
    """
    row = [text.bos, *tokens]
    row += [text.eos] * (text.tokens - len(row))
    if text.pad != text.eos:
        first = row.index(text.eos) + 1
        row[first:] = [text.pad] * (len(row) - first)
    return Chunk(tuple(row), (1.0, *weights, *[1.0] * (text.tokens - 1 - len(weights))))
