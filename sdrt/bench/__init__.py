"""Measuring a bundle's latency and judging changes of it. Imports no torch; numpy here, the runtime and a plotting
library only where they are used.
"""
