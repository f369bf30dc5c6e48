"""Layers around blocks with variables and random streams; attention with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx

import jdropout
import jdropout.linen
import jdropout.nnx

KEY = jax.random.key(0)
X = normal(4, 8)


def nnx_block(rngs):
    return nnx.Sequential(
        nnx.Linear(8, 8, kernel_init=UNIFORM, rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        jdropout.nnx.Dropout(0.5, rngs=rngs),
    )


def test_a_skipped_nnx_block_keeps_its_state_and_a_run_one_advances_it():
    layer = jdropout.nnx.LayerDrop(nnx_block(nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(1))

    @nnx.jit
    def loss(layer, x):
        def total(layer, x):
            y = layer(x)
            return y.sum(), y

        (_, y), gradients = nnx.value_and_grad(nnx.remat(total), has_aux=True)(layer, x)
        return y, gradients["layer"]["layers"][0]["kernel"][...]

    skipped = 0
    for step in range(12):
        mean, count = layer.layer.layers[1].mean[...], layer.layer.layers[2].rngs.count[...]
        y, gradient = loss(layer, X)
        same = bool((y == X).all())
        skipped += same
        assert (layer.layer.layers[2].rngs.count[...] == count) == same
        assert bool((layer.layer.layers[1].mean[...] == mean).all()) == same
        assert bool((gradient == 0).all()) == same
        assert layer.rngs.count[...] == step + 1
    assert 0 < skipped < 12
    layer.eval()
    assert layer.deterministic
    assert not (layer(X) == X).all()
    jdropout.audit(loss, layer, X).assert_clean()


def test_nnx_layers_in_a_scan_are_skipped_one_by_one():
    @nnx.split_rngs(splits=6)
    @nnx.vmap(axis_size=6)
    def make(rngs):
        return jdropout.nnx.LayerDrop(
            nnx.Linear(8, 8, kernel_init=UNIFORM, rngs=rngs), 0.5, rngs=rngs
        )

    @nnx.jit
    def run(stack, x):
        def body(x, layer):
            y = layer(x)
            return y, (y == x).all()

        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(x, stack)

    _, skipped = run(make(nnx.Rngs(0)), X)
    assert 0 < skipped.sum() < 6


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, mask, scale=1.0):
        x = linen.Dense(8, kernel_init=UNIFORM)(x) * mask * scale
        x = linen.BatchNorm(use_running_average=False)(x)
        return linen.Dropout(0.5, deterministic=False)(x)


def test_a_skipped_linen_block_keeps_its_state_and_a_run_one_advances_it():
    layer = linen.remat(jdropout.linen.LayerDrop)(Block(), 0.5, deterministic=False)
    mask = jnp.ones((4, 1))
    variables = layer.init({"params": KEY, "dropout": KEY}, X, mask)

    @jax.jit
    def loss(params, key):
        def total(params):
            y, state = layer.apply(
                {**variables, "params": params},
                X,
                mask,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return y.sum(), (y, state["batch_stats"])

        return jax.value_and_grad(total, has_aux=True)(params)

    skipped = 0
    for seed in range(12):
        (_, (y, state)), gradient = loss(variables["params"], jax.random.key(seed))
        same = bool((y == X).all())
        skipped += same
        unchanged = jax.tree.map(lambda a, b: (a == b).all(), state, variables["batch_stats"])
        assert all(jax.tree.leaves(unchanged)) == same
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient)) == same
    assert 0 < skipped < 12


def test_patch_dropout_of_everything_leaves_one_token():
    x = X[None]
    layer = jdropout.nnx.PatchDropout(1.0, num_prefix_tokens=0, rngs=nnx.Rngs(0))
    assert layer(x).shape == (1, 1, 8)
    layer = jdropout.linen.PatchDropout(1.0, num_prefix_tokens=0, deterministic=False)
    assert layer.apply({}, x, rngs={"dropout": KEY}).shape == (1, 1, 8)


def test_attention_token_by_token_is_the_causal_pass_and_takes_a_key():
    layer = jdropout.nnx.MultiHeadAttention(
        2, 8, decode=True, kernel_init=UNIFORM, dropout_rate=0.5, rngs=nnx.Rngs(0)
    )
    x = normal(2, 5, 8)
    layer.init_cache(x.shape)
    causal = nnx.make_causal_mask(jnp.ones((2, 5)))
    whole = layer(x, decode=False, mask=causal, deterministic=True)
    step = nnx.jit(lambda layer, x: layer(x, is_causal=True, deterministic=True))
    steps = [step(layer, x[:, i : i + 1]) for i in range(x.shape[1])]
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, rtol=1e-5, atol=1e-6)
    results = [layer(x, decode=False, deterministic=False, rngs=KEY) for _ in range(2)]
    np.testing.assert_array_equal(*results)
    assert (results[0] != whole).any()


@pytest.mark.parametrize("step", [1, 2])
def test_raw_keys_of_four_words_are_those_of_rbg(step):
    typed = jax.random.key(0, impl="rbg")
    model = jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    linen_model = jdropout.linen.Dropout(0.5, deterministic=False)

    def outputs(root):
        jdropout.nnx.set_site_keys(model, root, step=step)
        apply = jdropout.linen.with_site_keys(linen_model.apply, root, step=step)
        return model(X), apply({}, X)

    raw = outputs(jax.random.key_data(typed))
    jax.tree.map(np.testing.assert_array_equal, raw, outputs(typed))


def test_layers_whose_keys_cannot_be_set_are_named():
    model = nnx.List([nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5), nnx.Dropout(0.0)])
    with pytest.raises(ValueError, match=r"without a random stream, whose keys.*: 1\. Build"):
        jdropout.nnx.set_site_keys(model, KEY, step=0)


def test_a_model_that_hides_apply_is_refused():
    def call(input_ids, params):
        return input_ids

    with pytest.raises(TypeError, match=r"apply must take rngs.*model\.module\.apply"):
        jdropout.linen.with_site_keys(call, KEY, step=0)


def test_a_dense_layer_has_inputs_and_outputs():
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        jdropout.nnx.VariationalDense(0, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the last axis of inputs must be at least 1, got 0"):
        jdropout.linen.VariationalDense(3).init(KEY, jnp.zeros((2, 0)), deterministic=True)


def test_multi_sample_is_the_mean_over_masks_and_one_call_in_evaluation():
    head = nnx.Sequential(
        jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
        nnx.Linear(8, 2, kernel_init=UNIFORM, rngs=nnx.Rngs(0)),
    )
    layer = jdropout.nnx.MultiSample(head, 400, batch_size=100, rngs=nnx.Rngs(1))
    whole = head.layers[1](X)
    spread = np.sqrt(np.square(X) @ np.square(head.layers[1].kernel[...]) / 400)

    @nnx.jit
    def loss(layer, x):
        return nnx.value_and_grad(lambda layer, x: (layer(x).sum(), layer(x)), has_aux=True)(
            layer, x
        )

    (_, mean), gradient = loss(layer, X)
    assert (np.abs(mean - whole) < 5 * spread).all()
    assert (gradient["layer"]["layers"][1]["kernel"][...] != 0).all()
    head.eval()
    np.testing.assert_allclose(layer(X, deterministic=True), whole, rtol=1e-5)

    linen_head = linen.Sequential(
        [linen.Dropout(0.5, deterministic=False), linen.Dense(2, kernel_init=UNIFORM)]
    )
    layer = jdropout.linen.MultiSample(linen_head, 400)
    variables = layer.init({"params": KEY, "dropout": KEY}, X, deterministic=False)
    mean = layer.apply(variables, X, deterministic=False, rngs={"dropout": KEY})
    kernel = jax.tree.leaves(variables["params"])[1]
    spread = np.sqrt(np.square(X) @ np.square(kernel) / 400)
    assert (np.abs(mean - X @ kernel) < 5 * spread).all()


def test_multi_sample_refuses_a_state_that_changes():
    layer = jdropout.nnx.MultiSample(nnx_block(nnx.Rngs(0)), 2, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="layer changes its state"):
        layer(X)
