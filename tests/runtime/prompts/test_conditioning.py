"""Prompts to contexts: against a torch text encoder with AUTOMATIC1111's chunks and emphasis written out, and with an
engine that counts its calls.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from reference import relative

from sdrt.bundle.folder import open_bundle
from sdrt.bundle.manifest import Source, Vector
from sdrt.errors import UsageError
from sdrt.runtime.backend import load_engine
from sdrt.runtime.engine import Float
from sdrt.runtime.prompts.conditioning import CACHED_CHUNKS, Conditioning, TextConditioner
from sdrt.runtime.prompts.tokenizer import Tokenizer

BOS, EOS = 49406, 49407
WIDTH = 5


class CountingEngine:
    """Each token's vector is a made-up function of its id and its place; `calls` holds how many rows each call had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        assert tokens.dtype == np.int64 and tokens.shape[::2] == (1, 77)
        self.calls.append(tokens.shape[1])
        return vectors(tokens[0], clip_skip), np.zeros((tokens.shape[1], 0), np.float32)


def vectors(tokens: NDArray[np.int64], clip_skip: int = 1) -> Float:
    places = np.arange(77 * WIDTH).reshape(77, WIDTH)
    return (np.sin(tokens[:, :, None] * 0.37 + places * clip_skip) + 1.5).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer(flat_bundle: Path) -> Tokenizer:
    bundle = open_bundle(flat_bundle)
    return Tokenizer(bundle.file("tokenizer/tokenizer.json"), [replace(bundle.manifest.text[0], clip_skip=(1, 2))])


@pytest.fixture
def engine() -> Any:
    return CountingEngine()


@pytest.fixture
def conditioner(tokenizer: Tokenizer) -> TextConditioner:
    return TextConditioner(tokenizer)


def encode(conditioner: TextConditioner, engine: Any, prompt: str, negative: str = "", **options: Any) -> Conditioning:
    return conditioner.encode(engine, conditioner.read(prompt, negative, **options))


