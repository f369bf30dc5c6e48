"""LayerDrop of an exact number of scanned layers."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jdropout import _arrays, _values
from jdropout._layer_drop import check_layer_result, scaled_update
from jdropout._subset import _rows
from jdropout._subset._indices import Subset
from jdropout._typing import Key

_Tree = TypeVar("_Tree")


def layer_subset(
    key: Key | None,
    layer: Callable[[Any, _Tree], _Tree],
    stacked_params: Any,
    x: _Tree,
    rate: float,
    *,
    groups: int = 1,
    unbiased: bool = False,
    deterministic: bool = False,
) -> _Tree:
    """Runs a random subset of stacked residual layers, in order: k of L.

    Like ``lax.scan(lambda x, params: (layer(params, x), None), x, stacked_params)`` over k of the
    L layers: ``L * (1 - rate)`` to the nearest integer, at least 1. Time and activations take
    k / L, in both passes. This is LayerDrop with an exact number of layers, the same for all
    examples; every layer is kept with probability ``k / L``. As in `layer_drop`, nothing is scaled
    unless `unbiased`: then a kept layer returns ``x + (layer(params, x) - x) * L / k``, so the
    expectation of every update is what evaluation adds.

    The parameters of the kept layers are copied, which takes k / L of their memory; the gradients
    of the other layers are zero.

    Args:
      key: PRNG key, typed or raw; use a new one for every step. May be None if all layers run.
      layer: function of one layer's parameters and `x`, such as
        ``lambda p, x: x + mlp(p, x)``, whose result has the structure, shapes and dtypes of `x`.
      stacked_params: array, or a tree of arrays, with the layers along axis 0. Everything that a
        layer has of its own belongs here: weights, and also keys or rates.
      x: array of any dtype, or a tree of them.
      rate: fraction of layers to skip, a number in [0, 1]. Shapes depend on it, so it must not be
        traced.
      groups: number of groups of neighbouring layers, a divisor of L, of which each keeps the same
        number; for example the stages of a pipeline.
      unbiased: if True, multiply the update of a kept layer by ``L / k``.
      deterministic: if True, run all layers. It must not be traced.

    Returns:
      The result of the last layer that runs, with x's structure, shapes and dtypes.

    Raises:
      TypeError: if the layer is not a function, the rate or flag is traced, or another argument
        has the wrong type.
      ValueError: if the stacked arrays differ in their number of layers, the result of a layer
        does not match its input, `groups` does not divide L, the rate is outside [0, 1], or the
        key is missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> powers = jnp.array([1.0, 10.0, 100.0, 1000.0])
      >>> def layer(power, x):
      ...     return x + power
      >>> jdropout.layer_subset(jax.random.key(0), layer, powers, jnp.zeros(()), 0.5)
      Array(1010., dtype=float32)

    References:
      Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout"
      (ICLR 2020), section 3.
    """
    _values.check_function("layer", layer)
    y, _ = scan_subset(
        key,
        lambda params, state, x: (layer(params, x), state),
        stacked_params,
        None,
        x,
        rate,
        groups=groups,
        unbiased=unbiased,
        deterministic=deterministic,
    )
    return cast("_Tree", y)


def scan_subset(
    key: Key | None,
    layer: Callable[[Any, Any, Any], tuple[Any, Any]],
    params: Any,
    state: Any,
    x: Any,
    rate: float,
    *,
    groups: int,
    unbiased: bool,
    deterministic: bool,
    name: str = "stacked_params",
) -> tuple[Any, Any]:
    """`layer_subset` of layers that have a state: maps (params, state, x) to (x, state).

    Both trees are stacked. A skipped layer's state stays as it is.
    """
    unbiased = _values.check_flag("unbiased", unbiased)
    params, state = _arrays.as_arrays(name, (params, state))
    x = _arrays.as_arrays("x", x)
    _, _, size = _arrays.check_common_axis(name, (params, state), "axis", 0)
    subset = Subset(
        "layer_subset",
        key,
        rate,
        (size,),
        groups=groups,
        deterministic=deterministic,
        batch_axis=None,
    )
    kept = (params, state)
    if not subset.whole:
        order = subset.order()
        kept = jax.tree.map(lambda leaf: _rows.take(leaf, order, subset.count, 0), kept)
    factor = jnp.asarray(subset.factor, jnp.result_type(float))

    def body(x: Any, one: tuple[Any, Any]) -> tuple[Any, Any]:
        y, new = layer(*one, x)
        check_layer_result(x, y)
        if unbiased:
            y = jax.tree.map(functools.partial(scaled_update, factor=factor, unbiased=True), x, y)
        return y, new

    y, new = lax.scan(body, x, kept)
    if not subset.whole:
        new = jax.tree.map(lambda old, rows: _rows.put(old, order, rows, 0), state, new)
    return subset.draw.result(y), new
