"""All engines of one command appear in a bundle together, or none appears. Only one command at a time compiles a
bundle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sdrt.bundle.folder import Bundle
from sdrt.bundle.manifest import ENGINES
from sdrt.compile.watch import WAITING, Progress
from sdrt.engines.store import NewEngine, new_engines
from sdrt.files.lock import locked
from sdrt.files.publish import sweep_stages


@contextmanager
def engines_together(bundle: Bundle, progress: Progress, joined: NewEngine | None = None) -> Iterator[NewEngine]:
    """Yield a function that makes folders for engines. They are published when the block ends without an exception. If
    `joined` is given, they are published together with the engines of the command it comes from.

    Raises:
        LockedError: another process that compiles this bundle did not end in time.
        BundleError, ResourceError, UsageError: as `new_engines`.
    """
    if joined is not None:
        yield joined
        return
    root = bundle.path / ENGINES
    with locked(root, lambda: progress(WAITING, None)):
        sweep_stages(root)
        with new_engines(bundle) as new_engine:
            yield new_engine
