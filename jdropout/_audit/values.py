"""What the walk through a jaxpr knows of its values, and the places that it finds."""

import dataclasses
import itertools
import math
import os
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jdropout._record import Frame

_PROGRAM = os.path.join(os.path.dirname(__file__), "program.py")
_SMALL = 4096
"""Larger values are not computed."""


class Loop(NamedTuple):
    """A scan or while loop around a place; its number is a source of what varies in it."""

    number: int
    kind: str
    length: int | None

    def describe(self) -> str:
        return self.kind if self.length is None else f"{self.kind} of {self.length}"


class Carry(NamedTuple):
    """What a loop carries: a source of what is made of it in the loop's body."""

    loop: Loop
    slot: int


class MeshAxis(NamedTuple):
    """An axis of the devices of a `shard_map`, along which values may differ."""

    name: str


class Value(NamedTuple):
    """What is known of a value."""

    number: int
    sources: frozenset[Any]
    """Inputs, by their index, loops, what these carry, and mesh axes."""
    known: Any = None
    """A small array, if its value is known."""
    fill: float | None = None
    """The number that all elements are, if known."""
    bernoulli: "Bernoulli | None" = None
    """The Bernoulli mask, possibly scaled, that it is."""


class Bernoulli(NamedTuple):
    place: "Place"
    shared: tuple[bool, ...]
    """For every axis of the value, whether the mask is repeated along it."""
    inverted: bool = False
    """Whether it is zero where the mask that was drawn is not."""


@dataclasses.dataclass
class Place:
    """A place of a program where a mask is made; one in a loop stands for all its iterations."""

    key: Value | None
    loops: tuple[Loop, ...]
    branches: dict[int, int]
    """Which branch of which conditional it is in."""
    scope: str
    """Names of the modules and transformations around it."""
    frames: tuple[Frame, ...]
    """Innermost first: of the operation that makes the mask, and of those that it is inside of."""
    call: int | None = None
    """Number of the call of this library; None for others."""
    start: tuple[int, ...] = ()
    """Numbers of the values that say which part of a larger mask it is."""
    key_batch_axes: int = 0
    result_batch_axes: int = 0
    result_sources: frozenset[Any] = frozenset()
    applied: bool = False
    """Whether what it is made for was seen: the result of the call, or that it zeroes something."""
    # Of others:
    true_rate: float | None = None
    """The probability of True."""
    rate: float | None = None
    shape: tuple[int, ...] = ()
    shared_axes: tuple[int, ...] = ()
    stored_bytes: int = 0


def mesh_axes(names: Any) -> frozenset[MeshAxis]:
    names = names if isinstance(names, tuple | list | set | frozenset) else (names,)
    return frozenset(MeshAxis(name) for name in names if isinstance(name, str))


def is_key(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def is_integer(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.integer)


def known_array(array: Any) -> Any:
    """The array, if it has a value and is small."""
    if isinstance(array, jax.ShapeDtypeStruct | jax.core.Tracer):
        return None
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    elif not array.is_fully_addressable:
        return None
    return array if math.prod(array.shape) <= _SMALL else None


def identity_of(known: Any) -> Hashable:
    data = _data(known)
    return ("constant", str(known.dtype), data.shape, data.tobytes())


def rows_equal(known: Any) -> bool:
    if known.shape[:1] in ((), (0,), (1,)):
        return False
    data = _data(known)
    return bool((data == data[:1]).all())


def _data(known: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(known) if is_key(known) else known)


def compute(equation: Any, operands: list[Value]) -> list[Any] | None:
    """The results, if the operands are known and the results small."""
    small = sum(math.prod(variable.aval.shape) for variable in equation.outvars) <= _SMALL
    unknown = any(operand.known is None for operand in operands)
    if unknown or not small or equation.effects or next(bodies_of(equation), None) is not None:
        return None
    if "callback" in equation.params:  # nothing of the user's is run
        return None
    known = [operand.known for operand in operands]
    try:
        results = equation.primitive.bind(*known, **equation.params)
    except Exception:  # outside of the program it has no mesh, or no axis of that name
        return None
    return list(results) if equation.primitive.multiple_results else [results]


def bodies_of(equation: Any) -> Iterator[Any]:
    for parameter in equation.params.values():
        for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield part


def frames_of(equation: Any) -> tuple[Frame, ...]:
    """The calls in which an operation was traced, up to the audit."""
    frames = (
        Frame(frame.file_name, frame.line_num, frame.function_name)
        for frame in equation.source_info.traceback.frames
    )
    return tuple(itertools.takewhile(lambda frame: frame.file != _PROGRAM, frames))


def open_jaxpr(body: Any) -> Any:
    """The jaxpr of a body, which comes with or without constants."""
    return getattr(body, "jaxpr", body)


def hashable(parameters: dict[str, Any]) -> Hashable:
    try:
        items = tuple(sorted(parameters.items()))
        hash(items)
    except TypeError:
        return str(parameters)
    return items


def may_be_key(aval: Any) -> bool:
    return is_key(aval) or (
        getattr(aval, "dtype", None) == np.uint32 and aval.shape in ((2,), (4,))
    )
