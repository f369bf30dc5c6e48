"""Attention in blocks: the numbers of dense attention, and bit for bit the mask of keep_mask."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout

RATE = 0.3
SIZES = dict(b=2, t=37, s=53, n=4, k=4, h=8, v=8)
SMALL = dict(t=9, s=10)
# The tests' time is that of compilation, half of which LLVM would spend on fast code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def attention(key, **options):
    defaults = dict(dropout_key=key, dropout_rate=RATE, block_sizes=(16, 8))
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
    start=(0, 0, 0, 0),
):
    row = np.arange(shape[-2])[:, None] + start[-2]
    column = np.arange(shape[-1]) + start[-1]
    allowed = np.ones(shape, bool)
    if is_causal:
        allowed &= column <= row
    if local_window_size is not None:
        before, after = np.broadcast_to(local_window_size, 2)
        allowed &= (column >= row - before) & (column <= row + after)
    if query_seq_lengths is not None:
        allowed &= row < np.reshape(query_seq_lengths, (-1, 1, 1, 1))
    if key_value_seq_lengths is not None:
        allowed &= column < np.reshape(key_value_seq_lengths, (-1, 1, 1, 1))
    return allowed


def keep_mask(key, shape, rate=RATE, precision=None, broadcast_dims=(), **part):
    """The library's mask, which has to be that of the law's text too."""
    options = dict(precision=precision, broadcast_dims=broadcast_dims)
    kept = np.asarray(jdropout.keep_mask(key, rate, shape, **options, **part))
    words = np.asarray(jax.random.key_data(key))
    options["whole"], options["start"] = part.get("global_shape"), part.get("start")
    np.testing.assert_array_equal(kept, law_twin.keep_mask(words, rate, shape, **options))
    return kept


def multiplier(key, shape, rate=RATE, precision=None, **options):
    """What dropout multiplies the probabilities by."""
    kept = 1 - jdropout.effective_rate(rate, precision=precision)
    return keep_mask(key, shape, rate, precision, **options) * np.float32(1 / kept if kept else 0)


def dense(query, key, value, bias, scale, allowed, multiplied):
    """Attention with (B, N, T, S) elements each of bias, mask and multiplier, the reference."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * scale + bias
    some = allowed.any(-1, keepdims=True)
    logits = jnp.where(allowed, logits, jnp.where(some, -jnp.inf, 0))
    probabilities = jnp.where(some, jax.nn.softmax(logits), 0)
    output = jnp.einsum("bnts,bsnv->btnv", probabilities * multiplied, value)
    residual = jnp.where(some[..., 0], jax.nn.logsumexp(logits, -1), -jnp.inf)
    return output, residual.swapaxes(1, 2)


@jit
def dense_pass(arguments, constants, cotangents):
    results, pullback = jax.vjp(lambda *x: dense(*x, *constants), *arguments)
    return results, pullback(cotangents)


def dense_results(arrays, cotangents, *, multiplied, allowed=True, bias=0, scale=None):
    """Output and log-sum-exp of dense attention, and the gradients by name."""
    (b, t, n, h), s = arrays[0].shape, arrays[1].shape[1]
    dtype = arrays[0].dtype
    scale = np.asarray(h**-0.5 if scale is None else scale, dtype)
    full = [np.broadcast_to(x, (b, n, t, s)) for x in (allowed, multiplied)]
    cotangents = [np.zeros((b, t, n), dtype) if bar is None else bar for bar in cotangents]
    everywhere = np.broadcast_to(np.asarray(bias, dtype), (b, n, t, s))
    results, gradients = dense_pass([*arrays, everywhere, scale], full, tuple(cotangents))
    gradients = dict(zip(("query", "key", "value", "bias", "scale"), gradients, strict=True))
    if np.ndim(bias):
        shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
        gradients["bias"] = np.sum(gradients["bias"], shared, keepdims=True)
    return results, gradients


def both_passes(function):
    """Compiles an attention to its results, and the gradients along given cotangents."""

    def passes(arguments, cotangents, **constants):
        results, pullback = jax.vjp(lambda x: function(**x, **constants), arguments)
        return results, *pullback(cotangents)

    return jit(passes)


def named(query, key, value, **others):
    return dict(query=query, key=key, value=value) | others


