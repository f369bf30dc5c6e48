"""Attention for the layers of Flax, in nnx and in linen."""

import contextvars
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdropout import _arrays, _batch, _values
from jdropout._attention import dot_product_attention
from jdropout._flax import check_module_flag, check_promotes
from jdropout._typing import Rate


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: Any,
    mask: Any,
    *,
    broadcast_dropout: bool,
    dropout_rng: Any,
    dropout_rate: Rate,
    deterministic: Any,
    sow: Callable[[jax.Array], Any] | None,
    **options: Any,
) -> jax.Array:
    """Attention with Flax's conventions: any number of batch axes, which operands broadcast to."""
    broadcast_dropout = _values.check_flag("broadcast_dropout", broadcast_dropout)
    batch = query.shape[:-3]
    several = len(batch) > 1
    full = (*batch, query.shape[-2], query.shape[-3], key.shape[-3])

    def one_batch(x: jax.Array, own_axes: int = 3) -> jax.Array:
        return x.reshape(math.prod(batch), *x.shape[x.ndim - own_axes :]) if several else x

    def operand(name: str, x: Any) -> jax.Array | None:
        if x is None:
            return None
        x = _arrays.as_array(name, x)
        if not (x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.number)):
            raise TypeError(
                f"{name} must be an array of numbers or booleans, got dtype {x.dtype}. "
                f"Pass {name}=None for none."
            )
        x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
        if several:
            x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
        return one_batch(x)

    if several:
        dropout_rng = _batch.with_count(dropout_rng, batch[0])
    call = _layer_call.get()
    if call is not None:
        call.taken = True
        options |= call.options
        if call.query_position is not None:
            lead = (math.prod(batch), full[-3]) if batch else full[-3:-2]
            options["start"] = (*(0 for _ in lead), call.query_position, 0)
            options["global_shape"] = (*lead, key.shape[-3], key.shape[-3])
    for name in ("query_segment_ids", "key_value_segment_ids"):
        ids = options.get(name)
        if ids is not None and several:
            options[name] = one_batch(_arrays.as_array(name, ids), 1)
    mask = operand("mask", mask)
    output, *weights = dot_product_attention(
        one_batch(query),
        one_batch(key),
        one_batch(value),
        operand("bias", bias),
        None if mask is None else mask.astype(bool),
        dropout_key=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=check_module_flag(deterministic),
        dropout_broadcast_dims=range(min(len(batch), 1) + 1) if broadcast_dropout else (),
        return_residual=True,
        return_weights=sow is not None,
        **options,
    )
    if sow is not None:
        sow(weights[-1].reshape(full))
    return output.reshape(*query.shape[:-1], value.shape[-1])


class _LayerCall:
    """What a call of a layer of ours tells the attention in it, past Flax's code between them."""

    def __init__(self, query_position: jax.Array | None, options: dict[str, Any]) -> None:
        self.query_position = query_position
        self.options = options
        self.taken = False


_layer_call: contextvars.ContextVar[_LayerCall | None] = contextvars.ContextVar(
    "layer_call", default=None
)


def attention_call(
    layer: Callable[[], Any], query_position: jax.Array | None = None, **options: Any
) -> Any:
    """Calls a layer of Flax, and adds arguments to its call of `attention`.

    Args:
      layer: the call.
      query_position: position of the one query in a cache, for which Flax has no argument.
      **options: arguments of `jdropout.dot_product_attention`; None for what the caller left out.
    """
    given = {name: value for name, value in options.items() if value is not None}
    call = _LayerCall(query_position, given)
    # A copy, which nothing has to undo: Ctrl-C may come at any moment.
    context = contextvars.copy_context()
    context.run(_layer_call.set, call)
    result = context.run(layer)
    if given and not call.taken:
        raise ValueError(
            f"{' and '.join(given)} can only be used with an attention_fn of this library. Pass "
            "attention_fn=jdropout.nnx.dot_product_attention, or that of jdropout.linen."
        )
    return result


def check_attention(query: Any, key: Any, value: Any, dtype: Any) -> list[jax.Array]:
    """Returns the operands as arrays, for Flax to promote."""
    if dtype is not None:
        _values.check_dtype("dtype", dtype)
    pairs = {"query": query, "key": key, "value": value}.items()
    arrays = [_arrays.as_array(name, x) for name, x in pairs]
    for (name, _), x in zip(pairs, arrays, strict=True):
        if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.number):
            raise ValueError(
                f"{name} must be an array of numbers with the axes (..., length, heads, features), "
                f"got shape {x.shape} and dtype {x.dtype}. Insert axes of size 1."
            )
        if dtype is None:
            check_promotes(name, x, arrays[0].dtype)
    return arrays
