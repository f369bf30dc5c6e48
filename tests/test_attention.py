"""Attention in blocks: the numbers of dense attention, and bit for bit the mask of the law."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import (
    ONE_BLOCK,
    RATE,
    SIZES,
    assert_close,
    assert_reveals,
    attention,
    both_passes,
    dense_results,
    equal_probabilities,
    keep_mask,
    multiplier,
    named,
    normal,
    only,
    operands,
    positions_allowed,
    shape_of,
)
from jax import export, lax

import jdropout

# --- the numbers of dense attention, and the bits of the law ------------------------------

WHOLE = (3, 6, 20, 24)
HUGE = (3, 6, 2**20, 2**21)
# Every value of every option is in one of them, most pairs of options are in one of them.
CASES = {
    "plain": {},
    "odd blocks, bias and mask": dict(block_sizes=(5, 4), bias="bnts", mask="bnts"),
    "causal, shared by batch and heads": dict(
        is_causal=True, block_sizes=(4, 4), bias="1n1s", mask="bn1s", dropout_broadcast_dims=(0, 1)
    ),
    "window, blocks of few rows, shared by queries": dict(
        local_window_size=3,
        block_sizes=(3, 11),
        bias="b1t1",
        mask="1nt1",
        dropout_broadcast_dims=(2,),
    ),
    "lengths, blocks of one column, shared by keys": dict(
        query_seq_lengths=[5, 9],
        key_value_seq_lengths=[11, 4],
        block_sizes=(9, 1),
        bias="b11s",
        mask="11ts",
        dropout_broadcast_dims=(-1, 0),
    ),
    "one block by default, causal window, 32 bits": dict(
        block_sizes=None,
        is_causal=True,
        local_window_size=(4, 2),
        bias="1111",
        mask="1111",
        dropout_precision=32,
        dropout_rate=0.5,
    ),
    "grouped queries and everything, shared by heads": dict(
        k=2,
        v=5,
        bias="1nts",
        mask="b1t1",
        is_causal=True,
        local_window_size=(7, 7),
        query_seq_lengths=[9, 7],
        key_value_seq_lengths=[6, 11],
        dropout_broadcast_dims=(1,),
    ),
    "one head of key and value, window ahead": dict(
        k=1, local_window_size=(0, 4), block_sizes=(1, 5), mask="1n1s", bias="bnts"
    ),
    "part of a whole, causal, grouped": dict(
        k=2,
        start=(1, 2, 3, 5),
        global_shape=WHOLE,
        is_causal=True,
        key_value_seq_lengths=[16, 9],
        block_sizes=(16, 4),
    ),
    "part of a huge whole, window": dict(
        start=(1, 2, 2**19 + 3, 2**19 + 1),
        global_shape=HUGE,
        local_window_size=(6, 4),
        query_seq_lengths=[2**20, 2**19 + 9],
        bias="1n1s",
        dropout_precision=32,
    ),
    "one query": dict(t=1, bias="bnts", mask="1n1s", block_sizes=None),
    "one key": dict(s=1, v=8, is_causal=True),
    "no batch": dict(b=1, v=5, bias="1n1s", mask="11t1", key_value_seq_lengths=[8]),
}


@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_mask_are_those_of_dense_attention(case, key):
    options = dict(CASES[case])
    sizes = {axis: options.pop(axis) for axis in SIZES if axis in options}
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
    assert_close((results, gradients), (expected[0], only(gradients, expected[1])))
    assert results[1].dtype == jnp.float32
    if arrays[2].shape[-1] == shape[-1] >= shape[-2]:
        arrays, output_bar = equal_probabilities(arrays)
        (y, _), gradients = run(arrays, (output_bar, np.zeros_like(cotangents[1])))
        assert_reveals(y, gradients["value"], (multiplied > 0) & allowed)


def test_the_start_of_a_part_may_be_traced(key):
    """Causality, window and lengths refer to positions in the whole; so do skipped blocks."""
    shape = shape_of("bnts")
    arrays, cotangents = operands()
    options = dict(is_causal=True, local_window_size=(7, 3), query_seq_lengths=np.int32([20, 14]))
    part = attention(key, global_shape=WHOLE, block_sizes=(3, 5), return_residual=True, **options)
    passes = both_passes(lambda start, **x: part(**x, start=start))
    for start in [(0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 11, 9), (1, 0, 4, 4), (1, 2, 11, 0)]:
        allowed = positions_allowed(shape, start=start, **options)
        multiplied = multiplier(key, shape, start=start, global_shape=WHOLE)
        expected = dense_results(arrays, cotangents, allowed=allowed, multiplied=multiplied)
        results, gradients = passes(named(*arrays), cotangents, start=tuple(map(np.int32, start)))
        assert_close((results, gradients), (expected[0], only(gradients, expected[1])))


def test_vmap_over_keys_gives_each_its_mask():
    arrays, output_bar = equal_probabilities(operands()[0])
    keys = jax.random.split(jax.random.key(5), 3)
    passes = both_passes(attention(None, block_sizes=ONE_BLOCK))
    each = jax.jit(
        jax.vmap(lambda key: passes.__wrapped__(named(*arrays), output_bar, dropout_key=key))
    )
    y, gradients = each(keys)
    for i, key in enumerate(keys):
        assert_reveals(y[i], gradients["value"][i], keep_mask(key, shape_of("bnts")))


def test_an_eager_call_of_numpy_arrays_and_another_kind_of_key_works():
    key = jax.random.key(3, impl="rbg")
    arrays, _ = equal_probabilities(operands()[0])
    y = attention(key, block_sizes=ONE_BLOCK)(*arrays)
    assert_reveals(y, np.zeros((1, 1, 0)), keep_mask(key, shape_of("bnts")))


def test_the_mean_over_keys_is_the_attention_without_dropout(key):
    sizes = dict(b=1, t=5, s=7, n=2, k=2)
    arrays, (output_bar, _) = operands(**sizes)
    count = 2000
    draw = jax.jit(jax.vmap(lambda key: attention(key, block_sizes=ONE_BLOCK)(*arrays)))
    y = draw(jax.random.split(key, count))
    (mean, _), _ = dense_results(arrays, (output_bar, None), multiplied=1)
    error = np.std(y, axis=0) / math.sqrt(count)
    assert np.all(np.abs(np.mean(y, axis=0) - mean) <= 5 * error)
    assert np.all(error > 0)


# --- without dropout, and without anything ------------------------------------------------

OPTIONS = {
    "causal window and scale": dict(is_causal=True, local_window_size=(5, 3), scale=0.2),
    "bias, mask and lengths": dict(
        bias="bnts", mask="1n1s", query_seq_lengths=[9, 6], key_value_seq_lengths=[11, 4]
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_without_dropout_it_is_the_attention_of_jax(case):
    options = dict(OPTIONS[case])
    sizes = dict(k=2, v=SIZES["h"])
    arrays, (output_bar, _) = operands(**sizes)
    given = {}
    if "bias" in options:
        (given["bias"],) = normal(1, shape_of(options.pop("bias")))
        options["mask"] = np.random.default_rng(2).random(shape_of(options["mask"])) < 0.8
        options["mask"][..., 0] = True
        for name in ("query_seq_lengths", "key_value_seq_lengths"):
            options[name] = np.asarray(options[name], np.int32)
    ours = attention(None, deterministic=True, **options)
    theirs = functools.partial(jax.nn.dot_product_attention, **options)
    arguments = named(*arrays, **given)
    assert_close(*(both_passes(f)(arguments, output_bar) for f in (ours, theirs)))


@pytest.mark.parametrize("limit", [dict(deterministic=True), dict(dropout_rate=0.0)], ids=str)
def test_every_way_to_switch_dropout_off_is_the_same(limit, key):
    arrays, (output_bar, _) = operands()
    plain = attention(None, dropout_rate=0, block_sizes=ONE_BLOCK)(*arrays)
    for dropout_key in (None, key):
        off = attention(dropout_key, **limit, block_sizes=ONE_BLOCK)(*arrays)
        np.testing.assert_array_equal(off, plain)
    assert_close(plain, dense_results(arrays, (output_bar, None), multiplied=1)[0][0])


def test_a_rate_of_one_leaves_zeros_and_zero_gradients_but_the_log_sum_exp():
    arrays, (output_bar, residual_bar) = operands()
    on = attention(None, dropout_rate=1.0, return_residual=True, block_sizes=ONE_BLOCK)
    cotangents = output_bar, np.zeros_like(residual_bar)
    (y, residual), gradients = both_passes(on)(named(*arrays), cotangents)
    for x in (y, *gradients.values()):
        np.testing.assert_array_equal(x, np.zeros_like(x))
    (_, expected), _ = dense_results(arrays, cotangents, multiplied=1)
    assert_close(residual, expected)


def test_one_trace_serves_every_traced_rate_and_flag(key):
    arrays, (output_bar, _) = operands()
    traces = 0

    @both_passes
    def passes(flag, **arguments):
        nonlocal traces
        traces += 1
        return attention(key, deterministic=flag, block_sizes=ONE_BLOCK)(**arguments)

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
    mask[:, 1, 3:8] = False
    (bias,) = normal(1, shape)
    bias[:, 2, 5] = -np.inf
    bias[:, :, 7, ::2] = -np.inf
    lengths = np.int32([11, 0])
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
    assert_close((results, gradients), (expected[0], only(gradients, expected[1])))


def test_large_logits_overflow_nowhere(key):
    """Not even in the padding of the last block, whose queries have no log-sum-exp."""
    arrays, (output_bar, _) = operands()
    (bias,) = normal(1, shape_of("111s"))
    multiplied = multiplier(key, shape_of("bnts"))
    (y, _), gradients = dense_results(arrays, (output_bar, None), multiplied=multiplied, bias=bias)
    arguments = named(*arrays, bias=bias + np.float32(1000))
    ours = both_passes(attention(key))(arguments, output_bar)
    assert_close(ours, (y, only(ours[1], gradients)), 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        dict(
            is_causal=True,
            local_window_size=2,
            start=np.int32([[0, 0, 0, 40], [0, 0, 40, 0]]),
            global_shape=(2, 4, 64, 64),
        ),
        dict(s=0),
    ],
    ids=["causal window", "no keys"],
)
def test_where_no_query_attends_to_a_key_everything_is_zero(options, key):
    options = dict(options)
    arrays, cotangents = operands(s=options.pop("s", SIZES["s"]))
    starts = options.pop("start", [None])
    ours = attention(key, return_residual=True, **options)
    passes = both_passes(lambda start, **x: ours(**x, start=start))
    for start in starts:
        start = None if start is None else tuple(start)
        (y, residual), gradients = passes(named(*arrays), cotangents, start=start)
        for x in (y, *gradients.values()):
            np.testing.assert_array_equal(x, np.zeros_like(x))
        np.testing.assert_array_equal(residual, np.full_like(residual, -np.inf))


@pytest.mark.parametrize("empty", ["b", "t", "v"])
def test_empty_axes_are_allowed(empty, key):
    arrays, output_and_bars = operands(**{empty: 0})
    y, gradients = jax.eval_shape(both_passes(attention(key)), named(*arrays), output_and_bars[0])
    assert y.shape == output_and_bars[0].shape
    assert gradients == jax.eval_shape(lambda: named(*map(jnp.asarray, arrays)))


# --- precision ----------------------------------------------------------------------------


def test_half_precision_is_as_good_as_that_of_jax(key):
    """Relative to dense attention in float64, with the mask and without."""
    sizes = dict(t=29, s=32, h=32, v=32)  # jax.nn takes no other features of the value
    kept = keep_mask(key, shape_of("bnts", **sizes))
    factor = multiplier(key, shape_of("bnts", **sizes))

    def errors(passes, dtype, multiplied):
        """Root mean square errors of the output and the gradients, in units of rounding."""
        arrays, (output_bar, _) = operands(**sizes)
        rounded, bar = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), (arrays, output_bar))
        wide, wide_bar = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), (rounded, bar))
        ours = passes(named(*rounded), bar)
        assert all(x.dtype == dtype for x in jax.tree.leaves(ours))
        (y, _), gradients = dense_results(wide, (wide_bar, None), multiplied=multiplied)
        theirs = y, only(ours[1], gradients)
        relative = jax.tree.map(
            lambda x, y: np.linalg.norm(x.astype(np.float32) - y) / np.linalg.norm(y),
            *jax.tree.map(np.asarray, (ours, theirs)),
        )
        return np.array(jax.tree.leaves(relative)) / float(jnp.finfo(dtype).eps)

    with jax.numpy_dtype_promotion("standard"):
        passes = both_passes(jax.nn.dot_product_attention)
        theirs = errors(passes, jnp.bfloat16, 1)
    equal, equal_bar = equal_probabilities(operands(**sizes)[0])
    for dtype in (jnp.float16, jnp.bfloat16):
        passes = both_passes(attention(key, block_sizes=(16, 12)))
        off = functools.partial(passes, deterministic=True)
        on = functools.partial(passes, deterministic=False)
        assert np.all(errors(off, dtype, 1) <= 2 * theirs)
        assert np.all(errors(on, dtype, factor) <= 2 * theirs)
        arguments = [x.astype(dtype) for x in map(jnp.asarray, equal)]
        y, gradients = on(named(*arguments), jnp.asarray(equal_bar).astype(dtype))
        assert_reveals(y.astype(jnp.float32), gradients["value"].astype(jnp.float32), kept)


def test_double_precision_is_kept_throughout(key):
    with jax.enable_x64(True):
        arrays, cotangents = jax.tree.map(lambda x: x.astype(np.float64), operands())
        shape = shape_of("bnts")
        lengths = np.array([11, 6])
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
        arrays, cotangents = operands()
        passes = both_passes(attention(key, is_causal=True, return_residual=True))
        results = jax.eval_shape(passes, named(*arrays), cotangents)
    assert {x.dtype for x in jax.tree.leaves(results)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients_have_the_dtypes_of_their_arguments(dtype, key):
    arrays, (output_bar, _) = operands()
    arguments, bar = jax.tree.map(
        lambda x: jnp.asarray(x).astype(dtype), (named(*arrays, scale=0.4), output_bar)
    )
    for bias_dtype in (jnp.bfloat16, jnp.float32):
        given = arguments | {"bias": jnp.zeros(shape_of("1n1s"), bias_dtype)}
        _, gradients = jax.eval_shape(both_passes(attention(key)), given, bar)
        assert {n: x.dtype for n, x in gradients.items()} == {n: x.dtype for n, x in given.items()}


def test_the_precision_of_products_is_the_one_asked_for(key):
    arrays, (output_bar, _) = operands()
    passes = both_passes(attention(key, precision=lax.Precision.HIGHEST))
    text = passes.lower(named(*arrays), output_bar).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) >= 2 + 5  # those of the forward and those of the backward pass
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


# --- transformations ----------------------------------------------------------------------


def dense(query, key, value, bias, scale, allowed, multiplied):
    """Dense attention in JAX, to be differentiated more than once. Every query has a key."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * scale + bias
    logits = jnp.where(allowed, logits, -jnp.inf)
    output = jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(logits) * multiplied, value)
    return output, jax.nn.logsumexp(logits, -1).swapaxes(1, 2)


