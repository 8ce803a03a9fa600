"""Two measuring processes run at once and take turns; the idle one waits on a pipe. So a disturbance of the machine
affects both.

The speed of a busy machine can double within minutes. Two processes measured one after the other would see two
different machines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdrt.bench.child import Child, in_fresh_process, measuring, understood
from sdrt.bench.measure import ONCE, Request
from sdrt.bundle.manifest import WEIGHTS
from sdrt.errors import MachineError, ResourceError
from sdrt.machine.memory import available_bytes

Answers = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The answers of the processes of the old and of the new side."""

_COMMAND = "from sdrt.bench.measure import take_turns; take_turns()"
_NO_TURNS = "cannot import name 'take_turns'"
_ROOM = 1.1
"""This share of the memory that both took before must be free."""
_GENEROUS, _GENEROUS_BYTES = 6, 1 << 30
"""No engine takes more than so many times the weights and so many bytes, for pictures of an ordinary size."""


class Pairs:
    """Makes pairs of processes, one of each side. `alone` says why they run one after the other; None if they take
    turns.

    `agree` is called once, before anything is measured, with what ran on either side. It raises if the two cannot be
    compared.
    """

    def __init__(self, agree: Callable[[Answers], None]) -> None:
        self._agree = agree
        self._agreed = False
        self._taken: list[int | None] = [None, None]
        self.alone: str | None = None

    def __call__(self, old: Request, new: Request, pair: int) -> Answers:
        """Measure both sides. The side that starts first and has the first turn alternates from pair to pair.

        Raises:
            SdrtError: raised by a process, or by `agree`.
        """
        requests = tuple(replace(request, process=pair) for request in (old, new))
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        if old.scenario == "server":
            self.alone = "a server's requests do not wait for turns"
        if self.alone is None and (answers := self._in_turns(requests, order)) is not None:
            return answers
        found = {side: in_fresh_process(requests[side]) for side in order}
        if not self._agreed:
            self._agree((found[0], found[1]))
            self._agreed = True
        return found[0], found[1]

    def _in_turns(self, requests: Sequence[Request], order: tuple[int, int]) -> Answers | None:
        """Returns None, and sets `alone` to the reason, if the two do not fit into memory together."""
        first, second = order
        started = time.monotonic()
        if not self._fits(sum(self._taken[side] or 0 for side in order)):
            return None
        with measuring(requests[first], _COMMAND, talks=True) as leading:
            ready: dict[int, dict[str, Any]] = {}
            try:
                apart = self._taken[second] is None and not _surely_fit(requests)
                if apart:  # assume that the second is like the first
                    ready[first] = json.loads(leading.hear())
                    if not self._fits(ready[first]["peak_rss_bytes"] or 0):
                        return None
                with measuring(requests[second], _COMMAND, talks=True) as following:
                    children = {first: leading, second: following}
                    for side in order:
                        ready[side] = ready.get(side) or json.loads(children[side].hear())
                        self._taken[side] = ready[side]["peak_rss_bytes"]
                    if not self._agreed:
                        self._agree((ready[0], ready[1]))
                        self._agreed = True
                    _take_turns([leading, following], requests[first], time.monotonic() - started)
                    for child in children.values():
                        child.say("end")
                    answers = [understood(requests[side], children[side].answer()) for side in (0, 1)]
                    for answer in (
                        answers if apart else ()
                    ):  # two processes that started one after the other do not tell what starting takes
                        answer["samples"] = {
                            name: values for name, values in answer["samples"].items() if name not in ONCE
                        }
                    return answers[0], answers[1]
            except ResourceError as error:
                if len(ready) == 2:
                    raise
                self.alone = f"the two do not fit beside each other: {error.message}"
            except MachineError as error:
                if _NO_TURNS not in error.message:
                    raise
                self.alone = "the sdrt of --old-python cannot take turns yet"
        return None

    def _fits(self, needed: int) -> bool:
        left = available_bytes()
        if left is not None and left < _ROOM * needed:
            self.alone = (
                f"the two do not fit into memory beside each other: {_ROOM * needed / 1e6:,.0f} MB needed,"
                f" {left / 1e6:,.0f} MB available"
            )
        return self.alone is None


def _surely_fit(requests: Sequence[Request]) -> bool:
    """Whether there is so much more memory than weights that no check is needed."""
    try:
        needed = sum(
            _GENEROUS * (Path(request.bundle) / WEIGHTS).stat().st_size + _GENEROUS_BYTES for request in requests
        )
    except OSError:
        return False
    return needed <= (available_bytes() or 0)


def _take_turns(children: Sequence[Child], request: Request, start_s: float) -> None:
    """Let both make a picture to warm up, then the pictures that count. This ends when there are enough, or when both
    have used their time and have worked at least as long as their start took.
    """
    _together(children, "warm")
    started = time.monotonic()
    for picture in range(request.pictures):
        if picture and time.monotonic() - started >= max(2 * request.limit_s, start_s):
            break
        _together(children if picture % 2 == 0 else children[::-1], "picture")


def _together(children: Sequence[Child], word: str) -> None:
    """Let both make one picture, in turns."""
    said = dict.fromkeys(children, word)
    while said:
        for child in list(said):
            child.say(said[child])
            said[child] = "go"
            if child.hear() == "done":
                del said[child]
