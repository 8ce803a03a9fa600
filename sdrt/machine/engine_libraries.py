"""Imports of ONNX Runtime and OpenVINO, with what they would tell their makers switched off. Nothing else in sdrt
imports them.

Both report their use unless told not to before they are imported. ONNX Runtime resolves a host name after a while and
keeps a device's id and a queue of events in the home folder; OpenVINO asks for a host as soon as it is imported. An
application that has imported one of them before sdrt did has made its own choice, which stays.
"""

from __future__ import annotations

import os
import sys
from threading import Lock
from typing import Any

_OPENVINO_REPORTS = "openvino_telemetry"
_lock = Lock()


def onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        ImportError: it is not installed, or does not load.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # processes that this one starts inherit it
    import onnxruntime

    return onnxruntime


def openvino() -> Any:
    """The openvino module. It goes without the package that reports while it is being imported, as it does where that
    is not installed.

    Raises:
        ImportError, OSError: it is not installed, or does not load.
    """
    with _lock:
        before = sys.modules.pop(_OPENVINO_REPORTS, None)
        sys.modules[_OPENVINO_REPORTS] = None  # type: ignore[assignment]  # importing it raises ImportError
        try:
            import openvino
        finally:
            del sys.modules[_OPENVINO_REPORTS]
            if before is not None:
                sys.modules[_OPENVINO_REPORTS] = before
    return openvino
