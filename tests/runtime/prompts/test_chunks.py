"""Where a prompt is cut into chunks: the comma rule token by token, and what must hold for any prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrt.bundle.folder import open_bundle
from sdrt.runtime.prompts.chunks import Chunk, chunk_segments, empty_chunk
from sdrt.runtime.prompts.syntax import BREAK, Segment, parse_attention
from sdrt.runtime.prompts.tokenizer import Tokenizer

BOS, EOS = 49406, 49407
CAT, COMMA = 2368, 267
TEN = tuple(range(50000, 50010))
MANY = tuple(range(60000, 60075))


@pytest.fixture(scope="module")
def tokenizer(flat_bundle: Path) -> Tokenizer:
    bundle = open_bundle(flat_bundle)
    text = replace(
        bundle.manifest.text[0], embeddings={"ten": TEN, "ten cat": (50100,), "many": MANY, ", odd": (50200, 50201)}
    )
    return Tokenizer(bundle.file("tokenizer/tokenizer.json"), [text])


def content(chunk: Chunk) -> list[int]:
    """A chunk's tokens without start and padding, after checking the frame."""
    (row,) = chunk.tokens
    assert len(row) == len(chunk.weights) == 77
    assert row[0] == BOS and row[-1] == EOS and chunk.weights[0] == chunk.weights[-1] == 1.0
    tokens = list(row[1:])
    while tokens and tokens[-1] == EOS:
        tokens.pop()
    assert set(chunk.weights[len(tokens) + 1 :]) <= {1.0}
    return tokens


def cut(tokenizer: Tokenizer, prompt: str) -> list[list[int]]:
    return [content(chunk) for chunk in chunk_segments(tokenizer, parse_attention(prompt))]


def lengths(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return [len(chunk) for chunk in cut(tokenizer, prompt)]


def test_short_prompts(tokenizer: Tokenizer) -> None:
    assert cut(tokenizer, "") == [[]] and cut(tokenizer, "cat") == [[CAT]]
    assert empty_chunk(tokenizer.texts) == chunk_segments(tokenizer, [])[0]
    assert lengths(tokenizer, "cat " * 75) == [75]
    assert lengths(tokenizer, "cat " * 76) == [75, 1]
    assert lengths(tokenizer, "cat " * 150) == [75, 75]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (54, 21, [75, 1]),  # the comma is token 55 of 75, counted from 1: 21 back, too far
        (55, 20, [56, 20]),  # 20 back: what follows it moves
        (70, 10, [71, 10]),
        (74, 5, [75, 5]),  # the chunk ends with the comma anyway
        (75, 3, [75, 4]),  # a comma itself never moves back, it starts the next chunk ...
        (55, 19, [75]),
    ],
)
def test_comma_rule(tokenizer: Tokenizer, before: int, after: int, expected: list[int]) -> None:
    assert lengths(tokenizer, "cat " * before + ", " + "cat " * after) == expected


def test_only_commas_of_the_open_chunk_count(tokenizer: Tokenizer) -> None:
    # ... and is no place to break at: the second chunk is filled up with cats
    assert lengths(tokenizer, "cat " * 75 + ", " + "cat " * 80) == [75, 75, 6]
    assert lengths(tokenizer, "cat " * 60 + ", " + "cat " * 14 + "BREAK " + "cat " * 76) == [75, 75, 1]
    assert lengths(tokenizer, "cat " * 60 + ", " + "cat " * 90) == [61, 75, 15]
    assert lengths(tokenizer, "cat " * 60 + ",, " + "cat " * 20) == [75, 6]  # two commas are one other token


def test_moved_tokens_keep_their_emphasis(tokenizer: Tokenizer) -> None:
    first, second = chunk_segments(tokenizer, parse_attention("cat " * 60 + ", cat (cat:1.5) " + "cat " * 20))
    assert set(first.weights) == {1.0}
    assert second.weights[:4] == (1.0, 1.0, 1.5, 1.0) and second.weights.count(1.5) == 1


def test_break(tokenizer: Tokenizer) -> None:
    assert cut(tokenizer, "cat BREAK cat") == [[CAT], [CAT]]
    assert cut(tokenizer, "BREAK BREAK cat BREAK") == [[], [], [CAT]]
    assert lengths(tokenizer, "cat " * 75 + "BREAK cat") == [75, 1]


