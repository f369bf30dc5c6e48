"""Checks of what most functions of the family take: rates, flags, inputs, keys, blocks of masks."""

import functools
import inspect
import math
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from jdropout import _arrays, _values
from jdropout._typing import Index, Key
from jdropout._values import type_name


def check_rate(rate: Any, name: str = "rate") -> float | jax.Array:
    """Returns a static rate as a float, and an array as a floating-point scalar."""
    if isinstance(rate, bool | np.bool_):
        raise TypeError(
            f"{name} must be a number in [0, 1], got {rate!r}, a boolean. To switch dropout off "
            "pass deterministic=True, or a rate of 0."
        )
    if isinstance(rate, jax.Array):
        return _check_rate_array(rate, name)
    if _values.is_numpy_scalar(rate):
        return check_rate(rate[()], name)
    shape = getattr(rate, "shape", ())
    if isinstance(shape, tuple) and shape:
        raise ValueError(_rate_shape(rate, name))
    number = isinstance(rate, float | int) or (
        isinstance(rate, np.generic)  # unlike np.issubdtype, jnp's knows bfloat16
        and rate.dtype.kind != "m"  # timedelta64, an integer of NumPy
        and (jnp.issubdtype(rate.dtype, np.floating) or jnp.issubdtype(rate.dtype, np.integer))
    )
    if not number:
        raise TypeError(
            f"{name} must be a number in [0, 1], got {rate!r} of type {type_name(rate)}."
            " Pass a Python float such as 0.1, or a floating-point scalar array."
        )
    if not 0 <= rate <= 1:  # also catches NaN
        raise ValueError(_rate_range(rate, name))
    return float(rate)


def _check_rate_array(rate: jax.Array, name: str) -> jax.Array:
    if not jnp.issubdtype(rate.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a floating-point scalar, got an array of dtype {rate.dtype}. "
            "Convert it with rate.astype(jnp.float32)."
        )
    if rate.shape != ():
        raise ValueError(_rate_shape(rate, name))
    if not isinstance(rate, jax.core.Tracer):
        if not 0 <= float(rate) <= 1:
            raise ValueError(_rate_range(float(rate), name))
    elif _under_checkify() and not jax.typeof(rate).sharding.mesh.explicit_axes:
        # Under vmap checkify sorts the batch, which fails if the batch is explicitly sharded.
        checkify.debug_check(
            (rate >= 0) & (rate <= 1), name + " must be in [0, 1], got {rate}.", rate=rate
        )
    return rate


def _rate_shape(rate: Any, name: str) -> str:
    return (
        f"{name} must be a scalar, got an array of shape {rate.shape}. The order is key, input, "
        "rate. For one rate per example use jax.vmap over keys, inputs and rates."
    )


