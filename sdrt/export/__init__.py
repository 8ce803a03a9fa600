"""From the files people have to a bundle. May import torch; imports neither `sdrt.compile` nor `sdrt.runtime`."""
