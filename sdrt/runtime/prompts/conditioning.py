"""Turn prompts into what a picture is denoised under: contexts, and for some models a vector beside each.

This covers which text holds at which step, its chunks, their emphasis, and a cache of encodings.

The emphasis is applied here and not in the text encoder's graph, for two reasons. AUTOMATIC1111 restores the mean over
all texts that prompt editing makes of a prompt. And one encoding then serves every emphasis. docs/prompts.md has the
rules.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, starmap, zip_longest
from numbers import Integral
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.graphs import CONTEXT, VECTOR
from sdrt.bundle.manifest import MAX_BRANCHES, NO_VECTOR, Source, Text, Vector
from sdrt.errors import UsageError, one_of, printable
from sdrt.runtime.engine import Engine, Float
from sdrt.runtime.prompts.chunks import Chunk, chunk_segments, empty_chunk
from sdrt.runtime.prompts.syntax import (
    NETWORKS,
    Segment,
    network_name,
    network_tag,
    parse_attention,
    parse_network_tag,
    schedule_edits,
    split_and,
    without_networks,
)
from sdrt.runtime.prompts.tokenizer import Tokenizer
from sdrt.runtime.prompts.vector import size_numbers
from sdrt.runtime.sampling.registry import COMPATS

SYNTAXES = ("a1111", "plain")
EMPHASES = ("original", "no norm", "none", "ignore")
NETWORK_TAGS = ("refuse", "ignore")

MAX_WEIGHT = 1000.0
"""Largest emphasis, or weight of a part, of either sign. Pictures fall apart beyond 2 or so."""
MAX_CHARACTERS = 20_000
"""Most characters of one prompt. Its chunks hold several times fewer, and reading this many takes no noticeable time.
"""
MAX_CHUNKS_IN_ALL = 4096
"""Most chunks of a request: those of every branch, in every context that prompt editing makes over the steps. Their
encodings take 1 GB for Stable Diffusion 1.5.
"""
CACHED_CHUNKS = 128
"""How many encoded chunks a pipeline keeps: 30 MB for Stable Diffusion 1.5."""
MOST_ROWS = 16
"""Most chunks encoded in one call, which bounds the memory of the call."""


_T = TypeVar("_T")
_Rows = tuple[tuple[int, ...], ...]
"""A chunk's tokens, for each encoder."""


@dataclass(frozen=True)
class Conditioning:
    """What the prompts say at each step, S steps in all.

    sets: the different values of the step's inputs that prompts make (`sdrt.bundle.graphs.OF_TEXT`), by name, float32
        and read-only: `context` `[G, T, C]`, and `vector` `[G, V]` where the model has one. The negative prompt comes
        first if guided, then one branch per `AND` part. An edit model may have the negative prompt twice.
    set_of_step: for each of the S steps an index into `sets`.
    weights: for each step the guidance weights of the G branches. They sum to 1, if guided: 1 - cfg * sum(w), then cfg
        * w of each part. For an edit model, 1 - image_cfg and image_cfg - cfg * sum(w) come before the parts.
    images: whether each of the G branches sees the image to edit.
    conditional: the weights of the branches without guidance: 0 for the negative prompt, and w / sum(w) of each part.
        All 0 if the parts cancel out.
    """

    sets: tuple[Mapping[str, Float], ...]
    set_of_step: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    images: tuple[bool, ...]
    conditional: tuple[float, ...] = ()


class Encoding(NamedTuple):
    """What the text encoders make of a chunk, float32: its context `[77, C]`, and the pooled vector `[P]`. P is 0 for
    models that have none.
    """

    context: Float
    pooled: Float


@dataclass(frozen=True)
class _Part:
    """One branch before encoding: pairs of last step and text, as `schedule_edits` gives them, and the chunks of each
    text. All texts have the same number of chunks. `zero` says that zeros take the place of what encoders with
    `zero_empty` make of it.
    """

    schedule: tuple[tuple[int, str], ...]
    chunks: dict[str, list[Chunk]]
    zero: bool = False

    @property
    def length(self) -> int:
        return len(next(iter(self.chunks.values())))

    def text_at(self, step: int) -> str:
        """The text of a step, counted from 0. AUTOMATIC1111 compares this count with limits that count from 1, and so
        do we.
        """
        return self.schedule[bisect_left(self.schedule, step, key=itemgetter(0))][1]


