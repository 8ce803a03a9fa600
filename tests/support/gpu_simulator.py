"""A simulated GPU on the host: memory, queues of work, counters and faults. Strict, and lazy.

Device memory is host memory on 256-byte boundaries, full of NaN until something writes it. Work is queued and runs only
when the host polls an event (one piece of work a poll) or synchronises, so the host sees no result before it could see
it on a device. What the real libraries leave undefined is refused here. `cuda_simulator` and `tensorrt_simulator` are
the libraries on top.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
STALE = 0xFF
"""The byte that memory holds before it is written and after it is freed: NaN as a float."""
DEFAULT_STREAMS = (0, 1, 2)
"""Raw handles that mean the default stream, the legacy one and the thread's own."""

Bytes = NDArray[np.uint8]


class Refused(BaseException):
    """A rule was broken. Not an Exception, so that no fallback hides it."""


class CUDAError(Exception):
    """What cuda.core raises, with the driver's name of the error in its text."""


@dataclass
class Faults:
    """What goes wrong on purpose. A number says which time counting from now, 1 the next; 0 is never."""

    allocation: int = 0
    """This allocation finds no memory."""
    illegal_address: int = 0
    """This model call, plain or replayed, touches a bad address as it runs: from then on every call fails."""
    copy: int = 0
    """Starting this copy fails, and does no further harm."""
    capture: str = ""
    """refused: TensorRT will not run into a capture; invalidated: that also breaks the capture; instantiate: the graph
    cannot be made; not capturable: TensorRT says before that it would refuse.
    """
    captures: int = 0
    """How many captures that concerns, 0 for all."""
    garbage: bool = False
    """The collector runs within each capture, unless it is off."""
    drift: str = ""
    """first run: kernels of a context's first run with new shapes give other numbers than those that it has from then
    on; replays: each one differs from the one before in the last bit, as sums of atomic additions do.
    """
    replay: str = ""
    """wrong: replays write other numbers than plain runs; nothing: they write nothing."""
    runs: dict[str, int] = field(default_factory=dict)
    """By network: this execute_async_v3 returns False."""
    no_context: int = 0
    """This create_execution_context returns None."""
    no_engine: bool = False
    """deserialize_cuda_engine returns None."""
    no_weights: int = 0
    """This deserialize_cuda_engine finds no memory for the weights."""
    problems: int = 0
    """What get_engine_validity finds in every header, as the library's own bits."""

    def breaks_capture(self, *ways: str) -> bool:
        """Whether this capture fails in one of these ways."""
        if self.capture not in ways:
            return False
        if self.captures == 1:
            self.capture = ""
        self.captures = max(self.captures - 1, 0)
        return True

    def strikes(self, name: str) -> bool:
        left = getattr(self, name)
        setattr(self, name, max(left - 1, 0))
        return bool(left == 1)


@dataclass(eq=False)
class Work:
    """One piece of queued work. `host` lists the pinned ranges it touches: (address, bytes, whether it writes). A
    marker takes no time.
    """

    run: Callable[[], None]
    host: tuple[tuple[int, int, bool], ...] = ()
    marker: bool = False


@dataclass(eq=False)
class Node:
    """One captured operation. `check` refuses where a replay would be undefined, `alive` where what it needs is gone by
    the time it runs; `writes` gives the bytes it writes.
    """

    check: Callable[[], object]
    run: Callable[[], None]
    writes: Callable[[], list[Bytes]]
    alive: Callable[[], object] = lambda: None


@dataclass(eq=False)
class Capture:
    thread: int
    nodes: list[Node] = field(default_factory=list)
    invalidated: bool = False


@dataclass(eq=False)
class Queue:
    """A stream: its work in order, and the capture that takes new work instead."""

    handle: int
    work: deque[Work] = field(default_factory=deque)
    capture: Capture | None = None


@dataclass(eq=False)
class Allocation:
    """`open` until it is closed; work queued before that may still use it."""

    kind: str
    address: int
    memory: Bytes
    queue: Queue | None
    open: bool = True

    def holds(self, address: int, size: int) -> bool:
        return self.address <= address and address + size <= self.address + len(self.memory)


def overlap(a: int, a_size: int, b: int, b_size: int) -> bool:
    return a < b + b_size and b < a + a_size


