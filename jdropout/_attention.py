"""Attention with dropout in blocks: memory is linear in the lengths, the mask is the law's.

Read from the top: the public function canonicalises its arguments, `_attend` is the attention
of a plan and its inputs, `_forward` computes it by an online softmax and `_tangent` is its
derivative. Reverse mode is the transpose of `_tangent`, made by JAX: `jax.checkpoint` around a
row and around a block of it leaves nothing behind but inputs, output and log-sum-exp.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jdropout import _checks, _mask, _sites
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate

_Carry = TypeVar("_Carry")

# Queries and keys in a block, measured by `benchmarks/run.py --only attention_blocks`: the largest
# that pays, halved to the smallest as long as the blocks of all examples and heads together have
# more elements than stay near the processor.
_LARGEST_BLOCK = (512, 256)
_SMALLEST_BLOCK = (128, 128)
_ELEMENTS_AT_ONCE = 2**20


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    dropout_key: Key | None,
    dropout_rate: Rate,
    deterministic: Flag = ...,
    is_causal: bool = ...,
    scale: ArrayLike | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    dropout_broadcast_dims: Sequence[int] = ...,
    dropout_precision: int | None = ...,
    start: Sequence[Index] | None = ...,
    global_shape: Sequence[int] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
    block_sizes: tuple[int, int] | None = ...,
    return_residual: Literal[False] = ...,
) -> jax.Array: ...
@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    dropout_key: Key | None,
    dropout_rate: Rate,
    deterministic: Flag = ...,
    is_causal: bool = ...,
    scale: ArrayLike | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    dropout_broadcast_dims: Sequence[int] = ...,
    dropout_precision: int | None = ...,
    start: Sequence[Index] | None = ...,
    global_shape: Sequence[int] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
    block_sizes: tuple[int, int] | None = ...,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    dropout_key: Key | None,
    dropout_rate: Rate,
    deterministic: Flag = False,
    is_causal: bool = False,
    scale: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_broadcast_dims: Sequence[int] = (),
    dropout_precision: int | None = None,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: jax.lax.PrecisionLike = None,
    block_sizes: tuple[int, int] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention with dropout on its probabilities, without an array of T x S elements.

    ``softmax(scale * query @ key.T + bias)`` over the keys that are not masked, then dropout on
    these probabilities, then the product with the values. The mask is
    ``keep_mask(dropout_key, dropout_rate, (B, N, T, S))``, whatever the block sizes, sharding
    and grouping of heads. It is made block by block, again in the backward pass, and never
    stored. Names, shapes and behaviour are those of `jax.nn.dot_product_attention`, but for
    queries that may attend to no key: theirs is an output of zeros.

    Sizes: batch B, queries T, keys S, heads N, heads of key and value K (N is a multiple of K),
    features H. All modes of differentiation work, of any order. Forward and backward pass need
    memory for the inputs, the output, one number per query and head, and some blocks.

    Args:
      query: array of shape (B, T, N, H) or (T, N, H); float16, bfloat16, float32 or float64.
      key: array of shape (B, S, K, H) or (S, K, H), of the same dtype.
      value: array of shape (B, S, K, V) or (S, K, V), of the same dtype. V is H for most.
      bias: added to the logits; floating-point, broadcastable to (B, N, T, S) or (N, T, S).
      mask: booleans, True where a query may attend to a key; broadcastable likewise.
      dropout_key: a PRNG key, as for `dropout`; may be None where no mask is drawn.
      dropout_rate: probability of dropping, as for `dropout`.
      deterministic: whether to leave dropout out; may be traced.
      is_causal: whether queries attend to no later key.
      scale: of the logits, a number or (traced) scalar; ``1 / sqrt(H)`` by default.
      query_seq_lengths: int32 array of shape (B,): later queries have an output of zeros.
      key_value_seq_lengths: int32 array of shape (B,): later keys are masked.
      local_window_size: attend to this many keys before and after the own position; a pair for
        two different numbers.
      dropout_broadcast_dims: axes of (B, N, T, S), or (N, T, S), along which dropout's mask is
        shared; ``(0, 1)`` is what Flax calls ``broadcast_dropout``.
      dropout_precision: bits of the rate, as ``precision`` of `dropout`.
      start: position (batch, head, query, key) of the first probability in an attention matrix
        of ``global_shape``, of which this call computes a part, as in ``shard_map``; without
        the batch if the query has none. The dropout mask, ``is_causal``, ``local_window_size``
        and the lengths then refer to positions in the whole.
      global_shape: shape (B, N, T, S), or (N, T, S), of the whole; needed with ``start``.
      precision: of the products, as in `jax.numpy.einsum`.
      block_sizes: numbers of queries and keys in a block; chosen by measurement by default.
        Where the queries are sharded by the compiler, give the whole T for the first.
      return_residual: whether to return also the log-sum-exp of the logits.

    Returns:
      The output, of shape (B, T, N, V) or (T, N, V) and the query's dtype. With
      ``return_residual`` a pair of it and the log-sum-exp (before dropout), of shape (B, T, N)
      or (T, N), float32 (float64 for float64): differentiable, and what is needed to merge
      the results of several parts of the keys.

    Raises:
      TypeError: if an argument has a wrong type or dtype.
      ValueError: if shapes do not fit, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> query, key, value = (jax.random.normal(k, (2, 1024, 8, 64)) for k in keys[:3])
      >>> y = jdropout.dot_product_attention(
      ...     query, key, value, dropout_key=keys[3], dropout_rate=0.1, is_causal=True
      ... )
      >>> y.shape
      (2, 1024, 8, 64)

    References:
      Vaswani et al., "Attention is all you need" (2017), section 5.4, for the dropout; Milakov
      and Gimelshein, "Online normalizer calculation for softmax" (2018), and Dao, Fu, Ermon,
      Rudra and Ré, "FlashAttention" (2022), section 3.1, for the blocks.
    """
    query, key, value = _checks.check_attention_inputs(query, key, value)
    *batch, length, heads, features = query.shape
    key_length = key.shape[-3]
    shape = (*batch, heads, length, key_length)
    bias = _checks.check_logits_operand("bias", bias, shape)
    mask = _checks.check_logits_operand("mask", mask, shape)
    query_seq_lengths = _checks.check_lengths("query_seq_lengths", query_seq_lengths, batch)
    key_value_seq_lengths = _checks.check_lengths(
        "key_value_seq_lengths", key_value_seq_lengths, batch
    )
    window = _checks.check_window(local_window_size)
    scale = 1 / math.sqrt(features) if scale is None else _checks.check_scale(scale)
    rows, columns = _checks.check_block_sizes(block_sizes) or _block_sizes(query)
    flag = _checks.check_deterministic(deterministic)
    described, operands = _mask.describe(
        dropout_key,
        dropout_rate,
        flag,
        shape,
        dropout_broadcast_dims,
        start,
        global_shape,
        dropout_precision,
        prefix="dropout_",
    )
    site = _sites.site("attention", shape, dropout_rate, flag, described, operands)
    if operands is not None:
        operands = site.operands(operands)
    first, _ = _checks.check_block(start, global_shape, shape)
    first = first or (0,) * len(shape)

    plan = _Plan(
        rows=_axis(length, rows),
        columns=_axis(key_length, columns),
        start=tuple(None if isinstance(index, jax.Array) else int(index) for index in first),
        is_causal=bool(is_causal),
        window=window,
        mask=None if operands is None else described,
        precision=precision,
    )
    inputs = _Inputs(
        query=query,
        key=key,
        value=value,
        bias=bias,
        scale=scale,
        mask=mask,
        query_lengths=query_seq_lengths,
        key_lengths=key_value_seq_lengths,
        start=tuple(index if isinstance(index, jax.Array) else None for index in first),
        dropout=None if operands is None else operands._replace(origin=None),
    )
    output, residual = _attention(inputs, plan)
    if described is not None and operands is None:
        output = jnp.zeros_like(output)  # rate 1
    output = site.result(output)
    return (output, residual) if return_residual else output