def test_derivatives_of_every_mode_and_order_are_those_of_dense_attention(key):
    sizes = dict(b=1, t=5, s=6, n=2, k=1, v=4)
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

        @jax.jit
        def all_of_them(arguments, tangents):
            forward = jax.jvp(lambda x: function(**x), (arguments,), (tangents,))
            forward_over_reverse = jax.jvp(jax.grad(loss), (arguments,), (tangents,))
            reverse_over_reverse = jax.vjp(jax.grad(loss), arguments)[1](tangents)
            return forward, forward_over_reverse, reverse_over_reverse

        return all_of_them(arguments, tangents)

    ours = attention(key, is_causal=True, return_residual=True, block_sizes=(8, 4))
    theirs = functools.partial(dense, allowed=constants[0], multiplied=constants[1])
    assert_close(derivatives(ours), derivatives(theirs), 3e-5)


def test_a_scan_over_layers_with_folded_keys_and_checkpoints_is_the_loop(key):
    sizes = dict(s=9, v=4)
    (x, *_), (output_bar, _) = operands(**sizes)
    (weights,) = normal(4, (3, 4, 4))
    shape = shape_of("bnts", **sizes)
    ours = attention(None, is_causal=True, block_sizes=ONE_BLOCK)

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
            x, _ = dense(x, x, x, 0, np.float32(0.5), allowed, factor)
        return x

    arguments = dict(x=x, weights=weights)
    assert_close(*(both_passes(f)(arguments, output_bar) for f in (scanned, looped)), 3e-5)


