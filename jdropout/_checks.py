"""Argument errors: every one is raised here, once, at the public boundary."""

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify

from jdropout._typing import Index, Key, WordPair


def check_rate(rate: Any, name: str = "rate") -> float | jax.Array:
    """Returns a static rate as a float, and an array as a floating-point scalar array."""
    if isinstance(rate, bool | np.bool_):
        raise TypeError(
            f"{name} must be a number in [0, 1], got {rate!r}, a boolean. To switch dropout off "
            "pass deterministic=True, or a rate of 0."
        )
    if isinstance(rate, jax.Array):
        return _check_rate_array(rate, name)
    if isinstance(rate, np.ndarray) and rate.ndim == 0:
        return check_rate(rate[()], name)
    if getattr(rate, "shape", ()) != ():
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {rate.shape}. "
            "For one rate per example use jax.vmap over keys, inputs and rates."
        )
    number = isinstance(rate, float | int) or (
        isinstance(rate, np.generic)  # jnp.issubdtype also knows a bfloat16 scalar
        and (jnp.issubdtype(rate.dtype, np.floating) or jnp.issubdtype(rate.dtype, np.integer))
    )
    if not number:
        raise TypeError(f"{name} must be a number in [0, 1], got {rate!r} of type {_type(rate)}.")
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
        raise ValueError(
            f"{name} must be a scalar, got an array of shape {rate.shape}. "
            "For one rate per example use jax.vmap over keys, inputs and rates."
        )
    if not isinstance(rate, jax.core.Tracer):
        if not 0 <= float(rate) <= 1:
            raise ValueError(_rate_range(float(rate), name))
    elif not jax.typeof(rate).sharding.mesh.explicit_axes:
        # Under vmap checkify sorts the batch, which an explicitly sharded one forbids.
        checkify.debug_check(
            (rate >= 0) & (rate <= 1), name + " must be in [0, 1], got {rate}.", rate=rate
        )
    return rate


def _rate_range(rate: object, name: str) -> str:
    return (
        f"{name} must be in [0, 1], got {rate}. It is the probability of dropping, not of "
        "keeping: 0 keeps everything, 1 drops everything."
    )


def check_precision(precision: Any) -> int | None:
    if precision is None or (isinstance(precision, int) and precision in (16, 32)):
        return precision
    raise ValueError(
        f"precision must be None, 16 or 32 (bits of the uniform number), got {precision!r}. "
        "None takes 16 bits, and 32 for static rates that 16 bits would miss by over 0.1 %."
    )


def check_deterministic(deterministic: Any) -> bool | jax.Array:
    if isinstance(deterministic, bool | np.bool_):
        return bool(deterministic)
    if isinstance(deterministic, np.ndarray) and deterministic.shape == ():
        return check_deterministic(deterministic[()])
    if not isinstance(deterministic, jax.Array) or deterministic.dtype != jnp.bool_:
        raise TypeError(
            f"deterministic must be True, False or a boolean scalar array, got {deterministic!r}. "
            "Pass True in evaluation and False in training."
        )
    if deterministic.shape != ():
        raise ValueError(
            f"deterministic must be a scalar, got an array of shape {deterministic.shape}. "
            "For one flag per example use jax.vmap."
        )
    return deterministic


def check_input(x: Any, name: str = "x") -> None:
    if isinstance(x, bool | int | float | complex):
        dtype = np.result_type(x)
    elif isinstance(x, jax.Array | np.ndarray | np.generic):
        dtype = x.dtype
    else:
        raise TypeError(
            f"{name} must be an array, got {_type(x)}. Convert it with jnp.asarray({name}), or use "
            "jax.tree.map with one key per leaf."
        )
    if dtype == jnp.float8_e8m0fnu:
        raise TypeError(
            f"{name} must have a dtype with a zero, got float8_e8m0fnu, which has none to drop to: "
            f"convert with {name}.astype(jnp.bfloat16)."
        )
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be a floating-point or complex array, got dtype {dtype}. Dropout scales "
            f"what it keeps, which an integer cannot hold: convert with {name}.astype(jnp.float32)."
        )


def check_key(key: Any, name: str = "key") -> Key:
    if key is None:
        raise ValueError(
            f"{name} is None, but dropout is on and draws a mask. Pass "
            f"{name}=jax.random.key(seed) (a new one for every step, for example "
            "jax.random.fold_in(key, step)), or deterministic=True to switch dropout off."
        )
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a JAX PRNG key, got {key!r} of type {_type(key)}. "
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
    return cast("Key", key)  # a raw NumPy key serves as well as a JAX one


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(
            f"{name} must be a sequence of integers, got {shape!r}. Write (n,) for one axis."
        ) from None
    if any(size < 0 for size in sizes):
        raise ValueError(f"{name} must not have a negative size, got {sizes}.")
    return sizes


def check_static_shape(shape: tuple[Any, ...]) -> None:
    if not all(isinstance(size, int) for size in shape):
        raise ValueError(
            f"x must have a static shape, got {shape}: a mask needs the sizes of the whole array. "
            "Export dropout with static shapes, or evaluation with deterministic=True."
        )


