"""The `sdrt` command: a file a command.

Only this package prints and exits. It may import everything, but each command imports what it needs when it runs.
"""

from sdrt.cli.app import app

__all__ = ["app"]
