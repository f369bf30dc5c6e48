"""Traces a function for an audit: its calls, the places in its jaxpr, and names for its inputs."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdropout import _sites
from jdropout._audit import dataflow
from jdropout._audit.values import Place

_STEP = {"count", "epoch", "global_step", "iteration", "step", "steps"}


class Program(NamedTuple):
    """What the tracing of a function gave."""

    calls: list[_sites.Call]
    places: list[Place]
    names: list[str]
    """Of the inputs: the traced leaves of the arguments."""
    steps: frozenset[int]
    """The inputs that count steps."""
    advanced: frozenset[int]
    """The inputs that are keys which the function returns a successor of."""


def trace(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    names, leaves, rebuild = _flatten(fn, args, kwargs)
    arrays = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    numbers = [i for i, leaf in enumerate(leaves) if type(leaf) in (int, float)]

    def trace_inputs(inputs: list[int]) -> Program:
        def flat(*traced: Any) -> list[Any]:
            values = dict(enumerate(leaves)) | dict(zip(inputs, traced, strict=True))
            positional, keywords = rebuild(list(values.values()))
            results = jax.tree.leaves(fn(*positional, **keywords))
            return [result for result in results if isinstance(result, jax.Array)]

        arguments = [leaves[i] for i in inputs]
        with _sites.recorded() as calls:
            closed = jax.make_jaxpr(flat)(*arguments)
        flow = dataflow.walk(closed, arguments)
        of_inputs = [names[i] for i in inputs]
        return Program(
            calls,
            flow.places,
            of_inputs,
            frozenset(i for i, name in enumerate(of_inputs) if _counts_steps(name)),
            dataflow.advanced_keys(closed, flow),
        )

    if not numbers:
        return trace_inputs(arrays)
    try:
        return trace_inputs(sorted(arrays + numbers))
    except Exception:  # a number may be a size or an option, whose tracing can fail in any way
        return trace_inputs(arrays)


def _flatten(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[str], list[Any], Callable[[list[Any]], Any]]:
    """Names and leaves of the arguments, and what makes (args, kwargs) of leaves again."""
    try:
        bound = inspect.signature(fn).bind(*args, **kwargs)
    except (TypeError, ValueError):  # no signature, or a call that does not fit: fn will say so
        bound = inspect.signature(lambda *args, **kwargs: None).bind(*args, **kwargs)
    nnx = sys.modules.get("flax.nnx")
    objects = () if nnx is None else (nnx.Module, nnx.Optimizer, nnx.Rngs, nnx.RngStream)
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
        # All in one, since they may share variables.
        structure, split = nnx.split(tuple(leaves[i] for i in modules))
        state, state_def = jax.tree.flatten_with_path(split)

    def rebuild(values: list[Any]) -> Any:
        again = dict(zip(others, values[: len(others)], strict=True))
        if nnx is not None and modules:
            split = jax.tree.unflatten(state_def, values[len(others) :])
            again |= zip(modules, nnx.merge(structure, split), strict=True)
        tree = jax.tree.unflatten(treedef, [again[i] for i in range(len(leaves))])
        call = inspect.BoundArguments(bound.signature, tree)
        return call.args, call.kwargs

    state_names = [f"{names[modules[path[0].key]]}.{_name(path[1:])}" for path, _ in state]
    all_leaves = [leaves[i] for i in others] + [leaf for _, leaf in state]
    return [names[i] for i in others] + state_names, all_leaves, rebuild


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".").removesuffix(".value")


def _counts_steps(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in _STEP


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return True
    return isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufcV"
