"""Which packages each part of sdrt needs, and the command that installs them.

The extras of `pyproject.toml` say the same, for those who install sdrt from a checkout or a wheel; a test holds the two
together. Messages name the packages themselves, since that is right in every install.
"""

from __future__ import annotations

EXTRAS: dict[str, tuple[str, ...]] = {
    "cpu": ("onnxruntime>=1.25",),
    "openvino": ("openvino>=2026.4",),
    "cuda": ("onnxruntime-gpu>=1.25",),
    "tensorrt": ("tensorrt>=11", "cuda-core>=1.2", "cuda-bindings>=13"),
    "tensorrt-rtx": ("tensorrt-rtx-cu12>=1.7", "cuda-core>=1.2", "cuda-bindings>=13"),
    "build": ("torch>=2.10", "onnx>=1.21", "onnxscript>=0.6", "onnxruntime>=1.25"),
    "sign": ("cryptography>=44",),
    "bench": ("matplotlib>=3.10",),
}
"""What each extra installs beside the base, as pip reads it."""


NEW_DRIVER = "Update the NVIDIA driver: https://www.nvidia.com/drivers"
"""What to do where the driver is too old."""


def oldest_versions(extra: str) -> dict[str, tuple[int, int]]:
    """The packages of an extra, and the oldest version of each that will do, (major, minor)."""
    found = {}
    for requirement in EXTRAS[extra]:
        package, _, version = requirement.partition(">=")
        major, _, minor = version.partition(".")
        found[package] = int(major), int(minor or 0)
    return found


def install_command(extra: str, option: str = "") -> str:
    """The pip command that installs an extra's packages, with an option of `pip install` such as `--upgrade` where one
    is given.
    """
    return " ".join(["pip install", *([option] if option else []), *(f"'{package}'" for package in EXTRAS[extra])])
