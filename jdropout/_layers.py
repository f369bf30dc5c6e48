"""Dropout of what layers do: of a recurrent network's update, and of whole residual layers."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks, _mask, _sites, _threshold, _trees
from jdropout._dropout import effective_rate
from jdropout._typing import Flag, Key, Rate

_Tree = TypeVar("_Tree")


def zoneout(
    key: Key | None,
    old: _Tree,
    new: _Tree,
    rate: Rate | Any,
    *,
    deterministic: Flag = False,
    precision: int | None = None,
) -> _Tree:
    """Keeps units of a recurrent network's state as they were, at random.

    ``y = m * new + (1 - m) * old`` with ``m ~ Bernoulli(1 - r)`` and ``r = effective_rate(rate)``:
    a unit that is dropped misses the update. Evaluation takes the expectation
    ``r * old + (1 - r) * new``, computed in float32 (float64 for 64-bit states) and rounded once.
    The backward pass stores the key alone.

    The mask of a single array is that of ``keep_mask(key, rate, shape)``. In a tree every array has
    the key ``jdropout.keys.at_site(key, path)``; for an LSTM's pair (c, h) the paths are 0 and 1.

    Args:
      key: a PRNG key, as for `dropout`; a new one for every time step, such as
        ``at_site(key, t)``. May be None in evaluation as well.
      old: the state before the step: an array of any shape, of a floating-point or complex dtype,
        or a tree of them.
      new: the state after the step, of the same structure, shapes and dtypes.
      rate: probability of keeping the old value, as for `dropout`; or a tree of rates of the
        state's structure, as the paper has 0.5 for cells and 0.05 for hidden units. A static 0
        gives `new` itself, and 1 `old` itself.
      deterministic: whether to take the expectation; may be traced.
      precision: bits of the rate, as for `dropout`.

    Returns:
      A state like `new`.

    Raises:
      TypeError: as for `dropout`.
      ValueError: if the states or rates do not fit, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> old, new = jnp.zeros((2, 8)), jnp.ones((2, 8))
      >>> jdropout.zoneout(jax.random.key(0), old, new, 0.5)
      Array([[0., 1., 1., 0., 1., 1., 1., 0.],
             [1., 1., 1., 1., 1., 1., 0., 0.]], dtype=float32)
      >>> jdropout.zoneout(None, old[0], new[0], 0.25, deterministic=True)
      Array([0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75], dtype=float32)

    References:
      Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations" (ICLR
      2017), section 3.2 and equations 5 to 7.
    """
    flag = _checks.check_deterministic(deterministic)
    _checks.check_states(old, new)
    structure = jax.tree.structure(new)
    rates = _checks.check_rate_for_each(rate, structure)
    states = [
        _zoned_out(_trees.leaf_key(key, site, rate, flag, precision), a, b, rate, flag, precision)
        for (site, a), b, rate in zip(
            _trees.leaves_with_sites(old), jax.tree.leaves(new), rates, strict=True
        )
    ]
    return cast("_Tree", jax.tree.unflatten(structure, states))


def _zoned_out(
    key: Key | None,
    old: jax.Array,
    new: jax.Array,
    rate: Rate,
    flag: bool | jax.Array,
    precision: int | None,
) -> jax.Array:
    shape = jnp.shape(new)
    mask, operands = _mask.describe(key, rate, flag, shape, (), None, None, precision)
    fixed = None if isinstance(rate, jax.Array) else effective_rate(rate, precision=precision)
    if fixed in (0, 1):
        site = _sites.site("zoneout", shape, rate, flag, mask, None)
        return site.result(new if fixed == 0 else old)  # the very object
    site = _sites.site("zoneout", shape, rate, flag, mask, operands)
    if mask is None or operands is None:
        dropped = rate if fixed is None else fixed
        return site.result(_expected(old, new, dropped, fixed is None, precision))
    return site.result(_mixed(site.operands(operands), old, new, mask))


@functools.partial(jax.jit, static_argnames="mask")
def _mixed(operands: _mask.Operands, old: jax.Array, new: jax.Array, mask: _mask.Mask) -> jax.Array:
    """The mask is made again in the backward pass, as in `jdropout.dropout`."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def mixed(operands: _mask.Operands, old: jax.Array, new: jax.Array) -> jax.Array:
        y = lax.select(_mask.keep_like(new, operands, mask), new, old)
        if operands.rate is None and operands.deterministic is None:
            return y
        dropped = _mask.drop_probability(operands, mask, _wide(new))
        if operands.deterministic is not None:
            flag = jnp.broadcast_to(operands.deterministic, y.shape)
            y = lax.select(flag, _expectation(old, new, dropped), y)
        return jnp.where(jnp.isnan(dropped), jnp.full_like(y, jnp.nan), y)

    return mixed(_mask.with_words(operands), old, new)


