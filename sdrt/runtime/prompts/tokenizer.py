"""Prompt to token ids: CLIP's byte-pair encoding, and learned embeddings by trigger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdrt.bundle.bpe import END_OF_WORD, read_bpe
from sdrt.bundle.manifest import Text
from sdrt.errors import BundleError, UsageError, printable

Place = tuple[int, ...]
"""A place in a chunk: the id that each of a model's text encoders has there. Only the ids of learned embeddings and of
padding differ between encoders.
"""


class Tokenizer:
    """Thread-safe: encoding changes nothing. `texts` are the encoders in the manifest, with the special tokens and the
    learned embeddings. `text` is the first one, for what all have in common.
    """

    def __init__(self, file: Path, texts: Sequence[Text]) -> None:
        """Read the vocabulary and the triggers of the embeddings.

        Raises:
            BundleError: the file is not CLIP's tokenizer; or a trigger has no tokens, the tokens of another one, or
                more rows than a chunk holds.
        """
        self._bpe = read_bpe(file)
        self.texts = tuple(texts)
        self.text = self.texts[0]
        self.comma: int | None = self._bpe.ids.get("," + END_OF_WORD)
        self._triggers: dict[int, list[tuple[list[int], tuple[Place, ...]]]] = {}
        for trigger in self.text.embeddings:
            self._add_trigger(trigger, tuple(zip(*(text.embeddings[trigger] for text in self.texts), strict=True)))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, without start, end, padding or learned embeddings.

        Raises:
            UsageError: not valid Unicode.
        """
        try:
            return self._bpe.encode(text)
        except UnicodeEncodeError as error:
            raise UsageError(f"prompt: not valid Unicode text: {error}", "Remove the lone surrogates.") from error

    def embedding_at(self, tokens: Sequence[int], position: int) -> tuple[tuple[Place, ...], int] | None:
        """Find the learned embedding whose trigger starts at `position`; the longest trigger wins. Returns the places
        it takes, with rows of the token tables as ids, and how many tokens the trigger has, or None.
        """
        for trigger, places in self._triggers.get(tokens[position], ()):
            if tokens[position : position + len(trigger)] == trigger:
                return places, len(trigger)
        return None

    def _add_trigger(self, trigger: str, places: tuple[Place, ...]) -> None:
        where, again = f"embedding '{printable(trigger)}'", "Build the bundle again."
        ids = self.tokens(trigger)
        if not ids:
            raise BundleError(f"{where}: its trigger has no tokens, so no prompt can name it", again)
        if not 0 < len(places) <= self.text.tokens - 2:
            raise BundleError(
                f"{where}: expected 1 to {self.text.tokens - 2} vectors, a chunk's worth, found {len(places)}", again
            )
        known = self._triggers.setdefault(ids[0], [])
        if any(other == ids for other, _ in known):
            raise BundleError(f"{where}: another embedding's trigger has the same tokens", again)
        known.append((ids, places))
        known.sort(key=lambda entry: -len(entry[0]))
