"""Dense attention in NumPy, with gradients: the reference for attention in blocks."""

import functools

import jax
import law_twin
import numpy as np

import jdropout

RATE = 0.3
SIZES = dict(b=2, t=9, s=11, n=4, k=4, h=4, v=11)
"""Batch, queries, keys, heads of the query, of key and value, features, features of the value.

Neither length is a multiple of the blocks that tests ask for. The value has as many features as
there are keys, so that an identity matrix as value shows the mask (see `equal_probabilities`).
"""
ONE_BLOCK = (16, 16)
"""Compiles in half the time, for what has nothing to do with the blocks."""


def attention(key, **options):
    defaults = dict(dropout_key=key, dropout_rate=RATE, block_sizes=(4, 3))
    return functools.partial(jdropout.dot_product_attention, **defaults | options)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def operands(**changes):
    """Query, key and value, and cotangents of the output and the log-sum-exp."""
    b, t, s, n, k, h, v = (SIZES | changes).values()
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, v), (b, t, n, v), (b, t, n)
    query, key, value, output_bar, residual_bar = normal(0, *shapes)
    return [query, key, value], (output_bar, residual_bar)


def shape_of(axes, **changes):
    """The shape that a string of axes, such as "b1ts", stands for."""
    return tuple((SIZES | changes | {"1": 1})[axis] for axis in axes)


def positions_allowed(
    shape,
    is_causal=False,
    local_window_size=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    start=(0, 0, 0, 0),
    aligned=0,
):
    row = np.arange(shape[-2])[:, None] + start[-2]
    column = np.arange(shape[-1]) + start[-1]
    allowed = np.ones(shape, bool)
    at = row + np.reshape(aligned, (-1, 1, 1, 1))
    if is_causal:
        allowed &= column <= at
    if local_window_size is not None:
        before, after = np.broadcast_to(local_window_size, 2)
        allowed &= (column >= at - before) & (column <= at + after)
    if query_segment_ids is not None or key_value_segment_ids is not None:
        one_for_both = [x for x in (query_segment_ids, key_value_segment_ids) if x is not None]
        queries, keys = np.asarray(one_for_both[0]), np.asarray(one_for_both[-1])
        allowed &= queries[:, None, :, None] == keys[:, None, None]
    if query_seq_lengths is not None:
        allowed &= row < np.reshape(query_seq_lengths, (-1, 1, 1, 1))
    if key_value_seq_lengths is not None:
        allowed &= column < np.reshape(key_value_seq_lengths, (-1, 1, 1, 1))
    return allowed


def keep_mask(key, shape, rate=RATE, precision=None, broadcast_dims=(), **part):
    """The mask by the law's text in NumPy."""
    words = np.asarray(jax.random.key_data(key))
    options = dict(precision=precision, broadcast_dims=broadcast_dims)
    options |= dict(whole=part.get("global_shape"), start=part.get("start"))
    return np.broadcast_to(law_twin.keep_mask(words, rate, shape, **options), shape)


def multiplier(key, shape, rate=RATE, precision=None, **options):
    """The factor that dropout applies to the probabilities."""
    kept = 1 - jdropout.effective_rate(rate, precision=precision)
    return keep_mask(key, shape, rate, precision, **options) * np.float32(1 / kept if kept else 0)


def dense_results(
    arrays, cotangents, *, multiplied, allowed=True, bias=0, scale=None, soft_cap=None
):
    """Output and log-sum-exp of dense attention, and the gradients by name, all in float64."""
    query, keys, value = (np.asarray(x, np.float64) for x in arrays)
    (b, t, n, h), (s, k) = query.shape, keys.shape[1:3]
    shape, groups = (b, n, t, s), n // k
    keys, value = (np.repeat(x, groups, axis=2) for x in (keys, value))
    scale = h**-0.5 if scale is None else float(scale)
    allowed, multiplied = np.broadcast_to(allowed, shape), np.broadcast_to(multiplied, shape)

    products = np.einsum("btnh,bsnh->bnts", query, keys)
    logits, slope = products * scale + bias, 1
    if soft_cap is not None:
        allowed = allowed & (logits > -np.inf)
        logits = np.tanh(logits / soft_cap)
        logits, slope = soft_cap * logits, 1 - logits**2
    logits = np.where(allowed, logits, -np.inf)
    some = allowed.any(-1, keepdims=True)
    largest = np.where(some, np.max(logits, axis=-1, keepdims=True, initial=-np.inf), 0)
    weights = np.exp(logits - largest)
    total = np.where(some, weights.sum(-1, keepdims=True), 1)
    probabilities = weights / total
    dropped = probabilities * multiplied
    output = np.einsum("bnts,bsnv->btnv", dropped, value)
    residual = np.where(some, largest + np.log(total), -np.inf)[..., 0]

    output_bar, residual_bar = cotangents
    bar = np.einsum("btnv,bsnv->bnts", output_bar, value) * multiplied
    bar = bar - np.sum(probabilities * bar, axis=-1, keepdims=True)
    if residual_bar is not None:
        bar = bar + np.swapaxes(residual_bar, 1, 2)[..., None]
    logits_bar = probabilities * bar * slope

    def over_groups(x):
        return x.reshape(*x.shape[:2], k, groups, x.shape[-1]).sum(3)

    gradients = dict(
        query=scale * np.einsum("bnts,bsnh->btnh", logits_bar, keys),
        key=over_groups(scale * np.einsum("bnts,btnh->bsnh", logits_bar, query)),
        value=over_groups(np.einsum("bnts,btnv->bsnv", dropped, output_bar)),
        bias=logits_bar,
        scale=np.sum(logits_bar * products),
    )
    if np.ndim(bias):
        shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
        gradients["bias"] = np.sum(gradients["bias"], shared, keepdims=True)
    return (output, np.swapaxes(residual, 1, 2)), gradients


def both_passes(function):
    """Compiles an attention to its results, and the gradients along given cotangents."""

    def passes(arguments, cotangents, **constants):
        results, pullback = jax.vjp(lambda x: function(**x, **constants), arguments)
        return results, *pullback(cotangents)

    return jax.jit(passes)


def named(query, key, value, **others):
    return dict(query=query, key=key, value=value) | others


def only(names, gradients):
    return {name: gradients[name] for name in names}


def assert_close(ours, theirs, tolerance=1e-5):
    """Compares trees of arrays, relative to the largest element of each."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape
        largest = np.max(np.abs(y), where=np.isfinite(y), initial=1)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


def equal_probabilities(arrays, dtype=np.float32):
    """Arguments and cotangent whose output and gradient are positive where the mask is True."""
    query, keys, value = arrays
    (b, t, n, _), (s, k) = query.shape, keys.shape[1:3]
    assert value.shape[-1] == s >= t
    eye = np.broadcast_to(np.eye(s, dtype=dtype)[:, None], (b, s, k, s))
    return [np.zeros_like(query), np.zeros_like(keys), eye], np.broadcast_to(
        np.eye(t, s, dtype=dtype)[:, None], (b, t, n, s)
    )


def assert_reveals(output, value_gradient, mask):
    """Compares a mask, bit for bit, with both passes of `equal_probabilities`."""
    assert 0 < np.mean(mask) < 1
    np.testing.assert_array_equal(np.moveaxis(np.asarray(output), -2, -3) > 0, mask)
    if value_gradient.shape[2] == output.shape[2]:  # the gradient has a sum over a group's heads
        backward = np.moveaxis(np.asarray(value_gradient), (-2, -1), (-3, -2)) > 0
        np.testing.assert_array_equal(backward[..., : output.shape[1], :], mask)