def test_vmap_over_everything_equals_the_loop():
    count, whole = 3, (2, 4, 20, 20)
    shape = shape_of("bnts")
    arrays, (output_bar, _) = operands()
    stacked = [(count, *x.shape) for x in arrays]
    queries, keys, values, biases = normal(6, *stacked, (count, *shape_of("1n1s")))
    arguments = named(queries, keys, values, bias=biases, scale=np.float32([0.2, 0.4, 0.6]))
    lengths = np.int32([[9, 5], [10, 10], [2, 17]])
    constants = dict(
        dropout_key=jax.random.split(jax.random.key(5), count),
        key_value_seq_lengths=lengths,
        start=np.int32([[0, 0, 0, 0], [0, 0, 3, 0], [0, 0, 8, 4]]),
    )
    ours = attention(None, is_causal=True, global_shape=whole)
    passes = both_passes(lambda start, **x: ours(**x, start=tuple(start))).__wrapped__
    batched = jax.jit(jax.vmap(lambda x, c: passes(x, output_bar, **c)))(arguments, constants)
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
    shape = shape_of("bnts")
    arrays, (output_bar, _) = operands()
    (biases,) = normal(6, (3, *shape))
    passes = both_passes(functools.partial(attention(key, block_sizes=ONE_BLOCK), *arrays))
    batched = jax.jit(jax.vmap(lambda bias: passes.__wrapped__(dict(bias=bias), output_bar)))(
        biases
    )
    multiplied = multiplier(key, shape)
    for i, bias in enumerate(biases):
        (y, _), gradients = dense_results(
            arrays, (output_bar, None), multiplied=multiplied, bias=bias
        )
        expected = y, only(["bias"], gradients)
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), expected)


