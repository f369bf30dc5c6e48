"""The Pallas kernels, interpreted: the bits of the law, and the numbers of the references.

They are also lowered for a TPU, which needs none. `benchmarks/compiled.py` compiles them for one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import normal
from dense_attention import (
    assert_close,
    assert_reveals,
    attention,
    both_passes,
    dense_results,
    equal_probabilities,
    keep_mask,
    multiplier,
    named,
    only,
    operands,
    positions_allowed,
)

import jdropout
from jdropout import _dropout_kernel_gpu, _kernels
from jdropout._new_draw import new_draw


def variants(cases, *kept):
    """The names of cases; on other versions of JAX only the ones that are kept run."""
    return [
        name if name in kept else pytest.param(name, marks=pytest.mark.one_version)
        for name in cases
    ]


# --- elementwise --------------------------------------------------------------------------

kernel = functools.partial(jdropout.dropout, implementation="pallas")
# Whole tiles, ragged ones, small ones taken together, wide rows of both digits, a shared axis.
CALLS = {
    "tiles": ((264, 520), 0.3, {}),
    "ragged": ((77, 130), 0.3, {}),
    "small, together": ((2, 5, 9, 12), 0.3, {}),
    "two digits": ((3, 40, 300), 0.001, {}),
    "shared": ((4, 33, 129), 0.3, dict(broadcast_dims=(0,))),
    "part": ((2, 9, 30), 0.3, dict(start=(3, 8, 5), global_shape=(6, 50, 64))),
    "far part": ((1, 9, 30), 0.3, dict(start=(2**17, 8, 5), global_shape=(2**18, 2**10, 2**9))),
}


@pytest.mark.parametrize("case", variants(CALLS, "ragged"))
def test_the_kernel_is_dropout_bit_for_bit(case, key):
    shape, rate, options = CALLS[case]
    x = normal(*shape) + 3
    expected = jdropout.dropout(key, x, rate, **options)
    assert 0 < (expected == 0).mean() < 1
    np.testing.assert_array_equal(kernel(key, x, rate, **options), expected)


@pytest.mark.one_version
@pytest.mark.parametrize("case", ["ragged", "small, together", "two digits", "part"])
def test_the_gpu_kernel_is_dropout_bit_for_bit(case, key):
    shape, rate, options = CALLS[case]
    x = (normal(*shape) + 3).astype(jnp.bfloat16)
    draw = new_draw("dropout", key, rate, False, shape, **options).with_mask_keys()
    numbers = {
        "dropout": _kernels.operand(draw),
        "factor": draw.scale(np.dtype("float32"))[None, None],
    }
    operands = numbers | {"x": x.reshape(-1, *shape[-2:]) if len(shape) == 2 else x}
    y = _dropout_kernel_gpu.run(draw.description, operands, interpret=True).reshape(shape)
    expected = jdropout.dropout(key, x, rate, **options)
    np.testing.assert_array_equal(y.astype(jnp.float32), expected.astype(jnp.float32))

    operands["residual"] = jnp.ones_like(operands["x"])
    sums = _dropout_kernel_gpu.run(draw.description, operands, interpret=True).reshape(shape)
    np.testing.assert_array_equal(sums.astype(jnp.float32), (y + 1).astype(jnp.float32))


def test_the_kernel_with_traced_arguments_and_half_precision(key):
    x = (normal(3, 40, 130) + 3).astype(jnp.bfloat16)

    @jax.jit
    def both(rate, flag):
        arguments = dict(deterministic=flag, precision=32)
        both = [f(key, x, rate, **arguments) for f in (jdropout.dropout, kernel)]
        return [y.astype(jnp.float32) for y in both]

    for rate in (0.3, 0.0, 1.0, 2.0):
        np.testing.assert_array_equal(*both(rate, False))
    np.testing.assert_array_equal(both(0.3, True)[1], x.astype(jnp.float32))


@pytest.mark.one_version
def test_the_kernel_is_linear_to_any_order_and_batches(key):
    x = normal(2, 33, 130)

    def twice(function, key, x):
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(function(key, x, 0.3))))
        return jax.grad(lambda x: jnp.sum(slope(x) ** 2))(x)

    def over_keys(function):
        return jax.jit(jax.vmap(functools.partial(twice, function)))(jax.random.split(key, 2), x)

    assert_close(over_keys(kernel), over_keys(jdropout.dropout))


@pytest.mark.parametrize("bias", [True, False])
def test_bias_dropout_add_in_one_kernel(bias, key):
    x, residual, y_bar = normal(5, 34, 140), normal(5, 34, 140, seed=1), normal(5, 34, 140, seed=2)
    arguments = (x, normal(140, seed=3) if bias else None, residual)

    @functools.partial(jax.jit, static_argnums=0)
    def passes(implementation, *arguments):
        def call(x, bias, residual):
            return jdropout.bias_dropout_add(
                key, x, bias, residual, 0.3, implementation=implementation
            )

        y, pullback = jax.vjp(call, *arguments)
        return y, pullback(y_bar)

    assert_close(passes("pallas", *arguments), passes("xla", *arguments), 1e-6)


def test_bias_dropout_add_where_nothing_is_drawn():
    x, bias = jnp.ones((4, 8)), jnp.arange(8.0)
    call = functools.partial(jdropout.bias_dropout_add, None, x, bias, x, implementation="pallas")
    np.testing.assert_array_equal(call(0.5, deterministic=True), x + bias[None] + x)
    np.testing.assert_array_equal(call(1.0), x)


# --- attention ----------------------------------------------------------------------------

TILES = (128, 128)
IDS = np.int32(np.arange(2 * 260).reshape(2, 260) // 70)
CASES = {
    "causal, ragged": dict(t=150, s=270, is_causal=True),
    "lengths, window, bottom-right": dict(
        t=140,
        s=260,
        is_causal=True,
        causal_alignment="bottom-right",
        local_window_size=(90, 3),
        query_seq_lengths=np.int32([140, 12]),
        key_value_seq_lengths=np.int32([130, 260]),
    ),
    "documents, soft cap, two digits": dict(
        t=260, s=260, query_segment_ids=IDS, logits_soft_cap=0.8, dropout_precision=32
    ),
    "dropped logits, part of a whole": dict(
        t=140,
        s=130,
        is_causal=True,
        dropout_on="logits",
        start=(1, 2, 8, 5),
        global_shape=(3, 6, 200, 300),
    ),
    "one row of tiles, grouped, shared by examples and heads": dict(
        t=70, s=140, k=2, v=9, dropout_broadcast_dims=(0, 1)
    ),
}
POSITIONS = ("is_causal", "local_window_size", "query_seq_lengths", "key_value_seq_lengths")


@pytest.mark.parametrize("case", variants(CASES, "lengths, window, bottom-right"))
def test_values_and_gradients_are_those_of_dense_attention(case, key, monkeypatch):
    # A chunk of queries per tile.
    monkeypatch.setattr("jdropout._attention._kernels._CHUNK_BYTES", 128 * 4 * 4)
    options = dict(CASES[case])
    sizes = {axis: options.pop(axis) for axis in "tskv" if axis in options}
    arrays, cotangents = operands(**sizes)
    shape = (2, 4, sizes["t"], sizes["s"])
    aligned = 0
    if options.get("causal_alignment"):
        aligned = options["key_value_seq_lengths"] - options["query_seq_lengths"]
    allowed = positions_allowed(
        shape,
        start=options.get("start", (0, 0, 0, 0)),
        aligned=aligned,
        **{name: options[name] for name in (*POSITIONS, "query_segment_ids") if name in options},
    )
    of_mask = {name: options[name] for name in ("start", "global_shape") if name in options}
    of_mask |= dict(
        broadcast_dims=options.get("dropout_broadcast_dims", ()),
        precision=options.get("dropout_precision"),
    )
    multiplied = multiplier(key, shape, **of_mask)
    if options.get("dropout_on") == "logits":
        allowed, multiplied = allowed & (multiplied > 0), 1
    results, expected = dense_results(
        arrays,
        cotangents,
        allowed=allowed,
        multiplied=multiplied,
        scale=np.float32(0.4),
        soft_cap=options.get("logits_soft_cap"),
    )
    ours = attention(
        key, block_sizes=TILES, return_residual=True, implementation="pallas", **options
    )
    arguments = named(*arrays, scale=np.float32(0.4))
    ours, gradients = both_passes(ours)(arguments, cotangents)
    assert_close((ours, gradients), (results, only(gradients, expected)), 2e-5)


@pytest.mark.parametrize(
    "sizes", [(128, 128), pytest.param((256, 128), marks=pytest.mark.one_version)]
)
def test_the_mask_of_both_passes_is_that_of_the_law(sizes, key):
    arrays, _ = operands(t=130, s=270, v=270)
    arrays, output_bar = equal_probabilities(arrays)
    ours = attention(key, block_sizes=sizes, implementation="pallas")
    output, gradients = both_passes(ours)(named(*arrays), jnp.asarray(output_bar))
    assert_reveals(output, gradients["value"], keep_mask(key, (2, 4, 130, 270)))


@pytest.mark.one_version
def test_values_that_nobody_attends_to_may_be_anything(key):
    (query, keys, value), (output_bar, _) = operands(t=128, s=256)
    value[0, 7, 1, 3], value[1, 9, 2, 5] = np.inf, np.nan
    hidden = [x.copy() for x in (keys, value)]
    for x in hidden:
        x[:, 200:] = np.nan

    @functools.partial(jax.jit, static_argnums=0)
    def passes(implementation, *arrays):
        options = dict(block_sizes=TILES, implementation=implementation, key_value_seq_lengths=ends)
        options |= dict(logits_soft_cap=2.0)
        call = functools.partial(attention(key, **options), query)
        y, pullback = jax.vjp(call, *arrays)
        return y, pullback(output_bar)

    ends = np.int32([200, 190])
    y, gradients = passes("pallas", *hidden)
    expected, their_gradients = passes("xla", *hidden)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected))
    assert 0 < np.isfinite(y).mean() < 1
    assert_close(jnp.nan_to_num(y, posinf=9), jnp.nan_to_num(expected, posinf=9))
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))


@pytest.mark.one_version
def test_no_keys_and_no_queries():
    query, keys = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 0, 2, 4))
    call = functools.partial(
        jdropout.dot_product_attention,
        dropout_key=None,
        dropout_rate=0.0,
        implementation="pallas",
        return_residual=True,
    )
    output, residual = call(query, keys, keys)
    assert np.all(output == 0)
    assert np.all(residual == -np.inf)
    assert call(keys, query, query)[0].shape == (1, 0, 2, 4)


@pytest.mark.one_version
def test_attention_with_a_traced_rate_and_flag(key):
    arrays, _ = operands(t=70, s=90)

    @jax.jit
    def outputs(rate, flag):
        options = dict(dropout_rate=rate, deterministic=flag)
        return [
            attention(key, block_sizes=TILES, implementation=name, **options)(*arrays)
            for name in ("pallas", "xla")
        ]

    for rate, flag in ((0.3, False), (0.0, False), (1.0, False), (0.3, True)):
        assert_close(*outputs(rate, flag))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (3, 0)])
def test_empty_arrays(shape, key):
    x, residual, bias = jnp.ones(shape), jnp.ones(shape, jnp.bfloat16), jnp.ones(shape[-1])
    assert kernel(key, x, 0.3).shape == shape
    y = jdropout.bias_dropout_add(key, x, bias, residual, 0.3, implementation="pallas")
    assert (y.shape, y.dtype) == (shape, residual.dtype)


@pytest.mark.one_version
@pytest.mark.parametrize(("b", "v"), [(0, 4), (2, 0)])
def test_no_examples_and_no_features_of_values(b, v, key):
    arrays, _ = operands(b=b, v=v)
    options = dict(block_sizes=TILES, return_residual=True)
    ours, theirs = (
        attention(key, implementation=each, **options)(*arrays) for each in ("pallas", "xla")
    )
    assert_close(ours, theirs)


def test_a_traced_flag_overrules_a_static_rate(key):
    arrays, _ = operands()

    @jax.jit
    def both(flag):
        options = dict(block_sizes=TILES, implementation="pallas")
        calls = dict(deterministic=flag), dict(deterministic=True)
        return [attention(key, **options | call)(*arrays) for call in calls]

    assert_close(*both(True))


@pytest.mark.one_version
def test_keys_in_a_batch(key):
    arrays, _ = operands(t=128, s=128)
    keys = jax.random.split(key, 2)

    def outputs(implementation):
        def call(key):
            return attention(key, block_sizes=TILES, implementation=implementation)(*arrays)

        return jax.jit(jax.vmap(call))(keys)

    assert_close(outputs("pallas"), outputs("xla"))


# --- what they refuse, and where they go --------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(bias=jnp.zeros((1, 1, 1, 1))), "does not support bias. Leave it out"),
        (dict(mask_fn=lambda q, k, h: q > k), "does not support mask_fn"),
        (dict(block_sizes=(64, 128)), r"block_sizes of \(64, 128\)"),
        (dict(precision="high"), "precision='high'. Write 'default' or 'highest'"),
        (dict(precision=("highest", "default")), "Write 'default' or 'highest'"),
        (dict(dropout_broadcast_dims=(-1,)), "Reshape the array"),
        (dict(start=(0, 0, 2, 0), global_shape=(2, 4, 20, 20)), "multiple of 4"),
        (dict(implementation="cudnn"), "implementation must be 'xla' or 'pallas'"),
    ],
)
def test_attention_says_what_the_kernels_do_not_support(arguments, message, key):
    arrays, _ = operands()
    with pytest.raises(ValueError, match=message):
        attention(key, **dict(implementation="pallas", block_sizes=None) | arguments)(*arrays)


def test_dropout_says_what_the_kernel_does_not_support(key):
    with pytest.raises(ValueError, match="x of dtype float16"):
        kernel(key, jnp.ones((4, 4), jnp.float16), 0.3)
    with pytest.raises(ValueError, match=r"a mask of shape \(4,\)"):
        kernel(key, jnp.ones(4), 0.3)
    mesh = jax.sharding.AbstractMesh((2,), "a", axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "a"))
    with pytest.raises(ValueError, match=r"x with the sharding .*'a'.*check_vma=False"):
        jax.eval_shape(
            lambda x: kernel(key, x, 0.3),
            jax.ShapeDtypeStruct((4, 4), jnp.float32, sharding=sharding),
        )


def test_second_derivatives_of_attention_are_refused(key):
    query = jnp.ones((1, 4, 1, 4))
    call = functools.partial(
        jdropout.dot_product_attention,
        dropout_key=key,
        dropout_rate=0.3,
        implementation="pallas",
    )

    def slope(query):
        return jnp.sum(jax.grad(lambda query: jnp.sum(call(query, query, query)))(query) ** 2)

    with pytest.raises(NotImplementedError, match="second derivatives"):
        jax.grad(slope)(query)


def test_both_kernels_lower_for_a_tpu(key):
    x = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)

    def step(x):
        y = kernel(key, x.reshape(2, 256, 256), 0.3).reshape(x.shape)
        y = attention(key, block_sizes=None, is_causal=True, implementation="pallas")(y, y, y)
        return jnp.sum(y.astype(jnp.float32))

    lowered = jax.export.export(jax.jit(jax.grad(step)), platforms=["tpu"])(x)
    assert lowered.mlir_module().count("tpu_custom_call") == 4


@pytest.mark.skipif(not _dropout_kernel_gpu.COMPILES, reason="needs JAX 0.10.2")
def test_the_gpu_kernel_lowers_for_a_gpu(key):
    def step(x):
        y = jax.vmap(
            lambda x: jdropout.bias_dropout_add(key, x, None, x, 0.3, implementation="pallas")
        )(x)
        return jnp.sum(y.astype(jnp.float32))

    x = jax.ShapeDtypeStruct((2, 3, 30, 130), jnp.bfloat16)
    lowered = jax.export.export(jax.jit(jax.grad(step)), platforms=["cuda"])(x)
    assert "mosaic_gpu" in lowered.mlir_module()


@pytest.mark.one_version
def test_batches_lower_for_a_tpu_with_64_bits(key):
    """Mosaic has no 64-bit numbers, and takes a block of scalars only as a whole array."""

    def step(key, x, lengths, first):
        y = kernel(key, x[:, :, 0], 0.3, start=(first, 0, 0), global_shape=(9, 128, 128))
        options = dict(block_sizes=TILES, implementation="pallas", key_value_seq_lengths=lengths)
        y = attention(key, **options)(y[:, :, None], x, x)
        return jnp.sum(y)

    with jax.enable_x64(True):
        batched = jax.jit(jax.vmap(jax.grad(step, argnums=1)))
        shapes = ((4, 2), jnp.uint32), ((4, 2, 128, 1, 128), jnp.float32), ((4, 2), jnp.int32)
        arguments = [jax.ShapeDtypeStruct(*each) for each in (*shapes, ((4,), jnp.int64))]
        lowered = jax.export.export(batched, platforms=["tpu"])(*arguments)
    assert lowered.mlir_module().count("tpu_custom_call") == 4


@pytest.mark.one_version
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_float32_takes_the_highest_precision(dtype, key):
    x = jax.ShapeDtypeStruct((1, 4, 1, 4), dtype)
    call = attention(key, block_sizes=TILES, implementation="pallas", precision="highest")
    # Mosaic refuses it for bfloat16, whose products are exact.
    assert ("HIGHEST" in str(jax.make_jaxpr(call)(x, x, x))) == (dtype == jnp.float32)


@pytest.mark.one_version
def test_scalar_memory_holds_the_tiles_of_one_example(key, monkeypatch):
    seen = []

    def record(name, kernel, operands, *, in_specs, **_):
        seen.append((operands["visited"].shape, in_specs[0]["visited"].block_shape))
        raise StopIteration

    monkeypatch.setattr("jdropout._kernels.call", record)
    arrays, _ = operands(t=300, s=200)
    lengths = np.int32([3, 200])
    call = attention(key, block_sizes=TILES, implementation="pallas", key_value_seq_lengths=lengths)
    with pytest.raises(StopIteration):
        call(*arrays)
    assert seen == [((2, 3, 2), (1, 3, 2))]
