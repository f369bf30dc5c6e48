"""Functions of positions, checked, and evaluated for a block."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from jdropout import _arrays
from jdropout.by_position import PositionFunction

# --- evaluated ----------------------------------------------------------------------------


def at_positions(
    function: PositionFunction, queries: jax.Array, keys: jax.Array, heads: jax.Array
) -> jax.Array:
    """Evaluates a function at all combinations of positions.

    Args:
      function: a bias or a mask.
      queries: int32 array of shape (b, R), with b = 1 or the batch size B.
      keys: int32 array of shape (C,).
      heads: int32 array of shape (N,).

    Returns:
      An array of shape (b, N, R, C); (B, N, R, C) if the arrays belong to the examples.
    """

    def over_keys(query: jax.Array, head: jax.Array, arrays: Any) -> jax.Array:
        return jax.vmap(lambda key: function.function(query, key, head, *arrays))(keys)

    def over_all(queries: jax.Array, arrays: Any) -> jax.Array:
        over_queries = jax.vmap(over_keys, (0, None, None))
        return jax.vmap(over_queries, (None, 0, None))(queries, heads, arrays)

    return _for_examples(function, over_all, queries)


def keys_of(
    function: PositionFunction, first: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Evaluates the range of keys of blocks of queries, of shape (b, I), with b as above."""
    assert function.key_range is not None
    key_range = function.key_range

    def ranges(queries: Any, arrays: Any) -> Any:
        return jax.vmap(lambda first, last: key_range(first, last, *arrays))(*queries)

    return _for_examples(function, ranges, (first, last))


def _for_examples(function: PositionFunction, evaluate: Callable[..., Any], queries: Any) -> Any:
    """Calls ``evaluate`` with the queries and the arrays of each example; adds a batch axis."""
    one = jax.tree.leaves(queries)[0].shape[0] == 1
    if one:
        queries = jax.tree.map(lambda x: x[0], queries)
    axes = (None if one else 0, 0 if function.per_example else None)
    if axes == (None, None):
        result = evaluate(queries, function.arrays)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], result)
    return jax.vmap(evaluate, axes)(queries, function.arrays)


def for_each_example(function: PositionFunction, batch_size: int) -> PositionFunction:
    """Gives every example its own copy of the arrays."""
    if function.per_example or not function.arrays:
        return function
    arrays = (jnp.broadcast_to(x, (batch_size, *jnp.shape(x))) for x in function.arrays)
    return PositionFunction(
        function.function, *arrays, key_range=function.key_range, per_example=True
    )


# --- checked ------------------------------------------------------------------------------


def as_position_functions(
    name: str, functions: Any, is_mask: bool, batch_size: int
) -> tuple[PositionFunction, ...]:
    """Checks a function of positions, or several, and lifts what they close over."""
    if functions is None:
        return ()
    several = functions if isinstance(functions, list | tuple) else (functions,)
    return tuple(_as_position_function(name, each, is_mask, batch_size) for each in several)


def _as_position_function(
    name: str, function: Any, is_mask: bool, batch_size: int
) -> PositionFunction:
    if callable(function):
        function = _lift(function)
    elif not isinstance(function, PositionFunction):
        raise TypeError(
            f"{name} must be a function of (query_position, key_position, head), got "
            f"{function!r}. Pass an array of logits as bias, and one of booleans as mask."
        )
    arrays = [_arrays.as_array(f"an array of {name}", x) for x in function.arrays]
    if function.per_example:
        for x in arrays:
            if x.ndim == 0 or x.shape[0] != batch_size:
                raise ValueError(
                    f"an array of {name} with per_example=True must have the batch size "
                    f"{batch_size} as its first axis, got shape {x.shape}. Repeat it for every "
                    "example with jnp.broadcast_to."
                )
    function = jax.tree.unflatten(jax.tree.structure(function), arrays)
    own = [
        jax.ShapeDtypeStruct(x.shape[1:] if function.per_example else x.shape, x.dtype)
        for x in arrays
    ]
    position = jax.ShapeDtypeStruct((), jnp.int32)
    result = jax.eval_shape(function.function, position, position, position, *own)
    if not isinstance(result, jax.ShapeDtypeStruct) or result.shape != ():
        raise ValueError(
            f"{name} must return a scalar for three scalar positions, got {result}. It is "
            "vectorised for you."
        )
    if not jnp.issubdtype(result.dtype, jnp.bool_ if is_mask else jnp.floating):
        expected = "a boolean, True where a query may attend" if is_mask else "a float"
        raise TypeError(
            f"{name} must return {expected}, got dtype {result.dtype}. Convert it with .astype."
        )
    return function


def _lift(function: Callable[..., Any]) -> PositionFunction:
    """Makes traced arrays that a function closes over its arguments, to differentiate them."""
    position = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(function)(position, position, position)
    if not any(isinstance(constant, jax.core.Tracer) for constant in closed.consts):
        return PositionFunction(function)
    return PositionFunction(functools.partial(_evaluate, closed.jaxpr), *closed.consts)


def _evaluate(jaxpr: Any, query: Any, key: Any, head: Any, *constants: Any) -> Any:
    closed = jax.extend.core.ClosedJaxpr(jaxpr, constants)
    (result,) = jax.extend.core.jaxpr_as_fun(closed)(query, key, head)
    return result
