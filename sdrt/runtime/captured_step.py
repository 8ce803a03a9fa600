"""The denoising step on a GPU: buffers, execution contexts and captured CUDA graphs for one shape, and a job that runs on them.

`sdrt.runtime.tensorrt` owns the device, the stream and the engines; this owns what a job needs of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sdrt import bundle as names
from sdrt.bundle import Bundle
from sdrt.errors import UsageError
from sdrt.runtime.device_memory import Block
from sdrt.runtime.engine import Float, Job, Pixels

if TYPE_CHECKING:
    from sdrt.runtime.tensorrt import TensorRtEngine

_AHEAD = 2
"""Model calls the host may be ahead of the device: enough to keep it busy, few enough that progress and cancelling are true."""
_POLL_S = 100e-6


@dataclass(frozen=True)
class Shape:
    """What a captured graph is bound to: pictures, latent height and width, tokens, guidance branches."""

    pictures: int
    height: int
    width: int
    tokens: int
    branches: int


class Slot:
    """Buffers, two contexts and two captured graphs for one shape. Row 0 reads `inputs` and writes `outputs`, row 1 the other way."""

    def __init__(self, engine: TensorRtEngine, shape: Shape, bundle: Bundle) -> None:
        rows, registers, channels = engine.rows, names.REGISTERS, bundle.manifest.latents.channels
        latents = (shape.pictures, channels, shape.height, shape.width)
        f32 = np.float32
        self.shape, self.latents = shape, latents
        self.contexts: list[Any] = []
        self.graphs: list[Any] | None = None
        self.context_sets: Block | None = None
        context = (shape.branches * shape.pictures, shape.tokens, bundle.manifest.text.width)
        extra = bundle.manifest.latents.concat_channels
        concat = [("concat", (shape.branches * shape.pictures, extra, shape.height, shape.width), f32)] if extra else []
        self.inputs = engine.block(
            [
                ("row", (1,), np.int64), ("timestep", (rows,), f32), ("a", (rows, registers), f32), ("w", (rows, shape.branches), f32),
                ("u", (rows, registers), f32), ("q", (rows,), f32), ("M", (rows, registers, registers + 2), f32), ("inpaint", (rows, 3), f32),
                ("registers", (registers, *latents), f32), ("context", context, f32),
                *concat, ("mask", (shape.pictures, 1, shape.height, shape.width), f32), ("init", latents, f32), ("init_noise", latents, f32),
                ("noise", (rows, *latents), f32),
            ]
        )  # fmt: skip
        try:
            self.outputs = engine.block([("row", (1,), np.int64), ("registers", (registers, *latents), f32), ("denoised", latents, f32)])
        except BaseException:
            self.inputs.close(engine.stream)  # now, not when the error is forgotten: a smaller picture may be asked for first
            raise
        try:
            self._bind(engine)
            if not engine.graphs_disabled:
                self.graphs = self._capture(engine)
        except BaseException:
            self.close(engine.stream)
            raise

    def launch(self, engine: TensorRtEngine, row: int) -> None:
        """Start one model call."""
        engine.watched.count("launches")
        if self.graphs is None:
            engine.watched.around(names.STEP, engine.stream, lambda: engine.enqueue(self.contexts[row % 2], names.STEP, engine.stream))
        else:
            graph = self.graphs[row % 2]
            engine.watched.around(names.STEP, engine.stream, lambda: graph.launch(engine.stream))

    def hold_context_sets(self, engine: TensorRtEngine, sets: Sequence[Float]) -> None:
        """Put a job's context sets on the device, in memory that stays with the slot: the next such job allocates nothing."""
        if self.context_sets is None or len(self.context_sets.layout.sections) < len(sets):
            if self.context_sets is not None:
                self.context_sets.close(engine.stream)
                self.context_sets = None
            shape = self.inputs.layout.sections["context"].shape
            self.context_sets = engine.block([(_set(i), shape, np.float32) for i in range(len(sets))])
        for i, context in enumerate(sets):
            self.context_sets.host(_set(i))[...] = context
        self.context_sets.upload(engine.stream, _set(0), _set(len(sets) - 1))

    def change_context(self, engine: TensorRtEngine, index: int) -> None:
        """Start the one copy that gives the next rows another context set. The rows before have read theirs: one stream, one order."""
        assert self.context_sets is not None
        self.inputs.copy(engine.stream, "context", self.context_sets, _set(index))

    def close(self, stream: Any) -> None:
        for graph in self.graphs or []:
            graph.close()
        self.contexts.clear()
        if self.context_sets is not None:
            self.context_sets.close(stream)
        self.inputs.close(stream)
        self.outputs.close(stream)

    def _bind(self, engine: TensorRtEngine) -> None:
        self.inputs.clear(engine.stream)
        self.outputs.clear(engine.stream)
        profile = engine.profile(self.shape)
        self.contexts += [engine.context(names.STEP), engine.context(names.STEP)]
        for context, here, there in zip(self.contexts, (self.inputs, self.outputs), (self.outputs, self.inputs), strict=True):
            addresses = {name: (self.inputs.address(name), section.shape) for name, section in self.inputs.layout.sections.items()}
            addresses |= {name: (here.address(name), self.inputs.layout.sections[name].shape) for name in ("row", "registers")}
            engine.bind(context, names.STEP, profile, addresses)
            for name, address in zip(names.STEP_OUTPUTS, (there.address("registers"), there.address("row"), self.outputs.address("denoised")), strict=True):
                context.set_tensor_address(name, address)

    def _capture(self, engine: TensorRtEngine) -> list[Any] | None:
        """Capture both contexts, and check a replay of each against plain execution once. None, and graphs off, where that fails."""
        graphs = []
        self._fill_for_check(engine.stream)
        for row, context in enumerate(self.contexts):
            # Once uncaptured: TensorRT finishes its own set-up on the first run after shapes and addresses change.
            engine.enqueue(context, names.STEP, engine.stream)
            plain = self._written(row, engine.stream)
            try:
                graph = _captured(engine, context)
            except Exception as error:
                if "OUT_OF_MEMORY" in str(error):
                    raise
                engine.disable_graphs(f"capturing failed: {error}")
                return None
            self._spoil(row, engine.stream)
            graph.launch(engine.stream)
            if not np.array_equal(plain, self._written(row, engine.stream)):
                engine.disable_graphs("a replayed graph gave other numbers than plain execution")
                return None
            graphs.append(graph)
        return graphs

    def _fill_for_check(self, stream: Any) -> None:
        """Small numbers everywhere, so that a replay that reads or writes the wrong place shows."""
        random = np.random.RandomState(0)
        for name in self.inputs.layout.sections:
            array = self.inputs.host(name)
            array[...] = 0 if name == "row" else random.standard_normal(array.shape) * 0.1
        self.inputs.upload(stream, "row", "noise")

    def _written(self, row: int, stream: Any) -> NDArray[np.float32]:
        """The registers a row has just written."""
        block = self._target(row)
        block.download(stream, "registers", "registers")
        stream.sync()
        return np.array(block.host("registers"))

    def _spoil(self, row: int, stream: Any) -> None:
        """Overwrite the registers a row has written, so that a replay that writes nothing shows too."""
        block = self._target(row)
        block.host("registers")[...] = np.nan
        block.upload(stream, "registers", "registers")

    def _target(self, row: int) -> Block:
        return self.inputs if row % 2 else self.outputs


