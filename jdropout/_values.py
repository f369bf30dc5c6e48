"""Checks of values of any kind: numbers, axes, options, arrays, functions."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    sizes = as_integers(shape)
    if sizes is None:
        raise TypeError(
            f"{name} must be a sequence of integers, got {shape!r}. Write (n,) for one axis."
        )
    if any(size < 0 for size in sizes):
        raise ValueError(
            f"{name} must not have a negative size, got {sizes}. Use sizes of at least 0."
        )
    return sizes


def check_axis(name: str, axis: Any, rank: int) -> int:
    """Returns an axis as a non-negative number."""
    number = as_integer(axis)
    if number is None:
        raise TypeError(
            f"{name} must be an integer, got {axis!r} of type {type_name(axis)}."
            " Negative axes count from the end."
        )
    if not -rank <= number < rank:
        fix = f"Use {-rank} to {rank - 1}." if rank else "Pass an array with axes."
        raise ValueError(f"{name} is {number}, but the array has {rank} axes. {fix}")
    return number % rank


def check_axes(name: str, axes: Any, rank: int) -> tuple[int, ...]:
    """Returns distinct axes as non-negative numbers, in the given order."""
    check_sequence(name, axes)
    counted = tuple(check_axis(name, axis, rank) for axis in axes)
    if len(set(counted)) != len(counted):
        raise ValueError(
            f"{name} names an axis twice, got {tuple(axes)} of {rank} axes. Name every axis once."
        )
    return counted


def check_apart(name: str, axis: int, others_name: str, others: tuple[int, ...]) -> None:
    if axis in others:
        raise ValueError(
            f"{name} is axis {axis}, which {others_name} {others} has too. Give each axis one role."
        )


def check_flag(name: str, value: Any) -> bool:
    """Returns a static option that is on or off."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(
        f"{name} must be True or False, got {value!r} of type {type_name(value)}. It is a static "
        "option: pass a Python bool."
    )


def check_name(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a string, got {value!r} of type {type_name(value)}. Pass a name, such "
            "as 'dropout'."
        )


def check_integer(name: str, value: Any) -> int:
    number = as_integer(value)
    if number is None:
        raise TypeError(
            f"{name} must be an integer, got {value!r} of type {type_name(value)}."
            f" Convert it with int({name})."
        )
    return number


def check_sequence(name: str, values: Any) -> None:
    """Checks that axes are a sequence; which axes there are may not be known yet."""
    if not isinstance(values, Sequence | range) or isinstance(values, str | bytes):
        raise TypeError(
            f"{name} must be a sequence of axes, got {values!r}. Write (axis,) for one."
        )


def check_dtype(name: str, dtype: Any) -> None:
    """Checks a dtype of parameters or of a computation."""
    array = isinstance(dtype, jax.Array | np.ndarray | np.generic)  # whose dtype jnp.dtype takes
    try:
        floating = not array and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except (TypeError, ValueError):
        floating = False
    if not floating:
        raise TypeError(
            f"{name} must be a floating-point dtype, got {dtype!r}. Pass one such as jnp.float32."
        )


def check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(
            f"{name} must be {' or '.join(map(repr, options))}, got {value!r}."
            " Pass one of them as a string."
        )


def check_positive(name: str, value: Any) -> int:
    number = check_integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}. Pass 1 or more.")
    return number


def check_size(name: str, value: Any, bits: int = 31) -> int:
    """Returns a positive number of fewer bits, by default one that an int32 can hold."""
    number = check_positive(name, value)
    if number >= 2**bits:
        raise ValueError(f"{name} must be below 2**{bits}, got {number}. Use a smaller one.")
    return number


def check_indexable(name: str, size: int) -> None:
    """Checks the size of an axis whose elements are numbered by int32."""
    if size >= 2**31:
        raise ValueError(
            f"{name} must have fewer than 2**31 elements to choose from, got {size}. Split it, and "
            "give each part its own key."
        )


def check_amount(name: str, amount: Any) -> float | jax.Array:
    """Returns a number of at least 0 as a float, and an array as a floating-point scalar."""
    number = check_scalar(name, amount)
    if not isinstance(number, jax.core.Tracer) and not 0 <= float(number) < math.inf:
        raise ValueError(
            f"{name} must be a finite number of at least 0, got {amount}. Pass 0 to switch it off."
        )
    return number


