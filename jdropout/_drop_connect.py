"""DropConnect: masks on parameters, one array at a time or in a tree."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np

from jdropout import _checks, _trees, _values
from jdropout._dropout import masked
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate

_Tree = TypeVar("_Tree")


def drop_connect(
    key: Key | None,
    w: ArrayLike,
    rate: Rate,
    *,
    deterministic: Flag = False,
    scaled: bool = True,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Zeroes weights at random: drops connections, where `dropout` drops units.

    ``w * m / (1 - r)`` with ``m ~ Bernoulli(1 - r)`` and ``r = effective_rate(rate)``, so that
    a linear layer has the same mean output as with `w` itself, which evaluation uses unchanged.
    One mask serves all examples of a batch; for one per example use ``jax.vmap`` over keys, at
    the cost of one weight array per example.

    Published variants differ, and some wrongly treat training and evaluation alike. The paper
    does not scale in training; in evaluation it draws each unit's input from a normal
    distribution with mean ``(1 - r) * w @ x`` and the variance that the masks cause. AWD-LSTM
    scales as above. ``scaled=False`` returns ``w * m``, and you then have to evaluate with
    ``(1 - r) * w``.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      w: array of any shape, with a floating-point or complex dtype.
      rate: probability of dropping a weight, in [0, 1]; a number or a (traced) floating-point
        scalar.
      deterministic: if True, return `w` unchanged; a bool or a (traced) boolean scalar.
      scaled: if True, scale kept weights by ``1 / (1 - r)``.
      broadcast_dims: axes along which the mask is shared.
      start: index of w's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array of w's shape and dtype; `w` itself if `deterministic` is True or a static rate
      rounds to 0.

    Raises:
      TypeError: if `w` is not a floating-point or complex array, or another argument has the
        wrong type, such as a boolean rate.
      ValueError: if the rate is not a scalar in [0, 1] (a traced one outside gives NaN, and an
        error under ``checkify``), the key is missing or a batch of keys, an axis does not
        exist, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.drop_connect(jax.random.key(0), jnp.ones((2, 8)), 0.5)
      Array([[0., 2., 2., 0., 2., 2., 2., 0.],
             [2., 2., 2., 2., 2., 2., 0., 0.]], dtype=float32)

    References:
      Wan, Zeiler, Zhang, LeCun and Fergus, "Regularization of neural networks using
      DropConnect" (ICML 2013), section 3.
    """
    w = _checks.check_input(w, "w")
    return masked(
        "drop_connect",
        key,
        w,
        rate,
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
        scaled=_values.check_flag("scaled", scaled),
        batch_axis=None,
    )


