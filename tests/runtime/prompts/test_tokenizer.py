"""The bundle's tokenizer against transformers' CLIP tokenizer, and against byte-pair encoding written out in plain
Python with other tables of Unicode.
"""

from __future__ import annotations

import json
import random
import unicodedata
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import regex
from conftest import EMOJI
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.manifest import Text
from sdrt.errors import BundleError, CheckpointError, UsageError
from sdrt.export.tokenizer import vocabulary, write_tokenizer
from sdrt.runtime.prompts.chunks import chunk_segments
from sdrt.runtime.prompts.syntax import Segment
from sdrt.runtime.prompts.tokenizer import Tokenizer

BOS, EOS = 49406, 49407

STRINGS = [
    "",
    " ",
    "\t\n",
    "a",
    "A",
    "red apple",
    "  red   apple  ",
    "red\napple\r\n",
    "RED Apple",
    "red,apple",
    "red , apple",
    "a-b_c",
    "...",
    "!!!???",
    "$%&*()",
    "it's",
    "we're they've I'm he'll she'd don't",
    "IT'S",
    "'s",
    "it''s",
    "rock'n'roll",
    "o’clock",
    "1",
    "12345",
    "3.14159",
    "2nd 10x",
    "a1b2",
    "4k hdr 8k",
    "½ ² ③ Ⅷ",
    "٣",
    "naïve café",
    "cafe\u0301",
    "Å",
    "ﬁ",
    "ＡＢＣ",
    "straße ẞ",
    "ΟΔΥΣΣΕΥΣ",
    "İstanbul",
    "ǅ",
    "привет мир",
    "שלום",
    "مرحبا",
    "नमस्ते",
    "ไทย",
    "日本語",
    "日本 語",
    "한국어",
    "中文字符测试",
    "ひらがな カタカナ",
    "😀",
    "😀😀",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "1️⃣",
    "red 🍎 apple",
    "\u200b",
    "a\u00a0b",
    "a\u3000b",
    "\ufeffabc",
    "\x00",
    "\x07bell",
    "a\u0000b",
    "�",
    "<|startoftext|>",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<|STARTOFTEXT|>",
    "<|endoftext",
    "|endoftext|>",
    "a <|startoftext|> b <|endoftext|> c",
    "</w>",
    "a</w>",
    "Ġ",
    "(masterpiece:1.3), [bad], {x}",
    "<lora:x:0.8>",
    "https://example.com/a?b=c#d",
    "a" * 75,
    "supercalifragilisticexpialidocious",
    "antidisestablishmentarianism",
    "xqzjkvw",
    "\\(o_o\\)",
    "C:\\path",
    "#tag @user",
    "“quoted” — dash… ‘single’",
    "e=mc²",
]