def assert_close(ours, theirs, tolerance=1e-5):
    """Compares trees of arrays, relative to the largest element of each."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape
        largest = np.max(np.abs(y), where=np.isfinite(y), initial=1)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


def only(names, gradients):
    return {name: gradients[name] for name in names}


def with_equal_probabilities(arrays, dtype=np.float32):
    """Arguments and cotangent whose output and gradient are positive where the mask is True."""
    query, keys, value = arrays
    (b, t, n, _), (s, k) = query.shape, keys.shape[1:3]
    assert value.shape[-1] == s >= t
    eye = np.broadcast_to(np.eye(s, dtype=dtype)[:, None], (b, s, k, s))
    return [np.zeros_like(query), np.zeros_like(keys), eye], np.broadcast_to(
        np.eye(t, s, dtype=dtype)[:, None], (b, t, n, s)
    )


def assert_reveals(output, value_gradient, mask):
    """Compares with a mask what `with_equal_probabilities` makes of both passes, bit for bit."""
    assert 0 < np.mean(mask) < 1
    np.testing.assert_array_equal(np.moveaxis(np.asarray(output), -2, -3) > 0, mask)
    if value_gradient.shape[2] == output.shape[2]:  # the gradient has a sum over a group's heads
        backward = np.moveaxis(np.asarray(value_gradient), (-2, -1), (-3, -2)) > 0
        np.testing.assert_array_equal(backward[..., : output.shape[1], :], mask)


# --- the numbers of dense attention, and the bits of keep_mask ----------------------------

WHOLE = (3, 6, 48, 70)
HUGE = (3, 6, 2**20, 2**21)
CASES = {
    "plain": {},
    "odd blocks": dict(block_sizes=(13, 7), bias="bnts", mask="bnts"),
    "blocks of few rows": dict(block_sizes=(3, 53), is_causal=True),
    "blocks of one column": dict(block_sizes=(37, 1)),
    "one block": dict(block_sizes=(64, 64), is_causal=True),
    "blocks by default": dict(block_sizes=None, bias="1111", mask="1111"),
    "causal": dict(is_causal=True, block_sizes=(8, 5)),
    "window": dict(local_window_size=5),
    "window behind and causal": dict(is_causal=True, local_window_size=(9, 2), block_sizes=(4, 4)),
    "window ahead": dict(local_window_size=(0, 7), block_sizes=(1, 5)),
    "lengths": dict(query_seq_lengths=[5, 37], key_value_seq_lengths=[53, 7]),
    "bias and mask of heads and keys": dict(bias="1n1s", mask="bn1s"),
    "bias and mask of queries": dict(bias="b1t1", mask="1nt1"),
    "bias of keys": dict(bias="b11s", mask="11ts"),
    "grouped queries": dict(k=2, bias="1nts", mask="b1t1", is_causal=True),
    "one head of key and value": dict(k=1),
    "one query": dict(t=1, bias="bnts"),
    "one key": dict(s=1, v=8),
    "other features of the value": dict(v=5, mask="1n1s"),
    "no batch": dict(b=1, bias="1n1s", mask="11t1", key_value_seq_lengths=[41]),
    "shared by batch and heads": dict(dropout_broadcast_dims=(0, 1)),
    "shared by queries": dict(dropout_broadcast_dims=(2,), block_sizes=(16, 5)),
    "shared by keys": dict(dropout_broadcast_dims=(-1, 0), block_sizes=(5, 8)),
    "32 bits": dict(dropout_precision=32, dropout_rate=0.5),
    "part": dict(start=(1, 2, 3, 5), global_shape=WHOLE, is_causal=True, block_sizes=(16, 7)),
    "part of a huge whole": dict(
        start=(1, 2, 2**19 + 3, 2**19 + 1),
        global_shape=HUGE,
        local_window_size=(30, 20),
        key_value_seq_lengths=[2**20, 2**19 + 40],
    ),
    "everything": dict(
        k=2,
        v=5,
        bias="bn1s",
        mask="b1ts",
        is_causal=True,
        local_window_size=(30, 30),
        query_seq_lengths=[37, 29],
        key_value_seq_lengths=[20, 53],
        dropout_broadcast_dims=(1,),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_mask_are_those_of_dense_attention(case, key):
    options = dict(CASES[case])
    sizes = {axis: options.pop(axis) for axis in SIZES if axis in options}
    sizes = {"v": sizes.get("s", SIZES["s"])} | sizes
    shape = shape_of("bnts", **sizes)
    arrays, cotangents = operands(**sizes)
    given, mask = dict(scale=np.float32(0.4)), None
    if axes := options.pop("mask", None):
        mask = np.random.default_rng(2).random(shape_of(axes, **sizes)) < 0.8
    if axes := options.pop("bias", None):
        (given["bias"],) = normal(1, shape_of(axes, **sizes))

    in_positions = ("is_causal", "local_window_size", "query_seq_lengths", "key_value_seq_lengths")
    of_positions = {name: options[name] for name in (*in_positions, "start") if name in options}
    of_mask = {
        name.removeprefix("dropout_"): value
        for name, value in options.items()
        if name.startswith("dropout_") or name in ("start", "global_shape")
    }
    allowed = positions_allowed(shape, **of_positions) & (True if mask is None else mask)
    multiplied = multiplier(key, shape, **of_mask)
    expected = dense_results(arrays, cotangents, allowed=allowed, multiplied=multiplied, **given)

    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        if name in options:
            options[name] = np.asarray(options[name], np.int32)
    without_batch = case == "no batch"
    if without_batch:
        given["bias"], mask = given["bias"][0], mask[0]
    passes = both_passes(attention(key, mask=mask, return_residual=True, **options))

    def run(arrays, cotangents):
        if not without_batch:
            return passes(named(*arrays, **given), cotangents)
        arrays, cotangents = jax.tree.map(lambda x: x[0], (arrays, cotangents))
        results = passes(named(*arrays, **given), cotangents)
        return jax.tree.map(lambda x: x[None] if x.ndim else x, results)

    results, gradients = run(arrays, cotangents)
    assert_close((results, gradients), (expected[0], only(gradients, expected[1])), 5e-5)
    assert results[1].dtype == jnp.float32
    if arrays[2].shape[-1] == shape[-1] > 1:
        arrays, output_bar = with_equal_probabilities(arrays)
        (y, _), gradients = run(arrays, (output_bar, np.zeros_like(cotangents[1])))
        assert_reveals(y, gradients["value"], (multiplied > 0) & allowed)


@pytest.mark.parametrize("block_sizes", [(8, 5), (5, 8)], ids=str)
def test_the_start_of_a_part_may_be_traced(block_sizes, key):
    """Causality, window and lengths refer to positions in the whole; so do skipped blocks."""
    sizes = dict(t=11, s=13, v=13)
    shape = shape_of("bnts", **sizes)
    arrays, cotangents = operands(**sizes)
    options = dict(is_causal=True, local_window_size=(9, 4), query_seq_lengths=np.int32([40, 25]))
    part = attention(
        key, global_shape=WHOLE, block_sizes=block_sizes, return_residual=True, **options
    )
    passes = both_passes(lambda start, **x: part(**x, start=start))
    for start in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 24, 21), (1, 0, 8, 8), (1, 2, 37, 0)]:
        allowed = positions_allowed(shape, start=start, **options)
        multiplied = multiplier(key, shape, start=start, global_shape=WHOLE)
        expected = dense_results(arrays, cotangents, allowed=allowed, multiplied=multiplied)
        results, gradients = passes(named(*arrays), cotangents, start=tuple(map(np.int32, start)))
        assert_close((results, gradients), (expected[0], only(gradients, expected[1])))


def test_vmap_over_keys_gives_each_its_mask():
    sizes = dict(t=13, s=13, v=13)
    arrays, output_bar = with_equal_probabilities(operands(**sizes)[0])
    keys = jax.random.split(jax.random.key(5), 3)
    passes = both_passes(attention(None, block_sizes=(8, 5)))
    each = jit(
        jax.vmap(lambda key: passes.__wrapped__(named(*arrays), output_bar, dropout_key=key))
    )
    y, gradients = each(keys)
    for i, key in enumerate(keys):
        assert_reveals(y[i], gradients["value"][i], keep_mask(key, shape_of("bnts", **sizes)))


def test_an_eager_call_of_numpy_arrays_and_another_kind_of_key_works():
    key = jax.random.key(3, impl="rbg")
    sizes = dict(t=6, s=7, v=7)
    arrays, _ = with_equal_probabilities(operands(**sizes)[0])
    y = attention(key)(*arrays)
    assert_reveals(y, np.zeros((1, 1, 0)), keep_mask(key, shape_of("bnts", **sizes)))


def test_the_mean_over_keys_is_the_attention_without_dropout(key):
    arrays, _ = operands(b=1, t=5, s=7, n=2, k=2)
    count = 2000
    draw = jit(jax.vmap(lambda key: attention(key, block_sizes=(4, 4))(*arrays)))
    y = draw(jax.random.split(key, count))
    mean = jax.nn.dot_product_attention(*arrays)
    error = np.std(y, axis=0) / math.sqrt(count)
    assert np.all(np.abs(np.mean(y, axis=0) - mean) <= 5 * error)
    assert np.all(error > 0)


# --- without dropout, and without anything ------------------------------------------------

OPTIONS = {
    "nothing": {},
    "causal window and scale": dict(is_causal=True, local_window_size=(9, 3), scale=0.2),
    "bias, mask and lengths": dict(
        bias="bnts", mask="1n1s", query_seq_lengths=[37, 20], key_value_seq_lengths=[53, 9]
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_without_dropout_it_is_the_attention_of_jax(case):
    options = dict(OPTIONS[case])
    arrays, (output_bar, _) = operands(k=2)
    given = {}
    if "bias" in options:
        (given["bias"],) = normal(1, shape_of(options.pop("bias")))
        options["mask"] = np.random.default_rng(2).random(shape_of(options["mask"])) < 0.8
        for name in ("query_seq_lengths", "key_value_seq_lengths"):
            options[name] = np.asarray(options[name], np.int32)
    ours = attention(None, deterministic=True, **options)
    theirs = functools.partial(jax.nn.dot_product_attention, **options)
    arguments = named(*arrays, **given)
    assert_close(*(both_passes(f)(arguments, output_bar) for f in (ours, theirs)))


@pytest.mark.parametrize("limit", [dict(deterministic=True), dict(dropout_rate=0.0)], ids=str)
def test_every_way_to_switch_dropout_off_is_the_same(limit, key):
    arrays, _ = operands(**SMALL)
    plain = attention(None, dropout_rate=0)(*arrays)
    for dropout_key in (None, key):
        np.testing.assert_array_equal(attention(dropout_key, **limit)(*arrays), plain)


def test_a_rate_of_one_leaves_zeros_and_zero_gradients_but_the_log_sum_exp():
    arrays, (output_bar, residual_bar) = operands(**SMALL)
    on = attention(None, dropout_rate=1.0, return_residual=True)
    cotangents = output_bar, np.zeros_like(residual_bar)
    (y, residual), gradients = both_passes(on)(named(*arrays), cotangents)
    for x in (y, *gradients.values()):
        np.testing.assert_array_equal(x, np.zeros_like(x))
    (_, expected), _ = dense_results(arrays, cotangents, multiplied=np.float32(1))
    assert_close(residual, expected)


def test_one_trace_serves_every_traced_rate_and_flag(key):
    arrays, (output_bar, _) = operands()
    traces = 0

    @both_passes
    def passes(flag, **arguments):
        nonlocal traces
        traces += 1
        return attention(key, deterministic=flag)(**arguments)

    for rate, flag in [(0.0, False), (RATE, False), (1.0, False), (RATE, True), (1.0, True)]:
        multiplied = multiplier(key, shape_of("bnts"), 0.0 if flag else rate)
        (expected, _), gradients = dense_results(arrays, (output_bar, None), multiplied=multiplied)
        arguments = named(*arrays, dropout_rate=np.float32(rate))
        y, ours = passes(arguments, output_bar, flag=flag)
        assert ours.pop("dropout_rate") == 0
        assert_close((y, ours), (expected, only(ours, gradients)))
        if not multiplied.any():
            assert not any(np.any(x) for x in (y, *ours.values()))
    assert traces == 1


def test_queries_that_attend_to_nothing_have_zeros_and_finite_gradients(key):
    arrays, cotangents = operands()
    shape = shape_of("bnts")
    mask = np.ones(shape_of("1nt1"), bool)
    mask[:, 1, 3:20] = False
    (bias,) = normal(1, shape)
    bias[:, 2, 5] = -np.inf
    bias[:, :, 9, ::2] = -np.inf
    lengths = np.int32([53, 0])
    allowed = positions_allowed(shape, key_value_seq_lengths=lengths) & mask & np.isfinite(bias)
    results, gradients = both_passes(
        attention(key, mask=mask, key_value_seq_lengths=lengths, return_residual=True)
    )(named(*arrays, bias=bias), cotangents)
    nothing = np.swapaxes(~allowed.any(-1), 1, 2)
    assert not np.any(np.asarray(results[0])[nothing])
    np.testing.assert_array_equal(np.asarray(results[1]) == -np.inf, nothing)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    multiplied = multiplier(key, shape)
    expected = dense_results(arrays, cotangents, allowed=allowed, multiplied=multiplied, bias=bias)
    assert_close((results, gradients), (expected[0], only(gradients, expected[1])), 5e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(is_causal=True, start=(0, 0, 0, 40), global_shape=(2, 4, 64, 64)),
        dict(local_window_size=2, start=(0, 0, 40, 0), global_shape=(2, 4, 64, 64)),
        dict(s=0),
    ],
    ids=["causal", "window", "no keys"],
)
def test_where_no_query_attends_to_a_key_everything_is_zero(options, key):
    options = dict(options)
    arrays, cotangents = operands(**SMALL | {"s": options.pop("s", 10)})
    passes = both_passes(attention(key, block_sizes=(4, 4), return_residual=True, **options))
    (y, residual), gradients = passes(named(*arrays), cotangents)
    for x in (y, *gradients.values()):
        np.testing.assert_array_equal(x, np.zeros_like(x))
    np.testing.assert_array_equal(residual, np.full_like(residual, -np.inf))


@pytest.mark.parametrize("empty", ["b", "t", "v"])
def test_empty_axes_are_allowed(empty, key):
    arrays, output_and_bars = operands(**SMALL | {empty: 0})
    y, gradients = jax.eval_shape(both_passes(attention(key)), named(*arrays), output_and_bars[0])
    assert y.shape == output_and_bars[0].shape
    assert gradients == jax.eval_shape(lambda: named(*map(jnp.asarray, arrays)))


def test_large_logits_overflow_nowhere(key):
    """Not even in the padding of the last block, whose queries have no log-sum-exp."""
    arrays, (output_bar, _) = operands(**SMALL)
    (bias,) = normal(1, shape_of("111s", **SMALL))
    passes = both_passes(attention(key, block_sizes=(4, 4)))
    multiplied = multiplier(key, shape_of("bnts", **SMALL))
    (y, _), gradients = dense_results(arrays, (output_bar, None), multiplied=multiplied, bias=bias)
    ours = passes(named(*arrays, bias=bias + np.float32(1000)), output_bar)
    assert_close(ours, (y, only(ours[1], gradients)), 1e-3)


# --- precision ----------------------------------------------------------------------------


def test_half_precision_is_as_good_as_that_of_jax(key):
    """Relative to dense attention in float32, with the mask and without."""
    arrays, (output_bar, _) = operands(v=SIZES["h"])
    equal, equal_bar = with_equal_probabilities(operands(v=SIZES["s"])[0])
    kept = keep_mask(key, shape_of("bnts"))

    def errors(function, dtype, multiplied):
        """Root mean square errors of the output and the gradients, in units of rounding."""
        rounded, bar = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), (arrays, output_bar))
        wide, wide_bar = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), (rounded, bar))
        passes = both_passes(function)
        ours = passes(named(*rounded), bar)
        assert all(x.dtype == dtype for x in jax.tree.leaves(ours))
        (y, _), gradients = dense_results(wide, (wide_bar, None), multiplied=multiplied)
        theirs = y, only(ours[1], gradients)
        relative = jax.tree.map(
            lambda x, y: jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y),
            ours,
            theirs,
        )
        units = np.array(jax.tree.leaves(relative)) / float(jnp.finfo(dtype).eps)
        if np.ndim(multiplied):
            arguments = [x.astype(dtype) for x in map(jnp.asarray, equal)]
            y, gradients = passes(named(*arguments), jnp.asarray(equal_bar).astype(dtype))
            assert_reveals(y.astype(jnp.float32), gradients["value"].astype(jnp.float32), kept)
        return units

    with jax.numpy_dtype_promotion("standard"):
        theirs = errors(jax.nn.dot_product_attention, jnp.bfloat16, np.float32(1))
    for dtype in (jnp.float16, jnp.bfloat16):
        off = errors(attention(None, deterministic=True), dtype, np.float32(1))
        on = errors(attention(key), dtype, multiplier(key, shape_of("bnts")))
        assert np.all(off <= 2 * theirs)
        assert np.all(on <= 2 * theirs)


def test_double_precision_is_kept_throughout(key):
    with jax.enable_x64(True):
        operands64 = jax.tree.map(lambda x: x.astype(np.float64), operands())
        arrays, cotangents = operands64
        shape = shape_of("bnts")
        lengths = np.array([37, 20])
        allowed = positions_allowed(shape, is_causal=True, key_value_seq_lengths=lengths)
        multiplied = keep_mask(key, shape) / (1 - jdropout.effective_rate(RATE))
        expected = dense_results(arrays, cotangents, allowed=allowed, multiplied=multiplied)
        passes = both_passes(
            attention(key, is_causal=True, key_value_seq_lengths=lengths, return_residual=True)
        )
        results, gradients = passes(named(*arrays), cotangents)
        assert all(x.dtype == np.float64 for x in jax.tree.leaves((results, gradients)))
        assert_close((results, gradients), (expected[0], only(gradients, expected[1])), 1e-13)


def test_single_precision_stays_single_under_x64(key):
    with jax.enable_x64(True):
        arrays, cotangents = operands(**SMALL)
        passes = both_passes(attention(key, is_causal=True, return_residual=True))
        results = jax.eval_shape(passes, named(*arrays), cotangents)
    assert {x.dtype for x in jax.tree.leaves(results)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype, key):
    arrays, (output_bar, _) = operands(**SMALL)
    arguments, bar = jax.tree.map(
        lambda x: jnp.asarray(x).astype(dtype), (named(*arrays, scale=0.4), output_bar)
    )
    for bias_dtype in (jnp.bfloat16, jnp.float32):
        given = arguments | {"bias": jnp.zeros(shape_of("1n1s", **SMALL), bias_dtype)}
        _, gradients = jax.eval_shape(both_passes(attention(key)), given, bar)
        assert {n: x.dtype for n, x in gradients.items()} == {n: x.dtype for n, x in given.items()}


def test_the_precision_of_products_is_that_asked_for(key):
    arrays, (output_bar, _) = operands(**SMALL)
    passes = both_passes(attention(key, precision=lax.Precision.HIGHEST))
    text = passes.lower(named(*arrays), output_bar).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 2 + 5  # those of the forward and those of the backward pass
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


# --- transformations ----------------------------------------------------------------------


def test_derivatives_of_every_mode_and_order_are_those_of_dense_attention(key):
    sizes = SMALL | dict(n=2, k=1)
    shape = shape_of("bnts", **sizes)
    arrays, cotangents = operands(**sizes)
    bias, *directions, bias_direction = normal(3, shape, *(x.shape for x in arrays), shape)
    arguments = named(*arrays, bias=bias, scale=np.float32(0.4))
    tangents = named(*directions, bias=bias_direction, scale=np.float32(0.7))
    constants = positions_allowed(shape, is_causal=True), multiplier(key, shape)

    def derivatives(function):
        def loss(arguments):
            pairs = zip(cotangents, function(**arguments), strict=True)
            return sum((bar * jnp.sin(x)).sum() for bar, x in pairs)

        @jit
        def all_of_them(arguments, tangents):
            forward = jax.jvp(lambda x: function(**x), (arguments,), (tangents,))
            forward_over_reverse = jax.jvp(jax.grad(loss), (arguments,), (tangents,))
            reverse_over_reverse = jax.vjp(jax.grad(loss), arguments)[1](tangents)
            return forward, forward_over_reverse, reverse_over_reverse

        return all_of_them(arguments, tangents)

    ours = attention(key, is_causal=True, block_sizes=(4, 4), return_residual=True)
    theirs = functools.partial(dense, allowed=constants[0], multiplied=constants[1])
    assert_close(derivatives(ours), derivatives(theirs), 3e-5)


def test_a_scan_over_layers_with_folded_keys_and_checkpoints_is_the_loop(key):
    sizes = dict(t=12, s=12)
    (x, *_), (output_bar, _) = operands(**sizes)
    (weights,) = normal(4, (3, 8, 8))
    shape = shape_of("bnts", **sizes)
    ours = attention(None, is_causal=True, block_sizes=(8, 4))

    @jax.checkpoint
    def layer(x, weight, key):
        x = jnp.tanh(x @ weight)
        return ours(x, x, x, dropout_key=key)

    def scanned(x, weights):
        def step(x, inputs):
            index, weight = inputs
            return layer(x, weight, jax.random.fold_in(key, index)), None

        return lax.scan(step, x, (jnp.arange(3), weights))[0]

    allowed = positions_allowed(shape, is_causal=True)
    multiplied = [multiplier(jax.random.fold_in(key, i), shape) for i in range(3)]

    def looped(x, weights):
        for weight, factor in zip(weights, multiplied, strict=True):
            x = jnp.tanh(x @ weight)
            x, _ = dense(x, x, x, 0, np.float32(8**-0.5), allowed, factor)
        return x

    arguments = dict(x=x, weights=weights)
    assert_close(*(both_passes(f)(arguments, output_bar) for f in (scanned, looped)), 3e-5)


def test_vmap_over_everything_equals_the_loop():
    count, whole = 3, (2, 4, 20, 20)
    shape = shape_of("bnts", **SMALL)
    arrays, (output_bar, _) = operands(**SMALL)
    stacked = [(count, *x.shape) for x in arrays]
    queries, keys, values, biases = normal(6, *stacked, (count, *shape_of("1n1s", **SMALL)))
    arguments = named(queries, keys, values, bias=biases, scale=np.float32([0.2, 0.4, 0.6]))
    lengths = np.int32([[9, 5], [10, 10], [2, 17]])
    constants = dict(
        dropout_key=jax.random.split(jax.random.key(5), count),
        key_value_seq_lengths=lengths,
        start=np.int32([[0, 0, 0, 0], [0, 0, 3, 0], [0, 0, 8, 4]]),
    )
    ours = attention(None, is_causal=True, global_shape=whole, block_sizes=(4, 4))
    passes = both_passes(lambda start, **x: ours(**x, start=tuple(start))).__wrapped__
    batched = jit(jax.vmap(lambda x, c: passes(x, output_bar, **c)))(arguments, constants)
    for i in range(count):
        one = jax.tree.map(lambda x, i=i: x[i], arguments)
        start = tuple(int(index) for index in constants["start"][i])
        allowed = positions_allowed(
            shape, is_causal=True, key_value_seq_lengths=lengths[i], start=start
        )
        multiplied = multiplier(constants["dropout_key"][i], shape, start=start, global_shape=whole)
        three = [one.pop(name) for name in ("query", "key", "value")]
        (y, _), gradients = dense_results(
            three, (output_bar, None), allowed=allowed, multiplied=multiplied, **one
        )
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), (y, gradients), 2e-5)


def test_vmap_over_the_bias_alone_equals_the_loop(key):
    shape = shape_of("bnts", **SMALL)
    arrays, (output_bar, _) = operands(**SMALL)
    (biases,) = normal(6, (3, *shape))
    passes = both_passes(functools.partial(attention(key, block_sizes=(4, 4)), *arrays))
    batched = jit(jax.vmap(lambda bias: passes.__wrapped__(dict(bias=bias), output_bar)))(biases)
    multiplied = multiplier(key, shape)
    for i, bias in enumerate(biases):
        (y, _), gradients = dense_results(
            arrays, (output_bar, None), multiplied=multiplied, bias=bias
        )
        expected = y, only(["bias"], gradients)
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), expected)


def test_the_gradient_exports_for_cpu_cuda_and_tpu(key):
    arrays, (output_bar, _) = operands(**SMALL)
    passes = jax.jit(both_passes(attention(key, is_causal=True)).__wrapped__)
    export.export(passes, platforms=("cpu", "cuda", "tpu"))(named(*arrays), output_bar)


# --- costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(is_causal=True)], ids=["plain", "causal"])
def test_residuals_are_the_inputs_the_output_and_a_number_per_query(options, key):
    sizes = dict(b=2, t=256, s=512, n=4, k=2)
    arrays, results = operands(**sizes)
    arguments = named(*arrays, bias=np.zeros(shape_of("1n1s", **sizes), np.float32))

    def residuals(arguments):
        return jax.vjp(lambda x: attention(key, **options)(**x), arguments)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, arguments))
    needed = sum(x.size for x in (*arguments.values(), *results))
    one_block_of_rows = results[0].size * 16 // sizes["t"]
    assert needed <= sum(leaf.size for leaf in leaves) <= needed + 2 * one_block_of_rows


def test_temporaries_of_the_gradient_are_linear_in_the_length(key):
    def temporaries(function, length):
        def loss(query, keys, value):
            return jnp.sin(function(query, keys, value)).sum()

        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        compiled = jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = attention(key, block_sizes=None)
    short, long = (temporaries(ours, length) for length in (2048, 4096))
    assert long <= 2.2 * short
    assert long <= 4096**2 / 2  # half a byte for each probability
    short, long = (temporaries(jax.nn.dot_product_attention, length) for length in (2048, 4096))
    assert long >= 3.5 * short  # the control


def test_other_keys_scales_and_lengths_trace_nothing_anew():
    arrays, _ = operands(**SMALL)
    lengths = jnp.array([[9, 5], [3, 4]])
    keys = jax.random.split(jax.random.key(5), 2)
    arrays = [jnp.asarray(x) for x in arrays]

    def call(i):
        attention(keys[i], scale=0.1 * i, query_seq_lengths=lengths[i])(*arrays)

    call(0)
    lengths, keys = list(lengths), list(keys)
    with jax.no_tracing():
        call(1)


# --- many devices -------------------------------------------------------------------------

COLLECTIVE = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
DEVICES = {"a": 2, "b": 4}
PLACES = {
    "batch": (P("b"), P("b"), (8, 8)),
    "heads": (P(None, None, "b"), P(None, None, "b"), (8, 8)),
    "batch and heads": (P("a", None, "b"), P("a", None, "b"), (8, 8)),
    "batch and queries": (P("a", "b"), P("a"), (16, 8)),
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def collectives(compiled):
    """Names of the collectives, and the number of elements that they bring together."""
    found = {}
    for line in compiled.as_text().splitlines():
        if match := re.search(COLLECTIVE, line):
            shapes = re.findall(r"\[([0-9,]*)\]", line[: match.start()])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            found[match.group(1)] = found.get(match.group(1), 0) + sum(sizes)
    return found


@pytest.mark.parametrize(
    ("place", "axis_type"),
    [
        ("batch", AUTO),
        ("heads", EXPLICIT),
        ("batch and heads", AUTO),
        ("batch and heads", EXPLICIT),
        ("batch and queries", AUTO),
        ("batch and queries", EXPLICIT),
    ],
    ids=str,
)
def test_every_sharding_gives_the_same_attention_and_mask(place, axis_type, key):
    query_spec, key_spec, block_sizes = PLACES[place]
    sizes = dict(b=4, t=16, s=16, n=4, k=4, h=4, v=16)
    shape = shape_of("bnts", **sizes)
    arrays, (output_bar, _) = operands(**sizes)
    equal, equal_bar = with_equal_probabilities(arrays)
    allowed, multiplied = positions_allowed(shape, is_causal=True), multiplier(key, shape)
    (expected, _), gradients = dense_results(
        arrays, (output_bar, None), allowed=allowed, multiplied=multiplied
    )

    mesh = jax.make_mesh(tuple(DEVICES.values()), tuple(DEVICES), axis_types=(axis_type,) * 2)
    specs = named(query_spec, key_spec, key_spec)
    placements = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
    with jax.set_mesh(mesh):
        passes = both_passes(attention(key, is_causal=True, block_sizes=block_sizes))
        placed, placed_bar = jax.device_put(
            (named(*arrays), output_bar), (placements, placements["query"])
        )
        compiled = passes.lower(placed, placed_bar).compile()
        ours = compiled(placed, placed_bar)
        y, revealed = compiled(
            *jax.device_put((named(*equal), equal_bar), (placements, placements["query"]))
        )
    assert_close(ours, (expected, only(ours[1], gradients)))
    assert_reveals(y, revealed["value"], (multiplied > 0) & allowed)
    assert y.sharding.is_equivalent_to(placements["query"], 4)
    for name, gradient in revealed.items():
        assert gradient.sharding.is_equivalent_to(placements[name], 4)
    found = collectives(compiled)
    if place == "batch and queries":  # the gradients of what every device has whole are summed
        assert 0 < found.pop("all-reduce") <= (arrays[1].size + arrays[2].size) // DEVICES["a"]
    assert found == {}


def test_explicitly_sharded_queries_are_one_block_of_rows(key):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(EXPLICIT,))
    with jax.set_mesh(mesh):
        query = jax.ShapeDtypeStruct((1, 1024, 1, 4), jnp.float32, sharding=P(None, "d"))
        whole = jax.ShapeDtypeStruct((1, 8, 1, 4), jnp.float32, sharding=P())
        compiled = jit(attention(key, block_sizes=None)).lower(query, whole, whole).compile()
    assert collectives(compiled) == {}


def conditional_collectives(jaxpr, conditional=False):
    """The primitives in the branches of a condition that wait for other devices."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if conditional and re.match("psum|pm|ppermute|all_|reduce_scatter", name):
            found.append(name)
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        for x in inner:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                found += conditional_collectives(x, conditional or name == "cond")
    return found


