"""Flattens a call into named leaves, so that the function can be traced.

Flax modules, optimizers and random streams among the arguments are split into their variables, and
put together again inside the trace.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Inputs(NamedTuple):
    """The leaves of the arguments of a call."""

    names: list[str]
    leaves: list[Any]
    of_optimizer: frozenset[int]
    """Indices of the leaves that belong to an optimizer of Flax."""
    call: Callable[[list[Any]], Any]
    """Calls the function with other leaves; returns its result and its modules' state."""


def flatten(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    fn, args = _unbound(fn, args)
    try:
        bound = inspect.signature(fn).bind(*args, **kwargs)
    except (TypeError, ValueError):  # no signature, or arguments that do not fit it: fn will raise
        bound = inspect.signature(lambda *args, **kwargs: None).bind(*args, **kwargs)
    nnx = sys.modules.get("flax.nnx")
    optimizers = () if nnx is None else (nnx.Optimizer,)
    objects = () if nnx is None else (nnx.Module, *optimizers, nnx.Rngs, nnx.RngStream)
    paths_and_leaves, treedef = jax.tree.flatten_with_path(
        dict(bound.arguments), is_leaf=lambda leaf: isinstance(leaf, objects)
    )
    names = [name_of(path) for path, _ in paths_and_leaves]
    leaves = [_native(leaf) for _, leaf in paths_and_leaves]
    modules = [i for i, leaf in enumerate(leaves) if isinstance(leaf, objects)]
    others = [i for i in range(len(leaves)) if i not in modules]
    state: list[tuple[Any, Any]] = []
    state_def, structure = None, None
    if nnx is not None and modules:
        # Split them together, because they may share variables.
        structure, split = nnx.split(tuple(leaves[i] for i in modules))
        state, state_def = jax.tree.flatten_with_path(split)

    def call(values: list[Any]) -> Any:
        again = dict(zip(others, values[: len(others)], strict=True))
        merged: tuple[Any, ...] = ()
        if nnx is not None and modules:
            split = jax.tree.unflatten(state_def, values[len(others) :])
            merged = nnx.merge(structure, split)
            again |= zip(modules, merged, strict=True)
        tree = jax.tree.unflatten(treedef, [again[i] for i in range(len(leaves))])
        bound_again = inspect.BoundArguments(bound.signature, tree)
        result = fn(*bound_again.args, **bound_again.kwargs)
        return result, nnx.state(merged) if nnx is not None and modules else None

    owners = [modules[path[0].key] for path, _ in state]
    own_names = [
        f"{names[owner]}.{name_of(path[1:])}"
        for owner, (path, _) in zip(owners, state, strict=True)
    ]
    of_optimizer = frozenset(
        len(others) + i for i, owner in enumerate(owners) if isinstance(leaves[owner], optimizers)
    )
    return Inputs(
        [names[i] for i in others] + own_names,
        [leaves[i] for i in others] + [leaf for _, leaf in state],
        of_optimizer,
        call,
    )


def _native(leaf: Any) -> Any:
    foreign = isinstance(leaf, np.ndarray) and not leaf.dtype.isnative
    return leaf.astype(leaf.dtype.newbyteorder("=")) if foreign else leaf


def is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return True
    return isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufcV"


def name_of(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".").removesuffix(".value")


def _unbound(
    fn: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Makes a module that is called, or whose method is, an ordinary argument."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(fn, nnx.Module):
        return type(fn).__call__, (fn, *args)
    if nnx is not None and inspect.ismethod(fn) and isinstance(fn.__self__, nnx.Module):
        return fn.__func__, (fn.__self__, *args)
    return fn, args