def check_broadcast_dims(broadcast_dims: Any, rank: int) -> frozenset[int]:
    """Returns the axes, counted from the front."""
    try:
        axes = [operator.index(axis) for axis in broadcast_dims]
    except TypeError:
        raise TypeError(
            f"broadcast_dims must be a sequence of axes, got {broadcast_dims!r}. "
            "Write (axis,) for one axis."
        ) from None
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"broadcast_dims has axis {axis}, but the array has {rank} axes. "
                f"Use axes from {-rank} to {rank - 1}."
            )
    return frozenset(axis % rank for axis in axes)


def check_block(
    start: Sequence[Index] | None, global_shape: Sequence[int] | None, shape: tuple[int, ...]
) -> tuple[tuple[Index, ...] | None, tuple[int, ...]]:
    """Returns where a block begins (None for a whole mask), and the shape of the whole mask."""
    if start is None and global_shape is None:
        return None, shape
    if start is None or global_shape is None:
        missing, given = ("start", "global_shape") if start is None else ("global_shape", "start")
        raise ValueError(
            f"{given} was given without {missing}. A block of a larger mask needs both: the index "
            "of its first element, and the shape of the whole."
        )
    whole = check_shape("global_shape", global_shape)
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
    try:
        return operator.index(index)  # also of a JAX array whose value is known
    except TypeError:
        raise TypeError(
            f"start must hold integers, or integer scalar arrays, got {index!r}. "
            "Inside shard_map: jax.lax.axis_index(name) * block_size."
        ) from None


# --- keys ---------------------------------------------------------------------------------


def check_parent_key(key: Any, name: str) -> Key:
    """Checks a key that others are made from, which is no dropout's own."""
    if key is None:
        raise ValueError(
            f"{name} is None, but keys are made from it. Pass {name}=jax.random.key(seed), the "
            "same one in every step."
        )
    return check_key(key, name)


def check_count(name: str, count: Any, bits: int) -> WordPair:
    """Returns an integer of at least 0 and below ``2**bits`` as two 32-bit words."""
    if isinstance(count, jax.core.Tracer) and jnp.issubdtype(count.dtype, np.integer):
        if count.ndim:
            raise ValueError(
                f"{name} must be a scalar, got an array of shape {count.shape}. "
                "For several of them use jax.vmap."
            )
        low = count.astype(jnp.uint32)
        if count.dtype.itemsize < 8:
            return jnp.zeros_like(low), low
        return lax.shift_right_logical(count, lax.full_like(count, 32)).astype(jnp.uint32), low
    number = _integer(count)
    if number is None:
        raise TypeError(
            f"{name} must be an integer or an integer scalar array, got {count!r} of type "
            f"{_type(count)}."
        )
    if not 0 <= number < 2**bits:
        raise ValueError(
            f"{name} must be a whole number of at least 0 and below 2**{bits}, got {count!r}."
        )
    # NumPy scalars: an eager call hands them to its one compiled function as they are.
    return cast("WordPair", (np.uint32(number >> 32), np.uint32(number & 0xFFFFFFFF)))


def check_site(site: Any) -> tuple[Any, ...]:
    """Returns the parts of a site: names, and indices that are checked as counts later."""
    parts = site if isinstance(site, tuple) else (site,)
    if not parts:
        raise ValueError(
            "site must not be empty, got (). Name the dropout, such as site='hidden' or "
            "site=('layer', 3)."
        )
    for part in parts:
        traced = isinstance(part, jax.core.Tracer) and jnp.issubdtype(part.dtype, np.integer)
        if not (isinstance(part, str) or traced or _integer(part) is not None):
            raise TypeError(
                f"site must be a name, an index or a tuple of them, got {part!r} of type "
                f"{_type(part)}. Write it as a string or an integer, such as ('layer', 3)."
            )
    return parts


