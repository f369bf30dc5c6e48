"""Attention in Flax's modules: Flax's numbers without dropout, our masks with it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import UNIFORM, normal
from dense_attention import RATE
from flax import linen, nnx

import jdropout
import jdropout.linen
import jdropout.nnx

FEATURES, HEADS = 8, 2
QUERIES, KEYS = 5, 7
DOCUMENTS = np.int32([[1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0], [5, 5, 5, 5, 5, 1, 1, 1, 1, 1, 1]])
FLAX = {"nnx": nnx.dot_product_attention, "linen": linen.dot_product_attention}
OURS = {
    "nnx": jdropout.nnx.dot_product_attention,
    "linen": jdropout.linen.dot_product_attention,
}
both = pytest.mark.parametrize("api", ["nnx", "linen"])


def inputs(batch=(2,), queries=QUERIES, keys=KEYS):
    lengths = enumerate((queries, keys, keys))
    return [normal(*batch, length, HEADS, 4, seed=seed) for seed, length in lengths]


@both
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_without_dropout_it_is_flax_attention(api, batch):
    arguments = inputs(batch)
    bias = normal(*batch, HEADS, QUERIES, KEYS, seed=3)
    mask = normal(*(1,) * len(batch), 1, QUERIES, KEYS, seed=4) < 0.5
    mask = mask.at[..., 0].set(True)

    @jax.jit
    def both_attentions(*arguments, bias, mask):
        # A rate keeps Flax from handing over to jax.nn, which takes fewer shapes.
        options = {"bias": bias, "dropout_rate": 0.1, "deterministic": True}
        ours = OURS[api](*arguments, mask=mask.astype(jnp.float32), **options)
        return ours, FLAX[api](*arguments, mask=jnp.broadcast_to(mask, bias.shape), **options)

    ours, theirs = both_attentions(*arguments, bias=bias, mask=mask)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("api", "batch"), [("nnx", ()), ("nnx", (2, 3)), ("linen", (2,))], ids=str)
@pytest.mark.parametrize("broadcast", [True, False])
def test_the_mask_is_shared_over_batch_and_heads_if_broadcast(api, batch, broadcast, key):
    query, keys, _ = inputs(batch)
    value = jnp.broadcast_to(jnp.eye(KEYS)[:, None], (*batch, KEYS, HEADS, KEYS))
    options = {"dropout_rng": key, "dropout_rate": 0.5, "broadcast_dropout": broadcast}
    y = jax.jit(functools.partial(OURS[api], **options))(jnp.zeros_like(query), keys, value)
    kept = jnp.moveaxis(y, -2, -3) > 0
    shape = (*batch, HEADS, QUERIES, KEYS)
    shared = range(len(shape) - 2) if broadcast else ()
    np.testing.assert_array_equal(kept, jdropout.keep_mask(key, 0.5, shape, broadcast_dims=shared))


@both
def test_the_signature_is_that_of_flax(api):
    """And at its end what `jdropout.dot_product_attention` takes beyond it."""
    ours, theirs = inspect.signature(OURS[api]), inspect.signature(FLAX[api])
    assert list(ours.parameters) == [*theirs.parameters, "options"]
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default, name


@both
def test_dtype_is_that_of_the_computation(api):
    arguments = inputs()
    half = functools.partial(OURS[api], dtype=jnp.bfloat16)
    assert jax.eval_shape(half, *arguments).dtype == jnp.bfloat16
    mixed = [arguments[0].astype(jnp.bfloat16), *arguments[1:]]
    with jax.numpy_dtype_promotion("standard"):
        assert jax.eval_shape(OURS[api], *mixed).dtype == jnp.float32


def test_causal_in_nnx():
    arguments = inputs(queries=KEYS)
    mask = nnx.make_causal_mask(jnp.ones((2, KEYS)))
    causal = jax.jit(functools.partial(OURS["nnx"], is_causal=True))(*arguments)
    masked = jax.jit(OURS["nnx"])(*arguments, mask=mask)
    np.testing.assert_allclose(causal, masked, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"]
)
def test_replaced_products_are_an_error(name):
    with pytest.raises(ValueError, match=f"{name} must be None"):
        OURS["linen"](*inputs(), **{name: jnp.einsum})


def nnx_layer(cls, rate, **options):
    return cls(
        num_heads=HEADS,
        in_features=FEATURES,
        dropout_rate=rate,
        decode=False,
        kernel_init=UNIFORM,
        rngs=nnx.Rngs(0),
        **options,
    )


def test_nnx_layer_is_flax_layer_in_evaluation():
    layers = nnx.List(
        [
            nnx_layer(nnx.MultiHeadAttention, 0.3),
            nnx_layer(jdropout.nnx.MultiHeadAttention, 0.3),
            nnx_layer(nnx.MultiHeadAttention, 0.3, attention_fn=jdropout.nnx.dot_product_attention),
        ]
    )
    graph, state = nnx.split(layers)

    @jax.jit
    def outputs(state, x):
        return [layer(x, deterministic=True) for layer in nnx.merge(graph, state)]

    theirs, ours, swapped = outputs(state, normal(2, QUERIES, FEATURES))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(ours, swapped)


def test_nnx_layer_takes_its_key_from_its_stream_and_has_a_mask_for_each_head():
    calls = []

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return jdropout.nnx.dot_product_attention(*args, **kwargs)

    x = normal(2, QUERIES, FEATURES)
    layer = nnx_layer(jdropout.nnx.MultiHeadAttention, 0.3, attention_fn=spy)
    first, second = (layer(x, deterministic=False) for _ in range(2))
    assert not np.array_equal(first, second)
    assert [call["broadcast_dropout"] for call in calls] == [False, False]
    assert not np.array_equal(*(jax.random.key_data(call["dropout_rng"]) for call in calls))
    again = nnx_layer(jdropout.nnx.MultiHeadAttention, 0.3)(x, deterministic=False)
    np.testing.assert_array_equal(first, again)
    by_rngs = layer(x, deterministic=False, rngs=nnx.Rngs(dropout=7))
    np.testing.assert_array_equal(by_rngs, layer(x, deterministic=False, rngs=nnx.Rngs(dropout=7)))


def test_nnx_layer_trains_under_jit():
    graph, state = nnx.split(nnx_layer(jdropout.nnx.MultiHeadAttention, 0.3))

    @jax.jit
    def gradient(state, x):
        layer = nnx.merge(graph, state)
        return nnx.grad(lambda layer: (layer(x, deterministic=False) ** 2).sum())(layer)

    leaves = jax.tree.leaves(gradient(state, normal(2, QUERIES, FEATURES)))
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)
    assert max(jnp.abs(leaf).max() for leaf in leaves) > 0


def test_nnx_layer_decodes_like_flax():
    x = normal(2, 1, FEATURES)
    layers = []
    for cls in (nnx.MultiHeadAttention, jdropout.nnx.MultiHeadAttention):
        layers.append(cls(HEADS, FEATURES, decode=True, kernel_init=UNIFORM, rngs=nnx.Rngs(0)))
        layers[-1].init_cache((2, 5, FEATURES))
    graph, state = nnx.split(nnx.List(layers))

    @jax.jit
    def step(state, x):
        layers = nnx.merge(graph, state)
        return [layer(x) for layer in layers], nnx.state(layers)

    for number in range(3):
        (theirs, ours), state = step(state, x * (number + 1))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("rate", [1.5, -0.1])
def test_nnx_layer_checks_its_rate_at_construction(rate):
    with pytest.raises(ValueError, match=r"dropout_rate must be in \[0, 1\]"):
        nnx_layer(jdropout.nnx.MultiHeadAttention, rate)
    with pytest.raises(TypeError, match="dropout_rate must be a Python number"):
        nnx_layer(jdropout.nnx.MultiHeadAttention, jnp.float32(rate))


def linen_layer(cls, **options):
    return cls(num_heads=HEADS, dropout_rate=0.3, kernel_init=UNIFORM, **options)


def apply(layer, variables, *args, **options):
    return jax.jit(functools.partial(layer.apply, **options))(variables, *args)


def test_linen_layer_is_flax_layer_in_evaluation(key):
    x = normal(2, QUERIES, FEATURES)
    mask = linen.make_causal_mask(jnp.ones((2, QUERIES)))
    theirs = linen_layer(linen.MultiHeadDotProductAttention)
    variables = jax.jit(functools.partial(theirs.init, deterministic=True))(key, x)
    expected = apply(theirs, variables, x, mask=mask, deterministic=True)
    for layer in (
        linen_layer(jdropout.linen.MultiHeadDotProductAttention),
        linen_layer(
            linen.MultiHeadDotProductAttention,
            attention_fn=jdropout.linen.dot_product_attention,
            force_fp32_for_softmax=True,
        ),
    ):
        y = apply(layer, variables, x, mask=mask, deterministic=True)
        np.testing.assert_allclose(y, expected, atol=1e-5)


def test_linen_layer_has_a_mask_for_each_head_unless_told(key):
    x = normal(2, QUERIES, FEATURES)
    layer = linen_layer(jdropout.linen.MultiHeadDotProductAttention)
    variables = jax.jit(functools.partial(layer.init, deterministic=True))(key, x)

    def train(layer):
        return apply(layer, variables, x, deterministic=False, rngs={"dropout": key})

    plain = linen_layer(
        linen.MultiHeadDotProductAttention, attention_fn=jdropout.linen.dot_product_attention
    )
    own, shared = train(layer), train(plain)
    assert not np.array_equal(own, shared)
    np.testing.assert_array_equal(own, train(plain.clone(broadcast_dropout=False)))
    np.testing.assert_array_equal(train(layer.clone(broadcast_dropout=True)), shared)


# --- weights, caches and packed documents -------------------------------------------------


def sown(layer, x):
    if hasattr(nnx, "capture"):
        return nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True)[1]
    layer(x, sow_weights=True)  # Flax 0.12.4
    return nnx.state(layer, nnx.Intermediate)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_layers_sow_the_weights_that_flax_sows(api, key):
    x = normal(2, 5, 8)
    options = dict(num_heads=2, kernel_init=UNIFORM)
    if api == "nnx":
        layers = [
            cls(**options, in_features=8, decode=False, rngs=nnx.Rngs(0))
            for cls in (nnx.MultiHeadAttention, jdropout.nnx.MultiHeadAttention)
        ]
        theirs, ours = (sown(layer, x) for layer in layers)
    else:
        layers = [
            module.MultiHeadDotProductAttention(**options) for module in (linen, jdropout.linen)
        ]
        variables = layers[0].init(key, x)
        theirs, ours = (
            layer.apply(variables, x, sow_weights=True, mutable="intermediates")[1]
            for layer in layers
        )
    leaves = [jax.tree.leaves(state) for state in (theirs, ours)]
    assert [x.shape for x in leaves[1]] == [(2, 2, 5, 5)]
    np.testing.assert_allclose(*map(np.asarray, (leaves[1][0], leaves[0][0])), atol=1e-6)


def test_replaced_layers_sow_too(key):
    x = normal(2, 5, 8)
    options = dict(num_heads=2, dropout_rate=RATE, deterministic=False, kernel_init=UNIFORM)
    theirs, ours = (
        module.MultiHeadDotProductAttention(**options) for module in (linen, jdropout.linen)
    )
    variables = theirs.init({"params": key, "dropout": key}, x)
    call = dict(rngs={"dropout": key}, sow_weights=True, mutable="intermediates")
    with jdropout.linen.replacing():
        replaced = theirs.apply(variables, x, **call)
    jax.tree.map(np.testing.assert_array_equal, replaced, ours.apply(variables, x, **call))


@pytest.mark.parametrize("rate", [0.0, RATE])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_layer_with_a_cache_equals_its_pass_over_all_tokens(api, rate, key):
    length = 6
    x = normal(2, length, 8)
    causal = linen.make_causal_mask(x[..., 0])
    options = dict(num_heads=2, dropout_rate=rate, kernel_init=UNIFORM)
    if api == "nnx":
        layer = jdropout.nnx.MultiHeadAttention(
            **options, in_features=8, decode=True, rngs=nnx.Rngs(0)
        )
        whole = layer(x, mask=causal, decode=False, deterministic=False, rngs=key)
        layer.init_cache((2, length, 8))
        tokens = [layer(x[:, i : i + 1], deterministic=False, rngs=key) for i in range(length)]
    else:
        layer = jdropout.linen.MultiHeadDotProductAttention(**options, deterministic=False)
        rngs = dict(dropout_rng=key)
        variables = layer.clone(decode=True).init({"params": key, "dropout": key}, x)
        params = {"params": variables["params"]}
        whole = layer.apply(params, x, mask=causal, **rngs)
        cache, tokens = variables["cache"], []
        for i in range(length):
            token, changed = layer.clone(decode=True).apply(
                params | {"cache": cache}, x[:, i : i + 1], mutable="cache", **rngs
            )
            cache = changed["cache"]
            tokens.append(token)
    np.testing.assert_allclose(jnp.concatenate(tokens, 1), whole, atol=1e-5)


def test_with_a_cache_causality_is_not_passed_on():
    """The attention of Flax would place the one query before all keys but the first."""
    outputs = []
    for is_causal in (False, True):
        layer = jdropout.nnx.MultiHeadAttention(
            2,
            8,
            decode=True,
            kernel_init=UNIFORM,
            rngs=nnx.Rngs(0),
            attention_fn=nnx.dot_product_attention,
        )
        layer.init_cache((2, 3, 8))
        for seed in range(2):
            y = layer(normal(2, 1, 8, seed=seed), is_causal=is_causal)
        outputs.append(y)
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_layers_keep_packed_documents_apart(api, key):
    x, ids = normal(2, 3, 11, 8), np.stack([DOCUMENTS] * 3, axis=1)
    options = dict(num_heads=2, kernel_init=UNIFORM)
    same = ids[..., None, :, None] == ids[..., None, None, :]
    if api == "nnx":
        layer = jdropout.nnx.MultiHeadAttention(
            **options, in_features=8, decode=False, rngs=nnx.Rngs(0)
        )
    else:
        unbound = jdropout.linen.MultiHeadDotProductAttention(**options)
        layer = unbound.bind(unbound.init(key, x))
    np.testing.assert_allclose(layer(x, query_segment_ids=ids), layer(x, mask=same), atol=1e-6)


def test_segments_need_an_attention_fn_of_ours():
    layer = jdropout.nnx.MultiHeadAttention(
        2, 8, decode=False, rngs=nnx.Rngs(0), attention_fn=nnx.dot_product_attention
    )
    with pytest.raises(ValueError, match="query_segment_ids can only be used with an attention_fn"):
        layer(jnp.ones((2, 3, 8)), query_segment_ids=jnp.ones((2, 3), int))


def test_options_reach_the_attention_of_a_flax_layer():
    attention_fn = functools.partial(jdropout.nnx.dot_product_attention, logits_soft_cap=0.1)
    layers = [
        nnx.MultiHeadAttention(2, 8, decode=False, kernel_init=UNIFORM, rngs=nnx.Rngs(0), **options)
        for options in ({}, dict(attention_fn=attention_fn))
    ]
    plain, capped = (layer(5 * normal(2, 3, 8)) for layer in layers)
    assert not np.allclose(plain, capped)
