"""sdrt, a deployment compiler for Stable Diffusion. Importing it costs nothing: use `sdrt.runtime` to run a bundle and
the `sdrt` command to build one.
"""

import logging

__version__ = "0.1.0"

logging.getLogger("sdrt").addHandler(
    logging.NullHandler()
)  # quiet until the application, or the command, says where messages go
