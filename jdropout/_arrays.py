"""Checks of arrays and of trees of them; arrays of what is given in their place."""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jdropout._values import check_axis, type_name


def check_common_axis(
    name: str, tree: Any, axis_name: str, axis: Any
) -> tuple[jax.Array, int, int]:
    """Returns a tree's first array, its axis as a non-negative number, and the size of all."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError(f"{name} must hold an array, got {tree!r}. Pass an array or a tree.")
    for leaf in leaves:
        if not leaf.ndim:
            raise ValueError(
                f"{name} must have {axis_name} {axis}, got a scalar. Pass scalars in a closure."
            )
    axes = [check_axis(axis_name, axis, leaf.ndim) for leaf in leaves]
    sizes = [leaf.shape[at] for leaf, at in zip(leaves, axes, strict=True)]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{name} must have one size on {axis_name} {axis}, got {sizes}. Pass arrays without "
            "this axis in a closure."
        )
    return leaves[0], axes[0], sizes[0]


def check_scalable(name: str, tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{name} must be floating-point or complex, since it is multiplied, got dtype "
                f"{dtype}. Convert it with .astype(jnp.float32)."
            )


def check_parameter(name: str, parameter: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns a floating-point scalar, or an array whose axes are 1 or the size in ``shape``."""
    array = check_floating_array(name, parameter)
    fits = array.ndim == len(shape) and all(
        size in (1, bound) for size, bound in zip(array.shape, shape, strict=True)
    )
    if array.ndim and not fits:
        raise ValueError(
            f"{name} must be a scalar or have axes of size 1 or of the sizes {shape}, got shape "
            f"{array.shape}. Insert axes of size 1, such as {name}[None, :]."
        )
    return array


def check_floating_array(name: str, x: Any) -> jax.Array:
    array = as_array(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a floating-point array, got dtype {array.dtype}. Convert it with "
            f"{name}.astype(jnp.float32)."
        )
    return array


def as_array(name: str, x: Any) -> jax.Array:
    """Returns a JAX array, without losing the digits of an integer."""
    x = readable(name, x)
    if isinstance(x, jax.Array):  # also of a dtype such as PRNG keys
        return x
    dtype = np.dtype(np.int64) if isinstance(x, int) else dtype_of(x)  # of 2**64 it is object
    narrow = jax.dtypes.canonicalize_dtype(dtype)
    if (narrow != dtype or isinstance(x, int)) and jnp.issubdtype(dtype, np.integer) and np.size(x):
        limits = jnp.iinfo(narrow)
        for number in (np.min(x), np.max(x)):
            if not limits.min <= number <= limits.max:
                raise ValueError(
                    f"{name} must fit {narrow}, JAX's integers without jax_enable_x64, got "
                    f"{number}. Switch x64 on, or use smaller numbers."
                )
    if isinstance(x, float) and float(jnp.finfo(narrow).max) < abs(x) < math.inf:
        raise ValueError(
            f"{name} must fit {narrow}, JAX's numbers without jax_enable_x64, got {x}. Switch x64 "
            "on, or use a smaller number."
        )
    return jnp.asarray(x)


def as_arrays(name: str, tree: Any) -> Any:
    """`as_array` of every leaf."""
    return jax.tree.map(functools.partial(as_array, name), tree)


def readable(name: str, x: Any) -> jax.Array | np.ndarray | np.generic | complex:
    """Returns x itself if JAX reads it right, else an array that JAX does.

    JAX reads the bytes of a foreign byte order and of masked elements as they are.
    """
    if isinstance(x, jax.Array | np.ndarray) and _is_float6(x.dtype):
        raise TypeError(
            f"{name} must have a dtype that XLA can compile, got {x.dtype}. Convert it with "
            f"{name}.astype(jnp.float8_e4m3fn)."
        )
    if isinstance(x, jax.Array | bool | int | float | complex):
        return x
    if hasattr(type(x), "__jax_array__"):  # such as a Flax variable
        return cast("jax.Array", x.__jax_array__())
    if not isinstance(x, np.ndarray | np.generic):
        raise TypeError(
            f"{name} must be an array, got {type_name(x)}. Convert it with jnp.asarray({name}), or "
            "use jax.tree.map for a tree of arrays."
        )
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array, got a masked one. Fill it with {name}.filled(0)."
        )
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    if not _known_to_jax(x.dtype):
        raise TypeError(
            f"{name} must have a dtype that JAX has, got {x.dtype}. Convert it with "
            f"{name}.astype(np.float32)."
        )
    return x


@functools.lru_cache
def _known_to_jax(dtype: np.dtype) -> bool:
    if dtype in (np.longdouble, np.clongdouble):  # which is float64 on some machines
        return dtype in (np.float64, np.complex128)
    # timedelta64 counts as an integer of NumPy.
    return dtype.kind in "biufc" or (dtype.kind != "m" and bool(jnp.issubdtype(dtype, np.number)))


@functools.lru_cache
def _is_float6(dtype: Any) -> bool:
    return str(dtype).startswith("float6_")


def dtype_of(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else np.result_type(x)


def describe_array(x: Any) -> str:
    """Dtype and shape, such as float32[2, 3]; the type of what is no array."""
    if isinstance(x, str | bytes) or not (hasattr(x, "dtype") or np.isscalar(x)):
        return type_name(x)
    return f"{jnp.result_type(x)}{list(np.shape(x))}"


def check_averaged(y: Any) -> None:
    """Checks the arrays, or abstract arrays, that a function returns to be averaged."""
    for leaf in jax.tree.leaves(y):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                "fn must return floating-point or complex arrays to be averaged, got dtype "
                f"{leaf.dtype}. Return logits or a loss."
            )
