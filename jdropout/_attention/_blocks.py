"""The attention matrix cut into blocks."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout._draw import Draw
from jdropout._dtypes import wide_dtype
from jdropout._typing import Index
from jdropout.by_position import PositionFunction


class BlockRule(NamedTuple):
    """How large the blocks of a platform are by default."""

    largest: tuple[int, int]
    """Queries and keys of a block; larger ones do not pay."""
    elements: int
    """Both sizes are halved until the blocks of all examples and heads have at most so many."""


_SMALLEST_BLOCK = (128, 128)
_RULES = {
    # Measured by `benchmarks/run.py --only attention_blocks`: blocks that stay in the cache.
    "cpu": BlockRule((512, 256), 2**20),
    # Estimated by `benchmarks/compiled.py`. A block takes up to 512 MB in float32.
    "tpu": BlockRule((512, 2048), 2**27),
    # Compiled by the same, not measured. Of the sizes with as many elements (1024 x 1024 and
    # 2048 x 512) it launches the fewest kernels, and has the fewest bytes accessed and temporaries.
    # 1024 x 2048 accesses 5 to 10 % less, but has 1.7 times the temporaries.
    "cuda": BlockRule((512, 2048), 2**27),
}
_RULES["rocm"] = _RULES["cuda"]

_LARGEST_CHUNK = (4, 8)
"""Blocks of queries and keys that are skipped together, measured like their sizes. It pays for
several chunks of both."""


class Axis(NamedTuple):
    """An axis of the attention matrix, cut into blocks; the last ones may be padding."""

    length: int
    block_size: int
    num_blocks: int
    chunk_size: int
    """Blocks of a chunk, a divisor of their number."""


class Plan(NamedTuple):
    """The static part of a call."""

    rows: Axis
    columns: Axis
    start: tuple[int | None, ...]
    """Position of the first probability in the whole matrix; None for a traced index."""
    is_causal: bool
    window: tuple[int, int] | None
    soft_cap: float | None
    drops_logits: bool
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
    query_segment_ids: jax.Array | None
    """(B, 1, 1, T, 1) in `_attend`"""
    key_segment_ids: jax.Array | None
    """(B, 1, 1, 1, S) in `_attend`"""
    bias_fns: tuple[PositionFunction, ...]
    mask_fns: tuple[PositionFunction, ...]
    alignment: jax.Array
    """What is added to the position of a query, int32 of shape (1,) or (B,)."""
    start: tuple[Any, ...]
    """The traced indices of `Plan.start`; None for static ones."""
    dropout: Draw | None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the softmax and of all sums."""
        return wide_dtype(self.query.dtype)


def default_block_sizes(query: jax.Array, platform: str) -> tuple[int, int]:
    *batch, length, heads, _ = query.shape
    rule = _RULES[platform]
    sizes = list(rule.largest)
    examples = math.prod(size for size in batch if isinstance(size, int))  # not symbolic ones
    for axis, smallest in enumerate(_SMALLEST_BLOCK):
        elements = examples * heads * math.prod(sizes)
        halvings = max(0, math.ceil(math.log2(max(elements, 1) / rule.elements)))
        sizes[axis] = max(smallest, sizes[axis] >> halvings)
    spec = jax.typeof(query).sharding.spec
    if len(spec) == query.ndim and spec[-3] is not None:  # explicitly sharded queries
        sizes[0] = length
    return sizes[0], sizes[1]


class Plans(NamedTuple):
    """A plan for each platform, so that one program can be compiled or exported for all."""

    cpu: Plan
    tpu: Plan
    cuda: Plan
    rocm: Plan


def by_platform(function: Callable[..., Any], plans: Plans, *args: Any) -> Any:
    """Calls ``function(plan, *args)`` with the plan of the platform that it is compiled for."""
    if len(set(plans)) == 1:
        return function(plans.cpu, *args)
    # Remade: else the backward pass would keep what it needs of the blocks of every platform.
    functions = {
        plan: jax.checkpoint(functools.partial(function, plan), prevent_cse=False)
        for plan in set(plans)
    }
    branches = {platform: functions[plan] for platform, plan in plans._asdict().items()}
    return lax.platform_dependent(*args, default=branches.pop("cpu"), **branches)


def cut(shape: tuple[int, int], block_sizes: tuple[int, int], skips: bool) -> tuple[Axis, Axis]:
    """Cuts queries and keys into blocks, and these into chunks if many may be skipped."""
    counts = [_num_blocks(*pair) for pair in zip(shape, block_sizes, strict=True)]
    many = skips and all(n > 2 * m for n, m in zip(counts, _LARGEST_CHUNK, strict=True))
    chunks = _LARGEST_CHUNK if many else (1, counts[1])
    rows, columns = map(_cut, shape, block_sizes, counts, chunks)
    return rows, columns


def _num_blocks(length: int, block: int) -> int:
    symbolic = not isinstance(length, int)
    return 1 if symbolic or length <= block else -(-length // block)


def _cut(length: int, block: int, count: int, chunk: int) -> Axis:
    if count == 1:
        return Axis(length, length if length != 0 else 1, 1, 1)
    num_chunks = -(-count // chunk)
    per_chunk = -(-count // num_chunks)
    return Axis(length, block, num_chunks * per_chunk, per_chunk)


def start(plan: Plan, inputs: Inputs) -> tuple[Index, ...]:
    return tuple(
        traced.astype(jnp.int32) if static is None else static
        for static, traced in zip(plan.start, inputs.start, strict=True)
    )


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
        if name in ("query", "output", "residual", "query_segment_ids"):
            tiles.rows[name] = split(plan.rows, x, 3)
        elif name in ("key", "value", "surplus"):
            tiles.columns[name] = split(plan.columns, x, 3)
        elif name in ("bias", "mask", "key_segment_ids"):
            if x.shape[3] == 1:
                x = jnp.broadcast_to(x, (*x.shape[:4], plan.columns.length))
                tiles.columns[name] = split(plan.columns, x, 4)
            elif x.shape[4] == 1:
                tiles.rows[name] = split(plan.rows, x, 3)
            else:
                rows = split(plan.rows, x, 3)
                tiles.cells[name] = jnp.swapaxes(split(plan.columns, rows, 5), 0, 1)
    return tiles


def split(blocks: Axis, x: jax.Array, axis: int, mode: str = "constant") -> jax.Array:
    padding = blocks.block_size * blocks.num_blocks - blocks.length
    if padding:
        x = jnp.pad(x, [(0, padding if a == axis else 0) for a in range(x.ndim)], mode=mode)
    shape = (*x.shape[:axis], blocks.num_blocks, blocks.block_size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def indices(blocks: Axis) -> jax.Array:
    return lax.iota(jnp.int32, blocks.num_blocks)


def join(blocks: Axis, x: jax.Array) -> jax.Array:
    """Undoes `split` along axis 3."""
    x = jnp.moveaxis(x, 0, 3)
    x = x.reshape(*x.shape[:3], blocks.num_blocks * blocks.block_size, *x.shape[5:])
    return lax.slice_in_dim(x, 0, blocks.length, axis=3)
