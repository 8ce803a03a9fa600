"""A picture in one launch: all model calls of a batch and the decoding of its pictures, captured as one CUDA graph for
a number of calls. For models of few steps, where the host's part would be felt.

Before it comes one copy to the device, after it one copy back and one wait.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.graphs import STEP, VAE_DECODER, concrete
from sdrt.runtime.backends.tensorrt.blocks import Activations, Block, out_of_memory
from sdrt.runtime.backends.tensorrt.capture import agree, captured
from sdrt.runtime.backends.tensorrt.plans import Plans, places_of
from sdrt.runtime.engine import BatchShape, Pixels

ROUNDING = "rounding"
PICTURE = "picture"
"""The name of a whole picture among the graphs, for who observes."""
_FAR, _FEW = 13, 0.01
"""A replay's pixels are another picture where more than this part of them is further off than this."""


class Step(Protocol):
    """What a picture needs of the step that is under it: a running batch's buffers and contexts, and how they are
    filled and read to compare two ways of running.
    """

    shape: BatchShape
    contexts: list[Any]
    inputs: Block

    def block_of(self, name: str, call: int) -> Block: ...

    def fill_for_check(self, stream: Any) -> None: ...

    def written(self, call: int, stream: Any) -> NDArray[np.float32]: ...

    def spoil(self, call: int, plain: NDArray[np.float32], stream: Any) -> None: ...


class WholePicture:
    """A graph that reads a step's inputs, as one call of it does, and writes pixels into a block of its own. Each
    picture of the batch is decoded by an execution context of its own: what a graph holds must not change.
    """

    def __init__(self, plans: Plans, step: Step, calls: int, slots: tuple[int, ...]) -> None:
        self._calls, self._slots = calls, slots
        self._graph: Any = None
        self._contexts: list[Any] = []
        self._activations: list[Activations] = []
        signature = plans.signatures[VAE_DECODER]
        sizes = {"N": 1, "h": step.shape.height, "w": step.shape.width}
        tensors = {name: tensor for name, tensor in signature.inputs.items() if name != ROUNDING} | signature.outputs
        self._block: Block = plans.block(
            [
                (place, concrete(tensor.shape, sizes), tensor.dtype)
                for name, tensor in tensors.items()
                for place in places_of(name, tensor, len(slots))
            ]
        )
        try:
            for picture in range(len(slots)):
                context = plans.context(VAE_DECODER)
                self._contexts.append(context)
                where = {"latents": (self._block, f"latents {picture}"), ROUNDING: (step.inputs, ROUNDING)}
                memory = plans.bind(
                    context,
                    VAE_DECODER,
                    0,
                    {name: (block.address(at), block.layout.sections[at].shape) for name, (block, at) in where.items()},
                )
                memory.hold()
                self._activations.append(memory)
                for name in signature.outputs:
                    context.set_tensor_address(name, self._block.address(f"{name} {picture}"))
        except BaseException:
            self.close(plans.stream)
            raise

    @classmethod
    def captured(cls, plans: Plans, step: Step, calls: int, slots: tuple[int, ...]) -> WholePicture | None:
        """Capture a picture and compare a replay with plain execution. None, and such graphs off for the pipeline,
        where that fails. What waits in the step's pinned memory stays as it is.
        """
        picture = cls(plans, step, calls, slots)
        try:
            with step.inputs.host_kept():
                why = picture._capture(plans, step)
        except BaseException:
            picture.close(plans.stream)
            raise
        if not why:
            return picture
        picture.close(plans.stream)
        plans.disable_pictures(why)
        return None

    def run(self, plans: Plans) -> tuple[Pixels, NDArray[np.bool_]]:
        """Pixels `[N, H, W, 3]`, and whether each picture was finite."""
        plans.watched.count("launches")
        plans.watched.around(PICTURE, plans.stream, lambda: self._graph.launch(plans.stream))
        found = self._results(plans.stream)
        plans.keep_kernels()
        return found

    def close(self, stream: Any) -> None:
        """The caller has waited for the stream."""
        if self._graph is not None:
            self._graph.close()
        self._contexts.clear()
        while self._activations:
            self._activations.pop().let_go(stream)
        self._block.close(stream)

    def _start(self, plans: Plans, step: Step, stream: Any) -> None:
        for call in range(self._calls):
            plans.enqueue(step.contexts[call % 2], STEP, stream)
        source = step.block_of("registers", self._calls)
        for picture, slot in enumerate(self._slots):
            section = self._block.layout.sections[f"latents {picture}"]
            self._block.copy(stream, section.offset, source, source.offset("registers", slot, 0), section.size_bytes)
        for context in self._contexts:
            plans.enqueue(context, VAE_DECODER, stream)

    def _capture(self, plans: Plans, step: Step) -> str:
        """Why it failed; empty where it did not."""
        for _ in range(2):  # as for a step's own graphs
            step.fill_for_check(plans.stream)
            self._start(plans, step, plans.stream)
            plain, (pixels, finite) = step.written(self._calls - 1, plans.stream), self._results(plans.stream)
        try:
            self._graph = captured(plans, lambda stream: self._start(plans, step, stream))
        except Exception as error:
            if out_of_memory(error):
                raise
            return f"capturing failed: {error}"
        self._block.clear(plans.stream)
        if self._calls % 2:
            step.spoil(self._calls - 1, plain, plans.stream)
            plans.stream.sync()
        step.fill_for_check(plans.stream)
        self._graph.launch(plans.stream)
        replayed, (again, finite_again) = step.written(self._calls - 1, plans.stream), self._results(plans.stream)
        far = np.abs(pixels.astype(np.int16) - again) > _FAR
        if not agree(plain, replayed) or not np.array_equal(finite, finite_again) or far.mean() > _FEW:
            return "a replayed graph gave another picture than plain execution"
        return ""

    def _results(self, stream: Any) -> tuple[Pixels, NDArray[np.bool_]]:
        last = len(self._slots) - 1
        self._block.download(stream, "pixels 0", f"finite {last}")
        stream.sync()
        return tuple(  # type: ignore[return-value]
            np.concatenate([self._block.host(f"{name} {picture}") for picture in range(last + 1)])
            for name in ("pixels", "finite")
        )
