"""Argument checks that several assertions share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout._arrays import as_array
from jdropout._values import type_name


def check_any_leaves(name: str, leaves: Any) -> None:
    if not leaves:
        raise ValueError(
            f"{name} returned no arrays, so there is nothing to compare. Return what it "
            "computes, such as the final parameters and the loss."
        )


def check_floating(x: Any) -> jax.Array:
    x = as_array("x", x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be a floating-point array, got dtype {x.dtype}. Convert it with "
            "x.astype(jnp.float32)."
        )
    return x


def check_like_input(name: str, result: Any, x: jax.Array) -> np.dtype:
    """Checks that an abstract result has x's shape; returns its dtype."""
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must be one array, got {type_name(result)}. Wrap the function.")
    if result.shape != x.shape or not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be a floating-point array of x's shape {x.shape}, got shape "
            f"{result.shape} and dtype {result.dtype}. Pass the dropout alone, without the layers "
            "around it."
        )
    return result.dtype
