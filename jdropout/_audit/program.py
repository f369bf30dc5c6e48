"""Traces a function for an audit, and finds its calls, its places and the names of its inputs."""

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdropout import _record
from jdropout._audit import dataflow
from jdropout._audit.values import Place

_STEP = {"epoch", "global_step", "iteration", "step"}


class Program(NamedTuple):
    """A traced function."""

    calls: list[_record.Call]
    places: list[Place]
    names: list[str]
    """Names of the inputs, which are the traced leaves of the arguments."""
    steps: frozenset[int]
    """Indices of the inputs that count steps."""
    streams: frozenset[int]
    """Indices of the keys and counts of Flax's random streams."""
    advanced_inputs: frozenset[int]
    """Indices of the inputs whose next value is returned, or stored in a module."""


def trace(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    arguments = _flatten(*_unbound(fn, args), kwargs)
    leaves = arguments.leaves
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    integers = [i for i, leaf in enumerate(leaves) if type(leaf) is int]
    steps = [i for i in integers if i in arguments.steps]
    # An integer may be a step or a seed, which keys depend on, or a size, which must stay static.
    for traced in filter(None, (integers, steps)):
        try:
            return _trace(arguments, sorted(arrays + traced))
        except Exception:  # a traced size may raise anything
            continue
    return _trace(arguments, arrays)


class _Arguments(NamedTuple):
    names: list[str]
    leaves: list[Any]
    steps: frozenset[int]
    """Indices of the leaves that count steps."""
    call: Callable[[list[Any]], Any]
    """Calls the function with other leaves; returns its result and its modules' state."""


def _trace(arguments: _Arguments, traced: list[int]) -> Program:
    def flat(*values: Any) -> list[Any]:
        leaves = dict(enumerate(arguments.leaves)) | dict(zip(traced, values, strict=True))
        outputs = jax.tree.leaves(arguments.call(list(leaves.values())))
        return [output for output in outputs if isinstance(output, jax.Array)]

    values = [arguments.leaves[i] for i in traced]
    names = [arguments.names[i] for i in traced]
    with _record.recorded() as calls, jax.debug_key_reuse(False):
        closed = jax.make_jaxpr(flat)(*values)
    flow = dataflow.walk(closed, values)
    return Program(
        calls=calls,
        places=flow.places,
        names=names,
        steps=frozenset(i for i, leaf in enumerate(traced) if leaf in arguments.steps),
        streams=frozenset(i for i, name in enumerate(names) if _is_of_stream(name, names)),
        advanced_inputs=dataflow.advanced_inputs(closed, flow),
    )


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


def _flatten(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
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
    names = [_name(path) for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
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

    all_names = [names[i] for i in others]
    steps = {i for i, name in enumerate(all_names) if _counts_steps(name)}
    for path, _ in state:
        owner = modules[path[0].key]
        all_names.append(f"{names[owner]}.{_name(path[1:])}")
        # An optimizer always has a step, which says nothing about keys.
        if _counts_steps(all_names[-1]) and not isinstance(leaves[owner], optimizers):
            steps.add(len(all_names) - 1)
    all_leaves = [leaves[i] for i in others] + [leaf for _, leaf in state]
    return _Arguments(all_names, all_leaves, frozenset(steps), call)


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".").removesuffix(".value")


def _counts_steps(name: str) -> bool:
    return name.rpartition(".")[2] in _STEP


def _is_of_stream(name: str, names: Iterable[str]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in ("key", "count") and {f"{owner}.key", f"{owner}.count"} <= set(names)


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return True
    return isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufcV"
