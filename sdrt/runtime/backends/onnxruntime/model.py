"""ONNX Runtime's sessions: of the bundle's graphs, which it optimises whenever it loads them, and of models that it
saved once it had.

A saved model is the optimised graph and, beside it, its weights folded to float32, which loading maps. It depends on
the version of ONNX Runtime and on the CPU whose layouts it was optimised for, so it lies in the bundle as an engine,
under their key.
"""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from sdrt.bundle.folder import Bundle
from sdrt.bundle.remembered import check_once
from sdrt.engines.record import EngineRecord
from sdrt.engines.store import check_external_data, engine_folders, mismatch, read_engine, read_plan
from sdrt.engines.targets import ONNXRUNTIME
from sdrt.errors import MachineError, ResourceError, SdrtError
from sdrt.machine import engine_libraries
from sdrt.machine.cpu import cpu_identity, platform_name
from sdrt.machine.interruptible import interruptible
from sdrt.machine.packages import install_command

if TYPE_CHECKING:
    import onnxruntime as ort

log = logging.getLogger("sdrt")

TARGET = ONNXRUNTIME.name
PRECISION = "fp32"
_FATAL = 4
_APART_BYTES = 1024
"""Weights from this size on lie in the file beside a saved graph; ONNX Runtime wants to see smaller ones, such as
shapes, in the graph.
"""
FLAGS = ("ORT_ENABLE_ALL", f"external data from {_APART_BYTES} bytes")

Saved = tuple[Path, EngineRecord]
"""An engine of saved models: its folder and record."""


def import_onnxruntime(wanted_by: str) -> Any:
    try:
        onnxruntime = engine_libraries.onnxruntime()
    except ImportError as error:
        raise MachineError(
            f"{wanted_by}: cannot import onnxruntime: {error}", f"Install it with: {install_command(ONNXRUNTIME.extra)}"
        ) from error
    onnxruntime.set_default_logger_severity(_FATAL)  # errors are raised, and told once
    _share_arena(onnxruntime)
    return onnxruntime


_arena_lock = Lock()
_arena_shared = False


def _share_arena(ort: Any) -> None:
    """One memory arena for all sessions of this process, made once: the decoder then reuses what the denoising step has
    let go of.

    With an arena each, a 512x512 picture of SD 1.5 peaks 1.3 GB higher. Only sessions that ask for it use it, so other
    users of ONNX Runtime in the process are not touched.
    """
    global _arena_shared
    with _arena_lock:
        if not _arena_shared:
            defaults = ort.OrtArenaCfg(
                {
                    "max_mem": 0,
                    "arena_extend_strategy": -1,
                    "initial_chunk_size_bytes": -1,
                    "max_dead_bytes_per_chunk": -1,
                }
            )
            memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            ort.create_and_register_allocator(memory, defaults)
            _arena_shared = True


def open_graph(
    ort: Any,
    path: Path,
    threads: int | None,
    *,
    save_as: Path | None = None,
    profile: Path | None = None,
    shared: bool = False,
) -> ort.InferenceSession:
    """A session of a bundle's graph, optimised now; `save_as` keeps the result there, its weights in a file beside it.

    `profile` is how the files begin that ONNX Runtime's profiler then writes; `shared` says that others keep the cores
    busy too.
    """
    options = _options(ort, threads, profile, shared)
    if save_as is not None:
        options.optimized_model_filepath = str(save_as)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", weights_path(save_as).name
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(_APART_BYTES)
        )
    return _session(ort, str(path), options, path)


def weights_path(model: Path) -> Path:
    """Where the weights of a saved model lie."""
    return model.with_suffix(".weights")


def open_saved(
    ort: Any, model: bytes, path: Path, threads: int | None, *, profile: Path | None = None, shared: bool = False
) -> ort.InferenceSession:
    """A session of a saved model, not optimised again. `model` is what its file at `path` holds; its weights are mapped
    from that folder, which ONNX Runtime does not let it leave.
    """
    options = _options(ort, threads, profile, shared)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return _session(ort, model, options, path)