class _Axis(NamedTuple):
    """An axis of the attention matrix, cut into blocks; the last one may be padded."""

    length: int
    block_size: int
    num_blocks: int


class _Plan(NamedTuple):
    """All that is static about a call."""

    rows: _Axis
    columns: _Axis
    start: tuple[int | None, ...]
    """Position of the first probability in the whole matrix; None where it is traced."""
    is_causal: bool
    window: tuple[int, int] | None
    mask: _mask.Mask | None
    precision: Any


class _Inputs(NamedTuple):
    """All that may be traced. Inside of `_attend` the heads N are split into groups, K x G."""

    query: jax.Array
    """(B, K, G, T, H) in `_attend`"""
    key: jax.Array
    """(B, K, H, S) in `_attend`: the products of the backward pass are faster this way."""
    value: jax.Array
    """(B, K, V, S) in `_attend`"""
    bias: jax.Array | None
    """Five axes in `_attend`, each the size of (B, K, G, T, S) or 1; so has the mask."""
    scale: Any
    mask: jax.Array | None
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None
    start: tuple[Any, ...]
    """Traced positions, None where they are static."""
    dropout: _mask.Operands | None

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the softmax and of all sums."""
        return _wide(self.query.dtype)


def _block_sizes(query: jax.Array) -> tuple[int, int]:
    *batch, length, heads, _ = query.shape
    sizes = list(_LARGEST_BLOCK)
    for axis, smallest in enumerate(_SMALLEST_BLOCK):
        elements = math.prod(batch) * heads * math.prod(sizes)
        halvings = max(0, math.ceil(math.log2(max(elements, 1) / _ELEMENTS_AT_ONCE)))
        sizes[axis] = max(smallest, sizes[axis] >> halvings)
    spec = jax.typeof(query).sharding.spec
    if len(spec) == query.ndim and spec[-3] is not None:  # explicitly sharded queries
        sizes[0] = length
    return sizes[0], sizes[1]


def _axis(length: int, block: int) -> _Axis:
    if length <= block:
        return _Axis(length, max(length, 1), 1)
    return _Axis(length, block, -(-length // block))


@functools.partial(jax.jit, static_argnames="plan")
def _attention(inputs: _Inputs, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    sharding = jax.typeof(inputs.query).sharding
    explicit = sharding.mesh.explicit_axes
    if not explicit:
        return _attention_in_groups(inputs, plan)
    spec = sharding.spec
    shardings = tuple(
        jax.sharding.NamedSharding(sharding.mesh, jax.P(*axes))
        for axes in ((*spec[:-1], None), spec[:-1])
    )
    attention = functools.partial(_attention_in_groups, plan=plan)
    return jax.sharding.auto_axes(attention, axes=explicit, out_sharding=shardings)(inputs)


def _attention_in_groups(inputs: _Inputs, plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """Brings the axes into the order that `_attend` wants, and back."""
    *batch, length, heads, features = inputs.query.shape
    key_length, key_heads = inputs.key.shape[-3:-1]
    batch_size, groups = math.prod(batch), heads // key_heads

    def grouped(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        sizes = (1,) * (4 - x.ndim) + x.shape
        head_sizes = (1, 1) if sizes[1] == 1 else (key_heads, groups)
        return x.reshape(sizes[0], *head_sizes, *sizes[2:])

    def features_first(x: jax.Array) -> jax.Array:
        return x.reshape(batch_size, key_length, key_heads, x.shape[-1]).transpose(0, 2, 3, 1)

    query = inputs.query.reshape(batch_size, length, key_heads, groups, features)
    inputs = inputs._replace(
        query=query.transpose(0, 2, 3, 1, 4),
        key=features_first(inputs.key),
        value=features_first(inputs.value),
        bias=grouped(inputs.bias),
        mask=grouped(inputs.mask),
        scale=jnp.asarray(inputs.scale, inputs.dtype),
        dropout=None if inputs.dropout is None else _mask.with_words(inputs.dropout),
    )
    output, residual = _attend(plan, _varying(inputs))
    output, residual = (jnp.moveaxis(x, 3, 1) for x in (output, residual))
    shape = (*batch, length, heads)
    return output.reshape(*shape, output.shape[-1]), residual.reshape(shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    """Output (B, K, G, T, V), and log-sum-exp (B, K, G, T)."""
    return _forward(plan, inputs)


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(plan: _Plan, primals: Any, tangents: Any) -> Any:
    (inputs,), (dots,) = primals, tangents
    output, residual = _attend(plan, inputs)
    named = {name: getattr(dots, name) for name in ("query", "key", "value", "bias", "scale")}
    dots = {
        # Cotangents are summed over the blocks in this dtype.
        name: dot.astype(inputs.dtype)
        for name, dot in named.items()
        if dot is not None and not isinstance(dot, SymbolicZero)
    }
    # By jax.jvp of a linear map: JAX 0.8 cannot transpose a loop that a custom rule binds itself.
    tangent = functools.partial(_tangent, plan, inputs, output, residual)
    zeros = jax.tree.map(jnp.zeros_like, dots)
    return (output, residual), jax.jvp(tangent, (zeros,), (dots,))[1]


def _forward(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    """The online softmax: block by block along the keys, for a block of queries at a time."""
    tiles = _tile(plan, inputs._asdict())
    zero = _zero(inputs)
    batch_shape = inputs.query.shape[:3]
    row_shape = (*batch_shape, plan.rows.block_size)

    def row(_: None, xs: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        i, in_row, in_cells = xs

        def column(carry: Any, xs: Any) -> tuple[Any, None]:
            j, in_column, in_cell = xs
            block = in_row | in_column | in_cell

            def visit(carry: Any) -> Any:
                total, maximum, weighted = carry
                logits = _logits(plan, inputs, block, i, j)
                new_maximum = jnp.maximum(maximum, logits.max(-1))
                shift = jnp.where(new_maximum == -jnp.inf, 0, new_maximum)
                weights = jnp.exp(logits - shift[..., None])
                decay = jnp.exp(maximum - shift)
                total = total * decay + weights.sum(-1)
                weights = _drop(plan, inputs, i, j, weights)
                products = _product(
                    "bkgts,bkvs->bkgtv", weights, block["value"], plan, inputs.dtype
                )
                return total, new_maximum, weighted * decay[..., None] + products

            return _where_needed(plan, inputs, i, j, visit, lambda carry: carry, carry), None

        start = (
            jnp.zeros(row_shape, inputs.dtype) + zero,
            jnp.full(row_shape, -jnp.inf, inputs.dtype) + zero,
            jnp.zeros((*row_shape, inputs.value.shape[2]), inputs.dtype) + zero,
        )
        columns = (_indices(plan.columns), tiles.columns, in_cells)
        (total, maximum, weighted), _ = lax.scan(column, start, columns)
        some = total > 0
        total = jnp.where(some, total, 1)
        output = weighted * (_dropout_scale(plan, inputs) / total)[..., None]
        residual = jnp.where(some, maximum + jnp.log(total), -jnp.inf)
        return None, (output.astype(inputs.query.dtype), residual)

    rows = (_indices(plan.rows), tiles.rows, tiles.cells)
    _, (output, residual) = lax.scan(row, None, rows)
    return _join(plan.rows, output), _join(plan.rows, residual)


def _tangent(
    plan: _Plan,
    inputs: _Inputs,
    output: jax.Array,
    residual: jax.Array,
    dots: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The derivative along ``dots``, linear in them.

    With logits s, probabilities P, mask and scale of dropout M and r = sum_j(P ds):
    d(output) = sum_j (M P ds) v + (M P) dv - output r, and d(log-sum-exp) = r.
    """
    constants = {"output": output, "residual": residual}
    tiles = _tile(plan, inputs._asdict() | constants)
    dot_tiles = _tile(plan, dots)
    zero = _zero(inputs)
    row_shape = (*inputs.query.shape[:3], plan.rows.block_size)
    nothing = (
        jnp.zeros((*row_shape, inputs.value.shape[2]), inputs.dtype) + zero,
        jnp.zeros(row_shape, inputs.dtype) + zero,
    )
    linear_product = functools.partial(_linear_product, plan=plan, dtype=inputs.query.dtype)

    @_remade
    def row(xs: Any, columns: Any) -> tuple[jax.Array, jax.Array]:
        i, (in_row, in_cells), (dots_in_row, dots_in_cells) = xs

        @_remade
        def column(xs: Any, in_row: Any, dots_in_row: Any) -> tuple[jax.Array, jax.Array]:
            j, in_column, in_cell, dots_in_column, dots_in_cell = xs
            block = in_row | in_column | in_cell
            dot = dots_in_row | dots_in_column | dots_in_cell | {"scale": dots.get("scale")}

            def visit(dot: Any) -> tuple[jax.Array, jax.Array]:
                logits = _logits(plan, inputs, block, i, j)
                shift = jnp.where(block["residual"] == -jnp.inf, 0, block["residual"])
                weights = jnp.exp(logits - shift[..., None])
                logits_dot = jnp.zeros_like(weights)
                if "query" in dot:
                    product = linear_product("bkgth,bkhs->bkgts", dot["query"], block["key"])
                    logits_dot += product * inputs.scale
                if "key" in dot:
                    product = linear_product("bkgth,bkhs->bkgts", block["query"], dot["key"])
                    logits_dot += product * inputs.scale
                if "bias" in dot:
                    logits_dot += dot["bias"]
                if dot["scale"] is not None:
                    logits_dot += dot["scale"] * _query_key(plan, inputs, block)
                weights_dot = weights * logits_dot
                total_dot = weights_dot.sum(-1)
                weights_dot = _drop(plan, inputs, i, j, weights_dot)
                output_dot = linear_product("bkgts,bkvs->bkgtv", weights_dot, block["value"])
                if "value" in dot:
                    weights = _drop(plan, inputs, i, j, weights)
                    output_dot += linear_product("bkgts,bkvs->bkgtv", weights, dot["value"])
                return output_dot, total_dot

            return _where_needed(plan, inputs, i, j, visit, lambda dot: nothing, dot)

        def add(carry: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, column(xs, in_row, dots_in_row)), None

        xs = (_indices(plan.columns), columns[0], in_cells, columns[1], dots_in_cells)
        (output_dot, total_dot), _ = lax.scan(add, nothing, xs)
        output_dot = output_dot * _dropout_scale(plan, inputs)
        output_dot -= in_row["output"].astype(inputs.dtype) * total_dot[..., None]
        return output_dot.astype(inputs.query.dtype), total_dot

    columns = (tiles.columns, dot_tiles.columns)
    rows = (
        _indices(plan.rows),
        (tiles.rows, tiles.cells),
        (dot_tiles.rows, dot_tiles.cells),
    )
    _, (output_dot, residual_dot) = lax.scan(lambda _, xs: (None, row(xs, columns)), None, rows)
    return _join(plan.rows, output_dot), _join(plan.rows, residual_dot)


