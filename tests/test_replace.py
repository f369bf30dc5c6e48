"""Models of Flax that nobody edits: their dropout is replaced, in Flax, in a call and in place."""

import functools

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx
from flax.linen import Dropout as BoundName

import jdropout
import jdropout.equinox
import jdropout.linen
import jdropout.nnx

KEY = jax.random.key(0)
X = normal(2, 4, 8)


def block(layers):
    """A linen model, whose layers come from a namespace such as `flax.linen`."""

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = layers.Dropout(0.5)(x, deterministic=not train)
            x = layers.SelfAttention(2, dropout_rate=0.3, kernel_init=UNIFORM)(
                x, deterministic=not train
            )
            attention = layers.MultiHeadDotProductAttention(
                2, dropout_rate=0.3, kernel_init=UNIFORM
            )
            return attention(x, deterministic=not train)

    return Block()


@pytest.fixture(scope="module")
def variables():
    return block(linen).init(KEY, X, False)


@pytest.fixture(scope="module")
def expected(variables):
    return block(jdropout.linen).apply(variables, X, True, rngs={"dropout": KEY})


def test_replacing_gives_the_bits_of_our_layers_at_their_paths(variables, expected):
    model = block(linen)
    apply = jdropout.linen.replacing()(model.apply)
    for _ in range(2):
        np.testing.assert_array_equal(apply(variables, X, True, rngs={"dropout": KEY}), expected)
    assert (model.apply(variables, X, True, rngs={"dropout": KEY}) != expected).any()
    np.testing.assert_allclose(
        apply(variables, X, False), model.apply(variables, X, False), rtol=1e-5
    )
    report = jdropout.audit(lambda key: apply(variables, X, True, rngs={"dropout": key}), KEY)
    report.assert_clean()
    assert [site.kind for site in report.sites] == ["dropout", "attention", "attention"]


def test_replacing_and_site_keys_work_in_either_order(variables):
    def keyed(apply):
        return jdropout.linen.with_site_keys(apply, KEY, step=3)

    expected = keyed(block(jdropout.linen).apply)(variables, X, True)
    apply = block(linen).apply
    replacing = jdropout.linen.replacing
    for replaced in (keyed(replacing()(apply)), replacing()(keyed(apply))):
        np.testing.assert_array_equal(replaced(variables, X, True), expected)


def test_install_reaches_linen_models_and_names_what_it_does_not(variables, expected):
    with pytest.warns(UserWarning, match=rf"{__name__}\.BoundName"):
        jdropout.linen.install()
    try:
        model = block(flax.linen)
        result = model.apply(variables, X, True, rngs={"dropout": KEY})
        np.testing.assert_array_equal(result, expected)
        assert BoundName is not linen.Dropout
    finally:
        jdropout.linen.uninstall()
    assert linen.Dropout is BoundName
    assert jdropout.linen.MultiHeadDotProductAttention is not linen.MultiHeadDotProductAttention


class Inherits(nnx.Dropout):
    """Overrides the constructor alone, as some models do."""

    def __init__(self, rate, name, rngs):
        self.name = name
        super().__init__(rate, rngs=rngs)


class Overrides(nnx.Dropout):
    def __call__(self, inputs):
        return super().__call__(inputs)


class Model(nnx.Module):
    def __init__(self, rngs, layers=nnx):
        attention = functools.partial(
            layers.MultiHeadAttention, 2, 8, decode=False, kernel_init=UNIFORM, rngs=rngs
        )
        self.attention = attention(dropout_rate=0.3)
        self.without_dropout = attention()
        self.other = attention(dropout_rate=0.3, attention_fn=lambda *_, **__: None)
        self.dropout = layers.Dropout(0.5, rngs=rngs)
        self.inherits = Inherits(0.5, "a", rngs=rngs)
        self.overrides = Overrides(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.attention(x, deterministic=False)
        return self.inherits(self.dropout(x))


def test_replace_dropout_replaces_what_is_safe_and_names_the_rest():
    model = Model(nnx.Rngs(0))
    with pytest.warns(UserWarning, match="left alone") as warned:
        assert jdropout.nnx.replace_dropout(model) == 3
    (message,) = [str(warning.message) for warning in warned]
    assert "overrides (Overrides has a call of its own)" in message
    assert "other (its attention_fn is not Flax's)" in message
    assert isinstance(model.inherits, Inherits)
    assert model.inherits.name == "a"
    assert type(model.without_dropout) is nnx.MultiHeadAttention
    report = jdropout.audit(Model.__call__, model, X)
    assert [site.kind for site in report.sites] == ["attention", "dropout", "dropout"]
    assert {site.stored_bytes for site in report.sites} == {8}
    report.assert_clean()
    assert nnx.jit(Model.__call__)(model, X).shape == X.shape


def test_install_reaches_nnx_models_and_our_own_layers_go_on_working():
    with jdropout.nnx.replacing():
        assert nnx.Dropout is jdropout.nnx.Dropout
        model = nnx.List([nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jdropout.nnx.DropPath(0.5)])
        assert jdropout.nnx.set_rate(model, 0.2) == 2
        assert jdropout.nnx.replace_dropout(model) == 0
        prediction = jdropout.nnx.mc_predict(
            model, X, KEY, num_samples=4, apply=lambda model, x: model[0](x)
        )
        assert (prediction.variance > 0).any()
        attention = nnx.MultiHeadAttention(
            2, 8, decode=False, kernel_init=UNIFORM, rngs=nnx.Rngs(0)
        )
        assert type(attention) is jdropout.nnx.MultiHeadAttention
    assert nnx.Dropout is not jdropout.nnx.Dropout


def test_the_layer_of_equinox_is_dropout():
    model = eqx.nn.Sequential([eqx.nn.Lambda(jnp.tanh), jdropout.equinox.Dropout(0.5)])
    call = eqx.filter_jit(lambda model, x, key: model(x, key=key))
    expected = jdropout.dropout(jax.random.split(KEY)[1], jnp.tanh(X), 0.5)
    np.testing.assert_allclose(call(model, X, KEY), expected, rtol=1e-6)
    np.testing.assert_allclose(call(eqx.nn.inference_mode(model), X, KEY), jnp.tanh(X), rtol=1e-6)
    report = jdropout.audit(call, model, X, KEY)
    assert [site.kind for site in report.sites] == ["dropout"]

    def sample(key, model, x):
        return model(x, key=key)

    prediction = jdropout.mc_predict(sample, KEY, model, X, num_samples=200)
    np.testing.assert_allclose(prediction.variance, np.square(jnp.tanh(X)), atol=0.3)
