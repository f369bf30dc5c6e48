"""Argument checks of attention."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdropout._arrays import as_array
from jdropout._draw import Draw
from jdropout._implementation import LANES, check_supported, unsupported
from jdropout._values import as_float, as_integer, as_integers, check_option, is_real, type_name

MOST_POSITIONS = 2**30
"""Queries and keys of a whole matrix. Positions are int32, and windows are added to them."""


def check_attention_inputs(
    query: Any, key: Any, value: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        arrays[name] = x = as_array(name, x)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise TypeError(
                f"{name} must be real, got dtype {x.dtype}: the softmax of complex logits is not "
                f"defined. Pass the real and the imaginary part as features, such as "
                f"jnp.concatenate([{name}.real, {name}.imag], -1)."
            )
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
        raise ValueError(
            f"query and key must have the same number of features, {shapes}."
            " Project both to one size."
        )
    if key.shape[-3:-1] != value.shape[-3:-1]:
        raise ValueError(
            f"key and value must have the same length and heads, {shapes}."
            " Every key needs its value."
        )
    if 0 in key.shape[-2:] or 0 in query.shape[-2:] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            "query, key and value must have heads and features, and query a multiple of the heads "
            f"of key and value, {shapes}."
            " Repeat the heads of key and value with jnp.repeat."
        )
    return query, key, value


def check_logits_operand(name: str, x: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """Checks that a bias or mask broadcasts to the attention matrix."""
    if x is None:
        return None
    x = as_array(name, x)
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


def check_matmul_precision(precision: Any) -> None:
    if precision is None or isinstance(precision, jax.lax.Precision):
        return
    try:
        hash(precision)
        one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        jax.eval_shape(functools.partial(jnp.matmul, precision=precision), one, one)
    except (TypeError, ValueError):
        raise ValueError(
            f"precision must be one of JAX's, got {precision!r} of type {type_name(precision)}. "
            "Pass 'highest', for example, or None."
        ) from None


def check_positions(whole: tuple[int, ...]) -> None:
    if any(size > MOST_POSITIONS for size in whole[-2:] if isinstance(size, int)):
        raise ValueError(
            f"the attention matrix must have at most 2**30 queries and keys, got {whole}. Split "
            "the sequence, and give each part its own key."
        )


def check_lengths(name: str, lengths: Any, batch: Sequence[int]) -> jax.Array | None:
    if lengths is None:
        return None
    lengths = as_array(name, lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be an array of integers, got dtype {lengths.dtype}."
            f" Convert it with {name}.astype(jnp.int32)."
        )
    if lengths.shape != (math.prod(batch),):
        raise ValueError(
            f"{name} must have one length per example, shape ({math.prod(batch)},), got shape "
            f"{lengths.shape}."
            " Pass one for every example of the batch."
        )
    return lengths.clip(0, min(jnp.iinfo(lengths.dtype).max, MOST_POSITIONS)).astype(jnp.int32)


def check_segment_ids(
    queries: Any, keys: Any, batch: Sequence[int], length: int, key_length: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Checks the segments of queries and keys; one array may stand for both."""
    if queries is None and keys is None:
        return None, None
    if queries is None or keys is None:
        name, given = "query_segment_ids", queries
        if given is None:
            name, given = "key_value_segment_ids", keys
        if length != key_length:
            raise ValueError(
                f"{name} alone is for queries and keys of the same length, got {length} queries "
                f"and {key_length} keys. Pass query_segment_ids and key_value_segment_ids."
            )
        queries = keys = given
    ids = []
    for name, given, size in (
        ("query_segment_ids", queries, length),
        ("key_value_segment_ids", keys, key_length),
    ):
        array = as_array(name, given)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(
                f"{name} must be an array of integers, got dtype {array.dtype}. Convert it with "
                f"{name}.astype(jnp.int32)."
            )
        if array.shape != (*batch, size):
            raise ValueError(
                f"{name} must have one number per token, shape {(*batch, size)}, got shape "
                f"{array.shape}. Repeat it for every example with jnp.broadcast_to."
            )
        ids.append(array)
    queries, keys = ids
    if queries.dtype != keys.dtype:
        raise TypeError(
            f"query_segment_ids and key_value_segment_ids must have the same dtype, got "
            f"{queries.dtype} and {keys.dtype}. Convert both with .astype(jnp.int32)."
        )
    return queries, keys