_remade = functools.partial(jax.checkpoint, prevent_cse=False)


# --- one block ----------------------------------------------------------------------------


def _logits(plan: _Plan, inputs: _Inputs, block: dict[str, jax.Array], i: Any, j: Any) -> jax.Array:
    """Logits of a block, -inf where a query must not attend."""
    logits = _query_key(plan, inputs, block) * inputs.scale
    if "bias" in block:
        logits = logits + block["bias"].astype(inputs.dtype)
    allowed = _allowed(plan, inputs, i, j)
    if "mask" in block:
        allowed.append(block["mask"])
    if not allowed:
        return logits
    together = functools.reduce(jnp.logical_and, allowed)
    return jnp.where(together, logits, -jnp.inf)


def _query_key(plan: _Plan, inputs: _Inputs, block: dict[str, jax.Array]) -> jax.Array:
    return _product("bkgth,bkhs->bkgts", block["query"], block["key"], plan, inputs.dtype)


def _allowed(plan: _Plan, inputs: _Inputs, i: Any, j: Any) -> list[jax.Array]:
    """Conditions on the positions of a block's queries and keys, each of five axes."""
    shape = (1, 1, 1, plan.rows.block_size, plan.columns.block_size)
    row = lax.broadcasted_iota(jnp.int32, (*shape[:-1], 1), 3) + i * plan.rows.block_size
    column = lax.broadcasted_iota(jnp.int32, (*shape[:-2], 1, shape[-1]), 4)
    column = column + j * plan.columns.block_size
    allowed = []
    if plan.columns.block_size * plan.columns.num_blocks > plan.columns.length:
        allowed.append(column < plan.columns.length)
    if plan.rows.block_size * plan.rows.num_blocks > plan.rows.length:
        allowed.append(row < plan.rows.length)  # or a bias could be too much for the padding's exp
    *_, first_row, first_column = _start(plan, inputs)
    row, column = row + first_row, column + first_column
    if plan.is_causal:
        allowed.append(column <= row)
    if plan.window is not None:
        before, after = plan.window
        allowed += [column >= row - before, column <= row + after]
    if inputs.query_lengths is not None:
        allowed.append(row < inputs.query_lengths.astype(jnp.int32).reshape(-1, 1, 1, 1, 1))
    if inputs.key_lengths is not None:
        allowed.append(column < inputs.key_lengths.astype(jnp.int32).reshape(-1, 1, 1, 1, 1))
    return allowed


