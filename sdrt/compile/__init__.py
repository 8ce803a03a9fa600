"""From a bundle's graphs to engines for one target. Imports no torch; empty until the first compiled target lands."""
