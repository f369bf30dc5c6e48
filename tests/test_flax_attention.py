"""Attention in Flax's modules: Flax's numbers without dropout, our masks with it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jdropout
import jdropout.linen
import jdropout.nnx

FEATURES, HEADS = 16, 4
FLAX = {"nnx": nnx.dot_product_attention, "linen": linen.dot_product_attention}
OURS = {
    "nnx": jdropout.nnx.dot_product_attention,
    "linen": jdropout.linen.dot_product_attention,
}
both = pytest.mark.parametrize("api", ["nnx", "linen"])


def inputs(key, batch=(2,), queries=9, keys=11, heads=HEADS):
    shapes = [(*batch, length, heads, 8) for length in (queries, keys, keys)]
    return [jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), shapes, strict=True)]


@both
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_without_dropout_it_is_flax_attention(api, batch, key):
    arguments = inputs(key, batch)
    bias = jax.random.normal(key, (*batch, HEADS, 9, 11))
    mask = jax.random.bernoulli(key, 0.7, (*(1,) * len(batch), 1, 9, 11)).at[..., 0].set(True)
    # A rate keeps Flax from handing over to jax.nn, which takes fewer shapes.
    options = {"bias": bias, "dropout_rate": 0.1, "deterministic": True}
    ours = OURS[api](*arguments, mask=mask.astype(jnp.float32), **options)
    flax = jax.jit(functools.partial(FLAX[api], **options))
    theirs = flax(*arguments, mask=jnp.broadcast_to(mask, bias.shape))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("api", "batch"), [("nnx", ()), ("nnx", (2, 3)), ("linen", (2,))], ids=str)
@pytest.mark.parametrize("broadcast", [True, False])
def test_the_mask_is_shared_over_batch_and_heads_if_broadcast(api, batch, broadcast, key):
    query, keys, _ = inputs(key, batch)
    value = jnp.broadcast_to(jnp.eye(11)[:, None], (*batch, 11, HEADS, 11))
    y = OURS[api](
        jnp.zeros_like(query),
        keys,
        value,
        dropout_rng=key,
        dropout_rate=0.5,
        broadcast_dropout=broadcast,
    )
    kept = jnp.moveaxis(y, -2, -3) > 0
    shape = (*batch, HEADS, 9, 11)
    shared = range(len(shape) - 2) if broadcast else ()
    np.testing.assert_array_equal(kept, jdropout.keep_mask(key, 0.5, shape, broadcast_dims=shared))


@both
def test_the_signature_is_that_of_flax(api):
    ours, theirs = inspect.signature(OURS[api]), inspect.signature(FLAX[api])
    assert list(ours.parameters) == list(theirs.parameters)
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default, name


@both
def test_dtype_is_that_of_the_computation(api, key):
    arguments = inputs(key)
    assert OURS[api](*arguments, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    mixed = [arguments[0].astype(jnp.bfloat16), *arguments[1:]]
    with jax.numpy_dtype_promotion("standard"):
        assert OURS[api](*mixed).dtype == jnp.float32


def test_causal_in_nnx(key):
    arguments = inputs(key, queries=11)
    mask = nnx.make_causal_mask(jnp.ones((2, 11)))
    np.testing.assert_allclose(
        OURS["nnx"](*arguments, is_causal=True), OURS["nnx"](*arguments, mask=mask), atol=1e-6
    )


@both
def test_sowing_weights_is_an_error(api, key):
    module = nnx.Module() if api == "nnx" else linen.Module()
    with pytest.raises(ValueError, match=r"module was given.*sow_weights=False"):
        OURS[api](*inputs(key), module=module)


@pytest.mark.parametrize(
    "name", ["einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"]
)
def test_replaced_products_are_an_error(name, key):
    with pytest.raises(ValueError, match=f"{name} must be None"):
        OURS["linen"](*inputs(key), **{name: jnp.einsum})


def nnx_layer(cls, rate, **options):
    return cls(
        num_heads=HEADS,
        in_features=FEATURES,
        dropout_rate=rate,
        decode=False,
        rngs=nnx.Rngs(0),
        **options,
    )


def test_nnx_layer_is_flax_layer_in_evaluation(key):
    x = jax.random.normal(key, (2, 9, FEATURES))
    theirs = nnx_layer(nnx.MultiHeadAttention, 0.3)(x, deterministic=True)
    ours = nnx_layer(jdropout.nnx.MultiHeadAttention, 0.3)(x, deterministic=True)
    swapped = nnx_layer(
        nnx.MultiHeadAttention, 0.3, attention_fn=jdropout.nnx.dot_product_attention
    )(x, deterministic=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(ours, swapped)


def test_nnx_layer_takes_its_key_from_its_stream_and_has_a_mask_for_each_head(key):
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return jdropout.nnx.dot_product_attention(*args, **kwargs)

    x = jax.random.normal(key, (2, 9, FEATURES))
    layer = nnx_layer(jdropout.nnx.MultiHeadAttention, 0.3, attention_fn=spy)
    first, second = (layer(x, deterministic=False) for _ in range(2))
    assert not np.array_equal(first, second)
    assert [call["broadcast_dropout"] for call in calls] == [False, False]
    assert not np.array_equal(*(jax.random.key_data(call["dropout_rng"]) for call in calls))
    again = nnx_layer(jdropout.nnx.MultiHeadAttention, 0.3)(x, deterministic=False)
    np.testing.assert_array_equal(first, again)
    by_rngs = layer(x, deterministic=False, rngs=nnx.Rngs(dropout=7))
    np.testing.assert_array_equal(by_rngs, layer(x, deterministic=False, rngs=nnx.Rngs(dropout=7)))


def test_nnx_layer_trains_under_jit(key):
    x = jax.random.normal(key, (2, 9, FEATURES))
    layer = nnx_layer(jdropout.nnx.MultiHeadAttention, 0.3)

    @nnx.jit
    def gradient(layer, x):
        return nnx.grad(lambda layer: (layer(x, deterministic=False) ** 2).sum())(layer)

    leaves = jax.tree.leaves(gradient(layer, x))
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)
    assert max(jnp.abs(leaf).max() for leaf in leaves) > 0


def test_nnx_layer_decodes_like_flax(key):
    x = jax.random.normal(key, (2, 1, FEATURES))
    outputs = []
    for cls in (nnx.MultiHeadAttention, jdropout.nnx.MultiHeadAttention):
        layer = cls(HEADS, FEATURES, decode=True, rngs=nnx.Rngs(0))
        layer.init_cache((2, 5, FEATURES))
        outputs.append(jnp.stack([layer(x * (step + 1)) for step in range(3)]))
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("rate", [1.5, -0.1])
def test_nnx_layer_checks_its_rate_at_construction(rate):
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\]"):
        nnx_layer(jdropout.nnx.MultiHeadAttention, rate)
    with pytest.raises(TypeError, match="dropout_rate must be a Python number"):
        nnx_layer(jdropout.nnx.MultiHeadAttention, jnp.float32(rate))


def linen_layer(cls, **options):
    return cls(num_heads=HEADS, dropout_rate=0.3, **options)


def test_linen_layer_is_flax_layer_in_evaluation(key):
    x = jax.random.normal(key, (2, 9, FEATURES))
    mask = linen.make_causal_mask(jnp.ones((2, 9)))
    theirs = linen_layer(linen.MultiHeadDotProductAttention)
    variables = theirs.init(key, x, deterministic=True)
    expected = theirs.apply(variables, x, mask=mask, deterministic=True)
    for layer in (
        linen_layer(jdropout.linen.MultiHeadDotProductAttention),
        linen_layer(
            linen.MultiHeadDotProductAttention,
            attention_fn=jdropout.linen.dot_product_attention,
            force_fp32_for_softmax=True,
        ),
    ):
        y = layer.apply(variables, x, mask=mask, deterministic=True)
        np.testing.assert_allclose(y, expected, atol=1e-5)


def test_linen_layer_has_a_mask_for_each_head_unless_told(key):
    x = jax.random.normal(key, (2, 9, FEATURES))
    layer = linen_layer(jdropout.linen.MultiHeadDotProductAttention)
    variables = layer.init(key, x, deterministic=True)

    def train(layer):
        return layer.apply(variables, x, deterministic=False, rngs={"dropout": key})

    np.testing.assert_array_equal(train(layer), train(layer))
    plain = linen_layer(
        linen.MultiHeadDotProductAttention, attention_fn=jdropout.linen.dot_product_attention
    )
    assert not np.array_equal(train(layer), train(plain))
    np.testing.assert_array_equal(train(layer), train(plain.clone(broadcast_dropout=False)))
    np.testing.assert_array_equal(train(layer.clone(broadcast_dropout=True)), train(plain))