def _where_needed(
    plan: _Plan,
    inputs: _Inputs,
    i: jax.Array,
    j: jax.Array,
    visit: Callable[[Any], _Carry],
    skip: Callable[[Any], _Carry],
    operand: Any,
) -> _Carry:
    """Visits a block unless causality or the window masks all of it."""
    *_, row, column = _start(plan, inputs)
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


def _drop(plan: _Plan, inputs: _Inputs, i: Any, j: Any, weights: jax.Array) -> jax.Array:
    """Applies dropout's mask, but not its scale, to a block of five axes."""
    if plan.mask is None:
        return weights
    assert inputs.dropout is not None
    lead = plan.mask.full_shape[:-2]
    shape = (*lead, plan.rows.block_size, plan.columns.block_size)
    operands, mask = _mask.tile(
        inputs.dropout, plan.mask, shape, _start(plan, inputs), (0,) * len(lead) + (i, j)
    )
    kept = _mask.keep(operands, mask).reshape(weights.shape)
    return jnp.where(kept, weights, 0)


def _dropout_scale(plan: _Plan, inputs: _Inputs) -> Any:
    if plan.mask is None:
        return np.ones((), inputs.dtype)
    assert inputs.dropout is not None
    return _mask.scale(inputs.dropout, plan.mask, inputs.dtype)


