"""The attention matrix cut into blocks."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout._draw import Draw
from jdropout._dtypes import wide_dtype
from jdropout._typing import Index

_Carry = TypeVar("_Carry")

# Queries and keys per block, measured by `benchmarks/run.py --only attention_blocks`. Blocks above
# the largest size do not pay. Both sizes are halved, down to the smallest, until the blocks of all
# examples and heads together have at most 2^20 elements, which stay in the cache.
_LARGEST_BLOCK = (512, 256)
_SMALLEST_BLOCK = (128, 128)
_ELEMENTS_AT_ONCE = 2**20


class Axis(NamedTuple):
    """An axis of the attention matrix, cut into blocks; the last one may be padded."""

    length: int
    block_size: int
    num_blocks: int


class Plan(NamedTuple):
    """The static part of a call."""

    rows: Axis
    columns: Axis
    start: tuple[int | None, ...]
    """Position of the first probability in the whole matrix; None for a traced index."""
    is_causal: bool
    window: tuple[int, int] | None
    precision: Any


class Inputs(NamedTuple):
    """Everything that may be traced. In `_attend` the N heads are split into K x G groups."""

    query: jax.Array
    """(B, K, G, T, H) in `_attend`"""
    key: jax.Array
    """(B, K, H, S) in `_attend`, which makes the products of the backward pass faster."""
    value: jax.Array
    """(B, K, V, S) in `_attend`"""
    bias: jax.Array | None
    """Broadcasts to (B, K, G, T, S) in `_attend`, with five axes; the mask does too."""
    scale: Any
    mask: jax.Array | None
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None
    start: tuple[Any, ...]
    """The traced indices of `Plan.start`; None for static ones."""
    dropout: Draw | None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the softmax and of all sums."""
        return wide_dtype(self.query.dtype)


def default_block_sizes(query: jax.Array) -> tuple[int, int]:
    *batch, length, heads, _ = query.shape
    sizes = list(_LARGEST_BLOCK)
    examples = math.prod(size for size in batch if isinstance(size, int))  # not symbolic ones
    for axis, smallest in enumerate(_SMALLEST_BLOCK):
        elements = examples * heads * math.prod(sizes)
        halvings = max(0, math.ceil(math.log2(max(elements, 1) / _ELEMENTS_AT_ONCE)))
        sizes[axis] = max(smallest, sizes[axis] >> halvings)
    spec = jax.typeof(query).sharding.spec
    if len(spec) == query.ndim and spec[-3] is not None:  # explicitly sharded queries
        sizes[0] = length
    return sizes[0], sizes[1]