@dataclass(frozen=True)
class Prompts:
    """A prompt and its negative prompt after reading. Nothing is encoded yet.

    `parts` and `weights` are those of the branches, and `images` says which of them see the image to edit. The first
    `negatives` branches are of the negative prompt: none, one, or for an edit model up to two. `contexts` is how many
    different contexts the steps go through.
    """

    parts: tuple[_Part, ...]
    weights: tuple[float, ...]
    images: tuple[bool, ...]
    negatives: int
    clip_skip: int
    emphasis: str
    steps: int
    contexts: int

    @property
    def chunks(self) -> int:
        """Chunks of the longest part. All branches are filled up to this length."""
        return max(part.length for part in self.parts)

    @property
    def conditional(self) -> tuple[float, ...]:
        """The weights of the branches without guidance."""
        of_parts = self.weights[self.negatives :]
        total = sum(of_parts)
        return (0.0,) * self.negatives + tuple(weight / total if total != 0 else 0.0 for weight in of_parts)


class TextConditioner:
    """Turns the prompts of one bundle into contexts and vectors. Thread-safe. Keeps the chunks encoded last."""

    def __init__(self, tokenizer: Tokenizer, sources: Sequence[Source] = (), vector: Vector = NO_VECTOR) -> None:
        """`sources` and `vector` come from the manifest. Messages about adapters in a prompt name the sources."""
        self._tokenizer = tokenizer
        self._sources = tuple(sources)
        self._vector = vector
        self._empty = empty_chunk(tokenizer.texts)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, _Rows], Encoding] = OrderedDict()

    def read(
        self,
        prompt: str,
        negative: str | None = "",
        *,
        steps: int,
        cfg: float,
        prompt_2: str | None = None,
        negative_2: str | None = None,
        image_cfg: float | None = None,
        clip_skip: int | None = None,
        syntax: str | None = None,
        emphasis: str = "original",
        compat: str = "a1111",
        network_tags: str = "refuse",
    ) -> Prompts:
        """Read a prompt and, if guided, a negative prompt.

        Args:
            prompt: may be empty; of any length.
            negative: the same. It is not read where the guidance weight of its branch is 0, as at `cfg` 1. None is
                diffusers' None: zeros for models with `zero_empty`, else an empty prompt.
            steps: how many steps prompt editing counts. AUTOMATIC1111 counts model calls: twice the steps for samplers
                of second order.
            cfg: guidance scale. diffusers guides only beyond 1, by prompt and image or by neither.
            prompt_2, negative_2: what all text encoders but the first read; None is `prompt` and `negative`. For the
                plain syntax.
            image_cfg: of an edit model, how much the image guides; None for other models.
            clip_skip: AUTOMATIC1111's count, where 1 is the last layer; None takes the bundle's first one.
            syntax: one of `SYNTAXES`; None is plain for diffusers, else a1111.
            emphasis: one of `EMPHASES`: restore each chunk's mean; do not restore it; take brackets as text; or read
                brackets but give them no weight.
            compat: one of `COMPATS`. diffusers has no second chunk: in its plain syntax a longer prompt is an error.
            network_tags: one of `NETWORK_TAGS`: what happens to a `<lora:name:0.8>` that the bundle does not hold at
                that strength. It is refused; or it is ignored as AUTOMATIC1111 ignores an adapter it cannot find: taken
                out of a prompt, left as text in a negative prompt.

        Raises:
            UsageError: an unknown name, a layer the bundle was built without, an adapter named in a prompt, a weight
                beyond `MAX_WEIGHT`, text that is not valid Unicode or longer than `compat` takes, or a limit passed:
                `MAX_CHARACTERS`, `MAX_CHUNKS` of a text, `MAX_BRANCHES`, `MAX_CHUNKS_IN_ALL`.
        """
        skip = chosen_layer(self._tokenizer.text, clip_skip)
        one_of("compat", compat, COMPATS)
        one_of("emphasis", emphasis, EMPHASES)
        syntax = one_of(
            "prompt syntax", syntax if syntax is not None else "plain" if compat == "diffusers" else "a1111", SYNTAXES
        )
        limited = compat == "diffusers" and syntax == "plain"
        one_of("network tags", network_tags, NETWORK_TAGS)
        self._check_text("prompt", prompt)
        prompt = self._without_networks(prompt, syntax, network_tags)
        if prompt_2 is not None:
            self._check_text("prompt 2", prompt_2)
            prompt_2 = self._without_networks(prompt_2, syntax, network_tags)
        positive = split_and(prompt) if syntax == "a1111" else (Segment(prompt, 1.0),)
        most = MAX_BRANCHES - (1 if image_cfg is None else 2)
        if len(positive) > most:
            raise UsageError(
                f"prompt: {len(positive)} parts between ANDs: expected at most {most}", "Join some of them."
            )
        for part in positive:
            _check_weight("prompt", part)
        if compat == "diffusers" and (cfg <= 1 or (image_cfg is not None and image_cfg < 1)):
            cfg, image_cfg = 1.0, None if image_cfg is None else 1.0
        guidance = tuple(cfg * part.weight for part in positive)

        def read(name: str, text: str, second: str | None) -> _Part:
            return self._part(name, text, second, steps, syntax, emphasis, limited)

        parts = [read("prompt", part.text, prompt_2) for part in positive]
        rest = [(1 - sum(guidance), True)]  # of each branch of the negative prompt: weight, whether it sees the image
        if image_cfg is not None:
            rest = [(1 - image_cfg, False), (image_cfg - sum(guidance), True)]
        rest = [(weight, image) for weight, image in rest if weight != 0]
        if rest:
            negatives = [
                (name, text)
                for name, text in (("negative prompt", negative), ("negative prompt 2", negative_2))
                if text is not None
            ]
            for name, text in negatives:
                self._check_text(name, text)
                self._check_negative_networks(name, text, network_tags)
            negated = read("negative prompt", negative or "", negative_2)
            if negative is None or (compat == "a1111" and not any(negated.chunks)):
                negated = replace(negated, zero=True)
            parts[:0] = [negated] * len(rest)
        contexts = len({tuple(part.text_at(step) for part in parts) for step in range(steps)})
        _check_in_all("prompts", contexts * len(parts) * max(part.length for part in parts))
        return Prompts(
            parts=tuple(parts),
            weights=(*(weight for weight, _ in rest), *guidance),
            images=(*(image for _, image in rest), *[True] * len(guidance)),
            negatives=len(rest),
            clip_skip=skip,
            emphasis=emphasis,
            steps=steps,
            contexts=contexts,
        )

    def encode(self, engine: Engine, prompts: Prompts, sizes: Sequence[int] = ()) -> Conditioning:
        """Encode prompts that were read. Of the engine only `encode_text` is used. A cached chunk costs no call.

        `sizes` are those that the model is told, in pixels and in the order of `sdrt.bundle.manifest.SIZES`; the same
        for all branches.
        """
        parts, longest = prompts.parts, prompts.chunks
        wanted = [chunk.tokens for part in parts for own in part.chunks.values() for chunk in own]
        sides = {max((part.length for part in side), default=longest) for side in _sides(prompts.negatives, parts)}
        if len(sides) > 1:
            wanted.append(self._empty.tokens)
        encoded = self._encoded(engine, wanted, prompts.clip_skip, at_once=min(len(parts) * longest, MOST_ROWS))
        encodings = [_encodings(part, encoded, prompts.emphasis, self._tokenizer.texts) for part in parts]
        sets: list[Mapping[str, Float]] = []
        index_of: dict[tuple[str, ...], int] = {}
        set_of_step = []
        for step in range(prompts.steps):
            texts = tuple(part.text_at(step) for part in parts)
            if texts not in index_of:
                index_of[texts] = len(sets)
                branches = [of_text[text] for of_text, text in zip(encodings, texts, strict=True)]
                sets.append(self._set(branches, encoded, prompts.negatives, sizes))
            set_of_step.append(index_of[texts])
        return Conditioning(
            tuple(sets), tuple(set_of_step), (prompts.weights,) * prompts.steps, prompts.images, prompts.conditional
        )

    def _part(
        self, name: str, text: str, second: str | None, steps: int, syntax: str, emphasis: str, limited: bool
    ) -> _Part:
        """A branch of a text. All encoders but the first read `second` in its place, unless it is None."""
        schedule = schedule_edits(text, steps) if syntax == "a1111" else ((steps, text),)
        chunks: dict[str, list[Chunk]] = {}
        in_all = 0
        for _, each in schedule:
            if each not in chunks:
                segments = parse_attention(each) if syntax == "a1111" and emphasis != "none" else (Segment(each, 1.0),)
                for segment in segments:
                    _check_weight(name, segment)
                chunks[each] = chunk_segments(self._tokenizer, segments, name)
                in_all += len(chunks[each])
                _check_in_all(name, in_all)
        if second is not None:
            others = chunk_segments(self._tokenizer, (Segment(second, 1.0),), f"{name} 2")
            self._check_length(f"{name} 2", second, others, limited)
            chunks = {each: self._joined(own, others) for each, own in chunks.items()}
        longest = max(map(len, chunks.values()))
        for own in chunks.values():
            self._check_length(name, text, own, limited)
        return _Part(schedule, {each: [*own, *[self._empty] * (longest - len(own))] for each, own in chunks.items()})

    def _check_length(self, name: str, text: str, chunks: Sequence[Chunk], limited: bool) -> None:
        if limited and len(chunks) > 1:
            limit = self._tokenizer.text.tokens - 2
            raise UsageError(
                f"{name}: {len(self._tokenizer.tokens(text)):,} tokens; diffusers drops all after the first {limit}",
                "Shorten it, or choose the a1111 prompt syntax, which encodes any length.",
            )

    def _joined(self, firsts: Sequence[Chunk], others: Sequence[Chunk]) -> list[Chunk]:
        """Chunks of which the first encoder reads `firsts` and the rest `others`. Plain text has no emphasis."""
        return [
            Chunk((first.tokens[0], *other.tokens[1:]), first.weights)
            for first, other in zip_longest(firsts, others, fillvalue=self._empty)
        ]

    def _set(
        self, branches: list[Encoding], encoded: Mapping[_Rows, Encoding], negatives: int, sizes: Sequence[int]
    ) -> Mapping[str, Float]:
        """The step's inputs for branches whose contexts may have different lengths."""
        made = {CONTEXT: self._stack([branch.context for branch in branches], encoded, negatives)}
        if self._vector.numbers:
            told = size_numbers(sizes, self._vector.size_width)
            made[VECTOR] = np.stack([np.concatenate([branch.pooled, told]) for branch in branches])
        for array in made.values():
            array.flags.writeable = False
        return made

    def _stack(self, contexts: list[Float], encoded: Mapping[_Rows, Encoding], negatives: int) -> Float:
        """Join contexts `[t, C]` of different lengths into one `[G, T, C]`.

        This follows AUTOMATIC1111. First a shorter `AND` part repeats its last vector. Then the shorter side of the
        guidance is filled up with encoded empty chunks (the option "Pad prompt/negative prompt").
        """
        negative, positive = _sides(negatives, contexts)
        length = max(map(len, positive))
        positive = [np.concatenate([z, np.repeat(z[-1:], length - len(z), axis=0)]) for z in positive]
        sides = [*negative, *positive]
        longest = max(map(len, sides))
        missing = [(longest - len(z)) // self._tokenizer.text.tokens for z in sides]
        return np.stack(
            [
                np.concatenate([z, *[encoded[self._empty.tokens].context] * count]) if count else z
                for z, count in zip(sides, missing, strict=True)
            ]
        )

    def _encoded(self, engine: Engine, wanted: Iterable[_Rows], skip: int, at_once: int) -> dict[_Rows, Encoding]:
        """Encodings of chunks, without emphasis, from the cache or the engine.

        No call takes more rows than the branches of one set have chunks. So an engine that can denoise under that set
        can also encode it.
        """
        found: dict[_Rows, Encoding] = {}
        missing: list[_Rows] = []
        with self._lock:
            for row in dict.fromkeys(wanted):
                if (skip, row) in self._cache:
                    self._cache.move_to_end((skip, row))
                    found[row] = self._cache[skip, row]
                else:
                    missing.append(row)
        for first in range(0, len(missing), at_once):
            rows = missing[first : first + at_once]
            tokens = np.array(rows, np.int64).swapaxes(0, 1)
            contexts, pooled = engine.encode_text(tokens, skip)
            for i, row in enumerate(rows):
                found[row] = Encoding(contexts[i].copy(), pooled[i].copy())  # a view would keep the whole batch
        with self._lock:
            self._cache.update(((skip, row), found[row]) for row in missing)
            while len(self._cache) > CACHED_CHUNKS:
                self._cache.popitem(last=False)
        return found

    def _check_text(self, name: str, text: str) -> None:
        if not isinstance(text, str):
            raise UsageError(f"{name}: expected text, found {type(text).__name__}")
        if len(text) > MAX_CHARACTERS:
            raise UsageError(f"{name}: {len(text):,} characters: expected at most {MAX_CHARACTERS:,}", "Shorten it.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{name}: not valid Unicode text: {error}", "Remove the lone surrogates.") from error

    def _without_networks(self, prompt: str, syntax: str, network_tags: str) -> str:
        """The prompt without tags of adapters. Tags that name what is built in go; all tags go if they are to be
        ignored. Plain syntax takes other kinds of tags for text.
        """

        def keep(kind: str, tag: str) -> bool:
            if kind not in NETWORKS and syntax == "plain":
                return True
            if network_tags == "refuse" and not is_fused(tag, self._sources):
                raise self._refused("prompt", tag)
            return False

        return without_networks(prompt, keep)

    def _check_negative_networks(self, name: str, negative: str, network_tags: str) -> None:
        """In a negative prompt AUTOMATIC1111 takes tags for text, which is hardly what the user means."""

        def keep(kind: str, tag: str) -> bool:
            if kind in NETWORKS and network_tags == "refuse":
                raise self._refused(name, tag)
            return True

        without_networks(negative, keep)

    def _refused(self, name: str, tag: str) -> UsageError:
        adapters = [source for source in self._sources if source.kind in ("lora", "hypernetwork")]
        baked = " ".join(
            network_tag(source.kind, source.name, source.scale or 0.0, source.te_scale) for source in adapters
        )
        return UsageError(
            f"{name}: {_short(tag)}: adapters are baked in when a bundle is built; this one holds {baked or 'none'}",
            "Leave it out with --network-tags ignore (network_tags='ignore'), or build another bundle with sdrt build"
            " --lora or --hypernetwork.",
        )


def is_fused(tag: str, sources: Iterable[Source]) -> bool:
    """Whether a `<lora:...>` or `<hypernet:...>` names an adapter that is built in, at the strength it was built in
    with.
    """
    asked = parse_network_tag(tag)
    if asked is None:
        return False
    for source in sources:
        if source.kind == asked.kind and network_name(source.name) == asked.name and source.scale is not None:
            te_scale = source.scale if source.te_scale is None else source.te_scale
            if _same(asked.scale, source.scale) and (source.kind == "hypernetwork" or _same(asked.te_scale, te_scale)):
                return True
    return False


def _same(written: float, scale: float) -> bool:
    """Whether a strength in a prompt is the strength that was built in. Tags hold six digits."""
    return math.isclose(written, scale, rel_tol=1e-5)


def chosen_layer(text: Text, clip_skip: int | None) -> int:
    """The text-encoder layer that a clip skip asks for: the bundle's first one for None, and never a later one than the
    family's contexts come from.

    Raises:
        UsageError: the bundle was built without that layer.
    """
    asked = text.clip_skip[0] if clip_skip is None else clip_skip
    if isinstance(asked, Integral) and not isinstance(asked, bool):
        layer = max(int(asked), text.last_layer) if asked >= 1 else int(asked)
        if layer in text.clip_skip:
            return layer
    raise UsageError(
        f"clip skip {asked!r}: this bundle was built for {', '.join(map(str, text.clip_skip))}",
        f"Choose one of them, or build again with --clip-skip {asked}.",
    )


def _sides(negatives: int, branches: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T]]:
    """The branches of the negative prompt, and those of the prompt."""
    return branches[:negatives], branches[negatives:]


