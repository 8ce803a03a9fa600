"""Measures a bundle's latency and judges changes of it. Imports no torch. numpy is imported here; the runtime and a
plotting library only where they are used.
"""
