"""The running batch: pictures join a free slot, step together, and leave. Each picture joins and leaves at its own
time.

This file decides which picture has which slot and which rows of the tables. A slot has a fixed number of rows; if a
picture has more model calls, the rows are refilled. A backend provides the memory and makes the calls (`StepMemory`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.graphs import FED_BACK, IDLE_ROW, OF_TEXT, Signature, concrete, table_rows
from sdrt.errors import UsageError
from sdrt.runtime.engine import BatchShape, Float, Job, Pixels

Part = tuple[str, int, int]
"""A part of a step input along its first axis: name, first entry, and the entry after the last."""


def step_sizes(shape: BatchShape, capacity: int, rows: int) -> dict[str, int]:
    """The sizes of the step's free axes, with `rows` table rows per slot."""
    return {
        "N": capacity,
        "G": shape.branches,
        "S": table_rows(capacity, rows),
        "T": shape.tokens,
        "h": shape.height,
        "w": shape.width,
    }


class StepMemory(Protocol):
    """The inputs and outputs of the step graph, and the call. An input that is an output of the call before has two
    places in memory, which take turns.
    """

    def host(self, name: str) -> NDArray[Any]:
        """An input to write into, zero at first. For `registers` and `row` it is the place that the next call reads.
        Call `upload` after writing.
        """

    def together(self, calls: int) -> None:
        """The next so many calls will come one after the other with nothing written in between, and a picture's
        decoding after them, as a rule. A backend may wait for that.
        """

    def upload(self, parts: Sequence[Part]) -> None:
        """Make the next call read what was written into these parts."""

    def ready(self) -> None:
        """Wait until parts may be written into again."""

    def hold_contexts(self, slot: int, contexts: Sequence[Mapping[str, Float]]) -> None:
        """Keep the context sets of a slot, as in `Job.contexts`, for `change_context`."""

    def change_context(self, slot: int, index: int) -> None:
        """Give a slot another one of its context sets, from the next call on."""

    def call(self) -> None:
        """One model call."""

    def latents(self, slots: Sequence[int]) -> Float: ...

    def denoised(self, slots: Sequence[int]) -> Float: ...

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]: ...

    def describe(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass
class _Picture:
    """A picture in a slot. `calls` is how many of its rows have run."""

    job: Job
    calls: int = 0


class Slots:
    """A `RunningBatch` over a backend's memory. Each slot has `rows` rows of the tables, and all slots share the idle
    row.

    The rows of a slot are a ring. If a picture has more rows than the ring, the last one leads to the first, which by
    then holds the picture's next row. The picture's very last row leads to the idle row, so a finished picture stays as
    it is. A slot without a picture is at the idle row too.
    """

    def __init__(self, memory: StepMemory, signature: Signature, shape: BatchShape, capacity: int, rows: int) -> None:
        self.capacity = capacity
        self._memory, self._signature, self._shape, self._rows = memory, signature, shape, rows
        self._pictures: list[_Picture | None] = [None] * capacity
        self._written: list[Part] = []
        memory.ready()
        for name in signature.tables:
            memory.host(name)[IDLE_ROW] = 0
            self._written.append((name, IDLE_ROW, IDLE_ROW + 1))
        np.fill_diagonal(memory.host("M")[IDLE_ROW], 1)
        memory.host("inpaint")[IDLE_ROW, 0] = 1  # k: the blend of the latents has weight 1 - k, so it is off
        memory.host("next")[IDLE_ROW] = IDLE_ROW
        memory.host("row")[...] = IDLE_ROW
        self._written.append(("row", 0, capacity))

    def join(self, job: Job) -> int:
        if None not in self._pictures:
            raise UsageError(
                f"step: all {self.capacity} slots are taken", "Let a picture leave first, or open a larger batch."
            )
        self._check(job)
        slot = self._pictures.index(None)
        self._memory.ready()
        first = job.contexts[job.context_of_row[0]]
        for name in self._signature.of_picture:
            value = first[name] if name in OF_TEXT else job.inputs[name]
            self._write(name, slot, _with_branches(value, self._shape.branches) if self._has_branches(name) else value)
        if len(set(job.context_of_row)) > 1:
            branches = self._shape.branches
            sets = [{name: _with_branches(value, branches) for name, value in one.items()} for one in job.contexts]
            self._memory.hold_contexts(slot, sets)
        registers = self._memory.host("registers")[slot]
        registers[...] = 0  # without this, 0 times a stale NaN would be NaN
        registers[0], registers[1] = job.inputs["init"], job.inputs["init_noise"]
        self._written.append(("registers", slot, slot + 1))
        self._fill(slot, job, 0)
        self._write("row", slot, self._first_row(slot))
        self._pictures[slot] = _Picture(job)  # last: a slot is free until everything of its picture is there
        return slot

    def step(self) -> None:
        for slot, picture in enumerate(self._pictures):
            if picture is not None and 0 < picture.calls < picture.job.rows:
                self._prepare(slot, picture.job, picture.calls)
        if calls := self._calls_together():
            self._memory.together(calls)
        if self._written:
            self._memory.upload(self._written)
            self._written = []
        self._memory.call()
        for picture in self._pictures:
            if picture is not None:
                picture.calls += 1

    def leave(self, slot: int) -> None:
        picture, self._pictures[slot] = self._pictures[slot], None
        if picture is not None and picture.calls < picture.job.rows:
            self._memory.ready()
            self._write("row", slot, IDLE_ROW)

    def latents(self, slots: Sequence[int]) -> Float:
        return self._memory.latents(slots)

    def denoised(self, slots: Sequence[int]) -> Float:
        return self._memory.denoised(slots)

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self._memory.decode(slots, rounding)

    def describe(self) -> dict[str, Any]:
        return self._memory.describe()

    def close(self) -> None:
        self._memory.close()

    def _calls_together(self) -> int:
        """The calls of all pictures, where all begin with the next one, and nothing is written on their way; else 0."""
        pictures = [picture for picture in self._pictures if picture is not None]
        rows = {picture.job.rows for picture in pictures}
        alike = len(rows) == 1 and all(len(set(picture.job.context_of_row)) == 1 for picture in pictures)
        if not alike or any(picture.calls for picture in pictures) or max(rows) > self._rows:
            return 0
        return max(rows)

    def _prepare(self, slot: int, job: Job, row: int) -> None:
        """Prepare the call of a picture's row: write its numbers where the ring begins again, and change its context
        where another one holds.
        """
        if row % self._rows == 0:
            self._memory.ready()
            self._fill(slot, job, row)
        if job.context_of_row[row] != job.context_of_row[row - 1]:
            self._memory.change_context(slot, job.context_of_row[row])

    def _fill(self, slot: int, job: Job, row: int) -> None:
        """Write a picture's rows from `row` on, as many as the slot holds."""
        first, count = self._first_row(slot), min(self._rows, job.rows - row)
        for name, table in job.tables.items():
            here = self._memory.host(name)[first : first + count]
            if self._has_branches(name):
                here[:, table.shape[1] :] = 0
                here = here[:, : table.shape[1]]
            here[...] = table[row : row + count]
        following = self._memory.host("next")[first : first + count]
        following[...] = range(first + 1, first + count + 1)
        following[-1] = first if row + count < job.rows else IDLE_ROW
        # All rows of the slot, used or not: in a batch of one slot the tables then lie side by side and are one copy.
        # Noise is large, so only its used rows are written.
        self._written += [
            (name, first, first + (count if name == "noise" else self._rows)) for name in self._signature.tables
        ]

    def _first_row(self, slot: int) -> int:
        return table_rows(slot, self._rows)

    def _write(self, name: str, slot: int, value: object) -> None:
        self._memory.host(name)[slot] = value
        self._written.append((name, slot, slot + 1))

    def _has_branches(self, name: str) -> bool:
        return self._signature.inputs[name].shape[1:2] == ("G",)

    def _check(self, job: Job) -> None:
        given: dict[str, Any] = {
            **job.tables,
            **{f"{name} {i}": value for i, one in enumerate(job.contexts) for name, value in one.items()},
            **job.inputs,
        }
        sizes = step_sizes(self._shape, 1, 1) | {"S": job.rows, "G": min(job.shape.branches, self._shape.branches)}
        expected: dict[str, tuple[int, ...]] = {}
        for name in (*self._signature.tables, *self._signature.of_picture):
            shape = concrete(self._signature.inputs[name].shape, sizes)
            if name in OF_TEXT:
                expected |= {f"{name} {i}": shape[1:] for i in range(len(job.contexts))}
            elif name != "next":
                expected[name] = shape if name in self._signature.tables else shape[1:]
        for name in dict.fromkeys((*expected, *given)):  # in an order, so that the message is always the same
            found = given[name].shape if name in given else None
            if found != expected.get(name):
                raise UsageError(f"step: {name}: shape {found}, this batch takes {expected.get(name)}")


def _with_branches(value: Float, branches: int) -> Float:
    """`value` `[g, ...]` with more branches, copies of the last one. Their weights are 0."""
    return np.concatenate([value, *[value[-1:]] * (branches - len(value))]) if len(value) < branches else value


class HostMemory:
    """`StepMemory` in ordinary memory, for engines that compute there. Everything but the call itself."""

    def __init__(self, signature: Signature, sizes: Mapping[str, int]) -> None:
        def zeros(name: str) -> NDArray[Any]:
            tensor = signature.inputs[name] if name in signature.inputs else signature.outputs[name]
            return np.zeros(concrete(tensor.shape, sizes), tensor.dtype)

        self.inputs = {name: zeros(name) for name in signature.inputs if name not in FED_BACK}
        self.fed_back = [{name: zeros(name) for name in FED_BACK} for _ in range(2)]
        self.outputs = {name: zeros(name) for name in signature.outputs if name not in FED_BACK.values()}
        self.calls = 0
        self._contexts: dict[int, Sequence[Mapping[str, Float]]] = {}

    def bound(self, side: int) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """The inputs and outputs of a call, by name, if the call reads the fed-back inputs of `side`, 0 or 1."""
        written = {FED_BACK[name]: array for name, array in self.fed_back[1 - side].items()}
        return self.inputs | self.fed_back[side], written | self.outputs

    def host(self, name: str) -> NDArray[Any]:
        return self.fed_back[self.calls % 2][name] if name in FED_BACK else self.inputs[name]

    def together(self, calls: int) -> None:
        """Nothing to wait for: a call has ended when it returns."""

    def upload(self, parts: Sequence[Part]) -> None:
        """Nothing to do: data is read where it was written."""

    def ready(self) -> None:
        """Always ready: a call has ended when it returns."""

    def hold_contexts(self, slot: int, contexts: Sequence[Mapping[str, Float]]) -> None:
        self._contexts[slot] = contexts

    def change_context(self, slot: int, index: int) -> None:
        for name, value in self._contexts[slot][index].items():
            self.inputs[name][slot] = value

    def latents(self, slots: Sequence[int]) -> Float:
        return self.host("registers")[list(slots), 0]

    def denoised(self, slots: Sequence[int]) -> Float:
        return self.outputs["denoised"][list(slots)]
