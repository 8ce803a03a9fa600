"""The denoising step on a GPU: buffers, execution contexts and captured CUDA graphs for one shape, and the memory of a
running batch on top.

`sdrt.runtime.backends.tensorrt.plans` owns the device, the stream and what is loaded; this owns what a running batch
needs of them.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.graphs import CONTEXT, FED_BACK, STEP, VAE_DECODER, Signature, concrete
from sdrt.errors import ResourceError, UsageError
from sdrt.runtime.backends.tensorrt.blocks import Activations, Block, out_of_memory
from sdrt.runtime.backends.tensorrt.capture import agree, captured
from sdrt.runtime.backends.tensorrt.picture import ROUNDING, WholePicture
from sdrt.runtime.backends.tensorrt.plans import Plans
from sdrt.runtime.engine import BatchShape, Float, Pixels
from sdrt.runtime.running_batch import Part, step_sizes

_AHEAD = 2
"""Model calls the host may be ahead of the device: enough to keep it busy, few enough that progress and cancelling are
true.
"""
_POLL_S = 100e-6
log = logging.getLogger("sdrt")

_KEPT_PICTURES = 4
"""Graphs of whole pictures kept with a step, each for a number of model calls and the slots it decodes."""
_IDLE_STEPS = 4
"""Idle sets of buffers, contexts and graphs kept, least recently used dropped first."""


class CapturedStep:
    """Buffers, two contexts and two captured graphs for a shape and a number of slots, whoever sits in them.

    Call 0 reads what is fed back from `inputs` and writes it to `outputs`, call 1 the other way.
    """

    def __init__(self, plans: Plans, signature: Signature, shape: BatchShape, capacity: int) -> None:
        self.shape, self.capacity = shape, capacity
        self.contexts: list[Any] = []
        self.graphs: list[Any] | None = None
        self.busy = False
        """Whether work on the stream may still use the pinned memory."""
        self._activations: Activations | None = None
        self._pictures: OrderedDict[tuple[int, tuple[int, ...]], WholePicture | None] = OrderedDict()
        self.context_sets: list[Block | None] = [None] * capacity
        self._signature = signature
        self.rows = plans.rows(shape, capacity)
        sizes = step_sizes(shape, capacity, self.rows)
        # Noise comes last: of all it is the one of which a picture uses a part only.
        inputs = sorted(signature.inputs.items(), key=lambda item: item[0] == "noise")
        outputs = {back: signature.outputs[name] for back, name in FED_BACK.items()} | {
            "denoised": signature.outputs["denoised"]
        }
        self.inputs = plans.block(
            [
                (ROUNDING, (1,), np.float32),  # the decoder's, where a picture is one graph
                *((name, concrete(tensor.shape, sizes), tensor.dtype) for name, tensor in inputs),
            ]
        )
        try:
            self.outputs = plans.block(
                [(name, concrete(tensor.shape, sizes), tensor.dtype) for name, tensor in outputs.items()]
            )
        except BaseException:
            self.inputs.close(
                plans.stream
            )  # now, not when the error is forgotten: a smaller picture may be asked for first
            raise
        try:
            self._bind(plans)
            if not plans.graphs_disabled:
                self.graphs = self._capture(plans)
        except BaseException:
            self.close(plans.stream)
            raise

    @property
    def outgrown(self) -> bool:
        """Whether its graphs hold an activation block that a larger one has replaced: that is freed with the step."""
        return self._activations is not None and self._activations.replaced

    def launch(self, plans: Plans, call: int) -> None:
        """Start one model call."""
        plans.watched.count("launches")
        if self.graphs is None:
            plans.watched.around(STEP, plans.stream, lambda: plans.enqueue(self.contexts[call % 2], STEP, plans.stream))
        else:
            graph = self.graphs[call % 2]
            plans.watched.around(STEP, plans.stream, lambda: graph.launch(plans.stream))

    def picture(self, plans: Plans, calls: int, slots: tuple[int, ...]) -> WholePicture | None:
        """All of a picture's or batch's model calls and its decoding as one graph. None where that fails, or the device
        has no memory for it: then calls are launched one by one.
        """
        key = calls, slots
        if key not in self._pictures:
            while len(self._pictures) >= _KEPT_PICTURES:
                self._close_picture(plans.stream)
            try:
                self._pictures[key] = WholePicture.captured(plans, self, calls, slots)
            except Exception as error:
                if not (out_of_memory(error) or isinstance(error, ResourceError)):
                    raise
                log.info("no memory for a graph of a whole picture: %s", error)
                self._pictures[key] = None
        self._pictures.move_to_end(key)
        return self._pictures[key]

    def _close_picture(self, stream: Any) -> None:
        _, picture = self._pictures.popitem(last=False)
        if picture is not None:
            picture.close(stream)

    def block_of(self, name: str, call: int) -> Block:
        """The block that holds a step input for a call."""
        return self.outputs if name in FED_BACK and call % 2 else self.inputs

    def hold_contexts(self, plans: Plans, slot: int, sets: Sequence[Mapping[str, Float]]) -> None:
        """Put a picture's context sets on the device, in memory that stays with the slot: the next such picture
        allocates nothing.
        """
        held = self.context_sets[slot]
        if held is None or held.layout.sections[CONTEXT].shape[0] < len(sets):
            if held is not None:
                held.close(plans.stream)
                self.context_sets[slot] = None
            fields = [(name, (len(sets), *value.shape), value.dtype) for name, value in sets[0].items()]
            held = self.context_sets[slot] = plans.block(fields)
        for i, one in enumerate(sets):
            for name, value in one.items():
                held.host(name)[i] = value
        held.upload_parts(plans.stream, [(name, 0, len(sets)) for name in sets[0]])

    def change_context(self, plans: Plans, slot: int, index: int) -> None:
        """Start the copies, one for each input made of prompts, that give the next rows another context set. The rows
        before have read theirs: one stream, one order.
        """
        held = self.context_sets[slot]
        assert held is not None
        for name in held.layout.sections:
            size_bytes = held.offset(name, 1) - held.offset(name, 0)
            self.inputs.copy(plans.stream, self.inputs.offset(name, slot), held, held.offset(name, index), size_bytes)

    def close(self, stream: Any) -> None:
        with suppress(Exception):  # a device that has failed says so elsewhere too
            stream.sync()  # TensorRT's contexts must not be destroyed under work that is queued
        while self._pictures:
            self._close_picture(stream)
        for graph in self.graphs or []:
            graph.close()
        self.contexts.clear()
        if self._activations is not None:
            self._activations.let_go(stream)
            self._activations = None
        for block in (*self.context_sets, self.inputs, self.outputs):
            if block is not None:
                block.close(stream)

    def _bind(self, plans: Plans) -> None:
        self.inputs.clear(plans.stream)
        self.outputs.clear(plans.stream)
        profile = plans.profile(self.shape)
        self.contexts += [plans.context(STEP), plans.context(STEP)]
        for call, context in enumerate(self.contexts):
            addresses = {
                name: (self.block_of(name, call).address(name), self.inputs.layout.sections[name].shape)
                for name in self._signature.inputs
            }
            memory = plans.bind(context, STEP, profile, addresses, lambda: plans.decoder_bytes(self.shape))
            if self._activations is None:
                self._activations = memory
                memory.hold()
            written = {output: self.block_of(name, call + 1).address(name) for name, output in FED_BACK.items()}
            for name in self._signature.outputs:
                context.set_tensor_address(name, written[name] if name in written else self.outputs.address(name))

    def _capture(self, plans: Plans) -> list[Any] | None:
        """Capture both contexts, and check a replay of each against plain execution once. None, and graphs off, where
        that fails.
        """
        graphs = []
        self.fill_for_check(plans.stream)
        for call, context in enumerate(self.contexts):
            # Twice uncaptured: in the first run after shapes and addresses change TensorRT finishes its own set-up, and
            # may run kernels that it never runs again.
            for _ in range(2):
                plans.enqueue(context, STEP, plans.stream)
            plain = self.written(call, plans.stream)
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(int(plans.stream.handle)):
                plans.disable_graphs(f"capturing failed: TensorRT says that it would{plans.words()}")
                return None
            try:
                graph = captured(plans, partial(plans.enqueue, context, STEP))
            except Exception as error:
                if out_of_memory(error):
                    raise
                plans.disable_graphs(f"capturing failed: {error}")
                return None
            self.spoil(call, plain, plans.stream)
            graph.launch(plans.stream)
            if not agree(plain, self.written(call, plans.stream)):
                plans.disable_graphs("a replayed graph gave other numbers than plain execution")
                return None
            graphs.append(graph)
        return graphs

    def fill_for_check(self, stream: Any) -> None:
        """Small numbers everywhere, so that a replay that reads or writes the wrong place shows."""
        random = np.random.RandomState(0)
        names = list(self.inputs.layout.sections)
        for name in names:
            array = self.inputs.host(name)
            array[...] = 0 if array.dtype.kind == "i" else random.standard_normal(array.shape) * 0.1
        self.inputs.upload(stream, names[0], names[-1])

    def written(self, call: int, stream: Any) -> NDArray[np.float32]:
        """The registers a call has just written."""
        block = self.block_of("registers", call + 1)
        block.download(stream, "registers", "registers")
        stream.sync()
        return np.array(block.host("registers"))

    def spoil(self, call: int, plain: NDArray[np.float32], stream: Any) -> None:
        """Overwrite the registers a call has written, each with another number than `plain`, so that a replay that
        writes nothing shows too.
        """
        block = self.block_of("registers", call + 1)
        block.host("registers")[...] = np.where(np.isnan(plain), 0, np.nan)
        block.upload(stream, "registers", "registers")


def take_step(plans: Plans, shape: BatchShape, capacity: int) -> CapturedStep:
    """A step of this shape and capacity: an idle one, or a new one in the place of the least recently used.

    Raises:
        ResourceError: no memory for it on the device.
        MissingEngineError: the step's plan takes no such shape.
    """
    idle, found = cast("deque[CapturedStep]", plans.idle), None
    for _ in range(len(idle)):  # a whole turn, which keeps the order; the garbage collector may append meanwhile
        step = idle.popleft()
        if found is None and (step.shape, step.capacity) == (shape, capacity):
            found = step
        else:
            idle.append(step)
    plans.close_idle(_IDLE_STEPS - 1)
    if found is not None and found.outgrown:
        found.close(plans.stream)
    elif found is not None:
        return found
    signature = plans.signatures[STEP]
    try:
        return CapturedStep(plans, signature, shape, capacity)
    except Exception as error:
        if not idle or not (out_of_memory(error) or isinstance(error, ResourceError)):
            raise
    plans.make_room()
    return CapturedStep(plans, signature, shape, capacity)


class TensorRtMemory:
    """`StepMemory` on a GPU. `close` gives its buffers back; leaving that to the garbage collector works too.

    Where all calls of the pictures are known to come one after the other, they wait for the decoding that follows, and
    all of it is one launch. Whatever comes in between starts them one by one.
    """

    def __init__(self, plans: Plans, step: CapturedStep) -> None:
        self._plans = plans
        self._calls = 0
        self._launched: deque[Any] = deque()
        if step.busy:
            plans.stream.sync()  # a batch given up may still be reading this step's pinned memory
            step.busy = False
        self._copied: Any = None
        self._together = 0
        self._waiting = 0
        self._parts: Sequence[Part] = ()
        self._step: CapturedStep | None = step  # ours to give back from here on

    def host(self, name: str) -> NDArray[Any]:
        return self._open().block_of(name, self._calls).host(name)

    def together(self, calls: int) -> None:
        self._together = calls if not self._calls and self._plans.whole(calls) else 0

    def upload(self, parts: Sequence[Part]) -> None:
        if self._together and not self._waiting:
            self._parts = parts
        else:
            self._start()
            self._upload(parts)

    def _upload(self, parts: Sequence[Part]) -> None:
        step = self._open()
        with self._plans.guarded(STEP):
            step.busy = True
            for block in (step.inputs, step.outputs):
                block.upload_parts(
                    self._plans.stream, [part for part in parts if step.block_of(part[0], self._calls) is block]
                )
            self._copied = self._plans.stream.record(self._copied)

    def ready(self) -> None:
        """Wait until the last copies from pinned memory have been made. The calls after them may go on."""
        self._start()
        self._wait_for(self._copied)

    def hold_contexts(self, slot: int, contexts: Sequence[Mapping[str, Float]]) -> None:
        self._start()
        step = self._open()
        with self._plans.guarded(STEP):
            step.busy = True
            step.hold_contexts(self._plans, slot, contexts)
            self._copied = self._plans.stream.record(self._copied)

    def change_context(self, slot: int, index: int) -> None:
        self._start()
        step = self._open()
        with self._plans.guarded(STEP):
            step.change_context(self._plans, slot, index)

    def call(self) -> None:
        self._open()
        if self._waiting < self._together:
            self._waiting += 1
        else:
            self._start()
            self._call()

    def _call(self) -> None:
        step, event = self._open(), None
        if len(self._launched) >= _AHEAD:
            self._wait_for(self._launched[0])
            event = self._launched.popleft()
        with self._plans.guarded(STEP):
            step.launch(self._plans, self._calls)
            self._launched.append(self._plans.stream.record(event))
            self._calls += 1

    def _start(self) -> None:
        """Start the calls that wait, one by one."""
        self._open()
        calls, self._waiting, self._together = self._waiting, 0, 0
        if calls:
            parts, self._parts = self._parts, ()
            self._upload(parts)
            for _ in range(calls):
                self._call()

    def latents(self, slots: Sequence[int]) -> Float:
        return self._downloaded("registers")[list(slots), 0]

    def denoised(self, slots: Sequence[int]) -> Float:
        return self._downloaded("denoised")[list(slots)]

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        step, calls = self._open(), self._waiting
        if calls and calls == self._together:
            with self._plans.guarded(STEP):
                picture = step.picture(self._plans, calls, tuple(slots))
                if picture is not None:
                    self._together = self._waiting = 0
                    self._calls = calls
                    step.busy = True
                    step.inputs.host(ROUNDING)[0] = rounding
                    step.inputs.upload_parts(self._plans.stream, [*self._parts, (ROUNDING, 0, 1)])
                    found = picture.run(self._plans)
                    step.busy = False
                    return found
        self._start()
        with self._plans.guarded(VAE_DECODER):
            block = step.block_of("registers", self._calls)
            found = self._plans.decode_from(
                block, [block.offset("registers", slot, 0) for slot in slots], step.shape, rounding
            )
            step.busy = False
            return found

    def describe(self) -> dict[str, Any]:
        return self._plans.describe()

    def close(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            # Calls nothing of CUDA: the garbage collector comes here, from any thread, even within a capture.
            self._plans.idle.append(step)

    def __del__(self) -> None:
        self.close()

    def _downloaded(self, name: str) -> NDArray[np.float32]:
        """A copy of registers or denoised estimates as the last call left them."""
        self._start()
        step = self._open()
        with self._plans.guarded(STEP):
            block = step.outputs if name == "denoised" else step.block_of(name, self._calls)
            block.download(self._plans.stream, name, name)
            self._plans.stream.sync()
            step.busy = False
            return np.array(block.host(name))

    def _wait_for(self, event: Any) -> None:
        while event is not None:
            with self._plans.guarded(STEP):
                if event.is_done:
                    return
            time.sleep(_POLL_S)  # polled, not synchronised: the device never waits for the host

    def _open(self) -> CapturedStep:
        if self._step is None:
            raise UsageError("step: passed already", "Read a step before asking the stream for the next one.")
        return self._step
