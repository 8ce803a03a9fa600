"""Kernels that TensorRT-RTX compiles for the GPU at hand, kept in the user's cache folder for the next process.

TensorRT-RTX compiles them when an execution context is made and when it meets a new shape, and waits for it. One cache
for each GPU and version of the library is attached to every context, so that the second context, pipeline and process
find them. It holds native code: it is read from the user's own folder only, and only if its hash is still that which
was written. Enterprise TensorRT's kernels are in its plans, and it has no such cache.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from sdrt.files.cache import read_entry, write_entry
from sdrt.machine.gpus import Gpu

log = logging.getLogger("sdrt")
_KIND = "kernels"


class KernelCache:
    """Must live as long as the contexts it is attached to. Not thread-safe; it wants the GPU to be current."""

    def __init__(self, version: str, gpu: Gpu) -> None:
        self._key = re.sub(r"[^\w.]+", "-", f"{version}-{gpu}")
        self._gpu = gpu
        self._cache: Any = None
        self._kept: bytes | None = None

    def attach(self, config: Any) -> None:
        """Let a context that is made with this configuration find its kernels here, and leave here what it compiles."""
        if hasattr(config, "create_runtime_cache"):
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._read()
            config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what was compiled since."""
        if self._cache is None:
            return
        blob = bytes(self._cache.serialize())
        if blob != self._kept:
            write_entry(_KIND, self._key, blob)
            self._kept = blob

    def _read(self) -> None:
        self._kept = read_entry(_KIND, self._key)
        # The library compares version, GPU and driver by itself, and takes nothing if one has changed.
        if self._kept is not None and not self._cache.deserialize(self._kept):
            log.warning(
                "the kernels kept for %s are of another driver, GPU or TensorRT-RTX: they are compiled again, once",
                self._gpu,
            )
            self._kept = None