def test_embeddings(tokenizer: Tokenizer) -> None:
    assert cut(tokenizer, "cat ten, Ten dog ten cat")[0] == [CAT, *TEN, COMMA, *TEN, *tokenizer.tokens("dog"), 50100]
    assert cut(tokenizer, "cat often tend") == [[CAT, *tokenizer.tokens("often tend")]]
    assert cut(tokenizer, "(te)n") == [
        [*tokenizer.tokens("te"), *tokenizer.tokens("n")]
    ]  # segments are matched each alone
    assert cut(tokenizer, "many many") == [list(MANY), list(MANY)]
    assert cut(tokenizer, "cat many cat") == [[CAT], list(MANY), [CAT]]


def test_embeddings_are_never_split(tokenizer: Tokenizer) -> None:
    assert lengths(tokenizer, "cat " * 65 + "ten") == [75]
    assert lengths(tokenizer, "cat " * 66 + "ten") == [66, 10]
    dog = tokenizer.tokens("dog")
    assert cut(tokenizer, "cat " * 55 + ", ten " + "dog " * 10) == [[*[CAT] * 55, COMMA], [*TEN, *dog * 10]]
    # a comma within a trigger is not a place to break at
    assert cut(tokenizer, "cat " * 60 + ", odd " + "cat " * 13 + "cat ")[0][60:62] == [50200, 50201]
    first, second = chunk_segments(tokenizer, parse_attention("cat " * 60 + ", (ten:1.5) " + "cat " * 9))
    assert (
        len(content(first)) == 61 and content(second)[:10] == list(TEN) and second.weights[1:12] == (*[1.5] * 10, 1.0)
    )


def test_each_encoder_has_its_own_padding_and_embeddings(flat_bundle: Path) -> None:
    """Zeros after the first end token for OpenCLIP; the same places for the words of both."""
    bundle = open_bundle(flat_bundle)
    clip = replace(bundle.manifest.text[0], embeddings={"ten": (50000, 50001)})
    openclip = replace(clip, pad=0, embeddings={"ten": (60003, 60004)})
    both = Tokenizer(bundle.file("tokenizer/tokenizer.json"), [clip, openclip])
    (chunk,) = chunk_segments(both, [Segment("cat ten", 1.5)])
    assert chunk.tokens == (
        (BOS, CAT, 50000, 50001, *[EOS] * 73),
        (BOS, CAT, 60003, 60004, EOS, *[0] * 72),
    )
    assert chunk.weights == (1.0, *[1.5] * 3, *[1.0] * 73)
    assert empty_chunk(both.texts).tokens == ((BOS, *[EOS] * 76), (BOS, EOS, *[0] * 75))


PIECES = st.sampled_from(
    [
        "cat ",
        "cat cat cat cat cat ",
        ", ",
        "ten ",
        "ten cat ",
        "(cat:1.2) ",
        "BREAK ",
        "many ",
        "[ten] ",
        ", odd ",
        "cat " * 40,
    ]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prompt=st.lists(PIECES, max_size=40).map("".join))
def test_any_prompt(tokenizer: Tokenizer, prompt: str) -> None:
    """Nothing is lost or moved, embeddings stay whole, weights stay with their tokens, and a chunk ends early for a
    reason only.
    """
    segments = parse_attention(prompt)
    expected: list[tuple[tuple[int, ...], float] | Segment] = []  # units that may not be split
    for segment in segments:
        ids = tokenizer.tokens(segment.text)
        while segment != BREAK and ids:
            places, length = tokenizer.embedding_at(ids, 0) or (((ids[0],),), 1)
            expected.append((tuple(row for (row,) in places), segment.weight))
            ids = ids[length:]
        if segment == BREAK:
            expected.append(BREAK)
    units = iter(expected)
    chunks = chunk_segments(tokenizer, segments)
    for number, chunk in enumerate(chunks):
        tokens, position = content(chunk), 0
        assert len(tokens) <= 75
        while position < len(tokens):
            unit = next(units)
            assert not isinstance(unit, Segment)
            rows, weight = unit
            assert tuple(tokens[position : position + len(rows)]) == rows
            assert set(chunk.weights[position + 1 : position + 1 + len(rows)]) == {weight}
            position += len(rows)
        if number + 1 < len(chunks) and len(tokens) < 75:
            waiting = next(units)
            if waiting != BREAK:
                assert not isinstance(waiting, Segment)
                assert len(tokens) + len(waiting[0]) > 75 or (tokens[-1] == COMMA and len(tokens) >= 75 - 20 + 1)
                units = iter([waiting, *units])
        elif number + 1 < len(chunks):
            waiting = next(units, BREAK)
            units = iter([*([] if waiting == BREAK else [waiting]), *units])
    assert set(units) <= {BREAK}
