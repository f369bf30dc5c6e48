"""Follows another library's Bernoulli mask from where it is drawn to where it drops."""

import math
from typing import Any

import jax.numpy as jnp

from jdropout._audit.values import Loop, Place, Value


def follow(equation: Any, operands: list[Value], result: Value) -> Value:
    """Adds to the result of an operation whether it is a mask, or a constant."""
    name = equation.primitive.name
    if name in ("broadcast_in_dim", "convert_element_type", "reshape") and operands:
        result = result._replace(fill=operands[0].fill)
    masks = [operand.bernoulli for operand in operands if operand.bernoulli is not None]
    if len(masks) != 1:
        return result
    [mask] = masks
    others = [operand for operand in operands if operand.bernoulli is None]
    if name == "convert_element_type" or (name in ("mul", "div") and _are_constant(others)):
        return result._replace(bernoulli=mask)
    if name == "not" or (name == "sub" and operands[0].fill == 1):
        return result._replace(bernoulli=mask._replace(inverted=not mask.inverted))
    shared = _shared_after(equation, mask.shared)
    return result if shared is None else result._replace(bernoulli=mask._replace(shared=shared))


def _are_constant(values: list[Value]) -> bool:
    return all(value.fill is not None for value in values)


def _shared_after(equation: Any, shared: tuple[bool, ...]) -> tuple[bool, ...] | None:
    """Along which axes a mask is repeated after an operation that moves or adds axes."""
    name = equation.primitive.name
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        repeated = [True] * len(after)
        kept = equation.params["broadcast_dimensions"]
        for axis, size, was in zip(kept, before, shared, strict=True):
            repeated[axis] = was or (size == 1 and after[axis] > 1)
        return tuple(repeated)
    if name == "transpose":
        return tuple(shared[axis] for axis in equation.params["permutation"])
    if name in ("reshape", "squeeze"):
        moved = [was for was, size in zip(shared, before, strict=True) if size > 1]
        if [size for size in before if size > 1] == [size for size in after if size > 1]:
            rest = iter(moved)  # only axes of size 1 were added or removed
            return tuple(next(rest) if size > 1 else False for size in after)
    return None


def drop(
    equation: Any,
    operands: list[Value],
    result: Value,
    loops: tuple[Loop, ...],
    branches: dict[int, int],
) -> Place | None:
    """Completes the place of a mask if the operation zeroes something by it; returns the place."""
    dropping = _dropping_mask(equation, operands)
    if dropping is None:
        return None
    index, zero_where_true = dropping
    operand, mask = equation.invars[index].aval, operands[index].bernoulli
    assert mask is not None
    place, shape = mask.place, equation.outvars[0].aval.shape
    if place.applied:  # applied again, as in a backward pass
        return None
    batched = place.key_batch_axes
    if any(mask.shared[:batched]):  # the leading axes come from a vmap that the keys are not in
        batched = 0
    place.applied, place.result_sources = True, result.sources
    # With a backward pass, JAX hoists a mask that all iterations share out of the loop.
    place.loops, place.branches = loops, branches
    place.result_batch_axes, place.shape = batched, shape[batched:]
    place.shared_axes = tuple(
        axis - batched
        for axis, (was, size) in enumerate(zip(mask.shared, operand.shape, strict=True))
        if shape[axis] > 1 and (was or size == 1)
    )
    if place.true_rate is not None:
        dropped = place.true_rate if zero_where_true != mask.inverted else 1 - place.true_rate
        place.rate = round(dropped, 6)
    place.stored_bytes = math.prod(operand.shape[batched:]) * operand.dtype.itemsize
    return place


def _dropping_mask(equation: Any, operands: list[Value]) -> tuple[int, bool] | None:
    """Index of the operand whose mask zeroes the others, and whether it does where True."""
    name = equation.primitive.name
    if name not in ("mul", "select_n"):
        return None
    masks = [i for i, operand in enumerate(operands) if operand.bernoulli is not None]
    if len(masks) != 1 or not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact):
        return None
    [index] = masks
    others = [operand for i, operand in enumerate(operands) if i != index]
    if name == "mul":
        return None if _are_constant(others) else (index, False)
    zeros = [operand.fill == 0 for operand in others]
    return (0, zeros[1]) if index == 0 and sum(zeros) == 1 else None
