"""Prompts to contexts: against a torch text encoder with AUTOMATIC1111's chunks and emphasis written out, and with an engine that counts its calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sdrt.bundle import open_bundle
from sdrt.runtime.conditioning import TextConditioner
from sdrt.runtime.engine import Float
from sdrt.runtime.tokenizer import Tokenizer

BOS, EOS, COMMA = 49406, 49407, 267
WIDTH = 5


class CountingEngine:
    """Each token's vector is a made-up function of its id and its place; `calls` holds how many rows each call had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode_text(self, tokens: NDArray[np.int64], emphasis: Float, clip_skip: int) -> Float:
        assert tokens.dtype == np.int64 and tokens.shape[1:] == (77,)
        assert emphasis.dtype == np.float32 and (emphasis == 1).all() and emphasis.shape == tokens.shape
        self.calls.append(len(tokens))
        return vectors(tokens, clip_skip)


def vectors(tokens: NDArray[np.int64], clip_skip: int = 1) -> Float:
    places = np.arange(77 * WIDTH).reshape(77, WIDTH)
    return (np.sin(tokens[:, :, None] * 0.37 + places * clip_skip) + 1.5).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer(flat_bundle: Path) -> Tokenizer:
    bundle = open_bundle(flat_bundle)
    return Tokenizer(bundle.file("tokenizer/tokenizer.json"), replace(bundle.manifest.text, clip_skip=(1, 2)))


@pytest.fixture
def engine() -> Any:
    return CountingEngine()


@pytest.fixture
def conditioner(tokenizer: Tokenizer) -> TextConditioner:
    return TextConditioner(tokenizer)


def row(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    ids = tokenizer.tokens(text)
    return np.array([[BOS, *ids, *[EOS] * (76 - len(ids))]])


def plain(tokenizer: Tokenizer, text: str) -> Float:
    return vectors(row(tokenizer, text))[0]


# Branches, sets and steps


def test_guided(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    found = conditioner.encode(engine, "red apple", "blue", steps=3, cfg=7)
    assert len(found.sets) == 1 and found.set_of_step == (0, 0, 0) and found.weights == ((-6.0, 7.0),) * 3
    assert found.sets[0].dtype == np.float32 and not found.sets[0].flags.writeable
    np.testing.assert_array_equal(found.sets[0], [plain(tokenizer, "blue"), plain(tokenizer, "red apple")])
    assert engine.calls == [2]


def test_unguided(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """At guidance scale 1 the negative prompt has no weight, so it is not even read."""
    found = conditioner.encode(engine, "red apple", "\ud800", steps=2, cfg=1)
    assert found.weights == ((1.0,),) * 2 and engine.calls == [1]
    np.testing.assert_array_equal(found.sets[0], [plain(tokenizer, "red apple")])


def test_and(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    found = conditioner.encode(engine, "red apple :0.5 AND green pear:1.5", "blue", steps=1, cfg=3)
    assert found.weights == ((-5.0, 1.5, 4.5),)
    np.testing.assert_array_equal(found.sets[0], [plain(tokenizer, text) for text in ("blue", "red apple", "green pear")])
    assert conditioner.encode(engine, "a AND b", steps=1, cfg=1).weights == ((-1.0, 1.0, 1.0),)
    assert conditioner.encode(engine, "a AND b:-0.5", steps=1, cfg=2).weights == ((2.0, -1.0),)  # these sum to 1 without a negative


def test_editing(conditioner: TextConditioner, tokenizer: Tokenizer, engine: Any) -> None:
    """Steps are counted from 0 and compared with what the prompt counts from 1, as AUTOMATIC1111 does."""
    found = conditioner.encode(engine, "[red:green:2] apple", "[x:0.5]", steps=4, cfg=2)
    assert found.set_of_step == (0, 0, 0, 1)
    np.testing.assert_array_equal(found.sets[0], [plain(tokenizer, ""), plain(tokenizer, "red apple")])
    np.testing.assert_array_equal(found.sets[1], [plain(tokenizer, "x"), plain(tokenizer, "green apple")])
    assert engine.calls == [2, 2]  # never more rows than an engine for two branches of one chunk takes
    assert conditioner.encode(engine, "[red|green]", steps=6, cfg=1).set_of_step == (0, 0, 1, 0, 1, 0)
    assert conditioner.encode(engine, "[red::1] AND [a|red|b]", steps=5, cfg=1).set_of_step == (0, 0, 1, 2, 3)