def cut(length: int, block: int) -> Axis:
    if not isinstance(length, int):  # a symbolic length
        return Axis(length, length, 1)
    if length <= block:
        return Axis(length, max(length, 1), 1)
    return Axis(length, block, -(-length // block))


def start(plan: Plan, inputs: Inputs) -> tuple[Index, ...]:
    return tuple(
        traced.astype(jnp.int32) if static is None else static
        for static, traced in zip(plan.start, inputs.start, strict=True)
    )


def drops_keys(plan: Plan, inputs: Inputs) -> bool:
    """Whether a query may have keys that it does not attend to."""
    arrays = (inputs.mask, inputs.query_lengths, inputs.key_lengths, inputs.dropout)
    limited = plan.is_causal or plan.window is not None
    return limited or any(array is not None for array in arrays)


def allowed(plan: Plan, inputs: Inputs, i: Any, j: Any) -> list[jax.Array]:
    """Which keys a block's queries may see by position: conditions with five axes each."""
    shape = (1, 1, 1, plan.rows.block_size, plan.columns.block_size)
    row = lax.broadcasted_iota(jnp.int32, (*shape[:-1], 1), 3) + i * plan.rows.block_size
    column = lax.broadcasted_iota(jnp.int32, (*shape[:-2], 1, shape[-1]), 4)
    column = column + j * plan.columns.block_size
    allowed = []
    if plan.columns.block_size * plan.columns.num_blocks > plan.columns.length:
        allowed.append(column < plan.columns.length)
    if plan.rows.block_size * plan.rows.num_blocks > plan.rows.length:
        # Else a large bias could make exp overflow in the padding.
        allowed.append(row < plan.rows.length)
    *_, first_row, first_column = start(plan, inputs)
    row, column = row + first_row, column + first_column
    if plan.is_causal:
        allowed.append(column <= row)
    if plan.window is not None:
        before, after = plan.window
        allowed += [column >= row - before, column <= row + after]
    if inputs.query_lengths is not None:
        allowed.append(row < inputs.query_lengths.reshape(-1, 1, 1, 1, 1))
    if inputs.key_lengths is not None:
        allowed.append(column < inputs.key_lengths.reshape(-1, 1, 1, 1, 1))
    return allowed


def where_needed(
    plan: Plan,
    inputs: Inputs,
    i: jax.Array,
    j: jax.Array,
    visit: Callable[[Any], _Carry],
    skip: Callable[[Any], _Carry],
    operand: Any,
) -> _Carry:
    """Visits a block unless causality or the window masks all of it."""
    *_, row, column = start(plan, inputs)
    row, column = row + i * plan.rows.block_size, column + j * plan.columns.block_size
    last_row, last_column = row + plan.rows.block_size - 1, column + plan.columns.block_size - 1
    conditions = []
    if plan.is_causal:
        conditions.append(column <= last_row)
    if plan.window is not None:
        before, after = plan.window
        conditions += [last_column >= row - before, column <= last_row + after]
    if not conditions or plan.rows.num_blocks == plan.columns.num_blocks == 1:
        return visit(operand)
    return lax.cond(functools.reduce(jnp.logical_and, conditions), visit, skip, operand)


class Tiles(NamedTuple):
    """Arrays cut into blocks along queries, keys or both, by name; leading axes count blocks."""

    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]
    cells: dict[str, jax.Array]


def tile(plan: Plan, arrays: dict[str, Any]) -> Tiles:
    """Cuts the arrays that have an axis of queries or keys, and leaves out the others."""
    tiles = Tiles({}, {}, {})
    for name, x in arrays.items():
        if x is None:
            continue
        if name in ("query", "output", "residual"):
            tiles.rows[name] = split(plan.rows, x, 3)
        elif name in ("key", "value", "surplus"):
            tiles.columns[name] = split(plan.columns, x, 3)
        elif name in ("bias", "mask"):
            if x.shape[3] == 1:
                x = jnp.broadcast_to(x, (*x.shape[:4], plan.columns.length))
                tiles.columns[name] = split(plan.columns, x, 4)
            elif x.shape[4] == 1:
                tiles.rows[name] = split(plan.rows, x, 3)
            else:
                rows = split(plan.rows, x, 3)
                tiles.cells[name] = jnp.swapaxes(split(plan.columns, rows, 5), 0, 1)
    return tiles


def split(blocks: Axis, x: jax.Array, axis: int) -> jax.Array:
    padding = blocks.block_size * blocks.num_blocks - blocks.length
    if padding:
        x = jnp.pad(x, [(0, padding if a == axis else 0) for a in range(x.ndim)])
    shape = (*x.shape[:axis], blocks.num_blocks, blocks.block_size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def indices(blocks: Axis) -> jax.Array:
    return lax.iota(jnp.int32, blocks.num_blocks)


def join(blocks: Axis, x: jax.Array) -> jax.Array:
    """Undoes `split` along axis 3."""
    x = jnp.moveaxis(x, 0, 3)
    x = x.reshape(*x.shape[:3], blocks.num_blocks * blocks.block_size, *x.shape[5:])
    return lax.slice_in_dim(x, 0, blocks.length, axis=3)