def open_engine(
    ort: Any, saved: Saved, graph: str, threads: int | None, *, profile: Path | None = None, shared: bool = False
) -> ort.InferenceSession:
    """A session of an engine's model, whose hash is compared first. `check_weights` has to be called too, before the
    session is run.

    Raises:
        BundleError: the model has changed.
        MachineError, ResourceError: ONNX Runtime cannot load it.
    """
    folder, record = saved
    return open_saved(
        ort,
        read_plan(folder, record, graph),
        folder / record.plans[graph].file,
        threads,
        profile=profile,
        shared=shared,
    )


def check_weights(saved: Saved, graph: str) -> None:
    """Compare a model's weights with the record, unless they were found right before and are untouched since.

    Raises:
        BundleError: they have changed.
    """
    folder, record = saved
    data = record.plans[graph].external_data
    if data is not None:
        check_once(folder / data.file, data.sha256, lambda: check_external_data(folder, record, graph))


def find_saved(bundle: Bundle, version: str) -> Saved | None:
    """The newest engine of saved models that fits this machine; None, with a warning, where there are some and none
    does.

    Raises:
        BundleError: one is not what it should be.
    """
    stale = ""
    for folder in engine_folders(bundle):
        if not folder.name.startswith(f"{TARGET}-"):
            continue
        try:
            record = read_engine(folder)
        except MachineError as error:  # a newer sdrt wrote it
            stale = stale or error.message
            continue
        if record.key.target == TARGET:
            why = mismatch(record, bundle, compiler=version, cpu=cpu_identity(), platform=platform_name(), flags=FLAGS)
            if not why:
                return folder, record
            stale = stale or f"{folder}: {why}"
    if stale:
        log.warning(
            "%s; optimising the bundle's own graphs in memory. Keep that with: sdrt compile %s --target %s",
            stale,
            bundle.path,
            TARGET,
        )
    return None


def run_graph(path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run one graph of a bundle once, optimised as in use, and return its outputs by name."""
    ort = import_onnxruntime("backend onnxruntime")
    return outputs_of(ort, open_graph(ort, path, None), str(path), inputs)


def run_engine(saved: Saved, graph: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run one model of an engine once and return its outputs by name. Its weights have been checked."""
    ort = import_onnxruntime("backend onnxruntime")
    return outputs_of(ort, open_engine(ort, saved, graph, None), f"{saved[0]}: {graph}", inputs)


def outputs_of(ort: Any, session: ort.InferenceSession, where: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """All outputs of a session by name. `where` begins what is said of a failure."""
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, run_session(ort, session, where, outputs, inputs), strict=True))


def run_session(
    ort: Any, session: ort.InferenceSession, where: str, outputs: list[str], inputs: dict[str, Any]
) -> list[Any]:
    """Run a session once; a signal ends it. `where` begins what is said of a failure.

    Raises:
        MachineError, ResourceError: ONNX Runtime fails.
    """
    options = ort.RunOptions()
    try:
        return list(interruptible(lambda: session.run(outputs, inputs, options), lambda: end_run(options)))
    except Exception as error:
        raise explained(ort, where, error) from error


def end_run(options: ort.RunOptions) -> None:
    """Have the run that was given these options end after the operator it is at."""
    options.terminate = True


def explained(ort: Any, where: str, error: Exception) -> SdrtError:
    """An ONNX Runtime failure as one of ours; out of memory is told from the rest by its text, the only place it says
    so.
    """
    words = " ".join(str(error).split())
    text = words[:300]
    if (
        isinstance(error, MemoryError)
        or "allocate memory" in words
        or "bad_alloc" in words
        or "bad allocation" in words
    ):
        return ResourceError(f"{where}: out of memory: {text}", "Choose a smaller --size or --batch.")
    return MachineError(f"{where}: ONNX Runtime {ort.__version__} failed: {text}", "Run: sdrt verify BUNDLE")


def _options(ort: Any, threads: int | None, profile: Path | None, shared: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.use_env_allocators", "1")
    if shared:  # a thread that spins takes its core from the one it waits for, where that has been put off it
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def _session(ort: Any, model: str | bytes, options: ort.SessionOptions, path: Path) -> ort.InferenceSession:
    try:
        session: ort.InferenceSession = interruptible(
            lambda: ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        )
        return session
    except Exception as error:
        raise explained(ort, f"{path}", error) from error
