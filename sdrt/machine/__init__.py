"""What this machine is and has: processor, memory, GPUs, installed packages, and the libraries of engines."""