def _start(plan: _Plan, inputs: _Inputs) -> tuple[Index, ...]:
    return tuple(
        traced.astype(jnp.int32) if static is None else static
        for static, traced in zip(plan.start, inputs.start, strict=True)
    )


def _product(
    subscripts: str, x: jax.Array, y: jax.Array, plan: _Plan, dtype: np.dtype
) -> jax.Array:
    """A product with sums in ``dtype``; a floating-point ``x`` is rounded to y's dtype before."""
    return jnp.einsum(
        subscripts,
        x.astype(y.dtype),
        y,
        precision=plan.precision,
        preferred_element_type=dtype,
    )


def _linear_product(
    subscripts: str, x: jax.Array, y: jax.Array, plan: _Plan, dtype: np.dtype
) -> jax.Array:
    """A product whose transposes have operands of ``dtype`` too, for the sake of matrix units."""
    product = _product(subscripts, x.astype(dtype), y.astype(dtype), plan, dtype)
    return product.astype(_wide(dtype))


def _wide(dtype: np.dtype) -> np.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# --- tiles --------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """Arrays cut into blocks, by name; one, one or two leading axes count the blocks."""

    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]
    cells: dict[str, jax.Array]


def _tile(plan: _Plan, arrays: dict[str, Any]) -> _Tiles:
    """Cuts what has queries or keys along its axes; the rest is left out."""
    tiles = _Tiles({}, {}, {})
    for name, x in arrays.items():
        if x is None:
            continue
        if name in ("query", "output", "residual"):
            tiles.rows[name] = _split(plan.rows, x, 3)
        elif name in ("key", "value"):
            tiles.columns[name] = _split(plan.columns, x, 3)
        elif name in ("bias", "mask"):
            if x.shape[3] == 1:
                x = jnp.broadcast_to(x, (*x.shape[:4], plan.columns.length))
                tiles.columns[name] = _split(plan.columns, x, 4)
            elif x.shape[4] == 1:
                tiles.rows[name] = _split(plan.rows, x, 3)
            else:
                rows = _split(plan.rows, x, 3)
                tiles.cells[name] = jnp.swapaxes(_split(plan.columns, rows, 5), 0, 1)
    return tiles


