"""Imports ONNX Runtime and OpenVINO with their usage reports switched off. Nothing else in sdrt imports them.

Both libraries report their use to their makers unless this is switched off before the import. ONNX Runtime resolves a
host name after a while, and keeps a device id and a queue of events in the home folder. OpenVINO asks for a host as
soon as it is imported. If an application imports one of them before sdrt does, its own choice stays.
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
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # processes started from here inherit this
    import onnxruntime

    return onnxruntime


def openvino() -> Any:
    """The openvino module. Its reporting package is hidden during the import, as if it were not installed.

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
