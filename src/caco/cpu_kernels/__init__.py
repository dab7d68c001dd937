"""What compiled code (numba) for CPUs is made of: vectors and formulas of them, products of matrices, memory, threads; the bank."""