def _integer(value: Any) -> int | None:
    """The value of an integer that is known, and no boolean; else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


# --- structured ---------------------------------------------------------------------------


def check_axis(name: str, axis: Any, rank: int) -> int:
    """Returns an axis, counted from the front."""
    number = _integer(axis)
    if number is None:
        raise TypeError(f"{name} must be an integer, got {axis!r} of type {_type(axis)}.")
    if not -rank <= number < rank:
        raise ValueError(
            f"{name} is {number}, but the array has {rank} axes. Use {-rank} to {rank - 1}."
        )
    return number % rank


def check_axes(name: str, axes: Any, rank: int) -> tuple[int, ...]:
    """Returns different axes, counted from the front, in the order given."""
    if not isinstance(axes, Sequence | range) or isinstance(axes, str):
        raise TypeError(f"{name} must be a sequence of axes, got {axes!r}. Write (axis,) for one.")
    counted = tuple(check_axis(name, axis, rank) for axis in axes)
    if len(set(counted)) != len(counted):
        raise ValueError(f"{name} names an axis twice, got {tuple(axes)} of {rank} axes.")
    return counted


def check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be {' or '.join(map(repr, options))}, got {value!r}.")


def check_positive(name: str, value: Any) -> int:
    number = _integer(value)
    if number is None:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {_type(value)}.")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
    return number


def check_ndim(name: str, x: Any, ndim: int, axes: str) -> None:
    if np.ndim(x) != ndim:
        raise ValueError(f"{name} must have the axes {axes}, got shape {np.shape(x)}.")


def check_apart(name: str, axis: int, others_name: str, others: tuple[int, ...]) -> None:
    if axis in others:
        raise ValueError(
            f"{name} is axis {axis}, which {others_name} {others} has too. Give each axis one role."
        )


def check_sizes(name: str, sizes: Any, count: int) -> tuple[int, ...]:
    """Returns one size of at least 1 for each of several axes; one number stands for all."""
    if _integer(sizes) is not None:
        return (check_positive(name, sizes),) * count
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"{name} must be an integer or a sequence of integers, got {sizes!r}.")
    if len(sizes) != count:
        raise ValueError(
            f"{name} must be one number, or one for each of {count} axes, got {tuple(sizes)}."
        )
    return tuple(check_positive(name, size) for size in sizes)


def check_channels(channel_axis: Any, batch_axes: Any, rank: int) -> list[int]:
    """Returns the axes that are neither the channels' nor the batch's."""
    channel = check_axis("channel_axis", channel_axis, rank)
    batch = check_axes("batch_axes", batch_axes, rank)
    check_apart("channel_axis", channel, "batch_axes", batch)
    return [axis for axis in range(rank) if axis != channel and axis not in batch]


def check_tokens(tokens: Any, replacement: Any, protected: Any) -> jax.Array:
    array = _as_array("tokens", tokens)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"tokens must be an array of integers, got dtype {array.dtype}. Drop words before the "
            "embedding, or use jdropout.dropout after it."
        )
    if not isinstance(protected, Sequence | frozenset | set | range):
        raise TypeError(
            f"protected must be a sequence of tokens, got {protected!r}. Write (token,) for one."
        )
    limits = jnp.iinfo(array.dtype)
    for name, token in [("replacement", replacement), *(("protected", t) for t in protected)]:
        number = _integer(token)
        if number is None:
            raise TypeError(f"{name} must be an integer, got {token!r} of type {_type(token)}.")
        if not limits.min <= number <= limits.max:
            raise ValueError(f"{name} {number} does not fit the tokens' dtype {array.dtype}.")
    return array


def check_static_flag(deterministic: Any) -> bool:
    flag = check_deterministic(deterministic)
    if isinstance(flag, jax.core.Tracer):
        raise TypeError(
            "deterministic must be True or False here, since the shape of the result depends on "
            f"it, got {flag!r}. Mark it as static, such as jax.jit(f, static_argnames=...)."
        )
    return bool(flag)


def check_fixed_rate(rate: Any) -> float:
    checked = check_rate(rate)
    if isinstance(checked, jax.core.Tracer):
        raise TypeError(
            "rate must be a number here, since the shape of the result depends on it, got "
            f"{checked!r}. Mark it as static, such as jax.jit(f, static_argnames=...)."
        )
    return float(checked)


def check_prefix(count: Any, length: int) -> int:
    number = _integer(count)
    if number is None:
        raise TypeError(f"num_prefix_tokens must be an integer, got {count!r}.")
    if not 0 <= number < length:
        raise ValueError(
            f"num_prefix_tokens must be at least 0 and below the {length} tokens, got {number}."
        )
    return number


def check_any_array(name: str, x: Any) -> jax.Array:
    return _as_array(name, x)


# --- noise --------------------------------------------------------------------------------


def check_real(name: str, x: Any) -> None:
    check_input(x)
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        raise TypeError(
            f"{name} must be a real floating-point array, got dtype {jnp.result_type(x)}. Apply it "
            "to the real and imaginary parts, each with its own key."
        )


def check_rate_below_one(rate: float | jax.Array) -> float | jax.Array:
    if not isinstance(rate, jax.core.Tracer) and float(rate) == 1:
        raise ValueError(
            "rate must be below 1, got 1: the noise would have no finite variance. To drop "
            "everything use jdropout.dropout."
        )
    return rate


def check_amount(name: str, amount: Any) -> float | jax.Array:
    """Returns a number of at least 0 as a float, and an array as a floating-point scalar."""
    number = check_scalar(name, amount)
    if not isinstance(number, jax.core.Tracer) and not 0 <= float(number) < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {amount}.")
    return number


def check_scalar(name: str, number: Any) -> float | jax.Array:
    """Returns a real number as a float, and an array as a floating-point scalar."""
    if isinstance(number, jax.Array):
        if number.shape != () or not jnp.issubdtype(number.dtype, jnp.floating):
            raise TypeError(
                f"{name} must be a floating-point scalar, got shape {number.shape} and dtype "
                f"{number.dtype}."
            )
        return number
    if isinstance(number, np.ndarray) and number.ndim == 0:
        return check_scalar(name, number[()])
    real = _is_real(number) or (
        isinstance(number, np.generic) and jnp.issubdtype(number.dtype, jnp.floating)
    )  # jnp.issubdtype also knows a bfloat16 scalar
    if not real:
        raise TypeError(f"{name} must be a number, got {number!r} of type {_type(number)}.")
    return float(number)


# --- learned ------------------------------------------------------------------------------


def check_parameter(name: str, parameter: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns a floating-point array that broadcasts to a shape, axis by axis, or a scalar."""
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
    array = _as_array(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a floating-point array, got dtype {array.dtype}. Convert it with "
            f"{name}.astype(jnp.float32)."
        )
    return array


