"""DropConnect: masks on parameters, one array at a time or in a tree."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax

from jdropout import _checks, _trees
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
    """Zeroes weights at random: connections, where dropout takes units.

    ``w * m / (1 - r)`` with ``m ~ Bernoulli(1 - r)`` and ``r = effective_rate(rate)``, so that
    the mean of a linear layer's output is that of `w`, which evaluation uses as it is. One mask
    serves all examples of a batch; for one per example use ``jax.vmap`` over keys, at the price of
    one weight array per example.

    Published variants differ here, and some treat training and evaluation as if they were alike.
    The paper does not scale in training; its evaluation draws each unit's input from a normal
    distribution with the mean ``(1 - r) * w @ x`` and the variance that the masks cause.
    AWD-LSTM scales as above. With ``scaled=False`` it is ``w * m``, and then it is for you to
    evaluate with ``(1 - r) * w``.

    Args:
      key: a PRNG key, as for `dropout`.
      w: array of any shape, of a floating-point or complex dtype.
      rate: probability of dropping a weight, as for `dropout`.
      deterministic: whether to return `w` as it is; may be traced.
      scaled: whether to scale the weights that are kept.
      broadcast_dims: as for `dropout`.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      An array of w's shape and dtype.

    Raises:
      TypeError: as for `dropout`.
      ValueError: as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.drop_connect(jax.random.key(0), jnp.ones((2, 8)), 0.5)
      Array([[0., 2., 2., 0., 2., 2., 2., 0.],
             [2., 2., 2., 2., 2., 2., 0., 0.]], dtype=float32)

    References:
      Wan, Zeiler, Zhang, LeCun and Fergus, "Regularization of neural networks using DropConnect"
      (ICML 2013), section 3.
    """
    _checks.check_input(w, "w")
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
        scaled=scaled,
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
    """`drop_connect` of the selected arrays in a tree of parameters, as WeightDrop does.

    A recurrent network with the result for parameters has the same mask at every time step. Every
    array has the key ``jdropout.keys.at_site(key, path)``, where the path ``'lstm/hh/kernel'``
    stands for the site ``('lstm', 'hh', 'kernel')``: its mask depends on nothing else in the tree.
    Dictionaries, linen's parameters and `nnx.State` have the same paths, and so the same masks.

    Args:
      key: a PRNG key, as for `dropout`; a new one for every sequence or step.
      params: a tree of arrays: dictionaries, sequences, linen's parameters, an `nnx.State`.
      rate: probability of dropping a weight, as for `dropout`.
      select: which arrays to mask: a function of the path, or the last names of paths, such as
        ``['recurrent_kernel', 'lstm/hh/kernel']``, each of which has to select something.
      deterministic: whether to return `params` as they are; may be traced.
      scaled: as for `drop_connect`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      A tree like `params`, in which what is not selected is the same object.

    Raises:
      TypeError: if what is selected is not a floating-point array, or as for `dropout`.
      ValueError: if nothing is selected, or as for `dropout`.

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
    flag = _checks.check_deterministic(deterministic)
    leaves = _trees.leaves_with_sites(params)
    paths = ["/".join(map(str, site)) for site, _ in leaves]
    _check_paths(paths)
    found = [matches(wanted, path) for path in paths]
    check_selected(wanted, set().union(*found), paths)
    dropped = []
    for path, names, (site, leaf) in zip(paths, found, leaves, strict=True):
        if not names:
            dropped.append(leaf)
            continue
        _checks.check_input(leaf, f"params {path!r}")
        own = _trees.leaf_key(key, site, rate, flag, precision)
        dropped.append(
            drop_connect(own, leaf, rate, deterministic=flag, scaled=scaled, precision=precision)
        )
    if all(new is old for new, (_, old) in zip(dropped, leaves, strict=True)):
        return params
    return cast("_Tree", jax.tree.unflatten(jax.tree.structure(params), dropped))


def matches(select: Any, path: str) -> set[str]:
    """The names that select a path: those that it ends with; a predicate has an empty name."""
    if callable(select):
        return {""} if select(path) else set()
    return {name for name in select if f"/{path}".endswith(f"/{name}")}


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
                " Write the last names of the path as a string."
            )
    return tuple(select)


def _check_paths(paths: Sequence[str]) -> None:
    if "" in paths:
        raise ValueError(
            "params must be a tree of named parameters, such as a dictionary, got one array. Use "
            "jdropout.drop_connect for it."
        )


def check_selected(select: Any, found: set[str], paths: Sequence[str]) -> None:
    """Checks that each name selects something, or that a predicate does; `found` are those."""
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