def check_alignment(
    alignment: Any,
    whole: tuple[int, ...],
    query_lengths: jax.Array | None,
    key_lengths: jax.Array | None,
) -> jax.Array:
    """Returns what is added to the position of a query to find it among the keys."""
    check_option("causal_alignment", alignment, ("top-left", "bottom-right"))
    if alignment == "top-left":
        return jnp.zeros(1, jnp.int32)
    *_, length, key_length = whole
    last_query = jnp.asarray(length, jnp.int32) if query_lengths is None else query_lengths
    last_key = jnp.asarray(key_length, jnp.int32) if key_lengths is None else key_lengths
    return jnp.atleast_1d(last_key - last_query)


def check_soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    if not is_real(cap):
        raise TypeError(
            f"logits_soft_cap must be a Python number, got {cap!r} of type {type_name(cap)}. It is "
            "part of the model, such as 50.0, and has no gradient."
        )
    number = as_float("logits_soft_cap", cap)
    if not 0 < number < math.inf:
        raise ValueError(
            f"logits_soft_cap must be a finite number above 0, got {cap}. Pass None for no cap."
        )
    return number


def check_window(window: Any) -> tuple[int, int] | None:
    if window is None:
        return None
    number = as_integer(window)
    pair = as_integers(window) if number is None else (number, number)
    if pair is None or len(pair) != 2:
        raise TypeError(
            f"local_window_size must be an integer or a pair of integers, got {window!r}. Write "
            "(before, after), the numbers of keys on either side."
        )
    before, after = pair
    if before < 0 or after < 0:
        raise ValueError(
            f"local_window_size must not be negative, got {window}. Write (before, after), the "
            "numbers of keys on either side."
        )
    return min(before, MOST_POSITIONS), min(after, MOST_POSITIONS)


def check_scale(scale: Any) -> Any:
    array = as_array("scale", scale)
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
    pair = as_integers(block_sizes)
    if pair is None or len(pair) != 2:
        raise TypeError(
            f"block_sizes must be None or a pair of integers, got {block_sizes!r}. Write "
            "(queries, keys) of a block."
        )
    rows, columns = pair
    if rows < 1 or columns < 1:
        raise ValueError(
            f"block_sizes must be positive, got {block_sizes}. Write (queries, keys) of a block, "
            "such as (512, 256)."
        )
    return rows, columns


def check_kernel_arguments(
    query: jax.Array,
    segment_ids: jax.Array | None,
    block_sizes: tuple[int, int] | None,
    draw: Draw,
    **others: Any,
) -> None:
    """Raises if the kernels do not support an argument; ``others`` must be missing."""
    check_supported({"query, key and value": query}, draw)
    for name, x in others.items():
        if x is not None:
            raise unsupported(f"{name}. Leave it out")
    if segment_ids is not None and segment_ids.dtype.itemsize > 4:
        raise unsupported(f"segment ids of dtype {segment_ids.dtype}. Convert them to int32")
    if block_sizes is not None and any(size % LANES for size in block_sizes):
        raise unsupported(f"block_sizes of {block_sizes}. Write multiples of {LANES}")


def check_kernel_precision(precision: Any, query: jax.Array) -> jax.lax.Precision:
    """The precision of a kernel's matrix products."""
    if query.dtype != jnp.float32:
        return jax.lax.Precision.DEFAULT  # exact, and Mosaic refuses to do more
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # not annotated
    try:
        chosen = jax.lax.Precision(precision)
    except ValueError:
        chosen = None
    if chosen not in (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST):
        raise unsupported(f"precision={precision!r}. Write 'default' or 'highest'")
    return chosen
