"""What a bundle can be run with and compiled for: one row each. Nothing else lists the targets or knows them by name.

What differs from target to target is a field here, or a method of its backend. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdrt.machine.packages import oldest_versions


@dataclass(frozen=True)
class Target:
    """A way to run a bundle.

    name: as in options, records and folder names. title: as in sentences.
    extra: the extra of sdrt that brings its packages. packages: those that may bring its library, any one of them.
    index: where pip gets its libraries beside the public index; empty where it needs no other.
    module: how Python imports its library.
    device: what its engines run on.
    shapes: which batches an engine takes: `any`, as the bundle's graphs do; `static`, one of each, and smaller batches
        filled up; `ranges`, from smallest to largest.
    weights: where an engine's weights lie: in the `bundle`'s own file, in a file `beside` the plan, or in the `plan`.
    source: the precision of the graphs that all its engines are made from; None where each has its own.
    sms: GPU generations its library has kernels for, and compiles for without a GPU; empty where that is no question.
    built: whether `sdrt build` compiles for it. The others run a bundle without an engine, and what they can save takes
        disk, so that `sdrt compile` alone saves it, when asked.
    saved: whether `sdrt compile` has anything to save for it.
    """

    name: str
    title: str
    extra: str
    packages: tuple[str, ...]
    module: str
    device: Literal["cpu", "gpu"]
    shapes: Literal["any", "static", "ranges"]
    weights: Literal["bundle", "beside", "plan"]
    source: str | None = None
    sms: tuple[int, ...] = ()
    index: str = ""
    built: bool = True
    saved: bool = True

    def source_of(self, precision: str) -> str:
        """The precision of the graphs that an engine of a precision is made from."""
        return self.source or precision

    @property
    def oldest(self) -> tuple[int, int]:
        """The oldest version of its library that runs, (major, minor)."""
        return next(iter(oldest_versions(self.extra).values()))

    @property
    def oldest_beside(self) -> dict[str, tuple[int, int]]:
        """The packages it needs beside its library, and the oldest version of each."""
        return dict(list(oldest_versions(self.extra).items())[1:])


_ONNXRUNTIME_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
)

ONNXRUNTIME = Target(
    name="onnxruntime",
    title="ONNX Runtime",
    extra="cpu",
    packages=_ONNXRUNTIME_PACKAGES,
    module="onnxruntime",
    device="cpu",
    shapes="any",
    weights="beside",
    built=False,
)
ONNXRUNTIME_CUDA = Target(
    name="onnxruntime-cuda",
    title="ONNX Runtime on a GPU",
    extra="cuda",
    packages=_ONNXRUNTIME_PACKAGES,
    module="onnxruntime",
    device="gpu",
    shapes="any",
    weights="beside",
    built=False,
    saved=False,
)
OPENVINO = Target(
    name="openvino",
    title="OpenVINO",
    extra="openvino",
    packages=("openvino",),
    module="openvino",
    device="cpu",
    shapes="static",
    weights="bundle",
    source="fp32",
)
TENSORRT_RTX = Target(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    extra="tensorrt-rtx",
    packages=("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
    module="tensorrt_rtx",
    device="gpu",
    shapes="ranges",
    weights="plan",
    # Turing, A100, other Ampere, Ada, Blackwell. Data-centre Hopper and Blackwell need TensorRT.
    sms=(75, 80, 86, 89, 120, 121),
)
TENSORRT = Target(
    name="tensorrt",
    title="TensorRT",
    extra="tensorrt",
    packages=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    module="tensorrt",
    device="gpu",
    shapes="ranges",
    weights="plan",
    index="https://pypi.nvidia.com",
)

TARGETS = {row.name: row for row in (ONNXRUNTIME, ONNXRUNTIME_CUDA, OPENVINO, TENSORRT_RTX, TENSORRT)}
"""Every target by its name. An engine's record may name another one, which a newer sdrt knows."""
COMPILED = tuple(row.name for row in TARGETS.values() if row.saved)
"""Those that `sdrt compile` makes engines for."""


def on_gpu(name: str) -> bool:
    """Whether a target's engines run on a GPU; False for a name that is no target's."""
    return name in TARGETS and TARGETS[name].device == "gpu"