def _encodings(
    part: _Part, encoded: Mapping[_Rows, Encoding], emphasis: str, texts: Sequence[Text]
) -> dict[str, Encoding]:
    """What the encoders make of each text of a part: contexts `[t, C]` of all its chunks with emphasis, and the pooled
    vector of the first chunk, which emphasis does not touch.
    """
    counts = Counter(text for _, text in part.schedule)
    times = np.array([counts[text] for text in part.chunks], np.float64)
    ends = list(accumulate((text.width for text in texts), initial=0))
    columns = list(starmap(slice, pairwise(ends)))
    of_chunks = []
    for chunks in zip(*part.chunks.values(), strict=True):
        z = np.stack([encoded[chunk.tokens].context for chunk in chunks])
        weights = np.array([chunk.weights for chunk in chunks])
        if emphasis in ("original", "no norm") and (weights != 1).any():
            z = np.concatenate([_weighted(z[:, :, own], weights, times, emphasis) for own in columns], axis=2)
        of_chunks.append(z)
    contexts = np.concatenate(of_chunks, axis=1)
    pooled = [encoded[own[0].tokens].pooled for own in part.chunks.values()]
    if part.zero:
        for own, text in zip(columns, texts, strict=True):
            contexts[:, :, own] *= not text.zero_empty
        pooled = [np.zeros_like(one) if texts[-1].zero_empty else one for one in pooled]
    return {text: Encoding(z, one) for text, z, one in zip(part.chunks, contexts, pooled, strict=True)}