def _set(index: int) -> str:
    return f"context {index}"


def _captured(engine: TensorRtEngine, context: Any) -> Any:
    builder = engine.stream.create_graph_builder()
    try:
        builder.begin_building("thread_local")  # the default mode would break other threads' work on this device
        engine.enqueue(context, names.STEP, builder.stream)
        graph = builder.end_building().complete()
    except BaseException:
        with suppress(Exception):
            builder.close()  # ends the capture, without which the stream is unusable; `end_building` does not end one that broke
        raise
    builder.close()
    graph.upload(engine.stream)
    return graph


class TensorRtDenoising:
    """One job on its way. `close` gives its slot back; leaving that to the garbage collector works too."""

    def __init__(self, engine: TensorRtEngine, slot: Slot, job: Job) -> None:
        self._engine = engine
        self._slot: Slot | None = None
        self._job = job
        self._row = 0
        self._events: deque[Any] = deque()
        engine.stream.sync()  # a cancelled job may still be reading this slot's pinned memory
        inputs = slot.inputs
        registers = inputs.host("registers")
        registers[...] = 0  # 0 times a stale NaN would be NaN
        registers[0], registers[1] = job.init, job.unit_noise
        first = job.contexts[job.context_of_row[0]]
        for name, array in (("context", first), ("concat", job.concat), ("mask", job.mask), ("init", job.init), ("init_noise", job.unit_noise)):
            if array is not None:
                inputs.host(name)[...] = array
        if len(set(job.context_of_row)) > 1:
            slot.hold_context_sets(engine, job.contexts)
        inputs.upload(engine.stream, "row", "noise", self._fill_tables(slot))
        self._slot = slot  # ours to give back from here on

    def step(self) -> None:
        slot, event = self._open(), self._passed_event()
        with self._engine.guarded(names.STEP):
            if self._row and self._row % self._engine.rows == 0:
                self._refill(slot)
            index = self._job.context_of_row[self._row]
            if self._row and index != self._job.context_of_row[self._row - 1]:
                slot.change_context(self._engine, index)
            slot.launch(self._engine, self._row)
            self._events.append(self._engine.stream.record(event))
            self._row += 1

    def _passed_event(self) -> Any:
        """Wait until the device is less than `_AHEAD` model calls behind. Returns an event to use again, None while there are few."""
        if len(self._events) < _AHEAD:
            return None
        while True:
            with self._engine.guarded(names.STEP):
                if self._events[0].is_done:
                    return self._events.popleft()
            time.sleep(_POLL_S)  # polled, not synchronised: the device never waits for the host

    def latents(self) -> Float:
        slot = self._open()
        with self._engine.guarded(names.STEP):
            block = self._current(slot)
            block.download(self._engine.stream, "registers", "registers")
            self._engine.stream.sync()
            return np.array(block.host("registers")[0])

    def denoised(self) -> Float:
        slot = self._open()
        with self._engine.guarded(names.STEP):
            slot.outputs.download(self._engine.stream, "denoised", "denoised")
            self._engine.stream.sync()
            return np.array(slot.outputs.host("denoised"))

    def decode(self, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        slot = self._open()
        with self._engine.guarded(names.VAE_DECODER):
            return self._engine.decode_at(self._current(slot).address("registers"), slot.latents, rounding)

    def close(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            self._engine.give_back(slot)

    def __del__(self) -> None:
        self.close()

    def _open(self) -> Slot:
        if self._slot is None:
            raise UsageError("step: passed already", "Read a step before asking the stream for the next one.")
        return self._slot

    def _current(self, slot: Slot) -> Block:
        """The block that holds the registers now: the last row wrote it."""
        return slot.outputs if self._row % 2 else slot.inputs

    def _fill_tables(self, slot: Slot) -> int:
        """Put the next rows' tables and noise into pinned memory. Returns the bytes of noise in use."""
        tables, rows = self._job.tables, self._engine.rows
        count = min(rows, len(tables.q) - self._row)
        span = slice(self._row, self._row + count)
        for name in names.STEP_TABLES[:-1]:
            slot.inputs.host(name)[:count] = getattr(tables, name)[span]
        slot.inputs.host("row")[0] = 0
        slot.inputs.host("noise")[:count] = self._job.noise[span]
        return int(self._job.noise[span].nbytes)

    def _refill(self, slot: Slot) -> None:
        """The tables hold a fixed number of rows; longer runs replace them between two steps, after the rows before have read theirs."""
        stream = self._engine.stream
        noise_bytes = self._fill_tables(slot)  # the copy that last read this pinned memory ended before a row whose event has been seen
        slot.inputs.upload(stream, "row", "inpaint")
        slot.inputs.upload(stream, "noise", "noise", noise_bytes)
        if self._row % 2:  # this row reads its number from the outputs
            slot.outputs.host("row")[0] = 0
            slot.outputs.upload(stream, "row", "row")
