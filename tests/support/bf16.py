"""Whether this machine's processor computes in bfloat16."""

from __future__ import annotations

import pytest

from sdrt.runtime.backends.openvino.model import import_openvino

ov = import_openvino("tests")


HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16")
