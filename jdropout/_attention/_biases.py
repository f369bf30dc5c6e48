"""Biases by position, and their derivative along tangents of their arrays."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jdropout._attention._blocks import Inputs
from jdropout._attention._masks import Positions, in_block
from jdropout._attention._positions import for_each_example
from jdropout.by_position import PositionFunction


def array_name(index: int) -> str:
    return f"array {index} of bias_fn"


def biases(inputs: Inputs, at: Positions, changed: dict[str, jax.Array]) -> jax.Array:
    """The biases by position of a block, with some of their arrays replaced."""
    leaves, structure = jax.tree.flatten(inputs.bias_fns)
    leaves = [changed.get(array_name(index), leaf) for index, leaf in enumerate(leaves)]
    functions = jax.tree.unflatten(structure, leaves)
    values = [in_block(bias, at, inputs) for bias in functions]
    return functools.reduce(jnp.add, values).astype(inputs.dtype)


def biases_dot(inputs: Inputs, at: Positions, dot: dict[str, Any]) -> jax.Array:
    """Their derivative along the tangents of arrays."""
    leaves = {array_name(i): leaf for i, leaf in enumerate(jax.tree.leaves(inputs.bias_fns))}
    moving = {name: leaf for name, leaf in leaves.items() if name in dot}
    dots = {name: dot[name] for name in moving}
    return jax.jvp(functools.partial(biases, inputs, at), (moving,), (dots,))[1]


def of_each_example(
    inputs: Inputs, dots: dict[str, jax.Array]
) -> tuple[tuple[PositionFunction, ...], dict[str, jax.Array]]:
    """Gives every example its own copy of what all share, with their tangents.

    Else the backward pass would sum over the examples in every block, between devices if the batch
    is sharded. So it sums once, at the end.
    """
    batch_shape = inputs.query.shape[:3]
    own, leaf = [], 0
    each = {}
    if "scale" in dots:
        each["scale"] = jnp.broadcast_to(dots["scale"], (*batch_shape, 1, 1))
    for function in inputs.bias_fns:
        spread = for_each_example(function, batch_shape[0])
        for x in spread.arrays:
            name = array_name(leaf)
            if name in dots:
                each[name] = jnp.broadcast_to(dots[name], x.shape)
            leaf += 1
        own.append(spread)
    return tuple(own), each