def _under_checkify() -> bool:
    """Whether checkify is tracing, according to the stack.

    A check outside of checkify leaves an effect in the program, which then takes several times
    longer to dispatch and cannot be serialised.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != _CHECKIFY:
        frame = frame.f_back
    return frame is not None


_CHECKIFY = inspect.unwrap(checkify.checkify).__code__.co_filename


def _rate_range(rate: object, name: str) -> str:
    return (
        f"{name} must be in [0, 1], got {rate}. It is the probability of dropping, not of "
        "keeping: 0 keeps everything, 1 drops everything."
    )


def check_precision(precision: Any) -> int | None:
    if precision is None:
        return None
    bits = _values.as_integer(precision)
    if bits in (16, 32):
        return bits
    raise ValueError(
        f"precision must be None, 16 or 32 (bits of the uniform number), got {precision!r}. "
        "None uses 16 bits, or 32 for a static rate that 16 bits would miss by over 0.1 %."
    )


def check_deterministic(deterministic: Any, name: str = "deterministic") -> bool | jax.Array:
    if isinstance(deterministic, bool | np.bool_):
        return bool(deterministic)
    if _values.is_numpy_scalar(deterministic):
        return check_deterministic(deterministic[()], name)
    if not isinstance(deterministic, jax.Array) or deterministic.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be True, False or a boolean scalar array, got {deterministic!r}. "
            "Pass True in evaluation and False in training."
        )
    if deterministic.shape != ():
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {deterministic.shape}. "
            "For one flag per example use jax.vmap."
        )
    return deterministic


def check_order(x: Any, rate: Any) -> None:
    """Checks that a scalar input is not the rate, which would have no effect but a wrong number."""
    if isinstance(x, int | float) and isinstance(rate, jax.Array | np.ndarray):
        raise TypeError(
            f"x is the number {x!r}, and rate an array: the order is key, input, rate. If it is "
            "meant, pass jnp.asarray(x)."
        )


def check_input(x: Any, name: str = "x") -> Any:
    """Returns x itself, or an array that JAX can read."""
    x = _arrays.readable(name, x)
    reason = _why_not(_arrays.dtype_of(x))
    if reason:
        raise TypeError(reason.format(name=name))
    return x


@functools.lru_cache  # for eager calls
def _why_not(dtype: np.dtype) -> str:
    """Why dropout cannot take a dtype, for an error that names the argument; empty if it can."""
    if dtype == jnp.float8_e8m0fnu:
        return (
            "{name} must have a dtype with a zero, got float8_e8m0fnu, which has none to drop to: "
            "convert with {name}.astype(jnp.bfloat16)."
        )
    if not jnp.issubdtype(dtype, jnp.inexact):
        return (
            f"{{name}} must be a floating-point or complex array, got dtype {dtype}. Dropout "
            "scales what it keeps, which an integer cannot hold: convert with "
            "{name}.astype(jnp.float32)."
        )
    return ""


def check_key(key: Any, name: str = "key") -> Key:
    if key is None:
        raise ValueError(
            f"{name} is None, but dropout is on and draws a mask. Pass "
            f"{name}=jax.random.key(seed) (a new one for every step, for example "
            "jax.random.fold_in(key, step)), or deterministic=True to switch dropout off."
        )
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a JAX PRNG key, got {key!r} of type {type_name(key)}. "
            f"{'The order is key, input, rate. ' if isinstance(key, float) else ''}"
            "Make one with jax.random.key(seed)."
        )
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and key.dtype != jnp.uint32:
        raise TypeError(
            f"{name} must be a JAX PRNG key or a raw uint32 key, got an array of dtype "
            f"{key.dtype}. Make one with jax.random.key(seed)."
        )
    if key.ndim != (0 if typed else 1):
        raise ValueError(
            f"{name} must be a single key, got {'keys' if typed else 'an array'} of shape "
            f"{key.shape}. For one key per example use jax.vmap(dropout, "
            "in_axes=(0, 0, None))(keys, x, rate)."
        )
    if not typed and key.shape[0] not in (2, 4):
        raise ValueError(
            f"{name} must be a raw key of 2 or 4 uint32 words, got {key.shape[0]}. "
            "Make one with jax.random.key(seed)."
        )
    return cast("Key", key)  # a raw NumPy key works too


def check_broadcast_dims(
    broadcast_dims: Any, rank: int, name: str = "broadcast_dims"
) -> frozenset[int]:
    """Returns the axes as non-negative numbers."""
    axes = _values.as_integers(broadcast_dims)
    if axes is None:
        raise TypeError(
            f"{name} must be a sequence of axes, got {broadcast_dims!r}. "
            "Write (axis,) for one axis."
        )
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"{name} has axis {axis}, but the array has {rank} axes. "
                f"Use axes from {-rank} to {rank - 1}."
            )
    return frozenset(axis % rank for axis in axes)


def check_block(
    start: Sequence[Index] | None, global_shape: Sequence[int] | None, shape: tuple[int, ...]
) -> tuple[tuple[Index, ...] | None, tuple[int, ...]]:
    """Returns the block's start, None for a whole mask, and the shape of the whole mask."""
    if start is None and global_shape is None:
        return None, shape
    if start is None or global_shape is None:
        missing, given = ("start", "global_shape") if start is None else ("global_shape", "start")
        raise ValueError(
            f"{given} was given without {missing}. A block of a larger mask needs both: the index "
            "of its first element, and the shape of the whole."
        )
    whole = _values.check_shape("global_shape", global_shape)
    if not isinstance(start, Sequence):
        raise TypeError(
            f"start must be a sequence with one index per axis, got {start!r}. Write tuple(start) "
            "for an array, and 0 on axes that are not split."
        )
    first = tuple(_check_index(index) for index in start)
    if not len(first) == len(whole) == len(shape):
        raise ValueError(
            f"start {first}, global_shape {whole} and the block's shape {shape} must have the "
            "same number of axes."
            " Give one index and one size for every axis."
        )
    for axis, (index, size, bound) in enumerate(zip(first, shape, whole, strict=True)):
        lowest = index if isinstance(index, int) else 0
        if lowest < 0 or lowest + size > bound:
            raise ValueError(
                f"the block lies outside the mask on axis {axis}: start {lowest}, size {size}, "
                f"but global_shape has {bound}. Give start and global_shape in elements of the "
                "whole array."
            )
    if math.prod(whole) > 2**64:
        raise ValueError(
            f"global_shape {whole} has more than 2**64 elements, which no block index can count. "
            "Split the array and give each part its own key."
        )
    return first, whole


