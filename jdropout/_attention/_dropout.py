"""The dropout mask of a block of the attention matrix, and its scale."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout._attention._blocks import Inputs, Plan, start


def drop(plan: Plan, inputs: Inputs, i: Any, j: Any, weights: jax.Array) -> jax.Array:
    """Applies the dropout mask, without its scale, to a block with five axes."""
    if inputs.dropout is None or plan.drops_logits:
        return weights
    return jnp.where(keep(plan, inputs, i, j).reshape(weights.shape), weights, 0)


def keep(plan: Plan, inputs: Inputs, i: Any, j: Any) -> jax.Array:
    """The dropout mask of a block, with the axes of the whole."""
    assert inputs.dropout is not None
    lead = inputs.dropout.description.shape[:-2]
    shape = (*lead, plan.rows.block_size, plan.columns.block_size)
    tile = inputs.dropout.tile(shape, start(plan, inputs), (0,) * len(lead) + (i, j))
    return tile.keep()


def dropout_scale(plan: Plan, inputs: Inputs) -> Any:
    if inputs.dropout is None:
        return np.ones((), inputs.dtype)
    unscaled = plan.drops_logits
    scale = jnp.ones((), inputs.dtype) if unscaled else inputs.dropout.scale(inputs.dtype)
    return inputs.dropout.nan_if_invalid(scale)
