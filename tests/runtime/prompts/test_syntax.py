"""AUTOMATIC1111's prompt syntax: its documented examples, its rules written out in the plainest way, and texts made to
break a parser.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdrt.runtime.prompts.syntax import (
    BREAK,
    HUGE,
    NetworkTag,
    Segment,
    network_tag,
    parse_attention,
    parse_network_tag,
    schedule_edits,
    split_and,
    without_networks,
)

SYNTAX = st.sampled_from(
    [
        "(",
        ")",
        "[",
        "]",
        ":",
        "|",
        "\\",
        "\\(",
        "\\\\",
        ":1.3)",
        ":.5",
        ":3]",
        ": 0.5 ]",
        "::2]",
        " BREAK ",
        "BREAK",
        " AND ",
        "a",
        "b c",
        ", ",
        "\n",
        "1",
        "-2",
        "é",
        "日",
        "[a|b]",
        "<lora:x:1>",
    ]
)
PROMPTS = st.lists(SYNTAX, max_size=20).map("".join) | st.text(max_size=30)


def pairs(prompt: str) -> list[tuple[str, float]]:
    return [(segment.text, segment.weight) for segment in parse_attention(prompt)]


# Emphasis


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("\\(literal\\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        ("", [("", 1.0)]),
        ("((((", [("", 1.0)]),
        ("a]b)c", [("a]b)c", 1.0)]),
        ("[a", [("a", 1 / 1.1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("a:1.3)", [("a:1.3)", 1.0)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(a:+2)(b:0)", [("a", 2.0), ("b", 0.0)]),
        ("([a)b]", [("a", 1.1 * (1 / 1.1)), ("b", 1 / 1.1)]),
        ("\\\\(a)", [("\\", 1.0), ("a", 1.1)]),
        ("a\\b\\", [("ab", 1.0)]),
        ("(a\\)b)", [("a)b", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3) b", [("a:1.2.3", 1.1), (" b", 1.0)]),  # AUTOMATIC1111 raises ValueError
        ("(a:.)", [("a:.", 1.1)]),
    ],
)
def test_emphasis(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert pairs(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [Segment("a", 1.0), BREAK, Segment("b", 1.0)]),
        ("a  \n BREAK\tb", [Segment("a", 1.0), BREAK, Segment("b", 1.0)]),
        ("BREAK", [Segment("", 1.0), BREAK, Segment("", 1.0)]),
        ("BREAK BREAK", [Segment("", 1.0), BREAK, Segment("", 1.0), BREAK, Segment("", 1.0)]),
        ("aBREAK BREAKb break", [Segment("aBREAK BREAKb break", 1.0)]),
        ("(a) BREAK (b)", [Segment("a", 1.1), Segment("", 1.0), BREAK, Segment("", 1.0), Segment("b", 1.1)]),
        ("(a BREAK b)", [Segment("a", 1.1), Segment("BREAK", -1.1), Segment("b", 1.1)]),
    ],
)
def test_break(prompt: str, expected: list[Segment]) -> None:
    assert list(parse_attention(prompt)) == expected


def plain_attention(prompt: str) -> list[tuple[str, float]]:
    """The rules as they are told: every bracket that closes multiplies all pieces since it opened, and the open ones
    close at the end.
    """
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(first: int, factor: float) -> None:
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]

    while prompt:
        weight = re.match(r":\s*([+-]?[.\d]+)\s*\)", prompt)
        run = re.match(r"[^\\()\[\]:]+", prompt)
        size = 1
        if prompt[0] == "\\":
            size = 2 if prompt[1:2] in tuple("()[]\\") else 1
            pieces.append((prompt[1:size], 1.0))
        elif prompt[0] in "([":
            opened[prompt[0]].append(len(pieces))
        elif weight and opened["("]:
            size = weight.end()
            multiply(opened["("].pop(), float(weight[1]))
        elif prompt[0] == ")" and opened["("]:
            multiply(opened["("].pop(), 1.1)
        elif prompt[0] == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / 1.1)
        else:
            size = weight.end() if weight else run.end() if run else 1
            for i, text in enumerate(re.split(r"\s*\bBREAK\b\s*", prompt[:size])):
                pieces += [("BREAK", -1.0), (text, 1.0)] if i else [(text, 1.0)]
        prompt = prompt[size:]
    for kind, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for first in opened[kind]:
            multiply(first, factor)
    merged: list[tuple[str, float]] = []
    for text, weight_ in pieces:
        if merged and merged[-1][1] == weight_:
            merged[-1] = (merged[-1][0] + text, weight_)
        else:
            merged.append((text, weight_))
    return merged or [("", 1.0)]


@settings(max_examples=600, deadline=None, derandomize=True)
@example("\\")
@example("((a)[(b)]([((c:1.3))]d)")
@example("(((a [b (c:1.7) d] e)) f [g")
@given(prompt=PROMPTS)
def test_emphasis_against_the_rules(prompt: str) -> None:
    assert pairs(prompt) == plain_attention(prompt)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    prompt=st.lists(st.sampled_from([*"()[]:|\\ a1.", ":1.3)", ":9999999999)", ":2", " AND "]), max_size=100).map(
        "".join
    )
)
def test_weights_are_positive_and_finite(prompt: str) -> None:
    for segment in (*parse_attention(prompt), *split_and(prompt)):
        assert 0 < segment.weight < math.inf


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    prompt=st.text(st.characters(exclude_characters="()[]\\:|<")).filter(
        lambda text: "BREAK" not in text and "AND" not in text
    )
)
def test_text_without_syntax_is_kept(prompt: str) -> None:
    assert pairs(prompt) == [(prompt, 1.0)]
    assert schedule_edits(prompt, 20) == ((20, prompt),)
    assert split_and(prompt) == (Segment(prompt.rstrip(), 1.0),)
    assert without_networks(prompt, lambda *_: False) == prompt


def test_weights_saturate() -> None:
    assert pairs("(a:" + "9" * 400 + ")") == [("a", HUGE)]
    assert pairs("((a:" + "9" * 400 + "):0)") == [("a", 0.0)]
    assert pairs("(" * 5000 + "a") == [("a", HUGE)]
    assert pairs("[" * 5000 + "a")[0][1] >= 0
    assert split_and("a:" + "9" * 400) == (Segment("a", HUGE),)


def test_deep_brackets() -> None:
    """Beyond the depth where the order of multiplication is kept to the last bit."""
    ((text, weight),) = pairs("([" * 100 + "(a:1.5)")
    assert text == "a" and weight == pytest.approx(1.5, rel=1e-12)
    ((text, weight),) = pairs("(" * 70 + "a" + ")" * 70)
    assert text == "a" and weight == pytest.approx(1.1**70, rel=1e-12)


# AND


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a dog: -0.5 AND fish:3.", [("a cat", 1.2), (" a dog", -0.5), (" fish", 3.0)]),
        ("a cat:2", [("a cat", 2.0)]),  # a weight without AND counts too
        ("16:9", [("16", 9.0)]),
        ("a:1.5:.25", [("a:1.5", 0.25)]),
        ("a::2", [("a:", 2.0)]),
        (":2", [("", 2.0)]),
        ("(a:1.2)", [("(a:1.2)", 1.0)]),
        ("a : 1 . 5", [("a : 1 . 5", 1.0)]),
        ("a\n:\n2\n AND\nb", [("a", 2.0), ("\nb", 1.0)]),
        ("SAND ANDY and aAND", [("SAND ANDY and aAND", 1.0)]),
        ("AND", [("", 1.0), ("", 1.0)]),
        ("", [("", 1.0)]),
        ("a:1e3", [("a:1e3", 1.0)]),
        ("a\u00a0:\x1c.5\u2003", [("a", 0.5)]),  # whitespace that float() would not take
        ("a:٣", [("a", 3.0)]),
    ],
)
def test_and(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert [(part.text, part.weight) for part in split_and(prompt)] == expected


# Prompt editing


ALTERNATE = [(i, "female" if i % 2 else "male") for i in range(1, 11)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(10, "a [{b|d{:.5] c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[fe|]male", ALTERNATE),
        ("[fe|||]male", [(i, "female" if i % 4 == 1 else "male") for i in range(1, 11)]),
        ("[a|(b:1.1)]", [(i, "a" if i % 2 else "(b:1.1)") for i in range(1, 11)]),
    ],
)
def test_editing_as_documented(prompt: str, expected: list[tuple[int, str]]) -> None:
    assert list(schedule_edits(prompt, 10)) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("[a::5]", [(5, "a"), (10, "")]),
        ("[:a:5]", [(5, ""), (10, "a")]),
        ("[::5]", [(5, ""), (10, "")]),
        ("[:5]", [(5, ""), (10, "")]),
        ("[a:10]", [(10, "")]),
        ("[a:99]", [(10, "")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-3]", [(10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),  # a point makes it a fraction
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:0.29]", [(2, "a"), (10, "b")]),
        ("[a:b:3.]", [(10, "a")]),
        ("[a:b:1e0]", [(1, "a"), (10, "b")]),
        ("[a:b:1e999]", [(10, "a")]),
        ("[a:b:-1e999]", [(10, "b")]),
        ("[a:b:\n.5\t]", [(5, "a"), (10, "b")]),
        ("[a:3 4]", [(10, "[a:3 4]")]),
        ("[a:3x]", [(10, "[a:3x]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:b:c:3] [d:3]", [(3, "[a:b:c:3] "), (10, "[a:b:c:3] d")]),
        ("[a:[b:3]", [(3, "[a:"), (10, "[a:b")]),
        ("[[a:3]:b:c:d:5]", [(3, "[:b:c:d:5]"), (10, "[a:b:c:d:5]")]),
        ("[a (b:3]", [(10, "[a (b:3]")]),
        ("[a) b:3]", [(10, "[a) b:3]")]),
        ("[(a:b):c:3]", [(3, "(a:b)"), (10, "c")]),
        ("[(a:b:c):d:3]", [(10, "[(a:b:c):d:3]")]),
        ("\\[a:b:3]", [(10, "\\[a:b:3]")]),
        ("[a\\:b:3]", [(3, ""), (10, "a\\:b")]),
        ("[a:b:3\\]", [(10, "[a:b:3\\]")]),
        ("[a:b:3]\\", [(10, "[a:b:3]\\")]),  # nothing to escape: no reading of the whole
        ("[a:b:3]\\\n", [(10, "[a:b:3]\\\n")]),
        ("[a:b:3] c | d", [(10, "[a:b:3] c | d")]),
        ("[a:b:3] (c|d)", [(10, "[a:b:3] (c|d)")]),
        ("[a|b:3]", [(10, "[a|b:3]")]),
        ("[a|b", [(10, "[a|b")]),
        ("[[a|b]", [(i, "[a" if i % 2 else "[b") for i in range(1, 11)]),
        ("[a|[b|c]]", [(i, "a" if i % 2 else "c") for i in range(1, 11)]),
        ("[[a|b]:c:2]", [(1, "a"), (2, "b"), *((i, "c") for i in range(3, 11))]),
        ("[|]", [(i, "") for i in range(1, 11)]),
        ("(a)[b](c:1.3)", [(10, "(a)[b](c:1.3)")]),
        ("x]y)z:(", [(10, "x]y)z:(")]),
    ],
)
def test_editing(prompt: str, expected: list[tuple[int, str]]) -> None:
    """Each was read once by lark under AUTOMATIC1111's grammar, with this result."""
    assert list(schedule_edits(prompt, 10)) == expected


