"""Flash attention for a TPU, with the mask law inside: Pallas kernels of both passes.

The grid runs over examples, heads, and tiles of the attention matrix. In the forward pass the tiles
of a row follow one another, and their online softmax stays on the chip. In the backward pass those
of a column do: the gradients of its keys and values stay on the chip, and so do the gradients of a
chunk of queries, so that no tile is computed twice.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jdropout import _kernels
from jdropout._attention._blocks import Axis, Inputs, Plan, start
from jdropout._attention._dropout import dropout_scale
from jdropout._attention._masks import drops_keys, visited_by_example, within_limits
from jdropout._draw import Description
from jdropout._implementation import LANES

_LARGEST_TILE = (512, 1024)
"""Queries and keys, estimated by `benchmarks/compiled.py`."""
_CHUNK_BYTES = 2**22
"""Gradients of the queries of a chunk, in float32."""
_ON_CHIP_BYTES = 48 * 2**20
"""Less than a v5e, v6e or v7x has."""


def tiles(
    shape: tuple[int, int], sizes: tuple[int, int] | None, features: int
) -> tuple[Axis, Axis]:
    """Cuts queries and keys into tiles, and queries into chunks whose gradients fit on the chip."""
    rows, columns = (
        _whole_lanes(max(1, min(pair))) for pair in zip(shape, sizes or _LARGEST_TILE, strict=True)
    )
    counts = [max(1, pl.cdiv(*pair)) for pair in zip(shape, (rows, columns), strict=True)]
    chunks = pl.cdiv(4 * features * rows * counts[0], _CHUNK_BYTES)
    per_chunk = pl.cdiv(counts[0], chunks)
    return (
        Axis(shape[0], rows, chunks * per_chunk, per_chunk),
        Axis(shape[1], columns, counts[1], counts[1]),
    )


def _whole_lanes(size: int) -> int:
    return pl.cdiv(size, LANES) * LANES


class _Static(NamedTuple):
    """What the kernels know when they are compiled."""

    plan: Plan
    drops_keys: bool
    """Whether values of NaN may belong to keys that a query does not attend to."""
    dropout: Description | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns the output (B, K, G, T, V) and the log-sum-exp (B, K, G, T), as `_attend` does."""
    batch, key_heads, groups, length, _ = inputs.query.shape
    features = inputs.value.shape[2]
    rows, columns = plan.rows, plan.columns
    operands, specs = _operands(plan, inputs)
    padded = rows.num_blocks * rows.block_size
    output, residual = _kernels.call(
        "attention_forward",
        functools.partial(_forward_kernel, _static(plan, inputs)),
        operands,
        grid=(batch, key_heads * groups, rows.num_blocks, columns.num_blocks),
        in_specs=[specs],
        out_specs=[_of_queries(rows, features), _of_query_numbers(rows)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, key_heads * groups, padded, features), inputs.query.dtype),
            jax.ShapeDtypeStruct((batch, key_heads * groups, 1, padded), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows.block_size, LANES), jnp.float32),
            pltpu.VMEM((rows.block_size, LANES), jnp.float32),
            pltpu.VMEM((rows.block_size, features), jnp.float32),
        ],
        compiler_params=_compiler_params("parallel", "parallel", "parallel", "arbitrary"),
    )
    shape = (batch, key_heads, groups, length)
    output = output[:, :, :length].reshape(*shape, features)
    return output, residual[:, :, 0, :length].reshape(shape)


def _attend_forward(plan: Plan, inputs: Inputs) -> Any:
    output, residual = attend(plan, inputs)
    return (output, residual), (inputs, output, residual)


def _attend_backward(plan: Plan, saved: Any, cotangents: Any) -> tuple[Inputs]:
    inputs, output, residual = saved
    query_bar, key_bar, value_bar = _backward(plan, inputs, output, residual, *cotangents)
    zeros = jax.tree.map(lambda _: None, inputs)
    return (
        zeros._replace(
            query=(query_bar * inputs.scale).astype(inputs.query.dtype),
            key=(key_bar * inputs.scale).astype(inputs.key.dtype),
            value=value_bar.astype(inputs.value.dtype),
            scale=(query_bar * inputs.query.astype(inputs.dtype)).sum(),
        ),
    )


attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(
    plan: Plan,
    inputs: Inputs,
    output: jax.Array,
    residual: jax.Array,
    output_bar: jax.Array,
    residual_bar: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries and keys, without the scale of the logits, and of values.

    With logits s, probabilities P, the unscaled dropout mask M, its scale c and the cotangents do
    of the output and dr of the log-sum-exp: dv = c (M P)^T do, and ds = c P (M (do v^T) - offset)
    with offset = (rowsum(o do) - dr) / c.
    """
    batch, key_heads, groups, length, features = inputs.query.shape
    rows, columns = plan.rows, plan.columns
    scale = dropout_scale(plan, inputs)
    products = (output.astype(inputs.dtype) * output_bar.astype(inputs.dtype)).sum(-1)
    operands, specs = _operands(plan, inputs)
    operands["output_bar"] = _padded(rows, _heads_joined(output_bar), 2)
    specs["output_bar"] = _of_queries(rows, output_bar.shape[-1])
    for name, x in (("residual", residual), ("offset", (products - residual_bar) / scale)):
        operands[name] = _padded(rows, _heads_joined(x)[:, :, None], 3)
        specs[name] = _of_query_numbers(rows)

    per_chunk, chunks = rows.chunk_size, rows.num_blocks // rows.chunk_size
    shape = (batch, key_heads * groups)
    width = columns.block_size

    def by_columns(spec: pl.BlockSpec) -> pl.BlockSpec:
        if spec.index_map is None:
            return spec
        index_map = spec.index_map
        return pl.BlockSpec(
            spec.block_shape,
            lambda b, n, c, j, i: index_map(b, n, c * per_chunk + i, j),
            memory_space=spec.memory_space,
        )

    sums = [
        jax.ShapeDtypeStruct((*shape, chunks, width * columns.num_blocks, size), jnp.float32)
        for size in (features, output_bar.shape[-1])
    ]
    query_bar, *column_bars = _kernels.call(
        "attention_backward",
        functools.partial(_backward_kernel, _static(plan, inputs)),
        operands,
        grid=(*shape, chunks, columns.num_blocks, per_chunk),
        in_specs=[{name: by_columns(spec) for name, spec in specs.items()}],
        out_specs=[
            pl.BlockSpec(
                (None, None, per_chunk * rows.block_size, features),
                lambda b, n, c, j, i: (b, n, c, 0),
            ),
            *(
                pl.BlockSpec(
                    (None, None, None, width, x.shape[-1]), lambda b, n, c, j, i: (b, n, c, j, 0)
                )
                for x in sums
            ),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(
                (*shape, rows.num_blocks * rows.block_size, features), jnp.float32
            ),
            *sums,
        ],
        compiler_params=_compiler_params(
            "parallel", "parallel", "parallel", "arbitrary", "arbitrary"
        ),
    )
    key_bar, value_bar = (
        x.reshape(batch, key_heads, groups * chunks, *x.shape[3:]).sum(2)[:, :, : columns.length]
        for x in column_bars
    )
    query_bar = query_bar[:, :, :length].reshape(inputs.query.shape)
    return query_bar * scale, key_bar.swapaxes(2, 3) * scale, value_bar.swapaxes(2, 3) * scale


@_backward.defjvp
def _no_second_derivative(*_: Any) -> Any:
    raise NotImplementedError(
        "implementation='pallas' has no second derivatives. Pass implementation='xla'."
    )


# --- operands -----------------------------------------------------------------------------


def _static(plan: Plan, inputs: Inputs) -> _Static:
    dropout = None if inputs.dropout is None else _kernels.described(inputs.dropout)
    return _Static(plan, drops_keys(plan, inputs), dropout)


def _operands(plan: Plan, inputs: Inputs) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both kernels need by name: arrays, and what the tile (b, n, i, j) sees of them."""
    rows, columns = plan.rows, plan.columns
    groups = inputs.query.shape[2]
    *_, first_row, first_column = start(plan, inputs)
    operands: dict[str, Any] = {
        "factors": _kernels.numbers(inputs.scale, dropout_scale(plan, inputs), dtype=inputs.dtype),
        "first": _kernels.numbers(first_row, first_column, dtype=jnp.int32),
        "visited": visited_by_example(plan, inputs).astype(jnp.int32),
        "alignment": inputs.alignment[None],
        "query_lengths": None if inputs.query_lengths is None else inputs.query_lengths[None],
        "key_lengths": None if inputs.key_lengths is None else inputs.key_lengths[None],
        "dropout": None if inputs.dropout is None else _dropout_operand(plan, inputs),
    }
    operands = {name: x for name, x in operands.items() if x is not None}
    specs = dict.fromkeys(operands, _kernels.SCALARS)
    examples, *tiles = operands["visited"].shape
    if examples > 1:
        # Those of all examples may be more than scalar memory takes.
        specs["visited"] = pl.BlockSpec(
            (1, *tiles), lambda b, n, i, j: (b, 0, 0), memory_space=pltpu.SMEM
        )

    operands["query"] = _padded(rows, _heads_joined(inputs.query), 2)
    specs["query"] = _of_queries(rows, inputs.query.shape[-1])
    for name in ("key", "value"):
        x = getattr(inputs, name).swapaxes(2, 3)
        operands[name] = _padded(columns, x, 2)
        specs[name] = pl.BlockSpec(
            (None, None, columns.block_size, x.shape[-1]),
            lambda b, n, i, j: (b, lax.div(n, np.int32(groups)), j, 0),
        )
    if inputs.query_segment_ids is not None:
        assert inputs.key_segment_ids is not None
        queries, keys = inputs.query_segment_ids[:, :, 0, :, 0], inputs.key_segment_ids[:, :, 0, 0]
        for name, x, axis in (("query", queries, rows), ("key", keys, columns)):
            operands[f"{name}_segment_ids"] = _padded(axis, x.astype(jnp.int32), 2)
        specs["query_segment_ids"] = pl.BlockSpec(
            (None, 1, rows.block_size), lambda b, n, i, j: (b, 0, i)
        )
        specs["key_segment_ids"] = pl.BlockSpec(
            (None, 1, columns.block_size), lambda b, n, i, j: (b, 0, j)
        )
    return operands, specs


def _dropout_operand(plan: Plan, inputs: Inputs) -> jax.Array:
    assert inputs.dropout is not None
    shape = inputs.dropout.description.shape
    return _kernels.operand(inputs.dropout.tile(shape, start(plan, inputs), (0,) * len(shape)))


def _padded(blocks: Axis, x: jax.Array, axis: int) -> jax.Array:
    padding = blocks.block_size * blocks.num_blocks - blocks.length
    return jnp.pad(x, [(0, padding if a == axis else 0) for a in range(x.ndim)]) if padding else x


def _heads_joined(x: jax.Array) -> jax.Array:
    """From (B, K, G, ...) to (B, N, ...)."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _of_queries(rows: Axis, features: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, rows.block_size, features), lambda b, n, i, j: (b, n, i, 0))


def _of_query_numbers(rows: Axis) -> pl.BlockSpec:
    """One number per query: along the lanes, or memory would have 128 of each."""
    return pl.BlockSpec((None, None, 1, rows.block_size), lambda b, n, i, j: (b, n, 0, i))


def _compiler_params(*semantics: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_ON_CHIP_BYTES)


# --- kernels ------------------------------------------------------------------------------


def _forward_kernel(
    static: _Static,
    inputs: dict[str, Any],
    output: Any,
    residual: Any,
    total: Any,
    maximum: Any,
    weighted: Any,
) -> None:
    b, n, i, j = (pl.program_id(axis) for axis in range(4))

    @pl.when(j == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)
        maximum[...] = jnp.full(maximum.shape, -jnp.inf, maximum.dtype)
        weighted[...] = jnp.zeros(weighted.shape, weighted.dtype)

    @pl.when(inputs["visited"][0, i, j] != 0)
    def _() -> None:
        logits, _ = _logits(static, inputs, b, n, i, j)
        old = maximum[:, :1]
        new = jnp.maximum(old, logits.max(-1, keepdims=True))
        shift = jnp.where(new == -jnp.inf, 0, new)
        weights = jnp.exp(logits - shift)
        decay = jnp.exp(old - shift)
        total[...] = total[...] * decay + weights.sum(-1, keepdims=True)
        maximum[...] = jnp.broadcast_to(new, maximum.shape)
        if _drops_weights(static):
            weights = jnp.where(_keep(static, inputs, b, n, i, j), weights, 0)
        value = inputs["value"][...]
        finite = _finite(static, value)
        weighted[...] = weighted[...] * decay + _product(static, weights, finite, 1, 0)
        if static.drops_keys:
            _add_surplus(weights, value, finite, weighted)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        sums = total[:, :1]
        some = sums > 0
        sums = jnp.where(some, sums, 1)
        output[...] = (weighted[...] * (inputs["factors"][0, 1] / sums)).astype(output.dtype)
        residual[...] = _as_row(jnp.where(some, maximum[:, :1] + jnp.log(sums), -jnp.inf))


def _backward_kernel(
    static: _Static, inputs: dict[str, Any], query_bar: Any, key_bar: Any, value_bar: Any
) -> None:
    b, n, chunk, j, row = (pl.program_id(axis) for axis in range(5))
    size = static.plan.rows.block_size
    i = chunk * pl.num_programs(4) + row
    rows = pl.ds(row * size, size)

    @pl.when(row == 0)
    def _() -> None:
        key_bar[...] = jnp.zeros(key_bar.shape, key_bar.dtype)
        value_bar[...] = jnp.zeros(value_bar.shape, value_bar.dtype)

    @pl.when(j == 0)
    def _() -> None:
        query_bar[rows, :] = jnp.zeros((size, query_bar.shape[-1]), query_bar.dtype)

    @pl.when(inputs["visited"][0, i, j] != 0)
    def _() -> None:
        logits, slope = _logits(static, inputs, b, n, i, j)
        residual = _as_column(inputs["residual"][...])
        weights = jnp.exp(logits - jnp.where(residual == -jnp.inf, 0, residual))
        query, key, value = (
            _finite(static, inputs[name][...]) for name in ("query", "key", "value")
        )
        output_bar = inputs["output_bar"][...]
        weights_bar = _product(static, output_bar, value, 1, 1)
        dropped = weights
        if _drops_weights(static):
            keep = _keep(static, inputs, b, n, i, j)
            dropped = jnp.where(keep, weights, 0)
            weights_bar = jnp.where(keep, weights_bar, 0)
        value_bar[...] += _product(static, dropped, output_bar, 0, 0)
        logits_bar = weights * (weights_bar - _as_column(inputs["offset"][...]))
        if slope is not None:
            logits_bar *= slope
        query_bar[rows, :] += _product(static, logits_bar, key, 1, 0)
        key_bar[...] += _product(static, logits_bar, query, 0, 0)


def _logits(
    static: _Static, inputs: dict[str, Any], b: Any, n: Any, i: Any, j: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Logits of a tile, -inf where a query may not attend, and their slope by the soft cap."""
    plan = static.plan
    logits = _product(static, inputs["query"][...], inputs["key"][...], 1, 1)
    logits *= inputs["factors"][0, 0]
    slope = None
    if plan.soft_cap is not None:
        capped = jnp.tanh(logits / plan.soft_cap)
        logits, slope = plan.soft_cap * capped, 1 - capped * capped
    conditions = _conditions(static, inputs, b, i, j)
    if plan.drops_logits and static.dropout is not None:
        conditions.append(_keep(static, inputs, b, n, i, j))
    if conditions:
        together = functools.reduce(jnp.logical_and, conditions)
        logits = jnp.where(together, logits, -jnp.inf)
        slope = None if slope is None else jnp.where(together, slope, 0)
    return logits, slope


def _conditions(static: _Static, inputs: dict[str, Any], b: Any, i: Any, j: Any) -> list[jax.Array]:
    plan = static.plan
    first_row, first_column = inputs["first"][0, 0], inputs["first"][0, 1]
    shape = (plan.rows.block_size, 1), (1, plan.columns.block_size)
    row = lax.broadcasted_iota(jnp.int32, shape[0], 0) + (i * shape[0][0] + first_row)
    column = lax.broadcasted_iota(jnp.int32, shape[1], 1) + (j * shape[1][1] + first_column)

    def of_example(name: str) -> Any:
        numbers = inputs.get(name)
        return None if numbers is None else numbers[0, b if numbers.shape[1] > 1 else 0]

    conditions = within_limits(
        plan,
        (first_row, first_column),
        row,
        row + of_example("alignment"),
        column,
        of_example("query_lengths"),
        of_example("key_lengths"),
    )
    if "query_segment_ids" in inputs:
        queries = _as_column(inputs["query_segment_ids"][...])
        conditions.append(queries == inputs["key_segment_ids"][...])
    return conditions


def _drops_weights(static: _Static) -> bool:
    return static.dropout is not None and not static.plan.drops_logits


def _keep(static: _Static, inputs: dict[str, Any], b: Any, n: Any, i: Any, j: Any) -> jax.Array:
    assert static.dropout is not None
    lead = (b, n)[4 - len(static.dropout.shape) :]
    shape = (*(1 for _ in lead), static.plan.rows.block_size, static.plan.columns.block_size)
    return _kernels.keep_tile(static.dropout, inputs["dropout"], shape, (*lead, i, j))


def _product(static: _Static, x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Multiplies along the given axes with float32 sums, after rounding ``x`` to y's dtype."""
    return lax.dot_general(
        x.astype(y.dtype),
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=static.plan.precision,
        preferred_element_type=jnp.float32,
    )


def _finite(static: _Static, x: jax.Array) -> jax.Array:
    """Replaces NaN and infinity by 0: times a weight of 0 they would be NaN."""
    return jnp.where(_is_finite(x), x, 0) if static.drops_keys else x


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32)) < jnp.inf


def _add_surplus(weights: jax.Array, value: jax.Array, finite: jax.Array, weighted: Any) -> None:
    """Adds what `_finite` took from the values, for queries with a weight on such a value."""
    infinite = jnp.where(_is_finite(value), np.float32(0), np.float32(1))

    @pl.when(infinite.max() > 0)
    def _() -> None:
        attended = jnp.where(weights != 0, np.float32(1), np.float32(0))
        count = jnp.dot(attended, infinite, preferred_element_type=jnp.float32)
        surplus = (value - finite).astype(jnp.float32).sum(0, keepdims=True)
        weighted[...] += jnp.where(count > 0, surplus, 0)


def _as_row(column: jax.Array) -> jax.Array:
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _as_column(row: jax.Array) -> jax.Array:
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
