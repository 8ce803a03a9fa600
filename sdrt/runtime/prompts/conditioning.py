"""Turn prompts into the contexts that a picture is denoised under.

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from sdrt.bundle.manifest import MAX_BRANCHES, Source
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


@dataclass(frozen=True)
class Conditioning:
    """What the prompts say at each step, S steps in all.

    sets: the different contexts, each float32 `[G, T, C]`, read-only. The negative prompt comes first if guided, then
        one branch per `AND` part.
    set_of_step: for each of the S steps an index into `sets`.
    weights: for each step the guidance weights of the G branches. If guided they sum to 1: 1 - cfg * sum(w), then cfg *
        w of each part.
    conditional: the weights of the branches without guidance: 0 for the negative prompt, and w / sum(w) of each part.
        All 0 if the parts cancel out.
    """

    sets: tuple[Float, ...]
    set_of_step: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    conditional: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Part:
    """One branch before encoding: pairs of last step and text, as `schedule_edits` gives them, and the chunks of each
    text. All texts have the same number of chunks.
    """

    schedule: tuple[tuple[int, str], ...]
    chunks: dict[str, list[Chunk]]

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

    `weights` are the weights of the branches, the negative prompt's first if `guided`. `contexts` is how many different
    contexts the steps go through.
    """

    parts: tuple[_Part, ...]
    weights: tuple[float, ...]
    guided: bool
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
        of_parts = self.weights[self.guided :]
        total = sum(of_parts)
        return (0.0,) * self.guided + tuple(weight / total if total != 0 else 0.0 for weight in of_parts)


