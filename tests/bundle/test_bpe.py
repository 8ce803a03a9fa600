"""Byte-pair encoding against the `tokenizers` library on the same file, and files that are not the one that every build
writes.
"""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from sdrt.bundle.bpe import Bpe, read_bpe
from sdrt.errors import BundleError
from sdrt.export.tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    write_tokenizer(path, 49408)
    return path


@pytest.fixture(scope="module")
def ours(written: Path) -> Bpe:
    return read_bpe(written)


@pytest.fixture(scope="module")
def library(written: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(written))


def test_characters_of_all_planes(ours: Bpe, library: Any) -> None:
    """In and around words, beside numbers and signs. Characters younger than Python's own Unicode are left out: they
    count as signs.
    """
    assigned = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    texts = [f"b{char}c!{char}1{char}'s{char}" for char in (*assigned[:0x600], *assigned[0x600::23])]
    expected = [found.ids for found in library.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids] == []
    assert len(texts) > 7_000


@pytest.mark.parametrize(
    "alphabet",
    ["a", "ab", "aeinorst", "0123", "!?-", "日本語", "😀\u200d👩", "e\u0301\u0323", "aA ", "<|endoftext|>", "'st"],
)
def test_ten_thousand_characters(ours: Bpe, library: Any, alphabet: str) -> None:
    text = "".join(random.Random(alphabet).choices(alphabet, k=10_000))
    assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_one_vocabulary_serves_a_process(ours: Bpe, written: Path) -> None:
    assert read_bpe(written) is ours


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda data: b"", "not CLIP's tokenizer"),
        (lambda data: b"\xff\xfe{", "not CLIP's tokenizer"),
        (lambda data: b"[" * 1_000_000, "not CLIP's tokenizer"),
        (lambda data: data[:-1], "not CLIP's tokenizer"),
        (lambda data: data + b"\n", "not CLIP's tokenizer"),
        (
            lambda data: data.replace(b'"padding":null', b'"padding":{"strategy":{"Fixed":2147483648}}'),
            "not CLIP's tokenizer",
        ),
        (lambda data: data.replace(rb'"\\s+"', b'"(a*)*b"'), "not CLIP's tokenizer"),
        (lambda data: data + b" " * (1 << 20), "more than the limit of 2,097,152"),
    ],
)
def test_b11_any_other_file_is_refused_before_it_is_parsed(
    written: Path, tmp_path: Path, change: Any, found: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(change(written.read_bytes()))
    with pytest.raises(BundleError, match=found) as caught:
        read_bpe(path)
    assert caught.value.exit_code == 4 and str(path) in caught.value.message


def test_b11_whatever_lies_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(1 << 40)
    for name in ("folder", "huge", "absent"):
        with pytest.raises(BundleError, match=name):
            read_bpe(tmp_path / name)
