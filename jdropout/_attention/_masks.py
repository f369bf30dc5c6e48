"""Which keys a query may attend to, and which blocks have none."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jdropout._attention._blocks import Inputs, Plan, indices, split, start
from jdropout._attention._positions import at_positions, keys_of
from jdropout.by_position import PositionFunction


def drops_keys(plan: Plan, inputs: Inputs) -> bool:
    """Whether a query may have keys that it does not attend to."""
    arrays = (
        inputs.mask,
        inputs.query_lengths,
        inputs.key_lengths,
        inputs.query_segment_ids,
        inputs.dropout,
    )
    limited = plan.is_causal or plan.window is not None or bool(inputs.mask_fns)
    return limited or any(array is not None for array in arrays)


class Positions(NamedTuple):
    """Positions in the whole matrix of the queries, keys and heads of a block."""

    queries: jax.Array
    """(R,)"""
    aligned: jax.Array
    """Where they are among the keys, (1, R) or (B, R)."""
    keys: jax.Array
    """(C,)"""
    heads: jax.Array
    """(N,)"""


def positions(plan: Plan, inputs: Inputs, i: Any, j: Any) -> Positions:
    *_, first_head, first_row, first_column = start(plan, inputs)
    key_heads, groups = inputs.query.shape[1:3]
    queries = lax.iota(jnp.int32, plan.rows.block_size) + (i * plan.rows.block_size + first_row)
    keys = lax.iota(jnp.int32, plan.columns.block_size)
    return Positions(
        queries=queries,
        aligned=queries[None] + inputs.alignment[:, None],
        keys=keys + (j * plan.columns.block_size + first_column),
        heads=lax.iota(jnp.int32, key_heads * groups) + first_head,
    )


def allowed(
    plan: Plan, inputs: Inputs, block: dict[str, jax.Array], i: Any, j: Any
) -> list[jax.Array]:
    """Which keys the queries of a block may attend to: conditions with five axes each."""
    at = positions(plan, inputs, i, j)
    *_, first_row, first_column = start(plan, inputs)
    lengths = (
        None if x is None else x.reshape(-1, 1, 1, 1, 1)
        for x in (inputs.query_lengths, inputs.key_lengths)
    )
    allowed = within_limits(
        plan,
        (first_row, first_column),
        at.queries.reshape(1, 1, 1, -1, 1),
        at.aligned[:, None, None, :, None],
        at.keys.reshape(1, 1, 1, 1, -1),
        *lengths,
    )
    if "query_segment_ids" in block:
        allowed.append(block["query_segment_ids"] == block["key_segment_ids"])
    if "mask" in block:
        allowed.append(block["mask"])
    for mask in inputs.mask_fns:
        allowed.append(in_block(mask, at, inputs))
    return allowed


def within_limits(
    plan: Plan,
    first: tuple[Any, Any],
    row: jax.Array,
    aligned: jax.Array,
    column: jax.Array,
    query_lengths: Any,
    key_lengths: Any,
) -> list[jax.Array]:
    """Conditions of position and length, for arrays of positions that broadcast together."""
    conditions = []
    if plan.columns.block_size * plan.columns.num_blocks > plan.columns.length:
        conditions.append(column < plan.columns.length + first[1])
    if plan.rows.block_size * plan.rows.num_blocks > plan.rows.length:
        # Else a large bias could make exp overflow in the padding.
        conditions.append(row < plan.rows.length + first[0])
    if plan.is_causal:
        conditions.append(column <= aligned)
    if plan.window is not None:
        before, after = plan.window
        conditions += [column >= aligned - before, column <= aligned + after]
    if query_lengths is not None:
        conditions.append(row < query_lengths)
    if key_lengths is not None:
        conditions.append(column < key_lengths)
    return conditions


def in_block(function: PositionFunction, at: Positions, inputs: Inputs) -> jax.Array:
    """Evaluates a function of positions, with five axes."""
    x = at_positions(function, at.aligned, at.keys, at.heads)
    return x.reshape(x.shape[0], *inputs.query.shape[1:3], *x.shape[2:])


def visited(plan: Plan, inputs: Inputs) -> jax.Array | None:
    """Which blocks are not masked as a whole by causality, window, segments or functions."""
    one_block = plan.rows.num_blocks == plan.columns.num_blocks == 1
    if one_block or plan.rows.length == 0 or plan.columns.length == 0:
        return None
    conditions = _conditions_of_blocks(plan, inputs)
    some = []
    if conditions:
        some.append(functools.reduce(jnp.logical_and, conditions).any(0))
    unknown = [mask for mask in inputs.mask_fns if not mask.key_range]
    if unknown:
        some.append(_blocks_with_any(plan, inputs._replace(mask_fns=tuple(unknown))))
    if not some:
        return None
    return functools.reduce(jnp.logical_and, some) & _not_padding(plan)


def visited_by_example(plan: Plan, inputs: Inputs) -> jax.Array:
    """Which blocks of which examples are needed, (1 or B, rows, columns); also by the lengths."""
    *_, row, column = start(plan, inputs)
    conditions = [_not_padding(plan)[None], *_conditions_of_blocks(plan, inputs)]
    if inputs.query_lengths is not None:
        rows = (row + indices(plan.rows) * plan.rows.block_size)[None, :, None]
        conditions.append(rows < inputs.query_lengths[:, None, None])
    if inputs.key_lengths is not None:
        columns = (column + indices(plan.columns) * plan.columns.block_size)[None, None]
        conditions.append(columns < inputs.key_lengths[:, None, None])
    return functools.reduce(jnp.logical_and, conditions)


def _conditions_of_blocks(plan: Plan, inputs: Inputs) -> list[jax.Array]:
    """Conditions for a block to have a query that may attend to a key: (1 or B, rows, columns)."""
    *_, row, column = start(plan, inputs)
    row = (row + indices(plan.rows) * plan.rows.block_size)[None] + inputs.alignment[:, None]
    column = (column + indices(plan.columns) * plan.columns.block_size)[None, None]
    last_row, last_column = row + plan.rows.block_size - 1, column + plan.columns.block_size - 1
    conditions = []
    if plan.is_causal:
        conditions.append(column <= last_row[..., None])
    ranges = [keys_of(mask, row, last_row) for mask in inputs.mask_fns if mask.key_range]
    if plan.window is not None:
        before, after = plan.window
        ranges.append((row - before, last_row + after))
    for first, last in ranges:
        conditions += [last_column >= first[..., None], column <= last[..., None]]
    if inputs.query_segment_ids is not None:
        queries, keys = _segments_of_blocks(plan, inputs)
        conditions += [queries[0] <= keys[1], keys[0] <= queries[1]]
    return conditions


def _not_padding(plan: Plan) -> jax.Array:
    """Which blocks are more than padding of chunks."""
    rows, columns = (indices(x) * x.block_size < x.length for x in (plan.rows, plan.columns))
    return rows[:, None] & columns[None]


def _segments_of_blocks(plan: Plan, inputs: Inputs) -> tuple[Any, Any]:
    """The smallest and the largest segment of blocks: (B, rows, 1) and (B, 1, columns)."""
    assert inputs.query_segment_ids is not None
    assert inputs.key_segment_ids is not None
    queries = split(plan.rows, inputs.query_segment_ids[:, 0, 0, :, 0], 1, "edge")
    keys = split(plan.columns, inputs.key_segment_ids[:, 0, 0, 0], 1, "edge")
    queries, keys = (jnp.moveaxis(x, 0, 1) for x in (queries, keys))
    of_queries = tuple(reduce(2)[:, :, None] for reduce in (queries.min, queries.max))
    of_keys = tuple(reduce(2)[:, None] for reduce in (keys.min, keys.max))
    return of_queries, of_keys


def _blocks_with_any(plan: Plan, inputs: Inputs) -> jax.Array:
    """Evaluates masks at all positions, block by block, to see where they allow anything."""

    def any_in(i: jax.Array, j: jax.Array) -> jax.Array:
        at = positions(plan, inputs, i, j)
        masks = [in_block(mask, at, inputs) for mask in inputs.mask_fns]
        return functools.reduce(jnp.logical_and, masks).any()

    rows, columns = indices(plan.rows), indices(plan.columns)
    return lax.map(lambda i: lax.map(lambda j: any_in(i, j), columns), rows)
