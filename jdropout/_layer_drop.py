"""LayerDrop: skips whole residual layers."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jdropout import _arrays, _values
from jdropout._arrays import describe_array
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
    """Skips a whole residual layer at random, and saves its computation.

    ``y = layer(x)`` with probability ``1 - r``, otherwise ``y = x``, where
    ``r = effective_rate(rate)``; evaluation returns ``layer(x)``. This is LayerDrop. Its
    expectation, ``(1 - r) * layer(x) + r * x``, differs from what evaluation computes. With
    ``unbiased=True`` a kept layer returns ``x + (layer(x) - x) / (1 - r)``, whose expectation
    is ``layer(x)``.

    All of `x` shares one decision, made by the mask ``keep_mask(key, rate, ())`` and
    `jax.lax.cond`. In a compiled function a skipped layer does not run, neither forward nor
    backward; this also holds in a `jax.lax.scan` over layers with a key and a traced rate for
    each::

        def body(x, inputs):
            i, weights, rate = inputs
            return layer_drop(at_site(key, i), lambda x: layer(weights, x), x, rate), None

    Under `jax.vmap` over keys, some examples skip the layer and others do not, so both sides
    are computed and one is selected; under `jax.vmap` over `x` alone, layers are still skipped.
    To drop examples independently, use `drop_path`. The backward pass stores the decision and
    the residuals of the layer itself.

    Args:
      key: PRNG key, typed or raw; use a new one for every layer and step. May be None if no
        mask is drawn (``deterministic=True``, or a static rate of 0 or 1).
      layer: function such as ``lambda x: x + f(x)``, without side effects, whose result has the
        structure, shapes and dtypes of its input. It is traced once.
      x: array of any dtype, or a tree of them; integers are passed through the layer but never
        scaled.
      rate: probability of skipping the layer, in [0, 1]; a number or a (traced) floating-point
        scalar. A static 0 returns ``layer(x)``, a static 1 `x` itself without calling the
        layer.
      deterministic: if True, always run the layer; a bool or a (traced) boolean scalar.
      unbiased: if True, scale the update of a kept layer by ``1 / (1 - r)``. At rate 1 there is
        nothing to scale.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      The result of the layer, or `x`.

    Raises:
      TypeError: if `layer` is not a function, or another argument has the wrong type, such as a
        boolean rate.
      ValueError: if the layer's result does not match its input, the rate is not a scalar in
        [0, 1] (a traced one outside gives NaN, and an error under ``checkify``), or the key is
        missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> for seed in range(3):
      ...     key = jax.random.key(seed)
      ...     print(jdropout.layer_drop(key, lambda x: x + 1, jnp.zeros(3), 0.5, unbiased=True))
      [0. 0. 0.]
      [2. 2. 2.]
      [2. 2. 2.]

    References:
      Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout"
      (ICLR 2020), section 3.
    """
    _values.check_function("layer", layer)
    result = skip(
        key,
        layer,
        (),
        x,
        rate,
        deterministic=deterministic,
        unbiased=unbiased,
        precision=precision,
        cond=lax.cond,
    )
    return cast("_Tree", result)


def skip(
    key: Key | None,
    layer: Callable[..., Any],
    context: tuple[Any, ...],
    x: Any,
    rate: Rate,
    *,
    deterministic: Flag,
    unbiased: bool,
    precision: int | None = None,
    cond: Callable[..., Any],
) -> Any:
    """`layer_drop` of ``layer(*context, x)``, for layers that have a state.

    Args:
      key: PRNG key.
      layer: function of the context and x.
      context: what the layer needs besides x, such as a module.
      x: input of the layer.
      rate: probability of skipping the layer.
      deterministic: if True, always run the layer.
      unbiased: if True, scale the update of a kept layer.
      precision: bits of the rate.
      cond: function such as `jax.lax.cond`, whose operands are the context and x.
    """
    unbiased = _values.check_flag("unbiased", unbiased)
    x = jax.tree.map(functools.partial(_arrays.readable, "x"), x)
    draw = new_draw(
        "layer_drop",
        key,
        rate,
        deterministic,
        (),
        precision=precision,
        batch_axis=None,
        saves_work=True,
    )
    if draw.outcome is Outcome.KEPT:
        y = layer(*context, x)
        check_layer_result(x, y)
        return draw.result(y)
    if draw.outcome is Outcome.DROPPED:
        return draw.result(x)
    kept, factor = draw.apply(_decision, kept=_certain)

    def run(*operands: Any) -> Any:
        y = layer(*operands)
        check_layer_result(operands[-1], y)
        certain = draw.rate is None and not unbiased
        scale = functools.partial(scaled_update, factor=factor, unbiased=unbiased)
        return y if certain else jax.tree.map(scale, operands[-1], y)

    if not isinstance(kept, jax.core.Tracer):  # an eager call, which would compile both branches
        if kept:
            return run(*context, x)
        if not context:  # without a state, which a trace could change
            check_layer_result(x, jax.eval_shape(layer, x))
        return x
    arrays = jax.tree.map(functools.partial(_arrays.as_array, "x"), x)
    return cond(kept, run, lambda *operands: operands[-1], *context, arrays)


def _decision(draw: Draw) -> tuple[jax.Array, jax.Array]:
    """Whether to keep the layer, and the factor of its update."""
    return draw.keep(), draw.scale(jnp.result_type(float))


def _certain(draw: Draw) -> tuple[jax.Array, jax.Array]:
    return jnp.array(True), jnp.ones((), jnp.result_type(float))


def scaled_update(x: jax.Array, y: jax.Array, factor: jax.Array, unbiased: bool) -> jax.Array:
    """``x + (y - x) * factor``, or y if biased; NaN if an invalid rate made the factor NaN."""
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return y
    if not unbiased:
        return jnp.where(jnp.isnan(factor), jnp.full_like(y, jnp.nan), y)
    wide = sum_dtype(y)
    x, z = x.astype(wide), y.astype(wide)
    scaled = (x + (z - x) * factor.astype(wide)).astype(y.dtype)
    return jnp.where(factor == 1, y, scaled)  # exact if nothing is ever dropped


def check_layer_result(x: Any, y: Any) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (x, y)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"layer must return a tree with the structure of its input, {structures[0]}, got "
            f"{structures[1]}. If it is skipped, its input is the result."
        )
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        want, got = describe_array(a), describe_array(b)
        if want != got:
            raise ValueError(
                f"layer must return the shape and dtype of its input, {want}, got {got}. If it "
                "is skipped, its input is the result: include the residual connection, and convert "
                "with .astype."
            )
