"""Two measuring processes that take turns: who works when, what both measure, and when they run one after the other instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import FakeEngine, FakePipe, FakeTime

from sdrt.bench import measure, turns
from sdrt.bench.instruments import Readings, TimedEngine
from sdrt.bench.measure import Request
from sdrt.bench.turns import Pairs, _together
from sdrt.errors import InputFileError, NotComparableError


class Talking:
    """A process that makes a picture in as many turns as it is told."""

    def __init__(self, name: str, needed: int, heard: list[str]) -> None:
        self.name, self.left, self.heard = name, needed, heard

    def say(self, word: str) -> None:
        self.heard.append(f"{self.name} {word}")

    def hear(self) -> str:
        self.left -= 1
        return "turn" if self.left else "done"


def test_turns_alternate_within_a_picture_and_the_longer_one_ends_alone() -> None:
    heard: list[str] = []
    children: Any = [Talking("a", 2, heard), Talking("b", 4, heard)]
    _together(children, "picture")
    assert heard == ["a picture", "b picture", "a go", "b go", "b go", "b go"]


def test_a_turn_ends_after_a_model_call_and_waiting_is_not_counted() -> None:
    time = FakeTime()
    readings = Readings(clock=time)
    readings.between = lambda: time.sleep(5.0)
    pipe: Any = FakePipe(TimedEngine(FakeEngine(time, 7.0), readings), time)
    sampler = measure._Sampler(pipe, readings, Request("fake", steps=10))
    sampler.picture(keep=True)
    assert sampler.samples["total_ms"] == [pytest.approx(5 + 3 + 2 + 70 + 4)] and sampler.samples["step_ms"] == [pytest.approx(7.0)] * 10


def test_a_pair_of_real_processes(flat_bundle: Path) -> None:
    """Both make as many pictures, of the same prompts, and the first pair checks the references."""
    told: list[Any] = []
    pairs = Pairs(told.append)
    request = Request(str(flat_bundle), steps=3, cfg=3, threads=1, pictures=2, limit_s=60.0)
    old, new = pairs(request, request, 0)
    assert pairs.alone is None and len(told) == 1 and told[0][0]["engine"] == told[0][1]["engine"]
    for answer in (old, new):
        assert (
            len(answer["samples"]["total_ms"]) == 2
            and len(answer["samples"]["load_ms"]) == 1
            and len(answer["samples"]["step_ms"]) == 2 * 3
            and answer["fidelity"]["ok"]
        )
        assert {check["graph"] for check in answer["fidelity"]["checks"]} == {"text_encoder", "step", "vae_decoder"}
    assert old["counters"] == new["counters"] and old["fidelity"]["picture"] == new["fidelity"]["picture"]


def test_what_a_process_raises_ends_both(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no such bundle"):
        Pairs(lambda _: None)(Request(str(tmp_path / "none")), Request(str(tmp_path / "none")), 0)


READY = """
import json, sys
print(json.dumps({"peak_rss_bytes": 3 * 10**9, "engine": {}, "parameters": {}}), flush=True)
for line in sys.stdin:
    if line == "end\\n":
        break
    print("done", flush=True)
open(sys.argv[2], "w").write(json.dumps({"turns": True, "samples": {"total_ms": [1.0], "load_ms": [2.0]}}))
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Processes that only talk; and who was measured alone."""
    measured: list[str] = []

    def in_fresh_process(request: Request) -> Mapping[str, Any]:
        measured.append(request.bundle)
        return {"turns": False}

    monkeypatch.setattr(turns, "_COMMAND", READY)
    monkeypatch.setattr(turns, "in_fresh_process", in_fresh_process)
    monkeypatch.setattr(turns, "available_bytes", lambda: 10**10)
    return measured


def test_two_that_memory_does_not_hold_run_one_after_the_other(alone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(lambda _: None)
    for pair, samples in (
        (0, {"total_ms": [1.0]}),
        (1, {"total_ms": [1.0], "load_ms": [2.0]}),
    ):  # the first two started one after the other, to see what they take
        assert pairs(Request("old"), Request("new"), pair) == ({"turns": True, "samples": samples},) * 2 and pairs.alone is None
    monkeypatch.setattr(turns, "available_bytes", lambda: 4 * 10**9)
    assert pairs(Request("old"), Request("new"), 2) == ({"turns": False}, {"turns": False}) and alone == ["old", "new"]
    assert pairs.alone == "the two do not fit into memory beside each other: 6,600 MB needed, 4,000 MB available"
    first = Pairs(lambda _: None)  # already in the first pair, once the first process has told what it took
    monkeypatch.setattr(turns, "available_bytes", lambda: 2 * 10**9)
    first(Request("old"), Request("new"), 0)
    assert first.alone is not None and "3,300 MB needed, 2,000 MB available" in first.alone


def test_an_older_sdrt_and_a_server_run_one_after_the_other(alone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(lambda _: None)
    pairs(Request("old", scenario="server"), Request("new", scenario="server"), 0)
    assert pairs.alone == "a server's requests do not wait for turns"
    monkeypatch.setattr(turns, "_COMMAND", "import sys; sys.exit(\"ImportError: cannot import name 'take_turns' from 'sdrt.bench.measure'\")")
    pairs = Pairs(lambda _: None)
    pairs(Request("old"), Request("new"), 0)
    assert pairs.alone == "the sdrt of --old-python cannot take turns yet" and alone == ["old", "new"] * 2


def test_two_that_cannot_be_compared_make_no_picture(alone: list[str]) -> None:
    def refuse(_: object) -> None:
        raise NotComparableError("no")

    with pytest.raises(NotComparableError):
        Pairs(refuse)(Request("old"), Request("new"), 0)
    assert not alone