def _split(blocks: _Axis, x: jax.Array, axis: int) -> jax.Array:
    padding = blocks.block_size * blocks.num_blocks - blocks.length
    if padding:
        x = jnp.pad(x, [(0, padding if a == axis else 0) for a in range(x.ndim)])
    shape = (*x.shape[:axis], blocks.num_blocks, blocks.block_size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _indices(blocks: _Axis) -> jax.Array:
    return lax.iota(jnp.int32, blocks.num_blocks)


def _join(blocks: _Axis, x: jax.Array) -> jax.Array:
    """Undoes `_split` along axis 3."""
    x = jnp.moveaxis(x, 0, 3)
    x = x.reshape(*x.shape[:3], blocks.num_blocks * blocks.block_size, *x.shape[5:])
    return lax.slice_in_dim(x, 0, blocks.length, axis=3)


# --- shard_map ----------------------------------------------------------------------------


def _varying(inputs: _Inputs) -> _Inputs:
    """Lets the differentiable inputs vary over the same devices of a `shard_map`.

    JAX would do so where they meet, which is inside of the branches of a condition that varies
    too, and the transpose is a collective that some devices then never reach.
    """
    zero = _zero(inputs)
    return inputs._replace(
        query=inputs.query + zero.astype(inputs.query.dtype),
        key=inputs.key + zero.astype(inputs.key.dtype),
        value=inputs.value + zero.astype(inputs.value.dtype),
        bias=None if inputs.bias is None else inputs.bias + zero.astype(inputs.bias.dtype),
        scale=inputs.scale + zero,
    )


def _zero(inputs: _Inputs) -> jax.Array:
    """A zero that varies over the devices of a `shard_map` as a function of the inputs does."""
    zeros = [
        lax.full_like(leaf, 0, shape=(), dtype=inputs.dtype) for leaf in jax.tree.leaves(inputs)
    ]
    return functools.reduce(jnp.add, zeros)
