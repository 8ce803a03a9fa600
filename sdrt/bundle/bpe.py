"""CLIP's byte-pair encoding: text to token ids (Radford et al. 2021, as transformers' CLIPTokenizer computes it).
Standard library only.

Every text encoder that sdrt builds has CLIP's own vocabulary, so every bundle holds the same `tokenizer.json`. Only
that one file is read here: any other bytes are refused by their hash before anything is parsed. Serves the build and
the runtime.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

from sdrt.errors import BundleError, InputFileError
from sdrt.files.read import read_document

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
TOKENIZER_SHA256 = "da79a4687fbdce67c969a6a103bfa3b125bfdf0d4ae96982837797128dce61d7"
"""The size of the only tokenizer.json there is: 1,681,370 bytes."""

_MAX_BYTES = 2 << 20
_CACHED_WORDS, _CACHED_LENGTH = 10_000, 64
"""How many words keep their tokens in memory, and how many characters such a word may have. Prompts repeat words, and
memory stays bounded.
"""

_SPECIAL = re.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
_WORDS = re.compile(r"(<\|)(startoftext|endoftext)(\|>)|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ \t\n\v\f\ra-z0-9]+")
"""Finds the words of a lower-case text. Beyond ASCII, letters stand as z, numbers as 0, white space as a blank, and
everything else as an exclamation mark.
"""
_WHITE_SPACE = {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def byte_symbols() -> list[str]:
    """GPT-2's printable symbol for each byte, in CLIP's order: printable bytes stand for themselves, the rest go from
    U+0100 on.
    """
    return list(_symbol_of_byte().values())


def _symbol_of_byte() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Bpe:
    """Thread-safe: encoding changes only a cache of words."""

    def __init__(self, ids: dict[str, int], merges: list[tuple[str, str]]) -> None:
        """`ids` gives each token its number. `merges` lists the pairs that become one token, the most urgent pair
        first.
        """
        self.ids = ids
        self._ranks = {(first, second): rank for rank, (first, second) in enumerate(merges)}
        self._symbols = _symbol_of_byte()
        self._cached = lru_cache(_CACHED_WORDS)(self._tokens_of_word)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start, end or padding. The two special tokens may be spelt out in the text.

        Raises:
            UnicodeEncodeError: the text has lone surrogates.
        """
        found: list[int] = []
        for i, part in enumerate(_SPECIAL.split(text)):
            if i % 2:
                found.append(self.ids[part])
                continue
            # Letter by letter, as in transformers: a sigma at the end of a word is written like any other.
            part = unicodedata.normalize("NFC", part).replace("Σ", "σ").lower()
            for match in _WORDS.finditer(part.translate(_KINDS)):
                for group in range(1, 4) if match.lastindex else (0,):
                    word = part[slice(*match.span(group))]
                    found += self._cached(word) if len(word) <= _CACHED_LENGTH else self._tokens_of_word(word)
        return found

    def _tokens_of_word(self, word: str) -> tuple[int, ...]:
        """Merge a word's bytes. The pair that comes first among the merges goes first, and the leftmost of equal pairs.
        A part that was merged into another one is left empty.
        """
        parts = [self._symbols[byte] for byte in word.encode()]
        parts[-1] += END_OF_WORD
        count, ranks = len(parts), self._ranks
        before, after = list(range(-1, count - 1)), list(range(1, count + 1))
        waiting = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        heapify(waiting)
        while waiting:
            rank, i = heappop(waiting)
            j = after[i]
            if j == count or ranks.get((parts[i], parts[j])) != rank:
                continue  # one of the two is already part of another pair
            parts[i], parts[j] = parts[i] + parts[j], ""
            after[i] = after[j]
            if after[i] < count:
                before[after[i]] = i
            for k in (before[i], i):
                if k >= 0 and after[k] < count and (new := ranks.get((parts[k], parts[after[k]]))) is not None:
                    heappush(waiting, (new, k))
        return tuple(self.ids[part] for part in parts if part)


def read_bpe(path: Path) -> Bpe:
    """Read a bundle's tokenizer.json. All bundles of a process share one vocabulary.

    Raises:
        BundleError: the file cannot be read, or is not the one that every build writes.
    """
    again = "Build the bundle again, or copy it again from where it was built."
    try:
        data = read_document(path, _MAX_BYTES).data
    except (OSError, InputFileError) as error:
        raise BundleError(str(error), again) from error
    if (found := hashlib.sha256(data).hexdigest()) != TOKENIZER_SHA256:
        raise BundleError(
            f"{path}: not CLIP's tokenizer: expected sha256 {TOKENIZER_SHA256[:16]}…, found {found[:16]}…", again
        )
    return _parsed(data)


@lru_cache(maxsize=1)
def _parsed(data: bytes) -> Bpe:
    model = json.loads(data)["model"]
    return Bpe(model["vocab"], model["merges"])


class _Kinds:
    """A table for `str.translate`: the kind of each character beyond ASCII, as `_WORDS` expects it."""

    def __getitem__(self, code: int) -> str:
        if code < 128:
            raise LookupError  # the character stays as it is
        kind = unicodedata.category(chr(code))[0]
        return "z" if kind == "L" else "0" if kind == "N" else " " if code in _WHITE_SPACE else "!"


_KINDS = _Kinds()
