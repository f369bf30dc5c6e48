"""What the walk through a jaxpr knows of its values, and the places that it finds."""

import dataclasses
import math
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jdropout._sites import Frame

_SMALL = 4096
"""Larger values are not computed."""


class Loop(NamedTuple):
    """A scan or while loop around a place; its number is a source of what varies in it."""

    number: int
    kind: str
    length: int | None

    def describe(self) -> str:
        return self.kind if self.length is None else f"{self.kind} of {self.length}"


class MeshAxis(NamedTuple):
    """An axis of the devices of a `shard_map`, along which values may differ."""

    name: str


class Value(NamedTuple):
    """What is known of a value."""

    number: int
    sources: frozenset[Any]
    """Inputs, by their index, loops and mesh axes."""
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


@dataclasses.dataclass
class Place:
    """A place of a program where a mask is made; one in a loop stands for all its iterations."""

    key: Value | None
    loops: tuple[Loop, ...]
    branches: dict[int, int]
    """Which branch of which conditional it is in."""
    call: int | None = None
    """Number of the call of this library; None for others."""
    key_batch_axes: int = 0
    result_batch_axes: int = 0
    result_sources: frozenset[Any] = frozenset()
    # Of others:
    rate: float | None = None
    shape: tuple[int, ...] = ()
    shared_axes: tuple[int, ...] = ()
    stored_bytes: int = 0
    frames: tuple[Frame, ...] = ()
    scope: str = ""
    applied: bool = False
    """Whether what it is made for was seen: the result of the call, or that it zeroes something."""


def split_over_devices(value: Value, spec: Any) -> Value:
    """What a device sees of an operand of a `shard_map`."""
    axes = frozenset(axis for names in spec for axis in mesh_axes(names))
    return value._replace(sources=value.sources | axes)


def mesh_axes(names: Any) -> frozenset[MeshAxis]:
    names = names if isinstance(names, tuple) else (names,)
    return frozenset(MeshAxis(name) for name in names if isinstance(name, str))


def follow_mask(equation: Any, operands: list[Value], result: Value) -> Value:
    """Follows constants and Bernoulli masks through an operation, to where they are applied."""
    name = equation.primitive.name
    shape = equation.outvars[0].aval.shape
    if name in ("broadcast_in_dim", "convert_element_type", "copy") and operands:
        result = result._replace(fill=operands[0].fill)
    masks = [operand.bernoulli for operand in operands if operand.bernoulli is not None]
    if len(masks) != 1:
        return result
    [mask] = masks
    others = [operand for operand in operands if operand.bernoulli is None]
    if name == "broadcast_in_dim":
        kept = equation.params["broadcast_dimensions"]
        before = equation.invars[0].aval.shape
        shared = [True] * len(shape)
        for axis, size, repeated in zip(kept, before, mask.shared, strict=True):
            shared[axis] = repeated or (size == 1 and shape[axis] > 1)
        return result._replace(bernoulli=mask._replace(shared=tuple(shared)))
    if name == "reshape" and math.prod(shape) == math.prod(equation.invars[0].aval.shape):
        old = [
            s
            for s, size in zip(mask.shared, equation.invars[0].aval.shape, strict=True)
            if size > 1
        ]
        if len(old) == sum(size > 1 for size in shape):  # only axes of size 1 come or go
            kept_axes = iter(old)
            shared = [next(kept_axes) if size > 1 else False for size in shape]
            return result._replace(bernoulli=mask._replace(shared=tuple(shared)))
    if name in ("convert_element_type", "copy", "name", "not"):
        return result._replace(bernoulli=mask)
    if name in ("mul", "div") and all(other.fill is not None for other in others):
        return result._replace(bernoulli=mask)
    zeroes = name == "mul" or (name == "select_n" and any(other.fill == 0 for other in others))
    if zeroes and len(shape) == len(mask.shared):
        place = mask.place
        place.applied, place.shape, place.result_sources = True, shape, result.sources
        place.shared_axes = tuple(
            axis for axis, repeated in enumerate(mask.shared) if repeated and shape[axis] > 1
        )
    return result


def is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def known_array(array: Any) -> Any:
    """The array, if it has a value and is small."""
    if isinstance(array, jax.ShapeDtypeStruct | jax.core.Tracer):
        return None
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    return array if math.prod(array.shape) <= _SMALL else None


def identity_of(known: Any) -> Hashable:
    data = np.asarray(jax.random.key_data(known) if is_key(known) else known)
    return ("constant", str(known.dtype), data.shape, data.tobytes())


def rows_equal(known: Any) -> bool:
    if known.shape[:1] in ((), (0,), (1,)):
        return False
    data = np.asarray(jax.random.key_data(known) if is_key(known) else known)
    return bool((data == data[:1]).all())


def compute(equation: Any, operands: list[Value]) -> list[Any] | None:
    """The results, if the operands are known and the results small."""
    small = sum(math.prod(variable.aval.shape) for variable in equation.outvars) <= _SMALL
    unknown = any(operand.known is None for operand in operands)
    if unknown or not small or equation.effects or next(bodies_of(equation), None) is not None:
        return None
    results = equation.primitive.bind(*(operand.known for operand in operands), **equation.params)
    return list(results) if equation.primitive.multiple_results else [results]


def bodies_of(equation: Any) -> Iterator[Any]:
    for parameter in equation.params.values():
        for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield part


def invars_of(body: Any) -> list[Any]:
    return getattr(body, "jaxpr", body).invars


def hashable(parameters: dict[str, Any]) -> Hashable:
    try:
        items = tuple(sorted(parameters.items()))
        hash(items)
    except TypeError:
        return str(parameters)
    return items


def may_be_key(aval: Any) -> bool:
    return is_key(aval) or (aval.dtype == np.uint32 and aval.shape in ((2,), (4,)))