def drop_connect_tree(
    key: Key | None,
    params: _Tree,
    rate: Rate,
    *,
    select: Callable[[str], bool] | Sequence[str],
    deterministic: Flag = False,
    scaled: bool = True,
    precision: int | None = None,
) -> _Tree:
    """Applies `drop_connect` to selected arrays in a tree of parameters, as WeightDrop does.

    A recurrent network that runs with the returned parameters has the same mask at every time
    step. Each array gets its own key, ``jdropout.keys.at_site(key, path)``, where the path
    ``'lstm/hh/kernel'`` stands for the site ``('lstm', 'hh', 'kernel')``, so its mask depends
    on nothing else in the tree. Dictionaries, linen's parameters and `nnx.State` have the same
    paths, and therefore the same masks.

    Args:
      key: PRNG key, typed or raw; use a new one for every sequence or step. May be None if no
        mask is drawn (``deterministic=True``, or a static rate of 0 or 1).
      params: tree of arrays: dictionaries, sequences, linen's parameters, an `nnx.State`.
      rate: probability of dropping a weight, in [0, 1]; a number or a (traced) floating-point
        scalar.
      select: which arrays to mask: a function of the path, or the trailing names of paths, such
        as ``['recurrent_kernel', 'lstm/hh/kernel']``, each of which must match something.
      deterministic: if True, return `params` unchanged; a bool or a (traced) boolean scalar.
      scaled: if True, scale kept weights by ``1 / (1 - effective_rate(rate))``.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      A tree like `params`; arrays that are not selected are the same objects.

    Raises:
      TypeError: if a selected leaf is not a floating-point or complex array, or another
        argument has the wrong type.
      ValueError: if nothing is selected, the rate is not a scalar in [0, 1] (a traced one
        outside gives NaN, and an error under ``checkify``), or the key is missing or a batch of
        keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> params = {"kernel": jnp.ones((2, 6)), "recurrent_kernel": jnp.ones((2, 6))}
      >>> jdropout.drop_connect_tree(
      ...     jax.random.key(0), {"lstm": params}, 0.5, select=["recurrent_kernel"]
      ... )["lstm"]["recurrent_kernel"]
      Array([[2., 2., 0., 0., 2., 0.],
             [2., 0., 0., 0., 0., 2.]], dtype=float32)

    References:
      Merity, Keskar and Socher, "Regularizing and optimizing LSTM language models" (ICLR 2018),
      section 2, "Weight-dropped LSTM".
    """
    wanted = check_select(select)
    scaled = _values.check_flag("scaled", scaled)
    flag = _checks.check_deterministic(deterministic)
    leaves = _trees.leaves_with_sites(params)
    paths = ["/".join(map(str, site)) for site, _ in leaves]
    _check_paths(paths)
    found = [matching_names(wanted, path) for path in paths]
    check_selected(wanted, set().union(*found), paths)
    dropped = []
    for path, names, (site, leaf) in zip(paths, found, leaves, strict=True):
        if not names:
            dropped.append(leaf)
            continue
        leaf = _checks.check_input(leaf, f"params {path!r}")
        dropped.append(
            masked(
                "drop_connect",
                key,
                leaf,
                rate,
                deterministic=flag,
                precision=precision,
                site=site,
                scaled=scaled,
                batch_axis=None,
            )
        )
    if all(new is old for new, (_, old) in zip(dropped, leaves, strict=True)):
        return params
    return cast("_Tree", jax.tree.unflatten(jax.tree.structure(params), dropped))


def matching_names(select: Any, path: str) -> set[str]:
    """The names that the path ends with; for a predicate, {""} if it selects the path."""
    if callable(select):
        chosen = select(path)
        if isinstance(chosen, np.ndarray | jax.Array):
            raise TypeError(
                f"select must return True or False, got an array of shape {chosen.shape} for "
                f"{path!r}. Look at the path alone, not at a parameter."
            )
        return {""} if chosen else set()
    return {name for name in select if f"/{path}".endswith(f"/{name}")}


def check_select(select: Any) -> Any:
    """Returns a predicate on paths, or a tuple of names."""
    if callable(select):
        return select
    if not isinstance(select, Sequence | set | frozenset) or isinstance(select, str | bytes):
        raise TypeError(
            f"select must be a function of a path or a sequence of names, got {select!r}. Write "
            "('recurrent_kernel',) for one name."
        )
    for name in select:
        if not isinstance(name, str) or not name:
            raise TypeError(
                f"select must hold names such as 'lstm/recurrent_kernel', got {name!r}."
                " Write the last names of the path as a string."
            )
    return tuple(select)


def _check_paths(paths: Sequence[str]) -> None:
    if "" in paths:
        raise ValueError(
            "params must be a tree of named parameters, such as a dictionary, got one leaf. Use "
            "jdropout.drop_connect for it."
        )


def check_selected(select: Any, found: set[str], paths: Sequence[str]) -> None:
    """Checks that every name, or the predicate, selects something; ``found`` are those that do."""
    unmatched = [name for name in select if name not in found] if not callable(select) else []
    if unmatched or not found:
        what = ", ".join(map(repr, unmatched)) or f"{select!r}"
        raise ValueError(
            f"select must select parameters, but {what} selects none of {_listed(paths)}. "
            "Use the names that these paths end with."
        )


def _listed(paths: Sequence[str]) -> str:
    shown = ", ".join(map(repr, paths[:12]))
    return f"{shown} and {len(paths) - 12} more" if len(paths) > 12 else shown or "no parameters"