class Gpu:
    """One machine. `counts` and `journal` record every call that does something."""

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        name: str = "NVIDIA Simulated",
        sm: tuple[int, int] = (8, 9),
        devices: int = 1,
        driver_cuda: int = 13000,
        enterprise: bool = False,
    ) -> None:
        self.memory_bytes, self.name, self.sm, self.devices = memory_bytes, name, sm, devices
        self.enterprise = enterprise
        self.driver_cuda = driver_cuda
        """The newest CUDA of the driver, such as 13000; 0 without one."""
        self.faults = Faults()
        self.costs_ms: dict[str, float] = {}
        """What a run of each network takes on the device's clock, 1 where nothing is said, and a copy within it (d2d),
        0 where nothing is.
        """
        self.clock_ms = 0.0
        self.compiled: list[str] = []
        """The networks that had kernels compiled, once for each time that somebody had to wait for it."""
        self.detailed_plans = False
        """Whether plans hold the kinds of their layers."""
        self.counts: Counter[str] = Counter()
        self.journal: list[str] = []
        self.log: list[str] = []
        self.leaks: list[str] = []
        self.queues: dict[int, Queue] = {}
        self.dropped: deque[Allocation] = deque()
        """Allocations that the garbage collector took. It may run anywhere, so it only leaves them here."""
        self.library_bytes = 0
        """What TensorRT took for itself, beside the pool."""
        self.context_bytes = 0
        """What it takes for an execution context."""
        self._pool_bytes = 0
        self._dead = ""
        self._replays = 0
        self._lock = threading.RLock()
        self._allocations: dict[int, Allocation] = {}
        self._backing: list[Bytes] = []
        self._threads = threading.local()

    # For tests

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """What is counted within the block, zeros left out; filled in when the block ends."""
        before, found = self.counts.copy(), dict[str, int]()
        yield found
        self.bury()
        found.update(
            {name: number - before[name] for name, number in sorted(self.counts.items()) if number != before[name]}
        )

    def used_bytes(self, kind: str = "device") -> int:
        self.bury()
        return sum(len(a.memory) for a in list(self._allocations.values()) if a.open and a.kind == kind)

    def taken_bytes(self) -> int:
        """What nothing else on the device can have: the pool, whether it is in use or not, and what libraries took."""
        self.bury()
        return self._pool_bytes + self.library_bytes

    def forget_current(self) -> None:
        """Make this thread one that has not chosen a device."""
        self._threads.device = None

    # What every call does first

    @contextmanager
    def call(self, what: str = "", *, current: bool = True, unsafe: bool = False) -> Iterator[None]:
        """One call of a library, counted as `what`. `unsafe` ones may not be made by a thread that is capturing."""
        with self._lock:
            self.bury()
            if self._dead:
                raise CUDAError(self._dead)
            if current and getattr(self._threads, "device", None) is None:
                raise Refused(f"{what or 'a call'}: this thread has no current device; Device.set_current comes first")
            if unsafe:
                for queue in self.queues.values():
                    if queue.capture is not None and queue.capture.thread == threading.get_ident():
                        queue.capture.invalidated = True
                        raise Refused(f"{what}: cannot be captured")
            if what:
                self.counts[what] += 1
                self.journal.append(what)
            yield

    def set_current(self, device: int) -> None:
        with self.call(current=False):
            self._threads.device = device

    # Memory

    def allocate(self, kind: str, size: int, queue: Queue | None = None) -> Allocation:
        with self.call("allocations" if kind == "device" else "pinned_allocations", unsafe=True):
            if size <= 0:
                raise Refused(f"an allocation of {size} bytes")
            # What was freed stays in the pool, for the next that comes to it, until the pool is trimmed.
            pool = max(self._pool_bytes, self.used_bytes() + size) if kind == "device" else self._pool_bytes
            if self.faults.strikes("allocation") or (
                kind == "device" and pool + self.library_bytes > self.memory_bytes
            ):
                raise CUDAError(
                    "CUDA_ERROR_OUT_OF_MEMORY: The API call failed because it was unable to allocate enough memory"
                )
            self._pool_bytes = pool
            backing = np.full(size + ALIGNMENT, STALE, np.uint8)
            self._backing.append(
                backing
            )  # kept for good: a dangling view reads stale bytes instead of ending the process
            start = -backing.ctypes.data % ALIGNMENT
            allocation = Allocation(kind, backing.ctypes.data + start, backing[start : start + size], queue)
            self._allocations[allocation.address] = allocation
            return allocation

    def trim(self, keep: int) -> None:
        """Give back what the pool holds for nobody. A free that the host has not seen done counts as in use."""
        with self.call(current=False, unsafe=True):
            held = sum(len(a.memory) for a in self._allocations.values() if a.kind == "device")
            self._pool_bytes = min(self._pool_bytes, max(held, keep))

    def take(self, size: int) -> bool:
        """Memory for a library itself, which the pool does not give; False where there is none."""
        if self._pool_bytes + self.library_bytes + size > self.memory_bytes:
            return False
        self.library_bytes += size
        return True

    def free(self, allocation: Allocation, queue: Queue | None) -> None:
        """Close an allocation: pinned memory once the queue is empty, device memory in its turn. Works on a dead device
        too.
        """
        with self._lock:
            if not allocation.open:
                return
            if allocation.kind == "pinned":
                if queue is None:
                    raise Refused(
                        "pinned memory closed without a stream: that waits for the default stream, which orders nothing"
                        " here"
                    )
                if not self._dead:
                    self.synchronise(queue)
                self._end(allocation)
                return
            queue = queue or allocation.queue
            assert queue is not None
            if queue.capture is not None:
                queue.capture.invalidated = True
                raise Refused("a free on a stream that is being captured")
            self.counts["frees"] += 1
            allocation.open = False
            queue.work.append(Work(lambda: self._end(allocation), marker=True))

    def find(self, address: int, size: int, *, queued: bool = False) -> Allocation:
        """The allocation that holds a range. `queued` work also reaches one that was closed after it."""
        for allocation in list(self._allocations.values()):
            if (allocation.open or queued) and allocation.holds(address, size):
                return allocation
        raise Refused(f"address {address:#x}, {size} bytes: freed, or neither device nor pinned memory")

    def view(self, address: int, size: int) -> Bytes:
        """The bytes of a range, for work that runs now."""
        allocation = self.find(address, size, queued=True)
        return allocation.memory[address - allocation.address :][:size]

    def drop(self, allocation: Allocation) -> None:
        """What the garbage collector took is freed by the call that comes next. A thread that is capturing spoils its
        capture at once: freeing waits for a stream.
        """
        self.dropped.append(allocation)
        for queue in list(self.queues.values()):
            if queue.capture is not None and queue.capture.thread == threading.get_ident():
                queue.capture.invalidated = True

    def bury(self) -> None:
        """Free what the garbage collector took, unless a capture is on its way."""
        with self._lock:
            if any(queue.capture is not None for queue in self.queues.values()):
                return
            while self.dropped:
                allocation = self.dropped.popleft()
                if allocation.kind == "device":
                    self.free(allocation, allocation.queue)
                elif allocation.open:
                    if allocation.queue is not None and not self._dead:
                        self.advance(allocation.queue, everything=True)  # the stream its freeing was given waits
                    if any(
                        overlap(address, size, allocation.address, len(allocation.memory))
                        for address, size, _ in self._host_ranges()
                    ):
                        raise Refused("pinned memory dropped while a queued copy uses it")
                    self._end(allocation)

    def _end(self, allocation: Allocation) -> None:
        if allocation.kind == "pinned":
            self.counts["pinned_frees"] += 1
        allocation.open = False
        allocation.memory[...] = STALE
        self._allocations.pop(allocation.address, None)

    def _host_ranges(self) -> list[tuple[int, int, bool]]:
        return [span for queue in self.queues.values() for work in queue.work for span in work.host]

    # Work

    def queue(self, handle: int) -> Queue:
        if handle in DEFAULT_STREAMS:
            raise Refused("the default stream: it waits for every other one and cannot be captured")
        if handle not in self.queues:
            raise Refused(f"stream {handle:#x}: unknown")
        return self.queues[handle]

    def capture_of(self, queue: Queue) -> Capture | None:
        """The capture that takes this thread's new work on a queue."""
        capture = queue.capture
        if capture is not None:
            if capture.thread != threading.get_ident():
                raise Refused("work on a stream that another thread is capturing")
            if capture.invalidated:
                raise CUDAError(
                    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: The operation is not permitted: an error before broke the"
                    " capture"
                )
        return capture

    def copy(self, target: int, source: int, size: int, queue: Queue) -> None:
        kinds = {("device", "pinned"): "h2d", ("pinned", "device"): "d2h", ("device", "device"): "d2d"}
        with self.call():
            to, from_ = self.find(target, size).kind, self.find(source, size).kind
            if (to, from_) not in kinds:
                raise Refused(f"a copy from {from_} to {to} memory")
            if overlap(target, size, source, size):
                raise Refused("a copy between ranges that overlap")
            if (capture := self.capture_of(queue)) is not None:
                found = [(target, size), (source, size)]
                capture.nodes.append(
                    Node(
                        lambda: [self.find(*span) for span in found],
                        lambda: self._move(target, source, size),
                        lambda: [self.view(target, size)],
                    )
                )
                return
        kind = kinds[to, from_]
        with self.call(kind):
            if self.faults.strikes("copy"):
                raise CUDAError(
                    "CUDA_ERROR_INVALID_VALUE: This indicates that one or more of the parameters passed is not within"
                    " an acceptable range"
                )
            if kind == "d2d":
                queue.work.append(Work(lambda: self._move(target, source, size, self.costs_ms.get(kind, 0.0))))
            else:
                self._queue_host_copy(kind, target, source, size, queue)

    def _queue_host_copy(self, kind: str, target: int, source: int, size: int, queue: Queue) -> None:
        """From now until it runs, the host may touch neither the pinned source of a copy nor its pinned target."""
        address, writes = (source, False) if kind == "h2d" else (target, True)
        others = [writing for start, length, writing in self._host_ranges() if overlap(address, size, start, length)]
        if writes and not others:
            self.view(address, size)[...] = STALE  # a host that does not wait reads NaN
        before = zlib.crc32(self.view(address, size))

        def run() -> None:
            if True not in others and zlib.crc32(self.view(address, size)) != before:
                raise Refused(f"{kind}: the host changed pinned memory while a queued copy was using it")
            self._move(target, source, size)

        queue.work.append(Work(run, ((address, size, writes),)))

    def _move(self, target: int, source: int, size: int, cost_ms: float = 0.0) -> None:
        self.clock_ms += cost_ms
        self.view(target, size)[...] = self.view(source, size)

    def fill(self, address: int, value: int, size: int, queue: Queue) -> None:
        def run() -> None:
            self.view(address, size)[...] = value

        with self.call():
            if self.find(address, size).kind != "device":
                raise Refused("a fill of pinned memory")
            if (capture := self.capture_of(queue)) is not None:
                capture.nodes.append(Node(lambda: self.find(address, size), run, lambda: [self.view(address, size)]))
                return
        with self.call("fills"):
            queue.work.append(Work(run))

    def launch(self, nodes: list[Node], queue: Queue) -> None:
        """Queue a replay of captured operations."""
        with self.call("launches"):
            if queue.capture is not None:
                queue.capture.invalidated = True
                raise Refused("a graph launch on a stream that is being captured")
            for node in nodes:
                node.check()
            queue.work.append(Work(lambda: self.compute(lambda: self._replay(nodes))))

    def _replay(self, nodes: list[Node]) -> None:
        for node in nodes:
            node.alive()
            if self.faults.replay != "nothing":
                node.run()
            if self.faults.replay == "wrong":
                for written in node.writes():
                    written[:4].view(np.float32)[...] += 1
            if self.faults.drift == "replays":
                self._replays += 1
                for written in node.writes():
                    numbers = written.view(np.float32)
                    numbers[...] = np.nextafter(numbers, np.inf if self._replays % 2 else -np.inf, dtype=np.float32)

    def compute(self, run: Callable[[], None]) -> None:
        """Run kernels now, unless it is the call that fails."""
        if self.faults.strikes("illegal_address"):
            self._dead = (
                "CUDA_ERROR_ILLEGAL_ADDRESS: While executing a kernel, the device encountered a load or store"
                " instruction on an invalid address"
            )
            raise CUDAError(self._dead)
        run()

    def synchronise(self, queue: Queue) -> None:
        with self.call("syncs", current=False, unsafe=True):
            self.advance(queue, everything=True)

    def advance(self, queue: Queue, *, everything: bool) -> None:
        """Run what is queued, or the first piece of it with the markers around it."""
        worked = False
        while queue.work and (everything or queue.work[0].marker or not worked):
            work = queue.work.popleft()
            worked = worked or not work.marker
            try:
                work.run()
            except CUDAError:
                queue.work.clear()
                raise


def stale(array: NDArray[Any]) -> bool:
    """Whether an array holds nothing but bytes that were never written."""
    return bool((np.ascontiguousarray(array).view(np.uint8) == STALE).all())
