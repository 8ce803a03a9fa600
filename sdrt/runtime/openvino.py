"""The OpenVINO backend: engines of static shapes on the CPU, in bfloat16 where it has it.

An engine serves one size, number of pictures, prompt length and number of guidance branches; a bundle may hold several, and each job takes the
one that fits. Graphs with equal shapes are loaded once, whatever engines they lie in.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt import bundle as names
from sdrt.bundle import WEIGHTS, Bundle
from sdrt.engine_cache import list_engines, mismatch, read_plan
from sdrt.engine_record import EngineRecord
from sdrt.errors import MachineError, MissingEngineError
from sdrt.runtime.cpu import usable_cores
from sdrt.runtime.engine import Float, Job, Pixels
from sdrt.runtime.openvino_model import (
    StepShape,
    compile_graph,
    explained,
    fit,
    import_blob,
    import_openvino,
    openvino_version,
)

log = logging.getLogger("sdrt")

Arrays = Mapping[str, NDArray[Any]]

_LOADED = 2
"""How many of each graph are kept in memory, least recently used dropped first: each holds its weights in the layout its kernels read."""


@dataclass(frozen=True)
class _Loaded:
    """A graph ready to run, and its infer requests that nobody uses."""

    compiled: Any
    idle: list[Any] = field(default_factory=list)


class OpenVinoEngine:
    """Thread-safe: no two jobs or calls use an infer request at the same time. One that two threads shared would silently mix their pictures."""

    backend = "openvino"

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._ov = import_openvino("backend openvino")
        self._bundle, self._threads = bundle, threads or usable_cores()
        self._core = self._ov.Core()
        self._engines = _usable(bundle, self._core)
        self._lock = Lock()
        self._loading: dict[Any, Lock] = {}
        self._graphs: OrderedDict[Any, _Loaded] = OrderedDict()
        self._version = openvino_version()  # once: it reads the package's files, which takes as long as a small picture's text
        self.compiled = 0
        """Graphs that had to be compiled because no blob fits; the others were imported."""
        self._default = first = min(self._engines, key=lambda engine: _unlikeness(engine.shape, bundle))
        # In parallel: unpacking weights runs on one core each.
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda graph: self._load(first, graph), (names.STEP, names.VAE_DECODER, names.TEXT_ENCODER)))

    def encode_text(self, tokens: NDArray[np.int64], emphasis: Float, clip_skip: int) -> Float:
        wanted = (names.context_output(clip_skip),)
        inputs: list[Arrays] = [{"tokens": tokens[i : i + 1], "emphasis": emphasis[i : i + 1]} for i in range(len(tokens))]
        return np.concatenate([self._call(self._default, names.TEXT_ENCODER, one, wanted)[0] for one in inputs])

    def encode_image(self, pixels: Pixels, noise: Float) -> Float:
        engine = self._of_size(*noise.shape[2:])
        inputs: list[Arrays] = [{"pixels": pixels[i : i + 1], "noise": noise[i : i + 1]} for i in range(len(pixels))]
        return np.concatenate([self._call(engine, names.VAE_ENCODER, one, ("latents",))[0] for one in inputs])

    def denoise(self, job: Job) -> OpenVinoDenoising:
        engine = self._of_job(job)
        return OpenVinoDenoising(self, self._load(engine, names.STEP).compiled, engine, job)

    def decode(self, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self.decode_with(self._of_size(*latents.shape[2:]), latents, rounding)

    def describe(self, job: Job | None = None) -> dict[str, Any]:
        engine = self._default if job is None else self._of_job(job)
        return {
            "backend": self.backend, "version": self._version, "device": "cpu", "compute": engine.precision, "threads": self._threads,
            "engine": engine.folder.name,
        }  # fmt: skip

    # What jobs use

    def tensor(self, array: NDArray[Any]) -> Any:
        """An array as OpenVINO's tensor, sharing its memory. The tensor keeps the array; a request that was given it keeps neither, only the address."""
        assert array.flags.c_contiguous
        return self._ov.Tensor(array, shared_memory=True)

    @contextmanager
    def explaining(self, graph: str) -> Iterator[None]:
        """Makes what OpenVINO raises inside an error of ours about a graph of this bundle."""
        try:
            yield
        except Exception as error:
            raise explained(self._ov, f"{self._bundle.path}: {graph}", error) from error

    def infer(self, request: Any, graph: str) -> None:
        with self.explaining(graph):
            request.start_async()
            request.wait()

    def decode_with(self, engine: _Loadable, latents: Float, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        """`decode` by a certain engine's decoder."""
        offset, wanted = np.array([rounding], np.float32), ("pixels", "finite")
        inputs = [{"latents": latents[i : i + 1], "rounding": offset} for i in range(len(latents))]
        pixels, finite = zip(*(self._call(engine, names.VAE_DECODER, one, wanted) for one in inputs), strict=True)
        return np.concatenate(pixels), np.concatenate(finite).astype(np.bool_)

    def _call(self, engine: _Loadable, graph: str, inputs: Arrays, wanted: tuple[str, ...]) -> tuple[NDArray[Any], ...]:
        """Run a graph once on all its inputs; copies of the outputs wanted. Takes a request that nobody uses, or makes one."""
        loaded = self._load(engine, graph)
        tensors = {name: self.tensor(np.ascontiguousarray(array)) for name, array in inputs.items()}  # kept until it has run
        with self.explaining(graph):
            try:
                request = loaded.idle.pop()
            except IndexError:
                request = loaded.compiled.create_infer_request()
            for name, tensor in tensors.items():
                request.set_tensor(name, tensor)
        self.infer(request, graph)
        copied = tuple(np.array(request.get_tensor(name).data) for name in wanted)
        loaded.idle.append(request)
        return copied

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
            found = _Loaded(self._read(engine, graph))
            with self._lock:
                self._graphs[key] = found
                alike = [other for other in self._graphs if other[0] == graph]
                dropped = alike[:-_LOADED]
                for other in dropped:  # who still runs one keeps it alive
                    del self._graphs[other]
            if dropped:
                _give_memory_back()
        return found

    def load_counting(self, graph: str, job: Job) -> tuple[Any, Mapping[str, tuple[int, ...]]]:
        """A graph of the engine that `job` takes, loaded once more with a counter on every operator, and its input shapes. For profiles only."""
        engine = self._of_job(job)
        return self._read(engine, graph, counting=True), engine.shapes(graph)

    def _read(self, engine: _Loadable, graph: str, *, counting: bool = False) -> Any:
        precision = engine.precision
        if engine.stale:
            with self._lock:
                self.compiled += 1
            path = self._bundle.graph(graph, "fp32")
            return compile_graph(self._ov, self._core, path, engine.shapes(graph), precision, self._threads, counting=counting)[0]
        blob = read_plan(engine.folder, engine.record, graph)  # hashed before OpenVINO sees it
        where = str(engine.folder / engine.record.plans[graph].file)
        return import_blob(self._ov, self._core, where, blob, self._bundle.file(WEIGHTS), precision, self._threads, counting=counting)

    def _of_job(self, job: Job) -> _Loadable:
        """The engine for a job: of its shapes, with the smallest batch that holds its pictures."""
        pictures, _, height, width = job.init.shape
        tokens, branches = job.contexts[0].shape[1], job.tables.w.shape[1]
        fits = [
            engine for engine in self._engines
            if (engine.shape.height, engine.shape.width, engine.shape.tokens, engine.shape.branches) == (height, width, tokens, branches)
            and engine.shape.batch >= pictures
        ]  # fmt: skip
        if not fits:
            raise self._no_engine(width, height, f"--batch {pictures} --tokens {tokens} --branches {branches}")
        return min(fits, key=lambda engine: engine.shape.batch)

    def _of_size(self, height: int, width: int) -> _Loadable:
        for engine in self._engines:
            if engine.shape.size == (height, width):
                return engine
        raise self._no_engine(width, height, "")

    def _no_engine(self, width: int, height: int, rest: str) -> MissingEngineError:
        factor = self._bundle.manifest.latents.factor
        have = "; ".join(dict.fromkeys(engine.shape.words(factor) for engine in self._engines))
        wanted = f"--size {width * factor}x{height * factor} {rest}".rstrip()
        return MissingEngineError(
            f"no OpenVINO engine for {wanted}; there is: {have}",
            f"Compile one with: sdrt compile {self._bundle.path} --target openvino {wanted}; or choose --backend onnxruntime (in Python backend='onnxruntime'), which takes any shape.",
            path=self._bundle.path,
        )


class OpenVinoDenoising:
    """Two infer requests in turn, over two sets of registers: what one row writes the next reads, where it lies."""

    def __init__(self, engine: OpenVinoEngine, compiled: Any, loadable: _Loadable, job: Job) -> None:
        self._engine, self._job, self._loadable = engine, job, loadable
        self._shape = shape = loadable.shape
        self._pictures = len(job.init)
        self._row = 0
        rows, batch = shape.rows, shape.batch
        self._tables = {name: np.zeros((rows, *table.shape[1:]), np.float32) for name, table in vars(job.tables).items()}
        self._tables["noise"] = np.zeros((rows, batch, *job.noise.shape[2:]), np.float32)
        self._rows = [np.zeros(1, np.int64), np.zeros(1, np.int64)]
        self._fill_tables()
        init, unit_noise = _padded(job.init, batch), _padded(job.unit_noise, batch)
        self._registers = [np.zeros((names.REGISTERS, *init.shape), np.float32) for _ in range(2)]
        self._registers[0][0], self._registers[0][1] = init, unit_noise
        self._denoised = np.zeros_like(init)
        constant: dict[str, NDArray[Any]] = {**self._tables, "mask": _padded(job.mask, batch), "init": init, "init_noise": unit_noise}
        if job.concat is not None:
            constant["concat"] = _padded(job.concat, batch, shape.branches)
        # Tensors are kept as long as the requests that read them: what was filled up is a copy that nobody else has.
        self._constant = {name: engine.tensor(array) for name, array in constant.items()}
        self._contexts = [engine.tensor(_padded(context, batch, shape.branches)) for context in job.contexts]
        states = [(engine.tensor(self._registers[i]), engine.tensor(self._rows[i])) for i in (0, 1)]
        denoised = engine.tensor(self._denoised)
        self._requests = []
        for here, there in ((0, 1), (1, 0)):
            bound = {**self._constant, **dict(zip(("registers", "row"), states[here], strict=True)), "context": self._contexts[job.context_of_row[0]]}
            bound |= dict(zip(names.STEP_OUTPUTS, (*states[there], denoised), strict=True))
            with engine.explaining(names.STEP):
                request = compiled.create_infer_request()
                for name, tensor in bound.items():
                    request.set_tensor(name, tensor)
            self._requests.append(request)

    def step(self) -> None:
        if self._row and self._row % self._shape.rows == 0:
            self._fill_tables()
        contexts = self._job.context_of_row
        if self._row and contexts[self._row] != contexts[self._row - 1]:
            for request in self._requests:
                request.set_tensor("context", self._contexts[contexts[self._row]])
        self._engine.infer(self._requests[self._row % 2], names.STEP)
        self._row += 1

    def latents(self) -> Float:
        return self._registers[self._row % 2][0, : self._pictures].copy()

    def denoised(self) -> Float:
        return self._denoised[: self._pictures].copy()

    def decode(self, rounding: float) -> tuple[Pixels, NDArray[np.bool_]]:
        return self._engine.decode_with(self._loadable, self.latents(), rounding)

    def close(self) -> None:
        self._requests.clear()

    def _fill_tables(self) -> None:
        """Write the rows from the current one on, as many as the engine's tables hold, and start them at 0."""
        for name, table in (*vars(self._job.tables).items(), ("noise", self._job.noise)):
            part = table[self._row : self._row + self._shape.rows]
            if name == "noise":
                part = _padded(part, self._shape.batch, axis=1)
            self._tables[name][: len(part)] = part
        self._rows[self._row % 2][0] = 0


class _Loadable:
    """An engine of the bundle and what it is made for, in the precision it computes in here. `stale` says why its blobs do not fit this machine; it
    is compiled again then, in memory."""

    def __init__(self, folder: Path, record: EngineRecord, precision: str, stale: str) -> None:
        self.folder, self.record, self.precision, self.stale = folder, record, precision, stale
        step = self.shapes(names.STEP)
        (rows, branches), (batch, _, height, width) = step["w"], step["init"]
        self.shape = StepShape(batch, height, width, step["context"][1], branches, rows)

    def shapes(self, graph: str) -> dict[str, tuple[int, ...]]:
        return {name: largest for name, (_, _, largest) in self.record.key.profiles[graph][0].shapes.items()}

    def key(self, graph: str) -> Any:
        """Equal for graphs that are the same once loaded."""
        return graph, self.precision, bool(self.stale), tuple(sorted(self.shapes(graph).items()))


def _usable(bundle: Bundle, core: Any) -> list[_Loadable]:
    """The bundle's OpenVINO engines, newest first; those of another CPU, version or manner only where none of this machine's has their shapes.

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
        (stale if machine else fitting).append(_Loadable(folder, record, precision, machine))
    have = {engine.shape for engine in fitting}
    again = [engine for engine in stale if engine.shape not in have]
    if again:
        log.warning("%s: %s; compiling again in memory. Keep it with: %s", again[0].folder, again[0].stale, _commands(bundle, again))
    if not fitting and not again:
        found = "; ".join(reasons) or "there is none"
        raise MachineError(f"{bundle.path}: no openvino engine fits: {found}", f"Make one here with: sdrt compile {bundle.path} --target openvino")
    return [*fitting, *again]


def _commands(bundle: Bundle, engines: Sequence[_Loadable]) -> str:
    """What compiles engines of these shapes and precisions here."""
    branches = defaultdict[tuple[StepShape, str], set[int]](set)
    for engine in engines:
        branches[replace(engine.shape, branches=0, rows=0), engine.precision].add(engine.shape.branches)
    factor = bundle.manifest.latents.factor
    return "; ".join(
        f"sdrt compile {bundle.path} --target {OpenVinoEngine.backend} {shape.words(factor, *sorted(counts))} --precision {precision}"
        for (shape, precision), counts in branches.items()
    )


def _give_memory_back() -> None:
    """What a dropped graph held in small pieces glibc keeps for later, and spreads further with every reload: 76 kB a picture over 500 pictures of
    five sizes in four threads, shrinking with this."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _unlikeness(shape: StepShape, bundle: Bundle) -> tuple[int, ...]:
    """How far an engine is from what is most often asked for, to find the one to load first: the bundle's own size, one picture, a short prompt, guidance."""
    latents = bundle.manifest.latents
    own_size = latents.size[1] // latents.factor, latents.size[0] // latents.factor
    return shape.size != own_size, shape.batch, shape.tokens, shape.branches != 2


def _padded(array: Float, batch: int, branches: int = 1, *, axis: int = 0) -> Float:
    """`array` with as many pictures as the engine takes, the last one repeated; its first axis holds `branches` groups of them.

    The pictures of a batch do not see each other, so the last, smaller batch of a run takes the same engine.
    """
    pictures = array.shape[axis] // branches
    if pictures == batch:
        return np.ascontiguousarray(array)
    chosen = [branch * pictures + min(i, pictures - 1) for branch in range(branches) for i in range(batch)]
    return np.ascontiguousarray(array.take(chosen, axis=axis))