def check_scalar(name: str, number: Any) -> float | jax.Array:
    """Returns a real number as a float, and an array as a floating-point scalar."""
    if isinstance(number, jax.Array):
        if number.shape != () or not jnp.issubdtype(number.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be a floating-point scalar, got shape {number.shape} and dtype "
                f"{number.dtype}."
                " For one value per example use jax.vmap."
            )
        return number
    if is_numpy_scalar(number):
        return check_scalar(name, number[()])
    real = is_real(number) or (
        isinstance(number, np.generic) and jnp.issubdtype(number.dtype, jnp.floating)
    )  # unlike np.issubdtype, jnp's knows bfloat16
    if not real:
        raise TypeError(
            f"{name} must be a number, got {number!r} of type {type_name(number)}."
            " Pass a Python float or a floating-point scalar array."
        )
    return as_float(name, number)


def as_float(name: str, number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer beyond the largest float
        raise ValueError(
            f"{name} must be a number that a float can hold, got one of {number.bit_length()} bits."
            " Pass a smaller one."
        ) from None


def check_function(name: str, fn: Any) -> None:
    if not callable(fn):
        raise TypeError(
            f"{name} must be a function, got {type_name(fn)}."
            " Pass the function itself, not its result."
        )


def check_nonempty(name: str, values: Any, of: str) -> None:
    """Checks a sequence with at least one element."""
    array = isinstance(values, np.ndarray | jax.Array)
    if not (array or isinstance(values, Sequence)) or isinstance(values, str | bytes):
        raise TypeError(
            f"{name} must be a sequence of {of}, got {type_name(values)}. Write [a, b] for two."
        )
    if array and (values.ndim != 1 or values.size > _MOST_ELEMENTS):
        raise ValueError(
            f"{name} must have one axis of at most {_MOST_ELEMENTS} {of}, got shape {values.shape}."
            " Write [a, b] for two."
        )
    if not len(values):
        raise ValueError(f"{name} must not be empty. Pass at least one of the {of}.")


def check_fraction(name: str, value: Any) -> None:
    if not is_real(value):
        raise TypeError(
            f"{name} must be a number, got {value!r} of type {type_name(value)}."
            " Pass a Python float."
        )
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}. Both ends are excluded.")


def check_index(name: str, index: Any) -> jax.Array | int:
    """Returns a traced integer scalar as it is, and any other integer as one of Python."""
    if isinstance(index, jax.core.Tracer) and jnp.issubdtype(index.dtype, np.integer):
        if index.ndim:
            raise ValueError(
                f"{name} must be a scalar, got an array of shape {index.shape}. "
                "For several of them use jax.vmap."
            )
        return index
    number = as_integer(index)
    if number is None:
        raise TypeError(
            f"{name} must be an integer or an integer scalar array, got {index!r} of type "
            f"{type_name(index)}. Convert it with int() or .astype(jnp.int32)."
        )
    return number


def as_integer(value: Any) -> int | None:
    """The value of a concrete integer, otherwise None; a boolean is not an integer."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_integers(values: Any) -> tuple[int, ...] | None:
    """The integers of an iterable, otherwise None."""
    if isinstance(values, str | bytes):
        return None
    if isinstance(values, np.ndarray | jax.Array) and (
        isinstance(values, jax.core.Tracer) or values.ndim != 1
    ):
        return None  # JAX would slice a traced array as often as its axis is long
    try:
        numbers = [as_integer(value) for value in values]
    except TypeError:
        return None
    integers = tuple(number for number in numbers if number is not None)
    return integers if len(integers) == len(numbers) else None


_MOST_ELEMENTS = 2**16
"""Of an array that is iterated over."""


def is_numpy_scalar(value: Any) -> bool:
    """Whether a value is an array without axes; that of `np.ma.masked` holds nothing but itself."""
    return (
        isinstance(value, np.ndarray)
        and value.ndim == 0
        and not isinstance(value, np.ma.MaskedArray)
    )


def is_real(value: Any) -> bool:
    number = isinstance(value, float | int | np.floating | np.integer)
    return number and not isinstance(value, bool | np.timedelta64)


def type_name(value: object) -> str:
    return type(value).__name__