@functools.partial(jax.jit, static_argnames=("traced", "precision"))
def _expected(
    old: jax.Array, new: jax.Array, dropped: Any, traced: bool, precision: int | None
) -> jax.Array:
    """``dropped`` is an effective rate, or a traced one that is not yet rounded to its bits."""
    if traced:
        rate = dropped
        dropped = _threshold.traced_drop_probability(_threshold.traced_threshold(rate, precision))
        dropped = jnp.where((rate >= 0) & (rate <= 1), dropped, jnp.nan)
    return _expectation(old, new, jnp.asarray(dropped, _wide(new)))


def _expectation(old: jax.Array, new: jax.Array, dropped: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(new):
        real, imag = (_expectation(part(old), part(new), dropped) for part in (lax.real, lax.imag))
        return lax.complex(real, imag)
    y = dropped * old.astype(dropped.dtype) + (1 - dropped) * new.astype(dropped.dtype)
    # At both ends what has no weight may be infinite.
    y = jnp.where(dropped == 0, new.astype(y.dtype), y)
    return jnp.where(dropped == 1, old.astype(y.dtype), y).astype(new.dtype)


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
    flag = _checks.check_deterministic(deterministic)
    mask, operands = _mask.describe(key, rate, flag, (), (), None, None, precision)
    site = _sites.site("layer_drop", (), rate, flag, mask, operands)
    if mask is None:
        y = layer(x)
        _checks.check_layer_result(x, y)
        return _marked(site, y)
    if operands is None:
        return _marked(site, x)
    kept, factor = _decision(site.operands(operands), mask)

    def run(x: _Tree) -> _Tree:
        y = layer(x)
        _checks.check_layer_result(x, y)
        certain = mask.threshold is not None and not unbiased
        scale = functools.partial(_scaled_update, factor=factor, unbiased=unbiased)
        return y if certain else cast("_Tree", jax.tree.map(scale, x, y))

    arrays = jax.tree.map(functools.partial(_checks.check_any_array, "x"), x)
    return cast("_Tree", lax.cond(site.result(kept), run, lambda x: x, arrays))


@functools.partial(jax.jit, static_argnames="mask")
def _decision(operands: _mask.Operands, mask: _mask.Mask) -> tuple[jax.Array, jax.Array]:
    """Whether to keep, and the factor of what is kept."""
    operands = _mask.with_words(operands)
    return _mask.keep(operands, mask), _mask.scale(operands, mask, jnp.result_type(float))


def _scaled_update(x: jax.Array, y: jax.Array, factor: jax.Array, unbiased: bool) -> jax.Array:
    """``x + (y - x) * factor``, or y; NaN if the factor is, which a rate outside [0, 1] has."""
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        return y
    if not unbiased:
        return jnp.where(jnp.isnan(factor), jnp.full_like(y, jnp.nan), y)
    wide = y.dtype if jnp.finfo(y.dtype).bits >= 32 else jnp.dtype(jnp.float32)
    x, z = x.astype(wide), y.astype(wide)
    scaled = (x + (z - x) * factor.astype(wide)).astype(y.dtype)
    return jnp.where(factor == 1, y, scaled)  # exact where nothing is ever dropped


def _marked(site: _sites.Site, y: _Tree) -> _Tree:
    """Marks the first array: one mark stands for the call."""
    leaves, structure = jax.tree.flatten(y)
    if not leaves:
        return y
    first = site.result(leaves[0])
    return y if first is leaves[0] else jax.tree.unflatten(structure, [first, *leaves[1:]])


def _wide(x: jax.Array) -> np.dtype:
    return jnp.dtype(jnp.float64 if jnp.finfo(x.dtype).bits == 64 else jnp.float32)
