"""AUTOMATIC1111's prompt syntax, in the order in which it is read: AND, prompt editing and alternation, emphasis and
BREAK.

Pure text to text: no tokens, no arrays. No text makes these functions raise: as in AUTOMATIC1111, whatever does not
parse is text. Every function takes time linear in the length of the prompt, and none recurses, so no prompt is too long
or too deeply nested. docs/prompts.md describes the syntax. Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath

HUGE = 1e30
"""Weights saturate here, so that they stay finite. `TextConditioner` refuses far smaller weights."""

_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\bBREAK\b")
_PART_WEIGHT = re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)")
_ATTENTION = re.compile(r"\\[()\[\]\\]?|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
_EDITING = re.compile(r"[()\[\]:|]|(?:[^\\()\[\]:|]++|\\.)++|\\")
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_NETWORK = re.compile(r"<(\w+):(?=[^>])")

_EXACT_DEPTH = 64

NETWORKS = ("lora", "lyco", "hypernet")
"""Kinds of `<kind:...>` that load an adapter in AUTOMATIC1111. Tags of all other kinds are dropped from a prompt."""


@dataclass(frozen=True)
class Segment:
    """Text with one emphasis, or `BREAK`."""

    text: str
    weight: float


BREAK = Segment("BREAK", -1.0)
"""Ends a chunk. Within brackets the marker's weight is multiplied like any other weight; then it is only the word
BREAK. AUTOMATIC1111 does that too.
"""


def split_and(prompt: str) -> tuple[Segment, ...]:
    """The parts between `AND`s and their weights: `text :1.2`, or 1 where no weight is given. A prompt without `AND` is
    one part, its `:1.2` included.
    """
    return tuple(map(_part, _AND.split(prompt)))


def _part(text: str) -> Segment:
    text = text.rstrip()
    before, colon, after = text.rpartition(":")
    number = after.strip()
    if colon and _PART_WEIGHT.fullmatch(number):
        return Segment(before.rstrip(), _saturated(float(number)))
    return Segment(text, 1.0)


def without_networks(prompt: str, keep: Callable[[str, str], bool]) -> str:
    """Remove every `<kind:arguments>` from a prompt, as AUTOMATIC1111 does before it encodes one. A tag stays if
    `keep(kind, whole text)` is true.
    """
    kept, done = [], 0
    for kind, start, end in _networks(prompt):
        if not keep(kind, prompt[start:end]):
            kept.append(prompt[done:start])
            done = end
    return "".join([*kept, prompt[done:]])


def network_tag(kind: str, file: str, scale: float, te_scale: float | None) -> str:
    """The tag with which a prompt of AUTOMATIC1111 loads an adapter file, a lora or hypernetwork. The text encoder's
    strength comes first.
    """
    both = f"{scale:g}" if te_scale in (None, scale) else f"{te_scale:g}:{scale:g}"
    return f"<{'lora' if kind == 'lora' else 'hypernet'}:{network_name(file)}:{both}>"


def network_name(file: str) -> str:
    """The name of an adapter file in a tag: without its ending, and without characters that would end the tag."""
    return "".join("_" if c in "<>:" or not c.isprintable() else c for c in PurePath(file).stem)


@dataclass(frozen=True)
class NetworkTag:
    """The content of a `<lora:name:te:unet>` or `<hypernet:name:scale>`. `scale` is the strength for the UNet, or the
    hypernetwork's.
    """

    kind: str
    name: str
    scale: float
    te_scale: float


def parse_network_tag(tag: str) -> NetworkTag | None:
    """Read a tag of one of the kinds in `NETWORKS`. None if AUTOMATIC1111 cannot read its form.

    The first number is the text encoder's strength, 1 if left out. The second is the UNet's; left out, it equals the
    first. Both may be named instead: `te=0.5` and `unet=0.8`.
    """
    kind, *items = tag[1:-1].split(":")
    if kind not in NETWORKS:
        return None
    named = dict(item.split("=", 1) for item in items if "=" in item)
    placed = [item for item in items if "=" not in item]
    if not placed or named.keys() - {"te", "unet"} or len(placed) > 3:
        return None
    try:
        te_scale = float(named.get("te", placed[1] if len(placed) > 1 else 1.0))
        scale = float(named.get("unet", placed[2] if len(placed) > 2 else te_scale))
    except ValueError:
        return None
    return NetworkTag("hypernetwork" if kind == "hypernet" else "lora", placed[0], scale, te_scale)


def _networks(prompt: str) -> Iterator[tuple[str, int, int]]:
    """Kind, start and end of every `<kind:arguments>`."""
    start = 0
    while match := _NETWORK.search(prompt, start):
        end = prompt.find(">", match.end())
        if end < 0:
            return
        start = end + 1
        yield match.group(1), match.start(), start


# Emphasis


class _Bracket:
    """A bracket. `factor` and `closed` are known only later: what it multiplies by, and when it closed. Multiplications
    happen in the order of `closed`.
    """

    def __init__(self, outer: _Bracket | None, factor: float) -> None:
        self.outer = outer
        self.depth: int = 1 if outer is None else outer.depth + 1
        self.factor = factor
        self.closed = math.inf
        self.product = 1.0


def parse_attention(prompt: str) -> tuple[Segment, ...]:
    r"""Text by weight: `(a)` is 1.1, `[a]` 1/1.1, `(a:1.3)` 1.3, nested ones multiply, `\(` is a bracket. `BREAK` may
    stand between them.

    An unclosed bracket reaches to the end. A closing bracket without a partner is text. A backslash before anything
    else vanishes. Neighbours of equal weight become one segment. A weight that is no number, as in `(a:1.2.3)`, is text
    in a plain bracket (AUTOMATIC1111 crashes there).
    """
    pieces: list[tuple[Segment, _Bracket | None, _Bracket | None]] = []
    brackets: list[_Bracket] = []
    round_: _Bracket | None = None
    square: _Bracket | None = None

    def add(text: str, weight: float = 1.0) -> None:
        pieces.append((Segment(text, weight), round_, square))

    for index, match in enumerate(_ATTENTION.finditer(prompt)):
        token, number = match.group(), match.group(1)
        if token[0] == "\\":
            add(token[1:])
        elif token == "(":
            round_ = _Bracket(round_, 1.1)
            brackets.append(round_)
        elif token == "[":
            square = _Bracket(square, 1 / 1.1)
            brackets.append(square)
        elif token[-1] == ")" and round_ is not None:
            weight = _number(number)
            if weight is not None:
                round_.factor = weight
            elif number is not None:
                add(token[:-1])
            round_.closed, round_ = index, round_.outer
        elif token == "]" and square is not None:
            square.closed, square = index, square.outer
        else:
            texts = _BREAK.split(token)
            for i, text in enumerate(texts):
                if i > 0:
                    add(BREAK.text, BREAK.weight)
                    text = text.lstrip()
                add(text.rstrip() if i + 1 < len(texts) else text)
    for bracket in brackets:  # outer ones first
        bracket.product = _saturated(bracket.factor * (1.0 if bracket.outer is None else bracket.outer.product))
    weighed = [Segment(segment.text, _weight(segment.weight, opened, squared)) for segment, opened, squared in pieces]
    merged = tuple(
        Segment("".join(segment.text for segment in run), weight)
        for weight, run in groupby(weighed, key=lambda segment: segment.weight)
    )
    return merged or (Segment("", 1.0),)


def _weight(weight: float, round_: _Bracket | None, square: _Bracket | None) -> float:
    """`weight` times the brackets around it, in the order in which they close. The order matters: the last bit can
    decide whether neighbours merge.

    Brackets nested deeper than anyone writes are multiplied from the outside in, which needs no walk through all of
    them.
    """
    around = [bracket for bracket in (round_, square) if bracket is not None]
    if sum(bracket.depth for bracket in around) > _EXACT_DEPTH:
        for bracket in around:
            weight = _saturated(weight * bracket.product)
        return weight
    chain = []
    for bracket in around:
        each: _Bracket | None = bracket
        while each is not None:
            chain.append(each)
            each = each.outer
    for each in sorted(chain, key=lambda bracket: bracket.closed):  # stable: unclosed round brackets before square ones
        weight = _saturated(weight * each.factor)
    return weight


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else _saturated(float(text))
    except ValueError:
        return None


def _saturated(weight: float) -> float:
    return max(-HUGE, min(HUGE, weight))


# Prompt editing and alternation


@dataclass(frozen=True)
class _Group:
    """The text of brackets that change nothing from step to step, brackets included."""

    items: list[_Item]


@dataclass(frozen=True)
class _Edit:
    """`[before:after:when]`: `before` up to and including step `when`."""

    before: list[_Item]
    after: list[_Item]
    when: int


@dataclass(frozen=True)
class _Alternation:
    """`[a|b|c]`: each step the next one."""

    options: list[list[_Item]]


_Item = str | _Group | _Edit | _Alternation


class _Open:
    """A bracket that has not ended yet: its parts and the separators between them. `start` is where its last part
    begins in the prompt.
    """

    def __init__(self, bracket: str, start: int) -> None:
        self.bracket = bracket
        self.parts: list[list[_Item]] = [[]]
        self.separators = ""
        self.start = start


def schedule_edits(prompt: str, steps: int) -> tuple[tuple[int, str], ...]:
    """The texts a prompt goes through, as pairs (last step, text). Steps count from 1 to `steps`, as in AUTOMATIC1111.

    `[a:b:when]`, `[b:when]` and `[a::when]` change at a fraction of `steps` where `when` has a point, else at that
    step. `[a|b]` changes with every step. These forms nest. Brackets of any other form are text that `parse_attention`
    reads. A `|` outside of square brackets, or a backslash with nothing to escape, leaves the whole prompt as text.
    Neighbouring texts may be equal.
    """
    items = _parse_edits(prompt, steps)
    if items is None:
        return ((steps, prompt),)
    changes, alternates = _changes(items)
    ends = set(range(1, steps + 1)) if alternates else {steps, *(when for when in changes if when >= 1)}
    return tuple((end, _text_at(items, end)) for end in sorted(ends))


def _parse_edits(prompt: str, steps: int) -> list[_Item] | None:
    """Items at the top level, or None where AUTOMATIC1111's grammar has no reading.

    A bracket counts as one only if all brackets within it do. Any other bracket is text, and so are the brackets around
    it. One pass with a stack therefore reads the same as the grammar.
    """
    top: list[_Item] = []
    stack: list[_Open] = []
    for match in _EDITING.finditer(prompt):
        token = match.group()
        if token == "\\":
            return None
        if token in ("(", "["):
            stack.append(_Open(token, match.end()))
        elif token in (")", "]"):
            closed = _closed(stack[-1], token, prompt[stack[-1].start : match.start()], steps) if stack else None
            if closed is not None:
                stack.pop()
                (stack[-1].parts[-1] if stack else top).append(closed)
            elif not _flatten(stack, top):
                return None
            else:
                top.append(token)
        elif token in (":", "|") and stack:
            stack[-1].parts.append([])
            stack[-1].separators += token
            stack[-1].start = match.end()
        elif token == "|":
            return None
        else:
            (stack[-1].parts[-1] if stack else top).append(token)
    return top if _flatten(stack, top) else None


def _closed(opened: _Open, token: str, last: str, steps: int) -> _Item | None:
    """Decide what a bracket is when it closes; None if only text. `last` is the raw text of its last part."""
    parts, separators = opened.parts, opened.separators
    if opened.bracket == "(":
        if token != ")" or separators not in ("", ":"):
            return None
        return _Group(["(", *parts[0], *([":", *parts[1]] if separators else []), ")"])
    if token != "]":
        return None
    if not separators:
        return _Group(["[", *parts[0], "]"])
    if set(separators) == {"|"}:
        return _Alternation(parts)
    if separators in (":", "::") and (number := _WHEN.fullmatch(last)):
        before = parts[0] if separators == "::" else []
        return _Edit(before, parts[-2], _when(number.group(1), steps))
    return None


def _when(number: str, steps: int) -> int:
    value = float(number) * (steps if "." in number else 1)
    return int(max(-1.0, min(float(steps), value)))


def _flatten(stack: list[_Open], top: list[_Item]) -> bool:
    """Turn brackets that are only text into text at the top level, the only place for such text. False if such a
    bracket holds a `|`, which is not allowed there.
    """
    for opened in stack:
        if "|" in opened.separators:
            return False
        top.append(opened.bracket)
        for i, part in enumerate(opened.parts):
            if i > 0:
                top.append(":")
            top.extend(part)
    stack.clear()
    return True


def _changes(items: list[_Item]) -> tuple[set[int], bool]:
    """Steps at which an edit takes place, and whether anything alternates."""
    changes: set[int] = set()
    alternates = False
    waiting: list[_Item] = list(items)
    while waiting:
        item = waiting.pop()
        if isinstance(item, _Group):
            waiting += item.items
        elif isinstance(item, _Edit):
            changes.add(item.when)
            waiting += item.before
            waiting += item.after
        elif isinstance(item, _Alternation):
            alternates = True
            for option in item.options:
                waiting += option
    return changes, alternates


def _text_at(items: list[_Item], step: int) -> str:
    texts: list[str] = []
    waiting: list[_Item] = items[::-1]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, _Group):
            waiting += reversed(item.items)
        elif isinstance(item, _Edit):
            waiting += reversed(item.before if step <= item.when else item.after)
        else:
            waiting += reversed(item.options[(step - 1) % len(item.options)])
    return "".join(texts)
