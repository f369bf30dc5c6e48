"""The online softmax with dropout over the blocks, and its derivative."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jdropout._attention._biases import array_name, biases, biases_dot, of_each_example
from jdropout._attention._blocks import (
    Inputs,
    Plan,
    Plans,
    Tiles,
    by_platform,
    cut,
    join,
    tile,
)
from jdropout._attention._dropout import drop, dropout_scale, keep
from jdropout._attention._loops import over_blocks
from jdropout._attention._masks import (
    allowed,
    drops_keys,
    positions,
    visited,
)
from jdropout._dtypes import wide_dtype


@functools.partial(jax.jit, static_argnames=("plans", "kernel", "with_weights"))
def attention(
    inputs: Inputs, plans: Plans, kernel: bool, with_weights: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    sharding = jax.typeof(inputs.query).sharding
    explicit = sharding.mesh.explicit_axes
    attention = functools.partial(
        _attention_in_groups, plans=plans, kernel=kernel, with_weights=with_weights
    )
    if not explicit:
        return attention(inputs)
    *batch, queries, heads, _ = sharding.spec
    shardings: list[Any] = [
        jax.sharding.NamedSharding(sharding.mesh, jax.P(*axes))
        for axes in (
            (*batch, queries, heads, None),
            (*batch, queries, heads),
            (*batch, heads, queries, None),
        )
    ]
    if not with_weights:
        shardings[2] = None
    return jax.sharding.auto_axes(attention, axes=explicit, out_sharding=tuple(shardings))(inputs)


def _attention_in_groups(
    inputs: Inputs, plans: Plans, kernel: bool, with_weights: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Brings the axes into the order of `_attend`, and back."""
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
        bias_fns=jax.tree.map(lambda x: _widened(x, inputs.dtype), inputs.bias_fns),
        dropout=None if inputs.dropout is None else inputs.dropout.with_mask_keys(),
    )
    inputs = _varying(inputs)
    if kernel and 0 not in inputs.value.shape[:3]:  # a grid must not be empty
        from jdropout._attention._kernels import attend

        output, residual = attend(plans.tpu, inputs)
    else:
        output, residual = _attend(plans, inputs)
    weights = None
    if with_weights:
        weights = _weights(plans.cpu, inputs, residual)
        weights = weights.reshape(*batch, heads, length, key_length)
    output, residual = (jnp.moveaxis(x, 3, 1) for x in (output, residual))
    shape = (*batch, length, heads)
    return output.reshape(*shape, output.shape[-1]), residual.reshape(shape), weights


