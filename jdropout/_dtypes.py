"""Dtypes of intermediate results and of sums."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def wide_dtype(*arrays: Any) -> np.dtype:
    """float32, or float64 if an array has 64-bit floating-point (or complex128) elements.

    Args:
      *arrays: arrays or dtypes, floating-point or complex.
    """
    bits = max(jnp.finfo(getattr(x, "dtype", x)).bits for x in arrays)
    return jnp.dtype(jnp.float64 if bits == 64 else jnp.float32)


def sum_dtype(x: Any) -> np.dtype:
    """The dtype for summing elements of x: x's own, but at least float32."""
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.dtype(jnp.float32)