def _weighted(z: Float, weights: NDArray[np.float64], times: NDArray[np.float64], emphasis: str) -> Float:
    """One chunk of every text of a part, one encoder's vectors `[texts, 77, C]` of it: each token's times its emphasis
    `[texts, 77]`, then the mean restored.

    The mean is that of the chunk over all texts of the part's schedule; a text counts as often as the schedule holds
    it, `times` `[texts]` (modules/sd_emphasis.py over the batch of modules/prompt_parser.py in AUTOMATIC1111). Without
    prompt editing it is the chunk's own mean.
    """
    weighted = z * weights[:, :, None]
    old, new = (times @ x.mean(axis=(1, 2), dtype=np.float64) for x in (z, weighted))
    return (weighted * (old / new) if emphasis == "original" and new != 0 else weighted).astype(np.float32)


def _check_in_all(name: str, chunks: int) -> None:
    if chunks > MAX_CHUNKS_IN_ALL:
        raise UsageError(
            f"{name}: {chunks:,} chunks of text over all branches and steps: expected at most {MAX_CHUNKS_IN_ALL:,}",
            "Use fewer edits ([a:b:0.5]), alternations ([a|b]), parts (AND) or words: each edit makes the whole prompt"
            " another text.",
        )


def _check_weight(name: str, segment: Segment) -> None:
    if abs(segment.weight) > MAX_WEIGHT:
        raise UsageError(
            f"{name}: '{_short(segment.text)}' has weight {segment.weight:.3g}: expected at most {MAX_WEIGHT:g}",
            "Use fewer brackets or a smaller number.",
        )


def _short(text: str) -> str:
    return printable(text if len(text) <= 40 else text[:40] + "…")