def test_fractions_count_the_steps_there_are() -> None:
    assert schedule_edits("[a:b:0.5]", 7) == ((3, "a"), (7, "b"))
    assert schedule_edits("[a:b:0.5]", 1) == ((1, "b"),)
    assert schedule_edits("[a:b:5]", 3) == ((3, "a"),)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(prompt=PROMPTS, steps=st.integers(1, 12))
def test_a_schedule_covers_all_steps(prompt: str, steps: int) -> None:
    schedule = schedule_edits(prompt, steps)
    ends = [end for end, _ in schedule]
    assert ends == sorted(set(ends)) and ends[0] >= 1 and ends[-1] == steps
    if not re.search(r"\[.*[:|].*\]", prompt, re.DOTALL):
        assert schedule == ((steps, prompt),)


# Adapters


@pytest.mark.parametrize(
    ("prompt", "expected", "left"),
    [
        (
            "a <lora:x:0.8> b <hypernet:y>",
            [("lora", "<lora:x:0.8>"), ("hypernet", "<hypernet:y>")],
            "a  b <hypernet:y>",
        ),
        ("<lora:a<lora:b>", [("lora", "<lora:a<lora:b>")], ""),
        ("<lora:> <lora> <:x> < lora:x> <lora:x", [], "<lora:> <lora> <:x> < lora:x> <lora:x"),
        ("<3: x > y", [("3", "<3: x >")], " y"),
    ],
)
def test_tags_are_found_and_taken_out(prompt: str, expected: list[tuple[str, str]], left: str) -> None:
    found: list[tuple[str, str]] = []

    def keep(kind: str, tag: str) -> bool:
        found.append((kind, tag))
        return kind == "hypernet"

    assert without_networks(prompt, keep) == left
    assert found == expected


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:x>", NetworkTag("lora", "x", 1, 1)),
        ("<lora:x:0.8>", NetworkTag("lora", "x", 0.8, 0.8)),
        ("<lora:x:0.5:0.8>", NetworkTag("lora", "x", 0.8, 0.5)),
        ("<lyco:x:unet=0.8>", NetworkTag("lora", "x", 0.8, 1)),
        ("<lora:x:te=0.5:unet=0.8>", NetworkTag("lora", "x", 0.8, 0.5)),
        ("<hypernet:a b:.5>", NetworkTag("hypernetwork", "a b", 0.5, 0.5)),
        ("<lora:x:much>", None),
        ("<lora:x:1:1:8>", None),
        ("<lora:x:dyn=8>", None),
        ("<wild:x:1>", None),
    ],
)
def test_what_a_tag_asks_for(tag: str, expected: NetworkTag | None) -> None:
    assert parse_network_tag(tag) == expected


