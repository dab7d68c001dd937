"""What the compiled code (numba) for CPUs is made of: vectors of neighbouring numbers, products of matrices, memory, threads."""
