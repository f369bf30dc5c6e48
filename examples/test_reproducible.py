"""Tests that the training of a small network is reproducible.

Copy this file into your tests and replace the model, data and training step with your own.

    pip install pytest optax 'jdropout[flax]'
    python -m pytest test_reproducible.py
"""

import os

# Eight CPU devices, for the sharding test. This must be set before JAX starts: if you have several
# test files, set it in conftest.py.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType

import jdropout.nnx
from jdropout.keys import site_key
from jdropout.testing import (
    assert_backward_uses_forward_mask,
    assert_reproducible,
    assert_sharding_invariant,
    assert_unbiased,
    mask_fingerprint,
)

# --- a network and its training, to be tested ----------------------------------------------

RATE = 0.25
ROOT = jax.random.key(2026)
OPTIMIZER = optax.adam(1e-2)


class Network(nnx.Module):
    """One hidden layer with dropout. No key means evaluation."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(16, 32, rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(RATE)
        self.output = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns the logits."""
        x = nnx.relu(self.hidden(x))
        x = self.dropout(x, deterministic=key is None, rngs=key)
        return self.output(x)


GRAPH, PARAMS = nnx.split(Network(nnx.Rngs(0)))


def batch(step):
    """Generates the data of a step from the step number only, so any step can be repeated."""
    x = np.random.default_rng([1, step]).normal(size=(16, 16)).astype(np.float32)
    return x, x[:, :4].argmax(axis=1)


def loss(params, x, labels, step):
    key = site_key(ROOT, step=step, site="hidden")
    logits = nnx.merge(GRAPH, params)(x, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(params, state, x, labels, step):
    gradient = jax.grad(loss)(params, x, labels, step)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def train(steps, checkpoint=None):
    first, params, state = checkpoint or (0, PARAMS, OPTIMIZER.init(PARAMS))
    for step in range(first, steps):
        params, state = train_step(params, state, *batch(step), step)
    return steps, params, state


def dropout(key, x):
    """The network's dropout layer as a function of its key."""
    return Network(nnx.Rngs(0)).dropout(x, deterministic=False, rngs=key)


# --- the tests ----------------------------------------------------------------------------


def test_training_ends_in_the_same_bits_every_time():
    assert_reproducible(lambda: train(steps=6), clear_caches=True)


def test_training_ends_in_the_same_bits_after_an_interruption():
    ways = iter([lambda: train(steps=6), lambda: train(steps=6, checkpoint=train(steps=3))])
    assert_reproducible(lambda: next(ways)())


def test_masks_do_not_depend_on_the_sharding():
    assert_sharding_invariant(jax.jit(dropout), ROOT, jnp.ones((16, 32)))


def test_gradients_do_not_depend_on_the_sharding():
    # Sums over shards round differently, so compare up to rounding. Use your own mesh.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    gradient = jax.jit(lambda x, labels: jax.grad(loss)(PARAMS, x, labels, 0))
    assert_sharding_invariant(gradient, *batch(step=0), mesh=mesh, rtol=1e-5)


def test_backward_pass_has_the_mask_of_the_forward_pass():
    assert_backward_uses_forward_mask(lambda x: dropout(ROOT, x), jnp.ones((16, 32)))


def test_dropout_leaves_the_mean_as_it_is():
    assert_unbiased(dropout, jnp.ones((16, 32)), key=ROOT, rate=RATE)


def test_the_first_mask_is_the_one_that_it_always_was():
    key = site_key(ROOT, step=0, site="hidden")
    assert mask_fingerprint(key, RATE, (16, 32)) == "e46b76a626024e74"