@pytest.mark.parametrize(
    ("kind", "scale", "te_scale"),
    [("lora", 0.8, 0.8), ("lora", 1.0, 0.25), ("lora", -1.5, 0.0), ("hypernetwork", 0.5, None)],
)
def test_a_tag_that_is_written_is_read(kind: str, scale: float, te_scale: float | None) -> None:
    read = parse_network_tag(network_tag(kind, "folder/a:b<1>.v2.safetensors", scale, te_scale))
    assert read == NetworkTag(kind, "a_b_1_.v2", scale, scale if te_scale is None else te_scale)


# Texts made to break a parser

LONG = 20_000
HOSTILE: dict[str, Callable[[int], str]] = {
    "round": lambda n: "(" * n,
    "round, text": lambda n: "(a" * (n // 2),
    "square, text": lambda n: "[a" * (n // 2),
    "both": lambda n: "([" * (n // 2),
    "edits": lambda n: "[a:" * (n // 6) + "b" + ":3]" * (n // 6),
    "open edits": lambda n: "[a:" * (n // 3),
    "alternations": lambda n: "[a|b]" * (n // 5),
    "deep alternations": lambda n: "[a|" * (n // 4) + "b" + "]" * (n // 4),
    "balanced": lambda n: "(" * (n // 2) + "a" + ")" * (n // 2),
    "crossing": lambda n: "(a[b:3:4)" * (n // 9),
    "spaces": lambda n: " " * n + "BREAK",
    "spaces after a colon": lambda n: ("(a:" + " " * n + "1") * 2,
    "weight": lambda n: "(a:" + "9" * n + ")",
    "and": lambda n: "AND " * (n // 4),
    "and weight": lambda n: "a" + " " * n + ":2" + " " * n + "x",
    "backslashes": lambda n: "\\" * n,
    "tags": lambda n: "<a:" * (n // 3),
    "colons": lambda n: ": " * (n // 2),
    "letters": lambda n: "a" * n,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_t10_hostile_prompts_end(name: str) -> None:
    """No recursion, and nothing quadratic, which would show as minutes."""
    prompt = HOSTILE[name](LONG)
    parse_attention(prompt)
    split_and(prompt)
    without_networks(prompt, lambda *_: False)
    assert schedule_edits(prompt, 20)[-1][0] == 20


def test_random_brackets_keep_their_text() -> None:
    """Whatever the brackets, no other character is lost or moved."""
    random_ = random.Random(5)
    for _ in range(300):
        prompt = "".join(random_.choice("()[]ab ") for _ in range(random_.randint(0, 40)))
        kept = "".join(segment.text for segment in parse_attention(prompt))
        assert re.sub(r"[()\[\]]", "", kept) == re.sub(r"[()\[\]]", "", prompt)
        assert schedule_edits(prompt, 9) == ((9, prompt),)
