"""Prompt to token ids: CLIP's byte-pair encoding, and learned embeddings by trigger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdrt.bundle.bpe import END_OF_WORD, read_bpe
from sdrt.bundle.manifest import Text
from sdrt.errors import BundleError, UsageError, printable


class Tokenizer:
    """Thread-safe: encoding changes nothing. `text` comes from the manifest and holds the special tokens and the
    learned embeddings.
    """

    def __init__(self, file: Path, text: Text) -> None:
        """Read the vocabulary and the triggers of `text.embeddings`.

        Raises:
            BundleError: the file is not CLIP's tokenizer; or a trigger has no tokens, the tokens of another one, or
                more rows than a chunk holds.
        """
        self._bpe = read_bpe(file)
        self.text = text
        self.comma: int | None = self._bpe.ids.get("," + END_OF_WORD)
        self._triggers: dict[int, list[tuple[list[int], tuple[int, ...]]]] = {}
        for trigger, rows in text.embeddings.items():
            self._add_trigger(trigger, rows)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, without start, end, padding or learned embeddings.

        Raises:
            UsageError: not valid Unicode.
        """
        try:
            return self._bpe.encode(text)
        except UnicodeEncodeError as error:
            raise UsageError(f"prompt: not valid Unicode text: {error}", "Remove the lone surrogates.") from error

    def embedding_at(self, tokens: Sequence[int], position: int) -> tuple[tuple[int, ...], int] | None:
        """Find the learned embedding whose trigger starts at `position`; the longest trigger wins. Returns its rows of
        the token table and how many tokens the trigger has, or None.
        """
        for trigger, rows in self._triggers.get(tokens[position], ()):
            if tokens[position : position + len(trigger)] == trigger:
                return rows, len(trigger)
        return None

    def _add_trigger(self, trigger: str, rows: tuple[int, ...]) -> None:
        where, again = f"embedding '{printable(trigger)}'", "Build the bundle again."
        ids = self.tokens(trigger)
        if not ids:
            raise BundleError(f"{where}: its trigger has no tokens, so no prompt can name it", again)
        if not 0 < len(rows) <= self.text.tokens - 2:
            raise BundleError(
                f"{where}: expected 1 to {self.text.tokens - 2} vectors, a chunk's worth, found {len(rows)}", again
            )
        known = self._triggers.setdefault(ids[0], [])
        if any(other == ids for other, _ in known):
            raise BundleError(f"{where}: another embedding's trigger has the same tokens", again)
        known.append((ids, rows))
        known.sort(key=lambda entry: -len(entry[0]))
