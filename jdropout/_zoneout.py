"""Zoneout: random units of a recurrent network's state skip an update."""

from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax

from jdropout import _checks, _trees
from jdropout._arrays import describe_array
from jdropout._draw import Draw
from jdropout._dtypes import wide_dtype
from jdropout._new_draw import new_draw
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
    """Keeps random units of a recurrent network's state at their old values.

    ``y = m * new + (1 - m) * old`` with ``m ~ Bernoulli(1 - r)`` and
    ``r = effective_rate(rate)``: a dropped unit skips the update. Evaluation returns the
    expectation ``r * old + (1 - r) * new``, computed in float32 (float64 for 64-bit states) and
    rounded once. The backward pass stores only the key.

    A single array has the mask ``keep_mask(key, rate, shape)``. In a tree each array gets its
    own key, ``jdropout.keys.at_site(key, path)``; for an LSTM's pair (c, h) the paths are 0 and
    1.

    Args:
      key: PRNG key, typed or raw; use a new one for every time step, such as
        ``at_site(key, t)``. May be None if no mask is drawn (``deterministic=True``, or static
        rates of 0 or 1).
      old: state before the step; an array of any shape with a floating-point or complex dtype,
        or a tree of them.
      new: state after the step, with the same structure, shapes and dtypes.
      rate: probability of keeping the old value, in [0, 1]; a number, a (traced) floating-point
        scalar, or a tree of them with the state's structure (the paper uses 0.5 for cells and
        0.05 for hidden units). A static 0 returns `new` itself, a static 1 `old` itself.
      deterministic: if True, return the expectation; a bool or a (traced) boolean scalar.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      A state like `new`.

    Raises:
      TypeError: if a state is not floating-point or complex, or another argument has the wrong
        type, such as a boolean rate.
      ValueError: if the states or rates do not match, the rate is not a scalar in [0, 1] (a
        traced one outside gives NaN, and an error under ``checkify``), or the key is missing or
        a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> old, new = jnp.zeros((2, 8)), jnp.ones((2, 8))
      >>> jdropout.zoneout(jax.random.key(0), old, new, 0.5)
      Array([[0., 1., 1., 0., 1., 1., 1., 0.],
             [1., 1., 1., 1., 1., 1., 0., 0.]], dtype=float32)
      >>> jdropout.zoneout(None, old[0], new[0], 0.25, deterministic=True)
      Array([0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75], dtype=float32)

    References:
      Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations"
      (ICLR 2017), section 3.2 and equations 5 to 7.
    """
    flag = _checks.check_deterministic(deterministic)
    old, new = _check_states(old, new)
    structure = jax.tree.structure(new)
    rates = _check_rate_for_each(rate, structure)
    states = [
        _zoned_out(key, a, b, rate, flag, precision, site)
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
    site: tuple[str | int, ...],
) -> jax.Array:
    draw = new_draw("zoneout", key, rate, flag, jnp.shape(new), precision=precision, site=site)
    if draw.static_rate in (0, 1):  # evaluation and training agree
        return cast("jax.Array", draw.result(old if draw.static_rate else new, masked=False))
    return cast("jax.Array", draw.apply(_mixed, new, old, kept=_expectation))


def _mixed(draw: Draw, new: jax.Array, old: jax.Array) -> jax.Array:
    return lax.select(draw.keep_like(new), new, old)


def _expectation(draw: Draw, new: jax.Array, old: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(new):
        parts = (_expectation(draw, part(new), part(old)) for part in (lax.real, lax.imag))
        return lax.complex(*parts)
    wide = wide_dtype(new)
    dropped = draw.drop_probability(wide)
    y = dropped * old.astype(wide) + (1 - dropped) * new.astype(wide)
    # Avoids 0 * inf when a state has zero weight.
    y = jnp.where(dropped == 0, new.astype(wide), y)
    return jnp.where(dropped == 1, old.astype(wide), y).astype(new.dtype)


def _check_states(old: Any, new: Any) -> tuple[Any, Any]:
    """Checks that two states have the same structure, shapes and dtypes; returns them."""
    structures: list[Any] = [jax.tree.structure(state) for state in (old, new)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"old and new must have the same structure, got {structures[0]} and {structures[1]}."
            " Pass the carry before and after one step of the cell."
        )
    old = jax.tree.map(lambda leaf: _checks.check_input(leaf, "old"), old)
    new = jax.tree.map(lambda leaf: _checks.check_input(leaf, "new"), new)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        kinds = describe_array(a), describe_array(b)
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"old and new must have the same shape and dtype, got {kinds[0]} and {kinds[1]}. "
                "Convert one with .astype, or broadcast it."
            )
    return old, new


def _check_rate_for_each(rate: Any, structure: Any) -> list[Any]:
    """Returns one rate per leaf, given a single rate or a tree of them."""
    leaves, given = jax.tree.flatten(rate, is_leaf=lambda leaf: leaf is None)
    if given == structure:
        return leaves
    if not jax.tree_util.treedef_is_leaf(given) or not leaves:
        raise ValueError(
            f"rate must be one rate, or a tree of them with the structure {structure} of the "
            f"state, got {given}."
            " Write (0.5, 0.05) for a carry of two arrays."
        )
    return leaves * structure.num_leaves
