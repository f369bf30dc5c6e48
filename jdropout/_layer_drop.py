"""LayerDrop: whole residual layers that are skipped."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jdropout import _checks
from jdropout._checks import describe_array
from jdropout._draw import Draw, Outcome
from jdropout._dtypes import sum_dtype
from jdropout._new_draw import new_draw
from jdropout._typing import Flag, Key, Rate

_Tree = TypeVar("_Tree")


def layer_drop(
    key: Key | None,
    layer: Callable[[_Tree], _Tree],
    x: _Tree,
    rate: Rate,
    *,
    deterministic: Flag = False,
    unbiased: bool = False,
    precision: int | None = None,
) -> _Tree:
    """Skips a whole residual layer at random, and with it the time that it takes.

    ``y = layer(x)`` with probability ``1 - r`` and else ``y = x``, where ``r =
    effective_rate(rate)``; evaluation is ``layer(x)``. This is LayerDrop, whose expectation
    ``(1 - r) * layer(x) + r * x`` is not what evaluation computes. With ``unbiased=True`` a kept
    layer gives ``x + (layer(x) - x) / (1 - r)``, whose expectation is ``layer(x)``.

    One decision for all of `x`, by the mask of ``keep_mask(key, rate, ())`` and `jax.lax.cond`: in
    a compiled function a skipped layer is not run, neither forward nor backward, also in a
    `jax.lax.scan` over layers with a key and a traced rate each::

        def body(x, inputs):
            i, weights, rate = inputs
            return layer_drop(at_site(key, i), lambda x: layer(weights, x), x, rate), None

    Under `jax.vmap` over keys, where some layers are skipped and others not, both sides are
    computed and one is selected; over x alone layers are still skipped. To drop examples
    independently use `drop_path`. The backward pass stores the decision, and what the layer's own
    needs.

    Args:
      key: a PRNG key, as for `dropout`; a new one for every layer and step.
      layer: a function such as ``lambda x: x + f(x)``, without side effects, whose result has the
        structure, shapes and dtypes of its input. It is traced once.
      x: an array of any dtype, or a tree of them; integers take part, but are never scaled.
      rate: probability of skipping the layer, as for `dropout`. A static 0 is ``layer(x)``, and 1
        is `x` itself without a call of the layer.
      deterministic: whether to run the layer in any case; may be traced.
      unbiased: whether to scale what a kept layer adds. At rate 1 there is nothing to scale.
      precision: bits of the rate, as for `dropout`.

    Returns:
      What the layer returns, or `x`.

    Raises:
      TypeError: if the layer is no function, or as for `dropout`.
      ValueError: if the layer's result does not fit its input, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> for seed in range(3):
      ...     key = jax.random.key(seed)
      ...     print(jdropout.layer_drop(key, lambda x: x + 1, jnp.zeros(3), 0.5, unbiased=True))
      [0. 0. 0.]
      [2. 2. 2.]
      [2. 2. 2.]

    References:
      Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout" (ICLR
      2020), section 3.
    """
    _checks.check_function("layer", layer)
    draw = new_draw("layer_drop", key, rate, deterministic, (), precision=precision)
    if draw.outcome is Outcome.KEPT:
        y = layer(x)
        _check_layer_result(x, y)
        return cast("_Tree", draw.result(y))
    if draw.outcome is Outcome.DROPPED:
        return cast("_Tree", draw.result(x))
    kept, factor = draw.apply(_decision, kept=_certain)

    def run(x: _Tree) -> _Tree:
        y = layer(x)
        _check_layer_result(x, y)
        certain = draw.rate is None and not unbiased
        scale = functools.partial(_scaled_update, factor=factor, unbiased=unbiased)
        return y if certain else cast("_Tree", jax.tree.map(scale, x, y))

    arrays = jax.tree.map(functools.partial(_checks.as_array, "x"), x)
    return cast("_Tree", lax.cond(kept, run, lambda x: x, arrays))


def _decision(draw: Draw) -> tuple[jax.Array, jax.Array]:
    """Whether to keep, and the factor of what is kept."""
    return draw.keep(), draw.scale(jnp.result_type(float))


def _certain(draw: Draw) -> tuple[jax.Array, jax.Array]:
    return jnp.array(True), jnp.ones((), jnp.result_type(float))


def _scaled_update(x: jax.Array, y: jax.Array, factor: jax.Array, unbiased: bool) -> jax.Array:
    """``x + (y - x) * factor``, or y; NaN if the factor is, which a rate outside [0, 1] has."""
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return y
    if not unbiased:
        return jnp.where(jnp.isnan(factor), jnp.full_like(y, jnp.nan), y)
    wide = sum_dtype(y)
    x, z = x.astype(wide), y.astype(wide)
    scaled = (x + (z - x) * factor.astype(wide)).astype(y.dtype)
    return jnp.where(factor == 1, y, scaled)  # exact where nothing is ever dropped


def _check_layer_result(x: Any, y: Any) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (x, y)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"layer must return what has the structure of its input, {structures[0]}, got "
            f"{structures[1]}. Where it is skipped its input is the result."
        )
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        want, got = describe_array(a), describe_array(b)
        if want != got:
            raise ValueError(
                f"layer must return the shape and dtype of its input, {want}, got {got}. Where it "
                "is skipped its input is the result: include the residual connection, and convert "
                "with .astype."
            )