def row(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    ids = tokenizer.tokens(text)
    return np.array([[BOS, *ids, *[EOS] * (76 - len(ids))]])


def plain(tokenizer: Tokenizer, text: str) -> Float:
    return vectors(row(tokenizer, text))[0]


# Branches, sets and steps


def test_guided(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    found = encode(conditioner, engine, "red apple", "blue", steps=3, cfg=7)
    assert len(found.sets) == 1 and found.set_of_step == (0, 0, 0) and found.weights == ((-6.0, 7.0),) * 3
    assert found.sets[0]["context"].dtype == np.float32 and not found.sets[0]["context"].flags.writeable
    np.testing.assert_array_equal(found.sets[0]["context"], [plain(tokenizer, "blue"), plain(tokenizer, "red apple")])
    assert engine.calls == [2]


def test_unguided(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """At guidance scale 1 the negative prompt has no weight, so it is not even read."""
    found = encode(conditioner, engine, "red apple", "\ud800", steps=2, cfg=1)
    assert found.weights == ((1.0,),) * 2 and engine.calls == [1]
    np.testing.assert_array_equal(found.sets[0]["context"], [plain(tokenizer, "red apple")])


def test_and(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    found = encode(conditioner, engine, "red apple :0.5 AND green pear:1.5", "blue", steps=1, cfg=3)
    assert found.weights == ((-5.0, 1.5, 4.5),)
    np.testing.assert_array_equal(
        found.sets[0]["context"], [plain(tokenizer, text) for text in ("blue", "red apple", "green pear")]
    )
    assert encode(conditioner, engine, "a AND b", steps=1, cfg=1).weights == ((-1.0, 1.0, 1.0),)
    assert encode(conditioner, engine, "a AND b:-0.5", steps=1, cfg=2).weights == (
        (2.0, -1.0),
    )  # these sum to 1 without a negative


def test_editing(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """Steps are counted from 0 and compared with what the prompt counts from 1, as AUTOMATIC1111 does."""
    found = encode(conditioner, engine, "[red:green:2] apple", "[x:0.5]", steps=4, cfg=2)
    assert found.set_of_step == (0, 0, 0, 1)
    np.testing.assert_array_equal(found.sets[0]["context"], [plain(tokenizer, ""), plain(tokenizer, "red apple")])
    np.testing.assert_array_equal(found.sets[1]["context"], [plain(tokenizer, "x"), plain(tokenizer, "green apple")])
    assert engine.calls == [2, 2]  # never more rows than an engine for two branches of one chunk takes
    assert encode(conditioner, engine, "[red|green]", steps=6, cfg=1).set_of_step == (0, 0, 1, 0, 1, 0)
    assert encode(conditioner, engine, "[red::1] AND [a|red|b]", steps=5, cfg=1).set_of_step == (0, 0, 1, 2, 3)


def test_syntax_plain(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    text = "(red:1.3) [a|b] AND [c:3] BREAK x:2"
    for options in ({"syntax": "plain"}, {"compat": "diffusers"}):
        found = encode(conditioner, engine, text, steps=3, cfg=1, **options)  # type: ignore[arg-type]
        assert found.weights == ((1.0,),) * 3 and len(found.sets) == 1
        np.testing.assert_array_equal(found.sets[0]["context"], [plain(tokenizer, text)])
    assert len(encode(conditioner, engine, text, steps=3, cfg=1, compat="diffusers", syntax="a1111").weights[0]) == 3


def test_clip_skip(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    first = encode(conditioner, engine, "a", steps=1, cfg=1)
    second = encode(conditioner, engine, "a", steps=1, cfg=1, clip_skip=2)
    np.testing.assert_array_equal(
        first.sets[0]["context"], encode(conditioner, engine, "a", steps=1, cfg=1, clip_skip=1).sets[0]["context"]
    )
    np.testing.assert_array_equal(second.sets[0]["context"][0], vectors(row(tokenizer, "a"), 2)[0])
    assert engine.calls == [1, 1]


# Lengths


def test_long_prompts(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """The shorter side of the guidance is filled up with empty chunks, whichever it is."""
    long = "cat " * 75 + "dog"
    expected = np.concatenate([plain(tokenizer, "cat " * 75), plain(tokenizer, "dog")])
    filled = np.concatenate([plain(tokenizer, "red"), plain(tokenizer, "")])
    found = encode(conditioner, engine, long, "red", steps=1, cfg=2)
    np.testing.assert_array_equal(found.sets[0]["context"], [filled, expected])
    assert engine.calls == [4]
    np.testing.assert_array_equal(
        encode(conditioner, engine, "red", long, steps=1, cfg=2).sets[0]["context"], [expected, filled]
    )


def test_parts_of_different_lengths(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """A shorter `AND` part repeats its last vector, and only then is the negative prompt filled up."""
    dog, empty = plain(tokenizer, "dog"), plain(tokenizer, "")
    found = encode(conditioner, engine, "a BREAK b AND dog", "n", steps=1, cfg=2).sets[0]["context"]
    assert found.shape == (3, 154, WIDTH)
    np.testing.assert_array_equal(found[0], np.concatenate([plain(tokenizer, "n"), empty]))
    np.testing.assert_array_equal(found[1], np.concatenate([plain(tokenizer, "a"), plain(tokenizer, "b")]))
    np.testing.assert_array_equal(found[2], np.concatenate([dog, np.repeat(dog[-1:], 77, axis=0)]))
    found = encode(conditioner, engine, "a BREAK b AND dog", "n BREAK m BREAK o", steps=1, cfg=2).sets[0]["context"]
    np.testing.assert_array_equal(found[2], np.concatenate([dog, np.repeat(dog[-1:], 77, axis=0), empty]))


def test_edited_texts_of_different_lengths(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    found = encode(conditioner, engine, "[a: b BREAK c:1]", steps=4, cfg=1)
    assert [one["context"].shape for one in found.sets] == [(1, 154, WIDTH)] * 2 and found.set_of_step == (0, 0, 1, 1)
    np.testing.assert_array_equal(
        found.sets[0]["context"][0], np.concatenate([plain(tokenizer, "a"), plain(tokenizer, "")])
    )
    np.testing.assert_array_equal(
        found.sets[1]["context"][0], np.concatenate([plain(tokenizer, "b"), plain(tokenizer, "c")])
    )


def test_diffusers_has_one_chunk(conditioner: TextConditioner, engine: Any) -> None:
    encode(conditioner, engine, "cat " * 75, "dog " * 75, steps=1, cfg=2, compat="diffusers")
    with pytest.raises(UsageError, match=r"^prompt: 76 tokens; diffusers drops all after the first 75") as caught:
        encode(conditioner, engine, "cat " * 76, steps=1, cfg=2, compat="diffusers")
    assert caught.value.exit_code == 2 and "a1111" in caught.value.fix
    with pytest.raises(UsageError, match=r"^negative prompt: 100 tokens"):
        encode(conditioner, engine, "", "cat " * 100, steps=1, cfg=2, compat="diffusers")
    assert encode(conditioner, engine, "cat " * 76, steps=1, cfg=1, compat="diffusers", syntax="a1111").sets[0][
        "context"
    ].shape == (1, 154, WIDTH)
    assert encode(conditioner, engine, "cat " * 76, steps=1, cfg=1, syntax="plain").sets[0]["context"].shape == (
        1,
        154,
        WIDTH,
    )


# Emphasis


def weighed(tokenizer: Tokenizer, pieces: list[tuple[str, float]]) -> tuple[Float, Float]:
    """Encoding and weights of one chunk that is written as (text, weight)."""
    ids = [tokenizer.tokens(text) for text, _ in pieces]
    tokens = [BOS, *(token for piece in ids for token in piece)]
    weights = [1.0, *(weight for piece, (_, weight) in zip(ids, pieces, strict=True) for _ in piece)]
    fill = 77 - len(tokens)
    return (
        vectors(np.array([[*tokens, *[EOS] * fill]]))[0].astype(np.float64),
        np.array([*weights, *[1.0] * fill])[:, None],
    )


def test_emphasis_modes(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    z, w = weighed(tokenizer, [("red", 1.0), ("shiny apple", 1.5), ("pear", 1 / 1.1)])

    def weighted(emphasis: str) -> Float:
        return encode(conditioner, engine, "red (shiny apple:1.5) [pear]", steps=1, cfg=1, emphasis=emphasis).sets[0][
            "context"
        ][0]

    np.testing.assert_allclose(weighted("original"), z * w * (z.mean() / (z * w).mean()), rtol=1e-6)
    np.testing.assert_allclose(weighted("no norm"), z * w, rtol=1e-6)
    np.testing.assert_array_equal(weighted("ignore"), z)
    assert engine.calls == [1]  # one encoding serves them all
    np.testing.assert_array_equal(weighted("none"), plain(tokenizer, "red (shiny apple:1.5) [pear]"))


def test_the_mean_is_restored_by_chunk(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    found = encode(conditioner, engine, "(a:2) BREAK b BREAK (c:-1)", steps=1, cfg=1).sets[0]["context"][0]
    for i, (text, weight) in enumerate([("a", 2.0), ("b", 1.0), ("c", -1.0)]):
        z, w = weighed(tokenizer, [(text, weight)])
        np.testing.assert_allclose(found[i * 77 : (i + 1) * 77], z * w * (z.mean() / (z * w).mean()), rtol=1e-6)


def test_the_mean_is_shared_under_editing(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """Three texts, one of them twice: [1, a], [2, b], [3, (c)], [4, a]; one mean over all four."""
    found = encode(conditioner, engine, "[a|b|(c:2)]", steps=4, cfg=1)
    assert found.set_of_step == (0, 0, 1, 2)
    chunks = [weighed(tokenizer, [piece]) for piece in (("a", 1.0), ("b", 1.0), ("c", 2.0), ("a", 1.0))]
    old, new = (
        np.mean([each.mean() for each in column]) for column in ([z for z, _ in chunks], [z * w for z, w in chunks])
    )
    assert abs(old / new - 1) > 1e-3
    for i, (z, w) in enumerate(chunks[:3]):
        np.testing.assert_allclose(found.sets[i]["context"][0], z * w * (old / new), rtol=1e-6)


def test_a_mean_of_zero_cannot_be_restored(tokenizer: Tokenizer) -> None:
    class Balanced(CountingEngine):
        def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
            z = np.zeros((tokens.shape[1], 77, 2), np.float32)
            z[:, 1] = 1, 2
            z[:, 0] = -3, -3
            return z, z[:, 0, :0]

    found = encode(TextConditioner(tokenizer), Balanced(), "(a:2)", steps=1, cfg=1)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.sets[0]["context"][0][:2], [[-3, -3], [2, 4]])


# The cache


def test_asking_again_costs_nothing(conditioner: TextConditioner, engine: Any) -> None:
    prompt = "[red|green] (apple:1.2) AND pear BREAK tree"
    first = encode(conditioner, engine, prompt, "blue", steps=5, cfg=7)
    calls = list(engine.calls)
    again = encode(conditioner, engine, prompt, "blue", steps=5, cfg=7)
    assert engine.calls == calls
    for a, b in zip(first.sets, again.sets, strict=True):
        np.testing.assert_array_equal(a["context"], b["context"])
    encode(conditioner, engine, "pear BREAK (tree:1.4)", "(blue:0.9)", steps=9, cfg=3)  # the same chunks, other weights
    assert engine.calls == calls


def test_the_cache_forgets_what_was_used_longest_ago(conditioner: TextConditioner, engine: Any) -> None:
    def rows(prompt: str) -> int:
        before = sum(engine.calls)
        encode(conditioner, engine, prompt, steps=1, cfg=1)
        return sum(engine.calls) - before

    assert rows("first") == 1 and rows("second") == 1
    for i in range(CACHED_CHUNKS - 2):
        assert rows(f"a{i}") == 1
    assert rows("first") == 0  # moved to the front
    assert rows("one more") == 1
    assert rows("first") == 0 and rows("second") == 1
    parts = [
        " BREAK ".join(f"b{part}x{i}" for i in range(30)) for part in range(5)
    ]  # of five parts, and the negative prompt
    assert rows(" AND ".join(parts)) == 151 > CACHED_CHUNKS  # more than fits is still encoded whole


def test_pipelines_do_not_share(tokenizer: Tokenizer, engine: Any) -> None:
    for _ in range(2):
        encode(TextConditioner(tokenizer), engine, "a", steps=1, cfg=1)
    assert engine.calls == [1, 1]


def test_a_failed_call_leaves_nothing(conditioner: TextConditioner, engine: Any) -> None:
    class Failing(CountingEngine):
        def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
            raise MemoryError

    with pytest.raises(MemoryError):
        encode(conditioner, Failing(), "a", steps=1, cfg=1)  # type: ignore[arg-type]
    encode(conditioner, engine, "a", steps=1, cfg=1)
    assert engine.calls == [1]


def test_threads(tokenizer: Tokenizer) -> None:
    """Many at once, in a cache too small for them: each gets its own prompt's context."""
    conditioner, engine = TextConditioner(tokenizer), CountingEngine()
    prompts = [f"{word} {i}" for word in ("red", "green") for i in range(100)]
    expected = {prompt: plain(tokenizer, prompt) for prompt in prompts}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: encode(conditioner, engine, prompt, steps=1, cfg=1), prompts * 3))  # type: ignore[arg-type]
    for prompt, conditioning in zip(prompts * 3, found, strict=True):
        np.testing.assert_array_equal(conditioning.sets[0]["context"][0], expected[prompt])


# Bad input


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        ({"prompt": "\ud800"}, r"^prompt: not valid Unicode text", "surrogates"),
        ({"negative": "a \udfff"}, r"^negative prompt: not valid Unicode text", "surrogates"),
        ({"prompt": b"a"}, "^prompt: expected text, found bytes", ""),
        ({"negative": 7}, "^negative prompt: expected text, found int", ""),
        ({"clip_skip": 3}, "^clip skip 3: this bundle was built for 1, 2\n", "Choose one"),
        ({"clip_skip": True}, "^clip skip True: ", ""),
        ({"syntax": "plan"}, "^prompt syntax 'plan': unknown; did you mean 'plain'", "a1111, plain"),
        (
            {"emphasis": "no-norm"},
            "^emphasis 'no-norm': unknown; did you mean 'no norm'",
            "original, no norm, none, ignore",
        ),
        ({"compat": "difusers"}, "^compat 'difusers': unknown; did you mean 'diffusers'", "a1111, diffusers"),
        ({"prompt": "(a:1001)"}, "^prompt: 'a' has weight 1e\\+03: expected at most 1000", "smaller"),
        ({"prompt": "(" * 10_000 + "a"}, "^prompt: 'a' has weight 1e\\+30", "brackets"),
        ({"negative": "(a:-9999)"}, "^negative prompt: 'a' has weight -1e\\+04", "smaller"),
        ({"prompt": "cat AND dog:5000"}, "^prompt: ' dog' has weight 5e\\+03", "smaller"),
        (
            {"prompt": "a <lora:x:0.6>"},
            "^prompt: <lora:x:0.6>: adapters are baked in when a bundle is built; this one holds <lora:art:0.5:0.8> <hypernet:h:1>\n",
            "--network-tags ignore",
        ),
        ({"negative": "<hypernet:\x1b[2J>"}, "^negative prompt: <hypernet:.x1b.2J>: adapters", "--network-tags ignore"),
        (
            {"prompt": "<lyco:" + "y" * 500 + ">", "syntax": "plain"},
            "^prompt: <lyco:y{34}…: adapters",
            "--network-tags ignore",
        ),
        ({"prompt": "<wild:x>"}, "^prompt: <wild:x>: ", "--network-tags ignore"),
        ({"prompt": "<lora:art:0.8:0.5>"}, "^prompt: <lora:art:0.8:0.5>: ", "--network-tags ignore"),
        ({"network_tags": "drop"}, "^network tags 'drop': unknown", "refuse, ignore"),
    ],
)
def test_bad_input(tokenizer: Tokenizer, engine: Any, options: dict[str, Any], message: str, fix: str) -> None:
    sources = (
        Source("checkpoint", "m", ""),
        Source("lora", "art.safetensors", "", 0.8, 0.5),
        Source("hypernetwork", "h.pt", "", 1.0),
        Source("embedding", "e.pt", "", trigger="e"),
    )
    arguments = {"prompt": "", "negative": "", "steps": 2, "cfg": 7, **options}
    with pytest.raises(UsageError, match=message) as caught:
        encode(TextConditioner(tokenizer, sources), engine, **arguments)
    assert caught.value.exit_code == 2 and fix in caught.value.fix and str(caught.value).replace("\n", "").isprintable()
    assert engine.calls == []


def test_tags_that_are_text(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """AUTOMATIC1111 reads tags in the prompt only; the plain syntax reads none."""
    found = encode(conditioner, engine, "<wild:x>", "<wild:x>", steps=1, cfg=2, syntax="plain").sets[0]["context"]
    np.testing.assert_array_equal(found, [plain(tokenizer, "<wild:x>")] * 2)
    encode(conditioner, engine, "i <3 you", "<wild:x>", steps=1, cfg=2)
    with pytest.raises(UsageError, match="this one holds none"):
        encode(conditioner, engine, "<wild:x> <lora:y>", steps=1, cfg=2, syntax="plain")


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ("cat <lora:art:0.5:0.8><hypernet:h:1> dog", {}),  # what is built in, at the strength it is built in with
        ("cat <lora:third:0.333333> dog", {}),  # six digits, as tags are written
        ("cat <lora:other:1><wild:x> dog", {"network_tags": "ignore"}),
        ("cat <lora:art:0.3> dog", {"network_tags": "ignore"}),
        ("cat <lora:art:0.5:0.8> dog", {"syntax": "plain"}),
    ],
)
def test_tags_that_change_nothing(tokenizer: Tokenizer, engine: Any, prompt: str, options: dict[str, Any]) -> None:
    sources = (
        Source("lora", "art.safetensors", "", 0.8, 0.5),
        Source("lora", "third.pt", "", 1 / 3, 1 / 3),
        Source("hypernetwork", "h.pt", "", 1.0),
    )
    found = encode(TextConditioner(tokenizer, sources), engine, prompt, steps=1, cfg=1, **options).sets[0]["context"]
    np.testing.assert_array_equal(found, [plain(tokenizer, "cat  dog")])


def test_ignored_tags_of_a_negative_prompt(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """AUTOMATIC1111 takes them for text there."""
    found = encode(conditioner, engine, "", "<lora:x:1>", steps=1, cfg=2, network_tags="ignore").sets[0]["context"]
    np.testing.assert_array_equal(found[0], plain(tokenizer, "<lora:x:1>"))


@pytest.mark.parametrize(
    "prompt", ["\x00", "red\x00apple", "((((", "))]]", "[a:b", "[[[|", "\\", "(:1.3)", ":::", "BREAK", "AND", "\n", "|"]
)
def test_odd_prompts_are_encoded(conditioner: TextConditioner, engine: Any, prompt: str) -> None:
    found = encode(conditioner, engine, prompt, prompt, steps=3, cfg=7)
    contexts = [one["context"] for one in found.sets]
    assert all(np.isfinite(z).all() and z.shape[1] % 77 == 0 for z in contexts)


def test_a_prompt_of_many_chunks(conditioner: TextConditioner, engine: Any) -> None:
    prompt = "".join(f"red ({i}:1.1), " for i in range(400))
    found = encode(conditioner, engine, prompt, steps=20, cfg=1)
    chunks = found.sets[0]["context"].shape[1] // 77
    assert found.sets[0]["context"].shape == (1, 77 * chunks, WIDTH) and 20 < chunks <= 32
    assert sum(engine.calls) == chunks and max(engine.calls) == 16  # every chunk differs, and no call takes them all


# Two text encoders, and a vector

SIZES = (96, 64, 8, 4, 512, 384)  # original height and width, top and left, target height and width


class TwoEncoders:
    """Contexts of 5 numbers of the first encoder and 3 of the second, a made-up function of id and place; a pooled
    vector of 4 made of the second encoder's second token.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        assert tokens.shape[::2] == (2, 77)
        self.calls.append(tokens.shape[1])
        return np.concatenate([vectors(tokens[0]), second_vectors(tokens[1])], axis=2), pooled_vectors(tokens[1])


def second_vectors(tokens: NDArray[np.int64]) -> Float:
    return (np.cos(tokens[:, :, None] * 0.11 + np.arange(77 * 3).reshape(77, 3)) + 1.5).astype(np.float32)


def pooled_vectors(tokens: NDArray[np.int64]) -> Float:
    return np.sin(tokens[:, 1, None] * 0.05 + np.arange(4)).astype(np.float32)


def two_rows(tokenizer: Tokenizer, text: str, second: str | None = None) -> list[NDArray[np.int64]]:
    """Padded with the end token, and with 0 after the first end token."""
    ids = tokenizer.tokens(text if second is None else second)
    return [row(tokenizer, text), np.array([[BOS, *ids, EOS, *[0] * (75 - len(ids))]])]


def both(tokenizer: Tokenizer, text: str, second: str | None = None) -> Float:
    one, two = two_rows(tokenizer, text, second)
    return np.concatenate([vectors(one)[0], second_vectors(two)[0]], axis=1)


def told(tokenizer: Tokenizer, text: str) -> Float:
    """The vector of a text: pooled, then each size as cosines and sines of ever lower frequency."""
    numbers = [
        part(size * 10_000 ** (-i / 4)) for size in SIZES for part in (np.cos, np.sin) for i in range(4)
    ]  # 8 numbers a size
    return np.concatenate([pooled_vectors(two_rows(tokenizer, text)[1])[0], numbers]).astype(np.float32)


@pytest.fixture(scope="module")
def two(flat_bundle: Path) -> Tokenizer:
    bundle = open_bundle(flat_bundle)
    text = replace(bundle.manifest.text[0], width=5, clip_skip=(2, 3), last_layer=2, zero_empty=True)
    return Tokenizer(bundle.file("tokenizer/tokenizer.json"), [text, replace(text, width=3, pad=0)])


@pytest.fixture
def of_two(two: Tokenizer) -> TextConditioner:
    return TextConditioner(two, vector=Vector(4, 6, 8))


def encode_two(conditioner: TextConditioner, prompt: str, negative: str | None, **options: Any) -> Conditioning:
    prompts = conditioner.read(prompt, negative, **{"steps": 1, "cfg": 2.0} | options)
    return conditioner.encode(TwoEncoders(), prompts, SIZES)  # type: ignore[arg-type]


def test_two_encoders(of_two: TextConditioner, two: Tokenizer) -> None:
    (found,) = encode_two(of_two, "red apple", "blue").sets
    assert found.keys() == {"context", "vector"} and not any(value.flags.writeable for value in found.values())
    np.testing.assert_array_equal(found["context"], [both(two, "blue"), both(two, "red apple")])
    np.testing.assert_allclose(found["vector"], [told(two, "blue"), told(two, "red apple")], atol=1e-6)


def test_the_vector_changes_with_the_prompt(of_two: TextConditioner, two: Tokenizer) -> None:
    """AUTOMATIC1111 schedules the whole conditioning. A part of several chunks has the vector of its first one."""
    found = encode_two(of_two, "[red:green:2] apple BREAK pear AND dog", "blue", steps=4)
    assert found.set_of_step == (0, 0, 0, 1)
    for one, first in zip(found.sets, ("red apple", "green apple"), strict=True):
        expected = [told(two, text) for text in ("blue", first, "dog")]
        np.testing.assert_allclose(one["vector"], expected, atol=1e-6)
        assert one["context"].shape == (3, 154, 8)


def test_the_mean_is_restored_by_encoder(of_two: TextConditioner, two: Tokenizer) -> None:
    """Emphasis does not touch the pooled vector."""
    found = encode_two(of_two, "red (apple:1.5)", "", cfg=1).sets[0]
    z = both(two, "red apple").astype(np.float64)
    weights = np.ones((77, 1))
    weights[2] = 1.5
    expected = [part * weights * (part.mean() / (part * weights).mean()) for part in (z[:, :5], z[:, 5:])]
    np.testing.assert_allclose(found["context"][0], np.concatenate(expected, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["vector"][0], told(two, "red apple"), atol=1e-6)


@pytest.mark.parametrize(
    ("compat", "negative", "zeros"),
    [
        ("a1111", "", True),
        ("a1111", None, True),
        ("a1111", " ", False),
        ("a1111", "[::5]", True),
        ("a1111", "a", False),
        ("diffusers", None, True),
        ("diffusers", "", False),
    ],
)
def test_an_empty_negative_prompt(
    of_two: TextConditioner, two: Tokenizer, compat: str, negative: str | None, zeros: bool
) -> None:
    """AUTOMATIC1111 takes zeros where every text of the negative prompt is empty, diffusers where none is given. The
    sizes are told all the same. An empty prompt is encoded.
    """
    found = encode_two(of_two, "", negative, compat=compat).sets[0]
    assert (not found["context"][0].any()) == zeros and (not found["vector"][0, :4].any()) == zeros
    np.testing.assert_allclose(found["vector"][0, 4:], told(two, "")[4:], atol=1e-6)
    np.testing.assert_array_equal(found["context"][1], both(two, ""))
    longer = encode_two(of_two, "a BREAK b", negative, compat=compat, syntax="a1111").sets[0]["context"]
    np.testing.assert_array_equal(longer[0, 77:], both(two, ""))  # filled up with what is encoded


def test_zeros_are_of_models_that_were_trained_with_them(two: Tokenizer) -> None:
    plain_two = Tokenizer.__new__(Tokenizer)
    plain_two.__dict__ |= two.__dict__
    plain_two.texts = tuple(replace(text, zero_empty=False) for text in two.texts)
    found = encode_two(TextConditioner(plain_two, vector=Vector(4, 6, 8)), "a", "").sets[0]
    np.testing.assert_array_equal(found["context"][0], both(two, ""))


def test_a_prompt_for_the_second_encoder(of_two: TextConditioner, two: Tokenizer) -> None:
    found = encode_two(of_two, "red apple", "x", prompt_2="green pear", negative_2="y", compat="diffusers").sets[0]
    np.testing.assert_array_equal(found["context"], [both(two, "x", "y"), both(two, "red apple", "green pear")])
    np.testing.assert_allclose(found["vector"], [told(two, "y"), told(two, "green pear")], atol=1e-6)
    with pytest.raises(UsageError, match=r"^prompt 2: 80 tokens; diffusers drops all after the first 75"):
        encode_two(of_two, "a", "", prompt_2="cat " * 80, compat="diffusers")
    with pytest.raises(UsageError, match=r"^negative prompt 2: not valid Unicode"):
        encode_two(of_two, "a", "", negative_2="\ud800", compat="diffusers")


def test_layers_of_two_encoders(of_two: TextConditioner) -> None:
    """A clip skip of 1 is the latest layer that this family's contexts come from."""
    layers = [of_two.read("a", steps=1, cfg=1, clip_skip=skip).clip_skip for skip in (None, 1, 2, 3)]
    assert layers == [2, 2, 2, 3]
    for wrong in (0, 4, -1):
        with pytest.raises(UsageError, match=f"^clip skip {wrong}: this bundle was built for 2, 3"):
            of_two.read("a", steps=1, cfg=1, clip_skip=wrong)


def test_both_encodings_are_cached(of_two: TextConditioner) -> None:
    engine: Any = TwoEncoders()
    first, again = (of_two.encode(engine, of_two.read("a", "b", steps=1, cfg=2), SIZES).sets[0] for _ in range(2))
    assert engine.calls == [2]
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])


# Edit models


@pytest.mark.parametrize(
    ("cfg", "image_cfg", "weights", "images"),
    [
        (7.0, 1.5, (-0.5, -5.5, 7.0), (False, True, True)),  # 1 - s_i, s_i - s_t, s_t
        (7.0, 1.0, (-6.0, 7.0), (True, True)),
        (1.5, 1.5, (-0.5, 1.5), (False, True)),
        (1.0, 1.5, (-0.5, 0.5, 1.0), (False, True, True)),
        (1.0, 1.0, (1.0,), (True,)),
    ],
)
def test_guidance_by_an_image(
    conditioner: TextConditioner,
    engine: Any,
    cfg: float,
    image_cfg: float,
    weights: tuple[float, ...],
    images: tuple[bool, ...],
) -> None:
    found = encode(conditioner, engine, "a", "b", steps=1, cfg=cfg, image_cfg=image_cfg)
    assert found.weights == (weights,) and found.images == images
    negatives = len(weights) - 1
    ours, theirs = found.sets[0]["context"][:negatives], found.sets[0]["context"][-1:]
    assert all(np.array_equal(one, ours[0]) for one in ours) and not any(np.array_equal(one, theirs[0]) for one in ours)


# The real text encoder


@pytest.fixture(scope="module")
def real(flat_bundle: Path) -> Any:
    return load_engine(open_bundle(flat_bundle), "onnxruntime", 1)


@pytest.fixture(scope="module")
def text_model(flat_bundle: Path) -> Any:
    return reference.text_model(reference.stored_weights(flat_bundle), reference.sizes(flat_bundle)["texts"][0])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return reference.clip_tokenizer(tmp_path_factory.mktemp("clip"))


TREE = "tree, " * 32 + "tall oak "  # 66 tokens, the last comma at 64
CHUNKS: dict[str, list[list[tuple[str, float]]]] = {
    "red apple": [[("red apple", 1.0)]],
    "": [[]],
    "a (very (red:1.5)) apple, [on] a [[green] table": [
        [
            ("a", 1),
            ("very", 1.1),
            ("red", 1.65),
            ("apple, ", 1),
            ("on", 1 / 1.1),
            ("a", 1),
            ("green", 1 / 1.21),
            ("table", 1 / 1.1),
        ]
    ],
    "red apple BREAK (green pear:1.4)": [[("red apple", 1.0)], [("green pear", 1.4)]],
    "BREAK red BREAK": [[], [("red", 1.0)]],
    "cat " * 80: [[("cat " * 75, 1.0)], [("cat " * 5, 1.0)]],
    TREE + "by (the wide and quiet river in the late evening:1.3)": [
        [("tree, " * 32, 1.0)],
        [("tall oak by", 1.0), ("the wide and quiet river in the late evening", 1.3)],
    ],
    "tree, " * 20 + "oak " * 50: [[("tree, " * 20 + "oak " * 35, 1.0)], [("oak " * 15, 1.0)]],
    "(tree:1.2), " * 37 + "oak, pine": [[*[("tree", 1.2), (",", 1.0)] * 37, ("oak", 1.0)], [(", pine", 1.0)]],
    "my-style apple": [[("my-style apple", 1.0)]],
}
"""Prompts, and their chunks as they must be cut: text and weight."""


@pytest.mark.parametrize("prompt", CHUNKS, ids=range(len(CHUNKS)))
@pytest.mark.parametrize("emphasis", ["original", "no norm"])
def test_against_torch(tokenizer: Tokenizer, real: Any, text_model: Any, clip: Any, prompt: str, emphasis: str) -> None:
    expected = []
    for chunk in CHUNKS[prompt]:
        pieces = [(clip(text, add_special_tokens=False).input_ids, weight) for text, weight in chunk]
        tokens = [BOS, *(token for ids, _ in pieces for token in ids)]
        weights = [1.0, *(weight for ids, weight in pieces for _ in ids)]
        assert len(tokens) <= 76
        with torch.inference_mode():
            z = text_model(torch.tensor([tokens + [EOS] * (77 - len(tokens))])).last_hidden_state.double()
        weighted = z * torch.tensor(weights + [1.0] * (77 - len(tokens))).double()[None, :, None]
        expected.append(weighted * (z.mean() / weighted.mean()) if emphasis == "original" else weighted)
    found = encode(TextConditioner(tokenizer), real, prompt, steps=1, cfg=1, emphasis=emphasis).sets[0]["context"]
    assert relative(found, torch.cat(expected, dim=1).numpy()) < 1e-4


def test_embeddings_against_torch(flat_bundle: Path, real: Any, text_model: Any, clip: Any) -> None:
    """Rows of the token table, here ones that are there for other words, stand for a trigger, several vectors and all
    with its emphasis.
    """
    bundle = open_bundle(flat_bundle)
    text = replace(bundle.manifest.text[0], embeddings={"my-style": (320, 2368, 5000), "easy neg": (7000,)})
    conditioner = TextConditioner(Tokenizer(bundle.file("tokenizer/tokenizer.json"), [text]))
    found = encode(conditioner, real, "a (My-Style:1.4) cat", "easy neg, easy", steps=1, cfg=7).sets[0]["context"]
    a, cat, comma, easy = (clip(word, add_special_tokens=False).input_ids for word in ("a", "cat", ",", "easy"))
    rows = [[*a, 320, 2368, 5000, *cat], [7000, *comma, *easy]]
    tokens = torch.tensor([[BOS, *ids, *[EOS] * (76 - len(ids))] for ids in rows])
    with torch.inference_mode():
        z = text_model(tokens).last_hidden_state.double()
    weights = torch.ones(77).double()
    weights[2:5] = 1.4
    weighted = z[0] * weights[:, None]
    assert relative(found[1], (weighted * (z[0].mean() / weighted.mean())).numpy()) < 1e-4
    assert relative(found[0], z[1].numpy()) < 1e-4


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (" BREAK ".join(["cat"] * 33), "more than 32 chunks of 75 tokens"),
        ("cat " * 2401, "more than 32 chunks of 75 tokens"),
        ("cat AND " * 15 + "dog", "16 parts between ANDs: expected at most 15"),
        ("a" * 20_001, "20,001 characters: expected at most 20,000"),
        (
            "cat " * 600 + "[" + "|".join(f"dog{i}" for i in range(500)) + "]",
            "chunks of text over all branches and steps: expected at most 4,096",
        ),
        (
            "BREAK " * 31 + " AND ".join(["[a|b|c|d|e|f|g|h|i]"] * 15),
            "chunks of text over all branches and steps: expected at most 4,096",
        ),
    ],
    ids=["breaks", "words", "parts", "characters", "edits", "parts and edits"],
)
def test_t10_a_prompt_has_limits(conditioner: TextConditioner, prompt: str, said: str) -> None:
    """Nothing that a stranger writes takes more memory than a picture; what is just below a limit is read."""
    with pytest.raises(UsageError, match=said):
        conditioner.read(prompt, "", steps=1000, cfg=7)


def test_prompts_at_the_limits(conditioner: TextConditioner) -> None:
    for prompt in (
        " BREAK ".join(["cat"] * 32),
        "cat " * 2400,
        "cat AND " * 14 + "dog",
        "a" + " " * 19_999,
        "[" + "|".join(f"dog{i}" for i in range(1000)) + "]",
    ):
        conditioner.read(prompt, "", steps=1000, cfg=7)
    with pytest.raises(UsageError, match=r"^negative prompt: more than 32 chunks"):
        conditioner.read("cat", "cat " * 2401, steps=20, cfg=7)
