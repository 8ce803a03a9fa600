"""Makes the bundle's tokenizer.json from CLIP's published merges (see data/NOTICE). `sdrt.bundle.bpe` reads the file;
the `tokenizers` library can too.
"""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from sdrt.bundle.bpe import BOS, END_OF_WORD, EOS, byte_symbols
from sdrt.errors import CheckpointError
from sdrt.files.publish import write_file

_MERGES = 49152 - 256 - 2  # CLIP's vocabulary: bytes, bytes ending a word, merges, two specials
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token to id, and the merges in order (Radford et al. 2021; OpenAI CLIP's simple_tokenizer)."""
    text = gzip.decompress(files("sdrt.export").joinpath("data", "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    lines = text.split("\n")[1 : _MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    alphabet = byte_symbols()
    tokens = [*alphabet, *(symbol + END_OF_WORD for symbol in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}, merges


def write_tokenizer(path: Path, size: int) -> tuple[int, int]:
    """Write tokenizer.json for a text encoder of `size` tokens. Returns the ids of the start and end tokens.

    Raises:
        CheckpointError: the token table of the text encoder does not have CLIP's size.
    """
    tokens, merges = vocabulary()
    if size != len(tokens):
        raise CheckpointError(
            f"token_embedding: expected {len(tokens):,} tokens, CLIP's vocabulary, found {size:,}",
            "This version of sdrt builds models with CLIP's own vocabulary.",
        )
    write_file(path, json.dumps(_document(tokens, merges), ensure_ascii=False, separators=(",", ":")).encode())
    return tokens[BOS], tokens[EOS]


def _document(tokens: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The file as the `tokenizers` library writes it, so that other tools can read it.
    `sdrt.bundle.bpe.TOKENIZER_SHA256` is the hash.
    """
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokens[token], "content": token, **special} for token in (BOS, EOS)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": EOS,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": END_OF_WORD,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokens,
            "merges": merges,
        },
    }
