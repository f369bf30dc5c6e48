"""Traces a function for an audit, and finds its calls, its places and the names of its inputs."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from jdropout import _record
from jdropout._audit import dataflow
from jdropout._audit.values import Place
from jdropout._inputs import Inputs, flatten, is_array

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
    inputs = flatten(fn, args, kwargs)
    arrays = [i for i, leaf in enumerate(inputs.leaves) if is_array(leaf)]
    integers = [i for i, leaf in enumerate(inputs.leaves) if type(leaf) is int]
    steps = [i for i in integers if i in _steps(inputs)]
    # An integer may be a step or a seed, which keys depend on, or a size, which must stay static.
    for traced in filter(None, (integers, steps)):
        try:
            return _trace(inputs, sorted(arrays + traced))
        except Exception:  # a traced size may raise anything
            continue
    return _trace(inputs, arrays)


def _trace(inputs: Inputs, traced: list[int]) -> Program:
    def flat(*values: Any) -> list[Any]:
        leaves = dict(enumerate(inputs.leaves)) | dict(zip(traced, values, strict=True))
        outputs = jax.tree.leaves(inputs.call(list(leaves.values())))
        return [output for output in outputs if isinstance(output, jax.Array)]

    values = [inputs.leaves[i] for i in traced]
    names = [inputs.names[i] for i in traced]
    with jax.debug_key_reuse(False):
        closed, calls = _record.recorded(jax.make_jaxpr(flat), *values)
    flow = dataflow.walk(closed, values)
    counters = _steps(inputs)
    return Program(
        calls=calls,
        places=flow.places,
        names=names,
        steps=frozenset(i for i, leaf in enumerate(traced) if leaf in counters),
        streams=frozenset(i for i, name in enumerate(names) if _is_of_stream(name, names)),
        advanced_inputs=dataflow.advanced_inputs(closed, flow),
    )


def _steps(inputs: Inputs) -> frozenset[int]:
    """Indices of the leaves that count steps."""
    # An optimizer always has a step, which says nothing about keys.
    counters = {i for i, name in enumerate(inputs.names) if _counts_steps(name)}
    return frozenset(counters - inputs.of_optimizer)


def _counts_steps(name: str) -> bool:
    return name.rpartition(".")[2] in _STEP


def _is_of_stream(name: str, names: Iterable[str]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in ("key", "count") and {f"{owner}.key", f"{owner}.count"} <= set(names)
