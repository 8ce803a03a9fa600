"""The OpenVINO backend: engines of static shapes on the CPU, in bfloat16 where it has it.

An engine serves one size, number of pictures, prompt length and number of guidance branches; a bundle may hold several,
and each running batch takes the one that fits; more pictures than any engine takes at once run one part after the
other. What no engine serves is compiled in memory, where that was asked for. Graphs with equal shapes are loaded once,
whatever engines they lie in.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt.bundle.folder import Bundle
from sdrt.bundle.graphs import (
    GRAPHS,
    STEP,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Signature,
    dimensions,
    signatures,
    text_outputs,
)
from sdrt.bundle.manifest import WEIGHTS
from sdrt.engines.record import EngineRecord
from sdrt.engines.shapes import EngineShapes, JobShape, shapes_of
from sdrt.engines.store import list_engines, mismatch, read_plan
from sdrt.errors import MachineError, MissingEngineError
from sdrt.machine.cpu import usable_cores
from sdrt.machine.interruptible import interruptible, wait_for
from sdrt.machine.memory import available_bytes, unload_mapped
from sdrt.runtime.backends.openvino.model import (
    TARGET,
    StepShape,
    compile_graph,
    explained,
    fit,
    import_blob,
    import_openvino,
    openvino_version,
)
from sdrt.runtime.engine import BatchShape, Float, InParts, Pixels, RunningBatch, context_and_pooled, job_shape
from sdrt.runtime.request_memory import Demand, openvino_demand
from sdrt.runtime.running_batch import HostMemory, Slots, step_sizes

log = logging.getLogger("sdrt")

Arrays = Mapping[str, NDArray[Any]]

_LOADED = 2
"""How many of each graph are kept in memory, least recently used dropped first: each holds its weights in the layout
its kernels read.
"""


@dataclass(frozen=True)
class _Loaded:
    """A graph ready to run, and its infer requests that nobody uses."""

    compiled: Any
    idle: list[Any] = field(default_factory=list)


class OpenVinoEngine:
    """Thread-safe: no two batches or calls use an infer request at the same time. One that two threads shared would
    silently mix their pictures.
    """

    backend = TARGET

    def __init__(
        self, bundle: Bundle, threads: int | None, *, compile_missing: bool = False, shared: bool = False
    ) -> None:
        """`compile_missing` has shapes that no engine serves compiled in memory, which takes seconds; else they raise
        MissingEngineError. `shared` says that others keep the cores busy too.
        """
        self._ov = import_openvino("backend openvino")
        self._bundle, self._threads, self._compile_missing, self._shared = (
            bundle,
            threads or usable_cores(),
            compile_missing,
            shared,
        )
        self._signatures = signatures(dimensions(bundle.manifest))
        self._core = self._ov.Core()
        self._engines = _usable(bundle, self._core)
        self._lock = Lock()
        self._adding = Lock()
        self._loading: dict[Any, Lock] = {}
        self._graphs: OrderedDict[Any, _Loaded] = OrderedDict()
        self._version = (
            openvino_version()
        )  # once: it reads the package's files, which takes as long as a small picture's text
        self.compiled = 0
        """Graphs that had to be compiled because no blob fits; the others were imported."""
        self._default = first = min(self._engines, key=lambda engine: _unlikeness(engine.shape, bundle))
        # In parallel: unpacking weights runs on one core each.
        interruptible(lambda: self._load_all(first, (STEP, VAE_DECODER, TEXT_ENCODER)))

    @property
    def shapes(self) -> tuple[EngineShapes, ...]:
        return tuple(
            dict.fromkeys(
                shapes_of(engine.record, self._bundle.manifest) for engine in self._engines if engine.record is not None
            )
        )

    def serves(self, shape: JobShape) -> bool:
        return self._compile_missing or bool(self._alike(shape))

    def demand(self, shape: JobShape) -> Demand:
        alike = self._alike(shape)
        if not alike and not self._compile_missing:
            raise self._missing(shape)
        with self._lock:
            graphs = dict(self._graphs)
        step_loaded = any(engine.key(STEP) in graphs for engine in alike)
        decoders = [
            graphs.get(engine.key(VAE_DECODER)) for engine in self._engines if engine.job_shape.size == shape.size
        ]
        decoder_loaded = any(decoder is not None and decoder.idle for decoder in decoders)
        precision = (alike[0] if alike else self._default).precision
        return openvino_demand(
            self._bundle.manifest, shape, precision=precision, step_loaded=step_loaded, decoder_loaded=decoder_loaded
        )

    def free_bytes(self, shape: JobShape) -> int | None:
        return available_bytes()

    def encode_text(self, tokens: NDArray[np.int64], clip_skip: int) -> tuple[Float, Float]:
        signature = self._signatures[TEXT_ENCODER]
        wanted = text_outputs(signature, clip_skip)
        chunks = [dict(zip(signature.inputs, tokens[:, i : i + 1], strict=True)) for i in range(tokens.shape[1])]
        outputs = zip(*(self._call(self._default, TEXT_ENCODER, chunk, wanted) for chunk in chunks), strict=True)
        return context_and_pooled([np.concatenate(parts) for parts in outputs])

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        engine = self._of_size(*noise.shape[2:])
        inputs: list[Arrays] = [{"pixels": pixels[i : i + 1], "noise": noise[i : i + 1]} for i in range(len(pixels))]
        return np.concatenate([self._call(engine, VAE_ENCODER, one, ("latents",))[0] for one in inputs])

    def open(self, shape: BatchShape, capacity: int) -> RunningBatch:
        parts: list[RunningBatch] = []
        while capacity > 0:
            parts.append(self._start(shape, capacity))
            capacity -= parts[-1].capacity
        return parts[0] if len(parts) == 1 else InParts(parts)

    def _start(self, shape: BatchShape, capacity: int) -> Slots:
        engine = self._of_batch(shape, capacity)
        made = engine.shape
        signature = self._signatures[STEP]
        memory = _StepMemory(
            self, self._load(engine, STEP).compiled, engine, signature, step_sizes(shape, made.batch, made.rows)
        )
        return Slots(memory, signature, shape, made.batch, made.rows)

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self.decode_with(self._of_size(*latents.shape[2:]), latents, rounding)

    def describe(self) -> dict[str, Any]:
        return self.describe_engine(self._default)

    # What running batches use

    def describe_engine(self, engine: _Loadable) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "version": self._version,
            "device": "cpu",
            "compute": engine.precision,
            "threads": self._threads,
            "engine": "compiled in memory" if engine.folder is None else engine.folder.name,
        }

    def tensor(self, array: NDArray[Any]) -> Any:
        """An array as OpenVINO's tensor, sharing its memory. The tensor keeps the array; a request that was given it
        keeps neither, only the address.
        """
        assert array.flags.c_contiguous
        return self._ov.Tensor(array, shared_memory=True)

    @contextmanager
    def explaining(self, graph: str) -> Iterator[None]:
        """Makes what OpenVINO raises inside an error of ours about a graph of this bundle."""
        try:
            yield
        except Exception as error:
            raise explained(self._ov, f"{self._bundle.path}: {graph}", error) from error

    def infer(self, request: Any, graph: str, used: Any) -> None:
        """Run a request; a signal ends it. `used` keeps the memory of its tensors."""
        with self.explaining(graph):
            request.start_async()
            wait_for(request.wait_for, request.cancel, (request, used))
            request.wait()  # which raises what went wrong

    def decode_with(self, engine: _Loadable, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        """`decode` by a certain engine's decoder."""
        offset, wanted = np.array([rounding], np.float32), ("pixels", "finite")
        inputs = [{"latents": latents[i : i + 1], "rounding": offset} for i in range(len(latents))]
        pixels, finite = zip(*(self._call(engine, VAE_DECODER, one, wanted) for one in inputs), strict=True)
        return np.concatenate(pixels), np.concatenate(finite).astype(np.bool_)

    def _call(self, engine: _Loadable, graph: str, inputs: Arrays, wanted: tuple[str, ...]) -> tuple[NDArray[Any], ...]:
        """Run a graph once on all its inputs; copies of the outputs wanted. Takes a request that nobody uses, or makes
        one.
        """
        loaded = self._load(engine, graph)
        tensors = {
            name: self.tensor(np.ascontiguousarray(array)) for name, array in inputs.items()
        }  # kept until it has run
        with self.explaining(graph):
            try:
                request = loaded.idle.pop()
            except IndexError:
                request = loaded.compiled.create_infer_request()
            for name, tensor in tensors.items():
                request.set_tensor(name, tensor)
        self.infer(request, graph, tensors)
        copied = tuple(np.array(request.get_tensor(name).data) for name in wanted)
        loaded.idle.append(request)
        return copied

    def _load_all(self, engine: _Loadable, graphs: Sequence[str]) -> None:
        with ThreadPoolExecutor(len(graphs)) as pool:
            list(pool.map(lambda graph: self._load(engine, graph), graphs))

    def _load(self, engine: _Loadable, graph: str) -> _Loaded:
        """A graph of an engine, loaded once for all engines in which it has the same shapes and precision."""
        key = engine.key(graph)
        with self._lock:
            loading = self._loading.setdefault(key, Lock())
        with loading:
            with self._lock:
                if key in self._graphs:
                    self._graphs.move_to_end(key)
                    return self._graphs[key]
            found = _Loaded(interruptible(lambda: self._read(engine, graph)))
            with self._lock:
                self._graphs[key] = found
                alike = [other for other in self._graphs if other[0] == graph]
                dropped = alike[:-_LOADED]
                for other in dropped:  # who still runs one keeps it alive
                    del self._graphs[other]
            if dropped:
                _give_memory_back()
        return found

    def load_counting(self, graph: str, shape: BatchShape, capacity: int) -> tuple[Any, Mapping[str, tuple[int, ...]]]:
        """A graph of the engine that such a batch takes, loaded once more with a counter on every operator, and its
        input shapes. For profiles only.
        """
        engine = self._of_batch(shape, capacity)
        return self._read(engine, graph, counting=True), engine.shapes(graph)

    def _read(self, engine: _Loadable, graph: str, *, counting: bool = False) -> Any:
        precision = engine.precision
        if engine.folder is None or engine.record is None or engine.stale:
            with self._lock:
                self.compiled += 1
            path = self._bundle.graph(graph, "fp32")
            return compile_graph(
                self._ov,
                self._core,
                path,
                engine.shapes(graph),
                precision,
                self._threads,
                counting=counting,
                shared=self._shared,
            )[0]
        blob = read_plan(engine.folder, engine.record, graph)  # hashed before OpenVINO sees it
        where = str(engine.folder / engine.record.plans[graph].file)
        weights = self._bundle.file(WEIGHTS)
        compiled = import_blob(
            self._ov,
            self._core,
            where,
            blob,
            weights,
            precision,
            self._threads,
            counting=counting,
            shared=self._shared,
        )
        unload_mapped(weights)  # kernels have packed what they read
        return compiled

    def _of_batch(self, wanted: BatchShape, capacity: int) -> _Loadable:
        """The engine for a running batch: of its shape, with the smallest number of slots that is enough; where none
        is, with the largest there is.
        """
        shape = job_shape(wanted, capacity, self._bundle.manifest.latents.factor)
        with self._adding:
            alike = self._alike(shape)
            if not alike:
                alike = [
                    self._add(
                        StepShape(
                            capacity,
                            wanted.height,
                            wanted.width,
                            wanted.tokens,
                            wanted.branches,
                            self._default.shape.rows,
                        )
                    )
                ]
        holding = [engine for engine in alike if engine.shape.batch >= shape.batch]
        return (
            min(holding, key=lambda engine: engine.shape.batch)
            if holding
            else max(alike, key=lambda engine: engine.shape.batch)
        )

    def _alike(self, shape: JobShape) -> list[_Loadable]:
        """The engines of a size, prompt length and number of branches, whatever their batch."""
        return [engine for engine in self._engines if replace(shape, batch=0) == replace(engine.job_shape, batch=0)]

    def _of_size(self, height: int, width: int) -> _Loadable:
        with self._adding:
            for engine in self._engines:
                if engine.shape.size == (height, width):
                    return engine
            return self._add(replace(self._default.shape, batch=1, height=height, width=width))

    def _add(self, shape: StepShape) -> _Loadable:
        """An engine of a shape that has none, to be compiled in memory.

        Raises:
            MissingEngineError: that was not asked for.
        """
        manifest, where = self._bundle.manifest, self._bundle.path
        inputs = {graph: shape.inputs(graph, manifest) for graph in GRAPHS}
        added = _Loadable(inputs, shape, self._default.precision, manifest.latents.factor)
        if not self._compile_missing:
            raise self._missing(added.job_shape)
        log.warning(
            "%s: no OpenVINO engine for %s; compiling it in memory, which takes seconds. "
            "Keep it with: sdrt compile %s --target openvino %s",
            where,
            added.job_shape.options,
            where,
            added.job_shape.options,
        )
        self._engines = [*self._engines, added]
        return added

    def _missing(self, wanted: JobShape) -> MissingEngineError:
        have = "; ".join(dict.fromkeys(engine.job_shape.options for engine in self._engines))
        error = MissingEngineError(
            f"no OpenVINO engine for {wanted.options}; there is: {have}",
            f"Compile one with: sdrt compile {self._bundle.path} --target openvino {wanted.options}; "
            "or choose --on-missing compile or fallback (in Python on_missing=...), or --backend onnxruntime.",
            path=self._bundle.path,
        )
        error.data = {"wanted": asdict(wanted), "shapes": [asdict(one) for one in self.shapes]}
        return error