class TextConditioner:
    """Turns the prompts of one bundle into contexts. Thread-safe. Keeps the chunks encoded last."""

    def __init__(self, tokenizer: Tokenizer, sources: Sequence[Source] = ()) -> None:
        """`sources` comes from the manifest. Messages about adapters in a prompt name them."""
        self._tokenizer = tokenizer
        self._sources = tuple(sources)
        self._empty = empty_chunk(tokenizer.text)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, tuple[int, ...]], Float] = OrderedDict()

    def read(
        self,
        prompt: str,
        negative: str = "",
        *,
        steps: int,
        cfg: float,
        clip_skip: int | None = None,
        syntax: str | None = None,
        emphasis: str = "original",
        compat: str = "a1111",
        network_tags: str = "refuse",
    ) -> Prompts:
        """Read a prompt and, if guided, a negative prompt.

        Args:
            prompt: may be empty; of any length.
            negative: the same. It is not read where the guidance weight of its branch is 0, as at `cfg` 1.
            steps: how many steps prompt editing counts. AUTOMATIC1111 counts model calls: twice the steps for samplers
                of second order.
            cfg: guidance scale.
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
        skip = self._clip_skip(clip_skip)
        one_of("compat", compat, COMPATS)
        one_of("emphasis", emphasis, EMPHASES)
        syntax = one_of(
            "prompt syntax", syntax if syntax is not None else "plain" if compat == "diffusers" else "a1111", SYNTAXES
        )
        limited = compat == "diffusers" and syntax == "plain"
        one_of("network tags", network_tags, NETWORK_TAGS)
        self._check_text("prompt", prompt)
        prompt = self._without_networks(prompt, syntax, network_tags)
        positive = split_and(prompt) if syntax == "a1111" else (Segment(prompt, 1.0),)
        if len(positive) >= MAX_BRANCHES:
            raise UsageError(
                f"prompt: {len(positive)} parts between ANDs: expected at most {MAX_BRANCHES - 1}", "Join some of them."
            )
        for part in positive:
            _check_weight("prompt", part)
        guidance = tuple(cfg * part.weight for part in positive)
        parts = [self._part("prompt", part.text, steps, syntax, emphasis, limited) for part in positive]
        rest = 1 - sum(guidance)
        if rest != 0:
            self._check_text("negative prompt", negative)
            self._check_negative_networks(negative, network_tags)
            parts.insert(0, self._part("negative prompt", negative, steps, syntax, emphasis, limited))
            guidance = (rest, *guidance)
        contexts = len({tuple(part.text_at(step) for part in parts) for step in range(steps)})
        _check_in_all("prompts", contexts * len(parts) * max(part.length for part in parts))
        return Prompts(tuple(parts), guidance, rest != 0, skip, emphasis, steps, contexts)

    def encode(self, engine: Engine, prompts: Prompts) -> Conditioning:
        """Encode prompts that were read. Of the engine only `encode_text` is used. A cached chunk costs no call."""
        sets, set_of_step = self._sets(
            engine, prompts.parts, prompts.clip_skip, prompts.steps, prompts.emphasis, guided=prompts.guided
        )
        return Conditioning(sets, set_of_step, (prompts.weights,) * prompts.steps, prompts.conditional)

    def _part(self, name: str, text: str, steps: int, syntax: str, emphasis: str, limited: bool) -> _Part:
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
        longest = max(map(len, chunks.values()))
        if limited and longest > 1:
            limit = self._tokenizer.text.tokens - 2
            raise UsageError(
                f"{name}: {len(self._tokenizer.tokens(text)):,} tokens; diffusers drops all after the first {limit}",
                "Shorten it, or choose the a1111 prompt syntax, which encodes any length.",
            )
        return _Part(schedule, {each: [*own, *[self._empty] * (longest - len(own))] for each, own in chunks.items()})

    def _sets(
        self, engine: Engine, parts: Sequence[_Part], skip: int, steps: int, emphasis: str, *, guided: bool
    ) -> tuple[tuple[Float, ...], tuple[int, ...]]:
        longest = max(part.length for part in parts)
        wanted = [chunk.tokens for part in parts for own in part.chunks.values() for chunk in own]
        if guided and max(part.length for part in parts[1:]) != parts[0].length:
            wanted.append(self._empty.tokens)
        encoded = self._encoded(engine, wanted, skip, at_once=min(len(parts) * longest, MOST_ROWS))
        contexts = [_contexts(part, encoded, emphasis) for part in parts]
        sets: list[Float] = []
        index_of: dict[tuple[str, ...], int] = {}
        set_of_step = []
        for step in range(steps):
            texts = tuple(part.text_at(step) for part in parts)
            if texts not in index_of:
                index_of[texts] = len(sets)
                branches = [of_text[text] for of_text, text in zip(contexts, texts, strict=True)]
                sets.append(self._stack(branches, encoded, guided))
            set_of_step.append(index_of[texts])
        return tuple(sets), tuple(set_of_step)

    def _stack(self, branches: list[Float], encoded: dict[tuple[int, ...], Float], guided: bool) -> Float:
        """Join branches `[t, C]` of different lengths into one `[G, T, C]`.

        This follows AUTOMATIC1111. First a shorter `AND` part repeats its last vector. Then the shorter side of the
        guidance is filled up with encoded empty chunks (the option "Pad prompt/negative prompt").
        """
        negative, positive = (branches[:1], branches[1:]) if guided else ([], branches)
        length = max(map(len, positive))
        positive = [np.concatenate([z, np.repeat(z[-1:], length - len(z), axis=0)]) for z in positive]
        sides = [*negative, *positive]
        longest = max(map(len, sides))
        missing = [(longest - len(z)) // self._tokenizer.text.tokens for z in sides]
        filled = [
            np.concatenate([z, *[encoded[self._empty.tokens]] * count]) if count else z
            for z, count in zip(sides, missing, strict=True)
        ]
        stacked: Float = np.stack(filled)
        stacked.flags.writeable = False
        return stacked

    def _encoded(
        self, engine: Engine, wanted: Iterable[tuple[int, ...]], skip: int, at_once: int
    ) -> dict[tuple[int, ...], Float]:
        """Encodings `[77, C]` of rows of tokens, without emphasis, from the cache or the engine.

        No call takes more rows than the branches of one set have chunks. So an engine that can denoise under that set
        can also encode it.
        """
        found: dict[tuple[int, ...], Float] = {}
        missing: list[tuple[int, ...]] = []
        with self._lock:
            for row in dict.fromkeys(wanted):
                if (skip, row) in self._cache:
                    self._cache.move_to_end((skip, row))
                    found[row] = self._cache[skip, row]
                else:
                    missing.append(row)
        for first in range(0, len(missing), at_once):
            rows = missing[first : first + at_once]
            tokens = np.array(rows, np.int64)
            contexts = engine.encode_text(tokens, skip)
            found.update(
                (row, context.copy()) for row, context in zip(rows, contexts, strict=True)
            )  # a view would keep the whole batch
        with self._lock:
            self._cache.update(((skip, row), found[row]) for row in missing)
            while len(self._cache) > CACHED_CHUNKS:
                self._cache.popitem(last=False)
        return found

    def _clip_skip(self, clip_skip: int | None) -> int:
        built = self._tokenizer.text.clip_skip
        if clip_skip is None:
            return built[0]
        if isinstance(clip_skip, bool) or clip_skip not in built:
            raise UsageError(
                f"clip skip {clip_skip!r}: the bundle was built with {', '.join(map(str, built))}",
                f"Choose one of these, or build the bundle with --clip-skip {clip_skip}.",
            )
        return clip_skip

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

    def _check_negative_networks(self, negative: str, network_tags: str) -> None:
        """In a negative prompt AUTOMATIC1111 takes tags for text, which is hardly what the user means."""

        def keep(kind: str, tag: str) -> bool:
            if kind in NETWORKS and network_tags == "refuse":
                raise self._refused("negative prompt", tag)
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


def _contexts(part: _Part, encoded: dict[tuple[int, ...], Float], emphasis: str) -> dict[str, Float]:
    """The context `[t, C]` of each text of a part: every token's vector times its emphasis, then the mean restored.

    The mean is that of one chunk over all texts of the part's schedule; a text counts as often as the schedule holds it
    (modules/sd_emphasis.py over the batch of modules/prompt_parser.py in AUTOMATIC1111). Without prompt editing it is
    the chunk's own mean.
    """
    texts = list(part.chunks)
    counts = Counter(text for _, text in part.schedule)
    times = np.array([counts[text] for text in texts], np.float64)
    columns = []
    for chunks in zip(*part.chunks.values(), strict=True):
        z = np.stack([encoded[chunk.tokens] for chunk in chunks])
        weights = np.array([chunk.weights for chunk in chunks])
        if emphasis in ("original", "no norm") and (weights != 1).any():
            weighted = z * weights[:, :, None]
            old, new = (times @ x.mean(axis=(1, 2), dtype=np.float64) for x in (z, weighted))
            z = (weighted * (old / new) if emphasis == "original" and new != 0 else weighted).astype(np.float32)
        columns.append(z)
    return dict(zip(texts, np.concatenate(columns, axis=1), strict=True))


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
