"""How pictures are asked for: warm-up until stable, one after the other, or as requests arrive at a server. Clocks are
arguments, so that tests need none.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

SCENARIOS = ("single", "batch", "server")
Seconds = Callable[[], float]
WINDOW = 3
"""Pictures per median during warm-up."""
STABLE = 0.02
"""The warm-up ends when three medians in a row are this close to each other."""


@dataclass(frozen=True)
class WarmUp:
    """Pictures and seconds that a warm-up took. `stable` is False if the time limit ended it."""

    pictures: int
    seconds: float
    stable: bool


def warm_up(picture: Callable[[], float], *, limit_s: float, now: Seconds) -> WarmUp:
    """Make pictures until three medians agree within 2 %, or until `limit_s` is over. `picture` makes one picture and
    returns its duration, in any unit.
    """
    started, times = now(), list[float]()
    while True:
        times.append(picture())
        medians = [statistics.median(times[end - WINDOW : end]) for end in range(len(times), WINDOW - 1, -WINDOW)][:3]
        if len(medians) == 3 and max(medians) <= min(medians) * (1 + STABLE):
            return WarmUp(len(times), now() - started, True)
        if now() - started >= limit_s:
            return WarmUp(len(times), now() - started, False)


def repeat(pictures: int, *, limit_s: float, now: Seconds) -> Iterator[int]:
    """Count to `pictures`, at least one, and stop early after `limit_s`."""
    started = now()
    for index in range(pictures):
        if index and now() - started >= limit_s:
            return
        yield index


def poisson_arrivals(rate: float, duration_s: float, seed: int) -> list[float]:
    """Times of arrival in seconds from the start: independent, `rate` per second on average, for `duration_s`."""
    source, times, now = random.Random(seed), list[float](), 0.0
    while True:
        now += -math.log(1.0 - source.random()) / rate
        if now >= duration_s:
            return times
        times.append(now)


@dataclass(frozen=True)
class Request:
    """One request, seconds from the start. A rejected one has no start and no end."""

    arrived: float
    started: float | None
    ended: float | None


def serve(
    arrivals: Sequence[float],
    picture: Callable[[], object],
    *,
    queue: int,
    now: Seconds,
    sleep: Callable[[float], None],
) -> list[Request]:
    """One server with `queue` waiting places, first come first served. A request that finds the queue full is rejected.

    The queue only grows while a picture is made. So requests that arrive meanwhile can be admitted afterwards, in
    order, with the same effect.
    """
    start = now()
    waiting: deque[float] = deque()
    done: list[Request] = []
    coming = deque(arrivals)

    def admit(until: float) -> None:
        while coming and coming[0] <= until:
            if len(waiting) < queue:
                waiting.append(coming.popleft())
            else:
                done.append(Request(coming.popleft(), None, None))

    while coming or waiting:
        if not waiting:
            if (wait := coming[0] - (now() - start)) > 0:
                sleep(wait)
            waiting.append(coming.popleft())  # the server is free: it starts at once, without a place in the queue
        arrived = waiting.popleft()
        began = max(now() - start, arrived)
        picture()
        ended = max(now() - start, began)
        done.append(Request(arrived, began, ended))
        admit(ended)
    return sorted(done, key=lambda request: request.arrived)


def attained_rate(requests: Sequence[Request]) -> float:
    """Pictures per second, from the first arrival to the last picture; 0 if none was made."""
    ended = [request.ended for request in requests if request.ended is not None]
    span = max(ended) - requests[0].arrived if ended else 0.0
    return len(ended) / span if span > 0 else 0.0
