"""The values of a walk through a jaxpr, and the places that it finds."""

import dataclasses
import itertools
import math
import os
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdropout._jaxprs import bodies_of
from jdropout._record import Frame

_PROGRAM = os.path.join(os.path.dirname(__file__), "program.py")
_SMALL = 4096
"""Arrays with more elements are not computed."""


class Loop(NamedTuple):
    """A scan or while loop around a place; a source of the values that vary in it."""

    number: int
    kind: str
    length: int | None

    def describe(self) -> str:
        return self.kind if self.length is None else f"{self.kind} of {self.length}"


class Carry(NamedTuple):
    """A slot of a loop's carry; a source of the values made from it in the body."""

    loop: Loop
    slot: int


class MeshAxis(NamedTuple):
    """An axis of a `shard_map`'s mesh; a source of the values that differ along it."""

    name: str


class Value(NamedTuple):
    """A value of the jaxpr, and all that is known about it."""

    number: int
    sources: frozenset[Any]
    """What it depends on: indices of inputs, loops, their carries, and mesh axes."""
    choices: frozenset[Any] = frozenset()
    """The sources that only decide which branch of a conditional it comes from."""
    known: Any = None
    """The array itself, if it is known and small."""
    fill: float | None = None
    """The number that all elements equal, if known."""
    bernoulli: "Bernoulli | None" = None
    """Set if the value is a Bernoulli mask, possibly scaled."""


class Bernoulli(NamedTuple):
    place: "Place"
    shared: tuple[bool, ...]
    """For every axis of the value, whether the mask is repeated along it."""
    inverted: bool = False
    """Whether it is the complement of the drawn mask."""


@dataclasses.dataclass
class Place:
    """A place in the program that makes a mask; in a loop it stands for all iterations."""

    key: Value | None
    loops: tuple[Loop, ...]
    branches: dict[int, int]
    """The branch it is in, for every conditional around it."""
    scope: str
    """Names of the modules and transformations around it, joined by /."""
    frames: tuple[Frame, ...]
    """Innermost first; of the operation that makes the mask, then of those around it."""
    call: int | None = None
    """Number of the call of this library; None for another library's mask."""
    start: tuple[int, ...] = ()
    """Value numbers of its position in a larger mask."""
    key_batch_axes: int = 0
    result_batch_axes: int = 0
    result_sources: frozenset[Any] = frozenset()
    applied: bool = False
    """Whether its use was found: the result of the call, or an array that it zeroes."""
    # Only for another library's mask:
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
    """The array if it is concrete and small, otherwise None."""
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
    """The results if the operands are known and the results small, otherwise None."""
    small = sum(math.prod(variable.aval.shape) for variable in equation.outvars) <= _SMALL
    unknown = any(operand.known is None for operand in operands)
    if unknown or not small or equation.effects or next(bodies_of(equation), None) is not None:
        return None
    if "callback" in equation.params:  # never run the user's Python code
        return None
    known = [operand.known for operand in operands]
    try:
        results = equation.primitive.bind(*known, **equation.params)
    except Exception:  # such as a collective, without its mesh or axis name
        return None
    return list(results) if equation.primitive.multiple_results else [results]


def frames_of(equation: Any) -> tuple[Frame, ...]:
    """Frames of the calls that traced an operation, up to the audit."""
    frames = (
        Frame(frame.file_name, frame.line_num, frame.function_name)
        for frame in equation.source_info.traceback.frames
    )
    return tuple(itertools.takewhile(lambda frame: frame.file != _PROGRAM, frames))


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