class _StepMemory(HostMemory):
    """Two infer requests in turn, over two places of what is fed back: what one call writes the next reads, where it
    lies.
    """

    def __init__(
        self, engine: OpenVinoEngine, compiled: Any, loadable: _Loadable, signature: Signature, sizes: Mapping[str, int]
    ) -> None:
        super().__init__(signature, sizes)
        self._engine, self._loadable = engine, loadable
        self._requests: list[Any] = []
        for side in (0, 1):
            with engine.explaining(STEP):
                request = compiled.create_infer_request()
                for arrays in self.bound(side):
                    for name, array in arrays.items():
                        request.set_tensor(
                            name, engine.tensor(array)
                        )  # a request keeps the address alone; the array is kept by this object
            self._requests.append(request)

    def call(self) -> None:
        self._engine.infer(self._requests[self.calls % 2], STEP, self)
        self.calls += 1

    def decode(self, slots: Sequence[int], rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self._engine.decode_with(self._loadable, self.latents(slots), rounding)

    def describe(self) -> dict[str, Any]:
        return self._engine.describe_engine(self._loadable)

    def close(self) -> None:
        self._requests.clear()


class _Loadable:
    """An engine and what it is made for, in the precision it computes in here. One of the bundle has a `folder` and a
    `record`; if `stale` says why its blobs do not fit this machine, it is compiled again, in memory, as one without a
    folder is.
    """

    def __init__(
        self,
        inputs: Mapping[str, Mapping[str, tuple[int, ...]]],
        shape: StepShape,
        precision: str,
        factor: int,
        *,
        folder: Path | None = None,
        record: EngineRecord | None = None,
        stale: str = "",
    ) -> None:
        """`inputs` holds the shape of every input of every graph; `factor` pixels a side per latent."""
        self._inputs, self.shape, self.precision = inputs, shape, precision
        self.folder, self.record, self.stale = folder, record, stale
        self.job_shape = JobShape(
            (shape.width * factor, shape.height * factor), shape.batch, shape.tokens, shape.branches
        )

    def shapes(self, graph: str) -> dict[str, tuple[int, ...]]:
        return dict(self._inputs[graph])

    def key(self, graph: str) -> Any:
        """Equal for graphs that are the same once loaded."""
        return graph, self.precision, self.folder is None or bool(self.stale), tuple(sorted(self.shapes(graph).items()))


def _of_bundle(folder: Path, record: EngineRecord, precision: str, stale: str, factor: int) -> _Loadable:
    """An engine as its record says it was made."""
    inputs = {
        graph: {name: largest for name, (_, _, largest) in profiles[0].shapes.items()}
        for graph, profiles in record.key.profiles.items()
    }
    (rows, branches), (batch, _, height, width) = inputs[STEP]["w"], inputs[STEP]["init"]
    shape = StepShape(batch, height, width, inputs[STEP]["context"][2], branches, (rows - 1) // batch)
    return _Loadable(inputs, shape, precision, factor, folder=folder, record=record, stale=stale)


def _usable(bundle: Bundle, core: Any) -> list[_Loadable]:
    """The bundle's OpenVINO engines, newest first; those of another CPU, version or manner only where none of this
    machine's has their shapes.

    Raises:
        MachineError: there is none for these graphs and weights.
        BundleError: one is not what it should be.
    """
    fitting: list[_Loadable] = []
    stale: list[_Loadable] = []
    reasons = []
    for folder, record in list_engines(bundle):
        if record.key.target != OpenVinoEngine.backend:
            continue
        if other := mismatch(record, bundle, target=OpenVinoEngine.backend):
            reasons.append(f"{folder.name}: {other}")
            continue
        machine, precision = fit(core, bundle, record)
        (stale if machine else fitting).append(
            _of_bundle(folder, record, precision, machine, bundle.manifest.latents.factor)
        )
    have = {engine.shape for engine in fitting}
    again = [engine for engine in stale if engine.shape not in have]
    if again:
        log.warning(
            "%s: %s; compiling again in memory. Keep it with: %s",
            again[0].folder,
            again[0].stale,
            _commands(bundle, again),
        )
    if not fitting and not again:
        found = "; ".join(reasons) or "there is none"
        raise MachineError(
            f"{bundle.path}: no openvino engine fits: {found}",
            f"Make one here with: sdrt compile {bundle.path} --target openvino",
        )
    return [*fitting, *again]


def _commands(bundle: Bundle, engines: Sequence[_Loadable]) -> str:
    """What compiles engines of these shapes and precisions here."""
    branches = defaultdict[tuple[StepShape, str], set[int]](set)
    for engine in engines:
        branches[replace(engine.shape, branches=0, rows=0), engine.precision].add(engine.shape.branches)
    factor = bundle.manifest.latents.factor
    return "; ".join(
        f"sdrt compile {bundle.path} --target {OpenVinoEngine.backend} {shape.words(factor, *sorted(counts))}"
        f" --precision {precision}"
        for (shape, precision), counts in branches.items()
    )


def _give_memory_back() -> None:
    """What a dropped graph held in small pieces glibc keeps for later, and spreads further with every reload: 76 kB a
    picture over 500 pictures of five sizes in four threads, shrinking with this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _unlikeness(shape: StepShape, bundle: Bundle) -> tuple[int, ...]:
    """How far an engine is from what is most often asked for, to find the one to load first: the bundle's own size, one
    picture, a short prompt, guidance.
    """
    manifest, latents = bundle.manifest, bundle.manifest.latents
    own_size = latents.size[1] // latents.factor, latents.size[0] // latents.factor
    return shape.size != own_size, shape.batch, shape.tokens, shape.branches != manifest.branches
