"""From a bundle's graphs to engines: a file a target, and what they share. Imports no torch."""