def test_the_gradient_exports_for_cpu_cuda_and_tpu(key):
    arrays, (output_bar, _) = operands()
    passes = jax.jit(both_passes(attention(key, is_causal=True)).__wrapped__)
    export.export(passes, platforms=("cpu", "cuda", "tpu"))(named(*arrays), output_bar)


# --- costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(is_causal=True)], ids=["plain", "causal"])
def test_residuals_are_the_inputs_the_output_and_a_number_per_query(options, key):
    sizes = dict(b=2, t=256, s=512, n=4, k=2, h=8, v=8)
    arrays, results = operands(**sizes)
    arguments = named(*arrays, bias=np.zeros(shape_of("1n1s", **sizes), np.float32))

    def residuals(arguments):
        return jax.vjp(lambda x: attention(key, block_sizes=(16, 8), **options)(**x), arguments)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, arguments))
    needed = sum(x.size for x in (*arguments.values(), *results))
    one_block_of_rows = results[0].size * 16 // sizes["t"]
    assert needed <= sum(leaf.size for leaf in leaves) <= needed + 2 * one_block_of_rows


def test_temporaries_of_the_gradient_are_linear_in_the_length(key):
    def temporaries(function, length):
        def loss(query, keys, value):
            return jnp.sin(function(query, keys, value)).sum()

        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = attention(key, block_sizes=None)
    short, long = (temporaries(ours, length) for length in (2048, 4096))
    assert long <= 2.2 * short
    assert long <= 4096**2 / 2  # half a byte for each probability
    assert temporaries(jax.nn.dot_product_attention, 4096) > 4 * 4096**2  # the control


def test_other_keys_scales_and_lengths_trace_nothing_again():
    arrays, _ = operands()
    lengths = jnp.array([[9, 5], [3, 4]])
    keys = jax.random.split(jax.random.key(5), 2)
    arrays = [jnp.asarray(x) for x in arrays]

    def call(i):
        ours = attention(keys[i], scale=0.1 * i, block_sizes=ONE_BLOCK)
        ours(*arrays, query_seq_lengths=lengths[i])

    call(0)
    lengths, keys = list(lengths), list(keys)
    with jax.no_tracing():
        call(1)


# --- errors -------------------------------------------------------------------------------

X = np.ones((2, 4, 2, 3), np.float32)
ERRORS = {
    "query list": (dict(query=[1.0]), TypeError, "query must be an array, got list"),
    "key None": (dict(key=None), TypeError, "key must be an array, got NoneType"),
    "value fix": (dict(value="x"), TypeError, "Convert it with jnp.asarray"),
    "query integer": (dict(query=X.astype(int)), TypeError, "query must be a float16, bfloat16"),
    "key complex": (dict(key=X * 1j), TypeError, "key must be real, got dtype complex"),
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
