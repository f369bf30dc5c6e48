"""What models need of attention, exact against the dense reference: packed documents, soft caps,
biases and masks by position, alignment, dropped logits and weights."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_attention import (
    ONE_BLOCK,
    SIZES,
    assert_close,
    attention,
    both_passes,
    dense_results,
    keep_mask,
    multiplier,
    named,
    normal,
    only,
    operands,
    positions_allowed,
    shape_of,
)
from jax import export

import jdropout
from jdropout import by_position
from jdropout.by_position import PositionFunction

# --- the numbers of dense attention -------------------------------------------------------

DOCUMENTS = np.int32([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0], [5, 5, 5, 5, 5, 1, 1, 1, 1, 1, 1]])
MIXED = np.int32([[4, 1, 2, 2, 7, 1, 4, 7, 9], [1, 1, 0, 0, 1, 0, 1, 0, 2]])


def far(query, key, head, strength, shift):
    """A learned bias that depends on all positions, and on two arrays of its own."""
    return strength[head] * jnp.cos(0.3 * jnp.float32(query - key) + shift) + shift * jnp.float32(
        key
    )


def on_a_grid(query, key, head, table):
    """The learned bias of positions relative in two dimensions, on a grid of rows of 4."""
    rows, columns = (query // 4 - key // 4) % 3, (query % 4 - key % 4) % 7
    return table[head, rows, columns]


def in_stripes(query, key, head):
    return (query + 2 * key + head) % 3 > 0


def near_or(query, key, head, distance):
    return (abs(query - key) <= distance) | (key == 0)


CASES = {
    "packed documents, causal": dict(
        t=11, is_causal=True, query_segment_ids=DOCUMENTS, block_sizes=(3, 4)
    ),
    "segments of keys for both, window, soft cap, bias with infinities": dict(
        t=11,
        key_value_segment_ids=DOCUMENTS,
        local_window_size=2,
        logits_soft_cap=0.7,
        bias="bnts",
        mask="1nt1",
    ),
    "many blocks, in chunks": dict(
        t=10,
        s=19,
        k=2,
        v=5,
        block_sizes=(1, 1),
        is_causal=True,
        causal_alignment="bottom-right",
        query_segment_ids=DOCUMENTS[:, :10],
        key_value_segment_ids=np.concatenate([DOCUMENTS[:, :9], DOCUMENTS[:, 1:]], axis=1),
        bias="bnts",
        bias_fn="far",
    ),
    "segments out of order, grouped": dict(
        k=2, query_segment_ids=MIXED, key_value_segment_ids=DOCUMENTS, mask="b1t1"
    ),
    "bottom-right, causal window": dict(
        causal_alignment="bottom-right", is_causal=True, local_window_size=(4, 1)
    ),
    "bottom-right, fewer keys, learned biases, grouped": dict(
        s=6,
        v=6,
        k=2,
        causal_alignment="bottom-right",
        is_causal=True,
        bias_fn=("far", "grid"),
        bias="1n1s",
    ),
    "bottom-right, lengths": dict(
        causal_alignment="bottom-right",
        is_causal=True,
        query_seq_lengths=np.int32([5, 9]),
        key_value_seq_lengths=np.int32([11, 4]),
        bias_fn="far",
    ),
    "dropped logits, grouped, masks without a range": dict(
        k=1,
        dropout_on="logits",
        is_causal=True,
        dropout_precision=32,
        block_sizes=(2, 3),
        mask_fn=("stripes", "near"),
    ),
    "a prefix for each, and a window": dict(t=11, mask_fn=("prefix", "window"), is_causal=False),
    "documents by position, linear biases and buckets": dict(
        t=11,
        mask_fn="document",
        is_causal=True,
        bias_fn=("alibi", "relative"),
        block_sizes=(4, 4),
    ),
    "part of a whole, everything": dict(
        k=2,
        start=(1, 2, 3, 5),
        global_shape=(3, 6, 20, 24),
        is_causal=True,
        causal_alignment="bottom-right",
        query_segment_ids=MIXED,
        key_value_segment_ids=DOCUMENTS % 3,
        bias_fn="far",
        mask_fn="near",
        logits_soft_cap=2.0,
        dropout_on="logits",
        block_sizes=(16, 4),
    ),
}


def functions_of(names):
    """Arrays by name, and functions of them that make functions of positions."""
    strength, grid = normal(3, (8,), (8, 3, 7))
    (table,) = normal(4, (8, 4))
    arrays = {
        "alibi": (by_position.alibi_slopes(4),),
        "relative": (table,),
        "far": (strength, np.float32(0.2)),
        "grid": (grid,),
    }
    make = {
        "alibi": by_position.alibi,
        "relative": functools.partial(by_position.relative_bias, max_distance=6),
        "far": functools.partial(PositionFunction, far),
        "grid": functools.partial(PositionFunction, on_a_grid),
        "prefix": lambda: by_position.prefix_lm(jnp.int32([3, 7])),
        "window": lambda: by_position.sliding_window(np.int32(5), 2),
        "document": lambda: by_position.document(DOCUMENTS),
        "stripes": lambda: PositionFunction(in_stripes),
        "near": lambda: PositionFunction(near_or, np.int32(2)),
    }
    names = (names,) if isinstance(names, str) else names
    return {name: arrays.get(name, ()) for name in names}, make


def everywhere(function, shape, start, aligned):
    """A function of positions on the whole matrix, by its definition."""
    b, n, t, s = shape
    queries = np.arange(t) + start[2] + np.reshape(aligned, (-1, 1))
    queries = np.broadcast_to(queries, (b, t)).reshape(b, 1, t, 1)
    heads, keys = (np.arange(n) + start[1]).reshape(n, 1, 1), np.arange(s) + start[3]
    rows = []
    for i in range(b):
        arrays = [x[i] if function.per_example else x for x in function.arrays]
        grid = jnp.broadcast_arrays(queries[i], keys, heads)
        over_grid = jax.vmap(function.function, (0, 0, 0) + (None,) * len(arrays))
        rows.append(over_grid(*(x.ravel() for x in grid), *arrays).reshape(n, t, s))
    return jnp.stack(rows)


POSITIONS = (
    "is_causal",
    "local_window_size",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "query_segment_ids",
    "key_value_segment_ids",
)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_dense_attention(case, key):
    options = dict(CASES[case])
    sizes = {axis: options.pop(axis) for axis in SIZES if axis in options}
    shape, start = shape_of("bnts", **sizes), options.get("start", (0, 0, 0, 0))
    arrays, cotangents = operands(**sizes)
    given, mask = dict(scale=np.float32(0.4)), True
    if axes := options.pop("mask", None):
        mask = np.random.default_rng(2).random(shape_of(axes, **sizes)) < 0.8
    if axes := options.pop("bias", None):
        (given["bias"],) = normal(1, shape_of(axes, **sizes))
        if "infinities" in case:
            given["bias"][:, 1, 3:5, ::2] = -np.inf
    aligned = 0
    if options.get("causal_alignment"):
        *_, t, s = options.get("global_shape", shape)
        aligned = options.get("key_value_seq_lengths", s) - options.get("query_seq_lengths", t)
    bias_arrays, make = functions_of(options.pop("bias_fn", ()))
    masks = [make[name]() for name in functions_of(options.pop("mask_fn", ()))[0]]

    def dense_bias(bias_arrays, bias=0.0):
        for name, own in bias_arrays.items():
            bias = bias + everywhere(make[name](*own), shape, start, aligned)
        return jnp.broadcast_to(bias, shape)

    allowed = mask & positions_allowed(
        shape,
        start=start,
        aligned=aligned,
        **{name: options[name] for name in options if name in POSITIONS},
    )
    for function in masks:
        allowed = allowed & np.asarray(everywhere(function, shape, start, aligned))
    of_mask = {
        name.removeprefix("dropout_"): options[name]
        for name in ("dropout_precision", "start", "global_shape")
        if name in options
    }
    multiplied = multiplier(key, shape, **of_mask)
    if options.get("dropout_on") == "logits":
        allowed, multiplied = allowed & (multiplied > 0), 1
    bias, pull = jax.vjp(dense_bias, bias_arrays, given.get("bias", np.float32(0)))
    results, expected = dense_results(
        arrays,
        cotangents,
        allowed=allowed,
        multiplied=multiplied,
        scale=given["scale"],
        soft_cap=options.get("logits_soft_cap"),
        bias=np.asarray(bias),
    )
    expected["bias_arrays"], expected["bias"] = pull(expected["bias"].astype(np.float32))

    def ours(bias_arrays, **arguments):
        biases = [make[name](*own) for name, own in bias_arrays.items()]
        return attention(
            key,
            mask=None if mask is True else mask,
            bias_fn=biases or None,
            mask_fn=masks or None,
            return_residual=True,
            **options,
        )(**arguments)

    arguments = named(*arrays, **given, bias_arrays=bias_arrays)
    ours, gradients = both_passes(ours)(arguments, cotangents)
    assert_close((ours, gradients), (results, only(gradients, expected)), 2e-5)


# --- blocks that are skipped --------------------------------------------------------------

ONE_HEAD = dict(b=1, t=12, s=12, n=1, k=1, v=12)
SKIPPED = {
    "documents": dict(query_segment_ids=np.int32([[1] * 4 + [2] * 5 + [3] * 3]), is_causal=True),
    "bottom-right": dict(is_causal=True, causal_alignment="bottom-right", s=8, v=8),
    "chunks": dict(local_window_size=2, t=18, s=18, v=18, block_sizes=(1, 1)),
    "range": dict(mask_fn=by_position.sliding_window(np.int32(2), 1)),
    "no range": dict(mask_fn=PositionFunction(near_or, np.int32(1))),
    "prefix": dict(mask_fn=by_position.prefix_lm(np.int32([5]))),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_blocks_in_which_nothing_is_allowed_are_skipped_in_both_passes(case, key):
    options = dict(SKIPPED[case])
    sizes = ONE_HEAD | {axis: options.pop(axis) for axis in SIZES if axis in options}
    rows, columns = options.pop("block_sizes", (4, 2))
    arrays, (output_bar, _) = operands(**sizes)
    shape = shape_of("bnts", **sizes)
    visited = set()

    def see(query, key):
        visited.update(zip(np.ravel(query // rows), np.ravel(key // columns), strict=True))

    def bias(query, key, head):
        jax.debug.callback(see, query - offset, key)
        return 0.1 * jnp.float32(query)

    offset = shape[3] - shape[2] if "causal_alignment" in options else 0
    of_positions = {name: options[name] for name in options if name in POSITIONS}
    allowed = positions_allowed(shape, aligned=offset, **of_positions)
    if "mask_fn" in options:
        allowed &= np.asarray(everywhere(options["mask_fn"], shape, (0, 0, 0, 0), 0))
    blocks = allowed[0, 0].reshape(shape[2] // rows, rows, shape[3] // columns, columns)
    needed = {(int(i), int(j)) for i, j in np.argwhere(blocks.any((1, 3)))}
    assert len(needed) < blocks.shape[0] * blocks.shape[2]

    run = attention(key, bias_fn=bias, block_sizes=(rows, columns), **options)
    jax.block_until_ready(both_passes(run)(named(*arrays), output_bar))
    jax.effects_barrier()
    assert visited == needed


# --- functions of positions ---------------------------------------------------------------


def test_what_a_function_closes_over_has_gradients(key):
    arrays, (output_bar, _) = operands()
    strength, shift = normal(3, (8,))[0], np.float32(0.2)

    def closed(strength, shift, **arguments):
        run = attention(
            key,
            bias_fn=lambda query, key, head: far(query, key, head, strength, shift),
            mask_fn=lambda query, key, head: (shift < 1) & in_stripes(query, key, head),
        )
        return run(**arguments)

    def given(strength, shift, **arguments):
        bias = PositionFunction(far, strength, shift)
        return attention(key, bias_fn=bias, mask_fn=in_stripes)(**arguments)

    arguments = named(*arrays, strength=strength, shift=shift)
    ours, expected = (both_passes(function)(arguments, output_bar) for function in (closed, given))
    assert_close(ours, expected, 1e-6)
    each = jax.vmap(
        lambda strength: both_passes(closed).__wrapped__(
            named(*arrays, strength=strength, shift=shift), output_bar
        )
    )(np.stack([strength, 2 * strength]))
    assert_close(jax.tree.map(lambda x: x[0], each), expected, 1e-5)


def test_derivatives_of_every_mode_and_order(key):
    """Forward over reverse over the arrays of a bias, and through cap and dropped logits."""
    sizes = dict(b=1, t=5, s=6, n=2, k=1, v=4)
    arrays, (output_bar, _) = operands(**sizes)
    (strength,) = normal(3, (8,))
    keep = keep_mask(key, shape_of("bnts", **sizes))

    def ours(strength):
        bias = PositionFunction(far, strength, np.float32(0.2))
        options = dict(logits_soft_cap=1.5, dropout_on="logits", block_sizes=(2, 4))
        return (attention(key, bias_fn=bias, **options)(*arrays) * output_bar).sum()

    def dense(strength):
        query, keys, value = arrays
        bias = PositionFunction(far, strength, np.float32(0.2))
        logits = jnp.einsum("btnh,bskh->bnts", query, keys) / 2
        logits += everywhere(bias, shape_of("bnts", **sizes), (0, 0, 0, 0), 0)
        logits = jnp.where(keep, 1.5 * jnp.tanh(logits / 1.5), -jnp.inf)
        return (jnp.einsum("bnts,bskv->btnv", jax.nn.softmax(logits), value) * output_bar).sum()

    for derivative in (jax.jacfwd, jax.hessian):
        assert_close(*(jax.jit(derivative(f))(strength) for f in (ours, dense)), 2e-5)


def test_ready_made_functions_made_again_are_the_same_program():
    """Static parts that compared by identity would compile every call of a training loop."""
    for make in (
        lambda: by_position.alibi(4),
        lambda: by_position.relative_bias(np.ones((8, 4), np.float32)),
        lambda: by_position.sliding_window(3),
        lambda: by_position.prefix_lm(3),
        lambda: by_position.document(DOCUMENTS),
    ):
        assert jax.tree.structure(make()) == jax.tree.structure(make())


def test_buckets_are_those_of_t5():
    """By the formula of section 2.1 of the paper and its code, at all distances."""
    for buckets, distance, both in [(32, 128, True), (32, 128, False), (6, 20, True)]:
        table = np.arange(buckets, dtype=np.float32)[:, None]
        function = by_position.relative_bias(table, bidirectional=both, max_distance=distance)
        offsets = np.arange(-150, 151, 3)
        ours = [
            function.function(np.int32(200), np.int32(200 + offset), 0, *function.arrays)
            for offset in offsets
        ]
        of_direction = buckets // (1 + both)
        exact = of_direction // 2
        n = np.abs(offsets) if both else np.maximum(-offsets, 0)
        with np.errstate(divide="ignore"):
            log = np.log(n / exact) / np.log(distance / exact)
        grown = np.where(n < exact, 0, log) * (of_direction - exact) + 1e-9
        expected = np.where(
            n < exact, n, np.minimum(exact + np.floor(grown), of_direction - 1)
        ) + both * of_direction * (offsets > 0)
        np.testing.assert_array_equal(ours, expected)


def test_slopes_are_those_of_the_paper():
    eight = 2.0 ** -np.arange(1, 9)
    np.testing.assert_allclose(by_position.alibi_slopes(8), eight)
    np.testing.assert_allclose(by_position.alibi_slopes(12), [*eight, *2.0 ** -np.arange(0.5, 4)])


# --- half precisions, costs, exports ------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_has_sums_in_single(dtype, key):
    arrays, (output_bar, _) = operands()
    (table,) = normal(4, (8, 4))
    options = dict(query_segment_ids=MIXED, key_value_segment_ids=DOCUMENTS % 3)

    def run(table, query, keys, value):
        bias = by_position.relative_bias(table, max_distance=6)
        run = attention(key, bias_fn=bias, logits_soft_cap=2.0, **options)
        return run(query, keys, value)

    half = [jnp.asarray(x, dtype) for x in (table, *arrays)]
    whole = [x.astype(np.float32) for x in half]
    results = []
    for arguments in (half, whole):
        y, pull = jax.vjp(run, *arguments)
        gradients = pull(jnp.asarray(output_bar, y.dtype))
        assert [x.dtype for x in (y, *gradients)] == [arguments[0].dtype] * 5
        results.append([np.asarray(x, np.float32) for x in (y, *gradients)])
    assert_close(*results, 0.02)


def test_double_precision_is_kept_throughout(key):
    with jax.enable_x64(True):
        arrays, cotangents = jax.tree.map(lambda x: x.astype(np.float64), operands(k=2))
        shape = shape_of("bnts")
        slopes = np.linspace(0.1, 0.4, 4)
        distance = abs(np.arange(shape[2])[:, None] - np.arange(shape[3]))
        same = positions_allowed(
            shape, query_segment_ids=MIXED, key_value_segment_ids=DOCUMENTS
        ) & keep_mask(key, shape)
        results, expected = dense_results(
            arrays,
            cotangents,
            allowed=same,
            multiplied=1,
            soft_cap=2.0,
            bias=-slopes[:, None, None] * np.broadcast_to(distance, shape),
        )
        expected["slopes"] = -(expected["bias"] * distance).sum((0, 2, 3))
        options = dict(query_segment_ids=MIXED, key_value_segment_ids=DOCUMENTS)

        def run(slopes, **arguments):
            return attention(
                key,
                bias_fn=by_position.alibi(slopes),
                logits_soft_cap=2.0,
                dropout_on="logits",
                return_residual=True,
                **options,
            )(**arguments)

        ours, gradients = both_passes(run)(named(*arrays, slopes=slopes), cotangents)
        assert all(x.dtype == np.float64 for x in jax.tree.leaves((ours, gradients)))
        assert_close((ours, gradients), (results, only(gradients, expected)), 1e-13)


def test_a_scan_over_layers_with_checkpoints_is_the_loop(key):
    shape = shape_of("bnts", s=9, v=4)
    (x,), (slopes,) = normal(7, shape_of("btnh")), normal(8, (3, 4))

    def layer(x, slopes, index):
        run = attention(
            jax.random.fold_in(key, index),
            bias_fn=lambda query, key, head: slopes[head] * jnp.float32(query - key),
            mask_fn=by_position.prefix_lm(np.int32(3)),
            query_segment_ids=MIXED,
            logits_soft_cap=2.0,
            block_sizes=ONE_BLOCK,
        )
        return run(x, x, x)

    def scanned(x, slopes):
        step = jax.checkpoint(lambda x, each: (layer(x, *each), None))
        return jax.lax.scan(step, x, (slopes, jnp.arange(3)))[0]

    def looped(x, slopes):
        for index in range(3):
            x = layer(x, slopes[index], index)
        return x

    arguments, bar = dict(x=x, slopes=slopes), np.ones_like(x)
    assert shape[2] == shape[3]
    assert_close(*(both_passes(f)(arguments, bar) for f in (scanned, looped)), 3e-5)


def test_nothing_of_the_size_of_the_matrix_is_stored(key):
    def temporaries(length):
        def loss(table, x, ids):
            y = attention(
                key,
                bias_fn=by_position.relative_bias(table),
                mask_fn=(by_position.document(ids), by_position.sliding_window(np.int32(900))),
                query_segment_ids=ids[None],
                logits_soft_cap=5.0,
                is_causal=True,
                block_sizes=None,
            )(x, x, x)
            return jnp.sin(y).sum()

        shapes = ((32, 1), jnp.float32), ((1, length, 1, 16), jnp.float32), ((length,), jnp.int32)
        arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(4096)
    assert long <= 2.2 * short
    assert long <= 4096**2  # a byte for each probability, where one float would be four


def test_the_gradient_exports_with_all_options(key):
    arrays, (output_bar, _) = operands(k=2)
    passes = both_passes(
        attention(
            key,
            query_segment_ids=MIXED,
            key_value_segment_ids=DOCUMENTS,
            bias_fn=by_position.alibi(4),
            mask_fn=in_stripes,
            logits_soft_cap=2.0,
            dropout_on="logits",
        )
    )
    export.export(jax.jit(passes.__wrapped__), platforms=("cpu", "cuda", "tpu"))(
        named(*arrays), output_bar
    )


def test_blocks_are_those_of_the_platform_that_a_program_is_compiled_for(key):
    x = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
    run = jax.jit(lambda x: attention(key, block_sizes=None)(x, x, x))
    blocks = {"cpu": "512x256", "tpu": "512x2048", "cuda": "512x2048"}
    for platform, expected in blocks.items():
        text = export.export(run, platforms=(platform,))(x).mlir_module()
        assert {block for block in blocks.values() if f"x{block}x" in text} == {expected}


# --- weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_on", ["probabilities", "logits"])
def test_weights_are_the_probabilities_before_their_dropout(dropout_on, key):
    arrays, _ = operands(k=2)
    options = dict(is_causal=True, logits_soft_cap=2.0, dropout_on=dropout_on)
    run = attention(key, return_residual=True, return_weights=True, **options)
    y, _, weights = jax.jit(run)(*arrays)
    np.testing.assert_array_equal(y, jax.jit(attention(key, **options))(*arrays))
    allowed = positions_allowed(shape_of("bnts"), is_causal=True)
    multiplied = multiplier(key, shape_of("bnts"))
    if dropout_on == "logits":
        allowed, multiplied = allowed & (multiplied > 0), 1
    value = np.broadcast_to(np.eye(11, dtype=np.float32)[:, None], arrays[2].shape)
    bars = (np.zeros_like(y), None)
    (expected, _), _ = dense_results(
        [*arrays[:2], value], bars, multiplied=1, allowed=allowed, soft_cap=2.0
    )
    assert_close(weights, np.swapaxes(expected, 1, 2))
    value = np.repeat(arrays[2], 2, axis=2)
    assert_close(np.einsum("bnts,bsnv->btnv", weights * multiplied, value), y)
    assert attention(None, deterministic=True, return_weights=True)(*arrays)[1].shape == (
        2,
        4,
        9,
        11,
    )


# --- errors -------------------------------------------------------------------------------

X = np.ones((2, 4, 2, 3), np.float32)
IDS = np.ones((2, 4), np.int32)
ERRORS = {
    "ids dtype": (dict(query_segment_ids=IDS * 1.0), TypeError, "array of integers, got dtype"),
    "ids shape": (
        dict(key_value_segment_ids=IDS[:1]),
        ValueError,
        "shape (2, 4), got shape (1, 4)",
    ),
    "ids alone": (
        dict(query=X[:, :3], query_segment_ids=IDS[:, :3]),
        ValueError,
        "alone is for queries and keys of the same length, got 3 queries and 4 keys",
    ),
    "ids dtypes": (
        dict(query_segment_ids=IDS.astype(np.uint32), key_value_segment_ids=IDS),
        TypeError,
        "must have the same dtype, got uint32 and int32",
    ),
    "alignment": (dict(causal_alignment="right"), ValueError, "causal_alignment must be"),
    "cap zero": (dict(logits_soft_cap=0.0), ValueError, "must be a finite number above 0, got 0.0"),
    "cap array": (dict(logits_soft_cap=X), TypeError, "logits_soft_cap must be a Python number"),
    "dropout_on": (dict(dropout_on="keys"), ValueError, "dropout_on must be"),
    "weights flag": (dict(return_weights=1), TypeError, "return_weights must be"),
    "bias array": (dict(bias_fn=X), TypeError, "bias_fn must be a function of (query_position"),
    "mask dtype": (dict(mask_fn=lambda q, k, h: q - k), TypeError, "must return a boolean"),
    "bias dtype": (dict(bias_fn=lambda q, k, h: q < k), TypeError, "must return a float"),
    "bias shape": (dict(bias_fn=lambda q, k, h: X), ValueError, "must return a scalar"),
    "examples": (
        dict(mask_fn=by_position.prefix_lm(np.int32([1, 2, 3]))),
        ValueError,
        "must have the batch size 2 as its first axis, got shape (3,)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_the_value_and_the_fix(case):
    changes, error, text = ERRORS[case]
    arguments = dict(query=X, key=X, value=X, dropout_key=jax.random.key(0), dropout_rate=0.5)
    with pytest.raises(error, match=re.escape(text)):
        jdropout.dot_product_attention(**arguments | changes)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: by_position.alibi(0), ValueError, "slopes must be at least 1"),
        (lambda: by_position.alibi(X), ValueError, "slopes must have one number per head"),
        (lambda: by_position.relative_bias(X), ValueError, "table must have the axes"),
        (lambda: by_position.relative_bias(X[0, :, 0] > 0), TypeError, "table must be a floating"),
        (
            lambda: by_position.relative_bias(np.ones((32, 4), np.float32), max_distance=8),
            ValueError,
            "max_distance must be above 8",
        ),
        (lambda: by_position.sliding_window(1.5), TypeError, "before must be whole numbers"),
        (lambda: by_position.prefix_lm(X.astype(int)), ValueError, "at most 1 axes"),
        (lambda: by_position.document(np.int32(3)), ValueError, "one number per position"),
    ],
)
def test_ready_made_functions_check_their_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()
