"""Makes the bundle's tokenizer.json from CLIP's published merges (see data/NOTICE), for the `tokenizers` library to read at run time."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from sdrt.errors import CheckpointError
from sdrt.publish import write_file

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_MERGES = 49152 - 256 - 2  # CLIP's vocabulary: bytes, bytes ending a word, merges, two specials
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token to id, and the merges in order (Radford et al. 2021; OpenAI CLIP's simple_tokenizer)."""
    text = gzip.decompress(files("sdrt.export").joinpath("data", "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    lines = text.split("\n")[1 : _MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    alphabet = _byte_symbols()
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_symbols() -> list[str]:
    """GPT-2's printable symbol for each byte, in CLIP's order: printable bytes as themselves, then the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


def write_tokenizer(path: Path, size: int) -> tuple[int, int]:
    """Write tokenizer.json for a text encoder of `size` tokens. Returns the ids of the start and end tokens.

    Raises:
        CheckpointError: the text encoder's token table has not CLIP's size.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokens, merges = vocabulary()
    if size != len(tokens):
        raise CheckpointError(
            f"token_embedding: expected {len(tokens):,} tokens, CLIP's vocabulary, found {size:,}",
            "This version of sdrt builds models with CLIP's own vocabulary.",
        )
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges, unk_token=EOS, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([BOS, EOS])
    write_file(path, tokenizer.to_str().encode())
    return tokens[BOS], tokens[EOS]


def trigger_encoder(path: Path) -> Callable[[str], list[int]]:
    """A function from words to token ids, without start and end, by a tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode
