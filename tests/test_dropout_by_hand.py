"""mc_predict of models whose dropout is no layer, or is in a module of the other kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx

import jdropout.linen
import jdropout.nnx

KEY = jax.random.key(0)
X = normal(3, 8)


def drop(key, x):
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)


class Deterministic(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic=True):
        return x if deterministic else drop(self.make_rng("dropout"), x)


class Attribute(linen.Module):
    training: bool = False

    @linen.compact
    def __call__(self, x):
        return drop(self.make_rng("dropout"), x) if self.training else x


class Unknown(linen.Module):
    @linen.compact
    def __call__(self, x, noisy=False):
        return drop(self.make_rng("dropout"), x) if noisy else x


class Net(linen.Module):
    part: linen.Module

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dropout(0.5)(x, deterministic=not train)
        x = linen.BatchNorm(use_running_average=not train)(x)
        if isinstance(self.part, Deterministic):
            return self.part(x, deterministic=not train)
        return self.part(x, train) if isinstance(self.part, Unknown) else self.part(x)


def sampled(model):
    variables = model.init(KEY, X)
    return jdropout.linen.mc_predict(model, variables, X, KEY, num_samples=1000, batch_size=50)


@pytest.mark.parametrize("part", [Deterministic(), Attribute()])
def test_dropout_by_hand_in_linen_is_switched_on(part):
    # Of two masks at rate 1/2 a value is kept by both in a quarter of the samples, fourfold.
    prediction = sampled(Net(part))
    np.testing.assert_allclose(prediction.variance, 3 * np.square(X), rtol=0.35, atol=1e-6)
    np.testing.assert_allclose(prediction.mean, X, atol=0.3 * np.abs(X).max())


def test_dropout_by_hand_that_no_known_flag_switches_on_is_named():
    with pytest.raises(ValueError, match="drops in training at part, which could not be switched"):
        sampled(Net(Unknown()))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, kernel_init=UNIFORM, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x):
        return self.dropout(self.linear(x), deterministic=True)


def test_models_in_models_of_the_other_kind_are_sampled():
    outer = nnx.bridge.to_linen(Layers)
    variables = outer.init(KEY, X)
    prediction = jdropout.linen.mc_predict(outer, variables, X, KEY, num_samples=200)
    y = outer.apply(variables, X)
    np.testing.assert_allclose(prediction.variance, np.square(y), rtol=0.5)

    inner = nnx.bridge.ToNNX(linen.Dropout(0.5, deterministic=True), rngs=nnx.Rngs(dropout=0))
    prediction = jdropout.nnx.mc_predict(inner.lazy_init(X), X, KEY, num_samples=200)
    np.testing.assert_allclose(prediction.variance, np.square(X), rtol=0.5)


class ByHand(nnx.Module):
    def __init__(self, rngs):
        self.stream = rngs.dropout.fork()
        self.deterministic = False
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = x if self.deterministic else drop(self.stream(), x)
        return self.dropout(x)


def test_dropout_by_hand_in_nnx_is_named():
    with pytest.raises(ValueError, match=r"drops in training at drop \(test_dropout_by_hand"):
        jdropout.nnx.mc_predict(ByHand(nnx.Rngs(0)), X, KEY, num_samples=2)
