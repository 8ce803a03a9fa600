"""Native calls that a signal can end. Ctrl-C, SIGTERM and a time limit work while an engine computes.

Python runs a signal's handler in the main thread, between two steps of Python code. A call into an engine therefore
delays the handler until the call ends. Here another thread makes the call, and the main thread waits for it in a way
that handlers can interrupt. Python handles no signals in other threads, so there a call is made directly. Standard
library only.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

from sdrt.errors import TimeLimitError

T = TypeVar("T")

GRACE_S = 0.5
"""How long a call may take to end after it was told to stop."""
_POLL_S = 0.1

abandoned: dict[int, Any] = {}
"""Calls that did not end when they were told to, with the objects they use. They may still run. Leave such a process
with `os._exit`, because a normal exit would destroy the engines.
"""


class _Call:
    """One call in another thread. `done` is locked until the call has ended."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.done = threading.Lock()
        self.done.acquire()
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None

    def make(self) -> None:
        try:
            self.result = self.run()
        except BaseException as error:
            self.error = error
        self.ended = True
        self.done.release()


_waiting: SimpleQueue[_Call] | None = None
"""Calls for the thread that makes them. The thread lives as long as the process, unless a call in it is abandoned."""


def interruptible(run: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Make a native call. In the main thread, an exception from a signal's handler is raised within a second.

    Then `stop` is called to end the call, while the call still runs. A call that does not end soon is left alone and
    listed in `abandoned`.
    """
    if threading.current_thread() is not threading.main_thread():
        return run()
    call = _Call(run)
    _thread().put(call)
    try:
        while not call.done.acquire(timeout=_POLL_S):  # on Windows, a wait without a timeout hears no signals
            pass
    except BaseException:
        _end(call, stop)
        raise
    if (error := call.error) is not None:
        call.error = None  # breaks a circle: the error knows this frame, and the frame knows the call
        raise error
    result: T = call.result
    return result


def wait_for(finished: Callable[[int], bool], stop: Callable[[], None], used: Any) -> None:
    """Wait for a call that an engine makes in its own threads. `finished` waits for at most so many milliseconds and
    says whether the call has ended.

    If a signal's handler raises, `stop` is called. If the call does not end soon after that, `used` (all objects that
    the call works on) is kept in `abandoned`.
    """
    try:
        while not finished(round(1000 * _POLL_S)):
            pass
    except BaseException:
        abandoned[id(used)] = used  # first, because another signal may come
        stop()
        if _has_ended(finished):
            del abandoned[id(used)]
        raise


def _has_ended(finished: Callable[[int], bool]) -> bool:
    try:
        return finished(round(1000 * GRACE_S))
    except Exception:  # the call was told to stop, or had failed before
        return True


@contextmanager
def time_limit(seconds: float, what: str, fix: str) -> Iterator[None]:
    """End the main thread's work in this block after so many seconds, in the same way as Ctrl-C. In another thread
    there is no limit.

    Raises:
        TimeLimitError: the work was not done in time.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        assert main.ident is not None
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main.ident, signal.SIGINT)  # also ends a read or a wait of the main thread
        else:
            signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
        timer.cancel()
        timer.join()  # if the timer has just expired, it interrupts this wait and nothing after it
    except KeyboardInterrupt:
        if not expired.is_set():
            raise
        raise TimeLimitError(f"{what}: not done within {seconds:g} seconds", fix) from None
    finally:
        timer.cancel()


def _thread() -> SimpleQueue[_Call]:
    global _waiting
    if _waiting is None:
        _waiting = SimpleQueue()
        threading.Thread(target=_make_calls, args=(_waiting,), name="sdrt engine calls", daemon=True).start()
    return _waiting


def _make_calls(calls: SimpleQueue[_Call]) -> None:
    while True:
        call = calls.get()
        call.make()
        del call  # and everything the call holds


def _end(call: _Call, stop: Callable[[], None]) -> None:
    global _waiting
    abandoned[id(call)] = call
    thread, _waiting = _waiting, None
    stop()
    if call.ended or call.done.acquire(timeout=GRACE_S):
        del abandoned[id(call)]
        _waiting = thread


def _forget_thread() -> None:
    """A forked process has only its main thread."""
    global _waiting
    _waiting = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_thread)
