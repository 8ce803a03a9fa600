"""Work of a stream as a CUDA graph, and whether a replay of it did the same."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.runtime.backends.tensorrt.blocks import out_of_memory
from sdrt.runtime.backends.tensorrt.plans import Plans

log = logging.getLogger("sdrt")

_RELATIVE, _ABSOLUTE = 2e-2, 1e-3
"""How far a replay may be off plain execution: a part of each number, and of the largest one."""
_collecting = Lock()


def agree(plain: NDArray[np.float32], replayed: NDArray[np.float32]) -> bool:
    """Whether a replay did the same as plain execution. Not to the last bit: sums of atomic additions come in any
    order. A replay that read or wrote in another place is far off.
    """
    finite = np.isfinite(plain) & np.isfinite(replayed)
    largest = float(np.abs(plain[finite]).max(initial=0))
    log.debug(
        "replay and plain run differ by %g of %g", np.abs(plain[finite] - replayed[finite]).max(initial=0), largest
    )
    return np.allclose(replayed, plain, rtol=_RELATIVE, atol=_ABSOLUTE * largest, equal_nan=True)


def captured(plans: Plans, start: Callable[[Any], None]) -> Any:
    """What `start` puts on a stream, as a CUDA graph. A capture that breaks is tried once more: anything of the process
    that touches the device may have broken it.
    """
    try:
        return _captured_once(plans, start)
    except Exception as error:
        if out_of_memory(error):
            raise
        log.info("capturing failed, and is tried again: %s", error)
        return _captured_once(plans, start)


def _captured_once(plans: Plans, start: Callable[[Any], None]) -> Any:
    builder = plans.stream.create_graph_builder()
    with _no_collection():
        try:
            builder.begin_building("thread_local")  # the default mode would break other threads' work on this device
            start(builder.stream)
            graph = builder.end_building().complete()
        except BaseException:
            with suppress(Exception):
                # ends the capture, without which the stream is unusable; `end_building` does not end one that broke
                builder.close()
            raise
        builder.close()
    graph.upload(plans.stream)
    return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector away: a buffer that it frees on this thread would break a capture. One thread at a
    time, so that none turns it on again under another.
    """
    with _collecting:
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                gc.enable()
