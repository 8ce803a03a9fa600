"""Native calls that a signal ends: Ctrl-C and SIGTERM are heard while an engine works, and so is a time limit.

Python runs the handler of a signal in the main thread, between two of its own steps, so a call into an engine keeps it
waiting for as long as the call takes. Here the main thread lets another thread make the call and waits for it in a way
that handlers interrupt. In other threads, where Python handles no signals, a call is made as it is. Standard library
only.
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
"""How long a call may take to end after it was told to."""
_POLL_S = 0.1

abandoned: dict[int, Any] = {}
"""Calls that did not end when told to, with what they use: they may still run. Leave such a process with `os._exit`, as
engines are torn down at its end.
"""


class _Call:
    """One call on its way: `done` is locked until it has ended."""

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
"""Calls for the thread that makes them, which lives as long as the process, unless a call is abandoned in it."""


def interruptible(run: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Make a native call; in the main thread so that an exception of a signal's handler is raised within a second.

    `stop` then tells the call to end; it may be called while the call runs. One that does not end soon is left alone
    and listed in `abandoned`.
    """
    if threading.current_thread() is not threading.main_thread():
        return run()
    call = _Call(run)
    _thread().put(call)
    try:
        while not call.done.acquire(timeout=_POLL_S):  # a wait without end hears no signals on Windows
            pass
    except BaseException:
        _end(call, stop)
        raise
    if (error := call.error) is not None:
        call.error = None  # it knows this frame, and the frame the call
        raise error
    result: T = call.result
    return result


def wait_for(finished: Callable[[int], bool], stop: Callable[[], None], used: Any) -> None:
    """Wait for a call that an engine makes in threads of its own. `finished` waits up to so many milliseconds and says
    whether it has ended.

    On an exception of a signal's handler `stop` is called; if the call does not end soon, `used`, all that it works on,
    is kept in `abandoned`.
    """
    try:
        while not finished(round(1000 * _POLL_S)):
            pass
    except BaseException:
        abandoned[id(used)] = used  # first: another signal may come
        stop()
        if _has_ended(finished):
            del abandoned[id(used)]
        raise


def _has_ended(finished: Callable[[int], bool]) -> bool:
    try:
        return finished(round(1000 * GRACE_S))
    except Exception:  # that it was told to stop, or what went wrong before
        return True


@contextmanager
def time_limit(seconds: float, what: str, fix: str) -> Iterator[None]:
    """End what the main thread does in the block after so many seconds, in the way Ctrl-C does. In another thread there
    is no limit.

    Raises:
        TimeLimitError: it was not done in time.
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
            signal.pthread_kill(main.ident, signal.SIGINT)  # which also ends a read or a wait of the main thread
        else:
            signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
        timer.cancel()
        timer.join()  # one that has just expired ends this wait, not what comes after it
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
        del call  # and with it what it holds


def _end(call: _Call, stop: Callable[[], None]) -> None:
    global _waiting
    abandoned[id(call)] = call
    thread, _waiting = _waiting, None
    stop()
    if call.ended or call.done.acquire(timeout=GRACE_S):
        del abandoned[id(call)]
        _waiting = thread


def _forget_thread() -> None:
    """A forked process has the main thread only."""
    global _waiting
    _waiting = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_thread)
