"""Aliases used in signatures."""

from typing import TypeAlias

import jax
import numpy as np
from jax.typing import ArrayLike

Key: TypeAlias = jax.Array | np.ndarray
"""A typed PRNG key of any implementation, or a raw uint32 key of 2 or 4 words."""

Rate: TypeAlias = float | np.floating | jax.Array
"""The probability of dropping: a number in [0, 1], or a floating-point scalar array."""

Flag: TypeAlias = bool | np.bool_ | jax.Array
"""A Python boolean, or a boolean scalar array (possibly traced)."""

Index: TypeAlias = int | np.integer | jax.Array
"""A Python integer, or an integer scalar array (possibly traced)."""

Site: TypeAlias = str | Index | tuple[str | Index, ...]
"""A dropout's place in a model: a name, an index, or a path of them."""

Batch: TypeAlias = tuple[Index, int] | tuple[Index, int, int]
"""A part of a batch: its first example, the size of the whole, and maybe its number of examples."""

WordPair: TypeAlias = tuple[jax.Array, jax.Array]
"""Two uint32 arrays: a cipher block, a cipher key, or the (high, low) halves of 64 bits."""

__all__ = ["ArrayLike", "Batch", "Flag", "Index", "Key", "Rate", "Site", "WordPair"]
