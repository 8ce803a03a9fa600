"""sdrt, a deployment compiler for Stable Diffusion. Importing it costs nothing: use `sdrt.runtime` to run a bundle and the `sdrt` command to build one."""

__version__ = "0.1.0"