@pytest.fixture(scope="module")
def ours(flat_bundle: Path) -> Tokenizer:
    bundle = open_bundle(flat_bundle)
    return Tokenizer(bundle.file("tokenizer/tokenizer.json"), bundle.manifest.text)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reference.clip_tokenizer(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PlainBpe:
    return PlainBpe(reference.vocabulary_files(tmp_path_factory.mktemp("plain")))


class PlainBpe:
    """OpenAI's simple_tokenizer, without its repair of broken Unicode and its special tokens."""

    def __init__(self, folder: Path) -> None:
        self.ids = json.loads((folder / "vocab.json").read_text())
        merges = (folder / "merges.txt").read_text().splitlines()[1:]
        self.ranks = {tuple(merge.split()): i for i, merge in enumerate(merges)}
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.symbols = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    def __call__(self, text: str) -> list[int]:
        text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip().lower()
        return [self.ids[token] for word in self.words.findall(text) for token in self.merge(word)]

    def merge(self, word: str) -> list[str]:
        parts = [self.symbols[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            first = min(pairwise(parts), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if first not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                both = i + 1 < len(parts) and (parts[i], parts[i + 1]) == first
                merged.append("".join(first) if both else parts[i])
                i += 1 + both
            parts = merged
        return parts


def row(tokenizer: Tokenizer, text: str) -> list[int]:
    """The only chunk of a short prompt."""
    (chunk,) = chunk_segments(tokenizer, [Segment(text, 1.0)])
    return list(chunk.tokens[0])


def reference_row(clip: Any, text: str) -> list[int]:
    row: list[int] = clip(text, padding="max_length", max_length=77, truncation=True).input_ids
    return row


@cache
def known_prompts() -> tuple[str, ...]:
    return tuple((EMOJI / "prompts.txt").read_text().split("\n"))


def test_prompts_of_the_example(ours: Tokenizer, clip: Any, plain: PlainBpe) -> None:
    for prompt in (*known_prompts(), *(f"a {prompt}" for prompt in known_prompts())):
        assert row(ours, prompt) == reference_row(clip, prompt)
        assert ours.tokens(prompt) == plain(prompt)


@pytest.mark.parametrize("text", STRINGS, ids=ascii)
def test_strings(ours: Tokenizer, clip: Any, text: str) -> None:
    assert row(ours, text) == reference_row(clip, text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=24))  # those that this Python knows
def test_any_text(ours: Tokenizer, clip: Any, text: str) -> None:
    expected = clip(text, add_special_tokens=False).input_ids
    assert ours.tokens(text) == expected
    if len(expected) <= 75:
        assert row(ours, text) == reference_row(clip, text)


WORDS = st.sampled_from(
    [
        *"aeiou'-,.!?0123456789 ",
        "it's",
        "girl",
        "Café",
        "日本",
        "😀",
        "ый",
        "  ",
        "\n",
        "'ll",
        "<|",
        "masterpiece",
        "XQZ",
    ]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.lists(WORDS, max_size=15).map("".join))
def test_plain_byte_pair_encoding(ours: Tokenizer, plain: PlainBpe, text: str) -> None:
    expected = [BOS, *plain(text)]
    assert row(ours, text) == expected + [EOS] * (77 - len(expected))


@pytest.mark.parametrize("text", ["\ud800", "cat \udfff", "\udc41cat", "\ud83d"])
def test_t10_lone_surrogates(ours: Tokenizer, text: str) -> None:
    with pytest.raises(UsageError, match="Unicode") as caught:
        ours.tokens(text)
    str(caught.value).encode()  # the message itself must be printable


def test_encoding_changes_nothing(ours: Tokenizer) -> None:
    before = ours.tokens("red apple")
    ours.tokens("a much longer prompt, with 7 more things in it")
    assert ours.tokens("red apple") == before


def test_vocabulary() -> None:
    tokens, merges = vocabulary()
    assert len(tokens) == 49408 and sorted(tokens.values()) == list(range(49408))
    assert len(merges) == 48894
    assert (tokens["<|startoftext|>"], tokens["<|endoftext|>"], tokens["!"], tokens["cat</w>"]) == (BOS, EOS, 0, 2368)


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected 49,408 tokens"):
        write_tokenizer(tmp_path / "tokenizer.json", 49410)
    assert not (tmp_path / "tokenizer.json").exists()


def test_manifest_names_the_special_tokens(flat_bundle: Path) -> None:
    assert open_bundle(flat_bundle).manifest.text[0] == Text(64, 77, BOS, EOS, EOS, (1,))


ALPHABETS = (
    [chr(code) for code in range(32, 127)],
    [chr(code) for code in (*range(32), *range(127, 160))],  # control characters
    list("😀🍎👩‍🚀🏳️‍🌈👍🏽1️⃣🇺🇳🫠"),
    [
        chr(code)
        for code in (*range(0x4E00, 0x4F00), *range(0x3040, 0x3100), *range(0xAC00, 0xAC80), *range(0x20000, 0x20020))
    ],
    [
        "a",
        "e",
        "n",
        "A",
        "é",
        "가",
        *(chr(code) for code in (*range(0x300, 0x340), 0x20D7, 0x0591, 0x093C, 0x1100, 0x1161, 0x11A8)),
    ],  # combining
    [
        chr(code)
        for code in (
            *range(0xA0, 0x250),
            *range(0x370, 0x500),
            *range(0x5D0, 0x5EB),
            *range(0x620, 0x650),
            *range(0x900, 0x940),
        )
    ],
    [
        " ",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\u200b",
        "\u200d",
        "\u2028",
        "\ufeff",
        "\t",
        "\n",
        "\r",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
    ],
    [
        "red ",
        "apple, ",
        "'s",
        "'LL",
        "<|endoftext|>",
        "<|startoftext|>",
        "</w>",
        "masterpiece",
        "4k",
        "½",
        "ﬁ",
        "İ",
        "ß",
        "ẞ",
        "Σ",
        "ς",
    ],
    [
        chr(code) for code in (*range(0xE000, 0xE010), *range(0xFFF0, 0x10000), 0x10FFFF, 0x378, 0x1F9FF)
    ],  # private, specials, unassigned
)


def test_ten_thousand_strings(ours: Tokenizer, clip: Any) -> None:
    random_ = random.Random(20261123)
    texts = []
    for i in range(10_000):
        alphabets = [ALPHABETS[i % len(ALPHABETS)], *random_.choices(ALPHABETS, k=random_.randint(0, 2))]
        texts.append("".join(random_.choice(random_.choice(alphabets)) for _ in range(random_.randint(1, 30))))
    expected = clip(texts, add_special_tokens=False).input_ids
    differing = [(text, ids) for text, ids in zip(texts, expected, strict=True) if ours.tokens(text) != ids]
    assert differing == []
    assert sum(map(len, expected)) > 100_000


# Learned embeddings


def with_embeddings(bundle: Path, embeddings: dict[str, tuple[int, ...]]) -> Tokenizer:
    opened = open_bundle(bundle)
    return Tokenizer(opened.file("tokenizer/tokenizer.json"), [replace(opened.manifest.text[0], embeddings=embeddings)])


def test_triggers(flat_bundle: Path) -> None:
    tokenizer = with_embeddings(flat_bundle, {"cat": (7,), "Cat Dog": (8, 9), "日本": (10,), "bad-hand_v4": (11, 12)})

    def found(text: str, position: int = 0) -> Any:
        found = tokenizer.embedding_at(tokenizer.tokens(text), position)
        return None if found is None else (tuple(row for (row,) in found[0]), found[1])

    assert found("cat") == ((7,), 1) and found("CAT dog") == (
        (8, 9),
        2,
    )  # the longest; case is the tokenizer's business
    assert (
        found("cat, dog") == ((7,), 1)
        and found("dog") is None
        and found("a cat") is None
        and found("a cat", 1) == ((7,), 1)
    )
    assert found("日本") == ((10,), len(tokenizer.tokens("日本")))
    assert found("bad-hand_v4 x") == ((11, 12), len(tokenizer.tokens("bad-hand_v4"))) and found("bad-hand_v5") is None
    assert found("catdog") is None


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({" ": (1,)}, "embedding ' ': its trigger has no tokens"),
        ({"": (1,)}, "embedding '': its trigger has no tokens"),
        ({"a": (1,), "A ": (2,)}, "embedding 'A ': another embedding's trigger has the same tokens"),
        ({"a": ()}, "embedding 'a': expected 1 to 75 vectors, a chunk's worth, found 0"),
        ({"a": (1,) * 76}, "embedding 'a': expected 1 to 75 vectors, a chunk's worth, found 76"),
        ({"\x1b[2J": ()}, r"embedding '\\x1b[2J': expected 1 to 75"),
    ],
)
def test_bad_triggers(flat_bundle: Path, embeddings: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(BundleError, match=message.replace("[", r"\[")) as caught:
        with_embeddings(flat_bundle, embeddings)
    assert caught.value.exit_code == 4
