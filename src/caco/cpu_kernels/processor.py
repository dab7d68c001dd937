"""What the processor can do that numba compiles for."""

from __future__ import annotations

from llvmlite import binding
from numba import config


def _can(feature: str) -> bool:
    """Return whether the processor that numba compiles for (this one, unless it has been told another) has a feature of LLVM's."""
    name, features = getattr(config, "CPU_NAME", None), getattr(config, "CPU_FEATURES", None)
    if name or features:
        return f"+{feature}" in (features or "").split(",")
    return bool(getattr(config, "ENABLE_AVX", True) and binding.get_host_cpu_features().get(feature))


BYTES = 64 if _can("avx512f") else 32
"""Of a vector: 16 or 8 numbers of float32."""
MULTIPLIES_PAIRS = _can("avx512bf16") and BYTES == 64
"""Whether one instruction multiplies pairs of bfloat16 and adds each pair's products up: twice as many as of float32."""

if MULTIPLIES_PAIRS:
    binding.initialize_native_asmparser()  # the instruction is written by its name (`bfloat16.py`)
