"""Which targets engines are compiled for, what `auto` stands for, and the module that compiles for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdrt.engines.targets import ONNXRUNTIME, OPENVINO, TARGETS, TENSORRT, TENSORRT_RTX, on_gpu
from sdrt.errors import BundleError, MachineError, UsageError, nearest

if TYPE_CHECKING:
    from sdrt.bundle.folder import Bundle
    from sdrt.engines.record import EngineRecord


def compiled_targets(names: Sequence[str], *, must_compile: bool) -> list[str]:
    """The targets among `names` to compile for. `auto` is what is installed and fastest here.

    ONNX Runtime is among them only where `must_compile` is set.

    Raises:
        UsageError: a name is unknown, or `must_compile` is set and there is nothing to compile for a target.
    """
    found, known = [], ("auto", *TARGETS)
    for name in names:
        if name not in known:
            raise UsageError(f"--target {name}: unknown{nearest(name, known)}", f"Choose one of: {', '.join(known)}.")
        chosen = _automatic() if name == "auto" else name
        if must_compile and not TARGETS[chosen].saved:
            raise UsageError(
                f"--target {chosen}: nothing is to be compiled: {TARGETS[chosen].title} takes a bundle as it is",
                f"Run it with: sdrt generate BUNDLE PROMPT --backend {chosen}",
            )
        if TARGETS[chosen].built or must_compile:
            found.append(chosen)
    return list(dict.fromkeys(found))


def checked_targets(names: Sequence[str]) -> list[str]:
    """The targets that a build compiles for, each with its compiler there: a build takes a minute before it needs one.

    Raises:
        UsageError: a name is unknown.
        MachineError: a compiler is missing.
    """
    found = compiled_targets(names, must_compile=False)
    for name in found:
        compiler_of(name).check_compiler(name)
    return found


def compiler_of(target: str) -> Any:
    """The module that compiles for a target."""
    from sdrt.compile import onnxruntime, openvino, tensorrt

    return {
        ONNXRUNTIME.name: onnxruntime,
        OPENVINO.name: openvino,
        TENSORRT_RTX.name: tensorrt,
        TENSORRT.name: tensorrt,
    }[target]


def _automatic() -> str:
    """The target that `auto` stands for.

    TensorRT where it is installed and a GPU answers, else OpenVINO where it is new enough, else ONNX Runtime.
    """
    from sdrt.machine.doctor import compiler_version
    from sdrt.machine.gpus import probe_gpus
    from sdrt.runtime.backends.openvino.model import import_openvino

    if compiler_version(TENSORRT.name) is not None and probe_gpus().found:
        return TENSORRT.name
    try:
        import_openvino("target auto")
    except MachineError:
        return ONNXRUNTIME.name
    return OPENVINO.name


def flags_of(record: EngineRecord) -> tuple[str, ...] | None:
    """How this sdrt builds an engine of its target and precision; None where that depends on the compiler."""
    from sdrt.runtime.backends.onnxruntime import model as onnxruntime_model
    from sdrt.runtime.backends.openvino import model as openvino_model

    of_openvino = openvino_model.FLAGS.get(record.key.precision)
    return {OPENVINO.name: of_openvino, ONNXRUNTIME.name: onnxruntime_model.FLAGS}.get(record.key.target)


def is_compiled(bundle: Bundle, target: str) -> bool:
    """Whether a bundle has an engine of a target that runs here, for what a request asks for by default. Which GPU
    there is, is not looked at.
    """
    from sdrt.engines.store import list_engines, mismatch, serves_default
    from sdrt.machine.cpu import cpu_identity, platform_name
    from sdrt.machine.doctor import compiler_version

    try:
        records = [record for _, record in list_engines(bundle) if record.key.target == target]
    except (BundleError, MachineError):
        return False
    cpu = None if on_gpu(target) else cpu_identity()
    known = {"compiler": compiler_version(target), "platform": platform_name(), "cpu": cpu}
    return any(
        serves_default(record, bundle.manifest) and not mismatch(record, bundle, flags=flags_of(record), **known)
        for record in records
    )