def check_temperature(temperature: Any) -> float | jax.Array:
    number = check_amount("temperature", temperature)
    if not isinstance(number, jax.core.Tracer) and float(number) == 0:
        raise ValueError(
            "temperature must be above 0, got 0, which has no gradient. For masks of zeros and "
            "ones use jdropout.dropout."
        )
    return number


def check_threshold(threshold: Any) -> float | None:
    if threshold is None:
        return None
    if not _is_real(threshold) or math.isnan(threshold):
        raise TypeError(
            f"threshold must be None or a number, got {threshold!r}. It is a log_alpha, such as 3."
        )
    return float(threshold)


def check_dense(x: Any, weight: Any, bias: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Checks what a dense layer is made of; returns the bias with as many axes as the output."""
    check_real("x", x)
    x, weight = jnp.asarray(x), check_floating_array("weight", weight)
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            "x and weight must have the shapes (..., inputs) and (inputs, outputs), got "
            f"{x.shape} and {weight.shape}."
        )
    if bias is not None:
        bias = check_floating_array("bias", bias)
        if bias.shape != weight.shape[1:]:
            raise ValueError(f"bias must have the shape {weight.shape[1:]}, got {bias.shape}.")
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None and array.dtype != x.dtype:
            raise TypeError(
                f"{name} must have the dtype of x, {x.dtype}, got {array.dtype}. Convert it with "
                f"{name}.astype(x.dtype)."
            )
    if bias is not None:
        bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
    return x, weight, bias


# --- fused ------------------------------------------------------------------------------------


def check_same_shape(x: Any, residual: Any) -> tuple[jax.Array, jax.Array]:
    x, residual = _as_array("x", x), _as_array("residual", residual)
    if x.shape != residual.shape:
        raise ValueError(
            f"x and residual must have the same shape, got {x.shape} and {residual.shape}."
        )
    for name, array in (("x", x), ("residual", residual)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be a floating-point array, got dtype {array.dtype}.")
    return x, residual


def check_features(name: str, vector: Any, x: jax.Array) -> jax.Array | None:
    """Checks an optional vector along x's last axis; returns it with as many axes as x."""
    if vector is None:
        return None
    vector = _as_array(name, vector)
    if vector.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} must have the shape {x.shape[-1:]} of x's last axis, got {vector.shape}."
        )
    if not jnp.issubdtype(vector.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got dtype {vector.dtype}.")
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def check_norm(norm: Any) -> None:
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}.")


# --- weights ------------------------------------------------------------------------------


def check_select(select: Any) -> Any:
    """Returns a predicate on paths, or a tuple of names."""
    if callable(select):
        return select
    if not isinstance(select, Sequence | set | frozenset) or isinstance(select, str):
        raise TypeError(
            f"select must be a function of a path or a sequence of names, got {select!r}. Write "
            "('recurrent_kernel',) for one name."
        )
    for name in select:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"select must hold names such as 'lstm/recurrent_kernel', got {name!r}."
            )
    return tuple(select)


def check_paths(paths: Sequence[str]) -> None:
    if "" in paths:
        raise ValueError(
            "params must be a tree of named parameters, such as a dictionary, got one array. Use "
            "jdropout.drop_connect for it."
        )


def check_selected(select: Any, unmatched: Sequence[str] | None, paths: Sequence[str]) -> None:
    """``unmatched`` are the names that select nothing; None if a predicate selects nothing."""
    if unmatched is None or unmatched or select == ():
        what = f"{select!r}" if not unmatched else ", ".join(map(repr, unmatched))
        raise ValueError(
            f"select must select parameters, but {what} selects none of {_listed(paths)}. "
            "Use the names that these paths end with."
        )


def check_target_fraction(fraction: Any) -> float:
    if isinstance(fraction, jax.Array):
        raise TypeError(
            "target_fraction must be a Python number, got an array: how many weights are "
            "candidates is static. Convert it with float(target_fraction)."
        )
    if not _is_real(fraction):
        raise TypeError(
            f"target_fraction must be a number, got {fraction!r} of type {_type(fraction)}."
        )
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"target_fraction must be in [0, 1], got {fraction}. It is the part of the weights "
            "that may be dropped."
        )
    return float(fraction)


def check_has_inputs(w: Any) -> None:
    if np.ndim(w) < 2:
        raise ValueError(
            f"w must have two axes or more to choose among each unit's weights, got shape "
            f"{np.shape(w)}. To choose among the elements of a vector pass unit_axis=0."
        )


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:12]))
    return f"{shown} and {len(paths) - 12} more" if len(paths) > 12 else shown or "no parameters"


# --- layers -------------------------------------------------------------------------------


def check_states(old: Any, new: Any) -> None:
    """Checks two states of a recurrent network, which are trees of arrays of one kind."""
    structures: list[Any] = [jax.tree.structure(state) for state in (old, new)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"old and new must have the same structure, got {structures[0]} and {structures[1]}."
        )
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        check_input(a, "old")
        check_input(b, "new")
        kinds = [(np.shape(leaf), jnp.result_type(leaf)) for leaf in (a, b)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"old and new must have the same shape and dtype, got {_kind(*kinds[0])} and "
                f"{_kind(*kinds[1])}. Convert one with .astype, or broadcast it."
            )


