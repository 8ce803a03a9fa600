"""The engines of one command: they appear in a bundle together, or none of them does. One command at a time compiles a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sdrt.bundle.folder import Bundle
from sdrt.bundle.manifest import ENGINES
from sdrt.compile.watch import WAITING, Progress
from sdrt.engine_cache import NewEngine, new_engines
from sdrt.lock import locked
from sdrt.publish import sweep_stages


@contextmanager
def engines_together(bundle: Bundle, progress: Progress, joined: NewEngine | None = None) -> Iterator[NewEngine]:
    """Yield what makes the folders of engines to fill. They are published when the block ends without an exception, or, where `joined` is given, with
    those of the command that it comes from.

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