SPLITS = {
    "batch": (0, P("d"), P("d"), P("d")),
    "heads": (1, P(None, None, "d"), P(None, None, "d"), P(None, None, "d")),
    "queries": (2, P(None, "d"), P(), P(None, "d")),
    "keys": (3, P(), P(None, "d"), P()),
}


def merged(output, residual):
    """The attention to all keys, from that of every device to its own."""
    weights = jnp.exp(residual - lax.pmax(lax.stop_gradient(residual), "d"))
    return lax.psum(output * weights[..., None], "d") / lax.psum(weights, "d")[..., None]


@pytest.mark.parametrize(
    ("split", "check_vma"),
    [("batch", True), ("heads", True), ("queries", True), ("queries", False), ("keys", True)],
    ids=str,
)
def test_shard_map_with_positions_equals_the_whole(split, check_vma, key):
    axis, query_spec, key_spec, output_spec = SPLITS[split]
    sizes = dict(b=8, t=16, s=16, n=8, k=8, h=4, v=4)
    shape = shape_of("bnts", **sizes)
    arrays, (output_bar, _) = operands(**sizes)
    ours = attention(
        key, is_causal=True, block_sizes=(4, 1), global_shape=shape, return_residual=True
    )

    def local(query, key, value, scale):
        start = [0, 0, 0, 0]
        start[axis] = lax.axis_index("d") * (shape[axis] // 8)
        output, residual = ours(query, key, value, scale=scale, start=start)
        return merged(output, residual) if split == "keys" else output

    sharded = jax.shard_map(
        local,
        mesh=jax.make_mesh((8,), ("d",), axis_types=(AUTO,)),
        in_specs=(query_spec, key_spec, key_spec, P()),
        out_specs=output_spec,
        check_vma=check_vma,
    )
    passes = both_passes(lambda query, key, value, scale: sharded(query, key, value, scale))
    arguments = named(*arrays, scale=np.float32(0.4))
    traced = passes.trace(arguments, output_bar)
    assert "cond" in str(traced.jaxpr)
    assert conditional_collectives(traced.jaxpr) == []  # a device would wait for ever
    (y, _), gradients = dense_results(
        arrays,
        (output_bar, None),
        allowed=positions_allowed(shape, is_causal=True),
        multiplied=multiplier(key, shape),
        scale=0.4,
    )
    ours = passes(arguments, output_bar)
    assert_close(ours, (y, only(ours[1], gradients)))


# --- errors -------------------------------------------------------------------------------

X = np.ones((2, 4, 2, 3), np.float32)
ERRORS = {
    "query list": (dict(query=[1.0]), TypeError, "query must be an array, got list"),
    "key None": (dict(key=None), TypeError, "key must be an array, got NoneType"),
    "value fix": (dict(value="x"), TypeError, "Convert it with jnp.asarray"),
    "query integer": (dict(query=X.astype(int)), TypeError, "query must be a float16, bfloat16"),
    "key complex": (dict(key=X * 1j), TypeError, "key must be a float16, bfloat16, float32"),
    "query dtype fix": (dict(query=X > 0), TypeError, "query.astype(jnp.bfloat16)"),
    "key dtype": (dict(key=X.astype(np.float16)), TypeError, "the same dtype, got float32 for"),
    "value dtype": (dict(value=X.astype(np.float16)), TypeError, "value.astype(query.dtype)"),
    "query rank": (dict(query=X[0, 0]), ValueError, "got shape (2, 3) for query"),
    "key rank": (dict(key=X[0]), ValueError, "got shape (4, 2, 3) for key"),
    "rank five": (dict(query=X[None], key=X[None]), ValueError, "Reshape further batch axes"),
    "batch": (dict(key=X[:1], value=X[:1]), ValueError, "the same batch size, got shapes"),
    "batch fix": (dict(query=X[:1]), ValueError, "jnp.broadcast_to"),
    "features": (dict(key=X[..., :2]), ValueError, "query and key must have the same number of"),
    "key length": (dict(key=X[:, :3]), ValueError, "key and value must have the same length"),
    "value heads": (dict(value=X[:, :, :1]), ValueError, "must have the same length and heads"),
    "groups": (dict(query=X[:, :, [0, 1, 0]]), ValueError, "query a multiple of the heads of key"),
    "no heads": (dict(query=X[:, :, :0]), ValueError, "must have heads and features"),
    "no features": (dict(query=X[..., :0], key=X[..., :0]), ValueError, "heads and features"),
    "bias list": (dict(bias=[0.0]), TypeError, "bias must be an array, got list"),
    "bias integer": (dict(bias=np.ones((1, 1, 4, 4), int)), TypeError, "Pass booleans as mask"),
    "bias bool": (dict(bias=X[:1, :1] > 0), TypeError, "bias must be a floating-point array"),
    "bias rank": (dict(bias=X[0, :, 0]), ValueError, "bias must have 4 axes and broadcast to"),
    "bias shape": (dict(bias=X), ValueError, "to (2, 2, 4, 4), which is ([batch], heads, queries"),
    "bias fix": (dict(bias=X[0]), ValueError, "got shape (4, 2, 3). Insert axes of size 1."),
    "mask float": (dict(mask=X[..., :1]), TypeError, "mask must be boolean, True where a query"),
    "mask fix": (dict(mask=X), TypeError, "mask.astype(bool), or pass what is added to the logits"),
    "mask rank": (dict(mask=X[0] > 0), ValueError, "mask must have 4 axes"),
    "mask shape": (dict(mask=X > 0), ValueError, "mask must have 4 axes and broadcast to (2, 2, 4"),
    "query lengths": (
        dict(query_seq_lengths=np.ones(2, np.float32)),
        TypeError,
        "query_seq_lengths must be an array of integers, got dtype float32",
    ),
    "key lengths": (
        dict(key_value_seq_lengths=np.ones(3, np.int32)),
        ValueError,
        "key_value_seq_lengths must have one length per example, shape (2,), got shape (3,)",
    ),
    "lengths list": (
        dict(query_seq_lengths=[1, 2]),
        TypeError,
        "query_seq_lengths must be an array, got list. Convert it with jnp.asarray",
    ),
    "window float": (
        dict(local_window_size=2.0),
        TypeError,
        "local_window_size must be an integer or a pair of integers, got 2.0",
    ),
    "window triple": (dict(local_window_size=(1, 2, 3)), TypeError, "Write (before, after)"),
    "window negative": (
        dict(local_window_size=(-1, 2)),
        ValueError,
        "local_window_size must not be negative, got (-1, 2). Write (before, after)",
    ),
    "scale list": (dict(scale=[1.0]), TypeError, "scale must be an array, got list"),
    "scale vector": (dict(scale=np.ones(3)), TypeError, "scale must be a real scalar, got shape"),
    "scale complex": (dict(scale=np.complex64(1)), TypeError, "multiply the query by it"),
    "scale bool": (dict(scale=True), TypeError, "got shape () and dtype bool"),
    "blocks integer": (
        dict(block_sizes=16),
        TypeError,
        "block_sizes must be None or a pair of integers, got 16. Write (queries, keys)",
    ),
    "blocks triple": (dict(block_sizes=(1, 2, 3)), TypeError, "block_sizes must be None or a pair"),
    "blocks float": (dict(block_sizes=(8.0, 8)), TypeError, "got (8.0, 8)"),
    "blocks zero": (
        dict(block_sizes=(0, 8)),
        ValueError,
        "block_sizes must be positive, got (0, 8",
    ),
    "blocks fix": (dict(block_sizes=(8, -1)), ValueError, "such as (512, 256)"),
    "dropout_key missing": (
        dict(dropout_key=None),
        ValueError,
        "dropout_key is None, but dropout is on and draws a mask. Pass dropout_key=jax.random.key(",
    ),
    "dropout_key seed": (dict(dropout_key=0), TypeError, "dropout_key must be a JAX PRNG key"),
    "dropout_key batch": (
        dict(dropout_key=jax.random.split(jax.random.key(0), 3)),
        ValueError,
        "dropout_key must be a single key, got keys of shape (3,)",
    ),
    "dropout_rate range": (
        dict(dropout_rate=1.5),
        ValueError,
        "dropout_rate must be in [0, 1], got 1.5. It is the probability of dropping",
    ),
    "dropout_rate None": (dict(dropout_rate=None), TypeError, "dropout_rate must be a number"),
    "dropout_rate bool": (dict(dropout_rate=True), TypeError, "dropout_rate must be a number"),
    "dropout_rate vector": (dict(dropout_rate=X), ValueError, "dropout_rate must be a scalar"),
    "deterministic": (dict(deterministic=1), TypeError, "deterministic must be True, False or a"),
    "dropout_precision": (
        dict(dropout_precision=8),
        ValueError,
        "precision must be None, 16 or 32",
    ),
    "broadcast axis": (
        dict(dropout_broadcast_dims=(4,)),
        ValueError,
        "broadcast_dims has axis 4, but the array has 4 axes. Use axes from -4 to 3",
    ),
    "broadcast integer": (dict(dropout_broadcast_dims=0), TypeError, "Write (axis,)"),
    "start alone": (dict(start=(0, 0, 0, 0)), ValueError, "start was given without global_shape"),
    "global_shape alone": (dict(global_shape=(2, 2, 4, 4)), ValueError, "given without start"),
    "start rank": (
        dict(start=(0, 0), global_shape=(2, 2)),
        ValueError,
        "must have the same number of axes",
    ),
    "start outside": (
        dict(start=(0, 0, 0, 5), global_shape=(2, 2, 4, 8)),
        ValueError,
        "outside the mask on axis 3: start 5, size 4, but global_shape has 8",
    ),
    "start float": (dict(start=(0, 0, 0.0, 0), global_shape=(2, 2, 4, 4)), TypeError, "axis_index"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_errors_name_the_argument_the_value_and_the_fix(case, wrap):
    changes, error, text = ERRORS[case]
    arguments = dict(query=X, key=X, value=X, dropout_key=jax.random.key(0), dropout_rate=0.5)
    with pytest.raises(error, match=re.escape(text)):
        wrap(lambda: jdropout.dot_product_attention(**arguments | changes))()


def test_errors_come_even_where_the_start_is_not_needed():
    with pytest.raises(ValueError, match="without global_shape"):
        jdropout.dot_product_attention(
            X, X, X, dropout_key=None, dropout_rate=0.0, start=(0, 0, 0, 0)
        )