def _widened(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Brings floating-point numbers to the dtype of sums."""
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _weights(plan: Plan, inputs: Inputs, residual: jax.Array) -> jax.Array:
    """The probabilities before dropout of all queries and keys, dense: (B, K, G, T, S)."""
    lengths = plan.rows.length, plan.columns.length
    rows, columns = cut(lengths, lengths, skips=False)
    whole = plan._replace(rows=rows, columns=columns)
    names = ("query", "key", "bias", "mask", "query_segment_ids", "key_segment_ids")
    given = {name: getattr(inputs, name) for name in names}
    block = {name: x for name, x in given.items() if x is not None}
    logits = _logits(whole, inputs, block, 0, 0)[0]
    shift = jnp.where(residual == -jnp.inf, 0, residual)
    return jnp.exp(logits - shift[..., None]).astype(inputs.query.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(plans: Plans, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns the output (B, K, G, T, V) and the log-sum-exp (B, K, G, T)."""
    results: tuple[jax.Array, jax.Array] = by_platform(_forward, plans, inputs)
    return results


@functools.partial(_attend.defjvp, symbolic_zeros=True)
def _attend_jvp(plans: Plans, primals: Any, tangents: Any) -> Any:
    (inputs,), (dots,) = primals, tangents
    output, residual = _attend(plans, inputs)
    named = {name: getattr(dots, name) for name in ("query", "key", "value", "bias", "scale")}
    # What `_tangent` calls the arrays of functions of positions.
    arrays = jax.tree.leaves(dots.bias_fns, is_leaf=lambda x: isinstance(x, SymbolicZero))
    named |= {array_name(index): dot for index, dot in enumerate(arrays)}
    dots = {
        # The backward pass sums cotangents over blocks in this dtype.
        name: dot.astype(inputs.dtype)
        for name, dot in named.items()
        if dot is not None and not isinstance(dot, SymbolicZero) and dot.dtype != jax.dtypes.float0
    }
    # jax.jvp of a linear map, because JAX 0.8 cannot transpose a loop that a custom rule binds.
    tangent = functools.partial(by_platform, _tangent, plans, inputs, output, residual)
    zeros = jax.tree.map(jnp.zeros_like, dots)
    return (output, residual), jax.jvp(tangent, (zeros,), (dots,))[1]


def _forward(plan: Plan, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The online softmax: for each block of queries, one pass over the blocks of keys."""
    arrays = inputs._asdict()
    if drops_keys(plan, inputs):
        arrays["value"] = _finite(inputs.value)
        arrays["surplus"] = inputs.value - arrays["value"]
    tiles = tile(plan, arrays)
    zero = _zero(inputs)
    batch_shape = inputs.query.shape[:3]
    row_shape = (*batch_shape, plan.rows.block_size)

    start = (
        jnp.zeros(row_shape, inputs.dtype) + zero,
        jnp.full(row_shape, -jnp.inf, inputs.dtype) + zero,
        jnp.zeros((*row_shape, inputs.value.shape[2]), inputs.dtype) + zero,
    )

    def visit(carry: Any, i: Any, j: Any, in_row: Any, in_column: Any, in_cell: Any) -> Any:
        total, maximum, weighted = carry
        block = in_row | in_column | in_cell
        logits, _ = _logits(plan, inputs, block, i, j)
        new_maximum = jnp.maximum(maximum, logits.max(-1))
        shift = jnp.where(new_maximum == -jnp.inf, 0, new_maximum)
        weights = jnp.exp(logits - shift[..., None])
        decay = jnp.exp(maximum - shift)
        total = total * decay + weights.sum(-1)
        weights = drop(plan, inputs, i, j, weights)
        products = _product("bkgts,bkvs->bkgtv", weights, block["value"], plan, inputs.dtype)
        if "surplus" in block:
            products += _surplus(weights, block["surplus"])
        return total, new_maximum, weighted * decay[..., None] + products

    def finish(carry: Any, _: Any) -> tuple[jax.Array, jax.Array]:
        total, maximum, weighted = carry
        some = total > 0
        total = jnp.where(some, total, 1)
        output = weighted * (dropout_scale(plan, inputs) / total)[..., None]
        residual = jnp.where(some, maximum + jnp.log(total), -jnp.inf)
        return output.astype(inputs.query.dtype), residual

    results = over_blocks(plan, visited(plan, inputs), tiles, start, visit, finish)
    output, residual = (join(plan.rows, x) for x in results)
    return output, residual


def _tangent(
    plan: Plan,
    inputs: Inputs,
    output: jax.Array,
    residual: jax.Array,
    dots: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The derivative along ``dots``, linear in them.

    With logits s, probabilities P, the scaled dropout mask M and r = sum_j(P ds):
    d(output) = sum_j (M P ds) v + (M P) dv - output r, and d(log-sum-exp) = r.
    """
    constants = {"output": output, "residual": residual}
    tiles = tile(plan, inputs._asdict() | constants)
    dot_tiles = tile(plan, dots)
    zero = _zero(inputs)
    row_shape = (*inputs.query.shape[:3], plan.rows.block_size)
    nothing = (
        jnp.zeros((*row_shape, inputs.value.shape[2]), inputs.dtype) + zero,
        jnp.zeros(row_shape, inputs.dtype) + zero,
    )
    linear_product = functools.partial(_linear_product, plan=plan, dtype=inputs.query.dtype)
    clean = _finite if drops_keys(plan, inputs) else lambda x: x
    bias_fns, not_cut = of_each_example(inputs, dots)

    def visit(carry: Any, i: Any, j: Any, in_row: Any, in_column: Any, in_cell: Any) -> Any:
        block, dot = (
            row | column | cell
            for row, column, cell in zip(in_row, in_column, in_cell, strict=True)
        )
        dot |= not_cut
        logits, slope = _logits(plan, inputs, block, i, j)
        shift = jnp.where(block["residual"] == -jnp.inf, 0, block["residual"])
        weights = jnp.exp(logits - shift[..., None])
        logits_dot = jnp.zeros_like(weights)
        if "query" in dot:
            product = linear_product("bkgth,bkhs->bkgts", dot["query"], clean(block["key"]))
            logits_dot += product * inputs.scale
        if "key" in dot:
            product = linear_product("bkgth,bkhs->bkgts", clean(block["query"]), dot["key"])
            logits_dot += product * inputs.scale
        if "bias" in dot:
            logits_dot += dot["bias"]
        if "scale" in dot:
            logits_dot += dot["scale"] * clean(_query_key(plan, inputs, block))
        if any(name in dot for name in not_cut if name != "scale"):
            changed = inputs._replace(bias_fns=bias_fns)
            logits_dot += biases_dot(changed, positions(plan, inputs, i, j), dot)
        if slope is not None:
            logits_dot *= slope
        weights_dot = weights * logits_dot
        total_dot = weights_dot.sum(-1)
        weights_dot = drop(plan, inputs, i, j, weights_dot)
        output_dot = linear_product("bkgts,bkvs->bkgtv", weights_dot, clean(block["value"]))
        if "value" in dot:
            weights = drop(plan, inputs, i, j, weights)
            output_dot += linear_product("bkgts,bkvs->bkgtv", weights, dot["value"])
        return carry[0] + output_dot, carry[1] + total_dot

    def finish(carry: Any, in_row: Any) -> tuple[jax.Array, jax.Array]:
        output_dot, total_dot = carry
        output_dot = output_dot * dropout_scale(plan, inputs)
        output_dot -= in_row[0]["output"].astype(inputs.dtype) * total_dot[..., None]
        return output_dot.astype(inputs.query.dtype), total_dot

    both = Tiles(*map(_pair, tiles, dot_tiles))
    results = over_blocks(plan, visited(plan, inputs), both, nothing, visit, finish, _remade)
    output_dot, residual_dot = (join(plan.rows, x) for x in results)
    return output_dot, residual_dot


def _pair(*both: Any) -> Any:
    return both


_remade = functools.partial(jax.checkpoint, prevent_cse=False)


def _logits(
    plan: Plan, inputs: Inputs, block: dict[str, jax.Array], i: Any, j: Any
) -> tuple[jax.Array, Any]:
    """Logits of a block, -inf where a query may not attend, and their slope by the soft cap."""
    logits = _query_key(plan, inputs, block) * inputs.scale
    if "bias" in block:
        logits = logits + block["bias"].astype(inputs.dtype)
    if inputs.bias_fns:
        logits = logits + biases(inputs, positions(plan, inputs, i, j), {})
    conditions = allowed(plan, inputs, block, i, j)
    if plan.drops_logits and inputs.dropout is not None:
        conditions.append(keep(plan, inputs, i, j).reshape(logits.shape))
    slope: Any = None
    if plan.soft_cap is not None:
        # An infinite bias forbids to attend, also through a cap.
        conditions.append(logits != -jnp.inf)
        capped = jnp.tanh(logits / plan.soft_cap)
        logits, slope = plan.soft_cap * capped, 1 - capped * capped
    if conditions:
        together = functools.reduce(jnp.logical_and, conditions)
        logits = jnp.where(together, logits, -jnp.inf)
        slope = None if slope is None else jnp.where(together, slope, 0)
    return logits, slope


def _query_key(plan: Plan, inputs: Inputs, block: dict[str, jax.Array]) -> jax.Array:
    return _product("bkgth,bkhs->bkgts", block["query"], block["key"], plan, inputs.dtype)


def _finite(x: jax.Array) -> jax.Array:
    """Replaces NaN and infinity by 0: times a weight of 0 they would be NaN."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _surplus(weights: jax.Array, surplus: jax.Array) -> jax.Array:
    """What `_finite` took from the values of a block, for queries with a weight on such a value.

    A product of matrices would know for every feature which values it comes from, and double the
    time. Here all such values of the block come together if a query attends to any of them.
    """
    found = (surplus != 0).any(2)[:, :, None, None, :]
    attended = ((weights != 0) & found).any(-1, keepdims=True)
    total = surplus.sum(-1).astype(weights.dtype)[:, :, None, None, :]
    return jnp.where(attended, total, 0)


def _product(subscripts: str, x: jax.Array, y: jax.Array, plan: Plan, dtype: np.dtype) -> jax.Array:
    """Multiplies with sums in ``dtype``, after rounding ``x`` to y's dtype."""
    return jnp.einsum(
        subscripts,
        x.astype(y.dtype),
        y,
        precision=plan.precision,
        preferred_element_type=dtype,
    )


def _linear_product(
    subscripts: str, x: jax.Array, y: jax.Array, plan: Plan, dtype: np.dtype
) -> jax.Array:
    """A product whose transposes also have operands of ``dtype``, to use matrix units."""
    product = _product(subscripts, x.astype(dtype), y.astype(dtype), plan, dtype)
    return product.astype(wide_dtype(dtype))


def _varying(inputs: Inputs) -> Inputs:
    """Makes the differentiable inputs vary over the same mesh axes of a `shard_map`.

    JAX would cast them where they meet, inside the branches of a `cond` that differs between
    devices. The cast's transpose is a psum, which some devices would never reach: a deadlock.
    """
    zero = _zero(inputs)
    return inputs._replace(
        query=inputs.query + zero.astype(inputs.query.dtype),
        key=inputs.key + zero.astype(inputs.key.dtype),
        value=inputs.value + zero.astype(inputs.value.dtype),
        bias=None if inputs.bias is None else inputs.bias + zero.astype(inputs.bias.dtype),
        scale=inputs.scale + zero,
        bias_fns=jax.tree.map(
            lambda x: x + zero if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs.bias_fns
        ),
    )


def _zero(inputs: Inputs) -> jax.Array:
    """A zero that varies over the mesh axes of a `shard_map` that any of the inputs varies over."""
    zeros = [
        lax.full_like(leaf, 0, shape=(), dtype=inputs.dtype) for leaf in jax.tree.leaves(inputs)
    ]
    return functools.reduce(jnp.add, zeros)