def _check_index(index: Any) -> Index:
    traced_scalar = isinstance(index, jax.core.Tracer) and index.ndim == 0
    if traced_scalar and jnp.issubdtype(index.dtype, np.integer):
        return index
    number = _values.as_integer(index)  # also accepts a concrete JAX array
    if number is None:
        raise TypeError(
            f"start must hold integers, or integer scalar arrays, got {index!r}. "
            "Inside shard_map: jax.lax.axis_index(name) * block_size."
        )
    return number


def check_parent_key(key: Any, name: str) -> Key:
    """Checks a key that other keys are derived from."""
    if key is None:
        raise ValueError(
            f"{name} is None, but keys are made from it. Pass {name}=jax.random.key(seed), the "
            "same one in every step."
        )
    return check_key(key, name)


def check_channels(channel_axis: Any, batch_axes: Any, rank: int) -> list[int]:
    """Returns the axes that are neither the channels' nor the batch's."""
    channel = _values.check_axis("channel_axis", channel_axis, rank)
    batch = _values.check_axes("batch_axes", batch_axes, rank)
    _values.check_apart("channel_axis", channel, "batch_axes", batch)
    return [axis for axis in range(rank) if axis != channel and axis not in batch]


def check_static_flag(deterministic: Any) -> bool:
    flag = check_deterministic(deterministic)
    if isinstance(flag, jax.core.Tracer):
        raise TypeError(
            "deterministic must be True or False here, since the shape of the result depends on "
            f"it, got {flag!r}. Mark it as static, such as jax.jit(f, static_argnames=...)."
        )
    return bool(flag)


def check_real(name: str, x: Any) -> Any:
    x = check_input(x, name)
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise TypeError(
            f"{name} must be a real floating-point array, got dtype {jnp.result_type(x)}. Apply it "
            "to the real and imaginary parts, each with its own key."
        )
    return x


def check_rate_below_one(rate: float | jax.Array) -> float | jax.Array:
    if not isinstance(rate, jax.core.Tracer) and float(rate) == 1:
        raise ValueError(
            "rate must be below 1, got 1: the noise would have no finite variance. To drop "
            "everything use jdropout.dropout."
        )
    return rate


def check_static_shape(shape: tuple[Any, ...]) -> None:
    if any(isinstance(size, int) and size >= 2**63 for size in (*shape, math.prod(shape))):
        raise ValueError(f"shape must have fewer than 2**63 elements, got {shape}. Split it.")
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(
            f"x must have a static shape, got {shape}: a mask needs the sizes of the whole array. "
            "Export dropout with static shapes, or evaluation with deterministic=True."
        )