def check_rate_for_each(rate: Any, structure: Any) -> list[Any]:
    """Returns a rate for each leaf of a structure: one for all, or a tree of them."""
    leaves, given = jax.tree.flatten(rate)
    if given == structure:
        return leaves
    if not jax.tree_util.treedef_is_leaf(given):
        raise ValueError(
            f"rate must be one rate, or a tree of them with the structure {structure} of the "
            f"state, got {given}."
        )
    return leaves * structure.num_leaves


def check_function(name: str, fn: Any) -> None:
    if not callable(fn):
        raise TypeError(f"{name} must be a function, got {_type(fn)}.")


def check_layer_result(x: Any, y: Any) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (x, y)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"layer must return what has the structure of its input, {structures[0]}, got "
            f"{structures[1]}. Where it is skipped its input is the result."
        )
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        kinds = [(np.shape(leaf), jnp.result_type(leaf)) for leaf in (a, b)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"layer must return the shape and dtype of its input, {_kind(*kinds[0])}, got "
                f"{_kind(*kinds[1])}. Where it is skipped its input is the result: include the "
                "residual connection, and convert with .astype."
            )


def _kind(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}{list(shape)}"


# --- many ---------------------------------------------------------------------------------


def check_averaged(dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"fn must return floating-point or complex arrays to be averaged, got dtype {dtype}. "
            "Return logits or a loss."
        )


def check_logits(logits_a: Any, logits_b: Any) -> tuple[jax.Array, jax.Array]:
    a, b = _as_array("logits_a", logits_a), _as_array("logits_b", logits_b)
    for name, array in (("logits_a", a), ("logits_b", b)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be a floating-point array, got dtype {array.dtype}.")
    if a.shape != b.shape:
        raise ValueError(
            f"logits_a and logits_b must have the same shape, got {a.shape} and {b.shape}."
        )
    return a, b


# --- uncertainty --------------------------------------------------------------------------


def check_num_samples(count: Any, static: bool) -> Any:
    """Returns a number of at least 2, as without it there is no variance."""
    if isinstance(count, jax.core.Tracer):
        if static:
            raise ValueError(
                "num_samples must be a Python integer with return_samples=True, since it is the "
                "size of an axis; got a traced one. Make it static, or leave the samples out."
            )
        if count.ndim or not jnp.issubdtype(count.dtype, np.integer):
            raise TypeError(
                f"num_samples must be an integer scalar, got {count.dtype}{list(count.shape)}."
            )
        return count
    number = check_positive("num_samples", count)
    if not 2 <= number < 2**30:
        raise ValueError(
            f"num_samples must be at least 2, for there to be a variance, and below 2**30, got "
            f"{number}."
        )
    return number


def check_examples(args: tuple[Any, ...]) -> None:
    """With masks that are shared by all examples, the last argument must hold examples."""
    leaves = jax.tree.leaves(args[-1]) if args else []
    shapes = [np.shape(leaf) for leaf in leaves]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "consistent=True needs the examples on the leading axis of the last argument after the "
            f"key, got {f'arrays of shapes {shapes}' if args else 'no argument'}. Pass the inputs "
            "last, such as mc_predict(fn, key, params, x, ...)."
        )


def check_one_row(y: Any) -> None:
    """Of one example, `fn` must return one row."""
    for leaf in jax.tree.leaves(y):
        if np.shape(leaf)[:1] != (1,):
            raise ValueError(
                "fn must return a leading axis of examples with consistent=True: one example, on "
                f"an axis of size 1, gave shape {np.shape(leaf)}. Do what is over all examples, "
                "such as a mean, after mc_predict."
            )


def check_any_output(y: Any) -> None:
    if not jax.tree.leaves(y):
        raise TypeError(f"fn must return arrays, got {y!r}. Return what is to be averaged.")


def check_model(model: Any, kind: type) -> None:
    if not isinstance(model, kind):
        raise TypeError(
            f"model must be a {kind.__module__.split('.')[1]} module, got {_type(model)}. A "
            "function is sampled by jdropout.mc_predict."
        )


def check_any_dropout(drops: bool) -> None:
    if not drops:
        raise ValueError(
            "model must have a dropout layer with a rate above 0, for its masks to differ; it has "
            "none. What drops by a function is sampled by jdropout.mc_predict."
        )


def check_no_progress(progress: Any) -> None:
    if progress is not None:
        raise ValueError(
            "progress cannot be told with return_samples=True, where all samples come from one "
            "call. Leave out one of them."
        )


