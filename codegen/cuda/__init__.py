"""Our own CUDA kernels: their sources, how they are compiled and planned, and what they mean."""
