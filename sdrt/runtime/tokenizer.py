"""Prompt to token ids: CLIP's byte-pair encoding, read from the bundle's tokenizer.json by the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle import Text
from sdrt.errors import UsageError


class Tokenizer:
    """Thread-safe: encoding changes nothing."""

    def __init__(self, file: Path, text: Text) -> None:
        from tokenizers import Tokenizer as Backend

        self._backend = Backend.from_file(str(file))
        self._text = text

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """Token ids `[1, tokens]` of a prompt, with start, end and padding.

        Raises:
            UsageError: the prompt is longer than one chunk, or is not valid text.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"prompt: expected text, found {type(prompt).__name__}")
        try:
            ids = self._backend.encode(prompt, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise UsageError(f"prompt: not valid Unicode text: {error}", "Remove the lone surrogates.") from error
        limit = self._text.tokens - 2
        if len(ids) > limit:
            raise UsageError(f"prompt: {len(ids):,} tokens, the limit is {limit} for now", f"Shorten it; about {limit * 3 // 4} English words fit.")
        row = [self._text.bos, *ids, self._text.eos]
        return np.array([row + [self._text.pad] * (self._text.tokens - len(row))], dtype=np.int64)