def check_concrete_for_progress(values: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        raise ValueError(
            "progress cannot be told under jax.jit or another transformation, where nothing is "
            "computed yet. Leave it out, or call mc_predict outside."
        )


# --- measures of uncertainty --------------------------------------------------------------


def check_categorical(logits: Any, axis: Any) -> tuple[jax.Array, int]:
    array = check_floating_array("logits", logits)
    axis = check_axis("axis", axis, array.ndim)
    if array.shape[axis] == 0:
        raise ValueError(
            f"logits must have classes, got shape {array.shape} with none on axis {axis}. Pass "
            "the axis of the classes as axis."
        )
    return array, axis


def check_samples(logits: Any, axis: Any, sample_axis: Any) -> tuple[jax.Array, int, int]:
    array, axis = check_categorical(logits, axis)
    sample_axis = check_axis("sample_axis", sample_axis, array.ndim)
    if axis == sample_axis:
        raise ValueError(
            f"axis and sample_axis must differ, got axis {axis} of shape {array.shape} for both. "
            "Stack the samples on an axis of their own, such as the first."
        )
    check_has_samples(array.shape[sample_axis])
    return array, axis, sample_axis


def check_has_samples(count: int) -> None:
    if count == 0:
        raise ValueError("sample_axis must have at least one sample, got size 0.")


def check_any_examples(shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise ValueError(
            f"logits must have at least one example, got shape {shape}. Without one there is no "
            "average."
        )


def check_labels(labels: Any, shape: tuple[int, ...], num_classes: int) -> jax.Array:
    """Returns labels of a shape as integers of 32 bits or more, in range if they are known."""
    array = _as_array("labels", labels)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"labels must be an array of integers, got dtype {array.dtype}. Of one-hot labels "
            "take labels.argmax(axis)."
        )
    if array.shape != shape:
        raise ValueError(
            f"labels must have the shape {shape}, which is that of the logits without classes and "
            f"samples, got {array.shape}."
        )
    if array.dtype.itemsize < 4:  # too narrow for the number of classes
        array = array.astype(jnp.int32)
    if not isinstance(array, jax.core.Tracer) and array.size:
        lowest, highest = int(array.min()), int(array.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"labels must be from 0 to {num_classes - 1}, the classes of the logits, got "
                f"{lowest if lowest < 0 else highest}. Leave out examples without a label."
            )
    return array


def check_target(y: Any, shape: tuple[int, ...], source: str) -> jax.Array:
    array = check_floating_array("y", y)
    if array.shape != shape:
        raise ValueError(
            f"y must have the shape {shape}, which is that of {source}, got {array.shape}. "
            "Reshape or broadcast it."
        )
    return array


def check_above_zero(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns a number, or an array that broadcasts to a shape, above 0 if it is known."""
    array = check_parameter(name, float(value) if _is_real(value) else value, shape)
    if not isinstance(array, jax.core.Tracer) and array.size:
        lowest = float(array.min())
        if not lowest > 0:  # also catches NaN
            raise ValueError(
                f"{name} must be above 0, got {lowest}. The variance of a prediction is that of "
                "its samples plus that of the noise, which is 1 / precision."
            )
    return array


def check_positive_number(name: str, value: Any) -> float:
    if not _is_real(value):
        raise TypeError(
            f"{name} must be a number, got {value!r} of type {_type(value)}. Convert it with "
            f"float({name})."
        )
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}.")
    return float(value)


def check_rate_that_keeps(rate: float | jax.Array) -> float | jax.Array:
    if not isinstance(rate, jax.core.Tracer) and float(rate) == 1:
        raise ValueError(
            "rate must be below 1, got 1: where all is dropped there is no precision. Pass the "
            "rate that the network was trained with."
        )
    return rate


# --- attention ----------------------------------------------------------------------------


def check_attention_inputs(
    query: Any, key: Any, value: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        arrays[name] = x = _as_array(name, x)
        if x.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
            raise TypeError(
                f"{name} must be a float16, bfloat16, float32 or float64 array, got dtype "
                f"{x.dtype}. Convert it with {name}.astype(jnp.bfloat16)."
            )
        if x.dtype != arrays["query"].dtype:
            raise TypeError(
                f"query, key and value must have the same dtype, got {arrays['query'].dtype} for "
                f"query and {x.dtype} for {name}. Convert it with {name}.astype(query.dtype)."
            )
        if x.ndim not in (3, 4) or x.ndim != arrays["query"].ndim:
            raise ValueError(
                "query, key and value must all have the axes (batch, length, heads, features), or "
                f"all but the batch, got shape {x.shape} for {name}. Reshape further batch axes "
                "into one."
            )
    query, key, value = arrays.values()
    shapes = f"got shapes {query.shape}, {key.shape} and {value.shape}"
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(
            f"query, key and value must have the same batch size, {shapes}. Repeat the smaller "
            "with jnp.broadcast_to."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same number of features, {shapes}.")
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(f"key and value must have the same length and heads, {shapes}.")
    if 0 in key.shape[-2:] or 0 in query.shape[-2:] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            "query, key and value must have heads and features, and query a multiple of the heads "
            f"of key and value, {shapes}."
        )
    return query, key, value


def check_logits_operand(name: str, x: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """Checks a bias or mask, which broadcasts to the attention matrix."""
    if x is None:
        return None
    x = _as_array(name, x)
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean, True where a query may attend to a key, got dtype {x.dtype}. "
            "Convert it with mask.astype(bool), or pass what is added to the logits as bias."
        )
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"bias must be a floating-point array, got dtype {x.dtype}. Pass booleans as mask."
        )
    fits = x.ndim == len(shape) and all(
        size in (1, bound) for size, bound in zip(x.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} must have {len(shape)} axes and broadcast to {shape}, which is ([batch], "
            f"heads, queries, keys), got shape {x.shape}. Insert axes of size 1."
        )
    return x


def check_lengths(name: str, lengths: Any, batch: Sequence[int]) -> jax.Array | None:
    if lengths is None:
        return None
    lengths = _as_array(name, lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers, got dtype {lengths.dtype}.")
    if lengths.shape != (math.prod(batch),):
        raise ValueError(
            f"{name} must have one length per example, shape ({math.prod(batch)},), got shape "
            f"{lengths.shape}."
        )
    return lengths


def check_window(window: Any) -> tuple[int, int] | None:
    if window is None:
        return None
    pair = (window, window) if isinstance(window, int) else window
    try:
        before, after = (operator.index(size) for size in pair)
    except (TypeError, ValueError):
        raise TypeError(
            f"local_window_size must be an integer or a pair of integers, got {window!r}. Write "
            "(before, after), the numbers of keys on either side."
        ) from None
    if before < 0 or after < 0:
        raise ValueError(
            f"local_window_size must not be negative, got {window}. Write (before, after), the "
            "numbers of keys on either side."
        )
    return before, after


def check_scale(scale: Any) -> Any:
    array = _as_array("scale", scale)
    if array.shape != () or not (
        jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    ):
        raise TypeError(
            f"scale must be a real scalar, got shape {array.shape} and dtype {array.dtype}. For "
            "one scale per head or feature multiply the query by it."
        )
    return array


def check_block_sizes(block_sizes: Any) -> tuple[int, int] | None:
    if block_sizes is None:
        return None
    try:
        rows, columns = (operator.index(size) for size in block_sizes)
    except (TypeError, ValueError):
        raise TypeError(
            f"block_sizes must be None or a pair of integers, got {block_sizes!r}. Write "
            "(queries, keys) of a block."
        ) from None
    if rows < 1 or columns < 1:
        raise ValueError(
            f"block_sizes must be positive, got {block_sizes}. Write (queries, keys) of a block, "
            "such as (512, 256)."
        )
    return rows, columns


# --- schedules ----------------------------------------------------------------------------

MAX_STEP = 2**31 - 128
"""The largest float32 that int32 holds: in both, counting stops there."""


def check_step(step: Any) -> jax.Array | np.ndarray:
    array = step if isinstance(step, jax.Array) else np.asarray(step)
    if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)):
        raise TypeError(f"step must be a number, got {step!r} of dtype {array.dtype}.")
    if array.shape != ():
        raise ValueError(
            f"step must be a scalar, got an array of shape {array.shape}. For the rates of many "
            "steps use jax.vmap(schedule)(steps)."
        )
    if isinstance(array, np.ndarray) and array != array:
        raise ValueError(f"step must be a number, got {step}. Count the steps from 0.")
    return array


def check_num_steps(num_steps: Any, name: str, *, least: int = 1, before: int = 0) -> int:
    """Returns a number of steps, to follow those ``before``."""
    try:
        number = operator.index(num_steps)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, got {num_steps!r} of type {_type(num_steps)}. Convert "
            f"it with int({name})."
        ) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    if before + number > MAX_STEP:
        raise ValueError(
            f"{name} must end at step {MAX_STEP} at the latest, which is as far as int32 and "
            f"float32 can count, got {number}{f' after {before}' if before else ''}."
        )
    return number


def check_boundaries(boundaries: Any, of: str, count: int) -> tuple[int, ...]:
    """Returns the steps at which one of ``count`` pieces ends and the next begins."""
    if not isinstance(boundaries, Sequence | np.ndarray | jax.Array):
        raise TypeError(
            f"boundaries must be a sequence of steps, got {boundaries!r}. Write [step] for one."
        )
    steps = tuple(
        check_num_steps(step, f"boundaries[{index}]") for index, step in enumerate(boundaries)
    )
    if len(steps) != count - 1:
        raise ValueError(
            f"boundaries must be one less than {of}, got {len(steps)} for {count}: a step for "
            "every change from one to the next."
        )
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"boundaries must increase, got {steps}. Sort them.")
    return steps


def check_schedules(schedules: Any) -> None:
    for index, schedule in enumerate(schedules):
        if not callable(schedule):
            raise TypeError(
                f"schedules[{index}] must be a function from a step to a rate, got {schedule!r}. "
                "For a fixed rate use jdropout.schedules.constant(rate)."
            )


def check_gamma(gamma: Any) -> float:
    if isinstance(gamma, bool) or not isinstance(gamma, float | int | np.floating | np.integer):
        raise TypeError(f"gamma must be a number, got {gamma!r} of type {_type(gamma)}.")
    if not 0 < gamma <= float(np.finfo(np.float32).max):
        raise ValueError(
            f"gamma must be a finite number above 0, got {gamma}. Take 10 / num_steps, where "
            "num_steps is the length of the training."
        )
    return float(gamma)


def check_decay(decay: Any) -> None:
    if decay not in ("linear", "constant"):
        raise ValueError(f"decay must be 'linear' or 'constant', got {decay!r}.")


# --- testing ------------------------------------------------------------------------------


def check_comparable(name: str, leaf: Any) -> None:
    kinds = jax.Array | np.ndarray | np.generic | bool | int | float | complex | str | bytes
    if not isinstance(leaf, kinds) or np.asarray(leaf).dtype.hasobject:
        raise TypeError(
            f"{name} must be an array, a number or a string to be compared, got {_type(leaf)}. "
            "Return parameters and losses, for example nnx.state(model)."
        )


def check_any_leaves(name: str, leaves: Any) -> None:
    if not leaves:
        raise ValueError(
            f"{name} returned no arrays, so that there is nothing to compare. Return what it "
            "computes, such as the final parameters and the loss."
        )


def check_runs(runs: Any) -> None:
    if isinstance(runs, bool) or not isinstance(runs, int | np.integer):
        raise TypeError(f"runs must be an integer, got {runs!r} of type {_type(runs)}.")
    if runs < 2:
        raise ValueError(f"runs must be at least 2, got {runs}: one run has nothing to equal.")


def check_rtol(rtol: Any) -> None:
    if rtol is not None and not _is_real(rtol):
        raise TypeError(f"rtol must be None or a number, got {rtol!r} of type {_type(rtol)}.")
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(
            f"rtol must be in [0, 1), got {rtol}. Pass None to compare bits, or 1e-5 for sums in "
            "float32."
        )


def check_mesh(mesh: Any, devices: Any) -> None:
    """Checks the two ways to say what devices to use, None being all."""
    if mesh is not None and devices is not None:
        raise ValueError("mesh and devices were both given. A mesh has its devices: pass one.")
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {_type(mesh)}.")
    if devices is None:
        devices = jax.devices() if mesh is None else mesh.devices.reshape(-1)
    if len(devices) < 2:
        raise ValueError(
            f"a sharding needs at least 2 devices, got {len(devices)}. For eight on any CPU set "
            "the environment variable XLA_FLAGS=--xla_force_host_platform_device_count=8 before "
            "JAX starts, for example at the top of conftest.py."
        )


def check_any_placements(placements: Any, sizes: Any) -> None:
    if not placements:
        raise ValueError(
            f"args hold no array with an axis that the mesh {dict(sizes)} divides, so that nothing "
            "can be sharded. Pass arrays with sizes that are multiples of 8, or fewer devices."
        )


def check_floating(x: Any) -> jax.Array:
    x = _as_array("x", x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be a floating-point array, got dtype {x.dtype}. Convert it with "
            "x.astype(jnp.float32)."
        )
    return x


def check_like_input(name: str, result: Any, x: jax.Array) -> np.dtype:
    """Checks the abstract result of a function; returns its dtype."""
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must be one array, got {_type(result)}. Wrap the function.")
    if result.shape != x.shape or not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be a floating-point array of x's shape {x.shape}, got shape "
            f"{result.shape} and dtype {result.dtype}. Pass the dropout alone, without the layers "
            "around it."
        )
    return result.dtype


def check_linear(wrong: np.ndarray) -> None:
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            "fn must be linear and elementwise with a fixed mask, fn(x) = fn(1) * x, which does "
            f"not hold in {np.count_nonzero(wrong)} of {wrong.size} elements, first at {index}. "
            "Pass the dropout alone, without the layers around it, and with a fixed key."
        )


def check_some_dropped(factors: np.ndarray) -> None:
    kept = np.count_nonzero(factors)
    if kept in (0, factors.size):
        raise ValueError(
            f"fn keeps {kept} of {factors.size} elements, so that its mask cannot be told from "
            "another. Pass a larger x and a rate such as 0.5, and switch dropout on "
            "(deterministic=False)."
        )


def check_factors_defined(x: jax.Array) -> jax.Array:
    if x.size == 0:
        raise ValueError(f"x must have elements, got shape {x.shape}.")
    if not bool(jnp.all(jnp.isfinite(x) & (x != 0))):
        raise ValueError(
            "x must be finite and without zeros, since results are divided by it. Pass "
            "jnp.ones(shape), for example."
        )
    return x


def check_static_rate(rate: Any) -> float:
    """Returns a static rate that leaves something to keep."""
    rate = check_rate(rate)
    if isinstance(rate, jax.Array):
        raise TypeError("rate must be a Python number, got an array. Convert it with float(rate).")
    if rate > 1 - 2**-16:
        raise ValueError(f"rate must be below 1, got {rate}: where all is dropped no mean is x.")
    return rate


def check_fraction(name: str, value: Any) -> None:
    if not _is_real(value):
        raise TypeError(f"{name} must be a number, got {value!r} of type {_type(value)}.")
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}.")


def check_number_of_keys(number: int, tolerance: float) -> None:
    if number > 2**30:
        raise ValueError(
            f"a tolerance of {tolerance} takes {number} keys, too many to count. Raise it, or pass "
            "an x with more elements."
        )


def _is_real(value: Any) -> bool:
    return isinstance(value, float | int | np.floating | np.integer) and not isinstance(value, bool)


def _as_array(name: str, x: Any) -> jax.Array:
    if isinstance(x, jax.Array | np.ndarray | np.generic | bool | int | float):
        return jnp.asarray(x)
    raise TypeError(f"{name} must be an array, got {_type(x)}. Convert it with jnp.asarray.")


def _type(value: object) -> str:
    return type(value).__name__
