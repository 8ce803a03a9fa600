"""ONNX Runtime's sessions on a GPU, and the one thread that everything of the device runs in.

ONNX Runtime runs on the CPU what its CUDA provider cannot, without a word. Here that is an error. Its own switch
against it, `session.disable_cpu_ep_fallback`, refuses the arithmetic of shapes too, which the provider leaves to the
CPU by choice, and which every graph with a group norm has. So sessions ask for graph capture, which ONNX Runtime
refuses where a computation lies on the CPU or data goes between the two; and where each node lies is read and compared.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sdrt.engines.targets import ONNXRUNTIME_CUDA
from sdrt.errors import MachineError, ResourceError, SdrtError, UsageError
from sdrt.machine import doctor, engine_libraries
from sdrt.machine.gpus import Gpu, probe_gpus
from sdrt.machine.interruptible import interruptible
from sdrt.machine.packages import install_command

if TYPE_CHECKING:
    import onnxruntime as ort

T = TypeVar("T")

TARGET = ONNXRUNTIME_CUDA.name
WHO = f"backend {TARGET}"
PROVIDER = "CUDAExecutionProvider"
DEVICE = "cuda"
"""ONNX Runtime's names of the provider, and of the device of its tensors."""
GRAPH_ID = "gpu_graph_id"
"""The run option that says which captured graph a run is: it captures a new number and replays a known one."""
PLAIN = -1
"""The number for a run that neither captures nor replays."""
_FATAL = 4
_OF_SHAPES = frozenset(
    (
        *("Add", "Cast", "Concat", "Div", "Gather", "Mul"),
        *("Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"),
    )
)
"""Operators that compute with shapes. The only ones that may lie on the CPU."""
_NAMED = 5
_NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "bad allocation", "ALLOC_FAILED")

_device_thread = ThreadPoolExecutor(1, "sdrt device calls")


def _start_again() -> None:
    """A forked process has only its main thread."""
    global _device_thread
    _device_thread = ThreadPoolExecutor(1, "sdrt device calls")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_again)


def on_device(run: Callable[[], T]) -> T:
    """Make a call that touches the device, after those before it. A signal ends the wait.

    All calls of the process are made in one thread: ONNX Runtime keeps a captured graph for the thread that captured
    it, and a call from another thread would break a capture.
    """
    return interruptible(lambda: _device_thread.submit(run).result())


def import_with_gpu(device: int) -> tuple[Any, Gpu]:
    """The onnxruntime module, once its CUDA provider has run a model here, and the GPU of a number.

    Raises:
        MachineError: a package, library, driver or GPU is missing.
        UsageError: there are fewer GPUs.
    """
    gpus = probe_gpus()
    try:
        found = on_device(lambda: doctor.probe_onnxruntime_cuda(gpus))
    except ImportError as error:
        raise MachineError(
            f"{WHO}: cannot import onnxruntime: {error}",
            f"Install it with: {install_command(ONNXRUNTIME_CUDA.extra, '--force-reinstall')}",
        ) from error
    if found.state != doctor.WORKS:
        raise MachineError(f"{WHO}: {found.detail}", found.fix)
    if not 0 <= device < len(gpus.found):
        raise UsageError(f"device {device}: {len(gpus.found)} GPUs answer", f"Choose 0 to {len(gpus.found) - 1}.")
    onnxruntime = engine_libraries.onnxruntime()
    onnxruntime.set_default_logger_severity(_FATAL)  # errors are raised, and told once
    return onnxruntime, gpus.found[device]


def open_session(ort: Any, path: Path, device: int) -> ort.InferenceSession:
    """A session of a graph that computes on a GPU and nowhere else. To be called on the device's thread.

    Raises:
        MachineError: it would compute on the CPU, or ONNX Runtime cannot load it.
        ResourceError: no memory for it on the device.
    """
    try:
        session = _session(ort, path, device, capture=True)
    except Exception as error:
        if "graph capture" in str(error):  # which nodes are in its way, only a session says that was made without
            with suppress(Exception):
                session = _session(ort, path, device, capture=False)
                error = _misplaced(session, path) or error
        raise failed(ort, str(path), error) from error
    if (why := _misplaced(session, path)) is not None:
        raise why
    return session


def _session(ort: Any, path: Path, device: int, *, capture: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = {
        "device_id": device,
        "enable_cuda_graph": int(capture),
        "cudnn_conv_algo_search": "HEURISTIC",  # the other way is to measure, which takes long and may end otherwise
        "use_tf32": 0,  # what is float32 in a graph needs it
        "arena_extend_strategy": "kSameAsRequested",
    }
    with warnings.catch_warnings():  # an unknown provider is a warning; here it becomes an error below
        warnings.filterwarnings("ignore", "Specified provider", UserWarning)
        session: ort.InferenceSession = ort.InferenceSession(
            str(path), options, providers=[(PROVIDER, chosen)], enable_fallback=0
        )
    return session


def _misplaced(session: ort.InferenceSession, path: Path) -> MachineError | None:
    """What is wrong with a session that computes anywhere but on the GPU."""
    first = session.get_providers()[0]
    if first != PROVIDER:
        return MachineError(
            f"{path}: ONNX Runtime took {first} instead of {PROVIDER}, which did not load",
            "Run: sdrt doctor, which says what the provider lacks.",
        )
    elsewhere = [
        f"{node.op_type} {node.name}".strip()
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
        if node.op_type not in _OF_SHAPES
    ]
    if elsewhere:
        more = f" and {len(elsewhere) - _NAMED} more" if len(elsewhere) > _NAMED else ""
        return MachineError(
            f"{path}: ONNX Runtime has no CUDA kernel here for {', '.join(elsewhere[:_NAMED])}{more}, and would compute"
            " on the CPU",
            f"Install a newer version: {install_command(ONNXRUNTIME_CUDA.extra, '--upgrade')}",
        )
    return None


def out_of_memory(error: Exception) -> bool:
    """Whether ONNX Runtime found no memory. Its text alone says so."""
    return isinstance(error, (MemoryError, ResourceError)) or any(words in str(error) for words in _NO_MEMORY)


def failed(ort: Any, where: str, error: Exception) -> SdrtError:
    """An ONNX Runtime failure as one of ours. `where` begins what is said of it."""
    if isinstance(error, SdrtError):
        return error
    text = " ".join(str(error).split())[:300]
    if out_of_memory(error):
        return ResourceError(f"{where}: out of memory on the GPU: {text}", "Choose a smaller --size or --batch.")
    return MachineError(f"{where}: ONNX Runtime {ort.__version__} failed on the GPU: {text}", "Run: sdrt doctor")
