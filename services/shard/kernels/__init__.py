"""C++ kernels for CPUs: compiled once and cached where a compiler is at hand; never required."""
